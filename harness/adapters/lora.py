"""LoRA adapters through PEFT: ranks that differ by layer, tensors loaded from files, residual base weights.

Two adapters may stand in the model: ``default`` is trained; ``initial`` is its frozen copy at step 0, present only
where the base weight became a residual and something needs the original model's outputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from harness.adapters.partitioned import gathered
from harness.files import read_json, write_json, write_tensors
from harness.methods.base import LowRank

TRAINED, INITIAL = "default", "initial"
_PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora_config(ranks: Mapping[str, int], scaling: float, base_model: str | None = None) -> LoraConfig:
    """A PEFT configuration with one rank per layer and α_l = scaling · r_l, so that α/r is the same everywhere.

    ``r`` and ``lora_alpha`` hold the largest rank's values; patterns are written only for layers that differ.
    """
    present = {name: rank for name, rank in ranks.items() if rank > 0}
    top = max(present.values())
    differing = {name: rank for name, rank in present.items() if rank != top}
    return LoraConfig(
        r=top,
        lora_alpha=_plain(scaling * top),
        target_modules=sorted(present),
        rank_pattern=differing,
        alpha_pattern={name: _plain(scaling * rank) for name, rank in differing.items()},
        bias="none",
        lora_dropout=0.0,
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
    )


def attach_lora(model: nn.Module, ranks: Mapping[str, int], scaling: float) -> PeftModel:
    """The model with a trainable LoRA on every layer of positive rank; all other parameters frozen."""
    return get_peft_model(model, lora_config(ranks, scaling), adapter_name=TRAINED)


def add_initial(model: PeftModel, factors: Mapping[str, LowRank], scaling: float) -> None:
    """Add the frozen adapter ``initial`` holding the tensors of step 0."""
    ranks = {name: factor.A.shape[0] for name, factor in factors.items()}
    model.add_adapter(INITIAL, lora_config(ranks, scaling))
    load_factors(model, factors, INITIAL)
    model.base_model.set_adapter(TRAINED)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Adapted layers by the module name that they have in the base model."""
    return {
        name.removeprefix(_PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def load_factors(model: PeftModel, factors: Mapping[str, LowRank], adapter: str = TRAINED) -> None:
    """Copy A and B of every adapted layer into the model. Collective under ZeRO-3."""
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        with gathered([A, B], write=True):
            A.copy_(factors[name].A)
            B.copy_(factors[name].B)


@torch.no_grad()
def subtract_from_base(model: PeftModel, factors: Mapping[str, LowRank]) -> None:
    """Make each base weight the residual weight W − s·B·A, computed in fp32 before rounding to the weight's dtype.

    Collective under ZeRO-3: one layer is gathered at a time, and written back partitioned.
    """
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight
        with gathered([weight], write=True):
            block = factors[name].dense().to(weight.device)
            weight.copy_(weight.float() - block)


@contextmanager
def original_model(model: PeftModel) -> Iterator[None]:
    """Inside the block the model computes what the base model computes: adapters off, or the initial one in place.

    No second copy of the weights exists. Gradients are off for adapters inside, and on again outside.
    """
    if INITIAL in model.peft_config:
        model.base_model.set_adapter(INITIAL, inference_mode=True)
        try:
            yield
        finally:
            model.base_model.set_adapter(TRAINED)
    else:
        with model.disable_adapter():
            yield


def write_adapter(folder: Path, factors: Mapping[str, LowRank], base_model: str) -> None:
    """Write a plain PEFT LoRA: ``adapter_model.safetensors`` and ``adapter_config.json``.

    All factors carry the same scaling; it is stored as α/r, never folded into the tensors. Factors are made fp32.
    """
    present = {name: factor for name, factor in factors.items() if factor.A.shape[0] > 0}
    scaling = next(iter(present.values())).scaling
    tensors = {}
    for name, factor in present.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = factor.A.float()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = factor.B.float()
    ranks = {name: factor.A.shape[0] for name, factor in present.items()}
    config = lora_config(ranks, scaling, base_model)
    config.inference_mode = True
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, content)


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The factors of an adapter that `write_adapter` wrote, by layer name, fp32 on the CPU."""
    config = read_json(folder / CONFIG)
    scaling = config["lora_alpha"] / config["r"]
    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        names = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in tensors.keys()})  # noqa: SIM118
        return {
            name: LowRank(
                tensors.get_tensor(f"{_PREFIX}{name}.lora_B.weight"),
                tensors.get_tensor(f"{_PREFIX}{name}.lora_A.weight"),
                scaling,
            )
            for name in names
        }


def _plain(value: float) -> float | int:
    """An integer where the value is one, as adapter_config.json usually has it."""
    return int(value) if float(value).is_integer() else value
