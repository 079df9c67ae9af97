"""The built wheel works by itself: in an environment without the clone, from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

CLONE = Path(__file__).resolve().parent.parent
DATA_FOLDERS = ("ds_configs", "eval/suites", "eval/tasks", "launch/recipes", "launch/sweeps")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this clone without fetching anything."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(CLONE)]
    pip(sys.executable, *build)
    (file,) = folder.glob("palimpsest-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment that holds the wheel and sees this one's libraries, but not the clone.

    A path in a .pth file is added to ``sys.path`` as it is: the .pth files in that folder, the one that leads to the
    clone among them, are not followed.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip(folder / "bin/python", "install", "--no-deps", "--no-index", str(wheel))
    # pip would have made this script had it installed DeepSpeed here.
    _, body = (Path(sys.executable).parent / "deepspeed").read_text().split("\n", 1)
    script = folder / "bin/deepspeed"
    script.write_text(f"#!{folder}/bin/python\n{body}")
    script.chmod(0o755)
    return folder / "bin"


@pytest.fixture
def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def pip(python: str | Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in ``folder`` with nothing of this clone or environment in its surroundings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_carries_everything_that_is_no_code(wheel: Path) -> None:
    carried = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"harness/_data/{file.relative_to(CLONE)}"
        for folder in DATA_FOLDERS
        for file in (CLONE / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    templates = CLONE / "harness/reporting/templates"
    expected |= {str(file.relative_to(CLONE)) for file in templates.rglob("*") if file.is_file()}
    assert expected <= carried, f"missing: {sorted(expected - carried)}"
    for part in ("ds_configs/zero3.json", "eval/tasks/tiny/tiny_reverse.yaml", "launch/recipes/"):
        assert any(name.startswith(f"harness/_data/{part}") for name in carried), part
    assert any(name.startswith("harness/reporting/templates/") for name in carried)
    outside = {name for name in carried if not name.startswith(("harness/", "palimpsest-"))}
    assert not outside, f"the wheel would put these beside other packages: {outside}"


def test_it_finds_its_files_without_the_clone(installed: Path, empty_folder: Path) -> None:
    program = (
        "import harness, harness.resources as r\n"
        "print(harness.__file__)\n"
        "for name in ('ds_configs/zero2.json', 'eval/tasks', 'launch/recipes'): print(r.find(name))"
    )
    places = run(empty_folder, installed / "python", "-c", program).split()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(installed.parent.resolve()) for place in places), places


def test_every_recipe_resolves(installed: Path, empty_folder: Path) -> None:
    """Each file that `harness recipes` lists, by the path that it prints; with its first row, where it has rows."""
    program = (
        "from pathlib import Path\n"
        "from harness.config import load_config\n"
        "from harness.recipes import shipped\n"
        "for recipe in shipped():\n"
        "    row = next((':' + row.name for row in recipe.rows()), '')\n"
        "    print(load_config(Path(recipe.place + row)).name)"
    )
    names = run(empty_folder, installed / "python", "-c", program).split()
    recipes = [file for file in (CLONE / "launch/recipes").rglob("*.yaml") if "\nrecipe:" in file.read_text()]
    assert len(names) == len(set(names)) == len(recipes) >= 30
    assert "fclora/glue_roberta.yaml:mrpc-fclora" in run(empty_folder, installed / "harness", "recipes", "fclora")


def test_help_and_doctor(installed: Path, empty_folder: Path) -> None:
    assert "doctor" in run(empty_folder, installed / "harness", "--help")
    assert "Ready for `harness run`." in run(empty_folder, installed / "harness", "doctor")


def test_the_pipeline_runs_from_an_empty_folder(
    installed: Path, empty_folder: Path, base_config: dict[str, Any], random_base: Path
) -> None:
    base, data = empty_folder.with_name("base"), empty_folder.with_name("data")
    shutil.copytree(random_base, base)
    data.mkdir()
    for name in ("facts_seen", "reverse_test"):
        rows = [{"prompt": f"{letter} {letter}:", "answer": letter} for letter in "abcd"]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base_config["model"]["path"] = "../base"
    base_config["train"] |= {"max_steps": 2, "batch_size": 4, "save_steps": 2, "log_steps": 1}
    base_config["eval"] = {
        "backend": "hf",
        "knowledge": ["tiny_facts_seen"],
        "task": ["tiny_reverse"],
        "data_dir": "../data",
    }
    base_config["output_dir"] = "runs"
    config = empty_folder.with_name("config.yaml")
    config.write_text(yaml.safe_dump(base_config))

    run(empty_folder, installed / "harness", "run", config)

    left = empty_folder / "runs" / base_config["name"]
    results = json.loads((left / "eval/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["base", "final"]
    assert (left / "adapter/adapter_config.json").is_file()
    assert (left / "merged/config.json").is_file()
    assert "<html" in (left / "report.html").read_text()
    assert [path.name for path in empty_folder.iterdir()] == ["runs"]
