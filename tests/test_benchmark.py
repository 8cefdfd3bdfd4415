"""The benchmark, with a method and a split whose figures are known: what it measures, and that nothing gets lost."""

import errno
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import fake_benchmark, processes
from tests.fake_benchmark import IMAGES, Fake
from wris_lib import benchmark, contestants, questions, report
from wris_lib.contestants import predictor
from wris_lib.errors import WrisError
from wris_lib.files import sha256
from wris_lib.sources import PACKAGE


@pytest.fixture
def split(tmp_path, monkeypatch) -> Path:
    return fake_benchmark.prepare(tmp_path, monkeypatch)


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "benchmark").glob("fake_bright-*.jsonl")
    return path


def means(row: dict) -> dict[str, float]:
    return {name: figure["mean"] for name, figure in row["metrics"].items()}


def test_figures_by_hand(split, tmp_path):
    results = benchmark.run(["fake"], ["fake:val", "fake:testA"], "out", folder=tmp_path)
    names = [(row["name"], row["data"], row["n"], row["images"]) for row in results["rows"]]
    assert names == [
        ("fake bright", "fake:val", 24, 8),
        ("fake bright", "fake:testA", 6, 2),
        ("fake wide", "fake:val", 24, 8),
        ("fake wide", "fake:testA", 6, 2),
    ]
    row = results["rows"][1]
    # Two thirds are exact. "bad" predicts 16×24 pixels, in which the square's 80 lie and 128 of the neighbour's.
    figures = means(row)
    assert figures["mIoU"] == pytest.approx(100 * (2 + 80 / 384) / 3, abs=0.01)
    assert figures["oIoU"] == pytest.approx(100 * 240 / (160 + 384), abs=0.01)
    assert figures["P@0.9"] == figures["right"] == pytest.approx(66.67)
    assert figures["PointM"] == 100
    assert figures["leak"] == pytest.approx(33.33)  # background has more of it than the neighbour
    assert {name: group["n"] for name, group in row["kinds"].items()} == {
        "noun": 2,
        "attribute": 2,
        "position": 2,
        "Position": 2,
        "Others": 4,
        "same-category distractor": 3,
    }
    assert means(row["kinds"]["noun"])["mIoU"] == 100
    assert means(row["kinds"]["attribute"])["P@0.3"] == 0
    # Images of one kind: no luck involved.
    assert row["metrics"]["mIoU"]["std"] == 0


def test_the_file_has_the_promised_form(split, tmp_path):
    returned = benchmark.run(["fake bright"], ["fake:val"], "out", limit=5, seed=3, folder=tmp_path)
    results = json.loads((tmp_path / "out.json").read_text())
    assert results == returned
    assert set(results) == {"made", "rows"}
    made = results["made"]
    assert set(made) == {"command", "date", "device", "seeds", "versions"}
    assert made["seeds"] == [3]
    assert made["versions"] == benchmark.versions() and made["device"] == benchmark.device_name()
    assert made["command"] == (
        "python -m wris_lib benchmark --method 'fake bright' --data fake:val --name out --stack toy --seed 3 --limit 5"
    )
    assert {"python", "torch", "open_clip_torch", "segment-anything"} <= set(made["versions"])
    (row,) = results["rows"]
    assert set(row) == {"name", "data", "n", "images", "metrics", "kinds"}
    assert set(row["metrics"]["mIoU"]) == {"mean", "std", "low", "high"}


def test_an_image_is_encoded_once_for_all_its_expressions(split, tmp_path):
    benchmark.run(["fake bright"], ["fake:val"], "out", folder=tmp_path)
    assert Fake.calls == IMAGES


def test_a_second_run_costs_nothing_and_says_the_same(split, tmp_path):
    first = benchmark.run(["fake bright"], ["fake:val"], "out", folder=tmp_path)
    second = benchmark.run(["fake bright"], ["fake:val"], "out", folder=tmp_path)
    assert Fake.calls == IMAGES
    assert first["rows"] == second["rows"]


