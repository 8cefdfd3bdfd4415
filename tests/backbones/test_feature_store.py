"""Stores of features: whole after kills, never out of date, never over the limit. The rows are numbers, to be quick."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from wris_lib.backbones import feature_store
from wris_lib.backbones.feature_store import Encoder, JoinedStores, Rows, open_features
from wris_lib.errors import WrisError

FORK = multiprocessing.get_context("fork")
ROWS = 10
ROW_BYTES = 4 * 6 * 2 + 8  # of `plain`


def ragged(numbers):
    x = torch.tensor(numbers, dtype=torch.float32)
    return {
        "map": x[:, None, None] / 4 + torch.arange(6.0).reshape(2, 3),
        "steps": [torch.full((n % 4, 2), n / 8) for n in numbers],
        "number": torch.tensor(numbers),
    }


def plain(numbers):
    return {"map": torch.tensor(numbers).float()[:, None, None].expand(-1, 4, 6), "number": torch.tensor(numbers)}


ENCODER = Encoder("numbers", ragged, {"size": 1}, {"weights": "a"}, batch=4)
PLAIN = replace(ENCODER, name="plain", encode=plain)


def rows(count=ROWS, seen=None, name="row"):
    """Rows that are their own numbers, and note in `seen` which of them were asked for."""

    def load(row):
        if seen is not None:
            seen.append(row)
        return row

    return Rows([f"{name} {row}" for row in range(count)], load)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def stores(cache):
    return {path.name for path in cache.iterdir() if path.is_dir()}


# -------------------------------------------------------------------------------------------------- what is read


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_features(ENCODER, rows())


@given(st.lists(st.integers(0, ROWS - 1), max_size=12))
def test_any_rows_in_any_order(store, chosen):
    found = store[chosen]
    assert list(found) == ["map", "steps", "steps mask", "number"]
    assert found["map"].dtype == torch.float16 and found["map"].shape == (len(chosen), 2, 3)
    assert found["number"].tolist() == chosen
    longest = max((n % 4 for n in chosen), default=0)
    assert found["steps"].shape == (len(chosen), longest, 2) and found["steps mask"].shape == (len(chosen), longest)
    for i, n in enumerate(chosen):
        assert found["map"][i].flatten().tolist() == [n / 4 + k for k in range(6)]
        assert found["steps mask"][i].tolist() == [True] * (n % 4) + [False] * (longest - n % 4)
        assert found["steps"][i, :, 0].tolist() == [n / 8] * (n % 4) + [0.0] * (longest - n % 4)


def test_rows_may_be_an_array_or_a_tensor_and_what_is_read_may_be_changed(store):
    for chosen in (np.array([7, 2]), torch.tensor([7, 2])):
        found = store[chosen]
        assert found["number"].tolist() == [7, 2]
        found["map"].zero_()
    assert store[[7]]["map"].any()
    with pytest.raises(IndexError):
        store[[ROWS]]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Three stores one behind the other; row n of the whole has the number n."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        starts, counts = (0, 3, 4), (3, 1, 5)
        parts = [
            open_features(PLAIN, Rows([f"{start} {row}" for row in range(count)], lambda row, start=start: start + row))
            for start, count in zip(starts, counts, strict=True)
        ]
        assert [len(part) for part in parts] == list(counts)
        return JoinedStores(parts)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_joined_stores_are_read_as_one(joined, chosen):
    assert len(joined) == 9
    for rows in (chosen, np.array(chosen), torch.tensor(chosen)):
        found = joined[rows]
        assert list(found) == ["map", "number"]
        assert found["number"].tolist() == chosen
        assert found["map"].dtype == torch.float16 and found["map"].shape == (len(chosen), 4, 6)
        assert found["map"][:, 0, 0].tolist() == found["map"][:, 3, 5].tolist() == chosen


@pytest.mark.parametrize("row", [9, -1])
def test_joined_stores_have_no_row_beyond_their_ends(joined, row):
    with pytest.raises(IndexError):
        joined[[row]]


def test_the_number_of_rows(store):
    assert len(store) == ROWS


def test_a_finished_store_is_only_read(cache):
    open_features(ENCODER, rows())
    before, seen = content(next(cache.glob("numbers-*"))), []
    again = open_features(ENCODER, rows(seen=seen))
    assert seen == [] and content(again.folder) == before
    assert again[range(ROWS)]["number"].tolist() == list(range(ROWS))


@pytest.mark.parametrize(
    "other",
    [
        (replace(ENCODER, settings={"size": 2}), rows()),
        (replace(ENCODER, origin={"weights": "b"}), rows()),
        (replace(ENCODER, name="others"), rows()),
        (ENCODER, rows(name="other row")),
        (ENCODER, rows(ROWS - 1)),
        (ENCODER, Rows(rows().keys[::-1], rows().load)),
    ],
    ids=["settings", "weights or code", "encoder", "keys", "count", "order"],
)
def test_whatever_the_numbers_depend_on_makes_another_store(cache, other):
    first = open_features(ENCODER, rows()).folder
    assert open_features(*other).folder != first
    assert len(stores(cache)) == 2  # the old one is still there


def test_a_ragged_array_without_anything_in_any_row(cache):
    found = open_features(ENCODER, rows(1))[[0, 0]]
    assert found["steps"].shape == (2, 0, 2) and found["steps mask"].shape == (2, 0)
    assert found["map"].shape == (2, 2, 3)


def test_nothing_to_encode(cache):
    with pytest.raises(WrisError, match="nothing to encode"):
        open_features(ENCODER, rows(0))


@pytest.mark.parametrize("value", [float("nan"), 70_000.0])
def test_features_that_are_no_float16(cache, value):
    broken = replace(PLAIN, encode=lambda numbers: {"map": torch.full((len(numbers), 2), value)})
    with pytest.raises(WrisError, match="'map' are not finite, or beyond 65504"):
        open_features(broken, rows())


# ------------------------------------------------------------------------------------------- kills and other harm


def killed_at(step):
    """In another process: start the store, and die by SIGKILL at fsync number `step`, with bytes missing."""

    def run():
        count, fsync = 0, os.fsync

        def lethal(handle):
            nonlocal count
            count += 1
            if count == step:
                os.ftruncate(handle, os.fstat(handle).st_size - 3)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        os.fsync = lethal
        open_features(ENCODER, rows())

    process = FORK.Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_killed_anywhere_it_resumes_to_the_same_bytes(cache):
    whole = open_features(ENCODER, rows())[range(ROWS)]
    folder = next(cache.glob("numbers-*"))
    expected, about = content(folder), json.loads((folder / "store.json").read_text())
    assert len(expected) == 4
    for step in range(1, 16):  # three batches, each of four arrays and store.json
        shutil.rmtree(cache)
        assert killed_at(step) == -signal.SIGKILL
        finished = (step - 1) // 5
        seen = []
        resumed = open_features(ENCODER, rows(seen=seen))
        assert seen == list(range(4 * finished, ROWS))  # no batch is lost but the one that the kill hit
        assert content(folder) == expected
        assert json.loads((folder / "store.json").read_text()) == about
        for name, values in resumed[range(ROWS)].items():
            assert torch.equal(values, whole[name])
    shutil.rmtree(cache)
    assert killed_at(16) == 0  # there is no further step


def test_an_error_in_the_middle_keeps_what_is_finished(cache):
    def load(row):
        if row == 6:
            raise WrisError("picture 6 is damaged.")
        return row

    with pytest.raises(WrisError, match="picture 6 is damaged"):
        open_features(ENCODER, replace(rows(), load=load))
    seen = []
    open_features(ENCODER, rows(seen=seen))
    assert seen == list(range(4, ROWS))


@pytest.mark.parametrize("harm", ["cut", "gone", "json gone", "json cut"])
def test_a_damaged_store_is_made_again(cache, harm):
    folder = open_features(ENCODER, rows()).folder
    expected = content(folder)
    match harm:
        case "cut":
            os.truncate(folder / "map.bin", 5)
        case "gone":
            (folder / "steps.bin").unlink()
        case "json gone":
            (folder / "store.json").unlink()
        case "json cut":
            os.truncate(folder / "store.json", 20)
    open_features(ENCODER, rows())
    assert content(folder) == expected


def test_a_second_process_waits_for_the_first(cache):
    begun = FORK.Event()

    def load(row):
        begun.set()
        time.sleep(0.05)
        return row

    first = FORK.Process(target=lambda: open_features(ENCODER, replace(rows(), load=load)))
    first.start()
    assert begun.wait(60)
    seen = []
    assert open_features(ENCODER, rows(seen=seen))[[9]]["number"].tolist() == [9]
    first.join()
    assert seen == [] and first.exitcode == 0


def test_a_disk_that_fills_up_keeps_what_is_finished(cache):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = replace(PLAIN, encode=lambda numbers: plain(numbers) | {"big": torch.zeros(len(numbers), 500)})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))  # two batches of 4 kB fit
        with pytest.raises(WrisError, match="cannot write to .*features.*; make room there"):
            open_features(big, rows())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    seen = []
    found = open_features(big, rows(seen=seen))[range(ROWS)]
    assert seen == [8, 9]
    assert found["number"].tolist() == list(range(ROWS)) and found["big"].shape == (ROWS, 500)


@contextlib.contextmanager
def read_only(folder):
    """This user may not write there; root must stop being root for it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_read_only_cache_serves_what_is_finished(monkeypatch):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # not in tmp_path, which only its owner can enter
    monkeypatch.setenv("WRIS_CACHE", str(folder))
    try:
        open_features(ENCODER, rows())
        with read_only(folder):
            assert open_features(ENCODER, rows())[[3, 1]]["number"].tolist() == [3, 1]
            with pytest.raises(WrisError, match=f"cannot write to {folder}.*may not write there.*WRIS_CACHE"):
                open_features(PLAIN, rows())
    finally:
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------ the limit


