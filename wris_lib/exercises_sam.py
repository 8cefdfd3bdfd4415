"""Checks for the exercises of notebooks 01 and 02 that ask SAM, in the form of `wris_lib.exercises`.

They ask about scenes that they draw themselves, always the same ones, which are in no dataset: a rule is tried on one
draw, and judged on another. It is the toy SAM that they ask, whatever stack the notebook runs on.
"""

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image

from wris_lib.backbones.sam import SamImage, Segmenter, load_sam
from wris_lib.checking import Answer, Wrong, call, exercise, short
from wris_lib.data.toyworld.grammar import can_be_referent
from wris_lib.data.toyworld.scenes import sample_scene
from wris_lib.evaluate import Mask, iou
from wris_lib.methods.ppt.labels import draw_points

Points = Float[np.ndarray, "n 2"]
Masks = Bool[np.ndarray, "3 h w"]
Guesses = Float[np.ndarray, "3"]

LARGE = 2000  # pixels, 3 % of a scene
DRAWN, POSITIVE, LIES, TURNED = "as drawn", "without the negative ones", "all called positive", "all turned around"
WAYS = (DRAWN, POSITIVE, LIES, TURNED)


@cache
def _sam() -> Segmenter:
    return load_sam("toy", "cpu")


@cache
def _things(count: int, least: int = 0, seed: int = 0) -> list[tuple[SamImage, Mask]]:
    """Things of fresh scenes, three a scene at most: SAM's embedding of the scene, and the thing's true mask.

    Args:
        count: of things.
        least: pixels that a thing has.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    things: list[tuple[SamImage, Mask]] = []
    while len(things) < count:
        scene = sample_scene(rng)
        suited = [i for i, thing in enumerate(scene.objects) if can_be_referent(thing) and thing.area >= least]
        if suited:
            embedded = _sam().embed(Image.fromarray(scene.image))
            things += [(embedded, scene.mask(index)) for index in suited[:3]]
    return things[:count]


def _ask(embedded: SamImage, points: Points, labels: Int[np.ndarray, " n"]) -> tuple[Masks, Guesses]:
    """SAM's three masks for a prompt of points (x, y) in pixels, and its guess of each one's IoU."""
    decoded = _sam().decode(embedded, torch.from_numpy(points).float()[None], torch.from_numpy(labels)[None])
    return _sam().masks(embedded, decoded)[0], decoded.iou[0].numpy()


@exercise("choose_mask")
def check_choose_mask(answer: Answer) -> None:
    """`choose_mask(masks, guesses) -> int`: which of SAM's three masks is the whole thing.

    `masks` bool [3, H, W] answer a single point on the thing, in any order; `guesses` [3] are SAM's, of each mask's
    IoU. Over 48 fresh things the mean IoU must make up for at least half of what SAM's own choice loses.
    """
    chosen = []
    for masks, guesses, _ in _candidates():
        sizes = ", ".join(str(mask.sum()) for mask in masks)
        case = f"for masks of {sizes} pixels and guesses {', '.join(f'{guess:.2f}' for guess in guesses)}"
        got = call(answer, case, masks, guesses)
        if isinstance(got, bool | np.bool_) or not (isinstance(got, Integral) and 0 <= got < 3):
            raise Wrong(f"{case}, got {short(got)}, expected a number: 0, 1 or 2", "which mask, not the mask itself")
        chosen.append(int(got))
    trusted = [int(guesses.argmax()) for _, guesses, _ in _candidates()]
    sizes = np.array([masks.sum(axis=(1, 2)) for masks, _, _ in _candidates()])
    reached, by_sam, best, needed = choices([ious for _, _, ious in _candidates()], chosen, trusted)
    if reached >= needed:
        return
    rules = [
        ("that is SAM's own choice", trusted),
        ("one of the three is mostly background, and SAM knows that", sizes.argmax(axis=1)),
        ("the smallest is mostly a part", sizes.argmin(axis=1)),
        ("the order of the three is mixed, so a place says nothing", np.full(len(chosen), chosen[0])),
    ]
    hint = next((mistake for mistake, choice in rules if np.array_equal(choice, chosen)), "")
    measured = f"SAM's choice {by_sam:.1f}, and the best of the three {best:.1f}"
    wanted = f"at least {needed:.1f} is asked for"
    raise Wrong(f"on {len(chosen)} fresh things your choice has an mIoU of {reached:.1f}, {measured}; {wanted}", hint)


def choices(
    ious: Sequence[Float[np.ndarray, " m"]], chosen: Sequence[int], trusted: Sequence[int]
) -> tuple[float, float, float, float]:
    """What choices among SAM's masks are worth: mIoU in percent.

    Args:
        ious: of a thing's masks, for each thing.
        chosen: the learner's mask of each thing.
        trusted: SAM's own choice.

    Returns:
        The learner's, SAM's own, the best that can be, and what is asked for, half-way between the latter two.
    """
    mine, sams = (
        float(100 * np.mean([each[number] for each, number in zip(ious, numbers, strict=True)]))
        for numbers in (chosen, trusted)
    )
    best = float(100 * np.mean([each.max() for each in ious]))
    return mine, sams, best, (sams + best) / 2


@cache
def _candidates() -> list[tuple[Masks, Guesses, Guesses]]:
    """SAM's masks for one point on each of 48 things, in a mixed order: with its guesses, and the true IoUs."""
    rng = np.random.default_rng(0)
    found = []
    for embedded, thing in _things(48):
        point = rng.choice(np.argwhere(thing), 1)[:, ::-1].astype(float)
        order = rng.permutation(3)
        masks, guesses = (answers[order] for answers in _ask(embedded, point, np.ones(1, int)))
        found.append((masks, guesses, np.array([iou(mask, thing) for mask in masks], np.float32)))
    return found


