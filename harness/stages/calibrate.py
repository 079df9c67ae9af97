"""calibrate: collect the statistics that the method asks for, on all ranks.

Resident: the whole model on every rank, hooks on all layers. Streamed: one decoder block at a time. The same numbers.
Every statistic ends on the one rank that owns it, which writes its file.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from harness.cache import Cache
from harness.config import RunConfig, SourceConfig
from harness.console import in_words, say, work_bar
from harness.data.collation import Batch, collate
from harness.data.sampling import sample, seed_for
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.measurement import measured
from harness.memory import freed_at_once
from harness.methods.base import StatisticsRequest
from harness.methods.registry import method_class, required_statistics
from harness.models.calling import arguments
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.streaming import decoder_blocks
from harness.models.targets import adapted_modules
from harness.models.weights import BaseWeights, empty_model
from harness.run_directory import RunDirectory
from harness.statistics.kept import KeptStatistics
from harness.statistics.loss import Labels
from harness.statistics.products import UpperTriangle
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident
from harness.statistics.statistic import Kind, Statistic
from harness.statistics.store import StatisticsWriter
from harness.statistics.streamed import collect_streamed
from harness.tasks.base import Task
from harness.tasks.registry import load_task
from harness.training.distributed import available_to_a_rank, barrier, rank, share, training_device, world_size

BATCH_ROWS = 8
CPU_BATCH_TOKENS = 1024  # with padding, of several rows: more are hardly faster there, and activations take memory
RESIDENT_SHARE = 0.5  # of the memory available to a rank: the rest is for activations


def calibrate(config: RunConfig, run: RunDirectory) -> None:
    """Write ``statistics/``; nothing where the method needs none.

    Raises:
        UserError: the method needs a preserve set and there is none, a row is unusable, or the model cannot be streamed
            where that is asked for.
    """
    request = required_statistics(config)
    if request is None:
        return
    key = "preserve" if request.data == "preserve" else "train"
    source = getattr(config.data, key)
    if source is None:
        raise UserError(f"data.preserve: missing; method {config.method['name']!r} takes statistics from it")
    task = load_task(config)
    examples = task.read(source, f"data.{key}")
    if request.rounds > 1 and source.samples >= len(examples):
        say(
            f"warning: data.{key}.samples: {source.samples} of {len(examples)} rows, so all {request.rounds} sampling "
            "rounds draw the same rows; give more rows or ask for fewer samples"
        )
    model = empty_model(config.model)
    convolutions = method_class(config.method["name"]).adapts_convolutions
    targets = adapted_modules(model, config.model, convolutions)
    modules = {name: module for name, module in targets.items() if isinstance(module, nn.Linear)}
    if not modules:  # statistics are of linear layers; what asked for them here was the error of quantising those
        return
    widest = max(module.in_features for module in modules.values())
    rounds = [calibration_rows(task, source, examples, f"data.{key}", number) for number in range(request.rounds)]
    for tokens in {sum(len(row.input_ids) for row in rows) for rows in rounds} if task.reads_text else ():
        if tokens < widest:
            say(
                f"warning: data.{key}.samples: {tokens} tokens for layers up to {widest} wide; their covariance has "
                f"rank {tokens} at most, so it says nothing about other directions; take more samples or longer texts"
            )
    # Labels that the model draws must not depend on which rank draws them, so a row's draw is seeded by its text.
    labels = Labels(request.fisher, seed_for("fisher", config.train.seed), task.objective)
    with StatisticsWriter(run.statistics) as writer, measured() as phase:
        kept = KeptStatistics(Cache(), config.model, list(modules), labels) if config.init.cache else None
        work = _Work(task, request, model, modules, rounds, labels, writer, kept)
        missing = work.take()
        how = work.collect(missing) if missing else "from the cache"
        work.finish(missing)
        writer.close(collective=True)
    barrier()
    say(f"calibrate: {work.counts()} serve {len(modules)} layers; {how}; {phase}{work.reduced()}")


def calibration_rows(task: Task, source: SourceConfig, examples: list[Any], key: str, number: int) -> list[Row]:
    """The rows of one sampling round, sorted by length: less padding and, padding being masked, the same numbers."""
    chosen = sample(examples, source.samples, "calibrate", task.config.train.seed, number)
    rows = sorted(task.rows(chosen), key=lambda row: len(row.input_ids))
    empty = sum(not row.input_ids for row in rows) if task.reads_text else 0
    if empty:
        raise UserError(f"{key}: {empty} of {len(rows)} sampled rows have no tokens; remove empty rows")
    return rows


def probe_inputs(model: nn.Module, task: Task, row: Row, device: torch.device) -> dict[str, Any]:
    """One short row as keyword arguments of the model's forward."""
    probe = collate([task.probe_row(row)], task.pad_id)
    return arguments(model, {name: tensor.to(device) for name, tensor in probe.items()})


