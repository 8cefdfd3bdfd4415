"""Notebook 02's exercises: a right answer passes, and each mistake that a learner is likely to make gets its hint."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.wrong_answers import changed, untouched
from wris_lib import exercises_ppt
from wris_lib.methods.ppt.labels import draw_points as library_draw_points
from wris_lib.methods.ppt.loss import LossWeights
from wris_lib.methods.ppt.loss import match as library_match


def draw_points(mask, count, rng):
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    x = rng.uniform(columns.min(), columns.max() + 1, count)
    y = rng.uniform(rows.min(), rows.max() + 1, count)
    labels = mask[y.astype(int), x.astype(int)].astype(float)
    return np.stack([x / width, y / height], axis=1), labels


def match(costs):
    queries, labels = linear_sum_assignment(costs)
    return list(zip(queries, labels, strict=True))


def in_turn(costs):
    chosen = []
    for label in range(costs.shape[1]):
        free = [query for query in range(len(costs)) if query not in chosen]
        chosen.append(min(free, key=lambda query: costs[query, label]))
    return [(query, label) for label, query in enumerate(chosen)]


def cheapest_first(costs):
    costs, pairs = costs.copy(), []
    for _ in range(costs.shape[1]):
        query, label = np.unravel_index(costs.argmin(), costs.shape)
        pairs.append((query, label))
        costs[query], costs[:, label] = np.inf, np.inf
    return pairs


def fool():
    return np.array([[1, 2], [3, 100]])


def slow_match(costs):
    from itertools import permutations

    queries, labels = costs.shape
    orders = permutations(range(queries), labels) if queries < 8 else [linear_sum_assignment(costs.T)[1]]
    best = min(orders, key=lambda order: sum(costs[query, label] for label, query in enumerate(order)))
    return {(query, label) for label, query in enumerate(best)}


RIGHT = {
    "draw_points": (exercises_ppt.check_draw_points, draw_points),
    "match": (exercises_ppt.check_match, match),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    check, answer = RIGHT[name]
    for _ in range(5):  # every call draws fresh inputs
        assert check(answer) is True
    assert capsys.readouterr().out == f"✔ {name} is right.\n" * 5


@pytest.mark.parametrize("answer", [slow_match, lambda costs: np.array(match(costs)), lambda costs: match(costs)[::-1]])
def test_other_right_ways_to_match_pass(answer, capsys):
    assert exercises_ppt.check_match(answer) is True


def test_a_list_of_true_and_false_will_do_as_labels(capsys):
    right = changed(draw_points, ".astype(float)\n", ".tolist()\n")
    assert exercises_ppt.check_draw_points(right) is True


@pytest.mark.parametrize("costs", [fool(), [[1, 2], [3, 9]], [[40, 90], [0, 5], [1, 30]]])
def test_costs_that_fool_the_cheapest_pair_first(costs, capsys):
    assert exercises_ppt.check_fool(lambda: costs) is True
    assert exercises_ppt.check_fool(untouched) is False
    assert capsys.readouterr().out.startswith("✔ fool is right.\n○ fool is still open")


@pytest.mark.parametrize("name", RIGHT)
def test_an_untouched_stub_is_open(name, capsys):
    check, _ = RIGHT[name]
    assert check(untouched) is False
    assert capsys.readouterr().out.startswith(f"○ {name} is still open")


def raising(*_, **__):
    raise KeyError("no\nsuch thing")


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda *_, **__: None, "got None: does every way through the function end in `return`?"),
        (raising, "it raised KeyError ('no\\nsuch thing')"),
        (lambda: 1, "it raised TypeError"),
        (lambda *_, **__: "nonsense", "got "),
        (lambda *_, **__: ("no", "good"), "got "),
        (lambda *_, **__: [[1], [1, 2]], "got "),
        (lambda *_, **__: object(), "got "),
        (lambda *_, **__: (np.zeros((4000, 2)), np.zeros(3)), "got "),
        (lambda *_, **__: (np.full((4000, 2), np.nan), np.zeros(4000)), "got "),
        (lambda *_, **__: np.zeros((0, 2)), "got "),
        (0.5, "got 0.5 instead of a function; pass"),
    ],
)
def test_anything_at_all_gets_one_line(name, answer, hint, capsys):
    check, _ = RIGHT[name]
    assert check(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {name}: ") and line.endswith(".")
    assert hint in line or "are not finite" in line or "gets no query" in line


X, Y = "rng.uniform(columns.min(), columns.max() + 1, count)", "rng.uniform(rows.min(), rows.max() + 1, count)"
POINTS, LABELS = "np.stack([x / width, y / height], axis=1)", "mask[y.astype(int), x.astype(int)].astype(float)"
REJECTED = (
    "    labels = ",
    "    chosen = rng.choice(len(rows), count)\n"
    "    x, y = (n[chosen] + rng.random(count) for n in (columns, rows))\n    labels = ",
)
STUBBORN = "(mask, count, rng):\n"
DRAWING_MISTAKES = [
    ((POINTS, "np.stack([x, y], axis=1)"), "these are pixels; divide x by the width"),
    ((POINTS, "np.stack([y / height, x / width], axis=1)"), "you probably swapped x and y"),
    ((POINTS, "np.stack([x / height, y / width], axis=1)"), "swapped width and height, or rows and columns"),
    (("height, width = mask", "width, height = mask"), "swapped width and height, or rows and columns"),
    (("rows, columns = np", "columns, rows = np", "y.astype(int), x", "x.astype(int), y"), "swapped"),
    ((X, "rng.uniform(0, width, count)", Y, "rng.uniform(0, height, count)"), "all of the image, not only the box"),
    ((".max() + 1", ".max()"), "the box ends behind its last column and row, one pixel later"),
    (("rng.uniform", "rng.integers"), "these are whole pixels; `rng.uniform` draws every place in between"),
    (REJECTED, "100% of the points are on the mask, as of the box's area are"),
    ((POINTS, f"{POINTS}.T"), "got points of shape (2, 4000), expected (4000, 2): one point (x, y) a row, so transp"),
    ((LABELS, f"1 - {LABELS}"), "1 is for points on the mask, 0 for those off it"),
    ((LABELS, "np.ones(count)"), "a point can be in the box and yet off the mask"),
    ((LABELS, f"2 * {LABELS} - 1"), "got -1 as a label, expected 1 (on the mask) or 0 (off it)"),
    (
        (LABELS, "mask[np.minimum(x.astype(int), height - 1), y.astype(int)]"),
        "a mask is indexed by row and column, that is mask[y, x]",
    ),
    (
        (LABELS, "mask[np.minimum(y.round().astype(int), height - 1), np.minimum(x.round().astype(int), width - 1)]"),
        "the pixel of a place is what int() leaves of it",
    ),
    ((LABELS, "mask[x.astype(int), y.astype(int)]"), "it raised IndexError"),
    (
        (f"y = {Y}", "y = rows.min() + (x - columns.min()) / (np.ptp(columns) + 1) * (np.ptp(rows) + 1)"),
        "x and y of a point go together: each needs draws of its own",
    ),
    ((STUBBORN, f"{STUBBORN}    rng = np.random.default_rng(0)\n"), "of two calls agree: draw them from `rng`"),
    ((STUBBORN, f"{STUBBORN}    rng = np.random.default_rng()\n"), "of two calls differ: draw them from `rng`"),
    (("return ", "return np.", f"{POINTS}, labels", f"{POINTS[3:]}"), "expected two things, points and labels"),
    (("return ", "return 1, *", f"{POINTS}, labels", f"({POINTS}, labels)"), "`return points, labels`"),
]
MATCHING_MISTAKES = [
    (
        ("linear_sum_assignment(costs)", "costs.argmin(axis=0), range(costs.shape[1])"),
        "query 0 is in 2 pairs: the cheapest query of one may be the cheapest of another",
    ),
    (
        ("linear_sum_assignment(costs)", "range(len(costs)), costs.argmin(axis=1)"),
        "pseudo-label 0 is in 3 pairs: the queries that are left over get none",
    ),
    (("(costs)\n", "(costs, maximize=True)\n"), "[(0, 0)] costs 0.30; [(1, 0)] costs 0.10: these are the larg"),
    (("zip(queries, labels,", "zip(labels, queries,"), "the pair (0, 1), but there are 3 queries and 1 pseudo-label:"),
    (("zip(queries, labels,", "zip(labels, queries,"), "the query comes first, then the pseudo-label"),
    (("list(zip(queries, labels, strict=True))", "(queries, labels)"), "zip the two arrays: one pair a row"),
    (("zip(queries, labels", "zip(queries + 1, labels + 1"), "they count from 0"),
    (("zip(queries, labels", "zip(queries + 0.5, labels"), "both are whole numbers, counted from 0"),
    (("strict=True))", "strict=True))[:1]"), "pseudo-label 0 gets no query"),
]
COSTS = "np.array([[1, 2], [3, 100]])"
FOOLING_MISTAKES = [
    ((COSTS, "[[1, 2], [3, 5]]"), "the cheapest pair first pays 6, where 5 would do: it errs, but not by enough"),
    ((COSTS, "[[1], [3]]"), "pays 1, and nothing is cheaper: with a single object there is nobody"),
    ((COSTS, "[[1, 9], [8, 2]]"), "each object has a cheapest query of its own; let two of them want the same"),
    ((COSTS, "[[0.2, 0.1], [0.3, 0.9]]"), "one object after the other would be fooled, but the cheapest pair is"),
    ((COSTS, "[[1, 2], [8, 3]]"), "pays 4, and nothing is cheaper: what is the next best for the object that goes"),
    ((COSTS, "[[1, 2, 7], [3, 100, 8]]"), "got 2 queries for 3 objects, expected at least as many: queries are rows"),
    ((COSTS, "[1, 2, 3]"), "got shape (3,), expected [K, Y]: a row for each query, a column for each object"),
    ((COSTS, "np.zeros((2, 0))"), "got shape (2, 0), expected [K, Y]"),
    ((COSTS, "[[1, 2], [3]]"), "expected an array [K, Y] of costs"),
    ((COSTS, "[[1, 2], [-3, 100]]"), "some of the costs are negative, or not finite: a cost is 0 where"),
    ((COSTS, "[[1, 2], [3, np.inf]]"), "some of the costs are negative, or not finite"),
    ((COSTS, "[[1, 1], [3, 100]]"), "two of the costs are the same: which of them is taken first would be a matter of"),
    ((f"return {COSTS}", "pass"), "got None: does every way through the function end in `return`?"),
]
MISTAKES = [
    *((exercises_ppt.check_fool, fool, *mistake) for mistake in FOOLING_MISTAKES),
    *((exercises_ppt.check_draw_points, draw_points, *mistake) for mistake in DRAWING_MISTAKES),
    *((exercises_ppt.check_match, match, *mistake) for mistake in MATCHING_MISTAKES),
]


@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    assert check(changed(right, *replacements)) is False
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer, hint",
    [
        (in_turn, "costs 0.90; [(0, 1), (1, 0)] costs 0.40: one pseudo-label after the other is not enough"),
        (cheapest_first, "costs 1.00; [(0, 0), (1, 1)] costs 0.50: the cheapest pair first is not enough"),
    ],
)
def test_greedy_ways_to_match(answer, hint, capsys):
    assert exercises_ppt.check_match(answer) is False
    assert hint in capsys.readouterr().out


def test_the_exercises_are_what_the_library_does():
    mask = np.zeros((9, 14), bool)
    mask[2:6, 3:11] = mask[6:8, 5:7] = True
    points, labels = draw_points(mask, 50, np.random.default_rng(4))
    theirs, their_labels = library_draw_points(mask, 50, np.random.default_rng(4))
    np.testing.assert_allclose(points, theirs, rtol=1e-6)
    np.testing.assert_array_equal(labels, their_labels)
    costs = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    found = library_match({"points": torch.from_numpy(costs)[None]}, torch.ones(1, 3, dtype=torch.bool), LossWeights())
    assert sorted(match(costs)) == sorted(zip(found.query.tolist(), found.label.tolist(), strict=True))
