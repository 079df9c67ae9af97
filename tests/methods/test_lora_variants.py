"""rsLoRA, LoRA+ and LoRA-FA: LoRA's tensors with another scale, two learning rates, and half of them frozen."""

import math
from typing import Any

import pytest
import torch

from harness.adapters.lora import attach_lora, load_factors, lora_layers, original_model
from harness.config import resolve
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import LowRank
from harness.methods.lora_fa import LoRAFA
from harness.methods.lora_null import LoRANull
from harness.methods.lora_plus import LoRAPlus
from harness.methods.registry import build_method
from harness.methods.rslora import RsLoRA
from harness.models.targets import Layer
from harness.training.checkpoint import trained_parameters
from tests.methods.runs import RANK, base_model, largest, logits, prompts, step_zero

RANKS = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.up_proj": 2}
LAYER = Layer("model.layers.0.mlp.up_proj", 64, 100)


def test_the_same_tensors_as_lora() -> None:
    """So that runs with the same seed differ by the method alone."""
    plain = build_method({"name": "lora", "rank": 8}, 3).initialise(LAYER, torch.zeros(64, 100), 8, None, {})
    for name in ("rslora", "lora_plus", "lora_fa"):
        initial = build_method({"name": name, "rank": 8}, 3).initialise(LAYER, torch.zeros(64, 100), 8, None, {})
        assert torch.equal(initial.A, plain.A)
        assert torch.equal(initial.B, plain.B)


@pytest.mark.parametrize(("rank", "alpha"), [(8, None), (16, 16.0), (64, 4.0)])
def test_rslora_scales_by_the_root_of_the_rank(rank: int, alpha: float | None, base_config: dict[str, Any]) -> None:
    options = RsLoRA.Options(rank=rank) if alpha is None else RsLoRA.Options(rank=rank, alpha=alpha)
    assert RsLoRA(options).scaling() == pytest.approx((alpha or 16.0) / math.sqrt(rank))


def test_rslora_is_exported_as_a_plain_lora(base_config: dict[str, Any]) -> None:
    """lora_alpha = α·√r, and no `use_rslora` for anyone to overlook."""
    _, run = step_zero(base_config, {"name": "rslora", "rank": RANK, "alpha": 16.0}, "scaled")
    content = read_json(run.init / "adapter_config.json")
    assert content["lora_alpha"] / content["r"] == pytest.approx(16.0 / math.sqrt(RANK))
    assert not content["use_rslora"]


def test_lora_plus_groups(base_config: dict[str, Any]) -> None:
    model = attach_lora(base_model(resolve(base_config)), RANKS, 1.0)
    groups = LoRAPlus(LoRAPlus.Options(ratio=4.0)).param_groups(model, 1e-3, 0.1)
    assert [group["lr"] for group in groups] == [1e-3, 4e-3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]
    names = {id(parameter): name for name, parameter in trained_parameters(model)}
    held = [{names[id(parameter)].rsplit(".", 2)[1] for parameter in group["params"]} for group in groups]
    assert held == [{"lora_A"}, {"lora_B"}]
    assert sum(len(group["params"]) for group in groups) == 4 == len(names)
    torch.optim.AdamW(groups, lr=1e-3)  # what the trainer makes of them


def test_lora_plus_first_step(base_config: dict[str, Any]) -> None:
    """Adam's first step is ±lr per entry: B's is λ times A's."""
    model = attach_lora(base_model(resolve(base_config)), RANKS, 1.0)
    generator = torch.Generator().manual_seed(0)
    load_factors(model, {n: LowRank(*random_pair(model, n, generator), 1.0) for n in RANKS})
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(model)}
    optimizer = torch.optim.AdamW(LoRAPlus(LoRAPlus.Options()).param_groups(model, 1e-3, 0.0), lr=1e-3)
    batch = prompts()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.square().mean().backward()
    optimizer.step()
    for name, parameter in trained_parameters(model):
        expected = 1.6e-2 if "lora_B" in name else 1e-3
        moved = (parameter.detach() - before[name]).abs()
        assert float(moved.median()) == pytest.approx(expected, rel=1e-2)


def random_pair(model: Any, name: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    layer = lora_layers(model)[name]
    shapes = (layer.lora_B["default"].weight.shape, layer.lora_A["default"].weight.shape)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_ratio_below_one(base_config: dict[str, Any]) -> None:
    base_config["method"] = {"name": "lora_plus", "ratio": 0.5}
    with pytest.raises(UserError, match=r"^method\.ratio: 0\.5 given; allowed: greater than or equal to 1$"):
        resolve(base_config)


@pytest.mark.parametrize("cls", [LoRAFA, LoRANull], ids=lambda cls: cls.__name__)
def test_frozen_a_stays_frozen(cls: type, base_config: dict[str, Any]) -> None:
    """PEFT makes a whole adapter trainable when it switches to it; the anchor switches at every step."""
    options = cls.Options(freeze_a=True) if cls is LoRANull else cls.Options()
    model = cls(options).attach(base_model(resolve(base_config)), RANKS)
    expected = {f"{name}.lora_B.weight" for name in RANKS}
    assert {name for name, _ in trained_parameters(model)} == expected
    with original_model(model):
        pass
    assert {name for name, _ in trained_parameters(model)} == expected
    batch = prompts()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.square().mean().backward()
    for layer in lora_layers(model).values():
        assert layer.lora_A["default"].weight.grad is None
        assert layer.lora_B["default"].weight.grad.any()


def test_null_space_directions_hardly_answer_to_what_is_preserved(base_config: dict[str, Any]) -> None:
    """A in the null space, B moved by the same amount: outputs on preserved prompts move less than plain LoRA's."""
    from harness.data.collation import collate
    from harness.data.sources import read_examples
    from harness.data.tokenisation import tokenise
    from harness.models.loading import load_tokenizer
    from tests.methods.runs import PAD, live_model, perturb

    moved = {}
    for name, extra in (("lora_fa", {}), ("lora_null", {"freeze_a": True})):
        config, run = step_zero(base_config, {"name": name, "rank": RANK, **extra}, name)
        rows = tokenise(read_examples(config.data.preserve, "data"), load_tokenizer(config.model.path), 64)
        batch = collate(rows[:8], PAD)
        model = live_model(config, run)
        at_start = logits(model, batch)
        # The same length of A's rows in both, so that only their directions differ.
        with torch.no_grad():
            for layer in lora_layers(model).values():
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                norms = A.norm(dim=1)
                layer.get_base_layer().weight += layer.scaling["default"] * B @ A
                A /= norms[:, None]
                B.zero_()
        perturb(model)
        moved[name] = largest(logits(model, batch), at_start)
    assert moved["lora_null"] < 0.5 * moved["lora_fa"]
