"""Input covariance of target layers.

CorDA (Yang et al., 2024; CorDA++, §III-B) decomposes W·C with C = X Xᵀ, where the columns of X ∈ R^{d_in × N} are
the inputs of the layer at N tokens. Here C is the mean over real tokens, C = (1/N) Σ_t x_t x_tᵀ: padding is masked,
tokens are counted, and the numbers are the same for any batch size, padding side and number of ranks. (The
reference code divides each sample by its largest entry, counts padding and assumes batch size 1.)

Layers that read the same tensor share one matrix (`harness.models.sharing`).
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from harness.data.collation import Batch
from harness.errors import UserError
from harness.statistics.statistic import Statistic


def collect_input_covariance(
    model: nn.Module, modules: dict[str, nn.Linear], groups: dict[str, str], batches: Iterable[Batch]
) -> dict[str, Statistic]:
    """Collect one input covariance per distinct input over this rank's ``batches``, summed over all ranks.

    Args:
        modules: target layers by name.
        groups: layer → first layer of its group, as `input_groups` returns it.
        batches: padded batches with ``input_ids`` and ``attention_mask`` of shape (rows, length).

    Returns:
        group → its covariance. Every rank gets the same result.

    Raises:
        UserError: an activation is NaN or inf (the message names layer and batch), a layer does not read one row per
            token, or there are no real tokens.
    """
    sums, count = sum_over_tokens(
        model, modules, groups, batches, lambda width: (width, width), lambda real_TD: real_TD.T @ real_TD
    )
    return {group: Statistic((matrix / count).cpu(), count) for group, matrix in sums.items()}


@torch.no_grad()
def sum_over_tokens(
    model: nn.Module,
    modules: dict[str, nn.Linear],
    groups: dict[str, str],
    batches: Iterable[Batch],
    shape: Callable[[int], tuple[int, ...]],
    summand: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[dict[str, torch.Tensor], int]:
    """Sum a function of every distinct input over the real tokens of all ranks' batches, and count the tokens.

    Args:
        shape: in_features → shape of the sum.
        summand: real inputs of one batch (tokens, in), fp32 → their contribution, (in,) or (in, in).

    Raises:
        UserError: as `collect_input_covariance` does.
    """
    device = next(model.parameters()).device
    accumulators = {
        group: torch.zeros(shape(modules[group].in_features), device=device) for group in sorted(set(groups.values()))
    }
    mask = torch.empty(0)
    batch_index = 0

    def accumulate(group: str, inputs_BLD: torch.Tensor) -> None:
        flat_ND = inputs_BLD.reshape(-1, inputs_BLD.shape[-1])
        if flat_ND.shape[0] != mask.numel():
            raise UserError(
                f"model.target_modules: {group} reads {flat_ND.shape[0]} rows for {mask.numel()} tokens, so it has no "
                "input covariance over tokens; list the layers to adapt without it"
            )
        real_TD = flat_ND[mask.flatten()].float()
        contribution = summand(real_TD)
        # A NaN or inf in any entry of channel j reaches entry j (of the diagonal): d checks tell about T·d values.
        if not torch.isfinite(contribution.diagonal() if contribution.ndim == 2 else contribution).all():
            raise UserError(
                f"statistics: NaN or inf in the input of layer {group}, batch {batch_index}; "
                "try model.dtype: float32, or look at the rows of that batch"
            )
        accumulators[group] += contribution

    handles = [
        modules[group].register_forward_pre_hook(lambda _, inputs, group=group: accumulate(group, inputs[0]))
        for group in accumulators
    ]
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    try:
        for batch_index, batch in enumerate(batches):  # noqa: B007 - the hook reads it
            mask = batch["attention_mask"].to(device).bool()
            tokens += mask.sum()
            model(input_ids=batch["input_ids"].to(device), attention_mask=mask.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tokens)
        for matrix in accumulators.values():
            torch.distributed.all_reduce(matrix)
    count = int(tokens)
    if count == 0:
        raise UserError("statistics: the sampled rows hold no real token; check the prompt column and max_length")
    return accumulators, count
