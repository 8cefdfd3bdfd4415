"""PCNet's losses. None of them knows where the referent is.

- `classification` (L_cls): of the sentences of a batch, which one belongs to the image?
- `region_shrinking` (L_RaS): from stage to stage the response should leave fewer things in doubt.
- `disambiguation` (L_IaD): sentences about different things in one image are answered in different places.

The last two are not quite the paper's. Those are here, too, and `results/pcnet_ablation.json` compares them.

Source: Yang et al., NeurIPS 2024, §3.3; L_cls is that of TRIS (Liu et al., ICCV 2023).

Shapes: B images, T texts, n cells of a map, P proposals, N stages.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from wris_lib.errors import WrisError

MARGIN = 0.5  # of ambiguity, which lies between 0 and 2
FOCUS = 3.0  # S · 3 is about 20 · cosine


def classification(scores: Float[Tensor, "B B n"]) -> Float[Tensor, ""]:
    """L_cls of one stage.

    With M the softmax over the texts and a background that scores 1 everywhere, m its mean over the image:

        y = mean S + max S + (1 − m)³ log(0.01 + m)

    and a multilabel soft margin between y and the identity: image i belongs to text i. The last term keeps maps from
    shrinking to a point.

    Args:
        scores: S; [i, j] is the map of image i and text j.

    Raises:
        WrisError: there is a single image, so no text is wrong.
    """
    images, texts, _ = scores.shape
    if texts < 2:
        raise WrisError("a batch of one image has no wrong texts to tell the right one from; use at least two images.")
    background = scores.new_ones(images, 1, scores.shape[2])
    share = torch.cat([scores, background], dim=1).softmax(dim=1)[:, :texts].mean(dim=2)
    size = (1 - share) ** 3 * torch.log(0.01 + share)
    logits = scores.mean(dim=2) + scores.amax(dim=2) + size
    return F.multilabel_soft_margin_loss(logits, torch.eye(images, texts, device=scores.device))


def ambiguity(
    response: Float[Tensor, "B n"], proposals: Bool[Tensor, "B P n"], present: Bool[Tensor, "B P"]
) -> Float[Tensor, "B"]:
    """S^amb = 1 − (IoU(R, m_f) − IoU(R, m_b)), between 0 and 2.

    The foreground m_f is the proposal in which the response is strongest, the background m_b the union of all others.
    IoU is `soft_iou`.

    Args:
        response: R, in [0, 1].
        proposals: masks, without labels, on the grid of the response.
        present: False at padding. An image without any proposal has ambiguity 1.
    """
    shown = proposals & present[..., None]
    strength = (response[:, None] * shown).amax(dim=2).masked_fill(~present, -1)
    first = F.one_hot(strength.argmax(dim=1), proposals.shape[1]).bool()
    foreground = (shown & first[..., None]).any(dim=1)
    background = (shown & ~first[..., None]).any(dim=1)
    return 1 - (soft_iou(response, foreground) - soft_iou(response, background))


def soft_iou(response: Float[Tensor, "*b n"], mask: Bool[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Σ R·m / Σ (R + m − R·m) of a map in [0, 1] and a mask; 0 when both are empty."""
    both = (response * mask).sum(dim=-1)
    return both / (response.sum(dim=-1) + mask.sum(dim=-1) - both).clamp(min=1e-6)


def region_shrinking(ambiguities: Sequence[Float[Tensor, "B"]], margin: float = MARGIN) -> Float[Tensor, ""]:
    """L_RaS: 1/(N−1) Σ_n max(0, S^amb_{n+1} − sg(S^amb_n) + margin): each stage shall leave less in doubt than before.

    The paper has neither margin nor stop-gradient, see `region_shrinking_as_written`. Without them there is hardly
    anything to learn, for the second stage is less ambiguous than the first by itself, and the easiest way to make
    sure of it is a worse first stage.

    Args:
        ambiguities: S^amb of every stage. 0 for a single one.
        margin: by how much less.
    """
    growth = [(b - a.detach() + margin).relu().mean() for a, b in zip(ambiguities, ambiguities[1:], strict=False)]
    return sum(growth) / len(growth) if growth else ambiguities[0].new_zeros(())


def region_shrinking_as_written(ambiguities: Sequence[Float[Tensor, "B"]]) -> Float[Tensor, ""]:
    """L_RaS = 1/(N−1) Σ_n max(0, S^amb_{n+1} − S^amb_n): doubt may not grow from stage to stage. 0 for one stage."""
    growth = [(later - earlier).relu().mean() for earlier, later in zip(ambiguities, ambiguities[1:], strict=False)]
    return sum(growth) / len(growth) if growth else ambiguities[0].new_zeros(())


def peak(scores: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """One-hot at the maximum, with the gradient of the scores themselves (straight through)."""
    hard = F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores)
    return hard + (scores - scores.detach())  # in this order exactly one-hot


def disambiguation_as_written(own: Float[Tensor, "B n"], others: Float[Tensor, "B D n"]) -> Float[Tensor, ""]:
    """L_IaD = mean over d of 1 − ‖y_a − y_d‖², with y of `peak`: 1 where two peaks coincide, −1 where they do not.

    As the paper writes it, it teaches nothing where it should: the derivative by y_a is −2 (y_a − y_d), which is 0 when
    the peaks coincide. For one-hot vectors ‖y_a − y_d‖² = 2 − 2 y_a·y_d, and in this form, of the same value, each
    sentence learns to avoid the other's peak. It never stops learning that: see `disambiguation`.

    Args:
        own: S of image and its sentence, only of images that have others.
        others: S of the same image and sentences about other things in it.
    """
    if own.shape[0] == 0:
        return own.sum()  # 0, and a gradient can be asked for
    return (2 * (peak(own)[:, None] * peak(others)).sum(dim=-1) - 1).mean()


def disambiguation(own: Float[Tensor, "B n"], others: Float[Tensor, "B D n"]) -> Float[Tensor, ""]:
    """L_IaD, softened: the mean cosine between softmax(3 S_a) and softmax(3 S_d), 1 for equal maps, 0 for apart ones.

    In place of two peaks all of both maps is compared. The gradient of one-hot peaks with S behind them is the same
    however far apart they are, and it also lowers the map as a whole: so trained, maps fell below 0 everywhere, where
    R shows nothing. A softmax has no level, and where two maps do not meet, nothing is left to be learnt.

    Args:
        own: S of image and its sentence, only of images that have others.
        others: S of the same image and sentences about other things in it.
    """
    if own.shape[0] == 0:
        return own.sum()  # 0, and a gradient can be asked for
    one, other = ((FOCUS * scores).softmax(dim=-1) for scores in (own, others))
    return F.cosine_similarity(one[:, None], other, dim=-1).mean()
