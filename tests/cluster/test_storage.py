"""A run directory behind a URL: what arrives is what was handed on, whole parts or none, whatever is interrupted."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from harness.cluster.storage import Storage
from harness.errors import UserError


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/stored" if request.param == "file" else f"memory://{uuid.uuid4().hex}"


def fill(run: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    return run


def files_of(run: Path) -> dict[str, str]:
    """What a reader of the run directory sees; hidden files are nobody's."""
    files = [file for file in run.rglob("*") if file.is_file()]
    names = {file.relative_to(run).as_posix(): file for file in files}
    return {name: file.read_text() for name, file in names.items() if not name.startswith(".")}


FILES = {
    "stages/train.json": "{}",
    "metrics.jsonl": "1\n2\n",
    "checkpoints/step-5/trained/a.safetensors": "five",
    "checkpoints/step-10/trained/a.safetensors": "ten",
    "checkpoints/step-10/optimizer/a.safetensors": "moments",
    "init/adapter.safetensors": "A",
}


def test_copies_are_equal_after_any_change(url: str, tmp_path: Path) -> None:
    one, two = fill(tmp_path / "one" / "run", FILES), tmp_path / "two" / "run"
    fill(one, {"config.yaml": "of this machine", ".init.staging/layers/x": "not done"})
    Storage(url, one).push()
    Storage(url, two).pull()
    assert files_of(two) == FILES

    (two / "checkpoints/step-10/optimizer/a.safetensors").unlink()
    (two / "checkpoints/step-10/optimizer").rmdir()
    (two / "init/adapter.safetensors").unlink()
    (two / "init").rmdir()
    fill(two, {"checkpoints/step-15/trained/a.safetensors": "fifteen", "metrics.jsonl": "1\n2\n3\n", "adapter/x": "x"})
    Storage(url, two).push()
    fill(one, {"checkpoints/step-12/trained/a.safetensors": "of an attempt that was lost"})
    Storage(url, one).pull()
    assert files_of(one) == files_of(two) | {"config.yaml": "of this machine"}


def test_only_what_differs_is_copied(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fill(tmp_path / "one" / "run", FILES)
    storage = Storage(url, one)
    storage.push()
    files, _ = fsspec.core.url_to_fs(url)
    put: list[str] = []
    monkeypatch.setattr(type(files), "put_file", lambda self, source, target, **_: put.append(target))
    monkeypatch.setattr(type(files), "get_file", lambda self, source, target, **_: put.append(source))
    storage.push()
    storage.pull()
    assert put == []


class Interrupted(Exception):
    """The process ends here."""


def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch, url: str) -> Callable[[], None]:
    """Let ``count`` changes of the storage happen and no more; what is given undoes that."""
    files = type(fsspec.core.url_to_fs(url)[0])
    left = [count]

    def limited(name: str) -> None:
        original = getattr(files, name)

        def operation(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                raise Interrupted
            left[0] -= 1
            return original(*args, **kwargs)

        monkeypatch.setattr(files, name, operation)

    for name in ("put_file", "pipe_file", "rm_file"):
        limited(name)
    return monkeypatch.undo


def test_a_push_that_is_cut_short_anywhere(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part that arrives is one of the old or one of the new; a second push makes all of them new."""
    changed = FILES | {
        "checkpoints/step-10/trained/a.safetensors": "ten again",
        "init/adapter.safetensors": "B",
        "init/second.safetensors": "C",
        "stages/train.json": '{"finished": true}',
    }
    parts = ("stages/", "metrics.jsonl", "checkpoints/step-5/", "checkpoints/step-10/", "init/")
    finished = False
    for count in range(60):
        place = f"{url}/{count}"
        one, two = tmp_path / f"one-{count}" / "run", tmp_path / f"two-{count}" / "run"
        Storage(place, fill(one, FILES)).push()
        fill(one, changed)
        undo = interrupted_after(count, monkeypatch, place)
        try:
            Storage(place, one).push()
            finished = True
        except Interrupted:
            pass
        undo()
        Storage(place, two).pull()
        seen = files_of(two)
        for part in parts:
            found = {name: text for name, text in seen.items() if name.startswith(part)}
            allowed = [{n: t for n, t in world.items() if n.startswith(part)} for world in (FILES, changed)]
            assert found in [*allowed, {}], (count, part)
        if seen.get("stages/train.json") == changed["stages/train.json"]:
            assert seen == changed  # what says that something is finished comes last
        Storage(place, one).push()
        Storage(place, two).pull()
        assert files_of(two) == changed
        if finished:
            break
    assert finished


def test_a_marker_that_was_not_written_to_its_end(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/stored"
    Storage(url, fill(tmp_path / "one" / "run", FILES)).push()
    marker = tmp_path / "stored" / "run" / ".parts" / "init.json"
    marker.write_text(marker.read_text()[:20])
    Storage(url, tmp_path / "two" / "run").pull()
    assert not (tmp_path / "two" / "run" / "init").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/stored"
    Storage(url, fill(tmp_path / "one" / "run", FILES)).push()
    (tmp_path / "stored" / "run" / "init" / "adapter.safetensors").write_text("B")
    with pytest.raises(UserError, match=r"cluster\.storage: .*init/adapter\.safetensors is not what was stored"):
        Storage(url, tmp_path / "two" / "run").pull()


def test_unknown_protocol(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cluster\.storage: nowhere://x"):
        Storage("nowhere://x", tmp_path / "run")


def test_checkpoints_are_handed_on_while_training_goes_on(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the metrics up to them, and with nothing that says that the stage is finished."""
    monkeypatch.setattr("harness.cluster.storage.HAND_ON_SECONDS", 0.01)
    one, two = fill(tmp_path / "one" / "run", FILES), tmp_path / "two" / "run"
    with Storage(url, one).checkpoints_handed_on():
        deadline = time.monotonic() + 30
        while not (two / "checkpoints" / "step-10").exists() and time.monotonic() < deadline:
            Storage(url, two).pull()
    assert files_of(two) == {name: text for name, text in FILES.items() if "step-10" in name or "metrics" in name}
