"""From what lm-eval returns to one score for each task."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """A task's score: its first listed metric under its first filter.

    Attributes:
        stderr: standard error of the mean over items; None where the score is no mean of item scores.
    """

    metric: str
    value: float
    stderr: float | None
    items: int


@dataclass(frozen=True)
class CandidateScores:
    """What one candidate scored.

    Attributes:
        seconds: wall-clock time of the evaluation, the engine's loading not counted.
        samples_per_second: items of all tasks over ``seconds``.
        answers: each task's raw responses in the order of its items, as text.
    """

    name: str
    step: int | None
    scores: dict[str, TaskScore]
    seconds: float
    samples_per_second: float
    answers: dict[str, list[str]]


def task_score(name: str, loaded: Any, found: Any) -> TaskScore:
    """The score of the task or group ``name``.

    Args:
        loaded: lm-eval's tasks and groups, see `harness.evaluation.tasks.load_tasks`.
        found: what lm-eval's ``evaluate`` returned, samples included.
    """
    values = {key: value for key, value in found["results"][name].items() if _is_metric(key)}
    listed = _first_metric(loaded["tasks"][name]) if name in loaded["tasks"] else None
    key = next((key for key in values if key.split(",")[0] == listed), next(iter(values)))
    metric, filter_name = key.split(",")
    if name not in loaded["tasks"]:
        leaves = [task.task_name for task in loaded["groups"][name].get_all_tasks()]
        return TaskScore(metric, float(values[key]), None, sum(found["n-samples"][n]["effective"] for n in leaves))
    of_items = [sample[metric] for sample in found["samples"][name] if sample["filter"] == filter_name]
    stderr = _stderr_of_mean(of_items, float(values[key]))
    return TaskScore(metric, float(values[key]), stderr, found["n-samples"][name]["effective"])


def _is_metric(key: str) -> bool:
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr")


def _first_metric(task: Any) -> str | None:
    listed = task.get_config("metric_list")
    first = listed[0]["metric"] if listed else None
    return getattr(first, "__name__", first)


def _stderr_of_mean(values: Sequence[Any], score: float) -> float | None:
    """s / √n where the score is the mean of the items' values, else None."""
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    if abs(fmean(values) - score) > 1e-9:
        return None
    return stdev(float(value) for value in values) / len(values) ** 0.5


def answers_of(samples: Sequence[Any]) -> list[str]:
    """The generated text of each item; for tasks that score texts, the numbers that came back."""
    first = next((sample["filter"] for sample in samples), None)
    texts = []
    for sample in samples:
        if sample["filter"] == first:
            responses = [response for request in sample["resps"] for response in request]
            texts.append(responses[0] if isinstance(responses[0], str) else str(responses))
    return texts
