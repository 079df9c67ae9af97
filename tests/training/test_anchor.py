"""Which prompts the anchor takes, what it looks at, and how a step's penalty is put together from its passes."""

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from harness.adapters.lora import attach_lora, load_factors
from harness.config import AnchorConfig, ModelConfig
from harness.data.collation import collate, stack
from harness.data.sampling import seed_for
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.methods.base import LowRank
from harness.methods.registry import build_method
from harness.models.loading import load_model
from harness.models.targets import target_modules
from harness.training.divergence import token_divergence
from harness.training.penalties.anchor import Anchor, original_logits, positions
from harness.training.penalties.base import MicroStep, Needs, PenaltySetup, Preparation
from harness.training.schedule import ScheduledRows
from tests.conftest import run_gang

LORA = build_method({"name": "lora", "rank": 4}, 0)
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
    assert float(expected.detach()) > 1e-3

    batch = collate([Row(list(range(3, 18)), []), Row([4, 5], [])], PAD)  # longer than every prompt
    total = torch.zeros(())
    for part in range(parts):
        at = MicroStep(step, part, parts)
        share = made.rows(at)
        prepared = made.before(adapted, at, share, batch)
        riding = batch if share is None else stack(batch, share, PAD)
        with torch.no_grad():
            logits = adapted(input_ids=riding["input_ids"], attention_mask=riding["attention_mask"]).logits[2:]
        total = total + made.penalty(adapted, at, share, None if share is None else logits, prepared)
    assert float(total) == pytest.approx(float(expected), rel=1e-4)


# -- what the anchor looks at, and what it is measured against -------------------------------------------------------

MIXED = [
    Row([5, 6, 7, 8, 9, 10], [IGNORED, IGNORED, IGNORED, 8, 9, 10]),
    Row([11, 12, 13], [11, 12, 13]),  # no answer: everything is labelled
    Row([14, 15, 16, 17], [IGNORED, 15, 16, 17]),
    Row([3, 20, 21, 22, 23, 24, 25, 26], [IGNORED] * 6 + [25, 26]),
    Row([30, 31], [IGNORED, IGNORED]),  # cut before its answer
    *[Row([*range(40, 44 + n), n], [IGNORED] * (2 + n) + [IGNORED if n else 42, 43 + n, n]) for n in range(4)],
]


