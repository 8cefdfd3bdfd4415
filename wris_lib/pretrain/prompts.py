"""What the toy SAM is asked: points and boxes, and the mask that answers them.

What makes the real SAM ambiguous is its data: a click on a shirt was answered by the shirt in one annotation and by
the person in another. The same is done here. The point is drawn first, and only then whether part or whole is its
answer: one point on a part asks for the part more often than not, several points in about every second case. Points
on different parts can only mean the whole.

A point on the background is answered by the whole background, as regions of sky and wall are masks in SAM's own data.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

SMALLEST_OBJECT = 150  # pixels: what shows less than this is not asked for
LARGEST_PART = 0.8  # of the object: a larger part is the object
# How often a part is the answer, wherever there is a part to answer with: to one point, to several, to a box,
# to many points that are spread over a box.
PART_SHARES = {"point": 0.75, "points": 0.4, "box": 0.3, "spread": 0.2}
# The same in the second half of training. A part is worth answering with only when it is cut well, and that is learnt
# late: without these the whole stays the safer answer to nearly every point.
LATE_PART_SHARES = {"point": 0.85, "points": 0.5, "box": 0.3, "spread": 0.2}
BACKGROUND_POINT = 0.08
MOST_POINTS = 5  # positive ones, and as many negative ones
MOST_SPREAD = 16  # points over a box, positive and negative


@dataclass(frozen=True)
class Prompt:
    """A question and its answer: points (x, y) with labels 1, 0, -1 (padding), or a box XYXY; and the mask."""

    points: Float[np.ndarray, "n 2"] | None
    labels: Integer[np.ndarray, " n"] | None
    box: Float[np.ndarray, "4"] | None
    mask: Bool[np.ndarray, "height width"]


class LabelledImage:
    """The objects and parts of one label image of the pool (0 background, else 16·(object + 1) + part).

    `pixels[label]` are a part's flat pixel numbers, `objects[i]` the labels of an object's parts. Objects that show
    fewer than SMALLEST_OBJECT pixels are left out.
    """

    def __init__(self, labels: UInt8[np.ndarray, "height width"]):
        self.labels = labels
        flat = labels.ravel()
        order = np.argsort(flat, kind="stable")
        values, starts = np.unique(flat[order], return_index=True)
        self.pixels = dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))
        every = {int(i): [v for v in self.pixels if v // 16 == i] for i in np.unique(values // 16) if i > 0}
        self.objects = {i: parts for i, parts in every.items() if self.area(parts) >= SMALLEST_OBJECT}

    def area(self, parts: list[int]) -> int:
        return sum(len(self.pixels[label]) for label in parts)

    def inside(self, parts: list[int]) -> np.ndarray:
        """Flat numbers of all pixels of some labels."""
        return np.concatenate([self.pixels[label] for label in parts])

    def draw(self, parts: list[int], rng: np.random.Generator) -> int:
        """Flat number of one of those pixels."""
        return int(rng.choice(self.inside(parts)))

    def mask(self, parts: list[int]) -> Bool[np.ndarray, "height width"]:
        mask = np.zeros(self.labels.shape, dtype=bool)
        mask.flat[self.inside(parts)] = True
        return mask

    def is_part(self, label: int) -> bool:
        """Whether a part is large enough to be asked for, and not nearly the whole object."""
        area = len(self.pixels[label])
        return SMALLEST_OBJECT <= area <= LARGEST_PART * self.area(self.objects[label // 16])

    def points(self, flat: np.ndarray) -> Float[np.ndarray, "n 2"]:
        """(x, y) of flat pixel numbers."""
        return np.stack([flat % self.labels.shape[1], flat // self.labels.shape[1]], axis=1).astype(np.float32)


def point_prompt(image: LabelledImage, part_share: float, rng: np.random.Generator) -> Prompt:
    """One point; the answer is a part, the whole, or the background."""
    if not image.objects or (0 in image.pixels and rng.random() < BACKGROUND_POINT):
        parts = [0] if 0 in image.pixels else list(image.pixels)
        pixel = image.draw(parts, rng)
    else:
        pixel, parts = _answer(image, part_share, rng)
    labels = np.ones(1, dtype=np.int64)
    return Prompt(image.points(np.array([pixel])), labels, None, image.mask(parts))


def points_prompt(image: LabelledImage, part_share: float, rng: np.random.Generator) -> Prompt:
    """Several points on the answer, or close together on it, and several off it.

    Half of the points off a part lie on the rest of the same object, for that is where somebody who wants the part
    would click.
    """
    if not image.objects:
        prompt = point_prompt(image, part_share, rng)
        return Prompt(*_padded(prompt.points, prompt.points[:0], 2 * MOST_POINTS), None, prompt.mask)
    pixel, parts = _answer(image, part_share, rng)
    whole = image.objects[int(image.labels.flat[pixel]) // 16]
    on = image.inside(parts)
    if rng.random() < 0.5:
        distance = np.linalg.norm(image.points(on) - image.points(np.array([pixel])), axis=1)
        on = on[distance <= rng.uniform(8, 40)]
    rest = [label for label in whole if label not in parts]
    others = [label for label in image.pixels if label not in whole]
    counts = rng.integers([1, 0], MOST_POINTS, endpoint=True)
    off = []
    for _ in range(counts[1]):
        if rest and rng.random() < 0.5:
            off.append(image.draw(rest, rng))
        elif others:
            near = [label for label in others if label > 0]
            off.append(image.draw(near if near and rng.random() < 0.3 else others, rng))
    positive, negative = image.points(rng.choice(on, counts[0])), image.points(np.array(off, dtype=np.int64))
    return Prompt(*_padded(positive, negative, 2 * MOST_POINTS), None, image.mask(parts))


def spread_prompt(image: LabelledImage, part_share: float, rng: np.random.Generator) -> Prompt:
    """Points uniform in the answer's box, those on it positive, the others negative; at least one is on it."""
    parts = _answer(image, part_share, rng)[1] if image.objects else list(image.pixels)
    mask = image.mask(parts)
    x0, y0, x1, y1 = tight_box(mask).astype(int)
    drawn = rng.integers([x0, y0], [x1, y1], (int(rng.integers(2, MOST_SPREAD, endpoint=True)), 2))
    on = mask[drawn[:, 1], drawn[:, 0]]
    if not on.any():
        drawn[0], on[0] = image.points(np.array([image.draw(parts, rng)]))[0], True
    points = drawn.astype(np.float32)
    return Prompt(*_padded(points[on], points[~on], MOST_SPREAD), None, mask)


