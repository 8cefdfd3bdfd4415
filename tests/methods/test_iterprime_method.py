"""IteRPrimE from outside: a tiny random ALBEF, against LAVIS's own passes, one expression and one look at a time."""

import warnings
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.backbones.test_itm import SIZE, picture, shaken, upstream
from tests.methods.test_iterprime_gradcam import slow_aggregate
from tests.methods.test_iterprime_igrs import slow_sharpened, stretch
from tests.methods.test_iterprime_selection import box
from tests.methods.test_iterprime_words import parse_of, slow_pieces
from wris_lib.backbones.itm import Matcher, albef_matcher
from wris_lib.backbones.itm_models import Albef
from wris_lib.backbones.language import Parser, load_parser
from wris_lib.backbones.proposals import Proposer
from wris_lib.errors import WrisError
from wris_lib.evaluate import peak
from wris_lib.methods import iterprime
from wris_lib.methods.iterprime import HIDES, IterPrime
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS
from wris_lib.methods.iterprime.igrs import PAPER, Pass, Refined, Refinement
from wris_lib.methods.iterprime.selection import upsample
from wris_lib.methods.iterprime.words import PREFIX, Pieces
from wris_lib.pretrain.albef import write_vocabulary

WORDS = ["there", "is", "a", "the", "red", "dog", "left", "of", "car", "two"]
# Of several lengths, so that all but the longest are padded; a noun of five pieces; no noun; no effective word.
EXPRESSIONS = ["the red dog", "car left of the two dog", "the red zebra", "red", "left of the"]


class Grammar(Parser):
    """Knows a few words; the first noun is the primary word."""

    def __init__(self):
        pass

    def parse(self, expressions):
        found = [parse_of(text) for text in expressions]
        return [
            replace(parse, primary=next((word for word in parse.words if word.upos == "NOUN"), None)) for parse in found
        ]


class Given(Proposer):
    """Proposes what it was given, and counts how often."""

    def __init__(self, masks: np.ndarray) -> None:
        self.masks, self.calls = masks, 0

    def __call__(self, image):
        self.calls += 1
        return self.masks


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.txt"
    write_vocabulary(WORDS, path)
    return path


def tiny(vocabulary, dtype: torch.dtype = torch.float32) -> Matcher:
    model = shaken(Albef(replace(SIZE, text_length=16))).to(dtype)
    return albef_matcher(model, vocabulary, layer=3, device="cpu")


@pytest.fixture(scope="module")
def matcher(vocabulary) -> Matcher:
    return tiny(vocabulary)


def quarters(image: Image.Image) -> np.ndarray:
    """Four boxes and a small one."""
    height, width = shape = (image.height, image.width)
    middle, half = (height + 1) // 2, (width + 1) // 2
    boxes = [(0, 0, middle, half), (0, half, middle, width), (middle, 0, height, half), (middle, half, height, width)]
    return np.stack([box(shape, *each) for each in [*boxes, (0, 0, 1, 1)]])


@pytest.fixture
def build(matcher):
    def build(masks: np.ndarray | None = None, **options) -> IterPrime:
        masks = quarters(picture(0)) if masks is None else masks
        return IterPrime(matcher, Given(masks), Grammar(), **options)

    return build


# ------------------------------------------------------------------------------------------------------------ the maps


def slow_pieces_of(matcher: Matcher, text: str) -> Pieces:
    offsets = matcher.tokenizer(PREFIX + text, return_offsets_mapping=True)["offset_mapping"]
    (parse,) = Grammar().parse([text])
    return Pieces(*slow_pieces(parse, offsets, parse.primary))


