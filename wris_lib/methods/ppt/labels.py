"""PPT's pseudo-labels: what a generator is trained on when nobody has drawn a mask.

CLIP Surgery and SAM, glued together (`methods.clip_sam`), answer a noun phrase with a mask. On an object-centric
picture that mask is mostly right; in a scene it is often not. From such answers come four datasets (CVPR 2024, §3.3):

| | picture | expression | candidates | referent |
|---|---|---|---|---|
| D_sem | object-centric | "the [class] in the middle" | its object | known |
| D_ref | composed of those (`compose`) | made with the scene | all its objects | known |
| H_sem | scene | as people wrote it; CLIP can choose | objects that its nouns may name | CLIP's choice, the first |
| H_ref | scene | as people wrote it; CLIP cannot | objects that its nouns may name | to be selected |

`Select` (`curriculum`) chooses H's referents with the generator trained so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch.nn.functional import adaptive_avg_pool2d

from wris_lib.errors import WrisError
from wris_lib.methods.ppt.loss import PseudoLabels

UNKNOWN = -1  # in place of a referent that is still to be selected
MOST_DRAWN = 4  # of an expression's candidates: each costs K matchings of points


@dataclass(frozen=True)
class LabelledExpressions:
    """Expressions with their candidates, as arrays: E expressions, C candidates in all.

    Attributes:
        expressions: the sentences.
        image: which image, of whatever list the maker was given, an expression is about.
        first: candidates first[e] to first[e + 1] are those of expression e; every expression has at least one.
        masks: which cells of a grid a candidate covers, more than half, packed by `numpy.packbits`. The grid lies over
            SAM's square input: the image in its upper left corner, and padding.
        referent: which of an expression's candidates is meant, counted from 0, or UNKNOWN.
        extents: (width, height) of an expression's image as shares of the square: (1, 1) for a square image.
        side: of the grid in cells.
    """

    expressions: tuple[str, ...]
    image: Int[np.ndarray, " E"]
    first: Int[np.ndarray, " E1"]
    masks: UInt8[np.ndarray, "C bytes"]
    referent: Int[np.ndarray, " E"]
    extents: Float[np.ndarray, "E 2"]
    side: int

    def __len__(self) -> int:
        return len(self.expressions)

    def candidates(self, expression: int) -> Bool[np.ndarray, "y side side"]:
        """Masks of an expression's candidates."""
        packed = self.masks[self.first[expression] : self.first[expression + 1]]
        return np.unpackbits(packed, axis=1, count=self.side**2).astype(bool).reshape(-1, self.side, self.side)

    def with_referents(self, referent: Int[np.ndarray, " E"]) -> "LabelledExpressions":
        """The same candidates with other referents."""
        return replace(self, referent=referent)

    def take(self, chosen: Int[np.ndarray, " n"]) -> "LabelledExpressions":
        """Some of the expressions, in the order given."""
        counts = np.diff(self.first)[chosen]
        rows = np.concatenate([np.arange(self.first[e], self.first[e + 1]) for e in chosen] or [np.zeros(0, int)])
        return LabelledExpressions(
            tuple(self.expressions[e] for e in chosen),
            self.image[chosen],
            np.concatenate([[0], np.cumsum(counts)]),
            self.masks[rows],
            self.referent[chosen],
            self.extents[chosen],
            self.side,
        )

    def draw(self, expressions: Int[np.ndarray, " n"], points: int, rng: np.random.Generator) -> PseudoLabels:
        """Pseudo-labels of a batch, with points drawn anew: uniform in the mask's box, positive on the mask.

        Of many candidates the referent and some others are drawn. A referent that is unknown leaves all scores at 0.

        Args:
            expressions: which ones.
            points: M, a candidate.
            rng: draws the points.
        """
        kept = [self._drawn(int(e), rng) for e in expressions]
        most = max(map(len, kept))
        masks = np.zeros((len(kept), most, self.side, self.side), dtype=np.float32)
        places = np.zeros((len(kept), most, points, 2), dtype=np.float32)
        labels, scores = np.zeros(places.shape[:3], dtype=np.float32), np.zeros(masks.shape[:2], dtype=np.float32)
        present = np.zeros(scores.shape, dtype=bool)
        for row, (e, numbers) in enumerate(zip(expressions, kept, strict=True)):
            present[row, : len(numbers)] = True
            masks[row, : len(numbers)] = self.candidates(int(e))[numbers]
            scores[row, : len(numbers)] = numbers == self.referent[e]  # never, where it is UNKNOWN
            for column in range(len(numbers)):
                places[row, column], labels[row, column] = draw_points(masks[row, column] > 0, points, rng)
        extents = self.extents[expressions]
        places = np.minimum(places / extents[:, None, None], 1)
        tensors = (torch.from_numpy(array) for array in (places, labels, scores, present, masks, extents))
        return PseudoLabels(*tensors)

    def _drawn(self, expression: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Which of an expression's candidates are drawn: the referent in any case, if it is known."""
        count, referent = int(self.first[expression + 1] - self.first[expression]), int(self.referent[expression])
        if count <= MOST_DRAWN:
            return np.arange(count)
        others = rng.permutation([number for number in range(count) if number != referent])
        return np.sort([*others[: MOST_DRAWN - (referent != UNKNOWN)], *[referent] * (referent != UNKNOWN)])


def draw_points(
    mask: Bool[np.ndarray, "h w"], count: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "count 2"], Float[np.ndarray, " count"]]:
    """Points uniform in a mask's bounding box, (x, y) as shares of its sides, and whether each is on it, 1 or 0.

    Raises:
        WrisError: the mask is empty.
    """
    height, width = mask.shape
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    if len(rows) == 0:
        raise WrisError("an empty mask has no box to draw points in; leave such candidates out.")
    x = rng.uniform(columns[0], columns[-1] + 1, count)
    y = rng.uniform(rows[0], rows[-1] + 1, count)
    on = mask[np.minimum(y.astype(int), height - 1), np.minimum(x.astype(int), width - 1)]
    return np.stack([x / width, y / height], axis=1).astype(np.float32), on.astype(np.float32)


