"""Checks of what no formula decides, in the form of `wris_lib.exercises`: predictions, which are compared with what was
measured; inputs on which a rule or a model goes wrong, which are given to it; and rules that shall do better than one
of ours, which are measured on a draw. Models and pictures are the toy stack's, whatever the stack of the notebook is.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from wris_lib import evaluate
from wris_lib.ablation_figure import read_rows
from wris_lib.backbones.language import Parser, load_parser
from wris_lib.backbones.llm import Llm, load_llm
from wris_lib.checking import Answer, Wrong, array_of, call, exercise, short
from wris_lib.data import load
from wris_lib.data.images import load_image
from wris_lib.errors import WrisError
from wris_lib.exercises_sam import choices
from wris_lib.methods import load_method
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS
from wris_lib.methods.iterprime.selection import choose as choose_proposal
from wris_lib.methods.pcnet.decompose import PARSER, decompose
from wris_lib.report import RESULTS

PCNET, ITERPRIME = RESULTS / "pcnet_ablation.json", RESULTS / "iterprime_ablation.json"
# What each piece is added to, and what comes of it.
PIECES = {"CRM": ("L_cls (TRIS)", "+CRM"), "RaS": ("+CRM", "+CRM+RaS"), "IaD": ("+CRM", "+CRM+IaD")}
MOST_WORDS = 15
DRAWS = {"practice": slice(20, None, 50), "exam": slice(45, None, 50)}  # of the images of ToyRefg val

# SAM's masks bool [K, H, W] at a point, how far it trusts each, the map [H, W] with that point, and the true mask.
Asked = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@exercise("helps_most")
def check_helps_most(answer: Answer) -> None:
    """`helps_most() -> str`: "CRM", "RaS" or "IaD", which raises PointM on ToyRefg val most when it is added.

    CRM is added to L_cls, the two losses to L_cls with CRM. What was measured decides, in the mean of its seeds.
    """
    got = _one_of(answer, tuple(PIECES), "a single piece, as one of these texts")
    rows = _measured(got, PCNET, "toyrefg:val")
    point = {name: row["metrics"]["PointM"]["mean"] for name, row in rows.items()}
    gains = {piece: point[after] - point[before] for piece, (before, after) in PIECES.items()}
    most = max(gains.values())
    if gains[got] < most:
        hints = {
            "RaS": "as section 5 says, a map that reads cue after cue leaves the loss hardly anything to punish",
            "IaD": "it moves two answers apart, but a long sentence has to be understood at all before that",
        }
        complaint = f"{got} brings {gains[got]:.1f} points of PointM, and another piece {most:.1f}"
        raise Wrong(complaint, hints.get(got, "look at section 7, and say what you had not thought of"))


@exercise("weakest_way")
def check_weakest_way(answer: Answer) -> None:
    """`weakest_way() -> str`: which way to make one map of all has the lowest mIoU, in the mean of both splits.

    One of `AGGREGATIONS`; what was measured on ToyRef testA and ToyRefg test decides.
    """
    got = _one_of(answer, AGGREGATIONS, "the name of a way")
    splits = [_measured(got, ITERPRIME, split) for split in ("toyref:testA", "toyrefg:test")]
    scores = {way: float(np.mean([rows[way]["metrics"]["mIoU"]["mean"] for rows in splits])) for way in AGGREGATIONS}
    least = min(scores.values())
    if scores[got] > least:
        hints = {
            "mean": "it is the paper's last; here a mean also hears the words that point better than the primary one",
            "gvlp": "it hears the context, which section 3 has found to point better than the primary word",
            "pwem": "it is a mean of three maps, and better than the worst of them",
        }
        complaint = f"{got} has an mIoU of {scores[got]:.1f}, and another way {least:.1f}"
        raise Wrong(complaint, hints.get(got, "it hears the primary word, but not only what the others do not look at"))


def _one_of(answer: Answer, texts: tuple[str, ...], what: str) -> str:
    """The learner's choice, if it is one."""
    got = call(answer, "without arguments")
    if not (isinstance(got, str) and got in texts):
        raise Wrong(f"got {short(got)}, expected {what}: {', '.join(map(repr, texts))}")
    return got


