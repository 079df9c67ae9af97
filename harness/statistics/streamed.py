"""Statistics block by block: the same numbers as with the whole model at hand, in the memory of one block.

Forward: every batch is suspended at the same block (`harness.models.streaming`); the block gets its weights, sees all
batches, its sums go to their owners, and its memory is free again. Hidden states of all batches stay.

Gradients need a second sweep, from the last block to the first. Forward, the inputs of every block are kept (on the
CPU where the accelerator has no room); norm, head and loss give the gradient at the last block's output. Then each
block gets its weights again, recomputes its forward pass from the kept inputs and passes the gradient on to the block
before it. Where a model computes something between two blocks, autograd goes through that as well.

Target layers that every pass runs before the first block (the projector of a vision-language model) are hooked while
the passes come to that block; their gradients come last, out of the first block's inputs.

Warning:
    Kept inputs grow with depth: tokens × width × blocks (34 GB for 256 rows of 512 tokens in a 7B Llama in bf16, over
    all ranks); everything else is flat.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.data.collation import Batch
from harness.measurement import available_memory
from harness.memory import trim
from harness.models.calling import arguments
from harness.models.freezing import gradients_of_activations
from harness.models.sharing import input_groups
from harness.models.streaming import (
    Blocks,
    Call,
    SuspendedForward,
    Suspension,
    decoder_blocks,
    fill_around,
    loaded_in_turn,
    mapped,
    suspended,
    tensors_in,
)
from harness.models.weights import BaseWeights
from harness.statistics.collector import OF_INPUTS, Collector, Quantity, Tokens
from harness.statistics.loss import Labels, labelled_loss
from harness.statistics.reduction import Reduction
from harness.statistics.resident import means

PARKED_SHARE = 0.25  # hidden states that take more of the accelerator's free memory wait on the CPU

Found = tuple[int, Quantity, str, torch.Tensor, int]
Advance = Callable[[str], None]


@dataclass
class _Run:
    """One batch of one round on its way; ``kept``: of every block its arguments and its output, both as leaves."""

    round: int
    tokens: Tokens
    forward: SuspendedForward | None = None
    kept: dict[int, tuple[Call, list[torch.Tensor]]] = field(default_factory=dict)


def collect_streamed(
    model: PreTrainedModel,
    weights: BaseWeights,
    modules: Mapping[str, nn.Linear],
    rounds: Sequence[Sequence[Batch]],
    probe: Batch,
    kinds: Sequence[Quantity],
    labels: Labels,
    device: torch.device,
    reduction: Reduction,
    groups: dict[str, str],
    advance: Advance = lambda _: None,
) -> Iterator[Found]:
    """Collect ``kinds`` of every round in one sweep, or in two where gradients are wanted.

    Args:
        model: without weights, as `empty_model` makes it; it has none again at the end, except around its blocks.
        modules: target layers by name, all in decoder blocks.
        rounds: this rank's padded batches of each sampling round; a rank may have none.
        probe: one short row, the same on all ranks, in which layers that share an input are seen.
        groups: filled in, layer → first layer of its group, before a statistic of the layer is yielded.
        advance: called after every batch of every block with what is being done.

    Yields:
        round, kind, layer (of inputs: group), mean over tokens on ``device``, number of tokens; of what this rank owns,
        block by block.

    Raises:
        UserError: as `collect_resident` does, or the model cannot be run block by block.
    """
    blocks = decoder_blocks(model, list(modules))
    of_gradients = [kind for kind in kinds if kind not in OF_INPUTS]
    model.eval()
    fill_around(model, blocks, weights, device, head=bool(of_gradients))
    runs = [
        _Run(number, Tokens(place, batch, device, labels.objective))
        for number, batches in enumerate(rounds)
        for place, batch in enumerate(batches)
    ]
    own = blocks.holding(modules)
    deepest = max(place for place, names in enumerate(own) if names)
    inside = {name for names in own for name in names}
    around = _Around({name: m for name, m in modules.items() if name not in inside}, len(rounds), kinds, device)
    groups |= around.groups
    sweep = _Sweep(model, blocks, weights, device, runs, modules, own, around, len(rounds), reduction, advance)
    of_inputs = [kind for kind in kinds if kind in OF_INPUTS]
    if of_gradients:
        with gradients_of_activations(model):
            yield from sweep.forward(range(len(blocks.modules)), probe, of_inputs, groups, labels)
        first = 0 if around.groups else min(place for place, names in enumerate(own) if names)
        yield from sweep.backward(range(len(blocks.modules) - 1, first - 1, -1), of_gradients)
    else:
        yield from sweep.forward(range(deepest + 1), probe, of_inputs, groups, None)
    yield from around.found(reduction)


class _Around:
    """Target layers outside the blocks: a collector for each round, of which one at a time looks on."""

    def __init__(
        self, modules: Mapping[str, nn.Linear], rounds: int, kinds: Sequence[Quantity], device: torch.device
    ) -> None:
        self.groups = {name: name for name in modules}
        self._collectors = [Collector(modules, self.groups, kinds, device) for _ in range(rounds if modules else 0)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the block these layers report what passes through them."""
        with ExitStack() as stack:
            for collector in self._collectors:
                stack.enter_context(collector.attached())
            yield

    def begin(self, run: _Run | None) -> None:
        """What follows is the pass of ``run``, or of nothing that counts."""
        for number, collector in enumerate(self._collectors):
            collector.check()  # of the run before
            if run is not None and run.round == number:
                collector.begin(run.tokens)
            else:
                collector.pause()

    def follow(self, run: _Run) -> None:
        """What follows is the backward pass of ``run``."""
        for number, collector in enumerate(self._collectors):
            collector.check()
            if run.round == number:
                collector.follow(run.tokens)
            else:
                collector.pause()

    def found(self, reduction: Reduction) -> Iterator[Found]:
        """What `collect_streamed` yields, of these layers. Collective."""
        self.begin(None)
        for number, collector in enumerate(self._collectors):
            for found in means(collector, reduction):
                yield number, *found


