"""Replay: which places it takes, counted directly; that the task's rows keep their order; what is replayed."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import TrainConfig, resolve
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.models.loading import load_tokenizer
from harness.run_directory import RunDirectory
from harness.stages.answers import ANSWERS
from harness.stages.replay import replay_rows
from harness.tasks.registry import load_task
from harness.training.schedule import ScheduledRows, total_steps

Change = Callable[[dict[str, Any]], None]


def task(count: int) -> list[Row]:
    return [Row([i], [i]) for i in range(count)]


def old(count: int) -> list[Row]:
    return [Row([1000 + i], [1000 + i]) for i in range(count)]


def seen(count: int, replayed: int, steps: int, batch: int, ratio: float, seed: int = 0) -> list[int]:
    scheduled = ScheduledRows(task(count), steps, batch, seed, old(replayed), ratio)
    assert len(scheduled) == steps * batch
    found = [scheduled[item].input_ids[0] for item in range(len(scheduled))]
    for item, row in enumerate(found):  # the number by which rows are known says the same
        number = scheduled.number(item)
        assert scheduled.row(number).input_ids[0] == row
        assert number == (row if row < 1000 else count + row - 1000)
    return found


ratios = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)


@settings(deadline=None)
@given(ratio=ratios, steps=st.integers(1, 12), batch=st.integers(1, 12))
def test_places(ratio: float, steps: int, batch: int) -> None:
    """Item p is replayed where p·ratio passes an integer, in decimal arithmetic written out."""
    found = [row >= 1000 for row in seen(7, 5, steps, batch, ratio)]
    share = Fraction(round(ratio * 1000), 1000)
    expected = [math.floor((p + 1) * share) > math.floor(p * share) for p in range(steps * batch)]
    assert found == expected
    for first in range(0, len(found), 3):
        for last in range(first, len(found) + 1, 4):
            assert abs(sum(found[first:last]) - (last - first) * share) < 1


@pytest.mark.parametrize(("ratio", "every"), [(0.1, 10), (0.05, 20), (0.2, 5), (0.01, 100), (0.5, 2)])
def test_no_drift(ratio: float, every: int) -> None:
    """A thousand steps: every n-th item, to the last."""
    found = seen(50, 9, 1000, 10, ratio)
    assert [item for item, row in enumerate(found) if row >= 1000] == list(range(every - 1, 10_000, every))


@settings(deadline=None)
@given(ratio=ratios, count=st.integers(1, 20), replayed=st.integers(1, 8), seed=st.integers(0, 3))
def test_both_keep_their_own_order(ratio: float, count: int, replayed: int, seed: int) -> None:
    """Task rows come as they would without replay, only later; replayed rows pass by pass, each one once."""
    found = seen(count, replayed, 10, 8, ratio, seed)
    rows = [row for row in found if row < 1000]
    plain = ScheduledRows(task(count), 10, 8, seed)
    assert rows == [plain[item].input_ids[0] for item in range(len(rows))]
    again = [row for row in found if row >= 1000]
    for start in range(0, len(again), replayed):
        one_pass = again[start : start + replayed]
        assert len(set(one_pass)) == len(one_pass)
    other_ratio = [row for row in seen(count, replayed, 10, 8, 0.5, seed) if row >= 1000]
    shorter = min(len(again), len(other_ratio))
    assert again[:shorter] == other_ratio[:shorter]


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    assert seen(17, 5, 20, 6, 0.3)[:60] == seen(17, 5, 10, 6, 0.3)
    assert seen(17, 5, 10, 6, 0.3, seed=1) != seen(17, 5, 10, 6, 0.3)


def test_nothing_is_replayed_at_0() -> None:
    plain = ScheduledRows(task(17), 10, 6, 0)
    assert seen(17, 5, 10, 6, 0.0) == [plain[item].input_ids[0] for item in range(60)]


@settings(deadline=None)
@given(ratio=ratios, rows=st.integers(1, 200), batch=st.integers(1, 16), epochs=st.sampled_from([0.5, 1.0, 2.0, 0.1]))
def test_epochs_are_of_the_task(ratio: float, rows: int, batch: int, epochs: float) -> None:
    """The steps hold as many rows of the task as the epochs have, and with one step less they would not."""
    share = Fraction(round(ratio * 1000), 1000)
    steps = total_steps(TrainConfig(epochs=epochs, batch_size=batch), rows, ratio)
    wanted = Fraction(str(epochs)) * rows
    assert steps * batch * (1 - share) >= wanted > (steps - 1) * batch * (1 - share)
    assert total_steps(TrainConfig(epochs=epochs, batch_size=batch, max_steps=3), rows, ratio) == 3
    assert total_steps(TrainConfig(epochs=epochs, batch_size=batch), rows, 0.0) == math.ceil(epochs * rows / batch)


# -- what is replayed ------------------------------------------------------------------------------------------------


def rows_of(content: dict[str, Any], random_base: Path) -> list[Row]:
    config = resolve(content)
    return replay_rows(load_task(config), RunDirectory(config.run_directory))


def test_preserve_rows(base_config: dict[str, Any], random_base: Path, words: list[str]) -> None:
    """The loss is on all tokens without a response, and on the response alone with one."""
    assert rows_of(base_config, random_base) == []
    base_config["data"]["replay"] = {"ratio": 0}
    assert rows_of(base_config, random_base) == []
    base_config["data"]["replay"] = {"ratio": 0.1}
    tokenizer = load_tokenizer(str(random_base))
    expected = [tokenizer(text)["input_ids"] for text in words[:50]]
    assert rows_of(base_config, random_base) == [Row(ids, ids) for ids in expected]


def test_a_source_of_its_own(
    base_config: dict[str, Any], random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.jsonl").write_text("".join(json.dumps({"x": "abcd", "y": f" dd {i}"}) + "\n" for i in range(3)))
    source = {"path": "old.jsonl", "prompt": "x", "response": "y"}
    base_config["data"]["replay"] = {"ratio": 0.1, "source": source}
    del base_config["data"]["preserve"]
    config = resolve(base_config, tmp_path)
    assert config.data.replay is not None
    assert config.data.replay.source is not None
    assert config.data.replay.source.path == str(tmp_path / "old.jsonl")  # relative to the configuration
    tokenizer = load_tokenizer(str(random_base))
    found = replay_rows(load_task(config), RunDirectory(config.run_directory))
    assert len(found) == 3
    for number, row in enumerate(found):
        answer = [label for label in row.labels if label != IGNORED]
        assert tokenizer.decode(answer) == f" dd {number}</s>"
        assert tokenizer.decode(row.input_ids) == f"abcd dd {number}</s>"
    assert resolve(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_answers_of_the_original_model(base_config: dict[str, Any], random_base: Path) -> None:
    base_config["data"]["replay"] = {"ratio": 0.1, "answers": True}
    with pytest.raises(UserError, match=r"^answers: .* is missing; run the stage first"):
        rows_of(base_config, random_base)
    folder = RunDirectory(resolve(base_config).run_directory).answers
    folder.mkdir(parents=True)
    lines = [{"prompt": "abcd", "answer": "x", "tokens": [7, 8, 1]}, {"prompt": "dd", "answer": "", "tokens": []}]
    (folder / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompt = load_tokenizer(str(random_base))("abcd")["input_ids"]
    expected = Row([*prompt, 7, 8, 1], [IGNORED] * len(prompt) + [7, 8, 1])
    assert rows_of(base_config, random_base) == [expected]


def test_rows_without_a_token(
    base_config: dict[str, Any], random_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "preserve.jsonl"
    base_config["data"]["preserve"]["path"] = str(file)
    base_config["data"]["replay"] = {"ratio": 0.1}
    file.write_text('{"q": ""}\n{"q": "abcd ef"}\n')
    assert len(rows_of(base_config, random_base)) == 1
    assert "warning: data.preserve: 1 of 2 rows have no token to replay" in capsys.readouterr().err
    file.write_text('{"q": ""}\n')
    with pytest.raises(UserError, match=r"^data\.preserve: none of 1 rows has a token to replay"):
        rows_of(base_config, random_base)


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        ({}, r"^data\.replay\.ratio: missing"),
        ({"ratio": 1.0}, r"^data\.replay\.ratio: 1\.0 given; allowed: .*less than 1$"),
        ({"ratio": -0.1}, r"^data\.replay\.ratio: -0\.1 given; allowed: .*greater than or equal to 0$"),
        ({"ratio": 0.1, "anwers": True}, r"^data\.replay\.anwers: unknown key .*did you mean 'answers'\?$"),
        (
            {"ratio": 0.1, "source": {"path": "x.jsonl", "prompt": "x"}, "answers": True},
            r"^data\.replay\.answers: True given; allowed: false beside data\.replay\.source",
        ),
    ],
    ids=str,
)
def test_mistakes(base_config: dict[str, Any], replay: dict[str, Any], message: str) -> None:
    base_config["data"]["replay"] = replay
    with pytest.raises(UserError, match=message) as raised:
        resolve(base_config)
    assert "\n" not in str(raised.value)


def test_nothing_to_replay(base_config: dict[str, Any]) -> None:
    del base_config["data"]["preserve"]
    base_config["data"]["replay"] = {"ratio": 0.1}
    with pytest.raises(UserError, match=r"^data\.replay: .* given; allowed: replay with data\.preserve, or with a "):
        resolve(base_config)
