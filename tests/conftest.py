"""One thread a test process, so that two share two cores; drafts of figures; how much rubbish."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure

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


@pytest.fixture(autouse=True)
def draft_figures(request, monkeypatch):
    """Draw coarsely, in half of a small run's time, but where a test asks for `figures`."""
    savefig = Figure.savefig

    def draft(figure, *args, **keywords):
        figure.set_layout_engine("none")
        figure.set_dpi(20)
        savefig(figure, *args, **keywords)

    if "figures" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", draft)
