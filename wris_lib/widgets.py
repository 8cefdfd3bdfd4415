"""Things to click in notebooks.

    PointLab("photo.jpg")                  click on the picture; SAM answers with its three masks
    ExpressionLab("photo.jpg")             type an expression; see response map, points and mask

A lab shows itself as the last line of a cell. All that its buttons do are plain methods, so that the same can be done,
and tested, without a browser:

    lab = PointLab("photo.jpg")
    lab.add_point(120, 80)
    lab.render()

A plain call raises its errors; a button shows them as a sentence below the picture.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import torch
import traitlets
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from wris_lib.backbones.sam import Segmenter, load_sam
from wris_lib.data.images import load_image
from wris_lib.errors import WrisError
from wris_lib.methods import Prediction, get_method, segment
from wris_lib.show import DPI, LONGEST, PREDICTION, ImageSource, Panel, Picture, draw, grid

INCHES = 2.1  # side of a panel: three of them and the picture to click on fit beside each other
ROW = {"flex_flow": "row wrap", "align_items": "center"}


class ClickablePicture(anywidget.AnyWidget):
    """A picture that sends a message {x, y, shift} for each click, x and y as shares of its width and height."""

    _esm = Path(__file__).parent / "static" / "clickable_picture.js"
    jpeg = traitlets.Bytes().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)


class Lab:
    """What the labs share: how they show themselves, and how they speak.

    Attributes:
        view: the widget; a subclass makes it.
    """

    view: ipywidgets.Widget

    def __init__(self) -> None:
        self._following = False
        self._message = ipywidgets.HTML()
        self._result = ipywidgets.Image(format="jpeg", layout={"max_width": "100%", "align_self": "flex-start"})

    def render(self) -> Picture:
        """The present result."""
        raise NotImplementedError

    def _say(self, sentence: str) -> None:
        self._message.value = f'<span role="status">{escape(sentence)}</span>'

    def _try(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Do what a button asks for. An error has no cell to show up in, hence it becomes a sentence in the widget."""
        self._say("working …")
        try:
            action(*arguments)
        except WrisError as error:
            self._say(f"✘ {error}")
        except Exception as error:
            call = f"{action.__name__}({', '.join(map(repr, arguments))})"
            reason = " ".join(str(error).split())
            self._say(f"✘ {type(error).__name__}: {reason}. Call {call} of the lab in a cell to see where.")

    def _set_controls(self) -> None:
        """Set the controls to how things stand; for labs whose functions change what controls show."""

    def _follow(self) -> None:
        """Let the controls show how things stand, which is no order to change anything."""
        self._following = True
        try:
            self._set_controls()
        finally:
            self._following = False

    def _do(self, action: Callable[..., Any], *arguments: Any) -> None:
        """What such a control asks for. After an error it goes back to where it was."""
        if not self._following:
            self._try(action, *arguments)
            self._follow()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return self.view._repr_mimebundle_(**kwargs)

    def _repr_jpeg_(self) -> bytes:
        """The still picture beside the widget, for readers who have no kernel, as on GitHub."""
        return self.render().jpeg


