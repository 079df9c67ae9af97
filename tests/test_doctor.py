"""`harness doctor` on this machine, on one with almost nothing installed, and with broken libraries."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from harness import doctor

CLONE = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def fake_library(folder: Path, name: str, source: str) -> None:
    """A library that pip would list as installed and that runs ``source`` when it is imported."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    information = folder / f"{name}-9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")


@pytest.mark.slow
def test_every_part_of_this_machine_is_reported() -> None:
    checks = {check.name: check for check in doctor.diagnose()}
    assert list(checks) == [
        "Python",
        *("torch", "accelerators", "transformers + PEFT", "DeepSpeed", "bitsandbytes", "Ray", "lm-eval"),
        *("vLLM", "torchvision & co.", "bubblewrap", "disk", "memory"),
    ]
    for check in checks.values():
        assert check.detail and check.purpose and "\n" not in check.detail
        assert check.state == "ok" or check.remedy or check.name in ("accelerators", "bubblewrap")
    assert all(check.state == "ok" for check in checks.values() if check.required)
    assert "NF4 works" in checks["bitsandbytes"].detail


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('built for\\nanother torch')", "RuntimeError: built for another torch"),
        ("import os; os.abort()", "crashes the interpreter (SIGABRT)"),
        ("import os; os._exit(7)", "ends the interpreter with code 7"),
        ("raise SystemExit('no licence')", "no licence"),
    ],
)
def test_a_broken_library_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    fake_library(tmp_path, "ray", source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._run_probes(("Ray",)) == {"Ray": ("broken", reason)}


def test_the_libraries_after_one_that_crashes_are_still_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, "ray", "import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = doctor._run_probes(("Ray", "lm-eval"))
    assert (answers["Ray"][0], answers["lm-eval"][0]) == ("broken", "ok")


def test_a_library_that_hangs_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, "ray", "import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_SECONDS", 1)
    assert doctor._run_probes(("Ray",)) == {"Ray": ("broken", "no answer in 1 s")}


def test_a_bare_machine_gets_the_commands(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare/bin/python"
    folder = next((tmp_path / "bare/lib").glob("python*")) / "site-packages"
    for name in ("rich", "pygments", "markdown_it", "mdurl"):
        (folder / name).symlink_to(SITE_PACKAGES / name)
    done = subprocess.run(
        [python, "-c", "import sys; from harness.doctor import doctor; sys.exit(doctor())"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CLONE), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Not ready: a run needs torch, transformers + PEFT, DeepSpeed, lm-eval." in done.stdout
    for name in ("torch", "deepspeed", "bitsandbytes", "ray", "lm_eval"):
        command = next(line for line in done.stdout.splitlines() if line.endswith(f" {name}"))
        assert f"{python} -m pip install " in command


def test_the_command_asks_for_the_version_that_the_harness_needs() -> None:
    command = doctor.install_command("lm_eval")
    assert command.startswith(f"{sys.executable} -m pip install ")
    assert "'lm-eval[ifeval,math]<" in command
