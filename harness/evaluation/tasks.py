"""Finding evaluation tasks by name: the user's YAML files, the packaged ones, tasks of suites, then lm-eval's own.

A local task is an ordinary lm-eval YAML file. One thing is added to the format: relative ``data_files`` are looked up
in `eval.data_dir` (without it, beside the YAML file), so that a task and its data can live in different places.
A task of a suite is lm-eval's with changes (`harness.evaluation.suites`); its data are taken from `eval.data_dir` if
they are there, else from the hub.

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
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from harness.errors import UserError
from harness.evaluation.hub_data import find_files, missing_data, on_hub
from harness.evaluation.sandbox import mechanism
from harness.evaluation.suites import SuiteTask, suite_files
from harness.resources import find

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

_PACKAGED = "eval/tasks"
_REMOTE = re.compile(r"^\w+://")
_DECLARATION = re.compile(r"^(?:task|group):[ \t]*['\"]?([^\s'\"#\[\]{}]+)", re.MULTILINE)
_TAG = re.compile(r"^tag:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", re.MULTILINE)


@dataclass(frozen=True)
class LocalTask:
    """A task or group defined by a YAML file of the user or of the package, or by a suite.

    Attributes:
        name: the value of ``task`` or ``group``.
        path: the YAML file; a suite's task has its base's.
        config: its content with ``include`` resolved and a suite's changes; ``!function`` values are left as text.
        suite: what a suite says about it, and the suite's file.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    suite: SuiteTask | None = None
    suite_file: Path | None = None

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
            rather than for one score, its data file is missing, something that it needs is not installed, or it runs
            code that the model writes where there is no sandbox.
    """
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"eval: the task '{repeated[0]}' is named twice; name each task once, as knowledge or as task")
    local = local_tasks(include_path)
    resolved: dict[str, Mapping[str, Any]] = {}
    for name in names:
        resolved[name] = local[name].config if name in local else _read_yaml(_installed_file(name, local))
        if resolved[name].get("unsafe_code"):
            ours = ", ".join(sorted(task for task in local if _runs_code(local[task].config)))
            raise UserError(f"eval: the task '{name}' runs code that the model writes outside a sandbox; use {ours}")
        if name in local:
            for task in _leaves(name, local):
                data_files(task, data_dir)
                if task.suite is not None:
                    task.suite.needs.check(task.name)
                if _runs_code(task.config):
                    mechanism()
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
        UserError: as `resolve_tasks` and `check_data`.
    """
    resolved = resolve_tasks(names, include_path, data_dir)
    check_data(names, include_path, data_dir)
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
    for task in {node.name: node for name in names if name in local for node in _nodes(name, local)}.values():
        if "group" in task.config and task.suite is None:
            continue  # it is in a folder of tasks, where lm-eval has found it
        config = load_yaml(task.path, resolve_func=True)
        if task.suite is not None:
            config = task.suite.applied(config)
        if files := data_files(task, data_dir):
            config = _with_files(config, files, of_suite=task.suite is not None)
        entry = index[task.name] if task.name in index else TaskIndex.entry_from_path(task.path)
        assert entry is not None, task.path
        index[task.name] = Entry(name=task.name, kind=entry.kind, yaml_path=None, cfg=config, tags=entry.tags)
    return manager.load(list(names))


def check_data(names: Sequence[str], include_path: Path | None = None, data_dir: Path | None = None) -> None:
    """Check that the data of suites' tasks can be read: from ``data_dir``, or from the hub if that can be reached.

    Raises:
        UserError: neither is so; says what to download where.
    """
    local = local_tasks(include_path)
    for task in (leaf for name in names if name in local for leaf in _leaves(name, local)):
        if (
            task.suite is not None
            and task.suite.data
            and data_files(task, data_dir) is None
            and not on_hub(task.config)
        ):
            raise missing_data(task.name, task.config, task.suite, data_dir)


def local_tasks(include_path: Path | None = None) -> dict[str, LocalTask]:
    """Every task and group of the user's and the package's YAML files and suites by name; the user's files win.

    Raises:
        UserError: the folder does not exist, one of its files is not valid YAML, or a name means two things.
    """
    found: dict[str, LocalTask] = {}
    for folder in _folders(include_path):
        for path in sorted(folder.rglob("*.yaml")):
            config = _read_yaml(path)
            name = config.get("group", config.get("task"))
            if isinstance(name, str):
                found[name] = LocalTask(name, path, config)
    if _installed_files():
        _add_suites(found, include_path)
    return found


