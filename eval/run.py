"""Evaluate a model, and any number of LoRA adapters on it, on lm-eval tasks."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import UserError

EXAMPLE = "Example: python eval/run.py models/base --adapter runs/demo/adapter --tasks triviaqa,gsm8k --limit 200"


def main(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated task names: local YAML tasks or lm-eval's own.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="PEFT LoRA folder; may be given several times.")] = None,
    backend: Annotated[str, typer.Option(help="vllm or hf.")] = "vllm",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of local tasks' data files.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task YAML files.")] = None,
    limit: Annotated[int | None, typer.Option(help="First items of each task only.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per batch of hf; vllm schedules by itself.", min=1)] = 64,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Share of a GPU for vllm.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Evaluate MODEL, then each adapter on it, and print the scores as JSON."""
    from harness.evaluation.engines import Candidate, evaluate
    from harness.files import write_json

    candidates = [Candidate("model", None, model)]
    candidates += [Candidate(str(folder), None, model, folder) for folder in adapter or []]
    try:
        scores = evaluate(
            candidates,
            tasks.split(","),
            backend=backend,
            dtype=dtype,
            data_dir=data_dir,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            gpu_memory_utilization=gpu_memory_utilization,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    content = [{key: value for key, value in asdict(one).items() if key not in ("answers", "step")} for one in scores]
    print(json.dumps(content, indent=2))
    if output is not None:
        write_json(output, content)


if __name__ == "__main__":
    cli = typer.Typer(add_completion=False)
    cli.command(epilog=EXAMPLE)(main)
    cli()
