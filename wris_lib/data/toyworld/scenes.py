"""Scenes: which objects stand where, and the pixels of that.

A scene is sampled as a list of objects (category, colours, place), then painted from back to front over a background.
Everything comes from one `numpy.random.Generator`, and pixels from integer arithmetic, so that the same seed gives the
same picture on every machine. (Pillow 13 rounds some edges differently than 12, by a level or two of 255.)
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFilter

from wris_lib.data.toyworld import backgrounds
from wris_lib.data.toyworld.sprites import PATTERNS, Drawing, colors_of, drawings, paint, supercategories

SIZE = 256  # pixels; scenes are square
MAX_OBJECTS = 7
UNSEEN = ("kite", "mushroom", "tent", "train", "cow")  # no ToyRef expression refers to these: ToyCut does
AIRBORNE = ("bird", "kite", "balloon")
PARTS_PER_OBJECT = 16  # label = 16 · (object index + 1) + part index


@dataclass
class SceneObject:
    """One object of a scene; what is seen of it is known once the scene is painted.

    Attributes:
        present: the parts it has.
        colors: colour word of every paint, for example {"main": "red", "roof": "blue"}.
        center: (x, y) of its box before occlusion, pixels.
        height: pixels before rotation.
        box: XYXY pixels of what is seen of it.
        area: visible pixels.
        visible: visible share of its pixels, 0..1.
        part_areas: visible pixels by part name.
    """

    drawing: Drawing
    present: frozenset[str]
    colors: dict[str, str]
    pattern: str
    center: tuple[float, float]
    height: float
    flip: bool
    angle: float
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    area: int = 0
    visible: float = 0.0
    part_areas: dict[str, int] = field(default_factory=dict)

    @property
    def category(self) -> str:
        return self.drawing.category

    @property
    def supercategory(self) -> str:
        return self.drawing.supercategory


@dataclass
class Scene:
    """A painted scene: objects from back to front, RGB image, and labels (0 = background, else object and part)."""

    objects: list[SceneObject]
    image: UInt8[np.ndarray, "h w 3"]
    labels: UInt8[np.ndarray, "h w"]

    def mask(self, index: int) -> Bool[np.ndarray, "h w"]:
        """What is seen of object `index`."""
        return self.labels // PARTS_PER_OBJECT == index + 1

    def label(self, index: int, part: str) -> int:
        """The value in `labels` of one part of object `index`."""
        return PARTS_PER_OBJECT * (index + 1) + self.objects[index].drawing.parts.index(part)


def sample_scene(rng: np.random.Generator, focus: tuple[str, ...] | None = None, most: int = MAX_OBJECTS) -> Scene:
    """A scene of 2 to 7 objects, with distractors of the same category as in RefCOCO.

    Args:
        focus: categories of which one is repeated; by default any.
        most: objects, from 2 on.
    """
    while True:
        scene = _try_scene(rng, focus or tuple(drawings()), most)
        if len(scene.objects) >= 2:
            return scene


def sample_object_image(rng: np.random.Generator, category: str) -> Scene:
    """One large object near the centre, like a picture of an object-centric collection."""
    drawing = _choice(rng, drawings()[category])
    longer = SIZE * rng.uniform(0.5, 0.85)
    height = longer if drawing.aspect <= 1 else longer / drawing.aspect
    x, y = SIZE * rng.uniform(0.43, 0.57, 2)
    return _paint_scene(rng, [_sample_object(rng, drawing, (float(x), float(y)), height)])


def _try_scene(rng: np.random.Generator, focus: tuple[str, ...], most: int) -> Scene:
    count = int(rng.integers(2, most + 1))
    repeats = min(count, int(_choice(rng, (1, 2, 2, 2, 3, 3, 4))))
    categories = [_choice(rng, focus)] * repeats
    if rng.random() < 0.25:  # relatives as distractors: another vehicle beside the vehicles, a woman beside the men
        of_super = drawings()[categories[0]][0].supercategory
        categories.append(_choice(rng, supercategories()[of_super]))
    while len(categories) < count:
        # People stand in every second picture of RefCOCO; here, too.
        people = rng.random() < 0.3 and "people" in supercategories()
        categories.append(_choice(rng, supercategories()["people"] if people else tuple(drawings())))
    unit = SIZE * rng.uniform(0.27, 0.42) * (1.12 - 0.06 * count)  # pixels of an object of relative height 1
    placed: list[tuple[float, float, float, float]] = []
    objects = []
    for category in categories[:count]:
        drawing = _choice(rng, drawings()[category])
        for _ in range(12):
            airborne = category in AIRBORNE
            foot = SIZE * (rng.uniform(0.2, 0.8) if airborne else rng.uniform(0.42, 0.97))
            near = 0.72 + 0.4 * foot / SIZE  # what stands lower in the picture is nearer and larger
            height = float(np.clip(unit * drawing.height * near * rng.uniform(0.88, 1.12), 30, 0.75 * SIZE))
            height = min(height, 0.6 * SIZE / drawing.aspect)
            width = height * drawing.aspect
            x = rng.uniform(0.42 * width, SIZE - 0.42 * width)
            box = (x - width / 2, foot - height, x + width / 2, foot)
            if box[1] > -0.06 * SIZE and all(_shared(box, other) < 0.5 for other in placed):
                placed.append(box)
                objects.append(_sample_object(rng, drawing, (x, foot - height / 2), height))
                break
    objects.sort(key=lambda thing: thing.center[1] + thing.height / 2)
    return _paint_scene(rng, objects)


def _sample_object(
    rng: np.random.Generator, drawing: Drawing, center: tuple[float, float], height: float
) -> SceneObject:
    present = frozenset(part for part in drawing.parts if part not in drawing.optional or rng.random() < 0.55)
    colors: dict[str, str] = {}
    for name in drawing.paints:
        taken = {colors.get("main")} | ({colors.get("bag")} if name in ("shirt", "skirt") else set())
        if name == "hair" and drawing.category in ("boy", "girl"):
            taken.add("grey")
        colors[name] = _choice(rng, tuple(color for color in colors_of(name) if color not in taken))
    pattern = PATTERNS[int(rng.choice(3, p=(0.8, 0.1, 0.1)))]
    upright = drawing.supercategory in ("buildings", "furniture")
    angle = 0.0 if upright else float(rng.uniform(-9, 9))
    return SceneObject(drawing, present, colors, pattern, center, height, bool(rng.random() < 0.5), angle)


def _paint_scene(rng: np.random.Generator, objects: list[SceneObject]) -> Scene:
    canvas = backgrounds.sample(rng, SIZE)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    full_areas = []
    for index, thing in enumerate(objects):
        rgba, parts = paint(
            thing.drawing,
            thing.present,
            {name: _jitter(rng, colors_of(name)[word]) for name, word in thing.colors.items()},
            thing.pattern,
            thing.height,
            thing.flip,
            thing.angle,
        )
        left, top = round(thing.center[0] - rgba.width / 2), round(thing.center[1] - rgba.height / 2)
        if len(objects) > 1 and thing.category not in AIRBORNE:
            _paint_shadow(canvas, left, top, rgba.width, rgba.height)
        canvas.paste(rgba, (left, top), rgba)
        rows = slice(max(0, top), min(SIZE, top + rgba.height))
        columns = slice(max(0, left), min(SIZE, left + rgba.width))
        seen = parts[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        here = labels[rows, columns]
        here[seen > 0] = PARTS_PER_OBJECT * (index + 1) + seen[seen > 0] - 1
        full_areas.append(int(np.count_nonzero(parts)))
    _measure(objects, labels, full_areas)
    return Scene(objects, np.asarray(canvas), labels)


def _measure(objects: list[SceneObject], labels: UInt8[np.ndarray, "h w"], full_areas: list[int]) -> None:
    counts = np.bincount(labels.ravel(), minlength=PARTS_PER_OBJECT * (MAX_OBJECTS + 2))
    owners = labels // PARTS_PER_OBJECT
    for index, thing in enumerate(objects):
        first = PARTS_PER_OBJECT * (index + 1)
        areas = counts[first : first + len(thing.drawing.parts)]
        thing.part_areas = {part: int(a) for part, a in zip(thing.drawing.parts, areas, strict=True) if a}
        thing.area = int(areas.sum())
        thing.visible = thing.area / full_areas[index]
        mask = owners == index + 1
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if thing.area:
            thing.box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _paint_shadow(canvas: Image.Image, left: int, top: int, width: int, height: int) -> None:
    depth = max(4, width // 7)
    shade = Image.new("L", (width + 8, depth + 8), 0)
    ImageDraw.Draw(shade).ellipse((6, 4, width + 1, depth + 3), fill=70)
    canvas.paste((30, 30, 50), (left - 4, top + height - depth // 2 - 5), shade.filter(ImageFilter.BoxBlur(2)))


def _jitter(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    shift, each = int(rng.integers(-10, 11)), rng.integers(-7, 8, 3).tolist()
    return tuple(min(255, max(0, c + shift + d)) for c, d in zip(rgb, each, strict=True))


def _shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection of two XYXY boxes over the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _choice(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]
