"""CLIP's face against slow, obvious computations, on tiny random models of open_clip's own classes."""

import logging
import warnings

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from wris_lib.backbones import checkpoints
from wris_lib.backbones.checkpoints import get_stack, record_sha256
from wris_lib.backbones.clip import Clip, create_clip, load_clip
from wris_lib.data.toyworld.scenes import sample_object_image
from wris_lib.errors import WrisError
from wris_lib.pretrain.clip import write_bpe

WORDS = ["a", "the", "red", "dog", "car", "left", "of", "hand", "and", "band", "man"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.txt.gz"
    write_bpe(WORDS, path)
    return open_clip.SimpleTokenizer(str(path), context_length=12)


def tiny_model(quick_gelu=False, layers=4):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": layers, "head_width": 8}
    text = {"context_length": 12, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.CLIP(20, vision, text, quick_gelu=quick_gelu)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)  # torch starts attention's at 0, which would hide them
    return model


@pytest.fixture
def clip(tokenizer):
    return Clip(tiny_model(), tokenizer, dense_size=48, device="cpu")


def picture(width=50, height=40):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images(size=32, count=2):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x, norm):
    x = x.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    return x * norm.weight.numpy() + norm.bias.numpy()


def slow_surgery(model, image, begin):
    """Methods.md §0 in numpy, token by token and head by head; returns unit vectors of all tokens."""
    visual = model.visual
    inputs, hooks = [], []
    for block in visual.transformer.resblocks:
        hooks.append(block.register_forward_pre_hook(lambda module, args: inputs.append(args[0].numpy()[0])))
    final = []
    hooks.append(visual.ln_post.register_forward_pre_hook(lambda module, args: final.append(args[0].numpy()[0])))
    model.encode_image(image[None])
    for hook in hooks:
        hook.remove()
    blocks = visual.transformer.resblocks
    x = inputs[begin - 1].astype(np.float64)
    for block, stream in list(zip(blocks, inputs, strict=True))[begin - 1 :]:
        attention, width = block.attn, x.shape[1]
        weight, bias = attention.in_proj_weight.numpy()[2 * width :], attention.in_proj_bias.numpy()[2 * width :]
        v = layer_norm(stream, block.ln_1) @ weight.T + bias
        d = width // attention.num_heads
        heads = []
        for head in range(attention.num_heads):
            part = v[:, head * d : (head + 1) * d]
            heads.append(softmax(part @ part.T / np.sqrt(d)) @ part)
        x = x + np.concatenate(heads, axis=1) @ attention.out_proj.weight.numpy().T + attention.out_proj.bias.numpy()
    x[0] = final[0][0]  # the class token goes the model's own way
    x = layer_norm(x, visual.ln_post) @ visual.proj.numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(("quick_gelu", "surgery_from"), [(False, None), (True, None), (False, 1), (False, 4)])
def test_surgery_equals_the_slow_computation(tokenizer, quick_gelu, surgery_from):
    clip = Clip(tiny_model(quick_gelu), tokenizer, dense_size=32, surgery_from=surgery_from, device="cpu")
    begin = surgery_from or 3  # of 4 blocks
    batch = images()
    text = clip.text_features(["the red dog", "car"]).numpy()
    empty = clip.text_features([""]).numpy()[0]
    maps = clip.similarity_map(batch, ["the red dog", "car"], "surgery")
    assert maps.shape == (2, 4, 4)
    for i in range(2):
        expected = slow_surgery(clip.model, batch[i], begin)[1:] @ (text[i] - empty)
        np.testing.assert_allclose(maps[i].numpy().ravel(), expected, atol=1e-5)


def test_plain_map_is_the_projected_patches_with_the_text(clip):
    batch = images()
    clip.model.visual.output_tokens = True
    pooled, patches = clip.model.visual(batch)
    clip.model.visual.output_tokens = False
    patches = F.normalize(patches @ clip.model.visual.proj, dim=-1)
    text = clip.text_features(["the red dog", "car"])
    expected = torch.stack([(patches[i] @ text[i]).reshape(4, 4) for i in range(2)])
    torch.testing.assert_close(clip.similarity_map(batch, ["the red dog", "car"], "plain"), expected)
    torch.testing.assert_close(clip.image_features(batch), F.normalize(pooled, dim=-1))


