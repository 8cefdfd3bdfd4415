"""How the toy CLIP is made: from scratch, on pictures and captions of the toy world.

CLIP learns from pairs alone. In a batch, every image shall pick its captions among all captions, and every caption its
images among all images (Radford et al. 2021, arXiv 2103.00020). A small world needs one change: "a red car" is true of
many images, so each caption of an image counts as right for this image wherever in the batch it comes from.

Images are never mirrored, for captions say left and right.

There are two rounds. The first sees small pictures, and many of them. In scenes many an object is then no larger than a
patch or two; the second round sees larger pictures, with more captions each.
"""

import gzip
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import open_clip
import regex
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from open_clip.model import resize_pos_embed
from open_clip.tokenizer import bytes_to_unicode
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wris_lib.backbones.checkpoints import STACKS, WEIGHTS, record_sha256
from wris_lib.backbones.clip import BPE, create_clip, encode_tokens, normalise
from wris_lib.data.toyworld import wording
from wris_lib.data.toyworld.pretraining import POOLS, Pool, checkpoint_folder, pool
from wris_lib.files import atomic_write
from wris_lib.train import Recipe, fit

BATCH = 128  # images
HELD_OUT = 256  # images of either half of a pool that are never trained on
SHIFT = 3 / 64  # of an image's side: images are moved at random by up to this much


