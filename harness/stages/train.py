"""train: the optimiser steps, on a DeepSpeed engine, from the tensors of ``init/`` or from the newest checkpoint."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from harness.adapters.base_parameters import keep_initial, train_in_full
from harness.adapters.lora import add_initial, load_tensors, read_layers, subtract_from_base
from harness.config import RunConfig
from harness.console import say
from harness.data.sampling import sample
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.export.shards import read_file, read_tensors
from harness.files import read_json, sha256
from harness.methods.base import LowRank, Method
from harness.methods.registry import build_method
from harness.models.filling import fill_passes
from harness.models.partitioned_loading import cast_undivided, load_quantised, load_trained
from harness.models.targets import adapted_modules, freeze_vision
from harness.run_directory import RunDirectory
from harness.stages.answers import answered_rows
from harness.stages.initialise import subtracted_blocks
from harness.stages.replay import replay_rows
from harness.tasks.base import Task
from harness.tasks.registry import load_task
from harness.training.callbacks import MetricsWriter, PreserveLoss, Projection, SingleBar
from harness.training.diagnostics import Diagnostics
from harness.training.distributed import barrier, rank, training_device, world_size
from harness.training.penalties.base import Penalty, PenaltySetup
from harness.training.penalties.registry import build_penalty, entry_needs, penalty_entries, prepared_name
from harness.training.schedule import ScheduledRows, total_steps
from harness.training.trainer import HarnessTrainer

PREPARED_INDEX = "index.json"  # in prepared/: the checksum of every file


def train(config: RunConfig, run: RunDirectory) -> None:
    """Train to the last step and leave checkpoints, ``metrics.jsonl`` and TensorBoard events.

    Raises:
        UserError: batch sizes that do not divide, or a loss that is not finite.
    """
    finished = run.finished_checkpoints()
    resume = finished[-1][1] if finished else None
    if resume is not None:
        say(f"train: going on from {resume}")
    trainer = make_trainer(config, run, resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    barrier()


def make_trainer(config: RunConfig, run: RunDirectory, resume: Path | None = None) -> HarnessTrainer:
    """The trainer of a run, its model with the tensors of step 0 or of the checkpoint ``resume``."""
    # The arguments come first: with ZeRO-3 they tell transformers to partition weights while it loads them.
    task = load_task(config)
    rows = scheduled_rows(task, run)
    arguments = training_arguments(config, run, rows.steps)
    method = build_method(config.method, config.train.seed)
    penalties = build_penalties(task, run, rows)
    needs_original = any(entry_needs(entry).original_model for entry in penalty_entries(config))
    method.set_steps(rows.steps)
    model = build_model(config, run, method, resume, needs_original)
    filler = task.filler()
    if filler is not None and (world_size() > 1 or is_deepspeed_zero3_enabled()):
        fill_passes(model, filler, task.pad_id)
    trainer = HarnessTrainer(
        model,
        arguments,
        rows,
        task=task,
        method=method,
        penalties=penalties,
        checkpoint_folder=run.checkpoints,
    )
    add_callbacks(trainer, task, run, method, rows.epochs_per_step)
    return trainer


def training_rows(task: Task) -> list[Row]:
    """The rows of the training set that something can be learned from.

    Raises:
        UserError: no row has a token with a loss.
    """
    config = task.config
    useful, cut = task.useful_rows(config.data.train, "data.train", "tokenise train")
    if not useful:
        raise UserError(
            f"data.max_length: {config.data.max_length} given; no row has a response token within it, raise it"
        )
    if cut:
        say(
            f"warning: data.max_length: {cut} of {cut + len(useful)} rows have no response token within it and are "
            "left out"
        )
    return useful


def scheduled_rows(task: Task, run: RunDirectory) -> ScheduledRows:
    """The rows of the whole run in the order in which steps take them, those that are replayed among them."""
    config = task.config
    rows, replay = training_rows(task), replay_rows(task, run)
    ratio = config.data.replay.ratio if config.data.replay is not None else 0.0
    steps = total_steps(config.train, len(rows), ratio)
    return ScheduledRows(rows, steps, config.train.batch_size, config.train.seed, replay, ratio)


def training_arguments(config: RunConfig, run: RunDirectory, steps: int) -> TrainingArguments:
    """transformers' arguments for this run.

    Raises:
        UserError: ``train.batch_size`` is not a multiple of ranks × ``train.micro_batch_size``.
    """
    options = config.train
    ranks = world_size()
    if options.batch_size % ranks:
        raise UserError(f"train.batch_size: {options.batch_size} given; make it a multiple of the {ranks} ranks")
    micro = options.micro_batch_size or options.batch_size // ranks
    if options.batch_size % (ranks * micro):
        raise UserError(
            f"train.micro_batch_size: {micro} given; {ranks} ranks × {micro} must divide train.batch_size "
            f"({options.batch_size})"
        )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.tensorboard)
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch_size // (ranks * micro),
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_ratio,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        seed=options.seed,
        bf16=config.model.dtype == "bfloat16",
        fp16=config.model.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed_config(Path(options.deepspeed)),
        train_sampling_strategy="sequential",
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        logging_steps=options.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_steps,
        report_to=["tensorboard"],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def deepspeed_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed configuration without optimiser and scheduler blocks: the method and ``train`` say those."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in ("optimizer", "scheduler")}


def preserve_rows(task: Task) -> list[Row]:
    """All rows of the preserve set; none where there is no preserve set."""
    source = task.config.data.preserve
    if source is None:
        return []
    rows = task.rows(task.read(source, "data.preserve"), "tokenise preserve")
    return [row for row in rows if row.input_ids or row.answer is not None]


def build_penalties(task: Task, run: RunDirectory, rows: ScheduledRows) -> list[Penalty]:
    """The anchor, if configured, and the listed penalties, with what they prepared."""
    penalties = []
    for number, entry in enumerate(penalty_entries(task.config)):
        setup = penalty_setup(task, run, entry, rows)
        if entry_needs(entry).preparation:
            setup = replace(setup, prepared=read_prepared(run, number, entry))
        penalties.append(build_penalty(entry, setup))
    return penalties


def penalty_setup(task: Task, run: RunDirectory, entry: dict[str, Any], training: ScheduledRows) -> PenaltySetup:
    """What the penalty of ``entry`` gets to see, but for what it prepared.

    Raises:
        UserError: it needs preserve rows and there are none.
    """
    needs, rows = entry_needs(entry), []
    if needs.answers:
        rows = answered_rows(task.config, run, task.tokenizer)
    elif needs.preserve:
        rows = preserve_rows(task)
    if not rows and (needs.preserve or needs.answers):
        raise UserError(f"data.preserve: missing or empty; {entry['name']} needs preserve prompts")
    return PenaltySetup(rows, task.pad_id, task.config.train.seed, training.steps, training)


def read_prepared(run: RunDirectory, number: int, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What entry ``number`` of the penalties left in ``prepared/``.

    Raises:
        UserError: the file is not what was written.
    """
    file = run.prepared / f"{prepared_name(number, entry)}.safetensors"
    if not file.is_file() or sha256(file) != read_json(run.prepared / PREPARED_INDEX).get(file.name):
        raise UserError(f"prepared: {file} is missing or damaged; redo it with --force prepare")
    return dict(read_file(file))


