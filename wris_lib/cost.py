"""What an answer costs: milliseconds, memory, trained parameters. Measured on its own, never taken from records.

Each row has a process to itself, so that its peak of memory is its own, and asks about the same images, which it has
not seen before: the image is encoded, proposals are made, sentences are taken apart, nothing comes from a cache. Then
it asks *again*, another expression about the same image. Models are loaded and warm, which other images have seen to.
On a GPU the clock is stopped when the GPU is done.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from wris_lib import questions
from wris_lib.contestants import Contestant
from wris_lib.data.images import load_image
from wris_lib.data.refer import EvaluationItem
from wris_lib.methods import load_method

Cost = dict[str, Any]

IMAGES = 20  # that are timed
WARM_UP = 3  # before them


def measure(
    rows: Sequence[Contestant], spec: str, items: Sequence[EvaluationItem], seed: int, stack: str
) -> dict[str, Cost]:
    """The cost of each row, one after the other.

    Args:
        rows: methods with their options.
        spec: name of the split.
        items: the split's; those to be asked are drawn, the same for every row.
        seed: of that draw.
        stack: "toy" or "paper".

    Returns:
        By a row's name "milliseconds" for the first expression about an image (median) and their "quartiles", "again",
        the median for another expression about it, "megabytes" (the peak: of the GPU's memory where there is one,
        otherwise of the process with Python and its packages), "parameters" trained for the task, "supervision", and
        how that was measured: "threads", "images" and "data".

    Raises:
        WrisError: weights are missing or damaged.
    """
    images = questions.draw(items, limit=None, seed=seed)
    order = np.random.default_rng(seed).permutation(len(images))[: WARM_UP + IMAGES]
    chosen = [(items[images[index][0]], items[images[index][-1]]) for index in order]
    costs = {}
    for row in tqdm(rows, "what it costs", unit=" rows"):
        # Not forked: a copy of this process would begin with all that this one has in memory.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            costs[row.name] = process.submit(ask, row, chosen, stack).result() | {"data": spec}
    return costs


def ask(row: Contestant, pairs: Sequence[tuple[EvaluationItem, EvaluationItem]], stack: str) -> Cost:
    """`measure` for one row, in this process, whose cache is an empty one afterwards.

    Args:
        row: a method with its options.
        pairs: two expressions about an image, each pair about another one; `WARM_UP` of them to get warm.
        stack: "toy" or "paper".
    """
    predict = row.load(stack)
    parameters = _parameters(row, stack)  # looks into the cache, too
    with tempfile.TemporaryDirectory() as empty:
        os.environ["WRIS_CACHE"] = empty  # proposals and answers of language models would come from there
        seconds = np.array([[_seconds(predict, item) for item in pair] for pair in pairs])
        seconds = seconds[min(WARM_UP, len(pairs) - 1) :]  # a split may have very few images
    low, median, high = np.percentile(seconds[:, 0], [25, 50, 75]) * 1000
    return {
        "milliseconds": round(float(median), 1),
        "quartiles": [round(float(low), 1), round(float(high), 1)],
        "again": round(float(np.median(seconds[:, 1])) * 1000, 1),
        "megabytes": round(peak_memory() / 1e6),
        "parameters": parameters,
        "supervision": row.supervision,
        "threads": torch.get_num_threads(),
        "images": len(seconds),
    }


def peak_memory() -> int:
    """Bytes: the most that torch had on the GPU, or without one the most that this process had in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss would count the parent process, too
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seconds(predict: Any, item: EvaluationItem) -> float:
    image = load_image(item.image_path)
    start = time.perf_counter()
    predict(image, [item])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _parameters(row: Contestant, stack: str) -> int:
    if row.learned is None:
        return 0
    module = getattr(load_method(row.method, stack, **row.options), row.learned)  # which is in memory already
    return sum(parameter.numel() for parameter in module.parameters())
