"""A picture and a sentence of your own, and what every method makes of them.

    CompareLab("photo.jpg")                upload another picture, type a sentence, see all answers side by side

By functions, without a browser:

    lab = CompareLab("photo.jpg")
    lab.find("the man on the left")
    lab.render()
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
from PIL import Image

from wris_lib.contestants import ORACLE, Contestant, contestants, everyone
from wris_lib.data.images import check_expression, load_image
from wris_lib.errors import WrisError
from wris_lib.methods import Prediction, load_method
from wris_lib.show import ImageSource, Panel, Picture, grid
from wris_lib.widgets import INCHES, ROW, Lab


class CompareLab(Lab):
    """Upload a picture, type an expression, and see the masks of all methods side by side.

    Attributes:
        image: PIL, RGB.
        expression: what was asked for last; empty before.
        rows: names of the methods, as in the benchmark's table.
        predictions: by these names the answers so far.
        seconds: that each of them took, models already loaded or not.
    """

    image: Image.Image

    def __init__(self, image: ImageSource, rows: Sequence[str] | None = None, stack: str | None = None) -> None:
        """Show the image; models are loaded when the first expression comes.

        Args:
            image: whatever `load_image` takes.
            rows: of the benchmark's table, such as "clip_sam plain". None: every method for which the stack has the
                models, with its default options.
            stack: "toy" or "paper"; by default $WRIS_STACK, or "toy".

        Raises:
            WrisError: the image cannot be read; there is no such row or stack; the stack's weights are missing.
        """
        super().__init__()
        self.stack = stack
        if rows is None:
            self._contestants = [Contestant(name, name) for name in everyone(stack)[0] if name != ORACLE]
        else:
            self._contestants = [contestants(name)[0] for name in rows]
        self.rows = [each.name for each in self._contestants]
        self.expression = ""
        self.predictions: dict[str, Prediction] = {}
        self.seconds: dict[str, float] = {}
        self._text = ipywidgets.Text(
            placeholder="the man in the green shirt",
            continuous_update=False,  # that is: on Enter
            tooltip="expression",
            layout={"width": "400px"},
        )
        self._upload = ipywidgets.FileUpload(
            accept="image/*", multiple=False, description="Upload a picture", tooltip="a file of your own"
        )
        self._upload.layout.width = "180px"
        self._text.observe(lambda change: self._do(self.find, change["new"]), "value")
        self._upload.observe(lambda change: self._try(self._uploaded, change["new"]), "value")
        controls = ipywidgets.HBox([self._upload, self._text], layout=ROW)
        self.view = ipywidgets.VBox([controls, self._message, self._result])
        self.set_image(image)

    def set_image(self, image: ImageSource) -> None:
        """Ask about another picture.

        Args:
            image: whatever `load_image` takes.

        Raises:
            WrisError: the image cannot be read.
        """
        self.image = load_image(image)
        self.expression, self.predictions, self.seconds = "", {}, {}
        self._result.value = self.render().jpeg
        self._follow()
        self._say("Type an expression and press Enter.")

    def find(self, expression: str) -> dict[str, Prediction]:
        """Ask all methods for what the expression refers to, one after the other; each answer is shown as it comes.

        Args:
            expression: "the man in the green shirt".

        Returns:
            By the methods' names their answers.

        Raises:
            WrisError: the expression is empty; the stack's weights are missing or damaged.
        """
        expression = check_expression(expression)
        self.expression, self.predictions, self.seconds = expression, {}, {}
        self._follow()
        for number, row in enumerate(self._contestants):
            self._say(f"working … {row.name} is asked, number {number + 1} of {len(self._contestants)}")
            start = time.perf_counter()
            method = load_method(row.method, self.stack, **row.options)
            (self.predictions[row.name],) = method.predict(self.image, [expression])
            self.seconds[row.name] = time.perf_counter() - start
            self._result.value = self.render().jpeg
        self._say(f"“{expression}”: {len(self.rows)} answers in {sum(self.seconds.values()):.1f} seconds.")
        return self.predictions

    def render(self) -> Picture:
        """The image, and beside it the masks that have come so far."""
        panels = [Panel(self.image, f"“{self.expression}”" if self.expression else "")]
        for name, prediction in self.predictions.items():
            share = prediction.mask.mean()
            title = f"{name}\n{share:.0%} of the image" if share else f"{name}\nan empty mask"
            points = {"points": prediction.points, "point_labels": prediction.point_labels}
            panels.append(Panel(self.image, title, mask=prediction.mask, **points))
        return grid(panels, inches=INCHES)

    def _set_controls(self) -> None:
        self._text.value = self.expression

    def _uploaded(self, files: Sequence[dict[str, Any]]) -> None:
        """Take what the upload button has received: the content lies in memory, and a picture is read from a file."""
        if not files:
            return
        (file,) = files
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / (Path(file["name"]).name or "upload")
            path.write_bytes(file["content"])
            try:
                self.set_image(path)
            except WrisError as error:
                raise WrisError(str(error).replace(str(path), file["name"])) from error
