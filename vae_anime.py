# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "pandas==3.1.1", "matplotlib==3.11.2",
#                 "tqdm==4.70.1", "pillow==13.0.0", "filelock==4.2.12"]
# ///
"""Learn colour images of anime faces with a variational autoencoder of Gaussian pixels.

The encoder turns an image x into q(z|x), a Gaussian over codes z; the decoder turns a code into
p(x|z). Both raise a lower bound of the log likelihood (Kingma and Welling 2014, eq. 3):

    log p(x) >= E q(z|x) [log p(x|z)] - KL(q(z|x) || p(z))
    loss      = reconstruction + λ KL, in nats per image; λ = 1 is the bound

p(x|z) has one σ for all pixels, learned: at the optimum it is the root mean squared error (σ-VAE,
Rybkin et al. 2021, eq. 5). The network starts from probabilistic PCA, the best linear VAE, and
learns what is not linear. The prior p(z) is a Gaussian with learned mean and full covariance;
--prior normal makes it N(0, I).

    python vae_anime.py                      data/anime-faces.zip, else the bundled sample
    python vae_anime.py --lambda 0 1 50 100  one model a λ, side by side
    python vae_anime.py --sample 100         draw faces from the finished model
    python vae_anime.py --evaluate FILE      score it on other images

Each λ leaves figures, metrics.json and the model in runs/vae_anime/lambda-<λ>/. On 9,000 anime
faces, λ = 1: 6.216 bits/dim, 23.99 dB on test images (two cores, seed 0).
"""

import argparse
import collections
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

# Read when torch is imported: waiting threads that spin cost 2.6 times the time beside another job.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# ruff: noqa: E402
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SCRIPT, VERSION = "vae_anime", "vae_anime 2"  # the checkpoint's; count up with the network
DATA = "anime-faces.zip"
SOURCE = "The real anime-faces.zip is the course's file; put it into data/ beside the script"
SHAPE = (3, 64, 64)  # channels, rows, columns
LEVELS = 256  # every value of a byte
LATENT_DIM = 512
WIDTH = 32  # channels at 16 x 16; twice as many at 8 x 8
PRIOR_GAUSSIANS = 1  # in the learned prior; the faces come in one cloud
EPOCHS = 10
LEARNING_RATE = 1e-3
LINEAR_PACE = 0.1  # the linear maps' weights move this much slower: they start near their optimum
WARMUP = 0.0  # epochs
MAX_NORM = 5000.0  # of the gradient
ACTIVE = 0.01  # variance over images of a unit's posterior mean (Burda et al. 2016)
MAX_BYTES = 2**25  # of one image file, and of one unpacked image's pixels

# --------------------------------------------------------------------------------------------------
# data: files -> uint8 images -> batches of pixels in [0, 1]
# --------------------------------------------------------------------------------------------------


def find_data(given: Path | None) -> Path:
    """The file to read: the one given, else in data/ beside the script, else the bundled sample."""
    real, sample = HERE / "data" / DATA, HERE / "data" / "sample" / DATA
    path = given or (real if real.exists() else sample)
    if not path.exists():
        fail(f"{path}: No such file or directory. {SOURCE}, or name it with --data")
    print(f"data      {path}" + (f", the bundled sample. {SOURCE}" if path == sample else ""))
    return path


def load_images(path: Path, out: Path) -> tuple[np.ndarray, str]:
    """All PNG and JPEG images of a zip file or a folder, uint8 (N, 3, 64, 64), and their sha256.

    Decoded once and kept as <out>/images-<sha256>.npy. What cannot be read is left out, what is not
    RGB or 64 x 64 is converted, each counted in a line. Nothing is unpacked to a path.
    """
    with one_line(path, "Give a zip file or a folder of PNG or JPEG images"):
        archive = None if path.is_dir() else zipfile.ZipFile(path)
        files = archive.namelist() if archive else path.rglob("*")
        names = sorted(str(name if archive else name.relative_to(path)) for name in files)
        names = [name for name in names if name.lower().endswith((".png", ".jpg", ".jpeg"))]
        names = [name for name in names if not name.startswith("__MACOSX/")]
        if not names:
            fail(f"{path}: no PNG or JPEG image in it. Give a zip file or a folder of images")

    def read(name: str) -> bytes:
        with archive.open(name) if archive else open(path / name, "rb") as file:
            return file.read(MAX_BYTES)

    def decode(name: str) -> np.ndarray | None:
        """The image (3, 64, 64), if it can be read; anything unusual is noted."""
        try:
            with Image.open(io.BytesIO(read(name)), formats=("PNG", "JPEG")) as image:
                if image.width * image.height * 4 > MAX_BYTES or image.mode.startswith("I"):
                    raise ValueError(f"{image.size} pixels of mode {image.mode}")  # I: 16 bits
                pixels, size = image.convert("RGB"), SHAPE[:0:-1]
            if image.mode != "RGB":
                notes["are not RGB and are converted"].append(name)
            if image.size != size:
                notes[f"are not {size} and are resized"].append(name)
                pixels = pixels.resize(size, Image.Resampling.BOX)
            return np.asarray(pixels).transpose(2, 0, 1)
        except Exception as error:  # zipfile and Pillow raise what the bytes lead them into
            notes["cannot be read and are left out"].append(f"{name!r} ({error})")

    notes: dict[str, list[str]] = collections.defaultdict(list)
    digest = hashlib.sha256(path.read_bytes() if archive else b"")
    for name in [] if archive else names:
        digest.update(os.fsencode(name))
        with contextlib.suppress(OSError):
            digest.update(read(name))
    kept = out / f"images-{digest.hexdigest()}.npy"
    with one_line(kept, "Name another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / f".{kept.stem}.lock"):  # of several processes one decodes
            if not kept.exists():
                with ThreadPoolExecutor() as pool:
                    images = [image for image in pool.map(decode, names) if image is not None]
                for text, found in notes.items():
                    print(f"warning   {path}: {len(found)} images {text}, such as {min(found)}")
                if not images:
                    fail(f"{path}: none of its {len(names)} images can be read")
                write_file(kept, partial(np.save, arr=np.stack(images)))
        return np.load(kept, mmap_mode="r"), digest.hexdigest()


class Split(NamedTuple):  # uint8 images (N, C, H, W)
    train: Tensor  # for the weights
    validation: Tensor  # for a look during training
    test: Tensor  # for the end


def split_images(images: np.ndarray, seed: int, limit: int | None) -> Split:
    """Deal at most `limit` images at random: 80% for training, 10% and 10%, or 5,000 if fewer."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]
    if len(order) < 20:
        fail(f"{len(order)} images are too few to split. Give 20 or more")
    tenth = min(len(order) // 10, 5000)
    parts = order.split([tenth, tenth, len(order) - 2 * tenth])
    test, validation, train = (torch.from_numpy(images[rows.numpy()]) for rows in parts)
    return Split(train, validation, test)


def to_pixels(images: Tensor) -> Tensor:
    """Values 0 to 255 -> LEVELS evenly spaced values from 0 to 1, laid out channels last."""
    pixels = (images.float() * (LEVELS / 256)).floor() / (LEVELS - 1)
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each of the images (B, 3, 64, 64) with probability ½."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


# --------------------------------------------------------------------------------------------------
# model
# --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """silu(x + conv(silu(conv(silu(x))))), at the start silu(x) (He et al. 2016, fig. 4e)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.second(F.silu(self.first(F.silu(x)))))


