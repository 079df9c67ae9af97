"""Several layers at a time on the cores of one rank.

Half of a decomposition (the reduction to tridiagonal form, QR) hardly gets faster with a second thread, so a core is
better used for another layer. Accelerators take one layer after the other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from heapq import heapify, heappop, heappush
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
MOST = 8  # layers at a time: each holds float64 copies of its own
SHARE = 0.5  # of the available memory that they may take together


def layers_at_a_time(device: torch.device, sizes: Sequence[int], available: int) -> int:
    """How many layers a rank works on at a time: up to one per thread of torch's, as far as memory goes; at least one.

    Args:
        device: where they are decomposed.
        sizes: most bytes that each layer of this rank takes.
        available: bytes that this rank may use.
    """
    if device.type != "cpu":
        return 1
    fitting = int(SHARE * available) // max([1, *sizes])
    return max(1, min(torch.get_num_threads(), len(sizes), fitting, MOST))


def begin_order(costs: Sequence[float], workers: int) -> list[int]:
    """The order in which to begin layers of these ``costs``, so that the largest ones are not in memory together.

    Every other worker goes from the costliest down, the others from the cheapest up, if all take the time expected.
    One worker alone goes from the costliest down.
    """
    left = deque(sorted(range(len(costs)), key=lambda i: (-costs[i], i)))
    free = [(0.0, worker) for worker in range(workers)]
    heapify(free)
    order = []
    while left:
        now, worker = heappop(free)
        order.append(left.popleft() if worker % 2 == 0 else left.pop())
        heappush(free, (now + costs[order[-1]], worker))
    return order


def side_by_side(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """Every item with what ``work`` makes of it, in the order in which they are done, ``workers`` at a time.

    ``items`` are taken as there is room for them. Torch's threads are divided among the workers. With one worker all
    happens in the calling thread. After an exception in ``work`` nothing new is begun; what others are at is finished
    and handed out, then it is raised.
    """
    if workers == 1:
        for item in items:
            yield item, work(item)
        return
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, "layers", initializer=torch.set_num_threads, initargs=(share,))
    waiting = iter(items)
    running: dict[Future[R], T] = {}
    error: BaseException | None = None
    more = True
    try:
        while running or more:
            while more and len(running) < workers:
                try:
                    item = next(waiting)
                except StopIteration:
                    more = False
                else:
                    running[pool.submit(work, item)] = item
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                if (failed := future.exception()) is None:
                    yield item, future.result()
                else:
                    error, more = error or failed, False
    finally:
        pool.shutdown()
        torch.set_num_threads(threads)
    if error is not None:
        raise error
