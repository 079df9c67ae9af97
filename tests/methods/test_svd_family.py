"""PiSSA, MiLoRA, OLoRA and LoRA-Null against their papers' formulas in float64."""

from typing import Any

import pytest
import torch

from harness.config import resolve
from harness.errors import UserError
from harness.methods.base import LowRank, Method
from harness.methods.lora_null import LoRANull, LoRANullOptions
from harness.methods.milora import MiLoRA
from harness.methods.olora import OLoRA
from harness.methods.pissa import PiSSA
from harness.methods.registry import build_method
from harness.models.targets import Layer
from tests.decomposition.reference import outlier_problem
from tests.methods import formulas
from tests.methods.formulas import SHAPES, weight_of
from tests.methods.held import Held

SVD = {PiSSA: formulas.pissa, MiLoRA: formulas.milora}
BOUND = 1e-6


def block(method: Method, initial: Any) -> torch.Tensor:
    """s·B₀A₀ in float64, from what is stored."""
    assert initial.A.dtype == initial.B.dtype == torch.float32
    return method.scaling() * (initial.B.double() @ initial.A.double())


def error(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> float:
    return float((found - expected).norm() / scale.double().norm())


@pytest.mark.parametrize("alpha", [None, 4.0, 40.0])
@pytest.mark.parametrize("kind", ["outliers", "deficient", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cls", SVD, ids=lambda cls: cls.__name__)
def test_components_of_the_weight(cls: type[Method], shape: tuple[int, int], kind: str, alpha: float | None) -> None:
    W = weight_of(shape, kind)
    for rank in (1, 16, 64 if kind != "deficient" else 32):
        method = cls(cls.Options(rank=rank, alpha=alpha))
        initial = method.initialise(Layer("layer", *shape), W, rank, None, {})
        expected = SVD[cls](W, rank)
        assert initial.residual
        assert initial.A.shape == (rank, shape[1])
        assert initial.B.shape == (shape[0], rank)
        # MiLoRA's block of a deficient weight is nothing at all; then what counts is how little is found.
        nothing = float(expected.norm()) <= 1e-6 * float(W.double().norm())
        assert error(block(method, initial), expected, W if nothing else expected) <= BOUND
        if not nothing:
            assert initial.report["rounding_error"] <= BOUND
            share = float(expected.norm() / W.double().norm())
            assert initial.report["share_of_weight"] == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("cls", SVD, ids=lambda cls: cls.__name__)
def test_factors_are_the_papers(cls: type[Method]) -> None:
    """B₀ = U_r Σ_r^½ and A₀ = Σ_r^½ V_rᵀ, each divided by √s, up to the sign of each pair."""
    W = weight_of((64, 160), "outliers")
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    columns = slice(0, 8) if cls is PiSSA else slice(56, 64)
    initial = cls(cls.Options(rank=8, alpha=32.0)).initialise(Layer("layer", 64, 160), W, 8, None, {})
    root = (sigma[columns] / 4.0).sqrt()
    assert torch.allclose((U[:, columns].T @ initial.B.double()).abs(), torch.diag(root), atol=1e-6)
    assert torch.allclose((initial.A.double() @ Vh[columns].T).abs(), torch.diag(root), atol=1e-6)


@pytest.mark.parametrize("cls", SVD, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_takes_the_whole_weight(cls: type[Method], shape: tuple[int, int]) -> None:
    W, rank = weight_of(shape, "outliers"), min(shape)
    method = cls(cls.Options(rank=rank))
    assert error(block(method, method.initialise(Layer("layer", *shape), W, rank, None, {})), W, W) <= BOUND


@pytest.mark.parametrize("alpha", [None, 4.0])
@pytest.mark.parametrize("kind", ["outliers", "deficient", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_olora(shape: tuple[int, int], kind: str, alpha: float | None) -> None:
    W = weight_of(shape, kind)
    before = W.clone()
    for rank in (1, 16, 32):
        method = OLoRA(OLoRA.Options(rank=rank, alpha=alpha))
        initial = method.initialise(Layer("layer", *shape), W, rank, None, {})
        Q, R = formulas.olora(W, rank)
        sign = initial.A.double()[:, :rank].diagonal().sign()
        assert initial.residual
        assert error(initial.B.double() * sign, Q, Q) <= 1e-4  # PEFT factorises in fp32
        assert error(initial.A.double() * sign[:, None], R, R) <= 1e-5
        assert torch.equal(W, before)


NULL = [(None, 4000), (24, 4000), (None, 40), (150, 40)]  # directions asked for, tokens


@pytest.mark.parametrize("alpha", [None, 4.0])
@pytest.mark.parametrize(("directions", "tokens"), NULL)
@pytest.mark.parametrize("shape", [(160, 160), (64, 160), (200, 160)], ids=str)
def test_lora_null(shape: tuple[int, int], directions: int | None, tokens: int, alpha: float | None) -> None:
    """With fewer tokens than channels every direction without a token counts as null, not an arbitrary few of them."""
    W, C = outlier_problem(*shape, tokens)
    method = LoRANull(LoRANullOptions(rank=16, null_directions=directions, alpha=alpha))
    initial = method.initialise(Layer("layer", *shape), W, 16, Held(C, tokens=tokens), {})
    used = max(directions or 16, 160 - tokens)
    expected = formulas.lora_null(W, formulas.bottom(C, used), 16)
    assert initial.residual
    assert error(block(method, initial), expected, expected) <= (BOUND if tokens == 4000 else 1e-3)
    assert initial.report["null_directions"] == used
    assert initial.report["covariance_tokens"] == tokens
    # What it is for: A₀ hardly answers to the inputs, which the whole weight does.
    answer = float((initial.A.double() @ C.double() @ initial.A.double().T).trace() / initial.A.double().square().sum())
    assert answer <= 0.01 * float(C.double().trace() / 160)


def test_lora_null_does_not_depend_on_how_the_covariance_was_rounded() -> None:
    """Fewer tokens than channels: sums in another order give the same adapter, though every eigenvector is another."""
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(48, 96, generator=generator), torch.randn(50, 96, generator=generator)
    X[:, 0] *= 60
    halves = X[:25].T @ X[:25] + X[25:].T @ X[25:]
    method = LoRANull(LoRANullOptions(rank=8))
    one, two = (method.initialise(Layer("layer", 48, 96), W, 8, Held(C / 50), {}) for C in (X.T @ X, halves))
    assert torch.allclose(one.A, two.A, atol=1e-4)
    assert torch.allclose(one.B, two.B, atol=1e-4)


def test_lora_null_options() -> None:
    def options(**values: Any) -> dict[str, Any]:
        source = {"path": "x", "prompt": "q"}
        method = {"name": "lora_null", **values}
        return resolve({"name": "x", "model": {"path": "x"}, "data": {"train": source}, "method": method}).method

    assert options(rank=4)["null_directions"] is None
    with pytest.raises(UserError, match=r"^method: .* given; allowed: null_directions of at least rank \(16\)$"):
        options(null_directions=8)
    W, C = outlier_problem(8, 16, 100)
    with pytest.raises(UserError, match=r"^method\.null_directions: 40 given; layer deep has 16 input channels"):
        LoRANull(LoRANullOptions(rank=4, null_directions=40)).initialise(Layer("deep", 8, 16), W, 4, Held(C), {})


def test_update_of_a_frozen_a_has_the_rank_of_b() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 24, generator=generator)
    initial, trained = (LowRank(torch.randn(20, 4, generator=generator), A, 0.5) for _ in range(2))
    frozen, free = (LoRANull(LoRANullOptions(rank=4, freeze_a=freeze)) for freeze in (True, False))
    short, full = frozen.delta(trained, initial), free.delta(trained, initial)
    assert (short.A.shape[0], full.A.shape[0]) == (4, 8)
    assert torch.allclose(short.dense(), full.dense(), atol=1e-6)
    assert torch.allclose(short.dense(), trained.dense() - initial.dense(), atol=1e-6)


def test_data() -> None:
    request = build_method({"name": "lora_null"}, 0).statistics()
    assert (request.kinds, request.data) == (("input_covariance",), "preserve")
    for name in ("pissa", "milora", "olora"):
        assert build_method({"name": name}, 0).statistics() is None
