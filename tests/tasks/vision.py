"""Small image classifiers, their data in every form, and what is computed of them the plain way."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from harness.config import RunConfig, resolve
from harness.data.collation import Batch, collate
from harness.data.tokenisation import Row
from harness.tiny.vision import Architecture, VisionWorld
from tests.statistics.direct_gradients import Matrices

ARCHITECTURES: tuple[Architecture, ...] = ("vit", "convnextv2")


def content(world: VisionWorld, folder: Path, **blocks: Any) -> dict[str, Any]:
    """A complete, quick configuration; ``blocks`` are laid over it, dictionaries key by key."""
    found: dict[str, Any] = {
        "name": "run",
        "task": "image_classification",
        "model": {"path": str(world.model), "dtype": "float32"},
        "data": {
            "train": {"path": str(world.new_train)},
            "preserve": {"path": str(world.old_train), "samples": 16},
            "validation": {"path": str(world.new_test)},
        },
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 1.0e-2, "save_steps": 3, "log_steps": 1},
        "eval": {"knowledge": ["preserve"], "task": ["validation"]},
        "output_dir": str(folder / "runs"),
    }
    for name, block in blocks.items():
        found[name] = {**found.get(name, {}), **block} if isinstance(block, dict) and name != "method" else block
    return found


def configured(world: VisionWorld, folder: Path, **blocks: Any) -> RunConfig:
    """`content`, resolved."""
    return resolve(content(world, folder, **blocks))


def files_of(folder: Path) -> list[Path]:
    """The images of a folder of classes, class by class."""
    return sorted(folder.glob("*/*.png"))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], label: Any = None) -> Path:
    """Rows with ``image`` as a path, as data sets on the hub have them: bytes in a struct, labels as ``label``."""
    import datasets

    whole = [row | {"image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in rows]
    features = {"image": datasets.Image(), "label": label or datasets.Value("string")}
    datasets.Dataset.from_list(whole, features=datasets.Features(features)).to_parquet(path)
    return path


def damaged(file: Path) -> bytes:
    """The first half of a JPEG."""
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole, "JPEG")
    file.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return file.read_bytes()


def batches_of(rows: Sequence[Row], size: int) -> list[Batch]:
    return [collate(rows[start : start + size], 0) for start in range(0, len(rows), size)]


def direct_statistics(model: nn.Module, modules: dict[str, nn.Linear], rows: Sequence[Row]) -> tuple[Matrices, Any]:
    """All three kinds of every layer for itself, in float64, image by image; and how many rows each layer read.

    ``model`` is of float64.
    """
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
        inputs[name], outputs[name] = given.detach().reshape(-1, given.shape[-1]), output

    for name, module in modules.items():
        module.register_forward_hook(lambda _, given, output, name=name: keep(name, given[0], output))
    sums: Matrices = {"input_covariance": {}, "output_gradient_covariance": {}, "weight_gradient": {}}
    counts = dict.fromkeys(modules, 0)
    for row in rows:
        logits = model(pixel_values=row.tensors()["pixel_values"].double()).logits[0]
        gradients = torch.autograd.grad(-logits.log_softmax(-1)[row.answer], list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            x, g = inputs[name], gradient.reshape(-1, gradient.shape[-1])
            counts[name] += len(x)
            for kind, product in (
                ("input_covariance", x.T @ x),
                ("output_gradient_covariance", g.T @ g),
                ("weight_gradient", g.T @ x),
            ):
                sums[kind][name] = sums[kind].get(name, 0) + product
    means: Matrices = {
        kind: {name: total / (len(rows) if kind == "weight_gradient" else counts[name]) for name, total in own.items()}
        for kind, own in sums.items()
    }
    return means, counts
