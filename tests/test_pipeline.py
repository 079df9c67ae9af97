"""Stages: skipped when finished, refused when the configuration has changed, redone when asked for."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import pipeline
from harness.config import RunConfig, resolve
from harness.errors import UserError
from harness.files import read_json
from harness.pipeline import STAGES, is_finished, locked, run_stages, stage_inputs
from harness.run_directory import RunDirectory

Content = dict[str, Any]
EARLY = ["calibrate", "init"]


def configured(content: Content, **changes: Any) -> tuple[RunConfig, RunDirectory]:
    """The configuration with ``block__key=value`` changes."""
    content = copy.deepcopy(content)
    for key, value in changes.items():
        block, _, name = key.partition("__")
        if name:
            content.setdefault(block, {})[name] = value
        else:
            content[block] = value
    config = resolve(content)
    return config, RunDirectory(config.run_directory)


def written(run: RunDirectory) -> dict[str, int]:
    """Modification times of everything in the run directory but the lock and what describes the attempt."""
    apart = {".lock", "environment.json", "config.yaml"}
    return {
        str(path.relative_to(run.path)): path.stat().st_mtime_ns
        for path in sorted(run.path.rglob("*"))
        if path.is_file() and path.name not in apart
    }


def under(times: dict[str, int], *folders: str) -> dict[str, int]:
    return {name: time for name, time in times.items() if name.startswith(folders)}


@pytest.fixture
def early(base_config: Content) -> Content:
    """A run whose statistics and step-0 tensors are there."""
    config, _ = configured(base_config)
    run_stages(config, EARLY)
    return base_config


def test_records(early: Content) -> None:
    config, run = configured(early)
    for stage in EARLY:
        record = read_json(run.stages / f"{stage}.json")
        assert record["finished"]
        assert record["inputs"] == stage_inputs(config, stage)
        assert is_finished(config, run, stage)
    assert not is_finished(config, run, "train")
    assert read_json(run.environment)["seed"] == config.train.seed
    assert run.config.read_text() == config.dump()


def test_finished_stages_are_skipped(early: Content) -> None:
    config, run = configured(early)
    before = written(run)
    run_stages(config, EARLY)
    assert written(run) == before


def test_missing_outputs_are_made_again(early: Content) -> None:
    config, run = configured(early)
    before = (run.init / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.init)
    times = written(run)
    assert not is_finished(config, run, "init")
    run_stages(config, EARLY)
    assert (run.init / "adapter_model.safetensors").read_bytes() == before
    assert under(written(run), "statistics") == under(times, "statistics")


def test_a_stage_that_was_cut_off_is_run_again(early: Content) -> None:
    config, run = configured(early)
    record = run.stages / "init.json"
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    assert not is_finished(config, run, "init")
    run_stages(config, EARLY)
    assert is_finished(config, run, "init")


@pytest.mark.parametrize(
    ("changes", "key", "given", "was", "stage"),
    [
        ({"method__rank": 4}, "method.rank", "4", "8", "init"),
        ({"train__seed": 3}, "train.seed", "3", "0", "calibrate"),
        ({"model__dtype": "bfloat16"}, "model.dtype", "'bfloat16'", "'float32'", "calibrate"),
        ({"method": {"name": "lora", "rank": 8}}, "method.name", "'lora'", "'corda'", "calibrate"),
    ],
    ids=["rank", "seed", "dtype", "method"],
)
def test_changed_key_is_refused(early: Content, changes: Content, key: str, given: str, was: str, stage: str) -> None:
    config, run = configured(early, **changes)
    before = written(run)
    with pytest.raises(UserError) as caught:
        run_stages(config, EARLY)
    message = str(caught.value)
    assert message.startswith(f"{key}: {given} given, but {run.path} was made with {was}; ")
    assert "choose another name" in message
    assert f"--force {stage}" in message
    assert "\n" not in message
    assert written(run) == before


def test_changed_data_are_refused(early: Content, data_files: dict[str, Path], tmp_path: Path) -> None:
    """The same path with other content is a change too."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(data_files["preserve"], rows)
    early = copy.deepcopy(early)
    early["name"] = "moving"
    early["data"]["preserve"]["path"] = str(rows)
    config, _ = configured(early)
    run_stages(config, EARLY)
    rows.write_text(rows.read_text() + '{"q": "one more"}\n')
    with pytest.raises(UserError, match=r"^data\.preserve\.path \(content\): .* --force calibrate"):
        run_stages(config, EARLY)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__micro_batch_size": 4},
        {"train__ranks": 2},
        {"train__deepspeed": "ds_configs/zero3.json"},
        {"train__gradient_checkpointing": True},
        {"eval__batch_size": 8},
        {"train__learning_rate": 0.5},  # read by training alone, which has not begun
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_keys_that_the_stages_do_not_read(early: Content, changes: Content) -> None:
    config, run = configured(early, **changes)
    before = written(run)
    run_stages(config, EARLY)
    assert written(run) == before


