"""Checkpoints in safetensors: the trained tensors and the optimiser's moments, whole, whatever the ZeRO stage.

DeepSpeed's own checkpoints are pickles, cut up for one number of ranks. These hold every trained tensor once, in
fp32, gathered one at a time to rank 0, so that a run goes on under another ZeRO stage or another number of ranks,
and nothing that is loaded can execute code.

    step-N/trained/            trained parameters (fp32): an adapter's factors, or a whole model for full fine-tuning
    step-N/optimizer/          first and second moments (only the newest checkpoint keeps them)
    step-N/method.safetensors  what the method itself remembers, where it does (only the newest checkpoint)
    step-N/trainer_state.json  transformers' trainer state;  step-N/scheduler.json  the schedule, fp16 scale, step count
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.adapters.lora import saved_name
from harness.adapters.partitioned import read_trained, write_master
from harness.errors import UserError
from harness.export.shards import ShardWriter, read_tensors
from harness.files import read_json, write_json
from harness.training.distributed import rank

MOMENTS = ("exp_avg", "exp_avg_sq")
METHOD_STATE = "method.safetensors"


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``(name, parameter)`` of everything that is trained, under the names of the base model's modules."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield saved_name(name), parameter


def write_trained(folder: Path, engine: Any) -> None:
    """Write every trained parameter in fp32 to ``folder``. Collective: every rank calls, rank 0 writes."""
    writer = ShardWriter(folder)
    for name, parameter in trained_parameters(engine.module):
        value = read_trained(parameter)
        if rank() == 0:
            writer.add(name, value)
    if rank() == 0:
        writer.close()


def write_optimizer(folder: Path, engine: Any) -> None:
    """Write the moments of every trained parameter. Collective: every rank calls, rank 0 writes."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_optimizer_state(engine.optimizer)
    writer = ShardWriter(folder)
    for name, parameter in trained_parameters(engine.module):
        for moment in MOMENTS:
            value = safe_get_full_optimizer_state(parameter, moment)
            if rank() == 0:
                writer.add(f"{name}.{moment}", value)
    if rank() == 0:
        writer.close()


@torch.no_grad()
def restore_engine(checkpoint: Path, engine: Any) -> None:
    """Put the fp32 masters, the moments and the step count of ``checkpoint`` into a fresh DeepSpeed engine.

    The model's own (possibly lower-precision) parameters were loaded from ``trained/`` before the engine was built.

    Raises:
        UserError: the checkpoint is an older one, whose moments were dropped.
    """
    if not (checkpoint / "optimizer").is_dir():
        raise UserError(
            f"train: {checkpoint} has no optimiser state (only the newest checkpoint keeps it), so training cannot go "
            "on from it; start over with --force train"
        )
    parameters = dict(trained_parameters(engine.module))
    saved = read_json(checkpoint / "scheduler.json")
    _create_optimizer_state(engine.optimizer, saved["optimizer_steps"])

    for name, value in read_tensors(checkpoint / "trained"):
        write_master(parameters[name], value)
    for key, value in read_tensors(checkpoint / "optimizer"):
        name, moment = key.rsplit(".", 1)
        write_master(parameters[name], value, moment)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and saved["loss_scale"] is not None:
        scaler.cur_scale = saved["loss_scale"]


def _create_optimizer_state(zero_optimizer: Any, steps: float) -> None:
    """Make Adam's state as it stands after ``steps`` steps, moments zero; DeepSpeed makes it only at the first step."""
    adam = zero_optimizer.optimizer
    flat = getattr(zero_optimizer, "single_partition_of_fp32_groups", None)
    flat = zero_optimizer.fp32_partitioned_groups_flat if flat is None else flat
    for parameter in flat:
        adam.state[parameter] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    _link_optimizer_state(zero_optimizer)


def _link_optimizer_state(zero_optimizer: Any) -> None:
    """Make ZeRO-1 and -2 find every parameter's moments.

    DeepSpeed links them once, after the first step of the first parameter group, when the others have none yet.
    """
    if hasattr(zero_optimizer, "_lazy_init_hp_params_optimizer_state"):
        zero_optimizer._hp_optimizer_states_linked = False
        zero_optimizer._lazy_init_hp_params_optimizer_state()


def write_schedule(path: Path, engine: Any, scheduler: Any) -> None:
    """Write what the optimiser and the schedule need besides tensors (rank 0)."""
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values() if "step" in state}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    write_json(
        path,
        {
            "optimizer_steps": max(steps, default=0.0),
            "loss_scale": float(scaler.cur_scale) if scaler is not None and engine.fp16_enabled() else None,
            "scheduler_epoch": scheduler.last_epoch,
            "learning_rates": list(scheduler.get_last_lr()),
        },
    )


def restore_schedule(path: Path, scheduler: Any, optimizer: Any) -> None:
    """Set the schedule to where `write_schedule` left it."""
    saved = read_json(path)
    scheduler.last_epoch = saved["scheduler_epoch"]
    scheduler._step_count = saved["scheduler_epoch"] + 1
    scheduler._last_lr = saved["learning_rates"]
    for group, learning_rate in zip(optimizer.param_groups, saved["learning_rates"], strict=True):
        group["lr"] = learning_rate


def drop_optimizer(checkpoint: Path) -> None:
    """Free the space of what an older checkpoint has for resuming; its trained tensors stay to be exported."""
    shutil.rmtree(checkpoint / "optimizer", ignore_errors=True)
    (checkpoint / METHOD_STATE).unlink(missing_ok=True)
