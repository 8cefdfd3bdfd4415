"""Scenes made of object-centric pictures, and sentences that are true of them: PPT's D_ref.

An object-centric picture teaches what a word looks like, but nothing about *which one*: there is nothing to confuse
its object with. Put several such pictures into one, and there is, at no cost: whoever has put the scene together
knows where everything lies, and can say so. PPT (CVPR 2024, §3.3) does this in two ways,

- *composition*, a mosaic of whole pictures, about which the sentence tells the referent's place in the picture;
- *fusion*, pictures embedded in another one, about which it tells the place relative to another object.

Here both kinds of scene get both kinds of sentence, and in fusion the object is embedded without its background: cut
out by its pseudo-mask. Sentences are made so that exactly one object fits, and half of the scenes have several objects
of the referent's class: otherwise the noun alone would do, and nobody would have to learn what "left" means.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

LEAST_VISIBLE = 0.6  # of an object that others are pasted over
LEAST_AREA = 0.004  # of the picture: what is smaller is not spoken of
ROWS = {  # how many pictures lie side by side in each row of a mosaic
    2: ((2,), (1, 1)),
    3: ((1, 2), (2, 1), (3,)),
    4: ((2, 2),),
    5: ((2, 3), (3, 2)),
    6: ((3, 3), (2, 2, 2)),
    7: ((2, 3, 2), (3, 2, 2), (2, 2, 3)),
    8: ((3, 3, 2), (2, 3, 3), (4, 4)),
    9: ((3, 3, 3),),
}
# Longer side of a pasted object, as a share of the picture's. Things in scenes are small, and a generator that has only
# seen large ones fails on them: in ToyRef train the candidates of expressions cover 4 % of the picture (the median).
PASTED_SIDE = (0.14, 0.5)

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
CORNERS = {
    f"{vertical} {side}": (DIRECTIONS[side][0], DIRECTIONS[vertical][1])
    for vertical in ("top", "bottom")
    for side in ("left", "right")
}
PLACES = {  # {} is the class
    "left": ("the {} on the left", "left {}", "the {} on the left side"),
    "right": ("the {} on the right", "right {}", "the {} on the right side"),
    "top": ("the {} at the top", "top {}", "the {} on top"),
    "bottom": ("the {} at the bottom", "bottom {}"),
    **{
        corner: (f"the {{}} in the {corner} corner", f"the {{}} in the {corner}", f"{corner} {{}}")
        for corner in CORNERS
    },
    "middle": ("the {} in the middle", "the {} in the center"),
}
RELATIONS = {  # {} is the referent's class, then the other's
    "left": ("the {} to the left of the {}", "{} left of {}"),
    "right": ("the {} to the right of the {}", "{} right of {}"),
    "top": ("the {} above the {}", "{} over {}"),
    "bottom": ("the {} below the {}", "{} under {}"),
    "near": ("the {} next to the {}", "{} beside {}", "the {} near the {}"),
    "front": ("the {} in front of the {}", "{} in front of {}"),
    "behind": ("the {} behind the {}", "{} behind {}"),
}


@dataclass(frozen=True)
class ObjectPicture:
    """An object-centric picture: pixels, pseudo-mask, name of its class, and its number in the list it came from."""

    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    name: str
    number: int = 0


@dataclass(frozen=True)
class ComposedScene:
    """A scene made of object-centric pictures.

    Attributes:
        image: RGB.
        masks: what can be seen of each object.
        names: its class.
        covers: pairs (i, j): object i hides a piece of object j.
    """

    image: UInt8[np.ndarray, "size size 3"]
    masks: Bool[np.ndarray, "n size size"]
    names: tuple[str, ...]
    covers: frozenset[tuple[int, int]] = frozenset()

    @cached_property
    def boxes(self) -> Int[np.ndarray, "n 4"]:
        """XYXY of what can be seen of each object, right and bottom edge exclusive."""
        return np.array([_box(mask) for mask in self.masks])

    @cached_property
    def areas(self) -> Float[np.ndarray, " n"]:
        """Of what can be seen of each object, as a share of the picture."""
        return self.masks.mean(axis=(1, 2))


def place(picture: ObjectPicture, size: int, rng: np.random.Generator) -> ComposedScene:
    """One picture, perhaps mirrored, up to 1.5 times closer, and cut around its object, which puts it in the middle."""
    x0, y0, x1, y1 = _box(picture.mask)
    closest = min(picture.mask.shape) / max(x1 - x0, y1 - y0)  # from where all of the object can still be seen
    near = max(size, round(size * min(rng.uniform(1, 1.5), closest)))
    image, mask = _cover(picture, near, near, rng)
    x0, y0, x1, y1 = _box(mask)
    left, top = (int(np.clip((low + high - size) // 2, 0, near - size)) for low, high in ((x0, x1), (y0, y1)))
    window = (slice(top, top + size), slice(left, left + size))
    return ComposedScene(image[window], mask[window][None], (picture.name,))


def compose(pictures: Sequence[ObjectPicture], size: int, rng: np.random.Generator) -> ComposedScene:
    """A mosaic: every picture fills a cell of its own, cut around its object.

    Args:
        pictures: 2 to 9.
        size: side of the scene in pixels.
    """
    layouts = ROWS[len(pictures)]
    rows = layouts[int(rng.integers(len(layouts)))]
    image = np.zeros((size, size, 3), dtype=np.uint8)
    masks = np.zeros((len(pictures), size, size), dtype=bool)
    remaining = iter(range(len(pictures)))
    for (top, bottom), columns in zip(_cut(size, len(rows), rng), rows, strict=True):
        for left, right in _cut(size, columns, rng):
            index = next(remaining)
            cell = (slice(top, bottom), slice(left, right))
            image[cell], masks[index][cell] = _cover(pictures[index], right - left, bottom - top, rng)
    return ComposedScene(image, masks, tuple(picture.name for picture in pictures))


def fuse(pictures: Sequence[ObjectPicture], size: int, rng: np.random.Generator) -> ComposedScene:
    """The objects of all pictures but the first, cut out and pasted over the first.

    An object is pasted where it leaves enough of the others to be seen. One that finds no such place after some
    tries is left out.

    Args:
        pictures: at least one.
        size: side of the scene in pixels.
    """
    image, first = _cover(pictures[0], size, size, rng)
    masks, names, whole = [first], [pictures[0].name], [first.sum()]
    covers = set()
    for picture in pictures[1:]:
        side = size * np.exp(rng.uniform(*np.log(PASTED_SIDE)))
        colors, shape = _cut_out(picture, round(side), rng)
        height, width = shape.shape
        for _ in range(12):
            top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
            pasted = np.zeros((size, size), dtype=bool)
            pasted[top : top + height, left : left + width] = shape
            if all((m & ~pasted).sum() >= LEAST_VISIBLE * area for m, area in zip(masks, whole, strict=True)):
                break
        else:
            continue
        covers |= {(len(masks), other) for other, mask in enumerate(masks) if (mask & pasted).any()}
        image[top : top + height, left : left + width][shape] = colors[shape]
        masks = [*(mask & ~pasted for mask in masks), pasted]
        names.append(picture.name)
        whole.append(pasted.sum())
    return ComposedScene(image, np.stack(masks), tuple(names), frozenset(covers))


def sentences(scene: ComposedScene, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Sentences about the scene and the object that each refers to: at most one by place and one by relation each.

    An object whose class is the only one of its kind also gets a sentence that says no more than that.
    """
    found = []
    for index, name in enumerate(scene.names):
        if scene.areas[index] < LEAST_AREA:
            continue
        if scene.names.count(name) == 1:
            found.append((("the {}", "{}")[int(rng.integers(2))].format(name), index))
        for options in (_by_place(scene, index), _by_relation(scene, index)):
            if texts := list(options):
                found.append((texts[int(rng.integers(len(texts)))], index))
    return found


