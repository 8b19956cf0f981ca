"""The twins: mathematics against independent references, runs, every bad input's line."""

import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vae_anime
import vae_mnist

TWINS = [vae_mnist, vae_anime]
SMALL = shlex.split(
    "--epochs 2 --batch-size 16 --latent-dim 4 --iwae 4 --iwae-images 3 --device cpu"
)


def digits(count=60, size=28):
    """White bars on black at random places: enough to learn, in no time."""
    rng = np.random.default_rng(0)
    images = np.zeros((count, size, size), np.uint8)
    for image, (row, column) in zip(images, rng.integers(4, size - 12, (count, 2)), strict=True):
        image[row : row + 8, column : column + 3] = rng.integers(160, 256)
    return images


def faces(count=60):
    """A disc of one colour on another."""
    rng = np.random.default_rng(0)
    grid = np.hypot(*np.mgrid[-32:32, -32:32])
    back, front = rng.integers(0, 256, (2, count, 1, 1, 3))
    return np.where((grid < rng.integers(10, 30, (count, 1, 1)))[..., None], front, back).astype(
        np.uint8
    )


def write_zip(path, images, kind="PNG", extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format=kind)
            archive.writestr(f"data/{i}.{kind.lower()}", buffer.getvalue())
        for name, content in extra:
            archive.writestr(name, content)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez_compressed("digits.npz", image=digits(), label=np.zeros(60, np.int64))
    write_zip("faces.zip", faces())
    return tmp_path


def run(twin, *words):
    return twin.main(["--data", "digits.npz" if twin is vae_mnist else "faces.zip", *SMALL, *words])


def folder_of(twin, kl_weight=1):
    return Path("runs", twin.SCRIPT, f"lambda-{kl_weight:g}")


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


def tiny_model(twin, count=4, learned_prior=True):
    torch.manual_seed(0)
    model = twin.VAE(count, learned_prior)
    twin.initialize(model, torch.randint(0, 256, (40, *twin.SHAPE), dtype=torch.uint8), 1.0)
    return model.eval()


# mathematics --------------------------------------------------------------------------------------


def random_prior(twin, components, count):
    A = (
        torch.randn(components, count, count).tril(-1)
        + torch.rand(components, count).add(0.5).diag_embed()
    )
    return twin.Prior(torch.randn(components).log_softmax(0), torch.randn(components, count), A)


def torch_prior(prior):
    gaussians = torch.distributions.MultivariateNormal(
        prior.mean, precision_matrix=prior.A.mT @ prior.A
    )
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=prior.log_weights), gaussians
    )


@pytest.mark.parametrize("twin", TWINS)
def test_kl_divergence_equals_torch_distributions(twin):
    torch.manual_seed(0)
    mu, logvar, prior = torch.randn(5, 6), torch.randn(5, 6), random_prior(twin, 1, 6)
    q = torch.distributions.MultivariateNormal(mu, (logvar.exp()).diag_embed())
    expected = torch.distributions.kl_divergence(q, torch_prior(prior).component_distribution)
    torch.testing.assert_close(
        twin.kl_divergence(mu, logvar, prior), expected, rtol=1e-4, atol=1e-4
    )
    normal = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    plain = tiny_model(twin, 6, False).prior()
    torch.testing.assert_close(twin.kl_divergence(mu, logvar, plain), normal)


@pytest.mark.parametrize("twin", TWINS)
def test_kl_to_a_mixture_is_an_upper_bound_and_tight_for_a_sharp_posterior(twin):
    torch.manual_seed(0)
    prior, mu = random_prior(twin, 4, 3), torch.randn(5, 3)
    for logvar, close in ((torch.randn(5, 3), 4.0), (torch.full((5, 3), -12.0), 0.02)):
        q = torch.distributions.Independent(torch.distributions.Normal(mu, (logvar / 2).exp()), 1)
        z = q.sample((20_000,))
        sampled = (q.log_prob(z) - torch_prior(prior).log_prob(z)).mean(0)
        excess = twin.kl_divergence(mu, logvar, prior) - sampled
        assert (excess > -0.05).all() and (excess < close).all()


