"""Mean absolute input of target layers, channel by channel.

ASVD (Yuan et al., 2023, §3.2) scales the columns of W by S = diag(mean_t |x_t|^α); this collects mean_t |x_t| over real
tokens: padding is masked, and the numbers are the same for any batch size, padding side and number of ranks.
"""

from collections.abc import Iterable

import torch
from torch import nn

from harness.data.collation import Batch
from harness.statistics.loss import Labels
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident


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
        UserError: as `collect_input_covariance` does.
    """
    collected = collect_resident(
        model, modules, groups, batches, ["mean_absolute_input"], Labels(), Reduction(everywhere=True)
    )
    return {group: vector.cpu() for _, group, vector, _ in collected}
