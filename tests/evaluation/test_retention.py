"""K, T and KT against numbers computed by hand from Eq. 36–38."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.evaluation.retention import harmonic_mean, mean_ratio, retention

BASE = {"triviaqa": 0.5, "nq_open": 0.2, "gsm8k": 0.1}
TUNED = {"triviaqa": 0.4, "nq_open": 0.15, "gsm8k": 0.45, "math": 0.06}
FULL = {"gsm8k": 0.5, "math": 0.08}


def test_against_hand_computed_numbers() -> None:
    found = retention(TUNED, BASE, ["triviaqa", "nq_open"], ["gsm8k", "math"], FULL)
    assert found.knowledge == pytest.approx((0.8 + 0.75) / 2)
    assert found.task == pytest.approx((0.9 + 0.75) / 2)
    assert found.balance == pytest.approx(2 * 0.775 * 0.825 / 1.6)
    assert found.notes == ()


def test_without_full_fine_tuning_t_is_the_raw_mean_and_says_so() -> None:
    found = retention(TUNED, BASE, ["triviaqa"], ["gsm8k", "math"])
    assert found.task == pytest.approx((0.45 + 0.06) / 2)
    assert found.notes == ("T is the raw task score: no full fine-tuning result was given (eval.full_fine_tuning)",)


def test_a_task_that_the_base_scores_0_on_is_left_out_and_named() -> None:
    base = {**BASE, "nq_open": 0.0}
    found = retention(TUNED, base, ["triviaqa", "nq_open"], ["gsm8k"], FULL)
    assert found.knowledge == pytest.approx(0.8)
    assert found.notes == ("K leaves out nq_open: the score of the base model is 0 there",)
    nothing_left = retention(TUNED, base, ["nq_open"], ["gsm8k"], FULL)
    assert nothing_left.knowledge is None
    assert nothing_left.balance is None


def test_a_task_that_full_fine_tuning_scores_0_on_is_left_out_and_named() -> None:
    found = retention(TUNED, BASE, ["triviaqa"], ["gsm8k", "math"], {**FULL, "math": 0.0})
    assert found.task == pytest.approx(0.9)
    assert found.notes == ("T leaves out math: the score of full fine-tuning is 0 there",)


def test_nothing_kept_and_nothing_learned_is_0() -> None:
    scores = {"triviaqa": 0.0, "gsm8k": 0.0}
    assert retention(scores, BASE, ["triviaqa"], ["gsm8k"], FULL).balance == 0.0


def test_no_tasks_of_a_kind_leave_its_value_undefined() -> None:
    only_knowledge = retention(TUNED, BASE, ["triviaqa"], [])
    assert (only_knowledge.task, only_knowledge.balance, only_knowledge.notes) == (None, None, ())
    only_task = retention(TUNED, BASE, [], ["gsm8k"])
    assert (only_task.knowledge, only_task.balance) == (None, None)


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.floats(0.001, 1))
def test_the_balance_lies_between_the_two_and_scale_cancels(kept: float, learned: float, scale: float) -> None:
    found = retention({"w": kept, "s": learned}, {"w": 1.0}, ["w"], ["s"], {"s": 1.0})
    assert min(kept, learned) - 1e-12 <= found.balance <= max(kept, learned) + 1e-12
    scaled = retention({"w": kept * scale, "s": learned * scale}, {"w": scale}, ["w"], ["s"], {"s": scale})
    assert scaled.balance == pytest.approx(found.balance)


# Table 2 of the paper (LLaMA2-7B, Math): TriviaQA, NQ open, WebQS, GSM8K, Math.
PAPER = ("triviaqa", "nq_open", "webqs", "gsm8k", "math")
PAPER_BASE = dict(zip(PAPER, (52.51, 14.99, 5.86), strict=False))
PAPER_FULL = dict(zip(PAPER, (47.66, 3.77, 6.69, 50.19, 7.82), strict=True))


@pytest.mark.parametrize(
    ("scores", "average", "kept", "learned", "balance"),
    [
        ((47.66, 3.77, 6.69, 50.19, 7.82), 23.23, None, 1.0, None),
        ((48.48, 4.18, 6.05, 39.58, 6.16), 20.89, 0.74, 0.79, None),
        ((49.15, 6.45, 6.35, 44.96, 7.06), 22.79, 0.82, 0.90, 0.86),
        ((51.10, 8.75, 6.99, 32.45, 4.40), 20.74, 0.92, 0.60, 0.73),
        ((49.07, 5.01, 8.37, 50.94, 8.20), 24.32, 0.90, 1.03, 0.96),
        ((48.23, 4.27, 8.51, 51.63, 8.62), 24.25, 0.89, 1.07, None),
    ],
)
def test_against_the_papers_table(
    scores: tuple[float, ...], average: float, kept: float | None, learned: float, balance: float | None
) -> None:
    """Printed values, to two decimals; None where none is printed or it does not follow from the row's own scores."""
    named = dict(zip(PAPER, scores, strict=True))
    found = retention(named, PAPER_BASE, PAPER[:3], PAPER[3:], PAPER_FULL)
    for value, printed in ((found.knowledge, kept), (found.task, learned), (found.balance, balance)):
        if printed is not None:
            assert value == pytest.approx(printed, abs=0.0051)
    assert found.average == pytest.approx(average, abs=0.0051)


def test_many_resamples_at_once_are_each_computed_alone() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.random(50), rng.random(50), np.array([0.3])]
    references = [rng.integers(0, 2, 50).astype(float), np.array([0.5]), rng.integers(0, 2, 50).astype(float)]
    references[1] = np.where(np.arange(50) < 3, 0.0, 0.5)
    found = mean_ratio(scores, references)
    for place in range(50):
        row = [(s[place % len(s)], r[place]) for s, r in zip(scores, references, strict=True)]
        usable = [s / r for s, r in row if r]
        expected = sum(usable) / len(usable) if usable else math.nan
        assert found[place] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(mean_ratio([], []))
    assert harmonic_mean(np.array([0.0, 0.5]), np.array([0.0, 1.0])) == pytest.approx([0.0, 2 / 3])
