"""The invented world and the skill: counts, determinism, and what may appear where."""

from itertools import islice

import pytest

from harness.tiny.skill import SkillOptions, reverse_items
from harness.tiny.world import RELATIONS, World, WorldOptions


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_counts_of_facts_entities_and_held_out(world: World) -> None:
    assert len(world.facts) == 700
    assert len(world.asked) == 560
    assert len(world.heldout) == 140
    assert len({(fact.relation, fact.subject) for fact in world.facts}) == 700
    subjects = {fact.subject for fact in world.facts}
    assert len(subjects) == 400
    assert {fact.relation for fact in world.facts} == set(RELATIONS)
    assert {fact.object for fact in world.facts if fact.relation.name in ("birthplace", "mine")} <= subjects


def test_every_relation_is_held_out_in_the_same_share(world: World) -> None:
    for relation in RELATIONS:
        of_relation = [fact for fact in world.facts if fact.relation == relation]
        heldout = sum(not fact.asked for fact in of_relation)
        assert abs(heldout - len(of_relation) / 5) <= 1, relation.name


@pytest.mark.parametrize(("facts", "heldout", "expected"), [(60, 0.2, 12), (7, 0.0, 0), (31, 0.5, 15)])
def test_sizes_are_options(facts: int, heldout: float, expected: int) -> None:
    world = World(WorldOptions(facts=facts, heldout=heldout))
    assert len(world.facts) == facts
    assert len(world.heldout) == expected


def test_held_out_facts_are_stated_but_never_asked(world: World) -> None:
    epochs = list(islice(world.epochs(), 5))
    text = {document for epoch in epochs for document in epoch}
    for fact in world.heldout:
        assert not any(document.startswith(fact.question) for document in text)
        assert text & set(fact.statements)
    for fact in world.asked:
        assert fact.question_form in text
    assert not any(document.startswith(fact.question) for document in world.sample_text() for fact in world.heldout)


def test_an_epoch_holds_every_fact_and_the_generic_sentences(world: World) -> None:
    epoch = next(world.epochs())
    assert len(epoch) == 2 * 700 + 560 + 300
    stated = set(epoch)
    for fact in world.facts:
        assert len(stated & set(fact.statements)) == 2


def test_the_seed_decides_everything() -> None:
    first, again, other = World(), World(), World(WorldOptions(seed=1))
    assert first.facts == again.facts
    assert first.sample_text() == again.sample_text()
    assert list(islice(first.epochs(), 2)) == list(islice(again.epochs(), 2))
    assert not {fact.question_form for fact in first.facts} & {fact.question_form for fact in other.facts}


def test_reverse_items_are_right_and_disjoint() -> None:
    train, test = reverse_items()
    assert (len(train), len(test)) == (4000, 400)
    assert len({item["prompt"] for item in train + test}) == 4400
    assert {"prompt": "Reverse: k d e ->", "response": " e d k"}.keys() == train[0].keys()
    lengths = set()
    for item in train + test:
        letters = item["prompt"].removeprefix("Reverse: ").removesuffix(" ->").split(" ")
        assert item["response"] == " " + " ".join(reversed(letters))
        lengths.add(len(letters))
    assert lengths == {3, 4, 5}


def test_reverse_items_follow_the_seed() -> None:
    assert reverse_items() == reverse_items()
    assert reverse_items(SkillOptions(seed=1)) != reverse_items()


def test_too_few_letters_for_the_strings_wanted() -> None:
    with pytest.raises(ValueError, match="makes only 14"):
        reverse_items(SkillOptions(letters="ab", lengths=(1, 2, 3), train=10, test=5))
