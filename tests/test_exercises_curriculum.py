"""A right answer passes, and each mistake that a learner is likely to make gets its own hint."""

import json

import numpy as np
import pytest

from tests.test_ablation_figure import MEANS, row
from tests.wrong_answers import changed, untouched
from wris_lib import exercises_curriculum as exercises
from wris_lib.methods.ppt.curriculum import mask_ious


def select(prediction, candidates):
    best, number = 0, None
    for index, candidate in enumerate(candidates):
        union = (prediction | candidate).sum()
        overlap = (prediction & candidate).sum() / union if union else 0
        if overlap > best:
            best, number = overlap, index
    return number


def on_the_left(boxes, names, noun, width):
    order = sorted((x0 + x1, index) for index, (x0, _, x1, _) in enumerate(boxes) if names[index] == noun)
    if not order or order[0][0] >= width:
        return None
    if len(order) > 1 and order[1][0] - order[0][0] < width / 5:
        return None
    return order[0][1]


def mislead_select():
    lorry, wheel = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    lorry[2:6] = wheel[5:7, 1:3] = True
    return wheel & lorry, lorry, [lorry, wheel]


def loses_most():
    return 7


RIGHT = {
    "select": (exercises.check_select, select),
    "on_the_left": (exercises.check_on_the_left, on_the_left),
    "mislead_select": (exercises.check_mislead_select, mislead_select),
    "loses_most": (exercises.check_loses_most, loses_most),
}


@pytest.fixture(autouse=True)
def ablation(tmp_path, monkeypatch):
    """A made-up result, in which of rows 6 to 8 row 7 loses most, 7 points."""
    path = tmp_path / "ppt_ablation.json"
    path.write_text(json.dumps({"rows": [row(name, mean) for name, mean in MEANS.items()]}), encoding="utf-8")
    monkeypatch.setattr(exercises, "ABLATION", path)
    return path


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    check, answer = RIGHT[name]
    for _ in range(5):  # inputs are drawn anew
        assert check(answer) is True
    assert set(capsys.readouterr().out.splitlines()) == {f"✔ {name} is right."}


def test_numbers_of_numpy_are_numbers():
    assert exercises.check_select(lambda *a: None if select(*a) is None else np.int64(select(*a)))
    assert exercises.check_loses_most(lambda: np.int64(7))


@pytest.mark.parametrize("name", RIGHT)
def test_an_untouched_stub_is_open(name, capsys):
    check, _ = RIGHT[name]
    assert check(untouched) is False
    assert capsys.readouterr().out.startswith(f"○ {name} is still open")


