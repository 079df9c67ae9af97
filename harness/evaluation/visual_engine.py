"""vLLM for questions about images, where this machine can run it: vLLM's LLaVA needs torchvision.

A candidate is served merged, one after the other; transformers answers where vLLM cannot be had, which is said once.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from harness.config import RunConfig
from harness.console import say
from harness.data.images import Picture
from harness.evaluation.candidates import Candidate

AT_ONCE = 256  # questions whose images are open at the same time


@cache
def vllm_answers(backend: str) -> bool:
    """Whether vLLM answers questions about images: it is asked for, and it and torchvision import; says it if not."""
    if backend != "vllm":
        return False
    for module in ("vllm", "torchvision"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a build for other hardware raises what it likes
            reason = " ".join(str(error).split())
            say(f"eval: questions about images are answered by transformers: vLLM cannot run here ({module}: {reason})")
            return False
    return True


@contextmanager
def visual_engine(config: RunConfig, candidate: Candidate, images: int) -> Iterator["VisualEngine"]:
    """The candidate in vLLM; its adapter, where it was not merged at export, is merged for the time of the block.

    Args:
        images: of one question, at most.
    """
    from harness.evaluation.merging import merged

    with merged_folder(config, candidate, merged) as model:
        engine = VisualEngine(config, str(model), images)
        try:
            yield engine
        finally:
            engine.close()


@contextmanager
def merged_folder(config: RunConfig, candidate: Candidate, merged: Any) -> Iterator[Any]:
    """A folder or hub id of the candidate without an adapter."""
    if candidate.merged is not None or candidate.adapter is None:
        yield candidate.merged or candidate.model
        return
    with merged(candidate.model, candidate.adapter, config.model.dtype, config.task) as folder:
        yield folder


class VisualEngine:
    """Answers of one model. `close` it at the end."""

    def __init__(self, config: RunConfig, model: str, images: int) -> None:
        """``images``: of one question, at most."""
        from harness.evaluation.vllm_engine import VLLMEngine

        self._engine = VLLMEngine(
            model,
            dtype=config.model.dtype,
            seed=config.train.seed,
            tensor_parallel=config.eval.tensor_parallel,
            images=images,
        )

    def answer(
        self, asked: Sequence[tuple[list[int], Sequence[Picture]]], max_tokens: int, ends: Sequence[int]
    ) -> list[str]:
        """The greedy answer to each question.

        Args:
            asked: token ids, an image as one token, and the images.
            max_tokens: of an answer.
            ends: tokens that end an answer, beside the model's own.
        """
        answers = []
        for start in range(0, len(asked), AT_ONCE):
            opened = [(ids, [picture.open() for picture in own]) for ids, own in asked[start : start + AT_ONCE]]
            answers += self._engine.answer(opened, max_tokens, ends)
        return answers

    def close(self) -> None:
        """Free the model's memory."""
        self._engine.close()
