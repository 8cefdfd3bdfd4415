"""Files that are either whole or not there.

Every cache entry, checkpoint and result is written beside its final place and renamed when complete, so a
crash, a full disk or a second process never leaves half a file behind.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from wris_lib.errors import WrisError

MARGIN = 64 << 20  # bytes to leave free on the disk
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system or the user's limits allow no file of that size",
}
REFUSALS = FULL | {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOTDIR: "a part of the path is a file",
    errno.ENOENT: "a part of the path cannot be made",
    errno.EISDIR: "a folder of that name stands in the way",
    errno.EEXIST: "a file of that name stands in the way",
}


def cache_dir() -> Path:
    """The folder for everything that can be made again: `$WRIS_CACHE`, or `~/.cache/wris`.

    Raises:
        WrisError: the folder cannot be created or written to.
    """
    folder = Path(os.environ.get("WRIS_CACHE") or Path.home() / ".cache" / "wris").expanduser()
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def data_dir() -> Path:
    """The folder for real datasets, which may not be there yet: `$WRIS_DATA`, or `data` in the cache."""
    named = os.environ.get("WRIS_DATA")
    return Path(named).expanduser() if named else cache_dir() / "data"


def check_room(folder: Path, needed: int) -> None:
    """Make sure that so many bytes fit on the disk of an existing folder.

    Raises:
        WrisError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN:
        raise WrisError(
            f"{folder} has {free / 1e6:.0f} MB free, but {needed / 1e6:.0f} MB are still to come; make room there, or"
            " set WRIS_CACHE (for datasets: WRIS_DATA) to another folder."
        )


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes its place only when the block ends without an exception.

    Raises:
        WrisError: the folder is read-only or the disk is full.
    """
    path = Path(path)
    with readable_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        encoding = None if "b" in mode else "utf-8"
        with readable_errors(path.parent, FULL), os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with readable_errors(path.parent):
            temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after os.replace there is none


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path | None]:
    """A new folder to fill, which becomes `path` when the block ends without an exception.

    A second process that asks for the same folder waits until the first is done. Whoever finds `path` already
    there gets None: nothing is left to do.

    Raises:
        WrisError: the parent folder is read-only or the disk is full.
    """
    path = Path(path)
    if os.path.isdir(path):
        yield None
        return
    with readable_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire()
    with lock:
        if os.path.isdir(path):
            yield None
            return
        # The lock is ours, so whatever lies here was left by a process that was killed.
        temporary = path.with_name(f".{path.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with readable_errors(path.parent):
                temporary.mkdir()
            with readable_errors(path.parent, FULL):
                yield temporary
            with readable_errors(path.parent):
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented UTF-8 JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path, "w") as file:
        file.write(text)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return _digest(path, "sha256")


def md5(path: Path) -> str:
    """Hexadecimal MD5 of a file's bytes: against accidents only, for files whose server knows no other hash."""
    return _digest(path, "md5")


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)  # or some systems refuse MD5
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def readable_errors(folder: Path, reasons: dict[int, str] = REFUSALS) -> Iterator[None]:
    """Turn the operating system's refusals to write into one sentence. Other errors pass as they are.

    Around code that also reads, pass `FULL`: only those reasons are surely about writing.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError about file positions, in whose context the system's error is found.
        system_error = error if isinstance(error, OSError) else error.__context__
        reason = reasons.get(getattr(system_error, "errno", None))
        if reason is None:
            raise
        raise WrisError(
            f"cannot write to {folder}: {reason}; make room there, or choose another folder (for the cache, by "
            f"setting WRIS_CACHE)."
        ) from error
