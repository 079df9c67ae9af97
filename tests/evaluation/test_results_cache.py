"""The same question is asked once: entries by content, for a base and for adapters, whole or evaluated again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness.errors import UserError
from harness.evaluation import engines
from harness.evaluation.candidates import Candidate
from harness.evaluation.engines import evaluate
from harness.evaluation.results_cache import ResultsCache
from harness.evaluation.scores import CandidateScores
from tests.evaluation.conftest import LocalTasks, write_task


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The tasks of each evaluation that an engine was asked for, in a cache of the test's own."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    calls: list[tuple[str, ...]] = []
    evaluate_one = engines._evaluate_one

    def recording(engine: Any, candidate: Candidate, tasks: Any, loaded: Any, limit: Any) -> Any:
        calls.append((candidate.name, *tasks))
        return evaluate_one(engine, candidate, tasks, loaded, limit)

    monkeypatch.setattr(engines, "_evaluate_one", recording)
    return calls


@pytest.fixture
def base(tmp_path: Path, random_base: Path) -> Path:
    """A copy that tests may change."""
    return Path(shutil.copytree(random_base, tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path: Path, random_base: Path, make_adapter: Callable[..., Path]) -> Path:
    return Path(shutil.copytree(make_adapter(random_base, seed=1, size=0.1), tmp_path / "adapter"))


@pytest.fixture
def places(tmp_path: Path, local_tasks: LocalTasks) -> dict[str, Path]:
    """Copies of task files and data, with a group over two of the tasks."""
    tasks = Path(shutil.copytree(local_tasks.include_path, tmp_path / "tasks"))
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    members = [f"words_choice_{number}" for number in (1, 2)]
    for member in members:
        write_task(tasks / f"{member}.yaml", include="choice.yaml", task=member)
    write_task(tasks / "both.yaml", group="words_both", task=members, aggregate_metric_list=[mean])
    return {"include_path": tasks, "data_dir": Path(shutil.copytree(local_tasks.data_dir, tmp_path / "data"))}


def found(candidates: list[Candidate], tasks: list[str], places: dict[str, Path], **options: Any) -> Any:
    settings = {"backend": "hf", "dtype": "float32", "limit": 8} | places | options
    return evaluate(candidates, tasks, **settings)


def test_only_what_is_not_known_is_asked(
    asked: list[tuple[str, ...]], base: Path, adapter: Path, places: dict[str, Path], tmp_path: Path
) -> None:
    candidates = [Candidate("base", None, base), Candidate("step-10", 10, base, adapter)]
    tasks = ["words_next", "words_both", "words_perplexity"]
    first = found(candidates, tasks, places)
    assert asked == [("base", *tasks), ("step-10", *tasks)]
    assert {name: len(items) for name, items in first[0].items.items()} == dict(zip(tasks, (8, 16, 8), strict=True))
    assert found(candidates, tasks, places) == first
    assert len(asked) == 2
    # Other names, another order, fewer and more tasks, one more candidate.
    shutil.copytree(adapter, tmp_path / "moved")
    renamed = [Candidate("final", 20, base, tmp_path / "moved"), Candidate("model", None, base)]
    final, model = found(renamed, ["words_choice", "words_both"], places)
    assert asked[2:] == [("final", "words_choice"), ("model", "words_choice")]
    assert (final.name, final.step, list(final.scores)) == ("final", 20, ["words_choice", "words_both"])
    assert final.scores["words_both"] == first[1].scores["words_both"]
    assert model.answers["words_choice_1"] == first[0].answers["words_choice_1"] == model.answers["words_choice"]
    assert sum(score.items for score in final.scores.values()) == pytest.approx(
        final.seconds * final.samples_per_second
    )
    found(renamed, ["words_choice"], places, cache=False)
    assert len(asked) == 6


def changed_weight(base: Path, adapter: Path, places: dict[str, Path]) -> dict[str, Any]:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return {}


def changed_adapter(base: Path, adapter: Path, places: dict[str, Path]) -> dict[str, Any]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    return {}


def renamed_base(base: Path, adapter: Path, places: dict[str, Path]) -> dict[str, Any]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    return {}


def changed_task(base: Path, adapter: Path, places: dict[str, Path]) -> dict[str, Any]:
    path = places["include_path"] / "next.yaml"
    path.write_text(path.read_text().replace("12", "3"))
    return {}


def changed_data(base: Path, adapter: Path, places: dict[str, Path]) -> dict[str, Any]:
    path = places["data_dir"] / "words.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    return {}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda *_: {}, []),
        (lambda *_: {"batch_size": 3}, []),
        (renamed_base, []),
        (changed_adapter, ["adapter"]),
        (changed_weight, ["base", "adapter"]),
        (changed_task, ["base", "adapter"]),
        (changed_data, ["base", "adapter"]),
        (lambda *_: {"limit": 9}, ["base", "adapter"]),
        (lambda *_: {"seed": 1}, ["base", "adapter"]),
        (lambda *_: {"dtype": "bfloat16"}, ["base", "adapter"]),
    ],
)
def test_what_decides_a_score_is_in_the_key(
    asked: list[tuple[str, ...]],
    base: Path,
    adapter: Path,
    places: dict[str, Path],
    change: Callable[..., dict[str, Any]],
    again: list[str],
) -> None:
    candidates = [Candidate("base", None, base), Candidate("adapter", 1, base, adapter)]
    found(candidates, ["words_next"], places)
    found(candidates, ["words_next"], places, **change(base, adapter, places))
    assert [name for name, _ in asked[2:]] == again


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = path.read_text()
    place = content.index('"value"')
    digit = next(i for i in range(place, len(content)) if content[i].isdigit())
    path.write_text(content[:digit] + str((int(content[digit]) + 1) % 10) + content[digit + 1 :])


def empty(path: Path) -> None:
    path.write_text("{}\n")


@pytest.mark.parametrize("damage", [truncate, flip, empty, lambda path: path.write_bytes(b"\xff\x00")])
def test_a_damaged_entry_is_evaluated_again(
    asked: list[tuple[str, ...]],
    base: Path,
    places: dict[str, Path],
    damage: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    candidates = [Candidate("base", None, base)]
    first = found(candidates, ["words_choice"], places)
    (entry,) = (tmp_path / "cache" / "eval").iterdir()
    whole = json.loads(entry.read_text())
    damage(entry)
    (second,) = found(candidates, ["words_choice"], places)
    assert f"{entry} is damaged (" in "".join(capsys.readouterr())
    assert (second.scores, second.items, len(asked)) == (first[0].scores, first[0].items, 2)
    mended = json.loads(entry.read_text())
    assert [mended["content"][key] for key in ("score", "items")] == [
        whole["content"][key] for key in ("score", "items")
    ]
    found(candidates, ["words_choice"], places)
    assert len(asked) == 2


def test_a_disk_that_takes_nothing_does_not_end_an_evaluation(
    asked: list[tuple[str, ...]],
    base: Path,
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", "/proc/none")
    (scores,) = found([Candidate("base", None, base)], ["words_choice"], places)
    assert isinstance(scores, CandidateScores)
    assert "cache: scores are not kept: " in "".join(capsys.readouterr())


def test_a_model_that_is_not_here_has_no_entry(
    local_tasks: LocalTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ResultsCache(
        backend="hf",
        dtype="float32",
        limit=None,
        seed=0,
        data_dir=local_tasks.data_dir,
        include_path=local_tasks.include_path,
        folder=tmp_path,
    )
    for model in ("nobody/nothing", "no/such/folder", ""):
        assert cache.get(Candidate("base", None, model), "words_next") is None
    with pytest.raises(UserError, match="unknown task"):
        cache.entry(Candidate("base", None, tmp_path), "words_nxt")
    assert os.listdir(tmp_path) == []
