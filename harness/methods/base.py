"""The method protocol: what a fine-tuning method tells the pipeline. Every part has a do-nothing default.

A method is built from its own options and is asked, stage by stage: what statistics it needs, which rank each
layer gets, the adapter tensors at step 0, how the model carries them, what it adds to the loss, what it does after an
optimiser step, and the exact weight update at the end.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import nn

from harness.cache import Cache
from harness.config import ModelConfig, Strict
from harness.decomposition.partial import Needed, Solver
from harness.decomposition.plain_svd import PlainSVD, plain_svd
from harness.files import tensor_checksum
from harness.models.targets import Layer
from harness.statistics.statistic import Kind, Statistic

if TYPE_CHECKING:
    from peft import PeftConfig

PLAIN_SVD_FORMULA = 1  # counted up where what is kept of plain decompositions comes out differently
SOLVERS: tuple[Literal["gram", "svd", "partial"], ...] = ("gram", "svd", "partial")


@dataclass(frozen=True)
class StatisticsRequest:
    """Which statistics to collect, on which data, in how many independent sampling rounds.

    ``fisher``: whose labels the gradients are of: the data's (``empirical``) or ones drawn from the model's own
    predictions (``mc``). It matters only where gradients are asked for.
    """

    kinds: tuple[Kind, ...]
    data: Literal["preserve", "target"]
    rounds: int = 1
    fisher: Literal["empirical", "mc"] = "empirical"

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return any(kind != "input_covariance" for kind in self.kinds)


@dataclass(frozen=True)
class ProbeRequest:
    """Short training runs, probes, that choose the value of one option: its name, steps of each run, rows trained on.

    What they decide by is the loss on rows of ``data.train`` and ``data.preserve`` that they do not train on.
    """

    option: str
    steps: int
    rows: int


class Statistics(Protocol):
    """Collected statistics, read one layer at a time."""

    def input_covariance(self, layer: str, sampling_round: int = 0) -> Statistic: ...

    def output_gradient_covariance(self, layer: str) -> Statistic: ...

    def weight_gradient(self, layer: str) -> Statistic: ...

    def rounds(self, layer: str) -> int: ...


@dataclass(frozen=True)
class AdapterInit:
    """An adapter at step 0: ``A`` (rank, in) and ``B`` (out, rank), fp32.

    ``residual``: the base weight becomes the residual weight W − scaling·B·A, so that the model computes at step 0
    what the base computes. ``subtracted``: the pair (B, A) taken out of the base weight where it is not the adapter's
    own (LoftQ). ``report``: numbers for ``init/report.json``. ``extra``: what the adapter has besides A and B, by the
    names under which PEFT saves it below its layer (``lora_magnitude_vector``, ``lora_E``; all begin with ``lora_``).
    """

    A: torch.Tensor
    B: torch.Tensor
    residual: bool
    subtracted: tuple[torch.Tensor, torch.Tensor] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self, pair: tuple[str, str]) -> dict[str, torch.Tensor]:
        """All tensors by name; ``pair``: the names of A and B."""
        return {pair[0]: self.A, pair[1]: self.B, **self.extra}


def moved_block(
    weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, scaling: float, report: dict[str, Any]
) -> AdapterInit:
    """An adapter that takes the block B·A (float64) out of ``weight`` (out, in), which becomes a residual weight.

    Both factors are divided by √s, so that s·B₀A₀ is the block whatever α is, and stored in fp32. The report says
    which share of the weight's norm has moved and what the rounding to fp32 cost.
    """
    split = scaling**-0.5
    B, A = B * split, A * split
    B32, A32 = B.float(), A.float()
    norm = product_norm(B, A)
    # B₃₂·A₃₂ − B·A = B₃₂·(A₃₂ − A) + (B₃₂ − B)·A, in which nothing large cancels.
    lost = product_norm(torch.cat([B32, B32 - B], dim=1), torch.cat([A32 - A, A]))
    weight_norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    shares = {
        "share_of_weight": scaling * norm / max(weight_norm, 1e-300),
        "rounding_error": lost / max(norm, 1e-300),
    }
    return AdapterInit(A32.cpu(), B32.cpu(), residual=True, report=report | shares)


def product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """‖B·A‖ (Frobenius) of B (out, r) and A (r, in), float64, from r × r products: the trace of (BᵀB)·(AAᵀ)."""
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


class Update(Protocol):
    """The exact update of a weight."""

    def dense(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW, (out, in), of the weight (out, in) that it is added to, in fp32."""
        ...


