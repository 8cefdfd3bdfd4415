"""Proposals of whole things, and their cache."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wris_lib.backbones import proposals
from wris_lib.backbones.proposals import sam_proposer, whole_things
from wris_lib.backbones.sam import Segmenter, build_toy_sam


def square(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((10, 10), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


class FakeSegmenter(Segmenter):
    """Proposes a thing and its part, and counts how often it was asked."""

    def __init__(self, masks: np.ndarray) -> None:
        super().__init__(build_toy_sam(64))
        self.found, self.asked = masks, []

    def proposals(self, image: Image.Image, **settings: float) -> np.ndarray:
        self.asked.append(settings)
        return self.found


def image(value: int = 0) -> Image.Image:
    return Image.new("RGB", (10, 10), (value, 0, 0))


def test_a_part_goes_and_everything_else_stays_in_order() -> None:
    part, thing, beside = square(1, 1, 2, 2), square(0, 0, 5, 5), square(6, 6, 3, 3)
    assert np.array_equal(whole_things(np.stack([part, beside, thing])), np.stack([beside, thing]))


def test_a_mask_that_lies_in_another_by_less_than_four_fifths_is_no_part() -> None:
    thing = square(0, 0, 5, 5)
    half_outside, just_inside = square(0, 3, 2, 4), square(0, 1, 1, 5)
    assert len(whole_things(np.stack([thing, half_outside]))) == 2
    assert np.array_equal(whole_things(np.stack([thing, just_inside])), thing[None])


def test_nothing_is_a_part_of_the_ground() -> None:
    ground, thing = square(0, 0, 10, 6), square(2, 2, 2, 2)
    assert len(whole_things(np.stack([ground, thing]))) == 2


def test_of_masks_of_nearly_one_size_neither_is_a_part() -> None:
    large = square(0, 0, 5, 8)
    nearly = large.copy()
    nearly[0, 0] = False
    assert len(whole_things(np.stack([large, nearly]))) == 2


@pytest.mark.parametrize("count", [0, 1])
def test_no_proposal_and_a_single_one_pass(count: int) -> None:
    masks = np.ones((count, 10, 10), dtype=bool)
    assert np.array_equal(whole_things(masks), masks)


def test_a_second_question_about_an_image_is_answered_from_the_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    segmenter = FakeSegmenter(np.stack([square(1, 1, 2, 2), square(0, 0, 5, 5)]))
    first = sam_proposer(segmenter, {"points_per_side": 4})(image())
    again = sam_proposer(segmenter, {"points_per_side": 4})(image())
    assert np.array_equal(first, square(0, 0, 5, 5)[None]) and np.array_equal(again, first)
    assert again.dtype == bool and segmenter.asked == [{"points_per_side": 4}]


def test_another_image_other_settings_and_other_weights_ask_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    segmenter, other = (FakeSegmenter(square(0, 0, 5, 5)[None]) for _ in range(2))
    sam_proposer(segmenter, {})(image())
    sam_proposer(segmenter, {})(image(1))
    sam_proposer(segmenter, {})(Image.new("RGB", (10, 10)).resize((20, 5)))
    sam_proposer(segmenter, {"points_per_side": 4})(image())
    assert len(segmenter.asked) == 4
    other.sam.mask_decoder.iou_token.weight.data += 1
    sam_proposer(other, {})(image())
    assert len(other.asked) == 1


def test_an_image_without_proposals_is_kept_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    segmenter = FakeSegmenter(np.zeros((0, 10, 10), dtype=bool))
    assert sam_proposer(segmenter, {})(image()).shape == sam_proposer(segmenter, {})(image()).shape == (0, 10, 10)
    assert len(segmenter.asked) == 1


def test_a_damaged_file_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    segmenter = FakeSegmenter(square(0, 0, 5, 5)[None])
    propose = sam_proposer(segmenter, {})
    propose(image())
    (kept,) = (tmp_path / "proposals").rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-40])
    assert np.array_equal(propose(image()), square(0, 0, 5, 5)[None])
    assert len(segmenter.asked) == 2


def test_whatever_byte_is_damaged_a_file_is_right_or_made_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    propose = sam_proposer(FakeSegmenter(square(0, 0, 5, 5)[None]), {})
    expected = propose(image())
    (path,) = (tmp_path / "proposals").rglob("*.npz")
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        kept = proposals._read(path)
        assert kept is None or np.array_equal(kept, expected), place


def test_the_settings_of_every_stack_are_there() -> None:
    assert proposals.SETTINGS.keys() == {"toy", "paper"}
