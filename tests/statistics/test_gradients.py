"""Gradient statistics against a direct float64 computation: batch sizes, padding sides, ranks, drawn labels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from harness.config import ModelConfig
from harness.data.collation import Batch, collate
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.methods.farss import FARSS, FARSSOptions
from harness.models.loading import load_model
from harness.models.targets import describe, target_modules
from harness.statistics.gradients import collect_gradient_statistics
from harness.statistics.statistic import KINDS
from harness.statistics.store import StatisticsReader
from tests.statistics.direct import PAD
from tests.statistics.direct_gradients import (
    Matrices,
    collected,
    direct_statistics,
    groups_of,
    labelled_rows,
    responses,
    row_gradients,
)

BOUND = 1e-5
REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = labelled_rows(20)
TOKENS = sum(len(row.input_ids) for row in ROWS)
RESPONSES = sum(len(responses(row)) for row in ROWS)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model(random_base: Path) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(random_base), dtype="float32"))


@pytest.fixture(scope="module")
def direct(random_base: Path) -> Matrices:
    model = load_model(ModelConfig(path=str(random_base), dtype="float32")).double()
    return direct_statistics(model, target_modules(model, "all-linear"), ROWS)


@pytest.mark.parametrize(("batch_size", "side"), [(1, "right"), (3, "right"), (8, "right"), (8, "left")])
def test_equals_direct(model: PreTrainedModel, direct: Matrices, batch_size: int, side: str) -> None:
    assert any(not responses(row) for row in ROWS)  # a row that has tokens and no loss is among them
    found = collected(model, ROWS, batch_size, side)
    groups = groups_of(model, target_modules(model, "all-linear"))
    assert found.keys() == set(KINDS)
    for kind, counted in zip(KINDS, (TOKENS, TOKENS, RESPONSES), strict=True):
        for layer, expected in direct[kind].items():
            statistic = found[kind][groups[layer] if kind == "input_covariance" else layer]
            assert statistic.tokens == counted
            assert statistic.matrix.dtype == torch.float32
            assert relative(statistic.matrix, expected) <= BOUND, (kind, layer)


def test_prompt_tokens_count_but_carry_no_loss(model: PreTrainedModel, direct: Matrices) -> None:
    """What the numbers must not be: with a loss on the prompt, or without the prompt's own gradients."""
    kind = "output_gradient_covariance"
    everywhere = collected(model, [Row(row.input_ids, row.input_ids) for row in ROWS], 8, kinds=(kind,))[kind]
    modules = target_modules(model.double(), "all-linear")
    try:
        on_responses = {name: torch.zeros_like(matrix) for name, matrix in direct[kind].items()}
        for row in ROWS:
            _, gradients = row_gradients(model, modules, row, responses(row))
            for name in modules:
                has_loss = gradients[name][[place - 1 for place, _ in responses(row)]]
                on_responses[name] += has_loss.T @ has_loss / TOKENS
    finally:
        model.float()
    first = "model.layers.0.self_attn.v_proj"
    assert relative(everywhere[first].matrix, direct[kind][first]) > 0.1
    assert relative(on_responses[first], direct[kind][first]) > 0.01


