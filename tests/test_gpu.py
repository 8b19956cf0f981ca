"""What needs a CUDA GPU: used without a flag, in bfloat16, with the same answer each time."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_reliability import WORDS, cvae, each_script, run, transformer, vae_anime, vae_mnist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("short_refinement"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")
each_twin = pytest.mark.parametrize(
    "script", [vae_mnist, vae_anime], ids=lambda script: script.__name__
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def numbers_in(metrics) -> list[float]:
    """Every float of nested metrics, in order."""
    if isinstance(metrics, float):
        return [metrics]
    if isinstance(metrics, dict):
        metrics = list(metrics.values())
    if not isinstance(metrics, list):
        return []

    found = []
    for value in metrics:
        found += numbers_in(value)

    return found


@each_script
def test_a_gpu_is_used_without_a_flag(script):
    assert "--device" not in WORDS[script]
    torch.cuda.reset_peak_memory_stats()
    run(script, "--out", "out")
    assert torch.cuda.max_memory_allocated() > 0
    assert torch.cuda.max_memory_allocated() < 2**32


@each_script
def test_the_same_answer_each_time(script):
    first = numbers_in(run(script, "--out", "one"))
    second = numbers_in(run(script, "--out", "two"))
    assert second == pytest.approx(first, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("script", [vae_mnist, vae_anime, cvae], ids=lambda script: script.__name__)
def test_the_cpu_agrees(script):
    """The start is the same, and two epochs in bfloat16 do not lead far from float32."""
    losses = []
    for device in ("cuda", "cpu"):
        metrics = run(script, "--out", device, "--device", device)
        losses.append(metrics["reconstruction"] if script is cvae else metrics["neg_elbo"]["test"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def product_type(script) -> torch.dtype:
    """The number format of a matrix product in the script's autocast."""
    with script.autocast(CUDA):
        ones = torch.ones(2, 2, device=CUDA)
        return (ones @ ones).dtype


@each_twin
def test_products_are_in_bfloat16_where_the_gpu_has_it(script):
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    expected = torch.bfloat16 if has_bfloat16 else torch.float32
    assert product_type(script) == expected


@each_twin
def test_products_are_in_float32_where_bfloat16_is_emulated(script, monkeypatch):
    """As on a T4 or a P100, the free GPUs of Colab and Kaggle."""

    def is_supported(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert product_type(script) == torch.float32


def test_a_compiled_layer_equals_the_layer():
    torch.manual_seed(0)
    config = transformer.Config(d_model=64, nhead=4, dropout=0.3)
    layer = transformer.EncoderLayer(config).cuda().eval()
    x = torch.randn(8, 40, 64, device=CUDA)
    is_token = torch.ones(8, 40, dtype=torch.bool, device=CUDA)
    expected, _ = layer(x, is_token)
    compiled, _ = torch.compile(layer)(x, is_token)
    torch.testing.assert_close(compiled, expected, atol=1e-3, rtol=1e-3)
