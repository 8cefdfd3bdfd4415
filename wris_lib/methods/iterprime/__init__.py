"""IteRPrimE: no training for the task at all; a matching model's own gradient says where the sentence is true.

    sentence --parser--> primary word, context          image --SAM--> proposals ─────────────┐
    image, sentence --ALBEF--> Grad-CAM --primary word emphasis--> map --hide, look again--> map --> mask

Source: Wang et al., "IteRPrimE: Zero-shot Referring Image Segmentation with Iterative Grad-CAM Refinement and Primary
Word Emphasis", AAAI 2025 (arXiv 2503.00936). The paper takes its proposals from Mask2Former, we from SAM unless told
otherwise.
"""

from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from wris_lib.backbones.itm import Matcher, load_matcher
from wris_lib.backbones.itm_models import EncodedImages
from wris_lib.backbones.language import Parser, Word, load_parser
from wris_lib.backbones.proposals import NO_PROPOSALS, Proposer, load_proposer, not_empty
from wris_lib.errors import WrisError
from wris_lib.evaluate import peak
from wris_lib.methods import Method, Prediction, Stage
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS, aggregate, check_aggregation
from wris_lib.methods.iterprime.igrs import PAPER, Refined, Refinement, refine
from wris_lib.methods.iterprime.selection import choose, upsample
from wris_lib.methods.iterprime.words import PREFIX, find_pieces

HIDES = ("attention", "image")


