"""CLIP: how well does each patch of an image go with an expression?

The models are open_clip's own; this face reads out of them what the methods need: patch features of several
stages, word features, and similarity maps. Two kinds of map are offered:

- `plain`: the last block's patch tokens, projected like the class token, dot the expression. CLIP was never
  trained for this, and it shows: self-attention has mixed the patches, and every patch also carries what is
  common to all texts.
- `surgery` (CLIP Surgery, Li et al. 2023, arXiv 2304.05653): a second path beside the last half of the blocks
  in which patches attend to patches of similar *value*, without the feed-forward layers; and what is common
  to all texts, estimated by the empty text or by a set of labels, is taken away. No training.

The second path is computed beside the model's own, which is left as it is: no hooks, no patched modules.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from wris_lib.backbones.checkpoints import WEIGHTS, get_stack
from wris_lib.backbones.loading import load_weights
from wris_lib.errors import WrisError

CONFIGS = Path(__file__).parent / "configs"  # of open_clip models that are not open_clip's
BPE = WEIGHTS / "clip_bpe.txt.gz"  # the merges of their tokenizer


@dataclass(frozen=True)
class ImageFeatures:
    """An image, encoded once; `Clip.maps` reads it with as many expressions as you like. All are unit vectors."""

    image: Float[Tensor, "D"]
    plain: Float[Tensor, "h w D"]
    surgery: Float[Tensor, "h w D"]


def create_clip(
    model_name: str, seed: int | None = None, bpe: Path = BPE, image_size: int | None = None
) -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
    """An open_clip model without weights, and its tokenizer.

    Args:
        model_name: open_clip's name, or that of a file in `CONFIGS`.
        seed: makes the random initial weights reproducible.
        bpe: merges of the tokenizer, for a model of `CONFIGS`; open_clip has its own for the others.
        image_size: side of its images in pixels; None: the model's own.

    Raises:
        WrisError: the tokenizer's file is missing.
    """
    open_clip.add_model_config(CONFIGS)
    options = {}
    if (CONFIGS / f"{model_name}.json").is_file():
        if not bpe.is_file():
            raise WrisError(f"{bpe} is missing; install the library again.")
        options["bpe_path"] = str(bpe)
    with _without_root_warnings(), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = open_clip.create_model(model_name, force_image_size=image_size)
    return model, open_clip.get_tokenizer(model_name, **options)


def load_clip(stack: str | None = None, device: str | torch.device | None = None) -> "Clip":
    """The stack's CLIP, frozen.

    Args:
        stack: "toy" or "paper"; None: the default stack.
        device: None: CUDA when there is one.

    Raises:
        WrisError: no such stack; its checkpoint is missing, damaged or of another model.
    """
    checkpoint = get_stack(stack).clip
    model, tokenizer = create_clip(checkpoint.model_name)
    load_weights(model, checkpoint)
    return Clip(model, tokenizer, checkpoint.dense_size, checkpoint.prompts, checkpoint.surgery_from, device)


class Clip:
    """A frozen open_clip model, read by patch and by word.

    Images come as float tensors made by `preprocess`; their sides are multiples of the patch size. Other
    sizes than the one CLIP was trained with work: position embeddings are interpolated. On a grid of h×w
    patches, cell (row, column) covers the pixels from (column, row)·patch to (column+1, row+1)·patch.

    Args:
        model: any open_clip `CLIP` with a vision transformer.
        tokenizer: the model's.
        dense_size: side of the input in pixels at which similarity maps are computed.
        prompts: templates with one "{}"; an expression's embedding is the mean over them, as CLIP Surgery does.
        surgery_from: block, from 1, at which Surgery's path begins; None: the first of the last half.
        device: None: CUDA when there is one.
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer: open_clip.SimpleTokenizer,
        dense_size: int,
        prompts: Sequence[str] = ("{}",),
        surgery_from: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.tokenizer = tokenizer
        self.dense_size = dense_size
        self.prompts = tuple(prompts)
        self.surgery_from = surgery_from or len(model.visual.transformer.resblocks) // 2 + 1
        self.patch_size: int = model.visual.patch_size[0]
        self.native_size: int = model.visual.image_size[0]

    @property
    def stages(self) -> tuple[int, int, int]:
        """The three blocks, counted from 1, whose patch features the methods use: 4, 8, 12 of 12."""
        blocks = len(self.model.visual.transformer.resblocks)
        return blocks // 3, 2 * blocks // 3, blocks

    def preprocess(self, image: Image.Image, size: int | None = None) -> Float[Tensor, "3 size size"]:
        """Squash an RGB image to a square and normalise its colours. Nothing is cropped: the referent may be
        anywhere.

        Args:
            image: RGB.
            size: side in pixels; None: `dense_size`.
        """
        size = size or self.dense_size
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return normalise(torch.from_numpy(pixels).permute(2, 0, 1)).to(self.device)

    def image_features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Unit vectors of whole images, comparable with `text_features`."""
        return self._encode(images)[0]

    def patch_features(
        self, images: Float[Tensor, "B 3 H W"], stages: Sequence[int | str] | None = None
    ) -> list[Float[Tensor, "B _ h w"]]:
        """What the model makes of each patch, at several stages of one forward pass.

        Args:
            images: of `preprocess`.
            stages: a number stands for the patch tokens after that block, counted from 1, neither projected nor
                normalised; "surgery" for unit vectors at the end of Surgery's path. None: `self.stages`.

        Raises:
            WrisError: the model has no such block; the images' sides are not multiples of the patch size.
        """
        stages = tuple(stages) if stages is not None else self.stages
        blocks = len(self.model.visual.transformer.resblocks)
        if not {*stages} <= {"surgery", *range(1, blocks + 1)}:
            raise WrisError(f"stages {stages} were asked for, but this CLIP has blocks 1 to {blocks}, and 'surgery'.")
        grid = self._grid(images)
        tokens = self._tokens(images, stages)
        features = (self._project(tokens[stage]) if stage == "surgery" else tokens[stage] for stage in stages)
        return [feature[:, 1:].transpose(1, 2).unflatten(2, grid) for feature in features]

    def word_features(self, expressions: Sequence[str]) -> tuple[Float[Tensor, "B L C"], Bool[Tensor, "B L"]]:
        """Features of every token after the final layer norm, start and end of text included.

        Returns:
            The features, and a mask that is True at tokens and False at the padding behind a shorter
            expression.
        """
        tokens = self._tokenize(expressions)
        words, _ = encode_tokens(self.model, tokens)
        length = words.shape[1]
        ends = tokens.argmax(dim=1, keepdim=True)  # the end-of-text token has the highest id
        return words, torch.arange(length, device=self.device) <= ends

    def text_features(self, expressions: Sequence[str]) -> Float[Tensor, "B D"]:
        """Unit vectors of expressions: the mean over the prompts' unit vectors, normalised again."""
        texts = [prompt.format(expression) for expression in expressions for prompt in self.prompts]
        _, sentences = encode_tokens(self.model, self._tokenize(texts))
        sentences = F.normalize(sentences, dim=-1).unflatten(0, (len(expressions), len(self.prompts)))
        return F.normalize(sentences.mean(dim=1), dim=-1)

    def encode_image(self, image: Image.Image) -> ImageFeatures:
        """Encode an RGB image at `dense_size`, for any number of `maps`."""
        features = self._encode(self.preprocess(image)[None])
        return ImageFeatures(*(feature[0] for feature in features))

    def maps(
        self, features: ImageFeatures, expressions: Sequence[str], kind: str = "surgery"
    ) -> Float[Tensor, "B h w"]:
        """Similarity maps of one image with several expressions.

        Args:
            features: of the image.
            expressions: any number.
            kind: "surgery" or "plain".

        Values are differences of cosines (`surgery`) or cosines (`plain`): compare them within a map only.

        Raises:
            WrisError: unknown kind.
        """
        patches = features.plain if _checked(kind) == "plain" else features.surgery
        return torch.einsum("hwd,bd->bhw", patches, self.directions(expressions, kind))

    def similarity_map(
        self, images: Float[Tensor, "B 3 H W"], expressions: Sequence[str], kind: str = "surgery"
    ) -> Float[Tensor, "B h w"]:
        """Similarity maps of image i with expression i; otherwise like `maps`."""
        _, plain, surgery = self._encode(images)
        patches = plain if _checked(kind) == "plain" else surgery
        return torch.einsum("bhwd,bd->bhw", patches, self.directions(expressions, kind))

    def label_maps(self, features: ImageFeatures, labels: Sequence[str]) -> Float[Tensor, "B h w"]:
        """CLIP Surgery's maps for a set of labels, of which each takes away what it shares with the others.

        With unit features v of a patch, t of a label and c of the image: weigh the labels by
        w = softmax(2 c·t) / mean; the products w·(v ⊙ t), less their mean over the labels, are summed over
        channels.
        """
        text = self.text_features(labels)
        weights = (2 * text @ features.image).softmax(dim=0) * len(labels)
        maps = torch.einsum("hwd,bd,b->bhw", features.surgery, text, weights)
        return maps - maps.mean(dim=0)

    @cached_property
    def _empty_text(self) -> Float[Tensor, "1 D"]:
        return self.text_features([""])

    def directions(self, expressions: Sequence[str], kind: str = "surgery") -> Float[Tensor, "B D"]:
        """What patches are compared with: the texts' features, for "surgery" less those of the empty text."""
        text = self.text_features(expressions)
        return text if kind == "plain" else text - self._empty_text

    def _tokenize(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        length = self.tokenizer.context_length
        tokens = self.tokenizer(list(texts)).to(self.device)
        # A text that fills the context to its last token has most likely lost words.
        if (tokens[:, -1] != 0).any():
            warnings.warn(f"CLIP reads {length} tokens; words behind them are ignored.", stacklevel=3)
        return tokens

    def _grid(self, images: Float[Tensor, "B 3 H W"]) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size or 0 in (height, width):
            raise WrisError(
                f"CLIP's input has {width}×{height} pixels; both sides must be multiples of the patch size,"
                f" {self.patch_size}."
            )
        return height // self.patch_size, width // self.patch_size

    def _embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N C"]:
        """The input of the first block: class token, then patches row by row."""
        visual = self.model.visual
        grid = self._grid(images)
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(images), 1, -1)
        positions = resize_positions(visual.positional_embedding, visual.grid_size, grid)
        return visual.ln_pre(torch.cat([first, patches], dim=1) + positions)

    def _tokens(
        self, images: Float[Tensor, "B 3 H W"], stages: Sequence[int | str]
    ) -> dict[int | str, Float[Tensor, "B N C"]]:
        """Class token and patches after blocks, counted from 1, and at the end of Surgery's path ("surgery")."""
        own, found = self._embed(images), {}
        blocks, surgery = self.model.visual.transformer.resblocks, "surgery" in stages
        deepest = max([number for number in stages if number != "surgery"] + [len(blocks) - 1] * surgery)
        for number, block in enumerate(blocks, start=1):
            if surgery and number >= self.surgery_from:
                found["surgery"] = found.get("surgery", own) + _value_attention(block, block.ln_1(own))
            if number > deepest:  # nobody reads what comes out
                break
            own = block(own)
            if number in stages:
                found[number] = own
        return found

    def _project(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        """To unit vectors in the space of `text_features`."""
        visual = self.model.visual
        return F.normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)

    def _encode(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B h w D"], Float[Tensor, "B h w D"]]:
        """Unit features of images, of patches along the model's own path, and of patches along Surgery's."""
        grid, last = self._grid(images), len(self.model.visual.transformer.resblocks)
        tokens = self._tokens(images, (last, "surgery"))
        own, second = self._project(tokens[last]), self._project(tokens["surgery"])
        return own[:, 0], own[:, 1:].unflatten(1, grid), second[:, 1:].unflatten(1, grid)


def normalise(pixels: Float[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
    """RGB in 0..1 to the mean 0 and deviation 1 (over OpenAI's training images) that CLIP expects."""
    mean, deviation = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (pixels - mean) / deviation


def encode_tokens(
    model: open_clip.CLIP, tokens: Int[Tensor, "B L"]
) -> tuple[Float[Tensor, "B l C"], Float[Tensor, "B D"]]:
    """CLIP's text encoder, giving words as well as sentences. Padding that all texts share is not computed.

    Returns:
        Words after the final layer norm, and sentences projected but not normalised.
    """
    ends = tokens.argmax(dim=1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    words = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return words, words[torch.arange(len(tokens), device=tokens.device), ends] @ model.text_projection


def _value_attention(block: nn.Module, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
    """A block's attention with its values also in the place of queries and keys."""
    attention, width = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
    v = F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # B heads N d
    mixed = F.scaled_dot_product_attention(v, v, v)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def resize_positions(
    positions: Float[Tensor, "N C"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "M C"]:
    """Interpolate position embeddings to another grid; the class token's, which comes first, stays."""
    if tuple(old) == tuple(new):
        return positions
    grid = positions[1:].T.unflatten(1, tuple(old))
    grid = F.interpolate(grid[None], size=new, mode="bicubic", antialias=True, align_corners=False)[0]
    return torch.cat([positions[:1], grid.flatten(1).T])


def _checked(kind: str) -> str:
    if kind not in ("plain", "surgery"):
        raise WrisError(f"there is no similarity map {kind!r}; choose 'plain' or 'surgery'.")
    return kind


@contextmanager
def _without_root_warnings() -> Iterator[None]:
    """open_clip warns through the root logger that a model has no weights yet, which is what we asked for."""

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root = logging.getLogger()
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)