@pytest.mark.parametrize("twin", TWINS)
def test_fit_prior_of_one_gaussian_is_the_aggregate_posterior(twin):
    mu, logvar = torch.randn(400, 3) @ torch.randn(3, 3), torch.randn(400, 3)
    fitted = twin.fit_prior(random_prior(twin, 1, 3), mu.double(), logvar.double())
    covariance = mu.T.cov(correction=0) + logvar.exp().mean(0).diag()
    torch.testing.assert_close(fitted.mean[0].float(), mu.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        (fitted.A[0].mT @ fitted.A[0]).inverse().float(), covariance, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("twin", TWINS)
def test_fit_prior_equals_scikit_learn_on_sharp_posteriors(twin):
    """With σ near 0 it is EM for a mixture of Gaussians; 20 posteriors of 9,000 hardly show."""
    from sklearn.mixture import GaussianMixture

    torch.manual_seed(0)
    truth = random_prior(twin, 3, 2)._replace(
        mean=torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]])
    )
    mu, logvar = torch_prior(truth).sample((9000,)).double(), torch.full((9000, 2), -16.0).double()
    start = truth._replace(mean=truth.mean + 1, log_weights=torch.full((3,), -math.log(3)))
    fitted = twin.fit_prior(start, mu, logvar)
    reference = GaussianMixture(3, means_init=truth.mean.numpy(), random_state=0).fit(mu.numpy())
    assert torch_prior(fitted).log_prob(mu).mean() == pytest.approx(
        reference.score(mu.numpy()), abs=0.01
    )
    np.testing.assert_allclose(fitted.mean, reference.means_, atol=0.05)
    np.testing.assert_allclose(fitted.log_weights.exp(), reference.weights_, atol=0.01)


@pytest.mark.parametrize("twin", TWINS)
def test_fit_prior_lowers_the_kl_and_stays_sound_where_it_has_little_to_fit(twin):
    prior, mu, logvar = (
        random_prior(twin, 8, 4),
        torch.randn(30, 4).double(),
        torch.randn(30, 4).double(),
    )
    before = twin.kl_divergence(mu, logvar, twin.Prior(*(part.double() for part in prior))).mean()
    assert twin.kl_divergence(mu, logvar, twin.fit_prior(prior, mu, logvar)).mean() < before
    for collapsed in (mu[:1].expand(30, 4), mu[:3]):
        fitted = twin.fit_prior(prior, collapsed, logvar[: len(collapsed)])
        assert all(part.isfinite().all() for part in fitted)
    apart = torch.randn(3, 4).double() * 1e9  # three codes, four dimensions: nothing to invert
    fitted = twin.fit_prior(random_prior(twin, 1, 4), apart, torch.full((3, 4), -20.0).double())
    assert all(part.isfinite().all() for part in fitted)
    model = tiny_model(twin)
    fitted = random_prior(twin, len(model.prior_mean), 4)
    model.set_prior(fitted)
    for found, given in zip(model.prior(), fitted, strict=True):
        torch.testing.assert_close(found, given)


@pytest.mark.parametrize("twin", TWINS)
def test_distribution_and_whitening_are_the_mixtures(twin):
    torch.manual_seed(0)
    prior, z = random_prior(twin, 3, 4), torch.randn(7, 4)
    expected = torch_prior(prior).log_prob(z)
    torch.testing.assert_close(prior.distribution().log_prob(z), expected, rtol=1e-4, atol=1e-4)
    draws = prior.distribution().sample((300_000,))
    torch.testing.assert_close(draws.mean(0), torch_prior(prior).mean, atol=0.05, rtol=0.02)
    m, A = twin.whitening(prior)
    white = (draws - m) @ A.T
    torch.testing.assert_close(white.mean(0), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(white.T.cov(), torch.eye(4), atol=0.03, rtol=0)
    alone = random_prior(twin, 1, 4)
    torch.testing.assert_close(twin.whitening(alone)[1], alone.A[0], rtol=1e-3, atol=1e-4)


def test_log_prob_equals_torch_distributions():
    torch.manual_seed(0)
    logits, x = torch.randn(3, 1, 28, 28), torch.randint(0, 2, (3, 1, 28, 28)).float()
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae_mnist.log_prob(logits, x), expected)
    torch.testing.assert_close(
        vae_mnist.log_prob(logits, x[:1])[1], vae_mnist.log_prob(logits[1:2], x[:1])[0]
    )
    mean, log_sigma, x = torch.rand(3, 3, 64, 64), torch.tensor(-1.3), torch.rand(3, 3, 64, 64)
    expected = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae_anime.log_prob((mean, log_sigma), x), expected)


