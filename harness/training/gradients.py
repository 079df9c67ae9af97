"""Changing gradients between the backward pass and the optimiser's step, where DeepSpeed keeps them."""

import torch
from torch import nn


@torch.no_grad()
def scale_gradient(parameter: nn.Parameter, factor: torch.Tensor) -> None:
    """Multiply the gradient of ``parameter`` by ``factor`` (broadcast to its shape), in place on every rank's own part.

    Every rank calls it with the same factor; nothing is communicated. DeepSpeed's ``safe_set_full_grad`` would need the
    whole gradient first, gathered over all ranks for each parameter.
    """
    if parameter.grad is not None:  # no DeepSpeed
        parameter.grad.mul_(factor)
        return
    whole = factor.expand(getattr(parameter, "ds_shape", parameter.shape)).flatten()
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        # This rank's part under ZeRO-3: equal parts, the last one padded.
        gradient = safe_get_local_grad(parameter)
        size = gradient.numel()
        padded = nn.functional.pad(whole, (0, size * torch.distributed.get_world_size() - whole.numel()))
        own = padded.narrow(0, size * torch.distributed.get_rank(), size)
        safe_set_local_grad(parameter, gradient.flatten() * own.to(gradient))
        return
    place = getattr(parameter, "_hp_mapping", None)
    if place is None:  # under ZeRO 1 and 2 other ranks hold it
        return
    gradient = place.get_lp_grad_fragment(parameter._index_in_param_group)
    if gradient.numel() != whole.numel():
        address = place.lp_fragment_address
        whole = whole.narrow(0, address.start, address.numel)
    gradient.mul_(whole.view(gradient.shape).to(gradient))
