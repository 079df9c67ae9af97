"""The SVD of a product from its factors against the SVD of the product."""

import pytest
import torch

from harness.decomposition.factors import factored_svd, leading_svd, orthogonality_error


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(out: int, rank: int, into: int, outliers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    B, A = random(out, rank), random(rank, into, seed=1)
    if outliers:  # channels 1000 times the rest, and components over six decades
        B[1] *= 1000
        A[:, [0, -1]] *= 1000
        B *= torch.logspace(0, -6, rank, dtype=torch.float64)
    return B, A


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("out", "rank", "into"), [(40, 6, 25), (25, 1, 40), (30, 8, 30), (12, 20, 9), (9, 10, 31)])
@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
def test_against_the_dense_product(out: int, rank: int, into: int, outliers: bool, scaling: float) -> None:
    B, A = factors(out, rank, into, outliers)
    product = scaling * B @ A
    found = factored_svd(B, A, scaling)
    expected = torch.linalg.svdvals(product)
    k = min(out, rank, into)
    assert found.U.shape == (out, k) and found.sigma.shape == (k,) and found.V.shape == (into, k)
    assert float((found.sigma - expected[:k]).abs().max()) <= 1e-13 * float(expected[0])
    assert found.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-12)
    assert found.frobenius_norm == pytest.approx(float(product.square().sum().sqrt()), rel=1e-12)
    assert float((found.U @ torch.diag(found.sigma) @ found.V.T - product).abs().max()) <= 1e-12 * float(expected[0])
    for vectors in (found.U, found.V):
        assert torch.allclose(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), atol=1e-12)


def test_half_precision_factors_are_taken_as_they_are() -> None:
    B, A = (M.bfloat16() for M in factors(40, 6, 25, False))
    found = factored_svd(B, A)
    assert found.sigma.dtype == torch.float64
    assert float((found.sigma - torch.linalg.svdvals(B.double() @ A.double())[:6]).abs().max()) <= 1e-12


def test_zero_has_no_singular_vectors() -> None:
    B, A = factors(40, 6, 25, True)
    for left, right in (
        (torch.zeros(40, 6), A),
        (torch.cat([B, -B], dim=1), torch.cat([A, A])),  # a residual method at step 0
        (torch.zeros(40, 0), torch.zeros(0, 25)),  # AdaLoRA took every component away
    ):
        found = factored_svd(left, right, 0.5)
        assert found.U.shape == (40, 0) and found.V.shape == (25, 0)
        assert found.spectral_norm == found.frobenius_norm == 0.0


def test_a_small_change_of_a_large_block_is_measured() -> None:
    """[B, −B₀]·[A; A₀] with B·A nearly B₀·A₀: what is left, a millionth of either, keeps nine digits."""
    B, A = factors(40, 6, 25, False)
    B_trained = B + 1e-6 * random(40, 6, seed=2)
    found = factored_svd(torch.cat([B_trained, -B], dim=1), torch.cat([A, A]))
    expected = torch.linalg.svdvals((B_trained - B) @ A)
    assert float((found.sigma[:6] - expected[:6]).abs().max()) <= 1e-9 * float(expected[0])


def test_the_product_is_never_formed() -> None:
    """It would have 3·10¹⁰ entries."""
    B, A = torch.zeros(200_000, 2), torch.zeros(2, 150_000)
    B[5, 0], A[0, 7], B[9, 1], A[1, 3] = 3.0, 2.0, 1.0, 1.0
    found = factored_svd(B, A)
    assert found.sigma.tolist() == pytest.approx([6.0, 1.0])
    assert abs(float(found.U[5, 0])) == pytest.approx(1) and abs(float(found.V[7, 0])) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30)])
@pytest.mark.parametrize("rank", [1, 7, 100])
def test_leading(shape: tuple[int, int], rank: int) -> None:
    W = random(*shape)
    W[:, 3] *= 50
    W[2] *= 50
    found = leading_svd(W.float(), rank)
    k = min(rank, *shape)
    U, sigma, Vh = torch.linalg.svd(W.float().double())
    assert found.sigma.tolist() == pytest.approx(sigma[:k].tolist(), rel=1e-9)
    # Signs are free: projections are compared.
    assert torch.allclose(found.U @ found.U.T, U[:, :k] @ U[:, :k].T, atol=1e-8)
    assert torch.allclose(found.V @ found.V.T, Vh[:k].T @ Vh[:k], atol=1e-8)
    assert torch.allclose(found.U.T @ W.float().double() @ found.V, torch.diag(sigma[:k]), atol=1e-8 * float(sigma[0]))


def test_leading_of_a_matrix_of_lower_rank() -> None:
    found = leading_svd(random(30, 2) @ random(2, 20), 5)
    assert found.U.shape == (30, 2) and found.V.shape == (20, 2)
    assert leading_svd(torch.zeros(4, 3), 2).spectral_norm == 0.0


def test_orthogonality_error() -> None:
    U, V = random(30, 4), random(20, 4, seed=1)
    expected = 0.0
    for M in (U, V):
        squares = 0.0
        for i in range(4):
            for j in range(4):
                squares += (float((M[:, i] * M[:, j]).sum()) - (1.0 if i == j else 0.0)) ** 2
        expected += squares**0.5
    assert orthogonality_error(U, V) == pytest.approx(expected, rel=1e-12)
    Q = torch.linalg.qr(U).Q
    assert orthogonality_error(Q, Q) <= 1e-14
