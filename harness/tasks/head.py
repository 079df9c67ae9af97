"""The base model with the head that a task puts on it, made once for a run, so that all stages and ranks have the same.

A base that was pre-trained for something else has no weights for a classifier; transformers draws them at random each
time it loads the model. Here they are drawn once, by the run's seed, and kept with the rest of the weights in ``base/``
of the run directory, which from then on stands for the base. ``head.json`` names the modules that were drawn: they are
trained in full, whatever the method, and saved with the adapter.

Warning:
    ``base/`` is a whole copy of the model. For encoders that is little; a 7B language model with a classifier takes
    13 GB more.
"""

import json
import shutil
from typing import TYPE_CHECKING

import torch
from transformers import AutoProcessor

from harness.config import RunConfig
from harness.console import say
from harness.data.sampling import seed_for
from harness.errors import UserError
from harness.files import publish_directory, read_json, write_json
from harness.models.loading import auto_class, described_model, whole_weights
from harness.run_directory import RunDirectory
from harness.training.distributed import barrier, rank

if TYPE_CHECKING:
    from harness.tasks.base import Task

RECORD = "head.json"


def with_head(task: "Task", run: RunDirectory) -> RunConfig:
    """The configuration with ``model.path`` at the base that has the task's head. Collective.

    Raises:
        UserError: the base cannot be loaded, or is no model that can have the head.
    """
    config = task.config
    wanted = {"base": config.model.path, "task": config.task, "seed": config.train.seed, **task.head_options()}
    wanted = json.loads(json.dumps(wanted))  # as it is read back: keys are text
    if rank() == 0:
        record = run.base / RECORD
        if not record.is_file() or read_json(record)["made_from"] != wanted:
            _write(task, run, wanted)
    barrier()
    model = config.model.with_head(str(run.base), read_json(run.base / RECORD)["modules"])
    return config.model_copy(update={"model": model})


def _write(task: "Task", run: RunDirectory, wanted: dict[str, object]) -> None:
    config = task.config.model
    described_model(config.path, config.task)
    with whole_weights(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("head", task.config.train.seed))
        try:
            model, loading = auto_class(config.task).from_pretrained(
                config.path,
                dtype=getattr(torch, config.dtype),
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **task.head_options(),
            )
        except OSError as error:
            raise UserError(f"model.path: {config.path!r} cannot be loaded: {' '.join(str(error).split())}") from error
        drawn = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
        # Some classes of transformers call the body otherwise than the files do, and would draw all of it.
        if drawn.issuperset(name for name, _ in model.named_parameters()):
            raise UserError(
                f"model.path: {config.path} has none of the weights of a {type(model).__name__}; give another model, "
                f"for task {config.task!r} such as an encoder (RoBERTa, BERT, DeBERTa)"
            )
        drawn = task.finish_head(model, drawn)
    modules = {name.rpartition(".")[0] for name in drawn}
    modules |= {
        name for name, child in model.named_children() if child is not model.base_model and list(child.parameters())
    }
    # A pooler reads one token of a row: it belongs to the head, wherever a model keeps it (BERT: in its body).
    modules |= {name for name, module in model.named_modules() if _is_pooler(name) and list(module.parameters())}
    # Of a module and one inside it the outer one is enough.
    outer = sorted(name for name in modules if not any(name.startswith(f"{other}.") for other in modules))
    staging = run.path / ".base.staging"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    AutoProcessor.from_pretrained(config.path, trust_remote_code=False).save_pretrained(staging)
    write_json(staging / RECORD, {"made_from": wanted, "modules": outer, "drawn": sorted(drawn)})
    publish_directory(staging, run.base)
    if drawn:
        new = [name for name in outer if any(weight.startswith(f"{name}.") for weight in drawn)]
        say(f"model.path: {config.path} has no weights for {', '.join(new)}; drawn by train.seed, trained in full")


def _is_pooler(name: str) -> bool:
    return name.rpartition(".")[2] == "pooler"
