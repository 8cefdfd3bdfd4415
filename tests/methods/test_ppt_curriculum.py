"""The curriculum: what each round sees, what is selected, and that a killed training ends with the same weights."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_ppt_training import CONFIG, HALF, IMAGES, TEXTS, signs, spread, tiny_generator, trusted
from wris_lib.errors import WrisError
from wris_lib.methods.ppt import curriculum, training
from wris_lib.methods.ppt.curriculum import CURRICULA, FULL, Done, Round, Training, mask_ious, predict, select, train
from wris_lib.methods.ppt.labels import UNKNOWN
from wris_lib.methods.ppt.training import DATASETS
from wris_lib.methods.ppt.vision import visual_features

tokenizer, clip = test_clip.tokenizer, test_ppt_training.clip
segmenter, data = test_ppt_training.segmenter, test_ppt_training.data

ROUNDS = (Round(1, ("H_sem", "D_sem"), 0.5), Round(2, DATASETS, 0.5, 0.5))
TRAINING = Training(steps=6, learning_rate=1e-2)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Batches of three expressions, checkpoints at every other step."""
    for name, value in (("IMAGES_PER_STEP", 3), ("EXPRESSIONS_PER_IMAGE", 1), ("MASKS_PER_STEP", 1)):
        patch.setattr(training, name, value)
    recipe = curriculum.Recipe
    patch.setattr(curriculum, "Recipe", lambda *args, **more: recipe(*args, **more | {"checkpoint_every": 2}))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


def without_time(done: list[Done]) -> list[list[dict]]:
    return [[{name: row[name] for name in row if name != "seconds"} for row in each.log] for each in done]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ----------------------------------------------------------------------------------------------------- the curricula


def test_every_curriculum_has_the_same_steps_at_the_same_rates():
    for name, rounds in CURRICULA.items():
        share = FULL[0].share if name == "plain" else 1  # it is compared with stage 1
        assert sum(each.share for each in rounds) == pytest.approx(share), name
        if name != "plain":
            assert [(each.share, each.rate) for each in rounds] == [(each.share, each.rate) for each in FULL]
        assert all(set(each.datasets) <= set(DATASETS) and each.datasets for each in rounds)
        stages = [each.stage for each in rounds]
        assert stages == sorted(stages) and stages[0] == 1 and stages[-1] <= 3


def test_the_full_curriculum_is_the_papers():
    seen = {stage: [set(each.datasets) for each in FULL if each.stage == stage] for stage in (1, 2, 3)}
    assert seen[1] == [{"H_sem", "D_sem"}]
    assert seen[2][0] == {"H_sem", "D_sem", "D_ref"} and all(each == set(DATASETS) for each in seen[2][1:])
    assert len(seen[2]) > 1 and all(each == {"H_sem", "H_ref"} for each in seen[3])


@pytest.mark.parametrize(
    ("name", "left_out"), [("no D_ref", {"D_ref"}), ("no D_sem", {"D_sem"}), ("no images", {"D_sem", "D_ref"})]
)
def test_what_an_ablation_leaves_out(name, left_out):
    for each, full in zip(CURRICULA[name], FULL, strict=True):
        assert set(each.datasets) == set(full.datasets) - left_out and each.stage == full.stage


def test_without_an_order_every_round_is_the_same():
    for name, datasets in (("no curriculum", set(DATASETS)), ("plain", {"H_sem", "H_ref"})):
        assert len(CURRICULA[name]) == (1 if name == "plain" else len(FULL))
        assert all(set(each.datasets) == datasets and each.stage == 1 for each in CURRICULA[name])


def test_each_round_has_a_schedule_and_random_numbers_of_its_own():
    setting = Training(steps=1000, learning_rate=2e-3, seed=3, shares=2, precision="bf16")
    recipes = [setting.recipe(each, number) for number, each in enumerate(FULL)]
    assert sum(recipe.steps for recipe in recipes) == 1000 and recipes[0].steps == 250
    assert [recipe.learning_rate for recipe in recipes] == [2e-3] * 4 + [1e-3] * 2
    assert {(recipe.shares, recipe.precision) for recipe in recipes} == {(2, "bf16")}
    others = [replace(setting, seed=4).recipe(each, number) for number, each in enumerate(FULL)]
    assert len({recipe.seed for recipe in recipes + others}) == 12
    for recipe in recipes:
        assert max(map(recipe.rate, range(recipe.steps))) == pytest.approx(recipe.learning_rate)
        assert recipe.rate(recipe.steps - 1) < 0.01 * recipe.learning_rate
    assert Training(steps=1).recipe(FULL[-1], 5).steps == 1


