"""A decoder's own forward pass, block by block: no more than one block's weights (and the next one's) live at a time.

Nothing of the model is reimplemented. For every batch the model's own forward runs in a thread of its own and is
suspended at each decoder block: there it hands the block's arguments over and waits for its output. So masks, position
embeddings, caches and what differs from block to block (sliding windows) are what the model makes them. Whoever
conducts fills a block with weights, runs it for every batch in turn, empties it and goes on to the next one. One thread
runs at a time, besides the one that loads weights.

Warning:
    It takes a decoder whose blocks sit in one `ModuleList`, each called once and in their order, and whose weights are
    all parameters. `decoder_blocks` refuses what it can tell; a forward that calls its blocks otherwise is refused when
    it does so.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.errors import UserError
from harness.models.targets import reads_images
from harness.models.weights import BaseWeights, empty, fill

REMEDY = "use resident, or auto"


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model and their dotted names, in order."""

    names: list[str]
    modules: list[nn.Module]

    def holding(self, layers: Iterable[str]) -> list[list[str]]:
        """Those of ``layers`` that lie in each block."""
        layers = list(layers)
        return [[layer for layer in layers if layer.startswith(f"{name}.")] for name in self.names]


def decoder_blocks(model: nn.Module, layers: Sequence[str]) -> Blocks:
    """The members of the one `ModuleList` that holds all of ``layers``.

    Of a vision-language model that is the list of its language model; layers that read images run before it.

    Raises:
        UserError: there is none, or the model has weights that are no parameters; the message names one.
    """
    layers = [layer for layer in layers if not reads_images(layer)] or list(layers)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    holding = [name for name in outermost if all(layer.startswith(f"{name}.") for layer in layers)]
    if not holding:
        first = next((name for name in outermost if any(layer.startswith(f"{name}.") for layer in layers)), None)
        outside = next(layer for layer in layers if first is None or not layer.startswith(f"{first}."))
        raise UserError(
            f"init.collection: streamed cannot reach {outside}, which lies outside the list of decoder blocks"
            f"{f' {first}' if first else ''}; {REMEDY}"
        )
    (prefix,) = holding
    blocks = list(outermost[prefix])
    if len({id(block) for block in blocks}) < len(blocks):
        raise UserError(f"init.collection: streamed cannot run {prefix}, where one block stands twice; {REMEDY}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if buffers := sorted(set(model.state_dict(keep_vars=True)) - parameters):
        raise UserError(f"init.collection: streamed cannot read {buffers[0]}, which is no parameter; {REMEDY}")
    return Blocks([f"{prefix}.{number}" for number in range(len(blocks))], blocks)


def fill_around(model: PreTrainedModel, blocks: Blocks, weights: BaseWeights, device: torch.device, head: bool) -> None:
    """Put weights into everything but the blocks, and all buffers on ``device``; ``head``: the output embedding too."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    left_out = [blocks.names[0].rpartition(".")[0]]
    if not head:
        output = model.get_output_embeddings()
        left_out += [name for name, module in model.named_modules() if module is output]
    # Without them for a moment, so that what is tied is filled once and stays tied.
    taken = {name: model.get_submodule(name) for name in left_out}
    for name in left_out:
        _put(model, name, nn.Module())
    try:
        fill(model, "", weights, device)
    finally:
        for name, module in taken.items():
            _put(model, name, module)


def loaded_in_turn(blocks: Blocks, order: Sequence[int], weights: BaseWeights, device: torch.device) -> Iterator[int]:
    """The places in ``order``, one at a time; a block has weights while its turn lasts, the next one's load meanwhile.

    Close it (`contextlib.closing`) where it may not run to its end: that ends the thread that loads.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load-block") as loader:

        def load(place: int) -> None:
            fill(blocks.modules[place], blocks.names[place], weights, device)

        coming = loader.submit(load, order[0])
        try:
            for turn, place in enumerate(order):
                coming.result()
                if turn + 1 < len(order):
                    coming = loader.submit(load, order[turn + 1])
                yield place
                empty(blocks.modules[place])
        finally:
            coming.cancel()
            loader.shutdown()
            for place in order:
                empty(blocks.modules[place])


@dataclass(frozen=True)
class Call:
    """What a forward pass gave to the block at ``place``."""

    place: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Call":
        """The call with every tensor changed."""
        return Call(self.place, mapped(self.args, change), mapped(self.kwargs, change))


class Ended(BaseException):
    """Raised in a suspended forward pass that nobody wants to go on; no `except Exception` of a model stops it."""


class SuspendedForward:
    """One forward pass in a thread of its own. ``call``: where it stands; None where it has come to its end."""

    def __init__(self, run: Callable[[], None], device: torch.device, last: int) -> None:
        """``run``: calls the model. ``last``: place of the last block."""
        self.call: Call | None = None
        self._calls: queue.SimpleQueue[Call | BaseException | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._model_forward, self._device, self._last = run, device, last
        self._cpu_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="suspended-forward", daemon=True)

    def start(self) -> None:
        """Run to the first block."""
        self._thread.start()
        self._wait()

    def resume(self, output: Any) -> None:
        """Go on with ``output`` as the block's, to the next block or to the end."""
        self.call = None
        self._answers.put(output)
        self._wait()

    def end(self) -> None:
        """Unwind the pass where it stands; nothing where it has ended."""
        self.call = None
        if self._thread.is_alive():
            self._answers.put(Ended)
        if self._thread.ident is not None:
            self._thread.join()

    def exchange(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the pass's own thread: hand a block's arguments over and wait for its output."""
        self._calls.put(Call(place, args, kwargs))
        answer = self._answers.get()
        if answer is Ended:
            raise Ended  # an instance that no frame holds: with one of its own, the frame would keep its tensors
        if place == self._last:
            torch.set_num_threads(self._cpu_threads)
        return answer

    def _wait(self) -> None:
        found = self._calls.get()
        if not isinstance(found, Call):
            self._thread.join()
            if found is not None:
                raise found
            return
        self.call = found

    def _run(self) -> None:
        _thread.forward = self
        # Every thread that computes in parallel gets a pool of its own, and there are as many as batches. Before the
        # last block there is little to compute: one thread will do.
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        found: BaseException | None = None
        try:
            self._model_forward()
        except Ended:
            pass
        except BaseException as error:  # handed to the conductor, who raises it
            found = error
        self._calls.put(found)
        del found


class Suspension:
    """Forward passes that stand at the same block, and what runs that block."""

    def __init__(self, forwards: list[SuspendedForward], originals: list[Callable[..., Any]]) -> None:
        self.forwards = forwards
        self._originals = originals

    def run(self, call: Call) -> Any:
        """The block's own output."""
        return self._originals[call.place](*call.args, **call.kwargs)

    def standing(self, forward: SuspendedForward, place: int) -> Call:
        """The call at which ``forward`` stands, which must be of the block at ``place``."""
        call = forward.call
        if call is None or call.place != place:
            where = "ends before it" if call is None else f"goes to block {call.place} instead"
            raise UserError(f"init.collection: streamed cannot run block {place}: the model {where}; {REMEDY}")
        return call


@contextmanager
def suspended(blocks: Blocks, runs: Sequence[Callable[[], None]], device: torch.device) -> Iterator[Suspension]:
    """Start every one of ``runs`` (calls of the model) and hold it at the first block; all have ended after the block.

    Raises:
        Whatever a pass raises, in the thread of the conductor.
    """
    originals = [block.forward for block in blocks.modules]
    forwards = [SuspendedForward(run, device, len(blocks.modules) - 1) for run in runs]
    cpu_threads = torch.get_num_threads()
    for place, block in enumerate(blocks.modules):
        block.forward = lambda *args, _place=place, **kwargs: _thread.forward.exchange(_place, args, kwargs)
    try:
        for forward in forwards:
            forward.start()
        torch.set_num_threads(cpu_threads)  # of later threads too
        yield Suspension(forwards, originals)
    finally:
        for forward in forwards:
            forward.end()
        for block in blocks.modules:
            del block.forward
        torch.set_num_threads(cpu_threads)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    found: list[torch.Tensor] = []
    mapped(tree, lambda tensor: found.append(tensor) or tensor)
    return found


def mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Nested tuples, lists and dictionaries with every tensor changed; anything else stays what it is."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(mapped(item, change) for item in tree)
    if type(tree) is dict:
        return {key: mapped(value, change) for key, value in tree.items()}
    return tree


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, module)


_thread = threading.local()
