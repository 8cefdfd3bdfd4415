"""The four datasets, made with a method that knows colours instead of CLIP + SAM."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from wris_lib.backbones.language import Parse, Parser
from wris_lib.data.objects import ObjectImage
from wris_lib.data.refer import Expression
from wris_lib.errors import WrisError
from wris_lib.methods import Prediction
from wris_lib.methods.clip_sam import ClipSam
from wris_lib.methods.ppt.labels import UNKNOWN
from wris_lib.methods.ppt.pseudo import (
    from_expressions,
    label_objects,
    largest_piece,
    names_a_place,
    referring,
    semantic,
    tells_a_place,
)

COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


class ByColour(ClipSam):
    """Finds the pixels of the first colour that a phrase names; its score is the share of the picture."""

    def __init__(self):
        pass

    @classmethod
    def load(cls, stack):
        return cls()

    def predict(self, image, expressions):
        pixels = np.array(image).astype(int)
        answers = []
        for expression in expressions:
            mask = np.zeros(pixels.shape[:2], dtype=bool)
            for name, color in COLORS.items():
                if name in expression and not mask.any():
                    mask = np.abs(pixels - color).max(axis=2) < 100
            empty = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
            answers.append(Prediction(mask, mask.astype(np.float32), *empty, float(mask.mean())))
        return answers

    def find_all(self, image, expressions):
        found = []
        for answer in self.predict(image, expressions):
            pieces, count = ndimage.label(answer.mask)
            found.append([pieces == number for number in range(1, count + 1)])
        return found


class Words(Parser):
    """Every colour is a noun phrase."""

    def __init__(self):
        pass

    def parse(self, expressions):
        found = [[word for word in text.split() if word in COLORS] for text in expressions]
        return [Parse(text, [], phrases or [text], None) for text, phrases in zip(expressions, found, strict=True)]


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of each colour: a rectangle on grey, from small to large."""
    items = []
    for name, color in COLORS.items():
        for number in range(10):
            image = np.full((60, 80, 3), 128, dtype=np.uint8)
            image[20:40, 10 : 20 + 4 * number] = color
            path = tmp_path / f"{name}{number}.png"
            Image.fromarray(image).save(path)
            items.append(ObjectImage(path, name))
    return items


def test_doubtful_objects_are_left_out(folder):
    every = label_objects(ByColour(), folder, size=40, keep=1.0)
    assert len(every) == 30 and every[0].image.shape == (30, 40, 3)  # scaled down
    best = label_objects(ByColour(), folder, size=80, keep=0.5)
    assert len(best) == 15 and min(p.mask.sum() for p in best) == 20 * 30
    for picture in best:
        assert (picture.image[picture.mask] == COLORS[picture.name]).all()


def test_pictures_in_which_nothing_is_found(folder):
    nameless = [ObjectImage(item.image_path, "purple") for item in folder]
    with pytest.raises(WrisError, match="found no object in any of 30 object-centric pictures"):
        label_objects(ByColour(), nameless, size=40)
    assert len(label_objects(ByColour(), [*nameless, folder[9]], size=40, keep=1.0)) == 1


def test_images_and_labels_of_d_sem_belong_together(folder):
    pictures = label_objects(ByColour(), folder, size=80)
    made = semantic(pictures, copies=2, size=64, side=16)
    assert len(made.images.keys) == len(set(made.images.keys)) == 2 * len(pictures) == len(made.labels)
    assert made.labels.expressions[0] == f"the {pictures[0].name} in the middle"
    check_colours(made)


def test_images_and_labels_of_d_ref_belong_together(folder):
    pictures = label_objects(ByColour(), folder, size=80)
    made = referring(pictures, scenes=24, size=96, side=24)
    assert len(made.images.keys) == 24 and len(made.labels) > 40
    assert set(made.labels.image) <= set(range(24))
    assert np.diff(made.labels.first).max() > 2  # contextual labels are kept
    check_colours(made)
    again, other = (referring(pictures, scenes=24, size=96, side=24, seed=seed) for seed in (0, 1))
    assert again.images.keys == made.images.keys and again.labels.expressions == made.labels.expressions
    assert set(other.images.keys).isdisjoint(made.images.keys)


def check_colours(made) -> None:
    """The referent's cells show the colour that the expression names."""
    for e, expression in enumerate(made.labels.expressions):
        image = made.images.load(int(made.labels.image[e]))
        mask = made.labels.candidates(e)[made.labels.referent[e]]
        pixels = np.array(image.resize(mask.shape, Image.Resampling.BOX)).astype(int)[mask]
        name = min((expression.find(name), name) for name in COLORS if name in expression)[1]
        assert np.median(np.abs(pixels - COLORS[name]).max(axis=1)) < 60, expression


def test_other_pictures_have_other_keys(folder):
    pictures = label_objects(ByColour(), folder, size=80)
    first, second = (semantic(some, 1, 64, 16).images.keys for some in (pictures, pictures[::-1]))
    assert set(first).isdisjoint(second)


def test_a_candidate_is_the_largest_connected_piece():
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 0, 1], [1, 1, 0, 0, 1]], dtype=bool)  # corners do not connect
    expected = np.zeros_like(mask)
    expected[:, 4] = True
    np.testing.assert_array_equal(largest_piece(mask), expected)
    np.testing.assert_array_equal(largest_piece(expected), expected)
    assert not largest_piece(np.zeros((3, 4), dtype=bool)).any() and largest_piece(np.ones((3, 4), dtype=bool)).all()


