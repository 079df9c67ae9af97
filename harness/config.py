"""The run configuration: what the user writes in YAML, checked before anything heavy is imported or loaded.

Every mistake becomes one `UserError` line that names the key, the value, what is allowed and the nearest valid
name. `load_config` reads and validates the shape; `harness.preflight` looks at the files that it names.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from harness.errors import UserError
from harness.resources import find


class Strict(BaseModel):
    """A block of the configuration: exact types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Block = TypeVar("Block", bound=BaseModel)
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


TaskName = Literal[
    "causal_lm",
    "image_text",
    "sequence_classification",
    "regression",
    "question_answering",
    "masked_lm",
    "image_classification",
]


PROJECTOR = "multi_modal_projector"  # as transformers calls it in LLaVA and its like


class ModelConfig(Strict):
    """The base model. `quantization: nf4` quantises the frozen (residual) weights; adapters never are.

    `modules_to_save`: modules that are trained in full and saved beside the adapter; the head that a task adds is
    always one of them. `projector`: what becomes of the projector of a vision-language model. `head` of an image
    classifier: one for the classes of `data.train`, or the base's own with rows for those.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["none", "nf4"] = "none"
    double_quantization: bool = True
    target_modules: Literal["all-linear", "all-conv", "all-linear+conv"] | list[str] = "all-linear"
    modules_to_save: list[str] = []
    projector: Literal["frozen", "full", "adapted"] = "frozen"
    head: Literal["new", "extended"] = "new"
    _task: TaskName = PrivateAttr("causal_lm")
    _original: str | None = PrivateAttr(None)
    _head: tuple[str, ...] = PrivateAttr(())

    @property
    def task(self) -> TaskName:
        """The run's task, which decides the class of the model."""
        return self._task

    @property
    def original(self) -> str:
        """The base that the user named, where `path` is a copy of it with a head (`harness.tasks.head`)."""
        return self._original or self.path

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """Modules that are trained in full beside an adapter, by name: those listed, the projector, the task's head."""
        projector = (PROJECTOR,) if self.projector == "full" else ()
        return tuple(dict.fromkeys((*self.modules_to_save, *projector, *self._head)))

    def with_head(self, path: str, head: Sequence[str]) -> "ModelConfig":
        """This base with the task's ``head``, saved at ``path``."""
        other = self.model_copy(update={"path": path})
        other._original, other._head = self.original, tuple(head)
        return other


class SourceConfig(Strict):
    """One data set: a hub id, a local directory, or a local .jsonl, .json or .parquet file.

    `subset`: which of a hub id's data sets, where it has several (GLUE's tasks).

    Columns: `prompt` is the text that is read, `pair` a second one (the other sentence; the context of a question),
    `response` what is to be learned (text, class, number, answers), `image` paths or bytes of images, one or a list;
    `image_folder` is where relative paths start. `classes`: the names of the classes in the order of their numbers.
    Of questions about images: `options`, the columns of what to choose from (one that lists them, or one for each), and
    `instruction`, a last line for every question (how to answer).
    """

    path: str
    subset: str | None = None
    split: str = "train"
    prompt: str | None = None
    pair: str | None = None
    response: str | None = None
    image: str | None = None
    image_folder: str | None = None
    classes: list[str] | None = None
    options: list[str] | None = None
    instruction: str | None = None
    template: str = "none"
    samples: PositiveInt = 256  # rows drawn when statistics are taken from this source


class AnswersConfig(Strict):
    """How the original model answers preserve prompts: up to `max_tokens` new tokens; `temperature: 0` is greedy."""

    max_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 1.0


