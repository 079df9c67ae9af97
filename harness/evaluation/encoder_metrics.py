"""The metrics of GLUE and SQuAD, from predictions and references in plain lists.

GLUE (Wang et al., 2019) reports Matthews' correlation for CoLA, Pearson's and Spearman's for STS-B, accuracy and F1 for
MRPC and QQP, accuracy for the others. SQuAD (Rajpurkar et al., 2016, 2018) reports exact match and F1 over the words of
an answer, against the best of several references. All are fractions between -1 and 1; GLUE and SQuAD tables show
percentages.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def accuracy(predicted: Sequence[Any], expected: Sequence[Any]) -> float:
    """The share of equal pairs."""
    _check(predicted, expected)
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """F1 of class 1: 2 TP / (2 TP + FP + FN); 0 where nothing is or should be of class 1."""
    _check(predicted, expected)
    p, e = np.asarray(predicted) == 1, np.asarray(expected) == 1
    wrong, right = int((p != e).sum()), int((p & e).sum())
    return 2 * right / (2 * right + wrong) if right else 0.0


def matthews_correlation(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Matthews' correlation of two classes (Matthews, 1975); 0 where one of the sides is constant."""
    return pearson([float(p == 1) for p in predicted], [float(e == 1) for e in expected])


def pearson(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of the sides is constant."""
    _check(predicted, expected)
    p, e = (np.asarray(side, dtype=np.float64) for side in (predicted, expected))
    p, e = p - p.mean(), e - e.mean()
    norm = float(np.sqrt((p @ p) * (e @ e)))
    return float(p @ e) / norm if norm else 0.0


def spearman(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank."""
    _check(predicted, expected)
    return pearson(_ranks(predicted), _ranks(expected))


def squad_exact_match(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> float:
    """The share of answers that equal one of their references after normalisation; no reference means no answer."""
    return _best(predicted, expected, lambda answer, reference: float(answer == reference))


def squad_f1(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> float:
    """The mean F1 of an answer's words against its best reference's; without an answer 1 if there is none, else 0."""
    return _best(predicted, expected, _word_f1)


METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    metric.__name__: metric
    for metric in (accuracy, f1, matthews_correlation, pearson, spearman, squad_exact_match, squad_f1)
}


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation and articles, one space between words."""
    without_punctuation = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def _best(predicted: Sequence[str], expected: Sequence[Sequence[str]], score: Callable[[str, str], float]) -> float:
    _check(predicted, expected)
    return float(
        np.mean(
            [
                max(score(normalised(answer), normalised(reference)) for reference in [*references] or [""])
                for answer, references in zip(predicted, expected, strict=True)
            ]
        )
    )


def _word_f1(answer: str, reference: str) -> float:
    words, wanted = answer.split(), reference.split()
    if not words or not wanted:
        return float(words == wanted)
    return 2 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))


def _ranks(values: Sequence[float]) -> list[float]:
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return list((last - (counts - 1) / 2)[inverse])


def _check(predicted: Sequence[Any], expected: Sequence[Any]) -> None:
    if not len(expected) or len(predicted) != len(expected):
        raise ValueError(f"{len(predicted)} predictions for {len(expected)} references")
