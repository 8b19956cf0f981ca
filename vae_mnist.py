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
"""Train a variational autoencoder (VAE) on binary images of handwritten digits.

The encoder maps an image x to q(z|x), a Gaussian over latents z. The decoder maps z to p(x|z), a
Bernoulli distribution for each pixel. Training raises a lower bound on the log likelihood, the
ELBO (Kingma and Welling 2014, eq. 3):

    log p(x) >= E_q(z|x) [log p(x|z)] - KL(q(z|x) || p(z))
    loss      = reconstruction + λ KL        in nats per image; at λ = 1 it is the negative ELBO

Two things happen after training:

  - The prior p(z), N(0, I) until then, is replaced by a mixture of 64 Gaussians fitted to the
    latents of the training images, if that improves the ELBO of validation images (`fit_prior`).
  - The encoder's q(z|x) is not the best one for an image it has not seen. Before an image is
    scored or shown, its q(z|x) is improved by Newton steps and gets a full covariance matrix
    (`refine_posterior`).

Usage:

    python vae_mnist.py                       train on data/TibetanMNIST.npz, or the bundled sample
    python vae_mnist.py --lambda 0 1 50 100   train one model per λ and compare them
    python vae_mnist.py --sample 100          sample digits from the finished model
    python vae_mnist.py --evaluate FILE       score the finished model on other images

Each model leaves figures, metrics.json and a checkpoint in runs/vae_mnist/lambda-<λ>/. On the
course's 12,000 digits, λ = 1 reaches 73.1 nats on test images (mean of three seeds; three minutes
with two CPU threads).
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
import tokenize
import warnings
import zipfile
import zlib
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NoReturn

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

SCRIPT = Path(globals().get("__file__", "vae_mnist.py")).resolve()  # a notebook has no __file__
DATA_FILE = SCRIPT.parent / "data" / "TibetanMNIST.npz"
SAMPLE_FILE = SCRIPT.parent / "data" / "sample" / "TibetanMNIST.npz"
CHECKPOINT_VERSION = "vae_mnist 6"  # increase it whenever the network changes

# torchrun starts WORLD_SIZE processes and numbers them; a plain run is one process.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

SIZE = 28  # images are SIZE x SIZE
COLOURS = "L"  # Pillow's name for grey values
PIXELS = SIZE * SIZE

# Network
WIDTH = 24  # channels at 14 x 14; twice as many at 7 x 7, and 16 at 28 x 28
PRIOR_COMPONENTS = 64  # at most
IMAGES_PER_COMPONENT = 150  # at least

# Optimization
ADAM_BETAS = (0.9, 0.99)
FEW_STEPS = 1000  # with fewer, images stay blurred and the run gives a hint
MAX_GRAD_NORM = 200.0
REFINE_STEPS = 120  # 40 more would gain another .2 nats
REFINE_RATE = 0.3  # of a Newton step; it falls to 0

# Augmentation: the largest random change in either direction
MAX_ROTATION = math.radians(8.0)
MAX_LOG_SCALE = 0.08
MAX_SHEAR = 0.08
MAX_SHIFT = 0.08  # of half an image

# Evaluation
EVAL_BATCH = 250
PRIOR_IMAGES = 65536  # training images that the mixture is fitted to, at most
PRIOR_LATENTS = 65536  # samples of these images' latents: four of each image, fewer of many
TERMS = ("reconstruction", "kl", "loss")  # loss = reconstruction + λ KL
ACTIVE_VARIANCE = 0.01  # a latent unit is active if its mean varies more (Burda et al. 2016)
MAX_BYTES = 2**29  # of one unpacked array or picture
LARGE_PHOTO = 2**24  # pixels
MAX_PIXELS = 50_000_000  # of one picture, once it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ROUNDING = 1e-3  # values may leave their range by so much

# What NumPy, zipfile, Pillow and torch raise over a file that is missing or damaged
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
    tokenize.TokenError,
)


# Same in all four scripts
class UserError(Exception):
    """A mistake that the user can fix. `main` prints it as one line, without a traceback."""


@dataclass(frozen=True)
class Config:
    """The settings of one model; each is explained at its flag in `parse_args`."""

    kl_weight: float = 1.0  # λ
    latent_dim: int = 32
    prior: str = "learned"
    epochs: int = 28
    batch_size: int = 32
    lr: float = 2e-3
    seed: int = 0
    limit: int | None = None
    fit: str = "squeeze"
    data_sha256: str = ""  # known once the data is read

    data: Path | None = None
    out: Path = Path("runs/vae_mnist")
    resume: bool = False
    evaluate: Path | None = None
    sample: int | None = None
    temperature: float = 0.8
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
# Same in vae_anime.py
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
    """Read an npz file, or pictures. Return grey images, uint8 (N, 1, 28, 28), and a sha256.

    Raises UserError if there are none, or if an array's values are not grey values.
    """
    try:
        if path.is_dir():
            return load_pictures(path, fit)
        content = path.read_bytes()
        members = zipfile.ZipFile(io.BytesIO(content)).infolist()
        if not any(member.filename.endswith(".npy") for member in members):
            return load_pictures(path, fit)
        if max(member.file_size for member in members) > MAX_BYTES:
            raise ValueError(f"an array in it unpacks to more than {MAX_BYTES >> 20} MiB")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            images = find_images(arrays)
        images = to_grey(stretch(images, path))
    except READ_ERRORS as error:
        raise UserError(f"{path}: {reason(error)}. Give np.savez(file, image=images)") from error

    images = torch.from_numpy(images.astype(np.float32))[:, None]
    images = F.interpolate(images, (SIZE, SIZE), mode="area")  # of this size already: no change
    return images.round().byte(), hashlib.sha256(content).hexdigest()


def find_images(arrays: np.lib.npyio.NpzFile) -> np.ndarray:
    """Return the array `image`, or the one with the most images: (N, k, k) or (N, k, k, C)."""
    found = {}
    candidates = {}
    for name in arrays.files:
        try:
            array = np.asarray(arrays[name])  # a member that is no array comes as bytes
        except ValueError as error:  # an array of objects
            found[name] = f"{name}: {reason(error)}"
            continue
        found[name] = f"{name} {array.shape}"
        images = as_images(array)
        if images is not None:
            candidates[name] = images

    if not candidates:
        raise ValueError(f"no square images (N, H, W) in it; found {', '.join(found.values())}")
    sizes = {name: (len(images), images.size) for name, images in candidates.items()}
    chosen = "image" if "image" in candidates else max(sizes, key=sizes.get)
    others = [found[name] for name in candidates if name != chosen]
    log("images    " + ", not ".join([found[chosen], *others]))
    return candidates[chosen]


def as_images(array: np.ndarray) -> np.ndarray | None:
    """Return an array as images, (N, k, k) or (N, k, k, 3 or 4), or None if it is something else.

    It may be flat, (N, k²), have its channels first, or have axes of length 1.
    """
    if array.dtype.kind not in "buif" or array.ndim < 2 or array.size == 0:
        return None
    shape = [length for length in array.shape[1:] if length != 1]
    side = math.isqrt(math.prod(shape))
    if len(shape) == 1 and side >= 8 and side**2 == shape[0]:  # else labels, one-hot
        shape = [side, side]

    images = array.reshape(len(array), *shape)
    if len(shape) == 3 and shape[0] in (3, 4):
        images = np.moveaxis(images, 1, -1)
    is_square = images.ndim >= 3 and images.shape[1] == images.shape[2]
    return images if is_square and images.shape[3:] in ((), (3,), (4,)) else None


def stretch(images: np.ndarray, path: Path) -> np.ndarray:
    """Bring values to 0 to 255, and say so. Raises ValueError if they cannot be grey values."""
    lowest = float(images.min())
    highest = float(images.max())
    top = 65535 if images.dtype == np.uint16 and highest > 255 else 255
    if not np.isfinite(images).all() or lowest < -ROUNDING or highest > top + ROUNDING:
        raise ValueError(f"holds values outside 0 to 255: from {lowest:g} to {highest:g}")

    if highest <= 1 + ROUNDING:
        top = 1
    elif highest < 128:  # no pixel would be lit; scikit-learn's digits end at 16
        top = highest
    if top == 255:
        return images
    log(f"warning   {path}: values from 0 to {top:g}, stretched to 255")
    return images * (255.0 / top)


def to_grey(images: np.ndarray) -> np.ndarray:
    """(N, k, k) as it is, or (N, k, k, C) -> (N, k, k): its brightness, on white if C = 4."""
    if images.ndim == 3:
        return images
    grey = images[..., :3] @ np.float32([0.299, 0.587, 0.114])
    if images.shape[-1] == 3:
        return grey
    opacity = images[..., 3] / np.float32(255)
    return grey * opacity + 255 * (1 - opacity)


# Same in vae_anime.py
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


# Same in vae_anime.py
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


# Same in vae_anime.py
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


# Same in vae_anime.py
def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is what macOS adds to a zip file."""
    return name == "__MACOSX" or (name.startswith(".") and name.strip(".") != "")


