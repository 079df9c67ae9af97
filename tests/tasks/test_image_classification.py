"""Image classification: what is read, which head there is, what statistics count, and whole runs."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from harness.analysis.spectrum import spectrum
from harness.cli import main
from harness.config import RunConfig
from harness.errors import UserError
from harness.files import read_json
from harness.methods.registry import build_method
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import describe, target_modules
from harness.models.weights import BaseWeights, empty_model
from harness.pipeline import run_stages
from harness.preflight import check
from harness.run_directory import RunDirectory
from harness.stages.calibrate import probe_inputs
from harness.stages.train import build_model
from harness.statistics.loss import Labels
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident
from harness.statistics.statistic import KINDS, Kind, Statistic
from harness.statistics.streamed import collect_streamed
from harness.tasks.head import with_head
from harness.tasks.image_classification import ImageClassification, LabelledImage, OldClasses
from harness.tasks.registry import load_task
from harness.tiny.vision import (
    NEW_CLASSES,
    OLD_CLASSES,
    Architecture,
    VisionWorld,
    build_vision,
    small_vision_options,
    vision_options,
)
from tests.conftest import run_gang
from tests.tasks.vision import (
    ARCHITECTURES,
    batches_of,
    configured,
    content,
    damaged,
    direct_statistics,
    files_of,
    write_jsonl,
    write_parquet,
)

BOUND = 1e-5
IMAGES = 9  # of which statistics are taken


@pytest.fixture(scope="module", params=ARCHITECTURES)
def world(request: pytest.FixtureRequest) -> VisionWorld:
    return build_vision(small_vision_options(request.param))


@pytest.fixture(scope="module")
def vit() -> VisionWorld:
    return build_vision(small_vision_options("vit"))


@pytest.fixture(scope="module")
def convnext() -> VisionWorld:
    return build_vision(small_vision_options("convnextv2"))


def headed(config: RunConfig) -> RunConfig:
    """The configuration that stages see."""
    return with_head(load_task(config), RunDirectory(config.run_directory))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_every_form_of_data_reads_the_same(vit: VisionWorld, tmp_path: Path) -> None:
    files = files_of(vit.new_train)
    names = [{"image": str(file), "label": file.parent.name} for file in files]
    numbers = [row | {"label": NEW_CLASSES.index(row["label"])} for row in names]
    relative_paths = [row | {"image": str(Path(row["image"]).relative_to(vit.new_train))} for row in numbers]
    columns = {"image": "image", "response": "label"}
    classes = {"classes": list(NEW_CLASSES)}
    sources: list[dict[str, Any]] = [
        {"path": str(vit.new_train)} | classes,
        {"path": str(vit.new_train), **columns} | classes,  # as of the builder of the library of data sets
        {"path": str(write_jsonl(tmp_path / "names.jsonl", names)), **columns} | classes,
        {"path": str(write_jsonl(tmp_path / "numbers.jsonl", numbers)), **columns} | classes,
        {
            "path": str(write_jsonl(tmp_path / "relative.jsonl", relative_paths)),
            "image_folder": str(vit.new_train),
            **columns,
        }
        | classes,
        {"path": str(write_parquet(tmp_path / "names.parquet", names)), **columns} | classes,
        {
            "path": str(
                write_parquet(tmp_path / "known.parquet", numbers, datasets.ClassLabel(names=list(NEW_CLASSES)))
            ),
            **columns,
        },
    ]
    expected = {hashlib.sha256(file.read_bytes()).hexdigest(): NEW_CLASSES.index(file.parent.name) for file in files}
    processor = AutoImageProcessor.from_pretrained(vit.model, backend="pil")
    for source in sources:
        task = load_task(configured(vit, tmp_path, data={"train": source}))
        assert task.classes.names == NEW_CLASSES
        examples = task.read(task.config.data.train, "data.train")
        rows = task.rows(examples)
        found = {row.digests()[0]: row.answer for row in rows}
        assert found == expected, source
        of_first = processor(rows[0].picture.open(), return_tensors="pt")["pixel_values"]
        assert torch.equal(rows[0].tensors()["pixel_values"], of_first)
        assert of_first.shape == (1, 3, 16, 16)


def test_class_names(vit: VisionWorld, tmp_path: Path) -> None:
    files = files_of(vit.new_train)
    of_names = write_jsonl(tmp_path / "names.jsonl", [{"i": str(f), "c": f.parent.name} for f in files])
    of_numbers = write_jsonl(tmp_path / "numbers.jsonl", [{"i": str(f), "c": 2 * (n % 3)} for n, f in enumerate(files)])
    columns = {"image": "i", "response": "c"}
    task = load_task(configured(vit, tmp_path, data={"train": {"path": str(of_names), **columns}}))
    assert task.classes.names == tuple(sorted(NEW_CLASSES))
    assert task.head_options()["label2id"]["blue cross"] == 0
    task = load_task(configured(vit, tmp_path, data={"train": {"path": str(of_numbers), **columns}}))
    assert task.classes.names == ("0", "1", "2", "3", "4")
    assert not task.classes.named


def bad_rows(world: VisionWorld, folder: Path) -> list[dict[str, Any]]:
    """Good rows, one whose file is missing, one whose file is damaged."""
    damaged(folder / "half.jpg")
    rows = [{"i": str(f), "c": f.parent.name} for f in files_of(world.new_train)]
    return [rows[0], {"i": "gone.png", "c": rows[0]["c"]}, *rows[1:], {"i": "half.jpg", "c": rows[-1]["c"]}]


def test_bad_images_are_refused_or_skipped(vit: VisionWorld, tmp_path: Path, capsys: Any) -> None:
    rows = bad_rows(vit, tmp_path)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data: dict[str, Any] = {"train": {"path": str(path), "image": "i", "response": "c"}}
    task = load_task(configured(vit, tmp_path, data=data))
    with pytest.raises(UserError, match=r"^data\.train\.image: row 1 of rows.jsonl: .*gone.png: no such file; .*skip$"):
        task.read(task.config.data.train, "data.train")
    data["bad_images"] = "skip"
    task = load_task(configured(vit, tmp_path, data=data))
    examples = task.read(task.config.data.train, "data.train")
    assert len(examples) == len(rows) - 2
    assert f"data.train: 2 of {len(rows)} rows left out" in capsys.readouterr().err


def test_an_image_lost_after_reading_is_named(vit: VisionWorld, tmp_path: Path) -> None:
    """Nothing is opened until a batch is made."""
    folder = tmp_path / "train"
    shutil.copytree(vit.new_train, folder)
    task = load_task(configured(vit, tmp_path, data={"train": {"path": str(folder)}}))
    row = task.rows(task.read(task.config.data.train, "data.train"))[0]
    lost = files_of(folder)[0]
    lost.unlink()
    with pytest.raises(UserError, match=str(lost)):
        row.tensors()


def test_rows_differ_by_their_image_alone(vit: VisionWorld, tmp_path: Path) -> None:
    """What the cache of statistics goes by."""
    task = load_task(configured(vit, tmp_path))
    rows = task.rows(task.read(task.config.data.train, "data.train"))[:2]
    assert rows[0].input_ids == rows[1].input_ids == []
    assert rows[0].answer == rows[1].answer
    assert rows[0].digests() != rows[1].digests()


Change = Callable[[Path, VisionWorld], dict[str, Any]]


def _rows(folder: Path, world: VisionWorld, *labels: Any, key: str = "train", **source: Any) -> dict[str, Any]:
    files = files_of(world.new_train)
    rows = [{"i": str(file), "c": label} for file, label in zip(files, labels, strict=False)]
    path = write_jsonl(folder / f"{key}.jsonl", rows)
    return {"data": {key: {"path": str(path), "image": "i", "response": "c", **source}}}


def _empty_class(folder: Path, world: VisionWorld) -> dict[str, Any]:
    shutil.copytree(world.new_train, folder / "train")
    (folder / "train" / "pink cross").mkdir()
    return {"data": {"train": {"path": str(folder / "train")}}}


def _flat(folder: Path, world: VisionWorld) -> dict[str, Any]:
    (folder / "flat").mkdir()
    shutil.copy(files_of(world.new_train)[0], folder / "flat")
    return {"data": {"train": {"path": str(folder / "flat")}}}


def _headless(folder: Path, world: VisionWorld) -> dict[str, Any]:
    """A base that was saved without its head, as pre-trained ones are."""
    model = AutoModelForImageClassification.from_pretrained(world.model)
    model.base_model.save_pretrained(folder / "headless")
    shutil.copy(world.model / "preprocessor_config.json", folder / "headless")
    return {"model": {"path": str(folder / "headless")}}


def _beside_data(folder: Path, world: VisionWorld) -> dict[str, Any]:
    shutil.copytree(world.new_train, folder / "train")
    (folder / "train" / "labels.csv").write_text("image,label\n")
    return {"data": {"train": {"path": str(folder / "train")}}}


MISTAKES: dict[str, tuple[Change, str]] = {
    "class folders beside data": (
        _beside_data,
        r"^data\.train\.image: missing; name the column .*, or give a folder with a sub-folder for each class and no "
        r"data files, such as labels\.csv, beside them$",
    ),
    "another class": (
        lambda folder, world: _rows(folder, world, "red cross", "red star", key="validation"),
        r"^data\.validation\.response: row 1 of validation\.jsonl is of class 'red star', which is not among the "
        r"classes of data\.train: blue cross, .*; did you mean 'red",
    ),
    "a folder of another class": (
        lambda folder, world: {"data": {"validation": {"path": str(world.old_test)}}},
        r"^data\.validation\.path: .*blue circle/0000\.png is of class 'blue circle', which is not among",
    ),
    "a number that has no name": (
        lambda folder, world: _rows(folder, world, 0, 1, 7, classes=["a", "b"]),
        r"^data\.train\.response: row 2 of train\.jsonl has class 7 in 'c', and there are 2 names",
    ),
    "a fraction": (
        lambda folder, world: _rows(folder, world, 0.5, 1.0),
        r"^data\.train\.response: row 0 of train\.jsonl has 0\.5 in 'c'; allowed: the name of a class, or its number",
    ),
    "no label": (
        lambda folder, world: _rows(folder, world, "a", None),
        r"^data\.train\.response: row 1 of train\.jsonl has None in 'c'",
    ),
    "hidden labels": (
        lambda folder, world: _rows(folder, world, -1, -1),
        r"^data\.train\.response: row 0 of train\.jsonl has -1 in 'c'",
    ),
    "one class": (
        lambda folder, world: _rows(folder, world, "a", "a"),
        r"^data\.train: 1 class in .*, a classifier tells at least two apart",
    ),
    "a name twice": (
        lambda folder, world: _rows(folder, world, 0, 1, classes=["a", "a"]),
        r"^data\.train\.classes: 'a' stands there twice",
    ),
    "an empty class": (
        _empty_class,
        r"^data\.train\.path: the class folder .*pink cross has no images; fill or remove",
    ),
    "no classes": (
        _flat,
        r"^data\.train\.path: .*flat has no sub-folders; task 'image_classification' reads one a class",
    ),
    "a split of a folder": (
        lambda folder, world: {"data": {"train": {"path": str(world.new_train), "split": "train[:10]"}}},
        r"^data\.train\.split: 'train\[:10\]' given; a folder of classes has no splits",
    ),
    "no image column": (
        lambda folder, world: {"data": {"train": {"path": _rows(folder, world, 0, 1)["data"]["train"]["path"]}}},
        r"^data\.train\.image: missing; name the column of images",
    ),
    "no class column": (
        lambda folder, world: {
            "data": {"train": {"path": _rows(folder, world, 0, 1)["data"]["train"]["path"], "image": "i"}}
        },
        r"^data\.train\.response: missing; name the column of classes",
    ),
    "no head to extend": (
        lambda folder, world: {"model": {"path": _headless(folder, world)["model"]["path"], "head": "extended"}},
        r"^model\.head: extended given, and .*headless has no head for images; set model\.head: new",
    ),
    "numbers beside names": (
        lambda folder, world: _rows(folder, world, 0, 1) | {"model": {"head": "extended"}},
        r"^model\.head: extended puts names .* the classes of data\.train are nothing but numbers; name them in",
    ),
    "no old head to measure by": (
        _headless,
        r"^eval: preserve is measured by the base's own head, and .*headless has none for images",
    ),
    "replay under a new head": (
        lambda folder, world: {"data": {"replay": {"ratio": 0.5}}},
        r"^data\.replay: it is about the loss on data\.preserve, and the head .* set model\.head: extended",
    ),
    "preserve loss under a new head": (
        lambda folder, world: {"train": {"preserve_loss_steps": 2}},
        r"^train\.preserve_loss_steps: it is about the loss on data\.preserve",
    ),
    "a probe under a new head": (
        lambda folder, world: {"method": {"name": "farss", "rank": 4, "shallow_layers": "auto"}},
        r"^method\.shallow_layers: auto: it is about the loss on data\.preserve",
    ),
    "an anchor": (
        lambda folder, world: {"anchor": {"kl": 1.0}, "model": {"head": "extended"}},
        r"^anchor: task 'image_classification' has a head that the original model has not",
    ),
    "a penalty over tokens": (
        lambda folder, world: {"penalties": [{"name": "migu"}]},
        r"^penalties: migu goes by outputs at tokens, and rows of task 'image_classification' have none; remove it",
    ),
    "old data under a new head": (
        lambda folder, world: {"penalties": [{"name": "lalora", "sources": [{"path": str(world.old_train)}]}]},
        r"^penalties\.0\.sources\.0: it is of the loss on old data, and the head .* set model\.head: extended",
    ),
    "a class that the base has not": (
        lambda folder, world: {"data": {"preserve": {"path": str(world.new_train)}}},
        r"^data\.preserve\.path: .* is of class 'blue cross', which is not among the classes of .*: red circle, ",
    ),
    "checkpointing that the model has not": (
        lambda folder, world: {"train": {"gradient_checkpointing": True}},
        r"^train\.gradient_checkpointing: true given, and ConvNextV2ForImageClassification has no such thing",
    ),
    "a convolution that the method cannot take": (
        lambda folder, world: {"model": {"target_modules": "all-conv"}},
        r"^model\.target_modules: all-conv given, and method 'lora' has no form for convolutions; use method flora or",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_take_one_line(convnext: VisionWorld, tmp_path: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as caught:
        check(configured(convnext, tmp_path, **change(tmp_path, convnext)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mistake", ["another class", "a folder of another class", "a class that the base has not"])
def test_labels_that_the_head_has_not_end_the_command_with_one_line(
    vit: VisionWorld, tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    change, message = MISTAKES[mistake]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content(vit, tmp_path, **change(tmp_path, vit))))
    monkeypatch.setattr("sys.argv", ["harness", "run", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and re.search(message, line.removeprefix("error: "))
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_data_files_beside_images_are_what_is_read(vit: VisionWorld, tmp_path: Path) -> None:
    """Not the sub-folders of their images, as classes."""
    rows = []
    for number, file in enumerate(files_of(vit.new_train)):
        for name in ("images", "thumbnails"):
            (tmp_path / "ds" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "ds" / name / f"{number}.png")
        rows.append({"image": f"images/{number}.png", "label": file.parent.name})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "ds" / "train.parquet")
    source = {"path": str(tmp_path / "ds"), "image": "image", "response": "label"}
    task = load_task(configured(vit, tmp_path, data={"train": source}))
    assert task.classes.names == tuple(sorted(NEW_CLASSES))
    found = task.read(task.config.data.train, "data.train")
    assert [task.classes.names[one.label] for one in found] == [row["label"] for row in rows]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files_of(vit.new_train)]
    assert [one.picture.digest() for one in found] == digests


def test_targets_go_by_the_names_of_modules(vit: VisionWorld, tmp_path: Path) -> None:
    """A ViT's files say ``query`` where its module is called ``q_proj``."""
    check(configured(vit, tmp_path, model={"target_modules": ["q_proj", "fc1"]}))
    with pytest.raises(UserError, match=r"^model\.target_modules: 'query' matches no linear layer; allowed: .* q_proj"):
        check(configured(vit, tmp_path, model={"target_modules": ["query"]}))
    with pytest.raises(UserError, match=r"'projection' is a convolution, for which method 'lora' has no form"):
        check(configured(vit, tmp_path, model={"target_modules": ["projection"]}))


