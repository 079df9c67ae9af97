"""The base for training, filled one weight at a time; ZeRO-3 itself is in tests/distributed/test_scale.py."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from harness.config import ModelConfig
from harness.methods.base import LowRank
from harness.models import partitioned_loading
from harness.models.loading import load_model
from harness.models.partitioned_loading import load_quantised, load_trained
from harness.models.quantisation import quantise_linears
from harness.models.targets import describe, target_modules
from harness.models.weights import BaseWeights, empty_model, tensor_checksum

CPU = torch.device("cpu")
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, attention_bias=True),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
}


def saved(folder: Path, config: object) -> ModelConfig:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size="50KB")
    return ModelConfig(path=str(folder), dtype="float32", quantization="nf4")


def blocks(model: nn.Module) -> dict[str, LowRank]:
    """Something to subtract from every second layer, one channel of which is large."""
    layers = describe(target_modules(model, "all-linear"))[::2]
    torch.manual_seed(1)
    made = {x.name: LowRank(torch.randn(x.out_features, 3) / 9, torch.randn(3, x.in_features) / 9, 0.5) for x in layers}
    for block in made.values():
        block.A[:, 5] *= 60
    return made


def quantised_whole(config: ModelConfig) -> nn.Module:
    """Loaded whole and dense, then quantised."""
    model = load_model(config)
    dtype = getattr(torch, config.dtype)
    quantise_linears(model, target_modules(model, "all-linear"), blocks(model), dtype, config.double_quantization, CPU)
    return model


def assert_equal(built: nn.Module, whole: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        left, right = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (built, whole))
        assert left.keys() == right.keys()
        for name in left:
            assert tensor_checksum(left[name]) == tensor_checksum(right[name]), name  # packed weights hold NaNs as well
            assert left[name].requires_grad == right[name].requires_grad, name
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(built(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert [m.training for m in built.modules()] == [m.training for m in whole.modules()]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "double"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_quantised_layer_by_layer_as_when_loaded_whole(
    tmp_path: Path, name: str, dtype: str, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = saved(tmp_path, CONFIGS[name]).model_copy(update={"dtype": dtype, "double_quantization": double})
    whole = quantised_whole(config)
    monkeypatch.setattr(partitioned_loading, "load_model", None)  # no way to load it whole
    built = load_quantised(config, blocks(empty_model(config)), CPU)
    assert_equal(built, whole)
    assert built.is_loaded_in_4bit
    if name == "tied":
        assert built.lm_head.weight is built.model.embed_tokens.weight


def test_without_zero3_the_model_is_loaded_as_ever(tmp_path: Path) -> None:
    config = saved(tmp_path, CONFIGS["llama"])
    assert_equal(load_trained(config, CPU), load_model(config))


def test_stacked_experts_are_loaded_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files hold each expert by itself; transformers stacks them while it loads."""
    config = saved(tmp_path, MixtralConfig(**LLAMA, num_local_experts=2))
    empty = empty_model(config)
    assert not BaseWeights(config, empty).complete
    assert_equal(load_quantised(config, blocks(empty), CPU), quantised_whole(config))
    assert "loads it whole" in capsys.readouterr().err


def test_what_is_not_a_parameter_of_the_model_dtype_makes_files_incomplete(tmp_path: Path) -> None:
    config = saved(tmp_path, CONFIGS["tied"])
    model = empty_model(config)
    assert BaseWeights(config, model).complete
    model._keep_in_fp32_modules = ["norm"]
    assert BaseWeights(config, model).complete  # all is fp32
    assert not BaseWeights(config.model_copy(update={"dtype": "bfloat16"}), model).complete
    model = empty_model(config)
    model.register_buffer("kept_in_files", torch.zeros(1))
    assert not BaseWeights(config, model).complete