class _Work:
    """The statistics of all rounds, on their way from the cache or the model to their files."""

    def __init__(
        self,
        task: Task,
        request: StatisticsRequest,
        model: PreTrainedModel,
        modules: dict[str, nn.Linear],
        rounds: list[list[Row]],
        labels: Labels,
        writer: StatisticsWriter,
        kept: KeptStatistics | None,
    ) -> None:
        """``model``: without weights."""
        self._task, self._config = task, task.config
        self._request, self._model, self._modules = request, model, modules
        self._rounds, self._labels, self._pad_id = rounds, labels, task.pad_id
        self._writer, self._kept = writer, kept
        self._groups: dict[int, dict[Kind, dict[str, str]]] = {}  # round → kind → layer → group
        self._reduction = Reduction()
        self._device = training_device()

    def take(self) -> list[int]:
        """Take what the cache has; the rounds that must be collected."""
        for number, rows in enumerate(self._rounds if self._kept is not None else ()):
            found = self._kept.take(self._request.kinds, rows, number, self._writer)
            if found is not None:
                self._groups[number] = found
        return [number for number in range(len(self._rounds)) if number not in self._groups]

    def collect(self, missing: Sequence[int]) -> str:
        """Collect the ``missing`` rounds; says how."""
        if streams(self._config, self._model, self._modules, self._request.kinds, self._device):
            with freed_at_once():
                self._collect_streamed(missing)
            return "streamed"
        self._collect_resident(missing)
        return "resident"

    def finish(self, collected: Sequence[int]) -> None:
        """Say which layer finds its statistics where, in the run's files and in the cache."""
        for number, kinds in sorted(self._groups.items()):
            for kind, groups in kinds.items():
                self._writer.serve(kind, groups, number)
        if self._kept is None or not collected:
            return
        self._writer.drain()
        barrier()
        if rank() == 0:
            for number in collected:
                for kind, groups in self._groups[number].items():
                    self._kept.list(kind, self._rounds[number], groups)

    def counts(self) -> str:
        """How many statistics over how many tokens."""
        kinds = ", ".join(f"{len(set(g.values()))} × {k.replace('_', ' ')}" for k, g in self._groups[0].items())
        sizes = (
            sum(len(row.input_ids) for row in rows) if self._task.reads_text else len(rows) for rows in self._rounds
        )
        items = f"{', '.join(f'{size:,}' for size in sizes)} {'tokens' if self._task.reads_text else 'images'}"
        return f"{kinds} over {items}{f' in {len(self._rounds)} rounds' if len(self._rounds) > 1 else ''}"

    def reduced(self) -> str:
        """The bytes that went to other ranks and came from them; nothing where there are none."""
        if world_size() == 1:
            return ""
        given, taken = in_words(self._reduction.given), in_words(self._reduction.taken)
        return f"; rank 0 gave {given} of sums to their owners and took {taken}"

    def _collect_resident(self, missing: Sequence[int]) -> None:
        model = load_model(self._config.model, self._device)
        modules = {name: model.get_submodule(name) for name in self._modules}
        with work_bar("calibrate", sum(len(self._batches(number)) for number in missing)) as bar:
            for number in missing:
                groups = input_groups(model, modules, probe_inputs(model, self._task, self._rounds[0][0], self._device))

                def batches(number: int = number) -> Iterator[Batch]:
                    for rows in self._batches(number):
                        yield collate(rows, self._pad_id)
                        bar(1, f"{self._of(number)}resident, {held(self._device)} held")

                collected = collect_resident(
                    model, modules, groups, batches(), self._request.kinds, self._labels, self._reduction
                )
                for kind, group, matrix, tokens in collected:
                    self._write(number, kind, group, Statistic(matrix.cpu(), tokens))
                self._serve(number, groups)

    def _collect_streamed(self, missing: Sequence[int]) -> None:
        weights = BaseWeights(self._config.model, self._model)
        blocks = len(decoder_blocks(self._model, list(self._modules)).names)
        probe = collate([self._task.probe_row(self._rounds[0][0])], self._pad_id)
        gradients = self._request.needs_gradients
        batches = {n: [collate(rows, self._pad_id) for rows in self._batches(n)] for n in missing}
        total = sum(map(len, batches.values())) * blocks * (2 if gradients else 1)
        # One sweep serves all rounds; with gradients one round at a time, for the inputs of every block are kept.
        sweeps = [[number] for number in missing] if gradients else [list(missing)]
        with work_bar("calibrate", total) as bar:
            for sweep in sweeps:
                groups: dict[str, str] = {}
                collected = collect_streamed(
                    self._model,
                    weights,
                    self._modules,
                    [batches[number] for number in sweep],
                    probe,
                    self._request.kinds,
                    self._labels,
                    self._device,
                    self._reduction,
                    groups,
                    lambda doing, sweep=sweep: bar(1, f"{self._of(*sweep)}{doing}, {held(self._device)} held"),
                )
                with closing(collected):
                    for place, kind, group, matrix, tokens in collected:
                        self._write(sweep[place], kind, group, Statistic(matrix.cpu(), tokens))
                for number in sweep:
                    self._serve(number, groups)

    def _write(self, number: int, kind: Kind, group: str, statistic: Statistic) -> None:
        def keep() -> None:
            if self._kept is not None:
                self._kept.keep(kind, self._rounds[number], group, statistic)

        self._writer.write(kind, group, statistic, number, keep)

    def _serve(self, number: int, groups: dict[str, str]) -> None:
        own = {name: name for name in self._modules}
        self._groups[number] = {
            kind: {name: groups[name] for name in own} if kind == "input_covariance" else own
            for kind in self._request.kinds
        }

    def _batches(self, number: int) -> list[list[Row]]:
        most = CPU_BATCH_TOKENS if self._device.type == "cpu" else math.inf
        return share(in_batches(self._rounds[number], most))

    def _of(self, *numbers: int) -> str:
        return f"round {numbers[0] + 1}/{len(self._rounds)}, " if len(numbers) < len(self._rounds) else ""