def test_maps_leave_the_model_as_it_was(clip):
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    output = clip.model.encode_image(images())
    clip.maps(clip.encode_image(picture()), ["the red dog"])
    assert all(torch.equal(before[name], value) for name, value in clip.model.state_dict().items())
    assert torch.equal(clip.model.encode_image(images()), output)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in clip.model.modules())
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_one_image_encoding_serves_many_expressions(clip):
    features = clip.encode_image(picture())
    assert features.surgery.shape == (6, 6, 20) and features.image.shape == (20,)
    together = clip.maps(features, ["the red dog", "car"])
    batch = clip.preprocess(picture())[None].expand(2, -1, -1, -1)
    torch.testing.assert_close(together, clip.similarity_map(batch, ["the red dog", "car"]))
    for kind in ("plain", "surgery"):
        alone = [clip.maps(features, [text], kind)[0] for text in ("the red dog", "car")]
        torch.testing.assert_close(clip.maps(features, ["the red dog", "car"], kind), torch.stack(alone))


def test_label_maps_take_away_what_labels_share(clip):
    features = clip.encode_image(picture())
    labels = ["dog", "car", "the red man"]
    text, v = clip.text_features(labels).numpy(), features.surgery.numpy()
    weights = softmax(2 * text @ features.image.numpy())
    weights = weights / weights.mean()
    products = np.stack([v * text[t] * weights[t] for t in range(3)])  # labels h w channels
    expected = (products - products.mean(axis=0)).sum(axis=-1)
    maps = clip.label_maps(features, labels)
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-6)
    torch.testing.assert_close(maps.sum(dim=0), torch.zeros(6, 6), atol=1e-6, rtol=0)


def test_patch_features_are_the_blocks_outputs(clip):
    outputs = []
    hooks = [
        block.register_forward_hook(lambda m, i, o: outputs.append(o))
        for block in clip.model.visual.transformer.resblocks
    ]
    clip.model.encode_image(images())
    for hook in hooks:
        hook.remove()
    found = clip.patch_features(images(), stages=(4, 1))
    assert [feature.shape for feature in found] == [(2, 24, 4, 4)] * 2
    torch.testing.assert_close(found[0].flatten(2), outputs[3][:, 1:].transpose(1, 2))
    torch.testing.assert_close(found[1].flatten(2), outputs[0][:, 1:].transpose(1, 2))


def test_surgery_is_a_stage_of_the_same_pass(clip):
    batch, calls = images(), []
    block = clip.model.visual.transformer.resblocks[0]
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    second, surgery, fourth = clip.patch_features(batch, (2, "surgery", 4))
    hook.remove()
    assert len(calls) == 1
    assert torch.equal(surgery, clip._encode(batch)[2].permute(0, 3, 1, 2))
    for number, found in ((2, second), (4, fourth)):
        assert torch.equal(found, clip.patch_features(batch, (number,))[0])


@pytest.mark.parametrize(("stages", "run"), [((1,), 1), ((1, 3), 3), (("surgery",), 3), ((2, "surgery"), 3), ((4,), 4)])
def test_blocks_that_nobody_reads_are_not_run(clip, stages, run):
    """Of Surgery's path the last block only reads what comes before it."""
    expected = dict(zip((1, 2, 3, 4, "surgery"), clip.patch_features(images(), (1, 2, 3, 4, "surgery")), strict=True))
    ran = []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in clip.model.visual.transformer.resblocks]
    found = clip.patch_features(images(), stages)
    for hook in hooks:
        hook.remove()
    assert len(ran) == run
    assert all(torch.equal(each, expected[stage]) for stage, each in zip(stages, found, strict=True))


