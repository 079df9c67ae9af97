"""A small ViT and a small ConvNeXt-V2 that tell coloured shapes apart, and folders of images of classes old and new.

An image shows one shape in one colour, anywhere, on grey ground; "red circle" is a class. The models are trained here,
from random weights and on images drawn for the purpose, to know the old classes. The new classes have the other shapes:
their colours are known, their forms are not.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ConvNextImageProcessorPil,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.utils import logging as transformers_logging

from harness.console import progress, say
from harness.files import read_json, write_json
from harness.tiny.kept import kept_folder
from harness.tiny.visual_world import COLOURS, SHAPES, png
from harness.training.distributed import name_accelerator

FORMAT = 1  # part of the cache key: raise it when the same options come to mean other files
OLD_SHAPES, NEW_SHAPES = ("circle", "square", "triangle"), ("cross", "ring")
OLD_CLASSES = tuple(f"{colour} {shape}" for shape in OLD_SHAPES for colour in COLOURS)
NEW_CLASSES = tuple(f"{colour} {shape}" for shape in NEW_SHAPES for colour in ("red", "green", "blue"))
Architecture = Literal["vit", "convnextv2"]


@dataclass(frozen=True)
class VisionOptions:
    """What is drawn, how large the model is and how it is trained; equal options give equal files.

    Attributes:
        architecture: ``vit`` or ``convnextv2``.
        seed: images, initial weights and the order of training follow from it.
        size: height and width of an image, in pixels.
        old_train, old_test, new_train, new_test: images of each class.
        hidden, layers, heads, mlp, patch: sizes of the ViT.
        widths, depths, stem: of the ConvNeXt-V2, channels and layers of each stage; side of its first kernel.
        steps, rows: optimiser steps, and images in each.
        learning_rate: AdamW's rate at its highest; it rises over ``warmup`` steps and falls to 0.
    """

    architecture: Architecture = "vit"
    seed: int = 0
    size: int = 32
    old_train: int = 12
    old_test: int = 10
    new_train: int = 40
    new_test: int = 20
    hidden: int = 96
    layers: int = 4
    heads: int = 4
    mlp: int = 288
    patch: int = 8
    widths: tuple[int, ...] = (24, 48, 96)
    depths: tuple[int, ...] = (1, 1, 2)
    stem: int = 2
    steps: int = 1200
    rows: int = 64
    learning_rate: float = 1.5e-3
    warmup: int = 40


@dataclass(frozen=True)
class VisionWorld:
    """The files of one architecture.

    Attributes:
        model: Hugging Face folder of the classifier of the old classes, image processor included.
        old_train, old_test, new_train, new_test: folders with a sub-folder of PNG images for each class.
        info: options, seconds, parameters, and the classifier's accuracy on ``old_test``.
    """

    model: Path
    old_train: Path
    old_test: Path
    new_train: Path
    new_test: Path
    info: dict[str, Any]


def vision_options(architecture: Architecture, seed: int = 0) -> VisionOptions:
    """A classifier that knows the old classes, in about a minute of one slow core."""
    if architecture == "vit":
        return VisionOptions(seed=seed)
    # Convolutions need not be taught that a shape may stand anywhere.
    return VisionOptions(architecture=architecture, seed=seed, steps=500, learning_rate=2e-3)


def build_vision(options: VisionOptions, cache: Path | None = None) -> VisionWorld:
    """The files of ``options``, made on the first call and taken from ``cache`` afterwards.

    Several processes may ask at once: one builds and the others wait for it. What a killed build left is swept away.

    Args:
        options: what to build.
        cache: folder of all worlds; by default ``$PALIMPSEST_CACHE`` or ``~/.cache/palimpsest``.
    """
    content = {"format": FORMAT, **asdict(options)}
    folder = kept_folder("tiny-vision", content, lambda staging: _write(staging, options), cache)
    folders = (folder / "data" / name for name in ("old_train", "old_test", "new_train", "new_test"))
    return VisionWorld(folder / "model", *folders, info=read_json(folder / "info.json"))


def small_vision_options(architecture: Architecture, seed: int = 0) -> VisionOptions:
    """Files that are made inside a test: every part of the larger model, and next to nothing learnt."""
    return VisionOptions(
        architecture=architecture,
        seed=seed,
        size=16,
        old_train=2,
        old_test=1,
        new_train=4,
        new_test=2,
        hidden=32,
        layers=2,
        heads=2,
        mlp=64,
        widths=(8, 16),
        depths=(1, 1),
        steps=2,
        rows=8,
    )


def draw_class(name: str, size: int, draw: random.Random) -> np.ndarray:
    """An image of the class, uint8 of shape (size, size, 3)."""
    colour, shape = name.split()
    radius = draw.uniform(0.22, 0.4) * size
    middle = [draw.uniform(radius, size - radius) for _ in range(2)]
    noise = np.random.default_rng(draw.getrandbits(64)).normal(0, 6, (size, size, 3))
    pixels = draw.randint(0, 90) + noise
    rows, columns = np.mgrid[:size, :size] + 0.5
    inside = SHAPES[shape]((columns - middle[0]) / radius, (rows - middle[1]) / radius)
    pixels[inside] = np.asarray(COLOURS[colour]) * draw.uniform(0.75, 1.0) + noise[inside]
    return pixels.clip(0, 255).round().astype(np.uint8)


def initial_model(options: VisionOptions) -> PreTrainedModel:
    """A classifier of the old classes with random weights, in fp32."""
    labels = {
        "id2label": dict(enumerate(OLD_CLASSES)),
        "label2id": {name: number for number, name in enumerate(OLD_CLASSES)},
    }
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to change
        torch.manual_seed(options.seed)
        if options.architecture == "vit":
            return ViTForImageClassification(
                ViTConfig(
                    hidden_size=options.hidden,
                    num_hidden_layers=options.layers,
                    num_attention_heads=options.heads,
                    intermediate_size=options.mlp,
                    image_size=options.size,
                    patch_size=options.patch,
                    **labels,
                )
            )
        return ConvNextV2ForImageClassification(
            ConvNextV2Config(
                num_stages=len(options.widths),
                hidden_sizes=list(options.widths),
                depths=list(options.depths),
                patch_size=options.stem,
                image_size=options.size,
                **labels,
            )
        )


def make_processor(options: VisionOptions) -> ViTImageProcessorPil | ConvNextImageProcessorPil:
    """The image processor of the architecture, the one for PIL: the other one needs torchvision."""
    if options.architecture == "vit":
        return ViTImageProcessorPil(size={"height": options.size, "width": options.size})
    # Images are as large as the model takes them: nothing is to be cropped.
    return ConvNextImageProcessorPil(size={"shortest_edge": options.size}, crop_pct=1.0)


def pretrain(options: VisionOptions) -> PreTrainedModel:
    """A classifier of the old classes in fp32, trained on images that are drawn anew for every step."""
    model = initial_model(options)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / options.warmup, (options.steps - step) / options.steps)
    )
    batches = _batches(options)
    for _ in progress(range(options.steps), f"pre-training the {options.architecture}"):
        pixels, labels = next(batches)
        F.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: PreTrainedModel, folder: Path) -> float:
    """Share of the images in ``folder``, a sub-folder for each class, that get their class."""
    from PIL import Image

    right = total = 0
    for entry in sorted(folder.iterdir()):
        images = np.stack([np.asarray(Image.open(file)) for file in sorted(entry.iterdir())])
        found = model(pixel_values=_normalised(images)).logits.argmax(-1)
        right += int((found == model.config.label2id[entry.name]).sum())
        total += len(images)
    return right / total


def write_images(folder: Path, classes: tuple[str, ...], count: int, size: int, seed: str) -> None:
    """``count`` PNG images of each class, in a sub-folder for each."""
    draw = random.Random(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:04}.png").write_bytes(png(draw_class(name, size, draw)))


def _write(folder: Path, options: VisionOptions) -> None:
    started = time.monotonic()
    say(f"building the small {options.architecture} and its images, once")
    parts = {"old_train": OLD_CLASSES, "old_test": OLD_CLASSES, "new_train": NEW_CLASSES, "new_test": NEW_CLASSES}
    for name, classes in parts.items():
        seed = f"vision {name} {options.seed}"
        write_images(folder / "data" / name, classes, getattr(options, name), options.size, seed)
    model = pretrain(options)
    transformers_logging.disable_progress_bar()
    name_accelerator()
    model.save_pretrained(folder / "model")
    make_processor(options).save_pretrained(folder / "model")
    info = {
        "options": asdict(options),
        "parameters": model.num_parameters(),
        "accuracy": accuracy(model, folder / "data" / "old_test"),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(folder / "info.json", info)


def _batches(options: VisionOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ``(pixels, labels)`` of the old classes, (rows, 3, size, size) and (rows,)."""
    draw = random.Random(f"vision pretraining {options.seed}")
    while True:
        labels = [draw.randrange(len(OLD_CLASSES)) for _ in range(options.rows)]
        images = np.stack([draw_class(OLD_CLASSES[label], options.size, draw) for label in labels])
        yield _normalised(images), torch.tensor(labels)


def _normalised(images: np.ndarray) -> Tensor:
    """What both image processors make of images of the model's size: uint8 (n, size, size, 3) to (n, 3, size, size)."""
    return ((torch.from_numpy(images).float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
