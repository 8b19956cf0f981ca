"""vae_mnist.py and vae_anime.py: mathematics against independent references, runs, every bad input's line."""

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
import vae_anime  # noqa: E402
import vae_mnist  # noqa: E402

TWINS = [vae_mnist, vae_anime]
SMALL = shlex.split("--epochs 2 --batch-size 16 --latent-dim 4 --iwae 4 --iwae-images 3 --device cpu")


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
    return np.where((grid < rng.integers(10, 30, (count, 1, 1)))[..., None], front, back).astype(np.uint8)


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


def tiny_start(twin, count=4):
    torch.manual_seed(0)
    return twin.principal_components(torch.randint(0, 256, (40, *twin.SHAPE), dtype=torch.uint8), count, 1.0)


# mathematics ---------------------------------------------------------------------------------------------------------


def random_prior(twin, components, count):
    A = torch.randn(components, count, count).tril(-1) + torch.rand(components, count).add(0.5).diag_embed()
    return twin.Prior(torch.randn(components).log_softmax(0), torch.randn(components, count), A)


def torch_prior(prior):
    gaussians = torch.distributions.MultivariateNormal(prior.mean, precision_matrix=prior.A.mT @ prior.A)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=prior.log_weights), gaussians)


@pytest.mark.parametrize("twin", TWINS)
def test_kl_divergence_equals_torch_distributions(twin):
    torch.manual_seed(0)
    mu, logvar, prior = torch.randn(5, 6), torch.randn(5, 6), random_prior(twin, 1, 6)
    q = torch.distributions.MultivariateNormal(mu, (logvar.exp()).diag_embed())
    expected = torch.distributions.kl_divergence(q, torch_prior(prior).component_distribution)
    torch.testing.assert_close(twin.kl_divergence(mu, logvar, prior), expected, rtol=1e-4, atol=1e-4)
    normal = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    plain = twin.VAE(tiny_start(twin, 6), False).prior()
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
    torch.testing.assert_close((fitted.A[0].mT @ fitted.A[0]).inverse().float(), covariance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("twin", TWINS)
def test_fit_prior_equals_scikit_learn_on_sharp_posteriors(twin):
    """With σ near 0 it is EM for a mixture of Gaussians; 20 shared posteriors of 9,000 hardly show."""
    from sklearn.mixture import GaussianMixture

    torch.manual_seed(0)
    truth = random_prior(twin, 3, 2)._replace(mean=torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]]))
    mu, logvar = torch_prior(truth).sample((9000,)).double(), torch.full((9000, 2), -16.0).double()
    start = truth._replace(mean=truth.mean + 1, log_weights=torch.full((3,), -math.log(3)))
    fitted = twin.fit_prior(start, mu, logvar)
    reference = GaussianMixture(3, means_init=truth.mean.numpy(), random_state=0).fit(mu.numpy())
    assert torch_prior(fitted).log_prob(mu).mean() == pytest.approx(reference.score(mu.numpy()), abs=0.01)
    np.testing.assert_allclose(fitted.mean, reference.means_, atol=0.05)
    np.testing.assert_allclose(fitted.log_weights.exp(), reference.weights_, atol=0.01)


@pytest.mark.parametrize("twin", TWINS)
def test_fit_prior_lowers_the_kl_and_stays_sound_where_it_has_little_to_fit(twin):
    prior, mu, logvar = random_prior(twin, 8, 4), torch.randn(30, 4).double(), torch.randn(30, 4).double()
    before = twin.kl_divergence(mu, logvar, twin.Prior(*(part.double() for part in prior))).mean()
    assert twin.kl_divergence(mu, logvar, twin.fit_prior(prior, mu, logvar)).mean() < before
    for collapsed in (mu[:1].expand(30, 4), mu[:3]):
        fitted = twin.fit_prior(prior, collapsed, logvar[: len(collapsed)])
        assert all(part.isfinite().all() for part in fitted)
    apart = torch.randn(3, 4).double() * 1e9  # three codes, four dimensions: nothing to invert
    fitted = twin.fit_prior(random_prior(twin, 1, 4), apart, torch.full((3, 4), -20.0).double())
    assert all(part.isfinite().all() for part in fitted)
    model = twin.VAE(tiny_start(twin), True)
    fitted = random_prior(twin, len(model.prior_mean), 4)
    model.set_prior(fitted)
    for kept, given in zip(model.prior(), fitted, strict=True):
        torch.testing.assert_close(kept, given)


