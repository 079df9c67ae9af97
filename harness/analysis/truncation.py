"""truncation: perplexity after every target layer lost its smallest components (CorDA++, Fig. 4, Fig. 5, Table X).

Plain SVD, ASVD and CO-SVD discard the same r components of every layer. CO-SVD+ discards as many *parameters*, a
component of a layer costing in + out, but shares them out by dynamic rank allocation (Algorithm 2 in its KPM form: what
KPM would adapt is discarded). CO-SVD++ first selects each layer's covariance among several sampling rounds (Algorithm
1).

Statistics come from calibration rows, perplexity from held-out rows whose text is in no calibration row.

Perplexity is exp of the mean next-token loss over all real tokens of the held-out rows, prompt and response alike.
Every row is a text of its own, cut at ``data.max_length``; published figures for Wikitext-2 and PTB join rows to
windows of 2,048 tokens instead.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.analysis.decompositions import asvd_factor, discard, identity_factor
from harness.analysis.figures import truncation_figure
from harness.analysis.inputs import Base, DataSet, configured, given, load_base
from harness.config import RunConfig
from harness.console import progress, say
from harness.data.sampling import sample
from harness.data.sources import Example
from harness.data.tokenisation import Row
from harness.decomposition.compactness import log_compactness, selection_score
from harness.decomposition.context_svd import context_svd, damped
from harness.decomposition.rank_allocation import Spectrum, allocate_ranks
from harness.errors import UserError
from harness.files import write_bytes, write_json, write_text
from harness.models.targets import Layer, describe
from harness.preflight import check_inputs
from harness.stages.calibrate import BATCH_ROWS
from harness.statistics.covariance import collect_input_covariance
from harness.statistics.mean_absolute import collect_mean_absolute_input
from harness.tasks.registry import load_task
from harness.training.preserve import token_means

MOST_DISCARDS = 8


@dataclass(frozen=True)
class Components:
    """One layer decomposed: ``U`` (out, R), fp32, on the CPU; ``sigma`` (R,), float64; for CO-SVD log π and Eq. 7."""

    U: torch.Tensor
    sigma: torch.Tensor
    log_pi: float = 0.0
    score: float = 0.0
    sampling_round: int = 0


def truncation(
    config: RunConfig,
    out: Path,
    *,
    data: str | None = None,
    calibrate_on: str | None = None,
    discards: Sequence[int] | None = None,
    samples: int | None = None,
    test_rows: int = 256,
    rounds: int = 5,
    alpha: float = 0.5,
    damping: float = 0.01,
) -> list[Path]:
    """Write ``truncation.png``, ``truncation.json`` and ``truncation.md`` to ``out`` and return their paths.

    Args:
        data: ``FILE:COLUMN`` to measure perplexity on; by default the configuration's preserve set.
        calibrate_on: ``FILE:COLUMN`` to take statistics from; by default the rows of ``data`` that are not held out.
        discards: r, components to discard per layer; by default the largest `MOST_DISCARDS` powers of two up to half
            the smallest side of any target layer.
        samples: calibration rows of one sampling round; by default the data set's own ``samples``.
        test_rows: rows held out for perplexity; at most half of all where both come from one data set.
        rounds: sampling rounds that CO-SVD++ selects from; 1 leaves CO-SVD++ out.
        alpha: ASVD's exponent.
        damping: C̃ = C + ``damping`` · mean(diag C) · I.

    Raises:
        UserError: no data, unreadable or too little data, or an r that some layer has no room for.
    """
    check_inputs(config)
    texts = configured(config, "preserve", samples) if data is None else given(data, samples)
    calibration = texts if calibrate_on is None else given(calibrate_on, samples, "--calibrate-on")
    pool, test = held_out(calibration, texts, test_rows, config.train.seed)
    if rounds > 1 and calibration.source.samples >= len(pool):
        say(
            f"warning: samples: {calibration.source.samples} of {len(pool)} calibration rows, so all {rounds} sampling "
            "rounds draw the same rows and CO-SVD++ selects nothing; give --samples"
        )
    task = load_task(config)
    rounds_of_rows = [calibration.rows(task, number, pool) for number in range(rounds)]
    test_tokens = _language_rows(task.rows(test), texts.key)
    base = load_base(task)
    layers = describe(base.modules)
    discards = _checked(discards, layers)

    study = _Study(base, test_tokens, layers, discards, alpha, damping)
    results = study.run(rounds_of_rows)
    content: dict[str, Any] = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "seed": config.train.seed,
        "alpha": alpha,
        "damping": damping,
        "calibration": calibration.record() | {"rows": len(pool), "rounds": rounds},
        "test": texts.record()
        | {"rows": len(test_tokens), "predicted_tokens": sum(len(row.input_ids) - 1 for row in test_tokens)},
        "layers": len(layers),
        "component_parameters": sum(min(x.in_features, x.out_features) * _cost(x) for x in layers),
        "weight_parameters": sum(x.in_features * x.out_features for x in layers),
    } | results
    shares = [_uniform_parameters(layers, r) / content["component_parameters"] for r in (0, *discards)]
    curves = {
        method: [results["base"]["perplexity"], *(point["perplexity"] for point in entry["points"])]
        for method, entry in results["methods"].items()
    }
    files = [out / "truncation.png", out / "truncation.json", out / "truncation.md"]
    write_bytes(files[0], truncation_figure(results["base"]["perplexity"], [0, *discards], shares, curves))
    write_json(files[1], content)
    write_text(files[2], markdown([0, *discards], shares, curves))
    return files


def held_out(calibration: DataSet, texts: DataSet, test_rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Distinct calibration rows, and rows of ``texts`` for perplexity that are not among them, drawn by ``seed``.

    Raises:
        UserError: there are too few distinct rows to hold any out.
    """
    distinct = list(dict.fromkeys(texts.examples))
    if calibration is texts:
        if len(distinct) < 2:
            raise UserError(
                f"{texts.key}: {len(distinct)} distinct row in {texts.source.path}; perplexity needs rows that "
                "calibration has not seen: give more, or --calibrate-on another file"
            )
        test = sample(distinct, min(test_rows, len(distinct) // 2), "analyse", "held out", seed)
        chosen = set(test)
        return [example for example in distinct if example not in chosen], test
    pool = list(dict.fromkeys(calibration.examples))
    seen = set(pool)
    unseen = [example for example in distinct if example not in seen]
    if not unseen:
        raise UserError(f"--calibrate-on: every row of {texts.source.path} is in it too; nothing is left to hold out")
    return pool, sample(unseen, test_rows, "analyse", "held out", seed)


def default_discards(smallest_side: int) -> list[int]:
    """The largest `MOST_DISCARDS` powers of two up to half of ``smallest_side``, ascending."""
    powers = [2**k for k in range(smallest_side.bit_length()) if 2**k <= smallest_side // 2]
    return powers[-MOST_DISCARDS:]


def markdown(discards: Sequence[int], shares: Sequence[float], curves: Mapping[str, Sequence[float | None]]) -> str:
    """Table X's form: a row per method, a column per r."""
    lines = [
        "| components discarded per layer | " + " | ".join(map(str, discards)) + " |",
        "|---|" + "---:|" * len(discards),
        "| share of all components' parameters | " + " | ".join(f"{100 * share:.3g} %" for share in shares) + " |",
    ]
    for method, values in curves.items():
        cells = ["not finite" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class _Study:
    """The base under every method and every number of discarded components, one method at a time.

    Besides the model it holds a copy of the target weights and one method's left singular vectors, both on the CPU.
    """

    def __init__(
        self,
        base: Base,
        test: Sequence[Row],
        layers: Sequence[Layer],
        discards: Sequence[int],
        alpha: float,
        damping: float,
    ) -> None:
        self._base, self._test, self._layers, self._discards = base, test, layers, discards
        self._alpha, self._damping = alpha, damping
        self._weights = {name: module.weight.detach().cpu().clone() for name, module in base.modules.items()}
        self._methods: dict[str, dict[str, Any]] = {}

    def run(self, rounds_of_rows: Sequence[Sequence[Row]]) -> dict[str, Any]:
        base = self._point()
        if base["perplexity"] is None:
            raise UserError("model.dtype: the base itself has no finite loss on these rows; try model.dtype=float32")
        groups = self._base.groups(list(self._weights), rounds_of_rows[0][0])
        self._uniform("plain SVD", self._decompose("plain SVD", lambda _, W: identity_factor(W)))
        magnitudes = self._base.collect(collect_mean_absolute_input, groups, rounds_of_rows[0], "mean |x|")
        self._uniform("ASVD", self._decompose("ASVD", lambda name, _: asvd_factor(magnitudes[name], self._alpha)))

        best: dict[str, Components] = {}
        tokens = []
        for number, rows in enumerate(rounds_of_rows):
            title = f"covariance {number + 1}/{len(rounds_of_rows)}"
            covariances = self._base.collect(collect_input_covariance, groups, rows, title)
            tokens.append(next(iter(covariances.values())).tokens)
            for layer in progress(self._layers, f"CO-SVD {number + 1}/{len(rounds_of_rows)}"):
                C = damped(covariances[layer.name].matrix.to(self._base.device), self._damping)
                found = self._context(layer, C, number)
                if number == 0 or found.score < best[layer.name].score:  # Eq. 8
                    best[layer.name] = found
            if number == 0:
                self._uniform("CO-SVD", best)
                self._allocated("CO-SVD+", best)
        if len(rounds_of_rows) > 1:
            self._allocated("CO-SVD++", best)
            self._methods["CO-SVD++"]["selected_round"] = {name: found.sampling_round for name, found in best.items()}
        return {"calibration_tokens": tokens, "base": base, "methods": self._methods}

    def _decompose(self, title: str, factor: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, Components]:
        found = {}
        for layer in progress(self._layers, title):
            W = self._weights[layer.name].to(self._base.device)
            found[layer.name] = _components(W, factor(layer.name, W).to(self._base.device))
        return found

    def _context(self, layer: Layer, C_damped: torch.Tensor, sampling_round: int) -> Components:
        found = _components(self._weights[layer.name].to(self._base.device), C_damped)
        log_pi = log_compactness(C_damped, layer.out_features)
        score = selection_score(found.sigma, log_pi)
        return Components(found.U, found.sigma, log_pi, score, sampling_round)

    def _uniform(self, method: str, components: Mapping[str, Components]) -> None:
        """Measure with r components of every layer discarded."""
        ranks = [{layer.name: r for layer in self._layers} for r in self._discards]
        self._measure(method, components, ranks)

    def _allocated(self, method: str, components: Mapping[str, Components]) -> None:
        """Measure with at most as many parameters discarded as r components of every layer have."""
        spectra = [Spectrum(components[x.name].sigma, components[x.name].log_pi, _cost(x)) for x in self._layers]
        names = [layer.name for layer in self._layers]
        budgets = [_uniform_parameters(self._layers, r) for r in self._discards]
        ranks = [dict(zip(names, allocate_ranks(spectra, budget, "kpm"), strict=True)) for budget in budgets]
        self._measure(method, components, ranks)
        for point, counts in zip(self._methods[method]["points"], ranks, strict=True):
            point["components"] = counts

    def _measure(self, method: str, components: Mapping[str, Components], ranks: Sequence[Mapping[str, int]]) -> None:
        points = []
        for r, counts in zip(self._discards, progress(ranks, f"perplexity, {method}"), strict=True):
            discarded = sum(counts[layer.name] * _cost(layer) for layer in self._layers)
            with self._truncated(components, counts):
                points.append({"r": r, "discarded_parameters": discarded} | self._point())
        self._methods[method] = {"points": points}

    @contextmanager
    def _truncated(self, components: Mapping[str, Components], counts: Mapping[str, int]) -> Iterator[None]:
        """Inside the block the model's target layers lack their smallest components."""
        modules = self._base.modules
        with torch.no_grad():
            try:
                for name, count in counts.items():
                    W = self._weights[name].to(self._base.device)
                    if count:
                        modules[name].weight.copy_(discard(W, components[name].U.to(self._base.device), count))
                yield
            finally:
                for name in counts:
                    modules[name].weight.copy_(self._weights[name])

    def _point(self) -> dict[str, float | None]:
        """Loss and perplexity on the held-out rows; None where they are not finite."""
        loss = token_means(self._base.model, self._test, self._base.pad_id, BATCH_ROWS).loss
        finite = math.isfinite(loss)
        return {"loss": loss if finite else None, "perplexity": math.exp(loss) if finite and loss < 700 else None}


def _components(W: torch.Tensor, factor: torch.Tensor) -> Components:
    # There are many cuts; accuracy is judged at the last, where singular values are smallest, the most demanding one.
    found = context_svd(W, factor, min(W.shape) - 1)
    return Components(found.U.float().cpu(), found.sigma.cpu())


def _language_rows(rows: Sequence[Row], key: str) -> list[Row]:
    """``rows`` with the loss on every token, sorted by length; those of one token predict nothing and are left out."""
    useful = [Row(row.input_ids, row.input_ids) for row in rows if len(row.input_ids) > 1]
    if not useful:
        raise UserError(f"{key}: no held-out row has two tokens within data.max_length; give longer texts")
    return sorted(useful, key=lambda row: len(row.input_ids))


def _checked(discards: Sequence[int] | None, layers: Sequence[Layer]) -> list[int]:
    narrowest = min(layers, key=lambda layer: min(layer.out_features, layer.in_features))
    side = min(narrowest.out_features, narrowest.in_features)
    if side == 1:
        raise UserError(
            f"model.target_modules: layer {narrowest.name} is {narrowest.out_features}×{narrowest.in_features} and has "
            "one component; list the layers to truncate without it"
        )
    if not discards:
        return default_discards(side)
    for r in discards:
        if not 0 < r < side:
            raise UserError(
                f"--discard: {r} given; layer {narrowest.name} is {narrowest.out_features}×{narrowest.in_features}, so "
                f"1 to {side - 1} (0 is always measured)"
            )
    return sorted(set(discards))


def _cost(layer: Layer) -> int:
    """Parameters of one component."""
    return layer.in_features + layer.out_features


def _uniform_parameters(layers: Sequence[Layer], r: int) -> int:
    """Parameters of r components of every layer."""
    return sum(r * _cost(layer) for layer in layers)
