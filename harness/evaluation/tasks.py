"""Finding evaluation tasks by name: the user's YAML files, then the packaged ones, then lm-eval's own.

A local task is an ordinary lm-eval YAML file. One thing is added to the format: relative ``data_files`` are looked up
in `eval.data_dir` (without it, beside the YAML file), so that a task and its data can live in different places.

Names are checked when a run is configured, long before a model is loaded. Nothing here imports lm-eval or torch until
`load_tasks` is called.
"""

import difflib
import glob
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from harness.errors import UserError
from harness.resources import find

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

_PACKAGED = "eval/tasks"
_REMOTE = re.compile(r"^\w+://")
_DECLARATION = re.compile(r"^(?:task|group):[ \t]*['\"]?([^\s'\"#\[\]{}]+)", re.MULTILINE)
_TAG = re.compile(r"^tag:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", re.MULTILINE)


@dataclass(frozen=True)
class LocalTask:
    """A task or group defined by a YAML file of the user or of the package.

    Attributes:
        name: the value of ``task`` or ``group``.
        path: the YAML file.
        config: its content with ``include`` resolved; ``!function`` values are left as text.
    """

    name: str
    path: Path
    config: Mapping[str, Any]

    @property
    def members(self) -> list[str]:
        """Names of a group's children; empty for a task."""
        if "group" not in self.config:
            return []
        children = self.config.get("task") or []
        names = [child if isinstance(child, str) else child.get("task") or child.get("group") for child in children]
        return [name for name in names if isinstance(name, str)]


def check_tasks(names: Sequence[str], include_path: Path | None = None, data_dir: Path | None = None) -> None:
    """Check at configuration time that K and T can be computed from these tasks; takes well under two seconds.

    Raises:
        UserError: as `resolve_tasks`, or a task's metric is better when lower.
    """
    for name, config in resolve_tasks(names, include_path, data_dir).items():
        metrics = config.get("metric_list") or config.get("aggregate_metric_list") or [{}]
        lower_is_better = metrics[0].get("higher_is_better") is False
        if lower_is_better or (metrics == [{}] and config.get("output_type") == "loglikelihood_rolling"):
            raise UserError(
                f"eval: the metric of '{name}' is better when lower, and K and T are ratios of scores that are better "
                "when higher; name other tasks (eval/run.py measures this one)"
            )


def resolve_tasks(
    names: Sequence[str], include_path: Path | None = None, data_dir: Path | None = None
) -> dict[str, Mapping[str, Any]]:
    """The content of the YAML file behind each name, ``!function`` values left as text.

    Raises:
        UserError: a name is unknown (the nearest names are given), is asked for twice, stands for a list of tasks
            rather than for one score, or its data file is missing.
    """
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"eval: the task '{repeated[0]}' is named twice; name each task once, as knowledge or as task")
    local = local_tasks(include_path)
    resolved: dict[str, Mapping[str, Any]] = {}
    for name in names:
        resolved[name] = local[name].config if name in local else _read_yaml(_installed_file(name, local))
        if name in local:
            for task in _leaves(name, local):
                data_files(task, data_dir)
            for member in _installed_members(name, local):
                _installed_file(member, local)
        if "group" in resolved[name] and not resolved[name].get("aggregate_metric_list"):
            members = LocalTask(name, Path(), resolved[name]).members
            raise UserError(
                f"eval: '{name}' is a group without a score of its own (it has no aggregate_metric_list); name its "
                f"tasks instead, such as {', '.join(members[:10])}"
            )
    return resolved


def load_tasks(names: Sequence[str], include_path: Path | None = None, data_dir: Path | None = None) -> "TaskDict":
    """Build the lm-eval tasks (and groups) of ``names``, reading their data sets.

    Returns:
        lm-eval's ``{"tasks": {name: Task}, "groups": {name: Group}, "group_map": …}``, ready for its ``evaluate``.

    Raises:
        UserError: as `resolve_tasks`.
    """
    resolved = resolve_tasks(names, include_path, data_dir)
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    local = local_tasks(include_path)
    installed = {name: _installed_file(name, local) for name in names if name not in local}
    # Parsing all of lm-eval's 14,000 files takes seconds; only a group needs to know where its children are.
    all_needed = any("group" in resolved[name] for name in installed) or any(
        _installed_members(name, local) for name in names if name in local
    )
    manager = TaskManager(include_path=list(_folders(include_path)), include_defaults=all_needed)
    index = manager.task_index
    for name, path in installed.items():
        if name not in index:
            entry = TaskIndex.entry_from_path(path)
            assert entry is not None, path
            index[name] = entry
    for task in {leaf.name: leaf for name in names if name in local for leaf in _leaves(name, local)}.values():
        config = load_yaml(task.path, resolve_func=True)
        if files := data_files(task, data_dir):
            config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": files}
        entry = index[task.name]
        index[task.name] = Entry(name=task.name, kind=entry.kind, yaml_path=None, cfg=config, tags=entry.tags)
    return manager.load(list(names))


def local_tasks(include_path: Path | None = None) -> dict[str, LocalTask]:
    """Every task and group of the user's and the package's YAML files by name; the user's win.

    Raises:
        UserError: the folder does not exist, or one of its files is not valid YAML.
    """
    found: dict[str, LocalTask] = {}
    for folder in _folders(include_path):
        for path in sorted(folder.rglob("*.yaml")):
            config = _read_yaml(path)
            name = config.get("group", config.get("task"))
            if isinstance(name, str):
                found[name] = LocalTask(name, path, config)
    return found


