"""Adding up the ranks' sums: each at the one rank that owns it, or, where asked for, on all of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from harness.errors import UserError
from harness.statistics.collector import OF_INPUTS, Collector, Sums
from harness.statistics.products import UpperTriangle
from harness.training.distributed import rank, world_size
from harness.training.ownership import assign_by_cost


@dataclass(frozen=True)
class Counts:
    """Tokens: ``real`` ones that a layer has read, by layer, and those ``with_loss`` (or rows, of a class)."""

    real: Mapping[str, int]
    with_loss: int

    def of(self, kind: str, name: str) -> int:
        """What the mean of a kind of statistic of a layer is over."""
        return self.with_loss if kind == "weight_gradient" else self.real[name]


class Reduction:
    """Adds up sums section by section, each matrix by itself, and counts the bytes.

    A section's matrices are assigned to ranks by size, longest first, and the rank that owns least so far gets the
    largest share: over many sections all own about the same. Of a symmetric matrix the upper triangle travels alone.

    ``given``: bytes of sums that this rank computed and another one owns; ``taken``: bytes of sums that it owns and
    the others computed. Computed from sizes, whatever way a backend sends them.
    """

    def __init__(self, everywhere: bool = False) -> None:
        """``everywhere``: every rank owns everything."""
        self._everywhere = everywhere
        self._load = [0.0] * world_size()
        self.given = self.taken = 0

    def owned(self, sums: Sums) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Kind, layer and whole sum of what this rank owns; ``sums`` is emptied on the way. Collective."""
        names = [(kind, name) for kind, own in sums.items() for name in own]
        sizes = [sum(piece.numel() for piece in _pieces(sums[kind][name])) for kind, name in names]
        owners = dict(zip(names, self._owners(sizes), strict=True))
        for kind, name in names:
            total = sums[kind].pop(name)
            if world_size() > 1:
                for piece in _pieces(total):
                    self._reduce(piece, owners[kind, name])
            if self._everywhere or owners[kind, name] == rank():
                yield kind, name, total.whole() if isinstance(total, UpperTriangle) else total
            del total

    def _owners(self, costs: list[int]) -> list[int]:
        idlest = sorted(range(world_size()), key=lambda number: (self._load[number], number))
        owners = [idlest[place] for place in assign_by_cost(costs, world_size())]
        for owner, cost in zip(owners, costs, strict=True):
            self._load[owner] += cost
        return owners

    def _reduce(self, piece: torch.Tensor, owner: int) -> None:
        size = piece.numel() * piece.element_size()
        if self._everywhere:
            dist.all_reduce(piece)
            self.given += size * (world_size() - 1)
            self.taken += size * (world_size() - 1)
        else:
            dist.reduce(piece, owner)
            self.given += size if owner != rank() else 0
            self.taken += size * (world_size() - 1) if owner == rank() else 0


def _pieces(total: torch.Tensor | UpperTriangle) -> list[torch.Tensor]:
    return total.blocks if isinstance(total, UpperTriangle) else [total]


def token_counts(collector: Collector) -> Counts:
    """How many tokens the means are over, on all ranks. Collective.

    Raises:
        UserError: there is none.
    """
    counts = torch.tensor([*collector.real.values(), collector.with_loss], device=collector.device)
    if dist.is_initialized():
        dist.all_reduce(counts)
    *each, with_loss = counts.tolist()
    real = dict(zip(collector.real, each, strict=True))
    if any(kind not in OF_INPUTS for kind in collector.kinds) and with_loss == 0:
        raise UserError("statistics: no sampled row has a response token; check the response column and max_length")
    if not any(each):
        raise UserError("statistics: the sampled rows hold no real token; check the prompt column and max_length")
    return Counts(real, with_loss)