def allow(monkeypatch, rows):
    """A limit that so many rows of `PLAIN` fit under."""
    monkeypatch.setenv("WRIS_CACHE_GB", str((rows * ROW_BYTES + 1) / 1e9))


def made(name, used, encoder=PLAIN, count=ROWS):
    """The folder of a finished store that was last used at the time `used`."""
    folder = open_features(encoder, rows(count, name=name)).folder
    os.utime(folder / "store.json", (used, used))
    return folder


def test_the_least_recently_used_make_room(cache, monkeypatch):
    old, older, oldest = made("a", 300), made("b", 200), made("c", 100)
    assert sum(path.stat().st_size for path in old.glob("*.bin")) == ROWS * ROW_BYTES
    allow(monkeypatch, 30)
    open_features(PLAIN, rows(name="c"))  # used again
    new = open_features(PLAIN, rows(name="d")).folder
    assert stores(cache) == {oldest.name, old.name, new.name}
    new = open_features(PLAIN, rows(25, name="e")).folder
    assert stores(cache) == {new.name}
    assert not older.exists()


def test_what_other_weights_or_code_have_made_goes_first(cache, monkeypatch):
    unused = made("b", 100)
    replaced = made("a", 200)
    other_rows = made("c", 150, replace(PLAIN, origin={"weights": "b"}))
    allow(monkeypatch, 30)
    new = open_features(replace(PLAIN, origin={"weights": "b"}), rows(name="a")).folder
    assert not replaced.exists()
    assert stores(cache) == {unused.name, other_rows.name, new.name}


