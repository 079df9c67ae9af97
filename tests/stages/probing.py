"""A random base of eight blocks, runs of FARSS on it, and gangs that probe."""

import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaForCausalLM

from harness.config import RunConfig, load_config, resolve
from harness.models.loading import load_tokenizer
from harness.run_directory import RunDirectory
from harness.stages.calibrate import calibrate
from harness.stages.initialise import initialise
from harness.training.distributed import free_port

METHOD: dict[str, Any] = {
    "name": "farss",
    "rank": 8,
    "r_avg": 3,
    "r_max": 6,
    "shallow_layers": "auto",
    "probe_steps": 4,
    "probe_rows": 12,
}


def eight_blocks(random_base: Path, folder: Path) -> Path:
    """``random_base`` with eight blocks of its own random weights, in ``folder``."""
    config = AutoConfig.from_pretrained(random_base)
    config.num_hidden_layers, config.intermediate_size = 8, 64
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(str(random_base)).save_pretrained(folder)
    return folder


def run_content(base: Path, data_files: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A configuration as nested dictionaries; candidates are boundaries 1 and 2."""
    return {
        "name": "run",
        "model": {"path": str(base), "dtype": "float32"},
        "data": {
            "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a", "samples": 16},
            "preserve": {"path": str(data_files["preserve"]), "prompt": "q"},
            "max_length": 64,
        },
        "method": dict(METHOD),
        "train": {"learning_rate": 2.0e-3},
        "output_dir": str(folder),
    }


def initialised(content: dict[str, Any]) -> tuple[RunConfig, RunDirectory]:
    """Calibrate and init, in this process."""
    config = resolve(content)
    run = RunDirectory(config.run_directory)
    calibrate(config, run)
    initialise(config, run)
    return config, run


def one_rank(number: int, ranks: int, port: int, config: RunConfig, run: RunDirectory) -> None:
    """A rank of a gloo gang that initialises ``run``, whose statistics are there."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=ranks)
    initialise(config, run)
    torch.distributed.destroy_process_group()


def gangs(config_file: str, statistics: str, folder: str) -> None:
    """Gangs of 2 and 4 processes: fewer and more than there are models to measure, the base among them."""
    config = load_config(Path(config_file))
    context = multiprocessing.get_context("fork")
    for ranks in (2, 4):
        run, port = RunDirectory(Path(folder) / f"{ranks}-ranks"), free_port()
        shutil.copytree(statistics, run.statistics)
        processes = [
            context.Process(target=one_rank, args=(number, ranks, port, config, run)) for number in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)


if __name__ == "__main__":
    gangs(*sys.argv[1:])
