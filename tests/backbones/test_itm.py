"""Image–text matching against the upstream models' own forward and backward passes, with hooks; tiny random models."""

import io
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BlipConfig, BlipForImageTextRetrieval
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

from wris_lib.backbones.itm import Matcher, albef_matcher, as_lavis, load_blip, load_matcher
from wris_lib.backbones.itm_models import Albef, AlbefSize, Blip
from wris_lib.data.toyworld.pretraining import statements
from wris_lib.data.toyworld.scenes import sample_scene
from wris_lib.errors import WrisError
from wris_lib.pretrain.albef import write_vocabulary

SIZE = AlbefSize(
    image_size=32,
    width=12,
    heads=2,
    image_layers=2,
    text_layers=5,
    fusion_layer=2,
    mlp_ratio=2,
    vocabulary=120,
    text_length=10,
    embed_width=6,
    patch_size=8,
)
TEXTS = ["the red dog", "a dog left of the car", "car"]
SCENES = 10  # of which the shipped model is asked


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.txt"
    write_vocabulary(["the", "red", "dog", "a", "left", "of", "car"], path)
    return path


def shaken(model: nn.Module) -> nn.Module:
    """Random weights large enough that nothing is nearly linear, biases included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def matcher(vocabulary):
    return albef_matcher(shaken(Albef(SIZE)), vocabulary, layer=3, device="cpu")


@pytest.fixture(scope="module")
def pixels(matcher):
    return torch.stack([matcher.preprocess(picture(seed)) for seed in range(3)])


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def upstream(matcher, pixels, text, layer, visible=None):
    """What LAVIS's own classes say of one image and one text: attention, gradient, probability."""
    model = matcher.model
    tokens = matcher.tokenizer(text, return_tensors="pt")
    patches = model.visual_encoder(pixels[None])
    seen = torch.ones(1, patches.shape[1], dtype=torch.long)
    if visible is not None:
        seen[0, 1:] = visible.long()
    cross = model.text_encoder.bert.encoder.layer[layer].crossattention.self
    cross.save_attention = True
    model.requires_grad_(True)
    try:
        states = model.text_encoder.bert(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            encoder_attention_mask=seen,
            return_dict=True,
        ).last_hidden_state
        logits = model.itm_head(states[:, 0])
        logits[0, 1].backward()
        attention, gradient = cross.get_attention_map().detach(), cross.get_attn_gradients()
    finally:
        model.zero_grad()
        model.requires_grad_(False)
        cross.save_attention = False
        del cross.attention_map, cross.attn_gradients
    return attention[0, ..., 1:], gradient[0, ..., 1:], logits.detach().softmax(dim=-1)[0, 1]


