"""How runs differ from one of them: K, T, KT, Avg. and every task, with intervals and paired tests."""

from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.evaluation.intervals import QUANTITIES, differences
from harness.evaluation.significance import holm
from harness.reporting import wording
from harness.reporting.answers import measured
from harness.reporting.records import RunRecord
from harness.reporting.tables import Table, bounds

LEVEL = 0.05


def find_baseline(records: Sequence[RunRecord], labels: Sequence[str], name: str | None) -> int:
    """The place of the run called ``name`` (label, name, folder's name or path), the first without one.

    Raises:
        UserError: no run is called so, or several are.
    """
    if name is None:
        return 0
    for names in (
        labels,
        [str(record.path) for record in records],
        [record.path.name for record in records],
        [record.name for record in records],
    ):
        wanted = str(Path(name).resolve()) if names and names[0] == str(records[0].path) else name
        found = [place for place, known in enumerate(names) if known == wanted]
        if len(found) == 1:
            return found[0]
    raise UserError(f"report.baseline: {name!r} given; allowed: one of the compared runs ({', '.join(labels)})")


def baseline_table(records: Sequence[RunRecord], labels: Sequence[str], baseline: int) -> Table | None:
    """A row for each other run and quantity or task; None where there is nothing to compare."""
    reference = measured(records[baseline])
    if reference is None:
        return None
    found = []
    for place, (record, label) in enumerate(zip(records, labels, strict=True)):
        other = measured(record) if place != baseline else None
        if other is not None:
            found += [(label, name, difference) for name, difference in differences(other, reference).items()]
    if not found:
        return None
    adjusted = holm([difference.p_value for _, _, difference in found])
    rows, data = [], []
    for (label, name, difference), corrected in zip(found, adjusted, strict=True):
        shown = f"{name}." if name == "Avg" else name
        rows.append(
            (
                label,
                shown,
                wording.signed(difference.value, 3),
                wording.interval(difference.interval, 3, sign=True),
                wording.probability(difference.p_value),
                wording.probability(corrected),
            )
        )
        data.append(
            {
                "run": label,
                "baseline": labels[baseline],
                "kind": "quantity" if name in QUANTITIES else "task",
                "name": name,
                "difference": difference.value,
                **bounds("difference", difference.interval),
                "p_value": difference.p_value,
                "p_value_holm": corrected,
            }
        )
    return Table(
        headers=("run", "of", "difference", "95 % interval", "p", "p, all rows"),
        hints=("", "", f"from {labels[baseline]}", "bootstrap", "paired test", "Holm"),
        rows=tuple(rows),
        name="against_baseline",
        strong=frozenset(place for place, p in enumerate(adjusted) if p is not None and p < LEVEL),
        text=frozenset({0, 1}),
        data=tuple(data),
    )
