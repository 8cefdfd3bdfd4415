"""Image–text matching: does a sentence say something true of an image, and where was that seen?

ALBEF (Li et al. 2021, arXiv 2107.07651) reads the image with a vision transformer and the first half of the sentence's
layers without it; in the other layers, words look at patches by cross-attention. A head on the first token says
"matched" or "not". The models are LAVIS's own classes; BLIP's (Li et al. 2022, arXiv 2201.12086) come from transformers
and need no LAVIS. This face reads the cross-attention of one layer, and the gradient of "matched" with respect to it.

Nothing is computed twice: patches and what they offer the words (keys, values) once for an image, the layers before the
image comes in once for a sentence, and of the backward pass only what lies above the layer that is read.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from wris_lib.backbones.checkpoints import checkpoint_path, expected_sha256, get_stack, verify
from wris_lib.backbones.clip import normalise
from wris_lib.backbones.itm_models import SIZES, Albef, Blip, EncodedImages, ImageTextModel
from wris_lib.backbones.loading import load_weights
from wris_lib.errors import WrisError

BLIP = "Salesforce/blip-itm-base-coco"


@dataclass(frozen=True)
class EncodedTexts:
    """Texts after the layers that do not see the image.

    Attributes:
        states: of tokens.
        mask: true on tokens, of which [CLS] is the first and [SEP] the last; false on padding.
        spans: for each token of each text the characters (start, end) that it stands for; (0, 0) for [CLS] and [SEP].
    """

    states: Float[Tensor, "E L C"]
    mask: Bool[Tensor, "E L"]
    spans: list[list[tuple[int, int]]]

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: list[int]) -> "EncodedTexts":
        return EncodedTexts(self.states[rows], self.mask[rows], [self.spans[row] for row in rows])


@dataclass(frozen=True)
class Match:
    """How well texts go with images, and where that was seen.

    Attributes:
        attention: of each token to each patch in one layer, after the softmax over patches and the image's class token,
            whose column is left out.
        gradient: of the logit "matched" with respect to it.
        probability: of "matched", in [0, 1].
    """

    attention: Float[Tensor, "E heads L N"]
    gradient: Float[Tensor, "E heads L N"]
    probability: Float[Tensor, "E"]


class Matcher:
    """A frozen image–text matching model and its tokenizer.

    Args:
        model: ALBEF or BLIP.
        tokenizer: of BERT's kind.
        layer: text layer, from 0, whose cross-attention is read unless another is asked for.
        image_size: side of the input in pixels.
        patch_size: side of a patch in pixels.
        text_length: the most tokens of a text.
        device: None: CUDA when there is one.
    """

    def __init__(
        self,
        model: ImageTextModel,
        tokenizer: PreTrainedTokenizerFast,
        layer: int,
        *,
        image_size: int,
        patch_size: int,
        text_length: int,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.tokenizer, self.layer = tokenizer, layer
        self.layers = range(model.first_fusion, len(model.text_layers))
        self.image_size, self.text_length = image_size, text_length
        self.grid = (image_size // patch_size, image_size // patch_size)

    def preprocess(self, image: Image.Image) -> Float[Tensor, "3 S S"]:
        """Squash an RGB image to the model's square and normalise its colours."""
        side = (self.image_size, self.image_size)
        pixels = np.asarray(image.resize(side, Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return normalise(torch.from_numpy(pixels).permute(2, 0, 1)).to(self.device, self.model.itm_head.weight.dtype)

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "B 3 S S"]) -> EncodedImages:
        """Images of `preprocess`, once for all that is ever asked about them."""
        return self.model.offer(self.model.embed_images(pixels))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Texts, once for all images and passes. What lies beyond `text_length` tokens is cut off, with a warning."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.text_length,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"].bool()
        spans = [
            [tuple(span) for span in row[:length]]
            for row, length in zip(tokens["offset_mapping"].tolist(), mask.sum(dim=1).tolist(), strict=True)
        ]
        if any(row[-2][1] < len(text.rstrip()) for text, row in zip(texts, spans, strict=True) if text.strip()):
            warnings.warn(
                f"the matching model reads {self.text_length} tokens; words behind them are ignored.", stacklevel=2
            )
        mask = mask.to(self.device)
        return EncodedTexts(self.model.read(tokens["input_ids"].to(self.device), mask), mask, spans)

    def match(
        self,
        images: EncodedImages,
        texts: EncodedTexts,
        visible: Bool[Tensor, "E N"] | None = None,
        layer: int | None = None,
    ) -> Match:
        """Match texts with images, and read where one layer's words looked and what that was worth.

        Args:
            images: one for all texts, or one for each.
            texts: any number.
            visible: patches that words may look at, in every layer; None: all. The image's class token stays visible.
            layer: whose cross-attention is read, from 0; None: the default one.

        Raises:
            WrisError: the layer has no cross-attention; there are neither one nor as many images as texts.
        """
        layer = self.layer if layer is None else layer
        if layer not in self.layers:
            raise WrisError(
                f"layer {layer} has no cross-attention; choose one from {self.layers[0]} to {self.layers[-1]}."
            )
        if len(images) not in (1, len(texts)):
            raise WrisError(f"{len(images)} images were given for {len(texts)} texts; give one, or one for each text.")
        model, mask = self.model, texts.mask
        if visible is not None:
            visible = F.pad(visible.to(self.device), (1, 0), value=True)
        with torch.no_grad():
            states = model.fuse(texts.states, mask, images, range(self.layers[0], layer), visible)
            states = model.attend(states, mask, layer)
            attention = model.look(layer, states, images, visible)
        with torch.enable_grad():
            attention.requires_grad_()
            states = model.take(layer, states, attention, images)
            states = model.fuse(states, mask, images, range(layer + 1, self.layers[-1] + 1), visible)
            logits = model.itm_head(states[:, 0])
            (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention)
        attention = attention.detach()
        probability = logits.detach().float().softmax(dim=-1)[:, 1]
        return Match(attention[..., 1:].float(), gradient[..., 1:].float(), probability)


