"""Step-0 errors over an NF4 base: QLoRA, LoftQ, QPiSSA, QCorDA and QCorDA++ on the tiny base, the same inputs for all.

    .venv/bin/python benchmarks/quantisation_error.py        some minutes on one core

Each method is calibrated on `data.train` and initialised; nothing is trained. Errors are those of ``init/report.json``:
E = W − Q(W′) − s·B₀A₀, weight error ‖E‖/‖W‖ and output error ‖E X‖/‖W X‖ on the calibration inputs, per layer.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from harness.embedded import tiny_config
from harness.files import read_json, write_json
from harness.gang import quiet_libraries
from harness.tiny import build

RESULTS = Path(__file__).parent / "results" / "quantisation_error.json"
SEEDS = (0, 1, 2)
METHODS = {
    "QLoRA": "{name: lora, rank: 16}",
    "LoftQ, T = 1": "{name: loftq, rank: 16, iterations: 1}",
    "LoftQ, T = 5": "{name: loftq, rank: 16}",
    "QPiSSA": "{name: pissa, rank: 16}",
    "QCorDA": "{name: corda, mode: ipm, rank: 16}",
    "QCorDA, 5 rounds": "{name: corda, mode: ipm, rank: 16, rounds: 5}",
    "QCorDA++": "{name: corda, mode: ipm, rank: 16, rounds: 5, dynamic_rank: true}",
}
ERRORS = ("weight_error", "output_error")


def layers_of(method: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """``init/report.json``'s layers of one method and seed."""
    from harness.pipeline import run_stages

    name = f"{''.join(c for c in method.lower().replace('++', 'pp') if c.isalnum())}-seed{seed}"
    overrides = [f"method={METHODS[method]}", "model.quantization=nf4", f"train.seed={seed}"]
    run_stages(tiny_config(build(), name, overrides, out), ["calibrate", "init"])
    report = read_json(out / name / "init" / "report.json")["layers"]
    return [{"name": layer, **entry} for layer, entry in report.items()]


def main() -> None:
    """Initialise every method, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Step-0 errors over an NF4 base.")
    parser.add_argument("--out", type=Path, default=Path("runs/quantisation-error"))
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    quiet_libraries()
    found: dict[str, Any] = {}
    print("| method | weight error, mean (largest) over layers | output error, mean (largest) | layers at rank 0 |")
    print("|---|---|---|---|")
    for method in METHODS:
        layers = [layer for seed in SEEDS for layer in layers_of(method, seed, options.out)]
        found[method] = {
            key: {
                "mean": statistics.mean(layer[key] for layer in layers),
                "largest": max(layer[key] for layer in layers),
                "smallest": min(layer[key] for layer in layers),
            }
            for key in ERRORS
        } | {"rank_0": sum(layer["rank"] == 0 for layer in layers), "layers": layers}
        cells = [f"{found[method][key]['mean']:.4f} ({found[method][key]['largest']:.4f})" for key in ERRORS]
        print(f"| {method} | {cells[0]} | {cells[1]} | {found[method]['rank_0']} of {len(layers)} |", flush=True)
    write_json(RESULTS, {"seeds": SEEDS, "rank": 16, "methods": found})
    print(f"\n{RESULTS}")


if __name__ == "__main__":
    main()
