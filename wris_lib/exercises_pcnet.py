"""Checks for the exercises of the notebook about PCNet, in the form of `wris_lib.exercises`."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from wris_lib.checking import Answer, Wrong, call, exercise, likely_mistake, short
from wris_lib.methods.pcnet import loss
from wris_lib.methods.pcnet.decompose import repeat

CELLS = 60  # of the maps that are asked for
FOCUS = 3  # of `disambiguation`, as the exercise says it
FAR_UP = 1000.0  # exp(3 · 1000) is too large for any float


@exercise("order_cues")
def check_order_cues(answer: Answer) -> None:
    """`order_cues(cues, count) -> list[str]`: a cue for each of `count` stages.

    `cues` is a list of at least one text, the most general first. They are used in their order; where there are fewer
    than stages they come again from the first on, and where there are more the first ones are used.
    """
    man, shirt, car = "a man", "the man in the white shirt", "the man next to the car"
    cases = [
        ([man, shirt, car], 3),
        ([man, shirt], 5),
        ([man, shirt, car], 5),
        ([man], 4),
        ([shirt, man, car], 2),
        ([man, man, shirt], 5),  # a language model does say the same thing twice
    ]
    rng = np.random.default_rng()
    colors = ("red", "blue", "green", "white", "black", "yellow", "grey", "brown")
    for count in (2, 7, 9, 13):
        chosen = rng.choice(colors, rng.integers(2, 7))
        cases.append(([f"the {color} dog" for color in chosen.tolist()], count))
    for cues, count in cases:
        case = f"for {cues} and {count=}" if len(str(cues)) < 100 else f"for {len(cues)} cues and {count=}"
        got, expected = _texts(answer, case, cues, count), list(repeat(cues, count))
        if got == expected:
            continue
        # Whoever forgets to repeat, forgets to cut, or both.
        whole = cues * -(-count // len(cues))
        unique = list(dict.fromkeys(cues))
        mistakes = [
            ("that is too short; begin again with the first cue when the last was used", cues[:count]),
            ("after the last cue comes the first again, not the last once more", _last_repeated(cues, count)),
            ("where there are too many cues, the first are used, for they are the general ones", cues[-count:]),
            ("the whole list comes again, not each cue by itself", np.repeat(cues, -(-count // len(cues)))[:count]),
            ("the whole list comes again, not each cue by itself", np.repeat(cues, count)[:count]),
            ("that is too long; cut it after `count`", whole),
            ("that is too long; cut it after `count`", cues),
            ("that is too long: `count` is the number of texts, not of repetitions", cues * count),
            ("a cue that is in the list twice is used twice", list(repeat(unique, count))),
            ("that goes from the last cue to the first", list(repeat(cues[::-1], count))),
            ("that is not the order of the list, which must not be sorted", list(repeat(sorted(cues), count))),
            ("that is not the order of the list, which must not be sorted", list(repeat(sorted(unique), count))),
            ("that is the order of length, not of the list", list(repeat(sorted(cues, key=len), count))),
            ("the list starts with its first cue, cues[0]", list(repeat([*cues[1:], cues[0]], count))),
        ]
        hint = next((mistake for mistake, result in mistakes if list(result) == got), "")
        if len(got) != count:
            raise Wrong(f"{case}, got {len(got)} texts, expected {count}", hint)
        first = next(number for number in range(count) if got[number] != expected[number])
        raise Wrong(f"{case}, got {got[first]!r} in place {first + 1}, expected {expected[first]!r}", hint)


def _texts(answer: Answer, case: str, cues: list[str], count: int) -> list[str]:
    """The learner's texts, if that is what they are."""
    result = call(answer, case, cues, count)
    expected = f"expected a list of {count} texts"
    if isinstance(result, str):
        raise Wrong(f"{case}, got {short(result)}, {expected}", "one text for each stage, not one for all")
    if not isinstance(result, list | tuple | np.ndarray):
        raise Wrong(f"{case}, got {short(result)}, {expected}", "list(…) makes one of what can be gone through")
    texts = list(result)
    if strange := [each for each in texts if not isinstance(each, str)]:
        hint = "+ joins lists; .append puts a list into the list" if isinstance(strange[0], list) else ""
        raise Wrong(f"{case}, got {short(strange[0])} in the list, {expected}", hint)
    return texts


