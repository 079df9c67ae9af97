"""What is read from a run directory, whole, half-run, resumed and broken."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.reporting.records import read_run

from .runs import KNOWLEDGE, metric_lines, results, write_json, write_metrics

MakeRun = Callable[..., Path]


def test_a_finished_run_is_read_whole(make_run: MakeRun) -> None:
    record = read_run(make_run(anchor={"kl": 1.0, "prompts_per_step": 4}))

    assert record.name == "corda-anchor"
    assert record.setting("method.mode") == "kpm"
    assert record.setting("method.nothing.here") is None
    assert record.steps == 40
    assert record.training_seconds == pytest.approx(40 / 3 + 1)
    assert record.penalties == ("anchor_kl",)
    assert record.curve("preserve_loss") == ([0, 40], [0.21, 0.264])
    assert record.initialisation is not None
    assert record.initialisation.ranks == (8, 8, 8, 8)
    assert record.initialisation.adapter_parameters == 4 * 8 * 64
    assert record.initialisation.layer_parameters == 4 * 32 * 32
    assert record.evaluation is not None
    assert record.evaluation.tasks == (*KNOWLEDGE, "reverse")
    assert [model.step for model in record.evaluation.path] == [None, 10, 20, 30, 40]
    assert record.notes == ()


def test_the_base_stands_at_its_own_t_and_k_1(make_run: MakeRun) -> None:
    evaluation = read_run(make_run()).evaluation

    assert evaluation is not None and evaluation.base is not None
    assert (evaluation.base.T, evaluation.base.K) == (0.02, 1.0)
    assert pytest.approx(2 * 0.02 / 1.02) == evaluation.base.KT


def test_t_of_the_base_is_measured_against_the_full_fine_tuning_run(make_run: MakeRun) -> None:
    reference = make_run("full", name="full", method={"name": "full"}, end=(0.8, 0.5))
    evaluation = read_run(make_run(full_fine_tuning=str(reference))).evaluation

    assert evaluation is not None and evaluation.base is not None
    assert pytest.approx(0.02 / 0.8) == evaluation.base.T


def test_without_the_reference_run_the_base_has_no_t(make_run: MakeRun) -> None:
    evaluation = read_run(make_run(full_fine_tuning="runs/deleted")).evaluation

    assert evaluation is not None and evaluation.base is not None
    assert (evaluation.base.T, evaluation.base.K, evaluation.base.KT) == (None, 1.0, None)


def test_a_base_that_knows_nothing_has_no_k(make_run: MakeRun) -> None:
    run = make_run()
    value = results((0.9, 0.5), 40)
    for model in value["models"]:
        for task in KNOWLEDGE:
            model["scores"][task]["value"] = 0.0
    write_json(run / "eval" / "results.json", value)
    evaluation = read_run(run).evaluation

    assert evaluation is not None and evaluation.base is not None
    assert evaluation.base.K is None


@pytest.mark.parametrize(
    ("part", "attribute", "absent"),
    [
        ("config.yaml", "config", None),
        ("environment.json", "environment", None),
        ("metrics.jsonl", "metrics", ()),
        ("init/report.json", "initialisation", None),
        ("eval/results.json", "evaluation", None),
    ],
)
def test_any_part_may_be_missing(make_run: MakeRun, part: str, attribute: str, absent: object) -> None:
    run = make_run()
    (run / part).unlink()

    assert getattr(read_run(run), attribute) == absent


def test_a_resumed_run_shows_the_later_value_of_a_step(make_run: MakeRun) -> None:
    run = make_run()
    again = [{"step": 25, "loss": 7.0, "seconds": 9.0}, {"step": 30, "loss": 6.0}]
    write_metrics(run / "metrics.jsonl", [*metric_lines(30), *again, *metric_lines(40)[7:]])
    record = read_run(run)

    steps, losses = record.curve("loss")
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40]
    assert losses[4:6] == [7.0, 6.0]
    assert dict(zip(*record.curve("preserve_loss"), strict=True))[30] == 0.264  # kept: no later line has one
    assert record.notes == ("Training was resumed (at step 25): steps logged twice show the later values.",)


@pytest.mark.parametrize("half", [b'{"step": 45, "lo', b'{"step": 45, "note": "caf\xc3', b"3"])
def test_a_half_written_last_line_is_ignored_with_a_note(make_run: MakeRun, half: bytes) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(half)
    record = read_run(run)

    assert record.steps == 40
    assert len(record.notes) == 1
    assert "the last line is half-written" in record.notes[0]


def test_a_half_line_that_a_resumed_run_wrote_on_is_named(make_run: MakeRun) -> None:
    run = make_run()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[3] = lines[3][:20] + lines[3]
    (run / "metrics.jsonl").write_text("".join(lines))
    record = read_run(run)

    assert 15 not in record.curve("loss")[0]
    assert "line 4 is half-written" in record.notes[0]


def test_a_diverged_loss_is_noted(make_run: MakeRun) -> None:
    run = make_run()
    lines = metric_lines(40)
    lines[5]["loss"] = math.nan
    lines[6]["loss"] = math.inf
    write_metrics(run / "metrics.jsonl", lines)

    assert any("diverged" in note and "first at 25" in note for note in read_run(run).notes)


def test_the_final_model_replaces_a_checkpoint_of_the_same_step_on_the_path(make_run: MakeRun) -> None:
    evaluation = read_run(make_run(checkpoints=(20, 40))).evaluation

    assert evaluation is not None
    assert [model.name for model in evaluation.models] == ["base", "step-20", "step-40", "final"]
    assert [model.name for model in evaluation.path] == ["base", "step-20", "final"]


def test_the_best_model_is_the_latest_with_the_highest_kt(make_run: MakeRun) -> None:
    evaluation = read_run(make_run(end=(0.9, 0.1))).evaluation

    assert evaluation is not None and evaluation.best is not None
    assert evaluation.best.name == "step-20"


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("config.yaml", "a: [", "config.yaml: not valid YAML"),
        ("config.yaml", "- a", "config.yaml: holds list"),
        ("environment.json", "{", "environment.json: not valid JSON"),
        ("init/report.json", "[]", "report.json: holds list"),
        ("eval/results.json", '{"schema": 2}', "results.json: schema 2"),
        ("eval/results.json", '{"schema": 1}', "results.json: the key 'models' is missing"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(make_run: MakeRun, part: str, text: str, message: str) -> None:
    run = make_run()
    (run / part).write_text(text)

    with pytest.raises(UserError) as caught:
        read_run(run)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_run(tmp_path / "nowhere")
