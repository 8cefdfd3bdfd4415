"""Train the toy SAM: points and boxes to masks of whole objects and of their parts, without any words.

Three masks answer a prompt, and only the best of them is trained (Kirillov et al. 2023, §3); so they share out the
meanings of a point between them. Each also learns to predict its IoU with the answer, which is roughly "how often this
is what was meant" times "how well I cut it out". What is asked, and how often for a part, is in `prompts.py`.

A prompt teaches the image encoder about one object only. So a second, small head draws the outlines of everything in
the picture from the same image embedding; it is thrown away after training.

What an object is, is learnt on small pictures, at less than half the cost of a step. A second, shorter round on larger
ones then learns where exactly it ends. In a third one the image encoder rests, and decoder and prompt encoder learn
what many points mean that are spread over a box, on the object and off it: so PPT asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from wris_lib.backbones.checkpoints import WEIGHTS, record_sha256
from wris_lib.backbones.sam import SamImage, Segmenter, build_toy_sam, decode_prompts
from wris_lib.data.toyworld.pretraining import Pool, checkpoint_folder, pool
from wris_lib.files import atomic_write
from wris_lib.pretrain.prompts import (
    LATE_PART_SHARES,
    MOST_SPREAD,
    PART_SHARES,
    SAMPLERS,
    SMALLEST_OBJECT,
    LabelledImage,
    Prompt,
    outlines,
    tight_box,
)
from wris_lib.train import Recipe, fit

SHARES = 2  # of a step's batch, for as many processes
IMAGES_PER_SHARE = 4
PROMPTS = {"point": 3, "points": 2, "box": 3}  # an image
HELD_OUT = 400  # last images of the pool: never trained on
MEASURED = 150  # of them


@dataclass(frozen=True)
class Round:
    """A part of training.

    Args:
        size: side of SAM's input in pixels.
        steps: of the optimiser.
        learning_rate: its peak.
        prompts: kinds and numbers of questions about an image, see `SAMPLERS`.
        encoder: whether the image encoder learns, too.
    """

    size: int
    steps: int
    learning_rate: float
    prompts: dict[str, int] = field(default_factory=lambda: PROMPTS)
    encoder: bool = True

    def recipe(self) -> Recipe:
        """bf16, measured on one thread with AMX: 0.40 s a step instead of 0.58 s in fp32 at 128 pixels, the first
        losses being equal."""
        warmup = min(200, self.steps // 10)
        return Recipe(
            self.steps, self.learning_rate, warmup=warmup, precision="bf16", checkpoint_every=250, shares=SHARES
        )


ROUNDS = (
    Round(128, 12_000, 1.5e-3),
    Round(192, 6_000, 8e-4),
    Round(192, 2_500, 5e-4, PROMPTS | {"spread": 4}, encoder=False),
)


class SamWithOutlines(nn.Module):
    """SAM, and the head that learns with it: from a token of the image embedding to outlines inside its patch.

    Args:
        sam: upstream's model; low-resolution masks have 4 × 4 cells a token.
    """

    def __init__(self, sam: Sam):
        super().__init__()
        self.sam = sam
        width = sam.prompt_encoder.embed_dim
        self.head = nn.Sequential(nn.Conv2d(width, 256, 1), nn.GELU(), nn.Conv2d(256, 3 * 16, 1), nn.PixelShuffle(4))

    def outlines(self, embeddings: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h4 w4"]:
        """Logits of the three maps of `prompts.outlines`."""
        return self.head(embeddings)


class Batches:
    """A share of a batch, as a pure function of its number: images, outlines, and for each kind of prompt questions.

    Args:
        images: RGB; SAM sees them scaled to its input, as `Segmenter.embed` does.
        labels: of the pool, at the images' size.
        input_size: of SAM, in pixels.
        mask_size: of SAM's low-resolution masks.
        prompts: kinds and numbers of questions about an image.
        late: from this number on parts are asked for more often.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        input_size: int,
        mask_size: int,
        prompts: dict[str, int],
        late: int,
    ):
        self.images, self.labels = images, labels
        self.input_size, self.mask_size, self.prompts, self.late = input_size, mask_size, prompts, late

    def __call__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([0, number])
        part_shares = PART_SHARES if number < self.late else LATE_PART_SHARES
        pictures, maps, prompts = [], [], {kind: [] for kind in self.prompts}
        for i in rng.integers(len(self.images), size=IMAGES_PER_SHARE):
            pixels, labels = np.asarray(self.images[i]), np.asarray(self.labels[i])
            if rng.random() < 0.5:
                pixels, labels = pixels[:, ::-1], np.ascontiguousarray(labels[:, ::-1])
            picture = Image.fromarray(pixels).resize((self.input_size, self.input_size), Image.Resampling.BILINEAR)
            pictures.append(torch.from_numpy(np.array(picture)))
            maps.append(outlines(labels, self.mask_size))
            image = LabelledImage(labels)
            for kind, count in self.prompts.items():
                prompts[kind] += [SAMPLERS[kind](image, part_shares[kind], rng) for _ in range(count)]
        batch: dict[str, Any] = {kind: self._stack(found) for kind, found in prompts.items()}
        return batch | {"images": torch.stack(pictures).permute(0, 3, 1, 2), "outlines": torch.stack(maps)}

    def _stack(self, prompts: list[Prompt]) -> dict[str, Tensor | None]:
        columns = {name: [getattr(prompt, name) for prompt in prompts] for name in ("points", "labels", "box")}
        stacked = {
            name: None if column[0] is None else torch.from_numpy(np.stack(column)) for name, column in columns.items()
        }
        for name in ("points", "box"):
            if stacked[name] is not None:
                stacked[name] = stacked[name] * (self.input_size / prompts[0].mask.shape[1])
        # How much of each low-resolution pixel the mask covers, 0 to 1. A soft target keeps what the decoder's coarse
        # grid would lose: where an outline runs through a pixel.
        masks = torch.from_numpy(np.stack([prompt.mask for prompt in prompts])).float()
        return stacked | {"coverage": adaptive_avg_pool2d(masks, self.mask_size)}


