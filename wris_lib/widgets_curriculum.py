"""A laboratory for training: slide through its stages, and see what one image and expression got at each.

    lab = StageLab("photo.jpg", "the dog on the left", {"untrained": first, "after stage 1": second})
    lab.show_stage(1)
    lab.ask("the cat")  # something else
    lab.render()

As in `wris_lib.widgets`, whatever a slider or a field does is a plain method, and a lab shows itself as the last line
of a cell.
"""

from collections.abc import Mapping

import ipywidgets
import numpy as np
from jaxtyping import Bool

from wris_lib.data.images import check_expression, load_image
from wris_lib.errors import WrisError
from wris_lib.evaluate import iou
from wris_lib.methods import Method, Prediction
from wris_lib.show import ImageSource, Panel, Picture, grid
from wris_lib.widgets import ROW, Lab


class StageLab(Lab):
    """What a method answered at each stage of its training: points, mask and score, one stage at a time.

    All stages are asked at once, so that the slider need not wait.

    Attributes:
        image: PIL, RGB.
        expression: what was asked for last.
        referent: [H, W], the ground truth of `expression`, or None.
        names: of the stages, in order.
        stage: number of the one that is shown, from 0.
        predictions: the answer of every stage.
    """

    expression: str
    referent: Bool[np.ndarray, "H W"] | None
    stage: int
    predictions: list[Prediction]

    def __init__(
        self,
        image: ImageSource,
        expression: str,
        stages: Mapping[str, Method],
        referent: Bool[np.ndarray, "H W"] | None = None,
    ) -> None:
        """Ask every stage, which is the slow part, and show the last.

        Args:
            image: whatever `load_image` takes.
            expression: "the dog on the left".
            stages: the method as it was at each stage, by the name that the slider shows.
            referent: if given, it is outlined, and masks are compared with it.

        Raises:
            WrisError: there is no stage; the image cannot be read; the expression is empty; the referent has another
                size than the image.
        """
        super().__init__()
        if not stages:
            raise WrisError("there is no stage to show; give at least one, such as {'untrained': method}.")
        self.image = load_image(image)
        self._methods = list(stages.values())
        self.names, self.stage = list(stages), len(stages) - 1
        self._slider = ipywidgets.SelectionSlider(
            options=[(name, number) for number, name in enumerate(self.names)],
            value=self.stage,
            description="stage",
            tooltip="stage of the training",
            layout={"width": "500px"},
        )
        self._text = ipywidgets.Text(
            continuous_update=False,  # that is: on Enter
            description="expression",
            tooltip="what to look for",
            layout={"width": "400px"},
        )
        self._slider.observe(lambda change: self._do(self.show_stage, change["new"]), "value")
        self._text.observe(lambda change: self._do(self.ask, change["new"]), "value")
        controls = ipywidgets.HBox([self._slider, self._text], layout=ROW)
        self.view = ipywidgets.VBox([controls, self._result, self._message])
        self.ask(expression, referent)

    def show_stage(self, number: int) -> None:
        """Show what a stage answered.

        Args:
            number: of the stage, from 0.

        Raises:
            WrisError: there is no such stage.
        """
        if number not in range(len(self.names)):
            raise WrisError(f"there is no stage {number}; choose one of 0 to {len(self.names) - 1}.")
        self.stage = number
        self._show()

    def ask(self, expression: str, referent: Bool[np.ndarray, "H W"] | None = None) -> None:
        """Ask every stage for another object of the image.

        Args:
            expression: "the dog on the left".
            referent: its ground truth, if known.

        Raises:
            WrisError: the expression is empty; the referent has another size than the image.
        """
        expression = check_expression(expression)
        width, height = self.image.size
        if referent is not None and referent.shape != (height, width):
            raise WrisError(
                f"the referent has the shape {referent.shape}; expected that of the image, {(height, width)}."
            )
        predictions = [method.predict(self.image, [expression])[0] for method in self._methods]
        # Only now: where a method failed, the lab stays as it was.
        self.expression, self.referent, self.predictions = expression, referent, predictions
        self._show()

    def panel(self, number: int) -> Panel:
        """Points and mask of a stage, under its name, score and IoU; `show.grid` puts several side by side."""
        answer = self.predictions[number]
        title = f"{self.names[number]}\nscore {answer.score:.2f}{self._worth(answer)}"
        return Panel(self.image, title, answer.mask, self.referent, None, answer.points, answer.point_labels)

    def render(self) -> Picture:
        """All points that the stage proposed, its response map, and the chosen points with their mask."""
        answer = self.predictions[self.stage]
        proposed = answer.trace[0] if answer.trace and answer.trace[0].points is not None else answer
        points = Panel(self.image, "all proposed points", points=proposed.points, point_labels=proposed.point_labels)
        response = Panel(self.image, f"“{self.expression}”\nresponse map", response_map=answer.response_map)
        return grid([points, response, self.panel(self.stage)], inches=2.6)

    def _worth(self, answer: Prediction) -> str:
        return "" if self.referent is None else f", IoU {iou(answer.mask, self.referent):.2f}"

    def _show(self) -> None:
        self._follow()
        self._result.value = self.render().jpeg
        answer = self.predictions[self.stage]
        self._say(
            f"{self.names[self.stage]}: score {answer.score:.2f}, the mask covers {answer.mask.mean():.0%} of the"
            f" image{self._worth(answer)}."
        )

    def _set_controls(self) -> None:
        self._slider.value, self._text.value = self.stage, self.expression