def upsample(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Layers (B, inputs, H, W) -> (B, outputs, 2 H, 2 W)."""
    return nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.PixelShuffle(2)


class Encoder(nn.Module):
    """x (B, 3, 64, 64) -> mu, logvar (B, k): the best linear posterior, and what a network adds."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.register_buffer("mean_image", torch.zeros(math.prod(SHAPE)))
        self.linear = nn.Parameter(torch.zeros(math.prod(SHAPE), latent_dim))
        self.logvar = nn.Parameter(torch.zeros(latent_dim))
        quarter = nn.Conv2d(3, WIDTH, 4, 4), Residual(WIDTH)  # (B, WIDTH, 16, 16)
        eighth = nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1), Residual(2 * WIDTH)  # (B, 2 WIDTH, 8, 8)
        codes = nn.Flatten(), nn.Linear(2 * WIDTH * 64, 2 * latent_dim)
        self.network = nn.Sequential(*quarter, *eighth, *codes)
        nn.init.zeros_(self.network[-1].weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.network(x - 0.5).chunk(2, 1)
        linear = (x.flatten(1) - self.mean_image) * LINEAR_PACE @ self.linear
        return mu + linear, logvar + self.logvar


class Decoder(nn.Module):
    """z (B, k) -> the pixels' mean (B, 3, 64, 64), linear in z at the start, and log σ ()."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.register_buffer("mean_image", torch.zeros(math.prod(SHAPE)))
        self.linear = nn.Parameter(torch.zeros(latent_dim, math.prod(SHAPE)))
        self.log_sigma = nn.Parameter(torch.zeros(()))
        eighth = nn.Linear(latent_dim, 2 * WIDTH * 64), nn.Unflatten(1, (2 * WIDTH, 8, 8))
        quarter = Residual(2 * WIDTH), *upsample(2 * WIDTH, WIDTH)  # (B, WIDTH, 16, 16)
        half = Residual(WIDTH), *upsample(WIDTH, WIDTH // 2), nn.SiLU()  # (B, WIDTH / 2, 32, 32)
        self.network = nn.Sequential(*eighth, *quarter, *half, *upsample(WIDTH // 2, 3))
        nn.init.zeros_(self.network[-2].weight)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z * LINEAR_PACE @ self.linear + self.mean_image  # (B, D)
        return flat.view(-1, *SHAPE) + self.network(z), self.log_sigma


@torch.no_grad()
def initialize(model: nn.Module, images: Tensor, kl_weight: float) -> None:
    """Set the linear maps and σ to the best linear VAE of at most 8,192 images at this λ.

    At λ = 1 that is probabilistic PCA (Tipping and Bishop 1999, eqs. 7 and 8). At any λ it is
    reverse water-filling (Cover and Thomas 2006, theorem 10.3.3): the error left along a direction
    is its variance or λσ², whichever is less, and Dσ² is the sum of these errors.
    """
    chosen = torch.randperm(len(images), generator=seed_all(len(images)))[:8192]
    x = torch.cat([to_pixels(images[rows]).flatten(1) for rows in chosen.split(256)])  # (n, D)
    mean_image = x.mean(0)
    x -= mean_image
    k, total = len(model.encoder.logvar), sum(part.square().sum() for part in x.split(256)) / len(x)
    found = min(k, len(x) // 2)  # more would fit few images to the last pixel, with no σ left
    _, s, directions = torch.svd_lowrank(x, min(found + 32, *x.shape), niter=2)
    directions = F.pad(directions.T[:found], (0, 0, 0, k - found))  # (k, D)
    variances = F.pad(s[:found].square() / len(x), (0, k - found))  # (k,) of the data along them
    rest = total - variances.sum()
    square = rest / x.shape[1]  # σ²: grows from the least that it can be
    for _ in range(1000):
        lost = variances.clamp(max=kl_weight * square).sum()
        square = ((rest + lost) / x.shape[1]).clamp_min(1e-6)
    noise = (kl_weight * square).clamp_min(1e-6)
    variances = variances.maximum(noise)
    maps = directions * ((variances - noise).sqrt() / LINEAR_PACE)[:, None]
    model.encoder.linear.copy_((maps / variances[:, None]).T)
    model.encoder.logvar.copy_((noise / variances).log())
    model.decoder.linear.copy_(maps)
    model.decoder.log_sigma.copy_(0.5 * square.log())
    for part in (model.encoder, model.decoder):
        part.mean_image.copy_(mean_image)


class Prior(NamedTuple):
    """p(z) = Σ w N(m, (AᵀA)⁻¹) over K Gaussians; each A is lower triangular, its diagonal > 0."""

    log_weights: Tensor  # (K,)
    mean: Tensor  # (K, k)
    A: Tensor  # (K, k, k)

    def distribution(self) -> MixtureSameFamily:
        gaussians = MultivariateNormal(self.mean, scale_tril=torch.linalg.inv(self.A).tril())
        return MixtureSameFamily(Categorical(logits=self.log_weights), gaussians)


class VAE(nn.Module):
    """q(z|x) = N(μ(x), diag σ²(x)), p(x|z), and p(z): learned, or N(0, I)."""

    def __init__(self, latent_dim: int, learned_prior: bool):
        super().__init__()
        self.encoder, self.decoder = Encoder(latent_dim), Decoder(latent_dim)
        count = PRIOR_GAUSSIANS if learned_prior else 1
        learned = partial(nn.Parameter, requires_grad=learned_prior)
        means = torch.randn(count, latent_dim) if count > 1 else torch.zeros(1, latent_dim)
        self.prior_logits, self.prior_mean = learned(torch.zeros(count)), learned(means)
        self.prior_factor = learned(torch.zeros(count, latent_dim, latent_dim))  # A, log diagonal
        self.to(memory_format=torch.channels_last)

    def prior(self) -> Prior:
        diagonal = self.prior_factor.diagonal(dim1=1, dim2=2).exp()
        A = self.prior_factor.tril(-1) + diagonal.diag_embed()
        return Prior(self.prior_logits.log_softmax(0), self.prior_mean, A)

    @torch.no_grad()
    def set_prior(self, prior: Prior) -> None:
        diagonal = prior.A.diagonal(dim1=1, dim2=2).log()
        self.prior_logits.copy_(prior.log_weights)
        self.prior_mean.copy_(prior.mean)
        self.prior_factor.copy_(prior.A.tril(-1) + diagonal.diag_embed())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) in [0, 1] -> mu and logvar of q(z|x), (B, k) each, in float32."""
        mu, logvar = self.encoder(x)
        return mu.float(), logvar.float().clamp(-20.0, 10.0)  # at λ = 0 nothing else keeps σ from 0

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction -log p(x|z) and KL, (B,) each; z comes from `noise` (B, k)."""
        with autocast(x.device):
            mu, logvar = self.encode(x)
            params = self.decoder(reparameterize(mu, logvar, noise))
        return -log_prob(params, x), kl_divergence(mu, logvar, self.prior())


# --------------------------------------------------------------------------------------------------
# objective (nats per image)
# --------------------------------------------------------------------------------------------------


BITS_OFFSET = 8.0  # log2 256, as is custom; 255 steps lie between the levels: exactly .006 less


def log_prob(params: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """log p(x|z), Gaussian (eq. 12): (mean, log σ) and x (B, 3, 64, 64) -> (B,)."""
    center, log_sigma = params[0].float(), params[1].float()
    square = (center - x).square().flatten(1).sum(1) * (-2 * log_sigma).exp()
    return -0.5 * square - math.prod(SHAPE) * (log_sigma + 0.5 * math.log(2 * math.pi))


def mean(params: tuple[Tensor, Tensor]) -> Tensor:
    """E[x|z]."""
    return params[0].float()


def reparameterize(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = μ + σ ε, a draw from q(z|x) that gradients pass (Kingma and Welling 2014, 2.4)."""
    return mu + (0.5 * logvar).exp() * noise


def kl_to_each(mu: Tensor, logvar: Tensor, prior: Prior) -> Tensor:
    """KL(N(μ, diag σ²) ‖ each Gaussian of the prior), (B, k) -> (B, K).

    ½ (‖A (μ - m)‖² + tr(A diag σ² Aᵀ) - k - Σ ln σ²) - ln det A; to N(0, I) as in Kingma and
    Welling's appendix B.
    """
    offset = mu[:, None] - prior.mean  # (B, K, k)
    distance = torch.einsum("bjd,jed->bje", offset, prior.A).square().sum(-1)  # (B, K)
    trace = logvar.exp() @ prior.A.square().sum(1).T  # (B, K)
    log_det = prior.A.diagonal(dim1=1, dim2=2).log().sum(-1)  # (K,)
    return 0.5 * (distance + trace - mu.shape[1] - logvar.sum(-1, keepdim=True)) - log_det


def kl_divergence(mu: Tensor, logvar: Tensor, prior: Prior) -> Tensor:
    """KL(N(μ, diag σ²) ‖ p(z)), (B, k) -> (B,); to a mixture an upper bound, so the ELBO holds.

    It is -ln Σ w exp(-KL to each), since ln Σ exp is convex (Jensen's inequality).
    """
    return -(prior.log_weights - kl_to_each(mu, logvar, prior)).logsumexp(1)


@torch.no_grad()
def fit_prior(prior: Prior, mu: Tensor, logvar: Tensor) -> Prior:
    """The prior of least mean KL from N posteriors (N, k), by EM (Dempster et al. 1977).

    A posterior belongs to a Gaussian by the share r = softmax(ln w - KL to each). Then w is the
    mean of r, m that of μ and the covariance that of σ² + (μ - m)², weighted by r. It moves towards
    the mean covariance as by 20 posteriors of it: one with few of its own keeps its breadth.
    """
    prior, last_kl = Prior(*(part.to(mu) for part in prior)), math.inf
    for _ in range(30):
        batches = zip(mu.split(250), logvar.split(250), strict=True)
        joint = torch.cat([prior.log_weights - kl_to_each(*batch, prior) for batch in batches])
        kl = -joint.logsumexp(1).mean().item()
        if not last_kl - kl > 0.01:  # nats
            break
        last_kl, share = kl, joint.softmax(1)  # (N, K)
        size = share.sum(0) + 1e-9  # (K,)
        weights, m = size / size.sum(), share.T @ mu / size[:, None]
        covariance = (share.T @ logvar.exp() / size[:, None]).diag_embed()  # (K, k, k)
        for j, r in enumerate(share.T):
            covariance[j] += ((mu - m[j]) * r[:, None]).T @ (mu - m[j]) / size[j]
        common = torch.einsum("j,jde->de", weights, covariance)
        covariance = covariance.lerp(common, (20 / (20 + size))[:, None, None])
        root, singular = torch.linalg.cholesky_ex(covariance)
        if singular.any():  # near λ = 0 codes lie too far apart for double precision
            break
        prior = Prior(weights.log(), m, torch.linalg.inv(root).tril())
    return prior


def whitening(prior: Prior) -> tuple[Tensor, Tensor]:
    """m (k,) and A (k, k) such that u = A (z - m) has mean 0 and covariance I under p(z)."""
    weights, roots = prior.log_weights.exp(), torch.linalg.inv(prior.A)  # (K,), (K, k, k)
    m = weights @ prior.mean
    offset = (prior.mean - m) * weights[:, None].sqrt()
    covariance = torch.einsum("j,jde,jfe->df", weights, roots, roots) + offset.T @ offset
    return m, torch.linalg.inv(torch.linalg.cholesky(covariance))


@torch.no_grad()
def iwae_bound(model: VAE, x: Tensor, samples: int) -> Tensor:
    """log 1/K Σ p(x|z) p(z) / q(z|x) of an image (1, C, H, W) (Burda et al. 2016, eq. 8)."""
    mu, logvar = model.encode(x)
    q, p, log_weights = Normal(mu, (0.5 * logvar).exp()), model.prior().distribution(), []
    for first in range(0, samples, 256):  # so many decoded images fit any memory
        z = q.sample((min(256, samples - first),)).flatten(0, 1)
        log_weights.append(log_prob(model.decoder(z), x) + p.log_prob(z) - q.log_prob(z).sum(1))
    return torch.cat(log_weights).logsumexp(0) - math.log(samples)


# --------------------------------------------------------------------------------------------------
# train and evaluate
# --------------------------------------------------------------------------------------------------


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, world size): (0, 1) alone, else of the group that torchrun started."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


