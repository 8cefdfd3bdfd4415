"""The exercises about PCNet: other right answers, what is no plain number, and what the library does."""

import numpy as np
import pytest
import torch

from tests.wrong_answers import EXERCISES, rejection
from wris_lib.methods.pcnet import loss
from wris_lib.methods.pcnet.decompose import repeat

ORDER_CUES, AMBIGUITY, DISAMBIGUATION = (EXERCISES[n] for n in ("order_cues", "ambiguity_of", "disambiguation"))


def test_other_right_ways_pass(capsys):
    assert ORDER_CUES.judge(lambda cues, count: tuple((cues * count)[:count]))
    assert ORDER_CUES.judge(lambda cues, count: np.resize(cues, count))
    assert AMBIGUITY.judge(lambda *given: float(AMBIGUITY.answer()(*given)))

    def without_sums(own, other):  # a cosine does not ask how long its vectors are
        one, two = np.exp(3 * (own - own.max())), np.exp(3 * (other - other.max()))
        return float(one @ two / np.sqrt((one @ one) * (two @ two)))

    assert DISAMBIGUATION.judge(without_sums)


@pytest.mark.parametrize("got", [True, np.nan, np.inf, np.zeros(1), np.array(0.5), 10**400])
@pytest.mark.parametrize("name", ["ambiguity_of", "disambiguation"])
def test_what_is_no_plain_number(name, got, capsys):
    line = rejection(name, lambda *_: got, capsys)
    assert ("float(…) makes one of it" in line) == isinstance(got, np.ndarray)


def test_the_exercises_are_what_the_library_does():
    rng = np.random.default_rng(0)
    assert tuple(ORDER_CUES.answer()(["a", "b", "c"], 5)) == repeat(["a", "b", "c"], 5)
    response, proposals = rng.random(40), rng.random((4, 40)) < 0.4
    present = torch.ones(1, 4, dtype=torch.bool)
    theirs = loss.ambiguity(torch.from_numpy(response)[None], torch.from_numpy(proposals)[None], present)
    assert AMBIGUITY.answer()(response, proposals) == pytest.approx(theirs.item())
    own, other = rng.normal(size=(2, 40))
    theirs = loss.disambiguation(torch.from_numpy(own)[None], torch.from_numpy(other)[None, None])
    assert DISAMBIGUATION.answer()(own, other) == pytest.approx(theirs.item())
