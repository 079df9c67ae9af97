"""Reading a data source: hub id, local directory, or local .jsonl, .json or .parquet file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import SourceConfig, nearest
from harness.data.templates import fill
from harness.errors import UserError

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Example:
    """One row as text: the prompt under its template, and the response where the source has one."""

    prompt: str
    response: str | None


def read_rows(source: SourceConfig, key: str) -> "datasets.Dataset":
    """The rows of ``source`` as they are stored. ``key`` (such as ``data.train``) names it in error messages.

    Raises:
        UserError: the source cannot be read, a column that it names is not there, or there are no rows.
    """
    import datasets  # half a second that checking a configuration should not pay

    path = Path(source.path)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said once, below
    try:
        if path.suffix in _BUILDERS:
            rows = datasets.load_dataset(_BUILDERS[path.suffix], data_files={"train": str(path)}, split=source.split)
        else:
            rows = datasets.load_dataset(source.path, source.subset, split=source.split)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{key}: {source.path!r}, split {source.split!r} cannot be read: {reason}") from error
    for field in ("prompt", "pair", "response", "image"):
        column = getattr(source, field)
        if column is not None and column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise UserError(
                f"{key}.{field}: no column {column!r} in {source.path}; there are: {columns}"
                f"{nearest(column, rows.column_names)}"
            )
    if len(rows) == 0:
        raise UserError(f"{key}.split: {source.split!r} of {source.path} has no rows")
    return rows


def read_examples(source: SourceConfig, key: str) -> list[Example]:
    """Read all rows of ``source`` as text.

    Raises:
        UserError: as `read_rows`, or a row has no value.
    """
    rows = read_rows(source, key)
    prompts = rows[source.prompt]
    responses = rows[source.response] if source.response is not None else [None] * len(rows)
    for field, values in (("prompt", prompts), ("response", responses if source.response is not None else [])):
        for number, value in enumerate(values):
            if value is None:
                raise UserError(
                    f"{key}.{field}: row {number} of {source.path} has no value in {getattr(source, field)!r}"
                )
    return [
        Example(fill(source.template, str(prompt)), None if response is None else str(response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