def test_default_stages_are_thirds(tokenizer):
    clip = Clip(tiny_model(layers=12), tokenizer, dense_size=32, device="cpu")
    assert clip.stages == (4, 8, 12)
    assert clip.surgery_from == 7  # as published
    assert len(clip.patch_features(images())) == 3


@pytest.mark.parametrize("stages", [(0,), (5,), (1, 9), ("surgery", "plain")])
def test_stage_that_does_not_exist(clip, stages):
    with pytest.raises(WrisError, match="this CLIP has blocks 1 to 4"):
        clip.patch_features(images(), stages)


def test_other_input_sizes_interpolate_positions(clip):
    assert clip.image_features(images(64)).shape == (2, 20)
    assert clip.patch_features(images(64), (1,))[0].shape == (2, 24, 8, 8)
    # A smooth embedding stays what it was, read at other places: here it is the same everywhere.
    clip.model.visual.positional_embedding[1:] = clip.model.visual.positional_embedding[1]
    flat = torch.ones(1, 3, 32, 32)
    patches, larger = clip.patch_features(flat, (1,))[0], clip.patch_features(torch.ones(1, 3, 64, 64), (1,))[0]
    assert larger.std(dim=(2, 3)).max() < 1e-5 and patches.std(dim=(2, 3)).max() < 1e-5


@pytest.mark.parametrize("size", [30, 4, 0])
def test_size_that_is_no_multiple_of_the_patch(clip, size):
    with pytest.raises(WrisError, match="multiples of the patch size, 8"):
        clip.image_features(torch.zeros(1, 3, size, size))


