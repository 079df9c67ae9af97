"""What holds for every registered method of LoRA's form, those of other people's packages included."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from harness.cli import app
from harness.config import ModelConfig
from harness.data.sampling import seed_for
from harness.methods.base import AdapterInit, Method
from harness.methods.registry import build_method, method_class, method_names, needs
from harness.models.targets import Layer
from harness.training.penalties.registry import penalty_class, penalty_names
from tests.decomposition.reference import outlier_problem
from tests.methods.held import Held
from tests.methods.runs import VARIANTS, registered

DOCS = Path(__file__).resolve().parents[2] / "docs"
QUANTISED = registered(quantised=True)
CONFIGS = VARIANTS | registered() | QUANTISED
SHAPES = [(96, 96), (96, 64), (64, 96)]


def build(label: str, rank: int, seed: int = 0) -> Method:
    config = {**CONFIGS[label], "rank": rank}
    quantised = "nf4" if label in QUANTISED else "none"
    return build_method(config, seed, ModelConfig(path="x", dtype="float32", quantization=quantised))


def start(method: Method, layer: Layer, rank: int) -> AdapterInit:
    """One layer's adapter from statistics of every kind."""
    W, C = outlier_problem(layer.out_features, layer.in_features, 4000)
    generator = torch.Generator().manual_seed(7)
    delta = torch.randn(4000, layer.out_features, generator=generator) * torch.logspace(0, -1, layer.out_features)
    x = torch.randn(4000, layer.in_features, generator=generator)
    held = Held(C, output_gradient_covariance=delta.T @ delta / 4000, weight_gradient=delta.T @ x / 4000)
    candidates = method.candidates([layer])
    method = method.with_options(candidates[0]) if candidates else method  # what probes would choose among
    return method.initialise(layer, W, rank, held, method.examine(layer, W, held))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("label", CONFIGS)
def test_tensors_of_a_layer(label: str, shape: tuple[int, int]) -> None:
    """Shapes, dtype and device, finite up to the largest rank, the same whatever was drawn before."""
    if label in QUANTISED:
        pytest.importorskip("bitsandbytes")
    layer = Layer("model.layers.3.mlp.up_proj", *shape)
    largest = min(shape) // 2 if CONFIGS[label]["name"] == "lora_ga" else min(shape)
    for rank in (1, 8, largest):
        torch.manual_seed(rank)
        initial = start(build(label, rank), layer, rank)
        assert initial.A.shape == (rank, shape[1])
        assert initial.B.shape == (shape[0], rank)
        for factor in (initial.A, initial.B):
            assert factor.dtype == torch.float32
            assert factor.device.type == "cpu"
            assert factor.isfinite().all()
        torch.manual_seed(1000)
        again = start(build(label, rank), layer, rank)
        assert torch.equal(initial.A, again.A)
        assert torch.equal(initial.B, again.B)
        # B = 0, or the block is taken out of the base, or the base is quantised.
        taken = initial.subtracted is not None and build(label, rank).starts_at_base
        assert bool(initial.B.any()) == (initial.residual or taken)


@pytest.mark.parametrize("label", [label for label, config in CONFIGS.items() if config["name"] in ("lora", "lora_ga")])
def test_drawn_tensors_depend_on_seed_and_layer(label: str) -> None:
    random = CONFIGS[label]["name"] == "lora" or CONFIGS[label].get("formula") == "peft"
    layer, other = (Layer(name, 64, 96) for name in ("model.layers.3.mlp.up_proj", "model.layers.4.mlp.up_proj"))
    first = start(build(label, 8), layer, 8).A
    assert torch.equal(start(build(label, 8, seed=1), layer, 8).A, first) != random
    assert torch.equal(start(build(label, 8), other, 8).A, first) != random
    assert seed_for("lora", 0, layer.name) != seed_for("lora", 0, other.name)


def test_what_methods_take_statistics_from() -> None:
    found = {name: needs(method_class(name)) for name in method_names()}
    assert found["lora"] == {"nothing": []}
    assert found["corda"] == {"data.preserve": ["mode: kpm"], "data.train": ["mode: ipm"]}
    assert found["eva"] == {"data.train": []}
    assert found["lora_null"] == {"data.preserve": []}
    assert found["lora_ga"] == {"data.train, with gradients": []}
    for name, config in CONFIGS.items():
        request = build(name, 8).statistics()
        assert any(
            request is None or f"data.{'preserve' if request.data == 'preserve' else 'train'}" in answer
            for answer in found[config["name"]]
        )


def test_methods_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 120
    rows: dict[str, str] = {}
    name = ""
    for cells in ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")):
        name = cells[0] or name
        rows[name] = f"{rows.get(name, '')} {' '.join(cells[1:])}"
    assert list(rows) == [*method_names(), *penalty_names()]
    assert "data.preserve (mode: kpm)" in rows["corda"]
    assert "data.train (mode: ipm)" in rows["corda"]
    assert "data.train, with gradients" in rows["lora_ga"]
    assert "(over an NF4 base only)" in rows["loftq"]
    assert "nothing" in rows["lora"]


@pytest.mark.parametrize("name", method_names())
def test_page_of_methods(name: str) -> None:
    """docs/methods.md has a row for every method; it or a page of its own names every option."""
    table = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in table, f"no row for {name} in the table of docs/methods.md"
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for option in method_class(name).Options.model_fields:
        assert f"`{option}`" in text, f"docs/ does not name the option {option} of {name}"


@pytest.mark.parametrize("name", penalty_names())
def test_page_of_penalties(name: str) -> None:
    """docs/penalties.md has a row for every penalty; it or a page of its own names every option."""
    table = (DOCS / "penalties.md").read_text(encoding="utf-8")
    assert f"`{name}`" in table, f"no row for {name} in the table of docs/penalties.md"
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for option in penalty_class(name).Options.model_fields:
        assert f"`{option}`" in text, f"docs/ does not name the option {option} of {name}"
