"""What a generator asks of SAM, and SAM's answer: prompts of M points, positive and negative.

Source: Dai and Yang, "Curriculum Point Prompting for Weakly-Supervised Referring Image Segmentation", CVPR 2024.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from wris_lib.backbones.sam import SamMasks, Segmenter, decode_prompts


@dataclass(frozen=True)
class PointPrompts:
    """What the generator proposes to ask SAM, K prompts of M points for each of E expressions.

    Attributes:
        points: (x, y) as shares of the image's width and height, 0..1.
        label_logits: whether a point is positive ("on it"), see `point_labels`; the sigmoid is the paper's r.
        score_logits: how sure the generator is that this prompt is about the referent; the sigmoid is the paper's c.
    """

    points: Float[Tensor, "E K M 2"]
    label_logits: Float[Tensor, "E K M"]
    score_logits: Float[Tensor, "E K"]


def prompt_sam(
    segmenter: Segmenter,
    embeddings: Float[Tensor, "#P c h w"],
    points: Float[Tensor, "P M 2"],
    label_logits: Float[Tensor, "P M"],
    extents: Float[Tensor, "#P 2"],
    blend: bool = False,
    negatives: bool = True,
) -> SamMasks:
    """Masks of P prompts, decoded in one batch. SAM is frozen; gradients reach the points.

    A prompt is one query of one expression: for all K of E expressions, hand over flattened E·K rows.

    Args:
        segmenter: SAM.
        embeddings: of the image of each prompt, or a single one of all.
        points: (x, y) as shares of the image's width and height, 0..1.
        label_logits: see `point_labels`.
        extents: (width, height) of the image as shares of SAM's square input, padding being the rest: (1, 1) for a
            square image, `input_size` over `img_size` in general. One of each prompt, or a single one of all.
        blend: SAM has one embedding for positive points and one for negative ones. False: `point_labels` chooses, and
            the choice has no gradient, so that labels are trained by their own loss only. True: they are mixed,
            r · positive + (1 − r) · negative, and gradients of the mask reach the labels too.
        negatives: False: SAM is not told of negative points.

    Returns:
        Logits and predicted IoU of all four mask tokens, see `best_logits`.
    """
    sam = segmenter.sam
    pixels = points * extents[:, None] * sam.image_encoder.img_size
    labels = point_labels(label_logits)
    if not negatives:
        labels = 2 * labels - 1  # -1 is SAM's padding
    if not blend:
        return SamMasks(*decode_prompts(sam, embeddings, pixels, labels, None))
    with torch.autocast(embeddings.device.type, enabled=False):
        sparse, dense = sam.prompt_encoder(points=(pixels, labels), boxes=None, masks=None)
        negative, positive = (sam.prompt_encoder.point_embeddings[label].weight for label in (0, 1))
        # The encoder has added the chosen embedding; the rest of the way to the mixture is (r - label) of a difference.
        mixed = (label_logits.sigmoid() - labels)[..., None] * (positive - negative)
        sparse = sparse + F.pad(mixed, (0, 0, 0, 1))  # behind the points stands upstream's padding point
        image_positions = sam.prompt_encoder.get_dense_pe()
    logits, iou = sam.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(embeddings[:1]),  # handed over with the dense prompt, as in decode_prompts
        image_pe=image_positions,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=embeddings + dense,
    )
    return SamMasks(logits, iou)


def point_labels(label_logits: Float[Tensor, "*p M"]) -> Int[Tensor, "*p M"]:
    """1 for a positive point, 0 for a negative one: logits above 0, and of each prompt the highest in any case.

    A prompt of negative points alone would tell SAM nothing about what to take.
    """
    return ((label_logits > 0) | (label_logits == label_logits.amax(dim=-1, keepdim=True))).long()


def best_logits(decoded: SamMasks) -> Float[Tensor, "P h w"]:
    """The mask that answers a prompt: of SAM's three the one that it trusts most, as in CLIP + SAM.

    Upstream advises its single mask for prompts of several points. The toy SAM's is worse: with nine points over the
    box of an object of ToyRef val, a mean IoU of 69 instead of 74.
    """
    best = 1 + decoded.iou[:, 1:].argmax(dim=1)
    return decoded.logits[torch.arange(len(best)), best].float()
