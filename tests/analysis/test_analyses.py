"""Spectra, covariance maps and truncation of the random base against direct float64 computations."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from harness.analysis import truncation as truncation_module
from harness.analysis.covariance_maps import covariance, downsample, log_correlation
from harness.analysis.inputs import DataSet, configured, given
from harness.analysis.spectrum import spectrum
from harness.analysis.truncation import held_out, truncation
from harness.config import ModelConfig, RunConfig, SourceConfig, resolve
from harness.data.sources import Example
from harness.data.tokenisation import Row, tokenise
from harness.errors import UserError
from harness.models.loading import load_model, load_tokenizer
from harness.models.targets import target_modules
from harness.tasks.registry import load_task
from harness.training.preserve import token_means
from tests.analysis.direct import (
    direct_asvd_factor,
    direct_context_factor,
    direct_inputs,
    direct_perplexity,
    truncated,
)
from tests.decomposition.reference import paper_filtering, paper_log_pi, paper_selection_score

ALPHA, DAMPING = 0.7, 0.02
DISCARDS = [4, 16, 40]
ROUNDS, SAMPLES = 3, 12


@pytest.fixture(scope="module")
def config(random_base: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return resolve(
        {
            "name": "run",
            "model": {"path": str(random_base), "dtype": "float32"},
            "data": {
                "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a", "samples": 20},
                "preserve": {"path": str(data_files["preserve"]), "prompt": "q", "samples": 1000},
                "max_length": 64,
            },
            "method": {"name": "lora", "rank": 8},
            "output_dir": str(tmp_path_factory.mktemp("runs")),
        }
    )


@pytest.fixture
def model(config: RunConfig) -> PreTrainedModel:
    return load_model(ModelConfig(path=config.model.path, dtype="float32"))


def token_ids(config: RunConfig, examples: list[Example]) -> list[list[int]]:
    rows = tokenise(examples, load_tokenizer(config.model.path), config.data.max_length)
    return [row.input_ids for row in rows]


def read(files: list[Path], suffix: str) -> Any:
    (file,) = [file for file in files if file.suffix == suffix]
    return json.loads(file.read_text()) if suffix == ".json" else file.read_bytes()


def test_spectrum(config: RunConfig, model: PreTrainedModel, tmp_path: Path) -> None:
    files = spectrum(config, tmp_path, layers=["layers.1.mlp", "o_proj"], alpha=ALPHA, damping=DAMPING)
    found = read(files, ".json")
    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    names += [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert list(found["layers"]) == names
    inputs = direct_inputs(model, names, token_ids(config, configured(config, "preserve").examples))
    assert found["data"]["tokens"] == len(inputs[names[0]])
    for name, X in inputs.items():
        W = model.get_submodule(name).weight.detach().double()
        factors = {
            "plain SVD": torch.eye(len(X[0])).double(),
            "ASVD": direct_asvd_factor(X.abs().mean(0), ALPHA),
            "CO-SVD": direct_context_factor(X.T @ X / len(X), DAMPING),
        }
        for method, factor in factors.items():
            expected = torch.linalg.svdvals(W @ factor)
            values = torch.tensor(found["layers"][name][method]["singular_values"]).double()
            assert values.shape == expected.shape
            # The covariance itself is collected in fp32.
            assert float(((values - expected).abs() / (expected + 1e-4 * expected[0])).max()) <= 1e-4
            total = found["layers"][name][method]["sum_over_largest"]
            assert total == pytest.approx(float((expected / expected[0]).sum()), rel=1e-4)
    assert read(files, ".png").startswith(b"\x89PNG")


def test_covariance(config: RunConfig, model: PreTrainedModel, data_files: dict[str, Path], tmp_path: Path) -> None:
    files = covariance(config, tmp_path, data=[f"{data_files['preserve']}:q"])
    found = read(files, ".json")
    block = "model.layers.0"
    readers = {
        f"{block}.self_attn.q_proj": [f"{block}.self_attn.{part}_proj" for part in "qkv"],
        f"{block}.self_attn.o_proj": [f"{block}.self_attn.o_proj"],
        f"{block}.mlp.gate_proj": [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"],
        f"{block}.mlp.down_proj": [f"{block}.mlp.down_proj"],
    }
    assert {name: layer["read_by"] for name, layer in found["layers"].items()} == readers
    assert [entry["label"] for entry in found["data"]] == ["train\ntrain", "preserve\npreserve", "preserve"]
    inputs = direct_inputs(model, list(readers), token_ids(config, configured(config, "preserve").examples))
    for name, X in inputs.items():
        d = X.shape[1]
        cell = d // 32
        C = (X.T @ X / len(X)).abs()
        expected = torch.tensor(
            [
                [float(C[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean()) for j in range(32)]
                for i in range(32)
            ]
        )
        first, second, third = (torch.tensor(cells) for cells in found["layers"][name]["maps"])
        assert torch.allclose(second, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
        correlation = found["layers"][name]["correlation"]
        assert correlation[0][0] == pytest.approx(1)
        assert (
            correlation[1][0]
            == correlation[0][1]
            == pytest.approx(
                float(torch.corrcoef(torch.stack([first.log().flatten(), second.log().flatten()]))[0, 1]), abs=1e-3
            )
        )
        assert abs(correlation[0][1]) < 0.9999
        # The file given is cut to 256 samples at most, and has 50 rows: the same rows, so the same map.
        assert torch.equal(second, third) and correlation[1][2] == pytest.approx(1)
    assert read(files, ".png").startswith(b"\x89PNG")


def test_downsample() -> None:
    C = torch.tensor([[1.0, -3.0, 0.0, 0.0], [-3.0, 5.0, 0.0, -8.0], [0.0, 0.0, 2.0, 2.0], [0.0, -8.0, 2.0, 6.0]])
    assert downsample(C, 2, "mean").tolist() == [[3.0, 2.0], [2.0, 3.0]]
    assert downsample(C, 2, "max").tolist() == [[5.0, 8.0], [8.0, 6.0]]
    assert torch.equal(downsample(C, 32, "mean"), C.double().abs())  # smaller than the map: as it is
    assert downsample(torch.rand(70, 70), 32, "mean").shape == (32, 32)  # 32 does not divide it


def test_correlation_of_maps_without_contrast() -> None:
    zeros, ones, some = torch.zeros(4, 4), torch.ones(4, 4), torch.rand(4, 4)
    assert log_correlation([zeros, zeros]).isfinite().all()
    assert log_correlation([ones, some])[0, 1] == 0


@pytest.fixture(scope="module")
def truncations(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Any]:
    """One study, and the base that it ran on."""
    bases = []
    load = truncation_module.load_base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation_module, "load_base", lambda *args: bases.append(load(*args)) or bases[-1])
        files = truncation(
            config,
            tmp_path_factory.mktemp("truncation"),
            discards=DISCARDS,
            samples=SAMPLES,
            test_rows=20,
            rounds=ROUNDS,
            alpha=ALPHA,
            damping=DAMPING,
        )
    return files, bases[0]


def calibration_texts(config: RunConfig, number: int) -> list[list[int]]:
    """Token ids of one sampling round."""
    texts = configured(config, "preserve", SAMPLES)
    pool, _ = held_out(texts, texts, 20, config.train.seed)
    rows = texts.rows(load_task(config), number, pool)
    return [row.input_ids for row in rows]


def held_out_texts(config: RunConfig) -> list[list[int]]:
    texts = configured(config, "preserve", SAMPLES)
    return token_ids(config, held_out(texts, texts, 20, config.train.seed)[1])


def perplexity_with(model: PreTrainedModel, weights: dict[str, torch.Tensor], texts: list[list[int]]) -> float:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            changed.get_submodule(name).weight.copy_(weight)
    return direct_perplexity(changed, texts)


def test_nothing_discarded_is_the_base(config: RunConfig, model: PreTrainedModel, truncations: Any) -> None:
    files, base = truncations
    found = read(files, ".json")
    texts = held_out_texts(config)
    rows = sorted((Row(ids, ids) for ids in texts), key=lambda row: len(row.input_ids))
    assert found["base"]["loss"] == token_means(model, rows, 2, 8).loss  # exactly
    assert found["base"]["perplexity"] == pytest.approx(direct_perplexity(model, texts), rel=1e-5)
    assert found["test"]["predicted_tokens"] == sum(len(ids) - 1 for ids in texts)
    # The study leaves the model as it found it, bit by bit.
    for name, module in target_modules(model, "all-linear").items():
        assert torch.equal(base.modules[name].weight, module.weight)
    table = files[2].read_text().splitlines()
    assert table[0] == "| components discarded per layer | 0 | 4 | 16 | 40 |"
    assert [line.split(" | ")[1] for line in table[3:]] == [f"{found['base']['perplexity']:.4g}"] * 5


def test_truncation(config: RunConfig, model: PreTrainedModel, truncations: Any) -> None:
    found = read(truncations[0], ".json")
    modules = target_modules(model, "all-linear")
    names = list(modules)
    calibration, texts = calibration_texts(config, 0), held_out_texts(config)
    X = direct_inputs(model, names, calibration)
    assert found["calibration_tokens"][0] == len(X[names[0]])
    identity = {name: torch.eye(module.in_features).double() for name, module in modules.items()}
    context = {name: direct_context_factor(x.T @ x / len(x), DAMPING) for name, x in X.items()}
    factors = {
        "plain SVD": identity,
        "ASVD": {name: direct_asvd_factor(x.abs().mean(0), ALPHA) for name, x in X.items()},
        "CO-SVD": context,
        "CO-SVD+": context,
    }
    base = found["base"]["perplexity"]
    seen = set()
    for method, factor in factors.items():
        for r, point in zip(DISCARDS, found["methods"][method]["points"], strict=True):
            counts = point.get("components", dict.fromkeys(names, r))
            weights = {n: truncated(m.weight.detach(), factor[n], counts[n]) for n, m in modules.items()}
            expected = perplexity_with(model, weights, texts)
            assert point["perplexity"] == pytest.approx(expected, abs=1e-3), (method, r)
            assert abs(expected - base) > 5e-3  # else the bound above could not tell
            seen.add(round(expected, 2))
    assert len(seen) > len(DISCARDS) * 2  # methods differ


def test_allocation(config: RunConfig, model: PreTrainedModel, truncations: Any) -> None:
    """CO-SVD+ discards what the loop of Algorithm 2 filters, within the parameters that CO-SVD discards."""
    found = read(truncations[0], ".json")
    modules = target_modules(model, "all-linear")
    costs = {name: module.in_features + module.out_features for name, module in modules.items()}
    X = direct_inputs(model, list(modules), calibration_texts(config, 0))
    factors = {name: direct_context_factor(x.T @ x / len(x), DAMPING) for name, x in X.items()}
    sigmas = [torch.linalg.svdvals(m.weight.detach().double() @ factors[n]).tolist() for n, m in modules.items()]
    log_pis = [paper_log_pi(factors[n], m.out_features) for n, m in modules.items()]
    for method in ("CO-SVD+", "CO-SVD++"):
        for r, point in zip(DISCARDS, found["methods"][method]["points"], strict=True):
            budget = r * sum(costs.values())
            counts = point["components"]
            assert point["discarded_parameters"] == sum(counts[name] * costs[name] for name in modules)
            assert budget - max(costs.values()) < point["discarded_parameters"] <= budget
            if method == "CO-SVD+":
                _, expected = paper_filtering(sigmas, log_pis, list(costs.values()), budget, "kpm")
                # Covariances are collected in fp32: where two scores are nearly equal, a component may change layers.
                assert max(abs(counts[n] - e) for n, e in zip(modules, expected, strict=True)) <= 1
                assert len(set(expected)) > 1
    for r, point in zip(DISCARDS, found["methods"]["CO-SVD"]["points"], strict=True):
        assert point["discarded_parameters"] == r * sum(costs.values())


def test_selection(config: RunConfig, model: PreTrainedModel, truncations: Any) -> None:
    """CO-SVD++ takes each layer's covariance from the round with the lowest score (Eq. 7, 8)."""
    chosen = read(truncations[0], ".json")["methods"]["CO-SVD++"]["selected_round"]
    modules = target_modules(model, "all-linear")
    scores: dict[str, list[float]] = {name: [] for name in modules}
    for number in range(ROUNDS):
        for name, x in direct_inputs(model, list(modules), calibration_texts(config, number)).items():
            weight = modules[name].weight.detach()
            scores[name].append(paper_selection_score(weight, x.T @ x / len(x), DAMPING))
    for name, values in scores.items():
        assert values[chosen[name]] <= min(values) * (1 + 1e-5)
    assert len(set(chosen.values())) > 1