# -------------------------------------------------------------------------------------------------- what a round sees


@pytest.fixture
def spy(monkeypatch):
    """Nothing is trained; what a round would see is noted. Of H each round selects other candidates."""
    seen, asked = [], []

    def fake_select(generator, segmenter, data, expressions):
        asked.append(expressions)
        return np.array([(len(asked) + n) % 2 - (n == 3) * 2 for n in range(len(expressions))]).clip(UNKNOWN)

    class Batches:
        def __init__(self, data, expressions, points, seed, shares):
            seen.append((data, expressions, points, seed))

    monkeypatch.setattr(curriculum, "select", fake_select)
    monkeypatch.setattr(curriculum, "Batches", Batches)
    monkeypatch.setattr(curriculum, "fit", lambda *arguments: [{"step": 0}])
    return seen, asked


@pytest.mark.parametrize("name", list(CURRICULA))
def test_a_round_sees_its_datasets_and_nothing_else(data, segmenter, tmp_path, spy, name):
    seen, asked = spy
    done = list(train(tiny_generator(), segmenter, data, CURRICULA[name], TRAINING, tmp_path))
    of_ref = data.of(["H_ref"])
    for number, (each, result, (active, expressions, points, _)) in enumerate(
        zip(CURRICULA[name], done, seen, strict=True)
    ):
        assert result.round is each and result.log == [{"step": 0}] and points == CONFIG.points
        referents = active.labels.referent
        known = [e for e in data.of(each.datasets) if referents[e] != UNKNOWN]
        assert expressions.tolist() == known
        assert {DATASETS[d] for d in data.dataset[expressions]} == set(each.datasets)
        others = np.setdiff1d(np.arange(len(referents)), of_ref)
        assert np.array_equal(referents[others], data.labels.referent[others])
        assert np.array_equal(result.referents, referents)
        if "H_ref" not in each.datasets:
            assert np.array_equal(referents, data.labels.referent)
        elif number == 0:  # CLIP's choice
            assert (referents[of_ref] == 0).all()
        else:  # all but the fourth, in which nothing was found
            assert (referents[of_ref] != UNKNOWN).tolist() == [n != 3 for n in range(len(of_ref))], number
    selects = ["H_ref" in each.datasets for each in CURRICULA[name][1:]]
    assert len(asked) == sum(selects)  # anew before every such round but the first
    assert all(expressions.tolist() == of_ref.tolist() for expressions in asked)
    chosen = [result.referents.tolist() for result in done[1:] if "H_ref" in result.round.datasets]
    assert all(earlier != later for earlier, later in zip(chosen, chosen[1:], strict=False))
    assert len({seed for *_, seed in seen}) == len(seen)


def test_a_round_without_data(data, segmenter, tmp_path, monkeypatch):
    h_sem = replace(data, dataset=np.zeros(len(data.dataset), dtype=int))
    steps = train(tiny_generator(), segmenter, h_sem, (Round(1, ("D_sem", "D_ref"), 1.0),), TRAINING, tmp_path)
    with pytest.raises(WrisError, match="round 1 learns from D_sem, D_ref, but there is no expression with a referent"):
        next(steps)
    nothing = np.full(len(data.of(["H_ref"])), UNKNOWN)
    monkeypatch.setattr(curriculum, "select", lambda *arguments: nothing)
    monkeypatch.setattr(curriculum, "fit", lambda *arguments: [])
    rounds = (Round(1, ("D_sem",), 0.5), Round(2, ("H_ref",), 0.5))
    steps = train(tiny_generator(), segmenter, data, rounds, TRAINING, tmp_path)
    next(steps)
    with pytest.raises(WrisError, match="round 2 learns from H_ref, but .*did CLIP [+] SAM find anything"):
        next(steps)


# --------------------------------------------------------------------------------------------------------- selection