def grow(sam: Sam, size: int) -> Sam:
    """The same weights for a larger input; position embeddings are resized, which is all that depends on its size."""
    grown, state = build_toy_sam(size), dict(sam.state_dict())
    name = "image_encoder.pos_embed"  # [1, h, w, C]
    side = grown.image_encoder.pos_embed.shape[1]
    positions = interpolate(state[name].permute(0, 3, 1, 2), (side, side), mode="bicubic")
    grown.load_state_dict(state | {name: positions.permute(0, 2, 3, 1)})
    return grown


def mask_loss(logits: Float[Tensor, "p m h w"], target: Float[Tensor, "p 1 h w"]) -> Float[Tensor, "p m"]:
    """20 · focal loss (Lin et al. 2017) + Dice loss (Milletari et al. 2016), as in SAM, for soft targets."""
    target = target.expand_as(logits)
    probability = logits.sigmoid()
    focal = (probability - target).square() * cross_entropy(logits, target, reduction="none")
    overlap = (2 * probability * target).sum((-2, -1))
    dice = 1 - (overlap + 1) / ((probability.square() + target.square()).sum((-2, -1)) + 1)
    return 20 * focal.mean((-2, -1)) + dice


def mask_iou(first: Bool[Tensor, "*#p h w"], second: Bool[Tensor, "*#p h w"]) -> Float[Tensor, "*p"]:
    """IoU of masks; two empty ones count as 1."""
    union = (first | second).sum((-2, -1))
    return torch.where(union > 0, (first & second).sum((-2, -1)) / union.clamp(min=1), 1.0)


