"""Initialisation at the shapes of LLaMA-2-7B and 13B on one accelerator: our phases beside PEFT's `preprocess_corda`.

    python benchmarks/init_7b_shapes.py                          7B and 13B shapes, 256 rows of 512 tokens, bf16
    python benchmarks/init_7b_shapes.py --models 7b --methods corda --rows 64
    python benchmarks/init_7b_shapes.py --models small --rows 4 --length 64      on a CPU, to see that it works

Needs torch, transformers, peft and this package; no weights are downloaded. One decoder block of the shape stands on
the device with random weights and outlier channels (60 times the rest), between an embedding and an output layer. Its
statistics are collected over all rows and its seven layers are decomposed, by us and by PEFT, each after the other has
freed its memory. **Everything said of a whole model is extrapolated: the block's times, times the number of blocks**;
times are of one run after a warm-up on a few rows.

- corda: KPM, one sampling round. corda++: five rounds and dynamic ranks. farss: input and output-gradient covariances.
- Streamed memory, extrapolated: the block's own peak (weights, statistics, work space), the weights of the next block,
  and the hidden states of all rows (for farss, whose kept inputs grow with depth, on the CPU: given beside it).
- PEFT holds every covariance, then every U and V, at once: its memory is the block's growth times the number of blocks.
  It takes batches of one row, and repeats a covariance for layers that share their input.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.gang import quiet_libraries
from harness.measurement import Phase, in_words, measured
from harness.methods.registry import build_method
from harness.models.sharing import input_groups
from harness.models.targets import describe, target_modules
from harness.statistics.covariance import collect_input_covariance
from harness.statistics.gradients import collect_gradient_statistics
from harness.statistics.statistic import Statistic

RESULTS = Path(__file__).parent / "results" / "init_7b_shapes.json"
VOCABULARY = 32000
AIMS = {"corda": 60, "farss": 90, "corda++": 240}  # seconds on one H100, LLaMA-2-7B, each within 24 GB


@dataclass(frozen=True)
class Shape:
    """A decoder's width, inner width of its MLP, attention heads and number of blocks."""

    width: int
    intermediate: int
    heads: int
    blocks: int


MODELS = {"7b": Shape(4096, 11008, 32, 32), "13b": Shape(5120, 13824, 40, 40), "small": Shape(128, 352, 4, 4)}
METHODS: dict[str, dict[str, Any]] = {
    "corda": {"name": "corda", "mode": "kpm"},
    "corda++": {"name": "corda", "mode": "kpm", "rounds": 5, "dynamic_rank": True},
    "farss": {"name": "farss", "shallow_layers": 0},
}


@dataclass(frozen=True)
class Line:
    """One method on one shape: seconds of one block, and what follows for the model (``extrapolated_…``)."""

    model: str
    method: str
    collection: float
    decomposition: float
    block_peak_bytes: int
    extrapolated_seconds: float
    extrapolated_bytes: int
    kept_inputs_bytes: int


