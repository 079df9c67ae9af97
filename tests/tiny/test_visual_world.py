"""The visual world: questions against their images, the files, the processor's tokens, and the model's folder."""

import importlib.util
import io
import json
import random
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from harness.evaluation.visual_metrics import circular_accuracy, exact_match, multiple_choice, pope, vqa_accuracy
from harness.files import sha256
from harness.tiny import visual_pretrain
from harness.tiny.visual_pretrain import (
    VisualOptions,
    VisualWorld,
    build_visual,
    conversations,
    image_tokens,
    initial_model,
    make_processor,
    messages,
    normalised,
    small_visual_options,
)
from harness.tiny.visual_world import (
    COLOURS,
    KINDS,
    MOST,
    OLD_KINDS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    VisualWorldOptions,
    random_scene,
    read_rows,
    scenes,
    write_parquet,
)

SAMPLES = Path(__file__).parents[2] / "eval" / "samples"


@pytest.fixture(scope="module")
def shown() -> list[Scene]:
    return [scene for scene, _ in islice(scenes(VisualWorldOptions(), "test"), 200)]


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return make_processor(VisualOptions())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> VisualWorld:
    return build_visual(tmp_path_factory.mktemp("cache"), small_visual_options())


# -- Images and questions ---------------------------------------------------------------------------------------------


def colour_seen(pixels: np.ndarray, ground: int) -> str | None:
    """The nearest colour, in direction, to the brightest pixel that is not ground; None if all is ground."""
    other = pixels[(pixels != ground).any(-1)].astype(float)
    if not len(other):
        return None
    pixel = other[other.sum(-1).argmax()]
    return max(COLOURS, key=lambda name: pixel @ np.array(COLOURS[name]) / np.linalg.norm(COLOURS[name]))


def test_images_show_what_the_scene_says(shown: list[Scene]) -> None:
    for scene in shown:
        pixels = scene.draw(48)
        assert (pixels.shape, pixels.dtype) == ((48, 48, 3), np.uint8)
        of_place = {thing.place: thing.colour for thing in scene.things}
        for place in range(9):
            row, column = divmod(place, 3)
            cell = pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert colour_seen(cell, scene.ground) == of_place.get(place)


def test_shapes_differ_and_have_the_size_that_they_should() -> None:
    drawn = {}
    for shape in SHAPES:
        thing = Thing(shape, "white", place=4, radius=0.8, shift=(0.0, 0.0), light=1.0)
        drawn[shape] = (Scene((thing,), ground=0).draw(480) > 0).all(-1)
    share = {shape: mask.sum() / 64**2 for shape, mask in drawn.items()}  # in squares of the radius
    assert share["circle"] == pytest.approx(np.pi, rel=0.01)
    assert share["square"] == pytest.approx(1.8**2, rel=0.05)
    assert share["triangle"] == pytest.approx(1.8 * 2 * 1.08 / 2, rel=0.03)
    assert share["cross"] == pytest.approx(2 * 2 * 0.6 - 0.36, rel=0.05)
    assert share["ring"] == pytest.approx(np.pi * 0.7, rel=0.01)
    assert drawn["triangle"][:240].sum() < drawn["triangle"][240:].sum()  # it stands on its base


def matching(scene: Scene, words: list[str]) -> list[Thing]:
    """The things that a question's words describe, found without the code that asks."""
    named = {*words} & {*SHAPES, *COLOURS}
    return [thing for thing in scene.things if named <= {thing.shape, thing.colour}]


def test_every_question_has_the_one_answer_that_is_given(shown: list[Scene]) -> None:
    for scene in shown:
        for kind in KINDS:
            questions = scene.questions(kind)
            assert questions, kind
            for question, answer in questions:
                if kind == "position":
                    (one,) = [t for t in scene.things if question == f"What is in the {PLACES[t.place]}?"]
                    assert answer == f"{one.colour} {one.shape}"
                    continue
                things = matching(scene, question.rstrip("?").split())
                if kind == "same_colour":
                    (one,) = things
                    assert answer == str(sum(thing.colour == one.colour for thing in scene.things))
                    continue
                if kind == "count":
                    assert answer == str(len(things))
                    assert len(things) <= MOST
                else:
                    assert len(things) == 1
                    one = things[0]
                    assert answer == {"shape": one.shape, "colour": one.colour}[kind]


