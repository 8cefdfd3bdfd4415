"""PPT as a method: a tiny random generator between CLIP and SAM, looked at from outside."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_ppt_training import IMAGES, TEXTS, picture, signs, spread, tiny_generator, trusted
from wris_lib import methods
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.sam import SamImage, SamMasks
from wris_lib.errors import WrisError
from wris_lib.methods import ppt as module
from wris_lib.methods import segment
from wris_lib.methods.ppt import SHOWN, Ppt
from wris_lib.methods.ppt.weights import save_generator

tokenizer, clip = test_clip.tokenizer, test_ppt_training.clip
segmenter, data = test_ppt_training.segmenter, test_ppt_training.data

EXPRESSIONS = ["the red dog", "car", "the dog left of the car and the man", ""]
SIZES = [(64, 64), (120, 50), (31, 90), (200, 3), (1, 1)]  # width, height


@pytest.fixture(scope="module", params=[False, True], ids=["positive points", "all points"])
def ppt(request, clip, segmenter) -> Ppt:
    return Ppt(clip, segmenter, spread(tiny_generator()), negatives=request.param)


def ask(ppt: Ppt, embedded: SamImage, points: torch.Tensor, labels: np.ndarray) -> SamMasks:
    """SAM's answer to a prompt, by hand: what it is not told of is padding."""
    told = torch.from_numpy(np.where(shown(ppt, labels), labels, -1))
    with torch.no_grad():
        return ppt.sam.decode(embedded, points[None], told[None])


def shown(ppt: Ppt, labels: np.ndarray) -> np.ndarray:
    """Which points SAM is told of."""
    return np.ones(len(labels), bool) if ppt.negatives else labels == 1


@pytest.mark.parametrize("size", SIZES)
def test_a_prediction_has_the_promised_form(ppt, size):
    width, height = size
    image = picture((max(width, 2), height), 5).resize(size)
    predictions = ppt.predict(image, EXPRESSIONS)
    assert len(predictions) == len(EXPRESSIONS)
    for prediction in predictions:
        assert prediction.mask.shape == prediction.response_map.shape == (height, width)
        assert prediction.mask.dtype == bool and prediction.response_map.dtype == np.float32
        assert 0 <= prediction.response_map.min() <= prediction.response_map.max() <= 1
        assert prediction.points.shape == (len(prediction.point_labels), 2)
        assert set(prediction.point_labels.tolist()) <= {0, 1} and prediction.point_labels.any()
        assert (prediction.points >= 0).all() and (prediction.points <= [width, height]).all()
        assert type(prediction.score) is float and 0 <= prediction.score <= 1
        every, best, masks = prediction.trace
        assert every.points.shape == (12, 2) and every.point_labels.shape == (12,) and "4 queries of 3" in every.note
        told = shown(ppt, best.point_labels)
        assert np.array_equal(best.points[told], prediction.points)
        assert (
            np.array_equal(best.point_labels[told], prediction.point_labels) and f"{prediction.score:.2f}" in best.note
        )
        assert masks.masks.shape == (SHOWN, height, width) and np.array_equal(masks.masks[0], prediction.mask)
        assert masks.scores[0] == pytest.approx(prediction.score) and (np.diff(masks.scores) <= 0).all()
        asked = {tuple(point) for point in every.points.round(3).tolist()}
        assert {tuple(point) for point in best.points.round(3).tolist()} <= asked


def test_two_expressions_together_are_two_alone(ppt):
    image = picture((90, 60), 1)
    together = ppt.predict(image, EXPRESSIONS)
    for text, prediction in zip(EXPRESSIONS, together, strict=True):
        (alone,) = ppt.predict(image, [text])
        np.testing.assert_allclose(prediction.points, alone.points, atol=1e-2)
        np.testing.assert_allclose(prediction.response_map, alone.response_map, atol=1e-3)
        assert prediction.score == pytest.approx(alone.score, abs=1e-4)
        assert np.array_equal(prediction.point_labels, alone.point_labels)
        assert (prediction.mask == alone.mask).mean() > 0.999  # a logit of about 0 may fall on either side
    assert len({prediction.score for prediction in together}) == len(EXPRESSIONS)  # words matter


@pytest.mark.parametrize("size", SIZES[:3])
def test_the_mask_is_sams_answer_to_the_best_prompt(ppt, segmenter, size):
    """The points of a prediction are pixels of the image: SAM, asked there by hand, says the same."""
    image = picture(size, 2)
    prompts, embedded = ppt.prompts(image, EXPRESSIONS), segmenter.embed(image)
    for e, prediction in enumerate(ppt.predict(image, EXPRESSIONS)):
        scores = prompts.score_logits[e].sigmoid()
        best = int(scores.argmax())
        assert prediction.score == pytest.approx(scores[best].item())
        labels = signs(prompts.label_logits[e, best].numpy())
        told = shown(ppt, labels)
        np.testing.assert_allclose(prediction.points, prompts.points[e, best].numpy()[told] * size, rtol=1e-5)
        assert prediction.point_labels.tolist() == labels[told].tolist()
        decoded = ask(ppt, embedded, prompts.points[e, best] * torch.tensor(size), labels)
        assert (segmenter.masks(embedded, decoded)[0, decoded.iou[0].argmax()] == prediction.mask).mean() > 0.999


