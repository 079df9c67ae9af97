"""Padding, and putting two batches on top of each other."""

import torch

from harness.data.collation import collate, stack
from harness.data.tokenisation import IGNORED, Row

ROWS = [Row([5, 6, 7], [IGNORED, 6, 7]), Row([8], [8])]


def test_right() -> None:
    batch = collate(ROWS, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_left() -> None:
    batch = collate(ROWS, pad_id=9, side="left")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, 8]]


def test_a_real_token_with_the_padding_id_is_real() -> None:
    batch = collate([Row([9, 9], [9, 9]), Row([1], [1])], pad_id=9)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[9, 9], [1, IGNORED]]


def test_stack() -> None:
    short, long = collate(ROWS[1:], pad_id=9), collate(ROWS[:1], pad_id=9)
    for first, second, rows in ((short, long, [ROWS[1], ROWS[0]]), (long, short, ROWS)):
        stacked, direct = stack(first, second, pad_id=9), collate(rows, pad_id=9)
        assert stacked.keys() == direct.keys()
        assert all(torch.equal(stacked[key], direct[key]) for key in direct)
