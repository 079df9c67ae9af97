"""FCLoRA (fine-grained components): ΔW = U·diag(σ)·Vᵀ with 0 ≤ σ ≤ σ̄ and U, V near orthonormal.

σ̄ is a quartile of the singular values of the layer's weight W₀, or a number. After every optimiser step σ is clipped
(Eq. 10, Algorithm 1); γ·(‖UᵀU − I‖_F + ‖VᵀV − I‖_F), summed over layers, is added to the loss (Eq. 11). U is saved as
``lora_B`` (out, r), Vᵀ as ``lora_A`` (r, in), σ as ``lora_sigma`` (r), σ̄ as ``lora_bound`` (1,).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import nn

from harness.adapters.orthogonality import orthogonality_errors, orthonormalise
from harness.adapters.partitioned import clamp_trained, gathered
from harness.config import NonNegativeFloat, PositiveFloat, PositiveInt, Strict
from harness.data.sampling import seed_for
from harness.decomposition.components import Components, chosen_components, singular_value_quartile
from harness.errors import UserError
from harness.methods.base import SOLVERS, AdapterInit, Statistics
from harness.methods.singular_form import SingularFormMethod
from harness.models.targets import Layer

if TYPE_CHECKING:
    from peft import PeftModel

Quartile = Literal[1, 2, 3, 4]
DEFAULT_QUARTILE: Quartile = 2
DEFAULT_GAMMA = 0.1


class FCLoRAOptions(Strict):
    """σ̄ is ``bound``, or the ``quartile`` of the layer's singular values (the second where neither is given).

    ``gamma`` is 0.1 where it is not given and there is a penalty.

    ``variant``: the ablations of Table 5, ``lora_uv`` without σ and ``lora_svd`` with σ that starts at 1 and is never
    clipped. ``orthogonality: gram_schmidt``: the ablation of Table 18, U and V orthonormalised after every step.
    """

    rank: PositiveInt = 16
    variant: Literal["fclora", "lora_uv", "lora_svd"] = "fclora"
    init: Literal["zero_gaussian", "singular"] = "zero_gaussian"
    orthogonality: Literal["penalty", "gram_schmidt"] = "penalty"
    gamma: NonNegativeFloat | None = None
    quartile: Quartile | None = None
    bound: PositiveFloat | None = None

    @field_validator("init")
    @classmethod
    def _nothing_at_step_0(cls, value: str, info: ValidationInfo) -> str:
        if value == "singular" and info.data.get("variant", "fclora") != "fclora":
            raise ValueError(f"zero_gaussian with method.variant: {info.data['variant']}, where σ is 1 at step 0")
        return value

    @field_validator("orthogonality")
    @classmethod
    def _something_to_orthonormalise(cls, value: str, info: ValidationInfo) -> str:
        if value == "gram_schmidt" and info.data.get("init", "zero_gaussian") != "singular":
            raise ValueError("penalty, or method.init: singular as well (U = 0 cannot be made orthonormal)")
        return value

    @field_validator("gamma")
    @classmethod
    def _has_a_penalty(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("orthogonality") == "gram_schmidt":
            raise ValueError("no gamma with method.orthogonality: gram_schmidt, which has no penalty")
        return value

    @field_validator("quartile", "bound")
    @classmethod
    def _one_bound(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("variant", "fclora") != "fclora":
            raise ValueError(f"no {info.field_name} with method.variant: {info.data['variant']}, which never clips σ")
        if value is not None and info.field_name == "bound" and info.data.get("quartile") is not None:
            raise ValueError("either method.quartile or method.bound")
        return value


class FCLoRA(SingularFormMethod):
    """SVD-shaped update whose singular values cannot grow beyond those of W₀'s fine-grained components."""

    Options = FCLoRAOptions
    decomposes = True
    summary = "FCLoRA: SVD-shaped update, singular values clipped to a quartile of W's"
    paper = "FCLoRA: low-rank adaptation with fine-grained component injection (under review)"

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """U, σ, Vᵀ and σ̄; ΔW is exactly zero, by U = 0 or by σ = 0. Seeded by run and layer.

        ``zero_gaussian``: U = 0, V from N(0, 1/in), σ = min(1, σ̄); with U = 0 a σ of 0 would leave every gradient zero.
        ``singular``: r random pairs of singular vectors of W₀, σ = 0.

        Raises:
            UserError: the quartile of this weight's singular values is zero.
        """
        generator = torch.Generator().manual_seed(seed_for("fclora", self.seed, layer.name))
        report: dict[str, Any] = {}
        extra: dict[str, torch.Tensor] = {}
        start = 1.0
        if self.options.variant == "fclora":
            exact = self._bound(layer, weight)
            bound = rounded_down(exact, getattr(torch, self.model.dtype if self.model else "float32"))
            report["bound"] = exact
            extra["lora_bound"] = torch.tensor([bound])
            start = 0.0 if self.options.init == "singular" else min(1.0, bound)
        if self.options.variant != "lora_uv":
            extra["lora_sigma.weight"] = torch.full((rank,), start)
        if self.options.init == "zero_gaussian":
            A = torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
            B = torch.zeros(layer.out_features, rank)
        else:
            chosen = sorted(torch.randperm(min(weight.shape), generator=generator)[:rank].tolist())
            components = self._components(weight, chosen)
            report |= {"components": chosen, "solver": components.solver}
            A, B = components.V.T.float().cpu().contiguous(), components.U.float().cpu().contiguous()
        return AdapterInit(A, B, residual=False, report=report, extra=extra)

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT's LoRA layers with σ and σ̄; ``lora_uv`` is a plain LoRA."""
        from harness.adapters import singular

        attached: PeftModel = super().attach(model, ranks)
        clipped = self.options.variant == "fclora"
        if self.options.variant != "lora_uv":
            singular.add_singular_values(attached, bounded=clipped)
        self._vectors = singular.singular_vectors(attached)
        self._clipped = (singular.singular_values(attached), singular.bounds(attached)) if clipped else None
        self._limits: list[float] | None = None
        return attached

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """γ · Σ over layers of ‖UᵀU − I‖_F + ‖VᵀV − I‖_F (Eq. 11; not squared)."""
        gamma = DEFAULT_GAMMA if self.options.gamma is None else self.options.gamma
        if gamma == 0 or self.options.orthogonality == "gram_schmidt":
            return None
        return gamma * orthogonality_errors(*self._vectors).sum()

    def after_step(self, model: nn.Module) -> None:
        """Clip σ to [0, σ̄] (Eq. 10); with ``gram_schmidt`` make U and V orthonormal."""
        if self.options.orthogonality == "gram_schmidt":
            orthonormalise(*self._vectors)
        if self._clipped is None:
            return
        values, bounds = self._clipped
        if self._limits is None:
            with gathered(bounds):
                self._limits = torch.cat([bound.detach().float() for bound in bounds]).tolist()
        clamp_trained(values, 0.0, self._limits)

    def _components(self, weight: torch.Tensor, chosen: Sequence[int]) -> Components:
        """These components alone: a cached entry need not hold the others."""

        def computed() -> dict[str, torch.Tensor]:
            found = chosen_components(weight, chosen, self.solver)
            solver = torch.tensor([SOLVERS.index(found.solver)])
            return {"U": found.U, "sigma": found.sigma, "V": found.V, "solver": solver}

        kept = self.kept(weight, {"values": "components", "chosen": list(chosen)}, computed)
        return Components(kept["U"], kept["sigma"], kept["V"], SOLVERS[int(kept["solver"])])

    def _bound(self, layer: Layer, weight: torch.Tensor) -> float:
        """σ̄ in float64."""
        if self.options.bound is not None:
            return self.options.bound
        quartile = self.options.quartile or DEFAULT_QUARTILE
        value = float(
            self.kept(
                weight,
                {"values": "quartile", "quartile": quartile},
                lambda: {"value": torch.tensor([singular_value_quartile(weight, quartile)], dtype=torch.float64)},
            )["value"]
        )
        if value <= torch.finfo(torch.float64).eps * float(weight.double().norm()):
            raise UserError(
                f"method.quartile: {quartile} given; it is 0 in layer {layer.name}, whose update would be nothing; "
                "raise it, or give method.bound"
            )
        return value


def rounded_down(value: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is no larger than ``value`` > 0.

    A bound that its dtype holds exactly is kept by rounding: what is no larger rounds to nothing larger.
    """
    rounded = torch.tensor([value], dtype=torch.float64).to(dtype)
    if rounded.double().item() > value:
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        rounded = (rounded.view(bits) - 1).view(dtype)
    return float(rounded)
