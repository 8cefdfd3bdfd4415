"""REFER datasets, made small here: what is read, what training cannot see, and what each broken file says."""

import builtins
import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from wris_lib.data.coco import decode_mask, encode_mask, read_instances
from wris_lib.data.refer import EvaluationItem, Expression, ReferEvaluation, ReferExpressions
from wris_lib.errors import WrisError

HEIGHT, WIDTH = 20, 30


def square(x, y, side):
    """The outline of a square whose pixels are those of `filled`."""
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def filled(x, y, side):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def compressed(mask):
    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def uncompressed(mask):
    column_order = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(column_order)) + 1
    counts = np.diff([0, *changes, column_order.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts if not column_order[0] else [0, *counts]}


def annotation(number, image, category, segmentation, **more):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [2, 3, 5.5, 6],
        "area": 30,
        "iscrowd": 0,
        "segmentation": segmentation,
        **more,
    }


INSTANCES = {
    "images": [
        {"id": image, "file_name": f"COCO_train2014_{image:012}.jpg", "height": HEIGHT, "width": WIDTH}
        for image in (7, 8)
    ],
    "annotations": [
        annotation(70, 7, 1, [square(2, 3, 5), square(4, 3, 6)]),
        annotation(
            71,
            7,
            1,
            uncompressed(filled(10, 10, 5)),
            parts=[
                {"name": "hat", "segmentation": compressed(filled(10, 10, 2)), "color": "red"},
                {"name": "shoe", "segmentation": compressed(filled(10, 14, 1)), "color": "blue"},
                {"name": "shoe", "segmentation": compressed(filled(14, 14, 1)), "color": "blue"},
            ],
        ),
        annotation(72, 7, 2, compressed(filled(0, 0, 4)), iscrowd=1),
        annotation(80, 8, 18, compressed(filled(20, 5, 3))),
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "crowd"}, {"id": 18, "name": "dog"}],
}


def ref(number, ann, split, *sentences):
    return {
        "ref_id": number,
        "ann_id": ann,
        "category_id": 1,
        "image_id": ann // 10,
        "file_name": f"COCO_train2014_{ann // 10:012}_{number}.jpg",
        "split": split,
        "sent_ids": [sentence_id for sentence_id, _ in sentences],
        "sentences": [
            {"raw": sent.upper(), "sent": sent, "sent_id": sentence_id, "tokens": sent.split()}
            for sentence_id, sent in sentences
        ],
    }


REFS = [
    ref(0, 70, "train", (0, "the left man"), (1, "man on the left")),
    ref(1, 71, "val", (2, "right guy")),
    ref(2, 70, "testA", (3, "left one"), (4, "a man")),
    ref(3, 80, "testB", (5, "dog")),
    ref(4, 71, "testAB", (6, "both tests")),
]


def write(root, name="refcoco", refs=REFS, instances=INSTANCES, split_by="unc", protocol=2):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    (folder / "instances.json").write_text(json.dumps(instances))
    images = root / "images" / "mscoco" / "images" / "train2014"
    images.mkdir(parents=True, exist_ok=True)
    for image in INSTANCES["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / image["file_name"])
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path)


def sentences(dataset):
    return [item.expression for item in dataset.items]


# -------------------------------------------------------------------------------------------- what is read


def test_every_sentence_is_a_sample(root):
    assert sentences(ReferExpressions(root, "refcoco", "train")) == ["the left man", "man on the left"]
    item = ReferExpressions(root, "refcoco", "train").items[1]
    image = root / "images" / "mscoco" / "images" / "train2014" / "COCO_train2014_000000000007.jpg"
    assert item == Expression(image, image_id=7, ref_id=0, expression="man on the left", sent_id=1, kind=None)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("val", [2]),
        ("testA", [3, 4, 6]),
        ("testB", [5, 6]),
        ("test", [3, 4, 5, 6]),
        ("testAB", [6]),
    ],
)
def test_split_names_as_in_refer(root, split, expected):
    assert [item.sent_id for item in ReferExpressions(root, "refcoco", split).items] == expected
    assert [item.sent_id for item in ReferEvaluation(root, "refcoco", split).items] == expected


