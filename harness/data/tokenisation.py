"""From text to token ids, with the loss on the response alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from harness.console import progress
from harness.data.sources import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Row:
    """One example as a model reads it.

    Attributes:
        input_ids: none where the model reads no text.
        labels: one for each token (`IGNORED` where there is no loss); none where the whole row has one ``answer``.
        answer: a class, a number, or the first and the last token of a span.
        columns: whatever else the model reads for each token (``token_type_ids``); padded with 0.
    """

    input_ids: list[int]
    labels: list[int]
    answer: int | float | tuple[int, int] | None = None
    columns: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def has_loss(self) -> bool:
        """Whether there is anything to learn from. The first token is predicted by nothing: its label never counts."""
        return self.answer is not None or any(label != IGNORED for label in self.labels[1:])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the model reads besides tokens (``pixel_values``), stacked along the first dimension in a batch."""
        return {}

    def digests(self) -> list[str]:
        """Checksums of what `tensors` are made of: with them, equal rows have equal tokens and equal tensors."""
        return []


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