def test_the_map_shows_how_sure_the_best_prompts_are(ppt, segmenter):
    image = picture((50, 80), 3)
    (prediction,) = ppt.predict(image, ["dog"])
    prompts, embedded = ppt.prompts(image, ["dog"]), segmenter.embed(image)
    expected = np.zeros((80, 50))
    for k, score in enumerate(prompts.score_logits[0].sigmoid().tolist()):  # 4 queries, all of which are shown
        points = prompts.points[0, k] * torch.tensor([50, 80])
        decoded = ask(ppt, embedded, points, signs(prompts.label_logits[0, k].numpy()))
        with torch.no_grad():
            logits = trusted(decoded)[None, None]
            logits = segmenter.sam.postprocess_masks(logits, embedded.input_size, embedded.original_size)
        expected = np.maximum(expected, score * logits[0, 0].sigmoid().numpy())
    np.testing.assert_allclose(prediction.response_map, expected, atol=1e-4)


def test_only_the_best_prompts_are_decoded(ppt, monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 2)
    image = picture((64, 64), 4)
    (prediction,) = ppt.predict(image, ["car"])
    scores = ppt.prompts(image, ["car"]).score_logits[0].sigmoid().sort(descending=True).values
    assert prediction.trace[-1].masks.shape == (2, 64, 64)
    assert prediction.trace[-1].scores.tolist() == pytest.approx(scores[:2].tolist())


def test_a_prompt_is_never_of_negative_points_alone(clip, segmenter):
    generator = spread(tiny_generator())
    nn.init.constant_(generator.point_head[-1].bias[2::3], -50.0)  # of x, y, r the last
    ppt, image = Ppt(clip, segmenter, generator), picture((64, 64), 7)
    assert (ppt.prompts(image, ["car"]).label_logits < 0).all()
    (prediction,) = ppt.predict(image, ["car"])
    assert prediction.point_labels.sum() == 1
    assert prediction.trace[0].point_labels.reshape(4, 3).sum(axis=1).tolist() == [1] * 4


def test_sure_of_everything_is_no_problem(clip, segmenter):
    """A score that rounds to 1, and one that rounds to 0."""
    generator = tiny_generator()
    for bias in (200.0, -200.0):
        nn.init.constant_(generator.score_head[-1].bias, bias)
        (prediction,) = Ppt(clip, segmenter, generator).predict(picture((20, 20), 0), ["car"])
        assert prediction.score == (bias > 0) and np.isfinite(prediction.response_map).all()


def test_it_reads_what_the_generator_was_trained_on(ppt, data):
    """Features out of the store, and features made here and now."""
    for e in (0, 1, 3, 5, 9):
        with torch.no_grad():
            stored = ppt.generator(**data.inputs(np.array([e])))
        fresh = ppt.prompts(IMAGES[data.labels.image[e]], [TEXTS[e]])
        for a, b in zip(vars(stored).values(), vars(fresh).values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


def test_clip_and_sam_look_once_and_not_at_all_for_nothing(ppt, clip, segmenter, monkeypatch):
    calls = []
    for owner, name in ((clip, "patch_features"), (clip, "word_features"), (segmenter, "embed")):
        original = getattr(owner, name)

        def counted(*arguments, name=name, original=original):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)
    assert ppt.predict(picture((64, 64), 98), []) == [] and calls == []
    ppt.predict(picture((64, 64), 98), EXPRESSIONS)
    assert sorted(calls) == ["embed", "patch_features", "word_features"]
    ppt.predict(picture((64, 64), 98), ["another question"])
    assert calls[3:] == ["word_features"]
    ppt.predict(picture((64, 64), 99), ["another picture"])
    assert sorted(calls[4:]) == ["embed", "patch_features", "word_features"]


def test_nothing_is_trained_any_more(ppt):
    assert not ppt.generator.training
    assert not any(parameter.requires_grad for parameter in ppt.generator.parameters())
    assert not ppt.prompts(picture((64, 64), 0), ["car"]).points.requires_grad


# ----------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def models(clip, segmenter, monkeypatch):
    """`load` finds the tiny models in every stack."""
    monkeypatch.setattr(module, "load_clip", lambda stack, device: clip)
    monkeypatch.setattr(module, "load_sam", lambda stack, device: segmenter)
    methods._load.cache_clear()
    yield
    methods._load.cache_clear()


def test_segment_takes_a_file_of_weights(models, ppt, clip, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_generator(spread(tiny_generator()), clip, path)
    image = picture((70, 40), 6)
    prediction = segment(image, "the red dog", method="ppt", weights=str(path), negatives=ppt.negatives)
    (expected,) = ppt.predict(image, ["the red dog"])
    np.testing.assert_allclose(prediction.points, expected.points, atol=0.5)  # 16-bit floats
    assert prediction.score == pytest.approx(expected.score, abs=0.01)
    on_paper = segment(image, "the red dog", method="ppt", stack="paper", weights=str(path), negatives=ppt.negatives)
    assert np.array_equal(on_paper.mask, prediction.mask)


def test_the_papers_models_come_without_a_generator(models):
    with pytest.raises(WrisError, match="no trained ppt comes with the paper stack; train one with"):
        segment(Image.new("RGB", (8, 8)), "car", method="ppt", stack="paper")


def test_weights_that_are_not_there_or_of_another_clip(models, clip, tokenizer, tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(WrisError, match="there is no trained ppt at /no/such/file"):
        segment(image, "car", method="ppt", weights="/no/such/file")
    other = Clip(test_clip.tiny_model(quick_gelu=True), tokenizer, dense_size=32, device="cpu")
    save_generator(tiny_generator(), other, tmp_path / "other.safetensors")
    with pytest.raises(WrisError, match="trained on the features of another CLIP"):
        segment(image, "car", method="ppt", weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(WrisError, match="no stack 'big'"):
        segment(image, "car", method="ppt", stack="big")
    with pytest.raises(WrisError, match="ppt has no option 'kind'; it has: weights, device"):
        segment(image, "car", method="ppt", kind="plain")
