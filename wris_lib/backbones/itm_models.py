"""The models that read an image and a sentence together, one layer at a time.

LAVIS's own ALBEF classes, and BLIP's of transformers, behind one face: `ImageTextModel` runs their layers itself, which
is why there are no hooks that could be left behind. What is asked of them is in `wris_lib.backbones.itm`.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from PIL import ImageFile
from torch import Tensor, nn
from transformers import BertConfig

from wris_lib.errors import WrisError

HIDDEN = -1e4  # is added to an attention score to make it nothing; half precision can hold it


@dataclass(frozen=True, kw_only=True)
class AlbefSize:
    """The sizes of an ALBEF; image and text share width and heads.

    Args:
        image_size: side of the input in pixels.
        width: of every layer.
        heads: of every attention.
        image_layers: of the vision transformer.
        text_layers: all of them.
        fusion_layer: the first text layer, from 0, with cross-attention.
        mlp_ratio: hidden units of a feed-forward layer, in widths.
        vocabulary: number of tokens.
        text_length: the most tokens of a text, [CLS] and [SEP] included.
        embed_width: of the vectors that the contrastive loss compares.
        patch_size: side of a patch in pixels.
    """

    image_size: int
    width: int
    heads: int
    image_layers: int
    text_layers: int
    fusion_layer: int
    mlp_ratio: int
    vocabulary: int
    text_length: int
    embed_width: int
    patch_size: int = 16


SIZES = {
    "toy": AlbefSize(
        image_size=256,
        width=192,
        heads=3,
        image_layers=4,
        text_layers=5,
        fusion_layer=2,
        mlp_ratio=3,
        vocabulary=256,
        text_length=48,
        embed_width=96,
        patch_size=8,
    ),
    "base": AlbefSize(
        image_size=256,
        width=768,
        heads=12,
        image_layers=12,
        text_layers=12,
        fusion_layer=6,
        mlp_ratio=4,
        vocabulary=30522,
        text_length=512,
        embed_width=256,
    ),
}


@dataclass(frozen=True)
class EncodedImages:
    """Images as the words see them: what cross-attention compares with and takes, in each layer that has it.

    Attributes:
        keys: one tensor a layer; the image's class token first, then patches row by row.
        values: likewise.
    """

    keys: list[Float[Tensor, "B heads P d"]]
    values: list[Float[Tensor, "B heads P d"]]

    def __len__(self) -> int:
        return len(self.keys[0])

    def __getitem__(self, rows: list[int] | slice) -> "EncodedImages":
        return EncodedImages([keys[rows] for keys in self.keys], [values[rows] for values in self.values])


class ImageTextModel(nn.Module, ABC):
    """What `Matcher` needs of a model: its two encoders, and text layers of BERT's build, some with cross-attention.

    Attributes:
        itm_head: from the first token's state to the logits (not matched, matched).
        first_fusion: the first layer, from 0, with cross-attention; all later ones have it, too.
    """

    itm_head: nn.Linear
    first_fusion: int

    @property
    @abstractmethod
    def text_layers(self) -> nn.ModuleList:
        """With `attention`, `crossattention` and `feed_forward_chunk`, as LAVIS and transformers name them."""

    @abstractmethod
    def embed_images(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B P C"]:
        """Class token and patches, row by row, after the vision transformer."""

    @abstractmethod
    def embed_tokens(self, ids: Int[Tensor, "E L"]) -> Float[Tensor, "E L C"]:
        """Tokens before the first text layer."""

    def read(self, ids: Int[Tensor, "E L"], mask: Bool[Tensor, "E L"]) -> Float[Tensor, "E L C"]:
        """Texts after the layers that do not see the image."""
        states = self.embed_tokens(ids)
        for layer in self.text_layers[: self.first_fusion]:
            states = layer.feed_forward_chunk(layer.attention(states, _additive(mask, states.dtype))[0])
        return states

    def offer(self, patches: Float[Tensor, "B P C"]) -> EncodedImages:
        """What images offer the words, in each layer with cross-attention."""
        fusion = [layer.crossattention.self for layer in self.text_layers[self.first_fusion :]]
        return EncodedImages(
            [_split(own.key(patches), own.num_attention_heads) for own in fusion],
            [_split(own.value(patches), own.num_attention_heads) for own in fusion],
        )

    def fuse(
        self,
        states: Float[Tensor, "E L C"],
        mask: Bool[Tensor, "E L"],
        images: EncodedImages,
        layers: range,
        visible: Bool[Tensor, "E P"] | None = None,
    ) -> Float[Tensor, "E L C"]:
        """Run some of the layers with cross-attention.

        Args:
            states: of the texts' tokens before the first of `layers`.
            mask: true on tokens.
            images: B of them; E is a multiple of B, and the first E/B texts are about the first image, and so on.
            layers: their numbers.
            visible: what of the images the words may look at; None: all.
        """
        for number in layers:
            own = self.attend(states, mask, number)
            states = self.take(number, own, self.look(number, own, images, visible), images)
        return states

    def attend(self, states: Float[Tensor, "E L C"], mask: Bool[Tensor, "E L"], number: int) -> Float[Tensor, "E L C"]:
        """A fusion layer's first part: words look at words."""
        return self.text_layers[number].attention(states, _additive(mask, states.dtype))[0]

    def look(
        self,
        number: int,
        states: Float[Tensor, "E L C"],
        images: EncodedImages,
        visible: Bool[Tensor, "E P"] | None = None,
    ) -> Float[Tensor, "E heads L P"]:
        """Its second part: how much words look at patches, after the softmax."""
        own, keys = self.text_layers[number].crossattention.self, images.keys[number - self.first_fusion]
        query = _split(own.query(states), own.num_attention_heads) * keys.shape[-1] ** -0.5
        scores = _ungroup(_group(query, len(images)) @ keys.mT, len(states))
        if visible is not None:
            scores = scores + _additive(visible, scores.dtype)
        return scores.softmax(dim=-1)

    def take(
        self,
        number: int,
        states: Float[Tensor, "E L C"],
        attention: Float[Tensor, "E heads L P"],
        images: EncodedImages,
    ) -> Float[Tensor, "E L C"]:
        """Its third part: words take from patches what they look at, and think about it."""
        layer, values = self.text_layers[number], images.values[number - self.first_fusion]
        taken = _ungroup(_group(attention, len(images)) @ values, len(states))
        return layer.feed_forward_chunk(layer.crossattention.output(taken.transpose(1, 2).flatten(2), states))


