"""PCNet as a method: a tiny module, away from its start, between CLIP and SAM, looked at from outside."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_pcnet_crm import perturbed
from tests.methods.test_pcnet_training import Nobody, Nouns
from tests.methods.test_ppt_training import picture
from wris_lib import methods
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.language import Parse
from wris_lib.backbones.trained import save_trained
from wris_lib.errors import WrisError
from wris_lib.evaluate import peak
from wris_lib.methods import Prediction, load_method, pcnet, segment
from wris_lib.methods.pcnet import MASKS, PcNet, Tris
from wris_lib.methods.pcnet.crm import Crm, CrmConfig, response_maps
from wris_lib.methods.pcnet.vision import see

tokenizer, clip, segmenter = test_clip.tokenizer, test_ppt_training.clip, test_ppt_training.segmenter

CHANNELS = 20  # of the tiny CLIP's joint space
EXPRESSIONS = ["the red dog", "car", "the dog left of the car"]
SIZES = [(64, 64), (120, 50), (31, 90), (200, 3), (1, 1)]  # width, height


class Asked(Nouns):
    """Remembers what it was asked."""

    name = "asked"

    def __init__(self):
        self.prompts = []

    def answer(self, prompts):
        self.prompts += prompts
        return super().answer(prompts)


class Phrases(Nobody):
    """Finds two phrases in everything."""

    def parse(self, expressions):
        return [Parse(text, [], ["a phrase of it", text], None) for text in expressions]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No answer is known yet."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))


def module(stages: int = 2) -> Crm:
    return perturbed(Crm(CrmConfig(CHANNELS, stages, "VTA+TTA")))


@pytest.fixture
def build(clip, segmenter):
    """PCNet with options; with a language model that answers."""

    def build(mask: str = "sam", cues=None, stages: int = 2) -> PcNet:
        return PcNet(clip, segmenter, module(stages), Asked(), Nobody(), mask, cues)

    return build


def same(first: Prediction, second: Prediction) -> None:
    np.testing.assert_allclose(first.response_map, second.response_map, atol=1e-4)
    assert first.score == pytest.approx(second.score, abs=1e-4) and (first.mask == second.mask).mean() > 0.999
    assert np.array_equal(first.points, second.points)


def notes(prediction: Prediction) -> list[str]:
    return [stage.note for stage in prediction.trace[:-1]]


# --------------------------------------------------------------------------------------------------------- what comes


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_a_prediction_has_the_promised_form(build, size, mask):
    width, height = size
    image = picture((max(width, 2), height), 5).resize(size)
    predictions = build(mask).predict(image, EXPRESSIONS)
    assert len(predictions) == len(EXPRESSIONS)
    for text, prediction in zip(EXPRESSIONS, predictions, strict=True):
        assert prediction.mask.shape == prediction.response_map.shape == (height, width)
        assert prediction.mask.dtype == bool and prediction.response_map.min() >= 0
        assert prediction.response_map.max() <= 1 and type(prediction.score) is float
        assert prediction.points.shape == (len(prediction.point_labels), 2) and prediction.point_labels.all()
        assert (prediction.points >= 0).all() and (prediction.points <= [width, height]).all()
        first, second, last = prediction.trace
        assert (first.name, second.name) == ("stage 1", "stage 2")
        assert notes(prediction) == [f"“a {text.split()[-1]}”", f"“{text}”"]
        assert first.response_map.shape == second.response_map.shape == (4, 4)
        assert last.masks.shape == ((3 if mask == "sam" else 1), height, width)


def by_hand(method: PcNet, text: str, image) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of all stages, and as large as the image."""
    visual, grid = see(method.clip, [image])
    cues = [f"a {text.split()[-1]}", text]
    sentence, *pieces = (method.clip.directions([each])[None] for each in (text, *cues))
    maps = torch.cat(method.crm(visual, sentence, pieces))[:, 0].unflatten(1, grid)
    return maps, interpolate(maps[None], (image.height, image.width), mode="bilinear")[0]


