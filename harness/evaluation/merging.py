"""A plain LoRA merged into its base for the time of an evaluation, for an engine that cannot serve its rank."""

import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from harness.config import TaskName
from harness.files import read_json
from harness.methods.base import LowRank
from harness.run_directory import cache_directory

_PREFIX = "base_model.model."


@contextmanager
def merged(model: str | Path, adapter: Path, dtype: str, task: TaskName = "causal_lm") -> Iterator[Path]:
    """A folder with ``model`` + ``adapter`` merged, in ``dtype``; it is removed at the end of the block.

    It lies in the cache's folder: a model's size is more than many temporary folders hold. Sums are taken in fp32 and
    rounded once.
    """
    from harness.export.merge import write_merged

    parent = cache_directory() / "eval"
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"merged-{socket.gethostname()}-{os.getpid()}-", dir=parent))
    try:
        write_merged(folder, str(model), getattr(torch, dtype), updates(adapter), trained_modules(adapter), task=task)
        yield folder
    finally:
        shutil.rmtree(folder)


def updates(adapter: Path) -> dict[str, LowRank]:
    """The weight updates of a PEFT LoRA by layer, fp32: any rank and α by layer, rsLoRA, ``fan_in_fan_out``."""
    from peft.utils.other import get_pattern_key

    config: dict[str, Any] = read_json(adapter / "adapter_config.json")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            A, B = A.float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
            rank = ranks.get(get_pattern_key(list(ranks), layer), config["r"])
            alpha = alphas.get(get_pattern_key(list(alphas), layer), config["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            found[layer] = LowRank(A.T, B.T, scaling) if config.get("fan_in_fan_out") else LowRank(B, A, scaling)
    return found


def trained_modules(adapter: Path) -> dict[str, torch.Tensor]:
    """What a PEFT adapter holds of modules that were trained in full, by the names of the base model."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items() if ".lora_" not in key}


def _remove_abandoned(parent: Path) -> None:
    """Remove what evaluations on this machine left when they were killed."""
    for folder in parent.glob(f"merged-{socket.gethostname()}-*"):
        process = folder.name.rsplit("-", 2)[1]
        if not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)
