"""No rank holds a whole model under ZeRO-3, and what is trained is what one process trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.adapters.lora import read_adapter, write_adapter
from harness.config import ModelConfig
from harness.files import read_json, write_json
from harness.methods.base import LowRank
from harness.models.targets import describe, target_modules
from harness.models.weights import empty_model
from tests.conftest import run_gang
from tests.gangs import call_in_gang

pytestmark = pytest.mark.slow

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "corda_plus_plus": ({"name": "corda", "mode": "kpm", "rank": 8, "rounds": 2, "dynamic_rank": True}, "none"),
    "farss": ({"name": "farss", "rank": 8, "shallow_layers": 1}, "none"),
    "pissa": ({"name": "pissa", "rank": 8}, "none"),
    "pissa-nf4": ({"name": "pissa", "rank": 8}, "nf4"),
}


@pytest.mark.parametrize("name", METHODS)
def test_initialised_trained_and_exported_as_by_one_process(name: str, base_config: dict[str, Any], write_config):
    """On two ranks under ZeRO-3, where each initialises its own layers and holds half of every weight."""
    options, quantisation = METHODS[name]
    updates = []
    for ranks in (1, 2):
        content = base_config | {"name": f"{name}-{ranks}", "method": options}
        content["model"] = base_config["model"] | {"quantization": quantisation}
        # One process takes the batch in two passes, so accumulation is compared as well.
        content["train"] = base_config["train"] | {
            "deepspeed": f"ds_configs/zero{2 if ranks == 1 else 3}.json",
            **{"max_steps": 5, "save_steps": 5, "micro_batch_size": 6, "learning_rate": 1.0e-3},
        }
        run_gang(write_config(content), ranks)
        run = Path(content["output_dir"]) / content["name"]
        updates.append({layer: factors.dense() for layer, factors in read_adapter(run / "adapter").items()})
        initial = {layer: factors.dense() for layer, factors in read_adapter(run / "init").items()}
    one, two = updates
    assert one.keys() == two.keys()
    assert any((one[layer] - initial[layer]).norm() > 1e-3 * initial[layer].norm() for layer in one)  # it learned
    for layer in one:
        difference = float((one[layer] - two[layer]).norm() / one[layer].norm())
        assert difference <= 1e-4, layer


BUILDS = {
    "dense": {"dtype": "float32"},
    "half": {"dtype": "bfloat16"},
    "nf4": {"dtype": "float32", "quantization": "nf4"},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, random_base: Path, data_files: dict[str, Path]):
    """What both ranks saw while they built a model of 85 MB in ways of `BUILDS`, and how many bytes it has in fp32."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("built")
    base = folder / "base"
    AutoTokenizer.from_pretrained(random_base).save_pretrained(base)
    config = LlamaConfig.from_pretrained(random_base)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1024, 8
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(base, max_shard_size="20MB")
    del model

    generator = torch.Generator().manual_seed(1)
    layers = describe(target_modules(empty_model(ModelConfig(path=str(base), dtype="float32")), "all-linear"))
    blocks = {
        layer.name: LowRank(
            torch.randn(layer.out_features, 2, generator=generator) / 50,
            torch.randn(2, layer.in_features, generator=generator) / 50,
            1.0,
        )
        for layer in layers
    }
    for name, model_options in BUILDS.items():
        content = {
            "name": name,
            "model": {"path": str(base), **model_options},
            "data": {"train": {"path": str(data_files["train"]), "prompt": "q", "response": "a"}},
            "method": {"name": "pissa", "rank": 2},
            "train": {"deepspeed": "ds_configs/zero3.json", "max_steps": 1, "batch_size": 2},
            "output_dir": str(folder / "runs"),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        init = folder / "runs" / name / "init"
        init.mkdir(parents=True)
        write_adapter(init, blocks, str(base))
        write_json(init / "report.json", {"layers": {layer.name: {"residual": True} for layer in layers}})
    call_in_gang(2, "tests.distributed.building:measure", str(folder))
    return [read_json(folder / f"{rank}.json") for rank in range(2)], size


@pytest.mark.parametrize("name", BUILDS)
def test_built_as_if_loaded_whole(built, name: str) -> None:
    """Every weight, residual or quantised, and every buffer, bit for bit; no rank keeps a whole one."""
    assert [seen[name]["different"] for seen in built[0]] == [[], []]


def test_no_rank_held_the_whole_model(built) -> None:
    """Resident memory at its peak: half of the model on each of two ranks, and one weight."""
    seen, size = built
    for rank in seen:
        assert rank["dense"]["added"] < 0.75 * size
        assert rank["half"]["added"] < 0.75 * size / 2 + 2**22
        assert rank["nf4"]["added"] < 0.3 * size
    assert seen[0]["transformers"] > size  # the measurement would have seen it: rank 0 maps all files at once
