"""The two formats of a run's report and of a comparison, and the terminal's table."""

import io
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from harness.errors import UserError
from harness.reporting.report import summary_table, write_comparison, write_report

from .runs import write_json, write_run

MakeRun = Callable[..., Path]
ANCHOR = {"kl": 1.0, "prompts_per_step": 4}
NASTY = "<script>alert('x')</script> & \"a|b\" `c` *d* [e](f)"


class Page(HTMLParser):
    """What a browser would see: text, tags, references, identifiers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: Counter[str] = Counter()
        self.references: list[str] = []
        self.ids: Counter[str] = Counter()
        self.open: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data") and value:
                self.references.append(value)
            if name == "id" and value:
                self.ids[value] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def read(page: Path) -> tuple[str, Page]:
    text = page.read_text(encoding="utf-8")
    return text, Page(text)


def assert_self_contained(text: str, page: Page) -> None:
    assert not page.open
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"@import|url\((?!#)", text)
    external = re.compile(r"(?!data:)[a-z]+:|//", re.IGNORECASE)
    outside = [reference for reference in page.references if external.match(reference)]
    assert outside == []
    assert [name for name, count in page.ids.items() if count > 1] == []


def rows(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the table below ``heading``."""
    section = markdown.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(cells) for cells in split}) == 1, "every row has as many cells as the header"
    return [split[0], *split[2:]]


def test_a_finished_run_has_every_part_in_both_formats(make_run: MakeRun) -> None:
    run = make_run(anchor=ANCHOR)
    html = write_report(run)
    text, page = read(html)
    markdown = (run / "report.md").read_text()

    assert html == run / "report.html"
    assert_self_contained(text, page)
    assert page.tags["svg"] == 3  # the K–T plane, forgetting, training loss: all ranks are equal
    for said in (
        "It learned reverse (exact match 0.020 → 0.975).",
        "It kept 95 % of what the base model knew",
        "T is the raw task score, mean over tasks",
        "0.931 ± 0.010",
        "corda (kpm) · rank 8 · anchor KL × 1, 4 prompts/step · on models/tiny",
    ):
        assert said in page.text
        assert said in markdown
    for html_only in ("PeftModel.from_pretrained(base, ", "penalty: anchor_kl", "residual norm", "2.13.0"):
        assert html_only in page.text
    assert "not run yet" not in text + markdown
    assert sorted(path.name for path in run.glob("*report*")) == ["report.html", "report.md"]


def test_the_table_has_every_model_with_its_numbers(make_run: MakeRun) -> None:
    run = make_run()
    write_report(run)
    header, base, *_, last_checkpoint, final = rows((run / "report.md").read_text(), "Scores")

    assert header[:4] == ["model", "T (learned)", "K (kept)", "KT (both)"]
    assert header[4:] == [
        "Avg. (raw)",
        "facts_seen (knowledge)",
        "facts_heldout (knowledge)",
        "reverse (task)",
        "samples/s (evaluation)",
    ]
    assert base == ["base", "0.02", "1.00", "0.04", "0.65", "0.980 ± 0.010", "0.960 ± 0.010", "0.020 ± 0.008", "300"]
    assert last_checkpoint[:4] == ["step-30", "0.73", "0.96", "0.83"]
    assert [cell.strip("*") for cell in final[:4]] == ["final", "0.97", "0.95", "0.96"]


def test_commands_fit_the_adapter_and_survive_odd_paths(make_run: MakeRun) -> None:
    run = make_run("a run's folder", name="odd name; rm -rf")
    write_report(run)
    markdown = (run / "report.md").read_text()

    assert "--max-lora-rank 32" in markdown  # the largest rank of the adapter is 24
    assert "--served-model-name odd-name-rm--rf\n" in markdown
    assert "a run'\"'\"'s folder/merged'" in markdown
    assert repr(str(run.resolve() / "adapter")) in markdown


