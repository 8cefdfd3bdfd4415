"""Composed scenes: pixels and masks go together, and every sentence is true of one object only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wris_lib.methods.ppt.compose import (
    PLACES,
    RELATIONS,
    ComposedScene,
    ObjectPicture,
    compose,
    fuse,
    place,
    sentences,
)

COLORS = {"dog": (250, 0, 0), "cat": (0, 250, 0), "car": (0, 0, 250)}


def picture(name: str, left: int = 20, top: int = 10, width: int = 40, height: int = 30) -> ObjectPicture:
    """A rectangle of the class's colour on grey."""
    image, mask = np.full((64, 96, 3), 128, dtype=np.uint8), np.zeros((64, 96), dtype=bool)
    mask[top : top + height, left : left + width] = True
    image[mask] = COLORS[name]
    return ObjectPicture(image, mask, name)


def scene_of(*objects: tuple[str, int, int], covers=()) -> ComposedScene:
    """Squares of 20 pixels around (x, y) in a picture of 100."""
    masks = np.zeros((len(objects), 100, 100), dtype=bool)
    for mask, (_, x, y) in zip(masks, objects, strict=True):
        mask[y - 10 : y + 10, x - 10 : x + 10] = True
    return ComposedScene(
        np.zeros((100, 100, 3), np.uint8), masks, tuple(name for name, _, _ in objects), frozenset(covers)
    )


def all_sentences(scene: ComposedScene) -> dict[int, set[str]]:
    """Whatever can be said, gathered over many draws."""
    said = [pair for seed in range(60) for pair in sentences(scene, np.random.default_rng(seed))]
    return {index: {text for text, other in said if other == index} for index in range(len(scene.names))}


@pytest.mark.parametrize("make", [compose, fuse])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_every_object_has_its_colour_where_its_mask_is(make, count):
    names = ["dog", "cat", "car", "dog", "cat", "car"][:count]
    scene = make([picture(name) for name in names], 120, np.random.default_rng(count))
    assert scene.image.shape == (120, 120, 3) and scene.masks.shape[1:] == (120, 120)
    assert scene.masks.sum(axis=0).max() == 1  # no pixel belongs to two objects
    for mask, name in zip(scene.masks, scene.names, strict=True):
        distance = np.abs(scene.image[mask].astype(int) - COLORS[name]).max(axis=1)
        assert mask.sum() > 100 and np.mean(distance < 60) > 0.8  # scaling blurs the rim
    if make is compose:
        assert scene.names == tuple(names) and not scene.covers


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(8, 60), st.integers(8, 50))
def test_a_placed_object_is_seen_whole(seed, width, height):
    scene = place(picture("dog", 5, 5, width, height), 64, np.random.default_rng(seed))
    assert scene.image.shape == (64, 64, 3) and scene.masks.shape == (1, 64, 64) and scene.names == ("dog",)
    seen = scene.masks[0].sum() / (width * height)
    assert seen > 0.55  # up to a third of the width is lost to the square
    assert seen < 1.5**2 * 1.6


def test_the_same_seed_gives_the_same_scene():
    pictures = [picture(name) for name in ("dog", "cat", "car", "dog")]
    for make in (compose, fuse):
        first, again, other = (make(pictures, 96, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert (first.image == again.image).all() and (first.masks == again.masks).all()
        assert (first.image != other.image).any()


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_fusion_hides_no_object_too_much_and_knows_who_covers_whom(seed):
    rng = np.random.default_rng(seed)
    scene = fuse([picture("dog"), *(picture("cat", width=60) for _ in range(4))], 128, rng)
    for upper, lower in scene.covers:
        assert upper > lower  # painted later
    for index, mask in enumerate(scene.masks):
        if not any(lower == index for _, lower in scene.covers):
            ys, xs = np.nonzero(mask)
            assert mask.sum() == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)  # an uncovered rectangle is whole
    assert len(scene.masks) == len(scene.names) >= 1


def test_objects_that_leave_no_room_are_left_out():
    huge = picture("dog", 0, 0, 96, 64)  # everything pasted lies on it
    scene = fuse([huge, *(picture("cat", 0, 0, 60, 60) for _ in range(12))], 100, np.random.default_rng(0))
    assert scene.masks[0].sum() >= 0.6 * 100 * 100 and len(scene.names) < 13


def test_what_is_said_of_two_dogs_and_a_cat():
    said = all_sentences(scene_of(("dog", 20, 50), ("dog", 80, 50), ("cat", 50, 10)))
    left, right = PLACES["left"], PLACES["right"]
    assert {text.format("dog") for text in left} <= said[0] and {text.format("dog") for text in right} <= said[1]
    assert {"the cat", "cat", "the cat at the top"} <= said[2]
    assert not any("cat" not in text and text in said[1] for text in said[0])  # nothing fits both dogs
    assert {"the dog", "dog"} & (said[0] | said[1]) == set()
    assert said[0] == {text.format("dog") for text in left}  # up, down and "left of the cat" are not clear enough


def test_relations_are_said_where_they_are_clear():
    said = all_sentences(scene_of(("dog", 30, 20), ("dog", 62, 80), ("cat", 70, 22)))
    assert {text.format("dog", "cat") for text in RELATIONS["left"]} <= said[0]
    assert not {text.format("dog", "cat") for text in RELATIONS["left"]} & said[1]  # it is rather below
    near = {text.format("dog", "cat") for text in RELATIONS["near"]}
    assert not near & said[0]
    touching = scene_of(("dog", 30, 20), ("dog", 30, 80), ("cat", 52, 22), covers=[(2, 0)])
    assert near <= all_sentences(touching)[0]
    assert {text.format("cat", "car") for text in RELATIONS["front"]} & all_sentences(touching)[2] == set()
    assert {text.format("dog", "cat") for text in RELATIONS["behind"]} <= all_sentences(touching)[0]


def test_the_middle_and_what_is_too_small():
    said = all_sentences(scene_of(("dog", 50, 52), ("dog", 85, 50)))
    assert {text.format("dog") for text in PLACES["middle"]} <= said[0]
    assert all_sentences(scene_of(("dog", 50, 50), ("dog", 68, 50)))[0].isdisjoint(
        text.format("dog") for text in PLACES["middle"]
    )  # the other one is nearly there as well
    small = scene_of(("dog", 20, 50), ("cat", 80, 50))
    small.masks[1] = False
    small.masks[1, 50, 80] = True
    assert all_sentences(small)[1] == set()


@settings(max_examples=12)
@given(st.integers(0, 10_000))
def test_no_sentence_is_said_of_two_objects(seed):
    rng = np.random.default_rng(seed)
    names = rng.choice(list(COLORS), int(rng.integers(2, 7)))
    make = (compose, fuse)[seed % 2]
    said = all_sentences(make([picture(name) for name in names], 96, rng))
    for index, texts in said.items():
        for other in range(index):
            assert texts.isdisjoint(said[other])
