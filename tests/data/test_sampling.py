"""Choosing rows: by seed and round alone."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from harness.data.sampling import sample, seed_for


@given(size=st.integers(0, 40), count=st.integers(1, 40), seed=st.integers(0, 5))
def test_sample(size: int, count: int, seed: int) -> None:
    items = [f"row {i}" for i in range(size)]
    chosen = sample(items, count, "calibrate", seed, 0)
    assert len(chosen) == min(size, count)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(items)
    assert sample(items, count, "calibrate", seed, 0) == chosen
    if count >= size:
        assert chosen == items


def test_rounds_and_seeds_differ() -> None:
    items = list(range(1000))
    draws = {tuple(sample(items, 16, "calibrate", seed, number)) for seed in range(3) for number in range(3)}
    assert len(draws) == 9


def test_every_row_has_its_chance() -> None:
    drawn = [row for number in range(200) for row in sample(range(20), 10, "calibrate", 0, number)]
    assert all(60 <= drawn.count(row) <= 140 for row in range(20))  # 100 expected, standard deviation 7


def test_seed_is_the_same_in_every_process() -> None:
    """Python's own hash differs from process to process; seeds must not, or ranks would draw different rows."""
    code = "from harness.data.sampling import seed_for; print(seed_for('rows', 0, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == seed_for("rows", 0, 1)


def test_seeds_keep_parts_apart() -> None:
    assert seed_for("a", 1, 12) != seed_for("a", 11, 2)
    assert 0 <= seed_for("a") < 2**63