class IterPrime(Method):
    """Grad-CAM with primary word emphasis, refined, chooses among proposals.

    Args:
        matcher: its gradient is read.
        propose: gives an image's proposals.
        parser: finds the primary word.
        aggregation: of the tokens' maps, one of `gradcam.AGGREGATIONS`.
        layer: text layer, from 0, whose cross-attention is read; None: the matcher's own choice.
        hide: "attention": patches that have been found are masked in every layer with cross-attention; "image": they
            are painted over with the image's mean colour, and the image is encoded again (the paper's Table 4).
        settings: of the refinement.

    Raises:
        WrisError: there is no such aggregation or way to hide.
    """

    variants: ClassVar[dict[str, dict[str, Hashable]]] = {
        "": {},
        "once": {"passes": 0},
        **{how: {"aggregation": how, "passes": 0} for how in AGGREGATIONS if how != "pwem"},
    }
    parts: ClassVar[tuple[str, ...]] = ("itm", "sam", "parser")

    def __init__(
        self,
        matcher: Matcher,
        propose: Proposer,
        parser: Parser,
        aggregation: str = "pwem",
        layer: int | None = None,
        hide: str = "attention",
        settings: Refinement = PAPER,
    ) -> None:
        check_aggregation(aggregation)
        if hide not in HIDES:
            raise WrisError(f"nothing can be hidden in {hide!r}; choose one of: {', '.join(HIDES)}.")
        self.matcher, self.propose, self.parser = matcher, propose, parser
        self.aggregation, self.layer, self.hide, self.settings = aggregation, layer, hide, settings

    @classmethod
    def load(
        cls,
        stack: str,
        device: str | None = None,
        aggregation: str = "pwem",
        layer: int | None = None,
        passes: int = 3,
        threshold: float = 0.5,
        decay: float = 0.8,
        hide: str = "attention",
        sharpen: bool = False,
        released_stop: bool = False,
        proposals: str = "sam",
    ) -> "IterPrime":
        """Build the method from a stack's models.

        Args:
            stack: "toy" or "paper".
            device: such as "cpu"; by default the GPU if there is any.
            aggregation: see the class.
            layer: see the class.
            passes: ν; this and the options below but `hide` are those of `Refinement`.
            threshold: θ.
            decay: λ.
            hide: see the class.
            sharpen: the paper's Eq. 5.
            released_stop: the released code's stop rule.
            proposals: whose; "sam" or, as in the paper, "mask2former".

        Raises:
            WrisError: no such stack, aggregation, way to hide or source of proposals; a number is out of range; weights
                are missing or damaged.
        """
        settings = Refinement(passes, threshold, decay, sharpen, released_stop)
        propose = load_proposer(proposals, stack, device)
        return cls(load_matcher(stack, device), propose, load_parser(stack), aggregation, layer, hide, settings)

    def predict(self, image: Image.Image, expressions: list[str]) -> list[Prediction]:
        """One prediction for each expression; the image is encoded, and proposals are made, once."""
        return self.answer(image, expressions, self.propose(image)) if expressions else []

    def answer(
        self, image: Image.Image, expressions: list[str], proposals: Bool[np.ndarray, "p H W"]
    ) -> list[Prediction]:
        """`predict` with given proposals; where there are none, the mask is empty.

        Raises:
            WrisError: the proposals are not of the image's size; the layer has no cross-attention.
        """
        proposals = not_empty(proposals)
        return [self._select(image, refined, proposals) for refined in self.look(image, expressions)]

    def look(
        self, image: Image.Image, expressions: list[str], primaries: list[Word | None] | None = None
    ) -> list[Refined]:
        """The maps alone, a value for each patch of the matcher's grid, row by row.

        Args:
            image: RGB.
            expressions: sentences.
            primaries: the primary word of each, in place of the parser's.

        Raises:
            WrisError: the layer has no cross-attention.
        """
        if not expressions:
            return []
        parses = self.parser.parse(expressions)
        texts = self.matcher.encode_texts([PREFIX + parse.expression for parse in parses])
        primaries = [parse.primary for parse in parses] if primaries is None else primaries
        pieces = [find_pieces(*each) for each in zip(parses, texts.spans, primaries, strict=True)]
        pixels = self.matcher.preprocess(image)[None]
        encoded = self.matcher.encode_images(pixels)

        def look(which: list[int], visible: Bool[Tensor, "k N"]) -> tuple[Float[Tensor, "k N"], Float[Tensor, "k"]]:
            if self.hide == "attention":
                match = self.matcher.match(encoded, texts[which], visible, self.layer)
            else:
                images = encoded if visible.all() else self._painted(pixels, visible)
                match = self.matcher.match(images, texts[which], layer=self.layer)
            maps = []
            for row, each in enumerate(which):
                tokens = len(texts.spans[each])  # what follows is padding
                attention, gradient = match.attention[row, :, :tokens], match.gradient[row, :, :tokens]
                maps.append(aggregate(attention, gradient, pieces[each], self.aggregation))
            return torch.stack(maps), match.probability

        rows, columns = self.matcher.grid
        return refine(look, len(expressions), rows * columns, self.settings, self.matcher.device)

    def _painted(self, pixels: Float[Tensor, "1 3 S S"], visible: Bool[Tensor, "k N"]) -> EncodedImages:
        """The image, encoded with its mean colour wherever it is to be hidden: once for each expression."""
        seen = visible.unflatten(1, self.matcher.grid)[:, None].to(pixels)
        seen = interpolate(seen, pixels.shape[-2:], mode="nearest").bool()
        return self.matcher.encode_images(torch.where(seen, pixels, pixels.mean(dim=(2, 3), keepdim=True)))

    def _select(self, image: Image.Image, refined: Refined, proposals: Bool[np.ndarray, "p H W"]) -> Prediction:
        grid = self.matcher.grid
        response_map = upsample(refined.response_map.unflatten(0, grid), (image.height, image.width))
        trace = []
        for number, each in enumerate(refined.passes):
            note = f"ITM {each.probability:.3f}, S {each.score:.3f}, {'kept' if each.kept else 'rejected'}"
            coarse = each.response_map.unflatten(0, grid).cpu().numpy()
            trace.append(Stage(f"pass {number}" if number else "first look", note, response_map=coarse))
        if len(proposals):
            choice = choose(response_map, proposals)
            mask, note = proposals[choice.index], f"number {choice.index + 1} fits best"
            if choice.fell_back:
                note += " of all; none holds the peak without lying scattered"
            trace.append(Stage("proposals", note, masks=proposals, scores=choice.scores))
        else:
            mask = np.zeros((image.height, image.width), dtype=bool)
            trace.append(Stage("proposals", NO_PROPOSALS, masks=proposals, scores=np.zeros(0)))
        x, y = peak(response_map)
        points, labels = np.array([[x + 0.5, y + 0.5]], dtype=np.float32), np.ones(1, dtype=int)
        score = refined.passes[0].probability
        return Prediction(mask, response_map, points, labels, score, trace)
