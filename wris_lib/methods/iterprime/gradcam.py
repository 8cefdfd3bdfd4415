"""Grad-CAM of a sentence, and how the maps of its tokens become one.

Where a token looks (A, cross-attention), weighed with what that was worth for "the sentence is true of this image"
(G, the gradient, where it is positive), is the token's map A ⊙ G. A plain mean of these maps is about everything that
the sentence mentions. *Primary word emphasis* (PWEM) turns it towards the noun that the other words qualify:

    local    H_l   the primary word's map where its attention differs from that of each other word
    global   H_g   all effective words' maps, and as many times that of the primary word

Source: Wang et al., "IteRPrimE: Zero-shot Referring Image Segmentation with Iterative Grad-CAM Refinement and Primary
Word Emphasis", AAAI 2025 (arXiv 2503.00936). Where the paper is silent, as its released code.

Shapes: L tokens, [CLS] and [SEP] included, N patches.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from wris_lib.errors import WrisError
from wris_lib.methods.iterprime.words import Pieces

AGGREGATIONS = ("mean", "gvlp", "local", "global", "pwem")
SMALLEST = 1e-8  # a norm that is divided by


def aggregate(
    attention: Float[Tensor, "heads L N"], gradient: Float[Tensor, "heads L N"], pieces: Pieces, how: str = "pwem"
) -> Float[Tensor, "N"]:
    """One map from the maps of a sentence's tokens: their mean, then that of the heads, min-max scaled to [0, 1].

    Args:
        attention: A, of one sentence without padding.
        gradient: of the matched logit with respect to it; what is negative counts as 0.
        pieces: W and m. Without a primary word "local", "global" and "pwem" are "gvlp", and without effective words
            that is "mean".
        how: over which maps the mean is taken. "mean": all tokens'; "gvlp": those of W; "local": H_l; "global": H_g,
            which are those of W, and then those of m, |W| times; "pwem": [CLS]'s, H_l and H_g.

    Returns:
        In float32; 0 everywhere where no patch differs from another.

    Raises:
        WrisError: there is no such aggregation.
    """
    check_aggregation(how)
    attention, gradient = attention.float(), gradient.float().relu()
    cam = attention * gradient
    if how == "mean" or not pieces.effective:
        maps = [cam]
    elif how == "gvlp" or not pieces.primary:
        maps = [cam[:, pieces.effective]]
    else:
        local = local_maps(attention, gradient, pieces)
        overall = cam[:, pieces.effective + pieces.primary * len(pieces.effective)]
        maps = {"local": [local], "global": [overall], "pwem": [cam[:, :1], local, overall]}[how]
    return min_max(torch.cat(maps, dim=1).mean(dim=(0, 1)))


def check_aggregation(how: str) -> None:
    """Whether `aggregate` knows it.

    Raises:
        WrisError: it does not.
    """
    if how not in AGGREGATIONS:
        raise WrisError(f"there is no aggregation {how!r}; choose one of: {', '.join(AGGREGATIONS)}.")


def local_maps(
    attention: Float[Tensor, "heads L N"], gradient: Float[Tensor, "heads L N"], pieces: Pieces
) -> Float[Tensor, "heads C N"]:
    """H_l = A_dif ⊙ G_m ⊙ H_m, signed: one map for each context token, or one in all if there is no context.

    A_dif = (A_m − A_c) / ‖A_m − A_c‖₂, where the norm is that over context tokens, at each head and patch, and at
    least 1e-8. So with one context token A_dif says no more than which of the two words looks here more. Without any,
    A_m is compared with 0.

    Args:
        attention: A.
        gradient: G, not negative.
        pieces: with a primary word.
    """
    own, worth = (each[:, pieces.primary].mean(dim=1, keepdim=True) for each in (attention, gradient))
    apart = own - attention[:, pieces.context] if pieces.context else own
    apart = apart / apart.norm(dim=1, keepdim=True).clamp(min=SMALLEST)
    return apart * worth * (own * worth)


def min_max(maps: Float[Tensor, "*b N"]) -> Float[Tensor, "*b N"]:
    """Each map scaled to [0, 1]; a constant one becomes 0."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
