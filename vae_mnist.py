"""Learn binary images of handwritten digits with a variational autoencoder whose pixels are Bernoulli.

The encoder turns an image x into q(z|x), a Gaussian over codes z; the decoder turns a code into p(x|z). Both are
trained to raise a lower bound of the log likelihood (Kingma and Welling 2014, eq. 3), at λ = 1 or at another weight:

    log p(x) >= E q(z|x) [log p(x|z)] - KL(q(z|x) || p(z))           loss = reconstruction + λ KL, nats per image

The prior p(z) is a mixture of 64 Gaussians with full covariance, learned too, and at the end fitted to the codes by EM;
--prior normal makes it N(0, I).

    python vae_mnist.py                      data/TibetanMNIST.npz beside the script, else the bundled sample
    python vae_mnist.py --lambda 0 1 50 100  one model a λ, side by side
    python vae_mnist.py --sample 100         draw digits from the finished model
    python vae_mnist.py --evaluate FILE      score it on other images

Each λ leaves figures, metrics.json and the model in runs/vae_mnist/lambda-<λ>/. On the course's 12,000 digits, λ = 1:
80.20 nats on test images (two cores, float32, seed 0, 213 s).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no flock: there, keeping two runs out of one folder is up to the user
    fcntl = None

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent

SCRIPT = "vae_mnist"
DATA = "TibetanMNIST.npz"
SOURCE = "The real TibetanMNIST.npz is the course's file; put it into data/ beside the script"
SHAPE = (1, 28, 28)  # channels, rows, columns
LEVELS = 2  # grey is made binary at 128
LATENT_DIM = 32
WIDTH = 24  # channels at 14 x 14; twice as many at 7 x 7
PRIOR_GAUSSIANS = 64  # Gaussians in the learned prior; the digits come in clusters
EPOCHS = 24
LEARNING_RATE = 2e-3
WARMUP = 2.0  # epochs
MAX_NORM = 200.0  # of the gradient
ROTATE, SCALE, SHEAR, SHIFT, FLIP = 8.0, 0.08, 0.08, 0.08, 0.0  # degrees; log factor; slope; half images; probability
MAX_BYTES = 2**29  # of one unpacked array

# ----------------------------------------------------------------------------------------------------------------------
# arguments
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=Help)
    parser.error = fail  # a mistake is one line here as everywhere
    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, metavar="PATH", help=f"{DATA}, or of faces a folder of images; otherwise the file in "
        "data/ beside the script, or the bundled data/sample/")
    add("--out", type=Path, metavar="DIR", default=Path("runs") / SCRIPT, help="folder for what a run leaves, with one "
        "folder a λ inside")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--evaluate", type=Path, metavar="FILE", help="score the finished run's model on every image of FILE")
    add("--sample", type=positive, metavar="N", help="draw N images from the finished run's model")
    add("--seed", type=seed, default=0, help="of split, weights, batches and noise")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    add("--limit", type=positive, metavar="N", help="use N random images only, for a first look")
    add = parser.add_argument_group("model and objective").add_argument
    add("--lambda", type=not_negative, nargs="+", default=[1.0], dest="kl_weight", metavar="λ", help="weight of the KL "
        "in the training loss; several values train one model each and compare them")
    add("--warmup", type=not_negative, default=WARMUP, metavar="EPOCHS", help="λ grows from 0 in the first epochs")
    add("--prior", choices=("learned", "normal"), default="learned", help="p(z): learned Gaussians with full "
        "covariance, or N(0, I)")
    add("--latent-dim", type=positive, default=LATENT_DIM, help="dimensions of z")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=EPOCHS, help="passes over the training images")
    add("--batch-size", type=positive, default=32, help="images a step, over all processes")
    add("--lr", type=positive_float, default=LEARNING_RATE, help="peak learning rate of Adam")
    add = parser.add_argument_group("scores and figures").add_argument
    add("--image", type=not_negative_int, default=0, metavar="N", help="test image whose posterior is shown")
    add("--iwae", type=positive, default=64, metavar="K", help="samples an image for the importance-weighted bound")
    add("--iwae-images", type=positive, default=100, metavar="N", help="test images that the bound is averaged over")
    args = parser.parse_args(argv)
    names = [f"{value:g}" for value in args.kl_weight]  # the folders': six digits
    if len(set(names)) < len(names):
        fail(f"--lambda {' '.join(names)}: a value stands there twice")
    if (args.evaluate is not None) + (args.sample is not None) + (len(names) > 1) > 1:
        fail("give only one of --evaluate, --sample and several --lambda")
    return args
# fmt: on


def checked(convert: Callable, holds: Callable, what: str) -> Callable:
    """An argparse type: `convert` the word, then refuse a value for which `holds` is false (nan always is)."""

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names each flag's default, where it has one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


positive = checked(int, lambda v: v >= 1, "a whole number from 1 up")
seed = checked(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")
positive_float = checked(float, lambda v: 0 < v < math.inf, "a positive number")
not_negative = checked(float, lambda v: 0 <= v < math.inf, "a number from 0 up")
not_negative_int = checked(int, lambda v: v >= 0, "a whole number from 0 up")


# ----------------------------------------------------------------------------------------------------------------------
# errors, devices, run folders, checkpoints (the same to the letter in every script of this project)
# ----------------------------------------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """End the program over a user's mistake: one line on stderr, exit code 2."""
    print("error:", *message.splitlines(), file=sys.stderr)
    raise SystemExit(2)


