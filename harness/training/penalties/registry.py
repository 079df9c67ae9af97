"""Penalties by name, and what a run's penalties need together."""

from collections.abc import Mapping
from typing import Any

from harness.config import RunConfig
from harness.plugins import find_class, names
from harness.training.penalties.base import Needs, Penalty, PenaltySetup

_PACKAGE, _GROUP, _HELPERS = "harness.training.penalties", "harness.penalties", {"base", "registry"}


def penalty_class(name: str) -> type[Penalty]:
    """The penalty class called ``name``. Raises `UserError` for an unknown one."""
    return find_class(name, _PACKAGE, _GROUP, Penalty, _HELPERS, "penalties")


def penalty_names() -> list[str]:
    """Every known penalty, sorted."""
    return names(_PACKAGE, _GROUP, _HELPERS)


def build_penalty(config: dict[str, Any], setup: PenaltySetup) -> Penalty:
    """The penalty of a resolved configuration entry."""
    cls = penalty_class(config["name"])
    return cls(cls.Options.model_validate({k: v for k, v in config.items() if k != "name"}), setup)


def penalty_entries(config: RunConfig) -> list[dict[str, Any]]:
    """The configuration's penalties, the anchor first; one of weight 0 is left out as if it were not there."""
    entries = [] if config.anchor is None else [{"name": "anchor", **config.anchor.model_dump(mode="json")}]
    return [entry for entry in [*entries, *config.penalties] if _bare(entry).weight > 0]


def entry_needs(entry: dict[str, Any]) -> Needs:
    """What one entry needs."""
    penalty = _bare(entry)
    return type(penalty).needs(penalty.options)


def prepared_name(number: int, entry: Mapping[str, Any]) -> str:
    """The file, without suffix, that holds what entry ``number`` of `penalty_entries` prepared."""
    return f"{number}-{entry['name']}"


def _bare(entry: dict[str, Any]) -> Penalty:
    return build_penalty(entry, PenaltySetup([], 0, 0))
