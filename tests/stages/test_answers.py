"""The stage `answers`: what the original model is asked, what is kept of it, and that it goes on where it was."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import ModelConfig, RunConfig, resolve
from harness.data.sources import Example
from harness.data.tokenisation import IGNORED, tokenise
from harness.errors import UserError
from harness.models.loading import load_model, load_tokenizer
from harness.run_directory import RunDirectory
from harness.stages import answers as stage
from harness.stages.answers import answered_rows, answers, answers_wanted

Make = Callable[..., tuple[RunConfig, RunDirectory]]


@pytest.fixture
def make(base_config: dict[str, Any]) -> Make:
    """A configuration and its run directory; ``hf`` on the 50 preserve prompts unless it says otherwise."""

    def made(name: str, backend: str = "hf", model: Path | None = None, **data: Any) -> tuple[RunConfig, RunDirectory]:
        content = copy.deepcopy(base_config)
        content |= {"name": name, "method": {"name": "lora"}, "eval": {"backend": backend}}
        content["model"]["path"] = str(model or content["model"]["path"])
        content["data"] |= {"replay": {"ratio": 0.1, "answers": True}, **data}
        config = resolve(content)
        return config, RunDirectory(config.run_directory)

    return made


def lines_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.answers / "answers.jsonl").read_text().splitlines()]


def greedy(model: torch.nn.Module, ids: list[int], count: int, end: int) -> list[int]:
    """The most probable token, one at a time, each from a forward pass over everything before it."""
    found: list[int] = []
    while len(found) < count and (not found or found[-1] != end):
        with torch.no_grad():
            found.append(int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


def test_greedy_answers(make: Make, random_base: Path, words: list[str]) -> None:
    """Token by token those of the model itself, and rows with their labels on the answers alone."""
    config, run = make("greedy", answers={"max_tokens": 5, "temperature": 0.0})
    answers(config, run)
    lines, tokenizer = lines_of(run), load_tokenizer(str(random_base))
    assert [line["prompt"] for line in lines] == words[:50]
    assert sorted(path.name for path in run.answers.iterdir()) == ["answers.jsonl"]
    model = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    for line in lines[:12]:
        ids = tokenizer(line["prompt"])["input_ids"]
        assert line["tokens"] == greedy(model, ids, 5, tokenizer.eos_token_id)
        assert line["answer"] == tokenizer.decode(line["tokens"], skip_special_tokens=True)
    for row, line in zip(answered_rows(config, run, tokenizer), lines, strict=True):
        prompt = tokenizer(line["prompt"])["input_ids"]
        assert row.input_ids == prompt + line["tokens"]
        assert row.labels == [IGNORED] * len(prompt) + line["tokens"]


def test_goes_on_where_it_was(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its third block: blocks that are there are not asked again, and the answers are the same."""
    monkeypatch.setattr(stage, "BLOCK_ROWS", 16)
    whole = make("whole")
    answers(*whole)
    asked: list[int] = []
    answer = stage._answer

    def until_the_third(engine: Any, prompts: list[str], first: int, *rest: Any) -> Any:
        if first == 32 and first not in asked:
            asked.append(first)
            raise KeyboardInterrupt
        asked.append(first)
        return answer(engine, prompts, first, *rest)

    monkeypatch.setattr(stage, "_answer", until_the_third)
    config, run = make("killed")
    with pytest.raises(KeyboardInterrupt):
        answers(config, run)
    assert not (run.answers / "answers.jsonl").exists()
    answers(config, run)
    assert asked == [0, 16, 32, 32, 48]
    assert lines_of(run) == lines_of(whole[1])
    tokens = [tuple(line["tokens"]) for line in lines_of(run)]
    assert len(set(tokens)) > 40  # sampled with a seed of their own


def sampled_share(make: Make, backend: str, tmp_path: Path, base: Path) -> tuple[float, float]:
    """How often the one token sampled lies outside the 50 most probable ones, and how often it should."""
    count, tokenizer = 600, load_tokenizer(str(base))
    (tmp_path / "same.jsonl").write_text('{"q": "abcd abcd"}\n' * count)
    source = {"path": str(tmp_path / "same.jsonl"), "prompt": "q"}
    config, run = make("share", backend, base, preserve=source, answers={"max_tokens": 1, "temperature": 1.5})
    answers(config, run)
    model = load_model(ModelConfig(path=str(base), dtype="float32"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("abcd abcd")["input_ids"]])).logits[0, -1]
    p, order = (logits.double() / 1.5).softmax(-1).sort(descending=True)
    outside = set(order[50:].tolist())
    return sum(line["tokens"][0] in outside for line in lines_of(run)) / count, float(p[50:].sum())


