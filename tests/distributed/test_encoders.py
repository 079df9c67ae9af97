"""Encoders under ZeRO-3 on two ranks against one process with the same global batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_gang
from tests.tasks.encoders import columns, rows_of, save_encoder, write_rows

pytestmark = pytest.mark.slow


def trained(folder: Path, base: Path, family: str, task: str, ranks: int, zero: int, method: dict[str, Any]) -> Any:
    """What a run on ``ranks`` ranks trained, by name."""
    name = f"{family}-{task}-{method['name']}-{ranks}"
    train = write_rows(folder / "train.jsonl", rows_of(task, 48))
    content = {
        "name": name,
        "task": task,
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": {"path": train, **columns(task), "samples": 32}, "max_length": 48},
        "method": method,
        "train": {
            "deepspeed": f"ds_configs/zero{zero}.json",
            "max_steps": 12,
            "batch_size": 12,
            "micro_batch_size": 6,
            "learning_rate": 2.0e-3,
            "save_steps": 12,
            "log_steps": 4,
        },
        "output_dir": str(folder),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    run_gang(path, ranks)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((folder / name / "checkpoints" / "step-12" / "trained").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("deberta", "sequence_classification", {"name": "corda", "mode": "ipm", "rank": 4}),
        ("roberta", "question_answering", {"name": "lora", "rank": 4}),
        ("bert", "regression", {"name": "farss", "rank": 4, "shallow_layers": 1}),
    ],
)
def test_two_ranks_under_zero3_equal_one_process(
    family: str, task: str, method: dict[str, Any], tmp_path: Path
) -> None:
    base = save_encoder(tmp_path / "base", family)
    one = trained(tmp_path, base, family, task, 1, 2, method)
    two = trained(tmp_path, base, family, task, 2, 3, method)
    assert one.keys() == two.keys()
    head = [name for name in one if ".lora_" not in name]
    assert head
    for name, tensor in one.items():
        if name == "qa_outputs.bias":  # common to all tokens: it changes no probability, rounding moves it
            continue
        assert float((two[name] - tensor).norm() / tensor.norm().clamp_min(1e-6)) <= 1e-3, name
