"""The cue laboratory without a browser: what its methods do, and what its fields, buttons and slider ask for."""

import io
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from wris_lib import widgets_pcnet
from wris_lib.backbones.clip import load_clip
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.sam import load_sam
from wris_lib.errors import WrisError
from wris_lib.methods import Prediction, Stage
from wris_lib.methods.pcnet import PcNet
from wris_lib.methods.pcnet.crm import Crm, CrmConfig
from wris_lib.widgets_pcnet import CueLab

WIDTH, HEIGHT = 60, 40
IMAGE = Image.new("RGB", (WIDTH, HEIGHT), "black")
REFERENT = np.zeros((HEIGHT, WIDTH), bool)
REFERENT[:, :30] = True  # the left half
ANSWERS = {
    "the dog on the left": "1. a dog\n2. the dog on the left\n3. the left one, a dog",
    "the cat": "1. the cat\n2. a cat\n3. the cat",
    "the mouse": "1. a mouse",
}


class Scripted:
    """A language model that knows three sentences, and is asked no others."""

    name, follows_instructions = "scripted", False

    def __init__(self):
        self.asked = []

    def answer(self, prompts):
        for prompt in prompts:
            self.asked.append(prompt)
            if prompt not in ANSWERS:
                raise WrisError("the language model is asleep; wake it.")
            yield ANSWERS[prompt]


@cache
def parser():
    return load_parser("toy")


class FakePcNet(PcNet):
    """Its mask is a tenth of the image for each letter of the last cue that is read; it knows no unicorns."""

    def __init__(self, stages=2, cues=None):
        self.clip, self.parser, self.llm, self.cues = None, parser(), Scripted(), cues
        self.crm = SimpleNamespace(config=SimpleNamespace(stages=stages))
        self.seen, self.asked = 0, []
        self.sam = SimpleNamespace(embed=self.embed)

    def embed(self, image):
        self.seen += 1
        return image.size

    def answer(self, visual, grid, embedded, expressions, cues=None):
        assert (visual, grid, embedded) == ("patches", (2, 3), (WIDTH, HEIGHT))
        stages = self.crm.config.stages
        read = (list(cues[0]) * stages)[:stages]
        self.asked.append((expressions[0], *read))
        if "a unicorn" in read:
            raise RuntimeError("no such\nanimal")
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[:, : min(len(read[-1]), 10) * 6] = True
        maps = [np.linspace(0, 1, 6).reshape(2, 3) ** len(cue) for cue in read]
        trace = [Stage(f"stage {n + 1}", f"“{read[n]}”", maps[n]) for n in range(stages)]
        trace.append(Stage("masks", masks=mask[None], scores=np.ones(1)))
        return [Prediction(mask, mask.astype(float), np.array([[3.0, 5.0]]), np.ones(1, int), 0.5, trace)]


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """Answers are kept in a cache of the test's own, and the fake has no CLIP that could look at the image."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    looked = []

    def see(clip, images):
        looked.append(images)
        return "patches", (2, 3)

    monkeypatch.setattr(widgets_pcnet, "see", see)
    return looked


@pytest.fixture
def method():
    return FakePcNet()


@pytest.fixture
def lab(method):
    return CueLab(IMAGE, " the dog on the left ", method, REFERENT)


def rows(lab):
    """What each cue's line says."""
    return [(row.children[0].value, row.children[1].value) for row in lab._list.children]


def named(lab, description, line=None):
    """The button of that name, in the line of a cue or below them."""
    box = lab.view.children[3] if line is None else lab._list.children[line - 1]
    return next(each for each in box.children if getattr(each, "description", None) == description)


def titles(lab):
    return [axes.get_title().replace("\n", " ") for axes in lab.render().figure.axes if axes.get_title()]


