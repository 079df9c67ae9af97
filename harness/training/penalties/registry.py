"""Penalties by name."""

from typing import Any

from harness.plugins import find_class
from harness.training.penalties.base import Penalty, PenaltySetup

_PACKAGE, _GROUP, _HELPERS = "harness.training.penalties", "harness.penalties", {"base", "registry"}


def penalty_class(name: str) -> type[Penalty]:
    """The penalty class called ``name``. Raises `UserError` for an unknown one."""
    return find_class(name, _PACKAGE, _GROUP, Penalty, _HELPERS, "penalties")


def build_penalty(config: dict[str, Any], setup: PenaltySetup) -> Penalty:
    """The penalty of a resolved configuration entry."""
    cls = penalty_class(config["name"])
    return cls(cls.Options.model_validate({k: v for k, v in config.items() if k != "name"}), setup)
