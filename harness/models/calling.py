"""Calling a model on a batch, whatever kind of model it is and however it is wrapped."""

from typing import Any

import torch
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
    """Keyword arguments of ``model``'s forward for a batch; one that generates keeps no cache of keys and values.

    Pixels become what the model computes in: not every model sees to that itself.
    """
    own = innermost(model)
    generates = getattr(own, "can_generate", lambda: False)()
    dtype = getattr(own, "dtype", torch.float32)
    inputs = {
        n: tensor.to(dtype) if tensor.is_floating_point() else tensor for n, tensor in model_inputs(batch).items()
    }
    return {**inputs, **({"use_cache": False} if generates else {})}
