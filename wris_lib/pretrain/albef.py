"""How the toy ALBEF is made, on pictures of the toy world with true and untrue sentences.

ALBEF learns three things from pairs (Li et al. 2021, arXiv 2107.07651): to bring image and sentence together as
vectors (contrastive, ITC), to tell whether a sentence belongs to an image (matching, ITM), and to guess hidden words
(MLM). Four things are otherwise here:

- The image encoder begins as the first blocks of the toy CLIP's, the authors' as DeiT's. In a first round it stays as
  it is, and what it sees is computed once: a step takes half the time, and words learn to look. In a second round it
  goes on learning with them, for CLIP hardly sees small things.
- Sentences that do not belong are, for the authors, those of other images in the batch, preferably of those that look
  alike. In a small world such a sentence is often true by chance, and a matcher punished for seeing this learns
  nothing. Here they are at first another image's, drawn without preference, and later more and more often sentences
  that differ from a true one in one place and are known to be untrue.
- Some of the patches, drawn anew in each step, are not shown, so that a sentence is not recognised by one of them; and
  one reading with hidden words serves both matching and guessing.
- There are no momentum models and no queues, which make up for noisy captions of the web.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertTokenizerFast

from wris_lib.backbones.checkpoints import TOY_ITM, WEIGHTS, record_sha256
from wris_lib.backbones.clip import Clip, load_clip, normalise, resize_positions
from wris_lib.backbones.feature_store import Encoder, FeatureStore, Rows, open_features
from wris_lib.backbones.features import fingerprint
from wris_lib.backbones.itm import SIZES, Albef
from wris_lib.data.toyworld import wording
from wris_lib.data.toyworld.pretraining import POOLS, Pool, pool
from wris_lib.files import atomic_write, cache_dir
from wris_lib.methods.iterprime.words import PREFIX
from wris_lib.pretrain.clip import export
from wris_lib.train import Recipe, fit

BATCH = 24  # images
PAIRS = 3  # of a true and another sentence, for each image
HELD_OUT = 256  # images at the end of the pool that are never trained on
GUESSED = 0.2  # share of all words that are hidden; those of true sentences are to be guessed
IGNORED = -100  # label of what is not to be guessed
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # the first tokens, in BERT's order of use


@dataclass(frozen=True)
class Round:
    """A part of training.

    Args:
        steps: of the optimiser.
        learning_rate: its peak.
        frozen: the image encoder stays as it is.
        shown: share of the patches that are shown.
        foreign: share of the false sentences that are another image's, in the first step and behind the last.
    """

    steps: int
    learning_rate: float
    frozen: bool
    shown: float
    foreign: tuple[float, float]

    def recipe(self) -> Recipe:
        """AdamW with a cosine."""
        warmup = min(400, self.steps // 10)
        return Recipe(self.steps, self.learning_rate, weight_decay=0.05, warmup=warmup, checkpoint_every=250)


ROUNDS = (
    Round(3000, 3e-4, frozen=True, shown=0.5, foreign=(1.0, 0.5)),
    Round(8000, 3e-4, frozen=False, shown=0.5, foreign=(0.5, 0.3)),
)


class Batches:
    """Batches of images with sentences, as a pure function of the step.

    Args:
        data: ALBEF's pool.
        tokenizer: the model's.
        this: the round.
        held_out: images at the end to leave out.
        pairs: of true and untrue sentences that an image brings; those with fewer are left out.
        patches: of the images, as `encode` has them, to be given in their place.
        seed: of every choice.
    """

    def __init__(
        self,
        data: Pool,
        tokenizer: BertTokenizerFast,
        this: Round,
        held_out: int,
        patches: FeatureStore | None = None,
        pairs: int = PAIRS,
        seed: int = 0,
    ) -> None:
        self.data, self.tokenizer, self.round = data, tokenizer, this
        self.patches, self.pairs, self.seed = patches, pairs, seed
        rich = np.array([i for i, sentences in enumerate(data.captions) if len(sentences) >= pairs])
        first = len(data.images) - held_out
        self.trained, self.tested = rich[rich < first], rich[rich >= first]

    def __call__(self, step: int) -> dict[str, Tensor]:
        """BATCH images, their sentences (of each image first the true ones), and what is to be guessed in them."""
        rng = np.random.default_rng((self.seed, step))
        chosen = np.sort(rng.choice(self.trained, min(BATCH, len(self.trained)), replace=False))
        first, last = self.round.foreign
        batch = self.take(chosen, rng, first + (last - first) * step / self.round.steps)
        ids = batch["ids"]
        words = torch.from_numpy(rng.random(ids.shape) < GUESSED) & (ids >= len(SPECIAL))
        true = torch.arange(len(ids))[:, None] % (2 * self.pairs) < self.pairs
        batch["guess"] = ids.masked_fill(~(words & true), IGNORED)
        batch["ids"] = ids.masked_fill(words, SPECIAL.index("[MASK]"))
        return batch

    def take(self, chosen: Int[np.ndarray, "n"], rng: np.random.Generator, foreign: float = 0.0) -> dict[str, Tensor]:
        """Images and sentences, of which nothing is hidden; half of them after IteRPrimE's prefix.

        Args:
            chosen: numbers of images.
            rng: of every choice.
            foreign: share of the sentences that do not belong which are true ones of the next image.
        """
        picked = [rng.permutation(len(self.data.captions[i]))[: self.pairs] for i in chosen]
        sentences = []
        for place, i in enumerate(chosen):
            other = (place + 1) % len(chosen)
            wrong = [
                self.data.captions[chosen[other]][k] if rng.random() < foreign else self.data.untrue[i][j]
                for j, k in zip(picked[place], picked[other], strict=True)
            ]
            starts = [PREFIX if rng.random() < 0.5 else "" for _ in wrong]
            for kind in ([self.data.captions[i][j] for j in picked[place]], wrong):
                sentences += [start + sentence for start, sentence in zip(starts, kind, strict=True)]
        tokens = self.tokenizer(sentences, padding=True, return_tensors="pt")
        text = {"ids": tokens["input_ids"], "mask": tokens["attention_mask"].bool()}
        if self.patches is not None:
            return {"patches": self.patches[chosen]["patches"].float(), **text}
        return {"images": torch.from_numpy(np.stack([self.data.images[i] for i in chosen])), **text}


def loss(model: Albef, batch: dict[str, Tensor], step: int, shown: float) -> dict[str, Tensor]:
    """ITC + ITM + MLM, for `train.fit`.

    Args:
        batch: "patches" [B, P, C] or "images" uint8 [B, H, W, 3]; "ids", "mask" and "guess" [2TB, L], for each image T
            true sentences and T others.
        shown: share of the patches that are shown.
    """
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU, the fused attention's backward pass takes longer than all else
        if "patches" in batch:
            patches = show_some(batch["patches"], shown)
        else:
            patches = embed_some(model, batch["images"], shown)
        texts = model.read(batch["ids"], batch["mask"])
        fused = model.fuse(texts, batch["mask"], model.offer(patches), fusion_layers(model))
    count = len(patches)
    true = true_ones(len(texts), count, texts.device)
    matched = F.cross_entropy(model.itm_head(fused[:, 0]).float(), true.long())
    guessed = batch["guess"] != IGNORED
    words = F.cross_entropy(model.text_encoder.cls(fused[guessed]).float(), batch["guess"][guessed])
    contrast = contrastive(
        F.normalize(model.vision_proj(patches[:, 0]).float(), dim=-1),
        F.normalize(model.text_proj(texts[:, 0]).float(), dim=-1),
        true,
        model.temp.clamp(0.01, 0.5),
    )
    return {"loss": contrast + matched + words, "itc": contrast, "itm": matched, "mlm": words}


def contrastive(
    images: Float[Tensor, "B D"], texts: Float[Tensor, "E D"], true: Bool[Tensor, "E"], temperature: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Images shall find their true sentences among all, and true sentences their image.

    Args:
        images: unit vectors.
        texts: unit vectors, E/B for each image.
        true: which texts are.
        temperature: of the cosines.
    """
    logits = images @ texts.T / temperature
    owner = torch.arange(len(texts), device=texts.device) // (len(texts) // len(images))
    own = (owner == torch.arange(len(images), device=texts.device)[:, None]) & true
    per_image = F.cross_entropy(logits, own.float() / own.sum(dim=1, keepdim=True))
    return (per_image + F.cross_entropy(logits.T[true], owner[true])) / 2