def test_sam_is_asked_at_the_peak_of_the_last_stage(build, segmenter):
    image = picture((90, 60), 1)
    method, embedded = build("sam"), segmenter.embed(image)
    for text, prediction in zip(EXPRESSIONS, method.predict(image, EXPRESSIONS), strict=True):
        coarse, large = by_hand(method, text, image)
        for stage, scores in zip(prediction.trace[:-1], coarse, strict=True):
            np.testing.assert_allclose(stage.response_map.ravel(), response_maps(scores.flatten()), atol=1e-4)
        x, y = peak(large[-1].numpy())
        assert prediction.points.tolist() == [[x + 0.5, y + 0.5]] and prediction.point_labels.tolist() == [1]
        decoded = segmenter.decode(embedded, torch.tensor([[[x + 0.5, y + 0.5]]]), torch.ones(1, 1, dtype=torch.long))
        best = decoded.iou[0].argmax()
        assert (segmenter.masks(embedded, decoded)[0, best] == prediction.mask).mean() > 0.999
        assert prediction.score == pytest.approx(decoded.iou[0, best].item(), abs=1e-4)
        assert prediction.trace[-1].note == f"SAM trusts number {best + 1} most"


def test_a_map_is_a_mask(build):
    image, method = picture((90, 60), 1), build("map")
    for text, prediction in zip(EXPRESSIONS, method.predict(image, EXPRESSIONS), strict=True):
        _, large = by_hand(method, text, image)
        expected = response_maps(large[-1].flatten()).view(60, 90).numpy()
        np.testing.assert_allclose(prediction.response_map, expected, atol=1e-4)
        assert np.array_equal(prediction.mask, prediction.response_map > 0.5) and prediction.mask.any()
        assert prediction.points.shape == (0, 2)
        assert -1 <= prediction.score <= 1


@pytest.mark.parametrize("mask", MASKS)
def test_a_map_without_any_answer(build, monkeypatch, mask):
    method = build(mask)
    monkeypatch.setattr(method, "score_maps", lambda visual, texts, cues: -torch.ones(len(texts), 2, 16))
    (prediction,) = method.predict(picture((64, 40), 0), ["car"])
    assert not prediction.response_map.any() and np.isfinite(prediction.score)
    if mask == "map":
        assert not prediction.mask.any() and prediction.score < 0
    else:  # all cells are the peak
        np.testing.assert_allclose(prediction.points, [[32, 20]], atol=1)


def test_sentences_do_not_depend_on_one_another(build):
    image, method = picture((90, 60), 1), build()
    together = method.predict(image, EXPRESSIONS)
    for text, prediction in zip(EXPRESSIONS, together, strict=True):
        same(prediction, *method.predict(image, [text]))
    assert len({prediction.response_map.tobytes() for prediction in together}) == len(EXPRESSIONS)  # words matter


def test_clip_and_sam_look_once_and_nobody_is_asked_for_nothing(build, clip, segmenter, monkeypatch):
    calls, method = [], build()
    clip.directions(["car"])  # which remembers the empty text
    for owner, name in ((clip, "patch_features"), (clip, "text_features"), (segmenter, "embed")):
        original = getattr(owner, name)

        def counted(*arguments, name=name, original=original):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)
    assert method.predict(picture((64, 64), 0), []) == [] and calls == method.llm.prompts == []
    method.predict(picture((64, 64), 0), EXPRESSIONS)
    assert calls.count("embed") == 1 and calls.count("text_features") == 3  # sentences, and two cues
    assert method.llm.prompts == EXPRESSIONS
    looks = [each for each in calls if each != "text_features"]
    method.predict(picture((64, 64), 0), ["the other dog"])
    assert [each for each in calls if each != "text_features"] == looks
    method.predict(picture((64, 64), 1), ["the other dog"])
    assert [each for each in calls if each != "text_features"] == 2 * looks


def test_nothing_is_trained_any_more(build):
    method = build()
    assert not method.crm.training and not any(p.requires_grad for p in method.crm.parameters())


def test_a_sentence_that_is_too_long_for_clip(build):
    """And for a language model's answer, so that the parser is asked."""
    text, method = "dog " * 40 + "car", build()
    method.parser = Phrases()
    with pytest.warns(UserWarning, match="CLIP reads 12 tokens; words behind them are ignored"):
        (prediction,) = method.predict(picture((64, 64), 0), [text])
    assert prediction.mask.shape == (64, 64) and notes(prediction) == [
        "“a phrase of it” (shares no word with the sentence: about something else?)",
        f"“{text}”",
    ]


