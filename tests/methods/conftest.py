"""Each method at step 0, made once a module."""

from pathlib import Path
from typing import Any

import pytest

from harness.config import RunConfig
from harness.run_directory import RunDirectory
from tests.methods.runs import METHODS, step_zero


@pytest.fixture(scope="module", params=METHODS)
def started(
    request: pytest.FixtureRequest,
    random_base: Path,
    data_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunConfig, RunDirectory]:
    content: dict[str, Any] = {
        "model": {"path": str(random_base), "dtype": "float32"},
        "data": {
            "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a", "samples": 32},
            "preserve": {"path": str(data_files["preserve"]), "prompt": "q", "samples": 32},
            "max_length": 64,
        },
        "output_dir": str(tmp_path_factory.mktemp("runs")),
    }
    return step_zero(content, METHODS[request.param], "run")
