"""What the init stage has finished, layer by layer: a run that was killed goes on, and does nothing twice.

Each layer's adapter and each layer's finding is a file of its own in the staging folder, under a key made from
everything that decides it. Adapters are kept in the cache besides, for other runs that ask for the very same.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from harness.cache import Cache
from harness.files import read_json, write_json, write_tensors

# Raise it when what `init` computes from the same inputs changes: files of earlier versions are then not found.
FORMULA = 1
_REPORT = "report"


@dataclass(frozen=True)
class KeptLayer:
    """A layer's ``tensors`` at step 0 by name, and its numbers for ``init/report.json``."""

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]


class LayerStore:
    """Finished layers in ``folder``, and in ``cache`` where there is one. Counts where they were found."""

    def __init__(self, folder: Path, cache: Cache | None) -> None:
        self._folder = folder
        self._cache = cache
        self.resumed = 0
        self.cached = 0

    def finding(self, content: Mapping[str, Any]) -> dict[str, Any] | None:
        """What `Method.examine` said of the layer that ``content`` describes, if it is there."""
        file = self._finding_file(content)
        return read_json(file) if file.is_file() else None

    def keep_finding(self, content: Mapping[str, Any], finding: Mapping[str, Any]) -> None:
        """Write a finding."""
        write_json(self._finding_file(content), finding)

    def adapter(self, content: Mapping[str, Any]) -> Path | None:
        """The file of the adapter that ``content`` describes; one that only the cache has is copied here first."""
        file = self._adapter_file(content)
        if file.is_file():
            self.resumed += 1
            return file
        kept = None if self._cache is None else self._cache.get("adapter", _plain(content))
        if kept is None:
            return None
        report = json.loads(bytes(kept.pop(_REPORT).tolist()))
        self.cached += 1
        return self._write(file, kept, report)

    def keep_adapter(
        self, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], report: Mapping[str, Any]
    ) -> Path:
        """Write an adapter and its report; the file."""
        file = self._write(self._adapter_file(content), tensors, report)
        if self._cache is not None:
            text = torch.tensor(list(json.dumps(report).encode()), dtype=torch.uint8)
            self._cache.put("adapter", _plain(content), {**tensors, _REPORT: text})
        return file

    def _write(self, file: Path, tensors: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> Path:
        write_tensors(file, tensors, {_REPORT: json.dumps(report)})
        return file

    def _finding_file(self, content: Mapping[str, Any]) -> Path:
        return self._folder / "findings" / f"{_key(content)}.json"

    def _adapter_file(self, content: Mapping[str, Any]) -> Path:
        return self._folder / "adapters" / f"{_key(content)}.safetensors"


def read_kept(file: Path) -> KeptLayer:
    """An adapter that `LayerStore` has written."""
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping
        return KeptLayer(tensors, json.loads(content.metadata()[_REPORT]))


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"formula": FORMULA, **content}


def _key(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()