def test_learned_sigma_is_best_at_the_closed_form():
    mean, x = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    log_sigma = (mean - x).square().mean().sqrt().log().requires_grad_()
    vae_anime.log_prob((mean, log_sigma), x).sum().backward()
    assert abs(log_sigma.grad.item()) < 1e-2 * x.numel() ** 0.5


def start_of(images, count, kl_weight=1.0):
    """A model of faces at its start, the decoder's map (D, k), σ and the variance of the noise."""
    model = vae_anime.VAE(count, True).eval()
    vae_anime.initialize(model, images, kl_weight)
    sigma = model.decoder.log_sigma.exp().item()
    noise = max(kl_weight * sigma**2, 1e-6)
    return model, (model.decoder.linear * vae_anime.LINEAR_PACE).detach().T, sigma, noise


def noisy_faces(count):
    images = torch.from_numpy(faces(count)).permute(0, 3, 1, 2).float()
    return (images + 20 * torch.randn(images.shape)).clamp(0, 255).byte()


def test_faces_start_equals_scikit_learn():
    from sklearn.decomposition import PCA

    torch.manual_seed(0)
    images = noisy_faces(200)
    _, factor, sigma, noise = start_of(images, 5)
    pca = PCA(5).fit(images.numpy().reshape(200, -1) / 255)
    variances = factor.square().sum(0).numpy() + noise  # of the data along each direction
    np.testing.assert_allclose(variances, pca.explained_variance_ * 199 / 200, rtol=1e-3)
    expected = pca.noise_variance_ * 199 / 200 * (200 - 5) / (12288 - 5)  # it divides by the rank
    assert sigma**2 == pytest.approx(expected, rel=1e-3)
    directions = (factor / factor.norm(dim=0)).T.numpy() @ pca.components_.T
    np.testing.assert_allclose(np.abs(np.diag(directions)), 1, rtol=1e-3)


def test_digits_start_from_the_mean_image():
    images = torch.from_numpy(digits(300))[:, None]
    model = vae_mnist.VAE(4, True)
    vae_mnist.initialize(model, images, 1.0)
    mean_image = (images >= 128).float().mean(0)
    torch.testing.assert_close(model.encoder.mean_image, mean_image)
    torch.testing.assert_close(model.decoder.mean_logits.sigmoid(), mean_image.clamp(0.01, 0.99))


def test_more_dimensions_than_images_leave_a_sigma():
    """A start that fits few images to the last pixel has σ near 0: millions of nats on others."""
    assert tiny_model(vae_anime, 100).decoder.log_sigma.exp() > 0.1


def test_faces_start_as_probabilistic_pca():
    """At the start q(z|x) is the exact posterior: each importance weight is the likelihood."""
    torch.manual_seed(0)
    images = noisy_faces(50)
    model, factor, sigma, noise = start_of(images, 4)
    model.encoder.network[-1].bias.data.zero_(), model.decoder.network[-2].bias.data.zero_()
    center, noise = model.decoder.mean_image, torch.full((12288,), noise)
    exact = torch.distributions.LowRankMultivariateNormal(center, factor, noise)
    x = vae_anime.to_pixels(images[:2])
    for i in range(2):
        bound = vae_anime.iwae_bound(model, x[i : i + 1], 2)
        assert bound.item() == pytest.approx(exact.log_prob(x[i].flatten()).item(), rel=1e-4)


def test_start_at_a_weight_is_water_filling():
    images = torch.from_numpy(faces(50)).permute(0, 3, 1, 2)
    used = {}
    for weight in (1.0, 10_000.0):
        model, factor, sigma, noise = start_of(images, 8, weight)
        used[weight] = (factor.norm(dim=0) > 1e-6).sum()
        shares = noise / (factor.square().sum(0) + noise)  # of the data's variance
        torch.testing.assert_close(
            model.encoder.logvar.exp().detach(), shares, rtol=1e-3, atol=1e-6
        )
    assert used[10_000.0] < used[1.0]
    assert start_of(images, 8, 0.0)[2] < start_of(images, 8, 1.0)[2]


