"""The labs without a browser: what their methods do, and what arrives when the front end sends a click."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from wris_lib import methods, widgets
from wris_lib.backbones.sam import SamImage, SamMasks, Segmenter
from wris_lib.errors import WrisError
from wris_lib.widgets import ExpressionLab, PointLab

WIDTH, HEIGHT = 60, 40
IMAGE = Image.new("RGB", (WIDTH, HEIGHT), "black")


class FakeSam(Segmenter):
    """Three squares around the first point; the second is the one it trusts most. Prompts are kept."""

    def __init__(self):
        self.embedded, self.prompts = 0, []

    def embed(self, image):
        self.embedded += 1
        return SamImage(torch.zeros(1, 1, 1, 1), (image.height, image.width), (image.height, image.width))

    def decode(self, image, points, labels):
        self.prompts.append((points.tolist(), labels.tolist()))
        if points[0, -1].tolist() == [13, 13]:
            raise RuntimeError("SAM is out\nof luck")
        self.center = points[0, 0].tolist()
        return SamMasks(torch.zeros(1, 3, 1, 1), torch.tensor([[0.2, 0.9, 0.4]]))

    def masks(self, image, decoded):
        ys, xs = np.mgrid[: image.original_size[0], : image.original_size[1]]
        distance = np.maximum(abs(xs - self.center[0]), abs(ys - self.center[1]))
        return np.stack([distance <= radius for radius in (2, 5, 9)])[None]


@pytest.fixture
def lab():
    return PointLab(IMAGE, FakeSam())


@pytest.fixture
def expressions(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "fake", methods.Listed("tests.fake_benchmark:Fake"))
    return ExpressionLab(IMAGE, "fake")


def named(lab, description):
    """The lab's button or slider of that name."""

    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    return next(widget for widget in walk(lab.view) if getattr(widget, "description", None) == description)


def click(lab, x, y, shift=False):
    """What the browser sends for a click at this share of width and height."""
    lab._picture._handle_custom_msg({"x": x, "y": y, "shift": shift}, [])


def pixels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


def test_points_reach_sam_as_x_and_y(lab):
    lab.add_point(50, 10)
    lab.add_point(5, 30, positive=False)
    assert lab.segmenter.prompts == [([[[50, 10]]], [[1]]), ([[[50, 10], [5, 30]]], [[1, 0]])]
    assert lab.segmenter.embedded == 1
    assert lab.masks.shape == (3, HEIGHT, WIDTH) and lab.masks[1, 10, 50]
    assert "1 positive and 1 negative" in lab._message.value and "chooses mask 2" in lab._message.value


def test_undo_and_clear(lab):
    lab.undo()  # nothing there, nothing happens
    for x in (10, 20):
        lab.add_point(x, 5)
    lab.undo()
    assert lab.points == [(10, 5)] and lab.segmenter.prompts[-1] == ([[[10, 5]]], [[1]])
    lab.clear()
    assert lab.points == [] and lab.masks.shape == (0, HEIGHT, WIDTH) and lab.predicted_iou.shape == (0,)


def test_the_three_masks_are_shown_and_the_chosen_one_framed(lab):
    lab.add_point(30, 20)
    axes = lab.render().figure.axes
    assert [a.get_title() for a in axes] == [
        "mask 1\npredicted IoU 0.20",
        "mask 2, chosen\npredicted IoU 0.90",
        "mask 3\npredicted IoU 0.40",
    ]
    assert [a.spines["top"].get_visible() for a in axes] == [False, True, False]


@pytest.mark.parametrize("x, y", [(-1, 5), (60, 5), (5, 40), (float("nan"), 1)])
def test_a_point_outside_is_refused(lab, x, y):
    with pytest.raises(WrisError, match="outside the image; x goes from 0 to 59 and y from 0 to 39"):
        lab.add_point(x, y)
    assert lab.points == []


def test_clicks_of_the_browser(lab):
    click(lab, 0.5, 0.25)
    click(lab, 0.999999, 1.0, shift=True)  # the very corner
    named(lab, "Undo").click()
    click(lab, 0.0, 0.0, shift=True)
    assert lab.points == [(30, 10), (0, 0)] and lab.labels == [1, 0]
    named(lab, "Clear").click()
    assert lab.points == []


def test_points_without_a_mouse(lab):
    named(lab, "x").value, named(lab, "y").value = 7, 8
    named(lab, "Add").click()
    toggle = lab.view.children[1].children[0]
    toggle.label = "Negative"
    named(lab, "Add").click()
    click(lab, 0.5, 0.5)
    assert lab.points == [(7, 8), (7, 8), (30, 20)] and lab.labels == [1, 0, 0]


