"""Prompt templates: how a row's prompt column becomes the text that the model reads before its response."""

TEMPLATES: dict[str, str] = {
    # The columns' text unchanged.
    "none": "{prompt}",
    # Stanford Alpaca's template without an input field, as CorDA, PiSSA and LoRA-GA use it for MetaMathQA.
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:"
    ),
}


def fill(template: str, prompt: str) -> str:
    """The prompt text under a named template; braces in the prompt itself stay as they are."""
    return TEMPLATES[template].replace("{prompt}", prompt)
