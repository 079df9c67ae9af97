"""NF4 runs: what is quantised is the residual weight, the stated errors are true, and exports are exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness.adapters.lora import read_adapter
from harness.config import RunConfig
from harness.errors import UserError
from harness.files import read_json
from harness.methods.registry import build_method
from harness.models.quantisation import nf4_values
from harness.models.targets import target_modules
from harness.preflight import check
from harness.run_directory import RunDirectory
from harness.stages.initialise import subtracted_blocks
from tests.export.test_agreement import BOUND, by_transformers_alone, exported
from tests.methods.runs import base_model, largest, live_model, logits, step_zero

QUANTISED: dict[str, dict[str, Any]] = {
    "QLoRA": {"name": "lora", "rank": 8},
    "QCorDA": {"name": "corda", "mode": "ipm", "rank": 8, "alpha": 20.0},
    "QCorDA kpm": {"name": "corda", "mode": "kpm", "rank": 8},
}
Started = tuple[RunConfig, RunDirectory]


@pytest.fixture(params=QUANTISED, ids=str)
def started(request: pytest.FixtureRequest, base_config: dict[str, Any]) -> Started:
    base_config["model"]["quantization"] = "nf4"
    return step_zero(base_config, QUANTISED[request.param], "quantised")


def dequantised(config: RunConfig, run: RunDirectory) -> dict[str, torch.Tensor]:
    """Every linear layer's NF4 values, straight from the definition Q(W − s·B·A)."""
    blocks = subtracted_blocks(run.init)
    return {
        name: nf4_values(
            module.weight.detach() - (blocks[name].dense() if name in blocks else 0.0), config.model.double_quantization
        )
        for name, module in target_modules(base_model(config), "all-linear").items()
    }


@torch.no_grad()
def test_step_0_is_the_dequantised_model(started: Started) -> None:
    config, run = started
    scaling = build_method(config.method, 0).scaling()
    model = base_model(config)
    initial = read_adapter(run.init)
    frozen = dequantised(config, run)
    for name, module in target_modules(model, "all-linear").items():
        module.weight.copy_(frozen[name] + scaling * initial[name].B @ initial[name].A)
    expected = logits(model)
    assert largest(logits(live_model(config, run)), expected) <= BOUND * float(expected.abs().max())
    assert largest(expected, logits(base_model(config))) > 1e-3  # quantised indeed


def test_exports_agree(started: Started) -> None:
    config, run = started
    live = exported(config, run)
    scale = float(live.abs().max())
    frozen = load_file(run.frozen_base / "model.safetensors")
    for name, values in dequantised(config, run).items():
        assert torch.equal(frozen[f"{name}.weight"], values), name
    # In float64: with these outlier channels fp32 forward passes of the very same weights are 2e-4 apart.
    base = AutoModelForCausalLM.from_pretrained(run.frozen_base, dtype=torch.float64)
    adapted = PeftModel.from_pretrained(base, str(run.adapter), autocast_adapter_dtype=False).double().eval()
    assert largest(logits(adapted), live) <= BOUND * scale
    assert largest(by_transformers_alone(run.merged, torch.float64), live) <= BOUND * scale
    assert read_json(run.adapter / "adapter_config.json")["base_model_name_or_path"] == str(run.frozen_base)


def test_stated_errors(started: Started) -> None:
    """Against the residual of the outputs themselves, row by row, in float64."""
    config, run = started
    report = read_json(run.init / "report.json")["layers"]
    inputs = calibration_inputs(config)
    initial, frozen = read_adapter(run.init), dequantised(config, run)
    for name, module in target_modules(base_model(config), "all-linear").items():
        W = module.weight.detach().double()
        E = W - frozen[name].double() - initial[name].dense().double()
        X = inputs[name]
        assert report[name]["weight_error"] == pytest.approx(float(E.norm() / W.norm()), rel=1e-4)
        assert report[name]["output_error"] == pytest.approx(float((E @ X).norm() / (W @ X).norm()), rel=1e-3)


