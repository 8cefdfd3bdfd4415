"""What SAM finds on the grid of the response maps, cell by cell; and its cache."""

import numpy as np
import pytest
import torch

from tests.methods import test_ppt_training
from tests.methods.test_ppt_training import picture
from wris_lib.backbones.feature_store import Rows, open_features
from wris_lib.methods.pcnet.proposals import MOST, SETTINGS, proposal_encoder, propose

segmenter = test_ppt_training.segmenter


@pytest.fixture
def finds(segmenter, monkeypatch):
    """SAM finds what it is told to, by the image's width; what it was asked is kept."""
    found, asked = {}, []

    def propose_masks(image, **settings):
        asked.append(settings)
        return found[image.width]

    monkeypatch.setattr(segmenter, "proposals", propose_masks)
    return found, asked


@pytest.mark.parametrize(("width", "height"), [(24, 12), (30, 6), (6, 60)])
def test_a_cell_belongs_to_what_covers_more_than_half_of_it(segmenter, finds, width, height):
    masks = np.random.default_rng(0).random((9, height, width)) < 0.5
    finds[0][width] = masks
    found = propose(segmenter, picture((width, height), 0), 3, 6, {})
    expected = []
    for mask in masks:
        cells = mask.reshape(3, height // 3, 6, width // 6).mean(axis=(1, 3)) > 0.5
        if cells.any() and cells.ravel().tolist() not in expected:
            expected.append(cells.ravel().tolist())
    assert found.tolist() == expected and len(expected) > 3


def test_what_is_left_out(segmenter, finds):
    """Half of a cell is not more than half; the second of two alike; what comes too late."""
    masks = np.zeros((4, 8, 8), dtype=bool)
    masks[0, :2, :4] = True  # of the first of four cells
    masks[1, :4, :4] = True
    masks[2, :3, :4] = True
    masks[3, 4:, 4:] = True
    finds[0][8] = masks
    image = picture((8, 8), 0)
    assert propose(segmenter, image, 2, 2, {}).int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    one_each = np.zeros((MOST + 9, 8, 8), dtype=bool)
    one_each.reshape(MOST + 9, 64)[np.arange(MOST + 9), np.arange(MOST + 9)] = True
    finds[0][8] = one_each
    assert torch.equal(propose(segmenter, image, 8, 8, {}), torch.eye(64)[:MOST].bool())


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_is_found(segmenter, finds, count):
    finds[0][9] = np.zeros((count, 5, 9), dtype=bool)
    assert propose(segmenter, picture((9, 5), 0), 2, 2, {}).shape == (0, 4)


def test_an_image_that_is_no_multiple_of_the_grid(segmenter, finds):
    finds[0][13] = np.ones((1, 7, 13), dtype=bool)
    assert propose(segmenter, picture((13, 7), 0), 4, 4, {}).all()


def test_sam_is_asked_as_the_stack_says_and_only_once(segmenter, finds):
    found, asked = finds
    rng = np.random.default_rng(1)
    found |= {width: rng.random((count, 8, width)) < 0.6 for width, count in ((16, 3), (24, 0), (32, 5))}
    rows = Rows(["three", "none", "five"], lambda row: picture((16 + 8 * row, 8), row))
    kept = open_features(proposal_encoder(segmenter, 2, 4, "toy"), rows)
    for row in (2, 1, 0):
        direct = propose(segmenter, rows.load(row), 2, 4, {})
        assert torch.equal(kept[[row]]["proposals"][0], direct)
    together = kept[[1, 2]]
    assert together["proposals"].shape == (2, 5, 8) and together["proposals mask"].tolist() == [[False] * 5, [True] * 5]
    assert asked == [SETTINGS["toy"]] * 3 + [{}] * 3
    open_features(proposal_encoder(segmenter, 2, 4, "toy"), rows)
    assert len(asked) == 6
    open_features(proposal_encoder(segmenter, 2, 4, "paper"), rows)
    assert asked[6:] == [SETTINGS["paper"]] * 3


def test_every_setting_is_one_of_sams(segmenter):
    """A tiny, untrained SAM that is believed whatever it says: proposals go through upstream's generator."""
    image = picture((64, 48), 0)
    for settings in SETTINGS.values():
        trusting = settings | {"points_per_side": 2, "iou_threshold": -9.0, "stability_threshold": 0.0, "min_area": 0}
        found = propose(segmenter, image, 4, 4, trusting)
        assert found.shape[1:] == (16,) and found.dtype == torch.bool and found.any(dim=1).all()
