"""One run from the outside: ranks under the DeepSpeed launcher for what trains, this process for the rest."""

from harness.config import RunConfig
from harness.files import write_text
from harness.launcher import launch
from harness.pipeline import FIRST_STAGES, GANG_STAGES, STAGES, has_work, is_finished, run_stages
from harness.preflight import check
from harness.run_directory import RunDirectory


def run(config: RunConfig, stages: tuple[str, ...] | list[str] = STAGES, force: str | None = None) -> RunDirectory:
    """Run those of ``stages`` that are not finished and return the run directory.

    calibrate, init, prepare, train and export run on ranks that the DeepSpeed launcher starts; the others run here.
    ``force`` names a stage to be redone together with everything that depends on it.

    Raises:
        UserError: the configuration cannot work, or contradicts what the run directory holds.
    """
    check(config)
    directory = RunDirectory(config.run_directory)
    first = [stage for stage in stages if stage in FIRST_STAGES]
    rest = [stage for stage in stages if stage not in (*FIRST_STAGES, *GANG_STAGES)]
    run_stages(config, first, None if force in (*GANG_STAGES, *rest) else force)
    gang = [stage for stage in stages if stage in GANG_STAGES and has_work(config, stage)]
    forced_gang = force if force in GANG_STAGES else None
    if gang and (forced_gang or any(not is_finished(config, directory, stage) for stage in gang)):
        write_text(directory.config, config.dump())
        launch(config, directory.config, gang, forced_gang)
    run_stages(config, rest, force if force in rest else None)
    return directory
