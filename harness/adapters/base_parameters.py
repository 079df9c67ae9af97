"""Training parameters of the base itself, with the original ones beside them.

`keep_initial` gives every module a frozen twin of each of its trained parameters. Inside `initial_parameters` the two
have exchanged their names, so that the module computes with the twin. Nothing is copied or gathered for that: the
module owns the same parameters as before, which is all that ZeRO-3 looks at.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from harness.adapters.partitioned import gathered

_TWIN = "initial_"


def keep_initial(model: nn.Module) -> None:
    """Give every trained parameter a frozen twin with its present value. Collective under ZeRO-3."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                with gathered([parameter]):
                    twin = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module.register_parameter(_TWIN + name, twin)


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
