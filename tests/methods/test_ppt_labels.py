"""Pseudo-labels as arrays: nothing gets lost, and drawn points know whether they are on the object."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wris_lib.errors import WrisError
from wris_lib.methods.ppt.labels import MOST_DRAWN, UNKNOWN, Collector, draw_points, join, shrink


def square(left: int, top: int, side: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A mask of (height, width) `size`."""
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.fixture
def collected():
    collector = Collector(16)
    collector.add("the dog", 0, np.stack([square(0, 0, 20)]), 0)
    collector.add("the dog near the cat", 1, np.stack([square(8, 8, 16), square(40, 40, 12), square(0, 40, 24)]))
    collector.add("cat", 1, np.stack([square(3, 3, 1), square(40, 40, 12)]), 1)  # the first is too small for the grid
    collector.add("crumb", 1, np.stack([square(3, 3, 1), square(40, 40, 12)]), 0)  # and so is this referent
    return collector.finish()


def test_what_was_added_can_be_read(collected):
    assert collected.expressions == ("the dog", "the dog near the cat", "cat")
    assert collected.image.tolist() == [0, 1, 1] and collected.referent.tolist() == [0, UNKNOWN, 0]
    assert [len(collected.candidates(e)) for e in range(len(collected))] == [1, 3, 1]
    assert np.array_equal(collected.candidates(0)[0], square(0, 0, 5, (16, 16)))
    assert np.array_equal(collected.candidates(2)[0], square(10, 10, 3, (16, 16)))


def test_take_and_join_keep_what_belongs_together(collected):
    some = collected.take(np.array([2, 0]))
    assert some.expressions == ("cat", "the dog") and some.image.tolist() == [1, 0]
    joint = join([collected, some], [5, 2])
    assert joint.image.tolist() == [0, 1, 1, 6, 5]
    for e, (part, own) in enumerate([(collected, 0), (collected, 1), (collected, 2), (some, 0), (some, 1)]):
        assert joint.expressions[e] == part.expressions[own]
        assert np.array_equal(joint.candidates(e), part.candidates(own))
    assert len(collected.take(np.array([], dtype=int))) == 0


def test_a_batch_is_padded(collected):
    labels = collected.draw(np.array([1, 0]), 6, np.random.default_rng(0))
    assert labels.points.shape == (2, 3, 6, 2) and labels.masks.shape == (2, 3, 16, 16)
    assert labels.present.tolist() == [[True, True, True], [True, False, False]]
    assert labels.scores.tolist() == [[0, 0, 0], [1, 0, 0]]  # nobody knows yet which dog, or the cat
    selected = collected.with_referents(np.array([0, 2, 0]))
    assert selected.draw(np.array([1]), 6, np.random.default_rng(0)).scores.tolist() == [[0, 0, 1]]
    assert torch.equal(labels.masks[0], torch.from_numpy(collected.candidates(1)).float())


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(UNKNOWN, 8))
def test_of_many_candidates_the_referent_and_some_others_are_drawn(seed, count, referent):
    collector, squares = Collector(16), [square(4 * n, 0, 4, (64, 64)) for n in range(count)]
    collector.add("one of many", 0, np.stack(squares), min(referent, count - 1))
    labels = collector.finish().draw(np.array([0, 0]), 5, np.random.default_rng(seed))
    assert labels.present.tolist() == [[True] * min(count, MOST_DRAWN)] * 2
    cells = [{int(mask[0].argmax()) for mask in masks} for masks in labels.masks.numpy()]
    assert all(len(found) == min(count, MOST_DRAWN) and max(found) < count for found in cells)
    if referent == UNKNOWN:
        assert labels.scores.sum() == 0
    else:
        assert labels.scores.sum(dim=1).tolist() == [1, 1]
        chosen = labels.masks[labels.scores == 1][:, 0].argmax(dim=1)
        assert chosen.tolist() == [min(referent, count - 1)] * 2
    inside = labels.points[..., 0] * 16  # drawn in the box of the same candidate
    columns = labels.masks[:, :, 0].argmax(dim=2)[..., None]
    assert ((inside >= columns) & (inside <= columns + 1)).all()


def test_which_others_are_drawn_changes():
    collector = Collector(16)
    collector.add("one of many", 0, np.stack([square(4 * n, 0, 4) for n in range(9)]), 2)
    many = collector.finish().draw(np.zeros(60, dtype=int), 2, np.random.default_rng(0))
    assert set(many.masks[:, :, 0].argmax(dim=2).flatten().tolist()) == set(range(9))


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_points_fill_the_box_and_know_the_mask(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 9)) < 0.2
    mask[4, 5] = True
    points, labels = draw_points(mask, 200, rng)
    column, row = (points * [9, 12]).astype(int).T
    assert (mask[row, column] == labels).all()
    rows, columns = np.nonzero(mask)
    assert row.min() >= rows.min() and row.max() <= rows.max()
    assert column.min() >= columns.min() and column.max() <= columns.max()


def test_points_are_uniform_in_the_box():
    points, labels = draw_points(square(8, 0, 8, (16, 16)) ^ square(8, 0, 4, (16, 16)), 4000, np.random.default_rng(0))
    assert points.mean(axis=0) == pytest.approx([0.75, 0.25], abs=0.01)
    assert labels.mean() == pytest.approx(0.75, abs=0.03)  # a quarter of the box is not the object


def test_images_that_are_not_square():
    collector = Collector(16)
    collector.add("wide", 0, np.stack([square(64, 0, 32, (32, 96))]), 0)  # the right third
    wide = collector.finish()
    assert wide.extents.tolist() == [[1, pytest.approx(1 / 3)]]
    grid = wide.candidates(0)[0]
    assert grid[:5, 11:].all() and not grid[5:].any() and not grid[:, :10].any()
    points = wide.draw(np.array([0]), 500, np.random.default_rng(0)).points[0, 0]
    x, y = points.T  # shares of the image, not of the padded square
    assert x.min() >= 0.64 and x.max() <= 1 and y.min() < 0.1 and 0.9 < y.max() <= 1


def test_shrinking_a_thin_image_leaves_something():
    assert shrink(np.ones((1, 100), dtype=bool), 8).sum() == 8


def test_nothing_to_train_on():
    with pytest.raises(WrisError, match="no expression got a pseudo-label"):
        Collector(16).finish()
    with pytest.raises(WrisError, match="an empty mask has no box"):
        draw_points(np.zeros((4, 4), dtype=bool), 3, np.random.default_rng(0))
