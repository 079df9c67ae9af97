"""K, T and KT against numbers computed by hand from Eq. 36–38."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.evaluation.retention import retention

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
