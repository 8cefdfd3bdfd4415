"""A method and a split made for tests: no models, small pictures, and everything about them is known."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from wris_lib import benchmark, contestants, data, methods
from wris_lib.backbones.checkpoints import get_stack
from wris_lib.data.refer import EvaluationItem
from wris_lib.methods import Listed, Method, Prediction

IMAGES = 8  # of fake:val
KINDS = ("noun", "attribute", "position")


class Fake(Method):
    """Predicts the picture's left half for "bad" and the bright square for anything else."""

    pause = 0.0
    fail_at = None  # raise this exception ...
    fail_on_image = 0  # ... at this call
    calls = 0

    variants = {"bright": {}, "wide": {"wide": True}}
    parts = ("clip", "parser")

    def __init__(self, wide):
        self.wide = wide

    @classmethod
    def load(cls, stack, wide=False):
        return cls(wide)

    def predict(self, image, expressions):
        Fake.calls += 1
        if Fake.fail_at is not None and Fake.calls == Fake.fail_on_image:
            raise Fake.fail_at
        time.sleep(Fake.pause)
        grey = np.asarray(image.convert("L"))
        bright, left = grey > 128, np.arange(image.width)[None] < image.width / 2
        answers = []
        for expression in expressions:
            mask = np.broadcast_to(left, grey.shape).copy() if "bad" in expression or self.wide else bright
            points = np.array([[1.0, 1.0]], np.float32)
            answers.append(Prediction(mask, bright.astype(np.float32), points, np.array([1]), 1.0))
        return answers


def make_split(folder: Path, images: int = 8) -> None:
    """Pictures of one bright square on black, saved without loss."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(images):
        pixels = np.zeros((24, 32, 3), np.uint8)
        pixels[4:12, index : index + 10] = 255
        Image.fromarray(pixels).save(folder / f"{index}.png")


def read_split(folder: Path) -> SimpleNamespace:
    """Three expressions a picture, about its square. The other object, in every second picture of the same category,
    lies at the bottom."""
    items = []
    for path in sorted(folder.glob("*.png")):
        index = int(path.stem)
        square = [index, 4, index + 10, 4, index + 10, 12, index, 12]
        about = {
            "image_path": path,
            "image_id": index,
            "category": "square",
            "height": 24,
            "width": 32,
            "annotation": {"id": index, "category_id": 1, "bbox": [index, 4, 10, 8], "segmentation": [square]},
            "neighbours": [
                {
                    "id": 99,
                    "category_id": 1 if index % 2 else 2,
                    "bbox": [0, 16, 32, 8],
                    "segmentation": [[0, 16, 32, 16, 32, 24, 0, 24]],
                }
            ],
        }
        for number, text in enumerate(("the square", "bad square", "the square on the left")):
            sent_id = 3 * index + number
            items.append(EvaluationItem(ref_id=index, expression=text, sent_id=sent_id, kind=KINDS[number], **about))
    return SimpleNamespace(items=items)


def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two fake splits and files for weights, which the benchmark finds; the cache is a fresh one."""
    folder = tmp_path / "split"
    make_split(folder / "fake_val", IMAGES)
    make_split(folder / "fake_testA", 2)
    for checkpoint in get_stack("toy").checkpoints:
        (folder / checkpoint.file).write_bytes(b"one")
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    install(folder, monkeypatch.setattr)
    for name, value in (("calls", 0), ("pause", 0.0), ("fail_at", None)):
        monkeypatch.setattr(Fake, name, value)
    return folder


def install(split: Path, patch) -> None:
    """Let the benchmark find the fakes; `patch` is setattr, or pytest's monkeypatch.setattr."""
    patch(data, "load", lambda spec: read_split(split / spec.replace(":", "_")), raising=False)
    for module in (benchmark, contestants):
        patch(module, "checkpoint_path", lambda checkpoint: split / checkpoint.file)
    patch(methods, "METHODS", {"fake": Listed("tests.fake_benchmark:Fake")})
    patch(contestants, "METHODS", methods.METHODS)
    methods._load.cache_clear()


def run_slowly(split: Path, folder: Path, pause: float) -> int:
    """The benchmark of one more process, slow enough to be killed or helped; how often this one has predicted."""
    install(split, lambda module, name, value, raising=True: setattr(module, name, value))
    Fake.pause = pause
    benchmark.run(["fake"], ["fake:val", "fake:testA"], "out", folder=folder)
    return Fake.calls
