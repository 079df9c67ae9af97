"""Probes: short training runs that choose among a method's candidates, in the init stage.

FARSS (§3.1) finds the boundary between shallow and deep layers by weighing what is learned against what is lost; how,
the paper leaves open. Here every candidate is trained for a few steps from its own tensors of step 0 and scored by

    loss on held-out target rows / the base's + loss on preserve rows / the base's,

so that a percent learned and a percent forgotten weigh the same. The lowest score wins; of equal ones, the first.

A probe is plain: one device, AdamW at the run's learning rate without a schedule, neither anchor nor penalties, and an
unquantised base. Candidates are divided among the ranks; what is chosen does not depend on how many there are.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from harness.config import RunConfig, SourceConfig
from harness.console import progress, say
from harness.data.collation import LABELS, collate
from harness.data.sampling import seed_for
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.files import write_json
from harness.methods.base import Method, ProbeRequest
from harness.models.calling import arguments
from harness.models.loading import load_model
from harness.run_directory import RunDirectory
from harness.stages.train import build_model
from harness.tasks.base import Task
from harness.tasks.registry import load_task
from harness.training.distributed import barrier, rank, share, training_device, world_size
from harness.training.schedule import ScheduledRows

BATCH_ROWS = 8


@dataclass(frozen=True)
class ProbeRows:
    """What probes train on, and what losses are measured on: other target rows, and preserve rows."""

    training: list[Row]
    target: list[Row]
    preserve: list[Row]


@dataclass(frozen=True)
class Losses:
    """Mean loss per token on the held-out target rows and on the preserve rows."""

    target: float
    preserve: float

    def score(self, base: "Losses") -> float:
        """Target and preserve loss, each relative to the base's, added; infinite where training has diverged."""
        score = self.target / base.target + self.preserve / base.preserve
        return score if math.isfinite(score) else math.inf


def choose(
    config: RunConfig, probe: ProbeRequest, candidates: Sequence[Method], folders: Sequence[RunDirectory]
) -> int:
    """Probe every candidate, print the table, leave it as ``probes.json`` in each one's ``init/``; the best's number.

    Args:
        folders: for every candidate, the directory whose ``init/`` holds its tensors.

    Raises:
        UserError: there is no preserve set, there are too few rows, or no candidate ends with a finite loss.
    """
    task = load_task(config)
    rows = probe_rows(task, probe)
    config = config.model_copy(update={"model": config.model.model_copy(update=_unquantised(config.model.dtype))})

    def losses(number: int | None) -> Losses:
        gc.collect()  # models hold references to themselves, and the last one must be gone before the next is loaded
        if number is None:  # the base itself
            return _measured(load_model(config.model, training_device()), rows, task)
        method = candidates[number]
        method.set_steps(probe.steps)
        model = build_model(config, folders[number], method, None, needs_original=False)
        _train(task, probe, method, model, rows.training)
        return _measured(model, rows, task)

    found = _gathered({number: losses(number) for number in progress(share([None, *range(len(candidates))]), "probe")})
    base = found[None]
    scores = [found[number].score(base) for number in range(len(candidates))]
    best = min(range(len(scores)), key=scores.__getitem__)
    if scores[best] == math.inf:
        raise UserError(
            f"method.{probe.option}: auto given, but the loss of every probe is NaN or inf; lower train.learning_rate, "
            f"or set method.{probe.option} yourself"
        )
    values = [getattr(candidate.options, probe.option) for candidate in candidates]
    say(
        f"init: {len(candidates)} values of {probe.option} probed, {probe.steps} steps each on {len(rows.training)} "
        f"rows of data.train; mean losses on {len(rows.target)} other rows of it and on {len(rows.preserve)} of "
        "data.preserve"
    )
    for line in _table(probe.option, values, found, scores, best):
        say(line)
    if rank() == 0:
        record = _record(probe, rows, values, found, scores, best)
        for folder in folders:
            write_json(folder.init / "probes.json", record)
    barrier()
    return best


def probe_rows(task: Task, probe: ProbeRequest) -> ProbeRows:
    """Rows drawn by the seed: twice ``probe.rows`` of the target data, half to train on, and as many preserve rows.

    A target set that is smaller is halved too.

    Raises:
        UserError: there is no preserve set, or fewer than two usable target rows.
    """
    config = task.config
    if config.data.preserve is None:
        raise UserError(
            f"data.preserve: missing; method.{probe.option}: auto weighs what is learned against what is lost on it; "
            f"give data.preserve or set method.{probe.option}"
        )
    target = _drawn(task, config.data.train, "train", 2 * probe.rows)
    preserve = _drawn(task, config.data.preserve, "preserve", probe.rows)
    for key, usable, needed in (("train", target, 2), ("preserve", preserve, 1)):
        if len(usable) < needed:
            raise UserError(
                f"data.{key}: {len(usable)} of the rows drawn have a token with a loss, probes need {needed}; give "
                f"more rows, raise data.max_length, or set method.{probe.option}"
            )
    half = len(target) // 2
    return ProbeRows(target[:half], target[half:], preserve)


