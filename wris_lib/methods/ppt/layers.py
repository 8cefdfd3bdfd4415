"""Layers of PPT's point generator.

Shapes: B images, E expressions about them, l words, n = h·w visual tokens, K queries.

Source: Dai and Yang, CVPR 2024; the fusion is that of ETRIS (Xu et al., ICCV 2023), which the paper follows.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wris_lib.methods.ppt.config import GeneratorConfig

Projected = tuple[Float[Tensor, "B n f"], Float[Tensor, "E l f"]]
POSITION_CHANNELS = 64  # that tell a token, or an anchor, where in the image it is


class Groups:
    """Expressions gathered by image, so that all of an image's queries attend to its keys and values at once.

    Args:
        image: which image each expression is about, in any order.
        images: B.
    """

    def __init__(self, image: Int[Tensor, "E"], images: int) -> None:
        member = F.one_hot(image, images)
        self.image = image
        self.slot = (member.cumsum(dim=0) * member).sum(dim=1) - 1  # which of its image's expressions it is
        self.shape = (images, int(member.sum(dim=0).max()))

    def pack(self, x: Float[Tensor, "E n d"]) -> Float[Tensor, "B gn d"]:
        """Expressions of an image one behind the other; where an image has fewer than others, zeros."""
        return x.new_zeros(*self.shape, *x.shape[1:]).index_put((self.image, self.slot), x).flatten(1, 2)

    def unpack(self, x: Float[Tensor, "B gn d"]) -> Float[Tensor, "E n d"]:
        """The inverse."""
        return x.unflatten(1, (self.shape[1], -1))[self.image, self.slot]


class Attention(nn.Module):
    """Multi-head attention whose memory is projected by the caller: once, however often it is attended to."""

    def __init__(self, width: int, memory_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.memory = nn.Linear(memory_channels, 2 * width)  # keys, values
        self.out = nn.Linear(width, width)

    def forward(
        self,
        queries: Float[Tensor, "b q d"],
        keys_values: Float[Tensor, "b n dd"],
        mask: Bool[Tensor, "b n"] | None = None,
        bias: Float[Tensor, "h q n"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Attend to what `memory` made; where `mask` is False nothing is seen; `bias` is added before the softmax."""
        split = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b heads q d/heads
        keys, values = keys_values.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out: with heads this narrow, fused attention takes twice as long on a CPU, backwards most of all.
        alike = (split * split.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        if bias is not None:
            alike = alike + bias.to(alike)
        if mask is not None:
            alike = alike.masked_fill(~mask[:, None, None], -torch.inf)
        mixed = alike.softmax(dim=-1) @ values
        return self.out(mixed.transpose(1, 2).flatten(2))


class Fusion(nn.Module):
    """Image and words of one stage: each is projected, multiplied by what it sees of the other, and projected back.

        v = proj(V),  t = proj(T);   from stage 2 on  v = LN(v + v of the stage before),  t likewise
        V' = V + back(v ⊙ attention(v, t, t)),   T' = T + back(t ⊙ attention(t, v, v))

    ETRIS adds V' and T' to CLIP's own tokens, so that its next block sees them. PPT's CLIP is frozen and computed
    beforehand: here they go to the queries only.
    """

    def __init__(self, config: GeneratorConfig, channels: int, first: bool) -> None:
        super().__init__()
        width, heads = config.fusion_width, config.fusion_heads
        self.first, self.fuse_vision = first, config.fuse_vision
        self.visual_in, self.words_in = nn.Linear(channels, width), nn.Linear(config.word_channels, width)
        self.words_attention, self.words_out = Attention(width, width, heads), nn.Linear(width, config.word_channels)
        if self.fuse_vision:
            self.visual_attention, self.visual_out = Attention(width, width, heads), nn.Linear(width, channels)
        if not first:
            self.visual_norm, self.words_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self,
        visual: Float[Tensor, "B n c"],
        words: Float[Tensor, "E l t"],
        mask: Bool[Tensor, "E l"],
        groups: Groups,
        earlier: Projected | None,
    ) -> tuple[Float[Tensor, "E n f"] | None, Float[Tensor, "E l t"], Projected]:
        """Fuse one stage.

        Args:
            visual: V.
            words: T.
            mask: True at words, False at padding.
            groups: whose words belong to which image.
            earlier: (v, t) of the stage before; None in the first.

        Returns:
            v ⊙ attention(v, t, t), to be projected by `visual_out` (None without `fuse_vision`); T'; and (v, t).
        """
        v, t = self.visual_in(visual), self.words_in(words)
        if not self.first:
            v, t = self.visual_norm(v + earlier[0]), self.words_norm(t + earlier[1])
        seen = groups.unpack(self.words_attention(groups.pack(t), self.words_attention.memory(v)))
        fused_words = words + self.words_out(t * seen)
        if not self.fuse_vision:
            return None, fused_words, (v, t)
        own = v.index_select(0, groups.image)
        return own * self.visual_attention(own, self.visual_attention.memory(t), mask), fused_words, (v, t)


