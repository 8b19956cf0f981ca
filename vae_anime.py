# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.7",
#     "numpy>=1.26",
#     "pandas>=2.2",
#     "scikit-learn>=1.2",
#     "matplotlib>=3.7",
#     "tqdm>=4.66",
#     "pillow>=10",
#     "filelock>=3.12",
# ]
# ///
"""Train a variational autoencoder (VAE) with hierarchical latents on colour images of anime faces.

The encoder maps an image x to q(z|x), a Gaussian over 64 global latents z. A decoder maps z to a
coarse image. Five groups of detail latents d_1 ... d_5, four values at each of 16 x 16 positions,
then add what z cannot hold: each group has a prior p(d_i | z, d_<i), and a posterior
q(d_i | x, z, d_<i) that also sees x (Sønderby et al. 2016; Child 2021):

    p(x, d, z) = p(x|z, d) p(d_1|z) p(d_2|z, d_1) ... p(z)
    log p(x) >= E_q [log p(x|z, d)] - KL(q(z|x) || p(z)) - Σ_i E_q [KL(q(d_i|...) || p(d_i|...))]
    loss      = reconstruction + λ KL      in nats per image; at λ = 1 it is the negative ELBO

Training adds |x - coarse image|² / (2 · 0.15²) to the loss. z and its decoder learn from this term
and their KL alone, so that z holds colours and pose, and the detail latents cannot change what it
means. During training p(x|z, d) is Gaussian with σ = .055, the weight of the reconstruction rises
to 1 (`reconstruction_weight`), and p(z) is N(0, I). Afterwards

  - each spatial frequency gets the σ of its own errors (`fit_noise`), and
  - p(z) becomes a mixture of 16 Gaussians fitted to the latents of the training images, if that
    improves the ELBO of validation images (`fit_prior`).

Usage:

    python vae_anime.py                       train on data/anime-faces.zip, or the bundled sample
    python vae_anime.py --lambda 0 1 50 100   train one model per λ and compare them
    python vae_anime.py --sample 100          sample faces from the finished model
    python vae_anime.py --evaluate FILE       score the finished model on other images

Each model leaves figures, metrics.json and a checkpoint in runs/vae_anime/lambda-<λ>/. On 9,000
anime faces, λ = 1 reaches 3.76 bits/dim and 31.0 dB on test images (mean of three seeds;
eleven minutes with two CPU threads).
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # how long OpenMP threads spin before they sleep
os.environ["MPLBACKEND"] = "agg"  # what a notebook's ! command passes on may not be installed

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.distributions as D
import torch.nn.functional as F
from filelock import FileLock, Timeout
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.mixture import GaussianMixture
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

SCRIPT = Path(globals().get("__file__", "vae_anime.py")).resolve()  # a notebook has no __file__
DATA_FILE = SCRIPT.parent / "data" / "anime-faces.zip"
SAMPLE_FILE = SCRIPT.parent / "data" / "sample" / "anime-faces.zip"
CHECKPOINT_VERSION = "vae_anime 9"  # increase it whenever the network changes

# torchrun starts WORLD_SIZE processes and numbers them; a plain run is one process.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

SIZE = 64  # images are SIZE x SIZE
COLOURS = "RGB"
DIMENSIONS = 3 * SIZE * SIZE

# Network
WIDTH = 64  # channels of the network of the detail latents
DETAIL_GROUPS = 5
DETAIL_CHANNELS = 4  # of each group of detail latents
DETAIL_SIZE = SIZE // 4  # rows and columns of each group
PRIOR_COMPONENTS = 16  # at most; 64 would memorize the training latents
IMAGES_PER_COMPONENT = 450  # at least

# Noise
COARSE_SIGMA = 0.15  # of the coarse image's own likelihood; a larger one asks less of z
# σ of p(x|z, d) in training. With a smaller one reconstructions are better, but the latents hold
# more detail that their prior cannot foresee, so samples are worse.
SIGMA = 0.055

# Samples of the first group of detail latents go wrong most often. So their σ is multiplied by
# temperature^5, every other σ by the temperature.
FIRST_GROUP_POWER = 5

# Optimization
ADAM_BETAS = (0.9, 0.99)
# Once a large λ has silenced the detail latents, their gradients are nearly 0. With Adam's usual ε
# of 1e-8 it would still take full steps, until the KL explodes.
ADAM_EPSILON = 1e-2
FEW_STEPS = 1000  # with fewer, images stay blurred and the run gives a hint
MAX_GRAD_NORM = 3000.0

# Evaluation
EVAL_BATCH = 250
NOISE_IMAGES = 4096  # training images whose errors give the final σ, at most
PRIOR_IMAGES = 65536  # training images that the mixture is fitted to, at most
PRIOR_LATENTS = 65536  # samples of these images' latents: four of each image, fewer of many
TERMS = ("reconstruction", "kl", "loss")  # loss = reconstruction + λ KL
ACTIVE_VARIANCE = 0.01  # a latent unit is active if its mean varies more (Burda et al. 2016)
MAX_BYTES = 2**27  # of one unpacked picture
LARGE_PHOTO = 2**24  # pixels
MAX_PIXELS = 50_000_000  # of one picture, once it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# What zipfile, Pillow and torch raise over a file that is missing or damaged
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    SyntaxError,
    RuntimeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
    pickle.UnpicklingError,
)


# Same in all four scripts
class UserError(Exception):
    """A mistake that the user can fix. `main` prints it as one line, without a traceback."""


@dataclass(frozen=True)
class Config:
    """The settings of one model; each is explained at its flag in `parse_args`."""

    kl_weight: float = 1.0  # λ
    latent_dim: int = 64
    prior: str = "learned"
    epochs: int = 15
    batch_size: int = 16
    lr: float = 2e-3
    seed: int = 0
    limit: int | None = None
    fit: str = "squeeze"
    data_sha256: str = ""  # known once the data is read

    data: Path | None = None
    out: Path = Path("runs/vae_anime")
    resume: bool = False
    evaluate: Path | None = None
    sample: int | None = None
    temperature: float = 0.98
    image: int = 0
    device: str = "auto"

    @property
    def settings(self) -> dict:
        """What decides the result. A run can only be resumed with the same settings."""
        free = ("data", "out", "resume", "evaluate", "sample", "temperature", "image", "device")
        return {name: value for name, value in asdict(self).items() if name not in free}

    @property
    def folder(self) -> Path:
        return self.out / f"lambda-{self.kl_weight:g}"


# Data ---------------------------------------------------------------------------------------------
# Same in vae_mnist.py
def find_data(given: Path | None) -> Path:
    """Return the file to read: the given one, else the one in data/, else the bundled sample.

    In a folder that holds a file of the course's name, that file is meant.
    """
    path = given or (DATA_FILE if DATA_FILE.exists() else SAMPLE_FILE)
    if (path / DATA_FILE.name).is_file():
        path = path / DATA_FILE.name
    source = f"The real file is the course's; put it into {DATA_FILE}"
    if not path.exists():
        raise UserError(f"{path}: no such file. {source}, or name a file with --data")
    log(f"data      {path}" + (f", the bundled sample. {source}" if path == SAMPLE_FILE else ""))
    return path


def load_images(path: Path, fit: str = "squeeze") -> tuple[Tensor, str]:
    """Read pictures as RGB, uint8 (N, 3, 64, 64). Return them and a sha256."""
    return load_pictures(path, fit)


# Same in vae_mnist.py
def load_pictures(path: Path, fit: str) -> tuple[Tensor, str]:
    """Read the pictures of a zip file, or of a folder and the folders in it, in order of names.

    Returns uint8 (N, C, SIZE, SIZE), and the sha256 of the zip file or of the folder's pictures.
    Counts the files that cannot be read, by reason; raises UserError if none can.
    """
    pictures = []
    oblong = 0
    unread = {}  # names by reason
    try:
        files = find_files(path)
        bar = partial(tqdm, desc="reading", file=sys.stdout, leave=False, disable=RANK > 0)
        for name, open_file in bar(files, delay=2, mininterval=2):
            try:
                with open_file() as file, warnings.catch_warnings(action="ignore"):
                    picture = decode_picture(file.read(MAX_BYTES))
                pictures.append(fit_picture(picture, fit))
                oblong += picture.width != picture.height
            except READ_ERRORS as error:
                why = re.sub(r" \(.*?\)", "", reason(error)).replace(repr(name), "it")
                unread.setdefault(why, []).append(name)

        lines = []
        for why, names in unread.items():
            count = f"{len(names)} of {len(files)} files"
            some = ", ".join(map(repr, names[:5]))
            lines.append(f"{count} cannot be read, such as {some}: {why}")
        if not pictures:
            raise ValueError("; ".join(["no picture in it", *lines[:1]]))
        for line in lines:
            log(f"warning   {path}: {line}")
        if oblong:
            log(f"images    {oblong} of {len(pictures)} are not square: --fit {fit}")

        stacked = np.stack(pictures).reshape(len(pictures), SIZE, SIZE, -1)
        sha256 = hashlib.sha256(stacked).hexdigest() if path.is_dir() else sha256_of(path)
    except READ_ERRORS as error:
        advice = "Give a zip file or a folder of pictures"
        raise UserError(f"{path}: {reason(error)}. {advice}") from error
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous(), sha256


# Same in vae_mnist.py
def find_files(path: Path) -> list[tuple[str, Callable[[], BinaryIO]]]:
    """Return the name of each file in a zip file or folder, sorted, and what opens it."""
    if path.is_dir():
        files = [(str(file), partial(open, file, "rb")) for file in walk(path)]
    else:
        archive = zipfile.ZipFile(path)
        files = []
        for member in archive.infolist():  # two members may have one name
            hidden = any(is_hidden(part) for part in member.filename.split("/"))
            if not hidden and not member.is_dir():
                files.append((member.filename, partial(archive.open, member)))
    return sorted(files, key=itemgetter(0))


# Same in vae_mnist.py
def walk(path: Path) -> Iterator[Path]:
    """The files of a folder and the folders in it, linked ones too, each folder once.

    Hidden files and the figures of runs are left out.
    """
    seen = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        is_run = {"config.json", "history.csv"} <= set(names) and Path(folder) != path
        if is_run:
            log(f"images    left out {folder}, the folder of a run")
        if is_run or real in seen:
            subfolders.clear()
            continue

        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        for name in names:
            file = Path(folder, name)
            if not is_hidden(name) and name != "lambda-sheet.png" and not file.is_fifo():
                yield file


# Same in vae_mnist.py
def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is what macOS adds to a zip file."""
    return name == "__MACOSX" or (name.startswith(".") and name.strip(".") != "")


