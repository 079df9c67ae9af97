"""The result of a sweep against direct computations from the runs' own files."""

import csv
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.reporting.figures import KTPoint, on_front
from harness.reporting.sweep import compare, print_sweep, read_sweep, write_sweep
from tests.reporting.runs import with_answers, write_run

SEEDS = (0, 1, 2)
# label: share of right answers lost, of the task learned
CONFIGURATIONS = {"lora": (0.35, 0.9), "anchored": (0.05, 0.85), "worse": (0.4, 0.5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three configurations and three seeds with answers to the same questions; one run failed, one goes on."""
    folder = tmp_path_factory.mktemp("sweep")
    cells = []
    for label, (lost, learned) in CONFIGURATIONS.items():
        for seed in SEEDS:
            name = f"{label}-seed{seed}"
            run = write_run(folder / "cells" / name, name=name)
            with_answers(run, seed=seed + 10 * len(label), lost=lost, learned=learned, items=60)
            cells.append(cell(name, label, seed, overrides={"method": {"name": label}, "train.max_steps": 9}))
    cells.append(cell("worse-seed3", "worse", 3, "failed", error="ValueError: NaN | <b>"))
    cells.append(cell("lora-seed3", "lora", 3, "unfinished"))
    (folder / "sweep.json").write_text(json.dumps({"schema": 1, "title": "t", "baseline": "lora", "cells": cells}))
    return folder


def cell(name: str, label: str, seed: int, status: str = "finished", **more: Any) -> dict[str, Any]:
    found = {"name": name, "label": label, "seed": seed, "status": status, "error": None, "overrides": {}}
    return found | {"run": f"cells/{name}"} | more


def final(folder: Path, label: str, seed: int) -> dict[str, Any]:
    """The final model's entry in the run's own file."""
    results = json.loads((folder / "cells" / f"{label}-seed{seed}" / "eval" / "results.json").read_text())
    return next(model for model in results["models"] if model["name"] == "final")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_means_and_deviations(folder: Path) -> None:
    write_sweep(folder)
    table = {row["configuration"]: row for row in rows(folder / "table.csv")}
    assert list(table) == list(CONFIGURATIONS)
    for label, row in table.items():
        models = [final(folder, label, seed) for seed in SEEDS]
        columns = {name: [model[name] for model in models] for name in ("K", "T", "KT")}
        columns |= {task: [model["scores"][task]["value"] for model in models] for task in models[0]["scores"]}
        for name, values in columns.items():
            mean = sum(values) / 3
            deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
            assert float(row[f"{name}_mean"]) == pytest.approx(mean, abs=1e-12)
            assert float(row[f"{name}_deviation"]) == pytest.approx(deviation, abs=1e-12)
            assert row[f"{name}_seeds"] == "3"
    assert (table["worse"]["runs"], table["worse"]["planned"]) == ("3", "4")


def test_every_run_is_a_row(folder: Path) -> None:
    write_sweep(folder)
    table = {row["run"]: row for row in rows(folder / "sweep.csv")}
    assert len(table) == 11
    assert (table["worse-seed3"]["status"], table["worse-seed3"]["error"]) == ("failed", "ValueError: NaN | <b>")
    assert (table["lora-seed3"]["status"], table["lora-seed3"]["K"]) == ("unfinished", "")
    assert float(table["worse-seed1"]["K"]) == final(folder, "worse", 1)["K"]
    assert table["lora-seed0"]["config train.max_steps"] == "9"
    assert json.loads(table["lora-seed0"]["config method"]) == {"name": "lora"}


def test_tests_against_the_baseline(folder: Path) -> None:
    """p over seeds by going through all 2³ signs; p over items of a weighted sum by many drawn signs."""
    found = {(one.label, one.name): one for one in compare(read_sweep(folder))}
    assert {label for label, _ in found} == {"anchored", "worse"}  # nothing against itself
    for (label, name), one in found.items():
        if name not in ("K", "T", "KT"):
            continue
        differences = [final(folder, label, seed)[name] - final(folder, "lora", seed)[name] for seed in SEEDS]
        assert one.difference == pytest.approx(sum(differences) / 3, abs=1e-12)
        totals = [sum(either) for either in itertools.product(*((d, -d) for d in differences))]
        share = sum(abs(total) >= abs(sum(differences)) - 1e-12 for total in totals) / 8
        assert one.over_seeds is not None and one.over_seeds.p_value == pytest.approx(share)
        differing = sum(abs(difference) > 1e-12 for difference in differences)
        assert one.over_seeds.smallest == min(1.0, 2 / 2**differing) and one.seeds == 3
        if name == "KT":
            assert one.over_items is None
            continue
        items = item_differences(folder, label, name)
        assert sum(items) == pytest.approx(one.difference, abs=1e-9)  # the items make up the difference, all of it
        draw = random.Random(0)
        totals = [sum(d if draw.random() < 0.5 else -d for d in items if d) for _ in range(4000)]
        share = sum(abs(total) >= abs(sum(items)) - 1e-9 for total in totals) / 4000
        assert one.over_items == pytest.approx(share, abs=0.03)
        assert one.interval is not None and one.interval[0] < one.difference < one.interval[1]
    assert found["anchored", "K"].over_items < 0.001 and found["anchored", "K"].difference > 0.1
    assert found["worse", "T"].difference < -0.2


def item_differences(folder: Path, label: str, name: str) -> list[float]:
    """What each question adds to the difference in K or T, mean over seeds: 1 / (n · base · tasks), 1 / (n · tasks)."""

    def answers(label: str, model: str) -> dict[str, dict[str, float]]:
        scores: dict[str, dict[str, list[float]]] = {}
        for seed in SEEDS:
            path = folder / "cells" / f"{label}-seed{seed}" / "eval" / "items" / f"{model}.jsonl"
            for line in path.read_text().splitlines():
                item = json.loads(line)
                scores.setdefault(item["task"], {}).setdefault(item["id"], []).append(item["score"])
        return {task: {id: statistics.fmean(of) for id, of in items.items()} for task, items in scores.items()}

    tasks = ("facts_seen", "facts_heldout") if name == "K" else ("reverse",)
    one, other, base = answers(label, "final"), answers("lora", "final"), answers("lora", "base")
    found = []
    for task in tasks:
        reference = statistics.fmean(base[task].values()) if name == "K" else 1.0
        weight = 1 / (len(one[task]) * reference * len(tasks))
        found += [weight * (one[task][id] - other[task][id]) for id in one[task]]
    return found


def test_front_against_brute_force(folder: Path) -> None:
    draw = random.Random(1)
    for _ in range(50):
        points = [KTPoint(1, draw.randint(0, 5) / 5, draw.randint(0, 5) / 5) for _ in range(draw.randint(1, 9))]
        expected = [all(not (o.T >= p.T and o.K >= p.K and (o.T, o.K) != (p.T, p.K)) for o in points) for p in points]
        assert on_front(points) == expected
    write_sweep(folder)
    means = {
        label: tuple(statistics.fmean(final(folder, label, seed)[name] for seed in SEEDS) for name in ("T", "K"))
        for label in CONFIGURATIONS
    }
    for row in rows(folder / "table.csv"):
        T, K = means[row["configuration"]]
        beaten = any(t >= T and k >= K and (t, k) != (T, K) for t, k in means.values())
        assert row["on_pareto_front"] == ("false" if beaten else "true")


def test_report_says_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = write_sweep(folder)
    text, html = (folder / "sweep.md").read_text(), page.read_text()
    assert "1 of 11 runs are not finished" in text and "1 of 11 runs failed" in text
    assert "worse-seed3" in text and "<b>" not in html.replace("&lt;b&gt;", "")
    assert "six are needed" in text and "Differences from lora" in text
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script" not in html
    for file in ("table.csv", "sweep.csv", "differences.csv", "pareto.png"):
        assert (folder / file).is_file() and file in text
    print_sweep(folder)
    printed = capsys.readouterr().out
    assert "3 of 4" in printed and "ValueError: NaN" in printed and str(folder / "pareto.png") in printed


def test_without_evaluation_or_baseline(tmp_path: Path) -> None:
    """Runs that were only trained have losses; one configuration has no front; nothing to compare with."""
    for seed in (0, 1):
        run = write_run(tmp_path / "cells" / f"a-seed{seed}")
        (run / "eval" / "results.json").unlink()
    cells = [cell(f"a-seed{seed}", "a", seed) for seed in (0, 1)]
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 1, "title": "t", "baseline": None, "cells": cells}))
    write_sweep(tmp_path)
    (row,) = rows(tmp_path / "table.csv")
    assert "K_mean" not in row and float(row["preserve_loss_mean"]) == 0.264 and row["on_pareto_front"] == ""
    assert not (tmp_path / "pareto.png").exists() and not (tmp_path / "differences.csv").exists()
    with pytest.raises(UserError, match=r"sweep: .* has no sweep\.json"):
        read_sweep(tmp_path / "cells")
