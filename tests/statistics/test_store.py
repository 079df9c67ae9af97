"""Statistics on disk: round trip, sharing, damage."""

import json
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.statistics.statistic import Statistic
from harness.statistics.store import INDEX, StatisticsReader, StatisticsWriter

GROUPS = {"a.q": "a.q", "a.k": "a.q", "a.down": "a.down"}


@pytest.fixture
def covariances(tmp_path: Path) -> dict[str, Statistic]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "a.q": Statistic(torch.rand(4, 4, generator=generator), 11),
        "a.down": Statistic(torch.rand(6, 6, generator=generator), 11),
    }
    writer = StatisticsWriter(tmp_path)
    writer.add("input_covariance", made, GROUPS)
    writer.close()
    return made


def test_round_trip(covariances: dict[str, Statistic], tmp_path: Path) -> None:
    reader = StatisticsReader(tmp_path)
    for layer, group in GROUPS.items():
        found = reader.input_covariance(layer)
        assert torch.equal(found.matrix, covariances[group].matrix)
        assert found.tokens == 11


def test_index(covariances: dict[str, Statistic], tmp_path: Path) -> None:
    modules = json.loads((tmp_path / INDEX).read_text())["modules"]
    assert modules.keys() == GROUPS.keys()
    assert modules["a.q"] == modules["a.k"]
    (entry,) = modules["a.q"]["input_covariance"]
    assert entry.keys() == {"file", "key", "tokens", "dtype", "checksum"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_rounds_and_kinds(tmp_path: Path) -> None:
    writer = StatisticsWriter(tmp_path)
    for number in range(3):
        statistic = Statistic(torch.full((2, 2), float(number)), 5 + number)
        writer.add("input_covariance", {"a.q": statistic}, {"a.q": "a.q"})
    writer.add("weight_gradient", {"a.q": Statistic(torch.ones(3, 2), 4)}, {"a.q": "a.q"})
    writer.close()
    reader = StatisticsReader(tmp_path)
    assert reader.rounds("a.q") == 3
    assert [reader.input_covariance("a.q", number).tokens for number in range(3)] == [5, 6, 7]
    assert float(reader.input_covariance("a.q", 2).matrix[0, 0]) == 2.0
    assert torch.equal(reader.weight_gradient("a.q").matrix, torch.ones(3, 2))


@pytest.mark.parametrize("damage", ["one bit", "cut", "missing"])
def test_damage(covariances: dict[str, Statistic], tmp_path: Path, damage: str) -> None:
    modules = json.loads((tmp_path / INDEX).read_text())["modules"]
    file = tmp_path / modules["a.down"]["input_covariance"][0]["file"]
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