def true_ones(sentences: int, images: int, device: torch.device) -> Bool[Tensor, "E"]:
    """Which of the sentences of a batch are true: of each image's, the first half."""
    each = sentences // images
    return torch.arange(sentences, device=device) % each < each // 2


def fusion_layers(model: Albef) -> range:
    """All layers with cross-attention."""
    return range(model.first_fusion, len(model.text_layers))


def show_some(patches: Float[Tensor, "B P C"], share: float) -> Float[Tensor, "B p C"]:
    """The class token, which comes first, and a random share of the patches."""
    count = patches.shape[1] - 1
    kept = 1 + torch.rand(len(patches), count, device=patches.device).argsort(dim=1)[:, : round(share * count)]
    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1)
    return patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))


def embed_some(model: Albef, images: UInt8[Tensor, "B H W 3"], share: float) -> Float[Tensor, "B p C"]:
    """Class token and a random share of the patches after the vision transformer, which sees no others."""
    vision = model.visual_encoder
    patches = vision.patch_embed(pixels(images))
    states = torch.cat([vision.cls_token.expand(len(images), -1, -1), patches], dim=1) + vision.pos_embed
    states = show_some(states, share)
    for block in vision.blocks:
        states = block(states)
    return vision.norm(states)


def encode(model: Albef, data: Pool) -> FeatureStore:
    """Class token and patches, [P, C], of every image of a pool, as the image encoder sees them; from the cache."""

    def patches(images: list[UInt8[np.ndarray, "H W 3"]]) -> dict[str, Tensor]:
        with torch.no_grad():
            seen = pixels(torch.from_numpy(np.stack(images)).to(model.itm_head.weight.device))
            return {"patches": model.embed_images(seen)}

    origin = fingerprint(model.visual_encoder, (__file__,))
    encoder = Encoder("albef-patches", patches, {"size": model.size.image_size}, origin, batch=48)
    keys = [sha256(image.tobytes()).hexdigest() for image in data.images]
    return open_features(encoder, Rows(keys, lambda row: data.images[row]))


