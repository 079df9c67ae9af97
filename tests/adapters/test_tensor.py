"""FLoRA and LoRA on convolutions: the layers against the merged weight, and whole models."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.adapters import tensor
from harness.adapters.tensor_forms import Reshaped, Tucker, parameter_count
from harness.adapters.tensor_layers import TensorLayer
from harness.errors import UserError
from harness.models.targets import layer_of

GENERATOR = torch.Generator().manual_seed(0)


def make(kind: str, into: int, out: int, kernel: Any, **options: Any) -> nn.Module:
    return {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}[kind](into, out, kernel, **options)


# (layer, spatial size of its input): every stride, padding, dilation, group and padding mode that torch has.
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(24, 40), (7,)),
    "linear, no bias": (nn.Linear(40, 24, bias=False), (2, 3)),
    "linear of a vector": (nn.Linear(24, 10), ()),
    "1d": (make("1d", 8, 12, 3), (17,)),
    "1d stride": (make("1d", 8, 12, 4, stride=3, padding=2), (17,)),
    "1d dilation": (make("1d", 12, 8, 3, dilation=4, padding=4, bias=False), (17,)),
    "1d same": (make("1d", 8, 12, 4, padding="same", dilation=2), (17,)),
    "1d depthwise, causal": (make("1d", 16, 16, 4, groups=16, padding=3), (9,)),
    "1d circular": (make("1d", 8, 12, 5, padding=2, padding_mode="circular"), (17,)),
    "2d": (make("2d", 8, 12, 3), (9, 11)),
    "2d 1x1": (make("2d", 8, 12, 1), (5, 6)),
    "2d stem": (make("2d", 3, 16, 4, stride=4), (16, 12)),
    "2d not square": (make("2d", 8, 12, (1, 7), padding=(0, 3)), (9, 11)),
    "2d stride, dilation": (make("2d", 8, 12, (3, 5), stride=(2, 1), dilation=(1, 2), padding=(1, 4)), (9, 11)),
    "2d same": (make("2d", 8, 12, (2, 3), padding="same"), (9, 11)),
    "2d valid": (make("2d", 8, 12, 3, padding="valid"), (9, 11)),
    "2d groups": (make("2d", 12, 18, 3, groups=3, stride=2, padding=1), (9, 11)),
    "2d groups, more out": (make("2d", 6, 24, (3, 2), groups=2, dilation=2), (9, 11)),
    "2d depthwise": (make("2d", 16, 16, 7, groups=16, padding=3), (9, 11)),
    "2d depthwise, multiplier": (make("2d", 6, 18, 3, groups=6, padding=1, bias=False), (9, 11)),
    "2d reflect": (make("2d", 8, 12, 3, padding=(2, 1), padding_mode="reflect", stride=2), (9, 11)),
    "2d replicate, groups": (make("2d", 8, 12, 3, padding=1, padding_mode="replicate", groups=4), (9, 11)),
    "2d circular same": (make("2d", 8, 12, (2, 5), padding="same", padding_mode="circular"), (9, 11)),
    "3d": (make("3d", 4, 6, (3, 2, 3), stride=(1, 2, 1), padding=1), (5, 6, 5)),
    "3d groups, dilation": (make("3d", 4, 6, 2, groups=2, dilation=(1, 2, 1), bias=False), (5, 6, 5)),
    "3d depthwise": (make("3d", 4, 8, 3, groups=4, padding="same"), (5, 6, 5)),
    "3d replicate": (make("3d", 4, 6, 3, padding=1, padding_mode="replicate"), (5, 6, 5)),
}
FORMS: dict[str, dict[str, Any]] = {
    "flora": {"rank": 4, "kernel_rank": None, "scale": 1.0},
    "flora, ranks, scale": {"rank": (5, 3), "scale": 0.3, "init": "reference"},
    "lora_conv": {"rank": 3, "scale": 2.0, "method": "lora_conv"},
    "lora_conv, axes": {"rank": 3, "method": "lora_conv", "layout": "axes"},
}


def attached(layer: nn.Module, form: str) -> nn.Sequential:
    """A model of one layer with an adapter that has moved; float64."""
    model = nn.Sequential(copy.deepcopy(layer).double())
    tensor.attach(model, **FORMS[form])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=GENERATOR, dtype=torch.float64)
    return model


def example(layer: nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    """An input of three rows with an outlier channel."""
    if isinstance(layer, nn.Linear):
        x = torch.randn(*((3, *size) if size else ()), layer.in_features, generator=GENERATOR, dtype=torch.float64)
        x[..., 1] *= 60
    else:
        x = torch.randn(3, layer.in_channels, *size, generator=GENERATOR, dtype=torch.float64)
        x[:, 1] *= 60
    return x


def direct_delta(layer: nn.Module, model: nn.Module, form: str) -> torch.Tensor:
    """ΔW from the tensors by einsum (Eq. 5, Eq. 3), in float64, not by the harness's code."""
    own = next(iter(tensor.adapted_layers(model).values())).tensors("default")
    tensors = {name.split(".")[0]: value.detach() for name, value in own.items()}
    A, B, scale = tensors["lora_A"], tensors["lora_B"], FORMS[form].get("scale", 1.0)
    if "lora_core" not in tensors:
        rank = A.shape[0]
        matrix = B.reshape(-1, rank) @ A.reshape(rank, -1)
        if "axes" not in form:
            return scale * matrix.reshape(layer.weight.shape)
        kernel = layer.weight.shape[2:]
        half = len(kernel) // 2
        blocks = matrix.reshape(layer.weight.shape[0], *kernel[:half], layer.weight.shape[1], *kernel[half:])
        letters = "xyz"[: len(kernel)]
        return scale * torch.einsum(f"o{letters[:half]}i{letters[half:]}->oi{letters}", blocks)
    kernels = [tensors[f"lora_kernel_{i}"] for i in range(layer.weight.dim() - 2)]
    inner, outer = "abc"[: len(kernels)], "xyz"[: len(kernels)]
    terms = "".join(f",{x}{a}" for x, a in zip(outer, inner, strict=True))
    equation = f"pq{inner},op,qi{terms}->oi{outer}"
    return scale * torch.einsum(equation, tensors["lora_core"], B, A, *kernels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_factored_path_is_the_merged_weight(case: str, form: str) -> None:
    """In float64 to rounding, in fp32 to 1e-5 of the output; gradients of the input and of every factor as well."""
    layer, size = CASES[case]
    layer = copy.deepcopy(layer).double()
    model, x = attached(layer, form), example(layer, size)
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        delta = direct_delta(layer, model, form)
        assert delta.abs().max() > 1e-3
        merged.weight += delta
    live = model(x)
    expected = merged(x)
    assert (live - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert (live - layer(x)).abs().max() > 1e-3  # the adapter has moved
    if not isinstance(layer, nn.Linear):  # without a batch axis
        assert torch.allclose(model(x[0]), merged(x[0]), rtol=1e-9, atol=1e-9)

    single, ours = copy.deepcopy(merged).float(), model.float()
    error = (ours(x.float()) - single(x.float())).abs().max()
    assert error <= 1e-5 * expected.abs().max()

    tensor.merge(ours)
    assert (ours(x.float()) - single(x.float())).abs().max() <= 1e-6 * expected.abs().max()
    tensor.unmerge(ours)
    restored = ours[0].get_base_layer().weight.double()
    assert (restored - layer.weight).abs().max() <= 1e-5 * layer.weight.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["linear", "1d depthwise, causal", "2d groups", "2d same", "3d"])
def test_gradients_are_those_of_the_merged_weight(case: str, form: str) -> None:
    layer, size = CASES[case]
    layer = copy.deepcopy(layer).double()
    model, x = attached(layer, form), example(layer, size).requires_grad_()
    adapted = model[0]
    assert isinstance(adapted, TensorLayer)
    weight = torch.randn(model(x).shape, generator=GENERATOR, dtype=torch.float64)
    parameters = [x, *adapted.tensors("default").values()]
    found = torch.autograd.grad((model(x) * weight).sum(), parameters)
    whole = layer.weight.detach() + adapted.get_delta_weight("default")
    bias = layer.bias
    direct = F.linear(x, whole, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, whole, bias)
    expected = torch.autograd.grad((direct * weight).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_step_0_is_exact_and_only_the_adapter_learns(case: str, form: str) -> None:
    layer, size = CASES[case]
    model, x = nn.Sequential(copy.deepcopy(layer)), example(layer, size).float()
    before = model(x)
    tensor.attach(model, **FORMS[form])
    assert torch.equal(model(x), before)
    adapted = model[0]
    assert isinstance(adapted, TensorLayer)
    own = {id(parameter) for parameter in adapted.tensors("default").values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == own
    model(x).square().sum().backward()
    reached = {name for name, parameter in adapted.tensors("default").items() if parameter.grad.any()}
    assert reached == ({"lora_core.weight"} if form.startswith("flora") else {"lora_B.weight"})
    with tensor.disabled(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(model(x), before)
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == own


def test_no_delta_is_formed_in_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation of a pass, forwards or backwards, gives a tensor of the size of ΔW."""
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in tree_leaves(result) if isinstance(part, torch.Tensor))
            return result

    model = nn.Sequential(nn.Conv2d(32, 48, 5, padding=2))
    tensor.attach(model, rank=4)
    monkeypatch.setattr(TensorLayer, "get_delta_weight", lambda *_: pytest.fail("ΔW was formed"))
    size, x = model[0].get_base_layer().weight.numel(), torch.randn(1, 32, 6, 6, requires_grad=True)
    with Sizes():
        model(x).sum().backward()
    assert 0 < max(sizes) < size
    tensor.remove(model)
    tensor.attach(model, rank=4, method="lora_conv")  # which does form it
    with Sizes():
        model(x).sum().backward()
    assert size in sizes


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "into", "k", "n", "r", "r3"), [
    (12, 8, 3, 2, 4, 2), (16, 16, 7, 2, 8, 1), (12, 8, 5, 1, 4, 3), (6, 4, 3, 3, 2, 2), (40, 24, 1, 0, 8, None),
])  # fmt: skip
def test_parameter_counts_are_the_papers(out: int, into: int, k: int, n: int, r: int, r3: int | None) -> None:
    layer = make(f"{n}d", into, out, k) if n else nn.Linear(into, out)
    model = nn.Sequential(layer)
    tensor.attach(model, rank=r, kernel_rank=r3)
    expected = (r3 or 1) ** n * r**2 + r * (into + out) + n * (r3 or 0) * k
    assert tensor.parameter_counts(model) == {"0": expected}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    shape = layer_of("", layer)
    assert parameter_count(Tucker(r, r3), shape) == expected
    if n in (0, 2):  # LoRA on convolutions: r·k·(d_in + d_out)
        assert parameter_count(Reshaped(2), shape) == 2 * max(1, k) * (into + out)


def test_ranks_end_at_the_size_of_their_mode() -> None:
    form = Tucker(16, 2)
    assert form.ranks(layer_of("", nn.Conv2d(3, 8, 4))) == (8, 3, 2, 2)
    assert form.ranks(layer_of("", nn.Conv2d(32, 32, (1, 7)))) == (16, 16, 1, 2)
    assert form.ranks(layer_of("", nn.Conv2d(32, 32, 7, groups=32))) == (4, 1, 2, 2)
    assert form.ranks(layer_of("", nn.Linear(64, 10))) == (10, 16)
    assert Tucker((3, 20), 7).ranks(layer_of("", nn.Conv1d(32, 32, 5))) == (3, 20, 5)
    assert Tucker(4).ranks(layer_of("", nn.Conv3d(8, 8, (1, 2, 3)))) == (4, 4, 1, 2, 2)


def test_factors_are_gaussian_of_the_said_width() -> None:
    layer = layer_of("", nn.Conv2d(400, 600, 7))
    for init, expected in (("fan_in", (400**-0.5, 50**-0.5)), ("reference", (100**-0.5, 100**-0.5))):
        start = Tucker(50, 2, init).start(layer, torch.Generator().manual_seed(0))
        assert not start["lora_core.weight"].any()
        found = [float(start[f"lora_{side}.weight"].std()) for side in ("A", "B")]
        assert found == pytest.approx(expected, rel=0.03)
    depthwise = Tucker(8).start(layer_of("", nn.Conv2d(32, 32, 7, groups=32)), torch.Generator())
    assert torch.equal(depthwise["lora_A.weight"], torch.ones(1, 1))


# -- whole models ----------------------------------------------------------------------------------


def convnext() -> tuple[nn.Module, torch.Tensor]:
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    config = ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32, num_labels=5)
    return ConvNextV2ForImageClassification(config), torch.randn(2, 3, 32, 32)


def vit() -> tuple[nn.Module, torch.Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    return ViTForImageClassification(config), torch.randn(2, 3, 16, 16)


class UNet(nn.Module):
    """A model from nowhere: two levels, a transposed convolution, torch's own attention, one convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1))
        self.middle = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.again = nn.Sequential(nn.ReLU(), self.middle)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.down[1](self.down[0](x))
        low = self.again(self.middle(self.down[2](high)))
        tokens = low.flatten(2).mT
        low = low + self.attention(tokens, tokens, tokens)[0].mT.reshape(low.shape)
        return self.head(torch.cat([high, self.up(low)], dim=1))


def unet() -> tuple[nn.Module, torch.Tensor]:
    return UNet(), torch.randn(2, 1, 8, 8)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("method", ["flora", "lora_conv"])
@pytest.mark.parametrize("build", [convnext, vit, unet])
def test_whole_models(build: Any, method: Any, tmp_path: Path) -> None:
    """Step 0, training with a head, merging, saving, loading into a second copy, removing."""
    torch.manual_seed(0)
    model, x = build()
    model.eval()
    original, before = copy.deepcopy(model), output(model, x)
    kind, names = type(model), {name for name, _ in model.named_modules()}
    head = "head" if isinstance(model, UNet) else "classifier"
    tensor.attach(model, rank=4, method=method, also_train=[head])
    assert type(model) is kind
    assert torch.allclose(output(model, x), before, atol=1e-6)  # frozen, torch's attention takes another path
    layers = tensor.adapted_layers(model)
    assert not any(name.startswith(head) for name in layers)
    wanted = {
        n for n, m in original.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and not n.startswith(head)
    }
    assert layers.keys() == {name for name in wanted if not name.startswith("attention.out")}

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(6):
        loss = (output(model, x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())
    trained = output(model, x)
    assert (trained - before).abs().max() > 1e-3

    tensor.save(model, tmp_path)
    second = tensor.load(copy.deepcopy(original), tmp_path)
    assert torch.equal(output(second, x), trained)
    assert {n for n, p in second.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }

    scale = trained.abs().max()
    tensor.merge(model)
    assert (output(model, x) - trained).abs().max() <= 1e-5 * scale
    tensor.unmerge(model)
    assert (output(model, x) - trained).abs().max() <= 1e-5 * scale
    tensor.merge(model)
    tensor.remove(model)
    assert {name for name, _ in model.named_modules()} == names
    assert not tensor.adapted_layers(model)
    assert (output(model, x) - trained).abs().max() <= 1e-5 * scale
    tensor.remove(second)
    with torch.no_grad():
        getattr(second, head).load_state_dict(getattr(original, head).state_dict())
    assert torch.allclose(output(second, x), before, atol=1e-6)


def test_a_layer_that_is_used_twice_is_adapted_in_both_places() -> None:
    model, _ = unet()
    assert isinstance(model, UNet)
    tensor.attach(model, rank=2)
    assert model.again[1] is model.middle
    assert isinstance(model.middle, TensorLayer)
    assert isinstance(model.up, nn.ConvTranspose2d)  # no form for it
    assert isinstance(model.attention.out_proj, nn.Linear)  # torch's attention reads its weight
    tensor.remove(model)
    assert model.again[1] is model.middle


def test_targets() -> None:
    model, _ = convnext()
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for targets, expected in (
        ("all-conv", convolutions),
        (["dwconv"], {name for name in convolutions if name.endswith("dwconv")}),
        (["classifier"], {"classifier"}),
    ):
        tensor.attach(model, rank=2, target_modules=targets)
        assert tensor.adapted_layers(model).keys() == expected
        tensor.remove(model)


def test_seed_and_name_decide_the_start() -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        model = tensor.attach(unet()[0], rank=2, seed=seed)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    one, again, other = start(0), start(0), start(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["middle.lora_B.default.weight"], other["middle.lora_B.default.weight"])
    assert not torch.equal(one["middle.lora_B.default.weight"], one["down.2.lora_B.default.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_rank": 4}, r"^kernel_rank: 4 given; allowed: at most 3, the largest kernel$"),
        ({"kernel_rank": 2, "target_modules": ["head"]}, r"^kernel_rank: 2 given; allowed: at most 1"),
        ({"target_modules": ["up"]}, r"^target_modules: 'up' matches no linear layer or convolution .* allowed: all, "),
        ({"target_modules": "every"}, r"^target_modules: 'every' given; allowed: all, all-linear, all-conv"),
        ({"target_modules": "all-linear"}, r"^target_modules: 'all-linear' given; the model has no such layer"),
        ({"also_train": ["haed"]}, r"^also_train: 'haed' is no module of the model$"),
        ({"scale": -1.0}, r"^scale: -1.0 given; allowed: a positive number$"),
        ({"scale": math.nan}, r"^scale: nan given"),
        ({"method": "lora_conv", "kernel_rank": 2}, r"^rank: lora_conv has one rank"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model, x = unet()
    before = model(x)
    with pytest.raises(UserError, match=message):
        tensor.attach(model, **options)
    assert torch.equal(model(x), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_kernel_rank_above_a_linear_layer() -> None:
    with pytest.raises(UserError, match=r"^kernel_rank: 2 given; allowed: none: the target layers have no kernel$"):
        tensor.attach(nn.Sequential(nn.Linear(4, 4)), kernel_rank=2)
    with pytest.raises(UserError, match=r"^adapter: the model has one already"):
        tensor.attach(tensor.attach(nn.Sequential(nn.Linear(4, 4)), rank=2), rank=2)


def test_a_convolution_that_pads_by_itself_is_left_alone() -> None:
    """Beside its own forward an adapter would see another input."""

    class Causal(nn.Conv1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.pad(x, (2, 0)))

    model = nn.Sequential(Causal(4, 4, 3), nn.Conv1d(4, 4, 3))
    assert tensor.adapted_layers(tensor.attach(model, rank=2)).keys() == {"1"}


def test_loading_what_does_not_fit(tmp_path: Path) -> None:
    model, _ = unet()
    tensor.save(tensor.attach(model, rank=2, target_modules=["middle"]), tmp_path)
    with pytest.raises(UserError, match=r"^adapter: .* is for a layer 'middle', which the model does not have$"):
        tensor.load(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    other, _ = unet()
    assert isinstance(other, UNet)
    other.middle = nn.Conv2d(8, 12, 3)
    with pytest.raises(UserError, match=r"has \(8, 2\) middle\.lora_B\.weight, the model's layer needs \(12, 2\)$"):
        tensor.load(other, tmp_path)
    with pytest.raises(UserError, match=r"^adapter: .* has no adapter_config\.json"):
        tensor.load(other, tmp_path / "nothing")
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | {"peft_type": "LOHA"}))
    with pytest.raises(UserError, match=r"^adapter: peft_type 'LOHA' given; allowed: FLORA, LORA_CONV$"):
        tensor.load(unet()[0], tmp_path)
    with pytest.raises(UserError, match=r"^adapter: the model has none"):
        tensor.save(unet()[0], tmp_path)


def test_several_adapters_by_pefts_own_calls() -> None:
    """A second adapter, switching, deleting, half precision: PEFT's protocol on a PEFT model."""
    from peft import LoraConfig, get_peft_model

    from harness.adapters.tensor_layers import custom_modules

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"])
    config._register_custom_module(custom_modules(Tucker(4)))
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 5))
    model = get_peft_model(plain, config)
    x = torch.randn(1, 1, 8, 8)
    layer = model.base_model.model[2]
    assert isinstance(layer, TensorLayer)
    assert layer.scaling["default"] == 2
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_core" in name:
                parameter += 0.5 if "other" in name else -0.2
    one = model(x)
    model.set_adapter("other")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    two = model(x)
    assert not torch.allclose(one, two)
    model.set_adapter("default")
    assert torch.equal(model(x), one)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(merged(x), one, atol=1e-5)

    half = tensor.attach(nn.Sequential(nn.Conv2d(4, 4, 3)).bfloat16(), rank=2)
    half[0].lora_core.default.weight.data.normal_()
    assert half(torch.randn(1, 4, 5, 5).bfloat16()).dtype == torch.bfloat16


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`docs/flora.md` with a model that is not from transformers."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "flora.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(2, 1, 8, 8), torch.randint(2, (2, 8, 8))) for _ in range(2)]
    names: dict[str, Any] = {"batches": batches}
    exec(compile(code, "docs/flora.md", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not tensor.adapted_layers(names["model"])
