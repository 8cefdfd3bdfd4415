"""Exercises about what was measured, on made-up results: figures in the checks' answers, and what else may happen.

The language model and SAM's answers are made up, too; the notebooks run the checks on the real ones.
"""

import json

import numpy as np
import pytest

from tests.made_up import Teller, asked
from tests.wrong_answers import EXERCISES, rejection
from wris_lib import exercises_measured as exercises
from wris_lib.backbones.language import load_parser
from wris_lib.evaluate import iou
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS

PICK_MASK = EXERCISES["pick_mask"]


def results(path, rows):
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def made_up(tmp_path, monkeypatch):
    point = {"L_cls (TRIS)": 30.0, "+CRM": 42.0, "+CRM+RaS": 43.0, "+CRM+IaD": 49.0}
    pcnet = [{"name": n, "data": "toyrefg:val", "metrics": {"PointM": {"mean": mean}}} for n, mean in point.items()]
    miou = dict(zip(AGGREGATIONS, (27.0, 28.0, 19.0, 24.0, 23.0), strict=True))
    ways = [
        {"name": way, "data": split, "metrics": {"mIoU": {"mean": mean + add}}}
        for split, add in (("toyref:testA", -1), ("toyrefg:test", 1))
        for way, mean in miou.items()
    ]
    monkeypatch.setattr(exercises, "PCNET", results(tmp_path / "pcnet_ablation.json", pcnet))
    monkeypatch.setattr(exercises, "ITERPRIME", results(tmp_path / "iterprime_ablation.json", ways))
    monkeypatch.setattr(exercises, "_readers", lambda: (Teller(), load_parser("toy")))
    monkeypatch.setattr(exercises, "sam_answers", lambda draw: [asked(seed) for seed in range(6)])


@pytest.mark.parametrize(
    "name, answer, figures",
    [
        ("helps_most", "RaS", "RaS brings 1.0 points of PointM, and another piece 12.0: "),
        ("helps_most", "IaD", "IaD brings 7.0 points of PointM, and another piece 12.0: "),
        ("weakest_way", "mean", "mean has an mIoU of 27.0, and another way 19.0: "),
        ("weakest_way", "gvlp", "gvlp has an mIoU of 28.0, and another way 19.0: "),
        ("weakest_way", "pwem", "pwem has an mIoU of 23.0, and another way 19.0: "),
        ("weakest_way", "global", "global has an mIoU of 24.0, and another way 19.0: "),
        ("invent_cue", "the small dogs", "the cues are ['a dog', 'the small dog']: their nouns are the sentence's"),
    ],
)
def test_what_was_found_is_said(name, answer, figures, capsys):
    assert figures in rejection(name, lambda: answer, capsys)


@pytest.mark.parametrize(
    "rule, reached",
    [
        (lambda masks, trusted, response: trusted.argmax(), 20.8),
        (lambda masks, trusted, response: masks.sum(axis=(1, 2)).argmax(), 36.0),
        (lambda masks, trusted, response: masks.sum(axis=(1, 2)).argmin(), 2.8),
    ],
)
def test_figures_of_rules(rule, reached, capsys):
    line = rejection("pick_mask", rule, capsys)
    assert f"the mIoU is {reached}, SAM's own choice has 20.8, the best one 100.0; expected at least 60.4: " in line


@pytest.mark.parametrize("name, path", [("helps_most", "PCNET"), ("weakest_way", "ITERPRIME")])
def test_a_result_that_is_missing(name, path, capsys):
    getattr(exercises, path).unlink()
    line = rejection(name, EXERCISES[name].answer(), capsys)
    assert "cannot be compared with what was measured: there is no result" in line


def test_numbers_of_numpy_are_numbers():
    pick_mask = PICK_MASK.answer()
    assert PICK_MASK.judge(lambda *given: np.int64(pick_mask(*given)))
    assert PICK_MASK.judge(lambda *given: np.array(pick_mask(*given)))


def test_draws_share_no_image():
    practice, exam = (set(range(400)[draw]) for draw in exercises.DRAWS.values())
    assert len(practice) == len(exam) == 8 and not practice & exam


def test_made_up_answers_have_a_part_that_is_trusted_most():
    masks, trusted, _, truth = asked(0)
    assert iou(masks[trusted.argmax()], truth) < 0.5
