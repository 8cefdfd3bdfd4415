"""The library's docstrings are written to be read in the source. Sphinx expects reStructuredText.

Two things differ. Diagrams and tables are simply indented or drawn with bars; and bars, as in |W|, mean nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests look at this file where there is no Sphinx
    from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):$|[-*] |\d+\. ")


def as_restructured_text(lines: list[str]) -> list[str]:
    """Drawn lines become literal blocks; in all others bars are escaped."""
    out: list[str] = []
    above = ""  # the last line at the left margin: within a section or a list, indented lines are text
    drawing = False
    for line in lines:
        text = line.strip()
        follows_blank = not out or not out[-1].strip()
        if not text:
            out.append("")
        elif text.startswith("|") or (line[0] == " " and not SECTION.match(above) and (follows_blank or drawing)):
            if not drawing:
                out += ["", "::", ""]
            out.append(f"    {line}")
            drawing = True
        else:
            if drawing:
                out.append("")
            out.append(line.replace("|", r"\|"))
            drawing = False
            above = line if line[0] != " " else above
    return out


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True}