# ---------------------------------------------------------------------------------------------------------------- cues


def test_the_callers_cues_take_the_place_of_the_models(build):
    image, method = picture((90, 60), 1), build()
    given = [["a dog", "the red dog", "the dog"], ("the red car",), [" a car ", "the car"]]
    predictions = method.predict(image, EXPRESSIONS, given)
    assert method.llm.prompts == []
    assert [notes(prediction) for prediction in predictions] == [
        ["“a dog”", "“the red dog”"],  # as many as there are stages
        ["“the red car”"] * 2,  # repeated when they are fewer
        ["“a car”", "“the car”"],
    ]
    (model,) = method.predict(image, EXPRESSIONS[:1])
    (caller,) = method.predict(image, EXPRESSIONS[:1], [["a dog", "the red dog"]])
    same(model, caller)  # the same cues have the same answer, whoever gave them
    (other,) = method.predict(image, EXPRESSIONS[:1], [["a man", "the man"]])
    assert not np.allclose(other.response_map, model.response_map, atol=1e-3)


def test_a_cue_about_another_thing_is_noted(build):
    (prediction,) = build().predict(picture((64, 64), 0), ["the red dog"], [["a man", "the dog"]])
    strange, fitting = notes(prediction)
    assert strange == "“a man” (shares no word with the sentence: about something else?)" and fitting == "“the dog”"


def test_cues_for_every_sentence(build):
    image, method = picture((64, 64), 0), build(cues=["a dog"])
    predictions = method.predict(image, EXPRESSIONS)
    assert method.llm.prompts == [] and all("“a dog”" in note for each in predictions for note in notes(each))
    (given,) = method.predict(image, EXPRESSIONS[1:2], [["a car"]])
    assert notes(given) == ["“a car”"] * 2  # those of a sentence come first


@pytest.mark.parametrize("cues", [[], [["a man"]], [["a man"]] * 3])
def test_as_many_lists_of_cues_as_sentences(build, cues):
    with pytest.raises(WrisError, match=f"there are {len(cues)} lists of cues for 2 sentences; give one for each"):
        build().cues_of(["the man", "the dog"], cues)


def test_more_stages_than_the_model_is_usually_asked_cues_for(build):
    (prediction,) = build(stages=7).predict(picture((64, 64), 0), ["the red dog"])
    assert notes(prediction) == (["“a dog”", "“the red dog”"] * 4)[:7]


def test_cues_that_are_none(build):
    image = picture((64, 64), 0)
    with pytest.raises(WrisError, match="the list of cues is empty; give at least one, such as “a man”"):
        build(cues=[])
    with pytest.raises(WrisError, match=r"cues are several texts, not one: write \('a dog',\) instead of 'a dog'"):
        build(cues="a dog")
    with pytest.raises(WrisError, match="the expression is empty"):
        build(cues=["a dog", "  "])
    with pytest.raises(WrisError, match="the list of cues is empty"):
        build().predict(image, ["dog"], [[]])
    with pytest.raises(WrisError, match="cues are several texts, not one"):
        build().predict(image, ["dog"], ["a dog"])


def test_cues_that_nobody_reads(clip, segmenter):
    with pytest.raises(WrisError, match="tris reads no cues; leave them out"):
        Tris(clip, segmenter, module(stages=0), None, None, cues=["a dog"])


def test_a_kind_of_mask_that_is_none(build):
    with pytest.raises(WrisError, match="pcnet makes no masks by 'box'; choose one of: sam, map"):
        build("box")


# ---------------------------------------------------------------------------------------------------------------- TRIS


