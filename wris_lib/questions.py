"""What methods are asked: expressions of images drawn at random, and the record that each answer leaves behind."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from wris_lib import evaluate
from wris_lib.contestants import Predict
from wris_lib.data.coco import encode_mask
from wris_lib.data.images import load_image
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError
from wris_lib.evaluate import Record


def measure(predict: Predict, items: Sequence[EvaluationItem], limit: int | None = None, seed: int = 0) -> list[Record]:
    """Records of whatever answers, such as a generator in training; they are not kept.

    Args:
        predict: see `contestants.predictor`.
        items: of a split.
        limit: see `draw`.
        seed: see `draw`.
    """
    chosen = draw(items, limit, seed)
    return [record for indices in chosen for record in ask(predict, {index: items[index] for index in indices})]


def draw(items: Sequence[EvaluationItem], limit: int | None, seed: int) -> list[list[int]]:
    """Numbers of items, by image: of all images, or of images in random order until their expressions are enough.

    Args:
        items: of a split.
        limit: at least so many expressions, or all of them. None: all, in the split's order.
        seed: of the order.

    Raises:
        WrisError: the limit is below 1.
    """
    by_path: dict[Path, list[int]] = {}
    for index, item in enumerate(items):
        by_path.setdefault(item.image_path, []).append(index)
    images = list(by_path.values())
    if limit is None:
        return images
    if limit < 1:
        raise WrisError(f"the limit is {limit}, but at least one expression is needed.")
    order = np.random.default_rng(seed).permutation(len(images))
    lengths = np.cumsum([len(images[index]) for index in order])
    return [images[index] for index in order[: np.searchsorted(lengths, limit) + 1]]


def ask(predict: Predict, items: dict[int, EvaluationItem]) -> Iterator[Record]:
    """The records of one image's expressions, see `benchmark.records`.

    Args:
        predict: see `contestants.predictor`.
        items: by their numbers in the split.

    Raises:
        WrisError: image and masks differ in size.
    """
    path = next(iter(items.values())).image_path
    image = load_image(path)
    answers = predict(image, list(items.values()))
    for (index, item), (mask, response_map) in zip(items.items(), answers, strict=True):
        if (size := item.mask.shape) != mask.shape:
            raise WrisError(
                f"{path} has {image.width}×{image.height} pixels, but its masks have {size[1]}×{size[0]}; use the"
                " images that belong to the dataset."
            )
        about = {"item": index, "image": item.image_id, "expression": item.expression, "kind": item.kind}
        about |= {"twins": item.twins, "mask": encode_mask(mask)}
        yield about | evaluate.score(mask, item.mask, item.others, response_map)
