"""Images of data sets: paths, contents, structs, lists; what is wrong is named by its row."""

import io
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


def shown(found: list[tuple[Picture, ...]]) -> list[list[list[int]]]:
    return [[np.asarray(picture.open()).tolist() for picture in own] for own in found]


def expected(rows: list[list[int]]) -> list[list[list[int]]]:
    return [[pixels(number).tolist() for number in own] for own in rows]


def forms(folder: Path) -> dict[str, tuple[datasets.Dataset, list[list[int]]]]:
    """Data sets with an image column of every form, and which images their rows have."""
    struct = [{"bytes": encoded(0), "path": None}, None, {"bytes": None, "path": "2.png"}]
    image = datasets.Dataset.from_list([{"i": {"bytes": encoded(n), "path": "x.png"}} for n in range(3)])
    lists = datasets.Dataset.from_list([{"i": [encoded(0), encoded(1)]}, {"i": None}, {"i": []}, {"i": [encoded(3)]}])
    return {
        "paths": (
            datasets.Dataset.from_list([{"i": "0.png"}, {"i": ""}, {"i": None}, {"i": "3.png"}]),
            [[0], [], [], [3]],
        ),
        "absolute": (datasets.Dataset.from_list([{"i": str(folder / "1.png")}]), [[1]]),
        "list of paths": (datasets.Dataset.from_list([{"i": ["0.png", "1.png"]}, {"i": []}]), [[0, 1], []]),
        "list with a gap": (datasets.Dataset.from_list([{"i": ["", "1.png"]}, {"i": ["2.png"]}]), [[1], [2]]),
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
    assert [picture.size() for own in found for picture in own] == [(9, 6)] * sum(map(len, images))


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
