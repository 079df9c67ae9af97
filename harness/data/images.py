"""The images of a data set: where they are, and opening them; what is wrong with one is said with its row.

A column may hold paths, the content of image files (as hub and parquet data sets have it, by itself or as a struct of
``bytes`` and ``path``), or lists of either; nothing, an empty text and an empty list are rows without an image. In a
list an empty text is no image, and nothing where one should be is a bad image. JSON has no bytes: there the content is
base64, as ``bytes`` of a struct or in a data URI (RFC 2397). Nothing is opened or kept here: a data set of images is
larger than memory.
"""

import base64
import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image, ImageOps

from harness.console import progress, say
from harness.errors import UserError

if TYPE_CHECKING:
    import datasets
    import numpy
    import pyarrow

_CHUNK = 10_000  # rows whose images are counted at a time
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF: how the camera was held
_NEITHER = "neither a path nor the content of an image file"
_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_LONGEST, _SHOWN = 200, 60  # characters of a name that messages show whole; those they show of a longer one


class BadImage(UserError):
    """An image that is missing or damaged."""


@dataclass(frozen=True)
class Picture:
    """One image of a data set, not opened yet.

    Attributes:
        where: its row, in messages (``data.train.image: row 3 of train.jsonl``).
        find: gives its path, or the content of its file; may raise `BadImage`.
    """

    where: str
    find: Callable[[], Path | bytes]

    def open(self) -> Image.Image:
        """The image as RGB, turned as its EXIF data say.

        Raises:
            BadImage: it is missing or damaged.
        """

        def whole(image: Image.Image) -> Image.Image:
            return (ImageOps.exif_transpose(image) or image).convert("RGB")

        return self._with(whole)

    def size(self) -> tuple[int, int]:
        """Width and height of what `open` gives, read from the file's first bytes.

        Raises:
            BadImage: it is missing or damaged.
        """

        def turned(image: Image.Image) -> tuple[int, int]:
            width, height = image.size
            return (height, width) if image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE else (width, height)

        return self._with(turned)

    def digest(self) -> str:
        """SHA-256 of the file's content.

        Raises:
            BadImage: it is missing.
        """
        found = self.find()
        try:
            return hashlib.sha256(found.read_bytes() if isinstance(found, Path) else found).hexdigest()
        except OSError as error:
            raise BadImage(f"{self._named()}: {_in_a_line(error)}") from error

    def problem(self) -> str | None:
        """What is wrong with it, in one line; None where it can be opened. Reads all of the file."""
        try:
            found = self.find()
            if isinstance(found, Path):
                status = found.stat()
                reason = _problem_of_file(str(found), status.st_size, status.st_mtime_ns)
            else:
                reason = _problem(io.BytesIO(found))
        except BadImage as error:
            return str(error)
        except (OSError, ValueError) as error:  # a path with a zero byte in it is a ValueError
            reason = _in_a_line(error)
        return None if reason is None else f"{self._named()}: {reason}"

    def _with(self, use: Callable[[Image.Image], Any]) -> Any:
        found = self.find()
        try:
            with Image.open(found if isinstance(found, Path) else io.BytesIO(found)) as image:
                return use(image)
        except Exception as error:  # decoders raise whatever they come across in a damaged file
            raise BadImage(f"{self._named()}: {_in_a_line(error)}") from error

    def _named(self) -> str:
        found = self.find()
        return f"{self.where}: {_short(str(found))}" if isinstance(found, Path) else self.where


def pictures(rows: "datasets.Dataset", column: str, folder: Path, where: str) -> list[tuple[Picture, ...]]:
    """The images of every row, in their order.

    Args:
        rows: the data set.
        column: of its images.
        folder: where relative paths start.
        where: what names a row in messages, with ``{}`` in the place of its number.
    """
    found = _undecoded(rows, column)

    def picture(number: int, place: int) -> Picture:
        named = where.format(number)
        return Picture(named, lambda: _found(found[number][column], place, folder, named))

    counts = _counts(found, column)
    return [tuple(picture(number, place) for place in range(count)) for number, count in enumerate(counts)]


def without_bad_images(
    images: Sequence[Sequence[Picture]], bad: Literal["refuse", "skip"], description: str
) -> list[int]:
    """The numbers of the rows whose images can all be opened; every image is read once, several at a time.

    Args:
        images: of every row.
        bad: refuse the first row that has a bad image, or skip such rows and say how many there were.
        description: of the data, in messages (``data.train``).

    Raises:
        BadImage: there is a bad image and it is not to be skipped; or all rows have one.
    """

    def problem(own: Sequence[Picture]) -> str | None:
        return next((found for picture in own if (found := picture.problem()) is not None), None)

    good, first = [], None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images") as threads:
        try:
            found = progress(threads.map(problem, images), f"images of {description}", len(images))
            for number, reason in enumerate(found):
                if reason is None:
                    good.append(number)
                elif bad == "refuse":
                    raise BadImage(f"{reason}; mend or remove it, or set data.bad_images: skip")
                else:
                    first = first or reason
        finally:
            threads.shutdown(cancel_futures=True)
    if first is not None and not good:
        raise BadImage(f"{first}; and so it is with all {len(images)} rows")
    if first is not None:
        say(f"warning: {description}: {len(images) - len(good)} of {len(images)} rows left out for bad images: {first}")
    return good