class Reading(nn.Module):
    """What queries do with the sentence once they have seen the image: Q ← CrossAttn(Q, T'), then a feed-forward layer.

    As in DETR (Carion et al. 2020) each has a residual and a layer norm behind it. In anchored queries the sentence
    first scales and shifts the channels (FiLM, Perez et al. 2018), and after reading it they see one another, as in
    DETR; the paper's do not.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.width
        self.anchored = config.anchored
        self.read, self.read_norm = Attention(width, config.word_channels, config.heads), nn.LayerNorm(width)
        self.feedforward, self.feedforward_norm = mlp(width, config.feedforward, width), nn.LayerNorm(width)
        if self.anchored:
            self.film = nn.Linear(config.word_channels, 2 * width)
            self.compare, self.compare_norm = Attention(width, width, config.heads), nn.LayerNorm(width)

    def forward(
        self, queries: Float[Tensor, "E K d"], words: Float[Tensor, "E l t"], mask: Bool[Tensor, "E l"]
    ) -> Float[Tensor, "E K d"]:
        """The next Q. `mask` is True at words, False at padding."""
        if self.anchored:
            last = mask.int().cumsum(dim=1).argmax(dim=1)  # the last token has read the whole sentence
            sentence = words[torch.arange(len(words), device=words.device), last]
            scale, shift = self.film(sentence)[:, None].chunk(2, dim=-1)
            queries = queries * (1 + scale) + shift
        queries = self.read_norm(queries + self.read(queries, self.read.memory(words), mask))
        if self.anchored:
            queries = self.compare_norm(queries + self.compare(queries, self.compare.memory(queries)))
        return self.feedforward_norm(queries + self.feedforward(queries))


class Stage(nn.Module):
    """Fusion, and one step of the queries: they look at the image, Q ← CrossAttn(Q, V'), and `Reading` follows."""

    def __init__(self, config: GeneratorConfig, channels: int, first: bool) -> None:
        super().__init__()
        width = config.width
        self.anchored = config.anchored
        self.fusion = Fusion(config, channels, first)
        self.look, self.look_norm = Attention(width, channels, config.heads), nn.LayerNorm(width)
        self.reading = Reading(config)
        if self.anchored:
            self.local = nn.Linear(channels, width)
            # Reach of each head as a share of the image: the standard deviation of a Gaussian around the anchor.
            self.log_reach = nn.Parameter(torch.linspace(math.log(0.08), 0.0, config.heads))

    def forward(
        self,
        queries: Float[Tensor, "E K d"],
        visual: Float[Tensor, "B n c"],
        local: Float[Tensor, "B K c"] | None,
        distances: Float[Tensor, "K n"] | None,
        words: Float[Tensor, "E l t"],
        mask: Bool[Tensor, "E l"],
        groups: Groups,
        earlier: Projected | None,
    ) -> tuple[Float[Tensor, "E K d"], Projected]:
        """One step.

        Args:
            queries: Q.
            visual: V.
            local: V at the anchors; None when there are none.
            distances: from the anchors to the tokens, as shares of the image; None when there are no anchors.
            words: T.
            mask: True at words, False at padding.
            groups: which queries belong to which image.
            earlier: what `Fusion` wants of the stage before.

        Returns:
            The next Q, and what `Fusion` wants at the next stage.
        """
        change, words, earlier = self.fusion(visual, words, mask, groups, earlier)
        if self.anchored:
            queries = queries + self.local(local).index_select(0, groups.image)
        queries = self.look_norm(queries + self._look(queries, visual, change, distances, groups))
        return self.reading(queries, words, mask), earlier

    def _look(
        self,
        queries: Float[Tensor, "E K d"],
        visual: Float[Tensor, "B n c"],
        change: Float[Tensor, "E n f"] | None,
        distances: Float[Tensor, "K n"] | None,
        groups: Groups,
    ) -> Float[Tensor, "E K d"]:
        """Attention of the queries to V' = V + visual_out(change)."""
        keys_values = self.look.memory(visual)
        nearness = None
        if distances is not None:
            nearness = -0.5 * (distances / self.log_reach.exp()[:, None, None]) ** 2  # heads K n
        if change is None:
            packed = groups.pack(queries)
            if nearness is not None:
                nearness = nearness.repeat(1, packed.shape[1] // queries.shape[1], 1)
            return groups.unpack(self.look(packed, keys_values, bias=nearness))
        # A linear map of a linear map is one linear map. So V', with its many channels an expression, is never built.
        back, memory = self.fusion.visual_out, self.look.memory
        change = F.linear(change, memory.weight @ back.weight, memory.weight @ back.bias)
        return self.look(queries, keys_values.index_select(0, groups.image) + change, bias=nearness)


class Review(nn.Module):
    """A last look of anchored queries, at what they point at: is this what is meant?

    A query comes from an anchor, and what it has seen around there is a mixture. Its points say where the thing is: so
    the image is read there, at positive points above all; and where they lie and how far they reach says more of *left*
    and *above* than the anchor does. The points themselves learn nothing from this.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.width
        self.see = nn.ModuleList(nn.Linear(channels + POSITION_CHANNELS, width) for channels in config.visual_channels)
        self.take, self.take_norm = nn.Sequential(nn.ReLU(), nn.Linear(width, width)), nn.LayerNorm(width)
        self.place = nn.Linear(2 * POSITION_CHANNELS, width)
        self.reading = Reading(config)

    def forward(
        self,
        queries: Float[Tensor, "E K d"],
        visual: Sequence[Float[Tensor, "B _ _"]],
        grids: Sequence[tuple[int, int]],
        points: Float[Tensor, "E K M 2"],
        label_logits: Float[Tensor, "E K M"],
        words: Float[Tensor, "E l t"],
        mask: Bool[Tensor, "E l"],
        groups: Groups,
    ) -> Float[Tensor, "E K d"]:
        """The queries, ready to be scored.

        Args:
            queries: Q.
            visual: V of each stage.
            grids: rows and columns of each V.
            points: of the queries.
            label_logits: of the points.
            words: T.
            mask: True at words, False at padding.
            groups: which queries belong to which image.
        """
        points, positive = points.detach(), label_logits.detach().sigmoid()
        shares, seen = positive / positive.sum(dim=-1, keepdim=True), 0
        for tokens, grid, see in zip(visual, grids, self.see, strict=True):
            seen = seen + see(groups.unpack(groups.pack(cell_shares(points, shares, *grid)) @ tokens))
        low, high = points.amin(dim=2), points.amax(dim=2)
        where = torch.cat([encode_positions((low + high) / 2), encode_positions(high - low)], dim=-1)
        queries = self.take_norm(queries + self.take(seen) + self.place(where))
        return self.reading(queries, words, mask)


class Whitening(nn.Module):
    """A frozen affine map after which features have mean 0 and channels of (nearly) one variance, uncorrelated.

    Until `fit` has seen features, it changes nothing.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))

    def forward(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return (features - self.mean) @ self.matrix

    @torch.no_grad()
    def fit(self, features: Float[Tensor, "n c"], floor: float = 0.03) -> None:
        """Find the map: W = V (Λ + floor · mean Λ)^-½ Vᵀ, where V Λ Vᵀ is the covariance of the features.

        Args:
            features: any number.
            floor: keeps directions in which hardly anything varies from being blown up to noise.
        """
        mean = features.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov(features.T, correction=0).double())
        scales = (values.clamp(min=0) + floor * values.mean()).rsqrt()
        self.mean.copy_(mean)
        self.matrix.copy_(vectors * scales @ vectors.T)


