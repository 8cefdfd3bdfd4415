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
from wris_lib.backbones.checkpoints import get_stack
from wris_lib.backbones.trained import save_trained
from wris_lib.errors import WrisError
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.weights import find_weights, load_generator, save_generator

tokenizer, clip = test_clip.tokenizer, test_ppt_training.clip


@pytest.fixture
def path(clip, tmp_path):
    save_generator(spread(tiny_generator()), clip, tmp_path / "ppt.safetensors")
    return tmp_path / "ppt.safetensors"


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


def test_a_description_of_something_else(path, clip):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["wris"])
    about["config"]["new"] = 1
    save_file(load_file(path), path, {"wris": json.dumps(about)})
    with pytest.raises(WrisError, match="does not hold the model that it describes; make it anew with `.* train ppt`"):
        load_generator(path, clip)


def test_weights_of_another_method(clip, path):
    save_trained(tiny_generator(), "pcnet", clip, path)
    with pytest.raises(WrisError, match=r"is of format and method .*'pcnet'\), but .*'ppt'\) is needed; make it anew"):
        load_generator(path, clip)


# --------------------------------------------------------------------------------------------------- a stack's weights


def test_the_stacks_generator_is_found():
    assert find_weights(get_stack("toy")).name == "ppt.safetensors"


def test_a_stack_without_a_generator():
    command = "python -m wris_lib train ppt --stack paper --data refcoco:train --objects FOLDER"
    with pytest.raises(WrisError, match=f"no trained ppt comes with the paper stack; train one with `{command}`"):
        find_weights(get_stack("paper"))
