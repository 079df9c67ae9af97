"""Metrics of visual question answering against definitions written out slowly, and tables of cases."""

import random
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.evaluation.visual_metrics import (
    chosen_option,
    circular_accuracy,
    exact_match,
    multiple_choice,
    normalised,
    pope,
    rotations,
    says_yes,
    vqa_accuracy,
)

# -- Normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  a Red  ball.\n", "red ball"),
        ("The cat and THE dog", "cat and dog"),
        ("two", "2"),
        ("None", "0"),
        ("ten men", "10 men"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("don't know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("ows'at", "ows'at"),  # two are missing
        ("ow's'at", "'ow's'at"),
        ("its", "its"),  # a word of its own
        ("lets go", "lets go"),  # the official table has no "let's"
        ("1,000", "1000"),
        ("1,000 dogs (big)", "1000 dogs big"),
        ("well-known", "well known"),
        ("well - known", "well known"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("what?", "what"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("5:30", "5:30"),
        ("left/right", "left right"),
        ("1/2, 1/4", "1 2 1 4"),
        ("on\tthe\nroad", "on road"),
        ("the", ""),
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def slow_normalised(answer: str) -> str:
    """The rules of the evaluation server, mark by mark and word by word."""
    answer = " ".join(answer.replace("\t", "\n").split("\n")).strip()
    has_number = any(
        answer[i] == "," and answer[i - 1].isdecimal() and answer[i + 1].isdecimal() for i in range(1, len(answer) - 1)
    )
    text = answer
    for mark in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        if mark + " " in answer or " " + mark in answer or has_number:
            text = "".join(letter for letter in text if letter != mark)
        else:
            text = "".join(" " if letter == mark else letter for letter in text)
    kept = [letter for i, letter in enumerate(text) if letter != "." or (i + 1 < len(text) and text[i + 1].isdecimal())]
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = []
    for word in "".join(kept).lower().split():
        if word == "none":
            words.append("0")
        elif word in numbers:
            words.append(str(numbers.index(word)))
        elif word not in ("a", "an", "the"):
            words.append({"dont": "don't", "whats": "what's"}.get(word, word))
    return " ".join(words)


PIECES = [
    "a ",
    "The",
    "dont",
    "whats ",
    "two ",
    "none",
    "ball",
    "5",
    "1,000",
    ",",
    ", ",
    ".",
    ". ",
    "-",
    " - ",
    "(",
    ")",
    "?",
    "\n",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_normalisation_is_that_of_the_rules_one_by_one(answer: str) -> None:
    assert normalised(answer) == slow_normalised(answer)


# -- Exact match and VQA accuracy -------------------------------------------------------------------------------------


def test_exact_match() -> None:
    assert exact_match("The red ball!", ["blue ball", "red ball"]) == 1.0
    assert exact_match("red balls", ["blue ball", "red ball"]) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        exact_match("red", [])
    with pytest.raises(ValueError, match="list"):
        exact_match("red", "red")


def leave_one_out(answer: str, references: Sequence[str]) -> float:
    """The definition: the mean over all subsets of all references but one of min(matches / 3, 1)."""
    subsets = list(combinations(references, len(references) - 1))
    scores = []
    for subset in subsets:
        matches = 0
        for reference in subset:
            matches += slow_normalised(reference) == slow_normalised(answer)
        scores.append(min(matches / 3.0, 1.0))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("people", [4, 5, 10])
def test_vqa_accuracy_is_the_mean_over_all_people_left_out(people: int) -> None:
    draw = random.Random(people)
    for matching in range(people + 1):
        references = ["Two"] * matching + [draw.choice(["one", "a dog", "3"]) for _ in range(people - matching)]
        draw.shuffle(references)
        for answer in ("2", "two.", "dog", "cat"):
            assert vqa_accuracy(answer, references) == pytest.approx(leave_one_out(answer, references), abs=1e-12)


def test_vqa_accuracy_known_values() -> None:
    scores = [vqa_accuracy("yes", ["Yes"] * matching + ["no"] * (10 - matching)) for matching in range(11)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9, *[1.0] * 7])
    with pytest.raises(ValueError, match="four or more"):
        vqa_accuracy("yes", ["yes"] * 3)


# -- Multiple choice --------------------------------------------------------------------------------------------------

COLOURS = ["light blue", "blue", "red", "a dog"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        (" b.", 1),
        ("(C)", 2),
        ("[d]", 3),
        ("A", 0),
        ("E", None),
        ("B. blue", 1),
        ("(B) blue", 1),
        ("C: because A dog is not there", 2),
        ("The answer is C.", 2),
        ("The answer is A because light falls on it.", 0),
        ("the correct answer is: (B)", 1),
        ("Answer: D", 3),
        ("Answer: A dog", 3),
        ("Answer: **C**", 2),
        ("I choose option C", 2),
        ("Option A is wrong, so the answer is B", 1),
        ("A or B", None),
        ("The answer is A. No, the answer is B.", None),
        ("It must be C I think", 2),
        ("blue", 1),
        ("Light blue!", 0),
        ("It is light blue.", 0),
        ("It is blue.", 1),
        ("It is blue or red.", None),
        ("A dog", 3),
        ("dog", 3),
        ("A cat", None),
        ("Dogged", None),
        ("bluebell", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_chosen_option(answer: str, expected: int | None) -> None:
    assert chosen_option(answer, COLOURS) == expected
    for correct in range(4):
        assert multiple_choice(answer, COLOURS, correct) == float(correct == expected)


def test_the_pronoun_is_no_option_and_options_may_be_numbers() -> None:
    nine = [f"thing {i}" for i in range(9)]
    assert chosen_option("I believe C", nine) == 2
    assert chosen_option("I", nine) == 8
    assert chosen_option("There are two.", ["1", "2", "3"]) == 1
    assert chosen_option("same", ["same", "Same"]) is None


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="0 options"):
        chosen_option("A", [])
    with pytest.raises(ValueError, match="27 options"):
        chosen_option("A", ["x"] * 27)
    with pytest.raises(ValueError, match="correct option 2; of 2"):
        multiple_choice("A", ["x", "y"], 2)


@given(st.lists(st.text("abcdefgh", min_size=2, max_size=5), min_size=1, max_size=8, unique=True), st.data())
def test_letters_and_texts_of_every_option_are_understood(options: list[str], data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, len(options) - 1))
    if normalised(options[correct]) != options[correct]:
        return  # "an" is an article
    letter = "ABCDEFGH"[correct]
    for answer in (
        letter,
        f"({letter})",
        f"{letter}. {options[correct]}",
        f"The answer is {letter}.",
        options[correct],
    ):
        if answer.lower() in "abcdefgh":
            assert chosen_option(answer, options) == correct
        else:
            assert multiple_choice(answer, options, correct) == 1.0


def test_rotations_ask_for_the_same_option() -> None:
    assert rotations(["x", "y", "z"], 2) == [(["x", "y", "z"], 2), (["y", "z", "x"], 1), (["z", "x", "y"], 0)]


def test_circular_accuracy_wants_every_rotation() -> None:
    draw = random.Random(0)
    for _ in range(20):
        scores = {question: [float(draw.random() < 0.8) for _ in range(4)] for question in range(10)}
        items = [(score, question + 10**6 * i) for question, of in scores.items() for i, score in enumerate(of)]
        draw.shuffle(items)
        whole = 0
        for of in scores.values():
            whole += of == [1.0] * 4
        found = circular_accuracy([score for score, _ in items], [index % 10**6 for _, index in items])
        assert found == pytest.approx(whole / 10)
    with pytest.raises(ValueError, match="1 answers for 2 items"):
        circular_accuracy([1.0], [0, 1])


# -- POPE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("yes, there is a dog.", True),
        ("No", False),
        ("NO!", False),
        ("No, there is no dog.", False),
        ("There is not a dog in the image.", False),
        ("There is a dog. It is not red.", True),  # only the first sentence counts
        ("There is a knot.", True),
        ("", True),
    ],
)
def test_says_yes(answer: str, expected: bool) -> None:
    assert says_yes(answer) == expected


def slow_pope(answers: list[bool], expected: list[bool]) -> dict[str, float]:
    tp = fp = tn = fn = 0
    for answer, label in zip(answers, expected, strict=True):
        if answer and label:
            tp += 1
        elif answer:
            fp += 1
        elif label:
            fn += 1
        else:
            tn += 1
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return {
        "accuracy": (tp + tn) / (tp + fp + tn + fn),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": (tp + fp) / (tp + fp + tn + fn),
    }


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_pope_is_that_of_the_four_counts(pairs: list[tuple[bool, bool]]) -> None:
    answers = ["Yes, there is." if answer else "No." for answer, _ in pairs]
    found = pope(answers, ["Yes" if label else "no" for _, label in pairs])
    assert found == pytest.approx(slow_pope([answer for answer, _ in pairs], [label for _, label in pairs]), abs=1e-12)


def test_pope_refuses_other_labels_and_lengths() -> None:
    with pytest.raises(ValueError, match="'maybe'; yes or no"):
        pope(["yes"], ["maybe"])
    with pytest.raises(ValueError, match="0 answers for 0 items"):
        pope([], [])
