"""The figures of a report: training loss, forgetting, the K–T plane, the Pareto front, ranks by layer.

Every figure is drawn narrow (a phone's width) with text of 8–9 points, so that it is as readable on a phone,
where it fills the width, as on a desk, where two stand side by side. Colours are those of Okabe and Ito
(2008) and Tol (2021), darkened where they were too light for text on white; runs differ by marker and dash as
well, so that no reader needs the colours.

As SVG (the default) a figure refers to the colours of the page by CSS variables, with the light colours as
fallback: the same figure follows the reader's light or dark setting, and stands alone as well. As PNG it is
drawn for light pages.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.reporting.records import ALL, DIAGNOSTICS, Layer, RunRecord, harmonic_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["svg", "png"]

# name → (light page, dark page); the HTML report declares them as CSS variables --figure-<name>.
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1f2a35", "#e4e9ee"),
    "muted": ("#5a6672", "#a3afbb"),
    "grid": ("#d8dee4", "#39434d"),
    "surface": ("#fffffe", "#1b2229"),
    "series-1": ("#0072b2", "#5db4f0"),
    "series-2": ("#c8500a", "#ff9457"),
    "series-3": ("#00875f", "#45d3a8"),
    "series-4": ("#aa4499", "#e593da"),
    "series-5": ("#957100", "#e3bd4b"),
    "series-6": ("#52606d", "#b3c0cc"),
}
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_SERIES = [name for name in COLOURS if name.startswith("series-")]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_WIDTH = 4.0  # inches
_DECADES = 30  # largest over smallest value from which an axis is logarithmic
_PRESERVE = {
    "preserve_loss": "loss on the preserve set (lower is better)",
    "preserve_accuracy": "accuracy on the preserve set (higher is better)",
}
_NORMS = ("spectral_norm", "frobenius_norm")  # zero before training, and drawn from there
DIAGNOSTIC_NAMES = {
    "spectral_norm": "spectral norm of ΔW",
    "frobenius_norm": "Frobenius norm of ΔW",
    "amplification_w_to_dw": "amplification factor W→ΔW",
    "amplification_dw_to_w": "amplification factor ΔW→W",
    "orthogonality_error": "orthogonality error of the factors",
}
_MANY_POINTS = 200
_BINS = 80
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LIGHT["muted"],
    "axes.labelcolor": _LIGHT["ink"],
    "axes.titlecolor": _LIGHT["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": _LIGHT["grid"],
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "text.color": _LIGHT["ink"],
    "text.parse_math": False,  # a run may be called "lr$1e-3$"
    "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "palimpsest",  # the same data gives the same file
}


@dataclass(frozen=True)
class KTPoint:
    """One model in the K–T plane; ``step`` 0 is the base. Intervals where they are known."""

    step: int
    T: float
    K: float
    T_interval: tuple[float, float] | None = None
    K_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class KTPath:
    """A run's way through the K–T plane, by step; ``ends``: the last point is the final model."""

    label: str
    points: tuple[KTPoint, ...]
    ends: bool = True


def kt_path(record: RunRecord, label: str | None = None) -> KTPath | None:
    """The evaluated models of ``record`` that have both K and T, or None if no trained model has."""
    models = record.evaluation.path if record.evaluation else ()
    placed = [model for model in models if model.K is not None and model.T is not None]
    if not any(model.step for model in placed):
        return None
    points = tuple(
        KTPoint(
            step=model.step or 0,
            T=float(model.T or 0),
            K=float(model.K or 0),
            T_interval=model.intervals.get("T"),
            K_interval=model.intervals.get("K"),
        )
        for model in placed
    )
    return KTPath(label or record.name, points, ends=placed[-1].name == "final")


def loss_figure(runs: Sequence[RunRecord], labels: Sequence[str] = (), kind: Kind = "svg") -> bytes | None:
    """Training loss over steps, each penalty in a panel of its own below; None where no loss was logged.

    A curve of more than 200 points is drawn as means of bins with a band from the smallest to the largest
    value.
    """
    if not any(_has_points(run, "loss") for run in runs):
        return None
    penalties = sorted({key for run in runs for key in run.penalties if _has_points(run, key)})
    with _figure(2.5 + 1.05 * len(penalties), labels) as figure:
        panels = _panels(figure, [2.4] + [1.0] * len(penalties))
        for axes, key in zip(panels, ["loss", *penalties], strict=True):
            for index, run in enumerate(runs):
                _draw_curve(axes, *run.curve(key), index)
            axes.set_title("loss on the training batches" if key == "loss" else f"penalty: {key}")
        panels[-1].set_xlabel("optimiser step")
        _legend(figure, labels)
        return _render(figure, "loss", kind)


