"""Formulas as MathML, which browsers draw by themselves: no script, no font, no network."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(formula(node, "inline"))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{formula(node, "block")}</div>\n')
    raise nodes.SkipNode


def formula(node: nodes.math | nodes.math_block, display: str) -> str:
    tex = " ".join(node.astext().split())  # a space at the end of a line, "\ ", would be read as "\" and its end
    mathml = convert(tex.replace(r"\arg", r"\operatorname{arg}"), display=display)
    if "\\" in mathml:
        logger.warning("a command is unknown to latex2mathml in the formula %s", tex, location=node)
    return mathml


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
