"""The direct evaluation: scores, items, K and T of encoders, on their own data and on suites."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from harness import preflight
from harness.config import RunConfig
from harness.data.collation import collate
from harness.data.tokenisation import IGNORED
from harness.errors import UserError
from harness.evaluation.candidates import Candidate
from harness.evaluation.direct import evaluate_directly, expanded, load_candidate, questions, scored
from harness.evaluation.items import read_items
from harness.evaluation.stage import evaluate_run_directly
from harness.evaluation.suites import read_suites
from harness.models.calling import arguments
from harness.models.loading import load_model
from harness.resources import find
from harness.run_directory import RunDirectory
from harness.tasks.registry import load_task
from tests.tasks.encoders import FAMILIES, headed, row_inputs, run_config, save_encoder, write_rows

SUITES = read_suites()
GLUE = {entry.task: entry for entry in SUITES["glue"].tasks}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random encoder of a family, saved once."""
    folder = tmp_path_factory.mktemp("encoders")

    def base(family: str) -> Path:
        place = folder / family
        return place if place.is_dir() else save_encoder(place, family)

    return base


def moved(model: torch.nn.Module, size: float = 0.2) -> torch.nn.Module:
    """The model with other weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = size * float(parameter.abs().mean())
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model


def tuned_run(config: RunConfig) -> tuple[RunConfig, RunDirectory]:
    """A run whose final model was exported as ``merged/`` alone."""
    config, _ = headed(config)
    run = RunDirectory(config.run_directory)
    moved(load_model(config.model)).save_pretrained(run.merged)
    return config, run


@pytest.mark.parametrize("family", FAMILIES)
def test_results_against_loops(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    blocks = {"eval": {"knowledge": ["preserve"], "task": ["validation"], "batch_size": 5}}
    config, run = tuned_run(run_config(tmp_path, bases(family), "sequence_classification", **blocks))
    results = evaluate_run_directly(config, run)
    assert results == json.loads(run.results.read_text())
    assert (results["engine"], results["base_model"]) == ("direct", str(bases(family)))
    base, final = results["models"]
    assert (base["name"], final["name"], base["K"]) == ("base", "final", 1.0)

    task = load_task(config)
    examples = task.read(config.data.validation, "data.validation")
    for found, path in ((base, config.model.path), (final, run.merged)):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        right = [
            int(model(**row_inputs(row)).logits[0].argmax()) == example.answer
            for row, example in zip(task.rows(examples), examples, strict=True)
        ]
        assert found["scores"]["validation"]["value"] == found["T"] == pytest.approx(np.mean(right))
        assert found["scores"]["validation"]["items"] == 12
        kept, loss = masked_by_hand(config, path, bases(family))
        assert found["scores"]["preserve"]["value"] == pytest.approx(kept)
        assert found["scores"]["preserve"]["others"]["masked_lm_loss"] == pytest.approx(loss, rel=1e-4)
    assert final["K"] == pytest.approx(final["scores"]["preserve"]["value"] / base["scores"]["preserve"]["value"])
    assert final["intervals"].keys() >= {"T"}
    items = read_items(run.items / "final.jsonl")
    assert np.mean([item.score for item in items["validation"]]) == pytest.approx(final["T"])
    assert {item.expected for item in items["validation"]} <= {"low", "middle", "high"}
    before = read_items(run.items / "base.jsonl")
    assert [item.id for item in before["preserve"]] == [item.id for item in items["preserve"]]


def masked_by_hand(config: RunConfig, tuned: str | Path, base: Path) -> tuple[float, float]:
    """Accuracy and loss of the base's own masked-LM head over a tuned body, token by token."""
    model = AutoModelForMaskedLM.from_pretrained(base, dtype=torch.float32).eval()
    body = AutoModelForSequenceClassification.from_pretrained(tuned, dtype=torch.float32)
    prefix = f"{model.base_model_prefix}."
    own = dict(body.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                parameter.copy_(own[name])
    task = load_task(config).retention()
    right, losses = [], []
    for example in task.read(config.data.preserve, "data.preserve"):
        row = task.masked(example, "evaluation")
        logits = model(**row_inputs(row)).logits[0].double()
        for place, label in enumerate(row.labels):
            if label != IGNORED:
                right.append(int(logits[place].argmax()) == label)
                losses.append(-logits[place].log_softmax(-1)[label].item())
    return float(np.mean(right)), float(np.mean(losses))


def test_an_adapter_is_evaluated_as_its_merged_model(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint has an adapter alone; its head comes with it."""
    config, _ = headed(run_config(tmp_path, bases("deberta"), "regression"))
    model = get_peft_model(
        load_model(config.model),
        LoraConfig(r=4, target_modules=["query_proj", "dense"], modules_to_save=["classifier", "pooler"]),
    )
    moved(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": 3})})
    # What `moved` did to the frozen base is no part of the adapter.
    under = load_candidate(config, Candidate("a", 1, config.model.path, tmp_path / "adapter"))
    again = load_candidate(config, Candidate("a", 1, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"))
    trained = {name: tensor for name, tensor in again.named_parameters() if name.startswith(("classifier", "pooler"))}
    assert trained and all(torch.allclose(dict(under.named_parameters())[n], tensor) for n, tensor in trained.items())
    scores = evaluate_directly(config, [Candidate("a", 1, config.model.path, tmp_path / "adapter")], ["validation"])[0]
    task = load_task(config)
    examples = task.read(config.data.validation, "data.validation")
    predictions = [float(under(**row_inputs(row)).logits[0, 0]) for row in task.rows(examples)]
    expected = np.corrcoef(predictions, [example.answer for example in examples])[0, 1]
    assert scores.scores["validation"].value == pytest.approx(expected, rel=1e-4)
    assert scores.scores["validation"].others.keys() == {"spearman"}
    assert all(item.score is None for item in scores.items["validation"])  # a correlation is no mean


@pytest.mark.parametrize("name", [*GLUE, "squad_v1", "squad_v2"])
def test_suites(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The shipped samples of every task, with the metrics of its suite."""
    entry = GLUE.get(name) or next(e for e in SUITES["squad"].tasks if e.task == name)
    kind = "question_answering" if "squad" in name else "regression" if name == "stsb" else "sequence_classification"
    samples = find("eval/samples")
    folder = samples / entry.data["train"].removesuffix("/train")
    named = dict(zip(("prompt", "pair"), entry.texts, strict=False)) | {"response": entry.label}
    if entry.classes:
        named["classes"] = list(entry.classes)
    train = {"path": str(folder / "train.jsonl"), **named}
    data: dict[str, Any] = {"train": train, "max_length": 64, "validation": None, "preserve": None}
    options = {"task": [name], "data_dir": str(samples), "limit": 8}
    config = run_config(tmp_path, bases("roberta"), kind, data=data, eval=options)
    preflight.check(config)
    config, _ = headed(config)
    (scores,) = evaluate_directly(config, [Candidate("base", None, config.model.path)], [name])
    score = scores.scores[name]
    assert (score.metric, tuple(score.others)) == (entry.metrics[0], entry.metrics[1:])
    assert score.items == len(scores.items[name]) == 8
    assert -1 <= score.value <= 1
    rows = [json.loads(line) for line in sorted(folder.glob("validation*.jsonl"))[0].read_text().splitlines()[:8]]
    shown = [item.question for item in scores.items[name]]
    assert all(row[entry.texts[0]] in text for row, text in zip(rows, shown, strict=True))
    if entry.classes:
        assert [item.expected for item in scores.items[name]] == [entry.classes[row["label"]] for row in rows]


def suite_run(base: Path, folder: Path, name: str, head: str, **options: Any) -> RunConfig:
    """A run on a task of GLUE whose training rows have the classes' names, or their numbers, with or without names."""
    entry = GLUE[name]
    rows = [json.loads(line) for line in (find("eval/samples") / "glue" / name / "train.jsonl").open()]
    if head == "sorted names":
        rows = [row | {entry.label: entry.classes[row[entry.label]]} for row in rows]
    train: dict[str, Any] = dict(zip(("prompt", "pair"), entry.texts, strict=False))
    train |= {"path": write_rows(folder / "rows.jsonl", rows), "response": entry.label}
    if head == "the suite's":
        train["classes"] = list(entry.classes)
    return run_config(
        folder,
        base,
        "sequence_classification" if entry.classes else "regression",
        data={"train": train, "max_length": 64, "validation": None, "preserve": None},
        eval={"task": [name], "data_dir": str(find("eval/samples")), **options},
    )


@pytest.mark.parametrize("head", ["sorted names", "the suite's", "numbers"])
@pytest.mark.parametrize(
    ("name", "positive", "metrics"),
    [
        # right and of class 1, wrongly of class 1, missed: 6, 4, 5 of 20 rows; of class 0 F1 would be 10/19
        ("mrpc", 10, {"accuracy": 11 / 20, "f1": 12 / 21}),
        ("qqp", 8, {"accuracy": 8 / 20, "f1": 6 / 18}),  # 3, 5, 7
        ("cola", 10, {"matthews_correlation": (7 * 6 - 3 * 4) / (10 * 11 * 9 * 10) ** 0.5}),  # 7, 3, 4
    ],
)
def test_metrics_go_by_the_classes_of_the_suite(
    name: str, positive: int, metrics: dict[str, float], head: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """By hand, of answers that say class 1 to the first ``positive`` rows; the head may have its classes otherwise."""
    config, entry = suite_run(bases("roberta"), tmp_path, name, head), GLUE[name]
    task, (question,) = load_task(config), questions(config, [name])
    assert (task.classes == [*entry.classes][::-1]) == (head == "sorted names")
    one, other = (c if head == "numbers" else entry.classes[int(c)] for c in ("1", "0"))
    answers = [task.classes.index(one if row < positive else other) for row in range(20)]
    score, _ = scored(question, answers)
    found = {score.metric: score.value} | score.others
    assert list(found) == list(entry.metrics)
    assert found == pytest.approx(metrics)


def test_correlations_by_hand(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Of 3.7, 3.4, 1.5 and 0.9."""
    (question,) = questions(suite_run(bases("roberta"), tmp_path, "stsb", "numbers", limit=4), ["stsb"])
    score, _ = scored(question, [3.0, 4.0, 1.0, 0.0])
    assert (score.metric, score.value) == ("pearson", pytest.approx(7.2 / 57.475**0.5))
    assert score.others == {"spearman": pytest.approx(1 - 6 * 2 / (4 * 15))}


def test_f1_of_a_model_whose_classes_are_sorted(bases: Callable[[str], Path], tmp_path: Path) -> None:
    config, _ = headed(suite_run(bases("roberta"), tmp_path, "mrpc", "sorted names"))
    model, (question,) = load_model(config.model), questions(config, ["mrpc"])
    batch = collate(question.task.rows(question.asked), question.task.pad_id)
    with torch.no_grad():  # so that it says both
        model.classifier.out_proj.bias -= model(**arguments(model, batch)).logits.mean(0)
    model.save_pretrained(tmp_path / "merged")
    (scores,) = evaluate_directly(config, [Candidate("final", 1, tmp_path / "merged")], ["mrpc"])
    pairs = [(item.answer, item.expected) for item in scores.items["mrpc"]]
    right = pairs.count(("equivalent", "equivalent"))
    wrong = sum(answer != expected for answer, expected in pairs)
    assert right and pairs.count(("not_equivalent", "not_equivalent")) not in (0, right)
    assert scores.scores["mrpc"].others["f1"] == pytest.approx(2 * right / (2 * right + wrong))


def test_names(bases: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(tmp_path, bases("roberta"), "question_answering")
    assert expanded(config, ["validation", "suite:squad"]) == ["validation", "squad_v1", "squad_v2"]
    assert [question.key for question in questions(config, ["preserve", "validation"])] == [
        "data.preserve",
        "data.validation",
    ]
    without = config.model_copy(update={"data": config.data.model_copy(update={"validation": None})})
    with pytest.raises(UserError, match=r"^data.validation: missing"):
        questions(without, ["validation"])
    with pytest.raises(UserError, match=r"^eval.data_dir: the task 'squad_v1' has no data"):
        questions(
            config.model_copy(update={"eval": config.eval.model_copy(update={"data_dir": str(tmp_path)})}), ["squad_v1"]
        )


def test_outputs_that_are_no_numbers(bases: Callable[[str], Path], tmp_path: Path) -> None:
    config, run = tuned_run(run_config(tmp_path, bases("roberta"), "regression"))
    model = load_model(config.model)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model.save_pretrained(run.merged)
    AutoTokenizer.from_pretrained(config.model.path).save_pretrained(run.merged)
    with pytest.raises(UserError, match="outputs are NaN"):
        evaluate_directly(config, [Candidate("final", 4, run.merged)], ["validation"])