def test_the_plain_test_split_of_refcocog(tmp_path):
    write(tmp_path, "refcocog", [ref(0, 70, "test", (0, "a man standing"))], split_by="umd")
    assert sentences(ReferExpressions(tmp_path, "refcocog", "test")) == ["a man standing"]
    with pytest.raises(WrisError, match="no split 'testA'; its splits are: test"):
        ReferExpressions(tmp_path, "refcocog", "testA")


def test_split_by(tmp_path):
    for split_by in ("google", "umd"):
        write(tmp_path, "refcocog", [ref(0, 70, "val", (0, split_by))], split_by=split_by)
    for split_by in ("google", "unc"):
        write(tmp_path, "refcoco", [ref(0, 70, "val", (0, split_by))], split_by=split_by)
    write(tmp_path, "other", [ref(0, 70, "val", (0, "the only one"))], split_by="someone")
    assert sentences(ReferExpressions(tmp_path, "refcocog", "val")) == ["umd"]
    assert sentences(ReferExpressions(tmp_path, "refcocog", "val", "google")) == ["google"]
    assert sentences(ReferExpressions(tmp_path, "refcoco", "val")) == ["unc"]
    assert sentences(ReferExpressions(tmp_path, "refcoco", "val", split_by="google")) == ["google"]
    assert sentences(ReferEvaluation(tmp_path, "other", "val")) == ["the only one"]
    with pytest.raises(WrisError, match=r"no refs\(unc\).p .*; split_by can be google or umd"):
        ReferExpressions(tmp_path, "refcocog", "val", "unc")


def test_kinds_of_toy_sentences(tmp_path):
    toy = ref(0, 70, "val", (0, "the left man"))
    toy["sentences"][0]["kind"] = "position"
    write(tmp_path, "toyref", [toy], split_by="toy")
    assert ReferExpressions(tmp_path, "toyref", "val").items[0].kind == "position"


def test_images_of_the_dataset_itself_come_first(root, tmp_path):
    own = root / "images" / "refcoco"
    own.mkdir()
    for image in INSTANCES["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(own / image["file_name"])
    assert ReferExpressions(root, "refcoco", "val").items[0].image_path.parent == own
    own.rename(tmp_path / "elsewhere")
    elsewhere = ReferExpressions(root, "refcoco", "val", images=tmp_path / "elsewhere")
    assert elsewhere.items[0].image_path.parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(tmp_path, protocol):
    write(tmp_path, protocol=protocol)
    assert len(ReferExpressions(tmp_path, "refcoco", "train").items) == 2


def test_a_pickle_of_python_2(tmp_path):
    """Python 2 writes its plain strings as bytes, its long numbers as LONG1, and its sets as __builtin__.set."""

    def plain(text):
        return b"U" + bytes([len(text)]) + text

    def number(value):
        return b"K" + bytes([value])

    sentence = plain(b"sent") + plain("café".encode()) + plain(b"raw") + b"X\x05\x00\x00\x00caf\xc3\xa9"
    sentence += plain(b"sent_id") + b"\x8a\x01\x05" + plain(b"tags") + b"c__builtin__\nset\n]\x85R"
    entry = plain(b"ref_id") + number(0) + plain(b"ann_id") + number(70) + plain(b"image_id") + number(7)
    entry += plain(b"split") + plain(b"val") + plain(b"sentences") + b"](}(" + sentence + b"ue"
    write(tmp_path)
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(b"\x80\x02](}(" + entry + b"ue.")
    assert sentences(ReferExpressions(tmp_path, "refcoco", "val")) == ["café"]


# ---------------------------------------------------------------------------------------- the ground truth


def test_overlapping_polygons_are_united(root):
    item = ReferEvaluation(root, "refcoco", "train").items[0]
    assert np.array_equal(item.mask, filled(2, 3, 5) | filled(4, 3, 6))
    assert item.mask.dtype == bool
    assert item.mask.shape == (item.height, item.width) == (HEIGHT, WIDTH)


def test_box_is_xyxy(root):
    assert ReferEvaluation(root, "refcoco", "train").items[0].box.tolist() == [2, 3, 7.5, 9]


def test_categories(root):
    assert ReferEvaluation(root, "refcoco", "train").items[0].category == "person"
    assert ReferEvaluation(root, "refcoco", "testB").items[0].category == "dog"


def test_parts(root):
    parts = ReferEvaluation(root, "refcoco", "val").items[0].parts
    assert list(parts) == ["hat", "shoe"]
    assert np.array_equal(parts["hat"], filled(10, 10, 2))
    assert np.array_equal(parts["shoe"], filled(10, 14, 1) | filled(14, 14, 1))
    assert ReferEvaluation(root, "refcoco", "train").items[0].parts == {}


def test_others_are_the_image_s_other_objects_but_no_crowds(root):
    others = ReferEvaluation(root, "refcoco", "train").items[0].others
    assert len(others) == 1
    assert np.array_equal(others[0], filled(10, 10, 5))
    assert ReferEvaluation(root, "refcoco", "testB").items[0].others == []


def test_twins_are_the_others_of_the_referent_s_category(root):
    instances = json.loads(json.dumps(INSTANCES))
    instances["annotations"] += [annotation(73, 7, 18, [square(0, 0, 3)]), annotation(81, 8, 18, [square(0, 0, 3)])]
    instances["annotations"] += [annotation(82, 8, 18, [square(9, 9, 3)]), annotation(83, 8, 1, [square(5, 5, 3)])]
    write(root, instances=instances)
    twins = {split: ReferEvaluation(root, "refcoco", split).items[0].twins for split in ("train", "testB")}
    assert twins == {"train": 1, "testB": 2}  # a person beside a person and a dog; a dog beside two dogs and a person


@pytest.mark.parametrize("encode", [compressed, uncompressed])
@pytest.mark.parametrize("mask", [filled(3, 4, 5), filled(0, 0, 20), filled(0, 0, 0)])
def test_run_lengths(encode, mask):
    assert np.array_equal(decode_mask(encode(mask), HEIGHT, WIDTH), mask)


def test_a_mask_survives_json():
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) > 0.5
    for kept in (mask, ~mask & mask, mask | ~mask):
        assert np.array_equal(decode_mask(json.loads(json.dumps(encode_mask(kept))), HEIGHT, WIDTH), kept)


