"""Finding the data files that ship with the harness: recipes, DeepSpeed configurations, tasks, suites."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def find(name: str | Path, relative_to: Path | None = None) -> Path:
    """Resolve ``name`` to an existing path.

    Looks at the path as given, then relative to ``relative_to`` (the folder of the user's YAML), then among the
    packaged files: ``harness/_data/<name>`` in an installed wheel, ``<repository>/<name>`` in a clone.

    Raises:
        FileNotFoundError: none of these exists; the message lists the places.
    """
    path = Path(name).expanduser()
    roots = [Path.cwd(), relative_to, _PACKAGE / "_data", _PACKAGE.parent]
    candidates = [path] if path.is_absolute() else [root / path for root in roots if root is not None]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    raise FileNotFoundError(f"{name}: not found (looked at {', '.join(map(str, candidates))})")