# Same in vae_mnist.py
def decode_picture(content: bytes) -> Image.Image:
    """Decode a picture, or its first frame, as a viewer shows it: upright, and on white.

    Raises one of READ_ERRORS if the bytes are none of FORMATS, damaged, or too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"none of {', '.join(FORMATS)}") from error
    if image.width * image.height > LARGE_PHOTO:
        image.draft(None, (4 * SIZE, 4 * SIZE))  # has JPEG files shrunk while they are decoded
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS} pixels")

    image.load()
    with contextlib.suppress(*READ_ERRORS):  # a damaged orientation counts as none
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("neither 8 nor 16 bits per value")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert(COLOURS)


# Same in vae_mnist.py
def fit_picture(picture: Image.Image, fit: str) -> np.ndarray:
    """Resize a picture to SIZE x SIZE, uint8: the whole of it squeezed, or its middle cropped."""
    if fit == "crop":
        return np.asarray(ImageOps.fit(picture, (SIZE, SIZE), Image.Resampling.BOX))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


def describe_blank(images: Tensor, path: Path) -> list[str]:
    """Return a warning if there are blank images. Raises UserError if there are no others."""
    values = images.flatten(1)
    blank = int((values.amin(1) == values.amax(1)).sum())
    if blank == len(images):
        raise UserError(f"{path}: each image is of one grey value. Give images of faces")
    return [f"warning   {path}: {blank} images are of one grey value"] if blank else []


# Same in vae_mnist.py
def split_images(images: Tensor, config: Config) -> dict[str, Tensor]:
    """Split at random into 10% test, 10% validation (at most 5,000 each) and the rest."""
    order = torch.randperm(len(images), generator=Generator().manual_seed(config.seed))
    order = order[: config.limit]
    if len(order) < 20:
        raise UserError(f"{len(order)} images are too few to split. Give 20 or more")

    tenth = min(len(order) // 10, 5000)
    test, validation, train = order.split([tenth, tenth, len(order) - 2 * tenth])
    return {"train": images[train], "validation": images[validation], "test": images[test]}


def to_pixels(images: Tensor) -> Tensor:
    """Values 0 to 255 -> 0.0 to 1.0."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def dequantize(x: Tensor, generator: Generator) -> Tensor:
    """Replace each of the 256 values by a random one of those that are rounded to it.

    So a density bounds the probability of the 256 values (Theis et al. 2016, section 3.1).
    """
    return x + (torch.rand(x.shape, generator=generator, device=x.device) - 0.5) / 255


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each of the images (B, 3, 64, 64) with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


# Model --------------------------------------------------------------------------------------------
# Same in vae_mnist.py
class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))); the identity at initialization (He et al. 2016, fig. 4e)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(x))
        return x + self.conv2(F.silu(h))


# Same in vae_mnist.py
class Upsample(nn.Sequential):
    """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int):
        conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
        super().__init__(conv, nn.PixelShuffle(2))


def diagonal_gaussian(mu: Tensor, logvar: Tensor) -> D.Independent:
    """N(μ, diag σ²) for each item of a batch, in float32.

    σ is kept between e^-5 and e^2.5, since the KL would be infinite at 0.
    """
    sigma = (0.5 * logvar.float().clamp(-10.0, 5.0)).exp()
    return D.Independent(D.Normal(mu.float(), sigma, validate_args=False), mu.dim() - 1)


def reparameterize(q: D.Independent, generator: Generator, temperature: float = 1.0) -> Tensor:
    """Sample z = μ + σ ε with ε ~ N(0, I), differentiable in both (Kingma and Welling, 2.4).

    `temperature` multiplies σ.
    """
    noise = torch.empty_like(q.mean).normal_(generator=generator)
    return q.mean + temperature * q.base_dist.stddev * noise


class NormalPrior(nn.Module):
    """p(z) = N(0, I)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim

    def kl(self, q: D.Independent) -> Tensor:
        """KL(q || p), (B,) (Kingma and Welling 2014, appendix B)."""
        return 0.5 * (q.mean.square() + q.variance - 1 - q.variance.log()).sum(dim=1)

    def sample(self, count: int, temperature: float, generator: Generator) -> Tensor:
        """Sample (count, k) with all standard deviations multiplied by `temperature`."""
        size = (count, self.latent_dim)
        return temperature * torch.randn(size, generator=generator, device=generator.device)