# Same in vae_anime.py
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


# Same in vae_anime.py
def fit_picture(picture: Image.Image, fit: str) -> np.ndarray:
    """Resize a picture to SIZE x SIZE, uint8: the whole of it squeezed, or its middle cropped."""
    if fit == "crop":
        return np.asarray(ImageOps.fit(picture, (SIZE, SIZE), Image.Resampling.BOX))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX))


def describe_blank(images: Tensor, path: Path) -> list[str]:
    """Return a warning if there are blank images. Raises UserError if there are no others."""
    lit = (images >= 128).flatten(1)
    blank = int((lit.all(1) | ~lit.any(1)).sum())
    if blank == len(images):
        raise UserError(f"{path}: no image has dark and lit pixels. Scale them from 0 to 255")
    return [f"warning   {path}: {blank} images have no lit or no dark pixel"] if blank else []


# Same in vae_anime.py
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
    """Grey values 0 to 255 -> binary pixels 0.0 and 1.0."""
    return (images >= 128).float().contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Apply a small random rotation, shear, scaling and shift to each grey image."""

    def uniform(bound: float) -> Tensor:
        values = torch.rand(len(images), generator=generator, device=images.device)
        return (values * 2 - 1) * bound

    angle = uniform(MAX_ROTATION)
    shear = uniform(MAX_SHEAR)
    scale_x = uniform(MAX_LOG_SCALE).exp()
    scale_y = uniform(MAX_LOG_SCALE).exp()
    shift_x = uniform(MAX_SHIFT)
    shift_y = uniform(MAX_SHIFT)

    sin = angle.sin()
    cos = angle.cos()
    row_x = torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, shift_x], dim=-1)
    row_y = torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, shift_y], dim=-1)
    affine = torch.stack([row_x, row_y], dim=1)  # (B, 2, 3)

    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    grid = grid.clamp(1 / SIZE - 1, 1 - 1 / SIZE)  # beyond the border its pixels are repeated
    warped = F.grid_sample(images.float(), grid, align_corners=False)
    return warped.round()


# Model --------------------------------------------------------------------------------------------
# Same in vae_anime.py
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


# Same in vae_anime.py
class Upsample(nn.Sequential):
    """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int):
        conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
        super().__init__(conv, nn.PixelShuffle(2))


