"""A notebook that is open in JupyterLab in a browser."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Request
from playwright.sync_api import TimeoutError as TookTooLong

from tests.browser.server import ROOT

WATCH = (Path(__file__).parent / "watch.js").read_text(encoding="utf-8")
SIZE = {"width": 1280, "height": 1000}
TALL = 4000  # pixels of a window in which much of a notebook can be seen at once
WIDGET = "application/vnd.jupyter.widget-view+json"
OPENING, CELL, ANSWERING = 180, 600, 180  # seconds of patience
SCROLL = "(element, top) => { element.scrollTop = top; return element.scrollTop; }"
READY = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


class NotebookPage:
    """A notebook in a tab of its own.

    Attributes:
        page: Playwright's.
        path: of the notebook.
        troubles: errors of the page so far, and what it wanted from the network.
        shots: folder for screenshots.
    """

    def __init__(self, browser: Browser, server: dict, path: Path, shots: Path) -> None:
        """Open a notebook and wait for its kernel.

        Args:
            browser: Playwright's.
            server: what `make_lab` yields.
            path: of the notebook, in the checkout.
            shots: folder for screenshots; made when it is needed.
        """
        self.path, self.shots, self.troubles = path, shots, []
        self._server = server["url"]
        self.page = browser.new_page(viewport=SIZE)
        self.page.set_default_timeout(1000 * ANSWERING)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.troubles.append(f"the page's scripts failed: {error}"))
        self.page.on("request", self._requested)
        self.page.goto(
            f"{self._server}lab/tree/{path.relative_to(ROOT).as_posix()}?reset&token={server['token']}",
            timeout=1000 * OPENING,
        )
        self.wait(READY, OPENING)
        self.page.evaluate(f"window.watch = {WATCH}")

    def ask(self, expression: str) -> Any:
        """The value of an expression, in whose scope is all that watch.js offers."""
        return self.page.evaluate(f"watch.{expression}")

    def wait(self, condition: str, seconds: float = ANSWERING) -> None:
        self.page.wait_for_function(condition, timeout=1000 * seconds, polling=100)

    def run(self) -> None:
        """Run all cells.

        Raises:
            RuntimeError: A cell has not ended in time.
        """
        self.ask("run()")
        while self.ask("running"):
            done = self.ask("ended")
            try:
                self.wait(f"!watch.running || watch.ended > {done}", CELL)
            except TookTooLong:
                waiting = [cell["id"] for cell in self.cells() if cell["count"] is None]
                raise RuntimeError(f"{self.path.name}: not ended in {CELL} s: {waiting[:1]}") from None
        self.settle()

    def cells(self) -> list[dict]:
        """The cells with code: "index", "id", "count", "outputs"."""
        return self.ask("code()")

    def show(self, cell: dict) -> Locator:
        """Scroll to a cell; its output."""
        self.ask(f"show({cell['index']})")
        output = self.page.locator(f'[data-cell="{cell["id"]}"]')
        output.wait_for(state="attached")
        return output

    def settle(self) -> None:
        """Wait until the kernel has answered all controls. One that moves fast is told of in two messages."""
        for _ in range(2):
            self.wait("watch.settled()")
            self.page.wait_for_timeout(60)

    def set_theme(self, dark: bool) -> None:
        self.ask(f"theme('JupyterLab {'Dark' if dark else 'Light'}')")
        self.wait(f"document.body.dataset.jpThemeLight === '{str(not dark).lower()}'")

    def shoot(self, name: str, what: Locator | None = None) -> None:
        """Keep a screenshot, of the page or of a part of it."""
        self.shots.mkdir(parents=True, exist_ok=True)
        (what or self.page).screenshot(path=self.shots / f"{name}.png")

    def shoot_all(self, name: str) -> None:
        """Keep screenshots of the whole notebook, from top to bottom."""
        self.page.set_viewport_size({"width": SIZE["width"], "height": TALL})
        scroller = self.page.locator(".jp-Notebook .jp-WindowedPanel-outer").first
        number, top = 0, -1
        while top != (top := scroller.evaluate(SCROLL, number * (TALL - 200))):
            number += 1
            self.page.wait_for_timeout(500)  # for what is drawn only now
            self.shoot(f"{name}-{number:02}")
        self.page.set_viewport_size(SIZE)

    def close(self) -> None:
        self.ask("close()")
        self.page.close()

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.troubles.append(f"the console says: {message.text} ({message.location['url']})")

    def _requested(self, request: Request) -> None:
        if not request.url.startswith((self._server, self._server.replace("http", "ws", 1), "data:", "blob:")):
            self.troubles.append(f"the page asked the network for {request.url}")
