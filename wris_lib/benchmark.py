"""The benchmark: methods against splits, one record an expression, and nothing lost.

Records are appended to a file in the cache as they are made. The file's name is a hash of everything that a record
depends on: method and options, the split with its pictures and outlines, the weights, the code, the packages. So
a run that was killed goes on where it stopped, a second run costs nothing, and no record outlives what made it.
The unit of work is an image with all its expressions, which share one embedding; a resumed run therefore does
exactly the work of an uninterrupted one, and gets exactly its figures.

What becomes of the records is in `wris_lib.evaluate` (figures) and `wris_lib.report` (results, table, picture).
"""

import hashlib
import inspect
import json
import os
import platform
import re
import shlex
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm

import wris_lib
from wris_lib import data, evaluate, report
from wris_lib.backbones.checkpoints import checkpoint_path, get_stack
from wris_lib.backbones.features import PACKAGES
from wris_lib.backbones.sam import load_sam
from wris_lib.data.images import check_expression, load_image
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError
from wris_lib.evaluate import Record
from wris_lib.files import cache_dir, readable_errors, sha256
from wris_lib.methods import METHODS, Method, get_method, load_method

ORACLE = "sam box"

# An image and the questions about it -> for each question a mask and a response map, or None in place of a map.
Predict = Callable[[Image.Image, list[EvaluationItem]], list[tuple[np.ndarray, np.ndarray | None]]]


@dataclass(frozen=True)
class Contestant:
    """One row of the table: a method with its options. Without a method it is the oracle.

    The oracle is SAM told the referent's true box, and so what a perfect pointer could reach.
    """

    name: str
    method: str | None = None
    options: dict[str, Hashable] = field(default_factory=dict)

    def load(self, stack: str) -> Predict:
        """Build it from a stack's models."""
        if self.method is None:
            sam = load_sam(stack)

            def predict(image: Image.Image, items: list[EvaluationItem]):
                embedded = sam.embed(image)
                boxes = torch.from_numpy(np.stack([item.box for item in items]))
                # A box leaves little doubt, and for such prompts upstream advises the single mask.
                masks = sam.best_mask(embedded, sam.decode(embedded, boxes=boxes, multimask=False))
                return [(mask, None) for mask in masks]

            return predict
        return predictor(load_method(self.method, stack, **self.options))


def predictor(method: Method) -> Predict:
    """A method as the benchmark asks it."""

    def predict(image: Image.Image, items: list[EvaluationItem]):
        answers = method.predict(image, [check_expression(item.expression) for item in items])
        return [(answer.mask, answer.response_map) for answer in answers]

    return predict


def contestants(name: str) -> list[Contestant]:
    """The rows that a name stands for.

    Args:
        name: a method ("clip_sam", meaning all its variants), one variant ("clip_sam plain"), or "sam box", the
            oracle.

    Raises:
        WrisError: nothing has that name.
    """
    if name == ORACLE:
        return [Contestant(ORACLE)]
    method = name.split(" ")[0]
    rows = []
    if method in METHODS:
        variants = get_method(method).variants
        rows = [Contestant(f"{method} {variant}".strip(), method, options) for variant, options in variants.items()]
    chosen = [row for row in rows if name in (method, row.name)]
    if not chosen:
        known = [*METHODS, *(row.name for row in rows), ORACLE]
        raise WrisError(f"the benchmark has no method {name!r}; choose from: {', '.join(known)}.")
    return chosen


def run(
    methods: Sequence[str],
    data_specs: Sequence[str],
    name: str,
    limit: int | None = None,
    seed: int = 0,
    stack: str | None = None,
    folder: Path = report.RESULTS,
) -> report.Results:
    """Measure, and write `NAME.json`, `NAME.md` (a table) and `NAME.png` (a picture).

    Rows that the file already has, of other methods or other data, stay.

    Args:
        methods: names as `contestants` takes them.
        data_specs: splits, such as "toyref:val".
        name: of the files.
        limit: see `records`.
        seed: of the choice under `limit`, and of the bootstrap.
        stack: "toy" or "paper"; by default $WRIS_STACK, or "toy".
        folder: where the files go.

    Returns:
        What `NAME.json` then holds.

    Raises:
        WrisError: no such method, split or stack, weights or data are missing, or a folder cannot be written.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise WrisError(f"{name!r} cannot name a result; use letters, digits, '_', '.', '+' and '-'.")
    stack = get_stack(stack).name
    wanted = [row for method in methods for row in contestants(method)]
    splits = {spec: data.load(spec).items for spec in data_specs}
    rows = []
    for row in wanted:
        for spec, items in splits.items():
            found = records_of(row, spec, items, limit, seed, stack)
            rows.append(
                {
                    "name": row.name,
                    "data": spec,
                    "n": len(found),
                    "images": len({record["image"] for record in found}),
                    "metrics": evaluate.summarize(found, seed),
                    "kinds": evaluate.breakdown(found, seed),
                }
            )
    flags = ["--method", *methods, "--data", *data_specs, "--name", name, "--stack", stack, "--seed", str(seed)]
    flags += ["--limit", str(limit)] if limit else []
    made = {
        "command": shlex.join(["python", "-m", "wris_lib", "benchmark", *flags]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "seeds": [seed],
        "versions": versions(),
    }
    return report.write(Path(folder) / f"{name}.json", made, rows)


def records(name: str, spec: str, limit: int | None = None, seed: int = 0, stack: str | None = None) -> list[Record]:
    """One record for each expression of a split, from the cache when it was asked for before.

    Args:
        name: of one row: "clip_sam surgery" or "sam box".
        spec: the split, such as "toyref:val".
        limit: at least so many expressions: those of images drawn at random, no image cut. By default all.
        seed: of that draw.
        stack: "toy" or "paper"; by default $WRIS_STACK, or "toy".

    Returns:
        Records as `evaluate.score` makes them, in the split's order, each also with "item" (its index in the
        split), "image" (id), "expression" and "kind".

    Raises:
        WrisError: no such row, split or stack, weights or data are missing, or the cache cannot be written.
    """
    rows = contestants(name)
    if len(rows) > 1:
        raise WrisError(f"{name!r} has several variants; choose one of: {', '.join(row.name for row in rows)}.")
    stack = get_stack(stack).name
    return records_of(rows[0], spec, data.load(spec).items, limit, seed, stack)


def measure(predict: Predict, items: Sequence[EvaluationItem], limit: int | None = None, seed: int = 0) -> list[Record]:
    """Records of something that is no row of the benchmark, such as a generator in training; they are not kept.

    Args:
        predict: see `predictor`.
        items: of a split.
        limit: see `records`.
        seed: see `records`.
    """
    chosen = _draw(list(_by_image(items).values()), limit, seed)
    return [record for indices in chosen for record in _measure(predict, {index: items[index] for index in indices})]


def _by_image(items: Sequence[EvaluationItem]) -> dict[Path, list[int]]:
    """The numbers of each image's items."""
    images: dict[Path, list[int]] = {}
    for index, item in enumerate(items):
        images.setdefault(item.image_path, []).append(index)
    return images