def test_it_starts_with_the_cues_of_the_language_model(lab, method, outside):
    assert lab.sentence == "the dog on the left" and lab._text.value == lab.sentence
    assert lab.cues == lab.suggested == ("a dog", "the dog on the left", "the left one, a dog")
    assert rows(lab) == [("stage 1", lab.cues[0]), ("stage 2", lab.cues[1]), ("not read", lab.cues[2])]
    assert (lab.stages, lab.stage, lab._slider.value, lab._slider.min, lab._slider.max) == (2, 2, 2, 1, 2)
    assert lab.view.children[1].value == "The method reads 2 cues: fewer are repeated, more are not read."
    assert method.asked == [("the dog on the left", "a dog", "the dog on the left")]
    assert (lab.iou, method.seen, len(outside)) == (0.5, 1, 1)
    assert "Stage 2 reads “the dog on the left”: its map is above 0.5 on 17% of the image." in lab._message.value
    assert "In the end IoU 0.50, with the suggested cues 0.50." in lab._message.value


def test_cues_change_and_the_image_is_not_looked_at_again(lab, method, outside):
    before = lab._result.value
    lab.set_cue(2, " cat ")
    assert lab.cues == ("a dog", "cat", "the left one, a dog") and rows(lab)[1] == ("stage 2", "cat")
    assert lab.iou == 0.6 and "In the end IoU 0.60, with the suggested cues 0.50." in lab._message.value
    assert lab._result.value == lab.render().jpeg != before
    lab.move(3, 1)
    assert lab.cues == ("the left one, a dog", "a dog", "cat") and lab.iou == 1.0
    lab.move(1, 2)
    lab.delete(1)
    assert lab.cues == ("the left one, a dog", "cat")
    lab.add(" another ")
    assert lab.cues == ("the left one, a dog", "cat", "another") and rows(lab)[2] == ("not read", "another")
    lab.reset()
    assert lab.cues == lab.suggested and lab.iou == 0.5
    assert [read for _, *read in method.asked[1:]] == [
        ["a dog", "cat"],
        ["the left one, a dog", "a dog"],
        ["a dog", "the left one, a dog"],
        ["the left one, a dog", "cat"],
        ["the left one, a dog", "cat"],
    ]
    assert (method.seen, len(outside), method.llm.asked) == (1, 1, ["the dog on the left"])


@pytest.mark.usefixtures("unpainted")
def test_too_few_cues_are_repeated():
    lab = CueLab(IMAGE, "the dog on the left", FakePcNet(stages=5))
    assert [reader for reader, _ in rows(lab)] == ["stages 1, 4", "stages 2, 5", "stage 3"]
    lab.delete(3)
    lab.delete(2)
    assert rows(lab) == [("stages 1, 2, 3, 4, 5", "a dog")]
    assert titles(lab)[1:] == [f"stage {n}: “a dog” above 0.5 on 17% of the image" for n in range(1, 6)]
    with pytest.raises(WrisError, match="the last cue cannot be deleted, for every stage reads one; write another"):
        lab.delete(1)
    assert lab.cues == ("a dog",)


@pytest.mark.parametrize("sentence, cues", [("the cat", ("the cat", "a cat", "the cat")), ("the mouse", ("a mouse",))])
def test_repetitions_of_the_language_model_are_shown_as_few_as_can_be(method, sentence, cues):
    lab = CueLab(IMAGE, sentence, method)
    assert lab.cues == cues


def test_a_single_stage():
    lab = CueLab(IMAGE, "the mouse", FakePcNet(stages=1))
    assert lab.view.children[1].value.startswith("The method reads 1 cue:") and rows(lab) == [("stage 1", "a mouse")]


@pytest.mark.usefixtures("unpainted")
def test_cues_of_the_method_itself():
    method = FakePcNet(cues=("left", "right"))
    lab = CueLab(IMAGE, "a sentence that the model does not know", method)
    lab.set_cue(1, "up")
    lab.set_sentence("something else")
    assert lab.cues == lab.suggested == ("left", "right") and not method.llm.asked


