"""From a recorded file to a model's parameters, and never by way of a file that is not the recorded one."""

import textwrap
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wris_lib.backbones.checkpoints import Checkpoint, checkpoint_path, expected_sha256, verify
from wris_lib.errors import WrisError

State = dict[str, Tensor]


def load_weights(model: nn.Module, checkpoint: Checkpoint, convert: Callable[[State], State] | None = None) -> None:
    """Find, verify and read a checkpoint, and copy it into `model`, whose tensors it must match one by one.

    Args:
        convert: from the tensors as the file has them to those of `model`. Leave names that it does not know as
            they are: then a file made for another model is still noticed.

    Raises:
        WrisError: the file is missing, damaged, unreadable, or made for another model.
    """
    path = checkpoint_path(checkpoint)
    verify(path, expected_sha256(checkpoint))
    state = load_state(path)
    try:
        model.load_state_dict(convert(state) if convert else state)
    except RuntimeError as error:
        raise WrisError(f"{path} was made for another model: {_first_mismatch(error)}.") from error


def load_state(path: Path) -> State:
    """Read a checkpoint's tensors onto the CPU: safetensors, a pickled state dict, or a TorchScript archive.

    A pickle may hold the state dict under the key "model", beside an optimizer's and others, as ALBEF's does.
    A TorchScript archive is how OpenAI published CLIP. torch compiles the TorchScript inside while opening it, so
    `verify` the file first, as `load_weights` does.

    Raises:
        WrisError: the file cannot be read, or holds something other than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            return _load_torchscript(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        raise WrisError(f"{path} cannot be read as a checkpoint: it is damaged or another kind of file.") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WrisError(f"{path} is not a checkpoint: expected a dictionary of tensors.")
    return state


def _is_torchscript(path: Path) -> bool:
    """TorchScript archives are zip files that hold a `constants.pkl`; pickled state dicts have none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_torchscript(path: Path) -> State:
    with warnings.catch_warnings():
        # torch advises authors to publish in another format; whoever reads OpenAI's file has no choice.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        state = torch.jit.load(path, map_location="cpu").state_dict()
    numbers = {"input_resolution", "context_length", "vocab_size"}  # which OpenAI kept beside the weights
    return {name: tensor for name, tensor in state.items() if name not in numbers}


def _first_mismatch(error: RuntimeError) -> str:
    """The start of torch's long list of tensors that do not fit, without its headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[min(1, len(lines) - 1)].rstrip(". "), 200, placeholder=" …")