def candidates_of(expression: str, found: dict[str, list[np.ndarray]], tmp_path) -> np.ndarray:
    """The candidates when CLIP + SAM finds these masks for the phrases, on a grid of as many cells as pixels."""
    Image.new("RGB", (40, 40)).save(tmp_path / "grey.png")

    class Finds(ByColour):
        def find_all(self, image, expressions):
            return [found[text] for text in expressions]

    class Cut(Words):
        def parse(self, expressions):
            return [Parse(text, [], text.split(" | "), None) for text in expressions]

    item = Expression(tmp_path / "grey.png", 0, 0, expression, 0, None)
    return from_expressions(Finds(), Cut(), [item], side=40).labels.candidates(0)


def rectangle(left: int, top: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((40, 40), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_of_an_answer_in_pieces_the_largest_is_the_candidate(tmp_path):
    pieces = rectangle(1, 1, 8, 8) | rectangle(20, 20, 9, 9)
    (candidate,) = candidates_of("dog", {"dog": [pieces]}, tmp_path)
    np.testing.assert_array_equal(candidate, rectangle(20, 20, 9, 9))


def test_what_was_found_twice_is_one_candidate(tmp_path):
    first, almost, other = rectangle(0, 0, 10, 10), rectangle(0, 0, 10, 8), rectangle(0, 0, 10, 5)
    found = {"dog": [first, almost], "animal": [other, first, rectangle(25, 25, 9, 9)]}
    candidates = candidates_of("dog | animal", found, tmp_path)
    np.testing.assert_array_equal(candidates, [first, other, rectangle(25, 25, 9, 9)])  # in the order of the phrases


def test_crumbs_and_backgrounds_are_no_candidates(tmp_path):
    found = [rectangle(0, 0, 2, 3), rectangle(0, 0, 2, 4), rectangle(0, 0, 40, 25), rectangle(0, 0, 40, 24)]
    candidates = candidates_of("dog", {"dog": found}, tmp_path)  # 6, 8, 1000, 960 of 1600 pixels
    np.testing.assert_array_equal(candidates, [found[1], found[3]])


def test_places_are_no_things():
    assert all(names_a_place(phrase) for phrase in ("the left", "The top right corner", "left side"))
    assert not any(names_a_place(phrase) for phrase in ("left dog", "the man on the left", "corner shop"))


def test_places_that_clip_does_not_know():
    assert all(tells_a_place(text) for text in ("the LEFT dog", "dog in the corner", "the bottom right"))
    assert not any(tells_a_place(text) for text in ("the dog", "a leftover pizza", "man with the hat"))


def test_a_place_beside_a_thing_needs_no_selection(tmp_path):
    image = np.full((40, 40, 3), 128, dtype=np.uint8)
    image[10:30, 10:30] = COLORS["red"]
    Image.fromarray(image).save(tmp_path / "red.png")
    items = [Expression(tmp_path / "red.png", 0, n, text, n, None) for n, text in enumerate(("red | the left", "left"))]

    class Cut(Words):
        def parse(self, expressions):
            return [Parse(text, [], text.split(" | "), None) for text in expressions]

    made = from_expressions(ByColour(), Cut(), items, side=10)
    assert made.labels.expressions == ("red | the left",) and made.labels.referent.tolist() == [0]
    assert made.notes == {"phrases found nowhere": 1}  # a place alone is asked for all the same


def test_h_has_candidates_for_all_noun_phrases(tmp_path):
    image = np.full((60, 60, 3), 128, dtype=np.uint8)
    image[10:30, 10:30], image[35:55, 30:50] = COLORS["red"], COLORS["blue"]
    image[2:8, 50:58] = COLORS["blue"]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.fromarray(image).save(path)
    texts = ["the red thing", "red left of blue", "red above green", "green", "nothing", "red and red", "a blue thing"]
    texts += ["a blue thing on the Left", "the left red thing"]
    items = [Expression(paths[n % 2], n % 2, n, text, n, None) for n, text in enumerate(texts)]
    made = from_expressions(ByColour(), Words(), items, side=15)
    found = {text: (e, made.labels.referent[e]) for e, text in enumerate(made.labels.expressions)}
    single = {"the red thing", "red and red", "red above green", "the left red thing"}  # green is nowhere
    open_ones = {"red left of blue", "a blue thing on the Left"}  # several nouns; a place, which CLIP knows nothing of
    assert set(found) == single | open_ones | {"a blue thing"}
    assert made.notes == {"phrases found nowhere": 3}
    assert {text for text, (_, referent) in found.items() if referent == 0} == single | {"a blue thing"}  # H_sem
    assert {text for text, (_, referent) in found.items() if referent == UNKNOWN} == open_ones  # H_ref
    red, small, blue = made.labels.candidates(found["red left of blue"][0])
    assert red[3:7, 3:7].all() and small[1, 13] and blue[9:13, 8:12].all()
    assert len(made.labels.candidates(found["a blue thing"][0])) == 2
    assert len(made.labels.candidates(found["red above green"][0])) == 1
    assert [made.images.load(row).size for row in range(2)] == [(60, 60), (60, 60)]