def build_model(
    config: RunConfig, run: RunDirectory, method: Method, resume: Path | None, needs_original: bool
) -> nn.Module:
    """The model that is trained: base or residual weights, adapters with the tensors of step 0 or of ``resume``."""
    device = training_device()
    if method.trains_all and config.task != "image_text":
        base = config.model if resume is None else config.model.model_copy(update={"path": str(resume / "trained")})
        return method.attach(load_trained(base, device), {})
    if method.trains_base:
        model = load_trained(config.model, device)
        targets = adapted_modules(model, config.model)
        model = method.attach(model, dict.fromkeys(targets, 0))
        freeze_vision(model, config.model)
        train_in_full(model, config.model.trained_modules)
        if needs_original:
            keep_initial(model)
        if resume is not None:
            load_tensors(model, read_tensors(resume / "trained"))
        return model
    initial = read_layers(run.init)
    subtracted = subtracted_blocks(run.init)
    ranks = {name: own[method.pair[0]].shape[0] for name, own in initial.items()}
    if config.model.quantization == "nf4":
        model = method.attach(load_quantised(config.model, subtracted, device), ranks)
    else:
        model = method.attach(load_trained(config.model, device), ranks)
        if subtracted:
            subtract_from_base(model, subtracted)
    if subtracted and needs_original:
        assert isinstance(model, PeftModel)
        # What the frozen base lacks of the original model: the adapter at step 0, or what a method took out for good.
        start = {n: method.update(own, None) for n, own in initial.items()} if method.starts_at_base else subtracted
        add_initial(model, {n: u for n, u in start.items() if isinstance(u, LowRank)}, method.scaling())
    for module in train_in_full(model, config.model.trained_modules):  # last: PEFT freezes what is not an adapter
        if needs_original:
            keep_initial(module)
    if resume is not None:
        load_tensors(model, trained_modules(resume).items())
    layers = initial if resume is None else trained_layers(resume, initial)
    load_tensors(model, ((f"{layer}.{name}", tensor) for layer, own in layers.items() for name, tensor in own.items()))
    if config.model.quantization == "nf4" or config.model.trained_modules:  # divided weights among what is trained
        cast_undivided(model, getattr(torch, config.model.dtype))
    return model


def trained_layers(
    checkpoint: Path, initial: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter's tensors of a checkpoint, by layer and name; one that was not trained is that of step 0."""
    trained = dict(read_tensors(checkpoint / "trained"))
    return {
        layer: {name: trained.get(f"{layer}.{name}", tensor) for name, tensor in own.items()}
        for layer, own in initial.items()
    }


def trained_modules(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint of an adapter method holds besides the adapter: parameters of modules trained in full."""
    return {name: tensor for name, tensor in read_tensors(checkpoint / "trained") if ".lora_" not in name}


def add_callbacks(
    trainer: HarnessTrainer, task: Task, run: RunDirectory, method: Method, epochs_per_step: float
) -> None:
    """Projection after each step, diagnostics, preserve loss, ``metrics.jsonl``, and one progress bar."""
    config = task.config
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Projection(method))
    if rank() == 0:  # first of those that log: it opens the file that the others' lines go to
        trainer.add_callback(MetricsWriter(run.metrics, epochs_per_step))
    if config.train.diagnostics_steps is not None:  # before the bar over the steps: it begins with a bar of its own
        blocks, steps, parts = subtracted_blocks(run.init), config.train.diagnostics_steps, config.train.diagnostics
        trainer.add_callback(Diagnostics(trainer, method, run.init, blocks, steps, parts))
    if rank() == 0:
        trainer.add_callback(SingleBar())
    if config.train.preserve_loss_steps is not None:
        preserve = preserve_rows(task)
        chosen = sample(preserve, config.train.preserve_loss_samples, "preserve loss", config.train.seed)
        trainer.add_callback(PreserveLoss(trainer, chosen, task, config.train.preserve_loss_steps))
