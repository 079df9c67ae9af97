"""CorDA++ in the method: covariance selection, dynamic ranks, the reference's damping, and a whole run to step 0."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import resolve
from harness.decomposition.context_svd import damped, reference_damping
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import AdapterInit
from harness.methods.corda import CorDA, CorDAOptions
from harness.models.targets import Layer, target_modules
from harness.statistics.store import StatisticsReader
from tests.decomposition.reference import (
    outlier_problem,
    paper_block,
    paper_filtering,
    paper_log_pi,
    paper_selection_score,
)
from tests.methods.held import Held
from tests.methods.runs import base_model, largest, live_model, logits, step_zero

SHAPES = [(256, 256), (704, 256), (256, 704)]
MODES = ["kpm", "ipm"]
problem = cache(outlier_problem)


def build(**options: Any) -> CorDA:
    return CorDA(CorDAOptions(**options))


def same(left: AdapterInit, right: AdapterInit) -> bool:
    return torch.equal(left.A, right.A) and torch.equal(left.B, right.B)


def covariance_that_doubles(size: int = 96) -> torch.Tensor:
    """An eigenvalue of C cancels a damping of 0.01, so the reference's rule goes on to 0.02."""
    eigenvalues = torch.ones(size, dtype=torch.float64)
    eigenvalues[0] = -0.01 * (size - 1) / (size + 0.01)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return (Q * eigenvalues @ Q.T).float()


def test_what_is_collected() -> None:
    assert build(mode="kpm").statistics().rounds == 1
    assert build(mode="kpm", rounds=5).statistics().rounds == 5
    assert build(mode="kpm", rounds=5).statistics().kinds == ("input_covariance",)


def test_plain_corda_examines_nothing() -> None:
    W, C = problem(256, 256, 60)
    method, layer = build(mode="kpm", rank=16), Layer("layer", 256, 256)
    assert method.examine(layer, W, Held(C)) == {}
    assert method.ranks([layer], {"layer": {}}) == {"layer": 16}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seeds", [(0, 1, 2), (1, 0, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selection_is_the_arg_min_of_eq_7(shape: tuple[int, int], seeds: tuple[int, ...], mode: str) -> None:
    """Three rounds whose inputs have outliers in different channels; those of seed 0 are the weight's own."""
    W = problem(*shape, 4000)[0]
    covariances = [problem(*shape, 300, seed)[1] for seed in seeds]
    method, layer = build(mode=mode, rank=16, rounds=3), Layer("layer", *shape)
    finding = method.examine(layer, W, Held(*covariances))
    direct = [paper_selection_score(W, C, 0.01) for C in covariances]
    assert finding["selection_scores"] == pytest.approx(direct, rel=1e-6)
    chosen = direct.index(min(direct))
    assert finding["round"] == chosen == seeds.index(0)
    assert finding["selection_score"] == finding["selection_scores"][chosen]
    assert finding["log_pi"] == pytest.approx(paper_log_pi(damped(covariances[chosen], 0.01), shape[0]), rel=1e-9)
    assert json.loads(json.dumps(finding)) == finding
    initial = method.initialise(layer, W, 16, Held(*covariances), finding)
    plain = build(mode=mode, rank=16).initialise(layer, W, 16, Held(covariances[chosen]), {})
    assert same(initial, plain)
    assert not same(initial, method.initialise(layer, W, 16, Held(*covariances), {"round": (chosen + 1) % 3}))


def test_first_of_equal_rounds() -> None:
    W, C = problem(256, 256, 60)
    finding = build(mode="kpm", rounds=3).examine(Layer("layer", 256, 256), W, Held(C, C.clone(), C.clone()))
    assert finding["round"] == 0
    assert len(set(finding["selection_scores"])) == 1


