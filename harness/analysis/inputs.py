"""What every analysis starts from: data sets, the base model, and its layers' inputs on sampled rows.

Everything runs in this process, on one device, with the whole model resident; nothing is cached.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.config import RunConfig, SourceConfig, nearest
from harness.console import progress
from harness.data.collation import Batch, collate
from harness.data.sources import Example, read_examples
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import adapted_modules
from harness.stages.calibrate import BATCH_ROWS, calibration_rows, probe_inputs
from harness.tasks.base import Task
from harness.tasks.registry import task_class
from harness.training.distributed import training_device

T = TypeVar("T")
Collector = Callable[[nn.Module, dict[str, nn.Linear], dict[str, str], Iterable[Batch]], dict[str, T]]
FILES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class DataSet:
    """Texts to look at. ``label`` is their name in figures, ``key`` in messages (``data.preserve``, ``--data``)."""

    label: str
    key: str
    source: SourceConfig
    examples: list[Example]

    def rows(
        self,
        task: Task,
        sampling_round: int = 0,
        pool: list[Example] | None = None,
    ) -> list[Row]:
        """``samples`` rows drawn as the calibrate stage draws them, from ``pool`` if it is given."""
        _check_task(type(task))
        examples = self.examples if pool is None else pool
        return calibration_rows(task, self.source, examples, self.key, sampling_round)

    def record(self) -> dict[str, object]:
        """What the JSON says of the data set."""
        columns = [column for column in (self.source.prompt, self.source.response) if column is not None]
        return {"label": self.label, "path": self.source.path, "columns": columns, "samples": self.source.samples}


def _check_task(task: type[Task]) -> None:
    if not task.reads_text:
        raise UserError(f"task: {task.name} given; `harness analyse` looks at texts, which rows of that task have not")


def configured(config: RunConfig, name: str, samples: int | None = None) -> DataSet:
    """The configuration's ``train`` or ``preserve`` set.

    Raises:
        UserError: there is no such set, or it cannot be read.
    """
    _check_task(task_class(config.task))
    source = getattr(config.data, name)
    if source is None:
        raise UserError(f"data.{name}: missing; add it to the configuration, or give --data FILE:COLUMN")
    return _read(f"{name}\n{Path(source.path).stem}", f"data.{name}", source, samples)


def given(argument: str, samples: int | None = None, option: str = "--data") -> DataSet:
    """The data set of ``--data FILE:COLUMN``.

    Raises:
        UserError: not of that form, no such file, or no such column.
    """
    file, _, column = argument.rpartition(":")
    if not file or not column:
        raise UserError(f"{option}: {argument!r} given; write FILE:COLUMN, for example texts.jsonl:text")
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"{option}: {file}: no such file; give a {', '.join(FILES)} file")
    if path.suffix not in FILES:
        raise UserError(f"{option}: {file}: allowed are {', '.join(FILES)} files")
    return _read(path.stem, option, SourceConfig(path=str(path), prompt=column), samples)


def _read(label: str, key: str, source: SourceConfig, samples: int | None) -> DataSet:
    if samples is not None:
        source = source.model_copy(update={"samples": samples})
    examples = [e for e in read_examples(source, key) if (e.prompt + (e.response or "")).strip()]
    if not examples:
        raise UserError(f"{key}: every row of {source.path} is blank; choose another column")
    return DataSet(label, key, source, examples)


@dataclass(frozen=True)
class Base:
    """The base model, and its target layers by name."""

    model: PreTrainedModel
    modules: dict[str, nn.Linear]
    task: Task
    device: torch.device

    @property
    def pad_id(self) -> int:
        """The token that pads."""
        return self.task.pad_id

    def groups(self, names: Sequence[str], row: Row) -> dict[str, str]:
        """Layer → first of ``names`` that reads the same input, seen on a few tokens of ``row``."""
        modules = {name: self.modules[name] for name in names}
        return input_groups(self.model, modules, probe_inputs(self.model, self.task, row, self.device))

    def collect(self, collector: Collector[T], groups: dict[str, str], rows: Sequence[Row], title: str) -> dict[str, T]:
        """What ``collector`` finds of each layer in ``groups`` on ``rows``, by layer (shared within a group)."""
        batches = [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]

        def collated() -> Iterator[Batch]:
            for batch in progress(batches, title):
                yield collate(batch, self.pad_id)

        found = collector(self.model, {name: self.modules[name] for name in groups}, groups, collated())
        return {name: found[group] for name, group in groups.items()}


def load_base(task: Task) -> Base:
    """The base of ``task``, never quantised, on the accelerator if there is one."""
    device = training_device()
    model = load_model(task.config.model, device)
    return Base(model, adapted_modules(model, task.config.model), task, device)


def choose_layers(known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Those of ``known`` that hold one of ``wanted`` as whole dotted parts; the first block's where none is wanted.

    ``q_proj`` chooses that layer of every block, ``layers.3`` a whole block.

    Raises:
        UserError: an entry matches no layer; the message names the nearest.
    """
    if not wanted:
        return first_block(known)
    for entry in wanted:
        if not any(_holds(name, entry) for name in known):
            parts = sorted({name.rsplit(".", 1)[-1] for name in known})
            hint = nearest(entry, [*parts, *known])
            raise UserError(
                f"--layers: {entry!r} is no target layer; give a name or a part of one, such as {parts[0]} or "
                f"{known[0]}{hint}"
            )
    return [name for name in known if any(_holds(name, entry) for entry in wanted)]


def first_block(names: Sequence[str]) -> list[str]:
    """The layers of the first numbered block; all of them where names have no numbers."""
    for name in names:
        numbered = re.match(r"(?:.*?\.)?\d+\.", name)
        if numbered:
            return [other for other in names if other.startswith(numbered[0])]
    return list(names)


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """The dotted parts that all of ``names`` begin with, and what is left of each name."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1 and len(parts) > 1:
        common += 1
    return ".".join(parts[0][:common]), [".".join(p[common:]) for p in parts]


def _holds(name: str, entry: str) -> bool:
    return f".{entry}." in f".{name}."
