"""The toy ALBEF: untrue sentences, batches, losses against numpy, its start, and its training in miniature."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertTokenizerFast

from wris_lib.backbones import checkpoints
from wris_lib.backbones.clip import load_clip
from wris_lib.backbones.itm import load_matcher
from wris_lib.backbones.itm_models import SIZES, Albef
from wris_lib.data.toyworld import grammar, pretraining, wording
from wris_lib.data.toyworld.pretraining import Pool, deny, statements
from wris_lib.data.toyworld.scenes import sample_scene
from wris_lib.pretrain import albef
from wris_lib.pretrain.albef import Batches, contrastive, difficulty, write_vocabulary

SPELT = "zebra"
STEPS = 100


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.txt"
    write_vocabulary(wording.vocabulary(), path)
    return path


@pytest.fixture(scope="module")
def data():
    """Eight scenes, of which the third has too little to say."""
    images, true, untrue = [], [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        said = statements(scene, rng)
        while len(said[0]) < 3:
            more = statements(scene, rng)
            said = (said[0] + more[0], said[1] + more[1])
        images.append(scene.image)
        true.append(said[0][: 1 if seed == 2 else 3])
        untrue.append(said[1][: 1 if seed == 2 else 3])
    return Pool(np.stack(images), None, true, untrue)


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return BertTokenizerFast(vocab_file=str(vocabulary))


@pytest.fixture(scope="module")
def model():
    return Albef(SIZES["toy"])


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(albef, "BATCH", 3)
    monkeypatch.setattr(albef, "HELD_OUT", 2)


def test_untrue_phrases_fit_nothing_and_differ_in_one_place():
    kinds = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        for index, thing in enumerate(scene.objects):
            kind = grammar.KINDS[seed % len(grammar.KINDS)]
            phrase = grammar.describe(scene, index, kind, rng) if grammar.can_be_referent(thing) else None
            other = deny(scene, phrase, rng) if phrase else None
            if other is None:
                continue
            assert grammar.truth(other, scene) == [False] * len(scene.objects)
            changed = [
                name
                for name in ("noun", "adjectives", "parts", "position", "relation", "landmark")
                if getattr(phrase, name) != getattr(other, name)
            ]
            assert len(changed) == 1
            kinds.add(changed[0])
            for (part, _), (same, _) in zip(phrase.parts, other.parts, strict=True):
                assert part == same
    assert kinds == {"noun", "adjectives", "parts", "position", "relation", "landmark"}


def test_what_has_no_untrue_neighbour_is_given_up(monkeypatch):
    rng = np.random.default_rng(0)
    scene = sample_scene(rng)
    monkeypatch.setattr(pretraining, "_altered", lambda scene, phrase, rng: phrase)
    assert deny(scene, grammar.Phrase(scene.objects[-1].category), rng) is None
    assert statements(scene, rng) == ([], [])


def test_every_word_of_the_toy_world_is_one_token(vocabulary, tokenizer):
    words = wording.vocabulary()
    assert all(tokenizer.tokenize(word) == [word] for word in words)
    assert tokenizer.tokenize(SPELT) == ["z", "##e", "##b", "##r", "##a"]
    lines = vocabulary.read_text().splitlines()
    assert len(lines) == len(set(lines)) <= SIZES["toy"].vocabulary
    assert tuple(lines[:5]) == albef.SPECIAL and tokenizer.mask_token_id == 4


def test_a_batch_is_a_function_of_its_step(data, tokenizer, few):
    first, second = Batches(data, tokenizer, STEPS, 2), Batches(data, tokenizer, STEPS, 2)
    for name, value in first(5).items():
        assert torch.equal(value, second(5)[name])
    assert not torch.equal(first(5)["ids"], first(6)["ids"])
    assert first.trained.tolist() == [0, 1, 3, 4, 5] and first.tested.tolist() == [6, 7]


def test_first_come_the_true_sentences_of_an_image_then_the_others(data, tokenizer):
    batches = Batches(data, tokenizer, STEPS, 2)
    chosen = np.array([1, 4])

    def read(foreign):
        ids = batches.take(chosen, np.random.default_rng(0), foreign)["ids"]
        texts = [tokenizer.decode(row, skip_special_tokens=True).removeprefix("there is a ") for row in ids]
        return np.array(texts).reshape(2, 2, 3)

    hard, easy = read(0.0), read(1.0)
    for place, image in enumerate(chosen):
        assert set(hard[place, 0]) == set(data.captions[image]) == set(easy[place, 0])
        pairs = set(zip(data.captions[image], data.untrue[image], strict=True))
        assert set(zip(*hard[place].tolist(), strict=True)) == pairs
        assert set(easy[place, 1]) <= set(data.captions[chosen[1 - place]])


def test_half_of_the_sentences_come_after_the_prefix(data, tokenizer):
    ids = Batches(data, tokenizer, STEPS, 0).take(np.repeat([1], 200), np.random.default_rng(0))["ids"]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert 0.4 < np.mean([text.startswith("there is a ") for text in texts]) < 0.6


def test_words_are_hidden_in_all_sentences_and_guessed_in_true_ones(data, tokenizer, few, monkeypatch):
    monkeypatch.setattr(albef, "GUESSED", 1.0)
    batch = Batches(data, tokenizer, STEPS, 2)(50)
    hidden, guessed = batch["ids"] == tokenizer.mask_token_id, batch["guess"] != albef.IGNORED
    true = albef.true_ones(18, 3, torch.device("cpu"))
    assert hidden.any(dim=1).all() and not (hidden & ~batch["mask"]).any()
    assert torch.equal(guessed, hidden & true[:, None]) and (batch["guess"][guessed] >= len(albef.SPECIAL)).all()
    assert (batch["ids"][:, 0] == tokenizer.cls_token_id).all()  # nothing special is hidden
    monkeypatch.setattr(albef, "GUESSED", 0.25)
    some = Batches(data, tokenizer, STEPS, 2)
    shares = [(some(step)["ids"] == tokenizer.mask_token_id).sum() / some(step)["mask"].sum() for step in range(20)]
    assert 0.15 < np.mean(shares) < 0.25  # [CLS] and [SEP] count among the tokens


def test_head_nouns_come_first(tokenizer):
    sentences = ["the red dog left of the dog", "there is a man in the green shirt next to the car", "left", "a zebra"]
    ids = tokenizer(sentences, padding=True, return_tensors="pt")["input_ids"]
    nouns = torch.tensor(tokenizer.convert_tokens_to_ids(sorted(wording.nouns())))
    heads = albef.head_nouns(ids, nouns)
    assert [tokenizer.decode(row[head]) for row, head in zip(ids, heads, strict=True)] == ["dog", "man", "", ""]


def test_words_of_true_sentences_are_right_and_the_exchanged_one_is_wrong(data, tokenizer, few, monkeypatch):
    true = ["the red dog", "car left of the bus", "blue cat"]
    pool = replace(data, captions=[true] * 8, untrue=[["the red cup", "car right of the bus", "blue cow"]] * 8)

    def judged(guessed, foreign, step=0):
        monkeypatch.setattr(albef, "GUESSED", guessed)
        monkeypatch.setattr(albef, "difficulty", lambda progress: (0, 1, foreign))
        batch = Batches(pool, tokenizer, STEPS, 2)(step)
        found = {}
        for row, (ids, right) in enumerate(zip(batch["ids"], batch["right"], strict=True)):
            for verdict in (0, 1):
                words = tokenizer.convert_ids_to_tokens(ids[right == verdict])
                found.setdefault((row % 6 < 3, verdict), set()).add(" ".join(words))
        return found

    assert judged(0.0, 0.0) == {
        (True, 1): {"red dog", "car left bus", "blue cat"},
        (True, 0): {""},
        (False, 1): {""},
        (False, 0): {"cup", "car right", "cow"},
    }
    # Another image's sentence: nobody knows which of its words are wrong, but what it speaks of is not there.
    assert judged(0.0, 1.0)[False, 0] == {"dog", "car", "cat"}
    assert set().union(*judged(1.0, 0.0).values()) == {""}  # and nobody judges what is hidden
    late = judged(0.0, 0.0, STEPS // 2)
    assert late[True, 1] == {"dog", "car", "cat"} and late[False, 0] == {"cup", "car", "cow"}


def test_a_verdict_by_hand():
    judgements = torch.tensor([[0.0, 0.0], [np.log(3.0), 0.0]])
    assert albef.verdict(judgements, 1).item() == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert albef.verdict(judgements, 0).item() == pytest.approx((np.log(2) + np.log(4 / 3)) / 2)
    assert albef.verdict(judgements[:0], 0).item() == 0


@pytest.mark.parametrize(("first", "shares"), [(0, (1 / 3, 1 / 3, 1 / 3)), (STEPS // 2, (2 / 3, 0, 1 / 3))])
def test_who_looks(first, shares, data, tokenizer, few):
    """Shares of the sentences in which only the head noun looks, only words with a meaning, and all tokens."""
    batches = Batches(data, tokenizer, STEPS, 2)
    counts = np.zeros(3)
    for step in range(first, first + 40):
        batch = batches(step)
        for words, looks in zip(map(tokenizer.convert_ids_to_tokens, batch["ids"]), batch["looks"], strict=True):
            meaning = [word not in (*albef.FUNCTION_WORDS, "[CLS]", "[SEP]", "[PAD]") for word in words]
            which = 2 if looks.all() else int(looks.sum() > 1)
            if which == 0:
                assert words[looks.int().argmax()] in (*wording.nouns(), "[MASK]")  # a hidden head noun looks, too
            elif which == 1:
                assert looks.tolist() == meaning
            counts[which] += 1
    assert np.abs(counts / counts.sum() - shares).max() < 0.07


def test_what_does_not_look_sees_nothing(data, model, tokenizer, few):
    """Without looking at all, it does not matter what the image is."""
    batch = Batches(data, tokenizer, STEPS, 2)(0)
    batch["looks"] = torch.zeros_like(batch["looks"])
    other = batch | {"images": batch["images"].flip(0)}
    with torch.no_grad():
        terms = [albef.loss(model, each, 0) for each in (batch, other)]
    assert terms[0]["itm"] == terms[1]["itm"] and terms[0]["mlm"] == terms[1]["mlm"]
    batch["looks"] = torch.ones_like(batch["looks"])
    with torch.no_grad():
        assert albef.loss(model, batch, 0)["itm"] != terms[0]["itm"]


def test_the_contrastive_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(2, 5, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(8, 5, generator=generator), dim=-1)
    true = albef.true_ones(8, 2, torch.device("cpu"))
    assert true.tolist() == [True, True, False, False] * 2
    logits = (images @ texts.T / 0.1).double().numpy()
    by_image = by_text = 0.0
    for image in range(2):
        shares = np.exp(logits[image]) / np.exp(logits[image]).sum()
        own = [4 * image, 4 * image + 1]
        by_image -= np.mean([np.log(shares[text]) for text in own]) / 2
        for text in own:
            by_text -= np.log(np.exp(logits[image, text]) / np.exp(logits[:, text]).sum()) / 4
    found = contrastive(images, texts, true, torch.tensor(0.1))
    assert found.item() == pytest.approx((by_image + by_text) / 2, rel=1e-5)


def test_batches_get_harder(data, tokenizer, few, monkeypatch):
    """By hand: over the first third of the steps more and more of the pool, then less and less of its beginning."""
    cases = {0.0: (0, 1 / 3, 0.5), 1 / 6: (0, 2 / 3, 0.35), 2 / 3: (1 / 6, 1, 0.2), 1.0: (1 / 3, 1, 0.2)}
    for progress, wanted in cases.items():
        assert difficulty(progress) == pytest.approx(wanted)
    seen = []
    take = Batches.take
    monkeypatch.setattr(
        Batches, "take", lambda self, chosen, *rest: seen.append((set(chosen), rest[1])) or take(self, chosen, *rest)
    )
    batches = Batches(data, tokenizer, STEPS, 2)
    for step in (0, 50, 99):
        for seed in range(20):
            monkeypatch.setattr(albef, "SEED", seed)
            batches(step)
    drawn = [set.union(*(chosen for chosen, _ in seen[start : start + 20])) for start in (0, 20, 40)]
    assert drawn == [{0, 1}, {0, 1, 3, 4, 5}, {3, 4, 5}]
    assert [foreign for _, foreign in seen[::20]] == [0.5, 0.2, 0.2]


def test_the_image_encoder_starts_where_clip_is(data):
    model, clip = Albef(SIZES["toy"]), load_clip("toy", "cpu")
    images = torch.from_numpy(data.images[:3])
    albef.start_from_clip(model, clip, images)
    with torch.no_grad():
        states = model.embed_images(albef.pixels(images))
        enlarged = F.interpolate(
            albef.pixels(images), scale_factor=2, mode="nearest"
        )  # ALBEF's patches are half as wide
        theirs = model.visual_encoder.norm(clip._tokens(enlarged, (4,))[4])
    assert F.cosine_similarity(states, theirs, dim=-1).mean() > 0.9
    of_channels = states[:, 1:].std(dim=(0, 1))
    torch.testing.assert_close(of_channels, torch.ones(192), atol=1e-3, rtol=0)


def test_a_share_of_the_patches_is_shown():
    patches = torch.arange(2 * 9.0).view(2, 9, 1).expand(2, 9, 3)
    torch.manual_seed(0)
    shown = albef.show_some(patches, 0.5)
    assert shown.shape == (2, 5, 3) and shown[:, 0, 0].tolist() == [0, 9]
    kept = [set(row.tolist()) for row in shown[:, :, 0]]
    assert all(len(row) == 5 for row in kept) and kept[0] <= set(range(9)) and kept[1] <= set(range(9, 18))
    assert torch.equal(albef.show_some(patches, 1.0).sort(dim=1).values, patches)
    assert not torch.equal(albef.show_some(patches, 0.5), shown)


def test_the_image_encoder_may_see_some_patches_only(data, model):
    torch.manual_seed(0)
    images = torch.from_numpy(data.images[:2])
    with torch.no_grad():
        assert albef.embed_some(model, images, 0.75).shape == (2, 1 + 768, 192)
        everything, seen = albef.embed_some(model, images, 1.0), model.embed_images(albef.pixels(images))
    torch.testing.assert_close(everything[:, 0], seen[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(everything.sum(dim=1), seen.sum(dim=1), atol=1e-2, rtol=1e-4)  # in another order


def test_everything_learns_from_all_losses(data, model, tokenizer, few):
    torch.manual_seed(0)
    terms = albef.loss(model, Batches(data, tokenizer, STEPS, 2)(0), 0)
    assert terms["loss"].item() == pytest.approx(sum(terms[name].item() for name in ("itc", "itm", "words", "mlm")))
    terms["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


def test_accuracy_is_that_of_true_against_untrue(data, tokenizer, few):
    model = Albef(SIZES["toy"])
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([0.0, 1.0]))  # everything is true
    assert albef.matching_accuracy(model, Batches(data, tokenizer, STEPS, 2)) == 50


def test_training_in_miniature_stops_resumes_and_leaves_a_usable_model(data, few, tmp_path, monkeypatch):
    monkeypatch.setattr(albef, "pool", lambda name: data)
    albef.main(steps=1, folder=tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"albef.safetensors", "albef.md", "albef_vocab.txt", "SHA256SUMS", "checkpoint.pt"}
    card = (tmp_path / "albef.md").read_text()
    assert "4.2 million parameters" in card and "1 steps of 3 images" in card and "20 % of the patches" in card
    assert (tmp_path / "albef.safetensors").stat().st_size < 12e6

    weights = (tmp_path / "albef.safetensors").read_bytes()
    (tmp_path / "albef.safetensors").unlink()
    albef.main(steps=1, folder=tmp_path)  # from the checkpoint
    assert (tmp_path / "albef.safetensors").read_bytes() == weights

    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    matcher = load_matcher("toy", "cpu")
    match = matcher.match(matcher.encode_images(torch.zeros(1, 3, 256, 256)), matcher.encode_texts(["the red dog"]))
    assert matcher.layer == albef.CHECKPOINT.layer and match.attention.shape == (1, 3, 5, 1024)
