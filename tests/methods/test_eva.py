"""EVA: exact eigenvectors and ranks by explained variance, and the same as PEFT's incremental SVD settles on."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from harness.methods.eva import EVA, EVAOptions
from harness.models.targets import Layer, describe
from harness.statistics.statistic import Statistic
from tests.decomposition.reference import outlier_problem
from tests.methods.held import Held


class ByLayer(Held):
    """Input covariances of several layers."""

    def __init__(self, covariances: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._by_layer = covariances

    def input_covariance(self, layer: str, sampling_round: int = 0) -> Statistic:
        return Statistic(self._by_layer[layer], 1000)


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)], ids=str)
@pytest.mark.parametrize("tokens", [4000, 40])
def test_top_eigenvectors(shape: tuple[int, int], tokens: int) -> None:
    W, C = outlier_problem(*shape, tokens)
    values, vectors = torch.linalg.eigh(C.double())
    method, layer = EVA(EVAOptions(rank=12, alpha=6.0)), Layer("layer", *shape)
    finding = method.examine(layer, W, Held(C))
    expected = values.flip(0)[:24] / values.sum()
    assert torch.allclose(torch.tensor(finding["explained_variance"]).double(), expected, atol=1e-7)
    for rank in (1, 12, 24):
        initial = method.initialise(layer, W, rank, Held(C), finding)
        assert not initial.residual
        assert torch.equal(initial.B, torch.zeros(shape[0], rank))
        assert initial.A.shape == (rank, shape[1])
        assert torch.allclose(
            (initial.A.double() @ vectors.flip(1)[:, :rank]).abs(), torch.eye(rank).double(), atol=1e-4
        )
        assert (initial.A.gather(1, initial.A.abs().argmax(1, keepdim=True)) > 0).all()  # one sign on any machine
        assert initial.report["explained_variance_total"] == pytest.approx(float(expected[:rank].sum()), rel=1e-6)
    assert method.scaling() == 0.5


def ranks(findings: dict[str, list[float]], rank: int, rho: float = 2.0) -> dict[str, int]:
    layers = [Layer(name, 64, 64) for name in findings]
    return EVA(EVAOptions(rank=rank, rho=rho)).ranks(
        layers, {n: {"explained_variance": v} for n, v in findings.items()}
    )


def test_ranks_by_explained_variance() -> None:
    """Σ r components; a layer may get none; of equal ratios the earlier layer's is taken."""
    findings = {"a": [0.5, 0.3, 0.1, 0.05], "b": [0.2, 0.04, 0.03, 0.02], "c": [0.9, 0.02, 0.01, 0.0]}
    assert ranks(findings, 2) == {"a": 4, "b": 1, "c": 1}
    assert ranks(findings, 1) == {"a": 2, "b": 0, "c": 1}
    assert ranks({"q": [0.6, 0.3], "k": [0.6, 0.3], "v": [0.6, 0.3]}, 1) == {"q": 1, "k": 1, "v": 1}
    assert ranks({"q": [0.6, 0.3], "o": [0.9, 0.5], "k": [0.6, 0.3]}, 1) == {"q": 1, "o": 1, "k": 1}
    assert ranks({"dead": [0.0, 0.0], "alive": [0.9, 0.1]}, 2) == {"dead": 0, "alive": 2}


def test_no_layer_gets_more_than_rho_times_the_rank() -> None:
    W, C = outlier_problem(20, 40, 4000)
    for rho, most in ((1.0, 6), (1.5, 9), (2.0, 12), (10.0, 20)):
        method = EVA(EVAOptions(rank=6, rho=rho))
        assert len(method.examine(Layer("layer", 20, 40), W, Held(C))["explained_variance"]) == most


def test_layer_whose_input_is_zero() -> None:
    method, layer = EVA(EVAOptions(rank=2)), Layer("layer", 8, 8)
    assert method.examine(layer, torch.eye(8), Held(torch.zeros(8, 8))) == {"explained_variance": [0.0] * 4}
    assert method.statistics().data == "target"


class Odd(nn.Module):
    """q and k read the same input, o and down others. f(−x) = −f(x), so the inputs of every layer have mean zero.

    One direction stands out in o's input and in down's, so that there is something to redistribute.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.o, self.down = (nn.Linear(24, 24, bias=False) for _ in range(4))
        for layer in (self.q, self.k, self.o, self.down):
            layer.weight = nn.Parameter(torch.linalg.qr(torch.randn(24, 24, generator=generator))[0] / 4)
        with torch.no_grad():
            for layer in (self.q, self.k):
                layer.weight *= torch.logspace(0, -4, 24)[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.q(x) + torch.tanh(self.k(x))
        return self.down(torch.tanh(self.o(attended)))


@pytest.mark.parametrize("batches", [1, 4])
def test_the_same_as_peft(batches: int) -> None:
    """PEFT's loop over batches settles on our subspaces and our ranks; ours come from sums over all of them."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    model, rank = Odd(), 3
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(800, 24, generator=generator) * torch.logspace(0.5, -0.5, 24)
    x = torch.stack([x, -x], dim=1).flatten(0, 1)  # each batch has every row and its opposite
    config = LoraConfig(
        r=rank,
        target_modules=["q", "k", "o", "down"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, tau=0.9999),
    )
    theirs = get_eva_state_dict(
        model,
        x.chunk(batches),
        config,
        forward_fn=lambda module, rows: module(rows),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )

    covariances: dict[str, torch.Tensor] = {}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: covariances.update({name: inputs[0].T @ inputs[0] / len(x)})
        )
    with torch.no_grad():
        model(x)
    method, held = EVA(EVAOptions(rank=rank)), ByLayer(covariances)
    layers = describe(modules)
    findings = {layer.name: method.examine(layer, modules[layer.name].weight, held) for layer in layers}
    ours = method.ranks(layers, findings)
    assert ours == {name: len(vectors) for name, vectors in theirs.items()}
    assert sum(ours.values()) == rank * len(layers)
    assert len(set(ours.values())) > 1  # there was something to redistribute
    for layer in layers:
        initial = method.initialise(layer, modules[layer.name].weight, ours[layer.name], held, findings[layer.name])
        cosines = torch.linalg.svdvals(initial.A @ theirs[layer.name].T.float())
        assert float(cosines.min()) >= 0.999
