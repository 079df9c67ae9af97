"""A small random Qwen2: a base whose query, key and value layers have biases."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def biased_base(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, biases from N(0, 0.3²), the tokenizer of ``random_base``."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("biased")
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def biased_config(base_config: dict[str, Any], biased_base: Path) -> dict[str, Any]:
    """`base_config` on that base."""
    base_config["model"]["path"] = str(biased_base)
    return base_config