def examples(*texts: str) -> list[Example]:
    return [Example(text, None) for text in texts]


def data_set(*texts: str) -> DataSet:
    return DataSet("x", "--data", SourceConfig(path="x.jsonl", prompt="q"), examples(*texts))


@pytest.mark.parametrize("test_rows", [1, 3, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_rows_are_not_calibrated_on(test_rows: int, seed: int) -> None:
    letters = data_set(*"abcdefgh", *"abcd", "a")  # with duplicates
    pool, test = held_out(letters, letters, test_rows, seed)
    assert len(test) == min(test_rows, 4) and len(set(test)) == len(test)
    assert not set(pool) & set(test)
    assert set(pool) | set(test) == set(letters.examples) and len(pool) + len(test) == 8
    other = data_set(*"efghijk")
    pool, test = held_out(other, letters, test_rows, seed)
    assert pool == other.examples and set(test) <= set(examples(*"abcd")) and len(test) == min(test_rows, 4)


def test_too_few_rows_to_hold_out() -> None:
    same = data_set("a", "a")
    with pytest.raises(UserError, match=r"^--data: 1 distinct row in x\.jsonl"):
        held_out(same, same, 10, 0)
    with pytest.raises(UserError, match=r"^--calibrate-on: every row of x\.jsonl"):
        held_out(data_set("a", "b"), same, 10, 0)


def test_blank_rows_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "one", "  ", "two")))
    assert [example.prompt for example in given(f"{file}:text").examples] == ["one", "two"]
    file.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"^--data: every row of .* is blank"):
        given(f"{file}:text")