def slow_looks(method: IterPrime, image: Image.Image, text: str, pieces: Pieces) -> tuple[np.ndarray, list[dict]]:
    """E, and each look: the whole of LAVIS's model forward and backward, every time."""
    matcher, settings = method.matcher, method.settings
    layer = matcher.layer if method.layer is None else method.layer
    original = matcher.preprocess(image)
    visible, average, looks = [True] * 16, None, []
    for number in range(settings.passes + 1):
        pixels, seen = original.clone(), torch.tensor(visible)
        if method.hide == "image":
            for channel in range(3):
                colour = float(original[channel].mean())
                for patch in range(16):
                    if not visible[patch]:
                        top, left = 8 * (patch // 4), 8 * (patch % 4)
                        pixels[channel, top : top + 8, left : left + 8] = colour
            seen = None
        attention, gradient, probability = upstream(matcher, pixels, PREFIX + text, layer, seen)
        found = slow_aggregate(attention, gradient, pieces, method.aggregation)
        before = found if average is None else average
        score = float(probability) * np.mean([1 - each for each in stretch(list(before))])
        stop = bool(looks) and score < looks[-1]["score"]
        looks.append({"map": found, "visible": visible, "score": score, "itm": float(probability), "kept": not stop})
        if stop:
            break
        average = found if number == 0 else settings.decay * average + (1 - settings.decay) * found
        sharp = slow_sharpened(list(found))
        visible = [was and each < settings.threshold for was, each in zip(visible, sharp, strict=True)]
        if not any(visible):
            break
    return average, looks


def check_looks(method: IterPrime, seed: int = 0) -> list[Refined]:
    image = picture(seed)
    found = method.look(image, EXPRESSIONS)
    assert len(found) == len(EXPRESSIONS)
    for text, refined in zip(EXPRESSIONS, found, strict=True):
        average, looks = slow_looks(method, image, text, slow_pieces_of(method.matcher, text))
        np.testing.assert_allclose(refined.response_map, average, atol=1e-4)
        assert [each.kept for each in refined.passes] == [each["kept"] for each in looks]
        for one, look in zip(refined.passes, looks, strict=True):
            np.testing.assert_allclose(one.response_map, look["map"], atol=1e-4)
            assert one.visible.tolist() == look["visible"]
            assert one.probability == pytest.approx(look["itm"], abs=1e-5)
            assert one.score == pytest.approx(look["score"], abs=1e-4)
    return found


@pytest.mark.parametrize("hide", HIDES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_maps_are_those_of_the_whole_model_run_for_each_look(build, hide, aggregation):
    found = check_looks(build(aggregation=aggregation, hide=hide))
    assert max(len(each.passes) for each in found) > 1


def test_passes_threshold_and_decay_reach_the_refinement(build):
    """ν among them; with a threshold of 1 only the maximum is hidden, so looks go on."""
    method = build(settings=Refinement(5, 1.0, 0.3))
    assert max(len(each.passes) for seed in range(4) for each in check_looks(method, seed=seed)) > 2
    assert [len(each.passes) for each in check_looks(build(settings=Refinement(passes=0)))] == [1] * len(EXPRESSIONS)


@pytest.mark.parametrize("layer", [2, 4])
def test_another_layer(build, layer):
    found = check_looks(build(layer=layer, settings=Refinement(passes=1)))
    usual = build(settings=Refinement(passes=1)).look(picture(0), EXPRESSIONS)
    assert not torch.allclose(found[0].response_map, usual[0].response_map, atol=1e-2)


def test_a_layer_without_cross_attention(build):
    with pytest.raises(WrisError, match="layer 1 has no cross-attention; choose one from 2 to 4"):
        build(layer=1).predict(picture(0), ["dog"])


def test_hiding_in_the_image_does_not_change_the_first_look(build):
    attention, painted = (build(hide=hide).look(picture(2), EXPRESSIONS) for hide in HIDES)
    later = 0
    for first, second in zip(attention, painted, strict=True):
        assert torch.equal(first.passes[0].response_map, second.passes[0].response_map)
        assert first.passes[0].probability == second.passes[0].probability
        for one, other in zip(first.passes[1:2], second.passes[1:2], strict=True):
            assert torch.equal(one.visible, other.visible)
            later += not torch.allclose(one.response_map, other.response_map, atol=1e-3)
    assert later


def test_the_image_is_encoded_once_unless_it_is_painted(build, matcher, monkeypatch):
    encoded, original = [], matcher.encode_images
    monkeypatch.setattr(matcher, "encode_images", lambda pixels: encoded.append(len(pixels)) or original(pixels))
    build().look(picture(0), EXPRESSIONS)
    assert encoded == [1]
    encoded.clear()
    found = build(hide="image").look(picture(0), EXPRESSIONS)
    looked = [sum(len(each.passes) > number for each in found) for number in range(1, 4)]
    assert encoded == [1, *filter(None, looked)]


def test_expressions_do_not_depend_on_one_another(build):
    method = build()
    for text, together in zip(EXPRESSIONS, method.look(picture(3), EXPRESSIONS), strict=True):
        (alone,) = method.look(picture(3), [text])
        torch.testing.assert_close(alone.response_map, together.response_map, atol=1e-5, rtol=0)
        assert len(alone.passes) == len(together.passes)


def test_another_primary_word_can_be_named(build):
    """Any word of the expression, or none."""
    method, text = build(settings=Refinement(passes=0)), "car left of the red dog"
    (parse,) = Grammar().parse([text])
    first = method.look(picture(0), [text])[0].response_map
    assert torch.equal(method.look(picture(0), [text], [parse.words[0]])[0].response_map, first)
    offsets = method.matcher.tokenizer(PREFIX + text, return_offsets_mapping=True)["offset_mapping"]
    maps = [first]
    for word in [parse.words[5], parse.words[1], None]:
        (found,) = method.look(picture(0), [text], [word])
        expected, _ = slow_looks(method, picture(0), text, Pieces(*slow_pieces(parse, offsets, word)))
        np.testing.assert_allclose(found.response_map, expected, atol=1e-4)
        assert all(not torch.allclose(found.response_map, other, atol=1e-3) for other in maps)
        maps.append(found.response_map)


@pytest.mark.parametrize("text", ["the", "left of the", "is the"])
def test_only_stop_words_give_the_mean_over_all_tokens(build, text):
    maps = [build(aggregation=how).look(picture(0), [text])[0].response_map for how in AGGREGATIONS]
    assert all(torch.equal(each, maps[0]) for each in maps)
    assert maps[0].max() > 0


def test_an_expression_beyond_the_text_length(build):
    """Its nouns are cut off, so it has none; what is left is read."""
    method, text = build(aggregation="pwem", settings=Refinement(passes=0)), "red " * 20 + "dog"
    with pytest.warns(UserWarning, match="the matching model reads 16 tokens; words behind them are ignored"):
        (long,) = method.look(picture(0), [text])
    (short,) = method.look(picture(0), [("red " * 11).strip()])
    torch.testing.assert_close(long.response_map, short.response_map, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hide", HIDES)
def test_a_half_precision_model_gives_maps_in_single_precision(vocabulary, dtype, hide):
    method = IterPrime(tiny(vocabulary, dtype), Given(quarters(picture(0))), Grammar(), hide=hide)
    for each in method.look(picture(0), EXPRESSIONS):
        assert each.response_map.dtype == each.passes[-1].response_map.dtype == torch.float32
        assert torch.isfinite(each.response_map).all() and each.response_map.max() <= 1
    assert all(each.mask.any() for each in method.predict(picture(0), EXPRESSIONS))


def test_nothing_can_be_differentiated_and_nothing_is_left_behind(build, matcher):
    with torch.no_grad():
        (quiet,) = build().look(picture(0), ["the red dog"])
    (found,) = build().look(picture(0), ["the red dog"])
    assert torch.equal(quiet.response_map, found.response_map) and not found.response_map.requires_grad
    assert all(each.grad is None for each in matcher.model.parameters())


# ----------------------------------------------------------------------------------------------------- the predictions


@pytest.mark.parametrize("size", [(50, 40), (31, 90), (200, 3), (1, 1)])
def test_a_prediction_has_the_promised_form(build, size):
    width, height = size
    image = picture(0).resize(size)
    masks = quarters(image)
    method = build(masks)
    for prediction, refined in zip(method.predict(image, EXPRESSIONS), method.look(image, EXPRESSIONS), strict=True):
        assert prediction.mask.shape == prediction.response_map.shape == (height, width)
        assert prediction.mask.dtype == bool and any(np.array_equal(prediction.mask, each) for each in masks)
        assert np.array_equal(
            prediction.response_map, upsample(refined.response_map.unflatten(0, (4, 4)), (height, width))
        )
        ((x, y),) = prediction.points
        assert (x, y) == tuple(each + 0.5 for each in peak(prediction.response_map))
        assert prediction.mask[int(y), int(x)] and prediction.point_labels.tolist() == [1]
        assert type(prediction.score) is float and prediction.score == refined.passes[0].probability
        *looks, last = prediction.trace
        assert [stage.name for stage in looks] == ["first look", "pass 1", "pass 2", "pass 3"][: len(refined.passes)]
        for stage, one in zip(looks, refined.passes, strict=True):
            assert np.array_equal(stage.response_map.ravel(), one.response_map)
        filled = masks.any(axis=(1, 2))  # an image of a single pixel has no four quarters
        assert last.name == "proposals" and np.array_equal(last.masks, masks[filled])
        assert len(last.scores) == filled.sum()


def fixed(maps: list[np.ndarray], kept: list[bool]) -> Refined:
    seen = torch.ones(16, dtype=torch.bool)
    tensors = [torch.from_numpy(each.astype(np.float32).ravel()) for each in maps]
    passes = [
        Pass(each, each, seen, 0.9 - 0.2 * number, 0.5 - 0.1 * number, keep)
        for number, (each, keep) in enumerate(zip(tensors, kept, strict=True))
    ]
    return Refined(tensors[sum(kept) - 1], passes)


def corner(row: int, column: int) -> np.ndarray:
    found = np.zeros((4, 4))
    found[row, column] = 1
    return found


def test_the_refined_map_chooses_and_notes_say_what_happened(build, monkeypatch):
    image = picture(0)
    method, masks = build(), quarters(image)
    refined = [fixed([corner(0, 3)], [True]), fixed([corner(3, 0), corner(3, 3), corner(0, 3)], [True, True, False])]
    monkeypatch.setattr(method, "look", lambda image, expressions: refined)
    first, second = method.answer(image, ["dog", "car"], masks)
    assert np.array_equal(first.mask, masks[1]) and np.array_equal(second.mask, masks[3])
    assert [stage.note for stage in first.trace] == ["ITM 0.900, S 0.500, kept", "number 2 fits best"]
    assert [stage.note for stage in second.trace] == [
        "ITM 0.900, S 0.500, kept",
        "ITM 0.700, S 0.400, kept",
        "ITM 0.500, S 0.300, rejected",
        "number 4 fits best",
    ]
    assert (first.score, second.score) == (0.9, 0.9)


def test_when_no_proposal_survives_the_note_says_so(build, monkeypatch):
    image = picture(0)
    method, masks = build(), quarters(image)[:3]
    monkeypatch.setattr(method, "look", lambda image, expressions: [fixed([corner(3, 3)], [True])])
    (prediction,) = method.answer(image, ["dog"], masks)
    best = int(prediction.trace[-1].scores.argmax())
    assert np.array_equal(prediction.mask, masks[best]) and prediction.mask.any()
    assert prediction.trace[-1].note == (
        f"number {best + 1} fits best of all; none holds the peak without lying scattered"
    )


def test_no_expressions_and_nobody_is_asked(build, matcher, monkeypatch):
    method = build()
    monkeypatch.setattr(matcher, "encode_images", None)
    assert method.predict(picture(0), []) == [] and method.propose.calls == 0
    assert method.look(picture(0), []) == [] and method.answer(picture(0), [], quarters(picture(0))) == []


def test_proposals_are_asked_for_once(build):
    method = build()
    method.predict(picture(0), EXPRESSIONS)
    assert method.propose.calls == 1


@pytest.mark.parametrize("count", [0, 2])
def test_without_proposals_the_mask_is_empty(build, count):
    """Empty masks are none. What the model has seen is told all the same."""
    nothing, quartered = build(np.zeros((count, 40, 50), dtype=bool)), build()
    with pytest.warns(UserWarning, match="^nothing is proposed in this image, so nothing can be chosen.$"):
        (found,) = nothing.predict(picture(0), ["dog"])
    (usual,) = quartered.predict(picture(0), ["dog"])
    assert found.mask.shape == (40, 50) and not found.mask.any()
    assert found.trace[-1].note == "nothing is proposed in this image" and found.trace[-1].masks.shape == (0, 40, 50)
    assert found.trace[-1].scores.shape == (0,)
    assert np.array_equal(found.response_map, usual.response_map) and np.array_equal(found.points, usual.points)


def test_an_empty_proposal_is_passed_over(build):
    masks = quarters(picture(0))
    (alone,) = build().answer(picture(0), ["dog"], masks)
    (beside,) = build().answer(picture(0), ["dog"], np.concatenate([np.zeros_like(masks[:1]), masks]))
    assert np.array_equal(alone.mask, beside.mask) and np.array_equal(alone.trace[-1].scores, beside.trace[-1].scores)


def test_proposals_of_another_size(build):
    with pytest.raises(WrisError, match="the proposals are 50×41 pixels and the map is 50×40; give proposals of"):
        build().answer(picture(0), ["dog"], np.ones((2, 41, 50), dtype=bool))


def test_odd_sentences_with_the_toy_parser(build):
    """A word that the tokenizer splits, one that it does not know, and half of a character."""
    method = build()
    method.parser = load_parser("toy")
    texts = ["the zebra", "the 🐕", "!!", "Привет", "\ud83d dog"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictions = method.predict(picture(0), texts)
    assert len(predictions) == len(texts) and all(np.isfinite(each.response_map).all() for each in predictions)


# ------------------------------------------------------------------------------------------------------------- options


def test_options_that_nobody_knows(build):
    with pytest.raises(WrisError, match="no aggregation 'best'; choose one of: mean, gvlp, local, global, pwem"):
        build(aggregation="best")
    with pytest.raises(WrisError, match="nothing can be hidden in 'text'; choose one of: attention, image"):
        build(hide="text")


@pytest.fixture
def asked(matcher, monkeypatch) -> list[tuple]:
    """What was loaded, and with which arguments; nothing really is."""
    asked = []
    made = {"load_proposer": Given(np.ones((1, 2, 2))), "load_matcher": matcher, "load_parser": Grammar()}
    for name, thing in made.items():
        monkeypatch.setattr(iterprime, name, lambda *args, name=name, thing=thing: asked.append((name, *args)) or thing)
    return asked


def test_loading_hands_every_option_on(asked, matcher):
    usual = IterPrime.load("paper", "cpu")
    assert asked == [
        ("load_proposer", "sam", "paper", "cpu"),
        ("load_matcher", "paper", "cpu"),
        ("load_parser", "paper"),
    ]
    assert usual.matcher is matcher and isinstance(usual.parser, Grammar) and isinstance(usual.propose, Given)
    assert (usual.aggregation, usual.layer, usual.hide, usual.settings) == ("pwem", None, "attention", PAPER)
    other = IterPrime.load("toy", None, "gvlp", 2, 1, 0.4, 0.7, "image", True, True, "mask2former")
    assert asked[3] == ("load_proposer", "mask2former", "toy", None)
    assert (other.aggregation, other.layer, other.hide) == ("gvlp", 2, "image")
    assert astuple(other.settings) == (1, 0.4, 0.7, True, True)


def test_variants_are_options_of_load(asked):
    built = {name: IterPrime.load("toy", **options) for name, options in IterPrime.variants.items()}
    rows = {name: (each.aggregation, each.settings.passes) for name, each in built.items()}
    others = {how: (how, 0) for how in ("mean", "gvlp", "local", "global")}
    assert rows == {"": ("pwem", 3), "once": ("pwem", 0)} | others
    assert set(IterPrime.parts) == {"itm", "sam", "parser"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"passes": -1}, "-1 refinement passes"), ({"threshold": 0.0}, "θ is 0.0"), ({"decay": 1.5}, "λ is 1.5")],
)
def test_numbers_out_of_range_are_said_before_anything_is_loaded(asked, changes, message):
    with pytest.raises(WrisError, match=message):
        IterPrime.load("toy", **changes)
    assert asked == []
