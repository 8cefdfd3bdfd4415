"""New processes for tests, without the seconds in which each would import torch.

A server imports it once, before any test has touched it there, and forks whenever a process is wanted. Such a process
has none of the tests' own state: no import hook, no patches, no `PartialState`.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["accelerate", "hypothesis", "matplotlib.pyplot", "open_clip", "pytest", "segment_anything", "torch.distributed"]
)
PATIENCE = 600  # seconds; machines are busy


def start(log: Path, function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call a module's function in a new process.

    Args:
        log: file for what it writes to standard error.
        function: is imported there.
        arguments: are pickled.
    """
    process = CONTEXT.Process(target=_call, args=(log, {**os.environ}, function, arguments), daemon=True)
    process.start()
    return process


def run(log: Path, function: Callable[..., object], *arguments: object) -> int:
    """`start`, and wait. Returns the exit code; -9 if the process was killed."""
    process = start(log, function, *arguments)
    process.join(PATIENCE)
    return process.exitcode


def run_two(folder: Path, function: Callable[..., object], *arguments: object) -> None:
    """Call a function in two processes that know of each other, as `accelerate launch` would start them.

    Args:
        folder: where they meet.
        function: is imported there.
        arguments: are pickled.
    """
    logs = [folder / f"process {rank}.txt" for rank in range(2)]
    both = [start(log, _join, folder / "meeting", rank, function, *arguments) for rank, log in enumerate(logs)]
    for process in both:
        process.join(PATIENCE)
    assert [process.exitcode for process in both] == [0, 0], "\n".join(log.read_text() for log in logs)


def _call(log: Path, surroundings: dict[str, str], function: Callable[..., object], arguments: tuple) -> None:
    sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - the process ends with it
    os.environ.clear()  # the server's, which may have been started by another test
    os.environ.update(surroundings | {"CUDA_VISIBLE_DEVICES": ""})
    function(*arguments)


def _join(meeting: Path, rank: int, function: Callable[..., object], *arguments: object) -> None:
    from torch import distributed

    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=2)
    function(*arguments)
    distributed.destroy_process_group()
