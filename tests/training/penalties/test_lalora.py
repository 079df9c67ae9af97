"""LALoRA's forms against dense matrices, its preparation over several methods, and how passes and ranks share it."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.config import resolve
from harness.data.collation import collate
from harness.data.sampling import sample
from harness.data.sources import read_examples
from harness.data.tokenisation import tokenise
from harness.errors import UserError
from harness.methods.registry import build_method
from harness.models.loading import load_tokenizer
from harness.preflight import check_inputs
from harness.statistics.adapter_curvature import trained_weights
from harness.tasks.registry import load_task
from harness.training.penalties.base import MicroStep, Needs, PenaltySetup, Preparation
from harness.training.penalties.lalora import (
    LALoRA,
    LALoRAOptions,
    dealt,
    diagonal_forms,
    kronecker_forms,
)
from harness.training.penalties.registry import build_penalty, penalty_class
from tests.methods.runs import live_model, perturb, step_zero
from tests.statistics.direct_curvature import (
    adapted,
    dense_precision,
    direct_diagonal,
    direct_factors,
    groups_of,
    labelled_rows,
    vec,
)

Tensors = dict[str, torch.Tensor]
CURVATURES = ("diag", "kfac", "kfac_tri")
EMPTY = collate([labelled_rows(1)[0]], 2)


def moved(model: nn.Module) -> tuple[Tensors, Tensors]:
    """μ of every trained weight, and how far the weights then were moved from it."""
    weights = trained_weights(model)
    means = {name: weight.detach().clone() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return means, {name: weight.detach() - means[name] for name, weight in weights.items()}


@pytest.fixture(scope="module")
def world(random_base: Path) -> dict[str, Any]:
    """Two sources' statistics by the direct computation, as `prepare` would keep them, and a model that has moved."""
    model = adapted(random_base)
    sources = [labelled_rows(5), labelled_rows(4, seed=3)]
    diagonals = [direct_diagonal(model, rows) for rows in sources]
    factors = [direct_factors(model, rows) for rows in sources]
    groups = groups_of(model)
    means, deltas = moved(model)
    order = sorted(groups)
    prepared = {f"mean/{name}": mean for name, mean in means.items()}
    diagonal = prepared | {f"D/{name}": diagonals[0][name] + diagonals[1][name] for name in means}
    kronecker = prepared | {"groups": torch.tensor([order.index(groups[name]) for name in order])}
    for number, found in enumerate(factors):
        for factor, named in found.items():
            for layer, matrix in named.items():
                if factor != "A00" or groups[layer] == layer:
                    kronecker[f"{number}/{factor}/{layer}"] = matrix
    return {"model": model, "deltas": deltas, "factors": factors, "diag": diagonal, "kfac_tri": kronecker} | {
        "kfac": {k: v for k, v in kronecker.items() if k.split("/")[1:2] not in (["A01"], ["G12"])}
    }


def dense_value_and_gradient(world: dict[str, Any], curvature: str) -> tuple[float, Tensors]:
    """Σ ΔᵀPΔ and 2PΔ with P as a whole matrix for every layer."""
    deltas, gradients, value = world["deltas"], {}, 0.0
    if curvature == "diag":
        for name, delta in deltas.items():
            precision = torch.diag(vec(world["diag"][f"D/{name}"]))
            gradients[name] = 2 * (precision @ vec(delta)).view(delta.shape[1], delta.shape[0]).T
            value += float(vec(delta) @ precision @ vec(delta))
        return value, gradients
    for layer in sorted({name.rpartition(".lora_")[0] for name in deltas}):
        names = [f"{layer}.lora_{side}.weight" for side in "AB"]
        A, B = (deltas[name] for name in names)
        both = torch.cat([vec(A), vec(B)])
        precision = sum(dense_precision(found, layer, curvature) for found in world["factors"])
        value += float(both @ precision @ both)
        left, right = (2 * precision @ both).split([A.numel(), B.numel()])
        gradients[names[0]] = left.view(A.shape[1], A.shape[0]).T
        gradients[names[1]] = right.view(B.shape[1], B.shape[0]).T
    return value, gradients


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_equals_the_dense_form(world: dict[str, Any], curvature: str, ranks: int) -> None:
    """Value and gradient, put together from the shares of ranks."""
    weights = trained_weights(world["model"])
    expected, gradients = dense_value_and_gradient(world, curvature)
    make = diagonal_forms if curvature == "diag" else kronecker_forms
    total = torch.zeros((), dtype=torch.float64)
    for number in range(ranks):
        forms = make(world[curvature], weights, number, ranks)
        assert forms
        total = total + sum(form.evaluate().differentiable() for form in forms)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-6)
    found = torch.autograd.grad(3 * total, list(weights.values()))
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        assert gradient.shape == weight.shape
        assert (gradient - 3 * gradients[name]).norm() <= 1e-6 * gradients[name].norm()


