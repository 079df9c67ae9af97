"""Small run directories, written as the stages write them."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.evaluation.items import Item
from harness.evaluation.scores import CandidateScores, TaskScore
from harness.evaluation.stage import results as evaluated_results
from harness.evaluation.stage import write_all_items
from harness.run_directory import RunDirectory

STEPS = 40
KNOWLEDGE = {"facts_seen": 0.98, "facts_heldout": 0.96}


def write_run(
    run: Path,
    name: str = "corda-anchor",
    method: Mapping[str, Any] | None = None,
    anchor: Mapping[str, Any] | None = None,
    learning_rate: float = 3e-3,
    end: tuple[float, float] = (0.975, 0.95),
    steps: int = STEPS,
    checkpoints: tuple[int, ...] = (10, 20, 30),
    full_fine_tuning: str | None = None,
) -> Path:
    """A finished run that ends at (T, K) = ``end``, with every part of the run directory."""
    method = dict(method or {"name": "corda", "mode": "kpm", "rank": 8, "alpha": 8})
    config = {
        "name": name,
        "model": {"path": "models/tiny", "dtype": "float32", "target_modules": "all-linear"},
        "data": {"train": {"path": "reverse.jsonl", "split": "train"}, "max_length": 64},
        "method": method,
        "anchor": anchor,
        "train": {"learning_rate": learning_rate, "max_steps": steps, "batch_size": 32, "seed": 0},
        "eval": {"backend": "vllm", "knowledge": list(KNOWLEDGE), "task": ["reverse"]},
        "output_dir": "runs",
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {"versions": {"torch": "2.13.0", "vllm": "0.32.0"}, "hardware": {"gpus": []}, "seed": 0}
    write_json(run / "environment.json", environment)
    write_metrics(run / "metrics.jsonl", metric_lines(steps, penalty="anchor_kl" if anchor else None))
    write_json(run / "init" / "report.json", initialisation(method["name"]))
    write_json(run / "eval" / "results.json", results(end, steps, checkpoints, full_fine_tuning))
    for folder in ("adapter", "merged", "checkpoints"):
        (run / folder).mkdir()
    write_json(run / "adapter" / "adapter_config.json", {"r": 16, "rank_pattern": {"q_proj": 24}})
    return run


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metric_lines(steps: int, penalty: str | None = None, every: int = 5) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "seconds": 0.4, "preserve_loss": 0.21}]
    for step in range(every, steps + 1, every):
        line = {"step": step, "epoch": step / 125, "seconds": step / 3, "loss": 3.0 * math.exp(-step / 12)}
        line |= {"learning_rate": 1e-3, "grad_norm": 1.0}
        lines.append(line | ({penalty: 0.3 * (1 - math.exp(-step / 9))} if penalty else {}))
    return [*lines, {"step": steps, "epoch": steps / 125, "seconds": steps / 3 + 1, "preserve_loss": 0.264}]


def diagnostic_lines(steps: int, every: int = 10, slope: float = 0.05) -> list[dict[str, Any]]:
    """What `train.diagnostics_steps` and `train.preserve_loss_steps` log, of two module types; ΔW is zero at first."""
    lines = []
    for step in range(0, steps + 1, every):
        line: dict[str, Any] = {"step": step, "epoch": step / 125, "seconds": step / 3}
        line |= {"preserve_accuracy": 0.6 - step / 200, "preserve_perplexity": 1.2 + step / 50}
        for kind, share in (("self_attn.q_proj", 1.0), ("mlp.up_proj", 0.5), ("all", 0.75)):
            line |= {f"spectral_norm/{kind}": slope * share * step, f"spectral_norm_max/{kind}": slope * step}
            line |= {f"orthogonality_error/{kind}": 0.1 * share * math.exp(-step / 9)}
            line |= {f"amplification_w_to_dw/{kind}": share * step / 10} if step else {}
        lines.append(line)
    return lines


def initialisation(method: str) -> dict[str, Any]:
    layers = {
        f"model.layers.{block}.{module}": {
            "rank": rank,
            "shape": [32, 32],
            "damping": 0.01,
            "residual_norm": block + 1,
        }
        for block in range(2)
        for module, rank in (("self_attn.q_proj", 8), ("mlp.up_proj", 8))
    }
    return {"method": method, "layers": layers}


def results(
    end: tuple[float, float],
    steps: int,
    checkpoints: tuple[int, ...] = (),
    full_fine_tuning: str | None = None,
) -> dict[str, Any]:
    def model(name: str, step: int | None, t: float, k: float) -> dict[str, Any]:
        scores = {
            task: {"metric": "exact_match", "value": base * k, "stderr": 0.01, "items": 560}
            for task, base in KNOWLEDGE.items()
        }
        scores["reverse"] = {"metric": "exact_match", "value": t, "stderr": 0.008, "items": 400}
        return {"name": name, "step": step, "scores": scores, "seconds": 3.1, "samples_per_second": 300.4}

    def trained(name: str, step: int, t: float, k: float) -> dict[str, Any]:
        return model(name, step, t, k) | {"K": k, "T": t, "KT": 2 * k * t / (k + t) if k + t else 0.0}

    t, k = end
    models = [model("base", None, 0.02, 1.0)]
    for step in checkpoints:
        done = step / steps
        models.append(trained(f"step-{step}", step, t * done, 1 - (1 - k) * done))
    models.append(trained("final", steps, t, k))
    note = "T is the raw task score: no full fine-tuning result was given (eval.full_fine_tuning)"
    return {
        "schema": 1,
        "base_model": "models/tiny",
        "engine": "vllm",
        "knowledge": list(KNOWLEDGE),
        "task": ["reverse"],
        "models": models,
        **{key: models[-1][key] for key in ("K", "T", "KT")},
        "T_reference": full_fine_tuning,
        "notes": [] if full_fine_tuning else [note],
    }


def with_answers(
    run: Path,
    *,
    seed: int = 0,
    lost: float = 0.1,
    gained: float = 0.02,
    learned: float = 0.8,
    items: int = 200,
    knowledge: tuple[str, ...] = tuple(KNOWLEDGE),
    task: tuple[str, ...] = ("reverse",),
    checkpoints: tuple[int, ...] = (10, 20, 30),
    steps: int = STEPS,
    full_fine_tuning: Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Evaluate a run again, with answers: shares of right answers lost, of wrong ones gained, of the task learned.

    Questions and the base's answers depend on nothing but their number, so that runs can be paired.
    """
    names = (*knowledge, *task)
    base_right = {
        name: [random.Random(f"{name}{i}").random() < (0.7 if name in knowledge else 0.05) for i in range(items)]
        for name in names
    }

    def model(name: str, step: int | None, done: float) -> CandidateScores:
        scores, kept = {}, {}
        for one in names:
            generator = random.Random(f"{seed}{one}")
            rights = []
            for before in base_right[one]:
                chance, luck = generator.random(), generator.random()
                gain = (gained if one in knowledge else learned) * done
                rights.append((chance >= lost * done) if before else luck < gain)
            of_texts = texts or {}
            kept[one] = [
                Item(
                    id=f"{number}-{one}",
                    score=float(right),
                    question=of_texts.get("question", f"What is {one} of {number}?"),
                    expected=of_texts.get("expected", f"{number * 7}"),
                    answer=of_texts.get("answer", f"{number * 7 if right else number * 7 + 1 + len(name)}"),
                )
                for number, right in enumerate(rights)
            ]
            mean = sum(rights) / items
            stderr = math.sqrt(mean * (1 - mean) / max(1, items - 1))
            scores[one] = TaskScore("exact_match", mean, stderr, items)
        return CandidateScores(name, step, scores, 3.1, 300.4, {}, kept)

    base = model("base", None, 0.0)
    tuned = [model(f"step-{step}", step, step / steps) for step in checkpoints] + [model("final", steps, 1.0)]
    reference = None
    if full_fine_tuning is not None:
        final = json.loads((full_fine_tuning / "eval" / "results.json").read_text())["models"][-1]
        reference = {name: final["scores"][name]["value"] for name in task}
    content = evaluated_results(base, tuned, knowledge, task, full_fine_tuning, reference)
    write_all_items(RunDirectory(run).items, [base, *tuned])
    write_json(run / "eval" / "results.json", {"schema": 1, "base_model": "models/tiny", "engine": "vllm"} | content)
    return run
