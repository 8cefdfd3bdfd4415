"""Checks for the exercises in the notebooks.

In a notebook an exercise is three cells: a stub that the learner edits and that raises NotImplementedError, a line
`exercises.check_iou(iou)`, and a folded solution that ends in `assert exercises.check_iou(solution)`.

A check tries the learner's function on known cases and on fresh random ones. It prints one line, "✔ …" or what is
wrong in a concrete case, and returns whether all was right. It never raises, so that a notebook with open exercises
runs to its end.
"""

import sys
from numbers import Real

import numpy as np

from wris_lib import evaluate
from wris_lib.checking import Answer, Wrong, array_of, box, call, exercise, likely_mistake, random_box, short
from wris_lib.evaluate import Mask

KINDS = ("right", "part instead of whole", "wrong object", "something else")


@exercise("iou")
def check_iou(answer: Answer) -> None:
    """`iou(prediction, truth) -> float`: intersection over union of two masks bool [H, W]; 1 where both are empty."""
    rng = np.random.default_rng()
    empty, full = np.zeros((12, 16), bool), np.ones((12, 16), bool)
    one_empty = "two masks agree without a pixel only if both are empty"
    both_empty = "there is no union to divide by, but two empty masks agree, which counts as 1"
    # The numbers of pixels are such that no two mistakes have the same result.
    cases = [tuple(rng.permutation(192).reshape(12, 16) < pixels for pixels in (50, 110)) + ("",) for _ in range(5)]
    cases += [(full, empty, one_empty), (empty, full, one_empty), (empty, empty, both_empty)]
    for prediction, truth, hint in cases:
        p, t = int(prediction.sum()), int(truth.sum())
        shared, union = evaluate.overlap(prediction, truth)
        case = f"with {p} predicted and {t} true pixels, {shared} of them shared"
        got = call(answer, case, prediction, truth, hint=hint)
        if isinstance(got, bool) or not isinstance(got, Real) or abs(got) > sys.float_info.max:
            hint = "count pixels with .sum()" if isinstance(got, np.ndarray) else ""
            raise Wrong(f"{case}, got {short(got)}, expected a number from 0 to 1", hint)
        expected = evaluate.iou(prediction, truth)
        if np.isclose(got, expected):
            continue
        if shared:
            mistakes = [
                ("that is the intersection; divide it by the union", shared),
                ("that is the union over the intersection", union / shared),
                ("that is the Dice score; divide by the union", 2 * shared / (p + t)),
                ("the sum of both masks counts shared pixels twice, the union only once", shared / (p + t)),
                ("you divided by the prediction, not by the union", shared / p),
                ("you divided by the truth, not by the union", shared / t),
                ("you divided by all pixels of the image, not by the union", shared / truth.size),
                ("agreement about the background does not count in IoU", (prediction == truth).mean()),
                ("that is in percent", 100 * expected),
                ("that is what is missing to a perfect IoU", 1 - expected),
            ]
            hint = likely_mistake(got, mistakes)
        raise Wrong(f"{case}, got {got:.3f}, expected {expected:.3f}", hint)


@exercise("is_positional")
def check_is_positional(answer: Answer) -> None:
    """`is_positional(expression) -> bool`: whether the expression has a direction word.

    These are left, right, top, bottom, up, down, middle, center and centre, as whole words, in upper or lower case.
    """
    substring = "the letters occur inside another word; compare whole words"
    capital = "capitals do not matter; use .lower()"
    comma = "punctuation is no part of a word; look at what .split() gives, or use \\b in a regular expression"
    words = ("left", "right", "top", "bottom", "up", "down", "middle", "center", "centre")
    cases = [
        ("the man in the green shirt", "there is no direction word in it"),
        *((f"the dog on the {word} side", f"{word!r} is one of the direction words") for word in words),
        ("the bright lamp", substring),
        ("the boy with a cup", substring),
        ("the upright bottle on the laptop", substring),
        ("Left dog", capital),
        ("the cat in the MIDDLE", capital),
        ("the dog on the left, sitting", comma),
        ("the top-most kite", comma),
        ("second from the right.", comma),
    ]
    for expression, hint in cases:
        got = call(answer, f"for {expression!r}", expression)
        if not isinstance(got, bool | np.bool_):
            raise Wrong(f"for {expression!r}, got {short(got)}, expected True or False", "bool(…) makes one of it")
        expected = evaluate.is_position(expression)
        if got != expected:
            raise Wrong(f"for {expression!r}, got {bool(got)}, expected {expected}", hint)


