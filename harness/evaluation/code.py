"""HumanEval and MBPP: from a model's answers to programs, and from programs to pass@1, through the sandbox.

The functions here are what the task files in ``eval/tasks/code`` name. Execution is a filter, so that all programs of a
task are run together, several at a time; what is scored is each program's `Outcome`.

Sources: HumanEval (Chen et al., 2021), MBPP (Austin et al., 2021).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.evaluation.sandbox import run_programs

PASSED = "passed"
_FENCE = "```"

Documents = Sequence[Mapping[str, Any]]
Answers = Sequence[Sequence[str]]


def humaneval_program(document: Mapping[str, Any], answer: str) -> str:
    """The function's head from the prompt, its body from the model, and the data set's check."""
    return f"{document['prompt']}{answer}\n{document['test']}\ncheck({document['entry_point']})"


def mbpp_program(document: Mapping[str, Any], answer: str) -> str:
    """The model's program, then what the tests need, then the tests."""
    return "\n".join([answer, document.get("test_setup_code") or "", *document["test_list"]])


def run_humaneval(answers: Answers, documents: Documents) -> list[list[str]]:
    """How each answer to each problem ended: ``passed`` or what went wrong."""
    return _run(humaneval_program, answers, documents)


def run_humaneval_fenced(answers: Answers, documents: Documents) -> list[list[str]]:
    """As `run_humaneval`, for answers that continue a fenced block: what follows the closing fence is left out."""
    return _run(humaneval_program, _until_fence(answers), documents)


def run_mbpp(answers: Answers, documents: Documents) -> list[list[str]]:
    """As `run_humaneval`, for MBPP."""
    return _run(mbpp_program, answers, documents)


def run_mbpp_fenced(answers: Answers, documents: Documents) -> list[list[str]]:
    """As `run_humaneval_fenced`, for MBPP."""
    return _run(mbpp_program, _until_fence(answers), documents)


def pass_at_1(document: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of a problem's programs that passed: an unbiased estimate of pass@1."""
    outcomes = results[0]
    return {"pass@1": sum(outcome == PASSED for outcome in outcomes) / len(outcomes)}


def mbpp_examples(documents: Any) -> Any:
    """The problems 2, 3 and 4 of MBPP's split ``prompt``, which its paper shows to the model."""
    return documents.filter(lambda document: document["task_id"] in (2, 3, 4))


def _until_fence(answers: Answers) -> list[list[str]]:
    return [[answer.partition(_FENCE)[0] for answer in some] for some in answers]


def _run(program: Callable[[Mapping[str, Any], str], str], answers: Answers, documents: Documents) -> list[list[str]]:
    documents = list(documents)
    pairs = [(d, answer) for d, some in zip(documents, answers, strict=True) for answer in some]
    outcomes = iter(run_programs([program(document, answer) for document, answer in pairs]))
    return [[PASSED if (outcome := next(outcomes)).passed else outcome.detail for _ in some] for some in answers]
