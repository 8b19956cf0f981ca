"""One thread a test process, so that two share two cores, and how much rubbish a reader gets."""

import os
from datetime import timedelta

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
