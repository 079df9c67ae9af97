"""The fast engine: vLLM inside this process, with a LoRA adapter per candidate over one base model.

The engine core runs in-process (no worker processes): loading is faster, errors keep their traceback, and on the CPU
the separate worker is not dependable. On the CPU vLLM runs eagerly and gets its KV cache measured out here; on CUDA its
own defaults stand.
"""

import functools
import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import psutil
import torch
from tqdm import tqdm

from harness.console import is_main_process
from harness.errors import UserError
from harness.evaluation.text_model import Prompt, Scored, TextModel
from harness.evaluation.threads import threads_for
from harness.evaluation.verbosity import verbose

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# KV cache on the CPU: room for this many tokens, within a quarter of the memory that is free.
KV_CACHE_TOKENS = 65_536


class VLLMEngine(TextModel):
    """Generation and scoring with vLLM; adapters are switched without reloading the base.

    Args:
        model: model folder or hub id.
        dtype: float32, bfloat16 or float16, for weights, adapters and KV cache.
        largest_rank: the largest rank of any layer of any adapter that will be used; 0 for none.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes; None for vLLM's default.
        tensor_parallel: GPUs that the model is spread over.
        images: of one question, at most; for models that read images.

    Raises:
        UserError: vLLM is not installed, ``largest_rank`` is larger than vLLM allows, or there are too few GPUs.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str,
        largest_rank: int = 0,
        seed: int = 0,
        gpu_memory_utilization: float | None = None,
        tensor_parallel: int = 1,
        images: int = 0,
    ) -> None:
        prepare_environment()
        if tensor_parallel > 1 and (count := torch.cuda.device_count()) < tensor_parallel:
            raise UserError(f"eval.tensor_parallel: {tensor_parallel} given; there are {count} GPUs here")
        super().__init__(model)
        from vllm import LLM

        self._seed = seed
        self._adapters: dict[Path, int] = {}
        self._request: LoRARequest | None = None
        options: dict[str, Any] = {
            "model": self.path,
            "dtype": dtype,
            "seed": seed,
            "load_format": "safetensors",
            "max_model_len": self.max_length,
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
        }
        if tensor_parallel > 1:
            options["tensor_parallel_size"] = tensor_parallel
        if images:
            options["limit_mm_per_prompt"] = {"image": images}
        if largest_rank:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": allowed_lora_rank(largest_rank)}
        if gpu_memory_utilization is not None:
            options["gpu_memory_utilization"] = gpu_memory_utilization
        if not torch.cuda.is_available():
            options["enforce_eager"] = True
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                options["kv_cache_memory_bytes"] = self._kv_cache_bytes(dtype)
        # On the CPU vLLM replaces torch.set_num_threads for the whole process and does not put it back.
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        torch.set_num_threads(threads_for(model) or threads)
        try:
            with nullcontext() if torch.cuda.is_available() else _cpu_lora():
                self._llm = LLM(**options)
        finally:
            torch.set_num_threads = set_num_threads
        self._threads_before = threads

    def use_adapter(self, adapter: Path | None) -> None:
        from vllm.lora.request import LoRARequest

        if adapter is None:
            self._request = None
            return
        number = self._adapters.setdefault(adapter, len(self._adapters) + 1)
        self._request = LoRARequest(f"adapter-{number}", number, str(adapter))

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=prompt.max_tokens,
                stop=list(prompt.stop),
                stop_token_ids=self.end_tokens,
                # Stop strings may be special tokens, so they are looked for in the text that shows them.
                skip_special_tokens=False,
                seed=(self._seed if prompt.seed is None else prompt.seed) if prompt.sampling else None,
                **(dict(prompt.sampling) or {"temperature": 0.0}),
            )
            for prompt in prompts
        ]
        outputs = self._run([prompt.tokens for prompt in prompts], parameters, "generate")
        return [list(output.outputs[0].token_ids) for output in outputs]

    def score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run([request.tokens for request in requests], parameters, "score")
        results = []
        for request, output in zip(requests, outputs, strict=True):
            first = len(request.tokens) - request.scored
            tokens = request.tokens[first:]
            found = [entry[token] for entry, token in zip(output.prompt_logprobs[first:], tokens, strict=True)]
            results.append((sum(entry.logprob for entry in found), all(entry.rank == 1 for entry in found)))
        return results

    def answer(
        self, asked: Sequence[tuple[list[int], list[Any]]], max_tokens: int, ends: Sequence[int] = ()
    ) -> list[str]:
        """Greedy answers to questions about images: token ids, with one token for each image, and the images.

        ``ends``: tokens that end an answer, beside the model's own.
        """
        from vllm import SamplingParams, TokensPrompt

        prompts = [
            TokensPrompt(prompt_token_ids=ids, **({"multi_modal_data": {"image": images}} if images else {}))
            for ids, images in asked
        ]
        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=[*self.end_tokens, *ends])
        outputs = self._llm.generate(prompts, parameters, use_tqdm=self._bar("answer"))
        # Not vLLM's own text, which leaves out a character that is cut at the end.
        found = [output.outputs[0].token_ids for output in outputs]
        return [text.strip() for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.set_num_threads(self._threads_before)

    def _run(self, prompts: list[list[int]], parameters: Any, description: str) -> list[Any]:
        from vllm import TokensPrompt

        return self._llm.generate(
            [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
            parameters,
            lora_request=self._request,
            use_tqdm=self._bar(description),
        )

    def _bar(self, description: str) -> Any:
        hidden = not (sys.stderr.isatty() and is_main_process())
        return False if hidden else functools.partial(tqdm, desc=description, leave=False)

    def _kv_cache_bytes(self, dtype: str) -> int:
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize
        return min(KV_CACHE_TOKENS * per_token, psutil.virtual_memory().available // 4)


def _cpu_lora() -> AbstractContextManager[None]:
    from harness.evaluation.vllm_cpu_lora import segmented_lora

    return segmented_lora()


def prepare_environment() -> None:
    """What vLLM reads from the environment; what the user has set stands."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose() else "ERROR")
    logging.getLogger("vllm").setLevel(level)  # vLLM speaks on import, before it reads its own setting


def allowed_lora_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` of vLLM that holds ``rank``.

    Raises:
        UserError: vLLM is not installed, or has none that large.
    """
    ranks = lora_ranks()
    if rank > ranks[-1]:
        raise UserError(
            f"eval.backend: vllm serves adapters up to rank {ranks[-1]}, this one has rank {rank}; merge it first"
        )
    return next(allowed for allowed in ranks if allowed >= rank)


def lora_ranks() -> tuple[int, ...]:
    """The values of ``max_lora_rank`` that vLLM allows, ascending."""
    prepare_environment()
    try:
        from vllm.config.lora import MaxLoRARanks
    except ImportError as error:
        raise UserError(
            "eval.backend: vllm given, and vLLM is not installed here; install the extra `cpu` or `cuda`, or set "
            "eval.backend to hf"
        ) from error
    return tuple(sorted(get_args(MaxLoRARanks)))
