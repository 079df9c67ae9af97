"""The head of a classifier whose base had one already: rows kept, rows added, or all of them drawn anew."""

from typing import TYPE_CHECKING

import torch

from harness.config import ModelConfig
from harness.console import say
from harness.errors import UserError
from harness.models.loading import auto_class, whole_weights
from harness.models.weights import BaseWeights, empty_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def head_parameters(model: "nn.Module") -> "dict[str, nn.Parameter]":
    """The parameters outside a model's body, by name.

    Raises:
        UserError: there are none: the model keeps its classifier within its body.
    """
    body = f"{model.base_model_prefix}."
    found = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(body)}
    if not found:
        raise UserError(
            f"model.path: {type(model).__name__} keeps its classifier within its body, which task "
            "'image_classification' does not cover; give a model whose head stands beside its body (ViT, Swin, "
            "ConvNeXt-V2)"
        )
    return found


@torch.no_grad()
def draw_anew(model: "PreTrainedModel", config: ModelConfig, names: set[str]) -> None:
    """Draw the head's parameters ``names`` of ``model``, as transformers draws those of a base that has none."""
    with whole_weights():
        fresh = head_parameters(auto_class(config.task).from_config(model.config, dtype=model.dtype))
    head = head_parameters(model)
    for name in names:
        head[name].copy_(fresh[name])


@torch.no_grad()
def keep_old_rows(model: "PreTrainedModel", base: ModelConfig, drawn: set[str]) -> set[str]:
    """Put the rows of the head at ``base`` before the new ones of ``model``'s larger head.

    Args:
        drawn: parameters of ``model`` that were drawn because they did not fit.

    Returns:
        Those of ``drawn`` that have old rows now.

    Raises:
        UserError: a parameter of the head does not have a row for each class.
    """
    old = empty_model(base)
    weights, known = BaseWeights(base, old), head_parameters(old)
    extended, kept_rows = set(), old.config.num_labels
    for name, parameter in head_parameters(model).items():
        if name not in drawn:
            continue
        kept = weights.read(name) if name in known else None
        if kept is None or kept.shape[1:] != parameter.shape[1:] or len(kept) != kept_rows:
            raise UserError(
                f"model.head: extended given, and {name} of {base.path} does not have a row for each class; set "
                "model.head: new"
            )
        parameter[:kept_rows] = kept
        extended.add(name)
    say(f"model.head: {kept_rows} old classes kept, {model.config.num_labels - kept_rows} new ones drawn by train.seed")
    return extended
