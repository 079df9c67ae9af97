"""MT-Bench (Zheng et al., 2023): dialogues of two turns, marked from 1 to 10 by a judge on an OpenAI-compatible server.

Questions come from a local file in MT-Bench's format. Published marks belong to one judge and its prompts: the prompts
here are our own; those of the benchmark can be given as its file ``judge_prompts.jsonl``. Marks by other judges or
prompts cannot be compared with each other.
"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness.console import progress
from harness.data.templates import fill
from harness.errors import UserError
from harness.evaluation.openai_client import OpenAIClient, Refused

if TYPE_CHECKING:
    from harness.evaluation.text_model import TextModel

_MARK = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_END_OF_TURN = "### Instruction"
_INSTRUCTION = (
    "You judge answers of a language model. Say in a few sentences how helpful, correct and complete the {what} is, "
    "without favour for length. End with a mark from 1 (useless) to 10 (could not be better) in this form: [[5]]"
)


@dataclass(frozen=True)
class Question:
    """A dialogue's user turns.

    Attributes:
        reference: right answers to the turns, for questions that have some.
    """

    id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """What the judge said about one turn; ``value`` is None where it gave no mark between 1 and 10."""

    question: int
    turn: int
    value: float | None
    judgement: str


@dataclass(frozen=True)
class JudgePrompt:
    """A judge's system prompt and template; the template's fields are those of MT-Bench's own file."""

    system: str
    template: str


def read_questions(path: Path) -> list[Question]:
    """Questions from a file of JSON lines with ``question_id``, ``category``, ``turns`` and perhaps ``reference``.

    Raises:
        UserError: there is no such file, or a line is no question.
    """
    questions = []
    for number, row in _rows(path, "question.jsonl of MT-Bench"):
        try:
            turns, reference = tuple(row["turns"]), tuple(row.get("reference") or ())
            questions.append(Question(int(row["question_id"]), str(row["category"]), turns, reference))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"eval.data_dir: {path}, line {number} is no question of MT-Bench: {error!r}") from error
    return questions


def read_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """MT-Bench's ``judge_prompts.jsonl``: the prompts by name, of which ``single-…`` are used.

    Raises:
        UserError: there is no such file, or one of the four is missing.
    """
    prompts = {
        row["name"]: JudgePrompt(row["system_prompt"], row["prompt_template"])
        for _, row in _rows(path, "judge_prompts.jsonl of MT-Bench")
    }
    missing = [name for name in OWN_PROMPTS if name not in prompts]
    if missing:
        raise UserError(f"eval: {path} has no judge prompt {missing[0]}; give judge_prompts.jsonl of MT-Bench")
    return prompts


def answer(engine: "TextModel", questions: Sequence[Question], max_tokens: int = 1024) -> list[list[str]]:
    """The model's answers, greedy, for each question and turn; later turns see the earlier ones.

    The tokenizer's chat template is used, or Alpaca's template for a model without one.
    """
    from lm_eval.api.instance import Instance

    answers: list[list[str]] = [[] for _ in questions]
    settings = {"until": [_END_OF_TURN], "max_gen_toks": max_tokens, "do_sample": False}
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        requests = [
            Instance("generate_until", {}, (_prompt(engine.tokenizer, questions[i].turns, answers[i]), settings), i)
            for i in asked
        ]
        for i, text in zip(asked, engine.generate_until(requests), strict=True):
            answers[i].append(text.strip())
    return answers


def judge(
    client: OpenAIClient,
    model: str,
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    prompts: Mapping[str, JudgePrompt] | None = None,
    workers: int = 8,
) -> list[Mark]:
    """Marks for every turn of every question.

    Args:
        model: the judge's name on its server.
        prompts: those of `read_judge_prompts`; our own for None.
        workers: requests at a time.

    Raises:
        UserError: the judge cannot be reached or does not take the request.
    """
    prompts = prompts or OWN_PROMPTS

    def mark(job: tuple[int, int]) -> Mark:
        i, turn = job
        said = _ask(client, model, _messages(questions[i], answers[i], turn, prompts))
        found = _MARK.findall(said)
        value = float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None
        return Mark(questions[i].id, turn + 1, value, said)

    jobs = [(i, turn) for i, question in enumerate(questions) for turn in range(len(question.turns))]
    with ThreadPoolExecutor(workers) as pool:
        return list(progress(pool.map(mark, jobs), "judge", len(jobs)))


