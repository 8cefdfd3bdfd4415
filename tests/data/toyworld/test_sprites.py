"""Every drawing keeps the conventions, and recolouring paints what it says."""

import shutil

import numpy as np
import pytest

from wris_lib.data.toyworld import sprites
from wris_lib.data.toyworld.sprites import COLORS, HAIR, drawings, paint, read_drawing, supercategories

ALL = [drawing for of_category in drawings().values() for drawing in of_category]


def test_the_world_is_rich_enough():
    assert len(drawings()) >= 24
    assert len(supercategories()) >= 6
    assert all(len(of_category) >= 2 for of_category in drawings().values())
    assert len(COLORS) >= 8
    people = {name for category in supercategories()["people"] for d in drawings()[category] for name in d.paints}
    assert {"hair", "hat", "shirt", "trousers", "skirt", "bag", "skin"} <= people


@pytest.mark.parametrize("drawing", ALL, ids=lambda d: f"{d.category}-{d.name}")
def test_each_drawing_has_parts_and_paints_that_can_be_seen(drawing):
    colors = {name: sprites.colors_of(name)["black" if name == "hair" else "fair" if name == "skin" else "red"]
              for name in drawing.paints}  # fmt: skip
    rgba, parts = paint(drawing, frozenset(drawing.parts), colors, "plain", 200.0, False, 0.0)
    pixels = np.asarray(rgba)
    assert 3 <= len(drawing.parts) <= 16
    assert 0.5 <= drawing.height <= 1.9
    assert set(np.unique(parts)) == set(range(len(drawing.parts) + 1)), "a part is hidden by the others"
    # What is opaque has a part and the other way round, but for the smoothed rim.
    assert ((pixels[..., 3] > 127) != (parts > 0)).mean() < 0.03
    for name in drawing.paints:
        if name in drawing.parts and name not in ("hair", "skin"):
            assert _is_near(pixels, COLORS["red"]).sum() > 20, f"no red where {name} should be"


def test_things_have_their_own_colour_and_people_have_clothes():
    for drawing in ALL:
        if drawing.supercategory == "people":
            assert "main" not in drawing.paints
            assert {"shirt", "hair", "skin"} <= set(drawing.paints)
        else:
            assert "main" in drawing.paints
            assert set(drawing.paints) - {"main"}, f"{drawing.category} has nothing to be told apart by"


def test_a_recoloured_shirt_has_exactly_its_colour():
    drawing = drawings()["man"][0]
    colors = {name: (10, 200, 30) if name == "shirt" else (200, 10, 10) for name in drawing.paints}
    rgba, parts = paint(drawing, frozenset(drawing.parts), colors, "plain", 240.0, False, 0.0)
    shirt = np.asarray(rgba)[parts == drawing.parts.index("shirt") + 1]
    green = (shirt[:, :3] == (10, 200, 30)).all(1)
    assert green.mean() > 0.4


def test_mirroring_mirrors_pixels_and_parts():
    drawing = drawings()["dog"][0]
    colors = {name: COLORS["blue"] for name in drawing.paints}
    everything = frozenset(drawing.parts)
    rgba, parts = paint(drawing, everything, colors, "striped", 96.0, False, 0.0)
    mirrored, mirrored_parts = paint(drawing, everything, colors, "striped", 96.0, True, 0.0)
    assert (np.asarray(rgba)[:, ::-1].astype(int) - np.asarray(mirrored)).max() <= 1
    assert ((parts[:, ::-1] != mirrored_parts).mean()) < 0.02


def test_patterns_change_only_the_patterned_paint():
    drawing = drawings()["woman"][0]
    colors = {name: COLORS["green"] for name in drawing.paints}
    everything = frozenset(drawing.parts)
    plain, parts = paint(drawing, everything, colors, "plain", 256.0, False, 0.0)
    striped, _ = paint(drawing, everything, colors, "striped", 256.0, False, 0.0)
    changed = (np.asarray(plain) != np.asarray(striped)).any(-1)
    shirt = parts == drawing.parts.index("shirt") + 1
    assert changed[shirt].mean() > 0.15
    assert changed[~shirt].mean() < 0.02


def test_shades():
    assert sprites.shaded((100, 200, 50), "") == (100, 200, 50)
    assert sprites.shaded((100, 200, 50), "dark") == (78, 156, 39)
    assert sprites.shaded((100, 200, 0), "light") == (154, 219, 89)
    assert all(len(color) == 3 for color in HAIR.values())


def test_a_student_adds_an_object_by_adding_a_file(tmp_path, monkeypatch):
    shutil.copytree(sprites.SPRITES, tmp_path / "sprites")
    new = tmp_path / "sprites" / "food" / "cookie" / "round.svg"
    new.parent.mkdir()
    new.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100" data-height="0.6"><style>.main{fill:#a63}'
        '.icing{fill:#fff}</style><g id="biscuit"><circle class="main" cx="50" cy="50" r="50"/></g>'
        '<g id="icing"><circle class="icing" cx="50" cy="50" r="30"/></g></svg>'
    )
    monkeypatch.setattr(sprites, "SPRITES", tmp_path / "sprites")
    drawings.cache_clear()
    supercategories.cache_clear()
    try:
        assert drawings()["cookie"] == (read_drawing(new),)
        assert "cookie" in supercategories()["food"]
        _, parts = paint(drawings()["cookie"][0], frozenset({"biscuit", "icing"}),
                         {"main": (1, 2, 3), "icing": (9, 9, 9)}, "plain", 100.0, False, 0.0)  # fmt: skip
        assert (parts == 2).sum() == pytest.approx(np.pi * 30**2, rel=0.02)
    finally:
        drawings.cache_clear()
        supercategories.cache_clear()


def _is_near(pixels, color):
    return (np.abs(pixels[..., :3].astype(int) - color).max(-1) < 6) & (pixels[..., 3] > 200)
