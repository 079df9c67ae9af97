"""LALoRA on a LLaVA: rows with no image, one, or two; a projector that is frozen, adapted, or trained in full."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness import preflight
from harness.adapters.lora import attach_lora, load_factors
from harness.config import resolve
from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import LowRank
from harness.models.loading import load_model
from harness.models.targets import adapted_modules
from harness.run_directory import RunDirectory
from harness.statistics.adapter_curvature import diagonal_fisher, goes_by_rows, trained_weights
from harness.tasks.registry import load_task
from tests.conftest import run_gang
from tests.tasks.llava import configuration

BOUND = 1e-6


def configured(folder: Path, **model: Any) -> dict[str, Any]:
    content = configuration(folder / "world", folder)
    content["model"] |= model
    return content


def mixed_rows(task: Any) -> list[Row]:
    """Two rows without an image, two with one, two with two."""
    rows: dict[int, list[Row]] = {0: [], 1: [], 2: []}
    for row in task.rows(task.read(task.config.data.train, "data.train")):
        images = len(row.tensors().get("pixel_values", ()))
        if len(rows[images]) < 2:
            rows[images].append(row)
    return [row for pair in zip(*rows.values(), strict=True) for row in pair]


@pytest.mark.parametrize("projector", ["frozen", "adapted", "full"])
def test_diagonal(projector: str, tmp_path: Path) -> None:
    config = resolve(configured(tmp_path, projector=projector))
    task, base = load_task(config), load_model(config.model)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: LowRank(
            0.2 * torch.randn(layer.out_features, 2, generator=generator),
            0.2 * torch.randn(2, layer.in_features, generator=generator),
            1.0,
        )
        for name, layer in adapted_modules(base, config.model).items()
    }
    model = attach_lora(base, dict.fromkeys(factors, 2), 1.0)
    load_factors(model, factors)
    if projector == "full":
        model.get_submodule("base_model.model.model.multi_modal_projector").requires_grad_(True)
    model = model.double().eval()
    rows, weights = mixed_rows(task), trained_weights(model)
    expected = dict.fromkeys(weights, 0.0)
    for row in rows:
        pixels = {name: tensor.double() for name, tensor in row.tensors().items()}
        scores = model(input_ids=torch.tensor([row.input_ids]), **pixels).logits[0].log_softmax(-1)
        labelled = [(place, token) for place, token in enumerate(row.labels) if place and token != IGNORED]
        total = sum(scores[place - 1, token] for place, token in labelled)
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            expected[name] = expected[name] + (0.0 if gradient is None else gradient.square() / len(rows))
    assert goes_by_rows(model) == (projector != "frozen")
    size = 1 if goes_by_rows(model) else 3
    batches = [collate(rows[start : start + size], task.pad_id) for start in range(0, len(rows), size)]
    found = diagonal_fisher(model, batches, task.objective)
    assert found.keys() == expected.keys()
    assert any("multi_modal_projector" in name for name in found) == (projector != "frozen")
    for name, right in expected.items():
        assert float((found[name] - right).norm()) <= BOUND * float(right.norm()), name


def test_rows_with_images_are_not_told_apart_in_a_batch(tmp_path: Path) -> None:
    config = resolve(configured(tmp_path, projector="full"))
    task, base = load_task(config), load_model(config.model)
    model = attach_lora(base, dict.fromkeys(adapted_modules(base, config.model), 2), 1.0)
    model.get_submodule("base_model.model.model.multi_modal_projector").requires_grad_(True)
    with pytest.raises(ValueError, match="batches of one row"):
        diagonal_fisher(model, [collate(mixed_rows(task), task.pad_id)], task.objective)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"projector": "adapted"}, "model.projector: adapted given"),
        ({"projector": "full"}, "model.projector: full given"),
        ({"modules_to_save": ["lm_head"]}, "model.modules_to_save given"),
    ],
)
def test_kronecker_factors_are_of_tokens(model: dict[str, Any], says: str, tmp_path: Path) -> None:
    content = configured(tmp_path, **model) | {"penalties": [{"name": "lalora", "curvature": "kfac"}]}
    with pytest.raises(UserError) as error:
        preflight.check(resolve(content))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["adapted", "full"])
def test_a_run(projector: str, tmp_path: Path) -> None:
    """Statistics of the source, the penalty and training, on rows with as many images as they like."""
    content = configured(tmp_path, projector=projector)
    content["penalties"] = [{"name": "lalora", "lambda": 1.0, "sources": [content["data"]["train"]]}]
    content["train"] = {"max_steps": 2, "batch_size": 4, "log_steps": 1, "learning_rate": 1.0e-3}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    run_gang(path, 1)
    run = RunDirectory(resolve(content).run_directory)
    assert run.adapter.is_dir() and read_json(run.adapter / "adapter_config.json")["peft_type"] == "LORA"
    assert '"laplace"' in run.metrics.read_text()
