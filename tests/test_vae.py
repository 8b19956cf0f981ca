"""The VAEs: mathematics against independent references, whole runs, the line for bad input."""

import functools
import hashlib
import io
import itertools
import json
import math
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import scipy.fft
import torch
import torch.distributions as D
import torch.nn.functional as F
from PIL import Image
from scipy.stats import multivariate_normal
from torch import Generator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vae_anime
import vae_mnist

TWINS = [vae_mnist, vae_anime]
SMALL = shlex.split("--epochs 2 --batch-size 16 --latent-dim 4 --device cpu")
DATA = {vae_mnist: "digits.npz", vae_anime: "faces.zip"}
SHAPE = {vae_mnist: (1, 28, 28), vae_anime: (3, 64, 64)}
SAVED_SHAPE = {vae_mnist: (28, 28), vae_anime: (64, 64, 3)}  # of an image in an npz file
each_twin = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
whole_run = pytest.mark.usefixtures("short_refinement")


# Data, models and runs ----------------------------------------------------------------------------
def digits(count: int = 60, size: int = 28) -> np.ndarray:
    """White bars at random places on black, (N, H, W): enough to learn, in no time."""
    rng = np.random.default_rng(0)
    images = np.zeros((count, size, size), np.uint8)
    corners = rng.integers(4, size - 12, (count, 2))
    for image, (row, column) in zip(images, corners, strict=True):
        image[row : row + 8, column : column + 3] = rng.integers(160, 256)
    return images


def faces(count: int = 60) -> np.ndarray:
    """A disc of one colour on another, (N, 64, 64, 3)."""
    rng = np.random.default_rng(0)
    distance = np.hypot(*np.mgrid[-32:32, -32:32])
    back, front = rng.integers(0, 256, (2, count, 1, 1, 3))
    radius = rng.integers(10, 30, (count, 1, 1))
    inside = (distance < radius)[..., None]
    return np.where(inside, front, back).astype(np.uint8)


def face_tensor(count: int) -> torch.Tensor:
    """The faces as `load_images` returns them, (N, 3, 64, 64)."""
    return torch.from_numpy(faces(count)).permute(0, 3, 1, 2).contiguous()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_zip(path: str, images: np.ndarray, extra: tuple | list = ()) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(images):
            member = zipfile.ZipInfo(f"data/{i}.png")  # with a fixed date: the same file each time
            archive.writestr(member, png(Image.fromarray(image)))
        for name, content in extra:
            archive.writestr(name, content)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a file of digits and one of faces."""
    monkeypatch.chdir(tmp_path)
    np.savez_compressed("digits.npz", image=digits(), label=np.zeros(60, np.int64))
    write_zip("faces.zip", faces())
    return tmp_path


def run(twin, *words: str) -> dict:
    return twin.main(["--data", DATA[twin], *SMALL, *words])


@functools.cache
def finished_run(twin) -> tempfile.TemporaryDirectory:
    """What a whole run leaves; trained once, since many tests start from it."""
    kept = tempfile.TemporaryDirectory()
    run(twin, "--out", "finished")
    shutil.copytree("finished", kept.name, dirs_exist_ok=True)
    shutil.rmtree("finished")
    return kept


def put_finished_run(twin, out: Path | str | None = None) -> dict:
    """Copy a finished run to `out`, by default where the script would leave it.

    Returns its metrics.
    """
    out = Path(out or Path("runs", twin.__name__))
    shutil.copytree(finished_run(twin).name, out)
    return json.loads((out / "lambda-1" / "metrics.json").read_text())


def without_seconds(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "seconds"}


def folder_of(twin, kl_weight: float = 1) -> Path:
    return Path("runs", twin.__name__, f"lambda-{kl_weight:g}")


def error_line(capsys, twin, words: list[str]) -> str:
    """Run the command line, which must end with exit code 2 and one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        twin.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def tiny_model(twin, latent_dim: int = 4):
    torch.manual_seed(0)
    model = twin.VAE(latent_dim)
    model.mean_image.uniform_(0.2, 0.8)
    return model


def random_images(twin, count: int) -> torch.Tensor:
    """Images of random bytes, (N, C, H, W)."""
    return torch.randint(0, 256, (count, *SHAPE[twin]), dtype=torch.uint8)


def random_mixture(twin, components: int, latent_dim: int):
    """A prior of Gaussians of any place, shape and weight, as after a fit."""
    factors = torch.randn(components, latent_dim, latent_dim)
    covariances = factors @ factors.mT + 0.1 * torch.eye(latent_dim)
    return twin.MixturePrior(
        weights=torch.rand(components).softmax(0),
        means=0.7 * torch.randn(components, latent_dim),
        scale_tril=torch.linalg.cholesky(covariances),
    )


def log_mixture(prior, z: torch.Tensor) -> torch.Tensor:
    """ln Σ w N(z), each Gaussian's density by scipy."""
    covariances = prior.scale_tril @ prior.scale_tril.mT
    total = 0.0
    for weight, mean, covariance in zip(prior.weights, prior.means, covariances, strict=True):
        total = total + weight.item() * multivariate_normal(mean, covariance).pdf(z)
    return torch.as_tensor(np.log(total), dtype=torch.float32)


# Mathematics: latents and priors ------------------------------------------------------------------
@each_twin
def test_a_posterior_is_the_gaussian_of_its_mean_and_log_variance(twin):
    torch.manual_seed(0)
    mu = torch.randn(5, 6)
    logvar = torch.randn(5, 6)
    q = twin.diagonal_gaussian(mu, logvar)
    expected = D.MultivariateNormal(mu, logvar.exp().diag_embed())
    z = torch.randn(5, 6)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z), rtol=1e-4, atol=1e-4)


@each_twin
def test_reparameterized_samples_have_the_posteriors_moments(twin):
    torch.manual_seed(0)
    mu = torch.randn(1, 3)
    logvar = torch.randn(1, 3)
    q = twin.diagonal_gaussian(mu.expand(100_000, 3), logvar.expand(100_000, 3))
    z = twin.reparameterize(q, Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), logvar[0].exp(), atol=0.03, rtol=0.02)


@each_twin
def test_kl_to_the_normal_prior_equals_torch_distributions(twin):
    torch.manual_seed(0)
    mu = torch.randn(5, 6)
    logvar = torch.randn(5, 6)
    q = D.Normal(mu, (logvar / 2).exp())
    expected = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1)
    kl = twin.NormalPrior(6).kl(twin.diagonal_gaussian(mu, logvar))
    torch.testing.assert_close(kl, expected)


@each_twin
def test_kl_to_a_mixture_of_one_equals_torch_distributions(twin):
    torch.manual_seed(0)
    mu = torch.randn(5, 6)
    logvar = torch.randn(5, 6)
    prior = random_mixture(twin, 1, 6)
    q = D.MultivariateNormal(mu, logvar.exp().diag_embed())
    p = D.MultivariateNormal(prior.means, scale_tril=prior.scale_tril)
    kl = prior.kl(twin.diagonal_gaussian(mu, logvar))
    torch.testing.assert_close(kl, D.kl_divergence(q, p), rtol=1e-4, atol=1e-4)


def full_gaussians() -> D.MultivariateNormal:
    """Five Gaussians over six dimensions, with all covariances."""
    scale_tril = torch.randn(5, 6, 6).tril(-1) + (0.1 + torch.rand(5, 6)).diag_embed()
    return vae_mnist.gaussian(torch.randn(5, 6), scale_tril)


