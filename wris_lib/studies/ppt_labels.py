"""How right PPT's labels are: its pseudo-labels, and what `Select` makes of them round by round.

Diagnoses: true masks are looked at here, and never in training.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from wris_lib import data, evaluate
from wris_lib.backbones.clip import load_clip
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.sam import load_sam
from wris_lib.data import toyworld
from wris_lib.data.images import load_image
from wris_lib.data.objects import ObjectImages
from wris_lib.methods import load_method
from wris_lib.methods.clip_sam import ClipSam
from wris_lib.methods.ppt import datasets, pseudo
from wris_lib.methods.ppt.curriculum import CURRICULA, mask_ious, select
from wris_lib.methods.ppt.labels import UNKNOWN, LabelledExpressions, shrink
from wris_lib.methods.ppt.run import TOY_DATA
from wris_lib.report import RESULTS
from wris_lib.studies.common import SEEDS, do_all, join, mean_and_std, write
from wris_lib.studies.ppt import ROWS, Runner, ablation_runs, h_alone, recipe_of

PAPERS_WAY = 200  # images whose candidates are also made as in the paper
RIGHT = "IoU at least 0.5"


def pseudo_labels(folder: Path = RESULTS) -> None:
    """How good the toy stack's pseudo-labels are. Writes `ppt_pseudolabels.json`."""
    clip, segmenter = load_clip("toy"), load_sam("toy")
    objects = ObjectImages(toyworld.ensure() / "images" / "toyobjects" / "train").items
    truth = {item.image_path: item for item in data.load("toyobjects:train").items}
    ious = []
    for picture in datasets.object_pictures("toy", clip, segmenter, objects):
        mask = Image.fromarray(truth[objects[picture.number].image_path].mask)
        sized = mask.resize(picture.mask.shape[::-1], Image.Resampling.NEAREST)
        ious.append(evaluate.iou(picture.mask, np.array(sized)))
    rows = [_quality("D_sem, D_ref: objects of the pictures", ious)]

    scenes = datasets.candidates("toy", clip, segmenter, data.load_training(TOY_DATA).items)
    h, items = scenes.labels, data.load(TOY_DATA).items
    of_candidates = candidate_ious(h, ((item.image_path, item.expression, item.mask) for item in items))
    shipped = load_method("ppt", stack="toy").generator
    of_ref = np.flatnonzero(h.referent == UNKNOWN)
    selected = select(shipped, segmenter, h_alone(clip, segmenter, shipped.config, scenes), of_ref)
    choice = dict(zip(of_ref.tolist(), selected.tolist(), strict=True))
    found: dict[str, list[float]] = {}
    for e, every in enumerate(of_candidates):
        if choice.get(e, UNKNOWN) != UNKNOWN:
            found.setdefault("H_ref: Select, by the shipped generator", []).append(every[choice[e]])
        name = "H_ref" if h.referent[e] == UNKNOWN else "H_sem"
        found.setdefault(f"{name}: CLIP's choice", []).append(every[0])
        found.setdefault(f"{name}: best candidate", []).append(every.max())
    # The paper's way, for comparison: of each noun phrase CLIP + SAM's one answer.
    method, parser = ClipSam(clip, segmenter), load_parser("toy")
    paths = list(dict.fromkeys(item.image_path for item in items))
    for path in paths[:: max(1, len(paths) // PAPERS_WAY)]:
        of_image = [item for item in items if item.image_path == path]
        named = [pseudo.things(parse) for parse in parser.parse([item.expression for item in of_image])]
        phrases = list(dict.fromkeys(phrase for some in named for phrase in some))
        answers = method.predict(load_image(path), phrases)
        masks = {phrase: shrink(answer.mask, h.side) for phrase, answer in zip(phrases, answers, strict=True)}
        for item, some in zip(of_image, named, strict=True):
            best = mask_ious(shrink(item.mask, h.side), np.stack([masks[phrase] for phrase in some])).max()
            name = "the answer to the only noun phrase" if len(some) == 1 else "the best answer to a noun phrase"
            found.setdefault(f"paper's way: {name}", []).append(best)
    rows += [_quality(name, ious) for name, ious in sorted(found.items())]
    write(folder / "ppt_pseudolabels.json", "train ppt --pseudo-labels", [0], rows)


def selections(steps: int | None = None, seeds: Sequence[int] = SEEDS, folder: Path = RESULTS) -> None:
    """How right the labels of H_ref were in each round of the ablation's trainings, of the expressions that got one.

    Writes `ppt_select.json`; other seeds that are in it already stay, see `join`.

    Args:
        steps: of a training, as for `ablation`; trainings that are not there yet are done first.
        seeds: of the trainings.
        folder: where the result goes.
    """
    runs = ablation_runs(steps, seeds)
    do_all(sorted(runs.values(), key=lambda run: run.training.seed), lambda: Runner().do)
    h = datasets.candidates("toy", load_clip("toy"), load_sam("toy"), data.load_training(TOY_DATA).items).labels
    of_ref = np.flatnonzero(h.referent == UNKNOWN)
    items = data.load(TOY_DATA).items
    ious = candidate_ious(h, ((item.image_path, item.expression, item.mask) for item in items))
    fixed = {"CLIP's choice": [ious[e][0] for e in of_ref], "best candidate": [ious[e].max() for e in of_ref]}
    rows = [_of_seeds(name, len(of_ref), [_share_right(found)] * len(seeds)) for name, found in fixed.items()]
    names = {curriculum: name for name, (curriculum, stage) in ROWS.items() if stage == 3}
    for curriculum, name in names.items():
        for number, this in enumerate(CURRICULA[curriculum], 1):
            if number > 1 and "H_ref" in this.datasets:  # in the first round it is CLIP's choice
                files = [runs[curriculum, seed].folder / f"round {number}" / "referents.npy" for seed in seeds]
                right = [_share_right(_chosen(ious, of_ref, np.load(file))) for file in files]
                rows.append(_of_seeds(f"{name}, round {number}", len(of_ref), right))
    path, recipe = folder / "ppt_select.json", recipe_of(runs.values())
    every, rows = join(path, recipe, seeds, rows)
    steps = next(iter(runs.values())).training.steps
    write(path, "train ppt --selections", every, rows, steps=steps, recipe=recipe)


def candidate_ious(
    h: LabelledExpressions, truth: Iterable[tuple[Path, str, Bool[np.ndarray, "H W"]]]
) -> list[Float[np.ndarray, " _"]]:
    """IoU of every candidate of every expression with the truth.

    Args:
        h: whose images are numbered in the order in which `truth` has them.
        truth: image, expression and true mask; of all expressions of `h`.
    """
    masks = {(path, expression): shrink(mask, h.side) for path, expression, mask in truth}
    paths = list(dict.fromkeys(path for path, _ in masks))
    about = enumerate(zip(h.image, h.expressions, strict=True))
    return [mask_ious(masks[paths[image], expression], h.candidates(e)) for e, (image, expression) in about]


def _chosen(
    ious: Sequence[Float[np.ndarray, " _"]], expressions: Int[np.ndarray, " n"], choice: Int[np.ndarray, " n"]
) -> list[float]:
    """IoU of each choice, where there is one."""
    return [ious[e][c] for e, c in zip(expressions, choice, strict=True) if c != UNKNOWN]


def _share_right(ious: Sequence[float]) -> float:
    """How many reach 0.5, in percent."""
    return round(100 * float(np.mean(np.asarray(ious) >= 0.5)), 2)


def _of_seeds(name: str, n: int, values: list[float]) -> dict[str, Any]:
    return {"name": name, "data": TOY_DATA, "n": n, "metrics": {RIGHT: mean_and_std(values)}, "kinds": {}}


def _quality(name: str, ious: Sequence[float]) -> dict[str, Any]:
    """A row: mean IoU, and how many of the masks reach 0.5, in percent."""
    metrics = {"mIoU": round(100 * float(np.mean(ious)), 2), RIGHT: _share_right(ious)}
    return {"name": name, "n": len(ious), "metrics": metrics}