def diagonal_gaussian(mu: Tensor, logvar: Tensor) -> D.MultivariateNormal:
    """N(μ, diag σ²) for each item of a batch, in float32.

    σ is kept between e^-5 and e^2.5, since the KL would be infinite at 0.
    """
    sigma = (0.5 * logvar.float().clamp(-10.0, 5.0)).exp()
    return gaussian(mu.float(), sigma.diag_embed())


def gaussian(mu: Tensor, scale_tril: Tensor) -> D.MultivariateNormal:
    """N(μ, L Lᵀ) for each item of a batch, with L lower triangular."""
    return D.MultivariateNormal(mu, scale_tril=scale_tril, validate_args=False)


def reparameterize(q: D.MultivariateNormal, generator: Generator) -> Tensor:
    """Sample z = μ + L ε with ε ~ N(0, I), differentiable in both (Kingma and Welling, 2.4)."""
    noise = torch.empty_like(q.mean).normal_(generator=generator)
    return q.mean + torch.einsum("bij,bj->bi", q.scale_tril, noise)


class NormalPrior(nn.Module):
    """p(z) = N(0, I)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim

    def kl(self, q: D.MultivariateNormal) -> Tensor:
        """KL(q || p), (B,) (Kingma and Welling 2014, appendix B)."""
        log_det = 2 * q.scale_tril.diagonal(dim1=1, dim2=2).log().sum(dim=1)  # of the covariance
        return 0.5 * ((q.mean.square() + q.variance - 1).sum(dim=1) - log_det)

    def precision(self, q: D.MultivariateNormal) -> Tensor:
        """The second derivative of the KL in the mean of q, (k, k)."""
        return torch.eye(self.latent_dim, device=q.mean.device)

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

    def expected_log_probs(self, q: D.MultivariateNormal) -> Tensor:
        """E_q[log w_j N_j(z)], (B, K).

        With the precision P of N_j and the covariance Σ of q it is log w_j N_j(μ) - 1/2 tr(P Σ).
        """
        gaussians = gaussian(self.means, self.scale_tril)
        traces = q.covariance_matrix.flatten(1) @ gaussians.precision_matrix.flatten(1).T  # (B, K)
        return self.weights.log() + gaussians.log_prob(q.mean[:, None]) - 0.5 * traces

    def kl(self, q: D.MultivariateNormal) -> Tensor:
        """An upper bound on KL(q || p), (B,), which has no closed form. The ELBO stays a bound.

        By Jensen's inequality E_q[log Σ_j w_j N_j(z)] >= log Σ_j exp(E_q[log w_j N_j(z)]).
        """
        return -self.expected_log_probs(q).logsumexp(dim=1) - q.entropy()

    def precision(self, q: D.MultivariateNormal) -> Tensor:
        """The mean of the precisions of all N_j by their shares in the bound on the KL, (B, k, k).

        It is the second derivative of `kl` in the mean of q with the shares held fixed.
        """
        shares = self.expected_log_probs(q).softmax(dim=1)
        precisions = gaussian(self.means, self.scale_tril).precision_matrix
        return torch.einsum("bj,jkl->bkl", shares, precisions)

    def sample(self, count: int, temperature: float, generator: Generator) -> Tensor:
        """Sample (count, k) with all standard deviations multiplied by `temperature`."""
        j = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.empty_like(self.means[j]).normal_(generator=generator)  # (count, k)
        return self.means[j] + temperature * torch.einsum("nij,nj->ni", self.scale_tril[j], noise)


class VAE(nn.Module):
    """Encoder q(z|x), decoder p(x|z) and prior p(z)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(  # (B, 1, 28, 28) -> mu and logvar, (B, 2k)
            nn.Conv2d(1, WIDTH, 4, stride=2, padding=1),
            Residual(WIDTH),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, stride=2, padding=1),
            Residual(2 * WIDTH),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * WIDTH * 7 * 7, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(  # (B, k) -> logits (B, 1, 28, 28)
            nn.Linear(latent_dim, 2 * WIDTH * 7 * 7),
            nn.Unflatten(1, (2 * WIDTH, 7, 7)),
            Residual(2 * WIDTH),
            Upsample(2 * WIDTH, WIDTH),
            Residual(WIDTH),
            Upsample(WIDTH, 16),
            nn.SiLU(),
            nn.Conv2d(16, 1, 3, padding=1),
        )
        self.prior = NormalPrior(latent_dim)
        self.register_buffer("mean_image", torch.zeros(1, SIZE, SIZE))
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor) -> D.MultivariateNormal:
        """Binary x (B, 1, 28, 28) -> q(z|x), a Gaussian over (B, k)."""
        with autocast(x.device):
            mu, logvar = self.encoder(x - self.mean_image).chunk(2, dim=1)
        return diagonal_gaussian(mu, logvar)

    def logits(self, z: Tensor) -> Tensor:
        """z (B, k) -> logits of all pixels (B, 1, 28, 28).

        The decoder's output is added to the logits of the mean training image.
        """
        with autocast(z.device):
            logits = self.mean_image.clamp(0.01, 0.99).logit() + self.decoder(z)
        return logits.float()

    def decode(self, z: Tensor) -> D.Independent:
        """z (B, k) -> p(x|z), Bernoulli over (B, 1, 28, 28) (Kingma and Welling 2014, eq. 11)."""
        return D.Independent(D.Bernoulli(logits=self.logits(z), validate_args=False), 3)

    def forward(self, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return reconstruction, -log p(x|z), and KL of each image, (B,) nats."""
        q = self.encode(x)
        pixels = self.decode(reparameterize(q, generator))
        return -pixels.log_prob(x), self.prior.kl(q)


def curvature(model: VAE, q: D.MultivariateNormal) -> Tensor:
    """The Gauss-Newton matrix Jᵀ diag(p (1 - p)) J of -log p(x|z) at the mean of q, (B, k, k).

    J (B, pixels, k) is the derivative of the logits, by differences over one σ to both sides, and
    over .1 where σ is smaller. Where the logits are linear in z, the matrix is the second
    derivative of -log p(x|z).
    """
    sigma = q.stddev.clamp_min(0.1)  # smaller differences are lost in bfloat16
    columns = []
    for i in range(model.latent_dim):
        width = sigma[:, i, None]  # (B, 1)
        step = torch.zeros_like(sigma)
        step[:, i] = sigma[:, i]
        difference = model.logits(q.mean + step) - model.logits(q.mean - step)
        columns.append(difference.flatten(1) / (2 * width))
    J = torch.stack(columns, dim=2)
    p = model.logits(q.mean).flatten(1).sigmoid()  # (B, pixels)
    return torch.einsum("bpk,bp,bpl->bkl", J, p * (1 - p), J)


def laplace(model: VAE, q: D.MultivariateNormal, kl_weight: float) -> D.MultivariateNormal:
    """The Gaussian at the mean of q whose precision is the curvature of loss / λ there.

    Precision is the inverse of the covariance.
    """
    precision = model.prior.precision(q) + curvature(model, q) / kl_weight
    largest = precision.diagonal(dim1=1, dim2=2).amax(dim=1)
    ridge = 1e-6 * largest[:, None, None] * torch.eye(model.latent_dim, device=q.mean.device)
    # Without the ridge, rounding can leave a negative eigenvalue.
    return D.MultivariateNormal(q.mean, precision_matrix=precision + ridge, validate_args=False)


@torch.no_grad()
def refine_posterior(
    model: VAE, x: Tensor, q: D.MultivariateNormal, kl_weight: float, generator: Generator
) -> D.MultivariateNormal:
    """Improve each image's q(z|x) for its own loss, and give it a full covariance matrix.

    Newton steps for the mean, with the curvature at the encoder's mean, then Laplace's
    approximation where they end (Park et al. 2019). Below λ = .01 the mean moves as at .01, and the
    covariance stays the encoder's, since at λ = 0 the best σ is 0.
    """
    encoded = q
    is_small = kl_weight < 0.01
    kl_weight = max(kl_weight, 0.01)
    q = laplace(model, q, kl_weight)
    scale_tril = q.scale_tril

    for step in range(REFINE_STEPS):
        mean = q.mean.detach().requires_grad_()
        with torch.enable_grad():
            q = gaussian(mean, scale_tril)
            pixels = model.decode(reparameterize(q, generator))
            loss = model.prior.kl(q).sum() - pixels.log_prob(x).sum() / kl_weight
            (gradient,) = torch.autograd.grad(loss, mean)

        # A Newton step is L Lᵀ gradient. It is cut to one σ in each direction, the columns of L.
        whitened = torch.einsum("bij,bi->bj", scale_tril, gradient).clamp(-1, 1)
        newton = torch.einsum("bij,bj->bi", scale_tril, whitened)
        rate = REFINE_RATE * (1 - step / REFINE_STEPS)
        q = gaussian(mean - rate * newton, scale_tril)

    if is_small:
        return gaussian(q.mean, encoded.scale_tril)
    return laplace(model, q, kl_weight)


# Training -----------------------------------------------------------------------------------------
# Same in vae_anime.py
def count_batches(images: Tensor, config: Config) -> int:
    """The batches of an epoch. An incomplete last one is left out, unless it is the only one."""
    return max(1, len(images) // config.batch_size)


# Same in vae_anime.py, lab4/cvae.py
def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Cosine decay to 0, and a linear warm-up over the first tenth of the steps."""
    warmup = 10 * (step + 1) / total_steps
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / total_steps)
    return peak * min(warmup, cosine)


