"""AdaLoRA (Zhang et al., 2023): ΔW = s·P·Λ·Q with Λ diagonal; a budget of ranks goes where the loss is sensitive.

P is PEFT's ``lora_B`` (out, r), Λ ``lora_E`` (r, 1), Q ``lora_A`` (r, in). PEFT's layers and its allocator are used: at
every step it updates running averages of |w · ∂L/∂w| and their variability, and at allocation steps it keeps the
triplets (a column of P, an entry of Λ, a row of Q) of the highest scores and sets Λ of the others to zero. The order of
a step is that of the paper's Algorithm 1: sensitivities from the weights that the gradients are of, the optimiser's
step, then the mask. A masked entry may come back until the last allocation.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from harness.adapters.partitioned import gathered, read_trained, write_trained
from harness.config import NonNegativeFloat, PositiveFloat, PositiveInt, Strict
from harness.data.sampling import seed_for
from harness.errors import UserError
from harness.methods.base import AdapterInit, LowRank, Method, Statistics, Update
from harness.models.targets import Layer

if TYPE_CHECKING:
    from peft import PeftConfig

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
KEPT = "kept"
_EPSILON = 1e-5  # PEFT divides by r + 1e-5, so that a layer of rank 0 divides by something
Decay = Annotated[float, Field(gt=0, lt=1)]


class AdaLoRAOptions(Strict):
    """PEFT's names. ``tinit``, ``tfinal``: steps before the first and after the last allocation; by default a tenth and
    three tenths of all steps. ``alpha`` is ``init_r`` where it is not given.
    """

    init_r: PositiveInt = 12
    target_r: PositiveInt = 8
    alpha: PositiveFloat | None = None
    tinit: PositiveInt | None = None
    tfinal: Annotated[int, Field(ge=0)] | None = None
    deltaT: PositiveInt = 1
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    orth_reg_weight: NonNegativeFloat = 0.5

    @field_validator("target_r")
    @classmethod
    def _below_initial(cls, value: int, info: ValidationInfo) -> int:
        if "init_r" in info.data and value >= info.data["init_r"]:
            raise ValueError(f"less than method.init_r ({info.data['init_r']}), from which ranks are taken away")
        return value


class AdaLoRA(Method):
    """Ranks that change while training, from ``init_r`` everywhere to ``target_r`` on average."""

    Options = AdaLoRAOptions
    decomposes = False
    summary = "AdaLoRA: SVD-shaped update whose ranks move to where the loss is sensitive"
    paper = "Zhang et al., 2023 (arXiv 2303.10512)"
    trains_more_than_pair = True
    pair: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    _steps: int | None = None
    _masked = False  # whether the step under way ends with a mask

    def ranks(self, layers: Sequence[Layer], findings: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """``init_r`` everywhere."""
        return {layer.name: self.options.init_r for layer in layers}

    def scaling(self) -> float:
        """s = α/init_r, as PEFT computes it; it stays when ranks fall."""
        return (self.options.alpha or self.options.init_r) / (self.options.init_r + _EPSILON)

    def initialise(
        self,
        layer: Layer,
        weight: torch.Tensor,
        rank: int,
        statistics: Statistics | None,
        finding: Mapping[str, Any],
    ) -> AdapterInit:
        """P and Q from N(0, 0.02²), Λ = 0 (PEFT's and the reference's choice), seeded by run and layer."""
        generator = torch.Generator().manual_seed(seed_for("adalora", self.seed, layer.name))
        A = 0.02 * torch.randn(rank, layer.in_features, generator=generator)
        B = 0.02 * torch.randn(layer.out_features, rank, generator=generator)
        return AdapterInit(A, B, residual=False, extra={"lora_E": torch.zeros(rank, 1)})

    def set_steps(self, steps: int) -> None:
        """Fix the schedule of allocations.

        Raises:
            UserError: ``tinit`` and ``tfinal`` leave no step between them.
        """
        tinit, tfinal = self._phases(steps)
        if tinit + tfinal >= steps:
            raise UserError(
                f"method.tinit: {tinit} and method.tfinal: {tfinal} given; together less than the {steps} steps of "
                "training, so that ranks are allocated in between"
            )
        self._steps = steps

    def adapter_config(self, ranks: Mapping[str, int], base_model: str | None = None) -> "PeftConfig":
        """PEFT's AdaLoRA configuration; outside training its schedule means nothing."""
        from peft import AdaLoraConfig

        options = self.options
        tinit, tfinal = self._phases(self._steps or 10)
        return AdaLoraConfig(
            init_r=options.init_r,
            target_r=options.target_r,
            lora_alpha=options.alpha or options.init_r,
            target_modules=sorted(ranks),
            tinit=tinit,
            tfinal=tfinal,
            deltaT=options.deltaT,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orth_reg_weight,
            total_step=self._steps or tinit + tfinal + 1,
            base_model_name_or_path=base_model,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """PEFT's AdaLoRA layers.

        Raises:
            UserError: the model is in fp16, where gradients carry a loss scale and may be infinite.
        """
        if next(model.parameters()).dtype == torch.float16:
            raise UserError(
                "model.dtype: float16 given; adalora judges by gradients without a loss scale; use bfloat16"
            )
        attached = super().attach(model, ranks)
        # PEFT keeps r as a parameter; moving it to the base's dtype makes it a trainable one.
        for name, parameter in attached.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)
        return attached

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """``orth_reg_weight`` · mean over all P and Q of ‖PᵀP − I‖_F, ‖QQᵀ − I‖_F.

        The norm is not squared, as in PEFT and the reference code; in the paper (Eq. 4) it is.
        """
        if self.options.orth_reg_weight == 0:
            return None
        distances = []
        for name, parameter in _trained(model):
            if "lora_E" in name:
                continue
            with gathered([parameter]):
                whole = parameter.clone()  # what the backward pass reads must outlive ZeRO-3's partitioning
            gram = whole.T @ whole if "lora_B" in name else whole @ whole.T
            distances.append(torch.linalg.matrix_norm((gram - torch.eye(len(gram), device=gram.device)).float()))
        return self.options.orth_reg_weight * torch.stack(distances).mean()

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        """PEFT's allocator sees weights and gradients, and decides at allocation steps which triplets stay."""
        config = _config(model)
        if step > config.total_step - config.tfinal:  # the last allocation holds
            self._masked = True
            return
        before = config.rank_pattern
        # What it masks here is lost with the optimiser's step, which starts from fp32 masters; see `after_step`.
        with gathered([parameter for _, parameter in _trained(model)]):
            model.base_model.update_and_allocate(step)
        self._masked = config.rank_pattern is not before

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Set Λ of the triplets that were not kept to zero."""
        if not self._masked:
            return
        kept = _config(model).rank_pattern
        for name, parameter in _trained(model):
            if "lora_E" in name:
                value = read_trained(parameter)
                value[~torch.tensor(kept[name], device=value.device)] = 0.0
                write_trained(parameter, value)

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The allocator's running averages and what it keeps, by parameter name."""
        allocator = model.base_model.rankallocator
        averages = {f"{key}/{name}": value for key in AVERAGES for name, value in getattr(allocator, key).items()}
        kept = {f"{KEPT}/{name}": torch.tensor(v) for name, v in (_config(model).rank_pattern or {}).items()}
        return averages | kept

    def load_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        allocator, config = model.base_model.rankallocator, _config(model)
        devices = {name: parameter.device for name, parameter in _trained(model)}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == KEPT:
                config.rank_pattern = {**(config.rank_pattern or {}), name: value.tolist()}
            else:
                getattr(allocator, kind)[name] = value.to(devices[name])
                allocator.ipt[name] = torch.zeros_like(value)  # PEFT takes a name without one for new

    def update(self, tensors: Mapping[str, torch.Tensor], subtracted: LowRank | None) -> Update:
        """ΔW = s·P·Λ·Q without the triplets whose Λ is zero: a LoRA of the rank that is left, with A = Λ·Q."""
        kept = tensors["lora_E"].flatten() != 0
        A = (tensors["lora_E"] * tensors["lora_A"])[kept]
        return self.delta(LowRank(tensors["lora_B"][:, kept], A, self.scaling()), subtracted)

    def singular_vectors(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """P and Qᵀ, masked triplets among them: the penalty is on all."""
        return tensors["lora_B"], tensors["lora_A"].T

    def _phases(self, steps: int) -> tuple[int, int]:
        """``tinit`` and ``tfinal``, for a run of ``steps`` where they are not given."""
        tinit = self.options.tinit or max(1, steps // 10)
        return tinit, 3 * steps // 10 if self.options.tfinal is None else self.options.tfinal


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """P, Λ and Q of every layer, by the names that PEFT's allocator uses: those inside the base model."""
    peft_model = model.module if hasattr(model, "module") else model
    for name, parameter in peft_model.base_model.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _config(model: nn.Module) -> Any:
    return model.base_model.peft_config[model.base_model.trainable_adapter_name]
