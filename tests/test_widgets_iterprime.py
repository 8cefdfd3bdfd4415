"""The refinement laboratory without a browser: what its methods do, and what its field, menus and sliders ask for."""

import io
from functools import cache

import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from wris_lib import widgets_iterprime
from wris_lib.backbones.itm import EncodedTexts, Match, Matcher
from wris_lib.backbones.itm_models import EncodedImages
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.proposals import Proposer
from wris_lib.errors import WrisError
from wris_lib.methods.iterprime import IterPrime
from wris_lib.methods.iterprime.igrs import Refinement
from wris_lib.widgets_iterprime import RefinementLab

WIDTH, HEIGHT = 60, 40
IMAGE = Image.new("RGB", (WIDTH, HEIGHT), "black")
SENTENCE = "the dog next to the car"
COLUMNS = {"dog": 0, "car": 2, "cat": 3}  # of the grid; where the words look


@cache
def parser():
    return load_parser("toy")


class FakeMatcher(Matcher):
    """Nouns look at a column of the 4 × 4 grid, its upper end most, in layer 3 at the next one; other words nowhere
    in particular. It is sure as long as it sees enough of the image. Of unicorns it wants to hear nothing."""

    enough = 0.0  # share of the image

    def __init__(self):
        self.device, self.layer, self.layers, self.grid = "cpu", 2, range(2, 4), (4, 4)
        self.encoded, self.asked = [], []

    def preprocess(self, image):
        return torch.zeros(3, 8, 8) + torch.linspace(0, 1, 8)

    def encode_images(self, pixels):
        self.encoded.append(pixels)
        return EncodedImages([torch.zeros(len(pixels), 1, 17, 1)], [torch.zeros(len(pixels), 1, 17, 1)])

    def encode_texts(self, texts):
        (text,) = texts
        if "unicorn" in text:
            raise RuntimeError("no such\nanimal")
        self.words, spans, end = text.split(), [], 0
        for word in self.words:
            start = text.index(word, end)
            end = start + len(word)
            spans.append((start, end))
        spans = [(0, 0), *spans, (0, 0)]
        return EncodedTexts(torch.zeros(1, len(spans), 1), torch.ones(1, len(spans), dtype=torch.bool), [spans])

    def match(self, images, texts, visible=None, layer=None):
        layer = self.layer if layer is None else layer
        if layer not in self.layers:
            raise WrisError(f"layer {layer} has no cross-attention.")
        self.asked.append((" ".join(self.words[3:]), layer))
        scores = torch.zeros(1, 1, len(self.words) + 2, 4, 4)
        for number, word in enumerate(self.words, start=1):
            if word in COLUMNS:
                scores[0, 0, number, :, (COLUMNS[word] + layer - 2) % 4] = torch.tensor([3.0, 2.5, 2.0, 1.5])
        visible = torch.ones(1, 16, dtype=torch.bool) if visible is None else visible
        attention = scores.flatten(3).masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
        sure = 0.9 if visible.float().mean() >= self.enough else 0.1
        return Match(attention, torch.ones_like(attention), torch.tensor([sure]))


class FakeProposer(Proposer):
    """The four columns of the grid, from left to right."""

    def __init__(self, count=4):
        self.count, self.seen = count, 0

    def __call__(self, image):
        self.seen += 1
        masks = np.zeros((self.count, image.height, image.width), bool)
        for number in range(self.count):
            masks[number, :, number * 15 : number * 15 + 15] = True
        return masks


def iterprime(**options):
    return IterPrime(FakeMatcher(), FakeProposer(), parser(), **options)


@pytest.fixture
def method():
    return iterprime(settings=Refinement(passes=2))


@pytest.fixture
def lab(method):
    return RefinementLab(IMAGE, f" {SENTENCE} ", method)


def titles(lab):
    return [axes.get_title().replace("\n", " ") for axes in lab.render().figure.axes if axes.get_title()]


