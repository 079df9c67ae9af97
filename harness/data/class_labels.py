"""What rows say of their classes: names, numbers, or both; and the numbers that a head has for them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import SourceConfig, nearest
from harness.errors import UserError

if TYPE_CHECKING:
    import datasets

LISTED = 10  # classes that a message names


@dataclass(frozen=True)
class Label:
    """What a source says of a row's class: a name, a number, or both. ``where``: the row, in messages."""

    name: str | None
    number: int | None
    where: str

    @property
    def given(self) -> str | int | None:
        """As it is shown to people."""
        return self.number if self.name is None else self.name


@dataclass(frozen=True)
class Classes:
    """The classes of a head in the order of its outputs.

    Attributes:
        names: of the classes.
        named: False where the names are nothing but numbers (``7``, ``LABEL_7``): numbers are then what counts.
        whose: in messages.
    """

    names: tuple[str, ...]
    named: bool
    whose: str

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each name."""
        return {name: number for number, name in enumerate(self.names)}

    def number(self, label: Label, field: str) -> int:
        """The number of a label's class.

        Raises:
            UserError: there is no such class. ``field`` (``data.train.response``) names the source of the label.
        """
        if label.name in self.numbers:
            return self.numbers[label.name]
        by_number = not self.named or label.name is None
        if by_number and label.number is not None and label.number < len(self.names):
            return label.number
        more = len(self.names) - LISTED
        listed = ", ".join(self.names[:LISTED]) + (f" and {more} more" if more > 0 else "")
        near = nearest(str(label.given), list(self.names)) if label.name is not None else ""
        if not self.named:
            listed, near = f"numbers from 0 to {len(self.names) - 1}", ""
        raise UserError(
            f"{field}: {label.where} is of class {label.given!r}, which is not among {self.whose}: {listed}{near}"
        )


def names_of_classes(rows: "datasets.Dataset", source: SourceConfig) -> list[str] | None:
    """The names that numbers in the column of labels stand for, where the source says them."""
    return source.classes or getattr(rows.features[source.response], "names", None)


def labels_of(rows: "datasets.Dataset", source: SourceConfig, key: str) -> list[Label]:
    """What every row says of its class.

    Raises:
        UserError: a row says nothing, or nothing that could be a class; or some say names and others numbers.
    """
    names, file = names_of_classes(rows, source), Path(source.path).name
    numbers = {name: number for number, name in enumerate(names or ())}
    found = []
    for place, value in enumerate(rows[source.response]):
        where = f"row {place} of {file}"
        if isinstance(value, str):
            found.append(Label(value, numbers.get(value), where))
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            if names is not None and value >= len(names):
                raise UserError(
                    f"{key}.response: {where} has class {value} in {source.response!r}, and there are {len(names)} "
                    "names"
                )
            found.append(Label(None if names is None else names[value], value, where))
        else:
            raise UserError(
                f"{key}.response: {where} has {value!r} in {source.response!r}; allowed: the name of a class, or its "
                "number, from 0"
            )
    odd = next((label for label in found if (label.name is None) != (found[0].name is None)), None)
    if odd is not None:
        raise UserError(
            f"{key}.response: {odd.where} has {odd.given!r} in {source.response!r}, and {found[0].where} has "
            f"{found[0].given!r}; allowed: names alone, or numbers alone"
        )
    return found


def classes_of(labels: list[Label], whose: str) -> Classes:
    """The classes that labels without a list of classes stand for: their names in alphabetical order, or 0 to the
    largest number."""
    if labels[0].name is not None:
        return Classes(tuple(sorted({str(label.name) for label in labels})), True, whose)
    return Classes(tuple(map(str, range(1 + max(label.number or 0 for label in labels)))), False, whose)
