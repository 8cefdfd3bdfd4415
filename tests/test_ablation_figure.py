"""The ablation's picture from made-up files: what stands where, and what is said when a file is not as it should be."""

import io
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from wris_lib import ablation_figure
from wris_lib.ablation_figure import PAPER, ablation_picture, read_ablation, read_rows
from wris_lib.errors import WrisError


def row(name, mean, data="toyref:val", spread=1.0):
    seeds = [mean] if name.startswith("1") else [mean - spread, mean, mean + spread]
    return {
        "name": name,
        "data": data,
        "n": 1000,
        "metrics": {"mIoU": {"mean": mean, "std": float(np.std(seeds)), "seeds": seeds}},
    }


MEANS = dict(zip(PAPER, (29.0, 31.0, 34.0, 41.0, 43.0, 39.0, 36.0, 40.0, 30.0), strict=True))


@pytest.fixture
def path(tmp_path):
    rows = [row("1 CLIP + SAM", 99.0, "toyref+:val"), *(row(name, mean) for name, mean in MEANS.items())]
    file = tmp_path / "ppt_ablation.json"
    file.write_text(json.dumps({"command": "…", "seeds": [0, 1, 2], "rows": rows[::-1]}), encoding="utf-8")
    return file


def test_rows_by_name_in_the_papers_order(path):
    rows = read_ablation(path)
    assert list(rows) == list(PAPER)
    assert rows["1 CLIP + SAM"]["metrics"]["mIoU"]["mean"] == 29  # not that of the other split


def test_rows_of_any_result(tmp_path):
    file = tmp_path / "ppt_pseudolabels.json"
    file.write_text('{"rows": [{"name": "D_sem", "mIoU": 1}, {"name": "H_sem", "mIoU": 2}]}', encoding="utf-8")
    assert {name: r["mIoU"] for name, r in read_rows(file).items()} == {"D_sem": 1, "H_sem": 2}


def test_the_papers_figures():
    assert list(PAPER.values()) == [26.46, 34.19, 38.91, 44.14, 46.76, 43.28, 42.29, 39.33, 34.47]
    assert ablation_figure.FULL in PAPER


def test_bars_dots_and_labels(path):
    ours, theirs = ablation_picture(path).axes
    assert [bar.get_width() for bar in ours.patches] == list(MEANS.values())
    assert [bar.get_width() for bar in theirs.patches] == list(PAPER.values())
    assert [label.get_text() for label in ours.get_yticklabels()] == list(PAPER)
    assert ours.yaxis_inverted()  # row 1 on top
    dots = [line.get_xdata() for line in ours.lines if line.get_marker() == "o"]
    assert [list(x) for x in dots] == [[m - 1, m, m + 1] for m in list(MEANS.values())[1:]]  # row 1 has no seeds
    assert [text.get_text() for text in ours.texts] == [f"{mean:.1f}" for mean in MEANS.values()]
    assert "mean of 3 seeds" in ours.get_title("left")


def test_a_single_seed_has_no_spread(tmp_path):
    file = tmp_path / "ppt_ablation.json"
    rows = [row(name, mean) for name, mean in MEANS.items()]
    for each in rows:
        each["metrics"]["mIoU"] |= {"seeds": [each["metrics"]["mIoU"]["mean"]], "std": 0.0}
    file.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    ours, _ = ablation_picture(file).axes
    assert ours.get_title("left") == "ours, ToyRef val: one seed"
    assert not [line for line in ours.lines if line.get_marker() == "o"]


def test_nothing_is_cut_off_and_letters_are_large_enough(path):
    """Shown 1280 pixels wide, no text is smaller than 12 pixels, none leaves the picture, and no dot its axes."""
    figure = ablation_picture(path)
    figure.set_dpi(1280 / figure.get_figwidth())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        assert all(max(line.get_xdata()) <= axes.get_xlim()[1] for line in axes.lines)
        outside = axes.get_xticklabels()  # matplotlib also keeps some that it does not draw
        for text in axes.findobj(lambda artist: isinstance(artist, Text) and artist.get_text()):
            assert text.get_fontsize() * figure.dpi / 72 >= 12
            box = text.get_window_extent(canvas.get_renderer())
            assert text in outside or (figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert Image.open(buffer).width == 1280


def test_what_is_said_about_files(tmp_path, path):
    with pytest.raises(WrisError, match=r"no result .*nowhere.json; it comes with the course: restore it"):
        ablation_picture(tmp_path / "nowhere.json")
    for content in ("not JSON", "[]", "{}", '{"rows": 3}', '{"rows": [{"data": "toyref:val"}]}', '{"rows": [1]}'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(WrisError, match="is no result with rows; restore it"):
            read_ablation(path)
    path.write_text(json.dumps({"rows": [row("1 CLIP + SAM", 29.0)]}), encoding="utf-8")
    with pytest.raises(WrisError, match=r"lacks 8 of the ablation's rows .* '2 point prompting'; make it with"):
        ablation_picture(path)
