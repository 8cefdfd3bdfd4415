"""A laboratory for PCNet's cues: change what a sentence is taken apart into, and see where the image answers.

    lab = CueLab("photo.jpg", "the dog on the left")
    lab.set_cue(1, "a cat")
    lab.move(2, 1)  # the second cue goes first
    lab.render()

As in `wris_lib.widgets`, whatever a field, a button or a slider does is a plain method, and a lab shows itself as the
last line of a cell. Cues and stages count from 1, as in the pictures.
"""

from collections.abc import Sequence

import ipywidgets
import numpy as np
from jaxtyping import Bool, Float

from wris_lib.data.images import check_expression, load_image
from wris_lib.errors import WrisError
from wris_lib.evaluate import iou
from wris_lib.methods import Prediction, load_method
from wris_lib.methods.pcnet import PcNet
from wris_lib.methods.pcnet.decompose import CUES, decompose, repeat
from wris_lib.methods.pcnet.vision import see
from wris_lib.show import PREDICTION, ImageSource, Panel, Picture, grid
from wris_lib.widgets import ROW, Lab

STRONG = 0.5  # of a response map, which goes from 0 to 1


class CueLab(Lab):
    """Write, move and delete the cues of a sentence, and see the response map of every stage, and the mask, change.

    CLIP and SAM look at the image once, so that every change is answered at once. Stage 1 reads the first cue, stage 2
    the second, and so on: a list that is too short is repeated, and what is left of one that is too long is not read.

    Attributes:
        image: PIL, RGB.
        sentence: what is looked for.
        referent: [H, W], the ground truth of `sentence`, or None.
        cues: at least one, in the order in which stages read them.
        suggested: the language model's, or the method's own where it has some.
        stages: how many cues are read.
        stage: the one that is framed, 1..stages; at first the last.
        prediction: the answer to sentence and cues.
    """

    sentence: str
    referent: Bool[np.ndarray, "H W"] | None
    cues: tuple[str, ...]
    suggested: tuple[str, ...]
    prediction: Prediction

    def __init__(
        self,
        image: ImageSource,
        expression: str,
        method: PcNet | None = None,
        referent: Bool[np.ndarray, "H W"] | None = None,
    ) -> None:
        """Encode the image and ask the language model, which is the slow part.

        Args:
            image: whatever `load_image` takes.
            expression: "the dog on the left".
            method: with a module of at least one stage; by default the trained one of the default stack.
            referent: if given, it is outlined, and masks are compared with it.

        Raises:
            WrisError: the image cannot be read; the expression is empty; the referent has another size than the image;
                the method reads no cues; the stack's weights are missing or damaged; the language model does not
                answer.
        """
        super().__init__()
        self.image = load_image(image)
        self.method = method or load_method("pcnet")
        self.stages = self.stage = self.method.crm.config.stages
        if not self.stages:
            raise WrisError(f"{self.method.name} reads no cues, so there is nothing to change; give it a PCNet.")
        self._visual, self._grid = see(self.method.clip, [self.image])
        self._embedded = self.method.sam.embed(self.image)
        self._rows: list[ipywidgets.HBox] = []
        self.view = self._build()
        self.set_sentence(expression, referent)

    @property
    def iou(self) -> float | None:
        """Of the mask with the referent, 0..1; None without a referent."""
        return None if self.referent is None else iou(self.prediction.mask, self.referent)

    def set_sentence(self, text: str, referent: Bool[np.ndarray, "H W"] | None = None) -> None:
        """Look for something else, with the cues that the language model suggests for it.

        Args:
            text: "the dog on the left".
            referent: its ground truth, if known.

        Raises:
            WrisError: the text is empty; the referent has another size than the image; the language model does not
                answer.
        """
        sentence = check_expression(text)
        width, height = self.image.size
        if referent is not None and referent.shape != (height, width):
            raise WrisError(
                f"the referent has the shape {referent.shape}; expected that of the image, {(height, width)}."
            )
        suggested = self._suggest(sentence)
        prediction = self._ask(sentence, suggested)
        # Only now: where a model failed, the lab stays as it was.
        self.sentence, self.referent, self.suggested = sentence, referent, suggested
        self._by_suggestion = prediction
        self._set(suggested, prediction)

    def set_cue(self, number: int, text: str) -> None:
        """Write another text in place of a cue.

        Args:
            number: of the cue, from 1.
            text: "a dog".

        Raises:
            WrisError: there is no such cue; the text is empty.
        """
        self._check(number)
        cues = list(self.cues)
        cues[number - 1] = _checked(text)
        self._change(cues)

    def move(self, number: int, to: int) -> None:
        """Put a cue elsewhere in the order.

        Args:
            number: of the cue, from 1.
            to: its number afterwards; those between move up or down by one.

        Raises:
            WrisError: there is no such cue, or no such place.
        """
        self._check(number)
        self._check(to)
        cues = list(self.cues)
        cues.insert(to - 1, cues.pop(number - 1))
        self._change(cues)

    def delete(self, number: int) -> None:
        """Leave a cue out.

        Args:
            number: of the cue, from 1.

        Raises:
            WrisError: there is no such cue; it is the only one.
        """
        self._check(number)
        if len(self.cues) == 1:
            raise WrisError("the last cue cannot be deleted, for every stage reads one; write another text instead.")
        self._change([*self.cues[: number - 1], *self.cues[number:]])

    def add(self, text: str) -> None:
        """Put a new cue behind the others.

        Raises:
            WrisError: the text is empty.
        """
        self._change([*self.cues, _checked(text)])
        self._new.value = ""

    def reset(self) -> None:
        """Take back all changes to the cues."""
        self._set(self.suggested, self._by_suggestion)

    def choose_stage(self, number: int) -> None:
        """Frame the response map of a stage.

        Args:
            number: of the stage, from 1.

        Raises:
            WrisError: there is no such stage.
        """
        if number not in range(1, self.stages + 1):
            raise WrisError(f"there is no stage {number}; choose one of 1 to {self.stages}.")
        self.stage = number
        self._show()

    def maps(self) -> list[Float[np.ndarray, "h w"]]:
        """The response map of every stage, 0..1, in the resolution that CLIP has."""
        return [stage.response_map for stage in self.prediction.trace[: self.stages]]

    def render(self) -> Picture:
        """The mask, then the response map of every stage, the chosen one framed."""
        answer = self.prediction
        worth = f"mask covers {answer.mask.mean():.0%}" if self.referent is None else f"mask, IoU {self.iou:.2f}"
        points = answer.points, answer.point_labels
        panels = [Panel(self.image, f"“{self.sentence}”\n{worth}", answer.mask, self.referent, None, *points)]
        for number, (cue, response) in enumerate(zip(self._read(), self.maps(), strict=True), start=1):
            title = f"stage {number}: “{cue}”\nabove {STRONG:g} on {_strong(response):.0%} of the image"
            panels.append(Panel(self.image, title, None, self.referent, response))
        picture = grid(panels)
        picture.figure.axes[self.stage].spines[:].set(visible=True, color=PREDICTION, linewidth=4)
        return picture

    def _read(self) -> tuple[str, ...]:
        """The cue of every stage."""
        return repeat(self.cues, self.stages)

    def _check(self, number: int) -> None:
        if number not in range(1, len(self.cues) + 1):
            raise WrisError(f"there is no cue {number}; choose one of 1 to {len(self.cues)}.")

    def _suggest(self, sentence: str) -> tuple[str, ...]:
        method = self.method
        if method.cues is not None:
            return method.cues
        (found,) = decompose([sentence], method.llm, method.parser, max(CUES, self.stages))
        return _unrepeated(found.phrases)

    def _ask(self, sentence: str, cues: Sequence[str]) -> Prediction:
        return self.method.answer(self._visual, self._grid, self._embedded, [sentence], [cues])[0]

    def _change(self, cues: Sequence[str]) -> None:
        self._set(tuple(cues), self._ask(self.sentence, cues))

    def _set(self, cues: tuple[str, ...], prediction: Prediction) -> None:
        self.cues, self.prediction = cues, prediction
        self._show()

    def _show(self) -> None:
        self._follow()
        self._result.value = self.render().jpeg
        worth = f"the mask covers {self.prediction.mask.mean():.0%} of the image"
        if self.referent is not None:
            worth = f"IoU {self.iou:.2f}, with the suggested cues {iou(self._by_suggestion.mask, self.referent):.2f}"
        # The note of the trace has the cue, and says if it seems to be about something else.
        note, response = self.prediction.trace[self.stage - 1].note, self.maps()[self.stage - 1]
        self._say(
            f"Stage {self.stage} reads {note}: its map is above {STRONG:g} on {_strong(response):.0%} of the image. In"
            f" the end {worth}."
        )

    def _set_controls(self) -> None:
        self._text.value, self._slider.value = self.sentence, self.stage
        while len(self._rows) < len(self.cues):
            self._rows.append(self._row(len(self._rows) + 1))
        rows = self._rows[: len(self.cues)]
        for number, (row, cue) in enumerate(zip(rows, self.cues, strict=True), start=1):
            reader, field, _, _ = row.children
            reader.value, field.value = self._readers(number), cue
        self._list.children = rows

    def _readers(self, number: int) -> str:
        """Which stages read a cue."""
        stages = [str(stage + 1) for stage in range(self.stages) if stage % len(self.cues) == number - 1]
        if not stages:
            return "not read"
        return f"stage{'s' if len(stages) > 1 else ''} {', '.join(stages)}"

    def _row(self, number: int) -> ipywidgets.HBox:
        """The line of a cue: who reads it, its text, and what can be done with it."""
        reader = ipywidgets.Label(layout={"width": "90px"})
        field = ipywidgets.Text(
            continuous_update=False,  # that is: on Enter
            tooltip=f"cue {number}",
            layout={"width": "400px"},
        )
        up, delete = (
            ipywidgets.Button(description=name, tooltip=tooltip, layout={"width": "80px"})
            for name, tooltip in (("Up", f"move cue {number} up"), ("Delete", f"delete cue {number}"))
        )
        up.disabled = number == 1
        field.observe(lambda change: self._do(self.set_cue, number, change["new"]), "value")
        up.on_click(lambda _: self._do(self.move, number, number - 1))
        delete.on_click(lambda _: self._do(self.delete, number))
        return ipywidgets.HBox([reader, field, up, delete], layout=ROW)

    def _build(self) -> ipywidgets.Widget:
        self._text = ipywidgets.Text(
            continuous_update=False,  # that is: on Enter
            description="sentence",
            tooltip="what to look for",
            layout={"width": "490px"},
        )
        self._list = ipywidgets.VBox()
        self._new = ipywidgets.Text(placeholder="another cue", tooltip="another cue", layout={"width": "400px"})
        add, reset = (
            ipywidgets.Button(description=name, tooltip=tooltip, layout={"width": "80px"})
            for name, tooltip in (("Add", "put it behind the others"), ("Reset", "the suggested cues"))
        )
        self._slider = ipywidgets.IntSlider(
            self.stage,
            1,
            self.stages,
            description="stage",
            tooltip="the stage that is framed",
            layout={"width": "300px"},
        )
        reads = "1 cue" if self.stages == 1 else f"{self.stages} cues"
        rule = ipywidgets.Label(f"The method reads {reads}: fewer are repeated, more are not read.")
        self._text.observe(lambda change: self._do(self.set_sentence, change["new"]), "value")
        self._slider.observe(lambda change: self._do(self.choose_stage, change["new"]), "value")
        add.on_click(lambda _: self._do(self.add, self._new.value))
        reset.on_click(lambda _: self._do(self.reset))
        beside = ipywidgets.Label(layout={"width": "90px"})  # so that fields stand in line
        return ipywidgets.VBox(
            [
                self._text,
                rule,
                self._list,
                ipywidgets.HBox([beside, self._new, add, reset], layout=ROW),
                self._slider,
                self._result,
                self._message,
            ]
        )


def _checked(cue: str) -> str:
    """A cue without the white space around it.

    Raises:
        WrisError: nothing is left.
    """
    if isinstance(cue, str) and not cue.strip():
        raise WrisError("the cue is empty; write a short phrase such as “a dog”, or delete the cue.")
    return check_expression(cue)


def _unrepeated(phrases: tuple[str, ...]) -> tuple[str, ...]:
    """The fewest phrases from which `repeat` makes these."""
    beginnings = (phrases[:count] for count in range(1, len(phrases) + 1))
    return next(few for few in beginnings if repeat(few, len(phrases)) == phrases)


def _strong(response: Float[np.ndarray, "h w"]) -> float:
    return float((response > STRONG).mean())