def test_kl_of_digits_counts_covariances():
    torch.manual_seed(0)
    q = full_gaussians()
    normal = D.MultivariateNormal(torch.zeros(6), torch.eye(6))
    torch.testing.assert_close(vae_mnist.NormalPrior(6).kl(q), D.kl_divergence(q, normal))

    prior = random_mixture(vae_mnist, 1, 6)
    p = D.MultivariateNormal(prior.means, scale_tril=prior.scale_tril)
    torch.testing.assert_close(prior.kl(q), D.kl_divergence(q, p), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("components", [0, 1, 3])
def test_a_priors_precision_is_the_second_derivative_of_the_kl(components):
    """Where one Gaussian of a mixture has nearly all of the share, as here of three far apart."""
    torch.manual_seed(0)
    prior = random_mixture(vae_mnist, components, 6) if components else vae_mnist.NormalPrior(6)
    if components == 3:
        prior.means += 100 * torch.arange(3)[:, None]
    q = full_gaussians()
    places = torch.zeros(5, 6)
    if components == 3:
        places = prior.means[[0, 1, 2, 1, 0]]
    q = vae_mnist.gaussian(q.mean + places, q.scale_tril)

    precision = prior.precision(q).expand(5, 6, 6)
    for i in range(5):

        def kl(mu, i=i):
            return prior.kl(vae_mnist.gaussian(mu[None], q.scale_tril[i : i + 1])).sum()

        hessian = torch.autograd.functional.hessian(kl, q.mean[i])
        torch.testing.assert_close(precision[i], hessian, rtol=1e-2, atol=1e-2)


@each_twin
@pytest.mark.parametrize(
    "logvar, tightness",
    [(torch.randn(5, 3, generator=Generator().manual_seed(0)), 4.0), (torch.full((5, 3), -9), 0.1)],
    ids=["wide", "sharp"],
)
def test_kl_to_a_mixture_is_an_upper_bound_and_tight_for_a_sharp_posterior(twin, logvar, tightness):
    torch.manual_seed(0)
    prior = random_mixture(twin, 4, 3)
    near = prior.means[torch.arange(5) % 4]  # another Gaussian's mean for each
    q = twin.diagonal_gaussian(near + 0.5 * torch.randn(5, 3), logvar)
    z = q.sample((20_000,))
    sampled = (q.log_prob(z) - log_mixture(prior, z)).mean(0)
    excess = prior.kl(q) - sampled
    assert excess.min() > -0.05
    assert excess.max() < tightness


@each_twin
def test_samples_of_a_mixture_have_its_mean_and_covariance(twin):
    torch.manual_seed(0)
    prior = random_mixture(twin, 3, 4)
    z = prior.sample(200_000, 1.0, Generator().manual_seed(0))

    mean = prior.weights @ prior.means
    offsets = prior.means - mean
    covariances = prior.scale_tril @ prior.scale_tril.mT
    each = covariances + offsets[:, :, None] * offsets[:, None]
    covariance = torch.einsum("j,jab->ab", prior.weights, each)  # the law of total variance

    torch.testing.assert_close(z.mean(0), mean, atol=0.05, rtol=0.02)
    torch.testing.assert_close(z.T.cov(), covariance, atol=0.1, rtol=0.02)


@each_twin
def test_temperature_scales_the_standard_deviations_of_samples(twin):
    torch.manual_seed(0)
    mixture = random_mixture(twin, 1, 4)
    z = mixture.sample(200_000, 0.5, Generator().manual_seed(0))
    variance = (mixture.scale_tril @ mixture.scale_tril.mT)[0].diagonal()
    torch.testing.assert_close(z.var(0), variance / 4, atol=0.1, rtol=0.02)

    z = twin.NormalPrior(4).sample(200_000, 0.5, Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(z.var(0), torch.full((4,), 0.25), atol=0, rtol=0.02)


def model_that_encodes_latents(twin, latent_dim: int, monkeypatch) -> torch.nn.Module:
    """A model whose images are latents: each is the mean of its own q(z|x), whose σ is 0."""
    model = torch.nn.Module()
    model.mean_image = torch.zeros(1)
    model.prior = twin.NormalPrior(latent_dim)
    model.encode = lambda z: SimpleNamespace(mean=z, stddev=torch.zeros_like(z))
    monkeypatch.setattr(twin, "to_pixels", lambda images: images)
    return model


def fit_prior_to(twin, latents: torch.Tensor, components: int, monkeypatch):
    """The prior that fit_prior finds for images with these latents, if it improves the ELBO."""
    model = model_that_encodes_latents(twin, latents.shape[1], monkeypatch)

    def evaluate(model, images, config):
        is_normal = isinstance(model.prior, twin.NormalPrior)
        return {"neg_elbo": float(is_normal)}, {}

    monkeypatch.setattr(twin, "evaluate", evaluate)
    monkeypatch.setattr(twin, "PRIOR_COMPONENTS", components)
    monkeypatch.setattr(twin, "IMAGES_PER_COMPONENT", 1)
    twin.fit_prior(model, {"train": latents, "validation": latents}, twin.Config())
    return model.prior


@each_twin
def test_fit_finds_the_mixture_that_the_latents_come_from(twin, monkeypatch):
    torch.manual_seed(0)
    places = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]])
    latents = places[torch.randint(3, (9000,))] + torch.randn(9000, 2)
    prior = fit_prior_to(twin, latents, 3, monkeypatch)

    order = prior.means[:, 0].argsort()
    torch.testing.assert_close(prior.means[order], places, atol=0.1, rtol=0)
    torch.testing.assert_close(prior.weights, torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    entropy = math.log(3) + 1 + math.log(2 * math.pi)  # of the three Gaussians, far apart
    assert log_mixture(prior, latents).mean() == pytest.approx(-entropy, abs=0.05)


@each_twin
@pytest.mark.parametrize("images, samples", [(100, 4), (200, 3), (1000, 1)])
def test_the_more_images_the_fewer_samples_of_each(twin, images, samples, monkeypatch):
    fitted = []
    fit = twin.GaussianMixture.fit

    def watch(mixture, z):
        fitted.append(len(z))
        return fit(mixture, z)

    monkeypatch.setattr(twin.GaussianMixture, "fit", watch)
    monkeypatch.setattr(twin, "PRIOR_LATENTS", 600)
    fit_prior_to(twin, torch.randn(images, 2), 2, monkeypatch)
    assert fitted == [samples * images]


@each_twin
def test_few_images_get_few_components_and_the_outcome_is_printed(twin, monkeypatch, capsys):
    model = model_that_encodes_latents(twin, 2, monkeypatch)
    latents = torch.randn(2 * twin.IMAGES_PER_COMPONENT + 1, 2)
    monkeypatch.setattr(twin, "evaluate", lambda *_: ({"neg_elbo": 7.0}, {}))
    twin.fit_prior(model, {"train": latents, "validation": latents}, twin.Config())
    expected = "mixture of 2: validation -ELBO 7.00 -> 7.00 nats, no better; N(0, I) stays"
    assert expected in capsys.readouterr().out


@each_twin
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_fit_stays_sound_where_it_has_little_to_fit(twin, scale, monkeypatch):
    torch.manual_seed(0)
    prior = fit_prior_to(twin, scale * torch.randn(64, 4), 64, monkeypatch)
    assert isinstance(prior, twin.MixturePrior)
    for part in prior.buffers():
        assert part.isfinite().all()
    assert prior.scale_tril.diagonal(dim1=1, dim2=2).min() > 0


@each_twin
def test_active_units_are_counted(twin):
    """Three units carry the image; the fourth has q = p and carries no information."""
    torch.manual_seed(0)
    model = tiny_model(twin)
    mu = torch.randn(100, 4) * torch.tensor([1.0, 0.5, 0.2, 0.0])
    model.encode = lambda x: twin.diagonal_gaussian(mu, torch.zeros(100, 4))
    scores, _ = twin.evaluate(model, random_images(twin, 100), twin.Config())
    assert scores["active_units"] == 3


# Mathematics: likelihoods and the ELBO ------------------------------------------------------------
def test_log_prob_of_digits_equals_binary_cross_entropy():
    model = tiny_model(vae_mnist)
    x = torch.randint(0, 2, (3, 1, 28, 28)).float()
    pixels = model.decode(torch.randn(3, 4))
    logits = pixels.base_dist.logits
    expected = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(pixels.log_prob(x), expected)
    torch.testing.assert_close(pixels.mean, logits.sigmoid())


def test_log_prob_with_shared_noise_equals_the_density_of_a_gaussian():
    torch.manual_seed(0)
    error = 0.3 * torch.randn(3, 3, 64, 64)
    noise = vae_anime.SharedNoise()
    squares = error.double().square().flatten(1).sum(1)
    sigma = vae_anime.SIGMA
    expected = -squares / (2 * sigma**2) - 3 * 64 * 64 * math.log(sigma * math.sqrt(2 * math.pi))
    torch.testing.assert_close(noise.log_prob(error).double(), expected, rtol=1e-5, atol=0.1)


def test_frequencies_are_the_orthonormal_cosine_transform():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    expected = scipy.fft.dctn(images.numpy(), axes=(1, 2, 3), norm="ortho")
    np.testing.assert_allclose(vae_anime.frequencies(images), expected, atol=1e-4)


def test_the_weight_of_the_reconstruction_rises_by_the_same_factor_and_then_stays():
    weights = [vae_anime.reconstruction_weight(step, 100) for step in range(100)]
    assert weights[0] == 1 / 16
    assert weights[60:] == [1.0] * 40
    ratios = [after / before for before, after in itertools.pairwise(weights[:61])]
    assert ratios == pytest.approx([16 ** (1 / 60)] * 60)


def test_the_same_noise_at_each_frequency_is_shared_noise():
    torch.manual_seed(0)
    error = 0.3 * torch.randn(3, 3, 64, 64)
    shared = vae_anime.SharedNoise()
    by_frequency = vae_anime.FrequencyNoise(torch.full((3, 64, 64), vae_anime.SIGMA))
    expected = shared.log_prob(error)
    torch.testing.assert_close(by_frequency.log_prob(error), expected, rtol=1e-5, atol=0.1)


def test_fitted_noise_is_the_likeliest():
    model = tiny_model(vae_anime)
    images = face_tensor(40)
    config = vae_anime.Config()
    before, _ = vae_anime.evaluate(model, images, config)

    generator = vae_anime.random_generator(config.seed, "noise")  # the same draws as fit_noise's
    x = vae_anime.to_pixels(images)
    with torch.no_grad():
        mean = model.infer(x, model.encode(x), generator).mean
    error = vae_anime.dequantize(x, generator) - mean
    coefficients = scipy.fft.dctn(error.numpy(), axes=(1, 2, 3), norm="ortho")
    expected = torch.from_numpy(np.sqrt(np.square(coefficients).mean(0)))

    vae_anime.fit_noise(model, {"train": images}, config)
    torch.testing.assert_close(model.noise.sigma, expected, rtol=1e-3, atol=1e-5)
    likelihood = model.noise.log_prob(error).mean()
    for factor in (0.95, 1.05):
        other = vae_anime.FrequencyNoise(factor * model.noise.sigma)
        assert likelihood > other.log_prob(error).mean()
    after, _ = vae_anime.evaluate(model, images, config)
    assert after["bits_per_dim"] < before["bits_per_dim"]


def test_dequantization_spreads_values_evenly_over_half_a_step_to_both_sides():
    x = vae_anime.to_pixels(face_tensor(20))
    distance = 255 * (vae_anime.dequantize(x, Generator().manual_seed(0)) - x)
    assert distance.abs().max() <= 0.5001
    assert distance.mean().abs() < 0.01
    assert distance.var().item() == pytest.approx(1 / 12, rel=0.01)


def test_an_image_known_in_full_costs_no_less_than_nothing():
    """A Gaussian as wide as the dequantization noise spends 1/2 log2(2πe/12) bits on a value."""
    x = vae_anime.to_pixels(face_tensor(20))
    sigma = torch.full((3, 64, 64), 1 / (255 * math.sqrt(12)))
    error = vae_anime.dequantize(x, Generator().manual_seed(0)) - x
    log_prob = vae_anime.FrequencyNoise(sigma).log_prob(error)
    bits_per_dim = -log_prob.mean() / vae_anime.DIMENSIONS / math.log(2) + math.log2(255)
    expected = 0.5 * math.log2(2 * math.pi * math.e / 12)
    assert bits_per_dim.item() == pytest.approx(expected, abs=0.01)


@torch.no_grad()
def test_forward_of_digits_gives_the_terms_of_the_elbo():
    model = tiny_model(vae_mnist)
    x = vae_mnist.to_pixels(random_images(vae_mnist, 3))
    reconstruction, kl = model(x, Generator().manual_seed(1))

    q = model.encode(x)
    noise = torch.randn(3, 4, generator=Generator().manual_seed(1))
    pixels = model.decode(q.mean + q.variance.sqrt() * noise)
    logits = pixels.base_dist.logits
    cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    normal = D.MultivariateNormal(torch.zeros(4), torch.eye(4))

    torch.testing.assert_close(reconstruction, cross_entropy.sum((1, 2, 3)))
    torch.testing.assert_close(kl, D.kl_divergence(q, normal))


def make_details_matter(model) -> None:
    """Give random values to the weights that are 0 at initialization."""
    torch.nn.init.normal_(model.detail_decoder[-1][0].weight, std=0.1)
    for group in model.groups:
        torch.nn.init.normal_(group.trunk.conv2.weight, std=0.1)


@torch.no_grad()
def test_forward_of_faces_gives_the_terms_of_the_elbo():
    model = tiny_model(vae_anime)
    make_details_matter(model)
    x = vae_anime.to_pixels(random_images(vae_anime, 3))
    losses = model(x, Generator().manual_seed(1))

    q = model.encode(x)
    output = model.infer(x, q, Generator().manual_seed(1))
    log_prob = D.Normal(output.mean, vae_anime.SIGMA).log_prob(x).flatten(1).sum(1)
    kl = D.kl_divergence(D.Normal(q.mean, q.stddev), D.Normal(0.0, 1.0)).sum(1)
    for detail in output.details:
        ratio = detail.posterior.variance / detail.prior.variance
        distance = (detail.posterior.mean - detail.prior.mean).square() / detail.prior.variance
        kl += 0.5 * (ratio + distance - 1 - ratio.log()).flatten(1).sum(1)

    torch.testing.assert_close(losses.reconstruction, -log_prob, rtol=1e-4, atol=0.1)
    torch.testing.assert_close(losses.kl, kl, rtol=1e-4, atol=0.01)


def test_detail_latents_come_in_five_groups_at_16_by_16_positions():
    model = tiny_model(vae_anime)
    x = vae_anime.to_pixels(random_images(vae_anime, 3))
    output = model.infer(x, model.encode(x), Generator().manual_seed(0))
    assert [tuple(detail.sample.shape) for detail in output.details] == 5 * [(3, 4, 16, 16)]


def gradient(loss: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """d loss / d weights of the module, as one vector of zeros where they have no influence."""
    weights = list(module.parameters())
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    parts = []
    for weight, part in zip(weights, found, strict=True):
        parts.append(torch.zeros_like(weight) if part is None else part)
    return torch.cat([part.flatten() for part in parts])


def test_details_cannot_change_what_z_means():
    """Only the coarse image and z's own KL give gradients to the encoder and the decoder of z."""
    model = tiny_model(vae_anime)
    make_details_matter(model)
    x = vae_anime.to_pixels(random_images(vae_anime, 3))
    losses = model(x, Generator().manual_seed(0))

    assert not gradient(losses.reconstruction.sum(), model.encoder).any()
    assert not gradient(losses.reconstruction.sum(), model.decoder).any()
    assert not gradient(losses.kl.sum(), model.decoder).any()
    own_kl = model.prior.kl(model.encode(x))
    expected = gradient(own_kl.sum(), model.encoder)
    torch.testing.assert_close(gradient(losses.kl.sum(), model.encoder), expected)

    assert gradient(losses.coarse.sum(), model.encoder).any()
    assert gradient(losses.coarse.sum(), model.decoder).any()
    assert gradient(losses.reconstruction.sum(), model.detail_decoder).any()


def linear_digits():
    """A model whose logits are linear in z, and know the sum of its first two dimensions alone."""
    model = tiny_model(vae_mnist)
    linear = torch.nn.Linear(4, 28 * 28)
    linear.weight.data[:, 1] = linear.weight.data[:, 0]
    model.decoder = torch.nn.Sequential(linear, torch.nn.Unflatten(1, (1, 28, 28)))
    return model


def second_derivatives(model, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Those of -log p(x|z) of each image in z, by autograd, (B, k, k)."""
    found = []
    for one, latent in zip(x, z, strict=True):

        def reconstruction(latent, one=one):
            return -model.decode(latent[None]).log_prob(one[None]).sum()

        found.append(torch.autograd.functional.hessian(reconstruction, latent))
    return torch.stack(found)


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def test_curvature_is_the_second_derivative_where_logits_are_linear(float32):
    torch.manual_seed(0)
    model = linear_digits()
    x = vae_mnist.to_pixels(random_images(vae_mnist, 3))
    q = vae_mnist.diagonal_gaussian(torch.randn(3, 4), torch.randn(3, 4))
    expected = second_derivatives(model, x, q.mean)
    torch.testing.assert_close(vae_mnist.curvature(model, q), expected, rtol=1e-3, atol=1e-3)


def test_curvature_of_the_network_is_the_gauss_newton_matrix(float32):
    torch.manual_seed(0)
    model = tiny_model(vae_mnist)
    for layer in model.decoder.modules():
        if isinstance(layer, vae_mnist.Residual):
            torch.nn.init.normal_(layer.conv2.weight, std=0.1)
    z = 2 * torch.randn(1, 4)
    q = vae_mnist.diagonal_gaussian(z, torch.full((1, 4), -8.0))
    J = torch.autograd.functional.jacobian(lambda z: model.logits(z).flatten(), z)[:, 0]
    p = model.logits(z).sigmoid().flatten()
    expected = J.T @ ((p * (1 - p))[:, None] * J)
    error = vae_mnist.curvature(model, q)[0] - expected
    assert error.norm() < 0.01 * expected.norm()


def test_a_refined_posterior_is_laplaces_approximation_at_the_mode(float32):
    """Where log p(x, z) has one: with linear logits, and a prior of one Gaussian."""
    torch.manual_seed(0)
    model = linear_digits()
    model.prior = random_mixture(vae_mnist, 1, 4)
    with torch.no_grad():
        x = model.decode(torch.randn(3, 4)).sample()
        encoded = model.encode(x)
    refined = vae_mnist.refine_posterior(model, x, encoded, 1.0, Generator().manual_seed(0))

    precision = model.prior.precision(refined)
    expected = second_derivatives(model, x, refined.mean) + precision
    torch.testing.assert_close(refined.precision_matrix, expected, rtol=1e-2, atol=1e-2)

    mode = encoded.mean.clone()
    for _ in range(20):
        mode.requires_grad_()
        pull = torch.einsum("bkl,bl->bk", precision, mode - model.prior.means)
        (gradient,) = torch.autograd.grad(-model.decode(mode).log_prob(x).sum(), mode)
        hessian = second_derivatives(model, x, mode) + precision
        mode = (mode - torch.linalg.solve(hessian, gradient + pull)).detach()

    def distances(mean):
        """In units of σ, in the metric of the refined posterior."""
        offset = mean - mode
        return torch.einsum("bk,bkl,bl->b", offset, refined.precision_matrix, offset).sqrt()

    assert distances(encoded.mean).min() > 3
    assert distances(refined.mean).max() < 0.7


def test_no_step_of_a_refined_mean_is_longer_than_one_sigma(float32, monkeypatch):
    torch.manual_seed(0)
    model = linear_digits()
    with torch.no_grad():
        x = model.decode(10 * torch.randn(3, 4)).sample()
        q = model.encode(x)
    monkeypatch.setattr(vae_mnist, "REFINE_STEPS", 1)
    refined = vae_mnist.refine_posterior(model, x, q, 1.0, Generator().manual_seed(0))

    scale_tril = vae_mnist.laplace(model, q, 1.0).scale_tril
    offset = (refined.mean - q.mean)[:, :, None]
    moved = torch.linalg.solve_triangular(scale_tril, offset, upper=False).abs()
    assert moved.max().item() == pytest.approx(vae_mnist.REFINE_RATE, rel=1e-3)


def test_a_small_lambda_makes_refined_posteriors_sharp():
    model = linear_digits()
    x = vae_mnist.to_pixels(random_images(vae_mnist, 3))
    q = model.encode(x)
    sigmas = []
    for kl_weight in (0.0, 0.01, 1.0):
        generator = Generator().manual_seed(0)
        refined = vae_mnist.refine_posterior(model, x, q, kl_weight, generator)
        sigmas.append(refined.stddev.min().item())
    assert sigmas[0] == q.stddev.min().item()  # there the encoder's
    assert sigmas[1] < sigmas[2] / 5


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 100.0])
def test_refined_posteriors_are_better_on_images_never_seen(kl_weight):
    model = tiny_model(vae_mnist)
    x = vae_mnist.to_pixels(torch.from_numpy(digits(40))[:, None])

    @torch.no_grad()
    def mean_loss(q) -> float:
        generator = Generator().manual_seed(7)
        losses = []
        for _ in range(20):
            pixels = model.decode(vae_mnist.reparameterize(q, generator))
            losses.append(kl_weight * model.prior.kl(q) - pixels.log_prob(x))
        return torch.stack(losses).mean().item()

    q = model.encode(x)
    refined = vae_mnist.refine_posterior(model, x, q, kl_weight, Generator().manual_seed(0))
    assert mean_loss(refined) < mean_loss(q)
    for weights in model.parameters():
        assert weights.grad is None


# Drawing ------------------------------------------------------------------------------------------
def interpolate(twin, model) -> torch.Tensor:
    """Eight images between two."""
    t = torch.linspace(0, 1, 8)
    if twin is vae_mnist:
        mu = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [1.0, 0.0, 2.0, -1.0]])
        return twin.interpolate(model, mu, t)
    return twin.interpolate(model, face_tensor(2), t)


@each_twin
def test_the_same_seed_draws_the_same_images_from_several_threads_at_once(twin):
    model = tiny_model(twin)
    if twin is vae_anime:
        make_details_matter(model)

    def draw(seed: int) -> torch.Tensor:
        return twin.sample_images(model, 8, seed, 0.8)

    seeds = [0, 1, 0, 1, 0, 1]
    alone = [draw(seed) for seed in seeds]
    with ThreadPoolExecutor(max_workers=3) as threads:
        together = list(threads.map(draw, seeds))
    assert torch.equal(torch.stack(together), torch.stack(alone))
    assert not torch.equal(alone[0], alone[1])


@each_twin
def test_drawing_leaves_the_global_generator_alone(twin):
    model = tiny_model(twin)
    images = random_images(twin, 3)
    state = torch.get_rng_state()
    twin.sample_images(model, 3, 0, 0.8)
    interpolate(twin, model)
    twin.evaluate(model, images, twin.Config())
    assert torch.equal(torch.get_rng_state(), state)


def test_interpolation_of_digits_ends_at_the_two_images():
    model = tiny_model(vae_mnist)
    mu = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [1.0, 0.0, 2.0, -1.0]])
    images = interpolate(vae_mnist, model)
    ends = torch.stack([images[0], images[-1]])
    assert images.shape == (8, 1, 28, 28)
    assert torch.equal(ends, vae_mnist.decode_images(model, mu))


@torch.no_grad()
def test_interpolation_of_faces_ends_at_the_two_reconstructions():
    """To the bit: z and the noise of all detail latents describe an image in full."""
    model = tiny_model(vae_anime)
    make_details_matter(model)
    pair = random_images(vae_anime, 2)
    x = vae_anime.to_pixels(pair)
    output = model.infer(x, model.encode(x), Generator(), temperature=0.0)
    images = vae_anime.interpolate(model, pair, torch.linspace(0, 1, 8))
    ends = torch.stack([images[0], images[-1]])
    assert images.shape == (8, 3, 64, 64)
    assert torch.equal(ends, vae_anime.to_uint8(output.mean))


@torch.no_grad()
def test_a_sample_of_the_posterior_is_decoded_from_its_noise():
    model = tiny_model(vae_anime)
    make_details_matter(model)
    x = vae_anime.to_pixels(random_images(vae_anime, 3))
    output = model.infer(x, model.encode(x), Generator().manual_seed(0))
    noise = [detail.noise for detail in output.details]
    assert torch.equal(model.decode(output.z, noise), output.mean)


def test_noise_between_two_faces_is_as_long_as_noise_is(monkeypatch):
    """A mean of two noises would have half the variance."""
    model = tiny_model(vae_anime)
    generator = Generator().manual_seed(0)
    noise = [torch.randn(2, 4, 16, 16, generator=generator) for _ in model.groups]
    seen = []

    def decode(z, arc):
        seen.extend(arc)
        return torch.zeros(len(z), 3, 64, 64)

    monkeypatch.setattr(vae_anime, "read_latents", lambda *_: (torch.zeros(2, 4), noise))
    monkeypatch.setattr(model, "decode", decode)
    vae_anime.interpolate(model, random_images(vae_anime, 2), torch.linspace(0, 1, 5))
    for group in seen:
        assert group.var().item() == pytest.approx(1, abs=0.15)


def test_faces_are_sampled_and_at_temperature_0_are_all_alike():
    model = tiny_model(vae_anime)
    make_details_matter(model)
    cold = vae_anime.sample_images(model, 2, 0, 0.0)
    warm = vae_anime.sample_images(model, 2, 0, 1.0)
    assert torch.equal(cold[0], cold[1])
    assert not torch.equal(warm[0], warm[1])


def test_the_first_group_of_detail_is_sampled_at_a_power_of_the_temperature(monkeypatch):
    model = tiny_model(vae_anime)
    drawn = []

    def decode(z, noise):
        drawn.extend(one.std().item() for one in noise)
        return torch.zeros(len(z), 3, 64, 64)

    monkeypatch.setattr(model, "decode", decode)
    vae_anime.sample_images(model, 50, 0, 0.8)
    vae_anime.sample_images(model, 50, 0, 1.0)
    expected = [0.8**5] + [0.8] * 4 + [1.0] * 5
    assert drawn == pytest.approx(expected, rel=0.02)


def test_pixels():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(vae_mnist.to_pixels(grey), (grey >= 128).float())
    torch.testing.assert_close(vae_anime.to_pixels(grey), grey / 255)


def test_augmented_faces_are_mirrored_or_not():
    images = face_tensor(40)
    images[:, :, :, :20] = 7
    augmented = vae_anime.augment(images, Generator().manual_seed(0))
    same = (augmented == images).flatten(1).all(1)
    mirrored = (augmented == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 8 < same.sum() < 32


def test_augmented_digits_are_moved_and_keep_their_ink():
    images = torch.from_numpy(digits(200))[:, None]
    augmented = vae_mnist.augment(images, Generator().manual_seed(0))
    ratio = (augmented >= 128).sum() / (images >= 128).sum()
    assert augmented.min() >= 0
    assert augmented.max() <= 255
    assert 0.8 < ratio < 1.2
    assert not torch.equal(augmented, images.float())


# Training -----------------------------------------------------------------------------------------
@each_twin
def test_overfits_32_images(twin, here):
    images = twin.load_images(Path(DATA[twin]))[0][:32]
    split = {"train": images, "validation": images, "test": images}
    epochs = 60 if twin is vae_mnist else 12
    config = twin.Config(epochs=epochs, batch_size=16, latent_dim=16)
    config.folder.mkdir(parents=True)  # the checkpoints go there

    torch.manual_seed(0)
    model = twin.VAE(16)
    model.mean_image.copy_(twin.to_pixels(images).mean(0))
    with twin.tqdm(disable=True) as bar:
        history = twin.train(model, split, config, None, bar)

    first = history[0]
    last = history[-1]
    learned = first["train_loss"] - last["train_loss"]
    assert len(history) == epochs
    assert learned > 0
    # These are the same images, so the two curves agree at the end.
    assert abs(last["validation_loss"] - last["train_loss"]) < 0.1 * learned
    if twin is vae_mnist:
        assert last["train_kl"] == pytest.approx(last["validation_kl"], rel=0.3)
        assert last["validation_loss"] < 45  # 90 at the start; a bar's place alone takes 5 nats
        encoded, _ = twin.evaluate(model, images, config)
        refined, _ = twin.evaluate(model, images, config, refine=True)
        assert refined["neg_elbo"] < encoded["neg_elbo"]


def test_training_weighs_the_reconstruction_of_faces(here, monkeypatch):
    """At a weight of 0 the decoder of the details, which starts at 0, learns nothing."""
    images = random_images(vae_anime, 16)
    split = {"train": images, "validation": images}
    config = vae_anime.Config(epochs=1, batch_size=8, latent_dim=4)
    config.folder.mkdir(parents=True)  # the checkpoint goes there

    learned = []
    for weight in (0.0, 1.0):
        monkeypatch.setattr(vae_anime, "reconstruction_weight", lambda *_, weight=weight: weight)
        model = tiny_model(vae_anime)
        with vae_anime.tqdm(disable=True) as bar:
            vae_anime.train(model, split, config, None, bar)
        learned.append(model.detail_decoder[-1][0].weight.any().item())
    assert learned == [False, True]


@each_twin
@whole_run
def test_the_fitted_prior_is_kept_only_where_it_helps(twin, here, monkeypatch):
    fitted = put_finished_run(twin)["kl"]["validation"]
    normal = run(twin, "--prior", "normal")["kl"]["validation"]
    assert fitted <= normal + 0.01

    fit = twin.GaussianMixture.fit

    def misfit(mixture, z):
        fit(mixture, z).means_ += 9

    monkeypatch.setattr(twin.GaussianMixture, "fit", misfit)
    assert run(twin)["kl"]["validation"] == normal


# Runs ---------------------------------------------------------------------------------------------
FIGURES = ["learning-curve", "reconstructions", "samples", "interpolation", "posterior"]


@pytest.mark.figures
@each_twin
def test_run_leaves_what_it_promises(twin, here):
    """With the figures as users get them, and all steps of refinement."""
    metrics = run(twin)
    folder = folder_of(twin)
    files = {"config.json", "history.csv", "metrics.json", "checkpoint.pt"}
    files |= {f"{name}.png" for name in FIGURES}
    files.add("interpolation.npz")
    assert {path.name for path in folder.iterdir()} == files
    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.height > 500

    assert json.loads((folder / "metrics.json").read_text()) == metrics
    terms = ("neg_elbo", "reconstruction", "kl", "loss")
    for term in terms:
        assert set(metrics[term]) == {"train", "validation", "test"}
    others = {"lambda", "bits_per_dim", "psnr_db", "active_units"}
    others |= {"latent_dim", "parameters", "epochs", "seconds"}
    assert set(metrics) == others.union(terms)
    assert metrics["lambda"] == 1.0
    assert metrics["latent_dim"] == 4
    assert metrics["epochs"] == 2
    assert metrics["seconds"] > 0

    neg_elbo = metrics["neg_elbo"]["test"]
    terms_added = metrics["reconstruction"]["test"] + metrics["kl"]["test"]
    assert neg_elbo == pytest.approx(terms_added)
    offset = 0 if twin is vae_mnist else math.log2(255)  # from densities to 256 values
    bits_per_dim = neg_elbo / math.prod(SHAPE[twin]) / math.log(2) + offset
    assert metrics["bits_per_dim"] == pytest.approx(bits_per_dim)

    history = pd.read_csv(folder / "history.csv")
    columns = ["epoch", "seconds"]
    for term in ("reconstruction", "kl", "loss"):
        columns += [f"train_{term}", f"validation_{term}"]
    assert list(history) == columns
    assert list(history["epoch"]) == [1, 2]
    assert history["seconds"].is_monotonic_increasing


@each_twin
@whole_run
def test_walks_are_kept_as_arrays(twin, here):
    """Each row: a real image, ten steps to another, and that one."""
    put_finished_run(twin)
    with np.load(folder_of(twin) / "interpolation.npz") as arrays:
        walks = arrays["image"]
    images, _ = twin.load_images(Path(DATA[twin]))
    test = twin.split_images(images, twin.Config())["test"]
    if twin is vae_mnist:
        test = 255 * twin.to_pixels(test)
    real = test.permute(0, 2, 3, 1).numpy()
    rows = len(test) // 2
    assert walks.shape == (rows, 12, *real.shape[1:])
    assert walks.dtype == np.uint8
    np.testing.assert_array_equal(walks[:, 0], real[0 : 2 * rows : 2])
    np.testing.assert_array_equal(walks[:, 11], real[1 : 2 * rows : 2])


@each_twin
@whole_run
def test_parameters_counts_the_trained_weights(twin, here):
    metrics = put_finished_run(twin)
    weights = twin.VAE(4).parameters()
    assert metrics["parameters"] == sum(weight.numel() for weight in weights)


def test_parameters_of_the_default_models():
    counts = []
    for twin in TWINS:
        model = twin.VAE(twin.Config().latent_dim)
        counts.append(sum(weight.numel() for weight in model.parameters()))
    assert counts == [406_665, 2_600_840]


@each_twin
@whole_run
def test_config_describes_the_run(twin, here):
    put_finished_run(twin)
    config = json.loads((folder_of(twin) / "config.json").read_text())
    script = ROOT / f"{twin.__name__}.py"
    assert config["settings"]["epochs"] == 2
    assert config["settings"]["kl_weight"] == 1.0
    data_sha256 = hashlib.sha256(Path(DATA[twin]).read_bytes()).hexdigest()
    assert config["settings"]["data_sha256"] == data_sha256
    assert config["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    assert config["python"] == sys.version.split()[0]
    assert config["torch"] == torch.__version__
    assert config["device"] == "cpu"
    assert config["number_format"] in ("float32", "bfloat16")
    assert config["threads"] == torch.get_num_threads()
    assert config["processes"] == 1


@each_twin
@whole_run
def test_a_finished_run_is_not_trained_again_with_resume(twin, here, capsys, monkeypatch):
    metrics = put_finished_run(twin)
    monkeypatch.setattr(twin, "train", None)
    capsys.readouterr()
    assert run(twin, "--resume") == metrics
    assert "was finished before" in capsys.readouterr().out


@each_twin
@whole_run
def test_without_resume_a_run_starts_over_and_keeps_the_earlier_one(twin, here):
    metrics = put_finished_run(twin)
    assert without_seconds(run(twin)) == without_seconds(metrics)
    previous = folder_of(twin).with_name("lambda-1.previous")
    assert json.loads((previous / "metrics.json").read_text()) == metrics


@each_twin
def test_a_run_ends_with_how_many_units_are_active(twin, here, capsys):
    metrics = run(twin, "--epochs", "1", "--latent-dim", "5")
    assert f"λ = 1: {metrics['active_units']} of 5 units of z are active" in capsys.readouterr().out


@each_twin
def test_few_steps_of_training_are_a_hint(twin, here, capsys):
    run(twin, "--epochs", "1")
    printed = capsys.readouterr().out
    assert re.search(r"hint      only \d+ steps of training; give a smaller --batch-size", printed)


@each_twin
@whole_run
def test_evaluate_scores_a_file(twin, here, capsys):
    put_finished_run(twin)
    capsys.readouterr()
    scores = twin.main(["--evaluate", DATA[twin], "--device", "cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == scores
    assert scores["images"] == 60
    for name in ("neg_elbo", "reconstruction", "kl", "bits_per_dim", "psnr_db"):
        assert isinstance(scores[name], float)

    arrays = np.load(folder_of(twin) / "reconstructions.npz", allow_pickle=False)
    assert arrays["image"].shape == (60, *SAVED_SHAPE[twin])
    assert arrays["reconstruction"].shape == (60, *SAVED_SHAPE[twin])
    size = SHAPE[twin][-1]
    with Image.open(folder_of(twin) / "reconstructions-60.png") as picture:
        # Each cell is a pair and a white line around it; 60 of them are eight by eight.
        assert picture.size == (8 * (2 * size + 2), 8 * (size + 2))


@each_twin
@whole_run
def test_reconstructions_of_the_file_are_worth_their_psnr(twin, here):
    put_finished_run(twin)
    scores = twin.main(["--evaluate", DATA[twin], "--device", "cpu"])
    arrays = np.load(folder_of(twin) / "reconstructions.npz", allow_pickle=False)
    image = arrays["image"].astype(float)
    if twin is vae_mnist:
        image = 255.0 * (image >= 128)
    squared_error = np.square((image - arrays["reconstruction"]) / 255).mean()
    assert scores["psnr_db"] == pytest.approx(-10 * math.log10(squared_error), abs=0.02)


@each_twin
@whole_run
def test_sample_draws_images(twin, here):
    put_finished_run(twin)
    assert twin.main(["--sample", "7", "--device", "cpu"]) == {"samples": 7}
    images = np.load(folder_of(twin) / "samples.npz", allow_pickle=False)["image"]
    assert images.shape == (7, *SAVED_SHAPE[twin])
    assert images.dtype == np.uint8
    assert (folder_of(twin) / "samples-7.png").exists()

    twin.main(["--sample", "7", "--device", "cpu"])
    again = np.load(folder_of(twin) / "samples.npz", allow_pickle=False)["image"]
    assert np.array_equal(images, again)


@each_twin
@whole_run
def test_sweep_compares_and_takes_over_finished_models_with_resume(twin, here, capsys):
    longer = ["--epochs", "4"]  # after two, λ = 0 and 1 differ by chance alone
    first = run(twin, "--lambda", "0", *longer)
    checkpoint = folder_of(twin, 0) / "checkpoint.pt"
    written = checkpoint.stat().st_mtime_ns
    table = run(twin, "--lambda", "0", "1", "100", "--resume", *longer)
    assert checkpoint.stat().st_mtime_ns == written
    assert list(table) == ["0", "1", "100"]
    assert table["0"] == first
    kl = [metrics["kl"]["test"] for metrics in table.values()]
    assert kl == sorted(kl, reverse=True)
    assert len(set(kl)) == 3

    out = Path("runs", twin.__name__)
    assert (out / "lambda-sheet.png").exists()
    sweep = pd.read_csv(out / "sweep.csv")
    assert list(sweep["lambda"]) == [0, 1, 100]
    assert list(sweep["kl"]) == pytest.approx(kl)


@each_twin
@whole_run
def test_sweep_without_resume_trains_each_model_again(twin, here):
    put_finished_run(twin)
    run(twin, "--lambda", "1", "100", "--epochs", "1", "--limit", "30")
    assert folder_of(twin, 1).with_name("lambda-1.previous").is_dir()


@each_twin
def test_runs_from_an_empty_folder(twin, here):
    """A script copied alone says what it lacks in one line, and with --data it trains."""
    folder = here / "empty"
    folder.mkdir()
    script = f"{twin.__name__}.py"
    shutil.copy(ROOT / script, folder)
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert twin.DATA_FILE.name in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == [script]

    command += ["--data", str(here / DATA[twin]), *SMALL, "--limit", "20"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / folder_of(twin) / "samples.png").exists()


# Files of images ----------------------------------------------------------------------------------
def test_faces_are_read_from_a_zip_file_or_a_folder(here):
    images, sha256 = vae_anime.load_images(Path("faces.zip"))
    order = sorted(range(60), key=lambda i: f"{i}.png")
    assert torch.equal(images, face_tensor(60)[order])
    assert sha256 == hashlib.sha256(Path("faces.zip").read_bytes()).hexdigest()

    zipfile.ZipFile("faces.zip").extractall("folder/deep")
    from_folder, _ = vae_anime.load_images(Path("folder"))
    assert torch.equal(from_folder, images)


def huge_png(side: int) -> bytes:
    """The head of a picture of side x side pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(head))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + head + checksum + struct.pack(">I", 9) + b"IDAT"


def test_faces_of_other_kinds_are_converted_skipped_and_counted(here, capsys):
    grey = Image.new("L", (64, 64), 90)
    colour = Image.new("RGB", (64, 64), (200, 10, 10))
    readable = [
        ("a/grey.png", png(grey)),
        ("a/palette.png", png(colour.quantize(4))),
        ("a/rgba.png", png(colour.convert("RGBA"))),
        ("a/big.png", png(colour.resize((128, 100)))),
        ("a/photograph.png", png(Image.new("RGB", (4000, 3000)))),
        ("../../escape.png", png(colour)),
    ]
    unreadable = [
        ("a/broken.png", b"\x89PNG not"),
        ("a/huge.png", huge_png(8_000)),
        ("a/huger.png", huge_png(60_000)),
        ("a/notes.txt", "hello"),
    ]
    write_zip("mixed.zip", faces(20), extra=readable + unreadable)

    images, _ = vae_anime.load_images(Path("mixed.zip"))
    printed = capsys.readouterr().out
    assert len(images) == 20 + len(readable)
    assert "2 of 30 files cannot be read, such as 'a/broken.png', 'a/notes.txt': none of" in printed
    assert "1 of 30 files cannot be read, such as 'a/huge.png': more than" in printed
    assert "1 of 30 files cannot be read, such as 'a/huger.png': Image size exceeds" in printed
    assert "2 of 26 are not square: --fit squeeze" in printed
    red = (images[:, 0] == 200).flatten(1).all(1)
    assert red.sum() == 4
    assert not list(here.parent.rglob("escape.png"))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def corners(*colours: tuple[int, int, int]) -> Image.Image:
    """A picture of SIZE x SIZE whose quarters have these colours, row by row."""
    quarters = np.array(colours, np.uint8).reshape(2, 2, 3)
    return Image.fromarray(quarters.repeat(32, 0).repeat(32, 1))


FOUR_COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "GIF": {}, "TIFF": {}, "PPM": {}}


@pytest.mark.parametrize("name", ["a.jpg", "b.gif", "none"])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_pictures_are_judged_by_their_bytes(here, kind, name):
    picture = corners(*FOUR_COLOURS)
    write_zip("faces.zip", [], extra=[(name, encoded(picture, kind, **LOSSLESS[kind]))])
    images, _ = vae_anime.load_images(Path("faces.zip"))
    assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(picture))