class ReplayConfig(Strict):
    """Replay: a share `ratio` of the places in the batches goes to rows of `data.preserve`, or of `source`.

    `answers: true` takes the rows of `data.preserve` with answers of the original model.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)]
    source: SourceConfig | None = None
    answers: bool = False

    @field_validator("answers")
    @classmethod
    def _answers_are_of_preserve(cls, answers: bool, info: ValidationInfo) -> bool:
        if answers and info.data.get("source") is not None:
            raise ValueError("false beside data.replay.source: the original model answers prompts of data.preserve")
        return answers


class DataConfig(Strict):
    """What to learn (`train`), what to keep (`preserve`), and what of it to `replay` among what is learned.

    `validation`: rows that are not trained on, for tasks that lm-eval has no form for. `bad_images`: what becomes of
    rows whose image is missing or damaged.
    """

    train: SourceConfig
    preserve: SourceConfig | None = None
    validation: SourceConfig | None = None
    bad_images: Literal["refuse", "skip"] = "refuse"
    max_length: PositiveInt = 512
    replay: ReplayConfig | None = None
    answers: AnswersConfig | None = None

    @field_validator("replay")
    @classmethod
    def _replay_has_rows(cls, replay: ReplayConfig | None, info: ValidationInfo) -> ReplayConfig | None:
        if replay is not None and replay.source is None and info.data.get("preserve") is None:
            raise ValueError("replay with data.preserve, or with a data.replay.source of its own")
        return replay

    @property
    def replay_ratio(self) -> float:
        """The share of replayed rows; 0 without replay."""
        return 0.0 if self.replay is None else self.replay.ratio


class AnchorConfig(Strict):
    """The anchor: `kl` (β) times the KL divergence from the original model, by default on some preserve prompts a step.

    `reference: cached` computes the original model's `top_k` most probable tokens once, before training. `schedule`
    takes β from `kl` at the first step to `final_kl` at the last.
    """

    kl: NonNegativeFloat = 1.0
    prompts_per_step: PositiveInt = 4
    prompts: PositiveInt | None = None
    data: Literal["preserve", "train"] = "preserve"
    reference: Literal["live", "cached"] = "live"
    top_k: PositiveInt = 64
    tokens: Literal["all", "last", "answer"] = "all"
    temperature: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_kl: NonNegativeFloat = 0.0


class InitConfig(Strict):
    """How statistics are collected and layers decomposed; every choice leads to the same numbers, up to rounding.

    `collection`: `resident` holds the whole model and all statistics, `streamed` one decoder block and its statistics;
    `auto` is resident where that fits. `solver`: how singular vectors are found, see docs/decomposition.md. `cache`:
    keep plain SVDs, statistics and initial adapters for other runs, and take theirs.
    """

    collection: Literal["auto", "resident", "streamed"] = "auto"
    solver: Literal["auto", "gram", "svd", "partial"] = "auto"
    cache: bool = True


class TrainConfig(Strict):
    """Optimisation. `batch_size` is global: over all ranks and accumulation steps."""

    deepspeed: str = "ds_configs/zero2.json"
    ranks: PositiveInt | Literal["auto"] = "auto"
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 128
    micro_batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat = 2.0e-5
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    log_steps: PositiveInt = 10
    save_steps: PositiveInt = 500
    preserve_loss_steps: PositiveInt | None = None
    preserve_loss_samples: PositiveInt = 64
    diagnostics_steps: PositiveInt | None = None
    diagnostics: Annotated[list[Literal["norms", "amplification", "orthogonality"]], Field(min_length=1)] = [
        "norms",
        "amplification",
        "orthogonality",
    ]


class EvalConfig(Strict):
    """Which tasks say what was kept (`knowledge`) and what was learned (`task`); either may name suites as well.

    `server` is the address of a running OpenAI-compatible server, for `backend: server`. `tensor_parallel`:
    accelerators that one vLLM engine is spread over; `engines`: how many share the items.
    """

    backend: Literal["vllm", "hf", "server"] = "vllm"
    server: str | None = None
    tensor_parallel: PositiveInt = 1
    engines: PositiveInt = 1
    knowledge: list[str] = []
    task: list[str] = []
    checkpoints: bool = False
    limit: PositiveInt | None = None
    batch_size: PositiveInt = 64
    data_dir: str | None = None
    include_path: str | None = None
    full_fine_tuning: str | None = None


class EvaluationWorkerConfig(Strict):
    """What the process that evaluates asks of a node; `gpus: auto` is one where the cluster has any."""

    cpus: PositiveInt = 1
    gpus: NonNegativeInt | Literal["auto"] = "auto"
    resources: dict[str, PositiveFloat] = {}


class ClusterConfig(Strict):
    """How a run is spread over a Ray cluster, see docs/cluster.md; nothing here changes what is computed.

    One worker is one rank. `init_workers`: how many decompose layers. `storage`: a folder that all nodes share, or an
    fsspec URL that stages are copied to and from; without it `output_dir` is shared. `on_loss`: go on with the workers
    that are there, or wait for as many as before. `attempts`: failures in a row without progress that end the run.
    """

    address: str | None = None
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: NonNegativeInt | Literal["auto"] = "auto"
    resources_per_worker: dict[str, PositiveFloat] = {}
    ranks_per_node: PositiveInt | None = None
    placement: Literal["pack", "strict_pack", "spread", "strict_spread"] = "pack"
    init_workers: PositiveInt | Literal["auto"] = "auto"
    evaluation: EvaluationWorkerConfig = EvaluationWorkerConfig()
    storage: str | None = None
    environment: dict[str, str] = {}
    on_loss: Literal["continue", "wait"] = "continue"
    wait_minutes: NonNegativeFloat = 30
    attempts: PositiveInt = 3


class RunConfig(Strict):
    """A whole run. `method` and each entry of `penalties` are validated by the class that they name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: TaskName = "causal_lm"
    model: ModelConfig
    data: DataConfig
    method: dict[str, Any]
    init: InitConfig = InitConfig()
    anchor: AnchorConfig | None = None
    penalties: list[dict[str, Any]] = []
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    output_dir: str = "runs"

    @model_validator(mode="after")
    def _method_is_named(self) -> "RunConfig":
        if not isinstance(self.method.get("name"), str):
            raise ValueError("method.name is missing: name a method, for example `method: {name: lora}`")
        return self

    @property
    def run_directory(self) -> Path:
        """The folder of this run: ``<output_dir>/<name>``."""
        return Path(self.output_dir) / self.name

    def dump(self) -> str:
        """The resolved configuration as YAML; loading it again gives the same run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read the YAML file ``path``, apply ``key.subkey=value`` overrides, validate, make local paths absolute.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a type or value is wrong.
    """
    return resolve(read_content(path, overrides), path.parent)