@torch.no_grad()
def move_average(average: VAE, model: VAE, share: float) -> None:
    """Move the average of the weights, over the last thousand steps, towards the model's."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)


def losses(name: str, reconstruction: float, kl: float, kl_weight: float) -> dict[str, float]:
    values = {"loss": reconstruction + kl_weight * kl, "reconstruction": reconstruction, "kl": kl}
    return {f"{name}_{key}": value for key, value in values.items()}


def train(
    model: VAE, images: Split, args: Namespace, state: dict, save: Callable, bar: tqdm
) -> VAE:
    """Minimise reconstruction + λ KL, on from `state`; return the average of the weights."""
    device = model.prior_mean.device
    rank, world = start_processes(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, args.lr, (0.9, 0.99), fused=device.type != "mps")
    average = copy.deepcopy(model)  # of the weights: what is scored and kept
    if state["epoch"]:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    per_epoch = len(images.train) // args.batch_size  # a last batch that is not full is left out
    for epoch in range(state["epoch"], args.epochs):
        order = torch.randperm(len(images.train), generator=seed_all(args.seed, epoch))
        sums = torch.zeros(2, device=device)  # reconstruction, KL
        for step, batch in enumerate(order.split(args.batch_size)[:per_epoch], epoch * per_epoch):
            generator = seed_all(args.seed, epoch, step)
            noise = torch.randn(len(batch), args.latent_dim, generator=generator)
            x = to_pixels(augment(images.train[batch], generator)[rank::world].to(device))

            terms = parallel(x, noise[rank::world].to(device))
            reconstruction, kl = (term.mean() for term in terms)
            weight = args.kl_weight * min(1.0, step / max(1.0, args.warmup * per_epoch))
            optimizer.zero_grad()
            (reconstruction + weight * kl).backward()
            norm = nn.utils.clip_grad_norm_(learned, MAX_NORM)
            if not math.isfinite(reconstruction.item() + kl.item() + norm.item()):
                place = f"epoch {epoch + 1}, step {step + 1}"
                fail(f"no finite loss in {place}. Lower --lr (now {args.lr:g})")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.epochs * per_epoch, args.lr)
            optimizer.step()
            move_average(average, model, 1 - min(0.999, (1 + step) / (10 + step)))
            sums += torch.stack([reconstruction, kl]).detach()
            bar.step()
        if world > 1:
            dist.all_reduce(sums)
        held_out = evaluate(average, images.validation, args.seed)
        if not math.isfinite(held_out["neg_elbo"]):
            fail(f"no finite loss after epoch {epoch + 1}. Lower --lr (now {args.lr:g})")
        row = {"epoch": epoch + 1, "kl_weight": weight}
        row |= losses("train", *(sums / (world * per_epoch)).tolist(), weight)
        row |= losses("validation", held_out["reconstruction"], held_out["kl"], weight)
        state |= {"epoch": epoch + 1, "history": [*state["history"], row]}
        state |= {"model": model.state_dict(), "average": average.state_dict()}
        save(state | {"optimizer": optimizer.state_dict()})
    return average.eval()


@torch.no_grad()
def refit_prior(model: VAE, images: Split, seed: int) -> VAE:
    """Fit the prior to the codes, if that helps validation: gradients may leave it nats away."""
    chosen = torch.randperm(len(images.train), generator=seed_all(len(images.train)))[:8192]
    parts = (images.train[rows].to(model.prior_mean.device) for rows in chosen.split(250))
    posteriors = zip(*(model.encode(to_pixels(part)) for part in parts), strict=True)
    mu, logvar = (torch.cat(part).cpu().double() for part in posteriors)
    fitted = copy.deepcopy(model)
    fitted.set_prior(fit_prior(model.prior(), mu, logvar))
    before, after = (evaluate(m, images.validation, seed)["kl"] for m in (model, fitted))
    return fitted if after < before else model


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, seed: int) -> dict:
    """Score uint8 images (N, C, H, W): means in nats, the pooled squared error, each posterior.

    The error is that of the mean of p(x|z) with z drawn from q(z|x), not put at its mean.
    """
    device, generator, rows = model.prior_mean.device, seed_all(seed), []
    for batch in images.split(250):
        x = to_pixels(batch.to(device))
        mu, logvar = model.encode(x)
        z = reparameterize(mu, logvar, torch.randn(mu.shape, generator=generator).to(device))
        params = model.decoder(z)
        again, kl = mean(params).clamp(0, 1), kl_divergence(mu, logvar, model.prior())
        error = (again - x).square().flatten(1).mean(1)
        rows.append((-log_prob(params, x), kl, error, mu, logvar, to_bytes(again)))
    columns = [torch.cat(column).cpu() for column in zip(*rows, strict=True)]
    reconstruction, kl, error = (column.double().mean().item() for column in columns[:3])
    scores = {"neg_elbo": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}
    bits = (reconstruction + kl) / (math.prod(SHAPE) * math.log(2)) + BITS_OFFSET
    scores |= {"bits_per_dim": bits, "psnr_db": -10 * math.log10(max(error, 1e-12))}
    return scores | dict(zip(("mu", "logvar", "reconstructed"), columns[3:], strict=True))


def describe_posterior(model: VAE, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances (N, k) of q(u|x), in coordinates u of mean 0, covariance I under p."""
    m, A = whitening(Prior(*(part.detach().cpu().double() for part in model.prior())))
    return (mu.double() - m) @ A.T, logvar.double().exp() @ A.square().T