def controls(lab):
    """What the field, the menus and the sliders show."""
    names = ("text", "primary", "layer", "aggregation", "threshold", "decay", "passes")
    return [getattr(lab, f"_{name}").value for name in names]


def test_it_starts_as_the_method_is_set(lab, method):
    assert controls(lab) == [SENTENCE, "dog", 2, "pwem", 0.5, 0.8, 2]
    assert lab._primary.options == ("none", "dog", "car") and lab._layer.options == (2, 3)
    assert lab._aggregation.options == ("mean", "gvlp", "local", "global", "pwem")
    assert lab.choice.index == 0 and lab.mask[:, :15].all() and lab.mask.sum() == 15 * 40
    settings = Refinement(passes=1, threshold=0.7, decay=0.3, sharpen=True)
    other = RefinementLab(IMAGE, "the car", iterprime(aggregation="gvlp", layer=3, settings=settings))
    assert controls(other) == ["the car", "car", 3, "gvlp", 0.7, 0.3, 1] and other.choice.index == 3
    other.set_decay(0.5)
    assert other.question.settings == Refinement(passes=1, threshold=0.7, decay=0.5, sharpen=True)


def test_it_is_what_the_method_answers(lab, method):
    (theirs,) = method.predict(IMAGE, [SENTENCE])
    np.testing.assert_array_equal(lab.mask, theirs.mask)
    np.testing.assert_array_equal(lab.response_map, theirs.response_map)
    *looks, proposals = theirs.trace
    assert len(lab.refined.passes) == len(looks) > 1
    for ours, look in zip(lab.refined.passes, looks, strict=True):
        np.testing.assert_array_equal(ours.response_map.unflatten(0, (4, 4)), look.response_map)
    np.testing.assert_array_equal(lab.choice.scores, proposals.scores)


@pytest.mark.usefixtures("unpainted")
def test_image_and_proposals_are_looked_at_once(lab, method):
    lab.set_sentence("the cat")
    lab.choose_primary("none")
    lab.choose_layer(3)
    lab.choose_aggregation("mean")
    lab.set_threshold(1)
    lab.set_decay(0)
    lab.set_passes(1)
    assert len(method.matcher.encoded) == 1 and method.propose.seen == 1
    assert method.matcher.asked[-1] == ("the cat", 3)


def test_an_image_with_painted_parts_is_encoded_as_ever():
    method = iterprime(hide="image")
    lab = RefinementLab(IMAGE, SENTENCE, method)
    whole, *painted = method.matcher.encoded
    assert len(painted) == len(lab.refined.passes) - 1 > 0
    assert not any(torch.equal(whole, each) for each in painted)


@pytest.mark.usefixtures("unpainted")
def test_every_change_is_answered(lab):
    def column():
        return lab.choice.index, *(each.item() for each in lab.refined.passes[0].response_map.argmax()[None] % 4)

    assert column() == (0, 0)
    lab.choose_primary("car")
    assert column() == (2, 2) and lab._primary.value == "car"
    lab.choose_layer(3)
    assert column() == (3, 3) and lab._layer.value == 3
    lab.set_sentence(" the cat ")
    assert column() == (0, 0) and controls(lab)[:3] == ["the cat", "cat", 3]  # 3 + 1 is column 0; the layer stays
    assert lab._primary.options == ("none", "cat")
    lab.choose_primary("none")
    assert lab.question.primary is None and lab._primary.value == "none"
    before = lab.refined.response_map
    lab.choose_aggregation("mean")
    assert lab._aggregation.value == "mean" and lab.question.aggregation == "mean"
    assert before.shape == lab.refined.response_map.shape


@pytest.mark.usefixtures("unpainted")
def test_aggregation_changes_the_map(lab):
    pwem = lab.response_map
    lab.choose_aggregation("gvlp")
    gvlp = lab.response_map
    assert gvlp[:, 30:45].max() > 0.9 > pwem[:, 30:45].max()  # where the car is