def test_polygons_that_enclose_nothing():
    assert not decode_mask([], HEIGHT, WIDTH).any()
    assert not decode_mask([[], [3, 4, 5, 6]], HEIGHT, WIDTH).any()
    assert np.array_equal(decode_mask([[3, 4, 5, 6], square(1, 2, 3)], HEIGHT, WIDTH), filled(1, 2, 3))


@pytest.mark.parametrize(
    "broken",
    [
        compressed(np.zeros((5, 5), bool)),
        {"size": [HEIGHT, WIDTH], "counts": [3, 5_000]},
        {"size": [HEIGHT, WIDTH]},
        {},
        [["a", "b", "c", "d", "e", "f"]],
        [3],
    ],
)
def test_broken_outlines(broken):
    with pytest.raises(WrisError, match="a mask cannot be drawn: .*; download its dataset again"):
        decode_mask(broken, HEIGHT, WIDTH)


# ------------------------------------------------------------------------------------- weak supervision


@pytest.mark.parametrize("split", ["train", "val", "testA", "testB"])
def test_training_items_raise_on_every_mask(root, split):
    truths = {name for name in dir(EvaluationItem) if not name.startswith("_")}
    truths |= {field.name for field in dataclasses.fields(EvaluationItem)}
    truths -= {field.name for field in dataclasses.fields(Expression)}
    assert {"mask", "box", "parts", "others", "twins", "category", "annotation", "neighbours"} <= truths
    for item in ReferExpressions(root, "refcoco", split).items:
        assert type(item) is Expression
        for truth in truths:
            with pytest.raises(AttributeError):
                getattr(item, truth)


def test_the_training_view_holds_nothing_but_its_items(root):
    dataset = ReferExpressions(root, "refcoco", "train")
    assert list(vars(dataset)) == ["items"]
    for item in dataset.items:
        assert all(isinstance(value, (int, str, Path, type(None))) for value in vars(item).values())


