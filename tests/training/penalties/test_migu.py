"""MIGU's masks against loops, which outputs count, and what of a gradient is left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.adapters.lora import lora_layers
from harness.config import resolve
from harness.data.collation import collate, stack
from harness.data.tokenisation import Row
from harness.errors import UserError
from harness.tasks.objectives import NEXT_TOKEN
from harness.training.gradients import scale_gradient
from harness.training.penalties.base import MicroStep, Needs, PenaltySetup
from harness.training.penalties.migu import MIGU, MIGUOptions, largest
from harness.training.penalties.registry import build_penalty
from tests.statistics.direct_curvature import adapted, labelled_rows

PAD = 2
ROWS = [row for row in labelled_rows(12) if len(row.input_ids) > 3]


def migu(model: nn.Module, **options: Any) -> MIGU:
    penalty = MIGU(MIGUOptions(**options), PenaltySetup([], PAD, 0))
    penalty.attach(model)
    return penalty


def one_pass(model: nn.Module, penalty: MIGU, rows: list[Row], at: MicroStep, riding: list[Row] | None = None) -> None:
    """Forward and backward, with rows of some other penalty below the batch's own."""
    batch = collate(rows, PAD)
    whole = batch if riding is None else stack(batch, collate(riding, PAD), PAD)
    penalty.before(model, at, None, batch)
    with torch.no_grad():  # the original model's pass, say
        model(input_ids=torch.tensor([[3, 4, 5]]))
    logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
    assert penalty.penalty(model, at, None, None, None) is None
    NEXT_TOKEN.loss(logits[: len(rows)], batch["labels"]).backward()


def naive(model: nn.Module, rows: list[Row], outputs: str) -> dict[str, torch.Tensor]:
    """Mean |output| over all tokens, row by row without padding."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, output: torch.Tensor) -> None:
        for token in output[0]:
            sums[name] = sums.get(name, 0) + token.abs()

    handles = []
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        for side, module in (("A", A), ("B", layer if outputs == "layer" else B)):
            handles.append(module.register_forward_hook(lambda _, given, out, key=f"{name}.lora_{side}": add(key, out)))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    return {name: total / sum(len(row.input_ids) for row in rows) for name, total in sums.items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_{side}": getattr(layer, f"lora_{side}")["default"].weight.grad.clone()
        for name, layer in lora_layers(model).items()
        for side in "AB"
    }


@pytest.mark.parametrize("outputs", ["layer", "adapter"])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_rows_of_small_outputs_get_no_gradient(random_base: Path, outputs: str, threshold: float) -> None:
    """Two uneven passes, riding rows and a pass of the original model between: the mask is that of the batch alone."""
    plain = adapted(random_base)
    idle = migu(plain, threshold=threshold)
    one_pass(plain, idle, ROWS, MicroStep(0, 0, 1))
    whole = gradients(plain)

    model = adapted(random_base)
    penalty = migu(model, threshold=threshold, outputs=outputs)
    one_pass(model, penalty, ROWS[:2], MicroStep(0, 0, 2), riding=labelled_rows(3, seed=8))
    one_pass(model, penalty, ROWS[2:], MicroStep(0, 1, 2))
    penalty.before_step(model, 1)
    masked = gradients(model)

    magnitudes = naive(adapted(random_base), ROWS, outputs)
    assert masked.keys() == magnitudes.keys() and len(masked) == 28
    for name, values in magnitudes.items():
        count = len(values)
        smallest = sorted(range(count), key=lambda i, values=values: float(values[i]))[: int(threshold * count)]
        kept = torch.ones(count, 1, dtype=torch.float64)
        kept[smallest] = 0.0
        assert torch.allclose(masked[name], whole[name] * kept, rtol=1e-6, atol=1e-9)
        assert not masked[name][smallest].any()


def test_every_step_counts_anew(random_base: Path) -> None:
    """A second step is masked by its own batch, not by what came before."""
    found = []
    for passes in ([ROWS[:2], ROWS[2:5]], [ROWS[2:5]]):
        model = adapted(random_base)
        penalty = migu(model)
        for step, rows in enumerate(passes):
            model.zero_grad()
            one_pass(model, penalty, rows, MicroStep(step, 0, 1))
            penalty.before_step(model, step + 1)
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_checkpointing_counts_once(random_base: Path) -> None:
    """Recomputed forward passes add nothing."""
    found = []
    for checkpointing in (False, True):
        model = adapted(random_base)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        penalty = migu(model)
        one_pass(model, penalty, ROWS, MicroStep(0, 0, 1))
        found.append({name: total.clone() for name, total in penalty._sums.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_zero_b_is_masked_by_the_layer_and_not_by_itself(random_base: Path) -> None:
    for outputs, share in (("layer", 0.3), ("adapter", 1.0)):
        model = adapted(random_base, zero_b=True)
        penalty = migu(model, outputs=outputs)
        one_pass(model, penalty, ROWS, MicroStep(0, 0, 1))
        penalty.before_step(model, 1)
        for name, gradient in gradients(model).items():
            if name.endswith("B"):
                assert float(gradient.any(1).float().mean()) == pytest.approx(share, abs=0.02)


LARGEST = [
    ([1.0, 4.0, 2.0, 3.0], 0.5, [1, 3]),
    ([1.0, 4.0, 2.0, 3.0], 0.0, [0, 1, 2, 3]),
    ([1.0, 4.0, 2.0, 3.0], 0.99, [1]),
    ([float(n) for n in range(10)], 0.7, [7, 8, 9]),
    ([0.0, 0.0, 0.0], 0.7, [0, 1, 2]),
    ([1.0, 2.0, 2.0, 3.0], 0.5, [1, 2, 3]),
    ([5.0], 0.9, [0]),
]


@pytest.mark.parametrize(("values", "threshold", "kept"), LARGEST)
def test_largest(values: list[float], threshold: float, kept: list[int]) -> None:
    assert largest(torch.tensor(values), threshold).nonzero().flatten().tolist() == kept


def test_scaling_a_gradient() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.arange(6.0).view(3, 2)
    scale_gradient(parameter, torch.tensor([[1.0], [0.0], [2.0]]))
    assert parameter.grad.tolist() == [[0.0, 1.0], [0.0, 0.0], [8.0, 10.0]]


def test_configuration(base_config: dict[str, Any]) -> None:
    config = resolve({**base_config, "penalties": [{"name": "migu"}]})
    assert config.penalties == [{"name": "migu", "threshold": 0.7, "outputs": "layer"}]
    assert MIGU.needs(MIGUOptions()) == Needs(adapter=True)
    for threshold, weight in ((0.7, 1.0), (0, 0.0)):
        entry = {"name": "migu", "threshold": threshold}
        assert build_penalty(entry, PenaltySetup([], PAD, 0)).weight == weight


BAD = [
    ({"threshold": 1.0}, r"^penalties\.0\.threshold: 1\.0 given; allowed: less than 1$"),
    ({"threshold": -0.1}, r"^penalties\.0\.threshold: -0\.1 given; allowed: greater than or equal to 0$"),
    ({"treshold": 0.5}, r"^penalties\.0\.treshold: unknown key .*did you mean 'threshold'\?$"),
    ({"outputs": "layers"}, r"^penalties\.0\.outputs: 'layers' given; .*did you mean 'layer'\?$"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_values(base_config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve({**base_config, "penalties": [{"name": "migu", **options}]})
