"""Confidence intervals by bootstrap over items.

Tasks are fixed; their items are a sample of the questions that could have been asked. Within every task, items are
drawn with replacement, independently of the other tasks. Models that answered the same items are resampled together
(paired): what two models have in common, easy and hard questions, then cancels in a ratio or a difference, and the
interval is as narrow as the data allow.

The intervals are BCa, bias-corrected and accelerated (Efron 1987, "Better bootstrap confidence intervals"; for several
samples: Davison and Hinkley 1997, "Bootstrap methods and their application", section 5.4). K is a mean of ratios and KT
a harmonic mean: both are skewed, and BCa bounds do not depend on the scale on which a number is written. In simulations
(docs/retention.md) they miss the truth as rarely as percentile bounds, and more evenly on both sides.

Drawing n items with replacement is drawing the number of times that each distinct row of scores comes up: a multinomial
variable. Right and wrong answers of four models make sixteen distinct rows at most, however many items there are, so
that ten thousand resamples take milliseconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from harness.evaluation.items import ItemScores

CONFIDENCE = 0.95
RESAMPLES = 9_999
_SEED = 20_260
_UNDEFINED = 0.05  # share of resamples without a value from which there is no interval
_DRAWN_AT_ONCE = 4_000_000  # counts held in memory: 32 MB

Key = tuple[str, str]  # model, task
Cell = ItemScores | float  # a number stands still: a score whose items are not known
Means = Mapping[Key, np.ndarray]
Statistic = Callable[[Means], np.ndarray]


class Interval(NamedTuple):
    """A two-sided confidence interval; ``low`` = ``high`` where no resample differs from the data."""

    low: float
    high: float


@dataclass(frozen=True)
class _Stratum:
    """Items that are drawn together: ``rows`` [distinct, models] of scores, which occur ``counts`` [distinct] times."""

    keys: tuple[Key, ...]
    rows: np.ndarray
    counts: np.ndarray

    @property
    def items(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> np.ndarray:
        """[models]."""
        return self.counts @ self.rows / self.items

    def resampled(self, resamples: int, generator: np.random.Generator) -> np.ndarray:
        """Means of resamples [resamples, models]."""
        shares = self.counts / self.items
        block = max(1, _DRAWN_AT_ONCE // len(self.counts))
        means = [
            generator.multinomial(self.items, shares, size=min(block, resamples - start)) @ self.rows / self.items
            for start in range(0, resamples, block)
        ]
        return np.concatenate(means)

    def left_out(self) -> np.ndarray:
        """Means without one item of each distinct row [distinct, models]."""
        return (self.items * self.mean - self.rows) / (self.items - 1)


class Resampled:
    """Scores of models on tasks, and the means that other draws of the items would have given.

    Every interval of one object is over the same resamples, and the same arguments give the same intervals.
    """

    def __init__(self, cells: Mapping[Key, Cell], resamples: int = RESAMPLES, seed: int = _SEED) -> None:
        """Resample.

        Args:
            cells: for each model and task its item scores, or its score where the items are not known. Models with the
                same ids on a task are resampled together.
        """
        self.constants = {key: np.array([cell]) for key, cell in cells.items() if not isinstance(cell, ItemScores)}
        self.strata = _strata({key: cell for key, cell in cells.items() if isinstance(cell, ItemScores)})
        generator = np.random.default_rng(seed)
        self.observed: dict[Key, np.ndarray] = dict(self.constants)
        self.resampled: dict[Key, np.ndarray] = dict(self.constants)
        for stratum in self.strata:
            means = stratum.resampled(resamples, generator)
            for column, key in enumerate(stratum.keys):
                self.observed[key] = stratum.mean[column : column + 1]
                self.resampled[key] = means[:, column]

    def estimate(self, statistic: Statistic) -> float:
        """The value of ``statistic`` on the data themselves."""
        return float(statistic(self.observed)[0])

    def interval(self, statistic: Statistic, confidence: float = CONFIDENCE) -> Interval | None:
        """The BCa interval of ``statistic``.

        Args:
            statistic: from means of each model on each task [n] or [1] to values [n] or [1], NaN where there is none.

        Returns:
            None where some task has fewer than two items, nothing was resampled, or the statistic has no value on the
            data or on more than 5 % of the resamples (the others are then left out).
        """
        if not self.strata or any(stratum.items < 2 for stratum in self.strata):
            return None
        estimate, values = self.estimate(statistic), np.asarray(statistic(self.resampled), dtype=np.float64)
        known = values[np.isfinite(values)]
        if not np.isfinite(estimate) or len(known) < (1 - _UNDEFINED) * len(values):
            return None
        tolerance = 1e-12 * max(1.0, abs(estimate))
        if np.all(np.abs(known - estimate) <= tolerance):
            return Interval(estimate, estimate)
        low, high = bca_levels(_share_below(known, estimate, tolerance), self._acceleration(statistic), confidence)
        return Interval(*map(float, np.quantile(known, [low, high])))

    def _acceleration(self, statistic: Statistic) -> float:
        """a = 1/6 Σ_s n_s⁻³ Σ_i l_si³ / (Σ_s n_s⁻² Σ_i l_si²)^{3/2}, l the jackknife's empirical influence values."""
        cubes = squares = 0.0
        for stratum in self.strata:
            without = stratum.left_out()
            means = self.observed | {key: without[:, column] for column, key in enumerate(stratum.keys)}
            values = np.broadcast_to(statistic(means), stratum.counts.shape)
            finite = np.isfinite(values)  # one item may be all that a base knows
            values, counts = values[finite], stratum.counts[finite]
            if not len(values):
                continue
            influence = (stratum.items - 1) * ((counts @ values) / counts.sum() - values)
            cubes += float(counts @ influence**3) / stratum.items**3
            squares += float(counts @ influence**2) / stratum.items**2
        return cubes / (6 * squares**1.5) if squares > 1e-24 else 0.0


def bca_levels(below: float, acceleration: float, confidence: float) -> tuple[float, float]:
    """The quantiles of the resampled values that bound a BCa interval (Efron 1987, Eq. 2.3 with z0 and a).

    Args:
        below: share of resampled values below the estimate, ties counted half. At 0 or 1 the correction is not defined
            and the percentile interval is returned.
    """
    normal = NormalDist()
    tail = (1 - confidence) / 2
    if not 0 < below < 1:
        return tail, 1 - tail
    bias = normal.inv_cdf(below)
    levels = []
    for level in (tail, 1 - tail):
        shifted = bias + normal.inv_cdf(level)
        scale = 1 - acceleration * shifted
        levels.append(normal.cdf(bias + shifted / scale) if scale > 0 else float(shifted > 0))
    return levels[0], levels[1]


def _share_below(values: np.ndarray, estimate: float, tolerance: float) -> float:
    below = np.count_nonzero(values < estimate - tolerance)
    equal = np.count_nonzero(np.abs(values - estimate) <= tolerance)
    return (below + equal / 2) / len(values)


def _strata(cells: Mapping[Key, ItemScores]) -> tuple[_Stratum, ...]:
    """Models that answered the same items of a task, together."""
    together: dict[tuple[str, tuple[str, ...]], list[Key]] = {}
    for key, cell in cells.items():
        together.setdefault((key[1], cell.ids), []).append(key)
    strata = []
    for keys in together.values():
        scores = np.stack([cells[key].values for key in keys], axis=1)
        rows, counts = np.unique(scores, axis=0, return_counts=True)
        strata.append(_Stratum(tuple(keys), rows, counts))
    return tuple(strata)
