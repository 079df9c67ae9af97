"""The recipe and the sweep of the small LLaVA, over a world that is made in a moment; and the real world (long)."""

from pathlib import Path

import pytest

from harness.cluster.sweep_cells import load_sweep
from harness.embedded import visual_config
from harness.files import read_json
from harness.pipeline import run_stages
from harness.preflight import check
from harness.resources import find
from harness.run_directory import RunDirectory
from harness.tiny import visual_pretrain
from harness.tiny.visual_pretrain import build_visual, small_visual_options
from harness.tiny.visual_world import KINDS, NEW_KIND, OLD_KINDS
from tests.conftest import run_gang


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visual_pretrain, "build_visual", lambda: build_visual(options=small_visual_options()))


@pytest.mark.usefixtures("small_world")
def test_the_sweep_is_four_methods_and_the_anchor_with_three_seeds(tmp_path: Path) -> None:
    sweep = load_sweep(find("launch/sweeps/visual.yaml"), tmp_path)
    found: dict[str, set[tuple[str, int]]] = {}
    for cell in sweep.cells:
        check(cell.config)
        assert cell.config.task == "image_text"
        assert cell.config.eval.task == [f"visual_{NEW_KIND}"]
        assert cell.config.eval.knowledge == [f"visual_{kind}" for kind in OLD_KINDS]
        found.setdefault(cell.label, set()).add((cell.config.method["name"], cell.config.train.seed))
    methods = {"lora": "lora", "corda++-kpm": "corda", "farss": "farss", "fclora": "fclora"}
    methods |= {"farss-anchor": "farss", "farss-anchor-answers": "farss"}
    assert found == {label: {(method, seed) for seed in range(3)} for label, method in methods.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("small_world")
def test_the_recipe_from_one_end_to_the_other(tmp_path: Path) -> None:
    options = ["train.max_steps=2", "train.save_steps=1", "data.preserve.samples=8", "train.preserve_loss_steps=null"]
    config = visual_config("run", options, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    run_gang(path, 1)
    run_stages(config, ["eval", "report"])
    run = RunDirectory(config.run_directory)
    models = read_json(run.results)["models"]
    assert [model["name"] for model in models] == ["base", "step-1", "final"]
    assert all(model["scores"].keys() == {f"visual_{kind}" for kind in KINDS} for model in models)
    assert (run.path / "report.html").is_file()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_base_knows_the_old_kinds_and_not_the_new_one() -> None:
    """What is learnt last, positions or counts, depends on rounding, and so on the number of threads."""
    world = build_visual()
    assert 2e6 < world.info["counts"]["parameters"] < 4e6
    old = [world.info["exact_match"][kind] for kind in OLD_KINDS]
    assert min(old) > 0.75 and sum(old) > 0.9 * len(old), world.info
    assert world.info["exact_match"][NEW_KIND] < 0.4
