"""A figure of the rank of every layer: depth across, module type down."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from harness.models.targets import place


def draw_ranks(ranks: Mapping[str, int], path: Path) -> None:
    """Draw ``ranks`` (dotted layer name → rank) as a heat map of depth × module type, as a PNG at ``path``.

    The depth of a layer is the first number in its name; layers without one stand in a column of their own, "–".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = {name: place(name) for name in ranks}
    depths = sorted({depth for depth, _ in places.values() if depth is not None})
    columns: list[int | None] = [*depths, *([None] if any(d is None for d, _ in places.values()) else [])]
    types = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(types), len(columns)), np.nan)
    for name, rank in ranks.items():
        depth, kind = places[name]
        grid[types.index(kind), columns.index(depth)] = rank

    size = (max(5.0, 0.34 * len(columns) + 2.6), max(2.4, 0.36 * len(types) + 1.3))
    figure, axes = plt.subplots(figsize=size, constrained_layout=True)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    if len(columns) <= 40:  # numbers can still be read
        top = np.nanmax(grid)
        for (row, column), rank in np.ndenumerate(grid):
            if not np.isnan(rank):
                colour = "white" if rank < 0.6 * top else "black"
                axes.text(column, row, f"{rank:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(columns)), ["–" if depth is None else str(depth) for depth in columns], fontsize=8)
    axes.set_yticks(range(len(types)), types, fontsize=8)
    axes.set(xlabel="depth (block)", title="Rank of each layer (0: no adapter)")
    figure.colorbar(image, ax=axes, label="rank")
    figure.savefig(path, dpi=130)
    plt.close(figure)
