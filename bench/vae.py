r"""How good the twin VAEs are: peers on the same images, samples judged, training speed.

    pip install -r bench/requirements.txt
    python bench/vae.py speed   digits --data data/TibetanMNIST.npz
    python bench/vae.py peers   digits --data data/TibetanMNIST.npz --seconds 300
    python bench/vae.py samples digits --data data/TibetanMNIST.npz --out runs/vae_mnist
    python bench/vae.py samples faces  --data data/anime-faces.zip --out runs/vae_anime \
        --cascade data/lbpcascade_animeface.xml
    python bench/vae.py mnist          --data mnist.npz --minutes 15

`samples` judges the finished run's samples: digits by a classifier that is trained here on the
labels, faces by OpenCV's cascade for anime faces
(https://github.com/nagadomi/lbpcascade_animeface). `mnist` trains the network of vae_mnist.py on
MNIST (the arrays x_train and x_test of Keras' mnist.npz) by the protocol of the papers, and ends
with one line of JSON. The others print a table.
"""

import copy
import json
import math
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributions as D
import torch.nn as nn
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vae_anime
import vae_mnist
from report import measure

TWINS = {"digits": vae_mnist, "faces": vae_anime}
SHAPES = {"digits": (1, 28, 28), "faces": (3, 64, 64)}
DIGITS = 10  # classes
CONFIDENT = 0.9


# Speed --------------------------------------------------------------------------------------------
class WarpedImages(Dataset):
    """Training images, each augmented on its own when it is asked for."""

    def __init__(self, script: ModuleType, images: Tensor, generator: Generator):
        self.script = script
        self.images = images
        self.generator = generator

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.script.augment(self.images[i : i + 1], self.generator)[0]


def run_script_epoch(script: ModuleType, model: nn.Module, images: dict[str, Tensor]) -> None:
    """Train for one epoch by the script's own loop, which validates and saves a checkpoint too."""
    with tempfile.TemporaryDirectory() as folder:
        config = script.Config(epochs=1, out=Path(folder))
        config.folder.mkdir(parents=True)
        script.train(copy.deepcopy(model), images, config, None, tqdm(disable=True))


def run_plain_epoch(
    script: ModuleType, model: nn.Module, images: dict[str, Tensor], one_by_one: bool
) -> None:
    """Train the same network for one epoch as a tutorial does: DataLoader, NCHW, plain Adam.

    Images are augmented by the batch as in the script, or `one_by_one` as by a usual Dataset.
    """
    config = script.Config()
    generator = Generator().manual_seed(0)
    items = images["train"]
    if one_by_one:
        items = WarpedImages(script, items, generator)
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)

    for batch in DataLoader(items, config.batch_size, shuffle=True):
        if not one_by_one:
            batch = script.augment(batch, generator)
        x = script.to_pixels(batch).contiguous()
        loss = sum(term.mean() for term in model(x, generator))

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), script.MAX_GRAD_NORM)
        optimizer.step()


def speed(kind: str, args: Namespace) -> None:
    """Print images per second of one epoch, all sides in turn, and the ratio of the medians."""
    script = TWINS[kind]
    config = script.Config()
    images = load_split(script, args.data, config)
    images["train"] = images["train"][: args.images]
    images["validation"] = images["validation"][:1]  # the plain loop does not validate

    torch.manual_seed(0)
    model = script.VAE(config.latent_dim)  # the same weights for every side
    model.mean_image.copy_(script.to_pixels(images["train"]).mean(0))
    ours = script.SCRIPT.name
    sides = {
        "plain": partial(run_plain_epoch, one_by_one=False),
        "plain, images augmented one by one": partial(run_plain_epoch, one_by_one=True),
        ours: run_script_epoch,
    }

    seconds = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run_epoch in sides.items():
            started = time.monotonic()
            run_epoch(script, model, images)
            seconds[name].append(time.monotonic() - started)

    count = len(images["train"])
    threads = torch.get_num_threads()
    print(f"{threads} threads, {count} images an epoch, {args.rounds} rounds in turn")
    print("| training | images a second (median; range) | ours over it |")
    print("| --- | --- | --- |")
    our_median = statistics.median(seconds[ours])
    for name, measured in seconds.items():
        median = statistics.median(measured)
        spread = f"{count / max(measured):.0f} to {count / min(measured):.0f}"
        print(f"| {name} | {count / median:.0f} ({spread}) | {median / our_median:.2f} |")