def test_tris_asks_no_language_model(clip, segmenter):
    image = picture((90, 60), 1)
    method = Tris(clip, segmenter, module(stages=0), None, None)
    for text, prediction in zip(EXPRESSIONS, method.predict(image, EXPRESSIONS), strict=True):
        visual, grid = see(clip, [image])
        (scores,) = method.crm(visual, clip.directions([text])[None], [])
        x, y = peak(interpolate(scores.unflatten(2, grid), (60, 90), mode="bilinear")[0, 0].numpy())
        assert prediction.points.tolist() == [[x + 0.5, y + 0.5]] and notes(prediction) == [f"“{text}”"]
    with pytest.raises(WrisError, match="tris makes no masks by 'box'"):
        Tris(clip, segmenter, module(stages=0), None, None, "box")


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def models(clip, segmenter, monkeypatch):
    """`load` finds the tiny models in every stack."""
    monkeypatch.setattr(pcnet, "load_clip", lambda stack, device: clip)
    monkeypatch.setattr(pcnet, "load_sam", lambda stack, device: segmenter)
    monkeypatch.setattr(pcnet, "load_llm", lambda stack: Asked())
    monkeypatch.setattr(pcnet, "load_parser", lambda stack: Nobody())
    methods._load.cache_clear()
    yield
    methods._load.cache_clear()


@pytest.fixture
def path(clip, tmp_path) -> str:
    save_trained(module(), "pcnet", clip, tmp_path / "mine.safetensors")
    return str(tmp_path / "mine.safetensors")


def test_segment_takes_a_file_of_weights(models, build, path):
    image = picture((70, 40), 6)
    prediction = segment(image, "the red dog", method="pcnet", weights=path, mask="map")
    (expected,) = build("map").predict(image, ["the red dog"])
    np.testing.assert_allclose(prediction.response_map, expected.response_map, atol=0.05)  # 16-bit floats
    on_paper = segment(image, "the red dog", method="pcnet", stack="paper", weights=path, mask="map")
    assert np.array_equal(on_paper.mask, prediction.mask)


def test_a_file_that_was_written_anew_is_read_anew(models, clip, path):
    first = load_method("pcnet", weights=path)
    assert load_method("pcnet", weights=path) is first
    save_trained(module(stages=1), "pcnet", clip, Path(path))
    second = load_method("pcnet", weights=path)
    assert (first.crm.config.stages, second.crm.config.stages) == (module().config.stages, 1)


@pytest.mark.parametrize("cues", [["a dog", "the red dog"], ("a dog", "the red dog")])
def test_segment_takes_cues_as_a_list_or_a_tuple(models, path, cues):
    prediction = segment(picture((70, 40), 6), "the red dog", method="pcnet", weights=path, cues=cues)
    assert notes(prediction) == ["“a dog”", "“the red dog”"]
    with pytest.raises(WrisError, match="the list of cues is empty"):
        segment(picture((70, 40), 6), "the red dog", method="pcnet", weights=path, cues=cues[:0])


def test_segment_without_a_language_model(models, clip, tmp_path, monkeypatch):
    save_trained(module(stages=0), "tris", clip, tmp_path / "tris.safetensors")
    monkeypatch.setattr(pcnet, "load_llm", None)
    weights = str(tmp_path / "tris.safetensors")
    assert notes(segment(picture((70, 40), 6), "car", method="tris", weights=weights)) == ["“car”"]


def test_weights_that_are_not_there_or_of_something_else(models, path, clip, tokenizer, tmp_path):
    image = picture((70, 40), 6)
    with pytest.raises(WrisError, match="no trained pcnet comes with the paper stack; train one with .* --stack paper"):
        segment(image, "car", method="pcnet", stack="paper")
    with pytest.raises(
        WrisError, match="there is no trained pcnet at /no/file; `python -m wris_lib train pcnet` makes"
    ):
        segment(image, "car", method="pcnet", weights="/no/file")
    with pytest.raises(WrisError, match="is of format and method .*'pcnet'.* but .*'tris'.* is needed"):
        segment(image, "car", method="tris", weights=path)
    other = Clip(test_clip.tiny_model(quick_gelu=True), tokenizer, dense_size=32, device="cpu")
    save_trained(module(), "pcnet", other, tmp_path / "other.safetensors")
    with pytest.raises(WrisError, match="trained on the features of another CLIP"):
        segment(image, "car", method="pcnet", weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(WrisError, match="pcnet has no option 'kind'; it has: mask, cues, weights, device"):
        segment(image, "car", method="pcnet", kind="plain")
