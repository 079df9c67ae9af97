"""Recipes over the embedded worlds: what can be run with nothing but this repository."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import RunConfig, load_config
from harness.resources import find
from harness.tiny import TinyWorld
from harness.tiny import build as build_tiny

if TYPE_CHECKING:
    from harness.tiny.visual_pretrain import VisualWorld

EMBEDDED = ("tiny", "tiny-visual")


def embedded_config(name: str, out: Path) -> RunConfig:
    """The recipe of the embedded world ``name``, one of `EMBEDDED`; the world is built first where there is none.

    Args:
        name: of the world, and of the run.
        out: the folder of run directories.
    """
    return tiny_config(build_tiny(), name, [], out) if name == "tiny" else visual_config(name, [], out)


def tiny_config(world: TinyWorld, name: str, overrides: Sequence[str], out: Path) -> RunConfig:
    """The demo's recipe with the world's places filled in and ``overrides`` applied."""
    return _filled("launch/recipes/tiny.yaml", world, name, overrides, out)


def visual_config(name: str, overrides: Sequence[str], out: Path) -> RunConfig:
    """The small LLaVA's recipe with its world's places filled in and ``overrides`` applied; builds that world."""
    from harness.tiny.visual_pretrain import build_visual

    world = build_visual()
    suite = f"eval.include_path={world.data_dir}"
    return _filled("launch/recipes/tiny_visual.yaml", world, name, [suite, *overrides], out)


def _filled(recipe: str, world: "TinyWorld | VisualWorld", name: str, overrides: Sequence[str], out: Path) -> RunConfig:
    places = [
        f"name={name}",
        f"output_dir={out}",
        f"model.path={world.model}",
        f"data.train.path={world.train}",
        f"data.preserve.path={world.preserve}",
        f"eval.data_dir={world.data_dir}",
    ]
    return load_config(find(recipe), [*places, *overrides])
