"""`segment` and CLIP + SAM, with a CLIP whose maps are known and a SAM that draws discs."""

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from wris_lib import methods
from wris_lib.backbones import checkpoints
from wris_lib.backbones.checkpoints import Stack
from wris_lib.backbones.sam import SamImage, SamMasks, Segmenter, build_toy_sam
from wris_lib.errors import WrisError
from wris_lib.methods import clip_sam
from wris_lib.methods.clip_sam import ClipSam, PointRule, enlarge, peaks_of_map, points_from_map, scale


class FakeClip:
    """Answers to "x=2 y=1" with a map whose only peak is in that cell of a 4×4 grid."""

    def __init__(self):
        self.encoded = []

    def encode_image(self, image):
        self.encoded.append(image.size)
        return "features"

    def maps(self, features, expressions, kind):
        assert features == "features"
        maps = torch.zeros(len(expressions), 4, 4)
        for response_map, expression in zip(maps, expressions, strict=True):
            x, y = (int(word[2:]) for word in expression.split()[:2])
            response_map[y, x] = 1 if kind == "surgery" else 0.5
        return maps - 3


class FakeSam:
    """Three discs around the first point; the second is the one it trusts most."""

    radii = (2, 5, 9)

    def __init__(self):
        self.embedded, self.prompts = [], []

    def embed(self, image):
        self.embedded.append(image.size)
        return SamImage(torch.zeros(1, 1, 1, 1), (image.height, image.width), (image.height, image.width))

    def decode(self, image, points, labels):
        self.prompts.append((points, labels))
        self.center = points[0, 0].tolist()
        return SamMasks(torch.zeros(1, 3, 1, 1), torch.tensor([[0.2, 0.9, 0.4]]))

    def masks(self, image, decoded):
        ys, xs = np.mgrid[: image.original_size[0], : image.original_size[1]]
        squares = (xs - self.center[0]) ** 2 + (ys - self.center[1]) ** 2
        return np.stack([squares <= radius**2 for radius in self.radii])[None]


@pytest.fixture
def models(monkeypatch):
    clip, sam = FakeClip(), FakeSam()
    monkeypatch.setattr(clip_sam, "load_clip", lambda stack, device: clip)
    monkeypatch.setattr(clip_sam, "load_sam", lambda stack, device: sam)
    # Fakes are not what the signature asks for, and the signature is checked in tests.
    monkeypatch.setattr(ClipSam, "__init__", ClipSam.__init__.__wrapped__)
    methods._load.cache_clear()
    yield clip, sam
    methods._load.cache_clear()


IMAGE = Image.new("RGB", (80, 40))


def test_the_pipeline_from_map_to_mask(models):
    _, sam = models
    prediction = methods.segment(IMAGE, "x=2 y=1")
    # The peak's cell has its centre at 2.5 cells of 20 and 1.5 cells of 10 pixels.
    assert prediction.points.tolist()[0] == [50, 15]
    assert prediction.point_labels.tolist() == [1, 0]
    ((points, labels),) = sam.prompts
    assert points.tolist() == [prediction.points.tolist()] and labels.tolist() == [[1, 0]]
    assert prediction.mask.shape == (40, 80)
    assert prediction.mask[15, 50] and prediction.mask[15, 55] and not prediction.mask[15, 56]
    assert prediction.score == pytest.approx(0.9)
    assert prediction.response_map.shape == (40, 80)
    assert prediction.response_map.min() == 0 and prediction.response_map.max() == 1


def test_the_trace_shows_every_step(models):
    prediction = methods.segment(IMAGE, "x=0 y=0", kind="plain")
    first, second, third = prediction.trace
    assert first.response_map.shape == (4, 4) and "plain" in first.note
    assert second.note == "1 positive, 1 negative" and second.points is not None
    assert third.masks.shape == (3, 40, 80) and third.scores.tolist() == pytest.approx([0.2, 0.9, 0.4])
    assert (third.masks[1] == prediction.mask).all()


def test_every_peak_is_asked_about(monkeypatch):
    """With a real SAM, however small: prompts of one length are decoded together, and keep their places."""
    torch.manual_seed(0)
    segmenter = Segmenter(build_toy_sam(64))
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3], maps[0, 2, 3], maps[1, 1, 2] = 0.9, 1.0, 0.95, 1.0
    clip = SimpleNamespace(encode_image=lambda image: None, maps=lambda features, expressions, kind: maps)
    monkeypatch.setattr(ClipSam, "__init__", ClipSam.__init__.__wrapped__)
    found = ClipSam(clip, segmenter).find_all(IMAGE, ["two peaks", "one"])
    assert [len(masks) for masks in found] == [2, 1] and ClipSam(clip, segmenter).find_all(IMAGE, []) == []
    embedded = segmenter.embed(IMAGE)
    for masks, response_map in zip(found, maps.numpy(), strict=True):
        for mask, (points, labels) in zip(masks, peaks_of_map(response_map, 80, 40), strict=True):
            decoded = segmenter.decode(embedded, torch.from_numpy(points)[None], torch.from_numpy(labels)[None])
            assert (mask == segmenter.best_mask(embedded, decoded)[0]).mean() > 0.99


