"""FLoRA and LoRA on convolutions in the pipeline: language models with and without convolutions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.adapters import tensor
from harness.adapters.lora import lora_layers, original_model, read_adapter, read_layers
from harness.config import RunConfig, resolve
from harness.errors import UserError
from harness.evaluation.candidates import servable
from harness.evaluation.stage import tuned_candidates
from harness.files import read_json
from harness.methods.base import LowRank, Update
from harness.methods.flora import FLoRA, FLoRAOptions
from harness.methods.lora import LoRA, LoRAOptions
from harness.methods.lora_conv import LoRAConv, LoRAConvOptions
from harness.models.targets import Layer, describe, target_modules
from harness.preflight import check
from harness.run_directory import RunDirectory
from harness.stages.export import export
from harness.training.checkpoint import trained_parameters
from tests.export.test_agreement import BOUND, by_peft_alone, by_transformers_alone
from tests.methods.runs import base_model, largest, live_model, logits, perturb, prompts, step_zero, write_checkpoint

FORMS: dict[str, dict[str, Any]] = {
    "flora": {"name": "flora", "rank": 6},
    "flora, ranks, scale": {"name": "flora", "rank": [5, 7], "scale": 0.4, "init": "reference"},
    "lora_conv": {"name": "lora_conv", "rank": 4, "alpha": 6.0},
}


def reads_the_kernel(vocabulary: int) -> Any:
    """A small LFM2, which reads its convolution's weight and never calls the layer (as Mamba does)."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        conv_L_cache=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = Lfm2ForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].operator_norm.weight.mul_(3)  # so small a model hardly uses the block otherwise
        model.model.layers[0].conv.conv.weight.normal_()
    return model


def calls_the_layer(vocabulary: int) -> Any:
    """A small RecurrentGemma, which calls its convolution."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        lru_width=64,
        attention_window_size=64,
        block_types=["recurrent", "attention"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return RecurrentGemmaForCausalLM(config)


MODELS: dict[str, tuple[Any, list[str], str]] = {
    "lfm2": (reads_the_kernel, ["in_proj", "w2", "conv.conv"], "model.layers.0.conv.conv"),
    "recurrent_gemma": (calls_the_layer, ["linear_y", "conv_1d"], "model.layers.0.temporal_block.conv_1d"),
}


CONVOLVED, KERNEL = MODELS["lfm2"][1:]


@pytest.fixture(scope="session")
def convolved_bases(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Language models with a depthwise convolution over time, with the tokenizer of ``random_base``."""
    from transformers import AutoTokenizer

    folders = {}
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    for name, (build, _, _) in MODELS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folders[name])
        torch.manual_seed(0)
        build(len(tokenizer)).save_pretrained(folders[name])
    return folders


def on_model(content: dict[str, Any], bases: dict[str, Path], name: str) -> dict[str, Any]:
    return content | {"model": content["model"] | {"path": str(bases[name]), "target_modules": MODELS[name][1]}}


@pytest.fixture
def convolved_config(base_config: dict[str, Any], convolved_bases: dict[str, Path]) -> dict[str, Any]:
    return on_model(base_config, convolved_bases, "lfm2")


def moved(config: RunConfig, run: RunDirectory) -> tuple[nn.Module, torch.Tensor]:
    """The live model with an adapter that has moved and stands in a checkpoint; its logits."""
    model = live_model(config, run)
    perturb(model, 0.2)
    write_checkpoint(model, run)
    return model, logits(model)


# -- formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "into", "rank"), [(40, 24, 4), (24, 40, [3, 6])])
def test_linear_update_is_the_papers_and_a_lora(out: int, into: int, rank: Any) -> None:
    """ΔW = s·A G Bᵀ (Eq. 6) in float64, and a LoRA with B = A·G that is no approximation."""
    generator = torch.Generator().manual_seed(1)
    r1, r2 = (rank, rank) if isinstance(rank, int) else rank
    A = torch.randn(out, r1, generator=generator)
    G = torch.randn(r1, r2, generator=generator)
    B = torch.randn(into, r2, generator=generator)
    B[:3] *= 60
    method = FLoRA(FLoRAOptions(rank=rank, scale=0.3))
    update = method.update({"lora_A.weight": B.T, "lora_core.weight": G, "lora_B.weight": A}, None)
    assert isinstance(update, LowRank)
    assert update.A.shape == (r2, into)
    expected = 0.3 * A.double() @ G.double() @ B.double().T
    assert (update.dense().double() - expected).norm() <= 1e-6 * expected.norm()
    exact = method.update(
        {"lora_A.weight": B.T.double(), "lora_core.weight": G.double(), "lora_B.weight": A.double()}, None
    )
    assert isinstance(exact, LowRank)
    assert (exact.dense() - expected).norm() <= 1e-14 * expected.norm()


