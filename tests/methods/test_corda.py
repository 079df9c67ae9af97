"""CorDA's adapter against the paper's formulas, with the factor α/r in it."""

from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.methods.corda import CorDA, CorDAOptions
from harness.models.targets import Layer
from tests.decomposition.reference import outlier_problem, paper_block
from tests.methods.held import Held

RANK = 16


@pytest.mark.parametrize("shape", [(256, 256), (704, 256), (256, 704)], ids=str)
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_stored_factors_equal_the_paper(shape: tuple[int, int], mode: str) -> None:
    W, C = outlier_problem(*shape, 4000)
    block = paper_block(W, C, 0.01, RANK, mode)
    for alpha in (None, 4.0, 40.0):
        method = CorDA(CorDAOptions(mode=mode, rank=RANK, alpha=alpha))
        initial = method.initialise(Layer("layer", *shape), W, RANK, Held(C), {})
        assert initial.residual
        assert initial.A.dtype == initial.B.dtype == torch.float32
        assert method.scaling() == (alpha or RANK) / RANK
        product = method.scaling() * (initial.B.double() @ initial.A.double())
        assert float((product - block).norm() / block.norm()) <= 1e-5
        assert initial.report["rounding_error"] <= 1e-5


def test_scaling_is_split_evenly() -> None:
    """Both factors are divided by √s: neither learns faster than the other because of α."""
    W, C = outlier_problem(64, 64, 4000)
    layer = Layer("layer", 64, 64)
    plain = CorDA(CorDAOptions(mode="kpm", rank=8)).initialise(layer, W, 8, Held(C), {})
    scaled = CorDA(CorDAOptions(mode="kpm", rank=8, alpha=32.0)).initialise(layer, W, 8, Held(C), {})
    assert torch.allclose(scaled.A * 2, plain.A, rtol=1e-6)
    assert torch.allclose(scaled.B * 2, plain.B, rtol=1e-6)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_full_rank_takes_the_whole_weight(mode: str) -> None:
    W, C = outlier_problem(32, 48, 4000)
    method = CorDA(CorDAOptions(mode=mode, rank=32))
    initial = method.initialise(Layer("layer", 32, 48), W, 32, Held(C), {})
    assert float((initial.B @ initial.A - W).norm() / W.norm()) <= 1e-5


def test_layer_whose_input_is_zero() -> None:
    with pytest.raises(UserError, match=r"the input of layer deep is zero on every token"):
        CorDA(CorDAOptions(mode="kpm")).initialise(Layer("deep", 4, 4), torch.eye(4), 2, Held(torch.zeros(4, 4)), {})


def test_statistics_of_the_right_data() -> None:
    assert CorDA(CorDAOptions(mode="kpm")).statistics().data == "preserve"
    assert CorDA(CorDAOptions(mode="ipm")).statistics().data == "target"


def test_ranks_are_checked_against_the_layers(tmp_path: Path) -> None:
    from harness.stages.initialise import check_ranks

    layers = [Layer("wide", 8, 64), Layer("narrow", 64, 4)]
    with pytest.raises(UserError, match=r"^method\.rank: 5 given; layer narrow is 64×4, so at most 4$"):
        check_ranks(layers, {"wide": 5, "narrow": 5})
    with pytest.raises(UserError, match=r"^method\.rank: no layer got an adapter"):
        check_ranks(layers, {"wide": 0})
    check_ranks(layers, {"wide": 8, "narrow": 4})
