"""Every method is the same kind of thing: an image and an expression go in, a `Prediction` comes out.

A method is a subclass of `Method` in a folder of its own and one line in `METHODS`. The benchmark, the pictures
and the widgets are written once, against that.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from wris_lib.backbones.checkpoints import Checkpoint, Stack, get_stack, place_of
from wris_lib.data.images import check_expression, load_image
from wris_lib.errors import WrisError


@dataclass(frozen=True)
class Listed:
    """A line of `METHODS`.

    Attributes:
        place: "module:class"; it is imported when it is asked for, since the models behind it take seconds.
        supervision: what it was told about the task. What CLIP, SAM, ALBEF and the language models were trained on
            is not counted, since every method takes them as they are.
        learned: the attribute that holds the module trained for the task; None: nothing was.
    """

    place: str
    supervision: str = "none"
    learned: str | None = None


PAIRS = "pairs of image and expression"
METHODS = {
    "clip_sam": Listed("wris_lib.methods.clip_sam:ClipSam"),
    "ppt": Listed("wris_lib.methods.ppt:Ppt", f"{PAIRS}, and class names of object-centric images", "generator"),
    "tris": Listed("wris_lib.methods.pcnet:Tris", PAIRS, "crm"),
    "pcnet": Listed("wris_lib.methods.pcnet:PcNet", PAIRS, "crm"),
    "iterprime": Listed("wris_lib.methods.iterprime:IterPrime"),
    "gl_clip": Listed("wris_lib.methods.clip_proposals:GlClip"),
    "sam_clip": Listed("wris_lib.methods.clip_proposals:SamClip"),
}


@dataclass
class Stage:
    """One step on a method's way to its mask, kept to be looked at. What a step does not have is None.

    Attributes:
        name: what the step is.
        note: one line about what came out.
        response_map: [h, w], at whatever resolution the step has it.
        points: [N, 2] as (x, y) in image pixels.
        point_labels: [N], 1 for "belongs to it", 0 for "does not".
        masks: [K, H, W] candidates, at image size.
        scores: [K], one for each candidate.
    """

    name: str
    note: str = ""
    response_map: Float[np.ndarray, "h w"] | None = None
    points: Float[np.ndarray, "n 2"] | None = None
    point_labels: Int[np.ndarray, "n"] | None = None
    masks: Bool[np.ndarray, "k H W"] | None = None
    scores: Float[np.ndarray, "k"] | None = None


@dataclass
class Prediction:
    """What a method says about one expression.

    Attributes:
        mask: [H, W] at image size, true on the predicted referent.
        response_map: [H, W] at image size, in [0, 1]: how strongly each pixel answers to the expression.
        points: [N, 2] as (x, y) in image pixels, the prompts given to SAM.
        point_labels: [N], 1 for positive points, 0 for negative ones.
        score: the method's own confidence in the mask.
        trace: the stages that led to it.
    """

    mask: Bool[np.ndarray, "H W"]
    response_map: Float[np.ndarray, "H W"]
    points: Float[np.ndarray, "n 2"]
    point_labels: Int[np.ndarray, "n"]
    score: float
    trace: list[Stage] = field(default_factory=list)


class Method(ABC):
    """What each class named in `METHODS` derives from.

    Attributes:
        variants: the option sets that the benchmark compares, by name.
        parts: of a `Stack`, those whose weights its predictions depend on.
    """

    variants: ClassVar[dict[str, dict[str, Hashable]]]
    parts: ClassVar[tuple[str, ...]] = ("clip", "sam")

    @classmethod
    @abstractmethod
    def load(cls, stack: str) -> "Method":
        """Build it from the models of a stack; options of the method's own follow."""

    @abstractmethod
    def predict(self, image: Image.Image, expressions: list[str]) -> list[Prediction]:
        """One prediction for each expression about one RGB image."""


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        WrisError: there is no method of that name.
    """
    if name not in METHODS:
        raise WrisError(f"there is no method {name!r}; choose one of: {', '.join(METHODS)}.")
    return resolve_name(METHODS[name].place)


@lru_cache(maxsize=2)  # a notebook that segments in every cell loads the models once
def _load(cls: type[Method], stack: str, options: tuple[tuple[str, Hashable], ...], written: tuple[int, ...]) -> Method:
    """`written` only tells apart what was trained again."""
    return cls.load(stack, **dict(options))


def _written(cls: type[Method], stack: Stack, weights: str | None) -> tuple[int, ...]:
    """When the files of its weights were written: after another training a method is loaded anew."""
    parts = [part for name in cls.parts if isinstance(part := getattr(stack, name), Checkpoint)]
    files = [*map(place_of, parts), *([Path(weights)] if weights else [])]
    return tuple(file.stat().st_mtime_ns for file in files if file.exists())


def load_method(name: str, stack: str | None = None, **options: Hashable | list) -> Method:
    """A method, ready to predict. The two used last are kept in memory, until their weights are written anew.

    Args:
        name: key of `METHODS`.
        stack: "toy" or "paper"; by default $WRIS_STACK, or "toy".
        options: the method's own, see its `load`.

    Raises:
        WrisError: no such method, stack or option, or the stack's weights are missing or damaged.
    """
    cls = get_method(name)
    known = [option for option in inspect.signature(cls.load).parameters if option != "stack"]
    if unknown := [option for option in options if option not in known]:
        raise WrisError(f"{name} has no option {unknown[0]!r}; it has: {', '.join(known) or 'none'}.")
    hashable = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    models = get_stack(stack)
    return _load(cls, models.name, tuple(sorted(hashable.items())), _written(cls, models, options.get("weights")))


def segment(
    image: str | Path | Image.Image | np.ndarray,
    expression: str | list[str],
    method: str = "clip_sam",
    stack: str | None = None,
    **options: Hashable | list,
) -> Prediction | list[Prediction]:
    """Find the object that an expression refers to.

    Args:
        image: a file, a PIL image, or an array [H, W, 3] or [H, W] (uint8, or float in [0, 1]).
        expression: "the man in the green shirt"; or a list of such, for which the image is encoded only once.
        method: key of `METHODS`.
        stack: "toy" or "paper"; by default $WRIS_STACK, or "toy".
        options: the method's own, such as kind="plain" for clip_sam.

    Returns:
        One prediction; for a list of expressions a list of predictions in its order.

    Raises:
        WrisError: no such method, stack or option, the image cannot be read, an expression is empty, or the
            stack's weights are missing or damaged.
    """
    expressions = [expression] if isinstance(expression, str) else list(expression)
    checked = [check_expression(text) for text in expressions]
    picture = load_image(image)
    predictions = load_method(method, stack, **options).predict(picture, checked)
    return predictions[0] if isinstance(expression, str) else predictions