def test_preprocess_squashes_and_normalises(clip):
    white = clip.preprocess(Image.new("RGB", (100, 10), "white"), 16)
    assert white.shape == (3, 16, 16) and white.dtype == torch.float32
    mean, std = (torch.tensor(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    torch.testing.assert_close(white[:, 0, 0], (1 - mean) / std)
    halves = Image.new("RGB", (100, 10))
    halves.paste((255, 255, 255), (50, 0, 100, 10))
    squashed = clip.preprocess(halves, 16)
    assert squashed[0, 8, 0] < 0 < squashed[0, 8, 15]  # nothing is cropped away
    assert clip.preprocess(Image.new("RGB", (1, 1))).shape == (3, 48, 48)


def test_unknown_kind_of_map(clip):
    with pytest.raises(WrisError, match="'plain' or 'surgery'"):
        clip.maps(clip.encode_image(picture()), ["dog"], "heat")
    with pytest.raises(WrisError, match="'plain' or 'surgery'"):
        clip.similarity_map(images(), ["dog", "car"], "heat")


# -------------------------------------------------------------------------------------------------------- text


def test_text_features_equal_open_clips(clip):
    texts = ["the red dog", "", "a car left of the man"]
    expected = F.normalize(clip.model.encode_text(clip.tokenizer(texts)), dim=-1)
    torch.testing.assert_close(clip.text_features(texts), expected)


def test_prompts_are_averaged_as_unit_vectors(tokenizer):
    clip = Clip(tiny_model(), tokenizer, 32, prompts=("a {}", "the red {}"), device="cpu")
    parts = F.normalize(clip.model.encode_text(tokenizer(["a dog", "the red dog"])), dim=-1)
    torch.testing.assert_close(clip.text_features(["dog"])[0], F.normalize(parts.mean(0), dim=0))


def test_word_features_and_mask(clip):
    words, mask = clip.word_features(["the red dog", "car"])
    assert words.shape == (2, 5, 16)  # start, three words, end
    assert mask.sum(dim=1).tolist() == [5, 3]
    alone, _ = clip.word_features(["car"])
    torch.testing.assert_close(words[1, :3], alone[0])
    torch.testing.assert_close(
        F.normalize(words[0, 4] @ clip.model.text_projection, dim=0), clip.text_features(["the red dog"])[0]
    )


@pytest.mark.parametrize(
    "text", ["", "   ", "🐶🚗", "der rote Hund", "红色的狗", "x" * 500, "{curly} {}", "<end_of_text>"]
)
def test_any_text_has_features(clip, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features = clip.text_features([text])
    assert torch.isfinite(features).all()


def test_long_text_keeps_its_end_of_text_and_says_so(clip):
    with pytest.warns(UserWarning, match="reads 12 tokens"):
        words, mask = clip.word_features(["dog " * 2000])
    assert words.shape[1] == 12 and mask.all()
    assert clip._tokenize(["dog"]).max() == clip.tokenizer.eot_token_id
    with pytest.warns(UserWarning):
        assert clip._tokenize(["dog " * 2000])[0, -1] == clip.tokenizer.eot_token_id


# ------------------------------------------------------------------------------------------------------ loading


def test_papers_model_runs_through_the_same_lines(monkeypatch):
    """ViT-B/16 as open_clip makes it, but for the number of blocks, which would only cost time."""
    create = open_clip.create_model
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    fewer = {key: {**config[key], "layers": 3} for key in ("vision_cfg", "text_cfg")}
    monkeypatch.setattr(open_clip, "create_model", lambda name, **more: create(name, **fewer, **more))
    model, tokenizer = create_clip("ViT-B-16-quickgelu")
    clip = Clip(model, tokenizer, 64, get_stack("paper").clip.prompts, device="cpu")
    features = clip.encode_image(picture())
    assert clip.maps(features, ["the red dog"]).shape == (1, 4, 4)
    assert clip.word_features(["the red dog"])[0].shape == (1, 5, 512)
    assert [feature.shape for feature in clip.patch_features(images(64))] == [(2, 768, 4, 4)] * 3


def test_toy_model_has_room_for_its_tokenizer():
    model, tokenizer = create_clip("wris-toy")
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1 < model.vocab_size
    assert len(tokenizer.encode("the red dog")) == 3


def test_create_is_quiet_and_reproducible(caplog):
    with caplog.at_level(logging.WARNING):
        first, _ = create_clip("wris-toy", seed=3)
        second, _ = create_clip("wris-toy", seed=3)
        logging.warning("others still may")
    assert [record.message for record in caplog.records] == ["others still may"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_missing_tokenizer(tmp_path):
    with pytest.raises(WrisError, match="is missing; install the library again"):
        create_clip("wris-toy", bpe=tmp_path / "none.txt.gz")


def test_toy_clip_knows_the_toy_world():
    clip = load_clip("toy", device="cpu")
    assert clip.model.visual.conv1.weight.dtype == torch.float32
    labels = ["dog", "car", "house", "woman"]
    text = clip.text_features([f"a {label}" for label in labels])
    named = pointed = 0
    for number in range(24):
        scene = sample_object_image(np.random.default_rng(number), labels[number % 4])
        picture = Image.fromarray(scene.image)
        named += int((text @ clip.image_features(clip.preprocess(picture, 128)[None])[0]).argmax()) == number % 4
        response_map = clip.maps(clip.encode_image(picture), [f"a {labels[number % 4]}"])[None]
        peak = int(F.interpolate(response_map, scene.labels.shape, mode="bilinear").argmax())
        pointed += bool(scene.labels.ravel()[peak])
    assert named >= 20 and pointed >= 12, (named, pointed)


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """A copy of the packaged weights."""
    for name in ("clip.safetensors", "SHA256SUMS"):
        (tmp_path / name).write_bytes((checkpoints.WEIGHTS / name).read_bytes())
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    return tmp_path / "clip.safetensors"


def test_missing_and_damaged_checkpoints(weights):
    content = weights.read_bytes()
    weights.write_bytes(content[:1000] + b"?" + content[1001:])
    with pytest.raises(WrisError, match="damaged"):
        load_clip("toy")
    weights.unlink()
    with pytest.raises(WrisError, match="clip.safetensors"):
        load_clip("toy")


def test_checkpoint_of_another_model(weights):
    state = load_file(weights)
    state["visual.proj"] = state["visual.proj"][:, :64].contiguous()
    save_file(state, weights)
    record_sha256(weights)
    with pytest.raises(WrisError, match="made for another model.*visual.proj"):
        load_clip("toy")
