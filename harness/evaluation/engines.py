"""Evaluating a base and any number of fine-tuned models on lm-eval tasks, with one engine per base.

An engine is loaded once for all candidates that share a model; adapters are switched on it. Three engines answer the
same questions: ``vllm`` (fast, the default), ``hf`` (transformers and PEFT, the reference) and ``server`` (a running
OpenAI-compatible server). What was asked before is taken from the cache, see `harness.evaluation.results_cache`.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.console import say
from harness.errors import UserError
from harness.evaluation.candidates import Candidate, adapter_rank, servable
from harness.evaluation.results_cache import Known, ResultsCache, apart, together
from harness.evaluation.scores import CandidateScores, answers_of, task_score
from harness.evaluation.tasks import load_tasks, resolve_tasks
from harness.evaluation.verbosity import quiet_libraries

if TYPE_CHECKING:
    from harness.evaluation.text_model import TextModel

BACKENDS = ("vllm", "hf", "server")


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
    tensor_parallel: int = 1,
    engines: int = 1,
    server: str | None = None,
    cache: bool = True,
) -> list[CandidateScores]:
    """Evaluate every candidate on every task; results come in the order of ``candidates``.

    Args:
        tasks: names, see `harness.evaluation.tasks`.
        backend: ``vllm``, ``hf`` or ``server``.
        dtype: float32, bfloat16 or float16; weights and adapters alike.
        data_dir: where local tasks' relative data files are.
        include_path: a folder of further task YAML files.
        limit: evaluate the first ``limit`` items of each task only.
        batch_size: rows that ``hf`` computes together and ``server`` is asked at once; vLLM schedules by itself.
        seed: of sampling, for tasks that sample. Few-shot examples are drawn as lm-eval draws them.
        gpu_memory_utilization: share of a GPU's memory for vLLM; None for its default.
        tensor_parallel: GPUs that one vLLM engine is spread over.
        engines: how many engines, each on GPUs of its own, share the items.
        server: address of the server, for the backend ``server``.
        cache: take scores that are known, and keep new ones. A server's never are.

    Raises:
        UserError: an unknown task or backend, a task that runs generated code, options that do not go together, an
            adapter of another base model, or one that the engine cannot serve and that has no merged model.
    """
    check_backend(backend, tensor_parallel=tensor_parallel, engines=engines, server=server)
    if not tasks:
        raise UserError("eval: no tasks are named; name at least one in eval.knowledge or eval.task")
    candidates = [servable(candidate, backend) for candidate in candidates]
    resolve_tasks(tasks, include_path, data_dir)
    kept: ResultsCache | None = None
    if cache and backend != "server":
        kept = ResultsCache(
            backend=backend, dtype=dtype, limit=limit, seed=seed, data_dir=data_dir, include_path=include_path
        )
    known = [_known(candidate, tasks, kept) for candidate in candidates]
    asked = [i for i in range(len(candidates)) if len(known[i]) < len(tasks)]
    _check_adapters([candidates[i] for i in asked])
    load = functools.cache(lambda names: _load(names, include_path, data_dir))
    with quiet_libraries():
        for names in dict.fromkeys(_missing(tasks, known[i]) for i in asked):
            load(names)  # mistakes in tasks come before engines
        for group in _sharing_an_engine({i: candidates[i] for i in asked}):
            ranks = [adapter_rank(c.adapter) for c in group.values() if c.adapter is not None and c.adapter.is_dir()]
            with ExitStack() as stack:
                model, merged = _model_of(group, dtype, stack)
                engine = stack.enter_context(
                    open_engine(
                        model,
                        backend,
                        dtype,
                        batch_size,
                        0 if merged else max(ranks, default=0),
                        seed,
                        gpu_memory_utilization,
                        tensor_parallel=tensor_parallel,
                        engines=engines,
                        server=server,
                    )
                )
                for i, candidate in group.items():
                    names = _missing(tasks, known[i])
                    engine.use_adapter(None if merged else candidate.adapter)
                    known[i] |= _evaluate_one(engine, candidate, names, load(names), limit)
                    for name in names if kept is not None else ():
                        kept.put(candidate, name, known[i][name])
    return [together(candidate, tasks, known[i]) for i, candidate in enumerate(candidates)]


@contextmanager
def open_engine(
    model: str,
    backend: str,
    dtype: str,
    batch_size: int,
    largest_rank: int,
    seed: int,
    gpu_memory_utilization: float | None,
    *,
    tensor_parallel: int = 1,
    engines: int = 1,
    server: str | None = None,
) -> Iterator["TextModel"]:
    """The engine ``backend`` over a base model, closed at the end of the block; arguments as those of `evaluate`.

    Args:
        largest_rank: the largest rank of any layer of any adapter that will be used; 0 for none.
    """
    check_backend(backend, tensor_parallel=tensor_parallel, engines=engines, server=server)
    build: Callable[[], TextModel]
    if backend == "vllm":
        from harness.evaluation.vllm_engine import VLLMEngine

        build = functools.partial(
            VLLMEngine,
            model,
            dtype=dtype,
            largest_rank=largest_rank,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel=tensor_parallel,
        )
    elif backend == "hf":
        from harness.evaluation.hf_engine import HFEngine

        build = functools.partial(HFEngine, model, dtype=dtype, batch_size=batch_size, seed=seed)
    else:
        from harness.evaluation.server_engine import ServerEngine

        assert server is not None
        build = functools.partial(ServerEngine, model, url=server, seed=seed, rows=batch_size)
    if engines > 1:
        from harness.evaluation.engine_group import EngineGroup

        build = functools.partial(EngineGroup, model, build=build, engines=engines, gpus=tensor_parallel)
    engine = build()
    try:
        yield engine
    finally:
        engine.close()


def check_backend(backend: str, *, tensor_parallel: int = 1, engines: int = 1, server: str | None = None) -> None:
    """Nothing where these go together.

    Raises:
        UserError: an unknown backend, a server without an address or an address without a server, or several GPUs or
            engines for a backend that has none.
    """
    if backend not in BACKENDS:
        raise UserError(f"eval.backend: {backend!r} given; allowed: {', '.join(BACKENDS)}")
    if tensor_parallel < 1 or engines < 1:
        key, value = ("engines", engines) if engines < 1 else ("tensor_parallel", tensor_parallel)
        raise UserError(f"eval.{key}: {value} given; allowed: 1 or more")
    if backend == "server" and server is None:
        raise UserError("eval.server: nothing given; eval.backend server needs an address, http://localhost:8000/v1")
    if backend != "server" and server is not None:
        raise UserError(f"eval.server: {server} given with eval.backend {backend}; set eval.backend to server")
    if tensor_parallel > 1 and backend != "vllm":
        raise UserError(f"eval.tensor_parallel: {tensor_parallel} given; with eval.backend {backend} allowed: 1")
    if engines > 1 and backend == "server":
        raise UserError(f"eval.engines: {engines} given; with eval.backend server allowed: 1 (it schedules by itself)")


def _known(candidate: Candidate, tasks: Sequence[str], kept: ResultsCache | None) -> dict[str, Known]:
    if kept is None:
        return {}
    known = {name: found for name in tasks if (found := kept.get(candidate, name)) is not None}
    if known:
        values = ", ".join(f"{name} {entry.score.value:.3f}" for name, entry in known.items())
        say(f"eval: {candidate.name}: {values} (known from an earlier evaluation)")
    return known


def _missing(tasks: Sequence[str], known: dict[str, Known]) -> tuple[str, ...]:
    return tuple(name for name in tasks if name not in known)


def _check_adapters(candidates: Sequence[Candidate]) -> None:
    """Every adapter against its base, before anything is loaded."""
    on_folders = [c for c in candidates if c.adapter is not None and c.adapter.is_dir()]
    if not on_folders:
        return
    from harness.evaluation.adapter_check import BaseLayers

    layers = functools.cache(BaseLayers)
    for candidate in on_folders:
        layers(str(candidate.model)).check(candidate.adapter)


def _sharing_an_engine(candidates: dict[int, Candidate]) -> list[dict[int, Candidate]]:
    """Groups of candidates, by number, that one loaded model answers for; a model to be merged stands alone."""
    groups: dict[tuple[str, Path | None], dict[int, Candidate]] = {}
    for i, candidate in candidates.items():
        key = (str(candidate.model), candidate.adapter if candidate.merge else None)
        groups.setdefault(key, {})[i] = candidate
    return list(groups.values())


def _model_of(group: dict[int, Candidate], dtype: str, stack: ExitStack) -> tuple[str, bool]:
    """The model that a group's engine loads, and whether its adapter is merged into it already."""
    first = next(iter(group.values()))
    if not first.merge:
        return str(first.model), False
    from harness.evaluation.merging import merged

    assert first.adapter is not None
    return str(stack.enter_context(merged(first.model, first.adapter, dtype))), True


