"""Settings of all tests: one thread a process, coarse figures, how many damaged files are tried."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure

os.environ["OMP_NUM_THREADS"] = "1"  # so that two test processes share two cores

COMMON = {
    "deadline": timedelta(seconds=5),
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
settings.register_profile("short", max_examples=200, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=10_000, **COMMON)
settings.load_profile("short")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vae_mnist


@pytest.fixture
def short_refinement(monkeypatch):
    """Take 4 steps instead of 40 when a digit's posterior is refined.

    This is for tests that run the whole script, and do not look at how good its posteriors are.
    """
    monkeypatch.setattr(vae_mnist, "REFINE_STEPS", 4)


@pytest.fixture(autouse=True)
def draft_figures(request, monkeypatch):
    """Draw coarsely, in half of a small run's time, except where a test asks for `figures`."""
    savefig = Figure.savefig

    def save_draft(figure, *args, **keywords):
        figure.set_layout_engine("none")
        figure.set_dpi(20)
        savefig(figure, *args, **keywords)

    if "figures" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", save_draft)