def score(model: VAE, images: Tensor, order: Tensor, args: Namespace) -> tuple[dict, dict]:
    """What metrics.json says of `images`, the bound of the first in `order`; each one's scores."""
    scores, device = evaluate(model, images, args.seed), model.prior_mean.device
    metrics = {name: value for name, value in scores.items() if not torch.is_tensor(value)}
    seed_all(args.seed, args.iwae)
    chosen = to_pixels(images[order[: args.iwae_images]].to(device)).split(1)
    bounds = [iwae_bound(model, x, args.iwae).item() for x in chosen]
    metrics |= {
        "iwae": -np.mean(bounds).item(),
        "iwae_samples": args.iwae,
        "iwae_images": len(bounds),
    }
    mean_u, _ = describe_posterior(model, scores["mu"], scores["logvar"])
    metrics["active_units"] = int((mean_u.var(0, correction=0) > ACTIVE).sum())
    weights = [p for p in model.parameters() if p.requires_grad]
    metrics |= {"latent_dim": mean_u.shape[1], "parameters": sum(p.numel() for p in weights)}
    return metrics, scores


# --------------------------------------------------------------------------------------------------
# figures
# --------------------------------------------------------------------------------------------------


def to_bytes(images: Tensor) -> Tensor:
    """Values in [0, 1], (N, C, H, W) -> uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().byte().cpu()


@torch.no_grad()
def decode_mean(model: VAE, z: Tensor) -> Tensor:
    """The mean of p(x|z) as uint8 images."""
    parts = z.to(model.prior_mean).split(250)
    return torch.cat([to_bytes(mean(model.decoder(part))) for part in parts])


@torch.no_grad()
def draw_samples(model: VAE, count: int, seed: int) -> Tensor:
    """The mean of p(x|z) for z from the prior, uint8 (count, C, H, W)."""
    prior = Prior(*(part.cpu().double() for part in model.prior()))
    seed_all(seed, count)
    return decode_mean(model, prior.distribution().sample((count,)))


def interpolate(model: VAE, mu: Tensor, rows: int, steps: int = 10) -> Tensor:
    """Decode the straight lines from mu[0] to mu[1], mu[2] to mu[3], …: (rows * steps, C, H, W)."""
    share = torch.linspace(0, 1, steps)[:, None]  # (steps, 1)
    first, last = mu[: 2 * rows].unflatten(0, (rows, 2, 1)).unbind(1)  # (rows, 1, k)
    return decode_mean(model, ((1 - share) * first + share * last).flatten(0, 1))


def tile(images: Tensor, columns: int) -> np.ndarray:
    """uint8 images (N, C, H, W) -> one RGB image, `columns` beside each other, white between."""
    images = F.pad(images.expand(-1, 3, -1, -1), (1, 1, 1, 1), value=255)
    images = F.pad(images, (0,) * 7 + (-len(images) % columns,), value=255)
    rows = [torch.cat(list(row), -1) for row in images.split(columns)]
    return torch.cat(rows, -2).permute(1, 2, 0).numpy()


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


def plot_images(folder: Path, model: VAE, test: Tensor, scores: dict, args: Namespace) -> None:
    """Reconstructions, samples and interpolations."""
    real, again, rows = to_bytes(to_pixels(test)), scores["reconstructed"], min(8, len(test) // 2)
    with panels(folder / "reconstructions.png", 2) as (left, right):
        show(left, tile(real[:64], 8), f"real, λ = {args.kl_weight:g}")
        show(right, tile(again[:64], 8), "reconstructed")
    with panels(folder / "samples.png", 1) as [panel]:
        draws = draw_samples(model, 100, args.seed)
        show(panel, tile(draws, 10), f"mean of p(x|z), z from the {args.prior} prior")
    with panels(folder / "interpolation.png", 1) as [panel]:
        ends = real[: 2 * rows].unflatten(0, (rows, 2))
        between = interpolate(model, scores["mu"], rows).unflatten(0, (rows, -1))
        lines = torch.cat([ends[:, :1], between, ends[:, 1:]], 1).flatten(0, 1)
        show(panel, tile(lines, 12), "real | from one code to the other | real")


def plot_posterior(folder: Path, model: VAE, test: Tensor, scores: dict, args: Namespace) -> None:
    """One image's q(u|x), and which dimensions are used, for how many nats."""
    mean_u, var_u = describe_posterior(model, scores["mu"], scores["logvar"])
    i = args.image % len(test)
    pair = torch.stack([to_bytes(to_pixels(test[i : i + 1]))[0], scores["reconstructed"][i]])
    order, count = var_u[i].argsort(), range(mean_u.shape[1])
    with panels(folder / "posterior.png", 3) as (images, means, variances):
        show(images, tile(pair, 2), f"test image {i} | reconstructed, λ = {args.kl_weight:g}")
        means.bar(count, mean_u[i, order].numpy(), width=1.0)
        means.set(xlabel="dimension of u, by variance", ylabel="mean of q(u|x)", ylim=(-5, 5))
        variances.bar(count, var_u[i, order].numpy(), width=1.0)
        variances.set(xlabel="dimension of u", ylabel="variance", yscale="log", ylim=(1e-9, 10))
        for panel, prior in ((means, 0), (variances, 1)):
            panel.axhline(prior, color="tab:red", linewidth=1, label=f"prior: {prior}")
            panel.legend(loc="lower right")
    spread = mean_u.var(0, correction=0)
    nats = 0.5 * (mean_u.square() + var_u - 1 - var_u.log()).mean(0)
    with panels(folder / "posterior-collapse.png", 2) as (left, right):
        left.semilogy(spread.sort(descending=True).values.clamp_min(1e-8))
        left.axhline(ACTIVE, color="tab:red", linewidth=1)
        left.set_title(f"{int((spread > ACTIVE).sum())} of {len(spread)} active, above {ACTIVE}")
        left.set(xlabel="dimension of u, sorted", ylabel="variance over images of E[u|x]")
        right.plot(nats.sort(descending=True).values)
        right.set(xlabel="dimension of u, sorted", ylabel="KL of the marginal (nats)")


