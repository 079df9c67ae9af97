"""The process of one run of a sweep, and how it is started on whichever node it is to run.

`python -m harness.cluster.sweep_process CONFIG STAGES` is `harness run` for some of the stages. It ends, with all that
it started, when the process that started it is gone: a run that nobody waits for would go on writing beside the next
attempt.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

NICENESS = 10  # at least: the driver, Ray and whoever works on the machine come first
HEADER = "——— "  # begins the line that each attempt writes into its log
_PARENT = "PALIMPSEST_SWEEP_PARENT"


@dataclass(frozen=True)
class Job:
    """One process to start: paths as strings, since they are read on another machine.

    Attributes:
        name: of the run.
        threads: for each rank.
        environment: variables that go with it, added to those of the node.
    """

    name: str
    config: str
    stages: tuple[str, ...]
    log: str
    threads: int
    environment: dict[str, str] = field(default_factory=dict)


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start a job here, in a session of its own, its output appended to its log.

    Raises:
        FileNotFoundError: this machine does not see the sweep's folder.
    """
    if not Path(job.config).is_file():
        raise FileNotFoundError(f"{job.config} is not there on {os.uname().nodename}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), **job.environment, _PARENT: str(os.getpid())}
    with Path(job.log).open("ab") as log:
        log.write(f"{HEADER}{time.strftime('%F %T')} on {os.uname().nodename}: {', '.join(job.stages)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "harness.cluster.sweep_process", job.config, ",".join(job.stages)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a job's process and all that it started: asked first, then without asking."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(log: Path) -> str:
    """The line of the last attempt that says what went wrong: an error's own, or else the last one."""
    if not log.is_file():
        return "it left no output"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith(HEADER)]
    lines = lines[starts[-1] + 1 :] if starts else lines
    said = [line for line in lines if _is_error(line)]
    line = said[-1] if said else lines[-1] if lines else "it ended without a word"
    return line if len(line) <= 300 else f"{line[:299]}…"


def _is_error(line: str) -> bool:
    """The first line of an error, ours or Python's; not the launcher's about the ranks it lost."""
    if "launcher ended with code" in line or "CalledProcessError" in line:
        return False
    head = line.partition("]: ")[2] if line.startswith("[rank") else line
    first = head.partition(":")[0]
    return first == "error" or (
        first.replace(".", "").replace("_", "").isalnum() and first.endswith(("Error", "Exception", "Interrupt"))
    )


def main() -> None:
    """Run the stages of one run that are not finished."""
    config_file, stages = sys.argv[1:]
    _end_with_parent()
    os.nice(max(0, NICENESS - os.nice(0)))
    from harness.errors import mendable
    from harness.gang import quiet_libraries

    quiet_libraries()
    try:
        from harness.config import load_config
        from harness.run import run

        run(load_config(Path(config_file)), stages.split(","))
    except Exception as error:
        if (line := mendable(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    given = os.environ.pop(_PARENT, None)
    if given is None:  # started by hand
        return
    import psutil

    if os.getppid() != int(given):
        sys.exit(1)
    parent = psutil.Process(int(given))

    def watch() -> None:
        # is_running compares the creation time as well, so a reused process id does not fool it.
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.2)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