@pytest.mark.parametrize("twin", TWINS)
def test_iwae_with_one_sample_is_the_elbo_and_grows_with_more(twin):
    model = tiny_model(twin)
    with torch.no_grad():
        model.prior_mean.fill_(0.3), model.prior_factor.normal_(0, 0.1)
        model.prior_factor.copy_(
            model.prior_factor[:1].expand_as(model.prior_factor)
        )  # the bound is exact there
    x = twin.to_pixels(torch.randint(0, 256, (1, *twin.SHAPE)))
    bounds = [twin.iwae_bound(model, x, 1).item() for _ in range(400)]
    with torch.no_grad():
        mu, logvar = model.encode(x)
        z = twin.reparameterize(mu, logvar, torch.randn(400, 4))
        reconstruction = -twin.log_prob(model.decoder(z), x).mean()
        elbo = -(reconstruction + twin.kl_divergence(mu, logvar, model.prior())).item()
    spread = np.std(bounds) / 20
    assert abs(np.mean(bounds) - elbo) < 6 * spread + 1e-3 * abs(elbo)
    many = twin.iwae_bound(model, x, 300).item()
    assert many >= np.mean(bounds) - 1e-4 * abs(elbo)
    assert (
        abs(many - np.logaddexp.reduce(bounds) + math.log(400)) < 2
    )  # their mean, in logs; ln 300 is 5.7