def visual_tokens(features: Float[Tensor, "B c h w"]) -> Float[Tensor, "B n c"]:
    """A feature map as h·w tokens, row by row, each normalised."""
    tokens = features.flatten(2).transpose(1, 2)
    return F.layer_norm(tokens, tokens.shape[-1:])


def cell_centres(rows: int, columns: int) -> Float[Tensor, "n 2"]:
    """Centres of a grid's cells, row by row, as (x, y) in 0..1."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def encode_positions(points: Float[Tensor, "*b 2"]) -> Float[Tensor, "*b p"]:
    """Sines and cosines of (x, y) in 0..1, from half a wave to 16 waves across the image."""
    waves = math.pi * 2 ** torch.linspace(0, 5, POSITION_CHANNELS // 4, device=points.device)
    angles = (points[..., None] * waves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def cell_shares(
    points: Float[Tensor, "*b m 2"], shares: Float[Tensor, "*b m"], rows: int, columns: int
) -> Float[Tensor, "*b n"]:
    """How much each of a grid's cells, row by row, counts in what m points see together.

    A point sees what lies between the centres of the four cells around it, bilinearly; beyond the outermost centres
    nothing changes any more.

    Args:
        points: (x, y) in 0..1.
        shares: how much each point counts.
        rows: of the grid.
        columns: of the grid.
    """
    across, down = _hats(points[..., 0], columns), _hats(points[..., 1], rows)
    return ((down * shares[..., None]).transpose(-1, -2) @ across).flatten(-2)


def _hats(positions: Float[Tensor, "*b"], cells: int) -> Float[Tensor, "*b cells"]:
    """The two cells around a position in 0..1 share it."""
    places = (positions * cells - 0.5).clamp(0, cells - 1)
    return (1 - (places[..., None] - torch.arange(cells, device=places.device)).abs()).clamp(min=0)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])
