"""From text to token ids, with the loss on the response alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.console import progress
from harness.data.sources import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Row:
    """One tokenised example: ``input_ids`` and ``labels`` of the same length (`IGNORED` where there is no loss)."""

    input_ids: list[int]
    labels: list[int]


def tokenise(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int, description: str = "tokenise"
) -> list[Row]:
    """Tokenise with the tokenizer's own special tokens, cut at ``max_length`` tokens.

    With a response the text is prompt + response + end-of-sequence and the loss is on every token that starts
    inside the response, and on the end-of-sequence token. Without one the loss is on every token.

    Prompt and response are tokenised together, so that the boundary is where the tokenizer puts it in running
    text; a token that straddles it belongs to the prompt.
    """
    rows = []
    for example in progress(examples, description):
        text = example.prompt + (example.response or "")
        encoded = tokenizer(text, return_offsets_mapping=example.response is not None)
        ids = list(encoded["input_ids"])
        if example.response is None:
            labels = list(ids)
        else:
            if ids and ids[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text by itself
                ids, offsets = ids[:-1], encoded["offset_mapping"][:-1]
            else:
                offsets = encoded["offset_mapping"]
            boundary = len(example.prompt)
            # Special tokens have the span (0, 0), which never ends inside the response. A token of white space alone
            # can have an empty span too, at its end, where a tokenizer trims spans (as Llama 3's does).
            labels = [i if start >= boundary < end else IGNORED for i, (start, end) in zip(ids, offsets, strict=True)]
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        rows.append(Row(ids[:max_length], labels[:max_length]))
    return rows