def _measured(got: str, path: Path, split: str) -> dict[str, dict[str, Any]]:
    """A result's rows of a split by their names, to be compared with an answer."""
    try:
        return read_rows(path, split)
    except WrisError as error:
        raise Wrong(f"{got} cannot be compared with what was measured: {str(error).rstrip('.')}") from None


@exercise("invent_cue")
def check_invent_cue(answer: Answer) -> None:
    """`invent_cue() -> str`: a sentence for which a cue about something else gets past the reader of answers.

    At most `MOST_WORDS` words of letters. The course's language model is asked, its answer is read as `decompose` reads
    it, and one of the cues must have a noun that the sentence has not.
    """
    got = call(answer, "without arguments")
    if not isinstance(got, str):
        raise Wrong(f"got {short(got)}, expected a sentence, a text")
    words = re.findall(r"[a-z]+", got.lower())
    if not re.fullmatch(r"[A-Za-z]+( [A-Za-z]+)*", got) or len(words) > MOST_WORDS:
        raise Wrong(f"got {short(got)}, expected a sentence of at most {MOST_WORDS} words, letters and single spaces")
    llm, parser = _readers()
    (cues,) = decompose([got], llm, parser)
    phrases = list(dict.fromkeys(cues.phrases))
    if cues.source == PARSER:
        hint = "an answer gets through if any of its words but fillers is in the sentence, and that need not be a noun"
        raise Wrong(f"for {got!r}, what the model said was thrown away, and the parser's cues are {phrases}", hint)
    nouns = {word.text.lower() for parse in parser.parse(phrases) for word in parse.words if word.upos == "NOUN"}
    if all(_has(words, noun) for noun in nouns):
        hint = "their nouns are the sentence's own; the model knows the toy world's things only, so speak of others"
        raise Wrong(f"for {got!r}, the cues are {phrases}", hint)


@lru_cache
def _readers() -> tuple[Llm, Parser]:
    return load_llm("toy"), load_parser("toy")


def _has(words: list[str], noun: str) -> bool:
    """Whether one of the words is the noun, be it in the plural."""
    return noun.rstrip("s") in [word.rstrip("s") for word in words]


@exercise("mislead_choice")
def check_mislead_choice(answer: Answer) -> None:
    """`mislead_choice() -> (H, masks)`: a map that is right everywhere, and proposals of which a wrong one is chosen.

    `masks` bool [P, h, w], none empty; the first is the referent. `H` float [h, w] is at least 0.5 and at most 1 in it,
    and 0 elsewhere. The proposal that `iterprime.selection.choose` takes has an IoU of less than 0.5 with the referent.
    """
    response, masks = _map_and_masks(call(answer, "without arguments"))
    referent = masks[0]
    if outside := np.count_nonzero(response[~referent]):
        raise Wrong(f"H is not 0 at {outside} pixels outside the referent, masks[0]", "a map cannot be blamed then")
    if response[referent].min() < 0.5 or response.max() > 1:
        low, high = response[referent].min(), response.max()
        raise Wrong(f"in the referent H goes from {low:.2f} to {high:.2f}, expected values from 0.5 to 1")
    choice = choose_proposal(response, masks)
    scores = ", ".join(f"{score:.2f}" for score in choice.scores)
    iou = evaluate.iou(masks[choice.index], referent)
    if iou >= 0.5:
        case = f"masks[{choice.index}] is chosen, with an IoU of {iou:.2f} with the referent; the scores are {scores}"
        hint = "a smaller piece that holds a peak would be wrong"
        if len(masks) == 1:
            hint = "there is nothing else to choose"
        elif choice.index == 0 and response[referent].max() == response[referent].min():
            hint = "where H is the same all over the referent, no piece of it has a higher mean"
        elif choice.index == 0:
            hint = "the score is 1 plus the mean of H in a proposal; give it one in which that mean is higher"
        raise Wrong(case, hint)


