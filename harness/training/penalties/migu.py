"""MIGU (Du et al., 2024, arXiv 2406.17245): a step changes only what feeds the outputs of the largest magnitude.

For every linear layer the magnitudes |y_i| of its outputs are averaged over the real tokens of the step's batch; the
share t of outputs with the smallest has its rows of the weight's gradient set to zero. (The paper L1-normalises the
magnitudes of a layer, which changes none of the choices within it.) In a LoRA the rows of A go by the outputs of A, and
the rows of B by the outputs of the whole adapted layer, as in the authors' code, or with ``outputs: adapter`` by those
of B itself. The authors' code can also choose among clusters of outputs; that is left out.

Magnitudes are of the whole global batch: passes and ranks are added up, once per step.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from harness.config import Strict
from harness.data.collation import Batch
from harness.errors import UserError
from harness.training.gradients import scale_gradient
from harness.training.penalties.base import MicroStep, Needs, Penalty


class MIGUOptions(Strict):
    """``threshold``: t, the share of outputs left alone at each step. ``outputs``: by whose outputs B is masked."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.7
    outputs: Literal["layer", "adapter"] = "layer"


class MIGU(Penalty):
    """No term in the loss: gradients masked by output magnitude."""

    Options = MIGUOptions
    summary = "gradients masked by output magnitude: a step changes the rows of the largest outputs alone"
    paper = "Du et al., 2024 (arXiv 2406.17245)"

    @classmethod
    def needs(cls, options: MIGUOptions) -> Needs:
        """An adapter."""
        return Needs(adapter=True)

    @property
    def weight(self) -> float:
        """1, or 0 where nothing is masked."""
        return 1.0 if self.options.threshold > 0 else 0.0

    def attach(self, model: nn.Module) -> None:
        """Watch the outputs of every trained A and B.

        Raises:
            UserError: an adapter's A or B is not a linear layer.
        """
        from harness.adapters.lora import TRAINED, lora_layers

        inner = model.module if hasattr(model, "module") else model
        self._weights: dict[str, nn.Parameter] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._seen: set[str] = set()
        self._mask: torch.Tensor | None = None  # of the batch's own rows, while its forward pass runs
        for name, layer in lora_layers(inner).items():
            sides = [getattr(layer, side, {}) for side in ("lora_A", "lora_B")]
            if not all(TRAINED in side and isinstance(side[TRAINED], nn.Linear) for side in sides):
                raise UserError(
                    f"penalties: migu masks rows of A and B that are linear layers, which those of {name} are not; "
                    "remove it, or use a method of LoRA's form (lora, corda)"
                )
            A, B = (side[TRAINED] for side in sides)
            for side, linear, watched in (("A", A, A), ("B", B, B if self.options.outputs == "adapter" else layer)):
                if linear.weight.requires_grad:
                    self._watch(f"{name}.lora_{side}", linear, watched)

    def _watch(self, name: str, linear: nn.Linear, watched: nn.Module) -> None:
        self._weights[name] = linear.weight
        self._sums[name] = torch.zeros(linear.out_features, device=linear.weight.device)
        watched.register_forward_hook(lambda _, inputs, output: self._add(name, output))

    def _add(self, name: str, output: torch.Tensor) -> None:
        # Not in passes of the original model or evaluations, nor when checkpointing computes a pass once more.
        if self._mask is None or not torch.is_grad_enabled() or output.ndim != 3:
            return
        rows, length = self._mask.shape
        own_BLO = output.detach()[:rows, :length]  # rows that penalties add come after the batch's own
        if own_BLO.shape[:2] == self._mask.shape:
            magnitudes = own_BLO.abs().masked_fill_(~self._mask.unsqueeze(-1), 0.0)
            self._sums[name] += magnitudes.sum((0, 1), dtype=torch.float32)
            self._seen.add(name)

    def before(self, model: nn.Module, at: MicroStep, rows: Batch | None, batch: Batch) -> None:
        """The pass that follows is the batch's."""
        self._mask = batch["attention_mask"].bool().to(next(iter(self._sums.values())).device)

    def penalty(
        self, model: nn.Module, at: MicroStep, rows: Batch | None, logits: torch.Tensor | None, prepared: Any
    ) -> None:
        """Nothing; the pass is over."""
        self._mask = None

    def before_step(self, model: nn.Module, step: int) -> None:
        """Mask the gradients, and begin to count anew.

        Raises:
            UserError: a layer does not give one output per token.
        """
        unseen = sorted(self._sums.keys() - self._seen)
        if unseen:
            raise UserError(
                f"penalties: migu found no output per token of {unseen[0]}; list model.target_modules without it"
            )
        self._seen.clear()
        flat = torch.cat(list(self._sums.values()))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
        parts = flat.split([total.numel() for total in self._sums.values()])
        for name, magnitudes in zip(self._sums, parts, strict=True):
            kept = largest(magnitudes, self.options.threshold)
            scale_gradient(self._weights[name], kept.to(magnitudes.dtype).unsqueeze(1))
            self._sums[name].zero_()


def largest(magnitudes: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which entries stay where the share ``threshold`` of the smallest is masked; those equal to the last one stay too.

    So all stay where all are zero, as the outputs of B are at step 0.
    """
    count = len(magnitudes)
    masked = int(threshold * count + 1e-9)  # 0.7 · 10 must not be 6.999…
    return magnitudes >= magnitudes.sort().values[masked]