class PointLab(Lab):
    """Click on an image, and see the three masks that SAM offers for your points.

    A click is a positive point, a shift-click a negative one; there is a switch for both, and sliders for whoever
    has no mouse.

    Attributes:
        image: PIL, RGB.
        points: (x, y) in pixels of the image.
        labels: a 1 (positive) or 0 (negative) for each point.
        masks: [K, H, W] at image size, K is 3, or 0 as long as there is no point.
        predicted_iou: [K], SAM's own guess; the best is the chosen mask.
    """

    points: list[tuple[float, float]]
    labels: list[int]
    masks: Bool[np.ndarray, "k H W"]
    predicted_iou: Float[np.ndarray, "k"]

    def __init__(self, image: ImageSource, segmenter: Segmenter | None = None) -> None:
        """Embed the image, which is the slow part.

        Args:
            image: whatever `load_image` takes.
            segmenter: by default the SAM of the default stack.

        Raises:
            WrisError: the image cannot be read; SAM's checkpoint is missing or damaged.
        """
        super().__init__()
        self.image = load_image(image)
        self.segmenter = segmenter or load_sam()
        self._embedded = self.segmenter.embed(self.image)
        self._picture = ClickablePicture(alt="The image. Click on it, or set x and y below, to add a point.")
        self.view = self._build()
        self.clear()

    def add_point(self, x: float | int, y: float | int, positive: bool = True) -> None:
        """Add a point and ask SAM again.

        Args:
            x: pixel column, from the left.
            y: pixel row, from the top.
            positive: whether the point is on the object that is meant.

        Raises:
            WrisError: the point is outside the image.
        """
        width, height = self.image.size
        if not (0 <= x < width and 0 <= y < height):
            raise WrisError(
                f"the point ({x:g}, {y:g}) is outside the image; x goes from 0 to {width - 1} and y from 0 to"
                f" {height - 1}."
            )
        self._set_points([*self.points, (float(x), float(y))], [*self.labels, int(positive)])

    def undo(self) -> None:
        """Take back the last point, if there is one."""
        self._set_points(self.points[:-1], self.labels[:-1])

    def clear(self) -> None:
        """Take back all points."""
        self._set_points([], [])

    def render(self) -> Picture:
        """The masks side by side with their predicted IoU, the chosen one framed; without points the image alone."""
        if not self.points:
            return grid([Panel(self.image)], inches=INCHES)
        best = self.predicted_iou.argmax()
        panels = [
            Panel(self.image, f"mask {k + 1}{', chosen' if k == best else ''}\npredicted IoU {iou:.2f}", mask)
            for k, (mask, iou) in enumerate(zip(self.masks, self.predicted_iou, strict=True))
        ]
        picture = grid(panels, inches=INCHES)
        picture.figure.axes[best].spines[:].set(visible=True, color=PREDICTION, linewidth=4)
        return picture

    def _set_points(self, points: list[tuple[float, float]], labels: list[int]) -> None:
        width, height = self.image.size
        masks, predicted_iou = np.zeros((0, height, width), bool), np.zeros(0, np.float32)
        if points:
            prompt = torch.tensor([points], dtype=torch.float32), torch.tensor([labels])
            decoded = self.segmenter.decode(self._embedded, *prompt)
            masks = self.segmenter.masks(self._embedded, decoded)[0]
            predicted_iou = decoded.iou[0].float().cpu().numpy()
        # Only now: where SAM failed, the lab stays as it was.
        self.points, self.labels, self.masks, self.predicted_iou = points, labels, masks, predicted_iou
        self._picture.jpeg = self._draw_picture().jpeg
        self._result.layout.display = None if points else "none"
        if not points:
            self._say("Click on the object; shift-click on what does not belong to it.")
            return
        self._result.value = self.render().jpeg
        guesses = ", ".join(f"{iou:.2f}" for iou in predicted_iou)
        self._say(
            f"{sum(labels)} positive and {len(labels) - sum(labels)} negative points; predicted IoU {guesses}: SAM "
            f"chooses mask {predicted_iou.argmax() + 1}."
        )

    def _draw_picture(self) -> Picture:
        """Image, points and chosen mask without any margin, so that a share of the picture is a share of the image."""
        width, height = self.image.size
        scale = LONGEST / max(width, height) / DPI
        figure = Figure(figsize=(max(width * scale, 0.05), max(height * scale, 0.05)))
        axes = figure.add_axes((0, 0, 1, 1))
        mask = self.masks[self.predicted_iou.argmax()] if self.points else None
        points = np.array(self.points, np.float32).reshape(-1, 2)
        draw(axes, Panel(self.image, mask=mask, points=points, point_labels=np.array(self.labels, np.int64)))
        axes.set_aspect("auto")
        for markers in axes.lines:  # larger than elsewhere: they have just been set by hand
            markers.set_markersize(10)
        return Picture(figure)

    def _build(self) -> ipywidgets.Widget:
        width, height = self.image.size
        positive = ipywidgets.ToggleButtons(
            options={"Positive": True, "Negative": False},
            tooltips=["the point is on the object", "the point is not on the object"],
            style={"button_width": "80px"},
        )
        undo, clear, add = (
            ipywidgets.Button(description=name, layout={"width": "80px"}) for name in ("Undo", "Clear", "Add")
        )
        x, y = (
            ipywidgets.IntSlider(size // 2, 0, size - 1, description=name, tooltip=tooltip, layout={"width": "260px"})
            for name, tooltip, size in (("x", "pixels from the left", width), ("y", "pixels from the top", height))
        )
        add.tooltip = "add a point at x and y"

        def clicked(_: Any, at: dict[str, Any], __: Any) -> None:
            column, row = min(int(at["x"] * width), width - 1), min(int(at["y"] * height), height - 1)
            self._try(self.add_point, column, row, positive.value and not at["shift"])

        self._picture.on_msg(clicked)
        add.on_click(lambda _: self._try(self.add_point, x.value, y.value, positive.value))
        undo.on_click(lambda _: self._try(self.undo))
        clear.on_click(lambda _: self._try(self.clear))
        return ipywidgets.VBox(
            [
                ipywidgets.HBox([self._picture, self._result], layout=ROW),
                ipywidgets.HBox([positive, undo, clear], layout=ROW),
                ipywidgets.HBox([x, y, add], layout=ROW),
                self._message,
            ]
        )


class ExpressionLab(Lab):
    """Type an expression, and see what a method makes of it: its response map, its points and its mask.

    Attributes:
        image: PIL, RGB.
        expression: what was asked for last; empty before.
        variant: of the method, such as "plain" or "surgery".
        prediction: the answer, or None. `show.stages(lab.image, lab.prediction, lab.expression)` tells more.
    """

    def __init__(self, image: ImageSource, method: str = "clip_sam", stack: str | None = None) -> None:
        """Show the image; models are loaded when the first expression comes.

        Args:
            image: whatever `load_image` takes.
            method: key of `METHODS`; its variants are offered for choice.
            stack: "toy" or "paper"; by default $WRIS_STACK, or "toy".

        Raises:
            WrisError: the image cannot be read, or there is no such method.
        """
        super().__init__()
        self.image = load_image(image)
        self.method, self.stack = method, stack
        self.variants = get_method(method).variants
        self.expression, self.variant = "", next(iter(self.variants))
        self.prediction: Prediction | None = None
        self._text = ipywidgets.Text(
            placeholder="the man in the green shirt",
            continuous_update=False,  # that is: on Enter
            tooltip="expression",
            layout={"width": "400px"},
        )
        self._choice = ipywidgets.ToggleButtons(options=list(self.variants), style={"button_width": "80px"})
        self._text.observe(self._asked, "value")
        self._choice.observe(self._asked, "value")
        controls = ipywidgets.HBox([self._text, self._choice], layout=ROW)
        self.view = ipywidgets.VBox([controls, self._result, self._message])
        self._result.value = self.render().jpeg
        self._say("Type an expression and press Enter.")

    def find(self, expression: str, variant: str | None = None) -> Prediction:
        """Segment what the expression refers to.

        Args:
            expression: "the man in the green shirt".
            variant: by default the present one.

        Raises:
            WrisError: the expression is empty; there is no such variant; the stack's weights are missing or damaged.
        """
        variant = variant or self.variant
        if variant not in self.variants:
            raise WrisError(f"{self.method} has no variant {variant!r}; choose one of: {', '.join(self.variants)}.")
        self.prediction = segment(self.image, expression, self.method, self.stack, **self.variants[variant])
        self.expression, self.variant = expression, variant
        for control, value in ((self._text, expression), (self._choice, variant)):
            control.unobserve(self._asked, "value")  # setting it here is no new question
            control.value = value
            control.observe(self._asked, "value")
        self._result.value = self.render().jpeg
        share = self.prediction.mask.mean()
        self._say(f"{variant}: the mask covers {share:.0%} of the image; confidence {self.prediction.score:.2f}.")
        return self.prediction

    def render(self) -> Picture:
        """Response map, points and mask side by side; before the first expression the image alone."""
        prediction = self.prediction
        if prediction is None:
            return grid([Panel(self.image)], inches=INCHES)
        points = {"points": prediction.points, "point_labels": prediction.point_labels}
        return grid(
            [
                Panel(self.image, f"response map, {self.variant}", response_map=prediction.response_map),
                Panel(self.image, "points", **points),
                Panel(self.image, f"mask, confidence {prediction.score:.2f}", mask=prediction.mask),
            ]
        )

    def _asked(self, _: Any) -> None:
        self._try(self.find, self._text.value, self._choice.value)