def test_scenes_are_varied_and_asked_without_a_favourite() -> None:
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for scene, draw in islice(scenes(VisualWorldOptions(), "train"), 1500):
        assert len({thing.place for thing in scene.things}) == len(scene.things)
        for kind in KINDS:
            answers[kind][scene.ask(kind, draw)[1]] += 1
    counts = [str(number) for number in range(MOST + 1)]
    possible = {"shape": SHAPES, "colour": COLOURS, "count": counts, "same_colour": counts[1:]}
    possible["position"] = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for kind, counted in answers.items():
        assert set(counted) == set(possible[kind])
        assert max(counted.values()) < 0.42 * 1500, kind


def test_seed_and_split_decide_everything() -> None:
    def some(seed: int, split: str) -> list[tuple[Scene, float]]:
        return [(scene, draw.random()) for scene, draw in islice(scenes(VisualWorldOptions(seed=seed), split), 20)]

    assert some(0, "train") == some(0, "train")
    drawn = [{str(scene) for scene, _ in some(*which)} for which in ((0, "train"), (0, "test"), (1, "train"))]
    assert len(set.union(*drawn)) == 60


# -- Files ------------------------------------------------------------------------------------------------------------


def test_files_of_every_kind_and_split(world: VisualWorld) -> None:
    for split, count in (("train", 40), ("test", 20)):
        for kind in KINDS:
            rows = read_rows(world.data_dir / f"{kind}_{split}.jsonl")
            assert len(rows) == count == world.info["counts"][f"{kind}_{split}"]
            assert {tuple(row) for row in rows} == {("image", "question", "answer", "kind")}
            assert {row["kind"] for row in rows} == {kind}
            for row in rows:
                with Image.open(world.data_dir / row["image"]) as image:
                    assert (image.size, image.mode, image.format) == ((24, 24), "RGB", "PNG")
        old = read_rows(world.data_dir / f"old_{split}.jsonl")
        assert Counter(row["kind"] for row in old) == dict.fromkeys(OLD_KINDS, count)
    assert read_rows(world.train) == read_rows(world.data_dir / "same_colour_train.jsonl")
    assert {row["kind"] for row in read_rows(world.preserve)} == set(OLD_KINDS)


def test_no_image_is_in_both_splits(world: VisualWorld) -> None:
    images = [sha256(path) for path in (world.data_dir / "images").rglob("*.png")]
    assert len(images) == len(set(images)) == 60


