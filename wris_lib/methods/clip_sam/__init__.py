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
from jaxtyping import Float, Int
from PIL import Image
from torch.nn.functional import interpolate

from wris_lib.backbones.clip import Clip, load_clip
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
        maps = self.clip.maps(self.clip.encode_image(image), expressions, self.kind)
        embedded = self.sam.embed(image)
        return [self._segment(embedded, response_map) for response_map in maps.float().cpu().numpy()]

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
    points = np.stack([cells % columns + 0.5, cells // columns + 0.5], axis=1) * [width / columns, height / rows]
    return points.astype(np.float32), (np.arange(len(cells)) < n).astype(np.int64)
