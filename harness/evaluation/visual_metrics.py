"""Scores of answers to questions about images: exact match, VQA accuracy, multiple choice, POPE.

VQA accuracy: Antol et al., 2015, and Goyal et al., 2017 (VQAv2), with the normalisation of the evaluation server, which
OK-VQA, VizWiz and TextVQA use as well. Multiple choice: ScienceQA (Lu et al., 2022); MMBench with its circular
evaluation (Liu et al., 2024). POPE: Li et al., 2023. All are fractions between 0 and 1.

A function that takes one answer scores one item, and the task's score is the mean over items; POPE's precision, recall
and F1 and the circular accuracy are of all items at once.
"""

import re
import string
from collections import defaultdict
from collections.abc import Hashable, Sequence

# What a suite may name; those of POPE are `pope`'s scores.
VISUAL_METRICS = (
    *("exact_match", "vqa_accuracy", "multiple_choice", "circular_accuracy"),
    *("pope_accuracy", "pope_precision", "pope_recall", "pope_f1", "pope_yes_ratio"),
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
"""
# Each spelling that lacks one apostrophe, and the whole one.
_WHOLE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


def normalised(answer: str) -> str:
    """An answer as VQAv2's evaluation compares it.

    A punctuation mark goes away where it stands beside a space or the answer holds a number like 1,000, and becomes a
    space elsewhere; periods stay only before digits. Then: lower case; number words up to ten become digits, ``none``
    0; articles go; contractions get a missing apostrophe back (``dont``: ``don't``).
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or number else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals one of its references, both `normalised`, else 0. Raises ``ValueError`` without any."""
    if not references or isinstance(references, str):
        raise ValueError(f"references {references!r}; a list of at least one text")
    return float(normalised(answer) in map(normalised, references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of an answer against the answers of ten people: the mean over them of min(m / 3, 1).

    m is how many of the *other* nine gave this answer. With M matches among n references, M of the means' terms
    see M − 1 matches and n − M see M. Unlike the first script of VQAv2, answers are normalised even where all people
    agree: it would count ``Yes`` as wrong where all ten say ``yes``.

    Raises:
        ValueError: fewer than four references, from which nothing could reach 1.
    """
    if len(references) < 4 or isinstance(references, str):
        raise ValueError(f"references {references!r}; VQA accuracy needs four or more answers, VQAv2 has ten")
    given, count = normalised(answer), len(references)
    matches = sum(normalised(reference) == given for reference in references)
    return (matches * min((matches - 1) / 3, 1.0) + (count - matches) * min(matches / 3, 1.0)) / count


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """The number of the option that a free text chooses, from 0; None where it chooses none or several.

    The first of these rules that finds exactly one option decides:

    1. the answer is a letter: ``B``, ``(b)``, ``B.``;
    2. it is the text of an option (`normalised`);
    3. it says so: ``the answer is B``, ``Answer: (B)``, or, less strong, ``option B``;
    4. it begins with a letter and a mark: ``B. blue``, ``(B) blue``;
    5. one letter of an option stands in it as a word; ``A`` and ``I`` before a word in lower case are words of the
       language (here and after ``Answer:``);
    6. it contains the text of one option, as whole words; an option that is part of a longer one found there does
       not count (``blue`` in ``light blue``).

    Warning:
        A text that names an option only to reject it ("not blue") chooses it. MMBench asks a language model where its
        own rules fail; we count such answers as wrong.

    Raises:
        ValueError: no options, or more than 26.
    """
    if not 0 < len(options) <= 26:
        raise ValueError(f"{len(options)} options; from 1 to 26")
    text, letters = answer.strip(), string.ascii_uppercase[: len(options)]
    capital = f"[{letters}]"
    letter = rf"[(\[*]*({capital})(?![\w'])"
    if whole := re.fullmatch(rf"[(\[]?({capital})[)\]]?[.:,;]?", text, re.IGNORECASE):
        return letters.index(whole[1].upper())
    plain = _without_words(text)
    given, texts = normalised(text), [normalised(option) for option in options]
    rules = (
        {i for i, option in enumerate(texts) if option == given},
        _letters(rf"(?i:\banswer\s+(?:is|would be))[\s:]*{letter}", text, letters),
        _letters(rf"(?i:\banswer)\s*:\s*{letter}", plain, letters),
        _letters(rf"(?i:\b(?:option|choice))[\s:]*{letter}", text, letters),
        _letters(rf"^(?:[(\[]({capital})[)\]]|({capital})[.:)])(?!\w)", text, letters),
        _letters(rf"(?<![\w']){letter}", plain, letters),
        _contained(given, texts),
    )
    return next((next(iter(found)) for found in rules if len(found) == 1), None)


def multiple_choice(answer: str, options: Sequence[str], correct: int) -> float:
    """1 if the answer chooses (`chosen_option`) the option of number ``correct``, else 0. Raises ``ValueError``."""
    if not 0 <= correct < len(options):
        raise ValueError(f"correct option {correct}; of {len(options)}, the first is 0")
    return float(chosen_option(answer, options) == correct)


def rotations(options: Sequence[str], correct: int) -> list[tuple[list[str], int]]:
    """MMBench's circular evaluation: the options shifted by 0, 1, … places, each time with the correct one's number."""
    count = len(options)
    return [([*options[shift:], *options[:shift]], (correct - shift) % count) for shift in range(count)]


def circular_accuracy(scores: Sequence[float], questions: Sequence[Hashable]) -> float:
    """The share of questions that were answered correctly in *every* rotation of their options.

    Args:
        scores: 1 or 0 for each item (`multiple_choice`).
        questions: which question each item is a rotation of. MMBench's files number rotations i, i + 10⁶, …: that is
            ``index % 10**6``.
    """
    _check(scores, questions)
    of_question: dict[Hashable, list[float]] = defaultdict(list)
    for score, question in zip(scores, questions, strict=True):
        of_question[question].append(score)
    return sum(min(rotated) for rotated in of_question.values()) / len(of_question)


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence has the word "no" or "not", else yes."""
    return re.search(r"\b(no|not)\b", answer.split(".")[0], re.IGNORECASE) is None


def pope(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """POPE's scores of answers to "Is there a … in the image?"; "yes" is the positive class.

    Args:
        answers: free texts (`says_yes`).
        expected: ``yes`` or ``no``.

    Returns:
        ``accuracy``, ``precision``, ``recall``, ``f1`` (0 where they divide by 0) and ``yes_ratio``, the share of
        answers that say yes.

    Raises:
        ValueError: an expected answer is neither yes nor no, or the lengths differ.
    """
    _check(answers, expected)
    wanted = [label.strip().lower() for label in expected]
    if wrong := sorted(set(wanted) - {"yes", "no"}):
        raise ValueError(f"expected answer {wrong[0]!r}; yes or no")
    pairs = [(says_yes(answer), label == "yes") for answer, label in zip(answers, wanted, strict=True)]
    hits, said, there = (sum(map(rule, pairs)) for rule in (all, lambda pair: pair[0], lambda pair: pair[1]))
    return {
        "accuracy": sum(given == label for given, label in pairs) / len(pairs),
        "precision": hits / said if said else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (said + there) if hits else 0.0,
        "yes_ratio": said / len(pairs),
    }


def _letters(pattern: str, text: str, letters: str) -> set[int]:
    """The options whose letters the pattern finds."""
    return {letters.index(next(filter(None, match.groups()))) for match in re.finditer(pattern, text)}


def _without_words(text: str) -> str:
    """The text without those of its ``A`` and ``I`` that are words of the language."""
    return re.sub(r"(?<![\w'])[AI](?=(?:\s+|')(?!(?:or|and|is|as|because|since)\b)[a-z])", " ", text)


def _contained(given: str, texts: Sequence[str]) -> set[int]:
    """The options whose words stand in the answer one after the other, and are not part of a longer such option."""

    def within(part: str, whole: str) -> bool:
        return f" {part} " in f" {whole} "

    found = {i for i, option in enumerate(texts) if option and within(option, given)}
    return {i for i in found if not any(within(texts[i], texts[j]) and texts[i] != texts[j] for j in found)}


def _check(one: Sequence[object], other: Sequence[object]) -> None:
    if not len(one) or len(one) != len(other):
        raise ValueError(f"{len(one)} answers for {len(other)} items")
