"""Diagnostics and the preserve accuracy in reports: drawn where they were logged, and nowhere else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.reporting import figures
from harness.reporting.records import DIAGNOSTICS, RunRecord, read_run
from harness.reporting.report import write_comparison, write_report
from harness.training import diagnostics as training

from .runs import STEPS, diagnostic_lines
from .test_figures import texts

MakeRun = Callable[..., Path]


def with_diagnostics(run: Path, lines: list[dict[str, Any]] | None = None) -> RunRecord:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines or diagnostic_lines(STEPS))
    return read_run(run)


def test_names_are_those_that_training_logs() -> None:
    assert tuple(training.QUANTITIES) == DIAGNOSTICS == tuple(figures.DIAGNOSTIC_NAMES)
    assert training.ALL == "all"


def test_a_panel_per_quantity_and_a_line_per_module_type(make_run: MakeRun) -> None:
    record = with_diagnostics(make_run())
    assert record.module_types("spectral_norm") == ("mlp.up_proj", "self_attn.q_proj")
    assert record.penalties == ()  # none of it is a penalty
    shown = texts(figures.diagnostics_figure(record))
    titles = ["spectral norm of ΔW", "amplification factor W→ΔW", "orthogonality error of the factors"]
    assert [text for text in shown if text in figures.DIAGNOSTIC_NAMES.values()] == titles
    assert {"\u2060mlp.up_proj", "\u2060self_attn.q_proj"} <= set(shown)
    assert "accuracy on the preserve set (higher is better)" in texts(figures.forgetting_figure([record]))


def test_nothing_logged_is_no_figure(make_run: MakeRun) -> None:
    record = read_run(make_run())
    assert figures.diagnostics_figure(record) is None
    assert figures.diagnostics_comparison_figure([record], ["a"]) is None
    assert "accuracy on the preserve set (higher is better)" not in texts(figures.forgetting_figure([record]))
    assert "Diagnostics" not in write_report(record.path).read_text()


def test_before_training_alone(make_run: MakeRun) -> None:
    """A run that was stopped at once: ΔW is zero, and the amplification factors are not defined."""
    record = with_diagnostics(make_run(), diagnostic_lines(0))
    shown = texts(figures.diagnostics_figure(record))
    assert "spectral norm of ΔW" in shown and "amplification factor W→ΔW" not in shown


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_report(make_run: MakeRun, name: str) -> None:
    page = (write_report(with_diagnostics(make_run()).path).parent / name).read_text()
    assert "Diagnostics" in page and "its token accuracy from 60.0 % to 40.0 %" in page
    if name == "report.md":
        assert "| layers | spectral norm of ΔW | amplification factor W→ΔW |" in page
        assert "| mlp.up_proj | 1 | 2 | 0.000587 |" in page and "| all | 1.5 | 3 |" in page


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_comparison(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    first = with_diagnostics(make_run("a", name="a"))
    second = with_diagnostics(make_run("b", name="b"), diagnostic_lines(STEPS, slope=0.01))
    without = read_run(make_run("c", name="c"))
    records, labels = [first, second, without], ["a", "b", "c"]
    shown = texts(figures.diagnostics_comparison_figure(records, labels))
    assert "spectral norm of ΔW" in shown
    page = (write_comparison([record.path for record in records], tmp_path / "out").parent / name).read_text()
    assert "Diagnostics" in page
    if name == "report.md":
        assert "| a | 1.5 | 3 |" in page and "| b | 0.3 | 3 |" in page and "| c | – | – |" in page
