"""Finding classes by name: modules of our own packages, then entry points of installed distributions."""

import importlib
import pkgutil
from importlib.metadata import entry_points

from harness.config import nearest
from harness.errors import UserError


def names(package: str, group: str, helpers: set[str]) -> list[str]:
    """All names that `find_class` knows for this package and entry-point group, sorted."""
    folder = importlib.import_module(package).__path__
    own = {module.name for module in pkgutil.iter_modules(folder)} - helpers
    return sorted(own | {entry.name for entry in entry_points(group=group)})


def find_class(name: str, package: str, group: str, base: type, helpers: set[str], key: str) -> type:
    """The subclass of ``base`` that ``name`` stands for.

    Own modules hold one subclass each, in the module of that name; third parties register an entry point.

    Raises:
        UserError: the name is unknown; the message lists the known ones and the nearest.
    """
    known = names(package, group, helpers)
    if name not in known:
        raise UserError(f"{key}.name: {name!r} given; allowed: {', '.join(known)}{nearest(name, known)}")
    for entry in entry_points(group=group):
        if entry.name == name:
            return entry.load()
    module = importlib.import_module(f"{package}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define exactly one subclass of {base.__name__}")
    return classes[0]
