"""The exercises about IteRPrimE: a right answer passes, and each mistake that a learner is likely to make is named."""

import numpy as np
import pytest
import torch

from tests.wrong_answers import changed, untouched
from wris_lib import exercises_iterprime as exercises
from wris_lib.methods.iterprime import igrs, selection
from wris_lib.methods.iterprime.gradcam import local_maps
from wris_lib.methods.iterprime.words import Pieces


def primary_difference(A_m, A_c):
    apart = A_m[:, None] - A_c
    norm = np.linalg.norm(apart, axis=1, keepdims=True)
    return apart / np.where(norm == 0, 1e-8, norm)


def next_pass(E, H, visible, decay, threshold):
    average = decay * E + (1 - decay) * H
    strength = 1 / (1 + np.exp(-20 * (H - 0.5)))
    sigma = strength / strength.max()
    return average, visible & (sigma < threshold)


def choose(heat, masks):
    scores = np.array([(1 + heat[mask]).sum() / mask.sum() for mask in masks])
    inside = masks[:, heat == heat.max()].any(axis=1)
    if inside.any():
        scores[~inside] = -1
    return int(scores.argmax())


RIGHT = {
    "primary_difference": (exercises.check_primary_difference, primary_difference),
    "next_pass": (exercises.check_next_pass, next_pass),
    "choose": (exercises.check_choose, choose),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    check, answer = RIGHT[name]
    assert check(answer) is True
    assert capsys.readouterr().out == f"✔ {name} is right.\n"


def torch_difference(A_m, A_c):
    apart = torch.from_numpy(A_m)[:, None].float() - torch.from_numpy(A_c).float()
    return apart / apart.norm(dim=1, keepdim=True).clamp(min=1e-8)


def torch_pass(E, H, visible, decay, threshold):
    E, H, visible = torch.from_numpy(E).float(), torch.from_numpy(H).float(), torch.from_numpy(visible)
    return [decay * E + (1 - decay) * H, visible & (igrs.sharpened(H) < threshold)]


APART, NORM = "A_m[:, None] - A_c", "np.linalg.norm(apart, axis=1, keepdims=True)"
GUARD = "np.where(norm == 0, 1e-8, norm)"
OTHER_WAYS = [
    (exercises.check_primary_difference, torch_difference),
    (exercises.check_primary_difference, changed(primary_difference, GUARD, "(norm + 1e-8)")),
    (exercises.check_primary_difference, changed(primary_difference, GUARD, "norm.clip(1e-8)")),
    (exercises.check_next_pass, torch_pass),
    # The 1 + in the score is the same for all, and a proposal may be named by a number of NumPy's.
    (exercises.check_choose, changed(choose, "(1 + heat[mask]).sum() / mask.sum()", "heat[mask].mean()", "int(", "(")),
]


@pytest.mark.parametrize("check, answer", OTHER_WAYS)
def test_other_right_ways_pass(check, answer, capsys):
    assert check(answer) is True


@pytest.mark.parametrize("name", RIGHT)
def test_an_untouched_stub_is_open(name, capsys):
    check, _ = RIGHT[name]
    assert check(untouched) is False
    assert capsys.readouterr().out.startswith(f"○ {name} is still open")


def raising(*_):
    raise KeyError("no\nsuch thing")


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda *_: None, "got None"),
        (lambda *_: None, "does every way through the function end in `return`?"),
        (raising, "it raised KeyError ('no\\nsuch thing')"),
        (lambda: 1, "it raised TypeError"),
        (lambda *_: "nonsense", "got 'nonsense'"),
        (lambda *_: object(), "got <object object at"),
        (lambda *_: {"a": 1}, "got {'a': 1}"),
        (lambda *_: [[1], [1, 2]], "expected "),
        (lambda *_: 10**400, "expected "),
        (lambda *_: np.zeros((3, 2)), "expected "),
        (lambda *_: (np.zeros(24), "no"), "expected "),
        (0.5, "got 0.5 instead of a function; pass"),
    ],
)
def test_anything_at_all_gets_one_line(name, answer, hint, capsys):
    check, _ = RIGHT[name]
    assert check(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {name}: ") and line.endswith(".")
    assert hint in line


AXES = "the norm goes over the tokens, axis 1 of [heads, C, N]"
SQUARES, OF = "the norm is the root of the sum of squares", "the norm is that of the difference"
DIFFERENCE_MISTAKES = [
    ((APART, "A_c - A_m[:, None]"), "that is A_c − A_m; the primary word comes first"),
    ((f" / {GUARD}", ""), "the division by the norm is missing"),
    ((f" / {GUARD}", "", APART, "A_c - A_m[:, None]"), "that is A_c − A_m, and the division by the norm is missing"),
    (("axis=1", "axis=2"), f"{AXES}; that one goes over the patches"),
    (("axis=1", "axis=-1"), "that one goes over the patches"),
    (("axis=1", "axis=0"), "that one goes over the heads"),
    (("axis=1", "axis=(1, 2)"), "that one goes over tokens and patches"),
    ((NORM, "np.linalg.norm(apart)"), "that one goes over everything"),
    ((NORM, "(apart**2).sum(axis=1, keepdims=True)"), f"{SQUARES}; the root is missing"),
    ((NORM, "(apart**2).mean(axis=1, keepdims=True) ** 0.5"), f"{SQUARES}, not of their mean"),
    ((NORM, "abs(apart).sum(axis=1, keepdims=True)"), f"{SQUARES}, not the sum of sizes"),
    (("norm(apart", "norm(A_c"), f"{OF}, not of A_c"),
    ((NORM, "np.linalg.norm(A_m, axis=1)[:, None, None]"), f"{OF}, not of A_m"),
    (("return apart", "return abs(apart)"), "the signs are lost"),
    (("return apart", "return apart.clip(0)"), "what is negative counts, too"),
    ((GUARD, "norm"), "got nan at head 0, token 0, patch 5, expected 0.000: 0 / 0 is no number; where the norm is 0"),
    ((GUARD, "norm"), "for two patches to which all words attend alike"),
    ((APART, "A_m - A_c"), "it raised ValueError"),
    ((APART, "A_m - A_c"), "x[:, None] makes [heads, 1, N] of [heads, N]"),
    ((", keepdims=True", ""), "x[:, None] makes [heads, 1, N] of [heads, N]"),
    ((APART, "A_m[:, None] - A_c.mean(axis=1, keepdims=True)"), "of shape (2, 1, 12), expected (2, 3, 12)"),
    ((APART, "A_m - A_c[:, 0]", "axis=1", "axis=-1"), "of shape (2, 12), expected (2, 3, 12): every context token has"),
]
AVERAGE, SIGMA, MASK = "decay * E + (1 - decay) * H", "strength / strength.max()", "visible & (sigma < threshold)"
PASS_MISTAKES = [
    ((AVERAGE, "(1 - decay) * E + decay * H"), "λ and 1 − λ are exchanged: λ is the old average's"),
    (
        (f"    average = {AVERAGE}\n", "", "    return", "    average = decay * E + (1 - decay) * sigma\n    return"),
        "the average takes H itself; σ is for the mask alone",
    ),
    ((AVERAGE, "decay * E + H"), "the new map counts 1 − λ, or the sum grows"),
    ((AVERAGE, "E + (1 - decay) * H"), "the old average counts λ, or the sum grows"),
    ((AVERAGE, "(E + H) / 2"), "that is the plain mean"),
    ((AVERAGE, "H"), "that is the new map alone"),
    ((AVERAGE, "E"), "that is the old average"),
    ((AVERAGE, "decay * E + (1 - decay) * H * visible"), "all of H counts, also where this look could not see"),
    ((AVERAGE, "0 * H"), "got 0.000 at patch"),
    ((MASK, "sigma < threshold"), "what was hidden once stays hidden; the earlier mask has to be joined with &"),
    ((MASK, "sigma < threshold"), "for a second look with decay=0.3 and threshold=0.9, patch"),
    ((MASK, "sigma < threshold"), "which this look could not see, is visible, expected hidden"),
    (("visible &", "visible |"), "join the two with &, not with |"),
    (("sigma < ", "sigma > "), "the strong patches are hidden, so compare with <, not with >"),
    (("sigma < ", "sigma >= "), "the strong patches are hidden, so compare with <, not with >"),
    (("sigma < ", "sigma <= "), "for a threshold of 1 with decay=0.8 and threshold=1, patch"),
    (("sigma < ", "sigma <= "), "compare with <, not with <=; σ is 1 at the strongest patch"),
    ((SIGMA, "strength"), "for a map that reaches 0.4"),
    ((SIGMA, "strength"), "the division by the largest s is missing in σ"),
    (("sigma < ", "H < "), "that compares H itself; σ makes it sharper first"),
    (
        (f"    average = {AVERAGE}\n", "", "(H - 0.5)", f"({AVERAGE} - 0.5)", "return average", f"return {AVERAGE}"),
        "the mask comes from this look's H, not from the average",
    ),
    (("-20 *", "-1 *"), "the factor 20 in σ is missing"),
    (("(H - 0.5)", "H"), "the 0.5 in σ is missing"),
    ((MASK, f"~({MASK})"), "that is what is hidden; True is for what stays visible"),
    ((MASK, "visible"), "that is the mask of before; no patch was hidden"),
    (("return average, visible & (sigma < threshold)", f"return {MASK}, average"), "the average comes first"),
    ((MASK, "visible * 1.0 * (sigma < threshold)"), "got numbers as visible_new, expected True and False"),
    (("return average, ", "return "), "expected two things: `return E_new, visible_new`"),
    ((MASK, f"({MASK})[:3]"), "got visible_new of shape (3,), expected (24,)"),
    (("visible &", "visible and"), "it raised ValueError"),
]
SCORE, EMPTY = "(1 + heat[mask]).sum() / mask.sum()", "    if inside.any():\n        scores[~inside] = -1\n"
RETURN, NOTHING = "    return", "    if not inside.any():\n       "
CHOICE_MISTAKES = [
    ((" / mask.sum()", ""), "that is the largest; divide by the number of the mask's pixels"),
    ((SCORE, "mask.sum()"), "for masks that all contain the peak, got 0, expected 1: that is the largest"),
    ((SCORE, "(1 + heat[mask]).sum() / heat.size"), "divide by the number of the mask's pixels"),
    ((EMPTY, ""), "for a mask that is stronger, but has no peak, got 1, expected 0: only masks count"),
    (("scores[~inside] = -1", "scores = scores[inside]"), "return the number among all"),
    (("scores[~inside] = -1", "scores = scores[inside]"), "for two masks without the peak before two with it"),
    (
        ("    if inside.any():\n        scores[~inside]", "    scores[~inside]"),
        "for masks none of which contains the peak, got 0, expected 3: no mask contains a peak, so all of them count",
    ),
    (
        (EMPTY, "", "int(scores.argmax())", "max(np.flatnonzero(inside), key=lambda n: scores[n])"),
        "it raised ValueError",
    ),
    (
        (EMPTY, "", "int(scores.argmax())", "max(np.flatnonzero(inside), key=lambda n: scores[n])"),
        "no mask contains a peak, so all of them count, and there is an answer",
    ),
    ((RETURN, f"{NOTHING} return None\n{RETURN}"), "got None, expected a number from 0 to 3: no"),
    ((RETURN, f"{NOTHING} return []\n{RETURN}"), "got [], expected a number from 0 to 3: no"),
    ((RETURN, f"{NOTHING} return -1\n{RETURN}"), "got -1, expected a number from 0 to 3: no"),
    (
        ("masks[:, heat == heat.max()].any(axis=1)", "masks.reshape(len(masks), -1)[:, heat.argmax()]"),
        "for a map with two peaks, in different masks, got 0, expected 1: H may be largest in several pixels",
    ),
    (("].any(axis=1)", "].all(axis=1)"), "it is enough that a mask contains one of them"),
    (("argmax()", "argmin()"), "expected 1: that has the lowest score"),
    (("int(scores.argmax())", "int(scores.argmax()) + 1"), "count from 0"),
    (("int(scores.argmax())", "len(masks)"), "got 4, expected a number from 0 to 3: masks are counted from 0"),
    (("int(scores.argmax())", "masks[scores.argmax()]"), "return the number of the mask, not the mask"),
    (("int(scores.argmax())", "np.array(scores.argmax())"), "int(…) makes one of it"),
    (("int(scores.argmax())", "bool(scores.argmax())"), "got True, expected a number"),
    (("int(scores.argmax())", "float(scores.argmax())"), "got 1.0, expected a number"),
]
MISTAKES = [
    *((exercises.check_primary_difference, primary_difference, *mistake) for mistake in DIFFERENCE_MISTAKES),
    *((exercises.check_next_pass, next_pass, *mistake) for mistake in PASS_MISTAKES),
    *((exercises.check_choose, choose, *mistake) for mistake in CHOICE_MISTAKES),
]


@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    assert check(changed(right, *replacements)) is False
    assert hint in capsys.readouterr().out


def test_a_learner_meets_the_same_case_again(capsys):
    for check, right in RIGHT.values():
        assert not check(lambda *given, right=right: [right(*given)]), "wrong in form or shape"
        once = capsys.readouterr().out
        assert not check(lambda *given, right=right: [right(*given)]) and capsys.readouterr().out == once


def test_the_exercises_are_what_the_library_does():
    rng = np.random.default_rng(0)
    attention, pieces = rng.random((3, 7, 12)), Pieces(effective=[1, 2, 3, 5], primary=[2, 3])
    tensor = torch.from_numpy(attention)
    own = attention[:, 2:4].mean(axis=1)
    theirs = local_maps(tensor, torch.ones_like(tensor), pieces).numpy()  # A_dif ⊙ 1 ⊙ (A_m ⊙ 1)
    np.testing.assert_allclose(primary_difference(own, attention[:, [1, 5]]) * own[:, None], theirs)

    maps = torch.from_numpy(rng.random((2, 24)).astype(np.float32))
    settings = igrs.Refinement(passes=2, threshold=0.7, decay=0.6)
    calls = iter([maps[0], maps[1], maps[0]])
    (refined,) = igrs.refine(lambda which, visible: (next(calls)[None], torch.ones(1)), 1, 24, settings)
    first, second = refined.passes[:2]
    average, visible = next_pass(*(each.numpy() for each in (first.average, maps[1], second.visible)), 0.6, 0.7)
    np.testing.assert_allclose(average, second.average, rtol=1e-6)
    assert (visible == (second.visible & (igrs.sharpened(maps[1]) < 0.7)).numpy()).all()

    for _ in range(20):
        response, masks = rng.random((9, 11)), rng.random((5, 9, 11)) < 0.3
        assert choose(response, masks) == selection.choose(response, masks, most_components=99).index
