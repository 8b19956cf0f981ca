# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "pandas==3.1.1", "scikit-learn==1.9.1",
#                 "matplotlib==3.11.2", "tqdm==4.70.1", "pillow==12.3.0", "filelock==4.2.12"]
# ///
"""Learn binary images of handwritten digits with a variational autoencoder of Bernoulli pixels.

The encoder turns an image x into q(z|x), a Gaussian over codes z; the decoder turns a code into
p(x|z). Both raise a lower bound of the log likelihood (Kingma and Welling 2014, eq. 3):

    log p(x) >= E q(z|x) [log p(x|z)] - KL(q(z|x) || p(z))
    loss      = reconstruction + λ KL, in nats per image; λ = 1 is the bound

No encoder finds the best q(z|x) of an image it has not seen. So what is scored and shown starts
from the encoder's and takes REFINE steps of gradient on that image's own loss (semi-amortized
inference, Kim et al. 2018). The prior p(z) is N(0, I) in training and then, where λ > 0, a mixture
of 64 Gaussians fitted to the codes by EM; --prior normal keeps it N(0, I).

    python vae_mnist.py                      data/TibetanMNIST.npz, else the bundled sample
    python vae_mnist.py --lambda 0 1 50 100  one model a λ, side by side
    python vae_mnist.py --sample 100         draw digits from the finished model
    python vae_mnist.py --evaluate FILE      score it on other images

Each λ leaves figures, metrics.json and the model in runs/vae_mnist/lambda-<λ>/. On the course's
12,000 digits, λ = 1: 76.52 nats on test images (one thread, seed 0).
"""

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read by torch: how long threads wait awake

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.distributions as D
import torch.nn.functional as F
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from sklearn.mixture import GaussianMixture
from torch import Generator, Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
SCRIPT, VERSION = "vae_mnist", "vae_mnist 5"  # the checkpoint's; count up with the network
DATA = "TibetanMNIST.npz"
SOURCE = "The real TibetanMNIST.npz is the course's file; put it into data/ beside the script"
SHAPE = (1, 28, 28)  # channels, rows, columns
LEVELS = 2  # grey is made binary at 128
LATENT_DIM = 32
WIDTH = 24  # channels at 14 x 14; twice as many at 7 x 7
PRIOR_GAUSSIANS = 64  # in the learned prior; the digits come in clusters
EPOCHS = 28
LEARNING_RATE = 2e-3
EPSILON = 1e-8  # of Adam
MAX_NORM = 200.0  # of the gradient
REFINE, REFINE_RATE = 80, 0.05  # steps on q(z|x), and Adam's first rate for them
TEMPERATURE = 0.8  # of draws: clearer strokes than 1, a little less various
ROTATE, SCALE, SHEAR, SHIFT = 8.0, 0.08, 0.08, 0.08  # degrees; log factor; slope; half images
TERMS = ("reconstruction", "kl", "loss")  # of training: loss = reconstruction + λ KL
ACTIVE = 0.01  # variance over images of a unit's posterior mean (Burda et al. 2016)
IWAE_IMAGES = 100  # that its bound is taken of
MAX_BYTES = 2**29  # of one unpacked array


# data: files -> uint8 images -> batches of pixels in [0, 1] ---------------------------------------
def find_data(given: Path | None) -> Path:
    """The file to read: the one given, else in data/ beside the script, else the bundled sample."""
    real, sample = HERE / "data" / DATA, HERE / "data" / "sample" / DATA
    path = given or (real if real.exists() else sample)
    print(f"data      {path}" + (f", the bundled sample. {SOURCE}" if path == sample else ""))
    return path


def load_images(path: Path) -> tuple[np.ndarray, str]:
    """The images of an npz file, uint8 (N, 1, 28, 28), and the file's sha256.

    The array is `image`, or else the first of shape (N, H, W), (N, H, W, 1) or (N, 1, H, W).
    """
    with one_line(path, "Give np.savez(file, image=uint8 images)"):
        content = path.read_bytes()
        sizes = [member.file_size for member in zipfile.ZipFile(io.BytesIO(content)).infolist()]
        if max(sizes, default=0) > MAX_BYTES:
            raise ValueError(f"unpacks to more than {MAX_BYTES >> 20} MiB")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            for name in sorted(arrays.files, key=lambda name: name != "image"):
                images = arrays[name]
                inner = tuple(size for size in images.shape[1:] if size != 1)
                images = images.reshape(images.shape[:1] + inner)
                if images.ndim == 3 and images.dtype.kind in "buif" and images.size:
                    break
            else:
                raise ValueError(f"no images (N, H, W) in it; found {', '.join(arrays.files)}")
        if not np.isfinite(images).all() or images.min() < 0 or images.max() > 255:
            raise ValueError("holds values outside 0 to 255")
        if images.shape[1] != images.shape[2]:
            raise ValueError(f"images of {images.shape[1:]} are not square")
    if images.max() <= 1:
        print(f"warning   {path}: values from 0 to 1, stretched to 255")
        images = images * 255.0
    images = np.rint(images).astype(np.uint8)
    resize = partial(Image.Image.resize, size=SHAPE[:0:-1], resample=Image.Resampling.BOX)
    images = np.stack([np.asarray(resize(Image.fromarray(image))) for image in images])
    return images[:, None], hashlib.sha256(content).hexdigest()


