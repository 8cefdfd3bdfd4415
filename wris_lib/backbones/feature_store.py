"""What frozen models compute, kept in files: bounded, memory-mapped, and never out of date.

A store is a folder in the cache: `store.json`, and for each array a file of raw rows, one behind the other. The name of
the folder is a hash of everything that its numbers depend on, so when weights or code have changed, no store is found
and another is made. Rows are added a batch at a time and count when `store.json` says so; what a kill left behind the
last of them is cut off. A resumed run therefore computes the same batches as an uninterrupted one, and ends with the
same bytes.

What is kept of CLIP and SAM, and how many gigabytes that makes, is in `wris_lib.backbones.features`.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from wris_lib.errors import WrisError
from wris_lib.files import readable_errors, write_json

LIMIT_GB = 10.0  # of all stores together, unless $WRIS_CACHE_GB says otherwise
LENGTH = " length"  # ends the name of the array that has the lengths of a ragged one's rows


@dataclass(frozen=True)
class Rows:
    """What is to be encoded.

    Attributes:
        keys: one a row, a text that changes whenever the row's content does: the hash of a file, an expression, or, for
            a picture composed from a seed, everything that it is composed from.
        load: number of a row, from 0 -> its content: an RGB image or an expression. A pure function.
    """

    keys: Sequence[str]
    load: Callable[[int], Any]


@dataclass(frozen=True)
class Encoder:
    """A frozen model, and what to keep of its answers.

    Attributes:
        name: begins the folder's name.
        encode: B rows -> named arrays, each a tensor [B, ...], or a list of B tensors [L, ...] whose lengths L differ.
            Floats are kept as float16, anything else as it is.
        settings: what the answers depend on, for JSON.
        origin: what else they depend on: weights, code, versions.
        batch: rows a call, the most that a kill can cost.
    """

    name: str
    encode: Callable[[list[Any]], dict[str, Tensor | list[Tensor]]]
    settings: dict[str, Any]
    origin: dict[str, Any]
    batch: int


class FeatureStore:
    """A finished store: `store[rows]` reads the arrays of any rows.

    The files are mapped into memory, of which the operating system keeps as much as there is room for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        state = _state(folder)
        self._rows = state["done"]
        self._arrays = {
            name: _mapped(folder / f"{name}.bin", array["dtype"]).reshape(-1, *array["shape"])
            for name, array in state["arrays"].items()
        }
        self._spans = {}  # of ragged arrays: where rows begin, and their lengths
        for name in [name.removesuffix(LENGTH) for name in self._arrays if name.endswith(LENGTH)]:
            lengths = np.array(self._arrays.pop(name + LENGTH))
            self._spans[name] = lengths.cumsum() - lengths, lengths
        _OPEN.add(self)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: Sequence[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        """The arrays of B rows, on the CPU.

        Args:
            rows: B numbers of rows, in any order.

        Returns:
            Tensors [B, ...]. A ragged array "x" comes padded with zeros to [B, L, ...], and with an "x mask" [B, L],
            which is True where there is something.
        """
        rows, found = np.asarray(rows, dtype=np.intp), {}
        for name, array in self._arrays.items():
            if name not in self._spans:
                found[name] = array.take(rows, axis=0)
                continue
            starts, lengths = (values[rows, None] for values in self._spans[name])
            steps = np.arange(lengths.max(initial=0))
            mask = steps < lengths
            found[name] = np.zeros((*mask.shape, *array.shape[1:]), array.dtype)
            found[name][mask] = array[(starts + steps)[mask]]
            found[f"{name} mask"] = mask
        return {name: torch.from_numpy(np.asarray(values)) for name, values in found.items()}


class JoinedStores:
    """Several stores of the same encoder one behind the other, read as one. Their arrays must not be ragged."""

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        self.stores = list(stores)
        self.starts = np.cumsum([0, *map(len, self.stores)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: Sequence[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        """As `FeatureStore`'s."""
        rows = np.asarray(rows, dtype=np.intp)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(which, kind="stable")
        asked = np.unique(which) if len(rows) else [0]  # of no rows the arrays are empty, but they have names
        pieces = [self.stores[store][rows[order][which[order] == store] - self.starts[store]] for store in asked]
        back = torch.from_numpy(np.argsort(order))
        return {name: torch.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}


_OPEN: WeakSet[FeatureStore] = WeakSet()  # in this process; none of them makes room for another


def open_features(encoder: Encoder, rows: Rows) -> FeatureStore:
    """The store of these rows, made now as far as it is not there yet.

    A second process that asks for the same store waits until the first has made it. Whoever may not write to the cache
    can still read what is finished.

    Raises:
        WrisError: there are no rows; the limit or the disk has no room for them; the cache is read-only; a feature is
            not finite as float16. Whatever `rows.load` raises passes. Finished batches are kept.
    """
    if not rows.keys:
        raise WrisError("there is nothing to encode: the list of images or expressions is empty.")
    subject = {"encoder": encoder.name, "settings": encoder.settings, "rows": _hash(list(rows.keys))}
    about = {"subject": subject, "origin": encoder.origin, "rows": len(rows.keys)}
    # Not `cache_dir()`, which insists on a folder that can be written to.
    cache = Path(os.environ.get("WRIS_CACHE") or Path.home() / ".cache" / "wris").expanduser()
    folder = cache / "features" / f"{encoder.name}-{_hash(about)[:16]}"
    if _state(folder)["done"] < len(rows.keys):
        _make(folder, encoder, rows, about)
    with suppress(OSError):  # a read-only cache does not remember when it was used
        os.utime(folder / "store.json")
    return FeatureStore(folder)


def _make(folder: Path, encoder: Encoder, rows: Rows, about: dict[str, Any]) -> None:
    """Compute the rows that `folder` lacks."""
    with readable_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_of(folder)).acquire()
    with lock:
        state = _state(folder)
        done, arrays, total = state["done"], state["arrays"], about["rows"]
        with readable_errors(folder):
            if not done:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            for name, array in arrays.items():
                os.truncate(folder / f"{name}.bin", array["bytes"])
        with tqdm(desc=encoder.name, total=total, initial=done, unit=" rows") as bar:
            for start in range(done, total, encoder.batch):
                stop = min(start + encoder.batch, total)
                columns = _columns(encoder.encode([rows.load(row) for row in range(start, stop)]))
                if start == done:
                    written = sum(array["bytes"] for array in arrays.values())
                    final = (written + sum(column.nbytes for column in columns.values())) * total // stop
                    _make_room(folder, about["subject"], written, final)
                for name, column in columns.items():
                    with readable_errors(folder), open(folder / f"{name}.bin", "ab") as file:
                        file.write(column)
                        file.flush()
                        os.fsync(file.fileno())
                        size = file.tell()
                    arrays[name] = {"shape": column.shape[1:], "dtype": str(column.dtype), "bytes": size}
                write_json(folder / "store.json", about | {"done": stop, "arrays": arrays})
                bar.update(stop - start)


def _columns(batch: dict[str, Tensor | list[Tensor]]) -> dict[str, np.ndarray]:
    """A batch as it is written: of ragged arrays one row behind the other, and the lengths."""
    columns = {}
    for name, values in batch.items():
        if isinstance(values, list):
            columns[name + LENGTH] = np.array([len(row) for row in values])
            values = torch.cat(values)
        if values.is_floating_point():
            values = values.half()
            if not values.isfinite().all():
                raise WrisError(
                    f"some of the features {name!r} are not finite, or beyond 65504, where 16-bit floats end; look at"
                    " the model's weights."
                )
        columns[name] = values.cpu().contiguous().numpy()
    return columns


def _make_room(folder: Path, subject: dict[str, Any], written: int, final: int) -> None:
    """Remove other stores until this one fits under the limit and on the disk.

    First those with the same subject, which other weights or code have made and this one replaces; then the least
    recently used. Those stay that this process has open, or that another process is making.

    Args:
        folder: of this store.
        subject: of this store.
        written: bytes that it has.
        final: bytes that it will have.

    Raises:
        WrisError: there is not enough to remove.
    """
    given = os.environ.get("WRIS_CACHE_GB") or LIMIT_GB
    try:
        limit = float(given) * 1e9
    except ValueError:
        raise WrisError(f"WRIS_CACHE_GB is {given!r}; expected a number of gigabytes, such as 20.") from None
    opened = {store.folder for store in _OPEN}
    in_use, idle = 0, []
    with FileLock(folder.parent / ".lock"), ExitStack() as locks:
        for other in set(folder.parent.glob("[!.]*")) - {folder}:
            state, size = _state(other), sum(file.stat().st_size for file in other.glob("*.bin"))
            if other not in opened:
                with suppress(Timeout):
                    locks.enter_context(FileLock(_lock_of(other), timeout=0))
                    idle.append((state.get("subject") != subject, state["used"], other, size))
                    continue
            in_use += size * state.get("rows", 1) // (state["done"] or 1)  # as much as it will be

        left, disk = sum(size for *_, size in idle), shutil.disk_usage(folder.parent).free
        room = min(limit - in_use, written + disk + left)
        if final > room:
            enough = math.ceil((in_use + final) / 1e9)
            mend = f"set WRIS_CACHE_GB to {enough}" if final > limit - in_use else f"make room in {folder.parent}"
            raise WrisError(
                f"the features {folder.name} need {_gb(final)}, but there is room for {_gb(room)}: all features may"
                f" take {_gb(limit)}, {_gb(in_use)} are in use, and the disk has {_gb(disk)} free; {mend}, or take"
                " fewer rows."
            )
        for *_, other, size in sorted(idle):
            if final <= min(limit - in_use - left, written + disk):
                break
            (other / "store.json").unlink(missing_ok=True)  # from here on nobody takes it for whole
            shutil.rmtree(other, ignore_errors=True)
            left, disk = left - size, disk + size


def _state(folder: Path) -> dict[str, Any]:
    """What `store.json` says, and when it was used; if it is not there, or says more than there is, nothing is done."""
    path = folder / "store.json"
    with suppress(OSError, ValueError):
        state = json.loads(path.read_text(encoding="utf-8")) | {"used": path.stat().st_mtime}
        if all((folder / f"{name}.bin").stat().st_size >= a["bytes"] for name, a in state["arrays"].items()):
            return state
    return {"done": 0, "arrays": {}, "used": 0.0}


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """A file's numbers. One without any cannot be mapped: a ragged array may have nothing in any row."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _gb(size: int | float) -> str:
    return f"{max(0, size) / 1e9:.3g} GB"
