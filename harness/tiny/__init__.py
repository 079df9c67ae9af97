"""The embedded world: an invented corpus, a small Llama that knows it, and a skill that it does not have.

It stands where a real base model and real data would stand: in the demo and in the tests. Everything downstream
treats it like any other Hugging Face folder and JSONL files.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.console import say
from harness.files import read_json, write_json, write_jsonl
from harness.tiny.kept import kept_folder
from harness.tiny.options import PretrainOptions, TinyOptions, small_options
from harness.tiny.skill import SkillOptions, reverse_items
from harness.tiny.world import World, WorldOptions

__all__ = [
    "PretrainOptions",
    "SkillOptions",
    "TinyOptions",
    "TinyWorld",
    "WorldOptions",
    "build",
    "small_options",
]

FORMAT = 1  # part of the cache key: raise it when the same options come to mean another world
DEFAULT = TinyOptions()


@dataclass(frozen=True)
class TinyWorld:
    """The files of one embedded world.

    Attributes:
        model: Hugging Face folder of the pre-trained base, tokenizer included.
        train: JSONL of the new skill, columns ``prompt`` and ``response``.
        preserve: JSONL of questions that the base can answer, without the answers, column ``question``.
        data_dir: folder of the evaluation data, columns ``prompt`` and ``answer``: ``facts_seen.jsonl`` (asked
            in pre-training), ``facts_heldout.jsonl`` (stated, never asked), ``reverse_test.jsonl`` (the skill).
        info: options, counts, seconds, and the base's exact match on the three evaluation files.
    """

    model: Path
    train: Path
    preserve: Path
    data_dir: Path
    info: dict[str, Any]


def build(cache: Path | None = None, options: TinyOptions = DEFAULT) -> TinyWorld:
    """The world of ``options``, made on the first call and taken from ``cache`` afterwards.

    Several processes may ask at once: one builds and the others wait for it.

    Args:
        cache: folder of all worlds; by default ``$PALIMPSEST_CACHE`` or ``~/.cache/palimpsest``.
        options: what to build.
    """
    content = {"format": FORMAT, **asdict(options)}
    folder = kept_folder("tiny", content, lambda staging: _write_world(staging, options), cache)
    return TinyWorld(
        model=folder / "model",
        train=folder / "reverse_train.jsonl",
        preserve=folder / "fact_questions.jsonl",
        data_dir=folder / "eval",
        info=read_json(folder / "info.json"),
    )


def _write_world(folder: Path, options: TinyOptions) -> None:
    from harness.tiny.pretrain import exact_match, pretrain, save
    from harness.tiny.tokenizer import train_tokenizer

    started = time.monotonic()
    world = World(options.world)
    train, test = reverse_items(options.skill)
    evaluation = {
        "facts_seen": [{"prompt": fact.question, "answer": fact.answer} for fact in world.asked],
        "facts_heldout": [{"prompt": fact.question, "answer": fact.answer} for fact in world.heldout],
        "reverse_test": [{"prompt": item["prompt"], "answer": item["response"].strip()} for item in test],
    }
    write_jsonl(folder / "reverse_train.jsonl", train)
    write_jsonl(folder / "fact_questions.jsonl", ({"question": fact.question} for fact in world.asked))
    for name, items in evaluation.items():
        write_jsonl(folder / "eval" / f"{name}.jsonl", items)

    say(f"building the embedded world: {options.world.facts} facts, once")
    skill_texts = [item["prompt"] + item["response"] for item in train]
    tokenizer = train_tokenizer([*world.sample_text(), *skill_texts], options.vocabulary, options.pretrain.positions)
    model = pretrain(tokenizer, world.epochs(), options.pretrain)
    save(model, tokenizer, folder / "model")
    info = {
        "options": asdict(options),
        "counts": {
            "facts": len(world.facts),
            "reverse_train": len(train),
            **{name: len(items) for name, items in evaluation.items()},
            "tokens": len(tokenizer),
            "parameters": model.num_parameters(),
        },
        "exact_match": {name: exact_match(model, tokenizer, items) for name, items in evaluation.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(folder / "info.json", info)
