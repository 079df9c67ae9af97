"""Mean absolute input of target layers, channel by channel.

ASVD (Yuan et al., 2023, §3.2) scales the columns of W by S = diag(mean_t |x_t|^α); this collects mean_t |x_t| over real
tokens: padding is masked, and the numbers are the same for any batch size, padding side and number of ranks.
"""

from collections.abc import Iterable

import torch
from torch import nn

from harness.data.collation import Batch
from harness.errors import UserError


@torch.no_grad()
def collect_mean_absolute_input(
    model: nn.Module, modules: dict[str, nn.Linear], groups: dict[str, str], batches: Iterable[Batch]
) -> dict[str, torch.Tensor]:
    """One vector per distinct input over this rank's ``batches``, summed over all ranks.

    Args:
        modules: target layers by name; each reads one row per token.
        groups: layer → first layer of its group, as `input_groups` returns it.
        batches: padded batches with ``input_ids`` and ``attention_mask`` of shape (rows, length).

    Returns:
        group → mean of |x|, (in,), fp32, on the CPU. Every rank gets the same result.

    Raises:
        UserError: an activation is NaN or inf, or there are no real tokens.
    """
    device = next(model.parameters()).device
    sums = {group: torch.zeros(modules[group].in_features, device=device) for group in sorted(set(groups.values()))}
    mask = torch.empty(0)

    def add(group: str, inputs_BLD: torch.Tensor) -> None:
        real_TD = inputs_BLD.reshape(-1, inputs_BLD.shape[-1])[mask.flatten()].float()
        sums[group] += real_TD.abs().sum(0)

    handles = [
        modules[group].register_forward_pre_hook(lambda _, inputs, group=group: add(group, inputs[0])) for group in sums
    ]
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    try:
        for batch in batches:
            mask = batch["attention_mask"].to(device).bool()
            tokens += mask.sum()
            model(input_ids=batch["input_ids"].to(device), attention_mask=mask.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tokens)
        for vector in sums.values():
            torch.distributed.all_reduce(vector)
    count = int(tokens)
    if count == 0:
        raise UserError("statistics: the sampled rows hold no real token; check the prompt column and max_length")
    for group, vector in sums.items():
        if not torch.isfinite(vector).all():
            raise UserError(f"statistics: NaN or inf in the input of layer {group}; try model.dtype: float32")
    return {group: (vector / count).cpu() for group, vector in sums.items()}
