"""Bootstrap intervals against direct implementations: every resample counted out, loops over items, simulation."""

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import pytest

from harness.evaluation.bootstrap import Interval, Resampled, bca_levels
from harness.evaluation.intervals import QUANTITIES, Measured, differences, retention_intervals
from harness.evaluation.items import ItemScores
from harness.evaluation.retention import mean_ratio, retention
from harness.evaluation.significance import paired_test


def scores(values: Sequence[float], of: str = "") -> ItemScores:
    return ItemScores(tuple(f"{of}{number:05}" for number in range(len(values))), np.array(values, dtype=np.float64))


def ratio(means) -> np.ndarray:
    return means["tuned", "a"] / means["base", "a"]


def counted_out(rows: Sequence[tuple[float, ...]], statistic: Callable[..., float]) -> np.ndarray:
    """The statistic on every one of the n^n resamples."""
    n = len(rows)
    values = []
    for drawn in itertools.product(rows, repeat=n):
        means = [sum(row[column] for row in drawn) / n for column in range(len(rows[0]))]
        values.append(statistic(*means))
    return np.array(values)


SMALL = [
    [(1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)],
    [(0.3, 0.5), (0.9, 0.4), (0.1, 0.2), (0.7, 0.8), (0.2, 1.0), (0.6, 0.6)],
    [(1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (50.0, 2.0)],
]


@pytest.mark.parametrize("rows", SMALL)
def test_resamples_are_distributed_as_all_resamples(rows: list[tuple[float, ...]]) -> None:
    resampled = Resampled({("tuned", "a"): scores([row[0] for row in rows])}, resamples=20_000)
    drawn = resampled.resampled["tuned", "a"]
    every = counted_out(rows, lambda tuned, _: tuned)
    for value in np.unique(np.round(every, 9))[:-1]:
        share = np.mean(every <= value + 1e-9)
        assert np.mean(drawn <= value + 1e-9) == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / 20_000))


@pytest.mark.parametrize("rows", SMALL[1:])
def test_the_interval_is_that_of_all_resamples(rows: list[tuple[float, ...]]) -> None:
    """BCa written out: bias from the count of all resamples, acceleration from a loop that leaves out each item."""
    every = counted_out(rows, lambda tuned, base: tuned / base)
    n, normal = len(rows), NormalDist()
    estimate = sum(row[0] for row in rows) / sum(row[1] for row in rows)
    ties = np.abs(every - estimate) < 1e-12
    bias = normal.inv_cdf((np.sum((every < estimate) & ~ties) + ties.sum() / 2) / len(every))
    without = []
    for left_out in range(n):
        rest = [row for place, row in enumerate(rows) if place != left_out]
        without.append(sum(row[0] for row in rest) / sum(row[1] for row in rest))
    influence = [sum(without) / n - value for value in without]
    acceleration = sum(u**3 for u in influence) / (6 * sum(u**2 for u in influence) ** 1.5)

    resampled = Resampled({("tuned", "a"): scores([a for a, _ in rows]), ("base", "a"): scores([b for _, b in rows])})
    assert resampled.estimate(ratio) == pytest.approx(estimate)
    assert resampled._acceleration(ratio) == pytest.approx(acceleration)
    found = resampled.interval(ratio)
    assert found is not None
    for bound, z in zip(found, (normal.inv_cdf(0.025), normal.inv_cdf(0.975)), strict=True):
        level = normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        around = np.quantile(every, [max(0.0, level - 0.012), min(1.0, level + 0.012)], method="inverted_cdf")
        assert around[0] - 1e-12 <= bound <= around[1] + 1e-12


def test_the_acceleration_of_several_tasks_against_a_loop() -> None:
    rng = np.random.default_rng(3)
    tuned = {"a": rng.random(7), "b": rng.integers(0, 2, 5).astype(float)}
    base = {"a": rng.random(7) + 0.2, "b": np.array([1.0, 1.0, 0.0, 1.0, 0.0])}

    def statistic(values) -> float:
        return sum(values["tuned"][t].mean() / values["base"][t].mean() for t in "ab") / 2

    cubes = squares = 0.0
    for task in "ab":
        n, without = len(tuned[task]), []
        for left_out in range(n):
            keep = np.arange(n) != left_out
            without.append(
                statistic({"tuned": tuned | {task: tuned[task][keep]}, "base": base | {task: base[task][keep]}})
            )
        influence = (n - 1) * (np.mean(without) - np.array(without))
        cubes += np.sum(influence**3) / n**3
        squares += np.sum(influence**2) / n**2
    cells = {("tuned", t): scores(tuned[t]) for t in "ab"} | {("base", t): scores(base[t]) for t in "ab"}
    found = Resampled(cells)._acceleration(
        lambda m: mean_ratio([m["tuned", t] for t in "ab"], [m["base", t] for t in "ab"])
    )
    assert found == pytest.approx(cubes / (6 * squares**1.5))


