"""PPT's point generator: it reads frozen CLIP, and says where SAM should be asked.

    image  --CLIP--> V_1, V_2, V_3 ─┐
                                    ├─ fusion ─ K queries ─ PointHead ─> M points (x, y, r) ──SAM──> K masks
    expression  --CLIP-->  words T ─┘                     └ ScoreHead ─> c: which of the K is meant

A query stands for one thing in the image. Each of the N = 3 stages lets image and words look at each other (`Fusion`),
and then lets the queries look at both (`Stage`). Anchored queries look once more at where they point, before they are
scored (`Review`). Only this generator is trained; CLIP and SAM stay frozen.

Source: Dai and Yang, "Curriculum Point Prompting for Weakly-Supervised Referring Image Segmentation", CVPR 2024.
Its fusion is that of ETRIS (Xu et al., ICCV 2023). The paper leaves widths, K and M open: `GeneratorConfig`.

Several expressions are about the same image. What does not depend on the words is therefore computed for B images,
and only the rest for E expressions; `image[e]` says which image expression e is about.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.layers import (
    POSITION_CHANNELS,
    Groups,
    Review,
    Stage,
    Whitening,
    cell_centres,
    cell_shares,
    encode_positions,
    mlp,
    visual_tokens,
)
from wris_lib.methods.ppt.prompts import PointPrompts


class PointGenerator(nn.Module):
    """f(I, T) → K prompts of M points each, and a score for every prompt.

    CLIP's blocks differ in scale by an order of magnitude, so every visual token is normalised to mean 0 and variance
    1. A handful of directions hold most of what then varies between tokens, and between words, and gradient descent
    would learn from those first: so both are whitened (`Whitening`). And a visual token gets channels that say where it
    is, without which "left" could not be learned. Nothing before the first projection is trained, so that no gradient
    has to be computed for visual tokens.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stages = nn.ModuleList(
            Stage(config, channels + POSITION_CHANNELS, first=stage == 0)
            for stage, channels in enumerate(config.visual_channels)
        )
        self.whiten_visual = nn.ModuleList(Whitening(channels) for channels in config.visual_channels)
        self.whiten_words = Whitening(config.word_channels)
        if config.anchored:
            side = math.isqrt(config.queries)
            self.register_buffer("anchors", cell_centres(side, side), persistent=False)
            self.embed_anchors = mlp(POSITION_CHANNELS, width, width)
            self.embed_similarity = nn.Linear(2, width)
            self.review = Review(config)
        else:
            self.queries = nn.Parameter(torch.randn(config.queries, width))
        self.point_head = mlp(width, width, width, 3 * config.points)
        self.score_head = mlp(width, width, 1)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained; all are, CLIP and SAM being no part of this module."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        visual: Sequence[Float[Tensor, "B _ h w"]],
        words: Float[Tensor, "E l t"],
        mask: Bool[Tensor, "E l"],
        image: Int[Tensor, "E"],
        directions: Float[Tensor, "E d"],
    ) -> PointPrompts:
        """Prompts for E expressions about B images.

        Args:
            visual: N feature maps of the images, from early to late; each may have a scale of its own.
            words: of the expressions.
            mask: True at words, False at padding. The last word stands for the sentence.
            image: for each expression which image it is about, 0..B-1.
            directions: `Clip.directions` of the expressions, for anchored queries.
        """
        groups = Groups(image, len(visual[0]))
        words = self.whiten_words(words)
        earlier, local, distances, images = None, None, None, []
        start = self.embed_anchors(encode_positions(self.anchors)) if self.config.anchored else self.queries
        queries = start.expand(len(words), -1, -1)
        if self.config.anchored:
            side = math.isqrt(self.config.queries)
            queries = queries + self.embed_similarity(similarity_in_cells(visual[-1], directions, image, side))
        grids = [tuple(features.shape[-2:]) for features in visual]
        for features, grid, whiten, stage in zip(visual, grids, self.whiten_visual, self.stages, strict=True):
            centres = cell_centres(*grid).to(features)
            tokens = whiten(visual_tokens(features))
            tokens = torch.cat([tokens, encode_positions(centres).expand(len(tokens), -1, -1)], dim=-1)
            images.append(tokens)
            if self.config.anchored:
                local = cell_shares(self.anchors[:, None], torch.ones_like(self.anchors[:, :1]), *grid) @ tokens
                distances = torch.cdist(self.anchors, centres)
            queries, earlier = stage(queries, tokens, local, distances, words, mask, groups, earlier)
        # Half precision, where a caller trains in it, would round a place to a 256th of the image.
        raw = self.point_head(queries).unflatten(-1, (-1, 3)).float()
        places, label_logits = raw[..., :2], raw[..., 2]
        if self.config.anchored:
            places = places + self.anchors.logit()[:, None]
        points = places.sigmoid()
        if self.config.anchored:
            queries = self.review(queries, images, grids, points, label_logits, words, mask, groups)
        return PointPrompts(points, label_logits, self.score_head(queries)[..., 0].float())


def similarity_in_cells(
    surgery: Float[Tensor, "B d h w"], directions: Float[Tensor, "E d"], image: Int[Tensor, "E"], side: int
) -> Float[Tensor, "E {side}*{side} 2"]:
    """CLIP Surgery's map in each of side × side cells: its maximum and its mean, normalised over the cells."""
    with torch.autocast(surgery.device.type, enabled=False):  # maps are small differences of large numbers
        maps = torch.einsum("edhw,ed->ehw", surgery.index_select(0, image), directions)
    pooled = [F.adaptive_max_pool2d(maps, side).flatten(1), F.adaptive_avg_pool2d(maps, side).flatten(1)]
    return torch.stack([F.layer_norm(values, values.shape[-1:]) for values in pooled], dim=-1)