def plot_learning_curve(path: Path, history: pd.DataFrame, kl_weight: float) -> None:
    """Training (changed images, the step's own weights) and validation, by epoch."""
    titles = {"loss": f"loss, λ = {kl_weight:g}", "reconstruction": "-log p(x|z)", "kl": "KL"}
    with panels(path, 3) as axes:
        for panel, (key, title) in zip(axes, titles.items(), strict=True):
            names = {f"train_{key}": "training", f"validation_{key}": "validation"}
            curves = history.set_index("epoch")[[*names]].rename(columns=names)
            late = curves[len(curves) // 20 :].to_numpy()  # the first epochs would flatten the rest
            margin = 0.05 * (late.max() - late.min()) + 1e-6
            limits = (late.min() - margin, late.max() + margin)
            curves.plot(ax=panel, style=".-", title=title, ylabel="nats per image", ylim=limits)


def plot_sweep(out: Path, folders: list[Path], table: pd.DataFrame) -> None:
    """The figures of each λ in a column, and rate against distortion with a point for each."""
    rows = []
    for name in ("reconstructions", "samples", "interpolation", "posterior", "learning-curve"):
        pictures = [Image.open(folder / f"{name}.png").convert("RGB") for folder in folders]
        height = 800 * pictures[0].height // pictures[0].width
        rows.append(np.hstack([picture.resize((800, height)) for picture in pictures]))
    sheet = Image.fromarray(np.vstack(rows))
    write_file(out / "lambda-sheet.png", partial(sheet.save, format="png"))
    with panels(out / "rate-distortion.png", 1) as [panel]:
        panel.plot(table["kl"], table["reconstruction"], "o-")
        for i, row in table.iterrows():  # above and below in turn: collapsed models share a point
            shift = (5, 4 - 14 * (i % 2))
            point = (row["kl"], row["reconstruction"])
            panel.annotate(f"λ = {row['lambda']:g}", point, shift, textcoords="offset points")
        panel.set(xlabel="rate: KL (nats)", ylabel="distortion: -log p(x|z) (nats)")
        panel.set_xscale("symlog", linthresh=1.0)
        panel.margins(0.15)  # room for the names


# --------------------------------------------------------------------------------------------------
# run folder, errors, command line (the same to the letter in every script of this project)
# --------------------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """End the program over a user's mistake: one line on stderr, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line(path: Path | str, mend: str) -> Iterator[None]:
    """The one handler: what a library raises over the file `path` becomes a line that names it."""
    try:
        yield
    except Exception as error:  # readers raise whatever the bytes lead them into
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fail(f"{path}: {reason[:300].rstrip('.')}. {mend}")


def check_ranges(args: argparse.Namespace, ranges: dict[str, tuple[float, float]]) -> None:
    """End the program unless each argument lies between its two ends, which it may take."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # nan lies nowhere
            fail(f"--{name.replace('_', '-')} {value}: give a number from {low:g} to {high:g}")


def exit_on_signals(argv: list[str] | None) -> None:
    """Let Ctrl-C and SIGTERM end the process at once, with the command that goes on from there."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    several = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    start = several if "RANK" in os.environ else ["python"]

    def stop(number: int, frame) -> None:
        print("\nstopped   go on with:", shlex.join([*start, sys.argv[0], *words, "--resume"]))
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def seed_all(*numbers: int) -> torch.Generator:
    """Seed torch by the place in the run, such as (seed, epoch, step); return a generator too."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


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


class Progress(tqdm):
    """One bar for the whole run, and after 30 batches a line that says how long it will take."""

    def __init__(self, total: int, done: int, quiet: bool = False):
        super().__init__(total=total, initial=done, unit="batch", disable=quiet or None)
        self.left, self.moments = total - done, []

    def step(self) -> None:
        self.update()
        self.moments.append(time.monotonic())
        if len(self.moments) == 30:  # the first ten are slow
            minutes = (self.moments[29] - self.moments[9]) / 20 * self.left / 60
            self.write(f"time      about {minutes:.1f} minutes for {self.left} batches")


def write_file(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Let `save` fill a buffer, and move it to `path` when it is all on disk: never half a file."""
    content, temporary = io.BytesIO(), path.with_name(f".{path.name}.tmp")
    save(content)
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # so that not even a power cut leaves half of it
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror}). Make room, then add --resume")
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2, default=str) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def open_run(folder: Path, args: argparse.Namespace, hashes: dict[str, str]) -> Iterator[None]:
    """Hold the run's folder while the block lasts; a run that starts over keeps the old one."""
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0)
    previous = folder.parent / f"{folder.name}.previous"
    used = [p for p in (folder, previous) if p.is_dir() and {*p.iterdir()} - {*p.glob(".*.tmp")}]
    if folder.name in ("", "..") or not all((p / "config.json").exists() for p in used):
        fail(f"{folder}, or {previous.name}: not the folder of a run. Name another with --out")
    with one_line(folder, "Wait for the other run, or name another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if not args.resume and (folder / "checkpoint.pt").exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            folder.mkdir()
        for stale in folder.glob(".*.tmp"):
            stale.unlink()
    commit = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    git = subprocess.run(commit, capture_output=True, text=True) if shutil.which("git") else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts = {"sha256": hashes, "seed": args.seed, "commit": git and git.stdout.strip()}
    try:
        write_json(folder / "config.json", {"arguments": vars(args), "versions": versions} | facts)
        yield
    finally:
        lock.release()


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
            fail(f"{path}: trained with {name} {there}, not {value}. Give the same, or no --resume")
    return state


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to 0."""
    warmup = max(1, steps // 10)
    decay = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * decay))


# fmt: off
def parse_args(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = fail
    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, metavar="PATH", help=f"{DATA}, or of faces a folder of images")
    add("--out", type=Path, default=Path("runs") / SCRIPT, help="folder of the run [%(default)s]")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--evaluate", type=Path, metavar="FILE", help="score the finished model on images of FILE")
    add("--sample", type=int, metavar="N", help="draw N images from the finished model")
    add("--seed", type=int, default=0, help="of split, weights, batches, noise [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[%(default)s]")
    add("--limit", type=int, metavar="N", help="use N random images only, for a first look")
    add = parser.add_argument_group("model and objective").add_argument
    add("--lambda", type=float, nargs="+", default=[1.0], dest="kl_weight", metavar="λ",
        help="weight of the KL; several train one model each and compare them [1]")
    add("--warmup", type=float, default=WARMUP, help="epochs that λ grows from 0 in [%(default)s]")
    add("--prior", choices=("learned", "normal"), default="learned", help="p(z) [%(default)s]")
    add("--latent-dim", type=int, default=LATENT_DIM, help="dimensions of z [%(default)s]")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=EPOCHS, help="passes over the images [%(default)s]")
    add("--batch-size", type=int, default=32, help="images, over all processes [%(default)s]")
    add("--lr", type=float, default=LEARNING_RATE, help="peak rate of Adam [%(default)s]")
    add = parser.add_argument_group("scores and figures").add_argument
    add("--image", type=int, default=0, help="test image of posterior.png [%(default)s]")
    add("--iwae", type=int, default=64, help="samples for the IWAE bound [%(default)s]")
    add("--iwae-images", type=int, default=100, help="images that it is taken of [%(default)s]")
    args = parser.parse_args(argv)
    least = {"epochs": 1, "batch_size": 1, "latent_dim": 1, "limit": 1, "sample": 1, "iwae": 1,
             "iwae_images": 1, "image": 0, "warmup": 0, "lr": 1e-12, "seed": 0}
    check_ranges(args, {name: (low, 2**32 - 1) for name, low in least.items()})
    for value in args.kl_weight:
        check_ranges(Namespace(**{"lambda": value}), {"lambda": (0, 1e9)})
    names = [f"{value:g}" for value in args.kl_weight]  # the folders': six digits
    if len(set(names)) < len(names):
        fail(f"--lambda {' '.join(names)}: a value stands there twice")
    if bool(args.evaluate) + bool(args.sample) + (len(names) > 1) > 1:
        fail("give only one of --evaluate, --sample and several --lambda")
    return args
# fmt: on


def load_finished(folder: Path, device: torch.device) -> tuple[VAE, dict]:
    """The model of the finished run in `folder`, and its settings."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        fail(f"{folder}: no run there. Train first, or name its folder with --out and --lambda")
    state = load_checkpoint(path, VERSION, {})
    if "metrics" not in state:
        fail(f"{folder}: its run is not finished. Go on with it: --resume")
    with one_line(path, "Train again without --resume"):
        model = VAE(state["settings"]["latent_dim"], state["settings"]["prior"] == "learned")
        model.load_state_dict(state["average"])
        return model.eval().to(device), state["settings"]


def use_finished(args: Namespace) -> dict:
    """Draw --sample images from the finished model, or score it on every image of --evaluate."""
    folder, began = args.folder, time.monotonic()
    model, _ = load_finished(folder, pick_device(args.device))
    metrics = {"samples": args.sample}
    if args.sample:
        arrays = {"image": draw_samples(model, args.sample, args.seed)}
        picture = Image.fromarray(tile(arrays["image"], math.ceil(math.sqrt(args.sample))))
        write_file(folder / f"samples-{args.sample}.png", partial(picture.save, format="png"))
    else:
        images = torch.from_numpy(np.array(load_images(args.evaluate, args.out)[0]))
        order = torch.randperm(len(images), generator=seed_all(args.seed))  # it may be sorted
        metrics, scores = score(model, images, order, args)
        metrics |= {"images": len(images), "seconds": time.monotonic() - began}
        arrays = {"image": images, "reconstruction": scores["reconstructed"]}
    # (N, C, H, W) -> (N, H, W) for grey, (N, H, W, 3) for colour
    arrays = {name: x.permute(0, 2, 3, 1).squeeze(-1).numpy() for name, x in arrays.items()}
    path = folder / ("samples.npz" if args.sample else "reconstructions.npz")
    write_file(path, partial(np.savez_compressed, **arrays))
    print(f"wrote     {path}")
    print(json.dumps(metrics))
    return metrics


def load_saved(args: Namespace, sha256: str, take_finished: bool) -> dict:
    """The state to go on from: --resume's, a finished one that a sweep takes, or a new one."""
    names = ("warmup", "prior", "latent_dim", "epochs", "batch_size", "lr", "seed", "limit")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"lambda": args.kl_weight, "sha256": sha256}
    path = args.folder / "checkpoint.pt"
    if path.exists() and (args.resume or take_finished):
        state = load_checkpoint(path, VERSION, settings if args.resume else {})
        if args.resume or ("metrics" in state and state["settings"] == settings):
            return state
    return {"version": VERSION, "settings": settings, "history": [], "epoch": 0, "seconds": 0.0}