@pytest.mark.parametrize("twin", TWINS)
def test_log_density_and_draws_are_the_mixtures(twin):
    torch.manual_seed(0)
    prior, z = random_prior(twin, 3, 4), torch.randn(7, 4)
    expected = torch_prior(prior).log_prob(z) + 2 * math.log(2 * math.pi)
    torch.testing.assert_close(twin.log_density(z, prior), expected, rtol=1e-4, atol=1e-4)
    draws = twin.sample_prior(prior, 300_000, torch.Generator().manual_seed(0))
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
    torch.testing.assert_close(vae_mnist.log_prob(logits, x[:1])[1], vae_mnist.log_prob(logits[1:2], x[:1])[0])
    mean, log_sigma, x = torch.rand(3, 3, 64, 64), torch.tensor(-1.3), torch.rand(3, 3, 64, 64)
    expected = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae_anime.log_prob((mean, log_sigma), x), expected)


def test_learned_sigma_is_best_at_the_closed_form():
    mean, x = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    log_sigma = (mean - x).square().mean().sqrt().log().requires_grad_()
    vae_anime.log_prob((mean, log_sigma), x).sum().backward()
    assert abs(log_sigma.grad.item()) < 1e-2 * x.numel() ** 0.5


def test_principal_components_equal_scikit_learn():
    from sklearn.decomposition import PCA

    images = torch.from_numpy(digits(200))[:, None]
    start = vae_mnist.principal_components(images, 5, 1.0)
    x = (images.numpy().reshape(200, -1) >= 128).astype(float)
    pca = PCA(5).fit(x)
    np.testing.assert_allclose(start.variances, pca.explained_variance_ * 199 / 200, rtol=1e-3)
    noise = pca.noise_variance_ * 199 / 200 * (min(x.shape) - 5) / (784 - 5)  # scikit-learn divides by its rank
    np.testing.assert_allclose(start.noise, noise, rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.diag(start.directions.numpy() @ pca.components_.T)), 1, rtol=1e-3)


def test_more_dimensions_than_images_leave_a_sigma():
    """A start that fits its few images to the last pixel would have σ near 0, and millions of nats on others."""
    assert tiny_start(vae_anime, 100).sigma > 0.1


def test_faces_start_as_probabilistic_pca():
    """At the start q(z|x) is the exact posterior, so every importance weight is the exact likelihood."""
    images = torch.from_numpy(faces(50)).permute(0, 3, 1, 2)
    images = (images.float() + 20 * torch.randn(images.shape)).clamp(0, 255).byte()
    start = vae_anime.principal_components(images, 4, 1.0)
    model = vae_anime.VAE(start, True).eval()
    model.encoder.network[-1].bias.data.zero_(), model.decoder.network[-2].bias.data.zero_()
    factor = (start.directions * (start.variances - start.noise).sqrt()[:, None]).T
    exact = torch.distributions.LowRankMultivariateNormal(start.mean, factor, start.noise.expand(12288))
    x = vae_anime.to_pixels(images[:2])
    for i in range(2):
        bound = vae_anime.iwae_bound(model, x[i : i + 1], 2, torch.Generator().manual_seed(0))
        assert bound.item() == pytest.approx(exact.log_prob(x[i].flatten()).item(), rel=1e-4)


def test_start_at_a_weight_is_water_filling():
    images = torch.from_numpy(faces(50)).permute(0, 3, 1, 2)
    plain, heavy = (vae_anime.principal_components(images, 8, weight) for weight in (1.0, 10_000.0))
    for start, weight in ((plain, 1.0), (heavy, 10_000.0)):
        assert start.noise.item() == pytest.approx(weight * start.sigma.item() ** 2, rel=1e-3)
    assert (heavy.variances > heavy.noise).sum() < (plain.variances > plain.noise).sum()
    free = vae_anime.principal_components(images, 8, 0.0)
    assert free.noise < 1e-5 and free.sigma < plain.sigma


