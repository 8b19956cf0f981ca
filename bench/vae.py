r"""What the twin VAEs are worth: peers on the same images, samples judged, a step's speed, in turn.

    pip install -r bench/requirements.txt
    python bench/vae.py speed   digits --data data/TibetanMNIST.npz
    python bench/vae.py peers   digits --data data/TibetanMNIST.npz --seconds 300
    python bench/vae.py samples digits --data data/TibetanMNIST.npz --out runs/vae_mnist
    python bench/vae.py samples faces  --data data/anime-faces.zip --out runs/vae_anime \
        --cascade data/lbpcascade_animeface.xml

`samples` judges the finished run's draws from its prior: digits by a classifier trained here on the
labels, faces by OpenCV's cascade for anime faces (https://github.com/nagadomi/lbpcascade_animeface).
Each prints a table.
"""

import argparse
import contextlib
import copy
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vae_anime
import vae_mnist

TWINS = {"digits": vae_mnist, "faces": vae_anime}


def epoch_of_ours(t, split, args) -> None:
    """One epoch of the script's own training loop, and its look at one validation image."""
    model, state = copy.deepcopy(args.start), {"history": []}
    with t.tqdm(disable=True) as bar:
        t.train(model, split, args, state, lambda state: None, bar)


def epoch_of_plain(t, split, args, warp_items: bool) -> None:
    """The same network, warps and losses as a tutorial trains them: DataLoader, float32, NCHW.

    With `warp_items` each image is warped as the Dataset hands it out; else the batch is, as here.
    """
    generator = torch.Generator().manual_seed(0)

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return len(split["train"])

        def __getitem__(self, i):
            return (
                t.augment(split["train"][i : i + 1], generator)[0]
                if warp_items
                else split["train"][i]
            )

    model = copy.deepcopy(args.start).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    for batch in DataLoader(Items(), args.batch_size, shuffle=True):
        x = t.to_pixels(batch if warp_items else t.augment(batch, generator)).contiguous()
        loss = sum(term.mean() for term in model(x))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), t.MAX_NORM)
        optimizer.step()


def speed(t, split, args) -> None:
    """Images a second of one epoch, both sides in turn, the ratio of the medians."""
    split = split | {"train": split["train"][: args.images], "validation": split["validation"][:1]}
    args.epochs, args.kl_weight = 1, 1.0
    t.seed_all(0)
    args.start = t.VAE(args.latent_dim, True)  # the same weights for every side
    args.start.mean_image.copy_(t.to_pixels(split["train"]).mean(0))
    sides = {
        "plain": partial(epoch_of_plain, warp_items=False),
        "plain, images warped one by one": partial(epoch_of_plain, warp_items=True),
        t.SCRIPT: epoch_of_ours,
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, side in sides.items():
            begin = time.monotonic()
            side(t, split, args)
            seconds.setdefault(name, []).append(time.monotonic() - begin)
    print(
        f"{torch.get_num_threads()} threads, {len(split['train'])} images an epoch, "
        f"{args.rounds} rounds in turn"
    )
    print("| training | images a second (median; range) | ours over it |\n| --- | --- | --- |")
    for name, measured in seconds.items():
        low, middle, high = (
            len(split["train"]) / f(measured) for f in (max, statistics.median, min)
        )
        ratio = statistics.median(measured) / statistics.median(seconds[t.SCRIPT])
        print(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {ratio:.2f} |")


def as_pixels(logits, log_sigma):
    """p(x|z) as the twins have it: of digits Bernoulli, of faces Gaussian with one σ."""
    if logits.shape[1] == 1:
        return torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 3)
    return vae_anime.Pixels(logits.sigmoid(), log_sigma.exp(), logits)


class ExampleVAE(nn.Module):
    """The multilayer perceptron of pytorch/examples: D-400-20-400-D; for faces with one σ."""

    def __init__(self, t):
        super().__init__()
        pixels = math.prod(t.SHAPE)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 400), nn.ReLU(), nn.Linear(400, 40)
        )
        self.network = nn.Sequential(
            nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, pixels), nn.Unflatten(1, t.SHAPE)
        )
        self.log_sigma = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        logits = self.network(mu + (logvar / 2).exp() * torch.randn_like(mu))
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        return as_pixels(logits, self.log_sigma), kl