# Peers --------------------------------------------------------------------------------------------
class PeerVAE(nn.Module):
    """A VAE of others, with the script's likelihood so that nats compare.

    A subclass defines `encode`, x -> (mu, logvar), and `decode`, z -> logits of p(x|z)'s mean.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.shape = SHAPES[kind]
        self.binary = kind == "digits"
        self.log_sigma = nn.Parameter(torch.tensor(-1.0))  # of faces, one for all values

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstruction, -log p(x|z), and KL of each image, (B,) nats."""
        mu, logvar = self.encode(x)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        logits = self.decode(z)
        if self.binary:
            pixels = D.Bernoulli(logits=logits)
        else:
            pixels = D.Normal(logits.sigmoid(), self.log_sigma.exp())
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        return -pixels.log_prob(x).flatten(1).sum(1), kl


class ExampleVAE(PeerVAE):
    """The multilayer perceptron of pytorch/examples: D-400-20-400-D."""

    def __init__(self, kind: str):
        super().__init__(kind)
        pixels = math.prod(self.shape)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 400), nn.ReLU(), nn.Linear(400, 40)
        )
        self.decoder = nn.Sequential(
            nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, pixels), nn.Unflatten(1, self.shape)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class PythaeVAE(PeerVAE):
    """pythae's convolutional VAE."""

    def __init__(self, kind: str):
        super().__init__(kind)
        from pythae.models import VAEConfig
        from pythae.models.nn.benchmarks import celeba, mnist

        latent_dim = TWINS[kind].Config().latent_dim
        config = VAEConfig(input_dim=self.shape, latent_dim=latent_dim)
        if kind == "digits":
            self.encoder = mnist.Encoder_Conv_VAE_MNIST(config)
            self.decoder = mnist.Decoder_Conv_AE_MNIST(config)
        else:
            self.encoder = celeba.Encoder_Conv_VAE_CELEBA(config)
            self.decoder = celeba.Decoder_Conv_AE_CELEBA(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(x)
        return output.embedding, output.log_covariance

    def decode(self, z: Tensor) -> Tensor:
        image = self.decoder(z).reconstruction  # in [0, 1]
        return image.clamp(1e-6, 1 - 1e-6).logit()


PEERS = {"pytorch/examples' MLP": ExampleVAE, "pythae's convolutional VAE": PythaeVAE}


@torch.no_grad()
def neg_elbo(script: ModuleType, model: PeerVAE, images: Tensor) -> float:
    """The peer's mean -ELBO in nats, with the same noise each time."""
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in images.split(200):
            x = script.to_pixels(batch)
            if script is vae_anime:
                x = vae_anime.dequantize(x, torch.default_generator)
            reconstruction, kl = model(x)
            total += (reconstruction + kl).sum().item()
    return total / len(images)


def train_peer(
    script: ModuleType, model: PeerVAE, images: dict[str, Tensor], seconds: float
) -> tuple[int, dict[str, float]]:
    """Train a peer for so long. Return its epochs, and the -ELBO of its best epoch by validation.

    The -ELBO is that of validation and of test images.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    best = {"validation": math.inf, "test": math.inf}
    epochs = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        model.train()
        for batch in torch.randperm(len(images["train"])).split(64):
            if time.monotonic() > end:
                break
            reconstruction, kl = model(script.to_pixels(images["train"][batch]))
            optimizer.zero_grad()
            (reconstruction + kl).mean().backward()
            optimizer.step()

        epochs += 1
        model.eval()
        validation = neg_elbo(script, model, images["validation"])
        if validation < best["validation"]:
            best = {"validation": validation, "test": neg_elbo(script, model, images["test"])}
    return epochs, best


def peers(kind: str, args: Namespace) -> None:
    """Print the test -ELBO of each peer after --seconds of training.

    Then print how long our own training takes to pass each peer's figure on validation images.
    """
    script = TWINS[kind]
    images = load_split(script, args.data, script.Config())
    print("| model | parameters | epochs | test -ELBO (nats) | bits/dim |")
    print("| --- | --- | --- | --- | --- |")
    validation = {}
    for name, build in PEERS.items():
        torch.manual_seed(0)
        model = build(kind)
        epochs, best = train_peer(script, model, images, args.seconds)
        validation[name] = best["validation"]

        bits = best["test"] / math.prod(SHAPES[kind]) / math.log(2)
        if kind == "faces":
            bits += math.log2(255)  # as in vae_anime.py: from densities to 256 values
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"| {name} | {parameters:,} | {epochs} | {best['test']:.2f} | {bits:.3f} |", flush=True
        )

    history = train_ours(script, images, args.epochs)
    for name, target in validation.items():
        print(f"{name}: {when_passed(history, target)}")


def train_ours(script: ModuleType, images: dict[str, Tensor], epochs: int | None) -> list[dict]:
    """Train the script's default model. Return its history, which has the seconds of each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        config = script.Config(out=Path(folder))
        config = replace(config, epochs=epochs or config.epochs)
        config.folder.mkdir(parents=True)
        torch.manual_seed(script.seed_of(config.seed))
        model = script.VAE(config.latent_dim)
        model.mean_image.copy_(script.to_pixels(images["train"][:4096]).mean(0))
        return script.train(model, images, config, None, tqdm(disable=True))


def when_passed(history: list[dict], target: float) -> str:
    """Say when our -ELBO of validation images was first below the peer's."""
    for row in history:
        if row["validation_reconstruction"] + row["validation_kl"] < target:
            return f"passed after {row['seconds']:.0f} s, epoch {row['epoch']}"
    return "not passed"


# Samples ------------------------------------------------------------------------------------------
def samples(kind: str, args: Namespace) -> None:
    """Judge --count samples of the finished run, beside its test images and reconstructions."""
    if kind == "faces" and not (args.cascade and args.cascade.exists()):
        raise vae_anime.UserError("no cascade. Name lbpcascade_animeface.xml with --cascade")
    script = TWINS[kind]
    folder = (args.out or script.Config().out) / f"lambda-{args.kl_weight:g}"
    model, settings = script.load_finished(folder, torch.device("cpu"))
    config = script.Config(**settings)
    images = load_split(script, args.data, config)

    temperature = config.temperature if args.temperature is None else args.temperature
    sampled = script.sample_images(model, args.count, config.seed, temperature)
    if kind == "digits":
        _, per_image = script.evaluate(model, images["test"], config, refine=True)
        labels = load_labels(args.data)
        judge_digits(images, per_image["reconstructed"], sampled, labels, config)
    else:
        _, per_image = script.evaluate(model, images["test"], config)
        sets = {
            "real, others": images["validation"],
            "reconstructed": per_image["reconstructed"],
            f"sampled, temperature {temperature:g}": sampled,
        }
        judge_faces(images["test"], sets, args.cascade)


def load_split(
    script: ModuleType, data: Path, config: vae_mnist.Config | vae_anime.Config
) -> dict[str, Tensor]:
    """Read the images and split them as a run with these settings does.

    Raises the script's UserError if they are not the images that the run was trained on, since
    its test images would be others.
    """
    images, sha256 = script.load_images(data, config.fit)
    if config.data_sha256 not in ("", sha256):
        raise script.UserError(f"{data}: not the file that the run was trained on. Give that one")
    return script.split_images(images, config)


def load_labels(data: Path) -> Tensor:
    with np.load(data, allow_pickle=False) as arrays:
        if "label" not in arrays.files:
            raise vae_mnist.UserError(f"{data}: no array label in it, to train a classifier on")
        return torch.from_numpy(arrays["label"]).long()


def judge_digits(
    images: dict[str, Tensor],
    reconstructed: Tensor,
    sampled: Tensor,
    labels: Tensor,
    config: vae_mnist.Config,
) -> None:
    """Print the share of images classified with confidence, and how often each digit comes."""
    split_labels = vae_mnist.split_images(labels, config)  # as the images are
    classifier = train_classifier(images["train"], split_labels["train"])
    _, predicted = classify(classifier, images["test"])
    right = (predicted == split_labels["test"]).float().mean()
    print(f"classifier right on {right:.4f} of {len(predicted)} held-out digits")

    frequency = torch.bincount(labels, minlength=DIGITS) / len(labels)
    sets = {
        "real, held out": images["test"],
        "reconstructed": reconstructed,
        "**sampled**": sampled,
    }
    header = f"classified with confidence {CONFIDENT:g}"
    print(f"| digits | {header} | each digit's frequency over that in the data |")
    print("| --- | --- | --- |")
    for name, some in sets.items():
        confidence, predicted = classify(classifier, some)
        confident = (confidence >= CONFIDENT).float().mean()
        ratio = torch.bincount(predicted, minlength=DIGITS) / len(some) / frequency
        spread = f"{ratio.min():.2f} to {ratio.max():.2f}"
        print(f"| {name} ({len(some)}) | {confident:.3f} | {spread} |")


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 20) -> nn.Module:
    """Train a small convolutional network on augmented digits."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))
        layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU())
    classifier = nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, DIGITS)
    )

    optimizer = torch.optim.Adam(classifier.parameters())
    total_steps = epochs * math.ceil(len(images) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps)
    generator = Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            x = vae_mnist.to_pixels(vae_mnist.augment(images[batch], generator))
            loss = F.cross_entropy(classifier(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return confidence and class of each image, (N,) each."""
    logits = [classifier(vae_mnist.to_pixels(batch)) for batch in images.split(250)]
    confidence, predicted = torch.cat(logits).softmax(1).max(1)
    return confidence, predicted


