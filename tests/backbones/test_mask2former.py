"""Mask2Former's proposals, of a tiny one with random weights, saved and found as transformers does it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from wris_lib.backbones.checkpoints import STACKS
from wris_lib.backbones.mask2former import SIZE, THRESHOLD, load_mask2former, mask2former_proposer, masks
from wris_lib.backbones.proposals import load_proposer
from wris_lib.errors import WrisError
from wris_lib.methods import load_method

SMALL = {"shortest_edge": 64, "longest_edge": 96}
QUERIES = 7


@pytest.fixture(scope="module")
def model() -> Mask2FormerForUniversalSegmentation:
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=QUERIES,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # untrained, it would find every mask everywhere
        for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
            parameter *= 30
    return model


@pytest.fixture(scope="module")
def processor() -> Mask2FormerImageProcessor:
    return Mask2FormerImageProcessor(size={"height": 384, "width": 384}, size_divisor=32)


@pytest.fixture
def stack(model, processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The paper stack has the tiny one, in a folder, and shows it small pictures."""
    for edge, pixels in SMALL.items():
        monkeypatch.setitem(SIZE, edge, pixels)
    folder = tmp_path / "mask2former"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    monkeypatch.setitem(STACKS, "paper", replace(STACKS["paper"], mask2former=str(folder)))
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(90, 60), (33, 200), (1, 1), (96, 1)])
def test_masks_are_as_many_as_queries_and_of_the_images_size(model, processor, size):
    found = masks(model, processor, picture(*size), SMALL)
    assert found.shape == (QUERIES, *size[::-1]) and found.dtype == bool


def test_masks_by_hand_the_surest_first(model, processor):
    """The image is shown at a size whose sides are multiples of 32, so nothing is padding."""
    image = picture(96, 64)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        said = model(((pixels - mean) / deviation)[None])
    logits = interpolate(said.masks_queries_logits, (64, 96), mode="bilinear")[0].numpy()
    exp = np.exp(said.class_queries_logits[0].numpy())
    surest = (exp / exp.sum(axis=1, keepdims=True))[:, :3].max(axis=1)
    expected = (1 / (1 + np.exp(-logits)) > THRESHOLD)[np.argsort(-surest)]
    assert len(np.unique(surest)) == QUERIES
    found = masks(model, processor, image, SMALL)
    assert (found == expected).mean() > 0.999 and found.any() and not found.all()


def test_a_very_thin_image(model, processor):
    with pytest.raises(WrisError, match="^an image of 200×2 pixels is too thin for Mask2Former; crop or pad it.$"):
        masks(model, processor, picture(200, 2), SMALL)


def test_proposals_are_kept_apart_by_weights_and_size(model, processor, tmp_path, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    first = mask2former_proposer(model, processor, SMALL)
    expected = first(picture(90, 60))
    with monkeypatch.context() as patch:
        patch.setattr(Mask2FormerForUniversalSegmentation, "forward", None)  # it is not asked again
        assert np.array_equal(mask2former_proposer(model, processor, SMALL)(picture(90, 60)), expected)
    folders = {first.folder, mask2former_proposer(model, processor).folder}
    other = Mask2FormerForUniversalSegmentation(model.config)
    assert len(folders | {mask2former_proposer(other, processor, SMALL).folder}) == 3


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pytorch_model.bin"])
def test_it_is_found_as_transformers_saves_it(stack, model, processor, pickled, tmp_path, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    if pickled:
        model.save_pretrained(stack, safe_serialization=False)
        (stack / "model.safetensors").unlink()
    found = load_mask2former("paper", "cpu")(picture(90, 60))
    assert np.array_equal(found, masks(model, processor, picture(90, 60), SMALL))


def test_a_hostile_pickle_is_not_executed(stack, tmp_path):
    class Hostile:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "executed"), "w"))

    (stack / "model.safetensors").unlink()
    torch.save({"model": Hostile()}, stack / "pytorch_model.bin")
    with pytest.raises(WrisError, match="^Mask2Former cannot be loaded from this machine"):
        load_mask2former("paper", "cpu")
    assert not (tmp_path / "executed").exists()


def test_what_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    name = "facebook/mask2former-swin-large-coco-panoptic"
    expected = f"^Mask2Former cannot be loaded from this machine; get it with `huggingface-cli download {name}`.$"
    with pytest.raises(WrisError, match=expected):
        load_proposer("mask2former", "paper")
    with pytest.raises(WrisError, match="^the toy stack has no Mask2Former; take the proposals of SAM.$"):
        load_proposer("mask2former", "toy")


def test_an_old_transformers_is_not_trusted_with_pickles(stack, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.26.1")
    with pytest.raises(WrisError, match="^transformers 4.26.1 would execute .*; for Mask2Former use the environment"):
        load_mask2former("paper")


@pytest.mark.parametrize("name", ["iterprime", "gl_clip", "sam_clip"])
def test_methods_choose_among_them(stack, name, monkeypatch, tmp_path):
    """With the toy models in the place of the others."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(STACKS, "toy", replace(STACKS["toy"], mask2former=str(stack)))
    image = picture(90, 60)
    (prediction,) = load_method(name, "toy", proposals="mask2former", device="cpu").predict(image, ["the red dog"])
    proposed = load_proposer("mask2former", "toy", "cpu")(image)
    assert any(np.array_equal(prediction.mask, mask) for mask in proposed)
