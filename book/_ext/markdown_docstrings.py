"""Lets autodoc read docstrings that are written in Markdown, as diffrax's are."""

import re

from sphinx.application import Sphinx


def to_rst(text: str) -> str:
    """Rewrite what reStructuredText spells otherwise: mathematics, list items."""
    text = re.sub(r"\$([^$]+)\$", r":math:`\1`", text)
    return re.sub(r"^    (?=\S)", "  ", text, flags=re.MULTILINE)


def _process(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = to_rst("\n".join(lines)).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