def test_the_three_curvatures_differ(world: dict[str, Any]) -> None:
    values = [dense_value_and_gradient(world, curvature)[0] for curvature in CURVATURES]
    assert min(abs(a / b - 1) for a, b in itertools.pairwise(values)) > 1e-3


def test_fp32_and_bf16(world: dict[str, Any]) -> None:
    """fp32 forms agree with float64; in bf16 the weights at step 0 are exactly μ as bf16 has it."""
    for curvature in CURVATURES:
        make = diagonal_forms if curvature == "diag" else kronecker_forms
        weights = {n: nn.Parameter(w.detach().float()) for n, w in trained_weights(world["model"]).items()}
        value = sum(form.evaluate().value for form in make(world[curvature], weights, 0, 1))
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(dense_value_and_gradient(world, curvature)[0], rel=1e-4)
        start = {n: nn.Parameter(world[curvature][f"mean/{n}"].bfloat16()) for n in weights}
        assert sum(float(form.evaluate().value) for form in make(world[curvature], start, 0, 1)) == 0.0


def test_layers_are_dealt_evenly() -> None:
    costs = {f"layer-{number:02}": cost for number, cost in enumerate([9, 1, 1, 1, 4, 4, 2, 2, 9, 3])}
    shares = [dealt(sorted(costs), costs.__getitem__, number, 3) for number in range(3)]
    assert sorted(itertools.chain(*shares)) == sorted(costs)
    assert max(sum(costs[item] for item in own) for own in shares) == 12


# -- preparation over methods ------------------------------------------------------------------------------------


def entry(**options: Any) -> dict[str, Any]:
    return {"name": "lalora", **options}


def prepared(content: dict[str, Any], method: dict[str, Any], **options: Any) -> tuple[nn.Module, LALoRA, Any]:
    """The step-0 model of ``method`` and LALoRA over it, prepared."""
    config, run = step_zero({**content, "penalties": [entry(**options)]}, method, f"{method['name']}")
    model = live_model(config, run, needs_original=False)
    task = load_task(config)
    setup = PenaltySetup([], task.pad_id, config.train.seed)
    penalty = build_penalty(config.penalties[0], setup)
    tensors = penalty.prepare(Preparation(model, build_method(config.method, config.train.seed), task))
    assert all(value.dtype == torch.float32 for key, value in tensors.items() if key != "groups")
    again = build_penalty(config.penalties[0], PenaltySetup([], task.pad_id, config.train.seed, prepared=tensors))
    return model, again, config


def value_of(penalty: LALoRA, model: nn.Module, parts: int = 1) -> torch.Tensor:
    """The term of one step: the sum over its passes."""
    total = torch.zeros(())
    for part in range(parts):
        at = MicroStep(0, part, parts)
        share = penalty.penalty(model, at, None, None, penalty.before(model, at, None, EMPTY))
        total = total if share is None else total + share
    return total


METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "pissa": {"name": "pissa", "rank": 4},
    "corda": {"name": "corda", "mode": "kpm", "rank": 4, "dynamic_rank": True},
    "lora_fa": {"name": "lora_fa", "rank": 4},
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("method", METHODS)
def test_over_methods(base_config: dict[str, Any], method: str, curvature: str) -> None:
    """Zero at step 0, where the method starts; positive once it has moved; A is free where B starts at zero."""
    base_config["data"]["preserve"]["samples"] = 6
    model, penalty, _ = prepared(base_config, METHODS[method], curvature=curvature)
    held = {key for key in penalty.setup.prepared if key.startswith("mean/")}
    sides = {key.rsplit(".lora_", 1)[1] for key in held}
    assert sides == ({"A.weight", "B.weight"} if method in ("pissa", "corda") else {"B.weight"})
    penalty.attach(model)
    assert float(value_of(penalty, model).detach()) == 0.0
    perturb(model, 0.01)
    value = value_of(penalty, model)
    assert float(value) > 0.0 if curvature != "kfac_tri" else float(value) != 0.0
    assert float(value_of(penalty, model, parts=4)) == pytest.approx(float(value))
    value.backward()
    for name, weight in trained_weights(model).items():
        assert (weight.grad is not None and bool(weight.grad.any())) == (f"mean/{name}" in held)


