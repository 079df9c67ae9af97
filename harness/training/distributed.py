"""Ranks: joining them, splitting work among them, and dying with whoever started them."""

import os
import threading
import time
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from harness.errors import UserError
from harness.measurement import available_memory

T = TypeVar("T")
SUPERVISOR = "PALIMPSEST_SUPERVISOR_PID"


def join_ranks() -> None:
    """Initialise the process group through DeepSpeed; a process started without a launcher is a gang of one.

    DeepSpeed must know the world size before any ZeRO-3 configuration is built, else it takes it for 1.

    Raises:
        UserError: the port at which ranks meet is taken.
    """
    name_accelerator()
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone = "RANK" not in os.environ
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if alone:
        os.environ["MASTER_PORT"] = str(free_port())
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed would compile a shared-memory all-reduce for the CPU here: half a minute, and a compiler that a machine
    # may not have. gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"--master_port: {os.environ['MASTER_PORT']} is in use on this machine; give the launcher another one"
        ) from error
    die_with_supervisor()


def name_accelerator() -> None:
    """Tell DeepSpeed that there is only a CPU, where that is so; it warns about it when it finds out by itself.

    Saving a model is enough: transformers then imports it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def rank() -> int:
    """This process's rank; 0 outside a gang."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are; 1 outside a gang."""
    return dist.get_world_size() if dist.is_initialized() else 1


def available_to_a_rank(device: torch.device) -> int:
    """Bytes: of this rank's accelerator, or this machine's divided by the ranks on it."""
    local = next((int(os.environ[key]) for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if key in os.environ), None)
    return available_memory(device) // (1 if device.type == "cuda" else local or world_size())


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def share(items: Sequence[T]) -> list[T]:
    """This rank's items: every ``world_size``-th one."""
    return list(items[rank() :: world_size()])


def training_device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def free_port() -> int:
    """A TCP port on localhost that nothing listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_supervisor() -> None:
    """End this process when the one named in ``$PALIMPSEST_SUPERVISOR_PID`` is gone.

    A launcher that is killed with SIGKILL cannot stop its ranks; orphans would go on writing into the run directory
    beside the next attempt.
    """
    if SUPERVISOR not in os.environ:
        return
    import psutil

    try:
        supervisor = psutil.Process(int(os.environ[SUPERVISOR]))
    except psutil.NoSuchProcess:
        os._exit(1)

    def watch() -> None:
        # is_running compares the creation time as well, so a reused process id does not fool it.
        while supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
