"""A backward pass through a model whose weights get no gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gradients_of_activations(model: nn.Module) -> Iterator[None]:
    """Inside the block no weight has a gradient: the graph begins at the embeddings' output.

    So no weight gradient is ever allocated; hooks at layers see the gradients of what passes through them.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
        for weight in trained:
            weight.requires_grad_(True)
