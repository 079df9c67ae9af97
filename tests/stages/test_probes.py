"""The boundary search: what is measured, what is chosen, and that nothing else changes it."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.config import RunConfig, resolve
from harness.data.tokenisation import IGNORED
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import ProbeRequest
from harness.models.loading import load_model
from harness.pipeline import stage_inputs
from harness.preflight import check
from harness.run_directory import RunDirectory
from harness.stages.probes import Losses, probe_rows
from harness.tasks.registry import load_task
from tests.stages.probing import METHOD, eight_blocks, initialised, run_content

REPOSITORY = Path(__file__).resolve().parents[2]
PROBE = ProbeRequest("shallow_layers", 4, 12)


@pytest.fixture(scope="module")
def content(random_base: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = eight_blocks(random_base, tmp_path_factory.mktemp("eight"))
    return run_content(base, data_files, tmp_path_factory.mktemp("runs"))


def changed(content: dict[str, Any], name: str, **blocks: dict[str, Any]) -> dict[str, Any]:
    content = copy.deepcopy(content)
    content["name"] = name
    for block, values in blocks.items():
        content.setdefault(block, {}).update(values)
    return content


@pytest.fixture(scope="module")
def probed(content: dict[str, Any]) -> tuple[RunConfig, RunDirectory]:
    return initialised(content)


def test_the_table(probed: tuple[RunConfig, RunDirectory], content: dict[str, Any], capsys: Any) -> None:
    record = read_json(probed[1].init / "probes.json")
    assert (record["option"], record["steps"]) == ("shallow_layers", 4)
    assert record["rows"] == {"training": 12, "target": 12, "preserve": 12}
    assert [candidate["value"] for candidate in record["candidates"]] == [1, 2]
    base = record["base"]
    for candidate in record["candidates"]:
        ratios = [candidate[key] / base[key] for key in ("target_loss", "preserve_loss")]
        assert candidate["score"] == pytest.approx(sum(ratios))
        assert all(ratio != 1.0 for ratio in ratios)
        assert ratios[0] < 0.999  # it learned something
    assert record["candidates"][0]["score"] != record["candidates"][1]["score"]
    best = min(record["candidates"], key=lambda candidate: candidate["score"])
    assert record["chosen"] == best["value"]
    # A second time, to see it printed; and the very same numbers.
    _, again = initialised(changed(content, "again"))
    assert read_json(again.init / "probes.json") == record
    printed = capsys.readouterr().err.splitlines()
    assert "init: 2 values of shallow_layers probed, 4 steps each on 12 rows of data.train; " in "\n".join(printed)
    start = next(i for i, line in enumerate(printed) if line.split()[:1] == ["shallow_layers"])
    assert printed[start].split() == ["shallow_layers", "target", "loss", "preserve", "loss", "score"]
    rows = [line.split() for line in printed[start + 1 : start + 4]]
    assert rows[0] == ["base", f"{base['target_loss']:.4f}", f"{base['preserve_loss']:.4f}", "2.0000"]
    for row, candidate in zip(rows[1:], record["candidates"], strict=True):
        numbers = [f"{candidate[key]:.4f}" for key in ("target_loss", "preserve_loss", "score")]
        assert row == [str(candidate["value"]), *numbers, *(["chosen"] if candidate is best else [])]
    assert f"init: shallow_layers: {best['value']} of 2 tried" in printed


def test_what_is_chosen_is_what_is_trained(probed: tuple[RunConfig, RunDirectory], content: dict[str, Any]) -> None:
    """The published ``init/`` is the one that the chosen number would give, and nothing of the others stays."""
    _, run = probed
    chosen = read_json(run.init / "probes.json")["chosen"]
    _, given = initialised(changed(content, "given", method={"shallow_layers": chosen}))
    found, expected = (load_file(r.init / "adapter_model.safetensors") for r in (run, given))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    report = read_json(run.init / "report.json")
    assert report == read_json(given.init / "report.json")
    assert report["summary"]["shallow_layers"] == chosen
    assert not (given.init / "probes.json").exists()
    assert not (run.path / ".init.staging").exists()


def test_rows(probed: tuple[RunConfig, RunDirectory]) -> None:
    """Held out means held out; and the base's losses are the plain ones on these rows."""
    config, run = probed
    rows = probe_rows(load_task(config), PROBE)
    training = {tuple(row.input_ids) for row in rows.training}
    assert len(training) == 12
    assert not training & {tuple(row.input_ids) for row in rows.target}
    model = load_model(config.model)
    base = read_json(run.init / "probes.json")["base"]
    for key, part in (("target_loss", rows.target), ("preserve_loss", rows.preserve)):
        total, tokens = 0.0, 0
        for row in part:
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            for place, label in enumerate(row.labels):
                if place > 0 and label != IGNORED:
                    total, tokens = total - float(log_p[place - 1, label]), tokens + 1
        assert base[key] == pytest.approx(total / tokens, rel=1e-5)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    assert probe_rows(load_task(other), PROBE) != rows
    small = probe_rows(load_task(config), ProbeRequest("shallow_layers", 4, 1000))
    assert (len(small.training), len(small.target), len(small.preserve)) == (100, 100, 50)  # all there are, halved


