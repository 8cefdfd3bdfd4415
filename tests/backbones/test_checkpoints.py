"""The stack table, the downloader against a real server on this machine, and damaged checkpoints."""

import base64
import hashlib
import io
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wris_lib import files
from wris_lib.backbones import checkpoints, download
from wris_lib.backbones.checkpoints import STACKS, Checkpoint, fetch_paper, get_stack, paper_status
from wris_lib.backbones.download import DownloadError
from wris_lib.backbones.loading import load_state, load_weights
from wris_lib.errors import WrisError

# OpenAI's file is a TorchScript archive, and torch advises against making new ones.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")

CONTENT = bytes(range(256)) * 12_000  # 3 MB: more than one of the downloader's pieces
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MD5 = "crc32c=AAAAAA==,md5=" + base64.b64encode(hashlib.md5(CONTENT).digest()).decode()  # as Google's storage has it


# --- a server that can misbehave ------------------------------------------------------------------


@dataclass
class Server:
    """What the server on this machine does, and which ranges it was asked for."""

    url: str = ""
    content: bytes = CONTENT
    ranges: bool = True  # answers Range requests
    length: bool = True  # sends Content-Length
    stop_after: int | None = None  # closes the connection after so many bytes
    status: int | None = None  # answers this and nothing else
    hashes: tuple[str, ...] = ()  # an x-goog-hash line for each
    announced: int | None = None  # the length that it announces; None: the right one
    asked: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, behaviour: Server, *arguments: object) -> None:
        self.behaviour = behaviour
        super().__init__(*arguments)

    def do_GET(self) -> None:
        server = self.behaviour
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            self.send_error(server.status)
            return
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if server.stop_after is None else body[: server.stop_after])

    def do_HEAD(self) -> None:
        server = self.behaviour
        if server.status:
            self.send_error(server.status)
            return
        self.send_response(200)
        for line in server.hashes:
            self.send_header("x-goog-hash", line)
        if server.length:
            self.send_header("Content-Length", str(server.announced or len(server.content)))
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@contextmanager
def serving() -> Iterator[Server]:
    behaviour = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, behaviour))
    behaviour.url = f"http://127.0.0.1:{http.server_port}/weights.bin"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield behaviour
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as behaviour:
        yield behaviour


@pytest.fixture
def dead_url() -> str:
    """An address on this machine where nobody answers any more."""
    with serving() as behaviour:
        return behaviour.url


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


# --- the paper stack ------------------------------------------------------------------------------


@pytest.fixture
def paper(server: Server, dead_url: str, tmp_path: Path, monkeypatch) -> Path:
    """A paper stack from the server on this machine; the first source of its second file is dead, and of its third
    no hash is published, as of the real one.

    Returns the folder it is fetched into.
    """
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    stack = STACKS["paper"]
    here = replace(
        stack,
        clip=replace(stack.clip, sha256=DIGEST, urls=(server.url,)),
        sam=replace(stack.sam, sha256=DIGEST, urls=(dead_url, server.url)),
        itm=replace(
            stack.itm,
            urls=(server.url,),
            vocabulary=replace(stack.itm.vocabulary, sha256=DIGEST, urls=(server.url,)),
        ),
    )
    monkeypatch.setitem(STACKS, "paper", here)
    return tmp_path / "paper"


def test_fetch_says_what_it_will_bring_and_asks(paper: Path, server: Server, monkeypatch, capsys) -> None:
    monkeypatch.setattr("builtins.input", lambda question: print(question) or "n")
    fetch_paper()
    said = capsys.readouterr().out
    assert "ViT-B-16.pt: about 351 MB, MIT licence" in said
    assert "sam_vit_b_01ec64.pth: about 375 MB, Apache-2.0 licence" in said
    assert server.url in said and str(paper) in said
    assert "Fetch? [y/N]" in said and "Nothing was fetched." in said
    assert server.asked == []


