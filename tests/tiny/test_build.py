"""Building, caching and the files of an embedded world."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from harness.files import sha256
from harness.resources import find
from harness.tiny import TinyOptions, TinyWorld, build, small_options
from harness.tiny.pretrain import exact_match


def barely_trained() -> TinyOptions:
    options = small_options()
    return replace(options, pretrain=replace(options.pretrain, steps=3))


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate(world: TinyWorld, items: list[dict[str, str]]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(world.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(world.model)
    batch = tokenizer([item["prompt"] for item in items], padding=True, return_tensors="pt")
    output = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=16)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build(tmp_path_factory.mktemp("cache"), barely_trained())


def test_files_columns_and_counts(world: TinyWorld) -> None:
    assert {frozenset(row) for row in rows(world.train)} == {frozenset({"prompt", "response"})}
    assert {frozenset(row) for row in rows(world.preserve)} == {frozenset({"question"})}
    seen, heldout, reverse = (
        rows(world.data_dir / f"{name}.jsonl") for name in ("facts_seen", "facts_heldout", "reverse_test")
    )
    assert {frozenset(row) for row in seen + heldout + reverse} == {frozenset({"prompt", "answer"})}
    assert (len(seen), len(heldout), len(reverse), len(rows(world.train))) == (48, 12, 40, 400)
    assert [row["question"] for row in rows(world.preserve)] == [row["prompt"] for row in seen]
    assert not {row["prompt"] for row in seen} & {row["prompt"] for row in heldout}
    assert not {row["prompt"] for row in rows(world.train)} & {row["prompt"] for row in reverse}
    assert all(row["answer"] == row["answer"].strip() != "" for row in seen + heldout + reverse)


def test_the_model_is_a_plain_hugging_face_folder(world: TinyWorld) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.model)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings >= 128
    assert model.num_parameters() == world.info["counts"]["parameters"]
    generation = GenerationConfig.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not generation.do_sample
    assert not list(world.model.glob("*.bin"))


def test_the_same_options_give_the_same_bytes(world: TinyWorld, tmp_path: Path) -> None:
    again = build(tmp_path, barely_trained())
    first_folder, again_folder = world.model.parent, again.model.parent
    files = sorted(path.relative_to(first_folder) for path in first_folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again_folder) for path in again_folder.rglob("*") if path.is_file())
    for file in files:
        if file.name != "info.json":  # holds the seconds that it took
            assert sha256(first_folder / file) == sha256(again_folder / file), file


def test_a_second_call_takes_it_from_the_cache(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.model.parent
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("PALIMPSEST_CACHE", str(folder.parent))
    assert build(options=barely_trained()) == world
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written


def test_other_options_are_another_world(world: TinyWorld) -> None:
    cache = world.model.parent.parent
    options = barely_trained()
    other = build(cache, replace(options, world=replace(options.world, seed=1)))
    assert other.model != world.model
    assert other.preserve.read_bytes() != world.preserve.read_bytes()


def test_what_a_killed_build_left_is_swept_away(tmp_path: Path, world: TinyWorld) -> None:
    staging = tmp_path / f".{world.model.parent.name}.staging"
    staging.mkdir()
    (staging / "half").write_text("half")
    made = build(tmp_path, barely_trained())
    assert not staging.exists()
    assert not (made.model.parent / "half").exists()


@pytest.mark.slow
def test_processes_at_once_build_it_once(tmp_path: Path) -> None:
    script = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from harness.tiny import build, small_options\n"
        "options = small_options()\n"
        "options = replace(options, pretrain=replace(options.pretrain, steps=3))\n"
        "print(build(Path(sys.argv[1]), options).info)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    (first_out, first_err), (second_out, second_err) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first_err + second_err
    assert first_out == second_out != ""
    assert (first_err + second_err).count("building the embedded world") == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [
        build(tmp_path, barely_trained()).model.parent.name
    ]


def test_tasks_name_files_and_columns_that_exist(world: TinyWorld) -> None:
    files = set()
    for path in sorted(find("eval/tasks/tiny").glob("*.yaml")):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert task["task"] == path.stem
        assert task["tag"] == "tiny"
        assert task["generation_kwargs"]["do_sample"] is False
        file = task["dataset_kwargs"]["data_files"][task["test_split"]]
        columns = rows(world.data_dir / file)[0].keys()
        assert {task["doc_to_text"], task["doc_to_target"]} == {f"{{{{{column}}}}}" for column in columns}
        files.add(file)
    assert files == {path.name for path in world.data_dir.iterdir()}


@pytest.mark.slow
def test_pre_training_teaches_the_facts_and_not_the_skill(world: TinyWorld, tmp_path: Path) -> None:
    assert max(world.info["exact_match"].values()) < 0.1
    trained = build(tmp_path, small_options())
    assert trained.info["exact_match"]["facts_seen"] > 0.8
    assert trained.info["exact_match"]["facts_heldout"] > 0.4
    assert trained.info["exact_match"]["reverse_test"] < 0.1

    seen = rows(trained.data_dir / "facts_seen.jsonl")
    answers = generate(trained, seen)
    generated = sum(answer.strip() == row["answer"] for answer, row in zip(answers, seen, strict=True)) / len(seen)
    model = AutoModelForCausalLM.from_pretrained(trained.model)
    assert generated == exact_match(model, AutoTokenizer.from_pretrained(trained.model), seen)
