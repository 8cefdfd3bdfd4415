"""Files are whole or not there: after errors, kills, full disks, and with several processes at work."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

from wris_lib.errors import WrisError
from wris_lib.files import atomic_folder, atomic_write, cache_dir, md5, readable_errors, sha256, write_json


@pytest.fixture
def read_only(tmp_path):
    """A folder in which this user may not write: a context manager, since root must stop being root for it."""
    # Not in tmp_path, which only its owner can enter, nor in a TMPDIR that may be just as private.
    folder = Path(tempfile.mkdtemp(dir="/tmp"))

    @contextlib.contextmanager
    def enter():
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(os.getuid())

    yield enter
    folder.chmod(0o755)
    for child in folder.iterdir():
        child.rmdir()
    folder.rmdir()


@pytest.fixture
def file_size_limit():
    """The kernel refuses to write files beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def dev_full():
    """A file that opens like any other, but the kernel has no room for a single byte of it."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    return "/dev/full"


@pytest.fixture
def full_disk(monkeypatch, dev_full):
    """A disk on which every temporary file is a `dev_full`."""

    def mkstemp(dir, prefix):
        name = Path(dir) / f"{prefix}full"
        name.touch()
        return os.open(dev_full, os.O_WRONLY), str(name)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


def start(code, *arguments):
    """Run Python code in another process; its output can be read line by line."""
    command = [sys.executable, "-u", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


# ------------------------------------------------------------------------------------------------ cache_dir


def test_cache_dir_is_what_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert list(cache_dir().iterdir()) == []


def test_cache_dir_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("WRIS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "wris"


def test_read_only_cache(monkeypatch, read_only):
    with read_only() as folder:
        monkeypatch.setenv("WRIS_CACHE", str(folder))
        with pytest.raises(WrisError, match="may not write there.*WRIS_CACHE"):
            cache_dir()
        monkeypatch.setenv("WRIS_CACHE", str(folder / "new"))
        with pytest.raises(WrisError, match="may not write there.*WRIS_CACHE"):
            cache_dir()


@pytest.mark.parametrize("name", ["taken", "taken/cache"])
def test_cache_dir_where_a_file_is(monkeypatch, tmp_path, name):
    (tmp_path / "taken").touch()
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / name))
    with pytest.raises(WrisError, match="is a file|a file of that name"):
        cache_dir()


# --------------------------------------------------------------------------------------------- atomic_write


def test_a_written_file_is_there_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path, "w") as file:
        file.write("grün")
        assert not path.exists()
    assert path.read_bytes() == "grün".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(WrisError, match="the disk is full; make room"), atomic_write(path) as file:
        file.write(b"new" * 100_000)
    with pytest.raises(WrisError, match="the disk is full"), atomic_write(path) as file:
        file.write(b"few bytes, which fail only when they leave the buffer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_under_torch_save(tmp_path, full_disk):
    """torch hides the system's error behind a RuntimeError about file positions."""
    with pytest.raises(WrisError, match="the disk is full"), atomic_write(tmp_path / "x.pt") as file:
        torch.save({"weight": torch.zeros(100_000)}, file)
    assert os.listdir(tmp_path) == []


def test_a_file_that_grows_too_large(tmp_path, file_size_limit):
    with pytest.raises(WrisError, match="no file of that size"), atomic_write(tmp_path / "file") as file:
        file.write(b"x" * 200_000)
    assert os.listdir(tmp_path) == []


def test_a_read_only_folder(read_only):
    with (
        read_only() as folder,
        pytest.raises(WrisError, match=f"cannot write to {folder}: this user may not"),
        atomic_write(folder / "file"),
    ):
        pass


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "result").mkdir()
    with pytest.raises(WrisError, match="a folder of that name"), atomic_write(tmp_path / "result"):
        pass
    assert os.listdir(tmp_path) == ["result"]


def test_errors_of_reading_are_not_blamed_on_writing(tmp_path):
    with pytest.raises(PermissionError), atomic_write(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "some other file")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "folder"):
        raise FileExistsError(errno.EEXIST, "some other file")
    with pytest.raises(RuntimeError, match="^shapes"), atomic_write(tmp_path / "file"):
        raise RuntimeError("shapes differ")
    assert os.listdir(tmp_path) in ([], [".folder.lock"])


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    process = start(
        """
        import sys, time
        from wris_lib.files import atomic_write
        with atomic_write(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            print("writing")
            time.sleep(60)
        """,
        path,
    )
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


# -------------------------------------------------------------------------------------------- atomic_folder

FILL = """
import sys, time
from pathlib import Path
from wris_lib.files import atomic_folder
path, seconds = Path(sys.argv[1]), float(sys.argv[2])
with atomic_folder(path) as folder:
    if folder is not None:
        (folder / "first").write_text("1")
        print("filling")
        time.sleep(seconds)
        (folder / "second").write_text("2")
print("found", sorted(child.name for child in path.iterdir()))
"""


def test_a_folder_is_made_once(tmp_path):
    path = tmp_path / "deep" / "folder"
    with atomic_folder(path) as folder:
        (folder / "file").write_text("content")
        assert not path.exists()
    assert (path / "file").read_text() == "content"
    with atomic_folder(path) as folder:
        assert folder is None


def test_a_finished_folder_serves_a_read_only_cache(read_only):
    with read_only() as folder, atomic_folder(folder) as to_fill:
        assert to_fill is None
    with read_only() as folder, pytest.raises(WrisError, match="may not write"), atomic_folder(folder / "new"):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_no_folder(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
        raise error
    assert os.listdir(tmp_path) in ([], [".folder.lock"])
    with atomic_folder(tmp_path / "folder") as folder:
        assert list(folder.iterdir()) == []


def test_a_full_disk_leaves_no_folder(tmp_path, dev_full):
    with pytest.raises(WrisError, match="the disk is full"), atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
        Path(dev_full).write_bytes(b"x")
    assert not (tmp_path / "folder").exists()
    assert not (tmp_path / ".folder.partial").exists()


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "folder").touch()
    with pytest.raises(WrisError, match="is a file"), atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
    assert (tmp_path / "folder").is_file()


def test_two_processes_build_a_folder_once(tmp_path):
    processes = [start(FILL, tmp_path / "folder", 0.5) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=60)[0] for process in processes)
    found = "found ['first', 'second']\n"
    assert outputs == ["filling\n" + found, found]


def test_a_killed_builder_leaves_no_folder_and_no_lock(tmp_path):
    path = tmp_path / "folder"
    killed = start(FILL, path, 60)
    assert killed.stdout.readline() == "filling\n"
    waiting = start(FILL, path, 0)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert waiting.communicate(timeout=60)[0] == "filling\nfound ['first', 'second']\n"
    assert not (tmp_path / ".folder.partial").exists()


# ------------------------------------------------------------------------------------------------ the small


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"expression": "grüner Hund 🐕", "mIoU": 26.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["expression"] == "grüner Hund 🐕"
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"mIoU": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["mIoU"] == 26.5


def test_hashes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert md5(tmp_path / "abc") == "900150983cd24fb0d6963f7d28e17f72"


def test_a_read_only_file_system(tmp_path):
    with pytest.raises(WrisError, match="the file system is read-only"), readable_errors(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