def forgetting_figure(runs: Sequence[RunRecord], labels: Sequence[str] = (), kind: Kind = "svg") -> bytes | None:
    """Loss and token accuracy on the preserve set over steps; below K of the evaluated models (for one run, T too).

    K and T stand with their 95 % intervals, as bands, where these are known.
    """
    curves = [key for key in _PRESERVE if any(_has_points(run, key) for run in runs)]
    paths = [(index, path) for index, run in enumerate(runs) if (path := kt_path(run)) and len(path.points) > 1]
    count = len(curves) + bool(paths)
    if not count:
        return None
    with _figure(0.75 + 1.55 * count, labels) as figure:
        panels = _panels(figure, [1.0] * count)
        for axes, key in zip(panels, curves, strict=False):
            for index, run in enumerate(runs):
                _draw_curve(axes, *run.curve(key), index, marked=True)
            axes.set_title(_PRESERVE[key])
        if paths:
            axes = panels[-1]
            alone = len(runs) == 1
            for index, path in paths:
                steps = [point.step for point in path.points]
                _draw_band(axes, steps, [point.K_interval or (point.K, point.K) for point in path.points], index)
                axes.plot(steps, [point.K for point in path.points], **_line(index, marked=True))
                if alone:
                    _draw_band(axes, steps, [point.T_interval or (point.T, point.T) for point in path.points], 1)
                    axes.plot(steps, [point.T for point in path.points], **_line(1, marked=True))
            axes.set_title("K: knowledge kept" if not alone else "K: knowledge kept, T: task learned")
            axes.axhline(1.0, color=_LIGHT["muted"], linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]), top=max(1.06, axes.get_ylim()[1]))
            if alone:
                axes.legend(
                    axes.lines[:2], ["K", "T"], ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1
                )
        panels[-1].set_xlabel("optimiser step (0: the base model)")
        _legend(figure, labels)
        return _render(figure, "forgetting", kind)


def diagnostics_figure(record: RunRecord, kind: Kind = "svg") -> bytes | None:
    """The update of the adapted layers over steps: a panel per quantity, a line per module type; None without any."""
    curves = {
        quantity: [name for name in record.module_types(quantity) if _has_points(record, f"{quantity}/{name}")]
        for quantity in DIAGNOSTICS
    }
    types = sorted({name for names in curves.values() for name in names})
    if not types:
        return None
    drawn = [quantity for quantity, names in curves.items() if names]
    with _figure(0.75 + 1.55 * len(drawn), types) as figure:
        panels = _panels(figure, [1.0] * len(drawn))
        for axes, quantity in zip(panels, drawn, strict=True):
            for name in curves[quantity]:
                _draw_curve(axes, *record.curve(f"{quantity}/{name}"), types.index(name), marked=True)
            _title_diagnostic(axes, quantity)
        panels[-1].set_xlabel("optimiser step (0: before training)")
        _legend(figure, types)
        return _render(figure, "diagnostics", kind)


def diagnostics_comparison_figure(
    runs: Sequence[RunRecord], labels: Sequence[str] = (), kind: Kind = "svg"
) -> bytes | None:
    """The same, as means over all adapted layers: a panel per quantity, a line per run; None where no run has any."""
    drawn = [quantity for quantity in DIAGNOSTICS if any(_has_points(run, f"{quantity}/{ALL}") for run in runs)]
    if not drawn:
        return None
    with _figure(0.75 + 1.55 * len(drawn), labels) as figure:
        panels = _panels(figure, [1.0] * len(drawn))
        for axes, quantity in zip(panels, drawn, strict=True):
            for index, run in enumerate(runs):
                _draw_curve(axes, *run.curve(f"{quantity}/{ALL}"), index, marked=True)
            _title_diagnostic(axes, quantity)
        panels[-1].set_xlabel("optimiser step (0: before training)")
        _legend(figure, labels)
        return _render(figure, "diagnostics", kind)