class Known:
    """Predictions that are known: for each expression a rectangle of its own, for some none at all."""

    def __init__(self, side: int):
        self.side, self.batches = side, []

    def mask(self, e: int) -> np.ndarray:
        mask = np.zeros((self.side, self.side), dtype=bool)
        if e % 4:
            rng = np.random.default_rng(e)
            top, left = rng.integers(12, size=2)
            mask[top : top + 14, left : left + 14] = True
        return mask

    def __call__(self, generator, segmenter, data, expressions):
        assert not generator.training
        self.batches.append(expressions.tolist())
        return np.stack([self.mask(int(e)) for e in expressions])


def test_the_candidate_that_overlaps_most_is_selected(data, segmenter, monkeypatch):
    known = Known(data.labels.side)
    monkeypatch.setattr(curriculum, "predict", known)
    monkeypatch.setattr(curriculum, "SELECT_BATCH", 3)
    expressions = np.random.default_rng(0).permutation(len(data.labels))
    chosen = select(tiny_generator().train(), segmenter, data, expressions)
    found = set()
    for e, number in zip(expressions.tolist(), chosen.tolist(), strict=True):
        pixels = set(zip(*np.nonzero(known.mask(e)), strict=True))
        overlaps = []
        for candidate in data.labels.candidates(e):
            other = set(zip(*np.nonzero(candidate), strict=True))
            overlaps.append(len(pixels & other) / len(pixels | other))
        assert number == (overlaps.index(max(overlaps)) if any(overlaps) else UNKNOWN)
        found.add(number)
    assert {UNKNOWN, 0, 1} <= found
    assert Counter(e for batch in known.batches for e in batch) == Counter(expressions.tolist())
    assert max(map(len, known.batches)) == 3
    images = data.labels.image[[e for batch in known.batches for e in batch]]
    assert (np.diff(images) >= 0).all()  # an image is read once


def test_nothing_to_select_from(data, segmenter):
    assert len(select(tiny_generator(), segmenter, data, np.zeros(0, dtype=int))) == 0


def test_predictions_are_the_masks_of_the_best_prompts(data, clip, segmenter):
    """Encoded here and now, an expression at a time, and decoded as `Segmenter` does it."""
    generator = spread(tiny_generator()).eval()
    expressions = np.array([6, 1, 4, 0, 3, 12])
    masks = predict(generator, segmenter, data, expressions)
    assert masks.shape == (6, data.labels.side, data.labels.side)
    for e, mask in zip(expressions.tolist(), masks, strict=True):
        image = IMAGES[data.labels.image[e]]
        words, there = clip.word_features([TEXTS[e]])
        visual = visual_features(clip, CONFIG, [image])
        with torch.no_grad():
            direction = clip.text_features([TEXTS[e]]) - clip.text_features([""])
            prompts = generator(visual, words, there, torch.tensor([0]), direction)
            best = prompts.score_logits[0].argmax()
            pixels = prompts.points[0, best] * torch.tensor([image.width, image.height])
            labels = torch.from_numpy(signs(prompts.label_logits[0, best].numpy()))
            expected = trusted(segmenter.decode(segmenter.embed(image), pixels[None], labels[None]))
        assert (mask == (expected > 0).numpy()).mean() > 0.99  # features were rounded
    assert len({mask.tobytes() for mask in masks}) > 1
    inputs = data.inputs(expressions[[0]])
    torch.testing.assert_close(inputs["words"][0], clip.word_features([TEXTS[6]])[0][0], **HALF)


masks = st.lists(st.booleans(), min_size=6, max_size=6)


@given(masks, st.lists(masks, min_size=1, max_size=4))
def test_ious(one, others):
    found = mask_ious(np.array(one).reshape(2, 3), np.array(others).reshape(-1, 2, 3))
    for iou, other in zip(found, others, strict=True):
        pairs = list(zip(one, other, strict=True))
        union = sum(a or b for a, b in pairs)
        assert iou == pytest.approx(sum(a and b for a, b in pairs) / union if union else 0)


# ------------------------------------------------------------------------------------------------- a training in full


