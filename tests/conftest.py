"""What every test shares: shapes in signatures are checked, and the cache is a folder of the test run's own."""

import os

# Set before torch is imported anywhere: two cores are what CI has, and tiny tensors gain nothing from more threads. Of
# several processes (pytest-xdist's workers) each has a core; they inherit what the first process has set.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

from tests.serving import Server, serving

# From here on, each annotation of a wris_lib function is checked at each call: shapes by jaxtyping, types by beartype.
install_import_hook("wris_lib", "beartype.beartype")

# Machines are busy, and first calls import things: no deadline. The same examples on every machine, so that nobody's
# tests fail by chance; `--hypothesis-profile search` looks for new ones.
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_runtest_setup() -> None:
    """What fixtures draw for a test is the same in every run: models with random weights, above all."""
    torch.manual_seed(0)


def pytest_runtest_call() -> None:
    """And what the test itself draws does not depend on which fixtures had to be made for it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of all tests in this run. Whoever needs the toy world shares the one that the first test makes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"  # one for all workers
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRIS_CACHE", str(folder))
        patch.delenv("WRIS_STACK", raising=False)
        patch.delenv("WRIS_DATA", raising=False)
        yield folder


@pytest.fixture(autouse=True)
def draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh inputs that checks of exercises draw, from generators that nobody seeds, are the same in every run."""
    original, seeds = np.random.default_rng, count()
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: original(next(seeds) if seed is None else seed))


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are composed, but not painted: each is a number. For tests that change a lab often and do not look."""
    from wris_lib.show import Picture

    numbers = count()
    monkeypatch.setattr(Picture, "_encode", lambda *_: b"%d" % next(numbers))


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as behaviour:
        yield behaviour


@pytest.fixture
def dead_url() -> str:
    """An address on this machine where nobody answers any more."""
    with serving() as behaviour:
        return behaviour.url
