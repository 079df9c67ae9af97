"""The calibrate stage on the random base."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import ModelConfig, RunConfig, resolve
from harness.data.sampling import sample
from harness.data.sources import read_examples
from harness.data.tokenisation import tokenise
from harness.errors import UserError
from harness.models.loading import load_model, load_tokenizer
from harness.models.targets import target_modules
from harness.run_directory import RunDirectory
from harness.stages.calibrate import calibrate
from harness.statistics.store import StatisticsReader
from tests.statistics.direct import direct_covariances


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
