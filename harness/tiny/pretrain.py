"""Pre-training of the small Llama that knows the embedded world.

It makes the demo's base model and is not the harness's training loop: one process, plain PyTorch, on the CPU.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from harness.console import progress
from harness.tiny.options import PretrainOptions
from harness.training.distributed import name_accelerator


def pretrain(
    tokenizer: PreTrainedTokenizerFast, epochs: Iterable[list[str]], options: PretrainOptions
) -> LlamaForCausalLM:
    """A Llama in fp32, trained on ``epochs``, each a list of documents."""
    model = _initial_model(tokenizer, options)
    # At 64 tokens the plain formula is faster on a CPU than the fused kernel, which is slow backward in bf16.
    model.set_attn_implementation("eager")
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True)
    falling = options.steps * (1.0 - options.flat)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / options.warmup, 1.0, (options.steps - step) / falling)
    )
    batches = _packed_batches(epochs, tokenizer, options.rows, options.length)
    for _ in progress(range(options.steps), "pre-training the base model"):
        ids = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[dict[str, str]],
    batch_size: int = 128,
) -> float:
    """Share of ``items`` (``prompt``, ``answer``) whose greedy answer is a space, the answer, and then EOS.

    One forward pass instead of generation: greedy decoding gives an answer if and only if the model, fed with
    that answer, ranks every one of its tokens first.
    """
    correct = 0
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        prompts = tokenizer([item["prompt"] for item in batch])["input_ids"]
        whole = tokenizer([f"{item['prompt']} {item['answer']}{tokenizer.eos_token}" for item in batch])["input_ids"]
        longest = max(map(len, whole))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in whole])
        first = model(ids, use_cache=False).logits.argmax(-1).tolist()
        for prompt, row, predicted in zip(prompts, whole, first, strict=True):
            correct += predicted[len(prompt) - 1 : len(row) - 1] == row[len(prompt) :]
    return correct / len(items)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder: safetensors in fp32, tokenizer, greedy generation configuration."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    transformers_logging.disable_progress_bar()  # one file of a few megabytes
    name_accelerator()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _initial_model(tokenizer: PreTrainedTokenizerFast, options: PretrainOptions) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=options.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to change
        torch.manual_seed(options.seed)
        return LlamaForCausalLM(config)


def _packed_batches(
    epochs: Iterable[list[str]], tokenizer: PreTrainedTokenizerFast, rows: int, length: int
) -> Iterator[Tensor]:
    """Token ids of shape (rows, length): documents from BOS to EOS, one after the other, cut anywhere."""
    size, waiting = rows * length, []
    for documents in epochs:
        for ids in tokenizer(documents)["input_ids"]:
            waiting += [*ids, tokenizer.eos_token_id]
        while len(waiting) >= size:
            yield torch.tensor(waiting[:size]).view(rows, length)
            waiting = waiting[size:]
