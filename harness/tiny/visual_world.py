"""A visual world: small images of coloured shapes, and questions about them with short answers.

What stands in an image follows from a seed. Four kinds of question are *old*, the base model answers them: which shape,
which colour, how many of a colour, and what stands in a position. One is *new* and takes two steps: how many things
have the colour of a named shape. A question is asked only where it has one answer.
"""

import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from harness.files import write_bytes, write_jsonl, write_text

# A shape is where a point at (x, y) from its middle, in units of its radius, belongs to it; y points down.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.9,
    "triangle": lambda x, y: (y <= 0.8) & (abs(x) <= (y + 1) * 0.6),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
}
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 80, 235),
    "yellow": (235, 215, 40),
    "purple": (165, 50, 200),
    "white": (245, 245, 245),
}
SIDE = 3  # an image is a grid of SIDE × SIDE places; each holds one thing or none
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
OLD_KINDS = ("shape", "colour", "count", "position")
NEW_KIND = "same_colour"
KINDS = (*OLD_KINDS, NEW_KIND)
SUITE = "visual_world"
MOST = 3  # the highest count that is asked for

_SUBJECTS = ("The school", "The old well", "My house", "The market", "A small garden", "The bridge", "The tower")
_VERBS = ("stands in the", "lies in the", "is found in the", "was built in the")
_ENDS = ("of the map.", "of the page.", "of the plan.", "of the valley.")


@dataclass(frozen=True)
class VisualWorldOptions:
    """How many images, and how large.

    Attributes:
        seed: everything follows from it.
        size: height and width of an image, in pixels.
        train: images for training; of each, one question of every kind is asked.
        test: images for evaluation, the same.
    """

    seed: int = 0
    size: int = 48
    train: int = 2000
    test: int = 250


@dataclass(frozen=True)
class Thing:
    """A coloured shape.

    Attributes:
        shape, colour: names.
        place: which of the SIDE² places, row by row.
        radius: share of half a place that it fills.
        shift: where its middle is, from the middle of the free room in its place: -1 to 1, right and down.
        light: how bright its colour is, 1 for full.
    """

    shape: str
    colour: str
    place: int
    radius: float
    shift: tuple[float, float]
    light: float


@dataclass(frozen=True)
class Scene:
    """What an image shows: things in different places on grey ground (``ground``: 0 to 255)."""

    things: tuple[Thing, ...]
    ground: int

    def draw(self, size: int) -> np.ndarray:
        """The image, uint8 of shape (size, size, 3)."""
        pixels = np.full((size, size, 3), self.ground, dtype=np.uint8)
        half = size / SIDE / 2
        rows, columns = np.mgrid[:size, :size] + 0.5
        for thing in self.things:
            radius = thing.radius * half
            row, column = divmod(thing.place, SIDE)
            x = (columns - half * (2 * column + 1) - thing.shift[0] * (half - radius)) / radius
            y = (rows - half * (2 * row + 1) - thing.shift[1] * (half - radius)) / radius
            pixels[SHAPES[thing.shape](x, y)] = np.round(np.asarray(COLOURS[thing.colour]) * thing.light)
        return pixels

    def questions(self, kind: str) -> list[tuple[str, str]]:
        """Every question of ``kind`` that has one answer here, with its answer."""
        shapes, colours = (Counter(getattr(thing, name) for thing in self.things) for name in ("shape", "colour"))
        if kind == "shape":
            return [(f"What shape is the {t.colour} thing?", t.shape) for t in self.things if colours[t.colour] == 1]
        if kind == "colour":
            return [(f"What colour is the {t.shape}?", t.colour) for t in self.things if shapes[t.shape] == 1]
        if kind == "position":
            return [(f"What is in the {PLACES[t.place]}?", f"{t.colour} {t.shape}") for t in self.things]
        if kind == "same_colour":
            named = [thing for thing in self.things if shapes[thing.shape] == 1]
            return [(f"How many things have the colour of the {t.shape}?", str(colours[t.colour])) for t in named]
        assert kind == "count", kind
        return [(f"How many {colour} things are there?", str(colours[colour])) for colour in COLOURS]

    def ask(self, kind: str, draw: random.Random) -> tuple[str, str]:
        """One question of ``kind`` and its answer; every answer that is possible here is equally likely."""
        questions = self.questions(kind)
        answer = draw.choice(sorted({answer for _, answer in questions}))
        return draw.choice([question for question in questions if question[1] == answer])


