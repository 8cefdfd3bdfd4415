"""A trained generator as a file: safetensors, with what it was built and trained for written beside the tensors."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from wris_lib.backbones.checkpoints import Stack, checkpoint_path, expected_sha256, verify
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.features import fingerprint
from wris_lib.errors import WrisError
from wris_lib.files import atomic_write
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.model import PointGenerator

FORMAT = "wris-ppt-1"
TRAIN = "python -m wris_lib train ppt"


def save_generator(generator: PointGenerator, clip: Clip, path: Path) -> None:
    """Write a generator in half precision."""
    about = {"format": FORMAT, "config": asdict(generator.config), "clip": _identity(clip)}
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in generator.state_dict().items()}
    with atomic_write(path) as file:
        file.write(save(state, {"ppt": json.dumps(about)}))  # one entry: several would be written in random order


def load_generator(path: Path, clip: Clip) -> PointGenerator:
    """Read a generator that was trained on what this CLIP sees.

    Raises:
        WrisError: there is no such file; it is damaged, of another format, or was trained with another CLIP.
    """
    path = Path(path)
    if not path.is_file():
        raise WrisError(f"there is no generator at {path}; `{TRAIN}` makes one.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("ppt", "{}"))
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WrisError(f"{path} is damaged, or no safetensors file; make it anew with `{TRAIN}`.") from error
    if about.get("format") != FORMAT:
        raise WrisError(
            f"{path} has the format {about.get('format')!r}, but this version of the library reads {FORMAT!r}; make it"
            f" anew with `{TRAIN}`."
        )
    if about["clip"] != _identity(clip):
        raise WrisError(
            f"{path} was trained on the features of another CLIP than the one at hand, and would point anywhere; train"
            f" it anew with `{TRAIN}`."
        )
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in about["config"].items()}
    try:
        generator = PointGenerator(GeneratorConfig(**sizes))
        generator.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise WrisError(
            f"{path} does not hold the generator that it describes; make it anew with `{TRAIN}`."
        ) from error
    return generator


def find_weights(stack: Stack) -> Path:
    """The stack's generator, with its hash verified.

    Raises:
        WrisError: the stack has none; the file is missing or damaged.
    """
    if stack.ppt is None:
        raise WrisError(
            f"no generator comes with the {stack.name} stack; train one with `{TRAIN} --stack {stack.name} --data"
            " refcoco:train --objects FOLDER`."
        )
    path = checkpoint_path(stack.ppt)
    verify(path, expected_sha256(stack.ppt))
    return path


def _identity(clip: Clip) -> str:
    """Hash of CLIP's weights."""
    return fingerprint(clip.model, ())["weights"]
