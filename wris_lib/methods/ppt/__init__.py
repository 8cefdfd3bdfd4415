"""PPT: a small trained generator says where frozen SAM should be asked.

    image, expression --frozen CLIP--> features --generator--> K prompts with scores --frozen SAM--> masks

What CLIP + SAM does by rule (take the map's highest cells) the generator has learnt: which object is meant, and where
to put points on it. It has seen no drawn mask: see `pseudo` for what it learns from, `curriculum` for the order.

Source: Dai and Yang, "Curriculum Point Prompting for Weakly-Supervised Referring Image Segmentation", CVPR 2024.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from wris_lib.backbones.checkpoints import get_stack
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.last_image import LastImage
from wris_lib.backbones.sam import SamImage, SamMasks, Segmenter, load_sam
from wris_lib.methods import Method, Prediction, Stage
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.prompts import PointPrompts, best_logits, point_labels, prompt_sam
from wris_lib.methods.ppt.vision import visual_features
from wris_lib.methods.ppt.weights import find_weights, load_generator

SHOWN = 4  # prompts, those with the highest scores, of which SAM makes masks; the others hardly count


class Ppt(Method):
    """The point generator prompts SAM, and its score chooses.

    The paper shows SAM positive and negative points. Ours are positive only: of the negative points that our generator
    proposes many lie on the object (`results/ppt.json` compares the two).

    Args:
        clip: frozen.
        sam: frozen.
        generator: trained.
        negatives: show SAM the negative points too.
    """

    variants: ClassVar[dict[str, dict[str, Hashable]]] = {"": {}, "negatives": {"negatives": True}}
    parts: ClassVar[tuple[str, ...]] = ("clip", "sam", "ppt")

    def __init__(self, clip: Clip, sam: Segmenter, generator: PointGenerator, negatives: bool = False) -> None:
        self.clip, self.sam, self.negatives = clip, sam, negatives
        self.generator = generator.eval().requires_grad_(False).to(sam.device)
        self._see = LastImage(lambda image: visual_features(self.clip, self.generator.config, [image]))
        self._embed = LastImage(lambda image: self.sam.embed(image))

    @classmethod
    def load(cls, stack: str, weights: str | None = None, device: str | None = None, negatives: bool = False) -> "Ppt":
        """Build the method from a stack's CLIP and SAM and a trained generator.

        Args:
            stack: "toy" or "paper".
            weights: a file that `train ppt` wrote; by default the stack's, see `get_stack`.
            device: such as "cpu"; by default the GPU if there is any.
            negatives: show SAM the negative points too.

        Raises:
            WrisError: no such stack; weights are missing, damaged, or were trained with another CLIP.
        """
        clip = load_clip(stack, device)
        path = find_weights(get_stack(stack)) if weights is None else Path(weights)
        return cls(clip, load_sam(stack, device), load_generator(path, clip), negatives)

    @torch.no_grad()
    def predict(self, image: Image.Image, expressions: list[str]) -> list[Prediction]:
        """One prediction for each expression; CLIP and SAM look at the image once."""
        if not expressions:
            return []
        prompts = self.prompts(image, expressions)
        embedded = self._embed(image)
        return [self._segment(embedded, _row(prompts, e)) for e in range(len(expressions))]

    @torch.no_grad()
    def prompts(self, image: Image.Image, expressions: list[str]) -> PointPrompts:
        """What the generator proposes: K prompts for each of E expressions."""
        visual = self._see(image)
        words, mask = self.clip.word_features(expressions)
        about = torch.zeros(len(expressions), dtype=torch.int64, device=words.device)
        directions = self.clip.directions(expressions)
        return self.generator(visual, words.float(), mask, about, directions.float())

    def masks(self, embedded: SamImage, prompts: PointPrompts) -> SamMasks:
        """SAM's answers to the prompts of one expression, K in one batch."""
        side = self.sam.sam.image_encoder.img_size
        height, width = embedded.input_size
        extents = torch.tensor([[width / side, height / side]], device=self.sam.device)
        asked = (prompts.points[0], prompts.label_logits[0])
        return prompt_sam(self.sam, embedded.embedding, *asked, extents, negatives=self.negatives)

    def _segment(self, embedded: SamImage, prompts: PointPrompts) -> Prediction:
        height, width = embedded.original_size
        scores = prompts.score_logits[0].sigmoid()
        best = scores.topk(min(SHOWN, len(scores)))
        chosen = PointPrompts(
            prompts.points[:, best.indices], prompts.label_logits[:, best.indices], best.values.logit()[None]
        )
        logits = best_logits(self.masks(embedded, chosen))[:, None]
        sized = self.sam.sam.postprocess_masks(logits, embedded.input_size, embedded.original_size)[:, 0]
        masks = (sized > self.sam.sam.mask_threshold).cpu().numpy()
        response = (best.values[:, None, None] * sized.sigmoid()).amax(dim=0)
        points = (chosen.points[0].cpu() * torch.tensor([width, height])).numpy()
        labels = point_labels(chosen.label_logits[0]).cpu().numpy()
        values = best.values.cpu().numpy()
        trace = [
            Stage(
                "prompts",
                f"{len(scores)} queries of {points.shape[1]} points",
                points=(prompts.points[0].flatten(0, 1).cpu() * torch.tensor([width, height])).numpy(),
                point_labels=point_labels(prompts.label_logits[0]).flatten().cpu().numpy(),
            ),
            Stage("best prompt", f"its score is {values[0]:.2f}", points=points[0], point_labels=labels[0]),
            Stage("masks", f"of the {len(masks)} prompts with the highest scores", masks=masks, scores=values),
        ]
        shown = (labels[0] == 1) | self.negatives
        return Prediction(masks[0], response.cpu().numpy(), points[0][shown], labels[0][shown], float(values[0]), trace)


def _row(prompts: PointPrompts, expression: int) -> PointPrompts:
    """The prompts of one expression."""
    rows = slice(expression, expression + 1)
    return PointPrompts(prompts.points[rows], prompts.label_logits[rows], prompts.score_logits[rows])
