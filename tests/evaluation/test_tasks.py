"""Names of tasks: where they are looked for, and the line that a user reads when one is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.evaluation.tasks import check_tasks, load_tasks, local_tasks, sources
from tests.evaluation.conftest import LocalTasks, write_task

METRIC = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


def a_task(path: Path, name: str, data: str = "items.jsonl", **more: object) -> Path:
    return write_task(
        path,
        task=name,
        dataset_path="json",
        dataset_kwargs={"data_files": {"test": data}},
        test_split="test",
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "do_sample": False},
        **{"metric_list": [METRIC], **more},
    )


def test_packaged_tasks_are_known() -> None:
    assert {"tiny_facts_seen", "tiny_facts_heldout", "tiny_reverse"} <= local_tasks().keys()


def test_tasks_of_lm_eval_are_known() -> None:
    check_tasks(["triviaqa", "nq_open", "webqs", "gsm8k", "minerva_math"])


def test_an_unknown_task_gets_the_nearest_names(local_tasks: LocalTasks) -> None:
    with pytest.raises(UserError, match=r"unknown task 'words_nxt'; the nearest names are words_next"):
        check_tasks(["words_nxt"], local_tasks.include_path, local_tasks.data_dir)
    with pytest.raises(UserError, match=r"unknown task 'gsm9k'; the nearest names are .*gsm8k"):
        check_tasks(["gsm9k"])


def test_a_missing_data_file_names_task_file_and_key(tmp_path: Path) -> None:
    a_task(tmp_path / "tasks" / "a.yaml", "a")
    with pytest.raises(UserError, match=r"eval\.data_dir: the task 'a' reads items\.jsonl, .* is not set"):
        check_tasks(["a"], tmp_path / "tasks")
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=rf"no {tmp_path}/data/items\.jsonl; eval\.data_dir is {tmp_path}/data"):
        check_tasks(["a"], tmp_path / "tasks", tmp_path / "data")
    (tmp_path / "data" / "items.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    check_tasks(["a"], tmp_path / "tasks", tmp_path / "data")


def test_data_is_read_from_data_dir_or_from_beside_the_task(tmp_path: Path) -> None:
    a_task(tmp_path / "a.yaml", "a")
    (tmp_path / "items.jsonl").write_text('{"prompt": "beside", "answer": "a"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "items.jsonl").write_text('{"prompt": "given", "answer": "a"}\n')
    beside = load_tasks(["a"], tmp_path)["tasks"]["a"]
    given = load_tasks(["a"], tmp_path, tmp_path / "data")["tasks"]["a"]
    assert [task.eval_docs[0]["prompt"] for task in (beside, given)] == ["beside", "given"]


def test_the_users_task_wins_over_a_packaged_one(tmp_path: Path) -> None:
    mine = a_task(tmp_path / "mine.yaml", "tiny_reverse")
    assert local_tasks(tmp_path)["tiny_reverse"].path == mine


def test_includes_and_functions_work(tmp_path: Path) -> None:
    a_task(tmp_path / "parent.yaml", "parent")
    (tmp_path / "child.yaml").write_text("include: parent.yaml\ntask: child\ndoc_to_text: !function helpers.shout\n")
    (tmp_path / "helpers.py").write_text("def shout(doc):\n    return doc['prompt'].upper()\n")
    (tmp_path / "items.jsonl").write_text('{"prompt": "quiet", "answer": "a"}\n')
    check_tasks(["child"], tmp_path)
    task = load_tasks(["child"], tmp_path)["tasks"]["child"]
    assert task.doc_to_text(task.eval_docs[0]) == "QUIET"
    names = {path.name for path in sources("child", tmp_path, None)}
    assert names == {"child.yaml", "parent.yaml", "helpers.py", "items.jsonl"}


def test_a_group_needs_a_score_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        a_task(tmp_path / f"{name}.yaml", name)
    (tmp_path / "items.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    write_task(tmp_path / "plain.yaml", group="plain", task=["a", "b"])
    with pytest.raises(UserError, match=r"'plain' is a group without a score of its own .* such as a, b"):
        check_tasks(["plain"], tmp_path)
    aggregate = {"metric": "exact_match", "aggregation": "mean", "weight_by_size": True}
    write_task(tmp_path / "scored.yaml", group="scored", task=["a", "b"], aggregate_metric_list=[aggregate])
    check_tasks(["scored"], tmp_path)
    assert load_tasks(["scored"], tmp_path)["tasks"].keys() == {"a", "b"}


def test_a_group_may_name_tasks_of_lm_eval(tmp_path: Path) -> None:
    aggregate = {"metric": "exact_match", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "mine", "aggregate_metric_list": [aggregate]}
    write_task(tmp_path / "mine.yaml", **group, task=["triviaqa", "nq_open"])
    check_tasks(["mine"], tmp_path)
    files = {path.name for path in sources("mine", tmp_path, None)}
    assert files == {"mine.yaml", "default.yaml", "nq_open.yaml", "world_knowledge.yaml"}
    write_task(tmp_path / "mine.yaml", **group, task=["triviaqa", "nq_opn"])
    with pytest.raises(UserError, match=r"unknown task 'nq_opn'; the nearest names are .*nq_open"):
        check_tasks(["mine"], tmp_path)


def test_a_tag_is_not_a_task() -> None:
    with pytest.raises(UserError, match=r"'freebase' is a tag, not a task; .* such as webqs"):
        check_tasks(["freebase"])


def test_a_metric_that_falls_is_refused(local_tasks: LocalTasks) -> None:
    with pytest.raises(UserError, match=r"the metric of 'words_perplexity' is better when lower"):
        check_tasks(["words_perplexity"], local_tasks.include_path, local_tasks.data_dir)


def test_a_task_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match="'gsm8k' is named twice"):
        check_tasks(["gsm8k", "triviaqa", "gsm8k"])


def test_a_broken_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [unclosed\n")
    with pytest.raises(UserError, match=r"eval\.include_path: .*broken\.yaml cannot be read"):
        check_tasks(["a"], tmp_path)
    with pytest.raises(UserError, match=r"eval\.include_path: .*nowhere is not a folder"):
        check_tasks(["a"], tmp_path / "nowhere")


def test_checking_names_imports_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys; from harness.evaluation.tasks import check_tasks; check_tasks(['triviaqa', 'minerva_math']); "
        "sys.exit(','.join({'torch', 'lm_eval', 'transformers', 'datasets'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
