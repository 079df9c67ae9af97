"""Folders of classes, and folders of data files that have images in sub-folders."""

from pathlib import Path

import pytest
from PIL import Image

from harness.config import SourceConfig
from harness.data.class_folders import images_of_classes, is_class_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images", "thumbnails"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    return tmp_path


@pytest.mark.parametrize("image", [None, "image"])
def test_sub_folders_of_images_are_classes(folder: Path, image: str | None) -> None:
    source = SourceConfig(path=str(folder), image=image)
    (folder / "README.md").write_text("images and thumbnails")
    (folder / ".cache.json").write_text("{}")
    assert is_class_folder(source)
    assert [name for _, name in images_of_classes(source, "data.train")] == ["images", "thumbnails"]


@pytest.mark.parametrize("image", [None, "image"])
@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.json", "train.csv", "TRAIN.CSV"])
def test_beside_data_files_they_are_none(folder: Path, name: str, image: str | None) -> None:
    (folder / name).touch()
    assert not is_class_folder(SourceConfig(path=str(folder), image=image))


def test_a_file_is_none(folder: Path) -> None:
    assert not is_class_folder(SourceConfig(path=str(folder / "images" / "0.png")))
    assert not is_class_folder(SourceConfig(path=str(folder / "nowhere")))
