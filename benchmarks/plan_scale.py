"""A simulation: time and bytes of `calibrate` and `init` for 7B, 13B and 70B decoders on 1, 8 and 64 ranks.

    .venv/bin/python benchmarks/plan_scale.py                      measures this machine for a minute, then simulates
    .venv/bin/python benchmarks/plan_scale.py --rows 256 --length 512 --rank 128

Measured here: what a layer's decomposition costs, by `CorDA.initialise` (full solver) on square and oblong layers of
several widths, fitted to a·products + b·9n³; and the rate of a plain product in the model's dtype. Counted: weights,
covariances, hidden states, bytes that ranks exchange. Layers are assigned to ranks by the harness's own
`assign_by_cost`. **Every number for a model is simulated**, from this machine's rates for every rank: they are taken to
compute as fast as this machine, and to exchange as fast as ``--gigabytes`` says.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.gang import quiet_libraries

RESULTS = Path(__file__).parent / "results" / "plan_scale.json"
WIDTHS = (256, 512, 768, 1024)


@dataclass(frozen=True)
class Decoder:
    """Width, inner width, width of keys and values, blocks."""

    width: int
    intermediate: int
    keys: int
    blocks: int

    def layers(self) -> list[tuple[str, int, int]]:
        """Name, outputs and inputs of every linear layer of a block."""
        d, m, k = self.width, self.intermediate, self.keys
        mlp = [("gate", m, d), ("up", m, d), ("down", d, m)]
        return [("q", d, d), ("k", k, d), ("v", k, d), ("o", d, d), *mlp]

    def inputs(self) -> list[int]:
        """Widths of the distinct inputs of a block: of q, k, v; of o; of gate and up; of down."""
        return [self.width, self.width, self.width, self.intermediate]


DECODERS = {
    "7B": Decoder(4096, 11008, 4096, 32),
    "13B": Decoder(5120, 13824, 5120, 40),
    "70B": Decoder(8192, 28672, 1024, 80),
}
RANKS = (1, 8, 64)


@dataclass(frozen=True)
class Rates:
    """Seconds per multiplication: in float64 products, per 9 n³ of an eigendecomposition, in the model's dtype."""

    product: float
    eigen: float
    forward: float
    worst_fit: float  # largest relative error of the fit on what was measured


@dataclass(frozen=True)
class Simulated:
    """A model on a number of ranks: seconds, and bytes of a rank."""

    model: str
    ranks: int
    collection_seconds: float
    decomposition_seconds: float
    exchange_seconds: float
    total_seconds: float
    one_rank_over_this: float
    resident_bytes: int
    streamed_bytes: int
    reduced_bytes: int


