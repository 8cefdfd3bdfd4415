"""Mask proposals of whole things: what SAM finds in an image without being told what to look for.

Methods that choose among proposals were published with those of Mask2Former, which was taught whole objects. SAM also
proposes their parts, and a choice by the mean of a map prefers a part at the map's peak to the thing around it. So
proposals that lie within another are left out.

Asking SAM at a grid of points takes about a second an image. Proposals are kept on the disk: several methods choose
among the same ones, and only the first of them waits.
"""

import hashlib
import json
import warnings
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool
from PIL import Image

from wris_lib.backbones.features import SAM_CODE, fingerprint
from wris_lib.backbones.sam import Segmenter
from wris_lib.files import atomic_write, cache_dir

# Of `Segmenter.proposals`, by stack: the toy SAM's are its defaults, the paper's those that SAM's authors advise.
SETTINGS: dict[str, dict[str, Any]] = {
    "toy": {},
    "paper": {
        "points_per_side": 32,
        "iou_threshold": 0.88,
        "stability_threshold": 0.95,
        "stability_offset": 1.0,
    },
}
INSIDE = 0.8  # share of a proposal's pixels that lie in a larger one, from which on it counts as a part of that
LARGEST = 0.5  # of the image; larger proposals are ground, and nothing is a part of them
NO_PROPOSALS = "SAM proposes nothing in this image"


class Proposer:
    """SAM's proposals of whole things, from the cache where they are there.

    Args:
        segmenter: frozen.
        settings: of `Segmenter.proposals`.
    """

    def __init__(self, segmenter: Segmenter, settings: dict[str, Any]) -> None:
        self.segmenter, self.settings = segmenter, settings

    def __call__(self, image: Image.Image) -> Bool[np.ndarray, "p H W"]:
        """Masks of an RGB image, best first; there may be none.

        Raises:
            WrisError: the image is too thin, or the cache cannot be written.
        """
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        path = self.folder / digest[:2] / f"{digest[2:18]}.npz"
        if (kept := _read(path)) is not None:
            return kept
        masks = whole_things(self.segmenter.proposals(image, **self.settings))
        with atomic_write(path) as file:
            np.savez_compressed(file, bits=np.packbits(masks), shape=np.array(masks.shape))
        return masks

    @cached_property
    def folder(self) -> Path:
        """Named after all that proposals depend on, but the image."""
        about = [fingerprint(self.segmenter.sam, (*SAM_CODE, __file__)), self.settings]
        return cache_dir() / "proposals" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def whole_things(masks: Bool[np.ndarray, "p H W"]) -> Bool[np.ndarray, "k H W"]:
    """Masks that are not parts of others, in their order.

    A mask is a part if at least `INSIDE` of it lies in a larger one, which covers less than `LARGEST` of the image. Of
    two masks of nearly one size (5 %) neither is a part. What stands before a thing is none of its parts: SAM leaves it
    out of the thing's mask.
    """
    if not len(masks):
        return masks
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    areas = flat.sum(axis=1)
    inside = flat @ flat.T >= INSIDE * areas[:, None]
    larger = (areas > 1.05 * areas[:, None]) & (areas < LARGEST * flat.shape[1])
    return masks[~(inside & larger).any(axis=1)]


def not_empty(masks: Bool[np.ndarray, "p H W"]) -> Bool[np.ndarray, "k H W"]:
    """Masks among which one can choose. There may be none, and a warning says so."""
    masks = masks[masks.any(axis=(1, 2))]
    if not len(masks):
        warnings.warn(f"{NO_PROPOSALS}, so nothing can be chosen.", stacklevel=3)
    return masks


def _read(path: Path) -> Bool[np.ndarray, "p H W"] | None:
    """Kept proposals; None: there are none, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            shape = tuple(kept["shape"].tolist())
            return np.unpackbits(kept["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
    except (OSError, BadZipFile, zlib.error, NotImplementedError, KeyError, ValueError, EOFError):
        return None
