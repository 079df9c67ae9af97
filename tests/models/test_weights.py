"""Weights read one at a time are those of the loaded model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from harness.config import ModelConfig
from harness.errors import UserError
from harness.models.loading import load_model
from harness.models.weights import BaseWeights, empty, empty_model, fill, tensor_checksum


def saved(folder: Path, config: object, shard: str = "5GB") -> ModelConfig:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard)
    return ModelConfig(path=str(folder), dtype="float32")


LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_loaded_model(tmp_path: Path, name: str, dtype: str) -> None:
    config = saved(tmp_path, CONFIGS[name], "20KB").model_copy(update={"dtype": dtype})
    loaded = load_model(config)
    model = empty_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    weights = BaseWeights(config, model)
    for parameter, value in loaded.named_parameters(remove_duplicate=False):
        assert torch.equal(weights.read(parameter), value), parameter
        assert weights.checksum(parameter) == tensor_checksum(value)
    fill(model, "", weights, torch.device("cpu"))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    empty(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_other_names_load_the_model_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    config = saved(tmp_path, CONFIGS["llama"])
    loaded = load_model(config)
    model = empty_model(config)
    tensors = load_file(tmp_path / "model.safetensors")
    # transformers renames what ends in gamma or beta while loading; ours does not know that.
    renamed = {name.replace("up_proj.weight", "other.weight"): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = BaseWeights(config, model)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights.read(name), loaded.get_parameter(name))
    weights.read("model.layers.0.mlp.up_proj.weight")
    assert "loaded whole" in capsys.readouterr().err


def test_checksum_tells_dtype_and_shape() -> None:
    zeros = torch.zeros(4, 2)
    others = [torch.zeros(2, 4), torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 2)]
    assert len({tensor_checksum(tensor) for tensor in [zeros, *others]}) == 4
    assert tensor_checksum(torch.arange(6.0).reshape(2, 3).T) == tensor_checksum(
        torch.tensor([[0.0, 3], [1, 4], [2, 5]])
    )


def test_no_weights_and_damaged_weights(tmp_path: Path) -> None:
    config = saved(tmp_path, CONFIGS["llama"])
    model = empty_model(config)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(UserError, match="damaged"):
        BaseWeights(config, model)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors"):
        BaseWeights(config, model)
