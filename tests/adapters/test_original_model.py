"""The original model, reached through a model whose adapter has moved; and everything put back afterwards."""

import pytest
import torch
from torch import nn

from harness.adapters.lora import INITIAL, TRAINED, lora_layers, original_model
from harness.config import RunConfig
from harness.run_directory import RunDirectory
from harness.stages.initialise import subtracted_blocks
from harness.training.penalties.anchor import original_logits
from tests.methods.runs import base_model, largest, live_model, logits, perturb, prompts

Started = tuple[RunConfig, RunDirectory]


def state(model: nn.Module) -> dict[str, tuple[bool, torch.Tensor, torch.Tensor | None]]:
    return {
        name: (p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }


def test_equals_the_base_after_a_change(started: Started) -> None:
    model, base = live_model(*started), logits(base_model(started[0]))
    perturb(model)
    moved = logits(model)
    assert largest(moved, base) > 0.1
    with original_model(model):
        assert largest(logits(model), base) <= 1e-5
    assert torch.equal(logits(model), moved)
    batch = prompts()
    assert largest(original_logits(model, batch).logits[batch["attention_mask"].bool()], base) <= 1e-5


def test_everything_is_put_back(started: Started) -> None:
    model, batch = live_model(*started).train(), prompts()
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    output.logsumexp(-1).sum().backward()
    before = state(model)
    assert any(gradient is not None and gradient.abs().max() > 0 for _, _, gradient in before.values())
    with original_model(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    original_logits(model, batch)
    with pytest.raises(KeyError), original_model(model):
        raise KeyError
    assert model.training
    after = state(model)
    assert before.keys() == after.keys()
    for name, (trained, value, gradient) in before.items():
        assert after[name][0] == trained, name
        assert torch.equal(after[name][1], value)
        assert (after[name][2] is None) == (gradient is None)
        assert gradient is None or torch.equal(after[name][2], gradient)
    assert all(layer.active_adapters == [TRAINED] for layer in lora_layers(model).values())


def test_no_gradient_reaches_the_initial_adapter(started: Started) -> None:
    model, batch = live_model(*started).train(), prompts()
    original_logits(model, batch)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    output.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (f".{TRAINED}." in name and parameter.requires_grad), name


def test_the_initial_adapter_is_there_only_where_it_is_needed(started: Started) -> None:
    """No second copy of anything where adapters can simply be switched off, or where nothing asks for the original."""
    residual = bool(subtracted_blocks(started[1].init))
    assert (INITIAL in live_model(*started).peft_config) == residual
    assert INITIAL not in live_model(*started, needs_original=False).peft_config
