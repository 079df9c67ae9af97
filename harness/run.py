"""One run from the outside: ranks under the DeepSpeed launcher for what trains, this process for the rest."""

from harness.config import RunConfig
from harness.files import write_text
from harness.launcher import launch
from harness.pipeline import GANG_STAGES, STAGES, is_finished, run_stages
from harness.preflight import check
from harness.run_directory import RunDirectory


def run(config: RunConfig, stages: tuple[str, ...] | list[str] = STAGES, force: str | None = None) -> RunDirectory:
    """Run those of ``stages`` that are not finished and return the run directory.

    calibrate, init, train and export run on ranks that the DeepSpeed launcher starts; eval and report run here.
    ``force`` names a stage to be redone together with everything that depends on it.

    Raises:
        UserError: the configuration cannot work, or contradicts what the run directory holds.
    """
    check(config)
    directory = RunDirectory(config.run_directory)
    gang = [stage for stage in stages if stage in GANG_STAGES]
    forced_gang = force if force in GANG_STAGES else None
    if gang and (forced_gang or any(not is_finished(config, directory, stage) for stage in gang)):
        write_text(directory.config, config.dump())
        launch(config, directory.config, gang, forced_gang)
    rest = [stage for stage in stages if stage not in GANG_STAGES]
    run_stages(config, rest, None if forced_gang else force)
    return directory
