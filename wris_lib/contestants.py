"""Who takes part in the benchmark: every method with its variants, and the oracle."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from wris_lib.backbones.checkpoints import checkpoint_path, get_stack
from wris_lib.backbones.sam import load_sam
from wris_lib.data.images import check_expression
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError
from wris_lib.methods import METHODS, Method, get_method, load_method

ORACLE = "sam box"

# An image and the questions about it -> for each question a mask and a response map, or None in place of a map.
Predict = Callable[[Image.Image, list[EvaluationItem]], list[tuple[np.ndarray, np.ndarray | None]]]


@dataclass(frozen=True)
class Contestant:
    """One row of the table: a method with its options. Without a method it is the oracle.

    The oracle is SAM told the referent's true box, and so what a perfect pointer could reach.
    """

    name: str
    method: str | None = None
    options: dict[str, Hashable] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Of a `Stack`, those whose weights its answers depend on."""
        return get_method(self.method).parts if self.method else ("sam",)

    @property
    def supervision(self) -> str:
        """What it was told about the task."""
        return METHODS[self.method].supervision if self.method else "the referent's true box"

    @property
    def learned(self) -> str | None:
        """The method's attribute that holds the module trained for the task; None: nothing was."""
        return METHODS[self.method].learned if self.method else None

    def load(self, stack: str) -> Predict:
        """Build it from a stack's models."""
        if self.method is None:
            sam = load_sam(stack)

            def predict(image: Image.Image, items: list[EvaluationItem]):
                embedded = sam.embed(image)
                boxes = torch.from_numpy(np.stack([item.box for item in items]))
                # A box leaves little doubt, and for such prompts upstream advises the single mask.
                masks = sam.best_mask(embedded, sam.decode(embedded, boxes=boxes, multimask=False))
                return [(mask, None) for mask in masks]

            return predict
        return predictor(load_method(self.method, stack, **self.options))


def predictor(method: Method) -> Predict:
    """A method as the benchmark asks it."""

    def predict(image: Image.Image, items: list[EvaluationItem]):
        answers = method.predict(image, [check_expression(item.expression) for item in items])
        return [(answer.mask, answer.response_map) for answer in answers]

    return predict


def contestants(name: str) -> list[Contestant]:
    """The rows that a name stands for.

    Args:
        name: a method ("clip_sam", meaning all its variants), one variant ("clip_sam plain"), or "sam box", the
            oracle.

    Raises:
        WrisError: nothing has that name.
    """
    if name == ORACLE:
        return [Contestant(ORACLE)]
    method = name.split(" ")[0]
    rows = []
    if method in METHODS:
        variants = get_method(method).variants
        rows = [Contestant(f"{method} {variant}".strip(), method, options) for variant, options in variants.items()]
    chosen = [row for row in rows if name in (method, row.name)]
    if not chosen:
        known = [*METHODS, *(row.name for row in rows), ORACLE]
        raise WrisError(f"the benchmark has no method {name!r}; choose from: {', '.join(known)}.")
    return chosen


def everyone(stack: str) -> tuple[list[str], dict[str, str]]:
    """All that a stack has the models for.

    A model that a stack does not have by design (nobody has published PPT's weights for the paper's) leaves a method
    out. A model that should be there and is not is an error, which would otherwise look like a shorter table.

    Args:
        stack: "toy" or "paper".

    Returns:
        Names as `contestants` takes them, the oracle last; and by the name of each other method why it is left out.

    Raises:
        WrisError: no such stack, or weights are missing.
    """
    chosen, names, left_out = get_stack(stack), [], {}
    for name in METHODS:
        parts = get_method(name).parts
        if lacking := [part for part in parts if getattr(chosen, part) is None]:
            left_out[name] = f"the {chosen.name} stack has no {' and no '.join(lacking)} weights"
            continue
        names.append(name)
        for part in parts:
            if not isinstance(checkpoint := getattr(chosen, part), str):
                checkpoint_path(checkpoint)
    return [*names, ORACLE], left_out