def test_of_an_animation_the_first_frame_is_read(here):
    frames = [corners(*FOUR_COLOURS), corners(*FOUR_COLOURS[::-1])]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    write_zip("faces.zip", [], extra=[("moving.gif", content)])
    images, _ = vae_anime.load_images(Path("faces.zip"))
    assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(frames[0]))


UPRIGHT = {  # how the stored picture is turned, by the value of the tag
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_upright(here, kind, orientation):
    upright = corners(*FOUR_COLOURS)
    stored = upright
    if UPRIGHT[orientation] is not None:
        stored = upright.transpose(UPRIGHT[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, kind, exif=exif)
    write_zip("faces.zip", [], extra=[("photo", content)])

    images, _ = vae_anime.load_images(Path("faces.zip"))
    difference = images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(upright)
    inside = np.abs(difference)[8:24, 8:24]  # JPEG blurs the edges
    assert inside.max() < 12


def test_a_damaged_orientation_counts_as_none(here, recwarn):
    picture = corners(*FOUR_COLOURS)
    content = encoded(picture, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    recwarn.clear()
    write_zip("faces.zip", [], extra=[("photo.png", content)])
    images, _ = vae_anime.load_images(Path("faces.zip"))
    assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(picture))
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_pictures_stand_on_white(here, kind):
    picture = corners(*FOUR_COLOURS).convert("RGBA")
    opacity = np.full((64, 64), 255, np.uint8)
    opacity[:32, :32] = 0
    opacity[32:, :32] = 51
    picture.putalpha(Image.fromarray(opacity))
    content = encoded(picture, kind, lossless=True, exact=True)
    write_zip("faces.zip", [], extra=[("icon", content)])

    images, _ = vae_anime.load_images(Path("faces.zip"))
    expected = [(255, 255, 255), (0, 250, 0), (204, 204, 254), (250, 250, 0)]
    assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(corners(*expected)))


def test_a_transparent_colour_of_a_palette_stands_on_white(here):
    picture = Image.new("P", (64, 64), 1)
    picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.paste(0, (0, 0, 32, 64))
    contents = [encoded(picture, kind, transparency=0) for kind in ("PNG", "GIF")]
    write_zip("faces.zip", [], extra=list(zip("ab", contents, strict=True)))
    images, _ = vae_anime.load_images(Path("faces.zip"))
    assert (images[:, :, :, :32] == 255).all()
    assert (images[:, 0, :, 32:] == 200).all()


def test_large_photos_are_shrunk_while_they_are_decoded(here):
    photo = corners(*FOUR_COLOURS).resize((8000, 8000), Image.Resampling.NEAREST)
    write_zip("faces.zip", [], extra=[("photo.jpg", encoded(photo, "JPEG"))])
    images, _ = vae_anime.load_images(Path("faces.zip"))
    difference = images[0].permute(1, 2, 0).numpy().astype(int)
    difference -= np.asarray(corners(*FOUR_COLOURS))
    assert np.abs(difference)[4:28, 4:28].max() < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_values_of_16_bits_are_scaled(here, kind):
    grey = np.arange(64 * 64).reshape(64, 64) % 256
    deep = Image.fromarray((grey * 257).astype(np.uint16))
    if kind == "PPM":
        deep = deep.convert("I")
    write_zip("faces.zip", [], extra=[("deep", encoded(deep, kind))])
    images, _ = vae_anime.load_images(Path("faces.zip"))
    assert np.array_equal(images[0], np.stack([grey] * 3))


def test_hidden_files_are_not_counted(here, capsys):
    hidden = ["__MACOSX/data/._0.png", "data/._0.png", ".DS_Store", "data/.thumbs/0.png"]
    write_zip("faces.zip", faces(20), extra=[(name, b"Mac OS X") for name in hidden])
    images, _ = vae_anime.load_images(Path("faces.zip"))
    zipfile.ZipFile("faces.zip").extractall("folder")
    from_folder, _ = vae_anime.load_images(Path("folder"))
    assert len(images) == len(from_folder) == 20
    assert capsys.readouterr().out == ""


def test_two_members_of_one_name_are_two_pictures(here):
    colours = [(200, 10, 10), (10, 10, 200)]
    contents = [png(Image.new("RGB", (64, 64), colour)) for colour in colours]
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip("faces.zip", [], extra=[("a.png", contents[0]), ("a.png", contents[1])])
    images, _ = vae_anime.load_images(Path("faces.zip"))
    assert images[:, :, 0, 0].tolist() == [list(colour) for colour in colours]


def test_linked_folders_are_read_once(here):
    zipfile.ZipFile("faces.zip").extractall("elsewhere")
    Path("folder").mkdir()
    Path("folder/link").symlink_to(here / "elsewhere")
    Path("folder/same").symlink_to(here / "elsewhere")
    Path("elsewhere/back").symlink_to(here / "folder")
    images, _ = vae_anime.load_images(Path("folder"))
    expected, _ = vae_anime.load_images(Path("faces.zip"))
    assert torch.equal(images, expected)


def write_pictures(twin) -> None:
    """60 pictures in the folder `data`, as files."""
    images = digits() if twin is vae_mnist else faces()
    write_zip("pictures.zip", images)
    zipfile.ZipFile("pictures.zip").extractall(".")


@each_twin
@whole_run
@pytest.mark.parametrize("out", ["data/results", "data"])
def test_the_figures_of_runs_are_left_out(twin, here, capsys, out):
    write_pictures(twin)
    words = ["--data", "data", *SMALL, "--epochs", "1", "--lambda", "0", "1", "--out", out]
    twin.main(words)
    first = json.loads(Path(out, "lambda-1/config.json").read_text())
    capsys.readouterr()
    twin.main(words)
    second = json.loads(Path(out, "lambda-1/config.json").read_text())

    assert second["settings"]["data_sha256"] == first["settings"]["data_sha256"]
    printed = capsys.readouterr().out
    assert f"left out {out}/lambda-1, the folder of a run" in printed
    assert "48 train, 6 validation, 6 test" in printed


@each_twin
def test_a_folder_that_holds_the_courses_file(twin, here):
    name = twin.DATA_FILE.name
    Path("data").mkdir()
    shutil.copy(DATA[twin], Path("data", name))
    Path("data/notes.txt").write_text("hello")
    assert twin.find_data(Path("data")) == Path("data", name)


@each_twin
def test_pictures_are_squeezed_or_cropped(twin, here, capsys):
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 30:90] = 200
    Path("wide").mkdir()
    Image.fromarray(wide).save("wide/a.png")

    squeezed, _ = twin.load_images(Path("wide"))
    assert "1 of 1 are not square: --fit squeeze" in capsys.readouterr().out
    cropped, _ = twin.load_images(Path("wide"), "crop")
    assert "1 of 1 are not square: --fit crop" in capsys.readouterr().out
    assert (squeezed[..., 0] == 0).all()
    assert (squeezed[..., twin.SIZE // 2] == 200).all()
    assert (cropped == 200).all()


@each_twin
@whole_run
def test_fit_is_kept_with_the_model(twin, here, capsys):
    """So the model is scored on images that were made square as its own were."""
    images = faces(30) if twin is vae_anime else digits(30)
    write_zip("wide.zip", images[:, 8:24])
    words = ["--data", "wide.zip", *SMALL, "--epochs", "1", "--fit", "crop"]
    twin.main(words)
    expected, _ = twin.load_images(Path("wide.zip"), "crop")
    twin.main(["--evaluate", "wide.zip", "--device", "cpu"])
    saved = np.load(folder_of(twin) / "reconstructions.npz")["image"]
    assert np.array_equal(saved, expected.permute(0, 2, 3, 1).squeeze(-1))
    error = error_line(capsys, twin, [*words, "--fit", "squeeze", "--resume"])
    assert "trained with fit crop, not squeeze" in error


@each_twin
def test_reading_thousands_of_pictures_shows_a_bar(twin, here, capsys, monkeypatch):
    write_pictures(twin)
    monkeypatch.setattr(twin, "tqdm", functools.partial(twin.tqdm, delay=0))
    read = twin.decode_picture

    def read_slowly(content: bytes) -> Image.Image:
        time.sleep(0.1)
        return read(content)

    monkeypatch.setattr(twin, "decode_picture", read_slowly)
    twin.load_images(Path("data"))
    assert re.search(r"reading: .*/60", capsys.readouterr().out)


def test_a_folder_or_zip_file_of_digits(here):
    write_pictures(vae_mnist)
    order = sorted(range(60), key=lambda i: f"{i}.png")
    from_folder, _ = vae_mnist.load_images(Path("data"))
    from_zip, _ = vae_mnist.load_images(Path("pictures.zip"))
    assert np.array_equal(from_folder[:, 0], digits()[order])
    assert torch.equal(from_zip, from_folder)


def test_zip_member_that_unpacks_to_far_more_than_an_image(here, capsys):
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb.png", "w", force_zip64=True) as member:
            for _ in range(16):
                member.write(bytes(2**24))  # 256 MiB in all
        archive.writestr("good.png", png(Image.new("RGB", (64, 64))))
    images, _ = vae_anime.load_images(Path("bomb.zip"))
    assert len(images) == 1
    assert "bomb.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, array",
    [
        ("pictures", digits()),
        ("image", digits()[..., None]),
        ("image", digits()[:, None]),
        ("image", digits().astype(np.int32)),
        ("image", digits().reshape(60, 784)),
        ("image", digits().reshape(60, 1, 784)),
        ("image", digits()[..., None].repeat(3, -1)),
        ("image", digits()[:, None].repeat(3, 1)),
    ],
    ids=[
        "other name",
        "channel last",
        "channel first",
        "integers",
        "flat",
        "flat with an axis",
        "RGB",
        "RGB first",
    ],
)
def test_digits_of_other_kinds(here, capsys, name, array):
    np.savez("other.npz", label=np.zeros(60), **{name: array})
    images, _ = vae_mnist.load_images(Path("other.npz"))
    assert images.shape == (60, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert capsys.readouterr().out == f"images    {name} {array.shape}\n"
    assert np.array_equal(images[:, 0], digits())


def test_transparent_digits_stand_on_white(here):
    opacity = np.full_like(digits(), 255)
    opacity[:, :, :14] = 0
    opacity[:, 1:, 14:] = 51
    black = np.zeros_like(opacity)
    np.savez("other.npz", image=np.stack([black, black, black, opacity], -1))
    images, _ = vae_mnist.load_images(Path("other.npz"))
    assert (images[..., :14] == 255).all()
    assert (images[..., 0, 14:] == 0).all()
    assert (images[..., 1:, 14:] == 204).all()


def test_the_array_with_the_most_images_is_read_and_named(here, capsys):
    arrays = {
        "x_test": digits(20),
        "y_test": np.eye(10)[np.zeros(20, int)],
        "x_train": digits(),
        "y_train": np.eye(81)[np.zeros(60, int)],  # 81 classes are as long as 9 x 9 pixels
    }
    np.savez("mnist.npz", **arrays)
    images, _ = vae_mnist.load_images(Path("mnist.npz"))
    assert np.array_equal(images[:, 0], digits())
    printed = capsys.readouterr().out
    assert printed.startswith("images    x_train (60, 28, 28), not x_test (20, 28, 28)")


def test_members_that_are_no_arrays_of_numbers_are_passed_over(here):
    names = np.array(["a", None], dtype=object)
    np.savez("other.npz", classes=names, words=np.array(["a", "b"]), photos=digits())
    with zipfile.ZipFile("other.npz", "a") as archive:
        archive.writestr("README.txt", "hello")
    images, _ = vae_mnist.load_images(Path("other.npz"))
    assert np.array_equal(images[:, 0], digits())


OVERSHOOT = digits() / 255.0
OVERSHOOT[:, 14, 14] = 1.0000002
UNDERSHOOT = digits() / 255.0 - 2e-7


@pytest.mark.parametrize(
    "array, expected, top",
    [
        (digits() / 255.0, digits(), 1),
        (digits() >> 7, 255 * (digits() >> 7), 1),
        (digits() >= 128, 255 * (digits() >> 7), 1),
        (UNDERSHOOT, digits(), 1),
        (digits() // 160 * 16, 255 * (digits() // 160), 16),
        (digits().astype(np.uint16) * 257, digits(), 65535),
    ],
    ids=["floats", "0 and 1", "booleans", "rounding errors", "0 to 16", "16 bits"],
)
def test_digits_of_other_ranges_are_stretched_and_the_run_says_so(
    here, capsys, array, expected, top
):
    np.savez("other.npz", image=array)
    images, _ = vae_mnist.load_images(Path("other.npz"))
    assert np.array_equal(images[:, 0], expected)
    assert f"values from 0 to {top}, stretched to 255" in capsys.readouterr().out


@pytest.mark.parametrize(
    "array, expected",
    [(OVERSHOOT, None), (np.where(digits() == 0, -0.0, digits()), digits())],
    ids=["just over 1", "negative zeros"],
)
def test_digits_with_rounding_errors(here, array, expected):
    np.savez("other.npz", image=array)
    images, _ = vae_mnist.load_images(Path("other.npz"))
    if expected is None:
        expected = (array * 255).round()
    assert np.array_equal(images[:, 0], expected)


@each_twin
@whole_run
def test_blank_images_are_a_warning_at_the_start_and_the_end(twin, here, capsys):
    blank = np.zeros((3, *SAVED_SHAPE[twin]), np.uint8)
    images = np.concatenate([blank, digits(30) if twin is vae_mnist else faces(30)])
    write_zip("some.zip", images)
    twin.main(["--data", "some.zip", *SMALL, "--epochs", "1"])
    printed = capsys.readouterr().out
    assert printed.count("warning   some.zip: 3 images ") == 2


def test_larger_digits_are_averaged(here):
    np.savez("large.npz", image=digits().repeat(2, 1).repeat(2, 2))
    images, _ = vae_mnist.load_images(Path("large.npz"))
    assert np.array_equal(images[:, 0], digits())


def test_one_digit_alone_is_an_image(here):
    np.savez("one.npz", image=digits(1))
    images, _ = vae_mnist.load_images(Path("one.npz"))
    assert images.shape == (1, 1, 28, 28)


# Bad input ----------------------------------------------------------------------------------------
def nothing(twin) -> None:
    """The files are in order; the flags are not."""


def remove(twin) -> None:
    Path(DATA[twin]).unlink()


def write_rubbish(twin) -> None:
    Path(DATA[twin]).write_bytes(b"PK rubbish")


def truncate(twin) -> None:
    path = Path(DATA[twin])
    path.write_bytes(path.read_bytes()[:-400])


def keep_five_images(twin) -> None:
    np.savez("digits.npz", image=digits(5))
    write_zip("faces.zip", faces(5))


def pickle_objects(twin) -> None:
    np.savez("digits.npz", image=np.array([{"a": 1}] * 20, dtype=object))


def save_labels_alone(twin) -> None:
    np.savez("digits.npz", label=np.zeros(9))


def save_nan(twin) -> None:
    images = digits().astype(float)
    images[3, 3, 3] = np.nan
    np.savez("digits.npz", image=images)


def save_large_value(twin) -> None:
    images = digits().astype(int)
    images[3, 3, 3] = 300
    np.savez("digits.npz", image=images)


def save_negative_value(twin) -> None:
    images = digits().astype(int)
    images[3, 3, 3] = -1
    np.savez("digits.npz", image=images)


def save_oblong(twin) -> None:
    np.savez("digits.npz", image=np.zeros((60, 28, 40), np.uint8))


def save_no_picture(twin) -> None:
    write_zip("faces.zip", [], extra=[("a.txt", "x")])


def save_broken_picture(twin) -> None:
    write_zip("faces.zip", [], extra=[("a.png", "x")])


def truncate_pictures(twin) -> None:
    contents = [encoded(Image.fromarray(image), "JPEG")[:-40] for image in faces(3)]
    write_zip("faces.zip", [], extra=[(f"{i}.jpg", each) for i, each in enumerate(contents)])


def put_the_zip_into_a_zip(twin) -> None:
    write_zip("faces.zip", [], extra=[("inner.zip", Path("faces.zip").read_bytes())])


def compress_otherwise(twin) -> None:
    """Mark the members as compressed by deflate64, as Windows does for large ones."""
    content = Path("faces.zip").read_bytes()
    content = re.sub(rb"(PK\x03\x04.{4})..", rb"\1\t\0", content, flags=re.S)
    content = re.sub(rb"(PK\x01\x02.{6})..", rb"\1\t\0", content, flags=re.S)
    Path("faces.zip").write_bytes(content)


def save_blank_faces(twin) -> None:
    write_zip("faces.zip", np.full((30, 64, 64, 3), 90, np.uint8))


def save_blank_digits(twin) -> None:
    np.savez("digits.npz", image=np.zeros((60, 28, 28)))


def save_lit_digits(twin) -> None:
    np.savez("digits.npz", image=np.full((60, 28, 28), 200, np.uint8))


def leave_a_run(twin) -> None:
    put_finished_run(twin, "out")
    Path("out/lambda-1/metrics.json").unlink()


def leave_a_run_on_other_data(twin) -> None:
    leave_a_run(twin)
    np.savez_compressed("digits.npz", image=digits(59))
    write_zip("faces.zip", faces(59))


def leave_a_run_of_the_other_twin(twin) -> None:
    leave_a_run(vae_anime if twin is vae_mnist else vae_mnist)


def make_out_a_file(twin) -> None:
    Path("out").touch()


def put_homework_into_the_folder(twin) -> None:
    Path("out/lambda-1").mkdir(parents=True)
    Path("out/lambda-1/homework.txt").write_text("mine")


class Case(NamedTuple):
    """What a user does wrong, and what the line says."""

    name: str
    prepare: Callable[[ModuleType], None]
    words: str
    message: str


IN_BOTH = [
    Case("no file", remove, "", ": no such file. The real file is the course's; put it"),
    Case("rubbish", write_rubbish, "", "File is not a zip file. Give "),
    Case("truncated", truncate, "", "File is not a zip file. Give "),
    Case("few images", keep_five_images, "", "5 images are too few to split. Give 20 or more"),
    Case("small limit", nothing, "--limit 2", "2 images are too few to split. Give 20 or more"),
    Case("negative", nothing, "--lambda -1", "--lambda: -1: give a number, 0 or more"),
    Case("nan", nothing, "--lambda nan", "--lambda: nan: give a number, 0 or more"),
    Case("infinite", nothing, "--lr inf", "--lr: inf: give a number, 0 or more"),
    Case("no number", nothing, "--lr fast", "--lr: fast: give a number, 0 or more"),
    Case("no epoch", nothing, "--epochs 0", "--epochs: 0: give a whole number, 1 or more"),
    Case("half a batch", nothing, "--batch-size 1.5", "1.5: give a whole number, 1 or more"),
    Case("large seed", nothing, "--seed 4294967296", "give a whole number from 0 to 4294967295"),
    Case("other flag", nothing, "--lamda 1", "unrecognized arguments: --lamda 1"),
    Case("two tasks", nothing, "--sample 3 --lambda 1 2", "give only one of --evaluate, --sample"),
    Case("no such device", nothing, "--device mps", "Use --device cpu"),
    Case("diverges", nothing, "--epochs 1 --batch-size 48 --lr 1e9", "Lower --lr"),
    Case(
        "other latents",
        leave_a_run,
        "--out out --resume --latent-dim 5",
        "trained with latent_dim 4, not 5. Give the same data and flags",
    ),
    Case("other data", leave_a_run_on_other_data, "--out out --resume", "other contents of data"),
    Case(
        "other twin",
        leave_a_run_of_the_other_twin,
        "--out out --resume",
        "not a checkpoint of vae_",
    ),
    Case("no model", nothing, "--sample 3", "lambda-1: no finished run there. Train first"),
    Case("no model to score", nothing, "--evaluate x", "lambda-1: no finished run there."),
    Case("out is a file", make_out_a_file, "--out out", ". Name another folder with --out"),
    Case("foreign folder", put_homework_into_the_folder, "--out out", "not the folder of a run"),
]
IN_DIGITS = [
    Case("pickled", pickle_objects, "", "Object arrays cannot be loaded"),
    Case("no images", save_labels_alone, "", "no square images (N, H, W) in it; found label (9,)"),
    Case("nan pixel", save_nan, "", "values outside 0 to 255"),
    Case("large pixel", save_large_value, "", "values outside 0 to 255"),
    Case("negative pixel", save_negative_value, "", "values outside 0 to 255"),
    Case("all dark", save_blank_digits, "", "no image has dark and lit pixels. Scale them"),
    Case("all lit", save_lit_digits, "", "no image has dark and lit pixels. Scale them"),
    Case("oblong", save_oblong, "", "no square images (N, H, W) in it; found image (60, 28, 40)"),
]
IN_FACES = [
    Case("no picture", save_no_picture, "", "'a.txt': none of PNG, JPEG"),
    Case("none readable", save_broken_picture, "", "1 of 1 files cannot be read, such as 'a.png'"),
    Case("truncated", truncate_pictures, "", "'2.jpg': image file is truncated. Give a zip file"),
    Case("nested", put_the_zip_into_a_zip, "", "such as 'inner.zip': none of PNG, JPEG"),
    Case("other compression", compress_otherwise, "", "'data/12.png': That compression method"),
    Case("blank", save_blank_faces, "", "each image is of one grey value"),
]
CASES = [(vae_mnist, case) for case in IN_BOTH + IN_DIGITS]
CASES += [(vae_anime, case) for case in IN_BOTH + IN_FACES]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "twin, case", CASES, ids=[f"{case.name} {twin.__name__}" for twin, case in CASES]
)
@whole_run
def test_bad_input_ends_with_one_line(here, capsys, twin, case):
    case.prepare(twin)
    before = contents(Path("out"))
    words = ["--data", DATA[twin], *SMALL, *case.words.split()]
    error = error_line(capsys, twin, words)
    assert case.message in error
    assert not list(here.rglob("metrics.json"))
    after = contents(Path("out"))
    assert {path: after.get(path) for path in before} == before


def interrupt(*args) -> None:
    raise KeyboardInterrupt


@each_twin
@whole_run
def test_an_unfinished_run_has_no_model_to_use(twin, here, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(twin, "plot_learning_curve", interrupt)
        with pytest.raises(SystemExit):
            run(twin, "--epochs", "1", "--limit", "20")
    assert (folder_of(twin) / "checkpoint.pt").exists()
    error = error_line(capsys, twin, ["--sample", "3"])
    assert "no finished run there. Train first" in error


@each_twin
@whole_run
def test_a_checkpoint_of_another_version_ends_with_one_line(twin, here, capsys):
    put_finished_run(twin)
    path = folder_of(twin) / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["version"] = f"{twin.__name__} 1"
    torch.save(checkpoint, path)
    error = error_line(capsys, twin, ["--sample", "3"])
    assert f"not a checkpoint of {twin.CHECKPOINT_VERSION}" in error


@each_twin
def test_the_next_command_samples_at_lambda_1_and_the_runs_temperature(twin, here, capsys):
    run(twin, "--lambda", "1", "100", "--epochs", "1", "--temperature", "0.5")
    [line] = [row for row in capsys.readouterr().out.splitlines() if row.startswith("next ")]
    assert "--sample 100 --lambda 1 " in line
    assert line.endswith("--temperature 0.5")
