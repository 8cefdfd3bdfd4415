"""Exercises that ask SAM: when it is asked, figures, orders that will do, and the draw."""

import re
from itertools import permutations

import numpy as np

from tests.wrong_answers import EXERCISES, rejection
from wris_lib import exercises_sam

MY_ORDER = EXERCISES["my_order"]


def test_sam_is_not_asked_while_an_exercise_is_open(capsys, monkeypatch):
    monkeypatch.setattr(exercises_sam, "_four_ways", None)
    assert MY_ORDER.judge(MY_ORDER.run(MY_ORDER.stub)["my_order"]) is False
    assert capsys.readouterr().out.startswith("○ my_order is still open")


def test_figures_of_a_choice_are_in_order(capsys):
    """SAM's choice is worse than the best of its masks, and what is asked for lies between the two."""
    line = rejection("choose_mask", lambda masks, guesses: guesses.argmax(), capsys)
    reached, by_sam, best, wanted = map(float, re.findall(r"\d+\.\d", line))
    assert reached == by_sam < wanted < best


def test_ways_that_cannot_be_told_apart_may_be_in_any_order(capsys, monkeypatch):
    even = np.linspace(0, 1, 24)
    monkeypatch.setattr(exercises_sam, "_four_ways", lambda: dict.fromkeys(exercises_sam.WAYS, even))
    assert all(MY_ORDER.judge(lambda order=order: order) for order in permutations(exercises_sam.WAYS))


def test_the_draw_is_always_the_same():
    first, again = (exercises_sam._things.__wrapped__(4, least=3000) for _ in range(2))
    for (_, mask), (_, same) in zip(first, again, strict=True):
        assert np.array_equal(mask, same) and mask.sum() >= 3000


def test_what_choices_are_worth_by_hand():
    ious = [np.array([0.5, 0.9]), np.array([0.7, 0.1])]
    assert exercises_sam.choices(ious, [1, 1], [0, 0]) == (50.0, 60.0, 80.0, 70.0)
