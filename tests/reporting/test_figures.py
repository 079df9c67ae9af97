"""Figures: that they say what the run says, alone and inside a page."""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.reporting import figures
from harness.reporting.records import Layer, read_run

from .runs import metric_lines, write_metrics

MakeRun = Callable[..., Path]


def texts(svg: bytes | None) -> list[str]:
    assert svg is not None
    root = ElementTree.fromstring(svg)
    return ["".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("}text")]


def test_each_penalty_has_a_panel_of_its_own(make_run: MakeRun) -> None:
    alone = figures.loss_figure([read_run(make_run("a"))])
    anchored = figures.loss_figure([read_run(make_run("b", anchor={"kl": 1.0, "prompts_per_step": 4}))])

    assert "penalty: anchor_kl" not in texts(alone)
    assert "penalty: anchor_kl" in texts(anchored)


def test_forgetting_shows_what_was_measured(make_run: MakeRun) -> None:
    run = make_run()
    assert {"K", "T", "loss on the preserve set (lower is better)"} <= set(
        texts(figures.forgetting_figure([read_run(run)]))
    )
    (run / "eval" / "results.json").unlink()
    shown = texts(figures.forgetting_figure([read_run(run)]))
    assert "loss on the preserve set (lower is better)" in shown
    assert "K" not in shown


def test_nothing_measured_is_no_figure(make_run: MakeRun) -> None:
    run = make_run()
    (run / "eval" / "results.json").unlink()
    (run / "metrics.jsonl").unlink()
    record = read_run(run)

    assert figures.loss_figure([record]) is None
    assert figures.forgetting_figure([record]) is None
    assert figures.kt_path(record) is None
    assert figures.kt_figure([]) is None


def test_a_loss_that_is_never_a_number_is_no_figure(make_run: MakeRun) -> None:
    run = make_run()
    write_metrics(run / "metrics.jsonl", [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}])
    assert figures.loss_figure([read_run(run)]) is None


def test_the_path_goes_from_the_base_to_the_end(make_run: MakeRun) -> None:
    path = figures.kt_path(read_run(make_run(end=(0.8, 0.6), checkpoints=(20,))))

    assert path is not None
    assert [(point.step, round(point.T, 3), round(point.K, 3)) for point in path.points] == [
        (0, 0.02, 1.0),
        (20, 0.4, 0.8),
        (40, 0.8, 0.6),
    ]
    assert path.ends


def test_the_plane_names_its_axes_steps_and_lines(make_run: MakeRun) -> None:
    path = figures.kt_path(read_run(make_run(end=(0.8, 0.6))))
    assert path is not None
    shown = texts(figures.kt_figure([path], "task score"))

    assert {"base", "10", "20", "30", "step 40 (end)", "KT 0.4", "KT 0.6", "KT 0.8"} <= set(shown)
    assert any(text.startswith("T: task score") for text in shown)
    assert any(text.startswith("K: knowledge kept") for text in shown)


def test_lines_of_equal_kt_have_equal_kt(make_run: MakeRun) -> None:
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    axes = matplotlib_figure.Figure().add_subplot()
    axes.set_xlim(-0.06, 1.06)
    axes.set_ylim(0.5, 1.04)
    figures._iso_lines(axes)

    named = [float(text.get_text().removeprefix("KT ")) for text in axes.texts]
    assert named == sorted(named) and len(named) >= 4
    for line, kt in zip(axes.lines, named, strict=True):
        for t, k in zip(*line.get_data(), strict=True):
            assert 2 * k * t / (k + t) == pytest.approx(kt)
            assert t <= 1.06 + 1e-9 and 0.5 - 1e-9 <= k <= 1.04 + 1e-9


@pytest.mark.parametrize("end", [(0.0, 0.0), (1.3, 1.2), (0.02, 1.0), (1.0, 1.0)])
def test_every_corner_of_the_plane_can_be_drawn(make_run: MakeRun, end: tuple[float, float]) -> None:
    path = figures.kt_path(read_run(make_run(end=end)))
    assert path is not None
    assert "base" in texts(figures.kt_figure([path]))


def test_labels_cover_neither_each_other_nor_the_paths() -> None:
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    axes = matplotlib_figure.Figure(figsize=(4, 4)).add_subplot()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    taken = figures._Taken(axes)
    for step in range(40):  # forty models on one spot: there is room for a few names only
        taken.label(str(step), (0.5, 0.5), "black")
    assert 1 <= len(axes.texts) <= 6

    crowded = figures._Taken(axes)
    for height in range(0, 100, 2):
        crowded.segment((0.0, height / 100), (1.0, height / 100))
    before = len(axes.texts)
    crowded.label("no room", (0.5, 0.5), "black")
    assert len(axes.texts) == before


def test_the_first_24_runs_look_different() -> None:
    looks = [tuple(map(str, figures._line(index, marked=True).values())) for index in range(24)]
    without_colour = [look[1:3] for look in looks[:6]]

    assert len(set(looks)) == 24
    assert len(set(without_colour)) == 6


def test_any_run_name_can_stand_in_a_legend(make_run: MakeRun) -> None:
    names = ["_hidden", "lr$1e-3$ <b> & \\alpha", "蒸留", "n" * 80]
    runs = [read_run(make_run(f"run{index}", name=name)) for index, name in enumerate(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = figures.loss_figure(runs, names)

    shown = [text.strip("\u2060") for text in texts(svg)]
    assert {"_hidden", "lr$1e-3$ <b> & \\alpha", "蒸留", "n" * 45 + "…"} <= set(shown)


def test_long_curves_become_means_with_a_band(make_run: MakeRun) -> None:
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    axes = matplotlib_figure.Figure().add_subplot()
    figures._draw_curve(axes, list(range(1000)), [float(step % 2) for step in range(1000)], 0)

    assert len(axes.lines[0].get_xdata()) <= 80
    assert all(0.4 < value < 0.6 for value in axes.lines[0].get_ydata())
    assert len(axes.collections) == 1

    run = make_run()
    write_metrics(run / "metrics.jsonl", metric_lines(50_000, every=1))
    svg = figures.loss_figure([read_run(run)])
    assert svg is not None and len(svg) < 60_000


def test_ranks_are_drawn_where_they_differ() -> None:
    def layers(ranks: list[int]) -> list[Layer]:
        names = [f"model.layers.{block}.mlp.{name}" for block in range(2) for name in ("up_proj", "down_proj")]
        return [Layer(name, rank, (8, 8), {}) for name, rank in zip([*names, "lm_head"], ranks, strict=True)]

    assert figures.rank_figure(layers([8] * 5)) is None
    assert figures.rank_figure([]) is None
    shown = texts(figures.rank_figure(layers([8, 16, 24, 32, 40])))
    assert {"mlp.up_proj", "mlp.down_proj", "lm_head", "8", "16", "24", "32", "40"} <= set(shown)


def test_stacks_of_blocks_are_told_apart() -> None:
    places = figures._places(["vision.layers.0.fc", "language.layers.0.fc", "language.layers.11.fc"])
    assert places == [("vision.layers: fc", 0), ("language.layers: fc", 0), ("language.layers: fc", 11)]


def test_svg_takes_the_colours_of_the_page_and_png_stands_alone(make_run: MakeRun) -> None:
    record = read_run(make_run())
    svg = figures.loss_figure([record])
    png = figures.loss_figure([record], kind="png")

    assert svg is not None and b"var(--figure-series-1, #0072b2)" in svg
    assert not re.search(rb"(?<!, )#0072b2", svg)
    assert svg == figures.loss_figure([record])  # the same data, the same file
    assert png is not None and png.startswith(b"\x89PNG")