def test_fetch_without_a_keyboard_fetches_nothing(paper: Path, server: Server, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    fetch_paper()
    assert server.asked == []


def test_fetch_tries_the_second_source_and_skips_what_is_there(
    paper: Path, server: Server, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "y")
    names = ("ViT-B-16.pt", "sam_vit_b_01ec64.pth", "ALBEF.pth", "bert-base-uncased-vocab.txt")
    assert paper_status() == dict.fromkeys(names, "missing")
    fetch_paper()
    assert paper_status() == dict.fromkeys(names, "ready")
    assert "complete" in capsys.readouterr().out

    asked = len(server.asked)
    fetch_paper()
    assert len(server.asked) == asked

    (paper / "ViT-B-16.pt").write_bytes(b"damaged")
    assert paper_status()["ViT-B-16.pt"] == "damaged"
    fetch_paper(ask=False)
    assert paper_status()["ViT-B-16.pt"] == "ready"


def test_fetch_without_any_source_says_what_to_do(paper: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(WrisError) as failure:
        fetch_paper(ask=False)
    message = str(failure.value)
    assert message.startswith("ViT-B-16.pt could not be fetched: 127.0.0.1")
    assert "404 Not Found" in message
    assert f"or copy the file to {paper / 'ViT-B-16.pt'} by hand." in message
    assert "python -m wris_lib fetch paper" in message


def test_an_interrupted_fetch_is_seen_and_resumed(paper: Path, server: Server) -> None:
    server.stop_after = 1_000_000
    with pytest.raises(WrisError, match="broke off after 1.0 MB, which are kept; .*again"):
        fetch_paper(ask=False)
    assert paper_status()["ViT-B-16.pt"] == "begun"
    server.stop_after = None
    fetch_paper(ask=False)
    assert server.asked[1].startswith("bytes=9")
    assert paper_status()["ViT-B-16.pt"] == "ready"


def test_the_hash_of_a_file_without_a_published_one_is_recorded(paper: Path, server: Server) -> None:
    itm, other = STACKS["paper"].itm, CONTENT[:-1] + b"x"
    server.hashes = (MD5,)
    fetch_paper(ask=False)
    assert (paper / "SHA256SUMS").read_text() == f"{DIGEST}  ALBEF.pth\n"
    assert checkpoints.expected_sha256(itm) == DIGEST

    # From now on it is a hash like the published ones: for what lies there, and for what is fetched.
    (paper / itm.file).write_bytes(other)
    assert paper_status()[itm.file] == "damaged"
    server.content, server.hashes = other, ()
    with pytest.raises(WrisError, match="ALBEF.pth could not be fetched: .*SHA-256 begins with .* instead of"):
        fetch_paper(ask=False)
    server.content = CONTENT
    fetch_paper(ask=False)
    assert paper_status()[itm.file] == "ready"
    assert (paper / itm.file).read_bytes() == CONTENT


def test_a_file_without_a_hash_is_used_only_after_a_comparison(paper: Path, server: Server, capsys) -> None:
    itm = STACKS["paper"].itm
    server.hashes = (MD5,)
    fetch_paper(ask=False)
    (paper / "SHA256SUMS").unlink()  # as if the file had been copied there by hand
    asked = len(server.asked)
    assert paper_status() | {itm.file: "ready"} == dict.fromkeys(paper_status(), "ready")
    assert paper_status()[itm.file] == "unchecked"
    sentence = (
        "ALBEF.pth has not been compared with its source yet; run `python -m wris_lib fetch paper`, which does that"
    )
    with pytest.raises(WrisError, match=f"{sentence} without fetching it again"):
        load_weights(nn.Linear(3, 2), itm)

    capsys.readouterr()
    fetch_paper(ask=False)
    assert "unless the file that is there turns out to be the same" in capsys.readouterr().out
    assert len(server.asked) == asked
    assert paper_status()[itm.file] == "ready"


def test_a_wrong_file_put_there_by_hand_is_replaced(paper: Path, server: Server) -> None:
    server.hashes = (MD5,)
    paper.mkdir()
    (paper / "ALBEF.pth").write_bytes(b"x" * len(CONTENT))
    fetch_paper(ask=False)
    assert (paper / "ALBEF.pth").read_bytes() == CONTENT
    assert checkpoints.expected_sha256(STACKS["paper"].itm) == DIGEST


def test_nothing_is_recorded_of_a_file_that_could_not_be_compared(paper: Path, server: Server) -> None:
    server.length = False
    with pytest.raises(WrisError, match="ALBEF.pth could not be fetched: .* announces neither MD5 nor length"):
        fetch_paper(ask=False)
    assert not (paper / "SHA256SUMS").exists()
    assert paper_status()["ALBEF.pth"] == "begun"


# --- the table ------------------------------------------------------------------------------------


def test_stacks_are_chosen_by_name_then_by_environment(monkeypatch) -> None:
    monkeypatch.delenv("WRIS_STACK", raising=False)
    assert get_stack().name == "toy"
    monkeypatch.setenv("WRIS_STACK", "paper")
    assert get_stack().name == "paper"
    assert get_stack("toy").name == "toy"
    monkeypatch.setenv("WRIS_STACK", "papr")
    with pytest.raises(WrisError, match=r"there is no stack 'papr'; choose one of: toy, paper\."):
        get_stack()


def test_what_has_not_been_fetched_is_said_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    with pytest.raises(WrisError, match=r"ViT-B-16\.pt is missing; fetch it with `python -m wris_lib fetch paper`"):
        checkpoints.checkpoint_path(STACKS["paper"].clip)


def test_files_of_a_stack_are_all_its_parts_but_packages() -> None:
    toy, paper = STACKS["toy"], STACKS["paper"]
    learnt_here = (toy.ppt, toy.tris, toy.pcnet)
    assert toy.checkpoints == (toy.clip, toy.sam, toy.parser, toy.llm, toy.itm, *learnt_here, toy.itm.vocabulary)
    assert paper.checkpoints == (paper.clip, paper.sam, paper.itm, paper.itm.vocabulary)
    assert paper.parser == "en_core_web_sm"


def test_every_downloaded_file_has_a_size_a_licence_and_all_but_albef_a_hash_and_two_sources() -> None:
    for checkpoint in STACKS["paper"].checkpoints:
        assert checkpoint.megabytes and checkpoint.licence
        assert all(url.startswith("https://") for url in checkpoint.urls)
        if checkpoint.file == "ALBEF.pth":
            assert checkpoint.sha256 is None and len(checkpoint.urls) == 1
        else:
            assert re.fullmatch("[0-9a-f]{64}", checkpoint.sha256) and len(checkpoint.urls) >= 2


def test_openai_names_the_hash_in_its_address_as_open_clip_does() -> None:
    from open_clip import pretrained

    clip = STACKS["paper"].clip
    assert pretrained.get_pretrained_url(clip.model_name, "openai") == clip.urls[0]
    assert clip.sha256 in clip.urls[0]


# --- toy weights and their recorded hashes --------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path, monkeypatch) -> Path:
    """A folder in place of the packaged weights."""
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    return tmp_path


TOY = Checkpoint(file="toy.safetensors")


def save_toy(folder: Path, model: nn.Module, record: bool = True) -> None:
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / TOY.file)
    if record:
        checkpoints.record_sha256(folder / TOY.file)


def test_toy_weights_are_recorded_and_loaded(weights: Path) -> None:
    (weights / "other.bin").write_bytes(b"other")
    checkpoints.record_sha256(weights / "other.bin")
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    save_toy(weights, saved)
    load_weights(loaded, TOY)
    torch.testing.assert_close(loaded.weight, saved.weight.half().float())

    lines = (weights / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{files.sha256(weights / name)}  {name}" for name in ("other.bin", "toy.safetensors")]


def test_retrained_weights_replace_their_line(weights: Path) -> None:
    save_toy(weights, nn.Linear(3, 2))
    save_toy(weights, nn.Linear(3, 2))
    assert len((weights / "SHA256SUMS").read_text().splitlines()) == 1
    load_weights(nn.Linear(3, 2), TOY)


def test_toy_weights_that_are_missing_unrecorded_or_damaged(weights: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(WrisError, match="toy.safetensors is missing; install the library again"):
        load_weights(model, TOY)
    save_toy(weights, model, record=False)
    with pytest.raises(WrisError, match="SHA256SUMS has no line for toy.safetensors"):
        load_weights(model, TOY)
    checkpoints.record_sha256(weights / TOY.file)
    content = bytearray((weights / TOY.file).read_bytes())
    content[-1] ^= 1
    (weights / TOY.file).write_bytes(content)
    with pytest.raises(WrisError, match="is damaged or not the file it should be: its SHA-256 begins with"):
        load_weights(model, TOY)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(4, 2), r"size mismatch for weight: .*\[2, 4\].*\[2, 3\]"),
        (nn.Linear(3, 2, bias=False), 'Missing key.*"bias"'),
        (nn.Bilinear(3, 3, 2), "size mismatch for weight"),
    ],
)
def test_a_checkpoint_of_another_model(weights: Path, other: nn.Module, words: str) -> None:
    save_toy(weights, other)
    with pytest.raises(WrisError, match=f"toy.safetensors was made for another model: {words}") as failure:
        load_weights(nn.Linear(3, 2), TOY)
    assert "\n" not in str(failure.value)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if name != "queue"}


