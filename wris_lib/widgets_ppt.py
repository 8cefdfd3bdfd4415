"""A laboratory for PPT's prompts: take a query's points into your own hands, and see SAM answer.

    lab = PromptLab("photo.jpg", "the dog on the left")
    lab.choose_query(5)
    lab.move(0, 120, 80)  # point 0 to x 120, y 80
    lab.toggle(1)
    lab.render()

As in `wris_lib.widgets`, whatever a click or a slider does is a plain method, and a lab shows itself as the last line
of a cell.
"""

from typing import Any

import ipywidgets
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from wris_lib.backbones.sam import SamMasks
from wris_lib.data.images import check_expression, load_image
from wris_lib.errors import WrisError
from wris_lib.evaluate import iou
from wris_lib.methods import load_method
from wris_lib.methods.ppt import Ppt
from wris_lib.methods.ppt.prompts import PointPrompts, best_logits, point_labels
from wris_lib.show import DPI, LONGEST, ImageSource, Panel, Picture, draw, grid
from wris_lib.widgets import INCHES, ROW, ClickablePicture, Lab


class PromptLab(Lab):
    """Move the points of a generator's prompt, make them positive or negative, and see SAM's mask change.

    A click moves the chosen point there, a shift-click turns the nearest point's label around; there are buttons and
    sliders for whoever has no mouse. Image and words are encoded once, so that SAM answers at once.

    Attributes:
        image: PIL, RGB.
        expression: what the generator was asked for.
        referent: [H, W], the ground truth, or None.
        prompts: all that the generator proposes, 1 expression × K queries × M points.
        query: k of the prompt at hand, 0..K-1; at first the one with the highest score.
        point: m of the chosen point, 0..M-1, which a click moves.
        points: [M, 2] as (x, y) in pixels of the image.
        labels: [M], 1 positive, 0 negative.
        mask: [H, W], SAM's answer to these points.
    """

    query: int
    point: int
    points: Float[np.ndarray, "m 2"]
    labels: Int[np.ndarray, " m"]
    mask: Bool[np.ndarray, "H W"]

    def __init__(
        self,
        image: ImageSource,
        expression: str,
        method: Ppt | None = None,
        referent: Bool[np.ndarray, "H W"] | None = None,
    ) -> None:
        """Encode the image and ask the generator, which is the slow part.

        Args:
            image: whatever `load_image` takes.
            expression: "the dog on the left".
            method: with a generator of any kind, also an untrained one, that shows SAM negative points too; by default
                the trained one of the default stack.
            referent: if given, it is outlined, and masks are compared with it.

        Raises:
            WrisError: the image cannot be read; the expression is empty; the referent has another size than the image;
                the stack's weights are missing or damaged.
        """
        super().__init__()
        self.image, self.expression = load_image(image), check_expression(expression)
        width, height = self.image.size
        if referent is not None and referent.shape != (height, width):
            raise WrisError(
                f"the referent has the shape {referent.shape}; expected that of the image, {(height, width)}."
            )
        self.referent = referent
        self.method = method or load_method("ppt", negatives=True)
        self.prompts = self.method.prompts(self.image, [self.expression])
        self._embedded = self.method.sam.embed(self.image)
        self._picture = ClickablePicture(alt="The image. Click on it, or set x and y below, to move the chosen point.")
        self.view = self._build()
        self.choose_query(int(self.prompts.score_logits[0].argmax()))

    @property
    def iou(self) -> float | None:
        """Of the mask with the referent, 0..1; None without a referent."""
        return None if self.referent is None else iou(self.mask, self.referent)

    def choose_query(self, k: int) -> None:
        """Take a query's prompt as the generator proposes it; what was changed before is forgotten.

        Args:
            k: 0..K-1.

        Raises:
            WrisError: there is no such query.
        """
        queries = self.prompts.score_logits.shape[1]
        if k not in range(queries):
            raise WrisError(f"there is no query {k}; choose one of 0 to {queries - 1}.")
        points = (self.prompts.points[0, k].cpu() * torch.tensor(self.image.size)).numpy()
        labels = point_labels(self.prompts.label_logits[0, k]).cpu().numpy()
        self._proposed = points, labels, self._ask(points, labels)
        self.point = 0
        self._set(k, *self._proposed)

    def choose_point(self, point: int) -> None:
        """Choose the point that a click, or a slider, moves.

        Args:
            point: its number, 0..M-1.

        Raises:
            WrisError: there is no such point.
        """
        self._check_point(point)
        self.point = point
        self._show()

    def move(self, point: int, x: float | int, y: float | int) -> None:
        """Move a point and ask SAM again.

        Args:
            point: its number, 0..M-1.
            x: pixel column, from the left.
            y: pixel row, from the top.

        Raises:
            WrisError: there is no such point; the place is outside the image.
        """
        self._check_point(point)
        width, height = self.image.size
        if not (0 <= x < width and 0 <= y < height):
            raise WrisError(
                f"the place ({x:g}, {y:g}) is outside the image; x goes from 0 to {width - 1} and y from 0 to"
                f" {height - 1}."
            )
        points = self.points.copy()
        points[point] = x, y
        self._set(self.query, points, self.labels, self._ask(points, self.labels))

    def toggle(self, point: int) -> None:
        """Make a positive point negative, or a negative one positive, and ask SAM again.

        Raises:
            WrisError: there is no such point; it is the last positive one.
        """
        self._check_point(point)
        labels = self.labels.copy()
        labels[point] = 1 - labels[point]
        if not labels.any():
            raise WrisError("SAM needs a positive point to know what to take; make another one positive first.")
        self._set(self.query, self.points, labels, self._ask(self.points, labels))

    def reset(self) -> None:
        """Take back all changes to the query's prompt."""
        self._set(self.query, *self._proposed)

    def render(self) -> Picture:
        """The generator's own prompt, and the present one, side by side."""
        panels = []
        for name, (points, labels, mask) in (
            (f"query {self.query}: the generator", self._proposed),
            ("you", (self.points, self.labels, self.mask)),
        ):
            worth = "" if self.referent is None else f"\nIoU {iou(mask, self.referent):.2f}"
            panels.append(Panel(self.image, name + worth, mask, self.referent, None, points, labels))
        return grid(panels, inches=INCHES)

    def _check_point(self, point: int) -> None:
        if point not in range(len(self.points)):
            raise WrisError(f"there is no point {point}; choose one of 0 to {len(self.points) - 1}.")

    @torch.no_grad()
    def _ask(self, points: Float[np.ndarray, "m 2"], labels: Int[np.ndarray, " m"]) -> Bool[np.ndarray, "H W"]:
        """SAM's mask for one prompt, in the way the method asks it."""
        sam = self.method.sam
        shares = torch.from_numpy(points) / torch.tensor(self.image.size)
        signs = torch.from_numpy(labels * 2.0 - 1).float()
        prompt = (tensor[None, None].to(sam.device) for tensor in (shares, signs, torch.tensor(0.0)))
        decoded = self.method.masks(self._embedded, PointPrompts(*prompt))
        return sam.masks(self._embedded, SamMasks(best_logits(decoded)[:, None], decoded.iou[:, :1]))[0, 0]

    def _set(
        self,
        query: int,
        points: Float[np.ndarray, "m 2"],
        labels: Int[np.ndarray, " m"],
        mask: Bool[np.ndarray, "H W"],
    ) -> None:
        self.query, self.points, self.labels, self.mask = query, points, labels, mask
        self._result.value = self.render().jpeg
        self._show()

    def _show(self) -> None:
        self._follow()
        self._picture.jpeg = self._draw_picture().jpeg
        positive = int(self.labels.sum())
        worth = f"the mask covers {self.mask.mean():.0%} of the image"
        if self.referent is not None:
            worth = f"IoU {self.iou:.2f}, with the generator's own points {iou(self._proposed[2], self.referent):.2f}"
        self._say(
            f"Query {self.query}, {positive} positive and {len(self.labels) - positive} negative points: {worth}."
        )

    def _set_controls(self) -> None:
        self._query.value, self._point.value = self.query, self.point
        self._label.value = int(self.labels[self.point])
        for slider, place in zip((self._x, self._y), self.points[self.point], strict=True):
            slider.value = int(place)

    def _draw_picture(self) -> Picture:
        """Image, mask and numbered points without any margin, so that a share of the picture is one of the image."""
        width, height = self.image.size
        scale = LONGEST / max(width, height) / DPI
        figure = Figure(figsize=(max(width * scale, 0.05), max(height * scale, 0.05)))
        axes = figure.add_axes((0, 0, 1, 1))
        draw(axes, Panel(self.image, "", self.mask, self.referent, None, self.points, self.labels))
        axes.set_aspect("auto")
        for markers in axes.lines:
            markers.set_markersize(13)
        for number, (place, label) in enumerate(zip(self.points, self.labels, strict=True)):
            if number == self.point:
                axes.plot(*place, "o", ms=21, mfc="none", mec="white", mew=4)
                axes.plot(*place, "o", ms=21, mfc="none", mec="black", mew=1.5)
            color = "black" if label else "white"
            axes.text(*place, str(number), ha="center", va="center", color=color, fontsize=9, fontweight="bold")
        return Picture(figure)

    def _build(self) -> ipywidgets.Widget:
        width, height = self.image.size
        scores = self.prompts.score_logits[0].sigmoid().tolist()
        number = self.prompts.points.shape[2]
        self._query = ipywidgets.Dropdown(
            options=[(f"{k}, score {scores[k]:.2f}", k) for k in np.argsort(scores)[::-1].tolist()],
            description="query",
            tooltip="the query whose points are shown",
            layout={"width": "220px"},
        )
        self._point = ipywidgets.ToggleButtons(
            options=range(number),
            description="point",
            tooltip="the point to be moved",
            tooltips=["the point to be moved"] * number,
        )
        self._point.style.button_width = "40px"
        self._label = ipywidgets.ToggleButtons(
            options={"Positive": 1, "Negative": 0},
            tooltips=["the point is on the object", "the point is not on the object"],
            style={"button_width": "80px"},
        )
        self._x, self._y = (
            ipywidgets.IntSlider(
                0,
                0,
                most - 1,
                description=name,
                tooltip=tooltip,
                continuous_update=False,
                layout={"width": "260px"},
            )
            for name, tooltip, most in (("x", "pixels from the left", width), ("y", "pixels from the top", height))
        )
        reset = ipywidgets.Button(description="Reset", layout={"width": "80px"}, tooltip="the generator's own points")

        def clicked(_: Any, at: dict[str, Any], __: Any) -> None:
            x, y = min(int(at["x"] * width), width - 1), min(int(at["y"] * height), height - 1)
            if at["shift"]:
                self._do(self.toggle, int(np.hypot(*(self.points - (x, y)).T).argmin()))
            else:
                self._do(self.move, self.point, x, y)

        self._picture.on_msg(clicked)
        self._query.observe(lambda change: self._do(self.choose_query, change["new"]), "value")
        self._point.observe(lambda change: self._do(self.choose_point, change["new"]), "value")
        self._label.observe(lambda _: self._do(self.toggle, self.point), "value")
        self._x.observe(lambda _: self._do(self.move, self.point, self._x.value, self._y.value), "value")
        self._y.observe(lambda _: self._do(self.move, self.point, self._x.value, self._y.value), "value")
        reset.on_click(lambda _: self._do(self.reset))
        return ipywidgets.VBox(
            [
                ipywidgets.HBox([self._picture, self._result], layout=ROW),
                ipywidgets.HBox([self._query, reset], layout=ROW),
                ipywidgets.HBox([self._point, self._label], layout=ROW),
                ipywidgets.HBox([self._x, self._y], layout=ROW),
                self._message,
            ]
        )
