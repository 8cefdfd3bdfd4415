"""Which of the library's files an answer depends on, so that what is kept of it does not outlive a change of them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
NO_DATA = (".py", ".pyc", ".md")


def sources(*starts: str | Path) -> list[Path]:
    """Modules, all of the library's that they import, directly or through others, and the data beside any of these.

    Data are prompts, configurations, drawings: what is no Python in the same folder, or in one below without modules.
    A package's `__init__` counts where a name comes from it, and not where one of its modules is asked for: a method
    that shares a module with another one does not depend on all of that one.

    Args:
        starts: files of modules; they need not be the library's.
    """
    found: set[Path] = set()
    waiting = [Path(start) for start in starts]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += filter(None, map(_file, imported(path.read_text(encoding="utf-8"))))
    folders = {path.parent for path in found if PACKAGE in path.parent.parents}
    return sorted(found.union(*map(_data, folders)))


@cache
def imported(code: str) -> frozenset[str]:
    """The library's modules that a module's code imports from, also inside its functions: "wris_lib.data.images"."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{name.name}" for name in node.names}
            names |= {name if _file(name) else node.module for name in inside}
    return frozenset(filter(_file, names))


def _file(module: str) -> Path | None:
    """Of one of the library's modules, by its dotted name."""
    if module.split(".")[0] != PACKAGE.name:
        return None
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _data(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not (path / "__init__.py").exists():
            yield from _data(path)
        elif path.is_file() and path.suffix not in NO_DATA:
            yield path
