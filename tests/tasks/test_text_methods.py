"""What is asked of methods over a language model, asked of them over the language model of a LLaVA: the same tests."""

from pathlib import Path

import pytest

from harness.config import RunConfig
from harness.models.targets import adapted_modules, language_model
from harness.models.weights import empty_model
from harness.run_directory import RunDirectory
from tests.export.test_agreement import test_agree
from tests.methods.runs import METHODS, step_zero
from tests.methods.test_step_zero import (
    test_anchor_after_a_change_equals_a_second_copy_of_the_base,
    test_anchor_is_zero,
    test_only_the_adapter_is_trained,
    test_outputs_equal_the_base,
    test_report,
)
from tests.tasks.llava import configuration

pytestmark = pytest.mark.slow

__all__ = [
    "test_agree",
    "test_anchor_after_a_change_equals_a_second_copy_of_the_base",
    "test_anchor_is_zero",
    "test_only_the_adapter_is_trained",
    "test_outputs_equal_the_base",
    "test_report",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava") / "world"


@pytest.fixture(scope="module", params=METHODS)
def started(
    request: pytest.FixtureRequest,
    made: Path,
    data_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunConfig, RunDirectory]:
    """Each method at step 0 on the language model of a LLaVA, from text."""
    data = {
        "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a", "samples": 32},
        "preserve": {"path": str(data_files["preserve"]), "prompt": "q", "samples": 32},
        "max_length": 128,
    }
    content = configuration(made, tmp_path_factory.mktemp("runs"), data=data)
    config, run = step_zero(content, METHODS[request.param], "run")
    model = empty_model(config.model)
    assert all(name.startswith(f"{language_model(model)}.") for name in adapted_modules(model, config.model))
    return config, run
