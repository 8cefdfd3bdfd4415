"""PPT's loss (Eq. 4): which query answers for which pseudo-label, and how well.

The generator proposes K prompts, an expression comes with Y pseudo-labels ŷ = (ŝ, P̂, ĉ): a mask, M points with labels,
and a score that is 1 for the referent. They are paired so that the pairs' loss

    ℓ = DICE(s, ŝ) + BCE(s, ŝ)  +  L1(p, p̂) + BCE(r, r̂)  +  BCE(c, ĉ)
        mask                        points                   score

is smallest (Hungarian matching, as in DETR). Queries without a partner learn the score 0 and nothing else. Decoding
masks is what costs time, so there are three steps, and masks may come in before the first or the last of them:

    terms = pair_terms(prompts, labels, weights)             every query against every pseudo-label
    matches = match(terms, labels.present, weights)
    loss = matched_loss(prompts, labels, terms, matches, weights, masks of the matched prompts)

Points are a set: a pseudo-label's are drawn at random, and no order of them means anything. If the i-th predicted point
were compared with the i-th drawn one, the best answer to all draws would be the middle of the box, M times. So the
points of a pair are matched too, with the same L1 and BCE: each predicted point answers for the drawn point it is
nearest to, the M points spread over the box, and a point's label says whether *its* place is on the object. (Sorting
both by x would also make them comparable, but two neighbours in x can be far apart in y.)

Source: Dai and Yang, CVPR 2024, §3.2; matching: Carion et al. 2020. The paper gives no weights and no cost.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from wris_lib.errors import WrisError
from wris_lib.methods.ppt.prompts import PointPrompts, point_labels


@dataclass(frozen=True)
class LossWeights:
    """Factors of the terms, in the matching as in the loss.

    Points are DETR's 5: they lie in 0..1, so L1 is small. The score is a mean over all queries, of which one or two
    are meant; 8 brings it near the sum over queries that DETR's successors take (Deformable DETR, Zhu et al. 2021).
    The terms of masks are left out, unlike in the paper: a step has time to decode two of them, and a gradient from two
    examples is mostly chance, which clipping makes room for at the cost of all other terms. Generators that were
    trained without are better (`results/ppt_study.json`), and SAM is not asked in training at all.
    """

    dice: float = 0.0
    mask: float = 0.0
    points: float = 5.0
    labels: float = 1.0
    score: float = 8.0


@dataclass(frozen=True)
class PseudoLabels:
    """What E expressions are trained on: up to Y objects each, padded.

    Attributes:
        points: (x, y) as shares of the image's width and height, 0..1.
        point_labels: 1 on the object, 0 off it.
        scores: 1 for the referent, 0 for other objects.
        present: False where an expression has fewer than Y.
        masks: shares 0..1 of every pixel, at SAM's low resolution and over its square input; None: not at hand.
        extents: (width, height) of the image as shares of that square; None: the images are square.
    """

    points: Float[Tensor, "E Y M 2"]
    point_labels: Float[Tensor, "E Y M"]
    scores: Float[Tensor, "E Y"]
    present: Bool[Tensor, "E Y"]
    masks: Float[Tensor, "E Y m m"] | None = None
    extents: Float[Tensor, "E 2"] | None = None


@dataclass(frozen=True)
class Matches:
    """P pairs: query `query` of expression `expression` answers for its pseudo-label `label`."""

    expression: Int[Tensor, "P"]
    query: Int[Tensor, "P"]
    label: Int[Tensor, "P"]


def pair_terms(
    prompts: PointPrompts,
    labels: PseudoLabels,
    weights: LossWeights,
    mask_logits: Float[Tensor, "E K m m"] | None = None,
) -> dict[str, Float[Tensor, "E K Y"]]:
    """All terms of every query with every pseudo-label, by their names in `LossWeights`.

    Where no pseudo-label is present the numbers mean nothing.

    Args:
        prompts: of the generator.
        labels: whose masks are needed when `mask_logits` are given.
        weights: of "points" and "labels", between which the matching of a pair's points weighs.
        mask_logits: SAM's masks of all queries. Without them there is neither "dice" nor "mask".

    Raises:
        WrisError: a prediction is not finite; masks are needed and not there.
    """
    # Expressions E, queries K, pseudo-labels Y, predicted points M, drawn points M.
    points, logits = prompts.points[:, :, None], prompts.label_logits[:, :, None]
    partner = _match_points(prompts, labels, weights)
    expression, _, label, _ = torch.meshgrid(
        *(torch.arange(size, device=partner.device) for size in partner.shape), indexing="ij"
    )
    at = (expression, label, partner)
    score_logits, scores = torch.broadcast_tensors(prompts.score_logits[:, :, None], labels.scores[:, None])
    terms = {
        "points": (points - labels.points[at]).abs().sum(-1).mean(-1),
        "labels": (F.softplus(logits) - logits * labels.point_labels[at]).mean(-1),
        "score": F.binary_cross_entropy_with_logits(score_logits, scores, reduction="none"),
    }
    if mask_logits is not None:
        terms |= mask_terms(mask_logits.flatten(2), _masks_of(labels).flatten(2))
    return terms


def mask_terms(logits: Float[Tensor, "b k n"], masks: Float[Tensor, "b y n"]) -> dict[str, Float[Tensor, "b k y"]]:
    """Dice loss and mean binary cross-entropy of every predicted mask with every given one, pixels in a row.

    Both are sums of products over pixels, that is, matrix products:

        DICE = 1 − (2 Σ p·t + 1) / (Σ p + Σ t + 1)        BCE = mean (log(1 + eˣ) − x·t),   p = sigmoid(x)
    """
    with torch.autocast(logits.device.type, enabled=False):  # in half precision thousands of pixels do not add up
        logits = logits.to(masks.dtype)
        probability, given = logits.sigmoid(), masks.transpose(1, 2)
        areas = probability.sum(-1)[:, :, None] + masks.sum(-1)[:, None]
        entropy = F.softplus(logits).sum(-1)[:, :, None] - logits @ given
        return {"dice": 1 - (2 * probability @ given + 1) / (areas + 1), "mask": entropy / masks.shape[-1]}


@torch.no_grad()
def match(terms: dict[str, Float[Tensor, "E K Y"]], present: Bool[Tensor, "E Y"], weights: LossWeights) -> Matches:
    """For each expression the pairs with the smallest sum of weighted terms; every pseudo-label gets a query.

    The score is no part of that sum. A query answers for what it points at; with the score in the sum, one that has
    once been preferred is preferred for everything.

    Raises:
        WrisError: an expression has more pseudo-labels than the generator has queries; a term is not finite.
    """
    cost = sum(getattr(weights, name) * term for name, term in terms.items() if name != "score")
    queries, most = cost.shape[1], int(present.sum(dim=1).max())
    if most > queries:
        raise WrisError(f"an expression has {most} pseudo-labels, but the generator has only {queries} queries.")
    found = [torch.zeros(0, 3, dtype=torch.long)]
    for e, (costs, here) in enumerate(zip(cost.cpu().numpy(), present.cpu().numpy(), strict=True)):
        k, y = _assign(costs[:, here])
        found.append(torch.from_numpy(np.stack([np.full_like(k, e), k, np.flatnonzero(here)[y]], axis=1)))
    return Matches(*torch.cat(found).T.to(present.device))


def matched_loss(
    prompts: PointPrompts,
    labels: PseudoLabels,
    terms: dict[str, Float[Tensor, "E K Y"]],
    matches: Matches,
    weights: LossWeights,
    mask_logits: Float[Tensor, "p m m"] | None = None,
    all_right: bool = False,
    decoded: Int[Tensor, "p"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Eq. 4: the mean over matched pairs of their terms, and the mean over all queries of the score's.

    Args:
        prompts: of the generator.
        labels: whose masks are needed for `mask_logits` and `all_right`.
        terms: of `pair_terms`.
        matches: of `match`.
        weights: of the terms.
        mask_logits: SAM's masks of the matched queries, or of some. Without them there is neither "dice" nor "mask",
            unless `terms` have them.
        all_right: the score to learn is also 1 for unmatched queries that would make as good a prompt: most of their
            positive points hit the referent, and their points cover its box (IoU above 0.5). Several anchored queries
            lie on a large object, and that one of them is matched does not make the others wrong.
        decoded: which of the pairs `mask_logits` are of; None: all.

    Returns:
        The terms unweighted, by their names in `LossWeights`, and their weighted sum "loss".

    Raises:
        WrisError: masks are needed and not there.
    """
    pairs = (matches.expression, matches.query, matches.label)
    targets = torch.zeros_like(prompts.score_logits).index_put(
        pairs[:2], labels.scores[matches.expression, matches.label]
    )
    if all_right:
        overlaps = box_iou(boxes_around(prompts.points), boxes_around(labels.points))
        hits = (points_inside(prompts, labels) > 0.5) & (overlaps > 0.5)
        targets = torch.maximum(targets, (hits * labels.scores[:, None]).amax(dim=2))
    found = {name: term[pairs] for name, term in terms.items() if name != "score"}
    if mask_logits is not None:
        decoded = slice(None) if decoded is None else decoded
        given = _masks_of(labels)[matches.expression[decoded], matches.label[decoded]]
        pixels = mask_terms(mask_logits.flatten(1)[:, None], given.flatten(1)[:, None])
        found |= {name: term.flatten() for name, term in pixels.items()}
    means = {name: values.sum() / max(1, len(values)) for name, values in found.items()}
    means["score"] = F.binary_cross_entropy_with_logits(prompts.score_logits, targets)
    return {"loss": sum(getattr(weights, name) * mean for name, mean in means.items()), **means}


