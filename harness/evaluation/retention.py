"""Knowledge kept, task learned, and the balance of the two: K, T, KT and Avg. of FARSS (appendix A.3, Eq. 36–38).

With W_j the score of a fine-tuned model on knowledge benchmark j, W_j(0) the base model's, S_i its score on task
benchmark i and S_i(FT) that of full fine-tuning:

    K = 1/M Σ_j W_j / W_j(0)        T = 1/N Σ_i S_i / S_i(FT)        KT = 2 K T / (K + T)

Avg. is the plain mean of all scores W_j and S_i. The paper's tables have it without a formula; it is what their numbers
add up to (full fine-tuning on Math: (47.66 + 3.77 + 6.69 + 50.19 + 7.82) / 5 = 23.23).

Warning:
    K may exceed 1 (the fine-tuned model answers more than the base), and so may T. The equations say nothing about a
    base score of 0 or a missing full fine-tuning result; what is done there is said in `Retention.notes`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Retention:
    """K, T, KT and Avg. of one model; a value is None where no task defines it.

    Attributes:
        knowledge: K, Eq. 36.
        task: T, Eq. 37; without a full fine-tuning result the mean of the raw task scores.
        balance: KT, Eq. 38, the harmonic mean of the two; 0 where both are 0.
        average: Avg., the mean of the raw scores on all tasks.
        notes: one sentence for everything that departs from the equations.
    """

    knowledge: float | None
    task: float | None
    balance: float | None
    average: float | None
    notes: tuple[str, ...]


def retention(
    scores: Mapping[str, float],
    base: Mapping[str, float],
    knowledge: Sequence[str],
    task: Sequence[str],
    full_fine_tuning: Mapping[str, float] | None = None,
) -> Retention:
    """K, T, KT and Avg. of a model with ``scores``; every argument maps a task's name to a score, higher being better.

    Args:
        scores: scores of the fine-tuned model on all tasks.
        base: scores of the base model on the knowledge tasks.
        knowledge: names of the tasks that say what was kept.
        task: names of the tasks that say what was learned.
        full_fine_tuning: scores of full fine-tuning on the tasks of ``task``; None where there is no such result.
    """
    notes = _left_out("K", "the base model", base, knowledge)
    kept = mean_ratio([scores[name] for name in knowledge], [base[name] for name in knowledge])
    of_task = [scores[name] for name in task]
    if full_fine_tuning is not None:
        learned = mean_ratio(of_task, [full_fine_tuning[name] for name in task])
        notes += _left_out("T", "full fine-tuning", full_fine_tuning, task)
    else:
        learned = mean(of_task)
        if task:
            notes.append("T is the raw task score: no full fine-tuning result was given (eval.full_fine_tuning)")
    every = mean([scores[name] for name in (*knowledge, *task)])
    values = [_number(value) for value in (kept, learned, harmonic_mean(kept, learned), every)]
    return Retention(*values, notes=tuple(notes))


def mean_ratio(scores: Sequence[float | np.ndarray], references: Sequence[float | np.ndarray]) -> np.ndarray:
    """Eq. 36 and 37: the mean over tasks of score / reference, those of reference 0 left out; NaN where none is left.

    Args:
        scores: for each task a number, or numbers [n] of n resamples.
        references: the same; lengths 1 and n may stand side by side.
    """
    if not scores:
        return np.array(math.nan)
    above, below = (np.stack(np.broadcast_arrays(*values)) for values in (scores, references))
    above, below = np.broadcast_arrays(above.astype(np.float64), below.astype(np.float64))
    usable = below != 0
    ratios = np.divide(above, below, out=np.zeros(above.shape), where=usable)
    counts = usable.sum(axis=0)
    return np.divide(ratios.sum(axis=0), counts, out=np.full(counts.shape, math.nan), where=counts > 0)


def mean(scores: Sequence[float | np.ndarray]) -> np.ndarray:
    """The mean over tasks of scores as those of `mean_ratio`; NaN where there are none."""
    if not scores:
        return np.array(math.nan)
    return np.stack(np.broadcast_arrays(*scores)).mean(axis=0, dtype=np.float64)


def harmonic_mean(kept: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Eq. 38; 0 where both are 0, NaN where one is NaN."""
    kept, learned = np.broadcast_arrays(kept, learned)
    total = kept + learned
    return np.divide(2 * kept * learned, total, out=np.array(total, dtype=np.float64), where=total != 0)


def _left_out(symbol: str, whose: str, reference: Mapping[str, float], names: Sequence[str]) -> list[str]:
    left_out = [name for name in names if reference[name] == 0]
    return [f"{symbol} leaves out {', '.join(left_out)}: the score of {whose} is 0 there"] if left_out else []


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)
