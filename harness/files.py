"""Files that are either old or new, never half: temporary name, fsync, rename."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically (UTF-8), making parent folders."""
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically, making parent folders."""
    _write(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ``ValueError`` on NaN or inf: JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``rows`` as JSON Lines, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Read a JSON file (UTF-8)."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` (any device; made contiguous, on the CPU) as one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(on_cpu, temporary, metadata=dict(metadata or {}) or None)
        except SafetensorError as error:
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error

    _write(path, save)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_checksum(tensor: "torch.Tensor") -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    import torch

    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)} ".encode())
    digest.update(content.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def publish_directory(staging: Path, final: Path) -> None:
    """Make the finished folder ``staging`` appear as ``final``, replacing what stood there.

    Every file is fsynced before the rename. A kill between the two renames leaves no ``final`` and the stage is
    run again; it never leaves a half-written one.
    """
    for file in staging.rglob("*"):
        _fsync(file)
    _fsync(staging)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        discarded = Path(tempfile.mkdtemp(prefix=f".{final.name}.old-", dir=final.parent))
        final.rename(discarded / final.name)
        staging.rename(final)
        shutil.rmtree(discarded)
    else:
        staging.rename(final)
    _fsync(final.parent)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # writing to an open file does not say which
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
