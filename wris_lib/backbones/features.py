"""What is frozen is computed once: features of images and expressions.

A frozen model gives the same answer in every epoch, in every row of an ablation and in every notebook.

    images = image_files(paths)                                        # or Rows(keys, load): composed pictures
    patches = open_features(clip_patches(clip, (2, 4, "surgery")), images)
    embeddings = open_features(sam_embeddings(segmenter), images)
    words = open_features(clip_words(clip), texts(expressions))
    patches[[5, 0, 17]]["stage 2"]                                     # [3, 192, 16, 16], read from three places

In 16-bit floats, which are exact to 0.05 %, this takes:

    toy, 256 px         an image 98 kB a stage + 66 kB Surgery + 111 kB SAM: 3.7 GB for 10 000 with two stages;
                        an expression 2 kB: 0.1 GB for 50 000
    paper, RefCOCO      16 994 images: 5.1 GB a stage + 3.4 GB Surgery at 14×14 patches, 15.0 + 10.0 GB at 24×24;
    train               35.6 GB SAM; 120 624 expressions of 5.7 tokens on average: 0.8 GB.
                        With three stages 55 GB at 14×14, 92 GB at 24×24.

The limit, 10 GB, leaves room for two toy sets, one before and one after a change of weights. The paper's need
`WRIS_CACHE_GB`.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from wris_lib.backbones import clip as clip_module
from wris_lib.backbones import feature_store
from wris_lib.backbones import sam as sam_module
from wris_lib.backbones.clip import CONFIGS, Clip
from wris_lib.backbones.feature_store import Encoder, Rows
from wris_lib.backbones.sam import Segmenter
from wris_lib.data import images as images_module
from wris_lib.files import sha256

PACKAGES = ("torch", "open_clip_torch", "segment-anything", "numpy", "pillow")
SHARED_CODE = (__file__, feature_store.__file__, images_module.__file__)
CLIP_CODE = (clip_module.__file__, *sorted(CONFIGS.glob("*.json")))
SAM_CODE = (sam_module.__file__,)


def image_files(paths: Sequence[Path]) -> Rows:
    """Images in files, known by their bytes."""
    keys = [sha256(path) for path in tqdm(paths, "reading images", unit=" images", delay=3)]
    return Rows(keys, lambda row: images_module.load_image(paths[row]))


def texts(expressions: Sequence[str]) -> Rows:
    """Expressions, known by themselves."""
    return Rows(expressions, lambda row: expressions[row])


def clip_patches(clip: Clip, stages: Sequence[int | str], size: int | None = None) -> Encoder:
    """`Clip.patch_features` of images: [C, h, w] by the name "stage 2" for stage 2, [D, h, w] by the name "surgery".

    Args:
        clip: frozen.
        stages: numbers of blocks, or "surgery".
        size: side of CLIP's input in pixels; None: its `dense_size`.
    """
    size = size or clip.dense_size
    names = [stage if stage == "surgery" else f"stage {stage}" for stage in stages]

    def encode(images: list[Image.Image]) -> dict[str, Tensor]:
        pixels = torch.stack([clip.preprocess(image, size) for image in images])
        return dict(zip(names, clip.patch_features(pixels, stages), strict=True))

    settings = {"stages": list(stages), "size": size, "surgery_from": clip.surgery_from}
    return Encoder("clip-patches", encode, settings, fingerprint(clip.model.visual, CLIP_CODE), batch=32)


def clip_words(clip: Clip) -> Encoder:
    """Of expressions `Clip.word_features`, "words" [L, C], and `Clip.text_features`, "sentence" [D]."""

    def encode(expressions: list[str]) -> dict[str, Tensor | list[Tensor]]:
        words, mask = clip.word_features(expressions)
        return {
            "words": [row[there] for row, there in zip(words, mask, strict=True)],
            "sentence": clip.text_features(expressions),
        }

    settings = {"prompts": list(clip.prompts)}
    return Encoder("clip-words", encode, settings, fingerprint(clip.model, CLIP_CODE), batch=256)


def sam_embeddings(segmenter: Segmenter) -> Encoder:
    """Of images what `SamImage` is made of: "embedding" [c, h, w], and [2] each "original_size" and "input_size"."""

    def encode(images: list[Image.Image]) -> dict[str, Tensor]:
        embedded = [segmenter.embed(image) for image in images]
        return {
            "embedding": torch.cat([image.embedding for image in embedded]),
            "original_size": torch.tensor([image.original_size for image in embedded]),
            "input_size": torch.tensor([image.input_size for image in embedded]),
        }

    return Encoder("sam", encode, {}, fingerprint(segmenter.sam.image_encoder, SAM_CODE), batch=16)


def fingerprint(model: nn.Module, code: Sequence[str | Path]) -> dict[str, Any]:
    """What a frozen model's answers depend on besides settings, as `Encoder.origin` has it.

    Weights are hashed as they lie in memory. That says all that the checkpoint's hash would, and also tells models
    apart that came from no file.

    Args:
        model: the part of it that is used.
        code: files that say how.
    """
    weights = hashlib.sha256(str(model).encode())  # with what is in no tensor, such as QuickGELU
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    return {
        "weights": weights.hexdigest(),
        "code": [sha256(Path(file)) for file in (*SHARED_CODE, *code)],
        "versions": {package: version(package) for package in PACKAGES},
        "device": next(model.parameters()).device.type,
    }