@pytest.fixture(scope="module")
def gangs(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What real gloo gangs of 1, 2 and 3 processes collected, each rank's result in a folder of its own."""
    folder = tmp_path_factory.mktemp("gangs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.statistics.direct_gradients", str(random_base), str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks(model: PreTrainedModel, ranks: int, gangs: Path, direct: Matrices) -> None:
    """Batches are dealt out unevenly and the last of several ranks has none; every rank gets the whole result."""
    modules = target_modules(model, "all-linear")
    layers = describe(modules)
    drawn = collected(model, ROWS, 8, fisher="mc", seed=1)["output_gradient_covariance"]
    method = FARSS(FARSSOptions(rank=32, r_min=1, r_avg=6, r_max=16, shallow_layers=1))
    allocations = set()
    for number in range(ranks):
        reader = StatisticsReader(gangs / f"empirical-{ranks}-ranks" / f"rank-{number}")
        for kind in KINDS:
            for layer, expected in direct[kind].items():
                assert relative(reader.read(kind, layer).matrix, expected) <= BOUND
        findings = {layer.name: method.examine(layer, modules[layer.name].weight.detach(), reader) for layer in layers}
        allocations.add(tuple(method.ranks(layers, findings).items()))
        reader = StatisticsReader(gangs / f"mc-{ranks}-ranks" / f"rank-{number}")
        for layer, statistic in drawn.items():
            found = reader.output_gradient_covariance(layer)
            assert relative(found.matrix, statistic.matrix.double()) <= BOUND
    (allocation,) = allocations  # the same on every rank
    single = {
        layer.name: {"importance": float(_paper_importance(modules[layer.name].weight, direct, layer.name))}
        for layer in layers
    }
    assert dict(allocation) == method.ranks(layers, single)
    assert len({rank for _, rank in allocation}) > 3


def _paper_importance(W: torch.Tensor, direct: Matrices, layer: str) -> torch.Tensor:
    W = W.detach().double()
    return (
        torch.trace(direct["output_gradient_covariance"][layer] @ W @ direct["input_covariance"][layer] @ W.T)
        / W.numel()
    )


def tiny_model() -> LlamaForCausalLM:
    """One block, eight tokens: small enough to take the expectation over labels exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def exact_fisher(model: nn.Module, modules: dict[str, nn.Linear], rows: list[Row]) -> dict[str, torch.Tensor]:
    """Mean over tokens of E[δ δᵀ], every label drawn from the model's own prediction; float64.

    The draws at different positions are independent and their gradients have mean zero, so the expectation is a sum
    over positions s and tokens v of p_s(v) · δ_sv δ_svᵀ.
    """
    sums = {name: torch.zeros(m.out_features, m.out_features).double() for name, m in modules.items()}
    for row in rows:
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([row.input_ids])).logits[0].softmax(-1)
        for place, _ in responses(row):
            for token in range(probabilities.shape[-1]):
                _, gradients = row_gradients(model, modules, row, [(place, token)])
                for name in modules:
                    sums[name] += float(probabilities[place - 1, token]) * gradients[name].T @ gradients[name]
    tokens = sum(len(row.input_ids) for row in rows)
    return {name: matrix / tokens for name, matrix in sums.items()}


def test_drawn_labels_estimate_the_true_fisher() -> None:
    model = tiny_model()
    modules = target_modules(model, "all-linear")
    rows = [Row([1, 5, 2, 6, 3], [IGNORED, IGNORED, 2, 6, 3]), Row([4, 0, 7], [IGNORED, 0, 7])]
    exact = exact_fisher(model.double(), modules, rows)
    model.float()
    kind = "output_gradient_covariance"
    draws, sums = 400, {name: torch.zeros_like(matrix) for name, matrix in exact.items()}
    for seed in range(draws):
        for name, statistic in collected(model, rows, 2, kinds=(kind,), fisher="mc", seed=seed)[kind].items():
            sums[name] += statistic.matrix.double() / draws
    empirical = collected(model, rows, 2, kinds=(kind,))[kind]
    for name, expected in exact.items():
        assert relative(sums[name], expected) <= 0.12, name
        assert relative(empirical[name].matrix, expected) > 0.3, name  # the other reading is another number


def test_drawn_labels_depend_on_the_seed_alone(model: PreTrainedModel) -> None:
    kind = "output_gradient_covariance"
    one = collected(model, ROWS, 8, kinds=(kind,), fisher="mc", seed=3)[kind]
    torch.manual_seed(99)
    again = collected(model, ROWS, 8, kinds=(kind,), fisher="mc", seed=3)[kind]
    other = collected(model, ROWS, 8, kinds=(kind,), fisher="mc", seed=4)[kind]
    reordered = collected(model, ROWS[::-1], 1, "left", kinds=(kind,), fisher="mc", seed=3)[kind]
    for name, statistic in one.items():
        assert torch.equal(again[name].matrix, statistic.matrix)
        assert not torch.equal(other[name].matrix, statistic.matrix)
        assert relative(reordered[name].matrix, statistic.matrix.double()) <= BOUND


def test_the_model_is_left_as_it_was() -> None:
    """Whatever was trainable stays so, no gradient is left behind, and dropout is off meanwhile."""
    model = tiny_model().train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    frozen = next(model.parameters()).requires_grad_(False)
    rows = [Row([1, 5, 2, 6, 3], [1, 5, 2, 6, 3])]
    kind = "output_gradient_covariance"
    one, two = (collected(model, rows, 1, kinds=(kind,))[kind] for _ in range(2))
    assert all(torch.equal(one[name].matrix, two[name].matrix) for name in one)
    assert model.training
    assert {p.requires_grad for p in model.parameters() if p is not frozen} == {True}
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class Rough(nn.Module):
    """Two layers; between them √|x|, whose gradient is infinite at 0: where a token is 7."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 10)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        hidden = self.first(self.embed(input_ids))
        hidden = torch.where((input_ids == 7)[..., None], 0 * hidden, hidden).abs().sqrt()
        return type("Output", (), {"logits": self.second(hidden)})


@pytest.mark.parametrize("kinds", [("output_gradient_covariance",), ("weight_gradient",)], ids=lambda kinds: kinds[0])
def test_gradient_that_is_not_finite(kinds: tuple) -> None:
    model = Rough()
    modules = target_modules(model, "all-linear")
    groups = {name: name for name in modules}

    def collect(*batches: Batch) -> None:
        collect_gradient_statistics(model, modules, groups, batches, kinds)

    good, bad = (collate([Row(ids, ids), Row([3], [3])], PAD) for ids in ([1, 2], [7, 1]))
    collect(good, good)
    what = kinds[0].removesuffix("_covariance").replace("_", " ")
    with pytest.raises(UserError, match=rf"^statistics: NaN or inf in the {what} of layer first, batch 2; .*model\.dt"):
        collect(good, good, bad)
    assert not any(module._forward_hooks for module in model.modules())
    collect(collate([Row([1, 2], [1, 2]), Row([3], [3])], pad_id=7))  # in padding it is nobody's gradient
    with torch.no_grad():
        model.second.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"^statistics: NaN or inf in the loss, batch 0; "):
        collect(good)


def test_no_response() -> None:
    model = tiny_model()
    rows = [Row([1, 2, 3], [IGNORED] * 3), Row([4], [4])]
    with pytest.raises(UserError, match=r"^statistics: no sampled row has a response token; "):
        collected(model, rows, 2)
    with pytest.raises(UserError, match=r"^statistics: no sampled row has a response token; "):
        collected(model, [], 2)


class Aside(Rough):
    """A layer that does not read the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(1, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        hidden = self.embed(input_ids) + self.aside(attention_mask[..., None].float())
        return type("Output", (), {"logits": self.second(self.first(hidden))})


class Routed(Rough):
    """A layer that sees one token of each row."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        hidden = self.embed(input_ids)
        return type("Output", (), {"logits": self.second(hidden + self.first(hidden[:, :1]))})


@pytest.mark.parametrize(
    ("model", "message"),
    [(Aside(), "aside does not depend on the token embeddings"), (Routed(), "first reads 1 rows for 2 tokens")],
    ids=["no path of gradients", "not every token"],
)
def test_layer_without_such_statistics(model: nn.Module, message: str) -> None:
    modules = target_modules(model, "all-linear")
    batch = collate([Row([1, 2], [1, 2])], PAD)
    with pytest.raises(UserError, match=rf"^model\.target_modules: {message}"):
        collect_gradient_statistics(
            model, modules, {name: name for name in modules}, [batch], ("output_gradient_covariance",)
        )
