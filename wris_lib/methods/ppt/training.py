"""What PPT is trained on, encoded once, and the loss of a batch of it.

All datasets lie in one `TrainingData`: expressions with candidates, and what frozen CLIP and SAM make of their images
and words. A round of the curriculum (`curriculum`) is a choice of expressions from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import FeatureStore, JoinedStores, open_features
from wris_lib.backbones.features import clip_words, sam_embeddings, texts
from wris_lib.backbones.sam import Segmenter
from wris_lib.errors import WrisError
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.labels import UNKNOWN, LabelledExpressions, join
from wris_lib.methods.ppt.layers import visual_tokens
from wris_lib.methods.ppt.loss import LossWeights, PseudoLabels, match, matched_loss, pair_terms
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.prompts import PointPrompts, best_logits, prompt_sam
from wris_lib.methods.ppt.pseudo import LabelledImages
from wris_lib.methods.ppt.vision import visual_encoder

DATASETS = ("H_sem", "H_ref", "D_sem", "D_ref")
H_SEM, H_REF, D_SEM, D_REF = range(4)

IMAGES_PER_STEP = 10
EXPRESSIONS_PER_IMAGE = 8
WHITENED = 200  # images, and ten times as many expressions, that show how features vary
MASKS_PER_STEP = 2  # pairs whose masks SAM decodes: it takes longer over one than the generator over an expression


@dataclass(frozen=True)
class TrainingData:
    """All expressions of all datasets, with features.

    Attributes:
        labels: `labels.image` numbers the rows of `patches` and `embeddings`.
        dataset: of each expression, a number in `DATASETS`.
        patches: of `visual_encoder`.
        embeddings: of `sam_embeddings`.
        words: of `clip_words`.
        word: of each expression its row in `words`.
        empty: CLIP's features of the empty text.
    """

    labels: LabelledExpressions
    dataset: Int[np.ndarray, " E"]
    patches: JoinedStores
    embeddings: JoinedStores
    words: FeatureStore
    word: Int[np.ndarray, " E"]
    empty: Float[Tensor, "D"]

    def of(self, datasets: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Numbers of the expressions of some datasets."""
        return np.flatnonzero(np.isin(self.dataset, [DATASETS.index(name) for name in datasets]))

    def with_referents(self, referent: Int[np.ndarray, " E"]) -> "TrainingData":
        """The same data with other referents."""
        return replace(self, labels=self.labels.with_referents(referent))

    def inputs(self, expressions: Int[np.ndarray, " n"]) -> dict[str, Any]:
        """What the generator reads for some expressions: the arguments of its `forward`, by their names."""
        images, image = np.unique(self.labels.image[expressions], return_inverse=True)
        words = self.words[self.word[expressions]]
        return {
            "visual": [features.float() for features in self.patches[images].values()],
            "words": words["words"].float(),
            "mask": words["words mask"],
            "image": torch.from_numpy(image),
            "directions": words["sentence"].float() - self.empty,
        }


def encode(
    clip: Clip,
    segmenter: Segmenter,
    config: GeneratorConfig,
    h: LabelledImages,
    d_sem: LabelledImages,
    d_ref: LabelledImages,
) -> TrainingData:
    """Encode the datasets, as far as the cache does not have them yet.

    Args:
        clip: frozen.
        segmenter: frozen.
        config: says which of CLIP's stages are needed.
        h: H_sem and H_ref: where the referent is UNKNOWN, it is H_ref.
        d_sem: as its name says.
        d_ref: as its name says.
    """
    parts = (h, d_sem, d_ref)
    labels = join([part.labels for part in parts], [len(part.images.keys) for part in parts])
    of_h = np.where(h.labels.referent == UNKNOWN, H_REF, H_SEM)
    dataset = np.concatenate([of_h, np.full(len(d_sem.labels), D_SEM), np.full(len(d_ref.labels), D_REF)])
    unique, word = np.unique(labels.expressions, return_inverse=True)
    return TrainingData(
        labels,
        dataset,
        JoinedStores([open_features(visual_encoder(clip, config), part.images) for part in parts]),
        JoinedStores([open_features(sam_embeddings(segmenter), part.images) for part in parts]),
        open_features(clip_words(clip), texts(unique.tolist())),
        word,
        clip.text_features([""])[0].cpu(),
    )


