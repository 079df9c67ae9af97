"""export: what was trained, as a plain LoRA on the original base and as a merged model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.adapters.lora import read_adapter, write_adapter
from harness.config import RunConfig
from harness.console import say
from harness.errors import UserError
from harness.export.merge import cast_model, write_merged
from harness.files import publish_directory, read_json
from harness.methods.base import LowRank, Method
from harness.methods.registry import build_method
from harness.run_directory import RunDirectory
from harness.stages.train import trained_factors
from harness.training.distributed import barrier, rank


def export(config: RunConfig, run: RunDirectory) -> None:
    """Write ``adapter/``, ``merged/``, and the same for each earlier checkpoint if those are to be evaluated.

    Raises:
        UserError: nothing was trained yet.
    """
    finished = run.finished_checkpoints()
    if not finished:
        raise UserError(f"export: {run.checkpoints} holds no checkpoint; run the train stage first")
    if rank() == 0:
        method = build_method(config.method, config.train.seed)
        dtype = getattr(torch, config.model.dtype)
        for _, checkpoint in finished[:-1] if config.eval.checkpoints else []:
            _export_one(config, run, method, checkpoint, checkpoint, dtype, merge=method.trains_base)
        _export_one(config, run, method, finished[-1][1], run.path, dtype, merge=True)
        say(f"export: {run.adapter if not method.trains_base else run.merged}")
    barrier()


def original_base_updates(method: Method, trained: dict[str, LowRank], init: Path) -> dict[str, LowRank]:
    """Each layer's exact update of the *original* weight, factored (`Method.delta`)."""
    initial = read_adapter(init)
    report = read_json(init / "report.json")["layers"]
    return {
        name: method.delta(factor, initial[name] if report[name]["residual"] else None)
        for name, factor in trained.items()
    }


def _export_one(
    config: RunConfig,
    run: RunDirectory,
    method: Method,
    checkpoint: Path,
    destination: Path,
    dtype: torch.dtype,
    merge: bool,
) -> None:
    if method.trains_base:
        with _published(destination / "merged") as staging:
            cast_model(checkpoint / "trained", staging, config.model.path, dtype)
        return
    updates = original_base_updates(method, trained_factors(checkpoint, method.scaling()), run.init)
    with _published(destination / "adapter") as staging:
        write_adapter(staging, updates, config.model.path)
    if merge:
        with _published(destination / "merged") as staging:
            write_merged(staging, config.model.path, dtype, updates)


@contextmanager
def _published(final: Path) -> Iterator[Path]:
    """A staging folder that becomes ``final`` when the block ends without an error."""
    staging = final.with_name(f".{final.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    publish_directory(staging, final)
