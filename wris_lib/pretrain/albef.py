"""How the toy ALBEF is made, on pictures of the toy world with true and untrue sentences.

ALBEF learns three things from pairs (Li et al. 2021, arXiv 2107.07651): to bring image and sentence together as
vectors (contrastive, ITC), to tell whether a sentence belongs to an image (matching, ITM), and to guess hidden words
(MLM). Six things are otherwise here:

- The image encoder begins as the first blocks of the toy CLIP's, the authors' as DeiT's.
- Pictures get harder: at first they show a single thing, then two or three, then any number. Where there is only one
  thing, words learn what it looks like; to learn where it is, they have to know that.
- Sentences that do not belong are, for the authors, those of other images in the batch, preferably of those that look
  alike. In a small world such a sentence is often true by chance, and a matcher punished for seeing this learns
  nothing. Here half of them are at first another image's, drawn without preference, later a fifth; the others differ
  from a true one in one place and are known to be untrue.
- Some of the patches, drawn anew in each step, are not shown, so that a sentence is not recognised by one of them; and
  one reading with hidden words serves both matching and guessing.
- Not only the sentence is judged, by [CLS], but also its words, by the same head: those of a true sentence are right,
  and of an untrue one the word that was exchanged and the head noun, which says what the sentence is about, are wrong.
  And in a third of the sentences only the head noun looks at the image, in another third only words with a meaning.
  Otherwise [CLS] learns to look for the whole sentence, and it does not matter what a word looks at. In the second half
  of the training only the head noun is judged, and in two thirds of the sentences it alone looks: so it has to find
  what all words together describe.
- There are no momentum models and no queues, which make up for noisy captions of the web.
"""

from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertTokenizerFast

from wris_lib.backbones.checkpoints import STACKS, WEIGHTS, record_sha256
from wris_lib.backbones.clip import Clip, load_clip, normalise, resize_positions
from wris_lib.backbones.itm_models import SIZES, Albef
from wris_lib.data.toyworld import wording
from wris_lib.data.toyworld.pretraining import POOLS, Pool, checkpoint_folder, pool
from wris_lib.files import atomic_write
from wris_lib.methods.iterprime.words import PREFIX
from wris_lib.pretrain.clip import export
from wris_lib.train import Recipe, fit

CHECKPOINT = STACKS["toy"].itm
BATCH = 24  # images
SEED = 0  # of all that is drawn
PAIRS = 3  # of a true and another sentence, for each image
HELD_OUT = 256  # images at the end of the pool that are never trained on
STEPS, LEARNING_RATE = 4000, 3e-4
SHOWN = 0.2  # share of the patches
GUESSED = 0.2  # share of all words that are hidden; those of true sentences are to be guessed
IGNORED = -100  # label of what is not to be guessed
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # the first tokens, in BERT's order of use
FUNCTION_WORDS = ["a", "an", "and", "at", "in", "is", "of", "on", "the", "there", "to", "with"]


class Batches:
    """Batches of images with sentences, as a pure function of the step.

    Every image brings PAIRS true and as many other sentences; images with fewer are left out.

    Args:
        data: ALBEF's pool.
        tokenizer: the model's.
        steps: of the training, over which batches get harder.
        held_out: images at the end to leave out.
    """

    def __init__(self, data: Pool, tokenizer: BertTokenizerFast, steps: int, held_out: int) -> None:
        self.data, self.tokenizer, self.steps = data, tokenizer, steps
        rich = np.array([i for i, sentences in enumerate(data.captions) if len(sentences) >= PAIRS])
        first = len(data.images) - held_out
        self.silent = torch.tensor(tokenizer.convert_tokens_to_ids([*SPECIAL[:-1], *FUNCTION_WORDS]))  # all but [MASK]
        self.nouns = torch.tensor(tokenizer.convert_tokens_to_ids(sorted(wording.nouns())))
        self.trained, self.tested = rich[rich < first], rich[rich >= first]

    def __call__(self, step: int) -> dict[str, Tensor]:
        """BATCH images, their sentences (of each image first the true ones), what is to be guessed in them, which of
        their words are right or wrong, and which of their tokens look at the image."""
        rng = np.random.default_rng((SEED, step))
        first, last, foreign = difficulty(step / self.steps)
        window = self.trained[round(first * len(self.trained)) : round(last * len(self.trained))]
        batch = self.take(np.sort(rng.choice(window, min(BATCH, len(window)), replace=False)), rng, foreign)
        ids = batch["ids"]
        hidden = torch.from_numpy(rng.random(ids.shape) < GUESSED) & (ids >= len(SPECIAL))
        true = (torch.arange(len(ids)) % (2 * PAIRS) < PAIRS)[:, None]
        batch["guess"] = ids.masked_fill(~(hidden & true), IGNORED)
        heads, late = head_nouns(ids, self.nouns), step >= self.steps / 2
        judged = (heads if late else ~torch.isin(ids, self.silent)) & ~hidden
        original = ids.roll(PAIRS, dims=0)  # of an altered sentence: the true one that it was
        altered = batch.pop("altered")[:, None] & (ids[:, :, None] != original[:, None]).all(dim=2)
        wrong = ~true & (heads | altered)
        batch["right"] = torch.full_like(ids, IGNORED).masked_fill(judged & true, 1).masked_fill(judged & wrong, 0)
        batch["ids"] = ids.masked_fill(hidden, SPECIAL.index("[MASK]"))
        meaning = ~torch.isin(batch["ids"], self.silent)
        third = torch.from_numpy(3 * rng.random(len(ids))).int()[:, None]
        batch["looks"] = ((third == 0) & heads) | ((third == 1) & (heads if late else meaning)) | (third == 2)
        return batch

    def take(self, chosen: Int[np.ndarray, "n"], rng: np.random.Generator, foreign: float = 0.0) -> dict[str, Tensor]:
        """Images and sentences, of which nothing is hidden; half of them after IteRPrimE's prefix.

        Args:
            chosen: numbers of images.
            rng: of every choice.
            foreign: share of the sentences that do not belong which are true ones of the next image.
        """
        picked = [rng.permutation(len(self.data.captions[i]))[:PAIRS] for i in chosen]
        sentences, altered = [], []
        for place, i in enumerate(chosen):
            other, others = self.data.captions[chosen[(place + 1) % len(chosen)]], picked[(place + 1) % len(chosen)]
            kept = rng.random(PAIRS) >= foreign
            which = zip(picked[place], others, kept, strict=True)
            wrong = [self.data.untrue[i][j] if keep else other[k] for j, k, keep in which]
            starts = [PREFIX if rng.random() < 0.5 else "" for _ in wrong]
            for kind in ([self.data.captions[i][j] for j in picked[place]], wrong):
                sentences += [start + sentence for start, sentence in zip(starts, kind, strict=True)]
            altered += [False] * PAIRS + kept.tolist()
        tokens = self.tokenizer(sentences, padding=True, return_tensors="pt")
        text = {"ids": tokens["input_ids"], "mask": tokens["attention_mask"].bool(), "altered": torch.tensor(altered)}
        return {"images": torch.from_numpy(np.stack([self.data.images[i] for i in chosen])), **text}