class MixturePrior(nn.Module):
    """p(z) = Σ_j w_j N(z; μ_j, L_j L_jᵀ), a mixture of K Gaussians."""

    def __init__(self, weights: Tensor, means: Tensor, scale_tril: Tensor):
        super().__init__()
        self.register_buffer("weights", weights.float())  # w, (K,)
        self.register_buffer("means", means.float())  # μ, (K, k)
        self.register_buffer("scale_tril", scale_tril.float())  # L, (K, k, k)

    def kl(self, q: D.Independent) -> Tensor:
        """An upper bound on KL(q || p), (B,), which has no closed form. The ELBO stays a bound.

        By Jensen's inequality E_q[log Σ_j w_j N_j(z)] >= log Σ_j w_j exp(E_q[log N_j(z)]), and
        E_q[log N_j(z)] = log N_j(μ) - 1/2 Σ_i P_ii σ_i², where P is the precision of N_j.
        """
        gaussians = D.MultivariateNormal(
            self.means, scale_tril=self.scale_tril, validate_args=False
        )
        precision = gaussians.precision_matrix.diagonal(dim1=1, dim2=2)  # (K, k)
        expected_log_prob = gaussians.log_prob(q.mean[:, None]) - 0.5 * q.variance @ precision.T
        cross_entropy = -(self.weights.log() + expected_log_prob).logsumexp(dim=1)
        return cross_entropy - q.entropy()

    def sample(self, count: int, temperature: float, generator: Generator) -> Tensor:
        """Sample (count, k) with all standard deviations multiplied by `temperature`."""
        j = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.empty_like(self.means[j]).normal_(generator=generator)  # (count, k)
        return self.means[j] + temperature * torch.einsum("nij,nj->ni", self.scale_tril[j], noise)


def frequencies(images: Tensor) -> Tensor:
    """The orthonormal cosine transform (DCT-II, Ahmed et al. 1974) of rows and columns.

    The three colours are transformed as well, into brightness and two differences of colour.
    """

    def basis(size: int) -> Tensor:
        """Row n is the n-th cosine, sampled at `size` positions, of length 1."""
        n = torch.arange(size, device=images.device)
        return F.normalize((math.pi / size * n.outer(n + 0.5)).cos())

    colours = torch.einsum("dc,bchw->bdhw", basis(3), images)
    return basis(SIZE) @ colours @ basis(SIZE).T


class SharedNoise(nn.Module):
    """log p(x|z, d) with the same σ for all values of all images, as in training."""

    def log_prob(self, error: Tensor) -> Tensor:
        """The log density of x - mean, (B, 3, 64, 64) -> (B,) (Kingma and Welling 2014, eq. 12)."""
        normal = D.Normal(0.0, SIGMA, validate_args=False)
        return normal.log_prob(error).flatten(1).sum(dim=1)


class FrequencyNoise(nn.Module):
    """log p(x|z, d) with a σ for each frequency of the image, fitted after training."""

    def __init__(self, sigma: Tensor):
        super().__init__()
        self.register_buffer("sigma", sigma)  # (3, 64, 64)

    def log_prob(self, error: Tensor) -> Tensor:
        """The log density of x - mean, (B, 3, 64, 64) -> (B,). The transform is orthonormal."""
        normal = D.Normal(0.0, self.sigma, validate_args=False)
        return normal.log_prob(frequencies(error)).flatten(1).sum(dim=1)


class DetailGroup(nn.Module):
    """One group of detail latents d_i, (B, DETAIL_CHANNELS, DETAIL_SIZE, DETAIL_SIZE).

    h (B, WIDTH, DETAIL_SIZE, DETAIL_SIZE) holds the features of z and of the groups above. It goes
    through `trunk` before both distributions, and `widen` adds the sampled latents to it.
    """

    def __init__(self):
        super().__init__()
        self.trunk = Residual(WIDTH)
        self.prior_net = nn.Sequential(
            nn.SiLU(), nn.Conv2d(WIDTH, 2 * DETAIL_CHANNELS, 3, padding=1)
        )
        self.posterior_net = nn.Sequential(
            nn.Conv2d(2 * WIDTH, WIDTH, 1),
            Residual(WIDTH),
            nn.SiLU(),
            nn.Conv2d(WIDTH, 2 * DETAIL_CHANNELS, 3, padding=1),
        )
        self.widen = nn.Conv2d(DETAIL_CHANNELS, WIDTH, 3, padding=1)

    def prior(self, h: Tensor) -> D.Independent:
        """p(d_i | z, d_<i)."""
        mu, logvar = self.prior_net(h).chunk(2, dim=1)
        return diagonal_gaussian(mu, logvar)

    def posterior(self, h: Tensor, image_features: Tensor) -> D.Independent:
        """q(d_i | x, z, d_<i)."""
        mu, logvar = self.posterior_net(torch.cat([h, image_features], dim=1)).chunk(2, dim=1)
        return diagonal_gaussian(mu, logvar)


class Detail(NamedTuple):
    """One group's latents d = m + s ε, where p(d_i | z, d_<i) is N(m, s²)."""

    noise: Tensor  # ε, (B, DETAIL_CHANNELS, DETAIL_SIZE, DETAIL_SIZE)
    sample: Tensor  # d, the same size
    posterior: D.Independent  # q(d_i | x, z, d_<i), which the sample is from
    prior: D.Independent  # p(d_i | z, d_<i)


class Inference(NamedTuple):
    """The output for a batch of images, with all latents sampled from q."""

    mean: Tensor  # of p(x|z, d), (B, 3, 64, 64)
    coarse: Tensor  # the image that z makes alone, (B, 3, 64, 64)
    kl: Tensor  # of z and all details, (B,) nats
    z: Tensor  # (B, k)
    details: list[Detail]  # one for each group


class Losses(NamedTuple):
    """Three terms for each image, (B,) nats."""

    reconstruction: Tensor  # -log p(x|z, d)
    kl: Tensor
    coarse: Tensor  # the squared error that trains z and its decoder


