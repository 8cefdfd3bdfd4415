"""Pretraining of the toy CLIP: its tokenizer, its batches, its loss, and a run that leaves what it should."""

import gzip

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from wris_lib.backbones.clip import create_clip
from wris_lib.backbones.loading import load_state
from wris_lib.data.toyworld.pretraining import Pool
from wris_lib.pretrain import clip as pretrain
from wris_lib.pretrain.clip import Batches, Round, contrastive_loss, grow, main, recall, write_bpe

COLORS = {"red": (230, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


def pool(count=40, size=32):
    """Images of one colour and what one may say of them."""
    rng = np.random.default_rng(0)
    names = [list(COLORS)[i % len(COLORS)] for i in range(count)]
    images = np.stack([np.full((size, size, 3), COLORS[name], np.uint8) for name in names])
    images = np.clip(images + rng.integers(-25, 25, images.shape), 0, 255).astype(np.uint8)
    captions = [[f"a {name} car", f"the {name} one", f"{name} left"][: 2 + i % 2] for i, name in enumerate(names)]
    return Pool(images, None, captions)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.txt.gz"
    write_bpe(["a", "the", "car", "one", "left", *COLORS], path)
    return open_clip.SimpleTokenizer(str(path), context_length=10)


def tiny_model():
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
    return open_clip.CLIP(8, vision, {"context_length": 10, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1})


# ---------------------------------------------------------------------------------------------------- tokenizer


def test_every_word_is_one_token_and_any_text_can_be_spelt(tmp_path):
    words = ["hand", "and", "band", "man", "mango", "go", "t-shirt", "café", "in", "inn"]
    write_bpe(words, tmp_path / "bpe.txt.gz")
    tokenizer = open_clip.SimpleTokenizer(str(tmp_path / "bpe.txt.gz"))
    assert {word: len(tokenizer.encode(word)) for word in words} == {**dict.fromkeys(words, 1), "t-shirt": 3}
    for text in ("zebra 🦓", "quelqu'un", "漢字", "hands and mangos"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1 == max(tokenizer.encoder.values())


def test_same_words_give_the_same_file(tmp_path):
    write_bpe(["red", "dog"], tmp_path / "a.gz")
    write_bpe(["dog", "red", "red"], tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_packaged_tokenizer_knows_the_toy_world(tmp_path):
    """When the grammar has learnt a word since CLIP was trained, CLIP must be trained again."""
    model, tokenizer = create_clip("wris-toy")
    words = pretrain.wording.vocabulary()
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []
    assert tokenizer.eot_token_id < model.vocab_size
    write_bpe(words, tmp_path / "bpe.gz")
    assert gzip.decompress((tmp_path / "bpe.gz").read_bytes()) == gzip.decompress(pretrain.BPE.read_bytes())


# ------------------------------------------------------------------------------------------------------ batches


def test_batches_are_a_pure_function_of_the_step(tokenizer):
    first, second = Batches(pool(), tokenizer, held_out=4), Batches(pool(), tokenizer, held_out=4)
    second(3)
    a, b = first(7), second(7)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(first(8)["images"], a["images"])


def test_held_out_images_are_never_trained_on(tokenizer):
    batches = Batches(pool(), tokenizer, held_out=4)
    assert batches.objects.tolist() == [16, 17, 18, 19] and batches.scenes.tolist() == [36, 37, 38, 39]
    assert not set(batches.trained) & {*batches.objects, *batches.scenes} and len(batches.trained) == 32
    held = batches.held_out(batches.scenes)
    assert len(held["images"]) == len(held["tokens"]) == 4
    assert torch.equal(held["tokens"], batches.held_out(batches.scenes)["tokens"])


def test_right_captions_are_those_an_image_has(tokenizer):
    data = pool()
    batches = Batches(data, tokenizer, held_out=4)
    chosen = np.array([0, 1, 4])  # red, green, red
    texts = batches._texts(chosen, np.random.default_rng(0), 2)
    said = [tokenizer.decode(tokens[1 : tokens.argmax()].tolist()).strip() for tokens in texts["tokens"]]
    assert texts["right"].tolist() == [[text in data.captions[i] for text in said] for i in chosen]
    for row, i in enumerate(chosen):
        own = said[2 * row : 2 * row + 2]
        assert len(set(own)) == 2 and set(own) <= set(data.captions[i])


def test_images_are_shifted_and_never_mirrored():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    moved = np.stack([pretrain._shifted(image, 5, right) for right in range(-6, 7)])
    assert moved.shape[1:] == image.shape
    assert [int(m[0, :, 0].sum()) // 255 for m in moved] == [16 - right for right in range(-6, 7)]
    assert (moved[:, :, 0] == 255).all() and (moved[:, :, -1] == 0).all()
    assert np.array_equal(pretrain._shifted(image, 0, 0), image)
    gradient = np.repeat(np.arange(32, dtype=np.uint8)[:, None, None], 32, axis=1).repeat(3, axis=2)
    assert pretrain._shifted(gradient, 2, 0)[:, 0, 0].tolist() == [*range(2, 32), 31, 31]


def test_an_image_brings_as_many_captions_as_asked_for(tokenizer):
    for each in (1, 2):
        batch = Batches(pool(), tokenizer, held_out=4, each=each)(0)
        assert len(batch["tokens"]) == each * len(batch["images"]) and batch["right"].any(dim=1).all()


# ------------------------------------------------------------------------------------------------ loss and recall


def test_loss_equals_the_slow_computation(tokenizer):
    model, batch = tiny_model(), Batches(pool(8), tokenizer, held_out=0)(0)
    terms = contrastive_loss(model, batch, 0)
    logits = pretrain.scores(model, batch["images"], batch["tokens"]).detach().double().numpy()
    right = batch["right"].numpy()
    assert right.sum(axis=1).max() > 2  # images of one colour share captions

    def nll(logits, right):
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -np.mean([logs[i][right[i]].mean() for i in range(len(logs))])

    assert terms["loss"].item() == pytest.approx((nll(logits, right) + nll(logits.T, right.T)) / 2, rel=1e-4)
    assert terms["found"].item() == pytest.approx(right[np.arange(8), logits.argmax(axis=1)].mean())


def test_scores_are_scaled_cosines(tokenizer):
    model, batch = tiny_model(), Batches(pool(8), tokenizer, held_out=0)(0)
    scores = pretrain.scores(model, batch["images"], batch["tokens"])
    assert scores.abs().max() <= model.logit_scale.exp() + 1e-4
    model.logit_scale.data.fill_(10.0)
    assert pretrain.scores(model, batch["images"], batch["tokens"]).abs().max() <= 100.01


def test_a_small_world_is_learnt(tokenizer, tmp_path):
    model, batches = tiny_model(), Batches(pool(), tokenizer, held_out=8)
    before = recall(model, batches.held_out(batches.scenes))
    pretrain.fit(model, contrastive_loss, batches, pretrain.Recipe(40, 1e-2, warmup=5), tmp_path)
    assert recall(model, batches.held_out(batches.scenes)) == 100 > before


# ------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def small_run(monkeypatch, tmp_path):
    """Two short rounds on a few images, those of the second larger."""
    monkeypatch.setattr(pretrain, "ROUNDS", (Round("small", 2, 1e-3, 2), Round("large", 2, 1e-3, 3)))
    monkeypatch.setattr(pretrain, "POOLS", {"small": (40, 128), "large": (40, 192)})
    monkeypatch.setattr(pretrain, "pool", lambda name: pool(*pretrain.POOLS[name]))
    monkeypatch.setattr(pretrain, "HELD_OUT", 4)
    monkeypatch.setattr(pretrain, "BATCH", 8)
    monkeypatch.setattr(pretrain, "WEIGHTS", tmp_path / "package")


def test_trial_run_leaves_weights_tokenizer_and_card_in_its_folder_only(small_run, tmp_path):
    main(steps=1, folder=tmp_path / "trial", device="cpu")
    assert not (tmp_path / "package").exists()
    found = {str(path.relative_to(tmp_path / "trial")) for path in (tmp_path / "trial").rglob("*") if path.is_file()}
    checkpoints = {"round 1/checkpoint.pt", "round 2/checkpoint.pt"}
    assert found == {*checkpoints, "clip.safetensors", "clip_bpe.txt.gz", "clip.md", "SHA256SUMS"}
    tensors = load_file(tmp_path / "trial" / "clip.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    model, _ = create_clip("wris-toy", image_size=192)
    model.load_state_dict(load_state(tmp_path / "trial" / "clip.safetensors"))
    assert next(model.parameters()).dtype == torch.float32
    assert (tmp_path / "trial" / "clip.safetensors").stat().st_size < 8e6
    card = (tmp_path / "trial" / "clip.md").read_text()
    assert "| 2 | `large`: 32 images, 192 px | 1 | 3 | 0.001 |" in card
    assert "| object-centric |" in card and "on CPU" in card


def test_a_run_in_full_goes_into_the_package_and_resumes(small_run, tmp_path):
    main(folder=tmp_path / "run", device="cpu")
    weights = (tmp_path / "package" / "clip.safetensors").read_bytes()
    assert (tmp_path / "package" / "clip_bpe.txt.gz").is_file()
    (tmp_path / "package" / "clip.safetensors").unlink()
    main(folder=tmp_path / "run", device="cpu")  # nothing is left to train
    assert (tmp_path / "package" / "clip.safetensors").read_bytes() == weights


def test_the_second_round_goes_on_where_the_first_ended(tokenizer):
    small, _ = create_clip("wris-toy", seed=0, image_size=128)
    large, _ = create_clip("wris-toy", seed=1, image_size=192)
    grow(small, large)
    old, new = small.state_dict(), large.state_dict()
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["visual.positional_embedding"]
    old, new = (state["visual.positional_embedding"] for state in (old, new))
    assert new.shape == (145, 192) and torch.equal(new[0], old[0])  # 12 × 12 patches and the class token
    corners = [1, 8, 57, 64], [1, 12, 133, 144]
    similar = torch.cosine_similarity(old[corners[0]], new[corners[1]])
    assert similar.min() > 0.7
