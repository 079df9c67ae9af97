"""Truncation without an inverse equals the papers' formula with one; choosing layers."""

import pytest
import torch

from harness.analysis.decompositions import asvd_factor, discard, identity_factor
from harness.analysis.inputs import choose_layers, first_block, short_names
from harness.analysis.truncation import default_discards
from harness.decomposition.context_svd import context_svd, damped
from harness.errors import UserError
from tests.analysis.direct import direct_asvd_factor, direct_context_factor, truncated
from tests.decomposition.reference import outlier_problem, paper_block

SHAPES = {"square": (96, 96, 400), "tall": (160, 64, 300), "wide": (64, 160, 500), "few tokens": (96, 128, 40)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["plain SVD", "ASVD", "CO-SVD"])
def test_truncation_equals_the_formula_with_the_inverse(method: str, shape: str) -> None:
    W, C = outlier_problem(*SHAPES[shape])
    mean_absolute = C.diagonal().sqrt()  # any positive vector with the outliers in it
    factor, expected_factor = {
        "plain SVD": (identity_factor(W), torch.eye(W.shape[1]).double()),
        "ASVD": (asvd_factor(mean_absolute, 0.5), direct_asvd_factor(mean_absolute, 0.5)),
        "CO-SVD": (damped(C, 0.01), direct_context_factor(C, 0.01)),
    }[method]
    R = min(W.shape)
    U = context_svd(W, factor, R - 1).U
    for r in (0, 1, R // 4, R // 2, R - 1, R):
        expected = truncated(W, expected_factor, r)
        assert float((discard(W, U, r) - expected).norm() / W.norm()) <= 1e-6
        assert float((discard(W, U.float(), r) - expected).norm() / W.norm()) <= 1e-5
        if method == "CO-SVD" and r:
            assert relative(W - discard(W, U, r), paper_block(W, C, 0.01, r, "kpm")) <= 1e-4
    assert torch.equal(discard(W, U.float(), 0), W)
    # The method matters: what one discards is not what another does.
    if method != "plain SVD":
        assert relative(discard(W, U, R // 2), truncated(W, torch.eye(W.shape[1]).double(), R // 2)) > 1e-2


def test_asvd_factor_of_a_silent_channel_is_invertible() -> None:
    factor = asvd_factor(torch.tensor([4.0, 0.0, 0.25]), 0.5)
    assert torch.allclose(factor.diagonal()[[0, 2]], torch.tensor([2.0, 0.5]).double())
    assert 0 < float(factor[1, 1]) < 1e-2
    assert torch.equal(asvd_factor(torch.tensor([4.0, 0.25]), 0.0), torch.eye(2).double())


LLAMA = [f"model.layers.{b}.{m}" for b in range(12) for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, LLAMA[:3]),
        ([], LLAMA[:3]),
        (["o_proj"], LLAMA[1::3]),
        (["layers.1"], LLAMA[3:6]),  # and not layers 10 and 11
        (["layers.1.mlp", "model.layers.0.self_attn.q_proj"], [LLAMA[0], LLAMA[5]]),
    ],
)
def test_choose_layers(wanted: list[str] | None, expected: list[str]) -> None:
    assert choose_layers(LLAMA, wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "nearest"), [("q_prj", "'q_proj'"), ("model.layers.0.self_attn.q_prox", "'model.layers.0.self_attn.q_p")]
)
def test_unknown_layer(wanted: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"^--layers: '{wanted}' .*did you mean {nearest}"):
        choose_layers(LLAMA, ["o_proj", wanted])


@pytest.mark.parametrize(
    ("names", "block", "prefix", "short"),
    [
        (["h.0.attn", "h.0.mlp", "h.1.attn"], ["h.0.attn", "h.0.mlp"], "h", ["0.attn", "0.mlp", "1.attn"]),
        (["m.0.fc", "m.0.fc.b"], ["m.0.fc", "m.0.fc.b"], "m.0", ["fc", "fc.b"]),
        (["0.fc", "1.fc"], ["0.fc"], "", ["0.fc", "1.fc"]),
        (["embed.proj", "layers.2.a", "layers.3.a"], ["layers.2.a"], "", ["embed.proj", "layers.2.a", "layers.3.a"]),
        (["first", "second"], ["first", "second"], "", ["first", "second"]),
        (["a.b.only"], ["a.b.only"], "", ["a.b.only"]),
    ],
)
def test_names(names: list[str], block: list[str], prefix: str, short: list[str]) -> None:
    assert first_block(names) == block
    assert short_names(names) == (prefix, short)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (2, [1]),
        (3, [1]),
        (64, [1, 2, 4, 8, 16, 32]),
        (256, [1, 2, 4, 8, 16, 32, 64, 128]),
        (4096, [16, 32, 64, 128, 256, 512, 1024, 2048]),
    ],
)
def test_default_discards(side: int, expected: list[int]) -> None:
    assert default_discards(side) == expected
