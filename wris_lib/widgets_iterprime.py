"""A laboratory for IteRPrimE's refinement: turn its knobs, and see what is hidden, what answers then, and the mask.

    lab = RefinementLab("photo.jpg", "the dog on the left")
    lab.choose_primary("dog")
    lab.set_threshold(0.8)
    lab.render()

As in `wris_lib.widgets`, whatever a field, a menu or a slider does is a plain method, and a lab shows itself as the
last line of a cell.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.colors import to_rgba
from PIL import Image

from wris_lib.backbones.itm import Matcher
from wris_lib.backbones.language import NOUNS, Parse, Word
from wris_lib.backbones.proposals import NO_PROPOSALS
from wris_lib.data.images import check_expression, load_image
from wris_lib.errors import WrisError
from wris_lib.evaluate import peak
from wris_lib.methods import load_method
from wris_lib.methods.iterprime import IterPrime
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS
from wris_lib.methods.iterprime.igrs import Pass, Refined, Refinement
from wris_lib.methods.iterprime.selection import Choice, choose, upsample
from wris_lib.show import ImageSource, Panel, Picture, fill, grid
from wris_lib.widgets import ROW, Lab

NONE = "none"  # instead of a primary word
HIDDEN = to_rgba("lightgrey", 0.9)


@dataclass(frozen=True)
class Question:
    """What a lab looks for, and how.

    Attributes:
        parse: of the sentence.
        primary: the word that is taken for the primary one, if any.
        layer: text layer, from 0, whose cross-attention is read.
        aggregation: one of `AGGREGATIONS`.
        settings: of the refinement.
    """

    parse: Parse
    primary: Word | None
    layer: int
    aggregation: str
    settings: Refinement


class RefinementLab(Lab):
    """Change sentence, primary word, layer, aggregation and refinement, and see every look, their average and the mask.

    The image is encoded, and SAM's proposals are made, once.

    Attributes:
        image: PIL, RGB.
        method: gives the models, and what cannot be changed here.
        proposals: [p, H, W], among which the mask is chosen.
        question: the present one.
        refined: what came of it, look by look.
        response_map: [H, W] in [0, 1], the average that is returned, at the image's size.
        choice: among the proposals; None where there are none.
    """

    question: Question
    refined: Refined
    response_map: Float[np.ndarray, "H W"]
    choice: Choice | None

    def __init__(self, image: ImageSource, sentence: str, method: IterPrime | None = None) -> None:
        """Encode the image and make proposals, which is the slow part.

        Args:
            image: whatever `load_image` takes.
            sentence: "the dog on the left".
            method: with which settings to start; by default that of the default stack.

        Raises:
            WrisError: the image cannot be read; the sentence is empty; the stack's weights are missing or damaged.
        """
        super().__init__()
        self.image = load_image(image)
        self.method = method or load_method("iterprime")
        self._matcher = _remembering(self.method.matcher, self.image)
        proposals = self.method.propose(self.image)
        self.proposals = proposals[proposals.any(axis=(1, 2))]
        self.view = self._build()
        parse = self._parse(sentence)
        layer = self._matcher.layer if self.method.layer is None else self.method.layer
        self._ask(Question(parse, parse.primary, layer, self.method.aggregation, self.method.settings))

    @property
    def mask(self) -> Bool[np.ndarray, "H W"]:
        """The chosen proposal; where there are none, nothing."""
        return self.proposals[self.choice.index] if self.choice else np.zeros(self.response_map.shape, dtype=bool)

    def set_sentence(self, text: str) -> None:
        """Look for something else, with the primary word that the parser finds in it.

        Args:
            text: "the dog on the left".

        Raises:
            WrisError: the text is empty.
        """
        parse = self._parse(text)
        self._ask(replace(self.question, parse=parse, primary=parse.primary))

    def choose_primary(self, name: str) -> None:
        """Take another noun for the primary word.

        Args:
            name: a noun of the sentence; of equal ones the second is "dog (2)". "none": there is no primary word.

        Raises:
            WrisError: there is no such noun.
        """
        names = _names(self.question.parse)
        if name not in names:
            raise WrisError(f"there is no noun {name!r} in the sentence; choose one of: {', '.join(names)}.")
        self._ask(replace(self.question, primary=names[name]))

    def choose_layer(self, layer: int) -> None:
        """Read another layer's cross-attention.

        Args:
            layer: of the text encoder, from 0.

        Raises:
            WrisError: it has no cross-attention.
        """
        self._ask(replace(self.question, layer=layer))

    def choose_aggregation(self, how: str) -> None:
        """Make one map from those of the tokens in another way.

        Args:
            how: one of `AGGREGATIONS`.

        Raises:
            WrisError: there is no such aggregation.
        """
        self._ask(replace(self.question, aggregation=how))

    def set_threshold(self, threshold: float | int) -> None:
        """Hide more or less after each look.

        Args:
            threshold: θ in (0, 1]; the lower, the more is hidden.

        Raises:
            WrisError: it is out of range.
        """
        self._refine(threshold=float(threshold))

    def set_decay(self, decay: float | int) -> None:
        """Let later looks count more or less.

        Args:
            decay: λ in [0, 1]; with 1 the first map remains as it is.

        Raises:
            WrisError: it is out of range.
        """
        self._refine(decay=float(decay))

    def set_passes(self, passes: int) -> None:
        """Look more or less often.

        Args:
            passes: ν, at most so many looks after the first; 0: the first map alone.

        Raises:
            WrisError: it is negative.
        """
        self._refine(passes=passes)

    def render(self) -> Picture:
        """The map of every look, grey where it was not allowed to see, then their average, and the mask."""
        shape, looks = self._matcher.grid, self.refined.passes
        panels = []
        for number, each in enumerate(looks):
            title = f"{_name(number, each)}\n{_verdict(each)}"
            panels.append(Panel(self.image, title, response_map=each.response_map.unflatten(0, shape).cpu().numpy()))
        x, y = peak(self.response_map)
        points = np.array([[x, y]], dtype=np.float32)
        average = self.refined.response_map.unflatten(0, shape).cpu().numpy()
        title = f"average\nprimary word: {self._primary.value}"
        panels.append(Panel(self.image, title, response_map=average, points=points))
        title = "mask\n" + (f"score {self.choice.scores[self.choice.index]:.2f}" if self.choice else NO_PROPOSALS)
        panels.append(Panel(self.image, title, mask=self.mask, points=points))
        picture = grid(panels, columns=6, inches=2.0)
        width, height = self.image.size
        for axes, each in zip(picture.figure.axes, looks, strict=False):
            hidden = ~each.visible.unflatten(0, shape).cpu().numpy()
            fill(axes, hidden, HIDDEN, (-0.5, width - 0.5, height - 0.5, -0.5))
        return picture

    def _parse(self, text: str) -> Parse:
        return self.method.parser.parse([check_expression(text)])[0]

    def _refine(self, **changes: Any) -> None:
        self._ask(replace(self.question, settings=replace(self.question.settings, **changes)))

    def _ask(self, question: Question) -> None:
        own = self.method
        method = IterPrime(
            self._matcher,
            own.propose,
            own.parser,
            question.aggregation,
            question.layer,
            own.hide,
            question.settings,
        )
        (refined,) = method.look(self.image, [question.parse.expression], [question.primary])
        width, height = self.image.size
        response_map = upsample(refined.response_map.unflatten(0, self._matcher.grid), (height, width))
        choice = choose(response_map, self.proposals) if len(self.proposals) else None
        # Only now: where a model failed, the lab stays as it was.
        self.question, self.refined, self.response_map, self.choice = question, refined, response_map, choice
        self._follow()
        self._result.value = self.render().jpeg
        looks = [f"{_name(number, each).capitalize()}: {_verdict(each)}." for number, each in enumerate(refined.passes)]
        self._say(f"{' '.join(looks)} {_told(choice)}.")

    def _set_controls(self) -> None:
        question, settings = self.question, self.question.settings
        names = _names(question.parse)
        self._text.value = question.parse.expression
        self._primary.options = list(names)
        self._primary.value = next(name for name, word in names.items() if word == question.primary)
        self._layer.value, self._aggregation.value = question.layer, question.aggregation
        self._threshold.value, self._decay.value = settings.threshold, settings.decay
        self._passes.max = max(self._passes.max, settings.passes)
        self._passes.value = settings.passes

    def _build(self) -> ipywidgets.Widget:
        self._text = ipywidgets.Text(
            continuous_update=False,  # that is: on Enter
            description="sentence",
            tooltip="what to look for",
            layout={"width": "490px"},
        )
        self._primary, self._layer, self._aggregation = (
            ipywidgets.Dropdown(options=options, description=name, tooltip=tooltip, layout={"width": "220px"})
            for name, tooltip, options in (
                ("primary", "the primary word", [NONE]),
                ("layer", "text layer whose attention is read", self._matcher.layers),
                ("maps", "how one map is made of those of the tokens", AGGREGATIONS),
            )
        )
        alike = {"continuous_update": False, "layout": {"width": "270px"}}  # three stand beside each other
        self._threshold, self._decay = (
            ipywidgets.FloatSlider(least, min=least, max=1, step=0.01, description=name, tooltip=tooltip, **alike)
            for name, tooltip, least in (
                ("θ", "threshold: the lower, the more is hidden", 0.01),
                ("λ", "decay: how much later looks count", 0),
            )
        )
        self._passes = ipywidgets.IntSlider(
            0, 0, 6, description="ν", tooltip="passes: at most so many looks after the first", **alike
        )
        for control, action in (
            (self._text, self.set_sentence),
            (self._primary, self.choose_primary),
            (self._layer, self.choose_layer),
            (self._aggregation, self.choose_aggregation),
            (self._threshold, self.set_threshold),
            (self._decay, self.set_decay),
            (self._passes, self.set_passes),
        ):
            control.observe(lambda change, action=action: self._do(action, change["new"]), "value")
        return ipywidgets.VBox(
            [
                self._text,
                ipywidgets.HBox([self._primary, self._layer, self._aggregation], layout=ROW),
                ipywidgets.HBox([self._threshold, self._decay, self._passes], layout=ROW),
                self._result,
                self._message,
            ]
        )


def _remembering(matcher: Matcher, image: Image.Image) -> Matcher:
    """A copy of the matcher that has this image encoded; any other, as one with painted parts, it encodes as ever."""
    pixels, own = matcher.preprocess(image)[None], copy(matcher)
    encoded = matcher.encode_images(pixels)
    own.encode_images = lambda given: encoded if torch.equal(given, pixels) else matcher.encode_images(given)
    return own


def _names(parse: Parse) -> dict[str, Word | None]:
    """What can be the primary word, by the name that the menu gives it."""
    nouns = [word for word in parse.words if word.upos in NOUNS]
    names: dict[str, Word | None] = {NONE: None}
    for number, word in enumerate(nouns):
        earlier = [NONE, *(other.text for other in nouns[:number])].count(word.text)
        names[f"{word.text} ({earlier + 1})" if earlier else word.text] = word
    return names


def _name(number: int, look: Pass) -> str:
    return f"pass {number}, {(~look.visible).float().mean():.1%} hidden" if number else "first look"


def _told(choice: Choice | None) -> str:
    if choice is None:
        return f"{NO_PROPOSALS}, so there is no mask; try another image"
    chosen = f"The mask is proposal {choice.index + 1} of {len(choice.scores)}"
    return chosen + (", the best of all, since none holds the peak without lying scattered" if choice.fell_back else "")


def _verdict(look: Pass) -> str:
    return f"ITM {look.probability:.3f}, S {look.score:.3f}, {'kept' if look.kept else 'rejected'}"