def _map_and_masks(result: Any) -> tuple[Float[np.ndarray, "h w"], Bool[np.ndarray, "P h w"]]:
    """The learner's map and proposals, if that is what they are."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Wrong(f"got {short(result)}, expected two things", "`return H, masks`")
    complaint = f"got {short(list(result))}, expected arrays: H [h, w] and masks [P, h, w]"
    response, masks = array_of(result[0], complaint), array_of(result[1], complaint, None)
    if response.ndim != 2 or masks.ndim != 3 or masks.shape[1:] != response.shape or not masks.size:
        complaint = f"got H of shape {response.shape} and masks of shape {masks.shape}, expected (h, w) and (P, h, w)"
        raise Wrong(complaint, "both are of one size, and np.stack puts masks into one array")
    if masks.dtype != bool:
        raise Wrong(f"got masks of {masks.dtype}, expected True and False", "np.zeros((2, 16, 16), bool) makes some")
    if not masks.any(axis=(1, 2)).all():
        raise Wrong("one of the masks is empty, expected at least a pixel in each")
    return response, masks


@exercise("pick_mask")
def check_pick_mask(answer: Answer) -> None:
    """`pick_mask(masks, trusted, response) -> int`: which of SAM's masks [K, H, W] to take.

    `trusted` [K] is how far SAM trusts each, `response` [H, W] in [0, 1] the map whose highest point it was asked with.
    On the exam's draw the answers must win at least half of the mIoU that lies between SAM's own choice, the most
    trusted, and the best choice.
    """
    _picked(answer, np.ones((3, 8, 8), bool), np.linspace(0.9, 0.3, 3), np.ones((8, 8)))  # open ones need no model
    cases = sam_answers("exam")
    picked = [_picked(answer, *given) for *given, _ in cases]
    ious = [np.array([evaluate.iou(mask, truth) for mask in masks]) for masks, _, _, truth in cases]
    own = [int(trusted.argmax()) for _, trusted, _, _ in cases]
    mine, sams, best, needed = choices(ious, picked, own)
    if mine < needed:
        case = f"on {len(cases)} other expressions the mIoU is {mine:.1f}, SAM's own choice has {sams:.1f}"
        raise Wrong(f"{case}, the best one {best:.1f}; expected at least {needed:.1f}", _picking(picked, own, cases))


def _picked(answer: Answer, *given: np.ndarray) -> int:
    """The learner's number of a mask, if it is one."""
    count = len(given[0])
    got = call(answer, f"for {count} masks", *given)
    number = got.item() if isinstance(got, np.ndarray | np.integer) and np.size(got) == 1 else got
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
        hint = "return the number of a mask, not the mask" if getattr(got, "shape", None) == given[0][0].shape else ""
        raise Wrong(f"for {count} masks, got {short(got)}, expected a number from 0 to {count - 1}", hint)
    return number


def _picking(picked: list[int], own: list[int], cases: list[Asked]) -> str:
    """What the learner probably did."""
    areas = [masks.sum(axis=(1, 2)) for masks, _, _, _ in cases]
    if picked == own:
        return "that is SAM's own choice; what SAM trusts most is often a part of the thing"
    if picked == [int(each.argmax()) for each in areas]:
        return "the largest mask is often the ground, and SAM hardly trusts it; ask for both, size and trust"
    if picked == [int(each.argmin()) for each in areas]:
        return "the smallest mask is a part; look at what SAM trusts nearly as much as its best"
    return "see how large the best mask is, and how far it is trusted, where you did not take it on the practice draw"


@lru_cache
def sam_answers(draw: str) -> list[Asked]:
    """What SAM says at the points of the toy stack's PCNet, for a few images of ToyRefg val.

    Args:
        draw: "practice" or "exam", which share no image.
    """
    by_image = {}
    for item in load("toyrefg:val").items:
        by_image.setdefault(item.image_path, []).append(item)
    pcnet, found = load_method("pcnet", stack="toy", device="cpu"), []
    for path in list(by_image)[DRAWS[draw]]:
        predictions = pcnet.predict(load_image(path), [item.expression for item in by_image[path]])
        for item, prediction in zip(by_image[path], predictions, strict=True):
            stage = prediction.trace[-1]
            found.append((stage.masks, stage.scores, prediction.response_map, item.mask))
    return found
