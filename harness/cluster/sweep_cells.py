"""A sweep's YAML and the runs that it stands for: every value of a grid, every entry of a list, every seed.

A cell is one run. A configuration is what all cells of one label share: they differ in the seed alone. Everything is
checked here, before anything runs.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from harness.config import PositiveInt, RunConfig, Strict, nearest, read_mapping, resolve, validate
from harness.embedded import EMBEDDED, embedded_config
from harness.errors import UserError
from harness.pipeline import REDONE_QUIETLY, STAGES, has_work, is_finished
from harness.preflight import check
from harness.recipes import configuration, split_row
from harness.resources import find
from harness.run_directory import RunDirectory

CELLS = "cells"  # folder of the run directories, inside the sweep's own
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_FORBIDDEN = {
    "name": "the sweep names its runs: give a template in `name`",
    "output_dir": "the sweep's folder is given by --out",
    "train.seed": "list the seeds in `seeds`",
}
_Entries = list[dict[str, Any]]


class SweepConfig(Strict):
    """A sweep. Its runs are all combinations of the entries of `list`, the values of `grid` and `seeds`, over `base`.

    `base`: a run's YAML file, a configuration, or an embedded world. `name`: of each run; {label}, {seed} and {<key>}
    stand for what differs. `baseline`: the label that the others are compared with. `parallel`: runs at the same time,
    at most.
    """

    base: str | dict[str, Any]
    name: str = "{label}-seed{seed}"
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    baseline: str | None = None
    parallel: PositiveInt | None = None
    list: _Entries = Field(default_factory=lambda: [])


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of the run and its folder.
        label: of its configuration; cells that differ in the seed alone share it.
        overrides: dotted key → value, what distinguishes it from the base.
    """

    name: str
    label: str
    seed: int
    overrides: Mapping[str, Any]
    config: RunConfig

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.config.run_directory)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: its options, its folder and its runs."""

    title: str
    options: SweepConfig
    folder: Path
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class _Choice:
    """One value of a grid's key or one entry of the list."""

    label: str
    overrides: Mapping[str, Any]


def load_sweep(path: Path, out: Path | None = None) -> Sweep:
    """Read a sweep's YAML, expand it and check every run.

    Args:
        out: the sweep's folder; by default ``<output_dir of the base>/<name of the YAML file>``.

    Raises:
        UserError: one line for the first thing that cannot work, naming the cell and the key.
    """
    content = read_mapping(path)
    if not isinstance(content.get("list", []), list):
        raise UserError(f"list: {content['list']!r} given; write a list of mappings, dotted key to value")
    for number, entry in enumerate(content.get("list", [])):
        if not isinstance(entry, dict):
            raise UserError(f"list.{number}: {entry!r} given; write a mapping of dotted keys to values")
    grid = content.get("grid")
    for key, values in grid.items() if isinstance(grid, dict) else ():
        if not isinstance(values, list):
            raise UserError(f"grid.{key}: {values!r} given; allowed: a list of values")
    options = validate(SweepConfig, content)
    base, folder = _base(options.base, path.parent)
    place = base.get("output_dir", RunConfig.model_fields["output_dir"].default)
    if out is None and not isinstance(place, str):
        raise UserError(f"output_dir: {place!r} given; allowed: a string")
    out = (out if out is not None else Path(place).expanduser() / path.stem).absolute()
    cells = _checked(options, base, folder, out)
    labels = list(dict.fromkeys(cell.label for cell in cells))
    if options.baseline is not None and options.baseline not in labels:
        raise UserError(
            f"baseline: {options.baseline!r} given; allowed: {', '.join(labels)}{nearest(options.baseline, labels)}"
        )
    return Sweep(path.stem, options, out, tuple(cells))


def _base(base: str | dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path]:
    """The configuration that cells change, and where its relative paths start."""
    if isinstance(base, dict):
        return base, folder
    if base in EMBEDDED:
        return embedded_config(base, Path("runs")).model_dump(mode="json"), folder
    file, row = split_row(base)
    try:
        path = find(file, folder)
    except FileNotFoundError as error:
        raise UserError(
            f"base: {error}; give a run's YAML file, or an embedded world: {', '.join(EMBEDDED)}"
        ) from error
    return configuration(path if row is None else f"{path}:{row}"), path.parent


