"""The answer to a question as a span of a context, which may be longer than the model reads at once (SQuAD).

Rajpurkar et al., 2016 (1.1: there is an answer) and 2018 (2.0: there may be none). Contexts are read in windows and
answers decoded as in the data sets' own programs, but that every allowed span is looked at, not those of the 20 best
ends alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from harness.config import SourceConfig
from harness.console import progress
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.evaluation.encoder_metrics import METRICS
from harness.tasks.base import Shown
from harness.tasks.encoder_base import Answer, EncoderTask, Reference, Texts, brief
from harness.tasks.objectives import Span

if TYPE_CHECKING:
    from torch import nn

OVERLAP = 128  # tokens of the context that two neighbouring windows share: `doc_stride` of the SQuAD programs
LONGEST_ANSWER = 30  # tokens, as in the SQuAD programs


@dataclass(frozen=True)
class Window:
    """A part of a context under its question.

    ``spans``: for every token its characters of the context; None where it is none of the context's.
    """

    row: Row
    spans: list[tuple[int, int] | None]


class QuestionAnswering(EncoderTask):
    """The answer to a question as a span of a context, or none (SQuAD 1.1 and 2.0)."""

    name = "question_answering"
    summary = "the answer to a question as a span of a text"
    columns = ("prompt", "pair", "response")
    objective = Span()
    metrics = ("squad_exact_match", "squad_f1")
    has_head = True

    def head_options(self) -> dict[str, Any]:
        """Two outputs for a token: the answer begins there, the answer ends there."""
        return {"num_labels": 2}

    @cached_property
    def abstains(self) -> bool:
        """Whether there may be no answer: ``data.train`` has such rows, as SQuAD 2.0 does and 1.1 does not."""
        return any(example.answer == () for example in self.read(self.config.data.train, "data.train"))

    def answers(self, rows: Any, source: SourceConfig, key: str, examples: Sequence[Texts]) -> list[Answer]:
        """The answers with their places, none where a question has no answer."""
        found: list[Answer] = []
        for example, given in zip(examples, rows[source.response], strict=True):
            references = _references(given)
            if references is None:
                raise UserError(
                    f"{key}.response: {example.place} has {brief(given)} in {source.response!r}; answers are written "
                    "{text: [...], answer_start: [...]}, empty lists where there is none"
                )
            for text, start in references:
                if example.second is not None and not example.second.startswith(text, start):
                    raise UserError(
                        f"{key}.response: {example.place} says that {brief(text)} begins at character {start} of "
                        f"{source.pair!r}, and there is {brief(example.second[start : start + len(text)])}"
                    )
            found.append(references)
        return found

    def rows(self, examples: Sequence[Texts], description: str = "tokenise") -> list[Row]:
        """The windows of every example, with the span of its first answer; token 0 twice where a window has none."""
        return [window.row for example in progress(examples, description) for window in self.windows(example)]

    def windows(self, example: Texts) -> list[Window]:
        """A context that is longer than ``data.max_length`` leaves room for is read in windows that overlap.

        Raises:
            UserError: the question leaves no room for a context.
        """
        if example.second is None:
            return [Window(self.row(example), [])]
        tokenizer, question = self.tokenizer, example.first.strip()
        length = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        room = self.longest - length - tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise UserError(
                f"data.max_length: {self.longest} tokens, and the question of {example.place} ({brief(question)}) has "
                f"{length}, which leaves no room for its context; raise it, or shorten the question"
            )
        encoded = tokenizer(
            question,
            example.second,
            truncation="only_second",
            max_length=self.longest,
            stride=min(OVERLAP, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = []
        for number, ids in enumerate(encoded["input_ids"]):
            of = encoded.sequence_ids(number)
            offsets = encoded["offset_mapping"][number]
            spans = [tuple(span) if text == 1 else None for span, text in zip(offsets, of, strict=True)]
            answer = None if example.answer is None else _span(spans, example)
            columns = {name: list(values[number]) for name, values in encoded.items() if name == "token_type_ids"}
            windows.append(Window(Row(list(ids), [], answer, columns), spans))
        return windows

    def predict(self, model: "nn.Module", examples: Sequence[Texts], batch_size: int) -> list[str]:
        """The best span of all windows of an example; "" where no answer is likelier than that, if there may be none.

        "No answer" has the smallest score that any window gives it: each window without the answer says so.
        """
        windows = [(place, window) for place, one in enumerate(examples) for window in self.windows(one)]
        best = [(-math.inf, "")] * len(examples)
        null = [math.inf] * len(examples)
        rows = [window.row for _, window in windows]
        for number, ends in self.answers_of_rows(model, rows, batch_size):
            place, window = windows[number]
            null[place] = min(null[place], float(ends[0, 0] + ends[1, 0]))
            score, span = best_span(ends, window.spans)
            if span is not None and score > best[place][0]:
                best[place] = (score, examples[place].second[span[0] : span[1]].strip())
        none = [self.abstains and lowest > score for lowest, (score, _) in zip(null, best, strict=True)]
        return ["" if nothing else text for nothing, (_, text) in zip(none, best, strict=True)]

    def score(self, metric: str, predictions: Sequence[str], examples: Sequence[Texts]) -> list[float] | float:
        """A metric of SQuAD, question by question."""
        references = [_answer_texts(example) for example in examples]
        return [METRICS[metric]([p], [r]) for p, r in zip(predictions, references, strict=True)]

    def shown(self, example: Texts, prediction: str) -> Shown:
        """The question without its context."""
        expected = " | ".join(dict.fromkeys(_answer_texts(example))) or "(no answer)"
        return Shown(example.first, expected, prediction or "(no answer)")


def best_span(ends: torch.Tensor, spans: Sequence[tuple[int, int] | None]) -> tuple[float, tuple[int, int] | None]:
    """The score and the characters of the best span of at most `LONGEST_ANSWER` context tokens, by its two ends.

    Args:
        ends: (2, length): how good a first and a last token each is.
        spans: of a `Window`.
    """
    places = [place for place, span in enumerate(spans) if span is not None]
    if not places:
        return -math.inf, None
    inside = torch.tensor(places)
    first, last = ends[0, inside], ends[1, inside]
    scores = first.unsqueeze(1) + last.unsqueeze(0)
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    scores = scores.masked_fill(~allowed, -math.inf)
    begin, end = divmod(int(scores.argmax()), len(places))
    # The same characters may belong to several tokens of bytes.
    return float(scores[begin, end]), (spans[places[begin]][0], spans[places[end]][1])


def _span(spans: Sequence[tuple[int, int] | None], example: Texts) -> tuple[int, int]:
    """The first and the last token of an example's first answer; (0, 0) where the window does not have all of it."""
    assert isinstance(example.answer, tuple)
    inside = [place for place, span in enumerate(spans) if span is not None]
    text = example.answer[0].text if example.answer else ""
    if not inside or not text.strip():
        return 0, 0
    start = example.answer[0].start + len(text) - len(text.lstrip())
    stop = start + len(text.strip())
    if spans[inside[0]][0] > start or spans[inside[-1]][1] < stop:
        return 0, 0
    tokens = [place for place in inside if spans[place][0] < stop and spans[place][1] > start]
    return tokens[0], tokens[-1]


def _references(given: Any) -> tuple[Reference, ...] | None:
    """The answers of a cell of a SQuAD data set, as two lists or as a list of pairs; None where it is neither."""
    if isinstance(given, Mapping):
        texts, starts = given.get("text"), given.get("answer_start")
    elif isinstance(given, list) and all(isinstance(one, Mapping) for one in given):
        texts, starts = [one.get("text") for one in given], [one.get("answer_start") for one in given]
    else:
        return None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    if not all(isinstance(t, str) and isinstance(s, int) and s >= 0 for t, s in zip(texts, starts, strict=True)):
        return None
    return tuple(Reference(text, start) for text, start in zip(texts, starts, strict=True))


def _answer_texts(example: Texts) -> list[str]:
    assert isinstance(example.answer, tuple)
    return [reference.text for reference in example.answer]