def _add_suites(found: dict[str, LocalTask], include_path: Path | None) -> None:
    files = dict(found)
    for path, suite in suite_files(include_path):
        if suite.suite in files:
            raise UserError(
                f"eval: '{suite.suite}' is a suite ({path}) and a task ({files[suite.suite].path}); rename one of them"
            )
        for task in suite.tasks:
            for one in (task, *task.members) if isinstance(task, SuiteTask) else ():
                of_user = (
                    one.task in files and include_path is not None and include_path in files[one.task].path.parents
                )
                if not of_user:
                    _add_suite_task(found, files, one, path)


def _add_suite_task(found: dict[str, LocalTask], files: Mapping[str, LocalTask], task: SuiteTask, suite: Path) -> None:
    base = task.base or task.task
    if task.is_changed and base == task.task:
        raise UserError(
            f"eval: {suite} changes the task '{base}' under its own name; give it another (task: …, from: …)"
        )
    other = found.get(task.task)
    if other is not None and other.suite is not None and other.suite != task and other.suite_file != suite:
        raise UserError(f"eval: {other.suite_file} and {suite} say two things about the task '{task.task}'; rename one")
    if base in files:
        path = files[base].path
    else:
        path = _tasks_folder() / base if base.endswith(".yaml") else _installed_file(base, files)
    found[task.task] = LocalTask(task.task, path, task.applied(_read_yaml(path)), task, suite)


def data_files(task: LocalTask, data_dir: Path | None) -> Any:
    """The ``data_files`` of a task with relative paths made absolute, in the shape they have in the YAML.

    A suite's task has its files in ``data_dir``; None if none of them is there.

    Raises:
        UserError: a file is not there.
    """
    if task.suite is not None and task.suite.data:
        return find_files(task.name, task.config, task.suite, data_dir)

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
    nodes = _nodes(name, local)
    files += [node.path for node in nodes if "group" in node.config]
    return [*files, *sorted({node.suite_file for node in nodes if node.suite_file is not None})]


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


def _nodes(name: str, local: Mapping[str, LocalTask]) -> list[LocalTask]:
    """The local task or group of a name, and all local tasks and groups below it."""
    task = local[name]
    return [task, *(node for member in task.members if member in local for node in _nodes(member, local))]


def _runs_code(config: Mapping[str, Any]) -> bool:
    return bool((config.get("metadata") or {}).get("runs_generated_code"))


def _with_files(config: dict[str, Any], files: Any, *, of_suite: bool) -> dict[str, Any]:
    """A task's configuration over local files; splits that a suite names no file for are no longer the task's."""
    kwargs = {**(config.get("dataset_kwargs") or {}), "data_files": files}
    if not of_suite:
        return config | {"dataset_kwargs": kwargs}
    splits = ("training_split", "validation_split", "test_split", "fewshot_split")
    config = config | {key: None for key in splits if config.get(key) not in files}
    suffix = Path(_flat(files)[0]).suffix
    builder = {".jsonl": "json", ".txt": "text"}.get(suffix, suffix.removeprefix("."))
    return config | {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": kwargs}


def _installed_members(name: str, local: Mapping[str, LocalTask]) -> list[str]:
    """Members of a local group that are lm-eval's own tasks, its subgroups' included."""
    children = local[name].config.get("task") or [] if "group" in local[name].config else []
    # A mapping may define a task on the spot; lm-eval looks into it when it is loaded.
    named = [child for child in children if isinstance(child, str)]
    inner = [foreign for child in named if child in local for foreign in _installed_members(child, local)]
    return [*(child for child in named if child not in local), *inner]


def _installed_file(name: str, local: Mapping[str, LocalTask]) -> Path:
    """The YAML file of one of lm-eval's own tasks."""
    for path in _installed_stems().get(name, ()):
        if name in _DECLARATION.findall(path.read_text(encoding="utf-8")):
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
    walked = os.walk(_tasks_folder())
    return tuple(Path(folder, file) for folder, _, files in walked for file in files if file.endswith(".yaml"))


@cache
def _installed_stems() -> dict[str, list[Path]]:
    stems: dict[str, list[Path]] = {}
    for path in _installed_files():
        stems.setdefault(path.stem, []).append(path)
    return stems


def _tasks_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


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
        stamp = path.stat()
    except OSError as error:
        raise UserError(f"eval.include_path: {path} cannot be read: {error.strerror}") from error
    return _parse_version(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=4096)
def _parse_version(path: Path, changed: int, size: int) -> dict[str, Any]:
    """A file's content, read again only after it has changed; nobody may write into it."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.include_path: {path} cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}
