"""Formulas as MathML, which browsers draw without a script or a font from elsewhere."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

# What latex2mathml 3.81 marks as identifiers: browsers then set no space around a sign, and draw a
# prime too small to see.
OPERATORS = {
    "<mi>&#x000B1;</mi>": "<mo>&#x000B1;</mo>",
    "<mi>&#x02032;</mi>": '<mo class="prime">&#x02032;</mo>',
}


class KeepPunctuation(SphinxPostTransform):
    """Gives an inline formula the punctuation after it, which browsers would wrap otherwise."""

    default_priority = 800
    formats = ("html",)

    def run(self) -> None:
        """Moves the punctuation from the text into an attribute of the formula."""
        for formula in list(self.document.findall(nodes.math)):
            text = formula.next_node(descend=False, siblings=True)
            mark = re.match(r"[.,;:!?)]+", text) if isinstance(text, nodes.Text) else None
            if mark:
                formula["punctuation"] = mark[0]
                text.parent.replace(text, nodes.Text(text[mark.end() :]))


def mathml(formula: str, display: str) -> str:
    """Converts a formula from LaTeX, to be displayed "inline" or as a "block"."""
    element = convert(formula, display=display)
    for found, replacement in OPERATORS.items():
        element = element.replace(found, replacement)
    return element


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula in a line of text."""
    formula = mathml(node.astext(), "inline") + node.get("punctuation", "")
    translator.body.append(f'<span class="formula">{formula}</span>')
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a displayed formula, in a box that scrolls on narrow screens."""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(mathml(node.astext(), "block"))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Registers the renderer "mathml", which conf.py chooses by `html_math_renderer`."""
    app.add_post_transform(KeepPunctuation)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