def test_what_is_open_or_being_made_stays_and_the_numbers_are_told(cache, monkeypatch):
    opened = open_features(PLAIN, rows(name="a"))
    being_made = made("b", 100)
    idle = made("c", 200)
    (cache / "orphan").mkdir()
    (cache / "orphan" / "map.bin").write_bytes(b"left behind by a kill")
    with FileLock(cache / f".{being_made.name}.lock"):
        allow(monkeypatch, 29)
        with pytest.raises(WrisError, match="need 5.6e-07 GB, but there is room for 5.05e-07 GB.*WRIS_CACHE_GB to 1,"):
            open_features(PLAIN, rows(name="d"))
        assert idle.exists()  # nothing is removed in vain
        allow(monkeypatch, 30)
        new = open_features(PLAIN, rows(name="d")).folder
    assert stores(cache) == {opened.folder.name, being_made.name, new.name}
    assert opened[[9]]["number"].tolist() == [9]


def test_a_store_that_another_process_is_making_counts_with_its_final_size(cache, monkeypatch):
    def load(row):
        if row >= 4:
            raise WrisError("stop")
        return row

    with pytest.raises(WrisError, match="stop"):
        open_features(PLAIN, replace(rows(20, name="a"), load=load))
    begun = next(cache.glob("plain-*"))
    assert sum(path.stat().st_size for path in begun.glob("*.bin")) == 4 * ROW_BYTES
    with FileLock(cache / f".{begun.name}.lock"):
        allow(monkeypatch, 29)
        with pytest.raises(WrisError, match="1.12e-06 GB are in use"):
            open_features(PLAIN, rows(name="b"))
        allow(monkeypatch, 30)
        open_features(PLAIN, rows(name="b"))
    assert begun.exists()


def test_too_large_alone_is_told_before_anything_is_written(cache, monkeypatch):
    other = made("a", 100)
    monkeypatch.setenv("WRIS_CACHE_GB", "2e-9")
    with pytest.raises(WrisError, match=r"need 5.6e-07 GB.*room for 2e-09 GB.*set WRIS_CACHE_GB to 1, or"):
        open_features(PLAIN, rows(name="b"))
    assert not [path for path in cache.rglob("*.bin") if path.parent != other] and other.exists()


def test_the_limit_holds_for_a_resumed_store_too(cache, monkeypatch):
    assert killed_at(6) == -signal.SIGKILL
    monkeypatch.setenv("WRIS_CACHE_GB", "2e-9")
    with pytest.raises(WrisError, match="WRIS_CACHE_GB"):
        open_features(ENCODER, rows())


def test_a_disk_without_room_is_told_before_anything_is_written(cache, monkeypatch):
    other = made("a", 100)
    free = 8 * ROW_BYTES
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(WrisError, match=f"room for 1.01e-06 GB.*disk has 4.48e-07 GB free; make room in {cache}"):
        open_features(PLAIN, rows(19, name="b"))
    assert other.exists()
    open_features(PLAIN, rows(18, name="b"))  # with what the other one had
    assert not other.exists()


def test_a_limit_that_is_no_number(cache, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE_GB", "much")
    with pytest.raises(WrisError, match="WRIS_CACHE_GB is 'much'; expected a number of gigabytes"):
        open_features(PLAIN, rows())
