"""Loading models and tokenizers."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from harness.config import ModelConfig
from harness.errors import UserError
from harness.models.loading import load_model, load_tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_and_mode(random_base: Path, dtype: str) -> None:
    model = load_model(ModelConfig(path=str(random_base), dtype=dtype), "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


def test_pickles_are_not_read(random_base: Path, tmp_path: Path) -> None:
    shutil.copytree(random_base, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model\.path: .*pickled"):
        load_model(ModelConfig(path=str(tmp_path / "pickled")))


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.path: no tokenizer in "):
        load_tokenizer(str(tmp_path))


def test_padding_token(random_base: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(random_base)).pad_token == "<pad>"
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "padless")
    assert load_tokenizer(str(tmp_path / "padless")).pad_token == "</s>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match=r"^model\.path: the tokenizer of .*endless.* has no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "endless"))