def test_force_discards_later_stages(early: Content) -> None:
    config, run = configured(early, method__rank=4, train__seed=3)
    leftovers = [run.adapter / "x", run.merged / "x", run.results, run.checkpoints / "step-5" / "x", run.metrics]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    for stage in STAGES[STAGES.index("init") + 1 :]:
        shutil.copy(run.stages / "init.json", run.stages / f"{stage}.json")
    statistics = under(written(run), "statistics")
    with pytest.raises(UserError, match=r"^train\.seed: "):  # calibrate's record still says seed 0
        run_stages(config, EARLY, force="init")
    run_stages(config, EARLY, force="calibrate")
    assert not any(path.exists() for path in leftovers)
    assert {path.stem for path in run.stages.iterdir()} == set(EARLY)
    assert {layer["rank"] for layer in read_json(run.init / "report.json")["layers"].values()} == {4}
    assert under(written(run), "statistics") != statistics


def test_force_keeps_earlier_stages(early: Content) -> None:
    config, run = configured(early)
    before = written(run)
    run_stages(config, EARLY, force="init")
    after = written(run)
    assert under(after, "statistics", "stages/calibrate") == under(before, "statistics", "stages/calibrate")
    assert under(after, "init")["init/report.json"] > under(before, "init")["init/report.json"]


def test_earlier_stages_are_required(base_config: Content) -> None:
    config, _ = configured(base_config)
    with pytest.raises(UserError, match=r"^init: the stage 'calibrate' of .* is not finished; run it first$"):
        run_stages(config, ["init"])


def test_unknown_stage(base_config: Content) -> None:
    config, run = configured(base_config)
    for arguments in ((["trian"], None), (["init"], "trian")):
        with pytest.raises(UserError, match=r"^stage: 'trian' given; allowed: answers, calibrate, init, prepare, "):
            run_stages(config, *arguments)
    assert not run.path.exists()


HOLD = """
import sys
from pathlib import Path
from harness.pipeline import locked
from harness.run_directory import RunDirectory
with locked(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(pipeline, "LOCK_WAIT_SECONDS", 0.2)
    expected = rf"^output_dir: {run.path} is in use by process {holder.pid}; wait for it or end it$"
    with pytest.raises(UserError, match=expected), locked(run):
        pass
    holder.kill()  # the system releases the lock of a process that is killed
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with locked(run):
        assert (run.path / ".lock").read_text() == str(os.getpid())
    with locked(run):
        pass


@pytest.mark.slow
def test_changed_evaluation_redoes_evaluation_alone(
    base_config: Content, write_config: Callable[[Content], Path]
) -> None:
    """A whole run (a few steps, no tasks); then a key of `eval` changes."""
    base_config["train"] |= {"max_steps": 2, "save_steps": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "harness.gang", "--config", str(write_config(base_config))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config, run = configured(base_config)
    run_stages(config, list(STAGES))
    before = written(run)
    run_stages(config, list(STAGES))
    assert written(run) == before

    config, _ = configured(base_config, eval__limit=5)
    run_stages(config, list(STAGES))
    after = written(run)
    redone = {name for name in after if after[name] != before.get(name)}
    assert redone >= {"stages/eval.json", "stages/report.json", "report.html", "report.md"}
    assert all(name.startswith(("stages/eval", "stages/report", "report.", "eval/", "tables/")) for name in redone)
    assert read_json(run.stages / "eval.json")["inputs"]["eval.limit"] == 5

    config, _ = configured(base_config, train__learning_rate=0.5)
    with pytest.raises(UserError, match=r"^train\.learning_rate: 0\.5 given, but .* was made with 0\.001; "):
        run_stages(config, list(STAGES))
