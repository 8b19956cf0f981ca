"""The twins: mathematics against independent references, runs, every bad input's line."""

import csv
import hashlib
import io
import json
import math
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vae_anime
import vae_mnist

TWINS = [vae_mnist, vae_anime]
SMALL = shlex.split("--epochs 2 --batch-size 16 --latent-dim 4 --iwae 4 --device cpu")


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
    model.mean_image.uniform_(0.2, 0.8)
    return model.eval()


# mathematics --------------------------------------------------------------------------------------


def random_prior(twin, count, latent_dim):
    """Gaussians of any place, shape and weight, as after a fit."""
    prior = twin.Prior(latent_dim, count).eval()
    prior.weights.copy_(torch.rand(count).softmax(0))
    prior.loc.normal_(std=0.7)
    factors = torch.randn(count, latent_dim, latent_dim)
    covariance = factors @ factors.mT + 0.1 * torch.eye(latent_dim)
    prior.scale_tril.copy_(torch.linalg.cholesky(covariance))
    return prior


def log_mixture(prior, z):
    """ln Σ w N(z), by scipy's numbers of each Gaussian."""
    from scipy.stats import multivariate_normal

    covariances = prior.scale_tril @ prior.scale_tril.mT
    triples = zip(prior.weights, prior.loc, covariances, strict=True)
    densities = [w * multivariate_normal(m, c).pdf(z) for w, m, c in triples]
    return torch.tensor(np.log(np.sum(densities, 0)), dtype=torch.float32)


@pytest.mark.parametrize("twin", TWINS)
def test_kl_divergence_equals_torch_distributions(twin):
    torch.manual_seed(0)
    mu, logvar, prior = torch.randn(5, 6), torch.randn(5, 6), random_prior(twin, 1, 6)
    ours = twin.gaussian(mu, logvar)
    q = torch.distributions.MultivariateNormal(mu, (logvar.exp()).diag_embed())
    p = torch.distributions.MultivariateNormal(prior.loc, scale_tril=prior.scale_tril)
    expected = torch.distributions.kl_divergence(q, p)
    found = twin.D.kl_divergence(ours, prior())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    normal = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    for plain in (twin.Prior(6, 1), twin.Prior(6, 3), twin.Prior(6, 3).eval()):
        torch.testing.assert_close(twin.D.kl_divergence(ours, plain()), normal)


@pytest.mark.parametrize("twin", TWINS)
def test_kl_to_a_mixture_is_an_upper_bound_and_tight_for_a_sharp_posterior(twin):
    torch.manual_seed(0)
    prior, mu = random_prior(twin, 4, 3), torch.randn(5, 3)
    for logvar, close in ((torch.randn(5, 3), 4.0), (torch.full((5, 3), -12.0), 0.02)):
        q = twin.gaussian(mu, logvar)
        z = q.sample((20_000,))
        sampled = (q.log_prob(z) - log_mixture(prior, z)).mean(0)
        excess = twin.D.kl_divergence(q, prior()) - sampled
        assert (excess > -0.05).all() and (excess < close).all()


@pytest.mark.parametrize("twin", TWINS)
def test_the_prior_is_the_mixture(twin):
    torch.manual_seed(0)
    prior, z = random_prior(twin, 3, 4), torch.randn(7, 4)
    torch.testing.assert_close(prior().log_prob(z), log_mixture(prior, z), rtol=1e-4, atol=1e-4)
    draws = prior().sample((200_000,))
    torch.testing.assert_close(draws.mean(0), prior().mean, atol=0.05, rtol=0.02)
    torch.testing.assert_close(draws.var(0), prior().variance, atol=0.1, rtol=0.02)
    cold = random_prior(twin, 1, 4)
    expected = cold().variance / 4
    torch.testing.assert_close(cold(0.5).sample((200_000,)).var(0), expected, atol=0.1, rtol=0.02)


def fitted_to(twin, codes, count):
    """The prior of `count` Gaussians that fit_prior finds for sharp posteriors at `codes`."""
    model = torch.nn.Module()
    model.prior = twin.Prior(codes.shape[1], count).eval()
    each = {"mu": codes, "variance": torch.zeros_like(codes)}
    scores = iter([{}, {"neg_elbo": 1.0}, {"neg_elbo": 0.0}])  # before, the same, fitted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "evaluate", lambda *_: (next(scores), each))
        return twin.fit_prior(model, {"train": codes, "validation": codes}, None).prior


