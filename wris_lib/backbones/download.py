"""Fetch one large file over HTTP: resumed where it broke off, compared with its hash, whole or not there."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm.auto import tqdm

from wris_lib import files
from wris_lib.errors import WrisError

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the answer
PIECE = 1 << 16  # bytes; a broken connection costs at most one piece
MARGIN = 64 << 20  # bytes to leave free on the disk


class DownloadError(WrisError):
    """This source failed; another one may do better."""


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch `url` into `path`, unless the right file is already there.

    What has arrived waits in `<path>.partial`, so a transfer that broke off goes on where it stopped, after a
    kill too, and from another source. A second process that wants the same file waits for the first.

    Args:
        sha256: what the finished file must hash to, in hexadecimal.

    Raises:
        DownloadError: no connection, an answer other than the file, a transfer that broke off, a wrong hash.
        WrisError: the folder is read-only or the disk is full.
    """
    with files.readable_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and files.sha256(path) == sha256:
                return
            partial = path.with_name(f"{path.name}.partial")
            _transfer(url, partial)
            if (found := files.sha256(partial)) != sha256:
                partial.unlink()
                raise DownloadError(
                    f"{url} sent another file than expected (SHA-256 begins with {found[:12]} instead of"
                    f" {sha256[:12]}), which was removed"
                )
            os.replace(partial, path)


def _transfer(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks; start over where the server cannot send a part of a file."""
    host = urlsplit(url).netloc
    done = partial.stat().st_size if partial.exists() else 0
    # Without "identity" a server might compress, and then byte positions mean something else.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise DownloadError(f"{host} cannot be reached") from error
    with response:
        if response.status_code == requests.codes.range_not_satisfiable:
            return  # nothing is lacking; if it is not the file after all, its hash will tell
        if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
            raise DownloadError(f"{host} answered {response.status_code} {response.reason} for {url}")
        if response.status_code == requests.codes.ok:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        _check_room(partial.parent, int(length or 0))
        with (
            open(partial, "ab" if done else "wb") as file,
            tqdm(desc=partial.stem, total=total, initial=done, unit="B", unit_scale=True) as bar,
        ):
            try:
                for piece in response.iter_content(PIECE):
                    file.write(piece)
                    bar.update(len(piece))
                complete = total is None or file.tell() >= total
            except requests.RequestException:
                complete = False
            if not complete:
                arrived = f"{file.tell() / 1e6:.1f} MB"
                raise DownloadError(f"the transfer from {host} broke off after {arrived}, which are kept")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN:
        raise WrisError(
            f"{folder} has {free / 1e6:.0f} MB free, but {needed / 1e6:.0f} MB are still to come; make room"
            " there, or set WRIS_CACHE to another folder."
        )
