"""Which answers to show: a method's best, one for each way in which it fails, and what methods disagree about.

Nobody picks: examples are found by a search over all records of a split, no image is shown twice, and how common a
failure is can be told from the same records.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask

from wris_lib.evaluate import Record


def best(records: Sequence[Record], count: int) -> list[Record]:
    """Those of highest IoU, from as many images."""
    return _from_different_images(sorted(records, key=lambda record: -record["iou"]), count)


def failures(records: Sequence[Record], seed: int = 0) -> list[tuple[Record, float]]:
    """For each way of failing, the commonest first, the answer of lowest IoU; among equals one is drawn.

    Args:
        records: of one method on one split.
        seed: of the draw.

    Returns:
        Each with the share of all records that fail in this way.
    """
    shuffled = [records[index] for index in np.random.default_rng(seed).permutation(len(records))]
    worst_first = sorted(shuffled, key=lambda record: record["iou"])
    counts = Counter(record["outcome"] for record in records if record["outcome"] != "right")
    return [
        (next(record for record in worst_first if record["outcome"] == outcome), count / len(records))
        for outcome, count in counts.most_common()
    ]


def disagreements(found: Mapping[str, Sequence[Record]], count: int) -> list[int]:
    """Expressions that some methods answer well and others badly.

    Args:
        found: by method, records of the same expressions in the same order.
        count: of expressions, from as many images.

    Returns:
        Places in these lists, those first where the methods' IoUs have the largest variance.
    """
    ious = np.array([[record["iou"] for record in records] for records in found.values()])
    one = next(iter(found.values()))
    ordered = [one[place] | {"place": int(place)} for place in np.argsort(-ious.var(axis=0), kind="stable")]
    return [record["place"] for record in _from_different_images(ordered, count)]


def agreement(found: Mapping[str, Sequence[Record]]) -> Float[np.ndarray, "m m"]:
    """How often two methods mean the same: share of expressions for which their masks' IoU is at least 0.5.

    Two empty masks say nothing, and so do not agree.

    Args:
        found: see `disagreements`.
    """
    same = np.zeros((len(found), len(found)))
    answers = list(zip(*found.values(), strict=True))
    for records in answers:
        runs = [record["mask"] for record in records]
        same += coco_mask.iou(runs, runs, [False] * len(runs)) >= 0.5
    return same / len(answers)


def most_agreed(records: Sequence[Record]) -> int:
    """Which of several answers to one expression the others agree with most; nobody looks at the truth.

    Args:
        records: one of each method.

    Returns:
        The place of the one whose mask has the largest sum of IoUs with the others.
    """
    masks = [record["mask"] for record in records]
    return int((coco_mask.iou(masks, masks, [False] * len(masks)) * (1 - np.eye(len(masks)))).sum(axis=1).argmax())


def _from_different_images(records: Iterable[Record], count: int) -> list[Record]:
    """The first record of each image, up to so many."""
    first: dict[int, Record] = {}
    for record in records:
        first.setdefault(record["image"], record)
    return list(first.values())[:count]
