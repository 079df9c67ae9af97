"""Tokenisation: where the loss is, where the boundary is, what the model reads."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from harness.data.sources import Example
from harness.data.tokenisation import IGNORED, Row, tokenise


def byte_level(trim_offsets: bool, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that trims the spans it reports, as Llama 3's does, or does not, as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["ab ab    cd\n    cd dcd"] * 5, trainer)
    template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    specials = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single=template, special_tokens=specials),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(random_base)


def one(prompt: str, response: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int = 64) -> Row:
    (row,) = tokenise([Example(prompt, response)], tokenizer, max_length)
    return row


def test_loss_is_on_the_response_and_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = "abcd efgh", " hgfe dcba"
    row = one(prompt, response, tokenizer)
    before, after = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
    assert row.input_ids == [*before, *after, tokenizer.eos_token_id]
    assert row.labels == [*[IGNORED] * len(before), *after, tokenizer.eos_token_id]


@pytest.mark.parametrize("trim", [False, True], ids=["spans whole", "spans trimmed"])
@pytest.mark.parametrize("ends", [False, True], ids=["no end", "closed by the tokenizer"])
def test_special_tokens_and_white_space(trim: bool, ends: bool) -> None:
    """<s> has no loss, </s> stands once; indentation is part of the response, however spans are reported."""
    tokenizer = byte_level(trim, eos=ends)
    row = one("ab", " ab    cd\n    cd", tokenizer)
    tokens = ["<s>", "ab", "Ġab", "ĠĠĠ", "Ġcd", "ĊĠĠĠ", "Ġcd", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == tokens
    assert row.labels == [IGNORED, IGNORED, *row.input_ids[2:]]


def test_boundary_is_where_running_text_puts_it() -> None:
    """ "cd" is one token of the text, though prompt and response divide it: it belongs to the prompt."""
    tokenizer = byte_level(trim_offsets=False)
    row = one("ab c", "d cd", tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["<s>", "ab", "Ġcd", "Ġcd", "</s>"]
    assert row.labels == [IGNORED, IGNORED, IGNORED, *row.input_ids[3:]]


def test_empty_prompt_and_empty_response() -> None:
    tokenizer = byte_level(trim_offsets=True)
    row = one("", "ab", tokenizer)
    assert row.labels == [IGNORED, *row.input_ids[1:]]
    row = one("ab", "", tokenizer)
    assert row.labels == [IGNORED, IGNORED, tokenizer.eos_token_id]


def test_characters_of_several_bytes() -> None:
    """Offsets count characters, tokens are bytes: every byte of the response has a loss, none of the prompt."""
    tokenizer = byte_level(trim_offsets=False, bos=False)
    row = one("é€", "日é", tokenizer)
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]) == "日é</s>"
    assert row.labels.count(IGNORED) == len("é€".encode())


def test_without_a_response_the_loss_is_everywhere(tokenizer: PreTrainedTokenizerBase) -> None:
    row = one("abcd efgh", None, tokenizer)
    assert row.input_ids == tokenizer("abcd efgh")["input_ids"]
    assert row.labels == row.input_ids


@pytest.mark.parametrize("response", [None, " hgfe dcba abcd"])
def test_cut_at_max_length(tokenizer: PreTrainedTokenizerBase, response: str | None) -> None:
    prompt = "abcd efgh bcde fgha"
    whole, cut = one(prompt, response, tokenizer), one(prompt, response, tokenizer, max_length=5)
    assert len(whole.input_ids) > 5
    assert cut == Row(whole.input_ids[:5], whole.labels[:5])
    exact = one(prompt, response, tokenizer, max_length=len(whole.input_ids))
    assert exact == whole


def test_text_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = "  Two  spaces,\ttab, {braces} and é", "\n1 + 1 = 2\n"
    row = one(prompt, response, tokenizer, max_length=512)
    assert tokenizer.decode(row.input_ids[:-1]) == prompt + response
    assert tokenizer.decode([label for label in row.labels[:-1] if label != IGNORED]) == response
