"""What the point generator sees of an image: CLIP's patch features, of the image shown larger than CLIP is used to.

Half of the things in a scene are two patches wide, and CLIP hardly tells what they are. In an image twice as large they
are four patches wide. What CLIP makes of that is averaged over 2 × 2 patches, so that the generator has no more to read
than before.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import Encoder
from wris_lib.backbones.features import CLIP_CODE, clip_patches, fingerprint
from wris_lib.methods.ppt.config import GeneratorConfig


@torch.no_grad()
def visual_features(
    clip: Clip, config: GeneratorConfig, images: Sequence[Image.Image]
) -> list[Float[Tensor, "B _ h w"]]:
    """The visual input of a generator: a feature map for each stage, on the grid of CLIP's `dense_size`.

    Args:
        clip: frozen.
        config: says which stages, and how large an image is shown.
        images: RGB.
    """
    pixels = torch.stack([clip.preprocess(image, config.zoom * clip.dense_size) for image in images])
    return [F.avg_pool2d(features.float(), config.zoom) for features in clip.patch_features(pixels, config.stages)]


def visual_encoder(clip: Clip, config: GeneratorConfig) -> Encoder:
    """`visual_features` for the cache, with the names of `clip_patches`."""
    plain = clip_patches(clip, config.stages, config.zoom * clip.dense_size)
    names = [stage if stage == "surgery" else f"stage {stage}" for stage in config.stages]
    return replace(
        plain,
        name="ppt-visual",
        encode=lambda images: dict(zip(names, visual_features(clip, config, images), strict=True)),
        settings=plain.settings | {"averaged": config.zoom},
        origin=fingerprint(clip.model.visual, (*CLIP_CODE, __file__)),
        batch=8,
    )