def test_start_is_seeded_by_run_and_layer() -> None:
    layer, other = (Layer(f"model.layers.{i}.mlp.up_proj", 64, 100) for i in range(2))
    W = torch.zeros(64, 100)

    def start(seed: int = 0, layer: Layer = layer) -> torch.Tensor:
        return FLoRA(FLoRAOptions(), seed).initialise(layer, W, 16, None, {}).B

    assert torch.equal(start(), start())
    assert not torch.equal(start(), start(seed=1))
    assert not torch.equal(start(), start(layer=other))
    initial = FLoRA(FLoRAOptions()).initialise(layer, W, 16, None, {})
    assert initial.report == {"ranks": [16, 16], "parameters": 16 * 16 + 16 * 164}
    assert not initial.extra["lora_core.weight"].any()


def test_lora_conv_of_a_linear_layer_is_lora() -> None:
    layer, W = Layer("layer", 40, 24), torch.zeros(40, 24)
    one = LoRAConv(LoRAConvOptions(rank=4, alpha=6.0), 3).initialise(layer, W, 4, None, {})
    two = LoRA(LoRAOptions(rank=4, alpha=6.0), 3).initialise(layer, W, 4, None, {})
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)
    assert LoRAConv(LoRAConvOptions(rank=4, alpha=6.0)).scaling() == 1.5


# -- in the pipeline -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_and_the_original_model(base_config: dict[str, Any], form: str, dtype: str) -> None:
    base_config["model"]["dtype"] = dtype
    config, run = step_zero(base_config, FORMS[form], "run")
    model, base = live_model(config, run), logits(base_model(config))
    assert largest(logits(model), base) == 0
    names = {"lora_A.weight", "lora_B.weight"} | ({"lora_core.weight"} if "flora" in form else set())
    expected = {f"{layer}.{name}" for layer in lora_layers(model) for name in names}
    assert {name for name, _ in trained_parameters(model)} == expected
    perturb(model, 0.3)
    live = logits(model)
    assert largest(live, base) > 0.1
    with original_model(model):
        assert largest(logits(model), base) == 0
        assert not list(trained_parameters(model))
    assert torch.equal(logits(model), live)
    assert {name for name, _ in trained_parameters(model)} == expected


@pytest.mark.parametrize("form", FORMS)
def test_exports_agree(base_config: dict[str, Any], form: str) -> None:
    """A plain LoRA, served by anything; its rank is r₂."""
    config, run = step_zero(base_config, FORMS[form], "run")
    _, live = moved(config, run)
    export(config, run)
    scale = float(live.abs().max())
    assert largest(live, logits(base_model(config))) > 0.1
    assert largest(by_peft_alone(config, run.adapter), live) <= BOUND * scale
    assert largest(by_transformers_alone(run.merged), live) <= BOUND * scale
    rank = FORMS[form]["rank"]
    r2 = rank if isinstance(rank, int) else rank[1]
    assert {factor.A.shape[0] for factor in read_adapter(run.adapter).values()} == {r2}
    assert servable(tuned_candidates(config.model.path, run, checkpoints=False)[0], "vllm").adapter == run.adapter
    shapes = {name: layer["shape"] for name, layer in read_json(run.init / "report.json")["layers"].items()}
    assert shapes["model.layers.1.mlp.down_proj"] == [64, 160]


