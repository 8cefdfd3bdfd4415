"""The downloader against a real server on this machine."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.serving import CONTENT, DIGEST, MD5, Server
from wris_lib import download
from wris_lib.download import DownloadError
from wris_lib.errors import WrisError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "paper" / "weights.bin"


def partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


# --- one download ---------------------------------------------------------------------------------


def test_download_brings_the_file_and_leaves_nothing_else(server: Server, target: Path, capfd) -> None:
    download.download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT
    assert not partial_of(target).exists()
    assert "weights.bin: 100%" in capfd.readouterr().err  # the progress bar


def test_a_file_that_is_there_is_not_fetched_again(server: Server, target: Path) -> None:
    download.download(server.url, target, DIGEST)
    download.download(server.url, target, DIGEST)
    assert len(server.asked) == 1


def test_a_damaged_file_is_fetched_again(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT[:-1] + b"x")
    download.download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT


def test_a_truncated_transfer_is_kept_and_resumed(server: Server, target: Path) -> None:
    server.stop_after = 2_000_000
    with pytest.raises(DownloadError, match=r"from 127\.0\.0\.1:\d+ broke off after 2\.0 MB, which are kept"):
        download.download(server.url, target, DIGEST)
    assert not target.exists()
    kept = partial_of(target).read_bytes()
    assert CONTENT.startswith(kept)
    assert 2_000_000 - download.PIECE <= len(kept) <= 2_000_000

    server.stop_after = None
    download.download(server.url, target, DIGEST)
    assert server.asked == [None, f"bytes={len(kept)}-"]
    assert target.read_bytes() == CONTENT


def test_a_transfer_of_unknown_length_that_breaks_off_is_not_taken_for_whole(server: Server, target: Path) -> None:
    server.length, server.stop_after = False, 1_000
    with pytest.raises(DownloadError, match="another file than expected"):
        download.download(server.url, target, DIGEST)
    assert not target.exists()


def test_a_server_without_ranges_starts_over(server: Server, target: Path) -> None:
    server.ranges = False
    target.parent.mkdir()
    partial_of(target).write_bytes(b"something else" * 1_000)
    download.download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT


def test_a_complete_partial_file_only_needs_its_name(server: Server, target: Path) -> None:
    target.parent.mkdir()
    partial_of(target).write_bytes(CONTENT)
    download.download(server.url, target, DIGEST)
    assert target.read_bytes() == CONTENT


def test_a_wrong_hash_removes_the_file(server: Server, target: Path) -> None:
    server.content = b"a login page"
    with pytest.raises(DownloadError, match="sent another file than expected.*which was removed"):
        download.download(server.url, target, DIGEST)
    assert not target.exists()
    assert not partial_of(target).exists()


@pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (503, "503 Service Unavailable")])
def test_a_server_that_refuses(server: Server, target: Path, status: int, words: str) -> None:
    server.status = status
    with pytest.raises(DownloadError, match=f"answered {words} for http"):
        download.download(server.url, target, DIGEST)
    assert not partial_of(target).exists()


def test_no_server(dead_url: str, target: Path) -> None:
    with pytest.raises(DownloadError, match=r"^127\.0\.0\.1:\d+ cannot be reached$"):
        download.download(dead_url, target, DIGEST)


def test_a_disk_that_is_too_small_is_noticed_beforehand(server: Server, target: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(WrisError, match="has 1 MB free, but 3 MB are still to come"):
        download.download(server.url, target, DIGEST)
    assert not partial_of(target).exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up_on_the_way(server: Server, target: Path) -> None:
    target.parent.mkdir()
    partial_of(target).symlink_to("/dev/full")
    with pytest.raises(WrisError, match="the disk is full"):
        download.download(server.url, target, DIGEST)
    assert not target.exists()


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WrisError, match="cannot write to .*file"):
        download.download(server.url, tmp_path / "file" / "weights.bin", DIGEST)


def test_two_at_once_fetch_the_file_once(server: Server, target: Path) -> None:
    threads = [threading.Thread(target=download.download, args=(server.url, target, DIGEST)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert len(server.asked) == 1


# --- one download whose SHA-256 nobody has published ----------------------------------------------


@pytest.mark.parametrize("lines", [(MD5,), tuple(MD5.split(",")), tuple(reversed(MD5.split(",")))])
def test_the_announced_md5_is_compared(server: Server, target: Path, lines: tuple[str, ...], capsys) -> None:
    server.hashes = lines
    download.download(server.url, target, None)
    assert target.read_bytes() == CONTENT and not partial_of(target).exists()
    assert capsys.readouterr().out == ""

    target.unlink()
    server.content = CONTENT[:-1] + b"x"  # the length is right
    with pytest.raises(DownloadError, match=r"sent another file than expected \(MD5 .+== instead of .+==, in base64\)"):
        download.download(server.url, target, None)
    assert not target.exists() and not partial_of(target).exists()


@pytest.mark.parametrize("lines", [(), ("crc32c=AAAAAA==",)])
def test_without_an_md5_the_length_decides_and_that_is_said(
    server: Server, target: Path, lines: tuple[str, ...], capsys
) -> None:
    server.hashes = lines
    download.download(server.url, target, None)
    assert target.read_bytes() == CONTENT
    host = server.url.split("/")[2]
    assert capsys.readouterr().out == (
        f"{host} announces no MD5 of {server.url}, so it could not be compared with a hash; its length is right.\n"
    )

    target.unlink()
    server.announced = len(CONTENT) + 1
    with pytest.raises(DownloadError, match=r"another file than expected \(3072000 bytes instead of 3072001\)"):
        download.download(server.url, target, None)
    assert not target.exists() and not partial_of(target).exists()
    assert capsys.readouterr().out == ""


def test_a_server_that_announces_nothing_is_not_believed(server: Server, target: Path) -> None:
    server.length = False
    with pytest.raises(DownloadError, match=r"announces neither MD5 nor length of http.*weights\.bin"):
        download.download(server.url, target, None)
    assert not target.exists()
    server.hashes = (MD5,)
    download.download(server.url, target, None)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("lines", [(MD5,), ()])
def test_a_transfer_without_a_published_hash_is_resumed(server: Server, target: Path, lines: tuple[str, ...]) -> None:
    server.hashes, server.stop_after = lines, 2_000_000
    with pytest.raises(DownloadError, match="broke off after 2.0 MB, which are kept"):
        download.download(server.url, target, None)
    kept = partial_of(target).stat().st_size
    server.stop_after = None
    download.download(server.url, target, None)
    assert server.asked == [None, f"bytes={kept}-"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("lines", [(MD5,), ()])
def test_a_file_put_there_by_hand_is_compared_and_not_fetched(
    server: Server, target: Path, lines: tuple[str, ...]
) -> None:
    server.hashes = lines
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    download.download(server.url, target, None)
    assert server.asked == []
    target.write_bytes(b"another file")
    download.download(server.url, target, None)
    assert server.asked == [None]
    assert target.read_bytes() == CONTENT


def test_nothing_to_compare_a_file_with(server: Server, dead_url: str, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    server.status = 405
    with pytest.raises(DownloadError, match="answered 405 Method Not Allowed for http"):
        download.download(server.url, target, None)
    with pytest.raises(DownloadError, match=r"^127\.0\.0\.1:\d+ cannot be reached$"):
        download.download(dead_url, target, None)
    assert target.read_bytes() == CONTENT
