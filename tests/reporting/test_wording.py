"""Numbers and sentences."""

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.reporting import wording
from harness.reporting.records import Score, read_run

from .runs import results, write_json

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.number(None), "–"),
        (wording.number(0.9749), "0.97"),
        (wording.number(18720.4, 0), "18,720"),
        (wording.number(float("nan")), "not a number"),
        (wording.score(Score("exact_match", 0.97, 0.0101)), "0.970 ± 0.010"),
        (wording.score(Score("bleu", 31.256, 0.4)), "31.26 ± 0.40"),
        (wording.score(Score("pass@1", 0.5)), "0.500"),
        (wording.score(None), "–"),
        (wording.setting(2e-5), "2e-5"),
        (wording.setting(0.003), "0.003"),
        (wording.setting(True), "true"),
        (wording.setting(None), "–"),
        (wording.duration(0.42), "0.4 s"),
        (wording.duration(133), "2 min 13 s"),
        (wording.duration(18720), "5 h 12 min"),
        (wording.listing(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_are_written_for_readers(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_summary_says_what_was_learned_and_kept(make_run: MakeRun) -> None:
    anchor = {"kl": 1.0, "prompts_per_step": 4}
    sentences = wording.summary(read_run(make_run(anchor=anchor)))

    assert sentences == [
        "It learned reverse (exact match 0.020 → 0.975).",
        "It kept 95 % of what the base model knew, measured on facts_seen (0.980 → 0.931) and facts_heldout "
        "(0.960 → 0.912).",
        "It was trained for 40 steps (14 s) by corda (kpm) of rank 8 at learning rate 0.003 under the anchor "
        "KL × 1, 4 prompts/step, from models/tiny.",
        "The loss on the preserve set went from 0.21 to 0.264.",
    ]


@pytest.mark.parametrize(
    ("t", "verdict"),
    [(0.03, "no change beyond chance on reverse"), (0.02, "no change"), (0.08, "It learned reverse")],
)
def test_a_change_within_two_standard_errors_is_not_called_learning(make_run: MakeRun, t: float, verdict: str) -> None:
    assert verdict in wording.summary(read_run(make_run(end=(t, 0.9))))[0]


def test_what_was_not_measured_is_said_to_be_unknown(make_run: MakeRun) -> None:
    run = make_run()
    (run / "eval" / "results.json").unlink()
    assert wording.summary(read_run(run))[-1].startswith("It has not been evaluated yet")

    value = results((0.9, 0.5), 40) | {"knowledge": []}
    value["models"][-1] |= {"K": None, "KT": None}
    write_json(run / "eval" / "results.json", value)
    summary = wording.summary(read_run(run))
    assert "How much it kept is not known: no knowledge task was evaluated." in summary


def test_advice_follows_from_the_run(make_run: MakeRun) -> None:
    forgot = wording.advice(read_run(make_run("a", end=(0.9, 0.1))))
    assert any(line.startswith("step-20 stood at KT") and "`checkpoints/step-20`" in line for line in forgot)
    assert any("forgot 90 %" in line and "anchor: {kl" in line for line in forgot)

    anchored = wording.advice(read_run(make_run("b", end=(0.9, 0.1), anchor={"kl": 1.0, "prompts_per_step": 4})))
    assert not any("anchor: {kl" in line for line in anchored)

    idle = wording.advice(read_run(make_run("c", end=(0.02, 1.0), checkpoints=())))
    assert any("The task was not learned" in line for line in idle)
    assert any("`eval.checkpoints: true`" in line for line in idle)

    reference = str(make_run("full", method={"name": "full"}))
    assert wording.advice(read_run(make_run("d", full_fine_tuning=reference))) == []
