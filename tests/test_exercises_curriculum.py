"""The exercises of notebook 03: other right answers, made-up results, random cases, and what the library does."""

import json

import numpy as np
import pytest

from tests.test_ablation_figure import MEANS, row
from tests.wrong_answers import EXERCISES, rejection
from wris_lib import exercises_curriculum as exercises
from wris_lib.methods.ppt.curriculum import mask_ious

SELECT, LOSES_MOST = EXERCISES["select"], EXERCISES["loses_most"]


@pytest.fixture(autouse=True)
def ablation(tmp_path, monkeypatch):
    """A made-up result, in which of rows 6 to 8 row 7 loses most, 7 points."""
    path = tmp_path / "ppt_ablation.json"
    path.write_text(json.dumps({"rows": [row(name, mean) for name, mean in MEANS.items()]}), encoding="utf-8")
    monkeypatch.setattr(exercises, "ABLATION", path)
    return path


def test_numbers_of_numpy_are_numbers():
    select = SELECT.answer()
    assert SELECT.judge(lambda *given: None if select(*given) is None else np.int64(select(*given)))
    assert LOSES_MOST.judge(lambda: np.int64(7))


@pytest.mark.parametrize("number, figures", [(6, "row 6 loses 4.0 mIoU, and"), (8, "row 8 loses 3.0 mIoU, and")])
def test_what_was_measured_is_said(number, figures, capsys):
    assert f"against row 5, {figures} another one 7.0: " in rejection("loses_most", lambda: number, capsys)


def test_hints_of_random_cases():
    """Where no known case has caught a mistake, a fresh random one does, and says what was probably done."""
    rng = np.random.default_rng(0)
    prediction, others = np.ones((4, 4), bool), [rng.random((4, 4)) < share for share in (0.2, 0.6)]
    guess = exercises._guess
    assert guess(2, prediction, others) == "count from 0"
    assert guess(0, prediction, others) == "that is the one that fits worst"
    assert guess(None, prediction, others) == "a small overlap is enough; there is no threshold"
    assert guess(7, prediction, others) == ""
    corner = np.zeros((4, 4), bool)
    corner[0, 0] = True
    assert guess(1, corner, [corner, prediction]).startswith("count from 0")
    assert guess(0, corner, [prediction, corner, ~corner]).startswith("that one shares most pixels")


def test_a_result_that_is_missing(ablation, capsys):
    ablation.unlink()
    line = rejection("loses_most", lambda: 7, capsys)
    assert line.startswith("✘ loses_most: row 7 cannot be compared") and line.endswith("`git checkout -- results`.")


def test_two_rows_that_lose_the_same(ablation):
    means = MEANS | {"8 w/o free (D_sem)": MEANS["7 w/o augmented (D_ref)"]}
    ablation.write_text(json.dumps({"rows": [row(name, mean) for name, mean in means.items()]}), encoding="utf-8")
    assert LOSES_MOST.judge(lambda: 7) and LOSES_MOST.judge(lambda: 8)


def test_the_exercise_is_what_the_library_does():
    rng, select = np.random.default_rng(0), SELECT.answer()
    for _ in range(20):
        prediction, candidates = rng.random((8, 8)) < 0.2, rng.random((3, 8, 8)) < 0.1
        overlaps = mask_ious(prediction, candidates)
        expected = int(overlaps.argmax()) if overlaps.max() > 0 else None
        assert select(prediction, list(candidates)) == expected
