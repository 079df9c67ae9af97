"""The live model, `adapter/` on the base by PEFT alone, and `merged/` compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.adapters.lora import lora_layers, read_adapter, write_adapter
from harness.config import RunConfig
from harness.errors import UserError
from harness.export.merge import base_tensors, write_merged
from harness.files import read_json, write_json
from harness.methods.base import LowRank
from harness.models.loading import load_model
from harness.models.targets import describe, target_modules
from harness.run_directory import RunDirectory
from harness.stages.export import export
from harness.stages.initialise import SUBTRACTED
from tests.methods.runs import (
    METHODS,
    base_model,
    largest,
    live_model,
    logits,
    perturb,
    step_zero,
    write_checkpoint,
)

Started = tuple[RunConfig, RunDirectory]
BOUND = 1e-4


def by_peft_alone(config: RunConfig, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(base_model(config), str(adapter)).eval())


def by_transformers_alone(merged: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    architecture = getattr(transformers, AutoConfig.from_pretrained(merged).architectures[0])
    return logits(architecture.from_pretrained(merged, dtype=dtype).eval())


def exported(config: RunConfig, run: RunDirectory) -> torch.Tensor:
    """Move the adapter, leave a checkpoint, export; the live model's logits."""
    model = live_model(config, run)
    perturb(model)
    write_checkpoint(model, run)
    export(config, run)
    return logits(model)


def test_agree(started: Started) -> None:
    config, run = started
    live = exported(config, run)
    scale = float(live.abs().max())
    assert largest(live, logits(base_model(config))) > 0.1
    assert largest(by_peft_alone(config, run.adapter), live) <= BOUND * scale
    assert largest(by_transformers_alone(run.merged), live) <= BOUND * scale
    report = read_json(run.init / "report.json")["layers"]
    for name, factor in read_adapter(run.adapter).items():
        taken = report[name]["residual"] or (run.init / SUBTRACTED).is_dir()
        doubled = taken and not config.method.get("freeze_a", False)
        assert factor.A.shape[0] == report[name]["rank"] * (2 if doubled else 1)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    assert tokenizer("abcd efgh").input_ids == AutoTokenizer.from_pretrained(config.model.path)("abcd efgh").input_ids
    assert not list(run.path.rglob("*.bin"))


def test_checkpoints_are_exported_as_adapters(base_config: dict[str, Any]) -> None:
    base_config["eval"] = {"checkpoints": True}
    config, run = step_zero(base_config, METHODS["kpm, alpha 3"], "checkpoints")
    lives = {}
    for step, size in ((1, 0.02), (2, 0.05)):
        model = live_model(config, run)
        perturb(model, size)
        write_checkpoint(model, run, step)
        lives[step] = logits(model)
    export(config, run)
    # The last checkpoint is the final model, which stands at the top of the run directory.
    for adapter, live in ((run.checkpoints / "step-1" / "adapter", lives[1]), (run.adapter, lives[2])):
        assert largest(by_peft_alone(config, adapter), live) <= BOUND * float(live.abs().max())
    assert largest(lives[1], lives[2]) > 0.1


