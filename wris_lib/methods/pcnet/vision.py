"""What PCNet sees of an image: patches in CLIP's joint space, where a text can be compared with each of them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from torch import Tensor
from tqdm.auto import trange

from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import Rows, open_features
from wris_lib.methods.ppt.config import configure
from wris_lib.methods.ppt.layers import visual_tokens
from wris_lib.methods.ppt.vision import visual_encoder, visual_features

SURGERY = "surgery"


def see(clip: Clip, images: Sequence[Image.Image]) -> tuple[Float[Tensor, "B n C"], tuple[int, int]]:
    """Patches of images, row by row, and how many rows and columns there are.

    They are the end of CLIP Surgery's path in an image that is shown large, as in PPT (see `ppt.vision`), but at once:
    PCNet's weights were trained so. A grid covers the whole image, whatever its shape. CLIP stays frozen.
    """
    config = configure(clip, tile=None)
    features = visual_features(clip, config, images)[config.stages.index(SURGERY)]
    return visual_tokens(features), (features.shape[2], features.shape[3])


def see_all(clip: Clip, images: Rows) -> Float[Tensor, "I n C"]:
    """`see` of many images, from the cache, in 16-bit floats."""
    store = open_features(visual_encoder(clip, configure(clip, tile=None)), images)
    found = []
    for start in trange(0, len(store), 64, desc="reading features", delay=3):
        rows = np.arange(start, min(start + 64, len(store)))
        found.append(visual_tokens(store[rows][SURGERY].float()).half())
    return torch.cat(found)


def see_with_resnet(visual: ModifiedResNet, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B n C"]:
    """Patches of a ResNet CLIP in its joint space, with gradients: the paper trains RN50 at 320², so n = 10 · 10.

    CLIP pools by attention: a weighted mean of values, projected. Here each cell's value is projected by itself.
    """
    x = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    pool = visual.attnpool
    return pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2)))
