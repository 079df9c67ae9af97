"""Passes of a vision-language model that are alike on all ranks, whether a batch has an image or not.

Ranks that divide weights (ZeRO-3) gather each layer together, and ranks that average gradients (ZeRO-1, 2) exchange
them in one order: all must run the same layers in every pass. A rank whose rows have no image would leave out vision
tower and projector, and the others would wait for it for ever. Here such a pass gets one row more, which has an image
and no label; what the model says about that row is cut off before anybody sees it. Losses and gradients stay what they
are.
"""

from typing import Any

import torch
from torch import nn

from harness.data.collation import Batch, collate
from harness.data.tokenisation import Row
from harness.models.calling import innermost

PIXELS = "pixel_values"


def fill_passes(model: nn.Module, filler: Row, pad_id: int) -> None:
    """From now on every pass of ``model``, with adapters or without, reads an image: ``filler`` where none is given."""
    passes = _Passes(collate([filler], pad_id), pad_id)
    own = innermost(model)
    own.register_forward_pre_hook(passes.before, with_kwargs=True)
    own.register_forward_hook(passes.after, with_kwargs=True)


class _Passes:
    def __init__(self, filler: Batch, pad_id: int) -> None:
        """``filler``: a batch of one row."""
        self._filler, self._pad_id = filler, pad_id
        self._cut: tuple[int, int] | None = None  # rows and length of the pass that was filled

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.get("input_ids")
        self._cut = None
        if ids is None or kwargs.get(PIXELS) is not None:
            return args, kwargs
        self._cut = (ids.shape[0], ids.shape[1])
        return args, kwargs | self._with_filler(kwargs, ids)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._cut is None:
            return output
        rows, length = self._cut
        logits = output.logits[:rows]
        # Where only some columns were asked for, there is no padding of ours among them.
        output.logits = logits if _chooses_columns(kwargs) else logits[:, :length]
        return output

    def _with_filler(self, kwargs: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
        added = {name: tensor.to(ids.device) for name, tensor in self._filler.items() if name != "labels"}
        length = max(ids.shape[1], added["input_ids"].shape[1])

        def padded(tensor: torch.Tensor, value: int) -> torch.Tensor:
            return nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)

        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        joined = {
            "input_ids": torch.cat([padded(ids, self._pad_id), padded(added.pop("input_ids"), self._pad_id)]),
            "attention_mask": torch.cat([padded(mask, 0), padded(added.pop("attention_mask"), 0).to(mask.dtype)]),
        }
        return added | joined


def _chooses_columns(kwargs: dict[str, Any]) -> bool:
    kept = kwargs.get("logits_to_keep")
    return isinstance(kept, torch.Tensor) or bool(kept)
