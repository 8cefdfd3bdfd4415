"""Pairs encoded once, batches as a function of their number, and the loss against one image at a time."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_pcnet_crm import perturbed
from tests.methods.test_ppt_training import picture
from wris_lib.backbones.language import Parser
from wris_lib.data.refer import Expression
from wris_lib.errors import WrisError
from wris_lib.methods.pcnet import run, training
from wris_lib.methods.pcnet.crm import Crm, CrmConfig, response_maps
from wris_lib.methods.pcnet.loss import (
    ambiguity,
    classification,
    disambiguation,
    disambiguation_as_written,
    region_shrinking,
    region_shrinking_as_written,
)
from wris_lib.methods.pcnet.training import Batches, Training, TrainingData, encode, training_loss
from wris_lib.methods.pcnet.vision import see

tokenizer, clip, segmenter = test_clip.tokenizer, test_ppt_training.clip, test_ppt_training.segmenter

CHANNELS, CELLS = 6, 4
# Of each image the referents of its expressions.
REFERENTS = [[0, 0, 1], [0, 0], [0, 1, 2, 2], [0], [0, 1]]


class Nouns:
    """A language model that takes a sentence's last word for a thing, and the sentence for all that is said of it."""

    name, follows_instructions = "nouns", False

    def answer(self, prompts):
        for prompt in prompts:
            yield f"1. a {prompt.split()[-1]}\n2. {prompt}"


class Nobody(Parser):
    """Is not needed, since all answers are well-formed."""

    def __init__(self):
        pass

    def parse(self, expressions):
        assert not expressions
        return []


