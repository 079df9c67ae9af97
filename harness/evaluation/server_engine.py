"""An engine that runs elsewhere: any OpenAI-compatible server, through its completions API.

Prompts are tokenised here, as for the other engines, and sent as token ids. vLLM's servers also return token ids and
the rank of every prompt token, which makes them equal to vLLM in this process. Others return text, and
log-probabilities of a prompt by ``echo`` where they offer that; tasks that score texts are refused where they do not.

The tokenizer and configuration of the model are read from this machine (a folder or a hub id).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.console import progress, say
from harness.errors import UserError
from harness.evaluation.openai_client import OpenAIClient, Refused
from harness.evaluation.text_model import Prompt, Scored, TextModel

ROWS = 64  # prompts in one request
IN_FLIGHT = 4  # requests at a time, so that the server always has some waiting
MOST_STOPS = 4  # stop strings that the protocol allows; vLLM takes any number. Answers are cut here again.
# What a server may otherwise take from the model's generation_config.json; no task asked for it.
NEUTRAL = {"top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
NEUTRAL_VLLM = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerEngine(TextModel):
    """Generation and scoring by a running server.

    Args:
        model: folder or hub id of the base model; of its name, or of its path, on the server.
        url: the server's address, with or without ``/v1``.
        seed: of sampling.
        rows: prompts in one request.

    Raises:
        UserError: nothing answers, what answers is no such server, or it does not offer the model.
    """

    def __init__(self, model: str | Path, *, url: str, seed: int = 0, rows: int = ROWS) -> None:
        self._client = OpenAIClient(url)
        offered = self._client.models()
        super().__init__(model)
        self._seed = seed
        self._rows = rows
        self._base = self._name_of_base(offered)
        self._name: str = self._base["id"]
        if served := self._base.get("max_model_len"):
            self.max_length = min(self.max_length, int(served))
        self._gives_tokens = self._try_vllm()

    def use_adapter(self, adapter: Path | None) -> None:
        """Ask the adapter's name on the server from now on; a folder that the server does not know is loaded there.

        Raises:
            UserError: the server neither offers nor loads it.
        """
        self._name = self._base["id"] if adapter is None else self._name_of_adapter(adapter)

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        def settings(number: int) -> tuple[str, ...]:
            prompt = prompts[number]
            return (repr(prompt.sampling), repr(prompt.stop), str(prompt.max_tokens), str(prompt.seed))

        order = sorted(range(len(prompts)), key=settings)
        batches = [
            alike[start : start + self._rows]
            for alike in (list(group) for _, group in groupby(order, key=settings))
            for start in range(0, len(alike), self._rows)
        ]
        answers: list[list[int]] = [[]] * len(prompts)
        for batch, choices in self._ask(batches, lambda batch: self._generation([prompts[i] for i in batch])):
            for number, choice in zip(batch, choices, strict=True):
                answers[number] = self._tokens(choice)
        return answers

    def score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        batches = [
            list(range(start, min(start + self._rows, len(requests)))) for start in range(0, len(requests), self._rows)
        ]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch, choices in self._ask(batches, lambda batch: self._scoring([requests[i] for i in batch])):
            for number, choice in zip(batch, choices, strict=True):
                scores[number] = self._score_of(requests[number], choice)
        return scores

    def close(self) -> None:
        """Nothing to free here: the server goes on."""

    # Requests.

    def _generation(self, batch: list[Prompt]) -> dict[str, Any]:
        first = batch[0]
        request: dict[str, Any] = {
            "prompt": [prompt.tokens for prompt in batch],
            "max_tokens": first.max_tokens,
            "temperature": 0.0,
            **NEUTRAL,
        }
        if self._gives_tokens:
            request |= NEUTRAL_VLLM | {
                "stop": list(first.stop),
                "stop_token_ids": self.end_tokens,
                "skip_special_tokens": False,  # stop strings may be special tokens
                "return_token_ids": True,
            }
        elif first.stop:
            request["stop"] = list(first.stop[:MOST_STOPS])
        if first.sampling:
            request |= dict(first.sampling) | {"seed": self._seed if first.seed is None else first.seed}
        return request

    def _scoring(self, batch: list[Scored]) -> dict[str, Any]:
        request: dict[str, Any] = {
            "prompt": [scored.tokens for scored in batch],
            "max_tokens": 1,  # not every server allows 0
            "temperature": 0.0,
        }
        return request | ({"prompt_logprobs": 0} if self._gives_tokens else {"echo": True, "logprobs": 1})

    def _ask(self, batches: list[list[int]], request: Any) -> Any:
        """Yield each batch with the choices of its request, a few requests in flight at a time."""

        def choices(batch: list[int]) -> list[dict[str, Any]]:
            try:
                return self._client.complete(model=self._name, **request(batch))
            except Refused as refusal:
                raise UserError(f"eval.server: {self._client.url} refuses a request: {refusal}") from refusal

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            try:
                yield from zip(batches, progress(pool.map(choices, batches), "server", len(batches)), strict=True)
            finally:
                pool.shutdown(cancel_futures=True)

    # Answers.

    def _tokens(self, choice: dict[str, Any]) -> list[int]:
        given = choice.get("token_ids")
        if given is not None:
            return list(given)
        return list(self.tokenizer(choice["text"], add_special_tokens=False).input_ids)

    def _score_of(self, request: Scored, choice: dict[str, Any]) -> tuple[float, bool]:
        first, last = len(request.tokens) - request.scored, len(request.tokens)
        given = choice.get("prompt_logprobs")
        if given is not None:
            entries = [given[i][str(request.tokens[i])] for i in range(first, last)]
            return sum(entry["logprob"] for entry in entries), all(entry["rank"] == 1 for entry in entries)
        echoed = choice.get("logprobs") or {}
        values = echoed.get("token_logprobs") or []
        if len(values) < last or None in values[first:last]:
            raise UserError(
                f"eval.server: {self._client.url} returns no log-probabilities of prompts (echo with logprobs), which "
                "tasks that score texts need; evaluate those with vllm or hf, or name tasks that generate"
            )
        best = echoed.get("top_logprobs") or [None] * len(values)
        greedy = all(
            top is not None and value >= max(top.values())
            for value, top in zip(values[first:last], best[first:last], strict=True)
        )
        return sum(values[first:last]), greedy

    # Names.

    def _name_of_base(self, offered: list[dict[str, Any]]) -> dict[str, Any]:
        own = [entry for entry in offered if not entry.get("parent")]
        wanted = {self.path, str(Path(self.path).absolute())}
        for entry in own:
            if wanted & {entry["id"], entry.get("root")}:
                return entry
        for entry in own:  # another path may be another model; a name with the same ending is taken to be this one
            if not Path(entry["id"]).is_absolute() and Path(entry["id"]).name == Path(self.path).name:
                return entry
        raise UserError(
            f"eval.server: {self._client.url} does not offer {self.path}; it offers "
            f"{', '.join(str(entry['id']) for entry in offered) or 'nothing'}; serve it under that name "
            "(`vllm serve … --served-model-name`)"
        )

    def _name_of_adapter(self, adapter: Path) -> str:
        def known() -> str | None:
            wanted = {str(adapter), str(adapter.absolute())}
            for entry in self._client.models():
                if wanted & {entry["id"], entry.get("root")}:
                    return str(entry["id"])
            return None

        name = known()
        if name is None and adapter.is_dir():
            name = str(adapter.absolute())
            try:
                self._client.post("load_lora_adapter", lora_name=name, lora_path=name)
                say(f"eval: the server loaded {adapter}")
            except Refused as refusal:
                raise UserError(
                    f"eval.server: {self._client.url} does not offer the adapter {adapter} and does not load it "
                    f"({refusal}); start it with `--enable-lora --lora-modules NAME={adapter}`, or with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                ) from refusal
        if name is None:
            raise UserError(
                f"eval.server: {adapter} is neither a folder here nor a name that {self._client.url} offers; it offers "
                + ", ".join(str(entry["id"]) for entry in self._client.models())
            )
        return name

    def _try_vllm(self) -> bool:
        """Whether the server returns token ids, as vLLM's do; others refuse the question or leave it out."""
        probe = {"prompt": [self.end_tokens[:1] or [0]], "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
        try:
            (choice,) = self._client.complete(model=self._name, **probe)
        except Refused:
            return False
        return choice.get("token_ids") is not None
