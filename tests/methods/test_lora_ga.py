"""LoRA-GA: the paper's factors in float64, PEFT's version, and what neither may do."""

from itertools import product
from typing import Any

import pytest
import torch

from harness.errors import UserError
from harness.methods.lora_ga import LoRAGA, LoRAGAOptions
from harness.models.targets import Layer
from tests.methods.formulas import weight_of
from tests.methods.held import Held

SHAPES = [(64, 64), (96, 48), (48, 96)]
DIRECTIONS = ["ArBr", "A2rBr", "ArB2r"]
SCALES = ["stable", "weight_svd", "gd_scale", "unit"]
RANK = 8


def gradient_of(shape: tuple[int, int], smallest: float = -3) -> torch.Tensor:
    """Singular values from 1e-2 down by even steps of their logarithm; channels of different size."""
    generator = torch.Generator().manual_seed(1)
    k = min(shape)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator).double())[0] for size in shape)
    return (1e-2 * U * torch.logspace(0, smallest, k).double() @ V.T).float()


def start(shape: tuple[int, int], seed: int = 0, name: str = "layer", **options: Any) -> Any:
    method = LoRAGA(LoRAGAOptions(rank=RANK, **options), seed)
    W, G = weight_of(shape, "outliers"), gradient_of(shape)
    return method.initialise(Layer(name, *shape), W, RANK, Held(weight_gradient=G), {})


def indices(direction: str) -> tuple[list[int], list[int]]:
    """Which components A and B take, counted from 0 (LoRA-GA's Theorem 3.1 allows any such split of 2r)."""
    low, high = list(range(RANK)), list(range(RANK, 2 * RANK))
    odd, even = list(range(1, 2 * RANK, 2)), list(range(0, 2 * RANK, 2))
    return {"ArB2r": (low, high), "A2rBr": (high, low), "ArBr": (odd, even)}[direction]


