"""Wrong answers for the checks of exercises."""

import inspect
from collections.abc import Callable


def changed(function: Callable, *replacements: str) -> Callable:
    """A right answer with a mistake in it: pairs of old and new text, replaced in the function's source."""
    source = inspect.getsource(function)
    for old, new in zip(replacements[::2], replacements[1::2], strict=True):
        assert old in source
        source = source.replace(old, new)
    names = dict(function.__globals__)
    exec(source, names)
    return names[function.__name__]


def untouched(*_, **__):
    """A stub that nobody has filled."""
    raise NotImplementedError
