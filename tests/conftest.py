"""Each test process keeps to one thread, so that two of them share two cores; processes that they start inherit it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
