"""VGPhraseCut, made small here: unions of instances, unseen categories, and what each broken file says."""

import json

import numpy as np
import pytest
from PIL import Image

from wris_lib.data.coco import COCO_NAMES
from wris_lib.data.phrasecut import PhraseCutEvaluation
from wris_lib.errors import WrisError


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def task(number, name, polygons):
    return {
        "task_id": f"5__{number}",
        "image_id": 5,
        "ann_ids": [1, 2],
        "instance_boxes": [[0, 0, 2, 2]],
        "phrase": f"red {name}",
        "phrase_structure": {"name": name, "attributes": ["red"], "type": "attribute"},
        "Polygons": polygons,
    }


TASKS = [
    task(0, "dog", [[square(1, 1, 3)], [square(6, 1, 2), square(6, 5, 2)]]),
    task(1, "people", [[square(0, 0, 4), square(2, 2, 4)]]),
    {**task(2, "Dog", [[square(0, 0, 1)]]), "phrase_structure": None},
    task(3, "Traffic Light", []),
]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "refer_test.json").write_text(json.dumps(TASKS))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (12, 9)).save(tmp_path / "images" / "5.jpg")
    return tmp_path


def test_the_mask_is_the_union_of_all_instances(root):
    items = PhraseCutEvaluation(root, "test").items
    expected = np.zeros((9, 12), dtype=bool)
    expected[1:4, 1:4] = expected[1:3, 6:8] = expected[5:7, 6:8] = True
    assert np.array_equal(items[0].mask, expected)
    assert items[1].mask.sum() == 16 + 16 - 4
    assert items[3].mask.sum() == 0


def test_what_a_task_knows(root):
    item = PhraseCutEvaluation(root, "test").items[0]
    assert (item.image_id, item.task_id, item.expression, item.category) == (5, "5__0", "red dog", "dog")
    assert item.image_path == root / "images" / "5.jpg"


def test_unseen_means_that_coco_has_no_such_name(root):
    assert [item.unseen for item in PhraseCutEvaluation(root, "test").items] == [False, True, False, False]
    assert len(COCO_NAMES) == 80
    assert {"person", "traffic light", "hair drier", "toothbrush"} <= COCO_NAMES


def test_images_elsewhere(root):
    (root / "images").rename(root / "VG_100K")
    item = PhraseCutEvaluation(root, "test", images=root / "VG_100K").items[0]
    assert item.image_path.is_file()
    with pytest.raises(
        WrisError, match="1 of the 1 images of phrasecut:test are missing, the first is .*/images/5.jpg"
    ):
        PhraseCutEvaluation(root, "test")


def test_unknown_split(root):
    (root / "refer_val.json").write_text("[]")
    with pytest.raises(WrisError, match=r"there is no .*refer_testA.json; the splits in .* are: test, val\."):
        PhraseCutEvaluation(root, "testA")
    with pytest.raises(WrisError, match=r"the splits in .*/nowhere are: none\."):
        PhraseCutEvaluation(root / "nowhere", "test")


@pytest.mark.parametrize(
    "content",
    ["", "[", "{}x", '{"task": 1}', "[1]", "3", '[{"image_id": 5}]', json.dumps([{**TASKS[0], "Polygons": 3}])],
)
def test_broken_file(root, content):
    (root / "refer_test.json").write_text(content)
    with pytest.raises(WrisError, match=r"refer_test.json is not in VGPhraseCut's format: .*; download it again"):
        PhraseCutEvaluation(root, "test")
