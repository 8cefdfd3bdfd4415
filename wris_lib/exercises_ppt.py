"""Checks for the exercises of notebook 02, in the form of `wris_lib.exercises`."""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from wris_lib.checking import Answer, Wrong, array_of, call, exercise, likely_mistake, short
from wris_lib.evaluate import Mask

MANY = 4000  # points: their mean is then within 3 % of the box's sides, and the first 1 % of each side has some

Pairs = list[tuple[int, int]]


@exercise("draw_points")
def check_draw_points(answer: Answer) -> None:
    """`draw_points(mask, count, rng) -> points, labels`: what a generator shall learn from a pseudo-mask.

    `points` [count, 2] are (x, y) as shares of the mask's width and height, drawn uniformly from the mask's bounding
    box by the NumPy generator `rng`. `labels` [count] are 1 for points on the mask and 0 for the others.
    """
    rng = np.random.default_rng()
    one_pixel = np.zeros((20, 30), bool)
    one_pixel[7, 22] = True
    cases = [(f"for a mask like an L, box {_box_of(mask)}", mask) for mask in (_random_l(rng), _random_l(rng))]
    cases += [("for a mask of all pixels", np.ones((20, 30), bool)), ("for a mask of a single pixel", one_pixel)]
    for case, mask in cases:
        points, labels = _drawn(answer, f"{case} and count={MANY}", mask, MANY, seed=1)
        _check_places(case, mask, points)
        _check_labels(case, mask, points, labels)
    case, mask = cases[0]
    for count in (1, 7):
        first, again, other = (_drawn(answer, f"{case} and {count=}", mask, count, seed)[0] for seed in (1, 1, 2))
        if not np.array_equal(first, again) or np.array_equal(first, other):
            raise Wrong(
                f"{case} and {count=}, the points of two calls {'differ' if (first != again).any() else 'agree'}",
                "draw them from `rng`, and from nothing else, so that a seed can repeat them",
            )