@dataclass(frozen=True)
class LowRank:
    """A weight update in factored form: ΔW = scaling · B @ A, with ``B`` (out, r) and ``A`` (r, in)."""

    B: torch.Tensor
    A: torch.Tensor
    scaling: float

    def dense(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW itself, (out, in), in the factors' dtype; it is the same whatever ``weight`` it is added to."""
        return self.scaling * (self.B @ self.A)


class Method:
    """A fine-tuning method. Subclasses set ``summary`` and ``Options`` and override what they do differently."""

    Options: ClassVar[type[Strict]] = Strict
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    trains_base: ClassVar[bool] = False  # True: parameters of the base are trained and there is no adapter
    trains_all: ClassVar[bool] = False  # True: every one of them, so that the original model would be a second copy
    pair: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")  # A and B, by PEFT's names below a layer
    needs_quantised_base: ClassVar[bool] = False  # True: it is made for a base with `model.quantization: nf4`
    trains_more_than_pair: ClassVar[bool] = False  # True: its adapter trains more than the A and B of linear layers
    adapts_convolutions: ClassVar[bool] = False  # True: `model.target_modules` may name convolutions
    starts_at_base: ClassVar[bool] = True  # False: step 0 computes something else than the base (KaSA truncates it)
    decomposes: ClassVar[bool] = True  # False: `initialise` draws tensors and computes no singular vectors

    def __init__(self, options: Any, seed: int = 0, model: ModelConfig | None = None) -> None:
        """``model``: how the base is stored (dtype, quantisation); given where tensors are initialised.

        There ``solver`` (`init.solver`) and ``cache`` are set besides: how `plain_svd` and its kin find singular
        vectors, and where plain decompositions of base weights are kept.
        """
        self.options = options
        self.seed = seed
        self.model = model
        self.solver: Solver = "auto"
        self.cache: Cache | None = None

    def statistics(self) -> StatisticsRequest | None:
        """What to collect before initialisation; None where the method looks at no data."""
        return None

    def probe(self) -> ProbeRequest | None:
        """How to choose among `candidates` before initialisation; None where there is nothing to choose."""
        return None

    def candidates(self, layers: Sequence[Layer]) -> Sequence[Any]:
        """The options to choose among by probes, each complete, in order of preference where they come out equal."""
        return ()

    def with_options(self, options: Any) -> Self:
        """This method under other options; what it remembers of layers stays shared."""
        other = copy.copy(self)
        other.options = options
        return other

    def examine(self, layer: Layer, weight: torch.Tensor, statistics: Statistics | None) -> dict[str, Any]:
        """What `ranks` and `initialise` must know of one layer, as plain numbers, lists and strings.

        Layers are divided among the ranks of the gang; every rank then gets all findings. They are small: no tensors.
        Keys that begin with an underscore stay out of ``init/report.json``.
        """
        return {}

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Raise `UserError` where the options do not suit the target layers; asked before the model is loaded."""

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The rank of each layer, from what `examine` found; a layer left out or of rank 0 gets no adapter."""
        return {}

    def summarise(
        self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, int]
    ) -> dict[str, Any]:
        """Numbers about all layers together, for ``init/report.json``."""
        return {}

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """Adapter tensors of one layer at step 0 from its base ``weight`` (out, in) and what `examine` found."""
        raise TypeError(f"{type(self).__name__} has no adapter to initialise")

    def plain_svd(self, weight: torch.Tensor, cuts: int | Sequence[int], needed: Needed = "all") -> PlainSVD:
        """`harness.decomposition.plain_svd` of a base weight (out, in), by ``solver``; once for all runs on this base.

        Only for weights of the base: what a task decides (gradients, covariances) is another one every time.
        """
        cuts = [cuts] if isinstance(cuts, int) else sorted(cuts)

        def computed() -> dict[str, torch.Tensor]:
            found = plain_svd(weight, cuts, self.solver, needed)
            facts = [SOLVERS.index(found.solver), found.gram_error, found.largest]
            return {
                "vectors": found.vectors,
                "sigma": found.sigma,
                "facts": torch.tensor(facts, dtype=torch.float64),
            }

        kept = self.kept(weight, {"values": "one side", "cuts": cuts, "needed": needed}, computed)
        solver, gram_error, largest = kept["facts"].tolist()
        side: Literal["left", "right"] = "left" if weight.shape[0] <= weight.shape[1] else "right"
        return PlainSVD(kept["vectors"], side, kept["sigma"], SOLVERS[int(solver)], gram_error, largest)

    def kept(
        self, weight: torch.Tensor, asked: Mapping[str, Any], compute: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """What ``compute`` finds from a base ``weight`` (out, in) and nothing else; from ``cache`` where it is there.

        ``asked``: plain values that say which part of its decomposition that is. To the last bit the same tensors with
        a cache, full or empty, and without one: what is computed is laid out in memory as what is read, since products
        are rounded differently by layout.
        """

        def computed() -> dict[str, torch.Tensor]:
            return {name: tensor.contiguous() for name, tensor in compute().items()}

        if self.cache is None:
            return computed()
        content = {
            "weight": tensor_checksum(weight),
            "device": weight.device.type,  # whose rounding differs
            "solver": self.solver,
            "formula": PLAIN_SVD_FORMULA,
            **asked,
        }
        found = self.cache.get("plain-svd", content)
        if found is None:
            found = computed()
            self.cache.put("plain-svd", content, found)
            return found
        return {name: tensor.to(weight.device, copy=True) for name, tensor in found.items()}

    def scaling(self) -> float:
        """The factor s of ΔW = s·B·A, the same for every layer whatever its rank."""
        return 1.0

    def adapter_config(self, ranks: Mapping[str, int], base_model: str | None = None) -> "PeftConfig":
        """PEFT's configuration of this form of adapter (plain LoRA by default)."""
        from harness.adapters.lora import lora_config

        return lora_config(ranks, self.scaling(), base_model)

    def set_steps(self, steps: int) -> None:
        """Called before `attach` where training follows: how many optimiser steps it has."""

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """The model with its adapters (PEFT LoRA by default), tensors not yet loaded.

        ``ranks``: of every adapted layer; for a method that trains the base, every target layer with rank 0.
        """
        from harness.adapters.lora import attach

        return attach(model, self.adapter_config(ranks))

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """A term of the method's own, added to the loss at every step."""
        return None

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called between the backward pass and optimiser step ``step`` (from 1), when gradients are complete.

        DeepSpeed's ``safe_get_full_grad`` reads them, summed over passes and averaged over ranks, not yet clipped.
        """

    def after_step(self, model: nn.Module) -> None:
        """A projection after the optimiser step; `harness.adapters.partitioned.write_trained` sets a parameter."""

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What the method itself must remember to go on from a checkpoint, besides trained tensors."""
        return {}

    def load_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` gave; called before the first step of a resumed run."""

    def param_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups; by default every trainable parameter in one, at ``learning_rate``."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trainable, "lr": learning_rate, "weight_decay": weight_decay}]

    def update(self, tensors: Mapping[str, torch.Tensor], subtracted: LowRank | None) -> Update:
        """The exact update of a layer's *original* base weight from the trained ``tensors`` of its adapter, by name.

        A `LowRank` where there is a factored form: the update can then be served as a plain LoRA.
        """
        A, B = (tensors[name] for name in self.pair)
        return self.delta(LowRank(B, A, self.scaling()), subtracted)

    def singular_vectors(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """U (out, r) and V (in, r) of a form ΔW = s·U·Σ·Vᵀ, as trained: columns meant to be orthonormal. Else None."""
        return None

    def write_adapter(
        self,
        folder: Path,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        updates: Mapping[str, Update],
        base_model: str,
    ) -> None:
        """Write ``adapter/``: by default ``updates`` as a plain LoRA on ``base_model``. ``tensors``: as in `update`."""
        from harness.adapters.lora import write_adapter

        factors = {name: update for name, update in updates.items() if isinstance(update, LowRank)}
        if len(factors) < len(updates):
            raise TypeError(f"{type(self).__name__} has updates without factors, so it must write its adapter itself")
        write_adapter(folder, factors, base_model)

    def delta(self, trained: LowRank, initial: LowRank | None) -> LowRank:
        """The exact update of the *original* base weight, in factored form.

        ``initial`` is given where the base weight became the residual W − s·B₀A₀: the update is then
        s·(B A − B₀ A₀) = s·[B, −B₀]·[A; A₀], of rank 2r.
        """
        if initial is None:
            return trained
        return LowRank(
            torch.cat([trained.B, -initial.B], dim=1), torch.cat([trained.A, initial.A], dim=0), trained.scaling
        )
