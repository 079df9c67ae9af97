"""Peak memory of collecting statistics, by depth: resident and streamed, on a CPU.

    .venv/bin/python benchmarks/streamed_memory.py            4, 8 and 16 blocks; about five minutes on one core

Llamas with random weights, d = 512 in fp32, 16 rows of 256 random tokens in batches of 4, files to files: weights are
read from safetensors, statistics written to it. Every case is a process of its own. The table has its largest resident
set (mapped files among it) and, in brackets, how far that is above what it held when libraries and rows were loaded.
Streamed input covariances should stay flat (± 5 %); streamed gradient statistics keep the inputs of every block, here
in the same memory, and grow by those: their size is given beside.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing, nullcontext
from pathlib import Path

from harness.gang import quiet_libraries

RESULTS = Path(__file__).parent / "results" / "streamed_memory.json"
DEPTHS, WIDTH, ROWS, TOKENS, BATCH = (4, 8, 16), 512, 16, 256, 4
CASES = {
    "resident, input covariance": ("resident", ("input_covariance",)),
    "streamed, input covariance": ("streamed", ("input_covariance",)),
    "streamed, both covariances": ("streamed", ("input_covariance", "output_gradient_covariance")),
}


def main() -> None:
    """Measure every case at every depth and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per case; the smallest peak counts")
    parser.add_argument("--case", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(peak(options.case[0], Path(options.case[1]))))
        return
    quiet_libraries()
    found: dict[str, dict[str, list[list[float]]]] = {case: {} for case in CASES}
    with tempfile.TemporaryDirectory() as place:
        for depth in DEPTHS:
            save(Path(place) / str(depth), depth)
            for case in CASES:
                runs = [in_own_process(case, Path(place) / str(depth)) for _ in range(options.rounds)]
                found[case][str(depth)] = sorted(runs)
                print(f"{case}, {depth} blocks: {' '.join(f'{run[0]:.0f}' for run in sorted(runs))} MiB", flush=True)
    kept = ROWS * TOKENS * WIDTH * 4 / 2**20
    print(f"\n| MiB | {' | '.join(f'{d} blocks' for d in DEPTHS)} | {DEPTHS[-1]} / {DEPTHS[0]} |")
    print("|---" * (len(DEPTHS) + 2) + "|")
    ratios = {}
    for case, runs in found.items():
        smallest = [runs[str(depth)][0] for depth in DEPTHS]
        ratios[case] = {"peak": smallest[-1][0] / smallest[0][0], "above_start": smallest[-1][1] / smallest[0][1]}
        cells = " | ".join(f"{whole:.0f} ({above:.0f})" for whole, above in smallest)
        print(f"| {case} | {cells} | {ratios[case]['peak']:.2f} ({ratios[case]['above_start']:.2f}) |")
    print(f"\nkept inputs of one block: {kept:.0f} MiB")
    content = {
        "setup": {"width": WIDTH, "rows": ROWS, "tokens": TOKENS, "batch": BATCH, "dtype": "float32"},
        "mib_at_peak_and_above_start": found,
        "ratio_of_deepest_to_shallowest": ratios,
        "kept_inputs_of_one_block_mib": kept,
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


def in_own_process(case: str, model: Path) -> list[float]:
    """What `peak` finds."""
    command = [sys.executable, __file__, "--case", case, str(model)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def save(folder: Path, depth: int) -> None:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=depth,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def peak(case: str, folder: Path) -> list[float]:
    """Collect and write, in this process; its largest resident set, and that above what it held before, MiB."""
    import torch

    from harness.config import ModelConfig
    from harness.data.collation import collate
    from harness.data.tokenisation import Row
    from harness.measurement import measured, resident_peak
    from harness.memory import freed_at_once
    from harness.models.loading import load_model
    from harness.models.sharing import input_groups
    from harness.models.targets import target_modules
    from harness.models.weights import BaseWeights, empty_model
    from harness.statistics.loss import Labels
    from harness.statistics.reduction import Reduction
    from harness.statistics.resident import collect_resident
    from harness.statistics.statistic import Statistic
    from harness.statistics.store import StatisticsWriter
    from harness.statistics.streamed import collect_streamed

    way, kinds = CASES[case]
    config, device = ModelConfig(path=str(folder), dtype="float32"), torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (ROWS, TOKENS), generator=generator).tolist()
    rows = [Row(row, row) for row in ids]
    batches = [collate(rows[start : start + BATCH], 0) for start in range(0, ROWS, BATCH)]
    probe = collate([Row(ids[0][:8], [])], 0)
    empty = empty_model(config)
    with torch.no_grad():  # what libraries allocate once
        torch.ones(64, 64) @ torch.ones(64, 64)
    with (
        tempfile.TemporaryDirectory() as place,
        measured() as phase,
        StatisticsWriter(Path(place)) as writer,
        freed_at_once() if way == "streamed" else nullcontext(),
    ):
        if way == "resident":
            model = load_model(config)
            modules = target_modules(model, "all-linear")
            groups = input_groups(model, modules, {"input_ids": probe["input_ids"], "use_cache": False})
            for kind, name, matrix, tokens in collect_resident(
                model, modules, groups, batches, kinds, Labels(), Reduction()
            ):
                writer.write(kind, name, Statistic(matrix, tokens))
        else:
            modules, groups = target_modules(empty, "all-linear"), {}
            collected = collect_streamed(
                *(empty, BaseWeights(config, empty), modules, [batches], probe),
                *(kinds, Labels(), device, Reduction(), groups),
            )
            with closing(collected):
                for _, kind, name, matrix, tokens in collected:
                    writer.write(kind, name, Statistic(matrix, tokens))
        for kind in kinds:
            writer.serve(kind, groups if kind == "input_covariance" else {name: name for name in modules})
        writer.close()
    return [resident_peak() / 2**20, phase.peak_bytes / 2**20]


if __name__ == "__main__":
    main()