@pytest.mark.parametrize("dynamic_rank", [False, True])
def test_layer_whose_input_is_zero(dynamic_rank: bool) -> None:
    C = torch.zeros(4, 4)
    with pytest.raises(UserError, match=r"the input of layer deep is zero on every token"):
        build(mode="kpm", rounds=2, dynamic_rank=dynamic_rank).examine(Layer("deep", 4, 4), torch.eye(4), Held(C, C))


def test_weight_of_zero() -> None:
    C = problem(256, 256, 60)[1]
    layers = [Layer("empty", 256, 256), Layer("full", 256, 256)]
    method = build(mode="ipm", rank=4, rounds=2, dynamic_rank=True)
    weights = [torch.zeros(256, 256), problem(256, 256, 60)[0]]
    findings = {layer.name: method.examine(layer, W, Held(C, C)) for layer, W in zip(layers, weights, strict=True)}
    assert findings["empty"]["selection_scores"] == [0.0, 0.0]
    assert method.ranks(layers, findings) == {"empty": 0, "full": 8}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [4000, 60], ids=["full covariance", "rank-deficient covariance"])
def test_dynamic_ranks_are_the_papers_and_so_are_the_blocks(tokens: int, mode: str) -> None:
    layers = [Layer(f"layer {number}", *shape) for number, shape in enumerate(SHAPES)]
    problems = [problem(*shape, tokens, factor=factor) for shape, factor in zip(SHAPES, (60, 60, 600), strict=True)]
    method = build(mode=mode, rank=24, alpha=12.0, dynamic_rank=True)
    findings = {layer.name: method.examine(layer, W, Held(C)) for layer, (W, C) in zip(layers, problems, strict=True)}
    assert all(finding["round"] == 0 for finding in findings.values())
    ranks = method.ranks(layers, findings)

    sigmas = [torch.linalg.svd(W.double() @ damped(C, 0.01))[1].tolist() for W, C in problems]
    log_pis = [paper_log_pi(damped(C, 0.01), len(W)) for W, C in problems]
    costs = [sum(shape) for shape in SHAPES]
    _, filtered = paper_filtering(sigmas, log_pis, costs, 24 * sum(costs), mode)
    components = [min(shape) for shape in SHAPES]
    expected = filtered if mode == "kpm" else [R - r for R, r in zip(components, filtered, strict=True)]
    assert list(ranks.values()) == expected
    assert len(set(expected)) > 1
    assert sum(rank * cost for rank, cost in zip(expected, costs, strict=True)) <= 24 * sum(costs)

    assert method.scaling() == 0.5
    for layer, (W, C) in zip(layers, problems, strict=True):
        if rank := ranks[layer.name]:
            initial = method.initialise(layer, W, rank, Held(C), findings[layer.name])
            assert initial.A.shape == (rank, layer.in_features)
            block = paper_block(W, C, 0.01, rank, mode)
            product = 0.5 * (initial.B.double() @ initial.A.double())
            assert float((product - block).norm() / block.norm()) <= 1e-5


def test_rank_beyond_every_layer() -> None:
    layers = [Layer("wide", 8, 64), Layer("narrow", 64, 4)]
    method = build(mode="kpm", rank=9, dynamic_rank=True)
    with pytest.raises(UserError, match=r"^method\.rank: 9 given; no layer has more than 8 components$"):
        method.ranks(layers, {})


def test_rank_beyond_a_narrow_layer_is_shared_out() -> None:
    """Uniformly a rank of 8 does not fit a layer of 4 components; as a number of parameters it does."""
    generator = torch.Generator().manual_seed(0)
    layers = [Layer("wide", 8, 64), Layer("narrow", 64, 4)]
    method = build(mode="kpm", rank=8, dynamic_rank=True)
    findings = {}
    for layer in layers:
        W = torch.randn(layer.out_features, layer.in_features, generator=generator)
        findings[layer.name] = method.examine(layer, W, Held(torch.eye(layer.in_features)))
    assert method.ranks(layers, findings) == {"wide": 8, "narrow": 4}


