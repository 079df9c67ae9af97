"""Gradient statistics of target layers: output-gradient covariances (K-FAC) and weight gradients.

FARSS (§3.2, Eq. 2) takes F ≈ Σ_h ⊗ Σ_δ with Σ_h = E[h hᵀ] and Σ_δ = E[δ δᵀ], where h is a layer's input and
δ = ∂L/∂y the gradient at its output. Here L is the negative log-likelihood of a row's response: the *sum* of the
next-token losses over response tokens, so that rows in the same batch do not change one another's gradients and the
batch size changes nothing. Both expectations are over all real tokens: a prompt token carries no loss of its own, but
an activation and, through attention, a gradient. Dropout is off. (The reference code counts padding, keeps dropout on
and takes 1,024 tokens per batch.)

LoRA-GA (Wang et al., 2024) takes the gradient with respect to the weight, here the mean over response tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from harness.data.collation import Batch
from harness.statistics.loss import Labels
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident
from harness.statistics.statistic import Kind, Statistic


def collect_gradient_statistics(
    model: nn.Module,
    modules: dict[str, nn.Linear],
    groups: dict[str, str],
    batches: Iterable[Batch],
    kinds: Sequence[Kind],
    fisher: Literal["empirical", "mc"] = "empirical",
    seed: int = 0,
) -> dict[Kind, dict[str, Statistic]]:
    """Collect ``kinds`` in one forward and backward pass per batch, summed over all ranks.

    Args:
        modules: target layers by name.
        groups: layer → first layer of its group, as `input_groups` returns it.
        batches: padded batches with ``input_ids``, ``attention_mask`` and ``labels`` of shape (rows, length).
        fisher: ``empirical`` takes the labels of the data; ``mc`` draws each response token from the model's own
            prediction, given the data before it (Monte-Carlo estimate of the true Fisher; Kunstner et al., 2019).
        seed: of the draws, together with a row's text: the same on any rank and in any batch.

    Returns:
        kind → layer (for input covariances: group) → statistic. Every rank gets the same result.

    Raises:
        UserError: an activation or gradient is NaN or inf (the message names layer and batch), a layer does not read
            one row per token, no gradient can reach it, or no row has a response token.

    Warning:
        All matrices are resident on the model's device at once, in fp32: for a 7B Llama 42 GB of output-gradient
        covariances beside 22 GB of input covariances.
    """
    found: dict[Kind, dict[str, Statistic]] = {kind: {} for kind in kinds}
    collected = collect_resident(
        model, modules, groups, batches, kinds, Labels(fisher, seed), Reduction(everywhere=True)
    )
    for kind, name, matrix, tokens in collected:
        found[kind][name] = Statistic(matrix.cpu(), tokens)
    return found