@pytest.mark.usefixtures("unpainted")
def test_another_sentence(lab, method):
    lab.choose_stage(1)
    lab.set_cue(1, "x")
    lab.set_sentence(" the mouse ")
    assert (lab.sentence, lab.cues, lab.suggested, lab.stage) == ("the mouse", ("a mouse",), ("a mouse",), 1)
    assert rows(lab) == [("stages 1, 2", "a mouse")] and lab._text.value == "the mouse"
    assert lab.referent is lab.iou is None and "In the end the mask covers 70% of the image." in lab._message.value
    assert titles(lab)[0] == "“the mouse” mask covers 70%"
    lab.set_sentence("the mouse", ~REFERENT)
    assert lab.iou == pytest.approx(12 / 60) and titles(lab)[0] == "“the mouse” mask, IoU 0.20"
    lab.set_cue(1, "a")
    lab.reset()
    assert lab.cues == ("a mouse",)  # of this sentence, not of the first


def test_the_chosen_stage_is_framed(lab, method):
    def framed():
        return [axes.spines["top"].get_visible() for axes in lab.render().figure.axes]

    assert framed() == [False, False, True]
    lab.choose_stage(1)
    assert framed() == [False, True, False] and lab._slider.value == 1
    assert "Stage 1 reads “a dog”: its map is above 0.5 on 17% of the image." in lab._message.value
    assert len(method.asked) == 1  # from memory
    np.testing.assert_array_equal(lab.maps()[0], lab.prediction.trace[0].response_map)