def test_limit_takes_whole_images_and_is_a_head_start(split, tmp_path):
    some = benchmark.records("fake bright", "fake:val", limit=7)
    assert len(some) == 9 and Fake.calls == 3
    assert [record["item"] for record in some] == sorted(record["item"] for record in some)
    assert some == benchmark.records("fake bright", "fake:val", limit=7)
    assert some != benchmark.records("fake bright", "fake:val", limit=7, seed=1)
    calls = Fake.calls
    every = benchmark.records("fake bright", "fake:val")
    assert len(every) == 24 and Fake.calls == IMAGES and calls < IMAGES
    assert all(record in every for record in some)
    assert every == benchmark.records("fake bright", "fake:val", limit=1000)


def test_records_lead_back_to_the_split(split):
    record = benchmark.records("fake bright", "fake:val")[4]
    assert record["item"] == 4
    assert record["expression"] == "bad square"
    assert record["kind"] == "attribute"
    assert record["outcome"] == "leak"
    assert record["twins"] == 1


@pytest.mark.parametrize("change", ["clip.safetensors", "parser.msgpack", "picture", "outline", "expression", "code"])
def test_records_do_not_outlive_what_made_them(split, monkeypatch, tmp_path, change):
    benchmark.records("fake bright", "fake:val")
    if (split / change).exists():  # weights
        (split / change).write_bytes(b"two")
    elif change == "picture":
        Image.new("RGB", (32, 24), "white").save(split / "fake_val" / "0.png")
    elif change == "code":
        code = tmp_path / "code" / "fake_benchmark.py"
        code.parent.mkdir()
        code.write_text("changed = True\n")
        monkeypatch.setattr(benchmark.inspect, "getfile", lambda cls: str(code))
    else:
        items = fake_benchmark.read_split(split / "fake_val").items
        if change == "outline":
            items[3].annotation["segmentation"][0][0] += 1
        else:
            object.__setattr__(items[3], "expression", "other words")
        monkeypatch.setattr(benchmark.data, "load", lambda spec: type("Split", (), {"items": items}))
    benchmark.records("fake bright", "fake:val")
    assert Fake.calls == 2 * IMAGES


@pytest.mark.parametrize(
    "name, matters",
    [
        ("methods/pcnet/prompt.txt", True),
        ("methods/ppt/vision.py", True),  # which PCNet's own `vision` imports
        ("backbones/configs/wris-toy.json", True),
        ("data/toyworld/grammar.py", True),  # the language model's words
        ("weights/clip_bpe.txt.gz", True),
        ("benchmark.py", True),
        ("methods/ppt/training.py", False),
        ("methods/iterprime/igrs.py", False),
        ("backbones/itm.py", False),
        ("page.py", False),
    ],
)
def test_files_that_pcnet_s_records_depend_on(monkeypatch, name, matters):
    row = contestants.contestants("pcnet sam")[0]
    before = benchmark._key(row, "toy", [])
    monkeypatch.setattr(benchmark, "sha256", lambda path: "changed" if path == PACKAGE / name else sha256(path))
    assert (PACKAGE / name).exists()
    assert (benchmark._key(row, "toy", []) != before) is matters


def test_weights_that_a_row_does_not_use_are_not_its_business(split):
    before = benchmark.records("fake bright", "fake:val")
    for name in ("sam.safetensors", "ppt.safetensors"):
        (split / name).write_bytes(b"two")
    assert benchmark.records("fake bright", "fake:val") == before
    assert Fake.calls == IMAGES


def test_what_is_no_row_is_measured_alike_and_not_kept(split, tmp_path):
    items, predict = fake_benchmark.read_split(split / "fake_val").items, predictor(Fake(wide=False))
    every, some = questions.measure(predict, items), questions.measure(predict, items, limit=7, seed=1)
    assert Fake.calls == IMAGES + 3
    assert list((tmp_path / "cache").rglob("*.jsonl")) == []
    assert every == benchmark.records("fake bright", "fake:val")
    assert sorted(some, key=lambda record: record["item"]) == benchmark.records("fake bright", "fake:val", 7, 1)


