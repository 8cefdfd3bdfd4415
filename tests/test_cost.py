"""What an answer costs, asked of a method whose cost is known."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch import nn

from tests import fake_benchmark
from tests.fake_benchmark import Fake
from wris_lib import contestants, cost, methods
from wris_lib.contestants import Contestant
from wris_lib.files import cache_dir
from wris_lib.methods import Listed

BRIGHT = Contestant("fake bright", "fake")


@pytest.fixture
def items(tmp_path, monkeypatch):
    """Of a fake split, one for each of eight images."""
    folder = fake_benchmark.prepare(tmp_path, monkeypatch)
    monkeypatch.setattr(Fake, "pause", 0.02)
    return fake_benchmark.read_split(folder / "fake_val").items


@pytest.fixture
def pairs(items):
    """Of each image the first expression and the last."""
    return list(zip(items[::3], items[2::3], strict=True))


def test_warm_milliseconds_an_expression(pairs):
    found = cost.ask(BRIGHT, pairs, "toy")
    assert Fake.calls == 16 and found["images"] == 5
    low, high = found["quartiles"]
    assert 20 <= low <= found["milliseconds"] <= high
    assert found["parameters"] == 0 and found["supervision"] == "none" and found["threads"] >= 1


@pytest.mark.parametrize("images", [1, 3, 4])
def test_of_few_images_the_last_is_timed(pairs, images):
    found = cost.ask(BRIGHT, pairs[:images], "toy")
    assert found["images"] == 1 and found["milliseconds"] >= 20


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time stands still but for what is added to `now`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_second_question_about_an_image_is_timed_apart(pairs, clock, monkeypatch):
    predict, seen = Fake.predict, set()

    def slow_with_new_images(self, image, expressions):
        clock.now += 0.25 if image.tobytes() in seen else 2
        seen.add(image.tobytes())
        return predict(self, image, expressions)

    monkeypatch.setattr(Fake, "predict", slow_with_new_images)
    found = cost.ask(BRIGHT, pairs, "toy")
    assert (found["milliseconds"], found["again"], found["quartiles"]) == (2000, 250, [2000, 2000])


def test_the_first_images_only_warm_up(pairs, clock, monkeypatch):
    predict = Fake.predict

    def slow_at_first(self, image, expressions):
        clock.now += 8 if Fake.calls < 2 * cost.WARM_UP else 0.5
        return predict(self, image, expressions)

    monkeypatch.setattr(Fake, "predict", slow_at_first)
    found = cost.ask(BRIGHT, pairs, "toy")
    assert (found["milliseconds"], found["again"], found["quartiles"]) == (500, 500, [500, 500])


def test_nothing_comes_from_the_cache(pairs, monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(Fake, "predict", lambda self, *_: kept.append(os.listdir(os.environ["WRIS_CACHE"])) or [])
    (tmp_path / "cache" / "proposals").mkdir(parents=True)
    cost.ask(BRIGHT, pairs, "toy")
    assert kept == [[]] * 16
    assert (tmp_path / "cache" / "proposals").exists() and not Path(os.environ["WRIS_CACHE"]).exists()


def test_the_empty_cache_is_gone_afterwards(pairs, monkeypatch):
    monkeypatch.setattr(cost, "_parameters", lambda *_: len(str(cache_dir())))  # as finding a stack's weights does
    cost.ask(BRIGHT, pairs, "toy")
    assert not Path(os.environ["WRIS_CACHE"]).exists()


def test_trained_parameters_by_hand(pairs, monkeypatch):
    monkeypatch.setattr(Fake, "head", nn.Linear(3, 2), raising=False)
    listed = {"fake": Listed("tests.fake_benchmark:Fake", "pairs", "head")}
    for module in (methods, contestants):
        monkeypatch.setattr(module, "METHODS", listed)
    found = cost.ask(BRIGHT, pairs, "toy")
    assert (found["parameters"], found["supervision"]) == (8, "pairs")


def test_peak_memory_is_at_least_what_is_used():
    held = bytearray(50_000_000)
    used = psutil.Process().memory_info().rss
    assert len(held) < used <= cost.peak_memory() < 100 * used


def test_each_row_in_a_process_of_its_own(items, monkeypatch):
    monkeypatch.setattr(cost, "IMAGES", 2)
    found = cost.measure([Contestant("sam box")], "fake:val", items * 2, 0, "toy")
    assert list(found) == ["sam box"]
    about = found["sam box"]
    assert about["data"] == "fake:val" and about["images"] == 2 and about["milliseconds"] > 0
    assert about["supervision"] == "the referent's true box" and about["megabytes"] > 100


def test_every_row_is_asked_the_same(items, monkeypatch):
    asked = []

    class Here:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def submit(self, ask, row, chosen, stack):
            asked.append((row.name, [[item.image_path.name, item.expression] for pair in chosen for item in pair]))
            return type("Done", (), {"result": lambda _: {}})()

    monkeypatch.setattr(cost, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(cost, "IMAGES", 2)
    cost.measure([BRIGHT, Contestant("sam box")], "fake:val", items, 0, "toy")
    (first, told), (second, same) = asked
    assert (first, second) == ("fake bright", "sam box") and told == same
    images, expressions = zip(*told, strict=True)
    assert images[::2] == images[1::2] and len(set(images)) == 5
    assert set(expressions[::2]) == {"the square"} and set(expressions[1::2]) == {"the square on the left"}
