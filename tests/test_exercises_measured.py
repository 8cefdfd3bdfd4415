"""A right answer passes, and each mistake that a learner is likely to make gets its own hint.

Results, the language model and SAM's answers are made up here; the notebooks run the checks on the real ones.
"""

import json

import numpy as np
import pytest

from tests.wrong_answers import changed, untouched
from wris_lib import exercises_measured as exercises
from wris_lib.backbones.language import load_parser
from wris_lib.evaluate import iou
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS


def helps_most():
    return "CRM"


def weakest_way():
    return "local"


def invent_cue():
    return "the astronaut beside the car"


def mislead_choice():
    lorry, wheel = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    lorry[2:6] = wheel[4:6, 1:3] = True
    return lorry * 0.5 + wheel * 0.5, np.stack([lorry, wheel])


def pick_mask(masks, trusted, response):
    return int(np.where(trusted > 0.6 * trusted.max(), masks.sum(axis=(1, 2)), 0).argmax())


RIGHT = {
    "helps_most": (exercises.check_helps_most, helps_most),
    "weakest_way": (exercises.check_weakest_way, weakest_way),
    "invent_cue": (exercises.check_invent_cue, invent_cue),
    "mislead_choice": (exercises.check_mislead_choice, mislead_choice),
    "pick_mask": (exercises.check_pick_mask, pick_mask),
}


class Teller:
    """A language model that knows cars and dogs."""

    name, follows_instructions = "teller", False

    def answer(self, prompts):
        for prompt in prompts:
            if "dog" in prompt:
                yield "1. a dog\n2. the small dog"
            else:
                yield "1. a cake\n2. the cake beside the dog"


def asked(seed):
    """The ground, which SAM hardly trusts; a thing; a part of it, which it trusts most; and a speck."""
    rng, masks = np.random.default_rng(seed), np.zeros((4, 20, 20), bool)
    masks[0] = True
    masks[1, 4:16, 2:14] = masks[2, 6:12, 5:10] = masks[3, 7:9, 6:8] = True
    order = rng.permutation(4)
    trusted = np.array([0.3, 0.85, 0.9, 0.5])[order]
    return masks[order], trusted, rng.random((20, 20)), masks[1]


def results(path, rows):
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def made_up(tmp_path, monkeypatch):
    point = {"L_cls (TRIS)": 30.0, "+CRM": 42.0, "+CRM+RaS": 43.0, "+CRM+IaD": 49.0}
    pcnet = [{"name": n, "data": "toyrefg:val", "metrics": {"PointM": {"mean": mean}}} for n, mean in point.items()]
    miou = dict(zip(AGGREGATIONS, (27.0, 28.0, 19.0, 24.0, 23.0), strict=True))
    ways = [
        {"name": way, "data": split, "metrics": {"mIoU": {"mean": mean + add}}}
        for split, add in (("toyref:testA", -1), ("toyrefg:test", 1))
        for way, mean in miou.items()
    ]
    monkeypatch.setattr(exercises, "PCNET", results(tmp_path / "pcnet_ablation.json", pcnet))
    monkeypatch.setattr(exercises, "ITERPRIME", results(tmp_path / "iterprime_ablation.json", ways))
    monkeypatch.setattr(exercises, "_readers", lambda: (Teller(), load_parser("toy")))
    monkeypatch.setattr(exercises, "sam_answers", lambda draw: [asked(seed) for seed in range(6)])


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name, capsys):
    check, answer = RIGHT[name]
    assert check(answer) is True
    assert capsys.readouterr().out == f"✔ {name} is right.\n"


@pytest.mark.parametrize("name", RIGHT)
def test_an_untouched_stub_is_open(name, capsys):
    check, _ = RIGHT[name]
    assert check(untouched) is False
    assert capsys.readouterr().out.startswith(f"○ {name} is still open")