def test_a_method_without_variants_is_a_row_of_its_own_name(split, monkeypatch):
    monkeypatch.setattr(Fake, "variants", {"": {}})
    (row,) = contestants.contestants("fake")
    assert (row.name, row.method, row.options) == ("fake", "fake", {})
    assert {record["kind"] for record in benchmark.records("fake", "fake:testA")} == set(fake_benchmark.KINDS)


def test_killed_and_resumed_equals_uninterrupted(split, tmp_path, monkeypatch):
    results = tmp_path / "results"
    process = processes.start(tmp_path / "log.txt", fake_benchmark.run_slowly, split, results, 0.5)
    folder = tmp_path / "cache" / "benchmark"
    deadline = time.monotonic() + processes.PATIENCE
    while sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl")) < 3:
        assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not (results / "out.json").exists()
    kept = cache_file(tmp_path).read_bytes().count(b"\n")
    assert 3 <= kept < 3 * IMAGES

    resumed = benchmark.run(["fake"], ["fake:val"], "out", folder=results)
    assert Fake.calls == 2 * IMAGES - kept // 3  # the second split and row had not begun
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "another cache"))
    whole = benchmark.run(["fake"], ["fake:val"], "whole", folder=results)
    assert resumed["rows"] == whole["rows"]


@pytest.mark.parametrize("torn", [b'{"item": 5, "iou"', b"{", b'{"item": 5}'])
def test_a_torn_last_line_is_dropped(split, tmp_path, torn):
    whole = benchmark.records("fake bright", "fake:val")
    path = cache_file(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + torn)  # in the middle of the second image
    assert benchmark.records("fake bright", "fake:val") == whole
    assert Fake.calls == IMAGES + IMAGES - 1
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    assert benchmark.records("fake bright", "fake:val") == whole


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_whatever_stops_a_run_keeps_its_records(split, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(Fake, "fail_at", stop)
    monkeypatch.setattr(Fake, "fail_on_image", 4)
    with pytest.raises(type(stop)):
        benchmark.run(["fake bright"], ["fake:val"], "out", folder=tmp_path)
    assert not (tmp_path / "out.json").exists()
    assert cache_file(tmp_path).read_bytes().count(b"\n") == 9
    monkeypatch.setattr(Fake, "fail_at", None)
    assert benchmark.run(["fake bright"], ["fake:val"], "out", folder=tmp_path)["rows"][0]["n"] == 24


def test_a_full_disk_gets_a_sentence_and_loses_nothing(split, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WrisError, match="the disk is full"):
        patch.setattr(benchmark.os, "fsync", full)
        benchmark.records("fake bright", "fake:val")
    assert len(benchmark.records("fake bright", "fake:val")) == 24


def test_two_runs_at_once_share_the_work(split):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(benchmark.records("fake bright", "fake:val"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert Fake.calls == IMAGES


def test_rows_of_other_runs_stay(split, tmp_path, monkeypatch):
    benchmark.run(["fake"], ["fake:val"], "out", folder=tmp_path)
    monkeypatch.setattr(benchmark, "device_name", lambda: "another machine")
    results = benchmark.run(["fake bright"], ["fake:val", "fake:testA"], "out", limit=3, folder=tmp_path)
    assert [(row["name"], row["data"], row["n"]) for row in results["rows"]] == [
        ("fake bright", "fake:val", 3),  # replaced, in its place
        ("fake wide", "fake:val", 24),
        ("fake bright", "fake:testA", 3),
    ]
    # What an earlier command made says so.
    assert [row.get("made", {}).get("device") for row in results["rows"]] == [None, "cpu", None]
    again = benchmark.run(["fake bright"], ["fake:testA"], "out", limit=3, folder=tmp_path)
    assert [row.get("made", {}).get("device") for row in again["rows"]] == ["another machine", "cpu", None]


def test_the_oracle_gets_the_true_box(split, monkeypatch):
    asked = []

    class FakeSam:
        def embed(self, image):
            return image

        def decode(self, image, boxes, multimask):
            asked.extend(boxes.tolist())
            return boxes

        def best_mask(self, image, boxes):
            masks = np.zeros((len(boxes), 24, 32), bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            return masks

    monkeypatch.setattr(contestants, "load_sam", lambda stack: FakeSam())
    found = benchmark.records("sam box", "fake:val")
    assert asked[3] == [1, 4, 11, 12]
    assert {record["iou"] for record in found} == {1}
    assert {record["hit"] for record in found} == {None}
    for name, times in (("clip.safetensors", 1), ("sam.safetensors", 2)):  # other weights of SAM make other records
        (split / name).write_bytes(b"two")
        benchmark.records("sam box", "fake:val")
        assert len(asked) == times * len(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["clipsam"]}, "no method 'clipsam'; choose from: fake"),
        ({"methods": ["fake dark"]}, "no method 'fake dark'; choose from: fake, fake bright, fake wide, sam box"),
        ({"methods": [""]}, "no method ''"),
        ({"name": "../out"}, "cannot name a result"),
        ({"name": ""}, "cannot name a result"),
        ({"limit": 0}, "the limit is 0"),
        ({"limit": -3}, "the limit is -3"),
        ({"stack": "big"}, "no stack 'big'"),
    ],
)
def test_what_cannot_be_run_gets_a_sentence(split, tmp_path, arguments, message):
    usual = {"methods": ["fake"], "data_specs": ["fake:val"], "name": "out", "folder": tmp_path}
    with pytest.raises(WrisError, match=message):
        benchmark.run(**usual | arguments)
    assert Fake.calls == 0


def test_records_are_of_one_row(split):
    with pytest.raises(WrisError, match="several variants; choose one of: fake bright, fake wide"):
        benchmark.records("fake", "fake:val")


def test_pictures_of_another_size_are_refused(split):
    Image.new("RGB", (40, 24)).save(split / "fake_val" / "0.png")
    with pytest.raises(WrisError, match="40×24 pixels, but its masks have 32×24"):
        benchmark.records("fake bright", "fake:val")


def test_table_and_picture_come_from_the_json_alone(split, tmp_path):
    benchmark.run(["fake"], ["fake:val", "fake:testA"], "out", folder=tmp_path)
    results = report.read(tmp_path / "out.json")
    table = (tmp_path / "out.md").read_text().splitlines()
    assert table == report.table(results).splitlines()
    assert table[0].startswith("| method") and "mIoU" in table[0]
    assert len({len(line) for line in table}) == 1  # columns line up
    cells = [cell.strip() for cell in table[3].split("|")]
    assert cells[1:5] == ["fake bright", "fake:testA", "6", "73.6 ± 0.0"]
    picture = tmp_path / "out.png"
    assert picture.stat().st_size < 150_000
    assert Image.open(picture).width >= 800


def test_a_method_without_a_map_has_a_gap_in_the_table():
    row = {"name": "sam box", "data": "d", "n": 1, "metrics": {"mIoU": {"mean": 90.0, "std": 1.0}}}
    assert (
        report.table({"rows": [row]}, columns=("mIoU", "PointM")).splitlines()[2]
        == "| sam box | d    | 1 | 90.0 ± 1.0 |      – |"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": []}'])
def test_a_damaged_result_is_neither_read_nor_overwritten(split, tmp_path, content):
    path = tmp_path / "out.json"
    path.write_text(content)
    with pytest.raises(WrisError, match=r"out\.json is"):
        benchmark.run(["fake bright"], ["fake:val"], "out", folder=tmp_path)
    assert path.read_text() == content


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(WrisError, match="no result .*none.json; make it with"):
        report.read(tmp_path / "none.json")