@pytest.mark.usefixtures("unpainted")
def test_the_refinement_follows_its_numbers(lab):
    def hidden():
        return [(~each.visible).sum().item() for each in lab.refined.passes]

    lab.set_passes(0)
    assert hidden() == [0] and lab._passes.value == 0
    lab.set_passes(2)
    lab.set_threshold(1)
    few = hidden()
    assert few == [0, 1, 2] and lab._threshold.value == 1  # the peak of each map
    lab.set_threshold(0.3)
    assert hidden()[1] > 1
    first = lab.refined.passes[0].response_map
    lab.set_decay(1)
    assert torch.equal(lab.refined.response_map, first) and lab._decay.value == 1
    lab.set_passes(9)
    assert lab._passes.value == lab._passes.max == 9
    assert lab.question.settings == Refinement(passes=9, threshold=0.3, decay=1.0)


@pytest.mark.usefixtures("unpainted")
def test_a_noun_that_is_there_twice():
    lab = RefinementLab(IMAGE, "the dog next to the dog", iterprime())
    assert lab._primary.options == ("none", "dog", "dog (2)") and lab._primary.value == "dog"
    lab.choose_primary("dog (2)")
    assert lab.question.primary.start == 20 and lab._primary.value == "dog (2)"


def test_no_noun_at_all():
    lab = RefinementLab(IMAGE, "standing", iterprime())
    assert lab.question.primary is None and lab._primary.options == ("none",)
    assert lab.mask.shape == (HEIGHT, WIDTH) and "primary word: none" in titles(lab)[-2]


def test_what_is_drawn(lab):
    lab.set_threshold(0.9)
    looks = lab.refined.passes
    assert [each.kept for each in looks[:2]] == [True, True]
    drawn = titles(lab)
    assert drawn[0] == f"first look ITM 0.900, S {looks[0].score:.3f}, kept"
    share = (~looks[1].visible).float().mean()
    assert drawn[1] == f"pass 1, {share:.1%} hidden ITM 0.900, S {looks[1].score:.3f}, kept"
    assert drawn[-2] == "average primary word: dog"
    assert drawn[-1] == f"mask score {lab.choice.scores[0]:.2f}"
    axes = lab.render().figure.axes
    for each, panel in zip(looks, axes, strict=False):
        _, response, veil = panel.images
        np.testing.assert_array_equal(response.get_array(), each.response_map.unflatten(0, (4, 4)))
        np.testing.assert_array_equal(veil.get_array()[..., 3] > 0, ~each.visible.unflatten(0, (4, 4)).numpy())
    average, mask = axes[len(looks) : len(looks) + 2]
    np.testing.assert_array_equal(average.images[1].get_array(), lab.refined.response_map.unflatten(0, (4, 4)))
    assert len(mask.images) == 2 and mask.lines[0].get_xydata().shape == (1, 2)
    x, y = mask.lines[0].get_xydata()[0].astype(int)
    assert lab.response_map[y, x] == lab.response_map.max() and lab.mask[y, x]


def test_below_it_says_what_became_of_each_look(method):
    method.matcher.enough = 1.0
    lab = RefinementLab(IMAGE, SENTENCE, method)
    first, second = lab.refined.passes
    assert not second.kept and torch.equal(lab.refined.response_map, first.average)
    share = (~second.visible).float().mean()
    said = lab._message.value
    assert f"First look: ITM 0.900, S {first.score:.3f}, kept. Pass 1, {share:.1%} hidden: ITM 0.100, S " in said
    assert f"S {second.score:.3f}, rejected. The mask is proposal 1 of 4.</span>" in said


def test_it_says_when_no_proposal_holds_the_peak(method):
    method.propose.count = 2
    lab = RefinementLab(IMAGE, "the cat", method)
    assert lab.choice.fell_back and "of 2, the best of all, since none holds the peak without" in lab._message.value


