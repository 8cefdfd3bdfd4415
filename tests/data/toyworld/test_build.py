"""The toy datasets on disk: RefCOCO's format, the same bytes for everybody, and what each split promises."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wris_lib import data
from wris_lib.data import toyworld
from wris_lib.data.objects import ObjectImages
from wris_lib.data.refer import ReferEvaluation, ReferExpressions
from wris_lib.data.toyworld import build
from wris_lib.data.toyworld.pretraining import CAPTIONS, make_pool
from wris_lib.data.toyworld.scenes import SIZE, UNSEEN
from wris_lib.data.toyworld.sprites import drawings, supercategories
from wris_lib.errors import WrisError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build.write_world(folder, scale=0.01, processes=1)
    return folder


def splits():
    return [(name, split) for name, dataset in build.DATASETS.items() for split in dataset.splits]


@pytest.mark.parametrize(("name", "split"), splits())
def test_every_split_reads_like_a_referring_dataset(world, name, split):
    items = ReferEvaluation(world, name, split).items
    assert items
    for item in items[:6]:
        assert item.mask.sum() == item.annotation["area"] >= 260
        assert Image.open(item.image_path).size == (SIZE, SIZE)
        left, top, right, bottom = item.box.astype(int)
        assert item.mask[top:bottom, left:right].sum() == item.mask.sum()
        assert np.array_equal(np.any(list(item.parts.values()), axis=0), item.mask)
        assert not any((other & item.mask).any() for other in item.others)
    assert [vars(a)["expression"] for a in ReferExpressions(world, name, split).items] == [i.expression for i in items]


def test_splits_are_what_their_names_say(world):
    def categories(name, split):
        return {item.category for item in ReferEvaluation(world, name, split).items}

    people = set(supercategories()["people"])
    for name in ("toyref", "toyref+"):
        assert categories(name, "testA") <= people
        assert not categories(name, "testB") & people
    for name in ("toyref", "toyref+", "toyrefg"):
        for split in build.DATASETS[name].splits:
            assert not categories(name, split) & set(UNSEEN)
            assert all(
                not set(item.expression.split()) & set(UNSEEN) for item in ReferEvaluation(world, name, split).items
            )
    assert categories("toycut", "val") & set(UNSEEN)


def test_expressions_have_the_style_of_their_dataset(world):
    items = {name: ReferExpressions(world, name, "train").items for name in ("toyref", "toyref+", "toyrefg")}
    words = {name: np.mean([len(item.expression.split()) for item in of]) for name, of in items.items()}
    located = {
        name: np.mean([bool(build.ABSOLUTE_POSITION.search(i.expression)) for i in of]) for name, of in items.items()
    }
    assert words["toyref"] < 6 and words["toyref+"] < 6 and 7 < words["toyrefg"] < 12
    assert 0.35 < located["toyref"] < 0.6
    assert located["toyref+"] == 0
    assert {item.kind for item in items["toyref"]} >= {"attribute", "part", "position", "relation"}


def test_two_referents_or_more_an_image_and_several_expressions_each(world):
    for name, split in splits():
        items = ReferExpressions(world, name, split).items
        referents = {item.image_id: {i.ref_id for i in items if i.image_id == item.image_id} for item in items}
        expressions = Counter(item.ref_id for item in items)
        if name != "toyobjects":
            assert all(len(refs) >= 2 for refs in referents.values())
            assert all(count >= 2 for count in expressions.values())


def test_one_process_and_two_write_the_same_bytes(tmp_path):
    for processes in (1, 2):
        build.write_world(tmp_path / str(processes), scale=0.002, processes=processes)
    assert _digests(tmp_path / "1") == _digests(tmp_path / "2")


def test_object_images_are_an_image_folder(world):
    images = ObjectImages(world / "images" / "toyobjects" / "train")
    assert {item.class_name for item in images.items} <= set(drawings())
    assert len(images.items) == 16


def test_load_makes_the_world_once_and_names_splits(world, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    calls = []
    monkeypatch.setattr(build, "write_world", lambda folder: calls.append(folder) or folder.joinpath("made").touch())
    assert toyworld.ensure() == toyworld.ensure()
    assert len(calls) == 1 and (toyworld.ensure() / "made").exists()

    (toyworld.ensure() / "made").unlink()
    toyworld.ensure().rmdir()
    world_copy = tmp_path / f"toyworld-{build.VERSION}"
    world_copy.symlink_to(world)
    assert len(data.load("toyref:val").items) == len(data.load_training("toyref:val").items) > 0
    assert not hasattr(data.load_training("toyref:val").items[0], "mask")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toyref", "dataset:split"),
        (":val", "dataset:split"),
        ("nothing:val", "there is no dataset 'nothing' .*fetch paper --data refcoco` puts them"),
    ],
)
def test_names_of_splits_that_are_none(spec, message):
    with pytest.raises(WrisError, match=message):
        data.load(spec)


@pytest.mark.parametrize(("name", "size"), [("clip", 128), ("sam", 256), ("albef", 256)])
def test_pools(name, size, tmp_path):
    pool = make_pool(tmp_path / "pool", name, 4, size, processes=1)
    assert pool.images.shape == (4, size, size, 3)
    assert pool.images.std() > 10
    if name == "clip":
        assert [len(sentences) for sentences in pool.captions] == [CAPTIONS] * 4
    elif name == "albef":
        assert [len(sentences) for sentences in pool.captions] == [len(sentences) for sentences in pool.untrue]
        assert all(set(true).isdisjoint(other) for true, other in zip(pool.captions, pool.untrue, strict=True))
        assert sum(map(len, pool.captions)) > 8
    else:
        assert pool.labels.shape == (4, size, size)
        assert (pool.labels >= 16).any() and (pool.labels == 0).any()
    again = make_pool(tmp_path / "pool", name, 4, size, processes=1)
    assert np.array_equal(again.images, pool.images)


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