def test_ranks_that_differ_by_layer(base_config: dict[str, Any]) -> None:
    """CorDA with ranks 1 to 6, one layer without an adapter, and α ≠ r: PEFT cannot convert it, the export does."""
    from harness.methods.corda import CorDA, CorDAOptions
    from harness.statistics.store import StatisticsReader

    config, run = step_zero(base_config, METHODS["kpm, alpha 3"], "mixed")
    method = CorDA(CorDAOptions(mode="kpm", rank=8, alpha=3.0))
    statistics = StatisticsReader(run.statistics)
    modules = target_modules(load_model(config.model), "all-linear")
    factors, layers = {}, {}
    for number, layer in enumerate(describe(modules)[1:]):
        initial = method.initialise(layer, modules[layer.name].weight.detach(), 1 + number % 6, statistics, {})
        factors[layer.name] = LowRank(initial.B, initial.A, method.scaling())
        layers[layer.name] = {"rank": 1 + number % 6, "residual": True}
    write_adapter(run.init, factors, config.model.path)
    write_json(run.init / "report.json", {"method": "corda", "layers": layers})

    base = logits(base_model(config))
    start = live_model(config, run)
    assert lora_layers(start).keys() == factors.keys()
    assert largest(logits(start), base) <= BOUND * float(base.abs().max())
    live = exported(config, run)
    scale = float(live.abs().max())
    assert largest(live, base) > 0.1
    assert largest(by_peft_alone(config, run.adapter), live) <= BOUND * scale
    assert largest(by_transformers_alone(run.merged), live) <= BOUND * scale
    assert {f.A.shape[0] for f in read_adapter(run.adapter).values()} == {2, 4, 6, 8, 10, 12}


@pytest.mark.parametrize("method", ["lora", "kpm"])
def test_bfloat16_base(base_config: dict[str, Any], method: str) -> None:
    """`merged/` is base + update in fp32, rounded once; to that it is equal bit for bit."""
    base_config["model"]["dtype"] = "bfloat16"
    config, run = step_zero(base_config, METHODS[method], "half")
    exported(config, run)
    updates = read_adapter(run.adapter)
    merged = load_file(run.merged / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for name, tensor in base_tensors(config.model.path):
        update = updates.get(name.removesuffix(".weight"))
        whole = tensor.float() if update is None else tensor.float() + update.dense()
        assert torch.equal(merged[name], whole.to(torch.bfloat16)), name
    assert AutoModelForCausalLM.from_pretrained(run.merged).dtype == torch.bfloat16


def test_shards(started: Started, tmp_path: Path) -> None:
    """Many small files hold the same model as one."""
    config, _ = started
    generator = torch.Generator().manual_seed(1)
    layers = describe(target_modules(base_model(config), "all-linear"))
    updates = {
        layer.name: LowRank(
            0.05 * torch.randn(layer.out_features, 4, generator=generator),
            0.05 * torch.randn(4, layer.in_features, generator=generator),
            1.5,
        )
        for layer in layers
    }
    one, many = tmp_path / "one", tmp_path / "many"
    write_merged(one, config.model.path, torch.float32, updates)
    write_merged(many, config.model.path, torch.float32, updates, shard_bytes=60_000)
    assert (one / "model.safetensors").is_file()
    assert not (many / "model.safetensors").exists()
    assert len(list(many.glob("model-*-of-*.safetensors"))) > 3
    left, right = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (one, many))
    assert all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))
    assert torch.equal(logits(left.eval()), logits(right.eval()))


def test_sharded_base(base_config: dict[str, Any], tmp_path: Path) -> None:
    """A base that comes in several files merges to the same model."""
    config, run = step_zero(base_config, METHODS["lora"], "whole")
    exported(config, run)
    base_model(config).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(config.model.path).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    write_merged(tmp_path / "merged", str(tmp_path / "sharded"), torch.float32, read_adapter(run.adapter))
    assert torch.equal(by_transformers_alone(tmp_path / "merged"), by_transformers_alone(run.merged))


def test_layer_that_the_files_do_not_name(base_config: dict[str, Any], tmp_path: Path) -> None:
    update = LowRank(torch.zeros(4, 1), torch.zeros(1, 4), 1.0)
    with pytest.raises(UserError, match=r"stores no tensor called model\.nothing\.weight; .*use adapter/ instead"):
        write_merged(tmp_path, base_config["model"]["path"], torch.float32, {"model.nothing": update})


def test_nothing_trained_yet(base_config: dict[str, Any]) -> None:
    config, run = step_zero(base_config, METHODS["lora"], "early")
    with pytest.raises(UserError, match=r"^export: .*checkpoints holds no checkpoint; run the train stage first"):
        export(config, run)
