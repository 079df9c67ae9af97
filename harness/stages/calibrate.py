"""calibrate: collect the statistics that the method asks for, on all ranks, round by round."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from harness.config import RunConfig, SourceConfig
from harness.console import progress, say
from harness.data.collation import Batch, collate
from harness.data.sampling import sample, seed_for
from harness.data.sources import Example, read_examples
from harness.data.tokenisation import Row, tokenise
from harness.errors import UserError
from harness.methods.base import StatisticsRequest
from harness.methods.registry import method_class, required_statistics
from harness.models.loading import load_model, load_tokenizer
from harness.models.sharing import input_groups
from harness.models.targets import target_modules
from harness.run_directory import RunDirectory
from harness.statistics.covariance import collect_input_covariance
from harness.statistics.gradients import collect_gradient_statistics
from harness.statistics.statistic import Kind, Statistic
from harness.statistics.store import StatisticsWriter
from harness.training.distributed import barrier, rank, share, training_device

BATCH_ROWS = 8
PROBE_TOKENS = 8


def calibrate(config: RunConfig, run: RunDirectory) -> None:
    """Write ``statistics/``; nothing where the method needs none.

    Raises:
        UserError: the method needs a preserve set and there is none, or a row is unusable.
    """
    request = required_statistics(config)
    if request is None:
        return
    key = "preserve" if request.data == "preserve" else "train"
    source = getattr(config.data, key)
    if source is None:
        raise UserError(f"data.preserve: missing; method {config.method['name']!r} takes statistics from it")
    tokenizer = load_tokenizer(config.model.path)
    examples = read_examples(source, f"data.{key}")
    if request.rounds > 1 and source.samples >= len(examples):
        say(
            f"warning: data.{key}.samples: {source.samples} of {len(examples)} rows, so all {request.rounds} sampling "
            "rounds draw the same rows; give more rows or ask for fewer samples"
        )
    device = training_device()
    model = load_model(config.model, device)
    convolutions = method_class(config.method["name"]).adapts_convolutions
    targets = target_modules(model, config.model.target_modules, convolutions)
    modules = {name: module for name, module in targets.items() if isinstance(module, nn.Linear)}
    if not modules:  # statistics are of linear layers; what asked for them here was the error of quantising those
        return
    widest = max(module.in_features for module in modules.values())
    writer = StatisticsWriter(run.statistics)
    for number in range(request.rounds):
        rows = calibration_rows(config, source, examples, tokenizer, f"data.{key}", number)
        groups = input_groups(model, modules, probe_inputs(rows[0], tokenizer.pad_token_id, device))
        description = f"calibrate {number + 1}/{request.rounds}" if request.rounds > 1 else "calibrate"
        collected = _collect(config, request, model, modules, groups, rows, tokenizer.pad_token_id, description)
        tokens = next(iter(collected[request.kinds[0]].values())).tokens
        if tokens < widest:
            say(
                f"warning: data.{key}.samples: {tokens} tokens for layers up to {widest} wide; their covariance has "
                f"rank {tokens} at most, so it says nothing about other directions; take more samples or longer texts"
            )
        if rank() == 0:
            for kind, statistics in collected.items():
                own = {name: name for name in modules}
                writer.add(kind, statistics, groups if kind == "input_covariance" else own)
        counts = ", ".join(f"{len(statistics)} × {kind.replace('_', ' ')}" for kind, statistics in collected.items())
        of = f" (round {number + 1} of {request.rounds})" if request.rounds > 1 else ""
        say(f"calibrate: {counts} over {tokens} tokens serve {len(modules)} layers{of}")
    if rank() == 0:
        writer.close()
    barrier()


def calibration_rows(
    config: RunConfig,
    source: SourceConfig,
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    number: int,
) -> list[Row]:
    """The rows of one sampling round, sorted by length: less padding and, padding being masked, the same numbers."""
    chosen = sample(examples, source.samples, "calibrate", config.train.seed, number)
    rows = sorted(tokenise(chosen, tokenizer, config.data.max_length), key=lambda row: len(row.input_ids))
    empty = sum(not row.input_ids for row in rows)
    if empty:
        raise UserError(f"{key}: {empty} of {len(rows)} sampled rows have no tokens; remove empty rows")
    return rows


def probe_inputs(row: Row, pad_id: int, device: torch.device) -> dict[str, object]:
    """One short row as keyword arguments of the model's forward."""
    probe = collate([Row(row.input_ids[:PROBE_TOKENS], [])], pad_id)
    return {name: probe[name].to(device) for name in ("input_ids", "attention_mask")} | {"use_cache": False}


def _collect(
    config: RunConfig,
    request: StatisticsRequest,
    model: nn.Module,
    modules: dict[str, nn.Linear],
    groups: dict[str, str],
    rows: list[Row],
    pad_id: int,
    description: str,
) -> dict[Kind, dict[str, Statistic]]:
    mine = share([rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)])

    def batches() -> Iterator[Batch]:
        for batch in progress(mine, description):
            yield collate(batch, pad_id)

    if not request.needs_gradients:
        return {"input_covariance": collect_input_covariance(model, modules, groups, batches())}
    # Labels that the model draws must not depend on which rank draws them, so a row's draw is seeded by its text.
    draw_seed = seed_for("fisher", config.train.seed)
    return collect_gradient_statistics(model, modules, groups, batches(), request.kinds, request.fisher, draw_seed)
