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
    from harness.evaluation.stage import evaluate_run, evaluate_run_directly
    from harness.evaluation.suites import expand
    from harness.evaluation.tasks import check_data

    if config.task != "causal_lm":
        evaluate_run_directly(config, run)
        return
    places = {
        key: None if (value := getattr(options, key)) is None else Path(value)
        for key in ("data_dir", "include_path", "full_fine_tuning")
    }
    knowledge, task = (expand(names, places["include_path"]) for names in (options.knowledge, options.task))
    check_data([*knowledge, *task], places["include_path"], places["data_dir"])
    evaluate_run(
        config.model.path,
        run.path,
        knowledge=knowledge,
        task=task,
        backend=options.backend,
        dtype=config.model.dtype,
        limit=options.limit,
        batch_size=options.batch_size,
        checkpoints=options.checkpoints,
        server=options.server,
        tensor_parallel=options.tensor_parallel,
        engines=options.engines,
        **places,
    )
