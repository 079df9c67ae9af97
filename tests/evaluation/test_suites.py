"""Suites: what they hold, where their data come from, and every sample through our evaluation."""

import importlib.util
import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from harness.errors import UserError
from harness.evaluation import encoder_metrics, hub_data, sandbox
from harness.evaluation.suites import DialogueTask, EncoderTask, SuiteTask, expand, read_suites
from harness.evaluation.tasks import check_data, check_tasks, load_tasks, local_tasks, resolve_tasks, sources
from tests.evaluation.conftest import write_task

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "eval" / "samples"
SUITES = read_suites()
GENERATIVE = [name for name, suite in SUITES.items() if suite.kind == "generative"]
RUNS_CODE = ("code", "code_instruct")


def needs_of(suite: str) -> None:
    """Skip where the suite cannot run for want of something installed."""
    if suite in RUNS_CODE and not sandbox.working_mechanisms()[0]:
        pytest.skip("no sandbox on this machine")
    for task in SUITES[suite].tasks:
        if isinstance(task, SuiteTask):
            try:
                task.needs.check(task.task)
            except UserError as error:
                pytest.skip(str(error))


# -- Names ------------------------------------------------------------------------------------------------------------


def test_the_suites_are_there() -> None:
    assert set(SUITES) >= {
        *("world_knowledge", "math", "code", "instruction", "commonsense8", "commonsense8_generate", "perplexity"),
        *("glue", "squad", "mt_bench"),
    }
    assert expand(["world_knowledge"]) == ["triviaqa", "nq_open", "webqs"]
    assert len(expand(["commonsense8"])) == len(expand(["commonsense8_generate"])) == 8


def test_suites_expand_among_tasks() -> None:
    assert expand(["gsm8k", "suite:code", "tiny_reverse"]) == ["gsm8k", "humaneval", "mbpp", "tiny_reverse"]
    with pytest.raises(UserError, match=r"unknown suite 'maths'; the suites are .*math"):
        expand(["suite:maths"])
    with pytest.raises(UserError, match="the task 'triviaqa' is named twice"):
        expand(["world_knowledge", "triviaqa"])
    with pytest.raises(UserError, match=r"'glue' is for encoders .* the others are code"):
        expand(["glue"])
    with pytest.raises(UserError, match=r"'mt_bench' is marked by a judge \(eval/mt_bench\.py\)"):
        expand(["mt_bench"])


def test_no_suite_is_called_like_a_task() -> None:
    from harness.evaluation.tasks import _installed_names

    assert not set(SUITES) & (_installed_names().keys() | local_tasks().keys())


def a_suite(folder: Path, **content: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"suite": "mine", "description": "x", **content}))


def test_a_users_suite(tmp_path: Path) -> None:
    a_suite(tmp_path, tasks=[{"task": "gsm8k_two", "from": "gsm8k", "num_fewshot": 2, "generation_kwargs": {"a": 1}}])
    assert expand(["mine"], tmp_path) == ["gsm8k_two"]
    config = resolve_tasks(["gsm8k_two"], tmp_path)["gsm8k_two"]
    assert config["num_fewshot"] == 2
    assert config["generation_kwargs"]["a"] == 1
    assert config["generation_kwargs"]["until"] == ["Question:", "</s>", "<|im_end|>"]
    assert config["doc_to_text"] == resolve_tasks(["gsm8k"])["gsm8k"]["doc_to_text"]
    assert {path.name for path in sources("gsm8k_two", tmp_path, None)} == {"gsm8k.yaml", "mine.yaml"}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"task": "gsm8k", "num_fewshot": 0}], r"changes the task 'gsm8k' under its own name; give it another"),
        (
            [{"task": "g", "from": "gsm8k", "filter": "no"}],
            r"'g' reports 'no', and its base has strict-match, flexible",
        ),
        ([{"task": "g", "from": "gsm8k", "metric": "f1"}], r"'g' reports 'f1', and its base has exact_match"),
        ([{"task": "g", "from": "gsm9k"}], r"unknown task 'gsm9k'; the nearest names are .*gsm8k"),
        ([{"task": "g", "shots": 3}], r"the suite .*mine\.yaml is wrong at .*shots: Extra inputs"),
        ([{"task": "triviaqa", "data": {"validation": "x"}}], r"say two things about the task 'triviaqa'"),
    ],
)
def test_a_wrong_suite(tmp_path: Path, tasks: list[dict[str, Any]], message: str) -> None:
    a_suite(tmp_path, tasks=tasks)
    with pytest.raises(UserError, match=message) as error:
        resolve_tasks([tasks[0]["task"]], tmp_path)
    assert "\n" not in str(error.value)


