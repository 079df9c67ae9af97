"""Training parameters of the base itself, with the original ones beside them.

`keep_initial` gives every module a frozen twin of each of its trained parameters. Inside `initial_parameters` the two
have exchanged their names, so that the module computes with the twin. Nothing is copied or gathered for that: the
module owns the same parameters as before, which is all that ZeRO-3 looks at.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from harness.adapters.partitioned import gathered
from harness.config import nearest
from harness.errors import UserError

_TWIN = "initial_"


def train_in_full(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Make the parameters of the modules of these names (or last parts of names) trainable; the modules.

    Raises:
        UserError: there is no such module, or it has nothing to train.
    """
    chosen = []
    for name in names:
        found = [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}")]
        parameters = [p for module in found for p in module.parameters() if p.is_floating_point()]
        if not parameters:
            known = sorted(
                {n.rpartition(".")[2] for n, m in model.named_modules() if list(m.parameters(recurse=False))}
            )
            raise UserError(
                f"model.modules_to_save: {name!r} is no module with weights; there are {', '.join(known)}"
                f"{nearest(name, known)}"
            )
        for parameter in parameters:
            parameter.requires_grad_(True)
        chosen += found
    return chosen


def keep_initial(model: nn.Module) -> None:
    """Give every trained parameter a frozen twin with its present value. Collective under ZeRO-3."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                with gathered([parameter]):
                    twin = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module.register_parameter(_TWIN + name, twin)


def has_initial(model: nn.Module) -> bool:
    """Whether `keep_initial` kept anything."""
    return any(name.startswith(_TWIN) for module in model.modules() for name in module._parameters.keys())  # noqa: SIM118


@contextmanager
def initial_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes with the parameters that `keep_initial` kept.

    Raises:
        ValueError: it kept none.
    """
    # `.keys()` and `.get`: reading an entry by index makes ZeRO-3 gather it.
    pairs = [
        (module._parameters, name)
        for module in model.modules()
        for name in list(module._parameters.keys())
        if _TWIN + name in module._parameters.keys()  # noqa: SIM118
    ]
    if not pairs:
        raise ValueError("no parameter was kept")

    def exchange() -> None:
        for own, name in pairs:
            trained, twin = own.get(name), own.get(_TWIN + name)
            own[name], own[_TWIN + name] = twin, trained

    exchange()
    try:
        yield
    finally:
        exchange()