def test_the_head_does_not_bound_the_rank(vit: VisionWorld, tmp_path: Path) -> None:
    check(configured(vit, tmp_path, method={"name": "lora", "rank": 32}))
    with pytest.raises(UserError, match=r"^method\.rank: 33 given; layer vit\..* is 32×32, so at most 32$"):
        check(configured(vit, tmp_path, method={"name": "lora", "rank": 33}))


def test_a_language_model_is_refused(convnext: VisionWorld, random_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.path: .* is a llama, which has no form that tells classes of images"):
        check(configured(convnext, tmp_path, model={"path": str(random_base)}))
    with pytest.raises(UserError, match=r"^model\.head: extended given; it is for task image_classification, leave it"):
        check(configured(convnext, tmp_path, task="causal_lm", model={"head": "extended"}))


def test_analyses_are_of_texts(vit: VisionWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task: image_classification given; `harness analyse` looks at texts"):
        spectrum(configured(vit, tmp_path), tmp_path)


def test_several_images_in_a_row(vit: VisionWorld, tmp_path: Path) -> None:
    files = [str(file) for file in files_of(vit.new_train)[:3]]
    rows = [{"i": files[:1], "c": "a"}, {"i": files[1:], "c": "b"}]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "image": "i", "response": "c"}
    task = load_task(configured(vit, tmp_path, data={"train": source}))
    with pytest.raises(UserError, match=r"^data\.train\.image: row 1 of .* has 2 images in 'i'; .* reads one a row$"):
        task.read(task.config.data.train, "data.train")


# -- heads -------------------------------------------------------------------------------------------------------------


def test_new_head(world: VisionWorld, tmp_path: Path) -> None:
    config = headed(configured(world, tmp_path))
    assert config.model.trained_modules == ("classifier",)
    assert (config.model.original, config.task) == (str(world.model), "image_classification")
    described = AutoConfig.from_pretrained(config.model.path)
    assert described.id2label == dict(enumerate(sorted(NEW_CLASSES)))
    model, base = load_model(config.model), AutoModelForImageClassification.from_pretrained(world.model)
    assert model.classifier.weight.shape[0] == len(NEW_CLASSES)
    for own, original in zip(model.base_model.parameters(), base.base_model.parameters(), strict=True):
        assert torch.equal(own, original)
    again = load_model(headed(configured(world, tmp_path, name="again")).model)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    other = load_model(headed(configured(world, tmp_path, name="other", train={"seed": 1})).model)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


def test_a_head_of_the_same_size_is_kept_for_the_same_classes_alone(world: VisionWorld, tmp_path: Path) -> None:
    base = AutoModelForImageClassification.from_pretrained(world.model).classifier
    same = {"path": str(world.old_train), "classes": list(OLD_CLASSES)}
    kept = load_model(headed(configured(world, tmp_path, data={"train": same, "validation": None})).model).classifier
    assert torch.equal(kept.weight, base.weight)
    files = files_of(world.old_train)
    others = write_jsonl(tmp_path / "o.jsonl", [{"i": str(f), "c": f"my {f.parent.name}"} for f in files])
    source = {"path": str(others), "image": "i", "response": "c"}
    config = configured(world, tmp_path, name="others", data={"train": source, "validation": None})
    drawn = load_model(headed(config).model).classifier
    assert drawn.weight.shape == base.weight.shape
    # Not one row of another meaning.
    assert relative(drawn.weight, base.weight) > 0.5
    assert not (drawn.weight == base.weight).all(1).any()
    record = read_json(RunDirectory(config.run_directory).base / "head.json")
    assert record["drawn"] == ["classifier.bias", "classifier.weight"]


def test_extended_head(world: VisionWorld, tmp_path: Path) -> None:
    shutil.copytree(world.new_train, tmp_path / "train")
    shutil.copytree(world.old_train / "red circle", tmp_path / "train" / "red circle")  # a class that is known
    data = {"train": {"path": str(tmp_path / "train")}}
    config = headed(configured(world, tmp_path, model={"head": "extended"}, data=data))
    task = load_task(config)
    assert task.classes.names == (*OLD_CLASSES, *sorted(NEW_CLASSES))
    model, base = load_model(config.model), AutoModelForImageClassification.from_pretrained(world.model)
    assert model.config.id2label == dict(enumerate(task.classes.names))
    old = len(OLD_CLASSES)
    assert torch.equal(model.classifier.weight[:old], base.classifier.weight)
    assert torch.equal(model.classifier.bias[:old], base.classifier.bias)
    assert model.classifier.weight[old:].std() > 0
    pixels = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        found, expected = model(pixel_values=pixels).logits, base(pixel_values=pixels).logits
    torch.testing.assert_close(found[:, :old], expected)
    # Old and new rows are numbered by the one head.
    labels = {
        key: {one.label for one in task.read(getattr(config.data, key), f"data.{key}")} for key in ("train", "preserve")
    }
    assert labels["preserve"] == set(range(old))
    assert labels["train"] == {OLD_CLASSES.index("red circle"), *range(old, old + len(NEW_CLASSES))}
    assert task.retention() is task
    assert task.retention_model(model) is model


def test_old_classes_are_asked_of_the_old_head(world: VisionWorld, tmp_path: Path) -> None:
    """Under a new head, ``data.preserve`` is measured by the base's own head on the tuned body."""
    config = headed(configured(world, tmp_path))
    task = load_task(config)
    retention = task.retention()
    assert isinstance(retention, OldClasses)
    assert retention.classes.names == OLD_CLASSES
    examples = retention.read(config.data.preserve, "data.preserve")
    assert [OLD_CLASSES[one.label] for one in examples] == [file.parent.name for file in files_of(world.old_train)]
    assert not task.labelled(config.data.preserve)
    assert retention.labelled(config.data.preserve)
    tuned = load_model(config.model)
    with torch.no_grad():
        for parameter in tuned.base_model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    under = task.retention_model(tuned)
    pixels = torch.rand(5, 3, 16, 16)
    base = AutoModelForImageClassification.from_pretrained(world.model).eval()
    with torch.no_grad():
        found = under(pixel_values=pixels).logits
        expected = base.classifier(_features(tuned, pixels))
        original = base(pixel_values=pixels).logits
    torch.testing.assert_close(found, expected)
    assert relative(found, original) > 1e-2


def _features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What the classifier of the model reads."""
    seen: list[torch.Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(pixel_values=pixels)
    handle.remove()
    return seen[0]


def test_preserve_rows_need_no_classes_for_statistics(vit: VisionWorld, tmp_path: Path) -> None:
    rows = [{"i": str(file)} for file in files_of(vit.old_train)]
    preserve = {"path": str(write_jsonl(tmp_path / "p.jsonl", rows)), "image": "i"}
    config = configured(
        vit,
        tmp_path,
        data={"preserve": preserve},
        eval={"knowledge": []},
        method={"name": "corda", "mode": "kpm", "rank": 4},
    )
    check(config)
    assert {one.label for one in load_task(config).read(config.data.preserve, "data.preserve")} == {None}
    # Nor do those that it has matter, where nobody asks for them.
    others = {"preserve": {"path": str(vit.new_train)}}
    check(configured(vit, tmp_path, data=others, eval={"knowledge": []}, method=config.method))
    asked = configured(vit, tmp_path, data={"preserve": preserve})
    with pytest.raises(UserError, match=r"^data\.preserve\.response: missing; eval: preserve needs the classes"):
        check(asked)


def test_predictions_and_scores(world: VisionWorld, tmp_path: Path) -> None:
    config = headed(configured(world, tmp_path))
    task = load_task(config)
    assert task.metrics == ("accuracy",)
    examples: list[LabelledImage] = task.read(config.data.validation, "data.validation")
    model = load_model(config.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers differ
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    expected = []
    for one in examples:
        pixels = task.reader(one.picture.open(), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected.append(int(model(pixel_values=pixels).logits[0].argmax()))
    assert len(set(expected)) > 1
    for size in (1, 5, 64):
        assert task.predict(model, examples, size) == expected
    scores = task.score("accuracy", expected, examples)
    assert scores == [float(e == one.label) for e, one in zip(expected, examples, strict=True)]
    shown = task.shown(examples[0], expected[0])
    first = sorted(NEW_CLASSES)[0]
    assert (shown.question, shown.expected, shown.answer) == (
        f"{first}/0000.png",
        first,
        sorted(NEW_CLASSES)[expected[0]],
    )


# -- statistics and targets --------------------------------------------------------------------------------------------


def statistics(
    config: RunConfig, size: int, labels: Labels, streamed: bool = False
) -> dict[tuple[Kind, str], Statistic]:
    """Of every layer for itself, over the rows of ``data.train``."""
    task = load_task(config)
    rows = task.rows(task.read(config.data.train, "data.train"))[:IMAGES]
    batches = batches_of(rows, size)
    if streamed:
        model = empty_model(config.model)
        modules = target_modules(model, "all-linear")
        groups: dict[str, str] = {}
        collected = collect_streamed(
            model,
            BaseWeights(config.model, model),
            modules,
            [batches],
            batches_of([task.probe_row(rows[0])], 1)[0],
            KINDS,
            labels,
            torch.device("cpu"),
            Reduction(),
            groups,
        )
        with closing(collected):
            found = {(kind, name): Statistic(matrix, tokens) for _, kind, name, matrix, tokens in collected}
    else:
        model = load_model(config.model)
        modules = target_modules(model, "all-linear")
        groups = input_groups(model, modules, probe_inputs(model, task, rows[0], torch.device("cpu")))
        collected = collect_resident(model, modules, groups, batches, KINDS, labels, Reduction())
        found = {(kind, name): Statistic(matrix, tokens) for kind, name, matrix, tokens in collected}
    for name, first in groups.items():
        found["input_covariance", name] = found["input_covariance", first]
    return found


def test_statistics_equal_a_direct_computation(world: VisionWorld, tmp_path: Path) -> None:
    """Every patch and the class token count; a ConvNeXt's layers read fewer places the later they stand."""
    config = headed(configured(world, tmp_path))
    labels = Labels("empirical", 0, ImageClassification.objective)
    found = statistics(config, 5, labels)
    model = load_model(config.model).double()
    modules = target_modules(model, "all-linear")
    task = load_task(config)
    rows = task.rows(task.read(config.data.train, "data.train"))[:IMAGES]
    expected, counts = direct_statistics(model, modules, rows)
    assert {name for _, name in found} == set(modules)
    for (kind, name), statistic in found.items():
        assert relative(statistic.matrix, expected[kind][name]) <= BOUND, (kind, name)
        assert statistic.tokens == (len(rows) if kind == "weight_gradient" else counts[name])
    if "convnextv2" in config.model.path or model.base_model_prefix == "convnextv2":
        assert set(counts.values()) == {len(rows) * 8 * 8, len(rows) * 4 * 4}
    else:
        assert set(counts.values()) == {len(rows) * (2 * 2 + 1)}


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_statistics_do_not_depend_on_batches(world: VisionWorld, tmp_path: Path, fisher: Any) -> None:
    config = headed(configured(world, tmp_path))
    labels = Labels(fisher, 3, ImageClassification.objective)
    one, several, streamed = (
        statistics(config, size, labels, streamed) for size, streamed in ((1, False), (7, False), (7, True))
    )
    assert one.keys() == several.keys() == streamed.keys()
    for key, statistic in several.items():
        assert relative(one[key].matrix, statistic.matrix) <= BOUND, key
        assert relative(streamed[key].matrix, statistic.matrix) <= BOUND, key
        assert one[key].tokens == statistic.tokens == streamed[key].tokens
    other = statistics(config, 7, Labels(fisher, 4, ImageClassification.objective))
    moved = max(relative(other[key].matrix, several[key].matrix) for key in several if key[0] == "weight_gradient")
    assert (moved > 1e-2) == (fisher == "mc")


def test_every_convolution(convnext: VisionWorld) -> None:
    model = AutoModelForImageClassification.from_pretrained(convnext.model)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    assert len(convolutions) == 4
    assert list(target_modules(model, "all-conv", convolutions=True)) == convolutions
    both = list(target_modules(model, "all-linear+conv", convolutions=True))
    assert set(both) == {*convolutions, *linear}
    assert both == [n for n, _ in model.named_modules() if n in both]
    groups = {layer.name: layer.groups for layer in describe(target_modules(model, "all-conv", convolutions=True))}
    assert groups["convnextv2.encoder.stages.1.layers.0.dwconv"] == 16
    with pytest.raises(UserError, match=r"^model\.target_modules: all-conv given, and this method has no form for"):
        target_modules(model, "all-conv")


# -- whole runs --------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "rank": 4}},
    "flora, linear": {"method": {"name": "flora", "rank": 4}},
    "flora, all": {
        "method": {"name": "flora", "rank": 4, "kernel_rank": 2, "scale": 4.0},
        "model": {"target_modules": "all-linear+conv"},
    },
    "lora_conv, conv": {"method": {"name": "lora_conv", "rank": 4}, "model": {"target_modules": "all-conv"}},
    "corda++, kpm": {"method": {"name": "corda", "mode": "kpm", "rank": 4, "rounds": 2, "dynamic_rank": True}},
    "farss": {"method": {"name": "farss", "rank": 4, "shallow_layers": 1}},
    "full": {"method": {"name": "full"}, "train": {"learning_rate": 1.0e-3}},
}