def _by_place(scene: ComposedScene, index: int) -> Iterator[str]:
    """Every sentence that tells the object's place, where it is clear which object is meant."""
    centers, twins = _centers(scene), _twins(scene, index)
    here = centers[index]
    for place, direction in (DIRECTIONS | CORNERS).items():
        axes = np.nonzero(direction)[0]
        along = (here * direction)[axes]
        ahead = ((here - centers[twins]) * direction)[:, axes]
        # Among others of its class it is enough to be farther that way than they are; alone, or in a corner, an
        # object must be clearly off the middle.
        least = -0.05 if twins and place in DIRECTIONS else 0.12
        if (along > least).all() and (ahead.max(axis=1) > 0.1).all() and (ahead > -0.05).all():
            yield from (text.format(scene.names[index]) for text in PLACES[place])
    if np.abs(here).max() < 0.14 and (np.abs(centers[twins]).max(axis=1, initial=0) > 0.24).all():
        yield from (text.format(scene.names[index]) for text in PLACES["middle"])


def _by_relation(scene: ComposedScene, index: int) -> Iterator[str]:
    """Every sentence that tells where the object is relative to one of another class, of which there is only one."""
    twins = _twins(scene, index)
    for other, name in enumerate(scene.names):
        if scene.names.count(name) > 1 or other == index or scene.areas[other] < LEAST_AREA:
            continue
        for relation, texts in RELATIONS.items():
            if _related(scene, index, other, relation) and not any(
                _related(scene, twin, other, relation, loosely=True) for twin in twins
            ):
                yield from (text.format(scene.names[index], name) for text in texts)


