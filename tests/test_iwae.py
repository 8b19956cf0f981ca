"""report/measure.py: the importance-weighted bound against its definition."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Generator

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "report")]
from measure import iwae_bound
from test_vae import each_twin, make_details_matter, random_images, tiny_model, vae_anime


def model_and_image(twin):
    """A model with random weights, and one image with its q(z|x)."""
    model = tiny_model(twin)
    if twin is vae_anime:
        make_details_matter(model)
    x = twin.to_pixels(random_images(twin, 1))
    with torch.no_grad():
        q = model.encode(x)
    return model, x, q


def log_normal(value, mean, variance) -> torch.Tensor:
    """ln N(value; mean, diag variance) of each item, written out."""
    terms = (value - mean).square() / variance + variance.log() + math.log(2 * math.pi)
    return -0.5 * terms.flatten(1).sum(dim=1)


def log_weight(twin, model, x, q, generator) -> torch.Tensor:
    """ln p(x, z, d) - ln q(z, d|x) of one sample, with p(z) = N(0, I)."""
    if twin is vae_anime:
        output = model.infer(x, q, generator)
        sigma = torch.tensor(vae_anime.SIGMA)
        dequantized = vae_anime.dequantize(x, generator)
        total = log_normal(dequantized, output.mean, sigma.square().expand_as(x))
        z = output.z
        for detail in output.details:
            total += log_normal(detail.sample, detail.prior.mean, detail.prior.variance)
            total -= log_normal(detail.sample, detail.posterior.mean, detail.posterior.variance)
    else:
        z = twin.reparameterize(q, generator)
        logits = model.decode(z).base_dist.logits
        cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        total = -cross_entropy.flatten(1).sum(dim=1)
    total += log_normal(z, torch.zeros_like(z), torch.ones_like(z))
    return total - log_normal(z, q.mean, q.variance)


@each_twin
@torch.no_grad()
def test_iwae_equals_its_definition(twin):
    model, x, q = model_and_image(twin)
    bound = iwae_bound(twin, model, x, q, 64, Generator().manual_seed(1)).item()
    generator = Generator().manual_seed(1)
    weights = [log_weight(twin, model, x, q, generator) for _ in range(64)]
    expected = torch.cat(weights).logsumexp(0).item() - math.log(64)
    assert bound == pytest.approx(expected, rel=1e-4, abs=0.1)


@each_twin
@torch.no_grad()
def test_iwae_with_one_sample_is_the_elbo_on_average(twin):
    model, x, q = model_and_image(twin)
    bounds = []
    elbos = []
    generator = Generator().manual_seed(1)
    for _ in range(400):
        bounds.append(iwae_bound(twin, model, x, q, 1, generator).item())
        if twin is vae_anime:
            output = model.infer(x, q, generator)
            error = vae_anime.dequantize(x, generator) - output.mean
            elbo = model.noise.log_prob(error) - output.kl
        else:
            pixels = model.decode(twin.reparameterize(q, generator))
            normal = D.MultivariateNormal(torch.zeros(4), torch.eye(4))
            elbo = pixels.log_prob(x) - D.kl_divergence(q, normal)
        elbos.append(elbo.item())

    bounds = torch.tensor(bounds, dtype=torch.float64)
    elbos = torch.tensor(elbos, dtype=torch.float64)
    standard_error = math.hypot(bounds.std(), elbos.std()) / math.sqrt(400)
    difference = (bounds.mean() - elbos.mean()).abs()
    assert difference < 6 * standard_error + 1e-3 * elbos.mean().abs()


@each_twin
@torch.no_grad()
def test_iwae_of_many_samples_is_above_the_mean_of_their_bounds(twin):
    """By Jensen's inequality, for the same samples."""
    model, x, q = model_and_image(twin)
    bound = iwae_bound(twin, model, x, q, 64, Generator().manual_seed(1)).item()
    generator = Generator().manual_seed(1)
    alone = [iwae_bound(twin, model, x, q, 1, generator).item() for _ in range(64)]
    assert bound > sum(alone) / len(alone)
