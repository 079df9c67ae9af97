"""init: rank and adapter tensors of every target layer at step 0, layers divided among the ranks.

Weights are read from the base model's files, a layer at a time, the next one while others are decomposed: no rank ever
holds the model. Layers go to ranks by what they cost; on a CPU a rank works on several at a time
(`harness.stages.side_by_side`). Every finished layer is a file in the staging folder, so that a run that was killed
goes on where it was (`harness.stages.layer_store`).
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from harness.adapters.lora import by_layer, parameter_count, read_adapter, write_adapter, write_layers
from harness.cache import Cache
from harness.config import RunConfig
from harness.console import say, work_bar
from harness.errors import UserError
from harness.files import publish_directory, read_json, tensor_checksum, write_json
from harness.measurement import Phase, in_words, measured
from harness.memory import freed_at_once
from harness.methods.base import AdapterInit, LowRank, Method
from harness.methods.registry import build_method
from harness.models.quantisation import BLOCK, misread_on_cpu, quantisation_errors
from harness.models.targets import Layer, adapted_modules, describe
from harness.models.weights import BaseWeights, empty_model
from harness.reporting.ranks import draw_ranks
from harness.run_directory import RunDirectory
from harness.stages.layer_store import LayerStore, read_kept
from harness.stages.plan import layer_cost
from harness.stages.side_by_side import begin_order, layers_at_a_time, side_by_side
from harness.statistics.store import INDEX, StatisticsReader
from harness.training.distributed import available_to_a_rank, barrier, rank, training_device, world_size
from harness.training.ownership import assign_by_cost

SUBTRACTED = "subtracted"  # folder in init/ of the blocks taken out of the base where they are not the adapter's own


def initialise(config: RunConfig, run: RunDirectory) -> None:
    """Write ``init/``: a PEFT adapter with the tensors of step 0, and ``report.json``.

    Raises:
        UserError: a rank is larger than its layer allows, or a layer's statistics are damaged.
    """
    method = build_method(config.method, config.train.seed, config.model)
    method.solver, method.cache = config.init.solver, Cache() if config.init.cache else None
    staging = run.path / ".init.staging"
    if method.trains_base:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            write_json(staging / "report.json", {"method": config.method["name"], "layers": {}})
            publish_directory(staging, run.init)
        barrier()
        return

    with measured() as phase, freed_at_once():
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
    say(f"init: {config.method['name']} on {written[chosen].size}; {_of_all_ranks(phase)}")


@dataclass(frozen=True)
class WrittenCandidate:
    """A method, the directory whose ``init/`` holds its tensors until one is chosen, and its size in words."""

    method: Method
    folder: RunDirectory
    size: str


@dataclass
class LoadedLayer:
    """A target layer with its ``weight`` (out, in) on the device, and what decides its decomposition in ``content``."""

    layer: Layer
    weight: torch.Tensor
    content: dict[str, Any]


class LayerSource:
    """The target layers of the base model and, one after the other, those of this rank with their weights."""

    def __init__(self, config: RunConfig, method: Method, statistics: StatisticsReader | None) -> None:
        self._config = config
        self._model = empty_model(config.model)
        self._method = method
        self._statistics = statistics
        self._device = training_device()
        modules = adapted_modules(self._model, config.model, method.adapts_convolutions)
        self.layers = describe(modules)
        every = [layer_cost(method, layer) for layer in self.layers]
        owners = assign_by_cost([cost.total for cost in every], world_size())
        own = [i for i, owner in enumerate(owners) if owner == rank()]
        available = available_to_a_rank(self._device)
        self.at_a_time = layers_at_a_time(self._device, [every[i].bytes for i in own], available)
        order = begin_order([every[i].on_cpu for i in own], self.at_a_time)
        self.mine = [self.layers[own[place]] for place in order]

    @cached_property
    def _weights(self) -> BaseWeights:
        return BaseWeights(self._config.model, self._model)

    def loaded(self, layers: Sequence[Layer]) -> Iterator[LoadedLayer]:
        """``layers`` with their weights; the next one is read from disk, and checked, while others are worked on."""
        with ThreadPoolExecutor(1, "weights") as reader:
            waiting = [reader.submit(self._load, layer) for layer in layers[:1]]
            for following in [*layers[1:], None]:
                loaded = waiting.pop().result() if waiting else None
                if following is not None:
                    waiting.append(reader.submit(self._load, following))
                if loaded is not None:
                    yield loaded

    def _load(self, layer: Layer) -> LoadedLayer:
        weight = self._weights.read(f"{layer.name}.weight").detach()
        content = {
            "layer": layer.name,
            "weight": tensor_checksum(weight),
            "statistics": self._statistics.checksums(layer.name) if self._statistics is not None else [],
            "quantisation": [self._config.model.quantization, self._config.model.double_quantization],
            "dtype": self._config.model.dtype,
            "seed": self._config.train.seed,
            "method": self._config.method["name"],
            "solver": self._config.init.solver,
        }
        return LoadedLayer(layer, weight.to(self._device), content)


def _write_candidates(config: RunConfig, method: Method, run: RunDirectory, staging: Path) -> list[WrittenCandidate]:
    """Write an ``init/`` for every candidate of the method; for the method itself where it has nothing to choose."""
    statistics = StatisticsReader(run.statistics) if (run.statistics / INDEX).is_file() else None
    source = LayerSource(config, method, statistics)
    layers = source.layers
    store = LayerStore(staging / "layers", method.cache)
    linear = [layer for layer in layers if not layer.kernel]
    if config.model.quantization == "nf4" and (misread := misread_on_cpu(linear, training_device())):
        say(
            f"warning: model.quantization: on the CPU bitsandbytes misreads {len(misread)} layers, {misread[0]} among "
            f"them, whose input is no multiple of {BLOCK} wide; init/report.json has their errors; use a GPU, or none"
        )
    findings = examine(method, source, statistics, store)
    candidates = [method.with_options(options) for options in method.candidates(layers)] or [method]
    folders = [RunDirectory(staging / f"candidate-{number}") for number in range(len(candidates))]
    ranks = [candidate.ranks(layers, findings) for candidate in candidates]
    for given in ranks:
        check_ranks(layers, given)

    kept: list[dict[str, str]] = [{} for _ in candidates]
    with work_bar("init", len(source.mine) * len(candidates)) as bar:

        def missing() -> Iterator[tuple[LoadedLayer, int, dict[str, Any]]]:
            for loaded in source.loaded(source.mine):
                name = loaded.layer.name
                bar(0, f"{name}, weight of {in_words(loaded.weight.nbytes)}")
                for number, (candidate, given) in enumerate(zip(candidates, ranks, strict=True)):
                    content = loaded.content | {
                        "rank": given.get(name, 0),
                        "finding": findings[name],
                        "options": candidate.options.model_dump(mode="json"),
                    }
                    file = store.adapter(content)
                    if file is None:
                        yield loaded, number, content
                    else:
                        kept[number][name] = str(file)
                        bar(1, name)

        def decomposed(job: tuple[LoadedLayer, int, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            loaded, number, content = job
            return _decomposed(config, candidates[number], loaded, content["rank"], statistics, findings)

        for (loaded, number, content), (tensors, report) in side_by_side(decomposed, missing(), source.at_a_time):
            kept[number][loaded.layer.name] = str(store.keep_adapter(content, tensors, report))
            bar(1, loaded.layer.name)
    gathered: list[Any] = [kept] * world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(gathered, kept)
    if rank() == 0:
        for number, (candidate, given, folder) in enumerate(zip(candidates, ranks, folders, strict=True)):
            shutil.rmtree(folder.path, ignore_errors=True)  # of an attempt that was killed
            files = {name: Path(file) for part in gathered for name, file in part[number].items()}
            _assemble(config, candidate, layers, given, findings, files, folder.init)
    barrier()
    resumed, cached = _sum_over_ranks(store.resumed), _sum_over_ranks(store.cached)
    if resumed or cached:
        say(
            f"init: of {len(layers) * len(candidates)} layers {resumed} were there from an earlier attempt, "
            f"{cached} in the cache"
        )
    # Rank 0 alone says them; it may have published the files before another rank looked.
    sizes = [
        _size(layers, given, folder.init) if rank() == 0 else "" for given, folder in zip(ranks, folders, strict=True)
    ]
    return [WrittenCandidate(*parts) for parts in zip(candidates, folders, sizes, strict=True)]


def _decomposed(
    config: RunConfig,
    method: Method,
    loaded: LoadedLayer,
    given: int,
    statistics: StatisticsReader | None,
    findings: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and report of one layer. One of rank 0 has no adapter, but over an NF4 base is quantised all the same."""
    layer, weight = loaded.layer, loaded.weight
    if given == 0:
        return {}, _quantisation(config, method, layer, weight, None, statistics) | {"residual": False}
    initial = method.initialise(layer, weight, given, statistics, findings[layer.name])
    tensors = initial.tensors(method.pair)
    if initial.subtracted is not None:
        tensors |= dict(zip(("subtracted.B", "subtracted.A"), initial.subtracted, strict=True))
    errors = _quantisation(config, method, layer, weight, initial, statistics)
    return tensors, _finite(initial.report | errors | {"residual": initial.residual})


