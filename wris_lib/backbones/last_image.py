"""The last image is remembered: people, and widgets, ask several things about a picture, one after the other."""

from collections.abc import Callable
from typing import Any

from PIL import Image


class LastImage:
    """What a frozen model makes of an image; asked about the same pixels again, it remembers.

    Args:
        encode: an image's features. Whoever gets them must not change them.
    """

    def __init__(self, encode: Callable[[Image.Image], Any]) -> None:
        self._encode = encode
        self._last: tuple[Any, Any] | None = None

    def __call__(self, image: Image.Image) -> Any:
        content = (image.mode, image.size, image.tobytes())
        if self._last is None or self._last[0] != content:
            self._last = content, self._encode(image)
        return self._last[1]
