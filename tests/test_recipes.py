"""Every row of every recipe resolves without a network, holds its paper's hyper-parameters, and is listed."""

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from harness import plugins, recipes
from harness.adapters.tensor_forms import Reshaped, Tucker
from harness.cli import app, main
from harness.config import RunConfig, load_config, resolve
from harness.errors import UserError
from harness.models.targets import describe, target_modules
from harness.preflight import check
from harness.recipes import FOLDER, Recipe, Row, shipped
from harness.resources import find

SHIPPED = shipped()
ALL_ROWS = {(recipe.place, row.name): (recipe, row) for recipe in SHIPPED for row in recipe.rows()}
ONE_FILE = {recipe.place: recipe for recipe in SHIPPED if not recipe.about.rows}
PAPERS = {"corda_plus_plus": "CorDA++", "farss": "FARSS", "fclora": "FCLoRA", "lalora": "LALoRA", "flora": "FLoRA"}

# file, row → learning rate, rank, α (or FLoRA's s, FCLoRA's γ), batch, epochs; copied by hand from the papers.
SAID: dict[tuple[str, str], tuple[float, int | None, float | None, int, float]] = {
    # CorDA++, appendix A
    ("corda_plus_plus/llama2_7b_kpm", "math-corda"): (2e-5, 128, 128, 128, 1),
    ("corda_plus_plus/llama2_7b_kpm", "code-corda-plus-plus"): (2e-5, 128, 128, 128, 1),
    ("corda_plus_plus/llama2_7b_kpm", "instruction-full"): (2e-5, None, None, 128, 1),
    ("corda_plus_plus/other_models_math_kpm", "gemma2-9b-corda-plus-plus"): (2e-5, 128, 128, 128, 1),
    ("corda_plus_plus/llama2_7b_ipm", "instruction-pissa"): (2e-5, 128, 128, 128, 1),
    ("corda_plus_plus/other_models_math_ipm", "llama3-8b-pissa"): (2e-5, 128, 128, 128, 1),
    ("corda_plus_plus/quantised", "gemma2-9b-r32-code-loftq"): (2e-5, 32, 32, 128, 1),
    ("corda_plus_plus/quantised", "gemma2-9b-r64-math-qcorda"): (2e-5, 64, 64, 128, 1),
    ("corda_plus_plus/glue_roberta", "sst2-corda-plus-plus"): (5e-4, 8, 16, 128, 100),
    ("corda_plus_plus/glue_roberta", "mrpc-corda-plus-plus"): (4e-4, 8, 16, 32, 100),
    ("corda_plus_plus/glue_roberta", "cola-corda-plus-plus"): (4e-4, 8, 16, 32, 100),
    ("corda_plus_plus/glue_roberta", "rte-corda-plus-plus"): (4e-4, 8, 16, 32, 100),
    ("corda_plus_plus/glue_roberta", "qnli-corda-plus-plus"): (3e-4, 8, 16, 32, 40),
    ("corda_plus_plus/glue_roberta", "stsb-corda-plus-plus"): (3e-4, 8, 16, 32, 40),
    ("corda_plus_plus/llava_kpm", "okvqa-corda-plus-plus"): (2e-5, 32, 32, 128, 1),
    ("corda_plus_plus/llava_kpm", "pmc-vqa-lora"): (2e-5, 128, 128, 128, 1),
    # FARSS, A.2.1, A.4.1, Table 9; R of the matched rows from Tables 2 and 10 to 12
    ("farss/llama2_7b", "math-farss"): (2e-5, 128, 128, 16, 1),
    ("farss/llama2_7b", "math-farss-matched"): (2e-5, 153, 128, 16, 1),
    ("farss/llama2_7b", "code-farss-matched"): (2e-5, 144, 128, 16, 1),
    ("farss/math", "llama2-13b-farss-matched"): (2e-5, 164, 128, 16, 1),
    ("farss/code", "gemma2-9b-farss-matched"): (2e-5, 155, 128, 16, 1),
    ("farss/instruction", "mistral-7b-farss-matched"): (2e-5, 144, 128, 16, 1),
    ("farss/glue_roberta", "qqp-farss"): (4e-4, 128, 128, 64, 10),
    ("farss/commonsense", "llama3-8b-farss"): (3e-4, 32, 64, 16, 3),
    # FCLoRA, Tables 8, 9, 10, 13, 14
    ("fclora/glue_roberta", "cola-fclora"): (4e-4, 8, 3e-2, 32, 25),
    ("fclora/glue_roberta", "mnli-fclora"): (5e-4, 8, 1e-1, 32, 7),
    ("fclora/glue_roberta", "mrpc-fclora"): (4e-4, 8, 1e-2, 16, 30),
    ("fclora/glue_roberta", "qnli-fclora"): (4e-4, 8, 1e-1, 32, 5),
    ("fclora/glue_roberta", "qqp-fclora"): (5e-4, 8, 1e-3, 32, 5),
    ("fclora/glue_roberta", "rte-fclora"): (5e-4, 8, 5e-2, 32, 50),
    ("fclora/glue_roberta", "sst2-fclora"): (5e-4, 8, 1e-1, 32, 24),
    ("fclora/glue_roberta", "stsb-fclora"): (4e-4, 8, 1e-1, 32, 25),
    ("fclora/glue_deberta_r8", "cola-fclora"): (8e-4, 8, 5e-1, 32, 25),
    ("fclora/glue_deberta_r8", "rte-fclora"): (1.2e-3, 8, 1e-1, 32, 50),
    ("fclora/glue_deberta_r8", "stsb-fclora"): (2.2e-3, 8, 5e-1, 32, 25),
    ("fclora/glue_deberta_r2", "qnli-fclora"): (7e-4, 2, 1e-1, 32, 5),
    ("fclora/glue_deberta_r2", "cola-fclora"): (8e-4, 2, 1.1e-1, 32, 25),
    ("fclora/glue_deberta_r2", "stsb-fclora"): (2.2e-3, 2, 6e-1, 32, 25),
    ("fclora/squad_deberta", "squad-v1-r1-fclora"): (2e-3, 1, 5e-1, 16, 10),
    ("fclora/squad_deberta", "squad-v1-r4-fclora"): (1e-3, 4, 1e-2, 16, 10),
    ("fclora/squad_deberta", "squad-v2-r2-fclora"): (2e-3, 2, 5e-2, 16, 12),
    ("fclora/squad_deberta", "squad-v2-r8-fclora"): (3e-3, 8, 5e-1, 16, 12),
    ("fclora/forgetting_curves", "mrpc-fclora"): (4e-4, 8, 1e-2, 16, 30),
    ("fclora/forgetting_openwebtext", "sst2-fclora"): (5e-4, 8, 1e-1, 32, 24),
    ("fclora/forgetting_methods", "mrpc-fclora-r64"): (4e-4, 64, 1e-2, 16, 30),
    ("fclora/forgetting_methods", "stsb-fclora-r16"): (4e-4, 16, 1e-1, 32, 25),
    ("fclora/forgetting_methods", "stsb-sorsa"): (4e-4, 8, None, 32, 25),
    ("fclora/commonsense", "llama-7b-fclora"): (2e-4, 32, 5e-1, 16, 3),
    ("fclora/commonsense", "llama2-7b-fclora"): (3e-4, 32, 1e-2, 16, 3),
    # LALoRA, Table 2
    ("lalora/gsm8k", "lalora-diag"): (5e-4, 32, 32, 1, 30),
    # FLoRA, Tables 6, 11, 12, section 4.3
    ("flora/glue_deberta", "rte-flora-r8"): (1.2e-3, 8, 0.4, 32, 50),
    ("flora/glue_deberta", "qnli-flora-r2"): (1.2e-3, 2, 0.4, 32, 5),
    ("flora/glue_deberta", "sst2-flora-r2"): (8e-4, 2, 0.4, 32, 24),
    ("flora/llava", "flora"): (2e-4, 128, 2, 16, 1),
    ("flora/commonsense_llama3_8b", "dora"): (3e-5, 16, 32, 16, 3),
    ("flora/vtab_convnextv2", "svhn-flora"): (1e-3, 41, 4, 64, 100),  # s and r₃ are the paper's
}

