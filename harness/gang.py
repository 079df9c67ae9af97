"""What every rank runs under the DeepSpeed launcher: calibrate → init → prepare → train → export.

`harness run` starts it with ``--module``; `launch/train.py` is the same for people who call ``deepspeed`` themselves.
On a Ray cluster the ranks are actors, which call `run_rank` (`harness.cluster`).
"""

import argparse
import hashlib
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import mendable

if TYPE_CHECKING:
    from harness.config import RunConfig


def main(arguments: list[str] | None = None) -> None:
    """Parse the launcher's and our own arguments, join the ranks, run the stages that are not finished."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/train.py",
        description="Calibrate, initialise, train and export one run on the ranks of the DeepSpeed launcher.",
        epilog="Example: deepspeed --num_accelerators 2 launch/train.py --config run.yaml train.seed=1",
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--stages", default="calibrate,init,prepare,train,export", help="comma-separated")
    parser.add_argument("--force", default=None, help="redo this stage and what depends on it")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", help="key.subkey=value")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        from harness.config import load_config

        run_rank(load_config(options.config, options.overrides), options.stages.split(","), options.force)
    except Exception as error:
        if (line := mendable(error)) is None:
            raise
        print_once(f"error: {line}")
        sys.exit(2)


def run_rank(config: "RunConfig", stages: list[str], force: str | None = None) -> None:
    """What one rank does, whoever started it: join the others, then run the stages that are not finished."""
    from harness.pipeline import run_stages
    from harness.preflight import check
    from harness.training.distributed import join_ranks

    check(config)
    join_ranks()
    run_stages(config, stages, force)


def print_once(line: str) -> None:
    """Print ``line`` on standard error, unless another rank of this node has just done so.

    A mistake may be seen by all ranks or by one (whose batch holds it), and each ends by itself.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        print(line, file=sys.stderr)
        return
    name = hashlib.sha256(f"{os.environ.get('MASTER_PORT')} {line}".encode()).hexdigest()
    mark = Path(tempfile.gettempdir()) / f"palimpsest-{name}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:  # nowhere to leave a mark: better twice than never
        print(line, file=sys.stderr)
        return
    print(line, file=sys.stderr, flush=True)
    time.sleep(1.0)  # long enough for ranks that stopped at the same mistake
    mark.unlink(missing_ok=True)


def quiet_libraries() -> None:
    """Leave the terminal to what a person can use: no notices of libraries about themselves."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("bitsandbytes", "DeepSpeed"):
        logging.getLogger(library).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
