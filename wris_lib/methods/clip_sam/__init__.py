"""CLIP + SAM: the baseline that everybody tries first.

CLIP says where (a similarity map), SAM says how far (a mask). Three steps, nothing to train:

    image, expression --CLIP--> similarity map --> points --SAM--> three masks --> the one SAM trusts most

Source: Li et al. 2023, "CLIP Surgery for Better Explainability". PPT (CVPR 2024) uses it both as its baseline
"CLIP + SAM", with a published mIoU of 26.46 on RefCOCO val, and to make pseudo-labels.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from scipy import ndimage
from torch.nn.functional import interpolate

from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.last_image import LastImage
from wris_lib.backbones.sam import SamImage, Segmenter, load_sam
from wris_lib.errors import WrisError
from wris_lib.methods import Method, Prediction, Stage


@dataclass(frozen=True)
class PointRule:
    """Which cells of a map become points.

    Args:
        threshold: a cell is a positive point when the map, scaled to [0, 1], reaches this.
        most: at most so many positive points.
        negatives: whether as many cells, those with the lowest values, become negative points.
    """

    threshold: float = 0.8
    most: int = 10
    negatives: bool = True


class ClipSam(Method):
    """CLIP's similarity map prompts SAM."""

    variants: ClassVar[dict[str, dict[str, Hashable]]] = {
        "plain": {"kind": "plain"},
        "surgery": {"kind": "surgery"},
    }

    def __init__(self, clip: Clip, sam: Segmenter, kind: str = "surgery", rule: PointRule = PointRule()) -> None:
        if kind not in self.variants:
            raise WrisError(f"clip_sam has no kind {kind!r}; choose one of: {', '.join(self.variants)}.")
        self.clip, self.sam, self.kind, self.rule = clip, sam, kind, rule
        self._look = LastImage(lambda image: (self.clip.encode_image(image), self.sam.embed(image)))

    @classmethod
    def load(cls, stack: str, kind: str = "surgery", device: str | None = None) -> "ClipSam":
        """Build the method from a stack's CLIP and SAM.

        Args:
            stack: "toy" or "paper".
            kind: of the map: "surgery" (CLIP Surgery) or "plain" (last-layer patches against the expression).
            device: such as "cpu"; by default the GPU if there is any.

        Raises:
            WrisError: no such kind or stack, or the stack's weights are missing or damaged.
        """
        return cls(load_clip(stack, device), load_sam(stack, device), kind)

    def predict(self, image: Image.Image, expressions: list[str]) -> list[Prediction]:
        """One prediction for each expression; CLIP and SAM look at the image once."""
        if not expressions:
            return []
        features, embedded = self._look(image)
        maps = self.clip.maps(features, expressions, self.kind)
        return [self._segment(embedded, response_map) for response_map in maps.float().cpu().numpy()]

    def find_all(self, image: Image.Image, expressions: list[str]) -> list[list[Bool[np.ndarray, "H W"]]]:
        """For each expression every object that it may name, the likeliest first: each peak of the map asks SAM anew.

        `predict` hands SAM all cells that reach the threshold in one prompt. When they lie on several objects, no mask
        is a good answer to it.
        """
        if not expressions:
            return []
        features, embedded = self._look(image)
        maps = self.clip.maps(features, expressions, self.kind)
        every = [peaks_of_map(each, *image.size, self.rule) for each in maps.float().cpu().numpy()]
        by_length: dict[int, list[tuple[int, int]]] = {}  # SAM takes prompts of one length at once
        for expression, prompts in enumerate(every):
            for number, (points, _) in enumerate(prompts):
                by_length.setdefault(len(points), []).append((expression, number))
        found: list[list] = [[None] * len(prompts) for prompts in every]
        for places in by_length.values():
            points, labels = (np.stack(arrays) for arrays in zip(*(every[e][n] for e, n in places), strict=True))
            decoded = self.sam.decode(embedded, torch.from_numpy(points), torch.from_numpy(labels))
            for (expression, number), mask in zip(places, self.sam.best_mask(embedded, decoded), strict=True):
                found[expression][number] = mask
        return found

    def _segment(self, embedded: SamImage, response_map: Float[np.ndarray, "h w"]) -> Prediction:
        height, width = embedded.original_size
        points, labels = points_from_map(response_map, width, height, self.rule)
        # Prompts go to SAM one by one: they differ in length, and SAM feels the padding of a shorter one.
        decoded = self.sam.decode(embedded, torch.from_numpy(points)[None], torch.from_numpy(labels)[None])
        masks = self.sam.masks(embedded, decoded)[0]
        scores = decoded.iou[0].float().cpu().numpy()
        best = int(scores.argmax())
        positive = int(labels.sum())
        trace = [
            Stage("similarity map", f"CLIP, {self.kind}", response_map=response_map),
            Stage(
                "points", f"{positive} positive, {len(labels) - positive} negative", points=points, point_labels=labels
            ),
            Stage("masks", f"SAM trusts number {best + 1} most", masks=masks, scores=scores),
        ]
        return Prediction(masks[best], enlarge(response_map, width, height), points, labels, float(scores[best]), trace)


