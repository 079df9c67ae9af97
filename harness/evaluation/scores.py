"""From what lm-eval returns to one score for each task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from harness.evaluation.items import Item, items_of


@dataclass(frozen=True)
class TaskScore:
    """A task's score: its first listed metric under its first filter.

    Attributes:
        stderr: standard error of the mean over items; None where the score is no mean of item scores.
        others: the task's other metrics under that filter, by name.
    """

    metric: str
    value: float
    stderr: float | None
    items: int
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateScores:
    """What one candidate scored.

    Attributes:
        seconds: wall-clock time of the evaluation, the engine's loading not counted.
        samples_per_second: items of all tasks over ``seconds``.
        answers: each task's raw responses in the order of its items, as text.
        items: each task's items; those of a group are its tasks' items.
    """

    name: str
    step: int | None
    scores: dict[str, TaskScore]
    seconds: float
    samples_per_second: float
    answers: dict[str, list[str]]
    items: dict[str, list[Item]]


def task_score(name: str, loaded: Any, found: Any) -> tuple[TaskScore, list[Item]]:
    """The score and the items of the task or group ``name``.

    Args:
        loaded: lm-eval's tasks and groups, see `harness.evaluation.tasks.load_tasks`.
        found: what lm-eval's ``evaluate`` returned, samples included.
    """
    values = {key: value for key, value in found["results"][name].items() if _is_metric(key)}
    if name not in loaded["tasks"]:
        return _group_score(name, loaded, found, values)
    task = loaded["tasks"][name]
    listed = _first_metric(task)
    key = next((key for key in values if key.split(",")[0] == listed), next(iter(values)))
    metric, filter_name = key.split(",")
    score, samples = float(values[key]), _filtered(found, name, filter_name)
    of_items = [sample[metric] for sample in samples]
    scored = _is_mean(of_items, score)
    stderr = stdev(map(float, of_items)) / len(of_items) ** 0.5 if scored and len(of_items) > 1 else None
    items = items_of(task, samples, metric, scored)
    others = {
        other.split(",")[0]: float(value)
        for other, value in values.items()
        if other != key and other.endswith(f",{filter_name}")
    }
    return TaskScore(metric, score, stderr, found["n-samples"][name]["effective"], others), items


def _group_score(name: str, loaded: Any, found: Any, values: dict[str, Any]) -> tuple[TaskScore, list[Item]]:
    """A group's first metric; its items have scores where the group's score is their mean."""
    key = next(iter(values))
    metric, filter_name = key.split(",")
    leaves = {task.task_name: task for task in loaded["groups"][name].get_all_tasks()}
    samples = {leaf: _filtered(found, leaf, filter_name) for leaf in leaves}
    scored = _is_mean([sample.get(metric) for some in samples.values() for sample in some], float(values[key]))
    items = [
        item
        for leaf, task in leaves.items()
        for item in items_of(task, samples[leaf], metric, scored, prefix=f"{leaf}/")
    ]
    return TaskScore(metric, float(values[key]), None, sum(found["n-samples"][n]["effective"] for n in leaves)), items


def _filtered(found: Any, name: str, filter_name: str) -> list[Any]:
    return [sample for sample in found["samples"][name] if sample["filter"] == filter_name]


def _is_metric(key: str) -> bool:
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr")


def _first_metric(task: Any) -> str | None:
    listed = task.get_config("metric_list")
    first = listed[0]["metric"] if listed else None
    return getattr(first, "__name__", first)


def _is_mean(values: Sequence[Any], score: float) -> bool:
    """Whether ``score`` is the mean of the items' values."""
    if not values or not all(isinstance(value, int | float) for value in values):
        return False
    return abs(fmean(values) - score) <= 1e-9


def answers_of(samples: Sequence[Any]) -> list[str]:
    """The generated text of each item; for tasks that score texts, the numbers that came back."""
    first = next((sample["filter"] for sample in samples), None)
    texts = []
    for sample in samples:
        if sample["filter"] == first:
            responses = [response for request in sample["resps"] for response in request]
            texts.append(responses[0] if isinstance(responses[0], str) else str(responses))
    return texts
