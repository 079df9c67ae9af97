"""Paired tests against all assignments of signs and scipy."""

import itertools
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.evaluation.significance import holm, mean_and_deviation, paired_test, sign_test


def counted_out(a: list[float], b: list[float]) -> float:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_against_every_assignment_of_signs(pairs: list[tuple[int, int]]) -> None:
    a, b = [x / 4 for x, _ in pairs], [y / 4 for _, y in pairs]
    found = paired_test(a, b)
    assert found.exact
    assert found.p_value == pytest.approx(counted_out(a, b))
    assert found.p_value >= found.smallest - 1e-12
    assert found.difference == pytest.approx(fmean(a) - fmean(b))
    assert paired_test(b, a).p_value == found.p_value


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=12), rng.normal(0.6, 1, size=12)
    reference = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert paired_test(a, b).p_value == pytest.approx(reference.pvalue)
    for gains, losses in ((0, 0), (3, 0), (5, 5), (12, 31), (400, 300)):
        expected = stats.binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
        assert sign_test(gains, losses) == pytest.approx(expected)


def test_right_and_wrong_answers_are_mcnemars_test_at_any_size() -> None:
    a = np.array([1.0] * 700 + [0.0] * 650 + [1.0] * 3000)
    b = np.array([0.0] * 700 + [1.0] * 650 + [1.0] * 3000)
    found = paired_test(a, b)
    assert found.exact
    assert found.p_value == sign_test(700, 650)


def test_drawn_signs_agree_with_counted_ones() -> None:
    """17 unlike differences are drawn; counted out by convolution on a grid here."""
    differences = np.array([1, 2, 3, 5, 1, 4, 2, 6, 1, 2, 3, 1, 2, 1, 2, -4, -7], dtype=float)
    counts = {0: 1}
    for d in map(int, differences):
        counts = {
            total: counts.get(total - d, 0) + counts.get(total + d, 0)
            for total in {t + s for t in counts for s in (d, -d)}
        }
    observed = abs(int(differences.sum()))
    p = sum(count for total, count in counts.items() if abs(total) >= observed) / 2**17
    found = paired_test(differences / 10, np.zeros(17))
    assert not found.exact
    assert found.p_value == pytest.approx(p, abs=4 * (p * (1 - p) / 99_999) ** 0.5)
    assert found == paired_test(differences / 10, np.zeros(17))


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    rng = np.random.default_rng(4)
    p_values = [paired_test(*rng.normal(size=(2, 30)), draws=999).p_value for _ in range(400)]
    assert 0.025 <= np.mean(np.array(p_values) < 0.05) <= 0.08
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)


def test_few_seeds_cannot_show_much() -> None:
    found = paired_test([0.9, 0.8, 0.95, 0.85, 0.9], [0.1, 0.2, 0.15, 0.1, 0.2])
    assert (found.p_value, found.smallest, found.pairs) == (2 / 32, 2 / 32, 5)


@pytest.mark.parametrize(("a", "b"), [([0.5], [0.5]), ([1.0] * 40, [1.0] * 40)])
def test_no_difference_is_p_1(a: list[float], b: list[float]) -> None:
    assert paired_test(a, b)[:3] == (0.0, 1.0, len(a))


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0])])
def test_what_cannot_be_paired_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="paired_test"):
        paired_test(a, b)


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("values", [[0.2], [0.2, 0.4], [1, 2, 3, 10]])
def test_mean_and_deviation(values: list[float]) -> None:
    found = mean_and_deviation(values)
    assert found == (fmean(values), stdev(values) if len(values) > 1 else None, len(values))
    with pytest.raises(ValueError, match="no values"):
        mean_and_deviation([])