def run(args: Namespace, images: Split, state: dict, bar: tqdm) -> dict:
    """Train at one λ, score the test images, and leave everything in <out>/lambda-<λ>/."""
    device, folder, earlier = pick_device(args.device), args.folder, state["seconds"]
    (rank, _), began = start_processes(device), time.monotonic()

    def save(state: dict) -> None:
        state["seconds"] = earlier + time.monotonic() - began
        if rank == 0:
            write_file(folder / "checkpoint.pt", partial(torch.save, state))

    hashes = {"data": state["settings"]["sha256"]}
    with open_run(folder, args, hashes) if rank == 0 else contextlib.nullcontext():
        seed_all(args.seed)
        model = VAE(args.latent_dim, args.prior == "learned")
        if not state["epoch"]:
            initialize(model, images.train, args.kl_weight)
        model = train(model.to(device), images, args, state, save, bar)
        if args.kl_weight > 0 and args.prior == "learned":
            model = refit_prior(model, images, args.seed)
        count = len(images.test)  # of training images too: as many are enough
        metrics, scores = score(model, images.test, torch.arange(count), args)
        parts = [evaluate(model, part[:count], args.seed) for part in images[:2]] + [scores]
        for key in ("neg_elbo", "reconstruction", "kl"):
            values = [part[key] for part in parts]
            metrics[key] = dict(zip(Split._fields, values, strict=True))
        metrics |= {"lambda": args.kl_weight, "epochs": args.epochs}
        metrics |= {"seconds": earlier + time.monotonic() - began}
        if rank == 0:
            history = pd.DataFrame(state["history"])
            write_file(folder / "history.csv", partial(history.to_csv, index=False, mode="wb"))
            plot_learning_curve(folder / "learning-curve.png", history, args.kl_weight)
            plot_images(folder, model, images.test, scores, args)
            plot_posterior(folder, model, images.test, scores, args)
        state |= {"model": None, "optimizer": None}
        save(state | {"average": model.state_dict(), "metrics": metrics})
    return metrics