# FCLoRA: quartile of σ̄, and how U and V start (Tables 8 to 10, 13, 14).
FCLORA = {
    ("glue_roberta", "cola"): (2, "singular"),
    ("glue_roberta", "mrpc"): (2, "singular"),
    ("glue_roberta", "qqp"): (1, "zero_gaussian"),
    ("glue_roberta", "rte"): (4, "zero_gaussian"),
    ("forgetting_methods", "stsb"): (1, "zero_gaussian"),
    ("forgetting_openwebtext", "mrpc"): (2, "singular"),
    ("glue_deberta_r8", "mnli"): (3, "zero_gaussian"),
    ("glue_deberta_r8", "qqp"): (1, "zero_gaussian"),
    ("glue_deberta_r2", "mrpc"): (2, "zero_gaussian"),
    ("glue_deberta_r2", "stsb"): (4, "zero_gaussian"),
    ("squad_deberta", "squad-v1-r8"): (2, "zero_gaussian"),
    ("squad_deberta", "squad-v2-r1"): (3, "zero_gaussian"),
    ("commonsense", "llama2-7b"): (4, "zero_gaussian"),
}

# FARSS: shallow blocks, r_avg, r_max (§4.2, A.6, Table 9 with its two columns of means and maxima put right).
FARSS = {
    ("llama2_7b", "math-farss"): (7, 50, 64),
    ("llama2_7b", "instruction-farss"): (5, 50, 64),
    ("math", "llama3-8b-farss"): (9, 50, 64),
    ("code", "mistral-7b-farss"): (5, 50, 64),
    ("instruction", "mistral-7b-farss"): (7, 50, 64),
    ("instruction", "gemma2-9b-farss-matched"): (11, 50, 64),
    ("glue_roberta", "rte-farss"): (6, 50, 64),
    ("commonsense", "llama2-7b-farss"): (5, 16, 24),
    ("commonsense", "llama3-8b-farss"): (7, 12, 16),
}