def test_a_suite_called_like_a_users_task(tmp_path: Path) -> None:
    a_suite(tmp_path, tasks=[{"task": "gsm8k_two", "from": "gsm8k", "num_fewshot": 2}])
    write_task(tmp_path / "task.yaml", task="mine", dataset_path="json", output_type="generate_until")
    with pytest.raises(UserError, match=r"'mine' is a suite \(.*mine\.yaml\) and a task \(.*task\.yaml\); rename"):
        local_tasks(tmp_path)


def test_code_runs_in_the_sandbox_or_not_at_all() -> None:
    for name in ("humaneval_64", "humaneval_plus", "mbpp_plus"):
        with pytest.raises(
            UserError, match=rf"'{name}' runs code .* outside a sandbox; use humaneval, humaneval_instr"
        ):
            check_tasks([name])
    assert local_tasks()["humaneval"].path.parent.name == "code"
    # Nothing of ours sets the switch that lets the library evaluate run code.
    switch = "HF_ALLOW_" + "CODE_EVAL"
    files = [*(REPOSITORY / "harness").rglob("*.py"), *(REPOSITORY / "eval").rglob("*.py")]
    assert not [file for file in files if switch in file.read_text()]


# -- Data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "none"))
    hub_data.hub_answers.cache_clear()
    yield
    hub_data.hub_answers.cache_clear()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("suite", GENERATIVE)
def test_missing_data_says_what_to_download_where(suite: str, tmp_path: Path) -> None:
    names, folder = expand([suite]), tmp_path / "data"
    folder.mkdir()
    for data_dir, place in ((None, "eval.data_dir is not set"), (folder, f"in {folder}")):
        with pytest.raises(UserError) as error:
            check_data(names, None, data_dir)
        message = str(error.value)
        assert message.startswith("eval.data_dir: the task '")
        assert place in message
        assert "\n" not in message
        where = re.search(r"(?:copy the file to|save it under) (\S+)$", message)
        assert where is not None
        assert "load_dataset(" in message or "; get " in message
    # What the message says is what is looked for.
    Path(where[1]).parent.mkdir(parents=True)
    Path(where[1]).write_text("{}\n")
    try:
        check_data(names, None, folder)
    except UserError as error:
        assert where[1] not in str(error)


@pytest.mark.usefixtures("offline")
def test_some_files_of_a_task_are_missing(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.parquet").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"'gsm8k' has no data: there is no gsm8k/train\.jsonl \(or \.json, \.parquet\)"
    ):
        check_data(["gsm8k"], None, tmp_path)


@pytest.mark.usefixtures("offline")
def test_local_files_replace_the_hub(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "piqa").mkdir()
    rows = [{"goal": "open a door", "sol1": "pull it", "sol2": "eat it", "label": 0}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "piqa" / "validation.parquet")
    task = load_tasks(["piqa"], None, tmp_path)["tasks"]["piqa"]
    assert list(task.eval_docs) == rows
    assert [path.name for path in sources("piqa", None, tmp_path)] == [
        "piqa.yaml",
        "validation.parquet",
        "commonsense8.yaml",
    ]


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    needs = {"modules": ["no_such_module"], "install": "it"}
    a_suite(tmp_path, tasks=[{"task": "ours", "from": "gsm8k", "num_fewshot": 0, "needs": needs}])
    with pytest.raises(UserError, match="the task 'ours' needs no_such_module; pip install it"):
        check_tasks(["ours"], tmp_path)


# -- Samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    files = [path.relative_to(SAMPLES) for path in SAMPLES.rglob("*.*") if path.suffix not in (".py", ".pyc")]
    written = {str(path) for path in files if path.parts[0] != "visual"}  # that is make_visual.py's
    content = module.files()
    assert written == content.keys()
    assert all((SAMPLES / name).read_text() == text for name, text in content.items())


def gold(task: Any, document: dict[str, Any]) -> str:
    """A generated answer that must score 1."""
    name = task.config.task
    if name.startswith("humaneval"):
        return document["canonical_solution"]
    if name.startswith("mbpp"):
        return document["code"] + "\n"
    if name.startswith("minerva"):
        return f"Final Answer: The final answer is ${document['answer']}$. I hope it is correct. ${document['answer']}$"
    if name.startswith("hendrycks"):
        return f"${document['answer']}$"
    if name.endswith("_generate"):
        return f"I think {document['output']}."
    target = task.doc_to_target(document)
    return str(target[0] if isinstance(target, list) else target)


