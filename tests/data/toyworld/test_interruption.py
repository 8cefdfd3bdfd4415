"""Making the toy world is interrupted, short of disk, or asked for twice: it is there as a whole, or not at all."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from wris_lib.data.toyworld import build
from wris_lib.errors import WrisError

# `python -m wris_lib toyworld` for a world of another size.
COMMAND = """
import sys
from functools import partial

from wris_lib.__main__ import main
from wris_lib.data.toyworld import build

if __name__ == "__main__":
    scale, processes = float(sys.argv[1]), int(sys.argv[2])
    build.write_world = partial(build.write_world, scale=scale, processes=processes)
    sys.exit(main(["toyworld"]))
"""


class Run(subprocess.Popen):
    """The command at work on a cache of its own, in a process group of its own."""

    def __init__(self, folder: Path, scale: float, processes: int, script: str = COMMAND, **options) -> None:
        self.cache = folder / "cache"
        self.world = self.cache / f"toyworld-{build.VERSION}"
        (folder / "command.py").write_text(script)
        super().__init__(
            [sys.executable, str(folder / "command.py"), str(scale), str(processes)],
            env={**os.environ, "WRIS_CACHE": str(self.cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def wait_for_pictures(self) -> None:
        deadline = time.monotonic() + 300
        while not any(self.cache.rglob("*.jpg")):
            assert self.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    def leftovers(self) -> list[str]:
        return [name for name in os.listdir(self.cache) if not name.endswith(".lock")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator:
    """Starts runs on one cache, and ends what a failed test leaves of them."""
    started: list[Run] = []

    def start(*arguments, **options) -> Run:
        started.append(Run(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_killed_run_takes_its_workers_along_and_the_next_one_starts_clean(run) -> None:
    killed = run(1.0, 2)
    killed.wait_for_pictures()
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.communicate()
    assert not killed.world.exists()
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]

    again = run(0.001, 1)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and output == f"{again.world}\n"
    assert again.leftovers() == [again.world.name]
    assert {path.name for path in again.world.iterdir()} == {"images", *build.DATASETS}


def test_ctrl_c_leaves_nothing_behind(run) -> None:
    interrupted = run(1.0, 2, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    interrupted.wait_for_pictures()
    os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, errors = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130
    assert "Traceback" not in errors
    assert interrupted.leftovers() == []


def test_a_full_disk_in_a_worker_is_one_sentence(run) -> None:
    """Pictures are larger than 3 kB, and this run may not write larger files."""
    stopped = run(1.0, 2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000)))
    _, errors = stopped.communicate(timeout=300)
    assert stopped.returncode == 2
    assert "error: cannot write to" in errors and "Traceback" not in errors
    assert stopped.leftovers() == []


def test_two_at_once_make_it_once(run) -> None:
    both = [run(0.005, 1), run(0.005, 1)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [output for output, _ in outputs] == [f"{both[0].world}\n"] * 2
    assert sum("toy world" in errors for _, errors in outputs) == 1  # the progress bar of the one that made it


def test_a_script_without_main_guard_is_told_so_instead_of_waiting_for_itself(run) -> None:
    script = "from wris_lib.data import toyworld\ntoyworld.ensure()\n"
    _, errors = run(1.0, 2, script=script).communicate(timeout=300)
    assert 'put the script\'s code under `if __name__ == "__main__":`' in errors


def test_a_worker_that_is_killed_is_not_waited_for(capfd) -> None:
    with pytest.raises(WrisError, match="pictures: a worker process was ended from outside"):
        list(build.run_parallel(os._exit, [1, 1], "pictures", 2))
