"""Fetch large files over HTTP: resumed where they broke off, compared with their hashes, whole or not there."""

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from requests.utils import parse_dict_header
from tqdm.auto import tqdm

from wris_lib import files
from wris_lib.errors import WrisError

FETCH = "python -m wris_lib fetch paper"  # the command that all downloads begin with
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the answer
PIECE = 1 << 16  # bytes; a broken connection costs at most one piece
ACCEPTED = (requests.codes.ok, requests.codes.partial_content, requests.codes.range_not_satisfiable)


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file that others publish."""

    file: str
    sha256: str | None = None  # None: nobody has published it
    urls: tuple[str, ...] = ()  # tried in this order
    megabytes: int = 0
    licence: str = ""

    @property
    def amount(self) -> str:
        """How much there is to download, in words."""
        return f"about {self.megabytes} MB"


class DownloadError(WrisError):
    """This source failed; another one may do better."""


def fetch_file(remote: Remote, path: Path, sha256: str | None, command: str) -> None:
    """Fetch a file into `path`, from the first of its sources that works.

    Args:
        sha256: what it must hash to, see `download`.
        command: what to run again when the network is back.

    Raises:
        WrisError: no source worked; the folder is read-only or the disk is full. What has arrived is kept.
    """
    failures = []
    for url in remote.urls:
        try:
            download(url, path, sha256)
        except DownloadError as error:
            failures.append(str(error))
        else:
            return
    raise WrisError(
        f"{remote.file} could not be fetched: {'; '.join(failures)}; check the network and run `{command}` again, or"
        f" copy the file to {path} by hand."
    )


def download(url: str, path: Path, sha256: str | None) -> None:
    """Fetch `url` into `path`, unless the right file is already there.

    What has arrived waits in `<path>.partial`, so a transfer that broke off goes on where it stopped, after a
    kill too, and from another source. A second process that wants the same file waits for the first.

    Args:
        sha256: what the finished file must hash to, in hexadecimal. None, where nobody has published it: the file
            must have the MD5 that the server announces, or, where it announces none, the length.

    Raises:
        DownloadError: no connection, an answer other than the file, a transfer that broke off, a wrong hash.
        WrisError: the folder is read-only or the disk is full.
    """
    with files.readable_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and not _difference(path, sha256, url):
                return
            partial = path.with_name(f"{path.name}.partial")
            _transfer(url, partial)
            if difference := _difference(partial, sha256, url):
                partial.unlink()
                raise DownloadError(f"{url} sent another file than expected ({difference}), which was removed")
            os.replace(partial, path)


def _difference(path: Path, sha256: str | None, url: str) -> str:
    """In what a whole file differs from the one expected; empty if in nothing."""
    if sha256:
        found = files.sha256(path)
        return "" if found == sha256 else f"SHA-256 begins with {found[:12]} instead of {sha256[:12]}"
    with _request("HEAD", url, {}) as response:
        headers = response.headers
    # Google's storage: `x-goog-hash: crc32c=<base64>,md5=<base64>`, the latter not for files uploaded in parts.
    if md5 := parse_dict_header(headers.get("x-goog-hash", "")).get("md5"):
        found = base64.b64encode(bytes.fromhex(files.md5(path))).decode()
        return "" if found == md5 else f"MD5 {found} instead of {md5}, in base64"
    host, length, found = urlsplit(url).netloc, headers.get("Content-Length"), path.stat().st_size
    if length is None:
        raise DownloadError(f"{host} announces neither MD5 nor length of {url}, so nothing shows whether it is whole")
    if found != int(length):
        return f"{found} bytes instead of {length}"
    print(f"{host} announces no MD5 of {url}, so it could not be compared with a hash; its length is right.")
    return ""


def _request(method: str, url: str, headers: dict[str, str]) -> requests.Response:
    """The server's answer, of which only the head has arrived."""
    host = urlsplit(url).netloc
    # Without "identity" a server might compress, and then byte positions and lengths mean something else.
    headers = {"Accept-Encoding": "identity"} | headers
    try:
        response = requests.request(method, url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise DownloadError(f"{host} cannot be reached") from error
    if response.status_code not in ACCEPTED:
        response.close()
        raise DownloadError(f"{host} answered {response.status_code} {response.reason} for {url}")
    return response


def _transfer(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks; start over where the server cannot send a part of a file."""
    host = urlsplit(url).netloc
    done = partial.stat().st_size if partial.exists() else 0
    with _request("GET", url, {"Range": f"bytes={done}-"} if done else {}) as response:
        if response.status_code == requests.codes.range_not_satisfiable:
            return  # nothing is lacking; if it is not the file after all, its hash will tell
        if response.status_code == requests.codes.ok:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        files.check_room(partial.parent, int(length or 0))
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
