"""The run directory: the contract between stages. Every path in it has its one name here."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside ``<output_dir>/<name>``; nothing is created by asking for one."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def stages(self) -> Path:
        """What each finished stage was made from, and the checksums of what it left."""
        return self.path / "stages"

    @property
    def base(self) -> Path:
        """The base model with the head of the run's task, where the task adds one."""
        return self.path / "base"

    @property
    def statistics(self) -> Path:
        return self.path / "statistics"

    @property
    def init(self) -> Path:
        return self.path / "init"

    @property
    def answers(self) -> Path:
        """Answers of the original model to preserve prompts, where a penalty or replay learns from them."""
        return self.path / "answers"

    @property
    def prepared(self) -> Path:
        """What penalties computed once before training, with checksums."""
        return self.path / "prepared"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def frozen_base(self) -> Path:
        """The frozen weights of a quantised run, dequantised: what ``adapter/`` lies on then."""
        return self.path / "frozen_base"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def results(self) -> Path:
        return self.path / "eval" / "results.json"

    @property
    def items(self) -> Path:
        """What every evaluated model answered, ``<model>.jsonl``, a line for each item."""
        return self.path / "eval" / "items"

    @property
    def analysis(self) -> Path:
        """Figures and numbers of `harness analyse`; no stage reads them."""
        return self.path / "analysis"

    def finished_checkpoints(self) -> list[tuple[int, Path]]:
        """``(step, folder)`` of every published checkpoint, in the order of steps."""
        if not self.checkpoints.is_dir():
            return []
        found = [(re.fullmatch(r"step-(\d+)", entry.name), entry) for entry in self.checkpoints.iterdir()]
        return sorted((int(match[1]), entry) for match, entry in found if match)


def cache_directory() -> Path:
    """Where work that outlives one run is kept: ``$PALIMPSEST_CACHE``, else ``~/.cache/palimpsest``."""
    return Path(os.environ.get("PALIMPSEST_CACHE") or Path.home() / ".cache" / "palimpsest").expanduser()