@pytest.mark.parametrize("twin", TWINS)
def test_fit_finds_the_mixture_that_the_codes_come_from(twin):
    torch.manual_seed(0)
    places = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]])
    codes = places[torch.randint(3, (9000,))] + torch.randn(9000, 2)
    prior = fitted_to(twin, codes, 3)
    order = prior.loc[:, 0].argsort()
    torch.testing.assert_close(prior.loc[order], places, atol=0.1, rtol=0)
    torch.testing.assert_close(prior.weights, torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    assert prior().log_prob(codes).mean() == pytest.approx(-math.log(3) - 2.838, abs=0.05)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_fit_stays_sound_where_it_has_little_to_fit(twin, scale):
    prior = fitted_to(twin, scale * torch.randn(64, 4), 64)
    assert all(part.isfinite().all() for part in prior.parameters())


def test_log_prob_equals_torch_distributions():
    torch.manual_seed(0)
    x = torch.randint(0, 2, (3, 1, 28, 28)).float()
    model, z = tiny_model(vae_mnist), torch.randn(3, 4)
    pixels, _ = model.decode(z)
    logits = pixels.base_dist.logits
    expected = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(pixels.log_prob(x), expected)
    torch.testing.assert_close(pixels.mean, logits.sigmoid())
    mean, sigma, x = torch.rand(3, 3, 64, 64), torch.tensor(0.27), torch.rand(3, 3, 64, 64)
    expected = torch.distributions.Normal(mean, sigma).log_prob(x).flatten(1).sum(1)
    pixels = vae_anime.Pixels(mean, sigma, mean)
    torch.testing.assert_close(pixels.log_prob(x), expected, rtol=1e-4, atol=0.5)


def test_frequencies_are_the_cosine_transform():
    """Orthonormal: a constant is its first coefficient, and squares keep their sum."""
    import scipy.fft

    images = torch.rand(2, 3, 64, 64)
    expected = scipy.fft.dctn(images.numpy(), axes=(1, 2, 3), norm="ortho")
    np.testing.assert_allclose(vae_anime.frequencies(images), expected, atol=1e-4)


def test_noise_of_each_frequency_is_fitted():
    """Of the family it is the maximum: σ of a frequency is that of its errors, and bits fall."""
    model = tiny_model(vae_anime)
    x = vae_anime.to_pixels(torch.from_numpy(faces(40)).permute(0, 3, 1, 2))
    with torch.no_grad():
        model.train()
        torch.manual_seed(0)
        pixels, _, _ = vae_anime.infer(model, x, model.encode(x))
        assert pixels.sigma.numel() == 1  # while it trains
        model.squares.fill_(0.0)
        torch.manual_seed(0)
        model(x)
        errors = vae_anime.frequencies(pixels.mean - x).square().mean(0)
        torch.testing.assert_close(model.squares, errors, rtol=1e-3, atol=1e-5)
        model.squares.copy_(errors)
        pixels, kl, _ = vae_anime.infer(model.eval(), x, model.encode(x))
        bits = vae_anime.bits_per_dim(pixels, x, kl)
        assert bits["bits_per_dim"].mean() < bits["bits_per_dim_one_sigma"].mean()
        least = 1 / (math.sqrt(2 * math.pi) * 255)
        torch.testing.assert_close(pixels.sigma, errors.sqrt().clamp_min(least))


@pytest.mark.parametrize("twin", TWINS)
def test_iwae_with_one_sample_is_the_elbo_and_grows_with_more(twin):
    torch.manual_seed(0)
    model = tiny_model(twin)
    with torch.no_grad():
        model.prior.loc.fill_(0.3)  # all Gaussians alike: the bound is exact there
    x = twin.to_pixels(torch.randint(0, 256, (1, *twin.SHAPE)))
    with torch.no_grad():
        q = model.encode(x)
        many = x.expand(400, -1, -1, -1)
        bounds = twin.iwae_bound(model, many, q.expand([400]), 1).tolist()
        params, kl, _ = twin.infer(model, many, q.expand([400]))
        elbos = params.log_prob(many) - kl
    spread = np.hypot(np.std(bounds), elbos.std().item()) / 20
    elbo = elbos.mean().item()
    assert abs(np.mean(bounds) - elbo) < 6 * spread + 1e-3 * abs(elbo)
    torch.manual_seed(1)
    many = twin.iwae_bound(model, x, q, 64).item()
    assert many >= np.mean(bounds) - 1e-4 * abs(elbo)
    torch.manual_seed(1)
    log_weights = []
    for _ in range(64):
        params, _, [(z, q_z, prior), *details] = twin.infer(model, x, q)
        weight = params.log_prob(x) + prior.log_prob(z) - q_z.log_prob(z)
        for code, q_i, p in details:
            weight += (p.base_dist.log_prob(code) - q_i.base_dist.log_prob(code)).flatten(1).sum(1)
        log_weights.append(weight)
    expected = torch.cat(log_weights).logsumexp(0).item() - math.log(64)
    assert many == pytest.approx(expected, rel=1e-4, abs=0.1)


@pytest.mark.parametrize("twin", TWINS)
def test_collapse_is_measured(twin, monkeypatch):
    """Three units carry the image and one, with q = p, nothing."""
    model, args = tiny_model(twin, learned_prior=False), twin.parse_args(["--iwae", "1"])
    images = torch.randint(0, 256, (500, *twin.SHAPE), dtype=torch.uint8)
    mu = torch.randn(500, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    each = {"mu": mu, "variance": torch.ones(500, 4), "neg_elbo": torch.zeros(500)}
    monkeypatch.setattr(twin, "evaluate", lambda *_, **__: ({}, each))
    monkeypatch.setattr(twin, "IWAE_IMAGES", 2)
    metrics, _ = twin.score(model, images, args)
    assert metrics["active_units"] == 3 and metrics["latent_dim"] == 4


@pytest.mark.parametrize("twin", TWINS)
def test_forward_is_the_elbo(twin):
    model, x = tiny_model(twin).train(), twin.to_pixels(torch.randint(0, 256, (3, *twin.SHAPE)))
    with torch.no_grad():
        torch.manual_seed(1)
        reconstruction, kl = model(x)
        torch.manual_seed(1)
        params, expected, codes = twin.infer(model, x, model.encode(x))
    torch.testing.assert_close(reconstruction, -params.log_prob(x))
    torch.testing.assert_close(kl, expected)
    in_full = sum(twin.D.kl_divergence(q, p) for _, q, p in codes)
    torch.testing.assert_close(kl, in_full)
    for code, q, p in codes:
        assert len(code) == len(q.log_prob(code)) == len(p.log_prob(code)) == 3


def test_detail_cannot_bend_what_z_means():
    """The gradient to z's encoder is that of the smooth image and z's own KL alone."""
    torch.manual_seed(0)
    model, x = tiny_model(vae_anime), vae_anime.to_pixels(torch.randint(0, 256, (3, 3, 64, 64)))
    nn_init = torch.nn.init.normal_
    nn_init(model.paint[-2].weight, std=0.1)  # at the start it is 0
    pixels, details = model.decode(z := model.encode(x).rsample(), x)
    pixels.mean.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in [*model.encoder.parameters(), *model.decoder.parameters()])
    assert model.paint[-2].weight.grad.abs().sum() > 0
    pixels.smooth.sum().backward()
    assert next(model.encoder.parameters()).grad.abs().sum() > 0 and len(z) == 3
    assert [len(code[0]) for code, _, _ in details] == [vae_anime.DETAIL] * len(vae_anime.LADDER)
    assert tuple(code.shape[-1] for code, _, _ in details) == vae_anime.LADDER


def test_the_same_seed_draws_the_same_detail_and_no_temperature_none():
    model = tiny_model(vae_anime)
    torch.nn.init.normal_(model.paint[-2].weight, std=0.1)
    for rung in model.ladder:
        torch.nn.init.normal_(rung.add.weight)
    args = vae_anime.parse_args(["--temperature", "0"])
    z = torch.randn(1, 4).expand(2, 4)
    cold = vae_anime.paint(model, z, args)
    assert torch.equal(cold[0], cold[1])
    args.temperature = 1.0
    warm = vae_anime.paint(model, z, args)
    assert not torch.equal(warm[0], warm[1]) and torch.equal(warm, vae_anime.paint(model, z, args))


def test_refined_posteriors_are_better_on_images_never_seen(monkeypatch):
    monkeypatch.setattr(vae_mnist, "REFINE", 40)
    torch.manual_seed(0)
    model = tiny_model(vae_mnist)
    x = vae_mnist.to_pixels(torch.from_numpy(digits(40))[:, None])

    def loss(q, kl_weight):
        losses = []
        for _ in range(20):
            pixels, kl, _ = vae_mnist.infer(model, x, q)
            losses.append(-pixels.log_prob(x) + kl_weight * kl)
        return torch.stack(losses).mean(0).detach()

    for kl_weight in (0.0, 1.0, 100.0):
        before, after = model.encode(x), model.encode(x, kl_weight)
        assert loss(after, kl_weight).mean() < loss(before, kl_weight).mean()
        assert all(p.grad is None for p in model.parameters())


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
    images = torch.from_numpy(np.array(twin.load_images(path)[0][:32]))
    epochs = 60 if twin is vae_mnist else 12
    words = ["--epochs", str(epochs), "--batch-size", "16", "--latent-dim", "16"]
    args = twin.parse_args(words)
    args.kl_weight = 1.0
    torch.manual_seed(0)
    model = twin.VAE(16, False)
    model.mean_image.copy_(twin.to_pixels(images).mean(0))
    state, split = {"history": []}, dict.fromkeys(("train", "validation", "test"), images)
    with twin.tqdm(disable=True) as bar:
        twin.train(model, split, args, state, lambda state: None, bar)
    first, last = state["history"][0], state["history"][-1]
    assert len(state["history"]) == epochs
    assert last["train_loss"] < first["train_loss"]
    learned = first["train_loss"] - last["train_loss"]  # both curves are of one likelihood
    assert abs(last["validation_loss"] - last["train_loss"]) < 0.1 * learned
    if twin is vae_mnist:
        assert last["train_kl"] == pytest.approx(last["validation_kl"], rel=0.3)  # the same images
        assert (
            last["validation_loss"] < 45
        )  # a bar's place alone takes 5 nats; at the start it is 90


# runs ---------------------------------------------------------------------------------------------


@pytest.mark.figures
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
    figures = ["learning-curve", "reconstructions", "samples", "interpolation", "posterior"]
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
    with Image.open(folder / "reconstructions-60.png") as picture:  # pairs, in eight columns
        assert picture.size == (8 * 2 * (2 * shape[1] + 2), 8 * 2 * (shape[1] + 2))
    twin.main(["--sample", "7"])
    samples = np.load(folder / "samples.npz", allow_pickle=False)["image"]
    assert (
        samples.shape == (7, *shape[1:])
        and samples.dtype == np.uint8
        and (folder / "samples-7.png").exists()
    )


@pytest.mark.parametrize("twin", TWINS)
def test_sweep_compares_and_takes_finished_runs(twin, here, capsys):
    longer = ("--epochs", "4")  # in two, λ = 0 and 1 differ by chance alone
    first = run(twin, "--lambda", "0", *longer)
    written = folder_of(twin, 0).joinpath("checkpoint.pt").stat().st_mtime_ns
    table = run(twin, "--lambda", "0", "1", "100", *longer)
    assert folder_of(twin, 0).joinpath("checkpoint.pt").stat().st_mtime_ns == written  # as it was
    assert list(table) == ["0", "1", "100"] and table["0"] == first
    assert table["100"]["kl"]["test"] < table["1"]["kl"]["test"] < table["0"]["kl"]["test"]
    out = Path("runs", twin.SCRIPT)
    assert {"lambda-sheet.png", "sweep.csv"} <= {path.name for path in out.iterdir()}
    run(twin, "--lambda", "0", "1", "--epochs", "1")
    assert (out / "lambda-1.previous").is_dir()  # other settings: trained anew


@pytest.mark.parametrize("twin", TWINS)
def test_evaluate_scores_images_of_all_the_file(twin, here, monkeypatch):
    """A file may be sorted by class: the bound is taken of random images of it."""
    run(twin)
    bound, seen = twin.iwae_bound, []
    monkeypatch.setattr(twin, "IWAE_IMAGES", 5)
    monkeypatch.setattr(twin, "iwae_bound", lambda *args: seen.append(args[1]) or bound(*args))
    file = Path("digits.npz" if twin is vae_mnist else "faces.zip")
    twin.main(["--evaluate", str(file), "--iwae", "2"])
    images = torch.from_numpy(np.array(twin.load_images(file)[0]))
    numbers = torch.cdist(seen[0].flatten(1), twin.to_pixels(images).flatten(1)).argmin(1).tolist()
    assert len(numbers) == 5 and numbers != sorted(numbers) and max(numbers) > 10


@pytest.mark.parametrize("twin", TWINS)
def test_the_last_fit_of_the_prior_is_kept_only_where_it_helps(twin, here, monkeypatch):
    fitted = run(twin)["kl"]["validation"]
    with monkeypatch.context() as patch:
        patch.setattr(twin, "fit_prior", lambda model, *_: model)
        normal = run(twin)["kl"]["validation"]
    fit = twin.GaussianMixture.fit

    def misfit(mixture, z):
        fit(mixture, z).means_ += 9

    monkeypatch.setattr(twin.GaussianMixture, "fit", misfit)
    assert fitted <= normal + 0.01 and normal == run(twin)["kl"]["validation"]


def test_faces_are_read_from_a_zip_file_or_a_folder(here):
    images, sha256 = vae_anime.load_images(Path("faces.zip"))
    names = sorted(range(60), key=lambda i: f"{i}.png")
    assert np.array_equal(images.transpose(0, 2, 3, 1), faces()[names])
    assert sha256 == hashlib.sha256(Path("faces.zip").read_bytes()).hexdigest()
    zipfile.ZipFile("faces.zip").extractall("folder/deep")
    assert np.array_equal(vae_anime.load_images(Path("folder"))[0], images)


def huge_png():
    """The head of a picture of 3.6 gigapixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def test_faces_of_other_kinds_are_converted_skipped_and_counted(here, capsys):
    grey, colour = Image.new("L", (64, 64), 90), Image.new("RGB", (64, 64), (200, 10, 10))
    extra = [
        ("a/grey.png", png(grey)),
        ("a/palette.png", png(colour.quantize(4))),
        ("a/rgba.png", png(colour.convert("RGBA"))),
        ("a/big.png", png(colour.resize((128, 100)))),
        ("a/deep.png", png(Image.fromarray(np.full((64, 64), 300, np.uint16)))),
        ("a/broken.png", b"\x89PNG not"),
        ("a/photograph.png", png(Image.new("RGB", (4000, 3000)))),
        ("a/huge.png", png(Image.new("RGB", (6000, 6000)))),
        ("a/huger.png", huge_png()),
        ("../../escape.png", png(colour)),
        ("a/notes.txt", "hello"),
    ]
    write_zip("mixed.zip", faces(20), extra=extra)
    images = vae_anime.load_images(Path("mixed.zip"))[0]
    out = capsys.readouterr().out
    assert len(images) == 26 and "4 images cannot be read, such as 'a/broken.png'" in out
    assert (
        not list(here.parent.rglob("escape.png")) and (images[:, 0] == 200).all((1, 2)).sum() == 4
    )


def test_zip_member_that_unpacks_to_gigabytes(here, capsys):
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb.png", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**24))
        archive.writestr("good.png", png(Image.new("RGB", (64, 64))))
    assert len(vae_anime.load_images(Path("bomb.zip"))[0]) == 1
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
        ({"image": digits(60, 56)}, ""),
    ],
    ids=["name", "trailing one", "channel", "float", "int", "0 and 1", "bool", "size"],
)
def test_digits_of_other_kinds(here, capsys, arrays, warning):
    np.savez("other.npz", label=np.zeros(60), **arrays)
    images, _ = vae_mnist.load_images(Path("other.npz"))
    assert images.shape == (60, 1, 28, 28) and images.dtype == np.uint8
    assert re.search(warning, capsys.readouterr().out)
    if 56 not in arrays.get("image", digits()).shape:
        two_levels = len(np.unique(arrays.get("image", digits()))) == 2
        assert np.array_equal(images[:, 0], 255 * (digits() >> 7) if two_levels else digits())


def test_one_digit_alone_is_an_image(here):
    np.savez("one.npz", image=digits(1))
    assert vae_mnist.load_images(Path("one.npz"))[0].shape == (1, 1, 28, 28)


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
    assert (
        twin.SOURCE in done.stdout
        and twin.DATA in done.stderr
        and [path.name for path in folder.iterdir()] == [f"{twin.SCRIPT}.py"]
    )
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
    "no file": (remove, [], r"No such file or directory\. Give (np\.savez|a zip)"),
    "rubbish": (rubbish, [], r"File is not a zip file\. (Make|Give)"),
    "truncated": (truncated, [], r"File is not a zip file\. (Make|Give)"),
    "negative": (lambda: None, ["--lambda", "-1"], r"--lambda -1\.0: give a number from 0 to"),
    "nan": (lambda: None, ["--lambda", "nan"], r"--lambda nan: give a number from 0 to"),
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
        r"lambda-1: no finished run there\. Train",
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
        r"no images \(N, H, W\) in it; found label",
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
        r"no PNG or JPEG image in it that can be read",
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
        and "no finished run there. Train, add --resume" in capsys.readouterr().err
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
        del state["model"]["prior.loc"]
    torch.save(state, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        twin.main(["--sample", "3"])
    error = capsys.readouterr().err
    expected = {"version": f"not a checkpoint of {twin.VERSION}", "weights": "prior.loc"}[change]
    assert stopped.value.code == 2 and expected in error and error.count("\n") == 1, error
