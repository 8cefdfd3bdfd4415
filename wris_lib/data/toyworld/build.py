"""The toy datasets, written to disk in RefCOCO's format and as an ImageNet-style folder.

Every image has a random generator of its own, seeded by dataset, split and number: images can be made in any order by
any number of processes, and the files are the same.
"""

import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from wris_lib.data.toyworld import grammar, wording
from wris_lib.data.toyworld.scenes import PARTS_PER_OBJECT, SIZE, UNSEEN, Scene, sample_object_image, sample_scene
from wris_lib.data.toyworld.sprites import drawings, supercategories
from wris_lib.errors import WrisError
from wris_lib.files import atomic_folder, atomic_write, cache_dir, write_json

VERSION = 1  # a new number whenever the same seed gives other bytes
SEED = 7
JPEG_QUALITY = 92
ABSOLUTE_POSITION = re.compile(r"\b(left|right|top|bottom|middle|center|centre|up|down)\b")


@dataclass(frozen=True)
class Dataset:
    """What one toy dataset consists of.

    Attributes:
        splits: number of images by split.
        kinds: how often each kind of expression is tried first.
        telegraphic: share of expressions typed without articles.
        positions: whether words of absolute position may occur.
        unseen: whether the categories in UNSEEN may be referents.
    """

    splits: dict[str, int]
    kinds: dict[str, float]
    telegraphic: float
    positions: bool = True
    unseen: bool = False


DATASETS = {
    "toyref": Dataset(
        {"train": 2400, "val": 400, "testA": 250, "testB": 250},
        {"noun": 0.14, "attribute": 0.20, "part": 0.22, "position": 0.32, "relation": 0.12},
        telegraphic=0.6,
    ),
    "toyref+": Dataset(
        {"train": 1600, "val": 400, "testA": 250, "testB": 250},
        {"noun": 0.12, "attribute": 0.32, "part": 0.36, "relation": 0.20},
        telegraphic=0.6,
        positions=False,
    ),
    "toyrefg": Dataset({"train": 1600, "val": 400, "test": 400}, {"long": 0.85, "relation": 0.15}, telegraphic=0.0),
    "toycut": Dataset(
        {"val": 400}, {"noun": 0.2, "attribute": 0.4, "part": 0.2, "relation": 0.2}, telegraphic=1.0, unseen=True
    ),
    "toyobjects": Dataset(
        {"train": 1600, "val": 600}, {"noun": 0.5, "attribute": 0.25, "part": 0.25}, 0.3, unseen=True
    ),
}


def ensure() -> Path:
    """The folder of the toy world in the cache; made on first use, in about a minute on two cores.

    Raises:
        WrisError: the cache cannot be written to; a script without `if __name__ == "__main__":` asks for the world.
    """
    root = cache_dir() / f"toyworld-{VERSION}"
    if not root.exists() and multiprocessing.current_process().name != "MainProcess":
        # Worker processes run a script's first lines too. Here one would wait for its parent, which waits for it.
        raise WrisError(
            "the toy world has not been made yet: run `python -m wris_lib toyworld` first, or put the script's code "
            'under `if __name__ == "__main__":`.'
        )
    with atomic_folder(root) as folder:
        if folder is not None:
            write_world(folder)
    return root


def write_world(folder: Path, scale: float = 1.0, processes: int | None = None) -> None:
    """Write all datasets into `folder`.

    Args:
        scale: share of each split's images to make, for trials.
        processes: by default one a core, at most eight.
    """
    jobs = [
        (name, split, number)
        for name, dataset in DATASETS.items()
        for split, count in dataset.splits.items()
        for number in range(max(1, round(count * scale)))
    ]
    for name, split, number in jobs:
        (folder / "images" / _file_name(name, split, number)).parent.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict]] = {name: [] for name in DATASETS}
    work = partial(_make_image, folder)
    for (name, _, _), record in zip(jobs, run_parallel(work, jobs, "toy world", processes), strict=True):
        records[name].append(record)
    for name in DATASETS:
        _write_refer(folder / name, records[name])


