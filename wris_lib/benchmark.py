"""The benchmark: methods against splits, one record an expression, and nothing lost.

Records are appended to a file in the cache as they are made. The file's name is a hash of everything that a record
depends on: method and options, the split with its pictures and outlines, the weights, the code, the packages. So
a run that was killed goes on where it stopped, a second run costs nothing, and no record outlives what made it.
The unit of work is an image with all its expressions, which share one embedding; a resumed run therefore does
exactly the work of an uninterrupted one, and gets exactly its figures. Started in several processes, by accelerate or
by hand, a command's rows and splits are divided among them.

Who takes part is in `wris_lib.contestants`, what they are asked in `wris_lib.questions`, what they cost in
`wris_lib.cost`. What becomes of the records is in
`wris_lib.evaluate` (figures), `wris_lib.report` (results, table, picture) and `wris_lib.page` (a page with examples).
"""

import hashlib
import inspect
import json
import os
import platform
import re
import shlex
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from wris_lib import answers, comparison_figures, cost, data, evaluate, page, questions, report
from wris_lib.backbones.checkpoints import WEIGHTS, checkpoint_path, get_stack
from wris_lib.backbones.features import PACKAGES
from wris_lib.contestants import Contestant, contestants, everyone
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError
from wris_lib.evaluate import Record
from wris_lib.files import cache_dir, readable_errors, sha256
from wris_lib.methods import get_method
from wris_lib.sources import sources

# All toy splits that no training sees; ToyRef val comes first, since costs are measured and examples taken there.
TOY_SPLITS = (
    *("toyref:val", "toyref:testA", "toyref:testB", "toyref+:val", "toyref+:testA", "toyref+:testB"),
    *("toyrefg:val", "toyrefg:test", "toycut:val", "toyobjects:val"),
)
# Expressions of each split in a comparison of everything.
LIMIT = 500
# Whose answers the picture of a comparison shows, and to how many of them.
PICTURED, EXAMPLES = ("clip_sam surgery", "ppt", "pcnet sam", "iterprime"), 4

Found = dict[tuple[str, str], list[Record]]


def run(
    methods: Sequence[str] | None,
    data_specs: Sequence[str],
    name: str,
    limit: int | None = None,
    seed: int = 0,
    stack: str | None = None,
    folder: Path = report.RESULTS,
    html: Path | None = None,
) -> report.Results | None:
    """Measure, and write `NAME.json`, `NAME.md` (a table) and `NAME.png` (a picture).

    Rows that the file already has, of other methods or other data, stay.

    Args:
        methods: names as `contestants` takes them. None: everyone that the stack has the models for, a warning names
            the others; then also what each of them costs, and of the first split all answers (`wris_lib.answers`) and
            a picture of what is disputed, `NAME.disagreements.jpg`.
        data_specs: splits, such as "toyref:val".
        name: of the files.
        limit: see `records`.
        seed: of the choice under `limit`, and of the bootstrap.
        stack: "toy" or "paper"; by default $WRIS_STACK, or "toy".
        folder: where the files go.
        html: also write a page with examples there, see `page.write`.

    Returns:
        What `NAME.json` then holds; None in a process that has only helped another one, which writes the files.

    Raises:
        WrisError: no such method, split or stack, weights or data are missing, or a folder cannot be written.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise WrisError(f"{name!r} cannot name a result; use letters, digits, '_', '.', '+' and '-'.")
    if html is not None:
        page.check_place(html)  # now, and not after hours
    process = PartialState(cpu=not torch.cuda.is_available())
    stack = get_stack(stack).name
    names, left_out = (methods, {}) if methods is not None else everyone(stack)
    if process.is_main_process:
        for method, reason in left_out.items():
            warnings.warn(f"{method} is left out: {reason}.", stacklevel=2)
    wanted = [row for method in names for row in contestants(method)]
    splits = {spec: data.load(spec).items for spec in data_specs}
    found = _share(wanted, splits, limit, seed, stack)
    if not process.is_main_process:
        return None
    flags = ["--method", *methods] if methods is not None else ["--all"]
    flags += ["--data", *data_specs, "--name", name, "--stack", stack, "--seed", str(seed)]
    flags += ["--limit", str(limit)] if limit else []
    made = _made(flags, seed) | ({"left_out": left_out} if left_out else {})
    costs = cost.measure(wanted, data_specs[0], splits[data_specs[0]], seed, stack) if methods is None else {}
    rows = [_row(row, spec, records, seed) for (row, spec), records in found.items()]
    results = report.write(Path(folder) / f"{name}.json", made, rows, costs)
    if methods is None:
        _keep_answers(Path(folder) / name, data_specs[0], found, splits)
    if html is not None:
        page.write(html, results, found, splits, seed)
    return results


def _share(
    wanted: Sequence[Contestant], splits: dict[str, list[EvaluationItem]], limit: int | None, seed: int, stack: str
) -> Found:
    """Records by names of row and split: those first that no other process is at, then, having waited, the others."""
    found: Found = {}
    for patience in (0.0, -1.0):
        for row in wanted:
            for spec, items in splits.items():
                if (row.name, spec) not in found:
                    try:
                        found[row.name, spec] = records_of(row, spec, items, limit, seed, stack, patience)
                    except Timeout:
                        continue
    return {(row.name, spec): found[row.name, spec] for row in wanted for spec in splits}


def _keep_answers(base: Path, spec: str, found: Found, splits: dict[str, list[EvaluationItem]]) -> None:
    """All answers to one split, and a picture of a few of them."""
    answered = {row: records for (row, data), records in found.items() if data == spec}
    answers.write(base.with_name(base.name + answers.SUFFIX), spec, answered)
    shown = {row: answered[row] for row in PICTURED if row in answered} or answered
    picture = comparison_figures.disagreements_picture(shown, splits[spec], EXAMPLES)
    picture.save(base.with_name(f"{base.name}.disagreements.jpg"))


def _made(flags: list[str], seed: int) -> dict[str, object]:
    return {
        "command": shlex.join(["python", "-m", "wris_lib", "benchmark", *flags]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "seeds": [seed],
        "versions": versions(),
    }


def _row(name: str, spec: str, records: list[Record], seed: int) -> dict[str, object]:
    return {
        "name": name,
        "data": spec,
        "n": len(records),
        "images": len({record["image"] for record in records}),
        "metrics": evaluate.summarize(records, seed),
        "kinds": evaluate.breakdown(records, seed),
    }


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
        split), "image" (id), "expression", "kind", "twins" (other objects of the referent's category) and "mask" (the
        prediction, see `coco.encode_mask`).

    Raises:
        WrisError: no such row, split or stack, weights or data are missing, or the cache cannot be written.
    """
    rows = contestants(name)
    if len(rows) > 1:
        raise WrisError(f"{name!r} has several variants; choose one of: {', '.join(row.name for row in rows)}.")
    stack = get_stack(stack).name
    return records_of(rows[0], spec, data.load(spec).items, limit, seed, stack)