# ---------------------------------------------------------------- expansion


def _checked(options: SweepConfig, base: dict[str, Any], folder: Path, out: Path) -> list[Cell]:
    """Every cell, validated with the base applied; cells of one configuration are looked at in files once."""
    names: dict[str, tuple[str, int]] = {}
    cells, looked_at = [], set()
    for label, overrides in _configurations(options):
        for seed in options.seeds if options.seeds is not None else [None]:
            content = copy.deepcopy(base)
            name = label
            try:
                for key in sorted(overrides, key=lambda key: key.count(".")):  # a block before what lies in it
                    _set(content, key, copy.deepcopy(overrides[key]))
                if seed is not None:
                    _set(content, "train.seed", seed)
                drawn = _seed_of(content)
                name = _name(options.name, label, drawn, overrides)
                if name in names:
                    other, other_seed = names[name]
                    raise UserError(
                        f"name: two runs would be called {name!r} ({other}, seed {other_seed}, and {label}, seed "
                        f"{drawn}); put {{label}} and {{seed}} into the template"
                    )
                content |= {"name": name, "output_dir": str(out / CELLS)}
                config = resolve(content, folder)
                if label not in looked_at:
                    check(config)
                    looked_at.add(label)
                _check_earlier(config)
            except UserError as error:
                raise UserError(f"cell {name!r}: {error}") from error
            names[name] = (label, drawn)
            cells.append(Cell(name, label, config.train.seed, dict(overrides), config))
    return cells


def _check_earlier(config: RunConfig) -> None:
    """Raise `UserError` where the run directory holds work of another configuration."""
    run = RunDirectory(config.run_directory)
    if run.stages.is_dir():
        for stage in STAGES:
            if stage not in REDONE_QUIETLY and has_work(config, stage):
                is_finished(config, run, stage)


def _configurations(options: SweepConfig) -> list[tuple[str, dict[str, Any]]]:
    """``(label, overrides)`` of every combination of the list's entries and the grid's values."""
    dimensions = [_entries(options.list)] if options.list else []
    for key, values in options.grid.items():
        _check_key(f"grid.{key}", key)
        if not values:
            raise UserError(f"grid.{key}: no values given; list at least one, or leave the key out")
        if options.list and any(key in entry for entry in options.list):
            raise UserError(f"grid.{key}: the key stands in `list` as well; give it in one of the two")
        dimensions.append(_values(key, values))
    found = []
    for choices in itertools.product(*dimensions):
        overrides = {key: value for choice in choices for key, value in choice.overrides.items()}
        found.append(("-".join(choice.label for choice in choices) or "base", overrides))
    labels = [label for label, _ in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"label: two configurations are both called {label!r}; choose other labels")
    return found


def _entries(entries: Sequence[Mapping[str, Any]]) -> list[_Choice]:
    given, named = [], []
    for number, entry in enumerate(entries):
        overrides = {key: value for key, value in entry.items() if key != "label"}
        for key in overrides:
            _check_key(f"list.{number}.{key}", key)
        given.append(overrides)
        named.append(_given_label(f"list.{number}.label", entry["label"]) if "label" in entry else None)
    return _labelled("list", given, named)


def _values(key: str, values: Sequence[Any]) -> list[_Choice]:
    given, named = [], []
    for number, value in enumerate(values):
        if isinstance(value, dict) and value.keys() == {"label", "value"}:
            named.append(_given_label(f"grid.{key}.{number}.label", value["label"]))
            value = value["value"]
        else:
            named.append(None)
        given.append({key: value})
    return _labelled(f"grid.{key}", given, named)


def _given_label(key: str, label: Any) -> str:
    if not isinstance(label, str) or not re.search(r"[A-Za-z0-9]", label) or len(label.splitlines()) != 1:
        raise UserError(f"{key}: {label!r} given; allowed: one line of text with a letter or digit in it")
    return label