@dataclass
class _Sweep:
    model: PreTrainedModel
    blocks: Blocks
    weights: BaseWeights
    device: torch.device
    runs: list[_Run]
    modules: Mapping[str, nn.Linear]
    own: list[list[str]]  # target layers of each block
    around: _Around
    rounds: int
    reduction: Reduction
    advance: Advance

    def forward(
        self,
        order: range,
        probe: Batch,
        kinds: Sequence[Quantity],
        groups: dict[str, str],
        labels: Labels | None,
    ) -> Iterator[Found]:
        """The blocks in ``order``; with ``labels``, norm, head and the loss's backward pass to the last block."""
        park = self._park(1 if labels is None else len(order))
        probe_tokens = Tokens(-1, probe, self.device)
        calls = [self._call(None, probe_tokens, None), *(self._call(run, run.tokens, labels) for run in self.runs)]
        with (
            self.around.attached(),
            suspended(self.blocks, calls, self.device) as suspension,
            closing(self._loaded(order)) as turns,
        ):
            self.around.begin(None)
            probing, *forwards = suspension.forwards
            for run, forward in zip(self.runs, forwards, strict=True):
                run.forward = forward
            for place in turns:
                last = place == order[-1]
                self._probe(suspension, probing, place, groups, last)
                for number in range(self.rounds):
                    collector = self._collector(place, kinds, groups)
                    with collector.attached():
                        for run in self._of(number):
                            self._run_forward(suspension, run, place, collector, park, labels is not None, last)
                            trim()
                            self.advance(self._doing(place))
                    if self.own[place] and kinds:
                        for found in means(collector, self.reduction):
                            yield number, *found

    @torch.no_grad()
    def _probe(
        self, suspension: Suspension, forward: SuspendedForward, place: int, groups: dict[str, str], last: bool
    ) -> None:
        call = suspension.standing(forward, place).mapped(lambda tensor: tensor.to(self.device))
        outputs = []
        own = {name: self.modules[name] for name in self.own[place]}
        groups |= input_groups(lambda: outputs.append(suspension.run(call)), own, {})
        forward.end() if last else forward.resume(outputs.pop())

    def _run_forward(
        self,
        suspension: Suspension,
        run: _Run,
        place: int,
        collector: Collector,
        park: torch.device,
        keep: bool,
        last: bool,
    ) -> None:
        assert run.forward is not None
        arrived = suspension.standing(run.forward, place)
        collector.begin(run.tokens)
        with torch.no_grad():
            output = suspension.run(arrived.mapped(lambda tensor: tensor.detach().to(self.device)))
        collector.check()
        if not keep:
            del arrived
            run.forward.end() if last else run.forward.resume(mapped(output, lambda tensor: tensor.to(park)))
            return
        where = self.device if last else park
        output = mapped(output, lambda tensor: _leaf(tensor, where))
        run.kept[place] = (arrived, [tensor for tensor in tensors_in(output) if tensor.requires_grad])
        run.forward.resume(output)

    def backward(self, order: range, kinds: Sequence[Quantity]) -> Iterator[Found]:
        """The blocks in ``order``, from the kept arguments and the gradients at the outputs."""
        groups = {name: name for name in self.modules}
        # The suspension is over: blocks have their own forward again.
        with closing(self._loaded(order)) as turns:
            for place in turns:
                for number in range(self.rounds):
                    collector = self._collector(place, kinds, groups)
                    with collector.attached():
                        for run in self._of(number):
                            collector.begin(run.tokens)
                            self.around.follow(run)
                            self._run_backward(run, place, onward=place != order[-1] or bool(self.around.groups))
                            collector.check()
                            trim()
                            self.advance(self._doing(place, "gradients, "))
                    if self.own[place]:
                        for found in means(collector, self.reduction):
                            yield number, *found

    @torch.enable_grad()
    def _run_backward(self, run: _Run, place: int, onward: bool) -> None:
        arrived, leaves = run.kept.pop(place)
        given: list[tuple[torch.Tensor, torch.Tensor]] = []  # what arrived and can carry a gradient, and its stand-in

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            own = tensor.detach().to(self.device)
            if tensor.requires_grad:
                given.append((tensor, own.requires_grad_()))
            return own

        call = arrived.mapped(stand_in)
        output = self.blocks.modules[place].forward(*call.args, **call.kwargs)
        with_gradient = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        pairs = [
            (tensor, leaf.grad.to(self.device))
            for tensor, leaf in zip(with_gradient, leaves, strict=True)
            if leaf.grad is not None and tensor.requires_grad
        ]
        for leaf in leaves:
            leaf.grad = None
        del output, with_gradient
        if not pairs:  # nothing of the loss comes through here
            return
        torch.autograd.backward(*zip(*pairs, strict=True))
        pushed = [(tensor, own.grad.to(tensor.device)) for tensor, own in given if own.grad is not None]
        if onward and pushed:
            # A graph between blocks may be common to several of them.
            torch.autograd.backward(*zip(*pushed, strict=True), retain_graph=True)

    def _call(self, run: _Run | None, tokens: Tokens, labels: Labels | None) -> Callable[[], None]:
        def without_loss() -> None:
            self.around.begin(run)
            self._forward(tokens)

        def with_loss() -> None:
            self.around.begin(run)
            assert labels is not None
            with torch.enable_grad():
                inputs = tokens.inputs()
                logits = labels.objective.logits(self.model(**arguments(self.model, inputs)), inputs)
                labelled_loss(logits, tokens, labels).backward()

        return without_loss if labels is None else with_loss

    @torch.no_grad()
    def _forward(self, tokens: Tokens) -> None:
        self.model(**arguments(self.model, tokens.inputs()))

    def _loaded(self, order: range) -> Iterator[int]:
        return loaded_in_turn(self.blocks, order, self.weights, self.device)

    def _collector(self, place: int, kinds: Sequence[Quantity], groups: Mapping[str, str]) -> Collector:
        return Collector({name: self.modules[name] for name in self.own[place]}, groups, kinds, self.device)

    def _of(self, number: int) -> list[_Run]:
        return [run for run in self.runs if run.round == number]

    def _doing(self, place: int, what: str = "") -> str:
        return f"{what}block {place + 1}/{len(self.blocks.modules)}"

    def _park(self, copies: int) -> torch.device:
        """Where hidden states wait for their block's turn. Those of images may have any size: they wait on the CPU."""
        places = [run.tokens.places for run in self.runs]
        if self.device.type == "cpu" or None in places:
            return torch.device("cpu")
        width = self.model.get_input_embeddings().weight
        needed = sum(places) * width.shape[-1] * width.element_size() * copies
        return self.device if needed <= PARKED_SHARE * available_memory(self.device) else torch.device("cpu")


def _leaf(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """The tensor by itself; where it has numbers that a gradient can be of, a leaf that gathers it."""
    own = tensor.detach().to(where)
    return own.requires_grad_() if own.is_floating_point() else own
