"""Rank allocation by one sort against the paper's loop (CorDA++, Algorithm 2), step for step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.decomposition.rank_allocation import Spectrum, allocate_ranks, filter_order, filter_scores
from tests.decomposition.reference import paper_filtering

Layers = tuple[list[list[float]], list[float], list[int]]  # singular values, log π and cost of each layer
MODES = ["kpm", "ipm"]


def spectra(layers: Layers) -> list[Spectrum]:
    return [Spectrum(torch.tensor(s, dtype=torch.float64), p, c) for s, p, c in zip(*layers, strict=True)]


def full_cost(layers: Layers) -> int:
    return sum(len(sigma) * cost for sigma, cost in zip(layers[0], layers[2], strict=True))


def check(layers: Layers, budget: int, mode: str) -> list[int]:
    """Order and ranks equal the loop's, within the budget and with nothing left that would have fitted."""
    taken, filtered = paper_filtering(*layers, budget, mode)
    order = filter_order(spectra(layers)).tolist()
    assert order[: len(taken)] == taken
    ranks = allocate_ranks(spectra(layers), budget, mode)
    components = [len(sigma) for sigma in layers[0]]
    assert ranks == (filtered if mode == "kpm" else [R - r for R, r in zip(components, filtered, strict=True)])
    spent = sum(rank * cost for rank, cost in zip(ranks, layers[2], strict=True))
    assert spent <= budget
    if mode == "kpm" and len(taken) < len(order):
        assert spent + layers[2][order[len(taken)]] > budget
    if mode == "ipm" and taken:
        assert spent + layers[2][taken[-1]] > budget
    return ranks


@st.composite
def small_layers(draw: st.DrawFn) -> Layers:
    """Few distinct integers: sums are exact, so equal scores are equal to the last bit, in one layer and across."""
    count = draw(st.integers(1, 6))
    sigmas = [
        [float(draw(st.integers(1, 4))), *map(float, draw(st.lists(st.integers(0, 4), max_size=9)))]
        for _ in range(count)
    ]
    log_pis = [draw(st.sampled_from([0.5, 1.0, 2.0, 3.7, 0.0, -1.0])) for _ in range(count)]
    return [sorted(sigma, reverse=True) for sigma in sigmas], log_pis, [draw(st.integers(1, 9)) for _ in range(count)]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(layers=small_layers(), share=st.floats(0, 1.2), mode=st.sampled_from(MODES))
def test_equals_the_loop_with_ties_and_exhausted_layers(layers: Layers, share: float, mode: str) -> None:
    check(layers, max(sum(layers[2]), int(share * full_cost(layers))), mode)


def real_layers(seed: int, count: int = 9) -> Layers:
    """Layers of different shape; steep and flat spectra, with outliers at the top and steps that break monotony."""
    generator = torch.Generator().manual_seed(seed)
    sigmas, log_pis, costs = [], [], []
    for _ in range(count):
        out, inner = (int(torch.randint(2, 60, (), generator=generator)) for _ in range(2))
        decay = float(torch.rand((), generator=generator)) * 6
        sigma = (-torch.linspace(0, decay, min(out, inner), dtype=torch.float64)).exp()
        sigma *= 1 + torch.rand(len(sigma), generator=generator, dtype=torch.float64)
        sigma[:2] *= 60
        sigmas.append(sigma.sort(descending=True).values.tolist())
        log_pis.append(float(torch.rand((), generator=generator)) * 12 + 4)
        costs.append(out + inner)
    return sigmas, log_pis, costs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_loop_on_layers_of_different_shape(seed: int, mode: str) -> None:
    layers = real_layers(seed)
    for rank in (1, 2, 8, 20, 59):
        check(layers, rank * sum(layers[2]), mode)


