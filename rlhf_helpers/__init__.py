"""The tested functions behind *RLHF by Experiment: from bandits to GRPO*.

Importing the package imports neither torch nor transformers; each submodule imports what it needs.
"""

__version__ = "0.1.0"
