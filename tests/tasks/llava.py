"""A small random LLaVA with its processor, and data of generated images, as files."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.tiny.visual_pretrain import (
    VisualOptions,
    image_tokens,
    initial_model,
    make_processor,
    small_visual_options,
)
from harness.tiny.visual_world import VisualWorldOptions, write_world

_SMALL = small_visual_options()
# Nine tokens an image: 24 pixels a side, patches of eight.
OPTIONS = VisualOptions(replace(_SMALL.world, size=24), replace(_SMALL.pretrain, patch=8))
IMAGE_TOKENS = image_tokens(OPTIONS)


def write_llava(folder: Path, published: bool = True) -> Path:
    """The model and its processor in ``folder``; some channels are four times the rest.

    ``published``: weights have the names that published LLaVA checkpoints have, which other engines know. Else those
    that transformers gives to a model which it did not load (without ``vision_model`` in the tower's).
    """
    processor = make_processor(OPTIONS)
    model = initial_model(processor, OPTIONS)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.input_layernorm.weight[:2] *= 4
            layer.post_attention_layernorm.weight[5] *= 4
        # Random weights of 0.02 would leave images next to no say in what follows.
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight *= 20
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if published:
        file = folder / "model.safetensors"
        named = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", k): t for k, t in load_file(file).items()}
        save_file(named, file, {"format": "pt"})
    return folder


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(folder: Path) -> dict[str, Path]:
    """``train`` and ``preserve``: questions with images, some without, some with two; ``text``: without any image."""
    write_world(folder, VisualWorldOptions(size=24, train=40, test=12))
    position, old = (
        [json.loads(line) for line in (folder / f"{name}_train.jsonl").read_text().splitlines()]
        for name in ("position", "old")
    )
    train = [{"i": [row["image"]], "q": row["question"], "a": row["answer"]} for row in position]
    for number in range(0, len(train), 4):
        train[number] = {"i": [], "q": f"Say {number}.", "a": f"Here is {number}."}
    for number in range(1, len(train), 8):
        train[number]["i"] = train[number]["i"] + [old[number]["image"]]
    preserve = [{"i": [row["image"]], "q": row["question"]} for row in old[:24]]
    preserve += [{"i": [], "q": f"How far is it to {number}?"} for number in range(8)]
    text = [{"q": f"Count to {number}.", "a": " ".join(map(str, range(number % 7)))} for number in range(24)]
    return {
        name: write_jsonl(folder / f"{name}.jsonl", rows)
        for name, rows in (("train", train), ("preserve", preserve), ("text", text))
    }


@cache
def _made(folder: Path) -> tuple[Path, dict[str, Path]]:
    (folder / "model").mkdir(parents=True)
    (folder / "data").mkdir()
    return write_llava(folder / "model"), write_data(folder / "data")


def configuration(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A complete, quick configuration; the model and its data are made in ``folder`` at the first call.

    ``changes``: keys of the top level, put in the place of whole blocks.
    """
    model, data = _made(folder)
    content: dict[str, Any] = {
        "name": "run",
        "task": "image_text",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": {"path": str(data["train"]), "image": "i", "prompt": "q", "response": "a"},
            "preserve": {"path": str(data["preserve"]), "image": "i", "prompt": "q", "samples": 24},
            "max_length": 64,
        },
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1.0e-3, "save_steps": 2, "log_steps": 1},
        "output_dir": str(output),
    }
    return content | changes
