"""spectrum: singular values of layers under plain SVD, ASVD and CO-SVD (CorDA++, Fig. 3 and 9).

The three scale W differently, so each curve is divided by its largest value. The sum of a curve is then the sum of
CorDA++ Eq. 7, Σ σ_i / σ_max: small where the spectrum is concentrated in its top components.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness.analysis.decompositions import asvd_factor, identity_factor
from harness.analysis.figures import spectrum_figure
from harness.analysis.inputs import choose_layers, configured, given, load_base, short_names
from harness.config import RunConfig
from harness.console import progress
from harness.decomposition.context_svd import damped, singular_values
from harness.files import write_bytes, write_json
from harness.preflight import check_inputs
from harness.statistics.covariance import collect_input_covariance
from harness.statistics.mean_absolute import collect_mean_absolute_input
from harness.tasks.registry import load_task

METHODS = ("plain SVD", "ASVD", "CO-SVD")


def spectrum(
    config: RunConfig,
    out: Path,
    *,
    layers: Sequence[str] | None = None,
    data: str | None = None,
    samples: int | None = None,
    alpha: float = 0.5,
    damping: float = 0.01,
) -> list[Path]:
    """Write ``spectrum.png`` and ``spectrum.json`` to ``out`` and return their paths.

    Args:
        layers: target layers or parts of their names; by default the first block.
        data: ``FILE:COLUMN`` to take statistics from; by default the configuration's preserve set.
        samples: rows drawn; by default the data set's own ``samples``.
        alpha: ASVD's exponent.
        damping: C̃ = C + ``damping`` · mean(diag C) · I.

    Raises:
        UserError: no such layer, no data, or unreadable data.
    """
    check_inputs(config)
    texts = configured(config, "preserve", samples) if data is None else given(data, samples)
    task = load_task(config)
    rows = texts.rows(task)
    base = load_base(task)
    names = choose_layers(list(base.modules), layers)
    groups = base.groups(names, rows[0])
    covariances = base.collect(collect_input_covariance, groups, rows, "covariance")
    magnitudes = base.collect(collect_mean_absolute_input, groups, rows, "mean |x|")

    found: dict[str, dict[str, list[float]]] = {}
    with torch.no_grad():
        for name in progress(names, "singular values"):
            W = base.modules[name].weight
            factors = {
                "plain SVD": identity_factor(W),
                "ASVD": asvd_factor(magnitudes[name].to(W.device), alpha),
                "CO-SVD": damped(covariances[name].matrix.to(W.device), damping),
            }
            found[name] = {method: singular_values(W, factors[method], "svd").tolist() for method in METHODS}

    content: dict[str, Any] = {
        "model": config.model.path,
        "data": texts.record() | {"tokens": covariances[names[0]].tokens},
        "alpha": alpha,
        "damping": damping,
        "layers": {
            name: {
                method: {"singular_values": values, "sum_over_largest": sum(values) / values[0] if values[0] else None}
                for method, values in methods.items()
            }
            for name, methods in found.items()
        },
    }
    prefix, short = short_names(names)
    curves = dict(zip(short, found.values(), strict=True))
    files = [out / "spectrum.png", out / "spectrum.json"]
    write_bytes(files[0], spectrum_figure(prefix, curves))
    write_json(files[1], content)
    return files