def data_files(task: LocalTask, data_dir: Path | None) -> Any:
    """The ``data_files`` of a task with relative paths made absolute, in the shape they have in the YAML.

    Raises:
        UserError: a file is not there.
    """

    def absolute(file: str) -> str:
        if _REMOTE.match(file):
            return file
        path = (data_dir or task.path.parent).absolute() / Path(file).expanduser()
        if not glob.glob(str(path)):
            place = f"is {data_dir}" if data_dir else "is not set"
            raise UserError(
                f"eval.data_dir: the task '{task.name}' reads {file}, and there is no {path}; eval.data_dir {place}: "
                "give the folder that holds the file"
            )
        return str(path)

    def resolve(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: resolve(value) for split, value in files.items()}
        return [absolute(str(file)) for file in files] if isinstance(files, list) else absolute(str(files))

    files = (task.config.get("dataset_kwargs") or {}).get("data_files")
    return resolve(files) if files else None


def sources(name: str, include_path: Path | None, data_dir: Path | None) -> list[Path]:
    """The files that decide what a task asks: its YAML files, Python helpers beside them, and local data files."""
    local = local_tasks(include_path)
    if name not in local:
        return _code(_installed_file(name, local))
    files: list[Path] = []
    for task in _leaves(name, local):
        files += _code(task.path)
        files += [Path(match) for file in _flat(data_files(task, data_dir)) for match in sorted(glob.glob(file))]
    files += [_installed_file(member, local) for member in _installed_members(name, local)]
    if "group" in local[name].config:
        files.append(local[name].path)
    return files


def _folders(include_path: Path | None) -> Iterator[Path]:
    """Folders of local tasks, the one that wins last."""
    yield find(_PACKAGED)
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"eval.include_path: {include_path} is not a folder; give the folder of your task files")
        yield include_path


def _leaves(name: str, local: Mapping[str, LocalTask]) -> list[LocalTask]:
    """The local tasks that a name stands for: itself, or a group's children, theirs, and so on."""
    task = local[name]
    if "group" not in task.config:
        return [task]
    return [leaf for member in task.members if member in local for leaf in _leaves(member, local)]


def _installed_members(name: str, local: Mapping[str, LocalTask]) -> list[str]:
    """Members of a local group that are lm-eval's own tasks, its subgroups' included."""
    children = local[name].config.get("task") or [] if "group" in local[name].config else []
    # A mapping may define a task on the spot; lm-eval looks into it when it is loaded.
    named = [child for child in children if isinstance(child, str)]
    inner = [foreign for child in named if child in local for foreign in _installed_members(child, local)]
    return [*(child for child in named if child not in local), *inner]


def _installed_file(name: str, local: Mapping[str, LocalTask]) -> Path:
    """The YAML file of one of lm-eval's own tasks."""
    for path in _installed_files():
        if path.stem == name and name in _DECLARATION.findall(path.read_text(encoding="utf-8")):
            return path
    declared = _installed_names()
    if name in declared:
        return declared[name]
    tagged = [task for task, path in declared.items() if name in _tags(path)]
    if tagged:
        raise UserError(
            f"eval: '{name}' is a tag, not a task; name its tasks instead, such as {', '.join(sorted(tagged)[:10])}"
        )
    near = difflib.get_close_matches(name, [*local, *declared], n=3, cutoff=0.5)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    own = ", ".join(sorted(local)) or "none"
    raise UserError(f"eval: unknown task '{name}'{hint}; local tasks: {own}; all others: `lm-eval ls tasks`")


@cache
def _installed_files() -> tuple[Path, ...]:
    # find_spec of a top-level package locates it without importing it.
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return ()
    root = Path(spec.origin).parent / "tasks"
    return tuple(Path(folder, file) for folder, _, files in os.walk(root) for file in files if file.endswith(".yaml"))


@cache
def _installed_names() -> dict[str, Path]:
    return {
        name: path for path in _installed_files() for name in _DECLARATION.findall(path.read_text(encoding="utf-8"))
    }


def _tags(path: Path) -> list[str]:
    match = _TAG.search(path.read_text(encoding="utf-8"))
    return re.findall(r"[^\s\[\],'\"-][^\s\[\],'\"]*", match[1]) if match else []


def _code(path: Path) -> list[Path]:
    """A task file, what it includes, and the Python files beside them."""
    included = [file for parent in _includes(_parse(path)) for file in _code(path.parent / parent)]
    return [path, *sorted(path.parent.glob("*.py")), *included]


def _flat(files: Any) -> list[str]:
    if isinstance(files, Mapping):
        return [file for value in files.values() for file in _flat(value)]
    return files if isinstance(files, list) else [files] if files else []


class _Loader(yaml.SafeLoader):
    """YAML in which ``!function utils.f`` is text: nothing of a task's code runs while names are checked."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: loader.construct_scalar(node))


def _read_yaml(path: Path) -> dict[str, Any]:
    """A task file with its includes; an empty mapping where the file is something else than a mapping."""
    content = _parse(path)
    merged: dict[str, Any] = {}
    for file in _includes(content):
        merged |= _read_yaml(path.parent / file)
    return merged | {key: value for key, value in content.items() if key != "include"}


def _includes(content: Mapping[str, Any]) -> list[str]:
    included = content.get("include", [])
    return included if isinstance(included, list) else [included]


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.include_path: {path} cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}
