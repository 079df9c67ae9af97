"""Checks of a valid configuration against the files that it names, before any model is loaded.

Only what can be read in a moment: a folder's config.json, the header of a safetensors file, the first row of a data
file. What a hub id stands for is checked by the stage that downloads it.
"""

import importlib.util
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

from harness.config import PROJECTOR, RunConfig, SourceConfig, nearest
from harness.errors import UserError
from harness.methods.base import Method
from harness.methods.registry import method_class
from harness.models.targets import Layer, reads_images
from harness.tasks.registry import task_class
from harness.training.penalties.registry import entry_needs, penalty_entries

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# How LLaVA's files name what its modules are called (see `harness.models.stored_names`, which has to load the model).
_LLAVA_NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
LOOKED_AT = 100  # lines of a data file
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet")


def check(config: RunConfig) -> None:
    """Raise `UserError` for the first thing that cannot work: one line, naming the key and the remedy."""
    check_inputs(config)
    _check_method(config)
    _check_train(config)
    _check_what_is_learned(config)
    _check_tasks(config)


def check_inputs(config: RunConfig) -> None:
    """`check` for what only reads the base model and the data: no training, no evaluation."""
    _check_model(config)
    sources = {f"data.{key}": getattr(config.data, key) for key in ("train", "preserve", "validation")}
    if config.data.replay is not None:
        sources["data.replay.source"] = config.data.replay.source
    for i, penalty in enumerate(config.penalties):  # whatever lists data sets of its own
        own = [SourceConfig.model_validate(source) for source in penalty.get("sources", [])]
        sources |= {f"penalties.{i}.sources.{j}": source for j, source in enumerate(own)}
    for key, source in sources.items():
        if source is not None:
            _check_source(key, source)
            task_class(config.task)(config).check(key, source)


def _check_model(config: RunConfig) -> None:
    path = Path(config.model.path)
    if config.model.head != "new" and config.task != "image_classification":
        raise UserError(f"model.head: {config.model.head} given; it is for task image_classification, leave it out")
    if config.model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization: nf4 needs bitsandbytes, which is not installed; pip install bitsandbytes")
    if not path.is_dir():
        if path.is_absolute() or not _HUB_ID.match(config.model.path):
            raise UserError(f"model.path: {config.model.path!r} is no folder here and no hub id (org/name)")
        return
    if not (path / "config.json").is_file():
        raise UserError(f"model.path: {config.model.path} has no config.json; give a folder saved by save_pretrained")
    shapes = _weight_shapes(path)
    if not shapes:
        raise UserError(f"model.path: {config.model.path} has no safetensors weights; save it with save_pretrained")
    _check_targets(config, shapes)


def _check_targets(config: RunConfig, shapes: dict[str, list[int]]) -> None:
    name = config.method["name"]
    cls = method_class(name)
    if config.task == "image_text":
        shapes = _beside_tower(config, shapes)
    if config.task == "image_classification" and isinstance(config.model.target_modules, list):
        shapes = _as_modules(config, shapes)
    layers = {n: s for n, s in shapes.items() if len(s) == 2 and not _is_embedding(n)}
    convolutions = {n: s for n, s in shapes.items() if 3 <= len(s) <= 5}
    targets = config.model.target_modules
    if isinstance(targets, str):
        if "conv" in targets and not cls.adapts_convolutions:
            raise UserError(
                f"model.target_modules: {targets} given, and method {name!r} has no form for convolutions; use method "
                "flora or lora_conv, or all-linear"
            )
        chosen = (layers if "linear" in targets else {}) | (convolutions if "conv" in targets else {})
    else:
        allowed = layers | convolutions if cls.adapts_convolutions else layers
        known = sorted({n.rsplit(".", 1)[-1] for n in allowed})
        for target in targets:
            if any(_is_named(n, target) for n in allowed):
                continue
            if any(_is_named(n, target) for n in convolutions):
                raise UserError(
                    f"model.target_modules: {target!r} is a convolution, for which method {name!r} has no form; use "
                    "method flora or lora_conv, or name linear layers"
                )
            raise UserError(
                f"model.target_modules: {target!r} matches no {'' if layers == allowed else 'convolution and no '}"
                f"linear layer; allowed: all-linear or any of {', '.join(known)}{nearest(target, known)}"
            )
        chosen = {n: s for n, s in allowed.items() if any(_is_named(n, t) for t in targets)}
    # The head is trained in full, whatever its size.
    linear = {n: s for n, s in _of_body(chosen).items() if len(s) == 2}
    rank = config.method.get("rank")
    if isinstance(rank, int) and linear:
        layer, shape = min(linear.items(), key=lambda item: min(item[1]))
        if rank > min(shape):
            raise UserError(
                f"method.rank: {rank} given; layer {layer} is {shape[0]}×{shape[1]}, so at most {min(shape)}"
            )
    options = cls.Options.model_validate({key: value for key, value in config.method.items() if key != "name"})
    cls(options).check_layers([Layer(n, s[0], s[1], tuple(s[2:])) for n, s in chosen.items()])


