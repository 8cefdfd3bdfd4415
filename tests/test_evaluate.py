"""The metrics against sums done by hand, and what must hold for any mask."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wris_lib import evaluate

masks = arrays(bool, (6, 7))


def rectangle(x0: int, y0: int, x1: int, y1: int, side: int = 20) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def record(
    image: int, mask: np.ndarray, referent: np.ndarray, expression: str = "the dog", kind=None, twins: int = 0, **more
):
    scored = evaluate.score(mask, referent, **more)
    return {"image": image, "expression": expression, "kind": kind, "twins": twins, **scored}


def test_iou_by_hand():
    assert evaluate.iou(rectangle(0, 0, 4, 4), rectangle(2, 0, 6, 4)) == 8 / 24
    assert evaluate.iou(rectangle(0, 0, 2, 2), rectangle(5, 5, 9, 9)) == 0
    nothing = rectangle(0, 0, 0, 0)
    assert evaluate.iou(nothing, nothing) == 1  # an empty union counts as 1
    assert evaluate.iou(nothing, rectangle(0, 0, 1, 1)) == 0


@given(masks, masks)
def test_iou_is_a_symmetric_share(first, second):
    value = evaluate.iou(first, second)
    assert value == evaluate.iou(second, first)
    assert 0 <= value <= 1
    assert (value == 1) == (first == second).all()


def test_peak_of_a_flat_top_is_its_middle():
    response = np.zeros((9, 12), dtype=np.float32)
    response[2:5, 6:11] = 1
    assert evaluate.peak(response) == (8, 3)
    assert evaluate.peak(np.zeros((3, 5), dtype=np.float32)) == (2, 1)


def test_peak_lies_on_the_maximum_even_between_two_tops():
    response = np.zeros((5, 9), dtype=np.float32)
    response[1, 0] = response[1, 8] = 2
    x, y = evaluate.peak(response)
    assert response[y, x] == 2


@given(st.integers(0, 5), st.integers(0, 6))
def test_peak_finds_a_single_maximum(row, column):
    response = np.linspace(0, 0.9, 42, dtype=np.float32).reshape(6, 7)
    response[row, column] = 1
    assert evaluate.peak(response) == (column, row)


REFERENT = rectangle(0, 0, 10, 10)  # 100 px
NEIGHBOUR = rectangle(10, 0, 20, 10)  # 100 px


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (rectangle(0, 0, 10, 5), "right"),  # IoU exactly .5
        (rectangle(0, 0, 0, 0), "empty"),
        (rectangle(0, 0, 10, 4), "part instead of whole"),  # all inside, .4 covered
        (rectangle(0, 4, 4, 14), "part instead of whole"),  # 24 of 40 inside
        (rectangle(10, 0, 20, 10), "wrong object"),
        (rectangle(8, 0, 18, 10), "wrong object"),  # 20 of the referent, 80 of the neighbour
        (rectangle(0, 0, 20, 20), "leak"),  # everything: background has most of it
        (rectangle(0, 0, 9, 20), "leak"),  # IoU 90/190, no neighbour
        (rectangle(0, 12, 20, 20), "noise"),  # background only
        (rectangle(8, 6, 12, 20), "noise"),  # 8 + 8 of the two objects, 40 background
    ],
)
def test_outcomes_by_hand(mask, expected):
    assert evaluate.outcome(mask, REFERENT, [NEIGHBOUR]) == expected


def test_outcome_counts_one_neighbour_not_their_sum():
    # A third each: the referent is covered, so this is a leak rather than one wrong object.
    mask = rectangle(0, 0, 20, 10) | rectangle(0, 10, 10, 20)
    assert evaluate.outcome(mask, REFERENT, [NEIGHBOUR, rectangle(0, 10, 10, 20)]) == "leak"


def test_outcome_without_neighbours():
    assert evaluate.outcome(rectangle(10, 10, 20, 20), REFERENT) == "noise"


@given(masks, masks, st.lists(masks, max_size=3))
def test_every_prediction_has_one_outcome(mask, referent, others):
    found = evaluate.outcome(mask, referent, others)
    assert found in evaluate.OUTCOMES
    assert (found == "right") == (evaluate.iou(mask, referent) >= 0.5)
    assert found != "empty" or not mask.any()


def test_score_is_json_and_knows_the_peak():
    response = np.zeros((20, 20), dtype=np.float32)
    response[3, 12] = 1  # in the neighbour
    scored = evaluate.score(REFERENT, REFERENT, [NEIGHBOUR], response)
    assert scored == {"intersection": 100, "union": 100, "iou": 1.0, "hit": False, "outcome": "right"}
    assert json.loads(json.dumps(scored)) == scored
    assert evaluate.score(REFERENT, REFERENT)["hit"] is None


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("the man on the left", True),
        ("LEFT guy", True),
        ("top-right pizza", True),
        ("man, centre", True),
        ("the bright shirt", False),
        ("leftmost cup", False),
        ("upright piano", False),
        ("stop sign", False),
        ("a cup upon a table", False),
        ("", False),
    ],
)
def test_position_is_a_matter_of_whole_words(expression, expected):
    assert evaluate.is_position(expression) is expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("the dog next to the man", True),
        ("cup in front of the boy", True),
        ("the boy left of the car", True),
        ("the bird on the car", True),
        ("the boy on the left", False),  # here "on" is a place
        ("boy on far right", False),
        ("red car", False),
        ("the nearby bus", False),
        ("onion", False),
    ],
)
def test_relation_words(expression, expected):
    assert evaluate.is_relation(expression) is expected


def test_summary_by_hand():
    hot = np.zeros((20, 20), dtype=np.float32)
    hot[0, 0] = 1
    records = [
        record(1, REFERENT, REFERENT, response_map=hot),  # 1: 100/100, hit
        record(1, rectangle(0, 0, 10, 4), REFERENT, response_map=hot),  # .4: 40/100, hit
        record(2, NEIGHBOUR, REFERENT, others=[NEIGHBOUR], response_map=1 - hot),  # 0: 0/200, miss
        record(3, rectangle(0, 0, 10, 8), REFERENT, response_map=hot),  # .8: 80/100, hit
    ]
    means = {name: figure["mean"] for name, figure in evaluate.summarize(records).items()}
    assert means == {
        "mIoU": 55.0,
        "oIoU": 44.0,
        "P@0.3": 75.0,
        "P@0.5": 50.0,
        "P@0.7": 50.0,
        "P@0.9": 25.0,
        "PointM": 75.0,
        "right": 50.0,
        "part instead of whole": 25.0,
        "wrong object": 25.0,
        "leak": 0.0,
        "noise": 0.0,
        "empty": 0.0,
    }


def test_thresholds_are_exceeded_not_reached():
    summary = evaluate.summarize([record(1, rectangle(0, 0, 10, 5), REFERENT)])  # IoU exactly .5
    assert summary["P@0.5"]["mean"] == 0
    assert summary["P@0.3"]["mean"] == 100
    assert summary["right"]["mean"] == 100


def test_metrics_nobody_speaks_about_are_left_out():
    assert "PointM" not in evaluate.summarize([record(1, REFERENT, REFERENT)])
    nothing = rectangle(0, 0, 0, 0)
    assert "oIoU" not in evaluate.summarize([record(1, nothing, nothing)])
    assert evaluate.summarize([]) == {}


def test_bootstrap_is_over_images_and_close_to_theory():
    rng = np.random.default_rng(0)
    values = rng.random(400)
    template = record(0, REFERENT, REFERENT)
    # Each image four times the same expression: four times as many records, not one bit more information.
    records = [template | {"image": i, "iou": float(v)} for i, v in enumerate(values) for _ in range(4)]
    figure = evaluate.summarize(records, resamples=4000)["mIoU"]
    theory = 100 * values.std() / np.sqrt(400)
    assert figure["std"] == pytest.approx(theory, rel=0.06)
    assert figure["low"] == pytest.approx(figure["mean"] - 1.96 * theory, abs=0.3 * theory)
    assert figure["high"] == pytest.approx(figure["mean"] + 1.96 * theory, abs=0.3 * theory)


def test_bootstrap_is_seeded():
    records = [record(i, rectangle(0, 0, 10, i), REFERENT) for i in range(10)]
    assert evaluate.summarize(records, seed=1) == evaluate.summarize(records, seed=1)
    assert evaluate.summarize(records, seed=1)["mIoU"] != evaluate.summarize(records, seed=2)["mIoU"]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), masks, masks), min_size=1, max_size=8))
def test_summary_invariants(cases):
    records = [record(image, mask, referent) for image, mask, referent in cases]
    summary = evaluate.summarize(records, resamples=50)
    for figure in summary.values():
        assert 0 <= figure["low"] <= figure["high"] <= 100
        assert 0 <= figure["mean"] <= 100
    shares = [summary[f"P@{threshold}"]["mean"] for threshold in evaluate.THRESHOLDS]
    assert shares == sorted(shares, reverse=True)
    assert sum(summary[name]["mean"] for name in evaluate.OUTCOMES) == pytest.approx(100, abs=0.05)
    if len({image for image, _, _ in cases}) == 1:
        assert summary["mIoU"]["std"] == 0


def test_breakdown_by_kind_and_by_words():
    records = [
        record(1, REFERENT, REFERENT, "the dog on the left", "position"),
        record(1, NEIGHBOUR, REFERENT, "the dog", "noun", twins=2),
        record(2, REFERENT, REFERENT, "the dog", "noun"),
    ]
    left, wrong, right = records
    expected = {
        "position": [left],
        "noun": [wrong, right],
        "Position": [left],
        "Others": [wrong, right],
        "same-category distractor": [wrong],
    }
    assert evaluate.groups(records) == expected
    groups = evaluate.breakdown(records)
    assert list(groups) == list(expected)
    for name, members in expected.items():
        assert groups[name] == {"n": len(members), "metrics": evaluate.summarize(members)}
    assert groups["noun"]["metrics"]["mIoU"]["mean"] == 50
    # People's sentences come without a kind.
    unknown = [one | {"kind": None} for one in records]
    assert list(evaluate.groups(unknown)) == ["Position", "Others", "same-category distractor"]
    related = [unknown[0] | {"expression": "the dog next to the man"}]
    assert evaluate.groups(related) == {"Others": related, "with relation word": related}
    assert evaluate.groups([]) == {}
