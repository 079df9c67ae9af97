"""What the tasks of encoders have in common: their rows, and the base's own head over a tuned body.

A source of these tasks has one text a row or two, and an answer. What is kept is most often text without answers
(``data.preserve``): a model with a new head has no loss on that. It is judged there by the masked-LM head that the base
was pre-trained with (FCLoRA §5.3: accuracy and loss on the pre-training task).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from harness.config import SourceConfig
from harness.console import progress
from harness.data.collation import Batch, collate
from harness.data.sources import read_rows
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.models.calling import arguments
from harness.tasks.base import Task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reference(NamedTuple):
    """A right answer and the character of the context at which it begins."""

    text: str
    start: int


Answer = int | float | tuple[Reference, ...]


@dataclass(frozen=True)
class Texts:
    """One row: a text, perhaps a second one, and what is to be answered; None where the source does not say.

    ``place``: the row's own, for messages.
    """

    first: str
    second: str | None = None
    answer: Answer | None = None
    place: str = "row 0"


class EncoderTask(Task):
    """What the tasks of encoders have in common."""

    @cached_property
    def reader(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, which need not have an end-of-sequence token (BERT's has none)."""
        from transformers import AutoTokenizer

        path = self.config.model.path
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path: no tokenizer in {path!r}: {' '.join(str(error).split())}") from error
        if tokenizer.pad_token_id is None:
            raise UserError(f"model.path: the tokenizer of {path!r} has no padding token; set one and save it")
        return tokenizer

    @property
    def longest(self) -> int:
        """Tokens of a row at most: ``data.max_length``, or what the tokenizer says that the model takes."""
        return min(self.config.data.max_length, self.tokenizer.model_max_length)

    def finish_head(self, model: "PreTrainedModel", drawn: set[str]) -> set[str]:
        """A decoder's head reads the last token of a row that does not pad, and has to know which one pads."""
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad_id
        return drawn

    def labelled(self, source: SourceConfig) -> bool:
        """Whether it says answers."""
        return source.response is not None

    def check(self, key: str, source: SourceConfig) -> None:
        """Raise `UserError` where a column or, of a local file, an answer is not what the task reads.

        Of a local model also where it has no form for the task.

        ``data.preserve`` need not say answers; what learns from it all the same is refused by `harness.preflight`.
        """
        self._check_columns(key, source, self.columns[:1] if key == "data.preserve" else self.columns)
        if key == "data.train" and Path(self.config.model.path).is_dir():
            from harness.models.loading import described_model

            described_model(self.config.model.path, self.config.task)
        if source.path.endswith((".jsonl", ".json", ".parquet")):  # what else there is may be far away
            self.read(source, key)

    def read(self, source: SourceConfig, key: str) -> list[Texts]:
        """All rows of ``source``.

        Raises:
            UserError: it cannot be read, a column is not there, or an answer is none that the task knows.
        """
        self._check_columns(key, source, ("prompt",))
        rows = read_rows(source, key)
        firsts = self._texts(rows, source, key, "prompt")
        seconds = self._texts(rows, source, key, "pair") if source.pair is not None else [None] * len(firsts)
        places = [f"row {number} of {source.path}" for number in range(len(firsts))]
        examples = [Texts(first, second, None, at) for first, second, at in zip(firsts, seconds, places, strict=True)]
        if not self.labelled(source) or source.response is None:
            return examples
        answers = self.answers(rows, source, key, examples)
        return [Texts(one.first, one.second, a, one.place) for one, a in zip(examples, answers, strict=True)]

    def answers(self, rows: Any, source: SourceConfig, key: str, examples: Sequence[Texts]) -> list[Answer]:
        """The answers in the column ``response`` of ``rows``, a `datasets.Dataset`."""
        raise TypeError(f"{type(self).__name__} does not say how its rows are made")

    def rows(self, examples: Sequence[Texts], description: str = "tokenise") -> list[Row]:
        """One row for each example; two texts together are cut at the longer one."""
        return [self.row(example) for example in progress(examples, description)]

    def row(self, example: Texts) -> Row:
        """The row of one example."""
        encoded = self.tokenizer(example.first, example.second, truncation=True, max_length=self.longest)
        return Row(list(encoded["input_ids"]), [], example.answer, columns_of(encoded))

    def outputs(
        self, model: "nn.Module", rows: Sequence[Row], batch_size: int
    ) -> Iterator[tuple[list[int], Batch, torch.Tensor]]:
        """What the task's objective takes of the model's outputs, batch by batch: places of its rows, batch, outputs.

        Longest rows first: less padding, and what does not fit into memory fails at once.
        """
        device = next(model.parameters()).device
        model.eval()
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place].input_ids))
        for start in progress(range(0, len(order), batch_size), "evaluate"):
            places = order[start : start + batch_size]
            batch = {n: t.to(device) for n, t in collate([rows[place] for place in places], self.pad_id).items()}
            with torch.inference_mode():
                yield places, batch, self.objective.logits(model(**arguments(model, batch)), batch)

    def answers_of_rows(
        self, model: "nn.Module", rows: Sequence[Row], batch_size: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """For each of ``rows`` its place and the outputs, fp32 on the CPU."""
        for places, _, outputs in self.outputs(model, rows, batch_size):
            yield from zip(places, finite(outputs).cpu(), strict=True)

    def retention(self) -> Task:
        """Masked-language modelling, which the base was pre-trained for."""
        from harness.tasks.masked_lm import MaskedLM

        return MaskedLM(self.config)

    def retention_model(self, model: "nn.Module") -> "nn.Module":
        """``model``'s body under the masked-LM head of the original base. Tied output embeddings stay the body's.

        Raises:
            UserError: the base has no such head.
        """
        from harness.tasks.masked_lm import masked_lm

        under = masked_lm(self.config.model.original, self.config.model.dtype)
        own, wanted = model.base_model.state_dict(), under.base_model.state_dict().keys()
        under.base_model.load_state_dict({name: own[name] for name in wanted})
        return under.to(next(model.parameters()).device)

    def _check_columns(self, key: str, source: SourceConfig, columns: Sequence[str]) -> None:
        for column in columns:
            if getattr(source, column) is None:
                raise UserError(
                    f"{key}.{column}: missing; add it to the configuration: task {self.name!r} reads that column"
                )

    def _texts(self, rows: Any, source: SourceConfig, key: str, column: str) -> list[str]:
        name = getattr(source, column)
        texts = list(rows[name])
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{key}.{column}: row {number} of {source.path} has {text!r} in {name!r}; text is read")
        return texts


def finite(outputs: torch.Tensor) -> torch.Tensor:
    """The same in fp32.

    Raises:
        UserError: one is NaN.
    """
    if outputs.isnan().any():
        raise UserError("eval: the model's outputs are NaN; lower train.learning_rate, or try model.dtype: float32")
    return outputs.float()


def columns_of(encoded: Mapping[str, Any]) -> dict[str, list[int]]:
    """What a model reads for each token besides its number."""
    return {name: list(encoded[name]) for name in ("token_type_ids",) if name in encoded}


def question_of(example: Texts) -> str:
    """One text or two, for people."""
    return example.first if example.second is None else f"{example.first} | {example.second}"


def brief(value: Any) -> str:
    """A value in a message, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
