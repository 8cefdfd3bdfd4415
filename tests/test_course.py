"""The notebooks' pictures and amounts, by stack."""

from dataclasses import replace

import pytest
import torch

from wris_lib import course
from wris_lib.backbones.checkpoints import STACKS


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("WRIS_STACK", "paper")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_on_the_toy_stack_nothing_changes():
    assert [course.split(spec) for spec in ("toyref:val", "toyobjects:train")] == ["toyref:val", "toyobjects:train"]
    assert course.few(80) == 80 and course.remark() == "toy stack"


def test_on_the_paper_stack_data_are_real_and_fewer(paper):
    specs = ("toyref:val", "toyref+:testA", "toyrefg:train", "toyobjects:val", "toycut:val")
    assert [course.split(spec) for spec in specs] == [
        *("refcoco:val", "refcoco+:testA", "refcocog:train", "toyobjects:val", "toycut:val")
    ]
    assert [course.few(count) for count in (80, 30, 3, 1)] == [10, 3, 2, 1]
    paper.setattr(torch.cuda, "is_available", lambda: True)
    assert course.few(80) == 40
    paper.setenv("WRIS_DATASET", "mine")
    assert course.split("toyref:val") == course.split("toyrefg:val") == "mine:val"


def test_a_draw_is_a_choice_without_repetition(paper):
    items = [f"item {number}" for number in range(50)]
    found = course.draw(items, 200, seed=3)
    assert len(set(found)) == 25 and set(found) <= set(items) and found == course.draw(items, 200, seed=3)
    assert found != course.draw(items, 200, seed=4)
    assert sorted(course.draw(items[:4], 200)) == items[:4]


def test_readers_are_told(paper):
    assert course.remark() == (
        "paper stack on refcoco:val; the text, and figures from results/, tell of the toy stack."
    )
    paper.setitem(STACKS, "paper", replace(STACKS["paper"], note="Its weights are random."))
    assert course.remark().endswith("tell of the toy stack. Its weights are random.")
