"""Evaluate a model, and any number of LoRA adapters on it, on lm-eval tasks: any model, trained here or not."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import UserError

EXAMPLE = (
    "Example: python eval/run.py --model models/base --adapter runs/demo/adapter --tasks triviaqa,gsm8k --limit 200"
)
NOT_PRINTED = ("answers", "items", "step")


def main(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated: suites, local YAML tasks or lm-eval's own.")],
    adapter: Annotated[
        list[Path] | None, typer.Option(help="PEFT LoRA folder, or its name on the server; may be given several times.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Evaluate the model itself too, before its adapters.")] = True,
    backend: Annotated[str, typer.Option(help="vllm, hf or server.")] = "vllm",
    server: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server, for server.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of local tasks' data files.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task YAML files.")] = None,
    limit: Annotated[int | None, typer.Option(help="First items of each task only.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per batch of hf; vllm schedules by itself.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of sampling, for tasks that sample.")] = 0,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Share of a GPU for vllm.")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that one vllm engine is spread over.", min=1)] = 1,
    engines: Annotated[int, typer.Option(help="Engines that share the items, each on its own GPUs.", min=1)] = 1,
    cache: Annotated[bool, typer.Option(help="Take scores that are known, and keep new ones.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Evaluate a model, then each adapter on it, and print the scores as JSON."""
    from harness.evaluation.engines import Candidate, evaluate
    from harness.evaluation.suites import expand
    from harness.files import write_json

    candidates = [Candidate("model", None, model)] if base or not adapter else []
    candidates += [Candidate(str(folder), None, model, folder) for folder in adapter or []]
    try:
        scores = evaluate(
            candidates,
            expand(tasks.split(","), include_path),
            backend=backend,
            server=server,
            dtype=dtype,
            data_dir=data_dir,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel=tensor_parallel,
            engines=engines,
            cache=cache,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    content = [{key: value for key, value in asdict(one).items() if key not in NOT_PRINTED} for one in scores]
    print(json.dumps(content, indent=2))
    if out is not None:
        write_json(out, content)


if __name__ == "__main__":
    cli = typer.Typer(add_completion=False)
    cli.command(epilog=EXAMPLE)(main)
    cli()
