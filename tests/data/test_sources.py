"""Reading JSONL, JSON, Parquet and folders."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from harness.config import SourceConfig
from harness.data.sources import Example, read_examples
from harness.errors import UserError

ROWS = [{"q": f"question {i}", "a": f"answer {i}", "n": i} for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    for split, rows in {"train": ROWS[:4], "validation": ROWS[4:]}.items():
        (folder / "many").mkdir(exist_ok=True)
        (folder / "many" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(path: Path, **changes: Any) -> list[Example]:
    options = {"path": str(path), "prompt": "q", "response": "a", **changes}
    return read_examples(SourceConfig(**options), "data.train")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_files(folder: Path, name: str) -> None:
    assert read(folder / name) == [Example(row["q"], row["a"]) for row in ROWS]
    assert read(folder / name, response=None) == [Example(row["q"], None) for row in ROWS]
    assert read(folder / name, split="train[1:3]") == [Example(row["q"], row["a"]) for row in ROWS[1:3]]


def test_folder(folder: Path) -> None:
    assert read(folder / "many") == [Example(row["q"], row["a"]) for row in ROWS[:4]]
    assert read(folder / "many", split="validation") == [Example(row["q"], row["a"]) for row in ROWS[4:]]


def test_columns_that_are_not_text(folder: Path) -> None:
    assert read(folder / "rows.jsonl", response="n")[3] == Example("question 3", "3")


def test_template(folder: Path) -> None:
    prompt = read(folder / "rows.jsonl", template="alpaca")[0].prompt
    assert prompt.endswith("### Instruction:\nquestion 0\n\n### Response:")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("field", ["prompt", "response"])
def test_missing_column(folder: Path, name: str, field: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.train\.{field}: no column 'aa' in .*{name}; there are: q, a, n"):
        read(folder / name, **{field: "aa"})


def test_unreadable(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": \n')
    with pytest.raises(UserError, match=r"^data\.train: .*bad\.jsonl.* cannot be read: .*JSON") as caught:
        read(tmp_path / "bad.jsonl")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^data\.train: .*'test' cannot be read"):
        read(folder / "rows.jsonl", split="test")


def test_no_rows(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.train: .*rows\.jsonl', split 'train\[6:\]' .* no data"):
        read(folder / "rows.jsonl", split="train[6:]")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS).slice(0, 0), folder / "none.parquet")
    with pytest.raises(UserError, match=r"^data\.train.*none\.parquet.*(has no rows|cannot be read)"):
        read(folder / "none.parquet")


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_row_without_a_value(tmp_path: Path, field: str) -> None:
    """Neither the text "None" to learn from, nor a row that quietly puts the loss on its prompt."""
    column = {"prompt": "q", "response": "a"}[field]
    rows = [ROWS[0], {**ROWS[1], column: None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"^data\.train\.{field}: row 1 of .* has no value in '{column}'"):
        read(tmp_path / "rows.jsonl")
