"""Masked-language modelling: what encoders are pre-trained for, and what says how much of that is left."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from harness.config import SourceConfig
from harness.console import progress
from harness.data.collation import LABELS
from harness.data.sampling import seed_for
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.tasks.base import Shown, Task
from harness.tasks.encoder_base import EncoderTask, Texts, columns_of, finite
from harness.tasks.objectives import MaskedToken

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MASKED_SHARE, MASK_PLACED, RANDOM_PLACED = 0.15, 0.8, 0.1  # BERT (Devlin et al., 2019, §3.1)
LOGITS = 2**28  # of a pass of masked-language modelling, at most: 1 GiB
SHOWN_TOKENS = 8  # on each side of a masked token, for people


class Guess(NamedTuple):
    """What stands for a masked token: the most probable one, and −log p of the right one."""

    token: int
    loss: float


@dataclass(frozen=True)
class Gap:
    """One masked token: its row, and where in it."""

    row: Row
    place: int


class MaskedLM(EncoderTask):
    """Tokens that were masked: the task that encoders are pre-trained for."""

    name = "masked_lm"
    summary = "masked tokens of a text"
    objective = MaskedToken()
    metrics = ("masked_lm_accuracy", "masked_lm_loss")

    @cached_property
    def reader(self) -> "PreTrainedTokenizerBase":
        """The tokenizer; it has a token that masks."""
        tokenizer = super().reader
        if tokenizer.mask_token_id is None:
            raise UserError(f"model.path: the tokenizer of {self.config.model.path!r} has no mask token; it needs one")
        return tokenizer

    def labelled(self, source: SourceConfig) -> bool:
        """Text is its own answer."""
        return True

    def row(self, example: Texts) -> Row:
        """Masked by the text and the run's seed, the same in every epoch."""
        return self.masked(example, self.config.train.seed)

    def masked(self, example: Texts, seed: int | str) -> Row:
        """15 % of the tokens, at least one, carry a loss; 8 in 10 of them are masked, 1 in 10 is a random token."""
        tokenizer = self.tokenizer
        encoded = tokenizer(
            example.first,
            example.second,
            truncation=True,
            max_length=self.longest,
            return_special_tokens_mask=True,
        )
        ids = list(encoded["input_ids"])
        ordinary = [place for place, special in enumerate(encoded["special_tokens_mask"]) if not special]
        generator = torch.Generator().manual_seed(seed_for("mask", seed, ids))
        count = max(1, round(MASKED_SHARE * len(ordinary)))
        chosen = torch.randperm(len(ordinary), generator=generator)[:count].tolist()
        fates = torch.rand(len(chosen), generator=generator).tolist()
        others = torch.randint(len(self._vocabulary), (len(chosen),), generator=generator).tolist()
        labels, masked = [IGNORED] * len(ids), list(ids)
        for number, fate, other in zip(chosen, fates, others, strict=True):
            place = ordinary[number]
            labels[place] = ids[place]
            if fate < MASK_PLACED:
                masked[place] = tokenizer.mask_token_id
            elif fate < MASK_PLACED + RANDOM_PLACED:
                masked[place] = self._vocabulary[other]
        return Row(masked, labels, columns=columns_of(encoded))

    @cached_property
    def _vocabulary(self) -> list[int]:
        """All tokens but the special ones."""
        special = set(self.tokenizer.all_special_ids)
        return [token for token in range(len(self.tokenizer)) if token not in special]

    def retention(self) -> Task:
        """This task."""
        return self

    def retention_model(self, model: "nn.Module") -> "nn.Module":
        """The model as it is."""
        return model

    def asked(self, examples: Sequence[Texts]) -> list[Gap]:
        """The masked tokens, chosen by the texts alone: the same for every run."""
        rows = [self.masked(example, "evaluation") for example in progress(examples, "mask")]
        return [Gap(row, place) for row in rows for place, label in enumerate(row.labels) if label != IGNORED]

    def predict(self, model: "nn.Module", examples: Sequence[Gap], batch_size: int) -> list[Guess]:
        """A guess for every masked token."""
        rows = list({id(gap.row): gap.row for gap in examples}.values())
        numbers = {(id(gap.row), gap.place): number for number, gap in enumerate(examples)}
        # Every token has as many logits as there are words.
        fitting = LOGITS // (max((len(row.input_ids) for row in rows), default=1) * len(self.tokenizer))
        found: dict[int, Guess] = {}
        for places, batch, logits in self.outputs(model, rows, max(1, min(batch_size, fitting))):
            counted = self.objective.counted(batch[LABELS])
            outputs_NV = finite(self.objective.compared(logits, counted))
            targets_N = self.objective.targets(batch[LABELS], counted)
            losses = torch.nn.functional.cross_entropy(outputs_NV, targets_N, reduction="none").tolist()
            guesses = zip(outputs_NV.argmax(-1).tolist(), losses, strict=True)
            for (at, place), guess in zip(counted.nonzero().tolist(), guesses, strict=True):
                number = numbers.get((id(rows[places[at]]), place))
                if number is not None:
                    found[number] = Guess(*guess)
        return [found[number] for number in range(len(examples))]

    def score(self, metric: str, predictions: Sequence[Guess], examples: Sequence[Gap]) -> list[float] | float:
        """Token by token: whether it is the right one, or its loss in nats."""
        if metric == "masked_lm_loss":
            return [guess.loss for guess in predictions]
        return [float(guess.token == _target(gap)) for guess, gap in zip(predictions, examples, strict=True)]

    def shown(self, example: Gap, prediction: Guess) -> Shown:
        """The tokens around."""
        ids, place = example.row.input_ids, example.place
        before = self.tokenizer.decode(ids[max(0, place - SHOWN_TOKENS) : place])
        after = self.tokenizer.decode(ids[place + 1 : place + 1 + SHOWN_TOKENS])
        expected, answer = (self.tokenizer.decode([token]).strip() for token in (_target(example), prediction.token))
        return Shown(f"{before} [?] {after}", expected, answer)


def masked_lm(path: str, dtype: str) -> "nn.Module":
    """The base at ``path`` as a masked language model, in evaluation mode, on the CPU.

    Raises:
        UserError: it cannot be loaded, or has no masked-LM head of its own.
    """
    from transformers import AutoModelForMaskedLM

    try:
        model, loading = AutoModelForMaskedLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path!r} is no masked language model: {' '.join(str(error).split())}") from error
    if loading["missing_keys"]:
        raise no_masked_head(path, min(loading["missing_keys"]))
    return model.eval()


def no_masked_head(path: str, weight: str) -> UserError:
    """The error about a base that was not saved with its masked-LM head, or never had one."""
    return UserError(
        f"eval.knowledge: preserve is measured by the base's masked-LM head, and {path} has no weights for {weight}; "
        "give a base saved with it, or name other tasks"
    )


def _target(gap: Gap) -> int:
    return gap.row.labels[gap.place]


def check_masked_head(path: str, stored: Collection[str]) -> None:
    """Raise `UserError` where the base at ``path`` has no masked-LM head among the modules that are ``stored``.

    Reads the configuration alone.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForMaskedLM

    try:
        with init_empty_weights():
            model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except ValueError as error:
        raise UserError(f"eval: preserve needs a masked language model, and {path} is none") from error
    model.tie_weights()
    body = f"{model.base_model_prefix}."
    named = [name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")]
    missing = [name for name in named if not name.startswith(body) and name not in stored]
    if missing:
        raise no_masked_head(path, missing[0])