def box_prompt(image: LabelledImage, part_share: float, rng: np.random.Generator) -> Prompt:
    """The answer's box, its corners moved by about a twentieth of its sides."""
    parts = _answer(image, part_share, rng)[1] if image.objects else list(image.pixels)
    box = tight_box(image.mask(parts))
    noise = np.clip(rng.normal(0, 0.05, 4), -0.1, 0.1) * np.tile(box[2:] - box[:2], 2)
    noise *= rng.random() < 0.8  # some boxes are exact
    return Prompt(None, None, (box + noise).astype(np.float32), image.mask(parts))


def outlines(labels: UInt8[np.ndarray, "height width"], size: int) -> Float[Tensor, "3 {size} {size}"]:
    """What can be seen without any prompt, in a grid of size × size cells: how much of a cell is on objects, whether
    an object's outline runs through it, and whether a part's does, 0 to 1."""
    objects = labels // 16
    maps = torch.from_numpy(np.stack([objects > 0, _borders(objects), _borders(labels)]).astype(np.float32))
    return torch.cat([adaptive_avg_pool2d(maps[:1], size), adaptive_max_pool2d(maps[1:], size)])


def _borders(labels: UInt8[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Pixels with another label above, below, to the left or to the right."""
    borders = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    borders[:, 1:] |= across
    borders[:, :-1] |= across
    borders[1:] |= down
    borders[:-1] |= down
    return borders


SAMPLERS = {"point": point_prompt, "points": points_prompt, "spread": spread_prompt, "box": box_prompt}


def tight_box(mask: Bool[np.ndarray, "height width"]) -> Float[np.ndarray, "4"]:
    """XYXY of a mask that is not empty, right and bottom edge exclusive."""
    ys, xs = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], dtype=np.float32)


def _answer(image: LabelledImage, part_share: float, rng: np.random.Generator) -> tuple[int, list[int]]:
    """A pixel on an object, and the labels of what it asks for.

    Half of the pixels are drawn from the object, half from a part of it, so that small parts are seen, too.
    """
    whole = image.objects[rng.choice(list(image.objects))]
    pixel = image.draw(whole if rng.random() < 0.5 else [int(rng.choice(whole))], rng)
    part = int(image.labels.flat[pixel])
    is_part = image.is_part(part) and rng.random() < part_share
    return pixel, [part] if is_part else whole


def _padded(positive: np.ndarray, negative: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and labels, padded to a length."""
    missing = length - len(positive) - len(negative)
    points = np.concatenate([positive, negative, np.zeros((missing, 2), dtype=np.float32)])
    return points, np.repeat([1, 0, -1], [len(positive), len(negative), missing])
