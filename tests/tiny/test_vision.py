"""The small image classifiers and their images."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from harness.tiny.vision import (
    NEW_CLASSES,
    OLD_CLASSES,
    Architecture,
    accuracy,
    build_vision,
    draw_class,
    small_vision_options,
    vision_options,
)
from harness.tiny.visual_world import COLOURS

ARCHITECTURES: tuple[Architecture, ...] = ("vit", "convnextv2")


def test_old_and_new_classes_differ_by_shape_alone() -> None:
    assert len(OLD_CLASSES) == 18
    assert len(NEW_CLASSES) == 6
    colours, shapes = ({name.split()[part] for name in NEW_CLASSES} for part in range(2))
    assert colours <= {name.split()[0] for name in OLD_CLASSES}
    assert not shapes & {name.split()[1] for name in OLD_CLASSES}


@pytest.mark.parametrize("name", [*OLD_CLASSES, *NEW_CLASSES])
def test_an_image_shows_its_class(name: str) -> None:
    """Its colour covers a part of it, and a ring and a cross leave free what a circle and a square fill."""
    colour, shape = name.split()
    full = np.asarray(COLOURS[colour], dtype=float)
    covered = []
    for seed in range(10):
        pixels = draw_class(name, 32, random.Random(seed)).astype(float)
        assert pixels.shape == (32, 32, 3)
        # The thing is at least 0.75 as light as its colour, and the ground is grey.
        of_colour = np.abs(pixels - pixels.mean(-1, keepdims=True)).max(-1) > 40 if colour != "white" else None
        thing = of_colour if of_colour is not None else pixels.min(-1) > 150
        covered.append(thing.mean())
        assert np.abs(pixels[thing].mean(0) / full - 0.875).max() <= 0.3
    low, high = (0.03, 0.25) if shape in ("cross", "ring") else (0.05, 0.6)
    assert low <= np.mean(covered) <= high


def test_images_follow_from_the_seed() -> None:
    images = [draw_class("red circle", 16, random.Random(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_build(tmp_path: Path, architecture: Architecture) -> None:
    options = small_vision_options(architecture)
    world = build_vision(options, tmp_path)
    for folder, classes, count in (
        (world.old_train, OLD_CLASSES, options.old_train),
        (world.old_test, OLD_CLASSES, options.old_test),
        (world.new_train, NEW_CLASSES, options.new_train),
        (world.new_test, NEW_CLASSES, options.new_test),
    ):
        assert sorted(entry.name for entry in folder.iterdir()) == sorted(classes)
        assert all(len(list(entry.iterdir())) == count for entry in folder.iterdir())
    files = [
        file
        for folder in (world.old_train, world.old_test, world.new_train, world.new_test)
        for file in folder.glob("*/*")
    ]
    assert len({file.read_bytes() for file in files}) == len(files)
    model = AutoModelForImageClassification.from_pretrained(world.model)
    assert model.config.id2label == dict(enumerate(OLD_CLASSES))
    # What training normalised by hand is what the processor of the folder makes.
    image = Image.open(files[0])
    pixels = AutoImageProcessor.from_pretrained(world.model, backend="pil")(image, return_tensors="pt")["pixel_values"]
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)
    assert world.info["accuracy"] == accuracy(model.eval(), world.old_test)
    before = (world.model / "model.safetensors").stat().st_mtime_ns
    assert build_vision(options, tmp_path).info == world.info
    assert (world.model / "model.safetensors").stat().st_mtime_ns == before  # taken as it is
    other = build_vision(small_vision_options(architecture, seed=1), tmp_path)
    assert other.model != world.model


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_old_classes_are_known(architecture: Architecture) -> None:
    assert build_vision(vision_options(architecture)).info["accuracy"] >= 0.9
