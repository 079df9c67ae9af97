"""The whole road on a small pre-trained world: one YAML, `harness run`, and the same answers from every engine."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.evaluation.engines import Candidate, evaluate
from harness.resources import find
from harness.tiny import TinyWorld, build, small_options

pytestmark = pytest.mark.slow
TASKS = ["tiny_facts_seen", "tiny_facts_heldout", "tiny_reverse"]


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return build(options=small_options())


@pytest.fixture(scope="module")
def run(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of CorDA-KPM with the anchor, evaluated by vLLM."""
    out = tmp_path_factory.mktemp("journey")
    harness(world, out)
    return out / "journey"


def harness(world: TinyWorld, out: Path) -> str:
    """`harness run` on the demo's recipe, shortened; returns what it printed."""
    overrides = [
        "name=journey",
        f"output_dir={out}",
        f"model.path={world.model}",
        f"data.train.path={world.train}",
        f"data.preserve.path={world.preserve}",
        f"eval.data_dir={world.data_dir}",
        "method={name: corda, mode: kpm, rank: 8}",
        "anchor={kl: 1.0, prompts_per_step: 4}",
        "train.max_steps=60",
        "train.save_steps=30",
    ]
    command = [Path(sys.executable).parent / "harness", "run", find("launch/recipes/tiny.yaml"), *overrides]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_everything_is_there(run: Path) -> None:
    results = json.loads((run / "eval" / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["base", "step-30", "final"]
    assert 0 < results["K"] <= 1.2
    expected = ["report.html", "report.md", "metrics.jsonl", "environment.json", "config.yaml", "merged", "adapter"]
    assert all((run / name).exists() for name in expected)
    assert any((run / "tensorboard").iterdir())
    assert not list(run.rglob("*.pt")) and not list(run.rglob("*.bin")) and not list(run.rglob("*.pth"))


def test_second_run_has_nothing_to_do(run: Path, world: TinyWorld) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    time.sleep(0.01)
    harness(world, run.parent)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_engines_agree_on_adapter_and_merged_model(run: Path, world: TinyWorld) -> None:
    """vLLM's LoRA, PEFT's, and the merged model in both: scores ≤ 1 item apart, ≥ 99 % of the answers the same."""
    candidates = [
        Candidate("adapter", None, str(world.model), run / "adapter"),
        Candidate("merged", None, str(run / "merged")),
    ]
    by_engine = {
        backend: evaluate(candidates, TASKS, backend=backend, dtype="float32", data_dir=world.data_dir)
        for backend in ("vllm", "hf")
    }
    reference = by_engine["hf"][0]
    for scores in [*by_engine["vllm"], *by_engine["hf"]]:
        for task in TASKS:
            score, expected = scores.scores[task], reference.scores[task]
            assert abs(score.value - expected.value) * expected.items <= 1 + 1e-9
    items = [(task, number) for task in TASKS for number in range(len(reference.answers[task]))]
    for scores in [*by_engine["vllm"], by_engine["hf"][1]]:
        same = sum(scores.answers[task][n] == reference.answers[task][n] for task, n in items)
        assert same >= 0.99 * len(items)