# Millions of trained parameters of a row, as the tables count them.
COUNTED = {
    ("corda_plus_plus/llama2_7b_kpm", "math-lora"): 320,
    ("corda_plus_plus/glue_roberta", "sst2-lora"): 0.3,
    ("farss/glue_roberta", "sst2-lora"): 21,
    ("farss/math", "mistral-7b-lora"): 336,
    ("farss/math", "llama2-13b-lora"): 501,
    ("farss/code", "gemma2-9b-lora"): 432,
    ("farss/commonsense", "llama2-7b-lora"): 56,
    ("farss/commonsense", "llama3-8b-lora"): 57,
    ("fclora/glue_roberta", "mrpc-lora"): 1.33,
    ("fclora/glue_deberta_r8", "mrpc-lora"): 1.33,
    ("fclora/glue_deberta_r2", "mrpc-lora"): 0.33,
    ("fclora/commonsense", "llama-7b-lora"): 0.0083 * 6738,
    ("flora/glue_deberta", "rte-flora-r8"): 1.33,
    ("flora/glue_deberta", "rte-flora-r2"): 0.33,
    ("flora/commonsense_llama3_8b", "flora"): 0.0035 * 8030,
    ("flora/vtab_vit", "dtd-flora"): 0.32,
}

# The whole files that are rows of a table by themselves.
SAME = {
    "llama2_7b_math_lora": ("corda_plus_plus/llama2_7b_kpm", "math-lora"),
    "llama2_7b_math_corda_kpm": ("corda_plus_plus/llama2_7b_kpm", "math-corda"),
    "llama2_7b_math_corda_plus_plus_kpm": ("corda_plus_plus/llama2_7b_kpm", "math-corda-plus-plus"),
    "llama2_7b_math_corda_ipm": ("corda_plus_plus/llama2_7b_ipm", "math-corda"),
    "llama2_7b_math_qcorda": ("corda_plus_plus/quantised", "llama2-7b-r128-math-qcorda"),
    "llama2_7b_math_farss": ("farss/llama2_7b", "math-farss"),
}


