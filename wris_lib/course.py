"""What the notebooks work on: with the toy stack the toy world, with the paper stack photographs of a real dataset.

`WRIS_STACK=paper` changes the models of every notebook. Pictures have to change with them, and without a GPU a model of
full size takes seconds for each; so a notebook names what it shows on the toy stack, and asks here what that is on the
stack at hand:

    load(split("toyref:val")).items     # of "refcoco:val"
    few(80)                             # 4
    mark_cells()                        # under every cell stands from now on which stack this is

Object-centric pictures are the toy world's on both stacks, as are pictures whose parts are asked for: RefCOCO has none.

And a cell that trains can be stopped and continued (`resumable`).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
from IPython import get_ipython

from wris_lib.backbones.checkpoints import default_stack, get_stack

REAL = {"toyref": "refcoco", "toyref+": "refcoco+", "toyrefg": "refcocog"}
# With the paper stack a half or a twentieth of what the toy stack does: SAM alone looks at a picture for 20 s of CPU.
SHARE = {"cuda": 2, "cpu": 20}

T = TypeVar("T")

_stopped: dict[str, TemporaryDirectory] = {}  # of cells that were interrupted; gone with the kernel


def split(toy: str) -> str:
    """The default stack's split for one of the toy world's.

    Args:
        toy: such as "toyref:val".

    Returns:
        On the toy stack the same; on another one the split of the real dataset that it imitates, "refcoco:val", or of
        the one that `$WRIS_DATASET` names. What imitates none stays: "toyobjects:val".
    """
    dataset, _, part = toy.partition(":")
    if default_stack() == "toy" or dataset not in REAL:
        return toy
    return f"{os.environ.get('WRIS_DATASET') or REAL[dataset]}:{part}"


def few(count: int) -> int:
    """How many of something a cell can afford: `count` on the toy stack, on another one a part of that, at least 2."""
    if default_stack() == "toy":
        return count
    return min(count, max(2, count // SHARE["cuda" if torch.cuda.is_available() else "cpu"]))


def draw(items: Sequence[T], count: int, seed: int = 0) -> list[T]:
    """`few(count)` different ones at random; all, in another order, where there are no more.

    Args:
        items: to draw from.
        count: on the toy stack.
        seed: of the draw.
    """
    chosen = np.random.default_rng(seed).choice(len(items), min(few(count), len(items)), replace=False)
    return [items[index] for index in chosen]


def every(items: Sequence[T], step: int, count: int, start: int = 0) -> list[T]:
    """`few(count)` of a sequence, evenly apart: `step`, or less where the sequence is too short for that.

    Args:
        items: to choose from.
        step: on the toy stack.
        count: at most so many, on the toy stack.
        start: the first one's number.
    """
    step = max(1, min(step, len(items) // few(count)))
    return list(items[start % step :: step][: few(count)])


def named(toy: str) -> str:
    """What titles call the default stack's `split`: "ToyRef val", "refcoco val".

    Args:
        toy: one of `REAL`, and its part, such as "toyref:val".
    """
    found = split(toy)
    return found.replace("toyref", "ToyRef").replace(":", " ")


def remark() -> str:
    """A line for the head of a notebook: which stack this is, and whose figures its text tells."""
    stack = get_stack()
    if stack.name == "toy":
        return "toy stack"
    note = f" ({stack.note})" if stack.note else ""
    data = os.environ.get("WRIS_DATASET") or "RefCOCO"
    return f"{stack.name} stack{note}, scenes of {data}; the text, and figures from results/, tell of the toy stack"


def mark_cells() -> None:
    """Print `remark` under every cell of this notebook from here on, unless the stack is the toy one.

    A figure that is copied out of a notebook leaves the notebook's head behind.
    """
    shell = get_ipython()
    if shell is not None and default_stack() != "toy":
        shell.events.register("post_run_cell", _mark)  # a second time changes nothing


def _mark(result: object) -> None:
    print(f"[{remark()}]")


@contextmanager
def resumable(name: str) -> Iterator[Path]:
    """A folder for the checkpoints of a cell that trains; an interrupted cell finds them when it is run again.

    A cell that comes to its end, or fails, begins anew the next time.

    Args:
        name: the cell's, within the notebook.
    """
    kept = _stopped.pop(name, None) or TemporaryDirectory(prefix="wris-")
    try:
        yield Path(kept.name)
    except KeyboardInterrupt:
        _stopped[name] = kept
        raise
    finally:
        if name not in _stopped:
            kept.cleanup()