@pytest.mark.parametrize(
    ("row", "tokens", "expected"),
    [
        (MIXED[0], "all", [0, 1, 2, 3, 4, 5]),
        (MIXED[0], "last", [2]),
        (MIXED[0], "answer", [2, 3, 4]),
        (MIXED[1], "last", [2]),
        (MIXED[1], "answer", [0, 1]),
        (MIXED[2], "last", [0]),
        (MIXED[3], "answer", [5, 6]),
        (MIXED[4], "last", [1]),
        (MIXED[4], "answer", []),
        (Row([7, 8], []), "last", [1]),
        (Row([7], []), "all", [0]),
    ],
)
def test_positions(row: Row, tokens: str, expected: list[int]) -> None:
    assert list(positions(row, tokens)) == expected


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def direct_term(base: nn.Module, tuned: nn.Module, rows: list[Row], tokens: str, temperature: float) -> torch.Tensor:
    """T² · mean of KL over the looked-at positions, row by row without padding, in float64."""
    found = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            log_p = (base(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        log_q = (tuned(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        first = next((i for i, label in enumerate(row.labels) if label != IGNORED), len(row.input_ids))
        if tokens == "all":
            found.append(divergence)
        elif tokens == "last":
            found.append(divergence[(first if first > 0 else len(row.input_ids)) - 1].reshape(1))
        else:
            follows = [i - 1 for i in range(1, len(row.labels)) if row.labels[i] != IGNORED]
            found.append(divergence[follows])
    return temperature**2 * torch.cat(found).mean()


def step_term(made: Anchor, model: nn.Module, step: int, parts: int, batches: list[list[Row]]) -> torch.Tensor:
    """The anchor's term of a step as the trainer puts it together: every pass with its batch and riding rows."""
    total = torch.zeros((), dtype=torch.float64)
    for part, own in enumerate(batches):
        at, batch = MicroStep(step, part, parts), collate(own, PAD)
        share = made.rows(at)
        prepared = made.before(model, at, share, batch)
        joint = batch if share is None else stack(batch, share, PAD)
        logits = model(input_ids=joint["input_ids"], attention_mask=joint["attention_mask"]).logits
        ours, theirs = logits.split([len(own), len(logits) - len(own)])
        values = [
            made.penalty(model, at, share, None if share is None else theirs, prepared),
            made.batch_penalty(model, at, batch, ours, prepared),
        ]
        assert sum(value is None for value in values) == 1
        total = total + next(value for value in values if value is not None)
    return total


def trained_gradients(value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference": "cached"},
        {"tokens": "last", "temperature": 2.0},
        {"tokens": "last", "reference": "cached", "prompts": 3},
        {"tokens": "answer", "prompts": 4},
        {"tokens": "answer", "reference": "cached", "temperature": 0.5},
        {"data": "train"},
        {"data": "train", "tokens": "answer", "temperature": 3.0},
        {"data": "train", "tokens": "last"},
        {"data": "train", "reference": "cached", "tokens": "answer"},
        {"data": "train", "reference": "cached", "temperature": 2.0},
    ],
    ids=str,
)
def test_every_form_equals_the_direct_one(adapted: nn.Module, random_base: Path, options: dict[str, Any]) -> None:
    """Value and gradients, for 1, 2, 3 and 6 passes a step; cached with k = V."""
    base = double(load_model(ModelConfig(path=str(random_base), dtype="float32")))
    model, untrained = double(adapted), double(adapted)
    with torch.no_grad():
        for name, parameter in untrained.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    batch, steps, step = 6, 8, 3
    task = [Row([50 + n, *range(60, 63 + n % 4), 9], [IGNORED, IGNORED, *range(61, 63 + n % 4), 9]) for n in range(11)]
    training = ScheduledRows(task, steps, batch, 0, MIXED[:3], 0.3)
    setup = PenaltySetup(MIXED, PAD, 0, steps, training)
    made_of = AnchorConfig(**{"prompts_per_step": 4, "top_k": 10**6, **options})
    if made_of.reference == "cached":
        prepared = Anchor(made_of, setup).prepare(Preparation(untrained.eval(), LORA, None))
        setup = replace(setup, prepared=prepared)
    items = [training[item] for item in range(step * batch, (step + 1) * batch)]
    seen = Anchor(made_of, setup).step_prompts(step)
    if made_of.data == "train":
        assert seen == items
    else:
        assert len(seen) == 4
        assert len({tuple(row.input_ids) for row in seen}) == min(4, made_of.prompts or 4)
    expected = direct_term(base, model, seen, made_of.tokens, made_of.temperature)
    assert float(expected.detach()) > 1e-3
    direction = trained_gradients(expected, model)
    for parts in (1, 2, 3, 6):
        size = batch // parts
        batches = [items[part * size : (part + 1) * size] for part in range(parts)]
        found = step_term(Anchor(made_of, setup), model, step, parts, batches)
        tolerance = 1e-6 if made_of.reference == "cached" else 1e-9  # what is kept is fp32
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
        gradients = trained_gradients(found, model)
        assert float((gradients - direction).norm() / direction.norm()) <= tolerance
    assert model.training == adapted.training


def test_the_model_computes_only_logits_that_are_looked_at(adapted: nn.Module) -> None:
    rows_ = [MIXED[0], MIXED[3]]
    batch = collate(rows_, PAD)
    whole = original_logits(adapted, batch)
    some = original_logits(adapted, batch, [2, 5])
    assert whole.columns is None
    assert some.columns == [2, 5]
    assert some.logits.shape == (2, 2, whole.logits.shape[-1])
    assert torch.allclose(some.logits, whole.logits[:, [2, 5]], atol=1e-5)


def test_cached_is_a_lower_bound_of_live(adapted: nn.Module) -> None:
    """By k; and the same file whatever the order of asking."""
    untrained = double(adapted).eval()
    with torch.no_grad():
        for name, parameter in untrained.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    values = []
    for k in (1, 8, 64, 10**6):
        options = AnchorConfig(reference="cached", top_k=k)
        setup = PenaltySetup(MIXED, PAD, 0, 8)
        setup = replace(setup, prepared=Anchor(options, setup).prepare(Preparation(untrained, LORA, None)))
        values.append(float(step_term(Anchor(options, setup), double(adapted), 2, 1, [MIXED[:1]]).detach()))
    live = float(step_term(Anchor(AnchorConfig(), setup), double(adapted), 2, 1, [MIXED[:1]]).detach())
    assert values == sorted(values)
    assert values[0] < 0.9 * live
    assert values[-1] == pytest.approx(live, rel=1e-6)


def test_kept_for_other_rows(adapted: nn.Module) -> None:
    options = AnchorConfig(reference="cached")
    first = PenaltySetup(MIXED, PAD, 0, 8)
    prepared = Anchor(options, first).prepare(Preparation(adapted.eval(), LORA, None))
    for other in (replace(first, preserve=MIXED[::-1]), replace(first, preserve=[*MIXED, *MIXED], seed=1)):
        made = Anchor(options, replace(other, prepared=prepared))
        with pytest.raises(UserError, match="--force prepare"):
            for step in range(8):
                step_term(made, adapted, step, 1, [MIXED[:1]])


# -- how many prompts, how strong, and what it needs -----------------------------------------------------------------


def test_few_prompts_are_among_more() -> None:
    def used(prompts: int | None, seed: int = 0) -> set[int]:
        made = Anchor(AnchorConfig(prompts=prompts), PenaltySetup(rows(30), PAD, seed))
        return {number for step in range(30) for number in made.step_numbers(step)}

    sets = [used(count) for count in (1, 5, 16, 30, 100, None)]
    assert [len(own) for own in sets] == [1, 5, 16, 30, 30, 30]
    assert all(fewer <= more for fewer, more in pairwise(sets))
    assert used(5, seed=1) != sets[1]


def test_defaults_take_the_prompts_that_they_always_took() -> None:
    """Written down when the anchor had no options but two: rows in the order of permutations of the whole set."""
    generator = torch.Generator().manual_seed(seed_for("anchor", 0, 0))
    assert Anchor(AnchorConfig(), PenaltySetup(rows(30), PAD, 0)).step_numbers(2) == (
        torch.randperm(30, generator=generator)[8:12].tolist()
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kl": 2.0}, [2.0, 2.0, 2.0, 2.0, 2.0]),
        ({"kl": 2.0, "final_kl": 9.0}, [2.0, 2.0, 2.0, 2.0, 2.0]),
        ({"kl": 2.0, "schedule": "linear"}, [2.0, 1.5, 1.0, 0.5, 0.0]),
        ({"kl": 0.0, "final_kl": 4.0, "schedule": "linear"}, [0.0, 1.0, 2.0, 3.0, 4.0]),
        ({"kl": 2.0, "schedule": "cosine"}, [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0]),
        ({"kl": 1.0, "final_kl": 3.0, "schedule": "cosine"}, [1.0, 2 - 0.5**0.5, 2.0, 2 + 0.5**0.5, 3.0]),
    ],
    ids=str,
)
def test_schedules(options: dict[str, Any], expected: list[float]) -> None:
    made = Anchor(AnchorConfig(**options), PenaltySetup(rows(3), PAD, 0, steps=5))
    assert [made.weight_at(step) for step in range(5)] == pytest.approx(expected)
    assert made.weight == max(expected)
    short = Anchor(AnchorConfig(**options), PenaltySetup(rows(3), PAD, 0, steps=1))
    assert short.weight_at(0) == options["kl"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Needs(preserve=True, original_model=True)),
        ({"reference": "cached"}, Needs(preserve=True, preparation=True)),
        ({"tokens": "answer"}, Needs(preserve=True, original_model=True, answers=True)),
        ({"data": "train", "tokens": "answer"}, Needs(original_model=True)),
        ({"data": "train", "reference": "cached"}, Needs(preparation=True)),
    ],
    ids=str,
)
def test_needs(options: dict[str, Any], expected: Needs) -> None:
    assert Anchor.needs(AnchorConfig(**options)) == expected


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_live_and_cached_train_alike(random_base: Path, data_files: dict[str, Path], tmp_path: Path) -> None:
    """Two ranks under ZeRO-3 and one, live and cached (k = V), with replay and a falling β: the same run."""
    trained, terms = {}, {}
    for reference, ranks, zero in (("live", 2, 3), ("cached", 2, 3), ("cached", 1, 2)):
        name = f"{reference}-{ranks}"
        content = {
            "name": name,
            "model": {"path": str(random_base), "dtype": "float32"},
            "data": {
                "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a"},
                "preserve": {"path": str(data_files["preserve"]), "prompt": "q", "samples": 32},
                "max_length": 64,
                "replay": {"ratio": 0.25},
            },
            "method": {"name": "lora", "rank": 8},
            "anchor": {
                "kl": 2.0,
                "prompts_per_step": 5,
                "prompts": 20,
                "reference": reference,
                "top_k": 1000,
                "temperature": 1.5,
                "schedule": "cosine",
                "final_kl": 0.5,
            },
            "train": {
                "deepspeed": f"ds_configs/zero{zero}.json",
                "max_steps": 12,
                "batch_size": 12,
                "micro_batch_size": 3,
                "learning_rate": 1.0e-3,
                "save_steps": 12,
                "log_steps": 1,
            },
            "output_dir": str(tmp_path),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        run_gang(path, ranks)
        folder = tmp_path / name
        trained[name] = {}
        for file in sorted((folder / "checkpoints" / "step-12" / "trained").glob("*.safetensors")):
            trained[name] |= load_file(file)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        terms[name] = [line["anchor_kl"] for line in lines if "anchor_kl" in line]
    expected = trained.pop("live-2")
    assert len(terms["live-2"]) == 12
    assert terms["live-2"][-1] > 1e-3
    for name, found in trained.items():
        assert found.keys() == expected.keys()
        assert max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in found) <= 1e-3
        assert terms[name] == pytest.approx(terms["live-2"], rel=1e-3, abs=1e-5)
