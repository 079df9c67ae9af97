"""Bad configurations: one line each, with the key, what was given and the remedy, before any model is loaded."""

import copy
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config import RunConfig, load_config
from harness.errors import UserError
from harness.preflight import check

Content = dict[str, Any]
Change = Callable[[Content, Path], None]


def change(key: str, value: Any) -> Change:
    """Set ``key`` (dotted) to ``value``; ``{tmp}`` in a text becomes the test's folder."""

    def apply(content: Content, folder: Path) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            content = content.setdefault(parent, {})
        content[last] = value.replace("{tmp}", str(folder)) if isinstance(value, str) else value

    return apply


def remove(key: str) -> Change:
    def apply(content: Content, folder: Path) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            content = content[parent]
        del content[last]

    return apply


def leave(name: str, data: str | bytes) -> Change:
    """Leave a file in the test's folder."""

    def apply(content: Content, folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return apply


@dataclass
class Bad:
    """``changes`` to a good configuration, and what the one line has to say: key, value given, remedy."""

    changes: list[Change] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)


FULL = [change("method", {"name": "full"})]
LALORA = {"name": "lalora", "lambda": 1.0}
FCLORA = {"name": "fclora", "rank": 4}
BAD: dict[str, Bad] = {
    "negative lambda": Bad(
        [change("penalties", [LALORA | {"lambda": -1.0}])], ["penalties.0.lambda", "-1.0", "greater than or equal to 0"]
    ),
    "unknown curvature": Bad(
        [change("penalties", [LALORA | {"curvature": "kfak"}])],
        ["penalties.0.curvature", "'kfak'", "did you mean 'kfac'?"],
    ),
    "missing source of a penalty": Bad(
        [change("penalties", [LALORA | {"sources": [{"path": "{tmp}/none.jsonl", "prompt": "q"}]}])],
        ["penalties.0.sources.0.path", "none.jsonl", "no such file"],
    ),
    "missing column in a source of a penalty": Bad(
        [
            leave("more.jsonl", '{"text": "a"}\n'),
            change("penalties", [LALORA | {"sources": [{"path": "more.jsonl", "prompt": "txt"}]}]),
        ],
        ["penalties.0.sources.0.prompt", "'txt'", "did you mean 'text'?"],
    ),
    "penalty on an adapter over full fine-tuning": Bad(
        [change("method", {"name": "full"}), change("penalties", [LALORA])],
        ["lalora", "'full' has none", "adapter method"],
    ),
    "masked gradients over full fine-tuning": Bad(
        [change("method", {"name": "full"}), change("penalties", [{"name": "migu"}])],
        ["migu", "'full' has none", "adapter method"],
    ),
    "Kronecker factors of an adapter with more than A and B": Bad(
        [change("method", FCLORA), change("penalties", [LALORA | {"curvature": "kfac"}])],
        ["lalora", "'fclora' trains more", "curvature: diag"],
    ),
    "threshold of 1": Bad(
        [change("penalties", [{"name": "migu", "threshold": 1.0}])], ["penalties.0.threshold", "1.0", "less than 1"]
    ),
    "penalty without a preserve set": Bad(
        [change("method", {"name": "lora"}), change("penalties", [LALORA]), remove("data.preserve")],
        ["data.preserve", "missing", "lalora"],
    ),
    "negative gamma": Bad(
        [change("method", FCLORA | {"gamma": -0.1})], ["method.gamma", "-0.1", "greater than or equal"]
    ),
    "negative bound": Bad([change("method", FCLORA | {"bound": -1.0})], ["method.bound", "-1.0", "greater than"]),
    "fifth quartile": Bad([change("method", FCLORA | {"quartile": 5})], ["method.quartile", "5", "1, 2, 3 or 4"]),
    "quartile and bound": Bad(
        [change("method", FCLORA | {"quartile": 2, "bound": 1.0})], ["method.", "quartile", "bound"]
    ),
    "everything replayed": Bad([change("data.replay", {"ratio": 1.0})], ["data.replay.ratio", "1.0", "less than 1"]),
    "replay without rows": Bad(
        [change("method", {"name": "lora"}), change("data.replay", {"ratio": 0.1}), remove("data.preserve")],
        ["data.replay", "'ratio': 0.1", "data.preserve", "a data.replay.source of its own"],
    ),
    "prompts of an anchor on training rows": Bad(
        [change("anchor", {"data": "train", "prompts": 3})], ["anchor.prompts", "3", "anchor.data: train"]
    ),
    "final strength of a constant anchor": Bad(
        [change("anchor", {"final_kl": 3.0})], ["anchor.final_kl", "3.0", "anchor.schedule: linear or cosine"]
    ),
    "live anchor over full fine-tuning": Bad(
        [change("method", {"name": "full"}), change("anchor", {"kl": 1.0})], ["anchor", "second copy", "cached"]
    ),
    "diagnostics of full fine-tuning": Bad(
        [change("method", {"name": "full"}), change("train.diagnostics_steps", 5)],
        ["train.diagnostics_steps", "5", "no adapter"],
    ),
    "unknown key": Bad([change("trian", {"seed": 1})], ["trian", "{'seed': 1}", "did you mean 'train'?"]),
    "unknown nested key": Bad(
        [change("train.learning-rate", 1.0)], ["train.learning-rate", "1.0", "did you mean 'learning_rate'?"]
    ),
    "capital letters": Bad([change("train.Seed", 3)], ["train.Seed", "3", "did you mean 'seed'?"]),
    "unknown key with the name of a type": Bad(
        [change("list", 2)], ["list", "2", "allowed here: anchor, cluster, data"]
    ),
    "key that is no text": Bad([change("eval", {True: 2})], ["eval", "True", "quote it"]),
    "unknown method option": Bad([change("method.rnak", 8)], ["method.rnak", "8", "did you mean 'rank'?"]),
    "missing block": Bad([remove("model")], ["model", "missing", "add it"]),
    "missing key": Bad([remove("data.train.prompt")], ["data.train.prompt", "missing", "add it"]),
    "wrong type": Bad([change("train.seed", "one")], ["train.seed", "'one'", "an integer"]),
    "text for a block": Bad([change("model", "org/name")], ["model", "'org/name'", "a mapping of keys"]),
    "number for a list": Bad(
        [change("model.target_modules", 5)], ["model.target_modules", "5", "'all-linear+conv' or a list"]
    ),
    "not allowed": Bad([change("model.dtype", "bf16")], ["model.dtype", "'bf16'", "did you mean 'bfloat16'?"]),
    "zero": Bad([change("train.batch_size", 0)], ["train.batch_size", "0", "greater than 0"]),
    "bad name": Bad([change("name", "a/b")], ["name", "'a/b'", "A-Za-z0-9"]),
    "missing model folder": Bad(
        [change("model.path", "{tmp}/nowhere")], ["model.path", "nowhere", "no folder here and no hub id"]
    ),
    "folder that is no model": Bad(
        [leave("empty/readme", ""), change("model.path", "{tmp}/empty")],
        ["model.path", "empty", "save_pretrained"],
    ),
    "model without safetensors": Bad(
        [leave("pickled/config.json", "{}"), change("model.path", "{tmp}/pickled")],
        ["model.path", "pickled", "safetensors"],
    ),
    "damaged weights": Bad(
        [
            leave("cut/config.json", "{}"),
            leave("cut/model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
            change("model.path", "{tmp}/cut"),
        ],
        ["model.path", "cut/model.safetensors", "damaged"],
    ),
    "missing data file": Bad(
        [change("data.train.path", "{tmp}/none.jsonl")], ["data.train.path", "none.jsonl", "no such file"]
    ),
    "unknown kind of data file": Bad(
        [leave("rows.csv", "q,a\n"), change("data.train.path", "{tmp}/rows.csv")],
        ["data.train.path", "rows.csv", ".jsonl, .json, .parquet"],
    ),
    "missing column": Bad(
        [change("data.train.prompt", "qq")], ["data.train.prompt", "'qq'", "there are: q, a", "did you mean 'q'?"]
    ),
    "unreadable jsonl": Bad(
        [leave("rows.jsonl", "q,a\n1,2\n"), change("data.preserve.path", "{tmp}/rows.jsonl")],
        ["data.preserve.path", "rows.jsonl", "line 1 is not JSON", "one object a line"],
    ),
    "jsonl in another encoding": Bad(
        [leave("rows.jsonl", '{"q": "é"}'.encode("latin-1")), change("data.preserve.path", "{tmp}/rows.jsonl")],
        ["data.preserve.path", "rows.jsonl", "line 1 is not JSON", "utf-8"],
    ),
    "empty jsonl": Bad(
        [leave("rows.jsonl", "\n"), change("data.preserve.path", "{tmp}/rows.jsonl")],
        ["data.preserve.path", "rows.jsonl", "empty"],
    ),
    "broken parquet": Bad(
        [leave("rows.parquet", "no"), change("data.train.path", "{tmp}/rows.parquet")],
        ["data.train.path", "rows.parquet", "no readable Parquet file"],
    ),
    "bad split": Bad([change("data.train.split", "train[:10")], ["data.train.split", "'train[:10'", "train[:1000]"]),
    "split that a file has not": Bad(
        [change("data.train.split", "test")], ["data.train.split", "'test'", "one split: train"]
    ),
    "unknown template": Bad(
        [change("data.train.template", "alpaka")], ["data.train.template", "'alpaka'", "did you mean 'alpaca'?"]
    ),
    "unknown target module": Bad(
        [change("model.target_modules", ["q_prj"])],
        ["model.target_modules", "'q_prj'", "any of down_proj", "did you mean 'q_proj'?"],
    ),
    "rank larger than a layer": Bad(
        [change("method.rank", 65)], ["method.rank", "65", "layer model.layers.0.", "at most 64"]
    ),
    "unknown method": Bad([change("method", {"name": "cordaa"})], ["method.name", "'cordaa'", "did you mean 'corda'?"]),
    "method without a name": Bad([change("method", {"rank": 8})], ["method.name", "missing", "name: lora"]),
    "bad mode": Bad([change("method.mode", "kmp")], ["method.mode", "'kmp'", "did you mean 'kpm'?"]),
    "kpm without preserve": Bad([remove("data.preserve")], ["data.preserve", "missing", "corda"]),
    "anchor over full": Bad([*FULL, change("anchor", {"kl": 1.0})], ["anchor", "'full'", "lora, corda"]),
    "anchor without preserve": Bad(
        [change("method", {"name": "lora"}), change("anchor", {"kl": 1.0}), remove("data.preserve")],
        ["data.preserve", "missing", "anchor"],
    ),
    "negative kl": Bad([change("anchor", {"kl": -1.0})], ["anchor.kl", "-1.0", "greater than or equal to 0"]),
    "unknown penalty": Bad(
        [change("penalties", [{"name": "ancor"}])], ["penalties", "'ancor'", "did you mean 'anchor'?"]
    ),
    "preserve loss without preserve": Bad(
        [*FULL, remove("data.preserve"), change("train.preserve_loss_steps", 5)],
        ["data.preserve", "missing", "train.preserve_loss_steps"],
    ),
    "missing deepspeed file": Bad(
        [change("train.deepspeed", "zero9.json")], ["train.deepspeed", "zero9.json", "ds_configs/zero2.json"]
    ),
    "broken deepspeed JSON": Bad(
        [leave("zero.json", '{"zero_optimization": '), change("train.deepspeed", "{tmp}/zero.json")],
        ["train.deepspeed", "zero.json", "not JSON", "copy one of ds_configs"],
    ),
    "folder for deepspeed": Bad(
        [change("train.deepspeed", "ds_configs")], ["train.deepspeed", "ds_configs", "not JSON"]
    ),
    "stage 0": Bad(
        [leave("zero.json", '{"zero_optimization": {"stage": 0}}'), change("train.deepspeed", "{tmp}/zero.json")],
        ["train.deepspeed", "zero_optimization.stage is 0", "allowed: 1, 2, 3"],
    ),
    "batch that ranks do not divide": Bad(
        [change("train.ranks", 5)], ["train.batch_size", "12", "multiple of train.ranks"]
    ),
    "batch that micro-batches do not divide": Bad(
        [change("train.micro_batch_size", 7)], ["train.batch_size", "12", "train.micro_batch_size = 1 × 7"]
    ),
    "ranks in words": Bad([change("train.ranks", "all")], ["train.ranks", "'all'", "an integer or 'auto'"]),
    "unknown task": Bad(
        [change("eval", {"task": ["tiny_revers"]})], ["eval", "'tiny_revers'", "nearest", "tiny_reverse"]
    ),
    "missing task folder": Bad(
        [change("eval", {"include_path": "{tmp}/tasks"})], ["eval.include_path", "tasks", "not found"]
    ),
    "malformed override": Bad([], ["override", "'train.seed'", "train.seed=1"], ["train.seed"]),
    "override below a value": Bad([], ["name.x", "'run'", "no keys of its own"], ["name.x=1"]),
    "override that is not YAML": Bad([], ["train.seed", "'[1'", "quote it"], ["train.seed=[1"]),
    "override of a wrong type": Bad([], ["train.seed", "1.5", "an integer"], ["train.seed=1.5"]),
}


def make(base_config: Content, folder: Path, bad: Bad) -> Path:
    content = copy.deepcopy(base_config)
    for apply in bad.changes:
        apply(content, folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_configuration(name: str, base_config: Content, tmp_path: Path) -> None:
    bad = BAD[name]
    path = make(base_config, tmp_path, bad)
    with pytest.raises(UserError) as caught:
        check(load_config(path, bad.overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(bad.says[0])
    for part in bad.says:
        assert part in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(b"name: [", ["not valid YAML"], id="not YAML"),
        pytest.param(b"name: run\ntrain: {seed: 1}\ntrain: {seed: 2}\n", ["'train'", "twice", "line 3"], id="twice"),
        pytest.param(b"train:\n  seed: 1\n  epochs: 1\n  seed: 2\n", ["'seed'", "twice", "line 4"], id="twice below"),
        pytest.param(b"- name\n", ["mapping", "list"], id="a list"),
        pytest.param(b"", ["mapping", "NoneType"], id="empty"),
        pytest.param("name: café".encode("latin-1"), ["not valid YAML", "utf-8"], id="not UTF-8"),
    ],
)
def test_bad_file(text: bytes, says: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"config: {path}: ")
    assert "\n" not in message
    for part in says:
        assert part in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config: .*none\.yaml: no such file; .*launch/recipes"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["unknown nested key", "unreadable jsonl", "anchor over full"])
def test_command_line(name: str, base_config: Content, tmp_path: Path) -> None:
    """Through the real command: exit code 2, one line, no traceback, within 5 s, and nothing left behind."""
    bad = BAD[name]
    path = make(base_config, tmp_path, bad)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "harness"), "run", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: {bad.says[0]}")
    for part in bad.says:
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()
    # Processor time, not time on the clock: what else the machine is doing must not decide.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_good_configuration(base_config: Content, tmp_path: Path) -> None:
    config = load_config(make(base_config, tmp_path, Bad()))
    check(config)
    defaults = {"alpha": None, "damping": 0.01, "rounds": 1, "dynamic_rank": False}
    assert config.method == {"name": "corda", "mode": "kpm", "rank": 8, **defaults}
    assert config.run_directory == tmp_path / "runs" / "run"


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002", "2E-5", "+2e-5", "20e-6"])
def test_numbers_in_scientific_notation(text: str, base_config: Content, tmp_path: Path) -> None:
    path = make(base_config, tmp_path, Bad())
    assert load_config(path, [f"train.learning_rate={text}"]).train.learning_rate == 2e-5
    path.write_text(path.read_text().replace("learning_rate: 0.001", f"learning_rate: {text}"))
    assert load_config(path).train.learning_rate == 2e-5


def test_text_that_only_looks_like_a_number(base_config: Content, tmp_path: Path) -> None:
    assert load_config(make(base_config, tmp_path, Bad()), ["name=e5"]).name == "e5"


def test_overrides(base_config: Content, tmp_path: Path) -> None:
    path = make(base_config, tmp_path, Bad())
    overrides = ["train.seed=3", "anchor.kl=0.5", "model.target_modules=[q_proj, v_proj]", "train.max_steps="]
    config = load_config(path, overrides)
    assert config.train.seed == 3
    assert config.anchor is not None  # a block that the file does not have
    assert config.anchor.kl == 0.5
    assert config.anchor.prompts_per_step == 4
    assert config.model.target_modules == ["q_proj", "v_proj"]
    assert config.train.max_steps is None


def test_merge_keys(base_config: Content, tmp_path: Path) -> None:
    """YAML's `<<`: what is repeated is written once, and what stands beside it wins."""
    base_config["data"].pop("preserve")
    path = make(base_config, tmp_path, Bad([change("method", {"name": "lora"})]))
    train = base_config["data"]["train"]["path"]
    path.write_text(
        yaml.safe_dump({**base_config, "method": {"name": "lora"}, "data": None}).replace("data: null\n", "")
        + f"data:\n  train: &rows {{path: {train}, prompt: q, response: a}}\n"
        + "  preserve: {<<: *rows, response: null}\n"
    )
    config = load_config(path)
    assert config.data.preserve == config.data.train.model_copy(update={"response": None})


def test_relative_paths_start_at_the_file(base_config: Content, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": "y"}\n')
    path = make(base_config, tmp_path, Bad([change("data.train.path", "rows.jsonl")]))
    assert load_config(path).data.train.path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("anchor", [None, {"kl": 0.25, "prompts_per_step": 2}])
def test_dump_loads_as_the_same(base_config: Content, tmp_path: Path, anchor: Content | None) -> None:
    base_config |= {"anchor": anchor, "penalties": [{"name": "anchor", "kl": 0.5}]}
    config = load_config(make(base_config, tmp_path, Bad()))
    again = tmp_path / "elsewhere" / "config.yaml"
    again.parent.mkdir()
    again.write_text(config.dump())
    loaded = load_config(again)
    assert loaded == config
    assert isinstance(loaded, RunConfig)
    assert loaded.dump() == config.dump()
