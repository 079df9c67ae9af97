"""Prompt templates, letter by letter."""

from harness.data.templates import TEMPLATES, fill


def test_alpaca() -> None:
    assert fill("alpaca", "Add 1 and 2.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:"
    )


def test_none_leaves_text_unchanged() -> None:
    text = " {prompt} {x} {{}} \n%s "
    assert fill("none", text) == text


def test_braces_in_prompts() -> None:
    for name in TEMPLATES:
        assert fill(name, "f({x}) = {{prompt}} {prompt}").count("f({x}) = {{prompt}} {prompt}") == 1
        assert len(fill(name, "{prompt}")) == len(fill(name, "")) + len("{prompt}")
