"""A right answer passes, and each mistake that a learner is likely to make gets its own hint."""

import re

import numpy as np
import pytest

from tests.wrong_answers import changed, untouched
from wris_lib import exercises
from wris_lib.methods.clip_sam import points_from_map as library_points_from_map


def iou(prediction, truth):
    union = (prediction | truth).sum()
    return (prediction & truth).sum() / union if union else 1.0


def is_positional(expression):
    words = re.findall(r"\w+", expression.lower())
    return any(word in {"left", "right", "top", "bottom", "up", "down", "middle", "center", "centre"} for word in words)


def points_from_map(response_map, width, height, threshold=0.8, most=10):
    rows, columns = response_map.shape
    cells = np.argsort(-response_map.ravel())[:most]
    cells = cells[response_map.ravel()[cells] >= threshold]
    return [((cell % columns + 0.5) * width / columns, (cell // columns + 0.5) * height / rows) for cell in cells]


def classify_failure(prediction, truth, others):
    if iou(prediction, truth) >= 0.5:
        return "right"
    if not prediction.any():
        return "something else"
    inside = (prediction & truth).sum()
    if inside / prediction.sum() >= 0.5 and inside / truth.sum() < 0.5:
        return "part instead of whole"
    outside = prediction & ~np.any([truth, *others], axis=0)
    most = max([(prediction & other).sum() for other in others], default=0)
    return "wrong object" if most > inside and most >= outside.sum() else "something else"


def two_names():
    truth, other = np.zeros((2, 20, 20), bool)
    truth[:10], other[10:] = True, True
    first = np.zeros((20, 20), bool)
    first[8:12] = True
    second = first.copy()
    second[12, 0] = True
    return first, second, truth, [other]


RIGHT = {
    "iou": (exercises.check_iou, iou),
    "is_positional": (exercises.check_is_positional, is_positional),
    "points_from_map": (exercises.check_points_from_map, points_from_map),
    "classify_failure": (exercises.check_classify_failure, classify_failure),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    check, answer = RIGHT[name]
    assert check(answer) is True
    assert capsys.readouterr().out == f"✔ {name} is right.\n"


def test_a_border_of_the_rule(capsys):
    assert exercises.check_two_names(two_names) is True
    assert exercises.check_two_names(changed(two_names, "[other]", "(other, np.zeros_like(other))")) is True
    assert exercises.check_two_names(untouched) is False
    assert capsys.readouterr().out.splitlines()[1:2] == ["✔ two_names is right."]


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
        (lambda *_, **__: None, "got None: does every way through the function end in `return`?"),
        (raising, "it raised KeyError ('no\\nsuch thing')"),
        (lambda: 1, "it raised TypeError"),
        (lambda *_, **__: "nonsense", "got "),
        (lambda *_, **__: [[1], [1, 2]], "got "),
        (lambda *_, **__: object(), "got "),
        (lambda *_, **__: np.zeros((0, 2)), "got "),
        (0.5, "got 0.5 instead of a function; pass"),
    ],
)
def test_anything_at_all_gets_one_line(name, answer, hint, capsys):
    check, _ = RIGHT[name]
    assert check(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {name}: ") and hint in line and line.endswith(".")


IOU_MISTAKES = [
    (("/ union", "/ prediction.sum()"), "you divided by the prediction, not by the union"),
    (("/ union", "/ truth.sum()"), "you divided by the truth, not by the union"),
    (("/ union", "/ truth.size"), "you divided by all pixels of the image"),
    (("/ union", ""), "that is the intersection; divide it by the union"),
    (("/ union", "/ union * 100"), "that is in percent"),
    (("return ", "return 1 - "), "that is what is missing"),
    (("(prediction | truth).sum()", "prediction.sum() + truth.sum()"), "counts shared pixels twice"),
    (("(prediction | truth).sum()", "(prediction.sum() + truth.sum()) / 2"), "the Dice score"),
    (("(prediction & truth)", "(prediction == truth)", "/ union", "/ truth.size"), "agreement about the background"),
    (("|", "+++", "&", "|", "+++", "&"), "that is the union over the intersection"),
    ((".sum() / union", " / union"), "an array of shape (12, 16), expected a number from 0 to 1: count pixels with"),
    (("sum() / union", "any()"), "got "),
    ((" if union else 1.0", ""), "0 of them shared, got nan, expected 1.000: there is no union to divide by"),
    (("1.0", "0.0"), "with 0 predicted and 0 true pixels, 0 of them shared, got 0.000, expected 1.000: there is no"),
    (
        (
            "(prediction | truth).sum()",
            "int((prediction | truth).sum())",
            " if union else 1.0",
            "",
            ").sum() /",
            ").sum().item() /",
        ),
        "it raised ZeroDivisionError (division by zero): there is no union to divide by, but two empty masks agree",
    ),
    (("if union", "if prediction.any() and truth.any()"), "agree without a pixel only if both are empty"),
]
POSITION_MISTAKES = [
    (
        ("word in {", "name in expression.lower() for name in {", "} for word in words", "}"),
        "'the bright lamp', got True",
    ),
    ((".lower()", ""), "for 'Left dog', got False, expected True: capitals do not matter"),
    (
        ('re.findall(r"\\w+", expression.lower())', "expression.lower().split()"),
        "sitting', got False, expected True: punc",
    ),
    ((', "centre"', ""), "'centre' is one of the direction words"),
    (("return any", "return not any"), "for 'the man in the green shirt', got True, expected False: there is no"),
    (("return any(", "return list("), "expected True or False: bool(…) makes one of it"),
]
X, Y = "(cell % columns + 0.5) * width / columns", "(cell // columns + 0.5) * height / rows"
POINTS_MISTAKES = [
    ((f"{X}, {Y}", f"{Y}, {X}"), "you probably swapped x and y."),
    ((X, "cell % columns * width / columns", Y, "cell // columns * height / rows"), "that is a corner of the cell"),
    (
        (f"{X}, {Y}", "cell // columns * height / rows, cell % columns * width / columns"),
        "swapped x and y; that is a corn",
    ),
    ((X, "cell % columns", Y, "cell // columns"), "that counts cells"),
    ((X, "cell % columns + 0.5", Y, "cell // columns + 0.5"), "that counts cells"),
    ((f"{X}, {Y}", "cell // columns, cell % columns"), "you probably swapped x and y; that counts cells"),
    ((f"{X}, {Y}", "cell // columns + 0.5, cell % columns + 0.5"), "you probably swapped x and y; that counts cells"),
    (("%", "§", "//", "%", "§", "//"), "x counts columns and y counts rows"),
    (
        ("width / columns", "height / rows", "0.5) * height / rows)", "0.5) * width / columns)"),
        "x goes with width / columns",
    ),
    (("argsort(-", "argsort("), "got 8 points, expected 12: these are the lowest values"),
    (("[:most]", "[::-1][:12]", " cells = cells[", " _ = cells["), "these are the lowest values"),
    (("[:most]", ""), "more than most=3; keep the best"),
    (
        (
            "np.argsort(-response_map.ravel())[:most]",
            "np.arange(response_map.size)",
            ">= threshold]",
            ">= threshold][:most]",
        ),
        "these are the right points, but the best has to come first",
    ),
    ((">=", ">"), "got 11 points, expected 12: a cell that just reaches the threshold counts"),
    ((">= threshold", ">= 0.8"), "got 5 points, expected 12: does the function use its threshold?"),
    (
        ("return [", "return np.transpose([", "in cells]", "in cells])"),
        "got shape (2, 12), expected (12, 2): one point (x, y) a row, so transpose it",
    ),
    (("return [", "return [0, *(", "in cells]", "in cells)]"), "expected an array [N, 2] of points, nothing else"),
    (
        ("return [", "return ([", "in cells]", "in cells], len(cells))"),
        "expected an array [N, 2] of points, nothing else",
    ),
    (("=0.8", "=0.5"), "expected 5"),
]
FAILURE_MISTAKES = [
    (
        ('>= 0.5:\n        return "right"', '> 0.5:\n        return "right"'),
        "for a prediction with an IoU of exactly 0.5, got ",
    ),
    (
        ("not prediction.any()", "False", "inside / prediction.sum() >= 0.5", "2 * inside >= prediction.sum()"),
        "for an empty prediction, got 'part instead of whole', expected 'something else': it is no part of anything",
    ),
    (("inside / prediction.sum() >= 0.5", "inside == prediction.sum()"), "half of it in the truth is enough"),
    (("inside / prediction.sum() >= 0.5", "inside"), "for a third of the object and all of another, got 'part"),
    ((" and inside / truth.sum() < 0.5", ""), "for half of the object and background, got 'part"),
    (("most > inside and ", ""), "for all three objects and background, got 'wrong object'"),
    ((" and most >= outside.sum()", ""), "for mostly background, got 'wrong object'"),
    (('"something else"\n', '"wrong object"\n'), "got 'wrong object', expected 'something else'"),
    ((", default=0", ""), "for background in an image without other objects, it raised ValueError"),
    (("max([", "sum(["), "it raised TypeError"),
    (
        ("max([", "sum([", ", default=0", ""),
        "count the one other object that has most of the prediction, not all of them",
    ),
    (
        ("in others]", "in others[:1]]"),
        "for another object, got 'something else', expected 'wrong object': try every one",
    ),
    (
        ('"wrong object"', '"other"'),
        "got 'other', expected one of 'right', 'part instead of whole', 'wrong object', 'some",
    ),
]
BORDER_MISTAKES = [
    (("second[12, 0]", "second[12]"), "the predictions differ in 20 pixels, expected a single one"),
    (("second[12, 0] = True", "pass"), "the predictions differ in 0 pixels"),
    (("other[10:]", "other[9:]"), "some pixel is of two objects: what is seen at a pixel is one thing"),
    (
        ("[8:12]", "[8:11]", "[12, 0]", "[11, 0]"),
        "the second prediction has 40 of the truth's 200 pixels, 21 of another object and 0 of the background, so it is"
        " 'part instead of whole', expected 'wrong object': for a wrong object, it needs more of that",
    ),
    (
        ("[8:12]", "[9:12]"),
        "the first prediction has 20 of the truth's 200 pixels, 40 of another object and 0 of the ba",
    ),
    (("[8:12]", "[9:12]"), "so it is 'wrong object', expected 'part instead of whole': for a part, no less of it lies"),
    (("truth[:10]", "truth[7:10]"), "a part covers less than half of the truth; make the truth larger"),
    (("[8:12]", "[1:10]"), "so it is 'right', expected 'part instead of whole': a failure has an IoU below 0.5"),
    (
        ("other[10:]", "other[11:]", "[8:12]", "[9:12]"),
        "20 of the background, so it is 'noise', expected 'part instead",
    ),
    (("truth, [other]", "truth"), "got a tuple, expected four things: `return first, second, truth, others`"),
    (("[other]", "[other[:4]]"), "got masks of shapes (20, 20) and (4, 20), expected all of one picture"),
    (("[other]", "[other * 1.0]"), "got an array of shape (20, 20) as a mask, expected a boolean array [H, W]: others"),
    (("[other]", "3"), "got 3 as a mask"),
]
MISTAKES = [
    *((exercises.check_two_names, two_names, *mistake) for mistake in BORDER_MISTAKES),
    *((exercises.check_iou, iou, *mistake) for mistake in IOU_MISTAKES),
    *((exercises.check_is_positional, is_positional, *mistake) for mistake in POSITION_MISTAKES),
    *((exercises.check_points_from_map, points_from_map, *mistake) for mistake in POINTS_MISTAKES),
    *((exercises.check_classify_failure, classify_failure, *mistake) for mistake in FAILURE_MISTAKES),
]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    assert check(changed(right, *replacements)) is False
    assert hint in capsys.readouterr().out


def test_the_exercise_is_what_the_library_does():
    response_map = np.random.default_rng(0).random((16, 16), np.float32)
    response_map = (response_map - response_map.min()) / np.ptp(response_map)
    points, labels = library_points_from_map(response_map, 256, 192)
    np.testing.assert_allclose(points_from_map(response_map, 256, 192), points[labels == 1])
