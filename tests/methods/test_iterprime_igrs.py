"""Look, hide, look again: against a slow computation of one expression at a time, with looks that follow a script."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wris_lib.errors import WrisError
from wris_lib.methods.iterprime.igrs import PAPER, Refined, Refinement, refine, sharpened

LOOKS = 7  # in a script; more than any test makes
CERTAIN = [1.0] * LOOKS


class Script:
    """The H and ITM that expressions get to see at each of their looks, and what they were allowed to see.

    Args:
        maps: [expressions, looks, patches] in [0, 1].
        probabilities: [expressions, looks].
    """

    def __init__(self, maps: np.ndarray, probabilities: np.ndarray) -> None:
        self.maps, self.probabilities = np.asarray(maps, np.float32), np.asarray(probabilities, np.float32)
        self.allowed: list[list[np.ndarray]] = [[] for _ in self.maps]
        self.calls: list[list[int]] = []

    def __call__(self, which: list[int], visible: Tensor) -> tuple[Tensor, Tensor]:
        assert visible.dtype == torch.bool and visible.shape == (len(which), self.maps.shape[-1])
        self.calls.append(list(which))
        maps, probabilities = [], []
        for each, row in zip(which, visible, strict=True):
            number = len(self.allowed[each])
            self.allowed[each].append(row.numpy().copy())
            maps.append(self.maps[each, number])
            probabilities.append(self.probabilities[each, number])
        return torch.from_numpy(np.stack(maps)), torch.tensor(np.array(probabilities))

    def refine(self, settings: Refinement) -> list[Refined]:
        self.allowed, self.calls = [[] for _ in self.maps], []
        return refine(self, len(self.maps), self.maps.shape[-1], settings)


def random_script(seed: int, expressions: int = 4, patches: int = 15) -> Script:
    """Maps that are scaled to [0, 1], mostly low, so that looks have something left to hide."""
    rng = np.random.default_rng(seed)
    maps = rng.random((expressions, LOOKS, patches)) ** 3
    maps = (maps - maps.min(-1, keepdims=True)) / (maps.max(-1, keepdims=True) - maps.min(-1, keepdims=True))
    return Script(maps, 0.6 + 0.4 * rng.random((expressions, LOOKS)))


def stretch(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(each - low) / (high - low) if high > low else 0.0 for each in values]


def slow_sharpened(values: list[float]) -> list[float]:
    steep = [1 / (1 + np.exp(-20 * (each - 0.5))) for each in values]
    return [each / max(steep) for each in steep]


def slow_refine(maps: np.ndarray, probabilities: np.ndarray, settings: Refinement) -> dict:
    """One expression, in double precision: E, and what happened at each look."""
    lists = [[float(value) for value in each] for each in maps]
    visible = [True] * len(lists[0])
    average, looks, last = None, [], None
    for number in range(settings.passes + 1):
        if not any(visible):
            break
        if number == 0:
            new, unexplained = lists[0], [1 - each for each in stretch(lists[0])]
        else:
            addition = slow_sharpened(lists[number]) if settings.sharpen else lists[number]
            new = [settings.decay * e + (1 - settings.decay) * h for e, h in zip(average, addition, strict=True)]
            unexplained = [1 - each for each in stretch(average)]
        itm = float(probabilities[number])
        score = itm * sum(unexplained) / len(unexplained)
        judged = itm if settings.released_stop else score
        stop = last is not None and judged < last
        looks.append({"visible": list(visible), "average": new, "itm": itm, "score": score, "kept": not stop})
        if not stop or settings.released_stop:
            average = new
        if stop:
            break
        last = judged
        sharp = slow_sharpened(lists[number])
        visible = [was and each < settings.threshold for was, each in zip(visible, sharp, strict=True)]
    return {"map": average, "looks": looks}


def check(script: Script, settings: Refinement) -> list[Refined]:
    """All that `refine` returns, against the slow computation."""
    found = script.refine(settings)
    assert len(found) == len(script.maps)
    for each, maps, probabilities, allowed in zip(
        found, script.maps, script.probabilities, script.allowed, strict=True
    ):
        expected = slow_refine(maps, probabilities, settings)
        np.testing.assert_allclose(each.response_map, expected["map"], atol=1e-5)
        assert len(each.passes) == len(expected["looks"])
        for number, (one, look) in enumerate(zip(each.passes, expected["looks"], strict=True)):
            assert np.array_equal(one.response_map.numpy(), maps[number])
            assert one.visible.tolist() == look["visible"] == allowed[number].tolist()
            np.testing.assert_allclose(one.average, look["average"], atol=1e-5)
            assert one.probability == pytest.approx(look["itm"]) and type(one.probability) is float
            assert one.score == pytest.approx(look["score"], abs=1e-6) and type(one.score) is float
            assert one.kept is look["kept"]
    return found


DEVIATIONS = [
    pytest.param({}, id="methods.md"),
    pytest.param({"sharpen": True}, id="sharpen"),
    pytest.param({"released_stop": True}, id="released_stop"),
    pytest.param({"sharpen": True, "released_stop": True}, id="both"),
]


@pytest.mark.parametrize("deviation", DEVIATIONS)
@pytest.mark.parametrize("passes", [0, 1, 3, 5])
@pytest.mark.parametrize(("threshold", "decay"), [(0.5, 0.8), (0.05, 0.0), (1.0, 0.5), (0.9, 1.0)])
def test_refinement_equals_the_slow_computation(deviation, passes, threshold, decay):
    lengths = set()
    for seed in range(4):
        found = check(random_script(seed), Refinement(passes, threshold, decay, **deviation))
        lengths |= {len(each.passes) for each in found}
    assert passes < 2 or len(lengths) > 1  # expressions stop at different looks


def scores_of(script: Script, settings: Refinement) -> tuple[list[bool], Refined]:
    (found,) = check(script, settings)
    return [each.kept for each in found.passes], found


GENTLE = [[0.9, 1.0, 0.1, 0.2, 0.0], [0.1, 0.0, 1.0, 0.2, 0.1], [0.0, 0.1, 0.2, 1.0, 0.2], [0.0, 0.1, 0.0, 0.1, 1.0]]


def gentle(*probabilities: float) -> Script:
    """Four looks, each of which finds other patches than those before; R is about ½ throughout."""
    return Script(np.array([GENTLE]), np.array([probabilities]))


def test_a_score_that_falls_in_pass_1_leaves_the_first_map():
    """R_1 = R_0, so this comparison is one of ITM alone."""
    kept, found = scores_of(gentle(0.8, 0.79, 1.0, 1.0), PAPER)
    assert kept == [True, False]
    np.testing.assert_allclose(found.response_map, GENTLE[0])


def test_a_score_that_falls_in_pass_2_leaves_the_map_of_pass_1():
    kept, found = scores_of(gentle(0.5, 0.9, 0.1, 1.0), PAPER)
    assert kept == [True, True, False]
    np.testing.assert_allclose(found.response_map, 0.8 * np.array(GENTLE[0]) + 0.2 * np.array(GENTLE[1]), atol=1e-6)


def test_what_has_been_explained_lowers_the_score():
    """ITM rises in every pass, but in pass 2 the average covers more than it did: only the released rule goes on."""
    everywhere = [[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 0.4], [0.0, 0.0, 0.0, 0.0, 1.0]]
    script = Script(np.array([everywhere]), np.array([[0.5, 0.9, 0.91]]))
    kept, found = scores_of(script, Refinement(passes=2, decay=0.5))
    assert kept == [True, True, False] and found.passes[2].probability > found.passes[1].probability
    assert scores_of(script, Refinement(passes=2, decay=0.5, released_stop=True))[0] == [True, True, True]


@pytest.mark.parametrize(("probabilities", "looks"), [((0.8, 0.7, 1.0, 1.0), 2), ((0.5, 0.9, 0.1, 1.0), 3)])
def test_the_released_stop_returns_the_rejected_pass_as_well(probabilities, looks):
    kept, found = scores_of(gentle(*probabilities), Refinement(released_stop=True))
    assert kept == [True] * (looks - 1) + [False]
    assert torch.equal(found.response_map, found.passes[-1].average)
    _, ours = scores_of(gentle(*probabilities), PAPER)
    assert torch.equal(ours.response_map, ours.passes[-2].average)
    assert not torch.equal(ours.response_map, found.response_map)


def test_sharpening_changes_what_is_averaged_and_not_what_is_hidden():
    _, plain = scores_of(gentle(*CERTAIN[:4]), PAPER)
    _, sharp = scores_of(gentle(*CERTAIN[:4]), Refinement(sharpen=True))
    expected = 0.8 * np.array(GENTLE[0]) + 0.2 * np.array(slow_sharpened(GENTLE[1]))
    np.testing.assert_allclose(sharp.passes[1].average, expected, atol=1e-6)
    assert torch.equal(plain.passes[0].average, sharp.passes[0].average)
    for first, second in zip(plain.passes, sharp.passes, strict=False):
        assert torch.equal(first.visible, second.visible)
    assert not torch.allclose(plain.response_map, sharp.response_map, atol=1e-3)


@pytest.mark.parametrize("released_stop", [False, True])
def test_a_tie_is_no_fall(released_stop):
    """ITM and the average stay exactly what they were, so the score does."""
    maps = np.tile(np.array([1.0, 0.0, 0.5, 0.25]), (LOOKS, 1))[None]
    script = Script(maps, np.full((1, LOOKS), 0.75))
    kept, found = scores_of(script, Refinement(passes=3, threshold=0.9, decay=1.0, released_stop=released_stop))
    assert kept == [True] * 4 and len({each.score for each in found.passes}) == 1


def test_no_passes_give_the_first_map_alone():
    script = random_script(0)
    for each, maps in zip(check(script, Refinement(passes=0)), script.maps, strict=True):
        assert np.array_equal(each.response_map.numpy(), maps[0]) and len(each.passes) == 1
        assert each.passes[0].visible.all() and each.passes[0].kept
    assert script.calls == [[0, 1, 2, 3]]


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_map_hides_everything_and_ends_it(value):
    """All-zero maps among them: σ has its maximum everywhere."""
    maps = np.full((1, LOOKS, 6), value)
    (found,) = check(Script(maps, np.ones((1, LOOKS))), PAPER)
    assert len(found.passes) == 1 and found.passes[0].score == 1.0
    assert torch.equal(found.response_map, torch.full((6,), value))


def test_when_nothing_is_left_to_see_there_is_no_further_look():
    halves = np.array([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]])
    script = Script(halves, np.array([[0.5, 0.9, 1.0]]))
    (found,) = check(script, PAPER)
    assert [each.visible.sum().item() for each in found.passes] == [4, 2] and len(script.calls) == 2
    assert torch.equal(found.response_map, found.passes[1].average)


def test_only_those_that_still_run_are_looked_at():
    """The second expression stops in pass 1, the first in pass 2, the third never."""
    maps = np.array([GENTLE] * 3)
    script = Script(maps, np.array([[0.5, 0.9, 0.1, 1.0], [0.8, 0.7, 1.0, 1.0], [0.5, 0.6, 0.8, 1.0]]))
    found = check(script, PAPER)
    assert script.calls == [[0, 1, 2], [0, 1, 2], [0, 2], [2]]
    assert [[each.kept for each in one.passes] for one in found] == [[True, True, False], [True, False], [True] * 4]


def test_expressions_do_not_depend_on_one_another():
    script = random_script(7)
    together = script.refine(PAPER)
    for number, expected in enumerate(together):
        (alone,) = Script(script.maps[number : number + 1], script.probabilities[number : number + 1]).refine(PAPER)
        assert torch.equal(alone.response_map, expected.response_map)
        assert [plain(each) for each in alone.passes] == [plain(each) for each in expected.passes]


def plain(each) -> tuple:
    return each.probability, each.score, each.kept, each.visible.tolist(), each.average.tolist()


def test_no_expressions_and_nobody_looks():
    script = Script(np.zeros((0, LOOKS, 5)), np.zeros((0, LOOKS)))
    assert script.refine(PAPER) == [] and script.calls == []


def test_maps_in_half_precision_are_refined_in_single():
    script = random_script(3)

    def look(which, visible):
        maps, probabilities = script(which, visible)
        return maps.half(), probabilities.half()

    for each in refine(look, 4, 15, PAPER):
        assert {tensor.dtype for one in each.passes for tensor in (one.response_map, one.average)} == {torch.float32}
        assert each.response_map.dtype == torch.float32


@given(
    st.integers(0, 100_000),
    st.integers(0, 6),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_the_mask_only_ever_shrinks(seed, passes, threshold, decay, sharpen, released_stop):
    found = random_script(seed, expressions=2).refine(Refinement(passes, threshold, decay, sharpen, released_stop))
    for each in found:
        assert 1 <= len(each.passes) <= passes + 1 and each.passes[0].visible.all() and each.passes[0].kept
        assert all(one.kept for one in each.passes[:-1])  # only the last can be rejected
        for before, after in zip(each.passes, each.passes[1:], strict=False):
            assert after.visible.any() and not (after.visible & ~before.visible).any()
            assert not after.visible[before.response_map.argmax()]  # at least the maximum is hidden
        assert each.response_map.min() >= 0 and each.response_map.max() <= 1 + 1e-6


def test_sharpened():
    maps = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.3, 0.1], [0.0, 0.0, 0.0]])
    expected = [slow_sharpened(each) for each in maps.tolist()]
    np.testing.assert_allclose(sharpened(maps), expected, atol=1e-6)
    assert torch.equal(sharpened(maps).amax(dim=1), torch.ones(3)) and sharpened(maps)[0, 0] < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": -1}, "-1 refinement passes cannot be made; ask for 0 or more"),
        ({"threshold": 0.0}, "the threshold θ is 0.0; choose one above 0 and at most 1"),
        ({"threshold": 1.01}, "the threshold θ is 1.01; choose"),
        ({"threshold": float("nan")}, "the threshold θ is nan; choose"),
        ({"decay": -0.1}, "the decay λ is -0.1; choose one from 0 to 1"),
        ({"decay": 1.1}, "the decay λ is 1.1; choose"),
        ({"decay": float("nan")}, "the decay λ is nan; choose"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(WrisError, match=message):
        replace(PAPER, **changes)


def test_the_papers_settings():
    assert Refinement(passes=3, threshold=0.5, decay=0.8, sharpen=False, released_stop=False) == PAPER
