"""One server and one browser for all notebooks.

The unit tests come by here, too, and have no Playwright; so it is imported where it is used.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.server import ROOT, make_lab

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    from tests.browser.chromium import MISSING, find_chromium

    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            pytest.exit(f"error: {MISSING}.", returncode=1)
        with playwright.chromium.launch(executable_path=path, args=["--disable-gpu"]) as browser:
            yield browser
