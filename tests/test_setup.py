"""The set-up script, for real, on a small project that needs nothing from a package index."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CLONE = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "small"
version = "1"

[project.optional-dependencies]
cpu = []
cuda = []
dev = []
"""

# A build backend that waits for as long as the file "wait" exists, and fails if there is a file "fail".
BACKEND = """
import base64, hashlib, pathlib, sys, time, zipfile

METADATA = "Metadata-Version: 2.1\\nName: small\\nVersion: 1\\n" + "".join(
    f"Provides-Extra: {extra}\\n" for extra in ("cpu", "cuda", "dev")
)

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    pathlib.Path("building").touch()
    while pathlib.Path("wait").exists():
        time.sleep(0.05)
    if pathlib.Path("fail").exists():
        sys.exit("this package cannot be built today")
    name = "small-1-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("small-1.dist-info/METADATA", METADATA)
        wheel.writestr("small-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("small-1.dist-info/RECORD", "")
    return name

build_wheel = build_editable
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project with the real set-up script."""
    project = tmp_path / "small"
    project.mkdir()
    (project / "scripts").mkdir()
    shutil.copy(CLONE / "scripts/setup", project / "scripts/setup")
    (project / "constraints").mkdir()
    for extra in ("cpu", "cuda"):
        (project / f"constraints/{extra}.txt").write_text("# nothing\n")
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "backend.py").write_text(BACKEND)
    return project


@pytest.fixture
def ready_venv(project: Path) -> None:
    """A .venv that somebody made by hand, with this Python's pip: quicker than the script's own step."""
    venv.create(project / ".venv", symlinks=True)
    folder = next(project.glob(".venv/lib/python*/site-packages"))
    for path in [SITE_PACKAGES / "pip", *SITE_PACKAGES.glob("pip-*.dist-info")]:
        (folder / path.name).symlink_to(path)


def environment(**changes: str) -> dict[str, str]:
    """The surroundings of a user: this Python, no GPU, no package index."""
    inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return {**inherited, "PYTHON": sys.executable, "PALIMPSEST_EXTRA": "cpu", "PIP_NO_INDEX": "1", **changes}


def set_up(project: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [project / "scripts/setup"],
        cwd="/",
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def installed(project: Path) -> bool:
    return any(project.glob(".venv/lib/python*/site-packages/small-1.dist-info"))


def test_it_is_skipped_when_up_to_date_and_redone_when_not(project: Path, ready_venv: None) -> None:
    first = set_up(project)
    assert first.returncode == 0, first.stderr
    assert [line.split()[1] for line in first.stderr.splitlines()] == ["1/3", "2/3", "3/3", "done"]
    assert installed(project)

    again = set_up(project)
    assert (again.returncode, again.stderr) == (0, "")

    (project / "constraints/cuda.txt").write_text("# another set's pins changed\n")
    assert set_up(project).stderr == ""

    for file in ("constraints/cpu.txt", "pyproject.toml"):
        (project / file).write_text((project / file).read_text() + "# changed\n")
        changed = set_up(project)
        assert changed.returncode == 0 and "keeping .venv, which is out of date" in changed.stderr
        assert set_up(project).stderr == ""


@pytest.mark.slow
def test_another_place_or_set_of_engines_makes_venv_anew(project: Path) -> None:
    first = set_up(project)
    assert first.returncode == 0 and "1/3 making .venv with Python 3." in first.stderr

    (project / ".venv/from-the-cpu-set").touch()
    switched = set_up(project, PALIMPSEST_EXTRA="cuda")
    assert switched.returncode == 0 and "making it anew" in switched.stderr
    assert not (project / ".venv/from-the-cpu-set").exists()

    # The scripts in .venv name the old place.
    moved = project.with_name("moved")
    project.rename(moved)
    anew = set_up(moved, PALIMPSEST_EXTRA="cuda")
    assert anew.returncode == 0 and "making it anew" in anew.stderr
    assert (moved / ".venv/bin/pip").read_text().startswith(f"#!{moved}")


@pytest.mark.slow
def test_an_interrupted_set_up_is_started_again(project: Path) -> None:
    (project / "wait").touch()
    running = subprocess.Popen(
        [project / "scripts/setup"], env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not (project / "building").exists():
            assert running.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    (project / "wait").unlink()
    assert not installed(project)

    again = set_up(project)
    assert again.returncode == 0, again.stderr
    assert "interrupted: starting again from an empty .venv" in again.stderr
    assert installed(project)
    assert set_up(project).stderr == ""


def test_a_failure_shows_the_end_of_the_log_and_is_not_taken_as_done(project: Path, ready_venv: None) -> None:
    (project / "fail").touch()
    failed = set_up(project)
    assert failed.returncode == 1
    assert "this package cannot be built today" in failed.stderr
    assert "setup: failed: pip install" in failed.stderr
    (project / "fail").unlink()
    mended = set_up(project)
    assert mended.returncode == 0 and "interrupted" not in mended.stderr
    assert installed(project)


def test_a_broken_torchvision_is_removed_and_a_conflict_is_said(project: Path, ready_venv: None) -> None:
    folder = next(project.glob(".venv/lib/python*/site-packages"))
    for name, metadata in (
        ("torchvision", ""),
        ("other", "Requires-Dist: torchaudio\nRequires-Dist: absent\n"),
    ):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('operator does not exist')\n")
        information = folder / f"{name}-1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{metadata}")
        record = "".join(f"{f.relative_to(folder)},,\n" for f in (folder / name).iterdir())
        (information / "RECORD").write_text(f"{record}{name}-1.dist-info/METADATA,,\n{name}-1.dist-info/RECORD,,\n")
    done = set_up(project)
    assert done.returncode == 0, done.stderr
    assert "setup: removed torchvision: not needed, and broken here" in done.stderr
    assert not (folder / "torchvision").exists()
    assert "pip check finds conflicts" in done.stderr
    assert "other 1 requires absent, which is not installed." in done.stderr


FALSE = shutil.which("false")  # an interpreter that answers every question with a failure, as one too old does


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"PALIMPSEST_EXTRA": "tpu"}, "setup: PALIMPSEST_EXTRA=tpu: allowed: cpu, cuda"),
        ({"PYTHON": "/no/such"}, "setup: no Python 3.11 or newer found at PYTHON=/no/such; install one"),
        ({"PYTHON": str(FALSE)}, f"setup: no Python 3.11 or newer found at PYTHON={FALSE}; install one"),
    ],
)
def test_what_the_user_can_mend_is_one_line(project: Path, changes: dict[str, str], line: str) -> None:
    done = set_up(project, **changes)
    assert done.returncode == 1
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not (project / ".venv").exists()


def test_the_pins_cover_what_the_project_asks_for() -> None:
    content = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]
    extras = content["optional-dependencies"]
    for extra in ("cpu", "cuda"):
        lines = (CLONE / f"constraints/{extra}.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if not line.startswith("#"))
        asked = [*content["dependencies"], *extras["engines"], *extras[extra], *extras["dev"]]
        for requirement in map(Requirement, asked):
            name = canonicalize_name(requirement.name)
            if name != "palimpsest":
                assert requirement.specifier.contains(pins[name]), requirement
