"""Imports run one way, so that whoever reads a module need not know what is built upon it."""

import ast
from pathlib import Path

import wris_lib

# Rooms of the house, from the ground up. Each may import from those named before it, and within itself.
ROOMS = (
    *("errors", "files", "download", "data", "backbones", "train", "evaluate", "methods"),
    *("report", "answers", "examples", "ablation_figure", "show"),  # what becomes of predictions
    *("course", "contestants", "questions", "cost", "comparison_figures", "page", "benchmark"),
    *("pretrain", "studies", "fetch", "doctor"),
    *("exercises", "exercises_sam", "exercises_ppt", "exercises_curriculum", "exercises_pcnet", "exercises_iterprime"),
    *("exercises_measured", "exercises_compare"),
    *("widgets", "widgets_ppt", "widgets_curriculum", "widgets_pcnet", "widgets_iterprime", "widgets_compare"),
    "__main__",
)
FOLDER = Path(wris_lib.__file__).parent


def rooms_used(path: Path) -> set[str]:
    """The rooms that a file imports from, also inside its functions."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "wris_lib":
            names = [f"wris_lib.{name.name}" for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        used |= {name.split(".")[1] for name in names if name.startswith("wris_lib.")}
    return used


def test_imports_run_one_way():
    places = {room: number for number, room in enumerate(ROOMS)}
    seen = set()
    for path in FOLDER.rglob("*.py"):
        room = path.relative_to(FOLDER).parts[0].removesuffix(".py")
        if room == "__init__":  # the package's own face
            continue
        seen.add(room)
        wrong = [used for used in rooms_used(path) if places[used] > places[room]]
        assert not wrong, f"{path.name} imports {wrong}; {room} stands below them, see ROOMS"
    assert seen == set(ROOMS)


def test_imports_are_found(tmp_path):
    lines = (
        "import os, wris_lib.show",
        "from wris_lib import data",
        "def f():",
        "    from wris_lib.methods.ppt import Ppt",
    )
    (tmp_path / "module.py").write_text("\n".join(lines))
    assert rooms_used(tmp_path / "module.py") == {"show", "data", "methods"}
