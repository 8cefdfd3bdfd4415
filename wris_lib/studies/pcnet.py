"""PCNet's studies: components, stages, modulation, other sentences, on ToyRefg val (Tables 3 to 6 of the paper)."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from wris_lib import data, evaluate, questions
from wris_lib.backbones.checkpoints import checkpoint_path, get_stack
from wris_lib.backbones.clip import load_clip
from wris_lib.backbones.feature_store import open_features
from wris_lib.backbones.features import image_files, sam_embeddings
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.llm import load_llm
from wris_lib.backbones.sam import SamImage, load_sam
from wris_lib.data.refer import EvaluationItem
from wris_lib.evaluate import Record
from wris_lib.files import cache_dir, sha256, write_json
from wris_lib.methods import pcnet
from wris_lib.methods.pcnet import PcNet
from wris_lib.methods.pcnet.crm import MODULATIONS, Crm, CrmConfig
from wris_lib.methods.pcnet.run import configure, load_data, train
from wris_lib.methods.pcnet.training import Training
from wris_lib.methods.pcnet.vision import see_all
from wris_lib.report import RESULTS
from wris_lib.sources import sources
from wris_lib.studies.common import LIMIT, SEEDS, do_all, over_seeds, write

LONG, SHORT = "toyrefg:val", "toyref:val"
NO_RAS, NO_IAD, PAPERS_WEIGHT = {"region_shrinking": 0.0}, {"disambiguation": 0.0}, 1.0
ALONE = NO_RAS | NO_IAD
BASELINE, ALL = "L_cls (TRIS)", "all"
# Row -> what differs from the usual: (of the module, of the training).
COMPONENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    BASELINE: ({"stages": 0}, ALONE),
    "+CRM": ({}, ALONE),
    "+CRM+RaS": ({}, NO_IAD),
    "+CRM+IaD": ({}, NO_RAS),
    ALL: ({}, {}),
}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"N = {n}": ({"stages": n}, {}) for n in (1, 2, 3, 4)},
    **{modulation: ({"modulation": modulation}, {}) for modulation in MODULATIONS},
    **{f"N_d = {n}": ({}, {"others": n}) for n in (1, 2, 3)},
    "RaS as written": ({}, NO_IAD | {"as_written": True}),
    "IaD of peaks": ({}, NO_RAS | {"as_written": True}),
    "weights of 1": ({}, {"region_shrinking": PAPERS_WEIGHT, "disambiguation": PAPERS_WEIGHT}),
}
CODE = [sha256(path) for path in sources(pcnet.__file__, pcnet.run.__file__, questions.__file__)]


@dataclass(frozen=True)
class Run:
    """One training, and the splits that it is measured on."""

    config: CrmConfig
    training: Training
    splits: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Named after all that the run depends on."""
        stack = get_stack("toy")
        weights = [sha256(checkpoint_path(part)) for part in (stack.clip, stack.sam, stack.llm, stack.parser)]
        about = [asdict(self.config), asdict(self.training), weights, CODE, LIMIT]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        return cache_dir() / "train" / "pcnet-studies" / f"{self.training.seed}-{digest}"

    def records(self, split: str) -> Path:
        """The file with what was measured: for each kind of mask one record an expression."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9+]', '_', split)}.json"

    @property
    def finished(self) -> bool:
        return all(self.records(split).exists() for split in self.splits)


class Runner:
    """Does runs with the toy stack's models and data."""

    def __init__(self) -> None:
        self.clip, self.segmenter = load_clip("toy"), load_sam("toy")
        self.llm, self.parser = load_llm("toy"), load_parser("toy")

    @cached_property
    def data(self):
        return load_data("toy")

    def do(self, run: Run) -> None:
        """Train, and measure on every split; what is there already is not done again."""
        crm = Crm(run.config)
        train(crm, self.data, run.training, run.folder)
        for split in run.splits:
            if not run.records(split).exists():
                write_json(run.records(split), self.measure(crm, split))

    def measure(self, crm: Crm, split: str) -> dict[str, list[Record]]:
        """For SAM's mask ("sam") and for the response map above 0.5 ("map") a record of each expression.

        What CLIP and SAM see of the images comes from the cache.
        """
        method = PcNet(self.clip, self.segmenter, crm, self.llm, self.parser)
        items = data.load(split).items
        paths = list(dict.fromkeys(item.image_path for item in items))
        images = image_files(paths)
        visual, embeddings = see_all(self.clip, images), open_features(sam_embeddings(self.segmenter), images)
        side = round(visual.shape[1] ** 0.5)
        place = {path: row for row, path in enumerate(paths)}
        of_maps = []

        def predict(image: Image.Image, asked: list[EvaluationItem]):
            row = place[asked[0].image_path]
            kept = embeddings[[row]]
            sizes = (tuple(kept[name][0].tolist()) for name in ("original_size", "input_size"))
            embedded = SamImage(kept["embedding"].float(), *sizes)
            answers = method.answer(visual[[row]].float(), (side, side), embedded, [item.expression for item in asked])
            for item, answer in zip(asked, answers, strict=True):
                of_map = evaluate.score(answer.response_map > 0.5, item.mask, (), answer.response_map)
                about = {"image": item.image_id, "expression": item.expression, "kind": item.kind}
                of_maps.append(about | {"twins": item.twins} | of_map)
            return [(answer.mask, answer.response_map) for answer in answers]

        return {"sam": questions.measure(predict, items, LIMIT), "map": of_maps}