def _beside_tower(config: RunConfig, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The layers under the names of a LLaVA's modules, without those that are adapted only if they are named alone."""
    named = {}
    for stored, shape in shapes.items():
        place = next(((a, b) for a, b in _LLAVA_NAMES if stored.startswith(a)), ("", ""))
        named[place[1] + stored.removeprefix(place[0])] = shape
    projector, targets = config.model.projector == "adapted", config.model.target_modules
    outside = {n: s for n, s in named.items() if not reads_images(n) or (projector and PROJECTOR in n.split("."))}
    alone = isinstance(targets, list) and not all(any(_is_named(n, target) for n in outside) for target in targets)
    return named if alone else outside


def _as_modules(config: RunConfig, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The layers under the names of their modules, which a ViT's files call otherwise."""
    from harness.models.stored_names import parameter_names
    from harness.models.weights import empty_model

    stored = {f"{name}.weight": shape for name, shape in shapes.items()}
    names = parameter_names(empty_model(config.model), stored)
    return {names[name].removesuffix(".weight"): shape for name, shape in stored.items() if name in names}


def _of_body(layers: dict[str, list[int]]) -> dict[str, list[int]]:
    """The layers that lie where most do: a model's body has one name, its head another."""
    parts = Counter(name.partition(".")[0] for name in layers)
    return {name: shape for name, shape in layers.items() if name.partition(".")[0] == parts.most_common(1)[0][0]}


def _is_named(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Module name → shape of its weight, from the headers of a folder's safetensors files."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            try:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            except (ValueError, OverflowError) as error:
                raise UserError(f"model.path: {file} is damaged: its safetensors header cannot be read") from error
        for name, entry in header.items():
            if name.endswith(".weight"):
                shapes[name.removesuffix(".weight")] = entry["shape"]
    return shapes


def _is_embedding(module: str) -> bool:
    last = module.rsplit(".", 1)[-1]
    return "embed" in last or last in ("lm_head", "wte", "wpe", "output")


def _check_source(key: str, source: SourceConfig) -> None:
    from harness.data.templates import TEMPLATES

    if source.template not in TEMPLATES:
        allowed = sorted(TEMPLATES)
        raise UserError(
            f"{key}.template: {source.template!r} given; allowed: {', '.join(allowed)}"
            f"{nearest(source.template, allowed)}"
        )
    path = Path(source.path)
    if not path.exists():
        if path.suffix in _DATA_SUFFIXES or path.is_absolute() or not _HUB_ID.match(source.path):
            raise UserError(f"{key}.path: {source.path}: no such file; give a hub id, a folder or a .jsonl file")
        return
    if path.is_file() and path.suffix not in _DATA_SUFFIXES:
        raise UserError(f"{key}.path: {source.path}: allowed are {', '.join(_DATA_SUFFIXES)} files, folders, hub ids")
    if not re.fullmatch(r"\w+(\[[\d%]*:[\d%]*\])?", source.split):
        raise UserError(f"{key}.split: {source.split!r} given; write a name or a slice such as train[:1000]")
    if path.is_file() and source.split.partition("[")[0] != "train":
        raise UserError(
            f"{key}.split: {source.split!r} given; a file has one split: train, or a slice such as train[:1000]"
        )
    columns = _columns(f"{key}.path", path)
    for field in ("prompt", "pair", "response", "image"):
        column = getattr(source, field)
        if columns is not None and column is not None and column not in columns:
            raise UserError(
                f"{key}.{field}: no column {column!r} in {path}; there are: {', '.join(columns)}"
                f"{nearest(column, columns)}"
            )


def _columns(key: str, path: Path) -> list[str] | None:
    """Column names of a data file; None where only a full read would tell (.json, folders)."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{key}: {path} is no readable Parquet file: {' '.join(str(error).split())}") from error
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), None)
    if first is None:
        raise UserError(f"{key}: {path} is empty; a .jsonl file has one JSON object a line")
    try:
        row = json.loads(first)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{key}: {path}: line 1 is not JSON ({error}); a .jsonl file has one object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{key}: {path}: line 1 is not a JSON object; a .jsonl file has one object a line")
    return list(row | _keys_of_more(path))


def _keys_of_more(path: Path) -> dict[str, None]:
    """The keys of a .jsonl file's first lines: a row may leave out what it has not, such as an image."""
    found: dict[str, None] = {}
    with path.open("rb") as file:
        for line in islice(file, LOOKED_AT):
            try:
                row = json.loads(line)
            except ValueError:  # said where all rows are read
                continue
            found |= dict.fromkeys(row) if isinstance(row, dict) else {}
    return found


def _check_method(config: RunConfig) -> None:
    name = config.method["name"]
    cls = method_class(name)
    options = cls.Options.model_validate({key: value for key, value in config.method.items() if key != "name"})
    if cls.trains_base and config.model.quantization != "none":
        raise UserError(
            f"model.quantization: {config.model.quantization} given; method {name!r} trains the base weights, which "
            "cannot be quantised; use none, or an adapter method"
        )
    if cls.needs_quantised_base and config.model.quantization == "none":
        raise UserError(
            f"model.quantization: none given; method {name!r} makes up for the error of quantisation; use nf4, or "
            "another method"
        )
    request, probe = cls(options).statistics(), cls(options).probe()
    if request is not None and request.data == "preserve" and config.data.preserve is None:
        raise UserError(f"data.preserve: missing; method {name!r} takes its statistics from data to preserve")
    if probe is not None and config.data.preserve is None:
        raise UserError(
            f"data.preserve: missing; method.{probe.option}: auto weighs what is learned against what is lost on it; "
            f"give data.preserve or set method.{probe.option}"
        )
    _check_penalties(config, cls)
    if config.train.diagnostics_steps is not None and cls.trains_base:
        raise UserError(
            f"train.diagnostics_steps: {config.train.diagnostics_steps} given; method {name!r} has no adapter to look "
            "at; leave it out"
        )
    if config.train.preserve_loss_steps is not None and config.data.preserve is None:
        raise UserError("data.preserve: missing; train.preserve_loss_steps measures the loss on it")


def _check_penalties(config: RunConfig, method: type[Method]) -> None:
    name, anchor = config.method["name"], config.anchor
    if anchor is not None and anchor.data == "train" and anchor.prompts is not None:
        raise UserError(
            f"anchor.prompts: {anchor.prompts} given; with anchor.data: train there are no prompts to choose among; "
            "leave it out, or set anchor.data: preserve"
        )
    if anchor is not None and anchor.schedule == "constant" and anchor.final_kl > 0:
        raise UserError(
            f"anchor.final_kl: {anchor.final_kl} given; with anchor.schedule: constant β stays at anchor.kl; set "
            "anchor.schedule: linear or cosine"
        )
    for entry in penalty_entries(config):
        penalty, needs = entry["name"], entry_needs(entry)
        if needs.original_model and method.trains_all:
            raise UserError(
                f"{penalty}: over method {name!r} it would need a second copy of the weights, which is not supported; "
                "remove it, set anchor.reference: cached, or use an adapter method (lora, corda)"
            )
        if needs.adapter and method.trains_base:
            raise UserError(
                f"{penalty}: it is about the weights of an adapter, and method {name!r} has none; remove it, or use an "
                "adapter method (lora, corda)"
            )
        if needs.pair_alone and method.trains_more_than_pair:
            raise UserError(
                f"{penalty}: as configured it is for adapters that train A and B of linear layers alone, and "
                f"method {name!r} trains more; allowed over it: curvature: diag"
            )
        if needs.pair_alone and (config.model.modules_to_save or config.model.projector != "frozen"):
            more = "modules_to_save" if config.model.modules_to_save else f"projector: {config.model.projector}"
            raise UserError(
                f"{penalty}: as configured it is for adapters of layers that read tokens, and nothing else that is "
                f"trained; model.{more} given; allowed beside it: curvature: diag"
            )
        if (needs.preserve or needs.answers) and config.data.preserve is None:
            raise UserError(f"data.preserve: missing; {penalty} needs prompts to preserve")


def _check_what_is_learned(config: RunConfig) -> None:
    """What a task without text as its answer has no form for, and losses on rows that say no answer."""
    task = task_class(config.task)(config)
    replay = config.data.replay
    entries = {entry["name"]: entry_needs(entry) for entry in penalty_entries(config)}
    if not task.generates:
        for name, needs in entries.items():
            if needs.original_model or needs.answers or name == "anchor":
                raise UserError(
                    f"{name}: task {config.task!r} has a head that the original model has not, so there are no answers "
                    "to hold on to; remove it, or keep old rows by data.replay"
                )
        if "migu" in entries and not task.reads_text:
            raise UserError(
                f"penalties: migu goes by outputs at tokens, and rows of task {config.task!r} have none; remove it"
            )
        if replay is not None and replay.answers:
            raise UserError(
                f"data.replay.answers: true given; with task {config.task!r} the original model answers nothing; "
                "replay rows with right answers (data.replay.source)"
            )
    for name, needs in entries.items():
        if needs.pair_alone and task.has_head:
            raise UserError(
                f"{name}: as configured it is for runs that train A and B of linear layers alone, and the head of task "
                f"{config.task!r} is trained beside them; allowed over it: curvature: diag"
            )
    preserve = config.data.preserve
    if preserve is None or task.labelled(preserve):
        return
    method = method_class(config.method["name"])
    options = method.Options.model_validate({key: value for key, value in config.method.items() if key != "name"})
    request, probe = method(options).statistics(), method(options).probe()
    reasons = {
        f"method {config.method['name']!r}": request is not None
        and request.data == "preserve"
        and request.needs_gradients,
        f"method.{probe.option}: auto" if probe is not None else "": probe is not None,
        "train.preserve_loss_steps": config.train.preserve_loss_steps is not None,
        "data.replay": replay is not None and replay.source is None and replay.ratio > 0,
        **{name: needs.preserve for name, needs in entries.items()},
    }
    for who in (name for name, wants in reasons.items() if wants):
        raise UserError(
            f"data.preserve.response: missing; {who} needs the loss of task {config.task!r} on these rows, and they "
            "say no answers; name their column, or leave it out (eval.knowledge: [preserve] needs none)"
        )


def _check_train(config: RunConfig) -> None:
    train = config.train
    ranks = train.ranks if isinstance(train.ranks, int) else 1
    micro = train.micro_batch_size or max(1, train.batch_size // ranks)
    if train.batch_size % (ranks * micro):
        raise UserError(
            f"train.batch_size: {train.batch_size} given; make it a multiple of train.ranks × "
            f"train.micro_batch_size = {ranks} × {micro}"
        )
    path = Path(train.deepspeed)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, IsADirectoryError) as error:
        raise UserError(f"train.deepspeed: {path} is not JSON: {error}; copy one of ds_configs/*.json") from error
    stage = content.get("zero_optimization", {}).get("stage") if isinstance(content, dict) else None
    if stage not in (1, 2, 3):
        raise UserError(f"train.deepspeed: zero_optimization.stage is {stage!r} in {path}; allowed: 1, 2, 3")


def _check_tasks(config: RunConfig) -> None:
    names = [*config.eval.knowledge, *config.eval.task]
    if not names:
        return
    if config.task != "causal_lm":
        _check_direct(config, names)
        return
    from harness.evaluation.engines import check_backend
    from harness.evaluation.suites import expand
    from harness.evaluation.tasks import check_data, check_tasks

    options = config.eval
    check_backend(
        options.backend, tensor_parallel=options.tensor_parallel, engines=options.engines, server=options.server
    )
    include_path, data_dir = (None if p is None else Path(p) for p in (config.eval.include_path, config.eval.data_dir))
    names = expand(names, include_path)
    check_tasks(names, include_path, data_dir)
    if data_dir is not None:  # what comes from the hub is looked for by the stage that needs it
        check_data(names, include_path, data_dir)
    _check_reference(config)


def _check_direct(config: RunConfig, names: list[str]) -> None:
    """What the direct evaluation is asked, and whether the base can be asked what it knew."""
    from harness.evaluation.direct import VALIDATION, questions
    from harness.tasks.masked_lm import MaskedLM, check_masked_head

    for question in questions(config, names):
        if not question.retention and question.name != VALIDATION:
            question.task.check(question.key, question.source)
        folder = Path(config.model.path)
        if isinstance(question.task, MaskedLM) and folder.is_dir():
            check_masked_head(config.model.path, _weight_shapes(folder))
    _check_reference(config)


def _check_reference(config: RunConfig) -> None:
    reference = config.eval.full_fine_tuning
    if reference is not None and not (Path(reference) / "eval" / "results.json").is_file():
        raise UserError(
            f"eval.full_fine_tuning: {reference} has no eval/results.json; give the run directory of a full "
            "fine-tuning run that was evaluated"
        )