def in_batches(rows: Sequence[Row], most_tokens: float) -> list[list[Row]]:
    """``rows`` in their order, at most `BATCH_ROWS` together, and at most ``most_tokens`` with padding if several."""
    batches: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.input_ids))
        together = len(batches[-1]) if batches else 0
        if 0 < together < BATCH_ROWS and (together + 1) * longest <= most_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = len(row.input_ids)
    return batches


def streams(
    config: RunConfig, model: nn.Module, modules: dict[str, nn.Linear], kinds: Sequence[Kind], device: torch.device
) -> bool:
    """Whether statistics are collected block by block; the same on all ranks.

    Raises:
        UserError: that is asked for and the model does not allow it.
    """
    if config.init.collection == "resident":
        return False
    if config.init.collection == "streamed":
        decoder_blocks(model, list(modules))
        return True
    needed, available = resident_bytes(config, model, modules, kinds, device), available_to_a_rank(device)
    decision = [needed > RESIDENT_SHARE * available]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(decision)
    if not decision[0]:
        return False
    sizes = f"{in_words(needed)} of weights and statistics, {in_words(available)} available"
    try:
        decoder_blocks(model, list(modules))
    except UserError as error:
        say(f"warning: calibrate: {sizes}, and yet resident: {str(error).removeprefix('init.collection: ')}")
        return False
    say(f"calibrate: {sizes}: streamed")
    return True


def resident_bytes(
    config: RunConfig, model: nn.Module, modules: dict[str, nn.Linear], kinds: Sequence[Kind], device: torch.device
) -> int:
    """Bytes of all weights and statistics at once, as if no two layers shared an input."""
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, config.model.dtype).itemsize
    sizes = {
        "input_covariance": lambda layer: UpperTriangle.numbers(layer.in_features, device),
        "output_gradient_covariance": lambda layer: UpperTriangle.numbers(layer.out_features, device),
        "weight_gradient": lambda layer: layer.in_features * layer.out_features,
    }
    return weights + 4 * sum(sizes[kind](layer) for kind in kinds for layer in modules.values())


def held(device: torch.device) -> str:
    """Bytes that this process holds now, in words: on the accelerator where there is one."""
    return in_words(
        torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    )
