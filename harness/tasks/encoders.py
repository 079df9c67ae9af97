"""Encoders with a new head: classes and numbers for texts. RoBERTa, BERT, DeBERTa-v3 and their like.

docs/encoders.md says what was decided where papers are silent.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.config import SourceConfig, nearest
from harness.data.sources import read_rows
from harness.errors import UserError
from harness.evaluation.encoder_metrics import METRICS
from harness.tasks.base import Shown
from harness.tasks.encoder_base import Answer, EncoderTask, Texts, question_of
from harness.tasks.masked_lm import MaskedLM
from harness.tasks.objectives import RowClass, RowNumber
from harness.tasks.question_answering import QuestionAnswering

if TYPE_CHECKING:
    from torch import nn


class SequenceClassification(EncoderTask):
    """One of several classes for a text or a pair of texts."""

    name = "sequence_classification"
    summary = "a class for a text or a pair of texts"
    columns = ("prompt", "response")
    objective = RowClass()
    has_head = True
    numbering: tuple[str, ...] | None = None  # names of the classes in the order of the numbers that metrics go by

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Accuracy; of two classes also F1 of the second and Matthews' correlation."""
        return ("accuracy", "f1", "matthews_correlation") if len(self.classes) == 2 else ("accuracy",)

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes in the order of their numbers, as ``data.train`` has them.

        Raises:
            UserError: a label is neither a name nor a number of a class.
        """
        source = self.config.data.train
        if source.classes is not None:
            return list(source.classes)
        rows = read_rows(source, "data.train")
        names = getattr(rows.features[source.response], "names", None)
        if names is not None:
            return list(names)
        labels = [_whole(label) for label in rows[source.response]]
        by_name = any(isinstance(label, str) for label in labels)
        for number, label in enumerate(labels):
            if not isinstance(label, str if by_name else int) or (not by_name and label < 0):
                raise UserError(
                    f"data.train.response: row {number} of {source.path} has {label!r} in {source.response!r}; a label "
                    "is a name everywhere, or a number from 0 up everywhere"
                )
        return sorted(set(labels)) if by_name else [str(number) for number in range(int(max(labels)) + 1)]

    def head_options(self) -> dict[str, Any]:
        """The classes."""
        if len(self.classes) < 2:
            raise UserError(
                f"data.train.response: there is one class alone, {self.classes[0]!r}; name all of them in "
                "data.train.classes"
            )
        names = dict(enumerate(self.classes))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": "single_label_classification",
        }

    def answers(self, rows: Any, source: SourceConfig, key: str, examples: Sequence[Texts]) -> list[Answer]:
        """The numbers of the classes, by name where the source has names."""
        named = source.classes or getattr(rows.features[source.response], "names", None)
        if all(name.isdigit() for name in self.classes):  # the head's classes have no names
            named = None
        numbers = {name: number for number, name in enumerate(self.classes)}
        found: list[Answer] = []
        for example, cell in zip(examples, rows[source.response], strict=True):
            number = label = _whole(cell)
            if isinstance(label, int) and named is not None and 0 <= label < len(named):
                number = numbers.get(named[label])
            elif isinstance(label, str):
                number = numbers.get(label)
            if not isinstance(number, int) or not 0 <= number < len(self.classes):
                given = named[label] if isinstance(label, int) and named and 0 <= label < len(named) else label
                raise UserError(
                    f"{key}.response: {example.place} has {given!r} in {source.response!r}, and the head's classes are "
                    f"{_listed(self.classes)}{nearest(str(given), self.classes)}; see data.train.classes"
                )
            found.append(int(number))
        return found

    def predict(self, model: "nn.Module", examples: Sequence[Texts], batch_size: int) -> list[int]:
        """The number of the most probable class of each example."""
        found = [0] * len(examples)
        for place, logits in self.answers_of_rows(model, self.rows(examples), batch_size):
            found[place] = int(logits.argmax())
        return found

    def scored_in(self, names: Sequence[str]) -> "SequenceClassification":
        """This task with metrics by the numbers of a suite's classes ``names``: F1 is of a class that the suite chose.

        The head may have the same classes in another order. A head whose classes are numbers has the suite's.
        """
        if set(names) != set(self.classes):
            return self
        task = copy.copy(self)
        task.numbering = tuple(names)
        return task

    def score(self, metric: str, predictions: Sequence[int], examples: Sequence[Texts]) -> list[float] | float:
        """A metric of GLUE, of the head's own numbers or of those of `scored_in`."""
        expected = [example.answer for example in examples]
        if metric == "accuracy":
            return [float(p == e) for p, e in zip(predictions, expected, strict=True)]
        if self.numbering is not None:
            numbers = [self.numbering.index(name) for name in self.classes]
            predictions, expected = [numbers[p] for p in predictions], [numbers[e] for e in expected]
        return METRICS[metric](predictions, expected)

    def shown(self, example: Texts, prediction: int) -> Shown:
        """By the classes' names."""
        assert isinstance(example.answer, int)
        return Shown(question_of(example), self.classes[example.answer], self.classes[prediction])


class Regression(EncoderTask):
    """A number for a text or a pair of texts."""

    name = "regression"
    summary = "a number for a text or a pair of texts"
    columns = ("prompt", "response")
    objective = RowNumber()
    metrics = ("pearson", "spearman")
    has_head = True

    def head_options(self) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def answers(self, rows: Any, source: SourceConfig, key: str, examples: Sequence[Texts]) -> list[Answer]:
        """The numbers."""
        found: list[Answer] = []
        for example, number in zip(examples, rows[source.response], strict=True):
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise UserError(
                    f"{key}.response: {example.place} has {number!r} in {source.response!r}; task 'regression' learns "
                    "numbers, for names of classes set task: sequence_classification"
                )
            found.append(float(number))
        return found

    def predict(self, model: "nn.Module", examples: Sequence[Texts], batch_size: int) -> list[float]:
        """The model's number for each example."""
        found = [0.0] * len(examples)
        for place, outputs in self.answers_of_rows(model, self.rows(examples), batch_size):
            found[place] = float(outputs[0])
        return found

    def score(self, metric: str, predictions: Sequence[float], examples: Sequence[Texts]) -> list[float] | float:
        """A correlation."""
        return METRICS[metric](predictions, [example.answer for example in examples])

    def shown(self, example: Texts, prediction: float) -> Shown:
        """To four digits."""
        return Shown(question_of(example), f"{example.answer:.4g}", f"{prediction:.4g}")


ENCODER_TASKS: Mapping[str, type[EncoderTask]] = {
    task.name: task for task in (SequenceClassification, Regression, QuestionAnswering, MaskedLM)
}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:10])} and {len(names) - 10} more"


def _whole(label: Any) -> Any:
    """A label, one that was stored as a floating-point number as the integer that it is."""
    return int(label) if isinstance(label, float) and label.is_integer() else label