def test_scores_are_not_monotone_and_wait_for_the_largest_before_them() -> None:
    """Layer 0 scores 2/11, 1/9, 1/8 … after an equal pair: its cheaper steps follow the dear one at once."""
    layers: Layers = ([[6.0, 5.0, 5.0, 5.0, 1.0], [9.0, 2.0, 2.0, 2.0]], [1.0, -1.0], [3, 4])
    scores = [filter_scores(spectrum).tolist() for spectrum in spectra(layers)]
    assert scores[0] == [1 / 21, 5 / 16, 5 / 11, 5 / 6]
    assert scores[1] == [-2 / 13, -2 / 11, -2 / 9]  # falling: log π is negative
    assert filter_order(spectra(layers)).tolist() == [1, 1, 1, 0, 0, 0, 0]
    for mode in MODES:
        check(layers, 20, mode)


@pytest.mark.parametrize("mode", MODES)
def test_equal_layers_share_equally_and_the_first_goes_first(mode: str) -> None:
    sigma = [8.0, 4.0, 2.0, 1.0]
    layers: Layers = ([sigma] * 3, [5.0] * 3, [10] * 3)
    assert filter_order(spectra(layers)).tolist() == [0, 1, 2] * 3
    assert check(layers, 60, mode) == [2, 2, 2]
    assert check(layers, 79, mode) == ([3, 2, 2] if mode == "kpm" else [2, 2, 3])


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_can_be_exhausted(mode: str) -> None:
    layers: Layers = ([[100.0, 1e-3, 1e-3], [3.0, 2.9, 2.8, 2.7, 2.6, 2.5]], [5.0, 5.0], [6, 9])
    ranks = check(layers, 2 * 15, mode)
    assert ranks == ([3, 1] if mode == "kpm" else [0, 3])


@pytest.mark.parametrize("mode", MODES)
def test_order_of_layers_is_irrelevant_without_ties(mode: str) -> None:
    layers = real_layers(3)
    ranks = check(layers, 8 * sum(layers[2]), mode)
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(0)).tolist()
    permuted = tuple([part[i] for i in order] for part in layers)
    assert check(permuted, 8 * sum(layers[2]), mode) == [ranks[i] for i in order]


@pytest.mark.parametrize("mode", MODES)
def test_scale_of_a_layer_is_irrelevant(mode: str) -> None:
    """Eq. 9 is a ratio: what multiplies all singular values of a layer changes nothing (π is another matter)."""
    sigmas, log_pis, costs = real_layers(4)
    scaled = [[value * 2.0 ** (layer - 4) for value in sigma] for layer, sigma in enumerate(sigmas)]
    budget = 8 * sum(costs)
    assert check((scaled, log_pis, costs), budget, mode) == check((sigmas, log_pis, costs), budget, mode)


@pytest.mark.parametrize("mode", MODES)
def test_weight_of_zero_has_no_components(mode: str) -> None:
    layers = spectra(([[0.0, 0.0, 0.0], [5.0, 2.0, 1.0]], [5.0, 5.0], [6, 6]))
    assert allocate_ranks(layers, 12, mode) == [0, 2]


def test_budget_below_the_start() -> None:
    layers = spectra(([[2.0, 1.0]] * 2, [5.0] * 2, [6, 7]))
    with pytest.raises(ValueError, match=r"budget: 12 parameters given; one rank for every layer takes 13"):
        allocate_ranks(layers, 12, "kpm")
    assert allocate_ranks(layers, 12, "ipm") == [0, 1]
    assert allocate_ranks(layers, 0, "ipm") == [0, 0]
    assert allocate_ranks(layers, 13, "kpm") == [1, 1]


def test_single_component() -> None:
    layers: Layers = ([[3.0], [2.0]], [1.0, 1.0], [4, 4])
    assert check(layers, 8, "kpm") == [1, 1]
    assert check(layers, 8, "ipm") == [0, 0]  # the paper starts with one component filtered


def test_direct_scores() -> None:
    sigma = [7.0, 3.0, 2.0, 0.5]
    expected = [4.0 * sigma[-r] / math.fsum(sigma[: 4 - r]) for r in (1, 2, 3)]
    assert filter_scores(Spectrum(torch.tensor(sigma, dtype=torch.float64), 4.0, 1)).tolist() == pytest.approx(expected)
