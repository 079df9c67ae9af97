"""The tasks of encoders: reading, rows, heads, statistics; and whole runs on the small encoders (slow)."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from harness import preflight
from harness.adapters.lora import attach_lora, load_factors
from harness.config import ModelConfig, RunConfig, SourceConfig, load_config
from harness.data.collation import collate
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import LowRank
from harness.methods.registry import build_method
from harness.models.calling import arguments
from harness.models.loading import load_model
from harness.models.sharing import input_groups
from harness.models.targets import adapted_modules
from harness.models.weights import BaseWeights, empty_model
from harness.pipeline import run_stages
from harness.run_directory import RunDirectory
from harness.stages.train import build_model
from harness.statistics.adapter_curvature import diagonal_fisher, kronecker_factors, linear_pairs, trained_weights
from harness.statistics.loss import Labels
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident
from harness.statistics.statistic import KINDS
from harness.statistics.streamed import collect_streamed
from harness.tasks.encoder_base import Reference, Texts
from harness.tasks.encoders import ENCODER_TASKS
from harness.tasks.masked_lm import MaskedLM
from harness.tasks.question_answering import QuestionAnswering, best_span
from harness.tasks.registry import load_task
from harness.tiny.encoders import build_encoder
from tests.conftest import run_gang
from tests.tasks.encoders import (
    FAMILIES,
    OPTIONS,
    columns,
    direct_statistics,
    headed,
    row_inputs,
    rows_of,
    run_config,
    save_encoder,
    sentences,
    write_rows,
)
from tests.training.test_runs import kill_after

BOUND = 1e-4


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random encoder of a family, saved once."""
    folder = tmp_path_factory.mktemp("encoders")

    def base(family: str) -> Path:
        place = folder / family
        return place if place.is_dir() else save_encoder(place, family)

    return base


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# -- reading -----------------------------------------------------------------------------------------------------------


def test_classes_by_names_numbers_and_features(bases: Callable[[str], Path], tmp_path: Path) -> None:
    import datasets

    config = run_config(tmp_path, bases("roberta"), "sequence_classification")
    task = load_task(config)
    assert task.classes == ["high", "low", "middle"]
    rows = rows_of("sequence_classification", 24)
    examples = task.read(config.data.train, "data.train")
    assert [task.classes[example.answer] for example in examples] == [row["label"] for row in rows]
    assert [(example.first, example.second) for example in examples] == [(row["a"], row["b"]) for row in rows]

    numbered = [row | {"label": ["low", "middle", "high"].index(row["label"])} for row in rows]
    path = write_rows(tmp_path / "numbered.jsonl", numbered)
    config = run_config(tmp_path, bases("roberta"), "sequence_classification", data={"train": source(path)})
    assert load_task(config).classes == ["0", "1", "2"]

    features = datasets.Features(
        {
            "a": datasets.Value("string"),
            "b": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["low", "middle", "high"]),
        }
    )
    kept = [{name: row[name] for name in features} for row in numbered]
    datasets.Dataset.from_list(kept, features=features).to_parquet(tmp_path / "rows.parquet")
    config = run_config(
        tmp_path, bases("roberta"), "sequence_classification", data={"train": source(str(tmp_path / "rows.parquet"))}
    )
    task = load_task(config)
    assert task.classes == ["low", "middle", "high"]
    # Another file may number the same names otherwise: names decide.
    other = SourceConfig(path=path, classes=["high", "low", "middle"], **columns("sequence_classification"))
    named = [["high", "low", "middle"][row["label"]] for row in numbered]
    assert [task.classes[example.answer] for example in task.read(other, "data.validation")] == named


def source(path: str) -> dict[str, Any]:
    return {"path": path, **columns("sequence_classification"), "samples": 16}


@pytest.mark.parametrize("label", ["hihg", 3, -1, None, 0.5])
def test_a_label_that_the_head_has_not(label: Any, bases: Callable[[str], Path], tmp_path: Path) -> None:
    rows = rows_of("sequence_classification", 5)
    for row in rows:
        row["label"] = {"low": 0, "middle": 1, "high": 2}[row["label"]] if not isinstance(label, str) else row["label"]
    rows[3]["label"] = label
    path = write_rows(tmp_path / "bad.jsonl", rows)
    config = run_config(tmp_path, bases("roberta"), "sequence_classification", data={"validation": source(path)})
    with pytest.raises(UserError) as error:
        preflight.check(config)
    one_line(error, "data.validation.response: row 3", repr(label), "high, low, middle")
    if label == "hihg":
        one_line(error, "did you mean 'high'?")


