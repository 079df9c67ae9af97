"""The command line: `harness doctor | run | calibrate | init | train | export | eval | report | methods | demo`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import UserError
from harness.gang import quiet_libraries

app = typer.Typer(
    help="Palimpsest: fine-tune a language model without writing over what it already knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: train.seed=1 …", metavar="[KEY=VALUE]…")]
Force = Annotated[str | None, typer.Option(help="Redo this stage and everything that depends on it.")]
ForceThis = Annotated[bool, typer.Option("--force", help="Redo this stage and everything that depends on it.")]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    quiet_libraries()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command(epilog="Example: harness run launch/recipes/llama2_7b_math_corda_kpm.yaml train.seed=1")
def run(config: ConfigFile, overrides: Overrides = None, force: Force = None) -> None:
    """Run every stage that is not finished: calibrate → init → train → export → eval → report."""
    from harness.pipeline import STAGES

    _run(config, overrides, list(STAGES), force)


def _stage_command(name: str, what: str) -> None:
    @app.command(name=name, help=what, epilog=f"Example: harness {name} config.yaml train.seed=1")
    def command(config: ConfigFile, overrides: Overrides = None, force: ForceThis = False) -> None:
        _run(config, overrides, [name], name if force else None)


_stage_command("calibrate", "Collect the statistics that the method asks for.")
_stage_command("init", "Decide ranks and adapter tensors at step 0.")
_stage_command("train", "Train, or go on from the newest checkpoint.")
_stage_command("export", "Write adapter/ (plain LoRA on the original base) and merged/.")
_stage_command("eval", "Evaluate what was learned and what was kept.")


@app.command(epilog="Examples: harness report config.yaml · harness report runs/a runs/b --out runs/comparison")
def report(
    places: Annotated[list[Path], typer.Argument(help="One config file, or one or more run directories.")],
    out: Annotated[Path, typer.Option(help="Folder of a comparison of several runs.")] = Path("runs/comparison"),
) -> None:
    """Write report.md and report.html of one run, or a comparison of several."""
    from harness.reporting.report import write_comparison, write_report

    if len(places) == 1 and places[0].is_file():
        _run(places[0], None, ["report"], "report")
        return
    for place in places:
        if not (place / "config.yaml").is_file():
            raise UserError(f"report: {place} is no run directory (it has no config.yaml)")
    print(write_report(places[0]) if len(places) == 1 else write_comparison(places, out))


@app.command()
def methods() -> None:
    """List every method with one line, its paper, and what data it needs."""
    from rich.console import Console
    from rich.table import Table

    from harness.methods.registry import method_class, method_names

    table = Table("method", "what it does", "paper", title="Methods")
    for name in method_names():
        cls = method_class(name)
        table.add_row(name, cls.summary, cls.paper)
    Console().print(table)


@app.command()
def doctor() -> None:
    """Say what this machine can do, and what to install for the rest."""
    from harness.doctor import doctor as diagnose

    raise typer.Exit(diagnose())


@app.command(epilog="Example: harness demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Where the demo's runs and report go.")] = Path("runs/demo"),
) -> None:
    """A small model, pre-trained here, learns a new skill three ways: what did each learn, what did each forget?"""
    from harness.demo import demo as run_demo

    run_demo(out)


def _run(config_file: Path, overrides: list[str] | None, stages: list[str], force: str | None) -> None:
    from harness.config import load_config
    from harness.reporting.summary import print_summary
    from harness.run import run as run_configuration

    print_summary(run_configuration(load_config(config_file, overrides), stages, force))
