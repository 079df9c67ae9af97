"""answers: let the original model answer the prompts of data.preserve, once, for what learns from its answers.

Prompts without answers thus become full self-distillation data: the anchor with ``tokens: answer`` compares
distributions along the answers, and replay with ``answers: true`` trains on them. Answers are sampled (or greedy, at
temperature 0) from the base model as it is loaded, not quantised, with the engine of ``eval.backend``.

Rows are answered in blocks; a stage that was killed goes on with the block that it was in. Every row has a seed of its
own. With ``vllm`` a row's answer depends on nothing else but rounding; with ``hf`` also on the rows beside it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import AnswersConfig, RunConfig
from harness.console import progress, say
from harness.data.sampling import seed_for
from harness.data.sources import read_examples
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.files import write_jsonl, write_text
from harness.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.evaluation.text_model import TextModel

BLOCK_ROWS = 512
ANSWERS = "answers.jsonl"


def answers_wanted(config: RunConfig) -> bool:
    """Whether a penalty or replay learns from answers of the original model."""
    from harness.training.penalties.registry import entry_needs, penalty_entries

    replay = config.data.replay
    if replay is not None and replay.answers and replay.ratio > 0:
        return True
    return any(entry_needs(entry).answers for entry in penalty_entries(config))


def answers(config: RunConfig, run: RunDirectory) -> None:
    """Write ``answers/answers.jsonl``: one line per row of ``data.preserve``, in its order.

    A line has ``prompt`` (under its template), ``answer``, and ``tokens``: the ids that were generated, up to and
    including the one that ended the answer. ``tokens`` is empty where ``data.max_length`` left no room.

    Raises:
        UserError: there is no ``data.preserve``, or the engine cannot be had.
    """
    if config.data.preserve is None:
        raise UserError("data.preserve: missing; the original model is to answer its prompts")
    prompts = [example.prompt for example in read_examples(config.data.preserve, "data.preserve")]
    starts = range(0, len(prompts), BLOCK_ROWS)
    parts = [run.answers / f".part-{start // BLOCK_ROWS:05d}.jsonl" for start in starts]
    missing = [(start, part) for start, part in zip(starts, parts, strict=True) if not part.is_file()]
    if missing:
        _answer_blocks(config, prompts, missing)
    write_text(run.answers / ANSWERS, "".join(part.read_text(encoding="utf-8") for part in parts))
    for part in parts:
        part.unlink()


def answered_rows(config: RunConfig, run: RunDirectory, tokenizer: "PreTrainedTokenizerBase") -> list[Row]:
    """The rows of data.preserve with the answers that the stage sampled; labels are on the answers' tokens alone.

    An answer that ended by itself closes with its end token; one that was cut does not. Rows without an answer are left
    out.

    Raises:
        UserError: the stage has not run, or no row has an answer.
    """
    file = run.answers / ANSWERS
    if not file.is_file():
        raise UserError(f"answers: {file} is missing; run the stage first (harness answers)")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = []
    for line in lines:
        if line["tokens"]:
            prompt = prompt_tokens(line["prompt"], tokenizer)
            rows.append(Row(prompt + line["tokens"], [IGNORED] * len(prompt) + line["tokens"]))
    if not rows:
        raise UserError(
            f"data.max_length: {config.data.max_length} given; none of the {len(lines)} prompts of data.preserve left "
            "room for an answer, raise it"
        )
    if len(rows) < len(lines):
        say(f"warning: data.max_length: {len(lines) - len(rows)} of {len(lines)} preserve prompts left no room")
    return rows


def prompt_tokens(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A prompt's tokens with the tokenizer's own special tokens, but for one that would close the text."""
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _answer_blocks(config: RunConfig, prompts: list[str], blocks: list[tuple[int, Path]]) -> None:
    from harness.evaluation.engines import open_engine
    from harness.models.loading import load_tokenizer  # transformers takes a second that a run without answers saves

    options = config.data.answers or AnswersConfig()
    tokenizer = load_tokenizer(config.model.path)
    seed = config.train.seed
    how = config.eval
    with open_engine(
        *(config.model.path, how.backend, config.model.dtype, how.batch_size, 0, seed, None),
        tensor_parallel=how.tensor_parallel,
        engines=how.engines,
        server=how.server,
    ) as engine:
        for start, part in progress(blocks, "answers"):
            own = prompts[start : start + BLOCK_ROWS]
            lines = _answer(engine, own, start, options, config.data.max_length, seed, tokenizer)
            write_jsonl(part, lines)
    say(f"answers: {len(prompts)} prompts of data.preserve, answered by {config.model.path}")


def _answer(
    engine: "TextModel",
    prompts: list[str],
    first: int,
    options: AnswersConfig,
    max_length: int,
    seed: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[dict[str, Any]]:
    from harness.evaluation.text_model import Prompt

    # Without `top_k` transformers would sample among the 50 most probable tokens alone; 0 means all, to both engines.
    sampling = (("temperature", options.temperature), ("top_k", 0)) if options.temperature > 0 else ()
    asked, places = [], []
    for place, prompt in enumerate(prompts):
        tokens = prompt_tokens(prompt, tokenizer)
        room = min(options.max_tokens, min(max_length, engine.max_length) - len(tokens))
        if tokens and room > 0:
            asked.append(Prompt(tokens, (), room, sampling, seed_for("answer", seed, first + place)))
            places.append(place)
    found = dict(zip(places, engine.generate(asked), strict=True)) if asked else {}
    return [
        {
            "prompt": prompt,
            "answer": tokenizer.decode(found.get(place, []), skip_special_tokens=True),
            "tokens": found.get(place, []),
        }
        for place, prompt in enumerate(prompts)
    ]
