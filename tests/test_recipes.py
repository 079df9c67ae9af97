"""Every shipped recipe resolves fully without downloading, and holds the hyper-parameters of its paper."""

from pathlib import Path

import pytest

from harness.config import load_config
from harness.preflight import check
from harness.resources import find

RECIPES = sorted(find("launch/recipes").glob("llama2_7b_math_*.yaml"))
CORDA = {"rank": 128, "alpha": 128.0, "damping": 0.01, "rounds": 1, "dynamic_rank": False}
PLUS_PLUS = {**CORDA, "rounds": 5, "dynamic_rank": True}
METHODS = {
    "llama2_7b_math_lora": {"name": "lora", "rank": 128, "alpha": 128.0},
    "llama2_7b_math_corda_kpm": {"name": "corda", "mode": "kpm", **CORDA},
    "llama2_7b_math_corda_plus_plus_kpm": {"name": "corda", "mode": "kpm", **PLUS_PLUS},
    "llama2_7b_math_corda_ipm": {"name": "corda", "mode": "ipm", **CORDA},
    "llama2_7b_math_qcorda": {"name": "corda", "mode": "ipm", **CORDA},
    "llama2_7b_math_farss": {
        "name": "farss",
        "rank": 128,
        "alpha": 128.0,
        "r_min": 1,
        "r_avg": 50,
        "r_max": 64,
        "shallow_layers": 7,
        "variant": "farss",
        "fisher": "empirical",
        "probe_steps": 20,
        "probe_rows": 64,
    },
}


def test_all_are_there() -> None:
    assert {recipe.stem for recipe in RECIPES} == set(METHODS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe(recipe: Path) -> None:
    """CorDA++, appendix "Implementation details"; FARSS, appendix A.2.1."""
    config = load_config(recipe)
    check(config)
    farss = config.method["name"] == "farss"
    assert config.method == METHODS[recipe.stem]
    assert (config.model.path, config.model.dtype) == ("meta-llama/Llama-2-7b-hf", "bfloat16" if farss else "float32")
    assert config.model.quantization == ("nf4" if "qcorda" in recipe.stem else "none")
    assert config.model.target_modules == "all-linear"
    train = config.train
    assert (train.batch_size, train.learning_rate, train.epochs) == (16 if farss else 128, 2e-5, 1)
    assert (train.scheduler, train.warmup_ratio, train.weight_decay) == ("linear" if farss else "cosine", 0.03, 0)
    assert config.data.train.split == "train[:100000]"
    assert config.data.train.response == "response"  # the loss is on the response
    source = config.data.preserve if config.method.get("mode") == "kpm" else config.data.train
    assert source is not None and source.samples == 256
    assert config.eval.knowledge == ["triviaqa", "nq_open", "webqs"]
    assert config.eval.task == ["gsm8k", "minerva_math"]
