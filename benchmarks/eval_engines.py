"""What vLLM and one engine for many adapters save in an evaluation: ratios, taken in turns in one process.

    .venv/bin/python benchmarks/eval_engines.py                      both parts
    .venv/bin/python benchmarks/eval_engines.py --part generate --model tiny --rounds 2

`generate`: vLLM and transformers (`hf`) answer the same prompts greedily, alternating, on the tiny world's base and on
a Llama of 112 M parameters with random weights. A ratio is vLLM's samples per second over those of `hf` in the same
round; beside them stands the share of identical answers. Loading is not counted; vLLM's cache of prefixes is emptied
before every round.

`adapters`: the base and six adapters (ranks 4 to 64) on the tiny world's three tasks with vLLM, in one engine, against
seven evaluations that each load an engine; alternating. A ratio is the time of the seven loads over that of the one
engine, loading counted. `in one process`: Python and vLLM are imported once, before both. `processes` (with
--processes): `eval/run.py` once with six --adapter, against seven times, imports counted.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.gang import quiet_libraries as quiet_gang

if TYPE_CHECKING:
    from harness.evaluation.text_model import Prompt, TextModel
    from harness.tiny import TinyWorld

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "eval_engines.json"
TASKS = ["tiny_facts_seen", "tiny_facts_heldout", "tiny_reverse"]
RANKS = (4, 8, 16, 16, 32, 64)
AIM = 3.0


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("generate", "adapters", "both"), default="both")
    parser.add_argument("--model", choices=("tiny", "llama-100m", "both"), default="both", help="of generate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--items", type=int, default=None, help="of each task, for adapters; all by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", action="store_true", help="also measure adapters with eval/run.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet_gang()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    import torch

    from harness.evaluation.verbosity import quiet_libraries
    from harness.tiny import build

    torch.set_num_threads(options.threads)
    world = build()
    content = json.loads(options.out.read_text()) if options.out.is_file() else {}
    with quiet_libraries():
        if options.part != "adapters":
            for name in ("tiny", "llama-100m") if options.model == "both" else (options.model,):
                content[f"generate {name} {options.dtype}"] = generate(name, world, options)
        if options.part != "generate":
            content[f"adapters {options.dtype}"] = adapters(world, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    for name, entry in content.items():
        print(f"{name}: {json.dumps({key: value for key, value in entry.items() if 'ratio' in key or 'share' in key})}")
    print(options.out)


def generate(name: str, world: "TinyWorld", options: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of both engines on one model."""
    from harness.evaluation.hf_engine import HFEngine
    from harness.evaluation.vllm_engine import VLLMEngine

    model = world.model
    if name == "llama-100m":
        from benchmarks.step_cost import llama_100m

        model = llama_100m(Path(tempfile.gettempdir()) / "palimpsest-llama-100m", world.model)
    vllm = VLLMEngine(model, dtype=options.dtype)
    hf = HFEngine(model, dtype=options.dtype, batch_size=64)
    try:
        prompts = prompts_of(name, world, vllm, options)
        for engine in (vllm, hf):  # the first round pays for what is compiled and allocated once
            engine.generate(prompts[:16])
        rates: dict[str, list[float]] = {"vllm": [], "hf": []}
        shares = []
        for number in range(options.rounds):
            answers: dict[str, list[list[int]]] = {}
            for engine_name, engine in [("vllm", vllm), ("hf", hf)][:: 1 if number % 2 else -1]:
                vllm._llm.reset_prefix_cache()
                began = time.perf_counter()
                answers[engine_name] = engine.generate(prompts)
                rates[engine_name].append(len(prompts) / (time.perf_counter() - began))
            shares.append(statistics.fmean(a == b for a, b in zip(answers["vllm"], answers["hf"], strict=True)))
        tokens = sum(len(answer) for answer in answers["vllm"])
    finally:
        hf.close()
        vllm.close()
    return {
        "ratio": summary([a / b for a, b in zip(rates["vllm"], rates["hf"], strict=True)]),
        "samples_per_second": {engine: statistics.median(values) for engine, values in rates.items()},
        "identical_share": min(shares),
        "prompts": len(prompts),
        "new_tokens": tokens,
        **setting(options),
    }


