"""The command line: `harness doctor | run | sweep | report | methods | recipes | demo`, and a command for each stage.

And `harness analyse spectrum | covariance | truncation | fisher-overlap`, `harness cache list | verify | prune`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from harness.errors import UserError, mendable
from harness.gang import quiet_libraries

app = typer.Typer(
    help="Palimpsest: fine-tune a language model without writing over what it already knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file, or recipe.yaml:row.", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: train.seed=1 …", metavar="[KEY=VALUE]…")]
Force = Annotated[str | None, typer.Option(help="Redo this stage and everything that depends on it.")]
ForceThis = Annotated[bool, typer.Option("--force", help="Redo this stage and everything that depends on it.")]

analyse = typer.Typer(
    help="Look at a base model through the decompositions: spectra, input covariances, truncation. Nothing is trained.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(analyse, name="analyse")
cache = typer.Typer(
    help="What earlier runs kept for later ones: plain SVDs, statistics, initial adapters. See docs/cache.md.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(cache, name="cache")
Layers = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Target layers, or a part of their names (q_proj, layers.3); repeatable."),
]
OneData = Annotated[
    str | None, typer.Option(metavar="FILE:COLUMN", help="Texts, instead of the configuration's preserve set.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="Rows drawn; by default the data set's own samples.")]
Alpha = Annotated[float, typer.Option(min=0, help="ASVD's exponent of mean |x|.")]
Damping = Annotated[float, typer.Option(min=0, help="CO-SVD: C + damping · mean(diag C) · I.")]
Out = Annotated[Path | None, typer.Option(help="Where results go; by default analysis/ in the run directory.")]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    quiet_libraries()
    try:
        app()
    except Exception as error:
        if (line := mendable(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


@app.command(epilog="Example: harness run launch/recipes/llama2_7b_math_corda_kpm.yaml train.seed=1")
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    force: Force = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Run on Ray: local, auto, host:port or ray://host:port. See docs/cluster.md."
        ),
    ] = None,
) -> None:
    """Run every stage that is not finished: answers → calibrate → init → prepare → train → export → eval → report."""
    from harness.pipeline import STAGES

    _run(config, overrides, list(STAGES), force, cluster)


def _stage_command(name: str, what: str) -> None:
    @app.command(name=name, help=what, epilog=f"Example: harness {name} config.yaml train.seed=1")
    def command(config: ConfigFile, overrides: Overrides = None, force: ForceThis = False) -> None:
        _run(config, overrides, [name], name if force else None)


_stage_command("answers", "Let the original model answer preserve prompts, where something learns from that.")
_stage_command("calibrate", "Collect the statistics that the method asks for.")


@app.command(name="init", epilog="Examples: harness init config.yaml · harness init config.yaml --dry-run")
def init(
    config: ConfigFile,
    overrides: Overrides = None,
    force: ForceThis = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print owner, memory and time class of every layer; load nothing.")
    ] = False,
) -> None:
    """Decide ranks and adapter tensors at step 0."""
    if not dry_run:
        _run(config, overrides, ["init"], "init" if force else None)
        return
    from harness.config import load_config
    from harness.launcher import rank_count
    from harness.preflight import check
    from harness.stages.plan import print_plan

    loaded = load_config(config, overrides)
    check(loaded)
    print_plan(loaded, rank_count(loaded))


_stage_command("prepare", "Compute once what penalties need of the original model and of preserve data.")
_stage_command("train", "Train, or go on from the newest checkpoint.")
_stage_command("export", "Write adapter/ (plain LoRA on the original base) and merged/.")
_stage_command("eval", "Evaluate what was learned and what was kept.")


@app.command(epilog="Examples: harness report config.yaml · harness report runs/a runs/b --out runs/comparison")
def report(
    places: Annotated[list[Path], typer.Argument(help="One config file, or one or more run directories.")],
    out: Annotated[Path, typer.Option(help="Folder of a comparison of several runs.")] = Path("runs/comparison"),
    baseline: Annotated[str | None, typer.Option(help="The run that others are tested against [the first].")] = None,
) -> None:
    """Write report.md, report.html and tables/ of one run, or a comparison of several."""
    from harness.recipes import locate
    from harness.reporting.report import write_comparison, write_report

    if len(places) == 1 and locate(places[0])[0].is_file():
        _run(places[0], None, ["report"], "report")
        return
    for place in places:
        if not (place / "config.yaml").is_file():
            raise UserError(f"report: {place} is no run directory (it has no config.yaml)")
    print(write_report(places[0]) if len(places) == 1 else write_comparison(places, out, baseline=baseline))


@app.command(epilog="Examples: harness sweep sweep.yaml · harness sweep sweep.yaml --cluster none --out runs/sweep")
def sweep(
    config: Annotated[Path, typer.Argument(help="The sweep's YAML file, see docs/sweeps.md.", metavar="SWEEP")],
    cluster: Annotated[
        str,
        typer.Option(help="local: Ray on this machine; none: one run after the other, no Ray; else a Ray address."),
    ] = "local",
    out: Annotated[
        Path | None, typer.Option(help="The sweep's folder; by default <output_dir>/<name of the YAML file>.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing; write the table from what is finished.")] = False,
) -> None:
    """Run every combination of a grid, a list and seeds; one table, significance and a Pareto figure at the end."""
    from harness.cluster.sweep import sweep as run_sweep
    from harness.cluster.sweep import tabulate
    from harness.reporting.sweep import print_sweep

    folder, failed = (tabulate(config, out), 0) if table else run_sweep(config, cluster, out)
    print_sweep(folder)
    if failed:
        raise typer.Exit(1)


@analyse.command(epilog="Example: harness analyse spectrum config.yaml --layers q_proj --layers layers.3.mlp")
def spectrum(
    config: ConfigFile,
    overrides: Overrides = None,
    layers: Layers = None,
    data: OneData = None,
    samples: Samples = None,
    alpha: Alpha = 0.5,
    damping: Damping = 0.01,
    out: Out = None,
) -> None:
    """Singular values under plain SVD, ASVD and CO-SVD; by default of the first block."""
    from harness.analysis.spectrum import spectrum as study

    _analyse(study, config, overrides, out, layers=layers, data=data, samples=samples, alpha=alpha, damping=damping)


@analyse.command(epilog="Example: harness analyse covariance config.yaml --data trivia.jsonl:question")
def covariance(
    config: ConfigFile,
    overrides: Overrides = None,
    layers: Layers = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE:COLUMN", help="A further data set beside train and preserve; repeatable."),
    ] = None,
    samples: Samples = None,
    reduce: Annotated[
        Literal["mean", "max"], typer.Option(help="What a cell says of its block: mean or largest |C|.")
    ] = "mean",
    out: Out = None,
) -> None:
    """Heat maps of input covariances on several data sets; by default of the first block's distinct inputs."""
    from harness.analysis.covariance_maps import covariance as study

    _analyse(study, config, overrides, out, layers=layers, data=data or (), samples=samples, reduce=reduce)


