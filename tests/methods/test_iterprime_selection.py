"""From a map to a mask: against loops over pixels, and each way in which the filter can let nothing pass."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wris_lib.errors import WrisError
from wris_lib.methods.iterprime.selection import choose, upsample


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def slow_upsample(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = grid.shape
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v, u = (y + 0.5) * rows / height - 0.5, (x + 0.5) * columns / width - 0.5
            for row in range(math.floor(v) - 1, math.floor(v) + 3):
                for column in range(math.floor(u) - 1, math.floor(u) + 3):
                    value = grid[min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)]
                    found[y, x] += cubic(v - row) * cubic(u - column) * value
    return (found - found.min()) / (found.max() - found.min())


def count_components(mask: np.ndarray) -> int:
    """By flooding: a pixel and those above, below, left and right of it belong together."""
    left, count = {tuple(place) for place in np.argwhere(mask)}, 0
    while left:
        count, border = count + 1, [left.pop()]
        while border:
            y, x = border.pop()
            for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if place in left:
                    left.remove(place)
                    border.append(place)
    return count


def slow_choose(response_map: np.ndarray, masks: np.ndarray, most: int = 12) -> tuple[int, list, list, bool]:
    height, width = response_map.shape
    scores, passed = [], []
    for mask in masks:
        total = area = 0.0
        peak = False
        for y in range(height):
            for x in range(width):
                if mask[y, x]:
                    area, total = area + 1, total + 1 + float(response_map[y, x])
                    peak = peak or response_map[y, x] > response_map.max() - 1e-6
        scores.append(total / area if area else 0.0)
        passed.append(bool(peak and count_components(mask) <= most))
    candidates = [number for number, each in enumerate(passed) if each] or list(range(len(masks)))
    best = candidates[0]
    for number in candidates:
        if scores[number] > scores[best]:
            best = number
    return best, scores, passed, not any(passed)


def check(response_map: np.ndarray, masks: np.ndarray, most: int = 12):
    found = choose(response_map.astype(np.float32), masks, most)
    index, scores, passed, fell_back = slow_choose(response_map.astype(np.float32), masks, most)
    assert (found.index, found.fell_back) == (index, fell_back)
    assert found.passed.tolist() == passed and found.passed.dtype == bool
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    return found


def box(shape: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def hill(height: int = 8, width: int = 10, y: int = 2, x: int = 3) -> np.ndarray:
    """Falls away from (x, y), where it is 1."""
    ys, xs = np.mgrid[:height, :width]
    return np.exp(-((ys - y) ** 2 + (xs - x) ** 2) / 8.0)


def specks(count: int, shape: tuple[int, int] = (8, 10)) -> np.ndarray:
    """So many single pixels that touch at corners at most, (3, 2) with the hill's peak among them."""
    mask = np.zeros(shape, dtype=bool)
    places = [(y, x) for y in range(shape[0]) for x in range(shape[1]) if (x + y) % 2 == 1]
    places.remove((2, 3))
    for place in [(2, 3), *places[: count - 1]]:
        mask[place] = True
    return mask


# ---------------------------------------------------------------------------------------------------------- upsampling


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (7, 9)), ((4, 4), (16, 12)), ((4, 3), (4, 3)), ((5, 5), (3, 2))])
def test_upsampling_is_bicubic(grid, size):
    coarse = np.random.default_rng(0).random(grid).astype(np.float32)
    found = upsample(torch.from_numpy(coarse), size)
    assert found.shape == size and found.dtype == np.float32 and found.min() == 0 and found.max() == 1
    np.testing.assert_allclose(found, slow_upsample(coarse, *size), atol=1e-5)


def test_a_flat_map_and_a_map_in_half_precision():
    assert not upsample(torch.zeros(3, 4), (6, 8)).any()
    half = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).half()
    assert np.array_equal(upsample(half, (6, 8)), upsample(half.float(), (6, 8)))


# ------------------------------------------------------------------------------------------------------------- choosing


def test_the_score_prefers_the_mask_that_the_map_fills():
    shape = (8, 10)
    masks = np.stack([box(shape, 0, 0, 8, 10), box(shape, 1, 2, 4, 5), box(shape, 5, 6, 8, 10)])
    found = check(hill(), masks)
    assert found.index == 1 and not found.fell_back and found.passed.tolist() == [True, True, False]
    assert (found.scores > 1).all() and (found.scores <= 2).all()


