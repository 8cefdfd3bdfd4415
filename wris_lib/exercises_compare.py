"""The check for the exercise of notebook 06, in the form that `wris_lib.exercises` describes."""

from numbers import Integral

import numpy as np
from jaxtyping import Bool, Float

from wris_lib.checking import Answer, Wrong, call, exercise, random_box, short
from wris_lib.evaluate import iou


@exercise("most_agreed")
def check_most_agreed(answer: Answer) -> None:
    """`most_agreed(masks) -> int`: which of several answers, bool [M, H, W], the others agree with most.

    That is the one whose IoUs with the others have the largest sum. Two empty masks say nothing: their IoU counts 0.
    """
    rng = np.random.default_rng()
    empty = np.zeros((32, 40), bool)
    large, small, inside, far = (np.zeros((32, 40), bool) for _ in range(4))
    large[2:30, 2:38], small[4:12, 4:12], inside[4:12, 4:10], far[30:, 38:] = True, True, True, True
    silent = "two empty answers say nothing, so here they do not agree: their IoU counts 0"
    cases = [
        ("a large mask over two small ones that nearly agree, and one elsewhere", [large, small, inside, far], ""),
        ("two empty masks and two that nearly agree", [empty, empty, small, inside], silent),
        ("a single mask", [small], ""),
    ]
    while len(cases) < 40:
        masks = [random_box(rng) for _ in range(rng.integers(3, 6))]
        support = np.sort(_support(np.stack(masks)))
        if support[-1] - support[-2] > 0.01:  # otherwise which is largest could be a matter of rounding
            cases.append((f"{len(masks)} boxes", masks, ""))
    for name, masks, hint in cases:
        masks = np.stack(masks)
        support = _support(masks)
        case = f"for {name}, whose IoUs with the others add up to {', '.join(f'{each:.2f}' for each in support)}"
        got = call(answer, case, masks, hint=hint)
        if isinstance(got, bool | np.bool_) or not isinstance(got, Integral) or not 0 <= got < len(masks):
            raise Wrong(f"{case}, got {short(got)}, expected which of the {len(masks)}, counted from 0")
        if support[got] < support.max() - 1e-9:
            raise Wrong(f"{case}, got {got}, expected {support.argmax()}", hint or _guess(int(got), masks, support))


def _support(masks: Bool[np.ndarray, "M H W"]) -> Float[np.ndarray, "M"]:
    """The sums of IoUs with the other masks."""
    return np.array(
        [
            sum(iou(mask, other) for place, other in enumerate(masks) if place != number and (mask | other).any())
            for number, mask in enumerate(masks)
        ],
        dtype=float,
    )


def _guess(got: int, masks: Bool[np.ndarray, "M H W"], support: Float[np.ndarray, "M"]) -> str:
    """What the learner probably did: the first mistake that leads to just this answer."""
    flat = masks.reshape(len(masks), -1).astype(int)
    shared = (flat @ flat.T) * (1 - np.eye(len(masks), dtype=int))
    mistakes = [
        ("count from 0", support.argmax() + 1),
        ("that one shares most pixels, for it is large; divide by those of the union", shared.sum(axis=1).argmax()),
        ("that is the largest mask", flat.sum(axis=1).argmax()),
        ("that one agrees least", support.argmin()),
    ]
    return next((mistake for mistake, result in mistakes if got == result), "")
