"""The init stage: resumed layer by layer, the same whoever owns which layer, kept for other runs."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.config import resolve
from harness.errors import mendable
from harness.methods.corda import CorDA
from harness.methods.farss import FARSS
from harness.methods.pissa import PiSSA
from harness.models.targets import Layer
from harness.run_directory import RunDirectory
from harness.stages import initialise as stage
from harness.stages.calibrate import calibrate
from harness.stages.plan import layer_cost, plan_layers, print_plan, time_class
from harness.training.ownership import assign_by_cost
from tests.mounts import mounted

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "corda++": (CorDA, {"name": "corda", "mode": "kpm", "rank": 8, "rounds": 2, "dynamic_rank": True}),
    "farss": (FARSS, {"name": "farss", "rank": 8, "shallow_layers": 1}),
    "pissa": (PiSSA, {"name": "pissa", "rank": 8}),
}


class Stopped(Exception):
    """What a kill is here."""


def initialised(content: dict[str, Any], **changes: Any) -> RunDirectory:
    config = resolve({**content, **changes})
    run = RunDirectory(config.run_directory)
    calibrate(config, run)
    stage.initialise(config, run)
    return run


def tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.init / "adapter_model.safetensors")


def counted(monkeypatch: pytest.MonkeyPatch, cls: type, name: str, stop_at: int | None = None) -> list[str]:
    """The layers that ``cls.name`` is called for from now on; the call number ``stop_at`` does not return."""
    calls: list[str] = []
    original = getattr(cls, name)

    def wrapper(self: Any, layer: Layer, *arguments: Any) -> Any:
        if len(calls) == stop_at:
            raise Stopped
        calls.append(layer.name)
        return original(self, layer, *arguments)

    monkeypatch.setattr(cls, name, wrapper)
    return calls


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("part", ["examine", "initialise"])
def test_goes_on_and_does_nothing_twice(
    base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, part: str
) -> None:
    cls, method = METHODS[name]
    if part not in vars(cls):
        pytest.skip("it examines nothing")
    content = base_config | {"method": method, "init": {"cache": False}}
    whole = tensors(initialised(content, name="undisturbed"))
    config = resolve(content | {"name": "stopped"})
    run = RunDirectory(config.run_directory)
    calibrate(config, run)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        done = counted(patch, cls, part, stop_at=5)
        stage.initialise(config, run)
    assert len(done) == 5
    assert not run.init.exists()
    with monkeypatch.context() as patch:
        rest = counted(patch, cls, part)
        stage.initialise(config, run)
    assert set(done).isdisjoint(rest)
    assert len(set(done) | set(rest)) == 14
    assert not (run.path / ".init.staging").exists()
    found = tensors(run)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "pissa", "rank": 4}},
        {"init": {"cache": False, "solver": "svd"}},
        {"model": {"dtype": "bfloat16"}},
        {"train": {"seed": 1}},
    ],
)
def test_layers_of_another_configuration_are_not_taken(
    base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    content = base_config | {"method": METHODS["pissa"][1], "init": {"cache": False}, "name": "stopped"}
    config = resolve(content)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        counted(patch, PiSSA, "initialise", stop_at=5)
        stage.initialise(config, RunDirectory(config.run_directory))
    other = resolve({**content, **{key: {**content.get(key, {}), **value} for key, value in change.items()}})
    with monkeypatch.context() as patch:
        calls = counted(patch, PiSSA, "initialise")
        stage.initialise(other, RunDirectory(other.run_directory))
    assert len(calls) == 14


def test_a_second_run_takes_everything_from_the_cache(
    base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    content = base_config | {"method": METHODS["corda++"][1]}
    first = tensors(initialised(content, name="first"))
    calls = counted(monkeypatch, CorDA, "initialise")
    capsys.readouterr()
    second = tensors(initialised(content, name="second"))
    assert calls == []
    assert "of 14 layers 0 were there from an earlier attempt, 14 in the cache" in capsys.readouterr().err
    assert all(torch.equal(first[key], second[key]) for key in first)
    initialised(content, name="third", data=content["data"] | {"max_length": 32})  # other statistics
    assert len(calls) == 14


def test_a_second_task_does_no_plain_svd_again(
    base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    content = base_config | {"method": METHODS["farss"][1]}
    initialised(content, name="first")

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("a second SVD of a base weight")

    monkeypatch.setattr(torch.linalg, "svd", nothing)
    monkeypatch.setattr(torch.linalg, "eigh", nothing)
    other_task = content["data"] | {"train": content["data"]["train"] | {"prompt": "a", "response": "q"}}
    initialised(content, name="second", data=other_task)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = base_config | {"method": METHODS["pissa"][1], "init": {"cache": False}}
    whole = tensors(initialised(content, name="roomy"))
    with mounted(tmp_path / "disk", "size=96k") as disk:
        config = resolve(content | {"name": "full", "output_dir": str(disk)})
        run = RunDirectory(config.run_directory)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
            done = counted(patch, PiSSA, "initialise")
            stage.initialise(config, run)
        line = str(mendable(caught.value))
        assert line.startswith(f"disk: {disk}") and "free some space" in line and "\n" not in line
        assert 1 < len(done) < 14
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        rest = counted(monkeypatch, PiSSA, "initialise")
        stage.initialise(config, run)
        assert len(rest) == 14 - len(done) + 1  # the one that found no room
        found = tensors(run)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_read_only_cache_changes_nothing(
    base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = base_config | {"method": METHODS["pissa"][1]}
    whole = tensors(initialised(content | {"init": {"cache": False}}, name="without"))
    with mounted(tmp_path / "disk", "size=8m", "ro") as disk:
        monkeypatch.setenv("PALIMPSEST_CACHE", str(disk))
        capsys.readouterr()
        found = tensors(initialised(content, name="with"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cache" in line]
    assert len(warnings) == 1 and "Read-only" in warnings[0]
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_ownership() -> None:
    costs = [7.0, 3.0, 3.0, 2.0, 2.0, 2.0, 0.0]
    owners = assign_by_cost(costs, 2)
    assert owners == [0, 1, 1, 1, 0, 1, 0]  # 7+2 and 3+3+2+2
    for ranks in (1, 2, 3, 5, 9):
        loads = [0.0] * ranks
        for cost, owner in zip(costs, assign_by_cost(costs, ranks), strict=True):
            loads[owner] += cost
        assert max(loads) <= max(max(costs), 4 / 3 * sum(costs) / ranks) + 1e-9


def test_the_plan_reads_no_weights(
    base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.models.weights import BaseWeights

    def nothing(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(BaseWeights, "read", nothing)
    config = resolve(base_config)
    planned = plan_layers(config, 2)
    assert [own.layer.name for own in planned][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert {own.owner for own in planned} == {0, 1}
    # 64 × 160: the weight in fp32, the covariance of 160 inputs in fp32, and what float64 takes
    down = next(own for own in planned if own.layer.name.endswith("down_proj"))
    assert down.bytes == 4 * 64 * 160 + 4 * 160**2 + 8 * (2 * 64 * 160 + 2 * 160**2 + 4 * 64**2)
    print_plan(config, 2)
    printed = capsys.readouterr().out
    assert printed.count("rank 0") >= 7
    assert "14 layers of 0.1 million weights; nothing was loaded" in " ".join(printed.split())


def test_methods_that_decompose_nothing_cost_nothing() -> None:
    from harness.methods.registry import build_method

    layer = Layer("layer", 4096, 4096)
    free = layer_cost(build_method({"name": "lora", "rank": 8}, 0), layer)
    dear = layer_cost(build_method({"name": "pissa", "rank": 8}, 0), layer)
    assert free.eigen == 0
    assert dear.total > 1000 * free.total
    assert [time_class(seconds) for seconds in (0.5, 5, 50, 500, 5000)] == [
        "under 1 s",
        "1 to 10 s",
        "10 s to 1 min",
        "1 to 10 min",
        "over 10 min",
    ]


def test_peak_of_a_phase() -> None:
    from harness.measurement import in_words, measured

    with measured() as phase:
        torch.ones(2**23).add(1)  # twice 32 MiB
    assert 50 * 2**20 < phase.peak_bytes < 2**30
    assert phase.seconds > 0
    assert [in_words(n) for n in (0, 1023, 1536, 5 * 2**30, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_peak_of_phases_in_each_other() -> None:
    """The outer phase knows of the peak in an inner one, and an inner one not of what was before."""
    from harness.measurement import measured

    def use(mib: int) -> None:
        torch.ones(mib * 2**18).add(1)  # twice as much

    with measured() as outer:
        with measured() as first:
            use(64)
        with measured() as second:
            use(8)
    assert 120 * 2**20 < first.peak_bytes < 2**30 and second.peak_bytes < 60 * 2**20
    assert first.peak_bytes * 0.9 < outer.peak_bytes < 2**30
    with measured() as outer:
        use(64)
        with measured() as first:
            use(8)
    assert outer.peak_bytes > 120 * 2**20 > 2 * first.peak_bytes


def test_print_once(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from harness.gang import print_once

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_PORT", "1")
    line: Callable[[], None] = lambda: print_once("error: the same line")  # noqa: E731
    threads = [threading.Thread(target=line) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print_once("error: another line")
    assert capfd.readouterr().err == "error: the same line\nerror: another line\n"
