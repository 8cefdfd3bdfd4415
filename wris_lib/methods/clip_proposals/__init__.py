"""Two baselines that choose: SAM proposes masks, CLIP says which of them the sentence fits best. No training.

- SAM-CLIP cuts each proposal's box out of the image and compares the cutting with the sentence. Whatever lies outside
  is gone, so "the cup on the left" cannot be told from the cup on the right.
- GL-CLIP (Yu et al., "Zero-shot Referring Image Segmentation with Global-Local Context Features", CVPR 2023, arXiv
  2303.17811) keeps both views. *Local*: the proposal alone, cut out, its background painted over. *Global*: the whole
  image, of which CLIP's class token may look at the proposal only, but at patches that have seen everything. The text
  has two sides as well: the sentence, and the noun phrase of the thing that is meant.
"""

from abc import abstractmethod
from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.language import Parser, load_parser
from wris_lib.backbones.proposals import NO_PROPOSALS, Proposer, load_proposer, not_empty
from wris_lib.methods import Method, Prediction, Stage
from wris_lib.methods.clip_sam import scale

NO_POINTS = np.zeros((0, 2), dtype=np.float32), np.zeros(0, dtype=int)
GLOBAL_IMAGE, GLOBAL_TEXT = 0.85, 0.5  # shares of the global sides, as in GL-CLIP's paper for ViT


class ClipProposals(Method):
    """What both have in common.

    Args:
        clip: compares.
        propose: gives an image's proposals.
    """

    variants: ClassVar[dict[str, dict[str, Hashable]]] = {"": {}}

    def __init__(self, clip: Clip, propose: Proposer) -> None:
        self.clip, self.propose = clip, propose

    @classmethod
    def load(cls, stack: str, device: str | None = None, proposals: str = "sam") -> "ClipProposals":
        """Build the method from a stack's models.

        Args:
            stack: "toy" or "paper".
            device: such as "cpu"; by default the GPU if there is any.
            proposals: whose; "sam" or "mask2former".

        Raises:
            WrisError: no such stack or source of proposals, or its weights are missing or damaged.
        """
        return cls(load_clip(stack, device), load_proposer(proposals, stack, device))

    def predict(self, image: Image.Image, expressions: list[str]) -> list[Prediction]:
        """One prediction for each expression; proposals are made and encoded once."""
        if not expressions:
            return []
        return self.answer(image, expressions, self.propose(image))

    def answer(
        self, image: Image.Image, expressions: list[str], proposals: Bool[np.ndarray, "p H W"]
    ) -> list[Prediction]:
        """`predict` with given proposals; where there are none, the mask is empty."""
        proposals = not_empty(proposals)
        if not len(proposals):
            nothing = np.zeros((image.height, image.width), dtype=bool)
            stage = Stage("proposals", NO_PROPOSALS, masks=proposals, scores=np.zeros(0))
            return [Prediction(nothing, nothing.astype(np.float32), *NO_POINTS, 0.0, [stage]) for _ in expressions]
        scores = (self.texts(expressions) @ self.images(image, proposals).T).float().cpu().numpy()
        return [_choose(proposals, each) for each in scores]

    @abstractmethod
    def images(self, image: Image.Image, proposals: Bool[np.ndarray, "p H W"]) -> Float[Tensor, "p D"]:
        """What a text is compared with, for each proposal: unit vectors."""

    @abstractmethod
    def texts(self, expressions: list[str]) -> Float[Tensor, "E D"]:
        """Unit vectors of expressions."""


class SamClip(ClipProposals):
    """SAM-CLIP: the box of a proposal against the sentence."""

    def images(self, image: Image.Image, proposals: Bool[np.ndarray, "p H W"]) -> Float[Tensor, "p D"]:
        return _encode(self.clip, [image.crop(box_of(mask)) for mask in proposals])

    def texts(self, expressions: list[str]) -> Float[Tensor, "E D"]:
        return self.clip.text_features(expressions)


