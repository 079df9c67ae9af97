"""The demo: one YAML, three methods, and the answer to "what did it learn, what did it forget?"."""

import time
from pathlib import Path

from rich.console import Console

from harness.console import say
from harness.embedded import tiny_config
from harness.reporting.report import summary_table, write_comparison
from harness.run import run
from harness.tiny import build

# What differs between the three runs; everything else is launch/recipes/tiny.yaml.
VARIANTS: dict[str, list[str]] = {
    "lora": ["method={name: lora, rank: 16}"],
    "corda-kpm": ["method={name: corda, mode: kpm, rank: 16}"],
    "corda-kpm-anchor": ["method={name: corda, mode: kpm, rank: 16}", "anchor={kl: 1.0, prompts_per_step: 4}"],
}


def demo(out: Path) -> None:
    """Build (or load) the tiny base, tune it three ways, evaluate all, print the table and the report's path.

    Everything is resumable: a second call finds the base in the cache and the finished stages in ``out``.
    """
    began = time.monotonic()
    say("The demo in four parts: a small Llama that knows 700 invented facts, and three ways to teach it a new skill.")
    say("1/4  the base model: pre-trained here the first time (one to three minutes on two cores), then cached")
    world = build()
    directories = []
    for number, (name, overrides) in enumerate(VARIANTS.items(), start=2):
        say(f"{number}/4  {name}: tune on reversing strings, then ask it both the new skill and the old facts")
        directories.append(run(tiny_config(world, name, overrides, out)).path)
    report = write_comparison(directories, out, title="What did it learn, what did it forget?")
    console = Console()
    console.print(summary_table(directories))
    print_story(console, report, time.monotonic() - began)


def print_story(console: Console, report: Path, seconds: float) -> None:
    """How to read the table, and where to look next."""
    console.print(
        "T: share of the new skill's test items answered exactly. K: share of the base's\n"
        "knowledge that is left. One learning rate and one stopping time say little: the\n"
        "report draws each run's whole path in the K–T plane.",
        highlight=False,
    )
    console.print(f"report  {report.resolve()}   ({seconds:.0f} s)", highlight=False, soft_wrap=True)
