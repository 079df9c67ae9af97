"""Writing shards: sizes, names, index."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.export.shards import INDEX, ShardWriter


@pytest.mark.parametrize("limit", [1, 100, 400, 1000, 10**6])
def test_shards(tmp_path: Path, limit: int) -> None:
    tensors = {f"t{i}": torch.arange(i * 10, i * 10 + 25, dtype=torch.float32) for i in range(7)}  # 100 bytes each
    writer = ShardWriter(tmp_path, limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    per_file = max(1, limit // 100)
    assert len(files) == -(-7 // per_file)
    found = {}
    for file in files:
        content = load_file(file)
        assert len(content) <= per_file
        found |= content
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    if len(files) == 1:
        assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 700
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert len(list(tmp_path.iterdir())) == len(files) + 1
