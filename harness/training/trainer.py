"""transformers' Trainer on a DeepSpeed engine, with penalties, projections and safetensors checkpoints.

The loss of a step is the mean over the response tokens of the whole global batch, whatever the number of ranks and
accumulation steps, plus each penalty times its weight. Shares of ranks and passes add up: DeepSpeed averages
gradients over ranks, so every share is multiplied by the number of ranks.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from harness.data.collation import LABELS, Batch, collate, size_of, stack
from harness.data.sampling import seed_for
from harness.errors import UserError
from harness.export.shards import read_file
from harness.files import publish_directory, write_tensors
from harness.methods.base import Method
from harness.models.calling import arguments
from harness.tasks.base import Task
from harness.training import checkpoint as checkpoints
from harness.training.distributed import barrier, rank, world_size
from harness.training.penalties.base import MicroStep, Penalty


class HarnessTrainer(Trainer):
    """Trainer that asks the method and the penalties. ``checkpoint_folder`` gets ``step-N`` folders."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Any,
        *,
        task: Task,
        method: Method,
        penalties: Sequence[Penalty],
        checkpoint_folder: Path,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=rows, data_collator=lambda items: collate(items, task.pad_id)
        )
        # compute_loss normalises over the whole step by itself.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._pad_id, self._objective = task.pad_id, task.objective
        self._method = method
        self._penalties = penalties
        self._checkpoint_folder = checkpoint_folder
        self._pass_of_step = (-1, 0)
        self._terms: dict[str, torch.Tensor] = {}
        self._logged_step = 0

    # -- the loss ------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward pass. Randomness (dropout) depends on seed, step, pass and rank alone."""
        step = self.state.global_step
        number = self._pass_of_step[1] + 1 if self._pass_of_step[0] == step else 0
        self._pass_of_step = (step, number)
        # Reseeding makes the state of random generators something that a checkpoint need not hold.
        torch.manual_seed(seed_for("pass", self.args.seed, step, number, rank()))
        return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """On the device, numbers to be learned as they are: Trainer would round them to the model's dtype."""
        return {**super()._prepare_inputs(inputs), LABELS: inputs[LABELS].to(self.args.device)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """This pass's share of the step's loss, times the number of ranks."""
        ranks = world_size()
        at = MicroStep(
            self.state.global_step,
            self._pass_of_step[1] * ranks + rank(),
            self.args.gradient_accumulation_steps * ranks,
        )
        active = [penalty for penalty in self._penalties if penalty.weight_at(at.step) > 0]
        riding = [penalty.rows(at) for penalty in active]
        batch, counts = inputs, [size_of(inputs)]
        for rows in riding:
            if rows is not None:
                batch = stack(batch, {k: v.to(inputs[LABELS].device) for k, v in rows.items()}, self._pad_id)
            counts.append(0 if rows is None else size_of(rows))
        # Whatever else the penalties run comes first: nothing stands between the differentiated pass and its
        # backward pass, whose order of gathering ZeRO-3 mirrors.
        prepared = [penalty.before(model, at, rows, inputs) for penalty, rows in zip(active, riding, strict=True)]
        outputs = model(**arguments(model, batch))
        logits = self._objective.logits(outputs, batch)
        # Cut once: each slice on its own would have a backward pass over a whole tensor of zeros.
        own_logits, *riding_logits = logits.split(counts)
        task = self._objective.loss(own_logits, batch[LABELS][: counts[0]]) / num_items_in_batch
        total = task * ranks
        self._add_term("loss", task * ranks)
        for penalty, rows, logits, first in zip(active, riding, riding_logits, prepared, strict=True):
            for value in (
                penalty.penalty(model, at, rows, logits if rows is not None else None, first),
                penalty.batch_penalty(model, at, inputs, own_logits, first),
            ):
                if value is not None:
                    total = total + penalty.weight_at(at.step) * value * ranks
                    self._add_term(penalty.metric, value * ranks)
        form = self._method.penalty(model)
        if form is not None:
            share = form / self.args.gradient_accumulation_steps
            total = total + share
            self._add_term("method_penalty", share)
        return total

    def _add_term(self, name: str, value: torch.Tensor) -> None:
        self._terms[name] = self._terms.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace Trainer's total loss by the task loss, and add each penalty and the total."""
        if "loss" in logs and self._terms:
            steps = self.state.global_step - self._logged_step
            total = logs["loss"]
            for name, value in self._terms.items():
                # Summed over ranks, each term is a share times the number of ranks.
                logs[name] = float(self.accelerator.gather(value.reshape(1)).mean()) / steps
            if len(self._terms) > 1:
                logs["total_loss"] = total
            self._terms, self._logged_step = {}, self.state.global_step
            if not all(map(_finite, logs.values())):
                raise UserError(
                    f"train: the loss is NaN or inf at step {self.state.global_step}; lower train.learning_rate, or "
                    "try model.dtype: float32"
                )
        super().log(logs, start_time)

    # -- the optimiser -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the method's parameter groups; DeepSpeed shards its state."""
        if self.optimizer is None:
            groups = self._method.param_groups(model or self.model, self.args.learning_rate, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = self._checkpoint_folder / f"step-{self.state.global_step}"
        staging = self._checkpoint_folder / f".step-{self.state.global_step}.staging"
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        barrier()
        checkpoints.write_trained(staging / "trained", self.deepspeed)
        checkpoints.write_optimizer(staging / "optimizer", self.deepspeed)
        state = self._method.state(self.model)
        if rank() == 0:
            if self._method.trains_all:  # makes ``trained/`` a folder that from_pretrained reads
                self.model.config.save_pretrained(staging / "trained")
            if state:
                write_tensors(staging / checkpoints.METHOD_STATE, state)
            checkpoints.write_schedule(staging / "scheduler.json", self.deepspeed, self.lr_scheduler)
            self.state.save_to_json(str(staging / "trainer_state.json"))
            publish_directory(staging, final)
            for other in self._checkpoint_folder.glob("step-*"):
                if other != final:
                    checkpoints.drop_optimizer(other)
        barrier()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._announce_steps()
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            checkpoints.restore_engine(folder, self.deepspeed)
            checkpoints.restore_schedule(folder / "scheduler.json", self.lr_scheduler, self.optimizer)
            if (folder / checkpoints.METHOD_STATE).is_file():
                self._method.load_state(self.model, dict(read_file(folder / checkpoints.METHOD_STATE)))
            self._logged_step = self.state.global_step
        for penalty in self._penalties:
            penalty.attach(self.model)
        return prepared

    def _announce_steps(self) -> None:
        """Let method and penalties see the gradients of each step: accelerate runs backward pass and step in one."""
        engine = self.deepspeed
        step = engine.step

        def announced(*args: Any, **kwargs: Any) -> Any:
            self._method.before_step(self.model, self.state.global_step + 1)
            for penalty in self._penalties:
                penalty.before_step(self.model, self.state.global_step + 1)
            return step(*args, **kwargs)

        engine.step = announced

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: `training_step` seeds every pass."""


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or value - value == 0.0
