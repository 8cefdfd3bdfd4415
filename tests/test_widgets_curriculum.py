"""The stage laboratory without a browser: what its methods do, and what its slider and its field ask for."""

import io

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from wris_lib.errors import WrisError
from wris_lib.methods import Method, Prediction, Stage
from wris_lib.show import grid
from wris_lib.widgets_curriculum import StageLab

WIDTH, HEIGHT = 60, 40
IMAGE = Image.new("RGB", (WIDTH, HEIGHT), "black")
REFERENT = np.zeros((HEIGHT, WIDTH), bool)
REFERENT[:, :30] = True  # the left half


class Fake(Method):
    """Answers with so many columns from the left; knows no unicorns."""

    def __init__(self, columns, score, trace=True):
        self.columns, self.score, self.trace, self.asked = columns, score, trace, []

    @classmethod
    def load(cls, stack):
        raise NotImplementedError

    def predict(self, image, expressions):
        self.asked += expressions
        if expressions == ["unicorn"]:
            raise RuntimeError("no such\nanimal")
        mask = np.zeros((image.height, image.width), bool)
        mask[:, : self.columns] = True
        all_points = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        proposed = [Stage("prompts", "", None, all_points, np.array([1, 0, 1]))] if self.trace else []
        return [Prediction(mask, mask.astype(float), all_points[:1], np.array([1]), self.score, proposed)]


@pytest.fixture
def methods():
    return {"untrained": Fake(60, 0.1), "round 1": Fake(0, 0.25), "round 2": Fake(30, 0.875)}


@pytest.fixture
def lab(methods):
    return StageLab(IMAGE, "the left half", methods, REFERENT)


def slider(lab):
    return lab.view.children[0].children[0]


def field(lab):
    return lab.view.children[0].children[1]


def titles(picture):
    return [axes.get_title() for axes in picture.figure.axes]


def test_every_stage_is_asked_once_and_the_last_is_shown(lab, methods):
    assert [method.asked for method in methods.values()] == [["the left half"]] * 3
    assert lab.stage == 2 and lab.names == ["untrained", "round 1", "round 2"]
    assert [answer.mask.mean() for answer in lab.predictions] == [1, 0, 0.5]
    assert "round 2: score 0.88, the mask covers 50% of the image, IoU 1.00." in lab._message.value


def test_show_stage_changes_all_that_is_seen(lab, methods):
    before = lab._result.value
    lab.show_stage(0)
    assert (lab.stage, slider(lab).value, slider(lab).label) == (0, 0, "untrained")
    assert lab._result.value == lab.render().jpeg != before
    assert "untrained: score 0.10, the mask covers 100% of the image, IoU 0.50." in lab._message.value
    assert titles(lab.render())[-1] == "untrained\nscore 0.10, IoU 0.50"
    lab.show_stage(1)  # an empty mask can be shown, too
    assert titles(lab.render())[-1] == "round 1\nscore 0.25, IoU 0.00"
    assert methods["round 1"].asked == ["the left half"]  # from memory


def test_what_is_drawn(lab):
    proposed, response, answer = lab.render().figure.axes
    assert [len(line.get_xdata()) for line in proposed.lines] == [2, 1]  # positive and negative points
    assert response.get_title() == "“the left half”\nresponse map"
    assert len(answer.lines) == 1  # of the three points the chosen one
    side_by_side = grid([lab.panel(number) for number in range(3)])
    assert titles(side_by_side)[1] == "round 1\nscore 0.25, IoU 0.00"


def test_a_method_without_a_trace():
    (points, *_) = StageLab(IMAGE, "x", {"only": Fake(5, 0.5, trace=False)}).render().figure.axes
    assert len(points.lines[0].get_xdata()) == 1


@pytest.mark.parametrize("number", [-1, 3])
def test_no_such_stage(lab, number):
    with pytest.raises(WrisError, match=f"there is no stage {number}; choose one of 0 to 2"):
        lab.show_stage(number)
    assert lab.stage == 2 and slider(lab).value == 2


def test_the_slider(lab):
    slider(lab).value = 1
    assert lab.stage == 1 and "round 1: " in lab._message.value
    slider(lab).label = "untrained"
    assert lab.stage == 0


def test_another_expression(lab, methods):
    lab.show_stage(1)
    field(lab).value = " the right half "
    assert (lab.expression, field(lab).value, lab.stage) == ("the right half", "the right half", 1)
    assert lab.referent is None and "IoU" not in lab._message.value + "".join(titles(lab.render()))
    lab.ask("the right half", ~REFERENT)
    assert "IoU 0.00" in lab._message.value
    # Asked when it was made, by the field, and by the call; setting the field was no question.
    assert [len(method.asked) for method in methods.values()] == [3, 3, 3]


def test_errors_leave_everything_as_it_was(lab, methods):
    before = lab.predictions
    field(lab).value = "  "
    assert "✘ the expression is empty" in lab._message.value
    assert field(lab).value == "the left half"
    field(lab).value = "unicorn"
    assert "✘ RuntimeError: no such animal. Call ask(&#x27;unicorn&#x27;) of the lab" in lab._message.value
    assert lab.predictions is before and lab.expression == field(lab).value == "the left half"
    with pytest.raises(WrisError, match=r"the referent has the shape \(2, 3\); expected that of the image, \(40, 60\)"):
        lab.ask("the left half", np.zeros((2, 3), bool))
    with pytest.raises(WrisError, match="there is no stage to show; give at least one"):
        StageLab(IMAGE, "x", {})
    with pytest.raises(WrisError, match="no image file nowhere.jpg"):
        StageLab("nowhere.jpg", "x", methods)


def test_it_shows_itself_as_widget_and_as_still_picture(lab):
    formatter = DisplayFormatter()
    formatter.active_types = list(formatter.formatters)
    data, _ = formatter.format(lab)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert Image.open(io.BytesIO(data["image/jpeg"])).format == "JPEG"
