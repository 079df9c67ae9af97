"""Image data as a folder with a sub-folder of images for each class."""

from pathlib import Path

from harness.config import SourceConfig
from harness.errors import UserError

_DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


def is_class_folder(source: SourceConfig) -> bool:
    """Whether a source is a folder with images in sub-folders, and without data files of its own.

    Beside data files the sub-folders hold what a column of these names.
    """
    path = Path(source.path)
    if not path.is_dir() or data_files(path):
        return False
    return source.image is None or any(images_in(folder) for folder in _sub_folders(path))


def class_folders(source: SourceConfig, key: str) -> list[Path]:
    """The folder of each class, in alphabetical order; each is called as its class.

    Raises:
        UserError: there is none, or a split of them is asked for. ``key`` (``data.train``) names the source.
    """
    if source.split != "train":
        raise UserError(
            f"{key}.split: {source.split!r} given; a folder of classes has no splits: leave it out, and give the "
            f"folder of the split as {key}.path"
        )
    folders = _sub_folders(Path(source.path))
    if not folders:
        raise UserError(f"{key}.path: {source.path} has no sub-folders; task 'image_classification' reads one a class")
    return folders


def images_of_classes(source: SourceConfig, key: str) -> list[tuple[Path, str]]:
    """Every image and its class, class by class.

    Raises:
        UserError: as `class_folders`, or a class has no images.
    """
    found = []
    for folder in class_folders(source, key):
        images = images_in(folder)
        if not images:
            raise UserError(f"{key}.path: the class folder {folder} has no images; fill or remove it")
        found += [(image, folder.name) for image in images]
    return found


def images_in(folder: Path) -> list[Path]:
    """The images directly in ``folder``, by the names that image files have."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes and file.name[0] != ".")


def data_files(folder: Path) -> list[Path]:
    """The data files directly in ``folder``, by their names; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        f for f in folder.iterdir() if f.suffix.lower() in _DATA_SUFFIXES and f.name[0] != "." and f.is_file()
    )


def _sub_folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
