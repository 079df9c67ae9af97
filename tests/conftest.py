"""A small random Llama with its tokenizer and data, and ways to run real gangs on them."""

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gangs import SCRIPT, end_gangs, run_in_gang, start_command

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread: tests are many small computations, and threads that wait for each other on a busy machine cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What tests keep is theirs, and what a user keeps is not for tests.
_KEPT = tempfile.TemporaryDirectory(prefix="palimpsest-tests-")
os.environ["PALIMPSEST_CACHE"] = _KEPT.name


@pytest.fixture(scope="session")
def words() -> list[str]:
    """Sentences of invented words."""
    generator = random.Random(0)
    lexicon = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(200)]
    return [" ".join(generator.choices(lexicon, k=generator.randint(3, 15))) for _ in range(200)]


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """A two-layer Llama with random weights (some channels 60 times the rest) and a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:2] *= 60  # outlier channels, as real models have them
            layer.post_attention_layernorm.weight[5] *= 60
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> dict[str, Path]:
    """``train`` (q: words, a: the words backwards) and ``preserve`` (q only) as JSONL."""
    folder = tmp_path_factory.mktemp("data")
    train = [{"q": text, "a": " " + " ".join(reversed(text.split()))} for text in words]
    preserve = [{"q": text} for text in words[:50]]
    files = {"train": train, "preserve": preserve}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: folder / f"{name}.jsonl" for name in files}


@pytest.fixture
def base_config(random_base: Path, data_files: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A complete, quick configuration as nested dictionaries, to be changed by tests."""
    return {
        "name": "run",
        "model": {"path": str(random_base), "dtype": "float32"},
        "data": {
            "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a"},
            "preserve": {"path": str(data_files["preserve"]), "prompt": "q", "samples": 32},
            "max_length": 64,
        },
        "method": {"name": "corda", "mode": "kpm", "rank": 8},
        "train": {
            "max_steps": 20,
            "batch_size": 12,
            "learning_rate": 1.0e-3,
            "save_steps": 10,
            "log_steps": 5,
        },
        "output_dir": str(tmp_path / "runs"),
    }


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a configuration as YAML and give its path."""

    def write(content: dict[str, Any]) -> Path:
        path = tmp_path / f"{content['name']}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture(scope="session", autouse=True)
def gangs_end() -> Iterator[None]:
    """End the gangs that were kept for all tests."""
    yield
    end_gangs()


def gang_command(config: Path, ranks: int, *overrides: str) -> list[str]:
    """The command that starts ``ranks`` real ranks for this run alone."""
    return start_command(ranks, SCRIPT, "--config", str(config), f"train.ranks={ranks}", *overrides)


def run_gang(config: Path, ranks: int, *overrides: str) -> None:
    """Run calibrate → init → prepare → train → export on ``ranks`` ranks; fails with the output if they fail."""
    run_in_gang(ranks, "--config", str(config), f"train.ranks={ranks}", *overrides)