def _of_all_ranks(phase: Phase) -> str:
    """Time and peak memory of the slowest and the fullest rank."""
    phases = [phase] * world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(phases, phase)
    return str(Phase(max(p.seconds for p in phases), max(p.peak_bytes for p in phases)))


def _sum_over_ranks(count: int) -> int:
    counts = [count] * world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(counts, count)
    return sum(counts)


def _size(layers: list[Layer], ranks: Mapping[str, int], init: Path) -> str:
    adapted = [layer for layer in layers if ranks.get(layer.name, 0) > 0]
    parameters = parameter_count(init)
    without = f" ({len(layers) - len(adapted)} layers got rank 0)" if len(adapted) < len(layers) else ""
    return f"{len(adapted)} layers{without}, {parameters:,} adapter parameters"


def examine(
    method: Method, source: LayerSource, statistics: StatisticsReader | None, store: LayerStore
) -> dict[str, dict[str, Any]]:
    """What the method finds in each layer; layers are divided among the ranks, and every rank gets all findings."""
    if type(method).examine is Method.examine:
        return {layer.name: {} for layer in source.layers}
    options = method.options.model_dump(mode="json")
    mine: dict[str, dict[str, Any]] = {}
    with work_bar("examine", len(source.mine)) as bar:

        def missing() -> Iterator[tuple[LoadedLayer, dict[str, Any]]]:
            for loaded in source.loaded(source.mine):
                name = loaded.layer.name
                bar(0, name)
                content = loaded.content | {"options": options}
                finding = store.finding(content)
                if finding is None:
                    yield loaded, content
                else:
                    mine[name] = finding
                    bar(1, name)

        def examined(job: tuple[LoadedLayer, dict[str, Any]]) -> dict[str, Any]:
            return method.examine(job[0].layer, job[0].weight, statistics)

        for (loaded, content), finding in side_by_side(examined, missing(), source.at_a_time):
            store.keep_finding(content, finding)
            mine[loaded.layer.name] = finding
            bar(1, loaded.layer.name)
    found = [mine] * world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(found, mine)
    every = {name: finding for part in found for name, finding in part.items()}
    return {layer.name: every[layer.name] for layer in source.layers}


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
    files: Mapping[str, Path],
    init: Path,
) -> None:
    """Join the layers' ``files`` into one adapter and one report, layers in the model's order."""
    tensors, reports = {}, {}
    for layer in layers:
        kept = read_kept(files[layer.name])
        tensors |= {f"{layer.name}.{name}": tensor for name, tensor in kept.tensors.items()}
        reports[layer.name] = kept.report
    adapted = [layer.name for layer in layers if ranks.get(layer.name, 0) > 0]

    subtracted = {
        name: LowRank(tensors.pop(f"{name}.subtracted.B"), tensors.pop(f"{name}.subtracted.A"), method.scaling())
        for name in adapted
        if f"{name}.subtracted.A" in tensors
    }
    if subtracted:
        write_adapter(init / SUBTRACTED, subtracted, config.model.path)
    adapter_config = method.adapter_config({name: ranks[name] for name in adapted}, config.model.path)
    write_layers(init, by_layer(tensors), adapter_config)
    content = {}
    for layer in layers:  # layers of rank 0 too: what was found there is why
        own = {"rank": ranks.get(layer.name, 0), "shape": list(layer.shape), **reports[layer.name]}
        found = {key: value for key, value in findings[layer.name].items() if not key.startswith("_")}
        content[layer.name] = _finite({**found, **own})
    summary = method.summarise(layers, findings, ranks)
    write_json(init / "report.json", {"method": config.method["name"], "summary": summary, "layers": content})
    if len(set(ranks.values())) > 1:
        draw_ranks({layer.name: ranks.get(layer.name, 0) for layer in layers}, init / "ranks.png")


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
