"""What the checks of exercises are made of: how they try a function, and how they say what is wrong."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import wraps
from typing import Any

import numpy as np

from wris_lib.evaluate import Mask

Answer = Callable[..., Any]  # a learner's function


class Open(Exception):
    """The exercise is not done yet."""


class Wrong(Exception):
    """What is wrong in which case, and if possible why."""

    def __init__(self, complaint: str, hint: str = "") -> None:
        super().__init__(f"{complaint}: {hint}." if hint else f"{complaint}.")


def exercise(name: str) -> Callable[[Callable[[Answer], None]], Callable[[Any], bool]]:
    """Make a check out of a function that raises `Open` or `Wrong`.

    Args:
        name: of the function that the learner writes.
    """

    def decorate(body: Callable[[Answer], None]) -> Callable[[Any], bool]:
        @wraps(body)
        def check(answer: Any) -> bool:
            try:
                if not callable(answer):
                    raise Wrong(f"got {short(answer)} instead of a function; pass {name} itself, without brackets")
                body(answer)
            except Open:
                print(f"○ {name} is still open: write it above, run that cell, then this one.")
            except Wrong as wrong:
                print(f"✘ {name}: {wrong}")
            else:
                print(f"✔ {name} is right.")
                return True
            return False

        return check

    return decorate


def call(answer: Answer, case: str, *arguments: Any, hint: str = "", **options: Any) -> Any:
    """The learner's result for a case, which is named in whatever there is to complain about."""
    try:
        with np.errstate(all="ignore"):  # 0 / 0 is judged by its result
            result = answer(*deepcopy(arguments), **options)
    except NotImplementedError:
        raise Open from None
    except Exception as error:
        reason = " ".join(str(error).split())
        raise Wrong(f"{case}, it raised {type(error).__name__} ({reason})", hint) from None
    if result is None:
        raise Wrong(f"{case}, got None", "does every way through the function end in `return`?")
    return result


def short(value: Any) -> str:
    """A value in at most a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"a {type(value).__name__}"


def array_of(value: Any, complaint: str, dtype: type | None = float) -> np.ndarray:
    """What the learner gave, as an array.

    Args:
        value: it.
        complaint: where none can be made of it.
        dtype: of the array; None: its own.

    Raises:
        Wrong: none can be made.
    """
    try:
        return np.asarray(value, dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise Wrong(complaint) from None


def likely_mistake(got: Any, mistakes: Iterable[tuple[str, Any]]) -> str:
    """What the learner probably did: the first mistake that leads to just this result, if one does."""
    for mistake, result in mistakes:
        if np.shape(result) == np.shape(got) and np.allclose(got, result):
            return mistake
    return ""


def box(x0: int, y0: int, x1: int, y1: int) -> Mask:
    """A mask of 24 × 24 pixels: a box from (x0, y0) up to, but without, (x1, y1)."""
    mask = np.zeros((24, 24), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def random_box(rng: np.random.Generator) -> Mask:
    """`box` anywhere, of 4 to 19 pixels a side as far as it lies within the mask."""
    x0, y0 = rng.integers(0, 16, 2).tolist()
    width, height = rng.integers(4, 20, 2).tolist()
    return box(x0, y0, x0 + width, y0 + height)
