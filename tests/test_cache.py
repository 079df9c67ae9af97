"""The cache: entries are bit for bit what was kept, or nothing; it stays within its limit; a bad disk ends no run."""

import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from harness import cache as module
from harness.cache import GIB, Cache, DamagedEntry
from harness.cache_commands import describe
from harness.cli import app
from harness.errors import UserError
from tests.mounts import mounted

CONTENT = {"weights": "ab" * 32, "options": {"rank": 8, "mode": "kpm"}, "formula": 1}
DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
DTYPES += ["int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    module._said.clear()


def values(seed: int = 0, count: int = 64) -> dict[str, torch.Tensor]:
    """``count`` random numbers that name their seed."""
    generator = torch.Generator().manual_seed(seed)
    return {"U": torch.randn(count, generator=generator), "seed": torch.tensor(seed)}


def path_of(cache: Cache, kind: str, content: dict[str, Any]) -> Path:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return cache.folder / kind / f"{hashlib.sha256(canonical.encode()).hexdigest()}.safetensors"


def files_in(folder: Path) -> list[Path]:
    """All files, without the lock."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and {k: (v.dtype, v.shape, raw(v)) for k, v in found.items()} == {
        k: (v.dtype, v.shape, raw(v)) for k, v in expected.items()
    }


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, -math.inf, -0.0, 5e-324], dtype=torch.float64)
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        **{name: torch.arange(7).to(getattr(torch, name)) for name in DTYPES},
        "odd": odd,
        "odd bf16": odd.to(torch.bfloat16),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "empty bf16": torch.empty(0, dtype=torch.bfloat16),
        "transposed": whole.T,
        "row": whole[1],  # shares memory with the others
        "with gradient": torch.ones(2, requires_grad=True),
        "é": torch.ones(1),
    }
    cache = Cache(tmp_path)
    assert cache.get("plain-svd", CONTENT) is None
    assert cache.put("plain-svd", CONTENT, tensors)
    found = cache.get("plain-svd", dict(reversed(CONTENT.items())))  # the order of keys is nothing
    assert same(found, {name: tensor.detach() for name, tensor in tensors.items()})
    assert not any(tensor.requires_grad for tensor in found.values())
    found["float32"] += 1  # what is given out is the caller's own
    assert torch.equal(cache.get("plain-svd", CONTENT)["float32"], torch.arange(7.0))
    # Other programs read the file as well; nothing else lies beside it.
    [file] = files_in(tmp_path)
    assert file == path_of(cache, "plain-svd", CONTENT)
    assert same(load_file(file), cache.get("plain-svd", CONTENT))
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["content"]) == CONTENT
    assert cache.put("statistics", CONTENT, {})  # an entry of no tensors is one
    assert cache.get("statistics", CONTENT) == {}


def test_every_part_of_the_content_decides() -> None:
    contents = [
        CONTENT,
        {},
        {**CONTENT, "weights": "ab" * 31 + "ac"},
        {**CONTENT, "formula": 2},
        {**CONTENT, "formula": 1.5},
        {**CONTENT, "formula": "1"},
        {**CONTENT, "formula": None},
        {**CONTENT, "formula": True},
        {**CONTENT, "more": 1},
        {**CONTENT, "options": {"rank": 8, "mode": "ipm"}},
        {**CONTENT, "options": {"rank": 8}},
        {**CONTENT, "options": [8, "kpm"]},
        {**CONTENT, "options": ["kpm", 8]},
    ]
    paths = {Cache(Path("unused"))._path(kind, content) for content in contents for kind in ("adapter", "plain-svd")}
    assert len(paths) == 2 * len(contents)


@pytest.mark.parametrize("kind", ["eval", "tiny", "tiny-abcdef", "", "Plain", "a/b", "..", "-a", "a b"])
def test_a_kind_is_lower_case_words_that_nobody_else_has(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="kind"):
        Cache(tmp_path).put(kind, CONTENT, values())
    assert not files_in(tmp_path)


def test_mistakes_of_callers_are_raised(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for content, error in (({"a": math.nan}, ValueError), ({"a": tmp_path}, TypeError)):
        with pytest.raises(error):
            cache.put("adapter", content, values())
    with pytest.raises(TypeError, match=r"z has dtype torch\.complex64"):
        cache.put("adapter", CONTENT, {"z": torch.zeros(2, dtype=torch.complex64)})
    assert not files_in(tmp_path)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def cut_in_header(file: Path) -> None:
    os.truncate(file, 40)


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flipped_last_byte(file: Path) -> None:
    flip(file, -1)


def zero_block(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def other_entry(file: Path) -> None:
    """A whole entry under another one's key."""
    cache = Cache(file.parent.parent)
    cache.put(file.parent.name, {"other": 1}, values(1))
    path_of(cache, file.parent.name, {"other": 1}).rename(file)


def other_kind(file: Path) -> None:
    """The same content, kept as something else."""
    cache = Cache(file.parent.parent)
    cache.put("statistics", CONTENT, values(1))
    path_of(cache, "statistics", CONTENT).rename(file)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


DAMAGES = {
    truncated: "bytes",
    emptied: "does not fit",
    cut_in_header: "does not fit",
    longer: "bytes",
    flipped_last_byte: "checksum",
    zero_block: "header",
    other_entry: "another key",
    other_kind: "another key",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_named_removed_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    cache, file = Cache(tmp_path), path_of(Cache(tmp_path), "plain-svd", CONTENT)
    cache.put("plain-svd", CONTENT, values())
    damage(file)
    [entry] = cache.entries("plain-svd")
    with pytest.raises(DamagedEntry, match=DAMAGES[damage]):
        cache.check(entry)
    assert cache.get("plain-svd", CONTENT) is None
    [line] = capsys.readouterr().err.splitlines()
    assert str(file) in line and DAMAGES[damage] in line and "removed" in line
    assert not file.exists()
    assert cache.get("plain-svd", CONTENT) is None and not capsys.readouterr().err  # absent: nothing to say
    assert cache.put("plain-svd", CONTENT, values()) and same(cache.get("plain-svd", CONTENT), values())


def test_any_flipped_bit_and_any_missing_end_is_found(tmp_path: Path) -> None:
    cache, file = Cache(tmp_path), path_of(Cache(tmp_path), "adapter", CONTENT)
    cache.put("adapter", CONTENT, {"B": torch.arange(5, dtype=torch.bfloat16), "A": torch.ones(2, 2)})
    whole = file.read_bytes()
    [entry] = cache.entries()
    missed = []
    with file.open("r+b", buffering=0) as opened:
        for position, byte in enumerate(whole):
            for bit in range(8):
                os.pwrite(opened.fileno(), bytes([byte ^ 1 << bit]), position)
                missed += [(position, bit)] if is_whole(cache, entry) else []
            os.pwrite(opened.fileno(), bytes([byte]), position)
        assert is_whole(cache, entry)
        for size in reversed(range(len(whole))):
            opened.truncate(size)
            missed += [size] if is_whole(cache, entry) else []
    assert not missed


def is_whole(cache: Cache, entry: module.Entry) -> bool:
    try:
        cache.check(entry)
    except DamagedEntry:
        return False
    return True


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    contents = [{"n": n} for n in range(5)]
    size = 0
    for n, content in enumerate(contents):
        cache.put("adapter" if n % 2 else "statistics", content, values(n))
        file = path_of(cache, "adapter" if n % 2 else "statistics", content)
        os.utime(file, (n + 1, n + 1))
        size = max(size, file.stat().st_size)
    assert [cache.content(entry)["n"] for entry in cache.entries()] == [0, 1, 2, 3, 4]
    assert cache.get("statistics", {"n": 0}) is not None  # used now: no longer the oldest
    small = Cache(tmp_path, limit=4 * size)
    assert small.put("plain-svd", {"n": 5}, values(5))
    assert [cache.content(entry)["n"] for entry in cache.entries()] == [3, 4, 0, 5]
    assert small.put("plain-svd", {"n": 5}, values(6))  # in place of the old one: nothing else has to go
    assert [cache.content(entry)["n"] for entry in cache.entries()] == [3, 4, 0, 5]
    assert same(cache.get("plain-svd", {"n": 5}), values(6))
    assert [entry.kind for entry in cache.prune(0, "adapter")] == ["adapter"]
    assert [entry.path for entry in cache.prune(2 * size)] == [path_of(cache, "statistics", {"n": 4})]
    assert [cache.content(entry)["n"] for entry in cache.entries()] == [0, 5]


def test_an_entry_above_the_limit_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path, limit=2000)
    assert cache.put("adapter", {"n": 0}, values(0))
    assert not cache.put("adapter", {"n": 1}, values(1, count=500))
    assert "2.0 KiB" in (line := capsys.readouterr().err) and "PALIMPSEST_CACHE_GIB" in line
    assert [cache.content(entry) for entry in cache.entries()] == [{"n": 0}]


def test_folder_and_limit_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    monkeypatch.delenv("PALIMPSEST_CACHE_GIB", raising=False)
    assert (Cache().folder, Cache().limit) == (tmp_path, 50 * GIB)
    monkeypatch.setenv("PALIMPSEST_CACHE_GIB", "0.5")
    assert Cache().limit == GIB // 2 and Cache(limit=7).limit == 7
    for wrong in ("much", "-1", "nan", "inf", ""):
        monkeypatch.setenv("PALIMPSEST_CACHE_GIB", wrong)
        with pytest.raises(UserError, match="PALIMPSEST_CACHE_GIB"):
            Cache()


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("adapter", CONTENT, values())
    name = f".{'0' * 64}.host-1-2-abc.tmp"
    old, new, other = tmp_path / "adapter" / name, tmp_path / "statistics" / name, tmp_path / "adapter" / "notes.tmp"
    new.parent.mkdir()
    for path in (old, new, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    assert len(cache.entries()) == 1
    cache.put("adapter", {"n": 1}, values())
    assert not old.exists() and new.exists() and other.exists()


# Several processes

ENTRIES = 50


def work(folder: Path, seed: int, limit: int) -> Iterator[str]:
    """Ask for every entry in an order of one's own and make what is missing, twice; yields what goes wrong."""
    cache, order = Cache(folder, limit), torch.Generator().manual_seed(seed)
    hits = 0
    for n in [*torch.randperm(ENTRIES, generator=order).tolist(), *torch.randperm(ENTRIES, generator=order).tolist()]:
        found = cache.get("plain-svd", {"n": n})
        hits += found is not None
        if found is not None and not same(found, values(n, 1000)):
            yield f"entry {n} is not what was kept"
        if found is None and not cache.put("plain-svd", {"n": n}, values(n, 1000)):
            yield f"entry {n} was not kept"
        with cache._locked():
            total = sum(entry.size for entry in cache.entries())
        if total > limit:
            yield f"{total} bytes where {limit} are allowed"
    if hits == 0:
        yield "nothing was ever found"


def two_threads(folder: Path, seed: int, limit: int) -> None:
    """`work` on two threads: temporary names differ there too. Exits with what went wrong."""
    torch.set_num_threads(1)
    wrong: list[str] = []
    threads = [threading.Thread(target=lambda n=n: wrong.extend(work(folder, n, limit))) for n in (seed, seed + 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        sys.exit("; ".join(wrong))


def in_processes(target: Callable[..., None], *arguments: tuple[Any, ...]) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=given) for given in arguments]
    for process in processes:
        process.start()
    return processes


def test_many_processes_write_read_and_prune_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = Cache(tmp_path / "one")
    one.put("plain-svd", {"n": 10}, values(10, 1000))
    limit = 20 * one.entries()[0].size
    shared = tmp_path / "shared"
    processes = in_processes(two_threads, *[(shared, seed, limit) for seed in range(4)])
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert "damaged" not in capfd.readouterr().err
    cache = Cache(shared)
    assert 15 < len(cache.entries()) <= 20
    for entry in cache.entries():
        cache.check(entry)
    assert files_in(shared) == sorted(entry.path for entry in cache.entries())  # no temporary file is left


def write_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    tensors, n = values(0, 200_000), 0
    while True:
        Cache(folder).put("plain-svd", {"n": n % 3}, tensors)
        n += 1


def test_a_killed_writer_leaves_whole_entries(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for seconds in (0.02, 0.05, 0.08, 0.11, 0.14):
        [process] = in_processes(write_for_ever, (tmp_path,))
        while not cache.entries():
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for entry in cache.entries():
            cache.check(entry)
        assert cache.put("plain-svd", {"n": 3}, values(3))  # no lock outlives its holder
        cache.prune(0)


# Disks that take nothing


def assert_one_warning(text: str, folder: Path, error: str) -> None:
    [line] = text.splitlines()
    assert str(folder) in line and re.search(error, line), line
    assert "$PALIMPSEST_CACHE" in line and "init.cache: false" in line


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "size=256k") as disk:
        cache = Cache(disk)
        assert cache.put("adapter", {"n": 0}, values(0))
        assert not cache.put("adapter", {"n": 1}, values(1, 100_000))
        assert not cache.put("adapter", {"n": 2}, values(2, 100_000))
        assert_one_warning(capsys.readouterr().err, disk, "No space left")
        assert same(cache.get("adapter", {"n": 0}), values(0)) and cache.get("adapter", {"n": 1}) is None
        assert cache.put("adapter", {"n": 3}, values(3))
        assert files_in(disk) == sorted(path_of(cache, "adapter", {"n": n}) for n in (0, 3))


def test_a_disk_that_says_it_has_room_and_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As under a quota; here no further file fits beside the folders, the lock and an entry."""
    with mounted(tmp_path / "disk", "size=1m", "nr_inodes=4") as disk:
        cache = Cache(disk)
        assert cache.put("adapter", {"n": 0}, values(0))
        assert not cache.put("adapter", {"n": 1}, values(1)) and not cache.put("plain-svd", {"n": 1}, values(1))
        assert_one_warning(capsys.readouterr().err, disk, "No space left")
        assert files_in(disk) == [path_of(cache, "adapter", {"n": 0})]
        assert same(cache.get("adapter", {"n": 0}), values(0))


def test_a_write_that_fails_half_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a mount: this process may write no file above 100 kB."""
    cache, soft_hard = Cache(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert cache.put("adapter", {"n": 0}, values(0))
    before = cache.entries()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft_hard[1]))
    try:
        assert not cache.put("adapter", {"n": 0}, values(9, 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert_one_warning(capsys.readouterr().err, tmp_path, "File too large")
    assert cache.entries() == before and files_in(tmp_path) == [before[0].path]
    assert same(cache.get("adapter", {"n": 0}), values(0))


def test_a_folder_that_can_only_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        cache = Cache(disk)
        for n in range(2):
            cache.put("adapter", {"n": n}, values(n))
        truncated(path_of(cache, "adapter", {"n": 1}))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert same(cache.get("adapter", {"n": 0}), values(0))
        assert not capsys.readouterr().err
        assert not cache.put("adapter", {"n": 0}, values(5)) and not cache.put("plain-svd", {}, values(5))
        assert_one_warning(capsys.readouterr().err, disk, "Read-only file system")
        assert same(cache.get("adapter", {"n": 0}), values(0))
        assert cache.get("adapter", {"n": 1}) is None
        assert re.search("damaged .* is not used and cannot be removed .*Read-only", capsys.readouterr().err)
        with pytest.raises(UserError, match=f"{disk}: Read-only file system"):
            cache.prune(0)


@pytest.mark.parametrize("place", ["file", "/proc/palimpsest"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / place / "cache" if place == "file" else Path(place)
    cache = Cache(folder)
    assert cache.get("adapter", CONTENT) is None and cache.entries() == [] == cache.prune(0)
    assert not capsys.readouterr().err
    assert not cache.put("adapter", CONTENT, values()) and not cache.put("plain-svd", CONTENT, values())
    assert_one_warning(capsys.readouterr().err, folder, "Not a directory|No such file|Permission denied")


# The command line


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Two decompositions and an adapter, among what others keep in the same folder."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    monkeypatch.setenv("PALIMPSEST_CACHE_GIB", "2")
    cache = Cache()
    for n, kind in enumerate(("plain-svd", "plain-svd", "adapter")):
        content = {"layer": f"layers.{n}", "weights": "ab" * 32, "options": {"targets": ["[q]", "v"]}}
        cache.put(kind, content, values(n))
        os.utime(path_of(cache, kind, content), (n * 86_400 + 43_200,) * 2)
    for foreign in ("eval/scores.json", "tiny-abcdefabcdef/model/model.safetensors", "tiny-abcdefabcdef/info.json"):
        (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / foreign).write_text("{}")
    shutil.copy(files_in(tmp_path / "adapter")[0], tmp_path / "tiny-abcdefabcdef")
    (tmp_path / f"{'0' * 64}.safetensors").write_text("not in a folder of entries")
    return cache


def foreign(cache: Cache) -> list[Path]:
    entries = {entry.path for entry in cache.entries()}
    return [path for path in files_in(cache.folder) if path not in entries]


def harness(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments], env={"COLUMNS": "150"})


def test_list(kept: Cache) -> None:
    result = harness("list")
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [["adapter", "1"], ["plain-svd", "2"], ["eval", "1"]]
    used = [datetime.fromtimestamp(43_200 + days * 86_400).strftime("%Y-%m-%d %H:%M") for days in range(2)]
    assert rows[1][3:] == used
    assert rows[2][2] == "2 B"
    size = sum(entry.size for entry in kept.entries())
    assert f"3 entries, {size / 1024:.1f} KiB of at most 2.0 GiB in {kept.folder}" in result.stdout
    assert "tiny" not in result.stdout.replace(str(kept.folder), "")


def test_list_entries(kept: Cache) -> None:
    cut_in_header(kept.entries("adapter")[0].path)
    lines = harness("list", "--entries").stdout.splitlines()
    assert sum("│" in line for line in lines) == 4
    assert any("layer=layers.0, options.targets=[[q] v], weights=abababab…" in line for line in lines)
    assert any("damaged: its header does not fit" in line for line in lines)
    assert all(any(entry.key[:8] in line for line in lines) for entry in kept.entries())


def test_list_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("PALIMPSEST_CACHE_GIB", "2")
    assert harness("list").stdout == f"0 entries, 0 B of at most 2.0 GiB in {tmp_path / 'none'}\n"
    assert harness("verify").exit_code == harness("prune", "--to", "0").exit_code == 0
    assert not (tmp_path / "none").exists()


def test_verify(kept: Cache) -> None:
    before = kept.entries()
    result = harness("verify")
    assert result.exit_code == 0 and "0 damaged" in result.stdout
    assert kept.entries() == before  # to be verified is not to be used
    others = foreign(kept)
    flip(before[0].path, -1)
    truncated(before[2].path)
    result = harness("verify")
    assert result.exit_code == 1 and "2 damaged" in result.stdout
    assert [line for line in result.stdout.splitlines() if f"{before[0].path} was damaged (its checksum" in line]
    assert [line for line in result.stdout.splitlines() if f"{before[2].path} was damaged (it has" in line]
    assert kept.entries() == [before[1]] and foreign(kept) == others
    assert harness("verify").exit_code == 0


def test_prune(kept: Cache) -> None:
    sizes = [entry.size for entry in kept.entries()]
    others = foreign(kept)
    result = harness("prune")
    assert result.exit_code == 0 and result.stdout.startswith("removed 0 entries, 0 B; left 3 entries")
    result = harness("prune", "--to", str((sizes[1] + sizes[2]) / GIB))
    assert f"removed 1 entry, {sizes[0]} B; left 2 entries" in result.stdout
    assert [kept.content(entry)["layer"] for entry in kept.entries()] == ["layers.1", "layers.2"]
    assert "left 1 entry" in harness("prune", "--to", "0", "--kind", "adapter").stdout
    assert [entry.kind for entry in kept.entries()] == ["plain-svd"]
    wrong = harness("prune", "--kind", "adapters")
    assert isinstance(wrong.exception, UserError) and "plain-svd" in str(wrong.exception)
    assert harness("prune", "--to", "0").exit_code == 0
    assert kept.entries() == [] and foreign(kept) == others


def test_help_has_an_example_of_each() -> None:
    for command in ("list", "verify", "prune"):
        assert f"harness cache {command}" in harness(command, "--help").stdout


def test_what_an_entry_is_in_one_line() -> None:
    content = {"layer": "a.b", "weights": "0f" * 32, "options": {"rank": 8, "of": [1, 2, 3, 4, 5]}, "none": None}
    assert describe(content) == "layer=a.b, weights=0f0f0f0f…, options.rank=8, options.of=[1 2 3 4 …], none=None"


def test_the_commands_start_without_torch(kept: Cache) -> None:
    code = (
        "import sys\nfrom harness.cli import app\n"
        "for command in ('list', 'verify', 'prune'):\n    app(['cache', command], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
