"""The driver of a run as a job of the cluster: what `launch/ray_job.py` starts."""

import argparse
import sys
from pathlib import Path

from harness.errors import mendable
from harness.gang import quiet_libraries


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments of `launch/train.py` and one for the address, then run the stages on the cluster."""
    parser = argparse.ArgumentParser(
        prog="launch/ray_job.py",
        description="Run the stages of one run, all of them by default, on the Ray cluster that this job belongs to.",
        epilog="Example: ray job submit -- python launch/ray_job.py --config /shared/run.yaml train.seed=1",
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file, where the head can read it")
    parser.add_argument("--stages", default=None, help="comma-separated; by default all")
    parser.add_argument("--force", default=None, help="redo this stage and what depends on it")
    parser.add_argument("--cluster", default="auto", help="address of the cluster; by default this machine's")
    parser.add_argument("overrides", nargs="*", help="key.subkey=value")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        from harness.cluster.ray_run import run_file
        from harness.pipeline import STAGES

        stages = STAGES if options.stages is None else options.stages.split(",")
        run_file(options.config, options.overrides, stages, options.force, options.cluster)
    except Exception as error:
        if (line := mendable(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