def records_of(
    row: Contestant, spec: str, items: Sequence[EvaluationItem], limit: int | None, seed: int, stack: str
) -> list[Record]:
    """`records` of any row, also one that is no variant of its method.

    Args:
        row: a method with its options.
        spec: the split's name.
        items: the split's.
        limit: see `records`.
        seed: see `records`.
        stack: "toy" or "paper".
    """
    chosen = _draw(list(_by_image(items).values()), limit, seed)

    path = cache_dir() / "benchmark" / f"{_slug(row.name)}-{_slug(spec)}-{_key(row, stack, items)}.jsonl"
    with readable_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # a second process waits, and then finds the work done
        found = {record["item"]: record for record in _read(path)}
        missing = [indices for indices in chosen if any(index not in found for index in indices)]
        if missing:
            total = sum(map(len, chosen))
            done = total - sum(map(len, missing))
            predict = row.load(stack)
            with tqdm(desc=f"{row.name}, {spec}", total=total, initial=done, unit=" expressions") as bar:
                for indices in missing:
                    fresh = list(_measure(predict, {index: items[index] for index in indices}))
                    _append(path, fresh)
                    found.update((record["item"], record) for record in fresh)
                    bar.update(len(fresh))
    return [found[index] for index in sorted(index for indices in chosen for index in indices)]


def _draw(images: list[list[int]], limit: int | None, seed: int) -> list[list[int]]:
    """Images in random order until their expressions are enough."""
    if limit is None:
        return images
    if limit < 1:
        raise WrisError(f"the limit is {limit}, but at least one expression is needed.")
    order = np.random.default_rng(seed).permutation(len(images))
    lengths = np.cumsum([len(images[index]) for index in order])
    return [images[index] for index in order[: np.searchsorted(lengths, limit) + 1]]


def _measure(predict: Predict, items: dict[int, EvaluationItem]) -> Iterator[Record]:
    """The records of one image's expressions."""
    path = next(iter(items.values())).image_path
    image = load_image(path)
    answers = predict(image, list(items.values()))
    for (index, item), (mask, response_map) in zip(items.items(), answers, strict=True):
        if (size := item.mask.shape) != mask.shape:
            raise WrisError(
                f"{path} has {image.width}×{image.height} pixels, but its masks have {size[1]}×{size[0]}; use the"
                " images that belong to the dataset."
            )
        about = {"item": index, "image": item.image_id, "expression": item.expression, "kind": item.kind}
        about["twins"] = item.twins
        yield about | evaluate.score(mask, item.mask, item.others, response_map)


def _append(path: Path, records: list[Record]) -> None:
    """Add lines to a file, and return when they are on the disk."""
    with readable_errors(path.parent), open(path, "ab") as file:
        file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> list[Record]:
    """The records of a file. A last line that a kill has torn is cut off, so that the next one starts clean."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return [json.loads(line) for line in content[:whole].splitlines()]


def _key(row: Contestant, stack: str, items: Sequence[EvaluationItem]) -> str:
    """Hash of all that a record depends on."""
    package = Path(wris_lib.__file__).parent
    code = [package / "benchmark.py", package / "evaluate.py"]
    code += [*(package / "backbones").glob("*.py"), *(package / "data").glob("*.py")]
    parts = ("sam",)
    if row.method:
        parts = get_method(row.method).parts
        code += Path(inspect.getfile(get_method(row.method))).parent.glob("*.py")
    used = [part for name in parts if (part := getattr(get_stack(stack), name))]
    images = {path: sha256(path) for path in dict.fromkeys(item.image_path for item in items)}
    samples = [
        (images[item.image_path], item.expression, item.kind, item.annotation, item.neighbours) for item in items
    ]
    content = {
        "row": (row.name, row.method, sorted(row.options.items())),
        "samples": samples,
        "weights": [part if isinstance(part, str) else sha256(checkpoint_path(part)) for part in used],
        "code": [sha256(path) for path in sorted(code)],
        "versions": versions(),
        "device": device_name(),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def device_name() -> str:
    """What the models run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _slug(text: str) -> str:
    return re.sub(r"[^\w+]+", "_", text)