def summary(questions: Sequence[Question], marks: Sequence[Mark]) -> dict[str, Any]:
    """Mean marks: of all turns, of each turn, of each category; and how many turns got none."""
    category = {question.id: question.category for question in questions}

    def mean(chosen: Sequence[Mark]) -> float | None:
        values = [mark.value for mark in chosen if mark.value is not None]
        return fmean(values) if values else None

    return {
        "mt_bench": mean(marks),
        "turns": {turn: mean([m for m in marks if m.turn == turn]) for turn in sorted({m.turn for m in marks})},
        "categories": {
            name: mean([m for m in marks if category[m.question] == name]) for name in dict.fromkeys(category.values())
        },
        "marked": sum(mark.value is not None for mark in marks),
        "without_mark": sum(mark.value is None for mark in marks),
    }


def _own_prompts() -> dict[str, JudgePrompt]:
    one = "Question:\n{question}\n\nAnswer:\n{answer}"
    two = (
        "First question:\n{question_1}\n\nFirst answer:\n{answer_1}\n\n"
        "Second question:\n{question_2}\n\nSecond answer:\n{answer_2}"
    )
    reference, references = "Right answer:\n{ref_answer_1}\n\n", "Right answers:\n{ref_answer_1}\n{ref_answer_2}\n\n"
    first, second = _INSTRUCTION.format(what="answer"), _INSTRUCTION.format(what="second answer")
    return {
        "single-v1": JudgePrompt(first, one),
        "single-math-v1": JudgePrompt(first, reference + one),
        "single-v1-multi-turn": JudgePrompt(second, two),
        "single-math-v1-multi-turn": JudgePrompt(second, references + two),
    }


OWN_PROMPTS = _own_prompts()


def _messages(
    question: Question, answers: Sequence[str], turn: int, prompts: Mapping[str, JudgePrompt]
) -> list[dict[str, str]]:
    name = ("single-math-v1" if question.reference else "single-v1") + ("-multi-turn" if turn else "")
    fields = {"question": question.turns[0], "answer": answers[0]}
    for i in range(turn + 1):
        fields |= {f"question_{i + 1}": question.turns[i], f"answer_{i + 1}": answers[i]}
    fields |= {f"ref_answer_{i}": text for i, text in enumerate(question.reference, 1)}
    prompt = prompts[name]
    # Not str.format: what stands in the fields may hold braces.
    text = re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), prompt.template)
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}]


def _ask(client: OpenAIClient, model: str, messages: list[dict[str, str]]) -> str:
    try:
        return client.chat(model=model, messages=messages, temperature=0, max_tokens=2048)
    except Refused as refusal:
        raise UserError(f"eval: the judge {model} at {client.url} refused: {refusal}") from refusal


def _prompt(tokenizer: Any, turns: Sequence[str], answers: Sequence[str]) -> str:
    asked = turns[: len(answers) + 1]
    if tokenizer.chat_template:
        messages = []
        for turn, said in zip(asked, [*answers, None], strict=True):
            messages.append({"role": "user", "content": turn})
            messages += [] if said is None else [{"role": "assistant", "content": said}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    begun = "".join(f"{fill('alpaca', turn)} {said}\n\n" for turn, said in zip(asked, answers, strict=False))
    return begun + fill("alpaca", asked[-1])


def _rows(path: Path, what: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except OSError as error:
        raise UserError(
            f"eval.data_dir: {path} cannot be read ({error.strerror}); get {what} (fastchat/llm_judge/data in "
            "github.com/lm-sys/FastChat) and save it there"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"eval.data_dir: {path} is not made of JSON lines: {error}") from error
