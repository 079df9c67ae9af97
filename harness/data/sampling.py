"""Choosing rows by a seed: a choice depends on nothing but the seed, the round and the number of rows."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def seed_for(*parts: object) -> int:
    """A 63-bit seed made from ``parts``; the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(items: Sequence[T], count: int, *key: object) -> list[T]:
    """``count`` items drawn without replacement, in drawn order; all of them, in their order, if there are no more."""
    if count >= len(items):
        return list(items)
    generator = torch.Generator().manual_seed(seed_for(*key))
    return [items[i] for i in torch.randperm(len(items), generator=generator)[:count].tolist()]
