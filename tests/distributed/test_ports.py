"""The port at which ranks meet."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gangs import SCRIPT

pytestmark = pytest.mark.slow


def test_a_port_in_use_is_one_line(
    base_config: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = subprocess.run(
            [
                *(launcher, "--log_level", "error", "--num_accelerators", "2"),
                *("--master_addr", "127.0.0.1", "--master_port", port),
                *(SCRIPT, "--config", str(write_config(base_config)), "train.ranks=2"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: --master_port: {port} is in use on this machine; give the launcher another one"]
    assert "Traceback" not in done.stderr