@pytest.fixture(autouse=True)
def _plugins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed distributions are looked through once: there are hundreds, and hundreds of rows."""
    monkeypatch.setattr(plugins, "entry_points", functools.cache(plugins.entry_points))


def row_of(file: str, row: str | None) -> RunConfig:
    recipe = next(recipe for recipe in SHIPPED if recipe.place == f"{FOLDER}/{file}.yaml")
    return resolve(recipe.configuration(row), recipe.file.parent)


def every_row() -> Iterator[tuple[Recipe, Row | None, RunConfig]]:
    for recipe in SHIPPED:
        for row in list(recipe.rows()) or [None]:
            yield recipe, row, resolve(recipe.configuration(row.name if row else None), recipe.file.parent)


# ---------------------------------------------------------------- every row


def test_every_row_resolves_and_names_its_table() -> None:
    """Every configuration is valid, its method's and penalties' options too; no two share a name."""
    names = []
    for recipe, row, config in every_row():
        names.append(config.name)
        assert recipe.about.paper in PAPERS.values()
        table = row.table if row else recipe.about.table
        assert table.startswith(("Table ", "Fig. ", "after Table ", "appendix ")), (recipe.place, table)
        assert config.method["name"]
        assert config.train.batch_size and config.data.train.path
        if recipe.file.parent.name in PAPERS:
            assert recipe.about.paper == PAPERS[recipe.file.parent.name]
            assert recipe.about.ours, f"{recipe.place}: no paper says everything"
        else:
            assert recipe.about.row
    assert len(names) == len(set(names)) >= 600


def test_every_paper_has_its_main_tables() -> None:
    tables: dict[str, set[str]] = {}
    for recipe, row in ALL_ROWS.values():
        tables.setdefault(recipe.about.paper, set()).add(row.table.split(" (")[0])
    assert tables["CorDA++"] >= {f"Table {n}" for n in ("I", "II", "III", "IV", "V", "VI", "VII")} | {"Fig. 7"}
    assert tables["FARSS"] >= {f"Table {n}" for n in (2, 3, 4, 6, 10, 11, 12)}
    assert tables["FCLoRA"] >= {f"Table {n}" for n in (1, 2, 3, 4, 5, 15, 16, 17)} | {"Fig. 3"}
    assert tables["LALoRA"] >= {"Table 1", "Table 3", "Fig. 3"}
    assert tables["FLoRA"] >= {"Table 3", "Table 4", "Table 7", "Table 8", "after Table 1"}


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.place.removeprefix(f"{FOLDER}/"))
def test_each_method_and_each_task_passes_preflight(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `harness run` checks before it loads anything, with stand-ins for data that must be prepared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))  # IFEval's resource, which is none of the recipe's
    (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)
    seen: set[object] = set()
    for row in list(recipe.rows()) or [None]:
        content = recipe.configuration(row.name if row else None)
        config = resolve(content, recipe.file.parent)
        # Every method once and every task once: their combinations have nothing new to look at.
        kinds = {
            config.method["name"],
            (config.task, *config.eval.task),
            (config.model.quantization, config.model.dtype),
        }
        if kinds <= seen:
            continue
        seen |= kinds
        for source in (config.data.train, config.data.preserve, config.data.validation):
            if source is not None and source.path.startswith("data/"):
                assert recipe.about.needs, f"{recipe.place} reads {source.path} and does not say what it needs"
                stand_in(tmp_path / source.path, source.model_dump())
        if config.task != "causal_lm":  # whose evaluation looks for its data before anything runs
            content.setdefault("eval", {})["data_dir"] = str(find("eval/samples"))
        check(resolve(content, recipe.file.parent))


def stand_in(path: Path, source: dict[str, Any]) -> None:
    if path.suffix == ".jsonl":
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [source[key] for key in ("image", "prompt", "response") if source[key] is not None]
        path.write_text(json.dumps({column: "x" for column in columns}) + "\n")
    else:
        for name in ("cat", "dog"):
            (path / name).mkdir(parents=True, exist_ok=True)
            (path / name / "1.png").touch()


# ---------------------------------------------------------------- against the papers


@pytest.mark.parametrize(("file", "row"), SAID, ids=lambda part: part)
def test_hyper_parameters(file: str, row: str) -> None:
    config = row_of(file, row)
    train, method = config.train, config.method
    strength = method.get("gamma") if method["name"] == "fclora" else method.get("scale", method.get("alpha"))
    said = (train.learning_rate, method.get("rank"), strength, train.batch_size, train.epochs)
    assert said == pytest.approx(SAID[file, row]) if None not in said else said == SAID[file, row]


@pytest.mark.parametrize(("file", "row"), FCLORA, ids=lambda part: part)
def test_fclora_bounds(file: str, row: str) -> None:
    method = row_of(f"fclora/{file}", f"{row}-fclora").method
    assert (method["quartile"], method["init"]) == FCLORA[file, row]


@pytest.mark.parametrize(("file", "row"), FARSS, ids=lambda part: part)
def test_farss_shallow_blocks(file: str, row: str) -> None:
    method = row_of(f"farss/{file}", row).method
    assert (method["shallow_layers"], method["r_avg"], method["r_max"], method["r_min"]) == (*FARSS[file, row], 1)


def test_corda_plus_plus_settings() -> None:
    """Appendix A "Implementation details": five rounds of 256, fp32, the cosine and its warmup."""
    for row in ("math-corda", "math-corda-plus-plus"):
        config = row_of("corda_plus_plus/llama2_7b_kpm", row)
        plus = row.endswith("plus")
        assert (config.method["rounds"], config.method["dynamic_rank"]) == ((5, True) if plus else (1, False))
        assert config.method["mode"] == "kpm" and config.data.preserve is not None
        assert config.data.preserve.samples == 256 and config.data.train.split == "train[:100000]"
        assert config.model.dtype == "float32" and config.model.target_modules == "all-linear"
        assert (config.train.scheduler, config.train.warmup_ratio, config.train.weight_decay) == ("cosine", 0.03, 0)
    assert row_of("corda_plus_plus/llama2_7b_kpm", "math-full").model.dtype == "bfloat16"
    glue = row_of("corda_plus_plus/glue_roberta", "rte-corda-plus-plus")
    assert (glue.method["mode"], glue.model.target_modules) == ("ipm", ["query", "value"])
    assert (glue.train.scheduler, glue.train.warmup_ratio, glue.data.max_length) == ("linear", 0.06, 512)
    loftq = row_of("corda_plus_plus/quantised", "llama2-13b-r128-math-loftq")
    assert (loftq.method["iterations"], loftq.model.quantization) == (5, "nf4")


def test_encoders_are_scored_by_the_suite_of_their_task() -> None:
    """GLUE's and SQuAD's metrics; where FCLoRA shows what is forgotten also what is left of the pre-training task."""
    for recipe, row, config in every_row():
        if config.task in ("sequence_classification", "regression", "question_answering"):
            assert row is not None and config.eval.task == [config.data.train.subset or row.name[:8].replace("-", "_")]
            assert config.task == "regression" or config.data.train.subset != "stsb"
            retained = recipe.file.stem.startswith(("ablation_roberta", "forgetting_"))
            assert config.eval.knowledge == (["preserve"] if retained else [])
            assert config.eval.checkpoints == (row.table == "Fig. 3")


def test_lalora_sources() -> None:
    config = row_of("lalora/gsm8k", "lalora-diag")
    (penalty,) = config.penalties
    assert (penalty["name"], penalty["curvature"], penalty["lambda"]) == ("lalora", "diag", 100)
    assert [source["path"] for source in penalty["sources"]] == [
        "Rowan/hellaswag",
        "allenai/winogrande",
        "allenai/ai2_arc",
    ]
    assert (config.train.seed, config.data.max_length) == (42, 512)
    assert row_of("lalora/gsm8k", "migu").penalties[0]["threshold"] == 0.7
    assert row_of("lalora/gsm8k", "baseline").penalties == []


@pytest.mark.parametrize("name", SAME)
def test_a_whole_file_is_the_row_that_it_names(name: str) -> None:
    """The files at the top, for people to read and copy, train as the rows of the tables do."""
    whole, (file, row) = row_of(name, None), SAME[name]
    assert ONE_FILE[f"{FOLDER}/{name}.yaml"].about.row == row
    other = row_of(file, row)
    assert whole.method == other.method and whole.model == other.model and whole.data.train == other.data.train
    kept = {"save_steps", "preserve_loss_steps"}  # what is written and watched, not what is computed
    assert whole.train.model_dump(exclude=kept) == other.train.model_dump(exclude=kept)
    if whole.method.get("mode") == "kpm":
        assert whole.data.preserve == other.data.preserve


def test_every_whole_file_is_compared() -> None:
    assert set(SAME) == {Path(place).stem for place in ONE_FILE}


# ---------------------------------------------------------------- target modules and parameter counts (slow)


@functools.cache
def base(path: str, task: str) -> nn.Module:
    """The model of a hub id at its real size, without any weights (device meta)."""
    import transformers as t

    llama = {
        "meta-llama/Llama-2-7b-hf": t.LlamaConfig(intermediate_size=11008),
        "huggyllama/llama-7b": t.LlamaConfig(intermediate_size=11008),
        "meta-llama/Llama-2-13b-hf": t.LlamaConfig(
            hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
        "meta-llama/Meta-Llama-3-8B": t.LlamaConfig(
            vocab_size=128256, intermediate_size=14336, num_key_value_heads=8
        ),
        "mistralai/Mistral-7B-v0.3": t.MistralConfig(vocab_size=32768),
        "google/gemma-2-9b": t.Gemma2Config(
            hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256,
        ),
    }  # fmt: skip
    with torch.device("meta"):
        if path in llama:
            return t.AutoModelForCausalLM.from_config(llama[path])
        if path == "FacebookAI/roberta-base":
            return t.RobertaForSequenceClassification(t.RobertaConfig())
        if path == "microsoft/deberta-v3-base":
            config = t.DebertaV2Config(
                hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
            )
            kind = (
                t.DebertaV2ForQuestionAnswering
                if task == "question_answering"
                else t.DebertaV2ForSequenceClassification
            )
            return kind(config)
        if path == "google/vit-base-patch16-224-in21k":
            return t.ViTForImageClassification(t.ViTConfig())
        if path == "facebook/convnextv2-large-22k-224":
            return t.ConvNextV2ForImageClassification(
                t.ConvNextV2Config(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3])
            )
    raise AssertionError(f"no model of {path}")


def trained(config: RunConfig) -> float:
    """Millions of numbers that the adapter of ``config`` has."""
    convolutions = config.method["name"] in ("flora", "lora_conv")
    model = base(config.model.path, config.task)
    layers = describe(target_modules(model, config.model.target_modules, convolutions))
    form = Tucker(config.method["rank"], config.method.get("kernel_rank")) if config.method["name"] == "flora" else (
        Reshaped(config.method["rank"])
    )  # fmt: skip
    return sum(torch.Size(shape).numel() for layer in layers for shape in form.shapes(layer).values()) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize(("file", "row"), COUNTED, ids=lambda part: part)
def test_target_modules_come_to_the_papers_parameter_counts(file: str, row: str) -> None:
    assert trained(row_of(file, row)) == pytest.approx(COUNTED[file, row], rel=0.04)


@pytest.mark.slow
def test_every_convolution_comes_to_the_smallest_budgets_of_flora_table_1() -> None:
    """§3.1: r₃²r² + r·(d_in + d_out) + 2·r₃·k for a convolution; for LoRA the r·k² of common code. 1 × 1 ones count."""
    config = row_of("flora/vtab_convnextv2", "dtd-flora")
    layers = describe(target_modules(base(config.model.path, config.task), config.model.target_modules, True))
    r, r3 = config.method["rank"], config.method["kernel_rank"]
    flora = lora = 0
    for layer in layers:
        sides, (k, *_) = layer.in_features + layer.out_features, layer.kernel or (1,)
        flora += r * sides + (r3**2 * r**2 + 2 * r3 * k if layer.kernel else r**2)
        lora += row_of("flora/vtab_convnextv2", "dtd-lora").method["rank"] * k**2 * sides
    assert (flora / 1e6, lora / 1e6) == pytest.approx((12.77, 12.94), abs=0.01)
    assert trained(config) < 12.77  # ranks that a depthwise convolution has no use for are left out


@pytest.mark.slow
def test_named_target_modules_are_there_and_leave_heads_alone() -> None:
    """Every entry of ``model.target_modules`` names layers of its model, and nothing of a task's head is adapted."""
    looked_at = set()
    for _, _, config in every_row():
        targets = config.model.target_modules
        key = (config.model.path, config.task, str(targets))
        if config.model.path.startswith(("meta-llama/Llama-3.2", "llava-hf/")) or key in looked_at:
            continue
        looked_at.add(key)
        names = list(target_modules(base(config.model.path, config.task), targets, convolutions=True))
        assert not [name for name in names if any(part in name for part in ("classifier", "pooler", "qa_", "lm_head"))]
        if targets != "all-linear":
            assert all(any(name.endswith(f".{target}") for name in names) for target in targets)
    assert len(looked_at) >= 4