@pytest.mark.parametrize("twin", TWINS)
def test_iwae_with_one_sample_is_the_elbo_and_grows_with_more(twin):
    model = twin.VAE(tiny_start(twin), True).eval()
    with torch.no_grad():
        model.prior_mean.fill_(0.3), model.prior_factor.normal_(0, 0.1)
        model.prior_factor.copy_(model.prior_factor[:1].expand_as(model.prior_factor))  # the bound is exact there
    x = twin.to_pixels(torch.randint(0, 256, (1, *twin.SHAPE)))
    bounds = [twin.iwae_bound(model, x, 1, torch.Generator().manual_seed(i)).item() for i in range(400)]
    with torch.no_grad():
        mu, logvar = model.encode(x)
        z = twin.reparameterize(mu, logvar, torch.randn(400, 4))
        reconstruction = -twin.log_prob(model.decoder(z), x).mean()
        elbo = -(reconstruction + twin.kl_divergence(mu, logvar, model.prior())).item()
    spread = np.std(bounds) / 20
    assert abs(np.mean(bounds) - elbo) < 6 * spread + 1e-3 * abs(elbo)
    many = twin.iwae_bound(model, x, 300, torch.Generator().manual_seed(0)).item()
    assert many >= np.mean(bounds) - 1e-4 * abs(elbo)
    assert abs(many - np.logaddexp.reduce(bounds) + math.log(400)) < 2  # their mean, in logs; ln 300 is 5.7


