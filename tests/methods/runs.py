"""Runs up to step 0, in this process, and models with an adapter that has moved."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from harness.config import RunConfig, resolve
from harness.data.collation import Batch, collate
from harness.data.tokenisation import Row
from harness.export.shards import ShardWriter
from harness.methods.base import Method
from harness.methods.registry import build_method, example_options, method_class, method_names
from harness.models.loading import load_model
from harness.run_directory import RunDirectory
from harness.stages.calibrate import calibrate
from harness.stages.initialise import initialise
from harness.stages.train import build_model
from harness.training.checkpoint import trained_parameters

RANK = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": RANK},
    "lora, alpha 20": {"name": "lora", "rank": RANK, "alpha": 20.0},
    "kpm": {"name": "corda", "mode": "kpm", "rank": RANK},
    "kpm, alpha 3": {"name": "corda", "mode": "kpm", "rank": RANK, "alpha": 3.0},
    "ipm": {"name": "corda", "mode": "ipm", "rank": RANK},
    "ipm, alpha 20": {"name": "corda", "mode": "ipm", "rank": RANK, "alpha": 20.0},
    "pissa, alpha 20": {"name": "pissa", "rank": RANK, "alpha": 20.0},
    "milora, alpha 3": {"name": "milora", "rank": RANK, "alpha": 3.0},
    "olora, alpha 3": {"name": "olora", "rank": RANK, "alpha": 3.0},
    "lora_null, v2, alpha 80": {"name": "lora_null", "rank": RANK, "freeze_a": True, "alpha": 80.0},
    "lora_ga, peft, alpha 3": {"name": "lora_ga", "rank": RANK, "formula": "peft", "alpha": 3.0},
}


def registered(quantised: bool = False) -> dict[str, dict[str, Any]]:
    """Every registered method of LoRA's form, once with each combination of its required choices.

    ``quantised``: those that are made for an NF4 base, or the others.
    """
    found = {}
    for name in method_names():
        cls = method_class(name)
        lora_form = cls.pair == Method.pair and cls.write_adapter is Method.write_adapter and not cls.trains_base
        if not lora_form or cls.needs_quantised_base != quantised:
            continue
        rank = {"rank": RANK} if "rank" in cls.Options.model_fields else {}
        for example in example_options(cls):
            found[" ".join([name, *map(str, example.values())])] = {"name": name, **rank, **example}
    return found


METHODS = VARIANTS | {k: v for k, v in registered().items() if v not in VARIANTS.values()}
PAD = 2


def step_zero(content: dict[str, Any], method: dict[str, Any], name: str) -> tuple[RunConfig, RunDirectory]:
    """Calibrate and initialise ``method``; the run directory is ``name``."""
    config = resolve({**copy.deepcopy(content), "method": method, "name": name})
    run = RunDirectory(config.run_directory)
    calibrate(config, run)
    initialise(config, run)
    return config, run


def live_model(config: RunConfig, run: RunDirectory, needs_original: bool = True) -> PeftModel:
    """The model that training starts from."""
    method = build_method(config.method, config.train.seed)
    model = build_model(config, run, method, None, needs_original).eval()
    assert isinstance(model, PeftModel)
    return model


def base_model(config: RunConfig) -> nn.Module:
    """The base, loaded a second time."""
    return load_model(config.model)


@torch.no_grad()
def perturb(model: PeftModel, size: float = 0.05) -> None:
    """Move every trained tensor, as training would."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def write_checkpoint(model: PeftModel, run: RunDirectory, step: int = 1) -> Path:
    """The trained tensors as a checkpoint has them."""
    folder = run.checkpoints / f"step-{step}" / "trained"
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for name, parameter in trained_parameters(model):
        writer.add(name, parameter.detach().clone())
    writer.close()
    return folder


def prompts(count: int = 6) -> Batch:
    """A right-padded batch of random rows of different length."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 300, (4 + 3 * i,), generator=generator).tolist() for i in range(count)]
    return collate([Row(row, row) for row in rows], PAD)


@torch.no_grad()
def logits(model: nn.Module, batch: Batch | None = None) -> torch.Tensor:
    """Logits of every real token of ``batch``, (tokens, vocabulary), in fp32."""
    batch = batch or prompts()
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return output[batch["attention_mask"].bool()].float()


def largest(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((left - right).abs().max())