class PythaeVAE(nn.Module):
    """pythae's convolutional VAE, its losses replaced by ours so that nats compare."""

    def __init__(self, t):
        super().__init__()
        from pythae.models import VAEConfig
        from pythae.models.nn.benchmarks import celeba, mnist

        config = VAEConfig(input_dim=t.SHAPE, latent_dim=min(t.LATENT_DIM, 256))
        if t is vae_mnist:
            self.encoder, self.decoder = (
                mnist.Encoder_Conv_VAE_MNIST(config),
                mnist.Decoder_Conv_AE_MNIST(config),
            )
        else:
            self.encoder, self.decoder = (
                celeba.Encoder_Conv_VAE_CELEBA(config),
                celeba.Decoder_Conv_AE_CELEBA(config),
            )
        self.log_sigma = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        code = self.encoder(x)
        mu, logvar = code.embedding, code.log_covariance
        image = self.decoder(
            mu + (logvar / 2).exp() * torch.randn_like(mu)
        ).reconstruction  # in [0, 1]
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        return as_pixels(image.clamp(1e-6, 1 - 1e-6).logit(), self.log_sigma), kl


def peers(t, split, args) -> None:
    """Test -ELBO of each peer after --seconds of training, its best epoch by validation.

    Then how long our own training takes to pass the peer's figure on validation images.
    """

    def score(model, images) -> float:
        with torch.no_grad():
            total = 0.0
            for batch in images.split(200):
                x = t.to_pixels(batch)
                pixels, kl = model(x)
                total += (kl - pixels.log_prob(x)).sum().item()
        return total / len(images)

    print(
        "| model | parameters | epochs | test -ELBO (nats) | bits/dim |\n"
        "| --- | --- | --- | --- | --- |"
    )
    bests = {}
    for name, build in {
        "pytorch/examples' MLP": ExampleVAE,
        "pythae's convolutional VAE": PythaeVAE,
    }.items():
        t.seed_all(0)
        model, epochs, best, test = build(t), 0, math.inf, math.inf
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        begin = time.monotonic()
        while time.monotonic() < begin + args.seconds:
            model.train()
            for batch in torch.randperm(len(split["train"])).split(64):
                if time.monotonic() > begin + args.seconds:
                    break
                x = t.to_pixels(split["train"][batch])
                pixels, kl = model(x)
                optimizer.zero_grad()
                (kl - pixels.log_prob(x)).mean().backward()
                optimizer.step()
            epochs += 1
            model.eval()
            if (now := score(model, split["validation"])) < best:
                best, test = now, score(model, split["test"])
        bits = test / math.prod(t.SHAPE) / math.log(2) + (8 if t is vae_anime else 0)
        bests[name] = best
        parameters = sum(p.numel() for p in model.parameters())
        print(f"| {name} | {parameters:,} | {epochs} | {test:.2f} | {bits:.3f} |", flush=True)
    race(t, split, args, bests)


class Passed(Exception):
    """Every peer's figure is passed."""


def race(t, split, args, bests: dict[str, float]) -> None:
    """Seconds until our training with its default settings is better than each of `bests`."""
    begin, args.kl_weight = time.monotonic(), 1.0
    t.seed_all(0)
    model = t.VAE(args.latent_dim, True)
    model.mean_image.copy_(t.to_pixels(split["train"][:4096]).mean(0))

    def passed(state: dict) -> None:
        last = state["history"][-1]
        now = last["validation_reconstruction"] + last["validation_kl"]
        for name in [name for name, best in bests.items() if now < best]:
            seconds = time.monotonic() - begin
            print(f"{name}: passed after {seconds:.0f} s, epoch {last['epoch']}", flush=True)
            del bests[name]
        if not bests:
            raise Passed

    with t.tqdm(disable=True) as bar, contextlib.suppress(Passed):
        t.train(model, split, args, {"history": []}, passed, bar)


