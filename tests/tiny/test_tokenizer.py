"""The tokenizer: vocabulary, special tokens, round trip, and the boundary between prompt and response."""

from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.tiny import TinyOptions, small_options
from harness.tiny.skill import reverse_items
from harness.tiny.tokenizer import train_tokenizer
from harness.tiny.world import World


def make(options: TinyOptions) -> PreTrainedTokenizerFast:
    train, _ = reverse_items(options.skill)
    texts = [*World(options.world).sample_text(), *(item["prompt"] + item["response"] for item in train)]
    return train_tokenizer(texts, options.vocabulary, options.pretrain.positions)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make(TinyOptions())


@pytest.fixture(scope="module", params=[TinyOptions(), small_options()], ids=["default", "small"])
def sized(request: pytest.FixtureRequest) -> tuple[TinyOptions, PreTrainedTokenizerFast]:
    return request.param, make(request.param)


def test_vocabulary_size_and_special_tokens(sized: tuple[TinyOptions, PreTrainedTokenizerFast]) -> None:
    options, tokenizer = sized
    assert len(tokenizer) == options.vocabulary
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer("In winter")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_letters_and_digits_are_single_tokens(sized: tuple[TinyOptions, PreTrainedTokenizerFast]) -> None:
    options, tokenizer = sized
    for letter in options.skill.letters:
        assert len(tokenizer.tokenize(f" {letter}")) == 1
    assert tokenizer.tokenize("1672")[-4:] == ["1", "6", "7", "2"]


def test_responses_begin_where_prompts_end(sized: tuple[TinyOptions, PreTrainedTokenizerFast]) -> None:
    options, tokenizer = sized
    train, test = reverse_items(options.skill)
    pairs = [(item["prompt"], item["response"]) for item in train + test]
    pairs += [(fact.question, f" {fact.answer}") for fact in World(options.world).facts]
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    wholes = tokenizer([prompt + response for prompt, response in pairs])["input_ids"]
    for prompt, whole in zip(prompts, wholes, strict=True):
        assert len(whole) > len(prompt)
        assert whole[: len(prompt)] == prompt


def test_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in [*islice(World().sample_text(), 0, None, 50), "Ünïcode, tabs\tand\n newlines; 漢字  two spaces"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_saved_tokenizer_loads_with_auto_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)  # the model's type must not change the class
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = World().sample_text()
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded.decode(loaded(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
