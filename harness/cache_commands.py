"""`harness cache list | verify | prune`: what is kept of earlier runs, whether it is whole, and making room."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from harness.cache import GIB, Cache, DamagedEntry, Entry
from harness.console import in_words, progress
from harness.errors import UserError


def list_entries(cache: Cache, every: bool = False) -> None:
    """Print a table of kinds, or of ``every`` entry with what it is; then the total, the limit and the folder."""
    entries, evaluations = cache.entries(), cache.evaluations()
    size = Column("size", justify="right", no_wrap=True)
    if every:
        table = Table("kind", Column("key", no_wrap=True), size, "last use", Column("what it is", overflow="fold"))
        for entry in [*entries, *evaluations]:
            what = Text(_what(cache, entry))  # no markup in what others wrote
            table.add_row(entry.kind, entry.key[:8], in_words(entry.size), _when(entry.used), what)
    else:
        table = Table("kind", Column("entries", justify="right"), size, "oldest use", "newest use")
        for kind in sorted({entry.kind for entry in entries}):
            _add_kind(table, [entry for entry in entries if entry.kind == kind])
        if evaluations:
            _add_kind(table, evaluations)
    if table.rows:
        Console().print(table)
    print(f"{_total(entries)} of at most {in_words(cache.limit)} in {cache.folder}")
    if evaluations:
        print("eval: scores of base models; they do not count towards the limit and are never removed here")


def verify(cache: Cache) -> int:
    """Read every entry and remove what is damaged; the exit code: 1 if an entry was damaged or could not be read."""
    entries = cache.entries()
    damaged = unreadable = 0
    for entry in progress(entries, "verify"):
        try:
            cache.check(entry)
        except DamagedEntry as damage:
            damaged += 1
            print(cache.discard(entry.path, damage))
        except FileNotFoundError:  # removed by another process since it was listed
            continue
        except OSError as error:
            unreadable += 1
            print(f"cache: {entry.path} cannot be read ({error.strerror})")
    print(f"{_total(entries)} in {cache.folder}: {damaged} damaged, {unreadable} unreadable")
    return int(damaged + unreadable > 0)


def prune(cache: Cache, to_gib: float | None = None, kind: str | None = None) -> None:
    """Remove least recently used entries (of ``kind``) until they have at most ``to_gib``, and say what was freed."""
    kinds = sorted({entry.kind for entry in cache.entries()})
    if kind is not None and kind not in kinds:
        raise UserError(f"--kind: {kind!r}; there are entries of {', '.join(kinds) or 'no kind'} in {cache.folder}")
    removed = cache.prune(None if to_gib is None else to_gib * GIB, kind)
    print(f"removed {_total(removed)}; left {_total(cache.entries())} in {cache.folder}")


def _add_kind(table: Table, entries: Sequence[Entry]) -> None:
    """A row for ``entries`` of one kind, least recently used first."""
    size = in_words(sum(entry.size for entry in entries))
    table.add_row(entries[0].kind, str(len(entries)), size, _when(entries[0].used), _when(entries[-1].used))


def _total(entries: Sequence[Entry]) -> str:
    count = len(entries)
    return f"{count} {'entry' if count == 1 else 'entries'}, {in_words(sum(entry.size for entry in entries))}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _what(cache: Cache, entry: Entry) -> str:
    if entry.kind == "eval":
        return "scores of a base model"
    try:
        return describe(cache.content(entry))
    except DamagedEntry as damage:
        return f"damaged: {damage}"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def describe(content: Mapping[str, Any]) -> str:
    """``content`` in one line: dotted names of what is in it, checksums cut to eight digits."""
    return ", ".join(f"{name}={_short(value)}" for name, value in _leaves(content))


def _leaves(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, value))
    return leaves


def _short(value: Any) -> str:
    if isinstance(value, list):
        shown = [_short(one) for one in value[:4]]
        return f"[{' '.join(shown)}{' …' if len(value) > 4 else ''}]"
    text = str(value)
    return f"{text[:8]}…" if len(text) >= 32 and set(text) <= set("0123456789abcdef") else text
