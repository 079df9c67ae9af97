"""Reading a run directory into one record, whatever has been run of it so far.

A report is worth most when something went wrong, so nothing here insists on a finished run: every part may be
missing, training may have been resumed (steps are then logged twice), and the last line of ``metrics.jsonl``
may be half a line, because the process was killed while it wrote.

K, T and KT are those of FARSS, Appendix A.3: K = mean_j W_j / W_j(0) (Eq. 36), T = mean_i S_i / S_i(FT) (Eq.
37), KT = 2·K·T / (K + T) (Eq. 38). Avg. is the mean of the raw scores on all tasks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from harness.errors import UserError
from harness.files import read_json

RESULTS_SCHEMA = 1
_CONFIG, _ENVIRONMENT, _METRICS = "config.yaml", "environment.json", "metrics.jsonl"
_INITIALISATION, _RESULTS = "init/report.json", "eval/results.json"
_NOT_PENALTIES = frozenset(
    {"step", "epoch", "seconds", "loss", "learning_rate", "grad_norm", "total_loss"}
    | {"preserve_loss", "preserve_perplexity", "preserve_accuracy"}
)
# Quantities of `train.diagnostics_steps`, logged as <quantity>/<module type>, with `ALL` for all layers together.
DIAGNOSTICS = (
    "spectral_norm",
    "frobenius_norm",
    "amplification_w_to_dw",
    "amplification_dw_to_w",
    "orthogonality_error",
)
ALL = "all"
_LOGGED_DIAGNOSTICS = frozenset({*DIAGNOSTICS, "spectral_norm_max"})


@dataclass(frozen=True)
class Score:
    """One model's score on one task; ``stderr`` is None where the metric has none."""

    metric: str
    value: float
    stderr: float | None = None
    items: int | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """The base (``step`` None), a checkpoint, or the final model, with its scores by task.

    ``intervals``: 95 % intervals of K, T, KT and Avg., those that are known; none from an earlier version's evaluation.
    """

    name: str
    step: int | None
    scores: Mapping[str, Score]
    K: float | None = None
    T: float | None = None
    KT: float | None = None
    Avg: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float | None = None
    samples_per_second: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """``eval/results.json``: the models in the order base, checkpoints by step, final."""

    base_model: str
    engine: str
    knowledge: tuple[str, ...]
    task: tuple[str, ...]
    models: tuple[EvaluatedModel, ...]
    T_reference: str | None = None
    T_reference_scores: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def base(self) -> EvaluatedModel | None:
        """The model before training."""
        return next((model for model in self.models if model.name == "base"), None)

    @property
    def final(self) -> EvaluatedModel | None:
        """The model after the last step."""
        return next((model for model in self.models if model.name == "final"), None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task, knowledge first."""
        return (*self.knowledge, *(name for name in self.task if name not in self.knowledge))

    @property
    def has_intervals(self) -> bool:
        """Whether any model has one."""
        return any(model.intervals for model in self.models)

    @property
    def best(self) -> EvaluatedModel | None:
        """The trained model with the highest KT (the latest of equals), or None if no KT is known."""
        known = [model for model in self.path if model.step and model.KT is not None]
        return max(reversed(known), key=lambda model: model.KT or 0.0, default=None)

    @property
    def path(self) -> tuple[EvaluatedModel, ...]:
        """The models in the order in which training passed through them, one for each step (final wins)."""
        by_step = {0 if model.name == "base" else model.step: model for model in self.models}
        return tuple(by_step[step] for step in sorted(step for step in by_step if step is not None))


@dataclass(frozen=True)
class Layer:
    """One line of ``init/report.json``: ``shape`` is (out, in); ``values`` are the method's own numbers."""

    name: str
    rank: int | None
    shape: tuple[int, ...]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Initialisation:
    """``init/report.json``."""

    method: str
    layers: tuple[Layer, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the layers that have one, in the order of the layers."""
        return tuple(layer.rank for layer in self.layers if layer.rank is not None)

    @property
    def spread(self) -> str:
        """ "16" where all ranks are equal, else "8 to 64, mean 31.5"; empty where no layer has one."""
        if len(set(self.ranks)) < 2:
            return "".join(map(str, set(self.ranks)))
        return f"{min(self.ranks)} to {max(self.ranks)}, mean {fmean(self.ranks):.1f}"

    @property
    def adapter_parameters(self) -> int:
        """Σ r·(out + in) over linear layers: B (out × r) and A (r × in), without what a form has besides them."""
        matrices = (layer for layer in self.layers if layer.rank is not None and len(layer.shape) == 2)
        return sum((layer.rank or 0) * sum(layer.shape) for layer in matrices)

    @property
    def layer_parameters(self) -> int:
        """Σ out·in over linear layers: the parameters of the weights that are adapted."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers if len(layer.shape) == 2)


@dataclass(frozen=True)
class RunRecord:
    """Everything a report says about one run. A part that has not been run is None (``metrics``: empty).

    Attributes:
        path: the run directory, absolute.
        name: ``name`` of the configuration, else the folder's name.
        metrics: one mapping per logged step, by step; the last value written for a step and key stands.
        notes: what the reader met on the way (a half-written line, a resumed training, a loss that is not a
        number).
    """

    path: Path
    name: str
    config: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None
    metrics: tuple[Mapping[str, float], ...] = ()
    initialisation: Initialisation | None = None
    evaluation: Evaluation | None = None
    notes: tuple[str, ...] = ()

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged quantity; values may be NaN or inf where training diverged."""
        points = [(int(line["step"]), line[key]) for line in self.metrics if key in line]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def penalties(self) -> tuple[str, ...]:
        """Keys of the penalties that were logged, in alphabetical order."""
        keys = {key for line in self.metrics for key in line} - _NOT_PENALTIES
        return tuple(sorted(key for key in keys if key.partition("/")[0] not in _LOGGED_DIAGNOSTICS))

    def module_types(self, quantity: str) -> tuple[str, ...]:
        """The module types that a quantity of `DIAGNOSTICS` was logged for, in alphabetical order, without `ALL`."""
        keys = {key for line in self.metrics for key in line}
        found = (key.removeprefix(f"{quantity}/") for key in keys if key.startswith(f"{quantity}/"))
        return tuple(sorted(name for name in found if name != ALL))

    def last(self, key: str) -> float | None:
        """The last logged value of a quantity; None where it was never logged."""
        values = self.curve(key)[1]
        return values[-1] if values else None

    @property
    def steps(self) -> int | None:
        """The last optimiser step with a training loss."""
        return max(self.curve("loss")[0], default=None)

    @property
    def training_seconds(self) -> float | None:
        """Seconds since training began at the last logged step."""
        seconds = self.curve("seconds")[1]
        return seconds[-1] if seconds else None

    def setting(self, dotted: str) -> Any:
        """A value of the configuration by its dotted key, or None where there is none."""
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read_run(run: Path) -> RunRecord:
    """Read the run directory ``run``.

    Raises:
        UserError: ``run`` is not a folder, holds none of a run's files, or holds one that cannot be read.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"run: {run} is not a folder; give a run directory, such as runs/<name>")
    parts = (_CONFIG, _ENVIRONMENT, _METRICS, _INITIALISATION, _RESULTS)
    if not any((run / part).exists() for part in parts):
        raise UserError(f"run: {run} is not a run directory (it has none of {', '.join(parts)})")
    config = _read_config(run / _CONFIG)
    metrics, notes = _read_metrics(run / _METRICS)
    return RunRecord(
        path=run.resolve(),
        name=str((config or {}).get("name") or run.resolve().name),
        config=config,
        environment=_read_object(run / _ENVIRONMENT),
        metrics=metrics,
        initialisation=_read_initialisation(run / _INITIALISATION),
        evaluation=_read_evaluation(run / _RESULTS),
        notes=notes,
    )


def harmonic_mean(k: float, t: float) -> float:
    """KT = 2·K·T / (K + T) (FARSS Eq. 38); 0 where both are 0."""
    return 2 * k * t / (k + t) if k + t else 0.0


def _read_config(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(config, Mapping):
        raise UserError(f"{path}: holds {type(config).__name__}, expected a mapping of configuration keys")
    return config


def _read_object(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = read_json(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the stage that writes it again") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def _read_metrics(path: Path) -> tuple[tuple[Mapping[str, float], ...], tuple[str, ...]]:
    """Lines by step, and notes. Values are joined key by key: loss and preserve loss may come on two
    lines."""
    if not path.exists():
        return (), ()
    by_step: dict[int, dict[str, float]] = {}
    notes: list[str] = []
    resumed_at: list[int] = []
    previous = -1
    # A kill may cut a character in two: bytes that are not UTF-8 belong to a half-written line.
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        line = _parse_line(text)
        if line is None:
            where = "the last line" if number == len(lines) else f"line {number}"
            notes.append(f"metrics.jsonl: {where} is half-written (the process was stopped) and is ignored.")
            continue
        step = int(line["step"])
        if step < previous:
            resumed_at.append(step)
        previous = step
        by_step.setdefault(step, {}).update(line)
    if resumed_at:
        where = ", ".join(map(str, resumed_at))
        notes.append(f"Training was resumed (at step {where}): steps logged twice show the later values.")
    metrics = tuple(by_step[step] for step in sorted(by_step))
    broken = [int(line["step"]) for line in metrics if "loss" in line and not _is_finite(line["loss"])]
    if broken:
        notes.append(
            f"Training diverged: the loss is not a finite number at {len(broken)} logged step(s), first at {broken[0]}."
        )
    return metrics, tuple(notes)


def _parse_line(text: str) -> dict[str, float] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return {key: value for key, value in line.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")  # False for NaN too


def _read_initialisation(path: Path) -> Initialisation | None:
    report = _read_object(path)
    if report is None:
        return None
    layers = tuple(
        Layer(
            name=name,
            rank=entry.get("rank"),
            shape=tuple(entry.get("shape") or ()),
            values={key: value for key, value in entry.items() if key != "rank" and _is_number(value)},
        )
        for name, entry in (report.get("layers") or {}).items()
    )
    return Initialisation(method=str(report.get("method", "")), layers=layers)


def _read_evaluation(path: Path) -> Evaluation | None:
    results = _read_object(path)
    if results is None:
        return None
    schema = results.get("schema")
    if schema != RESULTS_SCHEMA:
        raise UserError(f"{path}: schema {schema!r}, this version reads {RESULTS_SCHEMA}; evaluate the run again")
    try:
        models = [_evaluated_model(entry) for entry in results["models"]]
        evaluation = Evaluation(
            base_model=str(results["base_model"]),
            engine=str(results["engine"]),
            knowledge=tuple(results["knowledge"]),
            task=tuple(results["task"]),
            models=tuple(sorted(models, key=_training_order)),
            T_reference=results.get("T_reference"),
            T_reference_scores=results.get("T_reference_scores"),
            notes=tuple(results.get("notes") or ()),
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing; evaluate the run again") from error
    return _with_averages(_with_base_point(evaluation))


def _evaluated_model(entry: Mapping[str, Any]) -> EvaluatedModel:
    scores = {
        task: Score(score["metric"], score["value"], score.get("stderr"), score.get("items"))
        for task, score in entry["scores"].items()
    }
    return EvaluatedModel(
        name=entry["name"],
        step=entry.get("step"),
        scores=scores,
        K=entry.get("K"),
        T=entry.get("T"),
        KT=entry.get("KT"),
        Avg=entry.get("Avg"),
        intervals={name: (low, high) for name, (low, high) in (entry.get("intervals") or {}).items()},
        seconds=entry.get("seconds"),
        samples_per_second=entry.get("samples_per_second"),
    )


def _training_order(model: EvaluatedModel) -> tuple[int, int]:
    return {"base": 0, "final": 2}.get(model.name, 1), model.step or 0


def _with_base_point(evaluation: Evaluation) -> Evaluation:
    """Place the base in the K–T plane: K = 1 by definition, T from its own task scores.

    ``eval/results.json`` need not carry these two. T of the base needs the scores that T is measured against;
    where these are those of another run that is gone, the base has no T and is left out of the plane.
    """
    base = evaluation.base
    if base is None:
        return evaluation
    measurable = any(name in base.scores and base.scores[name].value for name in evaluation.knowledge)
    k = base.K if base.K is not None else (1.0 if measurable else None)
    t = base.T if base.T is not None else _task_mean(evaluation, base)
    kt = harmonic_mean(k, t) if k is not None and t is not None else None
    placed = replace(base, K=k, T=t, KT=kt)
    return replace(evaluation, models=tuple(placed if model is base else model for model in evaluation.models))


def _with_averages(evaluation: Evaluation) -> Evaluation:
    """Avg. where an earlier version's ``eval/results.json`` has none: the mean of the raw scores on all tasks."""

    def average(model: EvaluatedModel) -> float | None:
        if model.Avg is not None or not all(name in model.scores for name in evaluation.tasks):
            return model.Avg
        values = [model.scores[name].value for name in evaluation.tasks]
        return fmean(values) if values else None

    return replace(evaluation, models=tuple(replace(model, Avg=average(model)) for model in evaluation.models))


def _task_mean(evaluation: Evaluation, model: EvaluatedModel) -> float | None:
    """T of ``model`` (Eq. 37): the raw mean task score where there is no full fine-tuning result."""
    if not evaluation.task or any(name not in model.scores for name in evaluation.task):
        return None
    values = {name: model.scores[name].value for name in evaluation.task}
    if evaluation.T_reference is None:
        return fmean(values.values())
    path = Path(evaluation.T_reference) / _RESULTS
    entries = read_json(path)["models"] if path.exists() else []
    reference = next((entry["scores"] for entry in entries if entry["name"] == "final"), {})
    if any(not reference.get(name, {}).get("value") for name in values):
        return None
    return fmean(value / reference[name]["value"] for name, value in values.items())
