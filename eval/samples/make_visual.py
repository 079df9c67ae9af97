"""Write the visual samples beside this file: 20 items of our own per task, in the columns of its data set on the hub.

As `make.py` does for texts. Images are drawn by `harness.tiny.visual_world`; the column ``image`` holds a path from the
folder of its file (on the hub: the image itself). Nothing is taken from the data sets. Run it again after a change:

    python eval/samples/make_visual.py [FOLDER]
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.evaluation.visual_metrics import rotations
from harness.tiny.visual_world import COLOURS, KINDS, SHAPES, Scene, png, random_scene

ITEMS = 20
SIZE = 48
CHINESE = {
    **{"circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字形", "ring": "圆环"},
    **{"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "white": "白色"},
    **{"northwest": "西北", "north": "北边", "northeast": "东北", "west": "西边", "centre": "中间", "east": "东边"},
    **{"southwest": "西南", "south": "南边", "southeast": "东南"},
}
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


def gqa(images: dict[str, Scene]) -> Rows:
    """GQA: questions with one answer each; on the hub images are a configuration of their own, by ``imageId``."""
    rows = []
    for i, scene, draw, path in scenes("gqa"):
        question, answer = scene.ask(KINDS[i % len(KINDS)], draw)
        images[path] = scene
        rows.append(
            {
                "id": f"20{i:07}",
                "imageId": f"n{i}",
                "question": question,
                "answer": answer,
                "fullAnswer": f"It is {answer}.",
                "isBalanced": True,
                "image": path,
            }
        )
    return rows


def vizwiz(images: dict[str, Scene]) -> Rows:
    """VizWiz: ten answers of people; every fourth question is about something that the image does not show."""
    rows = []
    for i, scene, draw, path in scenes("vizwiz"):
        absent = [shape for shape in SHAPES if shape not in {thing.shape for thing in scene.things}]
        question, answer = scene.ask(KINDS[i % 3], draw)
        if i % 4 == 3 and absent:
            question, answer = f"What colour is the {draw.choice(absent)}?", "unanswerable"
        images[path] = scene
        rows.append(
            {
                "question_id": f"sample_{i:08}.png",
                "question": question,
                "answers": [answer] * 8 + draw.sample(["unsuitable", f"a {answer}", "unanswerable"], 2),
                "category": "unanswerable" if answer == "unanswerable" else "other",
                "image": path,
            }
        )
    return rows


def textvqa(images: dict[str, Scene]) -> Rows:
    """TextVQA: ten answers of people, texts alone. Its questions are about writing; ours, without any, are not."""
    rows = []
    for i, scene, draw, path in scenes("textvqa"):
        question, answer = scene.ask(KINDS[i % 4], draw)
        images[path] = scene
        rows.append(
            {
                "image_id": f"{i:016x}",
                "question_id": 35000 + i,
                "question": question,
                "question_tokens": question.rstrip("?").lower().split(),
                "image": path,
                "answers": draw.sample([answer] * 9 + [f"{answer} thing"], 10),
                "ocr_tokens": [],
                "set_name": "val",
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
    return circular("mmbench", images, lambda text: text, "There are nine positions.")


def mmbench_cn(images: dict[str, Scene]) -> Rows:
    """MMBench-CN: the same form, in Chinese."""

    def translated(text: str) -> str:
        if text.startswith("What is in the "):
            return f"{CHINESE[text.removeprefix('What is in the ').rstrip('?')]}有什么?"
        colour, shape = text.split()
        return f"{CHINESE[colour]}的{CHINESE[shape]}"

    return circular("mmbench_cn", images, translated, "共有九个位置。")


def circular(task: str, images: dict[str, Scene], say: Callable[[str], str], hint: str) -> Rows:
    """Questions about places with four options, in all rotations; ``say`` puts a question or an option into words."""
    rows: Rows = []
    for i, scene, draw, path in scenes(task):
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
                    "question": say(question),
                    "hint": hint if i % 2 else None,
                    "answer": "ABCD"[correct],
                    **dict(zip("ABCD", map(say, turned), strict=True)),
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


SPLITS = {
    **{vqav2: "validation", gqa: "testdev", vizwiz: "val", textvqa: "validation"},
    **{scienceqa: "test", mmbench: "dev", mmbench_cn: "dev", pope: "test"},
}


def files() -> dict[str, bytes]:
    """Every sample's content by its path."""
    content = {}
    for make, split in SPLITS.items():
        images: dict[str, Scene] = {}
        rows = make(images)
        folder = f"visual/{make.__name__}"
        content[f"{folder}/{split}.jsonl"] = "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows
        ).encode()
        content |= {f"{folder}/{path}": png(scene.draw(SIZE)) for path, scene in images.items()}
    return content


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, content in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
