"""The last thing that a command prints: what came out, where it is, and what to do next."""

import sys

from rich.console import Console

from harness.console import is_main_process
from harness.files import read_json
from harness.run_directory import RunDirectory


def print_summary(run: RunDirectory) -> None:
    """Print scores and places of a run directory on standard error; only what is there."""
    if not is_main_process():
        return
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    if run.results.is_file():
        from harness.reporting.report import summary_table

        console.print(summary_table([run.path]))
        for note in read_json(run.results)["notes"]:
            console.print(f"note: {note}", markup=False)
    places = {
        "report": run.path / "report.html",
        "adapter": run.adapter,
        "merged model": run.merged,
        "metrics": run.metrics,
    }
    for what, path in places.items():
        if path.exists():
            console.print(f"{what:>13}  {path}", markup=False)
    if run.merged.is_dir() and not run.base.is_dir():  # a model with a head of its own generates nothing
        console.print(f"{'next':>13}  vllm serve {run.merged}", markup=False)