def _drawn(answer: Answer, case: str, mask: Mask, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The learner's points [count, 2] and labels [count], if that is what they are."""
    result = call(answer, case, mask, count, np.random.default_rng(seed))
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Wrong(f"{case}, got {short(result)}, expected two things, points and labels", "`return points, labels`")
    arrays = []
    for name, values, shape in zip(("points", "labels"), result, ((count, 2), (count,)), strict=True):
        array = array_of(values, f"{case}, got {short(values)} as {name}, expected an array of shape {shape}")
        if array.shape != shape:
            hint = "one point (x, y) a row, so transpose it" if array.shape == (2, count) != shape else ""
            raise Wrong(f"{case}, got {name} of shape {array.shape}, expected {shape}", hint)
        if not np.isfinite(array).all():
            raise Wrong(f"{case}, some of the {name} are not finite")
        arrays.append(array)
    return arrays[0], arrays[1]


def _check_places(case: str, mask: Mask, points: np.ndarray) -> None:
    """Whether the points are uniform in the box."""
    size = np.array(mask.shape[::-1])
    low, high = (corner / size for corner in _corners(mask))
    side = high - low

    def spans(places: np.ndarray, first: np.ndarray, last: np.ndarray) -> bool:
        """Whether the places fill this range, and no more."""
        slack = 0.01 * (last - first)
        ends = places.min(axis=0), places.max(axis=0)
        return all((abs(end - wanted) <= slack).all() for end, wanted in zip(ends, (first, last), strict=True))

    with np.errstate(all="ignore"):
        whole = [len(np.unique(axis)) <= pixels + 2 for axis, pixels in zip(points.T, side * size, strict=True)]
        mistakes = [
            ("these are pixels; divide x by the width and y by the height", spans(points / size, low, high)),
            ("you probably swapped x and y", spans(points[:, ::-1], low, high)),
            (
                "you probably swapped width and height, or rows and columns",
                spans(points * size[::-1] / size, low, high) or spans(points[:, ::-1] * size[::-1] / size, low, high),
            ),
            ("these are whole pixels; `rng.uniform` draws every place in between, too", all(whole)),
            ("that is all of the image, not only the box", spans(points, np.zeros(2), np.ones(2))),
            (
                "the box ends behind its last column and row, one pixel later than their numbers say",
                spans(points, low, high - 1 / size),
            ),
        ]
    hint = next((mistake for mistake, made in mistakes if made), "")
    for axis, name in enumerate("xy"):
        got, expected = (points[:, axis].min(), points[:, axis].max()), (low[axis], high[axis])
        if not spans(points[:, axis : axis + 1], low[axis : axis + 1], high[axis : axis + 1]):
            found, wanted = (f"{a:.3f} to {b:.3f}" for a, b in (got, expected))
            raise Wrong(f"{case}, {name} goes from {found}, expected {wanted}", hint)
    if abs(np.corrcoef(points.T)[0, 1]) > 0.9:
        raise Wrong(f"{case}, x and y of a point go together", "each needs draws of its own")
    share, expected = _on(mask, points).mean(), mask[_slices(mask)].mean()
    if abs(share - expected) > 0.05:
        hint = "points of the box that are off the mask belong, too: they become negative" if share > expected else ""
        raise Wrong(f"{case}, {share:.0%} of the points are on the mask, as of the box's area are {expected:.0%}", hint)
    if (abs(points.mean(axis=0) - (low + high) / 2) > 0.03 * side).any():
        raise Wrong(f"{case}, the points are not uniform in the box: their mean is not its middle")


def _check_labels(case: str, mask: Mask, points: np.ndarray, labels: np.ndarray) -> None:
    expected = _on(mask, points)
    if np.array_equal(labels, expected):
        return
    if not np.isin(labels, (0, 1)).all():
        strange = labels[~np.isin(labels, (0, 1))][0]
        raise Wrong(f"{case}, got {strange:g} as a label, expected 1 (on the mask) or 0 (off it)")
    height, width = mask.shape
    x, y = (points * (width, height)).T
    rounded = mask[np.clip(y.round().astype(int), 0, height - 1), np.clip(x.round().astype(int), 0, width - 1)]
    swapped = mask[np.clip(x.astype(int), 0, height - 1), np.clip(y.astype(int), 0, width - 1)]
    mistakes = [
        ("1 is for points on the mask, 0 for those off it", ~expected),
        ("a point can be in the box and yet off the mask", np.ones_like(expected)),
        ("the pixel of a place is what int() leaves of it, nothing is rounded up", rounded),
        ("a mask is indexed by row and column, that is mask[y, x]", swapped),
    ]
    wrong = int((labels != expected).sum())
    first = int(np.argmax(labels != expected))
    column, row = int(x[first]), int(y[first])
    raise Wrong(
        f"{case}, {wrong} of {len(labels)} labels are wrong; the point in column {column} and row {row} is"
        f" {'on' if expected[first] else 'off'} the mask, and got {labels[first]:g}",
        likely_mistake(labels, mistakes),
    )


def _corners(mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the box's first pixel, and of the pixel behind its last, in pixels."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min()]), np.array([columns.max() + 1, rows.max() + 1])


def _box_of(mask: Mask) -> str:
    (x0, y0), (x1, y1) = _corners(mask)
    return f"columns {x0} to {x1 - 1} of {mask.shape[1]} and rows {y0} to {y1 - 1} of {mask.shape[0]}"


def _slices(mask: Mask) -> tuple[slice, slice]:
    (x0, y0), (x1, y1) = _corners(mask)
    return slice(y0, y1), slice(x0, x1)


def _on(mask: Mask, points: np.ndarray) -> np.ndarray:
    """Whether each place, in shares, is on the mask."""
    height, width = mask.shape
    x, y = (points * (width, height)).astype(int).T
    return mask[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]


def _random_l(rng: np.random.Generator) -> Mask:
    """A box of random place and size in a wide image, without a corner of it."""
    mask = np.zeros((20, 30), bool)
    left, top = rng.integers(11, 14), rng.integers(2, 5)
    width, height = rng.integers(10, 15), rng.integers(6, 10)
    mask[top : top + height, left : left + width] = True
    mask[top : top + height // 2, left : left + width // 2] = False
    return mask


@exercise("match")
def check_match(answer: Answer) -> None:
    """`match(costs) -> pairs`: which query answers for which pseudo-label.

    `costs` [K, Y] says how badly query k fits pseudo-label y; there are at least as many queries as pseudo-labels.
    Expected is a list of pairs (k, y): every pseudo-label gets a query, no query gets two, and the sum of the pairs'
    costs is as small as it can be. The order of the pairs does not matter.
    """
    rng = np.random.default_rng()
    cases = [
        np.array([[0.3], [0.1], [0.2]]),
        np.array([[0.2, 0.1], [0.3, 0.9], [0.8, 0.7]]),  # both want query 0
        np.array([[0.2, 0.1], [0.9, 0.3]]),  # whoever takes the cheapest first pays for it
        *(rng.random((queries, labels)).round(2) for queries, labels in ((6, 3), (4, 4), (5, 2), (16, 5), (3, 3))),
    ]
    for costs in cases:
        small = costs.size <= 18
        case = f"for costs {costs.tolist()}" if small else f"for random costs of shape {costs.shape}"
        result = call(answer, case, costs)
        pairs = _pairs(case, result, costs.shape)
        best = list(zip(*(numbers.tolist() for numbers in linear_sum_assignment(costs)), strict=True))
        queries, labels = zip(*pairs, strict=True) if pairs else ((), ())
        if missing := set(range(costs.shape[1])) - set(labels):
            raise Wrong(f"{case}, pseudo-label {min(missing)} gets no query")
        for name, numbers in (("query", queries), ("pseudo-label", labels)):
            if twice := [number for number in numbers if numbers.count(number) > 1]:
                hint = "the cheapest query of one may be the cheapest of another, too" if name == "query" else ""
                hint = hint or "the queries that are left over get none"
                raise Wrong(f"{case}, {name} {twice[0]} is in {numbers.count(twice[0])} pairs", hint)
        got, expected = (sum(costs[pair] for pair in chosen) for chosen in (pairs, best))
        if not np.isclose(got, expected):
            worst = linear_sum_assignment(costs, maximize=True)
            mistakes = [
                (
                    "one pseudo-label after the other is not enough: an early choice may cost a later one",
                    _in_turn(costs),
                ),
                ("the cheapest pair first is not enough: it may leave only costly ones", _cheapest_first(costs)),
                ("these are the largest costs", list(zip(*worst, strict=True))),
            ]
            hint = next((mistake for mistake, chosen in mistakes if sorted(chosen) == sorted(pairs)), "")
            better = f"; {sorted(best)} costs {expected:.2f}" if small else f", but {expected:.2f} is possible"
            raise Wrong(f"{case}, {sorted(pairs)} costs {got:.2f}{better}", hint)


@exercise("fool")
def check_fool(answer: Answer) -> None:
    """`fool() -> costs`: an input that breaks the plausible way to match, which takes the cheapest pair first.

    `costs` [K, Y] are finite, not negative and all different, with K ≥ Y. What the cheapest pair first costs in the end
    must be at least twice what the best matching costs.
    """
    costs = _matrix(call(answer, "without arguments"))
    case = f"for costs {costs.tolist()}" if costs.size <= 18 else f"for costs of shape {costs.shape}"
    greedy = sum(costs[pair] for pair in _cheapest_first(costs))
    best = costs[linear_sum_assignment(costs)].sum()
    if greedy >= 2 * best:
        return
    if greedy > best and not np.isclose(greedy, best):
        hint = "it errs, but not by enough: who goes without has to pay more"
        raise Wrong(f"{case}, the cheapest pair first pays {greedy:g}, where {best:g} would do", hint)
    if costs.shape[1] == 1:
        hint = "with a single object there is nobody whom the cheapest pair could be taken from"
    elif len(set(costs.argmin(axis=0))) == costs.shape[1]:
        hint = "each object has a cheapest query of its own; let two of them want the same"
    elif sum(costs[pair] for pair in _in_turn(costs)) > greedy:
        hint = "one object after the other would be fooled, but the cheapest pair is of the object that needs it"
    else:
        hint = "what is the next best for the object that goes without? Make that dear"
    raise Wrong(f"{case}, the cheapest pair first pays {greedy:g}, and nothing is cheaper", hint)


def _matrix(result: Any) -> np.ndarray:
    """The learner's costs, if that is what they are."""
    costs = array_of(result, f"got {short(result)}, expected an array [K, Y] of costs")
    if costs.ndim != 2 or costs.size == 0:
        raise Wrong(f"got shape {costs.shape}, expected [K, Y]", "a row for each query, a column for each object")
    if costs.shape[0] < costs.shape[1]:
        hint = "queries are rows, so transpose it or add a row"
        raise Wrong(f"got {costs.shape[0]} queries for {costs.shape[1]} objects, expected at least as many", hint)
    if not (np.isfinite(costs).all() and (costs >= 0).all()):
        raise Wrong("some of the costs are negative, or not finite", "a cost is 0 where a query fits perfectly")
    if len(np.unique(costs)) < costs.size:
        raise Wrong("two of the costs are the same", "which of them is taken first would be a matter of luck")
    return costs


def _pairs(case: str, result: Any, shape: tuple[int, ...]) -> Pairs:
    """The learner's pairs of whole numbers, if that is what they are."""
    expected = "expected a list of pairs (query, pseudo-label)"
    try:
        rows = [tuple(pair) for pair in result]
        pairs = [(int(k), int(y)) for k, y in rows]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        hint = "zip the two arrays: one pair a row" if isinstance(result, tuple) and len(result) == 2 else ""
        raise Wrong(f"{case}, got {short(result)}, {expected}", hint) from None
    if pairs != rows:
        raise Wrong(f"{case}, got {short(result)}, {expected}", "both are whole numbers, counted from 0")
    for k, y in pairs:
        if not _inside(k, y, shape):
            hint = "the query comes first, then the pseudo-label" if _inside(y, k, shape) else "they count from 0"
            numbers = f"{shape[0]} queries and {shape[1]} pseudo-label{'s' if shape[1] > 1 else ''}"
            raise Wrong(f"{case}, got the pair {(k, y)}, but there are {numbers}", hint)
    return pairs


def _inside(query: int, label: int, shape: tuple[int, ...]) -> bool:
    return 0 <= query < shape[0] and 0 <= label < shape[1]


def _in_turn(costs: np.ndarray) -> Pairs:
    """Each pseudo-label in turn takes the cheapest query that is left."""
    pairs: Pairs = []
    for label, column in enumerate(costs.T):
        taken = [query for query, _ in pairs]
        pairs.append((next(query for query in np.argsort(column).tolist() if query not in taken), label))
    return pairs


def _cheapest_first(costs: np.ndarray) -> Pairs:
    """The cheapest pair of all, then the cheapest of what is left."""
    pairs: Pairs = []
    for query, label in np.transpose(np.unravel_index(np.argsort(costs, axis=None), costs.shape)).tolist():
        if all(query != k and label != y for k, y in pairs):
            pairs.append((query, label))
    return pairs