def train_all(runs: list[Namespace]) -> dict:
    """Train one model a λ; return the metrics of the one, or of several by λ."""
    args, metrics = runs[0], []
    rank, world = start_processes(pick_device(args.device))
    pixels, sha256 = load_images(find_data(args.data), args.out)
    images = split_images(pixels, args.seed, args.limit)
    print(f"images    {', '.join(f'{len(v)} {k}' for k, v in images._asdict().items())}")
    if args.batch_size % world:
        fail(f"--batch-size {args.batch_size}: give a multiple of the {world} processes")
    for one in runs:
        one.batch_size = min(args.batch_size, len(images.train))
    states = [load_saved(one, sha256, len(runs) > 1) for one in runs]
    if world > 1:
        dist.barrier()  # until all have read what the first one may move away
    per_epoch = len(images.train) // args.batch_size
    total, done = len(runs) * args.epochs, sum(state["epoch"] for state in states)
    with Progress(total * per_epoch, done * per_epoch, quiet=rank != 0) as bar:
        for one, state in zip(runs, states, strict=True):
            metrics.append(state.get("metrics") or run(one, images, state, bar))
            bar.write(f"λ = {one.kl_weight:<6g}-ELBO {metrics[-1]['neg_elbo']['test']:.2f} nats")
            if rank == 0:
                write_json(one.folder / "metrics.json", metrics[-1])
    keys = ("reconstruction", "kl", "neg_elbo")
    table = pd.DataFrame([row | {key: row[key]["test"] for key in keys} for row in metrics])
    columns = ["lambda", *keys, "iwae", "bits_per_dim", "psnr_db", "active_units", "seconds"]
    shown = table[columns].round(3).assign(**{"lambda": table["lambda"].map("{:g}".format)})
    print(shown.to_string(index=False))
    print(f"wrote     {', '.join(str(one.folder) for one in runs)}")
    words = ["--sample", "100", "--out", str(args.out), "--lambda", f"{args.kl_weight:g}"]
    print(f"next      {shlex.join(['python', sys.argv[0], *words])}")
    if len(runs) > 1 and rank == 0:
        write_file(args.out / "sweep.csv", partial(table.to_csv, index=False, mode="wb"))
        plot_sweep(args.out, [one.folder for one in runs], table)
    by_weight = {f"{row['lambda']:g}": row for row in metrics}
    return by_weight if len(runs) > 1 else metrics[0]


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics; of a sweep, by λ."""
    if hasattr(sys.stdout, "reconfigure"):  # λ is no reason to stop where a terminal has none
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    exit_on_signals(argv)
    folders = {value: args.out / f"lambda-{value:g}" for value in args.kl_weight}
    runs = [Namespace(**vars(args) | {"kl_weight": v, "folder": f}) for v, f in folders.items()]
    if int(os.environ.get("RANK", 0)):  # of several processes the first one speaks
        sys.stdout = io.StringIO()
        if args.evaluate or args.sample:
            return {}  # and does alone what needs no training
    try:
        return use_finished(runs[0]) if args.evaluate or args.sample else train_all(runs)
    except RuntimeError as error:  # gloo and NCCL raise it where a connection is lost
        if not dist.is_initialized():
            raise
        fail(f"another process of this run has ended, or: {error}. Go on with --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
