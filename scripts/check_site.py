"""Check a built site: every link inside it has a target, every picture a text for those who do not see it, and no page
fetches anything from the network.

`python scripts/check_site.py FOLDER`; uses the standard library only.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHING = {"script", "img", "link", "iframe", "source", "video", "audio", "embed", "object"}  # <a> only points
REMOTE = re.compile(r"(https?:)?//")
REMOTE_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*")


class Page(HTMLParser):
    """Where a page points, and what in it can be pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.speechless: list[str] = []  # pictures without a text; where there is none, Sphinx writes the file's name
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img" and dict(attrs).get("alt") in (None, "", dict(attrs).get("src")):
            self.speechless.append((dict(attrs).get("src") or "")[:80])
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src", "data") and value:
                self.links.append((tag, value))


def problems(folder: Path) -> list[str]:
    """One line for each thing that is wrong."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = [
        f"{path.relative_to(folder)}: {style[0]} comes from the network"
        for path in sorted(folder.rglob("*.css"))
        for style in REMOTE_STYLE.finditer(path.read_text(encoding="utf-8"))
    ]
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        found += [f"{name}: {source} has no alt text" for source in page.speechless]
        for tag, link in page.links:
            reason = wrong(tag, link, path, pages)
            if reason:
                found.append(f"{name}: {link} {reason}")
    return found


def wrong(tag: str, link: str, path: Path, pages: dict[Path, Page]) -> str:
    """What is wrong with one link of a page; nothing: an empty string."""
    if REMOTE.match(link):
        return "comes from the network" if tag in FETCHING else ""
    parts = urlsplit(link)
    if parts.scheme:  # mailto:, data:
        return ""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return "does not exist"
    anchor = unquote(parts.fragment)
    return "has no such anchor" if target in pages and anchor and anchor not in pages[target].ids else ""


def main(folder: str) -> int:
    found = problems(Path(folder))
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
