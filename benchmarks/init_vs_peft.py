"""CorDA's initialisation beside PEFT's `preprocess_corda`: time of each phase, peak memory, error to float64.

    .venv/bin/python benchmarks/init_vs_peft.py                    all shapes; about half an hour on two cores
    .venv/bin/python benchmarks/init_vs_peft.py --shapes d1024 --rounds 3

Llamas with random weights, some channels 60 times the rest, and one context of 512 random tokens a batch: PEFT's hook
asks for batches of one row. Rank 64; memory and errors are of KPM. In every round both sides do their whole work in the
same process, one after the other, and in the next round the other one begins. Phases:

- forward: the model alone on the same batches; each side's collection is given as what it takes on top of that.
- collection: hooks and the pass. Ours is resident here (one covariance for layers that share an input).
- decomposition: from weights and covariances to B and A. Ours with the full solver (KPM), and as the init stage does it
  (`auto`, which takes a partial solver) in KPM and IPM.
- whole: collection and decomposition, with what PEFT does besides in `preprocess_corda` (it crops).

Peak memory is measured in processes of their own, with an allocator that gives large blocks back at once, for both
sides: what the resident set grows by, mapped files among it, from before the model is loaded. Ours is that of the
stages `calibrate` and `init`, from files to files. Where the whole model is loaded (PEFT, ours resident) its weights
are subtracted; ours streamed contains those that it holds. Errors are ‖B·A − truth‖ / ‖truth‖ of the layers of one
block, each against float64 on the covariance and damping that it used itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.gang import quiet_libraries

RESULTS = Path(__file__).parent / "results" / "init_vs_peft.json"
RANK, TOKENS, VOCABULARY = 64, 512, 1000


@dataclass(frozen=True)
class Shape:
    """Width, blocks, rows of `TOKENS` tokens, and how often both sides take their turn; 0: memory alone."""

    width: int
    blocks: int
    rows: int
    rounds: int
    dtype: str = "float32"

    @property
    def intermediate(self) -> int:
        return self.width * 11 // 4


SHAPES = {
    "d1024": Shape(1024, 4, 8, 3),
    "d1024-bf16": Shape(1024, 4, 8, 3, "bfloat16"),
    "d2048": Shape(2048, 2, 8, 2),
    "d2048-bf16": Shape(2048, 2, 8, 2, "bfloat16"),
    "d1024-16": Shape(1024, 16, 8, 0),
    "tiny": Shape(64, 2, 2, 2),  # to see that the script works
}
ALL = ("d1024", "d1024-bf16", "d2048", "d2048-bf16", "d1024-16")
# Solver and mode. PEFT does the same work in both modes.
WAYS = {"full solver": ("gram", "kpm"), "kpm, auto": ("auto", "kpm"), "ipm, auto": ("auto", "ipm")}
# What the ratios are meant to be: PEFT's time over ours, ours over the forward pass, our memory over PEFT's.
AIMS = {
    "decomposition (full solver)": "≥ 2",
    "decomposition (kpm, auto)": "≥ 4",
    "decomposition (ipm, auto)": "≥ 4",
} | {f"whole ({way})": "≥ 2, ≥ 3 in bf16" for way in WAYS}


def main() -> None:
    """Measure the shapes asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=ALL)
    parser.add_argument("--rounds", type=int, default=None, help="instead of each shape's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    import torch

    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print(json.dumps(peak_memory(SHAPES[options.shapes[0]], options.memory_of, Path(options.model))))
        return
    content = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name in options.shapes:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            save_model(shape, Path(folder))
            measured = timed(shape, Path(folder), options.rounds or shape.rounds) if shape.rounds else None
            memory = {
                way: memory_in_own_process(name, way, Path(folder), options.threads)
                for way in ("peft", "ours resident", "ours streamed")
            }
            errors = errors_of_one_block(shape, Path(folder)) if shape.width <= 1024 and shape.rounds else None
        content[name] = {
            **{"width": shape.width, "intermediate": shape.intermediate, "blocks": shape.blocks, "dtype": shape.dtype},
            **{"tokens": shape.rows * TOKENS, "rank": RANK, "threads": options.threads},
            **{"times": measured, "peak_mib": memory, "errors": errors},
        }
        print_tables(name, content[name])
        options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{options.out}")


def save_model(shape: Shape, folder: Path) -> None:
    """A Llama of this shape with random weights; some channels of the residual stream stand out, as in real ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=max(4, shape.width // 64),
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[:: shape.width // 4] *= 60
    model.to(getattr(torch, shape.dtype)).save_pretrained(folder)


def load(shape: Shape, folder: Path) -> Any:
    """The saved model in its own dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, shape.dtype)).eval()


