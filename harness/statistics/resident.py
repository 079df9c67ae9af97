"""Statistics with the whole model at hand: hooks on all of its layers, one pass per batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.data.collation import Batch
from harness.errors import UserError
from harness.models.calling import arguments
from harness.models.freezing import gradients_of_activations
from harness.statistics.collector import OF_INPUTS, Collector, Quantity, Tokens
from harness.statistics.loss import Labels, labelled_loss
from harness.statistics.reduction import Reduction, token_counts


def collect_resident(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    groups: Mapping[str, str],
    batches: Iterable[Batch],
    kinds: Sequence[Quantity],
    labels: Labels,
    reduction: Reduction,
    held: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Quantity, str, torch.Tensor, int]]:
    """Collect ``kinds`` over all ranks' batches in one pass per batch, then yield what this rank owns, one at a time.

    All sums are resident on the model's device at once, in fp32: for a 7B Llama 12 GB of input covariances and 24 GB of
    output-gradient covariances (half of each matrix). Dropout is off, and the model is left as it was.

    Args:
        modules: target layers by name.
        groups: layer → first layer of its group, as `input_groups` returns it.
        batches: padded batches of this rank.
        held: called while all sums stand and nothing is reduced yet.

    Yields:
        kind, layer (of inputs: group), mean over tokens (on the model's device), number of tokens.

    Raises:
        UserError: an activation or gradient is NaN or inf (the message names layer and batch), a layer does not read
            one row per token, no gradient can reach it, or there is no token to count.
    """
    device = next(model.parameters()).device
    collector = Collector(modules, groups, kinds, device)
    training = model.training
    with collector.attached():
        try:
            if set(kinds) <= set(OF_INPUTS):
                _forward_passes(model, collector, batches, labels)
            else:
                model.eval()
                _backward_passes(model, collector, batches, labels)
        finally:
            model.train(training)
    held()
    yield from means(collector, reduction)


def means(collector: Collector, reduction: Reduction) -> Iterator[tuple[Quantity, str, torch.Tensor, int]]:
    """What `collect_resident` yields, of any collector that has seen its batches. Collective."""
    counts = token_counts(collector)
    for kind, name, total in reduction.owned(collector.sums):
        count = counts.of(kind, name)
        if count == 0:
            raise UserError(
                f"statistics: no sampled row comes to {name}, so nothing is known of it; sample rows with images, or "
                "list the layers to adapt without it"
            )
        yield kind, name, total.div_(count), count


@torch.no_grad()
def _forward_passes(model: nn.Module, collector: Collector, batches: Iterable[Batch], labels: Labels) -> None:
    body = _body(model, collector.modules)
    for number, batch in enumerate(batches):
        tokens = Tokens(number, batch, collector.device, labels.objective)
        collector.begin(tokens)
        body(**arguments(model, tokens.inputs()))
        collector.check()


def _backward_passes(model: nn.Module, collector: Collector, batches: Iterable[Batch], labels: Labels) -> None:
    with gradients_of_activations(model), torch.enable_grad():
        for number, batch in enumerate(batches):
            tokens = Tokens(number, batch, collector.device, labels.objective)
            collector.begin(tokens)
            inputs = tokens.inputs()
            logits = labels.objective.logits(model(**arguments(model, inputs)), inputs)
            collector.check()
            labelled_loss(logits, tokens, labels).backward()
            del logits
            collector.check()


def _body(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """The part of ``model`` that runs all ``layers``: without the output embedding, which only a loss needs."""
    if not isinstance(model, PreTrainedModel):
        return model
    prefix = f"{model.base_model_prefix}."
    return model.base_model if all(layer.startswith(prefix) for layer in layers) else model
