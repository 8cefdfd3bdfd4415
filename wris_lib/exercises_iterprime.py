"""Checks for the exercises of the notebook about IteRPrimE, in the form of `wris_lib.exercises`."""

from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from wris_lib.checking import Answer, Wrong, array_of, box, call, exercise, likely_mistake, random_box, short

GUARD = 1e-8  # in place of a norm of 0
STEEPNESS, MIDDLE = 20, 0.5  # of the sigmoid in σ

Mistakes = list[tuple[str, Any]]


@exercise("primary_difference")
def check_primary_difference(answer: Answer) -> None:
    """`primary_difference(A_m, A_c) -> A_dif`: in which the primary word's attention differs from the other words'.

    `A_m` [heads, N] is the attention to N patches, as the mean over the primary word's pieces; `A_c` [heads, C, N] that
    of C ≥ 1 context pieces. A_dif [heads, C, N] is (A_m − A_c) / ‖A_m − A_c‖. The norm goes over the C tokens: it is
    the root of their sum of squares, one for each head and patch. Where it is 0, divide by 1e-8.
    """
    rng = np.random.default_rng()
    cases = []
    for heads, count, patches in ((2, 3, 12), (3, 5, 16), (4, 2, 9)):
        primary, context = _attention(rng, heads, patches), _attention(rng, heads, count, patches)
        cases.append((f"for random attention of {heads} heads and {count} context tokens", primary, context, ""))
    one = "with a single context token the norm is the size of its own difference, so that only 1 and −1 are left"
    primary, context = _attention(rng, 3, 12), _attention(rng, 3, 1, 12)
    cases.append(("for a single context token", primary, context, one))
    zero = f"0 / 0 is no number; where the norm is 0, divide by {GUARD:g}"
    primary, context = _attention(rng, 2, 12), _attention(rng, 2, 3, 12)
    context[:, :, 5:7] = primary[:, None, 5:7]
    cases.append(("for two patches to which all words attend alike", primary, context, zero))
    shapes = "x[:, None] makes [heads, 1, N] of [heads, N], which goes with [heads, C, N]"
    for case, primary, context, hint in cases:
        got = _array(call(answer, case, primary, context, hint=hint or shapes), case, "A_dif", context.shape)
        expected = _difference(primary, context)
        if not _agree(got, expected):
            known = likely_mistake(got, _difference_mistakes(primary, context, expected))
            raise Wrong(f"{case}, {_worst(got, expected, ('head', 'token', 'patch'))}", known or hint)


def _attention(rng: np.random.Generator, *shape: int) -> Float[np.ndarray, "..."]:
    """Attention to all patches is 1 in sum."""
    weights = rng.uniform(0.1, 1, shape)
    return weights / weights.sum(axis=-1, keepdims=True)


def _difference(
    primary: Float[np.ndarray, "heads N"], context: Float[np.ndarray, "heads C N"]
) -> Float[np.ndarray, "heads C N"]:
    found = np.empty_like(context)
    for head, patch in np.ndindex(primary.shape):
        differences = primary[head, patch] - context[head, :, patch]
        found[head, :, patch] = differences / (np.sqrt((differences**2).sum()) or GUARD)
    return found


def _difference_mistakes(primary: np.ndarray, context: np.ndarray, expected: np.ndarray) -> Mistakes:
    """What a learner may have done, and the result of it."""
    plain = primary[:, None] - context

    def over(axis: int | tuple[int, ...]) -> np.ndarray:
        return np.sqrt((plain**2).sum(axis=axis, keepdims=True))

    sums = (plain**2).sum(axis=1, keepdims=True)
    axes = "the norm goes over the tokens, axis 1 of [heads, C, N]"
    square = "the norm is the root of the sum of squares"
    difference = "the norm is that of the difference"
    with np.errstate(all="ignore"):
        return [
            ("that is A_c − A_m; the primary word comes first", -expected),
            ("the division by the norm is missing", plain),
            ("that is A_c − A_m, and the division by the norm is missing", -plain),
            (f"{axes}; that one goes over the patches", plain / over(2)),
            (f"{axes}; that one goes over the heads", plain / over(0)),
            (f"{axes}; that one goes over tokens and patches", plain / over((1, 2))),
            (f"{axes}; that one goes over everything", plain / over((0, 1, 2))),
            (f"{square}; the root is missing", plain / sums),
            (f"{square}, not of their mean", plain / np.sqrt((plain**2).mean(axis=1, keepdims=True))),
            (f"{square}, not the sum of sizes", plain / abs(plain).sum(axis=1, keepdims=True)),
            (f"{difference}, not of A_c", plain / np.sqrt((context**2).sum(axis=1, keepdims=True))),
            (f"{difference}, not of A_m", plain / np.sqrt((primary**2).sum(axis=-1))[:, None, None]),
            ("the signs are lost: where a context word attends more, the difference is negative", abs(expected)),
            ("what is negative counts, too; nothing is cut at 0", expected.clip(0)),
        ]