@pytest.mark.parametrize("alpha", [None, 32.0])
@pytest.mark.parametrize(("direction", "scale"), list(product(DIRECTIONS, SCALES)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_papers_factors(shape: tuple[int, int], direction: str, scale: str, alpha: float | None) -> None:
    initial = start(shape, direction=direction, scale=scale, alpha=alpha, stable_gamma=25)
    U, _, Vh = torch.linalg.svd(gradient_of(shape).double(), full_matrices=False)
    for_A, for_B = indices(direction)
    s = (alpha or RANK) / RANK
    weight_values = torch.linalg.svdvals(weight_of(shape, "outliers").double())
    size = {
        "stable": shape[0] ** 0.25 / 5,
        "weight_svd": float((weight_values[:RANK] / s).sqrt().mean()),
        "gd_scale": 1 / s,
        "unit": 1.0,
    }[scale]
    # Up to signs, which flip u and v of a component together: with |·| on the coefficients.
    assert torch.allclose((initial.A.double() @ Vh[for_A].T).abs(), size * torch.eye(RANK).double(), atol=1e-5 * size)
    assert torch.allclose((U[:, for_B].T @ initial.B.double()).abs(), size * torch.eye(RANK).double(), atol=1e-5 * size)
    assert initial.residual


def test_components_keep_the_sign_of_their_pair() -> None:
    """u_i v_iᵀ is unique even where u_i and v_i are not: A's and B's halves from one method, joined, give it back."""
    G = gradient_of((64, 48)).double()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    usual = start((64, 48), scale="unit")
    reverse = start((64, 48), scale="unit", direction="A2rBr")
    first = torch.einsum("or,ri->roi", reverse.B.double(), usual.A.double())
    assert torch.allclose(first, torch.einsum("or,ri->roi", U[:, :RANK], Vh[:RANK]), atol=1e-5)


def test_random_direction() -> None:
    """A random half of the 2r components each, by seed and layer."""
    shape = (64, 48)
    U, _, Vh = torch.linalg.svd(gradient_of(shape).double(), full_matrices=False)

    def halves(**arguments: Any) -> tuple[set[int], set[int]]:
        initial = start(shape, direction="random", scale="unit", **arguments)
        A = (initial.A.double() @ Vh[: 2 * RANK].T).abs()
        B = (U[:, : 2 * RANK].T @ initial.B.double()).abs().T
        assert torch.allclose(A.sum(1), torch.ones(RANK).double(), atol=1e-4)
        return set(A.argmax(1).tolist()), set(B.argmax(1).tolist())

    A, B = halves()
    assert set(range(2 * RANK)) == A | B
    assert len(A) == len(B) == RANK
    assert halves() == (A, B)
    assert halves(seed=1) != (A, B)
    assert halves(name="other") != (A, B)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pefts_version(direction: str, scale: str) -> None:
    """B carries the gradient's singular values; stable and weight_svd change B alone. Its SVD is randomised."""
    shape, alpha = (96, 64), 32.0
    initial = start(shape, direction=direction, scale=scale, formula="peft", alpha=alpha)
    U, sigma, Vh = torch.linalg.svd(gradient_of(shape).double(), full_matrices=False)
    for_A, for_B = indices(direction)
    weight_values = torch.linalg.svdvals(weight_of(shape, "outliers").double())
    on_B = {
        "stable": 96**0.25 / 4,
        "weight_svd": float(weight_values[0] / sigma[for_B[0]]),
        "gd_scale": 0.25,
        "unit": 1.0,
    }[scale]
    on_A = 0.25 if scale == "gd_scale" else 1.0
    A, B = initial.A.double() @ Vh[for_A].T, U[:, for_B].T @ initial.B.double()
    assert torch.allclose(A.abs(), on_A * torch.eye(RANK).double(), atol=0.02 * on_A)
    assert torch.allclose(B.abs(), on_B * torch.diag(sigma[for_B]), atol=0.02 * on_B * float(sigma[for_B[0]]))


def test_pefts_version_draws_by_seed_and_layer() -> None:
    shape = (96, 64)
    torch.manual_seed(1)
    first = start(shape, formula="peft")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(start(shape, formula="peft").A, first.A)
    torch.manual_seed(1)
    start(shape, formula="peft")
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is where it was
    assert not torch.equal(start(shape, formula="peft", seed=1).A, first.A)
    assert not torch.equal(start(shape, formula="peft", name="other").A, first.A)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_small_rank(shape: tuple[int, int]) -> None:
    """Where the gradient has no component there is none in A or B: no vector that only rounding chose."""
    U, V = (torch.linalg.qr(torch.randn(size, 11))[0] for size in shape)
    G = U @ V.T * torch.linspace(2, 1, shape[1])
    method = LoRAGA(LoRAGAOptions(rank=RANK, scale="unit"))
    initial = method.initialise(Layer("layer", *shape), weight_of(shape, "outliers"), RANK, Held(weight_gradient=G), {})
    assert torch.allclose(initial.A @ initial.A.T, torch.eye(RANK), atol=1e-5)
    assert torch.allclose(initial.B.norm(dim=0), torch.tensor([1.0] * 3 + [0.0] * 5), atol=1e-5)


def test_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match=r"^method: the gradient of layer deep is zero on every token"):
        zero = Held(weight_gradient=torch.zeros(48, 64))
        LoRAGA(LoRAGAOptions()).initialise(Layer("deep", 48, 64), torch.ones(48, 64), 8, zero, {})
    layers = [Layer("wide", 64, 64), Layer("narrow", 64, 20)]
    with pytest.raises(UserError, match=r"^method\.rank: 11 given; .* layer narrow is 64×20, so at most 10$"):
        LoRAGA(LoRAGAOptions(rank=11)).ranks(layers, {})
    assert LoRAGA(LoRAGAOptions(rank=10)).ranks(layers, {}) == {"wide": 10, "narrow": 10}
    request = LoRAGA(LoRAGAOptions()).statistics()
    assert (request.kinds, request.data) == (("weight_gradient",), "target")