def main() -> None:
    """Measure, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=("7b", "13b"))
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "peft"), default=(*METHODS, "peft"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows a pass, ours; PEFT's hook takes one")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {options.rows} rows of {options.length} tokens, rank {options.rank}, {options.dtype}")
    lines: list[Line] = []
    for model_name in options.models:
        shape = MODELS[model_name]
        rank = min(options.rank, shape.width // 4)
        model = one_block(shape, getattr(torch, options.dtype), options.length, device)
        ids = torch.randint(VOCABULARY, (options.rows, options.length), generator=torch.Generator().manual_seed(1))
        for method in options.methods:
            run = peft_block if method == "peft" else ours_block
            run(model, method, ids[: options.batch], options.batch, rank)  # libraries set themselves up
            with measured() as phase:
                collection, decomposition = run(model, method, ids, options.batch, rank)
            lines.append(extrapolated(model_name, method, model, ids, collection, decomposition, phase))
            print_line(lines[-1])
        del model
        free()
    print_table(lines)
    content = {"device": name, "rows": options.rows, "length": options.length, "rank": options.rank}
    options.out.write_text(json.dumps(content | {"lines": [asdict(line) for line in lines]}, indent=2) + "\n")
    print(f"\n{options.out}")


def one_block(shape: Shape, dtype: torch.dtype, length: int, device: torch.device) -> LlamaForCausalLM:
    """A decoder of one block with random weights and outlier channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        max_position_embeddings=length,
    )
    with device:
        model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for norm in (model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
            norm.weight[:: shape.width // 4] *= 60
    return model.eval()


def ours_block(
    model: LlamaForCausalLM, method_name: str, ids: torch.Tensor, batch: int, rank: int
) -> tuple[float, float]:
    """Seconds of collection and of decomposition of the block's layers."""
    method = build_method({**METHODS[method_name], "rank": rank}, 0)
    modules = target_modules(model, "all-linear")
    device = next(model.parameters()).device
    groups = input_groups(model, modules, {"input_ids": ids[:1, :8].to(device), "use_cache": False})
    request = method.statistics()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for rows in ids.split(batch):
            yield {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}

    with clock(device) as collection:
        if request.needs_gradients:
            rounds = [collect_gradient_statistics(model, modules, groups, batches(), request.kinds)]
        else:
            rounds = [
                {"input_covariance": collect_input_covariance(model, modules, groups, batches())}
                for _ in range(request.rounds)
            ]
    held = Held(rounds, groups)
    layers = describe(modules)
    with clock(device) as decomposition:
        findings = {}
        for layer in layers:
            findings[layer.name] = method.examine(layer, modules[layer.name].weight.detach(), held)
        ranks = method.ranks(layers, findings)
        for layer in layers:
            if ranks[layer.name]:
                weight = modules[layer.name].weight.detach()
                method.initialise(layer, weight, ranks[layer.name], held, findings[layer.name])
    return collection[0], decomposition[0]


class Held:
    """Collected statistics as a method reads them."""

    def __init__(self, rounds: list[dict[str, dict[str, Statistic]]], groups: dict[str, str]) -> None:
        self._rounds, self._groups = rounds, groups

    def input_covariance(self, layer: str, sampling_round: int = 0) -> Statistic:
        return self._rounds[sampling_round]["input_covariance"][self._groups[layer]]

    def output_gradient_covariance(self, layer: str) -> Statistic:
        return self._rounds[0]["output_gradient_covariance"][layer]


def peft_block(model: LlamaForCausalLM, _: str, ids: torch.Tensor, __: int, rank: int) -> tuple[float, float]:
    """Seconds of the two phases inside `preprocess_corda`, which is called as a user would."""
    from peft import LoraConfig
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    device = next(model.parameters()).device
    modules = target_modules(model, "all-linear")
    config = LoraConfig(
        r=rank,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in modules}),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm", verbose=False),
    )

    @torch.no_grad()
    def run() -> None:
        for row in ids.split(1):
            model(input_ids=row.to(device), use_cache=False)

    with clock(device) as whole:
        seconds: list[float] = []
        original = corda.collect_eigens

        def timed(*arguments: Any) -> None:
            with clock(device) as own:
                original(*arguments)
            seconds.extend(own)

        corda.collect_eigens = timed
        try:
            corda.preprocess_corda(model, config, run)
        finally:
            corda.collect_eigens = original
    for module in modules.values():
        del module.eigens
    return whole[0] - seconds[0], seconds[0]


def extrapolated(
    model_name: str,
    method: str,
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    collection: float,
    decomposition: float,
    phase: Phase,
) -> Line:
    """What one block's numbers mean for all blocks of the model."""
    blocks = MODELS[model_name].blocks
    item = model.dtype.itemsize
    weights = sum(p.numel() for p in model.model.layers[0].parameters()) * item
    hidden = ids.numel() * model.config.hidden_size * item
    if method == "peft":  # it holds the model, and what it needs of every block
        held, kept = (weights + phase.peak_bytes) * blocks, 0
    else:  # this block and the next one, what this block needs, the hidden states
        held, kept = 2 * weights + phase.peak_bytes + hidden, hidden * blocks if method == "farss" else 0
    return Line(
        model_name,
        method,
        collection,
        decomposition,
        phase.peak_bytes,
        (collection + decomposition) * blocks,
        held,
        kept,
    )


@contextmanager
def clock(device: torch.device) -> Iterator[list[float]]:
    """Seconds of the block, work on the accelerator included, appended to what is yielded."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    taken: list[float] = []
    began = time.perf_counter()
    yield taken
    wait()
    taken.append(time.perf_counter() - began)


def free() -> None:
    """Give memory back between models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_line(line: Line) -> None:
    """Progress: one measured method."""
    print(f"{line.model} {line.method}: block {line.collection:.2f} s + {line.decomposition:.2f} s")


def print_table(lines: list[Line]) -> None:
    """All lines as Markdown."""
    print("\n| model | method | collection, one block | decomposition, one block | peak on top, one block ", end="")
    print("| whole model, extrapolated | memory, extrapolated | kept inputs (CPU) | aim for 7b |")
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        aim = f"≤ {AIMS[line.method]} s, 24 GB" if line.model == "7b" and line.method in AIMS else ""
        print(
            f"| {line.model} | {line.method} | {line.collection:.2f} s | {line.decomposition:.2f} s "
            f"| {in_words(line.block_peak_bytes)} | {line.extrapolated_seconds:.0f} s "
            f"| {in_words(line.extrapolated_bytes)} | {in_words(line.kept_inputs_bytes)} | {aim} |"
        )


if __name__ == "__main__":
    main()
