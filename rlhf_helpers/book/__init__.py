"""What only the notebooks need: set-up, generated sentences, printed source, figures, exercise
checks."""

from rlhf_helpers.book.notebook import claims, recorded_sweep, say, setup
from rlhf_helpers.book.source import show_source

__all__ = ["claims", "recorded_sweep", "say", "setup", "show_source"]
