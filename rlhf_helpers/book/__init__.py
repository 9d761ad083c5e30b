"""What only the notebooks need: set-up, generated sentences, printed source, figures, exercise
checks."""

from rlhf_helpers.book.notebook import (
    brief,
    claims,
    code,
    drawing,
    literal,
    recorded_sweep,
    say,
    setup,
    table,
)
from rlhf_helpers.book.source import show_source

__all__ = [
    "brief",
    "claims",
    "code",
    "drawing",
    "literal",
    "recorded_sweep",
    "say",
    "setup",
    "show_source",
    "table",
]