def test_samples_from_the_whole_distribution(make: Make, tmp_path: Path, random_base: Path) -> None:
    found, expected = sampled_share(make, "hf", tmp_path, random_base)
    assert 0.05 < expected < 0.95
    assert abs(found - expected) <= 4 * (expected * (1 - expected) / 600) ** 0.5


def test_other_seeds_and_temperatures_differ(make: Make) -> None:
    first, second = make("first"), make("second", answers={"max_tokens": 64, "temperature": 0.7})
    third = make("third")
    other = third[0].model_copy(update={"train": third[0].train.model_copy(update={"seed": 1})})
    for config, run in (first, second, (other, third[1])):
        answers(config, run)
    assert lines_of(first[1]) != lines_of(second[1])
    assert lines_of(first[1]) != lines_of(third[1])


def test_room(make: Make, random_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompt and answer fit into data.max_length together; a prompt that fills it has no answer."""
    tokenizer = load_tokenizer(str(random_base))
    config, run = make("short", max_length=20, answers={"max_tokens": 6, "temperature": 0.0})
    answers(config, run)
    lengths = [len(tokenizer(line["prompt"])["input_ids"]) for line in lines_of(run)]
    for line, length in zip(lines_of(run), lengths, strict=True):
        assert len(line["tokens"]) <= max(0, min(6, 20 - length))
        assert bool(line["tokens"]) == (length < 20)
    without = sum(length >= 20 for length in lengths)
    assert 0 < without < 50
    capsys.readouterr()
    rows = answered_rows(config, run, tokenizer)
    assert len(rows) == 50 - without
    assert max(len(row.input_ids) for row in rows) <= 20
    assert f"{without} of 50 preserve prompts left no room" in capsys.readouterr().err
    nothing = make("nothing", max_length=1)
    answers(*nothing)
    with pytest.raises(UserError, match=r"^data\.max_length: 1 given; none of the 50 prompts"):
        answered_rows(*nothing, tokenizer)


def test_a_tokenizer_that_closes_texts(random_base: Path) -> None:
    """Its end token would stand between prompt and answer; `tokenise` leaves it out as well."""
    tokenizer = load_tokenizer(str(random_base))
    plain = stage.prompt_tokens("abcd ef", tokenizer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert stage.prompt_tokens("abcd ef", tokenizer) == [0, *plain]
    row = tokenise([Example("abcd ef", " gh")], tokenizer, 64)[0]
    assert row.input_ids[: len(plain) + 1] == [0, *plain]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, False),
        ({"anchor": {"kl": 1.0}}, False),
        ({"anchor": {"kl": 1.0, "tokens": "answer"}}, True),
        ({"anchor": {"kl": 0.0, "tokens": "answer"}}, False),
        ({"anchor": {"kl": 1.0, "tokens": "answer", "data": "train"}}, False),
        ({"penalties": [{"name": "anchor", "tokens": "answer"}]}, True),
        ({"data.replay": {"ratio": 0.1}}, False),
        ({"data.replay": {"ratio": 0.1, "answers": True}}, True),
        ({"data.replay": {"ratio": 0.0, "answers": True}}, False),
    ],
    ids=str,
)
def test_when_it_is_wanted(base_config: dict[str, Any], change: dict[str, Any], wanted: bool) -> None:
    for key, value in change.items():
        block = base_config["data"] if key.startswith("data.") else base_config
        block[key.removeprefix("data.")] = value
    assert answers_wanted(resolve(base_config)) == wanted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm(make: Make, random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers as the reference engine's; sampled ones by their own seeds, whatever block they are in."""
    pytest.importorskip("vllm")
    base = tmp_path / "base"  # the same weights in heads of 32 channels: vLLM on the CPU has none of 16
    shutil.copytree(random_base, base)
    config = json.loads((base / "config.json").read_text())
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    (base / "config.json").write_text(json.dumps(config | heads))
    greedy = {"max_tokens": 8, "temperature": 0.0}
    runs = [make(f"greedy-{backend}", backend, base, answers=greedy) for backend in ("vllm", "hf")]
    runs += [make(name, "vllm", base, answers={"max_tokens": 12}) for name in ("one-block", "blocks")]
    for number, run in enumerate(runs):
        monkeypatch.setattr(stage, "BLOCK_ROWS", 7 if number == 3 else 512)
        answers(*run)
    ours, reference, one_block, blocks = (lines_of(run) for _, run in runs)
    assert sum(a == b for a, b in zip(ours, reference, strict=True)) >= 47  # near ties of a random model
    # Rounding may turn a token that was drawn near a boundary.
    assert sum(a == b for a, b in zip(one_block, blocks, strict=True)) >= 45
    found, expected = sampled_share(make, "vllm", tmp_path, base)
    assert abs(found - expected) <= 4 * (expected * (1 - expected) / 600) ** 0.5