@exercise("next_pass")
def check_next_pass(answer: Answer) -> None:
    """`next_pass(E, H, visible, decay, threshold) -> (E_new, visible_new)`: what a look leaves for the next one.

    `E` [N] is the average of the maps so far and `H` [N] the map of this look, both in [0, 1]; `visible` bool [N] says
    which patches this look could see. The new average is λE + (1 − λ)H with λ = `decay`. Of the visible patches those
    stay visible where σ(H) is less than `threshold`; σ(x) = s(x) / max s(x) with s(x) = sigmoid(20 (x − 0.5)).
    """
    rng = np.random.default_rng()
    levels, everything = np.linspace(0, 1, 24), np.ones(24, bool)
    weak = "the largest s may be far below 1; σ divides by it, so that the strongest patch is always hidden"
    strict = "σ is 1 at the strongest patch, and 1 is not less than 1"
    # What, how high the map reaches, what was visible (None: half of it), λ, θ, and a hint.
    cases = [
        ("a second look", 1.0, None, 0.3, 0.9, ""),
        ("a second look", 1.0, None, 0.8, 0.5, ""),
        ("a first look", 1.0, everything, 0.8, 0.5, ""),
        ("a map that reaches 0.4 only", 0.4, None, 0.8, 0.5, weak),
        ("a threshold of 1", 1.0, everything, 0.8, 1.0, strict),
        ("a decay of 0", 1.0, None, 0.0, 0.2, "with λ = 0 the new map is all"),
        ("a decay of 1", 1.0, None, 1.0, 0.2, "with λ = 1 the old average is all"),
    ]
    for name, height, visible, decay, threshold, hint in cases:
        case, draws = f"for {name} with {decay=:g} and {threshold=:g}", []
        for _ in range(20):  # of which the one is taken that tells most mistakes apart
            average, response = rng.random(24), height * rng.permutation(levels)
            # Where half is visible, the strongest is, too, or θ = 0.5 might hide nothing.
            seen = (rng.permutation(24) < 12) | (response == height) if visible is None else visible
            draws.append((average, response, seen, decay, threshold))
        given = max(draws, key=_different_mistakes)
        _check_pass(call(answer, case, *given, hint=hint), case, *given, hint)


def _different_mistakes(given: tuple[np.ndarray, np.ndarray, np.ndarray, float, float]) -> int:
    """How many different masks the mistakes lead to for arguments of `next_pass`."""
    average, response, visible, decay, threshold = given
    mistakes = _mask_mistakes(response, visible, threshold, decay * average + (1 - decay) * response)
    return len({mask.tobytes() for _, mask in mistakes})


def _check_pass(
    result: Any,
    case: str,
    average: Float[np.ndarray, "N"],
    response: Float[np.ndarray, "N"],
    visible: Bool[np.ndarray, "N"],
    decay: float,
    threshold: float,
    hint: str,
) -> None:
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Wrong(f"{case}, got {short(result)}, expected two things", "`return E_new, visible_new`")
    got_average = _array(result[0], case, "E_new", average.shape)
    got_visible = _array(result[1], case, "visible_new", visible.shape)
    truths = [np.asarray(each).dtype.kind == "b" for each in result]
    if truths == [True, False]:
        raise Wrong(f"{case}, got True and False as E_new", "the average comes first, then the mask")
    expected = np.array([decay * e + (1 - decay) * h for e, h in zip(average, response, strict=True)])
    if not _agree(got_average, expected):
        known = likely_mistake(got_average, _average_mistakes(average, response, visible, decay))
        raise Wrong(f"{case}, {_worst(got_average, expected, ('patch',))} in E_new", known or hint)
    if not truths[1]:
        raise Wrong(f"{case}, got numbers as visible_new, expected True and False", "join masks with &, not with *")
    strengths = [1 / (1 + np.exp(-STEEPNESS * (h - MIDDLE))) for h in response]
    left = [bool(v) and s / max(strengths) < threshold for v, s in zip(visible, strengths, strict=True)]
    if got_visible.tolist() != left:
        known = likely_mistake(got_visible, _mask_mistakes(response, visible, threshold, expected))
        patch = next(n for n in range(len(left)) if got_visible[n] != left[n])
        states = ["visible" if state else "hidden" for state in (got_visible[patch], left[patch])]
        about = f"H is {response[patch]:.2f} and which this look could {'' if visible[patch] else 'not '}see"
        raise Wrong(f"{case}, patch {patch}, where {about}, is {states[0]}, expected {states[1]}", known or hint)