def _undecoded(rows: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """The column alone, images as they are stored."""
    import datasets

    def stored(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(stored(feature.feature))
        if isinstance(feature, datasets.LargeList):
            return datasets.LargeList(stored(feature.feature))
        return feature

    alone = rows.select_columns([column])
    feature = stored(alone.features[column])
    return alone if feature == alone.features[column] else alone.cast_column(column, feature)


def _counts(rows: "datasets.Dataset", column: str) -> list[int]:
    """How many images each row has, as `_entries` has it, without making Python values of those that may be large."""
    import datasets

    feature = rows.features[column]
    listed = isinstance(feature, datasets.List | datasets.LargeList)
    inner = feature.feature if listed else feature
    mixed = isinstance(inner, datasets.Json)  # rows of a JSON file that are not all of one form
    texts = isinstance(inner, datasets.Value) and "string" in str(inner.dtype)
    table, counts = rows if mixed else rows.with_format("arrow"), []
    for start in range(0, len(rows), _CHUNK):
        values = table[start : start + _CHUNK][column]
        if mixed:
            counts += [len(_entries(value)) for value in values]
        else:
            for part in values.chunks:
                counts += _counts_of(part, listed, texts).tolist()
    return counts


def _counts_of(values: "pyarrow.Array", listed: bool, texts: bool) -> "numpy.ndarray":
    """`_counts` of one Arrow array: of lists or not, and of texts or of contents."""
    import numpy
    import pyarrow.compute as compute

    def empty(own: "pyarrow.Array") -> "numpy.ndarray":
        lengths = compute.binary_length(own).fill_null(1)
        return numpy.asarray(lengths.to_numpy(zero_copy_only=False) == 0)

    def whole(own: "pyarrow.Array") -> "numpy.ndarray":
        return numpy.asarray(own.to_numpy(zero_copy_only=False), dtype=numpy.int64)

    if not listed:
        found = whole(values.is_valid())
        return found - empty(values) if texts else found
    found = whole(compute.list_value_length(values).fill_null(0))
    if not texts:
        return found
    parents = whole(compute.list_parent_indices(values))
    return found - numpy.bincount(parents[empty(compute.list_flatten(values))], minlength=len(values))


def _entries(value: Any) -> list[tuple[int | None, Any]]:
    """The images of a row as they are stored, each with its place in the row's list; None where there is no list."""
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [(None, value)]
    return [(place, one) for place, one in enumerate(value) if one != ""]


def _found(value: Any, number: int, folder: Path, where: str) -> Path | bytes:
    """The path or content of one image of a row, the ``number``-th that it has."""
    place, value = _entries(value)[number]
    if isinstance(value, Mapping):
        content = value.get("bytes")
        if isinstance(content, str) and content:  # from a JSON file
            return _decoded(content, where)
        value = content or value.get("path")
    if not value and place is not None:
        raise BadImage(f"{where}: nothing at place {place} of its list (from 0)")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadImage(f"{where}: {_NEITHER}")
    if _DATA_URI.match(value):
        return _decoded(value, where)
    if "://" in value:
        raise BadImage(f"{where}: {_short(value)} is an address; download the images and name their files")
    return folder / value


def _decoded(text: str, where: str) -> bytes:
    """What base64 stands for, by itself or in a data URI; line breaks in it say nothing."""
    given = _DATA_URI.match(text)
    try:
        return base64.b64decode("".join(text[given.end() if given else 0 :].split()), validate=True)
    except ValueError as error:
        raise BadImage(f"{where}: {_short(text)} is damaged base64: {_in_a_line(error)}") from error


def _short(name: str) -> str:
    """A name as messages show it: base64 where a path should be would fill the screen."""
    return name if len(name) <= _LONGEST else f"{name[:_SHOWN]}… ({len(name)} characters)"


@cache
def _problem_of_file(path: str, size: int, modified: int) -> str | None:
    """`_problem` of the file, found once for all stages of a process that read it."""
    with open(path, "rb") as file:
        return _problem(file)


def _problem(file: Any) -> str | None:
    try:
        with Image.open(file) as image:
            image.draft("RGB", (32, 32))  # reads all of a JPEG, and computes an eighth of it
            image.load()
    except Exception as error:  # as in `Picture._with`
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return 'too long for a path; base64 is given as {"bytes": …} or as a data URI'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image file that can be read"
    return " ".join(str(error).split()) or type(error).__name__
