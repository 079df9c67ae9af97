"""Methods by name."""

from typing import Any

from harness.methods.base import Method
from harness.plugins import find_class, names

_PACKAGE, _GROUP, _HELPERS = "harness.methods", "harness.methods", {"base", "registry"}


def method_class(name: str) -> type[Method]:
    """The method class called ``name``. Raises `UserError` for an unknown one."""
    return find_class(name, _PACKAGE, _GROUP, Method, _HELPERS, "method")


def method_names() -> list[str]:
    """Every known method, sorted."""
    return names(_PACKAGE, _GROUP, _HELPERS)


def build_method(config: dict[str, Any], seed: int) -> Method:
    """The method of a resolved configuration; ``seed`` is for methods that draw random tensors."""
    cls = method_class(config["name"])
    options = cls.Options.model_validate({key: value for key, value in config.items() if key != "name"})
    return cls(options, seed)