def score(task: Any, documents: list[dict[str, Any]], answers: list[str]) -> list[dict[str, Any]]:
    """Every answer through the task's first filter and its metrics, as lm-eval does it."""
    from lm_eval.api.instance import Instance

    instances = [
        Instance("generate_until", document, ("", {}), 0, resps=[answer])
        for document, answer in zip(documents, answers, strict=True)
    ]
    task._filters[0].apply(instances)
    name = task._filters[0].name
    return [task.process_results(i.doc, [i.filtered_resps[name]]) for i in instances]


@pytest.mark.parametrize("suite", [name for name in GENERATIVE if name != "instruction"])
def test_right_answers_score_one_and_wrong_ones_none(suite: str) -> None:
    needs_of(suite)
    from harness.evaluation.scores import _first_metric

    for name, task in load_tasks(expand([suite]), None, SAMPLES)["tasks"].items():
        documents = list(task.eval_docs)
        assert len(documents) == (1 if name in ("ptb", "text_file") else 20), name
        metric = _first_metric(task)
        if task.OUTPUT_TYPE == "generate_until":
            right = score(task, documents, [gold(task, document) for document in documents])
            wrong = score(task, documents, ["nonsense 77777" for _ in documents])
        elif task.OUTPUT_TYPE == "multiple_choice":
            right, wrong = [], []
            for document in documents:
                choices = task.doc_to_choice(document)
                target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
                of_right = target if isinstance(target, list) else [target]
                for results, sign in ((right, 1), (wrong, -1)):
                    scores = [
                        (sign * (i in of_right) * 99.0 - 100, sign * (i in of_right) > 0) for i in range(len(choices))
                    ]
                    results.append(task.process_results(document, scores))
        else:
            counts = [task.process_results(document, [-10.0])[metric] for document in documents]
            assert all(log_probability == -10.0 and words > 2 for log_probability, words in counts)
            continue
        assert [result[metric] for result in right] == [1] * 20, name
        assert not any(result[metric] for result in wrong), name


@pytest.mark.slow
@pytest.mark.parametrize("suite", GENERATIVE)
def test_a_sample_through_our_evaluation(suite: str, random_base: Path) -> None:
    needs_of(suite)
    from harness.evaluation.engines import Candidate, evaluate

    names = expand(["suite:" + suite])
    options = {"backend": "hf", "dtype": "float32", "data_dir": SAMPLES, "cache": False}
    (scores,) = evaluate([Candidate("base", None, random_base)], names, **options)
    assert list(scores.scores) == names
    for name, one in scores.scores.items():
        assert one.items == {"ptb": 1, "text_file": 1, "minerva_math": 140, "hendrycks_math": 140}.get(name, 20)
        assert math.isfinite(one.value)
        assert (one.value > 1) if suite == "perplexity" else (0 <= one.value <= 1)
    if suite == "instruction":
        four = {f"{level}_level_{kind}_acc" for level in ("prompt", "inst") for kind in ("strict", "loose")}
        assert {scores.scores["ifeval"].metric, *scores.scores["ifeval"].others} == four
    if suite == "perplexity":
        assert scores.scores["ptb"].others.keys() == {"byte_perplexity", "bits_per_byte"}


# -- Encoders ---------------------------------------------------------------------------------------------------------