def test_numbers_are_numbers(bases: Callable[[str], Path], tmp_path: Path) -> None:
    rows = rows_of("regression", 4)
    rows[2]["number"] = None
    path = write_rows(tmp_path / "bad.jsonl", rows)
    config = run_config(
        tmp_path, bases("roberta"), "regression", data={"validation": {"path": path, **columns("regression")}}
    )
    with pytest.raises(UserError) as error:
        preflight.check(config)
    one_line(error, "data.validation.response: row 2", "None")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["jar"], "answer_start": [0]}, "begins at character 0"),
        ({"text": ["jar"], "answer_start": []}, "{text: [...], answer_start: [...]}"),
        ({"text": None, "answer_start": None}, "{text: [...], answer_start: [...]}"),
    ],
)
def test_answers_stand_where_they_say(
    answers: dict[str, Any], message: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = rows_of("question_answering", 4)
    rows[1] |= {"b": "one jar here.", "answers": answers}
    path = write_rows(tmp_path / "bad.jsonl", rows)
    config = run_config(
        tmp_path,
        bases("roberta"),
        "question_answering",
        data={"validation": {"path": path, **columns("question_answering")}},
    )
    with pytest.raises(UserError) as error:
        preflight.check(config)
    one_line(error, "data.validation.response: row 1", message)


def test_answers_as_a_list_of_pairs(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The other form in which SQuAD is found."""
    rows = [
        {"a": "what?", "b": "one jar.", "answers": [{"text": "jar", "answer_start": 4}]},
        {"a": "what?", "b": "one jar.", "answers": []},
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    config = run_config(
        tmp_path,
        bases("roberta"),
        "question_answering",
        data={"train": {"path": path, **columns("question_answering")}},
    )
    task = load_task(config)
    assert [one.answer for one in task.read(config.data.train, "data.train")] == [(Reference("jar", 4),), ()]
    assert task.abstains


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_two_texts_in_one_row(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    task = load_task(run_config(tmp_path, bases(family), "sequence_classification"))
    long = Texts("amber bridge.", " ".join(sentences(10)), 1)
    row = task.row(long)
    assert len(row.input_ids) == 32
    assert (row.answer, row.labels) == (1, [])
    tokenizer = task.tokenizer
    first = tokenizer("amber bridge.", add_special_tokens=False)["input_ids"]
    assert row.input_ids[1 : 1 + len(first)] == first  # the longer one was cut
    if family == "roberta":
        assert not row.columns
    else:
        segments = row.columns["token_type_ids"]
        assert segments == [0] * (len(first) + 2) + [1] * (32 - len(first) - 2)
        assert collate([row, task.row(Texts("jar.", None, 0))], task.pad_id)["token_type_ids"].shape == (2, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_hold_the_answer_or_say_so(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    task = load_task(run_config(tmp_path, bases(family), "question_answering"))
    assert isinstance(task, QuestionAnswering)
    context = " ".join(sentences(8, 3))
    word = context.split()[17].strip(".")
    start = context.index(word, len(" ".join(context.split()[:17])))
    example = Texts("where is it?", context, (Reference(word, start),))
    windows = task.windows(example)
    assert len(windows) > 2
    held = 0
    for window in windows:
        inside = [span for span in window.spans if span is not None]
        covered = inside[0][0] <= start and start + len(word) <= inside[-1][1]
        begin, end = window.row.answer
        assert len(window.row.input_ids) <= 32
        if covered:
            held += 1
            assert context[window.spans[begin][0] : window.spans[end][1]].strip(" .") == word
        else:
            assert (begin, end) == (0, 0)
    assert held >= 1
    ends = [[span for span in window.spans if span is not None][-1][1] for window in windows]
    starts = [next(span for span in window.spans if span is not None)[0] for window in windows]
    assert starts[0] == 0 and ends[-1] == len(context)
    assert all(begin < end for begin, end in zip(starts[1:], ends, strict=False))  # windows overlap
    assert [window.row.answer for window in task.windows(Texts("where is it?", context, ()))] == [(0, 0)] * len(windows)


def test_a_question_without_room_for_its_context(bases: Callable[[str], Path], tmp_path: Path) -> None:
    task = load_task(run_config(tmp_path, bases("roberta"), "question_answering"))
    with pytest.raises(UserError) as error:
        task.rows([Texts(" ".join(sentences(10)), "one jar.", (), "row 7 of questions.jsonl")])
    one_line(error, "data.max_length: 32", "row 7 of questions.jsonl")


def test_masked_tokens(bases: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(tmp_path, bases("deberta"), "masked_lm")
    task = load_task(config)
    assert isinstance(task, MaskedLM)
    texts = [Texts(text) for text in sentences(400, 2, 20)]
    rows = task.rows(texts)
    again = load_task(run_config(tmp_path, bases("deberta"), "masked_lm")).rows(texts)
    other = load_task(run_config(tmp_path, bases("deberta"), "masked_lm", train={"seed": 1})).rows(texts)
    assert [(row.input_ids, row.labels) for row in rows] == [(row.input_ids, row.labels) for row in again]
    assert sum(row.labels != changed.labels for row, changed in zip(rows, other, strict=True)) > 300
    special = set(task.tokenizer.all_special_ids)
    fates = {"masked": 0, "kept": 0, "random": 0}
    for text, row in zip(texts, rows, strict=True):
        whole = task.tokenizer(text.first, truncation=True, max_length=32)["input_ids"]
        ordinary = [token for token in whole if token not in special]
        chosen = [place for place, label in enumerate(row.labels) if label != IGNORED]
        assert len(chosen) == max(1, round(0.15 * len(ordinary)))
        assert row.has_loss
        for place, token in enumerate(whole):
            if place not in chosen:
                assert row.input_ids[place] == token
                continue
            assert row.labels[place] == token and token not in special
            found = row.input_ids[place]
            masked = found == task.tokenizer.mask_token_id
            fates["masked" if masked else "kept" if found == token else "random"] += 1
    total = sum(fates.values())
    assert fates["masked"] / total == pytest.approx(0.8, abs=0.05)
    assert fates["random"] / total == pytest.approx(0.1, abs=0.04)


def test_evaluation_masks_are_the_same_for_every_run(bases: Callable[[str], Path], tmp_path: Path) -> None:
    texts = [Texts(text) for text in sentences(5)]
    asked = [
        load_task(run_config(tmp_path, bases("roberta"), task, train={"seed": seed})).retention().asked(texts)
        for task, seed in (("regression", 0), ("question_answering", 1), ("masked_lm", 2))
    ]
    assert asked[0] == asked[1] == asked[2]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_best_span_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 60):
        ends = torch.randn(2, length + 4, generator=generator, dtype=torch.float64)
        spans: list[tuple[int, int] | None] = [None, None, *((10 * i, 10 * i + 5) for i in range(length)), None, None]
        pairs = [
            (float(ends[0, i] + ends[1, j]), (spans[i][0], spans[j][1]))
            for i in range(2, length + 2)
            for j in range(i, min(i + 30, length + 2))
        ]
        score, span = best_span(ends, spans)
        assert (pytest.approx(score), span) == max(pairs)
    assert best_span(torch.zeros(2, 3), [None] * 3)[1] is None


@pytest.mark.parametrize("task_name", sorted(ENCODER_TASKS))
def test_predictions_against_unpadded_rows(task_name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Batches of five against one row at a time, decoded by loops."""
    config, task = headed(run_config(tmp_path, bases("deberta"), task_name))
    model = load_model(config.model)
    examples = task.read(config.data.train, "data.train")
    asked = task.asked(examples)
    predictions = task.predict(model, asked, 5)
    with torch.no_grad():
        if task_name == "sequence_classification":
            assert predictions == [int(model(**row_inputs(row)).logits[0].argmax()) for row in task.rows(examples)]
            assert task.score("accuracy", predictions, asked) == [
                float(p == e.answer) for p, e in zip(predictions, examples, strict=True)
            ]
        elif task_name == "regression":
            expected = [float(model(**row_inputs(row)).logits[0, 0]) for row in task.rows(examples)]
            assert predictions == pytest.approx(expected, rel=1e-4, abs=1e-5)
        elif task_name == "masked_lm":
            for gap, guess in zip(asked, predictions, strict=True):
                logits = model(**row_inputs(gap.row)).logits[0, gap.place].double()
                assert guess.token == int(logits.argmax())
                assert guess.loss == pytest.approx(-float(logits.log_softmax(-1)[gap.row.labels[gap.place]]), rel=1e-4)
        else:
            assert predictions == [spans_by_loops(task, model, example) for example in examples]
            assert "" in predictions or task.abstains


def spans_by_loops(task: QuestionAnswering, model: torch.nn.Module, example: Texts) -> str:
    best, text, null = float("-inf"), "", float("inf")
    for window in task.windows(example):
        outputs = model(**row_inputs(window.row))
        start, end = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
        null = min(null, start[0] + end[0])
        for i, first in enumerate(window.spans):
            for j, last in enumerate(window.spans):
                if first is None or last is None or not i <= j < i + 30:
                    continue
                if start[i] + end[j] > best:
                    best, text = start[i] + end[j], example.second[first[0] : last[1]].strip()
    return "" if task.abstains and null > best else text


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task", "head"),
    [
        ("roberta", "sequence_classification", ["classifier"]),
        ("deberta", "regression", ["classifier", "pooler"]),
        ("bert", "sequence_classification", ["bert.pooler", "classifier"]),
        ("bert", "question_answering", ["qa_outputs"]),
        ("roberta", "masked_lm", []),
    ],
)
def test_the_head_is_drawn_by_the_seed_and_no_target(
    family: str, task: str, head: list[str], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    config, _ = headed(run_config(tmp_path, bases(family), task))
    assert list(config.model.trained_modules) == head
    model = load_model(config.model)
    targets = adapted_modules(model, config.model)
    assert targets and all(".layer." in name for name in targets)  # no pooler, no head
    if not head:
        assert config.model.path == str(bases(family))
        return
    record = RunDirectory(config.run_directory).base / "head.json"
    written = record.stat().st_mtime_ns
    again, _ = headed(run_config(tmp_path, bases(family), task))
    assert again == config and record.stat().st_mtime_ns == written  # once for a run
    other, _ = headed(run_config(tmp_path, bases(family), task, name="other", train={"seed": 1}))
    same, _ = headed(run_config(tmp_path, bases(family), task, name="same"))
    weights = [dict(load_model(one.model).named_parameters()) for one in (config, same, other)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])
        differs = name.endswith("weight") and name.startswith(tuple(head))
        assert torch.equal(tensor, weights[2][name]) != differs


# -- statistics --------------------------------------------------------------------------------------------------------


def collected(config: RunConfig, rows: list[Row], batch_size: int, kinds: Any = KINDS) -> dict[tuple[str, str], Any]:
    """The harness's statistics, whole model at hand."""
    task, model = load_task(config), load_model(config.model)
    modules = adapted_modules(model, config.model)
    probe = collate([task.probe_row(rows[0])], task.pad_id)
    groups = input_groups(model, modules, arguments(model, probe))
    batches = [collate(rows[i : i + batch_size], task.pad_id) for i in range(0, len(rows), batch_size)]
    found = collect_resident(model, modules, groups, batches, kinds, Labels(objective=task.objective), Reduction())
    by_group = {(kind, name): matrix for kind, name, matrix, _ in found}
    return {
        (kind, name): by_group[kind, groups[name] if kind == "input_covariance" else name]
        for kind in kinds
        for name in modules
    }


def largest_error(found: dict[tuple[str, str], Any], expected: dict[tuple[str, str], torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[key].double() - right).norm() / right.norm()) for key, right in expected.items())


