"""The tested functions behind *RLHF by Experiment: from bandits to GRPO*.

Importing the package imports neither torch nor transformers; each submodule imports what it needs.
"""

import warnings

__version__ = "0.1.0"

# Without Jupyter's widgets tqdm says so in every notebook, with a path of the machine in the text.
warnings.filterwarnings("ignore", message="IProgress not found")
