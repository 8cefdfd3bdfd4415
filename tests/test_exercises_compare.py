"""The exercise of notebook 06: a right answer passes, and each likely mistake gets its hint."""

import numpy as np
import pytest

from tests.wrong_answers import changed, untouched
from wris_lib.exercises_compare import check_most_agreed


def most_agreed(masks):
    flat = masks.reshape(len(masks), -1).astype(int)
    shared = flat @ flat.T
    sizes = flat.sum(axis=1)
    ious = shared / np.maximum(sizes[:, None] + sizes - shared, 1)
    np.fill_diagonal(ious, 0)
    return ious.sum(axis=1).argmax()


def slowly(masks):
    def iou(a, b):
        return (a & b).sum() / max((a | b).sum(), 1)

    return max(range(len(masks)), key=lambda n: sum(iou(masks[n], mask) for mask in masks if mask is not masks[n]))


MISTAKES = [
    (check_most_agreed, most_agreed, *mistake)
    for mistake in (
        (("argmax", "argmin"), "that one agrees least"),
        (("shared / np.maximum(sizes[:, None] + sizes - shared, 1)", "shared.astype(float)"), "shares most pixels"),
        (("return ious.sum(axis=1).argmax()", "return sizes.argmax()"), "got 0, expected 1: that one shares most"),
        (
            ("    np.fill", "    ious[np.ix_(sizes == 0, sizes == 0)] = 1\n    np.fill", "argmax()", "argmax() * 1"),
            "two that nearly agree",
        ),
        ((".argmax()", ".max()"), "expected which of the 4, counted from 0"),
        (("argmax()", "argmax() + 1"), "got 2, expected 1: count from 0"),
        (
            ("return ious.sum(axis=1).argmax()", "return masks[ious.sum(axis=1).argmax()]"),
            "got an array of shape (32, 40)",
        ),
    )
]


@pytest.mark.parametrize("answer", [most_agreed, slowly, lambda masks: int(most_agreed(masks))])
def test_right_answers_pass(answer, capsys):
    for _ in range(3):  # inputs are drawn anew
        assert check_most_agreed(answer) is True
    assert set(capsys.readouterr().out.splitlines()) == {"✔ most_agreed is right."}


def test_an_untouched_stub_is_open(capsys):
    assert check_most_agreed(untouched) is False
    assert capsys.readouterr().out.startswith("○ most_agreed is still open")


@pytest.mark.parametrize("result", [None, "nonsense", -1, 7, True, 1.5, np.zeros(2), []])
def test_anything_at_all_gets_one_line(result, capsys):
    assert check_most_agreed(lambda masks: result) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✘ most_agreed: ") and line.endswith(".")


@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    assert check(changed(right, *replacements)) is False
    assert hint in capsys.readouterr().out