def batches(shape: Shape) -> list[dict[str, Any]]:
    """Rows of random tokens, one a batch, without padding."""
    import torch

    ids = torch.randint(VOCABULARY, (shape.rows, 1, TOKENS), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def target_layers(model: Any) -> dict[str, Any]:
    """All linear layers but the output embedding."""
    from harness.models.targets import target_modules

    return target_modules(model, "all-linear")


# -- the two sides ---------------------------------------------------------------------------------------------------


def our_covariances(model: Any, shape: Shape) -> dict[str, Any]:
    """Layer → its statistic, collected with the whole model at hand."""
    from harness.models.sharing import input_groups
    from harness.statistics.covariance import collect_input_covariance

    modules = target_layers(model)
    probe = batches(shape)[0]["input_ids"][:, :8]
    groups = input_groups(model, modules, {"input_ids": probe, "use_cache": False})
    collected = collect_input_covariance(model, modules, groups, batches(shape))
    return {name: collected[groups[name]] for name in modules}


class Held:
    """Collected covariances as a method reads them."""

    def __init__(self, covariances: dict[str, Any]) -> None:
        self._covariances = covariances

    def input_covariance(self, layer: str, sampling_round: int = 0) -> Any:
        return self._covariances[layer]


def our_adapters(model: Any, covariances: dict[str, Any], solver: str, mode: str = "kpm") -> dict[str, Any]:
    """Layer → its adapter at step 0, through the method itself, layers side by side as in the init stage."""
    import torch

    from harness.measurement import available_memory
    from harness.methods.registry import build_method
    from harness.models.targets import Layer, describe
    from harness.stages.plan import layer_cost
    from harness.stages.side_by_side import begin_order, layers_at_a_time, side_by_side

    method = build_method({"name": "corda", "mode": mode, "rank": RANK}, 0)
    method.solver = solver
    modules = target_layers(model)
    held = Held(covariances)
    layers = describe(modules)
    costs = [layer_cost(method, layer) for layer in layers]
    cpu = torch.device("cpu")
    workers = layers_at_a_time(cpu, [cost.bytes for cost in costs], available_memory(cpu))
    layers = [layers[i] for i in begin_order([cost.on_cpu for cost in costs], workers)]

    def adapter(layer: Layer) -> Any:
        return method.initialise(layer, modules[layer.name].weight.detach(), RANK, held, {})

    return {layer.name: initial for layer, initial in side_by_side(adapter, layers, workers)}


def peft_config(model: Any) -> Any:
    """PEFT's configuration of the same adapters."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig

    targets = sorted({name.rsplit(".", 1)[-1] for name in target_layers(model)})
    corda = CordaConfig(corda_method="kpm", verbose=False, prune_temporary_fields=False)
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights="corda", corda_config=corda)


def run_rows(model: Any, shape: Shape) -> Callable[[], None]:
    """What PEFT calls to let the model see the rows."""
    import torch

    def run() -> None:
        with torch.no_grad():
            for batch in batches(shape):
                model(**batch, use_cache=False)

    return run


def clean(model: Any) -> None:
    """Take away what PEFT left at the modules."""
    for module in target_layers(model).values():
        for name in ("eigens", "sample_count", "covariance_matrix", "corda_method", "rank"):
            if hasattr(module, name):
                delattr(module, name)


# -- time ------------------------------------------------------------------------------------------------------------


def timed(shape: Shape, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of every phase in every round, and ratios round by round."""
    model = load(shape, folder)
    seconds: dict[str, list[float]] = {}
    run_rows(model, shape)()  # the first pass sets libraries up
    for number in range(rounds):
        sides = [ours_timed, peft_timed]
        for side in sides if number % 2 == 0 else reversed(sides):
            for phase, taken in side(model, shape).items():
                seconds.setdefault(phase, []).append(taken)
        with clock() as taken:
            run_rows(model, shape)()
        seconds.setdefault("forward", []).append(taken[0])

    def per_round(value: Callable[[dict[str, float]], float]) -> dict[str, float]:
        values = [value({phase: taken[i] for phase, taken in seconds.items()}) for i in range(rounds)]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    ratios = {
        "collection on top of a forward pass, ours": per_round(lambda s: s["ours: collection"] / s["forward"] - 1),
        "collection on top of a forward pass, PEFT": per_round(lambda s: s["peft: collection"] / s["forward"] - 1),
    }
    for way in WAYS:
        ratios[f"decomposition ({way})"] = per_round(
            lambda s, way=way: s["peft: decomposition"] / s[f"ours: decomposition ({way})"]
        )
        ratios[f"whole ({way})"] = per_round(
            lambda s, way=way: s["peft: whole"] / (s["ours: collection"] + s[f"ours: decomposition ({way})"])
        )
    return {"seconds": {phase: statistics.median(taken) for phase, taken in seconds.items()}, "ratios": ratios}


def ours_timed(model: Any, shape: Shape) -> dict[str, float]:
    """Our phases."""
    taken: dict[str, float] = {}
    with clock() as collection:
        covariances = our_covariances(model, shape)
    taken["ours: collection"] = collection[0]
    for way, (solver, mode) in WAYS.items():
        with clock() as decomposition:
            our_adapters(model, covariances, solver, mode)
        taken[f"ours: decomposition ({way})"] = decomposition[0]
    return taken


def peft_timed(model: Any, shape: Shape) -> dict[str, float]:
    """PEFT's phases: `preprocess_corda` as a whole, and the steps that it consists of, timed inside that one call."""
    from peft.tuners.lora import corda

    taken: dict[str, float] = {}
    originals = {"collection": corda.calib_cov_distribution, "decomposition": corda.collect_eigens}

    def timed_step(phase: str) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            with clock() as own:
                result = originals[phase](*arguments)
            taken[f"peft: {phase}"] = own[0]
            return result

        return step

    corda.calib_cov_distribution = timed_step("collection")
    corda.collect_eigens = timed_step("decomposition")
    try:
        with clock() as whole:
            corda.preprocess_corda(model, peft_config(model), run_rows(model, shape))
    finally:
        corda.calib_cov_distribution, corda.collect_eigens = originals["collection"], originals["decomposition"]
    clean(model)
    taken["peft: whole"] = whole[0]
    return taken


@contextmanager
def clock() -> Iterator[list[float]]:
    """The block's seconds, appended to what is yielded."""
    taken: list[float] = []
    began = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - began)


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_in_own_process(name: str, way: str, folder: Path, threads: int) -> float:
    """MiB that ``way`` takes at its peak, measured in a fresh process."""
    command = [sys.executable, __file__, "--shapes", name, "--memory-of", way, "--model", str(folder)]
    answer = subprocess.run([*command, "--threads", str(threads)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(answer.strip().splitlines()[-1])


def peak_memory(shape: Shape, way: str, folder: Path) -> float:
    """MiB by which ``way`` raises the largest resident set of this process, a loaded model left out."""
    with tempfile.TemporaryDirectory() as small:
        save_model(SHAPES["tiny"], Path(small))
        whole_peak(SHAPES["tiny"], way, Path(small))  # what libraries allocate once
    peak = whole_peak(shape, way, folder)
    if way != "ours streamed":
        peak -= sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return peak / 2**20


def whole_peak(shape: Shape, way: str, folder: Path) -> int:
    """Bytes, with the model: PEFT's call on the loaded model, or the stages `calibrate` and `init`, files to files."""
    from harness.config import resolve
    from harness.measurement import measured
    from harness.memory import freed_at_once
    from harness.run_directory import RunDirectory
    from harness.stages.calibrate import calibrate
    from harness.stages.initialise import initialise

    with measured() as phase, freed_at_once(), tempfile.TemporaryDirectory() as place:
        if way == "peft":
            from peft.tuners.lora.corda import preprocess_corda

            model = load(shape, folder)
            preprocess_corda(model, peft_config(model), run_rows(model, shape))
        else:
            config = resolve(run_content(shape, folder, Path(place), way.removeprefix("ours ")))
            run = RunDirectory(config.run_directory)
            calibrate(config, run)
            initialise(config, run)
    return phase.peak_bytes


def run_content(shape: Shape, model: Path, place: Path, collection: str) -> dict[str, Any]:
    """A run's configuration on the saved model, whose tokenizer (a word per token) and rows are made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(model)
    rows = [" ".join(f"w{i}" for i in batch["input_ids"][0].tolist()) for batch in batches(shape)]
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = {"path": str(data), "prompt": "text", "samples": shape.rows}
    return {
        "name": "run",
        "model": {"path": str(model), "dtype": shape.dtype},
        "data": {"train": source, "preserve": source, "max_length": TOKENS},
        "method": {"name": "corda", "mode": "kpm", "rank": RANK},
        "init": {"collection": collection, "cache": False},
        "output_dir": str(place),
    }


# -- error -----------------------------------------------------------------------------------------------------------


def errors_of_one_block(shape: Shape, folder: Path) -> dict[str, dict[str, float]]:
    """Relative errors of B·A, layer by layer, ours (`auto`) and PEFT's."""
    from peft.tuners.lora.corda import preprocess_corda

    from tests.decomposition.reference import paper_block

    model = load(shape, folder)
    covariances = our_covariances(model, shape)
    modules = {name: module for name, module in target_layers(model).items() if ".layers.0." in name}
    adapters = our_adapters(model, covariances, "auto")
    preprocess_corda(model, peft_config(model), run_rows(model, shape))
    errors: dict[str, dict[str, float]] = {}
    for name, module in modules.items():
        W = module.weight.detach()
        initial = adapters[name]
        ours = initial.B.double() @ initial.A.double()
        own_truth = paper_block(W, covariances[name].matrix, 0.01, RANK, "kpm")
        eigens = module.eigens
        sigma = eigens.S_WC.double()
        theirs = (eigens.U_WC.double() * sigma) @ eigens.V_WC.double().T
        damping = peft_damping(module.covariance_matrix)
        peft_truth = paper_block(W, module.covariance_matrix, damping, RANK, "kpm")
        errors[name] = {
            "ours": float((ours - own_truth).norm() / own_truth.norm()),
            "peft": float((theirs - peft_truth).norm() / peft_truth.norm()),
            "peft_damping": damping,
        }
    return errors


def peft_damping(covariance: Any) -> float:
    """The damping that PEFT's rule ends with."""
    from harness.decomposition.context_svd import reference_damping

    return reference_damping(covariance)


# -- tables ----------------------------------------------------------------------------------------------------------


def print_tables(name: str, entry: dict[str, Any]) -> None:
    """Ratios, seconds, memory and errors of one shape as Markdown."""
    print(
        f"\n{name}: width {entry['width']}, {entry['blocks']} blocks, {entry['dtype']}, {entry['tokens']} tokens, "
        f"{entry['threads']} threads\n"
    )
    if entry["times"] is not None:
        print_times(entry["times"])
    peft = entry["peak_mib"]["peft"]
    print("\n| peak memory on top | MiB | of PEFT's | aim |")
    print("|---|---|---|---|")
    for way, aim in (("peft", ""), ("ours resident", "≤ 1/3"), ("ours streamed", "≤ 1/10")):
        print(f"| {way} | {entry['peak_mib'][way]:.0f} | {entry['peak_mib'][way] / peft:.2f} | {aim} |")
    if entry["errors"]:
        print("\n| layer of block 0 | our error | PEFT's error | PEFT's damping |")
        print("|---|---|---|---|")
        for layer, error in entry["errors"].items():
            print(f"| {layer} | {error['ours']:.1e} | {error['peft']:.1e} | {error['peft_damping']} |")


def print_times(times: dict[str, Any]) -> None:
    """Ratios and seconds of one shape as Markdown."""
    print("| ratio | median | min | max | aim |")
    print("|---|---|---|---|---|")
    for what, ratio in times["ratios"].items():
        aim = AIMS.get(what, "≤ 0.5" if what.endswith("ours") else "")
        shown = what if "forward" in what else f"PEFT's time over ours: {what}"
        print(f"| {shown} | {ratio['median']:.2f} | {ratio['min']:.2f} | {ratio['max']:.2f} | {aim} |")
    print("\n| phase | seconds (median) |")
    print("|---|---|")
    for phase, seconds in times["seconds"].items():
        print(f"| {phase} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
