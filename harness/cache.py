"""Work that outlives one run, kept by content: plain decompositions, statistics, initial adapters.

An entry is one safetensors file, ``<folder>/<kind>/<key>.safetensors``. The key is the SHA-256 of everything that
decides the tensors, as canonical JSON; metadata hold that content, the time of writing and a checksum over all of it.
Entries appear whole or not at all and are never changed, so that any number of processes, on any number of machines,
may read, write and remove them at once. What is read is checked: a damaged entry is removed, and its caller makes it
anew.

Files are read into memory of our own, never mapped: over a network another machine may remove a file that is being
read, and a mapping of it would then end the process where a read fails with an error.

The folder has other lodgers (``eval/``: results of evaluations; ``tiny-…/``: embedded worlds). They are no entries.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from harness.console import in_words, say
from harness.errors import UserError
from harness.run_directory import cache_directory

if TYPE_CHECKING:
    import torch

GIB = 2**30
DEFAULT_LIMIT = 50 * GIB

_KIND = re.compile(r"(?!(eval|tiny)\b)[a-z]+(-[a-z]+)*")
_ENTRY = re.compile(r"([0-9a-f]{64})\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\..*\.tmp")
_ABANDONED = 24 * 3600  # seconds after which a temporary file is what a killed process left
_LARGEST_HEADER = 100 * 10**6  # the format's own limit, bytes
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_DTYPES = {  # safetensors' name: torch's name, bytes of an element
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_said: set[str] = set()  # what this process has warned about


class DamagedEntry(Exception):
    """A file in the cache that is not what was written; the message says in what way."""


@dataclass(frozen=True)
class Entry:
    """A file of the cache: ``size`` in bytes, and when it was last ``used`` (read or written), seconds since 1970."""

    kind: str
    path: Path
    size: int
    used: float

    @property
    def key(self) -> str:
        """SHA-256 of the content."""
        return self.path.stem


class Cache:
    """Tensors by content, in ``folder``, of which the least recently used are removed beyond ``limit`` bytes.

    Args:
        folder: by default ``$PALIMPSEST_CACHE``, else ``~/.cache/palimpsest``. It is made when something is kept.
        limit: bytes of all entries together; by default ``$PALIMPSEST_CACHE_GIB``, else 50 GiB.

    Raises:
        UserError: ``$PALIMPSEST_CACHE_GIB`` is no number of GiB.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = cache_directory() if folder is None else Path(folder)
        self.limit = _limit_of_environment() if limit is None else limit

    def get(self, kind: str, content: Mapping[str, Any]) -> "dict[str, torch.Tensor] | None":
        """The tensors kept under ``content``, on the CPU, bit for bit, or None.

        A damaged entry is named in one line and removed; where the folder can be written, a hit counts as use.
        """
        import torch

        tensors = {}

        def new_tensor(field: _Field) -> memoryview:
            tensors[field.name] = torch.empty(field.shape, dtype=getattr(torch, _DTYPES[field.dtype][0]))
            return _bytes(tensors[field.name])

        path = self._path(kind, content)
        try:
            with path.open("rb") as file:
                _read(file, kind, path.stem, new_tensor)
                with suppress(OSError):  # a folder that can only be read is a cache as well
                    os.utime(file.fileno())
                return tensors
        except DamagedEntry as damage:
            print(f"{self.discard(path, damage)}; what it held is made anew", file=sys.stderr)
        except OSError as error:
            # Absent, or removed on another machine while it was being read: a plain miss. put() says what is wrong
            # with a folder that is none.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                self._warn(error)
        return None

    def put(self, kind: str, content: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]") -> bool:
        """Keep ``tensors`` (any device) under ``content``; False where they could not be kept.

        A disk that is full or cannot be written is said in one line per process; the run goes on without a cache.

        Raises:
            TypeError, ValueError: ``content`` is not JSON, ``kind`` no word, or a tensor of a dtype that is not kept.
        """
        path = self._path(kind, content)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header, ordered = _header(kind, _canonical(content), on_cpu)
        size = len(header) + sum(tensor.nbytes for tensor in ordered)
        if size > self.limit:
            _say_once(
                f"cache: {in_words(size)} of kind {kind} are more than the limit of {in_words(self.limit)} and are not "
                "kept; raise $PALIMPSEST_CACHE_GIB",
                about=f"limit of {self.folder}",
            )
            return False
        here = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}-{uuid.uuid4().hex[:8]}"
        temporary = path.with_name(f".{path.stem}.{here}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Asked before, because a disk filled up for a moment is full for the run's checkpoints as well.
            if shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with temporary.open("xb") as file:
                file.write(header)
                for tensor in ordered:
                    file.write(_bytes(tensor))
                file.flush()
                os.fsync(file.fileno())
            with self._locked():
                self._remove_beyond(self.limit - size, [entry for entry in self.entries() if entry.path != path])
                self._remove_abandoned()
                temporary.replace(path)
        except OSError as error:
            self._warn(error)
            return False
        finally:
            with suppress(OSError):  # the error that matters has been said
                temporary.unlink(missing_ok=True)
        return True

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Every entry (of ``kind``), least recently used first."""
        found = [
            Entry(folder.name, path, status.st_size, status.st_mtime)
            for folder, path, status in self._files()
            if _ENTRY.fullmatch(path.name) and kind in (None, folder.name)
        ]
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def evaluations(self) -> list[Entry]:
        """Scores of base models, which evaluation keeps in the same folder; nothing here removes them."""
        found = []
        for path in (self.folder / "eval").glob("*.json"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append(Entry("eval", path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def content(self, entry: Entry) -> dict[str, Any]:
        """What decided the tensors of ``entry``, as its header says it.

        Raises:
            DamagedEntry: the header cannot be read.
            OSError: the file cannot.
        """
        with entry.path.open("rb") as file:
            return json.loads(_read_header(file).content)

    def check(self, entry: Entry) -> None:
        """Read all of ``entry``; it does not count as use.

        Raises:
            DamagedEntry: it is not what was written.
            OSError: it cannot be read.
        """
        with entry.path.open("rb") as file:
            _read(file, entry.kind, entry.key, lambda field: bytearray(field.size))

    def discard(self, path: Path, damage: DamagedEntry) -> str:
        """Remove a damaged file; a line that says so, or that it could not be removed."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            return f"cache: {path} is damaged ({damage}), is not used and cannot be removed ({error.strerror})"
        return f"cache: {path} was damaged ({damage}) and is removed"

    def prune(self, to: float | None = None, kind: str | None = None) -> list[Entry]:
        """Remove the least recently used entries until those (of ``kind``) have at most ``to`` bytes; the removed.

        ``to`` is the limit by default. Temporary files which a killed process left a day ago or more go as well.

        Raises:
            UserError: the folder cannot be written.
        """
        if not self.folder.is_dir():
            return []
        try:
            with self._locked():
                self._remove_abandoned()
                return self._remove_beyond(self.limit if to is None else to, self.entries(kind))
        except OSError as error:
            raise UserError(f"cache: {self.folder}: {error.strerror}; nothing can be removed there") from error

    def _path(self, kind: str, content: Mapping[str, Any]) -> Path:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"kind of a cache entry: {kind!r}; lower-case words joined by hyphens, not eval or tiny")
        return self.folder / kind / f"{_sha256(_canonical(content))}.safetensors"

    def _files(self) -> Iterator[tuple[Path, Path, os.stat_result]]:
        """``(folder, file, status)`` of all that lies in folders of entries; others may remove it meanwhile."""
        if not self.folder.is_dir():
            return
        for folder in self.folder.iterdir():
            if not (_KIND.fullmatch(folder.name) and folder.is_dir()):
                continue
            with os.scandir(folder) as files:
                for file in files:
                    with suppress(FileNotFoundError):
                        yield folder, Path(file.path), file.stat()

    def _remove_beyond(self, limit: float, entries: list[Entry]) -> list[Entry]:
        total = sum(entry.size for entry in entries)
        removed = []
        for entry in entries:
            if total <= limit:
                break
            entry.path.unlink(missing_ok=True)
            total -= entry.size
            removed.append(entry)
        return removed

    def _remove_abandoned(self) -> None:
        for _, path, status in self._files():
            if _TEMPORARY.fullmatch(path.name) and status.st_mtime < time.time() - _ABANDONED:
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time counts and removes. Where a file system has no locks, too much may be removed."""
        with (self.folder / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield

    def _warn(self, error: OSError) -> None:
        _say_once(
            f"cache: {self.folder}: {error.strerror}; the run goes on without it. Free some space, choose another "
            "folder by $PALIMPSEST_CACHE, or set init.cache: false",
            about=str(self.folder),
        )


@dataclass(frozen=True)
class _Field:
    """A tensor of a file: name, safetensors' dtype, shape, bytes."""

    name: str
    dtype: str
    shape: list[int]
    size: int


