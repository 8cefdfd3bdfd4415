"""SAM proposes, CLIP chooses: class tokens against a slow computation, and both methods on a drawn scene."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.backbones import test_clip
from tests.backbones.test_clip import layer_norm, softmax, tiny_model
from wris_lib import methods
from wris_lib.backbones import proposals as proposals_module
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.proposals import SETTINGS
from wris_lib.backbones.sam import Segmenter
from wris_lib.data.toyworld.scenes import Scene, sample_scene
from wris_lib.errors import WrisError
from wris_lib.evaluate import peak
from wris_lib.methods import clip_proposals, load_method, segment
from wris_lib.methods.clip_proposals import GlClip, SamClip, box_of, class_tokens

tokenizer = test_clip.tokenizer

NAMES = {"gl_clip": GlClip, "sam_clip": SamClip}


@pytest.fixture(scope="module")
def clip(tokenizer) -> Clip:
    """Tiny: 4 blocks, and 6 × 6 patches where it was made for 4 × 4."""
    return Clip(tiny_model(), tokenizer, dense_size=48, device="cpu")


@pytest.fixture(scope="module")
def toy() -> Clip:
    return load_clip("toy", "cpu")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return sample_scene(np.random.default_rng(3))


@pytest.fixture(scope="module")
def picture(scene) -> Image.Image:
    return Image.fromarray(scene.image)


@pytest.fixture(scope="module")
def proposals(scene) -> np.ndarray:
    """Four of the scene's objects."""
    return np.stack([scene.mask(number) for number in range(4)])


@pytest.fixture(scope="module")
def expressions(scene) -> list[str]:
    return [f"the {each.category} on the left" for each in scene.objects[:3]] + ["a red thing above"]


