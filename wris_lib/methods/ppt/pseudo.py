"""Where PPT's four datasets come from: no masks, only CLIP + SAM, class names, sentences, and scissors.

`label_objects` asks CLIP + SAM for the object of every object-centric picture. From what it finds, `semantic` makes
D_sem and `referring` D_ref; `from_expressions` makes H out of scenes with sentences. Each gives its images as `Rows`,
ready to be encoded once by `backbones.feature_store`, and its expressions as `LabelledExpressions`.

Source: Dai and Yang, CVPR 2024, §3.3. The paper does not say how doubtful pseudo-masks are treated; here those that SAM
trusts least are left out.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from wris_lib.backbones.feature_store import Rows
from wris_lib.backbones.features import image_files
from wris_lib.backbones.language import Parse, Parser
from wris_lib.data.images import check_expression, load_image
from wris_lib.data.objects import ObjectImage
from wris_lib.data.refer import Expression
from wris_lib.errors import WrisError
from wris_lib.evaluate import iou
from wris_lib.methods import Method
from wris_lib.methods.clip_sam import ClipSam
from wris_lib.methods.ppt.compose import ComposedScene, ObjectPicture, compose, fuse, place, sentences
from wris_lib.methods.ppt.labels import UNKNOWN, Collector, LabelledExpressions, shrink

LEAST_AREA, LARGEST_AREA = 0.01, 0.9  # of the picture: a mask beyond these is no object
LEAST_SEEN, LARGEST_SEEN = 0.004, 0.6  # the same for an object among others, in a scene
SAME = 0.6  # IoU from which two candidates are one
MOST_OBJECTS = 9  # in a composed scene
TWINS = 0.5  # share of scenes in which several objects are of the first one's class
ARTICLES = {"the", "a", "an"}
PLACES = {"left", "right", "top", "bottom", "front", "back", "middle", "center", "centre", "side", "corner", "picture"}


@dataclass(frozen=True)
class LabelledImages:
    """Images with expressions about them.

    Attributes:
        images: whatever is to be encoded, once.
        labels: expressions and candidates; `labels.image` numbers `images`.
        notes: how many were left out and why, to be shown.
    """

    images: Rows
    labels: LabelledExpressions
    notes: dict[str, int] = field(default_factory=dict)


def label_objects(method: Method, pictures: Sequence[ObjectImage], size: int, keep: float = 0.8) -> list[ObjectPicture]:
    """Ask a method for the object in each object-centric picture, by the name of its class.

    Args:
        method: CLIP + SAM.
        pictures: files and class names.
        size: longer side, in pixels, at which they are kept; larger ones are scaled down.
        keep: share that is kept, those with the method's highest score.

    Returns:
        Pictures with pseudo-masks, in the order given. Those whose mask is nearly nothing or nearly everything are left
        out before `keep` counts.

    Raises:
        WrisError: no picture is left; a picture cannot be read.
    """
    found: list[tuple[float, ObjectPicture]] = []
    for number, picture in enumerate(tqdm(pictures, "pseudo-masks of objects", unit=" pictures")):
        image = thumbnail(picture, size)
        answer = method.predict(image, [check_expression(picture.class_name)])[0]
        if LEAST_AREA <= answer.mask.mean() <= LARGEST_AREA:
            found.append((answer.score, ObjectPicture(np.array(image), answer.mask, picture.class_name, number)))
    if not found:
        raise WrisError(
            f"CLIP + SAM found no object in any of {len(pictures)} object-centric pictures; they should show one large"
            " object each, in a folder that has its class's name."
        )
    least = np.quantile([score for score, _ in found], 1 - keep)
    return [picture for score, picture in found if score >= least]


def thumbnail(picture: ObjectImage, size: int) -> Image.Image:
    """The picture, scaled down when its longer side has more than `size` pixels."""
    image = load_image(picture.image_path)
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    return image


def semantic(pictures: Sequence[ObjectPicture], copies: int, size: int, side: int, seed: int = 0) -> LabelledImages:
    """D_sem: each picture several times, mirrored and moved closer or farther, with "the [class] in the middle".

    Args:
        pictures: with pseudo-masks.
        copies: of each picture.
        size: side of the images in pixels.
        side: of the masks' grid in cells.
        seed: of what happens to the copies.
    """

    def make(row: int) -> ComposedScene:
        return place(pictures[row // copies], size, np.random.default_rng([seed, 1, row]))

    collector, keys = Collector(side), []
    for row in tqdm(range(len(pictures) * copies), "D_sem", unit=" images"):
        scene = make(row)
        keys.append(_key(row, scene))
        collector.add(f"the {scene.names[0]} in the middle", row, scene.masks, 0)
    return LabelledImages(Rows(keys, lambda row: Image.fromarray(make(row).image)), collector.finish())


def referring(pictures: Sequence[ObjectPicture], scenes: int, size: int, side: int, seed: int = 0) -> LabelledImages:
    """D_ref: scenes made of the pictures, every other one by composition and by fusion, with true sentences.

    All objects are candidates, those that the sentence does not mean as well: they teach what is *not* the referent.

    Args:
        pictures: with pseudo-masks.
        scenes: how many to make.
        size: their side in pixels.
        side: of the masks' grid in cells.
        seed: of the scenes.
    """
    by_name: dict[str, list[int]] = {}
    for number, picture in enumerate(pictures):
        by_name.setdefault(picture.name, []).append(number)

    def make(row: int, rng: np.random.Generator) -> ComposedScene:
        chosen = list(rng.integers(len(pictures), size=rng.integers(2, MOST_OBJECTS, endpoint=True)))
        if rng.random() < TWINS:
            same = by_name[pictures[chosen[0]].name]
            for position in range(1, 1 + int(rng.integers(1, 3))):
                chosen[position % len(chosen)] = int(rng.choice(same))
        rng.shuffle(chosen)
        return (compose if row % 2 == 0 else fuse)([pictures[number] for number in chosen], size, rng)

    collector, keys = Collector(side), []
    for row in tqdm(range(scenes), "D_ref", unit=" scenes"):
        rng = np.random.default_rng([seed, 2, row])
        scene = make(row, rng)
        keys.append(_key(row, scene))
        small = np.stack([shrink(mask, side) for mask in scene.masks])  # once, not for each of the sentences
        for text, referent in sentences(scene, rng):
            collector.add(text, row, small, referent)

    def load(row: int) -> Image.Image:
        return Image.fromarray(make(row, np.random.default_rng([seed, 2, row])).image)

    return LabelledImages(Rows(keys, load), collector.finish())


def from_expressions(method: ClipSam, parser: Parser, items: Iterable[Expression], side: int) -> LabelledImages:
    """H: scenes with sentences as people wrote them, and candidates for what their noun phrases name.

    The paper has one candidate a noun phrase, CLIP + SAM's answer. In a scene with three men "man" has three right
    answers, and CLIP + SAM's is one of them, or several at once. Here every peak of CLIP's map gives a candidate (see
    `ClipSam.find_all`), and it is for `Select` to find the referent among them. In samples of ToyRef train it was there
    in 79 of 100 expressions; in the paper's way in 37 (`train ppt --pseudo-labels` measures both on more).

    H_sem are expressions that leave no choice, having one candidate, and those whose choice CLIP can make: they have
    one noun phrase and no word of place, and the first candidate, CLIP's choice, is taken for the referent. With all
    others the referent is UNKNOWN (H_ref). CLIP does not know left from right, and would teach to ignore them. "The
    left" is a noun phrase, too, but there is nothing of that name to be found; such phrases do not count.

    Args:
        method: CLIP + SAM.
        parser: finds the noun phrases.
        items: images and expressions, without masks.
        side: of the masks' grid in cells.

    Raises:
        WrisError: no expression got a candidate; an image cannot be read.
    """
    items = list(items)
    by_image: dict = {}
    for item, parse in zip(items, parser.parse([item.expression for item in items]), strict=True):
        by_image.setdefault(item.image_path, []).append((item.expression, things(parse)))
    collector, nothing = Collector(side), 0
    for row, (path, expressions) in enumerate(tqdm(by_image.items(), "candidates of expressions", unit=" images")):
        phrases = list(dict.fromkeys(phrase for _, found in expressions for phrase in found))
        found = method.find_all(load_image(path), phrases)
        objects = {phrase: _distinct(masks) for phrase, masks in zip(phrases, found, strict=True)}
        for expression, named in expressions:
            nothing += sum(not objects[phrase] for phrase in named)
            masks = _distinct([mask for phrase in named for mask in objects[phrase]])
            if masks:
                known = len(masks) == 1 or (len(named) == 1 and not tells_a_place(expression))
                collector.add(expression, row, np.stack(masks), 0 if known else UNKNOWN)
    return LabelledImages(image_files(list(by_image)), collector.finish(), {"phrases found nowhere": nothing})


def _distinct(masks: Iterable[Bool[np.ndarray, "h w"]]) -> list[Bool[np.ndarray, "h w"]]:
    """The masks' largest pieces, without those that are no object, or the same object as an earlier one."""
    kept: list[np.ndarray] = []
    for mask in map(largest_piece, masks):
        if LEAST_SEEN <= mask.mean() <= LARGEST_SEEN and all(iou(mask, other) < SAME for other in kept):
            kept.append(mask)
    return kept


def largest_piece(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The largest connected piece (4 neighbours) of a mask; of an empty mask the mask."""
    numbers, _ = ndimage.label(mask)
    areas = np.bincount(numbers.ravel())
    areas[0] = 0  # what is not in the mask
    return mask & (numbers == areas.argmax())


def things(parse: Parse) -> list[str]:
    """An expression's noun phrases, without those that name a place, unless there is nothing else."""
    phrases = list(dict.fromkeys(parse.noun_phrases))
    return [phrase for phrase in phrases if not names_a_place(phrase)] or phrases


def tells_a_place(expression: str) -> bool:
    """Whether an expression says where in the picture something is: "the left dog", "dog in the corner"."""
    return not PLACES.isdisjoint(expression.lower().split())


def names_a_place(phrase: str) -> bool:
    """ "the left", "the top right corner": a place in the picture and no thing."""
    return {*phrase.lower().split()} - ARTICLES <= PLACES


def _key(row: int, scene: ComposedScene) -> str:
    """What the feature cache knows an image by: its pixels, and its number, for two may be alike."""
    return f"{row} {hashlib.sha256(scene.image.tobytes()).hexdigest()}"
