"""What a person sees while a command runs: one progress bar, on rank 0, only on a terminal."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def is_main_process() -> bool:
    """True on rank 0, and where there are no ranks."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print one line on standard error, on rank 0 only; standard output is kept for results."""
    if is_main_process():
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(line, markup=False)


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate under a progress bar with the time left; silent when standard error is not a terminal."""
    console = Console(file=sys.stderr)
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    hidden = not (console.is_terminal and is_main_process())
    with Progress(*columns, console=console, disable=hidden) as bar:
        yield from bar.track(iterable, total=total, description=description)
