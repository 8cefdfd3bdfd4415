"""What a predicted mask is worth, and how sure a table of such figures is.

Every metric of the field is a ratio of two sums over expressions: mIoU is the sum of IoUs over their number,
oIoU the sum of intersections over the sum of unions, a rate the number of hits over that of expressions. So
each expression leaves one small record behind, and all else (means, breakdowns, intervals) is made from
records, without a model.

A prediction whose IoU stays below 0.5 has failed, and `outcome` says how. The shares in this table are of the
*predicted* mask; "others" is the one other object that it overlaps most.

| outcome                  | condition, the first that holds                                                 |
|--------------------------|---------------------------------------------------------------------------------|
| right                    | IoU ≥ 0.5                                                                       |
| empty                    | nothing was predicted                                                           |
| part instead of whole    | at least half lies in the referent, less than half of which is covered          |
| wrong object             | one other object has more of it than the referent, and no less than background  |
| leak                     | at least half of the referent is covered, and much else                         |
| noise                    | anything else: mostly background, or a little of several things                 |
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Mask = Bool[np.ndarray, "h w"]
Record = dict[str, Any]

OUTCOMES = ("right", "part instead of whole", "wrong object", "leak", "noise", "empty")
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)

# The released code of PCNet and IteRPrimE looks for substrings, to which "bright" is a position.
POSITION = re.compile(r"\b(left|right|top|bottom|up|down|middle|center|centre)\b", re.IGNORECASE)
# "On" relates ("on the table") unless it places ("on the left").
RELATION = re.compile(
    r"\b(next to|beside|besides|near|nearest|closest to|by|behind|in front of|between|above|below|under|beneath"
    r"|over|on top of|on(?! (the )?(far |very )?(left|right|top|bottom|middle|side|end)\b)|inside|against|facing"
    r"|holding|(left|right) of)\b",
    re.IGNORECASE,
)


def is_position(expression: str) -> bool:
    """Whether the expression has a direction word as a whole word; otherwise it is counted under Others."""
    return POSITION.search(expression) is not None


def is_relation(expression: str) -> bool:
    """Whether the expression relates the referent to another object ("next to", "behind", "on" …)."""
    return RELATION.search(expression) is not None


def overlap(first: Mask, second: Mask) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two masks of one size."""
    return int((first & second).sum()), int((first | second).sum())


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union, in [0, 1]; two empty masks agree, which counts as 1."""
    intersection, union = overlap(first, second)
    return intersection / union if union else 1.0


def peak(response_map: Float[np.ndarray, "h w"]) -> tuple[int, int]:
    """Pixel (x, y) of the response map's maximum.

    A map that was enlarged is flat around its maximum, out to the border when that is near. Of such ties the
    one nearest to their centre is taken, not the first, which would lie top left of the others.
    """
    ys, xs = np.nonzero(response_map >= response_map.max() - 1e-6)
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    return int(xs[nearest]), int(ys[nearest])


def outcome(mask: Mask, referent: Mask, others: Iterable[Mask] = ()) -> str:
    """Right, or in which way wrong: one of `OUTCOMES`, by the table at the head of this module.

    Args:
        mask: the prediction.
        referent: the ground truth.
        others: masks of the image's other objects.
    """
    if iou(mask, referent) >= 0.5:
        return "right"
    predicted = mask.sum()
    if predicted == 0:
        return "empty"
    covered = (mask & referent).sum()
    wrong = mask & ~referent
    objects = [(wrong & other) for other in others]
    in_other = max((inside.sum() for inside in objects), default=0)
    in_background = (wrong & ~np.any(objects, axis=0)).sum() if objects else wrong.sum()
    half_of_referent = 2 * covered >= referent.sum()
    if 2 * covered >= predicted and not half_of_referent:
        return "part instead of whole"
    if in_other > covered and in_other >= in_background:
        return "wrong object"
    return "leak" if half_of_referent else "noise"


def score(
    mask: Mask,
    referent: Mask,
    others: Iterable[Mask] = (),
    response_map: Float[np.ndarray, "h w"] | None = None,
) -> Record:
    """The record of one prediction, ready for JSON; `summarize` and `breakdown` read such records.

    Args:
        mask: the prediction.
        referent: the ground truth.
        others: masks of the image's other objects.
        response_map: PointM asks whether its peak lies in the referent. None for a method without one.

    Returns:
        "intersection" and "union" in pixels, "iou" in [0, 1], "outcome" (one of `OUTCOMES`), and "hit":
        whether the peak is in the referent, or None.
    """
    intersection, union = overlap(mask, referent)
    hit = None
    if response_map is not None:
        x, y = peak(response_map)
        hit = bool(referent[y, x])
    return {
        "intersection": intersection,
        "union": union,
        "iou": iou(mask, referent),
        "hit": hit,
        "outcome": outcome(mask, referent, others),
    }


# Metric name -> what a record adds to its two sums (numerator, denominator).
METRICS: dict[str, Callable[[Record], tuple[float, float]]] = {
    "mIoU": lambda record: (record["iou"], 1),
    "oIoU": lambda record: (record["intersection"], record["union"]),
    **{f"P@{t}": lambda record, t=t: (record["iou"] > t, 1) for t in THRESHOLDS},
    "PointM": lambda record: (bool(record["hit"]), record["hit"] is not None),
    **{name: lambda record, name=name: (record["outcome"] == name, 1) for name in OUTCOMES},
}


def summarize(records: Sequence[Record], seed: int = 0, resamples: int = 1000) -> dict[str, dict[str, float]]:
    """All metrics of some records, in percent, with their uncertainty.

    Uncertainty comes from a bootstrap over *images*: the expressions of one image share its luck, so
    resampling expressions would promise too much.

    Args:
        records: from `score`, each with a key "image" that says which belong together.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        Metric name to "mean" (the metric on all records), "std" (bootstrap standard error) and "low", "high"
        (95 % percentile interval). A metric that no record speaks about is left out.
    """
    if not records:
        return {}
    images = {image: index for index, image in enumerate(dict.fromkeys(r["image"] for r in records))}
    rows = [images[record["image"]] for record in records]
    # How often each image was drawn, one row a resample; a resampled sum is then a matrix product.
    draws = np.random.default_rng(seed).multinomial(len(images), np.full(len(images), 1 / len(images)), resamples)
    summary = {}
    for name, terms in METRICS.items():
        sums = np.zeros((len(images), 2))
        np.add.at(sums, rows, np.array([terms(record) for record in records], float).reshape(-1, 2))
        numerator, denominator = sums.sum(axis=0)
        if denominator == 0:
            continue
        top, bottom = (draws @ sums).T
        drawn = top[bottom > 0] / bottom[bottom > 0]
        low, high = np.percentile(drawn, [2.5, 97.5])
        figures = {"mean": numerator / denominator, "std": drawn.std(), "low": low, "high": high}
        summary[name] = {key: round(100 * float(value), 2) for key, value in figures.items()}
    return summary


def breakdown(records: Sequence[Record], seed: int = 0) -> dict[str, dict[str, Any]]:
    """`summarize` for each of `groups`.

    Args:
        records: see `groups`.
        seed: of the bootstrap.

    Returns:
        Group name to {"n": number of expressions, "metrics": as from `summarize`}.
    """
    found = groups(records)
    return {name: {"n": len(group), "metrics": summarize(group, seed)} for name, group in found.items()}


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by what their expressions use.

    Args:
        records: from `score`, each with the keys "image", "expression", "kind" (None when not known) and "twins"
            (how many other objects of the image have the referent's category).

    Returns:
        The toy world's kinds come first, then "Position" and "Others", which share the expressions between them, then
        "with relation word" and "same-category distractor". Empty groups are left out.
    """
    kinds = dict.fromkeys(record["kind"] for record in records if record["kind"])
    found = {kind: [record for record in records if record["kind"] == kind] for kind in kinds}
    found["Position"] = [record for record in records if is_position(record["expression"])]
    found["Others"] = [record for record in records if not is_position(record["expression"])]
    found["with relation word"] = [record for record in records if is_relation(record["expression"])]
    found["same-category distractor"] = [record for record in records if record["twins"]]
    return {name: group for name, group in found.items() if group}