def _sharpened(response: np.ndarray) -> np.ndarray:
    return _ratio(_sigmoid(STEEPNESS * (response - MIDDLE)))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def _average_mistakes(average: np.ndarray, response: np.ndarray, visible: np.ndarray, decay: float) -> Mistakes:
    """What a learner may have done, and the result of it."""
    return [
        ("λ and 1 − λ are exchanged: λ is the old average's", (1 - decay) * average + decay * response),
        ("the average takes H itself; σ is for the mask alone", decay * average + (1 - decay) * _sharpened(response)),
        ("the new map counts 1 − λ, or the sum grows with every look", decay * average + response),
        ("the old average counts λ, or the sum grows with every look", average + (1 - decay) * response),
        ("that is the plain mean; the old average counts λ, the new map 1 − λ", (average + response) / 2),
        ("that is the new map alone", response),
        ("that is the old average", average),
        ("all of H counts, also where this look could not see", decay * average + (1 - decay) * response * visible),
    ]


def _mask_mistakes(response: np.ndarray, visible: np.ndarray, threshold: float, average: np.ndarray) -> Mistakes:
    """What a learner may have done, and the result of it. `average` is the new one."""
    strength, sharpened = _sigmoid(STEEPNESS * (response - MIDDLE)), _sharpened(response)
    stays = sharpened < threshold
    return [
        ("compare with <, not with <=; σ is 1 at the strongest patch", visible & (sharpened <= threshold)),
        ("the division by the largest s is missing in σ", visible & (strength < threshold)),
        ("what was hidden once stays hidden; the earlier mask has to be joined with &", stays),
        ("a patch stays visible if it was visible and is weak: join the two with &, not with |", visible | stays),
        ("that is the mask of before; no patch was hidden", visible),
        ("that is what is hidden; True is for what stays visible", ~(visible & stays)),
        ("the strong patches are hidden, so compare with <, not with >", visible & ~stays),
        ("that compares H itself; σ makes it sharper first", visible & (response < threshold)),
        ("the mask comes from this look's H, not from the average", visible & (_sharpened(average) < threshold)),
        (f"the factor {STEEPNESS} in σ is missing", visible & (_ratio(_sigmoid(response - MIDDLE)) < threshold)),
        (f"the {MIDDLE:g} in σ is missing", visible & (_ratio(_sigmoid(STEEPNESS * response)) < threshold)),
    ]


def _ratio(values: np.ndarray) -> np.ndarray:
    return values / values.max()


@exercise("choose")
def check_choose(answer: Answer) -> None:
    """`choose(H, masks) -> int`: which proposal a response map means.

    `H` [h, w] is in [0, 1]; `masks` bool [P, h, w] has no empty mask. Only masks B count that contain a peak, that is a
    pixel where H is as large as anywhere; if there is none, all count. The answer is the number, from 0, of that with
    the largest score Σ(B + B·H) / ΣB.
    """
    rng = np.random.default_rng()
    for case, response, masks, hint in (*_scenes(), *(_random_scene(rng) for _ in range(20))):
        got, expected = _number(answer, case, response, masks, hint), _chosen(response, masks)
        if got != expected:
            known = next((mistake for mistake, result in _choice_mistakes(response, masks) if result == got), "")
            raise Wrong(f"{case}, got {got}, expected {expected}", hint or known)


def _scores(response: Float[np.ndarray, "h w"], masks: Bool[np.ndarray, "P h w"]) -> list[float]:
    return [float(sum(1 + value for value in response[mask]) / mask.sum()) for mask in masks]


def _with_peak(response: Float[np.ndarray, "h w"], masks: Bool[np.ndarray, "P h w"]) -> list[int]:
    return [number for number, mask in enumerate(masks) if response[mask].max() == response.max()]


def _chosen(response: Float[np.ndarray, "h w"], masks: Bool[np.ndarray, "P h w"]) -> int:
    scores = _scores(response, masks)
    return max(_with_peak(response, masks) or range(len(masks)), key=scores.__getitem__)