def pixels(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """As the image encoder takes them."""
    return normalise(images.permute(0, 3, 1, 2).float() / 255)


@torch.no_grad()
def start_from_clip(model: Albef, clip: Clip, images: UInt8[Tensor, "B H W 3"]) -> None:
    """Give the image encoder the first blocks of CLIP's, which is as wide.

    CLIP normalises what enters its first block, and LAVIS's class does not. With the deviation that tokens have on
    average, the normalisation is linear, and goes into patches and positions. What comes out is scaled to mean 0 and
    deviation 1 in each channel, by the last norm: otherwise a few channels, in which all patches are much alike, are
    all that words can see of them at first.

    Args:
        model: its vision transformer is overwritten.
        clip: with blocks of the same width and feed-forward width.
        images: uint8, on which averages are taken.
    """
    ours, theirs = model.visual_encoder, clip.model.visual
    grid = ours.patch_embed.grid_size
    positions = resize_positions(theirs.positional_embedding, theirs.grid_size, grid)
    raw = theirs.conv1(pixels(images)).flatten(2).mT + positions[1:]
    norm, deviation = theirs.ln_pre, raw.std(dim=-1).mean()

    def scaled(x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        return norm.weight * (x - x.mean(dim=-1, keepdim=True)) / deviation

    kernel = theirs.conv1.weight.flatten(1)  # channels first: what comes in is what `scaled` must not mix
    ours.patch_embed.proj.weight.copy_(scaled(kernel.T).T.view_as(ours.patch_embed.proj.weight))
    ours.patch_embed.proj.bias.zero_()
    ours.pos_embed[0, 1:] = scaled(positions[1:]) + norm.bias
    ours.pos_embed[0, 0] = 0
    ours.cls_token[0, 0] = norm(theirs.class_embedding + positions[0])
    for own, block in zip(ours.blocks, theirs.transformer.resblocks, strict=False):
        own.norm1.load_state_dict(block.ln_1.state_dict())
        own.norm2.load_state_dict(block.ln_2.state_dict())
        own.attn.qkv.load_state_dict({"weight": block.attn.in_proj_weight, "bias": block.attn.in_proj_bias})
        own.attn.proj.load_state_dict(block.attn.out_proj.state_dict())
        own.mlp.fc1.load_state_dict(block.mlp.c_fc.state_dict())
        own.mlp.fc2.load_state_dict(block.mlp.c_proj.state_dict())
    patches = ours(pixels(images))[:, 1:]
    deviation, mean = torch.std_mean(patches, dim=(0, 1))
    ours.norm.weight.copy_(1 / deviation)
    ours.norm.bias.copy_(-mean / deviation)


@torch.no_grad()
def matching_accuracy(model: Albef, batches: Batches) -> float:
    """Share of the held-out images' sentences of which the model says rightly that they are true or not, in percent."""
    model.eval()
    right = []
    for start in range(0, len(batches.tested), BATCH):
        batch = batches.take(batches.tested[start : start + BATCH], np.random.default_rng(start))
        texts = model.read(batch["ids"], batch["mask"])
        offered = model.offer(model.embed_images(pixels(batch["images"])))
        fused = model.fuse(texts, batch["mask"], offered, fusion_layers(model))
        true = true_ones(len(texts), len(offered), texts.device)
        right.append((model.itm_head(fused[:, 0]).argmax(dim=1) == true).float())
    return 100 * torch.cat(right).mean().item()


def write_vocabulary(words: Iterable[str], path: Path) -> None:
    """Write a WordPiece vocabulary in which each of `words` is one token, and other words are spelt."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*SPECIAL, *",.'-?!&/", *letters, *(f"##{letter}" for letter in letters)]
    pieces += [word for word in sorted(words) if word not in pieces]
    with atomic_write(path, "w") as file:
        file.writelines(f"{piece}\n" for piece in pieces)


def main(steps: int | None = None, folder: Path | None = None, device: str | torch.device | None = None) -> None:
    """Train the toy ALBEF and write its weights, vocabulary and model card; run again, it continues.

    Args:
        steps: of every round, for a trial, which leaves everything in `folder`. None: `ROUNDS`, and the weights are
            written into the package.
        folder: for the checkpoints; None: in the cache.
        device: None: CUDA when there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(folder or cache_dir() / "pretrain" / "albef")
    rounds = [replace(r, steps=steps or r.steps) for r in ROUNDS]
    target = folder if steps else WEIGHTS
    vocabulary = folder / TOY_ITM.vocabulary.file
    if not vocabulary.is_file():  # a resumed run keeps its tokens, whatever words the grammar has learnt since
        write_vocabulary(wording.vocabulary(), vocabulary)
    tokenizer, data = BertTokenizerFast(vocab_file=str(vocabulary)), pool("albef")
    torch.manual_seed(0)
    model = Albef(SIZES[TOY_ITM.size])
    start_from_clip(model, load_clip("toy", "cpu"), torch.from_numpy(np.array(data.images[:64])))
    model.to(device)
    seconds = 0.0
    for number, this in enumerate(rounds):
        model.visual_encoder.requires_grad_(not this.frozen)
        patches = encode(model, data) if this.frozen else None
        batches = Batches(data, tokenizer, this, HELD_OUT, patches, seed=number)
        measure = partial(loss, shown=this.shown)
        log = fit(model, measure, batches, this.recipe(), folder / f"round {number + 1}", device)
        seconds += sum(row["seconds"] for row in log)
    accuracy = matching_accuracy(model.cpu(), Batches(data, tokenizer, this, HELD_OUT))
    path = target / TOY_ITM.file
    export(model, path)
    pieces = vocabulary.read_bytes()
    with atomic_write(target / vocabulary.name) as file:
        file.write(pieces)
    record_sha256(target / vocabulary.name)
    card = model_card(model, rounds, log, seconds / 60, path.stat().st_size, accuracy, device)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(card)
    print(card)


def model_card(
    model: nn.Module,
    rounds: list[Round],
    log: list[dict[str, int | float]],
    minutes: float,
    size: int,
    accuracy: float,
    device: torch.device,
) -> str:
    """The model card, in Markdown.

    Args:
        model: trained.
        rounds: of the training.
        log: of the last round.
        minutes: that they took.
        size: of the file in bytes.
        accuracy: of matching on held-out images, in percent.
        device: trained on.
    """
    where = f"CPU, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    last = log[-100:]
    ends = {name: sum(row[name] for row in last) / len(last) for name in ("itc", "itm", "mlm")}
    side, millions = model.size.image_size, sum(p.numel() for p in model.parameters()) / 1e6
    table = "\n".join(
        f"| {number} | {r.steps} | {r.learning_rate:g} | {'frozen' if r.frozen else 'trained'} |"
        f" {100 * r.shown:.0f} % | {100 * r.foreign[0]:.0f} to {100 * r.foreign[1]:.0f} % |"
        for number, r in enumerate(rounds, start=1)
    )
    return f"""# Toy ALBEF

LAVIS's ALBEF classes: a vision transformer of {model.size.image_layers} layers for images of {side}×{side} pixels in \
patches of {model.size.patch_size}, and a BERT of {model.size.text_layers}
layers, from layer {model.size.fusion_layer} on (from 0) with cross-attention; all {model.size.width} wide, \
{millions:.1f} million parameters, {size / 1e6:.1f} MB. It
says whether a sentence about a picture of the toy world is true. It knows the toy world and nothing else.

**Data.** {POOLS["albef"][0] - HELD_OUT} scenes of the toy world, with true sentences and untrue ones that differ from
them in one place (`wris_lib/data/toyworld/pretraining.py`). No boxes, no masks. {HELD_OUT} more are held out.

**Recipe.** `python -m wris_lib pretrain albef`: steps of {BATCH} images with {PAIRS} true and {PAIRS} other sentences \
each; contrastive,
matching and masked-word loss, {100 * GUESSED:.0f} % of the words hidden. The image encoder begins as the first blocks \
of the toy CLIP's.
AdamW with a cosine after a warm-up, weight decay {rounds[0].recipe().weight_decay:g}, {rounds[0].recipe().precision}.

| round | steps | learning rate | image encoder | patches shown | false sentences that are another image's |
|---|---|---|---|---|---|
{table}

**Made.** {date.today().isoformat()}, {minutes:.0f} minutes on {where}; torch {torch.__version__.split("+")[0]}, \
transformers {transformers.__version__}. Mean losses of the last
{len(last)} steps: contrastive {ends["itc"]:.2f}, matching {ends["itm"]:.2f}, words {ends["mlm"]:.2f}.

**Figure.** On the held-out scenes it says rightly whether a sentence is true in {accuracy:.1f} % of the cases. Half of
the sentences are; the others differ from a true one in one place.
"""