@pytest.mark.parametrize(
    ("family", "task_name"),
    [
        ("roberta", "sequence_classification"),
        ("bert", "sequence_classification"),
        ("deberta", "sequence_classification"),
        ("roberta", "regression"),
        ("deberta", "question_answering"),
        ("bert", "masked_lm"),
    ],
)
def test_statistics_against_float64(family: str, task_name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    config, task = headed(run_config(tmp_path, bases(family), task_name))
    rows = task.rows(task.read(config.data.train, "data.train"))
    model = load_model(config.model).double()
    expected = direct_statistics(task_name, model, adapted_modules(model, config.model), rows)
    assert largest_error(collected(config, rows, 5), expected) <= BOUND
    inputs = {key: right for key, right in expected.items() if key[0] == "input_covariance"}
    assert largest_error(collected(config, rows, 4, ("input_covariance",)), inputs) <= BOUND


def test_relative_positions_are_no_tokens_even_where_they_are_as_many(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """32 embeddings of relative positions beside one row of 32 tokens, and beside two rows of 16."""
    config, task = headed(run_config(tmp_path, bases("deberta"), "sequence_classification"))
    ids = task.tokenizer(" ".join(sentences(20)), truncation=True, max_length=32)["input_ids"]
    for rows in ([Row(ids, [], 1)], [Row(ids[:16], [], 1), Row(ids[16:], [], 0)]):
        model = load_model(config.model).double()
        assert 2 * model.config.position_buckets == sum(len(row.input_ids) for row in rows)
        expected = direct_statistics("sequence_classification", model, adapted_modules(model, config.model), rows)
        assert largest_error(collected(config, rows, 2), expected) <= BOUND
        inputs = {key: right for key, right in expected.items() if key[0] == "input_covariance"}
        assert largest_error(collected(config, rows, 2, ("input_covariance",)), inputs) <= BOUND


def test_curvature_of_an_adapter_whose_layers_read_relative_positions(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Positions count in a weight's gradient, so in the diagonal; they are no tokens of the Kronecker factors."""
    config = run_config(tmp_path, bases("deberta"), "masked_lm")
    task, base = load_task(config), load_model(config.model)
    rows = task.rows([Texts(text) for text in sentences(5)])
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: LowRank(
            0.2 * torch.randn(layer.out_features, 3, generator=generator),
            0.2 * torch.randn(3, layer.in_features, generator=generator),
            1.5,
        )
        for name, layer in adapted_modules(base, config.model).items()
    }
    model = attach_lora(base, dict.fromkeys(factors, 3), 1.5)
    load_factors(model, factors)
    model = model.double().eval()
    weights = trained_weights(model)
    squares, tokens, layer = dict.fromkeys(weights, 0.0), [], next(name for name in factors if "key_proj" in name)
    pair = linear_pairs(model)[layer]
    handle = pair.A.register_forward_hook(lambda _, inputs, output: tokens.append((inputs[0], output)))
    for row in rows:
        logits = model(**row_inputs(row)).logits[0].log_softmax(-1)
        labelled = [(place, token) for place, token in enumerate(row.labels) if token != IGNORED]
        gradients = torch.autograd.grad(sum(logits[place, token] for place, token in labelled), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            squares[name] += gradient.square() / len(rows)
    handle.remove()
    batches = [collate(rows[i : i + 2], task.pad_id) for i in range(0, len(rows), 2)]
    found = diagonal_fisher(model, batches, task.objective)
    assert found.keys() == squares.keys()
    assert max(float((found[name] - right).norm() / right.norm()) for name, right in squares.items()) <= 1e-6
    made = kronecker_factors(model, {layer: pair}, {layer: layer}, batches, cross=False, objective=task.objective)
    # Of each row's two passes through the layer, the first is its tokens and the second the table.
    for factor, which in (("A00", 0), ("A11", 1)):
        read = torch.cat([call[which][0] for call in tokens[::2]])
        assert len(read) == sum(len(row.input_ids) for row in rows)
        assert torch.allclose(made[factor][layer], read.T @ read / len(read), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "task_name", "fisher"),
    [
        ("roberta", "sequence_classification", "empirical"),
        ("bert", "sequence_classification", "mc"),
        ("deberta", "question_answering", "mc"),
        ("deberta", "regression", "mc"),
        ("roberta", "masked_lm", "empirical"),
    ],
)
def test_streamed_statistics_are_the_resident_ones(
    family: str, task_name: str, fisher: Any, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    config, task = headed(run_config(tmp_path, bases(family), task_name))
    rows = task.rows(task.read(config.data.train, "data.train"))
    batches = [collate(rows[i : i + 4], task.pad_id) for i in range(0, len(rows), 4)]
    labels, probe = Labels(fisher, 1, task.objective), collate([task.probe_row(rows[0])], task.pad_id)
    model = load_model(config.model)
    modules = adapted_modules(model, config.model)
    groups = input_groups(model, modules, arguments(model, probe))
    resident = {
        (kind, name): (matrix, count)
        for kind, name, matrix, count in collect_resident(model, modules, groups, batches, KINDS, labels, Reduction())
    }
    model = empty_model(config.model)
    found: dict[tuple[str, str], Any] = {}
    streamed_groups: dict[str, str] = {}
    with closing(
        collect_streamed(
            model,
            BaseWeights(config.model, model),
            adapted_modules(model, config.model),
            [batches],
            probe,
            KINDS,
            labels,
            torch.device("cpu"),
            Reduction(),
            streamed_groups,
        )
    ) as collecting:
        for _, kind, name, matrix, count in collecting:
            found[kind, name] = (matrix, count)
    assert streamed_groups == groups
    assert found.keys() == resident.keys()
    for key, (matrix, count) in resident.items():
        assert found[key][1] == count
        assert float((found[key][0] - matrix).norm() / matrix.norm()) <= BOUND


# -- what these tasks refuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"anchor": {"kl": 1.0}}, "anchor: task 'sequence_classification'"),
        ({"data": {"replay": {"ratio": 0.1, "answers": True}}}, "data.replay.answers: true given"),
        ({"data": {"replay": {"ratio": 0.1}}}, "data.preserve.response: missing; data.replay"),
        ({"train": {"preserve_loss_steps": 5}}, "data.preserve.response: missing; train.preserve_loss_steps"),
        ({"penalties": [{"name": "lalora"}]}, "data.preserve.response: missing; lalora"),
        ({"penalties": [{"name": "lalora", "curvature": "kfac"}]}, "lalora: as configured it is for runs that train A"),
        ({"eval": {"task": ["validatoin"]}}, "did you mean 'validation'?"),
        ({"eval": {"task": ["stsb"]}}, "'stsb' is of the task regression"),
        ({"eval": {"task": ["rte"], "data_dir": "eval/samples"}}, "'rte' has the classes entailment, not_entailment"),
        ({"eval": {"task": ["validation", "validation"]}}, "named twice"),
    ],
)
def test_refused_in_one_line(
    blocks: dict[str, Any], message: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        preflight.check(run_config(tmp_path, bases("roberta"), "sequence_classification", **blocks))
    one_line(error, message)


@pytest.mark.parametrize("task", sorted(ENCODER_TASKS))
def test_a_model_that_has_no_form_for_the_task(
    task: str, bases: Callable[[str], Path], random_base: Path, tmp_path: Path
) -> None:
    """Before anything is loaded, and where a hub id was loaded without having been looked at."""
    vit = tmp_path / "vit"
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **small)).save_pretrained(vit)
    config = run_config(tmp_path, vit, task)
    with pytest.raises(UserError) as error:
        preflight.check(config)
    one_line(error, f"model.path: {vit} is a vit, which has no form for task {task!r}", "give an encoder (RoBERTa")
    for load in (load_model, empty_model, *([] if task == "masked_lm" else [lambda _: headed(config)])):
        with pytest.raises(UserError) as error:
            load(config.model)
        one_line(error, f"model.path: {vit} is a vit")

    shutil.copytree(random_base, tmp_path / "llama")
    described = read_json(tmp_path / "llama" / "config.json")
    (tmp_path / "llama" / "config.json").write_text(json.dumps(described | {"pad_token_id": None}))  # as Llama-2 has it
    llama = run_config(tmp_path, tmp_path / "llama", task, name="llama")
    if task in ("sequence_classification", "regression"):  # as a Llama can be used too
        preflight.check(llama)
        llama, asked = headed(llama)
        assert list(llama.model.trained_modules) == ["score"]
        examples = asked.read(llama.data.train, "data.train")[:5]
        model = load_model(llama.model)
        together, alone = (asked.predict(model, examples, size) for size in (5, 1))
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
    elif task == "masked_lm":
        with pytest.raises(UserError) as error:
            preflight.check(llama)
        one_line(error, "is a llama, which has no form for task 'masked_lm'", "AutoModelForMaskedLM")
    else:  # transformers has a form, whose body none of the weights fit
        with pytest.raises(UserError) as error:
            headed(llama)
        one_line(error, "has none of the weights of a LlamaForQuestionAnswering")


