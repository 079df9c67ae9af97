"""Layers that add an update of a form in `tensor_forms` to a linear layer or a convolution, in PEFT's protocol.

PEFT switches adapters on, off and over, and freezes what is not trained; these layers only compute. No forward pass of
the Tucker layer forms ΔW. Every trained tensor is a module of its own that is called where it is used, so that ZeRO-3
gathers it there.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from harness.adapters.tensor_forms import CORE, INPUTS, KERNEL_AXES, OUTPUTS, Form, Reshaped, Tucker, kernel_factor
from harness.decomposition.tucker import mode_product
from harness.models.targets import CONVOLUTIONS, layer_of

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Factor(nn.Module):
    """A trained tensor; `forward` says what for."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class Pointwise(Factor):
    """A convolution (batch, in, …) → (batch, out, …) whose kernel has size one.

    ``weight`` is (out, in/groups), or (out/groups, in/groups) where all groups ``share`` it. With groups it is a
    product of matrices: torch's convolutions are slow where a group has few channels.
    """

    def __init__(self, rows: int, columns: int, groups: int = 1, share: bool = False) -> None:
        super().__init__(rows, columns)
        self.groups, self.share = groups, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, *positions = x.shape
        if self.groups == 1:
            return _CONVOLVE[len(positions)](x, self.weight.reshape(*self.weight.shape, *[1] * len(positions)))
        weight = self.weight if self.share else self.weight.reshape(self.groups, -1, self.weight.shape[1])
        parts = x.reshape(batch, self.groups, channels // self.groups, -1)
        return (weight @ parts).reshape(batch, -1, *positions)


class KernelFactor(Factor):
    """The product of a tensor with ``weight`` (k, r₃) along one mode."""

    def forward(self, tensor: torch.Tensor, mode: int) -> torch.Tensor:
        return mode_product(tensor, self.weight, mode)


class Convolved(Factor):
    """A convolution whose kernel is made from ``weight``."""

    def forward(
        self,
        x: torch.Tensor,
        kernel: Callable[[torch.Tensor], torch.Tensor],
        convolve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        return convolve(x, kernel(self.weight))


class Rows(Factor):
    """B·A for ``weight`` B (…, r) and a given A (r, …)."""

    def forward(self, A: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(self.weight, A, dims=1)


class TensorLayer(nn.Module, LoraLayer):
    """A layer with adapters of a form; PEFT's protocol. Subclasses build the modules and compute with them."""

    adapter_layer_names = (
        *LoraLayer.adapter_layer_names,
        "lora_core",
        *(f"lora_kernel_{axis}" for axis in range(KERNEL_AXES)),
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        form: Form,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        for name in self.adapter_layer_names:
            if not hasattr(self, name):
                setattr(self, name, nn.ModuleDict())
        self.form = form
        self.layer = layer_of("", self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @abstractmethod
    def build(self) -> dict[str, nn.Module]:
        """A module for every tensor of the form, by the tensor's name."""

    @abstractmethod
    def change(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the layer's output for the input ``x``, scaled."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; s = lora_alpha/r, tensors at step 0 (drawn by torch's global generator)."""
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.use_rslora[adapter_name] = self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        start = self.form.start(self.layer, torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
        for name, module in self.build().items():
            with torch.no_grad():
                module.weight.copy_(start[name])
            getattr(self, name.partition(".")[0])[adapter_name] = module
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the names of the form."""
        return {name: getattr(self, name.partition(".")[0])[adapter].weight for name in self.form.shapes(self.layer)}

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW, in the weight's shape."""
        return self.scaling[adapter] * self.form.delta(self.tensors(adapter))

    @property
    def weight(self) -> torch.Tensor:
        """W + ΔW, for models that read the weight and never call the layer, as Mamba does with its convolution.

        The base weight alone where adapters are off or merged, or where it is packed.
        """
        weight = self.get_base_layer().weight
        if self.disable_adapters or self.merged:
            return weight
        for adapter in self.active_adapters:
            if adapter in self.lora_A and weight.shape == self.layer.shape:
                weight = weight + self.get_delta_weight(adapter).to(weight.dtype)
        return weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight, where it stays until `unmerge`.

        Raises:
            TypeError: the base weight is quantised.
            ValueError: ``safe_merge``, and the result is not finite.
        """
        weight = self.get_base_layer().weight
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            delta = self.get_delta_weight(adapter)
            if weight.shape != delta.shape:
                raise TypeError(
                    f"a weight of shape {tuple(weight.shape)} is packed; merge into the base before packing"
                )
            if safe_merge and not torch.isfinite(weight + delta).all():
                raise ValueError(f"adapter {adapter!r}: the merged weight is not finite")
            weight += delta.to(weight.dtype)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged ΔW out of the base weight again (up to rounding)."""
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            weight -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                own = self.lora_dropout[adapter](self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype))
                result = result + self.change(adapter, own).to(result.dtype)
        return result


class TuckerLayer(TensorLayer):
    """FLoRA: inputs → r₂ → core → r₁ → outputs. In a convolution the outer two have kernels of size one.

    With groups, each group is a convolution of its own with the same core; the rows of ``lora_B`` are its outputs'.
    """

    form: Tucker

    def build(self) -> dict[str, nn.Module]:
        """Plain linear layers for a linear layer."""
        layer, shapes = self.layer, self.form.shapes(self.layer)
        outputs, inputs = shapes[CORE][:2]
        if not layer.kernel:
            return {
                INPUTS: nn.Linear(layer.in_features, inputs, bias=False),
                CORE: nn.Linear(inputs, outputs, bias=False),
                OUTPUTS: nn.Linear(outputs, layer.out_features, bias=False),
            }
        return {
            INPUTS: Pointwise(inputs, layer.in_features, layer.groups, share=True),
            CORE: Convolved(*shapes[CORE]),
            OUTPUTS: Pointwise(layer.out_features, outputs, layer.groups),
            **{name: KernelFactor(*shapes[name]) for name in map(kernel_factor, range(len(layer.kernel)))},
        }

    def change(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """The factored path; the scale is applied where there is least to multiply."""
        into, core, out = (part[adapter] for part in (self.lora_A, self.lora_core, self.lora_B))
        scaling = self.scaling[adapter]
        if not self.layer.kernel:
            inner = core(into(x))
            return out(inner if scaling == 1 else inner * scaling)

        base, axes, groups = self.get_base_layer(), len(self.layer.kernel), self.layer.groups

        def kernel(weight: torch.Tensor) -> torch.Tensor:
            for axis in range(axes):
                weight = getattr(self, f"lora_kernel_{axis}")[adapter](weight, axis + 2)
            weight = weight if scaling == 1 else weight * scaling
            return weight if groups == 1 else weight.repeat(groups, *[1] * (axes + 1))

        batch = x if x.dim() == axes + 2 else x.unsqueeze(0)
        outer = out(core(into(batch), kernel=kernel, convolve=partial(_convolve_as, base, groups=groups)))
        return outer if x.dim() == axes + 2 else outer.squeeze(0)


class ReshapedLayer(TensorLayer):
    """LoRA on a convolution: ΔW is formed from its two factors at every pass. On a linear layer it is LoRA."""

    form: Reshaped

    def build(self) -> dict[str, nn.Module]:
        """Plain linear layers for a linear layer."""
        shapes = self.form.shapes(self.layer)
        if not self.layer.kernel:
            rank = shapes[INPUTS][0]
            return {
                INPUTS: nn.Linear(self.layer.in_features, rank, bias=False),
                OUTPUTS: nn.Linear(rank, self.layer.out_features, bias=False),
            }
        return {INPUTS: Convolved(*shapes[INPUTS]), OUTPUTS: Rows(*shapes[OUTPUTS])}

    def change(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """A convolution with ΔW beside the layer's own."""
        A, B, scaling = self.lora_A[adapter], self.lora_B[adapter], self.scaling[adapter]
        if not self.layer.kernel:
            inner = A(x)
            return B(inner if scaling == 1 else inner * scaling)
        base = self.get_base_layer()

        def kernel(weight: torch.Tensor) -> torch.Tensor:
            delta = self.form.placed(B(weight))
            return delta if scaling == 1 else delta * scaling

        return A(x, kernel=kernel, convolve=partial(_convolve_as, base, groups=self.layer.groups))


LAYERS: dict[type, type[TensorLayer]] = {Tucker: TuckerLayer, Reshaped: ReshapedLayer}


def custom_modules(form: Form, linear: bool = True) -> dict[type[nn.Module], Callable[..., TensorLayer]]:
    """What PEFT is to put in the place of which layer: for ``LoraConfig._register_custom_module``.

    ``linear`` false: linear layers get PEFT's own.
    """
    replacement = partial(LAYERS[type(form)], form=form)
    return dict.fromkeys((nn.Linear, *CONVOLUTIONS) if linear else CONVOLUTIONS, replacement)


def _convolve_as(base: nn.Module, x: torch.Tensor, kernel: torch.Tensor, groups: int) -> torch.Tensor:
    """A convolution with ``kernel`` that moves and pads as ``base`` does, without its bias."""
    padding = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    return _CONVOLVE[kernel.dim() - 2](x, kernel, None, base.stride, padding, base.dilation, groups)
