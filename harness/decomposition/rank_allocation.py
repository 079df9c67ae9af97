"""Dynamic rank allocation (CorDA++, §IV-C, Eq. 9–10, Algorithm 2) as one sort.

Every layer l has R components. The paper filters them from the smallest singular value up, over all layers together:
r^(l) components of layer l are filtered, 1 at the start; each step takes the layer with the smallest score

    s^(l) = log π(C^(l)) · σ_{-r} / Σ_{k=1}^{R−r} σ_k,    r = r^(l)                                              (Eq. 9)

(the first layer of several with the same) and increments its r^(l), until the adapters meet the budget. In KPM the
filtered components are the adapter, in IPM the remaining ones.

A layer's scores do not depend on other layers, and its steps are taken in order. Where a score is smaller than one
before it in its layer, it is taken as soon as that one has been: a step waits for the largest score up to it. So the
loop takes the steps of all layers in ascending order of each layer's running maximum, equal values by layer and then
by r: one stable sort, then a cut where the cumulative number of parameters meets the budget.

Where the paper leaves a choice:

- KPM stops in the paper after the step that exceeds the budget; that step is undone here. IPM looks at the budget
  before the first step too. Adapters are never above the budget.
- A layer whose components are all filtered (r = R) cannot be taken again. Eq. 9 has an empty denominator there and no
  use. If nothing is left to take, the loop ends.
- R is min(out, in), as in the reference code, also where some singular values are zero, except that a weight of zero
  has no components (R = 0, rank 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Spectrum:
    """One layer's W·C̃: ``sigma`` (R,) descending, float64; ``log_pi``; ``cost`` = in + out, parameters per rank."""

    sigma: torch.Tensor
    log_pi: float
    cost: int

    @property
    def components(self) -> int:
        """R: how many components there are to share out."""
        return len(self.sigma) if len(self.sigma) and float(self.sigma[0]) > 0 else 0


def filter_scores(spectrum: Spectrum) -> torch.Tensor:
    """Eq. 9 for r = 1 … R−1, the steps that can be taken; (R−1,), empty for a weight of zero."""
    sigma = spectrum.sigma[: spectrum.components]
    preceding = sigma.cumsum(0)  # Σ_{k=1}^{n} σ_k at n − 1
    return spectrum.log_pi * (sigma.flip(0)[:-1] / preceding.flip(0)[1:])


def filter_order(spectra: Sequence[Spectrum]) -> torch.Tensor:
    """The layer that each step of Algorithm 2 takes, as indices into ``spectra``, until nothing is left; int64."""
    scores = [filter_scores(spectrum) for spectrum in spectra]
    waiting = torch.cat([score.cummax(0).values if len(score) else score for score in scores])
    layers = torch.repeat_interleave(torch.arange(len(scores)), torch.tensor([len(score) for score in scores]))
    return layers[torch.sort(waiting, stable=True).indices]


def allocate_ranks(spectra: Sequence[Spectrum], budget: int, mode: Literal["kpm", "ipm"]) -> list[int]:
    """The rank of every layer, Σ rank·cost ≤ ``budget`` parameters.

    KPM: at least 1 for every layer that has components. IPM: at most R − 1, and 0 where all components are filtered.

    Raises:
        ValueError: ``budget`` is below one rank for every layer, where KPM starts.
    """
    costs = torch.tensor([spectrum.cost for spectrum in spectra])
    components = torch.tensor([spectrum.components for spectrum in spectra])
    filtered = components.clamp_max(1)
    order = filter_order(spectra)
    steps_cost = costs[order].cumsum(0)
    if mode == "kpm":
        start = int((costs * filtered).sum())
        if start > budget:
            raise ValueError(f"budget: {budget} parameters given; one rank for every layer takes {start}")
        steps = int((start + steps_cost <= budget).sum())
    else:
        start = int((costs * (components - filtered)).sum())
        steps = int((start - steps_cost > budget).sum()) + 1 if start > budget else 0
    filtered += torch.bincount(order[:steps], minlength=len(spectra))
    return (filtered if mode == "kpm" else components - filtered).tolist()