@dataclass(frozen=True)
class _Header:
    kind: str
    content: str
    written: str
    checksum: str
    fields: list[_Field]


def _header(kind: str, content: str, tensors: "Mapping[str, torch.Tensor]") -> "tuple[bytes, list[torch.Tensor]]":
    """The first bytes of a file, and the tensors in the order in which their bytes follow."""
    names = {torch_name: name for name, (torch_name, _) in _DTYPES.items()}
    # Wide elements first, as safetensors itself writes them: every tensor is then aligned to its own elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    fields, digests, end = {}, [], 0
    for name, tensor in ordered:
        if (dtype := names.get(str(tensor.dtype).removeprefix("torch."))) is None:
            raise TypeError(f"cache: {name} has dtype {tensor.dtype}; kept are {', '.join(names)}")
        shape = list(tensor.shape)
        begin, end = end, end + tensor.nbytes
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        digests.append((name, dtype, shape, hashlib.sha256(_bytes(tensor)).hexdigest()))
    written = datetime.now(UTC).isoformat(timespec="seconds")
    metadata = {
        "kind": kind,
        "content": content,
        "written": written,
        "checksum": _checksum(kind, content, written, digests),
    }
    text = json.dumps({"__metadata__": metadata, **fields}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]


def _read_header(file: BinaryIO) -> _Header:
    """The header of an open file, which is then at its first tensor; its length fits the file's."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise DamagedEntry(f"its header does not fit into its {size} bytes")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        described = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        fields, position = [], 0
        for name, field in described:
            count = math.prod(field["shape"]) * _DTYPES[field["dtype"]][1]
            if field["data_offsets"] != [position, position + count] or min(field["shape"], default=0) < 0:
                raise ValueError(name)
            fields.append(_Field(name, field["dtype"], field["shape"], count))
            position += count
        found = _Header(**{name: metadata[name] for name in ("kind", "content", "written", "checksum")}, fields=fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedEntry("its header cannot be read") from error
    if size != (expected := 8 + length + position):
        raise DamagedEntry(f"it has {size} of {expected} bytes")
    return found


def _read(file: BinaryIO, kind: str, key: str, new_buffer: "Callable[[_Field], bytearray | memoryview]") -> None:
    """Read every tensor's bytes into a ``new_buffer`` of its size. Raises `DamagedEntry`."""
    header = _read_header(file)
    if (header.kind, _sha256(header.content)) != (kind, key):
        raise DamagedEntry("it belongs under another key")
    digests = []
    for field in header.fields:
        buffer = new_buffer(field)
        if (count := file.readinto(buffer)) != field.size:
            raise DamagedEntry(f"it ends {field.size - count} bytes too early")
        digests.append((field.name, field.dtype, field.shape, hashlib.sha256(buffer).hexdigest()))
    if _checksum(header.kind, header.content, header.written, digests) != header.checksum:
        raise DamagedEntry("its checksum is wrong")


def _checksum(kind: str, content: str, written: str, digests: Iterable[tuple[str, str, list[int], str]]) -> str:
    return _sha256(json.dumps([kind, content, written, sorted(digests)]))


def _canonical(content: Mapping[str, Any]) -> str:
    """One text for one content, whatever the order of its keys. Raises ``ValueError`` on NaN: it equals nothing."""
    return json.dumps(dict(content), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _limit_of_environment() -> int:
    given = os.environ.get("PALIMPSEST_CACHE_GIB")
    if given is None:
        return DEFAULT_LIMIT
    try:
        gib = float(given)
        if gib < 0:
            raise ValueError
        return int(gib * GIB)  # a ValueError for NaN, an OverflowError for infinity
    except (ValueError, OverflowError):
        raise UserError(f"$PALIMPSEST_CACHE_GIB: {given!r}; a number of GiB, 0 or more") from None


def _say_once(line: str, about: str) -> None:
    """Say ``line``, unless this process has said something ``about`` the same before."""
    if about not in _said:
        _said.add(about)
        say(line)
