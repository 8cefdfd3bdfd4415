"""PPT's studies: the paper's Table 3, choices of sizes, and what the cache saves."""

import copy
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wris_lib import benchmark, data, questions
from wris_lib.ablation_figure import FULL
from wris_lib.backbones.checkpoints import checkpoint_path, get_stack
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.feature_store import Encoder, FeatureStore, JoinedStores, Rows, open_features
from wris_lib.backbones.features import clip_words, sam_embeddings, texts
from wris_lib.backbones.sam import Segmenter, load_sam
from wris_lib.contestants import predictor
from wris_lib.files import cache_dir, sha256, write_json
from wris_lib.methods import ppt
from wris_lib.methods.ppt import Ppt, datasets
from wris_lib.methods.ppt.config import GeneratorConfig, configure
from wris_lib.methods.ppt.curriculum import CURRICULA, Training, train
from wris_lib.methods.ppt.labels import UNKNOWN
from wris_lib.methods.ppt.loss import LossWeights
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.pseudo import LabelledImages
from wris_lib.methods.ppt.run import TOY_DATA, load_data
from wris_lib.methods.ppt.training import H_REF, H_SEM, Batches, TrainingData, start, training_loss
from wris_lib.methods.ppt.vision import visual_encoder
from wris_lib.report import RESULTS
from wris_lib.sources import sources
from wris_lib.studies.common import LIMIT, SEEDS, do_all, join, row, write
from wris_lib.train import move

STEPS = 6000  # of a training: half of what the shipped weights had, for there are many
BASELINE = "1 CLIP + SAM"
OTHER_SPLITS = ("toyref+:val", "toyrefg:val")
# Row -> curriculum, and the last stage that counts. Rows 3 and 4 are row 5 before its end.
ROWS = {
    "2 point prompting": ("plain", 3),
    "3 semantic learning": ("full", 1),
    "4 + RIS learning": ("full", 2),
    FULL: ("full", 3),
    "6 w/o curriculum": ("no curriculum", 3),
    "7 w/o augmented (D_ref)": ("no D_ref", 3),
    "8 w/o free (D_sem)": ("no D_sem", 3),
    "9 w/o IMG": ("no images", 3),
}
STUDIED = {
    "default: K = 16, M = 16, thresholded labels": {},
    "K = 9": {"config": {"queries": 9}},  # with 4 none would be left over: as many candidates are drawn
    "K = 36": {"config": {"queries": 36}},
    "K = 16 free queries": {"config": {"anchored": False}},
    "M = 4": {"config": {"points": 4}},
    "M = 9": {"config": {"points": 9}},
    "mask loss weighs 1": {"training": {"weights": LossWeights(dice=1.0, mask=1.0)}},
    "mask loss weighs 1, soft labels": {"training": {"weights": LossWeights(dice=1.0, mask=1.0), "blend": True}},
    "points weigh 2": {"training": {"weights": LossWeights(points=2.0)}},
    "score weighs 1": {"training": {"weights": LossWeights(score=1.0)}},
}


# As it was when this process began: two processes that share the work must agree.
CODE = [sha256(path) for path in sources(ppt.__file__, ppt.run.__file__, questions.__file__)]


@dataclass(frozen=True)
class Run:
    """One training: a curriculum, sizes, settings, a seed."""

    curriculum: str
    config: GeneratorConfig
    training: Training
    stages: dict[int, tuple[str, ...]]  # to be measured behind them: stage -> splits

    @property
    def folder(self) -> Path:
        """Named after all that the run depends on."""
        stack = get_stack("toy")
        weights = [sha256(checkpoint_path(part)) for part in (stack.clip, stack.sam, stack.parser)]
        about = [asdict(self.config), asdict(self.training), [asdict(r) for r in CURRICULA[self.curriculum]]]
        digest = hashlib.sha256(json.dumps([*about, weights, CODE, LIMIT]).encode()).hexdigest()[:8]
        name = re.sub(r"\W+", "_", self.curriculum)
        return cache_dir() / "train" / "ppt-studies" / f"{name}-{self.training.seed}-{digest}"

    def records(self, stage: int, split: str) -> Path:
        """The file with what was measured behind a stage."""
        return self.folder / f"stage{stage}-{re.sub(r'[^A-Za-z0-9+]', '_', split)}.json"

    @property
    def finished(self) -> bool:
        return all(self.records(stage, split).exists() for stage, splits in self.stages.items() for split in splits)


