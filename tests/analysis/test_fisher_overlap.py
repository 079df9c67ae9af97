"""Fisher overlap against the definition: one unpadded row, one backward pass of every weight, float64."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.analysis import fisher_overlap as module
from harness.analysis.figures import fisher_overlap_figure
from harness.analysis.fisher_overlap import Overlaps, _squared_products, fisher_overlap, overlap
from harness.analysis.inputs import configured
from harness.config import ModelConfig, RunConfig, resolve
from harness.data.tokenisation import IGNORED
from harness.models.loading import load_model
from harness.models.targets import target_modules
from harness.tasks.registry import load_task
from tests.analysis.test_cli import analyse

GROUPS, SAMPLES = 5, 11  # 5 does not divide 64; 11 rows are a batch of 8 and one of 3


@pytest.fixture(scope="module")
def config(random_base: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return resolve(
        {
            "name": "run",
            "model": {"path": str(random_base), "dtype": "float32"},
            "data": {
                "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a"},
                "preserve": {"path": str(data_files["preserve"]), "prompt": "q"},
                "max_length": 64,
            },
            "method": {"name": "lora", "rank": 8},
            "output_dir": str(tmp_path_factory.mktemp("runs")),
        }
    )


def paper_overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """1 − d², d² = ½·tr(F̂₁ + F̂₂ − 2(F̂₁F̂₂)^½) of two diagonals (FCLoRA Eq. 12, middle)."""
    F1, F2 = first.double() / first.double().sum(), second.double() / second.double().sum()
    return 1 - 0.5 * float((F1 + F2 - 2 * (F1 * F2).sqrt()).sum())


def row_gradients(model: nn.Module, names: list[str], rows: list[Any]) -> list[dict[str, torch.Tensor]]:
    """The gradient of each row's summed loss over its labelled tokens, by layer."""
    found = []
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
        chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        has_loss = labels != IGNORED
        loss = -chances[has_loss].gather(1, labels[has_loss][:, None]).sum()
        weights = [model.get_submodule(name).weight for name in names]
        found.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    return found


def reference(config: RunConfig, at: str) -> list[dict[str, list[torch.Tensor]]]:
    """Group → layer → the diagonal Fisher matrices of preserve and train."""
    base = load_model(ModelConfig(path=config.model.path, dtype="float32")).double()
    names = list(target_modules(base, "all-linear"))
    rows = [configured(config, which, SAMPLES).rows(load_task(config)) for which in ("preserve", "train")]
    svds = {n: torch.linalg.svd(base.get_submodule(n).weight.detach(), full_matrices=False) for n in names}
    found = []
    for g in range(GROUPS):
        part = slice(round(g * 64 / GROUPS), round((g + 1) * 64 / GROUPS))
        model = copy.deepcopy(base)
        if at == "reconstruction":
            with torch.no_grad():
                for name, (U, sigma, Vh) in svds.items():
                    model.get_submodule(name).weight.copy_(U[:, part] @ torch.diag(sigma[part]) @ Vh[part])
        group: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for own in rows:
            gradients = row_gradients(model, names, own)
            for name, (U, _, Vh) in svds.items():
                each = [gradient[name] for gradient in gradients]
                if at == "model":
                    each = [U[:, part].T @ gradient @ Vh[part].T for gradient in each]
                group[name].append(torch.stack([gradient.square() for gradient in each]).mean(0))
        found.append(group)
    return found


@pytest.mark.parametrize("at", ["reconstruction", "model"])
def test_against_the_definition(config: RunConfig, tmp_path: Path, at: Any) -> None:
    files = fisher_overlap(config, tmp_path, groups=GROUPS, at=at, samples=SAMPLES)
    found = json.loads(files[1].read_text())
    expected = reference(config, at)
    for g, group in enumerate(expected):
        kinds = ["all", *{name.split(".", 3)[3] for name in group}]
        assert found["overlap"].keys() == set(kinds)
        for kind in kinds:
            chosen = [fishers for name, fishers in group.items() if kind in ("all", name.split(".", 3)[3])]
            first, second = (torch.cat([fishers[i].flatten() for fishers in chosen]) for i in (0, 1))
            assert found["overlap"][kind][g] == pytest.approx(paper_overlap(first, second), abs=2e-5), (kind, g)
        for name, fishers in group.items():
            layer = found["layers"][name]
            assert layer["overlap"][g] == pytest.approx(paper_overlap(*fishers), abs=2e-5)
            assert layer["traces"][g] == pytest.approx([float(F.sum()) for F in fishers], rel=2e-4)
    values = [value for values in found["overlap"].values() for value in values]
    assert 0.05 < min(values) < max(values) < 0.999 and max(values) - min(values) > 0.05  # else nothing was tested
    assert found["layers"]["model.layers.0.mlp.up_proj"]["components"] == [13, 13, 12, 13, 13]
    assert found["data"][0]["rows"] == SAMPLES
    table = files[2].read_text().splitlines()
    assert table[0] == "| layers, group of singular components | 1 | 2 | 3 | 4 | 5 |"
    assert table[2] == "| all | " + " | ".join(f"{value:.3f}" for value in found["overlap"]["all"]) + " |"
    assert files[0].read_bytes().startswith(b"\x89PNG")


