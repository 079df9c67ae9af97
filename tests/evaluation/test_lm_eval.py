"""lm-eval's own ``hf`` model gives the scores that ours gives: on every packaged task and on local tasks of every
kind, for the base and with an adapter."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.errors import UserError
from harness.evaluation.candidates import Candidate
from harness.evaluation.engines import evaluate
from harness.evaluation.suites import read_suites
from harness.evaluation.tasks import load_tasks
from harness.evaluation.tasks import local_tasks as packaged_tasks
from harness.tiny import TinyWorld
from tests.evaluation.conftest import LocalTasks
from tests.gangs import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


# Tasks whose programs run in the sandbox give the same programs to it; those are tested there.
LEFT_OUT = ["humaneval", "mbpp"]
try:
    next(task for task in read_suites()["instruction"].tasks if task.task == "ifeval").needs.check("ifeval")
except UserError:
    LEFT_OUT.append("ifeval")  # a resource of nltk that must be fetched


@dataclass(frozen=True)
class World:
    """A base, an adapter for it, and tasks that both can be asked."""

    model: Path
    adapter: Path
    tasks: tuple[str, ...]
    places: dict[str, Path | None]
    limit: int | None = None


@pytest.fixture(params=["embedded world", "samples"])
def world(
    request: pytest.FixtureRequest, make_adapter: Callable[..., Path], local_tasks: LocalTasks, tmp_path: Path
) -> World:
    """The trained tiny base on its own tasks and on tasks of every kind; random weights on the packaged samples."""
    if request.param == "samples":
        model = request.getfixturevalue("long_base")
        data = REPOSITORY / "eval" / "samples"
        names = tuple(
            name
            for name, task in packaged_tasks().items()
            if "group" not in task.config and not name.startswith("tiny_") and not re.search("|".join(LEFT_OUT), name)
        )
        return World(model, make_adapter(model, seed=2, size=0.1), names, {"data_dir": data}, limit=2)
    tiny: TinyWorld = request.getfixturevalue("tiny_world")
    (tmp_path / "data").mkdir()
    for file in [*tiny.data_dir.iterdir(), *local_tasks.data_dir.iterdir()]:
        (tmp_path / "data" / file.name).symlink_to(file)
    names = ("tiny_facts_seen", "tiny_facts_heldout", "tiny_reverse", *local_tasks.names)
    places = {"data_dir": tmp_path / "data", "include_path": local_tasks.include_path}
    return World(tiny.model, make_adapter(tiny.model, seed=2, size=0.05), names, places)


@pytest.fixture(scope="session")
def long_base(tmp_path_factory: pytest.TempPathFactory, random_base: Path) -> Path:
    """Random weights with room for the longest answers that a packaged task allows."""
    folder = tmp_path_factory.mktemp("long")
    config = AutoConfig.from_pretrained(random_base)
    config.max_position_embeddings = 4096
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return folder


def test_every_local_task(world: World) -> None:
    candidates = [Candidate("base", None, world.model), Candidate("adapter", 1, world.model, world.adapter)]
    ours = evaluate(candidates, world.tasks, backend="hf", dtype="float32", limit=world.limit, **world.places)
    assert ours[0].answers != ours[1].answers
    for found, peft in zip(ours, (None, str(world.adapter)), strict=True):
        model = HFLM(str(world.model), device="cpu", dtype="float32", batch_size=16, peft=peft)
        loaded = load_tasks(world.tasks, **world.places)
        theirs = lm_evaluate(model, loaded, limit=world.limit, bootstrap_iters=0)
        for name, score in found.scores.items():
            key = next(key for key in theirs["results"][name] if key.split(",")[0] == score.metric)
            value = theirs["results"][name][key]
            if "perplexity" in score.metric:
                assert score.value == pytest.approx(value, rel=1e-4), name
            else:
                assert abs(score.value - value) * score.items <= 1 + 1e-9, name
