"""Adapters through PEFT: ranks that differ by layer, tensors loaded from files, residual base weights.

A layer's tensors go by the names under which PEFT saves them below the layer: ``lora_A.weight`` and ``lora_B.weight``
for LoRA, others besides for other forms. All begin with ``lora_``. Checkpoints and ``init/`` use the same names.

Two adapters may stand in the model: ``default`` is trained; ``initial`` is its frozen copy at step 0, present only
where the base weight became a residual and something needs the original model's outputs.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from harness.adapters.base_parameters import has_initial, initial_parameters
from harness.adapters.partitioned import gathered
from harness.config import TaskName
from harness.files import read_json, write_json, write_tensors
from harness.methods.base import LowRank

TRAINED, INITIAL = "default", "initial"
_PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TASK_TYPES: dict[str, str] = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "question_answering": "QUESTION_ANS",
}
SIGMA, BOUND = "lora_sigma.weight", "lora_bound"  # of the form U·diag(σ)·Vᵀ: `harness.adapters.singular`


def lora_config(ranks: Mapping[str, int], scaling: float, base_model: str | None = None, **options: Any) -> LoraConfig:
    """A PEFT configuration with one rank per layer and α_l = scaling · r_l, so that α/r is the same everywhere.

    ``r`` and ``lora_alpha`` hold the largest rank's values; patterns are written only for layers that differ.
    ``options``: further fields of PEFT's (``use_dora``).
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
        **options,
    )


def attach_lora(model: nn.Module, ranks: Mapping[str, int], scaling: float) -> PeftModel:
    """The model with a trainable LoRA on every layer of positive rank; all other parameters frozen."""
    return attach(model, lora_config(ranks, scaling))


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """The model with a trainable adapter of any form that PEFT has; all other parameters frozen."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        config.task_type = None  # PEFT's class for language models asks for that
    return get_peft_model(model, config, adapter_name=TRAINED)


def add_initial(model: PeftModel, factors: Mapping[str, LowRank], scaling: float) -> None:
    """Add the frozen adapter ``initial`` holding the tensors of step 0."""
    ranks = {name: factor.A.shape[0] for name, factor in factors.items()}
    model.add_adapter(INITIAL, lora_config(ranks, scaling))
    load_factors(model, factors, INITIAL)
    model.base_model.set_adapter(TRAINED)


def freeze_a(model: PeftModel) -> None:
    """Leave A of the trained adapter as it is at step 0; it stays frozen when PEFT switches adapters off and on."""
    for layer in lora_layers(model).values():
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, TRAINED: ("lora_A",)}
        layer._freeze_non_trainable_peft_weights(TRAINED)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Adapted layers by the module name that they have in the base model."""
    return {
        name.removeprefix(_PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def saved_name(parameter: str) -> str:
    """The name under which checkpoints hold a parameter: PEFT's for the trained adapter, else the base model's own."""
    name = parameter.removeprefix(_PREFIX)
    name = re.sub(rf"(\.lora_\w+)\.{TRAINED}(?=\.weight$|$)", r"\1", name)
    # PEFT saves magnitude vectors as it did when they were parameters and not yet modules.
    return re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", name)


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into the model's parameters of those (saved) names. Collective under ZeRO-3."""
    parameters = {saved_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in tensors:
        with gathered([parameters[name]], write=True):
            parameters[name].copy_(tensor)


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
def original_model(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what the base model computes: adapters off, or the initial one in place.

    No second copy of the weights exists; where parameters of the base are trained, one of these. Gradients are off for
    adapters inside, and on again outside.
    """
    replaced = has_initial(model) or not isinstance(model, PeftModel)
    with initial_parameters(model) if replaced else nullcontext():
        if not isinstance(model, PeftModel):
            yield
        elif INITIAL in model.peft_config:
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
    layers = {name: {"lora_A.weight": factor.A, "lora_B.weight": factor.B} for name, factor in present.items()}
    ranks = {name: factor.A.shape[0] for name, factor in present.items()}
    write_layers(folder, layers, lora_config(ranks, scaling, base_model))


def add_modules(folder: Path, tensors: Mapping[str, torch.Tensor], task: TaskName, modules: Sequence[str] = ()) -> None:
    """Add modules that were trained in full to the adapter in ``folder``, as PEFT's ``modules_to_save``; and the task.

    Args:
        tensors: parameters by their names in the base model (``classifier.dense.weight``).
        modules: what was to be trained (``classifier``). PEFT cannot load one of these and a part of it beside it.
    """
    config = read_json(folder / CONFIG)
    config["task_type"] = _TASK_TYPES.get(task)
    if tensors:
        config["modules_to_save"] = sorted({_outermost(name.rpartition(".")[0], modules) for name in tensors})
        own = {f"{_PREFIX}{name}": tensor.float() for name, tensor in tensors.items()}
        write_tensors(folder / WEIGHTS, load_file(folder / WEIGHTS) | own, {"format": "pt"})
    write_json(folder / CONFIG, config)


def _outermost(name: str, modules: Sequence[str]) -> str:
    """The largest module around ``name`` that one of ``modules`` names, in full or by its last parts; else itself."""
    parts = name.split(".")
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((a for a in around if any(a == m or a.endswith(f".{m}") for m in modules)), name)


def write_layers(folder: Path, layers: Mapping[str, Mapping[str, torch.Tensor]], config: PeftConfig) -> None:
    """Write a PEFT adapter of any form from its tensors by layer and name. Tensors are made fp32."""
    tensors = {
        f"{_PREFIX}{layer}.{name}": tensor.float() for layer, own in layers.items() for name, tensor in own.items()
    }
    config.inference_mode = True
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, content)


def read_layers(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of an adapter that `write_layers` wrote, by layer and name, fp32 on the CPU."""
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    return by_layer({name: tensor for name, tensor in tensors.items() if ".lora_" in name})


def parameter_count(folder: Path) -> int:
    """How many numbers an adapter holds, bounds of σ aside, from the header of its file."""
    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        names = [key for key in tensors.keys() if not key.endswith(BOUND)]  # noqa: SIM118
        return sum(math.prod(tensors.get_slice(key).get_shape()) for key in names)


def by_layer(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors called ``<layer>.lora_…``, by layer and by name below it."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors):
        layer, _, name = key.rpartition(".lora_")
        layers.setdefault(layer, {})[f"lora_{name}"] = tensors[key]
    return layers


def low_rank(tensors: Mapping[str, torch.Tensor], scaling: float) -> LowRank:
    """The update of a layer's tensors of LoRA's form, s·B·A, or of the form s·U·diag(σ)·Vᵀ, with diag(σ) put to A."""
    A = tensors["lora_A.weight"]
    if SIGMA in tensors:
        A = tensors[SIGMA].unsqueeze(1) * A
    return LowRank(tensors["lora_B.weight"], A, scaling)


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The factors of an adapter that `write_adapter` wrote, or of ``init/``, by layer name, fp32 on the CPU."""
    config = read_json(folder / CONFIG)
    scaling = config["lora_alpha"] / config["r"]
    return {name: low_rank(tensors, scaling) for name, tensors in read_layers(folder).items()}


def _plain(value: float) -> float | int:
    """An integer where the value is one, as adapter_config.json usually has it."""
    return int(value) if float(value).is_integer() else value
