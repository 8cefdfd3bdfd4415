"""What a method has trained on frozen features, as a file: safetensors, with the sizes written beside the tensors."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from wris_lib.backbones.checkpoints import Stack, checkpoint_path, expected_sha256, verify
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.features import fingerprint
from wris_lib.errors import WrisError
from wris_lib.files import atomic_write

FORMAT = "wris-trained-1"
M = TypeVar("M", bound=nn.Module)


def save_trained(model: nn.Module, method: str, clip: Clip, path: Path) -> None:
    """Write a model in half precision.

    Args:
        model: with a dataclass `config`.
        method: that it belongs to.
        clip: on whose features it was trained.
        path: of the file.
    """
    about = {"format": FORMAT, "method": method, "config": asdict(model.config), "clip": _identity(clip)}
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as file:
        file.write(save(state, {"wris": json.dumps(about)}))  # one entry: several would be written in random order


def load_trained(path: Path, method: str, clip: Clip, build: Callable[[dict[str, Any]], M], train: str) -> M:
    """Read a model that was trained on what this CLIP sees.

    Args:
        path: of the file.
        method: that it must belong to.
        clip: at hand.
        build: makes the untrained model from what its configuration says.
        train: the command that makes such a file.

    Raises:
        WrisError: there is no such file; it is damaged, of another format or method, or was trained with another CLIP.
    """
    path = Path(path)
    if not path.is_file():
        raise WrisError(f"there is no trained {method} at {path}; `{train}` makes one.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("wris", "{}"))
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WrisError(f"{path} is damaged, or no safetensors file; make it anew with `{train}`.") from error
    found = about.get("format"), about.get("method")
    if found != (FORMAT, method):
        raise WrisError(
            f"{path} is of format and method {found}, but {(FORMAT, method)} is needed; make it anew with `{train}`."
        )
    if about["clip"] != _identity(clip):
        raise WrisError(
            f"{path} was trained on the features of another CLIP than the one at hand, and would answer anything; train"
            f" it anew with `{train}`."
        )
    try:
        model = build(about["config"])
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise WrisError(f"{path} does not hold the model that it describes; make it anew with `{train}`.") from error
    return model


def find_trained(stack: Stack, part: str, train: str, more: str = "") -> Path:
    """The stack's file for a method, with its hash verified.

    Args:
        stack: that is asked.
        part: of it.
        train: the command that makes such a file.
        more: what it needs besides on the paper stack, such as " --objects FOLDER".

    Raises:
        WrisError: the stack has none; the file is missing or damaged.
    """
    checkpoint = getattr(stack, part)
    if checkpoint is None:
        raise WrisError(
            f"no trained {part} comes with the {stack.name} stack; train one with `{train} --stack {stack.name} --data"
            f" refcoco:train{more}`."
        )
    path = checkpoint_path(checkpoint)
    verify(path, expected_sha256(checkpoint))
    return path


def _identity(clip: Clip) -> str:
    """Hash of CLIP's weights."""
    return fingerprint(clip.model, ())["weights"]
