"""Tables and figures of the book, made from records and from published values alone.

What was measured comes in as a list of records (`lrnde.records.load_all`). The tables
need pandas and the figures matplotlib: `pip install 'lrnde[book]'`.
"""

from ._claims import claims as claims
from ._figures import curves as curves
from ._figures import learning_curves as learning_curves
from ._figures import pareto as pareto
from ._figures import style as style
from ._methods import COLORS as COLORS
from ._methods import METHODS as METHODS
from ._origins import provenance_note as provenance_note
from ._origins import record_links as record_links
from ._summary import summary as summary
from ._tables import EMPTY as EMPTY
from ._tables import findings as findings
from ._tables import MISSING as MISSING
from ._tables import published_table as published_table
from ._tables import settings_table as settings_table
from ._tables import table as table

# For autodoc, which passes over what is imported unless it is listed; in the order of
# its page.
__all__ = [
    "table",
    "published_table",
    "findings",
    "settings_table",
    "summary",
    "claims",
    "learning_curves",
    "pareto",
    "curves",
    "style",
    "provenance_note",
    "record_links",
    "METHODS",
    "COLORS",
    "MISSING",
    "EMPTY",
]
