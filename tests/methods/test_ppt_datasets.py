"""Pseudo-labels in the cache: made once, read back as they were, and never those of something else."""

import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_ppt_pseudo import COLORS, ByColour, Words
from tests.methods.test_ppt_training import CONFIG
from wris_lib.backbones import checkpoints
from wris_lib.backbones.sam import Segmenter, build_toy_sam
from wris_lib.data.objects import ObjectImage
from wris_lib.data.refer import Expression
from wris_lib.errors import WrisError
from wris_lib.methods.clip_sam import PointRule
from wris_lib.methods.ppt import datasets
from wris_lib.methods.ppt.datasets import OBJECT_RULE, candidates, object_pictures, training_data
from wris_lib.methods.ppt.labels import UNKNOWN
from wris_lib.methods.ppt.pseudo import from_expressions, label_objects

tokenizer, clip, segmenter = test_clip.tokenizer, test_ppt_training.clip, test_ppt_training.segmenter

SIZES = [(80, 60), (13, 7), (21, 33), (37, 11), (19, 19)]  # width, height: none of the small ones fills whole bytes


class Counting(ByColour):
    """`ByColour`, which notes whom it was made for and what it is asked."""

    def __init__(self):
        self.asked, self.rules = [], []

    def __call__(self, clip, segmenter, rule=None):
        self.rules.append(rule or PointRule())
        return self

    def predict(self, image, expressions):
        self.asked += expressions
        return super().predict(image, expressions)


