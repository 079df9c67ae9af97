"""eval: base, final model and (if configured) every checkpoint on the configured tasks; K, T and KT."""

from pathlib import Path

from harness.config import RunConfig
from harness.console import say
from harness.run_directory import RunDirectory


def evaluate(config: RunConfig, run: RunDirectory) -> None:
    """Write ``eval/results.json``; nothing where no task is configured."""
    options = config.eval
    if not options.knowledge and not options.task:
        say("eval: no tasks are configured (eval.knowledge, eval.task); nothing to do")
        return
    from harness.evaluation.stage import evaluate_run

    places = {
        key: None if (value := getattr(options, key)) is None else Path(value)
        for key in ("data_dir", "include_path", "full_fine_tuning")
    }
    evaluate_run(
        config.model.path,
        run.path,
        knowledge=options.knowledge,
        task=options.task,
        backend=options.backend,
        dtype=config.model.dtype,
        limit=options.limit,
        batch_size=options.batch_size,
        checkpoints=options.checkpoints,
        **places,
    )
