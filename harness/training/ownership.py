"""Which rank owns which piece of work: the longest first, each to the rank with the least to do."""

from collections.abc import Sequence


def assign_by_cost(costs: Sequence[float], ranks: int) -> list[int]:
    """The owner of each piece, by its place in ``costs`` (any unit). The same on every rank; ties go to the lower rank.

    Graham's longest-processing-time rule: the fullest rank has at most 4/3 of the best possible (Graham, 1969).
    """
    owners, load = [0] * len(costs), [0.0] * ranks
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        owners[piece] = owner
        load[owner] += costs[piece]
    return owners
