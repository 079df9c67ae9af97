"""The reference engine against plain transformers, one sequence at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.evaluation.engines import Candidate, evaluate
from harness.evaluation.hf_engine import HFEngine
from harness.evaluation.text_model import Prompt, Scored
from tests.evaluation.conftest import LocalTasks


@pytest.fixture(scope="module")
def engine(random_base: Path) -> Iterator[HFEngine]:
    engine = HFEngine(random_base, dtype="float32", batch_size=7)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(random_base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32).eval()


def greedy(model: torch.nn.Module, tokens: list[int], count: int) -> list[int]:
    """Greedy decoding by hand, without cache, padding or batch."""
    sequence = list(tokens)
    for _ in range(count):
        with torch.inference_mode():
            following = int(model(torch.tensor([sequence])).logits[0, -1].argmax())
        sequence.append(following)
        if following == 1:  # </s>
            break
    return sequence[len(tokens) :]


def log_probability(model: torch.nn.Module, tokens: list[int], scored: int) -> float:
    with torch.inference_mode():
        log_probabilities = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    positions = range(len(tokens) - scored, len(tokens))
    return float(sum(log_probabilities[i - 1, tokens[i]] for i in positions))


def test_batches_answer_as_single_prompts_do(engine: HFEngine, plain: torch.nn.Module, words: list[str]) -> None:
    rows = [engine.tok_encode(text) for text in words[:20]]
    answers = engine.generate([Prompt(tokens, (), 6) for tokens in rows])
    assert answers == [greedy(plain, tokens, 6) for tokens in rows]


def test_a_stop_string_ends_its_own_row_only(engine: HFEngine, words: list[str]) -> None:
    rows = [engine.tok_encode(text) for text in words[:20]]
    free = engine.generate([Prompt(tokens, (), 8) for tokens in rows])
    stopped = engine.generate([Prompt(tokens, ("c",), 8) for tokens in rows])
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == whole[: len(cut)]
        text = engine.tokenizer.decode(cut)
        assert ("c" in text) == (len(cut) < len(whole) or "c" in engine.tokenizer.decode(whole))
        assert "c" not in engine.tokenizer.decode(cut[:-1])


def test_scores_are_sums_of_log_probabilities(engine: HFEngine, plain: torch.nn.Module, words: list[str]) -> None:
    requests = [Scored(engine.tok_encode(text), 1 + i % 4) for i, text in enumerate(words[:20])]
    for request, (found, _) in zip(requests, engine.score(requests), strict=True):
        assert found == pytest.approx(log_probability(plain, request.tokens, request.scored), abs=1e-4)


def test_greedy_continuations_are_recognised(engine: HFEngine, words: list[str]) -> None:
    tokens = engine.tok_encode(words[0])
    answer = engine.generate([Prompt(tokens, (), 4)])[0]
    other = [*answer[:-1], (answer[-1] + 1) % 400]
    found = engine.score([Scored([*tokens, *answer], len(answer)), Scored([*tokens, *other], len(other))])
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_no_second_beginning_token(engine: HFEngine) -> None:
    assert engine.tok_encode("<s>abcd") == [0, *engine.tok_encode("abcd", add_special_tokens=False)]


def test_long_prompts_lose_their_beginning_and_never_all(engine: HFEngine) -> None:
    long = " ".join(["abcd"] * 200)
    options = {"until": ["\n"], "max_gen_toks": 4000, "do_sample": False}
    (prompt,) = engine.prompts([Instance("generate_until", {}, (long, options), 0)])
    assert prompt == Prompt(engine.tok_encode(long)[-64:], ("\n",), 64)


def test_rolling_scores_cover_every_token_once(engine: HFEngine, plain: torch.nn.Module, words: list[str]) -> None:
    short, long = words[0], " ".join(words[:30])
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate((short, long))]
    found = engine.loglikelihood_rolling(requests)
    tokens = engine.tok_encode(short)
    assert found[0] == pytest.approx(log_probability(plain, [0, *tokens], len(tokens)), abs=1e-3)
    # By hand: windows of 127 tokens in all, each new one keeping as much context as fits.
    tokens, width, expected, done = engine.tok_encode(long), engine.max_length - 2, 0.0, 0
    assert len(tokens) > 2 * width
    while done < len(tokens):
        end = min(done + width, len(tokens))
        window = [0, *tokens[:end]][-(width + 1) :]
        expected += log_probability(plain, window, end - done)
        done = end
    assert found[1] == pytest.approx(expected, abs=1e-2)


def test_adapters_come_and_go(
    engine: HFEngine,
    random_base: Path,
    words: list[str],
    make_adapter: Callable[..., Path],
    merge: Callable[[Path, Path, Path], Path],
    tmp_path: Path,
) -> None:
    prompts = [Prompt(engine.tok_encode(text), (), 6) for text in words[:20]]
    before = engine.generate(prompts)
    adapter = make_adapter(random_base, seed=1, size=0.1)
    engine.use_adapter(adapter)
    adapted = engine.generate(prompts)
    engine.use_adapter(None)
    assert engine.generate(prompts) == before != adapted
    merged = AutoModelForCausalLM.from_pretrained(merge(random_base, adapter, tmp_path / "merged"), dtype=torch.float32)
    assert adapted == [greedy(merged, prompt.tokens, 6) for prompt in prompts]


def test_tasks_of_every_kind(random_base: Path, local_tasks: LocalTasks, plain: torch.nn.Module) -> None:
    (found,) = evaluate(
        [Candidate("base", None, random_base)],
        local_tasks.names,
        backend="hf",
        dtype="float32",
        data_dir=local_tasks.data_dir,
        include_path=local_tasks.include_path,
        batch_size=5,
    )
    assert {name: (score.metric, score.items) for name, score in found.scores.items()} == {
        "words_next": ("exact_match", 24),
        "words_choice": ("acc", 24),
        "words_perplexity": ("word_perplexity", 24),
    }
    chosen = found.scores["words_choice"]
    assert chosen.stderr == pytest.approx((chosen.value * (1 - chosen.value) / 23) ** 0.5)
    assert found.scores["words_perplexity"].stderr is None
    assert found.samples_per_second == pytest.approx(72 / found.seconds)
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    rows = [json.loads(line) for line in (local_tasks.data_dir / "words.jsonl").read_text().splitlines()]
    for row, answer in zip(rows, found.answers["words_next"], strict=True):
        by_hand = tokenizer.decode(greedy(plain, tokenizer(row["start"]).input_ids, 12), skip_special_tokens=True)
        assert answer == by_hand.split("\n")[0].split("c")[0]


def test_answers_are_those_of_lm_evals_own_model(random_base: Path, local_tasks: LocalTasks) -> None:
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    from harness.evaluation.tasks import load_tasks

    tasks = list(local_tasks.names)
    places = {"data_dir": local_tasks.data_dir, "include_path": local_tasks.include_path}
    (ours,) = evaluate([Candidate("base", None, random_base)], tasks, backend="hf", dtype="float32", **places)
    model = HFLM(str(random_base), device="cpu", dtype="float32", batch_size=8)
    theirs = lm_evaluate(model, load_tasks(tasks, **places), bootstrap_iters=0)
    generated = [sample["resps"][0][0] for sample in theirs["samples"]["words_next"]]
    assert ours.answers["words_next"] == generated
    for name, score in ours.scores.items():
        assert score.value == pytest.approx(theirs["results"][name][f"{score.metric},none"], rel=1e-4)