def test_the_picture_has_no_margin(lab):
    """Otherwise a click would land beside what was clicked on."""
    lab.add_point(30, 20)
    image = pixels(lab._picture.jpeg)
    height, width = image.shape[:2]
    assert width / height == WIDTH / HEIGHT
    orange = (image[..., 0] > 90) & (image[..., 2] < 60)
    ys, xs = np.nonzero(orange)
    # The mask of pixels 25..35 and 15..25 begins at 25/60 of the width and ends at 36/60, likewise the height.
    found = [xs.min() / width, (xs.max() + 1) / width, ys.min() / height, (ys.max() + 1) / height]
    assert found == pytest.approx([25 / 60, 36 / 60, 15 / 40, 26 / 40], abs=0.02)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (2000, 3)])
def test_images_of_any_shape(size):
    lab = PointLab(Image.new("RGB", size), FakeSam())
    click(lab, 0.5, 0.5)
    assert len(lab.points) == 1 and "✘" not in lab._message.value


def test_an_error_of_a_click_is_a_sentence_and_changes_nothing(lab):
    lab.add_point(5, 5)
    named(lab, "x").value = named(lab, "y").value = 13
    named(lab, "Add").click()
    assert lab.points == [(5, 5)] and len(lab.masks) == 3
    assert "✘ RuntimeError: SAM is out of luck. Call add_point(13, 13, True) of the lab" in lab._message.value
    assert "Traceback" not in str(lab._message.get_state())
    with pytest.raises(RuntimeError):  # a plain call has a cell to show it in
        lab.add_point(13, 13)


def test_an_image_that_cannot_be_read():
    with pytest.raises(WrisError, match="no image file nowhere.jpg"):
        PointLab("nowhere.jpg", FakeSam())


def test_expressions_are_answered(expressions):
    assert "press Enter" in expressions._message.value
    expressions._text.value = "bad dog"
    assert expressions.prediction.mask[:, : WIDTH // 2].all() and expressions.variant == "bright"
    assert "bright: the mask covers 50% of the image" in expressions._message.value
    titles = [axes.get_title() for axes in expressions.render().figure.axes]
    assert titles == ["response map, bright", "points", "mask, confidence 1.00"]
    expressions._choice.value = "wide"
    assert "wide: " in expressions._message.value


def test_a_plain_call_moves_the_controls_and_asks_once(expressions, monkeypatch):
    asked = []

    def counting(*arguments, **options):
        asked.append(arguments[1])
        return methods.segment(*arguments, **options)

    monkeypatch.setattr(widgets, "segment", counting)
    assert expressions.find("good dog", "wide") is expressions.prediction
    assert (expressions._text.value, expressions._choice.value) == ("good dog", "wide")
    assert asked == ["good dog"]
    expressions._choice.value = "bright"
    assert asked == ["good dog", "good dog"]


def test_errors_about_expressions(expressions):
    with pytest.raises(WrisError, match="no variant 'dark'; choose one of: bright, wide"):
        expressions.find("dog", "dark")
    expressions.find("dog")
    expressions._text.value = "  "
    assert "✘ the expression is empty" in expressions._message.value
    assert expressions.expression == "dog"
    expressions._text.value = "dog"  # asked again after the error
    assert "✘" not in expressions._message.value
    expressions._text.value = "<b>dog</b>"
    assert "✘" not in expressions._message.value
    with pytest.raises(WrisError, match="no method 'magic'"):
        ExpressionLab(IMAGE, "magic")


def test_markup_in_an_error_is_text(expressions, monkeypatch):
    def fail(*_, **__):
        raise WrisError("<script>")

    monkeypatch.setattr(widgets, "segment", fail)
    expressions._text.value = "dog"
    assert "&lt;script&gt;" in expressions._message.value


@pytest.mark.parametrize("make", [lambda: PointLab(IMAGE, FakeSam()), lambda: ExpressionLab(IMAGE)])
def test_a_lab_shows_itself_as_widget_and_as_still_picture(make):
    from IPython.core.formatters import DisplayFormatter

    formatter = DisplayFormatter()
    formatter.active_types = list(formatter.formatters)
    data, _ = formatter.format(make())
    assert "application/vnd.jupyter.widget-view+json" in data
    assert Image.open(io.BytesIO(data["image/jpeg"])).format == "JPEG"


def test_what_a_notebook_saves_is_small(lab):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))  # the worst case
    lab = PointLab(noise.resize((640, 480)), FakeSam())
    lab.add_point(30, 20)
    assert len(lab._picture.jpeg) + 2 * len(lab._result.value) < 300_000


def test_working_is_said_before_the_work(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(lab, "clear", lambda: seen.append(lab._message.value))
    named(lab, "Clear").click()
    assert "working" in seen[0]
