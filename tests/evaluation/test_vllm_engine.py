"""vLLM against the reference engine, on a trained base, adapters, and a merged model. No network, nothing reloaded."""

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.evaluation.candidates import Candidate, servable
from harness.evaluation.engines import evaluate
from harness.evaluation.scores import CandidateScores
from harness.tiny import TinyWorld
from tests.evaluation.conftest import LocalTasks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GENERATED = ["tiny_facts_seen", "tiny_facts_heldout", "tiny_reverse"]
MODELS = ("weak", "strong", "base", "merged")
# Random adapters leave many near ties, which the two engines' rounding in bfloat16 may break either way.
EQUAL_ANSWERS = {"float32": 0.99, "bfloat16": 0.95}


@dataclass(frozen=True)
class Both:
    """What the two engines found for the same candidates."""

    vllm: dict[str, CandidateScores]
    hf: dict[str, CandidateScores]
    equal: float  # least share of equal answers


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """Connections that leave the machine fail."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a connection to {address} was tried")
        connect(self, address)

    socket.socket.connect = local_only  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def candidates(
    tiny_world: TinyWorld,
    make_adapter: Callable[..., Path],
    merge: Callable[[Path, Path, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Candidate]:
    """Adapters with ranks that differ by layer before and around their base, and one of them merged."""
    weak, strong = (make_adapter(tiny_world.model, seed=seed, size=size) for seed, size in ((1, 0.02), (2, 0.05)))
    merged = merge(tiny_world.model, strong, tmp_path_factory.mktemp("merged") / "model")
    return [
        Candidate("weak", 1, tiny_world.model, weak),
        Candidate("merged", None, merged),
        Candidate("base", None, tiny_world.model),
        Candidate("strong", 2, tiny_world.model, strong),
    ]


@pytest.fixture(scope="module", params=EQUAL_ANSWERS)
def both(request: pytest.FixtureRequest, candidates: list[Candidate], tiny_world: TinyWorld, offline: None) -> Both:
    found = {
        backend: {
            scores.name: scores
            for scores in evaluate(
                candidates, GENERATED, backend=backend, dtype=request.param, data_dir=tiny_world.data_dir
            )
        }
        for backend in ("vllm", "hf")
    }
    assert list(found["vllm"]) == [candidate.name for candidate in candidates]
    return Both(**found, equal=EQUAL_ANSWERS[request.param])


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_at_most_one_item_apart(both: Both, name: str) -> None:
    for task in GENERATED:
        ours, reference = both.vllm[name].scores[task], both.hf[name].scores[task]
        assert (ours.metric, ours.items) == (reference.metric, reference.items)
        assert abs(ours.value - reference.value) * ours.items <= 1 + 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_equal(both: Both, name: str) -> None:
    pairs = [
        pair
        for task in GENERATED
        for pair in zip(both.vllm[name].answers[task], both.hf[name].answers[task], strict=True)
    ]
    assert sum(ours == reference for ours, reference in pairs) >= both.equal * len(pairs)


def test_the_models_differ(both: Both) -> None:
    """Otherwise the comparisons above would hold for an engine that ignored adapters."""

    def answers(name: str) -> list[str]:
        return [answer for task in GENERATED for answer in both.vllm[name].answers[task]]

    assert both.vllm["base"].scores["tiny_facts_seen"].value > 0.8
    assert answers("weak") != answers("base")
    unlike = sum(a != b for a, b in zip(answers("strong"), answers("base"), strict=True))
    assert unlike > 0.1 * len(answers("base"))
    alike = sum(a == b for a, b in zip(answers("strong"), answers("merged"), strict=True))
    assert alike >= 0.95 * len(answers("base"))  # bfloat16 rounds a merged weight, and not the two factors


def test_texts_are_scored_alike(
    tiny_world: TinyWorld, make_adapter: Callable[..., Path], local_tasks: LocalTasks, offline: None
) -> None:
    base = tiny_world.model
    candidates = [
        Candidate("adapter", 1, base, make_adapter(base, seed=3, size=0.05)),
        Candidate("base", None, base),
    ]
    vllm, hf = (
        evaluate(
            candidates,
            ["words_choice", "words_perplexity"],
            backend=backend,
            dtype="float32",
            data_dir=local_tasks.data_dir,
            include_path=local_tasks.include_path,
        )
        for backend in ("vllm", "hf")
    )
    for ours, reference in zip(vllm, hf, strict=True):
        assert ours.scores["words_choice"].value == reference.scores["words_choice"].value
        perplexities = [found.scores["words_perplexity"].value for found in (ours, reference)]
        assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert vllm[0].scores["words_perplexity"].value != pytest.approx(vllm[1].scores["words_perplexity"].value, rel=1e-3)


def test_the_process_is_left_as_it_was(tiny_world: TinyWorld, local_tasks: LocalTasks) -> None:
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    evaluate(
        [Candidate("base", None, tiny_world.model)],
        ["words_choice"],
        backend="vllm",
        dtype="float32",
        data_dir=local_tasks.data_dir,
        include_path=local_tasks.include_path,
        limit=2,
    )
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()


def test_an_adapter_that_vllm_cannot_serve_is_evaluated_merged(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 600}, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    candidate = Candidate("final", 1, "base", adapter=tmp_path, merged=tmp_path / "merged")
    assert servable(candidate, "vllm") == Candidate("final", 1, tmp_path / "merged", None, tmp_path / "merged")
    assert servable(candidate, "hf") is candidate
    assert servable(Candidate("final", 1, "base", adapter=tmp_path), "vllm").merge
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {}, "use_dora": True}))
    with pytest.raises(UserError, match="it has use_dora"):
        servable(Candidate("final", 1, "base", adapter=tmp_path), "vllm")


def test_allowed_ranks() -> None:
    from harness.evaluation.vllm_engine import allowed_lora_rank

    assert [allowed_lora_rank(rank) for rank in (1, 2, 8, 9, 32, 33, 256, 257, 512)] == [
        1,
        8,
        8,
        16,
        32,
        64,
        256,
        320,
        512,
    ]
    with pytest.raises(UserError, match="adapters up to rank 512, this one has rank 513"):
        allowed_lora_rank(513)