REFUSED = [
    ("set_sentence", " ", "the expression is empty"),
    ("choose_primary", "cat", "there is no noun 'cat' in the sentence; choose one of: none, dog, car."),
    ("choose_layer", 1, "layer 1 has no cross-attention"),
    ("choose_aggregation", "median", "there is no aggregation 'median'; choose one of: mean, gvlp"),
    ("set_threshold", 0, "the threshold θ is 0.0; choose one above 0"),
    ("set_threshold", 1.5, "the threshold θ is 1.5"),
    ("set_decay", -0.1, "the decay λ is -0.1; choose one from 0 to 1"),
    ("set_passes", -1, "-1 refinement passes cannot be made"),
]


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("action, argument, sentence", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(lab, action, argument, sentence):
    before = lab.question, lab.refined, controls(lab), lab._result.value
    with pytest.raises(WrisError, match=sentence):
        getattr(lab, action)(argument)
    assert (lab.question, lab.refined, controls(lab), lab._result.value) == before


def test_what_cannot_be_shown_is_refused(method):
    with pytest.raises(WrisError, match="no image file nowhere.jpg"):
        RefinementLab("nowhere.jpg", SENTENCE, method)
    with pytest.raises(WrisError, match="the expression is empty"):
        RefinementLab(IMAGE, "", method)


def test_without_proposals_there_are_maps_and_no_mask(method):
    method.propose.count = 0
    lab = RefinementLab(IMAGE, SENTENCE, method)
    assert lab.choice is None and lab.mask.shape == lab.response_map.shape and not lab.mask.any()
    assert "nothing is proposed in this image, so there is no mask; try another image." in lab._message.value
    assert [axes.get_title() for axes in lab.render().figure.axes][-1].startswith("mask\nnothing is proposed")


def test_the_default_is_that_of_the_stack(method, monkeypatch):
    monkeypatch.setattr(widgets_iterprime, "load_method", lambda name: {"iterprime": method}[name])
    assert RefinementLab(IMAGE, SENTENCE).method is method


def test_field_menus_and_sliders(lab, method):
    lab.set_passes(0)
    count = len(method.matcher.asked)
    for control, value, now in (
        ("primary", "car", lambda: lab.question.primary.text == "car"),
        ("layer", 3, lambda: lab.question.layer == 3),
        ("aggregation", "gvlp", lambda: lab.question.aggregation == "gvlp"),
        ("threshold", 0.25, lambda: lab.question.settings.threshold == 0.25),
        ("decay", 0.5, lambda: lab.question.settings.decay == 0.5),
        ("text", " the cat ", lambda: lab.question.parse.expression == "the cat"),
    ):
        getattr(lab, f"_{control}").value = value
        assert now() and "✘" not in lab._message.value
        count += 1  # controls that follow ask for nothing
        assert len(method.matcher.asked) == count
    before = lab._result.value
    lab._passes.value = 1
    assert lab.question.settings.passes == 1 and len(method.matcher.asked) == count + 2
    assert controls(lab) == ["the cat", "cat", 3, "gvlp", 0.25, 0.5, 1]
    assert lab._result.value == lab.render().jpeg != before


@pytest.mark.usefixtures("unpainted")
def test_errors_of_controls_are_sentences_and_controls_go_back(lab, method):
    lab._text.value = " "
    assert "✘ the expression is empty" in lab._message.value and lab._text.value == SENTENCE
    lab._text.value = "a unicorn"
    assert "✘ RuntimeError: no such animal. Call set_sentence(&#x27;a unicorn&#x27;) of the lab" in lab._message.value
    assert lab._text.value == SENTENCE and lab._primary.options == ("none", "dog", "car")
    method.matcher.layers = range(2, 3)
    lab._matcher.layers = range(2, 3)
    lab._layer.value = 3
    assert "✘ layer 3 has no cross-attention." in lab._message.value and lab._layer.value == 2


def test_it_shows_itself_as_widget_and_as_still_picture(lab):
    formatter = DisplayFormatter()
    formatter.active_types = list(formatter.formatters)
    data, _ = formatter.format(lab)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert Image.open(io.BytesIO(data["image/jpeg"])).format == "JPEG"
