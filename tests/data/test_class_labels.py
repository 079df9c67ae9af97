"""Names and numbers of classes."""

import pytest

from harness.data.class_labels import Classes, Label, classes_of
from harness.errors import UserError

NAMED = Classes(("cat", "dog", "eel"), True, "the classes of x")
NUMBERED = Classes(("LABEL_0", "LABEL_1", "LABEL_2"), False, "the classes of x")


@pytest.mark.parametrize(
    ("classes", "name", "number", "expected"),
    [
        (NAMED, "dog", None, 1),
        (NAMED, "dog", 0, 1),  # another source's numbers
        (NAMED, None, 2, 2),
        (NUMBERED, None, 2, 2),
        (NUMBERED, "LABEL_1", None, 1),
        (NUMBERED, "tench", 0, 0),  # names that the base never had
        (NAMED, "cow", 0, None),
        (NAMED, None, 3, None),
        (NUMBERED, None, 3, None),
        (NUMBERED, "tench", None, None),
    ],
)
def test_number_of_a_label(classes: Classes, name: str | None, number: int | None, expected: int | None) -> None:
    label = Label(name, number, "row 4")
    if expected is not None:
        assert classes.number(label, "data.train.response") == expected
        return
    with pytest.raises(
        UserError, match=r"^data\.train\.response: row 4 is of class .* not among the classes of x: "
    ) as caught:
        classes.number(label, "data.train.response")
    assert ("numbers from 0 to 2" in str(caught.value)) == (not classes.named)


def test_a_long_list_of_classes_is_cut() -> None:
    classes = Classes(tuple(f"class {n}" for n in range(1000)), True, "the classes of x")
    with pytest.raises(UserError, match=r"class 9 and 990 more; did you mean 'class 1'\?$"):
        classes.number(Label("clas 1", None, "row 0"), "data.train.response")


def test_classes_of_labels() -> None:
    names = [Label(name, None, "") for name in ("b", "a", "b")]
    assert classes_of(names, "") == Classes(("a", "b"), True, "")
    numbers = [Label(None, number, "") for number in (0, 3)]
    assert classes_of(numbers, "") == Classes(("0", "1", "2", "3"), False, "")
