"""What both engines share: from lm-eval's requests to token ids, and from token ids back to text.

lm-eval asks a model three things: generate until a stop string, the log-likelihood of a continuation, and the
log-likelihood of a whole text. Here they become two questions about token ids, `TextModel.generate` and
`TextModel.score`, which is all that an engine answers. Tokenisation, truncation, stop strings and decoding exist once,
so that two engines can differ only in their arithmetic.

Special tokens are added the tokenizer's way (as lm-eval's HFLM does by default); a text that already begins with the
beginning-of-sequence token gets no second one.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text, resolve_max_length, truncate_tokens
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from harness.console import say
from harness.errors import UserError
from harness.models.loading import load_tokenizer

# Longer contexts than this cost memory for every sequence in flight, and none of the benchmarks in use needs them.
LONGEST_CONTEXT = 8192
DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Prompt:
    """One generation: token ids to continue, until a stop string, an end token or ``max_tokens`` new ones.

    Attributes:
        sampling: options besides greedy decoding (temperature, top_p, …); empty means greedy.
        seed: of this prompt's sampling; None for the engine's.
    """

    tokens: list[int]
    stop: tuple[str, ...]
    max_tokens: int
    sampling: tuple[tuple[str, Any], ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Scored:
    """Token ids of which the last ``scored`` are to be scored given what stands before them."""

    tokens: list[int]
    scored: int


class TextModel(TemplateLM):
    """lm-eval's model interface over token ids; one base model, and at most one adapter in use at a time.

    Attributes:
        tokenizer: of the base model.
        end_tokens: ids that end a generation (tokenizer, model and generation configuration together).
    """

    def __init__(self, model: str | Path) -> None:
        super().__init__()
        self.path = str(model)
        self.config = load_config(self.path)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
        self.end_tokens = _end_tokens(self.path, self.tokenizer, self.config)
        self.max_length = min(resolve_max_length(self.config, self.tokenizer), LONGEST_CONTEXT)

    # What an engine answers.

    @abstractmethod
    def use_adapter(self, adapter: Path | None) -> None:
        """Answer with this PEFT LoRA over the base model from now on; with the base model alone for None."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """New token ids for each prompt, up to and including what ended the generation."""

    @abstractmethod
    def score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        """The log-probability of each request's scored tokens (nats, summed in fp32), and whether all are greedy."""

    @abstractmethod
    def close(self) -> None:
        """Free the model's memory; nothing else may be called afterwards."""

    # What lm-eval asks.

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text that is scored from its beginning."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._encode([string], add_special_tokens)[0]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        prompts = self.prompts(requests)
        answers = self.generate(prompts)
        return [self._text(answer, prompt.stop) for answer, prompt in zip(answers, prompts, strict=True)]

    def prompts(self, requests: Sequence[Instance]) -> list[Prompt]:
        """Token ids and settings of lm-eval's generation requests; a prompt that is too long loses its beginning."""
        contexts, options = zip(*(request.args for request in requests), strict=True)
        encoded = self._encode(list(contexts))
        settings: dict[str, tuple[tuple[str, ...], int, tuple[tuple[str, Any], ...]]] = {}
        prompts, cut = [], 0
        for tokens, given in zip(encoded, options, strict=True):
            key = json.dumps(given, sort_keys=True)
            if key not in settings:
                settings[key] = self._settings(given)
            stop, new_tokens, sampling = settings[key]
            room = self.max_length - new_tokens
            cut += len(tokens) > room
            prompts.append(Prompt(truncate_tokens(tokens, room), stop, new_tokens, sampling))
        _warn_of_truncation(cut, self.max_length)
        return prompts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorable - 1,
                context_len=1,
            ):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self.score([Scored([*context, *text], len(text)) for context, text in windows])
        for owner, (log_probability, _) in zip(owners, scores, strict=True):
            totals[owner] += log_probability
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        cut = sum(len(context) + len(text) > self._scorable for _, context, text in requests)
        _warn_of_truncation(cut, self.max_length)
        return self.score([Scored([*context, *text][-self._scorable :], len(text)) for _, context, text in requests])

    @property
    def _scorable(self) -> int:
        """Longest text that can be scored: vLLM wants room for one generated token."""
        return self.max_length - 1

    def _encode(self, texts: list[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        bos = self.tokenizer.bos_token
        special = [not (bos and text.startswith(bos)) for text in texts]
        if add_special_tokens is not None:
            special = [add_special_tokens] * len(texts)
        encoded: list[list[int]] = [[]] * len(texts)
        for wanted in (True, False):
            chosen = [i for i, add in enumerate(special) if add == wanted and texts[i]]
            if chosen:
                ids = self.tokenizer([texts[i] for i in chosen], add_special_tokens=wanted).input_ids
                for i, tokens in zip(chosen, ids, strict=True):
                    encoded[i] = tokens
        return encoded

    def _settings(self, given: dict[str, Any]) -> tuple[tuple[str, ...], int, tuple[tuple[str, Any], ...]]:
        """Stop strings, number of new tokens and sampling options of a task's ``generation_kwargs``."""
        options = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        stop = tuple(text for text in options.pop("until") if text)
        # A prompt keeps at least half of the context, whatever a task asks for.
        new_tokens = min(options.pop("max_gen_toks"), self.max_length // 2)
        sampled = options.pop("do_sample") and options.get("temperature", 0.0) > 0
        return stop, new_tokens, tuple(sorted(options.items())) if sampled else ()

    def _text(self, tokens: list[int], stop: tuple[str, ...]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, list(stop), None)


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model folder or hub id; a `UserError` where there is none."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise UserError(f"model.path: {path!r} cannot be loaded: {' '.join(str(error).split())}") from error


def _end_tokens(path: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[int]:
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # the file is optional
        generation = GenerationConfig.from_model_config(config)
    given = [tokenizer.eos_token_id, generation.eos_token_id]
    flat = [i for value in given for i in (value if isinstance(value, list) else [value])]
    return sorted({i for i in flat if i is not None})


def _warn_of_truncation(cut: int, max_length: int) -> None:
    if cut:
        say(f"eval: {cut} prompts are cut from the left to fit into {max_length} tokens")