def scale(response_map: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Min-max scaled to [0, 1]; a constant map becomes 0."""
    low, high = response_map.min(), response_map.max()
    return (response_map - low) / max(high - low, np.finfo(response_map.dtype).tiny)


def enlarge(response_map: Float[np.ndarray, "h w"], width: int, height: int) -> Float[np.ndarray, "H W"]:
    """Resized to the image, bilinear, and then scaled to [0, 1]."""
    grid = torch.from_numpy(response_map)[None, None]
    return scale(interpolate(grid, (height, width), mode="bilinear")[0, 0].numpy())


def points_from_map(
    response_map: Float[np.ndarray, "h w"], width: int, height: int, rule: PointRule = PointRule()
) -> tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, "n"]]:
    """Point prompts from a coarse map.

    Of the cells that reach the rule's threshold the best become positive points, at most half of all cells.

    Args:
        response_map: one value a cell of the image, in any range.
        width: of the image in pixels.
        height: of the image in pixels.
        rule: the default is CLIP Surgery's threshold, and ten points of each kind.

    Returns:
        Points (x, y) at the centres of their cells in image pixels, the best first, then the negative ones; and
        their labels, 1 or 0.
    """
    rows, columns = response_map.shape
    best_first = np.argsort(-response_map, axis=None, kind="stable")
    reached = int((scale(response_map) >= rule.threshold).sum())
    n = max(1, min(reached, rule.most, response_map.size // 2))
    # A map of a single cell has no other cell to be negative.
    cells = np.concatenate([best_first[:n], best_first[1:][::-1][: n * rule.negatives]])
    labels = (np.arange(len(cells)) < n).astype(np.int64)
    return _centres(cells, response_map.shape, width, height), labels


def peaks_of_map(
    response_map: Float[np.ndarray, "h w"], width: int, height: int, rule: PointRule = PointRule()
) -> list[tuple[Float[np.ndarray, "n 2"], Int[np.ndarray, "n"]]]:
    """A prompt for each peak of a coarse map, the highest first.

    A peak is a cell that reaches the rule's threshold and is not lower than its (up to eight) neighbours. Those of
    them that reach the threshold's share of the peak are positive points, too. Negative points, if the rule has any,
    are the same of all peaks: the `most` lowest cells, at most half of all.

    Args:
        response_map: one value a cell of the image, in any range.
        width: of the image in pixels.
        height: of the image in pixels.
        rule: as in `points_from_map`.

    Returns:
        Points and labels of each prompt, as in `points_from_map`. A map without differences has no peak.
    """
    scaled = scale(response_map)
    peaks = np.flatnonzero((scaled == ndimage.maximum_filter(scaled, 3)) & (scaled >= rule.threshold) & (scaled > 0))
    lowest_first = np.argsort(response_map, axis=None, kind="stable")
    prompts = []
    for peak in peaks[np.argsort(-scaled.flat[peaks], kind="stable")]:
        around = np.zeros(scaled.shape, dtype=bool)
        around.flat[peak] = True
        around = ndimage.binary_dilation(around, np.ones((3, 3)))
        positive = np.flatnonzero(around & (scaled >= rule.threshold * scaled.flat[peak]))
        others = lowest_first[~np.isin(lowest_first, positive)]
        negative = others[: min(rule.most, response_map.size // 2) * rule.negatives]
        labels = np.repeat([1, 0], [len(positive), len(negative)])
        prompts.append((_centres(np.concatenate([positive, negative]), scaled.shape, width, height), labels))
    return prompts


def _centres(cells: Int[np.ndarray, "n"], shape: tuple[int, int], width: int, height: int) -> Float[np.ndarray, "n 2"]:
    """(x, y) of cells, counted row by row, in pixels of the image."""
    rows, columns = shape
    points = np.stack([cells % columns + 0.5, cells // columns + 0.5], axis=1) * [width / columns, height / rows]
    return points.astype(np.float32)