class Runner:
    """Does runs with the toy stack's models and data."""

    def __init__(self) -> None:
        self.clip, self.segmenter = load_clip("toy"), load_sam("toy")
        self.data = load_data("toy", self.clip)

    def do(self, run: Run) -> None:
        """Train, and measure behind every stage that is asked for; what is there already is not done again."""
        generator = start(run.config, run.training.seed, self.data)
        rounds = CURRICULA[run.curriculum]
        steps = train(generator, self.segmenter, self.data, rounds, run.training, run.folder, self.segmenter.device)
        for number, done in enumerate(steps):
            ends_stage = number + 1 == len(rounds) or rounds[number + 1].stage > done.round.stage
            stage = 3 if number + 1 == len(rounds) else done.round.stage
            if ends_stage:
                for split in run.stages.get(stage, ()):
                    path = run.records(stage, split)
                    if not path.exists():
                        method = Ppt(self.clip, self.segmenter, copy.deepcopy(generator))
                        write_json(path, questions.measure(predictor(method), data.load(split).items, LIMIT))


def ablation(steps: int | None = None, seeds: Sequence[int] = SEEDS, folder: Path = RESULTS) -> None:
    """The nine rows of PPT's Table 3 on ToyRef val, rows 1 and 5 also on ToyRef+ and ToyRefg.

    Writes `ppt_ablation.json`; other seeds that are in it already stay, see `join`.

    Args:
        steps: of a training; None: `STEPS`.
        seeds: of the trainings.
        folder: where the result goes.
    """
    runs = ablation_runs(steps, seeds)
    do_all(sorted(runs.values(), key=lambda run: run.training.seed), lambda: Runner().do)
    baseline = [
        row(BASELINE, split, [benchmark.records("clip_sam surgery", split, LIMIT, stack="toy")])
        for split in ("toyref:val", *OTHER_SPLITS)
    ]
    rows = []
    for name, (curriculum, stage) in ROWS.items():
        for split in runs[curriculum, seeds[0]].stages[stage]:
            every = [json.loads(runs[curriculum, seed].records(stage, split).read_text()) for seed in seeds]
            rows.append(row(name, split, every))
    path, recipe, steps = folder / "ppt_ablation.json", recipe_of(runs.values()), _training(steps, 0).steps
    seeds, rows = join(path, recipe, seeds, rows)
    write(path, "train ppt --ablation", seeds, baseline + rows, steps=steps, recipe=recipe)


def ablation_runs(steps: int | None, seeds: Sequence[int]) -> dict[tuple[str, int], Run]:
    """The ablation's trainings: (curriculum, seed) -> run. Several rows may be stages of one."""
    config = configure(load_clip("toy"))
    wanted: dict[tuple[str, int], dict[int, tuple[str, ...]]] = {}
    for name, (curriculum, stage) in ROWS.items():
        for seed in seeds:
            splits = ("toyref:val", *OTHER_SPLITS) if name == FULL else ("toyref:val",)
            wanted.setdefault((curriculum, seed), {})[stage] = splits
    return {key: Run(key[0], config, _training(steps, key[1]), stages) for key, stages in wanted.items()}


def study(steps: int | None = None, seeds: Sequence[int] = SEEDS, folder: Path = RESULTS) -> None:
    """K, M, labels and weights of the loss, one changed at a time, on ToyRef val. Writes `ppt_study.json`, as
    `ablation` does."""
    clip = load_clip("toy")
    runs = {
        (name, seed): Run(
            "full",
            configure(clip, **change.get("config", {})),
            replace(_training(steps, seed), **change.get("training", {})),
            {3: ("toyref:val",)},
        )
        for name, change in STUDIED.items()
        for seed in seeds
    }
    do_all(sorted(runs.values(), key=lambda run: run.training.seed), lambda: Runner().do)
    rows = [
        row(name, "toyref:val", [json.loads(runs[name, s].records(3, "toyref:val").read_text()) for s in seeds])
        for name in STUDIED
    ]
    path, recipe, steps = folder / "ppt_study.json", recipe_of(runs.values()), _training(steps, 0).steps
    seeds, rows = join(path, recipe, seeds, rows)
    write(path, "train ppt --study", seeds, rows, steps=steps, recipe=recipe)


def recipe_of(runs: Iterable[Run]) -> list[str]:
    """What a study's figures depend on besides the seed: the names that its runs would have with seed 0."""
    return sorted({replace(run, training=replace(run.training, seed=0)).folder.name for run in runs})


