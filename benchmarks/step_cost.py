"""What a training step costs beside plain LoRA's: time and peak memory of methods and penalties, as ratios.

    .venv/bin/python benchmarks/step_cost.py                    both models
    .venv/bin/python benchmarks/step_cost.py --model tiny --rounds 40

Every setup has its own DeepSpeed engine (ZeRO-2, one rank) and AdamW; all stand in one process and take turns, step by
step, in an order that changes every round, so that what else the machine does falls on all alike. A ratio is the time
of a setup's step over the time of LoRA's step of the same round; the table has their median, minimum and maximum. Peak
memory is that of a process of its own for each setup (largest resident set), less what the process held when model and
data were loaded and nothing had been trained.

The step is the trainer's own: forward, backward, clipping, optimiser, projection. What a penalty prepares once before
training is timed apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.gang import quiet_libraries

RESULTS = Path(__file__).parent / "results" / "step_cost.json"
# setup → (overrides of a run's configuration, what the step may cost: the aim)
SETUPS: dict[str, tuple[list[str], float | None]] = {
    "lora": ([], None),
    "lora again": ([], None),  # what the measurement itself does to a ratio
    "fclora": (["method={name: fclora, rank: 16}"], 1.05),
    "lalora diag": (["penalties=[{name: lalora, lambda: 1.0, curvature: diag}]"], 1.03),
    "lalora kfac": (["penalties=[{name: lalora, lambda: 1.0, curvature: kfac}]"], 1.15),
    "lalora kfac_tri": (["penalties=[{name: lalora, lambda: 1.0, curvature: kfac_tri}]"], None),
    "flora": (["method={name: flora, rank: 16}"], 1.05),
    "migu": (["penalties=[{name: migu, threshold: 0.7}]"], None),
    "anchor live": (["anchor={kl: 1.0, prompts_per_step: 4}"], 1.25),
    "anchor cached": (["anchor={kl: 1.0, prompts_per_step: 4, reference: cached}"], 1.15),
}
ROWS = 32


def main() -> None:
    """Measure both models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "llama-100m", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=None, help="steps of each setup; 60 for tiny, 8 for llama-100m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    environment = dict(os.environ)  # of the processes that memory is measured in: without what joining ranks adds
    import torch

    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print(json.dumps(peak_memory(options.model, options.memory_of)))
        return
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in ("tiny", "llama-100m") if options.model == "both" else (options.model,):
        rounds = options.rounds or {"tiny": 60, "llama-100m": 8}[name]
        content[name] = {"rounds": rounds, "threads": options.threads, "rows": ROWS} | measure(name, rounds)
        memory = {setup: memory_in_own_process(name, setup, options.threads, environment) for setup in SETUPS}
        for setup, entry in content[name]["setups"].items():
            entry["peak_mib"] = memory[setup]
            entry["memory_ratio"] = memory[setup] / memory["lora"]
        print_table(name, content[name])
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{RESULTS}")


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Step times of all setups, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        steppers = {setup: Stepper(model, setup, Path(folder), rounds) for setup in SETUPS}
        seconds: dict[str, list[float]] = {setup: [] for setup in SETUPS}
        for number in range(-2, rounds):  # two rounds to warm up
            order = list(SETUPS)
            order = order[number % len(order) :] + order[: number % len(order)]
            for setup in order:
                began = time.perf_counter()
                steppers[setup].step()
                if number >= 0:
                    seconds[setup].append(time.perf_counter() - began)
        shape = steppers["lora"].shape
        prepared = {setup: stepper.prepare_seconds for setup, stepper in steppers.items()}
    setups = {}
    for setup, (_, aim) in SETUPS.items():
        ratios = [own / lora for own, lora in zip(seconds[setup], seconds["lora"], strict=True)]
        setups[setup] = {
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "aim": aim,
            "seconds": statistics.median(seconds[setup]),
            "prepare_seconds": prepared[setup],
        }
    return {"shape": shape, "setups": setups}


