"""Local tasks of every kind, and adapters whose ranks and scalings differ by layer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.tiny import TinyWorld, build, small_options


@dataclass(frozen=True)
class LocalTasks:
    """Folders of task files and of their data, and the tasks' names."""

    include_path: Path
    data_dir: Path
    names: tuple[str, ...] = ("words_next", "words_choice", "words_perplexity")


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> LocalTasks:
    """A task that generates, one that chooses, one that scores texts; 24 items each."""
    folder = tmp_path_factory.mktemp("evaluation")
    tasks, data = folder / "tasks", folder / "data"
    tasks.mkdir()
    data.mkdir()
    long = [text for text in words if len(text.split()) > 3][:24]
    rows = [
        {
            "text": text,
            "start": " ".join(text.split()[:-1]),
            "end": text.split()[-1],
            "choices": [text.split()[-1], text.split()[0] + " a", "bbbb cc"],
        }
        for text in long
    ]
    (data / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "words.jsonl"}}, "test_split": "test"}
    exact_match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    perplexity = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    write_task(
        tasks / "next.yaml",
        **common,
        task="words_next",
        output_type="generate_until",
        doc_to_text="{{start}}",
        doc_to_target="{{end}}",
        generation_kwargs={"until": ["\n", "c"], "max_gen_toks": 12, "do_sample": False},
        metric_list=[exact_match],
    )
    write_task(
        tasks / "choice.yaml",
        **common,
        task="words_choice",
        output_type="multiple_choice",
        doc_to_text="{{start}}",
        doc_to_target=0,
        doc_to_choice="{{choices}}",
        metric_list=[accuracy],
    )
    write_task(
        tasks / "perplexity.yaml",
        **common,
        task="words_perplexity",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[perplexity],
    )
    return LocalTasks(tasks, data)


def write_task(path: Path, **content: object) -> Path:
    """Write an lm-eval task file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="session")
def served_base(tmp_path_factory: pytest.TempPathFactory, random_base: Path) -> Path:
    """Random weights in a shape that vLLM's attention on the CPU takes (32 numbers a head; `random_base` has 16)."""
    folder = tmp_path_factory.mktemp("served")
    config = AutoConfig.from_pretrained(random_base)
    config.num_attention_heads = config.num_key_value_heads = config.hidden_size // 32
    config.head_dim = 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_world() -> TinyWorld:
    """The small embedded world: a trained base, and its evaluation data."""
    return build(options=small_options())


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a PEFT LoRA with random factors; ranks differ by layer, and so does α/r."""

    def make(base: Path, seed: int, size: float) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules="all-linear",
            rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 17},
            alpha_pattern={"q_proj": 9, "layers.0.self_attn.o_proj": 4},
            init_lora_weights=False,
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=size)
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def merge() -> Callable[[Path, Path, Path], Path]:
    """Merge an adapter into its base by PEFT alone."""

    def write(base: Path, adapter: Path, destination: Path) -> Path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        model.merge_and_unload().save_pretrained(destination)
        AutoTokenizer.from_pretrained(base).save_pretrained(destination)
        return destination

    return write
