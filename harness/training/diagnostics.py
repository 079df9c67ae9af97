"""What the update of each layer looks like while it is trained: norms, amplification factors, orthogonality errors.

Of the exact update ΔW of each layer's *original* weight W, as the export would write it at that step:

- the spectral norm ‖ΔW‖₂ and the Frobenius norm ‖ΔW‖_F (FCLoRA, Fig. 3a; FLoRA, Fig. 4a);
- two amplification factors (FCLoRA, Appendix L and Table 7; FLoRA, §5.2 and Fig. 4b), W→ΔW,
  ‖ΔW‖_F / ‖U_ΔWᵀ W V_ΔW‖_F, and ΔW→W, ‖ΔW‖_F / ‖U_Wᵀ ΔW V_W‖_F, each with the first r pairs of singular vectors;
  r is the rank of the layer's adapter, also where the update of a residual method has rank 2r;
- ‖UᵀU − I‖_F + ‖VᵀV − I‖_F of the trained factors of methods whose form has singular vectors (FCLoRA, Fig. 7).

Updates with factors are measured from them alone; others (DoRA, convolutions) as a whole matrix, (out, in · kernel).
Layers are divided over the ranks; reading a layer is collective.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from harness.adapters.lora import read_layers, saved_name
from harness.adapters.partitioned import gathered, read_trained
from harness.console import progress
from harness.decomposition.factors import FactoredSVD, factored_svd, leading_svd, orthogonality_error
from harness.files import read_json
from harness.methods.base import LowRank, Method
from harness.models.targets import place
from harness.training.distributed import rank, world_size
from harness.training.trainer import HarnessTrainer

Part = Literal["norms", "amplification", "orthogonality"]
ALL = "all"  # in the place of a module type: every adapted layer
# quantity → whether the largest value over layers is logged besides the mean
QUANTITIES = {
    "spectral_norm": True,
    "frobenius_norm": False,
    "amplification_w_to_dw": False,
    "amplification_dw_to_w": False,
    "orthogonality_error": False,
}


@dataclass(frozen=True)
class HeldLayer:
    """One layer as its rank holds it: adapter ``tensors`` by name, ``weight`` (out, in, …) that it computes with.

    ``subtracted``: what was taken out of the original weight, so that W = ``weight`` + subtracted.
    """

    tensors: Mapping[str, torch.Tensor]
    weight: torch.Tensor | None
    subtracted: LowRank | None

    def original(self) -> torch.Tensor:
        """W, (out, in, …), float64; over an NF4 base as far as quantisation left it."""
        assert self.weight is not None
        if self.subtracted is None:
            return self.weight.double()
        block = self.subtracted
        return self.weight.double() + block.scaling * (block.B.double() @ block.A.double())

    def projected(self, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Uᵀ W V of the original W, float64, the subtracted block from its factors."""
        assert self.weight is not None
        # In fp32 at least: converting a large weight to float64 would cost more than the product.
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        found = (U.to(wide).T @ self.weight.to(wide).flatten(1)).double() @ V
        if self.subtracted is not None:
            found += self.subtracted.scaling * (U.T @ self.subtracted.B.double()) @ (self.subtracted.A.double() @ V)
        return found