@exercise("points_from_map")
def check_points_from_map(answer: Answer) -> None:
    """`points_from_map(response_map, width, height, threshold=0.8, most=10)`: where to point SAM at.

    `response_map` float [rows, columns] in [0, 1] covers an image of width × height pixels. Expected are the centres
    of the cells that reach the threshold, as (x, y) in pixels of the image, the best first, `most` at most: [N, 2].
    """
    rng = np.random.default_rng()
    rows, columns, cell = 4, 6, np.array([30, 20])
    for threshold, most in ((12 / 23, 20), (12 / 23, 3), (0.8, 10)):
        response_map = rng.permutation(rows * columns).reshape(rows, columns) / 23  # from 0 to 1, each value once
        case = f"for a 4 × 6 map over 180 × 80 pixels with {threshold=:.2f} and {most=}"
        options = {} if threshold == 0.8 else {"threshold": threshold, "most": most}  # 0.8 and 10 are the defaults
        answered = call(answer, case, response_map, 180, 80, **options)

        best_first = np.argsort(-response_map, axis=None)
        all_cells = np.stack([best_first % columns, best_first // columns], axis=1)
        all_centres = (all_cells + 0.5) * cell
        reached = int((response_map >= threshold).sum())
        n = min(reached, most)
        cells, expected = all_cells[:n], all_centres[:n]
        got = array_of(answered, f"{case}, got {short(answered)}, expected an array [N, 2] of points, nothing else")
        if got.ndim != 2 or got.shape[1] != 2:
            hint = "one point (x, y) a row" + (", so transpose it" if got.shape == (2, n) else "")
            raise Wrong(f"{case}, got shape {got.shape}, expected ({n}, 2)", hint)
        if got.shape == expected.shape and np.allclose(got, expected):
            continue

        in_cells = "that counts cells; a cell is width / columns pixels wide and height / rows high"
        corner = "that is a corner of the cell, not its centre"
        mistakes = [
            ("these are the right points, but the best has to come first", expected),
            (corner, cells * cell),
            (in_cells, cells),
            (in_cells, cells + 0.5),
            ("x goes with width / columns, y with height / rows", (cells + 0.5) * cell[::-1]),
            ("x counts columns and y counts rows, not the other way round", (cells[:, ::-1] + 0.5) * cell),
            ("you probably swapped x and y", expected[:, ::-1]),
            (f"you probably swapped x and y; {corner}", (cells * cell)[:, ::-1]),
            (f"you probably swapped x and y; {in_cells}", cells[:, ::-1]),
            (f"you probably swapped x and y; {in_cells}", cells[:, ::-1] + 0.5),
            ("these are the lowest values", all_centres[::-1][:n]),
            ("these are the lowest values", all_centres[rows * columns - most : reached]),
            (f"more than {most=}; keep the best", all_centres[:reached]),
            ("a cell that just reaches the threshold counts, too", all_centres[: reached - 1]),
            ("does the function use its threshold?", all_centres[: (response_map >= 0.8).sum()]),
        ]
        hint = likely_mistake(_sorted_rows(got), [(mistake, _sorted_rows(result)) for mistake, result in mistakes])
        if len(got) != n:
            raise Wrong(f"{case}, got {len(got)} points, expected {n}", hint)
        first = int(np.argmax(~np.isclose(got, expected).all(axis=1)))
        points = [f"({x:g}, {y:g})" for x, y in (got[first], expected[first])]
        raise Wrong(f"{case}, got {points[0]} as point {first + 1}, expected {points[1]}", hint)


def _sorted_rows(points: np.ndarray) -> np.ndarray:
    """The same points in an order that says nothing."""
    return points[np.lexsort(points.T)]


@exercise("classify_failure")
def check_classify_failure(answer: Answer) -> None:
    """`classify_failure(prediction, truth, others) -> str`: what became of a prediction.

    All masks are bool [H, W]; `others` lists the image's other objects. The answer is the first that holds:

    - "right": IoU of at least 0.5.
    - "part instead of whole": at least half of the prediction lies in the truth, and covers less than half of it.
    - "wrong object": one other object has more of the prediction than the truth has, and no less than the background.
    - "something else", which an empty prediction is, too.

    `wris_lib.evaluate.outcome` has the same definitions, and tells the last apart.
    """
    person, dog, cup, nothing = (
        box(4, 2, 12, 22),
        box(14, 10, 22, 20),
        box(14, 2, 20, 8),
        box(0, 0, 0, 0),
    )
    left = box(0, 0, 4, 20)  # background
    both = "count the one other object that has most of the prediction, not all of them together"
    cases = [
        ("the whole object", person, [dog, cup], ""),
        ("a prediction with an IoU of exactly 0.5", box(4, 2, 12, 12), [dog, cup], "0.5 is enough"),
        ("the object's upper third", box(4, 2, 12, 8), [dog, cup], ""),
        ("a part and some background", box(2, 8, 12, 14), [dog, cup], "half of it in the truth is enough"),
        ("another object", dog, [cup, dog], "try every one of the others"),
        ("another object and some background", box(13, 9, 23, 21), [dog, cup], "it need not fit well"),
        ("a third of the object and all of another", box(4, 2, 12, 8) | dog, [dog, cup], "the other has more of it"),
        ("an empty prediction", nothing, [dog, cup], "it is no part of anything"),
        ("all three objects and background", person | dog | cup | left, [dog, cup], "the truth has most of it"),
        ("half of the object and background", box(4, 10, 12, 22) | left, [dog, cup], "it covers half of the truth"),
        ("mostly background", box(14, 18, 24, 24), [dog, cup], "the background has more of it than the other object"),
        ("background in an image without other objects", box(14, 2, 20, 8), [], "there may be no others"),
        ("a corner of the object and more of the background", box(0, 2, 6, 8), [dog, cup], "most of it lies outside"),
        ("some of two other objects, and background", box(13, 5, 21, 13), [dog, cup], both),
    ]  # fmt: skip
    for name, prediction, others, hint in cases:
        _compare_kinds(answer, f"for {name}", prediction, person, others, hint)
    rng = np.random.default_rng()
    for _ in range(100):
        labels = np.zeros((24, 24), int)
        for label in (2, 3, 1):
            labels[random_box(rng)] = label
        prediction, truth, others = random_box(rng), labels == 1, [labels == 2, labels == 3]
        shares = [int((prediction & mask).sum()) for mask in (truth, *others, labels == 0)]
        case = "for {} predicted pixels in the truth, {} and {} in two others and {} in the background".format(*shares)
        case += f", where the truth has {truth.sum()}"
        _compare_kinds(answer, case, prediction, truth, others, "")


def _compare_kinds(answer: Answer, case: str, prediction: Mask, truth: Mask, others: list[Mask], hint: str) -> None:
    got = call(answer, case, prediction, truth, others, hint=hint)
    if not (isinstance(got, str) and got in KINDS):
        raise Wrong(f"{case}, got {short(got)}, expected one of {', '.join(map(repr, KINDS))}")
    outcome = evaluate.outcome(prediction, truth, others)
    expected = outcome if outcome in KINDS else KINDS[-1]
    if got != expected:
        raise Wrong(f"{case}, got {got!r}, expected {expected!r}", hint)


@exercise("two_names")
def check_two_names(answer: Answer) -> None:
    """`two_names() -> first, second, truth, others`: an input on which the rule of `classify_failure` is at its border.

    Two predictions, bool [H, W] like `truth` and each of the masks in the list `others`, that differ in a single pixel:
    the rule calls the first one "part instead of whole", and the second one "wrong object".
    """
    result = call(answer, "without arguments")
    if not isinstance(result, tuple | list) or len(result) != 4:
        raise Wrong(f"got {short(result)}, expected four things", "`return first, second, truth, others`")
    masks = (*result[:3], *(result[3] if isinstance(result[3], tuple | list) else [result[3]]))
    for mask in masks:
        if not (isinstance(mask, np.ndarray) and mask.dtype == bool and mask.ndim == 2):
            raise Wrong(f"got {short(mask)} as a mask, expected a boolean array [H, W]", "others is a list of such")
        if mask.shape != masks[0].shape:
            raise Wrong(f"got masks of shapes {masks[0].shape} and {mask.shape}, expected all of one picture")
    first, second, truth, *others = masks
    if np.any(np.sum([truth, *others], axis=0) > 1):
        raise Wrong("some pixel is of two objects", "what is seen at a pixel is one thing: masks do not overlap")
    if (differing := int((first != second).sum())) != 1:
        raise Wrong(f"the predictions differ in {differing} pixels, expected a single one")
    for name, prediction, expected in (("first", first, KINDS[1]), ("second", second, KINDS[2])):
        if (got := evaluate.outcome(prediction, truth, others)) != expected:
            shares = [int((prediction & mask).sum()) for mask in (truth, *others)]
            outside = int((prediction & ~np.any([truth, *others], axis=0)).sum())
            case = f"the {name} prediction has {shares[0]} of the truth's {truth.sum()} pixels"
            case += f", {max(shares[1:], default=0)} of another object and {outside} of the background"
            hints = {
                "right": "a failure has an IoU below 0.5",
                "leak": "a part covers less than half of the truth; make the truth larger",
                "noise": "leave the background out of it",
                KINDS[1]: "for a wrong object, it needs more of that than of the truth",
                KINDS[2]: "for a part, no less of it lies in the truth than elsewhere",
            }
            raise Wrong(f"{case}, so it is {got!r}, expected {expected!r}", hints.get(got, ""))
