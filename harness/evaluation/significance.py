"""Is the difference between two sets of paired scores more than chance? And what varies over seeds.

For the comparison of two runs on the same items, and of two settings over the same seeds.
"""

from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

_ENUMERATED = 16  # pairs that differ: 2^16 assignments of signs are looked at one by one
_DRAWS = 99_999
_DRAWN_AT_ONCE = 4_000_000
_SEED = 20_260


class MeanAndDeviation(NamedTuple):
    """A mean and the sample's standard deviation (n - 1 in the denominator), None for one value."""

    mean: float
    deviation: float | None
    count: int


class PairedTest(NamedTuple):
    """A two-sided paired test.

    Attributes:
        difference: mean of a - b.
        p_value: probability of a difference at least as large in size, were a and b interchangeable within each pair.
        pairs: how many there are.
        exact: whether all assignments of signs were counted; else they were drawn.
        smallest: the least p that so many pairs that differ can give: five seeds cannot fall below 2/2⁵ = 0.0625.
    """

    difference: float
    p_value: float
    pairs: int
    exact: bool
    smallest: float


def mean_and_deviation(values: Sequence[float]) -> MeanAndDeviation:
    """Mean and standard deviation, of a score over seeds for example.

    Raises:
        ValueError: there are no values.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("mean_and_deviation: no values")
    return MeanAndDeviation(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def paired_test(
    scores_a: Sequence[float] | np.ndarray,
    scores_b: Sequence[float] | np.ndarray,
    *,
    draws: int = _DRAWS,
    seed: int = _SEED,
) -> PairedTest:
    """Fisher's paired permutation test of the mean difference (two-sided), over items or over seeds.

    Were a and b interchangeable, every difference could as well have had the other sign. The p-value is the share of
    all assignments of signs under which the mean is at least as far from 0 as it is. It assumes nothing about the
    distribution of scores. Pairs that do not differ say nothing and drop out. Where all others differ by the same
    amount (right and wrong answers) the test is McNemar's, exact at any size; up to 16 pairs that differ are counted
    out as well; beyond, ``draws`` assignments are drawn and p = (as far + 1) / (draws + 1).

    Raises:
        ValueError: the two do not have the same number of scores, have none, or one is not a finite number.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"paired_test: scores of shapes {a.shape} and {b.shape}; two rows of equal length are needed")
    differences = a - b
    if not np.all(np.isfinite(differences)):
        raise ValueError("paired_test: a score is not a finite number")
    # Rounded to twelve digits of the largest: 0.3 - 0.1 and 0.2 - 0.0 are one size.
    largest = float(np.abs(differences).max())
    scaled = np.round(differences / largest, 12) if largest else differences
    sizes, counts = np.unique(np.abs(scaled[scaled != 0]), return_counts=True)
    differing, mean = int(counts.sum()), float(differences.mean())
    smallest = float(Fraction(2, 2**differing)) if differing else 1.0
    if not differing:
        return PairedTest(mean, 1.0, len(a), True, smallest)
    total = float(scaled.sum())
    if len(sizes) == 1:
        return PairedTest(mean, sign_test(int((scaled > 0).sum()), int((scaled < 0).sum())), len(a), True, smallest)
    if differing <= _ENUMERATED:
        return PairedTest(mean, _enumerated(np.repeat(sizes, counts), total), len(a), True, smallest)
    return PairedTest(mean, _drawn(sizes, counts, total, draws, seed), len(a), False, max(smallest, 1 / (draws + 1)))


def sign_test(gains: int, losses: int) -> float:
    """Exact two-sided p-value of ``gains`` against ``losses``, were both equally likely (McNemar's test)."""
    count = gains + losses
    if gains == losses:
        return 1.0
    term, tail = 1, 1  # (count choose k), summed from k = 0 to the smaller of the two
    for k in range(min(gains, losses)):
        term = term * (count - k) // (k + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**count)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm 1979): the chance of any false alarm among them stays below the level.

    None stays None and is not counted.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted


def _enumerated(sizes: np.ndarray, total: float) -> float:
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums + size, sums - size])
    return float(np.mean(np.abs(sums) >= abs(total) - 1e-9))


def _drawn(sizes: np.ndarray, counts: np.ndarray, total: float, draws: int, seed: int) -> float:
    """The number of positive signs among equal sizes is binomial: one number is drawn for each size."""
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWN_AT_ONCE // len(sizes))
    as_far = 0
    for start in range(0, draws, block):
        positive = generator.binomial(counts, 0.5, size=(min(block, draws - start), len(sizes)))
        as_far += int(np.count_nonzero(np.abs((2 * positive - counts) @ sizes) >= abs(total) - 1e-9))
    return (as_far + 1) / (draws + 1)