@pytest.mark.parametrize("twin", TWINS)
def test_collapse_is_measured(twin):
    """Three units carry the image and one, with q = p, nothing; of a collapsed model none does."""
    model = tiny_model(twin, learned_prior=False)
    mean_u, _ = twin.describe_posterior(model, torch.zeros(500, 4), torch.zeros(500, 4))
    assert mean_u.var(0).max() < twin.ACTIVE
    mu = torch.randn(500, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    logvar = torch.tensor([-12.0, -12.0, -12.0, 0.0]).expand(500, 4)
    mean_u, var_u = twin.describe_posterior(model, mu, logvar)
    assert (mean_u.var(0) > twin.ACTIVE).tolist() == [True, True, True, False]
    torch.testing.assert_close(var_u, logvar.double().exp())


@pytest.mark.parametrize("twin", TWINS)
def test_kl_of_marginals_adds_up_where_the_prior_is_normal(twin):
    model, mu, logvar = tiny_model(twin, 4, False), torch.randn(50, 4), torch.randn(50, 4)
    mean_u, var_u = twin.describe_posterior(model, mu, logvar)
    nats = 0.5 * (mean_u.square() + var_u - 1 - var_u.log()).sum(1).float()
    torch.testing.assert_close(twin.kl_divergence(mu, logvar, model.prior()), nats)


@pytest.mark.parametrize("twin", TWINS)
def test_forward_is_the_elbo_of_one_code(twin):
    model, x = tiny_model(twin), twin.to_pixels(torch.randint(0, 256, (3, *twin.SHAPE)))
    noise = torch.randn(3, 4)
    with torch.no_grad():
        reconstruction, kl = model(x, noise)
        mu, logvar = model.encode(x)
        params = model.decoder(mu + (logvar / 2).exp() * noise)
    expected = -twin.log_prob(params, x), twin.kl_divergence(mu, logvar, model.prior())
    tolerance = {"rtol": 0.02, "atol": 1.0}  # bf16 where the processor has it
    torch.testing.assert_close((reconstruction, kl), expected, **tolerance)


def test_pixels():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(vae_mnist.to_pixels(grey), (grey >= 128).float())
    torch.testing.assert_close(vae_anime.to_pixels(grey), grey / 255)


def test_augment_flips_faces_and_moves_digits():
    images = torch.from_numpy(faces(40)).permute(0, 3, 1, 2)
    images[:, :, :, :20] = 7
    warped = vae_anime.augment(images, torch.Generator().manual_seed(0)).byte()
    same = (warped == images).flatten(1).all(1)
    flipped = (warped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ flipped).all() and 8 < same.sum() < 32
    images = torch.from_numpy(digits(200))[:, None]
    warped = vae_mnist.augment(images, torch.Generator().manual_seed(0))
    assert warped.min() >= 0 and warped.max() <= 255
    ratio = (warped >= 128).sum() / (images >= 128).sum()
    assert 0.8 < ratio < 1.2 and not torch.equal(warped, images.float())


@pytest.mark.parametrize("twin", TWINS)
def test_overfits_32_images(twin, here):
    path = Path("digits.npz" if twin is vae_mnist else "faces.zip")
    images = torch.from_numpy(np.array(twin.load_images(path, here)[0][:32]))
    args = twin.parse_args(["--epochs", "60", "--batch-size", "16", "--latent-dim", "16"])
    args.kl_weight = 1.0
    torch.manual_seed(0)
    model = twin.VAE(16, False)
    twin.initialize(model, images, 1.0)
    state, split = {"epoch": 0, "history": []}, twin.Split(images, images, images)
    with twin.Progress(120, 0, quiet=True) as bar:
        twin.train(model, split, args, state, lambda state: None, bar)
    first, last = state["history"][0], state["history"][-1]
    assert state["epoch"] == len(state["history"]) == 60
    assert last["train_loss"] < first["train_loss"]
    assert last["train_kl"] == pytest.approx(last["validation_kl"], rel=0.3)  # the same images
    if twin is vae_mnist:
        assert (
            last["validation_loss"] < 45
        )  # a bar's place alone takes 5 nats; at the start it is 90


# runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", TWINS)
def test_run_leaves_what_it_promises(twin, here, capsys):
    metrics = run(twin)
    folder = folder_of(twin)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    for key in ("neg_elbo", "reconstruction", "kl"):
        assert set(metrics[key]) == {"train", "validation", "test"}
    keys = {
        "iwae",
        "iwae_samples",
        "bits_per_dim",
        "psnr_db",
        "active_units",
        "latent_dim",
        "parameters",
        "seconds",
    }
    assert keys <= set(metrics) and metrics["latent_dim"] == 4
    test = metrics["neg_elbo"]["test"]
    assert test == pytest.approx(metrics["reconstruction"]["test"] + metrics["kl"]["test"])
    offset = {vae_mnist: 0, vae_anime: 8}[twin]
    assert metrics["bits_per_dim"] == pytest.approx(
        test / math.prod(twin.SHAPE) / math.log(2) + offset
    )
    left = {path.name for path in folder.iterdir()}
    figures = [
        "learning-curve",
        "reconstructions",
        "samples",
        "interpolation",
        "posterior",
        "posterior-collapse",
    ]
    assert {f"{name}.png" for name in figures} | {
        "config.json",
        "history.csv",
        "checkpoint.pt",
    } <= left
    assert not any(name.startswith(".") for name in left)
    with open(folder / "history.csv") as file:
        assert len(list(csv.DictReader(file))) == 2

    again = run(twin)
    assert (
        without_seconds(again) == without_seconds(metrics)
        and folder.with_name("lambda-1.previous").is_dir()
    )
    assert without_seconds(run(twin, "--resume")) == without_seconds(
        metrics
    )  # finished: only printed
    assert without_seconds(run(twin, "--seed", "1")) != without_seconds(metrics)
    run(twin)
    capsys.readouterr()
    scored = twin.main(["--evaluate", "digits.npz" if twin is vae_mnist else "faces.zip", *SMALL])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == scored and isinstance(
        scored["kl"], float
    )
    again = np.load(folder / "reconstructions.npz", allow_pickle=False)
    shape = (60, 28, 28) if twin is vae_mnist else (60, 64, 64, 3)
    assert again["image"].shape == again["reconstruction"].shape == shape
    twin.main(["--sample", "7"])
    samples = np.load(folder / "samples.npz", allow_pickle=False)["image"]
    assert (
        samples.shape == (7, *shape[1:])
        and samples.dtype == np.uint8
        and (folder / "samples-7.png").exists()
    )


@pytest.mark.parametrize("twin", TWINS)
def test_sweep_compares_and_takes_finished_runs(twin, here, capsys):
    first = run(twin, "--lambda", "0")
    written = folder_of(twin, 0).joinpath("checkpoint.pt").stat().st_mtime_ns
    table = run(twin, "--lambda", "0", "1", "100")
    assert folder_of(twin, 0).joinpath("checkpoint.pt").stat().st_mtime_ns == written  # as it was
    assert list(table) == ["0", "1", "100"] and table["0"] == first
    assert table["100"]["kl"]["test"] < table["1"]["kl"]["test"] < table["0"]["kl"]["test"]
    out = Path("runs", twin.SCRIPT)
    assert {"lambda-sheet.png", "rate-distortion.png", "sweep.csv"} <= {
        path.name for path in out.iterdir()
    }
    run(twin, "--lambda", "0", "1", "--lr", "1e-4")
    assert (out / "lambda-1.previous").is_dir()  # other settings: trained anew


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("steps", [1, 3, 5])  # 3 is the second epoch's first
def test_resume_equals_no_interruption(twin, here, monkeypatch, capsys, steps):
    whole = run(twin)
    rate, count = twin.learning_rate, iter(range(10_000))

    def interrupted(*args):
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM if steps == 5 else signal.SIGINT)
        return rate(*args)

    monkeypatch.setattr(twin, "learning_rate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(twin, "--out", "other")
    assert stopped.value.code == (143 if steps == 5 else 130)
    assert "--resume" in capsys.readouterr().out
    assert without_seconds(run(twin, "--out", "other", "--resume")) == without_seconds(whole)
    folders = folder_of(twin), Path("other", "lambda-1")
    histories = [(folder / "history.csv").read_bytes() for folder in folders]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("twin", TWINS)
def test_evaluate_scores_images_of_all_the_file(twin, here, monkeypatch):
    """A file may be sorted by class: the bound is taken of random images of it."""
    run(twin)
    bound, seen = twin.iwae_bound, []
    monkeypatch.setattr(twin, "iwae_bound", lambda *args: seen.append(args[1]) or bound(*args))
    file = Path("digits.npz" if twin is vae_mnist else "faces.zip")
    twin.main(["--evaluate", str(file), "--iwae", "2", "--iwae-images", "5"])
    images = torch.from_numpy(np.array(twin.load_images(file, Path("runs"))[0]))
    pixels = twin.to_pixels(images).flatten(1)
    numbers = [torch.cdist(one.flatten(1), pixels).argmin().item() for one in seen]
    assert len(set(numbers)) == 5 and numbers != sorted(numbers) and max(numbers) > 10


@pytest.mark.parametrize("twin", TWINS)
def test_the_last_fit_of_the_prior_is_kept_only_where_it_helps(twin, here, monkeypatch):
    fitted = run(twin)["kl"]["validation"]
    monkeypatch.setattr(twin, "fit_prior", lambda prior, mu, logvar: prior)
    learned = run(twin)["kl"]["validation"]
    monkeypatch.setattr(
        twin, "fit_prior", lambda prior, mu, logvar: prior._replace(mean=prior.mean + 9)
    )
    assert fitted <= learned == run(twin)["kl"]["validation"]


def test_resume_with_nothing_saved_starts(here):
    assert run(vae_mnist, "--resume")["neg_elbo"]["test"] > 0


@pytest.mark.parametrize("twin", TWINS)
def test_a_loss_that_is_not_finite_keeps_the_last_epoch(twin, here, monkeypatch, capsys):
    whole, forward, count = run(twin), twin.VAE.forward, iter(range(10_000))
    capsys.readouterr()

    def spoilt(*args):
        factor = math.nan if next(count) == 4 else 1
        return [term * factor for term in forward(*args)]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(twin.VAE, "forward", spoilt)
        run(twin, "--out", "cut")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    assert "epoch 2, step 5. Lower --lr (now" in error
    assert torch.load("cut/lambda-1/checkpoint.pt", weights_only=True)["epoch"] == 1
    assert without_seconds(run(twin, "--out", "cut", "--resume")) == without_seconds(whole)


def test_faces_are_kept_decoded_and_read_from_a_folder(here, monkeypatch):
    images, sha256 = vae_anime.load_images(Path("faces.zip"), Path("out"))
    names = sorted(range(60), key=lambda i: f"{i}.png")
    assert np.array_equal(images.transpose(0, 2, 3, 1), faces()[names])
    assert Path("out", f"images-{sha256}.npy").exists()
    with monkeypatch.context() as patch:
        patch.setattr(vae_anime.Image, "open", None)  # the second time nothing is decoded
        again, _ = vae_anime.load_images(Path("faces.zip"), Path("out"))
    assert np.array_equal(again, images)
    zipfile.ZipFile("faces.zip").extractall("folder/deep")
    assert np.array_equal(vae_anime.load_images(Path("folder"), Path("other"))[0], images)


def test_faces_of_other_kinds_are_converted_skipped_and_counted(here, capsys):
    grey, colour = Image.new("L", (64, 64), 90), Image.new("RGB", (64, 64), (200, 10, 10))
    extra = [
        ("a/grey.png", png(grey)),
        ("a/palette.png", png(colour.quantize(4))),
        ("a/rgba.png", png(colour.convert("RGBA"))),
        ("a/big.png", png(colour.resize((128, 100)))),
        ("a/deep.png", png(Image.fromarray(np.full((64, 64), 300, np.uint16)))),
        ("a/broken.png", b"\x89PNG not"),
        ("a/huge.png", png(Image.new("RGB", (6000, 6000)))),
        ("../../escape.png", png(colour)),
        ("a/notes.txt", "hello"),
    ]
    write_zip("mixed.zip", faces(20), extra=extra)
    images = vae_anime.load_images(Path("mixed.zip"), Path("out"))[0]
    out = capsys.readouterr().out
    assert (
        len(images) == 25
        and "3 images cannot be read and are left out, such as 'a/broken.png'" in out
    )
    assert "3 images are not RGB" in out and "1 images are not (64, 64)" in out
    assert (
        not list(here.parent.rglob("escape.png")) and (images[:, 0] == 200).all((1, 2)).sum() == 4
    )


def test_zip_member_that_unpacks_to_gigabytes(here, capsys):
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb.png", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**24))
        archive.writestr("good.png", png(Image.new("RGB", (64, 64))))
    assert len(vae_anime.load_images(Path("bomb.zip"), Path("out"))[0]) == 1
    assert "bomb.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arrays, warning",
    [
        ({"pictures": digits()}, ""),
        ({"image": digits()[..., None]}, ""),
        ({"image": digits()[:, None]}, ""),
        ({"image": digits() / 255.0}, "stretched to 255"),
        ({"image": digits().astype(np.int32)}, ""),
        ({"image": digits() >> 7}, "stretched to 255"),
        ({"image": digits() >= 128}, "stretched to 255"),
        ({"image": digits(60, 56)}, r"\(56, 56\) resized to \(28, 28\)"),
    ],
    ids=["name", "trailing one", "channel", "float", "int", "0 and 1", "bool", "size"],
)
def test_digits_of_other_kinds(here, capsys, arrays, warning):
    np.savez("other.npz", label=np.zeros(60), **arrays)
    images, _ = vae_mnist.load_images(Path("other.npz"), here)
    assert images.shape == (60, 1, 28, 28) and images.dtype == np.uint8
    assert re.search(warning, capsys.readouterr().out)
    if "size" not in warning and "(56" not in warning:
        two_levels = len(np.unique(arrays.get("image", digits()))) == 2
        assert np.array_equal(images[:, 0], 255 * (digits() >> 7) if two_levels else digits())