def test_encoder_metrics_against_plain_sums() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        p, e = generator.integers(0, 2, 30).tolist(), generator.integers(0, 2, 30).tolist()
        pairs = list(zip(p, e, strict=True))
        tp, tn = pairs.count((1, 1)), pairs.count((0, 0))
        fp, fn = pairs.count((1, 0)), pairs.count((0, 1))
        matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert encoder_metrics.matthews_correlation(p, e) == pytest.approx(matthews, abs=1e-12)
        assert encoder_metrics.f1(p, e) == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert encoder_metrics.accuracy(p, e) == pytest.approx((tp + tn) / 30)
        x, y = generator.normal(size=30).round(1).tolist(), generator.normal(size=30).round(1).tolist()
        mx, my = sum(x) / 30, sum(y) / 30
        covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
        norm = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
        assert encoder_metrics.pearson(x, y) == pytest.approx(covariance / norm)
        ranks = [[sum(b < a for b in z) + (sum(b == a for b in z) + 1) / 2 for a in z] for z in (x, y)]
        assert encoder_metrics.spearman(x, y) == pytest.approx(encoder_metrics.pearson(*ranks))
    assert encoder_metrics.matthews_correlation([1, 1], [0, 1]) == encoder_metrics.f1([0, 0], [0, 0]) == 0
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        encoder_metrics.accuracy([1], [1, 2])


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Tower!", ["tower"], 1, 1),
        ("an old tower", ["the old stone tower"], 0, 2 * 2 / (2 + 3)),
        ("tower tower", ["tower"], 0, 2 * 1 / (2 + 1)),
        ("bridge", ["tower", "a bridge"], 1, 1),
        ("", [], 1, 1),
        ("tower", [], 0, 0),
        ("", ["tower"], 0, 0),
    ],
)
def test_squad_metrics(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert encoder_metrics.squad_exact_match([answer], [references]) == exact
    assert encoder_metrics.squad_f1([answer], [references]) == pytest.approx(f1)


@pytest.mark.parametrize("suite", [name for name, suite in SUITES.items() if suite.kind == "encoder"])
def test_encoder_samples(suite: str) -> None:
    for task in SUITES[suite].tasks:
        assert isinstance(task, EncoderTask)
        for file in task.data.values():
            rows = [json.loads(line) for line in (SAMPLES / f"{file}.jsonl").read_text().splitlines()]
            assert len(rows) == 20
            assert all(set(task.texts) | {task.label} <= row.keys() for row in rows)
            expected = [row[task.label] for row in rows]
            if task.classes:
                assert set(expected) == set(range(len(task.classes)))
            answers = expected
            if suite == "squad":
                expected = [answers["text"] for answers in expected]
                answers = [some[0] if some else "" for some in expected]
                spans = [(row["context"], row["answers"]) for row in rows if row["answers"]["text"]]
                assert all(text[a["answer_start"][0] :].startswith(a["text"][0]) for text, a in spans)
            assert all(encoder_metrics.METRICS[name](answers, expected) == pytest.approx(1) for name in task.metrics)


# -- Dialogues --------------------------------------------------------------------------------------------------------


@contextmanager
def a_judge(judgements: dict[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """A server that speaks chat completions, and says what stands under a word that it finds in the last message."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, request))
            text = request["messages"][-1]["content"]
            said = next((said for word, said in judgements.items() if word in text), "no mark")
            body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()


def test_dialogues_are_answered_and_marked(random_base: Path, tmp_path: Path) -> None:
    from harness.evaluation import mt_bench
    from harness.evaluation.engines import open_engine
    from harness.evaluation.openai_client import OpenAIClient

    (task,) = SUITES["mt_bench"].tasks
    assert isinstance(task, DialogueTask)
    questions = mt_bench.read_questions(SAMPLES / task.data["test"])
    assert len(questions) == 20
    with open_engine(str(random_base), "hf", "float32", 16, 0, 0, None) as engine:
        answers = mt_bench.answer(engine, questions[:4], max_tokens=8)
        second = mt_bench._prompt(engine.tokenizer, questions[0].turns, answers[0][:1])
    assert [len(some) for some in answers] == [2] * 4
    assert second.index(questions[0].turns[0]) < second.index(answers[0][0]) < second.index(questions[0].turns[1])

    judgements = {
        "Second question": "Better. [[3]] No: [[8.5]]",
        "apple": "[[11]]",
        "Right answer": "[[4]]",
        "brick": "[[6]]",
    }
    with a_judge(judgements) as (url, seen):
        marks = mt_bench.judge(OpenAIClient(url), "a-judge", questions[:4], answers)
    assert [(mark.question, mark.turn) for mark in marks] == [(q.id, turn) for q in questions[:4] for turn in (1, 2)]
    assert [mark.value for mark in marks] == [None, 8.5, 6, 8.5, None, 8.5, 4, 8.5]
    assert {path for path, _ in seen} == {"/v1/chat/completions"}
    assert {request["model"] for _, request in seen} == {"a-judge"}
    found = mt_bench.summary(questions[:4], marks)
    assert found["mt_bench"] == pytest.approx((4 * 8.5 + 6 + 4) / 6)
    assert found["turns"] == {1: 5, 2: 8.5}
    assert (found["marked"], found["without_mark"]) == (6, 2)
    assert found["categories"]["math"] == pytest.approx(6.25)

    with pytest.raises(UserError, match=r"question\.jsonl cannot be read .* get question\.jsonl of MT-Bench"):
        mt_bench.read_questions(tmp_path / "question.jsonl")


def test_judge_prompts_of_the_benchmark_can_be_used(tmp_path: Path) -> None:
    from harness.evaluation import mt_bench

    names = list(mt_bench.OWN_PROMPTS)
    rows = [{"name": name, "system_prompt": "S", "prompt_template": "{question_1}|{answer_1}|{x}"} for name in names]
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = mt_bench.read_judge_prompts(path)
    question = mt_bench.Question(1, "writing", ("Say {x}.", "Again."))
    messages = mt_bench._messages(question, ["{question_1}", "b"], 1, prompts)
    assert messages[1]["content"] == "Say {x}.|{question_1}|{x}"
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="has no judge prompt single-math-v1"):
        mt_bench.read_judge_prompts(path)
