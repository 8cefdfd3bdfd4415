"""Students' copies and nbgrader's assignments: what they leave out, what they keep, and what their cells need."""

import ast
import builtins
import json
import re
from subprocess import CompletedProcess

import pytest

from tests.wrong_answers import EXERCISES, NOTEBOOKS, assignments, pairs, source_of
from wris_lib.errors import WrisError
from wris_lib.methods import clip_sam

POINTS = {"easy": 1, "medium": 2, "hard": 3}
STAND_INS = {
    cell["id"]: source_of(cell)
    for notebook in NOTEBOOKS.values()
    for cell in assignments.students_copy(notebook)["cells"]
    if cell["id"].endswith("-stand-in")
}


# Marks in the notebooks


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_exercise_is_marked(name):
    cells = {cell["id"]: cell for cell in NOTEBOOKS[name]["cells"]}
    for stub, check in pairs(NOTEBOOKS[name]):
        exercise = stub["id"].removesuffix("-stub")
        assert check["id"] == f"{exercise}-check"
        assert assignments.has_tag(cells[f"{exercise}-solution"], "solution")
        level = re.search(r"^### Exercise .* · +(\w+), \d+ minutes$", source_of(cells[exercise]), re.MULTILINE)[1]
        common = {"schema_version": 3, "task": False}
        assert stub["metadata"]["nbgrader"] == common | {
            "grade_id": ast.parse(source_of(stub)).body[0].name,
            "grade": False,
            "solution": True,
            "locked": False,
        }
        assert check["metadata"]["nbgrader"] == common | {
            "grade_id": ast.parse(source_of(check)).body[0].value.func.attr,
            "grade": True,
            "solution": False,
            "locked": True,
            "points": POINTS[level],
        }
    assert sum("-check" in id for id in cells) == len(pairs(NOTEBOOKS[name]))
    unmarked = [id for id in cells if id.endswith("-solution") and not assignments.has_tag(cells[id], "solution")]
    assert not unmarked


def test_grade_ids_are_unique():
    ids = [cell["metadata"]["nbgrader"]["grade_id"] for nb in NOTEBOOKS.values() for pair in pairs(nb) for cell in pair]
    assert len(set(ids)) == len(ids) > 0


# Students' copies


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_copy_has_no_solution_and_is_else_the_same(name):
    original, copy = NOTEBOOKS[name], assignments.students_copy(NOTEBOOKS[name])
    import nbformat  # takes two seconds

    nbformat.validate(nbformat.reads(json.dumps(copy), as_version=4))
    assert copy | {"cells": []} == original | {"cells": []}
    kept = [cell for cell in copy["cells"] if not cell["id"].endswith("-stand-in")]
    expected = [cell for cell in original["cells"] if not assignments.has_tag(cell, "solution")]
    hints = []
    for cell, before in zip(kept, expected, strict=True):
        if cell["id"].endswith("-hint"):
            hints.append(cell)
            assert source_of(before).startswith(source_of(cell)) and source_of(cell).endswith("\n</details>")
            cell = cell | {"source": before["source"]}
        if "nbgrader" in cell["metadata"] or assignments.has_tag(cell, "answer"):
            assert cell["outputs"] == [] and cell["execution_count"] is None
            cell = cell | {part: before[part] for part in ("outputs", "execution_count")}
        assert cell == before
    assert len(hints) == len(pairs(copy)) == len(pairs(original))
    text = json.dumps(copy, ensure_ascii=False)
    assert "solution is" not in text and "solution, folded" not in text and "✔" not in text
    for cell in original["cells"]:
        if assignments.has_tag(cell, "solution"):
            assert cell["id"] not in text and json.dumps(source_of(cell), ensure_ascii=False)[1:-1] not in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_of_a_copy_needs_a_solution(name):
    """None needs a name that only a solution defines, or a function that is still a stub."""
    defined, still_open = {*dir(builtins), "display", "get_ipython"}, set()
    for cell in assignments.students_copy(NOTEBOOKS[name])["cells"]:
        if cell["cell_type"] != "code":
            continue
        bound, used = assignments.names(source_of(cell))
        assert not used - defined, f"{cell['id']} needs {used - defined}"
        if not cell["id"].startswith("exercise-"):
            assert not used & still_open, f"{cell['id']} calls {used & still_open}, which is a stub"
        defined |= bound
        still_open -= bound
        if "nbgrader" in cell["metadata"]:
            still_open |= bound  # a check binds nothing


@pytest.mark.parametrize(
    "exercise, stand_in",
    [
        (EXERCISES["points_from_map"], "exercise-points-stand-in"),
        (EXERCISES["draw_points"], "exercise-draw-stand-in"),
    ],
)
def test_a_stand_in_takes_the_place_of_a_stub(exercise, stand_in, capsys):
    scope = exercise.run(exercise.stub) | exercise.needed(exercise.check) | {"clip_sam": clip_sam}
    exec(STAND_INS[stand_in], scope)
    assert exercise.judge(scope[exercise.name]) is True


