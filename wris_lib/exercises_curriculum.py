"""Checks for the exercises of notebook 03: a sentence that is true of one object only, `Select`, a case in which it
goes wrong, and a prediction.

They have the form that `wris_lib.exercises` describes.
"""

from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Bool

from wris_lib import evaluate
from wris_lib.ablation_figure import FULL, PAPER, read_ablation
from wris_lib.checking import Answer, Wrong, call, exercise, random_box, short
from wris_lib.errors import WrisError
from wris_lib.evaluate import Mask
from wris_lib.methods.ppt.curriculum import mask_ious
from wris_lib.report import RESULTS

ABLATION = RESULTS / "ppt_ablation.json"
Box = tuple[float, float, float, float]  # XYXY in pixels


@exercise("select")
def check_select(answer: Answer) -> None:
    """`select(prediction, candidates) -> int | None`: which candidate matches a predicted mask best, by IoU.

    All masks are bool [H, W], `candidates` is a list of them. The answer counts from 0. It is None when no candidate
    shares a pixel with the prediction.
    """
    rng = np.random.default_rng()
    everything, nothing = np.ones((24, 24), bool), np.zeros((24, 24), bool)
    thing, near, far = _square(4, 12), _square(6, 14), _square(16, 22)
    none = "nothing overlaps, so the referent is unknown"
    cases = [
        ("the same mask in second place", thing, [near, thing, far], ""),
        ("the same mask in first place", thing, [thing, far], "0 is a number like any other, though `if 0` is False"),
        ("a candidate that overlaps a little, and one that does not", thing, [far, _square(11, 20)], "a little is all"),
        ("a candidate that covers the whole image", thing, [everything, near], "it shares most, but is far too large"),
        ("a candidate inside the prediction", everything, [_square(0, 3), _square(0, 20)], "the other fits better"),
        ("candidates elsewhere", thing, [far, _square(18, 20)], none),
        ("one candidate elsewhere", thing, [far], none),
        ("an empty prediction", nothing, [thing, far], none),
        ("an empty prediction and an empty candidate", nothing, [nothing, far], f"{none}; two empty masks, too"),
    ]
    while len(cases) < 40:
        prediction, candidates = random_box(rng), [random_box(rng) for _ in range(rng.integers(1, 5))]
        ious = sorted(evaluate.iou(prediction, each) for each in candidates)
        if len(ious) == 1 or ious[-1] - ious[-2] > 0.01:  # otherwise which is best could be a matter of rounding
            shown = ", ".join(f"{evaluate.iou(prediction, each):.2f}" for each in candidates)
            cases.append((f"candidates with an IoU of {shown}", prediction, candidates, ""))
    for case, prediction, candidates, hint in cases:
        got = _number(answer, f"for {case}", prediction, candidates, hint=hint)
        expected = _selected(prediction, candidates)
        _compare(got, expected, f"for {case}", len(candidates), hint or _guess(got, prediction, candidates))


def _selected(prediction: Mask, candidates: list[Mask]) -> int | None:
    overlapping = [number for number, candidate in enumerate(candidates) if (prediction & candidate).any()]
    return max(overlapping, key=lambda number: evaluate.iou(prediction, candidates[number]), default=None)


def _guess(got: int | None, prediction: Mask, candidates: list[Mask]) -> str:
    """What the learner probably did: the first mistake that leads to just this answer."""
    shared = [int((prediction & candidate).sum()) for candidate in candidates]
    ious = [evaluate.iou(prediction, candidate) for candidate in candidates]
    mistakes = [
        ("count from 0", int(np.argmax(ious)) + 1),
        ("that is the one that fits worst", int(np.argmin(ious))),
        ("that one shares most pixels; divide by those of the union", int(np.argmax(shared))),
        ("a small overlap is enough; there is no threshold", None),
    ]
    return next((mistake for mistake, result in mistakes if got == result), "")


