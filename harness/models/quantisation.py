"""NF4: quantising the frozen weights of a base model (QLoRA, Dettmers et al., 2023), residual weights among them.

What is quantised is the residual weight W' = W − s·B·A of an adapted layer, never W itself where a block of W was moved
into the adapter (CorDA++ §V-C). Every linear layer but the output embedding is quantised, adapted or not, as QLoRA
does; in a vision-language model those of its language model (`harness.models.targets.quantised_modules`). Quantisation
is deterministic, so `nf4_values` says exactly what a quantised layer computes with: the export adds the trained update
to that.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.models.targets import Layer

if TYPE_CHECKING:
    from harness.methods.base import LowRank, Update

BLOCK = 64  # weights that share one scale


def residual_weight(weight: torch.Tensor, subtracted: "LowRank | None", dtype: torch.dtype) -> torch.Tensor:
    """W − s·B·A in fp32, rounded once to ``dtype``; W itself, (out, in), where nothing was subtracted."""
    if subtracted is None:
        return weight.to(dtype)
    return (weight.float() - subtracted.dense().float().to(weight.device)).to(dtype)


def nf4_values(weight: torch.Tensor, double: bool) -> torch.Tensor:
    """The values that a layer computes with after ``weight`` (out, in) was quantised to NF4; same shape, dtype, device.

    ``double``: the blocks' scales are quantised too (double quantisation).
    """
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    return bnb.dequantize_4bit(packed, state)


def misread_on_cpu(layers: Sequence[Layer], device: torch.device) -> list[str]:
    """Layers that bitsandbytes dequantises wrongly on the CPU (seen in 0.50): rows that are no whole number of blocks.

    Quantisation itself is right there, but blocks are looked up row by row, and about a quarter of the weight's norm is
    lost instead of a tenth. Nothing is inconsistent: what is trained, exported and reported is what the layer computes.
    """
    return [layer.name for layer in layers if device.type == "cpu" and layer.in_features % BLOCK]


@torch.no_grad()
def quantise_linears(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    subtracted: Mapping[str, "LowRank"],
    dtype: torch.dtype,
    double: bool,
    device: torch.device,
) -> None:
    """Put an NF4 layer holding its residual weight in the place of each of ``linears``, layers of ``model`` by name."""
    for name, linear in linears.items():
        weight = residual_weight(linear.weight.detach().to(device), subtracted.get(name), dtype)
        replace_module(model, name, quantised_layer(linear, weight, dtype, double))
    model.is_loaded_in_4bit = True  # what PEFT and transformers look at


@torch.no_grad()
def quantised_layer(linear: nn.Linear, weight: torch.Tensor, dtype: torch.dtype, double: bool) -> nn.Module:
    """An NF4 layer in place of ``linear`` that holds ``weight`` (out, in), quantised on the device where that lies.

    It keeps the bias, and stores the packed weight as ``dtype``, so that ZeRO-3 partitions it like any other parameter.
    """
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=dtype,
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=dtype,
        module=layer,
    ).to(weight.device)
    layer.bias = linear.bias
    # bitsandbytes' fast path for CPUs repacks the weight in place and computes in bf16 outside training: that would
    # change what the anchor compares with, and break ZeRO-3's partitions.
    layer.support_avx512bf16_for_cpu = False
    return layer.train(linear.training)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule of that dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantisation_errors(
    weight: torch.Tensor,
    adapter: "Update | None",
    subtracted: "LowRank | None",
    covariance: torch.Tensor | None,
    dtype: torch.dtype,
    double: bool,
) -> dict[str, float]:
    """How far a layer at step 0 is from the base: E = W − Q(W′) − s·B₀A₀, or W − Q(W) where it has no adapter.

    Returns:
        ``weight_error`` ‖E‖/‖W‖ and, with the input ``covariance`` (in, in), ``output_error`` ‖E X‖/‖W X‖ on the
        calibration inputs X, as √(tr(E C Eᵀ) / tr(W C Wᵀ)).
    """
    frozen = nf4_values(residual_weight(weight, subtracted, dtype), double)
    W = weight.double()
    E = W - frozen.double()
    if adapter is not None:
        E -= adapter.dense(frozen.float()).double().to(W.device)
    errors = {"weight_error": float(E.norm() / W.norm())}
    if covariance is not None:
        C = covariance.double().to(W.device)
        ratio = ((E @ C) * E).sum() / ((W @ C) * W).sum()
        errors["output_error"] = float(ratio.clamp_min(0).sqrt())
    return errors
