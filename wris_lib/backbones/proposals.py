"""Mask proposals: what a model finds in an image without being told what to look for.

Methods that choose among proposals were published with those of Mask2Former, which was taught whole objects: see
`mask2former`. SAM also proposes their parts, and a choice by the mean of a map prefers a part at the map's peak to the
thing around it. So proposals of SAM that lie within another are left out.

Asking SAM at a grid of points takes about a second an image. Proposals are kept on the disk: several methods choose
among the same ones, and only the first of them waits.
"""

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image

from wris_lib.backbones.features import SAM_CODE, fingerprint
from wris_lib.backbones.sam import Segmenter, load_sam
from wris_lib.errors import WrisError
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
NO_PROPOSALS = "nothing is proposed in this image"


class Proposer:
    """Proposals of a frozen model, from the cache where they are there.

    Args:
        find: masks of an RGB image, best first.
        about: gives, as JSON has it, all that they depend on but the image.
    """

    def __init__(
        self, find: Callable[[Image.Image], Bool[np.ndarray, "p H W"]], about: Callable[[], list[Any]]
    ) -> None:
        self._find, self._about = find, about

    def __call__(self, image: Image.Image) -> Bool[np.ndarray, "p H W"]:
        """Masks of an RGB image, best first; there may be none.

        Raises:
            WrisError: the image is too thin, or the cache cannot be written.
        """
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        path = self.folder / digest[:2] / f"{digest[2:18]}.npz"
        if (kept := _read(path)) is not None:
            return kept
        masks = self._find(image)
        with atomic_write(path) as file:
            np.savez_compressed(file, bits=np.packbits(masks), shape=np.array(masks.shape))
        return masks

    @cached_property
    def folder(self) -> Path:
        return cache_dir() / "proposals" / hashlib.sha256(json.dumps(self._about()).encode()).hexdigest()[:16]


def sam_proposer(segmenter: Segmenter, settings: dict[str, Any]) -> Proposer:
    """SAM's proposals of whole things.

    Args:
        segmenter: frozen.
        settings: of `Segmenter.proposals`.
    """
    return Proposer(
        lambda image: whole_things(segmenter.proposals(image, **settings)),
        lambda: [fingerprint(segmenter.sam, (*SAM_CODE, __file__)), settings],
    )


def load_proposer(source: str, stack: str, device: str | torch.device | None = None) -> Proposer:
    """Who proposes masks.

    Args:
        source: "sam" or "mask2former".
        stack: "toy" or "paper".
        device: None: CUDA when there is one.

    Raises:
        WrisError: no such source or stack; the stack has none of that kind, or its weights are missing or damaged.
    """
    if source == "sam":
        return sam_proposer(load_sam(stack, device), SETTINGS[stack])
    if source == "mask2former":
        from wris_lib.backbones.mask2former import load_mask2former

        return load_mask2former(stack, device)
    raise WrisError(f"nobody proposes masks by {source!r}; choose one of: sam, mask2former.")


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
