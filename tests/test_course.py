"""The notebooks' pictures and amounts, by stack."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

from wris_lib import course
from wris_lib.backbones.checkpoints import STACKS
from wris_lib.train import Recipe, fit


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
    assert [course.few(count) for count in (80, 30, 3, 1)] == [4, 2, 2, 1]
    paper.setattr(torch.cuda, "is_available", lambda: True)
    assert course.few(80) == 40
    paper.setenv("WRIS_DATASET", "mine")
    assert course.split("toyref:val") == course.split("toyrefg:val") == "mine:val"


def test_a_draw_is_a_choice_without_repetition(paper):
    items = [f"item {number}" for number in range(50)]
    found = course.draw(items, 200, seed=3)
    assert len(set(found)) == 10 and set(found) <= set(items) and found == course.draw(items, 200, seed=3)
    assert found != course.draw(items, 200, seed=4)
    assert sorted(course.draw(items[:4], 200)) == items[:4]


def test_pictures_are_taken_at_even_distances(paper):
    numbers = list(range(400))
    assert course.every(numbers, 10, 40) == numbers[::10][:2]
    assert course.every(numbers[:4], 8, 120, start=4) == numbers[:4]
    assert course.every(numbers[:30], 8, 100, start=4) == [4, 10, 16, 22, 28]
    paper.setenv("WRIS_STACK", "toy")
    assert course.every(numbers, 8, 40, start=4) == numbers[4::8][:40]


def test_titles_name_the_pictures(paper):
    assert [course.named(spec) for spec in ("toyref:val", "toyref+:testA")] == ["refcoco val", "refcoco+ testA"]
    paper.setenv("WRIS_STACK", "toy")
    assert [course.named(spec) for spec in ("toyref:val", "toyref+:testA")] == ["ToyRef val", "ToyRef+ testA"]


def test_readers_are_told(paper):
    of_the_text = "the text, and figures from results/, tell of the toy stack"
    assert course.remark() == f"paper stack, scenes of RefCOCO; {of_the_text}"
    paper.setenv("WRIS_DATASET", "mine")
    paper.setitem(STACKS, "paper", replace(STACKS["paper"], note="random weights"))
    assert course.remark() == f"paper stack (random weights), scenes of mine; {of_the_text}"


@pytest.fixture
def notebook(monkeypatch) -> InteractiveShell:
    """A kernel's shell, as the library sees it."""
    shell = InteractiveShell()
    shell.history_manager.enabled = False
    monkeypatch.setattr(course, "get_ipython", lambda: shell)
    return shell


def test_a_remark_stands_under_every_cell(paper, notebook, capsys):
    course.mark_cells()
    course.mark_cells()
    notebook.run_cell("print('a figure')")
    assert capsys.readouterr().out == f"a figure\n[{course.remark()}]\n"


def test_cells_on_the_toy_stack_have_no_remark(notebook, capsys):
    course.mark_cells()
    notebook.run_cell("print('a figure')")
    assert capsys.readouterr().out == "a figure\n"


def test_outside_a_notebook_there_are_no_cells_to_mark(paper):
    course.mark_cells()


def test_an_interrupted_cell_finds_its_folder_again():
    with pytest.raises(KeyboardInterrupt), course.resumable("train") as folder:
        (folder / "checkpoint.pt").touch()
        raise KeyboardInterrupt
    with course.resumable("another") as other:
        assert other != folder and not list(other.iterdir())
    with course.resumable("train") as again:
        assert again == folder and (again / "checkpoint.pt").exists()
    assert not folder.exists() and not other.exists()
    with course.resumable("train") as anew:
        assert not list(anew.iterdir())


def test_a_cell_that_fails_begins_anew():
    with pytest.raises(ValueError), course.resumable("train") as folder:
        raise ValueError
    assert not folder.exists()
    with course.resumable("train") as anew:
        assert anew != folder


@pytest.mark.parametrize("steps", [[3], [0, 2, 3]])
def test_a_training_that_is_stopped_and_run_again_ends_as_one_that_was_not(steps):
    """What a learner does: the stop button sends SIGINT, and the same cell is run again."""

    def run(stops: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)

        def batch(step: int) -> torch.Tensor:
            if stops and step == stops[0]:
                stops.pop(0)
                os.kill(os.getpid(), signal.SIGINT)
            return torch.randn(4, 2)

        with course.resumable("live") as folder:
            fit(model, lambda model, batch, _: {"loss": model(batch).square().mean()}, batch, Recipe(5, 0.1), folder)
        return model.weight.detach()

    expected, stops = run([]), list(steps)
    for _ in steps:
        with pytest.raises(KeyboardInterrupt):
            run(stops)
    assert not stops and torch.equal(run(stops), expected)
