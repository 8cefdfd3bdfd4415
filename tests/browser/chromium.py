"""Where a Chromium for the tests is. `python -m tests.browser.chromium` names it, or says how to get one."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "no Chromium was found, which the tests in a browser need; install one with"
    " `.venv/bin/python -m playwright install --with-deps chromium`, or put one of these on PATH: " + ", ".join(NAMES)
)


def find_chromium(playwright: Playwright) -> str | None:
    """The path of Playwright's own Chromium if that is installed, else of the first on PATH; None: there is none."""
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else next(filter(None, map(shutil.which, NAMES)), None)


def main() -> int:
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
    if path is None:
        print(f"error: {MISSING}.", file=sys.stderr)
        return 1
    print(f"The browser is {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
