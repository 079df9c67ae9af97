"""Objectives against loops in float64, item by item."""

import math
from types import SimpleNamespace

import pytest
import torch

from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.tasks.objectives import MaskedToken, NextToken, Objective, RowClass, RowNumber, Span

VOCABULARY = 7


def token_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of three rows of five tokens, and labels of some of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((3, 5), IGNORED)
    labels[0, 1], labels[0, 4], labels[1, 0], labels[2, 2] = 3, 6, 2, 0
    return torch.randn(3, 5, VOCABULARY, generator=generator), labels


def negative_log_likelihood(logits: torch.Tensor, label: int) -> float:
    values = logits.double().tolist()
    return math.log(sum(math.exp(value) for value in values)) - values[label]


@pytest.mark.parametrize(("objective", "earlier"), [(MaskedToken(), 0), (NextToken(), 1)])
def test_tokens(objective: Objective, earlier: int) -> None:
    logits, labels = token_batch()
    expected, right, count = 0.0, 0, 0
    for row in range(3):
        for place in range(5):
            label = int(labels[row, place])
            if label == IGNORED or place < earlier:
                continue
            at = logits[row, place - earlier]
            expected += negative_log_likelihood(at, label)
            right += max(range(VOCABULARY), key=lambda token: float(at[token])) == label
            count += 1
    counted = objective.counted(labels)
    compared, targets = objective.compared(logits, counted), objective.targets(labels, counted)
    assert int(counted.sum()) == count
    assert float(objective.loss(logits, labels)) == pytest.approx(expected, rel=1e-6)
    assert float(objective.between(compared, targets)) == pytest.approx(expected, rel=1e-6)
    assert int(objective.right(compared, targets)) == right


def test_classes() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([2, 0, 1, 1])
    objective = RowClass()
    expected = sum(negative_log_likelihood(logits[row], int(labels[row])) for row in range(4))
    assert float(objective.loss(logits, labels)) == pytest.approx(expected, rel=1e-6)
    assert objective.counted(labels).tolist() == [[True]] * 4
    largest = [max(range(3), key=lambda c: float(logits[row, c])) for row in range(4)]
    assert int(objective.right(logits, labels)) == sum(
        found == label for found, label in zip(largest, labels.tolist(), strict=True)
    )


def test_numbers() -> None:
    outputs = torch.tensor([[1.5], [-2.0], [0.25]])
    labels = torch.tensor([1.0, 0.5, 0.25])
    objective = RowNumber()
    assert float(objective.loss(outputs, labels)) == pytest.approx(0.25 + 6.25 + 0.0, rel=1e-6)
    assert float(objective.loss(outputs.bfloat16(), labels)) == pytest.approx(6.5, rel=1e-6)  # in fp32 nevertheless
    assert int(objective.counted(labels).sum()) == 3
    assert int(objective.right(outputs, labels)) == 0


def test_drawn_numbers_have_the_likelihood_of_the_loss() -> None:
    """exp(−(y − ŷ)²)/√π: mean ŷ and variance ½; and the density at the quantile u is that of the loss."""
    uniform = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64).unsqueeze(1)
    drawn = RowNumber().drawn(torch.full((1000, 1), 3.0), uniform) - 3.0
    assert float(drawn.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(drawn.square().mean()) == pytest.approx(0.5, rel=0.01)
    for u, y in zip(uniform[::100, 0].tolist(), drawn[::100].tolist(), strict=True):
        assert 0.5 * (1 + math.erf(y)) == pytest.approx(u, abs=1e-9)
    assert RowNumber().drawn(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.float64)).isfinite().all()


def test_drawn_labels_invert_the_distribution() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(50, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = RowClass().drawn(logits, uniform).tolist()
    for row, u, found in zip(logits.double(), uniform[:, 0].tolist(), drawn, strict=True):
        weights = [math.exp(value) for value in row.tolist()]
        below = sum(weights[:found]) / sum(weights)
        assert below <= u <= below + weights[found] / sum(weights)


def span_batch(padding: int) -> tuple[SimpleNamespace, dict[str, torch.Tensor]]:
    """Two rows of four and three tokens; ``padding`` more places, on which the model says the most."""
    generator = torch.Generator().manual_seed(4)
    rows = [Row([5, 6, 7, 8], [], (1, 3)), Row([5, 6, 7], [], (0, 0))]
    batch = collate([*rows, *([Row([5] * (4 + padding), [], (0, 0))] if padding else [])], 0)
    batch = {name: tensor[:2] for name, tensor in batch.items()}
    start, end = (torch.randn(2, 4, generator=generator) for _ in range(2))
    loud = torch.full((2, padding), 50.0)
    start[1, 3] = end[1, 3] = 40.0  # padding too
    outputs = SimpleNamespace(start_logits=torch.cat([start, loud], 1), end_logits=torch.cat([end, loud], 1))
    return outputs, batch


@pytest.mark.parametrize("padding", [0, 3])
def test_spans_do_not_see_padding(padding: int) -> None:
    outputs, batch = span_batch(padding)
    objective = Span()
    expected, right = 0.0, 0
    for row, (length, ends) in enumerate([(4, (1, 3)), (3, (0, 0))]):
        for logits, place in zip((outputs.start_logits, outputs.end_logits), ends, strict=True):
            expected += negative_log_likelihood(logits[row, :length], place)
            right += max(range(length), key=lambda token: float(logits[row, token])) == place
    logits, labels = objective.logits(outputs, batch), batch["labels"]
    counted = objective.counted(labels)
    assert counted.tolist() == [[True, True]] * 2
    assert float(objective.loss(logits, labels)) == pytest.approx(expected, rel=1e-6)
    assert int(objective.right(objective.compared(logits, counted), objective.targets(labels, counted))) == right
    uniform = torch.full((4, 1), 0.999999, dtype=torch.float64)
    assert objective.drawn(objective.compared(logits, counted), uniform)[2:].max() <= 2  # no padding is drawn