# ------------------------------------------------------------------------------------------------------ what is encoded


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> list[list[Expression]]:
    """Two splits of three images, of which they share one."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, (path, size) in enumerate(zip(paths, [(64, 64), (48, 24), (20, 40)], strict=True)):
        picture(size, number).save(path)

    def item(image: int, referent: int, text: str) -> Expression:
        return Expression(paths[image], image, referent, text, 0)

    first = [item(1, 7, "the red dog"), item(0, 7, "car"), item(1, 8, "left man"), item(1, 7, "the dog")]
    return [first, [item(2, 5, "the red dog"), item(0, 7, "the red car"), item(0, 6, "man")]]


def masks(image) -> np.ndarray:
    """A proposal, or two, or none."""
    found = np.zeros((2, image.height, image.width), dtype=bool)
    found[0, : image.height // 2], found[1, :, image.width // 4 :] = True, True
    return found[: {64: 2, 48: 0, 20: 1}[image.width]]


@pytest.fixture
def data(clip, segmenter, splits, monkeypatch) -> TrainingData:
    monkeypatch.setattr(segmenter, "proposals", lambda image, **settings: masks(image))
    return encode("toy", clip, segmenter, Nouns(), Nobody(), splits)


def test_every_expression_knows_its_image_its_words_and_whom_it_means(data, clip, splits):
    items = [item for split in splits for item in split]
    assert data.image.tolist() == [0, 1, 0, 0, 2, 1, 1]
    means = [(item.image_path, item.ref_id) for item in items]
    same = data.referent[:, None] == data.referent
    assert same.tolist() == [[a == b for b in means] for a in means]
    assert len({*data.sentence}) == 6 and data.sentence[0] == data.sentence[4]  # equal sentences are encoded once
    assert data.cues.shape == (7, 5)
    for item, sentence, cues in zip(items, data.sentence, data.cues, strict=True):
        noun = f"a {item.expression.split()[-1]}"
        expected = [item.expression, noun, item.expression, noun, item.expression, noun]
        directions = clip.directions(expected)
        torch.testing.assert_close(data.texts[[sentence, *cues]], directions, atol=2e-3, rtol=0)


def test_images_are_what_the_method_sees(data, clip, splits):
    paths = dict(zip(data.image.tolist(), (item.image_path for split in splits for item in split), strict=True))
    for number, path in paths.items():
        seen, grid = see(clip, [test_ppt_training.Image.open(path).convert("RGB")])
        assert grid == (4, 4)
        torch.testing.assert_close(data.visual[[number]].float(), seen, atol=5e-3, rtol=5e-3)
    upper = torch.arange(16) < 8
    assert torch.equal(data.proposals[1], torch.stack([upper, torch.arange(16) % 4 > 0]))
    assert torch.equal(data.proposals[2], upper[None]) and data.proposals[0].shape == (0, 16)


def test_without_a_segmenter_nobody_proposes(clip, splits):
    data = encode("toy", clip, None, Nouns(), Nobody(), splits[:1])
    assert data.proposals is None and len(data.visual) == 2


# ------------------------------------------------------------------------------------------------------------- batches


def pairs(referents: list[list[int]], channels: int = CHANNELS, seed: int = 0) -> TrainingData:
    """Random numbers in place of features. Every expression has a sentence of its own."""
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    count = sum(map(len, referents))
    return TrainingData(
        torch.randn(len(referents), CELLS, channels, generator=torch_rng).half(),
        [torch.rand(image % 4, CELLS, generator=torch_rng) < 0.5 for image in range(len(referents))],
        torch.randn(count + 7, channels, generator=torch_rng),
        rng.permutation(count),
        rng.integers(0, count + 7, (count, 5)),
        np.repeat(np.arange(len(referents)), [*map(len, referents)]),
        np.array([10 * image + number for image, numbers in enumerate(referents) for number in numbers]),
    )


@pytest.fixture
def five() -> TrainingData:
    return pairs(REFERENTS)


def rows(data: TrainingData, texts: torch.Tensor) -> list[int]:
    """Which expressions these sentences are."""
    found = [torch.nonzero((data.texts == text).all(dim=1)).item() for text in texts]
    return [data.sentence.tolist().index(row) for row in found]


def flat(batch: object) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [tensor for part in (batch.values() if isinstance(batch, dict) else batch) for tensor in flat(part)]


def test_a_batch_depends_on_its_number_alone(five):
    first, second = (Batches(five, 2, 1, seed=5, proposals=True, size=3) for _ in range(2))
    second(7)
    for a, b in zip(flat(first(3)), flat(second(3)), strict=True):
        assert torch.equal(a, b)
    drawn = [Batches(five, 2, 1, seed, True, 3)(number)["sentences"] for seed, number in ((5, 3), (5, 4), (6, 3))]
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(("stages", "size"), [(0, 2), (2, 3), (4, 5)])
def test_different_images_and_of_each_a_sentence_with_its_cues(five, stages, size):
    batches, seen = Batches(five, stages, 0, seed=0, proposals=False, size=size), set()
    for step in range(60):
        batch = batches(step)
        assert set(batch) == {"visual", "sentences", "cues"} and len(batch["cues"]) == stages
        own = rows(five, batch["sentences"])
        images = five.image[own]
        assert len(own) == len({*images}) == size
        assert batch["visual"].dtype == torch.float32 and torch.equal(batch["visual"], five.visual[images].float())
        for stage, cues in enumerate(batch["cues"]):
            assert torch.equal(cues, five.texts[five.cues[own, stage]])
        seen |= {*own}
    assert seen == {*range(len(five.sentence))}


@pytest.mark.parametrize("count", [1, 3])
def test_others_are_about_something_else_in_the_same_image(five, count):
    batches, seen = Batches(five, 2, count, seed=0, proposals=False, size=4), set()
    for step in range(40):
        batch = batches(step)
        own, others = rows(five, batch["sentences"]), batch["others"]
        places = others["places"].tolist()
        assert places == [place for place, e in enumerate(own) if five.image[e] in (0, 2, 4)]
        assert others["sentences"].shape == (len(places), count, CHANNELS)
        for number, place in enumerate(places):
            found = rows(five, others["sentences"][number])
            assert {*five.image[found]} == {five.image[own[place]]}
            assert five.referent[own[place]] not in five.referent[found]
            enough = (five.referent[five.image == five.image[own[place]]] != five.referent[own[place]]).sum() >= count
            assert not enough or len({*found}) == count  # none comes again where there are enough
            for stage, cues in enumerate(others["cues"]):
                assert torch.equal(cues[number], five.texts[five.cues[found, stage]])
            seen |= {(own[place], other) for other in found}
    possible = [(a, b) for a in range(12) for b in range(12) if five.image[a] == five.image[b]]
    assert seen == {(a, b) for a, b in possible if five.referent[a] != five.referent[b]}


def test_proposals_are_padded(five):
    batch = Batches(five, 2, 0, seed=0, proposals=True, size=5)(0)
    for e, proposals, present in zip(rows(five, batch["sentences"]), batch["proposals"], batch["present"], strict=True):
        expected = five.proposals[five.image[e]]
        assert present.tolist() == [number < len(expected) for number in range(3)]
        assert torch.equal(proposals[present], expected) and not proposals[~present].any()


def test_a_batch_in_which_nothing_is_proposed(five):
    nothing = replace(five, proposals=[torch.zeros(0, CELLS, dtype=torch.bool)] * 5)
    batch = Batches(nothing, 2, 0, seed=0, proposals=True, size=3)(0)
    assert batch["proposals"].shape == (3, 1, CELLS) and not batch["present"].any()


@pytest.mark.parametrize("size", [0, 1, 6])
def test_a_batch_needs_wrong_sentences_and_different_images(five, size):
    with pytest.raises(WrisError, match=f"a batch of {size} images cannot be drawn from 5: it needs at least two"):
        Batches(five, 2, 0, seed=0, proposals=False, size=size)


# ------------------------------------------------------------------------------------------------------------ the loss


WEIGHTED = Training(region_shrinking=0.7, disambiguation=1.3, others=2)


def module(stages: int = 2, modulation: str = "VTA+TTA", seed: int = 0) -> Crm:
    return perturbed(Crm(CrmConfig(CHANNELS, stages, modulation)), seed)


def slow_terms(crm: Crm, batch: dict, shrink, separate) -> dict[str, float]:
    """An image at a time: what it answers to all sentences of the batch, and to those about other things in it."""
    maps, others = [], [[] for _ in range(2)]
    for image, visual in enumerate(batch["visual"]):
        maps.append(crm(visual[None], batch["sentences"][None], [cues[None] for cues in batch["cues"]]))
        for row in torch.nonzero(batch["others"]["places"] == image).flatten().tolist():
            sentences, cues = batch["others"]["sentences"][[row]], [c[[row]] for c in batch["others"]["cues"]]
            for stage, each in enumerate(crm(visual[None], sentences, cues)):
                others[stage].append(separate(maps[image][stage][:, image], each).item())
    stages = [torch.cat([each[stage] for each in maps]) for stage in range(2)]
    own = [torch.stack([each[image, image] for image in range(len(each))]) for each in stages]
    doubts = [ambiguity(response_maps(each), batch["proposals"], batch["present"]) for each in own]
    return {
        "cls": np.mean([classification(each).item() for each in stages]),
        "ras": shrink(doubts).item(),
        "iad": np.mean(others),
    }


@pytest.mark.parametrize("as_written", [False, True])
def test_the_loss_is_the_weighted_sum_of_its_terms(five, as_written):
    crm, batch = module(), Batches(five, 2, 2, seed=3, proposals=True, size=4)(0)
    assert len(batch["others"]["places"]) > 1
    ours = (region_shrinking, disambiguation)
    shrink, separate = (region_shrinking_as_written, disambiguation_as_written) if as_written else ours
    with torch.no_grad():
        found = training_loss(replace(WEIGHTED, as_written=as_written))(crm, batch, 0)
        expected = slow_terms(crm, batch, shrink, separate)
    assert set(found) == {"loss", *expected}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=1e-5), name
    total = expected["cls"] + 0.7 * expected["ras"] + 1.3 * expected["iad"]
    assert found["loss"].item() == pytest.approx(total, abs=1e-5)


def test_terms_without_weight_are_not_computed(five):
    """Nor is what they need in the batch."""
    crm, batch = module(), Batches(five, 2, 0, seed=0, proposals=False, size=3)(0)
    terms = training_loss(replace(WEIGHTED, region_shrinking=0.0, disambiguation=0.0))(crm, batch, 0)
    assert set(terms) == {"loss", "cls"} and torch.equal(terms["loss"], terms["cls"])
    batch = Batches(five, 2, 1, seed=0, proposals=False, size=3)(0)
    assert set(training_loss(replace(WEIGHTED, region_shrinking=0.0))(crm, batch, 0)) == {"loss", "cls", "iad"}


def test_without_stages_image_and_sentence_alone_are_compared(five):
    crm, batch = module(stages=0), Batches(five, 0, 0, seed=0, proposals=False, size=3)(0)
    terms = training_loss(replace(WEIGHTED, region_shrinking=0.0, disambiguation=0.0))(crm, batch, 0)
    terms["loss"].backward()
    assert set(terms) == {"loss", "cls"} and crm.visual_in.change.weight.grad.any()


def test_no_image_with_another_referent(five):
    lonely = pairs([[0], [0, 0], [0]])
    batch = Batches(lonely, 2, 2, seed=0, proposals=True, size=3)(0)
    terms = training_loss(WEIGHTED)(module(), batch, 0)
    terms["loss"].backward()
    assert terms["iad"] == 0 and torch.isfinite(terms["loss"])


# -------------------------------------------------------------------------------------------------------------- a run


def test_a_few_images_are_enough_for_smaller_steps(five, tmp_path):
    with pytest.raises(WrisError, match="a batch of 36 images cannot be drawn from 5"):
        run.train(module(), five, Training(steps=1), tmp_path / "paper's")
    (step,) = run.train(module(), five, Training(steps=1, images=4), tmp_path / "smaller")
    assert np.isfinite(step["loss"])


def weights(crm: Crm) -> list[torch.Tensor]:
    return [*crm.state_dict().values()]


@pytest.fixture(scope="module")
def many() -> TrainingData:
    return pairs([[0, 1]] * 24 + [[0, 0]] * 14)


SHORT = Training(steps=5, seed=2)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(many, tmp_path, monkeypatch):
    whole, stopped = (Crm(CrmConfig(CHANNELS)) for _ in range(2))
    log = run.train(whole, many, SHORT, tmp_path / "whole")
    assert [row["step"] for row in log] == [*range(5)] and {"cls", "ras", "iad", "loss"} < set(log[0])
    original = Batches.__call__

    def pressed(self, step):  # Ctrl-C
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.Batches, "__call__", pressed)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
            run.train(stopped, many, SHORT, tmp_path / "stopped")
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), weights(stopped), strict=True))
    again = Crm(CrmConfig(CHANNELS))
    run.train(again, many, SHORT, tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_another_seed_is_another_run(many, tmp_path):
    found = []
    for seed in (0, 1):
        found.append(Crm(CrmConfig(CHANNELS)))
        run.train(found[-1], many, replace(SHORT, seed=seed), tmp_path / str(seed))
    assert not torch.equal(*(crm.text_in.change.weight for crm in found))


def test_it_learns_what_belongs_together(tmp_path):
    """Of 40 images each has one direction that its sentence names, with another sign: CLIP as it is would be wrong."""
    own = torch.randn(40, CHANNELS, generator=torch.Generator().manual_seed(0))
    data = pairs([[0]] * 40)
    visual = torch.randn(40, CELLS, CHANNELS, generator=torch.Generator().manual_seed(1)) / 4
    visual[:, 1] -= own
    texts = torch.cat([own, own[:7]])
    data = replace(
        data, visual=visual.half(), texts=texts, sentence=np.arange(40), cues=np.tile(np.arange(40), (5, 1)).T
    )
    setting = Training(steps=40, learning_rate=2e-2, region_shrinking=0.0, disambiguation=0.0)
    log = run.train(Crm(CrmConfig(CHANNELS)), data, setting, Path(tmp_path))
    assert log[-1]["cls"] < 0.8 * log[0]["cls"]
