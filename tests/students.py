"""Students' copies run to their end, with every exercise reported as open.

Each takes as long as its notebook, so this is no part of the unit tests: `make test-students` starts it.
"""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_setup import script

assignments = script("assignments")
NOTEBOOKS = sorted(assignments.NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(scope="session", autouse=True)
def cache() -> None:
    """Copies find what the notebooks have encoded: the cache is the usual one, not the unit tests' empty one."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_copy_runs_to_its_end(path):
    copy = nbformat.reads(json.dumps(assignments.students_copy(assignments.read(path))), as_version=4)
    NotebookClient(copy, timeout=None, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
    for cell in filter(assignments.is_check, copy.cells):
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert said.startswith("○ ") and " is still open" in said, f"{cell.source} said {said!r}"
