"""Recipes: run configurations that reproduce the rows of published tables, in ``launch/recipes``.

A recipe is a run's YAML file with a block ``recipe``, which says what it reproduces and in what its rows differ. A row
is one entry of each group in ``recipe.rows`` (a task, a model, a method), and an entry is dotted keys with values that
are put into the configuration, later groups over earlier ones; ``recipe.where`` has what holds for some rows alone.
``recipe.yaml:row`` stands for the configuration of a row wherever the path of a configuration is asked for.
"""

import copy
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field

from harness.config import Strict, nearest, put, read_mapping, validate
from harness.errors import UserError
from harness.resources import find

FOLDER = "launch/recipes"
_ENTRY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_ROW = re.compile(r"^(?P<file>.+\.ya?ml):(?P<row>[^/]*)$", re.DOTALL)
_ABOUT = ("table", "note")  # keys of an entry that are about its rows and no keys of a configuration
_Entry = dict[str, Any]


class RecipeConfig(Strict):
    """What a file reproduces. `table` and `note` may stand among the keys of an entry too, for its rows.

    `row`: the row, where the file holds one alone. `ours`: what the paper leaves unsaid or says in two ways, and what
    stands here. `needs`: data that must be prepared first. `where`: patterns of row names (`math-*`) → an entry.
    """

    paper: str
    table: str
    title: str
    row: str = ""
    ours: list[str] = Field(default_factory=list)
    needs: list[str] = Field(default_factory=list)
    rows: dict[str, dict[str, _Entry]] = Field(default_factory=dict)
    where: dict[str, _Entry] = Field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of a table: its name in the file, the table, a remark, and dotted keys with their values, in order."""

    name: str
    table: str
    note: str
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe's file, its block ``recipe``, and the configuration that its rows change (without that block)."""

    file: Path
    about: RecipeConfig
    content: dict[str, Any]

    @property
    def place(self) -> str:
        """The path by which it is named in commands."""
        folder = find(FOLDER)
        return f"{FOLDER}/{self.file.relative_to(folder)}" if self.file.is_relative_to(folder) else str(self.file)

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of the file; none where the file is one configuration."""
        about = self.about
        if not about.rows:
            return
        for names in itertools.product(*about.rows.values()):
            name = "-".join(names)
            entries = [about.rows[group][entry] for group, entry in zip(about.rows, names, strict=True)]
            entries += [entry for pattern, entry in about.where.items() if fnmatchcase(name, pattern)]
            said = {key: value for entry in entries for key, value in entry.items() if key in _ABOUT}
            changes = [(key, value) for entry in entries for key, value in entry.items() if key not in _ABOUT]
            yield Row(name, str(said.get("table", about.table)), str(said.get("note", "")), tuple(changes))

    def configuration(self, row: str | None) -> dict[str, Any]:
        """The configuration of a row, named ``<name>-<row>``; of a file without rows, its own."""
        names = [known.name for known in self.rows()]
        listed = f"`harness recipes {self.file.stem}` lists them"
        if row is None and names:
            raise UserError(f"config: {self.file} has {len(names)} rows; name one: {self.file}:{names[0]}, …; {listed}")
        content = copy.deepcopy(self.content)
        if row is None:
            return content
        found = next((known for known in self.rows() if known.name == row), None)
        if found is None:
            where = (
                f"has no row {row!r}{nearest(row, names)}; {listed}" if names else "is one configuration, without rows"
            )
            raise UserError(f"config: {self.file} {where}")
        for key, value in found.changes:
            put(content, key, copy.deepcopy(value))
        content["name"] = f"{content.get('name', self.file.stem)}-{row}"
        return content


def split_row(place: str | Path) -> tuple[Path, str | None]:
    """``recipe.yaml:row`` → the file and the row; without a row None. A file that has such a name is meant itself."""
    match = _ROW.match(str(place))
    if match is None or Path(place).is_file():
        return Path(place), None
    return Path(match["file"]), match["row"]


def locate(place: str | Path) -> tuple[Path, str | None]:
    """The file of a configuration, and its row; what begins with ``launch/recipes`` is found where it is installed."""
    file, row = split_row(place)
    if not file.is_file() and str(file).startswith(FOLDER):
        try:
            return find(file), row
        except FileNotFoundError:
            return file, row  # whoever opens it says that it is not there
    return file, row


def configuration(place: str | Path) -> dict[str, Any]:
    """What the YAML file, or the row of a recipe, says, as nested dictionaries, not validated.

    Raises:
        UserError: no such file (with the nearest recipe's name), not YAML, no such row, a wrong block ``recipe``.
    """
    file, row = locate(place)
    if not file.is_file() and (near := _nearest_file(file)):
        raise UserError(f"config: {file}: no such file; did you mean '{near}'? `harness recipes` lists all")
    content = read_mapping(file)
    if "recipe" in content:
        return _recipe(file, content).configuration(row)
    if row is not None:
        raise UserError(f"config: {file} has no rows (no block `recipe`), {row!r} given; give the file alone")
    return content


def shipped() -> list[Recipe]:
    """Every file in ``launch/recipes`` that says what it reproduces."""
    folder = find(FOLDER)
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (file.parent != folder, file))
    found = ((file, read_mapping(file)) for file in files)
    return [_recipe(file, content) for file, content in found if "recipe" in content]


def listing(words: Sequence[str] = ()) -> list[str]:
    """The lines of ``harness recipes``: files, and rows with the command that runs each.

    ``words``: only rows that have every one of them in paper, table, title, file or name.

    Raises:
        UserError: there are none.
    """
    recipes = shipped()
    lines = []
    for recipe in recipes:
        about = recipe.about
        rows = list(recipe.rows()) or [Row(about.row, about.table, "", ())]
        told = " ".join((about.paper, about.title, recipe.place))
        kept = [row for row in rows if _has(f"{told} {row.table} {row.name}", words)]
        if not kept:
            continue
        lines += ["", f"{about.paper} · {about.title}", f"  {recipe.place}"]
        lines += [f"  ours: {what}" for what in about.ours]
        lines += [f"  needs: {what}" for what in about.needs]
        tables = max(len(row.table) for row in kept)
        names = max(len(row.name) for row in kept)
        for row in kept:
            place = f"{recipe.place}:{row.name}" if about.rows else recipe.place
            note = f"  # {row.note}" if row.note else ""
            lines.append(f"  {row.table:<{tables}}  {row.name:<{names}}  harness run {place}{note}")
    if not lines:
        raise UserError(
            f"recipes: {' '.join(words)!r} is in none of them{_hint(words, recipes)}; leave it out to see all"
        )
    return lines[1:]


def _recipe(file: Path, content: dict[str, Any]) -> Recipe:
    about = validate(RecipeConfig, content.pop("recipe"), "recipe")
    recipe = Recipe(file, about, content)
    for group, entries in about.rows.items():
        if not entries:
            raise UserError(f"recipe.rows.{group}: no entries given; list at least one, or leave the group out")
        for entry in entries:
            if not _ENTRY.match(entry):
                raise UserError(f"recipe.rows.{group}: {entry!r} given; allowed: letters, digits, dots, hyphens")
    names = [row.name for row in recipe.rows()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"recipe.rows: two rows are called {name!r}; choose other names in {file}")
    for pattern in about.where:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"recipe.where: {pattern!r} is the pattern of no row of {file}{nearest(pattern, names)}")
    return recipe


def _nearest_file(file: Path) -> str | None:
    """The recipe that a path below ``launch/recipes`` (or without that, ``fclora/…``) is nearest to."""
    folder = find(FOLDER)
    below = file.relative_to(FOLDER) if file.is_relative_to(FOLDER) else file
    if below == file and not (folder / file.parts[0]).is_dir():
        return None
    known = [str(other.relative_to(folder)) for other in sorted(folder.rglob("*.yaml"))]
    found = difflib.get_close_matches(str(below), known, n=1)
    return f"{FOLDER}/{found[0]}" if found else None


def _has(text: str, words: Iterable[str]) -> bool:
    return all(word.lower() in text.lower() for word in words)


def _hint(words: Sequence[str], recipes: Sequence[Recipe]) -> str:
    known = {recipe.about.paper.lower() for recipe in recipes} | {recipe.file.stem for recipe in recipes}
    known |= {entry for recipe in recipes for entries in recipe.about.rows.values() for entry in entries}
    told = " ".join(known).lower()
    for word in words:
        if word.lower() not in told and (near := nearest(word.lower(), sorted(known))):
            return near
    return ""
