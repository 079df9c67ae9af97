"""The new skill: reverse a short string of letters, given as an instruction."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class SkillOptions:
    """How many items of the skill.

    Attributes:
        seed: the items follow from it.
        train: number of training items.
        test: number of test items; no string is in both.
        letters: what the strings are made of; the fewer, the sooner the skill is learnt.
        lengths: how many letters a string may have.
    """

    seed: int = 0
    train: int = 4000
    test: int = 400
    letters: str = "abcdefghijkl"
    lengths: tuple[int, ...] = (3, 4, 5)


def reverse_items(
    options: SkillOptions = SkillOptions(),
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test items as ``{"prompt": "Reverse: k d e ->", "response": " e d k"}``.

    The response begins with the space, so that a byte-level tokenizer splits the text where the prompt ends.
    """
    wanted = options.train + options.test
    possible = sum(len(options.letters) ** length for length in options.lengths)
    if wanted > possible:
        raise ValueError(f"{wanted} different strings are wanted; {options.letters!r} makes only {possible}")
    draw = random.Random(f"reverse {options.seed}")
    strings: dict[str, None] = {}
    while len(strings) < wanted:
        strings["".join(draw.choices(options.letters, k=draw.choice(options.lengths)))] = None
    items = [
        {"prompt": f"Reverse: {' '.join(string)} ->", "response": f" {' '.join(reversed(string))}"}
        for string in strings
    ]
    return items[: options.train], items[options.train :]