def assert_same(match, row, expected):
    attention, gradient, probability = expected
    length = attention.shape[1]
    torch.testing.assert_close(match.attention[row, :, :length], attention, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(match.gradient[row, :, :length], gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(match.probability[row], probability, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [2, 3, 4])
def test_texts_about_one_image_are_matched_as_upstream_does_one_by_one(matcher, pixels, layer):
    match = matcher.match(matcher.encode_images(pixels[:1]), matcher.encode_texts(TEXTS), layer=layer)
    for row, text in enumerate(TEXTS):
        assert_same(match, row, upstream(matcher, pixels[0], text, layer))


def test_hidden_patches_are_hidden_in_every_layer(matcher, pixels):
    visible = torch.from_numpy(np.random.default_rng(0).random((3, 16)) < 0.5)
    match = matcher.match(matcher.encode_images(pixels), matcher.encode_texts(TEXTS), visible)
    assert (match.attention.movedim(3, 1)[~visible] == 0).all()
    for row, text in enumerate(TEXTS):
        assert_same(match, row, upstream(matcher, pixels[row], text, 3, visible[row]))


def test_with_everything_hidden_words_look_at_the_image_as_a_whole(matcher, pixels):
    match = matcher.match(
        matcher.encode_images(pixels[:1]), matcher.encode_texts(["dog"]), torch.zeros(1, 16, dtype=torch.bool)
    )
    assert (match.attention == 0).all() and torch.isfinite(match.probability).all()


def test_encoded_things_can_be_chosen_from(matcher, pixels):
    images, texts = matcher.encode_images(pixels), matcher.encode_texts(TEXTS)
    chosen = matcher.match(images[[2, 0]], texts[[1, 0]])
    assert len(images[[2, 0]]) == len(texts[[1, 0]]) == 2 and texts[[1]].spans == [texts.spans[1]]
    assert_same(chosen, 0, upstream(matcher, pixels[2], TEXTS[1], 3))
    assert_same(chosen, 1, upstream(matcher, pixels[0], TEXTS[0], 3))


def test_several_texts_an_image_are_fused_in_groups(matcher, pixels):
    texts = matcher.encode_texts([*TEXTS, TEXTS[0]])
    two = matcher.encode_images(pixels[:2])
    grouped = matcher.model.fuse(texts.states, texts.mask, two, matcher.layers)
    single = matcher.model.fuse(texts.states, texts.mask, two[[0, 0, 1, 1]], matcher.layers)
    torch.testing.assert_close(grouped, single)


def test_spans_say_which_characters_a_token_stands_for(matcher):
    texts = matcher.encode_texts(["The dogs hi", ""])
    pieces = ["The dogs hi"[start:end] for start, end in texts.spans[0]]
    assert pieces == ["", "The", "dog", "s", "h", "i", ""]  # what is no word of the vocabulary is spelt
    assert texts.spans[1] == [(0, 0), (0, 0)] and texts.mask.tolist() == [[True] * 7, [True] * 2 + [False] * 5]


def test_a_text_that_is_too_long_is_cut_with_a_warning(matcher):
    with pytest.warns(UserWarning, match="reads 10 tokens; words behind them are ignored"):
        texts = matcher.encode_texts(["the dog " * 5])
    assert texts.states.shape[1] == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matcher.encode_texts(["the dog " * 4, "", " "])


def test_preprocessing_squashes_and_normalises(matcher):
    white = matcher.preprocess(Image.new("RGB", (70, 30), "white"))
    expected = (1 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])
    assert white.shape == (3, 32, 32)
    np.testing.assert_allclose(white.mean(dim=(1, 2)), expected, rtol=1e-5)


def test_a_layer_without_cross_attention_is_refused(matcher, pixels):
    images, texts = matcher.encode_images(pixels[:1]), matcher.encode_texts(["dog"])
    for layer in (0, 1, 5, -1):
        with pytest.raises(WrisError, match=f"layer {layer} has no cross-attention; choose one from 2 to 4"):
            matcher.match(images, texts, layer=layer)


def test_numbers_of_images_and_texts_must_go_together(matcher, pixels):
    with pytest.raises(WrisError, match="2 images were given for 3 texts; give one, or one for each"):
        matcher.match(matcher.encode_images(pixels[:2]), matcher.encode_texts(TEXTS))


def test_nothing_is_left_behind_also_after_an_exception(matcher, pixels, monkeypatch):
    def state():
        modules = list(matcher.model.modules())
        hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in modules)
        graphs = [p.grad is not None or p.requires_grad for p in matcher.model.parameters()]
        return hooks, any(graphs), {name for m in modules for name in vars(m) if name.startswith("att")}

    before = state()
    images, texts = matcher.encode_images(pixels[:1]), matcher.encode_texts(TEXTS)
    found = matcher.match(images, texts)
    assert not found.attention.requires_grad and not found.gradient.requires_grad
    monkeypatch.setattr(matcher.model, "take", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        matcher.match(images, texts)
    assert state() == before and torch.is_grad_enabled() and not matcher.model.training


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same(vocabulary, precision):
    def answer(dtype):
        matcher = albef_matcher(Albef(SIZE).to(dtype), vocabulary, layer=3, device="cpu")
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in matcher.model.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        images = matcher.encode_images(matcher.preprocess(picture(0))[None])
        return matcher.match(images, matcher.encode_texts(TEXTS), torch.arange(16).repeat(3, 1) % 3 > 0)

    half, full = answer(precision), answer(torch.float32)
    assert half.attention.dtype == half.gradient.dtype == half.probability.dtype == torch.float32
    torch.testing.assert_close(half.attention, full.attention, atol=0.02, rtol=0.1)
    torch.testing.assert_close(half.probability, full.probability, atol=0.05, rtol=0.1)
    assert torch.isfinite(half.gradient).all() and half.gradient.abs().max() > 0


@pytest.fixture(scope="module")
def blip():
    text = BlipTextConfig(
        vocab_size=120,
        hidden_size=12,
        encoder_hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    vision = BlipVisionConfig(
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = BlipConfig(text.to_dict(), vision.to_dict(), image_text_hidden_size=6)
    return shaken(BlipForImageTextRetrieval(config)).eval()


def test_blip_matches_as_transformers_do(blip, vocabulary, pixels):
    tokenizer = albef_matcher(Albef(SIZE), vocabulary, 3, "cpu").tokenizer
    matcher = Matcher(Blip(blip), tokenizer, 1, image_size=32, patch_size=8, text_length=20, device="cpu")
    match = matcher.match(matcher.encode_images(pixels[:1]), matcher.encode_texts(TEXTS))
    assert matcher.grid == (4, 4) and matcher.layers == range(3) and match.attention.shape[-1] == 16
    for row, text in enumerate(TEXTS):
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = blip(tokens["input_ids"], pixels[:1], attention_mask=tokens["attention_mask"]).itm_score
        torch.testing.assert_close(match.probability[row], logits.softmax(dim=-1)[0, 1], atol=1e-5, rtol=1e-4)


def test_blips_gradient_is_that_of_a_small_change(blip, vocabulary, pixels):
    tokenizer = albef_matcher(Albef(SIZE), vocabulary, 3, "cpu").tokenizer
    matcher = Matcher(Blip(blip), tokenizer, 1, image_size=32, patch_size=8, text_length=20, device="cpu")
    model = matcher.model.double()
    images = matcher.encode_images(pixels[:1].double())
    texts = matcher.encode_texts(["red dog"])
    gradient = matcher.match(images, texts).gradient

    def logit(change):
        states = model.attend(model.fuse(texts.states, texts.mask, images, range(1)), texts.mask, 1)
        attention = model.look(1, states, images) + change
        states = model.fuse(model.take(1, states, attention, images), texts.mask, images, range(2, 3))
        return model.itm_head(states[:, 0])[0, 1]

    for head, token, patch in [(0, 0, 3), (1, 2, 15), (1, 1, 0)]:
        change = torch.zeros(1, 2, 4, 17, dtype=torch.double)
        change[0, head, token, patch + 1] = 1e-4
        slope = (logit(change) - logit(-change)) / 2e-4
        torch.testing.assert_close(gradient[0, head, token, patch], slope.float(), atol=1e-5, rtol=1e-3)
    model.float()


def test_blip_is_read_from_a_folder_only(blip, vocabulary, pixels, tmp_path):
    with pytest.raises(WrisError, match="BLIP is not at .*nowhere; get it with `huggingface-cli download"):
        load_blip(tmp_path / "nowhere")
    blip.save_pretrained(tmp_path / "blip")
    albef_matcher(Albef(SIZE), vocabulary, 3, "cpu").tokenizer.save_pretrained(tmp_path / "blip")
    matcher = load_blip(tmp_path / "blip", layer=2, device="cpu")
    match = matcher.match(matcher.encode_images(pixels[:1]), matcher.encode_texts(TEXTS))
    assert matcher.layer == 2 and matcher.text_length == 20 and match.attention.shape == (3, 2, 8, 16)


def test_the_authors_checkpoint_becomes_lavis(matcher, vocabulary, pixels):
    """ALBEF.pth has momentum copies, queues, and embeddings of token types, of which only the first is ever used."""
    types = torch.randn(2, 12)
    positions = "text_encoder.bert.embeddings.position_embeddings.weight"
    state = dict(matcher.model.state_dict())
    authors = {**state, positions: state[positions] - types[0]}
    authors["text_encoder.bert.embeddings.token_type_embeddings.weight"] = types
    authors |= {f"text_encoder_m.{name}": torch.zeros(1) for name in ("a", "b")} | {"image_queue": torch.zeros(2)}
    converted = as_lavis(authors)
    model = Albef(SIZE)
    model.load_state_dict(converted)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name])
    assert "image_queue" in authors  # the given dictionary is left alone


def test_pictures_that_are_cut_short_are_still_noticed_after_lavis_is_imported(matcher):
    """LAVIS tells Pillow to fill them up, once, when it is imported: for the `matcher`, or for a test before."""
    assert "lavis" in sys.modules
    file = io.BytesIO()
    picture(0).save(file, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(file.getvalue()[:-500])).load()


def test_without_lavis_albef_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "lavis.models.med", None)
    with pytest.raises(WrisError, match="LAVIS, whose ALBEF is needed, cannot be imported .* with `--no-deps`"):
        Albef(SIZE)


def test_the_shipped_model_tells_what_is_true():
    """Of scenes that it has never seen: true sentences against nearly the same untrue ones, and against another's."""
    matcher, scenes = load_matcher("toy", "cpu"), []
    for seed in range(SCENES):
        rng = np.random.default_rng([seed, 1])
        scene = sample_scene(rng)
        scenes.append((Image.fromarray(scene.image), *statements(scene, rng)))
    believed = []
    for (image, true, untrue), (_, foreign, _) in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        encoded = matcher.encode_images(matcher.preprocess(image)[None])
        texts = matcher.encode_texts(["there is a " + sentence for sentence in (*true, *untrue, *foreign)])
        believed.append(matcher.match(encoded, texts).probability.split([len(true), len(untrue), len(foreign)]))
    true, untrue, foreign = map(torch.cat, zip(*believed, strict=True))
    assert (true > untrue).float().mean() > 0.65
    assert true.mean() > foreign.mean() + 0.3
