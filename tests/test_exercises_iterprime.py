"""The exercises about IteRPrimE: other right answers, the same case again, and what the library does."""

import numpy as np
import pytest
import torch

from tests.wrong_answers import EXERCISES
from wris_lib.methods.iterprime import igrs, selection
from wris_lib.methods.iterprime.gradcam import local_maps
from wris_lib.methods.iterprime.words import Pieces

DIFFERENCE, NEXT_PASS, CHOOSE = (EXERCISES[name] for name in ("primary_difference", "next_pass", "choose"))


def torch_difference(A_m, A_c):
    apart = torch.from_numpy(A_m)[:, None].float() - torch.from_numpy(A_c).float()
    return apart / apart.norm(dim=1, keepdim=True).clamp(min=1e-8)


def torch_pass(E, H, visible, decay, threshold):
    E, H, visible = torch.from_numpy(E).float(), torch.from_numpy(H).float(), torch.from_numpy(visible)
    return [decay * E + (1 - decay) * H, visible & (igrs.sharpened(H) < threshold)]


GUARD = "np.maximum(np.linalg.norm(difference, axis=1, keepdims=True), 1e-8)"
NORM = "np.linalg.norm(difference, axis=1, keepdims=True)"
OTHER_WAYS = [
    (DIFFERENCE, torch_difference),
    (DIFFERENCE, DIFFERENCE.answer({GUARD: f"({NORM} + 1e-8)"})),
    (DIFFERENCE, DIFFERENCE.answer({GUARD: f"np.where({NORM} == 0, 1e-8, {NORM})"})),
    (NEXT_PASS, torch_pass),
    # The 1 + in the score is the same for all, and a proposal may be named by a number of NumPy's.
    (CHOOSE, CHOOSE.answer({"1 + H[mask].mean()": "H[mask].mean()", "return int(": "return ("})),
]


@pytest.mark.parametrize("exercise, answer", OTHER_WAYS)
def test_other_right_ways_pass(exercise, answer, capsys):
    assert exercise.judge(answer) is True


def test_a_learner_meets_the_same_case_again(capsys):
    for exercise in (DIFFERENCE, NEXT_PASS, CHOOSE):
        right = exercise.answer()
        assert not exercise.judge(lambda *given, right=right: [right(*given)]), "wrong in form or shape"
        once = capsys.readouterr().out
        assert not exercise.judge(lambda *given, right=right: [right(*given)]) and capsys.readouterr().out == once


def test_the_exercises_are_what_the_library_does():
    rng = np.random.default_rng(0)
    attention, pieces = rng.random((3, 7, 12)), Pieces(effective=[1, 2, 3, 5], primary=[2, 3])
    tensor = torch.from_numpy(attention)
    own = attention[:, 2:4].mean(axis=1)
    theirs = local_maps(tensor, torch.ones_like(tensor), pieces).numpy()  # A_dif ⊙ 1 ⊙ (A_m ⊙ 1)
    np.testing.assert_allclose(DIFFERENCE.answer()(own, attention[:, [1, 5]]) * own[:, None], theirs)

    maps = torch.from_numpy(rng.random((2, 24)).astype(np.float32))
    settings = igrs.Refinement(passes=2, threshold=0.7, decay=0.6)
    calls = iter([maps[0], maps[1], maps[0]])
    (refined,) = igrs.refine(lambda which, visible: (next(calls)[None], torch.ones(1)), 1, 24, settings)
    first, second = refined.passes[:2]
    given = (each.numpy() for each in (first.average, maps[1], second.visible))
    average, visible = NEXT_PASS.answer()(*given, 0.6, 0.7)
    np.testing.assert_allclose(average, second.average, rtol=1e-6)
    assert (visible == (second.visible & (igrs.sharpened(maps[1]) < 0.7)).numpy()).all()

    choose = CHOOSE.answer()
    for _ in range(20):
        response, masks = rng.random((9, 11)), rng.random((5, 9, 11)) < 0.3
        assert choose(response, masks) == selection.choose(response, masks, most_components=99).index
