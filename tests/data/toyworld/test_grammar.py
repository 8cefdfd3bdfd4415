"""Expressions refer to exactly one object, as an independent reading of the sentence confirms."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wris_lib.data.toyworld import grammar, pretraining, wording
from wris_lib.data.toyworld.grammar import KINDS, Phrase, describe, referent, truth
from wris_lib.data.toyworld.scenes import Scene, SceneObject, sample_object_image, sample_scene
from wris_lib.data.toyworld.sprites import COLORS, drawings
from wris_lib.data.toyworld.wording import say


def thing(category, box, drawing=0, pattern="plain", hidden_parts=(), **colors) -> SceneObject:
    """An object by hand; every part is seen unless told otherwise."""
    sketch = drawings()[category][drawing]
    left, top, right, bottom = box
    return SceneObject(
        drawing=sketch,
        present=frozenset(sketch.parts) - set(hidden_parts),
        colors={name: "grey" for name in sketch.paints} | colors,
        pattern=pattern,
        center=((left + right) / 2, (top + bottom) / 2),
        height=float(bottom - top),
        flip=False,
        angle=0.0,
        box=box,
        area=(right - left) * (bottom - top) // 2,
        visible=1.0,
        part_areas={part: 100 for part in sketch.parts if part not in hidden_parts},
    )


def scene(*things: SceneObject) -> Scene:
    return Scene(list(things), np.zeros((256, 256, 3), np.uint8), np.zeros((256, 256), np.uint8))


LEFT, MIDDLE, RIGHT = (10, 100, 60, 150), (100, 100, 150, 150), (190, 100, 240, 150)


def test_nouns_synonyms_and_groups():
    world = scene(thing("boy", LEFT), thing("girl", MIDDLE), thing("dog", RIGHT))
    assert truth(Phrase("dog"), world) == [False, False, True]
    assert truth(Phrase("puppy"), world) == [False, False, True]
    assert truth(Phrase("kid"), world) == [True, True, False]
    assert referent(Phrase("kid"), world) is None, "two kids"
    assert referent(Phrase("girl"), world) == 1


def test_attributes_and_parts():
    world = scene(
        thing("car", LEFT, main="red", roof="blue"),
        thing("car", MIDDLE, main="red", roof="green"),
        thing("car", RIGHT, main="white", roof="blue", pattern="striped"),
    )
    assert truth(Phrase("car", adjectives=("red",)), world) == [True, True, False]
    assert truth(Phrase("car", adjectives=("striped",)), world) == [False, False, True]
    assert referent(Phrase("car", parts=(("roof", "green"),)), world) == 1
    assert referent(Phrase("car", adjectives=("red",), parts=(("roof", "blue"),)), world) == 0


def test_a_part_that_is_hardly_seen_leaves_doubt():
    seen, hidden = thing("car", LEFT, roof="blue"), thing("car", RIGHT, roof="blue")
    hidden.part_areas["roof"] = 3
    assert truth(Phrase("car", parts=(("roof", "blue"),)), scene(seen, hidden)) == [True, None]
    assert referent(Phrase("car", parts=(("roof", "blue"),)), scene(seen, hidden)) is None


def test_a_bag_that_is_not_there_is_not_green():
    man = thing("man", LEFT, bag="green", hidden_parts=("bag",))
    assert truth(Phrase("man", parts=(("bag", "green"),)), scene(man, thing("dog", RIGHT))) == [False, False]


def test_positions_compare_those_that_are_meant():
    world = scene(thing("dog", LEFT), thing("dog", MIDDLE), thing("dog", RIGHT), thing("cat", (0, 0, 40, 40)))
    assert [referent(Phrase("dog", position=p), world) for p in ("left", "middle", "right")] == [0, 1, 2]
    assert referent(Phrase("cat", position="top left"), world) == 3
    assert referent(Phrase("cat", position="right"), world) is None


def test_positions_that_people_would_argue_about_are_avoided():
    world = scene(thing("dog", (60, 100, 100, 140)), thing("dog", (72, 180, 112, 220)))
    assert referent(Phrase("dog", position="left"), world) is None
    assert truth(Phrase("dog", position="left"), world)[0] is not False


def test_big_and_small_need_a_clear_difference():
    big, small = thing("dog", (10, 50, 110, 150)), thing("dog", (190, 100, 230, 140))
    world = scene(big, small, thing("house", MIDDLE))
    assert referent(Phrase("dog", adjectives=("big",)), world) == 0
    assert referent(Phrase("dog", adjectives=("small",)), world) == 1
    assert referent(Phrase("house", adjectives=("big",)), world) is None, "big compared with what?"
    alike = scene(big, replace(big, box=(120, 50, 220, 150)))
    assert referent(Phrase("dog", adjectives=("big",)), alike) is None


@pytest.mark.parametrize(
    ("relation", "box", "holds"),
    [
        ("left of", (20, 100, 60, 150), True),
        ("left of", (190, 100, 230, 150), False),
        ("right of", (190, 100, 230, 150), True),
        ("above", (100, 20, 150, 80), True),
        ("below", (100, 180, 150, 240), True),
        ("next to", (155, 100, 200, 150), True),
        ("next to", (230, 10, 250, 40), False),
    ],
)
def test_relations(relation, box, holds):
    world = scene(thing("tree", MIDDLE), thing("dog", box))
    phrase = Phrase("dog", relation=relation, landmark=Phrase("tree"))
    assert truth(phrase, world) == [False, holds]


def test_in_front_of_means_painted_later_and_standing_lower():
    back, front = thing("sofa", (80, 80, 180, 160)), thing("dog", (120, 130, 160, 190))
    world = scene(back, front)
    assert referent(Phrase("dog", relation="in front of", landmark=Phrase("sofa")), world) == 1
    assert referent(Phrase("sofa", relation="behind", landmark=Phrase("dog")), world) == 0


def test_a_landmark_must_itself_be_one_object():
    world = scene(thing("dog", (100, 100, 140, 140)), thing("tree", (60, 90, 98, 140)), thing("tree", RIGHT))
    assert referent(Phrase("dog", relation="next to", landmark=Phrase("tree")), world) is None


def test_kinds():
    tree = Phrase("tree")
    assert Phrase("dog").kind == "noun"
    assert Phrase("dog", ("red",)).kind == "attribute"
    assert Phrase("man", (), (("shirt", "red"),)).kind == "part"
    assert Phrase("dog", ("red",), position="left").kind == "position"
    assert Phrase("dog", relation="next to", landmark=tree).kind == "relation"
    assert Phrase("dog", ("red",), relation="next to", landmark=tree).kind == "long"


def test_wording():
    rng = np.random.default_rng(0)
    phrase = Phrase("man", (), (("shirt", "green"), ("bag", "red")))
    assert say(phrase, rng) == "the man in the green shirt with the red bag"
    assert say(phrase, rng, telegraphic=True) == "man in green shirt with red bag"
    assert say(Phrase("elephant", ("orange",)), rng, article="a") == "an orange elephant"
    assert say(Phrase("girl", (), (("hair", "red"),)), rng) == "the girl with red hair"
    beside = Phrase("dog", relation="behind", landmark=Phrase("car", ("red",)))
    assert say(beside, rng).replace("standing ", "") == "the dog behind the red car"
    assert (wording.plural("bus"), wording.plural("woman"), wording.plural("cup")) == ("buses", "women", "cups")


@settings(max_examples=25)
@given(st.integers(0, 100_000))
def test_every_phrase_refers_to_its_object_alone(seed):
    rng = np.random.default_rng(seed)
    world = sample_scene(rng)
    index = int(rng.integers(len(world.objects)))
    found = 0
    for kind in KINDS:
        phrase = describe(world, index, kind, rng)
        if phrase is None:
            continue
        found += 1
        assert phrase.kind == kind
        assert truth(phrase, world).count(True) == 1
        text = say(phrase, rng, telegraphic=bool(rng.random() < 0.5))
        assert set(text.split()) <= set(wording.vocabulary())
        assert_reading_agrees(text, kind, world, index)
    assume(found)


def assert_reading_agrees(text: str, kind: str, world: Scene, index: int) -> None:
    """Read the sentence's words, without the phrase, and look for objects that fit; only the referent may."""
    words = text.removeprefix("the ").split()
    names = {noun: category for category in drawings() for noun in (category, *grammar.SYNONYMS.get(category, ()))}
    noun = next(word for word in words if word in names or word in grammar.GROUPS)
    members = set(grammar.GROUPS.get(noun, (names.get(noun),)))
    fitting = [i for i, other in enumerate(world.objects) if other.category in members and other.area >= 40]
    head = words[: words.index(noun)]
    for word in head:
        if word in COLORS:
            fitting = [i for i in fitting if world.objects[i].colors.get("main") == word]
        if word == "blond":
            fitting = [i for i in fitting if world.objects[i].colors.get("hair") == word]
        if word in ("striped", "spotted"):
            fitting = [i for i in fitting if world.objects[i].pattern == word]
    if kind in ("noun", "attribute", "part"):
        for color, part in re.findall(r"\b(?:in|with|and) (?:the )?(\w+) (\w+)", text):
            fitting = [
                i
                for i in fitting
                if part in world.objects[i].present
                and (world.objects[i].colors[part] == color or world.objects[i].pattern == color)
            ]
    if kind in ("noun", "part") or (kind == "attribute" and not {"big", "small", "large", "little"} & set(head)):
        assert fitting == [index], text
    assert index in fitting, text
    if kind == "position" and re.search(r"\bleft\b", text) and "with" not in words and "in" not in words:
        rivals = [world.mask(i).nonzero()[1].mean() for i in fitting if i != index]
        assert all(world.mask(index).nonzero()[1].mean() < rival + 16 for rival in rivals), text


def test_captions_are_true_and_use_known_words():
    known = set(wording.vocabulary())
    for seed in range(16):
        rng = np.random.default_rng([2, seed])
        world = sample_scene(rng) if seed % 2 else sample_object_image(rng, list(drawings())[seed % len(drawings())])
        sentences = pretraining.captions(world, rng)
        assert len(sentences) == pretraining.CAPTIONS
        present = {noun for other in world.objects for noun in grammar.nouns_of(other.category)}
        present |= {wording.plural(noun) for noun in present}
        nouns = {noun for category in drawings() for noun in grammar.nouns_of(category)}
        nouns |= {wording.plural(noun) for noun in nouns}
        for sentence in sentences:
            words = set(re.findall(r"[a-z]+", sentence))
            assert words <= known, sentence
            assert words & nouns <= present, sentence
