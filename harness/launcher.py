"""Starting the DeepSpeed launcher with the right number of ranks, and making sure that none outlives us."""

import os
import subprocess
import sys
from pathlib import Path

from harness.config import RunConfig
from harness.errors import UserError
from harness.training.distributed import SUPERVISOR, free_port


def rank_count(config: RunConfig) -> int:
    """``train.ranks``, or with ``auto`` one per accelerator (one on a machine without).

    Raises:
        UserError: more ranks than accelerators on a machine that has some.
    """
    import torch

    accelerators = torch.cuda.device_count()
    if config.train.ranks == "auto":
        return max(1, accelerators)
    if 0 < accelerators < config.train.ranks:
        raise UserError(f"train.ranks: {config.train.ranks} given; this machine has {accelerators} accelerators")
    return config.train.ranks


def launch(config: RunConfig, config_file: Path, stages: list[str], force: str | None) -> None:
    """Run ``stages`` under the DeepSpeed launcher on this machine, and wait.

    Raises:
        SystemExit: with code 2, when the ranks stopped at a user's mistake; rank 0 has printed the line.
        RuntimeError: a rank failed otherwise; its traceback is on standard error.
    """
    ranks = rank_count(config)
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"),
        *("--num_accelerators", str(ranks)),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port())),
        *("--module", "harness.gang", "--config", str(config_file), "--stages", ",".join(stages)),
    ]
    if force is not None:
        command += ["--force", force]
    environment = {**os.environ, SUPERVISOR: str(os.getpid())}
    import torch

    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    if code == 2:  # a user's mistake that only a rank could see; rank 0 has said the line
        raise SystemExit(2)
    if code != 0:
        raise RuntimeError(f"the DeepSpeed launcher ended with code {code}; the ranks' own messages are above")