def random_pixels(side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def random_selections(count: int, patches: int, seed: int = 0) -> torch.Tensor:
    shown = torch.rand(count, patches, generator=torch.Generator().manual_seed(seed)) < 0.3
    shown[:, 0] |= ~shown.any(dim=1)
    return shown


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------------------- class tokens


def streams_of(clip: Clip, pixels: torch.Tensor) -> list[np.ndarray]:
    """What goes into each block while the model computes as ever: class token, then patches."""
    streams, hooks = [], []
    for block in clip.model.visual.transformer.resblocks:
        hooks.append(block.register_forward_pre_hook(lambda _, args: streams.append(args[0].numpy()[0])))
    clip.image_features(pixels)
    for hook in hooks:
        hook.remove()
    return streams


def slow_class_token(clip: Clip, streams: list[np.ndarray], shown: np.ndarray) -> np.ndarray:
    """One selection alone, head by head."""
    visual = clip.model.visual
    blocks = visual.transformer.resblocks
    first = len(blocks) // 2
    own = streams[first][0].astype(np.float64)
    for block, stream in zip(blocks[first:], streams[first:], strict=True):
        seen = layer_norm(np.stack([own, *stream[1:][shown]]), block.ln_1)
        attention, width = block.attn, len(own)
        weight, bias = attention.in_proj_weight.numpy(), attention.in_proj_bias.numpy()
        query, key, value = (
            seen @ weight[part * width :][:width].T + bias[part * width :][:width] for part in range(3)
        )
        size, heads = width // attention.num_heads, []
        for head in range(attention.num_heads):
            part = slice(head * size, (head + 1) * size)
            heads.append(softmax(key[:, part] @ query[0, part] / np.sqrt(size)) @ value[:, part])
        own = own + np.concatenate(heads) @ attention.out_proj.weight.numpy().T + attention.out_proj.bias.numpy()
        own = own + block.mlp(torch.from_numpy(layer_norm(own, block.ln_2)).float()).numpy()
    return unit(layer_norm(own, visual.ln_post) @ visual.proj.numpy())


@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize(("quick_gelu", "layers"), [(False, 4), (True, 4), (False, 5)])
def test_class_tokens_equal_the_slow_computation(tokenizer, side, quick_gelu, layers):
    """Of an odd number of blocks the middle one is of the second half."""
    clip = Clip(tiny_model(quick_gelu, layers), tokenizer, dense_size=48, device="cpu")
    pixels, shown = random_pixels(side), random_selections(5, (side // 8) ** 2)
    found = class_tokens(clip, pixels, shown)
    expected = [slow_class_token(clip, streams_of(clip, pixels), each.numpy()) for each in shown]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("side", [32, 48, 8])
def test_with_all_patches_shown_it_is_clips_own_feature(clip, side):
    """Exactly, but for rounding: the patches are the model's own, so its class token is, too."""
    pixels = random_pixels(side)
    found = class_tokens(clip, pixels, torch.ones(3, (side // 8) ** 2, dtype=torch.bool))
    torch.testing.assert_close(found, clip.image_features(pixels).expand(3, -1), atol=1e-5, rtol=0)


def test_with_all_patches_shown_it_is_the_toy_clips_own_feature(toy, picture):
    pixels = toy.preprocess(picture)[None]
    cells = (pixels.shape[-1] // toy.patch_size) ** 2
    found = class_tokens(toy, pixels, torch.ones(1, cells, dtype=torch.bool))
    torch.testing.assert_close(found, toy.image_features(pixels), atol=1e-4, rtol=0)
    one = torch.zeros(1, cells, dtype=torch.bool)
    one[0, cells // 2] = True
    assert (class_tokens(toy, pixels, one) * found).sum() < 0.99  # cosine


def test_what_is_shown_matters(clip):
    """All patches, all but one, and each by itself, are all different."""
    pixels, cells = random_pixels(32), 16
    shown = torch.cat([torch.ones(1, cells, dtype=torch.bool), ~torch.eye(cells, dtype=torch.bool)])
    shown = torch.cat([shown, torch.eye(cells, dtype=torch.bool)])
    found = class_tokens(clip, pixels, shown)
    distances = torch.cdist(found, found) + 2 * torch.eye(len(shown))
    assert distances.min() > 1e-4
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(shown)))


def test_selections_do_not_see_one_another(clip):
    pixels, shown = random_pixels(48), random_selections(6, 36)
    together = class_tokens(clip, pixels, shown)
    for row in range(6):
        torch.testing.assert_close(together[row : row + 1], class_tokens(clip, pixels, shown[row : row + 1]))
    torch.testing.assert_close(together.flip(0), class_tokens(clip, pixels, shown.flip(0)))


def test_class_tokens_leave_nothing_behind(clip):
    pixels = random_pixels(32)
    before = clip.image_features(pixels)
    found = class_tokens(clip, pixels.requires_grad_(), random_selections(2, 16))
    assert not found.requires_grad and torch.equal(clip.image_features(pixels), before)


# -------------------------------------------------------------------------------------------------------------- boxes


@given(st.integers(0, 100_000), st.integers(1, 9), st.integers(1, 9))
def test_a_box_is_the_smallest_with_the_mask_in_it(seed, height, width):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.random()
    mask[rng.integers(height), rng.integers(width)] = True
    pixels = [(row, column) for row in range(height) for column in range(width) if mask[row, column]]
    left, right = min(column for _, column in pixels), max(column for _, column in pixels)
    top, bottom = min(row for row, _ in pixels), max(row for row, _ in pixels)
    assert box_of(mask) == (left, top, right + 1, bottom + 1)


def test_a_box_cuts_as_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    mask = np.zeros((7, 9), dtype=bool)
    mask[2, 3], mask[4, 8] = True, True
    assert np.array_equal(np.asarray(Image.fromarray(pixels).crop(box_of(mask))), pixels[2:5, 3:9])


# -------------------------------------------------------------------------------------------------------- the methods


def cut(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    rows, columns = np.nonzero(mask)
    return Image.fromarray(pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])


def slow_sam_clip(clip: Clip, image: Image.Image, proposals: np.ndarray, expressions: list[str]) -> np.ndarray:
    """Scores [expression, proposal], one cutting and one text at a time."""
    found = np.zeros((len(expressions), len(proposals)))
    texts = [clip.text_features([text])[0] for text in expressions]
    for number, mask in enumerate(proposals):
        feature = clip.image_features(clip.preprocess(cut(np.asarray(image), mask), clip.native_size)[None])[0]
        for row, text in enumerate(texts):
            found[row, number] = float(feature @ text)
    return found


def slow_shown(mask: np.ndarray, side: int) -> np.ndarray:
    """Patches of which at least half is of the proposal; where there are none, those of which most is."""
    height, width = mask.shape
    shares = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            top, bottom = row * height // side, -(-(row + 1) * height // side)
            left, right = column * width // side, -(-(column + 1) * width // side)
            shares[row, column] = mask[top:bottom, left:right].mean()
    return ((shares >= 0.5) if (shares >= 0.5).any() else (shares == shares.max())).ravel()


def slow_gl_clip(clip: Clip, image: Image.Image, proposals: np.ndarray, expressions: list[str]) -> np.ndarray:
    """0.85 of the global and 0.15 of the local image; half of the sentence and half of its first noun phrase."""
    pixels, parser = clip.preprocess(image)[None], load_parser("toy")
    side, streams = pixels.shape[-1] // clip.patch_size, streams_of(clip, pixels)
    array, texts = np.asarray(image), []
    for text in expressions:
        phrase = parser.parse([text])[0].noun_phrases[0]
        whole, thing = (clip.text_features([each])[0].numpy() for each in (text, phrase))
        texts.append(unit(0.5 * whole + 0.5 * thing))
    colour = array.reshape(-1, 3).mean(axis=0).astype(np.uint8)
    found = np.zeros((len(expressions), len(proposals)))
    for number, mask in enumerate(proposals):
        alone = array.copy()
        alone[~mask] = colour
        local = clip.image_features(clip.preprocess(cut(alone, mask), clip.native_size)[None])[0].numpy()
        within = slow_class_token(clip, streams, slow_shown(mask, side))
        feature = unit(0.85 * within + 0.15 * local)
        for row, text in enumerate(texts):
            found[row, number] = feature @ text
    return found


SLOW = {"gl_clip": slow_gl_clip, "sam_clip": slow_sam_clip}


@pytest.mark.parametrize("name", NAMES)
def test_the_proposal_that_fits_best_is_chosen(toy, picture, proposals, expressions, name):
    predictions = load_method(name).answer(picture, expressions, proposals)
    scores = SLOW[name](toy, picture, proposals, expressions)
    assert len({int(row.argmax()) for row in scores}) > 1  # the sentences mean different things
    for prediction, expected in zip(predictions, scores, strict=True):
        best = int(expected.argmax())
        assert np.array_equal(prediction.mask, proposals[best])
        assert type(prediction.score) is float and prediction.score == pytest.approx(expected[best], abs=1e-4)
        (stage,) = prediction.trace
        assert (stage.name, stage.note) == ("proposals", f"number {best + 1} fits best")
        np.testing.assert_allclose(stage.scores, expected, atol=1e-4)
        assert np.array_equal(stage.masks, proposals)


@pytest.mark.parametrize("name", NAMES)
def test_any_size_of_image_and_proposals_smaller_than_a_patch(toy, name):
    """Single pixels, a row, and a mask of which no patch is filled to the half."""
    method = load_method(name)
    for width, height in [(100, 37), (1, 1)]:
        rng = np.random.default_rng(width)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        proposals = np.zeros((4, height, width), dtype=bool)
        proposals[0, 0, 0] = proposals[1, -1, -1] = proposals[2, height // 2] = True
        proposals[3] = rng.random((height, width)) < 0.2
        proposals[3, 0, -1] = True
        (prediction,) = method.answer(image, ["the red car"], proposals)
        np.testing.assert_allclose(
            prediction.trace[0].scores, SLOW[name](toy, image, proposals, ["the red car"])[0], atol=1e-4
        )
        assert prediction.mask.any() and prediction.mask.shape == (height, width)


@pytest.mark.parametrize("name", NAMES)
def test_expressions_and_proposals_do_not_depend_on_one_another(picture, proposals, expressions, name):
    method = load_method(name)
    together = method.answer(picture, expressions, proposals)
    for text, prediction in zip(expressions, together, strict=True):
        (alone,) = method.answer(picture, [text], proposals[::-1].copy())
        np.testing.assert_allclose(alone.trace[0].scores[::-1], prediction.trace[0].scores, atol=1e-5)
        assert np.array_equal(alone.mask, prediction.mask)
        np.testing.assert_allclose(alone.response_map, prediction.response_map, atol=1e-3)


def test_what_lies_outside_a_box_is_gone_for_sam_clip_only(picture, proposals):
    """GL-CLIP's patches have seen all of the image."""
    left, top, right, bottom = box_of(proposals[0])
    pixels = np.asarray(picture).copy()
    pixels[:top], pixels[bottom:] = 255 - pixels[:top], 255 - pixels[bottom:]
    other = Image.fromarray(pixels)
    sam, gl = load_method("sam_clip"), load_method("gl_clip")
    assert torch.equal(sam.images(picture, proposals[:1]), sam.images(other, proposals[:1]))
    assert (gl.images(picture, proposals[:1]) - gl.images(other, proposals[:1])).abs().max() > 1e-3


def test_a_sentence_that_is_its_own_noun_phrase(toy):
    """Both sides of the text are the same then; otherwise they are not."""
    gl, sam = load_method("gl_clip"), load_method("sam_clip")
    torch.testing.assert_close(gl.texts(["the red car"]), toy.text_features(["the red car"]))
    torch.testing.assert_close(sam.texts(["the car", "dog"]), toy.text_features(["the car", "dog"]))
    both = gl.texts(["the red car left of the dog"])
    expected = toy.text_features(["the red car left of the dog"]) + toy.text_features(["the red car"])
    torch.testing.assert_close(both, expected / expected.norm())
    assert not torch.allclose(both, sam.texts(["the red car left of the dog"]), atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_map_reaches_1_in_the_mask(picture, proposals, name, count):
    (prediction,) = load_method(name).answer(picture, ["the red car"], proposals[:count])
    found = prediction.response_map
    assert found.shape == (picture.height, picture.width) and found.min() >= 0 and found.max() == 1
    assert prediction.mask[found == found.max()].all()
    x, y = peak(found)
    assert prediction.mask[y, x]


@pytest.mark.parametrize("name", NAMES)
def test_a_pixel_has_the_best_score_of_the_proposals_over_it(picture, proposals, name):
    wide = np.stack([*proposals[:3], proposals[0] | proposals[1], np.ones_like(proposals[0])])
    (prediction,) = load_method(name).answer(picture, ["the red car"], wide)
    scores = prediction.trace[0].scores
    scaled = 0.5 + 0.5 * (scores - scores.min()) / (scores.max() - scores.min())  # the worst is seen, too
    expected = np.zeros(wide[0].shape)
    for mask, score in zip(wide, scaled, strict=True):
        expected[mask] = np.maximum(expected[mask], score)
    np.testing.assert_allclose(prediction.response_map, expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------- proposing and loading


def test_both_choose_among_the_proposals_of_the_toy_sam(picture, expressions, scene):
    """Which are made once, and found in the cache by the second method."""
    for name in NAMES:
        predictions = segment(picture, expressions, method=name)
        assert len(predictions) == len(expressions)
        for prediction in predictions:
            assert prediction.mask.shape == prediction.response_map.shape == scene.labels.shape
            assert any(np.array_equal(prediction.mask, mask) for mask in prediction.trace[0].masks)
            assert prediction.points.shape == (0, 2) and prediction.point_labels.shape == (0,)


@pytest.fixture
def proposing(monkeypatch, tmp_path):
    """SAM proposes what it is told to, and remembers how often and with which settings."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    methods._load.cache_clear()
    calls = []

    def proposing(masks: np.ndarray) -> list:
        monkeypatch.setattr(Segmenter, "proposals", lambda self, image, **settings: calls.append(settings) or masks)
        return calls

    yield proposing
    methods._load.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_without_proposals_the_mask_is_empty(picture, proposing, name):
    proposing(np.zeros((0, picture.height, picture.width), dtype=bool))
    with pytest.warns(UserWarning, match="^nothing is proposed in this image, so nothing can be chosen.$"):
        found = segment(picture, "the dog", method=name)
    size = (picture.height, picture.width)
    assert found.mask.shape == found.response_map.shape == size and not found.mask.any()
    assert not found.response_map.any() and len(found.points) == 0 and found.score == 0
    assert [stage.note for stage in found.trace] == ["nothing is proposed in this image"]
    assert found.trace[0].masks.shape == (0, *size) and found.trace[0].scores.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_no_expressions_and_nobody_is_asked(picture, proposing, proposals, name):
    calls = proposing(proposals)
    assert load_method(name).predict(picture, []) == [] and calls == []


@pytest.mark.parametrize("name", NAMES)
def test_stacks_differ_in_how_proposals_are_made(picture, proposals, expressions, proposing, monkeypatch, name):
    """And in nothing else that these methods' code could know."""
    for module, loader in ((clip_proposals, "load_clip"), (proposals_module, "load_sam")):
        original = getattr(module, loader)
        monkeypatch.setattr(module, loader, lambda stack, device, original=original: original("toy", "cpu"))
    monkeypatch.setattr(clip_proposals, "load_parser", lambda stack: load_parser("toy"))
    calls = proposing(proposals[:2])
    toy, paper = (NAMES[name].load(stack).predict(picture, expressions[:2]) for stack in ("toy", "paper"))
    assert calls == [SETTINGS["toy"], SETTINGS["paper"]]
    for first, second in zip(toy, paper, strict=True):
        assert np.array_equal(first.mask, second.mask) and first.score == pytest.approx(second.score)


def test_their_options_are_the_device_and_whose_proposals(picture):
    for name, cls in NAMES.items():
        assert cls.variants == {"": {}}
        with pytest.raises(WrisError, match=f"{name} has no option 'weights'; it has: device, proposals"):
            segment(picture, "dog", method=name, weights="mine")
        with pytest.raises(WrisError, match="^nobody proposes masks by 'me'; choose one of: sam, mask2former.$"):
            segment(picture, "dog", method=name, proposals="me")


@pytest.mark.parametrize("name", NAMES)
def test_odd_sentences(picture, proposals, name):
    texts = ["the", "!!", "Привет", "🐕", "e\u0301t\u00e9 \u200b"]
    predictions = load_method(name).answer(picture, texts, proposals)
    assert len(predictions) == len(texts) and all(np.isfinite(each.trace[0].scores).all() for each in predictions)
    with pytest.warns(UserWarning, match="CLIP reads .* tokens; words behind them are ignored"):
        (long,) = load_method(name).answer(picture, ["red dog " * 60], proposals)
    assert long.mask.any()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_proposal_is_passed_over(picture, proposals, name):
    method, empty = load_method(name), np.zeros_like(proposals[:1])
    (alone,), (beside,) = (method.answer(picture, ["dog"], each) for each in (proposals, np.vstack([empty, proposals])))
    assert np.array_equal(alone.mask, beside.mask)
    with pytest.warns(UserWarning, match="nothing is proposed in this image"):
        (nothing,) = method.answer(picture, ["dog"], empty)
    assert not nothing.mask.any()
