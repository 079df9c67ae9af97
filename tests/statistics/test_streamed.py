"""Statistics block by block against the whole model and against a direct float64 computation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedModel

from harness.config import ModelConfig
from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.models.loading import load_model
from harness.models.targets import target_modules
from harness.statistics.loss import Labels
from harness.statistics.statistic import KINDS
from harness.statistics.store import StatisticsReader
from tests.statistics.direct import PAD
from tests.statistics.direct_gradients import direct_statistics, groups_of, labelled_rows
from tests.statistics.direct_streamed import DECODERS, batches_of, left_over, resident, saved, streamed

BOUND = 1e-5
REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = labelled_rows(11)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("name", DECODERS)
def test_equals_resident_and_direct(tmp_path: Path, name: str) -> None:
    config = saved(tmp_path, DECODERS[name])
    batches = batches_of(ROWS, 4)  # of 4, 4 and 3 rows, padded
    found, groups = streamed(config, [batches])
    alone, groups_alone = streamed(config, [batches], ("input_covariance",))
    model = load_model(config)
    modules = target_modules(model, "all-linear")
    assert groups == groups_alone == groups_of(model, modules)
    whole = resident(model, batches)
    direct = direct_statistics(model.double(), modules, ROWS)
    assert {key[1:] for key in found} == whole.keys()
    for (_, kind, layer), statistic in found.items():
        assert statistic.tokens == whole[kind, layer].tokens
        assert relative(statistic.matrix, whole[kind, layer].matrix) <= BOUND, (kind, layer)
        assert relative(statistic.matrix, direct[kind][layer]) <= BOUND, (kind, layer)
        if kind != "weight_gradient":
            assert torch.equal(statistic.matrix, statistic.matrix.T)
        if kind == "input_covariance":
            assert relative(alone[0, kind, layer].matrix, direct[kind][layer]) <= BOUND
    assert not left_over()


def test_rounds_and_drawn_labels(tmp_path: Path) -> None:
    config = saved(tmp_path, DECODERS["llama"])
    rounds = [batches_of(ROWS, 4), batches_of(ROWS[:5], 2)]
    found, _ = streamed(config, rounds, labels=Labels("mc", 3))
    covariances, _ = streamed(config, rounds, ("input_covariance",))
    model = load_model(config)
    for number, batches in enumerate(rounds):
        for (kind, layer), statistic in resident(model, batches, labels=Labels("mc", 3)).items():
            assert relative(found[number, kind, layer].matrix, statistic.matrix) <= BOUND
            if kind == "input_covariance":
                assert relative(covariances[number, kind, layer].matrix, statistic.matrix) <= BOUND
    empirical, _ = streamed(config, rounds[:1])
    kind, layer = "output_gradient_covariance", "model.layers.1.mlp.up_proj"
    assert relative(found[0, kind, layer].matrix, empirical[0, kind, layer].matrix) > 0.1


def test_what_a_model_computes_between_blocks(tmp_path: Path) -> None:
    """Hooks of a block run outside it; gradients go through them by the model's own graph."""

    def add_hooks(model: PreTrainedModel) -> None:
        for block in model.model.layers[:2]:
            block.register_forward_hook(lambda _, inputs, output: output + 0.5 * (output * inputs[0]).tanh())

    config, batches = saved(tmp_path, DECODERS["llama"]), batches_of(ROWS, 4)
    plain, _ = streamed(config, [batches])
    found, _ = streamed(config, [batches], prepare=add_hooks)
    model = load_model(config)
    add_hooks(model)
    for (kind, layer), statistic in resident(model, batches).items():
        assert relative(found[0, kind, layer].matrix, statistic.matrix) <= BOUND, (kind, layer)
    layer = "model.layers.0.self_attn.v_proj"
    kind = "output_gradient_covariance"
    assert relative(plain[0, kind, layer].matrix, found[0, kind, layer].matrix) > 0.01


def test_some_layers_of_some_blocks(tmp_path: Path) -> None:
    """Blocks below the first and above the last target: run where needed, never asked for statistics."""
    config = saved(tmp_path, DECODERS["llama"])
    layers = ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
    batches = batches_of(ROWS, 4)
    found, groups = streamed(config, [batches], targets=layers)
    assert groups.keys() == set(layers)
    whole = resident(load_model(config), batches)
    assert len(found) == 6
    for (_, kind, layer), statistic in found.items():
        group = {"model.layers.1.mlp.up_proj": "model.layers.1.mlp.gate_proj"}.get(layer, layer)
        group = group.replace("v_proj", "q_proj")
        expected = whole[kind, group if kind == "input_covariance" else layer]
        assert relative(statistic.matrix, expected.matrix) <= BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    """The same half-precision model in both modes; sums and products are not rounded to half."""
    config = saved(tmp_path, DECODERS["llama"], 2.0).model_copy(update={"dtype": dtype})
    found, _ = streamed(config, [batches_of(ROWS, 4)])
    for (kind, layer), statistic in resident(load_model(config), batches_of(ROWS, 4)).items():
        assert found[0, kind, layer].matrix.dtype == torch.float32
        assert relative(found[0, kind, layer].matrix, statistic.matrix) <= BOUND, (kind, layer)


