"""Real DeepSpeed gangs: ZeRO 1, 2 and 3 on two ranks against one process with the same global batch."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from harness.adapters.lora import read_adapter
from harness.config import ModelConfig
from harness.data.collation import collate
from harness.models.loading import load_model, load_tokenizer
from harness.training.penalties.anchor import token_divergence
from tests.conftest import run_gang

pytestmark = pytest.mark.slow

METHODS = {
    "kpm": ({"name": "corda", "mode": "kpm", "rank": 8}, {"kl": 1.0, "prompts_per_step": 5}),
    "full": ({"name": "full"}, None),
    "nf4": ({"name": "corda", "mode": "ipm", "rank": 8}, {"kl": 1.0, "prompts_per_step": 5}),
}


def trained(run: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((run / "checkpoints" / "step-20" / "trained").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).norm() / left[k].norm()) for k in left)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, random_base: Path, data_files: dict[str, Path]):
    """Run folders by (method, ranks, ZeRO stage), made on demand once."""
    import yaml

    folder = tmp_path_factory.mktemp("equal")
    made: dict[tuple[str, int, int], Path] = {}

    def make(method: str, ranks: int, zero: int) -> Path:
        key = (method, ranks, zero)
        if key not in made:
            options, anchor = METHODS[method]
            name = f"{method}-{ranks}-zero{zero}"
            content = {
                "name": name,
                "model": {
                    "path": str(random_base),
                    "dtype": "float32",
                    "quantization": "nf4" if method == "nf4" else "none",
                },
                "data": {
                    "train": {"path": str(data_files["train"]), "prompt": "q", "response": "a"},
                    "preserve": {"path": str(data_files["preserve"]), "prompt": "q", "samples": 32},
                    "max_length": 64,
                },
                "method": copy.deepcopy(options),
                "anchor": anchor,
                "train": {
                    "deepspeed": f"ds_configs/zero{zero}.json",
                    "max_steps": 20,
                    "batch_size": 12,
                    # One process takes the global batch in two passes, so accumulation is compared as well.
                    "micro_batch_size": 6,
                    "learning_rate": 1.0e-3 if method != "full" else 1.0e-4,
                    "save_steps": 19,
                    "log_steps": 1,
                    "preserve_loss_steps": 10,
                },
                "eval": {"checkpoints": method != "full"},
                "output_dir": str(folder),
            }
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(content))
            run_gang(path, ranks)
            made[key] = folder / name
        return made[key]

    return make


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_equal_one(runs, zero: int) -> None:
    """CorDA-KPM with the anchor, five prompts a step: uneven shares (3 and 2) between two ranks."""
    assert largest_difference(trained(runs("kpm", 1, 2)), trained(runs("kpm", 2, zero))) <= 1e-3


def test_full_fine_tuning_under_zero3(runs) -> None:
    assert largest_difference(trained(runs("full", 1, 1)), trained(runs("full", 2, 3))) <= 1e-3


@pytest.mark.parametrize("zero", [2, 3])
def test_quantised_residual_on_two_ranks(runs, zero: int) -> None:
    assert largest_difference(trained(runs("nf4", 1, 2)), trained(runs("nf4", 2, zero))) <= 1e-3


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_anchor_is_zero_at_step_0(runs, zero: int) -> None:
    lines = [json.loads(line) for line in (runs("kpm", 2, zero) / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "anchor_kl" in line)
    assert first["step"] == 1  # measured in the forward pass of the first step, before its update
    assert abs(first["anchor_kl"]) <= 1e-5


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_anchor_equals_a_second_copy_of_the_base(runs, zero: int, random_base: Path) -> None:
    """The KL logged at the last step against the base loaded a second time and the trained model merged."""
    from harness.config import SourceConfig, load_config
    from harness.data.sources import read_examples
    from harness.data.tokenisation import tokenise
    from harness.training.penalties.anchor import Anchor
    from harness.training.penalties.base import PenaltySetup

    run = runs("kpm", 2, zero)
    config = load_config(run / "config.yaml")
    tokenizer = load_tokenizer(str(random_base))
    assert isinstance(config.data.preserve, SourceConfig)
    rows = tokenise(read_examples(config.data.preserve, "data.preserve"), tokenizer, config.data.max_length)
    anchor = Anchor(config.anchor, PenaltySetup(rows, tokenizer.pad_token_id, config.train.seed))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = next(line["anchor_kl"] for line in lines if line["step"] == 20 and "anchor_kl" in line)

    # The forward pass of step 20 (index 19) ran on the tensors of checkpoint 19.
    base = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    second = load_model(ModelConfig(path=str(random_base), dtype="float32"))
    before_last = PeftModel.from_pretrained(second, str(run / "checkpoints" / "step-19" / "adapter")).eval()
    batch = collate(anchor.step_prompts(19), tokenizer.pad_token_id)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        divergence = token_divergence(base(**inputs).logits, before_last(**inputs).logits)
    direct = float(divergence[batch["attention_mask"].bool()].mean())
    assert direct > 1e-5  # something was learned, so the comparison says something
    assert abs(direct - logged) <= 1e-4


def test_covariances_equal_for_any_number_of_ranks(runs) -> None:
    from harness.statistics.store import StatisticsReader

    one = StatisticsReader(runs("kpm", 1, 2) / "statistics")
    for zero in (1, 2, 3):
        two = StatisticsReader(runs("kpm", 2, zero) / "statistics")
        for layer in read_adapter(runs("kpm", 1, 2) / "init"):
            left, right = one.input_covariance(layer), two.input_covariance(layer)
            assert left.tokens == right.tokens
            assert (left.matrix - right.matrix).norm() <= 1e-5 * left.matrix.norm()