@pytest.mark.parametrize("task", ["causal_lm", "image_text"])
def test_other_tasks_over_what_is_none_of_theirs(task: Any, random_base: Path, tmp_path: Path) -> None:
    vit = tmp_path / "vit"
    ViTConfig().save_pretrained(vit)
    for path in (vit, random_base) if task == "image_text" else (vit,):
        config = ModelConfig(path=str(path))
        config._task = task
        for load in (load_model, empty_model):
            with pytest.raises(UserError) as error:
                load(config)
            one_line(error, f"model.path: {path} is a ", f"no form for task {task!r}")


def test_the_anchor_is_refused_for_all_of_them(bases: Callable[[str], Path], tmp_path: Path) -> None:
    for task in ENCODER_TASKS:
        with pytest.raises(UserError, match=r"^anchor: "):
            preflight.check(run_config(tmp_path, bases("roberta"), task, anchor={"kl": 1.0}))


def test_allowed(bases: Callable[[str], Path], tmp_path: Path) -> None:
    old = {"path": write_rows(tmp_path / "old.jsonl", rows_of("regression", 6, 3)), **columns("regression")}
    preflight.check(
        run_config(
            tmp_path,
            bases("roberta"),
            "regression",
            data={"replay": {"ratio": 0.25, "source": old}},
            penalties=[{"name": "lalora", "sources": [old]}],
            eval={"task": ["validation"], "knowledge": ["preserve"]},
        )
    )


