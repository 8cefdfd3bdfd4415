"""The page: whole, without links to anywhere, and its text is text."""

import base64
import io
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import fake_benchmark
from wris_lib import benchmark, data, page
from wris_lib.errors import WrisError

VOID = {"meta", "img", "br"}
NASTY = 'the <b>"red"</b> & blue <script>alert(1)</script>'


class Page(HTMLParser):
    """What is in a page; complains when tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder, specs, rows = tmp_path_factory.mktemp("run"), ["fake:val", "fake:testA"], ["fake bright", "fake wide"]
    with pytest.MonkeyPatch.context() as patch:
        fake_benchmark.prepare(folder, patch)
        results = benchmark.run(rows, specs, "out", folder=folder)
        found = {(row, spec): benchmark.records(row, spec) for row in rows for spec in specs}
        yield results, found, {spec: data.load(spec).items for spec in specs}


@pytest.fixture
def measured(once):
    """Results, records and items of two variants on two fake splits, to be changed as one likes."""
    return deepcopy(once)


def written(path: Path, *measured) -> Page:
    page.write(path, *measured)
    return Page(path.read_text(encoding="utf-8"))


def test_pictures_are_inside_small_and_described(measured, tmp_path):
    pictures = written(tmp_path / "page.html", *measured).all("img")
    for picture in pictures:
        kind, content = picture["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) <= page.SIDE
        assert re.search(r"^“.*: (right|leak|wrong object), IoU [01]\.\d\d$", picture["alt"])
    # Three best and one failure for each of two variants, and eight disagreements of two pictures each.
    assert len(pictures) == 2 * (3 + 1) + 8 * 2


def test_nothing_comes_from_elsewhere(measured, tmp_path):
    made = written(tmp_path / "page.html", *measured)
    ids = {attributes["id"] for _, attributes in made.tags if "id" in attributes}
    assert {link["href"] for link in made.all("a")} == {f"#{name}" for name in ids}
    assert not made.all("script") and not made.all("link")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and made.all("html") == [{"lang": "en"}]
    assert (tmp_path / "page.html").stat().st_size < 200_000


def test_tables_hold_every_row(measured, tmp_path):
    made = written(tmp_path / "page.html", *measured)
    headings = [attributes for attributes in made.all("th") if attributes.get("scope") == "row"]
    assert len(headings) == 2 * 2 + 2 + 2  # figures of two splits, outcomes, agreement
    assert made.text.count("73.6 ± 0.0") == 1  # of fake:testA, see test_figures_by_hand
    assert "33% of all answers" in made.text  # "bad" is a third of the sentences
    assert len(made.all("details")) == 2


def test_all_text_is_escaped(measured, tmp_path):
    results, found, splits = measured
    found = {key: [record | {"expression": NASTY} for record in records] for key, records in found.items()}
    results["made"] |= {"command": NASTY, "left_out": {"ppt <i>": "no <u>weights</u>"}}
    made = written(tmp_path / "page.html", results, found, splits)
    assert not {"b", "u", "script"} & {tag for tag, _ in made.tags}
    assert made.text.count(NASTY) >= 2 and "ppt <i> is left out: no <u>weights</u>." in made.text
    assert all(NASTY in picture["alt"] for picture in made.all("img"))


def test_costs_have_columns(measured, tmp_path):
    results, found, splits = measured
    results["costs"] = {
        "fake wide": {
            "milliseconds": 12.4,
            "again": 3.4,
            "megabytes": 345,
            "parameters": 6789,
            "supervision": "pairs & <more>",
        }
    }
    text = written(tmp_path / "page.html", results, found, splits).text
    assert "supervision" in text and "6,789" in text and "pairs & <more>" in text


def test_one_method_has_nothing_to_disagree_with(measured, tmp_path):
    results, found, splits = measured
    alone = {key: records for key, records in found.items() if key[0] == "fake wide"}
    made = written(tmp_path / "page.html", results, alone, splits)
    assert "Disagreements" not in made.text and "#disagreements" not in {link["href"] for link in made.all("a")}


def test_the_oracle_is_no_example(measured, tmp_path):
    results, found, splits = measured
    with_oracle = found | {("sam box", spec): found["fake bright", spec] for spec in splits}
    assert len(written(tmp_path / "page.html", results, with_oracle, splits).all("img")) == 24


def test_a_thumbnail_has_area_and_outline():
    image = Image.new("RGB", (400, 200), "black")
    mask, referent = np.zeros((200, 400), bool), np.zeros((200, 400), bool)
    mask[50:150, 50:150] = True
    referent[50:150, 250:350] = True
    small = Image.open(io.BytesIO(page.thumbnail(image, mask, referent, 100)))
    assert small.size == (100, 50)
    red, green, blue = small.getpixel((25, 25))
    assert red > green > blue and red > 90  # orange over black
    red, green, blue = small.getpixel((62, 25))  # on the outline's left side
    assert green > 90 and green > red
    assert max(small.getpixel((75, 25))) < 40  # the referent itself is left as it is
    assert max(Image.open(io.BytesIO(page.thumbnail(image, None, ~referent & False))).convert("L").getextrema()) < 20


@pytest.mark.parametrize("name", ["page", "page.htm", "folder.html"])
def test_a_place_that_cannot_be_the_page(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(WrisError, match=f"{name} cannot be the page; name a file that ends in .html"):
        page.check_place(tmp_path / name)