def judge_digits(t, split, args, model, draws: torch.Tensor) -> None:
    """Share of images told with confidence .9, and how often each digit comes."""
    labels = np.load(args.data, allow_pickle=False)["label"]
    dealt = t.split_images(labels, 0, None)  # as the images are
    labels = torch.from_numpy(labels)
    t.seed_all(0)
    layers = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    classifier = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))
    optimizer = torch.optim.Adam(classifier.parameters())
    epochs, per_epoch = 20, math.ceil(len(split["train"]) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * per_epoch)
    for epoch in range(epochs):
        for step, batch in enumerate(torch.randperm(len(split["train"])).split(64)):
            x = t.to_pixels(t.augment(split["train"][batch], t.seed_all(epoch, step)))
            loss = F.cross_entropy(classifier(x), dealt["train"][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()

    @torch.no_grad()
    def tell(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.cat([classifier(t.to_pixels(part)) for part in images.split(250)])
            .softmax(1)
            .max(1)
        )

    right = (tell(split["test"])[1] == dealt["test"]).float().mean()
    print(f"classifier right on {right:.4f} of {len(split['test'])} held-out digits")
    again = t.evaluate(model, split["test"], args, True)[1]["again"]
    print("| digits | told with confidence .9 | each digit's frequency over that in the data |")
    print("| --- | --- | --- |")
    sets = {"real, held out": split["test"], "reconstructed": again, "**drawn**": draws}
    for name, images in sets.items():
        confidence, digit = tell(images)
        counts = torch.bincount(digit, minlength=10) / len(images)
        share = counts / (torch.bincount(labels, minlength=10) / len(labels))
        spread = f"{share.min():.2f} to {share.max():.2f}"
        told = (confidence >= 0.9).float().mean()
        print(f"| {name} ({len(images)}) | {told:.3f} | {spread} |")


def scales(images: np.ndarray) -> list[np.ndarray]:
    """Detail at 64 x 64 and at 32 x 32 that the next coarser scale lacks, and the 16 x 16 rest."""
    import cv2

    found, now = [], [image.astype(np.float32) for image in images]
    for _ in range(2):
        coarser = [cv2.pyrDown(image) for image in now]
        finer = [a - cv2.pyrUp(b) for a, b in zip(now, coarser, strict=True)]
        found, now = [*found, np.stack(finer)], coarser
    return [*found, np.stack(now)]


def patch_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Sliced Wasserstein distance x 1000 between the 7 x 7 patches of two sets (N, H, W, 3).

    Karras et al. 2018, section 5: 64 patches an image, each colour standardised over its set,
    projected on 256 random directions; along one the distance is that of the sorted values.
    """
    projected = []
    for seed, images in enumerate((one, other)):
        rng, count = np.random.default_rng(seed), len(images)
        rows, columns = rng.integers(0, images.shape[1] - 6, (2, count, 64, 1, 1))
        rows, columns = rows + np.arange(7)[:, None], columns + np.arange(7)
        patches = images[np.arange(count)[:, None, None, None], rows, columns]
        patches = (patches - patches.mean((0, 1, 2, 3))) / patches.std((0, 1, 2, 3))
        directions = np.random.default_rng(9).standard_normal((7 * 7 * 3, 256)).astype(np.float32)
        flat = patches.reshape(-1, 7 * 7 * 3) @ (directions / np.linalg.norm(directions, axis=0))
        projected.append(np.sort(flat, 0))
    return 1000 * np.abs(projected[0] - projected[1]).mean().item()


def judge_faces(t, split, args, model, draws: torch.Tensor) -> None:
    """Distances of patches from held-out photographs at three scales, and share with a face."""
    import cv2

    cascade = cv2.CascadeClassifier(str(args.cascade))
    again = t.evaluate(model, split["test"], args, True)[1]["again"]
    real = split["test"].permute(0, 2, 3, 1).numpy()
    print(
        "| images | patches at 64 | 32 | 16 | mean | face |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, images in {
        "real, others": split["validation"],
        "reconstructed": again,
        f"drawn, temperature {args.temperature:g}": draws,
    }.items():
        images = images.permute(0, 2, 3, 1).numpy()
        count = min(len(images), len(real))
        pairs = zip(scales(images[:count]), scales(real[:count]), strict=True)
        distances = [patch_distance(*pair) for pair in pairs]
        greys = [cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) for image in images]
        boxes = [cascade.detectMultiScale(grey, 1.05, 3, minSize=(24, 24)) for grey in greys]
        found = [len(box) > 0 for box in boxes]
        columns = [f"{value:.1f}" for value in [*distances, np.mean(distances)]]
        print(f"| {name} ({len(images)}) | {' | '.join(columns)} | {np.mean(found):.3f} |")


def samples(t, split, args) -> None:
    """Judge --count draws from the finished run's prior."""
    model, settings = t.load_finished(args.out / f"lambda-{args.kl_weight:g}", torch.device("cpu"))
    args.seed = settings["seed"]
    draws = t.draw_samples(model, args.count, args)
    (judge_digits if t is vae_mnist else judge_faces)(t, split, args, model, draws)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("speed", "peers", "samples"))
    parser.add_argument("kind", choices=tuple(TWINS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the script's --out, for samples")
    parser.add_argument("--lambda", type=float, default=1.0, dest="kl_weight")
    parser.add_argument("--count", type=int, default=1000, help="samples to judge")
    parser.add_argument("--temperature", type=float, help="of the draws, if not the script's own")
    parser.add_argument("--cascade", type=Path, help="lbpcascade_animeface.xml")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training for each peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000, help="an epoch of the speed comparison")
    own = parser.parse_args()
    t = TWINS[own.kind]
    args = argparse.Namespace(**vars(t.parse_args([])) | vars(own))
    if own.temperature is None:
        args.temperature = t.TEMPERATURE
    args.out = own.out or Path("runs") / t.SCRIPT
    images, _ = t.load_images(args.data)
    split = t.split_images(images, 0, None)
    {"speed": speed, "peers": peers, "samples": samples}[own.what](t, split, args)


if __name__ == "__main__":
    main()