def measure_layer(
    method: Method, held: HeldLayer, adapter_rank: int, leading: FactoredSVD | None, parts: Sequence[Part]
) -> dict[str, float]:
    """The quantities of one layer, float64; one that is not defined there is absent.

    An amplification factor is not defined where ΔW is zero, nor the first where U_ΔWᵀ W V_ΔW is.

    Args:
        leading: the first ``adapter_rank`` singular vectors of the original weight; needed for ``amplification``.
    """
    found: dict[str, float] = {}
    vectors = method.singular_vectors(held.tensors) if "orthogonality" in parts else None
    if vectors is not None:
        found["orthogonality_error"] = orthogonality_error(*vectors)
    if "norms" not in parts and "amplification" not in parts:
        return found
    update = method.update(held.tensors, held.subtracted)
    if isinstance(update, LowRank):
        svd = factored_svd(update.B, update.A, update.scaling)
        frobenius = svd.frobenius_norm
    else:  # a form without factors: the whole matrix
        delta = update.dense(held.original()).double().flatten(1)
        svd = leading_svd(delta, adapter_rank)
        frobenius = float(delta.norm())
    if "norms" in parts:
        found |= {"spectral_norm": svd.spectral_norm, "frobenius_norm": frobenius}
    if "amplification" in parts and len(svd.sigma):
        assert leading is not None
        top = slice(0, adapter_rank)
        U, V = leading.U.to(svd.U), leading.V.to(svd.V)
        if isinstance(update, LowRank):
            onto_weight = update.scaling * (U.T @ update.B.double()) @ (update.A.double() @ V)
        else:
            onto_weight = U.T @ delta @ V
        onto_update = held.projected(svd.U[:, top], svd.V[:, top])
        for name, projection in (("amplification_w_to_dw", onto_update), ("amplification_dw_to_w", onto_weight)):
            norm = float(projection.norm())
            if norm > 0:
                found[name] = frobenius / norm
    return found


