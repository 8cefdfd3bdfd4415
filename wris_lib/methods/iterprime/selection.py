"""From a map to a mask: of an image's proposals the one that the map's peak lies in and that the map fills best."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

from wris_lib.errors import WrisError
from wris_lib.methods.clip_sam import scale


@dataclass(frozen=True)
class Choice:
    """Which proposal, and why.

    Attributes:
        index: of the chosen one.
        scores: of all, Σ(B + B⊙H) / ΣB, from 1 to 2; 0 for an empty one.
        passed: which of them the filter let pass.
        fell_back: it let none pass, so the best score of all was taken.
    """

    index: int
    scores: Float[np.ndarray, "p"]
    passed: Bool[np.ndarray, "p"]
    fell_back: bool


def upsample(response_map: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """A map as large as its image, bicubic, then min-max scaled to [0, 1]; a constant one becomes 0.

    Args:
        response_map: a value for each patch.
        size: of the image, (height, width) in pixels.
    """
    large = interpolate(response_map.float()[None, None], size, mode="bicubic")
    return scale(large[0, 0].cpu().numpy())


def choose(
    response_map: Float[np.ndarray, "H W"], masks: Bool[np.ndarray, "p h w"], most_components: int = 12
) -> Choice:
    """The proposal with the best score among those that contain a peak and do not lie scattered; of equals, the first.

    Args:
        response_map: H in [0, 1].
        masks: B, at least one, of the map's size.
        most_components: κ, at most so many pieces, 4-connected.

    Raises:
        WrisError: masks and map differ in size.
    """
    if masks.shape[1:] != response_map.shape:
        (height, width), (rows, columns) = masks.shape[1:], response_map.shape
        raise WrisError(
            f"the proposals are {width}×{height} pixels and the map is {columns}×{rows}; give proposals of the same"
            " image, at its size."
        )
    # As in `evaluate.peak`: an enlarged map is flat around a maximum at the border, but for rounding.
    peaks = response_map >= response_map.max() - 1e-6
    scores = np.array([1 + response_map[mask].mean(dtype=np.float64) if mask.any() else 0.0 for mask in masks])
    passed = np.array([mask[peaks].any() and ndimage.label(mask)[1] <= most_components for mask in masks])
    eligible = passed if passed.any() else np.ones_like(passed)
    return Choice(int(np.where(eligible, scores, -1).argmax()), scores, passed, not passed.any())
