"""The fixture that writes run directories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .runs import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a finished run into a folder of its own."""

    def make(folder: str = "corda-anchor", **options: Any) -> Path:
        return write_run(tmp_path / "runs" / folder, **options)

    return make
