"""What studies have in common: runs that processes share, and results over seeds.

A study is a list of trainings, each with a folder of its own in the cache. Start the same command in several processes
and they divide the trainings among themselves; stop it, and it goes on where it was.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from filelock import FileLock, Timeout

from wris_lib import benchmark, evaluate
from wris_lib.evaluate import Record
from wris_lib.files import write_json

SEEDS = (0, 1, 2)
LIMIT = 1000  # expressions of a split, at least; those of whole images, the same for every row


@runtime_checkable
class Run(Protocol):
    """One training, and what is measured behind it."""

    @property
    def folder(self) -> Path: ...

    @property
    def finished(self) -> bool: ...


R = TypeVar("R", bound=Run)


def do_all(runs: Sequence[R], prepare: Callable[[], Callable[[R], None]]) -> None:
    """All runs, those first that no other process is at; then wait for the others.

    Args:
        runs: finished ones are passed over.
        prepare: loads what runs need, when there is anything to do, and gives what does one of them.
    """
    do = None
    for timeout in (0, -1):
        for run in runs:
            if run.finished:
                continue
            run.folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(run.folder / ".lock", timeout=timeout):
                    if not run.finished:  # by whom this one has waited for
                        do = do or prepare()
                        do(run)
            except Timeout:
                continue


def row(name: str, split: str, seeds: Sequence[list[Record]]) -> dict[str, Any]:
    """A row of a result: every metric as mean and standard deviation over seeds, overall and by kind of expression."""
    groups = [evaluate.groups(records) for records in seeds]
    kinds = {
        kind: {"n": len(groups[0][kind]), "metrics": over_seeds([group[kind] for group in groups])}
        for kind in groups[0]
    }
    return {"name": name, "data": split, "n": len(seeds[0]), "metrics": over_seeds(seeds), "kinds": kinds}


def over_seeds(seeds: Sequence[list[Record]]) -> dict[str, dict[str, Any]]:
    """Every metric, as `mean_and_std` has it."""
    tables = [evaluate.summarize(records) for records in seeds]
    return {name: mean_and_std([table[name]["mean"] for table in tables]) for name in tables[0]}


def mean_and_std(values: list[float]) -> dict[str, Any]:
    """Of a metric's values, one a seed: "mean", "std" (of the sample; 0 for one seed) and "seeds"."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 2), "std": round(spread, 2), "seeds": values}


def join(
    path: Path, recipe: list[str], seeds: Sequence[int], rows: list[dict[str, Any]]
) -> tuple[list[int], list[dict[str, Any]]]:
    """New rows together with other seeds' figures that a result file already has.

    A study may take longer than a machine is at hand. So seeds can be measured one at a time, on several machines; they
    go together only when everything that they depend on is the same.

    Args:
        path: of the file, which need not be there.
        recipe: all that a row depends on but its seed; the file's must be the same, or its figures are dropped.
        seeds: of the new rows; they take the place of the same seeds in the file.
        rows: new, as from `row`, one figure a seed.

    Returns:
        All seeds in order, and the rows of them all.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("recipe") != recipe:
        return list(seeds), rows
    every = sorted({*seeds, *kept["seeds"]})

    def joined(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for metric, figures in new.items():
            by_seed = dict(zip(kept["seeds"], old[metric]["seeds"], strict=True))
            by_seed |= dict(zip(seeds, figures["seeds"], strict=True))
            found[metric] = mean_and_std([by_seed[seed] for seed in every])
        return found

    before = {(each["name"], each["data"]): each for each in kept["rows"]}
    whole = []
    for new in rows:
        old = before[new["name"], new["data"]]
        kinds = {
            kind: group | {"metrics": joined(group["metrics"], old["kinds"][kind]["metrics"])}
            for kind, group in new["kinds"].items()
        }
        whole.append(new | {"metrics": joined(new["metrics"], old["metrics"]), "kinds": kinds})
    return every, whole


def write(path: Path, command: str, seeds: Sequence[int], rows: list[dict[str, Any]], **more: Any) -> None:
    """A result file: what made it, and its rows.

    Args:
        path: of the file.
        command: behind `python -m wris_lib`.
        seeds: of the trainings.
        rows: of the result.
        more: entries besides.
    """
    about = {
        "command": f"python -m wris_lib {command}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": benchmark.device_name(),
        "seeds": list(seeds),
        "versions": benchmark.versions(),
    }
    write_json(path, about | more | {"rows": rows})
    print(path)
