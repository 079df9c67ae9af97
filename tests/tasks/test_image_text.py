"""Questions about images: rows, statistics, targets, stored names, answers, and what a user can do wrong."""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    PreTrainedModel,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from harness import preflight
from harness.adapters.lora import attach_lora
from harness.cli import main
from harness.config import ModelConfig, RunConfig, resolve
from harness.data.collation import collate, stack
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.evaluation.direct import scored
from harness.evaluation.suites import VisualTask, expand, read_suites
from harness.export.merge import write_merged
from harness.methods.base import LowRank
from harness.models.calling import arguments
from harness.models.filling import fill_passes
from harness.models.loading import load_model
from harness.models.quantisation import quantise_linears
from harness.models.sharing import input_groups
from harness.models.stored_names import parameter_names
from harness.models.streaming import decoder_blocks
from harness.models.targets import (
    adapted_modules,
    freeze_vision,
    language_model,
    projector_of,
    quantised_modules,
    target_modules,
    vision_tower,
)
from harness.models.weights import BaseWeights, empty_model
from harness.stages.calibrate import probe_inputs
from harness.statistics.kept import KeptStatistics
from harness.statistics.loss import Labels
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident
from harness.statistics.statistic import KINDS, Kind, Statistic
from harness.statistics.streamed import collect_streamed
from harness.tasks.image_text import ImageRow, ImageText, Question
from harness.tasks.registry import load_task
from harness.tiny.visual_world import write_parquet
from tests.tasks.llava import IMAGE_TOKENS, configuration, write_jsonl, write_llava