def test_retention_needs_the_bases_own_head(bases: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases("roberta"))
    model.save_pretrained(tmp_path / "base")
    load_task(run_config(tmp_path, bases("roberta"), "regression")).tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError) as error:
        preflight.check(run_config(tmp_path, tmp_path / "base", "regression", eval={"knowledge": ["preserve"]}))
    one_line(error, "no weights for lm_head.dense")


# -- whole runs --------------------------------------------------------------------------------------------------------

DATA = {
    "sequence_classification": ("kinds", {"prompt": "text", "response": "label"}),
    "regression": ("numbers", {"prompt": "text", "response": "number"}),
    "question_answering": ("spans", {"prompt": "question", "pair": "context", "response": "answers"}),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 8},
    "fclora": {"name": "fclora", "rank": 8},
    "corda_plus_plus": {"name": "corda", "mode": "ipm", "rank": 8, "dynamic_rank": True, "rounds": 2},
    "farss": {"name": "farss", "rank": 8, "shallow_layers": 1},
}


def tiny_run(folder: Path, family: str, task: str, method: str, **train: Any) -> Path:
    """The file of a run over a small pre-trained encoder."""
    encoder = build_encoder(family)  # type: ignore[arg-type]
    name, named = DATA[task]
    content = {
        "name": f"{family}-{task}-{method}",
        "task": task,
        "model": {"path": str(encoder.model), "dtype": "float32"},
        "data": {
            "train": {"path": str(encoder.data / f"{name}_train.jsonl"), **named, "samples": 64},
            "validation": {"path": str(encoder.data / f"{name}_test.jsonl"), **named},
            "preserve": {"path": str(encoder.data / "sentences.jsonl"), "prompt": "text"},
            "max_length": 96,
        },
        "method": METHODS[method],
        "train": {"max_steps": 60, "batch_size": 32, "learning_rate": 2.0e-3, "save_steps": 30, "log_steps": 10}
        | train,
        "eval": {"knowledge": ["preserve"], "task": ["validation"], "checkpoints": True},
        "output_dir": str(folder),
    }
    path = folder / f"{content['name']}.json"
    path.write_text(json.dumps(content))
    return path