@pytest.fixture(scope="module")
def gangs(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    """What real gloo gangs of 1, 2 and 3 processes collected in both modes."""
    folder = tmp_path_factory.mktemp("gangs")
    config = saved(folder / "base", DECODERS["gemma3"])
    done = subprocess.run(
        [sys.executable, "-m", "tests.statistics.direct_streamed", config.path, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return config, folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_ranks(gangs: tuple[ModelConfig, Path], mode: str) -> None:
    """1, 2 and 3 ranks, one of them without a batch: the same numbers, every file written once, by its owner."""
    config, folder = gangs
    model = load_model(config)
    expected = resident(model, batches_of(labelled_rows(20), 3), labels=Labels("mc", 1))
    groups = groups_of(model, target_modules(model, "all-linear"))
    for ranks in (1, 2, 3):
        reader = StatisticsReader(folder / f"{mode}-{ranks}")
        for layer, group in groups.items():
            for kind in KINDS:
                statistic = reader.read(kind, layer)
                other = expected[kind, group if kind == "input_covariance" else layer]
                assert statistic.tokens == other.tokens
                assert relative(statistic.matrix, other.matrix) <= BOUND
        given, taken = zip(
            *(map(int, (folder / f"{mode}-{ranks}" / f"bytes-{n}").read_text().split()) for n in range(ranks)),
            strict=True,
        )
        # Every rank but the owner gives every matrix once. 32 to 48 wide, they are one row block each: no half to save.
        size = 4 * sum(statistic.matrix.numel() for statistic in expected.values())
        rounds = 2 if mode == "streamed" else 1
        assert sum(given) == sum(taken) == (ranks - 1) * size * rounds
        if ranks > 1:
            assert max(taken) <= 1.5 * (ranks - 1) * size * rounds / ranks  # owned about evenly


def poisoned(folder: Path, name: str, value: float) -> ModelConfig:
    config = saved(folder, DECODERS["llama"])
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config


@pytest.mark.parametrize("kinds", [("input_covariance",), KINDS], ids=["inputs", "gradients"])
def test_nan_names_layer_and_batch(tmp_path: Path, kinds: tuple) -> None:
    """From a weight of block 1, and from the embedding of one token of the second batch."""
    config = poisoned(tmp_path, "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(UserError, match=r"in the input of layer model\.layers\.1\.mlp\.down_proj, batch 0"):
        streamed(config, [batches_of(ROWS, 4)], kinds)
    config = saved(tmp_path / "embedding", DECODERS["llama"])
    tensors = load_file(tmp_path / "embedding" / "model.safetensors")
    tensors["model.embed_tokens.weight"][299] = torch.nan
    save_file(tensors, tmp_path / "embedding" / "model.safetensors", metadata={"format": "pt"})
    good, bad = collate([Row([1, 2, 4], [1, 2, 4])], PAD), collate([Row([1, 299], [1, 299])], PAD)
    with pytest.raises(UserError, match=r"in the input of layer model\.layers\.0\.self_attn\.q_proj, batch 1"):
        streamed(config, [[good, bad]], kinds)
    assert not left_over()


def test_nan_in_the_loss(tmp_path: Path) -> None:
    config = poisoned(tmp_path, "lm_head.weight", float("nan"))
    with pytest.raises(UserError, match="NaN or inf in the loss, batch 0"):
        streamed(config, [batches_of(ROWS, 4)])
    assert not left_over()
    streamed(config, [batches_of(ROWS, 4)], ("input_covariance",))  # nobody needs the head here


def test_no_response(tmp_path: Path) -> None:
    config = saved(tmp_path, LlamaConfig(**DECODERS["llama"].to_dict()))
    with pytest.raises(UserError, match=r"^statistics: no sampled row has a response token; "):
        streamed(config, [[collate([Row([1, 2, 3], [IGNORED] * 3)], PAD)]])
    with pytest.raises(UserError, match=r"^statistics: the sampled rows hold no real token; "):
        streamed(config, [[]], ("input_covariance",))
