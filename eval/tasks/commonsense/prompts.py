"""Prompts of the tasks beside this file."""

from collections.abc import Mapping
from typing import Any

from harness.data.templates import fill


def alpaca(document: Mapping[str, Any]) -> str:
    """The document's instruction in Alpaca's template."""
    return fill("alpaca", document["instruction"])
