"""What needs a CUDA GPU: used with no flag, in bf16, the same answer each time, little memory."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_reliability import WORDS, cvae, each_script, run, transformer, vae_anime, vae_mnist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def numbers(metrics):
    """Every number of nested metrics, in order."""
    if isinstance(metrics, dict | list):
        return [
            n
            for value in (metrics.values() if isinstance(metrics, dict) else metrics)
            for n in numbers(value)
        ]
    return [metrics] if isinstance(metrics, float) else []


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@each_script
def test_runs_there_with_no_flag_and_the_same_answer(script):
    assert "--device" not in WORDS[script] and script.pick_device("auto").type == "cuda"
    torch.cuda.reset_peak_memory_stats()
    first = run(script, "--out", "one")
    assert 0 < torch.cuda.max_memory_allocated() < 2**32
    assert numbers(run(script, "--out", "two")) == pytest.approx(numbers(first), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("script", [vae_mnist, vae_anime, cvae], ids=lambda script: script.__name__)
def test_the_cpu_agrees(script):
    """The start is the same, and two epochs of bf16 do not lead far from float32."""
    there, here = (run(script, "--out", device, "--device", device) for device in ("cuda", "cpu"))
    losses = [
        m["reconstruction"] if script is cvae else m["neg_elbo"]["test"] for m in (there, here)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("script", [vae_mnist, vae_anime], ids=lambda script: script.__name__)
def test_products_are_bf16(script):
    with script.autocast(torch.device("cuda")):
        assert (
            torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
        ).dtype == torch.bfloat16


def test_compiled_layer_equals_eager():
    torch.manual_seed(0)
    layer = transformer.EncoderLayer(64, 4, 0.3).cuda().eval()
    x, keep = (
        torch.randn(8, 40, 64, device="cuda"),
        torch.ones(8, 40, dtype=torch.bool, device="cuda"),
    )
    torch.testing.assert_close(
        torch.compile(layer)(x, keep)[0], layer(x, keep)[0], atol=1e-3, rtol=1e-3
    )
