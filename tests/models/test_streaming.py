"""Suspended forward passes: what they hand over, what they refuse, and that nothing of them is left behind."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from harness.errors import UserError
from harness.models.loading import load_model
from harness.models.streaming import (
    decoder_blocks,
    fill_around,
    loaded_in_turn,
    mapped,
    suspended,
    tensors_in,
)
from harness.models.targets import target_modules
from harness.models.weights import BaseWeights, empty_model
from tests.statistics.direct_streamed import DECODERS, left_over, saved

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", DECODERS)
def test_logits_block_by_block(tmp_path: Path, name: str) -> None:
    """Two passes of different lengths, interleaved at every block, are the whole model's to the last bit."""
    config = saved(tmp_path, DECODERS[name])
    whole, model = load_model(config), empty_model(config)
    blocks = decoder_blocks(model, list(target_modules(model, "all-linear")))
    weights = BaseWeights(config, model)
    fill_around(model, blocks, weights, CPU, head=True)
    inputs = [torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]]), torch.tensor([[5, 6], [7, 8]])]
    logits: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            logits[number] = model(input_ids=inputs[number], use_cache=False).logits

    order = range(len(blocks.modules))
    with (
        torch.no_grad(),
        suspended(blocks, [lambda: run(0), lambda: run(1)], CPU) as suspension,
        closing(loaded_in_turn(blocks, order, weights, CPU)) as turns,
    ):
        for place in turns:
            alive = [b for b, block in enumerate(blocks.modules) if not next(block.parameters()).is_meta]
            assert set(alive) <= {place, place + 1}
            for forward in suspension.forwards:
                forward.resume(suspension.run(suspension.standing(forward, place)))
    assert all(forward.call is None for forward in suspension.forwards)
    with torch.no_grad():
        for number, ids in enumerate(inputs):
            assert torch.equal(logits[number], whole(input_ids=ids, use_cache=False).logits)
    assert not left_over() and all("forward" not in vars(block) for block in blocks.modules)
    assert all(parameter.is_meta for block in blocks.modules for parameter in block.parameters())


def test_tied_embeddings_are_filled_once(tmp_path: Path) -> None:
    settings = {**DECODERS["llama"].to_dict(), "tie_word_embeddings": True}
    for config in (LlamaConfig(**settings), DECODERS["llama"]):
        tied = config.tie_word_embeddings
        saved_at = saved(tmp_path / str(tied), config)
        for head in (True, False):
            model = empty_model(saved_at)
            blocks = decoder_blocks(model, list(target_modules(model, "all-linear")))
            fill_around(model, blocks, BaseWeights(saved_at, model), CPU, head)
            embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            assert not embedding.is_meta and not model.model.norm.weight.is_meta
            assert output.is_meta == (not head)
            assert (output is embedding) == (tied and head)
            assert all(parameter.is_meta for block in blocks.modules for parameter in block.parameters())


class Toy(nn.Module):
    """Blocks that can be called in any order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for place in self.order:
            x = self.blocks[place](x)
            if x.shape[0] == 7:
                raise ValueError("seven rows")
        return self.head(x)


def passes(model: Toy, rows: list[int]) -> None:
    blocks = decoder_blocks(model, [f"blocks.{place}.0" for place in range(3)])
    runs = [lambda count=count: model(torch.ones(count, 4)) for count in rows]
    with suspended(blocks, runs, CPU) as suspension:
        for place in range(3):
            for forward in suspension.forwards:
                forward.resume(suspension.run(suspension.standing(forward, place)))


@pytest.mark.parametrize(
    ("order", "message"), [([0, 2, 1], "goes to block 2 instead"), ([0, 1], "ends before it")], ids=["order", "missing"]
)
def test_other_orders_are_refused(order: list[int], message: str) -> None:
    with pytest.raises(UserError, match=rf"^init\.collection: streamed cannot run block \d: the model {message}"):
        passes(Toy(order), [2, 3])
    assert not left_over()


def test_errors_end_every_pass() -> None:
    """An error of the model in its thread, and one of the conductor's, come out as themselves."""
    model = Toy([0, 1, 2])
    passes(model, [2, 3])
    with pytest.raises(ValueError, match="seven rows"):
        passes(model, [2, 7, 3])
    assert not left_over()
    blocks = decoder_blocks(model, ["blocks.0.0"])
    with pytest.raises(KeyError, match="mine"), suspended(blocks, [lambda: model(torch.ones(2, 4))] * 3, CPU):
        raise KeyError("mine")
    assert not left_over()
    runs = [lambda: model(torch.ones(2, 4)), lambda: model(torch.ones(2, 5))]  # the second fails before any block
    with pytest.raises(RuntimeError, match="shape"), suspended(blocks, runs, CPU):
        pass
    assert not left_over() and all("forward" not in vars(block) for block in blocks.modules)
    assert model(torch.ones(2, 4)).shape == (2, 4)


def test_weights_that_cannot_be_read_end_the_loader(tmp_path: Path) -> None:
    config = saved(tmp_path, DECODERS["llama"])
    model = empty_model(config)
    blocks = decoder_blocks(model, list(target_modules(model, "all-linear")))
    weights = BaseWeights(config, model)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError), closing(loaded_in_turn(blocks, range(3), weights, CPU)) as turns:
        next(turns)
    assert not left_over()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            ["blocks.0.0", "head"],
            "cannot reach head, which lies outside the list of decoder blocks blocks; use resident",
        ),
        (["head"], "cannot reach head, which lies outside the list of decoder blocks; use resident"),
        (["others.0"], "cannot read counter, which is no parameter"),
        (["blocks.0.0", "others.0"], "cannot reach others.0, which lies outside the list of decoder blocks blocks"),
        (["twice.0"], "cannot run twice, where one block stands twice"),
    ],
)
def test_models_that_cannot_be_streamed(layers: list[str], message: str) -> None:
    model = Toy([0, 1, 2])
    model.others = nn.ModuleList([nn.Linear(4, 4)])
    model.twice = nn.ModuleList([nn.Linear(4, 4)] * 2)
    model.register_buffer("counter", torch.zeros(()))
    with pytest.raises(UserError) as error:
        decoder_blocks(model, layers)
    assert str(error.value).startswith(f"init.collection: streamed {message}")


def test_trees() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    tree = (one, [None, {"a": two, "b": "text"}], 3)
    assert [id(tensor) for tensor in tensors_in(tree)] == [id(one), id(two)]
    doubled = mapped(tree, lambda tensor: tensor + 1)
    assert torch.equal(doubled[0], one + 1) and torch.equal(doubled[1][1]["a"], two + 1)
    assert doubled[1][0] is None and doubled[1][1]["b"] == "text" and doubled[2] == 3