def test_a_stand_in_leaves_a_right_answer_alone(capsys):
    exercise = EXERCISES["draw_points"]
    answer = exercise.answer()
    scope = exercise.needed(exercise.check) | {"draw_points": answer}
    exec(STAND_INS["exercise-draw-stand-in"], scope)
    assert scope["draw_points"] is answer


def test_copies_are_written_as_the_notebooks_are(tmp_path):
    for name, notebook in NOTEBOOKS.items():
        assignments.write(tmp_path / "copy.ipynb", notebook)
        assert (tmp_path / "copy.ipynb").read_bytes() == (assignments.NOTEBOOKS / f"{name}.ipynb").read_bytes()


def test_make_student_writes_every_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assignments, "BUILD", tmp_path)
    assert assignments.main(["student"]) == 0
    assert {path.stem for path in (tmp_path / "student").iterdir()} == set(NOTEBOOKS)
    assert capsys.readouterr().out == f"{tmp_path / 'student'}\n"


@pytest.mark.parametrize(
    "source, bound, used",
    [
        ("import a.b, c as d\nfrom e import f", {"a", "d", "f"}, set()),
        ("def f(x):\n    return x + y + len(f.z)", {"f"}, {"y", "len"}),
        ("z = [x for x in y if (w := x)]", {"z", "w"}, {"y"}),
        ("def f():\n    x = 1\n    return lambda: x", {"f"}, set()),
    ],
)
def test_names(source, bound, used):
    assert assignments.names(source) == (bound, used)


# nbgrader


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_an_assignment_raises_where_an_exercise_is_open(name, capsys):
    for stub, check in pairs(assignments.assignment(NOTEBOOKS[name])):
        exercise = EXERCISES[stub["metadata"]["nbgrader"]["grade_id"]]
        scope = exercise.run(source_of(stub)) | exercise.needed(source_of(check))
        with pytest.raises(AssertionError):
            exec(source_of(check), scope)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_grading_runs_only_what_the_exercises_need(name):
    cells = assignments.assignment(NOTEBOOKS[name])["cells"]
    run = {cell["id"] for cell in cells if cell["cell_type"] == "code"}
    run -= {cell["id"] for cell in cells if assignments.has_tag(cell, "skip-execution")}
    marked = {cell["id"] for pair in pairs(NOTEBOOKS[name]) for cell in pair}
    others = {"00_start_here": {"substrings"}}  # where the direction words are
    assert run == marked | {"imports"} | others.get(name, set())


def test_a_check_of_several_lines():
    with pytest.raises(WrisError, match=r"the cell x is marked as a check, but is no single call; write `exercises\."):
        assignments.raising("print(1)\ncheck(iou)", "x")


def test_without_nbgrader(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assignments, "BUILD", tmp_path)
    monkeypatch.setattr(assignments, "find_spec", lambda name: None)
    assert assignments.main(["assignments"]) == 2
    assert capsys.readouterr().err.startswith("error: nbgrader, which makes and grades assignments, is not installed;")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "said, reason",
    [
        (
            "[App | ERROR] Traceback:\n  File x\n    SomeError: no such thing.\n    \n[App | ERROR] See above",
            "no such thing",
        ),
        ("nbgrader: killed", "nbgrader: killed"),
        ("", "no reason given"),
    ],
)
def test_nbgrader_refuses(said, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assignments, "BUILD", tmp_path)
    monkeypatch.setattr(assignments, "find_spec", lambda name: name)
    monkeypatch.setattr(assignments.subprocess, "run", lambda *_, **__: CompletedProcess([], 1, "", said))
    assert assignments.main(["assignments"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nbgrader made no release (") and f"{reason}); mend that, or begin anew" in error


def test_make_assignments_hands_every_notebook_to_nbgrader(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(assignments, "BUILD", tmp_path)
    monkeypatch.setattr(assignments, "find_spec", lambda name: name)
    monkeypatch.setattr(
        assignments.subprocess, "run", lambda *given, **options: calls.append(options) or CompletedProcess(given, 0)
    )
    assert assignments.main(["assignments"]) == 0
    folder = tmp_path / "assignments"
    sources = {path.relative_to(folder).as_posix() for path in folder.rglob("*.ipynb")}
    assert sources == {f"source/{name}/{name}.ipynb" for name in NOTEBOOKS}
    compile((folder / "nbgrader_config.py").read_text(encoding="utf-8"), "nbgrader_config.py", "exec")
    assert [call["cwd"] for call in calls] == [folder]
