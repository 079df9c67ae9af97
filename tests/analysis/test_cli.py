"""`harness analyse` from the command line: what it leaves, and one line for every mistake."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main

Write = Callable[[dict[str, Any]], Path]


def analyse(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of ``harness analyse …``."""
    monkeypatch.setattr("sys.argv", ["harness", "analyse", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_end_to_end(
    base_config: dict[str, Any],
    write_config: Write,
    data_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = write_config(base_config)
    folder = tmp_path / "runs" / "run" / "analysis"
    for command, suffixes, options in (
        ("spectrum", ("png", "json"), ["--layers", "layers.1", "train.seed=3"]),
        ("covariance", ("png", "json"), ["--reduce", "max"]),
        ("truncation", ("png", "json", "md"), ["--samples", "10", "--rounds", "2", "--test-rows", "5"]),
    ):
        assert analyse(monkeypatch, command, config, *options) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[-len(suffixes) :] == [str(folder / f"{command}.{suffix}") for suffix in suffixes]
    # The whole table is printed, and r goes through powers of two up to half of 64.
    (header,) = [line for line in printed if line.startswith("| components")]
    assert header == "| components discarded per layer | 0 | 1 | 2 | 4 | 8 | 16 | 32 |"
    assert [line.split(" | ")[0] for line in printed if "SVD" in line] == [
        f"| {method}" for method in ("plain SVD", "ASVD", "CO-SVD", "CO-SVD+", "CO-SVD++")
    ]
    left = {"spectrum.png", "spectrum.json", "covariance.png", "covariance.json"}
    left |= {"truncation.png", "truncation.json", "truncation.md"}
    assert {path.name for path in folder.iterdir()} == left  # no temporary files
    out = tmp_path / "elsewhere"
    options = ["--data", f"{data_files['preserve']}:q", "--calibrate-on", f"{data_files['train']}:a"]
    options += ["data.preserve=null", "--rounds", "1", "--discard", "3", "--out", str(out)]
    assert analyse(monkeypatch, "truncation", config, *options) == 0
    found = json.loads((out / "truncation.json").read_text())
    assert list(found["methods"]) == ["plain SVD", "ASVD", "CO-SVD", "CO-SVD+"]  # one round: nothing to select
    assert found["calibration"]["columns"] == ["a"] and found["test"]["rows"] == 50


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("spectrum", ["--layers", "q_prj"], "--layers: 'q_prj' is no target layer; .* did you mean 'q_proj'?"),
        ("covariance", ["--layers", "layers.7"], "--layers: 'layers.7' is no target layer; "),
        ("spectrum", ["data.preserve=null"], "data.preserve: missing; .* give --data FILE:COLUMN"),
        ("covariance", ["data.preserve=null"], "data.preserve: missing; covariance compares data sets"),
        ("truncation", ["data.preserve=null"], "data.preserve: missing; .* give --data FILE:COLUMN"),
        ("spectrum", ["--data", "texts"], "--data: 'texts' given; write FILE:COLUMN"),
        ("covariance", ["--data", "none.jsonl:q"], "--data: none.jsonl: no such file"),
        ("truncation", ["--data", "{train}:qq"], "--data.prompt: no column 'qq' in .*; there are: q, a"),
        ("truncation", ["--calibrate-on", "{train}:qq"], "--calibrate-on.prompt: no column 'qq' in "),
        ("truncation", ["--data", "{config}:q"], "--data: .*run.yaml: allowed are .jsonl, .json, .parquet files"),
        ("truncation", ["--discard", "64"], "--discard: 64 given; layer .* is 64×64, so 1 to 63"),
        ("truncation", ["--discard", "0"], "--discard: 0 given; layer .* so 1 to 63"),
        ("spectrum", ["model.path=/nowhere"], "model.path: '/nowhere' is no folder here"),
        ("spectrum", ["data.preserve.prompt=Q"], "data.preserve.prompt: no column 'Q' in .*; there are: q"),
        ("truncation", ["data.max_length=1"], "data.preserve: no held-out row has two tokens within data.max_length"),
    ],
)
def test_mistakes(
    command: str,
    options: list[str],
    message: str,
    base_config: dict[str, Any],
    write_config: Write,
    data_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    base_config["method"] = {"name": "lora"}  # needs no preserve set of its own
    config = write_config(base_config)
    places = {"train": data_files["train"], "config": config}
    assert analyse(monkeypatch, command, config, *(option.format(**places) for option in options)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert re.match(f"error: {message.replace('?', '[?]')}", lines[0]), lines[0]
    assert not (tmp_path / "runs").exists()
