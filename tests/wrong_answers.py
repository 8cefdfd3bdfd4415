"""The notebooks' exercises, and wrong answers to them, without running a notebook.

Wrong answers are patches of solutions, in notebooks/wrong_answers: `replace` has the texts that change, `hint` words of
the line that the check prints, and `mistake`, where it is there, something for teachers.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.test_setup import script

assignments = script("assignments")
NOTEBOOKS = {path.stem: assignments.read(path) for path in sorted(assignments.NOTEBOOKS.glob("*.ipynb"))}
PATCHES = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((assignments.NOTEBOOKS / "wrong_answers").glob("*.yaml"))
}


@dataclass(frozen=True)
class Exercise:
    """An exercise's sources.

    Attributes:
        name: of the function that the learner writes.
        title: what the check calls it.
        stub, check: their cells.
        solution: the definitions of its cell, without what tries them there.
        earlier: names that cells before them define, as far as grading runs them, with the statement that does.
    """

    name: str
    title: str
    stub: str
    check: str
    solution: str
    earlier: dict[str, str]

    def answer(self, replace: dict[str, str] | None = None) -> Callable:
        """The notebook's solution, with some of its texts replaced."""
        return self.run(self.changed(replace or {}))[self.name]

    def changed(self, replace: dict[str, str]) -> str:
        """The source of that."""
        source = self.solution
        for old, new in replace.items():
            assert old in source, f"{old!r} is not in the solution of {self.name}, or no longer"
            source = source.replace(old, new)
        return source

    def judge(self, answer: Any) -> bool:
        """What the check's cell says of an answer; it prints one line."""
        return eval(self.check.rstrip(";"), self.needed(self.check) | {self.name: answer})

    def run(self, source: str) -> dict[str, Any]:
        """The names that a stub or a solution defines, and those that it needs."""
        scope = self.needed(source)
        exec(source, scope)
        return scope

    def needed(self, source: str) -> dict[str, Any]:
        """What a source takes from earlier cells."""
        scope: dict[str, Any] = {}
        for name in assignments.names(source)[1] & set(self.earlier):
            exec(self.earlier[name], scope)
        return scope


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def pairs(notebook: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The stub and the check of each exercise that has points."""
    marked = [cell for cell in notebook["cells"] if "nbgrader" in cell["metadata"]]
    return list(zip(marked[::2], marked[1::2], strict=True))


def exercises(notebook: dict[str, Any]) -> Iterator[Exercise]:
    cells = {cell["id"]: cell for cell in notebook["cells"]}
    needed = assignments.needed_cells(notebook) - {cell["id"] for pair in pairs(notebook) for cell in pair}
    lines = [line for id in cells if id in needed for line in statements(source_of(cells[id]))]
    earlier = {name: line for line in lines for name in assignments.names(line)[0]}
    for stub, check in pairs(notebook):
        name, title = (cell["metadata"]["nbgrader"]["grade_id"] for cell in (stub, check))
        source = source_of(cells[stub["id"].replace("stub", "solution")])
        definitions = [node for node in ast.parse(source).body if isinstance(node, (*IMPORTS, ast.FunctionDef))]
        solution = "\n".join(ast.get_source_segment(source, node) for node in definitions)
        yield Exercise(name, title.removeprefix("check_"), source_of(stub), source_of(check), solution, earlier)


def statements(source: str) -> Iterator[str]:
    """Those of a cell, with a line for each name that it imports."""
    for node in ast.parse(source).body:
        if isinstance(node, IMPORTS):
            yield from (ast.unparse(type(node)(**vars(node) | {"names": [alias]})) for alias in node.names)
        else:
            yield ast.unparse(node)


IMPORTS = (ast.Import, ast.ImportFrom)
EXERCISES = {exercise.name: exercise for notebook in NOTEBOOKS.values() for exercise in exercises(notebook)}


def rejection(name: str, answer: Any, capsys: pytest.CaptureFixture) -> str:
    """The one line with which an exercise's check rejects an answer."""
    assert EXERCISES[name].judge(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {EXERCISES[name].title}: ") and line.endswith(".")
    return line
