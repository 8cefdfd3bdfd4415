"""PPT's curriculum: from what a word looks like, to which one is meant, to sentences as people write them.

| stage | learns from | to learn |
|---|---|---|
| 1 semantic alignment | H_sem ∪ D_sem | what words look like, where points go |
| 2 RIS learning | (a) + D_ref, (b) + H_ref | which of several objects is meant |
| 3 domain refinement | H_sem ∪ H_ref | scenes and sentences as they are |

An expression of H_ref has several candidates, and nobody has said which of them is the referent. Before every round
that learns from H_ref, `select` lets the generator trained so far decide, and what it decides is what it learns from
next. Where H_ref is there from the beginning, CLIP's choice counts in the first round: the first candidate.

Source: Dai and Yang, CVPR 2024, §3.3: 50 epochs, 10 / 30 / 10 for the three stages. Here a round is counted in steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from wris_lib.backbones.sam import Segmenter
from wris_lib.errors import WrisError
from wris_lib.files import atomic_write, readable_errors
from wris_lib.methods.ppt.labels import UNKNOWN
from wris_lib.methods.ppt.loss import LossWeights
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.prompts import best_logits, prompt_sam
from wris_lib.methods.ppt.training import DATASETS, Batches, TrainingData, training_loss
from wris_lib.train import Recipe, fit, move

SELECT_BATCH = 96
CLIPS_CHOICE = 0  # the number of a candidate


@dataclass(frozen=True)
class Round:
    """A piece of training on one choice of data.

    Args:
        stage: of the curriculum, 1 to 3.
        datasets: names, see `training.DATASETS`.
        share: of all steps.
        rate: peak learning rate, as a share of the recipe's.
    """

    stage: int
    datasets: tuple[str, ...]
    share: float
    rate: float = 1.0


FULL = (
    Round(1, ("H_sem", "D_sem"), 0.25),
    Round(2, ("H_sem", "D_sem", "D_ref"), 0.35),
    Round(2, DATASETS, 0.1),
    Round(2, DATASETS, 0.1),
    Round(3, ("H_sem", "H_ref"), 0.1, 0.5),
    Round(3, ("H_sem", "H_ref"), 0.1, 0.5),
)
CURRICULA = {
    "full": FULL,
    # The same rounds, with everything in each of them.
    "no curriculum": tuple(replace(each, stage=1, datasets=DATASETS) for each in FULL),
    "no D_ref": tuple(replace(each, datasets=tuple(d for d in each.datasets if d != "D_ref")) for each in FULL),
    "no D_sem": tuple(replace(each, datasets=tuple(d for d in each.datasets if d != "D_sem")) for each in FULL),
    "no images": tuple(replace(each, datasets=tuple(d for d in each.datasets if d[0] != "D")) for each in FULL),
    # As long as stage 1: what the paper's Table 3 compares with it.
    "plain": (Round(1, ("H_sem", "H_ref"), FULL[0].share),),
}


@dataclass(frozen=True)
class Training:
    """How a generator is trained, whatever the curriculum.

    Args:
        steps: optimiser steps of all rounds together.
        learning_rate: its peak.
        seed: of the generator's first weights and of everything drawn.
        weights: of the loss's terms.
        blend: see `prompt_sam`.
        shares: of a batch, for as many processes; however many, the result is the same but for rounding.
        precision: "bf16" or "fp32", see `Recipe`.
    """

    steps: int = 12000
    learning_rate: float = 1e-3
    seed: int = 0
    weights: LossWeights = field(default_factory=LossWeights)
    blend: bool = False
    shares: int = 1
    precision: str = "bf16"

    def recipe(self, this: Round, number: int) -> Recipe:
        """Of one round. Each has a cosine of its own, so that a generator is ready to be judged after every round."""
        steps = max(1, round(self.steps * this.share))
        return Recipe(
            steps,
            self.learning_rate * this.rate,
            warmup=min(100, steps // 5),
            seed=100 * self.seed + number,
            precision=self.precision,
            checkpoint_every=200,
            shares=self.shares,
        )


@dataclass(frozen=True)
class Done:
    """What a round leaves behind.

    Attributes:
        round: which.
        log: one dict a step, see `train.fit`.
        referents: of every expression of the data, those of H_ref as selected; UNKNOWN where there is none, as before
            the first selection, or when none of the candidates overlaps the prediction.
    """

    round: Round
    log: list[dict[str, int | float]]
    referents: Int[np.ndarray, " E"]


def train(
    generator: PointGenerator,
    segmenter: Segmenter,
    data: TrainingData,
    rounds: Sequence[Round],
    training: Training,
    folder: Path,
    device: str | torch.device = "cpu",
) -> Iterator[Done]:
    """Train a generator in place, a round at a time; it yields after each, and goes on when it is asked to.

    Every round has a folder of its own in `folder`. A run that was killed is resumed there, and ends with the weights
    of an uninterrupted one.

    Args:
        generator: with its first weights.
        segmenter: frozen.
        data: all datasets.
        rounds: one of `CURRICULA`.
        training: how.
        folder: for checkpoints and selections.
        device: where to train.

    Raises:
        WrisError: a round has no data; whatever `train.fit` raises.
    """
    loss = training_loss(segmenter, training.weights, training.blend)
    for number, this in enumerate(rounds):
        place = Path(folder) / f"round {number + 1}"
        active = data
        if "H_ref" in this.datasets:
            referent, of_ref = data.labels.referent.copy(), data.of(("H_ref",))
            path = place / "referents.npy"
            referent[of_ref] = _selected(path, generator, segmenter, data, of_ref, device) if number else CLIPS_CHOICE
            active = data.with_referents(referent)
        expressions = active.of(this.datasets)
        expressions = expressions[active.labels.referent[expressions] != UNKNOWN]
        if len(expressions) == 0:
            raise WrisError(
                f"round {number + 1} learns from {', '.join(this.datasets)}, but there is no expression with a referent"
                " in them; are there pictures, and did CLIP + SAM find anything in them?"
            )
        seed = 100 * training.seed + number
        batches = Batches(active, expressions, generator.config.points, seed, training.shares)
        log = fit(generator, loss, batches, training.recipe(this, number), place, device)
        yield Done(this, log, active.labels.referent)


def _selected(
    path: Path,
    generator: PointGenerator,
    segmenter: Segmenter,
    data: TrainingData,
    expressions: Int[np.ndarray, " n"],
    device: str | torch.device,
) -> Int[np.ndarray, " n"]:
    """What `select` says, or said before a kill."""
    if not path.exists():
        chosen = select(generator.to(device), segmenter, data, expressions)
        with readable_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.save(file, chosen)
    return np.load(path)


@torch.no_grad()
def select(
    generator: PointGenerator, segmenter: Segmenter, data: TrainingData, expressions: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """The candidate that matches the generator's top-scoring prediction best: the highest IoU of their masks.

    Args:
        generator: trained so far.
        segmenter: frozen, on the same device.
        data: that `expressions` number.
        expressions: any.

    Returns:
        For each expression the number of a candidate; UNKNOWN when none overlaps the prediction.
    """
    generator.eval()
    order = np.argsort(data.labels.image[expressions], kind="stable")  # an image is read once
    chosen = np.empty(len(expressions), dtype=np.int64)
    for start in tqdm(range(0, len(order), SELECT_BATCH), "Select", unit=" batches", leave=False):
        rows = order[start : start + SELECT_BATCH]
        masks = predict(generator, segmenter, data, expressions[rows])
        for row, mask in zip(rows, masks, strict=True):
            overlaps = mask_ious(mask, data.labels.candidates(int(expressions[row])))
            chosen[row] = overlaps.argmax() if overlaps.max() > 0 else UNKNOWN
    return chosen


@torch.no_grad()
def predict(
    generator: PointGenerator, segmenter: Segmenter, data: TrainingData, expressions: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, "n side side"]:
    """The mask of each expression's top-scoring prompt, in SAM's low resolution."""
    inputs = move(data.inputs(expressions), segmenter.device)
    prompts = generator(**inputs)
    rows, best = torch.arange(len(expressions)), prompts.score_logits.argmax(dim=1)
    embeddings = data.embeddings[data.labels.image[expressions]]["embedding"].float().to(segmenter.device)
    extents = torch.from_numpy(data.labels.extents[expressions]).to(segmenter.device)
    decoded = prompt_sam(segmenter, embeddings, prompts.points[rows, best], prompts.label_logits[rows, best], extents)
    return (best_logits(decoded) > 0).cpu().numpy()


def mask_ious(mask: Bool[np.ndarray, "h w"], others: Bool[np.ndarray, "y h w"]) -> Float[np.ndarray, " y"]:
    """IoU of a mask with each of others; of two empty masks 0, for nothing overlaps there."""
    union = (mask | others).sum((1, 2))
    return (mask & others).sum((1, 2)) / np.maximum(union, 1)
