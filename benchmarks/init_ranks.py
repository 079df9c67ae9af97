"""What a second rank is worth to `init`: the stage itself on 1 and on 2 ranks, one thread each, taking turns.

    .venv/bin/python benchmarks/init_ranks.py            about ten minutes on two cores

CorDA (KPM, rank 64) on a Llama of width 1024 with 4 blocks, random weights and outlier channels
(`benchmarks/init_vs_peft.py`); statistics are collected once. Seconds are those that the stage reports of its slowest
rank: reading weights, decomposing, writing adapters; starting the ranks is left out.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from init_vs_peft import SHAPES, run_content, save_model

RESULTS = Path(__file__).parent / "results" / "init_ranks.json"


def main() -> None:
    """Measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="d1024")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        save_model(shape, model)
        config = Path(place) / "run.yaml"
        config.write_text(yaml.safe_dump(run_content(shape, model, Path(place), "resident")))
        harness("calibrate", config, 1)
        for number in range(options.rounds):
            for ranks in (1, 2) if number % 2 == 0 else (2, 1):
                said = harness("init", config, ranks, "--force")
                seconds[ranks].append(float(re.search(r"parameters; ([\d.]+) s", said)[1]))
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    print("| ranks | seconds, median | min | max |")
    print("|---|---|---|---|")
    for ranks, taken in seconds.items():
        print(f"| {ranks} | {statistics.median(taken):.2f} | {min(taken):.2f} | {max(taken):.2f} |")
    low, middle, high = ratio["min"], ratio["median"], ratio["max"]
    print(f"\n1 rank over 2: {middle:.2f} (min {low:.2f}, max {high:.2f}); the aim is 1.7 or more")
    options.out.write_text(json.dumps({"shape": options.shape, "seconds": seconds, "ratio": ratio}, indent=2) + "\n")
    print(options.out)


def harness(stage: str, config: Path, ranks: int, *arguments: str) -> str:
    """What `harness` says on standard error while it runs ``stage`` on ``ranks`` ranks of one thread."""
    command = [str(Path(sys.executable).parent / "harness"), stage, str(config), f"train.ranks={ranks}", *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


if __name__ == "__main__":
    main()
