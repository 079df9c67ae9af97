"""init: rank and adapter tensors of every target layer at step 0, layers divided among the ranks."""

import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from harness.adapters.lora import write_adapter
from harness.config import RunConfig
from harness.console import progress, say
from harness.errors import UserError
from harness.files import publish_directory, read_json, write_json, write_tensors
from harness.methods.base import LowRank, Method
from harness.methods.registry import build_method
from harness.models.loading import load_model
from harness.models.targets import Layer, describe, target_modules
from harness.run_directory import RunDirectory
from harness.statistics.store import INDEX, StatisticsReader
from harness.training.distributed import barrier, rank, share, training_device, world_size


def initialise(config: RunConfig, run: RunDirectory) -> None:
    """Write ``init/``: a PEFT adapter with the tensors of step 0, and ``report.json``.

    Raises:
        UserError: a rank is larger than its layer allows, or a layer's statistics are damaged.
    """
    method = build_method(config.method, config.train.seed)
    staging = run.path / ".init.staging"
    if rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    barrier()
    if method.trains_base:
        if rank() == 0:
            write_json(staging / "report.json", {"method": config.method["name"], "layers": {}})
            publish_directory(staging, run.init)
        barrier()
        return

    model = load_model(config.model)
    modules = target_modules(model, config.model.target_modules)
    layers = describe(modules)
    statistics = StatisticsReader(run.statistics) if (run.statistics / INDEX).is_file() else None
    ranks = method.ranks(layers, statistics)
    check_ranks(layers, ranks)

    device = training_device()
    tensors, reports = {}, {}
    for layer in progress(share([layer for layer in layers if ranks.get(layer.name, 0) > 0]), "initialise"):
        weight = modules[layer.name].weight.detach().to(device)
        initial = method.initialise(layer, weight, ranks[layer.name], statistics)
        tensors[f"{layer.name}.A"], tensors[f"{layer.name}.B"] = initial.A, initial.B
        reports[layer.name] = {
            "rank": ranks[layer.name],
            "shape": [layer.out_features, layer.in_features],
            "residual": initial.residual,
            **initial.report,
        }
    part = staging / f"part-{rank()}"
    write_tensors(part.with_suffix(".safetensors"), tensors)
    write_json(part.with_suffix(".json"), reports)
    barrier()
    if rank() == 0:
        _assemble(config, method, layers, staging)
        publish_directory(staging, run.init)
    barrier()
    parameters = sum(ranks.get(layer.name, 0) * (layer.in_features + layer.out_features) for layer in layers)
    say(f"init: {config.method['name']} on {len(layers)} layers, {parameters:,} adapter parameters")


def check_ranks(layers: list[Layer], ranks: dict[str, int]) -> None:
    """Raise `UserError` where a rank is larger than the smaller side of its layer."""
    for layer in layers:
        allowed = min(layer.in_features, layer.out_features)
        if ranks.get(layer.name, 0) > allowed:
            raise UserError(
                f"method.rank: {ranks[layer.name]} given; layer {layer.name} is {layer.out_features}×"
                f"{layer.in_features}, so at most {allowed}"
            )
    if not any(ranks.get(layer.name, 0) for layer in layers):
        raise UserError("method.rank: no layer got an adapter; raise the rank")


def _assemble(config: RunConfig, method: Method, layers: list[Layer], staging: Path) -> None:
    """Join the ranks' parts into one adapter and one report, layers in the model's order."""
    tensors, reports = {}, {}
    for number in range(world_size()):
        part = staging / f"part-{number}"
        tensors |= load_file(part.with_suffix(".safetensors"))
        reports |= read_json(part.with_suffix(".json"))
    ordered = [layer.name for layer in layers if layer.name in reports]
    factors = {name: LowRank(tensors[f"{name}.B"], tensors[f"{name}.A"], method.scaling()) for name in ordered}
    write_adapter(staging, factors, config.model.path)
    content = {"method": config.method["name"], "layers": {name: _finite(reports[name]) for name in ordered}}
    write_json(staging / "report.json", content)
    for number in range(world_size()):
        (staging / f"part-{number}.safetensors").unlink()
        (staging / f"part-{number}.json").unlink()


def _finite(report: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an infinite estimate (two equal singular values at the cut) is written as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
