"""What the point generator sees of an image: CLIP's patch features, of the image shown larger than CLIP is used to.

Half of the things in a scene are two patches wide, and CLIP hardly tells what they are. In an image twice as large they
are four patches wide. What CLIP makes of that is averaged over 2 × 2 patches, so that the generator has no more to read
than before.

As a whole such an image is nothing that CLIP has ever seen: many more patches than in training attend to one another,
32 × 32 instead of 12 × 12 in the toy's. So it is looked at in pieces that overlap, as large as the images that CLIP was
trained with, and put together again. A linear probe names a fifth more of a scene's objects then
(`studies.ppt_features`).

Sliding windows are what others do who take masks from a frozen CLIP, such as SCLIP (Wang et al., ECCV 2024). PPT's
paper does not say how large its images are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import Encoder
from wris_lib.backbones.features import CLIP_CODE, clip_patches, fingerprint
from wris_lib.methods.ppt.config import GeneratorConfig

OVERLAP = 1 / 3  # of neighbouring tiles, at least, as a share of their side


@torch.no_grad()
def visual_features(
    clip: Clip, config: GeneratorConfig, images: Sequence[Image.Image]
) -> list[Float[Tensor, "B _ h w"]]:
    """The visual input of a generator: a feature map for each stage, on the grid of CLIP's `dense_size`.

    Args:
        clip: frozen.
        config: says which stages, how large an image is shown, and in what tiles.
        images: RGB.
    """
    pixels = torch.stack([clip.preprocess(image, config.zoom * clip.dense_size) for image in images])

    def see(shown: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b _ h w"]]:
        return [features.float() for features in clip.patch_features(shown, config.stages)]

    seen = see(pixels) if config.tile is None else see_in_tiles(see, pixels, config.tile, clip.patch_size)
    return [F.avg_pool2d(features, config.zoom) for features in seen]


def see_in_tiles(
    see: Callable[[Float[Tensor, "n 3 t t"]], Sequence[Float[Tensor, "n _ p p"]]],
    pixels: Float[Tensor, "B 3 s s"],
    tile: int,
    patch: int,
) -> list[Float[Tensor, "B _ w w"]]:
    """Feature maps of square images that are looked at piece by piece.

    Where tiles overlap their features are averaged, and a tile counts the more, the nearer a patch is to its middle.

    Args:
        see: gives feature maps of tiles.
        pixels: of the images.
        tile: side of a tile in pixels, a multiple of `patch`.
        patch: side of what one cell of a feature map stands for, in pixels.
    """
    tile = min(tile, pixels.shape[-1])
    cells, whole = tile // patch, pixels.shape[-1] // patch
    starts = tile_starts(whole, cells)
    corners = list(product(starts, starts))
    tiles = [pixels[:, :, y * patch :, x * patch :][:, :, :tile, :tile] for y, x in corners]
    ramp = 1 - (2 * torch.arange(cells, device=pixels.device) + 1 - cells).abs() / (cells + 1)
    weight = ramp[:, None] * ramp
    found = []
    for features in see(torch.cat(tiles)):
        sums = features.new_zeros(len(pixels), features.shape[1], whole, whole)
        weights = features.new_zeros(whole, whole)
        for (y, x), part in zip(corners, features.split(len(pixels)), strict=True):
            window = (..., slice(y, y + cells), slice(x, x + cells))
            sums[window] += weight * part
            weights[window] += weight
        found.append(sums / weights)
    return found


def tile_starts(whole: int, cells: int) -> list[int]:
    """Where tiles of some cells begin along a side: evenly, and so that neighbours share at least `OVERLAP`."""
    last = max(0, whole - cells)
    steps = math.ceil(last / (cells - math.ceil(OVERLAP * cells)))
    return [round(step * last / max(1, steps)) for step in range(steps + 1)]


def visual_encoder(clip: Clip, config: GeneratorConfig) -> Encoder:
    """`visual_features` for the cache, with the names of `clip_patches`."""
    plain = clip_patches(clip, config.stages, config.zoom * clip.dense_size)
    names = [stage if stage == "surgery" else f"stage {stage}" for stage in config.stages]
    return replace(
        plain,
        name="ppt-visual",
        encode=lambda images: dict(zip(names, visual_features(clip, config, images), strict=True)),
        settings=plain.settings | {"averaged": config.zoom, "tile": config.tile},
        origin=fingerprint(clip.model.visual, (*CLIP_CODE, __file__)),
        batch=2,  # images of 16 tiles each: on a CPU a quarter faster than eight of them at a time
    )