@analyse.command(epilog="Example: harness analyse truncation config.yaml --discard 64 --discard 256 --samples 128")
def truncation(
    config: ConfigFile,
    overrides: Overrides = None,
    data: OneData = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option(metavar="FILE:COLUMN", help="Take statistics from this; by default from rows not held out."),
    ] = None,
    discard: Annotated[
        list[int] | None,
        typer.Option(metavar="R", help="Components to discard per layer; repeatable. By default powers of two."),
    ] = None,
    samples: Samples = None,
    test_rows: Annotated[int, typer.Option(min=1, help="Rows held out for perplexity (at most half).")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Sampling rounds that CO-SVD++ selects from.")] = 5,
    alpha: Alpha = 0.5,
    damping: Damping = 0.01,
    out: Out = None,
) -> None:
    """Perplexity after discarding the smallest components of every layer, by five decompositions."""
    from harness.analysis.truncation import truncation as study

    _analyse(
        study, config, overrides, out, data=data, calibrate_on=calibrate_on, discards=discard, samples=samples,
        test_rows=test_rows, rounds=rounds, alpha=alpha, damping=damping,
    )  # fmt: skip


@analyse.command(name="fisher-overlap", epilog="Example: harness analyse fisher-overlap config.yaml --groups 8")
def fisher_overlap(
    config: ConfigFile,
    overrides: Overrides = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups of singular components, from the largest down.")] = 8,
    at: Annotated[
        Literal["reconstruction", "model"],
        typer.Option(help="Fisher of each group's partial reconstruction, or of the model, projected on the group."),
    ] = "reconstruction",
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Compare these target layers alone, or a part of their names; repeatable."),
    ] = None,
    data: OneData = None,
    samples: Samples = None,
    out: Out = None,
) -> None:
    """Do the preserve set and the train set lean on the same weights, by groups of singular components?"""
    from harness.analysis.fisher_overlap import fisher_overlap as study

    _analyse(study, config, overrides, out, groups=groups, at=at, layers=layers, data=data, samples=samples)