def _related(scene: ComposedScene, index: int, other: int, relation: str, loosely: bool = False) -> bool:
    """Whether the relation holds clearly; loosely: whether somebody might say that it does."""
    if relation in ("front", "behind"):
        return ((index, other) if relation == "front" else (other, index)) in scene.covers
    if relation == "near":
        return _gap(scene, index, other) < (0.14 if loosely else 0.08)
    direction = np.array(DIRECTIONS[relation])
    centers = _centers(scene)
    offset = centers[index] - centers[other]
    along, across = offset @ direction, abs(offset @ direction[::-1])
    return bool(along > 0.03 and across < 1.6 * along) if loosely else bool(along > 0.1 and across < along)


def _twins(scene: ComposedScene, index: int) -> list[int]:
    """The other objects of the same class."""
    return [other for other, name in enumerate(scene.names) if name == scene.names[index] and other != index]


def _centers(scene: ComposedScene) -> Float[np.ndarray, "n 2"]:
    """(x, y) of the boxes' centres, from -0.5 to 0.5."""
    return (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2 / scene.image.shape[0] - 0.5


def _gap(scene: ComposedScene, first: int, second: int) -> float:
    """Distance of two objects' boxes, as a share of the picture's side; 0 when they overlap."""
    a, b = scene.boxes[first], scene.boxes[second]
    return float(np.maximum(np.maximum(a[:2] - b[2:], b[:2] - a[2:]), 0).max() / scene.image.shape[0])


def _box(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """XYXY of a mask, right and bottom edge exclusive; of an empty mask the whole picture."""
    ys, xs = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    if len(ys) == 0:
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _cut(length: int, parts: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Cut a length into pieces that differ by up to a half."""
    shares = rng.uniform(0.8, 1.2, parts)
    ends = np.round(np.cumsum(shares) / shares.sum() * length).astype(int).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _cover(
    picture: ObjectPicture, width: int, height: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], Bool[np.ndarray, "{height} {width}"]]:
    """The picture, perhaps mirrored, scaled until it covers width × height, and cut around its object."""
    image, mask = _mirrored(picture, rng)
    scale = max(width / image.shape[1], height / image.shape[0])
    wide, high = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    image, mask = _resized(image, mask, wide, high)
    x0, y0, x1, y1 = _box(mask)
    left = int(np.clip((x0 + x1 - width) // 2, 0, wide - width))
    top = int(np.clip((y0 + y1 - height) // 2, 0, high - height))
    window = (slice(top, top + height), slice(left, left + width))
    return image[window], mask[window]


def _cut_out(
    picture: ObjectPicture, side: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """The object in its box, perhaps mirrored, the longer side scaled to `side` pixels."""
    image, mask = _mirrored(picture, rng)
    x0, y0, x1, y1 = _box(mask)
    scale = side / max(x1 - x0, y1 - y0)
    width, height = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    return _resized(image[y0:y1, x0:x1], mask[y0:y1, x0:x1], width, height)


def _mirrored(picture: ObjectPicture, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    step = -1 if rng.random() < 0.5 else 1
    return picture.image[:, ::step], picture.mask[:, ::step]


def _resized(image: np.ndarray, mask: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    outline = Image.fromarray(np.ascontiguousarray(mask)).resize((width, height), Image.Resampling.NEAREST)
    return np.array(pixels), np.array(outline)