def test_a_layer_without_an_adapter_is_quantised_too(base_config: dict[str, Any]) -> None:
    """CorDA++ in IPM leaves layers at rank 0 here; their errors are those of plain NF4."""
    base_config["model"]["quantization"] = "nf4"
    method = {"name": "corda", "mode": "ipm", "rank": 1, "dynamic_rank": True}
    config, run = step_zero(base_config, method, "without")
    report = read_json(run.init / "report.json")["layers"]
    without = [name for name, layer in report.items() if layer["rank"] == 0]
    assert without and len(without) < len(report)
    assert read_adapter(run.init).keys() == report.keys() - set(without)
    inputs, frozen = calibration_inputs(config), dequantised(config, run)
    modules = target_modules(base_model(config), "all-linear")
    for name in without:
        W = modules[name].weight.detach().double()
        E = W - frozen[name].double()
        assert report[name]["weight_error"] == pytest.approx(float(E.norm() / W.norm()), rel=1e-4)
        expected = float((E @ inputs[name]).norm() / (W @ inputs[name]).norm())
        assert report[name]["output_error"] == pytest.approx(expected, rel=1e-3)
    live = exported(config, run)
    assert largest(by_transformers_alone(run.merged, torch.float64), live) <= BOUND * float(live.abs().max())


def calibration_inputs(config: RunConfig) -> dict[str, torch.Tensor]:
    """X of every layer, (in, tokens), float64: the rows that calibration drew, one at a time, unpadded."""
    from harness.data.sampling import sample
    from harness.data.sources import read_examples
    from harness.data.tokenisation import tokenise
    from harness.methods.registry import required_statistics
    from harness.models.loading import load_tokenizer

    request = required_statistics(config)
    assert request is not None
    source = config.data.preserve if request.data == "preserve" else config.data.train
    examples = sample(read_examples(source, "data"), source.samples, "calibrate", config.train.seed, 0)
    rows = tokenise(examples, load_tokenizer(config.model.path), config.data.max_length)
    model = base_model(config)
    columns: dict[str, list[torch.Tensor]] = {}
    for name, module in target_modules(model, "all-linear").items():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: columns.setdefault(name, []).append(inputs[0][0].double().T)
        )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    return {name: torch.cat(parts, dim=1) for name, parts in columns.items()}


@pytest.mark.parametrize("double", [True, False])
def test_layers_of_the_live_model(base_config: dict[str, Any], double: bool) -> None:
    import bitsandbytes as bnb

    base_config["model"] |= {"quantization": "nf4", "double_quantization": double, "target_modules": ["q_proj"]}
    config, run = step_zero(base_config, QUANTISED["QLoRA"], "layers")
    model = live_model(config, run)
    linear = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(linear) == 14  # every linear layer of two blocks, adapted or not
    assert {module.weight.quant_state.nested for module in linear} == {double}
    assert {module.weight.dtype for module in linear} == {torch.float32}  # so that ZeRO-3 partitions it
    assert not isinstance(model.get_output_embeddings(), bnb.nn.Linear4bit)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_evaluation_mode_leaves_the_weights_alone(base_config: dict[str, Any]) -> None:
    """bitsandbytes repacks weights in place outside training where the CPU has a fast path; here it must not."""
    base_config["model"]["quantization"] = "nf4"
    config, run = step_zero(base_config, QUANTISED["QLoRA"], "evaluation")
    model = live_model(config, run)
    before = logits(model.train())
    after = logits(model.eval())
    assert torch.equal(before, after)


def test_layers_that_the_cpu_misreads_are_named(
    base_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU bitsandbytes 0.50 misreads rows that are no whole number of blocks; see that it still does."""
    base_config["model"]["quantization"] = "nf4"
    _, run = step_zero(base_config, QUANTISED["QLoRA"], "misread")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: model.quant")]
    assert "misreads 2 layers, model.layers.0.mlp.down_proj among them" in warning
    report = read_json(run.init / "report.json")["layers"]
    wide = [layer["weight_error"] for layer in report.values() if layer["shape"][1] % 64]
    others = [layer["weight_error"] for layer in report.values() if layer["shape"][1] % 64 == 0]
    assert len(wide) == 2 and min(wide) > 0.2 and max(others) < 0.12


def test_full_fine_tuning_cannot_be_quantised(base_config: dict[str, Any]) -> None:
    from harness.config import resolve

    base_config["model"]["quantization"] = "nf4"
    base_config["method"] = {"name": "full"}
    with pytest.raises(UserError, match=r"^model\.quantization: nf4 given; method 'full' trains the base weights"):
        check(resolve(base_config))


def test_merged_keeps_what_is_not_quantised(base_config: dict[str, Any], random_base: Path) -> None:
    base_config["model"]["quantization"] = "nf4"
    config, run = step_zero(base_config, QUANTISED["QLoRA"], "kept")
    exported(config, run)
    merged, base = load_file(run.merged / "model.safetensors"), load_file(random_base / "model.safetensors")
    assert merged.keys() == base.keys()
    linear = {f"{name}.weight" for name in target_modules(base_model(config), "all-linear")}
    for name in base.keys() - linear:
        assert torch.equal(merged[name], base[name]), name
