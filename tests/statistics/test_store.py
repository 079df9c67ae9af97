"""Statistics on disk: round trip, sharing, damage."""

import json
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.statistics.covariance import InputCovariance
from harness.statistics.store import INDEX, StatisticsReader, write_statistics

GROUPS = {"a.q": "a.q", "a.k": "a.q", "a.down": "a.down"}


@pytest.fixture
def covariances(tmp_path: Path) -> dict[str, InputCovariance]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "a.q": InputCovariance(torch.rand(4, 4, generator=generator), 11),
        "a.down": InputCovariance(torch.rand(6, 6, generator=generator), 11),
    }
    write_statistics(tmp_path, made, GROUPS)
    return made


def test_round_trip(covariances: dict[str, InputCovariance], tmp_path: Path) -> None:
    reader = StatisticsReader(tmp_path)
    for layer, group in GROUPS.items():
        found = reader.input_covariance(layer)
        assert torch.equal(found.matrix, covariances[group].matrix)
        assert found.tokens == 11


def test_index(covariances: dict[str, InputCovariance], tmp_path: Path) -> None:
    modules = json.loads((tmp_path / INDEX).read_text())["modules"]
    assert modules.keys() == GROUPS.keys()
    assert modules["a.q"] == modules["a.k"]
    assert modules["a.q"].keys() == {"file", "key", "tokens", "dtype", "checksum"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["one bit", "cut", "missing"])
def test_damage(covariances: dict[str, InputCovariance], tmp_path: Path, damage: str) -> None:
    modules = json.loads((tmp_path / INDEX).read_text())["modules"]
    file = tmp_path / modules["a.down"]["file"]
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-8])
    else:
        file.unlink()
    reader = StatisticsReader(tmp_path)
    assert reader.input_covariance("a.k").tokens == 11
    with pytest.raises(UserError, match=rf"^statistics: .*{file.name} is missing or damaged; .*--force calibrate"):
        reader.input_covariance("a.down")
