"""What happens around steps: projections, the preserve loss, the metrics file, the progress bar."""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from harness.data.tokenisation import Row
from harness.files import write_jsonl
from harness.methods.base import Method
from harness.tasks.base import Task
from harness.training.preserve import token_means
from harness.training.trainer import HarnessTrainer

PRESERVE_BATCH = 16


class Projection(TrainerCallback):
    """The method's projection after each optimiser step."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._method.after_step(kwargs["model"])


class PreserveLoss(TrainerCallback):
    """Loss and token accuracy on preserve rows before training and every ``interval`` steps.

    Forgetting, seen as it happens (FCLoRA, Fig. 3b and c). Perplexity is exp of the loss.
    """

    def __init__(self, trainer: HarnessTrainer, rows: Sequence[Row], task: Task, interval: int) -> None:
        self._trainer, self._rows, self._task, self._interval = trainer, rows, task, interval

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._measure()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._interval == 0 or state.global_step == state.max_steps:
            due = control.should_log
            self._measure()
            control.should_log = due  # logging clears it, and the step's own line is still to come

    def _measure(self) -> None:
        task = self._task
        found = token_means(self._trainer.model_wrapped, self._rows, task.pad_id, PRESERVE_BATCH, task.objective)
        perplexity = math.exp(min(found.loss, 709.0))  # above it exp overflows
        self._trainer.log(
            {"preserve_loss": found.loss, "preserve_perplexity": perplexity, "preserve_accuracy": found.accuracy}
        )


class MetricsWriter(TrainerCallback):
    """Appends each log to ``metrics.jsonl``. On resume, lines past the checkpoint are dropped first."""

    _KEPT_OUT = ("epoch", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second")

    def __init__(self, path: Path, epochs_per_step: float) -> None:
        self._path, self._epochs_per_step = path, epochs_per_step
        self._offset = 0.0
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = [] if state.global_step == 0 else read_metrics(self._path, state.global_step)
        write_jsonl(self._path, kept)
        self._offset = max((line["seconds"] for line in kept), default=0.0)
        self._start = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {k: v for k, v in (logs or {}).items() if k not in self._KEPT_OUT}
        if "train_loss" in values:  # Trainer's closing summary, not a step
            return
        line = {
            "step": state.global_step,
            "epoch": round(state.global_step * self._epochs_per_step, 6),
            "seconds": round(self._offset + time.monotonic() - self._start, 3),
            **values,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` up to ``last_step``; a line cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # only the last line can be half-written; it is past the checkpoint
        if line["step"] <= last_step:
            lines.append(line)
    return lines


class SingleBar(TrainerCallback):
    """One progress bar over the steps, with the newest loss; silent when not on a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal)
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._bar.update(self._task, description=f"train, loss {logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.stop()
