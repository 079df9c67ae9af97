"""Tables as reports show them, and the same as CSV with numbers in full precision."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.files import write_text

FOLDER = "tables"
# Every table that a report may have. Only files of these names are ever removed from a folder.
NAMES = (
    "scores",
    "changes",
    "changed_answers",
    "against_baseline",
    "diagnostics",
    "layers",
    "configuration",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """A table as both formats show it: cells are finished text.

    Attributes:
        name: of its CSV file, one of `NAMES`.
        hints: a second line for each header.
        strong: rows that stand out.
        text: columns that hold words; the others hold numbers and are aligned to the right.
        data: the rows of the CSV, by column; where there are none the CSV has the cells as they are shown.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    name: str
    hints: tuple[str, ...] = ()
    strong: frozenset[int] = frozenset()
    text: frozenset[int] = frozenset({0})
    data: tuple[Mapping[str, Value], ...] = ()

    def hint(self, column: int) -> str:
        """The hint under a header, or nothing."""
        return self.hints[column] if self.hints else ""

    @property
    def file(self) -> str:
        """Where its CSV is, seen from the report."""
        return f"{FOLDER}/{self.name}.csv"

    def csv(self) -> str:
        """The table as CSV (RFC 4180, a header, UTF-8); a value that is not there is an empty field."""
        rows = self.data or tuple(dict(zip(self.headers, row, strict=True)) for row in self.rows)
        columns = list(dict.fromkeys(column for row in rows for column in row)) or list(self.headers)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow([_field(column) for column in columns])
        writer.writerows([[_field(row.get(column)) for column in columns] for row in rows])
        return text.getvalue()


def write_tables(folder: Path, tables: Iterable[Table]) -> None:
    """Write ``tables/<name>.csv`` below ``folder``, and remove those of an earlier report that it no longer has."""
    written = set()
    for table in tables:
        assert table.name in NAMES and table.name not in written, table.name
        write_text(folder / table.file, table.csv())
        written.add(table.name)
    for name in set(NAMES) - written:
        (folder / FOLDER / f"{name}.csv").unlink(missing_ok=True)


def bounds(name: str, interval: Sequence[float] | None) -> dict[str, Value]:
    """The two columns of an interval."""
    low, high = interval if interval is not None else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _field(value: Value) -> str:
    """A cell. Text that a spreadsheet would run as a formula gets an apostrophe before it: answers are anybody's."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    return f"'{value}" if value.startswith(_FORMULA) and len(value) > 1 else value