def raising(*_, **__):
    raise KeyError("no\nsuch thing")


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda *_, **__: None, "got None"),
        (raising, "it raised KeyError ('no\\nsuch thing')"),
        (lambda a, b, c, d, e: 1, "it raised TypeError"),
        (lambda *_, **__: "nonsense", "got 'nonsense', expected "),
        (lambda *_, **__: [[1], [1, 2]], "got [[1], [1, 2]], expected "),
        (lambda *_, **__: object(), "got "),
        (lambda *_, **__: np.zeros((3, 2)), "got an array of shape (3, 2), expected "),
        (lambda *_, **__: True, "got True, expected "),
        (lambda *_, **__: np.bool_(True), "expected "),
        (lambda *_, **__: 1.0, "got 1.0, expected "),
        (0.5, "got 0.5 instead of a function; pass"),
    ],
)
def test_anything_at_all_gets_one_line(name, answer, hint, capsys):
    check, _ = RIGHT[name]
    assert check(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {name}: ") and hint in line and line.endswith(".")


SELECT_MISTAKES = [
    (("best, number = overlap, index", "best, number = overlap, index + 1"), "got 2, expected 1: count from 0"),
    (("/ union", "/ candidate.sum()"), "for "),
    (("/ union", "* union / union"), "for a candidate that covers the whole image, got 0, expected 1: it shares most"),
    (("> best", ">= best"), "candidates elsewhere, got 1, expected None: nothing overlaps, so the referent is unknown"),
    (("best, number = 0, None", "best, number = 0.5, None"), "overlaps a little, and one that does not, got None"),
    (("best, number = 0, None", "best, number = 0, -1"), "got -1, expected None: there are 2, counted from 0"),
    (("return number", "return number or None"), "in first place, got None, expected 0: 0 is a number like any other"),
    (("if union else 0", "if union else 1"), "an empty candidate, got 0, expected None: nothing overlaps, so the ref"),
    (("return number", "return candidates[number]"), "got an array of shape (24, 24), expected a number from 0 on, or"),
    (("> best", "< 1 - best"), "for "),
    (("return number", "number"), "got None, expected 1: a small overlap is enough"),
]
LEFT_MISTAKES = [
    (
        ("(x0 + x1, index)", "(2 * x0, index)"),
        "left side, 100 pixels wide, got 0, expected 1: compare",
    ),
    (
        (" if names[index] == noun", ""),
        "left, then two dogs, 100 pixels wide, got 0, expected 1: only",
    ),
    (
        ("enumerate(boxes) if names[index] == noun)", "enumerate([b for b, n in zip(boxes, names) if n == noun]))"),
        "got 0, expected 1: only objects of the class count, but the answer is the place among all objects",
    ),
    (
        ("not order or ", ""),
        "no dog, 100 pixels wide, it raised IndexError (list index out of range): there is",
    ),
    (
        (" or order[0][0] >= width", ""),
        "single dog at the right, 100 pixels wide, got 0, expected None: its centre is",
    ),
    (
        ("width / 5", "0"),
        "dogs close together at the left, 100 pixels wide, got 0, expected None: the second is",
    ),
    (
        ("width / 5", "20"),
        "dogs close together at the left, 640 pixels wide, got 0, expected None: the second is l",
    ),
    (("order[1][0] - order[0][0]", "order[-1][0] - order[0][0]"), "two dogs close together, and one at the right"),
    (
        ("len(order) > 1 and order[1]", "order[1]"),
        "a single dog at the left, 100 pixels wide, it raised IndexError",
    ),
    (("len(order) > 1 and ", "len(order) == 1 or "), "got None, expected 0: a single one can be meant, too"),
    (
        ("sorted(", "list("),
        "on the right and one on the left, 100 pixels wide, got None, expected 1: their order",
    ),
    (("x0 + x1", "2 * x0 + x1"), "for "),  # takes XYXY for x, y, width, height
    (("return order[0][1]", "return -1 - order[0][1]"), "got -1, expected 0: there are 2, counted from 0"),
    (("return order[0][1]", "order"), "got None, expected 0: does every way through the function end in `return`?"),
]
MISLEAD_MISTAKES = [
    (
        ("return wheel & lorry,", "return lorry,"),
        "Select takes candidate 0, with an IoU of 1.00 with the prediction and 1.00 with the referent, which is a good",
    ),
    (("[lorry, wheel]", "[lorry]"), "a good label: all candidates are good labels, so no choice is wrong; SAM also"),
    (("[lorry, wheel]", "[wheel]"), "has an IoU of 0.06 with the referent, expected 0.5 or more: where all candidates"),
    (("wheel & lorry,", "~lorry,"), "0% of the prediction lie on the referent, expected more than half: let the net"),
    (("wheel & lorry,", "wheel,"), "50% of the prediction lie on the referent, expected more than half"),
    (("wheel & lorry,", "np.zeros((8, 8), bool),"), "the prediction is empty, expected at least one pixel"),
    (("wheel & lorry, lorry", "lorry, np.zeros((8, 8), bool)"), "the referent is empty, expected at least one pixel"),
    (("[lorry, wheel]", "[lorry, wheel.astype(int)]"), "got numbers as candidate 1, expected a mask, an array of"),
    (("[lorry, wheel]", "[lorry, wheel[1:]]"), "got candidate 1 of shape (7, 8), expected (8, 8), that of the pred"),
    (("[lorry, wheel]", "[]"), "got [] as candidates, expected a list of at least one mask"),
    (
        ("[lorry, wheel]", "lorry"),
        "got an array of shape (8,) as candidate 0, expected a mask, an array of shape (H, W",
    ),
    ((", [lorry, wheel]", ""), "expected three things: `return prediction, referent, candidates`"),
]
MOST_MISTAKES = [
    (("7", "6"), "against row 5, row 6 loses 4.0 mIoU, and another one 7.0: a prediction may be wrong; look"),
    (("7", "8"), "against row 5, row 8 loses 3.0 mIoU, and another one 7.0: in the paper it is this row; section 3"),
    (("7", "5"), "got 5, expected the number of a row: 6, 7 or 8."),
    (("7", "9"), "got 9, expected the number of a row: 6, 7 or 8: row 9 takes away what rows 7 and 8 take away"),
    (("7", "'7 w/o augmented'"), "got '7 w/o augmented', expected the number of a row: 6, 7 or 8."),
]
MISTAKES = [
    *((exercises.check_select, select, *mistake) for mistake in SELECT_MISTAKES),
    *((exercises.check_on_the_left, on_the_left, *mistake) for mistake in LEFT_MISTAKES),
    *((exercises.check_mislead_select, mislead_select, *mistake) for mistake in MISLEAD_MISTAKES),
    *((exercises.check_loses_most, loses_most, *mistake) for mistake in MOST_MISTAKES),
]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    assert check(changed(right, *replacements)) is False
    assert hint in capsys.readouterr().out


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
    assert exercises.check_loses_most(loses_most) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✘ loses_most: row 7 cannot be compared") and line.endswith("`git checkout -- results`.")


def test_two_rows_that_lose_the_same(ablation):
    means = MEANS | {"8 w/o free (D_sem)": MEANS["7 w/o augmented (D_ref)"]}
    ablation.write_text(json.dumps({"rows": [row(name, mean) for name, mean in means.items()]}), encoding="utf-8")
    assert exercises.check_loses_most(lambda: 7) and exercises.check_loses_most(lambda: 8)


def test_the_exercise_is_what_the_library_does():
    rng = np.random.default_rng(0)
    for _ in range(20):
        prediction, candidates = rng.random((8, 8)) < 0.2, rng.random((3, 8, 8)) < 0.1
        overlaps = mask_ious(prediction, candidates)
        expected = int(overlaps.argmax()) if overlaps.max() > 0 else None
        assert select(prediction, list(candidates)) == expected