def main() -> None:
    """Measure, simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="a second between ranks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet_libraries()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    import torch

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = measure(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"{name}: {1e-9 / rates.product:.1f} G multiplications/s in float64 products, {1e-9 / rates.eigen:.1f} of 9 n³ "
        f"in eigendecompositions, {1e-9 / rates.forward:.1f} in bf16; the fit is off by {rates.worst_fit:.0%} at most"
    )
    tokens = options.rows * options.length
    lines = [simulate(model, ranks, tokens, rates, options.gigabytes * 1e9) for model in DECODERS for ranks in RANKS]
    lines = [with_speed_up(line, lines) for line in lines]
    print_table(lines)
    content: dict[str, Any] = {"device": name, "rates": asdict(rates), "tokens": tokens, "simulated": True}
    options.out.write_text(json.dumps(content | {"lines": [asdict(line) for line in lines]}, indent=2) + "\n")
    print(f"\n{options.out}")


def measure(device: Any) -> Rates:
    """Fit the cost of `CorDA.initialise`, and the rate of a bf16 product, on ``device``."""
    import torch

    from harness.methods.registry import build_method
    from harness.models.targets import Layer
    from harness.stages.plan import layer_cost
    from harness.statistics.statistic import Statistic

    method = build_method({"name": "corda", "mode": "kpm", "rank": 16}, 0)
    method.solver = "gram"

    class Held:
        matrix: torch.Tensor

        def input_covariance(self, layer: str, sampling_round: int = 0) -> Statistic:
            return Statistic(self.matrix, 4096)

    held, seconds, costs = Held(), [], []
    for width in WIDTHS:
        for out_features, in_features in ((width, width), (width * 11 // 4, width), (width, width * 11 // 4)):
            layer = Layer("layer", out_features, in_features)
            weight = torch.randn(out_features, in_features, device=device)
            inputs = torch.randn(2 * in_features, in_features)
            held.matrix = inputs.T @ inputs / len(inputs)
            best = math.inf
            for _ in range(3):
                began = time.perf_counter()
                method.initialise(layer, weight, 16, held, {})
                best = min(best, time.perf_counter() - began)
            seconds.append(best)
            costs.append(layer_cost(method, layer))
    # Relative least squares, so that small layers count as much as large ones.
    design = torch.tensor([[cost.products / s, cost.eigen / s] for cost, s in zip(costs, seconds, strict=True)])
    fit = torch.linalg.lstsq(design.double(), torch.ones(len(seconds), 1, dtype=torch.float64)).solution[:, 0]
    fit = fit.clamp_min(1e-15)
    errors = (design.double() @ fit - 1).abs()
    n = 2048
    left = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        (left @ left).float().sum().item()
        best = min(best, time.perf_counter() - began)
    return Rates(float(fit[0]), float(fit[1]), best / n**3, float(errors.max()))


def simulate(model: str, ranks: int, tokens: int, rates: Rates, bandwidth: float) -> Simulated:
    """One model on ``ranks`` ranks, CorDA with one sampling round, bf16 weights, fp32 covariances."""
    from harness.methods.registry import build_method
    from harness.models.targets import Layer
    from harness.stages.plan import layer_cost
    from harness.training.ownership import assign_by_cost

    decoder = DECODERS[model]
    method = build_method({"name": "corda", "mode": "kpm", "rank": 128}, 0)
    layers = [Layer(name, out, in_) for name, out, in_ in decoder.layers()] * decoder.blocks
    costs = [layer_cost(method, layer) for layer in layers]
    seconds = [cost.products * rates.product + cost.eigen * rates.eigen for cost in costs]
    owners = assign_by_cost(seconds, ranks)
    loads = [sum(s for s, owner in zip(seconds, owners, strict=True) if owner == rank) for rank in range(ranks)]

    weights = sum(out * in_ for _, out, in_ in decoder.layers())
    covariances = sum(width**2 for width in decoder.inputs())
    # Of a symmetric product half is computed; a rank sees its share of the tokens.
    passes = (weights + covariances / 2) * decoder.blocks * tokens / ranks * rates.forward
    triangle = covariances / 2 * 4 * decoder.blocks  # bytes of all sums
    reduced = triangle * (ranks - 1) / ranks
    whole = 4 * max(decoder.inputs()) ** 2  # one matrix at a time is filled in and written
    work = max(cost.bytes for cost in costs)
    hidden = tokens / ranks * decoder.width * 2
    return Simulated(
        model,
        ranks,
        passes,
        max(loads),
        reduced / bandwidth,
        passes + max(loads) + reduced / bandwidth,
        1.0,
        int(2 * weights * decoder.blocks + triangle + whole),
        int(max(2 * 2 * weights + triangle / decoder.blocks + whole + hidden, work)),
        int(reduced),
    )


def with_speed_up(line: Simulated, lines: list[Simulated]) -> Simulated:
    """The line with the time of one rank over its own."""
    alone = next(other for other in lines if other.model == line.model and other.ranks == 1)
    return Simulated(**{**asdict(line), "one_rank_over_this": alone.total_seconds / line.total_seconds})


def print_table(lines: list[Simulated]) -> None:
    """All lines as Markdown."""
    from harness.measurement import in_words

    print("\nSimulated, CorDA (KPM), full solver, from this machine's rates for every rank:\n")
    print("| model | ranks | collection | decomposition | exchange | total | 1 rank over this ", end="")
    print("| resident memory | streamed memory | bytes a rank gives away |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        minutes = [
            f"{seconds / 60:.1f} min"
            for seconds in (
                line.collection_seconds,
                line.decomposition_seconds,
                line.exchange_seconds,
                line.total_seconds,
            )
        ]
        print(
            f"| {line.model} | {line.ranks} | {' | '.join(minutes)} | {line.one_rank_over_this:.1f} "
            f"| {in_words(line.resident_bytes)} | {in_words(line.streamed_bytes)} | {in_words(line.reduced_bytes)} |"
        )


if __name__ == "__main__":
    main()
