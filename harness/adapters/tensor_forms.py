"""Two forms of the update of a weight of any order: Tucker (FLoRA) and a reshaped matrix (LoRA on convolutions).

A form says which tensors it has for a layer, what they are at step 0 and which ΔW they stand for. Weights are as torch
has them: (out, in) for a linear layer, (out, in/groups, k₁, …, k_n) for a convolution; groups share what does not
concern outputs. Tensors go by the names under which adapters are saved.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from harness.decomposition.tucker import tucker_product
from harness.errors import UserError
from harness.files import write_json, write_tensors
from harness.methods.base import LowRank, Update
from harness.models.targets import Layer

INPUTS, CORE, OUTPUTS = "lora_A.weight", "lora_core.weight", "lora_B.weight"
KERNEL_AXES = 3  # of a Conv3d; no layer has more
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Init = Literal["fan_in", "reference"]
Layout = Literal["reshape", "axes"]


def kernel_factor(axis: int) -> str:
    """The name of the factor of kernel axis ``axis``, from 0."""
    return f"lora_kernel_{axis}.weight"


class Form(Protocol):
    """What the layers and the methods must know of a form."""

    @property
    def name(self) -> str:
        """``flora`` or ``lora_conv``."""
        ...

    def check(self, layers: Sequence[Layer], key: str) -> None:
        """Raise `UserError` where the options suit none of the layers; ``key``: where they were given."""
        ...

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a layer, by name."""
        ...

    def start(self, layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The tensors of a layer at step 0, fp32; they stand for ΔW = 0."""
        ...

    def delta(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """ΔW without the scale, in the shape of the weight."""
        ...


@dataclass(frozen=True)
class Tucker:
    """ΔW = G ×₁ A ×₂ B ×₃ C … (Eq. 5): ``lora_core`` G, ``lora_B`` A (out, r₁), ``lora_A`` Bᵀ (r₂, in/groups),
    ``lora_kernel_i`` C, D, … (k_i, r₃). For a linear layer ΔW = A G Bᵀ (Eq. 6).

    Attributes:
        rank: r₁ = r₂, or (r₁, r₂): of the outputs and of the inputs.
        kernel_rank: r₃ of every kernel axis; 2 where it is not given.
        init: standard deviations of the Gaussian factors. ``fan_in``: 1/√in for B, 1/√r₁ for A and 1/√r₃ for the kernel
            factors, so that each leaves the size of what passes through it as it is. ``reference``: 1/√(2·r_n) for all
            of them, as in the authors' code (the paper says "Gaussian" only).
    """

    rank: int | tuple[int, int] = 16
    kernel_rank: int | None = None
    init: Init = "fan_in"

    name = "flora"

    def ranks(self, layer: Layer) -> tuple[int, ...]:
        """(r₁, r₂, r₃, …), none larger than the mode that it is of.

        Every group runs the core by itself, so that with groups r₁ above r₂·r₃ⁿ would add nothing to what ΔW can be: it
        ends there (a depthwise convolution has r₂ = 1).
        """
        outputs, inputs = (self.rank, self.rank) if isinstance(self.rank, int) else self.rank
        kernel = tuple(min(self.kernel_rank or 2, size) for size in layer.kernel)
        inputs = min(inputs, layer.in_features)
        outputs = min(outputs, layer.out_features)
        if layer.groups > 1:
            outputs = min(outputs, inputs * math.prod(kernel))
        return outputs, inputs, *kernel

    def check(self, layers: Sequence[Layer], key: str) -> None:
        """r₃ must fit some kernel axis of some layer; where it is larger than another, that axis has its full rank."""
        largest = max((size for layer in layers for size in layer.kernel), default=0)
        if self.kernel_rank is not None and self.kernel_rank > largest:
            allowed = f"at most {largest}, the largest kernel" if largest else "none: the target layers have no kernel"
            raise UserError(f"{key}: {self.kernel_rank} given; allowed: {allowed}")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Core, factors of inputs and outputs, one factor for each kernel axis."""
        outputs, inputs, *kernel = self.ranks(layer)
        axes = zip(layer.kernel, kernel, strict=True)
        return {
            INPUTS: (inputs, layer.in_features),
            CORE: (outputs, inputs, *kernel),
            OUTPUTS: (layer.out_features, outputs),
            **{kernel_factor(axis): shape for axis, shape in enumerate(axes)},
        }

    def start(self, layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """G zero, factors Gaussian. The factor of a mode of size 1 is a single number, and starts as 1.

        Drawn, it would do nothing but slow some layers down and hurry others.
        """
        tensors = {}
        for name, shape in self.shapes(layer).items():
            if name == CORE:
                tensors[name] = torch.zeros(shape)
                continue
            rank = shape[0] if name == INPUTS else shape[1]
            mode = shape[1] if name == INPUTS else shape[0]
            deviation = (2 * rank if self.init == "reference" else shape[1]) ** -0.5
            tensors[name] = torch.ones(shape) if mode == 1 else deviation * torch.randn(shape, generator=generator)
        return tensors

    def delta(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """G times every factor along its mode."""
        core = tensors[CORE]
        kernel = [tensors[kernel_factor(axis)] for axis in range(core.dim() - 2)]
        return tucker_product(core, [tensors[OUTPUTS], tensors[INPUTS].mT, *kernel])


@dataclass(frozen=True)
class Reshaped:
    """ΔW = Reshape(B·A) (Eq. 3), kernel axes shared out over the sides of the matrix.

    Of n kernel axes the first ⌊n/2⌋ go with the outputs and the others with the inputs: ``lora_B`` (out, k₁, …, r) and
    ``lora_A`` (r, in/groups, …, k_n). For a 2d kernel that is (k·out, r)·(r, k·in/groups), the paper's shapes; a 1d
    kernel goes with the inputs, and of a 3d kernel one axis goes with the outputs. For a linear layer it is LoRA.

    Attributes:
        rank: of the matrix.
        layout: ``reshape``: numbers stay in the order of the matrix in memory (Eq. 3, and Hu et al.'s code). ``axes``:
            a row is an output and kernel row, a column an input and kernel column, in the weight too.
    """

    rank: int = 16
    layout: Layout = "reshape"

    name = "lora_conv"

    def check(self, layers: Sequence[Layer], key: str) -> None:
        """Every option suits every layer."""

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The two sides, each with its kernel axes."""
        rows = len(layer.kernel) // 2
        left, right = (layer.out_features, *layer.kernel[:rows]), (layer.in_features, *layer.kernel[rows:])
        rank = min(self.rank, math.prod(left), math.prod(right))
        return {INPUTS: (rank, *right), OUTPUTS: (*left, rank)}

    def start(self, layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A uniform as torch draws a linear layer of its width (and `lora` its A), B zero."""
        shapes = self.shapes(layer)
        bound = math.prod(shapes[INPUTS][1:]) ** -0.5
        A = torch.empty(shapes[INPUTS]).uniform_(-bound, bound, generator=generator)
        return {INPUTS: A, OUTPUTS: torch.zeros(shapes[OUTPUTS])}

    def delta(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """B·A in the shape of the weight."""
        return self.placed(torch.tensordot(tensors[OUTPUTS], tensors[INPUTS], dims=1))

    def placed(self, product: torch.Tensor) -> torch.Tensor:
        """B·A, (out, first kernel axes, in/groups, other kernel axes), in the shape of the weight."""
        inputs = 1 + (product.dim() - 2) // 2
        moved = product.movedim(inputs, 1)
        return moved if self.layout == "axes" else product.reshape(moved.shape)


@dataclass(frozen=True)
class TensorUpdate:
    """ΔW = s·(a form's tensors) of a weight of any order."""

    form: Form
    tensors: Mapping[str, torch.Tensor]
    scaling: float

    def dense(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW itself, in the weight's shape and on its device, in the tensors' dtype."""
        tensors = {name: tensor.to(weight.device) for name, tensor in self.tensors.items()}
        return self.scaling * self.form.delta(tensors)


def parameter_count(form: Form, layer: Layer) -> int:
    """How many numbers a form trains for a layer. For Tucker with r₁ = r₂ = r: r₃ⁿr² + r(d_in + d_out) + n·r₃·k."""
    return sum(math.prod(shape) for shape in form.shapes(layer).values())


def write_form(
    folder: Path,
    form: Form,
    scaling: float,
    tensors: Mapping[str, torch.Tensor],
    layers: Sequence[str],
    base_model: str | None = None,
    trained: Sequence[str] = (),
) -> None:
    """Write an adapter of one of these forms: tensors made fp32, and ``adapter_config.json`` for `read_form`.

    ``trained``: parameters of the model itself, by name, that are among ``tensors``.
    """
    write_tensors(folder / WEIGHTS, {name: tensor.float() for name, tensor in tensors.items()}, {"format": "pt"})
    content: dict[str, Any] = {
        "peft_type": form.name.upper(),
        "base_model_name_or_path": base_model,
        "scaling": scaling,
        "target_modules": sorted(layers),
        "trained": sorted(trained),
        **asdict(form),  # type: ignore[call-overload]
    }
    write_json(folder / CONFIG, content)


def write_adapter(
    folder: Path,
    form: Form,
    scaling: float,
    layers: Mapping[str, Mapping[str, torch.Tensor]],
    updates: Mapping[str, Update],
    base_model: str,
) -> None:
    """A plain LoRA where every update has factors; with convolutions among the layers the form's own tensors.

    Args:
        layers: tensors by layer and name.
    """
    from harness.adapters import lora  # PEFT takes seconds that checking a configuration should not pay

    factors = {name: update for name, update in updates.items() if isinstance(update, LowRank)}
    if len(factors) == len(updates):
        lora.write_adapter(folder, factors, base_model)
        return
    named = {f"{layer}.{name}": tensor for layer, own in layers.items() for name, tensor in own.items()}
    write_form(folder, form, scaling, named, list(layers), base_model)


def read_form(content: Mapping[str, Any]) -> Form:
    """The form of an ``adapter_config.json`` that `write_form` wrote.

    Raises:
        UserError: it is an adapter of another kind.
    """
    for cls in (Tucker, Reshaped):
        if content.get("peft_type") == cls.name.upper():
            options = {key: content[key] for key in cls.__dataclass_fields__}
            if isinstance(options["rank"], list):
                options["rank"] = tuple(options["rank"])
            return cls(**options)
    raise UserError(f"adapter: peft_type {content.get('peft_type')!r} given; allowed: FLORA, LORA_CONV")