def _drawn(task: Task, source: SourceConfig, key: str, count: int) -> list[Row]:
    """``count`` rows in an order drawn by the seed, all if there are no more, less those without a loss."""
    examples = task.read(source, f"data.{key}")
    generator = torch.Generator().manual_seed(seed_for("probe rows", key, task.config.train.seed))
    order = torch.randperm(len(examples), generator=generator)[:count].tolist()
    return [row for row in task.rows([examples[i] for i in order]) if row.has_loss]


def _unquantised(dtype: str) -> dict[str, str]:
    """How a probe loads the base. Gradients in fp16 would need the loss scaling that only the train stage has."""
    return {"quantization": "none", "dtype": "float32" if dtype == "float16" else dtype}


def _train(task: Task, probe: ProbeRequest, method: Method, model: nn.Module, rows: list[Row]) -> None:
    options, device = task.config.train, next(model.parameters()).device
    batch_size = min(BATCH_ROWS, len(rows))
    schedule = ScheduledRows(rows, probe.steps, batch_size, options.seed)
    groups = method.param_groups(model, options.learning_rate, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    trained = [parameter for group in groups for parameter in group["params"]]
    torch.manual_seed(seed_for("probe", options.seed))  # dropout, where the base has any
    model.train()
    for step in range(probe.steps):
        batch = collate([schedule[step * batch_size + i] for i in range(batch_size)], task.pad_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        total, tokens = _loss(model, batch, task)
        loss = total / tokens
        own = method.penalty(model)
        (loss if own is None else loss + own).backward()
        if options.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        method.before_step(model, step + 1)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(model)


@torch.no_grad()
def _measured(model: nn.Module, rows: ProbeRows, task: Task) -> Losses:
    device = next(model.parameters()).device
    model.eval()

    def mean(part: list[Row]) -> float:
        total, tokens = 0.0, 0
        for start in range(0, len(part), BATCH_ROWS):
            batch = {k: v.to(device) for k, v in collate(part[start : start + BATCH_ROWS], task.pad_id).items()}
            loss, count = _loss(model, batch, task)
            total, tokens = total + loss.item(), tokens + count
        return total / tokens

    return Losses(mean(rows.target), mean(rows.preserve))


def _loss(model: nn.Module, batch: dict[str, torch.Tensor], task: Task) -> tuple[torch.Tensor, int]:
    """Sum of the loss of a batch, and how many items it is over."""
    logits = task.objective.logits(model(**arguments(model, batch)), batch)
    return task.objective.loss(logits, batch[LABELS]), int(task.objective.counted(batch[LABELS]).sum())


def _gathered(mine: dict[int | None, Losses]) -> dict[int | None, Losses]:
    """The losses of all ranks."""
    found = [mine] * world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(found, mine)
    return {number: losses for part in found for number, losses in part.items()}


def _table(
    option: str, values: Sequence[object], found: dict[int | None, Losses], scores: Sequence[float], best: int
) -> list[str]:
    """The table that the choice was made from, line by line."""
    width = max(len(option), 4)
    base = found[None]
    lines = [f"  {option:>{width}}  target loss  preserve loss   score"]
    lines += [f"  {'base':>{width}}  {base.target:11.4f}  {base.preserve:13.4f}  {base.score(base):6.4f}"]
    for number, (value, score) in enumerate(zip(values, scores, strict=True)):
        own = found[number]
        mark = "  chosen" if number == best else ""
        lines.append(f"  {value!s:>{width}}  {own.target:11.4f}  {own.preserve:13.4f}  {score:6.4f}{mark}")
    return lines


def _record(
    probe: ProbeRequest,
    rows: ProbeRows,
    values: Sequence[object],
    found: dict[int | None, Losses],
    scores: Sequence[float],
    best: int,
) -> dict[str, object]:
    """The same as JSON; a loss that is not finite is null."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def line(losses: Losses) -> dict[str, float | None]:
        return {"target_loss": finite(losses.target), "preserve_loss": finite(losses.preserve)}

    return {
        "option": probe.option,
        "steps": probe.steps,
        "rows": {"training": len(rows.training), "target": len(rows.target), "preserve": len(rows.preserve)},
        "base": line(found[None]),
        "candidates": [
            {"value": value, **line(found[number]), "score": finite(score)}
            for number, (value, score) in enumerate(zip(values, scores, strict=True))
        ],
        "chosen": values[best],
    }
