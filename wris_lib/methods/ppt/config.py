"""Sizes of PPT's point generator: ours by measurement, and the paper's as far as it gives them."""

import math
from dataclasses import dataclass

import torch

from wris_lib.backbones.clip import Clip
from wris_lib.errors import WrisError


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a `PointGenerator`.

    Args:
        stages: of CLIP, as `Clip.patch_features` takes them; their number is N.
        visual_channels: of each stage.
        word_channels: of the word features.
        queries: K. A square number when they are anchored.
        points: M of every query.
        anchored: queries start on a grid over the image, learn offsets from there, and are told what CLIP sees at
            their place, and how like the sentence Surgery's map is there; they look at what is near first, each head as
            far as it learns to (SMCA, Gao et al. 2021); the sentence scales and shifts their channels (FiLM, Perez et
            al. 2018); they see one another, for "the man on the left" is a question about several men; and before
            they are scored they look at what lies under their points. False: the paper's queries, free vectors that
            know of a place only what training put into them.
        zoom: how many times as large as usual CLIP sees the image, see `vision.visual_features`.
        tile: side in pixels of the pieces in which CLIP sees it; None: the whole image at once.
        fuse_vision: words change what queries see of the image, as in the paper. False: the image changes the words
            only; then expressions of an image share its keys and values, and training is about 3 times as fast.
        fusion_width: channels inside `Fusion`; 64 in the paper.
        fusion_heads: attention heads inside `Fusion`; 8 in the paper.
        width: channels of a query.
        heads: attention heads of a query.
        feedforward: hidden channels of the queries' feed-forward layers.

    Raises:
        WrisError: the sizes do not go together.
    """

    stages: tuple[int | str, ...]
    visual_channels: tuple[int, ...]
    word_channels: int
    queries: int = 16
    points: int = 16
    anchored: bool = True
    zoom: int = 1
    tile: int | None = None
    fuse_vision: bool = False
    fusion_width: int = 64
    fusion_heads: int = 8
    width: int = 128
    heads: int = 4
    feedforward: int = 256

    def __post_init__(self) -> None:
        if self.anchored and math.isqrt(self.queries) ** 2 != self.queries:
            raise WrisError(f"{self.queries} anchored queries do not fill a square grid; choose 4, 9, 16, 25, ….")
        if self.anchored and self.stages[-1] != "surgery":
            raise WrisError(
                f"anchored queries look at CLIP Surgery's map, so the last stage must be 'surgery', not"
                f" {self.stages[-1]!r}."
            )
        if self.width % self.heads or self.fusion_width % self.fusion_heads:
            raise WrisError(
                f"widths must be multiples of their heads: {self.width} of {self.heads},"
                f" {self.fusion_width} of {self.fusion_heads}."
            )


def configure(clip: Clip, **sizes: int | bool | None) -> GeneratorConfig:
    """Sizes of a generator for what this CLIP gives: two stages of its plain path, and the end of Surgery's.

    It sees images at least twice as large as those that CLIP was trained with, in tiles of their size (see `vision`).

    Args:
        clip: to be read.
        sizes: of `GeneratorConfig`, where others are wanted than its own.
    """
    stages = (*clip.stages[:2], "surgery")
    probe = torch.zeros(1, 3, clip.patch_size, clip.patch_size, device=clip.device)  # one patch shows all widths
    with torch.no_grad():
        channels = tuple(features.shape[1] for features in clip.patch_features(probe, stages))
        words = clip.word_features(["a"])[0].shape[-1]
    zoom = math.ceil(2 * clip.native_size / clip.dense_size)
    return GeneratorConfig(stages, channels, words, **{"zoom": zoom, "tile": clip.native_size} | sizes)


# The paper counts 20.7 million trainable parameters; these are 20.5. It gives N, and d = 64 and 8 heads of the fusion.
# The other sizes are guesses: K and M, queries as wide as CLIP's visual tokens, a feed-forward layer of 1024.
PAPER = GeneratorConfig(
    stages=(4, 8, 12),
    visual_channels=(768, 768, 768),
    word_channels=512,
    anchored=False,
    fuse_vision=True,
    width=768,
    heads=8,
    feedforward=1024,
)
