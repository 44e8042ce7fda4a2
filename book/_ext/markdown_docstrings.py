"""Lets autodoc read docstrings that are written in Markdown, as diffrax's are."""

import re
import textwrap

from sphinx.application import Sphinx

_CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def to_rst(text: str) -> str:
    """Rewrite what reStructuredText spells otherwise: code, mathematics, list items."""
    pieces = _CODE.split(text)  # prose and code take turns
    pieces[::2] = map(_prose, pieces[::2])
    pieces[1::2] = map(_code, pieces[1::2])
    return "".join(pieces)


def _code(text: str) -> str:
    return ".. code-block:: python\n\n" + textwrap.indent(text, "  ")


def _prose(text: str) -> str:
    text = re.sub(r"\$([^$]+)\$", r":math:`\1`", text)
    return re.sub(r"^    (?=\S)", "  ", text, flags=re.MULTILINE)


def _process(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = to_rst("\n".join(lines)).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