def split_images(images: np.ndarray, seed: int, limit: int | None) -> dict[str, Tensor]:
    """Deal at most `limit` images at random: 80% for training, 10% and 10%, or 5,000 if fewer."""
    order = torch.randperm(len(images), generator=Generator().manual_seed(seed))[:limit]
    if len(order) < 20:
        fail(f"{len(order)} images are too few to split. Give 20 or more")
    tenth = min(len(order) // 10, 5000)
    parts = order.split([tenth, tenth, len(order) - 2 * tenth])
    test, validation, train = (torch.from_numpy(images[rows.numpy()]) for rows in parts)
    return {"train": train, "validation": validation, "test": test}


def to_pixels(images: Tensor) -> Tensor:
    """Values 0 to 255 -> LEVELS evenly spaced values from 0 to 1, laid out channels last."""
    pixels = (images.float() * (LEVELS / 256)).floor() / (LEVELS - 1)
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Warp the grey images (B, 1, 28, 28) by random affine maps within the constants' bounds."""

    def draw(bound: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * bound

    angle, shear = draw(math.radians(ROTATE)), draw(SHEAR)
    wider, higher = draw(SCALE).exp(), draw(SCALE).exp()
    sin, cos = angle.sin(), angle.cos()
    x = torch.stack([cos * wider, (shear * cos - sin) * higher, draw(SHIFT)], -1)
    y = torch.stack([sin * wider, (shear * sin + cos) * higher, draw(SHIFT)], -1)
    grid = F.affine_grid(torch.stack([x, y], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round()


# model --------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), at the start x (He et al. 2016, fig. 4e)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def upsample(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Layers (B, inputs, H, W) -> (B, outputs, 2 H, 2 W)."""
    return nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.PixelShuffle(2)


def gaussian(mu: Tensor, logvar: Tensor) -> D.Independent:
    """N(μ, diag σ²) of a batch, in float32; σ near 0 would make a KL that ends the training."""
    scale = (0.5 * logvar.float().clamp(-10.0, 5.0)).exp()
    return D.Independent(D.Normal(mu.float(), scale, validate_args=False), mu.dim() - 1)


class Prior(nn.Module):
    """p(z): N(0, I) in training; `fit_prior` makes it K Gaussians with full covariance."""

    def __init__(self, latent_dim: int, count: int):
        super().__init__()
        self.weights = nn.Parameter(torch.full((count,), 1 / count), False)  # (K,)
        self.loc = nn.Parameter(torch.zeros(count, latent_dim), False)
        self.scale_tril = nn.Parameter(torch.eye(latent_dim).repeat(count, 1, 1), False)

    def forward(self, temperature: float = 1.0) -> D.Distribution:
        """p(z), each Gaussian's standard deviations times `temperature`."""
        if self.training:
            return gaussian(*torch.zeros(2, 1, self.loc.shape[1]).to(self.loc))
        spread = temperature * self.scale_tril
        gaussians = D.MultivariateNormal(self.loc, scale_tril=spread, validate_args=False)
        return D.MixtureSameFamily(D.Categorical(self.weights), gaussians, validate_args=False)


@D.register_kl(D.Independent, D.MixtureSameFamily)
def kl_to_mixture(q: D.Independent, p: D.MixtureSameFamily) -> Tensor:
    """KL(q ‖ p), (B,); an upper bound, as -ln Σ w exp(E[ln N]) is above E[-ln p(z)] (Jensen)."""
    gaussians = p.component_distribution
    trace = q.variance @ gaussians.precision_matrix.diagonal(dim1=1, dim2=2).T  # (B, K)
    expected = gaussians.log_prob(q.mean[:, None]) - 0.5 * trace  # E[ln N_j(z)], (B, K)
    return -(p.mixture_distribution.logits + expected).logsumexp(1) - q.entropy()


class VAE(nn.Module):
    """p(x, z) = p(x|z) p(z), and q(z|x)."""

    def __init__(self, latent_dim: int, learned_prior: bool):
        super().__init__()
        # x (B, 1, 28, 28) -> mu and logvar of q(z|x) beside each other, (B, 2k)
        half = nn.Conv2d(1, WIDTH, 4, 2, 1), Residual(WIDTH)  # (B, WIDTH, 14, 14)
        quarter = nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1), Residual(2 * WIDTH)  # (B, 2 WIDTH, 7, 7)
        codes = nn.SiLU(), nn.Flatten(), nn.Linear(2 * WIDTH * 49, 2 * latent_dim)
        self.encoder = nn.Sequential(*half, *quarter, *codes)
        # z (B, k) -> what it adds to the mean image's logits, (B, 1, 28, 28)
        quarter = nn.Linear(latent_dim, 2 * WIDTH * 49), nn.Unflatten(1, (2 * WIDTH, 7, 7))
        half = Residual(2 * WIDTH), *upsample(2 * WIDTH, WIDTH)  # (B, WIDTH, 14, 14)
        full = Residual(WIDTH), *upsample(WIDTH, 16), nn.SiLU()  # (B, 16, 28, 28)
        last = nn.Conv2d(16, 1, 3, padding=1)
        self.decoder = nn.Sequential(*quarter, *half, *full, last)
        self.prior = Prior(latent_dim, PRIOR_GAUSSIANS if learned_prior else 1)
        self.register_buffer("mean_image", torch.zeros(SHAPE))
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor, kl_weight: float | None = None) -> D.Independent:
        """q(z|x) of x (B, 1, 28, 28) in [0, 1]; with a λ each image's own, refined."""
        with autocast(x.device):
            q = gaussian(*self.encoder(x - self.mean_image).chunk(2, 1))
        return q if kl_weight is None else self.refine(x, q, kl_weight)

    @torch.enable_grad()
    def refine(self, x: Tensor, q: D.Independent, kl_weight: float) -> D.Independent:
        """μ and σ improved for each image by gradient from q's on (Kim et al. 2018)."""
        prior = self.prior()
        learned = [q.mean.detach().requires_grad_(), q.variance.log().detach().requires_grad_()]
        optimizer = torch.optim.Adam(learned, betas=(0.9, 0.99))
        for step in range(REFINE):
            q = gaussian(*learned)
            pixels, _ = self.decode(q.rsample())
            loss = kl_weight * D.kl_divergence(q, prior).sum() - pixels.log_prob(x).sum()
            learned[0].grad, learned[1].grad = torch.autograd.grad(loss, learned)
            optimizer.param_groups[0]["lr"] = REFINE_RATE * (1 - step / REFINE)
            optimizer.step()
        return gaussian(*(one.detach() for one in learned))

    def decode(self, z: Tensor, x: Tensor | None = None, temperature: float = 1.0) -> tuple:
        """p(x|z), Bernoulli (B, 1, 28, 28) (Kingma and Welling 2014, eq. 11); no further codes."""
        with autocast(z.device):
            logits = self.mean_image.clamp(0.01, 0.99).logit() + self.decoder(z)
        return D.Independent(D.Bernoulli(logits=logits.float(), validate_args=False), 3), []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction -log p(x|z) and KL, (B,) each."""
        pixels, kl, _ = infer(self, x, self.encode(x))
        return -pixels.log_prob(x), kl


# objective (nats per image) -----------------------------------------------------------------------
def bits_per_dim(pixels: D.Independent, x: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """The bound in bits per dimension, (B,)."""
    return {"bits_per_dim": (kl - pixels.log_prob(x)) / (math.prod(SHAPE) * math.log(2))}


def infer(model: VAE, x: Tensor, q: D.Independent) -> tuple:
    """p(x|codes), their KL(q ‖ p), (B,), and (code, q, p) of each, drawn from q; first of z."""
    z = q.rsample()
    pixels, details = model.decode(z, x)
    codes = [(z, q, model.prior()), *details]
    kl = sum(D.kl_divergence(q, p) for _, q, p in codes)  # Kingma and Welling 2014, appendix B
    return pixels, kl, codes


@torch.no_grad()
def iwae_bound(model: VAE, x: Tensor, q: D.Independent, samples: int) -> Tensor:
    """log 1/K Σ p(x, codes) / q(codes|x), (B,), of K samples (Burda et al. 2016, eq. 8)."""
    log_weights = []
    for _ in range(samples):
        pixels, _, codes = infer(model, x, q)
        ratios = (p.log_prob(code) - q.log_prob(code) for code, q, p in codes)
        log_weights.append(pixels.log_prob(x) + sum(ratios))
    return torch.stack(log_weights).logsumexp(0) - math.log(samples)


# train and evaluate -------------------------------------------------------------------------------
def train(model: VAE, images: dict, args: Namespace, state: dict, save: Callable, bar) -> None:
    """Minimise reconstruction + λ KL, on from `state`."""
    device, first = model.mean_image.device, len(state["history"])
    optimizer = torch.optim.Adam(model.parameters(), args.lr, (0.9, 0.99), EPSILON, fused=True)
    per_epoch = len(images["train"]) // args.batch_size  # a batch that is not full is left out
    steps = args.epochs * per_epoch
    parts = {"model": model, "optimizer": optimizer}
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state.pop(name))
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    bar.update(first * per_epoch)
    model.train()
    for epoch in range(first, args.epochs):
        order = torch.randperm(len(images["train"]), generator=seed_all(args.seed, epoch))
        sums = torch.zeros(len(TERMS), device=device)  # over this process's slices
        for step, batch in enumerate(order.split(args.batch_size)[:per_epoch], epoch * per_epoch):
            changed = augment(images["train"][batch], seed_all(args.seed, epoch, step))
            x = to_pixels(changed[RANK::WORLD].to(device))
            seed_all(args.seed, epoch, step, RANK)
            reconstruction, kl = (term.mean() for term in parallel(x))
            loss = reconstruction + args.kl_weight * kl
            optimizer.zero_grad()
            (loss / max(1.0, args.kl_weight)).backward()  # so that ε and the norm mean the same
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            if not math.isfinite(loss.item() + norm.item()):
                fail(f"no finite loss in epoch {epoch + 1}, step {step + 1}. Lower --lr")
            decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)  # and a tenth of warm-up
            optimizer.param_groups[0]["lr"] = args.lr * min(10 * (step + 1) / steps, decay)
            optimizer.step()
            sums += torch.stack([reconstruction, kl, loss]).detach()
            bar.update()
        held_out, _ = evaluate(model, images["validation"], args)
        if not math.isfinite(held_out["neg_elbo"]):
            fail(f"no finite loss after epoch {epoch + 1}. Lower --lr")
        means = zip(TERMS, (sums / per_epoch).tolist(), strict=True)
        row = {"epoch": epoch + 1} | {f"train_{term}": mean for term, mean in means}
        state["history"].append(row | {f"validation_{term}": held_out[term] for term in TERMS})
        save(state | {name: part.state_dict() for name, part in parts.items()})
    model.eval()


@torch.no_grad()
def fit_prior(model: VAE, images: dict, args: Namespace) -> VAE:
    """The model with its prior fitted to training codes by EM, if that helps on other images."""
    _, each = evaluate(model, images["train"][:16384], args)
    z = each["mu"] + each["variance"].sqrt() * torch.randn(4, *each["mu"].shape)  # (4, N, k)
    fitted = copy.deepcopy(model)
    mixture = GaussianMixture(len(fitted.prior.weights), reg_covar=1e-3, random_state=0)
    mixture.fit(z.flatten(0, 1).double())  # Dempster et al. 1977
    fitted.prior.weights.copy_(torch.from_numpy(mixture.weights_))
    fitted.prior.loc.copy_(torch.from_numpy(mixture.means_))
    fitted.prior.scale_tril.copy_(torch.from_numpy(np.linalg.cholesky(mixture.covariances_)))
    return min(model, fitted, key=lambda m: evaluate(m, images["validation"], args)[0]["neg_elbo"])


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, args: Namespace, final=False) -> tuple[dict, dict]:
    """Scores of uint8 images (N, C, H, W), means in nats; and what figures need of each image."""
    seed_all(args.seed)
    each = {}
    for i in torch.arange(len(images)).split(250):
        x = to_pixels(images[i].to(model.mean_image.device))
        q = model.encode(x, args.kl_weight if final else None)
        pixels, kl, _ = infer(model, x, q)  # codes are drawn, not put at q's mean
        again, reconstruction = pixels.mean.clamp(0, 1), -pixels.log_prob(x)
        scores = {"reconstruction": reconstruction, "kl": kl, "neg_elbo": reconstruction + kl}
        scores |= {"loss": reconstruction + args.kl_weight * kl} | bits_per_dim(pixels, x, kl)
        scores |= {"psnr_db": (again - x).square().flatten(1).mean(1)}
        found = scores | {"mu": q.mean, "variance": q.variance, "again": to_bytes(again)}
        for key, v in found.items():  # into one tensor: a list of small ones would leave holes
            each.setdefault(key, torch.empty(len(images), *v.shape[1:], dtype=v.dtype))[i] = v.cpu()
    means = {name: each[name].double().mean().item() for name in scores}
    means["psnr_db"] = -10 * math.log10(max(means["psnr_db"], 1e-12))  # of the mean squared error
    return means, each


def score(model: VAE, images: Tensor, args: Namespace) -> tuple[dict, dict]:
    """What metrics.json says of `images`, the IWAE bound of some of them; what figures need."""
    metrics, each = evaluate(model, images, args, final=True)
    some = torch.randperm(len(images), generator=seed_all(args.seed))[:IWAE_IMAGES]
    x = to_pixels(images[some].to(model.mean_image.device))
    q = gaussian(each["mu"][some].to(x.device), each["variance"][some].log().to(x.device))
    bound = iwae_bound(model, x, q, args.iwae).mean().item()
    metrics |= {"iwae": -bound, "iwae_samples": args.iwae, "iwae_images": len(some)}
    metrics["iwae_neg_elbo"] = each["neg_elbo"][some].mean().item()  # to compare iwae with
    active = each["mu"].var(0, correction=0) > ACTIVE
    metrics |= {"active_units": int(active.sum()), "latent_dim": len(active)}
    return metrics | {"parameters": sum(p.numel() for p in model.parameters())}, each


# figures ------------------------------------------------------------------------------------------
def to_bytes(images: Tensor) -> Tensor:
    """Values in [0, 1], (N, C, H, W) -> uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().byte().cpu()


@torch.no_grad()
def paint(model: VAE, z: Tensor, args: Namespace) -> Tensor:
    """The mean of p(x|codes) for z (N, k), uint8; the same seed draws the same further codes."""
    seed_all(args.seed)
    parts = z.to(model.mean_image).split(250)
    return torch.cat([to_bytes(model.decode(z, None, args.temperature)[0].mean) for z in parts])


def draw_samples(model: VAE, count: int, args: Namespace) -> Tensor:
    """The mean of p(x|codes) for codes from the prior, uint8 (count, C, H, W)."""
    seed_all(args.seed, count)
    return paint(model, model.prior(args.temperature).sample((count,)), args)


def tile(images: Tensor, columns: int) -> np.ndarray:
    """uint8 images (N, C, H, W) -> one RGB image, `columns` beside each other, white between."""
    white = (1, 1, 1, 1, 0, 0, 0, -len(images) % columns)
    images = F.pad(images.expand(-1, 3, -1, -1), white, value=255).unflatten(0, (-1, columns))
    return images.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()  # rows, columns, RGB


@contextlib.contextmanager
def panels(path: Path, count: int) -> Iterator[list]:
    """Panels beside each other to draw on, saved to `path` as a figure when the block ends."""
    figure = Figure((4 * count, 3.4), dpi=200, layout="constrained")
    yield list(figure.subplots(1, count, squeeze=False).flat)
    write_file(path, partial(figure.savefig, format="png"))


def show(panel, image: np.ndarray, title: str) -> None:
    panel.imshow(image, interpolation="nearest")
    panel.set_title(title, fontsize=9)
    panel.axis("off")


def plot_images(folder: Path, model: VAE, test: Tensor, each: dict, args: Namespace) -> None:
    """Reconstructions, samples and interpolations."""
    real, again, rows = to_bytes(to_pixels(test)), each["again"], min(8, len(test) // 2)
    with panels(folder / "reconstructions.png", 2) as (left, right):
        show(left, tile(real[:64], 8), f"real, λ = {args.kl_weight:g}")
        show(right, tile(again[:64], 8), "reconstructed")
    with panels(folder / "samples.png", 1) as [panel]:
        title = f"λ = {args.kl_weight:g}, temperature {args.temperature:g}"
        show(panel, tile(draw_samples(model, 100, args), 10), title)
    with panels(folder / "interpolation.png", 1) as [panel]:
        ends = real[: 2 * rows].unflatten(0, (rows, 2))
        first, last = each["mu"][: 2 * rows].unflatten(0, (rows, 2)).unbind(1)  # (rows, k)
        shares = torch.linspace(0, 1, 10).tolist()
        between = torch.stack([paint(model, first.lerp(last, w), args) for w in shares], 1)
        lines = torch.cat([ends[:, :1], between, ends[:, 1:]], 1).flatten(0, 1)
        show(panel, tile(lines, 12), "real | from one z to the other | real")


def plot_posterior(folder: Path, test: Tensor, each: dict, args: Namespace) -> None:
    """One image's q(z|x), and how many dimensions tell images apart."""
    i = args.image % len(test)
    pair = torch.stack([to_bytes(to_pixels(test[i : i + 1]))[0], each["again"][i]])
    order = each["variance"][i].argsort()
    mu, variance = each["mu"][i, order], each["variance"][i, order]
    with panels(folder / "posterior.png", 4) as (images, means, variances, active):
        show(images, tile(pair, 2), f"test image {i} | reconstructed, λ = {args.kl_weight:g}")
        means.bar(range(len(mu)), mu.numpy(), width=1.0)
        means.set(xlabel="dimension of z, by variance", ylabel="mean of q(z|x)", ylim=(-5, 5))
        variances.bar(range(len(mu)), variance.numpy(), width=1.0)
        variances.set(xlabel="dimension of z", ylabel="variance", yscale="log", ylim=(1e-9, 10))
        active.semilogy(each["mu"].var(0, correction=0).sort(descending=True)[0].clamp_min(1e-8))
        active.set(xlabel="dimension of z, sorted", ylabel="variance over images of E[z|x]")
        for panel, bound in {means: 0, variances: 1, active: ACTIVE}.items():
            name = f"active above {bound}" if panel is active else f"N(0, I): {bound}"
            panel.axhline(bound, color="tab:red", linewidth=1, label=name)
            panel.legend(loc="lower right")


def plot_learning_curve(path: Path, history: pd.DataFrame, kl_weight: float) -> None:
    """By epoch, the first 5% left out: training (on images that augment changed), validation."""
    titles = "-log p(x|codes)", "KL", f"loss, λ = {kl_weight:g}"
    with panels(path, len(TERMS)) as axes:
        for panel, term, title in zip(axes, TERMS, titles, strict=True):
            names = {f"train_{term}": "as it trains", f"validation_{term}": "validation"}
            lines = history[len(history) // 20 :].set_index("epoch")[[*names]].rename(columns=names)
            lines.plot(ax=panel, style=".-", title=title, ylabel="nats per image")


def plot_sweep(out: Path, metrics: dict[str, dict]) -> None:
    """A table with a row for each λ, and a sheet with its figures in a column."""
    keys = (*TERMS, "neg_elbo")
    table = pd.DataFrame(row | {key: row[key]["test"] for key in keys} for row in metrics.values())
    write_file(out / "sweep.csv", partial(table.to_csv, index=False, mode="wb"))
    shown = ["lambda", *keys, "iwae", "bits_per_dim", "psnr_db", "active_units", "seconds"]
    print(table[shown].round(3).to_string(index=False))
    rows = []
    for name in ("reconstructions", "samples", "interpolation", "posterior", "learning-curve"):
        pictures = [Image.open(out / f"lambda-{weight}" / f"{name}.png") for weight in metrics]
        size = 800, 800 * pictures[0].height // pictures[0].width
        rows.append(np.hstack([picture.convert("RGB").resize(size) for picture in pictures]))
    sheet = Image.fromarray(np.vstack(rows))
    write_file(out / "lambda-sheet.png", partial(sheet.save, format="png"))


# run folder, errors, command line (much of it the same in every script) ---------------------------
def fail(message: str) -> NoReturn:
    """End the program over a user's mistake: one line on stderr, exit code 2."""
    tqdm.write("error: " + " ".join(message.split()), file=sys.stderr)  # not into a bar
    raise SystemExit(2)


@contextlib.contextmanager
def one_line(path: Path | str, mend: str) -> Iterator[None]:
    """The one handler: what a library raises over the file `path` becomes a line that names it."""
    try:
        yield
    except Exception as error:  # readers raise whatever the bytes lead them into
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fail(f"{path}: {reason[:300].rstrip('.')}. {mend}")


def check_ranges(args: Namespace, ranges: dict[str, tuple[float, float]]) -> None:
    """End the program unless each argument lies between its two ends, which it may take."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # nan lies nowhere
            fail(f"--{name.replace('_', '-')} {value}: give a number from {low:g} to {high:g}")


def exit_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the process at once, with the command that goes on from there."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's
    start = ["torchrun", "--nproc-per-node", processes] if processes else ["python"]

    def stop(number: int, frame) -> None:
        words = [word for word in sys.argv if word != "--resume"]
        print("\nstopped   go on with:", shlex.join([*start, *words, "--resume"]))
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def seed_all(*numbers: int) -> Generator:
    """Seed torch by the place in the run, such as (seed, epoch, step); return a generator too."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
    torch.manual_seed(seed)
    return Generator().manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU when there is one, under torchrun one each."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with one_line(f"--device {name}", "Use --device cpu"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.empty(1, device=name).device


def autocast(device: torch.device) -> torch.autocast:
    """bf16 matrix products where the processor has them: a GPU, or a CPU with avx512_bf16."""
    bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type != "mps")


def write_file(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Let `save` fill a buffer, and move it to `path` when it is written: never half a file."""
    content, temporary = io.BytesIO(), path.with_name(f".{path.name}.tmp")
    save(content)
    with one_line(path, "Make room, then add --resume"):
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    write_file(path, lambda file: file.write(json.dumps(value, indent=2, default=str).encode()))


@contextlib.contextmanager
def open_run(folder: Path, args: Namespace, hashes: dict[str, str]) -> Iterator[None]:
    """Hold the run's folder while the block lasts; a run that starts over keeps the old one."""
    previous = folder.parent / f"{folder.name}.previous"
    with one_line(folder, "Wait for the other run, or name another folder with --out"):
        for path in (folder, previous):
            if any(path.glob("[!.]*")) and not (path / "config.json").exists():
                raise ValueError(f"{path.name} is not the folder of a run")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0).acquire()
        if not args.resume and (folder / "checkpoint.pt").exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            folder.mkdir()
            print(f"kept      {previous}, the run that stood in {folder.name}")
        for stale in folder.glob(".*.tmp"):
            stale.unlink()
    git = shutil.which("git") and ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = git and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    facts = {"arguments": vars(args), "sha256": hashes, "seed": args.seed, "commit": commit}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    with lock:
        write_json(folder / "config.json", facts | {"versions": versions})
        yield


def load_checkpoint(path: Path, version: str, settings: dict) -> dict:
    """Read a checkpoint of this `version` trained with `settings`. No code in it is run."""
    with one_line(path, mend := "Move it away, or name another folder with --out"):
        if zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("version") != version:
        fail(f"{path}: not a checkpoint of {version}. {mend}")
    for name, value in settings.items():
        if (there := state["settings"].get(name)) != value:
            fail(f"{path}: trained with {name} {there}, not {value}. Give the same data and flags")
    return state


# fmt: off
def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = fail
    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, metavar="PATH", help=f"{DATA} or one like it; of faces a folder, too")
    add("--out", type=Path, default=Path("runs") / SCRIPT, help="folder of the run [%(default)s]")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--evaluate", type=Path, metavar="PATH", help="score the finished model on images of PATH")
    add("--sample", type=int, metavar="N", help="draw N images from the finished model")
    add("--seed", type=int, default=0, help="of split, weights, batches, noise [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[%(default)s]")
    add("--limit", type=int, metavar="N", help="use N random images only, for a first look")
    add = parser.add_argument_group("model and objective").add_argument
    add("--lambda", type=float, nargs="+", default=[1.0], dest="kl_weight", metavar="λ",
        help="weight of the KL; several train one model each and compare them [1]")
    add("--prior", choices=("learned", "normal"), default="learned", help="p(z) [%(default)s]")
    add("--latent-dim", type=int, default=LATENT_DIM, help="dimensions of z [%(default)s]")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=EPOCHS, help="passes over the images [%(default)s]")
    add("--batch-size", type=int, default=32, help="images, over all processes [%(default)s]")
    add("--lr", type=float, default=LEARNING_RATE, help="peak rate of Adam [%(default)s]")
    add = parser.add_argument_group("scores and figures").add_argument
    add("--temperature", type=float, default=TEMPERATURE, help="of draws: times σ [%(default)s]")
    add("--image", type=int, default=0, help="test image of posterior.png [%(default)s]")
    add("--iwae", type=int, default=64, help="samples for the IWAE bound [%(default)s]")
    args = parser.parse_args(argv)
    least = {"epochs": 1, "batch_size": 1, "latent_dim": 1, "limit": 1, "sample": 1, "iwae": 1,
             "image": 0, "temperature": 0, "lr": 1e-12, "seed": 0}
    check_ranges(args, {name: (low, 2**32 - 1) for name, low in least.items()})
    for value in args.kl_weight:
        check_ranges(Namespace(**{"lambda": value}), {"lambda": (0, 1e9)})
    args.lambdas = list({f"{value:g}": value for value in args.kl_weight}.values())  # by folder
    args.kl_weight = args.lambdas[0]
    if bool(args.evaluate) + bool(args.sample) + (len(args.lambdas) > 1) > 1:
        fail("give only one of --evaluate, --sample and several --lambda")
    return args
# fmt: on


def load_finished(folder: Path, device: torch.device) -> tuple[VAE, dict]:
    """The model of the finished run in `folder`, and its settings."""
    path = folder / "checkpoint.pt"
    state = load_checkpoint(path, VERSION, {}) if path.exists() else {}
    if "metrics" not in state:
        fail(f"{folder}: no finished run there. Train, add --resume to go on, or name its --out")
    with one_line(path, "Train again without --resume"):
        model = VAE(state["settings"]["latent_dim"], state["settings"]["prior"] == "learned")
        model.load_state_dict(state["model"])
        return model.eval().to(device), state["settings"]


def use_finished(args: Namespace) -> dict:
    """Draw --sample images from the finished model, or score it on every image of --evaluate."""
    folder, began = args.out / f"lambda-{args.kl_weight:g}", time.monotonic()
    model, _ = load_finished(folder, pick_device(args.device))
    if args.sample:
        name, metrics = "samples", {"samples": args.sample, "temperature": args.temperature}
        arrays = {"image": draw_samples(model, args.sample, args)}
    else:
        name, images = "reconstructions", torch.from_numpy(load_images(args.evaluate)[0])
        metrics, each = score(model, images, args)
        metrics |= {"images": len(images), "seconds": time.monotonic() - began}
        arrays = {"image": images, "reconstruction": each["again"]}
    x = torch.cat([part[: args.sample or 100] for part in arrays.values()], -1)  # side by side
    picture = Image.fromarray(tile(x, math.ceil(len(x) ** 0.5)).repeat(2, 0).repeat(2, 1))
    write_file(folder / f"{name}-{len(x)}.png", partial(picture.save, format="png"))
    arrays = {name: x.permute(0, 2, 3, 1).squeeze(-1).numpy() for name, x in arrays.items()}
    write_file(folder / f"{name}.npz", partial(np.savez_compressed, **arrays))
    print(f"wrote     {folder / name}.npz, {name}-{len(x)}.png")
    print(json.dumps(metrics))
    return metrics


def run(args: Namespace, images: dict, sha256: str, bar: tqdm) -> dict:
    """Train at one λ, score the test images, and leave everything in <out>/lambda-<λ>/."""
    device, test = pick_device(args.device), images["test"]
    folder = args.out / f"lambda-{args.kl_weight:g}"
    checkpoint = folder / "checkpoint.pt"
    names = ("prior", "latent_dim", "epochs", "batch_size", "lr", "seed", "limit")
    settings = {n: getattr(args, n) for n in names} | {"lambda": args.kl_weight, "sha256": sha256}
    state = {"version": VERSION, "settings": settings, "history": [], "seconds": 0.0}
    if checkpoint.exists() and (args.resume or len(args.lambdas) > 1):
        saved = load_checkpoint(checkpoint, VERSION, settings if args.resume else {})
        if args.resume or ("metrics" in saved and saved["settings"] == settings):
            state = saved
    if "metrics" in state:
        return state["metrics"]
    if WORLD > 1:
        dist.barrier()  # until all have read what the first one may move away
    began = time.monotonic() - state["seconds"]

    def save(state: dict) -> None:
        if RANK == 0:
            state["seconds"] = time.monotonic() - began
            write_file(checkpoint, partial(torch.save, state))

    with open_run(folder, args, {"data": sha256}) if RANK == 0 else contextlib.nullcontext():
        seed_all(args.seed)
        model = VAE(args.latent_dim, args.prior == "learned").eval()
        model.mean_image.copy_(to_pixels(images["train"][:4096]).mean(0))
        train(model.to(device), images, args, state, save, bar)
        if args.prior == "learned" and args.kl_weight > 0:
            model = fit_prior(model, images, args)
        bar.write("trained   scoring and drawing take a moment more")
        metrics, each = score(model, test, args)
        some = {name: images[name][: 1 + len(test) // 3] for name in ("train", "validation")}
        others = {name: evaluate(model, part, args, True)[0] for name, part in some.items()}
        for key in (*TERMS, "neg_elbo"):
            metrics[key] = {"test": metrics[key]} | {n: part[key] for n, part in others.items()}
        seconds = time.monotonic() - began
        metrics |= {"lambda": args.kl_weight, "epochs": args.epochs, "seconds": seconds}
        if RANK == 0:
            history = pd.DataFrame(state["history"])
            write_file(folder / "history.csv", partial(history.to_csv, index=False, mode="wb"))
            plot_learning_curve(folder / "learning-curve.png", history, args.kl_weight)
            plot_images(folder, model, test, each, args)
            plot_posterior(folder, test, each, args)
        save(state | {"model": model.state_dict(), "metrics": metrics})
    return metrics


def train_all(args: Namespace) -> dict:
    """Train one model a λ; return the metrics of the one, or of several by λ."""
    pixels, sha256 = load_images(find_data(args.data))
    images = split_images(pixels, args.seed, args.limit)
    print(f"images    {', '.join(f'{len(part)} {name}' for name, part in images.items())}")
    args.batch_size, metrics = min(args.batch_size, len(images["train"])), {}
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size}: give a multiple of the {WORLD} processes")
    each = args.epochs * (len(images["train"]) // args.batch_size)  # batches of a λ
    with tqdm(total=each * len(args.lambdas), unit="step", mininterval=2, file=sys.stdout) as bar:
        for weight in args.lambdas:
            args.kl_weight, name = weight, f"{weight:g}"
            bar.update(each * len(metrics) - bar.n)  # of a λ that was finished before
            metrics[name] = run(args, images, sha256, bar)
            told = "{bits_per_dim:.3f} bits/dim, {psnr_db:.1f} dB".format(**metrics[name])
            bar.write(f"λ = {name:6}-ELBO {metrics[name]['neg_elbo']['test']:.2f} nats, {told}")
            if RANK == 0:  # of a run that had been finished before, too
                write_json(args.out / f"lambda-{name}" / "metrics.json", metrics[name])
    print(f"wrote     {args.out}/lambda-{', '.join(metrics)}")
    name = "1" if "1" in metrics else name
    again = ["--out", str(args.out), "--lambda", name, "--temperature", f"{args.temperature:g}"]
    print("next      python", sys.argv[0], "--sample 100", shlex.join(again))
    if len(metrics) > 1 and RANK == 0:
        plot_sweep(args.out, metrics)
    return metrics if len(metrics) > 1 else metrics[name]


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics; of a sweep, by λ."""
    if hasattr(sys.stdout, "reconfigure"):  # λ is no reason to stop where a terminal has none
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    exit_on_signals()
    with contextlib.redirect_stdout(io.StringIO() if RANK else sys.stdout):  # the first one speaks
        if args.evaluate or args.sample:
            return {} if RANK else use_finished(args)
        if WORLD > 1:
            dist.init_process_group("nccl" if pick_device(args.device).type == "cuda" else "gloo")
        with one_line("torchrun", "Add --resume") if WORLD > 1 else contextlib.nullcontext():
            metrics = train_all(args)
    if WORLD > 1:
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    main()
