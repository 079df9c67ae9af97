"""LoRA-GA (Wang et al., 2024): factors from the gradient, so that the first step follows full fine-tuning's.

With the gradient of the loss G = U Σ Vᵀ on the new task, A₀ takes r of the first 2r right singular vectors and B₀ the
other r left ones; the base weight becomes W − s·B₀A₀. With ``direction: ArB2r``, the paper's, and ``scale: stable``

    A₀ = (out^¼ / √γ) · V_{1…r}ᵀ        B₀ = (out^¼ / √γ) · U_{r+1…2r}

PEFT's version differs: B₀ is multiplied by the gradient's own singular values, so that its size depends on the size of
the loss, and `stable` and `weight_svd` scale B₀ alone. ``formula: peft`` calls it.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from harness.config import PositiveInt
from harness.data.sampling import seed_for
from harness.decomposition.partial import Solver
from harness.decomposition.plain_svd import plain_svd
from harness.errors import UserError
from harness.methods.base import AdapterInit, Statistics, StatisticsRequest
from harness.methods.lora import LoRA, LoRAOptions
from harness.models.targets import Layer

_generators = threading.Lock()


class LoRAGAOptions(LoRAOptions):
    """Which components go where (``direction``) and how large the factors are (``scale``), named as in PEFT.

    ``direction``: ``ArB2r`` A 1…r, B r+1…2r; ``A2rBr`` the reverse; ``ArBr`` A the even ones of 1…2r, B the odd ones;
    ``random`` a random half each. ``scale``: ``stable`` out^¼/√γ; ``weight_svd`` the mean of √(σ_i(W)/s), i ≤ r;
    ``gd_scale`` 1/s; ``unit`` 1. ``formula``: the paper's (float64, exact) or ``peft``'s (randomised SVD).
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: PositiveInt = 16
    formula: Literal["paper", "peft"] = "paper"


class LoRAGA(LoRA):
    """LoRA-GA with the gradient averaged over response tokens."""

    Options = LoRAGAOptions
    decomposes = True
    summary = "LoRA-GA: A and B from the singular vectors of the task's gradient"
    paper = "Wang et al., 2024 (arXiv 2407.05000)"

    def statistics(self) -> StatisticsRequest:
        """Weight gradients on the new task."""
        return StatisticsRequest(("weight_gradient",), "target")

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The same rank everywhere.

        Raises:
            UserError: a layer has fewer than 2r components.
        """
        rank = self.options.rank
        for layer in layers:
            smaller = min(layer.out_features, layer.in_features)
            if 2 * rank > smaller:
                raise UserError(
                    f"method.rank: {rank} given; LoRA-GA takes 2·rank components and layer {layer.name} is "
                    f"{layer.out_features}×{layer.in_features}, so at most {smaller // 2}"
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
        """B₀ and A₀ of ``weight`` (out, in) from its gradient, fp32.

        Raises:
            UserError: the gradient is all zero.
        """
        assert statistics is not None, "LoRA-GA asks for statistics; the pipeline collects them"
        gradient = statistics.weight_gradient(layer.name)
        G = gradient.matrix.to(weight.device)
        if not G.any():
            raise UserError(
                f"method: the gradient of layer {layer.name} is zero on every token; LoRA-GA starts from it"
            )
        seed = seed_for("lora_ga", self.seed, layer.name)
        factors = self._from_paper if self.options.formula == "paper" else self._from_peft
        B, A = factors(weight, G, rank, seed)
        report = {
            "gradient_tokens": gradient.tokens,
            "gradient_norm": float(G.norm()),
            "share_of_weight": self.scaling() * float((B @ A).norm() / weight.float().norm().clamp_min(1e-30)),
        }
        return AdapterInit(A.cpu(), B.cpu(), residual=True, report=report)

    def _from_paper(
        self, weight: torch.Tensor, G: torch.Tensor, rank: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        U, V = _leading_vectors(G, rank, self.solver)
        for_A, for_B = self._components(rank, seed)
        size = self._size(weight, rank)
        return (size * U[:, for_B]).float(), (size * V[:, for_A].T).float()

    def _components(self, rank: int, seed: int) -> tuple[list[int], list[int]]:
        """Which of the first 2r components A and B take."""
        first, second = list(range(rank)), list(range(rank, 2 * rank))
        match self.options.direction:
            case "ArB2r":
                return first, second
            case "A2rBr":
                return second, first
            case "ArBr":
                return list(range(1, 2 * rank, 2)), list(range(0, 2 * rank, 2))
            case "random":
                order = torch.randperm(2 * rank, generator=torch.Generator().manual_seed(seed)).tolist()
                return order[:rank], order[rank:]

    def _size(self, weight: torch.Tensor, rank: int) -> float:
        """The factor in front of the unit vectors in A and in B."""
        match self.options.scale:
            case "stable":
                return weight.shape[0] ** 0.25 / self.options.stable_gamma**0.5
            case "weight_svd":
                sigma = self.plain_svd(weight, rank, "first").sigma
                return float((sigma / self.scaling()).sqrt().mean())
            case "gd_scale":
                return 1 / self.scaling()
            case "unit":
                return 1.0

    def _from_peft(
        self, weight: torch.Tensor, G: torch.Tensor, rank: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from peft import LoraGAConfig

        from harness.adapters.single_layer import peft_factors

        config = LoraGAConfig(self.options.direction, self.options.scale, self.options.stable_gamma)
        # PEFT draws from the global generators (randomised SVD, `random`): lend it them, seeded, and take them back.
        # There is one of them for all threads that work on layers.
        with _generators, torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            return peft_factors(
                weight, rank, self.scaling(), gradient=G, init_lora_weights="lora_ga", lora_ga_config=config
            )


def _leading_vectors(G: torch.Tensor, rank: int, solver: Solver) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 2·rank left and right singular vectors of ``G`` (out, in) as columns, float64.

    Beyond the gradient's rank singular vectors are anyone's choice; there both are zero.
    """
    decomposition = plain_svd(G, (rank, 2 * rank), solver, "first")
    own = decomposition.vectors
    other = (G.double().T if decomposition.side == "left" else G.double()) @ own
    norms = other.norm(dim=0)
    inside = norms > torch.finfo(torch.float32).eps * norms.max()
    own, other = own * inside, torch.where(inside, other / norms, 0.0)
    return (own, other) if decomposition.side == "left" else (other, own)
