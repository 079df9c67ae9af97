"""Gangs of 1, 2 and 3 processes, forked from one that has imported everything and computed nothing."""

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

from harness.training.distributed import free_port


def run_gangs(one_rank: Callable[[int, int, int, str, Path], None], base: str, folder: str) -> None:
    """``one_rank(number, ranks, port, base, folder)`` in every process; exits with 1 where one fails."""
    context = multiprocessing.get_context("fork")
    for ranks in (1, 2, 3):
        port = free_port()
        processes = [
            context.Process(target=one_rank, args=(number, ranks, port, base, Path(folder))) for number in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)
