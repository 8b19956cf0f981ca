"""One thread a test process, so that two share two cores, and how much rubbish a reader gets."""

import os
import sys
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"  # processes that the tests start inherit it

limits = {
    "deadline": timedelta(seconds=5),
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
settings.register_profile("short", max_examples=200, derandomize=True, **limits)
settings.register_profile("long", max_examples=10_000, **limits)
settings.load_profile("short")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vae_mnist

vae_mnist.REFINE = 4  # few tests look at how good a digit's posterior is; 80 steps take long
