"""A backward pass through a model whose weights get no gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from harness.models.targets import projector_of


@contextmanager
def gradients_of_activations(model: nn.Module) -> Iterator[None]:
    """Inside the block no weight has a gradient: the graph begins at the embeddings' output, or at the pixels.

    In a vision-language model it begins at what the projector reads, too: the vision tower has no part in it. So no
    weight gradient is ever allocated; hooks at layers see the gradients of what passes through them.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":  # not all of these name their embeddings
        handles = [model.register_forward_pre_hook(_from_pixels, with_kwargs=True)]
    else:
        embeddings, projector = model.get_input_embeddings(), projector_of(model)
        handles = [embeddings.register_forward_hook(lambda _, inputs, output: output.requires_grad_())]
        if projector is not None:
            begins = model.get_submodule(projector)
            handles.append(begins.register_forward_pre_hook(lambda _, inputs: inputs[0].detach().requires_grad_()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight in trained:
            weight.requires_grad_(True)


def _from_pixels(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"pixel_values": kwargs["pixel_values"].detach().requires_grad_()}
