"""PPT's four datasets for a stack, made once and kept in the cache.

Asking CLIP + SAM for every noun phrase of every expression takes minutes, and the answers never change. They are kept
in files whose names are hashes of all that they depend on: pictures, expressions, weights, code. Images are not kept:
D_sem's and D_ref's are composed anew, and from a seed, whenever one is asked for.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from wris_lib.backbones.checkpoints import checkpoint_path, get_stack
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.features import CLIP_CODE, PACKAGES, SAM_CODE, image_files
from wris_lib.backbones.language import __file__ as language_code
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.sam import Segmenter, load_sam
from wris_lib.data.images import __file__ as images_code
from wris_lib.data.objects import ObjectImage
from wris_lib.data.refer import Expression
from wris_lib.files import atomic_write, cache_dir, readable_errors, sha256
from wris_lib.methods import clip_sam
from wris_lib.methods.clip_sam import ClipSam, PointRule
from wris_lib.methods.ppt import labels, pseudo
from wris_lib.methods.ppt.compose import ObjectPicture
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.labels import LabelledExpressions
from wris_lib.methods.ppt.pseudo import (
    LabelledImages,
    from_expressions,
    label_objects,
    referring,
    semantic,
    thumbnail,
)
from wris_lib.methods.ppt.training import TrainingData, encode

# In an object-centric picture one object is all there is: many points are safe. Measured on 200 pictures of ToyObjects
# train, by class name, with the CLIP of one round: 84.5 mIoU, as many negative points besides 83.0, with the baseline's
# rule 66.6.
OBJECT_RULE = PointRule(threshold=0.6, most=60, negatives=False)
SIZE = 256  # pixels a side of composed images
COPIES = 2  # of every object-centric picture in D_sem
SCENES = 9000  # in D_ref
CODE = (*CLIP_CODE, *SAM_CODE, language_code, images_code, clip_sam.__file__, labels.__file__, pseudo.__file__)


def training_data(
    stack: str, config: GeneratorConfig, items: Sequence[Expression], objects: Sequence[ObjectImage], seed: int = 0
) -> TrainingData:
    """All four datasets of a stack, encoded; from the cache as far as it has them.

    Args:
        stack: "toy" or "paper".
        config: of the generator to be trained: it says which of CLIP's stages are needed.
        items: images with expressions, for H.
        objects: object-centric pictures, for D_sem and D_ref.
        seed: of what is composed.
    """
    clip, segmenter = load_clip(stack), load_sam(stack)
    side = segmenter.sam.prompt_encoder.mask_input_size[0]
    pictures = object_pictures(stack, clip, segmenter, objects)
    d_sem, d_ref = semantic(pictures, COPIES, SIZE, side, seed), referring(pictures, SCENES, SIZE, side, seed)
    return encode(clip, segmenter, config, candidates(stack, clip, segmenter, items), d_sem, d_ref)


def object_pictures(
    stack: str, clip: Clip, segmenter: Segmenter, objects: Sequence[ObjectImage]
) -> list[ObjectPicture]:
    """`pseudo.label_objects`."""

    def make() -> dict[str, np.ndarray]:
        found = label_objects(ClipSam(clip, segmenter, rule=OBJECT_RULE), objects, SIZE)
        bits = [np.packbits(picture.mask) for picture in found]
        return {"numbers": np.array([picture.number for picture in found]), "bits": np.concatenate(bits)}

    samples = [(sha256(each.image_path), each.class_name) for each in objects]
    content = _kept("objects", stack, [samples, SIZE, str(OBJECT_RULE)], make)
    pictures, start = [], 0
    for number in content["numbers"].tolist():
        image = np.array(thumbnail(objects[number], SIZE))
        shape, count = image.shape[:2], image.shape[0] * image.shape[1]
        end = start + (count + 7) // 8
        mask = np.unpackbits(content["bits"][start:end], count=count).astype(bool).reshape(shape)
        pictures.append(ObjectPicture(image, mask, objects[number].class_name, number))
        start = end
    return pictures


def candidates(stack: str, clip: Clip, segmenter: Segmenter, items: Sequence[Expression]) -> LabelledImages:
    """`pseudo.from_expressions`."""
    side = segmenter.sam.prompt_encoder.mask_input_size[0]
    paths = list(dict.fromkeys(item.image_path for item in items))
    rows = image_files(paths)

    def make() -> dict[str, np.ndarray]:
        found = from_expressions(ClipSam(clip, segmenter), load_parser(stack), items, side)
        arrays = {field.name: np.asarray(getattr(found.labels, field.name)) for field in fields(found.labels)}
        return arrays | {"notes": np.array(json.dumps(found.notes))}

    keys = dict(zip(paths, rows.keys, strict=True))
    samples = [(keys[item.image_path], item.expression) for item in items]
    content = _kept("expressions", stack, [samples, side], make)
    notes = json.loads(str(content.pop("notes")))
    content["expressions"] = tuple(content["expressions"].tolist())
    return LabelledImages(rows, LabelledExpressions(**content | {"side": int(content["side"])}), notes)


def _kept(name: str, stack: str, about: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from the cache, made when they are not there. A second process waits, and finds the work done."""
    models = get_stack(stack)
    used = (models.clip, models.sam, models.parser)
    content = {
        "about": about,
        "weights": [version(part) if isinstance(part, str) else sha256(checkpoint_path(part)) for part in used],
        "code": [sha256(Path(file)) for file in CODE],
        "versions": {package: version(package) for package in (*PACKAGES, "spacy")},
    }
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    path = cache_dir() / "ppt" / f"{name}-{digest}.npz"
    with readable_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            arrays = make()
            with atomic_write(path) as file:
                np.savez(file, **arrays)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
