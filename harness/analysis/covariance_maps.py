"""covariance: heat maps of input covariances on several data sets (CorDA++, Fig. 1 and 10).

The paper down-samples each map to 32 × 32 without saying how. Here a cell is the mean of |C_ij| over its block, or,
with ``reduce="max"``, the largest |C_ij|: single outlier channels then stand out more, and the rest less. Colours are
logarithmic, on one scale for all data sets of a layer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from harness.analysis.figures import covariance_figure
from harness.analysis.inputs import DataSet, choose_layers, configured, given, load_base, short_names
from harness.config import RunConfig
from harness.errors import UserError
from harness.files import write_bytes, write_json
from harness.preflight import check_inputs
from harness.statistics.covariance import collect_input_covariance
from harness.tasks.registry import load_task

SIZE = 32


def covariance(
    config: RunConfig,
    out: Path,
    *,
    layers: Sequence[str] | None = None,
    data: Sequence[str] = (),
    samples: int | None = None,
    reduce: Literal["mean", "max"] = "mean",
) -> list[Path]:
    """Write ``covariance.png`` and ``covariance.json`` to ``out`` and return their paths.

    Args:
        layers: target layers or parts of their names, by default the first block; one map per distinct input.
        data: ``FILE:COLUMN`` of further data sets beside the configuration's train and preserve sets.
        samples: rows drawn from each; by default the data set's own ``samples``.
        reduce: what a cell says of its block.

    Raises:
        UserError: no such layer, fewer than two data sets, or unreadable data.
    """
    check_inputs(config)
    sets = _data_sets(config, data, samples)
    task = load_task(config)
    rows = [texts.rows(task) for texts in sets]
    base = load_base(task)
    groups = base.groups(choose_layers(list(base.modules), layers), rows[0][0])
    firsts = list(dict.fromkeys(groups.values()))

    maps: dict[str, list[torch.Tensor]] = {name: [] for name in firsts}
    tokens = []
    for texts, sampled in zip(sets, rows, strict=True):
        own = {name: name for name in firsts}
        found = base.collect(collect_input_covariance, own, sampled, f"covariance ({texts.label})")
        tokens.append(found[firsts[0]].tokens)
        for name in firsts:
            maps[name].append(downsample(found[name].matrix, SIZE, reduce))

    content: dict[str, Any] = {
        "model": config.model.path,
        "data": [texts.record() | {"tokens": count} for texts, count in zip(sets, tokens, strict=True)],
        "reduce": reduce,
        "layers": {
            name: {
                "read_by": [other for other, group in groups.items() if group == name],
                "correlation": log_correlation(maps[name]).tolist(),
                "maps": [cells.tolist() for cells in maps[name]],
            }
            for name in firsts
        },
    }
    prefix, names = short_names(list(groups))
    short = dict(zip(groups, names, strict=True))
    titles = {name: [short[other] for other, group in groups.items() if group == name] for name in firsts}
    files = [out / "covariance.png", out / "covariance.json"]
    write_bytes(files[0], covariance_figure(prefix, [texts.label for texts in sets], titles, maps))
    write_json(files[1], content)
    return files


def downsample(matrix: torch.Tensor, size: int, reduce: Literal["mean", "max"]) -> torch.Tensor:
    """|C| in ``size`` × ``size`` cells, float64; a matrix that is smaller stays as it is.

    Cell i covers the channels from ⌊i·d/size⌋ to ⌈(i+1)·d/size⌉: equal blocks where ``size`` divides d.
    """
    absolute = matrix.double().abs()[None]
    size = min(size, matrix.shape[0])
    pool = torch.nn.functional.adaptive_avg_pool2d if reduce == "mean" else torch.nn.functional.adaptive_max_pool2d
    return pool(absolute, size)[0]


def log_correlation(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pearson correlation of the logarithms of maps of one layer, (sets, sets): 1 where two patterns are the same.

    Cells of zero count as the smallest positive cell; a map without any contrast correlates with nothing (0).
    """
    cells = torch.stack([cells.double().flatten() for cells in maps])
    positive = cells[cells > 0]
    logs = cells.clamp_min(positive.min() if len(positive) else 1.0).log10()
    centred = logs - logs.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    return (centred @ centred.T) / (norms[:, None] * norms[None, :]).clamp_min(1e-300)


def _data_sets(config: RunConfig, data: Sequence[str], samples: int | None) -> list[DataSet]:
    if config.data.preserve is None and not data:
        raise UserError("data.preserve: missing; covariance compares data sets: add one, or give --data FILE:COLUMN")
    sets = [configured(config, "train", samples)]
    if config.data.preserve is not None:
        sets.append(configured(config, "preserve", samples))
    return sets + [given(argument, samples) for argument in data]
