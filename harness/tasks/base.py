"""The task protocol: what a model is trained for.

A task knows the class of model that has the right head, how rows of data become what that model reads, and what is
minimised. Statistics, methods, penalties and training ask it and do not know which task it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from harness.config import RunConfig, SourceConfig
from harness.data.sources import Example, read_examples
from harness.data.tokenisation import Row, tokenise
from harness.errors import UserError
from harness.tasks.objectives import NEXT_TOKEN, Objective

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shown:
    """An example and what a model answered to it, as texts for people."""

    question: str
    expected: str
    answer: str


class Task:
    """A task of the run ``config``. Subclasses set the class variables and override what they do differently."""

    name: ClassVar[str]
    summary: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ("prompt",)  # keys of a source that cannot be left out
    objective: ClassVar[Objective] = NEXT_TOKEN
    generates: ClassVar[bool] = False  # True: answers are text, evaluated by the engines; anchors apply
    reads_text: ClassVar[bool] = True  # False: rows have no tokens
    shortest: ClassVar[int] = 8  # tokens of a row that shows which layers share an input
    metrics: ClassVar[tuple[str, ...]] = ()  # of `predict`'s answers; the first is the score

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @cached_property
    def reader(self) -> Any:
        """What turns data into the model's inputs: a tokenizer or a processor."""
        from harness.models.loading import load_tokenizer

        return load_tokenizer(self.config.model.path)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of a processor its own."""
        return getattr(self.reader, "tokenizer", self.reader)

    @property
    def pad_id(self) -> int:
        """The token that pads; 0 where there are no tokens."""
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    def read(self, source: SourceConfig, key: str) -> list[Any]:
        """All examples of ``source``; ``key`` (``data.train``) names it in messages.

        Raises:
            UserError: it cannot be read, or a column is not there.
        """
        return read_examples(source, key)

    def rows(self, examples: Sequence[Any], description: str = "tokenise") -> list[Row]:
        """What the model reads of ``examples``, in their order."""
        return tokenise(examples, self.tokenizer, self.config.data.max_length, description)

    def useful_rows(self, source: SourceConfig, key: str, description: str) -> tuple[list[Row], int]:
        """Rows that something can be learned from, and how many others there were."""
        rows = self.rows(self.read(source, key), description)
        useful = [row for row in rows if row.has_loss]
        return useful, len(rows) - len(useful)

    def probe_row(self, row: Row) -> Row:
        """A short row made of ``row``, to see in one pass which layers read the same input."""
        kept = {name: values[: self.shortest] for name, values in row.columns.items()}
        return Row(row.input_ids[: self.shortest], [], columns=kept)

    def filler(self) -> Row | None:
        """What a pass without images gets in a model that reads images (`harness.models.filling`); else None."""
        return None

    @property
    def has_head(self) -> bool:
        """Whether the task puts a head of its own on the base (`harness.tasks.head`)."""
        return False

    def head_options(self) -> dict[str, Any]:
        """Plain values that ``from_pretrained`` needs to make the head (``num_labels``)."""
        return {}

    def finish_head(self, model: "PreTrainedModel", drawn: set[str]) -> set[str]:
        """Change the head of ``model``, just made, of which the parameters ``drawn`` were; those that are drawn now."""
        return drawn

    def check(self, key: str, source: SourceConfig) -> None:
        """Raise `UserError` where a source lacks a column that this task reads."""
        for column in self.columns:
            if getattr(source, column) is None:
                raise UserError(
                    f"{key}.{column}: missing; add it to the configuration: task {self.name!r} reads that column"
                )

    def labelled(self, source: SourceConfig) -> bool:
        """Whether there is something to learn from the rows of ``source``, so that a loss on them means something."""
        return True

    # -- direct evaluation (`harness.evaluation.direct`), of tasks that lm-eval has no form for ------------------------

    def asked(self, examples: Sequence[Any]) -> list[Any]:
        """What of ``examples`` is asked and scored one by one; the examples themselves, if a task has nothing finer."""
        return list(examples)

    def predict(self, model: "nn.Module", examples: Sequence[Any], batch_size: int) -> list[Any]:
        """The model's answer to each of what `asked` returned: a class, a number, a text."""
        raise TypeError(f"{type(self).__name__} is evaluated by engines, not by itself")

    def score(self, metric: str, predictions: Sequence[Any], examples: Sequence[Any]) -> list[float] | float:
        """``metric`` of what `predict` answered: one score for each example, of which the mean is the whole's.

        Or one number for all of them, where the metric is no such mean (a correlation, F1 of a class).
        """
        raise TypeError(f"{type(self).__name__} does not score answers by itself")

    def shown(self, example: Any, prediction: Any) -> Shown:
        """The example, its right answer and the model's, as they are kept item by item."""
        raise TypeError(f"{type(self).__name__} does not show answers by itself")

    def retention(self) -> "Task":
        """The task in which ``data.preserve`` is evaluated: what the base could do; by default this one."""
        return self

    def retention_model(self, model: "nn.Module") -> "nn.Module":
        """A model of this task, tuned or not, as a model of the task of `retention`."""
        return model


class CausalLM(Task):
    """Text after text: the loss is on the response, or on every token where there is none."""

    name = "causal_lm"
    summary = "a language model that continues a prompt"
    generates = True


__all__ = ["CausalLM", "Example", "Shown", "Task"]