def test_over_a_quantised_base(base_config: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    base_config["model"]["quantization"] = "nf4"
    config, run = step_zero(base_config, FORMS["flora"], "run")
    start = logits(live_model(config, run))
    model, live = moved(config, run)
    with original_model(model):
        assert torch.equal(logits(model), start)
    export(config, run)
    frozen = by_transformers_alone(run.frozen_base)
    assert largest(start, frozen) <= BOUND * float(frozen.abs().max())
    assert largest(by_transformers_alone(run.merged), live) <= BOUND * float(live.abs().max())
    on_frozen = config.model_copy(update={"model": config.model.model_copy(update={"path": str(run.frozen_base)})})
    assert largest(by_peft_alone(on_frozen, run.adapter), live) <= BOUND * float(live.abs().max())


@pytest.mark.parametrize("form", ["flora", "lora_conv"])
@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_with_convolutions(
    base_config: dict[str, Any], convolved_bases: dict[str, Path], name: str, form: str
) -> None:
    """Step 0, gradients, merging, and the adapter as `tensor.load` reads it."""
    kernel = MODELS[name][2]
    config, run = step_zero(on_model(base_config, convolved_bases, name), FORMS[form], "run")
    assert read_json(run.init / "report.json")["layers"][kernel]["shape"] == [64, 1, 4]
    base = logits(base_model(config))
    model = live_model(config, run)
    assert largest(logits(model), base) == 0
    batch = prompts()
    model(input_ids=batch["input_ids"], use_cache=False).logits.square().mean().backward()
    grown = {name for name, p in trained_parameters(model) if p.grad is not None and p.grad.any()}
    last = "lora_core" if form == "flora" else "lora_B"
    assert grown == {f"{layer}.{last}.weight" for layer in lora_layers(model)}
    assert f"{kernel}.{last}.weight" in grown

    model, live = moved(config, run)
    assert largest(live, base) > 0.05
    with original_model(model):
        assert largest(logits(model), base) == 0
    export(config, run)
    scale = float(live.abs().max())
    assert largest(by_transformers_alone(run.merged), live) <= BOUND * scale
    final = tuned_candidates(config.model.path, run, checkpoints=False)[0]
    for backend in ("vllm", "hf"):
        served = servable(final, backend)
        assert (served.adapter, served.model) == (None, run.merged)
    with pytest.raises(UserError, match=r"^eval\.backend: hf cannot serve .*: it adapts convolutions, .* model$"):
        servable(replace(final, merged=None), "hf")
    assert largest(logits(tensor.load(base_model(config), run.adapter)), live) <= BOUND * scale


def test_kernel_of_a_convolution_is_the_factors_product(convolved_config: dict[str, Any]) -> None:
    config, run = step_zero(convolved_config, FORMS["flora"], "run")
    layers = describe(target_modules(base_model(config), CONVOLVED, convolutions=True))
    convolution = next(layer for layer in layers if layer.kernel)
    assert (convolution.shape, convolution.groups) == ((64, 1, 4), 64)
    own = read_layers(run.init)[KERNEL]
    shapes = {"lora_A": (1, 1), "lora_core": (2, 1, 2), "lora_B": (64, 2), "lora_kernel_0": (4, 2)}
    assert {name.split(".")[0]: tuple(tensor.shape) for name, tensor in own.items()} == shapes
    own["lora_core.weight"] = torch.randn(2, 1, 2, generator=torch.Generator().manual_seed(0))
    update: Update = FLoRA(FLoRAOptions(rank=6, scale=0.5)).update(own, None)
    factors = [own[f"lora_{name}.weight"].double() for name in ("core", "B", "A", "kernel_0")]
    expected = 0.5 * torch.einsum("pqa,op,qi,xa->oix", *factors)
    assert torch.allclose(update.dense(torch.zeros(64, 1, 4)).double(), expected, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------


def test_a_convolution_under_a_method_without_a_form_for_it(convolved_config: dict[str, Any]) -> None:
    message = r"^model\.target_modules: 'conv\.conv' is a convolution, for which this method has no form; use"
    with pytest.raises(UserError, match=message):
        step_zero(convolved_config, {"name": "lora", "rank": 4}, "run")
    with pytest.raises(
        UserError, match=r"'conv2d' matches no linear layer and no convolution; allowed: .*did you mean"
    ):
        target_modules(base_model(resolve(convolved_config)), ["conv2d"], convolutions=True)


@pytest.mark.parametrize(
    ("method", "targets", "message"),
    [
        (
            {"name": "flora", "kernel_rank": 5},
            CONVOLVED,
            r"^method\.kernel_rank: 5 given; allowed: at most 4, ",
        ),
        ({"name": "flora", "kernel_rank": 2}, ["in_proj"], r"^method\.kernel_rank: 2 given; allowed: none: the target"),
        ({"name": "flora", "rank": [70, 4]}, ["in_proj"], r"^method\.rank: 70 given; layer .* so at most 64"),
    ],
)
def test_ranks_that_do_not_fit(convolved_config: dict[str, Any], method: Any, targets: Any, message: str) -> None:
    convolved_config["model"]["target_modules"] = targets
    with pytest.raises(UserError, match=message):
        step_zero(convolved_config, method, "run")


@pytest.mark.parametrize(
    ("method", "targets", "message"),
    [
        (
            {"name": "lora"},
            CONVOLVED,
            r"'conv\.conv' is a convolution, for which method 'lora' has no form; use method",
        ),
        ({"name": "flora"}, ["convv"], r"'convv' matches no convolution and no linear layer; .*did you mean 'conv'\?"),
        ({"name": "flora", "kernel_rank": 5}, CONVOLVED, r"^method\.kernel_rank: 5 given; allowed: at most 4"),
        ({"name": "flora", "rank": 70}, CONVOLVED, r"^method\.rank: 70 given; layer .* is 192×64, so at most 64$"),
        ({"name": "flora", "rank": 8, "kernel_rank": 2}, CONVOLVED, None),
        ({"name": "lora_conv", "rank": 8}, CONVOLVED, None),
    ],
)
def test_before_the_model_is_loaded(
    convolved_config: dict[str, Any], method: Any, targets: Any, message: str | None
) -> None:
    convolved_config["model"]["target_modules"] = targets
    convolved_config["method"] = method
    if message is None:
        check(resolve(convolved_config))
        return
    with pytest.raises(UserError, match=message):
        check(resolve(convolved_config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, r"^method\.scale: -1\.0 given"),
        ({"rank": 0}, r"^method\.rank"),
        ({"rank": [4, 4, 4]}, r"^method\.rank"),
        ({"kernel_rank": 0}, r"^method\.kernel_rank: 0 given"),
        ({"init": "zero"}, r"^method\.init: 'zero' given"),
    ],
)
def test_options(base_config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    base_config["method"] = {"name": "flora", **options}
    with pytest.raises(UserError, match=message):
        resolve(base_config)


# -- with DeepSpeed --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"), [("lfm2", "flora"), ("recurrent_gemma", "flora"), ("recurrent_gemma", "lora_conv")]
)
def test_two_ranks_under_zero_3_equal_one_process(
    base_config: dict[str, Any], convolved_bases: dict[str, Path], name: str, form: str, tmp_path: Path
) -> None:
    """Linear layers and convolutions, every parameter divided however small, the anchor switching adapters off."""
    import yaml

    from tests.conftest import run_gang
    from tests.training.test_runs import alone, largest_difference, trained

    zero = json.loads(Path("ds_configs/zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    content = on_model(base_config, convolved_bases, name)
    content |= {"method": FORMS[form], "anchor": {"kl": 1.0, "prompts_per_step": 5}}
    train = content["train"] | {"max_steps": 4, "save_steps": 4, "log_steps": 1, "micro_batch_size": 6}
    one = alone(content, tmp_path, "one", train=train | {"deepspeed": "ds_configs/zero1.json"})
    train["deepspeed"] = str(tmp_path / "zero3.json")
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({**content, "name": "two", "train": train}))
    run_gang(path, 2)
    two = one.parent / "two"
    assert largest_difference(trained(one, 4), trained(two, 4)) <= 1e-3
    start = {f"{layer}.{n}": t for layer, own in read_layers(one / "init").items() for n, t in own.items()}
    moved_names = [key for key, value in trained(two, 4).items() if not torch.equal(value, start[key])]
    for target in MODELS[name][1]:
        assert any(f".{target}." in key for key in moved_names)
    assert (two / "merged" / "model.safetensors").is_file()