@pytest.mark.parametrize("twin", TWINS)
def test_collapse_is_measured(twin):
    model = twin.VAE(tiny_start(twin), False)
    collapsed = twin.describe_posterior(model, torch.zeros(500, 4), torch.zeros(500, 4))
    assert (collapsed["variance_of_mean"] > 0.01).sum() == 0 and abs(collapsed["mutual_information"]) < 1e-6
    mu = torch.randn(500, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    sharp = twin.describe_posterior(model, mu, torch.tensor([-12.0, -12.0, -12.0, 0.0]).expand(500, 4))
    assert (sharp["variance_of_mean"] > 0.01).sum() == 3 and sharp["kl_per_dimension"][3] < 1e-6
    assert sharp["mutual_information"] == pytest.approx(math.log(500), abs=0.05)
    assert sharp["aggregate_eigenvalues"].max() < 1.4 and sharp["aggregate_eigenvalues"].min() > 0.7


@pytest.mark.parametrize("twin", TWINS)
def test_kl_of_marginals_adds_up_where_the_prior_is_normal(twin):
    model, mu, logvar = twin.VAE(tiny_start(twin), False), torch.randn(50, 4), torch.randn(50, 4)
    report = twin.describe_posterior(model, mu, logvar)
    total = twin.kl_divergence(mu, logvar, model.prior()).mean()
    assert report["kl_per_dimension"].sum().item() == pytest.approx(total.item(), rel=1e-5)


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
    images = twin.load_images(path, here)[0][:32]
    args = twin.parse_args(["--epochs", "60", "--batch-size", "16", "--latent-dim", "16", "--prior", "normal"])
    model = twin.VAE(twin.principal_components(images, 16, 1.0), False)
    with twin.tqdm(disable=True) as bar:
        split = twin.Split(images, images, images)
        _, history = twin.train(model, split, args, 1.0, None, lambda state: None, bar)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["train_kl"] == pytest.approx(history[-1]["validation_kl"], rel=0.3)  # the same images
    if twin is vae_mnist:
        assert history[-1]["validation_loss"] < 45  # a bar's place alone takes about 5 nats; at the start it is 90


# runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", TWINS)
def test_run_leaves_what_it_promises(twin, here, capsys):
    metrics = run(twin)
    folder = folder_of(twin)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    for key in ("neg_elbo", "reconstruction", "kl"):
        assert set(metrics[key]) == {"train", "validation", "test"}
    keys = {"iwae", "iwae_samples", "bits_per_dim", "psnr_db", "active_units", "latent_dim", "parameters", "seconds"}
    assert keys <= set(metrics) and metrics["latent_dim"] == 4
    test = metrics["neg_elbo"]["test"]
    assert test == pytest.approx(metrics["reconstruction"]["test"] + metrics["kl"]["test"])
    offset = {vae_mnist: 0, vae_anime: 8}[twin]
    assert metrics["bits_per_dim"] == pytest.approx(test / math.prod(twin.SHAPE) / math.log(2) + offset)
    left = {path.name for path in folder.iterdir()}
    figures = ["learning-curve", "reconstructions", "samples", "interpolation", "posterior", "posterior-collapse"]
    assert {f"{name}.png" for name in figures} | {"config.json", "history.csv", "checkpoint.pt"} <= left
    assert not any(name.startswith(".") for name in left)
    with open(folder / "history.csv") as file:
        assert len(list(csv.DictReader(file))) == 2

    again = run(twin)
    assert without_seconds(again) == without_seconds(metrics) and folder.with_name("lambda-1.previous").is_dir()
    assert without_seconds(run(twin, "--resume")) == without_seconds(metrics)  # finished: only printed
    assert without_seconds(run(twin, "--seed", "1")) != without_seconds(metrics)
    run(twin)
    capsys.readouterr()
    scored = twin.main(["--evaluate", "digits.npz" if twin is vae_mnist else "faces.zip", *SMALL])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == scored and isinstance(scored["kl"], float)
    again = np.load(folder / "reconstructions.npz", allow_pickle=False)
    shape = (60, 28, 28) if twin is vae_mnist else (60, 64, 64, 3)
    assert again["image"].shape == again["reconstruction"].shape == shape
    twin.main(["--sample", "7"])
    samples = np.load(folder / "samples.npz", allow_pickle=False)["image"]
    assert samples.shape == (7, *shape[1:]) and samples.dtype == np.uint8 and (folder / "samples-7.png").exists()


@pytest.mark.parametrize("twin", TWINS)
def test_sweep_compares_and_takes_finished_runs(twin, here, capsys):
    first = run(twin, "--lambda", "0")
    table = run(twin, "--lambda", "0", "1", "100")
    assert "holds this run's end already" in capsys.readouterr().out
    assert list(table) == ["0", "1", "100"] and table["0"] == first
    assert table["100"]["kl"]["test"] < table["1"]["kl"]["test"] < table["0"]["kl"]["test"]
    out = Path("runs", twin.SCRIPT)
    assert {"lambda-sheet.png", "rate-distortion.png", "sweep.csv"} <= {path.name for path in out.iterdir()}
    run(twin, "--lambda", "0", "1", "--lr", "1e-4")
    assert (out / "lambda-1.previous").is_dir()  # other settings: trained anew


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("steps", [1, 2, 4])  # 2 is the last batch of an epoch
def test_resume_equals_no_interruption(twin, here, monkeypatch, capsys, steps):
    whole = run(twin)
    rate, count = twin.learning_rate, iter(range(10_000))

    def interrupted(*args):
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM if steps == 4 else signal.SIGINT)
        return rate(*args)

    monkeypatch.setattr(twin, "learning_rate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(twin, "--out", "other")
    assert stopped.value.code == (143 if steps == 4 else 130)
    assert "--resume" in capsys.readouterr().out
    assert without_seconds(run(twin, "--out", "other", "--resume")) == without_seconds(whole)


@pytest.mark.parametrize("twin", TWINS)
def test_evaluate_scores_images_of_all_the_file(twin, here, monkeypatch):
    """A file may be sorted by class: the posterior's scores take a random part, each image with its own code."""
    run(twin)
    score, seen = twin.score_posterior, []
    monkeypatch.setattr(twin, "score_posterior", lambda *args: seen.append(args) or score(*args))
    file = Path("digits.npz" if twin is vae_mnist else "faces.zip")
    twin.main(["--evaluate", str(file), "--iwae", "2", "--iwae-images", "2"])
    model, images, scores, _ = seen[0]
    in_file = twin.load_images(file, Path("runs"))[0][:]
    assert not torch.equal(images, in_file) and torch.equal(images.sum(0), in_file.sum(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encode(twin.to_pixels(images))[0], scores["mu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("twin", TWINS)
def test_the_last_fit_of_the_prior_is_kept_only_where_it_helps(twin, here, monkeypatch):
    fitted = run(twin)["kl"]["validation"]
    monkeypatch.setattr(twin, "fit_prior", lambda prior, mu, logvar: prior)
    learned = run(twin)["kl"]["validation"]
    monkeypatch.setattr(twin, "fit_prior", lambda prior, mu, logvar: prior._replace(mean=prior.mean + 9))
    assert fitted <= learned == run(twin)["kl"]["validation"]


def test_resume_with_nothing_saved_starts(here):
    assert run(vae_mnist, "--resume")["neg_elbo"]["test"] > 0


def test_non_finite_loss_goes_back_and_then_gives_up(here, monkeypatch, capsys):
    terms, count = vae_mnist.elbo_terms, iter(range(10_000))

    def spoilt(*args):
        return [term * (math.nan if next(count) == 2 else 1) for term in terms(*args)]

    monkeypatch.setattr(vae_mnist, "elbo_terms", spoilt)
    assert run(vae_mnist)["neg_elbo"]["test"] > 0 and "half the learning rate" in capsys.readouterr().out
    monkeypatch.setattr(vae_mnist, "elbo_terms", lambda *args: [term * math.nan for term in terms(*args)])
    with pytest.raises(SystemExit) as stopped:
        run(vae_mnist)
    assert stopped.value.code == 2 and "Lower --lr" in capsys.readouterr().err


def test_faces_are_kept_decoded_and_read_from_a_folder(here, monkeypatch):
    kept, sha256 = vae_anime.load_images(Path("faces.zip"), Path("out"))
    images = kept[:]
    assert np.array_equal(images.permute(0, 2, 3, 1), faces()[sorted(range(60), key=lambda i: f"{i}.png")])
    with monkeypatch.context() as patch:
        patch.setattr(vae_anime.Image, "open", None)  # the second time nothing is decoded
        assert torch.equal(vae_anime.load_images(Path("faces.zip"), Path("out"))[0][:], images)
    zipfile.ZipFile("faces.zip").extractall("folder/deep")
    assert torch.equal(vae_anime.load_images(Path("folder"), Path("other"))[0][:], images)


def test_faces_of_other_kinds_are_converted_skipped_and_counted(here, capsys):
    grey, colour = Image.new("L", (64, 64), 90), Image.new("RGB", (64, 64), (200, 10, 10))
    extra = [
        ("a/grey.png", png(grey)),
        ("a/palette.png", png(colour.quantize(4))),
        ("a/rgba.png", png(colour.convert("RGBA"))),
        ("a/big.png", png(colour.resize((128, 100)))),
        ("a/broken.png", b"\x89PNG not"),
        ("a/huge.png", png(Image.new("RGB", (6000, 6000)))),
        ("../../escape.png", png(colour)),
        ("a/notes.txt", "hello"),
    ]
    write_zip("mixed.zip", faces(20), extra=extra)
    images = vae_anime.load_images(Path("mixed.zip"), Path("out"))[0][:]
    out = capsys.readouterr().out
    assert len(images) == 25 and "2 images cannot be read and are left out, such as 'a/broken.png'" in out
    assert "3 images are not RGB" in out and "1 images are not (64, 64)" in out
    assert not list(here.parent.rglob("escape.png")) and (images[:, 0] == 200).flatten(1).all(1).sum() == 4


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
    images = vae_mnist.load_images(Path("other.npz"), here)[0][:]
    assert images.shape == (60, 1, 28, 28) and images.dtype == torch.uint8
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
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert twin.DATA in done.stderr and [path.name for path in folder.iterdir()] == [f"{twin.SCRIPT}.py"]
    data = ["--data", str(here / ("digits.npz" if twin is vae_mnist else "faces.zip"))]
    done = subprocess.run([*command, *data, *SMALL], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / folder_of(twin) / "samples.png").exists(), done.stderr


# bad input -----------------------------------------------------------------------------------------------------------


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
    "rubbish": (rubbish, [], r"not an npz file|not a zip file"),
    "truncated": (truncated, [], r"not an npz file|not a zip file"),
    "negative": (lambda: None, ["--lambda", "-1"], r"argument --lambda: '-1' is not a number from 0 up"),
    "nan": (lambda: None, ["--lambda", "nan"], r"argument --lambda: 'nan' is not a number from 0 up"),
    "twice": (lambda: None, ["--lambda", "1", "1.0"], r"--lambda 1 1: a value stands there twice"),
    "one folder": (lambda: None, ["--lambda", "1", "1.0000001"], r"--lambda 1 1: a value stands there twice"),
    "two tasks": (lambda: None, ["--sample", "3", "--lambda", "1", "2"], r"give only one of --evaluate, --sample"),
    "spoilt by the last step": (lambda: None, ["--epochs", "1", "--lr", "1e30"], r"Lower --lr"),
    "architecture": (other_architecture, RESUME, r"trained with latent_dim 5, not 4"),
    "twin": (other_twin, RESUME, r"not a checkpoint of vae_"),
    "nothing to evaluate": (lambda: None, ["--sample", "3"], r"lambda-1: no run there\. Train first"),
    "out is a file": (lambda: Path("out").touch(), ["--out", "out"], r"out\S*: cannot be written"),
    "no such device": (lambda: None, ["--device", "mps"], r"--device mps: torch finds no such device"),
    "small limit": (lambda: None, ["--limit", "2"], r"2 images are too few to split; give 20 or more"),
    "few images": (lambda: (np.savez("digits.npz", image=digits(5)), write_zip("faces.zip", faces(5))), [], "too few"),
}
BAD = {
    **{(name, twin): case for name, case in BOTH.items() for twin in TWINS},
    ("pickled", vae_mnist): (pickled, [], r"not an npz file of plain arrays \(Object arrays"),
    ("no images", vae_mnist): (save(label=np.zeros(9)), [], r"no array of images \(N, H, W\); found label"),
    ("nan pixel", vae_mnist): (bad_values(np.nan), [], r"values outside 0 to 255"),
    ("large pixel", vae_mnist): (bad_values(300, int), [], r"values outside 0 to 255"),
    ("oblong", vae_mnist): (save(image=np.zeros((60, 28, 40), np.uint8)), [], r"\(28, 40\) are not square"),
    ("no images", vae_anime): (lambda: write_zip("faces.zip", [], extra=[("a.txt", "x")]), [], r"no PNG or JPEG image"),
    ("none readable", vae_anime): (lambda: write_zip("faces.zip", [], extra=[("a.png", "x")]), [], r"none of its 1"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]} {case[1].SCRIPT}")
def test_bad_input_ends_with_one_line(here, capsys, case):
    change, words, message = BAD[case]
    twin = case[1]
    change(twin) if change in (other_architecture, other_twin) else change()
    if change in (other_architecture, other_twin):
        change(twin)()
    before = (
        {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} if Path("out").exists() else {}
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
    torch.save({name: value for name, value in state.items() if name not in ("average", "metrics")}, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        twin.main(["--sample", "3"])
    assert stopped.value.code == 2 and "its run is not finished. Go on with it: --resume" in capsys.readouterr().err


@pytest.mark.parametrize("twin", TWINS)
def test_a_checkpoint_of_another_version_ends_with_one_line(twin, here, capsys):
    run(twin)
    path = folder_of(twin) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["average"]["prior_mean"]
    torch.save(state, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        twin.main(["--sample", "3"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(r"error: .* another version of vae_\w+\.py\. .*\n", error), error