def _choice_mistakes(response: Float[np.ndarray, "h w"], masks: Bool[np.ndarray, "P h w"]) -> list[tuple[str, int]]:
    """What a learner may have done, and the result of it."""
    scores, inside = _scores(response, masks), _with_peak(response, masks)
    counted = inside or list(range(len(masks)))
    best, divide = _chosen(response, masks), "divide by the number of the mask's pixels"
    return [
        ("only masks count that contain a peak, H == H.max()", int(np.argmax(scores))),
        (f"that is the largest; {divide}", max(counted, key=lambda number: masks[number].sum())),
        (f"that has the largest sum; {divide}", max(counted, key=lambda number: response[masks[number]].sum())),
        ("that is the place among the masks that contain a peak; return the number among all", counted.index(best)),
        ("that has the lowest score", min(counted, key=scores.__getitem__)),
        ("count from 0", best + 1),
    ]


def _scenes() -> list[tuple[str, np.ndarray, np.ndarray, str]]:
    """Maps and masks in which one thing matters at a time: what they are, map, masks and a hint."""
    everything, around, thing, beside = (
        box(0, 0, 24, 24),
        box(4, 4, 16, 16),
        box(4, 4, 12, 12),
        box(0, 0, 5, 5),
    )
    other, far = box(16, 16, 22, 22), box(16, 0, 22, 6)
    response = np.where(thing, 0.6, np.where(other, 0.9, 0.05))
    peak, outside, two = response.copy(), response.copy(), np.where(far, 0.8, response)
    peak[4, 4] = outside[23, 0] = two[4, 4] = two[5, 20] = 1
    strongest = "only masks count that contain a peak, H == H.max()"
    place = "that is the place among the masks that contain a peak; return the number among all"
    nothing = "no mask contains a peak, so all of them count, and there is an answer"
    several = "H may be largest in several pixels; it is enough that a mask contains one of them"
    return [
        ("for masks that all contain the peak", peak, np.stack([everything, thing, around, beside]), ""),
        ("for a mask that is stronger, but has no peak", peak, np.stack([thing, other]), strongest),
        ("for two masks without the peak before two with it", peak, np.stack([other, far, beside, thing]), place),
        ("for masks none of which contains the peak", outside, np.stack([far, around, thing, other]), nothing),
        ("for a map with two peaks, in different masks", two, np.stack([thing, far, other]), several),
    ]


def _random_scene(rng: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray, str]:
    """As `_scenes`; the best of the masks is better than the next by more than rounding."""
    while True:
        response = rng.permutation(24 * 24).reshape(24, 24) / (24 * 24 - 1)  # no two are nearly equal
        masks = np.stack([random_box(rng) for _ in range(rng.integers(2, 8))])
        scores = _scores(response, masks)
        best = sorted(scores[number] for number in _with_peak(response, masks) or range(len(masks)))
        if len(best) == 1 or best[-1] - best[-2] > 1e-3:
            return f"for {len(masks)} masks over a random map", response, masks, ""


def _number(answer: Answer, case: str, response: np.ndarray, masks: np.ndarray, hint: str) -> int:
    """The learner's choice, if it is one."""
    expected = f"expected a number from 0 to {len(masks) - 1}"
    # In a tuple, since None is what a missing answer looks like, which the case may explain.
    (got,) = call(lambda *given: (answer(*given),), case, response, masks, hint=hint)
    if got is None:
        raise Wrong(f"{case}, got None, {expected}", hint or "does every way through the function end in `return`?")
    if isinstance(got, bool | np.bool_) or not isinstance(got, Integral):
        shape = getattr(got, "shape", None)
        if shape == response.shape:
            hint = "return the number of the mask, not the mask"
        elif shape in ((), (1,)):
            hint = "int(…) makes one of it"
        raise Wrong(f"{case}, got {short(got)}, {expected}", hint)
    if not 0 <= got < len(masks):
        raise Wrong(f"{case}, got {got}, {expected}", hint if got < 0 else "masks are counted from 0")
    return int(got)


def _array(value: Any, case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The learner's numbers, if they have the right shape."""
    array = array_of(value, f"{case}, got {short(value)} as {name}, expected an array of shape {shape}")
    if array.shape != shape:
        hint = "every context token has a map of its own" if array.ndim == 2 and len(shape) == 3 else ""
        raise Wrong(f"{case}, got {name} of shape {array.shape}, expected {shape}", hint)
    return array


def _agree(got: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(got, expected, rtol=1e-4, atol=1e-6)


def _worst(got: np.ndarray, expected: np.ndarray, axes: tuple[str, ...]) -> str:
    """Where two arrays differ most; what is no number differs more than anything."""
    difference = np.nan_to_num(abs(got - expected), nan=np.inf)
    place = np.unravel_index(difference.argmax(), got.shape)
    named = ", ".join(f"{axis} {number}" for axis, number in zip(axes, place, strict=True))
    return f"got {got[place]:.3f} at {named}, expected {expected[place]:.3f}"
