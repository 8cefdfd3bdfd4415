"""Iterative Grad-CAM refinement (IGRS): hide what has been found, look again, and stop when there is nothing more.

A map is often right about one patch and silent about the rest, or wrong at its peak. So the patches that answered most
are hidden, and what answers now is averaged with what answered before:

    look ──► H_0 ──hide the strongest──► H_1 ──hide more──► H_2 …        E_t = λ E_{t−1} + (1−λ) H_t

Each look must pay: S_t, how sure the model still is times how much of the image is not yet explained, may not fall.

Source: Wang et al., "IteRPrimE", AAAI 2025 (arXiv 2503.00936), §3.3. Its released code does two things in another way,
and `Refinement` has a switch for each.

Shapes: k expressions that are still looked at, N patches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wris_lib.errors import WrisError
from wris_lib.methods.iterprime.gradcam import min_max

Look = Callable[[list[int], Bool[Tensor, "k N"]], tuple[Float[Tensor, "k N"], Float[Tensor, "k"]]]


@dataclass(frozen=True)
class Refinement:
    """Settings.

    Args:
        passes: ν, at most so many passes after the first look; 0: the first map alone.
        threshold: θ in (0, 1]; a patch whose sharpened map reaches it is hidden from then on.
        decay: λ in [0, 1], share of the average that each pass keeps; the paper's figure 6 counts 1 − λ.
        sharpen: passes after the first look are averaged as σ(H_t), as the paper's Eq. 5 has it; False: as H_t, which
            is what the released code does.
        released_stop: as the released code stops: when ITM falls, whatever has been explained, and what it returns
            already holds the pass that it rejects. False: when S falls, and without that pass.

    Raises:
        WrisError: a number is out of range.
    """

    passes: int = 3
    threshold: float = 0.5
    decay: float = 0.8
    sharpen: bool = False
    released_stop: bool = False

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise WrisError(f"{self.passes} refinement passes cannot be made; ask for 0 or more.")
        if not 0 < self.threshold <= 1:
            raise WrisError(f"the threshold θ is {self.threshold}; choose one above 0 and at most 1.")
        if not 0 <= self.decay <= 1:
            raise WrisError(f"the decay λ is {self.decay}; choose one from 0 to 1.")


PAPER = Refinement()


@dataclass(frozen=True)
class Pass:
    """One look.

    Attributes:
        response_map: H_t in [0, 1].
        average: E_t with this look.
        visible: what this look was allowed to see.
        probability: ITM_t, that the sentence is true of what was seen.
        score: S_t.
        kept: false when the stop rule rejected it; it is the last one then.
    """

    response_map: Float[Tensor, "N"]
    average: Float[Tensor, "N"]
    visible: Bool[Tensor, "N"]
    probability: float
    score: float
    kept: bool


@dataclass(frozen=True)
class Refined:
    """What came of one expression.

    Attributes:
        response_map: the last E that counts.
        passes: the first look and those after it, a rejected one included.
    """

    response_map: Float[Tensor, "N"]
    passes: list[Pass]


def refine(
    look: Look, count: int, cells: int, settings: Refinement, device: str | torch.device | None = None
) -> list[Refined]:
    """Look, hide, look again; expressions run side by side, each until its own stop.

        E_0 = H_0,   E_t = λ E_{t−1} + (1−λ) H_t
        M_t = M_{t−1} ∧ [σ(H_t) < θ]           what look t + 1 may see; when it is nothing, there is no such look
        S_t = ITM_t · R_t,   R_t = mean(1 − Ẽ_{t−1}),   Ẽ = E, min-max scaled;   stop when S_t < S_{t−1}

    There is no E_{−1}; R_0 is taken to be R_1, so that the first comparison is one of ITM alone. With R_0 = 1 hardly
    any second look would ever be kept, since R_1 is what the first map leaves.

    Args:
        look: for the expressions of these numbers, and what each may see: H in [0, 1] and ITM.
        count: number of expressions.
        cells: N.
        settings: as they are.
        device: of the tensors that `look` is given.
    """
    passes: list[list[Pass]] = [[] for _ in range(count)]
    running = list(range(count))
    visible = torch.ones(count, cells, dtype=torch.bool, device=device)
    for number in range(settings.passes + 1):
        if not running:
            break
        maps, probabilities = (each.float() for each in look(running, visible))
        before = torch.stack([passes[each][-1].average for each in running]) if number else maps
        new = sharpened(maps) if settings.sharpen else maps
        averages = settings.decay * before + (1 - settings.decay) * new if number else maps
        scores = probabilities * (1 - min_max(before)).mean(dim=-1)
        looks = zip(maps, averages, visible, probabilities.tolist(), scores.tolist(), strict=True)
        for each, (*seen, probability, score) in zip(running, looks, strict=True):
            kept = not number or not _fell(passes[each][-1], probability, score, settings)
            passes[each].append(Pass(*seen, probability, score, kept))
        visible = visible & (sharpened(maps) < settings.threshold)
        rows = [row for row, left in enumerate(visible.any(dim=-1).tolist()) if left and passes[running[row]][-1].kept]
        running, visible = [running[row] for row in rows], visible[rows]
    counted = [[each for each in made if each.kept or settings.released_stop] for made in passes]
    return [Refined(kept[-1].average, made) for kept, made in zip(counted, passes, strict=True)]


def sharpened(maps: Float[Tensor, "*b N"]) -> Float[Tensor, "*b N"]:
    """σ(x) = s(x) / max s with s(x) = sigmoid(20 (x − ½)): nearly 0 or 1, and 1 at each map's maximum."""
    steep = (20 * (maps - 0.5)).sigmoid()
    return steep / steep.amax(dim=-1, keepdim=True)


def _fell(last: Pass, probability: float, score: float, settings: Refinement) -> bool:
    return probability < last.probability if settings.released_stop else score < last.score