def _last_repeated(cues: list[str], count: int) -> list[str]:
    return [cues[min(number, len(cues) - 1)] for number in range(count)]


@exercise("ambiguity")
def check_ambiguity(answer: Answer) -> None:
    """`ambiguity(response, proposals) -> float`: 1 − (IoU(R, m_f) − IoU(R, m_b)), how much a response leaves in doubt.

    `response` R [n] is in [0, 1], `proposals` bool [P, n] has a mask a row. m_f is the proposal in which the response
    is strongest, that is which has the largest single value in it, and m_b the union of all others; with one proposal
    that is empty. IoU(R, m) = Σ R·m / Σ (R + m − R·m) takes the response as it is.
    """
    rng = np.random.default_rng()
    cases = [
        ("for a response that is all in one of two proposals", *_only_one(), "nothing is in doubt"),
        ("for a response of two equal halves, each in a proposal", *_two_alike(), "the two IoUs are equal"),
    ]
    for proposals in (3, 4, 5):
        cases.append((f"for a random response and {proposals} proposals", *_overlapping(rng, proposals), ""))
        cases.append((f"for a strong small and a weak large one of {proposals} proposals", *_small(rng, proposals), ""))
    cases.append(("for a single proposal", *_overlapping(rng, 1), "the union of no others is empty: its IoU is 0"))
    for case, response, proposals, hint in cases:
        got = _number(answer, case, response, proposals, hint=hint)
        expected = _ambiguity(response, proposals)
        _compare(case, got, expected, hint, _ambiguity_mistakes(response, proposals))


def _ambiguity(response: Float[np.ndarray, "n"], proposals: Bool[np.ndarray, "P n"]) -> float:
    """The library's."""
    tensors = torch.from_numpy(response)[None], torch.from_numpy(proposals)[None]
    return float(loss.ambiguity(*tensors, torch.ones(1, len(proposals), dtype=torch.bool)))


def _ambiguity_mistakes(
    response: Float[np.ndarray, "n"], proposals: Bool[np.ndarray, "P n"]
) -> Iterable[tuple[str, float]]:
    """What a learner may have done, and the result of it."""
    inside = np.where(proposals, response, 0)
    first = int(inside.max(axis=1).argmax())
    front, others = proposals[first], np.delete(proposals, first, axis=0)
    back = others.any(axis=0)
    yours, theirs = _soft_iou(response, front), _soft_iou(response, back)
    each = [_soft_iou(response, mask) for mask in others] or [0.0]

    def doubt(chosen: int) -> float:
        rest = np.delete(proposals, chosen, axis=0).any(axis=0)
        return 1 - (_soft_iou(response, proposals[chosen]) - _soft_iou(response, rest))

    hard = (response > 0.5).astype(float)
    by_sum = "the strongest is where the largest single value is, .max(); not where the sum, mean or IoU is largest"
    cut = "the response is not cut at 0.5; 0.3 counts as 0.3 of a cell"
    union = "the background is the union of the others, any(axis=0), compared once"
    divide = "divide by Σ (R + m − R·m): what both have counts once"
    # With thresholds the strongest cell is hard to tell: the learner may have looked for it before or after.
    hard_first = int(np.where(proposals, hard, 0).max(axis=1).argmax())
    hard_rest = np.delete(proposals, hard_first, axis=0).any(axis=0)
    best = int(np.argmax([_soft_iou(response, mask) for mask in proposals]))
    products = [float((response * mask).sum()) for mask in (front, back)]
    totals = [float(response.sum() + mask.sum()) for mask in (front, back)]
    ratios = [both / max(total, 1e-9) for both, total in zip(products, totals, strict=True)]
    return [
        ("the '1 −' is missing", yours - theirs),
        ("it is 1 minus the difference; that is 1 plus it", 1 + yours - theirs),
        (cut, 1 - (_soft_iou(hard, front) - _soft_iou(hard, back))),
        (cut, 1 - (_soft_iou(hard, proposals[hard_first]) - _soft_iou(hard, hard_rest))),
        (f"{union}; not the mean of their IoUs", 1 - (yours - float(np.mean(each)))),
        (f"{union}; not the largest of their IoUs", 1 - (yours - max(each))),
        (f"{union}; not the sum of their IoUs", 1 - (yours - sum(each))),
        (f"{union}; not their mean", 1 - (yours - _soft_iou(response, _mean(others)))),
        (
            f"{union}; not their sum, in which some cells count twice",
            1 - (yours - _soft_iou(response, others.sum(0))),
        ),
        ("the background are the other proposals, not all of the rest", 1 - (yours - _soft_iou(response, ~front))),
        (
            "the background is the union of the others, without the strongest",
            1 - (yours - _soft_iou(response, proposals.any(axis=0))),
        ),
        (
            "the others keep what they share with the strongest",
            1 - (yours - _soft_iou(response, back & ~front)),
        ),
        ("the IoU with the others is missing", 1 - yours),
        (by_sum, doubt(int(inside.sum(axis=1).argmax()))),
        (by_sum, doubt(best)),
        (
            by_sum,
            doubt(int((inside.sum(axis=1) / np.maximum(proposals.sum(axis=1), 1)).argmax())),
        ),
        ("that takes the first proposal; the strongest may be another one", doubt(0)),
        (divide, 1 - (ratios[0] - ratios[1])),
        (divide, 1 - 2 * (ratios[0] - ratios[1])),
        ("that is without a division: an IoU is divided by the union", 1 - (products[0] - products[1])),
    ]


