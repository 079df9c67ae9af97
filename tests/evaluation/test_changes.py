"""Kept, lost and gained answers; items on disk."""

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.evaluation.candidates import Candidate
from harness.evaluation.changes import changes, examples
from harness.evaluation.engines import evaluate
from harness.evaluation.items import Item, item_scores, read_items, write_items
from tests.evaluation.conftest import LocalTasks, write_task


def item(number: int, score: float | None, answer: str = "") -> Item:
    return Item(f"{number}", score, f"question {number}", f"expected {number}", answer)


def test_every_answer_is_counted_once() -> None:
    before = [item(n, right, f"before {n}") for n, right in enumerate([1, 1, 1, 0, 0, 0, 0, 1])]
    after = [item(n, right, f"after {n}") for n, right in enumerate([1, 0, 0, 1, 0, 0, 0, 1])]
    found = changes("words", before, list(reversed(after)))
    assert found is not None
    assert (found.items, found.kept, found.wrong) == (8, 2, 3)
    assert {change.id for change in found.lost} == {"1", "2"}
    (gained,) = found.gained
    assert (gained.question, gained.expected, gained.before, gained.after) == (
        "question 3",
        "expected 3",
        "before 3",
        "after 3",
    )
    assert found.p_value == 1.0  # 1 against 2: (3 choose 0) + (3 choose 1) of 2³, twice, at most 1


def test_only_items_that_both_answered_count() -> None:
    found = changes("words", [item(1, 1.0), item(2, 1.0)], [item(2, 0.0), item(3, 1.0)])
    assert found is not None and (found.items, len(found.lost)) == (1, 1)
    assert changes("words", [item(1, 1.0)], [item(2, 1.0)]) is None
    assert changes("words", [], []) is None


@pytest.mark.parametrize("score", [None, 31.5, -1.0])
def test_scores_that_are_no_shares_are_not_counted(score: float | None) -> None:
    assert changes("words", [item(1, 1.0)], [item(1, score)]) is None


def test_graded_answers_are_right_from_one_half() -> None:
    found = changes("f1", [item(1, 0.5), item(2, 0.49)], [item(1, 0.4), item(2, 0.5)])
    assert found is not None and (len(found.lost), len(found.gained)) == (1, 1)


def test_examples_are_drawn_by_seed_in_the_order_of_items() -> None:
    found = changes("words", [item(n, 1.0) for n in range(50)], [item(n, 0.0) for n in range(50)])
    assert found is not None
    shown = [int(change.id) for change in examples(found.lost, 5)]
    assert shown == sorted(shown) and len(set(shown)) == 5
    assert [int(change.id) for change in examples(found.lost, 5)] == shown
    assert examples(found.lost, 5, seed=1) != examples(found.lost, 5)
    assert len(examples(found.lost[:2], 5)) == 2


def test_items_come_back_as_they_were(tmp_path: Path) -> None:
    odd = Item("0-abc", 1.0, "line\nfeed \u2028 \u0085 and \x0b", '"quoted" | {}', "\ud800 half, 蒸留")
    kept = {"one": [odd, item(1, None)], "two": [item(1, 0.25)]}
    path = tmp_path / "items" / "base.jsonl"
    write_items(path, kept)
    found = read_items(path)
    assert found["one"][0].question == odd.question
    assert found["one"][0].answer.endswith(" half, 蒸留")
    assert (found["one"][1:], found["two"]) == (kept["one"][1:], kept["two"])
    assert item_scores(found["one"]) is None
    assert read_items(tmp_path / "nowhere.jsonl") == {}


@pytest.mark.parametrize("line", ['{"task": "a", "id', "[]", '{"id": "1"}', '{"task": "a", "id": "1"}'])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "final.jsonl"
    write_items(path, {"a": [item(1, 1.0)]})
    path.write_text(path.read_text() + line)
    with pytest.raises(UserError, match=r"final\.jsonl: line 2 is no item .*; evaluate the run again") as caught:
        read_items(path)
    assert "\n" not in str(caught.value)


def test_a_groups_items_are_those_of_its_tasks(random_base: Path, local_tasks: LocalTasks, tmp_path: Path) -> None:
    """By the real engine: item scores are there exactly where their mean is the score."""
    for path in local_tasks.include_path.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    write_task(tmp_path / "by_size.yaml", group="by_size", task=["words_choice"], aggregate_metric_list=aggregate)
    (scores,) = evaluate(
        [Candidate("base", None, str(random_base))],
        ["by_size", "words_perplexity"],
        backend="hf",
        dtype="float32",
        data_dir=local_tasks.data_dir,
        include_path=tmp_path,
    )
    of_group = item_scores(scores.items["by_size"])
    assert of_group is not None
    assert of_group.mean == pytest.approx(scores.scores["by_size"].value)
    assert all(one.startswith("words_choice/") for one in of_group.ids)
    assert len(scores.items["words_perplexity"]) == 24
    assert item_scores(scores.items["words_perplexity"]) is None