@pytest.mark.parametrize("mode", MODES)
def test_reference_damping_is_used_and_reported(mode: str) -> None:
    C = covariance_that_doubles()
    assert reference_damping(C) == 0.02
    W = problem(96, 96, 60)[0]
    layer = Layer("layer", 96, 96)
    reference, plain = build(mode=mode, rank=8, damping="reference"), build(mode=mode, rank=8, damping=0.02)
    initial = reference.initialise(layer, W, 8, Held(C), {})
    assert initial.report["damping"] == 0.02
    assert same(initial, plain.initialise(layer, W, 8, Held(C), {}))
    finding = build(mode=mode, rank=8, damping="reference", rounds=2).examine(layer, W, Held(torch.eye(96), C))
    assert finding["damping"] == (0.01, 0.02)[finding["round"]]
    assert finding["selection_scores"] == pytest.approx(
        [paper_selection_score(W, torch.eye(96), 0.01), paper_selection_score(W, C, 0.02)], rel=1e-6
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("damping", 0.0), ("damping", "off"), ("rounds", 0), ("rounds", 2.5), ("dynamic_rank", 1)],
    ids=str,
)
def test_options_are_checked(key: str, value: object, base_config: dict[str, Any]) -> None:
    content = copy.deepcopy(base_config)
    content["method"][key] = value
    with pytest.raises(UserError, match=rf"^method\.{key}: {value!r} given; allowed: ") as raised:
        resolve(content)
    assert ("'reference'" in str(raised.value)) == (key == "damping")


@pytest.mark.parametrize(("mode", "rank"), [("kpm", 8), ("ipm", 1)])
def test_a_run_to_step_zero(
    mode: str, rank: int, random_base: Path, data_files: dict[str, Path], base_config: dict[str, Any]
) -> None:
    """Findings, ranks and report of a real run, recomputed from its statistics by the paper's formulas."""
    content = copy.deepcopy(base_config)
    content["data"]["train"]["samples"] = content["data"]["preserve"]["samples"] = 12
    options = {"name": "corda", "mode": mode, "rank": rank, "rounds": 3, "dynamic_rank": True}
    config, run = step_zero(content, options, "run")
    written = read_json(run.init / "report.json")
    report = written["layers"]
    statistics = StatisticsReader(run.statistics)
    modules = target_modules(base_model(config), "all-linear")

    sigmas, log_pis, costs = [], [], []
    for name, module in modules.items():
        W, entry = module.weight.detach(), report[name]
        covariances = [statistics.input_covariance(name, number).matrix for number in range(3)]
        direct = [paper_selection_score(W, C, 0.01) for C in covariances]
        assert entry["selection_scores"] == pytest.approx(direct, rel=1e-6)
        assert entry["round"] == direct.index(min(direct))
        assert entry["damping"] == 0.01
        assert not any(key.startswith("_") for key in entry)
        C_damped = damped(covariances[entry["round"]], 0.01)
        log_pis.append(paper_log_pi(C_damped, len(W)))
        sigmas.append(torch.linalg.svd(W.double() @ C_damped)[1].tolist())
        costs.append(sum(W.shape))
    assert len({entry["round"] for entry in report.values()}) > 1

    budget = rank * sum(costs)
    _, filtered = paper_filtering(sigmas, log_pis, costs, budget, mode)
    expected = filtered if mode == "kpm" else [len(sigma) - r for sigma, r in zip(sigmas, filtered, strict=True)]
    assert [report[name]["rank"] for name in modules] == expected
    spent = sum(rank * cost for rank, cost in zip(expected, costs, strict=True))
    assert spent <= budget
    assert written["summary"] == {"parameter_budget": budget, "adapter_parameters": spent}
    assert (0 in expected) == (mode == "ipm")
    assert (run.init / "ranks.png").is_file()

    base = logits(base_model(config))
    assert largest(logits(live_model(config, run)), base) <= 1e-4 * float(base.abs().max())