@pytest.fixture
def method(tmp_path, monkeypatch) -> Counting:
    """A cache and weights of the test's own, and a method that knows colours in the place of CLIP + SAM."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    for name in ("clip.safetensors", "sam.safetensors", "parser.msgpack"):
        (tmp_path / "weights" / name).write_text(name)
    counting = Counting()
    monkeypatch.setattr(datasets, "ClipSam", counting)
    monkeypatch.setattr(datasets, "load_parser", lambda stack: Words())
    return counting


@pytest.fixture
def objects(tmp_path) -> list[ObjectImage]:
    """An ellipse of each colour, in pictures of every size; a picture of nothing between them."""
    items = []
    for number, (width, height) in enumerate(SIZES):
        for name, color in COLORS.items():
            y, x = np.mgrid[:height, :width]
            wide = 0.25 + 0.04 * number
            inside = ((x - width / 2) / (wide * width)) ** 2 + ((y - height / 2) / (0.4 * height)) ** 2 < 1
            image = np.full((height, width, 3), 128, dtype=np.uint8)
            image[inside] = color
            path = tmp_path / f"{name}{number}.png"
            Image.fromarray(image).save(path)
            items.append(ObjectImage(path, name))
    Image.new("RGB", (40, 40)).save(tmp_path / "empty.png")
    items.insert(4, ObjectImage(tmp_path / "empty.png", "red"))
    return items


@pytest.fixture
def items(tmp_path) -> list[Expression]:
    """Sentences about a square picture and a wide one."""
    paths = [tmp_path / "square.png", tmp_path / "wide.png"]
    for path, (width, height) in zip(paths, [(60, 60), (90, 30)], strict=True):
        image = np.full((height, width, 3), 128, dtype=np.uint8)
        image[5:20, 5:25], image[10:28, 30:55] = COLORS["red"], COLORS["blue"]
        Image.fromarray(image).save(path)
    texts = ["red dog", "blue and red", "green car", "blue car", "red left of blue"]
    return [Expression(paths[n in (1, 4)], n, n, text, n) for n, text in enumerate(texts)]


def kept(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "ppt").glob("*.npz")}


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("size", [256, 30])
def test_pictures_and_masks_come_back_as_they_were(method, objects, clip, segmenter, monkeypatch, size):
    monkeypatch.setattr(datasets, "SIZE", size)
    direct = label_objects(ByColour(), objects, size)
    assert 3 < len(direct) < len(objects)  # some are left out
    assert any(picture.mask.size % 8 for picture in direct) and len({picture.mask.shape for picture in direct}) > 2
    for _ in range(2):  # made, and read
        found = object_pictures("toy", clip, segmenter, objects)
        for picture, expected in zip(found, direct, strict=True):
            assert np.array_equal(picture.image, expected.image) and np.array_equal(picture.mask, expected.mask)
            assert (picture.name, picture.number) == (expected.name, expected.number)
            assert picture.mask.dtype == bool and objects[picture.number].class_name == picture.name


def test_candidates_come_back_as_they_were(method, items, clip, segmenter):
    direct = from_expressions(ByColour(), Words(), items, side=32)
    assert direct.labels.referent.tolist().count(UNKNOWN) == 2 and direct.notes == {"phrases found nowhere": 1}
    for _ in range(2):
        found = candidates("toy", clip, segmenter, items)
        for field in fields(found.labels):
            a, b = getattr(found.labels, field.name), getattr(direct.labels, field.name)
            assert type(a) is type(b)
            assert np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert all(type(text) is str for text in found.labels.expressions)
        assert found.notes == direct.notes and found.images.keys == direct.images.keys
        assert [found.images.load(row).size for row in range(2)] == [(60, 60), (90, 30)]


# --------------------------------------------------------------------------------------------------------- made once


def test_a_second_time_nobody_is_asked(method, objects, items, clip, segmenter, tmp_path):
    object_pictures("toy", clip, segmenter, objects)
    candidates("toy", clip, segmenter, items)
    asked = list(method.asked)
    assert len(asked) == len(objects) + 5  # of the expressions' phrases each once an image
    assert method.rules == [OBJECT_RULE, PointRule()]
    object_pictures("toy", clip, segmenter, objects)
    candidates("toy", clip, segmenter, items)
    assert method.asked == asked and len(kept(tmp_path)) == 2
    assert {path.suffix for path in (tmp_path / "cache" / "ppt").iterdir()} == {".npz", ".lock"}


@pytest.mark.parametrize(
    "change", ["fewer", "order", "text", "picture", "grid", "clip", "sam", "parser", "code", "versions"]
)
def test_other_expressions_models_or_code_make_another_file(
    method, items, clip, segmenter, tmp_path, monkeypatch, change
):
    candidates("toy", clip, segmenter, items)
    match change:
        case "fewer":
            items = items[:-1]
        case "order":
            items = items[::-1]
        case "text":
            items = [replace(items[0], expression="red car"), *items[1:]]
        case "picture":
            Image.new("RGB", (60, 60), COLORS["red"]).save(items[0].image_path)
        case "grid":
            segmenter = Segmenter(build_toy_sam(128))
        case "clip" | "sam" | "parser":
            weights = next((tmp_path / "weights").glob(f"{change}.*"))
            weights.write_text("trained anew")
        case "code":
            (tmp_path / "code.py").write_text("changed")
            monkeypatch.setattr(datasets, "CODE", (*datasets.CODE[1:], str(tmp_path / "code.py")))
        case "versions":
            monkeypatch.setattr(datasets, "version", lambda package: "99")
    method.asked.clear()
    found = candidates("toy", clip, segmenter, items)
    assert method.asked and len(kept(tmp_path)) == 2
    assert set(found.labels.expressions) <= {item.expression for item in items}
    assert found.labels.side == (64 if change == "grid" else 32)


def test_a_file_that_moved_is_still_known(method, items, clip, segmenter, tmp_path):
    candidates("toy", clip, segmenter, items)
    moved = tmp_path / "elsewhere.png"
    items[0].image_path.rename(moved)
    items = [replace(item, image_path=moved) if "square" in str(item.image_path) else item for item in items]
    method.asked.clear()
    found = candidates("toy", clip, segmenter, items)
    assert not method.asked and found.images.load(0).size == (60, 60)


@pytest.mark.parametrize("change", ["fewer", "class", "picture", "rule", "size"])
def test_other_pictures_or_rules_make_another_file(method, objects, clip, segmenter, tmp_path, monkeypatch, change):
    object_pictures("toy", clip, segmenter, objects)
    match change:
        case "fewer":
            objects = objects[1:]
        case "class":
            objects = [ObjectImage(objects[0].image_path, "blue"), *objects[1:]]
        case "picture":
            Image.new("RGB", (9, 9)).save(objects[0].image_path)
        case "rule":
            monkeypatch.setattr(datasets, "OBJECT_RULE", PointRule(0.5, 3, False))
        case "size":
            monkeypatch.setattr(datasets, "SIZE", 30)
    method.asked.clear()
    object_pictures("toy", clip, segmenter, objects)
    assert len(method.asked) == len(objects) and len(kept(tmp_path)) == 2


def test_what_breaks_off_is_made_again(method, items, clip, segmenter, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(np, "savez", lambda file, **arrays: file.write(b"half") and power_cut())
        candidates("toy", clip, segmenter, items)
    assert kept(tmp_path) == set()
    assert len(candidates("toy", clip, segmenter, items).labels) == 4
    assert len(kept(tmp_path)) == 1


def power_cut() -> None:
    raise OSError("power cut")


def test_two_at_once_share_the_work(method, items, clip, segmenter):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(candidates("toy", clip, segmenter, items))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(method.asked) == 5


def test_a_file_in_the_way_of_the_folder(method, items, clip, segmenter, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ppt").write_text("no folder")
    with pytest.raises(WrisError, match="cannot write to .*ppt: a file of that name stands in the way"):
        candidates("toy", clip, segmenter, items)


def test_nothing_is_found(method, objects, items, clip, segmenter, tmp_path):
    nameless = [ObjectImage(item.image_path, "purple") for item in objects]
    with pytest.raises(WrisError, match="found no object in any of 16 object-centric pictures"):
        object_pictures("toy", clip, segmenter, nameless)
    with pytest.raises(WrisError, match="no expression got a pseudo-label"):
        candidates("toy", clip, segmenter, [items[2]])
    assert kept(tmp_path) == set()


# ------------------------------------------------------------------------------------------------------- all of them


def test_all_four_datasets(method, objects, items, clip, segmenter, monkeypatch):
    monkeypatch.setattr(datasets, "load_clip", lambda stack: clip)
    monkeypatch.setattr(datasets, "load_sam", lambda stack: segmenter)
    for name, value in (("SIZE", 64), ("COPIES", 2), ("SCENES", 6)):
        monkeypatch.setattr(datasets, name, value)
    data = training_data("toy", CONFIG, items, objects)
    pictures = object_pictures("toy", clip, segmenter, objects)
    assert len(data.of(["H_sem"])) == len(data.of(["H_ref"])) == 2
    assert len(data.of(["D_sem"])) == 2 * len(pictures) and len(data.of(["D_ref"])) > 6
    assert len(data.patches) == len(data.embeddings) == 2 + 2 * len(pictures) + 6
    assert data.labels.side == 32 and data.labels.image.max() == len(data.patches) - 1
    assert list(data.patches[[0]]) == ["stage 1", "stage 3", "surgery"]
    asked = list(method.asked)
    again, other = (training_data("toy", CONFIG, items, objects, seed) for seed in (0, 1))
    assert method.asked == asked
    stores = [[store.folder for store in each.patches.stores] for each in (data, again, other)]
    assert stores[0] == stores[1] and again.labels.expressions == data.labels.expressions
    assert stores[0][0] == stores[2][0] and not {*stores[0][1:]} & {*stores[2][1:]}  # another seed composes anew