@exercise("on_the_left")
def check_on_the_left(answer: Answer) -> None:
    """`on_the_left(boxes, names, noun, width) -> int | None`: which object "the [noun] on the left" means.

    `boxes` lists XYXY in pixels of an image `width` pixels wide, `names` the class of each object. Of the objects of
    that class it is the one whose box has its centre farthest to the left. The answer is None when nobody could be
    sure: no object is of that class; the centre is not in the left half of the image; or another object of the class
    has its centre less than a tenth of the width farther right.
    """
    rng = np.random.default_rng()
    dog, cat = "dog", "cat"
    only = "only objects of the class count, but the answer is the place among all objects"
    single = "a single one can be meant, too"
    close, middle = "the second is less than a tenth of the width farther right", "its centre is not in the left half"
    centre = "compare the centres, (x0 + x1) / 2, not the left edges"
    # Boxes by their centre and their width, in shares of the image.
    cases = [
        ("a dog on the left and one on the right", [(0.2, 0.2), (0.8, 0.2)], [dog, dog], ""),
        ("a dog on the right and one on the left", [(0.8, 0.2), (0.2, 0.2)], [dog, dog], "their order says nothing"),
        ("a single dog at the left", [(0.2, 0.2)], [dog], single),
        ("a cat at the left, then two dogs", [(0.1, 0.1), (0.3, 0.1), (0.7, 0.1)], [cat, dog, dog], only),
        ("a cat close to the dog on the left", [(0.33, 0.1), (0.3, 0.1)], [cat, dog], only),
        ("cats and no dog", [(0.2, 0.2), (0.7, 0.2)], [cat, cat], "there is no dog"),
        ("no objects", [], [], "there is no dog"),
        ("a single dog at the right", [(0.7, 0.2)], [dog], middle),
        ("two dogs at the right", [(0.6, 0.1), (0.9, 0.1)], [dog, dog], middle),
        ("two dogs close together at the left", [(0.2, 0.1), (0.26, 0.1)], [dog, dog], close),
        ("two dogs close together, and one at the right", [(0.9, 0.1), (0.26, 0.1), (0.2, 0.1)], [dog] * 3, close),
        ("dogs close together at the right, and one at the left", [(0.2, 0.1), (0.8, 0.1), (0.82, 0.1)], [dog] * 3, ""),
        ("a wide dog and a small one on its left side", [(0.4, 0.7), (0.2, 0.1)], [dog, dog], centre),
        ("a wide dog with its centre in the right half", [(0.55, 0.8), (0.9, 0.1)], [dog, dog], f"{middle}; {centre}"),
    ]
    for case, shapes, names, hint in cases:
        for width in (100, 640):
            boxes = _boxes(rng, shapes, width)
            _check_sentence(answer, f"for {case}, {width} pixels wide", boxes, names, width, hint)
    tried = 0
    while tried < 60:
        count, width = int(rng.integers(1, 6)), int(rng.integers(100, 900))
        shapes = [(rng.uniform(0.15, 0.85), rng.uniform(0.05, 0.28)) for _ in range(count)]
        names = [str(name) for name in rng.choice([dog, dog, cat], count)]
        boxes = _boxes(rng, shapes, width)
        centres = sorted(_dogs(boxes, names).values())
        doubtful = [c / width - 0.5 for c in centres] + [(b - a) / width - 0.1 for a, b in pairwise(centres)]
        if all(abs(distance) > 0.005 for distance in doubtful):  # no question of rounding
            places = ", ".join(f"{name} {_centre(box):.1f}" for box, name in zip(boxes, names, strict=True))
            _check_sentence(answer, f"for centres at {places}, {width} pixels wide", boxes, names, width, "")
            tried += 1


def _boxes(rng: np.random.Generator, shapes: list[tuple[float, float]], width: int) -> list[Box]:
    """XYXY of objects by the shares of their centres and widths. How high they are says nothing, and is drawn."""
    boxes = []
    for centre, size in shapes:
        y0, high = rng.uniform(0, 60), rng.uniform(5, 40)
        edges = (width * (centre - size / 2), y0, width * (centre + size / 2), y0 + high)
        boxes.append(tuple(round(float(edge), 1) for edge in edges))
    return boxes


def _centre(box: Box) -> float:
    return (box[0] + box[2]) / 2


def _dogs(boxes: list[Box], names: list[str]) -> dict[int, float]:
    """Centres by number of the object."""
    return {number: _centre(boxes[number]) for number, name in enumerate(names) if name == "dog"}


def _meant(boxes: list[Box], names: list[str], width: int) -> int | None:
    """The dog on the left."""
    centres = _dogs(boxes, names)
    best = min(centres, key=centres.get, default=None)
    if best is None or centres[best] >= width / 2:
        return None
    others = [centre for number, centre in centres.items() if number != best]
    return None if any(centre - centres[best] < width / 10 for centre in others) else best


def _check_sentence(answer: Answer, case: str, boxes: list[Box], names: list[str], width: int, hint: str) -> None:
    got = _number(answer, case, boxes, names, "dog", width, hint=hint)
    expected = _meant(boxes, names, width)
    if not hint and expected is not None and names[:expected].count("dog") == got:
        hint = "return its place among all objects, not among those of the class"
    _compare(got, expected, case, len(boxes), hint)


