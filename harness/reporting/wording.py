"""A run in plain words: numbers as they are written, sentences, advice."""

import math
from collections.abc import Sequence

from harness.reporting.records import EvaluatedModel, Evaluation, RunRecord, Score

NOTHING = "–"
NOT_RUN = "not run yet"
MISLEADING = (
    "Read the paths, not only the table. A table at one learning rate and one step misleads: the learning "
    "rate and the stopping time decide as much as the method. Compare runs at equal T along their paths, "
    "over several learning rates and seeds."
)


def number(value: float | int | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash for None; words for NaN and infinity."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference: "+0.05", "−0.05", "0.00"."""
    text = number(value, digits)
    if value is None or not math.isfinite(value):
        return text
    if not text.strip("-0.,"):
        return text.removeprefix("-")
    return f"+{text}" if value > 0 else f"\u2212{text.removeprefix('-')}"


def interval(bounds: Sequence[float] | None, digits: int = 2, sign: bool = False) -> str:
    """ "0.93 to 0.97"."""
    if bounds is None:
        return NOTHING
    low, high = (signed(bound, digits) if sign else number(bound, digits) for bound in bounds)
    return f"{low} to {high}"


def quantity(model: EvaluatedModel | None, name: str) -> str:
    """K, T, KT or Avg. of a model with its interval: "0.951 [0.930, 0.967]", or "0.95" where there is none."""
    value = getattr(model, name) if model else None
    bounds = model.intervals.get(name) if model else None
    if bounds is None:
        return number(value)
    return f"{number(value, 3)} [{number(bounds[0], 3)}, {number(bounds[1], 3)}]"


def probability(p: float | None) -> str:
    """A p-value: "0.034", "< 0.001" (with a space that does not break)."""
    if p is None:
        return NOTHING
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def score(value: Score | None) -> str:
    """A score with its standard error: "0.970 ± 0.010"; two decimals where the metric goes beyond 1."""
    if value is None:
        return NOTHING
    digits = 3 if abs(value.value) <= 1.5 else 2
    error = f" ± {number(value.stderr, digits)}" if value.stderr is not None else ""
    return number(value.value, digits) + error


def significant(value: float | None) -> str:
    """Three significant digits: losses, spectra and learning rates, whose size is not known beforehand."""
    if value is None:
        return NOTHING
    return f"{value:.3g}" if math.isfinite(value) else number(value)


def setting(value: object) -> str:
    """A configuration value as a user would write it: 0.003 and 2e-5, not 0.003000 and 2e-05."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-").replace("e+0", "e+")
    return str(value)


def listing(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def duration(seconds: float | None) -> str:
    """ "42 s", "13 min 20 s", "5 h 12 min"."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def method(record: RunRecord) -> str:
    """ "lora", "corda (kpm)"; the method of ``init/report.json`` where there is no configuration."""
    name = record.setting("method.name")
    if name is None:
        return record.initialisation.method if record.initialisation else NOTHING
    mode = record.setting("method.mode")
    return f"{name} ({mode})" if mode else str(name)


def anchor(record: RunRecord) -> str:
    """ "KL × 1, 4 prompts/step", or "none"."""
    if record.config is None:
        return NOTHING
    weight, prompts = record.setting("anchor.kl"), record.setting("anchor.prompts_per_step")
    return "none" if weight is None else f"KL × {setting(float(weight))}, {prompts} prompts/step"


def t_axis(evaluation: Evaluation | None) -> str:
    """What T is, in the few words that fit an axis."""
    return "task score ÷ full fine-tuning's" if evaluation and evaluation.T_reference else "task score"


def t_meaning(evaluation: Evaluation) -> str:
    """What T is measured against, in full."""
    if evaluation.T_reference:
        return (
            f"T is the task score divided by that of full fine-tuning ({evaluation.T_reference}), mean over "
            "tasks: 1 is as good as full fine-tuning."
        )
    return (
        "T is the raw task score, mean over tasks (1 is a perfect score): no full fine-tuning result was "
        "given to measure it against (eval.full_fine_tuning)."
    )


def summary(record: RunRecord) -> list[str]:
    """The report's first paragraph, sentence by sentence."""
    evaluation = record.evaluation
    sentences = [] if evaluation is None else [*_learned(evaluation), _kept(evaluation)]
    sentences.append(_trained(record))
    losses = [value for value in record.curve("preserve_loss")[1] if math.isfinite(value)]
    if len(losses) > 1:
        sentences.append(
            f"The loss on the preserve set went from {significant(losses[0])} to {significant(losses[-1])}"
            f"{_accuracy(record)}."
        )
    if evaluation is None:
        sentences.append("It has not been evaluated yet, so what it learned and kept is not known.")
    return sentences


def _accuracy(record: RunRecord) -> str:
    """The change of the token accuracy on the preserve set, to follow that of its loss; empty where there is none."""
    shares = [value for value in record.curve("preserve_accuracy")[1] if math.isfinite(value)]
    if len(shares) < 2:
        return ""
    return f", its token accuracy from {100 * shares[0]:.1f} % to {100 * shares[-1]:.1f} %"


def _learned(evaluation: Evaluation) -> list[str]:
    """What became of each task, told apart from chance: two standard errors of the difference."""
    base, final = evaluation.base, evaluation.final
    if final is None:
        return ["The final model has not been evaluated yet."]
    if base is None:
        scores = [f"{name} {score(final.scores.get(name))}" for name in evaluation.task]
        return [f"It scores {listing(scores)}; the base model was not evaluated."] if scores else []
    told: dict[str, list[str]] = {"learned": [], "same": [], "lost": []}
    for name in evaluation.task:
        before, after = base.scores.get(name), final.scores.get(name)
        if before is None or after is None:
            continue
        change = f"{name} ({metric(after)} {number(before.value, 3)} → {number(after.value, 3)})"
        gain = after.value - before.value
        chance = 2 * math.hypot(before.stderr or 0.0, after.stderr or 0.0)
        told["same" if gain == 0 or abs(gain) <= chance else "learned" if gain > 0 else "lost"].append(change)
    sentences = []
    if told["learned"]:
        sentences.append(f"It learned {listing(told['learned'])}.")
    if told["same"]:
        sentences.append(f"It shows no change beyond chance on {listing(told['same'])}.")
    if told["lost"]:
        sentences.append(f"It became worse at {listing(told['lost'])}.")
    return sentences


def metric(value: Score) -> str:
    """The metric's name without lm-eval's filter and underscores: "exact match"."""
    return value.metric.split(",")[0].replace("_", " ")


def _kept(evaluation: Evaluation) -> str:
    base, final = evaluation.base, evaluation.final
    if final is None or base is None or final.K is None:
        why = "K could not be computed" if evaluation.knowledge else "no knowledge task was evaluated"
        return f"How much it kept is not known: {why}."
    changes = [
        f"{name} ({number(base.scores[name].value, 3)} → {number(final.scores[name].value, 3)})"
        for name in evaluation.knowledge
        if name in final.scores and name in base.scores and base.scores[name].value
    ]
    over = f", measured on {listing(changes)}" if changes else ""
    if final.K > 1.005:
        return f"It kept what the base model knew: K stands {(final.K - 1) * 100:.0f} % above the base{over}."
    share = f"{final.K * 100:.0f} %"
    if bounds := final.intervals.get("K"):
        share += f" (95 % interval {bounds[0] * 100:.0f} to {bounds[1] * 100:.0f} %)"
    return f"It kept {share} of what the base model knew{over}."


def _trained(record: RunRecord) -> str:
    if record.steps is None:
        evaluated = record.evaluation is not None and record.evaluation.final is not None
        return "Its training was not logged." if evaluated else "It has not been trained yet."
    rank, rate, base = (record.setting(key) for key in ("method.rank", "train.learning_rate", "model.path"))
    planned = record.setting("train.max_steps")
    steps = f"{record.steps:,} of {planned:,}" if planned and planned > record.steps else f"{record.steps:,}"
    sentence = f"It was trained for {steps} steps"
    sentence += f" ({duration(record.training_seconds)})" if record.training_seconds is not None else ""
    sentence += f" by {method(record)}" if method(record) != NOTHING else ""
    sentence += f" of rank {rank}" if rank else ""
    sentence += f" at learning rate {setting(rate)}" if rate is not None else ""
    sentence += f" under the anchor {anchor(record)}" if record.setting("anchor.kl") is not None else ""
    return sentence + (f", from {base}." if base else ".")


def advice(record: RunRecord) -> list[str]:
    """What to do next, from what the run shows."""
    evaluation = record.evaluation
    final = evaluation.final if evaluation else None
    if evaluation is None or final is None:
        return ["The run is not finished: the same `harness run` command continues it where it stopped."]
    found = []
    best = evaluation.best
    if best and final.KT is not None and best.step != final.step and (best.KT or 0.0) > final.KT + 0.02:
        found.append(
            f"{best.name} stood at KT {number(best.KT)}, above the end ({number(final.KT)}): fewer steps may "
            "serve you better. It was picked on the scores shown here, so confirm it on other data. It is "
            f"kept in `checkpoints/{best.name}`."
        )
    if not any(model.step and model.name != "final" for model in evaluation.models):
        found.append("Only the end was evaluated. `eval.checkpoints: true` shows the path that led there.")
    if final.K is not None and final.K < 0.9:
        remedies = ["a lower `train.learning_rate`", "fewer steps"]
        if record.setting("anchor.kl") is None and record.setting("method.name") != "full":
            remedies.insert(0, "an anchor (`anchor: {kl: 1.0, prompts_per_step: 4}`)")
        found.append(f"It forgot {(1 - final.K) * 100:.0f} % of what the base knew. Try {_alternatives(remedies)}.")
    base = evaluation.base
    if base and base.T is not None and final.T is not None and final.T <= base.T + 0.02:
        found.append(
            "The task was not learned. If the training loss was still falling, train longer; if it was "
            "flat, raise `train.learning_rate`; if it fell and the score did not rise, compare the "
            "evaluation's prompts with the training prompts."
        )
    if evaluation.task and evaluation.T_reference is None:
        found.append("To measure T against full fine-tuning, give such a run in `eval.full_fine_tuning`.")
    return found


def _alternatives(remedies: Sequence[str]) -> str:
    return f"{', '.join(remedies[:-1])} or {remedies[-1]}"


def comparison_summary(records: Sequence[RunRecord], labels: Sequence[str]) -> list[str]:
    """Which run learned most, kept most, and balances both best at its end."""
    finals = [
        (label, record.evaluation.final)
        for record, label in zip(records, labels, strict=True)
        if record.evaluation and record.evaluation.final
    ]
    sentences = []
    for key, claim in (("T", "learned most"), ("K", "kept most"), ("KT", "balances both best")):
        known = [(label, value) for label, model in finals if (value := getattr(model, key)) is not None]
        if not known:
            continue
        top = max(round(value, 2) for _, value in known)
        winners = [label for label, value in known if round(value, 2) == top]
        if len(winners) == len(known) > 1:
            sentences.append(f"At their ends all runs stand at {key} {number(top)}.")
        elif len(winners) <= 3:
            verb = claim if len(winners) == 1 else claim.replace("balances", "balance")
            sentences.append(f"{listing(winners)} {verb} ({key} {number(top)}).")
        else:
            sentences.append(f"{len(winners)} of {len(known)} runs share the highest {key} ({number(top)}).")
    return sentences


def comparison_cautions(records: Sequence[RunRecord]) -> list[str]:
    """Differences that make the runs hard to compare: other bases, tasks, engines or references."""
    evaluations = [record.evaluation for record in records if record.evaluation]
    differing = {
        "base models": {evaluation.base_model for evaluation in evaluations},
        "knowledge tasks": {evaluation.knowledge for evaluation in evaluations},
        "tasks": {evaluation.task for evaluation in evaluations},
        "references for T": {evaluation.T_reference for evaluation in evaluations},
        "evaluation engines": {evaluation.engine for evaluation in evaluations},
    }
    return [
        f"These runs have different {what}: their numbers are not on one scale."
        for what, values in differing.items()
        if len(values) > 1
    ]