def kt_figure(paths: Sequence[KTPath], t_axis: str = "task learned", kind: Kind = "svg") -> bytes | None:
    """The K–T plane: the way of every run from the base through its checkpoints to its end.

    Up is kept, right is learned; light lines join points of equal KT (FARSS Eq. 38), so the best corner is
    the upper right. ``t_axis`` says what T is measured against. None where there is no path.
    """
    if not paths:
        return None
    labels = [path.label for path in paths] if len(paths) > 1 else []
    with _figure(3.9, labels) as figure:
        axes = figure.add_subplot()
        axes.grid(False)
        axes.set_xlabel(f"T: {t_axis}  (right is better)")
        axes.set_ylabel("K: knowledge kept, base = 1  (up is better)")
        points = [point for path in paths for point in path.points]
        axes.set_xlim(*_limits([point.T for point in points]))
        axes.set_ylim(*_limits([1.0, *(point.K for point in points)], widen_up=False))
        _iso_lines(axes)
        _legend(figure, labels)
        figure.draw_without_rendering()  # settles the layout: what follows measures in pixels
        taken = _Taken(axes)
        for index, path in enumerate(paths):
            _draw_path(axes, path, index, taken)
        for start in dict.fromkeys((point.T, point.K) for point in points if point.step == 0):
            star = {"marker": "*", "markersize": 12, "markeredgecolor": _LIGHT["surface"]}
            axes.plot(*start, color=_LIGHT["ink"], **star, zorder=6)
            taken.mark(start, 5)
            taken.label("base", start, _LIGHT["ink"])
        for index, path in enumerate(paths):
            colour = _line(index)["color"]
            end = path.points[-1]
            name = f"step {end.step}" + (" (end)" if path.ends else "")
            taken.label(name if len(paths) == 1 else str(end.step), (end.T, end.K), colour, bold=True)
        for index, path in enumerate(paths):
            for point in path.points[:-1]:
                if point.step:
                    taken.label(str(point.step), (point.T, point.K), _line(index)["color"])
        return _render(figure, "kt", kind)


def on_front(points: Sequence[KTPoint]) -> list[bool]:
    """Whether each point is on the Pareto front: no other has as much of T and of K, and more of one."""
    return [
        not any(
            other.T >= point.T and other.K >= point.K and (other.T > point.T or other.K > point.K) for other in points
        )
        for point in points
    ]


def pareto_figure(paths: Sequence[KTPath], t_axis: str = "task learned", kind: Kind = "svg") -> bytes | None:
    """The ends of the runs in the K–T plane, with intervals; a line joins those that no other run beats in both.

    None where fewer than two runs have an end.
    """
    ended = [path for path in paths if path.ends]
    if len(ended) < 2:
        return None
    ends = [path.points[-1] for path in ended]
    front = on_front(ends)
    with _figure(3.6, [path.label for path in ended]) as figure:
        axes = figure.add_subplot()
        axes.set_xlabel(f"T: {t_axis}  (right is better)")
        axes.set_ylabel("K: knowledge kept, base = 1  (up is better)")
        leading = sorted((point.T, point.K) for point, leads in zip(ends, front, strict=True) if leads)
        axes.plot(*zip(*leading, strict=True), color=_LIGHT["muted"], linewidth=1.0, linestyle=(0, (3, 2)), zorder=2)
        for index, (point, leads) in enumerate(zip(ends, front, strict=True)):
            look = {**_line(index, marked=True), "linestyle": "none", "markersize": 8 if leads else 5.5}
            errors = {
                "xerr": _reach(point.T, point.T_interval),
                "yerr": _reach(point.K, point.K_interval),
                "elinewidth": 0.9,
            }
            axes.errorbar([point.T], [point.K], **look, **errors, zorder=4)
        _legend(figure, [path.label for path in ended])
        return _render(figure, "pareto", kind)


