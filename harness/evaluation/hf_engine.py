"""The reference engine: transformers and PEFT, batched, on the CPU or one GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from harness.console import progress
from harness.errors import UserError
from harness.evaluation.text_model import Prompt, Scored, TextModel
from harness.evaluation.threads import threads_for

# Logits of a batch that is scored: this many positions times the vocabulary at a time.
SCORED_POSITIONS = 8192


class HFEngine(TextModel):
    """Greedy (or sampled) generation and scoring with ``transformers``; adapters are loaded over one base by PEFT.

    Adapters are kept in the base model's dtype, as vLLM keeps them. Layers that PEFT wrapped are unwrapped again before
    the next adapter.
    """

    def __init__(self, model: str | Path, *, dtype: str, batch_size: int, seed: int = 0) -> None:
        super().__init__(model)
        self._batch_size = batch_size
        self._seed = seed
        self._device_ = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
            )
        except OSError as error:
            raise UserError(f"model.path: {self.path!r} cannot be loaded: {' '.join(str(error).split())}") from error
        self._base: PreTrainedModel = loaded.eval().to(self._device_)
        self._adapted: PeftModel | None = None

    @property
    def device(self) -> torch.device:
        return self._device_

    def use_adapter(self, adapter: Path | None) -> None:
        if self._adapted is not None:
            self._base = self._adapted.unload()
            self._adapted = None
        if adapter is not None:
            self._adapted = PeftModel.from_pretrained(self._base, str(adapter), autocast_adapter_dtype=False).eval()

    def close(self) -> None:
        del self._base, self._adapted
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        answers: list[list[int]] = [[]] * len(prompts)
        batches = list(_batches(prompts, self._batch_size))
        with self._computing():
            torch.manual_seed(self._seed)
            for batch in progress(batches, "generate"):
                for number, tokens in zip(batch, self._generate([prompts[i] for i in batch]), strict=True):
                    answers[number] = tokens
        return answers

    def score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
        batches = list(_scored_batches(requests, order, self._batch_size))
        with self._computing():
            for batch in progress(batches, "score"):
                for number, result in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                    scores[number] = result
        return scores

    @property
    def _model(self) -> PreTrainedModel | PeftModel:
        return self._base if self._adapted is None else self._adapted

    def _generate(self, batch: list[Prompt]) -> list[list[int]]:
        first = batch[0]
        if first.seed is not None:  # a batch draws from one generator, so its first row's seed is that of all
            torch.manual_seed(first.seed)
        inputs = self._padded([prompt.tokens for prompt in batch])
        stopping = _StopStrings(self.tokenizer, first.stop, inputs["input_ids"].shape[1])
        # A configuration of its own: generation_config.json may hold penalties and sampling that no task asked for.
        settings = GenerationConfig(
            max_new_tokens=first.max_tokens,
            do_sample=bool(first.sampling),
            eos_token_id=self.end_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **dict(first.sampling),
        )
        rows = self._model.generate(
            **inputs, generation_config=settings, stopping_criteria=StoppingCriteriaList([stopping])
        )
        new = rows[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = stopping.lengths.tolist()
        return [
            _until_end(tokens[:length] if length else tokens, self.end_tokens)
            for tokens, length in zip(new, lengths, strict=True)
        ]

    def _score(self, batch: list[Scored]) -> list[tuple[float, bool]]:
        inputs = self._padded([request.tokens for request in batch])
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        kept = max(request.scored for request in batch) + 1
        logits_BTV = self._model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=kept).logits
        results = []
        for request, logits_TV in zip(batch, logits_BTV, strict=True):
            # The logits at a position speak about the next token, so the last position is of no use.
            predicted = logits_TV[-request.scored - 1 : -1].float()
            wanted = torch.tensor(request.tokens[-request.scored :], device=predicted.device)
            log_probabilities = predicted.log_softmax(-1).gather(-1, wanted[:, None])
            results.append((float(log_probabilities.sum()), bool((predicted.argmax(-1) == wanted).all())))
        return results

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` [rows, longest row], padded on the left."""
        width = max(len(tokens) for tokens in rows)
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(tokens)) + tokens for tokens in rows]
        mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in rows]
        return {
            "input_ids": torch.tensor(ids, device=self._device_),
            "attention_mask": torch.tensor(mask, device=self._device_),
        }

    @contextmanager
    def _computing(self) -> Iterator[None]:
        before, wanted = torch.get_num_threads(), threads_for(self.path)
        torch.set_num_threads(wanted or before)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)


class _StopStrings(StoppingCriteria):
    """Ends each row by itself as soon as its new text holds a stop string; remembers how long the row was then."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompt_length = prompt_length
        # Every token is at least one byte, so a stop string fits in this many tokens; one more for a split character.
        self._window = max((len(text.encode()) for text in stop), default=0) + 1
        self.lengths = torch.zeros(0, dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        rows, total = input_ids.shape
        new = total - self._prompt_length
        if not len(self.lengths):
            self.lengths = torch.zeros(rows, dtype=torch.long)
        if self._stop:
            open_rows = (self.lengths == 0).nonzero().flatten()
            tails = input_ids[open_rows.to(input_ids.device), -min(new, self._window) :].tolist()
            for row, text in zip(open_rows.tolist(), self._tokenizer.batch_decode(tails), strict=True):
                if any(stop in text for stop in self._stop):
                    self.lengths[row] = new
        return (self.lengths > 0).to(input_ids.device)


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts that can be generated together: the same settings, similar lengths, longest first."""

    def settings(number: int) -> tuple[str, ...]:
        prompt = prompts[number]
        return (repr(prompt.sampling), repr(prompt.stop), str(prompt.max_tokens))

    order = sorted(range(len(prompts)), key=lambda i: (settings(i), -len(prompts[i].tokens)))
    for _, group in groupby(order, key=settings):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _scored_batches(requests: Sequence[Scored], order: list[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of at most ``batch_size`` rows and `SCORED_POSITIONS` positions whose logits are kept."""
    batch: list[int] = []
    for number in order:
        longest = max(requests[i].scored for i in [*batch, number]) + 1
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > SCORED_POSITIONS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _until_end(tokens: list[int], end_tokens: list[int]) -> list[int]:
    """The tokens up to and including the first end token; what follows in a batch is padding."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in end_tokens), tokens)