def test_the_training_view_draws_no_mask(root, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a mask was drawn")

    monkeypatch.setattr("wris_lib.data.refer.decode_mask", refuse)
    assert ReferExpressions(root, "refcoco", "train").items
    with pytest.raises(AssertionError, match="a mask was drawn"):
        ReferEvaluation(root, "refcoco", "train").items[0].mask  # noqa: B018


def test_evaluation_draws_masks_only_when_asked(root, monkeypatch):
    monkeypatch.delattr("wris_lib.data.refer.decode_mask")
    assert len(ReferEvaluation(root, "refcoco", "train").items) == 2


# ------------------------------------------------------------------------------------------ what is missing


def test_unknown_split(root):
    for view in (ReferExpressions, ReferEvaluation):
        with pytest.raises(WrisError, match="^refcoco has no split 'dev'; its splits are: testA, testAB, testB, train"):
            view(root, "refcoco", "dev")
    with pytest.raises(WrisError, match="has no split 'testC'"):
        ReferExpressions(root, "refcoco", "testC")


def test_no_refs_at_all(tmp_path):
    write(tmp_path, refs=[])
    with pytest.raises(WrisError, match="its splits are: none"):
        ReferExpressions(tmp_path, "refcoco", "val")


def test_missing_dataset_folder(root):
    with pytest.raises(WrisError, match="there is no dataset folder .*/refcoco9; check"):
        ReferExpressions(root, "refcoco9", "val")


@pytest.mark.parametrize("name", ["refs(unc).p", "instances.json"])
def test_missing_file(root, name):
    (root / "refcoco" / name).unlink()
    with pytest.raises(WrisError, match=r"there is no .*(refs\(...\).p in .*refcoco|instances.json); download"):
        ReferExpressions(root, "refcoco", "val")


def test_missing_image_folder(root, tmp_path):
    (root / "images").rename(tmp_path / "moved")
    with pytest.raises(WrisError, match="no image folder .*/images/refcoco or .*/train2014; .* fetch paper"):
        ReferExpressions(root, "refcoco", "val")
    with pytest.raises(WrisError, match="no image folder /nowhere; "):
        ReferExpressions(root, "refcoco", "val", images="/nowhere")


def test_missing_image(root):
    next(root.rglob("COCO_train2014_000000000008.jpg")).unlink()
    with pytest.raises(WrisError, match="1 of the 2 images of refcoco:test are missing, the first is .*8.jpg; copy"):
        ReferExpressions(root, "refcoco", "test")
    assert ReferExpressions(root, "refcoco", "train").items  # which needs the other image only


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_files_that_do_not_belong_together(tmp_path, table):
    write(tmp_path, instances={**INSTANCES, table: []})
    with pytest.raises(WrisError, match="instances.json in .*refcoco lacks id .*; download both together"):
        ReferEvaluation(tmp_path, "refcoco", "val")


# ------------------------------------------------------------------------------------------ what is broken


class Call:
    """Pickles as a call, which a common unpickler carries out."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (builtins.eval, r"(builtins|__builtin__)\.eval"),
        (builtins.exec, r"(builtins|__builtin__)\.exec"),
        (builtins.getattr, r"(builtins|__builtin__)\.getattr"),
        (builtins.__import__, r"(builtins|__builtin__)\.__import__"),
        (builtins.open, r"io\.open|_io\.open"),
        (builtins.bytearray, r"(builtins|__builtin__)\.bytearray"),
        (pickle.loads, r"(_pickle|cPickle|pickle)\.loads"),
    ],
)
def test_hostile_pickles_run_nothing(tmp_path, monkeypatch, protocol, function, name):
    marker = tmp_path / "ran"
    write(tmp_path, refs=[*REFS, Call(function, f"touch {marker}")], protocol=protocol)
    with pytest.raises(WrisError, match=rf"refs\(unc\).p cannot be read .*\(it asks for ({name}), which no list"):
        ReferExpressions(tmp_path, "refcoco", "val")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8c\x08builtins\x8c\x0fset.__init__.__globals__\x93.",  # a dotted name
        b"\x80\x04\x8c\x08builtins\x8c\x08set.pop_\x93.",
        b"(S'touch ran'\nios\nsystem\n.",  # INST, as Python 2 wrote instances
        b"cbuiltins\nset\n}S'x'\nI1\nsb.",  # BUILD, to change the class itself
        b"P1\n.",  # a persistent id
        b"\x82\x01.",  # the extension registry
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",  # bytes that are not there
    ],
)
def test_hand_made_hostile_pickles(root, content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (root / "refcoco" / "refs(unc).p").write_bytes(content)
    with pytest.raises(WrisError, match=r"refs\(unc\).p cannot be read as a list of refs \(.+\); download it again"):
        ReferExpressions(root, "refcoco", "val")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"<html>404</html>", b"\0" * 100, b"PK\x03\x04", b"."])
def test_no_pickle(root, content):
    (root / "refcoco" / "refs(unc).p").write_bytes(content)
    with pytest.raises(WrisError, match=r"refs\(unc\).p cannot be read as a list of refs \(.+\); download it again"):
        ReferExpressions(root, "refcoco", "val")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_truncated_pickle(root, protocol):
    path = root / "refcoco" / "refs(unc).p"
    content = pickle.dumps(REFS, protocol=protocol)
    for length in range(0, len(content) - 1, 37):
        path.write_bytes(content[:length])
        with pytest.raises(WrisError, match=r"refs\(unc\).p cannot be read as a list of refs"):
            ReferExpressions(root, "refcoco", "val")


def test_refs_are_a_folder(root):
    (root / "refcoco" / "refs(unc).p").unlink()
    (root / "refcoco" / "refs(unc).p").mkdir()
    with pytest.raises(WrisError, match=r"refs\(unc\).p cannot be read"):
        ReferExpressions(root, "refcoco", "val")


def without(key):
    return [REFS[0], {name: value for name, value in REFS[1].items() if name != key}]


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"refs": REFS}, "should hold a list of refs, but it holds a dict"),
        (None, "should hold a list of refs, but it holds a NoneType"),
        ([REFS[0], "ref"], "ref number 1 has no good 'ref_id'"),
        (without("ann_id"), "ref number 1 has no good 'ann_id'"),
        (without("split"), "ref number 1 has no good 'split'"),
        (without("sentences"), "ref number 1 has no good 'sentences'"),
        ([{**REFS[0], "image_id": "7"}], "ref number 0 has no good 'image_id'"),
        ([{**REFS[0], "sentences": ["the left man"]}], "ref number 0 has no good 'sent_id'"),
        ([{**REFS[0], "sentences": [{"sent_id": 3, "sent": None}]}], "ref number 0 has no good 'sent'"),
    ],
)
def test_refs_of_another_structure(tmp_path, refs, message):
    write(tmp_path, refs=refs)
    with pytest.raises(WrisError, match=rf"refs\(unc\).p .*{message}"):
        ReferExpressions(tmp_path, "refcoco", "val")


@pytest.mark.parametrize("content", [b"", b"{", b'{"images": [', b"\xff\xfe\x00", b"[" * 100_000])
def test_instances_that_are_no_json(root, content):
    (root / "refcoco" / "instances.json").write_bytes(content)
    with pytest.raises(WrisError, match=r"instances.json cannot be read as JSON \(.+\); download it again"):
        ReferEvaluation(root, "refcoco", "val")


@pytest.mark.parametrize(
    ("instances", "table"),
    [
        ([], "images"),
        ({}, "images"),
        ({**INSTANCES, "images": [{"id": 7}]}, "images"),
        (
            {**INSTANCES, "annotations": [{"id": 70, "image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]}]},
            "annotations",
        ),
        ({**INSTANCES, "categories": {"1": "person"}}, "categories"),
    ],
)
def test_instances_of_another_structure(tmp_path, instances, table):
    write(tmp_path, instances=instances)
    with pytest.raises(WrisError, match=f"instances.json is not in COCO's format: '{table}' should have id, "):
        ReferEvaluation(tmp_path, "refcoco", "val")


def test_instances_are_parsed_once_until_the_file_changes(root):
    path = root / "refcoco" / "instances.json"
    first = read_instances(path)
    assert read_instances(path) is first
    path.write_text(json.dumps({**INSTANCES, "images": INSTANCES["images"][:1]}))
    assert len(read_instances(path)["images"]) == 1