def outputs(model: torch.nn.Module, task: Any, rows: list[Row]) -> torch.Tensor:
    """What the objective takes of a model's outputs on a padded batch."""
    batch = collate(rows, task.pad_id)
    with torch.inference_mode():
        return task.objective.logits(model.eval()(**arguments(model, batch)), batch)


def check_exports(config: RunConfig, run: RunDirectory) -> None:
    """`adapter/` by PEFT alone and `merged/` by transformers alone compute what the live model computes."""
    task = load_task(config)
    rows = task.rows(task.read(config.data.validation, "data.validation"))[:8]
    last = run.finished_checkpoints()[-1][1]
    headed_config, _ = headed(config)
    method = build_method(config.method, config.train.seed)
    live = outputs(build_model(headed_config, run, method, last, False), task, rows)
    whole = {
        "question_answering": AutoModelForQuestionAnswering,
    }.get(config.task, AutoModelForSequenceClassification)
    under = run.frozen_base if config.model.quantization == "nf4" else config.model.path
    base = whole.from_pretrained(under, dtype=torch.float32, **task.head_options())
    seen = live.abs().masked_fill(live < -1e30, 0).max()  # padding of spans is masked
    for model in (
        whole.from_pretrained(run.merged, dtype=torch.float32),
        PeftModel.from_pretrained(base, str(run.adapter)),
    ):
        found = outputs(model, task, rows)
        assert float((found - live).abs().masked_fill(live < -1e30, 0).max()) <= BOUND * float(seen)
    if config.task == "sequence_classification":
        assert list(whole.from_pretrained(run.merged).config.id2label.values()) == task.classes


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", DATA)
@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_exports_of_every_method(
    family: str, task: str, method: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every family, task and method together, four steps over a random base: merged = adapter = live."""
    config = run_config(tmp_path, bases(family), task, method={**METHODS[method], "rank": 4})
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    run_gang(path, 1)
    run = RunDirectory(config.run_directory)
    check_exports(config, run)
    before, after = (
        dict(load_model(config.model.with_head(str(folder), [])).named_parameters())
        for folder in (run.base, run.merged)
    )
    moved = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    model = headed(config)[0].model
    adapted = adapted_modules(load_model(model), model).keys()
    left = len(adapted - moved)  # dynamic ranks may leave a layer without any
    assert left < len(adapted) / 2 if method in ("corda_plus_plus", "farss") else not left


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", DATA)
@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_end_to_end(family: str, task: str, method: str, tmp_path: Path) -> None:
    path = tiny_run(tmp_path, family, task, method)
    run_gang(path, 1)
    config = load_config(path)
    run = RunDirectory(config.run_directory)
    check_exports(config, run)
    run_stages(config, ["eval", "report"])
    results = read_json(run.results)
    base, half, final = results["models"]
    assert [base["name"], half["name"], final["name"]] == ["base", "step-30", "final"]
    assert base["K"] == 1.0
    assert base["scores"]["preserve"]["value"] > 0.3
    assert final["scores"]["preserve"]["metric"] == "masked_lm_accuracy"
    assert (
        final["scores"]["preserve"]["others"]["masked_lm_loss"] > base["scores"]["preserve"]["others"]["masked_lm_loss"]
    )
    assert 0 < final["K"] < 1.05
    learned = {"sequence_classification": 0.3, "regression": 0.3, "question_answering": 0.3}[task]
    assert final["T"] > base["T"] + learned
    assert (run.path / "report.html").is_file()
    assert (run.items / "final.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "blocks"),
    [
        ("bert", "sequence_classification", {}),
        ("roberta", "question_answering", {"model": {"quantization": "nf4"}}),
        ("deberta", "regression", {"method": {"name": "full"}}),
    ],
)
def test_exports_of_other_forms(family: str, task: str, blocks: dict[str, Any], tmp_path: Path) -> None:
    """BERT, whose pooler lies in its body; a quantised base; full fine-tuning."""
    base = save_encoder(tmp_path / "base", family, replace(OPTIONS, hidden=64, mlp=128))
    blocks = {**blocks, "eval": {"knowledge": ["preserve"], "task": ["validation"]}}
    config = run_config(tmp_path, base, task, **blocks)
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    run_gang(path, 1)
    run = RunDirectory(config.run_directory)
    if config.method["name"] == "full":
        before, after = (
            dict(load_model(config.model.with_head(str(f), [])).named_parameters()) for f in (run.base, run.merged)
        )
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert "deberta.encoder.layer.0.attention.self.query_proj.weight" in moved and "classifier.weight" in moved
    else:
        check_exports(config, run)
    run_stages(config, ["eval"])
    assert [model["name"] for model in read_json(run.results)["models"]] == ["base", "final"]


@pytest.mark.slow
def test_numbers_to_be_learned_are_not_rounded(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """bfloat16 has 300 and 302, and nothing between; what the head says at first is less than 0.4 from 0."""
    rows = [row | {"number": 301.0} for row in rows_of("regression", 8)]
    write_rows(tmp_path / "odd.jsonl", rows)
    config = run_config(
        tmp_path,
        bases("roberta"),
        "regression",
        model={"dtype": "bfloat16"},
        data={"train": {"path": str(tmp_path / "odd.jsonl"), **columns("regression")}},
        train={"max_steps": 1, "batch_size": 8, "log_steps": 1},
    )
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    run_gang(path, 1)
    line = json.loads(RunDirectory(config.run_directory).metrics.read_text().splitlines()[0])
    assert line["loss"] ** 0.5 == pytest.approx(301.0, abs=0.4)


@pytest.mark.long
@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    """Adapter and head end as if nothing had happened."""
    paths = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        options = {"max_steps": 8, "save_steps": 4}
        paths.append(tiny_run(tmp_path / name, "deberta", "sequence_classification", "lora", **options))
    run_gang(paths[0], 1)
    killed = RunDirectory(load_config(paths[1]).run_directory)
    kill_after(paths[1], 1, killed.checkpoints / "step-4")
    for later in killed.checkpoints.glob("*8*"):
        shutil.rmtree(later)
    run_gang(paths[1], 1)
    name = "adapter/adapter_model.safetensors"
    left, right = (load_file(load_config(path).run_directory / name) for path in paths)
    assert left.keys() == right.keys()
    assert any(".classifier." in key for key in left)
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.slow
def test_bad_labels_end_the_command_with_one_line(
    bases: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from harness.cli import main

    config = run_config(tmp_path, bases("roberta"), "sequence_classification")
    rows = rows_of("sequence_classification", 24)
    rows[5]["label"] = None
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "run.yaml").write_text(config.dump())
    monkeypatch.setattr("sys.argv", ["harness", "run", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "row 5" in lines[0] and "None" in lines[0]
