"""Plain decompositions of base weights: computed once, shared by methods, the same to the last bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cache import Cache
from harness.methods.base import AdapterInit, Method
from harness.methods.farss import FARSS
from harness.methods.fclora import FCLoRA
from harness.methods.kasa import KaSA
from harness.methods.lora_ga import LoRAGA
from harness.methods.milora import MiLoRA
from harness.methods.pissa import PiSSA
from harness.methods.sorsa import SORSA
from harness.models.targets import Layer
from harness.statistics.statistic import Statistic
from tests.methods.formulas import weight_of

CASES: list[tuple[type[Method], dict[str, Any]]] = [
    (PiSSA, {}),
    (MiLoRA, {}),
    (SORSA, {}),
    (KaSA, {}),
    (FCLoRA, {}),
    (FCLoRA, {"init": "singular", "quartile": 1}),
    (FARSS, {"shallow_layers": 1}),
    (LoRAGA, {"scale": "weight_svd"}),
]
IDS = [f"{cls.__name__} {' '.join(map(str, options.values()))}" for cls, options in CASES]


class Asked(Cache):
    """The real cache, and what it was asked for: (content, whether it was there)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[tuple[Mapping[str, Any], bool]] = []

    def get(self, kind: str, content: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        found = super().get(kind, content)
        assert kind == "plain-svd"
        self.asked.append((content, found is not None))
        return found


class Collected:
    """Statistics of one layer from a seed."""

    def __init__(self, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        X, D = (torch.randn(500, size, generator=generator) for size in reversed(shape))
        self._parts = X.T @ X / 500, D.T @ D / 500, D.T @ X / 500

    def input_covariance(self, layer: str, sampling_round: int = 0) -> Statistic:
        return Statistic(self._parts[0], 500)

    def output_gradient_covariance(self, layer: str) -> Statistic:
        return Statistic(self._parts[1], 500)

    def weight_gradient(self, layer: str) -> Statistic:
        return Statistic(self._parts[2], 500)


def initialised(
    cls: type[Method], options: dict[str, Any], weight: torch.Tensor, cache: Cache | None, solver: str = "auto"
) -> AdapterInit:
    method = cls(cls.Options(rank=8, **options), 0)
    method.cache, method.solver = cache, solver
    layer = Layer("model.layers.0.mlp.up_proj", *weight.shape[::-1])
    return method.initialise(layer, weight, 8, Collected(tuple(weight.shape)), {})


def assert_same(found: AdapterInit, expected: AdapterInit) -> None:
    ours, theirs = ({**init.tensors(("A", "B"))} for init in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    if expected.subtracted is not None:
        assert all(map(torch.equal, found.subtracted, expected.subtracted))
    assert found.report == expected.report


def forbid(monkeypatch: pytest.MonkeyPatch, decompositions: tuple[str, ...]) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("decomposed again")

    for name in decompositions:
        monkeypatch.setattr(torch.linalg, name, called)


@pytest.mark.parametrize("solver", ["auto", "partial", "svd"])
@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)], ids=str)
@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_a_second_run_decomposes_nothing(
    cls: type[Method],
    options: dict[str, Any],
    shape: tuple[int, int],
    solver: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = weight_of(shape, "half")
    plain = initialised(cls, options, weight, None, solver)
    cold = initialised(cls, options, weight, Asked(tmp_path), solver)
    warm_cache = Asked(tmp_path)
    if cls is not LoRAGA:  # it decomposes the gradient, which is another one every time
        forbid(monkeypatch, ("eigh", "eigvalsh", "svd", "svdvals"))
    warm = initialised(cls, options, weight.clone(), warm_cache, solver)
    assert warm_cache.asked
    assert all(there for _, there in warm_cache.asked)
    assert_same(cold, plain)
    assert_same(warm, plain)


@pytest.mark.parametrize(("first", "second"), [(PiSSA, SORSA), (SORSA, PiSSA), (MiLoRA, KaSA), (PiSSA, LoRAGA)])
def test_methods_share_what_both_need(first: type[Method], second: type[Method], tmp_path: Path) -> None:
    weight = weight_of((64, 160), "outliers")
    options = {"scale": "weight_svd"} if second is LoRAGA else {}
    initialised(first, {}, weight, Asked(tmp_path))
    cache = Asked(tmp_path)
    found = initialised(second, options, weight, cache)
    assert [there for _, there in cache.asked] == [True]
    assert_same(found, initialised(second, options, weight, None))


def test_what_is_another_decomposition_is_not_shared(tmp_path: Path) -> None:
    weight = weight_of((64, 160), "outliers")
    initialised(PiSSA, {}, weight, Asked(tmp_path))
    moved = weight.clone()
    moved[3, 5] += 1e-3
    cache = Asked(tmp_path)
    initialised(PiSSA, {}, moved, cache)
    initialised(PiSSA, {}, weight.double(), cache)
    initialised(PiSSA, {}, weight, cache, "svd")
    initialised(MiLoRA, {}, weight, cache)
    initialised(FARSS, {"shallow_layers": 1}, weight, cache)
    assert not any(there for _, there in cache.asked)
    assert len({str(content) for content, _ in cache.asked}) == 5
