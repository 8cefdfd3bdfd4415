"""What the point generator sees, against a slow average; and its cache."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.backbones import test_clip
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import open_features
from wris_lib.backbones.features import clip_patches, image_files
from wris_lib.methods.ppt import vision
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.vision import visual_encoder, visual_features

STAGES = (1, 3, "surgery")

tokenizer = test_clip.tokenizer


@pytest.fixture(scope="module")
def clip(tokenizer) -> Clip:
    return Clip(test_clip.tiny_model(), tokenizer, dense_size=32, device="cpu")


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 50), (64, 32))]


def config(zoom: int) -> GeneratorConfig:
    return GeneratorConfig(STAGES, (24, 24, 16), 16, zoom=zoom)


@pytest.mark.parametrize("zoom", [1, 2, 3])
def test_seen_larger_and_averaged(clip, images, zoom):
    found = visual_features(clip, config(zoom), images)
    for row, image in enumerate(images):
        pixels = clip.preprocess(image, 32 * zoom)[None]
        for features, direct in zip(found, clip.patch_features(pixels, STAGES), strict=True):
            assert features.shape[2:] == (4, 4) and direct.shape[2:] == (4 * zoom, 4 * zoom)
            for y, x in np.ndindex(4, 4):
                block = direct[0, :, y * zoom : (y + 1) * zoom, x * zoom : (x + 1) * zoom]
                torch.testing.assert_close(features[row, :, y, x], block.mean(dim=(1, 2)), atol=1e-4, rtol=1e-4)


def test_out_of_the_cache(clip, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    rows = image_files([tmp_path / f"{number}.png" for number in range(2)])
    store = open_features(visual_encoder(clip, config(2)), rows)
    kept = store[np.array([0, 1])]
    assert list(kept) == ["stage 1", "stage 3", "surgery"]
    for features, direct in zip(kept.values(), visual_features(clip, config(2), images), strict=True):
        torch.testing.assert_close(features.float(), direct, atol=5e-3, rtol=5e-3)
    folders = {open_features(visual_encoder(clip, config(zoom)), rows).folder for zoom in (1, 2, 3)}
    assert len(folders | {open_features(clip_patches(clip, STAGES), rows).folder}) == 4


def test_other_code_is_another_encoder(clip, tmp_path, monkeypatch):
    before = visual_encoder(clip, config(2)).origin
    changed = tmp_path / "vision.py"
    changed.write_text("something else")
    monkeypatch.setattr(vision, "__file__", str(changed))
    assert visual_encoder(clip, config(2)).origin != before