class VAE(nn.Module):
    """Encoder q(z|x), prior p(z), decoder of z, groups of detail latents, and p(x|z, d)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(  # (B, 3, 64, 64) -> mu and logvar, (B, 2k)
            nn.Conv2d(3, 32, 4, stride=4),
            Residual(32),
            Residual(32),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            Residual(64),
            Residual(64),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(  # (B, k) -> coarse image, (B, 3, 64, 64)
            nn.Linear(latent_dim, 64 * 8 * 8),
            nn.Unflatten(1, (64, 8, 8)),
            Residual(64),
            Residual(64),
            Upsample(64, 32),
            Residual(32),
            Residual(32),
            Upsample(32, 16),
            nn.SiLU(),
            Upsample(16, 3),
        )
        self.coarse_encoder = nn.Sequential(  # coarse image -> (B, WIDTH, 16, 16)
            nn.Conv2d(3, WIDTH, 4, stride=4), Residual(WIDTH), Residual(WIDTH)
        )
        self.image_encoder = nn.Sequential(  # x and 3 (x - coarse image) -> the same size
            nn.Conv2d(6, WIDTH, 4, stride=4), Residual(WIDTH), Residual(WIDTH)
        )
        self.groups = nn.ModuleList([DetailGroup() for _ in range(DETAIL_GROUPS)])
        self.detail_decoder = nn.Sequential(  # (B, WIDTH, 16, 16) -> change of the coarse image
            Residual(WIDTH), Upsample(WIDTH, 32), Residual(32), nn.SiLU(), Upsample(32, 3)
        )
        nn.init.zeros_(self.detail_decoder[-1][0].weight)
        self.prior = NormalPrior(latent_dim)
        self.noise = SharedNoise()
        self.register_buffer("mean_image", torch.zeros(3, SIZE, SIZE))
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> D.Independent:
        """x (B, 3, 64, 64) in [0, 1] -> q(z|x), a Gaussian over (B, k)."""
        with autocast(x.device):
            mu, logvar = self.encoder(x - self.mean_image).chunk(2, dim=1)
        return diagonal_gaussian(mu, logvar)

    def infer(
        self, x: Tensor, q: D.Independent, generator: Generator, temperature: float = 1.0
    ) -> Inference:
        """Sample z from q = q(z|x), and each group of detail latents from its posterior.

        `temperature` multiplies their standard deviations: at 0 each latent is its mean.
        """
        z = reparameterize(q, generator, temperature)
        kl = self.prior.kl(q)
        details = []
        with autocast(x.device):
            coarse = self.mean_image + self.decoder(z)
            start = coarse.detach()  # so that the detail latents cannot change what z means
            image_features = self.image_encoder(torch.cat([x - 0.5, 3 * (x - start)], dim=1))

            h = self.coarse_encoder(start - 0.5)
            for group in self.groups:
                h = group.trunk(h)
                prior = group.prior(h)
                posterior = group.posterior(h, image_features)
                sample = reparameterize(posterior, generator, temperature)
                noise = (sample - prior.mean) / prior.stddev
                sample = prior.mean + prior.stddev * noise  # in the same steps as `decode`
                details.append(Detail(noise, sample, posterior, prior))
                kl = kl + D.kl_divergence(posterior, prior)
                h = h + group.widen(sample)
            mean = start + self.detail_decoder(h)
        return Inference(mean, coarse, kl, z, details)

    def decode(self, z: Tensor, noise: list[Tensor]) -> Tensor:
        """z (B, k) and the ε of each group -> the mean of p(x|z, d), (B, 3, 64, 64)."""
        with autocast(z.device):
            start = self.mean_image + self.decoder(z)
            h = self.coarse_encoder(start - 0.5)
            for group, group_noise in zip(self.groups, noise, strict=True):
                h = group.trunk(h)
                prior = group.prior(h)
                h = h + group.widen(prior.mean + prior.stddev * group_noise)
            return start + self.detail_decoder(h)

    def forward(self, x: Tensor, generator: Generator) -> Losses:
        """The terms of the loss for images (B, 3, 64, 64) in [0, 1]."""
        output = self.infer(x, self.encode(x), generator)
        reconstruction = -self.noise.log_prob(x - output.mean)
        squared_error = (output.coarse - x).square().flatten(1).sum(dim=1)
        return Losses(reconstruction, output.kl, squared_error / (2 * COARSE_SIGMA**2))


# Training -----------------------------------------------------------------------------------------
# Same in vae_mnist.py
def count_batches(images: Tensor, config: Config) -> int:
    """The batches of an epoch. An incomplete last one is left out, unless it is the only one."""
    return max(1, len(images) // config.batch_size)


# Same in vae_mnist.py, lab4/cvae.py
def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Cosine decay to 0, and a linear warm-up over the first tenth of the steps."""
    warmup = 10 * (step + 1) / total_steps
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / total_steps)
    return peak * min(warmup, cosine)


def reconstruction_weight(step: int, total_steps: int) -> float:
    """From 1/16 to 1 in three fifths of the steps, by the same factor each step.

    A weight of 1/16 has the gradient of a σ four times as large. So the latents learn what is
    coarse before what is fine, and their priors can follow.
    """
    return (1 / 16) ** max(0.0, 1 - step / (0.6 * total_steps))


