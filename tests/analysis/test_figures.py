"""Figures of shapes that real models do not have: they are drawn, without a warning."""

import warnings

import pytest
import torch

from harness.analysis.figures import covariance_figure, spectrum_figure, truncation_figure

METHODS = ("plain SVD", "ASVD", "CO-SVD", "CO-SVD+", "CO-SVD++")


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("values", [[3.0], [3.0, 1.0], [0.0, 0.0, 0.0], [1e8, 1.0, 0.0], [1.0] * 300])
def test_spectrum(values: list[float]) -> None:
    curves = {"layer": dict.fromkeys(METHODS[:3], values)}
    assert spectrum_figure("model", curves).startswith(b"\x89PNG")


@pytest.mark.parametrize("cells", [torch.zeros(3, 3), torch.ones(32, 32), torch.rand(32, 32) * 1e-9])
def test_covariance(cells: torch.Tensor) -> None:
    assert covariance_figure("", ["one"], {"a": ["a", "b"]}, {"a": [cells]}).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "values",
    [[3.0, 3.0], [3.0, None], [3.0, 2.9], [3.0, 3.0001], [3.0, 1e30]],
)
def test_truncation(values: list[float | None]) -> None:
    drawn = truncation_figure(values[0] or 0, [0, 1], [0.0, 0.001], dict.fromkeys(METHODS, values))
    assert drawn.startswith(b"\x89PNG")
