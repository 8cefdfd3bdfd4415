"""Weakly-supervised referring image segmentation, to read and to run."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["segment"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: whoever only makes toy scenes or asks the doctor does not pay for it.
    if name == "segment":
        from wris_lib.methods import segment

        return segment
    raise AttributeError(f"module 'wris_lib' has no attribute {name!r}")