@exercise("mislead_select")
def check_mislead_select(answer: Answer) -> None:
    """`mislead_select() -> (prediction, referent, candidates)`: the thing was found, and `Select` labels it wrongly.

    `prediction` and `referent` are masks, bool [H, W], `candidates` is a list of them. More than half of the prediction
    lies on the referent, and some candidate has an IoU of at least ½ with it; but that which fits the prediction best
    has less.
    """
    prediction, referent, candidates = _masks(call(answer, "without arguments"))
    hit = (prediction & referent).sum() / prediction.sum()
    if hit <= 0.5:
        complaint = f"{hit:.0%} of the prediction lie on the referent, expected more than half"
        raise Wrong(complaint, "let the network find the right thing, so that only Select is to blame")
    worth, fits = mask_ious(referent, candidates), mask_ious(prediction, candidates)
    if worth.max() < 0.5:
        complaint = f"the best candidate has an IoU of {worth.max():.2f} with the referent, expected 0.5 or more"
        raise Wrong(complaint, "where all candidates are bad, no rule could choose well")
    taken = int(fits.argmax())
    if worth[taken] >= 0.5:
        hint = "Select takes what has the shape of the prediction, and that need not be the shape of the whole thing"
        if (worth >= 0.5).all():
            hint = "all candidates are good labels, so no choice is wrong; SAM also answers with pieces and neighbours"
        complaint = f"Select takes candidate {taken}, with an IoU of {fits[taken]:.2f} with the prediction"
        raise Wrong(f"{complaint} and {worth[taken]:.2f} with the referent, which is a good label", hint)


def _masks(result: Any) -> tuple[Mask, Mask, Bool[np.ndarray, "y h w"]]:
    """The learner's masks, if that is what they are."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise Wrong(f"got {short(result)}, expected three things", "`return prediction, referent, candidates`")
    prediction, referent, given = result
    if not isinstance(given, list | tuple | np.ndarray) or len(given) == 0:
        raise Wrong(f"got {short(given)} as candidates, expected a list of at least one mask")
    names = ("the prediction", "the referent", *(f"candidate {number}" for number in range(len(given))))
    masks = (prediction, referent, *given)
    for name, mask in zip(names, masks, strict=True):
        expected = "expected a mask, an array of shape (H, W) of True and False"
        if not isinstance(mask, np.ndarray) or mask.ndim != 2:
            raise Wrong(f"got {short(mask)} as {name}, {expected}")
        if mask.dtype != bool:
            raise Wrong(f"got numbers as {name}, {expected}", "np.zeros((16, 16), bool) makes an empty one")
        if mask.shape != np.shape(prediction):
            raise Wrong(f"got {name} of shape {mask.shape}, expected {prediction.shape}, that of the prediction")
    for name, mask in zip(names, masks[:2], strict=False):
        if not mask.any():
            raise Wrong(f"{name} is empty, expected at least one pixel")
    return prediction, referent, np.stack(given)


@exercise("loses_most")
def check_loses_most(answer: Answer) -> None:
    """`loses_most() -> int`: which of the ablation's rows 6 to 8 has the lowest mIoU. What was measured decides."""
    got = call(answer, "without arguments")
    single = [name for name in PAPER if name[0] in "678"]
    if not isinstance(got, Integral) or got not in range(6, 9):
        hint = "row 9 takes away what rows 7 and 8 take away, so it does not say which of them it was"
        both = isinstance(got, Integral) and got == 9
        raise Wrong(f"got {short(got)}, expected the number of a row: 6, 7 or 8", hint if both else "")
    try:
        rows = read_ablation(ABLATION)
    except WrisError as error:
        raise Wrong(f"row {got} cannot be compared with what was measured: {str(error).rstrip('.')}") from None
    scores = {name: row["metrics"]["mIoU"]["mean"] for name, row in rows.items()}
    losses = {int(name[0]): scores[FULL] - scores[name] for name in single}
    most = max(losses.values())
    if losses[got] < most:
        complaint = f"against row 5, row {got} loses {losses[got]:.1f} mIoU, and another one {most:.1f}"
        hint = "a prediction may be wrong; look at the figure, and say what you had not thought of"
        if got == int(min(single, key=PAPER.get)[0]):
            hint = "in the paper it is this row; section 3 has measured whose labels are right here"
        raise Wrong(complaint, hint)


def _number(answer: Answer, case: str, *arguments: Any, hint: str) -> int | None:
    """The learner's result, which must be a number or None."""
    # In a tuple, since None is an answer here.
    (got,) = call(lambda *given: (answer(*given),), case, *arguments, hint=hint)
    if isinstance(got, bool | np.bool_) or not (got is None or isinstance(got, Integral)):
        raise Wrong(f"{case}, got {short(got)}, expected a number from 0 on, or None")
    return got if got is None else int(got)


def _compare(got: int | None, expected: int | None, case: str, count: int, hint: str) -> None:
    if got != expected:
        if got is None and not hint:
            hint = "does every way through the function end in `return`?"
        elif got is not None and not 0 <= got < count:
            hint = f"there are {count}, counted from 0"
        raise Wrong(f"{case}, got {got}, expected {expected}", hint)


def _square(start: int, stop: int) -> Mask:
    mask = np.zeros((24, 24), bool)
    mask[start:stop, start:stop] = True
    return mask
