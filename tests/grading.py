"""nbgrader grades what students hand in: all points for solutions, none for wrong answers and for open exercises.

It starts a kernel for every student and notebook, so this is no part of the unit tests: `make test-grading` starts it.
"""

import csv
from pathlib import Path

import pytest

from tests.wrong_answers import EXERCISES, NOTEBOOKS, PATCHES, assignments, pairs


@pytest.fixture(scope="session", autouse=True)
def cache() -> None:
    """Checks find what the notebooks have made: the cache is the usual one, not the unit tests' empty one."""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assignments")
    assignments.write_assignments(folder)
    return folder


def hand_in(course: Path, student: str, name: str, answers: dict[str, str]) -> None:
    """Put a release with these functions in place of stubs where nbgrader looks for submissions."""
    notebook = assignments.read(course / "release" / name / f"{name}.ipynb")
    for stub, _ in pairs(notebook):
        exercise = stub["metadata"]["nbgrader"]["grade_id"]
        stub["source"] = answers.get(exercise, "".join(stub["source"])).splitlines(keepends=True)
    assignments.write(course / "submitted" / student / name / f"{name}.ipynb", notebook)


def run(course: Path, *arguments: str) -> None:
    done = assignments.nbgrader(course, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_points(name: str, course: Path):
    exercises = [EXERCISES[stub["metadata"]["nbgrader"]["grade_id"]] for stub, _ in pairs(NOTEBOOKS[name])]
    hand_in(course, "solved", name, {each.name: each.solution for each in exercises})
    hand_in(course, "wrong", name, {e.name: e.changed(PATCHES[name][e.name][0]["replace"]) for e in exercises})
    hand_in(course, "open", name, {})
    run(course, "autograde", name, "--create")
    run(course, "export")
    with open(course / "grades.csv", newline="", encoding="utf-8") as table:
        rows = {row["student_id"]: row for row in csv.DictReader(table) if row["assignment"] == name}
    points = sum(check["metadata"]["nbgrader"]["points"] for _, check in pairs(NOTEBOOKS[name]))
    assert {student: float(row["score"]) for student, row in rows.items()} == {"solved": points, "wrong": 0, "open": 0}
    assert {float(row["max_score"]) for row in rows.values()} == {points}