def test_quantisation_is_ignored(probed: tuple[RunConfig, RunDirectory], content: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    _, run = initialised(changed(content, "nf4", model={"quantization": "nf4"}))
    assert read_json(run.init / "probes.json") == read_json(probed[1].init / "probes.json")


@pytest.mark.slow
def test_any_number_of_ranks(probed: tuple[RunConfig, RunDirectory], content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.stages.probing"),
            *(str(tmp_path / "config.yaml"), str(probed[1].statistics), str(tmp_path)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = read_json(probed[1].init / "probes.json")
    for ranks in (2, 4):
        found = read_json(tmp_path / f"{ranks}-ranks" / "init" / "probes.json")
        for one, other in zip(found.pop("candidates"), expected["candidates"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)  # other numbers of threads round differently
        assert found.pop("base") == pytest.approx(expected["base"], rel=1e-5)
        assert found == {key: value for key, value in expected.items() if key not in ("candidates", "base")}


def test_one_candidate_is_not_probed(
    content: dict[str, Any], random_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = initialised(changed(content, "two-blocks", model={"path": str(random_base)}))
    assert "init: shallow_layers: 1 of 1 tried" in capsys.readouterr().err.splitlines()
    assert read_json(run.init / "report.json")["summary"]["shallow_layers"] == 1
    assert not (run.init / "probes.json").exists()


def test_divergence(content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^method\.shallow_layers: auto given, but the loss of every probe is NaN or "):
        initialised(changed(content, "diverged", train={"learning_rate": 1e30}))
    base = Losses(2.0, 4.0)
    assert Losses(1.0, 5.0).score(base) == 0.5 + 1.25
    assert Losses(math.nan, 1.0).score(base) == Losses(1.0, math.inf).score(base) == math.inf


def test_what_is_missing(content: dict[str, Any], tmp_path: Path) -> None:
    without = copy.deepcopy(content)
    del without["data"]["preserve"]
    message = r"^data\.preserve: missing; method\.shallow_layers: auto .* give data\.preserve or set method\.shallow"
    with pytest.raises(UserError, match=message):
        check(resolve(without))
    with pytest.raises(UserError, match=message):
        initialised(without | {"name": "without"})
    check(resolve(changed(without, "fixed", method={"shallow_layers": 2})))
    (tmp_path / "one.jsonl").write_text('{"q": "abcd efgh", "a": " hgfe"}\n')
    one = changed(content, "one")
    one["data"]["train"]["path"] = str(tmp_path / "one.jsonl")
    with pytest.raises(UserError, match=r"^data\.train: 1 of the rows drawn have a token with a loss, probes need 2; "):
        initialised(one)
    (tmp_path / "short.jsonl").write_text('{"q": ""}\n')
    short = changed(content, "short")
    short["data"]["preserve"]["path"] = str(tmp_path / "short.jsonl")
    with pytest.raises(
        UserError, match=r"^data\.preserve: 0 of the rows drawn have a token with a loss, probes need 1"
    ):
        initialised(short)


def test_init_is_redone_for_another_learning_rate(content: dict[str, Any]) -> None:
    """Probes train at the run's learning rate, so their choice is of that rate alone."""
    rates: list[Any] = []
    for boundary in ("auto", 2):
        for rate in (1e-3, 2e-3):
            config = resolve(
                changed(content, "run", method={"shallow_layers": boundary}, train={"learning_rate": rate})
            )
            rates.append(stage_inputs(config, "init"))
    assert rates[0] != rates[1]
    assert rates[2] == rates[3]
    assert METHOD["shallow_layers"] == "auto"