def test_a_state_is_converted_before_it_is_loaded(weights: Path) -> None:
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {f"module.{name}": tensor for name, tensor in saved.state_dict().items()}
    save_file(state | {"queue": torch.zeros(5)}, weights / TOY.file)
    checkpoints.record_sha256(weights / TOY.file)
    with pytest.raises(WrisError, match="made for another model: Missing key"):
        load_weights(loaded, TOY)
    load_weights(loaded, TOY, renamed)
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict())
    with pytest.raises(WrisError, match="made for another model: size mismatch for weight"):
        load_weights(nn.Linear(4, 2), TOY, renamed)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_model_saved_together_with_its_training(tmp_path: Path, zipped: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-4], "warmup_t": 20},
        "config": {"image_res": 256, "train_file": ["a.json", "b.json"], "distill": True},
        "epoch": 29,
    }
    torch.save(saved, tmp_path / "all.pth", _use_new_zipfile_serialization=zipped)
    state = load_state(tmp_path / "all.pth")
    assert list(state) == ["weight", "bias"]
    torch.testing.assert_close(state, dict(model.state_dict()), check_device=False)


def test_a_tensor_may_be_called_model(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2), "bias": torch.zeros(1)}, tmp_path / "weights.pth")
    assert list(load_state(tmp_path / "weights.pth")) == ["model", "bias"]