@pytest.mark.parametrize("twin", TWINS)
def test_runs_from_an_empty_folder(twin, here):
    folder = here / "empty"
    folder.mkdir()
    shutil.copy(ROOT / f"{twin.SCRIPT}.py", folder)
    command = [sys.executable, f"{twin.SCRIPT}.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert twin.DATA in done.stderr and [path.name for path in folder.iterdir()] == [
        f"{twin.SCRIPT}.py"
    ]
    data = ["--data", str(here / ("digits.npz" if twin is vae_mnist else "faces.zip"))]
    done = subprocess.run([*command, *data, *SMALL], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / folder_of(twin) / "samples.png").exists(), done.stderr


# bad input ----------------------------------------------------------------------------------------


def save(**arrays):
    return lambda: np.savez("digits.npz", **arrays)


def remove():
    Path("digits.npz").unlink(), Path("faces.zip").unlink()


def rubbish():
    Path("digits.npz").write_bytes(b"PK rubbish"), Path("faces.zip").write_bytes(b"PK rubbish")


def truncated():
    for name in ("digits.npz", "faces.zip"):
        Path(name).write_bytes(Path(name).read_bytes()[:-400])


def pickled():
    np.savez("digits.npz", image=np.array([{"a": 1}] * 20, dtype=object))