def summarise(layers: Sequence[str], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What is logged: means over the layers of each module type and over all, ``spectral_norm/mlp.up_proj``.

    A mean is over the layers where the quantity is defined. The largest spectral norm is ``spectral_norm_max/…``.
    """
    groups: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for layer, values in zip(layers, found, strict=True):
        groups[place(layer)[1]].append(values)
    groups[ALL] = list(found)
    logged: dict[str, float] = {}
    for quantity, has_largest in QUANTITIES.items():
        for group, members in groups.items():
            values = [member[quantity] for member in members if quantity in member]
            if not values:
                continue
            logged[f"{quantity}/{group}"] = math.fsum(values) / len(values)
            if has_largest:
                logged[f"{quantity}_max/{group}"] = max(values)
    return logged


class Diagnostics(TrainerCallback):
    """Measures before training and every ``interval`` steps, and logs means over the layers of each module type.

    Args:
        init: the folder ``init/`` of the run.
        subtracted: what was taken out of base weights, by layer, as `harness.stages.initialise.subtracted_blocks` reads
            it there.
        parts: which of the quantities; ``amplification`` costs an SVD of every adapted weight at the start and one
            reading of every adapted weight at each measurement.
    """

    def __init__(
        self,
        trainer: HarnessTrainer,
        method: Method,
        init: Path,
        subtracted: Mapping[str, LowRank],
        interval: int,
        parts: Sequence[Part],
    ) -> None:
        self._trainer, self._method, self._interval, self._parts = trainer, method, interval, tuple(parts)
        initial = read_layers(init)
        report = read_json(init / "report.json")["layers"]
        self._layers = sorted(initial)
        self._ranks = {layer: int(report[layer]["rank"]) for layer in self._layers}
        self._subtracted = subtracted
        self._leading: dict[str, FactoredSVD] = {}
        parameters = {saved_name(name): parameter for name, parameter in trainer.model.named_parameters()}
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._fixed: dict[str, dict[str, torch.Tensor]] = {}  # tensors that no parameter of the model holds
        for layer, tensors in initial.items():
            own = {name: parameters.get(f"{layer}.{name}") for name in tensors}
            self._parameters[layer] = {name: parameter for name, parameter in own.items() if parameter is not None}
            self._fixed[layer] = {name: tensors[name].clone() for name, parameter in own.items() if parameter is None}
        self._modules = {saved_name(name): module for name, module in trainer.model.named_modules()}
        # A form without factors needs the weight for its norms too.
        without = "norms" in self._parts and any(not self._has_factors(layer) for layer in self._layers)
        self._reads_weights = "amplification" in self._parts or without

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "amplification" in self._parts:
            self._decompose_weights()
        if state.global_step == 0:
            self._measure()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._interval == 0 or state.global_step == state.max_steps:
            due = control.should_log
            self._measure()
            control.should_log = due  # logging clears it, and the step's own line is still to come

    @torch.no_grad()
    def _measure(self) -> None:
        names = list(QUANTITIES)
        values = torch.zeros(len(self._layers), len(names), dtype=torch.float64)
        for index, held in self._held(range(len(self._layers)), weights=self._reads_weights):
            layer = self._layers[index]
            found = measure_layer(self._method, held, self._ranks[layer], self._leading.get(layer), self._parts)
            values[index] = torch.tensor([found.get(name, math.nan) for name in names], dtype=torch.float64)
        values = self._summed(values)
        rows = [{n: v for n, v in zip(names, row, strict=True) if not math.isnan(v)} for row in values.tolist()]
        logged = summarise(self._layers, rows)
        if logged:
            self._trainer.log(logged)

    @torch.no_grad()
    def _decompose_weights(self) -> None:
        """The leading singular vectors of the original weights, each on the rank that measures its layer."""
        indices = progress(range(len(self._layers)), "singular vectors of the base weights", len(self._layers))
        for index, held in self._held(indices, weights=True):
            layer = self._layers[index]
            svd = leading_svd(held.original().flatten(1), self._ranks[layer])
            # As large as the adapter: in main memory, and in fp32, beside whose rounding nothing here is exact.
            self._leading[layer] = FactoredSVD(svd.U.float().cpu(), svd.sigma.cpu(), svd.V.float().cpu())

    def _held(self, indices: Any, weights: bool) -> Iterator[tuple[int, HeldLayer]]:
        """This rank's layers, read together with the other ranks': as many at a time as there are ranks."""
        mine: tuple[int, HeldLayer] | None = None
        for index in indices:
            keep = index % world_size() == rank()
            held = self._read(self._layers[index], weights, keep)
            if held is not None:
                mine = (index, held)
            last = index == len(self._layers) - 1
            if mine is not None and (last or index % world_size() == world_size() - 1):
                yield mine
                mine = None

    def _read(self, layer: str, weights: bool, keep: bool) -> HeldLayer | None:
        """One layer, where it is to be kept; every rank takes part."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters[layer].items():
            if parameter.requires_grad:
                value = read_trained(parameter)
            else:
                with gathered([parameter]):
                    value = parameter.detach().float().clone()
            if keep:
                tensors[name] = value
        weight = _whole_weight(self._modules[layer], keep) if weights else None
        if not keep:
            return None
        device = next(iter(tensors.values())).device
        tensors |= {name: tensor.to(device) for name, tensor in self._fixed[layer].items()}
        block = self._subtracted.get(layer)
        if block is not None:
            block = LowRank(block.B.to(device), block.A.to(device), block.scaling)
        return HeldLayer(tensors, weight, block)

    def _has_factors(self, layer: str) -> bool:
        """Whether a layer's update has factors, seen on tensors of zeros."""
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self._parameters[layer].items()}
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()} | self._fixed[layer]
        return isinstance(self._method.update(tensors, self._subtracted.get(layer)), LowRank)

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Summed over ranks: each has zeros where another measures."""
        if world_size() == 1:
            return values
        device = next(iter(self._parameters[self._layers[0]].values())).device
        values = values.to(device)
        torch.distributed.all_reduce(values)
        return values.cpu()


def _whole_weight(module: nn.Module, keep: bool) -> torch.Tensor | None:
    """The base weight of an adapted layer, (out, in, …), where it is to be kept; an NF4 weight dequantised.

    A copy of what ZeRO-3 divides, and then collective.
    """
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = base.weight
    with gathered([weight]):
        if not keep:
            return None
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        return weight.detach().clone() if hasattr(weight, "ds_id") else weight.detach()