def test_a_run_without_an_adapter_is_served_merged(make_run: MakeRun) -> None:
    run = make_run(method={"name": "full"})
    (run / "adapter" / "adapter_config.json").unlink()
    (run / "adapter").rmdir()
    write_report(run)
    markdown = (run / "report.md").read_text()

    assert "PeftModel" not in markdown
    assert "vllm serve" in markdown


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.yaml", "config.yaml is missing."),
        ("environment.json", "environment.json is missing."),
        ("metrics.jsonl", "Its training was not logged."),
        ("init/report.json", "Initialisation: not run yet."),
        ("eval/results.json", "Evaluation: not run yet."),
    ],
)
def test_a_missing_part_is_named(make_run: MakeRun, missing: str, said: str) -> None:
    run = make_run()
    (run / missing).unlink()
    text, page = read(write_report(run))

    assert_self_contained(text, page)
    assert said in page.text
    assert said in (run / "report.md").read_text()


def test_a_run_of_which_only_the_configuration_is_there(tmp_path: Path) -> None:
    run = tmp_path / "fresh"
    run.mkdir()
    (run / "config.yaml").write_text("name: fresh\nmethod: {name: lora, rank: 8}\n")
    text, page = read(write_report(run))

    assert_self_contained(text, page)
    markdown = (run / "report.md").read_text()
    for part in ("Evaluation", "Training", "Export", "Initialisation"):
        assert f"{part}: not run yet." in page.text
        assert f"{part}: not run yet." in markdown
    assert "It has not been trained yet." in page.text


def test_names_with_special_characters_are_shown_as_they_are(make_run: MakeRun) -> None:
    run = make_run(name=NASTY)
    text, page = read(write_report(run))
    markdown = (run / "report.md").read_text()

    assert_self_contained(text, page)
    assert "alert('x')" in page.text
    assert "<script" not in text
    assert markdown.startswith("# \\<script\\>alert('x')\\</script\\> & \"a\\|b\" \\`c\\` \\*d\\* \\[e\\](f)\n")


def test_ranks_that_differ_are_drawn_and_summarised(make_run: MakeRun) -> None:
    run = make_run()
    layers = {f"model.layers.{block}.up": {"rank": 4 + block, "shape": [32, 16]} for block in range(4)}
    write_json(run / "init" / "report.json", {"method": "corda", "layers": layers})
    text, page = read(write_report(run))

    assert_self_contained(text, page)
    assert page.tags["svg"] == 4
    assert "4 to 7, mean 5.5" in page.text
    assert "1,056 (52 % of the adapted weights')" in page.text


def test_notes_of_reader_and_evaluation_are_shown_once(make_run: MakeRun) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 45')
    write_report(run)
    markdown = (run / "report.md").read_text()

    assert markdown.count("half-written") == 1
    assert markdown.count("no full fine-tuning result was given") == 1


def test_a_report_can_be_written_again(make_run: MakeRun) -> None:
    run = make_run()
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.fixture
def three_runs(make_run: MakeRun) -> list[Path]:
    lora = {"name": "lora", "rank": 8, "alpha": 8}
    return [
        make_run("lora", name="lora", method=lora, learning_rate=1e-3, end=(0.42, 0.8)),
        make_run("corda", name="corda", learning_rate=2e-5, end=(1.0, 0.77)),
        make_run("anchored", name="anchored", anchor=ANCHOR, end=(0.98, 0.97)),
    ]


def test_a_comparison_has_one_table_and_one_figure_of_each_kind(three_runs: list[Path], tmp_path: Path) -> None:
    html = write_comparison(three_runs, tmp_path / "comparison", title="Three & one")
    text, page = read(html)
    markdown = (tmp_path / "comparison" / "report.md").read_text()
    header, base, *runs = rows(markdown, "Scores at the end of each run")

    assert_self_contained(text, page)
    assert html == tmp_path / "comparison" / "report.html"
    assert page.tags["svg"] == 4  # the K–T plane, the ends with the Pareto front, forgetting, training loss
    assert "Three & one" in page.text
    for column in ("method", "anchor", "learning rate (peak)", "steps", "training (seconds)", "T (learned)"):
        assert column in header
    cells = [dict(zip(header, (cell.strip("*") for cell in row), strict=True)) for row in [base, *runs]]
    assert [row["run"] for row in cells] == ["base", "lora", "corda", "anchored"]
    assert [row["T (learned)"] for row in cells] == ["0.02", "0.42", "1.00", "0.98"]
    assert [row["K (kept)"] for row in cells] == ["1.00", "0.80", "0.77", "0.97"]
    assert [row["learning rate (peak)"] for row in cells] == ["–", "0.001", "2e-5", "0.003"]
    assert [row["anchor"] for row in cells] == ["–", "none", "none", "KL × 1, 4 prompts/step"]
    assert cells[3]["best KT (step)"] == "0.97 (40)"
    assert cells[3]["training (seconds)"] == "14"
    assert runs[2][0] == "**anchored**"
    assert "A table at one learning rate and one step misleads" in page.text
    assert "A table at one learning rate and one step misleads" in markdown
    assert "corda learned most (T 1.00). anchored kept most (K 0.97). anchored balances both best" in page.text


