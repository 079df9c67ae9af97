"""Files that are either old or new, never half."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.files import publish_directory, read_json, sha256, write_json, write_tensors, write_text


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_json(tmp_path / "file.json", {"a": [1, None, "é"]})
    assert read_json(tmp_path / "file.json") == {"a": [1, None, "é"]}
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["file.json", "file.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"a": value})
    assert tree(tmp_path) == {"file.json": json.dumps({"a": 1}, indent=2) + "\n"}


def test_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"k": "v"})
    found = load_file(tmp_path / "t.safetensors")
    assert torch.equal(found["a"], tensors["a"])
    assert torch.equal(found["b"], tensors["b"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(2)})
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared})
    assert torch.equal(load_file(path)["a"], torch.zeros(2))
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


WRITER = """
import os, signal, sys, threading
from pathlib import Path
from harness.files import publish_directory, write_text
folder = Path(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    write_text(folder / "file", f"{number}\\n" * 20000)
    staging = folder / ".staging"
    staging.mkdir()
    for name in "ab":
        (staging / name).write_text(str(number))
    publish_directory(staging, folder / "published")
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL at moments that fall anywhere: the file is whole, the folder is whole or, between renames, not there."""
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        while not (folder / "file").exists():
            pass
        for _ in range(attempt * 500):
            (folder / "file").stat()
        process.kill()
        process.wait()
        process.stdout.close()
        lines = set((folder / "file").read_text().splitlines())
        assert len(lines) == 1
        assert len((folder / "file").read_text().splitlines()) == 20000
        published = folder / "published"
        if published.exists():
            assert tree(published).keys() == {"a", "b"}
            assert len(set(tree(published).values())) == 1


def test_publish(tmp_path: Path) -> None:
    staging, final = tmp_path / ".staging", tmp_path / "deep" / "final"
    (staging / "inner").mkdir(parents=True)
    (staging / "inner" / "new").write_text("1")
    publish_directory(staging, final)
    assert tree(final) == {"inner/new": "1"}
    assert not staging.exists()


def test_publish_replaces_what_stood_there(tmp_path: Path) -> None:
    staging, final = tmp_path / ".staging", tmp_path / "final"
    for number in ("1", "2", "3"):
        staging.mkdir()
        (staging / f"only-in-{number}").write_text(number)
        publish_directory(staging, final)
        assert tree(tmp_path) == {f"final/only-in-{number}": number}
        assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert os.listdir(tmp_path) == ["file"]