def start(config: GeneratorConfig, seed: int, data: TrainingData) -> PointGenerator:
    """A generator with the first weights of a seed, whitening what it will be trained on."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = PointGenerator(config)
    images = np.unique(np.linspace(0, len(data.patches) - 1, WHITENED).astype(int))
    for whitening, features in zip(generator.whiten_visual, data.patches[images].values(), strict=True):
        whitening.fit(visual_tokens(features.float()).flatten(0, 1))
    words = data.words[np.unique(np.linspace(0, len(data.words) - 1, 10 * WHITENED).astype(int))]
    generator.whiten_words.fit(words["words"][words["words mask"]].float())
    return generator


class Batches:
    """A share of a batch, as a pure function of its number: images, and some expressions of each.

    All images are drawn equally often, whatever the number of their expressions; so an expression counts like any
    other, unless its image has more than fit in a batch. Into how many shares a batch is cut does not change what is in
    it.

    Args:
        data: encoded.
        expressions: the numbers of those that take part.
        points: M.
        seed: of the choice.
        shares: of a batch, see `Recipe`.

    Raises:
        WrisError: there are more shares than images in a batch.
    """

    def __init__(
        self, data: TrainingData, expressions: Int[np.ndarray, " n"], points: int, seed: int, shares: int = 1
    ) -> None:
        if shares > IMAGES_PER_STEP:
            raise WrisError(
                f"a batch of {IMAGES_PER_STEP} images cannot be cut into {shares} shares; start fewer processes."
            )
        self.data, self.points, self.seed, self.shares = data, points, seed, shares
        image = data.labels.image[expressions]
        order = np.argsort(image, kind="stable")
        _, starts = np.unique(image[order], return_index=True)
        self.by_image = np.split(expressions[order], starts[1:])

    def __call__(self, number: int) -> dict[str, Any]:
        step, share = divmod(number, self.shares)
        rng = np.random.default_rng([self.seed, step])
        chosen = []
        for image in rng.integers(len(self.by_image), size=IMAGES_PER_STEP):
            group = self.by_image[image]
            chosen.append(rng.choice(group, min(len(group), EXPRESSIONS_PER_IMAGE), replace=False))
        expressions = np.concatenate(chosen)
        labels = self.data.labels.draw(expressions, self.points, rng)
        decoded = np.sort(rng.permutation(len(expressions))[:MASKS_PER_STEP])
        place = np.repeat(np.arange(len(chosen)), [len(group) for group in chosen])
        here = place % self.shares == share
        own, own_decoded = np.flatnonzero(here), decoded[here[decoded]]
        return {
            "inputs": self.data.inputs(expressions[own]),
            "labels": {field.name: getattr(labels, field.name)[own] for field in fields(labels)},
            "decoded": torch.from_numpy(np.searchsorted(own, own_decoded)),
            "embeddings": self.data.embeddings[self.data.labels.image[expressions[own_decoded]]]["embedding"].float(),
            # How much each mean over this share counts in the mean over the batch.
            "weights": {
                "expressions": self.shares * len(own) / len(expressions),
                "pairs": self.shares * float(labels.present[own].sum() / labels.present.sum()),
                "decoded": self.shares * len(own_decoded) / len(decoded),
            },
        }


def training_loss(
    segmenter: Segmenter, weights: LossWeights, blend: bool
) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Tensor]]:
    """Eq. 4 for `train.fit`. Masks are decoded of some referents only; the matching goes by points and scores.

    Args:
        segmenter: frozen.
        weights: of the terms; with "dice" and "mask" at 0 SAM is not asked at all.
        blend: see `prompt_sam`.
    """

    def loss(generator: PointGenerator, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        prompts: PointPrompts = generator(**batch["inputs"])
        labels = PseudoLabels(**batch["labels"])
        terms = pair_terms(prompts, labels, weights)
        matches = match(terms, labels.present, weights)
        masks, pairs = None, None
        if (weights.dice or weights.mask) and len(batch["decoded"]):
            referents = labels.scores[matches.expression, matches.label] == 1
            here = (matches.expression[:, None] == batch["decoded"]) & referents[:, None]  # pair × expression
            pairs, rows = here.nonzero(as_tuple=True)
            asked = (matches.expression[pairs], matches.query[pairs])
            masks = _masks(segmenter, prompts, labels, asked, batch["embeddings"][rows], blend)
        means = matched_loss(prompts, labels, terms, matches, weights, masks, generator.config.anchored, pairs)
        if (weights.dice or weights.mask) and masks is None:  # another share has them all; each has the same terms
            means |= dict.fromkeys(("dice", "mask"), prompts.points.new_zeros(()))
        return _of_the_batch(means, batch["weights"], weights)

    return loss


def _of_the_batch(
    means: dict[str, Float[Tensor, ""]], counts: dict[str, float], weights: LossWeights
) -> dict[str, Float[Tensor, ""]]:
    """Means over a share, so that their mean over the shares is that over the batch."""
    over = {"score": "expressions", "dice": "decoded", "mask": "decoded", "points": "pairs", "labels": "pairs"}
    terms = {name: counts[over[name]] * mean for name, mean in means.items() if name != "loss"}
    return {"loss": sum(getattr(weights, name) * term for name, term in terms.items()), **terms}


def _masks(
    segmenter: Segmenter,
    prompts: PointPrompts,
    labels: PseudoLabels,
    asked: tuple[Int[Tensor, "p"], Int[Tensor, "p"]],
    embeddings: Float[Tensor, "p c h w"],
    blend: bool,
) -> Float[Tensor, "p m m"]:
    """SAM's best mask, in low resolution, for some prompts: (expression, query)."""
    points, label_logits, extents = prompts.points[asked], prompts.label_logits[asked], labels.extents[asked[0]]
    return best_logits(prompt_sam(segmenter, embeddings, points, label_logits, extents, blend))
