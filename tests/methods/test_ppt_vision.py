"""What the point generator sees, against a slow average; and its cache."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.backbones import test_clip
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import open_features
from wris_lib.backbones.features import clip_patches, image_files
from wris_lib.methods.ppt import vision
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.vision import tile_starts, visual_encoder, visual_features

STAGES = (1, 3, "surgery")

tokenizer = test_clip.tokenizer


@pytest.fixture(scope="module")
def clip(tokenizer) -> Clip:
    return Clip(test_clip.tiny_model(), tokenizer, dense_size=32, device="cpu")


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 50), (64, 32))]


def config(zoom: int, tile: int | None = None) -> GeneratorConfig:
    return GeneratorConfig(STAGES, (24, 24, 16), 16, zoom=zoom, tile=tile)


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


@given(whole=st.integers(1, 60), cells=st.integers(2, 60))
def test_tiles_cover_a_side_and_overlap(whole, cells):
    starts = tile_starts(whole, cells)
    assert starts[0] == 0 and starts == sorted(set(starts))
    if whole <= cells:
        assert starts == [0]
        return
    assert starts[-1] == whole - cells  # the last tile ends with the side
    gaps = np.diff(starts)
    assert max(gaps) - min(gaps) <= 1
    assert (cells - gaps >= cells / 3 - 1).all()  # but for rounding to whole cells
    one_fewer = (whole - cells) / max(1, len(starts) - 2)
    assert len(starts) == 2 or cells - one_fewer < math.ceil(cells / 3)  # no tile is too many


def test_the_tiles_that_the_toy_and_the_real_clip_are_shown():
    assert tile_starts(32, 12) == [0, 7, 13, 20]
    assert tile_starts(32, 14) == [0, 9, 18]


@pytest.mark.parametrize("tile", [16, 24, 40])
def test_tiles_are_put_together_where_they_were(clip, images, tile):
    found = visual_features(clip, config(2, tile), images)
    starts, cells = tile_starts(8, tile // 8), tile // 8
    for row, image in enumerate(images):
        pixels = clip.preprocess(image, 64)[None]
        seen, weights = [torch.zeros(8, 8, c) for c in (24, 24, 20)], torch.zeros(8, 8)
        for top, left in itertools.product(starts, starts):
            part = pixels[:, :, 8 * top : 8 * (top + cells), 8 * left : 8 * (left + cells)]
            maps = clip.patch_features(part, STAGES)
            for y, x in np.ndindex(cells, cells):
                near = [min(i + 1, cells - i) / ((cells + 1) / 2) for i in (y, x)]
                weights[top + y, left + x] += near[0] * near[1]
                for whole, features in zip(seen, maps, strict=True):
                    whole[top + y, left + x] += near[0] * near[1] * features[0, :, y, x]
        for features, whole in zip(found, seen, strict=True):
            mean = (whole / weights[..., None]).unflatten(0, (4, 2)).unflatten(2, (4, 2)).mean(dim=(1, 3))
            torch.testing.assert_close(features[row], mean.permute(2, 0, 1), atol=1e-4, rtol=1e-4)


def test_a_tile_larger_than_the_image_is_the_image(clip, images):
    for tile in (64, 72, 128):
        for one, whole in zip(
            visual_features(clip, config(2, tile), images), visual_features(clip, config(2), images), strict=True
        ):
            torch.testing.assert_close(one, whole, atol=1e-5, rtol=1e-5)


def test_out_of_the_cache(clip, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    rows = image_files([tmp_path / f"{number}.png" for number in range(2)])
    store = open_features(visual_encoder(clip, config(2, 24)), rows)
    kept = store[np.array([0, 1])]
    assert list(kept) == ["stage 1", "stage 3", "surgery"]
    for features, direct in zip(kept.values(), visual_features(clip, config(2, 24), images), strict=True):
        torch.testing.assert_close(features.float(), direct, atol=5e-3, rtol=5e-3)
    shown = ((1, None), (2, None), (3, None), (2, 24), (2, 32))
    folders = {open_features(visual_encoder(clip, config(*each)), rows).folder for each in shown}
    assert len(folders | {open_features(clip_patches(clip, STAGES), rows).folder}) == 6


def test_other_code_is_another_encoder(clip, tmp_path, monkeypatch):
    before = visual_encoder(clip, config(2)).origin
    changed = tmp_path / "vision.py"
    changed.write_text("something else")
    monkeypatch.setattr(vision, "__file__", str(changed))
    assert visual_encoder(clip, config(2)).origin != before