def read_content(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """What the YAML file ``path`` says under ``overrides``, as nested dictionaries, not validated.

    ``path`` may name a row of a recipe, ``recipe.yaml:row`` (see `harness.recipes`).

    Raises:
        UserError: the file is missing or not YAML, there is no such row, an override is malformed.
    """
    from harness.recipes import configuration

    content = configuration(path)
    for override in overrides or []:
        _apply(content, override)
    return content


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of the YAML file ``path``, not yet validated.

    Raises:
        UserError: the file is missing, not YAML, or no mapping of keys.
    """
    if not path.is_file():
        raise UserError(f"config: {path}: no such file; give the path of a YAML file (see launch/recipes)")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"config: {path}: a mapping of keys is expected, got {type(content).__name__}")
    return content


def resolve(content: dict[str, Any], folder: Path | None = None) -> RunConfig:
    """Validate a configuration given as nested dictionaries; ``folder`` is where its relative paths start."""
    config = validate(RunConfig, content)
    method = _complete(config.method, "method")
    penalties = [_complete(penalty, f"penalties.{i}") for i, penalty in enumerate(config.penalties)]
    for penalty in penalties:  # whatever lists data sets of its own
        for source in penalty.get("sources", []):
            source["path"] = _local(source["path"], folder)
    update: dict[str, Any] = {"method": method, "penalties": penalties}
    model = config.model.model_copy(update={"path": _local(config.model.path, folder)})
    model._task = config.task
    update["model"] = model
    sources = {
        key: _located(source, folder)
        for key in ("train", "preserve", "validation")
        if (source := getattr(config.data, key)) is not None
    }
    replay = config.data.replay
    if replay is not None and replay.source is not None:
        source = _located(replay.source, folder)
        sources["replay"] = replay.model_copy(update={"source": source})
    update["data"] = config.data.model_copy(update=sources)
    try:
        deepspeed = str(find(config.train.deepspeed, folder))
    except FileNotFoundError as error:
        known = sorted(file.name for file in find("ds_configs").glob("*.json"))
        raise UserError(f"train.deepspeed: {error}; shipped: {', '.join('ds_configs/' + n for n in known)}") from error
    update["train"] = config.train.model_copy(update={"deepspeed": deepspeed})
    places = {
        key: _existing(f"eval.{key}", value, folder)
        for key in ("data_dir", "include_path", "full_fine_tuning")
        if (value := getattr(config.eval, key)) is not None
    }
    update["eval"] = config.eval.model_copy(update=places)
    update["output_dir"] = str(Path(config.output_dir).expanduser().absolute())
    return config.model_copy(update=update)


def validate(model: type[Block], values: Any, prefix: str = "") -> Block:
    """Validate ``values`` against ``model``; the first problem becomes a `UserError` naming the dotted key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(model, error.errors(), prefix)) from error


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the closest of ``known``, else an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def _explain(model: type[BaseModel], problems: list[Any], prefix: str) -> str:
    problem = problems[0]
    names = _names(problem)
    key = ".".join([*filter(None, [prefix]), *names])
    given = problem["input"]
    if problem["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, names[:-1]))
        return f"{key}: unknown key (given {given!r}); allowed here: {', '.join(known)}{nearest(names[-1], known)}"
    if problem["type"] == "invalid_key":
        return f"{key}: the key {given!r} is not text; YAML reads on, off, yes, no and null as values: quote it"
    if problem["type"] == "missing":
        return f"{key}: missing; add it to the configuration"
    if problem["type"] == "value_error" and not key:
        return str(problem["ctx"]["error"])
    # A union reports what each of its members wanted.
    expected = " or ".join(dict.fromkeys(_expected(other) for other in problems if _names(other) == names))
    hint = ""
    if problem["type"] == "literal_error" and isinstance(given, str):
        hint = nearest(given, re.findall(r"'([^']+)'", expected))
    return f"{key}: {given!r} given; allowed: {expected}{hint}"


def _names(problem: Any) -> list[str]:
    """The dotted key of a problem, in parts."""
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return [str(part) for part in problem["loc"]]
    # Unions add the names of their members to the location; a dotted key has only field names and list indices.
    location = [part for part in problem["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_]\w*", str(part))]
    branches = {"int", "float", "str", "bool", "list", "literal"}
    return [str(part) for part in location if isinstance(part, int) or part not in branches]


def _expected(problem: Any) -> str:
    if problem["type"] in ("model_type", "dict_type"):
        return "a mapping of keys"
    return (
        problem["msg"]
        .removeprefix("Input should be ")
        .removeprefix("Value error, ")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )


def _fields_at(model: type[BaseModel], names: list[str]) -> list[str]:
    for name in names:
        if name.isdigit():
            continue
        field = model.model_fields[name].annotation
        candidates = [field, *getattr(field, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _complete(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Validate the options of a method or penalty with its own class, defaults filled in."""
    from harness.methods.registry import method_class
    from harness.training.penalties.registry import penalty_class

    lookup = method_class if key == "method" else penalty_class
    name = values.get("name")
    if not isinstance(name, str):
        raise UserError(f"{key}.name: missing; every entry names what it configures")
    options = validate(lookup(name).Options, {k: v for k, v in values.items() if k != "name"}, key)
    return {"name": name, **options.model_dump(mode="json")}


def _local(path: str, folder: Path | None) -> str:
    """An absolute path where ``path`` is a local file or folder, else ``path`` itself (a hub id)."""
    try:
        return str(find(path, folder))
    except FileNotFoundError:
        return path


def _located(source: SourceConfig, folder: Path | None) -> SourceConfig:
    """The source with absolute paths where it names local files or folders."""
    update = {"path": _local(source.path, folder)}
    if source.image_folder is not None:
        update["image_folder"] = _local(source.image_folder, folder)
    return source.model_copy(update=update)


def _existing(key: str, path: str, folder: Path | None) -> str:
    try:
        return str(find(path, folder))
    except FileNotFoundError as error:
        raise UserError(f"{key}: {error}") from error


def _apply(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"override: {override!r} given; write key.subkey=value, for example train.seed=1")
    try:
        value = yaml.load(text, Loader=_Loader) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {text!r} is not valid YAML; quote it if it is text") from error
    put(content, key, value)


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` in nested mappings; those on the way that are not there are made.

    Raises:
        UserError: a part of the key holds something that has no keys.
    """
    parts = key.split(".")
    place = content
    for part in parts[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise UserError(f"{key}: {part!r} holds {place!r}, which has no keys of its own")
    place[parts[-1]] = value


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `2e-5` is a number (YAML 1.1 asks for `2.0e-5`), and a key stands once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"the key '{key.value}' stands twice (again in line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
