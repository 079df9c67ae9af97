"""Write the visual samples beside this file: 20 items of our own per task, in the columns of its data set on the hub.

As `make.py` does for texts. Images are drawn by `harness.tiny.visual_world`; the column ``image`` holds a path from the
folder of its file (on the hub: the image itself). Nothing is taken from the data sets. Run it again after a change:

    python eval/samples/make_visual.py [FOLDER]
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.evaluation.visual_metrics import rotations
from harness.tiny.visual_world import COLOURS, KINDS, SHAPES, Scene, png, random_scene

ITEMS = 20
SIZE = 48
HERE = Path(__file__).resolve().parent

Rows = list[dict[str, Any]]


def scenes(task: str) -> Iterator[tuple[int, Scene, random.Random, str]]:
    """ITEMS scenes of a task: number, scene, source of what is drawn about it, and the path of its image."""
    for i in range(ITEMS):
        draw = random.Random(f"{task} {i}")
        yield i, random_scene(draw), draw, f"images/{i:012}.png"


def vqav2(images: dict[str, Scene]) -> Rows:
    """VQAv2: open questions, each with the answers of ten people, who do not always agree."""
    rows = []
    for i, scene, draw, path in scenes("vqav2"):
        question, answer = scene.ask(KINDS[i % 4], draw)
        others = ["not sure", f"maybe {answer}", f"a {answer}"]
        given = [answer] * draw.randint(5, 10)
        given = draw.sample(given + [draw.choice(others) for _ in range(10 - len(given))], 10)
        images[path] = scene
        rows.append(
            {
                "question_type": " ".join(question.lower().split()[:2]),
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": text, "answer_confidence": "yes" if text == answer else "maybe", "answer_id": person}
                    for person, text in enumerate(given, 1)
                ],
                "image_id": i,
                "answer_type": "number" if answer.isdecimal() else "other",
                "question_id": 1000 * i,
                "question": question,
                "image": path,
            }
        )
    return rows


def scienceqa(images: dict[str, Scene]) -> Rows:
    """ScienceQA: choices and the number of the right one, from 0; every fourth question has no image."""
    rows = []
    for i, scene, draw, path in scenes("scienceqa"):
        if i % 4 == 3:
            path, answer = None, str(draw.randint(2, 9))
            question, hint = f"Which number is larger than {int(answer) - 1}?", "Whole numbers are compared here."
            choices = [answer, str(int(answer) - 1)]
            solution = f"{answer} is larger than {int(answer) - 1}."
        else:
            images[path] = scene
            kind = ("shape", "colour", "count")[i % 4]
            question, answer = scene.ask(kind, draw)
            names = {"shape": SHAPES, "colour": COLOURS, "count": map(str, range(5))}[kind]
            choices = [answer, *draw.sample([name for name in names if name != answer], 1 + i % 3)]
            hint, solution = "", f"Look at the image: it is {answer}."
        choices = draw.sample(choices, len(choices))
        rows.append(
            {
                "image": path,
                "question": question,
                "choices": choices,
                "answer": choices.index(answer),
                "hint": hint,
                "task": "closed choice",
                "grade": f"grade{2 + i % 7}",
                "subject": "natural science",
                "topic": "physics",
                "category": "Shapes and numbers",
                "skill": "Look and compare",
                "lecture": "Things have shapes and colours, and can be counted.",
                "solution": solution,
            }
        )
    return rows


def mmbench(images: dict[str, Scene]) -> Rows:
    """MMBench: five questions with four options, each asked in its four rotations, whose indices differ by 10⁶."""
    rows: Rows = []
    for i, scene, draw, path in scenes("mmbench"):
        if i >= ITEMS // 4:
            break
        images[path] = scene
        question, answer = scene.ask("position", draw)
        others = [name for colour in COLOURS for shape in SHAPES if (name := f"{colour} {shape}") != answer]
        options = draw.sample([answer, *draw.sample(others, 3)], 4)
        for turn, (turned, correct) in enumerate(rotations(options, options.index(answer))):
            rows.append(
                {
                    "index": turn * 10**6 + i,
                    "question": question,
                    "hint": "There are nine positions." if i % 2 else None,
                    "answer": "ABCD"[correct],
                    **dict(zip("ABCD", turned, strict=True)),
                    "category": "object_localization",
                    "image": path,
                    "source": "sample",
                    "L2-category": "finegrained_perception (instance-level)",
                    "comment": None,
                    "split": "dev",
                }
            )
    return sorted(rows, key=lambda row: row["index"])


def pope(images: dict[str, Scene]) -> Rows:
    """POPE: is something there or not, half of each. Categories are names here: what is absent is any thing."""
    rows = []
    for i, scene, draw, path in scenes("pope"):
        present = Counter(f"{thing.colour} {thing.shape}" for thing in scene.things)
        absent = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in present]
        wanted = ("yes", "no")[i % 2]
        images[path] = scene
        rows.append(
            {
                "id": str(i),
                "question_id": str(i + 1),
                "question": f"Is there a {draw.choice(sorted(present) if wanted == 'yes' else absent)} in the image?",
                "answer": wanted,
                "image_source": f"sample_{i:012}",
                "image": path,
                "category": ("random", "popular", "adversarial")[i // 2 % 3],
            }
        )
    return rows


def files() -> dict[str, bytes]:
    """Every sample's content by its path."""
    content = {}
    for make, split in ((vqav2, "validation"), (scienceqa, "test"), (mmbench, "dev"), (pope, "test")):
        images: dict[str, Scene] = {}
        rows = make(images)
        folder = f"visual/{make.__name__}"
        content[f"{folder}/{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        content |= {f"{folder}/{path}": png(scene.draw(SIZE)) for path, scene in images.items()}
    return content


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, content in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