def ablation(steps: int | None = None, seeds: Sequence[int] = SEEDS, folder: Path = RESULTS) -> None:
    """Components on ToyRefg and ToyRef val; stages, modulation, N_d and the paper's losses on ToyRefg val.

    Writes `pcnet_ablation.json`.

    Args:
        steps: of a training; None: the usual number.
        seeds: of the trainings.
        folder: where the result goes.
    """
    clip = load_clip("toy")
    usual = Training() if steps is None else Training(steps=steps)
    runs: dict[tuple[str, int], Run] = {}
    for name, (module, training) in (COMPONENTS | OTHERS).items():
        for seed in seeds:
            settings = replace(usual, seed=seed, **training)
            splits = (LONG, SHORT) if name in COMPONENTS else (LONG,)
            runs[name, seed] = Run(configure(clip, **module), settings, splits)
    do_all(sorted(runs.values(), key=lambda run: run.training.seed), lambda: Runner().do)
    rows = [
        _row(name, split, [json.loads(runs[name, seed].records(split).read_text()) for seed in seeds])
        for split in (LONG, SHORT)
        for name in COMPONENTS | OTHERS
        if split in runs[name, seeds[0]].splits
    ]
    path = folder / "pcnet_ablation.json"
    write(path, "train pcnet --ablation", seeds, rows, steps=usual.steps, weight=round(usual.disambiguation, 4))


def _row(name: str, split: str, seeds: Sequence[dict[str, list[Record]]]) -> dict[str, Any]:
    """PointM, mIoU of the response map ("mIoU") and of SAM's mask at its peak ("SAM mIoU"), over seeds."""
    by_map, by_sam = ([records[mask] for records in seeds] for mask in ("map", "sam"))

    def metrics(maps: Sequence[list[Record]], masks: Sequence[list[Record]]) -> dict[str, Any]:
        of_maps, of_masks = over_seeds(maps), over_seeds(masks)
        return {"PointM": of_maps["PointM"], "mIoU": of_maps["mIoU"], "SAM mIoU": of_masks["mIoU"]}

    groups = [[evaluate.groups(records) for records in each] for each in (by_map, by_sam)]
    kinds = {
        kind: {"n": len(some), "metrics": metrics(*([group[kind] for group in each] for each in groups))}
        for kind, some in groups[0][0].items()
    }
    return {"name": name, "data": split, "n": len(by_map[0]), "metrics": metrics(by_map, by_sam), "kinds": kinds}
