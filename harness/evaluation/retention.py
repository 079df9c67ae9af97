"""Knowledge kept, task learned, and the balance of the two: K, T and KT of FARSS (appendix A.3, Eq. 36–38).

With W_j the score of a fine-tuned model on knowledge benchmark j, W_j(0) the base model's, S_i its score on task
benchmark i and S_i(FT) that of full fine-tuning:

    K = 1/M Σ_j W_j / W_j(0)        T = 1/N Σ_i S_i / S_i(FT)        KT = 2 K T / (K + T)

Warning:
    K may exceed 1 (the fine-tuned model answers more than the base), and so may T. The equations say nothing about a
    base score of 0 or a missing full fine-tuning result; what is done there is said in `Retention.notes`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """K, T and KT of one model; a value is None where no task defines it.

    Attributes:
        knowledge: K, Eq. 36.
        task: T, Eq. 37; without a full fine-tuning result the mean of the raw task scores.
        balance: KT, Eq. 38, the harmonic mean of the two; 0 where both are 0.
        notes: one sentence for everything that departs from the equations.
    """

    knowledge: float | None
    task: float | None
    balance: float | None
    notes: tuple[str, ...]


def retention(
    scores: Mapping[str, float],
    base: Mapping[str, float],
    knowledge: Sequence[str],
    task: Sequence[str],
    full_fine_tuning: Mapping[str, float] | None = None,
) -> Retention:
    """K, T and KT of a model with ``scores``; every argument maps a task's name to a score, higher being better.

    Args:
        scores: scores of the fine-tuned model on all tasks.
        base: scores of the base model on the knowledge tasks.
        knowledge: names of the tasks that say what was kept.
        task: names of the tasks that say what was learned.
        full_fine_tuning: scores of full fine-tuning on the tasks of ``task``; None where there is no such result.
    """
    notes: list[str] = []
    kept = _mean_ratio(scores, base, knowledge, "K", "the base model", notes)
    if full_fine_tuning is not None:
        learned = _mean_ratio(scores, full_fine_tuning, task, "T", "full fine-tuning", notes)
    else:
        learned = sum(scores[name] for name in task) / len(task) if task else None
        if task:
            notes.append("T is the raw task score: no full fine-tuning result was given (eval.full_fine_tuning)")
    return Retention(kept, learned, _harmonic_mean(kept, learned), tuple(notes))


def _mean_ratio(
    scores: Mapping[str, float],
    reference: Mapping[str, float],
    names: Sequence[str],
    symbol: str,
    whose: str,
    notes: list[str],
) -> float | None:
    usable = [name for name in names if reference[name] != 0]
    left_out = [name for name in names if reference[name] == 0]
    if left_out:
        notes.append(f"{symbol} leaves out {', '.join(left_out)}: the score of {whose} is 0 there")
    return sum(scores[name] / reference[name] for name in usable) / len(usable) if usable else None


def _harmonic_mean(kept: float | None, learned: float | None) -> float | None:
    if kept is None or learned is None:
        return None
    return 2 * kept * learned / (kept + learned) if kept + learned else 0.0
