"""`metrics.jsonl`: one line a log, and nothing twice after a resumption."""

import json
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from harness.training.callbacks import MetricsWriter, read_metrics


class Session:
    """A training session as Trainer drives the writer: begin, then logs at steps."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self._writer = MetricsWriter(path, epochs_per_step=0.25)
        self._state = TrainerState(global_step=step)
        self._arguments = TrainingArguments(output_dir=str(path.parent), use_cpu=True, report_to=[])
        self._writer.on_train_begin(self._arguments, self._state, TrainerControl())

    def log(self, step: int, **values: float) -> None:
        self._state.global_step = step
        self._writer.on_log(self._arguments, self._state, TrainerControl(), logs=values)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    session = Session(path)
    session.log(0, preserve_loss=5.0)
    session.log(1, loss=2.0, learning_rate=1e-3, grad_norm=0.5, anchor_kl=0.0, epoch=0.9)
    session.log(5, train_loss=1.0, train_runtime=3.0, total_flos=1.0)  # Trainer's closing summary is no step
    first, second = lines(path)
    assert {key: first[key] for key in ("step", "epoch", "preserve_loss")} == {
        "step": 0,
        "epoch": 0.0,
        "preserve_loss": 5.0,
    }
    assert second.keys() == {"step", "epoch", "seconds", "loss", "learning_rate", "grad_norm", "anchor_kl"}
    assert second["epoch"] == 0.25  # our own count of passes, not Trainer's, which sees one long epoch
    assert 0 <= first["seconds"] <= second["seconds"]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    session = Session(path)
    for step in (1, 5, 10, 15):
        session.log(step, loss=float(step))
    with path.open("a") as file:
        file.write('{"step": 20, "lo')  # cut off by a kill
    before = lines_up_to(path, 10)
    resumed = Session(path, step=10)
    assert lines(path) == before
    resumed.log(15, loss=-15.0)
    found = lines(path)
    assert [line["step"] for line in found] == [1, 5, 10, 15]
    assert found[-1]["loss"] == -15.0
    assert found[-1]["seconds"] >= before[-1]["seconds"]  # time goes on from where it was


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Session(path).log(3, loss=1.0)
    Session(path)
    assert path.read_text() == ""


def test_no_file_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl", 10) == []
    Session(tmp_path / "metrics.jsonl", step=10)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def lines_up_to(path: Path, step: int) -> list[dict[str, float]]:
    return [line for line in map(json.loads, path.read_text().splitlines()[:-1]) if line["step"] <= step]
