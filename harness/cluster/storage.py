"""A run directory behind an fsspec URL, for clusters whose nodes share no folder.

The run directory is kept there in parts: each checkpoint is one, each other entry at its top another. The files of a
part lie under their own names; a marker in ``.parts/`` lists them with their checksums and is written last, and removed
before any of them changes. So a part is there whole or not at all, whatever happens while it is copied: what
`harness.files.publish_directory` promises on a disk. ``stages/``, which says what is finished, is copied last.

Hidden files (locks, staging) and ``config.yaml``, which names a folder of the machine that it is on, are not copied.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.console import say
from harness.errors import UserError
from harness.files import publish_directory, read_json, sha256, write_json

_STATE = ".storage.json"  # in the local copy: what it has in common with the storage
_MARKERS = ".parts"
_RECORDS = "stages"
HAND_ON_SECONDS = 5.0


class Storage:
    """The run directory ``run`` on this machine, and the one under ``url`` that it is a copy of.

    Raises:
        UserError: fsspec does not know the URL's protocol, or lacks the package for it.
    """

    def __init__(self, url: str, run: Path) -> None:
        import fsspec

        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"cluster.storage: {url}: {error}") from error
        self._root = f"{root.rstrip('/')}/{run.name}"
        self._run = run

    def pull(self) -> None:
        """Make the copy here equal to what is stored: parts that differ are fetched, parts that are not stored go.

        Raises:
            UserError: a file is not what its marker says.
        """
        with self._held():
            state, stored = self._state(), self._stored()
            for part in self._parts():
                if part not in stored:
                    _remove(self._run / part)
            for part, marker in stored.items():
                entry = state.get(part)
                if entry is None or entry["marker"] != _digest(marker) or entry["files"] != self._signature(part):
                    self._fetch(part, marker)
                    state[part] = {"marker": _digest(marker), "files": self._signature(part)}
            self._write_state({part: entry for part, entry in state.items() if part in stored})

    def push(self) -> None:
        """Make what is stored equal to the copy here."""
        with self._held():
            state, stored, parts = self._state(), self._stored(), self._parts()
            for part in stored:
                if part not in parts:
                    self._unstore(part, stored[part])
                    state.pop(part, None)
            # The newest checkpoint first: older ones lose their moments when it appears.
            for part in sorted(parts, key=lambda p: (p == _RECORDS, -_step(p), p)):
                self._store(part, state, stored)
            self._write_state({part: entry for part, entry in state.items() if part in parts})

    @contextmanager
    def checkpoints_handed_on(self) -> Iterator[None]:
        """Inside the block a new checkpoint is stored soon after it appears, with the metrics up to it."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(HAND_ON_SECONDS):
                try:
                    self._push_newest_checkpoint()
                except Exception as error:  # storage fails in as many ways as there are kinds of it; the last push says
                    say(f"warning: cluster.storage: the newest checkpoint is not stored yet: {error}")

        thread = threading.Thread(target=watch, daemon=True, name="checkpoints to storage")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _push_newest_checkpoint(self) -> None:
        checkpoints = [part for part in self._parts() if _step(part) >= 0]
        if not checkpoints:
            return
        newest = max(checkpoints, key=_step)
        with self._held():
            state, stored = self._state(), self._stored()
            if newest in stored:
                return
            for part in ("metrics.jsonl", newest):  # a line for every step of the checkpoint is there before it is
                if (self._run / part).exists():
                    self._store(part, state, stored)
            self._write_state(state)

    # -- one part --------------------------------------------------------------------------------------------------

    def _store(self, part: str, state: dict[str, Any], stored: dict[str, bytes]) -> None:
        entry, signature = state.get(part), self._signature(part)
        if entry and part in stored and entry["marker"] == _digest(stored[part]) and entry["files"] == signature:
            return
        # What is copied is a snapshot: metrics grow while they are read.
        listing = {}
        if part in stored:
            self._files.rm_file(self._marker(part))
        for name in signature:
            source = self._run / part / name if name else self._run / part
            target = f"{self._root}/{part}/{name}" if name else f"{self._root}/{part}"
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            if name:
                listing[name] = {"size": source.stat().st_size, "sha256": sha256(source)}
                self._files.put_file(str(source), target)
            else:
                content = source.read_bytes()
                listing[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                self._files.pipe_file(target, content)
        if part in stored:
            for name in _listed(stored[part]).keys() - listing.keys():
                self._remove_stored(f"{self._root}/{part}/{name}" if name else f"{self._root}/{part}")
        marker = json.dumps({"files": listing}, indent=2, sort_keys=True).encode()
        self._files.makedirs(f"{self._root}/{_MARKERS}", exist_ok=True)
        self._files.pipe_file(self._marker(part), marker)
        state[part] = {"marker": _digest(marker), "files": signature}

    def _fetch(self, part: str, marker: bytes) -> None:
        staging = self._run / f".{part.replace('/', '.')}.fetching"
        _remove(staging)
        for name, expected in _listed(marker).items():
            target = staging / name if name else staging
            target.parent.mkdir(parents=True, exist_ok=True)
            source = f"{self._root}/{part}/{name}" if name else f"{self._root}/{part}"
            self._files.get_file(source, str(target))
            if target.stat().st_size != expected["size"] or sha256(target) != expected["sha256"]:
                raise UserError(
                    f"cluster.storage: {source} is not what was stored; remove {self._marker(part)}, then run the same "
                    "command again: the stage that made it is redone"
                )
        if staging.is_file():
            staging.replace(self._run / part)
        else:
            staging.mkdir(parents=True, exist_ok=True)
            publish_directory(staging, self._run / part)

    def _unstore(self, part: str, marker: bytes) -> None:
        self._files.rm_file(self._marker(part))
        for name in _listed(marker):
            self._remove_stored(f"{self._root}/{part}/{name}" if name else f"{self._root}/{part}")

    def _remove_stored(self, path: str) -> None:
        if self._files.exists(path):
            self._files.rm_file(path)

    # -- what there is ---------------------------------------------------------------------------------------------

    def _parts(self) -> list[str]:
        """Parts of the copy here."""
        if not self._run.is_dir():
            return []
        top = [entry.name for entry in self._run.iterdir() if not entry.name.startswith(".")]
        parts = [name for name in top if name not in ("checkpoints", "config.yaml")]
        if "checkpoints" in top:
            inside = (self._run / "checkpoints").iterdir()
            parts += [f"checkpoints/{entry.name}" for entry in inside if _step(f"checkpoints/{entry.name}") >= 0]
        return sorted(parts)

    def _stored(self) -> dict[str, bytes]:
        """Markers of the parts that are stored whole."""
        self._files.invalidate_cache()
        folder = f"{self._root}/{_MARKERS}"
        if not self._files.isdir(folder):
            return {}
        markers = {}
        for path in self._files.ls(folder, detail=False):
            content = self._files.cat_file(path)
            name = path.rsplit("/", 1)[-1]
            if name.endswith(".json") and _is_whole(content):
                markers[name.removesuffix(".json").replace("%2F", "/")] = content
        return markers

    def _signature(self, part: str) -> dict[str, list[int]]:
        """Size and modification time of the files of ``part`` here; a part that is a file has one, without a name."""
        path = self._run / part
        if path.is_file():
            return {"": _stat(path)}
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return {file.relative_to(path).as_posix(): _stat(file) for file in files}

    def _marker(self, part: str) -> str:
        return f"{self._root}/{_MARKERS}/{part.replace('/', '%2F')}.json"

    def _state(self) -> dict[str, Any]:
        file = self._run / _STATE
        return read_json(file) if file.is_file() else {}

    def _write_state(self, state: dict[str, Any]) -> None:
        write_json(self._run / _STATE, state)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """One process of this machine at a time: the workers of a node have one copy."""
        self._run.mkdir(parents=True, exist_ok=True)
        with (self._run / ".storage.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _step(part: str) -> int:
    """The step of a checkpoint's part; -1 for another."""
    name = part.removeprefix("checkpoints/step-")
    return int(name) if name != part and name.isdigit() else -1


def _stat(file: Path) -> list[int]:
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _listed(marker: bytes) -> dict[str, dict[str, Any]]:
    return json.loads(marker)["files"]


def _is_whole(marker: bytes) -> bool:
    """Whether a marker was written to its end; one that was not marks nothing."""
    try:
        json.loads(marker)
    except ValueError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
