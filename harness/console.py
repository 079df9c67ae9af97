"""What a person sees while a command runs: one progress bar, on rank 0, only on a terminal."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


def in_words(count: float) -> str:
    """Bytes as people read them: ``1.4 GiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate under a progress bar with the time left; silent when standard error is not a terminal."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    with _bar() as bar:
        yield from bar.track(iterable, total=total, description=description)


@contextmanager
def work_bar(description: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """One bar over work of ``total`` units: call what is yielded with the units done and what is being done now."""
    with _bar() as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, doing="": bar.update(task, advance=done, description=f"{description} {doing}".rstrip())


def _bar() -> Progress:
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    return Progress(*columns, console=console, disable=not (console.is_terminal and is_main_process()))