def head_nouns(ids: Int[Tensor, "E L"], nouns: Int[Tensor, "N"]) -> Bool[Tensor, "E L"]:
    """Which tokens say what a sentence is about: its first noun."""
    found = torch.isin(ids, nouns)
    return found & (found.cumsum(dim=1) == 1)


def difficulty(progress: float) -> tuple[float, float, float]:
    """How hard batches are after a share of the steps.

    Returns:
        Where the images come from: between two shares of the pool, whose images get harder towards its end; and the
        share of the sentences that do not belong which are another image's.
    """
    first, last = np.interp(progress, [0, 1 / 3, 1], [0, 0, 1 / 3]), np.interp(progress, [0, 1 / 3], [1 / 3, 1])
    return float(first), float(last), float(np.interp(progress, [0, 1 / 3], [0.5, 0.2]))


def loss(model: Albef, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """ITC + ITM, of sentences and of words + MLM, for `train.fit`.

    Args:
        batch: "images" uint8 [B, H, W, 3]; "ids", "mask", "guess", "right" and "looks" [2TB, L], for each image T true
            sentences and T others.
    """
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU, the fused attention's backward pass takes longer than all else
        patches = embed_some(model, batch["images"], SHOWN)
        texts = model.read(batch["ids"], batch["mask"])
        fused, images = texts, model.offer(patches)
        for number in fusion_layers(model):
            own = model.attend(fused, batch["mask"], number)
            looked = model.look(number, own, images) * batch["looks"][:, None, :, None]
            fused = model.take(number, own, looked, images)
    count = len(patches)
    true = true_ones(len(texts), count, texts.device)
    judgements = model.itm_head(fused).float()
    matched = F.cross_entropy(judgements[:, 0], true.long())
    words = sum(verdict(judgements[batch["right"] == right], right) for right in (0, 1)) / 2
    guessed = batch["guess"] != IGNORED
    guesses = F.cross_entropy(model.text_encoder.cls(fused[guessed]).float(), batch["guess"][guessed])
    contrast = contrastive(
        F.normalize(model.vision_proj(patches[:, 0]).float(), dim=-1),
        F.normalize(model.text_proj(texts[:, 0]).float(), dim=-1),
        true,
        model.temp.clamp(0.01, 0.5),
    )
    terms = {"itc": contrast, "itm": matched, "words": words, "mlm": guesses}
    return {"loss": sum(terms.values()), **terms}


def verdict(judgements: Float[Tensor, "n 2"], right: int) -> Float[Tensor, ""]:
    """Cross-entropy of words that are all right (1) or all wrong (0); 0 when there are none."""
    return -judgements.log_softmax(dim=1)[:, right].sum() / max(1, len(judgements))


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


def pixels(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """As the image encoder takes them."""
    return normalise(images.permute(0, 3, 1, 2).float() / 255)


@torch.no_grad()
def start_from_clip(model: Albef, clip: Clip, images: UInt8[Tensor, "B H W 3"]) -> None:
    """Give the image encoder the first blocks of CLIP's, which is as wide; it sees what CLIP would see in the picture
    enlarged until patches are as large as CLIP's.

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
    scale = theirs.conv1.kernel_size[0] // ours.patch_embed.patch_size[0]
    kernel = F.avg_pool2d(theirs.conv1.weight, scale) * scale**2
    raw = F.conv2d(pixels(images), kernel, stride=kernel.shape[2:]).flatten(2).mT + positions[1:]
    norm, deviation = theirs.ln_pre, raw.std(dim=-1).mean()

    def scaled(x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        return norm.weight * (x - x.mean(dim=-1, keepdim=True)) / deviation

    of_channels = kernel.flatten(1).T  # `scaled` must mix nothing but channels
    ours.patch_embed.proj.weight.copy_(scaled(of_channels).T.view_as(kernel))
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
        steps: for a trial, which leaves everything in `folder`. None: STEPS, and the weights are written into the
            package.
        folder: for the checkpoint; None: in the cache.
        device: None: CUDA when there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(folder or checkpoint_folder("albef"))
    target = folder if steps else WEIGHTS
    steps = steps or STEPS
    vocabulary = folder / CHECKPOINT.vocabulary.file
    if not vocabulary.is_file():  # a resumed run keeps its tokens, whatever words the grammar has learnt since
        write_vocabulary(wording.vocabulary(), vocabulary)
    batches = Batches(pool("albef"), BertTokenizerFast(vocab_file=str(vocabulary)), steps, HELD_OUT)
    torch.manual_seed(SEED)
    model = Albef(SIZES[CHECKPOINT.size])
    some = batches.data.images[batches.trained[:: max(1, len(batches.trained) // 64)]]
    start_from_clip(model, load_clip("toy", "cpu"), torch.from_numpy(some))
    recipe = Recipe(steps, LEARNING_RATE, weight_decay=0.05, warmup=min(400, steps // 10), checkpoint_every=250)
    log = fit(model, loss, batches, recipe, folder, device)
    accuracy = matching_accuracy(model.cpu(), batches)
    path = target / CHECKPOINT.file
    export(model, path)
    pieces = vocabulary.read_bytes()
    with atomic_write(target / vocabulary.name) as file:
        file.write(pieces)
    record_sha256(target / vocabulary.name)
    card = model_card(model, recipe, log, path.stat().st_size, accuracy, device)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(card)
    print(card)


def model_card(
    model: nn.Module,
    recipe: Recipe,
    log: list[dict[str, int | float]],
    size: int,
    accuracy: float,
    device: torch.device,
) -> str:
    """The model card, in Markdown.

    Args:
        model: trained.
        recipe: of the training.
        log: of the training.
        size: of the file in bytes.
        accuracy: of matching on held-out images, in percent.
        device: trained on.
    """
    where = f"CPU, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    last, minutes = log[-100:], sum(row["seconds"] for row in log) / 60
    ends = {name: sum(row[name] for row in last) / len(last) for name in ("itc", "itm", "words", "mlm")}
    side, millions = model.size.image_size, sum(p.numel() for p in model.parameters()) / 1e6
    return f"""# Toy ALBEF

LAVIS's ALBEF classes: a vision transformer of {model.size.image_layers} layers for images of {side}×{side} pixels in \
patches of {model.size.patch_size}, and a BERT of {model.size.text_layers}
layers, from layer {model.size.fusion_layer} on (from 0) with cross-attention; all {model.size.width} wide, \
{millions:.1f} million parameters, {size / 1e6:.1f} MB. It
says whether a sentence about a picture of the toy world is true. It knows the toy world and nothing else.

**Data.** {POOLS["albef"][0] - HELD_OUT} pictures of the toy world, with true sentences and untrue ones that differ from
them in one place (`wris_lib/data/toyworld/pretraining.py`): a third with one large thing, a third with two or three, a
third with up to seven. No boxes, no masks. {HELD_OUT} more of the last kind are held out.

**Recipe.** `python -m wris_lib pretrain albef`: {recipe.steps} steps of {BATCH} images with {PAIRS} true and {PAIRS} \
other sentences each, from
easy to hard; contrastive loss, matching of sentences and of words, hidden words to be guessed; \
{100 * GUESSED:.0f} % of the words are hidden,
{100 * SHOWN:.0f} % of the patches shown. In the second half only the head noun is judged besides the sentence, and in \
two thirds of the
sentences nothing else looks at the image. The image encoder begins as the first blocks of the toy CLIP's. AdamW, \
learning rate
{recipe.learning_rate:g} with a cosine after a warm-up, weight decay {recipe.weight_decay:g}, {recipe.precision}.

**Made.** {date.today().isoformat()}, {minutes:.0f} minutes on {where}; torch {torch.__version__.split("+")[0]}, \
transformers {transformers.__version__}. Mean losses of the last
{len(last)} steps: contrastive {ends["itc"]:.2f}, matching {ends["itm"]:.2f}, words right or wrong
{ends["words"]:.2f}, words to be guessed {ends["mlm"]:.2f}.

**Figure.** On the held-out scenes it says rightly whether a sentence is true in {accuracy:.1f} % of the cases. Half of
the sentences are; the others differ from a true one in one place.
"""
