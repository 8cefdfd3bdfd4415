"""Pictures for notebooks and the command line.

Everywhere in the course the ground truth is a green outline, a prediction an orange area, a positive point a white
disc and a negative one a black cross. The colours are Okabe and Ito's, which colour-blind readers tell apart.

    overlay(image, prediction, expression)             one prediction
    stages(image, prediction, expression)              how the method came to it
    grid([judged(item, prediction), ...])              a gallery with the ground truth and the verdict
    grid([Panel(image, mask=..., title=...), ...])     anything else, side by side
    matching(image, places, boxes, costs, pairs)       which of PPT's queries answers for which object

Each gives a `Picture`, which shows itself in a notebook and can be saved. pyplot's global state is not touched.
"""

import io
import os
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from wris_lib import evaluate
from wris_lib.data.images import load_image
from wris_lib.data.refer import EvaluationItem
from wris_lib.files import atomic_write
from wris_lib.methods import Prediction

REFERENT = "#009E73"  # bluish green
PREDICTION = "#E69F00"  # orange
BOX = "#56B4E9"  # sky blue
REGIONS = ("#0072B2", REFERENT, PREDICTION, "#CC79A7", BOX, "#D55E00", "#F0E442", "#000000")  # all eight of theirs
INCHES = 2.6  # side of a panel
DPI = 90  # sharp enough to read; a notebook with twenty pictures stays below a megabyte
LONGEST = 480  # pixels: larger images are scaled down before they are drawn
TITLE_WIDTH, TITLE_LINES = 34, 4  # longer titles end in an ellipsis

ImageSource = str | os.PathLike | Image.Image | np.ndarray


@dataclass
class Queries:
    """What PPT's generator proposes for one expression: K prompts of M points, drawn in a colour each.

    Attributes:
        points: [K, M, 2] as (x, y) in image pixels.
        labels: [K, M], 1 positive, 0 negative.
        anchors: [K, 2] in image pixels, from where lines go to the points; None: there are none.
        scores: [K], 0..1: the lower, the fainter a prompt is drawn; None: all alike.
    """

    points: Float[np.ndarray, "k m 2"]
    labels: Int[np.ndarray, "k m"]
    anchors: Float[np.ndarray, "k 2"] | None = None
    scores: Float[np.ndarray, "k"] | None = None


@dataclass
class Panel:
    """One image and what to draw over it; what is None is not drawn.

    Attributes:
        image: whatever `load_image` takes.
        title: above the image, wrapped when long.
        mask: [H, W], a prediction.
        referent: [H, W], the ground truth.
        response_map: of any resolution and range, over the image in grey.
        points: [N, 2] as (x, y) in image pixels.
        point_labels: [N], 1 positive, 0 negative; without it all points are positive.
        box: XYXY in pixels.
        regions: masks [H, W] by the name that the legend gives them, in flat colours over the paled image.
        queries: of PPT's generator.
    """

    image: ImageSource
    title: str = ""
    mask: Bool[np.ndarray, "H W"] | None = None
    referent: Bool[np.ndarray, "H W"] | None = None
    response_map: Float[np.ndarray, "h w"] | None = None
    points: Float[np.ndarray, "n 2"] | None = None
    point_labels: Int[np.ndarray, "n"] | None = None
    box: Float[np.ndarray, "4"] | None = None
    regions: dict[str, Bool[np.ndarray, "H W"]] | None = None
    queries: Queries | None = None


