"""Each exercise of the notebooks: its solution passes, its stub is open, and each wrong answer gets its hint."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.made_up import asked
from tests.wrong_answers import EXERCISES, NOTEBOOKS, PATCHES, assignments, pairs, rejection
from wris_lib import exercises_measured

KNOWN = {name: patches for exercises in PATCHES.values() for name, patches in exercises.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """SAM's answers are made up: the real ones, which notebook 04 asks for, take the whole toy world and a method."""
    monkeypatch.setattr(exercises_measured, "sam_answers", lambda draw: [asked(seed) for seed in range(6)])


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes(name, capsys):
    answer = EXERCISES[name].answer()
    for _ in range(3):  # most checks draw inputs anew
        assert EXERCISES[name].judge(answer) is True
    assert set(capsys.readouterr().out.splitlines()) == {f"✔ {EXERCISES[name].title} is right."}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_is_open(name, capsys):
    exercise = EXERCISES[name]
    assert exercise.judge(exercise.run(exercise.stub)[name]) is False
    assert re.fullmatch(rf"○ {exercise.title} is still open: .*\.\n", capsys.readouterr().out)


# Wrong answers


@pytest.mark.parametrize(
    "name, patch",
    [pytest.param(name, patch, id=f"{name}-{n}") for name in KNOWN for n, patch in enumerate(KNOWN[name], 1)],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_wrong_answer_gets_its_hint(name, patch, capsys):
    answer = EXERCISES[name].answer(patch["replace"])
    words = ".*".join(map(re.escape, patch["hint"].split(" … ")))
    for _ in range(2):  # whatever is drawn
        assert re.search(words, rejection(name, answer, capsys))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_exercise_has_wrong_answers(notebook):
    names = [stub["metadata"]["nbgrader"]["grade_id"] for stub, _ in pairs(NOTEBOOKS[notebook])]
    assert list(PATCHES[notebook]) == names
    for patches in PATCHES[notebook].values():
        assert len({patch["hint"] for patch in patches}) >= 2
        for patch in patches:
            assert set(patch) - {"mistake"} == {"replace", "hint"}
            assert len(patch["hint"]) > len("got ") and patch["replace"]


def test_every_file_is_a_notebooks_and_nothing_in_it_stands_twice():
    """YAML's reader would take the last of two without a word."""
    assert list(PATCHES) == list(NOTEBOOKS)
    for notebook, exercises in PATCHES.items():
        text = (assignments.NOTEBOOKS / "wrong_answers" / f"{notebook}.yaml").read_text(encoding="utf-8")
        assert len(re.findall("^  - ", text, re.MULTILINE)) == sum(map(len, exercises.values()))


def test_a_patch_that_no_longer_fits():
    exercise = replace(EXERCISES["iou"], solution="def iou(first, second):\n    return 1.0")
    with pytest.raises(AssertionError, match="'/ union' is not in the solution of iou, or no longer"):
        exercise.answer({"/ union": ""})


# What is no answer at all


def raising(*_, **__):
    raise KeyError("no\nsuch thing")


NO_ANSWERS = {
    "None": lambda *_, **__: None,
    "six arguments": lambda a, b, c, d, e, f: 1,
    "text": lambda *_, **__: "nonsense !",
    "texts": lambda *_, **__: ("no", "good"),
    "ragged": lambda *_, **__: [[1], [1, 2]],
    "empty": lambda *_, **__: [],
    "dictionary": lambda *_, **__: {"a": 1},
    "object": lambda *_, **__: object(),
    "rows": lambda *_, **__: np.zeros((3, 2)),
    "no rows": lambda *_, **__: np.zeros((0, 2)),
    "two": lambda *_, **__: (np.zeros(24), "no"),
    "points and labels": lambda *_, **__: (np.zeros((4000, 2)), np.zeros(3)),
    "points that are nan": lambda *_, **__: (np.full((4000, 2), np.nan), np.zeros(4000)),
    "True": lambda *_, **__: True,
    "NumPy's True": lambda *_, **__: np.bool_(True),
    "fraction": lambda *_, **__: 1.5,
    "huge": lambda *_, **__: 10**400,
    "two huge ones": lambda *_, **__: (10**400, 10**400),
    "negative": lambda *_, **__: -1,
    "number in place of a function": 0.5,
    "raises": raising,
}
WORDS = {
    "None": "got None",
    "six arguments": "it raised TypeError",
    "number in place of a function": "got 0.5 instead of a function; pass",
    "raises": "it raised KeyError ('no\\nsuch thing')",
}


@pytest.mark.parametrize("name", EXERCISES)
def test_anything_at_all_gets_one_line(name, capsys):
    for kind, answer in NO_ANSWERS.items():
        assert WORDS.get(kind, "") in rejection(name, answer, capsys), kind


@pytest.mark.parametrize("name", [name for name in EXERCISES if name != "select"])  # whose answer may be None
def test_a_function_without_a_return(name, capsys):
    assert "does every way through the function end in `return`?" in rejection(name, NO_ANSWERS["None"], capsys)