@dataclass(frozen=True)
class Round:
    """A part of training.

    Args:
        pool: of the toy world; its images' size is that of CLIP's input.
        steps: of the optimiser.
        learning_rate: its peak.
        captions: that an image brings into a batch.
    """

    pool: str
    steps: int
    learning_rate: float
    captions: int

    def recipe(self) -> Recipe:
        """AdamW with a cosine, in bfloat16."""
        warmup = min(300, self.steps // 10)
        return Recipe(self.steps, self.learning_rate, weight_decay=0.05, warmup=warmup, precision="bf16")


ROUNDS = (Round("clip", 2400, 1e-3, 2), Round("clip-fine", 2400, 7e-4, 4))


class Batches:
    """Training batches of a pool, as a pure function of the step.

    Args:
        data: a CLIP pool whose first half is object-centric and whose second half is scenes.
        tokenizer: open_clip's.
        held_out: images at the end of either half to leave out.
        each: captions that an image brings.
        seed: of the choice of images, captions and shifts.
    """

    def __init__(
        self, data: Pool, tokenizer: open_clip.SimpleTokenizer, held_out: int, each: int = 2, seed: int = 0
    ) -> None:
        self.images, self.each = data.images, each
        texts = sorted({text for captions in data.captions for text in captions})
        number = {text: i for i, text in enumerate(texts)}
        self.tokens = tokenizer(texts)
        most = max(len(captions) for captions in data.captions)
        self.captions = np.full((len(data.captions), most), -1)  # each image's, padded by -1
        for i, captions in enumerate(data.captions):
            self.captions[i, : len(captions)] = [number[text] for text in captions]
        n = len(data.images)
        self.objects, self.scenes = np.arange(n // 2 - held_out, n // 2), np.arange(n - held_out, n)
        self.trained = np.setdiff1d(np.arange(n), np.concatenate([self.objects, self.scenes]))
        self.seed = seed

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Images, the tokens of some captions of each, and which caption is right for which image."""
        rng = np.random.default_rng((self.seed, step))
        chosen = np.sort(rng.choice(self.trained, min(BATCH, len(self.trained)), replace=False))
        most = round(SHIFT * self.images.shape[1])
        shifts = rng.integers(-most, most + 1, (len(chosen), 2)).tolist()
        images = np.stack([_shifted(self.images[i], *by) for i, by in zip(chosen, shifts, strict=True)])
        return {"images": torch.from_numpy(images), **self._texts(chosen, rng, self.each)}

    def held_out(self, which: Int[np.ndarray, "n"]) -> dict[str, Tensor]:
        """Held-out images with one caption each, always the same."""
        rng = np.random.default_rng(self.seed)
        return {"images": torch.from_numpy(self.images[which]), **self._texts(which, rng, 1)}

    def _texts(self, chosen: Int[np.ndarray, "n"], rng: np.random.Generator, each: int) -> dict[str, Tensor]:
        known = self.captions[chosen]
        order = np.where(known >= 0, rng.random(known.shape), 2).argsort(axis=1)  # padding comes last
        picked = np.take_along_axis(known, order[:, :each], axis=1).ravel()
        right = (known[:, None, :] == picked[None, :, None]).any(axis=2)
        return {"tokens": self.tokens[picked], "right": torch.from_numpy(right)}


def _shifted(image: UInt8[np.ndarray, "H W 3"], down: int, right: int) -> UInt8[np.ndarray, "H W 3"]:
    """What is seen when the window moves by so many pixels; beyond the border its pixels are repeated."""
    height, width, _ = image.shape
    rows, columns = np.arange(height) + down, np.arange(width) + right
    return image[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]


def contrastive_loss(model: open_clip.CLIP, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """CLIP's symmetric loss, where one image may have several right captions and the other way round.

    Args:
        batch: "images" uint8 [B, H, W, 3], "tokens" [T, L], "right" bool [B, T].
    """
    # On a CPU the fused attention's backward pass takes longer than all else together.
    with sdpa_kernel(SDPBackend.MATH):
        logits = scores(model, batch["images"], batch["tokens"])
    right = batch["right"].float()
    per_image = F.cross_entropy(logits, right / right.sum(dim=1, keepdim=True))
    per_text = F.cross_entropy(logits.T, right.T / right.T.sum(dim=1, keepdim=True))
    found = batch["right"].gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()
    return {"loss": (per_image + per_text) / 2, "found": found}


def scores(model: open_clip.CLIP, images: UInt8[Tensor, "B H W 3"], tokens: Int[Tensor, "T L"]) -> Float[Tensor, "B T"]:
    """Cosines of every image with every text, times the model's learnt scale (at most 100, as OpenAI's)."""
    pixels = normalise(images.permute(0, 3, 1, 2).float() / 255)
    image = F.normalize(model.encode_image(pixels).float(), dim=-1)
    text = F.normalize(encode_tokens(model, tokens)[1].float(), dim=-1)
    return model.logit_scale.clamp(max=np.log(100)).exp() * image @ text.T


@torch.no_grad()
def recall(model: open_clip.CLIP, batch: dict[str, Tensor]) -> float:
    """Percentage of images whose best text is a right one (R@1)."""
    model.eval()
    device = model.logit_scale.device
    best = scores(model, batch["images"].to(device), batch["tokens"].to(device)).argmax(dim=1).cpu()
    return 100 * batch["right"].gather(1, best[:, None]).float().mean().item()


def main(steps: int | None = None, folder: Path | None = None, device: str | torch.device | None = None) -> None:
    """Train the toy CLIP and write its weights, tokenizer and model card; run again, it continues.

    Args:
        steps: of every round, for a trial, which leaves everything in `folder`. None: `ROUNDS`, and the weights are
            written into the package.
        folder: for the checkpoints; None: in the cache.
        device: None: CUDA when there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(folder or checkpoint_folder("clip"))
    rounds = [replace(r, steps=steps or r.steps) for r in ROUNDS]
    target = folder if steps else WEIGHTS
    toy = STACKS["toy"].clip
    bpe = folder / BPE.name
    if not bpe.is_file():  # a resumed run keeps its tokens, whatever words the grammar has learnt since
        write_bpe(wording.vocabulary(), bpe)
    model, seconds = None, 0.0
    for number, this in enumerate(rounds):
        data = pool(this.pool)
        earlier = model
        model, tokenizer = create_clip(toy.model_name, seed=0, bpe=bpe, image_size=data.images.shape[1])
        if earlier is not None:
            grow(earlier, model)
        batches = Batches(data, tokenizer, HELD_OUT, this.captions, seed=number)
        log = fit(model, contrastive_loss, batches, this.recipe(), folder / f"round {number + 1}", device)
        seconds += sum(row["seconds"] for row in log)
    figures = {
        "object-centric": recall(model, batches.held_out(batches.objects)),
        "scenes": recall(model, batches.held_out(batches.scenes)),
    }
    export(model, target / toy.file)
    merges = bpe.read_bytes()
    with atomic_write(target / BPE.name) as file:
        file.write(merges)
    card = model_card(model, rounds, log, seconds / 60, figures, device)
    with atomic_write(target / "clip.md", "w") as file:
        file.write(card)
    print(card)


@torch.no_grad()
def grow(small: open_clip.CLIP, large: open_clip.CLIP) -> None:
    """Copy a model's weights into one for larger images: position embeddings are interpolated."""
    state = small.state_dict()
    resize_pos_embed(state, large)
    large.load_state_dict(state)


def export(model: nn.Module, path: Path) -> None:
    """Write weights as float16 safetensors, whole numbers as they are, and record the file's hash."""
    state = {
        name: (value.detach().half() if value.is_floating_point() else value).contiguous().cpu()
        for name, value in model.state_dict().items()
    }
    with atomic_write(path) as file:
        file.write(save(state))
    record_sha256(path)


def write_bpe(words: Iterable[str], path: Path) -> None:
    """Write the merges of a byte-pair encoding in which each of `words` is one token, for open_clip's tokenizer.

    Any other text is spelt with smaller pieces, in the end single bytes.
    """
    pieces = regex.compile(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    letters = bytes_to_unicode()
    spelt = set()
    for piece in {piece for word in words for piece in pieces.findall(word.lower())}:
        symbols = [letters[byte] for byte in piece.encode()]
        spelt.add((*symbols[:-1], symbols[-1] + "</w>"))
    merges = []
    while pairs := Counter(pair for word in spelt for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # the most frequent, ties by the alphabet
        merges.append(best)
        spelt = {_merged(word, best) for word in spelt}
    text = "\n".join(["#version: toy world", *(" ".join(pair) for pair in merges)])
    with atomic_write(path) as file:
        file.write(gzip.compress(text.encode(), mtime=0))


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result, i = [], 0
    while i < len(word):
        here = word[i : i + 2] == pair
        result.append("".join(pair) if here else word[i])
        i += 2 if here else 1
    return tuple(result)


def model_card(
    model: open_clip.CLIP,
    rounds: list[Round],
    log: list[dict[str, int | float]],
    minutes: float,
    figures: dict[str, float],
    device: torch.device,
) -> str:
    """The model card, in Markdown.

    Args:
        model: trained.
        rounds: of the training.
        log: of the last round.
        minutes: that they took.
        figures: R@1 in percent, by the half of the pool.
        device: trained on.
    """
    vision = model.visual
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    threads = torch.get_num_threads()
    where = f"CPU, {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    last = log[-100:]
    table = "\n".join(f"| {name} | {value:.1f} |" for name, value in figures.items())
    recipes = "\n".join(
        f"| {number} | `{r.pool}`: {POOLS[r.pool][0] - 2 * HELD_OUT} images, {POOLS[r.pool][1]} px | {r.steps} |"
        f" {r.captions} | {r.learning_rate:g} |"
        for number, r in enumerate(rounds, start=1)
    )
    return f"""# Toy CLIP

open_clip's `CLIP` with a small configuration (`wris_lib/backbones/configs/wris-toy.json`): {parameters:.1f} million
parameters; images of {vision.image_size[0]}×{vision.image_size[1]} pixels in patches of {vision.patch_size[0]}, \
texts of up to {model.context_length} tokens. It knows the toy world and nothing else.

**Data.** Pools of the toy world, half object-centric images and half scenes, with several true captions each; no boxes,
no masks. {2 * HELD_OUT} more of each are held out. The tokenizer is open_clip's, with merges that make every word of
the toy world one token; other text is spelt in smaller pieces.

**Recipe.** `python -m wris_lib pretrain clip`: steps of {BATCH} images; symmetric contrastive loss, every caption of an
image counting as right for it; AdamW with a cosine after a warm-up, weight decay {rounds[0].recipe().weight_decay:g},
{rounds[0].recipe().precision}; images moved by up to {100 * SHIFT:.1f} % of their side, never mirrored.

| round | pool | steps | captions an image | learning rate |
|---|---|---|---|---|
{recipes}

**Made.** {date.today().isoformat()}, {minutes:.0f} minutes on {where}; torch {torch.__version__.split("+")[0]}, \
open_clip {open_clip.__version__}. Mean loss of the last {len(last)} steps
{sum(row["loss"] for row in last) / len(last):.2f}.

**Figures.** Share of held-out images whose best caption among {HELD_OUT}, one an image, is right (R@1).

| images | % |
|---|---|
{table}
"""
