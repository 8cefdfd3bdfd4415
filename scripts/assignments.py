"""Students' copies of the notebooks, without solutions, and the assignments that nbgrader grades.

Started by `make student` and `make assignments`. The notebooks are the only source. In their cells' metadata stand

- `nbgrader`, in nbgrader's own format: which cell is an exercise's stub, and which its check, with points;
- the tag `solution`: a cell that students do not get, and with it `stand_in`: lines that take its place, where later
  cells need what they would otherwise have from the solution;
- the tag `answer`: a cell whose output answers what the learner was asked to predict.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from symtable import Symbol, SymbolTable, symtable
from typing import Any

from wris_lib.errors import WrisError
from wris_lib.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"
# What a hint says last: where the solution is, which students do not have.
REVEALING = re.compile(r"\n*^The solution\b.*\bfolded\b.*\Z", re.MULTILINE)
CONFIG = """\
# Written by `make assignments`.
from nbgrader.preprocessors import CheckCellMetadata, ComputeChecksums, LockCells, SaveCells

c = get_config()
c.CourseDirectory.course_id = "wris"
# Solutions are out already, and stubs in, so nbgrader shall not clear anything.
c.GenerateAssignment.preprocessors = [LockCells, CheckCellMetadata, ComputeChecksums, SaveCells]
c.Execute.timeout = 900  # seconds a cell: where the cache is empty, notebook 04's check paints the toy world first
"""

Cell = dict[str, Any]
Notebook = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one or the other; the exit code: 0 done, 2 the user can mend it."""
    parser = argparse.ArgumentParser(description="Students' copies of the notebooks, or nbgrader's assignments.")
    parser.add_argument("what", choices=["student", "assignments"])
    try:
        if parser.parse_args(arguments).what == "student":
            write_copies(BUILD / "student")
        else:
            write_assignments(BUILD / "assignments")
    except WrisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_copies(folder: Path) -> None:
    """Write the students' copy of every notebook.

    Raises:
        WrisError: the folder cannot be written to.
    """
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        write(folder / path.name, students_copy(read(path)))
    print(folder)


def write_assignments(folder: Path) -> None:
    """Make nbgrader's course folder, with an assignment a notebook in `source` and `release`.

    Raises:
        WrisError: nbgrader is missing, or refuses; a check is no single call; or the folder cannot be written to.
    """
    if find_spec("nbgrader") is None:
        raise WrisError(
            "nbgrader, which makes and grades assignments, is not installed; `make assignments` installs it, on Python"
            " 3.11 or newer."
        )
    with atomic_write(folder / "nbgrader_config.py", "w") as file:
        file.write(CONFIG)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        write(folder / "source" / path.stem / path.name, assignment(read(path)))
    generate(folder)
    print(folder)


def generate(folder: Path) -> None:
    """Let nbgrader make a release of every assignment, and note the points in the course's database.

    Raises:
        WrisError: nbgrader refuses.
    """
    done = nbgrader(folder, "generate_assignment", "*", "--force")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        traceback = [line for line in lines if line.startswith(" ") and line.strip()]
        reason = (traceback or lines)[-1].strip(" .")
        raise WrisError(f"nbgrader made no release ({reason}); mend that, or begin anew without {folder}.")


def nbgrader(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an nbgrader command in a course's folder."""
    # nbgrader starts `alembic` by its name, which lies beside Python, also where the environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "nbgrader", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)


def students_copy(notebook: Notebook) -> Notebook:
    """A notebook without solutions, without outputs that give an answer away, and ready to run to its end."""
    cells = []
    for cell in deepcopy(notebook["cells"]):
        metadata = cell["metadata"]
        if has_tag(cell, "solution"):
            if "stand_in" in metadata:
                cells.append(code_cell(cell["id"].replace("solution", "stand-in"), metadata["stand_in"]))
            continue
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            if (rest := REVEALING.sub("", text)) != text:
                cell["source"] = rest.splitlines(keepends=True)
        elif "nbgrader" in metadata or has_tag(cell, "answer"):
            cell |= {"outputs": [], "execution_count": None}
        cells.append(cell)
    return notebook | {"cells": cells}


def assignment(notebook: Notebook) -> Notebook:
    """A student's copy whose checks raise, as nbgrader expects it of tests.

    nbgrader runs a submission from top to bottom. So cells that no exercise needs get the tag `skip-execution`, which
    only such runs respect: grading then takes seconds, not the minutes of the notebook's trainings.

    Raises:
        WrisError: a check is no single call.
    """
    needed = needed_cells(notebook)
    copy = students_copy(notebook)
    for cell in copy["cells"]:
        if cell["cell_type"] == "code" and cell["id"] not in needed:
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "skip-execution"]
        if is_check(cell):
            cell["source"] = [raising("".join(cell["source"]), cell["id"])]
    return copy


def raising(check: str, cell_id: str) -> str:
    """`assert check_iou(iou)`, made of the line `check_iou(iou);` that only prints what is wrong.

    Raises:
        WrisError: there is more than such a line.
    """
    match ast.parse(check).body:
        case [ast.Expr(value=ast.Call() as call)]:
            return f"assert {ast.unparse(call)}"
    raise WrisError(f"the cell {cell_id} is marked as a check, but is no single call; write `exercises.check_…(…);`.")


def needed_cells(notebook: Notebook) -> set[str]:
    """The ids of stubs and checks, and of the cells that define what checks and right answers use."""
    needed, wanted = set(), set()
    for cell in reversed(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        bound, used = names(source)
        if has_tag(cell, "solution"):
            functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
            wanted |= names("\n".join(map(ast.unparse, functions)))[1]
        elif "nbgrader" in cell["metadata"] or bound & wanted:
            needed.add(cell["id"])
            wanted = (wanted - bound) | used
    return needed


def names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell binds for the cells after it, and those that it takes from the cells before it."""
    symbols = list(global_symbols(symtable(source, "cell", "exec")))
    bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    return bound, {symbol.get_name() for symbol in symbols if symbol.is_referenced()} - bound


def global_symbols(table: SymbolTable) -> Iterator[Symbol]:
    """Also those that functions use, and those that `:=` binds within a comprehension."""
    for symbol in table.get_symbols():
        if symbol.is_global() or table.get_type() == "module":
            yield symbol
    for inner in table.get_children():
        yield from global_symbols(inner)


def is_check(cell: Cell) -> bool:
    return cell["metadata"].get("nbgrader", {}).get("grade", False)


def has_tag(cell: Cell, tag: str) -> bool:
    return tag in cell["metadata"].get("tags", [])


def code_cell(cell_id: str, source: list[str]) -> Cell:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": cell_id,
        "metadata": {},
        "outputs": [],
        "source": source,
    }


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, notebook: Notebook) -> None:
    """As Jupyter writes it."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