class Albef(ImageTextModel):
    """ALBEF of LAVIS's classes; tensors have the names that they have in the authors' checkpoint.

    Args:
        size: of the model, whose weights are random.

    Raises:
        WrisError: LAVIS cannot be imported.
    """

    def __init__(self, size: AlbefSize) -> None:
        super().__init__()
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # LAVIS uses timm's and setuptools' former names
                from lavis.models.med import BertForMaskedLM
                from lavis.models.vit import VisionTransformer
        except ImportError as error:
            raise WrisError(
                f"LAVIS, whose ALBEF is needed, cannot be imported ({error}); install the versions of requirements.lock"
                " with `--no-deps`, as README says."
            ) from error
        finally:
            # LAVIS tells Pillow, for the whole process, to fill up pictures that are cut short.
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
        self.size, self.first_fusion = size, size.fusion_layer
        self.visual_encoder = VisionTransformer(
            img_size=size.image_size,
            patch_size=size.patch_size,
            embed_dim=size.width,
            depth=size.image_layers,
            num_heads=size.heads,
            mlp_ratio=size.mlp_ratio,
        )
        config = BertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.heads,
            intermediate_size=size.mlp_ratio * size.width,
            max_position_embeddings=size.text_length,
            layer_norm_eps=1e-12,
            hidden_dropout_prob=0,  # only training would notice, and small models learn too little rather than too much
            attention_probs_dropout_prob=0,
            initializer_range=0.55 * size.width**-0.5,  # BERT's 0.02 at BERT's width
        )
        # LAVIS's own, which transformers' configuration does not know.
        config.update(
            {
                "fusion_layer": size.fusion_layer,
                "encoder_width": size.width,
                "add_cross_attention": True,
                "add_type_embeddings": False,
            }
        )
        self.text_encoder = BertForMaskedLM(config)
        self.vision_proj = nn.Linear(size.width, size.embed_width)
        self.text_proj = nn.Linear(size.width, size.embed_width)
        self.itm_head = nn.Linear(size.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    @property
    def text_layers(self) -> nn.ModuleList:
        return self.text_encoder.bert.encoder.layer

    def embed_images(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B P C"]:
        return self.visual_encoder(pixels)

    def embed_tokens(self, ids: Int[Tensor, "E L"]) -> Float[Tensor, "E L C"]:
        return self.text_encoder.bert.embeddings(input_ids=ids)


class Blip(ImageTextModel):
    """BLIP's matching model, whose text layers all have cross-attention.

    Args:
        model: transformers' `BlipForImageTextRetrieval`.
    """

    first_fusion = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.itm_head = model, model.itm_head

    @property
    def text_layers(self) -> nn.ModuleList:
        return self.model.text_encoder.encoder.layer

    def embed_images(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B P C"]:
        return self.model.vision_model(pixels).last_hidden_state

    def embed_tokens(self, ids: Int[Tensor, "E L"]) -> Float[Tensor, "E L C"]:
        return self.model.text_encoder.embeddings(input_ids=ids)


def _additive(allowed: Bool[Tensor, "E n"], dtype: torch.dtype) -> Float[Tensor, "E 1 1 n"]:
    return (~allowed)[:, None, None, :].to(dtype) * HIDDEN


def _split(states: Float[Tensor, "E n C"], heads: int) -> Float[Tensor, "E heads n d"]:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _group(rows: Float[Tensor, "E heads L d"], images: int) -> Float[Tensor, "B heads TL d"]:
    """The tokens of all texts about an image in one long row, so that keys and values need not be copied."""
    return rows.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)


def _ungroup(rows: Float[Tensor, "B heads TL d"], texts: int) -> Float[Tensor, "E heads L d"]:
    return rows.unflatten(2, (texts // len(rows), -1)).transpose(1, 2).flatten(0, 1)
