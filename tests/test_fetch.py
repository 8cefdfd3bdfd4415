"""`fetch`: what it says, asks and brings, from a real server on this machine."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from tests.serving import CONTENT, DIGEST, MD5, Server
from wris_lib.backbones import checkpoints
from wris_lib.backbones.checkpoints import STACKS, paper_status
from wris_lib.backbones.loading import load_weights
from wris_lib.errors import WrisError
from wris_lib.fetch import fetch_paper

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
    assert "ViT-B-16.pt: about 351 MB; licence: MIT\n" in said
    assert "sam_vit_b_01ec64.pth: about 375 MB; licence: Apache-2.0\n" in said
    sam = STACKS["paper"].sam
    assert f"    from {sam.urls[0]}\n    or   {server.url}\n" in said and str(paper) in said
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
