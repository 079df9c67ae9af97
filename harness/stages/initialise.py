"""init: rank and adapter tensors of every target layer at step 0, layers divided among the ranks."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from harness.adapters.lora import by_layer, parameter_count, read_adapter, write_adapter, write_layers
from harness.config import RunConfig
from harness.console import progress, say
from harness.errors import UserError
from harness.files import publish_directory, read_json, write_json, write_tensors
from harness.methods.base import AdapterInit, LowRank, Method
from harness.methods.registry import build_method
from harness.models.loading import load_model
from harness.models.quantisation import BLOCK, misread_on_cpu, quantisation_errors
from harness.models.targets import Layer, describe, target_modules
from harness.reporting.ranks import draw_ranks
from harness.run_directory import RunDirectory
from harness.statistics.store import INDEX, StatisticsReader
from harness.training.distributed import barrier, rank, share, training_device, world_size

SUBTRACTED = "subtracted"  # folder in init/ of the blocks taken out of the base where they are not the adapter's own


def initialise(config: RunConfig, run: RunDirectory) -> None:
    """Write ``init/``: a PEFT adapter with the tensors of step 0, and ``report.json``.

    Raises:
        UserError: a rank is larger than its layer allows, or a layer's statistics are damaged.
    """
    method = build_method(config.method, config.train.seed, config.model)
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

    written = _write_candidates(config, method, run, staging)
    chosen, probe = 0, method.probe()
    if probe is not None and len(written) > 1:
        from harness.stages.probes import choose  # it trains, and the train stage imports this module

        chosen = choose(config, probe, [w.method for w in written], [w.folder for w in written])
    if probe is not None:
        say(f"init: {probe.option}: {getattr(written[chosen].method.options, probe.option)} of {len(written)} tried")
    if rank() == 0:
        publish_directory(written[chosen].folder.init, run.init)
        shutil.rmtree(staging)
    barrier()
    say(f"init: {config.method['name']} on {written[chosen].size}")


@dataclass(frozen=True)
class WrittenCandidate:
    """A method, the directory whose ``init/`` holds its tensors until one is chosen, and its size in words."""

    method: Method
    folder: RunDirectory
    size: str


def _write_candidates(config: RunConfig, method: Method, run: RunDirectory, staging: Path) -> list[WrittenCandidate]:
    """Write an ``init/`` for every candidate of the method; for the method itself where it has nothing to choose."""
    model = load_model(config.model)
    modules = target_modules(model, config.model.target_modules, method.adapts_convolutions)
    layers = describe(modules)
    statistics = StatisticsReader(run.statistics) if (run.statistics / INDEX).is_file() else None
    device = training_device()
    linear = [layer for layer in layers if not layer.kernel]
    if config.model.quantization == "nf4" and (misread := misread_on_cpu(linear, device)):
        say(
            f"warning: model.quantization: on the CPU bitsandbytes misreads {len(misread)} layers, {misread[0]} among "
            f"them, whose input is no multiple of {BLOCK} wide; init/report.json has their errors; use a GPU, or none"
        )
    weights = {name: module.weight.detach() for name, module in modules.items()}
    findings = examine(method, layers, weights, statistics, device)
    candidates = [method.with_options(options) for options in method.candidates(layers)] or [method]
    folders = [RunDirectory(staging / f"candidate-{number}") for number in range(len(candidates))]
    ranks = [candidate.ranks(layers, findings) for candidate in candidates]
    for given in ranks:
        check_ranks(layers, given)

    tensors: list[dict[str, torch.Tensor]] = [{} for _ in candidates]
    reports: list[dict[str, Any]] = [{} for _ in candidates]
    for layer in progress(share(layers), "initialise"):
        weight = weights[layer.name].to(device)
        for candidate, given, own, report in zip(candidates, ranks, tensors, reports, strict=True):
            if given.get(layer.name, 0) == 0:  # no adapter, but over an NF4 base quantised all the same
                report[layer.name] = {
                    **_quantisation(config, candidate, layer, weight, None, statistics),
                    "residual": False,
                }
                continue
            initial = candidate.initialise(layer, weight, given[layer.name], statistics, findings[layer.name])
            own |= {f"{layer.name}.{name}": tensor for name, tensor in initial.tensors(candidate.pair).items()}
            if initial.subtracted is not None:
                own[f"{layer.name}.subtracted.B"], own[f"{layer.name}.subtracted.A"] = initial.subtracted
            errors = _quantisation(config, candidate, layer, weight, initial, statistics)
            report[layer.name] = initial.report | errors | {"residual": initial.residual}
    for folder, own, report in zip(folders, tensors, reports, strict=True):
        part = folder.init / f"part-{rank()}"
        write_tensors(part.with_suffix(".safetensors"), own)
        write_json(part.with_suffix(".json"), report)
    barrier()
    if rank() == 0:
        for candidate, given, folder in zip(candidates, ranks, folders, strict=True):
            _assemble(config, candidate, layers, given, findings, folder.init)
    barrier()
    sizes = [_size(layers, given, folder.init) for given, folder in zip(ranks, folders, strict=True)]
    return [WrittenCandidate(*parts) for parts in zip(candidates, folders, sizes, strict=True)]


def _size(layers: list[Layer], ranks: Mapping[str, int], init: Path) -> str:
    adapted = [layer for layer in layers if ranks.get(layer.name, 0) > 0]
    parameters = parameter_count(init)
    without = f" ({len(layers) - len(adapted)} layers got rank 0)" if len(adapted) < len(layers) else ""
    return f"{len(adapted)} layers{without}, {parameters:,} adapter parameters"


def examine(
    method: Method,
    layers: list[Layer],
    weights: Mapping[str, torch.Tensor],
    statistics: StatisticsReader | None,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """What the method finds in each layer; layers are divided among the ranks, and every rank gets all findings."""
    if type(method).examine is Method.examine:
        return {layer.name: {} for layer in layers}
    mine = {
        layer.name: method.examine(layer, weights[layer.name].to(device), statistics)
        for layer in progress(share(layers), "examine")
    }
    found = [mine] * world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(found, mine)
    every = {name: finding for part in found for name, finding in part.items()}
    return {layer.name: every[layer.name] for layer in layers}


def _quantisation(
    config: RunConfig,
    method: Method,
    layer: Layer,
    weight: torch.Tensor,
    initial: AdapterInit | None,
    statistics: StatisticsReader | None,
) -> dict[str, float]:
    """Errors of the NF4 layer at step 0, with or without an adapter; nothing where the layer is not quantised."""
    if config.model.quantization == "none" or layer.kernel:
        return {}
    adapter = subtracted = None
    if initial is not None:
        adapter = method.update(initial.tensors(method.pair), None)
        if initial.subtracted is not None:
            subtracted = LowRank(*initial.subtracted, method.scaling())
        elif initial.residual:
            assert isinstance(adapter, LowRank)
            subtracted = adapter
    covariance = None
    if statistics is not None and statistics.rounds(layer.name):
        covariance = statistics.input_covariance(layer.name).matrix
    dtype = getattr(torch, config.model.dtype)
    return quantisation_errors(weight, adapter, subtracted, covariance, dtype, config.model.double_quantization)


def check_ranks(layers: list[Layer], ranks: dict[str, int]) -> None:
    """Raise `UserError` where a rank is larger than the smaller side of its linear layer.

    Ranks of convolutions are the method's to bound: their modes differ too much in size for one limit.
    """
    for layer in layers:
        if layer.kernel:
            continue
        allowed = min(layer.in_features, layer.out_features)
        if ranks.get(layer.name, 0) > allowed:
            raise UserError(
                f"method.rank: {ranks[layer.name]} given; layer {layer.name} is {layer.out_features}×"
                f"{layer.in_features}, so at most {allowed}"
            )
    if not any(ranks.get(layer.name, 0) for layer in layers):
        raise UserError("method.rank: no layer got an adapter; raise the rank")


def _assemble(
    config: RunConfig,
    method: Method,
    layers: list[Layer],
    ranks: Mapping[str, int],
    findings: Mapping[str, Mapping[str, Any]],
    staging: Path,
) -> None:
    """Join the ranks' parts into one adapter and one report, layers in the model's order."""
    tensors, reports = {}, {}
    for number in range(world_size()):
        part = staging / f"part-{number}"
        tensors |= load_file(part.with_suffix(".safetensors"))
        reports |= read_json(part.with_suffix(".json"))
    adapted = [layer.name for layer in layers if ranks.get(layer.name, 0) > 0]

    subtracted = {
        name: LowRank(tensors.pop(f"{name}.subtracted.B"), tensors.pop(f"{name}.subtracted.A"), method.scaling())
        for name in adapted
        if f"{name}.subtracted.A" in tensors
    }
    if subtracted:
        write_adapter(staging / SUBTRACTED, subtracted, config.model.path)
    adapter_config = method.adapter_config({name: ranks[name] for name in adapted}, config.model.path)
    write_layers(staging, by_layer(tensors), adapter_config)
    content = {}
    for layer in layers:  # layers of rank 0 too: what was found there is why
        own = {"rank": ranks.get(layer.name, 0), "shape": list(layer.shape), **reports[layer.name]}
        found = {key: value for key, value in findings[layer.name].items() if not key.startswith("_")}
        content[layer.name] = _finite({**found, **own})
    summary = method.summarise(layers, findings, ranks)
    write_json(staging / "report.json", {"method": config.method["name"], "summary": summary, "layers": content})
    if len(set(ranks.values())) > 1:
        draw_ranks({layer.name: ranks.get(layer.name, 0) for layer in layers}, staging / "ranks.png")
    for number in range(world_size()):
        (staging / f"part-{number}.safetensors").unlink()
        (staging / f"part-{number}.json").unlink()


def subtracted_blocks(init: Path) -> dict[str, LowRank]:
    """What was taken out of each base weight at step 0, by layer name; layers that kept their weight are absent."""
    report = read_json(init / "report.json")["layers"]
    residual = any(layer["residual"] for layer in report.values())
    blocks = {name: f for name, f in read_adapter(init).items() if report[name]["residual"]} if residual else {}
    if (init / SUBTRACTED).is_dir():
        blocks |= read_adapter(init / SUBTRACTED)
    return blocks


def _finite(report: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an infinite estimate (two equal singular values at the cut) is written as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
