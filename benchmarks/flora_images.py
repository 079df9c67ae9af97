"""FLoRA against LoRA on convolutions on images: what is learned and what is kept, at equal parameters.

    .venv/bin/python benchmarks/flora_images.py        some minutes on one core

A small ConvNeXt-V2 (depthwise 7×7 convolutions and linear layers) and a small ResNet (3×3 convolutions) are pre-trained
on eight shapes, one of each for every seed, and tuned on eight textures (`images.py`). Tuning trains the adapter and a
second head; the first head is frozen, and its accuracy on shapes is what is retained. The second head has one learning
rate everywhere, so that rates are those of the adapter or, for full fine-tuning, of the trunk.

Two comparisons: the end of each run, and the retained accuracy at matched target accuracy: per seed, the frontier of
the checkpoints of all rates, interpolated (as in `frontier_summary.py`).
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frontier_summary import frontier, k_at
from images import CLASSES, SIZE, shapes, textures
from torch import nn
from torch.nn import functional as F

from harness.adapters import tensor
from harness.adapters.tensor_forms import Form, Reshaped, Tucker, parameter_count
from harness.files import write_bytes, write_json
from harness.models.targets import is_convolution, layer_of

RESULTS = Path(__file__).parent / "results" / "flora_images.json"
SEEDS = (0, 1, 2)
BATCH, PRETRAINING, TUNING, CHECKPOINTS = 32, 700, 120, 4
HEAD_RATE = 1e-2
ADAPTER_RATES, FULL_RATES = (2e-3, 6e-3, 1.8e-2), (1.5e-3, 5e-3)
FLORA_RANK = 8
MATCHED = (0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Method:
    """How a trunk is tuned: arguments of `tensor.attach`, or None for the trunk itself; and its rates."""

    attach: dict[str, Any] | None
    rates: tuple[float, ...]


class TwoHeads(nn.Module):
    """A trunk with a head for the first task and one for the second."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.first, self.second = trunk, nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, width)."""
        return self.trunk(images).pooler_output.flatten(1)


def convnext() -> TwoHeads:
    """ConvNeXt-V2 with a block at each of three resolutions."""
    from transformers import ConvNextV2Config, ConvNextV2Model

    # Drawn wider than a large model's weights, so that a short pre-training suffices.
    config = ConvNextV2Config(
        hidden_sizes=[16, 32, 64], depths=[1, 1, 1], num_stages=3, patch_size=2, image_size=SIZE, initializer_range=0.15
    )
    return TwoHeads(ConvNextV2Model(config), 64)


