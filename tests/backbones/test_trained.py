"""A trained module as a file: what comes back is what was written, and whatever does not fit gets a sentence."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.backbones import test_clip
from wris_lib.backbones import checkpoints, trained
from wris_lib.backbones.checkpoints import Checkpoint, get_stack, record_sha256
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.trained import find_trained, load_trained, save_trained
from wris_lib.errors import WrisError

tokenizer = test_clip.tokenizer

TRAIN = "python -m wris_lib train toy"


@dataclass(frozen=True)
class Config:
    width: int
    kind: str = "plain"


class Model(nn.Module):
    """Anything with a configuration."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.width, 3)
        self.register_buffer("mean", torch.zeros(config.width))


def build(config: dict) -> Model:
    return Model(Config(**config))


def load(path: Path, clip: Clip, method: str = "toy") -> Model:
    return load_trained(path, method, clip, build, TRAIN)


@pytest.fixture(scope="module")
def clip(tokenizer) -> Clip:
    return Clip(test_clip.tiny_model(), tokenizer, dense_size=32, device="cpu")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model(Config(5, "odd"))
    nn.init.normal_(model.mean)
    return model


@pytest.fixture
def path(model, clip, tmp_path) -> Path:
    save_trained(model, "toy", clip, tmp_path / "toy.safetensors")
    return tmp_path / "toy.safetensors"


def about(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["wris"])


def test_what_comes_back_is_what_was_written(path, model, clip):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load(path, clip)
    assert loaded.config == model.config and loaded.state_dict().keys() == before.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name].half().float())
        assert torch.equal(before[name], model.state_dict()[name])  # left as it was
    assert about(path)["method"] == "toy" and about(path)["config"] == {"width": 5, "kind": "odd"}
    assert all(tensor.dtype == torch.float16 for tensor in load_file(path).values())


def test_the_same_weights_are_the_same_bytes(model, clip, tmp_path):
    """Otherwise the recorded hash says nothing about weights."""
    for number in range(6):
        save_trained(model, "toy", clip, tmp_path / str(number))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_nothing_is_left_of_a_write_that_failed(model, clip, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(trained, "save", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        save_trained(model, "toy", clip, tmp_path / "new" / "toy.safetensors")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_there_is_no_file(clip, tmp_path):
    with pytest.raises(WrisError, match=f"there is no trained toy at .*none.safetensors; `{TRAIN}` makes one"):
        load(tmp_path / "none.safetensors", clip)
    with pytest.raises(WrisError, match="there is no trained toy at"):
        load(tmp_path, clip)


@pytest.mark.parametrize("keep", [0, 4, 100, -20])
def test_a_damaged_file(path, clip, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        WrisError, match=f"toy.safetensors is damaged, or no safetensors file; make it anew with `{TRAIN}"
    ):
        load(path, clip)


def test_a_description_that_is_cut_short(path, clip):
    save_file(load_file(path), path, {"wris": '{"format": "wri'})
    with pytest.raises(WrisError, match="is damaged, or no safetensors file"):
        load(path, clip)


def test_another_format_or_method(path, clip, monkeypatch):
    with pytest.raises(
        WrisError, match=r"is of format and method \('wris-trained-1', 'toy'\), but .* 'other'\) is needed"
    ):
        load(path, clip, "other")
    monkeypatch.setattr(trained, "FORMAT", "wris-trained-2")
    with pytest.raises(WrisError, match=r"but \('wris-trained-2', 'toy'\) is needed; make it anew"):
        load(path, clip)


@pytest.mark.parametrize("metadata", [None, {"wris": "{}"}, {"other": "x"}])
def test_a_file_of_something_else(path, clip, metadata):
    save_file({"weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(WrisError, match=r"is of format and method \(None, None\)"):
        load(path, clip)


def test_another_clip(path, clip, tokenizer):
    load(path, Clip(test_clip.tiny_model(), tokenizer, dense_size=32, device="cpu"))  # equal weights
    for part in ("visual.conv1.weight", "token_embedding.weight"):
        changed = test_clip.tiny_model()
        with torch.no_grad():
            changed.get_parameter(part).flatten()[7] += 1e-3
        with pytest.raises(WrisError, match="trained on the features of another CLIP .* train it anew"):
            load(path, Clip(changed, tokenizer, dense_size=32, device="cpu"))


@pytest.mark.parametrize("change", ["less", "more", "shape"])
def test_tensors_that_are_not_the_described_ones(path, clip, change):
    state, wris = load_file(path), about(path)
    if change == "less":
        state.pop("layer.bias")
    else:
        state["extra" if change == "more" else "layer.bias"] = torch.zeros(7)
    save_file(state, path, {"wris": json.dumps(wris)})
    with pytest.raises(WrisError, match="does not hold the model that it describes; make it anew"):
        load(path, clip)


# ------------------------------------------------------------------------------------------------- a stack's weights


def test_the_stacks_file_is_found_and_checked(path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WEIGHTS", path.parent)
    stack = replace(get_stack("toy"), pcnet=Checkpoint(file="toy.safetensors"))
    with pytest.raises(WrisError, match="SHA256SUMS has no line for toy.safetensors"):
        find_trained(stack, "pcnet", TRAIN)
    record_sha256(path)
    assert find_trained(stack, "pcnet", TRAIN) == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WrisError, match="toy.safetensors is damaged or not the file it should be"):
        find_trained(stack, "pcnet", TRAIN)
    path.unlink()
    with pytest.raises(WrisError, match="toy.safetensors is missing"):
        find_trained(stack, "pcnet", TRAIN)


@pytest.mark.parametrize("part", ["tris", "pcnet"])
def test_a_stack_without_one(part):
    message = (
        f"no trained {part} comes with the paper stack; train one with `{TRAIN} --stack paper --data refcoco:train`"
    )
    with pytest.raises(WrisError, match=message):
        find_trained(get_stack("paper"), part, TRAIN)
