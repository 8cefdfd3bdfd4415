"""The linear probe of PPT's features: features under masks by hand, and a probe that finds what there is to find."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.backbones import test_clip
from tests.studies.test_ppt_studies import check_form
from wris_lib.backbones.clip import Clip
from wris_lib.studies import ppt_features
from wris_lib.studies.ppt_features import probe, under_mask

tokenizer = test_clip.tokenizer


def test_features_under_a_mask_by_hand():
    maps = [torch.randn(1, 5, 4, 4), torch.randn(1, 3, 2, 2)]
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:4, 2:7] = True  # of the 4 × 4 map: cells (1, 1) and (1, 2) as a whole, half of (1, 3)
    normal = [(each - each.mean(1, keepdim=True)) / (each.var(1, False, keepdim=True) + 1e-5).sqrt() for each in maps]
    fine = (normal[0][0, :, 1, 1] + normal[0][0, :, 1, 2] + 0.5 * normal[0][0, :, 1, 3]) / 2.5
    coarse = (2 * normal[1][0, :, 0, 0] + 3 * normal[1][0, :, 0, 1]) / 5
    torch.testing.assert_close(under_mask(maps, mask), torch.cat([fine, coarse]), atol=1e-5, rtol=1e-5)


def test_the_probe_finds_what_there_is_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(4, (400,), generator=generator)
    asked = torch.arange(400) % 3 == 0
    noise = torch.randn(400, 6, generator=generator)
    told = torch.cat([noise, 5 * torch.eye(4)[label]], dim=1)
    assert probe(told, label, asked).mean() > 0.97
    assert 0.1 < probe(noise, label, asked).mean() < 0.45  # chance is ¼


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """Ten images of two squares, a red one of category 1 and a blue one of category 2, each asked about twice."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    items = []
    for number in range(10):
        pixels, masks = np.full((32, 32, 3), 90, np.uint8), np.zeros((2, 32, 32), dtype=bool)
        masks[0, :16, number : number + 16], masks[1, 20:24, 8:12] = True, True
        pixels[masks[0]], pixels[masks[1]] = (250, 0, 0), (0, 0, 250)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        for this in (0, 1):
            about = SimpleNamespace(
                image_path=tmp_path / f"{number}.png",
                annotation={"category_id": this + 1},
                neighbours=[{"category_id": 2 - this}],
                mask=masks[this],
                others=[masks[1 - this]],
            )
            items.append(about)
    monkeypatch.setattr(ppt_features.data, "load", lambda split: SimpleNamespace(items=items))


def test_the_result(scenes, tmp_path, monkeypatch, tokenizer):
    clip = Clip(test_clip.tiny_model(), tokenizer, dense_size=32, device="cpu")
    monkeypatch.setattr(ppt_features, "load_clip", lambda stack: clip)
    seen = []
    encoder = ppt_features.visual_encoder
    monkeypatch.setattr(ppt_features, "visual_encoder", lambda *them: (seen.append(them[1]), encoder(*them))[1])
    ppt_features.features(tmp_path)
    result = json.loads((tmp_path / "ppt_features.json").read_text())
    check_form(result, "train ppt --features", [0], classes=2)
    assert [(config.zoom, config.tile) for config in seen] == [(1, None), (2, None), (2, 32)]
    for row in result["rows"]:
        assert row["n"] == {"all": 8, "small": 4, "large": 4}  # of images 0, 3, 6 and 9
        assert row["metrics"]["all"] == (row["metrics"]["small"] + row["metrics"]["large"]) / 2
        assert row["metrics"]["all"] > 60
