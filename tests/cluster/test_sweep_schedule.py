"""Which run may start when: work that several share is done by one, and nothing waits for ever."""

import random
from pathlib import Path
from typing import Any

import pytest

from harness.cluster.sweep_cells import Cell
from harness.cluster.sweep_process import HEADER, last_line
from harness.cluster.sweep_schedule import UNTIL_EXPORT, Schedule, shared_work
from harness.config import resolve
from harness.pipeline import STAGES

CORDA = {"name": "corda", "mode": "kpm", "rank": 4}
PLUS = CORDA | {"rounds": 3, "dynamic_rank": True}
FARSS = {"name": "farss", "r_min": 1, "r_avg": 4, "r_max": 8, "shallow_layers": 1}
EVAL = {"backend": "hf", "knowledge": ["tiny_facts_seen"], "task": ["tiny_reverse"]}


@pytest.fixture
def cell(base_config: dict[str, Any]) -> Any:
    """A cell of ``base_config`` with some blocks changed."""

    def make(name: str, seed: int = 0, **blocks: Any) -> Cell:
        train = base_config["train"] | {"seed": seed} | blocks.pop("train", {})
        config = resolve(base_config | {"name": name, "train": train} | blocks)
        return Cell(name, name, seed, {}, config)

    return make


def test_keys_are_equal_where_content_is(cell: Any, base_config: dict[str, Any]) -> None:
    """What two runs share, stage by stage, as `harness.cache` and the evaluation keep it."""

    def shared(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        left, right = (shared_work(cell("x", **blocks).config) for blocks in (one, other))
        return {stage for stage in left if left[stage] & right[stage]}

    corda = {"method": CORDA, "eval": EVAL}
    assert shared(corda, corda) == {"calibrate", "init", "eval"}
    assert shared(corda, corda | {"train": {"learning_rate": 1e-4}}) == {"calibrate", "init", "eval"}
    assert shared(corda, corda | {"method": CORDA | {"rank": 8}}) == {"calibrate", "eval"}
    assert shared(corda, corda | {"method": PLUS}) == {"calibrate", "eval"}  # its first round
    assert shared(corda, corda | {"seed": 1}) == {"eval"}  # other rows, other statistics
    assert shared(corda, corda | {"method": {"name": "lora_null", "rank": 4}}) == {"calibrate", "eval"}
    pissa = {"method": {"name": "pissa", "rank": 4}, "eval": EVAL}
    assert shared(pissa, pissa | {"seed": 1}) == {"init", "eval"}  # the plain SVD knows no seed
    assert shared(pissa, corda) == {"eval"}
    assert shared(corda, corda | {"eval": EVAL | {"limit": 5}}) == {"calibrate", "init"}
    assert shared(corda, corda | {"eval": EVAL | {"knowledge": []}}) == {"calibrate", "init", "eval"}  # one task
    assert shared(corda, corda | {"init": {"cache": False}}) == {"eval"}
    # Where all rows are taken, no seed and no sampling round changes them.
    everything = {"data": base_config["data"] | {"preserve": base_config["data"]["preserve"] | {"samples": 50}}}
    assert shared(corda | everything, corda | everything | {"seed": 1}) == {"calibrate", "eval"}
    assert len(shared_work(cell("x", method=PLUS, **everything).config)["calibrate"]) == 1
    # FARSS takes covariances of the data to learn, CorDA-KPM those of the data to keep.
    assert len(shared_work(cell("x", method=PLUS).config)["calibrate"]) == 3
    assert "calibrate" not in shared({"method": FARSS}, {"method": CORDA})


def test_one_calibrates_and_the_others_wait(cell: Any) -> None:
    cells = [cell("a", method=CORDA), cell("b", method=PLUS), cell("c", seed=1, method=CORDA), cell("d", method=CORDA)]
    schedule = Schedule(cells)
    names = [assignment.cell.name for assignment in schedule.ready()]
    assert names == ["b", "a", "c", "d"]  # first whoever collects most of what others want
    assert schedule.start(schedule.ready()[0]) == ["calibrate"]
    assert [a.cell.name for a in schedule.ready()] == ["c"]  # another seed, other statistics
    schedule.stage_finished(cells[1], "calibrate")
    ready = schedule.ready()
    assert [a.cell.name for a in ready] == ["a", "c", "d"]
    assert schedule.start(ready[0]) == ["init"]
    assert [a.cell.name for a in schedule.ready()] == ["c"]  # d takes the initial adapter of a
    schedule.ended(cells[0], "again")
    assert [a.cell.name for a in schedule.ready()] == ["a", "c", "d"]  # what a did not make is anybody's
    schedule.start(schedule.ready()[0])
    schedule.ended(cells[0], "failed")
    assert [a.cell.name for a in schedule.ready()] == ["c", "d"]


def test_the_base_is_evaluated_by_one(cell: Any) -> None:
    cells = [cell(name, method={"name": "lora", "rank": 4}, eval=EVAL, seed=seed) for seed, name in enumerate("abc")]
    schedule = Schedule(cells)
    assert [a.stages for a in schedule.ready()] == [UNTIL_EXPORT] * 3
    while schedule.ready() and schedule.count("running") < 3:
        schedule.start(schedule.ready()[0])
        for one in cells:
            if schedule.status(one) == "running":
                schedule.stage_finished(one, "init")
    for one in cells[:2]:
        schedule.ended(one, "done")
    assert [(a.cell.name, a.stages) for a in schedule.ready()] == [("a", STAGES), ("b", STAGES)]
    assert schedule.start(schedule.ready()[0]) == ["eval"]
    assert schedule.ready() == []  # b waits for the base's scores
    schedule.stage_finished(cells[0], "eval")
    assert [a.cell.name for a in schedule.ready()] == ["b"]
    alone = Schedule([cell("x", eval=EVAL)])
    assert alone.ready()[0].stages == STAGES  # nobody to wait for: one process does all


@pytest.mark.parametrize("seed", range(6))
def test_every_sweep_comes_to_its_end(cell: Any, seed: int) -> None:
    """Random order of ends, failures and hand-overs: every cell is over, and no key has two makers at a time."""
    draw = random.Random(seed)
    methods = [CORDA, PLUS, {"name": "lora", "rank": 4}, {"name": "pissa", "rank": 4}]
    cells = [cell(f"{i}-{s}", method=method, seed=s, eval=EVAL) for i, method in enumerate(methods) for s in (0, 1)]
    schedule, running = Schedule(cells), {}
    for _ in range(1000):
        if schedule.over:
            break
        ready = schedule.ready()
        if ready and len(running) < 3:
            schedule.start(ready[0])
            running[ready[0].cell.name] = ready[0]
        elif running:
            name = draw.choice(sorted(running))
            one = running[name].cell
            if draw.random() < 0.5:
                schedule.stage_finished(one, draw.choice(["calibrate", "init"]))
            else:
                schedule.ended(one, draw.choices(["done", "again", "failed"], [6, 3, 1])[0])
                del running[name]
        making = [
            key
            for other in running.values()
            for stage in ("calibrate", "init", "eval")
            if stage in other.stages
            for key in schedule._unmade(other.cell, stage)
        ]
        assert len(making) == len(set(making))
        assert running or schedule.ready() or schedule.over  # somebody always can
    assert schedule.over and schedule.count("finished") + schedule.count("failed") == len(cells)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "it ended without a word"),
        ("calibrate: 3 statistics\nKilled\n", "Killed"),
        ("error: method.rank: 9 given\n", "error: method.rank: 9 given"),
        (
            "Traceback\ntorch.OutOfMemoryError: 10 GiB\nRuntimeError: the DeepSpeed launcher ended with code 1; x",
            "torch.OutOfMemoryError: 10 GiB",
        ),
        ("[rank1]: ValueError: NaN\nsubprocess.CalledProcessError: Command\nbye\n", "[rank1]: ValueError: NaN"),
        (f"ValueError: of the first attempt\n{HEADER}2026\nstep 3\n", "step 3"),
    ],
)
def test_the_last_line_says_what_went_wrong(tmp_path: Path, text: str, line: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"{HEADER}first\n{text}")
    assert last_line(log) == line
    assert last_line(tmp_path / "absent") == "it left no output"