class Collector:
    """Gathers expressions one by one.

    Args:
        side: of the grid that masks are kept on, in cells.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.rows: list[tuple[str, int, list[np.ndarray], int, Float[np.ndarray, "2"]]] = []

    def add(self, expression: str, image: int, masks: Bool[np.ndarray, "y H W"], referent: int = UNKNOWN) -> None:
        """Add an expression. Candidates too small for the grid are left out; with the referent goes the expression."""
        packed = [np.packbits(shrink(mask, self.side)) for mask in masks]
        kept = [number for number, mask in enumerate(packed) if mask.any()]
        if not kept or (referent != UNKNOWN and referent not in kept):
            return
        chosen = UNKNOWN if referent == UNKNOWN else kept.index(referent)
        height, width = masks.shape[1:]
        extent = np.array([width, height], dtype=np.float32) / max(width, height)
        self.rows.append((expression, image, [packed[number] for number in kept], chosen, extent))

    def finish(self) -> LabelledExpressions:
        """All that were added.

        Raises:
            WrisError: there are none.
        """
        if not self.rows:
            raise WrisError("no expression got a pseudo-label; are there pictures, and do their objects show?")
        expressions, images, masks, referents, extents = zip(*self.rows, strict=True)
        return LabelledExpressions(
            expressions,
            np.array(images),
            np.concatenate([[0], np.cumsum([len(group) for group in masks])]),
            np.stack([mask for group in masks for mask in group]),
            np.array(referents),
            np.stack(extents),
            self.side,
        )


def shrink(mask: Bool[np.ndarray, "H W"], side: int) -> Bool[np.ndarray, "{side} {side}"]:
    """Which cells of a grid over SAM's square input a mask covers by more than half."""
    height, width = (max(1, round(side * length / max(mask.shape))) for length in mask.shape)
    grid = np.zeros((side, side), dtype=bool)
    covered = adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), (height, width))[0]
    grid[:height, :width] = covered.numpy() > 0.5
    return grid


def join(parts: Sequence[LabelledExpressions], images: Sequence[int]) -> LabelledExpressions:
    """Several datasets as one.

    Args:
        parts: with masks on the same grid.
        images: how many images each of them is about; the joint list of images has them one behind the other.
    """
    starts = np.concatenate([[0], np.cumsum(images)[:-1]])
    counts = np.concatenate([np.diff(part.first) for part in parts])
    return LabelledExpressions(
        tuple(text for part in parts for text in part.expressions),
        np.concatenate([part.image + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([[0], np.cumsum(counts)]),
        np.concatenate([part.masks for part in parts]),
        np.concatenate([part.referent for part in parts]),
        np.concatenate([part.extents for part in parts]),
        parts[0].side,
    )