def test_a_comparison_shows_what_differs_and_links_the_reports(three_runs: list[Path], tmp_path: Path) -> None:
    write_report(three_runs[0])
    _, page = read(write_comparison(three_runs, tmp_path / "comparison"))
    markdown = (tmp_path / "comparison" / "report.md").read_text()
    differing = {row[0] for row in rows(markdown, "What differs between the configurations")[1:]}

    assert {"method.name", "train.learning_rate", "anchor.kl"} <= differing
    assert not differing & {"train.seed", "name", "model.path"}
    assert "../runs/lora/report.html" in page.references
    assert not any("corda/report.html" in reference for reference in page.references)


def test_runs_that_are_hard_to_compare_are_flagged(make_run: MakeRun, tmp_path: Path) -> None:
    full = make_run("full", name="full", method={"name": "full"}, end=(0.5, 0.5))
    runs = [full, make_run("a", name="a", full_fine_tuning=str(full))]
    _, page = read(write_comparison(runs, tmp_path / "comparison"))

    assert "These runs have different references for T" in page.text
    assert "base of full" in page.text and "base of a" in page.text


def test_runs_may_share_a_name_and_be_unfinished(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("one", name="same"), make_run("two", name="same"), make_run("three", name=NASTY)]
    (runs[1] / "eval" / "results.json").unlink()
    text, page = read(write_comparison([*runs, runs[0]], tmp_path / "comparison"))

    assert_self_contained(text, page)
    for label in ("same (one) #1", "same (one) #2", "same (two)"):
        assert label in page.text
    assert "same (two): It has not been evaluated yet." in page.text


def test_a_comparison_of_runs_that_have_only_begun(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        run = write_run(tmp_path / name, name=name)
        for part in ("eval/results.json", "metrics.jsonl", "init/report.json"):
            (run / part).unlink()
        runs.append(run)
    text, page = read(write_comparison(runs, tmp_path / "comparison"))

    assert_self_contained(text, page)
    assert "Training of every run: not run yet." in page.text
    assert "It has not been evaluated yet." in page.text


def test_no_runs_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="runs: none given"):
        write_comparison([], tmp_path)
    with pytest.raises(UserError, match="runs: none given"):
        summary_table([])


def test_the_terminal_shows_the_same_scores(three_runs: list[Path], make_run: MakeRun) -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(summary_table([*three_runs, make_run("odd", name="[red]odd[/red]")]))
    shown = captured.get()

    assert "[red]odd[/red]" in shown
    line = next(line for line in shown.splitlines() if "anchored" in line)
    for cell in ("0.98", "0.97", "0.003", "40"):
        assert cell in line


def test_a_quantised_run_is_loaded_on_its_frozen_base(make_run: MakeRun) -> None:
    run = make_run()
    frozen = run / "frozen_base"
    frozen.mkdir()
    write_json(run / "adapter" / "adapter_config.json", {"r": 8, "base_model_name_or_path": str(frozen)})
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert f"AutoModelForCausalLM.from_pretrained('{frozen}'" in text
    assert f"vllm serve {frozen} --enable-lora --max-lora-rank 8" in text
    assert "in PEFT's format, on frozen_base" in text


def test_vllm_is_not_offered_what_it_cannot_serve(make_run: MakeRun) -> None:
    run = make_run()
    write_json(run / "adapter" / "adapter_config.json", {"r": 8, "use_dora": True})
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "PeftModel.from_pretrained" in text
    assert "--enable-lora" not in text
