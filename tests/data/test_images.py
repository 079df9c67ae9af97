"""Images of data sets: paths, contents, structs, lists; what is wrong is named by its row."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from harness.data.images import BadImage, Picture, pictures, without_bad_images
from harness.errors import UserError

WHERE = "data.train.image: row {} of x.jsonl"


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(number: int, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    return tmp_path


def shown(found: list[tuple[Picture, ...]]) -> list[list[Any]]:
    """Pixels; None of a bad image."""
    return [
        [None if picture.problem() is not None else np.asarray(picture.open()).tolist() for picture in own]
        for own in found
    ]


def expected(rows: Sequence[Sequence[int | None]]) -> list[list[Any]]:
    return [[None if number is None else pixels(number).tolist() for number in own] for own in rows]


def forms(folder: Path) -> dict[str, tuple[datasets.Dataset, Sequence[Sequence[int | None]]]]:
    """Data sets with an image column of every form, and which images their rows have: None where one is missing."""
    struct = [{"bytes": encoded(0), "path": None}, None, {"bytes": None, "path": "2.png"}]
    image = datasets.Dataset.from_list([{"i": {"bytes": encoded(n), "path": "x.png"}} for n in range(3)])
    lists = datasets.Dataset.from_list([{"i": [encoded(0), encoded(1)]}, {"i": None}, {"i": []}, {"i": [encoded(3)]}])
    gap = [{"bytes": encoded(0), "path": None}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": "1.png"}]
    hub = datasets.Dataset.from_list([{"i": gap[:2]}, {"i": [gap[3]]}]).cast_column(
        "i", datasets.List(datasets.Image())
    )
    text = base64.b64encode(encoded(2)).decode()
    mixed = [{"i": "0.png"}, {"i": ["", "1.png", None]}, {"i": None}, {"i": {"bytes": text}}]
    large = datasets.Features({"i": datasets.LargeList(datasets.Value("large_string"))})
    return {
        "paths": (
            datasets.Dataset.from_list([{"i": "0.png"}, {"i": ""}, {"i": None}, {"i": "3.png"}]),
            [[0], [], [], [3]],
        ),
        "absolute": (datasets.Dataset.from_list([{"i": str(folder / "1.png")}]), [[1]]),
        "list of paths": (datasets.Dataset.from_list([{"i": ["0.png", "1.png"]}, {"i": []}]), [[0, 1], []]),
        "list with a gap": (datasets.Dataset.from_list([{"i": ["", "1.png"]}, {"i": ["2.png"]}]), [[1], [2]]),
        "list without a path": (
            datasets.Dataset.from_list([{"i": ["0.png", None, "", "1.png"]}, {"i": None}, {"i": [None]}]),
            [[0, None, 1], [], [None]],
        ),
        "list without a content": (
            datasets.Dataset.from_list([{"i": [encoded(0), None]}, {"i": [None, encoded(1), b""]}, {"i": None}]),
            [[0, None], [None, 1, None], []],
        ),
        "list without a struct": (datasets.Dataset.from_list([{"i": gap}, {"i": gap[:1]}]), [[0, None, None, 1], [0]]),
        "list without one of the hub's images": (hub, [[0, None], [1]]),
        "list of nothing": (datasets.Dataset.from_list([{"i": [None]}, {"i": []}]), [[None], []]),
        "large list of large texts": (
            datasets.Dataset.from_list([{"i": ["0.png", "", "2.png"]}, {"i": None}], features=large),
            [[0, 2], []],
        ),
        "base64": (datasets.Dataset.from_list([{"i": {"bytes": text}}, {"i": None}]), [[2], []]),
        "list of base64": (
            datasets.Dataset.from_list([{"i": [{"bytes": text, "path": None}, {"bytes": None, "path": "1.png"}]}]),
            [[2, 1]],
        ),
        "data URIs": (
            datasets.Dataset.from_list([{"i": f"data:image/png;base64,{text}"}, {"i": "0.png"}, {"i": ""}]),
            [[2], [0], []],
        ),
        "base64 of several lines": (
            datasets.Dataset.from_list([{"i": {"bytes": f"{text[:76]}\n{text[76:]}\n"}}]),
            [[2]],
        ),
        "of all forms": (
            datasets.Dataset.from_list(mixed, features=datasets.Features({"i": datasets.Json()})),
            [[0], [1, None], [], [2]],
        ),
        "lists, a slice": (
            datasets.Dataset.from_list([{"i": ["", "0.png"]}, {"i": None}, {"i": ["1.png", None]}]).select([2, 0]),
            [[1, None], [0]],
        ),
        "lists, joined": (
            datasets.concatenate_datasets(
                [datasets.Dataset.from_list([{"i": ["", "0.png"]}]), datasets.Dataset.from_list([{"i": ["1.png"]}])]
            ),
            [[0], [1]],
        ),
        "contents": (datasets.Dataset.from_list([{"i": encoded(0)}, {"i": None}]), [[0], []]),
        "list of contents": (lists, [[0, 1], [], [], [3]]),
        "structs": (datasets.Dataset.from_list([{"i": one} for one in struct]), [[0], [], [2]]),
        "the hub's images": (image.cast_column("i", datasets.Image()), [[0], [1], [2]]),
        "a slice": (datasets.Dataset.from_list([{"i": encoded(n)} for n in range(4)]).select([3, 1]), [[3], [1]]),
    }


@pytest.mark.parametrize("form", list(forms(Path("/"))))
def test_every_form_of_column(form: str, folder: Path) -> None:
    rows, images = forms(folder)[form]
    found = pictures(rows, "i", folder, WHERE)
    assert shown(found) == expected(images)
    good = [number is not None for own in images for number in own]
    assert [picture.size() for own in found for picture in own if picture.problem() is None] == [(9, 6)] * sum(good)


@pytest.mark.parametrize("entries", [[encoded(0), None], [{"bytes": encoded(0), "path": None}, None], ["0.png", None]])
def test_a_gap_in_a_list_names_row_and_place(
    entries: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pictures(datasets.Dataset.from_list([{"i": entries[:1]}, {"i": entries}]), "i", folder, WHERE)
    says = "data.train.image: row 1 of x.jsonl: nothing at place 1 of its list (from 0)"
    with pytest.raises(BadImage) as raised:
        without_bad_images(found, "refuse", "data.train")
    assert str(raised.value).startswith(f"{says}; ")
    assert without_bad_images(found, "skip", "data.train") == [0]
    assert f"1 of 2 rows left out for bad images: {says}\n" in capsys.readouterr().err


def read_jsonl(path: Path, values: list[Any]) -> datasets.Dataset:
    path.write_text("".join(json.dumps({"i": value}) + "\n" for value in values))
    return datasets.load_dataset("json", data_files={"train": str(path)}, split="train", cache_dir=str(path.parent))


@pytest.mark.parametrize("form", ["struct", "data URI"])
def test_base64_in_json_lines(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def given(text: str) -> Any:
        return {"bytes": text} if form == "struct" else f"data:image/png;base64,{text}"

    texts = [base64.b64encode(encoded(number)).decode() for number in range(3)]
    cut, no_image = texts[1][:-3], base64.b64encode(b"no image" * 100).decode()
    rows = read_jsonl(folder / "x.jsonl", [given(t) for t in (texts[0], cut, texts[1], no_image, f"?{texts[2]}")])
    found = pictures(rows, "i", folder, WHERE)
    # The same pixels and digests as the files have.
    assert shown(found) == expected([[0], [None], [1], [None], [None]])
    assert (
        found[2][0].digest() == pictures(datasets.Dataset.from_list([{"i": "1.png"}]), "i", folder, "")[0][0].digest()
    )
    for number, what in ((1, "is damaged base64: "), (3, "no image file that can be read"), (4, "is damaged base64: ")):
        with pytest.raises(BadImage) as raised:
            without_bad_images([found[0], found[number]], "refuse", "data.train")
        line = str(raised.value)
        assert line.startswith(f"data.train.image: row {number} of x.jsonl: ") and what in line
        assert len(line) < 300 and "\n" not in line
    assert without_bad_images(found, "skip", "data.train") == [0, 2]
    assert "3 of 5 rows left out" in capsys.readouterr().err


def test_base64_where_a_path_should_be_is_said_in_a_line(folder: Path) -> None:
    text = base64.b64encode(encoded(0) * 20).decode()
    found = pictures(datasets.Dataset.from_list([{"i": text}, {"i": "a\0b"}]), "i", folder, WHERE)
    with pytest.raises(BadImage) as raised:
        without_bad_images(found[:1], "refuse", "data.train")
    line = str(raised.value)
    assert "characters): too long for a path; base64 is given as" in line and len(line) < 300
    with pytest.raises(BadImage, match=r"row 1 of x\.jsonl: .*embedded null"):
        without_bad_images(found[1:], "refuse", "data.train")


def test_nothing_is_read_before_it_is_asked_for(folder: Path) -> None:
    rows = datasets.Dataset.from_list([{"i": "missing.png"}, {"i": "1.png"}])
    found = pictures(rows, "i", folder, WHERE)
    assert shown(found[1:]) == expected([[1]])
    with pytest.raises(BadImage, match=r"^data\.train\.image: row 0 of x\.jsonl: .*/missing\.png: no such file$"):
        found[0][0].open()


def test_images_are_turned_as_the_camera_was_held(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    rows = datasets.Dataset.from_list([{"i": encoded(0, exif=exif)}])
    (picture,) = pictures(rows, "i", folder, WHERE)[0]
    assert picture.size() == (6, 9)
    assert np.array_equal(np.asarray(picture.open()), np.rot90(pixels(0), -1))


def test_grey_and_transparent_images_become_rgb(folder: Path) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        file = io.BytesIO()
        Image.fromarray(pixels(0)).convert(mode).save(file, "PNG")
        (picture,) = pictures(datasets.Dataset.from_list([{"i": file.getvalue()}]), "i", folder, WHERE)[0]
        assert np.asarray(picture.open()).shape == (6, 9, 3)


def test_digests_are_of_contents(folder: Path) -> None:
    (folder / "copy.png").write_bytes(encoded(0))
    rows = datasets.Dataset.from_list([{"i": name} for name in ("0.png", "copy.png", "1.png")])
    first, copy, other = [own[0].digest() for own in pictures(rows, "i", folder, WHERE)]
    assert first == copy != other


def bad_rows(folder: Path) -> datasets.Dataset:
    (folder / "cut.png").write_bytes(encoded(0)[:-30])
    (folder / "cut.jpg").write_bytes(encoded(1, "JPEG")[:-60])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    names = [
        "0.png",
        "missing.png",
        "cut.png",
        "cut.jpg",
        "text.png",
        "empty.png",
        "folder.png",
        "http://a/b.png",
        "1.png",
    ]
    return datasets.Dataset.from_list([{"i": name} for name in names])


def test_bad_images_are_skipped_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bad_rows(folder)
    found = pictures(rows, "i", folder, WHERE)
    assert without_bad_images(found, "skip", "data.train") == [0, 8]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "7 of 9 rows left out for bad images: data.train.image: row 1 of x.jsonl: " in said


@pytest.mark.parametrize("number", range(1, 8))
def test_a_bad_image_is_refused_in_one_line_that_names_it(number: int, folder: Path) -> None:
    rows = bad_rows(folder)
    found = pictures(rows, "i", folder, WHERE)
    with pytest.raises(BadImage) as raised:
        without_bad_images([found[0], found[number]], "refuse", "data.train")
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith(f"data.train.image: row {number} of x.jsonl: ")
    assert rows[number]["i"] in line
    assert "data.bad_images: skip" in line
    # What opening it says agrees: nothing that was found to be good fails later.
    with pytest.raises(UserError, match=f"row {number} of"):
        found[number][0].open()


def test_damaged_contents_and_structs_without_anything(folder: Path) -> None:
    rows = datasets.Dataset.from_list(
        [{"i": {"bytes": encoded(0)[:40], "path": None}}, {"i": {"bytes": None, "path": None}}]
    )
    found = pictures(rows, "i", folder, WHERE)
    for number, what in ((0, ""), (1, "neither a path nor the content")):
        with pytest.raises(BadImage, match=f"row {number} of x.jsonl: {what}"):
            without_bad_images([found[number]], "refuse", "data.train")


def test_only_bad_images_are_an_error_even_where_they_are_skipped(folder: Path) -> None:
    rows = datasets.Dataset.from_list([{"i": "missing.png"}] * 3)
    with pytest.raises(BadImage, match="all 3 rows"):
        without_bad_images(pictures(rows, "i", folder, WHERE), "skip", "data.train")