# ---------------------------------------------------------------- the listing


def test_the_listing_has_every_row_with_its_table_and_command() -> None:
    result = CliRunner().invoke(app, ["recipes"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    commands = {line.split("harness run ")[1].split("  #")[0]: line for line in lines if "harness run " in line}
    assert set(commands) == {f"{place}:{row}" for place, row in ALL_ROWS} | set(ONE_FILE)
    for (place, name), (_, row) in ALL_ROWS.items():
        before = commands[f"{place}:{name}"].split("harness run")[0].split()
        assert before == [*row.table.split(), name]
    for recipe in SHIPPED:
        assert f"{recipe.about.paper} · {recipe.about.title}" in lines
        assert all(f"  ours: {what}" in lines for what in recipe.about.ours)
        assert all(f"  needs: {what}" in lines for what in recipe.about.needs)


@pytest.mark.parametrize("words", [["fclora", "mrpc"], ["Table", "III"], ["SQUAD"]])
def test_words_choose_rows(words: list[str]) -> None:
    lines = recipes.listing(words)
    runs = [line for line in lines if "harness run" in line]
    assert 0 < len(runs) < len(ALL_ROWS)
    if words[0] == "fclora":
        assert all("fclora/" in line and "mrpc-" in line for line in runs)


def test_a_listed_command_names_what_load_config_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder: what begins with launch/recipes is found where the harness is installed."""
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("launch/recipes/fclora/glue_roberta.yaml:mrpc-fclora"), ["train.seed=3"])
    assert config.name == "fclora-roberta-glue-mrpc-fclora"
    assert (config.train.batch_size, config.train.seed, config.data.train.subset) == (16, 3, "mrpc")
    assert config.dump() == resolve(yaml.safe_load(config.dump())).dump()
    assert load_config(Path("launch/recipes/llama2_7b_math_lora.yaml")).name == "llama2-7b-math-lora"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "launch/recipes/fclora/glue_robreta.yaml:mrpc-fclora",
            "did you mean 'launch/recipes/fclora/glue_roberta.yaml'?",
        ),
        ("fclora/glue_roberta.yaml", "did you mean 'launch/recipes/fclora/glue_roberta.yaml'?"),
        ("launch/recipes/fclora/glue_roberta.yaml:mrpc-fclroa", "no row 'mrpc-fclroa'; did you mean 'mrpc-fclora'?"),
        ("launch/recipes/fclora/glue_roberta.yaml", "has 64 rows; name one: "),
        ("launch/recipes/llama2_7b_math_lora.yaml:mrpc", "is one configuration, without rows"),
        ("launch/recipes/tiny.yaml:mrpc", "has no rows (no block `recipe`), 'mrpc' given"),
    ],
)
def test_unknown_files_and_rows(place: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(Path(place))
    line = str(error.value)
    assert line.startswith("config: ") and said in line and "\n" not in line


def test_unknown_words_and_one_line_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"recipes: 'fclroa' is in none of them; did you mean 'fclora'\?"):
        recipes.listing(["fclroa"])
    monkeypatch.setattr(sys, "argv", ["harness", "run", "launch/recipes/farss/maths.yaml:x"])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    assert said.err.count("\n") == 1 and "did you mean 'launch/recipes/farss/math.yaml'?" in said.err


# ---------------------------------------------------------------- recipes of one's own

OWN = """
recipe:
  paper: ours
  table: Table 1
  title: two tasks, two methods
  rows:
    task: {a: {data.train.path: a.jsonl}, b: {data.train.path: b.jsonl, table: Table 2}}
    method: {lora: {method: {name: lora, rank: 4}}, pissa: {method: {name: pissa, rank: 4}}}
  where:
    "b-*": {method.rank: 8}
name: own
model: {path: some/model}
data: {train: {path: x.jsonl, prompt: p}}
method: {name: lora, rank: 2, alpha: 2}
"""


def own(folder: Path, text: str = OWN) -> Path:
    file = folder / "own.yaml"
    file.write_text(text)
    return file


def test_a_row_is_one_entry_of_each_group(tmp_path: Path) -> None:
    """Later groups over earlier ones, `where` over all, a block replaced as a whole (no α is left of the base's)."""
    file = own(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"p": 1}\n')
    config = load_config(Path(f"{file}:b-pissa"), ["train.epochs=2"])
    assert config.method == {"name": "pissa", "rank": 8, "alpha": None}
    assert (config.name, config.train.epochs) == ("own-b-pissa", 2)
    assert config.data.train.path == str(tmp_path / "b.jsonl")  # relative to the file, as without rows
    assert load_config(Path(f"{file}:a-lora")).method["rank"] == 4


def test_sweeps_start_from_a_row_too(tmp_path: Path) -> None:
    from harness.cluster.sweep_cells import load_sweep

    sweep = tmp_path / "sweep.yaml"
    row = "launch/recipes/farss/math.yaml:llama3-8b-farss"
    sweep.write_text(f"base: {row}\nlist: [{{label: once, eval.task: [], eval.knowledge: []}}]\nseeds: [0, 1]\n")
    cells = load_sweep(sweep, tmp_path / "out").cells
    assert [cell.config.method["shallow_layers"] for cell in cells] == [9, 9]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  title:", "  row: x\n  titel: x\n  title:", "recipe.titel: unknown key"),
        ("  title: two tasks, two methods\n", "", "recipe.title: missing"),
        ("task: {a:", "task: {a b:", "recipe.rows.task: 'a b' given; allowed: letters"),
        ('"b-*"', '"c-*"', "recipe.where: 'c-*' is the pattern of no row"),
        ("{name: pissa, rank: 4}", "{name: pisa, rank: 4}", "method.name: 'pisa' given"),
        ("data.train.path: b.jsonl", "data.train.path.x: b", "data.train.path.x: 'path' holds 'x.jsonl'"),
    ],
)
def test_mistakes_in_a_recipe_of_ones_own(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert OWN.count(old) == 1
    file = own(tmp_path, OWN.replace(old, new))
    with pytest.raises(UserError) as error:
        load_config(Path(f"{file}:b-pissa"))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_two_rows_of_one_name_are_refused(tmp_path: Path) -> None:
    text = OWN.replace("task: {a:", "task: {a-lora: {}, a:").replace("method: {lora:", "method: {lora-lora: {}, lora:")
    with pytest.raises(UserError, match="two rows are called 'a-lora-lora'"):
        load_config(Path(f"{own(tmp_path, text)}:a-lora"))


def test_recipes_are_in_folders_that_the_wheel_carries() -> None:
    wheel = find("pyproject.toml").read_text()
    assert f'"{FOLDER}"' in wheel
    assert all(recipe.file.is_relative_to(find(FOLDER)) for recipe in SHIPPED)
