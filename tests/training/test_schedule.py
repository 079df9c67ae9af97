"""Which rows a step sees."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import TrainConfig
from harness.data.tokenisation import Row
from harness.training.schedule import ScheduledRows, total_steps


def rows(count: int) -> list[Row]:
    return [Row([i], [i]) for i in range(count)]


def order(count: int, steps: int, batch: int, seed: int = 0) -> list[int]:
    scheduled = ScheduledRows(rows(count), steps, batch, seed)
    assert len(scheduled) == steps * batch
    return [scheduled[i].input_ids[0] for i in range(len(scheduled))]


@settings(deadline=None)
@given(count=st.integers(1, 30), steps=st.integers(1, 20), batch=st.integers(1, 12), seed=st.integers(0, 3))
def test_each_pass_is_a_permutation(count: int, steps: int, batch: int, seed: int) -> None:
    found = order(count, steps, batch, seed)
    for start in range(0, len(found), count):
        one_pass = found[start : start + count]
        assert len(set(one_pass)) == len(one_pass)
        if len(one_pass) == count:
            assert set(one_pass) == set(range(count))


def test_passes_and_seeds_differ() -> None:
    found = order(50, 20, 10)
    passes = {tuple(found[start : start + 50]) for start in range(0, 200, 50)}
    assert len(passes) == 4
    assert order(50, 20, 10, seed=1) != found
    assert order(50, 20, 10) == found


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    """So a run that is resumed, or goes on for more steps, has seen what it would have seen."""
    assert order(17, 20, 6)[:60] == order(17, 10, 6)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (1, 4), (2, 6), (3, 2), (4, 1)])
def test_global_batches_for_any_split(ranks: int, micro: int) -> None:
    """Read by Trainer's own sharding (accelerate), step k holds rows k·B to (k+1)·B whatever the ranks and passes."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    scheduled = ScheduledRows(rows(50), 10, 12, seed=0)
    accumulation = 12 // (ranks * micro)
    read = []
    for rank in range(ranks):
        sampler = BatchSampler(SequentialSampler(scheduled), batch_size=micro, drop_last=False)
        shard = BatchSamplerShard(sampler, num_processes=ranks, process_index=rank, split_batches=False)
        read.append([[scheduled[i].input_ids[0] for i in batch] for batch in shard])
    for step in range(10):
        passes = range(step * accumulation, (step + 1) * accumulation)
        seen = sorted(row for own in read for number in passes for row in own[number])
        assert seen == sorted(order(50, 10, 12)[step * 12 : (step + 1) * 12])


@pytest.mark.parametrize(("epochs", "count", "steps"), [(1.0, 100, 9), (2.0, 96, 16), (0.1, 100, 1), (1.5, 8, 1)])
def test_total_steps(epochs: float, count: int, steps: int) -> None:
    assert total_steps(TrainConfig(epochs=epochs, batch_size=12), count) == steps
    assert steps == math.ceil(epochs * count / 12)
    assert total_steps(TrainConfig(epochs=epochs, batch_size=12, max_steps=3), count) == 3
