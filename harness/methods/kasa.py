"""KaSA (Wang et al., 2024): the r smallest components of W are removed; ΔW = s·B·diag(σ)·A is learned in their place.

The update is W_world + s·B·diag(σ)·A with W_world = W less its r smallest components, β·Σσ² and
γ·(‖BᵀB − I‖_F + ‖AAᵀ − I‖_F), summed over layers, are added to the loss (Eq. 9 to 11). B is zero at step 0, so that
step 0 computes what W_world computes, and not what W does. PEFT's KaSA is not called: it truncates inside the model,
without a way back to the original one, drops the method over a quantised base without a word, and lets no second
adapter stand beside.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from harness.adapters.orthogonality import orthogonality_errors
from harness.adapters.partitioned import gathered
from harness.config import NonNegativeFloat
from harness.data.sampling import seed_for
from harness.errors import UserError
from harness.methods.base import AdapterInit, Statistics
from harness.methods.lora import LoRAOptions
from harness.methods.milora import MiLoRA
from harness.methods.singular_form import SingularFormMethod
from harness.models.targets import Layer

if TYPE_CHECKING:
    from peft import PeftModel


class KaSAOptions(LoRAOptions):
    """``beta``: weight of Σσ²; ``gamma``: of the orthogonality penalty. Defaults are the reference's for GLUE."""

    beta: NonNegativeFloat = 1e-4
    gamma: NonNegativeFloat = 1e-3


class KaSA(SingularFormMethod):
    """LoRA with singular values, over a weight without its smallest components."""

    Options = KaSAOptions
    decomposes = True
    summary = "KaSA: W without its smallest components, SVD-shaped update in their place"
    paper = "Wang et al., 2024 (arXiv 2412.06071)"
    starts_at_base: ClassVar[bool] = False

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The same rank everywhere.

        Raises:
            UserError: nothing of some layer would be left.
        """
        for layer in layers:
            if self.options.rank >= min(layer.in_features, layer.out_features):
                raise UserError(
                    f"method.rank: {self.options.rank} given; layer {layer.name} is {layer.out_features}×"
                    f"{layer.in_features}, and kasa removes as many components as the rank, so less than "
                    f"{min(layer.in_features, layer.out_features)}"
                )
        return super().ranks(layers, findings)

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """A as LoRA's, B = 0, σ from N(0, 1) (PEFT's and the reference's choice); removed: what MiLoRA would move.

        ``share_of_weight`` in the report is the share of the weight's norm that is removed.
        """
        start = super().initialise(layer, weight, rank, statistics, finding)
        milora = MiLoRA(self.options, self.seed)
        milora.solver, milora.cache = self.solver, self.cache
        minor = milora.initialise(layer, weight, rank, statistics, finding)
        generator = torch.Generator().manual_seed(seed_for("kasa", self.seed, layer.name))
        return AdapterInit(
            start.A,
            start.B,
            residual=False,
            subtracted=(minor.B, minor.A),
            report=minor.report,
            extra={"lora_sigma.weight": torch.randn(rank, generator=generator)},
        )

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT's LoRA layers with σ."""
        from harness.adapters import singular

        attached: PeftModel = super().attach(model, ranks)
        singular.add_singular_values(attached)
        self._vectors, self._values = singular.singular_vectors(attached), singular.singular_values(attached)
        return attached

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """β · Σσ² + γ · Σ over layers of ‖BᵀB − I‖_F + ‖AAᵀ − I‖_F."""
        terms = []
        if self.options.beta:
            with gathered(self._values):
                sigma = torch.cat(self._values)
            terms.append(self.options.beta * sigma.float().square().sum())
        if self.options.gamma:
            terms.append(self.options.gamma * orthogonality_errors(*self._vectors).sum())
        return torch.stack(terms).sum() if terms else None
