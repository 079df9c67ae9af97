"""What a rank does to measure how a model for training is built; run by a gang."""

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def measure(arguments: list[str]) -> None:
    """Build the model of every configuration in a JSON list and write what was seen to ``<folder>/<rank>.json``."""
    from harness.config import load_config
    from harness.methods.registry import build_method
    from harness.models.loading import load_model
    from harness.run_directory import RunDirectory
    from harness.stages.train import build_model, training_arguments
    from harness.training.distributed import rank

    folder = Path(arguments[0])
    seen: dict[str, Any] = {}
    for file in sorted(folder.glob("*.yaml")):
        config = load_config(file)
        run = RunDirectory(Path(config.output_dir) / config.name)
        active = training_arguments(config, run, 1)  # as long as it lives, ZeRO-3 is the active configuration
        method = build_method(config.method, config.train.seed)
        build_model(config, run, method, None, False)  # what libraries import and keep at their first use
        model, added = memory_added(lambda c=config, r=run, m=method: build_model(c, r, m, None, False))
        seen[config.name] = {"added": added, "different": different(model, config, run)}
        del model
        if config.name == "dense":  # what transformers adds by itself, so that the measurement can fail
            model, seen["transformers"] = memory_added(lambda c=config: load_model(c.model))
            del model
        del active
    (folder / f"{rank()}.json").write_text(json.dumps(seen))


def memory_added(build: Callable[[], nn.Module]) -> tuple[nn.Module, int]:
    """What ``build`` gives, and by how many bytes it raised this process's resident set at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and could be used again would hide some
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = resident_bytes("VmRSS")
    model = build()
    return model, resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


@torch.no_grad()
def different(model: nn.Module, config: Any, run: Any) -> list[str]:
    """Parameters and buffers that are not those of the model loaded whole, or that this rank holds whole."""
    from harness.adapters.lora import read_layers, saved_name
    from harness.adapters.partitioned import gathered
    from harness.models.loading import load_model, whole_weights
    from harness.models.quantisation import nf4_values, residual_weight
    from harness.models.targets import target_modules
    from harness.stages.initialise import subtracted_blocks

    with whole_weights():
        whole = load_model(config.model)
    blocks, dtype = subtracted_blocks(run.init), getattr(torch, config.model.dtype)
    right = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    for name in target_modules(whole, "all-linear"):
        right[f"{name}.weight"] = residual_weight(right[f"{name}.weight"], blocks[name], dtype)
        if config.model.quantization == "nf4":
            right[f"{name}.weight"] = nf4_values(right[f"{name}.weight"], config.model.double_quantization)
    for layer, own in read_layers(run.init).items():
        right |= {f"{layer}.{name}": tensor for name, tensor in own.items()}
    wrong = []
    built = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for full_name, tensor in built.items():
        name = saved_name(full_name).replace(".base_layer", "")
        if isinstance(tensor, nn.Parameter) and ".lora_" not in name and tensor.numel():
            wrong.append(f"{name} whole")
        with gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
            value = tensor.detach()
            if getattr(tensor, "quant_state", None) is not None:
                import bitsandbytes.functional as bnb

                value = bnb.dequantize_4bit(value, tensor.quant_state)
            expected = right.pop(name)
            same = value.shape == expected.shape and value.dtype == expected.dtype and torch.equal(value, expected)
            if not same:
                wrong.append(name)
    return wrong + [f"{name} missing" for name in right]
