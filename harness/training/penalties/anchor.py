"""The anchor: KL divergence from the original model on a few unlabelled preserve prompts per step.

Learning without forgetting (Li & Hoiem, 2017) for language models: the loss gains β · mean over tokens of
KL(p₀(·|x_{≤t}) ‖ p(·|x_{≤t})), where p₀ is the original model and the tokens are all real tokens of the step's
preserve prompts. The original model is never a second copy of the weights: it is the same model with adapters off,
or, where the base became a residual, with the initial adapter in place. The prompts ride in the same forward pass as
the batch; only the original model's pass is extra.

Which prompts a step takes depends on the seed and the step alone, so resuming, the number of ranks and gradient
accumulation change nothing. The prompts of one pass over the preserve set are all different.
"""

import torch
from torch import nn

from harness.config import AnchorConfig
from harness.data.collation import Batch, collate
from harness.data.sampling import seed_for
from harness.data.tokenisation import Row
from harness.training.penalties.base import MicroStep, Penalty


class Anchor(Penalty):
    """β = ``kl``; ``prompts_per_step`` counts all ranks and accumulation steps together."""

    Options = AnchorConfig
    needs_preserve = True
    needs_original_model = True
    metric = "anchor_kl"

    @property
    def weight(self) -> float:
        """β."""
        return self.options.kl

    def step_prompts(self, step: int) -> list[Row]:
        """All preserve rows of one optimiser step, over all ranks."""
        count, size = self.options.prompts_per_step, len(self.setup.preserve)
        chosen = []
        for position in range(step * count, (step + 1) * count):
            lap, index = divmod(position, size)
            chosen.append(self.setup.preserve[self._order(lap)[index]])
        return chosen

    def rows(self, at: MicroStep) -> Batch | None:
        """This pass's share of the step's prompts: every ``parts``-th one; None where none falls to it."""
        mine = self.step_prompts(at.step)[at.part :: at.parts]
        return collate(mine, self.setup.pad_id) if mine else None

    def before(self, model: nn.Module, at: MicroStep, rows: Batch | None) -> torch.Tensor:
        """The original model's logits on ``rows``.

        A pass without prompts runs it on a row of one token: under ZeRO-3 all ranks must make the same passes.
        """
        nothing = Row(self.setup.preserve[0].input_ids[:1], [])
        return original_logits(model, rows or collate([nothing], self.setup.pad_id))

    def penalty(
        self,
        model: nn.Module,
        at: MicroStep,
        rows: Batch | None,
        logits: torch.Tensor | None,
        prepared: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of this pass's token divergences over the number of preserve tokens of the whole step."""
        if rows is None or logits is None:
            return prepared.new_zeros(())
        tokens = sum(len(row.input_ids) for row in self.step_prompts(at.step))
        # Both passes see the same rows; the joint one may be padded further, on the right.
        length = rows["input_ids"].shape[1]
        mask = rows["attention_mask"].bool().to(logits.device)
        return token_divergence(prepared, logits[:, :length])[mask].sum() / tokens

    def _order(self, lap: int) -> list[int]:
        if getattr(self, "_lap", None) != lap:
            generator = torch.Generator().manual_seed(seed_for("anchor", self.setup.seed, lap))
            self._permutation = torch.randperm(len(self.setup.preserve), generator=generator).tolist()
            self._lap = lap
        return self._permutation


@torch.no_grad()
def original_logits(model: nn.Module, rows: Batch) -> torch.Tensor:
    """Logits (rows, length, vocabulary) of the original model, dropout off."""
    from harness.adapters.lora import original_model  # PEFT takes seconds that checking a configuration should not pay

    peft_model = model.module if hasattr(model, "module") else model
    training = model.training
    device = next(peft_model.parameters()).device
    model.eval()
    try:
        with original_model(peft_model):
            return model(
                input_ids=rows["input_ids"].to(device),
                attention_mask=rows["attention_mask"].to(device),
                use_cache=False,
            ).logits
    finally:
        model.train(training)


def token_divergence(original: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
    """KL(softmax(original) ‖ softmax(adapted)) at every position: (rows, length) from (rows, length, vocabulary)."""
    log_p = original.float().log_softmax(-1)
    log_q = adapted.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
