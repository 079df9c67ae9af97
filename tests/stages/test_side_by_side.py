"""Layers side by side: every one once, in any order, threads divided, nothing finished lost."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from harness.stages.side_by_side import MOST, SHARE, begin_order, layers_at_a_time, side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_item_once(workers: int) -> None:
    done = list(side_by_side(lambda item: item**2, range(7), workers))
    assert sorted(done) == [(item, item**2) for item in range(7)]
    assert list(side_by_side(lambda item: item, [], workers)) == []


def test_two_at_a_time_and_no_more(four_threads: None) -> None:
    """The second of two waits for the first, the third item is not taken before one is done; threads are halved."""
    both, taken, threads = threading.Barrier(2, timeout=30), [], set()

    def items() -> Iterator[int]:
        for item in range(4):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        threads.add(torch.get_num_threads())
        both.wait()
        return len(taken)

    seen = [at for _, at in side_by_side(work, items(), 2)]
    assert threads == {2}
    assert seen[0] <= 3 and max(seen) == 4
    assert torch.get_num_threads() == 4


def test_after_an_error_what_others_are_at_is_handed_out(four_threads: None) -> None:
    """Item 0 fails while item 1 is being worked on: 1 comes out, then the error; 2 and 3 are never begun."""
    begun, failed = [], threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            failed.set()
            raise ValueError("layer 0")
        failed.wait(30)
        time.sleep(0.05)
        return item

    out = []
    with pytest.raises(ValueError, match="layer 0"):
        for item, _ in side_by_side(work, range(4), 2):
            out.append(item)
    assert out == [1] and sorted(begun) == [0, 1]
    assert torch.get_num_threads() == 4


def test_a_reader_who_leaves_gives_the_threads_back(four_threads: None) -> None:
    results = side_by_side(lambda item: item, range(100), 2)
    next(results)
    results.close()
    assert torch.get_num_threads() == 4


def test_how_many(four_threads: None) -> None:
    gib = 2**30
    assert layers_at_a_time(CPU, [gib] * 10, 100 * gib) == 4  # threads
    assert layers_at_a_time(CPU, [gib] * 3, 100 * gib) == 3  # layers
    assert layers_at_a_time(CPU, [1, 2 * gib, 1, 1], int(5 * gib / SHARE)) == 2  # memory
    assert layers_at_a_time(CPU, [gib] * 10, gib) == 1  # at least one
    assert layers_at_a_time(CPU, [], gib) == 1
    assert layers_at_a_time(torch.device("cuda"), [gib] * 10, 100 * gib) == 1
    torch.set_num_threads(4 * MOST)
    assert layers_at_a_time(CPU, [1] * 100, gib) == MOST


def test_the_order_in_which_to_begin() -> None:
    """One from above, one from below: 9 runs beside 1, 2, 3 and most of 4, then 6 beside 5."""
    costs = [5.0, 9.0, 1.0, 3.0, 6.0, 2.0, 4.0]
    assert [costs[i] for i in begin_order(costs, 1)] == [9, 6, 5, 4, 3, 2, 1]
    assert [costs[i] for i in begin_order(costs, 2)] == [9, 1, 2, 3, 4, 6, 5]
    assert begin_order([1.0, 1.0], 1) == [0, 1]
    assert begin_order([], 3) == []
    assert sorted(begin_order(costs, 5)) == list(range(7))