class Picture:
    """A finished figure. It shows itself in a notebook, as a JPEG since these are small, and saves as PNG or JPEG."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    @cached_property
    def jpeg(self) -> bytes:
        """The bytes of a JPEG file; an image widget wants them too."""
        return self._encode("jpeg")

    def _repr_jpeg_(self) -> bytes:
        return self.jpeg

    def save(self, path: str | os.PathLike) -> None:
        """Write a file, whole or not at all: a JPEG when its name ends in .jpg or .jpeg, otherwise a PNG.

        Raises:
            WrisError: the folder cannot be written.
        """
        path = Path(path)
        kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
        with atomic_write(path) as file:
            file.write(self._encode(kind))

    def _encode(self, kind: str) -> bytes:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # An expression may have signs that the font lacks; they become boxes, and all else stays readable.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            quality = {"pil_kwargs": {"quality": 75, "optimize": True}} if kind == "jpeg" else {}
            self.figure.savefig(buffer, format=kind, dpi=DPI, **quality)
        return buffer.getvalue()


def overlay(
    image: ImageSource,
    prediction: Prediction,
    expression: str,
    referent: Bool[np.ndarray, "H W"] | None = None,
) -> Picture:
    """One prediction over its image: mask and points, and the ground truth if there is one."""
    points, labels = prediction.points, prediction.point_labels
    return grid([Panel(image, _quoted(expression), prediction.mask, referent, None, points, labels)], inches=5.0)


def judged(item: EvaluationItem, prediction: Prediction) -> Panel:
    """A prediction beside the ground truth, with the verdict of `evaluate.outcome` in the title."""
    verdict = evaluate.outcome(prediction.mask, item.mask, item.others)
    iou = evaluate.iou(prediction.mask, item.mask)
    title = f"{_quoted(item.expression)}\n{verdict}, IoU {iou:.2f}"
    points, labels = prediction.points, prediction.point_labels
    return Panel(item.image_path, title, prediction.mask, item.mask, None, points, labels)


def stages(
    image: ImageSource,
    prediction: Prediction,
    expression: str,
    referent: Bool[np.ndarray, "H W"] | None = None,
) -> Picture:
    """How a method came to its mask: the image, then the stages of the trace, with a panel for each candidate mask."""
    image = load_image(image)
    panels = [Panel(image, _quoted(expression), referent=referent)]
    points, labels = None, None
    for stage in prediction.trace:
        if stage.points is not None:
            points, labels = stage.points, stage.point_labels
        if stage.masks is None or not len(stage.masks):
            panels.append(
                Panel(image, f"{stage.name}\n{stage.note}", None, None, stage.response_map, stage.points, labels)
            )
            continue
        for number, mask in enumerate(stage.masks):
            score = "" if stage.scores is None else f"predicted IoU {stage.scores[number]:.2f}"
            chosen = ", chosen" if np.array_equal(mask, prediction.mask) else ""
            panels.append(
                Panel(image, f"candidate {number + 1}\n{score}{chosen}", mask, referent, None, points, labels)
            )
    return grid(panels, columns=6, inches=2.0)


def grid(panels: Sequence[Panel], columns: int = 4, inches: float = INCHES) -> Picture:
    """Panels side by side, with a legend of what is drawn in them; without any, a line that says so.

    Args:
        panels: any number.
        columns: most in a row.
        inches: width of a panel.
    """
    if not panels:
        figure = Figure(figsize=(inches, 0.3))
        figure.text(0.5, 0.5, "nothing to show", ha="center", va="center", fontsize=9)
        return Picture(figure)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    panels = [replace(panel, image=load_image(panel.image)) for panel in panels]
    titles = [_wrapped(panel.title, inches) for panel in panels]
    figure = Figure(layout="constrained")
    legend: dict[str, Artist] = {}
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    for axes, panel, title in zip(cells, panels, titles, strict=False):
        legend |= draw(axes, panel)
        axes.set_title(title, fontsize=9, parse_math=False)  # an expression may well have two dollar signs
        axes.set_anchor("N")  # images of different shapes stand in line, and below their titles
    row = inches * max(min(panel.image.height / panel.image.width, 1.5) for panel in panels)
    row += 0.05 + 0.17 * max(title.count("\n") + 1 if title else 0 for title in titles)
    height = 0.1 + rows * row
    if legend:
        widest = 0.5 + 0.06 * max(map(len, legend))  # inches, at this size of letters
        fitting = min(len(legend), max(1, int(columns * inches / widest)))
        style = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
        figure.legend(legend.values(), legend, ncols=fitting, **style)
        height += 0.1 + 0.16 * -(-len(legend) // fitting)
    figure.set_size_inches(columns * inches, height)
    return Picture(figure)


def draw(axes: Axes, panel: Panel) -> dict[str, Artist]:
    """Draw a panel, but for its title, into axes of your own.

    Args:
        axes: will show the image in its own pixel coordinates.
        panel: what to draw.

    Returns:
        Legend entries by name.
    """
    image = load_image(panel.image)
    width, height = image.size
    image = _shrunk(image)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    legend: dict[str, Artist] = {}
    if panel.response_map is not None:
        axes.imshow(image.convert("L"), extent=extent, cmap="gray", vmin=-64, vmax=320)
        low, high = panel.response_map.min(), panel.response_map.max()
        opacity = 0.25 + 0.6 * (panel.response_map - low) / max(high - low, 1e-9)  # weak response, clear view
        axes.imshow(panel.response_map, extent=extent, cmap="inferno", alpha=opacity, interpolation="bilinear")
    elif panel.regions is not None:
        axes.imshow(image.convert("L"), extent=extent, cmap="gray", vmin=-512, vmax=255)
    else:
        axes.imshow(image, extent=extent)
    for (name, region), color in zip((panel.regions or {}).items(), cycle(REGIONS), strict=False):
        fill(axes, region, to_rgba(color), extent)
        legend[name] = Patch(color=color)
    if panel.mask is not None:
        fill(axes, panel.mask, to_rgba(PREDICTION, 0.55), extent)
        _outline(axes, panel.mask, PREDICTION, 1.0)
        legend["prediction"] = Patch(facecolor=to_rgba(PREDICTION, 0.6), edgecolor=PREDICTION)
    if panel.referent is not None:
        _outline(axes, panel.referent, "white", 3.5)
        _outline(axes, panel.referent, REFERENT, 2.0)
        legend["referent"] = Line2D([], [], color=REFERENT, lw=2)
    if panel.box is not None:
        x0, y0, x1, y1 = panel.box
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=BOX, lw=2))
        legend["box"] = Line2D([], [], color=BOX, lw=2)
    if panel.points is not None:
        positive = np.ones(len(panel.points), bool) if panel.point_labels is None else panel.point_labels == 1
        for name, chosen, marker, face, edge in (
            ("positive point", positive, "o", "white", "black"),
            ("negative point", ~positive, "X", "black", "white"),
        ):
            if chosen.any():
                style = {"marker": marker, "ls": "", "ms": 6, "mfc": face, "mec": edge, "mew": 0.8}
                (legend[name],) = axes.plot(*panel.points[chosen].T, **style)
    if panel.queries is not None:
        legend |= _draw_queries(axes, panel.queries)
    axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return legend


def matching(
    image: ImageSource,
    places: Float[np.ndarray, "k 2"],
    boxes: Float[np.ndarray, "y 4"],
    costs: Float[np.ndarray, "k y"],
    pairs: Sequence[tuple[int, int]],
    title: str = "",
    names: Sequence[str] | None = None,
) -> Picture:
    """Which query answers for which object: on the image, and in the table of costs.

    Args:
        image: whatever `load_image` takes.
        places: where each query is, (x, y) in pixels.
        boxes: of the objects, XYXY in pixels.
        costs: of every query with every object.
        pairs: (query, object), those that were chosen.
        title: above the image.
        names: of the objects; None: their numbers.
    """
    image = load_image(image)
    names = [f"object {y}" for y in range(len(boxes))] if names is None else names
    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.85))
    draw(left, Panel(image))
    owner = dict(pairs)
    for (x0, y0, x1, y1), color in zip(boxes, cycle(REGIONS), strict=False):
        for edge, width in (("white", 4.5), (color, 2.5)):
            left.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=edge, lw=width))
    for k, place in enumerate(places):
        color = REGIONS[owner[k] % len(REGIONS)] if k in owner else "white"
        if k in owner:
            box = boxes[owner[k]]
            left.plot(*np.stack([place, (box[:2] + box[2:]) / 2]).T, color=color, lw=2.5)
        around = {"boxstyle": "circle", "fc": color, "alpha": 0.9}
        left.text(*place, str(k), ha="center", va="center", fontsize=9, color=_readable(color), bbox=around)
    left.set_title(_wrapped(title, 4.0), fontsize=10, parse_math=False)
    shown = right.imshow(costs, cmap="cividis_r", aspect="auto")
    for (k, y), cost in np.ndenumerate(costs):
        ink = _readable(shown.to_rgba(cost))
        right.text(y, k, f"{cost:.1f}", ha="center", va="center", fontsize=8, color=ink)
    for k, y in pairs:
        color = REGIONS[y % len(REGIONS)]
        right.add_patch(Rectangle((y - 0.47, k - 0.44), 0.94, 0.88, fill=False, ec=color, lw=3))
    right.set_xticks(range(len(boxes)), names, fontsize=8)
    right.set_yticks(range(len(costs)))
    right.set_ylabel("query")
    right.set_title("cost of each pair; frames: those taken", fontsize=10)
    return Picture(figure)


def _readable(color: str | tuple[float, ...]) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue, _ = to_rgba(color)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def _draw_queries(axes: Axes, queries: Queries) -> dict[str, Artist]:
    legend: dict[str, Artist] = {}
    count = len(queries.points)
    strength = np.ones(count)
    if queries.scores is not None:
        strength = np.clip(0.1 + 0.9 * (queries.scores / max(queries.scores.max(), 1e-9)) ** 2, 0, 1)
    for k in np.argsort(strength):  # the strongest on top
        color, alpha = REGIONS[k % 7], strength[k]  # all but black; neighbours on a grid of four rows differ
        for place, label in zip(queries.points[k], queries.labels[k], strict=True):
            name, marker, edge = ("positive point", "o", "black") if label else ("negative point", "X", "white")
            if queries.anchors is not None:
                axes.plot(*np.stack([queries.anchors[k], place]).T, color=color, lw=1.5, alpha=alpha)
            axes.plot(*place, marker, ms=8, mfc=color, mec=edge, mew=0.8, alpha=alpha)
            legend[name] = Line2D([], [], marker=marker, ls="", mfc="grey", mec=edge)
        if queries.anchors is not None:
            axes.plot(*queries.anchors[k], "+", color="black", ms=9, mew=2, alpha=alpha)
            legend["anchor"] = Line2D([], [], marker="+", ls="", color="black")
    return {name: legend[name] for name in ("anchor", "positive point", "negative point") if name in legend}


def fill(axes: Axes, mask: Bool[np.ndarray, "H W"], rgba: tuple[float, ...], extent: tuple[float, ...]) -> None:
    """Colour a part of a picture.

    Args:
        axes: with the picture.
        mask: the part.
        rgba: 0 to 1 each.
        extent: of the picture: left, right, bottom and top edge, in the axes' units.
    """
    small = np.asarray(_shrunk(Image.fromarray(mask)))
    area = np.zeros((*small.shape, 4))
    area[small] = rgba
    axes.imshow(area, extent=extent, interpolation="nearest")


def _outline(axes: Axes, mask: Bool[np.ndarray, "H W"], color: str, width: float) -> None:
    if not mask.any():  # nothing to go around
        return
    small = np.asarray(_shrunk(Image.fromarray(mask)))
    framed = np.pad(small, 1).astype(np.float32)  # so that a mask is closed at the image's border, too
    ys, xs = (
        (np.arange(-1, few + 1) + 0.5) * many / few - 0.5 for many, few in zip(mask.shape, small.shape, strict=True)
    )
    axes.contour(xs, ys, framed, levels=[0.5], colors=color, linewidths=width)


def _shrunk(image: Image.Image) -> Image.Image:
    factor = LONGEST / max(image.size)
    if factor >= 1:
        return image
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def _quoted(expression: str) -> str:
    return f"“{expression}”"


def _wrapped(title: str, inches: float) -> str:
    width = round(TITLE_WIDTH * inches / INCHES)
    lines = [line for part in title.splitlines() for line in textwrap.wrap(part, width)]
    # The last line is where verdicts stand: it stays, and what is too much is taken out before it.
    if len(lines) > TITLE_LINES:
        lines = [*lines[: TITLE_LINES - 2], lines[TITLE_LINES - 2][: width - 2] + " …", lines[-1]]
    return "\n".join(lines)