def resnet() -> TwoHeads:
    """ResNet with a basic block at each of three resolutions."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    return TwoHeads(ResNetModel(config), 64)


MODELS: dict[str, tuple[Callable[[], TwoHeads], float]] = {"ConvNeXt-V2": (convnext, 4e-3), "ResNet": (resnet, 5e-3)}


def pretrained(name: str, seed: int) -> TwoHeads:
    """The model after pre-training on shapes; batch statistics stay as they are from then on."""
    build, rate = MODELS[name]
    torch.manual_seed(seed)
    model = build().train()
    images, labels = shapes(8000, 100 + seed)
    optimizer = torch.optim.AdamW([*model.trunk.parameters(), *model.first.parameters()], rate, weight_decay=0.01)
    draw = torch.Generator().manual_seed(seed)
    for step in range(PRETRAINING):
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 30) * (1 - step / PRETRAINING)
        rows = torch.randint(len(images), (BATCH,), generator=draw)
        _step(optimizer, F.cross_entropy(model.first(model.features(images[rows])), labels[rows]))
    return model.eval()


def tuned(model: TwoHeads, method: Method, rate: float, seed: int, tests: dict[str, Any]) -> dict[str, Any]:
    """Tune a copy of ``model`` on textures; accuracies at each checkpoint, parameters, time of a step."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1000 + seed)
    model.second.reset_parameters()
    model.requires_grad_(False)
    if method.attach is not None and method.attach.get("rank") != 0:
        tensor.attach(model.trunk, seed=seed, **method.attach)
    elif method.attach is None:
        model.trunk.requires_grad_(True)
    trunk = [parameter for parameter in model.trunk.parameters() if parameter.requires_grad]
    model.second.requires_grad_(True)
    groups = [{"params": list(model.second.parameters()), "lr": HEAD_RATE, "peak": HEAD_RATE}]
    if trunk:
        groups.append({"params": trunk, "lr": rate, "peak": rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    images, labels = textures(2000, 200 + seed)
    draw = torch.Generator().manual_seed(seed)
    points, times = [], []
    for step in range(TUNING):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (step + 1) / 10) * (1 - step / TUNING)
        rows = torch.randint(len(images), (BATCH,), generator=draw)
        _step(optimizer, F.cross_entropy(model.second(model.features(images[rows])), labels[rows]))
        times.append(time.perf_counter() - began)
        if (step + 1) % (TUNING // CHECKPOINTS) == 0:
            points.append({"step": step + 1, **accuracies(model, tests)})
    tensor.remove(model.trunk)
    model.load_state_dict(state)
    parameters = sum(parameter.numel() for parameter in trunk)
    return {"points": points, "parameters": parameters, "step_ms": 1000 * statistics.median(times)}


@torch.no_grad()
def accuracies(model: TwoHeads, tests: dict[str, Any]) -> dict[str, float]:
    """``target`` on textures by the second head, ``retained`` on shapes by the first."""
    found = {}
    for key, head in (("retained", model.first), ("target", model.second)):
        images, labels = tests[key]
        found[key] = float((head(model.features(images)).argmax(1) == labels).float().mean())
    return found


def equal_ranks(trunk: nn.Module) -> tuple[int, int]:
    """Ranks of FLoRA and of LoRA on convolutions with the same number of parameters, as nearly as whole ranks allow."""
    layers = [
        layer_of("", module) for module in trunk.modules() if isinstance(module, nn.Linear) or is_convolution(module)
    ]

    def size(form: Form) -> int:
        return sum(parameter_count(form, layer) for layer in layers)

    lora = min(range(1, 33), key=lambda rank: abs(size(Reshaped(rank)) - size(Tucker(FLORA_RANK))))
    return min(range(1, 33), key=lambda rank: abs(size(Tucker(rank)) - size(Reshaped(lora)))), lora


def methods(trunk: nn.Module) -> dict[str, Method]:
    """What is compared on a trunk."""
    flora, lora = equal_ranks(trunk)
    return {
        f"FLoRA, r = {flora}, r₃ = 2": Method({"rank": flora}, ADAPTER_RATES),
        "FLoRA, init: reference": Method({"rank": flora, "init": "reference"}, ADAPTER_RATES),
        f"LoRA on convolutions, r = {lora}": Method({"rank": lora, "method": "lora_conv"}, ADAPTER_RATES),
        "LoRA, layout: axes": Method({"rank": lora, "method": "lora_conv", "layout": "axes"}, ADAPTER_RATES),
        "full fine-tuning": Method(None, FULL_RATES),
        "second head alone": Method({"rank": 0}, (0.0,)),
    }


def study(name: str) -> dict[str, Any]:
    """Every method, rate and seed on one kind of model."""
    runs: list[dict[str, Any]] = []
    before = []
    for seed in SEEDS:
        model = pretrained(name, seed)
        tests = {"retained": shapes(512, 300 + seed), "target": textures(512, 400 + seed)}
        before.append(accuracies(model, tests)["retained"])
        for method, how in methods(model.trunk).items():
            for rate in how.rates:
                runs.append({"method": method, "rate": rate, "seed": seed, **tuned(model, how, rate, seed, tests)})
    return {"before": before, "runs": runs, **summary(runs)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds: of the last checkpoints, by rate; and at matched target accuracy."""
    ends, matched = [], {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        for rate in dict.fromkeys(run["rate"] for run in own):
            last = [run["points"][-1] for run in own if run["rate"] == rate]
            numbers = {key: moments([point[key] for point in last]) for key in ("target", "retained")}
            milliseconds = statistics.median(run["step_ms"] for run in own if run["rate"] == rate)
            parameters = own[0]["parameters"]
            ends.append({"method": method, "rate": rate, "parameters": parameters, "step_ms": milliseconds, **numbers})
        fronts = [
            frontier([(p["target"], p["retained"]) for run in own if run["seed"] == seed for p in run["points"]])
            for seed in SEEDS
        ]
        matched[method] = {
            str(target): moments([value for front in fronts if (value := k_at(front, target)) is not None])
            for target in MATCHED
        }
    return {"ends": ends, "matched": matched}


def moments(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample) and count; of nothing, a count of 0."""
    if not values:
        return {"count": 0}
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "deviation": deviation, "count": len(values)}


def cell(found: dict[str, Any]) -> str:
    """``0.91 ± 0.02``, and of how many seeds where some did not get there."""
    if not found["count"]:
        return "–"
    few = f" ({found['count']}/{len(SEEDS)})" if found["count"] < len(SEEDS) else ""
    return f"{found['mean']:.2f} ± {found['deviation']:.2f}{few}"


def print_tables(name: str, found: dict[str, Any]) -> None:
    """The two comparisons as Markdown."""
    print(f"\n{name}: on shapes before tuning {cell(moments(found['before']))}\n")
    print("| method | parameters | rate | target accuracy | retained accuracy | ms a step |")
    print("|---|---|---|---|---|---|")
    for end in found["ends"]:
        numbers = f"{cell(end['target'])} | {cell(end['retained'])} | {end['step_ms']:.1f}"
        print(f"| {end['method']} | {end['parameters']:,} | {end['rate']:g} | {numbers} |")
    print("\n| retained at target accuracy | " + " | ".join(map(str, MATCHED)) + " |")
    print("|---" * (len(MATCHED) + 1) + "|")
    for method, values in found["matched"].items():
        print(f"| {method} | " + " | ".join(cell(values[str(target)]) for target in MATCHED) + " |", flush=True)


def draw(found: dict[str, dict[str, Any]]) -> bytes:
    """Target against retained accuracy at the end of every rate, one panel per model."""
    from matplotlib.figure import Figure

    from harness.reporting.figures import COLOURS

    names = ("series-1", "series-3", "series-2", "series-5", "series-6", "series-4")
    looks = zip(names, "oPs^Dv", strict=True)
    ink, muted, grid = (COLOURS[name][0] for name in ("ink", "muted", "grid"))
    styles = [{"color": COLOURS[colour][0], "marker": marker} for colour, marker in looks]
    figure = Figure(figsize=(4.4 * len(found), 4.3), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, study_) in zip(panels, found.items(), strict=True):
        before = statistics.mean(study_["before"])
        axes.axhline(before, color=muted, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.set_title(f"{name} (dashed: before tuning)", loc="left", fontsize=9, color=ink)
        for method, style in zip(study_["matched"], styles, strict=True):
            ends = [end for end in study_["ends"] if end["method"] == method]
            x, y = ([end[key]["mean"] for end in ends] for key in ("target", "retained"))
            dx, dy = ([end[key]["deviation"] for end in ends] for key in ("target", "retained"))
            size = f", {ends[0]['parameters']:,} parameters" if ends[0]["parameters"] else ""
            axes.errorbar(x, y, dy, dx, label=method + size, linewidth=1.4, elinewidth=0.7, markersize=5, **style)
        axes.set_xlabel("target accuracy (textures)", color=ink)
        axes.grid(color=grid, linewidth=0.6)
        axes.tick_params(colors=muted, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), labelcolor=ink)
    panels[0].set_ylabel("retained accuracy (shapes)", color=ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main() -> None:
    """Run everything, print the tables, write JSON and figure."""
    parser = argparse.ArgumentParser(description="FLoRA against LoRA on convolutions, on generated images.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON; the figure lies beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    found = {}
    for name in MODELS:
        found[name] = study(name)
        print_tables(name, found[name])
    seconds = time.monotonic() - began
    print(f"\n{seconds:.0f} s")
    settings = {"seeds": SEEDS, "batch": BATCH, "pretraining": PRETRAINING, "tuning": TUNING, "seconds": seconds}
    write_json(options.out, {**settings, "models": found})
    write_bytes(options.out.with_suffix(".png"), draw(found))


def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
