"""Exercises that ask SAM: a right answer passes, and each mistake that a learner is likely to make gets its hint."""

import re
from itertools import permutations

import numpy as np
import pytest

from tests.wrong_answers import changed, untouched
from wris_lib import exercises_sam


def choose_mask(masks, guesses):
    two = np.argsort(guesses)[1:]
    return two[masks[two].sum(axis=(1, 2)).argmax()]


def my_order():
    return ["as drawn", "without the negative ones", "all called positive", "all turned around"]


RIGHT = {
    "choose_mask": (exercises_sam.check_choose_mask, choose_mask),
    "my_order": (exercises_sam.check_my_order, my_order),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    check, answer = RIGHT[name]
    assert check(answer) is True
    assert capsys.readouterr().out == f"✔ {name} is right.\n"


@pytest.mark.parametrize("name", RIGHT)
def test_an_untouched_stub_is_open_and_sam_is_not_asked(name, capsys, monkeypatch):
    check, _ = RIGHT[name]
    monkeypatch.setattr(exercises_sam, "_four_ways", None)
    assert check(untouched) is False
    assert capsys.readouterr().out.startswith(f"○ {name} is still open")


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("result", [None, "nonsense", [[1], [1, 2]], object(), np.zeros((0, 2)), 3, -1, True, 1.5, []])
def test_anything_at_all_gets_one_line(name, result, capsys):
    check, _ = RIGHT[name]
    assert check(lambda *_: result) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {name}: ") and line.endswith(".")


CHOSEN = "two[masks[two].sum(axis=(1, 2)).argmax()]"
CHOOSING_MISTAKES = [
    ((CHOSEN, "guesses.argmax()"), "is asked for: that is SAM's own choice."),
    ((CHOSEN, "masks.sum(axis=(1, 2)).argmax()"), "one of the three is mostly background, and SAM knows that"),
    ((CHOSEN, "masks.sum(axis=(1, 2)).argmin()"), "the smallest is mostly a part"),
    ((CHOSEN, "0"), "the order of the three is mixed, so a place says nothing"),
    ((CHOSEN, f"masks[{CHOSEN}]"), "expected a number: 0, 1 or 2: which mask, not the mask itself"),
    ((CHOSEN, f"3 + {CHOSEN}"), "expected a number: 0, 1 or 2"),
    ((CHOSEN, f"int({CHOSEN} + 1) % 3"), "on 48 fresh things your choice has an mIoU of "),
]
WORST = '"all turned around"'
ORDER_MISTAKES = [
    ((f", {WORST}", "", "[", f"[{WORST}, "), "turned around, the points ask for what lies around the thing"),
    (
        ("as drawn", "x", "without the negative ones", "as drawn", '"x"', '"without the negative ones"'),
        "are true answers",
    ),
    (
        ("as drawn", "x", "all called positive", "as drawn", '"x"', '"all called positive"'),
        "called positive asks for what",
    ),
    ((f", {WORST}", ""), "'all turned around' is missing in your order"),
    (("all turned around", "as drawn"), "'as drawn' is in your order 2 times: each of the four has one place"),
    (("all turned around", "turned"), "got 'turned', expected the four ways: 'as drawn', 'without the negative ones'"),
    (("return [", "return {", "]", "}"), "expected a list of the four ways, the best first"),
]
MISTAKES = [
    *((exercises_sam.check_choose_mask, choose_mask, *mistake) for mistake in CHOOSING_MISTAKES),
    *((exercises_sam.check_my_order, my_order, *mistake) for mistake in ORDER_MISTAKES),
]


@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    assert check(changed(right, *replacements)) is False
    assert hint in capsys.readouterr().out


def test_figures_of_a_choice_are_in_order(capsys):
    """SAM's choice is worse than the best of its masks, and what is asked for lies between the two."""
    exercises_sam.check_choose_mask(lambda masks, guesses: guesses.argmax())
    reached, by_sam, best, wanted = map(float, re.findall(r"\d+\.\d", capsys.readouterr().out))
    assert reached == by_sam < wanted < best


def test_ways_that_cannot_be_told_apart_may_be_in_any_order(capsys, monkeypatch):
    even = np.linspace(0, 1, 24)
    monkeypatch.setattr(exercises_sam, "_four_ways", lambda: dict.fromkeys(exercises_sam.WAYS, even))
    assert all(exercises_sam.check_my_order(lambda order=order: order) for order in permutations(exercises_sam.WAYS))


def test_the_draw_is_always_the_same():
    first, again = (exercises_sam._things.__wrapped__(4, least=3000) for _ in range(2))
    for (_, mask), (_, same) in zip(first, again, strict=True):
        assert np.array_equal(mask, same) and mask.sum() >= 3000
