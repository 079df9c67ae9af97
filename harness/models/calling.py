"""Calling a model on a batch, whatever kind of model it is and however it is wrapped."""

from typing import Any

from torch import nn

from harness.data.collation import Batch, model_inputs


def innermost(model: nn.Module) -> nn.Module:
    """The model itself, out of a DeepSpeed engine and PEFT's wrapper."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "optimizer") and hasattr(model, "module"):  # an engine, not a model with such a child
            model = model.module
        else:
            return model


def arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of ``model``'s forward for a batch; one that generates keeps no cache of keys and values."""
    generates = getattr(innermost(model), "can_generate", lambda: False)()
    return {**model_inputs(batch), **({"use_cache": False} if generates else {})}