def _training(steps: int | None, seed: int) -> Training:
    return Training(steps=steps or STEPS, seed=seed)


class _Live(FeatureStore):
    """In place of a `FeatureStore`: whatever is asked for is computed anew."""

    def __init__(self, encoder: Encoder, rows: Rows) -> None:
        self.encoder, self.rows = encoder, rows

    def __len__(self) -> int:
        return len(self.rows.keys)

    def __getitem__(self, rows: np.ndarray) -> dict[str, Tensor]:
        encoded = self.encoder.encode([self.rows.load(int(row)) for row in rows])
        found = {}
        for name, values in encoded.items():
            if isinstance(values, list):
                found[f"{name} mask"] = pad_sequence([torch.ones(len(v), dtype=torch.bool) for v in values], True)
                values = pad_sequence(values, batch_first=True)
            found[name] = values
        return {name: values.cpu() for name, values in found.items()}


def h_alone(
    clip: Clip,
    segmenter: Segmenter,
    config: GeneratorConfig,
    h: LabelledImages,
    make: Callable[[Encoder, Rows], FeatureStore] = open_features,
) -> TrainingData:
    """H as training data without the other datasets; `make` says where its features come from."""
    unique, word = np.unique(h.labels.expressions, return_inverse=True)
    return TrainingData(
        h.labels,
        np.where(h.labels.referent == UNKNOWN, H_REF, H_SEM),
        JoinedStores([make(visual_encoder(clip, config), h.images)]),
        JoinedStores([make(sam_embeddings(segmenter), h.images)]),
        make(clip_words(clip), texts(unique.tolist())),
        word,
        clip.text_features([""])[0].cpu(),
    )


def cache_speed(steps: int = 10, folder: Path = RESULTS) -> None:
    """Seconds an epoch of H with features from the cache and with features computed anew. Writes `ppt_cache.json`.

    All are measured in one run, first the cache, and scaled to an epoch: every expression once. Our batches gather the
    expressions of an image, so that even without a cache it is encoded once for all of them. The paper's do not: its
    batches of single expressions are the last kind.

    Args:
        steps: of each kind.
        folder: where the result goes.
    """
    clip, segmenter = load_clip("toy"), load_sam("toy")
    config, h = configure(clip), datasets.candidates("toy", clip, segmenter, data.load_training(TOY_DATA).items)
    count = len(h.labels)
    seconds, generator = {}, None
    for kind in ("cached", "computed anew", "computed anew for each expression"):
        encoded = h_alone(clip, segmenter, config, h, open_features if kind == "cached" else _Live)
        encoded = encoded.with_referents(np.zeros(count, dtype=int))  # any: an epoch is to be as long as all of H
        generator = generator or start(config, 0, encoded)
        one_an_image = np.unique(h.labels.image, return_index=True)[1]
        chosen = one_an_image if kind.endswith("each expression") else np.arange(count)
        seconds[kind] = _seconds_an_expression(encoded, chosen, generator, segmenter, steps)
    results = [
        {
            "name": kind,
            "metrics": {"ms an expression": round(1000 * each, 2), "seconds an epoch": round(each * count, 1)},
        }
        for kind, each in seconds.items()
    ]
    ratios = {kind: round(each / seconds["cached"], 1) for kind, each in seconds.items()}
    write(folder / "ppt_cache.json", "train ppt --cache-speed", [0], results, ratios=ratios)


def _seconds_an_expression(
    encoded: TrainingData,
    expressions: Int[np.ndarray, " n"],
    generator: PointGenerator,
    segmenter: Segmenter,
    steps: int,
) -> float:
    """Of a step of training with some of the expressions; the median of some steps."""
    training, found = Training(), []
    loss = training_loss(segmenter, training.weights, training.blend)
    batches = Batches(encoded, expressions, generator.config.points, 0)
    generator.to(segmenter.device)
    for step in range(-1, steps):  # the first only warms up
        begin = time.perf_counter()
        batch = move(batches(step + 1), segmenter.device)
        with torch.autocast(segmenter.device.type, torch.bfloat16):
            terms = loss(generator, batch, step)
        terms["loss"].backward()
        generator.zero_grad()
        if segmenter.device.type == "cuda":
            torch.cuda.synchronize()
        if step >= 0:
            found.append((time.perf_counter() - begin) / len(batch["inputs"]["words"]))
    return float(np.median(found))
