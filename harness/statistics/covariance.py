"""Input covariance of target layers.

CorDA (Yang et al., 2024; CorDA++, §III-B) decomposes W·C with C = X Xᵀ, where the columns of X ∈ R^{d_in × N} are
the inputs of the layer at N tokens. Here C is the mean over real tokens, C = (1/N) Σ_t x_t x_tᵀ: padding is masked,
tokens are counted, and the numbers are the same for any batch size, padding side and number of ranks. (The
reference code divides each sample by its largest entry, counts padding and assumes batch size 1.)

Layers that read the same tensor share one matrix (`harness.models.sharing`).
"""

from collections.abc import Iterable

from torch import nn

from harness.data.collation import Batch
from harness.statistics.loss import Labels
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident
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
    collected = collect_resident(
        model, modules, groups, batches, ["input_covariance"], Labels(), Reduction(everywhere=True)
    )
    return {group: Statistic(matrix.cpu(), tokens) for _, group, matrix, tokens in collected}
