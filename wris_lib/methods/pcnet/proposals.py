"""Mask proposals: what SAM finds in an image without being told what to look for, on the grid of the response maps.

PCNet needs them in training only: L_RaS compares how much of the response lies on one thing and how much on others.
"""

from typing import Any

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from wris_lib.backbones.feature_store import Encoder
from wris_lib.backbones.features import SAM_CODE, fingerprint
from wris_lib.backbones.sam import Segmenter

MOST = 40  # proposals of an image, as in the paper
# Of `Segmenter.proposals`, by stack. The paper's are PCNet's own; the toy SAM's are said there, on a coarser grid.
SETTINGS: dict[str, dict[str, Any]] = {
    "toy": {"points_per_side": 8},
    "paper": {
        "points_per_side": 8,
        "iou_threshold": 0.7,
        "stability_threshold": 0.7,
        "stability_offset": 1.0,
        "overlap_threshold": 0.8,
        "min_area": 1000,
    },
}


def propose(
    segmenter: Segmenter, image: Image.Image, rows: int, columns: int, settings: dict[str, Any]
) -> Bool[Tensor, "P n"]:
    """At most `MOST` masks, each a list of the grid's n = rows · columns cells that it covers by more than half.

    A mask that covers no cell is not among them, and of masks that cover the same cells only the first is.

    Args:
        segmenter: frozen.
        image: RGB.
        rows: of the grid over the whole image.
        columns: of it.
        settings: of `Segmenter.proposals`.
    """
    masks = torch.from_numpy(segmenter.proposals(image, **settings))
    covered = (adaptive_avg_pool2d(masks[:, None].float(), (rows, columns)) > 0.5).flatten(1)
    unique = dict.fromkeys(tuple(mask) for mask in covered.tolist() if any(mask))
    return torch.tensor([*unique][:MOST], dtype=torch.bool).reshape(-1, rows * columns)


def proposal_encoder(segmenter: Segmenter, rows: int, columns: int, stack: str) -> Encoder:
    """`propose` for the cache: "proposals" [P, n], of every image as many as it has.

    Args:
        segmenter: frozen.
        rows: of the grid.
        columns: of the grid.
        stack: its `SETTINGS` are used.
    """
    settings = SETTINGS[stack]
    return Encoder(
        "pcnet-proposals",
        lambda images: {"proposals": [propose(segmenter, image, rows, columns, settings) for image in images]},
        settings | {"rows": rows, "columns": columns, "most": MOST},
        fingerprint(segmenter.sam, (*SAM_CODE, __file__)),
        batch=16,
    )
