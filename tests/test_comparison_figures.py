"""Pictures of a comparison: the figures that they show are those of the results."""

import numpy as np
import pytest
from PIL import Image

from wris_lib.comparison_figures import (
    agreement_picture,
    answer_panel,
    cost_picture,
    disagreements_picture,
    kinds_picture,
    splits_picture,
)
from wris_lib.data.coco import encode_mask
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError


def figures(mean: float) -> dict:
    return {"mIoU": {"mean": mean, "std": 1.0, "low": mean - 2, "high": mean + 3}}


def row(name: str, data: str, mean: float) -> dict:
    kinds = {kind: {"n": 5, "metrics": figures(mean + step)} for kind, step in (("Position", -6), ("Others", 4))}
    return {"name": name, "data": data, "n": 10, "metrics": figures(mean), "kinds": kinds}


@pytest.fixture
def results() -> dict:
    means = {"a plain": (20, 41), "b": (33, 30), "sam box": (80, 85)}
    rows = [
        row(name, spec, m) for name, both in means.items() for spec, m in zip(("x:val", "y:val"), both, strict=True)
    ]
    costs = {
        name: {"milliseconds": ms, "quartiles": [ms - 2, ms + 5], "supervision": told}
        for name, ms, told in (("a plain", 30.0, "none"), ("b", 90.0, "pairs"), ("sam box", 9.0, "none"))
    }
    return {"made": {}, "rows": rows, "costs": costs}


def test_costs_and_quality(results):
    (axes,) = cost_picture(results, "y:val").axes
    at = {text.get_text(): tuple(text.xy) for text in axes.texts}
    assert at == {"a plain": (30.0, 41), "b": (90.0, 30), "sam box": (9.0, 85)}
    assert axes.get_xscale() == "log"
    across, up = (bars.get_segments()[0] for bars in axes.containers[1].lines[2])
    assert across[:, 0].tolist() == [88, 95] and up[:, 1].tolist() == [28, 33]
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.texts] == ["none", "pairs"]
    del results["costs"]["b"]
    assert {text.get_text() for text in cost_picture(results, "y:val").axes[0].texts} == {"a plain", "sam box"}


def test_splits(results):
    results["rows"].pop(3)  # b on y:val
    (axes,) = splits_picture(results).axes
    assert [text.get_text() for text in axes.texts] == ["20.0", "41.0", "33.0", "–", "80.0", "85.0"]
    assert [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"] == ["41.0", "33.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a plain", "b", "sam box"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x\nval", "y\nval"]


def test_kinds(results):
    (axes,) = kinds_picture(results, "x:val").axes
    between = [list(line.get_xdata()) for line in axes.lines if line.get_color() == "#999999"]
    assert between == [[14, 24], [27, 37], [74, 84]]
    reach = [bars.lines[2][0].get_segments()[0].tolist() for bars in axes.containers]
    assert reach[:3] == [[[12, 0], [17, 0]], [[22, 0], [27, 0]], [[25, 1], [30, 1]]]
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.texts] == ["Position", "Others"]


def test_agreement():
    shares = np.array([[1.0, 0.254], [0.254, 0.98]])
    (axes,) = agreement_picture(shares, ["a", "b"]).axes
    assert [text.get_text() for text in axes.texts] == ["100", "25", "25", "98"]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "black", "white"]


def test_disagreements(tmp_path):
    square = np.zeros((20, 30), bool)
    square[5:15, 5:15] = True
    Image.new("RGB", (30, 20), "white").save(tmp_path / "picture.png")
    about = {"image_path": tmp_path / "picture.png", "image_id": 0, "ref_id": 0, "sent_id": 0, "kind": "Others"}
    about |= {"category": "dog", "height": 20, "width": 30, "neighbours": []}
    about["annotation"] = {"segmentation": encode_mask(square), "bbox": [5, 5, 10, 10]}
    items = [EvaluationItem(expression=words, **about) for words in ("a dog", "two dogs", "no dog")]

    def answer(place: int, right: bool) -> dict:
        mask = square if right else ~square
        return {"item": place, "image": place, "iou": float(right), "mask": encode_mask(mask)}

    found = {"one": [answer(2, True), answer(1, True)], "other": [answer(2, True), answer(1, False)]}
    panels = disagreements_picture(found, items, 1).figure.axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["“two dogs”", "one\nIoU 1.00", "other\nIoU 0.00"]
    panel = answer_panel(found["other"][1], items[1], "")
    assert (panel.mask == ~square).all() and (panel.referent == square).all()


def test_what_cannot_be_drawn(results):
    with pytest.raises(WrisError, match="the results have no rows of z:val; choose one of: x:val, y:val"):
        cost_picture(results, "z:val")
    with pytest.raises(WrisError, match="x:val has no kind of expressions 'verbs'; choose from: Position, Others"):
        kinds_picture(results, "x:val", ("Position", "verbs"))
    del results["costs"]
    with pytest.raises(WrisError, match="the results have no costs; measure them with `python -m wris_lib bench"):
        cost_picture(results, "x:val")
