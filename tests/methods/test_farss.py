"""FARSS against the paper's formulas: ranks and step-0 tensors of a whole model, variants, options, errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.adapters.lora import read_adapter
from harness.config import RunConfig, resolve
from harness.data.sampling import sample
from harness.data.sources import read_examples
from harness.data.tokenisation import tokenise
from harness.errors import UserError
from harness.files import read_json
from harness.methods.farss import FARSS, FARSSOptions
from harness.models.loading import load_tokenizer
from harness.models.targets import Layer, depth_of, target_modules
from harness.run_directory import RunDirectory
from tests.decomposition.fisher_reference import fisher_problem, paper_choice, paper_importance, paper_ranks
from tests.methods.held import Held
from tests.methods.runs import base_model, largest, live_model, logits, step_zero
from tests.statistics.direct_gradients import Matrices, direct_statistics

OPTIONS = {"name": "farss", "rank": 16, "r_min": 1, "r_avg": 6, "r_max": 12, "shallow_layers": 1}
Started = tuple[RunConfig, RunDirectory]


@pytest.fixture(scope="module")
def content(random_base: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": {"path": str(random_base), "dtype": "float32"},
        "data": {
            "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a", "samples": 16},
            "max_length": 64,
        },
        "output_dir": str(tmp_path_factory.mktemp("runs")),
    }


@pytest.fixture(scope="module")
def started(content: dict[str, Any]) -> Started:
    return step_zero(content, OPTIONS | {"alpha": 40.0}, "farss")


@pytest.fixture(scope="module")
def direct(started: Started) -> Matrices:
    """Both K-FAC factors of the rows that calibration draws, in float64."""
    config, _ = started
    examples = sample(read_examples(config.data.train, "data.train"), 16, "calibrate", config.train.seed, 0)
    rows = tokenise(examples, load_tokenizer(config.model.path), config.data.max_length)
    model = base_model(config).double()
    return direct_statistics(model, target_modules(model, "all-linear"), rows)


def factors(direct: Matrices, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    return direct["input_covariance"][layer], direct["output_gradient_covariance"][layer]


def test_the_whole_model_equals_the_paper(started: Started, direct: Matrices) -> None:
    config, run = started
    base = base_model(config)
    weights = {name: module.weight.detach() for name, module in target_modules(base, "all-linear").items()}
    report, adapter = read_json(run.init / "report.json"), read_adapter(run.init)
    shallow = [name for name in weights if name.startswith("model.layers.0.")]
    importances = [paper_importance(weights[name], *factors(direct, name)) for name in shallow]
    ranks = dict(zip(shallow, paper_ranks(importances, 1e-12 * sum(importances), 1, 6, 12), strict=True))
    assert len(set(ranks.values())) >= 3  # both limits, and something between them
    for name, weight in weights.items():
        rank, low = ranks.get(name, 16), name in shallow
        layer = report["layers"][name]
        assert layer["rank"] == rank
        assert layer["importance"] == pytest.approx(paper_importance(weight, *factors(direct, name)), rel=1e-4)
        assert (layer["shallow"], layer["directions"]) == (low, "low" if low else "high")
        chosen, block = paper_choice(weight, *factors(direct, name), rank, low)
        found = adapter[name]
        assert found.scaling == 2.5
        assert float((found.dense().double() - block).norm() / block.norm()) <= 1e-5, name
        assert layer["rounding_error"] <= 1e-5
        plain = list(range(rank)) if not low else list(range(min(weight.shape) - rank, min(weight.shape)))
        layer["reordered"] = sorted(chosen) != plain
    assert any(layer["reordered"] for layer in report["layers"].values())  # neither PiSSA nor MiLoRA
    assert report["summary"] == {
        "shallow_layers": 1,
        "shallow_rank_budget": 6 * 7,
        "shallow_rank_sum": sum(ranks.values()),
    }


def test_step_zero_computes_what_the_base_computes(started: Started) -> None:
    base = logits(base_model(started[0]))
    for needs_original in (False, True):
        found = logits(live_model(*started, needs_original=needs_original))
        assert largest(found, base) <= 1e-4 * float(base.abs().max())


def test_drawn_labels_are_asked_for(content: dict[str, Any], started: Started) -> None:
    drawn = step_zero(content, OPTIONS | {"fisher": "mc"}, "mc")[1]
    importances = [
        {name: layer["importance"] for name, layer in read_json(run.init / "report.json")["layers"].items()}
        for run in (started[1], drawn)
    ]
    assert importances[0].keys() == importances[1].keys()
    assert all(importances[0][name] != importances[1][name] for name in importances[0])


SHALLOW, DEEP = Layer("model.layers.0.mlp.up_proj", 64, 160), Layer("model.layers.1.mlp.up_proj", 64, 160)


@pytest.mark.parametrize(
    ("variant", "shallow_low", "deep_low"),
    [("farss", True, False), ("all-high", False, False), ("farss-init", True, True)],
)
@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (64, 64)], ids=str)
def test_variants(shape: tuple[int, int], variant: str, shallow_low: bool, deep_low: bool) -> None:
    W, H, D = fisher_problem(*shape)
    statistics = Held(H, output_gradient_covariance=D)
    method = FARSS(FARSSOptions(rank=8, r_avg=3, shallow_layers=1, variant=variant, alpha=2.0))
    layers = [Layer(layer.name, *shape) for layer in (SHALLOW, DEEP)]
    findings = {layer.name: method.examine(layer, W, statistics) for layer in layers}
    ranks = method.ranks(layers, findings)
    assert list(ranks.values()) == ([8, 8] if variant == "farss-init" else [3, 8])
    for layer, low in zip(layers, (shallow_low, deep_low), strict=True):
        initial = method.initialise(layer, W, ranks[layer.name], statistics, findings[layer.name])
        assert initial.residual
        assert initial.A.dtype == initial.B.dtype == torch.float32
        _, block = paper_choice(W, H, D, ranks[layer.name], low)
        found = 0.25 * (initial.B.double() @ initial.A.double())
        assert float((found - block).norm() / block.norm()) <= 1e-5
    if variant == "farss-init":
        assert method.probe() is None and method.summarise(layers, findings, ranks) == {}


def test_full_rank_takes_the_whole_weight() -> None:
    W, H, D = fisher_problem(48, 32)
    for shallow_layers in (0, 1):
        method = FARSS(FARSSOptions(rank=32, r_avg=32, r_max=32, shallow_layers=shallow_layers))
        initial = method.initialise(SHALLOW, W, 32, Held(H, output_gradient_covariance=D), {})
        assert float((initial.B @ initial.A - W).norm() / W.norm()) <= 1e-5
        assert initial.report["share_of_weight"] == pytest.approx(1.0)


def test_scaling_is_split_evenly() -> None:
    W, H, D = fisher_problem(64, 160)
    plain, scaled = (
        FARSS(FARSSOptions(rank=8, alpha=alpha, shallow_layers=1)).initialise(
            SHALLOW, W, 4, Held(H, output_gradient_covariance=D), {}
        )
        for alpha in (8.0, 32.0)
    )
    assert torch.allclose(scaled.A * 2, plain.A, rtol=1e-6)
    assert torch.allclose(scaled.B * 2, plain.B, rtol=1e-6)


def test_each_weight_is_decomposed_for_itself() -> None:
    """One decomposition is kept for the candidates of a search; it must never serve another weight or statistic."""
    (W, H, D), (other, *_) = fisher_problem(64, 64), fisher_problem(64, 64, seed=5)
    u = torch.linalg.svd(other)[0][:, -1]
    steep = D + 1e9 * D.trace() * torch.outer(u, u)  # all that matters lies along the smallest singular value
    method = FARSS(FARSSOptions(rank=8, shallow_layers=1))
    one, two = (Held(H, output_gradient_covariance=matrix) for matrix in (D, steep))
    blocks = []
    for shallow_layers, weight, statistics, gradients in (
        (1, W, one, D),
        (0, W, one, D),
        (0, other, one, D),
        (0, other, two, steep),
    ):
        candidate = method.with_options(FARSSOptions(rank=8, shallow_layers=shallow_layers))
        initial = candidate.initialise(SHALLOW, weight, 8, statistics, {})
        _, block = paper_choice(weight, H, gradients, 8, low=shallow_layers == 1)
        assert float((initial.B.double() @ initial.A.double() - block).norm() / block.norm()) <= 1e-5
        blocks.append(block)
    assert len({round(float(block.norm()), 6) for block in blocks}) == 4


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.layers.3.mlp.up_proj", 3),
        ("model.layers.12.block.7.up_proj", 12),
        ("transformer.h.0.attn", 0),
        ("0.linear", 0),
        ("model.projector.fc1", None),
        ("layers.7", None),
    ],
)
def test_depth(name: str, depth: int | None) -> None:
    assert depth_of(name) == depth


def test_ranks() -> None:
    layers = [
        Layer("model.embedder.proj", 64, 64),  # no block: deep
        Layer("model.layers.0.narrow", 4, 64),
        Layer("model.layers.0.plain", 64, 64),
        Layer("model.layers.1.plain", 64, 64),
        Layer("model.layers.2.plain", 64, 64),
    ]
    findings = {
        layer.name: {"importance": importance} for layer, importance in zip(layers, [1, 1, 2, 4, 8], strict=True)
    }
    method = FARSS(FARSSOptions(rank=16, r_avg=7, r_max=12, shallow_layers=2))
    # Of 21: 12, 6 and 3; the narrow layer holds no more than 4.
    assert list(method.ranks(layers, findings).values()) == [16, 4, 6, 3, 16]
    everywhere = method.with_options(FARSSOptions(rank=16, r_avg=7, r_max=12, shallow_layers=3))
    assert list(everywhere.ranks(layers, findings).values()) == [16, 4, 7, 4, 2]
    nowhere = method.with_options(FARSSOptions(rank=16, shallow_layers=0))
    assert set(nowhere.ranks(layers, findings).values()) == {16}
    with pytest.raises(UserError, match=r"^method\.shallow_layers: 4 given; .* in 3 decoder blocks, so at most 3$"):
        method.with_options(FARSSOptions(shallow_layers=4)).ranks(layers, findings)


@pytest.mark.parametrize(
    ("blocks", "boundaries"),
    [
        (0, [0]),
        (1, [1]),
        (2, [1]),
        (7, [1]),
        (8, [1, 2]),
        (12, [2, 3]),
        (32, [4, 5, 6, 7, 8]),
        (40, [5, 6, 7, 8, 9, 10]),
    ],
)
def test_candidates(blocks: int, boundaries: list[int]) -> None:
    """An eighth to a quarter of the blocks."""
    layers = [Layer("model.head.proj", 8, 8)] + [Layer(f"model.layers.{i}.q_proj", 8, 8) for i in range(blocks)]
    options = FARSSOptions(rank=8, probe_steps=3, probe_rows=5)
    method = FARSS(options)
    assert method.probe().option == "shallow_layers"
    assert (method.probe().steps, method.probe().rows) == (3, 5)
    candidates = method.candidates(layers)
    assert [candidate.shallow_layers for candidate in candidates] == boundaries
    assert all(c.model_dump() == options.model_dump() | {"shallow_layers": c.shallow_layers} for c in candidates)
    fixed = FARSS(FARSSOptions(shallow_layers=2))
    assert fixed.probe() is None and fixed.candidates(layers) == []


@pytest.mark.parametrize(
    ("rank", "ranks"), [(128, (1, 50, 64)), (32, (1, 12, 16)), (16, (1, 6, 8)), (2, (1, 1, 1)), (1, (1, 1, 1))]
)
def test_default_ranks_keep_the_papers_proportions(rank: int, ranks: tuple[int, int, int]) -> None:
    options = FARSSOptions(rank=rank)
    assert options.shallow_ranks == ranks
    FARSSOptions(rank=rank, r_min=ranks[0], r_avg=ranks[1], r_max=ranks[2])  # and they pass when written out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_min": 9, "r_max": 8}, r"method\.r_max: 8 given; allowed: r_min \(9\) or more"),
        ({"r_avg": 70}, r"method\.r_avg: 70 given; allowed: from r_min \(1\) to r_max \(12\)"),
        ({"r_min": 3, "r_avg": 2}, r"method\.r_avg: 2 given; allowed: from r_min \(3\) to r_max \(12\)"),
        ({"r_max": None, "r_avg": 9}, r"method\.r_avg: 9 given; allowed: from r_min \(1\) to r_max \(8\)"),
        ({"r_min": 0}, r"method\.r_min: 0 given; allowed: greater than 0"),
        ({"shallow_layers": -1}, r"method\.shallow_layers: -1 given; allowed: greater than or equal to 0 or 'auto'"),
        ({"shallow_layers": "all"}, r"method\.shallow_layers: 'all' given; allowed: an integer or 'auto'"),
        ({"variant": "all_high"}, r"method\.variant: 'all_high' given; .*'all-high'"),
        ({"fisher": "true"}, r"method\.fisher: 'true' given; "),
    ],
    ids=str,
)
def test_wrong_options(content: dict[str, Any], options: dict[str, Any], message: str) -> None:
    method = OPTIONS | options
    with pytest.raises(UserError, match=rf"^{message}") as caught:
        resolve({**copy.deepcopy(content), "name": "run", "method": method})
    assert "\n" not in str(caught.value)