def loss(model: SamWithOutlines, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
    """SAM's loss over all prompts of a batch, and that of the outlines; the "…_iou" are best-of-three."""
    sam = model.sam
    embeddings = sam.image_encoder(sam.preprocess(batch["images"]))
    terms: dict[str, Tensor] = {}
    total = embeddings.new_zeros(())
    if embeddings.requires_grad:  # otherwise there is nothing to be learnt from the outlines
        total = cross_entropy(model.outlines(embeddings).float(), batch["outlines"])
        terms["outlines"] = total.detach()
    kinds = [kind for kind in SAMPLERS if kind in batch]
    asked = sum(len(batch[kind]["coverage"]) for kind in kinds)
    for kind in kinds:
        prompts = batch[kind]
        share = len(prompts["coverage"]) // len(embeddings)
        rows = embeddings.repeat_interleave(share, dim=0)
        logits, predicted = decode_prompts(sam, rows, prompts["points"], prompts["labels"], prompts["box"])
        logits, target = logits.float(), prompts["coverage"][:, None]
        losses = mask_loss(logits, target)
        kind_loss = losses[:, 1:].min(dim=1).values.mean()
        if kind != "point":  # upstream's single mask is for unambiguous prompts only
            kind_loss = kind_loss + losses[:, 0].mean()
        with torch.no_grad():
            iou = mask_iou(logits > 0, target > 0.5)
        error = (predicted.float() - iou)[:, int(kind == "point") :].square().mean()
        total = total + (kind_loss + error) * len(prompts["coverage"]) / asked
        terms[f"{kind}_iou"] = iou[:, 1:].max(dim=1).values.mean()
        terms[f"{kind}_error"] = error.detach()
    return {"loss": total} | terms


@torch.no_grad()
def measure(
    segmenter: Segmenter,
    images: UInt8[np.ndarray, "n height width 3"],
    labels: UInt8[np.ndarray, "n height width"],
) -> dict[str, float]:
    """The model card's figures, in percent, at the images' own size: one draw of points for every object and part."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[Tensor]] = {}
    for pixels, numbers in zip(images, labels, strict=True):
        image = LabelledImage(np.asarray(numbers))
        asked = [(parts, whole) for whole in image.objects.values() for parts in _answers(image, whole)]
        if not asked:
            continue
        embedded = segmenter.embed(Image.fromarray(np.asarray(pixels)))
        masks = torch.from_numpy(np.stack([image.mask(parts) for parts, _ in asked]))
        wholes = torch.from_numpy(np.stack([image.mask(whole) for _, whole in asked]))
        is_whole = torch.tensor([parts is whole for parts, whole in asked])
        boxes = torch.from_numpy(np.stack([tight_box(mask) for mask in masks.numpy()]))
        points = torch.from_numpy(np.stack([image.points(rng.choice(image.inside(parts), 3)) for parts, _ in asked]))
        ones = torch.ones(points.shape[:2], dtype=torch.int64)
        found = {
            "1 point": _masks(segmenter, embedded, points=points[:, :1], labels=ones[:, :1]),
            "3 points": _masks(segmenter, embedded, points=points, labels=ones),
            "true box": _masks(segmenter, embedded, boxes=boxes),
        }
        for name, chosen in (("whole", is_whole), ("part", ~is_whole)):
            for prompt, three in found.items():
                iou = mask_iou(three, masks[:, None])[chosen]
                rows.setdefault(f"{name}, {prompt}", []).append(iou[:, 0])
                rows.setdefault(f"{name}, {prompt}, best of three", []).append(iou.amax(dim=1))
        answer = found["1 point"][~is_whole, 0]
        part, whole = mask_iou(answer, masks[~is_whole]), mask_iou(answer, wholes[~is_whole])
        rows.setdefault("1 point on a part gives the part", []).append((part >= 0.5) & (part > whole))
        rows.setdefault("1 point on a part gives the whole", []).append((whole >= 0.5) & (whole >= part))
    return {name: 100 * torch.cat(values).float().mean().item() for name, values in rows.items()}


def _masks(segmenter: Segmenter, image: SamImage, **prompts: Tensor) -> Bool[Tensor, "p 3 height width"]:
    """The three masks of each prompt, best predicted IoU first."""
    decoded = segmenter.decode(image, **prompts)
    order = decoded.iou.argsort(dim=1, descending=True).cpu()
    masks = torch.from_numpy(segmenter.masks(image, decoded))
    return masks[torch.arange(len(order))[:, None], order]


def _answers(image: LabelledImage, whole: list[int]) -> list[list[int]]:
    """Everything that can be asked for of an object: itself and its parts."""
    return [whole, *([label] for label in whole if image.is_part(label))]


def export(sam: Sam, folder: Path, card: str) -> None:
    """Write `sam.safetensors` (half precision), its hash, and the model card `sam.md`."""
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in sam.state_dict().items()}
    with atomic_write(folder / "sam.safetensors") as file:
        file.write(save(state))
    record_sha256(folder / "sam.safetensors")
    with atomic_write(folder / "sam.md", "w") as file:
        file.write(card)


def model_card(sam: Sam, rounds: Sequence[Round], minutes: float, figures: dict[str, dict[str, float]]) -> str:
    """The model card, in Markdown.

    Args:
        sam: trained.
        rounds: that it went through.
        minutes: that training took.
        figures: of `measure`, by the kind of image.
    """
    parameters = sum(p.numel() for p in sam.parameters()) / 1e6
    processes = PartialState().num_processes
    device = f"CPU, {torch.get_num_threads()} thread(s) in each of {processes} process(es)"
    if sam.device.type == "cuda":
        device = f"{processes} × {torch.cuda.get_device_name(sam.device)}"
    side, masks = sam.image_encoder.img_size, sam.prompt_encoder.mask_input_size[0]
    resting = ".\n   The image encoder does not learn any more"
    recipe = "\n".join(
        f"{number}. {this.steps} steps at {this.size}×{this.size} pixels, peak {this.learning_rate:g}; of an image"
        f" {sum(this.prompts.values())} questions ({', '.join(f'{n} {kind}' for kind, n in this.prompts.items())})"
        f"{'' if this.encoder else resting}."
        for number, this in enumerate(rounds, start=1)
    )
    rows = [
        " | ".join([name, *(f"{column[name]:.1f}" for column in figures.values())])
        for name in next(iter(figures.values()))
    ]
    table = "\n".join(f"| {row} |" for row in rows)
    return f"""# Toy SAM

segment_anything's `Sam` with a small configuration (`wris_lib/backbones/sam.py`): {parameters:.1f} million parameters,
{side}×{side} pixels in, masks of {masks}×{masks} out. It knows the toy world and nothing else.

**Data.** The pool `sam` of the toy world: images with masks of whole objects and their parts, without classes and
without words. {HELD_OUT} images are held out for the figures below.

**Recipe.** `python -m wris_lib pretrain sam`, {SHARES * IMAGES_PER_SHARE} images a step, bf16, AdamW, a learning rate
that follows a cosine in every round:

{recipe}

The loss: focal and Dice loss of the best of three masks, the squared error of the predicted IoU, and, as long as the
encoder learns, through a head that is not kept, the outlines of everything in the picture. One point on a part asks for
the part in {PART_SHARES["point"]:.0%} of cases, from the middle of the first round on in
{LATE_PART_SHARES["point"]:.0%}; several points in {PART_SHARES["points"]:.0%} and {LATE_PART_SHARES["points"]:.0%}: the
ambiguity is meant. "spread" are up to {MOST_SPREAD} points, uniform in the answer's box, and positive where they are
on it.

**Made.** {date.today().isoformat()}, {minutes:.0f} minutes on {device}; torch {torch.__version__}.

**Figures.** Mean IoU in percent, at the pictures' 256×256 pixels, of the mask with the best predicted IoU, over all
objects and parts of at least {SMALLEST_OBJECT} pixels in {MEASURED} held-out images. Points are drawn at random. The
last two rows are shares of points.

| what is asked | {" | ".join(figures)} |
|---|{"---|" * len(figures)}
{table}
"""


def main(steps: int | None = None, folder: Path | None = None, device: str | torch.device | None = None) -> None:
    """Train the toy SAM, measure it, and write its weights and model card; run again, it continues.

    Args:
        steps: of every round, for a trial, which leaves everything in `folder`. None: `ROUNDS`, and the weights are
            written into the package.
        folder: for the checkpoints; None: in the cache.
        device: None: CUDA when there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(folder or checkpoint_folder("sam"))
    rounds = [replace(r, steps=steps or r.steps) for r in ROUNDS]
    data = pool("sam")
    torch.manual_seed(0)
    sam, seconds = build_toy_sam(rounds[0].size), 0.0
    for number, this in enumerate(rounds):
        if number:
            sam = grow(sam, this.size)
        late = this.steps // 2 * SHARES if number == 0 else 0
        sam.image_encoder.requires_grad_(this.encoder)
        mask_size = sam.prompt_encoder.mask_input_size[0]
        pictures, labels = data.images[:-HELD_OUT], data.labels[:-HELD_OUT]
        batches = Batches(pictures, labels, this.size, mask_size, this.prompts, late)
        log = fit(SamWithOutlines(sam), loss, batches, this.recipe(), folder / f"round {number + 1}", device)
        seconds += sum(row["seconds"] for row in log)
    if not PartialState().is_main_process:
        return
    card = model_card(sam, rounds, seconds / 60, measure_held_out(sam, data))
    export(sam, folder if steps else WEIGHTS, card)
    print(card)


def measure_held_out(sam: Sam, data: Pool) -> dict[str, dict[str, float]]:
    """`measure` on images that were never trained on, apart for those with one object and those with several."""
    held_out = range(len(data.images) - HELD_OUT, len(data.images) - HELD_OUT + MEASURED)
    alone = {i for i in held_out if len(LabelledImage(np.asarray(data.labels[i])).objects) == 1}
    columns = {"object-centric": sorted(alone), "scenes": sorted(set(held_out) - alone)}
    segmenter = Segmenter(sam)
    return {name: measure(segmenter, data.images[rows], data.labels[rows]) for name, rows in columns.items()}
