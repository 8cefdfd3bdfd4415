"""What PCNet is trained on, encoded once, and the loss of a batch of it.

Pairs of image and sentence, and which sentences of an image are about the same thing. No mask, box or point: the
proposals, which L_RaS needs, are what SAM finds in any image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import Rows, open_features
from wris_lib.backbones.features import clip_words, image_files, texts
from wris_lib.backbones.language import Parser
from wris_lib.backbones.llm import Llm
from wris_lib.backbones.sam import Segmenter
from wris_lib.data.refer import Expression
from wris_lib.errors import WrisError
from wris_lib.methods.pcnet.crm import Crm, response_maps
from wris_lib.methods.pcnet.decompose import decompose
from wris_lib.methods.pcnet.loss import (
    ambiguity,
    classification,
    disambiguation,
    disambiguation_as_written,
    region_shrinking,
    region_shrinking_as_written,
)
from wris_lib.methods.pcnet.proposals import proposal_encoder
from wris_lib.methods.pcnet.vision import see_all
from wris_lib.train import Recipe

IMAGES_PER_STEP = 36  # as in the paper


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        steps: how many.
        learning_rate: the peak.
        seed: of everything drawn.
        region_shrinking: weight of L_RaS.
        disambiguation: weight of L_IaD. L_cls is a mean over the batch's sentences, of which one is right; so weights
            of 1/36 are what equal weights, as the paper has them, are for a single sentence.
        others: N_d, sentences about other things in the image for L_IaD.
        as_written: take L_RaS and L_IaD as the paper writes them.
        images: of a step, each with a sentence.
    """

    steps: int = 300
    learning_rate: float = 5e-4
    seed: int = 0
    region_shrinking: float = 1 / IMAGES_PER_STEP
    disambiguation: float = 1 / IMAGES_PER_STEP
    others: int = 1
    as_written: bool = False
    images: int = IMAGES_PER_STEP

    @property
    def recipe(self) -> Recipe:
        """For `train.fit`."""
        return Recipe(self.steps, self.learning_rate, warmup=min(50, self.steps // 4), seed=self.seed, precision="bf16")


@dataclass(frozen=True)
class TrainingData:
    """All expressions of all images, with features.

    Attributes:
        visual: of `see_all`, for each image.
        proposals: of each image, on the grid of `visual`; None: nobody asked for them.
        texts: CLIP's directions of all sentences and cues.
        sentence: of each expression its row in `texts`.
        cues: of each expression the rows of its K cues.
        image: of each expression.
        referent: of each expression a number that it shares with the others about the same thing.
    """

    visual: Float[Tensor, "I n C"]
    proposals: list[Bool[Tensor, "_ n"]] | None
    texts: Float[Tensor, "U C"]
    sentence: Int[np.ndarray, " E"]
    cues: Int[np.ndarray, "E K"]
    image: Int[np.ndarray, " E"]
    referent: Int[np.ndarray, " E"]


def encode(
    stack: str,
    clip: Clip,
    segmenter: Segmenter | None,
    llm: Llm,
    parser: Parser,
    splits: Sequence[Sequence[Expression]],
) -> TrainingData:
    """Encode expressions and images, as far as the cache does not have them yet.

    Args:
        stack: "toy" or "paper".
        clip: frozen.
        segmenter: for proposals; None: without.
        llm: takes sentences apart.
        parser: for `decompose`.
        splits: images with expressions; each split's images are kept by themselves, so that others can use them, too.
    """
    items = [item for split in splits for item in split]
    place: dict[Path, int] = {}
    visual, proposals = [], []
    for split in splits:
        paths = [path for path in dict.fromkeys(item.image_path for item in split) if path not in place]
        place |= {path: number for number, path in enumerate(paths, start=len(place))}
        if paths:
            images = image_files(paths)
            visual.append(see_all(clip, images))
            if segmenter:
                proposals += _propose(stack, segmenter, images, visual[-1].shape[1])
    sentences = [item.expression for item in items]
    cues = [each.phrases for each in decompose(sentences, llm, parser)]
    unique = sorted({*sentences, *(phrase for phrases in cues for phrase in phrases)})
    row = {text: number for number, text in enumerate(unique)}
    referents = {about: n for n, about in enumerate(dict.fromkeys((item.image_path, item.ref_id) for item in items))}
    return TrainingData(
        torch.cat(visual),
        proposals if segmenter else None,
        _directions(clip, unique),
        np.array([row[text] for text in sentences]),
        np.array([[row[phrase] for phrase in phrases] for phrases in cues]),
        np.array([place[item.image_path] for item in items]),
        np.array([referents[item.image_path, item.ref_id] for item in items]),
    )


def _propose(stack: str, segmenter: Segmenter, images: Rows, cells: int) -> list[Bool[Tensor, "_ n"]]:
    side = round(cells**0.5)
    store = open_features(proposal_encoder(segmenter, side, side, stack), images)
    return [store[[row]]["proposals"][0] for row in range(len(store))]


def _directions(clip: Clip, unique: Sequence[str]) -> Float[Tensor, "U C"]:
    """`Clip.directions`, from the cache."""
    store = open_features(clip_words(clip), texts(unique))
    sentences = [store[np.arange(n, min(n + 1024, len(store)))]["sentence"] for n in range(0, len(store), 1024)]
    return torch.cat(sentences).float() - clip.text_features([""])[0].cpu()


class Batches:
    """A batch as a pure function of its number: different images, and a sentence of each.

    Args:
        data: encoded.
        stages: cues that are needed.
        others: N_d, 0 for none.
        seed: of the choice.
        proposals: whether they are needed.
        size: images.

    Raises:
        WrisError: there are fewer images than a batch needs, or a batch has only one.
    """

    def __init__(
        self,
        data: TrainingData,
        stages: int,
        others: int,
        seed: int,
        proposals: bool,
        size: int = IMAGES_PER_STEP,
    ) -> None:
        order = np.argsort(data.image, kind="stable")
        _, starts = np.unique(data.image[order], return_index=True)
        self.by_image = np.split(order, starts[1:])
        if not 2 <= size <= len(self.by_image):
            raise WrisError(
                f"a batch of {size} images cannot be drawn from {len(self.by_image)}: it needs at least two, so that"
                " there are wrong sentences, and no more than there are."
            )
        self.data, self.stages, self.others, self.seed, self.size = data, stages, others, seed, size
        self.proposals = proposals

    def __call__(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.by_image), self.size, replace=False)
        own = np.array([rng.choice(self.by_image[image]) for image in chosen])
        batch = self._texts(own) | {"visual": self.data.visual[self.data.image[own]].float()}
        if self.others:
            batch["others"] = self._others(own, chosen, rng)
        if self.proposals:
            every = [self.data.proposals[image] for image in self.data.image[own]]
            most = max(1, *map(len, every))
            batch["proposals"] = torch.stack([nn.functional.pad(p, (0, 0, 0, most - len(p))) for p in every])
            batch["present"] = torch.arange(most) < torch.tensor([len(p) for p in every])[:, None]
        return batch

    def _texts(self, expressions: Int[np.ndarray, "*b"]) -> dict[str, Any]:
        """Sentences, and the cues of every stage."""
        cues = [self.data.texts[self.data.cues[expressions][..., stage]] for stage in range(self.stages)]
        return {"sentences": self.data.texts[self.data.sentence[expressions]], "cues": cues}

    def _others(
        self, own: Int[np.ndarray, " B"], chosen: Int[np.ndarray, " B"], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Of the images with several referents: N_d sentences about another one, with repetition where there are too
        few."""
        places, found = [], []
        for place, (expression, image) in enumerate(zip(own, chosen, strict=True)):
            group = self.by_image[image]
            group = group[self.data.referent[group] != self.data.referent[expression]]
            if len(group):
                places.append(place)
                found.append(rng.choice(group, self.others, replace=len(group) < self.others))
        drawn = np.array(found, dtype=int).reshape(-1, self.others)
        return self._texts(drawn) | {"places": torch.tensor(places, dtype=torch.int64)}


def training_loss(training: Training) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Tensor]]:
    """L = L_cls + weights · (L_RaS, L_IaD) for `train.fit`: L_cls and L_IaD are means over the stages."""

    shrink = region_shrinking_as_written if training.as_written else region_shrinking
    separate = disambiguation_as_written if training.as_written else disambiguation

    def loss(crm: Crm, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        visual = batch["visual"]
        images = len(visual)
        sentences, *cues = (
            texts.expand(images, -1, -1) for texts in (batch["sentences"], *batch["cues"])
        )  # every image meets every sentence
        maps = [each.float() for each in crm(visual, sentences, cues)]
        own = [each.diagonal().T for each in maps]
        terms = {"cls": torch.stack([classification(each) for each in maps]).mean()}
        total = terms["cls"]
        if training.region_shrinking:
            proposals, present = batch["proposals"], batch["present"]
            terms["ras"] = shrink([ambiguity(response_maps(each), proposals, present) for each in own])
            total = total + training.region_shrinking * terms["ras"]
        if training.disambiguation:
            others = batch["others"]
            places = others["places"]
            answers = crm(visual[places], others["sentences"], others["cues"])
            pairs = zip(own, answers, strict=True)
            terms["iad"] = torch.stack([separate(a[places], d.float()) for a, d in pairs]).mean()
            total = total + training.disambiguation * terms["iad"]
        return {"loss": total, **terms}

    return loss