@app.command(epilog="Examples: harness recipes · harness recipes fclora mrpc")
def recipes(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Only those with every word in paper, table, file or row.", metavar="[WORD]…"),
    ] = None,
) -> None:
    """List every recipe: the paper, table and row that it reproduces, and the command that runs it."""
    from harness.recipes import listing

    print("\n".join(listing(words or [])))


@app.command()
def methods() -> None:
    """List every method with one line, its paper, and what data it needs; then what can be laid over any of them."""
    from rich.console import Console
    from rich.table import Table

    from harness.methods.registry import method_class, method_names, needs
    from harness.training.penalties.registry import penalty_class, penalty_names

    table = Table("method", "what it does", "paper", "takes statistics from", title="Methods")
    for name in method_names():
        cls = method_class(name)
        answers = [f"{what} ({' or '.join(when)})" if any(when) else what for what, when in needs(cls).items()]
        base = ["(over an NF4 base only)"] if cls.needs_quantised_base else []
        table.add_row(name, cls.summary, cls.paper, "\n".join(answers + base))
    Console().print(table)
    over = Table("penalty", "what it does", "paper", title="Over any of them, in `penalties` (the anchor in `anchor`)")
    for name in penalty_names():
        penalty = penalty_class(name)
        over.add_row(name, penalty.summary, penalty.paper)
    Console().print(over)


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


@cache.command(name="list", epilog="Examples: harness cache list · harness cache list --entries")
def cache_list(
    entries: Annotated[bool, typer.Option("--entries", help="Every entry, with what it is.")] = False,
) -> None:
    """Say how much of what is kept, when it was used, and what the limit is."""
    from harness.cache import Cache
    from harness.cache_commands import list_entries

    list_entries(Cache(), entries)


@cache.command(name="verify", epilog="Example: harness cache verify")
def cache_verify() -> None:
    """Read every entry; name and remove what is damaged. Exit code 1 if something was."""
    from harness.cache import Cache
    from harness.cache_commands import verify

    raise typer.Exit(verify(Cache()))


@cache.command(name="prune", epilog="Examples: harness cache prune --to 10 · harness cache prune --to 0 --kind adapter")
def cache_prune(
    to: Annotated[
        float | None, typer.Option(min=0, metavar="GIB", help="What may stay; by default the limit. 0 removes all.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Count and remove entries of this kind alone.")
    ] = None,
) -> None:
    """Remove the least recently used entries, and say what was freed."""
    from harness.cache import Cache
    from harness.cache_commands import prune

    prune(Cache(), to, kind)


def _run(
    config_file: Path, overrides: list[str] | None, stages: list[str], force: str | None, cluster: str | None = None
) -> None:
    from harness.config import load_config, read_content
    from harness.reporting.summary import print_summary
    from harness.run import run as run_configuration

    if cluster is None:
        block = read_content(config_file, overrides).get("cluster")
        cluster = block.get("address") if isinstance(block, dict) else None
    if isinstance(cluster, str):
        from harness.cluster.ray_run import run_file

        run_file(config_file, overrides, stages, force, cluster)
        return
    print_summary(run_configuration(load_config(config_file, overrides), stages, force))


def _analyse(
    study: Callable[..., list[Path]], config_file: Path, overrides: list[str] | None, out: Path | None, **options: Any
) -> None:
    """Run an analysis; print its table, if it has one, and where everything is."""
    from harness.config import load_config
    from harness.run_directory import RunDirectory

    config = load_config(config_file, overrides)
    files = study(config, out or RunDirectory(config.run_directory).analysis, **options)
    for file in files:
        if file.suffix == ".md":
            print(file.read_text(encoding="utf-8"))
    for file in files:
        print(file.resolve())
