"""A run directory is evaluated into ``eval/results.json``, on the reference engine."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.evaluation.intervals import QUANTITIES
from harness.evaluation.items import item_scores, read_items
from harness.evaluation.stage import evaluate_run
from tests.evaluation.conftest import LocalTasks
from tests.gangs import REPOSITORY


@pytest.fixture
def run(tmp_path: Path, random_base: Path, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was exported: two checkpoints, of which the second is the final model."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    for step, seed in ((10, 1), (20, 2)):
        checkpoint = run / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter").symlink_to(make_adapter(random_base, seed=seed, size=0.05))
    (run / "adapter").symlink_to(make_adapter(random_base, seed=2, size=0.05))
    return run


@pytest.fixture
def options(local_tasks: LocalTasks) -> dict[str, Any]:
    return {
        "knowledge": ["words_choice"],
        "task": ["words_next"],
        "backend": "hf",
        "dtype": "float32",
        "data_dir": local_tasks.data_dir,
        "include_path": local_tasks.include_path,
    }


def test_results_hold_every_model_once(run: Path, random_base: Path, options: dict[str, Any]) -> None:
    results = evaluate_run(str(random_base), run, checkpoints=True, **options)
    assert results == json.loads((run / "eval" / "results.json").read_text())
    assert [(model["name"], model["step"]) for model in results["models"]] == [
        ("base", None),
        ("step-10", 10),
        ("final", 20),
    ]
    base, _, final = results["models"]
    assert base.keys() == final.keys()
    assert final.keys() == {"name", "step", "scores", "seconds", "samples_per_second"} | {*QUANTITIES, "intervals"}
    assert (base["K"], base["intervals"].keys()) == (1.0, {"T", "KT", "Avg"})
    assert final["scores"]["words_next"].keys() == {"metric", "value", "stderr", "items", "others"}
    kept = final["scores"]["words_choice"]["value"] / base["scores"]["words_choice"]["value"]
    assert results["K"] == final["K"] == pytest.approx(kept)
    assert results["T"] == final["T"] == final["scores"]["words_next"]["value"]
    assert results["Avg"] == pytest.approx(sum(score["value"] for score in final["scores"].values()) / 2)
    assert results["intervals"] == final["intervals"]
    for name, (low, high) in final["intervals"].items():
        assert low <= final[name] <= high
    assert {key: results[key] for key in ("schema", "base_model", "engine", "knowledge", "task", "T_reference")} == {
        "schema": 1,
        "base_model": str(random_base),
        "engine": "hf",
        "knowledge": ["words_choice"],
        "task": ["words_next"],
        "T_reference": None,
    }
    assert results["notes"][:1] == [
        "T is the raw task score: no full fine-tuning result was given (eval.full_fine_tuning)"
    ]


def test_every_model_leaves_its_answers(run: Path, random_base: Path, options: dict[str, Any]) -> None:
    results = evaluate_run(str(random_base), run, checkpoints=True, **options)
    folder = run / "eval" / "items"
    assert sorted(path.name for path in folder.iterdir()) == ["base.jsonl", "final.jsonl", "step-10.jsonl"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["items", "results.json"]
    ids = set()
    for model in results["models"]:
        items = read_items(folder / f"{model['name']}.jsonl")
        assert items.keys() == {"words_choice", "words_next"}
        for task, some in items.items():
            scores = item_scores(some)
            assert scores is not None
            assert scores.mean == pytest.approx(model["scores"][task]["value"])
            ids.add((task, scores.ids))
    assert len(ids) == 2, "every model answered the same items"
    item = items["words_choice"][0]
    assert item.score == float(item.answer == item.expected)
    assert item.question and item.question not in item.expected
    # Answers of checkpoints that are no longer evaluated go.
    evaluate_run(str(random_base), run, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["base.jsonl", "final.jsonl"]


def test_the_same_question_is_asked_once(run: Path, random_base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """A second evaluation of the run, and of another that starts from the same base, gives the first one's times."""
    first = evaluate_run(str(random_base), run, **options)
    assert len(list((tmp_path / "cache" / "eval").iterdir())) == 4  # two models, two tasks
    assert evaluate_run(str(random_base), run, **options)["models"] == first["models"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter").symlink_to((run / "checkpoints" / "step-10" / "adapter").resolve())
    assert evaluate_run(str(random_base), other, **options)["models"][0] == first["models"][0]
    assert len(list((tmp_path / "cache" / "eval").iterdir())) == 6
    limited = evaluate_run(str(random_base), run, **options, limit=5)
    assert limited["models"][0]["scores"]["words_next"]["items"] == 5
    assert len(list((tmp_path / "cache" / "eval").iterdir())) == 10


def test_a_merged_model_stands_in_where_there_is_no_adapter(
    tmp_path: Path,
    random_base: Path,
    options: dict[str, Any],
    merge: Callable[[Path, Path, Path], Path],
    run: Path,
) -> None:
    full = tmp_path / "full"
    merge(random_base, run / "adapter", full / "merged")
    found = evaluate_run(str(random_base), full, **options)
    by_adapter = evaluate_run(str(random_base), run, **options)
    assert found["models"][-1]["scores"] == by_adapter["models"][-1]["scores"]
    assert found["models"][-1]["step"] is None


def test_t_is_divided_by_full_fine_tuning(
    run: Path, random_base: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    full = tmp_path / "full" / "eval"
    full.mkdir(parents=True)
    score = {"metric": "exact_match", "value": 0.5, "stderr": None, "items": 24}
    models = [{"name": "base", "scores": {}}, {"name": "final", "scores": {"words_next": score}}]
    (full / "results.json").write_text(json.dumps({"models": models}))
    found = evaluate_run(str(random_base), run, **options, full_fine_tuning=tmp_path / "full")
    assert found["T"] == pytest.approx(found["models"][-1]["scores"]["words_next"]["value"] / 0.5)
    assert (found["T_reference"], found["T_reference_scores"]) == (str(tmp_path / "full"), {"words_next": 0.5})
    assert found["notes"][0] == (
        "intervals take the score of full fine-tuning on words_next as exact: its items are not known"
    )
    (full / "results.json").write_text(json.dumps({"models": [{"name": "final", "scores": {"other": score}}]}))
    with pytest.raises(
        UserError, match=r"eval\.full_fine_tuning: .* has no score for 'words_next'; .* \(it has other\)"
    ):
        evaluate_run(str(random_base), run, **options, full_fine_tuning=tmp_path / "full")
    with pytest.raises(UserError, match=r"eval\.full_fine_tuning: .* has no eval/results\.json"):
        evaluate_run(str(random_base), run, **options, full_fine_tuning=tmp_path)


def test_what_was_not_exported_is_named(tmp_path: Path, random_base: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"neither adapter/ nor merged/; run the export stage first"):
        evaluate_run(str(random_base), tmp_path, **options)


@pytest.mark.slow
def test_the_command_line_prints_scores_or_one_line(random_base: Path, local_tasks: LocalTasks, run: Path) -> None:
    def call(tasks: str) -> subprocess.CompletedProcess[str]:
        places = ["--data-dir", str(local_tasks.data_dir), "--include-path", str(local_tasks.include_path)]
        adapter = ["--adapter", str(run / "adapter")]
        command = [sys.executable, str(REPOSITORY / "eval" / "run.py"), "--model", str(random_base), "--tasks", tasks]
        return subprocess.run(
            [*command, *adapter, *places, "--backend", "hf"], capture_output=True, text=True, check=False
        )

    done = call("words_next,words_perplexity")
    assert done.returncode == 0, done.stderr
    assert [model["scores"]["words_perplexity"]["items"] for model in json.loads(done.stdout)] == [24, 24]
    wrong = call("words_nxt")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: eval: unknown task 'words_nxt'; the nearest names are words_next")
    assert wrong.stderr.count("\n") == 1
