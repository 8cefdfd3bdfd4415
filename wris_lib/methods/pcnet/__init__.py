"""PCNet: a language model takes the sentence apart, and the image is looked at anew with every piece.

    sentence --LLM--> cues;   image, sentence, cues --CRM--> a response map for every stage --peak--> SAM --> mask

Trained on pairs of image and sentence alone (see `loss`). Without cues and module what is left is TRIS (Liu et al.,
"Referring Image Segmentation Using Text Supervision", ICCV 2023): `Tris`.

Source: Yang et al., "Boosting Weakly Supervised Referring Image Segmentation via Progressive Comprehension", NeurIPS
2024.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from wris_lib.backbones.checkpoints import get_stack
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.language import Parser, load_parser
from wris_lib.backbones.last_image import LastImage
from wris_lib.backbones.llm import Llm, load_llm
from wris_lib.backbones.sam import SamImage, Segmenter, load_sam
from wris_lib.backbones.trained import find_trained, load_trained
from wris_lib.data.images import check_expression
from wris_lib.errors import WrisError
from wris_lib.evaluate import peak
from wris_lib.methods import Method, Prediction, Stage
from wris_lib.methods.pcnet.crm import Crm, CrmConfig, response_maps
from wris_lib.methods.pcnet.decompose import CUES, repeat, shares_a_word
from wris_lib.methods.pcnet.decompose import decompose as find_cues  # under its own name it would hide the module
from wris_lib.methods.pcnet.vision import see

MASKS = ("sam", "map")


class PcNet(Method):
    """The last stage's peak prompts SAM, or its map is the mask.

    Args:
        clip: frozen.
        sam: frozen.
        crm: trained.
        llm: takes sentences apart; None where the module has no stages.
        parser: for `decompose`; None where the module has no stages.
        mask: "sam", the mask that SAM trusts most at the peak; or "map", where the response map is above 0.5.
        cues: for every sentence, in place of the language model's; fewer than stages are repeated.
    """

    name: ClassVar[str] = "pcnet"
    variants: ClassVar[dict[str, dict[str, Hashable]]] = {mask: {"mask": mask} for mask in MASKS}
    parts: ClassVar[tuple[str, ...]] = ("clip", "sam", "parser", "llm", "pcnet")

    def __init__(
        self,
        clip: Clip,
        sam: Segmenter,
        crm: Crm,
        llm: Llm | None,
        parser: Parser | None,
        mask: str = "sam",
        cues: Sequence[str] | None = None,
    ) -> None:
        if mask not in MASKS:
            raise WrisError(f"{self.name} makes no masks by {mask!r}; choose one of: {', '.join(MASKS)}.")
        if cues is not None and not crm.config.stages:
            raise WrisError(f"{self.name} reads no cues; leave them out.")
        self.clip, self.sam, self.llm, self.parser, self.mask = clip, sam, llm, parser, mask
        self.cues = None if cues is None else _checked(cues)
        self.crm = crm.eval().requires_grad_(False).to(clip.device)
        self._look = LastImage(lambda image: (*see(self.clip, [image]), self.sam.embed(image)))

    @classmethod
    def load(
        cls,
        stack: str,
        mask: str = "sam",
        cues: Sequence[str] | None = None,
        weights: str | None = None,
        device: str | None = None,
    ) -> "PcNet":
        """Build the method from a stack's models and a trained module.

        Args:
            stack: "toy" or "paper".
            mask: "sam" or "map".
            cues: for every sentence, in place of the language model's.
            weights: a file that `train` wrote; by default the stack's, see `get_stack`.
            device: such as "cpu"; by default the GPU if there is any.

        Raises:
            WrisError: no such stack or kind of mask; empty cues, or cues that nobody reads; weights are missing,
                damaged, or were trained with another CLIP.
        """
        clip, train = load_clip(stack, device), f"python -m wris_lib train {cls.name}"
        path = find_trained(get_stack(stack), cls.name, train) if weights is None else Path(weights)
        crm = load_trained(path, cls.name, clip, lambda config: Crm(CrmConfig(**config)), train)
        words = (load_llm(stack), load_parser(stack)) if crm.config.stages else (None, None)
        return cls(clip, load_sam(stack, device), crm, *words, mask, cues)

    def predict(
        self, image: Image.Image, expressions: list[str], cues: Sequence[Sequence[str]] | None = None
    ) -> list[Prediction]:
        """One prediction for each expression; CLIP and SAM look at the image once.

        Args:
            image: RGB.
            expressions: sentences.
            cues: of each sentence, in place of the language model's.

        Raises:
            WrisError: a sentence's cues are empty; the language model does not answer.
        """
        if not expressions:
            return []
        return self.answer(*self._look(image), expressions, cues)

    @torch.no_grad()
    def answer(
        self,
        visual: Float[Tensor, "1 n C"],
        grid: tuple[int, int],
        embedded: SamImage,
        expressions: list[str],
        cues: Sequence[Sequence[str]] | None = None,
    ) -> list[Prediction]:
        """`predict` for an image that CLIP and SAM have seen already.

        Args:
            visual: of `see`.
            grid: rows and columns of it.
            embedded: of `Segmenter.embed`.
            expressions: sentences.
            cues: of each sentence.
        """
        used = self.cues_of(expressions, cues)
        scores = self.score_maps(visual, expressions, used)
        return [
            self._segment(embedded, expression, cues, maps.unflatten(1, grid))
            for expression, cues, maps in zip(expressions, used, scores, strict=True)
        ]

    def score_maps(
        self, visual: Float[Tensor, "1 n C"], expressions: list[str], cues: Sequence[Sequence[str]]
    ) -> Float[Tensor, "E N n"]:
        """S of every stage. Each sentence is alone with the image: its answer does not depend on others."""
        count = len(expressions)
        stages = range(self.crm.config.stages)
        sentences, *pieces = (
            self.clip.directions(texts).float()[:, None]
            for texts in (expressions, *([each[stage] for each in cues] for stage in stages))
        )
        maps = self.crm(visual.to(sentences).expand(count, -1, -1), sentences, pieces)
        return torch.stack([each[:, 0] for each in maps], dim=1)

    def cues_of(self, expressions: list[str], given: Sequence[Sequence[str]] | None = None) -> list[tuple[str, ...]]:
        """As many cues for each sentence as there are stages: the given ones, or the language model's.

        Raises:
            WrisError: there are not as many lists of cues as sentences; a sentence's are empty; the language model does
                not answer.
        """
        stages = self.crm.config.stages
        if not stages:
            return [()] * len(expressions)
        if given is None and self.cues is not None:
            given = [self.cues] * len(expressions)
        if given is None:
            return [each.phrases[:stages] for each in find_cues(expressions, self.llm, self.parser, max(CUES, stages))]
        if len(given) != len(expressions):
            raise WrisError(
                f"there are {len(given)} lists of cues for {len(expressions)} sentences; give one for each."
            )
        return [repeat(_checked(each), stages) for each in given]

    def _segment(
        self, embedded: SamImage, expression: str, cues: Sequence[str], scores: Float[Tensor, "N h w"]
    ) -> Prediction:
        height, width = embedded.original_size
        large = interpolate(scores[None], (height, width), mode="bilinear")[0]
        responses = response_maps(large.flatten(1)).unflatten(1, (height, width)).cpu().numpy()
        notes = [f"“{cue}”" + _strange(cue, expression) for cue in cues] or [f"“{expression}”"]
        coarse = response_maps(scores.flatten(1)).view_as(scores).cpu().numpy()
        trace = [
            Stage(f"stage {number}", note, response_map=each)
            for number, (note, each) in enumerate(zip(notes, coarse, strict=True), start=1)
        ]
        if self.mask == "map":
            confidence = float(scores[-1].max() / self.crm.config.temperature)
            mask = responses[-1] > 0.5
            trace.append(Stage("mask", "where the map is above 0.5", masks=mask[None]))
            return Prediction(mask, responses[-1], np.zeros((0, 2)), np.zeros(0, dtype=int), confidence, trace)
        x, y = peak(large[-1].cpu().numpy())
        points, labels = np.array([[x + 0.5, y + 0.5]], dtype=np.float32), np.ones(1, dtype=int)
        embedded = replace(embedded, embedding=embedded.embedding.to(self.sam.device))
        decoded = self.sam.decode(embedded, torch.from_numpy(points)[None], torch.from_numpy(labels)[None])
        masks, trusted = self.sam.masks(embedded, decoded)[0], decoded.iou[0].float().cpu().numpy()
        best = int(trusted.argmax())
        trace.append(
            Stage("masks", f"SAM trusts number {best + 1} most", None, points, labels, masks=masks, scores=trusted)
        )
        return Prediction(masks[best], responses[-1], points, labels, float(trusted[best]), trace)


class Tris(PcNet):
    """Sentences are compared with the image as they are: no cues, no module, L_cls alone."""

    name: ClassVar[str] = "tris"
    parts: ClassVar[tuple[str, ...]] = ("clip", "sam", "tris")


def _checked(cues: Sequence[str]) -> tuple[str, ...]:
    """Cues of a caller.

    Raises:
        WrisError: there are none, or one is empty.
    """
    if isinstance(cues, str):
        raise WrisError(f"cues are several texts, not one: write ({cues!r},) instead of {cues!r}.")
    if not cues:
        raise WrisError("the list of cues is empty; give at least one, such as “a man”, or leave cues out.")
    return tuple(check_expression(cue) for cue in cues)


def _strange(cue: str, expression: str) -> str:
    return "" if shares_a_word(cue, expression) else " (shares no word with the sentence: about something else?)"
