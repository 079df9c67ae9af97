"""Answer MT-Bench's questions with a model, and have the answers marked by a judge behind an OpenAI-compatible API."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import UserError

EXAMPLE = (
    "Example: python eval/mt_bench.py --model models/base --adapter runs/demo/adapter --data-dir data "
    "--judge http://localhost:8000/v1 --judge-model judge --out mt_bench.json"
)


def main(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    data_dir: Annotated[Path, typer.Option(help="Folder that holds mt_bench/question.jsonl.")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT LoRA folder.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Address of the judge; without one, answers are written only.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name on its server.")] = None,
    judge_prompts: Annotated[Path | None, typer.Option(help="MT-Bench's judge_prompts.jsonl; else our own.")] = None,
    backend: Annotated[str, typer.Option(help="vllm or hf.")] = "vllm",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 1024,
    out: Annotated[Path | None, typer.Option(help="Write answers and marks to this JSON file.")] = None,
) -> None:
    """Answer both turns of every question; with --judge, print the mean marks as JSON."""
    from harness.evaluation import mt_bench
    from harness.evaluation.candidates import adapter_rank
    from harness.evaluation.engines import open_engine
    from harness.evaluation.openai_client import OpenAIClient
    from harness.evaluation.verbosity import quiet_libraries
    from harness.files import write_json

    try:
        if judge is not None and judge_model is None:
            raise UserError("--judge-model: nothing given; name the judge's model on its server")
        questions = mt_bench.read_questions(data_dir / "mt_bench" / "question.jsonl")
        prompts = None if judge_prompts is None else mt_bench.read_judge_prompts(judge_prompts)
        rank = 0 if adapter is None else adapter_rank(adapter)
        with quiet_libraries(), open_engine(model, backend, dtype, 16, rank, 0, None) as engine:
            engine.use_adapter(adapter)
            answers = mt_bench.answer(engine, questions, max_tokens)
        content = {"answers": {question.id: said for question, said in zip(questions, answers, strict=True)}}
        if judge is not None and judge_model is not None:
            marks = mt_bench.judge(OpenAIClient(judge), judge_model, questions, answers, prompts)
            content |= {"marks": [asdict(mark) for mark in marks], "judge": judge_model}
            content |= mt_bench.summary(questions, marks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({key: value for key, value in content.items() if key != "marks"}, indent=2))
    if out is not None:
        write_json(out, content)


if __name__ == "__main__":
    cli = typer.Typer(add_completion=False)
    cli.command(epilog=EXAMPLE)(main)
    cli()