def test_levels_without_bias_and_acceleration_are_those_of_the_percentiles() -> None:
    assert bca_levels(0.5, 0.0, 0.9) == pytest.approx((0.05, 0.95))
    assert bca_levels(0.0, 0.3, 0.9) == pytest.approx((0.05, 0.95))  # not defined: percentiles
    low, high = bca_levels(0.6, 0.0, 0.9)  # Efron's bias-corrected interval: Φ(2 z0 ± z)
    z0, z = NormalDist().inv_cdf(0.6), NormalDist().inv_cdf(0.95)
    assert (low, high) == pytest.approx((NormalDist().cdf(2 * z0 - z), NormalDist().cdf(2 * z0 + z)))


def test_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).exponential(size=60)
    reference = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=9_999, rng=np.random.default_rng(2)
    ).confidence_interval
    found = Resampled({("tuned", "a"): scores(values)}).interval(lambda means: means["tuned", "a"])
    width = reference.high - reference.low
    assert found == pytest.approx((reference.low, reference.high), abs=0.04 * width)


def paired_data(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The base knows 40 %; of that 15 % is lost, and 4 % of the rest gained: K = (0.34 + 0.024) / 0.4 = 0.91."""
    base = rng.random(n) < 0.4
    tuned = np.where(base, rng.random(n) >= 0.15, rng.random(n) < 0.04)
    return tuned.astype(float), base.astype(float)


@pytest.mark.parametrize("paired", [True, False])
def test_coverage(paired: bool) -> None:
    """Of 300 intervals near 95 % hold the truth; paired ones are much narrower."""
    rng = np.random.default_rng(7)
    held, widths = 0, []
    for _ in range(300):
        tuned, base = paired_data(rng, 150)
        if not paired:
            _, base = paired_data(rng, 150)
        cells = {("tuned", "a"): scores(tuned), ("base", "a"): scores(base, "" if paired else "other")}
        low, high = Resampled(cells, resamples=999).interval(ratio)
        held += low <= 0.91 <= high
        widths.append(high - low)
    assert 0.915 <= held / 300 <= 0.985
    assert (np.mean(widths) < 0.24) == paired


def measured(tuned, base, task=None, full=None) -> Measured:
    return Measured(
        ("a",), ("t",) if task is not None else (), {"a": tuned} | ({"t": task} if task else {}), {"a": base}, full
    )


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_answers_that_are_all_alike_give_an_interval_without_width(right: float) -> None:
    found = retention_intervals(measured(scores([right] * 30), scores([1.0] * 30)))
    assert found.by_quantity["K"] == Interval(right, right)
    assert "the interval of K, Avg has no width" in found.notes[0]


def test_one_item_has_no_interval() -> None:
    found = retention_intervals(measured(scores([1.0]), scores([1.0]), scores([1.0, 0.0])))
    assert found.by_quantity == {}
    assert found.notes == ("no intervals: a has one item, and one item says nothing about others",)


def test_a_base_that_knows_nothing_has_no_k_but_an_average() -> None:
    found = retention_intervals(measured(scores([1.0, 0.0] * 10), scores([0.0] * 20), scores([1.0, 0.0] * 9)))
    assert found.by_quantity.keys() == {"T", "Avg"}


def test_a_base_that_knows_one_thing_has_no_interval_of_k() -> None:
    """It knows nothing in a third of the resamples (1/e): a ratio to it says nothing."""
    base = scores([1.0] + [0.0] * 19)
    assert "K" not in retention_intervals(measured(scores([1.0, 0.0] * 10), base)).by_quantity


def test_scores_without_items_are_taken_as_exact_or_leave_no_interval() -> None:
    rng = np.random.default_rng(0)
    tuned, base = map(scores, paired_data(rng, 200))
    task = scores(rng.integers(0, 2, 100))
    both = retention_intervals(measured(tuned, base, task, {"t": scores(rng.integers(0, 2, 100))}))
    assert both.by_quantity.keys() == set(QUANTITIES) and both.notes == ()
    exact = retention_intervals(measured(tuned, base, task, {"t": 0.6}))
    assert exact.by_quantity.keys() == set(QUANTITIES)
    assert exact.notes == ("intervals take the score of full fine-tuning on t as exact: its items are not known",)
    none = retention_intervals(measured(tuned, base, 0.5))
    assert none.by_quantity.keys() == {"K"}
    assert none.notes == ("no intervals where t counts: its score is no mean of item scores",)
    other = retention_intervals(measured(tuned, scores(base.values, "other"), task))
    assert other.notes == ("base answered other items of a: intervals are not paired there, and wider",)
    widths = [np.subtract(*reversed(found.by_quantity["K"])) for found in (other, both)]
    assert widths[0] > 1.3 * widths[1]


def test_intervals_hold_what_the_equations_give_and_do_not_change() -> None:
    rng = np.random.default_rng(5)
    tuned, base = map(scores, paired_data(rng, 120))
    task, full = scores(rng.integers(0, 2, 80)), scores(rng.integers(0, 2, 80))
    one = measured(tuned, base, task, {"t": full})
    means = {"a": tuned.mean, "t": task.mean}
    found = retention(means, {"a": base.mean}, ["a"], ["t"], {"t": full.mean})
    intervals = retention_intervals(one).by_quantity
    for name, value in zip(
        ["K", "T", "KT", "Avg"], (found.knowledge, found.task, found.balance, found.average), strict=True
    ):
        assert intervals[name].low < value < intervals[name].high
    assert retention_intervals(one).by_quantity == intervals


def test_differences_are_paired_and_change_sign_with_the_order() -> None:
    rng = np.random.default_rng(11)
    tuned, base = map(scores, paired_data(rng, 300))
    worse = scores(np.where(rng.random(300) < 0.1, 0.0, tuned.values))
    a, b = measured(tuned, base), measured(worse, base)
    ahead, behind = differences(a, b), differences(b, a)
    assert ahead.keys() == {"K", "Avg", "a"}
    for name in ahead:
        assert ahead[name].value == pytest.approx(-behind[name].value)
        assert ahead[name].p_value == pytest.approx(behind[name].p_value)
        assert ahead[name].interval.low > 0
    assert ahead["K"].value == pytest.approx((tuned.mean - worse.mean) / base.mean)
    # Only what the two do not share counts: narrower than for models that err on other items.
    shuffled = scores(rng.permutation(worse.values))
    apart = differences(a, measured(shuffled, base))["a"].interval
    assert apart.high - apart.low > 2 * (ahead["a"].interval.high - ahead["a"].interval.low)
    same = differences(a, a)["K"]
    assert (same.value, same.interval, same.p_value) == (0.0, Interval(0.0, 0.0), 1.0)


def test_the_test_of_k_counts_out_weighted_items() -> None:
    """Two tasks of unlike size and base score: all 2^8 exchanges of the two runs' answers, item by item."""
    a = {"x": np.array([1.0, 1.0, 1.0, 0.0, 1.0]), "y": np.array([1.0, 1.0, 0.0])}
    b = {"x": np.array([0.0, 1.0, 0.0, 0.0, 0.0]), "y": np.array([0.0, 1.0, 1.0])}
    base = {"x": 0.8, "y": 0.5}

    def k(run) -> float:
        return sum(run[t].mean() / base[t] for t in "xy") / 2

    observed, as_far = k(a) - k(b), 0
    for flips in itertools.product([False, True], repeat=8):
        flip = {"x": np.array(flips[:5]), "y": np.array(flips[5:])}
        left = {t: np.where(flip[t], b[t], a[t]) for t in "xy"}
        right = {t: np.where(flip[t], a[t], b[t]) for t in "xy"}
        as_far += abs(k(left) - k(right)) >= abs(observed) - 1e-12
    runs = [Measured(("x", "y"), (), {t: scores(run[t]) for t in "xy"}, base) for run in (a, b)]
    found = differences(*runs)
    assert found["K"].value == pytest.approx(observed)
    assert found["K"].p_value == pytest.approx(as_far / 256)
    assert found["x"].p_value == paired_test(a["x"], b["x"]).p_value


def test_runs_that_cannot_be_paired_have_no_test() -> None:
    rng = np.random.default_rng(2)
    tuned, base = map(scores, paired_data(rng, 100))
    one = measured(tuned, base)
    other_items = differences(one, measured(scores(tuned.values, "other"), base))
    assert (other_items["K"].p_value, other_items["a"].p_value) == (None, None)
    assert other_items["K"].interval is not None
    other_base = differences(one, measured(tuned, scores(rng.integers(0, 2, 100))))
    assert (other_base["K"].p_value, other_base["a"].p_value) == (None, 1.0)
    unknown = differences(one, measured(0.5, base))
    assert (unknown["K"].interval, unknown["K"].p_value, unknown["a"].interval) == (None, None, None)
    other_tasks = Measured(("b",), (), {"b": tuned}, {"b": base})
    assert differences(one, other_tasks) == {}
