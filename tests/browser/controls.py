"""The controls of a lab by their kinds, and how each is worked as a person would."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Locator

from tests.browser.page import NotebookPage

PHRASES = ("the tree", "the dog on the left", "the red car", "the woman")


def _click_picture(picture: Locator, _: Path) -> Iterator[None]:
    box = picture.bounding_box()
    for x, y, keys in ((0.3, 0.4, []), (0.7, 0.6, ["Shift"])):
        picture.click(position={"x": x * box["width"], "y": y * box["height"]}, modifiers=keys)
        yield


def _move_slider(slider: Locator, _: Path) -> Iterator[None]:
    """To the end that is further away, to the other one, and back."""
    handle, box = slider.locator(".noUi-handle"), slider.bounding_box()
    least, now, most = (float(handle.get_attribute(f"aria-value{name}")) for name in ("min", "now", "max"))
    present = (now - least) / (most - least)
    for share in (*((0.02, 0.98) if present > 0.5 else (0.98, 0.02)), present):
        slider.click(position={"x": share * box["width"], "y": box["height"] / 2}, force=True)
        yield


def _write(field: Locator, _: Path) -> Iterator[None]:
    """Each field gets another phrase than those before it."""
    number = int(field.evaluate("field => [...document.querySelectorAll('.widget-text input')].indexOf(field)"))
    for phrase in (PHRASES[number % len(PHRASES)], PHRASES[(number + 1) % len(PHRASES)]):
        field.fill(phrase)
        field.press("Enter")
        yield


def _select(menu: Locator, _: Path) -> Iterator[None]:
    """Some other options, then the one that was there."""
    present = menu.input_value()
    values = [option.get_attribute("value") for option in menu.locator("option").all()]
    for value in [*[value for value in values if value != present][:3], present]:
        menu.select_option(value)
        yield


def _switch(buttons: Locator, _: Path) -> Iterator[None]:
    buttons.locator("button:not(.mod-active)").first.click()
    yield


def _upload(button: Locator, picture: Path) -> Iterator[None]:
    with button.page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files(picture)
    yield


def _press(button: Locator, _: Path) -> Iterator[None]:
    button.click()
    yield


@dataclass(frozen=True)
class Kind:
    """A kind of control.

    Attributes:
        selector: what all of this kind have in common.
        work: works one, and stops after each thing that should be answered.
    """

    selector: str
    work: Callable[[Locator, Path], Iterator[None]]


# In the order in which they are worked: settings first, while the lab shows what its author chose.
KINDS = {
    "picture": Kind('img[style*="crosshair"]', _click_picture),
    "slider": Kind(".widget-slider .noUi-target", _move_slider),
    "menu": Kind(".widget-dropdown select", _select),
    "switch": Kind(".widget-toggle-buttons", _switch),
    "upload": Kind(".widget-upload", _upload),
    "text": Kind(".widget-text input", _write),
    "button": Kind("button.widget-button", _press),
}
ANY = ", ".join(kind.selector for kind in KINDS.values())
NAME = """control => {
    const own = control.closest(".widget-inline-hbox") ?? control;
    const { title, textContent, placeholder, alt } = control;
    return (title || own.querySelector("label")?.textContent || textContent || placeholder || alt || "").trim();
}"""
WITHIN = "(control, selector) => control.closest(selector) !== null"
DRAWING = 20  # seconds
AGAIN, GO = ("Clear", "Reset"), ("Add",)  # buttons that take everything back, and that do what controls are set to


@dataclass(frozen=True)
class Answer:
    """How long the answer to a control took.

    Attributes:
        control: its name.
        milliseconds: from the browser's message until the kernel had nothing left to do.
        sign: whether the lab showed meanwhile that it was at work.
    """

    control: str
    milliseconds: float
    sign: bool


class LabOnPage:
    """A lab in a notebook that was run.

    Attributes:
        output: what the cell shows.
        answers: times of all that was worked.
        idle: names of the controls that changed no picture.
    """

    def __init__(self, page: NotebookPage, cell: dict, upload: Path) -> None:
        """Scroll to the lab.

        Args:
            page: the notebook.
            cell: that shows the lab.
            upload: a picture, for labs that ask for one.
        """
        self.page, self.cell, self.upload = page, cell, upload
        self.output = page.show(cell)
        self._wait()
        self.answers: list[Answer] = []
        self.idle: list[str] = []
        self._told: set[str] = set()  # buttons whose effect was seen together with another control's

    def _wait(self) -> None:
        """Until all is drawn: widgets come one after the other, and their texts after them."""
        self.output.locator(".jupyter-widgets").first.wait_for(state="attached")
        seen, end = None, time.monotonic() + DRAWING
        while seen != (seen := self.names()) or not all(seen) and time.monotonic() < end:
            self.page.page.wait_for_timeout(300)

    def unknown(self) -> list[str]:
        """Controls of a kind that nobody here knows how to work."""
        every = self.output.locator(".jupyter-widgets").locator("input, select, textarea, button")
        return [each.evaluate("each => each.outerHTML") for each in every.all() if not each.evaluate(WITHIN, ANY)]

    def names(self) -> list[str]:
        """Of all controls."""
        return [self._name(control) for control in self.output.locator(ANY).all()]

    def texts(self) -> list[tuple[str, float]]:
        """All texts, each with its contrast to the background, 1..21."""
        self.page.show(self.cell)
        return self.page.ask(f"texts({self.cell['index']})")

    def work_settings(self) -> None:
        """Work every control but the buttons, which are for later, when there is something to be undone."""
        tests = self._changes, self._changes_later, self._changes_elsewhere
        for kind in KINDS:
            number = 0
            while kind != "button" and number < self._all(kind).count():  # what is done may make a list longer
                control = self._all(kind).nth(number)
                if not any(changes(kind, control) for changes in tests):
                    self.idle.append(f"{kind} {self._name(control)!r}")
                number += 1

    def work_buttons(self) -> None:
        """Press every button."""
        for name in self._buttons():
            if name not in self._buttons():  # gone with what another one has deleted
                self._take_back()
            if name in self._buttons() and name not in self._told and not self._press(name):
                self._stir()
                if not self._press(name):
                    self.idle.append(f"button {name!r}")

    def _all(self, kind: str) -> Locator:
        return self.output.locator(KINDS[kind].selector)

    def _name(self, control: Locator) -> str:
        return control.evaluate(NAME)

    def _buttons(self) -> list[str]:
        return [self._name(button) for button in self._all("button").all() if button.is_enabled()]

    def _pictures(self) -> list[str]:
        return self.page.ask(f"pictures({self.cell['index']})")

    def _step(self, name: str, actions: Iterator[None]) -> bool | None:
        """Do the next thing and wait for the answer: whether a picture changed, None: there is nothing more to do."""
        before = self._pictures()
        self.page.ask(f"listen({self.cell['index']})")
        if next(actions, "no more") == "no more":
            return None
        self.page.settle()
        times = self.page.ask("times")
        if times["asked"]:
            self.answers.append(Answer(name, times["answered"] - times["asked"], times["sign"] > 0))
        return self._pictures() != before

    def _changes(self, kind: str, control: Locator) -> bool:
        """Whether working a control changes a picture; of a picture itself, whether every click does."""
        name, actions = self._name(control), KINDS[kind].work(control, self.upload)
        while (changed := self._step(name, actions)) is not None:
            if changed != (kind == "picture"):
                return changed
        return kind == "picture"

    def _changes_later(self, kind: str, control: Locator) -> bool:
        """Whether it matters, once a button is pressed, how a control is set."""
        if not self._button(GO):
            return False
        first = self._done_again()
        self._step(self._name(control), KINDS[kind].work(control, self.upload))
        return self._done_again() != first

    def _changes_elsewhere(self, kind: str, control: Locator) -> bool:
        """Whether a control changes a picture when another one is set otherwise."""
        for each in ("slider", "menu", "text"):
            for other in self._all(each).all():
                name, actions = self._name(other), KINDS[each].work(other, self.upload)
                while self._step(name, actions) is not None:
                    if self._changes(kind, control):
                        return True
        return False

    def _done_again(self) -> tuple[list[str], list[str]]:
        self._take_back()
        button = self._button(GO)
        self._changes("button", button)
        self._told.add(self._name(button))
        return self._pictures(), self.page.ask(f"fields({self.cell['index']})")

    def _take_back(self) -> None:
        if button := self._button(AGAIN):
            self._changes("button", button)

    def _button(self, texts: Sequence[str]) -> Locator | None:
        return next((each for each in self._all("button").all() if each.text_content() in texts), None)

    def _press(self, name: str) -> bool:
        button = self._all("button").nth([self._name(each) for each in self._all("button").all()].index(name))
        return self._changes("button", button)

    def _stir(self) -> None:
        """Change something, so that a button has something to do."""
        for kind in ("picture", "slider", "text"):
            for control in self._all(kind).all():
                self._changes(kind, control)
