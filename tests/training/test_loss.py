"""The losses against naive loops."""

import math
from pathlib import Path

import pytest
import torch

from harness.config import ModelConfig
from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.models.loading import load_model
from harness.tasks.objectives import NEXT_TOKEN
from harness.training.penalties.anchor import token_divergence
from harness.training.preserve import token_means

ROWS = [
    Row([3, 4, 5, 6, 7], [IGNORED, IGNORED, 5, 6, 7]),
    Row([8, 9, 10], [8, 9, 10]),
    Row([11, 12], [IGNORED, 12]),
    Row([13, 14, 15, 16], [IGNORED] * 4),
    Row([17], [17]),
]


def naive_loss(logits: torch.Tensor, row: Row) -> tuple[float, int]:
    """Sum and number of −log p(next token) over one row's labelled tokens; nothing predicts the first token."""
    total, count = 0.0, 0
    for position in range(1, len(row.input_ids)):
        if row.labels[position] != IGNORED:
            scores = logits[position - 1].double()
            total -= float(scores[row.labels[position]] - scores.logsumexp(0))
            count += 1
    return total, count


def test_response_loss() -> None:
    batch = collate(ROWS, pad_id=2)
    logits = torch.randn(*batch["input_ids"].shape, 40, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for number, row in enumerate(ROWS):
        real = logits[number][batch["attention_mask"][number].bool()]
        expected += naive_loss(real, row)[0]
    assert float(NEXT_TOKEN.loss(logits, batch["labels"])) == pytest.approx(expected, rel=1e-5)


def test_response_loss_without_labels_is_zero() -> None:
    logits = torch.randn(1, 3, 40, requires_grad=True)
    loss = NEXT_TOKEN.loss(logits, torch.full((1, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_response_loss_of_half_precision_is_summed_in_fp32() -> None:
    logits = torch.randn(4, 200, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(0, 40, (4, 200), generator=torch.Generator().manual_seed(1))
    loss = NEXT_TOKEN.loss(logits, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(NEXT_TOKEN.loss(logits.double(), labels)), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_token_means(random_base: Path, batch_size: int) -> None:
    """Means over tokens, not over rows or batches; the model's mode is left as it was."""
    model = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    sums, right = [0.0, 0], 0
    # Rows that the model partly predicts right: what it says to each row of ROWS, in every other place.
    rows = []
    with torch.no_grad():
        for row in ROWS:
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            said = [IGNORED, *logits.argmax(-1).tolist()][: len(row.labels)]
            labels = [
                own if label != IGNORED and place % 2 else label
                for place, (own, label) in enumerate(zip(said, row.labels, strict=True))
            ]
            rows.append(Row(row.input_ids, labels))
            part = naive_loss(logits, rows[-1])
            sums = [sums[0] + part[0], sums[1] + part[1]]
            right += sum(own == label for own, label in list(zip(said, labels, strict=True))[1:] if label != IGNORED)
    assert 0 < right < sums[1]
    for training in (True, False):
        model.train(training)
        found = token_means(model, rows, 2, batch_size)
        assert found.loss == pytest.approx(sums[0] / sums[1], rel=1e-5)
        assert found.accuracy == pytest.approx(right / sums[1])
        assert model.training == training


def test_divergence_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    original, adapted = (5 * torch.randn(3, 7, 40, generator=generator) for _ in range(2))
    expected = torch.nn.functional.kl_div(
        adapted.double().log_softmax(-1), original.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    found = token_divergence(original, adapted)
    assert found.shape == (3, 7)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert float(token_divergence(original, original).abs().max()) == 0.0


def test_divergence_has_a_direction() -> None:
    """KL(original ‖ adapted): probability that the original gives and the adapted model takes away is what costs."""
    original, adapted = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, math.log(3.0)]]])
    # p = (1/2, 1/2), q = (1/4, 3/4)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert token_divergence(original, adapted).item() == pytest.approx(expected, rel=1e-5)
    assert token_divergence(adapted, original).item() != pytest.approx(expected, rel=1e-2)


def test_divergence_of_extreme_logits_is_finite() -> None:
    original, adapted = torch.tensor([[[200.0, -200.0, 0.0]]]), torch.tensor([[[-200.0, 200.0, 0.0]]])
    assert token_divergence(original, adapted).item() == pytest.approx(400.0)
    assert token_divergence(original.half(), adapted.half()).item() == pytest.approx(400.0)