class GlClip(ClipProposals):
    """GL-CLIP: the proposal in the image and by itself, against the sentence and its noun phrase.

    Args:
        clip: compares.
        propose: gives an image's proposals.
        parser: finds noun phrases.
    """

    parts: ClassVar[tuple[str, ...]] = ("clip", "sam", "parser")

    def __init__(self, clip: Clip, propose: Proposer, parser: Parser) -> None:
        super().__init__(clip, propose)
        self.parser = parser

    @classmethod
    def load(cls, stack: str, device: str | None = None, proposals: str = "sam") -> "GlClip":
        """As `ClipProposals.load`; the parser is the stack's, too."""
        return cls(load_clip(stack, device), load_proposer(proposals, stack, device), load_parser(stack))

    def images(self, image: Image.Image, proposals: Bool[np.ndarray, "p H W"]) -> Float[Tensor, "p D"]:
        alone = [_alone(image, mask).crop(box_of(mask)) for mask in proposals]
        local = _encode(self.clip, alone)
        pixels = self.clip.preprocess(image)[None]
        side = pixels.shape[-1] // self.clip.patch_size
        cells = adaptive_avg_pool2d(torch.from_numpy(proposals)[:, None].float(), (side, side)).flatten(1)
        shown = cells >= cells.amax(dim=1, keepdim=True).clamp(max=0.5)  # a proposal smaller than a cell keeps its best
        within = class_tokens(self.clip, pixels, shown.to(self.clip.device))
        return F.normalize(GLOBAL_IMAGE * within + (1 - GLOBAL_IMAGE) * local, dim=-1)

    def texts(self, expressions: list[str]) -> Float[Tensor, "E D"]:
        phrases = [parse.noun_phrases[0] for parse in self.parser.parse(expressions)]
        whole, thing = self.clip.text_features(expressions), self.clip.text_features(phrases)
        return F.normalize(GLOBAL_TEXT * whole + (1 - GLOBAL_TEXT) * thing, dim=-1)


@torch.no_grad()
def class_tokens(clip: Clip, pixels: Float[Tensor, "1 3 S S"], shown: Bool[Tensor, "p n"]) -> Float[Tensor, "p D"]:
    """CLIP's view of an image whose class token may look at some patches only: unit vectors.

    Patches are computed as ever. In the second half of the blocks there is a class token for every selection, and it
    attends to itself and to the selected patches.

    Args:
        clip: with a vision transformer.
        pixels: of `Clip.preprocess`.
        shown: which patches, row by row; at least one each.
    """
    blocks = clip.model.visual.transformer.resblocks
    first = len(blocks) // 2
    tokens = clip._tokens(pixels, tuple(range(first, len(blocks))))
    selected = tokens[first][:, :1].expand(1, len(shown), -1)
    hidden = ~torch.cat([torch.eye(len(shown), dtype=torch.bool, device=shown.device), shown], dim=1)
    for number in range(first, len(blocks)):
        selected = _attend(blocks[number], selected, tokens[number][:, 1:], hidden)
    return clip._project(selected)[0]


def _attend(
    block: nn.Module, own: Float[Tensor, "1 p C"], patches: Float[Tensor, "1 n C"], hidden: Bool[Tensor, "p pn"]
) -> Float[Tensor, "1 p C"]:
    """A block of CLIP's vision transformer for class tokens alone."""
    normed = block.ln_1(own)
    seen = torch.cat([normed, block.ln_1(patches)], dim=1)
    own = own + block.attn(normed, seen, seen, attn_mask=hidden, need_weights=False)[0]
    return own + block.mlp(block.ln_2(own))


def box_of(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """The box in pixels of a mask that is not empty: left, top, right, bottom, the last two exclusive."""
    return Image.fromarray(mask).getbbox()


def _alone(image: Image.Image, mask: Bool[np.ndarray, "H W"]) -> Image.Image:
    """The image with its mean colour wherever the mask is not."""
    pixels = np.asarray(image)
    return Image.fromarray(np.where(mask[..., None], pixels, pixels.mean(axis=(0, 1)).astype(np.uint8)))


@torch.no_grad()
def _encode(clip: Clip, cuttings: list[Image.Image]) -> Float[Tensor, "p D"]:
    return clip.image_features(torch.stack([clip.preprocess(each, clip.native_size) for each in cuttings]))


def _choose(proposals: Bool[np.ndarray, "p H W"], scores: Float[np.ndarray, "p"]) -> Prediction:
    """The best proposal, and a map that shows at each pixel the best of the proposals over it, from ½ (worst) to 1."""
    best = int(scores.argmax())
    levels = (1 + scale(scores[None].astype(np.float32))[0]) / 2
    levels[best] = 1  # also where there is no other
    painted = np.where(proposals, levels[:, None, None], 0).max(axis=0).astype(np.float32)
    trace = [Stage("proposals", f"number {best + 1} fits best", masks=proposals, scores=scores)]
    return Prediction(proposals[best], painted, *NO_POINTS, float(scores[best]), trace)