def raising(*_, **__):
    raise KeyError("no\nsuch thing")


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda *_, **__: None, "got None"),
        (raising, "it raised KeyError ('no\\nsuch thing')"),
        (lambda a, b, c, d, e: 1, "it raised TypeError"),
        (lambda *_, **__: "nonsense !", "expected "),
        (lambda *_, **__: [[1], [1, 2]], "expected "),
        (lambda *_, **__: object(), "got "),
        (lambda *_, **__: np.zeros((3, 2)), "got an array of shape (3, 2), expected "),
        (lambda *_, **__: True, "got True, expected "),
        (lambda *_, **__: 1.0, "got 1.0, expected "),
        (0.5, "got 0.5 instead of a function; pass"),
    ],
)
def test_anything_at_all_gets_one_line(name, answer, hint, capsys):
    check, _ = RIGHT[name]
    assert check(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✘ {name}: ") and hint in line and line.endswith(".")


HELPS_MISTAKES = [
    (('"CRM"', '"RaS"'), "RaS brings 1.0 points of PointM, and another piece 12.0: as section 5 says, a map"),
    (('"CRM"', '"IaD"'), "IaD brings 7.0 points of PointM, and another piece 12.0: it moves two answers apart"),
    (('"CRM"', '"all"'), "got 'all', expected a single piece, as one of these texts: 'CRM', 'RaS', 'IaD'"),
]
WEAKEST_MISTAKES = [
    (("local", "mean"), "mean has an mIoU of 27.0, and another way 19.0: it is the paper's last; here a mean also"),
    (("local", "gvlp"), "gvlp has an mIoU of 28.0, and another way 19.0: it hears the context, which section 3"),
    (("local", "pwem"), "pwem has an mIoU of 23.0, and another way 19.0: it is a mean of three maps"),
    (("local", "global"), "global has an mIoU of 24.0, and another way 19.0: it hears the primary word, but not only"),
    (("local", "[CLS]"), "got '[CLS]', expected the name of a way: 'mean', 'gvlp', 'local', 'global', 'pwem'"),
]
INVENT_MISTAKES = [
    (
        ("astronaut beside the car", "small dog"),
        "the cues are ['a dog', 'the small dog']: their nouns are the sentence's",
    ),
    (
        ("astronaut beside the car", "small dogs"),
        "the cues are ['a dog', 'the small dog']: their nouns are the sentence's",
    ),
    (("astronaut beside the car", "astronaut"), "what the model said was thrown away, and the parser's cues are ['the"),
    (("the astronaut", "the " * 12 + "astronaut"), "expected a sentence of at most 15 words, letters and single"),
    (("astronaut", "astronaut,"), "expected a sentence of at most 15 words, letters and single spaces"),
    (("the astronaut beside the car", ""), "got '', expected a sentence of at most 15 words"),
]
CHOICE_MISTAKES = [
    (
        ("lorry * 0.5 + wheel * 0.5", "lorry * 1.0"),
        "masks[0] is chosen, with an IoU of 1.00 with the referent; the scores are 2.00, 2.00: where H is the same all",
    ),
    (
        ("lorry * 0.5 + wheel * 0.5", "lorry * 1.0 - wheel * 0.5"),
        "masks[0] is chosen, with an IoU of 1.00 with the referent; the scores are 1.94, 1.50: the score is 1 plus the",
    ),
    (("[lorry, wheel]", "[lorry]"), "the scores are 1.56: there is nothing else to choose"),
    (("wheel[4:6, 1:3]", "wheel[2:6, 1:7]"), "masks[1] is chosen, with an IoU of 0.75 with the referent; the scores"),
    (("[lorry, wheel]", "[wheel, lorry]"), "H is not 0 at 28 pixels outside the referent, masks[0]: a map cannot be"),
    (("lorry * 0.5 + wheel", "lorry * 0.2 + wheel"), "in the referent H goes from 0.20 to 0.70, expected values from"),
    (("np.stack([lorry, wheel])", "lorry"), "got H of shape (8, 8) and masks of shape (8, 8), expected (h, w) and"),
    (("[lorry, wheel]", "[lorry * 1, wheel * 1]"), "got masks of int64, expected True and False"),
    (("[lorry, wheel]", "[lorry, wheel & ~lorry]"), "one of the masks is empty, expected at least a pixel in each"),
    ((", np.stack([lorry, wheel])", ""), "got an array of shape (8, 8), expected two things: `return H, masks`"),
]
PICK_MISTAKES = [
    (
        ("np.where(trusted > 0.6 * trusted.max(), masks.sum(axis=(1, 2)), 0)", "trusted"),
        "SAM's own choice has 20.8, the best one 100.0; expected at least 60.4: that is SAM's own choice; what SAM",
    ),
    (
        ("trusted > 0.6 * trusted.max()", "trusted > 0"),
        "the mIoU is 36.0, SAM's own choice has 20.8, the best one 100.0",
    ),
    (("trusted > 0.6 * trusted.max()", "trusted > 0"), ": the largest mask is often the ground, and SAM hardly trusts"),
    (("masks.sum(axis=(1, 2)), 0).argmax", "masks.sum(axis=(1, 2)), 999).argmin"), "that is SAM's own choice"),
    (
        ("np.where(trusted > 0.6 * trusted.max(), masks.sum(axis=(1, 2)), 0).argmax", "masks.sum(axis=(1, 2)).argmin"),
        "the mIoU is 2.8, SAM's own choice has 20.8, the best one 100.0; expected at least 60.4: the smallest mask is",
    ),
    (("argmax())", "argmax()) ^ (len(masks) > 3)"), "see how large the best mask is, and how far it is trusted, where"),
    (("argmax())", "argmax()) + 9"), "for 3 masks, got 9, expected a number from 0 to 2"),
    (
        ("return int(", "return masks[0]; int("),
        "for 3 masks, got an array of shape (8, 8), expected a number from 0 to 2: return",
    ),
]
MISTAKES = [
    *((exercises.check_helps_most, helps_most, *mistake) for mistake in HELPS_MISTAKES),
    *((exercises.check_weakest_way, weakest_way, *mistake) for mistake in WEAKEST_MISTAKES),
    *((exercises.check_invent_cue, invent_cue, *mistake) for mistake in INVENT_MISTAKES),
    *((exercises.check_mislead_choice, mislead_choice, *mistake) for mistake in CHOICE_MISTAKES),
    *((exercises.check_pick_mask, pick_mask, *mistake) for mistake in PICK_MISTAKES),
]


@pytest.mark.parametrize("check, right, replacements, hint", MISTAKES)
def test_each_mistake_gets_its_hint(check, right, replacements, hint, capsys):
    assert check(changed(right, *replacements)) is False
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize("name, path", [("helps_most", "PCNET"), ("weakest_way", "ITERPRIME")])
def test_a_result_that_is_missing(name, path, capsys):
    check, answer = RIGHT[name]
    getattr(exercises, path).unlink()
    assert check(answer) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be compared with what was measured: there is no result" in line


def test_numbers_of_numpy_are_numbers():
    assert exercises.check_pick_mask(lambda *a: np.int64(pick_mask(*a)))
    assert exercises.check_pick_mask(lambda *a: np.array(pick_mask(*a)))


def test_draws_share_no_image():
    practice, exam = (set(range(400)[draw]) for draw in exercises.DRAWS.values())
    assert len(practice) == len(exam) == 8 and not practice & exam


def test_made_up_answers_have_a_part_that_is_trusted_most():
    masks, trusted, _, truth = asked(0)
    assert iou(masks[trusted.argmax()], truth) < 0.5