def test_equals_the_direct_diagonal_of_the_sampled_rows(base_config: dict[str, Any]) -> None:
    """Which rows, which labels, and that the precision is of the step-0 model: the whole of `prepare`."""
    base_config["data"]["preserve"]["samples"] = 5
    model, penalty, config = prepared(base_config, METHODS["pissa"])
    source = config.data.preserve
    chosen = sample(read_examples(source, "data.preserve"), 5, "lalora", config.train.seed, 0)
    rows = tokenise(chosen, load_tokenizer(config.model.path), config.data.max_length)
    expected = direct_diagonal(copy.deepcopy(model).double(), rows)
    for name, block in expected.items():
        found = penalty.setup.prepared[f"D/{name}"].double()
        assert (found - block).norm() <= 1e-4 * block.norm()
        assert torch.equal(penalty.setup.prepared[f"mean/{name}"], trained_weights(model)[name])


@pytest.mark.parametrize("curvature", ["diag", "kfac"])
def test_sources_are_summed(base_config: dict[str, Any], tmp_path: Path, curvature: str) -> None:
    """The term under two sources is the sum of the terms under each."""
    lines = [{"q": f"ab{n} cd", "r": " ef gh"} for n in range(7)]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = {**base_config["data"]["preserve"], "samples": 50}  # all rows, so that drawing plays no part
    second = {"path": str(other), "prompt": "q", "response": "r", "samples": 50}
    values = []
    for number, sources in enumerate(([first], [second], [first, second])):
        content = {**base_config, "output_dir": str(tmp_path / str(number))}
        content["data"] = {"train": base_config["data"]["train"], "max_length": 64}
        model, penalty, _ = prepared(content, METHODS["pissa"], curvature=curvature, sources=sources)
        penalty.attach(model)
        perturb(model)
        values.append(float(value_of(penalty, model)))
    assert values[2] == pytest.approx(values[0] + values[1], rel=1e-4)
    assert min(values[:2]) > 1e-3 * values[2]


def test_more_than_a_pair(base_config: dict[str, Any]) -> None:
    """DoRA trains magnitudes: the diagonal holds them as well, K-FAC has no block for them."""
    base_config["data"]["preserve"]["samples"] = 3
    model, penalty, _ = prepared(base_config, {"name": "dora", "rank": 2})
    penalty.attach(model)
    assert float(value_of(penalty, model).detach()) == 0.0
    perturb(model)
    assert float(value_of(penalty, model)) > 0.0
    with pytest.raises(UserError, match=r"lalora with curvature: kfac given; .* 'dora' trains .*; allowed: diag"):
        prepared(base_config, {"name": "dora", "rank": 2}, curvature="kfac")


# -- configuration -----------------------------------------------------------------------------------------------


def test_options_round_trip(base_config: dict[str, Any]) -> None:
    config = resolve({**base_config, "penalties": [entry(**{"lambda": 3})]})
    assert config.penalties[0] == {"name": "lalora", "lambda": 3.0, "curvature": "diag", "sources": []}
    assert "lambda: 3.0" in config.dump()
    assert build_penalty(config.penalties[0], PenaltySetup([], 2, 0)).weight == 3.0
    assert LALoRAOptions().model_dump()["lambda"] == 100.0
    source = base_config["data"]["preserve"]
    assert penalty_class("lalora").needs(LALoRAOptions()) == Needs(preserve=True, adapter=True, preparation=True)
    given = LALoRAOptions.model_validate({"sources": [source]})
    assert LALoRA.needs(given) == Needs(adapter=True, preparation=True)


BAD = [
    ({"lambda": -1.0}, r"^penalties\.0\.lambda: -1\.0 given; allowed: greater than or equal to 0$"),
    ({"lambda": float("inf")}, r"^penalties\.0\.lambda: inf given; allowed: a finite number$"),
    ({"lambda": "x"}, r"^penalties\.0\.lambda: 'x' given; allowed: a number$"),
    ({"lamda": 1.0}, r"^penalties\.0\.lamda: unknown key .*curvature, lambda, sources; did you mean 'lambda'\?$"),
    ({"curvature": "kfca"}, r"^penalties\.0\.curvature: 'kfca' given; .*did you mean 'kfac'\?$"),
    ({"sources": [{"path": "x", "prompt": "q", "samples": 0}]}, r"^penalties\.0\.sources\.0\.samples: 0 given"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_values(base_config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve({**base_config, "penalties": [entry(**options)]})


def test_a_source_without_a_prompt(base_config: dict[str, Any]) -> None:
    config = resolve({**base_config, "penalties": [entry(sources=[{"path": "x"}])]})
    with pytest.raises(UserError, match=r"^penalties\.0\.sources\.0\.prompt: missing; add it to the configuration"):
        check_inputs(config)