def _load(names: Sequence[str], include_path: Path | None, data_dir: Path | None) -> Any:
    loaded = load_tasks(names, include_path, data_dir)
    _prepare(loaded)
    return loaded


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
) -> dict[str, Known]:
    from lm_eval.evaluator import evaluate as lm_evaluate

    began = time.perf_counter()
    # All tasks in one call: requests of a kind reach the engine together. Standard errors are computed below, exactly.
    found = lm_evaluate(engine, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    seconds = time.perf_counter() - began
    items = sum(count["effective"] for count in found["n-samples"].values())
    scored = {name: task_score(name, loaded, found) for name in tasks}
    scores = {name: score for name, (score, _) in scored.items()}
    line = ", ".join(f"{name} {score.value:.3f}" for name, score in scores.items())
    say(f"eval: {candidate.name}: {line} ({items / seconds:.0f} items/s)")
    answers = {name: answers_of(samples) for name, samples in found["samples"].items()}
    members = {name: [name] if name in loaded["tasks"] else _members(loaded, name) for name in tasks}
    own = {name: some for name, (_, some) in scored.items()}
    evaluated = CandidateScores(candidate.name, candidate.step, scores, seconds, items / seconds, answers, own)
    return apart(evaluated, members)


def _members(loaded: Any, group: str) -> list[str]:
    return [task.task_name for task in loaded["groups"][group].get_all_tasks()]