@torch.no_grad()
def points_inside(prompts: PointPrompts, labels: PseudoLabels) -> Float[Tensor, "E K Y"]:
    """Share of each query's positive points that lie in each pseudo-mask.

    Raises:
        WrisError: there are no masks.
    """
    masks = _masks_of(labels)
    side = masks.shape[-1]
    extents = torch.ones_like(prompts.points[:, 0, 0]) if labels.extents is None else labels.extents
    x, y = (prompts.points * extents[:, None, None] * side).long().clamp(0, side - 1).flatten(1, 2).unbind(-1)  # E KM
    pixels = (y * side + x)[:, None].expand(-1, masks.shape[1], -1)
    inside = (masks.flatten(2).gather(2, pixels) > 0.5).unflatten(2, prompts.points.shape[1:3])  # E Y K M
    positive = (point_labels(prompts.label_logits) > 0)[:, None]
    share = (inside & positive).sum(-1) / positive.sum(-1)
    return (share * labels.present[..., None]).transpose(1, 2)


@torch.no_grad()
def boxes_around(points: Float[Tensor, "*b m 2"]) -> Float[Tensor, "*b 4"]:
    """(left, top, right, bottom) of sets of points."""
    return torch.cat([points.amin(dim=-2), points.amax(dim=-2)], dim=-1)


