"""A generator as a file: what comes back is what was written, and whatever does not fit gets a sentence."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_ppt_training import CONFIG, spread, tiny_generator
from wris_lib.backbones import checkpoints
from wris_lib.backbones.checkpoints import get_stack, record_sha256
from wris_lib.backbones.clip import Clip
from wris_lib.errors import WrisError
from wris_lib.methods.ppt import weights
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.weights import find_weights, load_generator, save_generator

tokenizer, clip = test_clip.tokenizer, test_ppt_training.clip


@pytest.fixture
def path(clip, tmp_path):
    save_generator(spread(tiny_generator()), clip, tmp_path / "ppt.safetensors")
    return tmp_path / "ppt.safetensors"


def with_tensors(path, state) -> None:
    """The same file with other tensors."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(state, path, about)


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, stages=(2, 4), visual_channels=(24, 24), queries=5, anchored=False, fuse_vision=True)],
)
def test_what_comes_back_is_what_was_written(clip, tmp_path, config):
    torch.manual_seed(0)
    generator = PointGenerator(config)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    save_generator(generator, clip, tmp_path / "a.safetensors")
    loaded = load_generator(tmp_path / "a.safetensors", clip)
    assert loaded.config == config and [type(value) for value in loaded.config.stages] == [*map(type, config.stages)]
    assert loaded.state_dict().keys() == before.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name].half().float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())  # left as it was


def test_the_file_is_small(path):
    state = load_file(path)
    numbers = sum(tensor.numel() for tensor in tiny_generator().state_dict().values())
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
    assert sum(tensor.numel() for tensor in state.values()) == numbers
    assert path.stat().st_size < 2 * numbers + 20_000


def test_half_precision_hardly_moves_a_prompt(path, clip):
    torch.manual_seed(1)
    inputs = [torch.randn(1, c, 4, 4) for c in CONFIG.visual_channels], torch.randn(2, 5, 16)
    there, image = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    directions = torch.randn(2, CONFIG.visual_channels[-1])
    generators = spread(tiny_generator()), load_generator(path, clip)
    with torch.no_grad():
        written, read = (generator(*inputs, there, image, directions) for generator in generators)
    for a, b in zip(vars(written).values(), vars(read).values(), strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


def test_nothing_is_left_of_a_write_that_failed(clip, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(weights, "save", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        save_generator(tiny_generator(), clip, tmp_path / "new" / "ppt.safetensors")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_there_is_no_file(clip, tmp_path):
    with pytest.raises(WrisError, match="there is no generator at .*none.safetensors; `python -m wris_lib train ppt`"):
        load_generator(tmp_path / "none.safetensors", clip)
    with pytest.raises(WrisError, match="there is no generator at"):
        load_generator(tmp_path, clip)


@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_a_damaged_file(path, clip, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WrisError, match="ppt.safetensors is damaged, or no safetensors file; make it anew"):
        load_generator(path, clip)


def test_another_format(clip, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(weights, "FORMAT", "wris-ppt-0")
        save_generator(tiny_generator(), clip, tmp_path / "old")
    with pytest.raises(
        WrisError, match="has the format 'wris-ppt-0', but this version of the library reads 'wris-ppt-"
    ):
        load_generator(tmp_path / "old", clip)


@pytest.mark.parametrize(
    "about, complaint",
    [("{", "is damaged, or no safetensors file"), ({"new": 1}, "does not hold the generator that it describes")],
)
def test_a_file_with_another_description(path, clip, about, complaint):
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["ppt"])
    if isinstance(about, dict):
        about = json.dumps(described | {"config": described["config"] | about})
    save_file(load_file(path), path, {"ppt": about})
    with pytest.raises(WrisError, match=f"ppt.safetensors.* {complaint}"):
        load_generator(path, clip)


def test_a_file_of_something_else(path, clip):
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(WrisError, match="has the format None"):
        load_generator(path, clip)


def test_another_clip(path, clip, tokenizer):
    load_generator(path, Clip(test_clip.tiny_model(), tokenizer, dense_size=32, device="cpu"))  # equal weights
    for part in ("visual.conv1.weight", "token_embedding.weight"):
        model = test_clip.tiny_model()
        with torch.no_grad():
            model.get_parameter(part).flatten()[7] += 1e-3
        other = Clip(model, tokenizer, dense_size=32, device="cpu")
        with pytest.raises(WrisError, match="was trained on the features of another CLIP .* train it anew"):
            load_generator(path, other)


@pytest.mark.parametrize("change", ["less", "more", "shape"])
def test_tensors_that_are_not_the_described_ones(path, clip, change):
    state = load_file(path)
    if change == "less":
        state.pop("score_head.0.bias")
    elif change == "more":
        state["extra"] = torch.zeros(3)
    else:
        state["score_head.0.bias"] = torch.zeros(3)
    with_tensors(path, state)
    with pytest.raises(WrisError, match="does not hold the generator that it describes; make it anew"):
        load_generator(path, clip)


# --------------------------------------------------------------------------------------------------- a stack's weights


def test_the_stacks_file_is_found_and_checked(path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WEIGHTS", path.parent)
    stack = replace(get_stack("toy"), ppt=checkpoints.Checkpoint(file="ppt.safetensors"))
    with pytest.raises(WrisError, match="SHA256SUMS has no line for ppt.safetensors"):
        find_weights(stack)
    record_sha256(path)
    assert find_weights(stack) == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WrisError, match="ppt.safetensors is damaged or not the file it should be"):
        find_weights(stack)
    path.unlink()
    with pytest.raises(WrisError, match="ppt.safetensors is missing"):
        find_weights(stack)


def test_a_stack_without_a_generator():
    message = "no generator comes with the paper stack; train one with `python -m wris_lib train ppt --stack paper"
    with pytest.raises(WrisError, match=message):
        find_weights(get_stack("paper"))
