"""Every notebook in JupyterLab in a browser, as a learner has it. `make test-browser` runs this; the unit tests do not.

Screenshots stay in build/browser. They are for looking at; what a machine can tell is asserted here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser

from tests.browser.controls import LabOnPage
from tests.browser.page import WIDGET, NotebookPage
from tests.browser.server import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROMPT = 300  # milliseconds that an answer may take without a sign of work
CONTRAST = 4.5  # WCAG's AA for text


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest, browser: Browser, server: dict, build: Path) -> Iterator[NotebookPage]:
    """A notebook, all its cells run."""
    path, committed = request.param, request.param.read_bytes()
    page = NotebookPage(browser, server, path, build / path.stem)
    page.set_theme(dark=False)
    page.shoot("opened")
    page.run()
    yield page
    page.close()
    assert path.read_bytes() == committed, "the test has written into the notebook"


@pytest.fixture(scope="session")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of one's own: a red ball on a lawn."""
    path = tmp_path_factory.mktemp("upload") / "ball.png"
    picture = Image.new("RGB", (320, 240), "#7db46c")
    ImageDraw.Draw(picture).ellipse((180, 90, 280, 190), "#d43d2a")
    picture.save(path)
    return path


def labs(page: NotebookPage, upload: Path) -> Iterator[LabOnPage]:
    """The cells that show something to click on. Progress bars are widgets, too, and some of them are gone."""
    for cell in page.cells():
        data = [output["data"] for output in cell["outputs"] if WIDGET in output.get("data", {})]
        if any("".join(each["text/plain"]).startswith("VBox(") for each in data):
            yield LabOnPage(page, cell, upload)


def errors(page: NotebookPage) -> list[str]:
    """What went wrong in cells."""
    found = [f"{cell['id']} was not run" for cell in page.cells() if cell["count"] is None]
    for cell in page.cells():
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"{cell['id']}: {output['ename']}: {output['evalue']}")
    return found


def too_wide(page: NotebookPage) -> list[str]:
    """Cells whose code or output does not fit in beside JupyterLab's file browser."""
    found = []
    for cell in page.cells():
        page.ask(f"show({cell['index']})")  # some have no output to wait for
        pixels = page.ask(f"overflow({cell['index']})")
        if pixels > 0:
            found.append(f"the cell {cell['id']} is {pixels} pixels too wide")
    return found


def faults(lab: LabOnPage) -> list[str]:
    """What is wrong with a lab after its controls were worked."""
    found = [f"nothing here knows how to work {control}" for control in lab.unknown()]
    found += [f"the control number {number} has no name" for number, name in enumerate(lab.names()) if not name]
    # ipywidgets lets the browser show this where a control with a description has no tooltip.
    speechless = lab.output.locator('[title="null"]:visible')
    found += [f"the tooltip of {text!r} says null" for text in speechless.all_text_contents()]
    if not any(key.startswith("image/") for output in lab.cell["outputs"] for key in output.get("data", {})):
        found.append("there is no still picture for readers without a kernel")
    found += [f"no picture changes with the {control}" for control in lab.idle]
    found += [
        f"{answer.control!r} took {answer.milliseconds:.0f} ms without a sign of work"
        for answer in lab.answers
        if answer.milliseconds > PROMPT and not answer.sign
    ]
    said = lab.output.inner_text()
    return found + ([f"it says in the end: {said!r}"] if "✘" in said or "working" in said else [])


def pale(lab: LabOnPage) -> list[str]:
    """Texts that can hardly be read."""
    return [f"{text!r}: {contrast:.1f}" for text, contrast in lab.texts() if contrast < CONTRAST]


def test_a_notebook_runs_to_its_end(notebook: NotebookPage):
    assert errors(notebook) == []


def test_everything_fits_into_a_narrow_window(notebook: NotebookPage):
    assert too_wide(notebook) == []


def test_labs_answer(notebook: NotebookPage, upload: Path):
    wrong, times = {}, {}
    for lab in labs(notebook, upload):
        name = lab.cell["id"]
        notebook.shoot(f"{name}-before", lab.output)
        lab.work_settings()
        notebook.shoot(f"{name}-after", lab.output)
        lab.work_buttons()
        wrong[name] = faults(lab)
        times[name] = [[answer.control, round(answer.milliseconds), answer.sign] for answer in lab.answers]
    (notebook.shots / "answers.json").write_text(json.dumps(times, indent=1, ensure_ascii=False), encoding="utf-8")
    assert bool(times) == ("wris_lib.widgets" in notebook.path.read_text(encoding="utf-8"))
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_labs_can_be_read(notebook: NotebookPage, upload: Path, theme: str):
    notebook.set_theme(dark=theme == "dark")
    notebook.shoot_all(theme)
    wrong = {}
    for lab in labs(notebook, upload):
        notebook.shoot(f"{lab.cell['id']}-{theme}", lab.output)
        wrong[lab.cell["id"]] = pale(lab)
    assert {name: found for name, found in wrong.items() if found} == {}


def test_nothing_went_wrong_behind_the_page(notebook: NotebookPage):
    assert notebook.troubles + notebook.ask("troubles") == []


def test_faults_are_found(browser: Browser, server: dict, build: Path, upload: Path):
    """None of the tests above passes for want of looking."""
    parts = (Path(__file__).parent / "faulty.py").read_text(encoding="utf-8").split("\n# %% ")
    cells = [nbformat.v4.new_code_cell(parts[0], id="imports")]
    for name, _, code in (part.partition("\n") for part in parts[1:]):
        cells.append(nbformat.v4.new_code_cell(code, id=name))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), build / "faulty.ipynb")
    page = NotebookPage(browser, server, build / "faulty.ipynb", build / "faulty")
    page.run()
    assert errors(page) == ["never was not run", "failing: ValueError: as was to be shown"]
    assert [line[:18] for line in too_wide(page)] == ["the cell wide is 2"]
    *others, dying = labs(page, upload)
    for lab in others:
        lab.work_settings()
        lab.work_buttons()
    slow, refusing = ("\n".join(faults(lab) + pale(lab)) for lab in others)
    for fault in (
        'nothing here knows how to work <input type="checkbox" title="unknown">',
        "the tooltip of 'dead' says null",
        "there is no still picture for readers without a kernel",
        "no picture changes with the slider 'dead'",
        "ms without a sign of work",
        "'pale': 2.3",
    ):
        assert fault in slow
    assert "no picture changes with the button 'Refuse'" in refusing and "✘ no" in refusing
    assert any("spoken to the console" in trouble for trouble in page.troubles)
    assert "the page asked the network for http://192.0.2.1/picture.png" in page.troubles
    dying.output.locator("button").click()
    page.wait("watch.troubles.includes('the kernel is autorestarting')")
    assert page.ask("troubles")[0] == "ValueError: as was to be shown"
    page.close()
