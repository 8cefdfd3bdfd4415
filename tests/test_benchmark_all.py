"""Everyone at once: rows shared by processes, what they cost, and a page; with a method whose figures are known."""

import os
from pathlib import Path

import pytest
from filelock import Timeout
from PIL import Image

from tests import fake_benchmark, processes
from tests.fake_benchmark import IMAGES, Fake
from wris_lib import answers, benchmark, contestants, report
from wris_lib.errors import WrisError


@pytest.fixture
def split(tmp_path, monkeypatch) -> Path:
    return fake_benchmark.prepare(tmp_path, monkeypatch)


def help_along(split: Path, folder: Path) -> None:
    """The work of one of two processes; leaves the number of its predictions."""
    calls = fake_benchmark.run_slowly(split, folder / "two", 0.2)
    (folder / f"calls{os.environ['RANK']}").write_text(str(calls))


def test_two_processes_share_the_work_and_say_the_same(split, tmp_path, monkeypatch):
    processes.run_two(tmp_path, help_along, split, tmp_path)
    calls = [int((tmp_path / f"calls{rank}").read_text()) for rank in range(2)]
    assert min(calls) >= 2 and sum(calls) == 2 * (IMAGES + 2)

    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "another cache"))
    alone = benchmark.run(["fake"], ["fake:val", "fake:testA"], "out", folder=tmp_path)
    assert report.read(tmp_path / "two" / "out.json")["rows"] == alone["rows"]


def test_what_another_process_is_at_comes_last(split, tmp_path, monkeypatch):
    asked = []

    def records_of(row, spec, items, limit, seed, stack, patience):
        asked.append((row.name, spec, patience))
        if (row.name, spec, patience) == ("fake bright", "fake:val", 0):
            raise Timeout("lock")
        return [{"of": (row.name, spec)}]

    monkeypatch.setattr(benchmark, "records_of", records_of)
    splits = {spec: benchmark.data.load(spec).items for spec in ("fake:val", "fake:testA")}
    found = benchmark._share(contestants.contestants("fake"), splits, None, 0, "toy")
    rows = [("fake bright", "fake:val"), ("fake bright", "fake:testA"), ("fake wide", "fake:val")]
    rows.append(("fake wide", "fake:testA"))
    assert asked == [(*row, 0) for row in rows] + [(*rows[0], -1)]
    assert list(found) == rows and all(records == [{"of": row}] for row, records in found.items())


def test_a_process_that_helps_writes_nothing(split, tmp_path, monkeypatch):
    helper = type("Helper", (), {"is_main_process": False})
    monkeypatch.setattr(benchmark, "PartialState", lambda cpu: helper)
    assert benchmark.run(["fake"], ["fake:val"], "out", folder=tmp_path / "out") is None
    assert Fake.calls == 2 * IMAGES and not (tmp_path / "out").exists()


COST = {"milliseconds": 12.4, "again": 3.4, "megabytes": 345, "parameters": 6789, "supervision": "pairs"}


def test_everyone_with_costs(split, tmp_path, monkeypatch):
    measured = []

    def measure(rows, spec, items, seed, stack):
        measured.append(([row.name for row in rows], spec, len(items), seed, stack))
        return {row.name: COST for row in rows}

    monkeypatch.setattr(benchmark.cost, "measure", measure)
    reasons = {"ppt": "the toy stack has no ppt weights"}
    monkeypatch.setattr(benchmark, "everyone", lambda stack: (["fake"], reasons))
    with pytest.warns(UserWarning, match="^ppt is left out: the toy stack has no ppt weights.$"):
        found = benchmark.run(None, ["fake:val"], "out", limit=5, folder=tmp_path, html=tmp_path / "page.html")
    assert measured == [(["fake bright", "fake wide"], "fake:val", 24, 0, "toy")]
    assert found["made"]["left_out"] == reasons
    assert found["costs"] == {"fake bright": COST, "fake wide": COST}
    assert found["made"]["command"].endswith(
        "benchmark --all --data fake:val --name out --stack toy --seed 0 --limit 5"
    )
    head, _, line, _ = (tmp_path / "out.md").read_text().splitlines()
    cells = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (head, line)), strict=True))
    about = [cells[name] for name in ("ms", "again", "MB", "trained", "supervision")]
    assert about == ["12", "3", "345", "6,789", "pairs"]
    kinds = found["rows"][0]["kinds"]
    assert float(cells["Position"].split()[0]) == pytest.approx(kinds["Position"]["metrics"]["mIoU"]["mean"], abs=0.06)
    assert "ppt is left out" in (tmp_path / "page.html").read_text()
    spec, shipped = answers.read(tmp_path / "out.answers.json.gz")
    assert spec == "fake:val" and list(shipped) == ["fake bright", "fake wide"]
    assert shipped["fake wide"] == benchmark.records("fake wide", "fake:val", limit=5)
    with Image.open(tmp_path / "out.disagreements.jpg") as picture:
        assert picture.format == "JPEG"

    # A row whose cost nobody measured has gaps; costs of before stay.
    again = benchmark.run(["fake wide"], ["fake:testA"], "out", folder=tmp_path)
    assert answers.read(tmp_path / "out.answers.json.gz")[0] == "fake:val"
    assert again["costs"] == found["costs"] and "left_out" not in again["made"]
    del again["costs"]["fake wide"]
    assert report.table(again).splitlines()[-1].endswith("|  – |     – |   – |       – |           – |")


def test_an_impossible_page_is_refused_before_anything_is_measured(split, tmp_path):
    with pytest.raises(WrisError, match="cannot be the page"):
        benchmark.run(["fake"], ["fake:val"], "out", folder=tmp_path, html=tmp_path)
    assert Fake.calls == 0


def test_too_many_rows_for_one_table(tmp_path):
    """Each split gets its own; its name is in the heading, and not in every line."""
    figures = {"mIoU": {"mean": 10.0, "std": 1.0, "low": 9.0, "high": 11.0}}
    figures |= {outcome: figures["mIoU"] for outcome in report.OUTCOMES}
    rows = [{"name": f"m{i}", "data": f"d{i % 2}", "n": 5, "metrics": figures} for i in range(41)]
    report.write(tmp_path / "few.json", {}, rows[:40])
    assert (tmp_path / "few.md").read_text() == report.table({"rows": rows[:40]}) + "\n"
    report.write(tmp_path / "many.json", {}, rows)
    _, *parts = (tmp_path / "many.md").read_text().split("\n\n## ")
    assert [part.split()[0] for part in parts] == ["d0", "d1"]
    lines = [line.split("|") for part in parts for line in part.splitlines() if line.startswith("| m")]
    assert [line[1].strip() for line in lines if "method" not in line[1]] == [
        f"m{i}" for i in (*range(0, 41, 2), *range(1, 41, 2))
    ]
    assert lines[1][2].strip() == "5"


def test_a_picture_of_too_many_rows_shows_one_split():
    metrics = {name: {"mean": 10.0, "low": 9.0, "high": 11.0} for name in ("mIoU", *report.OUTCOMES)}
    rows = [{"name": "m", "data": f"d{i % 5}", "metrics": metrics} for i in range(45)]
    axes = report.picture({"rows": rows}).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["m"] * 9
    assert axes.get_title(loc="left").startswith("d0: mIoU")
    axes = report.picture({"rows": rows[:40]}).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()][:2] == ["m, d0", "m, d1"]
    assert len(axes.get_yticklabels()) == 40 and axes.get_title(loc="left").startswith("mIoU")
