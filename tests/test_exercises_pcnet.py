"""The exercises about PCNet: a right answer passes, and each mistake that a learner is likely to make gets its hint."""

import numpy as np
import pytest
import torch

from tests.wrong_answers import changed, untouched
from wris_lib import exercises_pcnet as exercises
from wris_lib.methods.pcnet import loss
from wris_lib.methods.pcnet.decompose import repeat


def order_cues(cues, count):
    return [cues[number % len(cues)] for number in range(count)]


def soft_iou(response, mask):
    both = (response * mask).sum()
    union = response.sum() + mask.sum() - both
    return both / union


def ambiguity(response, proposals):
    strongest = (response * proposals).max(axis=1).argmax()
    others = np.delete(proposals, strongest, axis=0)
    yours, theirs = soft_iou(response, proposals[strongest]), soft_iou(response, others.any(axis=0))
    return 1 - (yours - theirs)


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def disambiguation(own, other):
    one, two = softmax(3 * own), softmax(3 * other)
    return one @ two / (np.linalg.norm(one) * np.linalg.norm(two))


RIGHT = {
    "order_cues": (exercises.check_order_cues, order_cues),
    "ambiguity": (exercises.check_ambiguity, ambiguity),
    "disambiguation": (exercises.check_disambiguation, disambiguation),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    check, answer = RIGHT[name]
    for _ in range(5):  # inputs are drawn anew
        assert check(answer) is True
    assert capsys.readouterr().out == f"✔ {name} is right.\n" * 5


def test_other_right_ways_pass(capsys):
    assert exercises.check_order_cues(lambda cues, count: tuple((cues * count)[:count]))
    assert exercises.check_order_cues(lambda cues, count: np.resize(cues, count))
    assert exercises.check_ambiguity(lambda *given: float(ambiguity(*given)))

    def without_sums(own, other):  # a cosine does not ask how long its vectors are
        one, two = np.exp(3 * (own - own.max())), np.exp(3 * (other - other.max()))
        return float(one @ two / np.sqrt((one @ one) * (two @ two)))

    assert exercises.check_disambiguation(without_sums)


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
        (lambda *_: None, "got None: does every way through the function end in `return`?"),
        (raising, "it raised KeyError ('no\\nsuch thing')"),
        (lambda: 1, "it raised TypeError"),
        (lambda *_: "nonsense", "got 'nonsense', expected a"),
        (lambda *_: object(), "got <object object at"),
        (lambda *_: {"a": 1}, "got {'a': 1}, expected a"),
        (lambda *_: [[1], [1, 2]], "got [1"),
        (lambda *_: np.zeros((3, 2)), "got an array of shape (2,) in the list"),
        (0.5, "got 0.5 instead of a function; pass"),
    ],
)
def test_anything_at_all_gets_one_line(name, answer, hint, capsys):
    check, _ = RIGHT[name]
    assert check(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {name}: ") and line.endswith(".")
    shown = {
        "got an array of shape (2,) in the list": "got an array of shape (3, 2), expected a number",
        "got [1": "got [[",
    }
    assert hint in line or shown.get(hint, hint) in line


@pytest.mark.parametrize("got", [True, np.nan, np.inf, np.zeros(1), np.array(0.5), 10**400])
@pytest.mark.parametrize("name", ["ambiguity", "disambiguation"])
def test_what_is_no_plain_number(name, got, capsys):
    check, _ = RIGHT[name]
    assert check(lambda *_: got) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert ("float(…) makes one of it" in line) == isinstance(got, np.ndarray)


CUES = "[cues[number % len(cues)] for number in range(count)]"
SORTED = "must not be sorted"
ORDER_MISTAKES = [
    (
        (CUES, "[cues[min(number, len(cues) - 1)] for number in range(count)]"),
        "after the last cue comes the first again",
    ),
    ((CUES, "(cues + [cues[-1]] * count)[:count]"), "after the last cue comes the first again, not the last once more"),
    ((CUES, "(cues * count)[-count:]"), "expected 'a man'"),
    ((CUES, f"cues[-count:] if len(cues) > count else {CUES}"), "the first are used, for they are the general ones"),
    ((CUES, "cues[:count]"), "got 2 texts, expected 5: that is too short; begin again with the first cue"),
    ((CUES, "cues"), "got 2 texts, expected 5: that is too short"),
    (
        (CUES, f"cues if len(cues) > count else {CUES}"),
        "got 3 texts, expected 2: that is too long; cut it after `count`",
    ),
    ((CUES, "cues * -(-count // len(cues))"), "got 6 texts, expected 5: that is too long; cut it"),
    ((CUES, "cues * count"), "`count` is the number of texts, not of repetitions"),
    ((CUES, "[cue for cue in cues for _ in range(-(-count // len(cues)))][:count]"), "not each cue by itself"),
    ((CUES, "[cue for cue in cues for _ in range(count)][:count]"), "not each cue by itself"),
    ((CUES, "[cues[::-1][number % len(cues)] for number in range(count)]"), "that goes from the last cue to the first"),
    ((CUES, "[sorted(cues)[number % len(cues)] for number in range(count)]"), SORTED),
    (
        (CUES, "[sorted(cues, key=len)[number % len(cues)] for number in range(count)]"),
        "that is the order of length, not of the list",
    ),
    (
        ("    return", "    cues = list(dict.fromkeys(cues))\n    return"),
        "a cue that is in the list twice is used twice",
    ),
    (("number % len", "(number + 1) % len"), "the list starts with its first cue, cues[0]"),
    ((CUES, "cues[0]"), "got 'a man', expected a list of 3 texts: one text for each stage, not one for all"),
    ((CUES, "iter(cues)"), "list(…) makes one of what can be gone through"),
    ((CUES, "[cues] * count"), "in the list, expected a list of 3 texts: + joins lists"),
]
YOURS, THEIRS = "soft_iou(response, proposals[strongest])", "soft_iou(response, others.any(axis=0))"
MAX, CUT = "(response * proposals).max(axis=1)", "    strongest"
IOUS = "[soft_iou(response, mask) for mask in others] or [0]"
SINGLE = "largest single value"
UNION = "the background is the union of the others"
AMBIGUITY_MISTAKES = [
    (("1 - (yours - theirs)", "yours - theirs"), "got 1.000, expected 0.000: the '1 −' is missing"),
    (("1 - (yours", "1 + (yours"), "it is 1 minus the difference; that is 1 plus it"),
    (("yours - theirs)", "theirs - yours)"), "it is 1 minus the difference; that is 1 plus it"),
    (("    yours,", "    response = (response > 0.5) * 1.0\n    yours,"), "the response is not cut at 0.5"),
    ((CUT, "    response = (response > 0.5) * 1.0\n    strongest"), "the response is not cut at 0.5"),
    ((THEIRS, f"np.mean({IOUS})"), f"{UNION}, any(axis=0), compared once; not the mean of their IoUs"),
    ((THEIRS, f"max({IOUS})"), "not the largest of their IoUs"),
    ((THEIRS, f"sum({IOUS})"), "not the sum of their IoUs"),
    (("others.any(axis=0)", "others.sum(axis=0)"), "not their sum, in which some cells count twice"),
    (("others.any(axis=0)", "others.mean(axis=0)"), "compared once; not their mean"),
    (("others.any(axis=0)", "~proposals[strongest]"), "the background are the other proposals, not all of the rest"),
    (("others.any", "proposals.any"), "without the strongest"),
    (("others.any(axis=0)", "others.any(axis=0) & ~proposals[strongest]"), "keep what they share with the strongest"),
    (("1 - (yours - theirs)", "1 - yours"), "the IoU with the others is missing"),
    ((MAX, "(response * proposals).sum(axis=1)"), f"{SINGLE} is, .max(); not where the sum"),
    ((MAX, "np.array([soft_iou(response, mask) for mask in proposals])"), f"{SINGLE} is, .max()"),
    ((MAX, "((response * proposals).sum(axis=1) / proposals.sum(axis=1))"), f"{SINGLE} is, .max()"),
    ((f"{MAX}.argmax()", "0"), "that takes the first proposal; the strongest may be another one"),
    (("- (yours", "- 2 * (yours", "soft_iou", "dice"), "divide by Σ (R + m − R·m)"),
    (("soft_iou", "dice"), "divide by Σ (R + m − R·m)"),
    (("soft_iou(response, ", "np.dot(response, "), "that is without a division"),
    (("return", "return None and"), "does every way through"),
]
ONE, TWO, LENGTHS = "softmax(3 * own)", "softmax(3 * other)", "(np.linalg.norm(one) * np.linalg.norm(two))"
IAD_MISTAKES = [
    ((ONE, "own", TWO, "other"), "the cosine of the scores themselves; take the softmax of both first"),
    ((ONE, "own.clip(0)", TWO, "other.clip(0)"), "that is the cosine of what is above 0"),
    ((ONE, "softmax(own)", TWO, "softmax(other)"), "that takes 3 · softmax(scores), not softmax(3 · scores)"),
    ((ONE, "3 * softmax(own)", TWO, "3 * softmax(other)"), "that takes 3 · softmax(scores)"),
    ((ONE, "softmax(own / 3)", TWO, "softmax(other / 3)"), "That is of the scores divided by 3"),
    (("3 *", "2 *"), "is the softmax that of 3 times the scores? That is of 2 times"),
    (("3 *", "20 *"), "is the softmax that of 3 times the scores? That is of 20 times"),
    ((ONE, "softmax(own)"), "only one of the two is made three times as sharp"),
    ((f" / {LENGTHS}", ""), "that is the product without the lengths: a cosine divides it by both"),
    ((LENGTHS, "np.linalg.norm(one) ** 2"), "a cosine divides by both lengths, that is by their product"),
    ((LENGTHS, "((one @ one) * (two @ two))"), "a length is the root of the sum of squares; the root is missing"),
    (("return ", "return 1 - "), "that is 1 minus the cosine, a distance"),
    (("return ", "return -"), "that is minus the cosine"),
    ((f"one @ two / {LENGTHS}", "np.linalg.norm(one - two)"), "that is the distance of the two, not their cosine"),
    ((f"one @ two / {LENGTHS}", "float(own.argmax() == other.argmax())"), "that compares the peaks alone"),
    (("softmax", "unstable"), "around 1000, got nan, expected"),
    (("softmax", "unstable"), "exp of so large a number is inf; subtract the largest score before exp"),
    (("softmax", "half_stable"), "around -1000, got nan, expected"),
    (("softmax", "half_stable"), "exp of so small a number is 0"),
]
MISTAKES = [
    *((exercises.check_order_cues, order_cues, *mistake) for mistake in ORDER_MISTAKES),
    *((exercises.check_ambiguity, ambiguity, *mistake) for mistake in AMBIGUITY_MISTAKES),
    *((exercises.check_disambiguation, disambiguation, *mistake) for mistake in IAD_MISTAKES),
]


def dice(response, mask):
    return (response * mask).sum() / (response.sum() + mask.sum())


def unstable(scores):
    return np.exp(scores) / np.exp(scores).sum()


def half_stable(scores):
    return unstable(scores) if scores.max() < 0 else softmax(scores)


@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    for _ in range(3):  # whatever is drawn
        assert check(changed(right, *replacements)) is False
        assert hint in capsys.readouterr().out


def test_the_exercises_are_what_the_library_does():
    rng = np.random.default_rng(0)
    assert tuple(order_cues(["a", "b", "c"], 5)) == repeat(["a", "b", "c"], 5)
    response, proposals = rng.random(40), rng.random((4, 40)) < 0.4
    present = torch.ones(1, 4, dtype=torch.bool)
    theirs = loss.ambiguity(torch.from_numpy(response)[None], torch.from_numpy(proposals)[None], present)
    assert ambiguity(response, proposals) == pytest.approx(theirs.item())
    own, other = rng.normal(size=(2, 40))
    theirs = loss.disambiguation(torch.from_numpy(own)[None], torch.from_numpy(other)[None, None])
    assert disambiguation(own, other) == pytest.approx(theirs.item())