BOUND = 1e-5
REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava")


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A configuration with keys of ``model``, ``data.train`` or the top level changed."""

    def made(model: Any = None, train: Any = None, data: Any = None, **changes: Any) -> RunConfig:
        content = configuration(folder / "world", tmp_path)
        content["model"] |= model or {}
        content["data"] |= data or {}
        content["data"]["train"] = content["data"]["train"] | (train or {})
        return resolve(content | changes)

    return made


@pytest.fixture
def task(make: Callable[..., RunConfig]) -> ImageText:
    found = load_task(make())
    assert isinstance(found, ImageText)
    return found


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return resolve(configuration(folder / "world", tmp_path_factory.mktemp("runs"))).model


@pytest.fixture
def model(base: ModelConfig) -> PreTrainedModel:
    return load_model(base)


def questions(task: ImageText, key: str = "train") -> list[Question]:
    return task.read(getattr(task.config.data, key), f"data.{key}")


def rows_of(task: ImageText, key: str = "train") -> list[Row]:
    return task.rows(questions(task, key))


# -- rows -----------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_processor_makes_of_the_conversation(task: ImageText) -> None:
    processor = task.reader
    asked = questions(task)
    assert sorted({len(question.images) for question in asked}) == [0, 1, 2]
    for question, row in zip(asked, task.rows(asked), strict=True):
        content = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": question.prompt}]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": question.answers[0]}]},
        ]
        text = processor.apply_chat_template(turns)
        images = [picture.open() for picture in question.images]
        expected = processor(text=[text], images=images or None, return_tensors="pt")
        assert row.input_ids == expected["input_ids"][0].tolist()
        assert row.input_ids.count(task.image_id) == IMAGE_TOKENS * len(images)
        assert row.input_ids[-1] == task.tokenizer.eos_token_id
        assert row.tensors().keys() == ({"pixel_values"} if images else set())
        if images:
            assert torch.equal(row.tensors()["pixel_values"], expected["pixel_values"])
        # The loss is on the answer and the token that ends it, and on nothing else.
        labelled = [label for label in row.labels if label != IGNORED]
        assert task.tokenizer.decode(labelled) == f" {question.answers[0]}</s>"
        assert row.labels[-len(labelled) :] == labelled == row.input_ids[-len(labelled) :]


def test_batches_have_the_images_of_their_rows_in_order(task: ImageText) -> None:
    rows = rows_of(task)[:6]
    batch = collate(rows, task.pad_id)
    pictures = [picture for row in rows for picture in row.images]  # type: ignore[attr-defined]
    assert torch.equal(batch["pixel_values"], task.process([picture.open() for picture in pictures])["pixel_values"])
    assert int((batch["input_ids"] == task.image_id).sum()) == IMAGE_TOKENS * len(pictures)
    first, second = collate(rows[:2], task.pad_id), collate(rows[2:], task.pad_id)
    both = stack(first, second, task.pad_id)
    assert both.keys() == batch.keys()
    assert all(torch.equal(both[name], batch[name]) for name in batch)
    text = [row for row in rows if not row.images]  # type: ignore[attr-defined]
    assert "pixel_values" not in collate(text, task.pad_id)


def test_rows_without_an_answer_have_a_loss_on_their_text_alone(task: ImageText) -> None:
    for row in rows_of(task, "preserve"):
        assert row.labels == [IGNORED if token == task.image_id else token for token in row.input_ids]


def test_images_as_contents_in_parquet_are_the_same_rows(task: ImageText, make: Any, tmp_path: Path) -> None:
    data = Path(task.config.data.train.path).parent
    source = [json.loads(line) for line in (data / "position_train.jsonl").read_text().splitlines()][:6]
    write_parquet(source, data, tmp_path / "rows.parquet")
    columns = {"image": "image", "prompt": "question", "response": "answer"}
    paths = {**columns, "path": str(write_jsonl(tmp_path / "rows.jsonl", source)), "image_folder": str(data)}
    found = [rows_of(load_task(make(train=t))) for t in ({**columns, "path": str(tmp_path / "rows.parquet")}, paths)]
    for contents, files in zip(*found, strict=True):
        assert contents.input_ids == files.input_ids
        assert torch.equal(contents.tensors()["pixel_values"], files.tensors()["pixel_values"])
        assert contents.digests() == files.digests() != []


@pytest.mark.parametrize("form", ["struct", "data URI"])
def test_images_as_base64_in_json_lines_are_the_same_rows(
    task: ImageText, make: Any, tmp_path: Path, form: str
) -> None:
    data = Path(task.config.data.train.path).parent
    source = [json.loads(line) for line in (data / "position_train.jsonl").read_text().splitlines()][:6]
    texts = [base64.b64encode((data / row["image"]).read_bytes()).decode() for row in source]
    images = [{"bytes": text} if form == "struct" else f"data:image/png;base64,{text}" for text in texts]
    whole = [row | {"image": image} for row, image in zip(source, images, strict=True)]
    columns = {"image": "image", "prompt": "question", "response": "answer"}
    paths = {**columns, "path": str(write_jsonl(tmp_path / "rows.jsonl", source)), "image_folder": str(data)}
    contents = {**columns, "path": str(write_jsonl(tmp_path / "whole.jsonl", whole))}
    preflight.check(make(train=contents))
    found = [rows_of(load_task(make(train=t))) for t in (contents, paths)]
    for own, files in zip(*found, strict=True):
        assert own.input_ids == files.input_ids
        assert torch.equal(own.tensors()["pixel_values"], files.tensors()["pixel_values"])
        assert own.digests() == files.digests() != []


def test_image_tokens_in_the_prompt_say_where_images_stand(make: Any, tmp_path: Path) -> None:
    task = load_task(make())
    image = str(Path(task.config.data.train.path).parent / "images/train/00000.png")
    rows = [
        {"i": [image], "q": "<image>\nWhich shape?", "a": "ring"},
        {"i": [image, image], "q": "Is <image> like <image>?", "a": "yes"},
        {"i": [image], "q": "Which shape?", "a": "ring"},
    ]
    task = load_task(make(train={"path": str(write_jsonl(tmp_path / "x.jsonl", rows))}))
    asked = questions(task)
    assert task.texts(asked[0]) == task.texts(asked[2])
    assert [row.input_ids.count(task.image_id) for row in task.rows(asked)] == [IMAGE_TOKENS, 2 * IMAGE_TOKENS, 9]


def test_without_a_chat_template_rows_are_written_as_llava_reads_them(
    task: ImageText, capsys: pytest.CaptureFixture[str]
) -> None:
    with_template = rows_of(task)
    task.reader.chat_template = None
    assert [row.input_ids for row in rows_of(task)] == [row.input_ids for row in with_template]
    assert [row.labels for row in rows_of(task)] == [row.labels for row in with_template]


def test_that_there_is_no_chat_template_is_said(folder: Path, make: Any, tmp_path: Path, capsys: Any) -> None:
    processor = AutoProcessor.from_pretrained(folder / "world" / "model")
    processor.chat_template = None
    processor.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    task = load_task(make(model={"path": str(tmp_path / "bare")}))
    assert task.reader.chat_template is None
    assert "has no chat template; rows are written as LLaVA-1.5 reads them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "lead", "close"),
    [
        # llava-1.5's own: no end token, a space after the answer.
        (
            "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content if c.type == 'image' %}"
            "{{ '<image>\n' }}{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
            " ",
            "</s>",
        ),
        # A turn that a special token other than the end of text closes, and a line break after it.
        (
            "{% for m in messages %}{{ m.role + '\n' }}{% for c in m.content %}{{ '<image>' if c.type == 'image' else "
            "c.text }}{% endfor %}{{ '<pad>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
            "",
            "<pad>",
        ),
        # One that ends text itself, and begins it.
        (
            "<s>{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
            "{% endfor %}{{ '|' if m.role == 'user' else '</s>' }}{% endfor %}",
            "",
            "</s>",
        ),
        # One that writes a finished turn otherwise than the one that begins.
        (
            "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
            "{% endfor %}{{ '|' }}{% endfor %}{% if add_generation_prompt %}{{ 'think!' }}{% endif %}",
            " ",
            "</s>",
        ),
    ],
)
def test_other_chat_templates(task: ImageText, template: str, lead: str, close: str) -> None:
    task.reader.chat_template = template
    for question in questions(task)[:4]:
        row = task._row(question, None)
        labelled = [label for label in row.labels if label != IGNORED]
        assert task.tokenizer.decode(labelled) == f"{lead}{question.answers[0]}{close}"
        assert row.labels[-len(labelled) :] == labelled
        assert row.input_ids.count(task.tokenizer.bos_token_id) == 1
        # What is answered to begins exactly as what was learned.
        (asked,) = task.rows([Question(question.prompt, True, question.images)])
        assert row.input_ids[: len(asked.input_ids)] == asked.input_ids
        assert len(asked.input_ids) + len(labelled) == len(row.input_ids)


def test_text_templates_are_for_rows_without_an_image(make: Any, folder: Path) -> None:
    text = {"path": str(folder / "world" / "data" / "text.jsonl"), "image": None, "template": "alpaca"}
    task = load_task(make(train=text, data={"max_length": 256}))
    row = rows_of(task)[3]
    assert task.tokenizer.decode(row.input_ids).startswith("<s>Below is an instruction")
    assert task.tokenizer.decode([label for label in row.labels if label != IGNORED]).endswith("2</s>")


def test_multiple_choice_and_what_to_say(make: Any, tmp_path: Path) -> None:
    rows = [
        {"q": "Which?", "hint": "Look.", "one": ["a ring", "a cross"], "A": "x", "B": "y", "C": None, "right": right}
        for right in (1, "B", "a cross")
    ]
    columns = {"prompt": "q", "pair": "hint", "image": None, "response": "right", "instruction": "One letter."}
    for number, row in enumerate(rows):  # a column of a data set has one type
        path = str(write_jsonl(tmp_path / f"{number}.jsonl", [row]))
        (asked,) = questions(load_task(make(train={**columns, "path": path, "options": ["one"]})))
        assert asked.prompt == "Look.\nWhich?\nA. a ring\nB. a cross\nOne letter."
        assert (asked.answers, asked.options) == (("B",), ("a ring", "a cross"))
    path = str(write_jsonl(tmp_path / "columns.jsonl", rows[1:2]))
    (asked,) = questions(load_task(make(train={**columns, "path": path, "options": ["A", "B", "C"]})))
    assert asked.options == ("x", "y")


def test_the_most_frequent_of_several_answers_is_learned(make: Any, tmp_path: Path) -> None:
    answers = ["two", "2", "2", "three"]
    rows = [{"q": "How many?", "a": [{"answer": a} for a in answers]}]
    task = load_task(make(train={"path": str(write_jsonl(tmp_path / "x.jsonl", rows)), "image": None}))
    (asked,) = questions(task)
    assert asked.answers == ("2", "2", "two", "three")
    assert task.texts(asked)[1] == " 2</s>"


# -- what a user can do wrong: one line, exit code 2 ------------------------------------------------------------------


def lines(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def bad_rows(folder: Path, image: Path) -> Path:
    (folder / "cut.png").write_bytes(image.read_bytes()[:60])
    images = [str(image), "nowhere.png", "cut.png", str(image)]
    return write_jsonl(folder / "bad.jsonl", [{"i": i, "q": "What?", "a": f"{n}"} for n, i in enumerate(images)])


def test_bad_images_are_refused_or_skipped(make: Any, folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = bad_rows(tmp_path, folder / "world/data/images/train/00000.png")
    with pytest.raises(UserError) as error:
        questions(load_task(make(train={"path": str(path)})))
    assert lines(error).startswith(f"data.train.image: row 1 of bad.jsonl: {tmp_path}/nowhere.png: no such file; ")
    task = load_task(make(train={"path": str(path)}, data={"bad_images": "skip"}))
    assert [question.answers for question in questions(task)] == [("0",), ("3",)]
    assert "data.train: 2 of 4 rows left out for bad images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "change", "says"),
    [
        ({"q": "<image> What?", "images": 2}, {}, "row 0 of x.jsonl has 2 images for 1 × <image> in its text"),
        ({"q": "<image> and <image>?", "images": 1}, {}, "row 0 of x.jsonl has 1 image for 2 × <image> in its text"),
        ({"q": "<image> What?", "images": 0}, {}, "row 0 of x.jsonl has 0 images for 1 × <image> in its text"),
        ({"q": "What?", "images": 1}, {"train": {"template": "alpaca"}}, "its template has no place for one"),
        ({"q": "word " * 60, "images": 1, "late": True}, {}, "data.max_length: 64 given; row 0 of x.jsonl has "),
        ({"q": "What?", "images": 1}, {"data": {"max_length": 9}}, "9 of them the image; raise it"),
        ({"q": "What?", "images": 1, "a": "<image>"}, {}, "row 0 of x.jsonl has 1 image for 2 × <image> in its text"),
        ({"q": None, "images": 1}, {}, "data.train.prompt: row 0 of x.jsonl has no value in 'q'"),
        ({"q": "What?", "images": 1, "a": None}, {}, "data.train.response: row 0 of x.jsonl has no value in 'a'"),
        ({"q": "What?", "images": 1, "a": "7"}, {"train": {"options": ["o"]}}, "which is no answer among 2 options"),
        ({"q": "What?", "images": 1}, {"train": {"options": ["p"]}}, "data.train.options: no column 'p'"),
    ],
)
def test_rows_that_cannot_be(make: Any, folder: Path, tmp_path: Path, row: Any, change: Any, says: str) -> None:
    image = str(folder / "world/data/images/train/00000.png")
    prompt = f"{row['q']} <image>" if row.get("late") else row["q"]
    content = {"q": prompt, "a": row.get("a", "yes"), "i": [image] * row["images"], "o": ["yes", "no"]}
    other = {"q": "x", "a": "x", "i": [image], "o": ["x"]}  # gives columns that would be empty a type
    path = write_jsonl(tmp_path / "x.jsonl", [content, other])
    config = make(train={"path": str(path), **change.get("train", {})}, data=change.get("data"))
    task = load_task(config)
    if row.get("late"):  # the processor's template writes images first, whatever the prompt says
        task.reader.chat_template = None
    with pytest.raises(UserError) as error:
        rows_of(task)
    assert says in lines(error)


def test_a_chat_template_without_images(task: ImageText) -> None:
    task.reader.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(UserError) as error:
        rows_of(task)
    assert "the chat template of" in lines(error) and "writes none" in lines(error)
    task.reader.chat_template = "{{ raise_exception('no!') }}"
    with pytest.raises(UserError) as error:
        rows_of(task)
    assert "the chat template of" in lines(error) and "no!" in lines(error)


def test_models_without_such_a_processor(make: Any, random_base: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.path: ") as error:
        _ = load_task(make(model={"path": str(random_base)})).reader
    lines(error)


def test_image_processors_that_cut_images_up(task: ImageText) -> None:
    class Parts:
        def __call__(self, images: Any, **_: Any) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(len(images), 5, 3, 24, 24)}

    row = next(row for row in rows_of(task) if row.tensors())
    task.reader.image_processor = Parts()
    with pytest.raises(UserError, match="cuts images into parts"):
        row.tensors()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"anchor": {"tokens": "answer"}}, "anchor.tokens: answer given"),
        ({"data": {"replay": {"ratio": 0.5, "answers": True}}}, "data.replay.answers: true given"),
        ({"train": {"image_folder": "/nowhere"}}, "data.train.image_folder: /nowhere: no such folder"),
        ({"train": {"image": None, "image_folder": "/"}}, "data.train.image: missing"),
        ({"train": {"image": "picture"}}, "data.train.image: no column 'picture'"),
        ({"method": {"name": "lora", "rank": 65}}, "method.rank: 65 given"),
        ({"model": {"target_modules": ["q_projection"]}}, "did you mean 'q_proj'?"),
    ],
)
def test_what_is_seen_before_a_model_is_loaded(make: Any, changes: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        preflight.check(make(**changes))
    assert says in lines(error)


# Of rows of a source, what no image needs to be opened for: (row, keys of the source, message).
WRONG_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "more images than places": ({"q": "<image>?", "n": 2}, {}, "row 1 of x.jsonl has 2 images for 1 × <image> in"),
    "more places than images": ({"q": "<image> <image>?"}, {}, "row 1 of x.jsonl has 1 image for 2 × <image> in"),
    "a place without an image": ({"q": "<image>?", "n": 0}, {}, "row 1 of x.jsonl has 0 images for 1 × <image> in"),
    "a template without a place": ({}, {"template": "alpaca"}, "has 1 image, and its template has no place for one"),
    "no question": ({"q": None}, {}, ".prompt: row 1 of x.jsonl has no value in 'q'"),
    "no answer": ({"a": None}, {}, ".response: row 1 of x.jsonl has no value in 'a'"),
    "no such option": ({"a": "7"}, {"options": ["o"]}, "row 1 of x.jsonl has '7' in 'a', which is no answer among 2"),
    "no such column": ({}, {"options": ["p"]}, ".options: no column 'p'"),
}


def wrong_rows(tmp_path: Path, row: dict[str, Any], image: str = "never opened.png") -> Path:
    content = {"q": row.get("q", "What?"), "a": row.get("a", "yes"), "i": [image] * row.get("n", 1), "o": ["yes", "no"]}
    good = {"q": "What?", "a": "yes", "i": ["never opened.png"], "o": ["yes", "no"]}
    # A template without a place for images is wrong for every row with one.
    return write_jsonl(tmp_path / "x.jsonl", [good | {"i": []}, content, good | {"i": []}])


@pytest.mark.parametrize("wrong", WRONG_ROWS)
@pytest.mark.parametrize("key", ["train", "validation", "preserve"])
def test_wrong_rows_are_seen_before_a_model_is_loaded(make: Any, tmp_path: Path, key: str, wrong: str) -> None:
    row, columns, says = WRONG_ROWS[wrong]
    source = {"path": str(wrong_rows(tmp_path, row)), "image": "i", "prompt": "q", "response": "a", **columns}
    changes: dict[str, Any] = {"train": source} if key == "train" else {"data": {key: source}}
    with pytest.raises(UserError) as error:
        preflight.check(make(**changes, eval={"knowledge": ["preserve"]} if key == "preserve" else {}))
    assert says in lines(error)
    if says.startswith("."):
        assert lines(error).startswith(f"data.{key}.")


def test_places_of_images_in_answers_count_where_they_are_read(make: Any, tmp_path: Path) -> None:
    path = wrong_rows(tmp_path, {"a": "<image>"})
    source = {"path": str(path), "image": "i", "prompt": "q", "response": "a"}
    preflight.check(make(data={"validation": source}, eval={"task": ["validation"]}))
    with pytest.raises(UserError, match=r"row 1 of x\.jsonl has 1 image for 2 × <image> in"):
        preflight.check(make(train=source))


@pytest.mark.parametrize("good", [False, True])
def test_wrong_rows_that_are_skipped_for_their_images_pass(make: Any, folder: Path, tmp_path: Path, good: bool) -> None:
    """They are left out when rows are read, so nothing is wrong with the source."""
    image = str(folder / "world/data/images/train/00000.png") if good else "nowhere.png"
    path = wrong_rows(tmp_path, {"q": "<image>?", "n": 2}, image)
    config = make(train={"path": str(path)}, data={"bad_images": "skip"})
    if good:
        with pytest.raises(UserError, match=r"row 1 of x\.jsonl has 2 images for 1 × <image>"):
            preflight.check(config)
        return
    preflight.check(config)
    assert len(rows_of(load_task(config))) == 2


def test_what_is_scored_has_right_answers(make: Any, tmp_path: Path) -> None:
    bare = {"path": str(wrong_rows(tmp_path, {})), "image": "i", "prompt": "q"}
    answered = bare | {"response": "a"}
    for key, where in (("validation", "task"), ("preserve", "knowledge")):
        with pytest.raises(UserError) as error:
            preflight.check(make(data={key: bare}, eval={where: [key]}))
        assert lines(error) == (f"data.{key}.response: missing; eval names {key!r}, and its rows need right answers")
        preflight.check(make(data={key: answered}, eval={where: [key]}))
        preflight.check(make(data={key: bare}))  # what is not asked for a score needs none
    # A loss on the text of what is to be preserved needs none either.
    preflight.check(make(data={"preserve": bare}, anchor={"kl": 1.0}))


def test_what_suites_score_has_right_answers(make: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", [{"q": "What?", "a": "yes"}])
    task = {"task": "mine", "columns": {"prompt": "q"}, "metrics": ["exact_match"], "data": {"test": "mine.jsonl"}}
    suite = {"suite": "my_visual", "kind": "visual", "description": "Mine.", "tasks": [task]}
    options = {"task": ["mine"], "data_dir": str(tmp_path), "include_path": str(tmp_path), "backend": "hf"}
    for columns, says in (({"prompt": "q"}, "eval: 'mine' has no column of right answers"), ({"response": "a"}, None)):
        task["columns"] = {"prompt": "q"} | columns
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
        if says is None:
            preflight.check(make(eval=options))
            continue
        with pytest.raises(UserError) as error:
            preflight.check(make(eval=options))
        assert lines(error).startswith(says)


@pytest.mark.parametrize("wrong", ["more images than places", "a template without a place", "no answers to score"])
def test_wrong_rows_end_the_command_with_one_line(
    folder: Path, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if wrong == "no answers to score":
        row, columns, says = {}, {"response": None}, "data.validation.response: missing; eval names 'validation'"
    else:
        row, columns, says = WRONG_ROWS[wrong]
    source = {"path": str(wrong_rows(tmp_path, row)), "image": "i", "prompt": "q", "response": "a"}
    content = configuration(folder / "world", tmp_path / "runs", eval={"task": ["validation"]})
    content["data"] = content["data"] | {"validation": source | columns}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("sys.argv", ["harness", "run", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: data") and says in line
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_what_passes(make: Any) -> None:
    preflight.check(make(method={"name": "lora", "rank": 64}))  # the vision tower is 32 wide, and not adapted
    full_name = "model.language_model.layers.0.self_attn.q_proj"
    for targets in (["q_proj"], [full_name], ["model.vision_tower.encoder.layers.0.self_attn.q_proj"], ["linear_1"]):
        preflight.check(make(model={"target_modules": targets}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train.path=bad.jsonl", "error: data.train.image: row 1 of bad.jsonl: "),
        ("data.max_length=9", "error: data.max_length: 9 given; row 1 of train.jsonl has "),
    ],
)
def test_mistakes_are_one_line_and_code_2(folder: Path, tmp_path: Path, override: str, says: str) -> None:
    content = configuration(folder / "world", tmp_path)
    bad_rows(tmp_path, folder / "world/data/images/train/00000.png")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    command = [str(Path(sys.executable).parent / "harness"), "run", "run.yaml", "train.ranks=1", override]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    wrong = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(wrong) == 1 and wrong[0].startswith(says), done.stderr
    assert "Traceback" not in done.stderr


# -- targets, and what is frozen --------------------------------------------------------------------------------------


def test_all_linear_is_the_language_model(base: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    model = empty_model(base)
    parts = (language_model(model), vision_tower(model), projector_of(model))
    assert parts == ("model.language_model", "model.vision_tower", "model.multi_modal_projector")
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    language = {name for name in every if name.startswith("model.language_model.")}
    projector = {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"}
    assert len(language) == 14 and projector <= every
    adapted = base.model_copy(update={"projector": "adapted"})
    full = base.model_copy(update={"projector": "full"})
    assert adapted_modules(model, base).keys() == adapted_modules(model, full).keys() == language
    assert adapted_modules(model, adapted).keys() == language | projector
    assert quantised_modules(model, base).keys() == language
    assert quantised_modules(model, adapted).keys() == language | projector
    assert full.trained_modules == ("multi_modal_projector",)
    # A last part of a name never reaches the tower by accident; a layer of the tower can be asked for.
    attention = target_modules(model, ["q_proj", "v_proj"])
    assert attention.keys() == {name for name in language if name.endswith(("q_proj", "v_proj"))}
    assert "vision tower" not in capsys.readouterr().err
    asked = "model.vision_tower.encoder.layers.1.mlp.fc1"
    config = base.model_copy(update={"target_modules": ["q_proj", asked]})
    assert adapted_modules(model, config).keys() == {n for n in language if n.endswith("q_proj")} | {asked}
    assert f"'{asked}' is in the vision tower" in capsys.readouterr().err
    assert quantised_modules(model, config).keys() == language | {asked}


def test_what_trains_a_whole_model_leaves_the_tower(base: ModelConfig, random_base: Path) -> None:
    for projector in ("frozen", "full"):
        model = empty_model(base).requires_grad_(True)
        freeze_vision(model, base.model_copy(update={"projector": projector}))
        frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"vision_tower"} | ({"multi_modal_projector"} if projector == "frozen" else set())
    text = empty_model(ModelConfig(path=str(random_base), dtype="float32")).requires_grad_(True)
    freeze_vision(text, base)
    assert all(parameter.requires_grad for parameter in text.parameters())
    assert language_model(text) is None


# -- names in files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [True, False])
def test_weights_are_read_under_the_names_of_files(tmp_path: Path, published: bool) -> None:
    config = ModelConfig(path=str(write_llava(tmp_path / "model", published)), dtype="float32")
    config._task = "image_text"
    loaded, empty = load_model(config), empty_model(config)
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        names = parameter_names(empty, file.keys())
        assert names.keys() == set(file.keys())
    stem = "vision_tower.vision_model." if published else "vision_tower."
    assert names[f"{stem}post_layernorm.bias"] == "model.vision_tower.post_layernorm.bias"
    assert names["language_model.lm_head.weight"] == "lm_head.weight"
    assert names["language_model.model.norm.weight"] == "model.language_model.norm.weight"
    weights = BaseWeights(config, empty)
    assert weights.complete
    for name, parameter in loaded.named_parameters():
        assert torch.equal(weights.read(name), parameter), name


@pytest.mark.parametrize("published", [True, False])
def test_merging_keeps_the_names_of_files(tmp_path: Path, published: bool) -> None:
    path = str(write_llava(tmp_path / "model", published))
    torch.manual_seed(0)
    layer, whole = "model.language_model.layers.1.mlp.down_proj", "model.multi_modal_projector.linear_2.bias"
    update, bias = LowRank(torch.randn(64, 3), torch.randn(3, 128), 0.5), torch.randn(64)
    (tmp_path / "merged").mkdir()
    write_merged(
        tmp_path / "merged", path, torch.float32, {layer: update}, {whole: bias}, shard_bytes=2**17, task="image_text"
    )
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 1
    stored = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    with safe_open(Path(path) / "model.safetensors", framework="pt") as tensors:
        assert stored == set(tensors.keys())
    own, other = (
        AutoModelForImageTextToText.from_pretrained(p, dtype=torch.float32) for p in (path, tmp_path / "merged")
    )
    for name, expected in own.state_dict().items():
        if name == whole:
            expected = bias
        if name == f"{layer}.weight":
            expected = expected + update.dense().float()
        assert torch.equal(other.get_parameter(name), expected), name
    assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template is not None
    with pytest.raises(UserError, match=r"stores no tensor called model\.nothing\.weight"):
        write_merged(tmp_path / "merged", path, torch.float32, {"model.nothing": update}, task="image_text")


def test_nf4_takes_the_language_model_alone(base: ModelConfig) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(base)
    quantise_linears(model, quantised_modules(model, base), {}, torch.float32, True, CPU)
    quantised = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert quantised == adapted_modules(empty_model(base), base).keys()


# -- statistics: visual and text tokens, against plain hooks in float64 -----------------------------------------------


def selected(task: ImageText, which: str) -> list[Row]:
    rows = rows_of(task)
    kinds = {
        "text": [row for row in rows if not row.images],  # type: ignore[attr-defined]
        "image": [row for row in rows if row.images],  # type: ignore[attr-defined]
        "mixed": rows,
    }
    return kinds[which][:7]


def direct(
    model: PreTrainedModel, modules: dict[str, nn.Linear], rows: list[Row]
) -> dict[str, dict[str, torch.Tensor]]:
    """All kinds of every layer, in float64, from unpadded batches of one; and how many rows each layer read."""
    sums = {kind: dict.fromkeys(modules, 0.0) for kind in KINDS} | {"rows": dict.fromkeys(modules, 0)}
    labelled = 0
    for row in rows:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str, given: torch.Tensor, output: torch.Tensor, seen: Any = seen) -> None:
            seen[name] = (given.detach().flatten(0, -2), output)

        handles = [
            module.register_forward_hook(lambda _, given, output, name=name: keep(name, given[0], output))
            for name, module in modules.items()
        ]
        pixels = {name: tensor.double() for name, tensor in row.tensors().items()}
        logits = model(input_ids=torch.tensor([row.input_ids]), **pixels).logits[0]
        for handle in handles:
            handle.remove()
        places = [(p, label) for p, label in enumerate(row.labels) if p > 0 and label != IGNORED]
        labelled += len(places)
        loss = sum((-logits[place - 1].log_softmax(-1)[token] for place, token in places), start=logits.sum() * 0)
        names = list(seen)
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            x, g = seen[name][0], gradient.flatten(0, -2)
            sums["rows"][name] += len(x)
            sums["input_covariance"][name] = sums["input_covariance"][name] + x.T @ x
            sums["output_gradient_covariance"][name] = sums["output_gradient_covariance"][name] + g.T @ g
            sums["weight_gradient"][name] = sums["weight_gradient"][name] + g.T @ x
    for kind in KINDS:
        for name in modules:
            sums[kind][name] = sums[kind][name] / (labelled if kind == "weight_gradient" else sums["rows"][name])
    return sums


Found = dict[Kind, dict[str, Statistic]]


def resident(task: ImageText, model: PreTrainedModel, rows: list[Row], kinds: tuple[Kind, ...], size: int) -> Found:
    modules = adapted_modules(model, task.config.model)
    groups = input_groups(model, modules, probe_inputs(model, task, rows[0], CPU))
    batches = [collate(rows[i : i + size], task.pad_id) for i in range(0, len(rows), size)]
    found: Found = {kind: {} for kind in kinds}
    for kind, name, matrix, tokens in collect_resident(model, modules, groups, batches, kinds, Labels(), Reduction()):
        found[kind][name] = Statistic(matrix, tokens)
    return served(found, groups, kinds)


def streamed(task: ImageText, rows: list[Row], kinds: tuple[Kind, ...], size: int) -> Found:
    config = task.config.model
    model = empty_model(config)
    modules, groups = adapted_modules(model, config), {}
    batches = [collate(rows[i : i + size], task.pad_id) for i in range(0, len(rows), size)]
    collected = collect_streamed(
        model,
        BaseWeights(config, model),
        modules,
        [batches, batches[:1]],
        collate([task.probe_row(rows[0])], task.pad_id),
        kinds,
        Labels(),
        CPU,
        Reduction(),
        groups,
    )
    found: Found = {kind: {} for kind in kinds}
    with closing(collected):
        for number, kind, name, matrix, tokens in collected:
            if number == 0:
                found[kind][name] = Statistic(matrix, tokens)
    return served(found, groups, kinds)


def served(found: Found, groups: dict[str, str], kinds: tuple[Kind, ...]) -> Found:
    """Statistics of every layer, also of those that share an input with another."""
    if "input_covariance" not in kinds:
        return found
    shared = {name: found["input_covariance"][first] for name, first in groups.items()}
    return {**found, "input_covariance": shared}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("which", "projector"),
    [("text", "frozen"), ("image", "frozen"), ("image", "adapted"), ("mixed", "frozen"), ("mixed", "adapted")],
)
def test_statistics_equal_plain_hooks(make: Any, which: str, projector: str) -> None:
    task = load_task(make(model={"projector": projector}))
    rows = selected(task, which)
    model = load_model(task.config.model)
    ways = {
        "resident": resident(task, model, rows, KINDS, 3),
        "inputs alone": resident(task, model, rows, ("input_covariance",), 7),
        "streamed": streamed(task, rows, KINDS, 2),
        "streamed inputs": streamed(task, rows, ("input_covariance",), 3),
    }
    modules = adapted_modules(model, task.config.model)
    expected = direct(model.double(), modules, rows)
    images = sum(len(row.images) for row in rows)  # type: ignore[attr-defined]
    tokens = sum(len(row.input_ids) for row in rows)
    for way, found in ways.items():
        for kind, own in found.items():
            assert own.keys() == modules.keys(), (way, kind)
            for name, statistic in own.items():
                assert relative(statistic.matrix, expected[kind][name]) <= BOUND, (way, kind, name)
                if kind != "weight_gradient":
                    of_images = "multi_modal_projector" in name
                    # Visual and text tokens both count; the projector's are the visual ones.
                    assert statistic.tokens == (images * IMAGE_TOKENS if of_images else tokens)
                    assert statistic.tokens == expected["rows"][name]


def test_another_model_with_the_same_processor(make: Any, folder: Path, tmp_path: Path) -> None:
    """VipLlava: features of several layers of the tower, and a projector that normalises them first."""
    llava = folder / "world" / "model"
    described = LlavaConfig.from_pretrained(llava)
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=described.vision_config,
            text_config=described.text_config,
            image_token_index=described.image_token_id,
            vision_feature_layers=[-2, -1],
        )
    )
    model.save_pretrained(tmp_path / "vip")
    AutoProcessor.from_pretrained(llava).save_pretrained(tmp_path / "vip")
    task = load_task(make(model={"path": str(tmp_path / "vip"), "projector": "adapted"}))
    rows = selected(task, "mixed")[:4]
    empty = empty_model(task.config.model)
    assert BaseWeights(task.config.model, empty).complete
    modules = adapted_modules(model, task.config.model)
    assert len(modules) == 16
    found = [resident(task, load_model(task.config.model), rows, KINDS, 2), streamed(task, rows, KINDS, 3)]
    expected = direct(model.double(), modules, rows)
    for way in found:
        for kind, own in way.items():
            for name, statistic in own.items():
                assert relative(statistic.matrix, expected[kind][name]) <= BOUND, (kind, name)


def test_a_projector_that_nothing_comes_to(make: Any) -> None:
    task = load_task(make(model={"projector": "adapted"}))
    rows = selected(task, "text")
    with pytest.raises(UserError, match=r"no sampled row comes to model\.multi_modal_projector\.linear_1"):
        resident(task, load_model(task.config.model), rows, ("input_covariance",), 3)


def test_the_blocks_are_the_language_models(base: ModelConfig) -> None:
    model = empty_model(base)
    layers = [*adapted_modules(model, base), "model.multi_modal_projector.linear_1"]
    assert decoder_blocks(model, layers).names == [f"model.language_model.layers.{n}" for n in range(2)]
    with pytest.raises(UserError, match=r"streamed cannot reach model\.multi_modal_projector\.linear_1"):
        decoder_blocks(model, layers[-1:])


def test_rows_of_equal_tokens_and_other_images_are_other_rows(task: ImageText, base: ModelConfig) -> None:
    first, second = (row for row in rows_of(task) if len(getattr(row, "images", ())) == 1 and True), None
    rows = [next(first), next(first)]
    assert rows[0].digests() != rows[1].digests()
    second = ImageRow(rows[0].input_ids, rows[0].labels, images=rows[1].images, process=task.process)  # type: ignore[attr-defined]
    kept = KeptStatistics(None, base, ["layer"], Labels())  # type: ignore[arg-type]
    contents = [kept._content("input_covariance", [row]) for row in (rows[0], second)]
    assert contents[0] != contents[1]
    text = [Row([1, 2], [1, 2])]
    assert "tensors" not in kept._content("input_covariance", text)


def test_probes_keep_whole_images(task: ImageText, model: PreTrainedModel) -> None:
    for row in rows_of(task)[:6]:
        probe = task.probe_row(row)
        assert len(probe.input_ids) < len(row.input_ids)
        with torch.no_grad():
            model(**arguments(model, collate([probe], task.pad_id)))


# -- passes without an image ------------------------------------------------------------------------------------------


def test_filled_passes_are_the_same_passes(task: ImageText, base: ModelConfig) -> None:
    rows = selected(task, "mixed")
    batches = [collate(rows, task.pad_id), collate(selected(task, "text"), task.pad_id), collate(rows[:1], task.pad_id)]
    batches.append({"input_ids": torch.tensor([[0]]), "attention_mask": torch.tensor([[1]])})
    plain, filled = (
        attach_lora(load_model(base), dict.fromkeys(adapted_modules(empty_model(base), base), 2), 1.0) for _ in "ab"
    )
    filled.load_state_dict(plain.state_dict())
    fill_passes(filled, task.filler(), task.pad_id)
    seen: list[int] = []
    filled.get_base_model().model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    for number, batch in enumerate(batches):
        results = []
        for model in (plain, filled):
            logits = model(**arguments(model, batch)).logits
            logits.square().mean().backward()
            results.append((logits, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
            model.zero_grad()
        (expected, gradients), (found, own) = results
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for one, other in zip(gradients, own, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
        assert len(seen) == number + 1
    columns = torch.tensor([0, 2])
    few = filled(**arguments(filled, batches[1]), logits_to_keep=columns).logits
    torch.testing.assert_close(few, plain(**arguments(plain, batches[1])).logits[:, columns], rtol=1e-4, atol=1e-4)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_greedy_and_the_same_in_every_batch(
    task: ImageText, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.tasks.image_text.ANSWER_TOKENS", 8)
    asked = questions(task)[:7]
    found = task.predict(model, asked, 3)
    processor = task.reader
    for question, answer in zip(asked, found, strict=True):
        before, _ = task.texts(question)
        images = [picture.open() for picture in question.images]
        inputs = processor(text=[before], images=images or None, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(set(found)) > 1


def test_answers_end_where_the_template_ends_a_turn(task: ImageText) -> None:
    assert task.turn_end == task.tokenizer.eos_token_id
    other = load_task(task.config)
    other.reader.chat_template = "{% for m in messages %}{{ m.content[-1].text }}<pad>{% endfor %}"
    assert other.turn_end == task.tokenizer.pad_token_id


def test_questions_that_the_model_cannot_read(task: ImageText, model: PreTrainedModel) -> None:
    assert task.context == 256
    long = Question("word " * 100, True, where="row 7 of x.jsonl")
    with pytest.raises(UserError, match=r"eval: row 7 of x\.jsonl has \d+ tokens, and the model reads 256 at most"):
        task.predict(model, [long], 1)


def test_scores_of_answers(task: ImageText) -> None:
    asked = [
        Question("Q\nA. x\nB. y", True, answers=("A",), options=("x", "y")),
        Question("Q\nA. y\nB. x", True, answers=("B",), options=("y", "x")),
        Question("R\nA. x\nB. y", True, answers=("B",), options=("x", "y")),
    ]
    assert task.score("multiple_choice", ["A", "x", "A"], asked) == [1.0, 1.0, 0.0]
    assert task.score("circular_accuracy", ["A", "x", "A"], asked) == 0.5
    yes_no = [Question("Q", True, answers=(a,)) for a in ("yes", "no", "yes")]
    assert task.score("pope_f1", ["Yes.", "no", "No"], yes_no) == pytest.approx(2 / 3)
    assert task.score("exact_match", ["Yes", "no", "maybe"], yes_no) == [1.0, 1.0, 0.0]
    ten = [Question("Q", True, answers=("2",) * 2 + ("two",) * 8)]
    assert task.score("vqa_accuracy", ["two"], ten) == [1.0]
    with pytest.raises(UserError, match="vqa_accuracy of task 'image_text' cannot be taken"):
        task.score("vqa_accuracy", ["two"], yes_no[:1])
    with pytest.raises(UserError, match="row 0 has no right answer"):
        task.score("exact_match", ["two"], [Question("Q", True)])
    shown = task.shown(ten[0], "3")
    assert (shown.question, shown.expected, shown.answer) == ("Q", "two | 2", "3")


VISUAL_TASKS = ["vqav2", "gqa", "vizwiz", "textvqa", "scienceqa", "mmbench", "mmbench_cn", "pope"]


def test_the_visual_suite() -> None:
    suite = read_suites()["visual"]
    assert suite.kind == "visual"
    assert suite.names == VISUAL_TASKS
    with pytest.raises(UserError, match=r"'visual' is for models that read images \(task: image_text\)"):
        expand(["visual"])


@pytest.fixture
def samples(make: Any) -> Iterator[Callable[[str], Any]]:
    from harness.evaluation.direct import questions as direct_questions

    config = make(eval={"task": ["visual"], "data_dir": str(REPOSITORY / "eval" / "samples"), "backend": "hf"})
    preflight.check(config)
    found = {question.name: question for question in direct_questions(config, ["visual"])}
    yield lambda name: found[name]


@pytest.mark.parametrize("name", VISUAL_TASKS)
def test_right_answers_to_the_samples_score_one(samples: Callable[[str], Any], name: str) -> None:
    question = samples(name)
    asked = question.asked
    assert len(asked) == 20
    images = [len(example.images) for example in asked]
    assert images.count(1) == (15 if name == "scienceqa" else 20)
    right = [example.answers[0] for example in asked]
    score, items = scored(question, right)
    assert score.value == 1.0 and score.items == len(items) == 20
    wrong, _ = scored(question, ["" for _ in asked])
    assert wrong.value < 0.7
    if question.metrics[0] == "multiple_choice":
        assert "\nA. " in asked[0].prompt and asked[0].prompt.endswith("directly.")


def test_what_the_hub_has_in_two_parts_is_named_where_it_is_missing(make: Any, tmp_path: Path) -> None:
    config = make(eval={"task": ["gqa"], "data_dir": str(tmp_path), "backend": "hf"})
    with pytest.raises(UserError, match=r"'gqa' has no data: .*lmms-lab/GQA, joined as docs/llava.md shows, save it"):
        preflight.check(config)


def test_entries_of_visual_suites_are_validated() -> None:
    with pytest.raises(ValueError, match="metrics"):
        VisualTask(task="x", columns={}, metrics=("bleu",), data={})


def test_a_picture_is_opened_once_per_batch(task: ImageText) -> None:
    file = io.BytesIO()
    Image.new("RGB", (50, 20)).save(file, "PNG")
    opened: list[int] = []
    from harness.data.images import Picture

    def find() -> bytes:
        opened.append(1)
        return file.getvalue()

    (row,) = task.rows([Question("What?", True, (Picture("row 0", find),), ("x",))])
    before = len(opened)
    assert row.tensors()["pixel_values"].shape == (1, 3, 24, 24)
    assert len(opened) == before + 1
