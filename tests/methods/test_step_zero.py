"""At step 0 every method computes what the base computes, and the anchor's divergence is nothing."""

import torch

from harness.adapters.lora import original_model, read_adapter, read_layers
from harness.config import AnchorConfig, RunConfig
from harness.data.tokenisation import Row
from harness.files import read_json
from harness.methods.base import Method
from harness.methods.registry import method_class
from harness.run_directory import RunDirectory
from harness.stages.train import preserve_rows
from harness.tasks.registry import load_task
from harness.training.checkpoint import trained_parameters
from harness.training.penalties.anchor import Anchor, original_logits, token_divergence
from harness.training.penalties.base import MicroStep, PenaltySetup
from tests.methods.runs import RANK, base_model, largest, live_model, logits, perturb, prompts

Started = tuple[RunConfig, RunDirectory]


def test_outputs_equal_the_base(started: Started) -> None:
    base = logits(base_model(started[0]))
    for needs_original in (False, True):
        model = live_model(*started, needs_original=needs_original)
        equal = largest(logits(model), base) <= 1e-4 * float(base.abs().max())
        assert equal == method_class(started[0].method["name"]).starts_at_base
    with original_model(model):
        assert largest(logits(model), base) <= 1e-4 * float(base.abs().max())


def test_anchor_is_zero(started: Started) -> None:
    """Through the penalty itself: original_logits first, then the divergence of the live logits on the same rows."""
    config, run = started
    model = live_model(config, run).train()
    task = load_task(config.model_copy(update={"anchor": AnchorConfig()}))
    rows: list[Row] = preserve_rows(task)
    anchor = Anchor(AnchorConfig(kl=1.0, prompts_per_step=4), PenaltySetup(rows, task.pad_id, 0))
    at = MicroStep(step=0, part=0, parts=1)
    batch = anchor.rows(at)
    assert batch is not None
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def divergence() -> float:
        prepared = anchor.before(model, at, batch, batch)
        value = anchor.penalty(model, at, batch, model(**inputs, use_cache=False).logits, prepared)
        assert value.requires_grad
        return value.item()

    assert (abs(divergence()) <= 1e-5) == method_class(config.method["name"]).starts_at_base
    perturb(model, 0.5)
    assert divergence() > 1e-3  # a moved adapter has one, so 0 says something


def test_anchor_after_a_change_equals_a_second_copy_of_the_base(started: Started) -> None:
    config, run = started
    model, base, batch = live_model(config, run), base_model(config), prompts()
    perturb(model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        live, direct = model(**inputs).logits, base(**inputs).logits
    mask = batch["attention_mask"].bool()
    found = token_divergence(original_logits(model, batch).logits, live)[mask].mean()
    expected = token_divergence(direct, live)[mask].mean()
    assert float(expected) > 1e-3
    assert abs(float(found - expected)) <= 1e-4


def test_report(started: Started) -> None:
    config, run = started
    report = read_json(run.init / "report.json")
    assert report["method"] == config.method["name"]
    adapter = read_adapter(run.init)
    assert {name for name, layer in report["layers"].items() if layer["rank"] > 0} == adapter.keys()
    for name, factor in adapter.items():
        layer = report["layers"][name]
        assert layer["rank"] == factor.A.shape[0] == factor.B.shape[1]
        assert layer["shape"] == [factor.B.shape[0], factor.A.shape[1]]
        assert layer["residual"] == bool(factor.B.any())  # what the adapter adds at step 0 was taken out of the base
    if method_class(config.method["name"]).examine is Method.examine:
        assert {layer["rank"] for layer in report["layers"].values()} == {RANK}


def test_only_the_adapter_is_trained(started: Started) -> None:
    config, run = started
    model = live_model(*started)
    frozen = {"lora_bound"}
    if config.method["name"] == "lora_fa" or config.method.get("freeze_a", False):
        frozen |= {"lora_A.weight"}
    expected = {f"{layer}.{name}" for layer, own in read_layers(run.init).items() for name in own if name not in frozen}
    assert {name for name, _ in trained_parameters(model)} == expected
    with original_model(model):  # PEFT switches what is trainable
        assert not list(trained_parameters(model))
    assert {name for name, _ in trained_parameters(model)} == expected
