"""Evaluation of questions about images: by vLLM where it and torchvision import, else by transformers; whole runs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from harness.config import RunConfig, load_config, resolve
from harness.evaluation import visual_engine as engine_module
from harness.evaluation.candidates import Candidate
from harness.evaluation.merging import merged
from harness.evaluation.visual_engine import merged_folder, visual_engine, vllm_answers
from harness.files import read_json
from harness.models.loading import load_model
from harness.pipeline import run_stages
from harness.run_directory import RunDirectory
from harness.tasks.image_text import ImageText
from harness.tasks.registry import load_task
from tests.conftest import run_gang
from tests.tasks.llava import configuration

SAMPLES = Path(__file__).resolve().parents[2] / "eval" / "samples"


@pytest.fixture(autouse=True)
def not_asked_yet() -> None:
    vllm_answers.cache_clear()


def importing(missing: str | None) -> Callable[[str], ModuleType]:
    def import_module(name: str) -> ModuleType:
        if name == missing:
            raise RuntimeError("operator torchvision::nms\n does not exist")
        return ModuleType(name)

    return import_module


@pytest.mark.parametrize("missing", ["vllm", "torchvision"])
def test_why_transformers_answers_is_said_once(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_module, "importlib", ModuleType("importlib"))
    monkeypatch.setattr(engine_module.importlib, "import_module", importing(missing), raising=False)
    assert not vllm_answers("vllm")
    assert not vllm_answers("vllm")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"by transformers: vLLM cannot run here ({missing}: operator torchvision::nms does not exist)" in said


def test_vllm_answers_where_both_import(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine_module, "importlib", ModuleType("importlib"))
    monkeypatch.setattr(engine_module.importlib, "import_module", importing(None), raising=False)
    assert vllm_answers("vllm")
    assert not vllm_answers("hf")
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava") / "world"


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A LoRA with the projector trained in full, exported at step 2 and at the end."""
    folder = tmp_path_factory.mktemp("runs")
    content = configuration(world, folder, eval=evaluation("hf"))
    train = content["data"]["train"]
    content["data"] |= {"validation": train, "preserve": train | {"samples": 16}}
    content["model"] |= {"projector": "full"}
    content["train"] |= {"learning_rate": 2.0e-2}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    run_gang(path, 1)
    return load_config(path)


def evaluation(backend: str) -> dict[str, Any]:
    return {
        "backend": backend,
        "task": ["validation", "pope"],
        "knowledge": ["preserve", "scienceqa"],
        "data_dir": str(SAMPLES),
        "checkpoints": True,
        "limit": 12,
        "batch_size": 5,
    }


@pytest.mark.slow
def test_a_whole_run_is_evaluated(trained: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.tasks.image_text.ANSWER_TOKENS", 6)
    run = RunDirectory(trained.run_directory)
    run_stages(trained, ["eval", "report"])
    results = read_json(run.results)
    assert [model["name"] for model in results["models"]] == ["base", "step-2", "final"]
    assert results["models"][0]["scores"].keys() == {"validation", "pope", "preserve", "scienceqa"}
    metrics = {name: score["metric"] for name, score in results["models"][-1]["scores"].items()}
    assert metrics == {
        "validation": "exact_match",
        "pope": "pope_f1",
        "preserve": "exact_match",
        "scienceqa": "multiple_choice",
    }
    assert results["models"][-1]["scores"]["pope"]["others"].keys() == {
        *("pope_accuracy", "pope_precision", "pope_recall", "pope_yes_ratio")
    }
    lines = [json.loads(line) for line in (run.items / "final.jsonl").read_text().splitlines()]
    assert len(lines) == 48
    # The final model's answers, asked of the merged model directly.
    task = load_task(trained)
    assert isinstance(task, ImageText) and trained.data.validation is not None
    model = load_model(trained.model.model_copy(update={"path": str(run.merged)}))
    asked = task.read(trained.data.validation, "data.validation")[:12]
    assert [line["answer"] for line in lines if line["task"] == "validation"] == task.predict(model, asked, 4)
    assert (run.path / "report.html").is_file()


@pytest.mark.slow
def test_an_adapter_is_merged_for_an_engine_with_what_was_trained_beside_it(trained: RunConfig) -> None:
    """A checkpoint has no ``merged/`` of its own; its projector was trained in full."""
    run = RunDirectory(trained.run_directory)
    adapter = run.checkpoints / "step-2" / "adapter"
    candidate = Candidate("step-2", 2, trained.model.path, adapter)
    expected = PeftModel.from_pretrained(load_model(trained.model), str(adapter)).merge_and_unload()
    with merged_folder(trained, candidate, merged) as folder:
        found = load_model(trained.model.model_copy(update={"path": str(folder)}))
    assert not Path(folder).exists()
    base = load_model(trained.model)
    name = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(found.get_parameter(name), base.get_parameter(name))
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_vllm_answers_as_transformers_does(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not vllm_answers("vllm"):
        pytest.skip("vLLM or torchvision does not import on this machine")
    monkeypatch.setattr("harness.tasks.image_text.ANSWER_TOKENS", 6)
    config = resolve(configuration(world, tmp_path))
    task = load_task(config)
    asked = task.read(config.data.train, "data.train")[:8]
    assert {len(question.images) for question in asked} == {0, 1, 2}
    with visual_engine(config, Candidate("base", None, config.model.path), images=2) as engine:
        found = task.predict(engine, asked, 3)  # type: ignore[arg-type]
    assert found == task.predict(load_model(config.model), asked, 3)