def test_many_expressions_share_one_embedding_and_keep_their_order(models):
    clip, sam = models
    texts = ["x=0 y=0", "x=3 y=3", "x=1 y=2"]
    together = methods.segment(IMAGE, texts)
    assert clip.encoded == sam.embedded == [(80, 40)]
    for text, prediction in zip(texts, together, strict=True):
        alone = methods.segment(IMAGE, text)
        assert (alone.mask == prediction.mask).all() and (alone.points == prediction.points).all()
    assert clip.encoded == sam.embedded == [(80, 40)]  # the last image is remembered
    methods.segment(IMAGE.rotate(90, expand=True), texts)
    assert clip.encoded == sam.embedded == [(80, 40), (40, 80)]


def test_no_expressions_no_predictions(models):
    clip, _ = models
    assert methods.segment(IMAGE, []) == []
    assert not clip.encoded


def test_an_image_may_be_a_path_a_picture_or_an_array(models, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), IMAGE, np.zeros((40, 80, 3), np.uint8), np.zeros((40, 80))]
    for source in sources:
        assert methods.segment(source, "x=1 y=1").mask.shape == (40, 80)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (300, 7)])
def test_any_size_works(models, size):
    prediction = methods.segment(Image.new("RGB", size), "x=1 y=1 and 🦄 " + "word " * 2000)
    assert prediction.mask.shape == prediction.response_map.shape == size[::-1]


def test_models_are_loaded_once(models, monkeypatch):
    loads = []
    monkeypatch.setattr(clip_sam, "load_clip", lambda stack, device: loads.append(stack) or models[0])
    for _ in range(3):
        methods.segment(IMAGE, "x=1 y=1")
    methods.segment(IMAGE, "x=1 y=1", kind="plain")
    assert loads == ["toy", "toy"]


def test_models_are_loaded_anew_when_a_file_of_the_stack_s_was_written_anew(models, monkeypatch, tmp_path):
    loads = []
    monkeypatch.setattr(clip_sam, "load_clip", lambda stack, device: loads.append(stack) or models[0])
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    for times in ([0, 0], [0, 0], [0, 1], [2, 1], [2, 1]):
        for part, time in zip(("clip", "sam"), times, strict=True):
            (tmp_path / f"{part}.safetensors").touch()
            os.utime(tmp_path / f"{part}.safetensors", (time, time))
        methods.segment(IMAGE, "x=1 y=1")
    assert len(loads) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expression": ""}, "the expression is empty"),
        ({"expression": " \n"}, "the expression is empty"),
        ({"expression": ["x=1 y=1", " "]}, "the expression is empty"),
        ({"image": "/no/such/file.jpg"}, "no image file /no/such/file.jpg"),
        ({"method": "ptt"}, "no method 'ptt'; choose one of: clip_sam, ppt"),
        ({"stack": "big"}, "no stack 'big'"),
        ({"kind": "fancy"}, "clip_sam has no kind 'fancy'; choose one of: plain, surgery"),
        ({"points": 3}, "clip_sam has no option 'points'; it has: kind, device"),
    ],
)
def test_what_cannot_be_done_gets_a_sentence(models, arguments, message):
    with pytest.raises(WrisError, match=message):
        methods.segment(**{"image": IMAGE, "expression": "x=1 y=1"} | arguments)


def test_every_registered_method_keeps_to_the_rules():
    for name in methods.METHODS:
        cls = methods.get_method(name)
        assert issubclass(cls, methods.Method)
        assert set(cls.parts) <= {field.name for field in dataclasses.fields(Stack)} - {"name"}
        for variant, options in cls.variants.items():
            assert " " not in variant
            hash(tuple(options.items()))


def test_a_real_sam_takes_the_prompts():
    torch.manual_seed(0)
    sam = Segmenter(build_toy_sam())
    embedded = sam.embed(IMAGE)
    method = ClipSam.__new__(ClipSam)
    method.sam, method.kind, method.rule = sam, "surgery", PointRule()
    prediction = method._segment(embedded, np.arange(16, dtype=np.float32).reshape(4, 4))
    assert prediction.mask.shape == (40, 80)
    assert prediction.score == pytest.approx(prediction.trace[-1].scores.max())


# ------------------------------------------------------------------------------------------- from map to points


def test_points_by_hand():
    response_map = np.array([[0.0, 10, 8, 1], [7.9, 2, 3, 4]], np.float32)
    points, labels = points_from_map(response_map, width=40, height=40)
    # 10 and 8 reach 0.8 of the range, 7.9 does not; as many of the lowest are negative: 0 and 1.
    assert points.tolist() == [[15, 10], [25, 10], [5, 10], [35, 10]]
    assert labels.tolist() == [1, 1, 0, 0]