def _labelled(where: str, given: Sequence[Mapping[str, Any]], named: Sequence[str | None]) -> list[_Choice]:
    """Choices with their labels: the given ones, or what they set, with more detail where that is needed."""
    labels = [label or _describe(overrides) for label, overrides in zip(named, given, strict=True)]
    for label in {label for label in labels if labels.count(label) > 1}:
        alike = [place for place, other in enumerate(labels) if other == label and named[place] is None]
        flat = {place: dict(_flatten(given[place])) for place in alike}
        keys = dict.fromkeys(key for options in flat.values() for key in options)
        differing = [key for key in keys if len({repr(options.get(key)) for options in flat.values()}) > 1]
        for place in alike:
            detail = [_setting(key, flat[place][key]) for key in differing if key in flat[place]]
            labels[place] = "-".join([label, *detail])
    for label in labels:
        if labels.count(label) > 1:
            how = "a `label` beside its keys" if where == "list" else "`{label: …, value: …}`"
            raise UserError(f"{where}: two entries are both called {label!r}; give each {how}")
    return [_Choice(label, overrides) for label, overrides in zip(labels, given, strict=True)]


def _describe(overrides: Mapping[str, Any]) -> str:
    """``lora`` for a named block, ``rank-8`` for a value, ``no-anchor`` for null."""
    return "-".join(_setting(key, value) for key, value in overrides.items()) or "base"


def _setting(key: str, value: Any) -> str:
    last = key.rsplit(".", 1)[-1]
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return value["name"]
    if isinstance(value, list):
        parts = [_setting(last, entry) for entry in value]
        return "+".join(parts) if parts else f"no-{last}"
    if isinstance(value, Mapping):
        return "-".join([last, *(_setting(inner, one) for inner, one in value.items())])
    if value is None or value is False:
        return f"no-{last}"
    if value is True or (isinstance(value, str) and last in ("name", "mode")):
        return last if value is True else value
    return f"{last}-{f'{value:g}' if isinstance(value, float) else value}"


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _check_key(where: str, key: str) -> None:
    if not key or not all(key.split(".")):
        raise UserError(f"{where}: {key!r} given; write a dotted key such as train.learning_rate")
    if key in _FORBIDDEN:
        raise UserError(f"{where}: not a key that a sweep varies; {_FORBIDDEN[key]}")


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings and lists (``penalties.0.weight``)."""
    place: Any = content
    parts = key.split(".")
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                where = ".".join(parts[:number])
                raise UserError(f"{key}: {part!r} given; {where} is a list of {len(place)}, numbered from 0")
            index: Any = int(part)
        elif isinstance(place, dict):
            index = part
            if not last and place.get(part) is None:
                place[part] = {}
        else:
            raise UserError(f"{key}: {'.'.join(parts[:number])} holds {place!r}, which has no keys of its own")
        if last:
            place[index] = value
        else:
            place = place[index]


def _seed_of(content: Mapping[str, Any]) -> Any:
    train = content.get("train")
    return train.get("seed", 0) if isinstance(train, Mapping) else 0


def _name(template: str, label: str, seed: Any, overrides: Mapping[str, Any]) -> str:
    """The template filled in; what a file name cannot hold becomes a hyphen."""
    known: dict[str, Any] = {**overrides, "label": label, "seed": seed}

    def filled(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise UserError(
                f"name: {{{match[1]}}} is not known for it; allowed: {', '.join(known)}{nearest(match[1], list(known))}"
            )
        value = known[match[1]]
        return value if isinstance(value, str) else _setting(match[1], value) if _is_block(value) else str(value)

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", _PLACEHOLDER.sub(filled, template))
    name = re.sub(r"-{2,}", "-", name).strip("-.")
    if not name:
        raise UserError(f"name: {template!r} leaves nothing that a folder can be called")
    return name if re.match(r"[A-Za-z0-9]", name) else f"x{name}"


def _is_block(value: Any) -> bool:
    return isinstance(value, dict | list)
