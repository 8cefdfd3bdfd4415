"""`fetch paper --data`: real datasets, in small, from a server on this machine."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pytest
from PIL import Image

from tests.data.test_refer import HEIGHT, INSTANCES, REFS, WIDTH
from tests.serving import Server
from wris_lib import data, fetch
from wris_lib.backbones.checkpoints import STACKS
from wris_lib.data import archives
from wris_lib.data.archives import data_status, needed, unpack
from wris_lib.errors import WrisError
from wris_lib.fetch import fetch_paper

PICTURES = [image["file_name"] for image in INSTANCES["images"]]


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((WIDTH, HEIGHT), 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def annotations(dataset: str) -> dict[str, bytes]:
    """The files of REFER's zip, two of them of no use."""
    return {
        f"{dataset}/": b"",
        f"{dataset}/instances.json": json.dumps(INSTANCES).encode(),
        f"{dataset}/refs(google).p": pickle.dumps(REFS[:1]),
        f"{dataset}/refs(unc).p": pickle.dumps(REFS),
        f"__MACOSX/{dataset}/._instances.json": b"Mac",
        f"{dataset}/.DS_Store": os.urandom(200_000),  # more than one of the downloader's pieces
    }


@pytest.fixture
def publish(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Put a zip file on the server, in place of what the table has under its name."""

    def publish(name: str, content: bytes) -> None:
        changes = {"sha256": hashlib.sha256(content).hexdigest()}
        changes["urls"] = (server.url.replace("weights.bin", f"{name}.zip"),)
        server.files[f"{name}.zip"] = content
        if name == "train2014":
            monkeypatch.setattr(archives, "TRAIN2014", replace(archives.TRAIN2014, **changes))
        else:
            monkeypatch.setitem(archives.DATASETS, name, replace(archives.DATASETS[name], **changes))

    return publish


@pytest.fixture
def root(publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Datasets on the server, checkpoints that are there, and a cache; returns the folder of real datasets."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "paper_status", lambda: {part.file: "ready" for part in STACKS["paper"].checkpoints})
    publish("refcoco", zipped(annotations("refcoco")))
    publish("refcoco+", zipped(annotations("refcoco+")))
    publish("train2014", zipped({"train2014/readme.txt": b""} | {f"train2014/{name}": jpeg() for name in PICTURES}))
    return tmp_path / "cache" / "data"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder with COCO's pictures, as people have it."""
    folder = tmp_path / "coco" / "train2014"
    folder.mkdir(parents=True)
    for name in PICTURES:
        (folder / name).write_bytes(jpeg())
    return folder


def names(folder: Path) -> set[str]:
    """All files in a folder but locks."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.suffix != ".lock"}


# --- a whole run ----------------------------------------------------------------------------------


def test_it_says_asks_brings_and_then_the_data_can_be_loaded(root: Path, server: Server, monkeypatch, capsys) -> None:
    monkeypatch.setattr("builtins.input", lambda question: print(question) or "y")
    fetch_paper(["refcoco"])

    said = capsys.readouterr().out
    assert f"To be fetched into {root}:" in said
    assert "refcoco.zip: about 54 MB, unpacked about 190 MB; licence: Apache-2.0 (REFER) for the sentences" in said
    assert "train2014.zip: about 13511 MB, unpacked about 13600 MB; licence: the photographers', under Flickr's" in said
    assert all(f"from {archive.urls[0]}\n" in said for archive in needed(["refcoco"]))
    assert said.index("Fetch? [y/N]") < said.index(f"refcoco is complete in {root}; ")
    assert said.endswith("its expressions: 2 in train, 1 in val, 4 in test.\n")

    assert server.asked_for == ["refcoco.zip", "train2014.zip"]
    pictures = {f"images/mscoco/images/train2014/{name}" for name in PICTURES}
    assert names(root) == {"refcoco/instances.json", "refcoco/refs(unc).p", "refcoco/refs(google).p", *pictures}
    (item,) = data.load("refcoco:val").items
    assert item.expression == "right guy" and item.mask.sum() == 25
    assert Image.open(item.image_path).size == (WIDTH, HEIGHT)
    assert len(data.load_training("refcoco:train").items) == 2


def test_what_is_there_is_neither_asked_for_nor_fetched_again(root: Path, server: Server, monkeypatch, capsys) -> None:
    fetch_paper(["refcoco"], ask=False)
    monkeypatch.setattr("builtins.input", None)
    fetch_paper(["refcoco"])
    assert len(server.asked) == 2
    assert "To be fetched" not in capsys.readouterr().out.split("complete in")[-1]
    fetch_paper(["refcoco+", "refcoco"], ask=False)  # its pictures are the same
    assert server.asked_for[2:] == ["refcoco+.zip"]
    assert data_status() == {"refcoco": "ready", "refcoco+": "ready", "refcocog": "missing"}


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "maybe\n"])
def test_refusal(answer: str, root: Path, server: Server, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    fetch_paper(["refcoco"])
    assert "Nothing was fetched." in capsys.readouterr().out
    assert server.asked == [] and names(root) == set()


def test_checkpoints_and_data_are_asked_for_together(root: Path, server: Server, monkeypatch, capsys) -> None:
    status = fetch.paper_status() | {"ALBEF.pth": "missing"}
    monkeypatch.setattr(fetch, "paper_status", lambda: status)
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    fetch_paper(["refcoco"])
    said = capsys.readouterr().out
    assert len(questions) == 1 and "ALBEF.pth: about 3490 MB" in said and "refcoco.zip: about 54 MB" in said
    fetch_paper()
    assert "refcoco" not in capsys.readouterr().out


def test_the_folder_that_wris_data_names(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_DATA", str(tmp_path / "mine"))
    fetch_paper(["refcoco"], ask=False)
    assert not root.exists()
    assert data.load("refcoco:val").items[0].image_path.is_relative_to(tmp_path / "mine")


# --- what goes wrong on the way -------------------------------------------------------------------


def test_an_interrupted_download_goes_on(root: Path, server: Server) -> None:
    server.stop_after = 150_000
    with pytest.raises(WrisError, match=r"refcoco\.zip could not be fetched: .*broke off.*fetch paper --data refcoco`"):
        fetch_paper(["refcoco"], ask=False)
    kept = (root / "refcoco.zip.partial").stat().st_size
    assert 0 < kept <= 150_000 and data_status()["refcoco"] == "begun" and not (root / "refcoco").exists()
    server.stop_after = None
    fetch_paper(["refcoco"], ask=False)
    assert server.asked == [None, f"bytes={kept}-", None]
    assert data_status()["refcoco"] == "ready"


def test_without_a_network_it_says_what_to_do(root: Path, server: Server, dead_url: str, monkeypatch) -> None:
    archive = replace(archives.DATASETS["refcoco"], urls=(dead_url, dead_url))
    monkeypatch.setitem(archives.DATASETS, "refcoco", archive)
    path = re.escape(str(root / "refcoco.zip"))
    with pytest.raises(WrisError, match=rf"cannot be reached; 127.*check the network .* copy the file to {path} by"):
        fetch_paper(["refcoco"], ask=False)
    (root / "refcoco.zip").write_bytes(server.files["refcoco.zip"])
    fetch_paper(["refcoco"], ask=False)
    assert server.asked_for == ["train2014.zip"]


def test_a_file_with_another_hash_is_removed(root: Path, server: Server) -> None:
    server.files["refcoco.zip"] += b"more"
    with pytest.raises(WrisError, match=r"sent another file than expected \(SHA-256 begins with .* instead of"):
        fetch_paper(["refcoco"], ask=False)
    assert names(root) == set()


def cut(content: bytes) -> bytes:
    return content[:-10]


def flipped(content: bytes) -> bytes:
    return content[:200] + bytes([content[200] ^ 255]) + content[201:]  # in instances.json


@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b"<html>"])
def test_a_damaged_zip_file_leaves_nothing_behind(damage, root: Path, server: Server, publish) -> None:
    publish("refcoco", damage(server.files["refcoco.zip"]))
    with pytest.raises(WrisError, match=r"refcoco\.zip is damaged \(.+\); delete it and fetch it again\.$"):
        fetch_paper(["refcoco"], ask=False)
    assert names(root) == {"refcoco.zip"} and not (root / "refcoco").exists()


def test_a_zip_file_without_what_is_needed(root: Path, publish) -> None:
    publish("refcoco", zipped({"refcoco/instances.json": b"{}"}))
    with pytest.raises(WrisError, match=r"refcoco\.zip has no refs\(\*\)\.p; delete it and fetch it again\.$"):
        fetch_paper(["refcoco"], ask=False)
    assert not (root / "refcoco").exists()


@pytest.mark.parametrize("place", ["../../", "/", "refcoco/../../../", "..\\..\\"])
def test_nothing_in_a_zip_file_lands_outside_its_folder(place: str, tmp_path: Path) -> None:
    place = place if place != "/" else f"{tmp_path}/outside/"
    path = tmp_path / "a" / "b" / "evil.zip"
    path.parent.mkdir(parents=True)
    files = {"refcoco/instances.json": b"{}", f"{place}evil.json": b"{}", f"{place}refs(unc).p": b"evil"}
    path.write_bytes(zipped(files))
    before = names(tmp_path)
    unpack(path, ("instances.json", "*refs(unc).p"), path.parent / "refcoco")
    new = names(tmp_path) - before
    assert len(new) == 2 and all(Path(name).parent == Path("a/b/refcoco") for name in new)


def test_a_link_in_a_zip_file_becomes_an_ordinary_file(tmp_path: Path) -> None:
    link = ZipInfo("refcoco/instances.json")
    link.external_attr = 0o120777 << 16
    with ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    unpack(tmp_path / "evil.zip", ("instances.json",), tmp_path / "refcoco")
    made = tmp_path / "refcoco" / "instances.json"
    assert not made.is_symlink() and made.read_text() == "/etc/passwd"


def test_a_crash_while_unpacking_leaves_no_half_folder(root: Path, server: Server, monkeypatch) -> None:
    copied = []

    def crash(source, target) -> None:
        copied.append(target.write(source.read()))
        if len(copied) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfileobj", crash)
        fetch_paper(["refcoco"], ask=False)
    assert names(root) == {"refcoco.zip"} and data_status()["refcoco"] == "begun"
    fetch_paper(["refcoco"], ask=False)
    assert server.asked_for == ["refcoco.zip", "train2014.zip"]
    assert data_status()["refcoco"] == "ready" and "refcoco.zip" not in names(root)


def test_a_zip_file_left_by_a_run_that_was_killed_is_deleted(root: Path) -> None:
    fetch_paper(["refcoco"], ask=False)
    (root / "refcoco.zip").touch()
    fetch_paper(["refcoco"], ask=False)
    assert "refcoco.zip" not in names(root)


def free(monkeypatch: pytest.MonkeyPatch, megabytes: float) -> None:
    usage = shutil._ntuple_diskusage(10**12, 0, int(megabytes * 1e6))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_asked(root: Path, server: Server, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", None)
    free(monkeypatch, 20_000)
    message = f"{root} has 20000 MB free, but 27355 MB are still to come; make room there, or set WRIS_CACHE"
    with pytest.raises(WrisError, match=re.escape(message)):
        fetch_paper(["refcoco"])
    assert server.asked == []
    (root / "images/mscoco/images").mkdir(parents=True)
    with open(root / "images/mscoco/images/train2014.zip.partial", "wb") as file:
        os.truncate(file.fileno(), 13_000_000_000)  # a file with a hole: it needs no room here
    with pytest.raises(WrisError, match="but 14355 MB are still to come"):
        free(monkeypatch, 14_000)
        fetch_paper(["refcoco"])


def test_room_is_looked_for_again_when_the_sizes_are_known(root: Path, server: Server, monkeypatch) -> None:
    monkeypatch.setattr(archives, "check_disk", lambda lacking: None)
    (root / "refcoco.zip").parent.mkdir(parents=True)
    (root / "refcoco.zip").write_bytes(server.files["refcoco.zip"])
    free(monkeypatch, 0)
    with pytest.raises(WrisError, match=rf"{root} has 0 MB free"):
        fetch_paper(["refcoco"], ask=False)
    assert not (root / "refcoco").exists() and server.asked == []


def test_a_hostile_pickle_is_not_executed(root: Path, publish, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "executed"), "w"))

    publish("refcoco", zipped(annotations("refcoco") | {"refcoco/refs(unc).p": pickle.dumps(Hostile())}))
    with pytest.raises(WrisError, match=r"refs\(unc\)\.p cannot be read as a list of refs \(it asks for .*open"):
        fetch_paper(["refcoco"], ask=False)
    assert not (tmp_path / "executed").exists()


# --- pictures that are there already --------------------------------------------------------------


def test_pictures_that_are_there_are_linked_and_not_fetched(root: Path, coco: Path, server: Server, capsys) -> None:
    fetch_paper(["refcoco"], coco, ask=False)
    assert server.asked_for == ["refcoco.zip"] and "train2014.zip" not in capsys.readouterr().out
    assert (root / "images/mscoco/images/train2014").readlink() == coco.resolve()
    assert data.load("refcoco:val").items[0].image_path.is_file() and data_status()["refcoco"] == "ready"

    moved = coco.rename(coco.with_name("moved"))  # what to do then, is to say it again
    assert data_status()["refcoco"] == "begun"
    fetch_paper(["refcoco"], moved)
    assert server.asked_for == ["refcoco.zip"]
    assert data.load("refcoco:val").items[0].image_path.is_file()


def test_pictures_that_are_there_stay_in_the_command_that_mends(root: Path, coco: Path, server: Server) -> None:
    server.status = 503
    with pytest.raises(WrisError, match=rf"run `python -m wris_lib fetch paper --data refcoco --images {coco}` again"):
        fetch_paper(["refcoco"], coco, ask=False)


def test_a_link_to_pictures_that_are_gone_gives_way_to_fetched_ones(root: Path, coco: Path, server: Server) -> None:
    fetch_paper(["refcoco"], coco, ask=False)
    shutil.rmtree(coco)
    fetch_paper(["refcoco"], ask=False)
    assert server.asked_for == ["refcoco.zip", "train2014.zip"]
    assert not (root / "images/mscoco/images/train2014").is_symlink()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_cocos_pictures(exists: bool, root: Path, tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "holidays"
    if exists:
        folder.mkdir()
        (folder / "beach.jpg").write_bytes(jpeg())
    with pytest.raises(WrisError, match=r"holidays has no COCO_train2014_\*\.jpg; give the folder that COCO's"):
        fetch_paper(["refcoco"], folder, ask=False)
    assert server.asked == []


def test_a_folder_that_lacks_some_pictures(root: Path, coco: Path) -> None:
    (coco / PICTURES[0]).unlink()
    with pytest.raises(WrisError, match=rf"1 of the 1 images of refcoco:train are missing.*{PICTURES[0]}"):
        fetch_paper(["refcoco"], coco, ask=False)
    assert not (root / "images").exists()


def test_pictures_given_where_others_are_already(root: Path, coco: Path, server: Server) -> None:
    fetch_paper(["refcoco"], ask=False)
    with pytest.raises(WrisError, match=r"images/train2014 has pictures already; leave out --images"):
        fetch_paper(["refcoco"], coco, ask=False)
    assert not (root / "images/mscoco/images/train2014").is_symlink()


def test_pictures_of_a_datasets_own(root: Path, coco: Path, server: Server) -> None:
    shutil.copytree(coco, root / "images" / "refcoco")
    fetch_paper(["refcoco"], ask=False)
    assert server.asked_for == ["refcoco.zip"]
    with pytest.raises(WrisError, match="images/refcoco has pictures already"):
        fetch_paper(["refcoco"], coco, ask=False)
    assert archives.TRAIN2014 in needed(["refcoco", "refcoco+"])


# --- the table ------------------------------------------------------------------------------------


def test_every_archive_has_a_size_a_licence_a_hash_and_two_sources() -> None:
    assert list(archives.DATASETS) == ["refcoco", "refcoco+", "refcocog"]
    for archive in (*archives.DATASETS.values(), archives.TRAIN2014):
        assert archive.megabytes and archive.unpacked > archive.megabytes and archive.licence
        assert re.fullmatch("[0-9a-f]{64}", archive.sha256) and len(archive.urls) == 2
        assert all(url.endswith(f"/{archive.file}") for url in archive.urls)
