"""BitFit (Ben Zaken et al., 2022): biases are trained, every weight stays as it is."""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from harness.config import Strict
from harness.errors import UserError
from harness.methods.base import Method


class BitFitOptions(Strict):
    """``biases``: those of the target layers (``model.target_modules``), or ``all`` that the model has."""

    biases: Literal["target", "all"] = "target"


class BitFit(Method):
    """No adapter: what is trained are the biases that the base has."""

    Options = BitFitOptions
    summary = "BitFit: existing biases are trained, weights are not"
    paper = "Ben Zaken et al., 2022 (arXiv 2106.10199)"
    trains_base = True

    def attach(self, model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """The model itself, the chosen biases trainable.

        Raises:
            UserError: there are none.
        """
        model.requires_grad_(False)
        # A target layer's bias stands beside its weight; normalisation layers have theirs as well.
        biases = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[2] == "bias" and (self.options.biases == "all" or name.rpartition(".")[0] in ranks)
        }
        if not biases:
            has_other = any(name.rpartition(".")[2] == "bias" for name, _ in model.named_parameters())
            where = "target layers have" if has_other else "model has"
            remedy = "set method.biases to all, or " if has_other else ""
            raise UserError(
                f"method.name: bitfit given, but the {where} no biases to train; {remedy}use an adapter method (lora)"
            )
        for parameter in biases.values():
            parameter.requires_grad_(True)
        return model
