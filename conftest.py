"""Settings for every test run."""

import matplotlib
import torch
from hypothesis import settings

# In this process only: an environment variable would reach the notebooks' kernels and take their
# figures away.
matplotlib.use("Agg")
# Tensors here are small: a second thread costs more than it brings, tenfold where cores are busy.
torch.set_num_threads(1)
# The same examples in every run, and no time limit that a busy machine could break.
settings.register_profile("book", derandomize=True, deadline=None)
settings.load_profile("book")
