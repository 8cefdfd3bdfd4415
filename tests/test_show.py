"""Pictures are looked at by people; here is what a machine can see: what is drawn where, sizes, odd input."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from PIL import Image

from wris_lib import show
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError
from wris_lib.methods import Prediction, Stage

WIDTH, HEIGHT = 64, 48


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


IMAGE = Image.new("RGB", (WIDTH, HEIGHT), "black")
PREDICTED, REFERENT = rectangle(0, 0, 32, 24), rectangle(32, 24, 60, 44)
RESPONSE = np.linspace(0, 1, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)
POINTS, LABELS = np.array([[50.0, 10.0], [10.0, 40.0]], np.float32), np.array([1, 0])
TRACE = [
    Stage("similarity map", "CLIP, surgery", response_map=RESPONSE[::8, ::8]),
    Stage("points", "1 positive, 1 negative", points=POINTS, point_labels=LABELS),
    Stage("masks", masks=np.stack([REFERENT, PREDICTED, ~PREDICTED]), scores=np.array([0.1, 0.8, 0.3])),
]
PREDICTION = Prediction(PREDICTED, RESPONSE, POINTS, LABELS, 0.8, TRACE)


def pixels(picture: show.Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("RGB")).astype(int)


def share_of(color: str, picture: show.Picture) -> float:
    """Share of pixels that are near a colour."""
    wanted = np.array(to_rgb(color)) * 255
    return float((np.abs(pixels(picture) - wanted).max(axis=-1) < 40).mean())


def titles(picture: show.Picture) -> list[str]:
    return [axes.get_title() for axes in picture.figure.axes]


def legend(picture: show.Picture) -> list[str]:
    return [text.get_text() for text in picture.figure.legends[0].get_texts()] if picture.figure.legends else []


def test_overlay_draws_what_it_is_given():
    picture = show.overlay(IMAGE, PREDICTION, "the left dog", REFERENT)
    assert titles(picture) == ["“the left dog”"]
    assert legend(picture) == ["prediction", "referent", "positive point", "negative point"]
    assert share_of(show.REFERENT, picture) > 0.003
    without = show.overlay(IMAGE, PREDICTION, "the left dog")
    assert legend(without) == ["prediction", "positive point", "negative point"]
    assert share_of(show.REFERENT, without) < 0.001


def test_the_prediction_is_filled_and_nothing_else():
    image = pixels(show.grid([show.Panel(IMAGE, mask=PREDICTED)], inches=4.0))
    drawn = np.argwhere((image < 250).any(axis=-1))  # the page is white
    (top, left), (_, right) = drawn.min(axis=0), drawn.max(axis=0)
    height = (right - left) * HEIGHT / WIDTH  # below it stands the legend
    orange = image[int(top + 0.2 * height), int(left + 0.2 * (right - left))]
    black = image[int(top + 0.8 * height), int(left + 0.8 * (right - left))]
    assert orange[0] > 90 and orange[0] > orange[2] + 60
    assert black.max() < 30


def test_regions_are_filled_and_named():
    picture = show.grid([show.Panel(IMAGE, regions={"hat": PREDICTED, "bag": REFERENT})])
    assert legend(picture) == ["hat", "bag"]
    for color, region in zip(show.REGIONS, (PREDICTED, REFERENT), strict=False):
        assert share_of(color, picture) > 0.5 * region.mean()
    many = {str(number): REFERENT for number in range(len(show.REGIONS) + 1)}
    assert legend(show.grid([show.Panel(IMAGE, regions=many)])) == list(many)


def test_stages_has_a_panel_a_step_and_a_candidate():
    picture = show.stages(IMAGE, PREDICTION, "the left dog", REFERENT)
    assert titles(picture) == [
        "“the left dog”",
        "similarity map\nCLIP, surgery",
        "points\n1 positive, 1 negative",
        "candidate 1\npredicted IoU 0.10",
        "candidate 2\npredicted IoU 0.80, chosen",
        "candidate 3\npredicted IoU 0.30",
    ]


def test_stages_without_candidates_say_so():
    nothing = Stage("proposals", "nothing was proposed", masks=np.zeros((0, 48, 64), dtype=bool), scores=np.zeros(0))
    picture = show.stages(IMAGE, replace(PREDICTION, trace=[nothing]), "the left dog", REFERENT)
    assert titles(picture) == ["“the left dog”", "proposals\nnothing was proposed"]


def test_judged_says_what_became_of_it(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    item = EvaluationItem(
        image_path=tmp_path / "a.png",
        image_id=1,
        ref_id=1,
        expression="the dog",
        sent_id=1,
        category="dog",
        height=HEIGHT,
        width=WIDTH,
        annotation={"bbox": [32, 24, 28, 20], "segmentation": [[32, 24, 60, 24, 60, 44, 32, 44]]},
        neighbours=[{"segmentation": [[0, 0, 32, 0, 32, 24, 0, 24]]}],
    )
    panel = show.judged(item, PREDICTION)
    assert panel.title == "“the dog”\nwrong object, IoU 0.00"
    assert (panel.referent == REFERENT).all()
    show.grid([panel]).jpeg  # noqa: B018


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_grid_has_room_for_any_number(count):
    picture = show.grid([show.Panel(IMAGE, str(number)) for number in range(count)], columns=3)
    drawn = [axes for axes in picture.figure.axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == [str(number) for number in range(count)]
    assert not legend(picture)
    assert all(axes.get_xticks().size == 0 for axes in drawn)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (500, 2), (3000, 2000)])
def test_images_of_any_size(size):
    mask = np.ones(size[::-1], bool)
    panel = show.Panel(
        Image.new("RGB", size), "x", mask, mask, np.zeros((2, 2), np.float32), np.zeros((0, 2), np.float32)
    )
    assert len(show.grid([panel]).jpeg) < 100_000


def test_empty_and_full_masks():
    panels = [show.Panel(IMAGE, mask=mask, referent=mask) for mask in (rectangle(0, 0, 0, 0), ~rectangle(0, 0, 0, 0))]
    with np.errstate(all="raise"):
        show.grid(panels).jpeg  # noqa: B018


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "expression",
    ["costs $5 or $6", "🦄 左边的狗", "_^\\frac{", "<b>&amp;</b>", "x" * 300, "very " * 2000 + "old", "two\nlines"],
)
def test_odd_expressions(expression):
    picture = show.overlay(IMAGE, PREDICTION, expression)
    assert picture.jpeg
    assert titles(picture)[0].count("\n") < show.TITLE_LINES


def test_a_long_title_keeps_its_end():
    picture = show.grid([show.Panel(IMAGE, "word " * 100 + "\nleak, IoU 0.31")])
    lines = titles(picture)[0].splitlines()
    assert len(lines) == show.TITLE_LINES
    assert lines[-1] == "leak, IoU 0.31" and lines[-2].endswith("…")


def test_a_picture_shows_itself_and_saves(tmp_path):
    picture = show.overlay(IMAGE, PREDICTION, "the left dog")
    assert picture._repr_jpeg_() == picture.jpeg
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a", "PNG")):
        picture.save(tmp_path / name)
        assert Image.open(tmp_path / name).format == kind
    (tmp_path / "file").write_text("")
    with pytest.raises(WrisError, match="cannot write to"):
        picture.save(tmp_path / "file" / "a.png")


def test_a_gallery_is_small_enough_for_a_notebook():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))  # the worst case
    smooth = noise.resize((40, 40)).resize((256, 256), Image.Resampling.BICUBIC)
    panels = [show.Panel(smooth, "the man in the green shirt") for _ in range(8)]
    assert len(show.grid(panels).jpeg) < 150_000


def test_pyplot_is_left_alone():
    show.overlay(IMAGE, PREDICTION, "the left dog").jpeg  # noqa: B018
    assert pyplot.get_fignums() == []


def test_queries_are_drawn_a_colour_each_with_lines_from_their_anchors():
    points = np.array([[[10.0, 10.0], [20.0, 12.0]], [[40.0, 30.0], [50.0, 36.0]]])
    queries = show.Queries(points, np.array([[1, 0], [1, 1]]), points.mean(axis=1), np.array([0.9, 0.1], np.float32))
    picture = show.grid([show.Panel(IMAGE, queries=queries)])
    assert legend(picture) == ["anchor", "positive point", "negative point"]
    (axes,) = picture.figure.axes
    assert len(axes.lines) == 2 * (2 + 2 + 1)  # a line and a marker a point, and the anchor
    faint, strong = axes.lines[0], axes.lines[5]  # the strongest comes last, on top
    assert faint.get_alpha() < strong.get_alpha() == 1
    assert (faint.get_color(), strong.get_color()) == show.REGIONS[1::-1]
    without = show.grid([show.Panel(IMAGE, queries=show.Queries(points, np.ones((2, 2), int)))])
    assert legend(without) == ["positive point"]
    assert len(without.figure.axes[0].lines) == 4


def test_matching_shows_the_pairs_on_the_image_and_in_the_table():
    places, boxes = np.array([[5.0, 5.0], [30.0, 20.0], [55.0, 40.0]]), np.array([[0, 0, 10, 10], [50, 30, 60, 46.0]])
    costs = np.array([[0.25, 3.0], [2.0, 2.0], [4.0, 1.0]])
    picture = show.matching(IMAGE, places, boxes, costs, [(0, 0), (2, 1)], "the left dog", ["dog", "cat"])
    image, table = picture.figure.axes
    assert image.get_title() == "the left dog"
    assert [label.get_text() for label in table.get_xticklabels()] == ["dog", "cat"]
    np.testing.assert_array_equal(image.lines[1].get_xydata(), [places[2], [55, 38]])  # to the middle of its box
    assert [text.get_text() for text in image.texts] == ["0", "1", "2"]
    assert [text.get_text() for text in table.texts] == ["0.2", "3.0", "2.0", "2.0", "4.0", "1.0"]
    assert len(table.patches) == 2
    assert share_of(show.REGIONS[0], picture) > 0.001
    unnamed = show.matching(IMAGE, places, boxes, costs, []).figure.axes[1]
    assert [label.get_text() for label in unnamed.get_xticklabels()] == ["object 0", "object 1"]


def test_a_search_that_found_nothing_is_said():
    picture = show.grid([])
    assert [text.get_text() for text in picture.figure.texts] == ["nothing to show"]
    assert Image.open(io.BytesIO(picture.jpeg)).format == "JPEG"