def judge_faces(real: Tensor, sets: dict[str, Tensor], cascade: Path) -> None:
    """Print the distances of patches from those of real images, and the share with a face."""
    import cv2

    detector = cv2.CascadeClassifier(str(cascade))
    real = real.permute(0, 2, 3, 1).numpy()  # (N, 64, 64, 3)
    print("| images | patches at 64 | 32 | 16 | mean | face |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, images in sets.items():
        images = images.permute(0, 2, 3, 1).numpy()
        count = min(len(images), len(real))
        distances = []
        for some, others in zip(pyramid(images[:count]), pyramid(real[:count]), strict=True):
            distances.append(patch_distance(some, others))
        distances.append(np.mean(distances))

        with_face = 0
        for image in images:
            grey = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
            with_face += len(detector.detectMultiScale(grey, 1.05, 3, minSize=(24, 24))) > 0

        cells = [f"{distance:.1f}" for distance in distances]
        cells.append(f"{with_face / len(images):.3f}")
        print(f"| {name} ({len(images)}) | {' | '.join(cells)} |")


def pyramid(images: np.ndarray) -> list[np.ndarray]:
    """The Laplacian pyramid of images (N, 64, 64, 3): levels 64 and 32 wide, and the rest at 16."""
    import cv2

    levels = []
    current = [image.astype(np.float32) for image in images]
    for _ in range(2):
        coarser = [cv2.pyrDown(image) for image in current]
        details = []
        for image, smaller in zip(current, coarser, strict=True):
            details.append(image - cv2.pyrUp(smaller))
        levels.append(np.stack(details))
        current = coarser
    levels.append(np.stack(current))
    return levels


def patch_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Sliced Wasserstein distance x 1000 between the 7 x 7 patches of two sets (N, H, W, 3).

    Patches are projected on random directions. Along one, the distance is that of the sorted
    values (Karras et al. 2018, section 5).
    """
    rng = np.random.default_rng(9)
    directions = rng.standard_normal((7 * 7 * 3, 256)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    first = np.sort(random_patches(one, seed=0) @ directions, axis=0)
    second = np.sort(random_patches(other, seed=1) @ directions, axis=0)
    return 1000 * np.abs(first - second).mean().item()


def random_patches(images: np.ndarray, seed: int) -> np.ndarray:
    """Cut 64 patches from each image (N, H, W, 3), each colour standardized over the set.

    Returns them as (64 N, 7 * 7 * 3).
    """
    rng = np.random.default_rng(seed)
    count = len(images)
    rows, columns = rng.integers(0, images.shape[1] - 6, (2, count, 64, 1, 1))
    rows = rows + np.arange(7)[:, None]  # (N, 64, 7, 1)
    columns = columns + np.arange(7)  # (N, 64, 1, 7)
    patches = images[np.arange(count)[:, None, None, None], rows, columns]  # (N, 64, 7, 7, 3)
    mean = patches.mean((0, 1, 2, 3))
    std = patches.std((0, 1, 2, 3))
    return ((patches - mean) / std).reshape(-1, 7 * 7 * 3)


# MNIST --------------------------------------------------------------------------------------------
def binarize(grey: Tensor, generator: Generator) -> Tensor:
    """Turn each pixel on with the probability of its grey value (Salakhutdinov and Murray 2008)."""
    return 255 * (255 * torch.rand(grey.shape, generator=generator) < grey).byte()


def train_mnist(
    model: vae_mnist.VAE, grey: Tensor, config: vae_mnist.Config, seconds: float
) -> None:
    """Train for so many seconds on images that are binarized anew for each step.

    This is the loop of vae_mnist.py, without its warps: so many images need none.
    """
    optimizer = torch.optim.Adam(model.parameters(), betas=vae_mnist.ADAM_BETAS, fused=True)
    generator = vae_mnist.random_generator(config.seed, "mnist")
    bar = tqdm(total=round(seconds), unit="s")
    started = time.monotonic()
    elapsed = 0.0
    while elapsed < seconds:
        for batch in torch.randperm(len(grey), generator=generator).split(config.batch_size):
            x = vae_mnist.to_pixels(binarize(grey[batch], generator))
            reconstruction, kl = model(x, generator)
            optimizer.zero_grad()
            (reconstruction + kl).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), vae_mnist.MAX_GRAD_NORM)
            optimizer.param_groups[0]["lr"] = vae_mnist.learning_rate(elapsed, seconds, config.lr)
            optimizer.step()

            elapsed = time.monotonic() - started
            bar.n = min(round(elapsed), round(seconds))
            bar.update(0)
            if elapsed >= seconds:
                break
    bar.close()


def mnist(args: Namespace) -> None:
    """Print the negative ELBO and the IWAE bound of MNIST's test images, in nats, as JSON."""
    with np.load(args.data, allow_pickle=False) as arrays:
        grey = torch.from_numpy(arrays["x_train"])[:, None]  # (60000, 1, 28, 28)
        test = torch.from_numpy(arrays["x_test"])[:, None]
    generator = vae_mnist.random_generator("mnist")  # the same binary images for each seed
    order = torch.randperm(len(grey), generator=generator)
    test = binarize(test, generator)
    images = {"validation": binarize(grey[order[:5000]], generator)}
    grey = grey[order[5000:]]
    images["train"] = binarize(grey[: vae_mnist.PRIOR_IMAGES], generator)

    config = vae_mnist.Config(seed=args.seed)
    torch.manual_seed(vae_mnist.seed_of(config.seed))
    model = vae_mnist.VAE(config.latent_dim)
    parameters = sum(p.numel() for p in model.parameters())
    model.mean_image.copy_(vae_mnist.to_pixels(images["train"]).mean(0))
    started = time.monotonic()
    train_mnist(model, grey, config, 60 * args.minutes)
    vae_mnist.fit_prior(model, images, config)
    seconds = time.monotonic() - started

    scores = measure.score(vae_mnist, model, test, config)
    bounds = measure.measure_iwae(vae_mnist, model, test, config)
    row = {
        "neg_elbo": scores["neg_elbo"],
        "iwae": bounds["iwae"],
        "iwae_neg_elbo": bounds["iwae_neg_elbo"],  # on the same images as iwae
        "iwae_images": bounds["iwae_images"],
        "seconds": seconds,  # of training and fitting the prior
        "parameters": parameters,
        "seed": config.seed,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row))


