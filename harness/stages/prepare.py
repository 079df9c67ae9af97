"""prepare: what penalties compute once before training, on all ranks, from the model as it is at step 0."""

import shutil

from harness.config import RunConfig
from harness.console import say
from harness.files import publish_directory, sha256, write_json, write_tensors
from harness.methods.registry import build_method
from harness.models.loading import whole_weights
from harness.run_directory import RunDirectory
from harness.stages.train import PREPARED_INDEX, build_model, penalty_setup, scheduled_rows
from harness.tasks.registry import load_task
from harness.training.distributed import barrier, rank
from harness.training.penalties.base import Preparation
from harness.training.penalties.registry import build_penalty, entry_needs, penalty_entries, prepared_name


def prepare(config: RunConfig, run: RunDirectory) -> None:
    """Write ``prepared/``: one safetensors file for each penalty that prepares something, and their checksums."""
    task = load_task(config)
    training = scheduled_rows(task, run)
    method = build_method(config.method, config.train.seed)
    with whole_weights():
        model = build_model(config, run, method, resume=None, needs_original=not method.starts_at_base)
    model.eval()
    staging = run.path / ".prepared.staging"
    if rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    checksums = {}
    for number, entry in enumerate(penalty_entries(config)):
        if not entry_needs(entry).preparation:
            continue
        setup = penalty_setup(task, run, entry, training)
        tensors = build_penalty(entry, setup).prepare(Preparation(model, method, task))
        if rank() == 0:
            file = staging / f"{prepared_name(number, entry)}.safetensors"
            write_tensors(file, tensors)
            checksums[file.name] = sha256(file)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        say(f"prepare: {entry['name']}, {len(tensors)} tensors, {size / 2**20:.1f} MiB")
    if rank() == 0:
        write_json(staging / PREPARED_INDEX, checksums)
        publish_directory(staging, run.prepared)
    barrier()
