"""The original model's distributions on given rows, computed once and kept: `reference: cached` of the anchor.

Per row, at the positions that the anchor looks at: the k most probable tokens, their log-probabilities, and the
logarithm of the mass of all others. That is 8·k + 4 bytes a token: 516 at the default k of 64, where the logits
of a vocabulary of 128 000 would be 256 kB in bf16.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from harness.console import progress
from harness.data.collation import collate
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.models.calling import arguments, innermost
from harness.training.distributed import share, world_size
from harness.training.divergence import TopK, top_k

BATCH_ROWS = 8
_REDUCED = 2**24  # numbers that ranks exchange at a time


class OriginalCache:
    """Distributions by row, as `compute_cache` made them.

    Args:
        tensors: ``rows`` (R) numbers, ascending; ``offsets`` (R + 1); and `TopK`'s three of all rows' positions.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        offsets = tensors["offsets"].tolist()
        self._spans = {
            number: (offsets[place], offsets[place + 1]) for place, number in enumerate(tensors["rows"].tolist())
        }
        self._kept = TopK(tensors["indices"], tensors["log_probabilities"], tensors["log_tail"])

    def take(self, numbers: Sequence[int], positions: Sequence[int], device: torch.device) -> TopK:
        """The distributions of rows ``numbers``, one after the other, of which each has that many ``positions``.

        Raises:
            UserError: a row is not there, or has another number of positions.
        """
        spans = [self._spans.get(number, (0, -1)) for number in numbers]
        if any(end - start != count for (start, end), count in zip(spans, positions, strict=True)):
            raise UserError(
                "prepared: what is kept of the original model is about other rows; redo it with --force prepare"
            )

        def of(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor[start:end] for start, end in spans]).to(device)

        return TopK(of(self._kept.indices), of(self._kept.log_probabilities), of(self._kept.log_tail))


@torch.no_grad()
def compute_cache(
    model: nn.Module,
    rows: Mapping[int, Row],
    positions: Mapping[int, Sequence[int]],
    k: int,
    temperature: float,
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """Compute what `OriginalCache` reads, on all ranks; every rank gets all of it, on the CPU. Collective.

    Batches are made from the rows alone, so their number of ranks changes nothing, not even the rounding.

    Args:
        model: computes what the original model computes; whole on every rank, in evaluation mode.
        rows: by number.
        positions: of each row, the positions whose next-token distributions are kept, ascending.
    """
    numbers = sorted(rows)
    counts = [len(positions[number]) for number in numbers]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    place = {number: start for number, start in zip(numbers, offsets.tolist(), strict=False)}
    device = next(model.parameters()).device
    by_length = sorted(numbers, key=lambda number: (len(rows[number].input_ids), number))
    batches = [by_length[start : start + BATCH_ROWS] for start in range(0, len(by_length), BATCH_ROWS)]
    vocabulary = innermost(model).get_output_embeddings().weight.shape[0]
    k = min(k, vocabulary)
    kept = TopK(torch.zeros(sum(counts), k, dtype=torch.int32), torch.zeros(sum(counts), k), torch.zeros(sum(counts)))
    for batch in progress(share(batches), "original model"):
        inputs = collate([rows[number] for number in batch], pad_id)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        logits = model(**arguments(model, inputs)).logits
        places = [line * logits.shape[1] + p for line, number in enumerate(batch) for p in positions[number]]
        found = top_k(logits.view(-1, vocabulary), torch.tensor(places, device=device), k, temperature)
        where = torch.cat([torch.arange(len(positions[number])) + place[number] for number in batch])
        for ours, part in ((kept.indices, found.indices), (kept.log_probabilities, found.log_probabilities)):
            ours[where] = part.cpu()
        kept.log_tail[where] = found.log_tail.cpu()
    for tensor in (kept.indices, kept.log_probabilities, kept.log_tail):
        _sum_over_ranks(tensor, device)
    return {
        "rows": torch.tensor(numbers),
        "offsets": offsets,
        "indices": kept.indices,
        "log_probabilities": kept.log_probabilities,
        "log_tail": kept.log_tail,
    }


def _sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> None:
    """In place. Each number is of one rank and zero on the others, so the sum is exact."""
    if world_size() == 1:
        return
    flat = tensor.view(-1)
    for part in flat.split(_REDUCED):
        exchanged = part.to(device)
        torch.distributed.all_reduce(exchanged)
        part.copy_(exchanged)
