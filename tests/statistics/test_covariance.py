"""Input covariances against a direct computation: batch sizes, padding sides, ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from harness.config import ModelConfig
from harness.data.collation import collate
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.methods.base import Statistics
from harness.methods.corda import CorDA, CorDAOptions
from harness.models.loading import load_model
from harness.models.targets import describe, target_modules
from harness.statistics.covariance import collect_input_covariance
from harness.statistics.store import StatisticsReader, StatisticsWriter
from tests.statistics.direct import PAD, collected, direct_covariances, make_rows

BOUND = 1e-5
REPOSITORY = Path(__file__).resolve().parents[2]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model(random_base: Path) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(random_base), dtype="float32"))


@pytest.fixture(scope="module")
def direct(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return direct_covariances(model, target_modules(model, "all-linear"), make_rows(20))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_direct(model: PreTrainedModel, direct: dict[str, torch.Tensor], batch_size: int, side: str) -> None:
    rows = make_rows(20)
    covariances, groups = collected(model, rows, batch_size, side)
    assert len(covariances) == 8  # four distinct inputs in each of two blocks
    assert groups.keys() == direct.keys()
    for layer, expected in direct.items():
        found = covariances[groups[layer]]
        assert found.tokens == sum(len(row.input_ids) for row in rows)
        assert found.matrix.dtype == torch.float32
        assert relative(found.matrix, expected) <= BOUND
        # Entry by entry, where outliers would hide the rest in a norm: each against its own row's and column's scale.
        scale = (expected.diagonal()[:, None] * expected.diagonal()[None, :]).sqrt()
        assert float(((found.matrix - expected).abs() / scale).max()) <= 1e-4


@pytest.fixture(scope="module")
def gangs(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What real gloo gangs of 1, 2 and 3 processes collected, each rank's result in a folder of its own."""
    folder = tmp_path_factory.mktemp("gangs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.statistics.direct", str(random_base), str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def chosen_ranks(model: PreTrainedModel, statistics: Statistics, mode: str) -> tuple[dict[str, int], list[float]]:
    """CorDA++'s ranks, and the selection score of every layer."""
    method = CorDA(CorDAOptions(mode=mode, rank=8, dynamic_rank=True))
    modules = target_modules(model, "all-linear")
    findings = {
        layer.name: method.examine(layer, modules[layer.name].weight.detach(), statistics)
        for layer in describe(modules)
    }
    return method.ranks(describe(modules), findings), [found["selection_score"] for found in findings.values()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_ranks_that_corda_chooses(model: PreTrainedModel, gangs: Path, tmp_path: Path, mode: str) -> None:
    """The same for 1, 2 and 3 ranks of the gang and for batch sizes 1, 3 and 8."""
    expected, scores = chosen_ranks(model, StatisticsReader(gangs / "1-ranks" / "rank-0"), mode)
    assert len(set(expected.values())) > 1
    others = [StatisticsReader(gangs / f"{ranks}-ranks" / "rank-0") for ranks in (2, 3)]
    for batch_size in (1, 3, 8):
        covariances, groups = collected(model, make_rows(20), batch_size)
        writer = StatisticsWriter(tmp_path / str(batch_size))
        writer.add("input_covariance", covariances, groups)
        writer.close()
        others.append(StatisticsReader(tmp_path / str(batch_size)))
    for statistics in others:
        found, own = chosen_ranks(model, statistics, mode)
        assert found == expected
        assert own == pytest.approx(scores, rel=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks(ranks: int, gangs: Path, direct: dict[str, torch.Tensor]) -> None:
    """Batches are dealt out unevenly and the last of several ranks has none; every rank gets the whole result."""
    for number in range(ranks):
        reader = StatisticsReader(gangs / f"{ranks}-ranks" / f"rank-{number}")
        for layer, expected in direct.items():
            found = reader.input_covariance(layer)
            assert found.tokens == sum(len(row.input_ids) for row in make_rows(20))
            assert relative(found.matrix, expected) <= BOUND


def test_bfloat16_model_sums_in_float32(random_base: Path) -> None:
    """The inputs are what the bf16 model computes; their products must not be rounded to bf16 as well."""
    model = load_model(ModelConfig(path=str(random_base), dtype="bfloat16"))
    modules = target_modules(model, "all-linear")
    rows = [Row(row.input_ids, row.labels) for row in make_rows(20)]
    covariances, groups = collected(model, rows, 1)
    expected = direct_covariances(model, modules, rows)
    assert all(covariances[groups[layer]].matrix.dtype == torch.float32 for layer in modules)
    assert max(relative(covariances[groups[layer]].matrix, expected[layer]) for layer in modules) <= BOUND


def test_a_row_of_padding_alone_adds_nothing(model: PreTrainedModel) -> None:
    rows = make_rows(4)
    modules = target_modules(model, "all-linear")
    groups = {name: name for name in modules}
    batch, padded = collate(rows, PAD), collate([*rows, Row([], [])], PAD)
    assert padded["attention_mask"][-1].sum() == 0
    found = collect_input_covariance(model, modules, groups, [padded])
    expected = collect_input_covariance(model, modules, groups, [batch])
    for layer in modules:
        assert found[layer].tokens == expected[layer].tokens
        assert relative(found[layer].matrix, expected[layer].matrix.double()) <= BOUND


@pytest.mark.parametrize("batches", [0, 2], ids=["no batch", "padding alone"])
def test_no_real_token(model: PreTrainedModel, batches: int) -> None:
    modules = target_modules(model, ["q_proj"])
    padding = {key: torch.zeros(2, 3, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    with pytest.raises(UserError, match=r"^statistics: the sampled rows hold no real token; "):
        collect_input_covariance(model, modules, {name: name for name in modules}, [padding] * batches)


class Poisoned(nn.Module):
    """Two layers; the second one's input is ``bad`` wherever a token is 7."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bad = bad

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.embed(input_ids))
        hidden = torch.where((input_ids == 7)[..., None], self.bad, hidden)
        return self.second(hidden)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_activation_that_is_not_finite(bad: float) -> None:
    model = Poisoned(bad)
    modules = target_modules(model, "all-linear")
    groups = {name: name for name in modules}
    good = collate([Row([1, 2], []), Row([3], [])], PAD)
    with pytest.raises(UserError, match=r"NaN or inf in the input of layer second, batch 2; .*model\.dtype"):
        collect_input_covariance(model, modules, groups, [good, good, collate([Row([1, 7], [])], PAD)])
    # In padding it is nobody's activation; and no hook stays behind after the error.
    assert not any(module._forward_pre_hooks for module in modules.values())
    padding = collate([Row([1, 2], []), Row([3], [])], pad_id=7)
    found = collect_input_covariance(model, modules, groups, [padding])
    assert all(covariance.matrix.isfinite().all() for covariance in found.values())


class Routed(nn.Module):
    """An expert that sees one token of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.expert = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.expert(self.embed(input_ids)[:, 0])


def test_layer_that_does_not_see_every_token() -> None:
    model = Routed()
    batch = collate([Row([1, 2], []), Row([3, 4], [])], PAD)
    with pytest.raises(UserError, match=r"^model\.target_modules: expert reads 2 rows for 4 tokens"):
        collect_input_covariance(model, {"expert": model.expert}, {"expert": "expert"}, [batch])
