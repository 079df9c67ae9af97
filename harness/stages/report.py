"""report: ``report.md`` and ``report.html`` of one run."""

from harness.config import RunConfig
from harness.reporting.report import write_report
from harness.run_directory import RunDirectory


def report(config: RunConfig, run: RunDirectory) -> None:
    """Write both reports from what the run directory holds."""
    write_report(run.path)