def _soft_iou(response: np.ndarray, mask: np.ndarray) -> float:
    """Σ R·m / Σ (R + m − R·m); 0 when both are empty."""
    both = float((response * mask).sum())
    return both / max(float(response.sum() + mask.sum()) - both, 1e-6)


def _mean(masks: np.ndarray) -> np.ndarray:
    return masks.mean(axis=0) if len(masks) else np.zeros(masks.shape[1])


def _only_one() -> tuple[np.ndarray, np.ndarray]:
    proposals = np.zeros((2, CELLS), bool)
    proposals[0, 30:50] = proposals[1, 5:15] = True
    return proposals[0].astype(float), proposals


def _two_alike() -> tuple[np.ndarray, np.ndarray]:
    proposals = np.zeros((2, CELLS), bool)
    proposals[0, 5:15] = proposals[1, 30:40] = True
    return 0.75 * proposals.any(axis=0), proposals


def _overlapping(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks of about half the cells. The strongest cell is in one of them alone; the first of several is weakest."""
    proposals, response = rng.random((count, CELLS)) < 0.5, rng.uniform(0, 0.8, CELLS)
    cell, owner = rng.integers(CELLS), 0
    if count > 1:
        owner = int(rng.integers(1, count))
        proposals[0] &= rng.random(CELLS) < 0.5
        response[proposals[0]] *= 0.3
    proposals[:, cell] = np.arange(count) == owner
    response[cell] = 1
    return response, proposals


def _small(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The strongest cell is in a small mask, where little else answers: sum and mean are larger in another."""
    response, proposals = _overlapping(rng, count)
    cell = int(response.argmax())
    cells = (cell + np.arange(6)) % CELLS
    proposals[proposals[:, cell], :] = np.isin(np.arange(CELLS), cells)
    response[cells[1:]] = 0.01
    return response, proposals


@exercise("disambiguation")
def check_disambiguation(answer: Answer) -> None:
    """`disambiguation(own, other) -> float`: how much two sentences about one image are answered in the same place.

    `own` and `other` [n] are the scores S of two sentences, positive and negative numbers of any size. The answer is
    the cosine between softmax(3 · own) and softmax(3 · other): 1 for equal maps, 0 for maps that do not meet.
    """
    rng = np.random.default_rng()
    level = "a number that is added to all scores changes nothing in a softmax"
    same, peaked = rng.uniform(-2, 2, CELLS), np.full((2, CELLS), -3.0)
    peaked[0, 7] = peaked[1, 31] = 3
    cases = []
    for size in (0.5, 1, 1.5, 1):
        own, other = rng.uniform(-size, size, (2, CELLS))
        cases.append((f"for random scores between {-size:g} and {size:g}", own, other, ""))
    cases.append(("for two equal maps", same, same.copy(), "that is 1"))
    cases.append(("for two peaks apart", *peaked, "that is about 0"))
    own, other = rng.uniform(-1, 1, (2, CELLS))
    cases.append(("for scores of which one map lies 2 higher", own + 2, other, level))
    overflow = "exp of so large a number is inf; subtract the largest score before exp, which changes no softmax"
    underflow = "exp of so small a number is 0; subtract the largest score before exp, which changes no softmax"
    cases.append((f"for scores around {FAR_UP:g}", own + FAR_UP, other + FAR_UP, overflow))
    cases.append((f"for scores around {-FAR_UP:g}", own - FAR_UP, other - FAR_UP, underflow))
    for case, own, other, hint in cases:
        got = _number(answer, case, own, other, hint=hint)
        expected = float(loss.disambiguation(torch.from_numpy(own)[None], torch.from_numpy(other)[None, None]))
        mistakes = () if hint in (overflow, underflow) else _disambiguation_mistakes(own, other)
        _compare(case, got, expected, hint, mistakes)


def _disambiguation_mistakes(own: Float[np.ndarray, "n"], other: Float[np.ndarray, "n"]) -> Iterable[tuple[str, float]]:
    """What a learner may have done, and the result of it."""
    one, two = _softmax(FOCUS * own), _softmax(FOCUS * other)
    sharpness = "is the softmax that of 3 times the scores"
    squared = float(one @ two / (one @ one) / (two @ two))
    found = [
        ("that is the cosine of the scores themselves; take the softmax of both first", _cosine(own, other)),
        (
            "that is the cosine of what is above 0; take the softmax of both instead",
            _cosine(own.clip(0), other.clip(0)),
        ),
        ("that is the product without the lengths: a cosine divides it by both", float(one @ two)),
        ("a cosine divides by both lengths, that is by their product", float(one @ two) / float(one @ one)),
        ("a cosine divides by both lengths, that is by their product", float(one @ two) / float(two @ two)),
        (
            "a length is the root of the sum of squares; the root is missing",
            squared,
        ),
        ("that takes 3 · softmax(scores), not softmax(3 · scores)", _cosine(_softmax(own), _softmax(other))),
        ("that is 1 minus the cosine, a distance", 1 - _cosine(one, two)),
        ("that is minus the cosine", -_cosine(one, two)),
        ("that is the distance of the two, not their cosine", float(np.linalg.norm(one - two))),
        ("that compares the peaks alone", float(own.argmax() == other.argmax())),
        ("that compares the peaks alone", 2.0 * float(own.argmax() == other.argmax()) - 1),
        (f"{sharpness}? That is of the scores divided by 3", _cosine(_softmax(own / FOCUS), _softmax(other / FOCUS))),
        ("only one of the two is made three times as sharp", _cosine(one, _softmax(other))),
        ("only one of the two is made three times as sharp", _cosine(_softmax(own), two)),
    ]
    for factor in (2, 4, 5, 6, 9, 10, 20):
        wrong = _cosine(_softmax(factor * own), _softmax(factor * other))
        found.append((f"{sharpness}? That is of {factor} times", wrong))
    return found


def _softmax(scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def _cosine(one: Float[np.ndarray, "n"], two: Float[np.ndarray, "n"]) -> float:
    return float(one @ two / max(np.linalg.norm(one) * np.linalg.norm(two), 1e-12))


def _number(answer: Answer, case: str, *arguments: Any, hint: str) -> float:
    """The learner's result, which must be a number."""
    got = call(answer, case, *arguments, hint=hint)
    if isinstance(got, bool) or not isinstance(got, Real):
        single = getattr(got, "shape", None) in ((), (1,))
        raise Wrong(f"{case}, got {short(got)}, expected a number", "float(…) makes one of it" if single else "")
    try:
        return float(got)
    except OverflowError:
        raise Wrong(f"{case}, got a number that is too large for a float") from None


def _compare(case: str, got: float, expected: float, hint: str, mistakes: Iterable[tuple[str, float]]) -> None:
    """Complain where a number is another than expected; a known mistake says more than the case's own hint."""
    if not np.isclose(got, expected, rtol=1e-4, atol=1e-6):
        known = likely_mistake(got, mistakes) if np.isfinite(got) else ""
        raise Wrong(f"{case}, got {got:.3f}, expected {expected:.3f}", known or hint)