def test_without_the_peak_a_better_score_does_not_help():
    """It fits the slope well, but the peak lies beside it."""
    shape = (8, 10)
    masks = np.stack([box(shape, 0, 0, 8, 10), box(shape, 2, 4, 3, 5)])
    found = check(hill(), masks)
    assert found.scores[1] > found.scores[0] and found.index == 0


@pytest.mark.parametrize(("count", "passes"), [(1, True), (12, True), (13, False)])
def test_twelve_components_pass_and_thirteen_do_not(count, passes):
    scattered = specks(count)
    assert count_components(scattered) == count
    found = check(hill(), np.stack([scattered, box((8, 10), 0, 0, 8, 10)]))
    assert found.passed.tolist() == [passes, True] and found.index == (0 if passes else 1)


def test_pixels_that_touch_at_a_corner_are_two_components():
    diagonal = np.zeros((4, 4), dtype=bool)
    diagonal[1, 1] = diagonal[2, 2] = True
    peak = np.zeros((4, 4))
    peak[1, 1] = 1
    assert check(peak, diagonal[None], most=1).passed.tolist() == [False]
    assert check(peak, diagonal[None], most=2).passed.tolist() == [True]


@pytest.mark.parametrize("why", ["the peak lies beside them", "they lie scattered"])
def test_when_none_survives_the_best_of_all_is_taken_and_it_is_said(why):
    shape = (8, 10)
    masks = np.stack([box(shape, 5, 6, 8, 10), box(shape, 2, 4, 4, 6), box(shape, 0, 8, 2, 10)])
    if why == "they lie scattered":
        masks = np.stack([specks(30), specks(13), specks(40)])
    found = check(hill(), masks)
    assert found.fell_back and not found.passed.any() and found.index == found.scores.argmax() == 1


def test_of_equals_the_first_is_taken():
    shape = (8, 10)
    twice = box(shape, 1, 2, 4, 5)
    assert check(hill(), np.stack([box(shape, 0, 0, 8, 10), twice, twice])).index == 1
    left, right = box(shape, 0, 0, 8, 5), box(shape, 0, 5, 8, 10)
    even = hill(x=2) + hill(x=7)
    even = np.maximum(even, even[:, ::-1]).astype(np.float32)
    found = check(even, np.stack([right, left]))
    assert found.passed.all() and found.index == 0


def test_any_of_several_peaks_will_do():
    """Also where rounding sets them apart."""
    response_map = np.zeros((4, 6), dtype=np.float32)
    response_map[0, 0], response_map[3, 5] = 1, 1 - 5e-7
    masks = np.stack([box((4, 6), 3, 5, 4, 6), box((4, 6), 0, 0, 1, 1), box((4, 6), 1, 1, 3, 3)])
    assert check(response_map, masks).passed.tolist() == [True, True, False]


def test_in_an_all_zero_map_every_pixel_is_a_peak():
    shape = (8, 10)
    masks = np.stack([specks(13), box(shape, 5, 6, 8, 10), box(shape, 0, 0, 8, 10)])
    found = check(np.zeros(shape), masks)
    assert found.passed.tolist() == [False, True, True] and found.index == 1 and found.scores.tolist() == [1, 1, 1]


def test_an_empty_mask_is_chosen_last():
    empty, away = np.zeros((8, 10), dtype=bool), box((8, 10), 7, 9, 8, 10)
    found = check(hill(), np.stack([empty, away]))
    assert found.index == 1 and found.fell_back and found.scores[0] == 0
    assert check(hill(), empty[None]).scores.dtype == np.float64


@settings(max_examples=60)
@given(st.integers(0, 100_000), st.integers(1, 7), st.integers(1, 7), st.integers(1, 6), st.integers(0, 4))
def test_choosing_equals_the_loops(seed, height, width, count, most):
    rng = np.random.default_rng(seed)
    response_map = rng.integers(0, 4, (height, width)) / 3.0  # few levels: many ties
    masks = rng.random((count, height, width)) < rng.random((count, 1, 1))
    check(response_map, masks, most)


def test_proposals_of_another_size():
    with pytest.raises(WrisError, match="the proposals are 9×8 pixels and the map is 10×8; give proposals of the same"):
        choose(np.zeros((8, 10), dtype=np.float32), np.ones((2, 8, 9), dtype=bool))
