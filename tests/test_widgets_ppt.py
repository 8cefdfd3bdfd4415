"""The prompt laboratory without a browser: what its methods do, and what a click or a slider asks for."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from wris_lib import widgets_ppt
from wris_lib.backbones.clip import load_clip
from wris_lib.backbones.sam import SamImage, SamMasks, Segmenter, build_toy_sam, load_sam
from wris_lib.errors import WrisError
from wris_lib.methods.ppt import Ppt
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.prompts import PointPrompts
from wris_lib.widgets_ppt import PromptLab

WIDTH, HEIGHT = 60, 30
IMAGE = Image.new("RGB", (WIDTH, HEIGHT), "black")
# Three queries of two points, as shares of width and height; the second query is the most likely one.
POINTS = torch.tensor([[[0.1, 0.1], [0.2, 0.2]], [[0.5, 0.5], [0.75, 0.2]], [[0.9, 0.9], [1.0, 1.0]]])
LABELS = torch.tensor([[2.0, 1.0], [3.0, -1.0], [-1.0, -2.0]])
SCORES = torch.tensor([-1.0, 2.0, 0.0])


class FakePpt(Ppt):
    """Proposes the prompts above. Its SAM answers with all of the image left of the first positive point."""

    def __init__(self):
        self.sam = Segmenter(build_toy_sam(64))
        self.asked, self.embedded = [], 0
        self.sam.embed = self.embed

    def embed(self, image):
        self.embedded += 1
        longer = max(image.size)
        size = max(1, round(64 * image.height / longer)), max(1, round(64 * image.width / longer))
        return SamImage(torch.zeros(1, 96, 8, 8), (image.height, image.width), size)

    def prompts(self, image, expressions):
        return PointPrompts(POINTS[None], LABELS[None], SCORES[None])

    def masks(self, embedded, prompts):
        (points,), (logits,) = prompts.points[0].tolist(), prompts.label_logits[0].tolist()
        self.asked.append((points, [logit > 0 for logit in logits]))
        if points[0][0] == 0:
            raise RuntimeError("SAM is out\nof luck")
        right = next((x for (x, _), logit in zip(points, logits, strict=True) if logit > 0), 0.0)
        columns = (torch.arange(32) + 0.5) / 32 * 64 / embedded.input_size[1]
        row = torch.where(columns < right, 9.0, -9.0)
        return SamMasks(row.expand(1, 4, 32, 32).clone(), torch.zeros(1, 4))


@pytest.fixture
def method():
    return FakePpt()


@pytest.fixture
def lab(method):
    referent = np.zeros((HEIGHT, WIDTH), bool)
    referent[:, :15] = True
    return PromptLab(IMAGE, " the dog ", method, referent)


def click(lab, x, y, shift=False):
    """What the browser sends for a click at this share of width and height."""
    lab._picture._handle_custom_msg({"x": x, "y": y, "shift": shift}, [])


def test_it_starts_with_the_query_of_the_highest_score(lab, method):
    assert (lab.query, lab.point, lab.expression, method.embedded) == (1, 0, "the dog", 1)
    np.testing.assert_allclose(lab.points, [[30, 15], [45, 6]])
    assert lab.labels.tolist() == [1, 0]
    assert method.asked == [([[0.5, 0.5], [0.75, pytest.approx(0.2)]], [True, False])]
    assert lab.mask[:, :30].all() and not lab.mask[:, 30:].any()
    assert lab.iou == 0.5
    assert "Query 1, 1 positive and 1 negative points: IoU 0.50, with the generator&#x27;s own" in lab._message.value


@pytest.mark.usefixtures("unpainted")
def test_the_untouched_prompt_gives_the_mask_of_the_method():
    clip = load_clip("toy")
    torch.manual_seed(3)
    sizes = {"queries": 4, "points": 3, "fusion_width": 16, "fusion_heads": 2, "width": 16, "heads": 2}
    config = GeneratorConfig((2, 4, "surgery"), (192, 192, 128), 96, **sizes)
    ppt = Ppt(clip, load_sam("toy"), PointGenerator(config), negatives=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
    lab, prediction = PromptLab(image, "left dog", ppt), ppt.predict(image, ["left dog"])[0]
    np.testing.assert_array_equal(lab.mask, prediction.mask)
    np.testing.assert_allclose(lab.points, prediction.points, rtol=1e-6)
    np.testing.assert_array_equal(lab.labels, prediction.point_labels)


@pytest.mark.usefixtures("unpainted")
def test_points_move_and_turn_and_sam_answers(lab, method):
    lab.move(0, 15, 29)
    np.testing.assert_allclose(lab.points, [[15, 29], [45, 6]])
    assert lab.iou == 1.0 and lab.mask[:, :15].all()
    assert "IoU 1.00, with the generator&#x27;s own points 0.50" in lab._message.value
    lab.toggle(1)
    assert lab.labels.tolist() == [1, 1]
    lab.toggle(0)
    assert lab.labels.tolist() == [0, 1] and lab.iou == pytest.approx(15 / 45)
    with pytest.raises(WrisError, match="SAM needs a positive point to know what to take; make another one positive"):
        lab.toggle(1)
    assert lab.labels.tolist() == [0, 1]
    assert len(method.asked) == 4 and method.embedded == 1


@pytest.mark.usefixtures("unpainted")
def test_reset_and_another_query(lab, method):
    lab.move(1, 3, 4)
    lab.toggle(1)
    lab.reset()
    np.testing.assert_allclose(lab.points, [[30, 15], [45, 6]])
    assert lab.labels.tolist() == [1, 0] and lab.iou == 0.5
    lab.choose_point(1)
    lab.choose_query(2)
    assert (lab.query, lab.point, lab.labels.tolist()) == (2, 0, [1, 0])  # of none above 0 the highest
    np.testing.assert_allclose(lab.points, [[54, 27], [60, 30]])
    assert lab._y.value == 27 and lab._query.value == 2
    torch.testing.assert_close(lab.prompts.points[0], POINTS)  # what the generator said is not changed


def test_the_generators_prompt_stays_beside_ones_own(lab):
    lab.move(0, 15, 15)
    theirs, yours = lab.render().figure.axes
    assert (theirs.get_title(), yours.get_title()) == ("query 1: the generator\nIoU 0.50", "you\nIoU 1.00")
    (own,) = [line for line in yours.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(own.get_xydata(), [[15, 15]])


def test_without_a_referent(method):
    lab = PromptLab(IMAGE, "the dog", method)
    assert lab.iou is None and "the mask covers 50% of the image" in lab._message.value
    assert [axes.get_title() for axes in lab.render().figure.axes] == ["query 1: the generator", "you"]


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize(
    "action, arguments, sentence",
    [
        ("choose_query", (3,), "there is no query 3; choose one of 0 to 2"),
        ("choose_query", (-1,), "there is no query -1"),
        ("choose_point", (2,), "there is no point 2; choose one of 0 to 1"),
        ("toggle", (-1,), "there is no point -1; choose one of 0 to 1"),
        ("move", (2, 5, 5), "there is no point 2"),
        ("move", (0, 60, 5), r"the place \(60, 5\) is outside the image; x goes from 0 to 59 and y from 0 to 29"),
        ("move", (0, 5, -1), "outside the image"),
        ("move", (0, float("nan"), 1), "outside the image"),
    ],
)
def test_what_is_not_there_is_refused(lab, method, action, arguments, sentence):
    with pytest.raises(WrisError, match=sentence):
        getattr(lab, action)(*arguments)
    np.testing.assert_allclose(lab.points, [[30, 15], [45, 6]])
    assert (lab.query, lab.point, len(method.asked)) == (1, 0, 1)


def test_what_cannot_be_shown_is_refused(method):
    with pytest.raises(WrisError, match="no image file nowhere.jpg"):
        PromptLab("nowhere.jpg", "dog", method)
    with pytest.raises(WrisError, match="the expression is empty"):
        PromptLab(IMAGE, " ", method)
    with pytest.raises(WrisError, match=r"has the shape \(60, 30\); expected that of the image, \(30, 60\)"):
        PromptLab(IMAGE, "dog", method, np.zeros((60, 30), bool))


def test_the_trained_generator_is_the_default(method, monkeypatch):
    monkeypatch.setattr(widgets_ppt, "load_method", lambda name, negatives: {("ppt", True): method}[name, negatives])
    assert PromptLab(IMAGE, "dog").method is method


@pytest.mark.usefixtures("unpainted")
def test_clicks_of_the_browser(lab):
    click(lab, 0.25, 0.5)
    np.testing.assert_allclose(lab.points, [[15, 15], [45, 6]])
    lab._point.value = 1
    assert lab.point == 1 and (lab._x.value, lab._y.value) == (45, 6)
    assert "working" not in lab._message.value
    click(lab, 0.999999, 1.0)  # the very corner
    np.testing.assert_allclose(lab.points, [[15, 15], [59, 29]])
    click(lab, 0.9, 0.9, shift=True)
    assert lab.labels.tolist() == [1, 1]
    click(lab, 0.3, 0.3, shift=True)  # point 0 is nearest, though point 1 is chosen
    assert lab.labels.tolist() == [0, 1] and lab.point == 1


@pytest.mark.usefixtures("unpainted")
def test_controls(lab, method):
    lab._x.value = 15
    np.testing.assert_allclose(lab.points[0], [15, 15])
    lab._y.value = 3
    np.testing.assert_allclose(lab.points[0], [15, 3])
    lab._point.value = 1
    lab._label.value = 1
    assert lab.labels.tolist() == [1, 1]
    lab._query.value = 0
    np.testing.assert_allclose(lab.points, [[6, 3], [12, 6]])
    assert len(method.asked) == 5  # the controls that followed asked for nothing
    lab._x.value = 20
    lab.view.children[1].children[1].click()  # Reset
    np.testing.assert_allclose(lab.points, [[6, 3], [12, 6]])
    assert [label for label, _ in lab._query.options] == ["1, score 0.88", "2, score 0.50", "0, score 0.27"]


def test_an_error_of_a_click_is_a_sentence_and_changes_nothing(lab):
    lab._x.value = 0
    assert "✘ RuntimeError: SAM is out of luck. Call move(0, 0, 15) of the lab" in lab._message.value
    np.testing.assert_allclose(lab.points, [[30, 15], [45, 6]])
    assert lab._x.value == 30
    with pytest.raises(RuntimeError):  # a plain call has a cell to show it in
        lab.move(0, 0, 15)


def test_the_picture_has_no_margin(lab):
    """Otherwise a click would land beside what was clicked on."""
    picture = np.asarray(Image.open(io.BytesIO(lab._picture.jpeg)).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    assert width / height == WIDTH / HEIGHT
    orange = (picture[..., 0] > 90) & (picture[..., 2] < 60)
    ys, xs = np.nonzero(orange)
    # The mask ends behind pixel column 29 of 60.
    assert [xs.min() / width, (xs.max() + 1) / width, ys.min() / height, (ys.max() + 1) / height] == pytest.approx(
        [0, 0.5, 0, 1], abs=0.03
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (2000, 3)])
def test_images_of_any_shape(size, method):
    lab = PromptLab(Image.new("RGB", size), "dog", method)
    click(lab, 0.5, 0.5, shift=True)
    assert len(lab.points) == 2 and lab.mask.shape == size[::-1]


def test_it_shows_itself_as_widget_and_as_still_picture(lab):
    from IPython.core.formatters import DisplayFormatter

    formatter = DisplayFormatter()
    formatter.active_types = list(formatter.formatters)
    data, _ = formatter.format(lab)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert Image.open(io.BytesIO(data["image/jpeg"])).format == "JPEG"
