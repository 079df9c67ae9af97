"""What `init` will cost, before anything is loaded: owner, memory and time class of every layer.

Costs are counted from shapes; seconds come from two small float64 computations timed on the spot, so they are good for
a class (under a second, minutes), not for a promise.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from harness.config import RunConfig
from harness.measurement import available_memory, in_words
from harness.methods.base import Method
from harness.methods.registry import build_method
from harness.models.targets import Layer, adapted_modules, describe
from harness.models.weights import empty_model
from harness.stages.side_by_side import layers_at_a_time
from harness.training.distributed import training_device
from harness.training.ownership import assign_by_cost

TIME_CLASSES = ((1.0, "under 1 s"), (10.0, "1 to 10 s"), (60.0, "10 s to 1 min"), (600.0, "1 to 10 min"))
_MEGA = 1e6


@dataclass(frozen=True)
class LayerCost:
    """Multiplications in matrix ``products`` and in an ``eigen`` decomposition; most ``bytes`` held at a time."""

    products: float
    eigen: float
    bytes: int

    @property
    def total(self) -> float:
        """One number to share layers out by."""
        return self.products + self.eigen

    @property
    def on_cpu(self) -> float:
        """One number for the time on a core, where an eigendecomposition's 9 n³ are done three times as fast."""
        return self.products + self.eigen / 3


def layer_cost(method: Method, layer: Layer, dtype: torch.dtype = torch.float32) -> LayerCost:
    """What initialising one layer takes: float64 inside, from a weight in ``dtype``.

    With n the smaller side: the products with a covariance, the n×n Gram matrix, and its eigendecomposition, counted
    as 9 n³. At the fullest moment there are, besides weight and covariance as stored, in float64 the weight, the
    covariance twice, W·C̃, the Gram matrix, its eigenvectors and their work space.
    """
    elements = math.prod(layer.shape)
    rows, columns = layer.out_features, elements // layer.out_features
    held = elements * dtype.itemsize
    if not method.decomposes:
        return LayerCost(elements, 0, held)
    smaller, larger = sorted((rows, columns))
    covariance = columns**2 if method.statistics() is not None else 0
    products = larger * smaller**2 + rows * covariance
    doubles = 2 * elements + 2 * covariance + 4 * smaller**2
    return LayerCost(products, 9 * smaller**3, held + 4 * covariance + 8 * doubles)


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, the rank that owns it, and what it takes there."""

    layer: Layer
    owner: int
    bytes: int
    seconds: float


def plan_layers(config: RunConfig, ranks: int) -> list[PlannedLayer]:
    """Every target layer in the model's order; no weight is read.

    Raises:
        UserError: the model cannot be described, or a target matches no layer.
    """
    method = build_method(config.method, config.train.seed, config.model)
    modules = adapted_modules(empty_model(config.model), config.model, method.adapts_convolutions)
    layers = describe(modules)
    costs = [layer_cost(method, layer, getattr(torch, config.model.dtype)) for layer in layers]
    owners = assign_by_cost([cost.total for cost in costs], ranks)
    product_rate, eigen_rate = _rates(training_device()) if method.decomposes else (math.inf, math.inf)
    return [
        PlannedLayer(layer, owner, cost.bytes, cost.products / product_rate + cost.eigen / eigen_rate)
        for layer, owner, cost in zip(layers, owners, costs, strict=True)
    ]


def print_plan(config: RunConfig, ranks: int) -> None:
    """The plan as a table on standard output, and each rank's sum."""
    planned = plan_layers(config, ranks)
    table = Table(
        "layer", "shape", "rank that owns it", "memory", "time", title=f"init of {config.name}, {ranks} ranks"
    )
    for own in planned:
        shape = "×".join(map(str, own.layer.shape))
        table.add_row(own.layer.name, shape, f"rank {own.owner}", in_words(own.bytes), time_class(own.seconds))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=120, highlight=False)
    console.print(table)
    device = training_device()
    for owner in range(ranks):
        mine = [own for own in planned if own.owner == owner]
        if mine:
            sizes = sorted((own.bytes for own in mine), reverse=True)
            at_a_time = layers_at_a_time(device, sizes, available_memory(device) // ranks)
            together = "a layer" if at_a_time == 1 else f"{at_a_time} layers at a time"
            console.print(
                f"rank {owner}: {len(mine)} layers, {time_class(sum(own.seconds for own in mine))} in all, at most "
                f"{in_words(sum(sizes[:at_a_time]))} for {together} and the weight of the next"
            )
    weights = sum(math.prod(own.layer.shape) for own in planned)
    console.print(
        f"{len(planned)} layers of {weights / _MEGA:,.1f} million weights; nothing was loaded. "
        "Without --dry-run the same command does it."
    )


def time_class(seconds: float) -> str:
    """How long ``seconds`` are, in words."""
    return next((words for limit, words in TIME_CLASSES if seconds < limit), "over 10 min")


def _rates(device: torch.device) -> tuple[float, float]:
    """Multiplications a second in a float64 product and in a float64 eigendecomposition (9 n³) on ``device``."""
    n = 512
    matrix = torch.randn(n, n, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(0))
    gram = matrix @ matrix.T
    torch.linalg.eigh(gram)  # libraries set themselves up at the first call

    def rate(count: float, compute: Callable[[], torch.Tensor]) -> float:
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            compute().sum().item()  # waits for an accelerator
            best = min(best, time.perf_counter() - began)
        return count / best

    return rate(n**3, lambda: gram @ matrix), rate(9 * n**3, lambda: torch.linalg.eigh(gram)[0])