def prompts_of(name: str, world: "TinyWorld", engine: "TextModel", options: argparse.Namespace) -> list["Prompt"]:
    """Questions and words of the tiny world for its own base; random tokens, 16 to 128 a prompt, for random weights."""
    from harness.evaluation.text_model import Prompt

    generator = random.Random(0)
    if name == "tiny":
        lines = [line for file in sorted(world.data_dir.glob("*.jsonl")) for line in file.read_text().splitlines()]
        texts = [json.loads(line)["prompt"] for line in generator.sample(lines, options.prompts)]
        return [Prompt(engine.tok_encode(text), ("\n",), options.new_tokens) for text in texts]
    size = engine.config.vocab_size
    rows = [generator.choices(range(3, size), k=generator.randint(16, 128)) for _ in range(options.prompts)]
    return [Prompt(row, (), options.new_tokens) for row in rows]


def adapters(world: "TinyWorld", options: argparse.Namespace) -> dict[str, Any]:
    """Base + six adapters: one engine against seven loads."""
    from harness.evaluation.candidates import Candidate
    from harness.evaluation.engines import evaluate

    with tempfile.TemporaryDirectory() as folder:
        folders = [random_adapter(world.model, Path(folder) / f"adapter-{i}", r, i) for i, r in enumerate(RANKS)]
        candidates = [Candidate("base", None, world.model)]
        candidates += [Candidate(path.name, None, world.model, path) for path in folders]

        def ask(some: list[Candidate]) -> list[dict[str, float]]:
            settings = {"backend": "vllm", "dtype": options.dtype, "limit": options.items, "cache": False}
            found = evaluate(some, TASKS, data_dir=world.data_dir, **settings)
            return [{task: score.value for task, score in one.scores.items()} for one in found]

        def one_by_one() -> list[dict[str, float]]:
            return [ask([candidate])[0] for candidate in candidates]

        ask(candidates[:1])  # imports, and what is compiled and allocated once, without and with adapters
        ask(candidates[:2])
        result = in_turns(lambda: ask(candidates), one_by_one, options.rounds)
        if options.processes:
            command = [sys.executable, str(REPOSITORY / "eval" / "run.py"), "--model", str(world.model), "--no-cache"]
            command += ["--tasks", ",".join(TASKS), "--dtype", options.dtype, "--data-dir", str(world.data_dir)]
            command += [] if options.items is None else ["--limit", str(options.items)]

            def call(*arguments: str) -> list[dict[str, float]]:
                done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
                models = json.loads(done.stdout)
                return [{task: score["value"] for task, score in one["scores"].items()} for one in models]

            each = [("--adapter", str(path)) for path in folders]
            alone = [(), *((*arguments, "--no-base") for arguments in each)]
            processes = in_turns(
                lambda: call(*(argument for arguments in each for argument in arguments)),
                lambda: [call(*arguments)[0] for arguments in alone],
                options.rounds,
            )
            result |= {f"processes_{key}": value for key, value in processes.items()}
    return result | {"aim": AIM, "adapters": len(RANKS), "items": options.items} | setting(options)


def in_turns(
    together: Callable[[], list[dict[str, float]]], apart: Callable[[], list[dict[str, float]]], rounds: int
) -> dict[str, Any]:
    """Time of ``apart`` over that of ``together``, and the largest difference between their scores."""
    seconds: dict[str, list[float]] = {"one engine": [], "seven loads": []}
    difference = 0.0
    for number in range(rounds):
        scores = {}
        for name, work in [("one engine", together), ("seven loads", apart)][:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            scores[name] = work()
            seconds[name].append(time.perf_counter() - began)
        for one, other in zip(scores["one engine"], scores["seven loads"], strict=True):
            difference = max(difference, *(abs(one[task] - other[task]) for task in one))
    return {
        "ratio": summary([b / a for a, b in zip(seconds["one engine"], seconds["seven loads"], strict=True)]),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "largest_difference_of_scores": difference,
    }


def random_adapter(base: Path, folder: Path, rank: int, seed: int) -> Path:
    """A plain LoRA on every linear layer, with random factors that change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def summary(ratios: list[float]) -> dict[str, float]:
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


def setting(options: argparse.Namespace) -> dict[str, Any]:
    return {"rounds": options.rounds, "dtype": options.dtype, "threads": options.threads}


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