def run_parallel(work, jobs: list, title: str, processes: int | None = None) -> Iterator[Any]:
    """`work(job)` for every job, in order, on several processes, with a progress bar."""
    processes = processes or min(8, multiprocessing.cpu_count())
    bar = tqdm(total=len(jobs), desc=title, unit="image")
    if processes == 1:
        for job in jobs:
            yield work(job)
            bar.update()
        bar.close()
        return
    # Forking a process that has loaded torch can hang; fresh ones import only the toy world.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _follow_parent) as pool:
        try:
            # Workers start here, and inherit the mask: Ctrl-C is the parent's, also while they still import.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                results = pool.map(work, jobs, chunksize=16)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for result in results:
                yield result
                bar.update()
        except BrokenProcessPool as error:
            raise WrisError(
                f"{title}: a worker process was ended from outside, most likely for lack of memory; run it again."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()


def _follow_parent() -> None:
    """End when the parent is killed, instead of waiting for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_image(folder: Path, job: tuple[str, str, int]) -> dict:
    """Write one image and return its record: objects, and the expressions of each referent."""
    name, split, number = job
    dataset = DATASETS[name]
    file_name = _file_name(name, split, number)
    seed = [SEED, list(DATASETS).index(name), list(dataset.splits).index(split), number]
    rng = np.random.default_rng(seed)
    if name == "toyobjects":
        scene = sample_object_image(rng, _class_of(number))
        expressions = {0: _expressions(scene, 0, dataset, rng)}
    else:
        scene, expressions = _scene_with_referents(rng, name, split)
    # Encoded in memory: Pillow does not notice when a full disk takes only a part of what it writes.
    jpeg = io.BytesIO()
    Image.fromarray(scene.image).save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    (folder / "images" / file_name).write_bytes(jpeg.getvalue())
    relative = file_name.split("/", 1)[1]
    return {"file_name": relative, "split": split, "objects": _annotations(scene), "expressions": expressions}


def _file_name(name: str, split: str, number: int) -> str:
    if name == "toyobjects":
        return f"{name}/{split}/{_class_of(number)}/{number:06d}.jpg"
    return f"{name}/{split}_{number:06d}.jpg"


def _class_of(number: int) -> str:
    categories = list(drawings())
    return categories[number % len(categories)]


def _scene_with_referents(rng: np.random.Generator, name: str, split: str) -> tuple[Scene, dict[int, list]]:
    """Sample scenes until one has two referents or more, as the split wants them."""
    dataset = DATASETS[name]
    seen = tuple(c for c in drawings() if dataset.unseen or c not in UNSEEN)
    people = supercategories().get("people", ())
    allowed = {"testA": people, "testB": tuple(c for c in seen if c not in people)}.get(split, seen)
    focus = UNSEEN if dataset.unseen and rng.random() < 0.5 else allowed
    while True:
        scene = sample_scene(rng, focus)
        order = [int(i) for i in rng.permutation(len(scene.objects)) if scene.objects[i].category in allowed]
        if rng.random() < 0.6:  # as in RefCOCO, objects with a companion of their category are asked for first
            categories = [thing.category for thing in scene.objects]
            order.sort(key=lambda i: -min(2, categories.count(categories[i])))
        found: dict[int, list] = {}
        for index in order[:5]:
            expressions = _expressions(scene, index, dataset, rng)
            if len(expressions) >= 2:
                found[index] = expressions
            if len(found) == 3:
                break
        if len(found) >= 2:
            return scene, found


def _expressions(scene: Scene, index: int, dataset: Dataset, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Up to three different (expression, kind) that refer to object `index` and to no other."""
    result: dict[str, str] = {}
    kinds, weights = list(dataset.kinds), np.array(list(dataset.kinds.values()))
    for _ in range(6):
        kind = kinds[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum()))]
        phrase = grammar.describe(scene, index, kind, rng)
        if phrase is None:
            continue
        text = wording.say(phrase, rng, telegraphic=bool(rng.random() < dataset.telegraphic))
        if dataset.positions or not ABSOLUTE_POSITION.search(text):
            result.setdefault(text, kind)
        if len(result) == 3:
            break
    return list(result.items())


def _annotations(scene: Scene) -> list[dict]:
    labels = np.ascontiguousarray(scene.labels.T)  # RLE runs down the columns
    names: list[tuple[int, str | None]] = [(index, None) for index in range(len(scene.objects))]
    names += [(index, part) for index, thing in enumerate(scene.objects) for part in thing.part_areas]
    masks = np.empty((len(names), *labels.shape), np.uint8)
    owners = labels // PARTS_PER_OBJECT
    for mask, (index, part) in zip(masks, names, strict=True):
        wanted = owners == index + 1 if part is None else labels == scene.label(index, part)
        mask[:] = wanted
    encoded = coco_mask.encode(masks.transpose(2, 1, 0))
    annotations = []
    for (index, part), rle in zip(names, encoded, strict=True):
        segmentation = {"size": [SIZE, SIZE], "counts": rle["counts"].decode("ascii")}
        thing = scene.objects[index]
        if part is None:
            left, top, right, bottom = thing.box
            annotations.append(
                {
                    "category": thing.category,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": thing.area,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                    "pattern": thing.pattern,
                    "colors": {name: word for name, word in thing.colors.items() if name != "skin"},
                    "visible": round(thing.visible, 3),
                    "parts": [],
                }
            )
        else:
            annotations[index]["parts"].append({"name": part, "segmentation": segmentation})
    return annotations


def _write_refer(folder: Path, records: list[dict]) -> None:
    """instances.json and refs(toy).p, with ids counted from 1 in the order of the images."""
    category_ids = {category: i + 1 for i, category in enumerate(drawings())}
    images, annotations, refs = [], [], []
    sentence_id = 0
    for image_id, record in enumerate(records, start=1):
        images.append({"id": image_id, "file_name": record["file_name"], "height": SIZE, "width": SIZE})
        for index, thing in enumerate(record["objects"]):
            if thing["area"] == 0:
                continue  # hidden behind others
            category = thing.pop("category")
            category_id, ann_id = category_ids[category], len(annotations) + 1
            annotations.append({"id": ann_id, "image_id": image_id, "category_id": category_id, **thing})
            sentences = []
            for text, kind in record["expressions"].get(index, ()):
                sentence_id += 1
                sentences.append(
                    {"sent_id": sentence_id, "raw": text, "sent": text, "tokens": text.split(), "kind": kind}
                )
            if sentences:
                refs.append(
                    {
                        "ref_id": len(refs) + 1,
                        "ann_id": ann_id,
                        "category_id": category_id,
                        "image_id": image_id,
                        "file_name": record["file_name"],
                        "split": record["split"],
                        "sent_ids": [sentence["sent_id"] for sentence in sentences],
                        "sentences": sentences,
                    }
                )
    categories = [
        {"id": category_ids[category], "name": category, "supercategory": of_category[0].supercategory}
        for category, of_category in drawings().items()
    ]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})
    # Pickle writes an object once and then points to it, so the bytes tell which strings happen to be shared; after a
    # trip through JSON that no longer depends on the process that made them.
    with atomic_write(folder / "refs(toy).p") as file:
        pickle.dump(json.loads(json.dumps(refs)), file, protocol=2)
