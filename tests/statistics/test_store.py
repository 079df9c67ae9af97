"""Statistics on disk: round trip, sharing, damage."""

import json
import threading
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


def test_a_file_written_twice_is_the_second_one(tmp_path: Path) -> None:
    with StatisticsWriter(tmp_path) as writer:
        for value in (1.0, 2.0):
            writer.write("weight_gradient", "a.q", Statistic(torch.full((2, 3), value), 4))
            writer.drain()
        writer.serve("weight_gradient", {"a.q": "a.q"})
        writer.close()
    assert torch.equal(StatisticsReader(tmp_path).weight_gradient("a.q").matrix, torch.full((2, 3), 2.0))


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The error comes out at the latest with `close`; no index says that all is there, and no thread is left."""
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError), StatisticsWriter(tmp_path / "folder") as writer:
        writer.write("weight_gradient", "a.q", Statistic(torch.ones(2, 3), 4))
        writer.serve("weight_gradient", {"a.q": "a.q"})
        writer.close()
    assert not any(thread.name.startswith("write-statistics") for thread in threading.enumerate())
