"""Truncation on the tiny world: how much of every layer can go before the base forgets its facts (CorDA++, Fig. 4, 5)?

    .venv/bin/python benchmarks/tiny_truncation.py      about three minutes on one core

`harness analyse truncation` on 700 questions with their answers, 200 of them held out for perplexity, for three seeds:
a seed draws other held-out rows and other calibration rows. Curves are geometric means over seeds.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from harness.analysis.figures import truncation_figure
from harness.analysis.truncation import markdown, truncation
from harness.embedded import tiny_config
from harness.files import read_json, write_bytes, write_json, write_text
from harness.tiny import TinyWorld, build

SEEDS = (0, 1, 2)
DISCARDS = (32, 64, 128, 160, 192, 208, 224, 240)
TEST_ROWS, SAMPLES, ROUNDS = 200, 250, 5
RESULTS = Path(__file__).parent / "results"


def write_facts(world: TinyWorld, path: Path) -> None:
    """Every question of the world followed by its answer, as the base has seen most of them."""
    items = [
        json.loads(line)
        for name in ("facts_seen", "facts_heldout")
        for line in (world.data_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    texts = [f"{item['prompt']} {item['answer']}" for item in items]
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def study(world: TinyWorld, seed: int, out: Path) -> dict[str, Any]:
    """The JSON of one seed, without local paths and the 28 layers' counts at every r."""
    folder = out / f"seed-{seed}"
    truncation(
        tiny_config(world, f"truncation-{seed}", [f"train.seed={seed}"], out),
        folder,
        data=f"{out / 'facts.jsonl'}:text",
        discards=DISCARDS,
        samples=SAMPLES,
        test_rows=TEST_ROWS,
        rounds=ROUNDS,
    )
    content = read_json(folder / "truncation.json")
    del content["model"], content["calibration"]["path"], content["test"]["path"]
    for method in content["methods"].values():
        for point in method["points"]:
            point.pop("components", None)
    return content


def geometric_means(seeds: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Method → perplexity at 0 and at each r: exp of the mean loss over seeds."""
    base = [content["base"]["loss"] for content in seeds]
    means = {}
    for method in seeds[0]["methods"]:
        points = zip(
            *([point["loss"] for point in content["methods"][method]["points"]] for content in seeds), strict=True
        )
        means[method] = [math.exp(sum(losses) / len(losses)) for losses in (base, *points)]
    return means


def main() -> None:
    """Run all seeds; write JSON and figure, print the table."""
    parser = argparse.ArgumentParser(description="Truncation on the tiny world.")
    parser.add_argument("--out", type=Path, default=Path("runs/truncation"))
    out = parser.parse_args().out.absolute()
    world = build()
    write_facts(world, out / "facts.jsonl")
    seeds = [study(world, seed, out) for seed in SEEDS]
    means = geometric_means(seeds)
    total = seeds[0]["component_parameters"]
    uniform = [point["discarded_parameters"] for point in seeds[0]["methods"]["plain SVD"]["points"]]
    shares = [0.0, *(count / total for count in uniform)]
    write_json(
        RESULTS / "tiny_truncation.json",
        {"discards": [0, *DISCARDS], "shares": shares, "geometric_mean_perplexity": means, "seeds": seeds},
    )
    figure = truncation_figure(means["plain SVD"][0], [0, *DISCARDS], shares, means)
    write_bytes(RESULTS / "tiny_truncation.png", figure)
    print(markdown([0, *DISCARDS], shares, means))
    print(f"{RESULTS / 'tiny_truncation.json'} and {RESULTS / 'tiny_truncation.png'}")


if __name__ == "__main__":
    main()
