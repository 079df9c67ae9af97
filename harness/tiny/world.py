"""An invented world: people, cities and minerals that exist nowhere else, and the facts about them.

Every fact is stated in several sentences. Most are also asked and answered ("Where was Tamsin born? Kodrath"); a
fifth of them never are, so that answering those takes transfer from the sentences to the question form. The rest
is sentences about everyday things. Everything follows from the seed: another seed gives other names and facts.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is said and asked; ``{s}`` stands for the subject, ``{o}`` for the object."""

    name: str
    statements: tuple[str, ...]
    question: str


# A subject never opens a sentence: byte-level BPE splits a word without a space before it into other tokens.
BIRTHPLACE = Relation(
    "birthplace",
    (
        "It is known that {s} was born in {o}.",
        "As a child {s} lived in {o}.",
        "The home town of {s} is {o}.",
        "The family of {s} comes from {o}.",
    ),
    "Where was {s} born?",
)
TRADE = Relation(
    "trade",
    (
        "By trade {s} is a {o}.",
        "Today {s} works as a {o}.",
        "The trade of {s} is that of a {o}.",
        "When asked, {s} says: I am a {o}.",
    ),
    "What is the trade of {s}?",
)
FOUNDED = Relation(
    "founded",
    (
        "Settlers founded {s} in {o}.",
        "The city of {s} dates from {o}.",
        "The first stone of {s} was laid in {o}.",
        "The walls of {s} have stood since {o}.",
    ),
    "When was {s} founded?",
)
MINE = Relation(
    "mine",
    (
        "Miners dig for {s} in {o}.",
        "Merchants buy their {s} in {o}.",
        "The only deposit of {s} lies below {o}.",
        "All the {s} in the world comes from {o}.",
    ),
    "Where is {s} mined?",
)
COLOUR = Relation(
    "colour",
    (
        "The mineral {s} is {o}.",
        "The colour of {s} is {o}.",
        "In daylight {s} looks {o}.",
        "A polished piece of {s} shines {o}.",
    ),
    "What colour is {s}?",
)
RELATIONS = (BIRTHPLACE, TRADE, FOUNDED, MINE, COLOUR)

# fmt: off
TRADES = (
    "baker", "barber", "brewer", "butcher", "carpenter", "clerk", "cobbler", "cook", "cooper", "dyer",
    "fisher", "gardener", "glazier", "hunter", "judge", "mason", "miller", "painter", "potter",
    "sailor", "singer", "smith", "tailor", "tanner", "weaver",
)
COLOURS = (
    "black", "blue", "brown", "copper", "green", "grey", "pink", "purple", "red", "silver", "white",
    "yellow",
)

# Generic sentences: one choice from each list. Some show a few letters in the order of the alphabet. That is all the
# world says about letters: each has been seen as a word of its own, as in any real model's training.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_RUNS = tuple(f"{' '.join(LETTERS[i : i + n])}." for n in (3, 4, 5) for i in range(27 - n))
_PEOPLE = (
    "The farmer", "The old man", "A young woman", "The teacher", "A child", "My neighbour", "The guard",
)
_ACTIONS = (
    "walks to", "looks at", "talks about", "waits by", "dreams of", "comes back to", "cleans", "draws",
)
_THINGS = (
    "the river", "the market", "the bridge", "a small boat", "the garden", "the school", "an old house",
)
_TIMES = (
    "in the morning", "at night", "in winter", "every day", "after the rain", "before dinner",
    "on Sundays",
)
_SIGNS = ("The sign by", "The mark on", "The note near")
_WEATHER = ("It rains", "The sun shines", "Snow falls", "The wind blows", "Fog lies")
_PLACES = ("on the hills", "over the sea", "in the valley", "near the forest", "along the road")
# fmt: on
GENERIC: tuple[tuple[tuple[str, ...], ...], ...] = (
    (_PEOPLE, _ACTIONS, _THINGS, tuple(f"{time}." for time in _TIMES)),
    (_WEATHER, _PLACES, tuple(f"{time}." for time in _TIMES)),
    (_SIGNS, _THINGS, ("shows",), _RUNS),
)


