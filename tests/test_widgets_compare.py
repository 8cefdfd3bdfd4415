"""The lab that asks everybody, without a browser and with a method whose answers are known."""

import io
from datetime import datetime

import numpy as np
import pytest
from PIL import Image

from tests.fake_benchmark import Fake
from wris_lib import methods, widgets_compare
from wris_lib.contestants import ORACLE
from wris_lib.errors import WrisError
from wris_lib.widgets_compare import CompareLab

PIXELS = np.zeros((24, 32, 3), np.uint8)
PIXELS[4:12, 5:15] = 255
IMAGE = Image.fromarray(PIXELS)
ROWS = ["fake bright", "fake wide"]


@pytest.fixture
def lab(monkeypatch) -> CompareLab:
    monkeypatch.setitem(methods.METHODS, "fake", methods.Listed("tests.fake_benchmark:Fake"))
    yield CompareLab(IMAGE, ROWS)
    methods._load.cache_clear()


def titles(lab: CompareLab) -> list[str]:
    return [axes.get_title() for axes in lab.render().figure.axes]


def test_everyone_is_asked(lab):
    shown = []
    lab._result.observe(lambda change: shown.append(change["new"]), "value")
    found = lab.find(" the square ")
    assert list(found) == lab.rows == ROWS and found == lab.predictions
    assert np.array_equal(found["fake bright"].mask, PIXELS[..., 0] > 0) and found["fake wide"].mask[:, :16].all()
    assert lab.seconds.keys() == found.keys() and min(lab.seconds.values()) >= 0
    assert titles(lab) == ["“the square”", "fake bright\n10% of the image", "fake wide\n50% of the image"]
    assert len(shown) == len(set(shown)) == 2 and shown[-1] == lab.render().jpeg  # each answer as it comes
    assert "“the square”: 2 answers in" in lab._message.value and lab._text.value == "the square"


def test_typing_asks_once(lab, monkeypatch):
    monkeypatch.setattr(Fake, "calls", 0)
    lab._text.value = "the square"
    assert Fake.calls == len(ROWS) and lab.expression == "the square"
    lab.find("the other square")
    assert Fake.calls == 2 * len(ROWS) and lab._text.value == "the other square"
    lab._text.value = "  "
    assert "✘ the expression is empty" in lab._message.value
    assert lab.expression == lab._text.value == "the other square" and len(lab.predictions) == 2


def test_an_empty_mask_is_said(lab):
    lab.set_image(np.zeros((24, 32), np.uint8))
    lab.find("the square")
    assert titles(lab)[1] == "fake bright\nan empty mask"


def upload(lab: CompareLab, name: str, content: bytes) -> None:
    about = {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content)}
    lab._upload.value = ({**about, "last_modified": datetime(2026, 1, 1)},)


def test_a_picture_is_uploaded(lab):
    lab.find("the square")
    buffer = io.BytesIO()
    IMAGE.resize((16, 12)).save(buffer, "png")
    upload(lab, "my photo.png", buffer.getvalue())
    assert lab.image.size == (16, 12) and titles(lab) == [""] and not lab.predictions
    assert lab._text.value == lab.expression == "" and "Type an expression" in lab._message.value
    upload(lab, "letter.png", b"Dear all")
    assert "✘" in lab._message.value and "letter.png" in lab._message.value and "/" not in lab._message.value[:60]
    assert lab.image.size == (16, 12)
    lab._upload.value = ()  # what a browser sends when the choice is taken back
    assert lab.image.size == (16, 12)


def test_by_default_every_method_of_the_stack(monkeypatch):
    asked = []
    monkeypatch.setattr(widgets_compare, "everyone", lambda stack: asked.append(stack) or (["clip_sam", ORACLE], {}))
    assert CompareLab(IMAGE, stack="paper").rows == ["clip_sam"] and asked == ["paper"]


def test_what_is_refused(lab):
    with pytest.raises(WrisError, match="the benchmark has no method 'magic'"):
        CompareLab(IMAGE, ["magic"])
    with pytest.raises(WrisError, match="no image file nowhere.jpg"):
        lab.set_image("nowhere.jpg")
    with pytest.raises(WrisError, match="the expression is empty"):
        lab.find(" ")