# --- files that are not checkpoints ---------------------------------------------------------------


class Hostile:
    """Unpickling this creates a file: what a downloaded checkpoint must never be able to do."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (open, (str(self.trace), "w"))


def test_a_hostile_pickle_is_refused_and_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"weight": Hostile(trace)}, tmp_path / "new.pth")
    torch.save({"weight": Hostile(trace)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    beside = {"model": {"weight": torch.zeros(1)}, "config": Hostile(trace)}
    torch.save(beside, tmp_path / "beside.pth")
    for name in ("new.pth", "old.pth", "plain.pth", "beside.pth"):
        with pytest.raises(WrisError, match=f"{name} cannot be read as a checkpoint"):
            load_state(tmp_path / name)
    assert not trace.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes()).close()
    assert trace.exists()  # it would have been


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))


def torn(content: bytes) -> bytes:
    return content[:100] + content[200:]


def replaced(content: bytes) -> bytes:
    return b"<html>Not found</html>"


def emptied(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, zeroed, torn, replaced, emptied])
@pytest.mark.parametrize("suffix", [".pth", ".old.pth", ".pt", ".safetensors"])
def test_unreadable_files(tmp_path: Path, suffix: str, damage) -> None:
    path = tmp_path / f"weights{suffix}"
    model = nn.Linear(64, 64)
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    elif suffix == ".pt":
        torch.jit.script(model).save(path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pth")
    load_state(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WrisError, match=re.escape(f"{path} cannot be read as a checkpoint: it is damaged")):
        load_state(path)


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    for content in ([1, 2], {"epoch": 3}, {"state_dict": {"weight": torch.zeros(1)}}, {"model": {"epoch": 3}}):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(WrisError, match="is not a checkpoint: expected a dictionary of tensors"):
            load_state(tmp_path / "weights.pth")


def test_a_torchscript_archive_without_openais_numbers(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("context_length", torch.tensor(77))
    torch.jit.script(model).save(tmp_path / "weights.pt")
    state = load_state(tmp_path / "weights.pt")
    assert set(state) == {"weight", "bias"}
