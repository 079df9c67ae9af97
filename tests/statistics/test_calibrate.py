"""The calibrate stage on the random base."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig

from harness.config import ModelConfig, RunConfig, resolve
from harness.data.sampling import sample
from harness.data.sources import read_examples
from harness.data.tokenisation import Row, tokenise
from harness.errors import UserError
from harness.models.loading import load_model, load_tokenizer
from harness.models.targets import target_modules
from harness.run_directory import RunDirectory
from harness.stages.calibrate import BATCH_ROWS, calibrate, in_batches
from harness.statistics.statistic import Statistic
from harness.statistics.store import StatisticsReader
from tests.statistics.direct import direct_covariances
from tests.statistics.direct_streamed import saved


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(content: dict[str, Any], **changes: Any) -> tuple[RunConfig, RunDirectory]:
    content = copy.deepcopy(content)
    content["method"] |= changes
    config = resolve(content)
    directory = RunDirectory(config.run_directory)
    calibrate(config, directory)
    return config, directory


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_covariances_are_of_the_right_data(base_config: dict[str, Any], mode: str) -> None:
    """KPM looks at what must be kept, IPM at prompt and response of what must be learned."""
    base_config["data"]["train"]["samples"] = 16
    config, directory = run(base_config, mode=mode)
    source, key = (config.data.preserve, "preserve") if mode == "kpm" else (config.data.train, "train")
    assert source is not None
    examples = sample(read_examples(source, f"data.{key}"), source.samples, "calibrate", config.train.seed, 0)
    assert all((example.response is None) == (mode == "kpm") for example in examples)
    rows = tokenise(examples, load_tokenizer(config.model.path), config.data.max_length)
    model = load_model(ModelConfig(path=config.model.path, dtype="float32"))
    expected = direct_covariances(model, target_modules(model, "all-linear"), rows)
    reader = StatisticsReader(directory.statistics)
    for layer, matrix in expected.items():
        found = reader.input_covariance(layer)
        assert found.tokens == sum(len(row.input_ids) for row in rows)
        assert float((found.matrix - matrix).norm() / matrix.norm()) <= 1e-5


def test_same_statistics_twice(base_config: dict[str, Any]) -> None:
    first = run(base_config)[1]
    index = (first.statistics / "index.json").read_text()
    base_config["name"] = "again"
    assert (run(base_config)[1].statistics / "index.json").read_text() == index  # checksums and all
    base_config["name"] = "other"
    base_config["train"]["seed"] = 1
    other = json.loads((run(base_config)[1].statistics / "index.json").read_text())
    assert other != json.loads(index)


def test_method_without_statistics(base_config: dict[str, Any]) -> None:
    base_config["method"] = {"name": "lora"}
    assert not run(base_config)[1].statistics.exists()


def test_too_few_tokens(base_config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    base_config["data"]["preserve"]["samples"] = 2
    run(base_config)
    warning = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert warning.startswith("warning: data.preserve.samples: ")
    assert "layers up to 160 wide" in warning
    base_config["data"]["preserve"]["samples"] = 50
    base_config["name"] = "enough"
    run(base_config)
    assert "warning" not in capsys.readouterr().err


def test_empty_rows(base_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "abcd"}\n{"q": ""}\n')
    base_config["data"]["preserve"]["path"] = str(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"^data\.preserve: 1 of 2 sampled rows have no tokens; remove empty rows"):
        run(base_config)


def test_weights_with_nan(base_config: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=base_config["model"]["path"], dtype="float32"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(base_config["model"]["path"]).save_pretrained(tmp_path / "broken")
    base_config["model"]["path"] = str(tmp_path / "broken")
    with pytest.raises(UserError, match=r"NaN or inf in the input of layer model\.layers\.0\.mlp\.down_proj, batch 0"):
        run(base_config)


METHODS: dict[str, dict[str, Any]] = {
    "inputs": {"name": "corda", "mode": "kpm", "rank": 8, "rounds": 3},
    "gradients": {"name": "farss", "rank": 8},
}


def all_statistics(directory: RunDirectory) -> dict[tuple[str, str, int], Statistic]:
    modules = json.loads((directory.statistics / "index.json").read_text())["modules"]
    reader = StatisticsReader(directory.statistics)
    return {
        (name, kind, number): reader.read(kind, name, number)
        for name, kinds in modules.items()
        for kind, rounds in kinds.items()
        for number in range(len(rounds))
    }


@pytest.mark.parametrize("method", METHODS)
def test_both_ways_give_the_same_numbers(
    base_config: dict[str, Any], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base_config["method"] = METHODS[method]
    base_config["data"]["train"]["samples"] = 24
    found = {}
    for way in ("resident", "streamed"):
        base_config |= {"name": way, "init": {"collection": way, "cache": False}}
        found[way] = all_statistics(run(base_config)[1])
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("calibrate: 8 × input covariance") and f"serve 14 layers; {way}; " in line
    assert found["resident"].keys() == found["streamed"].keys()
    assert {number for _, _, number in found["streamed"]} == set(range(base_config["method"].get("rounds", 1)))
    for key, statistic in found["resident"].items():
        assert found["streamed"][key].tokens == statistic.tokens
        assert float((found["streamed"][key].matrix - statistic.matrix).norm() / statistic.matrix.norm()) <= 1e-5


def test_auto_is_resident_where_all_fits(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choice follows what is available; nothing else about the run differs."""
    base_config["init"] = {"cache": False}
    run(base_config)
    assert "; resident; " in capsys.readouterr().err
    monkeypatch.setattr("harness.stages.calibrate.RESIDENT_SHARE", 1e-9)
    base_config["name"] = "small"
    run(base_config)
    lines = capsys.readouterr().err
    assert "available: streamed" in lines and "; streamed; " in lines
    # An OPT whose embeddings are narrower than its blocks has linear layers around them.
    sizes = {"vocab_size": 400, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    load_tokenizer(base_config["model"]["path"]).save_pretrained(tmp_path / "opt")
    saved(tmp_path / "opt", OPTConfig(**sizes, word_embed_proj_dim=16, do_layer_norm_before=False))
    base_config |= {"name": "outside", "model": {"path": str(tmp_path / "opt"), "dtype": "float32"}}
    run(base_config)
    assert "and yet resident: streamed cannot reach model.decoder.project_" in capsys.readouterr().err
    base_config |= {"name": "asked", "init": {"collection": "streamed", "cache": False}}
    with pytest.raises(
        UserError, match=r"^init\.collection: streamed cannot reach .*project_.*; use resident, or auto"
    ):
        run(base_config)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_another_run(
    base_config: dict[str, Any], own_cache: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken where all are there and whole; a damaged one is made anew; other rows, seeds or weights are not taken."""
    base_config["method"] = METHODS[method]
    base_config["data"]["train"]["samples"] = 24
    first = (run(base_config)[1].statistics / "index.json").read_text()
    assert "from the cache" not in capsys.readouterr().err

    def again(name: str) -> tuple[str, str]:
        base_config["name"] = name
        index = (run(base_config)[1].statistics / "index.json").read_text()
        return index, capsys.readouterr().err

    index, said = again("second")
    assert index == first and "; from the cache; " in said  # checksums and all
    entry = max((own_cache / "statistics").iterdir(), key=lambda file: file.stat().st_size)
    entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    index, said = again("damaged")
    assert index == first and "was damaged" in said and "; resident; " in said
    assert "; from the cache; " in again("mended")[1]
    base_config["train"]["seed"] = 1
    index, said = again("other-rows")
    assert index != first and "from the cache" not in said
    base_config["train"]["seed"] = 0
    base_config["init"] = {"cache": False}
    before = sorted((own_cache / "statistics").iterdir())
    assert "; resident; " in again("without")[1]
    assert sorted((own_cache / "statistics").iterdir()) == before


def test_the_models_files_decide(
    base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(base_config)
    path = base_config["model"]["path"]
    model = load_model(ModelConfig(path=path, dtype="float32"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    for folder, changed in ((tmp_path / "same", False), (tmp_path / "changed", True)):
        shutil.copytree(path, folder)
        if changed:
            model.save_pretrained(folder)
        base_config |= {"name": folder.name, "model": {"path": str(folder), "dtype": "float32"}}
        capsys.readouterr()
        run(base_config)
        assert ("from the cache" in capsys.readouterr().err) == (not changed)


@pytest.mark.parametrize(
    ("lengths", "most", "sizes"),
    [
        ([3] * 20, math.inf, [8, 8, 4]),
        ([3] * 5, 9, [3, 2]),
        ([2, 2, 6, 1, 1], 8, [2, 1, 2]),  # with padding three rows of 6 would be 18, and of 1 and 6 12
        ([50, 1, 50], 10, [1, 1, 1]),  # a row that is too long by itself stands alone
        ([], 10, []),
        ([0] * 9, 10, [8, 1]),  # rows of images have no tokens
    ],
)
def test_rows_go_in_their_order_and_not_too_many_at_once(lengths: list[int], most: float, sizes: list[int]) -> None:
    rows = [Row([number] * length, []) for number, length in enumerate(lengths)]
    batches = in_batches(rows, most)
    assert [row for batch in batches for row in batch] == rows
    assert [len(batch) for batch in batches] == sizes
    assert max(sizes, default=0) <= BATCH_ROWS