def _masks_of(labels: PseudoLabels) -> Float[Tensor, "E Y m m"]:
    if labels.masks is None:
        raise WrisError("these pseudo-labels came without masks, but the loss was asked to use them.")
    return labels.masks


@torch.no_grad()
def _match_points(prompts: PointPrompts, labels: PseudoLabels, weights: LossWeights) -> Int[Tensor, "E K Y M"]:
    """For each predicted point of each pair the number of the drawn point that is its partner."""
    e, y = labels.present.nonzero(as_tuple=True)
    logits = prompts.label_logits.flatten(1)[e, :, None]  # pseudo-label × KM × 1
    distance = torch.cdist(prompts.points.flatten(1, 2)[e], labels.points[e, y], p=1)
    mistake = F.softplus(logits) - logits * labels.point_labels[e, y][:, None]  # cross-entropy of a 0 or a 1
    costs = weights.points * distance + weights.labels * mistake
    sizes = prompts.label_logits.shape[1:]
    every = costs.double().cpu().numpy().reshape(-1, *sizes, sizes[1])  # which scipy would make of every single one
    found = np.array([[_assign(each)[1] for each in queries] for queries in every]).reshape(-1, *sizes)
    partner = torch.arange(sizes[1], device=e.device).expand(*labels.present.shape, *sizes).clone()  # E Y K M
    partner[e, y] = torch.from_numpy(found).to(partner)
    return partner.transpose(1, 2)


def _assign(costs: Float[np.ndarray, "k y"]) -> tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]]:
    """Rows and columns of the assignment with the smallest sum."""
    try:
        return linear_sum_assignment(costs)
    except ValueError as error:  # NaN or infinite
        raise WrisError(
            "the generator's predictions are no longer finite numbers; train with a lower learning rate or in fp32."
        ) from error
