"""export: what was trained, as a plain LoRA on the original base and as a merged model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.adapters.lora import add_modules, read_layers
from harness.adapters.tensor_forms import TensorUpdate
from harness.config import RunConfig
from harness.console import say
from harness.errors import UserError
from harness.export.merge import cast_model, write_frozen, write_merged
from harness.export.shards import read_tensors
from harness.files import publish_directory
from harness.methods.base import LowRank, Method, Update
from harness.methods.registry import build_method
from harness.run_directory import RunDirectory
from harness.stages.initialise import subtracted_blocks
from harness.stages.train import trained_layers, trained_modules
from harness.training.distributed import barrier, rank, training_device


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
        if config.model.quantization != "none":
            _export_frozen_base(config, run)
        for _, checkpoint in finished[:-1] if config.eval.checkpoints else []:
            _export_one(config, run, method, checkpoint, checkpoint, final=False)
        _export_one(config, run, method, finished[-1][1], run.path, final=True)
        say(f"export: {run.adapter if not method.trains_base else run.merged}")
    barrier()


def _export_one(
    config: RunConfig, run: RunDirectory, method: Method, checkpoint: Path, destination: Path, final: bool
) -> None:
    """``adapter/`` and, of the final model or where an engine could not serve the adapter, ``merged/``."""
    dtype = getattr(torch, config.model.dtype)
    if method.trains_base:
        with _published(destination / "merged") as staging:
            if method.trains_all and config.task != "image_text":  # there parts of the base stay as they are
                cast_model(checkpoint / "trained", staging, config.model.path, dtype, config.task)
            else:
                trained = dict(read_tensors(checkpoint / "trained"))
                write_merged(staging, config.model.path, dtype, {}, trained, task=config.task)
        return
    layers = trained_layers(checkpoint, read_layers(run.init))
    # The frozen base of a quantised run is the residual already: the adapter alone is what is added to it.
    quantised = config.model.quantization != "none"
    base = str(run.frozen_base) if quantised else config.model.original
    subtracted: dict[str, LowRank] = {} if quantised else subtracted_blocks(run.init)
    updates: dict[str, Update] = {name: method.update(own, subtracted.get(name)) for name, own in layers.items()}
    beside = trained_modules(checkpoint)
    with _published(destination / "adapter") as staging:
        method.write_adapter(staging, layers, updates, base)
        add_modules(staging, beside, config.task, config.model.trained_modules)
    unservable = any(
        isinstance(update, TensorUpdate) or (config.eval.backend == "vllm" and not isinstance(update, LowRank))
        for update in updates.values()
    )
    if final or unservable:
        with _published(destination / "merged") as staging:
            under = base if quantised else config.model.path
            write_merged(staging, under, dtype, updates, beside, task=config.task)


def _export_frozen_base(config: RunConfig, run: RunDirectory) -> None:
    """The weights that training saw, dequantised: adapters of a quantised run are exact on these alone."""
    with _published(run.frozen_base) as staging:
        write_frozen(
            staging,
            config.model,
            subtracted_blocks(run.init),
            training_device(),
        )


@contextmanager
def _published(final: Path) -> Iterator[Path]:
    """A staging folder that becomes ``final`` when the block ends without an error."""
    staging = final.with_name(f".{final.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    publish_directory(staging, final)
