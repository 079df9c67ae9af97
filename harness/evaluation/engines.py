"""Evaluating a base and any number of fine-tuned models on lm-eval tasks, with one engine per base.

An engine is loaded once for all candidates that share a model; adapters are switched on it. Two engines answer the same
questions: ``vllm`` (fast, the default) and ``hf`` (transformers and PEFT, the reference).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.console import say
from harness.errors import UserError
from harness.evaluation.candidates import Candidate, adapter_rank, servable
from harness.evaluation.scores import CandidateScores, answers_of, task_score
from harness.evaluation.tasks import load_tasks
from harness.evaluation.verbosity import quiet_libraries

if TYPE_CHECKING:
    from harness.evaluation.text_model import TextModel

BACKENDS = ("vllm", "hf")


def evaluate(
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    *,
    backend: str,
    dtype: str,
    data_dir: Path | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    gpu_memory_utilization: float | None = None,
) -> list[CandidateScores]:
    """Evaluate every candidate on every task; results come in the order of ``candidates``.

    Args:
        tasks: names, see `harness.evaluation.tasks`.
        backend: ``vllm`` or ``hf``.
        dtype: float32, bfloat16 or float16; weights and adapters alike.
        data_dir: where local tasks' relative data files are.
        include_path: a folder of further task YAML files.
        limit: evaluate the first ``limit`` items of each task only.
        batch_size: rows that ``hf`` computes together; vLLM schedules by itself.
        seed: of sampling, for tasks that sample. Few-shot examples are drawn as lm-eval draws them.
        gpu_memory_utilization: share of a GPU's memory for vLLM; None for its default.

    Raises:
        UserError: an unknown task or backend, a task that runs generated code, or an adapter that the engine cannot
            serve and that has no merged model.
    """
    if backend not in BACKENDS:
        raise UserError(f"eval.backend: {backend!r} given; allowed: {', '.join(BACKENDS)}")
    if not tasks:
        raise UserError("eval: no tasks are named; name at least one in eval.knowledge or eval.task")
    candidates = [servable(candidate, backend) for candidate in candidates]
    with quiet_libraries():
        loaded = load_tasks(tasks, include_path, data_dir)
        _prepare(loaded)
        scores: dict[int, CandidateScores] = {}
        for model in dict.fromkeys(str(candidate.model) for candidate in candidates):
            group = {i: candidate for i, candidate in enumerate(candidates) if str(candidate.model) == model}
            ranks = [adapter_rank(c.adapter) for c in group.values() if c.adapter is not None]
            with open_engine(
                model, backend, dtype, batch_size, max(ranks, default=0), seed, gpu_memory_utilization
            ) as engine:
                for i, candidate in group.items():
                    scores[i] = _evaluate_one(engine, candidate, tasks, loaded, limit)
    return [scores[i] for i in range(len(candidates))]


@contextmanager
def open_engine(
    model: str,
    backend: str,
    dtype: str,
    batch_size: int,
    largest_rank: int,
    seed: int,
    gpu_memory_utilization: float | None,
) -> Iterator["TextModel"]:
    """The engine ``backend`` over a base model, closed at the end of the block; arguments as those of `evaluate`."""
    engine: TextModel
    if backend == "vllm":
        from harness.evaluation.vllm_engine import VLLMEngine

        engine = VLLMEngine(
            model,
            dtype=dtype,
            largest_rank=largest_rank,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
        )
    else:
        from harness.evaluation.hf_engine import HFEngine

        engine = HFEngine(model, dtype=dtype, batch_size=batch_size, seed=seed)
    try:
        yield engine
    finally:
        engine.close()


def _prepare(loaded: Any) -> None:
    """The defaults that lm-eval's own entry point gives to tasks before it evaluates them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"eval: the task '{name}' runs code that the model writes; it is not supported")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _evaluate_one(
    engine: "TextModel", candidate: Candidate, tasks: Sequence[str], loaded: Any, limit: int | None
) -> CandidateScores:
    from lm_eval.evaluator import evaluate as lm_evaluate

    began = time.perf_counter()
    engine.use_adapter(candidate.adapter)
    # All tasks in one call: requests of a kind reach the engine together. Standard errors are computed below, exactly.
    found = lm_evaluate(engine, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    seconds = time.perf_counter() - began
    items = sum(count["effective"] for count in found["n-samples"].values())
    scores = {name: task_score(name, loaded, found) for name in tasks}
    line = ", ".join(f"{name} {score.value:.3f}" for name, score in scores.items())
    say(f"eval: {candidate.name}: {line} ({items / seconds:.0f} items/s)")
    answers = {name: answers_of(samples) for name, samples in found["samples"].items()}
    return CandidateScores(candidate.name, candidate.step, scores, seconds, items / seconds, answers)