@exercise("my_order")
def check_my_order(answer: Answer) -> None:
    """`my_order() -> ways`: four ways to tell SAM of points drawn in an object's box, the best mean IoU first.

    What is measured on 24 fresh things decides. Of two ways that cannot be told apart there either may be first.
    """
    got = call(answer, "without arguments")
    if not (isinstance(got, list | tuple) and all(isinstance(way, str) for way in got)):
        raise Wrong(f"got {short(got)}, expected a list of the four ways, the best first")
    for way in got:
        if way not in WAYS:
            raise Wrong(f"got {way!r}, expected the four ways: {', '.join(map(repr, WAYS))}")
        if got.count(way) > 1:
            raise Wrong(f"{way!r} is in your order {got.count(way)} times", "each of the four has one place")
    if missing := [way for way in WAYS if way not in got]:
        raise Wrong(f"{missing[0]!r} is missing in your order")
    measured = _four_ways()
    hints = {
        TURNED: "turned around, the points ask for what lies around the thing",
        POSITIVE: "negative points are true answers, too, and say where the thing ends",
        LIES: "a point beside the thing that is called positive asks for what lies there, too",
    }
    for first, better in combinations(got, 2):
        gain = measured[better] - measured[first]
        if gain.mean() > 1.96 * gain.std(ddof=1) / np.sqrt(len(gain)):
            means = f"{measured[better].mean():.2f} against {measured[first].mean():.2f}"
            complaint = f"on {len(gain)} fresh things {better!r} is better than {first!r}: mIoU {means}"
            raise Wrong(complaint, hints.get(first, ""))


@cache
def _four_ways() -> dict[str, Float[np.ndarray, " n"]]:
    """The IoU of what SAM gives for each of 24 things, asked in each of the four ways with the same 16 points."""
    rng = np.random.default_rng(0)
    ious: dict[str, list[float]] = {}
    for embedded, thing in _things(24, least=LARGE):
        shares, signs = draw_points(thing, 16, rng)
        places, labels = shares * thing.shape[::-1], signs.astype(int)
        if not labels.any():  # all beside the thing: there is nothing to ask for
            continue
        asked = {
            DRAWN: (places, labels),
            POSITIVE: (places[labels == 1], labels[labels == 1]),
            LIES: (places, np.ones_like(labels)),
            TURNED: (places, 1 - labels),
        }
        for way, prompt in asked.items():
            masks, guesses = _ask(embedded, *prompt)
            ious.setdefault(way, []).append(iou(masks[guesses.argmax()], thing))
    return {way: np.array(values) for way, values in ious.items()}