def test_parquet_holds_the_images_themselves(world: VisualWorld, tmp_path: Path) -> None:
    rows = read_rows(world.data_dir / "shape_test.jsonl")
    write_parquet(rows, world.data_dir, tmp_path / "shape.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "shape.parquet").to_pylist()
    assert [row | {"image": row["image"]["path"]} for row in table] == rows
    for row in table:
        stored = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert (stored == np.asarray(Image.open(world.data_dir / row["image"]["path"]))).all()


# -- Processor --------------------------------------------------------------------------------------------------------


def test_the_chat_template_is_that_of_llava() -> None:
    processor = make_processor(small_visual_options())
    asked = [*messages("How many?", images=2), {"role": "assistant", "content": "2"}, *messages("Where?", images=0)]
    rendered = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert rendered == "USER: <image>\n<image>\nHow many? ASSISTANT: 2</s>USER: Where? ASSISTANT:"


@pytest.mark.parametrize("images", [0, 1, 3])
def test_image_and_text_tokens_are_counted(processor: LlavaProcessor, images: int) -> None:
    text = processor.apply_chat_template(messages("What colour is the ring?", images), add_generation_prompt=True)
    pictures = [Image.new("RGB", (48, 48), "red")] * images
    inputs = processor(images=pictures or None, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 9 * images == image_tokens(VisualOptions()) * images
    parts = processor.tokenizer(text.split("<image>"), add_special_tokens=False)["input_ids"]
    assert [token for token in ids[1:] if token != processor.image_token_id] == [
        token for part in parts for token in part
    ]
    assert ids[0] == processor.tokenizer.bos_token_id


def test_pre_training_reads_what_the_processor_makes(processor: LlavaProcessor) -> None:
    options = VisualOptions()
    options = replace(options, pretrain=replace(options.pretrain, images=3, questions=2, sentences=5))
    ids, labels, pixels = next(conversations(processor, options))
    assert (ids.shape[0], pixels.shape) == (3 + 2, (3, 3, 48, 48))
    assert ids.shape == labels.shape
    tokenizer = processor.tokenizer
    pictures = normalised_back(pixels, processor)
    for row, learnt, picture in zip(ids[:3], labels[:3], pictures, strict=True):
        length = int((row != tokenizer.pad_token_id).sum())
        text = tokenizer.decode(row[:length])
        text = text.replace("<image>" * 9, "<image>").removeprefix("<s>")
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == row[:length].tolist()
        parts = [part.split("</s>")[0] for part in text.split(" ASSISTANT:")[1:]]
        assert len(parts) == 2
        assert tokenizer.decode(learnt[learnt >= 0]) == "".join(f"{part}</s>" for part in parts)
        assert (row[learnt >= 0] == learnt[learnt >= 0]).all()
    for row, learnt in zip(ids[3:], labels[3:], strict=True):
        assert processor.image_token_id not in row
        assert (learnt[row != tokenizer.pad_token_id] == row[row != tokenizer.pad_token_id]).all()
    assert not any(tokenizer.decode(row).count("have the colour of") for row in ids)


def normalised_back(pixels: torch.Tensor, processor: LlavaProcessor) -> list[Image.Image]:
    """The images whose pixel values these are; the processor must make the same values of them."""
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    images = ((pixels * deviation + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    again = processor.image_processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, again, rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised(images, processor.image_processor), again, rtol=0, atol=1e-5)
    return [Image.fromarray(image) for image in images]


# -- Model ------------------------------------------------------------------------------------------------------------


def test_the_default_model_has_two_to_four_million_parameters(processor: LlavaProcessor) -> None:
    with torch.device("meta"):
        model = initial_model(processor, VisualOptions())
    assert 2_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.image_seq_length == 9


def test_the_model_is_a_plain_hugging_face_folder(world: VisualWorld) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(world.model)
    loaded = AutoProcessor.from_pretrained(world.model)
    assert isinstance(loaded, LlavaProcessor)
    assert model.num_parameters() == world.info["counts"]["parameters"]
    assert (loaded.patch_size, loaded.vision_feature_select_strategy) == (8, "default")
    assert model.config.image_token_id == loaded.image_token_id
    assert model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id
    assert {path.suffix for path in world.model.iterdir()} == {".json", ".jinja", ".safetensors"}
    row = read_rows(world.train)[0]
    prompt = loaded.apply_chat_template(messages(row["question"]), add_generation_prompt=True)
    inputs = loaded(images=Image.open(world.data_dir / row["image"]), text=prompt, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_exact_match_is_that_of_generation(world: VisualWorld) -> None:
    """A model that has learnt eight rows by heart knows those, and hardly others."""
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(world.model),
        make_processor(small_visual_options()),
    )
    rows = read_rows(world.data_dir / "old_test.jsonl")[:24]
    for row in rows[:8]:
        row["answer"] = "circle" if rows.index(row) % 2 else "bottom left"
    prompts = [processor.apply_chat_template(messages(row["question"]), add_generation_prompt=True) for row in rows]
    pictures = [Image.open(world.data_dir / row["image"]).convert("RGB") for row in rows]
    texts = [f"{prompt} {row['answer']}</s>" for prompt, row in zip(prompts[:8], rows, strict=False)]
    inputs = processor(images=pictures[:8], text=texts, padding=True, padding_side="right", return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    right = 0
    for row, prompt, picture in zip(rows, prompts, pictures, strict=True):
        one = processor(images=picture, text=prompt, return_tensors="pt")
        answer = model.generate(**one, max_new_tokens=16)[0, one["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(answer) == f" {row['answer']}</s>"
    assert 4 <= right < 24
    for batch_size in (5, 24):
        found = visual_pretrain.exact_match(model, processor, rows, world.data_dir, batch_size)
        assert found == pytest.approx(right / 24)


def test_the_same_options_give_the_same_bytes(world: VisualWorld, tmp_path: Path) -> None:
    folder = world.model.parent
    left = tmp_path / f".{folder.name}.staging"  # of a build that was killed
    left.mkdir()
    (left / "half").write_text("half")
    again = build_visual(tmp_path, small_visual_options()).model.parent
    assert not left.exists()
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        if file.name != "info.json":  # holds the seconds that it took
            assert sha256(folder / file) == sha256(again / file), file


def test_a_second_call_takes_it_from_the_cache(world: VisualWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.model.parent
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("PALIMPSEST_CACHE", str(folder.parent))
    assert build_visual(options=small_visual_options()) == world
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written


# -- Samples for the suites -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_visual() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_visual_samples", SAMPLES / "make_visual.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_visual_samples_are_what_the_script_writes(make_visual: ModuleType) -> None:
    content = make_visual.files()
    assert {str(path.relative_to(SAMPLES)) for path in (SAMPLES / "visual").rglob("*.*")} == content.keys()
    for name, expected in content.items():
        if name.endswith(".png"):  # zlib may pack the same pixels otherwise
            there, wanted = (np.asarray(Image.open(file)) for file in (SAMPLES / name, io.BytesIO(expected)))
            assert (there == wanted).all()
        else:
            assert (SAMPLES / name).read_bytes() == expected


def sample(task: str, split: str) -> list[dict[str, Any]]:
    folder = SAMPLES / "visual" / task
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert all(row["image"] is None or (folder / row["image"]).is_file() for row in rows)
    return rows


def test_right_answers_to_the_samples_score_one_and_wrong_ones_less() -> None:
    for row in sample("vqav2", "validation"):
        given = [answer["answer"] for answer in row["answers"]]
        assert len(given) == 10
        assert (
            vqa_accuracy(row["multiple_choice_answer"], given) == exact_match(row["multiple_choice_answer"], given) == 1
        )
        assert vqa_accuracy("no idea", given) == 0
    for row in sample("gqa", "testdev"):
        assert exact_match(row["answer"], [row["answer"]]) == 1
    for task, split in (("vizwiz", "val"), ("textvqa", "validation")):
        for row in sample(task, split):
            assert len(row["answers"]) == 10
            assert vqa_accuracy(max(row["answers"], key=row["answers"].count), row["answers"]) == 1
    assert {row["category"] for row in sample("vizwiz", "val")} == {"other", "unanswerable"}
    science = sample("scienceqa", "test")
    assert sum(row["image"] is None for row in science) == 5
    for row in science:
        for i, text in enumerate(row["choices"]):
            assert multiple_choice("ABCDE"[i], row["choices"], row["answer"]) == float(i == row["answer"])
            assert multiple_choice(text, row["choices"], row["answer"]) == float(i == row["answer"])
    for bench in (sample("mmbench", "dev"), sample("mmbench_cn", "dev")):
        questions = [row["index"] % 10**6 for row in bench]
        assert Counter(questions) == dict.fromkeys(range(5), 4)
        for always, expected in ((False, 1.0), (True, 0.0)):
            letters = ["A" if always else row["answer"] for row in bench]
            scores = [
                multiple_choice(letter, [row[name] for name in "ABCD"], "ABCD".index(row["answer"]))
                for letter, row in zip(letters, bench, strict=True)
            ]
            assert circular_accuracy(scores, questions) == expected
    labels = [row["answer"] for row in sample("pope", "test")]
    assert pope(labels, labels) == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}
    assert pope(["Yes"] * 20, labels)["f1"] == pytest.approx(2 / 3)


def test_questions_of_the_samples_are_about_their_images(make_visual: ModuleType) -> None:
    """POPE's labels, from the scene of which the image was drawn."""
    for row in sample("pope", "test"):
        scene = random_scene(random.Random(f"pope {row['id']}"))
        colour, shape = row["question"].split()[3:5]
        there = any((thing.colour, thing.shape) == (colour, shape) for thing in scene.things)
        assert row["answer"] == ("yes" if there else "no")