def live(config: RunConfig, run: RunDirectory) -> nn.Module:
    """The model at the last checkpoint."""
    seen = headed(config)
    method = build_method(config.method, config.train.seed)
    return build_model(seen, run, method, run.finished_checkpoints()[-1][1], needs_original=False).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return model(pixel_values=torch.rand(6, 3, 16, 16, generator=generator)).logits.float()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run(world: VisionWorld, tmp_path: Path, write_config: Any, name: str) -> None:
    """calibrate → … → export on a real rank; then merged/, adapter/ and the live model compute the same."""
    written = write_config(content(world, tmp_path, **RUNS[name]))
    run_gang(written, 1)
    config = configured(world, tmp_path, **RUNS[name])
    check(config)
    run = RunDirectory(config.run_directory)
    found = logits(live(config, run))
    scale = float(found.abs().max())
    merged = AutoModelForImageClassification.from_pretrained(run.merged)
    assert merged.config.id2label == dict(enumerate(sorted(NEW_CLASSES)))
    AutoImageProcessor.from_pretrained(run.merged, backend="pil")
    assert float((logits(merged) - found).abs().max()) <= 1e-5 * scale
    started = logits(load_model(headed(config).model))
    assert float((started - found).abs().max()) > 1e-2 * scale  # it has moved
    assert relative(merged.classifier.weight, load_model(headed(config).model).classifier.weight) > 1e-3
    if run.adapter.exists() and read_json(run.adapter / "adapter_config.json")["peft_type"] == "LORA":
        from peft import PeftModel

        base = AutoModelForImageClassification.from_pretrained(
            world.model, num_labels=len(NEW_CLASSES), ignore_mismatched_sizes=True
        )
        peft = PeftModel.from_pretrained(base, str(run.adapter)).eval()
        assert float((logits(peft) - found).abs().max()) <= 1e-5 * scale
    run_stages(config, ["eval", "report"])
    results = read_json(run.results)
    assert (results["engine"], results["knowledge"], results["task"]) == ("direct", ["preserve"], ["validation"])
    assert [model["name"] for model in results["models"]] == ["base", "final"]
    validation = results["models"][-1]["scores"]["validation"]
    assert (validation["metric"], validation["items"]) == ("accuracy", len(files_of(world.new_test)))
    assert run.path.joinpath("report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_process(world: VisionWorld, tmp_path: Path, write_config: Any, stage: int) -> None:
    tensors = {}
    options = {**RUNS["flora, all"], "train": {"deepspeed": f"ds_configs/zero{stage}.json", "micro_batch_size": 4}}
    for ranks in (1, 2):
        run_gang(write_config(content(world, tmp_path, name=f"on-{ranks}", **options)), ranks)
        folder = tmp_path / "runs" / f"on-{ranks}" / "checkpoints" / "step-6" / "trained"
        tensors[ranks] = {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}
    assert tensors[1].keys() == tensors[2].keys()
    assert "classifier.weight" in tensors[1]
    for name, tensor in tensors[1].items():
        assert relative(tensors[2][name], tensor) <= 1e-3, name


@pytest.mark.slow
def test_statistics_on_two_ranks_equal_one(world: VisionWorld, tmp_path: Path, write_config: Any) -> None:
    indices = {}
    options = {"method": {"name": "farss", "rank": 4, "shallow_layers": 1}, "init": {"cache": False}}
    for ranks in (1, 2):
        run_gang(write_config(content(world, tmp_path, name=f"on-{ranks}", **options)), ranks)
        init = tmp_path / "runs" / f"on-{ranks}" / "init"
        indices[ranks] = load_file(init / "adapter_model.safetensors")
    for name, tensor in indices[1].items():
        if name.endswith("lora_A.weight"):  # B·A is what is determined: a sign may go either way
            other = name.replace("lora_A", "lora_B")
            product, again = (indices[r][other] @ indices[r][name] for r in (1, 2))
            assert relative(again, product) <= 1e-3 or float(product.norm()) == float(again.norm()) == 0.0, name
        assert tensor.shape == indices[2][name].shape


# -- a classifier that knows something ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request: pytest.FixtureRequest) -> tuple[Architecture, VisionWorld]:
    return request.param, build_vision(vision_options(request.param))


LEARNING: dict[str, dict[str, Any]] = {
    "vit": {"method": {"name": "lora", "rank": 8}},
    "convnextv2": {
        "method": {"name": "flora", "rank": 8, "kernel_rank": 2, "scale": 4.0},
        "model": {"target_modules": "all-linear+conv"},
    },
}


@pytest.mark.long
@pytest.mark.slow
def test_new_classes_are_learned_beside_old_ones(
    trained: tuple[Architecture, VisionWorld], tmp_path: Path, write_config: Any
) -> None:
    """T rises from chance; K is of the old head on the tuned body, so the base's is 1."""
    architecture, world = trained
    options = {
        **LEARNING[architecture],
        "train": {"max_steps": 100, "batch_size": 32, "learning_rate": 5.0e-3, "save_steps": 100},
    }
    written = content(world, tmp_path, **options)
    run_gang(write_config(written), 1)
    config = configured(world, tmp_path, **options)
    run_stages(config, ["eval"])
    results = read_json(RunDirectory(config.run_directory).results)
    base, final = results["models"]
    assert base["scores"]["preserve"]["value"] >= 0.9
    assert base["scores"]["validation"]["value"] <= 0.5
    assert final["scores"]["validation"]["value"] >= 0.7
    assert final["K"] == pytest.approx(final["scores"]["preserve"]["value"] / base["scores"]["preserve"]["value"])
    assert final["K"] < 1.0  # it forgets something: what is measured is the tuned body


@pytest.mark.long
@pytest.mark.slow
def test_an_extended_head_with_replay_knows_all(
    trained: tuple[Architecture, VisionWorld], tmp_path: Path, write_config: Any
) -> None:
    architecture, world = trained
    options: dict[str, Any] = {
        **LEARNING[architecture],
        "train": {
            "max_steps": 100,
            "batch_size": 32,
            "learning_rate": 5.0e-3,
            "save_steps": 100,
            "preserve_loss_steps": 100,
        },
        "data": {"replay": {"ratio": 0.5}},
        "penalties": [{"name": "lalora", "curvature": "diag", "lambda": 1.0}],
    }
    options["model"] = {**options.get("model", {}), "head": "extended"}
    run_gang(write_config(content(world, tmp_path, **options)), 1)
    config = configured(world, tmp_path, **options)
    check(config)
    run_stages(config, ["eval"])
    final = read_json(RunDirectory(config.run_directory).results)["models"][-1]
    assert final["scores"]["validation"]["value"] >= 0.5
    assert final["scores"]["preserve"]["value"] >= 0.7
    logged = [json.loads(line) for line in RunDirectory(config.run_directory).metrics.read_text().splitlines()]
    assert all(line["laplace"] >= 0 for line in logged if "laplace" in line)
    assert {key for line in logged for key in line} >= {"laplace", "preserve_loss", "preserve_accuracy"}