class PowerCut(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(data, segmenter, tmp_path_factory):
    """A run: the generator, what it yielded, and its folder."""
    generator, folder = tiny_generator(), tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        done = list(train(generator, segmenter, data, ROUNDS, TRAINING, folder))
    assert [len(each.log) for each in done] == [3, 3]
    assert not same_weights(generator, tiny_generator())
    return generator, done, folder


@pytest.fixture
def straight(uninterrupted, small):
    """Generator and yield of an uninterrupted run; others are as small."""
    generator, done, _ = uninterrupted
    return generator, done


def cut(monkeypatch, where: str) -> None:
    """The run breaks in a step (counted over all rounds), before a selection is written, or right behind it."""
    if where.startswith("step"):
        make, calls = curriculum.training_loss, []

        def broken(*arguments):
            loss = make(*arguments)

            def dying(generator, batch, step):
                calls.append(step)
                if len(calls) > int(where.split()[1]):
                    raise PowerCut
                return loss(generator, batch, step)

            return dying

        monkeypatch.setattr(curriculum, "training_loss", broken)
    elif where == "in Select":
        monkeypatch.setattr(np, "save", lambda file, array: file.write(b"half") and power_cut())
    else:
        fit = curriculum.fit
        monkeypatch.setattr(curriculum, "fit", lambda *rest: power_cut() if rest[4].name == "round 2" else fit(*rest))


def power_cut() -> None:
    raise PowerCut


@pytest.mark.parametrize("where", ["step 0", "step 2", "step 4", "step 5", "in Select", "behind Select"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(data, segmenter, straight, tmp_path, monkeypatch, where):
    folder = tmp_path / "resumed"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut(patch, where)
        list(train(tiny_generator(), segmenter, data, ROUNDS, TRAINING, folder))
    selected = folder / "round 2" / "referents.npy"
    assert selected.exists() == (where in ("step 4", "step 5", "behind Select"))
    resumed = tiny_generator()
    done = list(train(resumed, segmenter, data, ROUNDS, TRAINING, folder))
    generator, expected = straight
    assert same_weights(resumed, generator)
    assert without_time(done) == without_time(expected)
    assert [each.referents.tolist() for each in done] == [each.referents.tolist() for each in expected]
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"checkpoint.pt", "referents.npy"}


def test_it_goes_on_when_it_is_asked_to(data, segmenter, straight, tmp_path):
    folder, generator = tmp_path / "stopped", tiny_generator()
    steps = train(generator, segmenter, data, ROUNDS, TRAINING, folder)
    assert not folder.exists()
    first = next(steps)
    steps.close()
    assert first.round is ROUNDS[0] and [path.name for path in folder.iterdir()] == ["round 1"]
    list(train(tiny_generator(1), segmenter, data, ROUNDS, TRAINING, folder))  # whose first weights do not count
    resumed = tiny_generator()
    list(train(resumed, segmenter, data, ROUNDS, TRAINING, folder))
    assert same_weights(resumed, straight[0])


def test_a_selection_is_made_once_and_read_again(data, segmenter, uninterrupted, small, monkeypatch):
    generator, done, folder = uninterrupted
    assert np.load(folder / "round 2" / "referents.npy").tolist() == done[1].referents[data.of(["H_ref"])].tolist()
    monkeypatch.setattr(curriculum, "select", None)
    again = tiny_generator()
    repeated = list(train(again, segmenter, data, ROUNDS, TRAINING, folder))
    assert same_weights(again, generator) and without_time(repeated) == without_time(done)


def test_another_seed_gives_other_weights(data, segmenter, straight, tmp_path):
    other = tiny_generator()
    list(train(other, segmenter, data, ROUNDS, replace(TRAINING, seed=1), tmp_path / "other"))
    assert not same_weights(other, straight[0])


def test_what_is_selected_is_what_the_generator_then_predicts(data, segmenter, straight, tmp_path, small):
    """Selection happens with the weights behind the round before."""
    before = tiny_generator()
    list(train(before, segmenter, data, ROUNDS[:1], TRAINING, tmp_path / "first round"))
    of_ref = data.of(["H_ref"])
    expected = select(before, segmenter, data, of_ref)
    assert straight[1][1].referents[of_ref].tolist() == expected.tolist()


def test_a_file_in_the_way_of_a_selection(data, segmenter, small, tmp_path):
    steps = train(tiny_generator(), segmenter, data, ROUNDS, TRAINING, Path(tmp_path))
    next(steps)
    (tmp_path / "round 2").write_text("no folder")
    with pytest.raises(WrisError, match="cannot write to .*round 2: a file of that name stands in the way"):
        next(steps)
