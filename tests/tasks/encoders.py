"""Small random encoders, configurations of runs over them, and their statistics the plain way."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from harness.config import RunConfig, resolve
from harness.data.tokenisation import Row
from harness.run_directory import RunDirectory
from harness.tasks.encoder_base import EncoderTask
from harness.tasks.head import with_head
from harness.tasks.registry import load_task
from harness.tiny.encoders import EncoderOptions, initial_model, train_tokenizer

FAMILIES = ("roberta", "bert", "deberta")
OPTIONS = EncoderOptions(vocabulary=400, hidden=32, layers=2, heads=4, mlp=48, positions=64, spread=0.2)
WORDS = ["amber", "bridge", "candle", "dove", "ember", "fern", "glove", "hammer", "inkpot", "jar", "kettle", "lamp"]


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Sentences of a few words, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist()) + "."
        for length in lengths
    ]


def save_encoder(folder: Path, family: str, options: EncoderOptions = OPTIONS) -> Path:
    """A random masked language model with its tokenizer; BERT has segments, DeBERTa relative positions."""
    tokenizer = train_tokenizer("roberta" if family == "roberta" else "deberta", sentences(200, 9), options)
    if family == "bert":
        tokenizer.bos_token = tokenizer.eos_token = None  # as BERT's own has none
        torch.manual_seed(0)
        model: PreTrainedModel = BertForMaskedLM(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=options.hidden,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                intermediate_size=options.mlp,
                max_position_embeddings=options.positions,
                pad_token_id=tokenizer.pad_token_id,
                initializer_range=options.spread,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    else:
        model = initial_model(family, tokenizer, options)  # type: ignore[arg-type]
    with torch.no_grad():  # words that there are rather than any others, so that some masked tokens are found
        model.get_output_embeddings().bias[tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]] += 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """JSON lines; the file's path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def columns(task: str) -> dict[str, str]:
    """The columns of `rows_of`."""
    return {
        "sequence_classification": {"prompt": "a", "pair": "b", "response": "label"},
        "regression": {"prompt": "a", "response": "number"},
        "question_answering": {"prompt": "a", "pair": "b", "response": "answers"},
        "masked_lm": {"prompt": "a"},
    }[task]


def rows_of(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a task with random answers; every fourth question has none."""
    first, second = sentences(count, seed), sentences(count, seed + 1, 20)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        words = b[:-1].split()
        word = words[int(torch.randint(len(words), (1,), generator=generator))]
        answers: dict[str, list[Any]] = {"text": [word], "answer_start": [b.index(word)]}
        if number % 4 == 3:
            answers = {"text": [], "answer_start": []}
        value = float(torch.rand(1, generator=generator))
        label = ("low", "middle", "high")[int(value * 3)]
        rows.append({"a": a, "b": b, "label": label, "number": round(5 * value, 2), "answers": answers})
    return rows


def run_config(folder: Path, base: Path, task: str, **blocks: Any) -> RunConfig:
    """A run of ``task`` over ``base`` in ``folder``; ``blocks`` are laid over it."""
    content: dict[str, Any] = {
        "name": "run",
        "task": task,
        "model": {"path": str(base), "dtype": "float32"},
        "data": {
            "train": {"path": write_rows(folder / "train.jsonl", rows_of(task, 24)), **columns(task), "samples": 16},
            "validation": {"path": write_rows(folder / "validation.jsonl", rows_of(task, 12, 5)), **columns(task)},
            "preserve": {"path": write_rows(folder / "preserve.jsonl", rows_of("masked_lm", 12, 7)), "prompt": "a"},
            "max_length": 32,
        },
        "method": {"name": "lora", "rank": 4},
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1.0e-2, "save_steps": 2, "log_steps": 1},
        "output_dir": str(folder / "runs"),
    }
    for block, values in blocks.items():
        if block != "method" and isinstance(values, dict) and isinstance(content.get(block), dict):
            content[block] |= values
        else:
            content[block] = values
    return resolve(content)


def headed(config: RunConfig) -> tuple[RunConfig, EncoderTask]:
    """The configuration and the task of a run with the head on its base."""
    task, run = load_task(config), RunDirectory(config.run_directory)
    run.path.mkdir(parents=True, exist_ok=True)
    if task.has_head:
        config = with_head(task, run)
    found = load_task(config)
    assert isinstance(found, EncoderTask)
    return config, found


def row_inputs(row: Row) -> dict[str, torch.Tensor]:
    """An unpadded batch of one."""
    return {name: torch.tensor([ids]) for name, ids in {"input_ids": row.input_ids, **row.columns}.items()}


def direct_loss(task: str, outputs: Any, row: Row) -> torch.Tensor:
    """−log p of a row's answer, from the model's outputs."""
    if task == "sequence_classification":
        return -outputs.logits[0].log_softmax(-1)[row.answer]
    if task == "regression":
        return (outputs.logits[0, 0] - row.answer) ** 2
    if task == "question_answering":
        begin, end = row.answer
        return -outputs.start_logits[0].log_softmax(-1)[begin] - outputs.end_logits[0].log_softmax(-1)[end]
    chosen = [(place, label) for place, label in enumerate(row.labels) if label >= 0]
    return sum(-outputs.logits[0, place].log_softmax(-1)[label] for place, label in chosen)


def items_of(task: str, row: Row) -> int:
    """What a row adds to the number that weight gradients are divided by."""
    return {"question_answering": 2, "masked_lm": sum(label >= 0 for label in row.labels)}.get(task, 1)


def direct_statistics(
    task: str, model: PreTrainedModel, modules: dict[str, nn.Linear], rows: list[Row]
) -> dict[tuple[str, str], torch.Tensor]:
    """All three kinds of every layer for itself, in float64, row by row without padding.

    A layer's tokens are told from what else it reads by where they come from: the hidden states that the blocks hand
    on. ``model`` is of float64.
    """
    sums: dict[tuple[str, str], torch.Tensor] = {}
    tokens = items = 0
    for row in rows:
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}

        def keep(calls: list[tuple[torch.Tensor, torch.Tensor]], given: torch.Tensor, output: torch.Tensor) -> None:
            if given.requires_grad:  # the embeddings of relative positions do not depend on the tokens
                calls.append((given, output))

        handles = [
            module.register_forward_hook(lambda _, given, output, calls=seen[name]: keep(calls, given[0], output))
            for name, module in modules.items()
        ]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        handles.append(model.get_input_embeddings().register_forward_hook(lambda _, i, output: output.requires_grad_()))
        loss = direct_loss(task, model(**row_inputs(row)), row)
        for handle in handles:
            handle.remove()
        assert all(len(calls) == 1 for calls in seen.values())
        gradients = torch.autograd.grad(loss, [calls[0][1] for calls in seen.values()])
        for (name, [(given, _)]), gradient in zip(seen.items(), gradients, strict=True):
            x, g = given.detach()[0], gradient[0]
            for kind, value in (
                ("input_covariance", x.T @ x),
                ("output_gradient_covariance", g.T @ g),
                ("weight_gradient", g.T @ x),
            ):
                sums[kind, name] = sums.get((kind, name), 0) + value
        tokens += len(row.input_ids)
        items += items_of(task, row)
    return {key: value / (items if key[0] == "weight_gradient" else tokens) for key, value in sums.items()}
