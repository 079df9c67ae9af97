"""A configuration that is trained by two workers and evaluated by one, on nodes that say which they take."""

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cluster.nodes import cluster_of
from tests.evaluation.conftest import LocalTasks, local_tasks  # noqa: F401 — a fixture, found by its name


@pytest.fixture(scope="module")
def one_cluster_at_a_time() -> Iterator[None]:
    """For every module that starts Ray: its processes would find those of another test process on this machine.

    Ray's workers are as important here as the tests that run beside them; by default they step back behind all others.
    """
    with (
        (Path(tempfile.gettempdir()) / "palimpsest-tests-ray.lock").open("w") as file,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setenv("RAY_worker_niceness", "0")
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def three_nodes(one_cluster_at_a_time: None) -> Iterator[Any]:
    """A head and two nodes of one CPU each; the first two train, the third evaluates."""
    with cluster_of([{"training": 1}, {"training": 1}, {"evaluation": 1}]) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def wide_heads(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `random_base`, with heads as wide as vLLM's attention wants them."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-heads")
    AutoTokenizer.from_pretrained(random_base).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(random_base)
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 32
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def cluster_config(
    base_config: dict[str, Any],
    wide_heads: Path,
    local_tasks: LocalTasks,  # noqa: F811
) -> dict[str, Any]:
    """`base_config` for two ranks, with one small evaluation through vLLM."""
    base_config["model"]["path"] = str(wide_heads)
    base_config["train"]["ranks"] = 2
    base_config["init"] = {"cache": False}  # so that runs that are compared do their own work
    base_config["eval"] = {
        "backend": "vllm",
        "knowledge": ["words_next"],
        "limit": 4,
        "include_path": str(local_tasks.include_path),
        "data_dir": str(local_tasks.data_dir),
    }
    base_config["cluster"] = {
        "resources_per_worker": {"training": 1.0},
        "evaluation": {"resources": {"evaluation": 1.0}},
        "wait_minutes": 2,
    }
    return base_config


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration under another name and give its path."""

    def write(content: dict[str, Any], name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, "name": name}))
        return path

    return write