def other_architecture(twin):
    def change():
        run(twin, "--latent-dim", "5", "--out", "out")
        Path("out/lambda-1/metrics.json").unlink()

    return change


def other_twin(twin):
    def change():
        run(vae_anime if twin is vae_mnist else vae_mnist, "--out", "out")
        Path("out/lambda-1/metrics.json").unlink()

    return change


def bad_values(value, dtype=float):
    images = digits().astype(dtype)
    images[3, 3, 3] = value
    return save(image=images)


RESUME = ["--out", "out", "--resume"]
BOTH = {
    "no file": (remove, [], r"No such file or directory\. The real"),
    "rubbish": (rubbish, [], r"File is not a zip file\. (Make|Give)"),
    "truncated": (truncated, [], r"File is not a zip file\. (Make|Give)"),
    "negative": (lambda: None, ["--lambda", "-1"], r"--lambda -1\.0: give a number from 0 to"),
    "nan": (lambda: None, ["--lambda", "nan"], r"--lambda nan: give a number from 0 to"),
    "twice": (lambda: None, ["--lambda", "1", "1.0"], r"--lambda 1 1: a value stands there twice"),
    "one folder": (
        lambda: None,
        ["--lambda", "1", "1.0000001"],
        r"--lambda 1 1: a value stands there twice",
    ),
    "two tasks": (
        lambda: None,
        ["--sample", "3", "--lambda", "1", "2"],
        r"give only one of --evaluate, --sample",
    ),
    "spoilt by the last step": (
        lambda: None,
        ["--epochs", "1", "--batch-size", "48", "--lr", "1e9"],
        r"Lower --lr",
    ),
    "architecture": (other_architecture, RESUME, r"trained with latent_dim 5, not 4"),
    "twin": (other_twin, RESUME, r"not a checkpoint of vae_"),
    "nothing to evaluate": (
        lambda: None,
        ["--sample", "3"],
        r"lambda-1: no run there\. Train first",
    ),
    "out is a file": (
        lambda: Path("out").touch(),
        ["--out", "out"],
        r"out\S*: (Not a directory|File exists)\.",
    ),
    "no such device": (lambda: None, ["--device", "mps"], r"--device mps: .* Use --device cpu"),
    "small limit": (
        lambda: None,
        ["--limit", "2"],
        r"2 images are too few to split\. Give 20 or more",
    ),
    "few images": (
        lambda: (np.savez("digits.npz", image=digits(5)), write_zip("faces.zip", faces(5))),
        [],
        "too few",
    ),
}
BAD = {
    **{(name, twin): case for name, case in BOTH.items() for twin in TWINS},
    ("pickled", vae_mnist): (pickled, [], r"Object arrays cannot be loaded"),
    ("no images", vae_mnist): (
        save(label=np.zeros(9)),
        [],
        r"no array of images \(N, H, W\); found label",
    ),
    ("nan pixel", vae_mnist): (bad_values(np.nan), [], r"values outside 0 to 255"),
    ("large pixel", vae_mnist): (bad_values(300, int), [], r"values outside 0 to 255"),
    ("oblong", vae_mnist): (
        save(image=np.zeros((60, 28, 40), np.uint8)),
        [],
        r"\(28, 40\) are not square",
    ),
    ("no images", vae_anime): (
        lambda: write_zip("faces.zip", [], extra=[("a.txt", "x")]),
        [],
        r"no PNG or JPEG image",
    ),
    ("none readable", vae_anime): (
        lambda: write_zip("faces.zip", [], extra=[("a.png", "x")]),
        [],
        r"none of its 1",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]} {case[1].SCRIPT}")