def records_of(
    row: Contestant,
    spec: str,
    items: Sequence[EvaluationItem],
    limit: int | None,
    seed: int,
    stack: str,
    patience: float = -1.0,
) -> list[Record]:
    """`records` of any row, also one that is no variant of its method.

    Args:
        row: a method with its options.
        spec: the split's name.
        items: the split's.
        limit: see `records`.
        seed: see `records`.
        stack: "toy" or "paper".
        patience: seconds to wait for another process that is at the same row and split; -1: as long as it takes.

    Raises:
        WrisError: see `records`.
        Timeout: another process is still at it.
    """
    chosen = questions.draw(items, limit, seed)
    path = cache_dir() / "benchmark" / f"{_slug(row.name)}-{_slug(spec)}-{_key(row, stack, items)}.jsonl"
    with readable_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock"), timeout=patience):  # who has waited finds the work done
        found = {record["item"]: record for record in _read(path)}
        missing = [indices for indices in chosen if any(index not in found for index in indices)]
        if missing:
            total = sum(map(len, chosen))
            done = total - sum(map(len, missing))
            predict = row.load(stack)
            with tqdm(desc=f"{row.name}, {spec}", total=total, initial=done, unit=" expressions") as bar:
                for indices in missing:
                    fresh = list(questions.ask(predict, {index: items[index] for index in indices}))
                    _append(path, fresh)
                    found.update((record["item"], record) for record in fresh)
                    bar.update(len(fresh))
    return [found[index] for index in sorted(index for indices in chosen for index in indices)]


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
    method = [inspect.getfile(get_method(row.method))] if row.method else []
    code = [Path(__file__), *sources(questions.__file__, *method), *sorted(WEIGHTS.glob("*.txt*"))]  # and vocabularies
    used = [part for name in row.parts if (part := getattr(get_stack(stack), name))]
    images = {path: sha256(path) for path in dict.fromkeys(item.image_path for item in items)}
    samples = [
        (images[item.image_path], item.expression, item.kind, item.annotation, item.neighbours) for item in items
    ]
    content = {
        "row": (row.name, row.method, sorted(row.options.items())),
        "samples": samples,
        "weights": [part if isinstance(part, str) else sha256(checkpoint_path(part)) for part in used],
        "code": [sha256(path) for path in code],
        "versions": versions(),
        "device": device_name(),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    packages = (*PACKAGES, "transformers", "spacy", "timm")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def device_name() -> str:
    """What the models run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _slug(text: str) -> str:
    return re.sub(r"[^\w+]+", "_", text)