def test_points_by_another_rule():
    response_map = np.array([[0.0, 10, 8, 1], [7.9, 2, 3, 4]], np.float32)
    points, labels = points_from_map(response_map, 40, 40, PointRule(threshold=0.4, most=3, negatives=False))
    assert points.tolist() == [[15, 10], [25, 10], [5, 30]] and labels.tolist() == [1, 1, 1]  # 4 would reach it, too
    points, labels = points_from_map(response_map, 40, 40, PointRule(threshold=0.4))
    assert points[:4].tolist() == [[15, 10], [25, 10], [5, 30], [35, 30]] and labels.tolist() == [1] * 4 + [0] * 4


def test_a_flat_map_still_gives_points():
    points, labels = points_from_map(np.full((4, 4), 7, np.float32), 16, 16)
    assert labels.tolist() == [1, 0]
    assert points.tolist()[0] != points.tolist()[1]


def test_a_single_cell_is_positive():
    points, labels = points_from_map(np.ones((1, 1), np.float32), 30, 10)
    assert points.tolist() == [[15, 5]] and labels.tolist() == [1]


def test_peaks_by_hand():
    response_map = np.array([[0.0, 10, 8, 1, 2], [7, 2, 3, 4, 2], [3, 3, 3, 3, 9]], np.float32)
    first, second = peaks_of_map(response_map, width=50, height=30, rule=PointRule(most=3))
    # 10 is a peak, and of its neighbours 8 reaches 0.8 of it; 9 is one, too, and 8 of 10 is not its neighbour.
    assert first[0].tolist() == [[15, 5], [25, 5], [5, 5], [35, 5], [45, 5]] and first[1].tolist() == [1, 1, 0, 0, 0]
    assert second[0].tolist() == [[45, 25], [5, 5], [35, 5], [45, 5]] and second[1].tolist() == [1, 0, 0, 0]
    (only,) = peaks_of_map(response_map, 50, 30, PointRule(threshold=0.95, negatives=False))
    assert only[0].tolist() == [[15, 5]] and only[1].tolist() == [1]
    assert peaks_of_map(np.full((3, 3), 5, np.float32), 9, 9) == []


maps = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-5, 5, width=16))


rules = st.builds(PointRule, st.floats(0, 1), st.integers(1, 20), st.booleans())


@given(maps, st.integers(1, 500), st.integers(1, 500), rules)
def test_points_invariants(response_map, width, height, rule):
    points, labels = points_from_map(response_map, width, height, rule)
    positive = int(labels.sum())
    assert 1 <= positive <= rule.most and labels[:positive].all()
    assert len(labels) - positive == (min(positive, response_map.size - 1) if rule.negatives else 0)
    assert positive <= max(1, response_map.size // 2)
    assert (points > 0).all() and (points[:, 0] < width).all() and (points[:, 1] < height).all()
    rows, columns = response_map.shape
    cells = {(min(int(y * rows / height), rows - 1), min(int(x * columns / width), columns - 1)) for x, y in points}
    assert len(cells) == len(points)  # no cell is asked for twice, none is both
    values = scale(response_map).ravel()
    assert values.max() == pytest.approx(values[points_cell(points[0], response_map, width, height)])


@given(maps, st.integers(1, 500), st.integers(1, 500), rules)
def test_peaks_invariants(response_map, width, height, rule):
    scaled, highest = scale(response_map), []
    for points, labels in peaks_of_map(response_map, width, height, rule):
        cells = [points_cell(point, response_map, width, height) for point in points]
        assert len(set(cells)) == len(cells)  # no cell is asked for twice, none is both
        positive = int(labels.sum())
        assert 1 <= positive <= 9 and labels[:positive].all() and (positive == len(labels) or rule.negatives)
        values = scaled.ravel()[cells[:positive]]
        assert values.max() >= rule.threshold - 1e-6 and values.min() >= rule.threshold * values.max() - 1e-6
        highest.append(values.max())
    assert highest == sorted(highest, reverse=True)
    assert not highest or highest[0] == scaled.max()


def points_cell(point, response_map, width, height) -> int:
    rows, columns = response_map.shape
    return int(point[1] * rows / height) * columns + int(point[0] * columns / width)


@given(maps)
def test_scaling_is_monotone_and_fills_the_range(response_map):
    scaled = scale(response_map)
    assert scaled.min() == 0
    assert scaled.max() == (1 if response_map.max() > response_map.min() else 0)
    order = np.argsort(response_map, axis=None, kind="stable")
    assert (np.diff(scaled.ravel()[order]) >= 0).all()


def test_enlarging_keeps_the_place():
    response_map = np.zeros((4, 4), np.float32)
    response_map[1, 2] = 5
    large = enlarge(response_map, width=80, height=40)
    assert large.shape == (40, 80)
    assert np.unravel_index(large.argmax(), large.shape)[0] in range(10, 20)
    assert large[:, :30].max() == 0