COMMANDS: dict[str, Callable[[str, Namespace], None]] = {
    "speed": speed,
    "peers": peers,
    "samples": samples,
}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("command", choices=(*COMMANDS, "mnist"))
    add("kind", choices=tuple(TWINS), nargs="?", default="digits", help="[%(default)s]")
    add("--data", type=Path, required=True, help="the images")
    add("--out", type=Path, metavar="DIR", help="for samples: the script's --out")
    add("--lambda", type=float, default=1.0, dest="kl_weight", help="for samples [%(default)g]")
    add("--count", type=int, default=1000, help="for samples: how many to judge [%(default)s]")
    add("--temperature", type=float, help="for samples [the script's default]")
    add("--cascade", type=Path, help="for samples of faces: lbpcascade_animeface.xml")
    add("--seconds", type=float, default=300.0, help="for peers: training of each [%(default)g]")
    add("--epochs", type=int, help="for peers: of our training [the script's default]")
    add("--rounds", type=int, default=5, help="for speed [%(default)s]")
    add("--minutes", type=float, default=15.0, help="for mnist: of training [%(default)g]")
    add("--seed", type=int, default=0, help="for mnist [%(default)s]")
    add("--images", type=int, default=2000, help="for speed: an epoch's [%(default)s]")
    args = parser.parse_args(argv)
    try:
        if args.command == "mnist":
            mnist(args)
        else:
            COMMANDS[args.command](args.kind, args)
    except (vae_mnist.UserError, vae_anime.UserError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
