"""Which prompts the anchor takes, and how a step's penalty is put together from its passes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.adapters.lora import attach_lora, load_factors
from harness.config import AnchorConfig, ModelConfig
from harness.data.collation import collate, stack
from harness.data.tokenisation import Row
from harness.methods.base import LowRank
from harness.models.loading import load_model
from harness.models.targets import target_modules
from harness.training.penalties.anchor import Anchor, token_divergence
from harness.training.penalties.base import MicroStep, PenaltySetup

PAD = 2


def rows(count: int) -> list[Row]:
    return [Row([*range(3, 4 + number % 9), 20 + number], []) for number in range(count)]


def anchor(count: int, per_step: int, seed: int = 0) -> Anchor:
    return Anchor(AnchorConfig(kl=1.0, prompts_per_step=per_step), PenaltySetup(rows(count), PAD, seed))


def numbers(chosen: list[Row]) -> list[int]:
    return [row.input_ids[-1] - 20 for row in chosen]


@settings(deadline=None)
@given(count=st.integers(1, 30), per_step=st.integers(1, 12), seed=st.integers(0, 3))
def test_one_pass_over_the_set_has_every_prompt_once(count: int, per_step: int, seed: int) -> None:
    made = anchor(count, per_step, seed)
    steps = 3 * count // per_step + 1
    found = [number for step in range(steps) for number in numbers(made.step_prompts(step))]
    for start in range(0, len(found) - count + 1, count):
        assert sorted(found[start : start + count]) == list(range(count))


def test_depends_on_seed_and_step_alone() -> None:
    """Whatever was asked before: a resumed run takes the prompts that it would have taken."""
    made, resumed = anchor(30, 4), anchor(30, 4)
    path = [numbers(made.step_prompts(step)) for step in range(40)]
    for step in (39, 0, 17, 7, 8, 7):
        assert numbers(resumed.step_prompts(step)) == path[step]
    assert len({tuple(step) for step in path}) == 40
    assert [numbers(anchor(30, 4, seed=1).step_prompts(step)) for step in range(40)] != path


@settings(deadline=None)
@given(per_step=st.integers(1, 12), ranks=st.integers(1, 4), accumulation=st.integers(1, 4), step=st.integers(0, 9))
def test_shares_partition_the_step(per_step: int, ranks: int, accumulation: int, step: int) -> None:
    made = anchor(30, per_step)
    parts = ranks * accumulation
    shares = [made.rows(MicroStep(step, part, parts)) for part in range(parts)]
    found = []
    for share in shares:
        if share is not None:
            for ids, mask in zip(share["input_ids"], share["attention_mask"], strict=True):
                found.append(ids[mask.bool()].tolist())
    assert sorted(found) == sorted(row.input_ids for row in made.step_prompts(step))
    sizes = [0 if share is None else len(share["input_ids"]) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.fixture(scope="module")
def adapted(random_base: Path) -> nn.Module:
    model = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: LowRank(
            0.1 * torch.randn(module.out_features, 4, generator=generator),
            0.1 * torch.randn(4, module.in_features, generator=generator),
            1.0,
        )
        for name, module in target_modules(model, "all-linear").items()
    }
    peft_model = attach_lora(model, dict.fromkeys(factors, 4), 1.0)
    load_factors(peft_model, factors)
    return peft_model


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_passes_add_up_to_the_mean_over_tokens(adapted: nn.Module, random_base: Path, parts: int) -> None:
    """The penalty of a step is a mean over all its tokens, however many passes share them, with rows riding along."""
    made = anchor(30, 5)
    base = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    step = 3
    divergences = []
    with torch.no_grad():
        for row in made.step_prompts(step):
            ids = torch.tensor([row.input_ids])
            divergences.append(token_divergence(base(input_ids=ids).logits, adapted(input_ids=ids).logits)[0])
    expected = torch.cat(divergences).mean()
    assert float(expected) > 1e-3

    batch = collate([Row(list(range(3, 18)), []), Row([4, 5], [])], PAD)  # longer than every prompt
    total = torch.zeros(())
    for part in range(parts):
        at = MicroStep(step, part, parts)
        share = made.rows(at)
        prepared = made.before(adapted, at, share)
        riding = batch if share is None else stack(batch, share, PAD)
        with torch.no_grad():
            logits = adapted(input_ids=riding["input_ids"], attention_mask=riding["attention_mask"]).logits[2:]
        total = total + made.penalty(adapted, at, share, None if share is None else logits, prepared)
    assert float(total) == pytest.approx(float(expected), rel=1e-4)