def random_scene(draw: random.Random) -> Scene:
    """A scene of which every kind of question can be asked.

    Two to MOST things share a colour, so that high counts are not rare; one to three more have others.
    """
    names = list(SHAPES), list(COLOURS)
    while True:
        shared = draw.choice(names[1])
        others = [colour for colour in names[1] if colour != shared]
        pairs = [(draw.choice(names[0]), shared) for _ in range(draw.randint(2, MOST))]
        pairs += [(draw.choice(names[0]), draw.choice(others)) for _ in range(draw.randint(1, 3))]
        shapes, colours = (Counter(values) for values in zip(*pairs, strict=True))
        if 1 in shapes.values() and 1 in colours.values():
            break
    places = draw.sample(range(SIDE * SIDE), len(pairs))
    things = [
        Thing(
            shape,
            colour,
            place,
            radius=draw.uniform(0.6, 0.85),
            shift=(draw.uniform(-1, 1), draw.uniform(-1, 1)),
            light=draw.uniform(0.85, 1.0),
        )
        for (shape, colour), place in zip(pairs, places, strict=True)
    ]
    return Scene(tuple(things), ground=draw.randint(0, 80))


def sentence(draw: random.Random) -> str:
    """A sentence without an image."""
    return f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(PLACES)} {draw.choice(_ENDS)}"


def vocabulary_text() -> list[str]:
    """Every question, answer and word of a sentence, once: what a tokenizer is trained on."""
    answers = [*SHAPES, *COLOURS, *PLACES, *map(str, range(MOST + 1))]
    questions = [
        *(f"What shape is the {colour} thing?" for colour in COLOURS),
        *(f"What colour is the {shape}?" for shape in SHAPES),
        *(f"How many {colour} things are there?" for colour in COLOURS),
        *(f"What is in the {place}?" for place in PLACES),
        *(f"How many things have the colour of the {shape}?" for shape in SHAPES),
    ]
    longest = max(map(len, (_SUBJECTS, _VERBS, _ENDS)))
    parts = [(words * ceil(longest / len(words)))[:longest] for words in (_SUBJECTS, _VERBS, _ENDS)]
    sentences = [f"{s} {v} {PLACES[i]} {e}" for i, (s, v, e) in enumerate(zip(*parts, strict=True))]
    return [*(f" {answer}" for answer in answers), *questions, *sentences]


def scenes(options: VisualWorldOptions, split: str) -> Iterator[tuple[Scene, random.Random]]:
    """Endless scenes of a split, each with the source of what is drawn about it (its questions)."""
    seeds = random.Random(f"visual world {options.seed} {split}")
    while True:
        draw = random.Random(seeds.getrandbits(64))
        yield random_scene(draw), draw


def png(pixels: np.ndarray) -> bytes:
    """An image, uint8 of shape (height, width, 3), as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_world(folder: Path, options: VisualWorldOptions = VisualWorldOptions()) -> dict[str, int]:
    """Write the images and the questions of a world into ``folder``; the number of rows of each file.

    ``images/<split>/<number>.png``; ``<kind>_<split>.jsonl`` with the columns ``image`` (a path from ``folder``),
    ``question``, ``answer`` and ``kind``; ``old_<split>.jsonl``, the rows of all old kinds, image by image.
    ``suite.yaml``: the test files as evaluation tasks, ``visual_<kind>``, for ``eval.include_path``.
    """
    written = {}
    for split, count in (("train", options.train), ("test", options.test)):
        rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
        for number, (scene, draw) in zip(range(count), scenes(options, split), strict=False):
            image = f"images/{split}/{number:05}.png"
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            (folder / image).write_bytes(png(scene.draw(options.size)))
            for kind in KINDS:
                question, answer = scene.ask(kind, draw)
                rows[kind].append({"image": image, "question": question, "answer": answer, "kind": kind})
        old = [row for of_image in zip(*(rows[kind] for kind in OLD_KINDS), strict=True) for row in of_image]
        for name, content in {**rows, "old": old}.items():
            write_jsonl(folder / f"{name}_{split}.jsonl", content)
            written[f"{name}_{split}"] = len(content)
    write_text(folder / "suite.yaml", yaml.safe_dump(_suite(), sort_keys=False))
    return written


def _suite() -> dict[str, Any]:
    """The test files as a suite (`harness.evaluation.suites`)."""
    tasks = [
        {
            "task": f"visual_{kind}",
            "columns": {"image": "image", "prompt": "question", "response": "answer"},
            "metrics": ["exact_match"],
            "data": {"test": f"{kind}_test"},
        }
        for kind in KINDS
    ]
    return {"suite": SUITE, "kind": "visual", "description": "Questions about the visual world.", "tasks": tasks}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one of the world's JSONL files."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_parquet(rows: Iterable[dict[str, Any]], folder: Path, path: Path) -> None:
    """Write ``rows`` as a parquet file whose column ``image`` holds the images themselves.

    Args:
        rows: as in the JSONL files.
        folder: where their image paths start.
        path: the file; ``image`` becomes a struct of ``bytes`` (the PNG file) and ``path``, as data sets on the hub
            have it.
    """
    import pyarrow
    import pyarrow.parquet

    content = [row | {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]}} for row in rows]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    write_bytes(path, file.getvalue())