def train(
    model: VAE, images: dict[str, Tensor], config: Config, checkpoint: dict | None, bar: tqdm
) -> list[dict]:
    """Train for config.epochs epochs, or those that are left. Return a row of losses for each."""
    optimizer = torch.optim.Adam(model.parameters(), betas=ADAM_BETAS, fused=True)
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
            warps = random_generator(config.seed, epoch, step, device=device)
            grey = augment(train_images[batch], warps)
            x = to_pixels(grey[RANK::WORLD_SIZE][: len(batch) // WORLD_SIZE])  # of this process
            generator = random_generator(config.seed, epoch, step, RANK, device=device)

            reconstruction, kl = network(x, generator)  # (B,) each
            loss = (reconstruction + config.kl_weight * kl).mean()

            optimizer.zero_grad()
            # A large λ scales up all gradients. MAX_GRAD_NORM needs one scale.
            objective = loss / max(1.0, config.kl_weight)
            objective.backward()
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


# Same in vae_anime.py
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
    model: VAE, images: Tensor, config: Config, refine: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Encode and decode uint8 images (N, 1, 28, 28), with the same noise each time.

    Returns the mean scores, and what is known of each image. With `refine`, each image's posterior
    is improved first, as for all final results.
    """
    device = model.mean_image.device
    generator = random_generator(config.seed, device=device)
    batches = []
    for batch in images.split(EVAL_BATCH):
        x = to_pixels(batch.to(device))
        q = model.encode(x)
        if refine:
            q = refine_posterior(model, x, q, config.kl_weight, generator)
        pixels = model.decode(reparameterize(q, generator))
        results = {
            "reconstruction": -pixels.log_prob(x),
            "kl": model.prior.kl(q),
            "squared_error": (pixels.mean - x).square().flatten(1).mean(1),
            "mu": q.mean,
            "variance": q.variance,
            "reconstructed": to_uint8(pixels.mean),
        }
        batches.append(results)

    per_image = {}
    for name in batches[0]:
        per_image[name] = torch.cat([batch[name] for batch in batches]).cpu()

    reconstruction = per_image["reconstruction"].double().mean().item()
    kl = per_image["kl"].double().mean().item()
    squared_error = per_image["squared_error"].double().mean().item()
    active = per_image["mu"].var(dim=0, correction=0) > ACTIVE_VARIANCE
    scores = {
        "reconstruction": reconstruction,
        "kl": kl,
        "loss": reconstruction + config.kl_weight * kl,
        "neg_elbo": reconstruction + kl,
        "bits_per_dim": (reconstruction + kl) / PIXELS / math.log(2),
        "psnr_db": -10 * math.log10(max(squared_error, 1e-12)),
        "active_units": int(active.sum()),
    }
    return scores, per_image


# Figures ------------------------------------------------------------------------------------------
# Same in vae_anime.py
def to_uint8(images: Tensor) -> Tensor:
    """Values in [0, 1] -> 0 to 255."""
    return (images.float().clamp(0, 1) * 255).round().byte()


@torch.no_grad()
def decode_images(model: VAE, z: Tensor) -> Tensor:
    """The mean image of p(x|z) for each latent (N, k), uint8 (N, 1, 28, 28)."""
    images = [to_uint8(model.decode(part).mean) for part in z.split(EVAL_BATCH)]
    return torch.cat(images).cpu()


def sample_images(model: VAE, count: int, seed: int, temperature: float) -> Tensor:
    """The mean image of p(x|z) for `count` latents from the prior."""
    generator = random_generator(seed, count, device=model.mean_image.device)
    return decode_images(model, model.prior.sample(count, temperature, generator))


def interpolate(model: VAE, mu: Tensor, t: Tensor) -> Tensor:
    """The mean images on the line from mu[0] to mu[1], mu (2, k), at t (T,) in [0, 1]."""
    z = torch.lerp(mu[:1], mu[1:], t[:, None])  # (T, k)
    return decode_images(model, z.to(model.mean_image.device))


# Same in vae_anime.py
def tile(images: Tensor, columns: int) -> np.ndarray:
    """Put uint8 images (N, C, H, W) into rows of `columns`, as one RGB image."""
    missing = -len(images) % columns
    images = images.expand(-1, 3, -1, -1)
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, missing), value=255)  # white lines between
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    return rows.flatten(2, 3).flatten(0, 1).numpy()


# Same in vae_anime.py
def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4 * panels, 3.4), dpi=200, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False).flat)


# Same in vae_anime.py
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
        between = interpolate(model, per_image["mu"][i : i + 2], torch.linspace(0, 1, 10))
        rows.append(torch.cat([real[i : i + 1], between, real[i + 1 : i + 2]]))
    title = f"real | from one z to the other, λ = {config.kl_weight:g} | real"
    show(axes, tile(torch.cat(rows), 12), title)
    write_file(config.folder / "interpolation.png", figure.savefig)
    walks = torch.stack(rows).permute(0, 1, 3, 4, 2)  # (rows, 12, 28, 28, 1)
    write_file(config.folder / "interpolation.npz", partial(np.savez_compressed, image=walks))


# Same in vae_anime.py
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


# Same in vae_anime.py
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
        real = to_uint8(to_pixels(images["test"][:18]))
        _, per_image = evaluate(model, real, config, refine=True)

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
        # At λ = 0 nothing has tied the latents to N(0, I), and its samples are to show that.
        if config.prior == "learned" and config.kl_weight > 0:
            fit_prior(model, images, config)

        log("trained   scoring and drawing take a moment more")
        scores, per_image = evaluate(model, images["test"], config, refine=True)
        metrics = {"lambda": config.kl_weight}
        for term in (*TERMS, "neg_elbo"):
            metrics[term] = {"test": scores[term]}
        for name in ("bits_per_dim", "psnr_db", "active_units"):
            metrics[name] = scores[name]

        for name in ("train", "validation"):  # a third as many images are enough for these
            some = images[name][: 1 + len(images["test"]) // 3]
            scores, _ = evaluate(model, some, config, refine=True)
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
            real = to_uint8(to_pixels(images["test"]))
            plot_images(model, real, per_image, config)
            plot_posterior(real, per_image, config)
        save_checkpoint(config, model, history, metrics=metrics)
    return metrics


# Same in vae_anime.py
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


# Same in vae_anime.py
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
    metrics, per_image = evaluate(model, images, config, refine=True)
    metrics["images"] = len(images)
    reconstruction = per_image["reconstructed"]
    export(config.folder, "reconstructions", 100, image=images, reconstruction=reconstruction)
    log(json.dumps(metrics))
    return metrics


# Same in vae_anime.py
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
# Same in transformer.py, vae_anime.py
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


# Same in transformer.py, vae_anime.py
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


# Same in vae_anime.py
def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16; without them it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


# Same in vae_anime.py
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


# Same in transformer.py, vae_anime.py
def write_table(path: Path, table: pd.DataFrame) -> None:
    write_file(path, partial(table.to_csv, index=False, mode="wb"))


# Same in vae_anime.py
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
        if "prior.means" in weights:
            model.prior = MixturePrior(
                weights["prior.weights"], weights["prior.means"], weights["prior.scale_tril"]
            )
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: {reason(error)}. Train again without --resume") from error


# Same in vae_anime.py
def load_finished(folder: Path, device: torch.device) -> tuple[VAE, dict]:
    """Return the finished model of a run's folder, and its settings."""
    checkpoint = load_checkpoint(folder, settings={})
    if checkpoint is None or checkpoint["metrics"] is None:
        raise UserError(f"{folder}: no finished run there. Train first, or name its --out")
    model = VAE(checkpoint["settings"]["latent_dim"])
    restore(model, checkpoint, folder)
    return model.to(device), checkpoint["settings"]


# Same in vae_anime.py
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
    add("--data", type=Path, help="npz, zip or folder [data/TibetanMNIST.npz, else the sample]")
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
    add("--temperature", type=nonnegative, help="of samples: factor on σ [%(default)s]")
    add("--image", type=natural, help="which test image posterior.png shows [%(default)s]")

    args = vars(parser.parse_args(argv))
    folders = {f"{kl_weight:g}": kl_weight for kl_weight in args.pop("kl_weights")}
    kl_weights = list(folders.values())  # one for each folder's name
    config = Config(**args | {"kl_weight": kl_weights[0]})
    if bool(config.evaluate) + bool(config.sample) + (len(kl_weights) > 1) > 1:
        raise UserError("give only one of --evaluate, --sample and several --lambda")
    return config, kl_weights


# Same in vae_anime.py
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


# Same in vae_anime.py
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