def _reach(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """How far an interval goes to both sides, as matplotlib takes it."""
    return None if interval is None else [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def rank_figure(layers: Sequence[Layer], kind: Kind = "svg") -> bytes | None:
    """Rank of every layer, as a map of module (rows) by block (columns); None where all ranks are equal."""
    ranked = [layer for layer in layers if layer.rank is not None]
    if len({layer.rank for layer in ranked}) < 2:
        return None
    places = _places([layer.name for layer in ranked])
    rows = list(dict.fromkeys(row for row, _ in places))
    columns = sorted({column for _, column in places})
    values = [[math.nan] * len(columns) for _ in rows]
    for layer, (row, column) in zip(ranked, places, strict=True):
        values[rows.index(row)][columns.index(column)] = float(layer.rank or 0)
    with _figure(1.3 + 0.24 * len(rows), ()) as figure:
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(values, cmap="viridis", edgecolors=_LIGHT["surface"], linewidth=0.8)
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], rows, fontsize=7.5)
        every = max(1, math.ceil(len(columns) / 12))
        ticks = range(0, len(columns), every)
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(columns[tick]) for tick in ticks])
        axes.set_xlabel("block (0: next to the input)")
        if len(columns) <= 12:
            _write_cells(axes, values, mesh)
        bar = figure.colorbar(mesh, ax=axes, label="rank", fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return _render(figure, "rank", kind)


# ---------------------------------------------------------------- the figure as a whole


@contextmanager
def _figure(height: float, labels: Sequence[str]) -> Iterator["Figure"]:
    """A figure without pyplot: nothing global is left behind, and no display is needed."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = math.ceil(len(labels) / _legend_columns(labels)) if len(labels) > 1 else 0
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A run may be named in a script that DejaVu lacks: in SVG the browser's own font draws it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(_WIDTH, height + 0.19 * rows), layout="constrained")


def _panels(figure: "Figure", heights: Sequence[float]) -> list["Axes"]:
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    return list(axes[:, 0])


def _legend_columns(labels: Sequence[str]) -> int:
    return 1 if max(map(len, labels), default=0) > 24 else 2


def _legend(figure: "Figure", labels: Sequence[str]) -> None:
    """Names of the runs below the axes, where they cover nothing; one run needs none."""
    if len(labels) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_line(index, marked=True)) for index in range(len(labels))]
    # A leading underscore would make matplotlib drop the entry: a word joiner (no width) goes first.
    names = ["\u2060" + _shortened(label, 46) for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(labels), handlelength=3.2)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _render(figure: "Figure", name: str, kind: Kind) -> bytes:
    buffer = io.BytesIO()
    if kind == "png":
        figure.savefig(buffer, format="png", dpi=200, facecolor="white")
        return buffer.getvalue()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue().decode("utf-8"), name).encode("utf-8")


def _themed(svg: str, name: str) -> str:
    """Make a matplotlib SVG fit into a page: CSS colours, the page's font, identifiers that are its own."""
    svg = svg[svg.index("<svg") :]  # without the XML prolog and the DOCTYPE, which names a URL
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, light in _LIGHT.items():
        svg = re.sub(f"{light}(?=[;\"'])", f"var(--figure-{colour}, {light})", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--figure-font, 'DejaVu Sans', Verdana, sans-serif)")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)


# ---------------------------------------------------------------- curves


def _line(index: int, marked: bool = False) -> dict[str, Any]:
    """The look of run ``index``: colour, then dash, then marker, so that the first 24 differ."""
    look: dict[str, Any] = {
        "color": _LIGHT[_SERIES[index % len(_SERIES)]],
        "linestyle": _DASHES[(index // len(_SERIES) + index) % len(_DASHES)],
    }
    if marked:
        look |= {
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 4.5,
            "markeredgecolor": _LIGHT["surface"],
            "markeredgewidth": 0.6,
        }
    return look


def _has_points(run: RunRecord, key: str) -> bool:
    return any(math.isfinite(value) for value in run.curve(key)[1])


def _title_diagnostic(axes: "Axes", quantity: str) -> None:
    """Title, and a logarithmic axis for what spans decades."""
    axes.set_title(DIAGNOSTIC_NAMES[quantity])
    heights = [height for line in axes.lines for height in line.get_ydata() if height > 0]
    if heights and max(heights) > _DECADES * min(heights) and quantity not in _NORMS:
        axes.set_yscale("log")
    elif heights:
        axes.set_ylim(bottom=0)


def _draw_curve(axes: "Axes", steps: Sequence[int], values: Sequence[float], index: int, marked: bool = False) -> None:
    finite = [value if math.isfinite(value) else math.nan for value in values]
    if len(finite) <= _MANY_POINTS:
        axes.plot(steps, finite, **_line(index, marked=marked and len(finite) <= 40))
        return
    size = math.ceil(len(finite) / _BINS)
    bins = [range(start, min(start + size, len(finite))) for start in range(0, len(finite), size)]
    centres, means, lows, highs = [], [], [], []
    for positions in bins:
        known = [finite[position] for position in positions if not math.isnan(finite[position])]
        centres.append(sum(steps[position] for position in positions) / len(positions))
        means.append(sum(known) / len(known) if known else math.nan)
        lows.append(min(known, default=math.nan))
        highs.append(max(known, default=math.nan))
    look = _line(index)
    axes.fill_between(centres, lows, highs, color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(centres, means, **look)


def _draw_band(axes: "Axes", steps: Sequence[int], intervals: Sequence[tuple[float, float]], index: int) -> None:
    """Intervals along a curve; nothing where all are points."""
    if any(low < high for low, high in intervals):
        lows, highs = zip(*intervals, strict=True)
        axes.fill_between(steps, lows, highs, color=_line(index)["color"], alpha=0.16, linewidth=0)


# ---------------------------------------------------------------- the K–T plane


def _limits(values: Sequence[float], widen_up: bool = True) -> tuple[float, float]:
    """From 0 where the values come near it, else close around them; never less than 0.3 wide."""
    low, high = min(values), max(values)
    low = low if widen_up else min(low, high - 0.3)
    low = 0.0 if low < 0.4 else math.floor((low - 0.03) * 10) / 10
    high = max(high, low + 0.3)
    margin = 0.06 * (high - low)
    return low - (margin if low == 0.0 else 0.0), high + margin


def _iso_lines(axes: "Axes") -> None:
    """Points of equal KT, named above the plane: T = KT·K / (2·K − KT)."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    lowest, highest = harmonic_mean(max(bottom, 0.0), max(left, 0.0)), harmonic_mean(top, right)
    spacing = next((step for step in (0.02, 0.05, 0.1, 0.2, 0.5) if (highest - lowest) / step <= 7), 1.0)
    for multiple in range(math.floor(lowest / spacing) + 1, math.ceil(highest / spacing)):
        kt = multiple * spacing
        # The line comes in from the right or from below.
        lowest_k = max(bottom, kt * right / (2 * right - kt))
        ks = [lowest_k + (top - lowest_k) * (position / 120) ** 2 for position in range(121)]
        line = [(kt * k / (2 * k - kt), k) for k in ks if 2 * k > kt]
        axes.plot(*zip(*line, strict=True), color=_LIGHT["grid"], linewidth=0.9, zorder=0)
        axes.annotate(
            f"KT {kt:.2g}",
            line[-1],
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            color=_LIGHT["muted"],
        )


def _draw_path(axes: "Axes", path: KTPath, index: int, taken: "_Taken") -> None:
    look = _line(index)
    ts, ks = [point.T for point in path.points], [point.K for point in path.points]
    axes.plot(ts, ks, **look, alpha=0.85, zorder=3)
    marker = {"marker": _MARKERS[index % len(_MARKERS)], "linestyle": "none", "color": look["color"]}
    axes.plot(ts, ks, **marker, markersize=4, markeredgewidth=0, zorder=4)
    end = {"markersize": 8.5, "markeredgecolor": _LIGHT["surface"], "markeredgewidth": 1.0}
    if path.ends:
        axes.plot(ts[-1:], ks[-1:], **marker, **end, zorder=5)
        taken.mark((ts[-1], ks[-1]), 4.5)
    for start, stop in zip(path.points, path.points[1:], strict=False):
        taken.segment((start.T, start.K), (stop.T, stop.K))
        if taken.distance((start.T, start.K), (stop.T, stop.K)) > 20:
            middle = ((start.T + stop.T) / 2, (start.K + stop.K) / 2)
            beyond = (middle[0] + (stop.T - start.T) * 0.02, middle[1] + (stop.K - start.K) * 0.02)
            arrow = {"arrowstyle": "-|>,head_width=0.25,head_length=0.5", "shrinkA": 0, "shrinkB": 0}
            arrow |= {"color": look["color"], "linewidth": 0.6}
            axes.annotate("", beyond, middle, arrowprops=arrow, zorder=3)


class _Taken:
    """Where ink is already, in points of the page: a label goes to the first free place around its point."""

    def __init__(self, axes: "Axes") -> None:
        self._axes = axes
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        self._frame = (*self._to_page((left, bottom)), *self._to_page((right, top)))
        self._dots: list[tuple[float, float]] = []
        self._boxes: list[tuple[float, float, float, float]] = []

    def _to_page(self, place: tuple[float, float]) -> tuple[float, float]:
        x, y = self._axes.transData.transform(place) * 72 / self._axes.figure.dpi
        return float(x), float(y)

    def distance(self, start: tuple[float, float], stop: tuple[float, float]) -> float:
        """Points of the page between two places of the plane."""
        return math.dist(self._to_page(start), self._to_page(stop))

    def mark(self, place: tuple[float, float], radius: float) -> None:
        """Note a large mark, as a ring of dots."""
        x, y = self._to_page(place)
        ring = [math.tau * i / 8 for i in range(8)]
        self._dots += [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in ring]

    def segment(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        """Note a piece of a path, as dots along it."""
        (x0, y0), (x1, y1) = self._to_page(start), self._to_page(stop)
        count = max(1, int(math.dist((x0, y0), (x1, y1)) / 3))
        self._dots += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]

    def label(self, text: str, place: tuple[float, float], colour: str, bold: bool = False) -> None:
        """Write ``text`` beside ``place`` where it covers nothing; leave it out where there is no room."""
        x, y = self._to_page(place)
        width, height = 5.0 * len(text) + (3 if bold else 0), 8.0
        left, middle, right = -7 - width, -width / 2, 7
        for dx, dy in ((right, 5), (left, 5), (right, -13), (left, -13), (middle, 9), (middle, -17)):
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            if self._is_free(box):
                self._boxes.append(box)
                look = {"fontsize": 7.5, "color": colour, "fontweight": "bold" if bold else "normal"}
                self._axes.annotate(text, place, xytext=(dx, dy + 1), textcoords="offset points", **look, zorder=7)
                return

    def _is_free(self, box: tuple[float, float, float, float]) -> bool:
        left, bottom, right, top = box
        frame_left, frame_bottom, frame_right, frame_top = self._frame
        if left < frame_left or bottom < frame_bottom or right > frame_right or top > frame_top:
            return False
        if any(left - 2 < x < right + 2 and bottom - 2 < y < top + 2 for x, y in self._dots):
            return False
        return not any(
            left < other_right and other_left < right and bottom < other_top and other_bottom < top
            for other_left, other_bottom, other_right, other_top in self._boxes
        )


# ---------------------------------------------------------------- ranks


def _places(names: Sequence[str]) -> list[tuple[str, int]]:
    """Row and column of each module in the map: "model.layers.3.mlp.up_proj" → ("mlp.up_proj", 3).

    The part before the block's number is kept where models have several stacks (a vision tower and a language
    model). Modules outside blocks stand in column 0 under their full name.
    """
    found = [re.match(r"(.*?)\.?(\d+)\.(.+)$", name) for name in names]
    stacks = {match.group(1) for match in found if match}
    places = []
    for name, match in zip(names, found, strict=True):
        if match is None:
            places.append((name, 0))
        else:
            stack = f"{match.group(1)}: " if len(stacks) > 1 else ""
            places.append((stack + match.group(3), int(match.group(2))))
    return places


def _write_cells(axes: "Axes", values: Sequence[Sequence[float]], mesh: Any) -> None:
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if not math.isnan(value):
                red, green, blue, _ = mesh.cmap(mesh.norm(value))
                bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                look = {
                    "ha": "center",
                    "va": "center",
                    "fontsize": 7,
                    "color": "black" if bright else "white",
                }
                axes.text(column + 0.5, row + 0.5, f"{value:.0f}", **look)