def test_bad_input_ends_with_one_line(here, capsys, case):
    change, words, message = BAD[case]
    twin = case[1]
    change(twin) if change in (other_architecture, other_twin) else change()
    if change in (other_architecture, other_twin):
        change(twin)()
    before = (
        {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
        if Path("out").exists()
        else {}
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(twin, *words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not list(Path(".").rglob("metrics.json"))
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("twin", TWINS)
def test_an_unfinished_run_has_no_model_to_use(twin, here, capsys):
    run(twin)
    path = folder_of(twin) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "metrics"}, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        twin.main(["--sample", "3"])
    assert (
        stopped.value.code == 2
        and "its run is not finished. Go on with it: --resume" in capsys.readouterr().err
    )


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("change", ["version", "weights"])
def test_a_checkpoint_of_another_version_ends_with_one_line(twin, here, capsys, change):
    run(twin)
    path = folder_of(twin) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    if change == "version":
        state["version"] = f"{twin.SCRIPT} 1"
    else:
        del state["average"]["prior_mean"]
    torch.save(state, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        twin.main(["--sample", "3"])
    error = capsys.readouterr().err
    expected = {"version": f"not a checkpoint of {twin.VERSION}", "weights": "prior_mean"}[change]
    assert stopped.value.code == 2 and expected in error and error.count("\n") == 1, error
