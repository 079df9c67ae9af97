"""Gangs that stay: real ranks under the DeepSpeed launcher that take one run after the other.

Launcher, imports and process group take longer than most runs of the tests. A gang of one rank and one of two are
therefore kept for all tests, started by the first run that needs them; a process of one rank needs no launcher. Between
runs every rank goes back to what a new process is; ``PALIMPSEST_TESTS_NEW_GANGS=1`` gives every run a gang of its own,
and the results must be the same bit for bit.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = str(REPOSITORY / "launch" / "train.py")
KEPT = () if os.environ.get("PALIMPSEST_TESTS_NEW_GANGS") == "1" else (1, 2)  # numbers of ranks
POLL_SECONDS = 0.01
# How often tests of faults kill something: a second kill hits what the first one left. Ten: with more time.
KILLS = int(os.environ.get("PALIMPSEST_TESTS_KILLS", "2"))


def start_command(ranks: int, *program: str) -> list[str]:
    """What starts ``program`` on ``ranks`` ranks of this machine: the DeepSpeed launcher, unneeded for one rank.

    ``program`` is a script with its arguments, or ``--module``, a module and its arguments.
    """
    if ranks == 1:
        return [sys.executable, *("-m" if word == "--module" else word for word in program)]
    from harness.training.distributed import free_port

    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error"]
    where = ["--num_accelerators", str(ranks), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [*launcher, *where, *program]


def gang_environment() -> dict[str, str]:
    """This process's environment with one thread a rank and no accelerator, and an allocator that keeps nothing large.

    glibc keeps freed blocks of up to 32 MiB for itself, and weights are smaller in tests. Here they go back at once
    from 64 KiB on, as those of a large model do, so that a rank's resident memory is what it holds.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": str(2**16)}


class Gang:
    """Ranks that wait for runs. Whatever goes wrong in a run ends all of them."""

    def __init__(self, ranks: int) -> None:
        from harness.training.distributed import SUPERVISOR

        self.ranks = ranks
        self._runs = 0
        self._folder = tempfile.TemporaryDirectory(prefix="gang-")
        self._output = Path(self._folder.name) / "output"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                start_command(ranks, "--module", "tests.gangs", self._folder.name),
                cwd=REPOSITORY,
                env={**gang_environment(), SUPERVISOR: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, arguments: list[str], function: str = "harness.gang:main") -> None:
        """``function(arguments)``, named ``module:name``, on every rank; fails with their output if it fails."""
        seen, number, folder = self._output.stat().st_size, self._runs, Path(self._folder.name)
        self._runs += 1
        order = folder / f"{number}.json"
        order.with_suffix(".part").write_text(
            json.dumps({"folder": os.getcwd(), "function": function, "arguments": arguments})
        )
        order.with_suffix(".part").rename(order)
        done = [folder / f"{number}.done.{rank}" for rank in range(self.ranks)]
        try:
            while not all(file.exists() for file in done):
                code = self._process.poll()
                assert code is None, f"code {code}\n" + self._output.read_bytes()[seen:].decode(errors="replace")
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End all ranks, and the launcher."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()
        _kept.pop(self.ranks, None)


_kept: dict[int, Gang] = {}


def run_in_gang(ranks: int, *arguments: str) -> None:
    """`harness.gang.main` with ``arguments`` on ``ranks`` ranks; fails with their output if they fail."""
    if ranks in KEPT:
        if ranks not in _kept:
            _kept[ranks] = Gang(ranks)
        _kept[ranks].run(list(arguments))
        return
    command = start_command(ranks, SCRIPT, *arguments)
    done = subprocess.run(command, env=gang_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def call_in_gang(ranks: int, function: str, *arguments: str) -> None:
    """``function(arguments)``, named ``module:name``, on the ranks of a gang; fails with their output if it fails."""
    gang = _kept.get(ranks) or Gang(ranks)
    if ranks in KEPT:
        _kept[ranks] = gang
    gang.run(list(arguments), function)
    if ranks not in KEPT:
        gang.end()


def end_gangs() -> None:
    """End the gangs that were kept."""
    for gang in list(_kept.values()):
        gang.end()


# -- what a rank does --------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Run what is asked for in ``folder``, one order after the other, until this process is ended."""
    from harness.gang import quiet_libraries
    from harness.training.distributed import SUPERVISOR, join_ranks, rank

    quiet_libraries()
    join_ranks()
    del os.environ[SUPERVISOR]  # it is watched now, once is enough
    number = 0
    while True:
        order = folder / f"{number}.json"
        while not order.exists():
            time.sleep(POLL_SECONDS)
        asked = json.loads(order.read_text())
        with nothing_left_behind():
            os.chdir(asked["folder"])
            module, _, name = asked["function"].partition(":")
            getattr(import_module(module), name)(asked["arguments"])
        (folder / f"{number}.done.{rank()}").touch()
        number += 1


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """After the block the process is as it was: no engines, no settings of libraries, the same random numbers."""
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    environment, folder = dict(os.environ), os.getcwd()
    generator, linear = torch.get_rng_state(), torch.nn.functional.linear
    yield
    gc.collect()  # engines are full of cycles
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.nn.functional.linear = linear  # ZeRO-3 puts its own there and leaves it
    torch.set_rng_state(generator)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


if __name__ == "__main__":
    serve(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))
