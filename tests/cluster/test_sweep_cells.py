"""What a sweep's YAML stands for, and that a cell which cannot work is named before anything runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.cluster.sweep_cells import load_sweep
from harness.errors import UserError
from harness.files import write_json

METHODS = [{"name": "lora", "rank": 4}, {"name": "pissa", "rank": 4}]


@pytest.fixture
def write_sweep(base_config: dict[str, Any], tmp_path: Path) -> Any:
    """Write a sweep over ``base_config`` (kept in run.yaml) and give its path."""

    def write(**content: Any) -> Path:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(base_config))
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({"base": "run.yaml", **content}, sort_keys=False))
        return path

    return write


def test_all_combinations_once(write_sweep: Any, tmp_path: Path) -> None:
    """List × grid × seeds; a run's own YAML is what the cell's overrides make of the base."""
    sweep = load_sweep(
        write_sweep(
            list=[{"label": "free", "anchor": None}, {"label": "held", "anchor": {"kl": 0.5}}],
            grid={"method": METHODS, "train.learning_rate": [1e-3, 2e-4]},
            seeds=[3, 1],
            baseline="free-lora-learning_rate-0.001",
        )
    )
    expected = {
        (f"{anchor}-{method['name']}-learning_rate-{rate:g}", seed): (kl, method["name"], rate)
        for anchor, kl in (("free", None), ("held", 0.5))
        for method in METHODS
        for rate in (1e-3, 2e-4)
        for seed in (3, 1)
    }
    found = {}
    for cell in sweep.cells:
        config = cell.config
        kl = None if config.anchor is None else config.anchor.kl
        found[cell.label, config.train.seed] = (kl, config.method["name"], config.train.learning_rate)
        assert config.method["rank"] == 4 and config.train.max_steps == 20  # the base's, where nothing is said
        assert cell.name == config.name == f"{cell.label}-seed{cell.seed}"
        assert config.run_directory == sweep.folder / "cells" / cell.name
    assert found == expected and len(sweep.cells) == 16
    assert sweep.folder == tmp_path / "runs" / "sweep"


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ({}, ["base"]),
        ({"grid": {"method.rank": [2, 4]}}, ["rank-2", "rank-4"]),
        ({"grid": {"anchor": [None, {"kl": 0.5}, {"kl": 1.0}]}}, ["no-anchor", "anchor-kl-0.5", "anchor-kl-1"]),
        ({"grid": {"train.gradient_checkpointing": [True, False]}},
         ["gradient_checkpointing", "no-gradient_checkpointing"]),
        ({"grid": {"penalties": [[], [{"name": "migu"}]]}}, ["no-penalties", "migu"]),
        ({"grid": {"method": [{"name": "corda", "mode": "kpm"}, {"name": "corda", "mode": "ipm"}]}},
         ["corda-kpm", "corda-ipm"]),
        ({"grid": {"method": [{"name": "lora", "rank": 2}, {"name": "lora", "rank": 4}, {"name": "pissa"}]}},
         ["lora-rank-2", "lora-rank-4", "pissa"]),
        ({"grid": {"method": [{"label": "CorDA, r = 4", "value": {"name": "corda", "mode": "kpm", "rank": 4}}]}},
         ["CorDA, r = 4"]),
        ({"list": [{}, {"method": METHODS[0], "train.max_steps": 5}]}, ["base", "lora-max_steps-5"]),
        # A block goes before what lies in it, whatever the order of keys.
        ({"grid": {"method.rank": [2], "method": [METHODS[0]]}}, ["rank-2-lora"]),
    ],
)  # fmt: skip
def test_labels(write_sweep: Any, content: dict[str, Any], labels: list[str]) -> None:
    cells = load_sweep(write_sweep(**content)).cells
    assert [cell.label for cell in cells] == labels
    if labels == ["rank-2-lora"]:
        assert (cells[0].config.method["name"], cells[0].config.method["rank"]) == ("lora", 2)


def test_names_follow_the_template(write_sweep: Any) -> None:
    named = load_sweep(write_sweep(name="r{method.rank}_s{seed}", grid={"method.rank": [2, 4]}, seeds=[0, 7]))
    assert [cell.name for cell in named.cells] == ["r2_s0", "r2_s7", "r4_s0", "r4_s7"]
    odd = load_sweep(write_sweep(grid={"method": [{"label": "CorDA, r = 4 (β)", "value": METHODS[0]}]}))
    assert odd.cells[0].name == "CorDA-r-4-seed0"  # what a folder cannot be called becomes a hyphen


def test_a_sweep_can_hold_its_base(write_sweep: Any, base_config: dict[str, Any], tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(base=base_config, seeds=[0, 1]), tmp_path / "elsewhere")
    assert [cell.seed for cell in sweep.cells] == [0, 1] and sweep.folder == tmp_path / "elsewhere"


def test_entries_of_lists_can_be_varied(write_sweep: Any, base_config: dict[str, Any]) -> None:
    base_config["model"]["target_modules"] = ["q_proj", "v_proj"]
    cells = load_sweep(write_sweep(grid={"model.target_modules.1": ["k_proj"]})).cells
    assert cells[0].config.model.target_modules == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": "absent.yaml"}, r"base: absent.yaml: not found.*tiny, tiny-visual"),
        ({"grids": {}}, r"grids: unknown key .*did you mean 'grid'"),
        ({"grid": {"method.rank": []}}, r"grid.method.rank: no values given"),
        ({"grid": {"method.rank": 4}}, r"grid.method.rank: 4 given; allowed: a list"),
        ({"grid": {"train.seed": [1]}}, r"grid.train.seed: .*list the seeds in `seeds`"),
        ({"list": [{"output_dir": "x"}]}, r"list.0.output_dir: .*--out"),
        ({"list": [3]}, r"list.0: 3 given; write a mapping"),
        ({"list": {"a": 1}}, r"list: .*write a list of mappings"),
        ({"grid": {"method.rank": [2]}, "list": [{"method.rank": 4}]}, r"grid.method.rank: .*in `list` as well"),
        ({"grid": {"method.rank": [4, 4]}}, r"grid.method.rank: two entries are both called 'rank-4-?'; give each"),
        ({"list": [{"label": "a"}, {"label": "a", "method.rank": 2}]}, r"list: two entries are both called 'a'"),
        ({"list": [{"label": ["a"]}]}, r"list.0.label: \['a'\] given; allowed: one line of text"),
        ({"seeds": [0, -1]}, r"seeds.1: -1 given"),
        ({"seeds": []}, r"seeds: \[\] given"),
        ({"seeds": [1, 1]}, r"cell .*name: two runs would be called 'base-seed1'"),
        ({"name": "same", "seeds": [0, 1]}, r"cell 'same': name: two runs would be called 'same' \(base, seed 0, and"),
        ({"name": "{lable}"}, r"cell 'base': name: \{lable\} is not known.*did you mean 'label'"),
        ({"baseline": "lara", "grid": {"method": METHODS}}, r"baseline: 'lara' given; .*did you mean 'lora'"),
        # Of the cells, the first bad one, with its key.
        ({"grid": {"method.rnk": [2]}}, r"cell 'rnk-2-seed0': method.rnk: unknown key .*did you mean 'rank'"),
        ({"grid": {"method.rank": [4, 99]}}, r"cell 'rank-99-seed0': method.rank: 99 given; layer .* at most 64"),
        ({"grid": {"train.max_steps": [5, "x"]}}, r"cell 'max_steps-x-seed0': train.max_steps: 'x' given"),
        ({"grid": {"train.max_steps.x": [5]}}, r"cell 'x-5': train.max_steps.x: train.max_steps holds 20"),
        ({"list": [{"label": "gone", "data.preserve": None}]}, r"cell 'gone-seed0': data.preserve: missing; method"),
        ({"list": [{"label": "far", "data.train.path": "no.jsonl"}]}, r"cell 'far-seed0': data.train.path: no.jsonl"),
    ],
)  # fmt: skip
def test_one_line_names_cell_and_key(write_sweep: Any, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_sweep(write_sweep(**content))
    line = str(raised.value)
    assert re.match(message, line) and "\n" not in line, line


def test_work_of_another_configuration_is_not_mixed_in(write_sweep: Any, tmp_path: Path) -> None:
    """A cell whose folder holds another configuration's training is refused before anything runs."""
    sweep = write_sweep(grid={"method.rank": [4]})
    (cell,) = load_sweep(sweep).cells
    from harness.pipeline import stage_inputs

    record = {"inputs": stage_inputs(cell.config, "train") | {"method.rank": 2}, "finished": True, "outputs": []}
    write_json(cell.run.stages / "train.json", record)
    with pytest.raises(UserError, match=r"cell 'rank-4-seed0': method.rank: 4 given, but .* was made with 2"):
        load_sweep(sweep)
