"""One server and one browser for all notebooks."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.chromium import MISSING, find_chromium
from tests.browser.server import ROOT, make_lab

BUILD = ROOT / "build" / "browser"


@pytest.fixture(scope="session", autouse=True)
def cache() -> None:
    """Notebooks find what they found before: the cache is the one of `make lab`, not the other tests' empty one."""


@pytest.fixture(scope="session")
def build() -> Path:
    """The folder of screenshots, empty."""
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    return BUILD


@pytest.fixture(scope="session")
def server(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    with make_lab(tmp_path_factory.mktemp("lab"), build / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            pytest.exit(f"error: {MISSING}.", returncode=1)
        with playwright.chromium.launch(executable_path=path, args=["--disable-gpu"]) as browser:
            yield browser