def test_what_is_drawn(lab):
    mask, first, last = lab.render().figure.axes
    assert len(mask.lines) == 1 and mask.lines[0].get_xydata().tolist() == [[3, 5]]
    assert titles(lab) == [
        "“the dog on the left” mask, IoU 0.50",
        "stage 1: “a dog” above 0.5 on 17% of the image",
        "stage 2: “the dog on the left” above 0.5 on 17% of the image",
    ]
    for axes, response in zip((first, last), lab.maps(), strict=True):
        np.testing.assert_array_equal(axes.images[1].get_array(), response)


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize(
    "action, arguments, sentence",
    [
        ("set_sentence", (" ",), "the expression is empty"),
        ("set_sentence", ("a sentence that the model does not know",), "the language model is asleep; wake it"),
        (
            "set_sentence",
            ("x", np.zeros((2, 3), bool)),
            r"has the shape \(2, 3\); expected that of the image, \(40, 60",
        ),
        ("set_cue", (1, "  "), "the cue is empty; write a short phrase such as “a dog”, or delete the cue"),
        ("set_cue", (0, "a dog"), "there is no cue 0; choose one of 1 to 3"),
        ("set_cue", (4, "a dog"), "there is no cue 4; choose one of 1 to 3"),
        ("add", ("",), "the cue is empty"),
        ("move", (1, 4), "there is no cue 4"),
        ("move", (-1, 1), "there is no cue -1"),
        ("delete", (4,), "there is no cue 4"),
        ("choose_stage", (0,), "there is no stage 0; choose one of 1 to 2"),
        ("choose_stage", (3,), "there is no stage 3; choose one of 1 to 2"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(lab, method, action, arguments, sentence):
    before = lab.prediction
    with pytest.raises(WrisError, match=sentence):
        getattr(lab, action)(*arguments)
    assert lab.prediction is before and lab.cues == lab.suggested and len(lab.cues) == 3
    assert (lab.sentence, lab.stage, len(method.asked)) == ("the dog on the left", 2, 1)
    assert lab.referent is REFERENT


def test_what_cannot_be_shown_is_refused(method):
    with pytest.raises(WrisError, match="no image file nowhere.jpg"):
        CueLab("nowhere.jpg", "the mouse", method)
    with pytest.raises(WrisError, match="pcnet reads no cues, so there is nothing to change; give it a PCNet"):
        CueLab(IMAGE, "the mouse", FakePcNet(stages=0))
    with pytest.raises(WrisError, match="the expression is empty"):
        CueLab(IMAGE, "", method)


def test_the_trained_module_is_the_default(method, monkeypatch):
    monkeypatch.setattr(widgets_pcnet, "load_method", lambda name: {"pcnet": method}[name])
    assert CueLab(IMAGE, "the mouse").method is method


@pytest.mark.usefixtures("unpainted")
def test_fields_buttons_and_slider(lab, method):
    lab._list.children[1].children[1].value = " cat "
    assert lab.cues[1] == "cat" and rows(lab)[1][1] == "cat"  # without the white space
    named(lab, "Up", line=2).click()
    assert lab.cues[:2] == ("cat", "a dog")
    assert [named(lab, "Up", line).disabled for line in (1, 2, 3)] == [True, False, False]
    named(lab, "Delete", line=3).click()
    assert lab.cues == ("cat", "a dog")
    lab._new.value = "the third"
    assert len(lab.cues) == 2  # as long as nobody has pressed the button
    named(lab, "Add").click()
    assert lab.cues == ("cat", "a dog", "the third") and lab._new.value == ""
    lab._slider.value = 1
    assert lab.stage == 1 and "Stage 1 reads “cat”" in lab._message.value
    named(lab, "Reset").click()
    assert lab.cues == lab.suggested
    lab._text.value = "the mouse"
    assert lab.sentence == "the mouse" and rows(lab) == [("stages 1, 2", "a mouse")]
    # Asked when it was made, by four changes, and by the sentence; controls that followed asked for nothing.
    assert len(method.asked) == 6


@pytest.mark.usefixtures("unpainted")
def test_errors_of_controls_are_sentences_and_controls_go_back(lab):
    lab._text.value = " "
    assert "✘ the expression is empty" in lab._message.value and lab._text.value == "the dog on the left"
    field = lab._list.children[0].children[1]
    field.value = ""
    assert "✘ the cue is empty; write a short phrase" in lab._message.value and field.value == "a dog"
    field.value = "a unicorn"
    assert "✘ RuntimeError: no such animal. Call set_cue(1, &#x27;a unicorn&#x27;) of the lab" in lab._message.value
    assert field.value == "a dog"
    named(lab, "Add").click()
    assert "✘ the cue is empty" in lab._message.value
    for _ in range(2):
        named(lab, "Delete", line=1).click()
    named(lab, "Delete", line=1).click()
    assert "✘ the last cue cannot be deleted" in lab._message.value
    assert rows(lab) == [("stages 1, 2", "the left one, a dog")]
    lab._text.value = "unheard of"
    assert "✘ the language model is asleep; wake it." in lab._message.value
    assert lab._text.value == "the dog on the left" and len(lab.cues) == 1


@pytest.mark.usefixtures("unpainted")
def test_the_untouched_lab_gives_the_answer_of_the_method(monkeypatch):
    monkeypatch.undo()  # the true CLIP looks
    clip, llm = load_clip("toy"), Scripted()
    crm = Crm(CrmConfig(clip.directions(["a"]).shape[1]))
    method = PcNet(clip, load_sam("toy"), crm, llm, parser())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
    lab, (theirs,) = CueLab(image, "the dog on the left", method), method.predict(image, ["the dog on the left"])
    np.testing.assert_array_equal(lab.prediction.mask, theirs.mask)
    np.testing.assert_allclose(lab.prediction.response_map, theirs.response_map, atol=1e-5)
    assert len(lab.maps()) == 2 and lab.render().figure.axes[2].get_title().startswith("stage 2: “the dog on the left”")
    lab.set_cue(1, "a pizza")
    assert "“a pizza” (shares no word with the sentence" in lab.prediction.trace[0].note
    (theirs,) = method.predict(image, ["the dog on the left"], [lab.cues])
    np.testing.assert_array_equal(lab.prediction.mask, theirs.mask)
    assert not torch.is_tensor(lab.maps()[0])


def test_it_shows_itself_as_widget_and_as_still_picture(lab):
    formatter = DisplayFormatter()
    formatter.active_types = list(formatter.formatters)
    data, _ = formatter.format(lab)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert Image.open(io.BytesIO(data["image/jpeg"])).format == "JPEG"