def seed_all(*numbers: int) -> torch.Generator:
    """Seed torch, and return a CPU generator, from `numbers` such as (seed, fold, epoch, step).

    Noise is a function of its place in the run, so a resumed run needs no generator state to repeat it.
    """
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU when there is one. Under torchrun each process takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"--device {name}: torch finds no such device for this process. Use --device cpu, or fewer processes")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 matrix products where the processor has them: every CUDA GPU since Ampere, a CPU with avx512_bf16."""
    bf16 = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type != "mps")


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, world size): (0, 1) alone, else of the group that torchrun started."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


stop_signals: list[int] = []  # what has arrived; the training loop looks here after each batch


def catch_signals(finish_batch: bool) -> None:
    """Let Ctrl-C and SIGTERM wait for the end of the batch, or else raise KeyboardInterrupt; a second one kills."""

    def handler(number: int, frame) -> None:
        stop_signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        if not finish_batch:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    if stop_signals and not finish_batch:  # one came after the last batch
        raise KeyboardInterrupt


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, moved into place when the block ends well: no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # so that not even a power cut leaves half of it
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and path.suffix != ".pt":
            raise
        reason = error.strerror if isinstance(error, OSError) else "torch.save broke off: is the disk full?"
        fail(f"{path}: cannot be written ({reason}). Make room, then go on with --resume")
    finally:
        with contextlib.suppress(OSError):  # on a disk that has become read-only not even a missing file can be removed
            temporary.unlink()


def write_json(path: Path, value: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


held_locks: list[int] = []  # file descriptors of locked run folders; closed when main ends


def open_run(folder: Path, resume: bool, config: dict) -> None:
    """Make and lock the run's folder, leave config.json there; without `resume`, keep what stood there as .previous."""
    if folder.name in ("", ".."):
        fail(f"{folder}: a run needs a folder with a name. Name one with --out")
    try:
        for attempt in range(2):
            folder.mkdir(parents=True, exist_ok=True)
            if fcntl:  # the lock is freed when the process ends, however it ends
                held_locks.append(os.open(folder, os.O_RDONLY))
                fcntl.flock(held_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            for stale in folder.glob(".*.tmp"):
                stale.unlink()
            names = {path.name for path in folder.iterdir() if path.is_file()}
            if names and "config.json" not in names:
                fail(f"{folder}: holds files that no run left there. Name another folder with --out")
            if resume or attempt or names <= {"config.json"}:
                break
            previous = folder.with_name(folder.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        write_json(folder / "config.json", config)
    except BlockingIOError:
        fail(f"{folder}: another run is writing there. Wait for it, or name another folder with --out")
    except OSError as error:
        fail(f"{folder}: cannot be written ({error.strerror}). Name another folder with --out")


def describe_run(args: argparse.Namespace, hashes: dict[str, str]) -> dict:
    """What config.json says: arguments, data, versions, commit."""
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=HERE, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        commit = ""
    return {
        "arguments": vars(args),
        "sha256": hashes,
        "seed": args.seed,
        "commit": commit.strip() or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def load_checkpoint(path: Path, script: str, settings: dict) -> dict:
    """Read a checkpoint of `script` trained with `settings`; anything else ends the program. Runs no code from it."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes lead it into
        fail(f"{path}: not a checkpoint that can be read ({type(error).__name__}). Move it away, or give another --out")
    if not isinstance(state, dict) or state.get("script") != script or not isinstance(state.get("settings"), dict):
        fail(f"{path}: not a checkpoint of {script}. Move it away, or give another --out")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            there = state["settings"].get(name)
            fail(f"{path}: trained with {name} {there}, not {value}. Give it the same, or start over without --resume")
    return state


# ----------------------------------------------------------------------------------------------------------------------
# data: files -> uint8 images -> batches of pixels in [0, 1]
# ----------------------------------------------------------------------------------------------------------------------


def find_data(given: Path | None) -> Path:
    """The file to read: the one given, else in data/ beside the script, else the bundled sample there."""
    if given is not None:
        return given
    for path in (HERE / "data" / DATA, HERE / "data" / "sample" / DATA):
        if path.exists():
            return path
    fail(f"no data/{DATA} beside {Path(__file__).name}. {SOURCE}, or name it with --data")


def resize(images: list[np.ndarray]) -> np.ndarray:
    """uint8 images (H, W[, C]) of any sizes -> (N, rows, columns[, C]) of SHAPE, by averaging over boxes of pixels."""
    return np.stack([np.asarray(Image.fromarray(image).resize(SHAPE[:0:-1], Image.Resampling.BOX)) for image in images])


class Images:
    """uint8 images (N, C, H, W) of SHAPE, rows of a file of bytes: it may be larger than memory.

    The file is mapped anew for each batch, since the pages of a mapping that stays open count as the process's memory.
    """

    def __init__(self, path: Path, rows: torch.Tensor | None = None):
        self.path = path
        self.rows = torch.arange(path.stat().st_size // math.prod(SHAPE)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        pixels = np.memmap(self.path, np.uint8, "r").reshape(-1, *SHAPE)
        return torch.from_numpy(pixels[self.rows[index].numpy()])


def keep_images(path: Path, decode: Callable[[], Iterator[np.ndarray]]) -> Images:
    """The images of the file `path`; if it is not there, made first of the uint8 arrays (n, C, H, W) of `decode`.

    Of several processes that need it, one decodes and the others wait.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl:
            folder = os.open(path.parent, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError as error:
        fail(f"{path.parent}: cannot be written ({error.strerror}). Name another folder with --out")
    try:
        for stale in path.parent.glob(".images-*.tmp"):
            stale.unlink()
        if not path.exists():
            with atomic(path) as temporary, open(temporary, "wb") as file:
                for images in decode():
                    file.write(images.tobytes())
    finally:
        if fcntl:
            os.close(folder)
    return Images(path)


def load_images(path: Path, out: Path) -> tuple[Images, str]:
    """The images of an npz file, uint8 (N, 1, 28, 28), kept as <out>/images-<sha256>.bin, and the file's sha256.

    The array is `image`, or else the first of shape (N, H, W), (N, H, W, 1) or (N, 1, H, W). Values in [0, 1] are
    stretched to 255 and other sizes resized, both with a warning: nothing else about them is in doubt.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        fail(f"{path}: {error.strerror}. {SOURCE}, or name it with --data")

    def find_array() -> np.ndarray:
        try:
            members = zipfile.ZipFile(io.BytesIO(raw)).infolist()
            if large := [member.filename for member in members if member.file_size > MAX_BYTES]:
                fail(f"{path}: {large[0]} unpacks to more than {MAX_BYTES >> 20} MiB. Give a file with fewer images")
            with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
                for name in sorted(arrays.files, key=lambda name: name != "image"):
                    array = arrays[name]
                    if array.ndim == 4 and 1 in (array.shape[1], array.shape[3]):
                        array = array.squeeze(1 if array.shape[1] == 1 else 3)
                    if array.ndim == 3 and array.dtype.kind in "buif" and len(array) and min(array.shape[1:]) >= 8:
                        return array
                names = ", ".join(arrays.files)
        except Exception as error:  # numpy and zipfile raise what the bytes lead them into
            fail(f"{path}: not an npz file of plain arrays ({error}). Make it with np.savez(file, image=images)")
        fail(f"{path}: no array of images (N, H, W); found {names}")

    def decode() -> Iterator[np.ndarray]:
        found = find_array()
        if not np.isfinite(found).all() or found.min() < 0 or found.max() > 255:
            fail(f"{path}: holds values outside 0 to 255. Give grey images as uint8")
        if found.max() <= 1:
            print(f"warning   {path}: values from 0 to 1, stretched to 255")
            found = found * 255.0
        found = np.rint(found).astype(np.uint8)
        if found.shape[1:] != SHAPE[1:]:
            if found.shape[1] != found.shape[2]:
                fail(f"{path}: images of {found.shape[1:]} are not square, so not resized. Give {SHAPE[1:]}")
            print(f"warning   {path}: images of {found.shape[1:]} resized to {SHAPE[1:]}")
            found = resize(list(found))
        yield found

    sha256 = hashlib.sha256(raw).hexdigest()
    return keep_images(out / f"images-{sha256[:16]}.bin", decode), sha256


class Split(NamedTuple):
    """Images for the weights, for looking during training, and for the figures at the end."""

    train: Images
    validation: Images
    test: Images


def split_images(images: Images, seed: int, limit: int | None) -> Split:
    """Deal the images, at most `limit` of them, at random into 80% for training, 10% and 10%, or 5,000 if fewer."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]
    if len(order) < 20:
        fail(f"{len(order)} images are too few to split; give 20 or more")
    tenth = min(len(order) // 10, 5000)
    test, validation, train = (
        Images(images.path, rows) for rows in order.split([tenth, tenth, len(order) - 2 * tenth])
    )
    print(f"images    {len(train)} for training, {tenth} for validation, {tenth} for test, each {SHAPE}")
    return Split(train, validation, test)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Grey or colour values 0 to 255 -> LEVELS evenly spaced values from 0 to 1, laid out channels last."""
    pixels = (images.float() * (LEVELS / 256)).floor() / (LEVELS - 1)
    return pixels.contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Warp each of the images (B, C, H, W) by a random affine map within the bounds that the constants set.

    Values stay whole, 0 to 255, so that what is made binary afterwards has no blurred edges.
    """
    count = len(images)

    def draw(bound: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * bound

    angle, shear = draw(math.radians(ROTATE)), draw(SHEAR)
    flip = torch.where(torch.rand(count, generator=generator) < FLIP, -1.0, 1.0)
    across, down = draw(SCALE).exp() * flip, draw(SCALE).exp()
    left = torch.stack([angle.cos() * across, (shear * angle.cos() - angle.sin()) * down, draw(SHIFT)], -1)
    right = torch.stack([angle.sin() * across, (shear * angle.sin() + angle.cos()) * down, draw(SHIFT)], -1)
    grid = F.affine_grid(torch.stack([left, right], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round()


class LinearStart(NamedTuple):
    """The best linear VAE for the training images at one λ, from which a model starts; k directions in D pixels."""

    mean: torch.Tensor  # (D,)
    directions: torch.Tensor  # (k, D)
    variances: torch.Tensor  # (k,) of the data along each direction, at least `noise`
    noise: torch.Tensor  # () λσ²: a direction that varies less is not worth its KL
    sigma: torch.Tensor  # () of p(x|z)


def principal_components(images: Images, count: int, kl_weight: float) -> LinearStart:
    """Principal components of 8,192 images at most, with the σ that makes them the linear VAE's optimum.

    At λ = 1 that is probabilistic PCA (Tipping and Bishop 1999, eqs. 7 and 8; Lucas et al. 2019, theorem 1). At any λ
    it is reverse water-filling (Cover and Thomas 2006, theorem 10.3.3): the error left along a direction is its
    variance or λσ², whichever is less, and Dσ² is the sum of these errors. Two images give one direction at most.
    """
    chosen = torch.randperm(len(images), generator=seed_all(len(images)))[:8192]
    x = torch.empty(len(chosen), math.prod(SHAPE))  # (n, D)
    for part, rows in zip(x.split(256), chosen.split(256), strict=True):
        part.copy_(to_pixels(images[rows]).flatten(1))
    mean = x.mean(0)
    x -= mean
    found = min(count, len(x) // 2)  # more would fit few images to the last pixel, with no σ left
    _, s, directions = torch.svd_lowrank(x, min(found + 32, *x.shape), niter=2)
    directions = F.pad(directions.T[:found], (0, 0, 0, count - found)).contiguous()  # (k, D)
    variances = F.pad(s[:found].square() / len(x), (0, count - found))
    total = sum(part.square().sum() for part in x.split(256))  # norm() of so many loses a five-hundredth in float32
    rest = total / len(x) - variances.sum()
    square = rest / x.shape[1]  # σ²: grows from the least that it can be
    for _ in range(1000):
        square = ((rest + variances.clamp(max=kl_weight * square).sum()) / x.shape[1]).clamp_min(1e-6)
    noise = (kl_weight * square).clamp_min(1e-6)
    return LinearStart(mean, directions, variances.maximum(noise), noise, square.sqrt())


# ----------------------------------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), the identity at the start (He et al. 2016, fig. 4e without its norms)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Encoder(nn.Module):
    """x (B, 1, 28, 28) -> mu, logvar (B, k) each."""

    def __init__(self, start: LinearStart):
        super().__init__()
        self.register_buffer("center", start.mean.view(SHAPE))
        self.network = nn.Sequential(
            nn.Conv2d(1, WIDTH, 4, 2, 1), Residual(WIDTH), nn.SiLU(),  # (B, WIDTH, 14, 14)
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1), Residual(2 * WIDTH), nn.SiLU(), nn.Flatten(),  # (B, 2 WIDTH * 7 * 7)
            nn.Linear(2 * WIDTH * 49, 2 * len(start.variances)),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(x - self.center).chunk(2, 1)


class Decoder(nn.Module):
    """z (B, k) -> logits (B, 1, 28, 28) of the pixels, at the start those of the mean image."""

    def __init__(self, start: LinearStart):
        super().__init__()
        self.register_buffer("base", start.mean.clamp(0.01, 0.99).logit().view(SHAPE))
        self.network = nn.Sequential(
            nn.Linear(len(start.variances), 2 * WIDTH * 49), nn.Unflatten(1, (2 * WIDTH, 7, 7)), Residual(2 * WIDTH),
            nn.SiLU(), nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, padding=1), nn.PixelShuffle(2), Residual(WIDTH),  # 14 x 14
            nn.SiLU(), nn.Conv2d(WIDTH, 64, 3, padding=1), nn.PixelShuffle(2),  # (B, 16, 28, 28)
            nn.SiLU(), nn.Conv2d(16, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.base + self.network(z)


class Prior(NamedTuple):
    """p(z) = Σ w N(m, (AᵀA)⁻¹) over K Gaussians; each A is lower triangular with a positive diagonal."""

    log_weights: torch.Tensor  # (K,)
    mean: torch.Tensor  # (K, k)
    A: torch.Tensor  # (K, k, k)


class VAE(nn.Module):
    """q(z|x) = N(μ(x), diag σ²(x)), p(x|z) from the decoder, and a prior p(z) of PRIOR_GAUSSIANS that learns with them.

    A learned prior goes where the codes are, so that draws from it are codes of something. With `learned_prior` false
    it is N(0, I).
    """

    def __init__(self, start: LinearStart, learned_prior: bool):
        super().__init__()
        count, components = len(start.variances), PRIOR_GAUSSIANS if learned_prior else 1
        self.encoder, self.decoder = Encoder(start), Decoder(start)
        self.prior_logits = nn.Parameter(torch.zeros(components), requires_grad=learned_prior)
        apart = torch.randn(components, count) if components > 1 else torch.zeros(1, count)
        self.prior_mean = nn.Parameter(apart, requires_grad=learned_prior)
        self.prior_factor = nn.Parameter(torch.zeros(components, count, count), requires_grad=learned_prior)

    def prior(self) -> Prior:
        """p(z); the diagonals of `prior_factor` hold the logarithms of A's."""
        A = self.prior_factor.tril(-1) + self.prior_factor.diagonal(dim1=1, dim2=2).exp().diag_embed()
        return Prior(self.prior_logits.log_softmax(0), self.prior_mean, A)

    @torch.no_grad()
    def set_prior(self, prior: Prior) -> None:
        """Change the weights so that `prior()` returns these values."""
        self.prior_logits.copy_(prior.log_weights)
        self.prior_mean.copy_(prior.mean)
        self.prior_factor.copy_(prior.A.tril(-1) + prior.A.diagonal(dim1=1, dim2=2).log().diag_embed())

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, C, H, W) in [0, 1] -> mu and logvar of q(z|x), (B, k) each, in float32."""
        mu, logvar = self.encoder(x)
        return mu.float(), logvar.float().clamp(-20.0, 10.0)  # at λ = 0 nothing else keeps σ from 0


# ----------------------------------------------------------------------------------------------------------------------
# objective (nats per image)
# ----------------------------------------------------------------------------------------------------------------------


BITS_OFFSET = 0.0  # the pixels are discrete: nats are bits but for ln 2


def log_prob(params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """log p(x|z), Bernoulli (Kingma and Welling 2014, eq. 11): logits and x (B, 1, 28, 28) -> (B,) nats."""
    params = params.float()
    return -F.binary_cross_entropy_with_logits(params, x.expand_as(params), reduction="none").flatten(1).sum(1)


def mean(params: torch.Tensor) -> torch.Tensor:
    """E[x|z], the probability of white."""
    return params.float().sigmoid()


def reparameterize(mu: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """z = μ + σ ε with ε from N(0, I): a draw from q(z|x) that gradients pass (Kingma and Welling 2014, 2.4)."""
    return mu + (0.5 * logvar).exp() * noise


def kl_to_each(mu: torch.Tensor, logvar: torch.Tensor, prior: Prior) -> torch.Tensor:
    """KL(N(μ, diag σ²) ‖ each Gaussian of the prior), (B, k) -> (B, K).

    ½ (‖A (μ - m)‖² + tr(A diag σ² Aᵀ) - k - Σ ln σ²) - ln det A; to N(0, I) that is appendix B of Kingma and Welling.
    """
    distance = torch.einsum("bjd,jed->bje", mu[:, None] - prior.mean, prior.A).square().sum(-1)  # (B, K)
    trace = logvar.exp() @ prior.A.square().sum(1).T  # (B, K)
    log_det = prior.A.diagonal(dim1=1, dim2=2).log().sum(-1)  # (K,)
    return 0.5 * (distance + trace - mu.shape[1] - logvar.sum(-1, keepdim=True)) - log_det


def kl_divergence(mu: torch.Tensor, logvar: torch.Tensor, prior: Prior) -> torch.Tensor:
    """KL(N(μ, diag σ²) ‖ p(z)) of each item, (B, k) -> (B,); of a mixture an upper bound, so the ELBO stays a bound.

    To a mixture it is -ln Σ w exp(-KL to each), since ln Σ exp is convex (Jensen's inequality).
    """
    return -(prior.log_weights - kl_to_each(mu, logvar, prior)).logsumexp(1)


@torch.no_grad()
def fit_prior(prior: Prior, mu: torch.Tensor, logvar: torch.Tensor) -> Prior:
    """The prior of least mean KL from N posteriors (N, k), by EM from `prior` on (Dempster et al. 1977).

    A posterior belongs to a Gaussian by the share r = softmax(ln w - KL to each). Then w is the mean of r, m that of μ
    and the covariance that of σ² + (μ - m)², weighted by r; of one Gaussian that is the optimum at once. Each is moved
    towards the mean covariance as by 20 posteriors of it, so that one with few of its own keeps its breadth.
    """
    prior = Prior(*(part.to(mu) for part in prior))
    last, eye = math.inf, torch.eye(mu.shape[1]).to(mu)
    for _ in range(30):
        parts = zip(mu.split(250), logvar.split(250), strict=True)
        joint = torch.cat([prior.log_weights - kl_to_each(*part, prior) for part in parts])  # (N, K)
        kl = -joint.logsumexp(1).mean().item()
        if not last - kl > 0.01:  # nats
            break
        last, share = kl, joint.softmax(1)
        size = share.sum(0) + 1e-9  # (K,)
        weights, m = size / size.sum(), share.T @ mu / size[:, None]
        around = ((mu - center, r[:, None] / n) for center, r, n in zip(m, share.T, size, strict=True))
        covariance = torch.stack([(off * r).T @ off for off, r in around])  # (K, k, k)
        covariance += (share.T @ logvar.exp() / size[:, None]).diag_embed()
        common = torch.einsum("j,jde->de", weights, covariance)
        covariance = covariance.lerp(common, (20 / (20 + size))[:, None, None])
        spread, singular = torch.linalg.cholesky_ex(covariance)
        if singular.any():  # codes so far apart, at a λ near 0, that double precision does not hold their σ
            break
        A = torch.linalg.solve_triangular(spread, eye, upper=False)
        prior = Prior(weights.log(), m, A)
    return prior


def log_density(z: torch.Tensor, prior: Prior) -> torch.Tensor:
    """ln p(z) + k/2 ln 2π of codes z (B, k) -> (B,)."""
    square = torch.einsum("bjd,jed->bje", z[:, None] - prior.mean, prior.A).square().sum(-1)  # (B, K)
    return (prior.log_weights + prior.A.diagonal(dim1=1, dim2=2).log().sum(-1) - 0.5 * square).logsumexp(1)


def sample_prior(prior: Prior, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` codes (count, k) from p(z): a component by its weight, then m + A⁻¹ε."""
    component = torch.multinomial(prior.log_weights.exp().cpu(), count, replacement=True, generator=generator)
    z = torch.randn(count, prior.mean.shape[1], generator=generator).to(prior.mean.device)
    for j, (mean_z, A) in enumerate(zip(prior.mean, prior.A, strict=True)):
        z[component == j] = mean_z + torch.linalg.solve_triangular(A, z[component == j].T, upper=False).T
    return z


def whitening(prior: Prior) -> tuple[torch.Tensor, torch.Tensor]:
    """m (k,) and A (k, k) such that u = A (z - m) has mean 0 and covariance I under p(z)."""
    weights = prior.log_weights.exp()
    m = weights @ prior.mean
    spread = torch.linalg.inv(prior.A)  # (K, k, k)
    between = (prior.mean - m) * weights[:, None].sqrt()
    covariance = torch.einsum("j,jde,jfe->df", weights, spread, spread) + between.T @ between
    return m, torch.linalg.inv(torch.linalg.cholesky(covariance))


def elbo_terms(model: VAE, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction -log p(x|z) and KL, (B,) each; ELBO = -(reconstruction + KL). One z an image, from `noise`."""
    with autocast(x.device):
        mu, logvar = model.encode(x)
    kl = kl_divergence(mu, logvar, model.prior())
    with autocast(x.device):
        params = model.decoder(reparameterize(mu, logvar, noise))
    return -log_prob(params, x), kl


@torch.no_grad()
def iwae_bound(model: VAE, x: torch.Tensor, samples: int, generator: torch.Generator) -> torch.Tensor:
    """log 1/K Σ p(x|z) p(z) / q(z|x) of one image x (1, C, H, W), z from q (Burda et al. 2016, eq. 8)."""
    mu, logvar = model.encode(x)
    prior, weights = model.prior(), []
    for start in range(0, samples, 256):  # so many decoded images fit any memory
        noise = torch.randn(min(256, samples - start), mu.shape[1], generator=generator).to(x.device)
        z = reparameterize(mu, logvar, noise)
        log_q = -0.5 * (noise.square() + logvar).sum(1)  # like log_density without k/2 ln 2π, which cancels
        weights.append(log_prob(model.decoder(z), x) + log_density(z, prior) - log_q)
    return torch.cat(weights).logsumexp(0) - math.log(samples)


# ----------------------------------------------------------------------------------------------------------------------
# training and evaluation
# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def share_gradients(model: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
    """Sum the gradients, and `numbers` (loss, hits, stop flag), over all processes in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    message = torch.cat([g.flatten() for g in gradients] + [numbers])
    try:
        dist.all_reduce(message)
    except RuntimeError:  # gloo's word for a closed connection
        fail("another process of this run has ended. Give the same command again with --resume")
    parts = message.split([g.numel() for g in gradients] + [len(numbers)])
    for gradient, part in zip(gradients, parts, strict=False):
        gradient.copy_(part.view_as(gradient))
    return parts[-1]


def train(
    model: VAE, images: Split, args: argparse.Namespace, kl_weight: float, start: dict | None,
    save: Callable[[dict], None], bar: tqdm,
) -> tuple[VAE, list[dict]]:  # fmt: skip
    """Train `model` with reconstruction + λ KL; return the running average of its weights and the history.

    At the end the average's prior is fitted once more, if that helps the validation images.
    `start` is a state to go on from; `save` takes the state after each epoch and when a signal stops the run. A loss
    that is not finite goes back to the last epoch's end at half the learning rate, three times at most.
    """
    device = model.prior_mean.device
    rank, world = start_processes(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=args.lr, betas=(0.9, 0.99), fused=device.type != "mps")
    average = copy.deepcopy(model)  # of the weights over the last thousand steps: what is scored and kept
    at = {"epoch": 0, "batch": 0, "reconstruction": 0.0, "kl": 0.0, "seen": 0, "retries": 0}
    history: list[dict] = []

    def snapshot() -> dict:
        parts = {"at": at, "history": history, "model": model.state_dict(), "average": average.state_dict(),
                 "optimizer": optimizer.state_dict()}  # fmt: skip
        return copy.deepcopy(parts)

    def restore(state: dict) -> None:
        state = copy.deepcopy(state)
        at.update(state["at"])
        history[:] = state["history"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])

    good = (start or {}).get("good") or start or snapshot()  # the last epoch's end
    restore(start or good)
    per_epoch = math.ceil(len(images.train) / args.batch_size)
    bar.update(at["epoch"] * per_epoch + at["batch"])

    def annealed_weight(step: int) -> float:
        return kl_weight * min(1.0, step / max(1.0, args.warmup * per_epoch))

    catch_signals(finish_batch=True)
    while at["epoch"] < args.epochs:
        order = torch.randperm(len(images.train), generator=seed_all(args.seed, at["epoch"]))
        for batch in order.split(args.batch_size)[at["batch"] :]:
            step = at["epoch"] * per_epoch + at["batch"]
            generator = seed_all(args.seed, at["epoch"], step, at["retries"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.epochs * per_epoch, args.lr) * 0.5 ** at["retries"]
            annealed = annealed_weight(step)

            mine = slice(rank, None, world) if rank < len(batch) else slice(0, 1)  # this process's share
            weight = (rank < len(batch)) / len(batch)  # 0 where a small last batch left it none
            noise = torch.randn(len(batch), model.prior_mean.shape[1], generator=generator)[mine].to(device)
            x = to_pixels(augment(images.train[batch], generator)[mine].to(device))  # (B, C, H, W)
            reconstruction, kl = (term.sum() for term in elbo_terms(model, x, noise))
            optimizer.zero_grad()
            ((reconstruction + annealed * kl) * weight).backward()
            sums = torch.stack([reconstruction * weight, kl * weight, kl.new_tensor(len(stop_signals))]).detach()
            if world > 1:
                sums = share_gradients(model, sums)
            norm = nn.utils.clip_grad_norm_(learned, MAX_NORM)
            reconstruction, kl, stop = sums.tolist()

            if not math.isfinite(reconstruction + kl + norm.item()):
                retries = at["retries"] + 1
                facts = (f"reconstruction {reconstruction}, KL {kl}, gradient norm {norm.item()} in epoch "
                         f"{at['epoch'] + 1}, batch {at['batch'] + 1}")  # fmt: skip
                if retries > 3:
                    fail(f"{facts}, for the fourth time. Lower --lr (now {args.lr:g})")
                tqdm.write(f"warning   {facts}: back to the last epoch's end at half the learning rate")
                bar.update(-at["batch"])
                restore(good)
                at["retries"] = retries
                break
            optimizer.step()
            with torch.no_grad():
                pace = 1 - min(0.999, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), pace)
            at["reconstruction"] += reconstruction * len(batch)
            at["kl"] += kl * len(batch)
            at["seen"] += len(batch)
            at["batch"] += 1
            bar.update()
            bar.set_postfix_str(f"-ELBO {(at['reconstruction'] + at['kl']) / at['seen']:.1f}", refresh=False)
            if stop:
                save(snapshot() | {"good": good})
                raise KeyboardInterrupt
        else:  # the epoch ended without a break
            reconstruction, kl = at["reconstruction"] / at["seen"], at["kl"] / at["seen"]
            held_out = evaluate(average, images.validation[:], args.seed)
            if not math.isfinite(held_out["neg_elbo"] + reconstruction + kl):
                fail(f"-ELBO {held_out['neg_elbo']:g} on validation images after epoch {at['epoch'] + 1}. Lower --lr")
            annealed = annealed_weight((at["epoch"] + 1) * per_epoch - 1)
            history.append(
                {
                    "epoch": at["epoch"] + 1,
                    "kl_weight": annealed,
                    "train_loss": reconstruction + annealed * kl,
                    "train_reconstruction": reconstruction,
                    "train_kl": kl,
                    "validation_loss": held_out["reconstruction"] + annealed * held_out["kl"],
                    "validation_reconstruction": held_out["reconstruction"],
                    "validation_kl": held_out["kl"],
                }
            )
            at.update(epoch=at["epoch"] + 1, batch=0, reconstruction=0.0, kl=0.0, seen=0)
            good = snapshot()
            save(good)
    catch_signals(finish_batch=False)
    if kl_weight > 0 and args.prior == "learned":  # gradients may have left it nats away from its optimum
        fitted = copy.deepcopy(average)
        fitted.set_prior(fit_prior(average.prior(), *encode_images(average, images.train)))
        before, after = (evaluate(network, images.validation[:], args.seed)["kl"] for network in (average, fitted))
        if after < before:
            average = fitted
            print(f"prior     fitted to the training images' codes: validation KL {before:.2f} -> {after:.2f} nats")
    return average.eval(), history


@torch.no_grad()
def encode_images(model: VAE, images: Images) -> list[torch.Tensor]:
    """mu and logvar (N, k) of at most 8,192 of the images, in double precision on the CPU."""
    chosen = torch.randperm(len(images), generator=seed_all(len(images)))[:8192]
    posteriors = [model.encode(to_pixels(images[rows].to(model.prior_mean.device))) for rows in chosen.split(250)]
    return [torch.cat(parts).cpu().double() for parts in zip(*posteriors, strict=True)]


@torch.no_grad()
def evaluate(model: VAE, images: torch.Tensor, seed: int) -> dict:
    """Score uint8 images (N, C, H, W): means over them in nats, the pooled squared error, and each image's posterior.

    The error is that of the mean of p(x|z) with z drawn from q(z|x), not put at its mean.
    """
    device, generator = model.prior_mean.device, seed_all(seed)
    reconstruction = kl = error = 0.0
    posteriors, reconstructed = [], []
    for batch in images.split(250):
        x = to_pixels(batch.to(device))
        mu, logvar = model.encode(x)
        z = reparameterize(mu, logvar, torch.randn(mu.shape, generator=generator).to(device))
        params = model.decoder(z)
        reconstruction -= log_prob(params, x).sum().item()
        kl += kl_divergence(mu, logvar, model.prior()).sum().item()
        error += (mean(params).clamp(0, 1) - x).square().sum().item()
        posteriors.append(torch.cat([mu, logvar], 1).cpu())
        reconstructed.append(to_bytes(mean(params)))
    mu, logvar = torch.cat(posteriors).chunk(2, 1)
    count = len(images)
    return {
        "neg_elbo": (reconstruction + kl) / count,
        "reconstruction": reconstruction / count,
        "kl": kl / count,
        "bits_per_dim": (reconstruction + kl) / (count * math.prod(SHAPE) * math.log(2)) + BITS_OFFSET,
        "psnr_db": -10 * math.log10(max(error, 1e-9) / (count * math.prod(SHAPE))),
        "mu": mu,
        "logvar": logvar,
        "reconstructed": torch.cat(reconstructed),
    }


@torch.no_grad()
def describe_posterior(model: VAE, mu: torch.Tensor, logvar: torch.Tensor) -> dict:
    """How the posteriors (N, k) of N images fill the prior, in whitened coordinates u: mean 0, covariance I under p.

    A unit is active where the variance over images of its posterior mean is above 0.01 (Burda et al. 2016, section
    5.2). The aggregate posterior q(z) is the mixture of all N, and I(x; z) = E log q(z|x) / q(z) (Hoffman and Johnson
    2016), which N images, 2,000 at most here, can show up to ln N nats.
    """
    mu, logvar = mu[:2000].double(), logvar[:2000].double()  # the mixture's density takes N² distances
    count = len(mu)
    m, A = whitening(Prior(*(part.cpu().double() for part in model.prior())))
    mean_u, var_u = (mu - m) @ A.T, logvar.exp() @ A.square().T  # (N, k), the marginals of q(u|x)
    covariance = A @ logvar.exp().mean(0).diag() @ A.T + mean_u.T.cov(correction=0)
    noise = torch.randn(mu.shape, generator=seed_all(count)).double()
    z, precision = reparameterize(mu, logvar, noise), (-logvar).exp()
    square = z.square() @ precision.T - 2 * z @ (mu * precision).T + (mu.square() * precision).sum(1)
    log_mixture = (-0.5 * (square + logvar.sum(1))).logsumexp(1) - math.log(count)  # ln q(z) + k/2 ln 2π, (N,)
    log_q = -0.5 * (noise.square() + logvar).sum(1)
    return {
        "variance_of_mean": mean_u.var(0, correction=0),
        "kl_per_dimension": 0.5 * (mean_u.square() + var_u - 1 - var_u.log()).mean(0),
        "aggregate_mean": mean_u.mean(0),
        "aggregate_eigenvalues": torch.linalg.eigvalsh(covariance),
        "mutual_information": (log_q - log_mixture).mean().item(),
        "mean_u": mean_u,
        "var_u": var_u,
    }


# ----------------------------------------------------------------------------------------------------------------------
# figures
# ----------------------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, drawn without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1], (N, C, H, W) -> uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().byte().cpu()


def as_seen(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the model sees them: binary where LEVELS is 2."""
    return torch.cat([to_bytes(to_pixels(part)) for part in images.split(250)])


def tile(images: torch.Tensor, columns: int) -> np.ndarray:
    """uint8 images (N, C, H, W) -> one RGB image, `columns` beside each other, white lines between."""
    images = F.pad(images.expand(-1, 3, -1, -1), (1, 1, 1, 1), value=255)
    images = F.pad(images, (0,) * 7 + (-len(images) % columns,), value=255)
    rows = [torch.cat(list(row), -1) for row in images.split(columns)]
    return torch.cat(rows, -2).permute(1, 2, 0).numpy()


def show(panel, image: np.ndarray, title: str = "") -> None:
    panel.imshow(image, interpolation="nearest")
    panel.set_title(title, fontsize=9)
    panel.axis("off")


def plot_learning_curve(path: Path, history: list[dict], kl_weight: float) -> None:
    """Loss, reconstruction and KL by epoch; training (warped images, the step's own weights) and validation.

    The prior's last fit comes after all of it.
    """
    figure = new_figure(10, 3.4)
    epochs = [row["epoch"] for row in history]
    names = {"loss": f"reconstruction + λ KL, λ = {kl_weight:g}", "reconstruction": "-log p(x|z)", "kl": "KL"}
    for panel, (key, name) in zip(figure.subplots(1, 3), names.items(), strict=True):
        panel.plot(epochs, [row[f"train_{key}"] for row in history], ".-", label="training")
        panel.plot(epochs, [row[f"validation_{key}"] for row in history], ".-", label="validation")
        late = [row[f"{part}_{key}"] for row in history[len(history) // 20 :] for part in ("train", "validation")]
        margin = 0.05 * (max(late) - min(late)) + 1e-6
        panel.set_ylim(min(late) - margin, max(late) + margin)  # the first epochs would flatten all the others
        panel.set_xlabel("epoch")
        panel.set_ylabel("nats per image")
        panel.set_title(name, fontsize=10)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend()
    save_figure(figure, path)


def plot_pair(path: Path, left: torch.Tensor, right: torch.Tensor, names: tuple[str, str]) -> None:
    """Two tables of 64 images beside each other."""
    figure = new_figure(8, 4.3)
    for panel, images, name in zip(figure.subplots(1, 2), (left, right), names, strict=True):
        show(panel, tile(images[:64], 8), name)
    save_figure(figure, path)


@torch.no_grad()
def decode_mean(model: VAE, z: torch.Tensor) -> torch.Tensor:
    """The mean of p(x|z) as uint8 images."""
    device = model.prior_mean.device
    return torch.cat([to_bytes(mean(model.decoder(part))) for part in z.to(device).split(250)])


@torch.no_grad()
def draw_samples(model: VAE, count: int, seed: int) -> torch.Tensor:
    """The mean of p(x|z) for z from the prior, uint8 (count, C, H, W); of the same noise in every run."""
    return decode_mean(model, sample_prior(model.prior(), count, seed_all(seed, count)))


def interpolate(model: VAE, mu: torch.Tensor, rows: int, steps: int = 10) -> torch.Tensor:
    """Decode the straight lines from mu[0] to mu[1], mu[2] to mu[3], …, ends included: (rows * steps, C, H, W)."""
    share = torch.linspace(0, 1, steps)[None, :, None]  # (1, steps, 1)
    first, last = mu[0 : 2 * rows : 2, None], mu[1 : 2 * rows : 2, None]  # (rows, 1, k)
    return decode_mean(model, ((1 - share) * first + share * last).flatten(0, 1))


def plot_interpolation(path: Path, test: torch.Tensor, between: torch.Tensor, rows: int) -> None:
    """Each row: a real image, its code decoded, the way to the code of another, that decoded, the other real image."""
    lines = between.unflatten(0, (rows, -1))
    ends = test[: 2 * rows].unflatten(0, (rows, 2))
    table = torch.cat([ends[:, :1], lines, ends[:, 1:]], 1).flatten(0, 1)
    figure = new_figure(8, 0.68 * rows + 0.3)
    show(figure.subplots(), tile(table, lines.shape[1] + 2), "real | from one code to the other | real")
    save_figure(figure, path)


def plot_posterior(path: Path, image: torch.Tensor, again: torch.Tensor, mean_u, var_u) -> None:
    """One image and its reconstruction (C, H, W), with the mean and variance (k,) of its q(u|x) against N(0, I)."""
    figure = new_figure(9, 4.2)
    layout = figure.add_gridspec(2, 2, width_ratios=(1, 4))
    for row, (picture, name) in enumerate(((image, "real"), (again, "reconstructed"))):
        show(figure.add_subplot(layout[row, 0]), tile(picture[None], 1), name)
    order = var_u.argsort()
    for row, (values, prior, name) in enumerate(((mean_u, 0.0, "mean"), (var_u, 1.0, "variance"))):
        panel = figure.add_subplot(layout[row, 1])
        panel.bar(range(len(order)), values[order], width=1.0)
        panel.axhline(prior, color="tab:red", linewidth=1, label=f"prior: {prior:g}")
        panel.set_yscale("log" if name == "variance" else "linear")
        panel.set_ylabel(f"{name} of q(u|x)")
        panel.legend(loc="lower right")
    panel.set_xlabel("dimension of u, by variance")
    save_figure(figure, path)


def plot_collapse(path: Path, report: dict) -> None:
    """Which dimensions are used, for how many nats, and how near the aggregate posterior is to the prior."""
    figure = new_figure(10, 3.4)
    spread, nats, fit = figure.subplots(1, 3)
    spread.semilogy(report["variance_of_mean"].sort(descending=True).values.clamp_min(1e-8))
    active = int((report["variance_of_mean"] > 0.01).sum())
    spread.axhline(0.01, color="tab:red", linewidth=1, label=f"active above .01: {active}")
    spread.set_ylabel("variance over images of E[u|x]")
    nats.plot(report["kl_per_dimension"].sort(descending=True).values)
    nats.set_ylabel("KL of the marginal (nats)")
    fit.semilogy(report["aggregate_eigenvalues"].flip(0).clamp_min(1e-8), label="eigenvalues of its covariance")
    fit.plot(report["aggregate_mean"].abs().sort(descending=True).values.clamp_min(1e-8), label="|mean|")
    count, reach = len(report["mean_u"]), math.sqrt(len(report["aggregate_mean"]) / len(report["mean_u"]))
    fit.axhspan(max(1e-3, 1 - reach) ** 2, (1 + reach) ** 2, color="tab:red", alpha=0.15, linewidth=0,
                label=f"eigenvalues of {count} prior draws")  # fmt: skip
    fit.set_ylabel("aggregate posterior")
    for panel in (spread, nats, fit):
        panel.set_xlabel("dimension of u, sorted")
    spread.legend()
    fit.legend(fontsize=7, loc="lower left")
    save_figure(figure, path)


def plot_sweep(
    folder: Path, table: list[dict], models: list[VAE], test: torch.Tensor, args: argparse.Namespace
) -> None:
    """lambda-sheet.png: a column for each λ; rate-distortion.png: KL against reconstruction, a point for each."""
    figure = new_figure(2.6 * len(models) + 0.4, 14.5)
    grid = figure.subplots(7, len(models), squeeze=False, height_ratios=(4, 4, 4, 2.4, 2.2, 2.2, 2.4))
    for column, row, model in zip(grid.T, table, models, strict=True):
        scores = evaluate(model, test, args.seed)
        report = describe_posterior(model, scores["mu"], scores["logvar"])
        title = f"λ = {row['lambda']:g}\n{row['active_units']} active of {model.prior_mean.shape[1]}"
        show(column[0], tile(test[:36], 6), f"{title}\nreal")
        show(column[1], tile(scores["reconstructed"][:36], 6), f"reconstructed, {row['psnr_db']:.1f} dB")
        show(column[2], tile(draw_samples(model, 36, args.seed), 6), "samples from the prior")
        show(column[3], tile(interpolate(model, scores["mu"], 4, 8), 8), "between two images' codes")
        chosen = args.image % len(report["mean_u"])
        order = report["var_u"][chosen].argsort()
        for panel, key, prior in ((column[4], "mean_u", 0.0), (column[5], "var_u", 1.0)):
            panel.bar(range(len(order)), report[key][chosen][order], width=1.0)
            panel.axhline(prior, color="tab:red", linewidth=1)
            panel.set_ylabel("mean of q(u|x)" if prior == 0 else "variance of q(u|x)", fontsize=8)
        column[4].set_ylim(-5, 5)  # one scale for all columns, here and below
        column[5].set_yscale("log")
        column[5].set_ylim(1e-9, 10.0)
        column[5].set_xlabel(f"dimension, test image {chosen}", fontsize=8)
        with open(folder / f"lambda-{row['lambda']:g}" / "history.csv", encoding="utf-8") as file:
            history = list(csv.DictReader(file))
        for part in ("train", "validation"):
            curve = [float(line[f"{part}_reconstruction"]) for line in history]
            column[6].plot(range(1, len(curve) + 1), curve, ".-", label=part)
        column[6].set_xlabel("epoch", fontsize=8)
        column[6].set_ylabel("-log p(x|z) (nats)", fontsize=8)
        column[6].legend(fontsize=7)
    save_figure(figure, folder / "lambda-sheet.png")

    figure = new_figure(5, 4)
    panel = figure.subplots()
    panel.plot([row["kl"] for row in table], [row["reconstruction"] for row in table], "o-")
    for number, row in enumerate(table):  # above and below in turn: collapsed models share one point
        place, shift = (row["kl"], row["reconstruction"]), (5, 4 - 14 * (number % 2))
        panel.annotate(f"λ = {row['lambda']:g}", place, shift, textcoords="offset points")
    panel.set_xscale("symlog", linthresh=1.0)
    panel.margins(0.15)  # room for the names
    panel.set_xlabel("rate: KL (nats per test image)")
    panel.set_ylabel("distortion: -log p(x|z) (nats)")
    save_figure(figure, folder / "rate-distortion.png")


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def build_model(state: dict, key: str = "average") -> VAE:
    """The network that a checkpoint describes, with the weights that it holds under `key`."""
    count, pixels = state["settings"]["latent_dim"], math.prod(SHAPE)
    blank = LinearStart(torch.zeros(pixels), torch.zeros(count, pixels), torch.ones(count), *torch.ones(2))
    model = VAE(blank, state["settings"]["prior"] == "learned").to(memory_format=torch.channels_last)
    try:
        model.load_state_dict(state[key])
    except RuntimeError:
        fail(f"the checkpoint was trained by another version of {SCRIPT}.py. Train again without --resume")
    return model.eval()


def load_finished(folder: Path, device: torch.device) -> tuple[VAE, dict]:
    """The model of the finished run in `folder`, and its settings."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        fail(f"{folder}: no run there. Train first, or name its folder with --out and its λ with --lambda")
    state = load_checkpoint(path, SCRIPT, {})
    if "average" not in state:
        fail(f"{folder}: its run is not finished. Go on with it: --resume")
    return build_model(state).to(device), state["settings"]


def evaluate_file(args: argparse.Namespace, folder: Path) -> dict:
    """Score the model of the finished run in `folder` on every image of the file --evaluate."""
    begin = time.monotonic()
    model, settings = load_finished(folder, pick_device(args.device))
    images = load_images(args.evaluate, args.out)[0][:]
    scores = evaluate(model, images, settings["seed"])
    metrics = {key: scores[key] for key in ("neg_elbo", "reconstruction", "kl", "bits_per_dim", "psnr_db")}
    order = torch.randperm(len(images), generator=seed_all(args.seed))  # a file may be sorted by class
    mixed = {key: scores[key][order] for key in ("mu", "logvar")}
    metrics |= score_posterior(model, images[order], mixed, args)
    del metrics["kl_per_dimension"]
    metrics |= {"latent_dim": settings["latent_dim"], "parameters": count_parameters(model), "images": len(images),
                "seconds": time.monotonic() - begin}  # fmt: skip
    arrays = {"image": images, "reconstruction": scores["reconstructed"]}
    with atomic(folder / "reconstructions.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: channels_last_array(array) for name, array in arrays.items()})
    print(f"wrote     {folder}/reconstructions.npz")
    print(json.dumps(metrics))
    return metrics


def score_posterior(model: VAE, images: torch.Tensor, scores: dict, args: argparse.Namespace) -> dict:
    """The importance-weighted bound and the measures of posterior collapse, as metrics.json names them."""
    report = describe_posterior(model, scores["mu"], scores["logvar"])
    chosen = tqdm(images[: args.iwae_images], f"IWAE-{args.iwae}", unit="image", disable=None, leave=False)
    generator, device = seed_all(args.seed, args.iwae), model.prior_mean.device
    bounds = [iwae_bound(model, to_pixels(image[None].to(device)), args.iwae, generator).item() for image in chosen]
    eigenvalues = report["aggregate_eigenvalues"]
    return {
        "iwae": -sum(bounds) / len(bounds),
        "iwae_samples": args.iwae,
        "iwae_images": len(bounds),
        "active_units": int((report["variance_of_mean"] > 0.01).sum()),
        "kl_per_dimension": report["kl_per_dimension"].sort(descending=True).values.tolist(),
        "aggregate_mean_largest": report["aggregate_mean"].abs().max().item(),
        "aggregate_covariance_eigenvalues": [eigenvalues.min().item(), eigenvalues.max().item()],
        "mutual_information": report["mutual_information"],
        "mutual_information_limit": math.log(len(report["mean_u"])),
    }


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def channels_last_array(images: torch.Tensor) -> np.ndarray:
    """uint8 (N, C, H, W) -> (N, H, W) for grey, (N, H, W, 3) for colour."""
    return images.permute(0, 2, 3, 1).squeeze(-1).numpy()


def sample(args: argparse.Namespace, folder: Path) -> dict:
    """Draw --sample images from the finished run in `folder`: samples.npz, and a picture of them."""
    model, settings = load_finished(folder, pick_device(args.device))
    images = draw_samples(model, args.sample, args.seed)
    with atomic(folder / "samples.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, image=channels_last_array(images))
    with atomic(folder / f"samples-{args.sample}.png") as temporary:
        Image.fromarray(tile(images, math.ceil(math.sqrt(args.sample)))).save(temporary, format="png")
    print(f"wrote     {args.sample} images, the mean of p(x|z), z from the {settings['prior']} prior: "
          f"{folder}/samples.npz and samples-{args.sample}.png")  # fmt: skip
    return {"samples": args.sample}


def run(args: argparse.Namespace, images: Split, sha256: str, kl_weight: float) -> dict:
    """Train at one λ, score the test images, and leave everything in <out>/lambda-<λ>/."""
    begin = time.monotonic()
    device = pick_device(args.device)
    rank, world = start_processes(device)
    folder = args.out / f"lambda-{kl_weight:g}"
    kept = ("warmup", "prior", "latent_dim", "epochs", "batch_size", "lr", "seed", "limit")
    settings = {name: getattr(args, name) for name in kept} | {"lambda": kl_weight, "sha256": sha256}
    checkpoint, finished = folder / "checkpoint.pt", folder / "metrics.json"
    sweep = len(args.kl_weight) > 1
    state = None
    if checkpoint.exists() and (args.resume or sweep):
        state = load_checkpoint(checkpoint, SCRIPT, {} if sweep else settings)
        if state["settings"] != settings or not (args.resume or "metrics" in state):
            state = None
    if state and "metrics" in state:
        metrics = state["metrics"]
        print(f"finished  {folder} holds this run's end already, test -ELBO {metrics['neg_elbo']['test']:.2f} nats")
        if rank == 0 and not finished.exists():  # stopped between the two files
            write_json(finished, metrics)
        return metrics
    if world > 1:
        dist.barrier()  # until all have read what open_run may move away
    if rank == 0:
        open_run(folder, state is not None, describe_run(args, {"data": sha256}))
    state = state or {"script": SCRIPT, "settings": settings, "partial": None, "seconds": 0.0}
    earlier = state["seconds"]

    def save(partial: dict) -> None:
        state["partial"], state["seconds"] = partial, earlier + time.monotonic() - begin
        if rank == 0:
            with atomic(checkpoint) as temporary:
                torch.save(state, temporary)

    if state["partial"]:
        model = build_model(state | state["partial"], "model")
    else:
        start = principal_components(images.train, args.latent_dim, kl_weight)
        seed_all(args.seed)
        model = VAE(start, args.prior == "learned").to(memory_format=torch.channels_last)
    model = model.to(device)
    steps = args.epochs * math.ceil(len(images.train) / args.batch_size)
    quiet = None if rank == 0 else True
    with tqdm(total=steps, desc=f"λ = {kl_weight:g}", unit="batch", disable=quiet, leave=False) as bar:
        average, history = train(model, images, args, kl_weight, state["partial"], save, bar)

    metrics: dict = {}
    for name in ("train", "validation", "test"):
        part = getattr(images, name)
        scores = evaluate(average, part[: len(images.test)], args.seed)
        for key in ("neg_elbo", "reconstruction", "kl"):
            metrics.setdefault(key, {})[name] = scores[key]
    metrics |= {key: scores[key] for key in ("bits_per_dim", "psnr_db")}
    test = images.test[:]
    metrics |= score_posterior(average, test, scores, args)
    metrics |= {"lambda": kl_weight, "epochs": args.epochs, "latent_dim": args.latent_dim,
                "parameters": count_parameters(model), "seconds": earlier + time.monotonic() - begin}  # fmt: skip
    if rank == 0:
        leave_results(folder, average, test, scores, history, args, kl_weight)
        state |= {"partial": None, "average": average.cpu().state_dict(), "metrics": metrics}
        with atomic(checkpoint) as temporary:
            torch.save(state, temporary)
        write_json(finished, metrics)
        print(f"λ = {kl_weight:g}     -ELBO {metrics['neg_elbo']['test']:.2f} nats on {len(test)} test images "
              f"(training images {metrics['neg_elbo']['train']:.2f}): reconstruction "
              f"{metrics['reconstruction']['test']:.2f}, KL {metrics['kl']['test']:.2f}")  # fmt: skip
        print(f"          {metrics['bits_per_dim']:.3f} bits/dim, {metrics['psnr_db']:.2f} dB, "
              f"{metrics['active_units']} of {args.latent_dim} units active, {metrics['seconds']:.0f} s")  # fmt: skip
        print(f"wrote     figures, metrics.json and the model in {folder}/")
    return metrics


def leave_results(
    folder: Path, model: VAE, test: torch.Tensor, scores: dict, history: list[dict], args: argparse.Namespace,
    kl_weight: float,
) -> None:  # fmt: skip
    """history.csv and every figure of one run."""
    with atomic(folder / "history.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    report = describe_posterior(model, scores["mu"], scores["logvar"])
    chosen, rows = args.image % len(report["mean_u"]), min(8, len(test) // 2)
    real = as_seen(test)
    plot_learning_curve(folder / "learning-curve.png", history, kl_weight)
    plot_pair(folder / "reconstructions.png", real, scores["reconstructed"], ("real", "reconstructed"))
    figure = new_figure(5, 5.2)
    show(figure.subplots(), tile(draw_samples(model, 100, args.seed), 10), f"p(x|z), z from the {args.prior} prior")
    save_figure(figure, folder / "samples.png")
    plot_interpolation(folder / "interpolation.png", real, interpolate(model, scores["mu"], rows), rows)
    plot_posterior(folder / "posterior.png", real[chosen], scores["reconstructed"][chosen], report["mean_u"][chosen],
                   report["var_u"][chosen])  # fmt: skip
    plot_collapse(folder / "posterior-collapse.png", report)


def compare(args: argparse.Namespace, images: Split, metrics: list[dict]) -> None:
    """sweep.csv and the two figures that set the λs beside each other."""
    device = pick_device(args.device)
    folders = [args.out / f"lambda-{value:g}" for value in args.kl_weight]
    models = [load_finished(folder, device)[0] for folder in folders]
    columns = ("reconstruction", "kl", "neg_elbo")
    more = ("iwae", "iwae_samples", "iwae_images", "bits_per_dim", "psnr_db", "active_units", "mutual_information",
            "epochs")  # fmt: skip
    table = [
        {"lambda": value, **{key: row[key]["test"] for key in columns}} | {key: row[key] for key in more}
        for value, row in zip(args.kl_weight, metrics, strict=True)
    ]
    with atomic(args.out / "sweep.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    plot_sweep(args.out, table, models, as_seen(images.test[:]), args)
    print("     λ  reconstruction       KL    -ELBO  active units")
    for row in table:
        print(f"{row['lambda']:6g}  {row['reconstruction']:14.2f} {row['kl']:8.2f} {row['neg_elbo']:8.2f} "
              f"{row['active_units']:13d}")  # fmt: skip
    print(f"wrote     {args.out}/lambda-sheet.png, rate-distortion.png, sweep.csv")


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics; of a sweep, by λ."""
    if hasattr(sys.stdout, "reconfigure"):  # a λ is no reason to stop where the terminal or the log file has none
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    stop_signals.clear()
    if int(os.environ.get("RANK", 0)):  # of several processes the first one speaks
        if args.evaluate is not None or args.sample is not None:
            return {}  # and does alone what needs no training
        sys.stdout = io.StringIO()
    try:
        catch_signals(finish_batch=False)
        folder = args.out / f"lambda-{args.kl_weight[0]:g}"
        if args.evaluate is not None:
            return evaluate_file(args, folder)
        if args.sample is not None:
            return sample(args, folder)
        path = find_data(args.data)
        bundled = args.data is None and path.parent.name == "sample"
        print(f"data      {path}" + (f", the bundled sample. {SOURCE}" if bundled else ""))
        rank, _ = start_processes(pick_device(args.device))
        pixels, sha256 = load_images(path, args.out)
        images = split_images(pixels, args.seed, args.limit)
        metrics = [run(args, images, sha256, value) for value in args.kl_weight]
        if len(metrics) > 1 and rank == 0:
            compare(args, images, metrics)
        words = ("--sample", "100", "--out", str(args.out), "--lambda", f"{args.kl_weight[0]:g}")
        print(f"next      {shlex.join(['python', sys.argv[0], *words])}")
        by_weight = {f"{value:g}": row for value, row in zip(args.kl_weight, metrics, strict=True)}
        return by_weight if metrics[1:] else metrics[0]
    except KeyboardInterrupt:
        number = stop_signals[0] if stop_signals else signal.SIGINT
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        start = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"]] if "RANK" in os.environ else ["python"]
        print(f"stopped   go on with: {shlex.join([*start, sys.argv[0], *words, '--resume'])}")
        raise SystemExit(128 + number) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        while held_locks:
            os.close(held_locks.pop())


if __name__ == "__main__":
    main()
