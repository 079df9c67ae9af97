"""The figures of the analyses, as PNG. Colours are the report's; methods differ by marker and dash as well."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.reporting.figures import COLOURS

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

HEAD = 128  # singular values in the main panel of a spectrum
TAIL_FLOOR = 1e-12  # a singular value of zero has no place on a logarithmic axis
_INK, _MUTED, _GRID = (COLOURS[name][0] for name in ("ink", "muted", "grid"))
_LOOKS: dict[str, dict[str, Any]] = {
    "plain SVD": {"color": COLOURS["series-6"][0], "linestyle": (0, (5, 1.5)), "marker": "s"},
    "ASVD": {"color": COLOURS["series-2"][0], "linestyle": (0, (1.5, 1.2)), "marker": "^"},
    "CO-SVD": {"color": COLOURS["series-1"][0], "linestyle": "-", "marker": "o"},
    "CO-SVD+": {"color": COLOURS["series-3"][0], "linestyle": (0, (6, 1.5, 1.5, 1.5)), "marker": "D"},
    "CO-SVD++": {"color": COLOURS["series-4"][0], "linestyle": (0, (3, 1)), "marker": "v"},
}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
}


def spectrum_figure(title: str, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """One panel per layer: the largest `HEAD` singular values (at most half of them) over the largest, inset the rest.

    The main panel is linear, the inset logarithmic.

    Args:
        title: what the names of all layers begin with; may be empty.
        curves: layer → method → singular values, descending.
    """
    columns = min(len(curves), 4)
    rows = math.ceil(len(curves) / columns)
    with _figure(2.6 * columns + 0.3, 2.3 * rows + 0.5, title) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (name, methods) in zip(grid.flat, curves.items(), strict=False):
            _draw_spectrum(axes, name, methods)
        for axes in list(grid.flat)[len(curves) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("σᵢ / σ₁")
        for axes in list(grid.flat)[max(0, len(curves) - columns) : len(curves)]:
            axes.set_xlabel("index i")
        _legend(figure, list(next(iter(curves.values()))), markers=False)
        return _png(figure)


def covariance_figure(
    title: str,
    columns: Sequence[str],
    layers: Mapping[str, Sequence[str]],
    maps: Mapping[str, Sequence["torch.Tensor"]],
) -> bytes:
    """Heat maps: a row per layer, a column per data set; logarithmic colours, one scale per row.

    Args:
        title: what the names of all layers begin with; may be empty.
        columns: names of the data sets.
        layers: layer → names of all layers that read its input, for the row's label.
        maps: layer → one map per data set.
    """
    from matplotlib.colors import LogNorm

    with _figure(1.75 * len(columns) + 1.1, 1.75 * len(layers) + 0.5, title) as figure:
        grid = figure.subplots(len(layers), len(columns), squeeze=False)
        for row, (name, readers) in enumerate(layers.items()):
            positive = [cells[cells > 0] for cells in maps[name]]
            low = min((float(p.min()) for p in positive if len(p)), default=0.1)
            high = max((float(p.max()) for p in positive if len(p)), default=1.0)
            norm = LogNorm(low, high if high > low else 10 * low)
            for column, cells in enumerate(maps[name]):
                axes = grid[row, column]
                image = axes.imshow(cells.clamp_min(low).numpy(), cmap="magma", norm=norm, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if row == 0:
                    axes.set_title(columns[column], loc="center")
            grid[row, 0].set_ylabel("\n".join(readers))
            bar = figure.colorbar(image, ax=list(grid[row]), fraction=0.05, pad=0.02, aspect=16)
            bar.outline.set_visible(False)  # type: ignore[operator]
            _plain_log_ticks(bar.ax.yaxis, norm.vmin, norm.vmax, most=6)
        return _png(figure)


def truncation_figure(
    base: float, discards: Sequence[int], shares: Sequence[float], curves: Mapping[str, Sequence[float | None]]
) -> bytes:
    """Perplexity (logarithmic) over the number of components discarded per layer; None leaves a gap.

    Args:
        base: the base's perplexity.
        discards: r, in ascending order.
        shares: for each r, the share of all components' parameters that is discarded.
        curves: method → perplexity at each r.
    """
    with _figure(5.6, 3.7) as figure:
        axes = figure.add_subplot()
        places = range(len(discards))
        axes.axhline(base, color=_MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        below = {"xytext": (-4, -4), "textcoords": "offset points", "va": "top"}
        axes.annotate("base", (places[0], base), color=_MUTED, fontsize=8, **below)
        for method, values in curves.items():
            heights = [math.nan if value is None else value for value in values]
            axes.plot(places, heights, **_LOOKS[method], markersize=4.5, markeredgecolor="white", markeredgewidth=0.6)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, base * (base / high) ** 0.08), high)  # room for the word below the line
        _plain_log_ticks(axes.yaxis, *axes.get_ylim())
        labels = [f"{r}\n{_percent(share)}" for r, share in zip(discards, shares, strict=True)]
        axes.set_xticks(list(places), labels)
        axes.set_xlabel("components discarded per layer (r), and their share of all components' parameters")
        axes.set_ylabel("perplexity (lower is better)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True)
        _legend(figure, list(curves), markers=True)
        return _png(figure)


def fisher_overlap_figure(labels: Sequence[str], at: str, curves: Mapping[str, Sequence[float | None]]) -> bytes:
    """Fisher overlap over groups of singular components: all layers (thick) and each module type; None leaves a gap.

    Args:
        labels: names of the two data sets.
        at: the reading, for the axis.
        curves: module type → overlap of each group; the first is that of all layers together.
    """
    with _figure(5.6, 3.7) as figure:
        axes = figure.add_subplot()
        count = len(next(iter(curves.values())))
        handles = []
        for index, (name, values) in enumerate(curves.items()):
            heights = [math.nan if value is None else value for value in values]
            look: dict[str, Any] = {"color": _INK, "linewidth": 2.4, "zorder": 4} if not index else _series(index - 1)
            handles += axes.plot(range(1, count + 1), heights, **look, markersize=4, label=name)
        axes.set_xticks(range(1, count + 1) if count <= 16 else range(1, count + 1, math.ceil(count / 12)))
        axes.set_xlim(0.7, count + 0.3)
        axes.set_xlabel("group of singular components (1: the largest singular values)")
        axes.set_ylabel("Fisher overlap" + (" of partial reconstructions" if at == "reconstruction" else ""))
        axes.set_title(" and ".join(labels))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True)
        columns = min(4, len(handles))
        figure.legend(handles, list(curves), loc="outside lower center", ncols=columns, handlelength=2.8)
        return _png(figure)


def _series(index: int) -> dict[str, Any]:
    """The look of module type ``index``: colours, then dashes; markers differ as well."""
    colours = [light for name, (light, _) in COLOURS.items() if name.startswith("series-")]
    dashes: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
    return {
        "color": colours[index % len(colours)],
        "linestyle": dashes[index // len(colours) % len(dashes)],
        "linewidth": 1.2,
        "marker": ("o", "s", "^", "D", "v", "P", "X")[index % 7],
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def _draw_spectrum(axes: "Axes", name: str, methods: Mapping[str, Sequence[float]]) -> None:
    count = len(next(iter(methods.values())))
    head = min(HEAD, max(1, count // 2))
    inset = axes.inset_axes((0.55, 0.6, 0.43, 0.36)) if count > head else None
    for method, values in methods.items():
        largest = values[0] or 1.0  # a weight of zeros
        heights = [value / largest for value in values]
        look = {key: value for key, value in _LOOKS[method].items() if key != "marker"}
        axes.plot(range(1, head + 1), heights[:head], **look)
        if inset is not None:
            tail = [max(height, TAIL_FLOOR) for height in heights[head:]]
            inset.plot(range(head + 1, count + 1), tail, **look | {"linewidth": 1.1})
    axes.set_title(name)
    axes.set_xlim(1, max(head, 2))
    axes.set_ylim(-0.02, 1.04)
    if inset is not None:
        inset.set_xlim(head + 1, max(count, head + 2))
        inset.set_yscale("log")
        inset.tick_params(labelsize=6.5, length=2, pad=1.5)
        _plain_log_ticks(inset.yaxis, *inset.get_ylim(), most=4)
        inset.set_xticks([head + 1, count], [str(head + 1), str(count)])
    for panel in filter(None, (axes, inset)):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True)


def _plain_log_ticks(axis: "Axis", low: float, high: float, most: int = 8) -> None:
    """Ticks of a logarithmic axis as plain numbers, finer where the range is short, none between."""
    from matplotlib.ticker import NullLocator

    ticks = _log_ticks(low, high, most)
    axis.set_ticks(ticks, labels=[_number(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= most:
            break
    if len(ticks) > most:
        return ticks[:: math.ceil(len(ticks) / most)]
    if len(ticks) > 2:
        return ticks
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    return [step * multiple for multiple in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def _legend(figure: "Figure", methods: Sequence[str], markers: bool) -> None:
    from matplotlib.lines import Line2D

    looks = [_LOOKS[method] if markers else _LOOKS[method] | {"marker": None} for method in methods]
    handles = [Line2D([], [], **look, markersize=4.5, markeredgecolor="white") for look in looks]
    figure.legend(handles, methods, loc="outside lower center", ncols=len(methods), handlelength=2.8)


@contextmanager
def _figure(width: float, height: float, title: str = "") -> Iterator["Figure"]:
    """A figure without pyplot: nothing global is left behind, and no display is needed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height + (0.25 if title else 0.0)), layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
        yield figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, facecolor="white", bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()