def load_matcher(stack: str | None = None, device: str | torch.device | None = None) -> Matcher:
    """The stack's ALBEF, frozen.

    Args:
        stack: "toy" or "paper"; None: the default stack.
        device: None: CUDA when there is one.

    Raises:
        WrisError: no such stack; checkpoint or vocabulary are missing, damaged or another model's; LAVIS cannot be
            imported.
    """
    checkpoint = get_stack(stack).itm
    vocabulary = checkpoint_path(checkpoint.vocabulary)
    verify(vocabulary, expected_sha256(checkpoint.vocabulary))
    checkpoint_path(checkpoint)  # says what is missing before seconds are spent on importing LAVIS
    size = SIZES[checkpoint.size]
    model = Albef(size)
    load_weights(model, checkpoint, as_lavis)
    return albef_matcher(model, vocabulary, checkpoint.layer, device)


def albef_matcher(model: Albef, vocabulary: Path, layer: int, device: str | torch.device | None = None) -> Matcher:
    """An ALBEF with the tokenizer of a WordPiece vocabulary, one token a line."""
    size = model.size
    return Matcher(
        model,
        BertTokenizerFast(vocab_file=str(vocabulary), do_lower_case=True),
        layer,
        image_size=size.image_size,
        patch_size=size.patch_size,
        text_length=size.text_length,
        device=device,
    )


def load_blip(folder: str | Path = BLIP, layer: int = 8, device: str | torch.device | None = None) -> Matcher:
    """BLIP's matching model from what is on this machine; nothing is downloaded.

    Args:
        folder: with the model's files, or its name on the Hugging Face hub when it was downloaded before.
        layer: whose cross-attention is read, from 0.
        device: None: CUDA when there is one.

    Raises:
        WrisError: the model is not here.
    """
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    try:
        model = BlipForImageTextRetrieval.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WrisError(
            f"BLIP is not at {folder}; get it with `huggingface-cli download {BLIP}`, or name its folder."
        ) from error
    return Matcher(
        Blip(model),
        tokenizer,
        layer,
        image_size=model.config.vision_config.image_size,
        patch_size=model.config.vision_config.patch_size,
        text_length=model.config.text_config.max_position_embeddings,
        device=device,
    )


def as_lavis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors as LAVIS's classes expect them.

    Momentum encoders and queues, which only training needs, are left out. The authors' BERT adds an embedding of the
    token's type, always the first, to every token. LAVIS's has no place for it, and would drop it without a word; here
    it is added to the positions' embeddings, which comes to the same.
    """
    training = ("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.")
    queues = ("image_queue", "text_queue", "queue_ptr", "idx_queue")
    state = {k: v for k, v in state.items() if not k.startswith(training) and k not in queues}
    embeddings = "text_encoder.bert.embeddings."
    if (types := state.pop(f"{embeddings}token_type_embeddings.weight", None)) is not None:
        positions = f"{embeddings}position_embeddings.weight"
        state[positions] = state[positions] + types[0]
    return state
