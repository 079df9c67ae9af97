"""Loading a base model and its tokenizer through transformers, from safetensors, without remote code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from harness.config import ModelConfig, TaskName
from harness.errors import UserError

_AUTO_CLASSES: dict[TaskName, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "image_text": "AutoModelForImageTextToText",
    "sequence_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
    "image_classification": "AutoModelForImageClassification",
}


_ENCODER = "an encoder (RoBERTa, BERT, DeBERTa)"
_SUITABLE: dict[TaskName, str] = {
    "causal_lm": "a language model (Llama, Mistral, Gemma)",
    "image_text": "a LLaVA",
    "image_classification": "a ViT or a ConvNeXt-V2",
}


def auto_class(task: TaskName) -> Any:
    """transformers' class that gives a base the head of ``task``."""
    return getattr(transformers, _AUTO_CLASSES[task])


def described_model(path: str, task: TaskName) -> PretrainedConfig:
    """What the config.json of the model at ``path`` says.

    Raises:
        UserError: it cannot be read, or transformers has no form of such a model for ``task``.
    """
    try:
        described = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if type(described) not in auto_class(task)._model_mapping:
        raise UserError(
            f"model.path: {path} is a {described.model_type}, which has no form for task {task!r} in transformers "
            f"({_AUTO_CLASSES[task]}); give {_SUITABLE.get(task, _ENCODER)}, or set task to what this model is for"
        )
    return described


def load_model(config: ModelConfig, device: torch.device | str | None = None) -> PreTrainedModel:
    """Load the base model in ``config.dtype``, in evaluation mode, on ``device`` (left where it is if None).

    Under an active ZeRO-3 configuration transformers partitions the weights while it loads them.

    Raises:
        UserError: the path is neither a model folder nor a reachable hub id, has no safetensors weights, or is of a
            model that has no form for the task.
    """
    transformers_logging.disable_progress_bar()
    described_model(config.path, config.task)
    try:
        model = auto_class(config.task).from_pretrained(
            config.path, dtype=getattr(torch, config.dtype), trust_remote_code=False, use_safetensors=True
        )
    except OSError as error:
        raise UserError(f"model.path: {config.path!r} cannot be loaded: {' '.join(str(error).split())}") from error
    model.eval()
    return model if device is None else model.to(device)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``path``; where it has no padding token, the end-of-sequence token pads.

    Padding is masked everywhere, so which token pads changes nothing.

    Raises:
        UserError: no tokenizer can be loaded, or it has neither a padding nor an end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: no tokenizer in {path!r}: {' '.join(str(error).split())}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"model.path: the tokenizer of {path!r} has no end-of-sequence token; set one and save it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside the block models are built and loaded whole on every rank, even under an active ZeRO-3 configuration."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
