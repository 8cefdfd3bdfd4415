"""Sprites: SVG drawings that are rasterised once and recoloured at will.

A drawing is a file `sprites/<super-category>/<category>/<drawing>.svg`. Its groups are the object's parts, its CSS
classes are paints, and a paint named after a part (or `main`, the object's own colour) may take any colour. So each
drawing is rasterised once into two maps, which paint and which part lies at a pixel; an instance is then a palette
look-up followed by a reduction, which also smooths the edges.

To add an object, draw an SVG and put it into a folder: nothing else needs to know. README.md beside the drawings lists
the conventions.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import resvg_py
from jaxtyping import Bool, UInt8
from PIL import Image, ImageColor

SPRITES = Path(__file__).parent / "sprites"

COLORS = {
    "red": (206, 51, 45),
    "orange": (238, 134, 42),
    "yellow": (244, 205, 62),
    "green": (74, 156, 74),
    "blue": (58, 108, 196),
    "purple": (128, 72, 164),
    "pink": (238, 138, 176),
    "brown": (132, 88, 56),
    "black": (46, 46, 54),
    "white": (244, 243, 238),
    "grey": (146, 148, 154),
}
HAIR = {
    "black": (40, 34, 36),
    "brown": (104, 66, 40),
    "blond": (228, 190, 98),
    "red": (186, 84, 40),
    "grey": (168, 168, 172),
}
SKIN = {
    "fair": (250, 214, 188),
    "tan": (226, 172, 130),
    "brown": (166, 112, 76),
    "dark": (112, 72, 50),
}
PATTERNS = ("plain", "striped", "spotted")

_SVG = "{http://www.w3.org/2000/svg}"
_SIDES = (96, 128, 192, 256, 384, 512)  # pixels of the longer side at which a drawing is rasterised


def colors_of(paint: str) -> dict[str, tuple[int, int, int]]:
    """The named colours (RGB, 0..255) that a paint can take."""
    return {"hair": HAIR, "skin": SKIN}.get(paint, COLORS)


@dataclass(frozen=True)
class Drawing:
    """One SVG file.

    Attributes:
        parts: part names in painter's order; a part's index in label maps is its position here, from 0.
        optional: parts that only some instances have.
        paints: paints that can be recoloured.
        fills: what lies at each paint index from 1 on, as (paint, shade): ("shirt", ""), ("shirt", "dark"), or a
            colour that stays, ("#2b2b33", "").
        height: height relative to the other drawings (an adult is about 1.3).
        aspect: width over height.
    """

    supercategory: str
    category: str
    name: str
    parts: tuple[str, ...]
    optional: frozenset[str]
    paints: tuple[str, ...]
    fills: tuple[tuple[str, str], ...]
    height: float
    aspect: float
    groups: tuple[str, ...]  # the parts' SVG, with fills that encode (paint index, part index)
    view_box: str


@cache
def drawings() -> dict[str, tuple[Drawing, ...]]:
    """All drawings by category, in alphabetical order."""
    by_category: dict[str, list[Drawing]] = {}
    for path in sorted(SPRITES.glob("*/*/*.svg")):
        drawing = read_drawing(path)
        by_category.setdefault(drawing.category, []).append(drawing)
    return {category: tuple(by_category[category]) for category in sorted(by_category)}


@cache
def supercategories() -> dict[str, tuple[str, ...]]:
    """Categories by super-category, in alphabetical order."""
    by_super: dict[str, list[str]] = {}
    for category, of_category in drawings().items():
        by_super.setdefault(of_category[0].supercategory, []).append(category)
    return {name: tuple(by_super[name]) for name in sorted(by_super)}


def read_drawing(path: Path) -> Drawing:
    """Read one SVG file that follows the conventions of `sprites/README.md`."""
    root = ElementTree.parse(path).getroot()
    style = root.find(f"{_SVG}style")
    rules = dict(re.findall(r"\.([\w-]+)\s*\{([^}]*)\}", style.text or "" if style is not None else ""))
    groups = [child for child in root if child.tag == f"{_SVG}g"]
    parts = tuple(group.attrib["id"] for group in groups)
    fills: list[tuple[str, str]] = []

    def encode(fill: tuple[str, str], part: int) -> str:
        if fill not in fills:
            fills.append(fill)
        return f"rgb({fills.index(fill) + 1},{part + 1},0)"

    encoded, optional = [], set()
    for index, group in enumerate(groups):
        if group.attrib.pop("class", None) == "optional":
            optional.add(parts[index])
        for element in group.iter():
            paint = element.attrib.pop("class", None)
            if paint is not None:
                base, shade = _split_shade(paint.removesuffix("-stroke"))
                if "stroke" in rules.get(paint, ""):
                    element.set("stroke", encode((base, shade), index))
                    element.set("fill", "none")
                    element.set("stroke-linecap", "round")
                    element.set("stroke-linejoin", "round")
                else:
                    element.set("fill", encode((base, shade), index))
            for attribute in ("fill", "stroke"):
                literal = element.attrib.get(attribute, "none")
                if literal.startswith("#"):
                    element.set(attribute, encode((literal, ""), index))
        encoded.append(ElementTree.tostring(group, encoding="unicode"))

    _, _, width, height = map(float, root.attrib["viewBox"].split())
    recolourable = {paint for paint, _ in fills if paint in parts or paint in ("main", "skin")}
    return Drawing(
        supercategory=path.parent.parent.name,
        category=path.parent.name,
        name=path.stem,
        parts=parts,
        optional=frozenset(optional),
        paints=tuple(sorted(recolourable)),
        fills=tuple(fills),
        height=float(root.attrib["data-height"]),
        aspect=width / height,
        groups=tuple(encoded),
        view_box=root.attrib["viewBox"],
    )


def paint(
    drawing: Drawing,
    present: frozenset[str],
    colors: dict[str, tuple[int, int, int]],
    pattern: str,
    height: float,
    flip: bool,
    angle: float,
) -> tuple[Image.Image, UInt8[np.ndarray, "h w"]]:
    """Draw one instance.

    Args:
        present: the parts to draw.
        colors: RGB for every paint in `drawing.paints`.
        pattern: "plain", "striped" or "spotted"; on the main paint, or on a person's shirt.
        height: pixels, before rotation.
        flip: mirror left and right.
        angle: degrees counter-clockwise.

    Returns:
        An RGBA image, and at each of its pixels the part index from 1 (0 = outside).
    """
    longer = max(height, height * drawing.aspect)
    side = next((s for s in _SIDES if s >= 1.5 * longer), _SIDES[-1])
    paints, parts = rasterize(drawing, present, pattern, side)
    scale = height / paints.height
    paints = paints.copy()
    paints.putpalette(_palette(drawing, colors), "RGBA")
    if flip:
        paints = paints.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        parts = parts.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        paints = paints.rotate(angle, Image.Resampling.NEAREST, expand=True, fillcolor=0)
        parts = parts.rotate(angle, Image.Resampling.NEAREST, expand=True, fillcolor=0)
    size = (max(2, round(paints.width * scale)), max(2, round(paints.height * scale)))
    rgba = paints.convert("RGBA").resize(size, Image.Resampling.HAMMING)
    return rgba, np.asarray(parts.resize(size, Image.Resampling.NEAREST))


def _split_shade(paint: str) -> tuple[str, str]:
    for shade in ("dark", "light"):
        if paint.endswith(f"-{shade}"):
            return paint.removesuffix(f"-{shade}"), shade
    return paint, ""


@lru_cache(maxsize=1024)
def rasterize(drawing: Drawing, present: frozenset[str], pattern: str, side: int) -> tuple[Image.Image, Image.Image]:
    """Which paint (an index into `drawing.fills`, from 1) and which part (from 1) lies at a pixel; 0 = nothing.

    Args:
        present: the parts to draw.
        side: pixels of the longer side.
    """
    body = "".join(g for part, g in zip(drawing.parts, drawing.groups, strict=True) if part in present)
    longer_is_width = drawing.aspect > 1
    width = side if longer_is_width else max(1, round(side * drawing.aspect))
    height = max(1, round(side / drawing.aspect)) if longer_is_width else side
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{drawing.view_box}" preserveAspectRatio="none" '
        f'width="{width}" height="{height}">{body}</svg>'
    )
    # Crisp edges: no pixel mixes two codes. Smooth edges come from reducing the recoloured map.
    png = resvg_py.svg_to_bytes(svg_string=svg, shape_rendering="crisp_edges", skip_system_fonts=True)
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    paints, parts = (np.where(rgba[..., 3] > 127, rgba[..., channel], 0).astype(np.uint8) for channel in (0, 1))
    if pattern != "plain":
        paints[_pattern(drawing, paints, pattern)] = len(drawing.fills) + 1
    return Image.fromarray(paints), Image.fromarray(parts)


def _palette(drawing: Drawing, colors: dict[str, tuple[int, int, int]]) -> bytes:
    entries = [(0, 0, 0, 0)]
    for name, shade in drawing.fills:
        rgb = ImageColor.getrgb(name) if name.startswith("#") else colors[name]
        entries.append((*shaded(rgb, shade), 255))
    pattern_paint = _patterned_paint(drawing)
    if pattern_paint is not None:
        red, green, blue = colors[pattern_paint]
        bright = red + green + blue > 380
        entries.append((*shaded((red, green, blue), "darker" if bright else "lighter"), 255))
    return bytes(channel for entry in entries for channel in entry)


def shaded(rgb: tuple[int, int, int], shade: str) -> tuple[int, int, int]:
    """A darker or lighter tone of an RGB colour; integers only, so that every machine agrees."""
    mixes = {"": (100, 0), "dark": (78, 0), "darker": (55, 0), "light": (65, 35), "lighter": (45, 55)}
    keep, white = mixes[shade]
    return tuple((keep * channel + white * 255) // 100 for channel in rgb)


def _patterned_paint(drawing: Drawing) -> str | None:
    return next((paint for paint in ("main", "shirt") if paint in drawing.paints), None)


def _pattern(drawing: Drawing, paints: UInt8[np.ndarray, "h w"], pattern: str) -> Bool[np.ndarray, "h w"]:
    base = _patterned_paint(drawing)
    codes = [code for code, (name, _) in enumerate(drawing.fills, start=1) if name == base]
    rows, columns = np.indices(paints.shape)
    step = max(paints.shape) // 16
    if pattern == "striped":
        marked = (columns // step) % 2 == 0 if base == "main" else (rows * 2 // step) % 2 == 0
    else:
        x, y = columns % (2 * step) - step, rows % (2 * step) - step
        marked = x * x + y * y < (step * 6 // 10) ** 2
    return marked & np.isin(paints, codes)