def train(
    model: VAE, images: dict[str, Tensor], config: Config, checkpoint: dict | None, bar: tqdm
) -> list[dict]:
    """Train for config.epochs epochs, or those that are left. Return a row of losses for each."""
    optimizer = torch.optim.Adam(model.parameters(), betas=ADAM_BETAS, eps=ADAM_EPSILON, fused=True)
    history = []
    started = time.monotonic()
    if checkpoint:
        restore(model, checkpoint, config.folder)
        optimizer.load_state_dict(checkpoint["optimizer"])
        history = checkpoint["history"]
        started -= history[-1]["seconds"]
        log(f"resumed   {len(history)} of {config.epochs} epochs are done")
    network = DistributedDataParallel(model) if WORLD_SIZE > 1 else model

    device = model.mean_image.device
    train_images = images["train"].to(device)
    batches_per_epoch = count_batches(train_images, config)
    total_steps = config.epochs * batches_per_epoch
    step = len(history) * batches_per_epoch
    bar.update(step)

    for epoch in range(len(history), config.epochs):
        order = torch.randperm(len(train_images), generator=random_generator(config.seed, epoch))
        totals = torch.zeros(3, device=device)
        is_finite = torch.ones((), dtype=torch.bool, device=device)

        for batch in order.to(device).split(config.batch_size)[:batches_per_epoch]:
            mirrors = random_generator(config.seed, epoch, step, device=device)
            mirrored = augment(train_images[batch], mirrors)
            x = to_pixels(mirrored[RANK::WORLD_SIZE][: len(batch) // WORLD_SIZE])  # of this process
            generator = random_generator(config.seed, epoch, step, RANK, device=device)

            reconstruction, kl, coarse = network(x, generator)  # (B,) each
            loss = (reconstruction + config.kl_weight * kl).mean()

            optimizer.zero_grad()
            weight = reconstruction_weight(step, total_steps)
            objective = (weight * reconstruction + config.kl_weight * kl + coarse).mean()
            # A large λ scales up all gradients. ADAM_EPSILON and MAX_GRAD_NORM need one scale.
            (objective / max(1.0, config.kl_weight)).backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            is_finite &= torch.isfinite(loss + grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate(step, total_steps, config.lr)
            optimizer.step()

            totals += torch.stack([reconstruction.mean(), kl.mean(), loss]).detach()
            step += 1
            bar.update()

        # Looked at once per epoch: a GPU has to wait whenever the host looks at its numbers.
        validation, _ = evaluate(model, images["validation"], config)
        if not is_finite or not math.isfinite(validation["loss"]):
            raise UserError(f"the loss is not finite in epoch {epoch + 1}. Lower --lr")
        row = {"epoch": epoch + 1, "seconds": time.monotonic() - started}
        for i, term in enumerate(TERMS):
            row[f"train_{term}"] = totals[i].item() / batches_per_epoch
            row[f"validation_{term}"] = validation[term]
        history.append(row)
        save_checkpoint(config, model, history, optimizer)

    return history


@torch.no_grad()
def fit_noise(model: VAE, images: dict[str, Tensor], config: Config) -> None:
    """Give each frequency the σ that is likeliest: the root mean square of its errors."""
    device = model.mean_image.device
    generator = random_generator(config.seed, "noise", device=device)
    some = images["train"][:NOISE_IMAGES]
    squares = torch.zeros(3, SIZE, SIZE, device=device)
    for batch in some.split(EVAL_BATCH):
        x = to_pixels(batch.to(device))
        output = model.infer(x, model.encode(x), generator)
        error = dequantize(x, generator) - output.mean
        squares += frequencies(error).square().sum(dim=0)
    model.noise = FrequencyNoise((squares / len(some)).sqrt())


# Same in vae_mnist.py
@torch.no_grad()
def fit_prior(model: VAE, images: dict[str, Tensor], config: Config) -> None:
    """Fit a mixture of Gaussians to training latents by EM; keep it if validation improves."""
    before, _ = evaluate(model, images["validation"], config)
    means = []
    deviations = []
    for batch in images["train"][:PRIOR_IMAGES].split(EVAL_BATCH):
        q = model.encode(to_pixels(batch.to(model.mean_image.device)))
        means.append(q.mean.cpu())
        deviations.append(q.stddev.cpu())
    mu = torch.cat(means)
    sigma = torch.cat(deviations)
    samples = max(1, min(4, PRIOR_LATENTS // len(mu)))  # of each image
    noise = torch.randn(samples, *mu.shape, generator=random_generator(config.seed, "prior"))
    z = mu + sigma * noise  # (samples, N, k)

    components = max(1, min(PRIOR_COMPONENTS, len(mu) // IMAGES_PER_COMPONENT))
    mixture = GaussianMixture(components, reg_covar=1e-3, random_state=0)
    mixture.fit(z.flatten(0, 1).double().numpy())
    fitted = MixturePrior(
        torch.from_numpy(mixture.weights_),
        torch.from_numpy(mixture.means_),
        torch.from_numpy(np.linalg.cholesky(mixture.covariances_)),
    )

    normal = model.prior
    model.prior = fitted.to(model.mean_image.device)
    after, _ = evaluate(model, images["validation"], config)
    improved = after["neg_elbo"] < before["neg_elbo"]
    if not improved:
        model.prior = normal
    outcome = "better" if improved else "no better; N(0, I) stays"
    scores = f"{before['neg_elbo']:.2f} -> {after['neg_elbo']:.2f} nats"
    log(f"prior     mixture of {components}: validation -ELBO {scores}, {outcome}")


# Evaluation ---------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(
    model: VAE, images: Tensor, config: Config
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Encode and decode uint8 images (N, 3, 64, 64), with the same noise each time.

    Returns the mean scores, and what is known of each image.
    """
    device = model.mean_image.device
    generator = random_generator(config.seed, device=device)
    batches = []
    for batch in images.split(EVAL_BATCH):
        x = to_pixels(batch.to(device))
        q = model.encode(x)
        output = model.infer(x, q, generator)
        results = {
            "reconstruction": -model.noise.log_prob(dequantize(x, generator) - output.mean),
            "kl": output.kl,
            "squared_error": (output.mean.clamp(0, 1) - x).square().flatten(1).mean(1),
            "mu": q.mean,
            "variance": q.variance,
            "reconstructed": to_uint8(output.mean),
        }
        batches.append(results)

    per_image = {}
    for name in batches[0]:
        per_image[name] = torch.cat([batch[name] for batch in batches]).cpu()

    reconstruction = per_image["reconstruction"].double().mean().item()
    kl = per_image["kl"].double().mean().item()
    squared_error = per_image["squared_error"].double().mean().item()
    active = per_image["mu"].var(dim=0, correction=0) > ACTIVE_VARIANCE
    # The probability of a value is a density times 1/255, the distance of two values.
    scores = {
        "reconstruction": reconstruction,
        "kl": kl,
        "loss": reconstruction + config.kl_weight * kl,
        "neg_elbo": reconstruction + kl,
        "bits_per_dim": (reconstruction + kl) / DIMENSIONS / math.log(2) + math.log2(255),
        "psnr_db": -10 * math.log10(max(squared_error, 1e-12)),
        "active_units": int(active.sum()),
    }
    return scores, per_image


# Figures ------------------------------------------------------------------------------------------
# Same in vae_mnist.py
def to_uint8(images: Tensor) -> Tensor:
    """Values in [0, 1] -> 0 to 255."""
    return (images.float().clamp(0, 1) * 255).round().byte()


@torch.no_grad()
def sample_images(model: VAE, count: int, seed: int, temperature: float) -> Tensor:
    """The mean images of p(x|z, d) for `count` samples of p(z, d), uint8 (count, 3, 64, 64).

    The σ of the first group of detail is multiplied by temperature^FIRST_GROUP_POWER, every other
    σ by `temperature`. At 1 these are samples of the model.
    """
    generator = random_generator(seed, count, device=model.mean_image.device)
    scales = [temperature**FIRST_GROUP_POWER] + [temperature] * (DETAIL_GROUPS - 1)
    images = []
    for z in model.prior.sample(count, temperature, generator).split(EVAL_BATCH):
        noise = []
        for scale in scales:
            shape = (len(z), DETAIL_CHANNELS, DETAIL_SIZE, DETAIL_SIZE)
            noise.append(scale * torch.randn(shape, generator=generator, device=z.device))
        images.append(to_uint8(model.decode(z, noise)))
    return torch.cat(images).cpu()


@torch.no_grad()
def read_latents(model: VAE, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What describes images x (B, 3, 64, 64) in full: the mean of z, (B, k), and of each ε."""
    generator = random_generator(device=x.device)
    output = model.infer(x, model.encode(x), generator, temperature=0.0)
    return output.z, [detail.noise for detail in output.details]


@torch.no_grad()
def interpolate(model: VAE, pair: Tensor, t: Tensor) -> Tensor:
    """Walk from one image to another: uint8 pair (2, 3, 64, 64), t (T,) in [0, 1] -> T images.

    z moves along a line. ε moves along an arc, on which it stays as long as noise is: a mean of
    two noises would be too short, and the images smooth. At t = 0 and 1 the walk is at the
    reconstructions.
    """
    z, noise = read_latents(model, to_pixels(pair.to(model.mean_image.device)))
    t = t.to(z)
    z = torch.lerp(z[:1], z[1:], t[:, None])  # (T, k)
    arc = []
    for one in noise:
        share = t[:, None, None, None]
        line = (1 - share) * one[:1] + share * one[1:]
        arc.append(line / ((1 - share).square() + share.square()).sqrt())
    return to_uint8(model.decode(z, arc)).cpu()


# Same in vae_mnist.py
def tile(images: Tensor, columns: int) -> np.ndarray:
    """Put uint8 images (N, C, H, W) into rows of `columns`, as one RGB image."""
    missing = -len(images) % columns
    images = images.expand(-1, 3, -1, -1)
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, missing), value=255)  # white lines between
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    return rows.flatten(2, 3).flatten(0, 1).numpy()


# Same in vae_mnist.py
def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4 * panels, 3.4), dpi=200, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False).flat)


# Same in vae_mnist.py
def show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def plot_images(model: VAE, real: Tensor, per_image: dict[str, Tensor], config: Config) -> None:
    """Draw reconstructions.png, samples.png and interpolation.png; the last also as an npz file."""
    figure, (left, right) = new_figure(2)
    show(left, tile(real[:64], 8), "test images")
    reconstructed = per_image["reconstructed"][:64]
    show(right, tile(reconstructed, 8), f"reconstructed, λ = {config.kl_weight:g}")
    write_file(config.folder / "reconstructions.png", figure.savefig)

    figure, [axes] = new_figure(1)
    samples = sample_images(model, 100, config.seed, config.temperature)
    title = f"samples, λ = {config.kl_weight:g}, temperature {config.temperature:g}"
    show(axes, tile(samples, 10), title)
    write_file(config.folder / "samples.png", figure.savefig)

    figure, [axes] = new_figure(1)
    rows = []
    for i in range(0, min(16, len(real) - 1), 2):
        between = interpolate(model, real[i : i + 2], torch.linspace(0, 1, 10))
        rows.append(torch.cat([real[i : i + 1], between, real[i + 1 : i + 2]]))
    title = f"real | from one reconstruction to the other, λ = {config.kl_weight:g} | real"
    show(axes, tile(torch.cat(rows), 12), title)
    write_file(config.folder / "interpolation.png", figure.savefig)
    walks = torch.stack(rows).permute(0, 1, 3, 4, 2)  # (rows, 12, 64, 64, 3)
    write_file(config.folder / "interpolation.npz", partial(np.savez_compressed, image=walks))


# Same in vae_mnist.py
def plot_posterior(real: Tensor, per_image: dict[str, Tensor], config: Config) -> None:
    """Draw posterior.png: one image's q(z|x), and how many latent units are active."""
    i = config.image % len(real)
    order = per_image["variance"][i].argsort()
    spread = per_image["mu"].var(dim=0, correction=0).sort(descending=True).values
    figure = Figure(figsize=(8, 6.8), dpi=200, layout="constrained")
    pair, means, variances, active = figure.subplots(2, 2).flat

    images = torch.stack([real[i], per_image["reconstructed"][i]])
    show(pair, tile(images, 2), f"test image {i} | reconstructed, λ = {config.kl_weight:g}")

    means.bar(range(len(order)), per_image["mu"][i, order].numpy(), width=1.0)
    means.axhline(0, color="tab:red", label="N(0, I)")
    means.set(xlabel="dimension of z, by variance", ylabel="mean of q(z|x), cut at ±5")
    means.set(ylim=(-5, 5))

    variances.plot(per_image["variance"][i, order].numpy(), ".")
    variances.axhline(1, color="tab:red", label="N(0, I)")
    variances.set(xlabel="dimension of z, by variance", ylabel="variance of q(z|x)")
    variances.set(yscale="log", ylim=(1e-5, 10))

    active.semilogy(spread.clamp_min(1e-8))
    active.axhline(ACTIVE_VARIANCE, color="tab:red", label=f"active above {ACTIVE_VARIANCE}")
    active.set(xlabel="dimension of z, sorted", ylabel="variance over images of E[z|x]")

    for axes in (means, variances, active):
        axes.legend(loc="lower right")
    write_file(config.folder / "posterior.png", figure.savefig)


# Same in vae_mnist.py
def plot_learning_curve(history: pd.DataFrame, config: Config) -> None:
    """Draw learning-curve.png, without the first 5% of the epochs, which would hide the rest."""
    history = history[len(history) // 20 :]
    figure, panels = new_figure(len(TERMS))
    for axes, term in zip(panels, TERMS, strict=True):
        name = term.replace("kl", "KL")
        axes.plot(history["epoch"], history[f"train_{term}"], ".-", label="training")
        axes.plot(history["epoch"], history[f"validation_{term}"], ".--", label="validation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=f"{name}, λ = {config.kl_weight:g}", xlabel="epoch", ylabel="nats per image")
        axes.legend()
    write_file(config.folder / "learning-curve.png", figure.savefig)


def plot_sweep(config: Config, metrics: dict[str, dict], images: dict[str, Tensor]) -> None:
    """Write sweep.csv with a row per λ, and lambda-sheet.png with a column per λ."""
    table = pd.DataFrame(metrics.values())
    for term in (*TERMS, "neg_elbo"):
        table[term] = [values["test"] for values in table[term]]
    write_table(config.out / "sweep.csv", table)
    log(table.round(3).to_string(index=False))

    figure = Figure(figsize=(2.4 * len(metrics), 12), dpi=250, layout="constrained")
    columns = figure.subplots(5, len(metrics), squeeze=False).T
    for kl_weight, axes in zip(metrics, columns, strict=True):
        reconstructions, samples, walks, variances, curves = axes
        config = replace(config, kl_weight=float(kl_weight))
        model, _ = load_finished(config.folder, pick_device(config.device))
        real = images["test"][:18]
        _, per_image = evaluate(model, real, config)

        pairs = torch.stack([real, per_image["reconstructed"]], dim=1).flatten(0, 1)
        show(reconstructions, tile(pairs, 6), f"λ = {kl_weight}\nreal and reconstructed")
        sampled = sample_images(model, 36, config.seed, config.temperature)
        prior = "N(0, I)" if isinstance(model.prior, NormalPrior) else "fitted prior"
        show(samples, tile(sampled, 6), f"samples, {prior}")
        walk = torch.from_numpy(np.load(config.folder / "interpolation.npz")["image"])
        walk = walk[:6, 1:11:2].permute(0, 1, 4, 2, 3).flatten(0, 1)
        show(walks, tile(walk, 5), "interpolations")

        variance = per_image["variance"].mean(dim=0).sort().values
        variances.plot(variance.numpy(), ".")
        variances.axhline(1, color="tab:red", label="N(0, I)")
        variances.set(yscale="log", ylim=(1e-5, 10), xlabel="dimension of z, sorted")
        variances.set_title("variance of q(z|x)", fontsize=9)
        variances.legend(fontsize=7)

        history = pd.read_csv(config.folder / "history.csv")
        epochs = history["epoch"]
        curves.plot(epochs, history["validation_reconstruction"], ".-", label="reconstruction")
        curves.plot(epochs, history["validation_kl"], ".-", label="KL")
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.set(xlabel="epoch", ylabel="nats per image")
        curves.set_title("validation", fontsize=9)
        curves.legend(fontsize=7)
    write_file(config.out / "lambda-sheet.png", figure.savefig)
    log(f"wrote     {config.out}/lambda-sheet.png, sweep.csv")


# Runs: one folder per λ ---------------------------------------------------------------------------
def run_model(config: Config, images: dict[str, Tensor], bar: tqdm) -> dict:
    """Train one model, score it, and leave everything in its folder."""
    checkpoint = load_checkpoint(config.folder, config.settings) if config.resume else None
    if checkpoint and checkpoint["metrics"]:
        log(f"finished  {config.folder} was finished before")
        return checkpoint["metrics"]
    if WORLD_SIZE > 1:
        dist.barrier()  # until every process has read what the first one may move away

    device = pick_device(config.device)
    with open_run(config, device) if RANK == 0 else contextlib.nullcontext():
        torch.manual_seed(seed_of(config.seed))
        model = VAE(config.latent_dim)
        some = images["train"][:4096]  # enough for a mean
        model.mean_image.copy_(to_pixels(some).mean(dim=0))
        model.to(device)
        parameters = sum(p.numel() for p in model.parameters())

        history = train(model, images, config, checkpoint, bar)
        finished = time.monotonic()
        fit_noise(model, images, config)
        # At λ = 0 nothing has tied the latents to N(0, I), and its samples are to show that.
        if config.prior == "learned" and config.kl_weight > 0:
            fit_prior(model, images, config)

        log("trained   scoring and drawing take a moment more")
        scores, per_image = evaluate(model, images["test"], config)
        metrics = {"lambda": config.kl_weight}
        for term in (*TERMS, "neg_elbo"):
            metrics[term] = {"test": scores[term]}
        for name in ("bits_per_dim", "psnr_db", "active_units"):
            metrics[name] = scores[name]

        for name in ("train", "validation"):  # a third as many images are enough for these
            some = images[name][: 1 + len(images["test"]) // 3]
            scores, _ = evaluate(model, some, config)
            for term in (*TERMS, "neg_elbo"):
                metrics[term][name] = scores[term]
        metrics["latent_dim"] = config.latent_dim
        metrics["parameters"] = parameters
        metrics["epochs"] = config.epochs
        metrics["seconds"] = history[-1]["seconds"] + time.monotonic() - finished

        if RANK == 0:
            table = pd.DataFrame(history)
            write_table(config.folder / "history.csv", table)
            plot_learning_curve(table, config)
            plot_images(model, images["test"], per_image, config)
            plot_posterior(images["test"], per_image, config)
        save_checkpoint(config, model, history, metrics=metrics)
    return metrics


# Same in vae_mnist.py
def run_models(config: Config, kl_weights: list[float]) -> dict:
    """Train a model per λ. Return the metrics of the one model, or of several by λ."""
    path = find_data(config.data)
    images, sha256 = load_images(path, config.fit)
    warnings_at_end = describe_blank(images, path)
    config = replace(config, data_sha256=sha256)
    images = split_images(images, config)
    log("split     " + ", ".join(f"{len(part)} {name}" for name, part in images.items()))
    log(f"device    {pick_device(config.device)}")
    for line in warnings_at_end:
        log(line)

    if config.batch_size % WORLD_SIZE > 0:
        raise UserError(f"--batch-size {config.batch_size}: give a multiple of {WORLD_SIZE}")
    steps = config.epochs * count_batches(images["train"], config)  # per model
    if steps < FEW_STEPS:
        advice = "give a smaller --batch-size or more --epochs for better images"
        log(f"hint      only {steps} steps of training; {advice}")

    metrics = {}
    total = steps * len(kl_weights)
    with tqdm(total=total, unit="step", mininterval=2, file=sys.stdout, disable=RANK > 0) as bar:
        for kl_weight in kl_weights:
            config = replace(config, kl_weight=kl_weight)
            result = run_model(config, images, bar)
            if RANK == 0:
                write_json(config.folder / "metrics.json", result)

            metrics[f"{kl_weight:g}"] = result
            bar.update(steps * len(metrics) - bar.n)  # if this model was finished before
            scores = "{bits_per_dim:.3f} bits/dim, {psnr_db:.1f} dB".format(**result)
            log(f"λ = {kl_weight:g}: -ELBO {result['neg_elbo']['test']:.2f} nats, {scores}")
            active = "{active_units} of {latent_dim} units of z are active".format(**result)
            log(f"λ = {kl_weight:g}: {active}")

    for line in warnings_at_end:
        log(line)
    log(f"wrote     {config.out}/lambda-{', lambda-'.join(metrics)}")
    name = "1" if "1" in metrics else f"{kl_weight:g}"
    words = ["--sample", "100", "--lambda", name, "--out", str(config.out)]
    words += ["--temperature", f"{config.temperature:g}"]
    log(f"next      {shlex.join(['python', sys.argv[0], *words])}")
    if len(metrics) == 1:
        return result
    if RANK == 0:
        plot_sweep(config, metrics, images)
    return metrics


# Same in vae_mnist.py
def sample_finished(config: Config) -> dict:
    """Sample images from the finished model; leave samples.npz and a picture."""
    model, _ = load_finished(config.folder, pick_device(config.device))
    images = sample_images(model, config.sample, config.seed, config.temperature)
    export(config.folder, "samples", len(images), image=images)
    return {"samples": len(images)}


def evaluate_file(config: Config) -> dict:
    """Score the finished model on a file; leave reconstructions.npz and a picture."""
    model, settings = load_finished(config.folder, pick_device(config.device))
    path = find_data(config.evaluate)
    images, _ = load_images(path, settings["fit"])  # as in training
    for line in describe_blank(images, path):
        log(line)
    metrics, per_image = evaluate(model, images, config)
    metrics["images"] = len(images)
    reconstruction = per_image["reconstructed"]
    export(config.folder, "reconstructions", 100, image=images, reconstruction=reconstruction)
    log(json.dumps(metrics))
    return metrics


# Same in vae_mnist.py
def export(folder: Path, name: str, shown: int, **images: Tensor) -> None:
    """Save uint8 images (N, C, H, W) to an npz file, and the first ones as a picture.

    The arrays are (N, H, W, C), or (N, H, W) if grey. Arrays of pairs stand side by side.
    """
    arrays = {key: part.permute(0, 2, 3, 1).squeeze(-1) for key, part in images.items()}
    write_file(folder / f"{name}.npz", partial(np.savez_compressed, **arrays))
    pairs = torch.cat([*images.values()], dim=-1)[:shown]
    picture = Image.fromarray(tile(pairs, columns=math.ceil(len(pairs) ** 0.5)))
    write_file(folder / f"{name}-{len(pairs)}.png", partial(picture.save, format="png"))
    log(f"wrote     {folder}/{name}.npz, {name}-{len(pairs)}.png")


# Seeds, device, files -----------------------------------------------------------------------------
# Same in transformer.py, vae_mnist.py
def log(message: str) -> None:
    """Print a line above the progress bar; of several processes the first one prints."""
    if RANK == 0:
        tqdm.write(message)


# Same in all four scripts
def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Same in all four scripts
def seed_of(*place: int | str) -> int:
    """Return a seed for a place in the run, such as (seed, epoch, step).

    So a resumed run draws the same numbers as one that was never stopped.
    """
    digest = hashlib.sha256(repr(place).encode()).digest()
    return int.from_bytes(digest[:4], "big")


# Same in all four scripts
def random_generator(*place: int | str, device: torch.device | str = "cpu") -> Generator:
    """Return a generator seeded by a place in the run."""
    return Generator(device).manual_seed(seed_of(*place))


# Same in transformer.py, vae_mnist.py
def pick_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU if there is one, one for each process."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {reason(error)}. Use --device cpu") from error


# Same in vae_mnist.py
def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16; without them it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


# Same in vae_mnist.py
def autocast(device: torch.device) -> torch.autocast:
    """Matrix products and convolutions in bfloat16 where the processor has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


# Same in all four scripts
def reason(error: Exception) -> str:
    """What a library's error says, without the file's name."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text[:300].rstrip(".")


# Same in all four scripts
def write_file(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Let `save` fill a buffer and write it atomically: to a temporary name first, then rename."""
    buffer = io.BytesIO()
    save(buffer)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}. Make room, then add --resume") from error


# Same in all four scripts
def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2, default=str)
    write_file(path, lambda file: file.write(text.encode()))


# Same in transformer.py, vae_mnist.py
def write_table(path: Path, table: pd.DataFrame) -> None:
    write_file(path, partial(table.to_csv, index=False, mode="wb"))


# Same in vae_mnist.py
def save_checkpoint(
    config: Config,
    model: VAE,
    history: list[dict],
    optimizer: torch.optim.Optimizer | None = None,
    metrics: dict | None = None,
) -> None:
    """Save the state after an epoch, with `optimizer`, or a finished run, with `metrics`."""
    checkpoint = {
        "version": CHECKPOINT_VERSION,
        "settings": config.settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict() if optimizer else None,
        "history": history,
        "metrics": metrics,
    }
    if RANK == 0:
        write_file(config.folder / "checkpoint.pt", partial(torch.save, checkpoint))


# Same in all four scripts
def load_checkpoint(folder: Path, settings: dict) -> dict | None:
    """Read the folder's checkpoint, if there is one; it must agree with `settings`.

    Raises UserError if it is damaged, or of another version or other settings.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    advice = "Move it away, or name another folder with --out"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile("damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        found = reason(error) if isinstance(error, OSError) else "damaged, or not a checkpoint"
        raise UserError(f"{path}: {found}. {advice}") from error

    if not isinstance(checkpoint, dict) or checkpoint.get("version") != CHECKPOINT_VERSION:
        raise UserError(f"{path}: not a checkpoint of {CHECKPOINT_VERSION}. {advice}")
    for name, value in settings.items():
        found = checkpoint["settings"].get(name)
        if found != value:
            difference = f"{name} {found}, not {value}"
            if name.endswith("_sha256"):
                difference = f"other contents of {name.removesuffix('_sha256')}"
            raise UserError(f"{path}: trained with {difference}. Give the same data and flags")
    return checkpoint


def restore(model: VAE, checkpoint: dict, folder: Path) -> None:
    """Load a checkpoint's weights, and its mixture prior if it has one."""
    weights = checkpoint["model"]
    try:
        if "noise.sigma" in weights:
            model.noise = FrequencyNoise(weights["noise.sigma"])
        if "prior.means" in weights:
            model.prior = MixturePrior(
                weights["prior.weights"], weights["prior.means"], weights["prior.scale_tril"]
            )
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: {reason(error)}. Train again without --resume") from error


# Same in vae_mnist.py
def load_finished(folder: Path, device: torch.device) -> tuple[VAE, dict]:
    """Return the finished model of a run's folder, and its settings."""
    checkpoint = load_checkpoint(folder, settings={})
    if checkpoint is None or checkpoint["metrics"] is None:
        raise UserError(f"{folder}: no finished run there. Train first, or name its --out")
    model = VAE(checkpoint["settings"]["latent_dim"])
    restore(model, checkpoint, folder)
    return model.to(device), checkpoint["settings"]


# Same in vae_mnist.py
@contextlib.contextmanager
def open_run(config: Config, device: torch.device) -> Iterator[None]:
    """Keep other runs out of the run's folder while the `with` block lasts, and describe the run.

    If a run starts over, the folder of the earlier one becomes <folder>.previous.
    """
    folder = config.folder
    previous = folder.with_name(f"{folder.name}.previous")
    for path in (folder, previous):
        if any(path.glob("[!.]*")) and not (path / "config.json").exists():
            raise UserError(f"{path}: not the folder of a run. Name another folder with --out")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock").acquire(timeout=0)
        if not config.resume and (folder / "checkpoint.pt").exists():
            if previous.exists():
                shutil.rmtree(previous)
            folder.rename(previous)
            folder.mkdir()
            log(f"kept      the earlier run as {previous}")
        for unfinished in folder.glob(".*.tmp"):
            unfinished.unlink()
    except Timeout as error:
        raise UserError(f"{folder}: in use. Wait for the other run, or give --out") from error
    except OSError as error:
        raise UserError(f"{folder}: {reason(error)}. Name another folder with --out") from error

    with lock:
        description = {
            "settings": asdict(config),
            "script_sha256": sha256_of(SCRIPT) if SCRIPT.exists() else None,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "device": str(device),
            "number_format": "bfloat16" if has_bfloat16(device) else "float32",
            "threads": torch.get_num_threads(),
            "processes": WORLD_SIZE,
        }
        write_json(folder / "config.json", description)
        yield


# Command line -------------------------------------------------------------------------------------
# Same in all four scripts
class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


# Same in all four scripts
def positive(text: str) -> int:
    """A flag's type: a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: give a whole number, 1 or more")
    return int(text)


# Same in all four scripts
def natural(text: str) -> int:
    """A flag's type: a whole number, 0 or more, that can be a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise ArgumentTypeError(f"{text}: give a whole number from 0 to {2**32 - 1}")
    return int(text)


# Same in all four scripts
def nonnegative(text: str) -> float:
    """A flag's type: a number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"{text}: give a number, 0 or more")
    return number


def parse_args(argv: list[str] | None) -> tuple[Config, list[float]]:
    """Return the settings, and each λ to train a model for."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.set_defaults(**asdict(Config()))

    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, help="zip or folder of images [data/anime-faces.zip, else the sample]")
    add("--out", type=Path, help="folder for the results [%(default)s]")
    add("--resume", action="store_true", help="continue the interrupted run in --out")
    add("--evaluate", type=Path, metavar="DATA", help="score the finished model on other images")
    add("--sample", type=positive, metavar="N", help="sample N images from the finished model")
    add("--seed", type=natural, help="of split, weights, batches and noise [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="[%(default)s]")
    add("--limit", type=positive, metavar="N", help="use N random images, for a first look [all]")
    fit = "make pictures square by squeezing them, or by cropping their middle [%(default)s]"
    add("--fit", choices=("squeeze", "crop"), help=fit)

    add = parser.add_argument_group("model and objective").add_argument
    add(
        "--lambda",
        type=nonnegative,
        nargs="+",
        default=[1.0],
        dest="kl_weights",
        metavar="λ",
        help="weight of the KL; several values train one model each and compare them [1]",
    )
    add(
        "--prior",
        choices=("learned", "normal"),
        help="p(z) after training: a mixture of Gaussians, or N(0, I) [%(default)s]",
    )
    add("--latent-dim", type=positive, help="dimensions of z [%(default)s]")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, help="passes over the training images [%(default)s]")
    add("--batch-size", type=positive, help="images per step, of all processes [%(default)s]")
    add("--lr", type=nonnegative, help="peak learning rate of Adam [%(default)s]")

    add = parser.add_argument_group("samples and figures").add_argument
    add(
        "--temperature",
        type=nonnegative,
        help="of samples: factor on σ, its 5th power in the first group of detail [%(default)s]",
    )
    add("--image", type=natural, help="which test image posterior.png shows [%(default)s]")

    args = vars(parser.parse_args(argv))
    folders = {f"{kl_weight:g}": kl_weight for kl_weight in args.pop("kl_weights")}
    kl_weights = list(folders.values())  # one for each folder's name
    config = Config(**args | {"kl_weight": kl_weights[0]})
    if bool(config.evaluate) + bool(config.sample) + (len(kl_weights) > 1) > 1:
        raise UserError("give only one of --evaluate, --sample and several --lambda")
    return config, kl_weights


# Same in vae_mnist.py
def run_command(config: Config, kl_weights: list[float]) -> dict:
    """Do what the command line asks for, and return the metrics."""
    if config.sample:
        return sample_finished(config)
    if config.evaluate:
        return evaluate_file(config)
    if WORLD_SIZE == 1:
        return run_models(config, kl_weights)

    gpu = pick_device(config.device).type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo")
    metrics = run_models(config, kl_weights)
    dist.destroy_process_group()
    return metrics


# Same in vae_mnist.py
def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics; for several λ, a dict by λ."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can print λ
    resumable = False
    try:
        config, kl_weights = parse_args(argv)
        resumable = config.sample is None and config.evaluate is None
        return run_command(config, kl_weights)
    except UserError as error:
        if RANK == 0:
            tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        advice = "; the same command with --resume continues from the last epoch"
        log(f"stopped{advice if resumable else ''}")
        raise SystemExit(130) from None


if __name__ == "__main__":
    # Pasted into a notebook cell, a script has no __file__, and sys.argv belongs to the notebook.
    main(None if "__file__" in globals() else [])