def test_the_model_is_left_as_it_was(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases, load = [], module.load_base
    monkeypatch.setattr(module, "load_base", lambda *args: bases.append(load(*args)) or bases[-1])
    first = fisher_overlap(config, tmp_path / "a", groups=2, samples=4, layers=["q_proj", "layers.1.mlp"])
    fresh = load_model(ModelConfig(path=config.model.path, dtype="float32"))
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, bases[0].model.get_parameter(name)) and parameter.requires_grad
        assert bases[0].model.get_parameter(name).requires_grad
    found = json.loads(first[1].read_text())
    assert set(found["overlap"]) == {"all", "self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    # What is compared changes nothing else: the other layers are partial all the same.
    second = fisher_overlap(config, tmp_path / "b", groups=2, samples=4)
    same = json.loads(second[1].read_text())["overlap"]["self_attn.q_proj"]
    assert found["overlap"]["self_attn.q_proj"] == pytest.approx(same)


def test_same_data_overlap_entirely(config: RunConfig, tmp_path: Path) -> None:
    same = config.model_copy(update={"data": config.data.model_copy(update={"train": config.data.preserve})})
    for at in ("reconstruction", "model"):
        found = json.loads(fisher_overlap(same, tmp_path, groups=3, at=at, samples=6)[1].read_text())  # type: ignore[arg-type]
        assert found["overlap"]["all"] == pytest.approx([1.0] * 3, abs=1e-6)


def test_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(40, generator=generator) ** 6 for _ in range(2))
    assert overlap([Overlaps.of(first, second)]) == pytest.approx(paper_overlap(first, second), rel=1e-6)
    parts = [Overlaps.of(first[part], second[part]) for part in (slice(0, 9), slice(9, 40))]
    assert overlap(parts) == pytest.approx(paper_overlap(first, second), rel=1e-6)
    assert overlap([Overlaps.of(first, 7 * first)]) == pytest.approx(1)
    assert overlap([Overlaps.of(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]))]) == 0
    assert overlap([Overlaps.of(first, torch.zeros(40))]) is None
    tiny = 1e-30 * first.double()  # traces whose product has no float
    assert overlap([Overlaps.of(tiny * 1e-140, second.double())]) == pytest.approx(
        paper_overlap(first, second), rel=1e-6
    )


def test_rows_are_squared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 7, 4, generator=generator), torch.randn(5, 7, 3, generator=generator)
    expected = sum((left[b].T @ right[b]).square() for b in range(5))
    for most in (1, 25, 1 << 20):  # entries at once: a row, two rows, all
        monkeypatch.setattr(module, "MOST_ENTRIES", most)
        assert torch.allclose(_squared_products(left, right), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--groups", "65"], "--groups: 65 given; layer model.layers.0.self_attn.q_proj is 64×64, so at most 64"),
        (["data.preserve=null"], "data.preserve: missing; "),
        (["--layers", "q_prj"], "--layers: 'q_prj' is no target layer; "),
        (["data.max_length=1"], "data.preserve: no sampled row has a token with a loss within data.max_length"),
    ],
)
def test_mistakes(
    options: list[str],
    message: str,
    base_config: dict[str, Any],
    write_config: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base_config["method"] = {"name": "lora"}
    assert analyse(monkeypatch, "fisher-overlap", write_config(base_config), *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert line.startswith(f"error: {message}"), line


def test_command(
    base_config: dict[str, Any],
    write_config: Callable[[dict[str, Any]], Path],
    data_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    options = ["--groups", "2", "--at", "model", "--samples", "4", "--data", f"{data_files['train']}:a"]
    base_config["method"] = {"name": "lora"}
    config = write_config(base_config)
    assert analyse(monkeypatch, "fisher-overlap", config, *options, "data.preserve=null", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| layers, group of singular components | 1 | 2 |"
    assert printed[-3:] == [str(tmp_path / f"fisher-overlap.{suffix}") for suffix in ("png", "json", "md")]
    found = json.loads((tmp_path / "fisher-overlap.json").read_text())
    assert found["at"] == "model" and found["data"][0]["columns"] == ["a"]


@pytest.mark.parametrize("values", [[0.5], [None, 0.3], [0.1] * 40, [None]])
def test_figure(values: list[float | None]) -> None:
    curves = {"all": values} | {f"type_{i}": values for i in range(9)}
    assert fisher_overlap_figure(["a", "b"], "model", curves).startswith(b"\x89PNG")
