"""The site's sources, looked at without Sphinx, and the checker of the built site."""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECKER = load(ROOT / "scripts" / "check_site.py")
DOCSTRINGS = load(DOCS / "extensions" / "docstrings.py")


@cache
def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@cache
def anchors(path: Path) -> set[str]:
    """What can be linked to in a page or notebook: its headings, named as on GitHub."""
    if path.suffix == ".ipynb":
        texts = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown"]
    else:
        texts = [path.read_text(encoding="utf-8")]
    headings = [heading for text in texts for heading in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Sources


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_notebook_is_a_page():
    assert NOTEBOOKS and re.search(r"^/notebooks/\*$", (DOCS / "index.md").read_text(encoding="utf-8"), re.M)


def test_every_page_of_ours_is_in_a_table_of_contents():
    listed = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in PAGES:
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        assert page.name == "index.md" or re.search(rf"^({name}|{page.stem})$", listed, re.M), name


def test_every_term_has_an_explanation_and_a_place():
    (block,) = re.findall(r"^```\{glossary\}\n(.*?)^```$", (DOCS / "glossary.md").read_text("utf-8"), re.M | re.S)
    entries = [entry.splitlines() for entry in block.strip().split("\n\n")]
    terms = [term for term, *_ in entries]
    assert len(terms) >= 40 and len(set(terms)) == len(terms)
    assert all(lines and lines[-1].startswith("  → [") for _, *lines in entries)


def test_pictures_of_failures_are_those_of_cells():
    wanted = re.findall(r"^```\{pictures\} (\S+) (\S+)$", (DOCS / "failures.md").read_text(encoding="utf-8"), re.M)
    assert wanted
    for notebook, cell in wanted:
        (outputs,) = [each["outputs"] for each in cells(ROOT / f"notebooks/{notebook}.ipynb") if each["id"] == cell]
        assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})), cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_picture_of_a_notebook_has_an_alt_text(path: Path):
    """In the form that MyST-NB knows; it is the cell's, so that it outlives a new execution."""
    texts = []
    for cell in cells(path):
        kinds = [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]
        text = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        assert bool(text) == any(kind.startswith("image/") for kind in kinds), cell["id"]
        texts += [text] if text else []
    assert texts and len(set(texts)) == len(texts)
    assert all(len(text.split()) >= 5 and text[0].isupper() and text[-1] == "." for text in texts)


def test_every_module_is_in_the_reference_once():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    listed = re.findall(r"^\.\. automodule:: (\S+)$", text, re.M)
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "wris_lib").rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files}
    bare = {"wris_lib", "wris_lib.__main__", "wris_lib.backbones", "wris_lib.pretrain", "wris_lib.studies"}
    assert sorted(listed) == sorted(modules - bare)


# Docstrings


def changed(docstring: str) -> str:
    return "\n".join(DOCSTRINGS.as_restructured_text(docstring.splitlines()))


def test_diagrams_and_tables_become_literal_blocks():
    assert changed("A.\n\n    a ──► b\n      ──► c\n\nB.") == "A.\n\n\n::\n\n        a ──► b\n          ──► c\n\n\nB."
    assert changed("A.\n\n| x | y |\n|---|---|") == "A.\n\n\n::\n\n    | x | y |\n    |---|---|"


def test_bars_in_a_sentence_are_no_markup():
    assert changed("W, |W| times.") == "W, \\|W\\| times."


@pytest.mark.parametrize(
    "docstring", ["A.\n\nArgs:\n    x: one,\n        two.\n\n    y: three.", "- one,\n  two\n\n  three\n- four"]
)
def test_sections_and_lists_stay_as_they_are(docstring: str):
    assert changed(docstring) == docstring


# The checker


def test_a_sound_site_passes(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.html").write_text(
        '<a href="b/c%20d.html#x">c</a><a href="#y">y</a><p id="y"><a href="https://e.org">'
    )
    (tmp_path / "b" / "c d.html").write_text(
        '<p id="x"><a href="../a.html"><img src="data:image/png;base64,AA" alt="A.">'
    )
    (tmp_path / "s.css").write_text('p { background: url("a.png") }')
    assert CHECKER.main(str(tmp_path)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "html, complaint",
    [
        ('<a href="b.html">', "b.html does not exist"),
        ('<img src="pictures/b.png" alt="B.">', "pictures/b.png does not exist"),
        ('<a href="#x">', "#x has no such anchor"),
        ('<a href="a.html#x">', "a.html#x has no such anchor"),
        ('<script src="https://e.org/m.js">', "https://e.org/m.js comes from the network"),
        ('<link rel="stylesheet" href="//e.org/m.css">', "//e.org/m.css comes from the network"),
        ('<img src="http://e.org/m.png" alt="M.">', "http://e.org/m.png comes from the network"),
        ('<img src="data:image/png;base64,AA">', "data:image/png;base64,AA has no alt text"),
        ('<img src="data:image/png;base64,AA" alt="">', "data:image/png;base64,AA has no alt text"),
        (
            '<img src="data:image/png;base64,AA" alt="data:image/png;base64,AA">',
            "data:image/png;base64,AA has no alt text",
        ),
    ],
)
def test_what_is_wrong_with_a_page_is_said(html: str, complaint: str, tmp_path, capsys):
    (tmp_path / "a.html").write_text(html)
    assert CHECKER.main(str(tmp_path)) == 1
    assert capsys.readouterr().err == f"a.html: {complaint}\n"


@pytest.mark.parametrize("style", ["@import 'https://e.org/f.css'", "p { background: url(//e.org/p.png) }"])
def test_styles_from_the_network_are_found(style: str, tmp_path):
    (tmp_path / "s.css").write_text(style)
    (complaint,) = CHECKER.problems(tmp_path)
    assert complaint.startswith("s.css: ") and complaint.endswith("comes from the network")
