"""Folders that are made once and kept in the cache, by what they are made from."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.files import publish_directory
from harness.run_directory import cache_directory


def kept_folder(name: str, content: Mapping[str, Any], write: Callable[[Path], None], cache: Path | None) -> Path:
    """The folder of ``content``, made on the first call.

    Several processes may ask at once: one makes it and the others wait for it. What a killed one left is swept away.

    Args:
        name: what the folder's name begins with.
        content: what it is made from, as JSON takes it; another content is another folder.
        write: makes it at the path that it is given.
        cache: folder of all such folders; by default ``$PALIMPSEST_CACHE`` or ``~/.cache/palimpsest``.
    """
    root = cache or cache_directory()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder = root / f"{name}-{digest[:12]}"
    if not folder.exists():
        with _lock(root / f".{folder.name}.lock"):
            if not folder.exists():
                staging = root / f".{folder.name}.staging"
                shutil.rmtree(staging, ignore_errors=True)
                write(staging)
                publish_directory(staging, folder)
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
