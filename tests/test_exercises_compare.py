"""The exercise of notebook 06: other right answers, and numbers that are none."""

import numpy as np
import pytest

from tests.wrong_answers import EXERCISES, rejection

MOST_AGREED = EXERCISES["most_agreed"]


def slowly(masks):
    def iou(a, b):
        return (a & b).sum() / max((a | b).sum(), 1)

    return max(range(len(masks)), key=lambda n: sum(iou(masks[n], mask) for mask in masks if mask is not masks[n]))


@pytest.mark.parametrize("answer", [slowly, lambda masks: int(MOST_AGREED.answer()(masks))])
def test_other_right_answers_pass(answer, capsys):
    for _ in range(3):  # inputs are drawn anew
        assert MOST_AGREED.judge(answer) is True


@pytest.mark.parametrize("result", [-1, 7, np.zeros(2), []])
def test_what_is_no_answers_number(result, capsys):
    assert "expected which of the 4, counted from 0" in rejection("most_agreed", lambda masks: result, capsys)
