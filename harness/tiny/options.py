"""Everything that an embedded world is made from; two equal options give the same world."""

from dataclasses import dataclass, field

from harness.tiny.skill import SkillOptions
from harness.tiny.world import WorldOptions


@dataclass(frozen=True)
class PretrainOptions:
    """The base model's size and how it is trained.

    Attributes:
        hidden, layers, heads, mlp: sizes of the Llama; input and output embeddings are tied.
        positions: the longest sequence, in tokens, that the model is declared to take.
        steps: optimiser steps.
        rows, length: each step sees ``rows`` sequences of ``length`` tokens.
        learning_rate: AdamW's rate at its highest.
        warmup: steps over which the rate rises from 0.
        flat: share of the steps after which it falls, linearly, to 0.
        seed: of the initial weights.
    """

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 768
    positions: int = 256
    steps: int = 1200
    rows: int = 16
    length: int = 64
    learning_rate: float = 2e-3
    warmup: int = 50
    flat: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class TinyOptions:
    """A world, a skill that the base model does not have, a tokenizer and a base model.

    Attributes:
        vocabulary: number of tokens, special tokens included.
    """

    world: WorldOptions = field(default_factory=WorldOptions)
    skill: SkillOptions = field(default_factory=SkillOptions)
    vocabulary: int = 1200
    pretrain: PretrainOptions = field(default_factory=PretrainOptions)


def small_options(seed: int = 0) -> TinyOptions:
    """A world small enough to be built inside a test: 60 facts, 0.5 M parameters."""
    return TinyOptions(
        world=WorldOptions(seed=seed, facts=60, generic=60),
        skill=SkillOptions(seed=seed, train=400, test=40),
        vocabulary=600,
        pretrain=PretrainOptions(hidden=128, layers=2, heads=2, mlp=384, steps=400, rows=8, seed=seed),
    )
