"""Intervals, kept, lost and gained answers, CSV files, and the tests against a baseline, in both formats."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.evaluation.significance import paired_test
from harness.reporting import figures, wording
from harness.reporting.answers import excerpt, measured, read_answers, read_changes
from harness.reporting.baseline import find_baseline
from harness.reporting.records import read_run
from harness.reporting.report import write_comparison, write_report
from harness.reporting.tables import Table, write_tables

from .runs import with_answers, write_json
from .test_figures import texts
from .test_report import NASTY, assert_self_contained, read, rows

MakeRun = Callable[..., Path]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_quantity_stands_with_its_interval(make_run: MakeRun) -> None:
    run = with_answers(make_run(), checkpoints=(20,))
    text, page = read(write_report(run))
    assert_self_contained(text, page)
    header, base, checkpoint, final = rows((run / "report.md").read_text(), "Scores")
    assert header[1:5] == ["T (learned)", "K (kept)", "KT (both)", "Avg. (raw)"]
    evaluated = json.loads((run / "eval" / "results.json").read_text())["models"]
    for row, model in ((checkpoint, evaluated[1]), (final, evaluated[2])):
        for cell, name in zip(row[1:5], ("T", "K", "KT", "Avg"), strict=True):
            low, high = model["intervals"][name]
            assert cell.strip("*").replace("\\", "") == f"{model[name]:.3f} [{low:.3f}, {high:.3f}]"
            assert low < model[name] < high
    assert base[2] == "1.00", "K of the base is 1 by definition"
    low, high = evaluated[2]["intervals"]["K"]
    assert f"(95 % interval {low * 100:.0f} to {high * 100:.0f} %)" in page.text
    assert "by bootstrap (BCa) over items" in page.text


def test_kept_lost_and_gained_add_up(make_run: MakeRun) -> None:
    run = with_answers(make_run(), items=120)
    write_report(run)
    header, *tasks = rows((run / "report.md").read_text(), "Kept, lost and gained answers")
    assert [cell.partition(" (")[0] for cell in header] == [
        *("task", "kind", "items", "kept", "lost", "gained", "still wrong", "gained − lost", "p")
    ]
    record = read_run(run)
    assert record.evaluation is not None and record.evaluation.final is not None
    after = read_answers(record, record.evaluation.final)
    for row in tasks:
        kept, lost, gained, wrong = map(int, row[3:7])
        assert kept + lost + gained + wrong == int(row[2]) == 120
        assert kept + gained == sum(item.score for item in after[row[0]])
        assert row[7] == wording.signed(gained - lost, 0)
    changed = table(run / "tables" / "changed_answers.csv")
    assert len(changed) == sum(int(row[4]) + int(row[5]) for row in tasks)
    assert {line["change"] for line in changed} == {"lost", "gained"}


def test_examples_are_shown_escaped_and_cut(make_run: MakeRun) -> None:
    texts_ = {"question": NASTY + " word" * 400, "expected": "=1+1", "answer": "\x00\u202e</dd><img src=x>\nsecond"}
    run = with_answers(make_run(), texts=texts_)
    text, page = read(write_report(run))
    assert_self_contained(text, page)
    assert page.tags["dl"] >= 4 and page.tags["details"] >= 1
    assert "alert('x')" in page.text and "<img" not in text and "[…]" in page.text
    assert not re.search("[\x00\u202e]", text)
    assert "expected =1+1" in page.text
    markdown = (run / "report.md").read_text()
    assert "<img" not in markdown.replace("\\<img", "")
    assert table(run / "tables" / "changed_answers.csv")[0]["expected"] == "'=1+1"


def test_an_excerpt_keeps_beginning_and_end() -> None:
    assert excerpt("a" * 1000 + "z", 30) == "a" * 20 + " […] " + "a" * 9 + "z"
    assert excerpt(" short ") == "short"
    assert excerpt("\n") == "(nothing)"
    assert excerpt("\ud800\x1b[0m") == "\ufffd\ufffd[0m"


def test_results_of_an_earlier_version_are_reported_without_intervals(make_run: MakeRun, tmp_path: Path) -> None:
    old, new = make_run("old", name="old"), with_answers(make_run("new", name="new"))
    text, page = read(write_report(old))
    assert_self_contained(text, page)
    for shown in (page.text, (old / "report.md").read_text()):
        assert "This evaluation kept no answers" in shown
        assert "Kept, lost and gained answers" not in shown
        assert "BCa" not in shown
    (scores, *_), final = table(old / "tables" / "scores.csv"), table(old / "tables" / "scores.csv")[-1]
    assert (final["K"], final["K_low"]) == ("0.95", "") and scores["model"] == "base"
    _, page = read(write_comparison([new, old], tmp_path / "out"))
    assert "old: Its evaluation kept no answers: it has no intervals and is in no paired test." in page.text
    assert "there is no paired test" in page.text
    assert page.tags["svg"] == 4  # the Pareto figure too, the point of the old run without bars


def test_answers_of_another_evaluation_are_not_mixed_in(make_run: MakeRun) -> None:
    run = with_answers(make_run())
    path = run / "eval" / "results.json"
    content = json.loads(path.read_text())
    content["models"][-1]["scores"]["reverse"]["value"] += 0.1
    write_json(path, content)
    record = read_run(run)
    assert record.evaluation is not None and record.evaluation.final is not None
    assert read_answers(record, record.evaluation.final).keys() == {"facts_seen", "facts_heldout"}
    assert [change.task for change in read_changes(record)] == ["facts_seen", "facts_heldout"]


@pytest.mark.parametrize(
    ("knowledge", "task"),
    [
        ((), ()),
        (("a",), ()),
        ((), ("b",)),
        (tuple(f"know_{n}" for n in range(20)), tuple(f"do_{n}" for n in range(15))),
    ],
)
def test_any_number_of_tasks(
    make_run: MakeRun, tmp_path: Path, knowledge: tuple[str, ...], task: tuple[str, ...]
) -> None:
    runs = [
        with_answers(make_run(name, name=name), seed=n, knowledge=knowledge, task=task, items=12)
        for n, name in enumerate("ab")
    ]
    for run in runs:
        text, page = read(write_report(run))
        assert_self_contained(text, page)
        assert len(table(run / "tables" / "scores.csv")) == 5
        assert (run / "tables" / "changes.csv").exists() == bool(knowledge or task)
    text, page = read(write_comparison(runs, tmp_path / "out"))
    assert_self_contained(text, page)
    if knowledge or task:
        found = table(tmp_path / "out" / "tables" / "against_baseline.csv")
        assert {row["name"] for row in found} >= {*knowledge, *task, "Avg"}
        assert ({"K", "T", "KT"} <= {row["name"] for row in found}) == bool(knowledge and task)


def test_the_test_against_the_baseline_is_the_paired_one(make_run: MakeRun, tmp_path: Path) -> None:
    full = with_answers(make_run("full", name="full"), seed=8, learned=0.9, lost=0.4)
    runs = [
        with_answers(make_run(name, name=name), seed=n, lost=lost, full_fine_tuning=full)
        for n, (name, lost) in enumerate((("worse", 0.5), ("better", 0.05), ("like better", 0.06)))
    ]
    _, page = read(write_comparison(runs, tmp_path / "out", baseline="better"))
    assert "Differences from better" in page.text
    found = {(row["run"], row["name"]): row for row in table(tmp_path / "out" / "tables" / "against_baseline.csv")}
    assert {run for run, _ in found} == {"worse", "like better"}
    a, b = (measured(read_run(run)) for run in runs[:2])
    expected = paired_test(a.tuned["facts_seen"].values, b.tuned["facts_seen"].values)
    row = found["worse", "facts_seen"]
    assert float(row["p_value"]) == expected.p_value < 0.001
    assert float(row["difference"]) == pytest.approx(expected.difference)
    assert float(row["difference_low"]) < float(row["difference"]) < float(row["difference_high"]) < 0
    unadjusted, adjusted = (float(found["like better", "K"][name]) for name in ("p_value", "p_value_holm"))
    assert adjusted > 0.05 and adjusted > unadjusted
    assert found["worse", "KT"]["p_value"] == "" != found["worse", "KT"]["difference_low"]
    markdown = (tmp_path / "out" / "report.md").read_text()
    marked = [row for row in rows(markdown, "Differences from better")[1:] if row[0].startswith("**")]
    assert {(row[0].strip("*"), row[1].strip("*")) for row in marked} >= {("worse", "K"), ("worse", "facts_seen")}
    assert not any(row[0].strip("*") == "like better" for row in marked)


def test_the_baseline_is_named_in_many_ways(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("one", name="same"), make_run("two", name="same"), make_run("three", name="other")]
    records, labels = [read_run(run) for run in runs], ["same (one)", "same (two)", "other"]
    for name, place in ((None, 0), ("same (two)", 1), ("two", 1), (str(runs[1]), 1), ("other", 2), ("three", 2)):
        assert find_baseline(records, labels, name) == place
    for wrong in ("same", "nothing"):
        with pytest.raises(
            UserError, match=rf"report\.baseline: '{wrong}' given; allowed: .*same \(one\), same \(two\)"
        ):
            write_comparison(runs, tmp_path / "out", baseline=wrong)


def test_every_table_is_a_csv_file_that_the_page_names(make_run: MakeRun, tmp_path: Path) -> None:
    run = with_answers(make_run())
    _, page = read(write_report(run))
    linked = {reference for reference in page.references if reference.endswith(".csv")}
    assert linked == {f"tables/{path.name}" for path in (run / "tables").iterdir()}
    assert linked == {f"tables/{name}.csv" for name in ("scores", "changes", "changed_answers", "layers")}
    final = table(run / "tables" / "scores.csv")[-1]
    results = json.loads((run / "eval" / "results.json").read_text())
    for name in ("K", "T", "KT", "Avg"):
        assert float(final[name]) == results[name], "in full precision"
        assert [float(final[f"{name}_{side}"]) for side in ("low", "high")] == results["intervals"][name]
    other = make_run("b", name="b", learning_rate=1.0)
    _, page = read(write_comparison([run, other], tmp_path / "out"))
    linked = {reference for reference in page.references if reference.endswith(".csv")}
    assert linked == {f"tables/{path.name}" for path in (tmp_path / "out" / "tables").iterdir()}
    assert linked == {f"tables/{name}.csv" for name in ("scores", "against_baseline", "configuration")}


def test_a_table_that_is_gone_leaves_no_file_and_others_stay(tmp_path: Path) -> None:
    one, two = (Table(("a",), (("x",),), name=name) for name in ("scores", "layers"))
    write_tables(tmp_path, [one, two])
    (tmp_path / "tables" / "mine.csv").write_text("")
    write_tables(tmp_path, [two])
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["layers.csv", "mine.csv"]


def test_csv_fields_are_quoted_and_no_formulas() -> None:
    data = ({"a": 'x, "y"\nz', "b": 0.1 + 0.2, "c": None, "d": True}, {"a": "@SUM(1)", "b": -3, "c": "-", "e": "-1+1"})
    text = Table(("shown",), (("cell",),), name="scores", data=data).csv()
    first, second = csv.DictReader(io.StringIO(text, newline=""))
    assert first == {"a": 'x, "y"\nz', "b": "0.30000000000000004", "c": "", "d": "true", "e": ""}
    assert second == {"a": "'@SUM(1)", "b": "-3", "c": "-", "d": "", "e": "'-1+1"}
    assert Table(("a", "b"), (), name="scores").csv() == "a,b\r\n"


def test_the_front_is_what_no_other_run_beats() -> None:
    points = [
        figures.KTPoint(1, T, K) for T, K in ((0.2, 0.9), (0.5, 0.8), (0.4, 0.7), (0.5, 0.8), (0.1, 0.9), (0.9, 0.1))
    ]
    assert figures.on_front(points) == [True, True, False, True, False, True]
    assert figures.on_front([]) == []


def test_the_pareto_figure_has_bars_and_a_front(make_run: MakeRun) -> None:
    runs = [with_answers(make_run(name, name=name), seed=n) for n, name in enumerate(("a", "b"))]
    paths = [figures.kt_path(read_run(run)) for run in runs]
    assert all(path.points[-1].K_interval for path in paths)
    svg = figures.pareto_figure(paths, "task score")
    assert {"\u2060a", "\u2060b"} <= set(texts(svg))
    assert any(text.startswith("T: task score") for text in texts(svg))
    assert svg == figures.pareto_figure(paths, "task score")
    assert svg.count(b"LineCollection") == 4, "two bars for each run"
    assert figures.pareto_figure(paths[:1]) is None


def test_forgetting_has_bands_where_intervals_are_known(make_run: MakeRun) -> None:
    old, new = make_run("old"), with_answers(make_run("new"))
    without, bands = (figures.forgetting_figure([read_run(run)]) for run in (old, new))
    assert without.count(b"FillBetween") == 0
    assert bands.count(b"FillBetween") == 2  # of K and of T
    _, page = read(write_report(new))
    assert "The bands are 95 % intervals over items." in page.text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.signed(0.0514), "+0.05"),
        (wording.signed(-1234.0, 0), "\u22121,234"),
        (wording.signed(-0.001), "0.00"),
        (wording.signed(None), "–"),
        (wording.interval((0.931, 0.968)), "0.93 to 0.97"),
        (wording.interval((-0.1, 0.2), 1, sign=True), "\u22120.1 to +0.2"),
        (wording.interval(None), "–"),
        (wording.probability(0.0004), "<\u00a00.001"),
        (wording.probability(0.0312), "0.031"),
        (wording.probability(0.4), "0.40"),
        (wording.probability(None), "–"),
    ],
)
def test_intervals_and_tests_are_written_for_readers(shown: str, expected: str) -> None:
    assert shown == expected