def memory_in_own_process(model: str, setup: str, threads: int, environment: dict[str, str]) -> float:
    """MiB that training adds at its peak, measured in a fresh process."""
    command = [sys.executable, __file__, "--model", model, "--memory-of", setup, "--threads", str(threads)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return float(answer.strip().splitlines()[-1])


def peak_memory(model: str, setup: str) -> float:
    """MiB by which three steps raise the largest resident set of this process above that of the loaded engine."""
    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(model, setup, Path(folder), 3)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
        before = resident_mib("VmRSS")
        for _ in range(3):
            stepper.step()
        return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


class Stepper:
    """One setup's model, engine and trainer; `step` is one optimiser step on the next batch."""

    def __init__(self, model: str, setup: str, folder: Path, rounds: int) -> None:
        from harness.pipeline import run_stages
        from harness.run_directory import RunDirectory
        from harness.stages.train import make_trainer
        from harness.training.distributed import join_ranks

        join_ranks()
        config = configuration(model, setup, folder, rounds + 2)
        run_stages(config, ["calibrate", "init"])
        began = time.perf_counter()
        run_stages(config, ["prepare"])
        self.prepare_seconds = time.perf_counter() - began
        self.trainer = make_trainer(config, RunDirectory(config.run_directory))
        self.method = self.trainer._method
        loader = self.trainer.get_train_dataloader()
        self.trainer.create_optimizer()
        self.trainer._prepare_for_training(rounds + 2, loader, None)
        self.batches = iter(loader)
        parameters = sum(p.numel() for p in self.trainer.model.parameters())
        trained = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        self.shape = {"parameters": parameters, "trained": trained, "dtype": config.model.dtype}

    def step(self) -> None:
        """Forward, backward, clipping, optimiser, projection."""
        import torch

        batch = next(self.batches)
        tokens = torch.tensor(int((batch["labels"][:, 1:] != -100).sum()))
        self.trainer.training_step(self.trainer.model_wrapped, batch, tokens)
        self.method.after_step(self.trainer.model)
        self.trainer.state.global_step += 1


def configuration(model: str, setup: str, folder: Path, steps: int) -> Any:
    """The demo's recipe on the tiny base, or on random weights of a 100-million-parameter Llama."""
    from harness.embedded import tiny_config
    from harness.tiny import build

    world = build()
    overrides = [*SETUPS[setup][0], f"train.max_steps={steps}", "train.preserve_loss_steps=null", "data.max_length=64"]
    if not any(o.startswith("method=") for o in overrides):
        overrides.append("method={name: lora, rank: 16}")
    if model == "llama-100m":
        overrides.append(f"model.path={llama_100m(folder.parent / 'palimpsest-llama-100m', world.model)}")
    return tiny_config(world, f"{model}-{setup.replace(' ', '-')}", overrides, folder)


def llama_100m(folder: Path, tokenizer: Path) -> Path:
    """A Llama of 100 million parameters in the blocks, random weights, with the tiny world's tokenizer; made once."""
    if not (folder / "config.json").is_file():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=2_048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def print_table(name: str, content: dict[str, Any]) -> None:
    """Ratios as Markdown."""
    shape = content["shape"]
    print(f"\n{name}: {shape['parameters'] / 1e6:.1f} M parameters, {ROWS} rows, {content['rounds']} rounds\n")
    print("| setup | step time / LoRA's: median | min | max | aim | peak memory / LoRA's | prepared in |")
    print("|---|---|---|---|---|---|---|")
    for setup, entry in content["setups"].items():
        ratio, aim = entry["ratio"], entry["aim"]
        print(
            f"| {setup} | {ratio['median']:.3f} | {ratio['min']:.2f} | {ratio['max']:.2f} "
            f"| {'' if aim is None else f'≤ {aim}'} | {entry['memory_ratio']:.2f} | {entry['prepare_seconds']:.1f} s |"
        )


if __name__ == "__main__":
    main()
