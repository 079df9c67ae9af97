"""KL in chunks: value and gradient against float64 written out, and how much memory is made on the way."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.training import divergence
from harness.training.divergence import Logits, TopK, summed_divergence, token_divergence, top_k

ROWS, LENGTH, VOCABULARY = 3, 7, 33
PLACES = [0, 2, 3, 9, 13, 20]


def logits(seed: int, rows: int = ROWS, length: int = LENGTH, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Float64 logits with a few that tower above the rest."""
    generator = torch.Generator().manual_seed(seed)
    made = 2 * torch.randn(rows, length, vocabulary, generator=generator, dtype=torch.float64)
    made[..., 3] += 6
    made[0] *= 8
    return made


def direct(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Σ_v p (log p - log q) at every position, from exponentials."""
    p, q = ((x / temperature - (x / temperature).amax(-1, keepdim=True)).exp() for x in (p_logits, q_logits))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1)


def direct_top_k(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float, k: int) -> torch.Tensor:
    """The divergence of the two distributions whose outcomes are the k tokens most probable under p, and "another"."""
    p, q = ((x / temperature).softmax(-1) for x in (p_logits, q_logits))
    order = p.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)

    def coarse(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., :k], x[..., k:].sum(-1, keepdim=True)], -1) if k < x.shape[-1] else x

    return (coarse(p) * (coarse(p) / coarse(q)).log()).sum(-1)


def value_and_gradient(of: Any, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = at.clone().requires_grad_()
    value = of(at)
    (3.0 * value).backward()
    assert at.grad is not None
    return value.detach(), at.grad / 3


@pytest.fixture(params=[1, 2 * VOCABULARY, 2**22], ids=["a row", "two rows", "one chunk"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK", request.param)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=str
)
def test_equals_the_direct_one(dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    ours, theirs = logits(0).to(dtype), logits(1).to(dtype)
    places = torch.tensor(PLACES)
    expected = value_and_gradient(
        lambda x: direct(theirs.double(), x, temperature).flatten()[places].sum(), ours.double()
    )
    reference = Logits(theirs.flatten(0, 1), places, temperature)
    found = value_and_gradient(lambda x: summed_divergence(x, places, reference, temperature), ours)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=tolerance)
    assert found[1].dtype == dtype
    assert float((found[1].double() - expected[1]).norm() / expected[1].norm()) <= tolerance
    untouched = torch.ones(ROWS * LENGTH, dtype=torch.bool)
    untouched[places] = False
    assert found[1].flatten(0, 1)[untouched].eq(0).all()
    tokens = token_divergence(theirs, ours, temperature)
    assert torch.allclose(tokens.double(), direct(theirs.double(), ours.double(), temperature), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 20, VOCABULARY - 1, VOCABULARY, 1000])
def test_top_k_equals_the_direct_one(k: int, temperature: float) -> None:
    theirs, ours = logits(1), logits(0)
    places, order = torch.tensor(PLACES), torch.tensor([9, 0, 3, 20, 13, 2])
    kept = top_k(theirs.flatten(0, 1), order, k, temperature)
    assert kept.indices.shape == (len(PLACES), min(k, VOCABULARY))
    assert kept.indices.dtype == torch.int32
    expected = value_and_gradient(lambda x: direct_top_k(theirs, x, temperature, k).flatten()[places].sum(), ours)
    found = value_and_gradient(lambda x: summed_divergence(x, order, kept, temperature), ours)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)  # kept in fp32
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) <= 1e-6


def test_a_lower_bound_that_closes_with_k() -> None:
    theirs, ours, places = logits(1), logits(0), torch.arange(ROWS * LENGTH)
    full = float(direct(theirs, ours, 1.0).sum())
    bounds = []
    for k in (1, 2, 5, 12, 25, VOCABULARY):
        kept = top_k(theirs.flatten(0, 1), places, k)
        bounds.append(float(summed_divergence(ours, places, kept)))
    assert all(low <= high * (1 + 1e-6) for low, high in pairwise(bounds))
    assert bounds[0] < 0.99 * full
    assert bounds[-1] == pytest.approx(full, rel=1e-6)


def test_a_tail_too_small_for_a_number() -> None:
    """Where q gives the others less than the smallest fp32 number, and where p does."""
    there, gone = torch.tensor([[0.02, 0.01, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -200.0, -210.0]])
    places = torch.tensor([0])
    for theirs, ours in ((there, gone), (gone, there), (gone, gone)):
        kept = top_k(theirs, places, 2)
        tail_first = direct_top_k(theirs.double(), ours.double(), 1.0, 2)
        expected = value_and_gradient(lambda x, p=theirs: direct_top_k(p.double(), x, 1.0, 2).sum(), ours.double())
        value, gradient = value_and_gradient(lambda x, kept=kept: summed_divergence(x, places, kept), ours)
        assert float(value) == pytest.approx(float(tail_first), rel=1e-5, abs=1e-12)
        assert torch.allclose(gradient.double(), expected[1], atol=1e-6)


def test_equal_distributions() -> None:
    """The value is 0 and so is the gradient, whatever constants the logits carry."""
    theirs, places = logits(1).float(), torch.tensor(PLACES)
    reference = Logits(theirs.flatten(0, 1), places)
    for made in (reference, top_k(theirs.flatten(0, 1), places, 5)):
        value, gradient = value_and_gradient(lambda x, r=made: summed_divergence(x, places, r), theirs + 11)
        assert abs(float(value)) <= 1e-5
        assert float(gradient.abs().max()) <= 1e-6


def test_no_places_and_no_gradient() -> None:
    nothing = torch.tensor([], dtype=torch.long)
    value, gradient = value_and_gradient(
        lambda x: summed_divergence(x, nothing, Logits(logits(1).flatten(0, 1), nothing)), logits(0)
    )
    assert float(value) == 0.0
    assert gradient.eq(0).all()
    places = torch.tensor(PLACES)
    assert not summed_divergence(logits(0), places, Logits(logits(1).flatten(0, 1), places)).requires_grad


def test_the_gradient_is_given_out_once() -> None:
    ours, places = logits(0).requires_grad_(), torch.tensor(PLACES)
    value = summed_divergence(ours, places, Logits(logits(1).flatten(0, 1), places))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        value.backward()


class Made(TorchDispatchMode):
    """Counts the bytes of every new storage that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._seen: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in args:
            if isinstance(argument, torch.Tensor):
                self._seen.setdefault(argument.untyped_storage().data_ptr(), argument.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._seen:
                    self._seen[storage.data_ptr()] = storage  # kept, so that no address comes twice
                    self.sizes.append(storage.nbytes())
        return result


@pytest.mark.parametrize("cached", [False, True])
def test_memory_is_bounded_by_the_chunk(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows, length and vocabulary: one gradient, and otherwise nothing larger than a chunk in fp32."""
    monkeypatch.setattr(divergence, "CHUNK", 4096)
    ours = torch.randn(4, 40, 2000).bfloat16().requires_grad_()
    theirs = torch.randn(160, 2000).bfloat16()
    places = torch.arange(160)
    with Made() as made:
        reference = top_k(theirs, places, 8) if cached else Logits(theirs, places)
        summed_divergence(ours, places, reference).backward()
    whole = ours.numel() * 2
    assert sum(size >= whole for size in made.sizes) == 1
    assert max(size for size in made.sizes if size < whole) <= 4096 * 8  # an int64 index of a chunk would be the most
    assert sum(made.sizes) > whole


def test_kept_exactly_enough() -> None:
    """Halving what is kept would cost accuracy: log-probabilities in fp16 are off by up to 2⁻¹¹ of themselves."""
    theirs, ours, places = logits(1), logits(0) * 0.05 + logits(1) * 0.95, torch.arange(ROWS * LENGTH)
    kept = top_k(theirs.flatten(0, 1), places, 8)
    exact = float(direct_top_k(theirs, ours, 1.0, 8).sum())
    half = TopK(kept.indices, kept.log_probabilities.half().float(), kept.log_tail.half().float())
    errors = [abs(float(summed_divergence(ours, places, made)) / exact - 1) for made in (kept, half)]
    assert errors[0] <= 1e-5
    assert errors[1] > 10 * errors[0]
