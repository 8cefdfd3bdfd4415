"""A trained generator as a file, see `backbones.trained`."""

from pathlib import Path
from typing import Any

from wris_lib.backbones.checkpoints import Stack
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.trained import find_trained, load_trained, save_trained
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.model import PointGenerator

TRAIN = "python -m wris_lib train ppt"


def save_generator(generator: PointGenerator, clip: Clip, path: Path) -> None:
    """Write a generator in half precision."""
    save_trained(generator, "ppt", clip, path)


def load_generator(path: Path, clip: Clip) -> PointGenerator:
    """Read a generator that was trained on what this CLIP sees.

    Raises:
        WrisError: there is no such file; it is damaged, of another format or method, or was trained with another CLIP.
    """
    return load_trained(path, "ppt", clip, _build, TRAIN)


def find_weights(stack: Stack) -> Path:
    """The stack's generator, with its hash verified.

    Raises:
        WrisError: the stack has none; the file is missing or damaged.
    """
    return find_trained(stack, "ppt", TRAIN, " --objects FOLDER")


def _build(config: dict[str, Any]) -> PointGenerator:
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return PointGenerator(GeneratorConfig(**sizes))
