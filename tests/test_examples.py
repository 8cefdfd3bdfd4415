"""Which answers are shown, on records whose order is plain."""

import numpy as np
import pytest

from wris_lib import examples
from wris_lib.data.coco import encode_mask


def record(image: int, iou: float, outcome: str = "right", **more) -> dict:
    return {"image": image, "iou": iou, "outcome": outcome} | more


def test_best_are_of_different_images():
    records = [record(1, 0.5), record(1, 0.9), record(2, 0.7), record(1, 0.8), record(3, 0.6)]
    assert [found["iou"] for found in examples.best(records, 2)] == [0.9, 0.7]
    assert [found["iou"] for found in examples.best(records, 9)] == [0.9, 0.7, 0.6]


def test_failures_by_how_common_they_are():
    records = [
        record(1, 0.9),
        record(2, 0.4, "leak"),
        record(3, 0.2, "wrong object"),
        record(4, 0.1, "wrong object"),
    ]
    assert examples.failures(records) == [(records[3], 0.5), (records[1], 0.25)]
    assert examples.failures(records[:1]) == []


def test_among_equally_bad_answers_one_is_drawn():
    records = [record(image, 0.0, "empty") for image in range(50)]
    drawn = {examples.failures(records, seed)[0][0]["image"] for seed in range(5)}
    assert len(drawn) > 1
    assert examples.failures(records, 3) == examples.failures(records, 3)


def test_disagreements_have_the_largest_variance():
    images = [7, 7, 8, 9]
    ious = {"a": [0.9, 1.0, 0.5, 0.2], "b": [0.1, 0.0, 0.5, 0.4]}
    found = {name: [record(*pair) for pair in zip(images, values, strict=True)] for name, values in ious.items()}
    assert examples.disagreements(found, 5) == [1, 3, 2]  # place 0 is of the image of place 1
    assert examples.disagreements(found, 1) == [1]


def test_agreement_by_hand():
    whole, half, nothing = np.ones((4, 4), bool), np.ones((4, 4), bool), np.zeros((4, 4), bool)
    half[2:] = False
    masks = {"a": [whole, whole, nothing], "b": [half, ~half, nothing], "c": [half, half, half]}
    found = {name: [record(1, 0.0, mask=encode_mask(mask)) for mask in row] for name, row in masks.items()}
    two, third = 2 / 3, 1 / 3
    # a and b overlap with exactly 0.5 twice; b and c agree once; b's and c's halves are disjoint once.
    assert examples.agreement(found) == pytest.approx(np.array([[two, two, two], [two, two, third], [two, third, 1]]))


def test_what_the_others_agree_with_most():
    large, small, inside, nothing = (np.zeros((8, 8), bool) for _ in range(4))
    large[:], small[2:6, 2:6], inside[2:6, 2:5] = True, True, True
    records = [record(1, 0.0, mask=encode_mask(mask)) for mask in (nothing, nothing, large, inside, small)]
    assert examples.most_agreed(records) == 4
    assert examples.most_agreed(records[:3]) == 0  # nobody agrees with anybody