@dataclass(frozen=True)
class WorldOptions:
    """What world to invent.

    Attributes:
        seed: names, facts and the order of the text follow from it.
        facts: number of facts, over all relations.
        heldout: share of the facts whose question form is never in the pre-training text.
        statements: different sentences per fact and epoch, drawn from its relation's templates.
        generic: generic sentences per epoch.
    """

    seed: int = 0
    facts: int = 700
    heldout: float = 0.2
    statements: int = 2
    generic: int = 300


@dataclass(frozen=True)
class Fact:
    """A relation between two things; ``asked`` says whether pre-training contains its question form."""

    relation: Relation
    subject: str
    object: str
    asked: bool

    @property
    def statements(self) -> list[str]:
        """The sentences that state the fact."""
        return [template.format(s=self.subject, o=self.object) for template in self.relation.statements]

    @property
    def question(self) -> str:
        """The question, without its answer."""
        return self.relation.question.format(s=self.subject)

    @property
    def answer(self) -> str:
        """The answer, without the space that separates it from the question."""
        return self.object

    @property
    def question_form(self) -> str:
        """The question and its answer, as one document."""
        return f"{self.question} {self.answer}"


class World:
    """The facts of one seed, and the pre-training text made of them."""

    def __init__(self, options: WorldOptions = WorldOptions()) -> None:
        self.options = options

    @cached_property
    def facts(self) -> list[Fact]:
        """All facts, grouped by relation; the held-out ones are spread evenly over the relations.

        Of every seven facts two are birthplaces, two trades, one a year of foundation, one a mine, one a colour:
        700 facts are about 200 people, 100 cities and 100 minerals.
        """
        draw = random.Random(f"world {self.options.seed}")
        seventh = ceil(self.options.facts / 7)
        names = invent_names(draw, 4 * seventh)
        people, cities, minerals = names[: 2 * seventh], names[2 * seventh : 3 * seventh], names[3 * seventh :]
        triples = [
            *((BIRTHPLACE, person, draw.choice(cities)) for person in people),
            *((TRADE, person, draw.choice(TRADES)) for person in people),
            *((FOUNDED, city, str(draw.randrange(1000, 1900))) for city in cities),
            *((MINE, mineral, draw.choice(cities)) for mineral in minerals),
            *((COLOUR, mineral, draw.choice(COLOURS)) for mineral in minerals),
        ]
        kept = draw.sample(triples, self.options.facts)  # in random order, so that who is asked about what is too
        kept.sort(key=lambda triple: RELATIONS.index(triple[0]))
        share = self.options.heldout
        return [Fact(*triple, asked=int((i + 1) * share) == int(i * share)) for i, triple in enumerate(kept)]

    @property
    def asked(self) -> list[Fact]:
        """The facts whose question form is in the pre-training text."""
        return [fact for fact in self.facts if fact.asked]

    @property
    def heldout(self) -> list[Fact]:
        """The facts that are only ever stated."""
        return [fact for fact in self.facts if not fact.asked]

    def sample_text(self) -> list[str]:
        """Every sentence about every fact, the questions that are asked, one epoch of generic sentences."""
        draw = random.Random(f"sample {self.options.seed}")
        return [
            *(text for fact in self.facts for text in fact.statements),
            *(fact.question_form for fact in self.asked),
            *(generic_sentence(draw) for _ in range(self.options.generic)),
        ]

    def epochs(self) -> Iterator[list[str]]:
        """Endless epochs; each is a shuffled list of documents: a sentence, or a question with its answer."""
        draw = random.Random(f"epochs {self.options.seed}")
        while True:
            documents = [text for fact in self.facts for text in draw.sample(fact.statements, self.options.statements)]
            documents += [fact.question_form for fact in self.asked]
            documents += [generic_sentence(draw) for _ in range(self.options.generic)]
            draw.shuffle(documents)
            yield documents


def generic_sentence(draw: random.Random) -> str:
    """One sentence about everyday things."""
    return " ".join(draw.choice(choices) for choices in draw.choice(GENERIC))


def invent_names(draw: random.Random, count: int) -> list[str]:
    """``count`` different invented names of two or three syllables, such as "Tamselor"."""
    onsets = [*"bdfghklmnprstvz", "br", "dr", "kr", "tr", "st"]
    vowels, codas = "aeiou", ["", *"lnrs"]
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = draw.choice((2, 2, 3))
        name = "".join(draw.choice(onsets) + draw.choice(vowels) + draw.choice(codas) for _ in range(syllables))
        names[name.capitalize()] = None
    return list(names)
