# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.7",
#     "pandas>=2.2",
#     "matplotlib>=3.7",
#     "tqdm>=4.66",
#     "filelock>=3.12",
#     "nltk>=3.8",
# ]
# ///
"""Turn English verbs into other tenses, and invent verbs, with a conditional sequence VAE.

The encoder maps a verb x_i in tense c_i to q(z|x_i, c_i), a Gaussian over latents z. From z the
decoder spells x_j, the same verb in any tense c_j. For every q, by Jensen's inequality (Sohn et
al. 2015, eq. 4; Kingma and Welling 2014, eq. 3),

    log p(x_j|c_j) = log E_q(z|x_i,c_i) [p(x_j|z,c_j) p(z) / q(z|x_i,c_i)]
                  >= E_q(z|x_i,c_i) [log p(x_j|z,c_j)] - KL(q(z|x_i,c_i) || p(z)),  p(z) = N(0, I)
    loss           = reconstruction + w KL        in nats per word; w follows --kl-schedule, to .3

z does not depend on c_j, so one latent has to serve all four tenses: it holds the verb and not its
form. In the last 60% of training a second term is added to the loss: the decoder also learns to
spell samples from N(0, I), each as the verb whose latent it most likely is (`prior_loss`).

Usage:

    python lab4/cvae.py                            train on the files in data/, or the sample
    python lab4/cvae.py --holdout 100              score 100 verbs that it was not trained on
    python lab4/cvae.py --convert carry --to past  convert a verb with the trained model
    python lab4/cvae.py --generate 10              decode samples from N(0, I)
    python lab4/cvae.py --interpolate carry send   decode latents on the line between two verbs

A run leaves tables, a figure, metrics.json and a checkpoint in runs/cvae/. On the course's 1,212
verbs (six minutes with two CPU threads, mean of five seeds) BLEU-4 is 1.000, and 80% of 10,000
samples are training verbs. With --holdout 100, 87% of conversions of held-out verbs are exact.
"""

import codecs
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import zipfile
import zlib
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # how long OpenMP threads spin before they sleep
os.environ["MPLBACKEND"] = "agg"  # a notebook's ! command passes on a backend not installed here

import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from torch import Generator, Tensor, nn
from torch.distributions import Normal
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import tqdm

SCRIPT = Path(globals().get("__file__", "cvae.py")).resolve()  # a notebook has no __file__
SOURCE = "The real train.txt and test.txt are the course's files; put them into data/"
CHECKPOINT_VERSION = "cvae 4"  # increase it whenever the network changes

# Data
TENSES = ("present", "third-person", "progressive", "past")  # the columns of train.txt
SHORT_TENSES = {"sp": 0, "tp": 1, "pg": 2, "p": 3}  # in the third column of test.txt: sp->p
ALPHABET = "^abcdefghijklmnopqrstuvwxyz$"  # ^ stands before a word and is the padding, $ ends it
START = 0  # the number of ^
MAX_LETTERS = 20  # the longest word in the course's file has 15
WORD = rf"([a-z]{{1,{MAX_LETTERS}}})"

# Network
LETTER_DIM = 64
TENSE_DIM = 16

# Optimization
MAX_GRAD_NORM = 1.0
KL_RAMP = 0.3  # the KL weight grows in this share of training, or of each cycle
PRIOR_FROM = 0.4  # the decoder is trained on prior samples after this share of the epochs

# What torch.load raises over a file that is damaged or not a checkpoint
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    OverflowError,
    MemoryError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


# Same in all four scripts
class UserError(Exception):
    """A mistake that the user can fix. `main` prints it as one line, without a traceback."""


@dataclass(frozen=True)
class Config:
    """The settings of a run; each is explained at its flag in `parse_args`."""

    latent_dim: int = 4
    hidden_dim: int = 256
    epochs: int = 150
    batch_size: int = 64
    lr: float = 4e-3
    kl_schedule: str = "monotonic"
    kl_cycles: int = 4
    kl_max: float = 0.3
    invented: float = 0.0
    prior_draws: float = 1.0
    teacher_forcing: float = 0.9
    seed: int = 0
    limit: int | None = None
    holdout: int = 0
    train_sha256: str = ""  # known once the data is read
    test_sha256: str = ""

    data: Path | None = None
    out: Path = Path("runs/cvae")
    resume: bool = False
    convert: str | None = None
    from_tense: str = "present"
    to_tense: str = "past"
    generate: int | None = None
    interpolate: list[str] | None = None
    device: str = "auto"

    @property
    def settings(self) -> dict:
        """What decides the result. A run can only be resumed with the same settings."""
        free = (
            "data",
            "out",
            "resume",
            "convert",
            "from_tense",
            "to_tense",
            "generate",
            "interpolate",
            "device",
        )
        return {name: value for name, value in asdict(self).items() if name not in free}


# By default a latent holds some eight nats. That is enough to say which training verb it is (there
# are 1,212, and ln 1212 = 7.1), and so little that the posteriors fill N(0, I), whose samples are
# therefore verbs. For a held-out verb the latent has to hold all its letters. This takes far more
# nats, and is learned from invented verbs. So --holdout changes these defaults:
HOLDOUT_DEFAULTS = {
    "latent_dim": 48,
    "kl_max": 0.02,
    "invented": 3.0,
    "prior_draws": 0.0,
    "epochs": 80,
    "batch_size": 32,
    "lr": 3e-3,
}


# Data: verbs -> letters -> integers -> batches ----------------------------------------------------
Verb = tuple[str, ...]  # its four forms in the order of TENSES


class Conversion(NamedTuple):
    """A question for the model: `word` is in `source_tense`; what is it in `target_tense`?"""

    word: str
    target: str
    source_tense: int
    target_tense: int


class Verbs(NamedTuple):
    """What the two files hold, split by --holdout."""

    train: list[Verb]
    held_out: list[Verb]
    tests: list[Conversion]
    withheld: frozenset[str]  # with --holdout, the words that must not be trained on


class Batch(NamedTuple):
    """B verbs, one form of each to encode and two to decode.

    The first B targets are one form of each verb, the other B another form.
    """

    source: Tensor  # (B, T)
    source_tense: Tensor  # (B,)
    target: Tensor  # (2B, T)
    target_tense: Tensor  # (2B,)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*[part.to(device) for part in self])


def find_data(given: Path | None) -> Path:
    """Return the folder to read: the given one, else data/ here or above, else the sample."""
    here = SCRIPT.parent / "data"
    above = SCRIPT.parent.parent / "data"
    sample = above / "sample"
    found = [folder for folder in (here, above, sample) if (folder / "train.txt").exists()]
    folder = given or next(iter(found), here)
    note = f", the bundled sample. {SOURCE}" if folder == sample else ""
    print(f"data      {folder}{note}")
    return folder


def read_lines(path: Path, pattern: str, expected: str) -> list[tuple[str, ...]]:
    """Match every line that is not blank with `pattern`, and return the groups of each match.

    Raises UserError if a line is not as `expected`, or if there is none.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        lines = content.decode("ascii").splitlines()
    except (OSError, ValueError) as error:
        advice = f"{SOURCE}, or name their folder with --data"
        raise UserError(f"{path}: {reason(error)}. {advice}") from error

    rows = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        match = re.fullmatch(pattern, line)
        if match is None:
            raise UserError(f"{path}: line {number}, {line[:60]!r}, is not {expected}")
        rows.append(match.groups())
    if not rows:
        raise UserError(f"{path}: is empty. {SOURCE}")
    return rows


def read_train(path: Path) -> list[Verb]:
    """Read train.txt. Lines that are repeated or whose third word lacks -ing are left out."""
    pattern = r"\s+".join([WORD] * len(TENSES))
    expected = f"four words of up to {MAX_LETTERS} lowercase letters a to z: {', '.join(TENSES)}"
    lines = read_lines(path, pattern, expected)

    verbs = [verb for verb in dict.fromkeys(lines) if verb[2].endswith("ing")]
    left_out = len(lines) - len(verbs)
    if left_out > 0:
        print(f"warning   {path}: {left_out} lines left out, repeated or without -ing third")
    return verbs


def read_test(path: Path, verbs: list[Verb]) -> list[Conversion]:
    """Read test.txt. The tenses of pairs without a third column, as the course's, are looked up.

    Raises UserError if such a pair is not two forms of one of the verbs.
    """
    tense = f"({'|'.join(SHORT_TENSES)})"
    pattern = rf"{WORD}\s+{WORD}(?:\s+{tense}\s*->\s*{tense})?"
    expected = f"two words and their tenses of {', '.join(SHORT_TENSES)}, such as: go went sp->p"
    tests = []
    looked_up = []
    for word, target, source_tense, target_tense in read_lines(path, pattern, expected):
        if source_tense:
            tenses = SHORT_TENSES[source_tense], SHORT_TENSES[target_tense]
        else:
            tenses = look_up(word, target, verbs)
            looked_up.append(f"{word} {target}")
        if tenses is None:
            found = f"{word} {target} has no tenses, and no verb of train.txt has these two forms"
            raise UserError(f"{path}: {found}. Write {expected}")
        tests.append(Conversion(word, target, *tenses))

    if looked_up:
        print(f"tenses    of {len(looked_up)} test pairs are looked up in train.txt")
    return tests


def look_up(word: str, target: str, verbs: list[Verb]) -> tuple[int, int] | None:
    """Return the first two different tenses of a verb that are spelled so, or None."""
    for verb in verbs:
        for source_tense, target_tense in itertools.permutations(range(len(TENSES)), 2):
            if (verb[source_tense], verb[target_tense]) == (word, target):
                return source_tense, target_tense
    return None


def read_verbs(folder: Path, config: Config) -> Verbs:
    """Read both files. With --holdout, random verbs and those of the tests are not trained on."""
    verbs = read_train(folder / "train.txt")
    tests = read_test(folder / "test.txt", verbs)
    withheld = set()
    if config.holdout > 0:
        for test in tests:
            withheld |= {test.word, test.target}
    verbs = [verb for verb in verbs if withheld.isdisjoint(verb)]

    order = torch.randperm(len(verbs), generator=Generator().manual_seed(config.seed)).tolist()
    held_out = [verbs[i] for i in order[: config.holdout]]
    withheld = withheld.union(*held_out)
    # Verbs can share a form, such as lay, the past of lie: hold out one, and neither is trained on.
    rows = [i for i in order[config.holdout :] if withheld.isdisjoint(verbs[i])]
    train = [verbs[i] for i in sorted(rows[: config.limit])]
    if len(train) < 2:
        asked = f"--holdout is {config.holdout} and --limit {config.limit or 'not given'}"
        raise UserError(f"{folder}: {len(train)} verbs to train on are too few. Now {asked}")

    print(f"verbs     {len(train)} for training, {len(held_out)} held out, {len(tests)} test pairs")
    return Verbs(train, held_out, tests, frozenset(withheld))


def encode_words(words: Sequence[str]) -> Tensor:
    """N words -> integers (N, T): each word's letters, then $, then ^ up to the longest."""
    rows = []
    for word in words:
        rows.append(torch.tensor([ALPHABET.index(letter) for letter in word + "$"]))
    return pad_sequence(rows, batch_first=True, padding_value=START)


def verb_tensor(verbs: list[Verb]) -> Tensor:
    """N verbs -> integers (N, 4, T)."""
    words = [form for verb in verbs for form in verb]
    return encode_words(words).unflatten(0, (-1, len(TENSES)))


def invent_verbs(verbs: Verbs, count: int, generator: Generator) -> list[Verb]:
    """Make up to `count` new verbs: the first letters of one verb and the last ones of another.

    abandon and flounder give abounder, abounders, aboundering, aboundered. No form is a withheld
    word: dish and tip would give dip, which may be held out.
    """
    stems = [len(os.path.commonprefix(verb)) for verb in verbs.train]
    invented = []
    for _ in range(100 * count):  # irregular verbs have no common stem, and may be all there are
        if len(invented) == count:
            break
        first, second = torch.randint(len(stems), (2,), generator=generator).tolist()
        if min(stems[first], stems[second]) < 2:
            continue
        head = int(torch.randint(1, stems[first] + 1, (1,), generator=generator))
        tail = int(torch.randint(0, stems[second], (1,), generator=generator))

        start = verbs.train[first][0][:head]
        verb = tuple(start + form[tail:] for form in verbs.train[second])
        longest = max(len(form) for form in verb)
        if longest <= MAX_LETTERS and verbs.withheld.isdisjoint(verb):
            invented.append(verb)
    return invented


def make_batch(verbs: Verbs, rows: Tensor, invented: float, generator: Generator) -> Batch:
    """Put the training verbs `rows`, and `invented` ones for each, into random tenses."""
    count = math.ceil(invented * len(rows))
    chosen = [verbs.train[i] for i in rows] + invent_verbs(verbs, count, generator)
    forms = verb_tensor(chosen)  # (B, 4, T)
    size = len(chosen)

    # Each verb's two target tenses differ, so that a latent cannot serve one tense alone.
    shuffled = torch.rand(size, len(TENSES), generator=generator).argsort(dim=1)
    target_tense = shuffled[:, :2].T.flatten()
    source_tense = torch.randint(len(TENSES), (size,), generator=generator)

    i = torch.arange(size)
    source = forms[i, source_tense]
    target = forms[i.repeat(2), target_tense]
    return Batch(source, source_tense, target, target_tense)


# Model --------------------------------------------------------------------------------------------
def shift_right(words: Tensor) -> Tensor:
    """The letter before each letter, ^ before the first: (B, T) -> (B, T)."""
    return F.pad(words, (1, -1), value=START)


class CVAE(nn.Module):
    """Encoder q(z|x_i, c_i), a bidirectional GRU, and decoder p(x_j|z, c_j), another GRU.

    Only the decoder's initial state depends on z. So which verb z stands for is decided once, the
    same for all four tenses.
    """

    def __init__(self, latent_dim: int, hidden_dim: int):
        super().__init__()
        self.latent_dim = latent_dim

        self.encoder_letters = nn.Embedding(len(ALPHABET), LETTER_DIM)
        self.encoder_tense = nn.Embedding(len(TENSES), hidden_dim)
        self.encoder = nn.GRU(LETTER_DIM, hidden_dim, batch_first=True, bidirectional=True)
        self.posterior = nn.Linear(2 * hidden_dim, 2 * latent_dim)
        # At σ = 0.22 the decoder can read z from the first step on; at σ = 1 it would ignore it.
        nn.init.constant_(self.posterior.bias[latent_dim:], -3.0)

        self.initial_state = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.Tanh(),
        )
        self.decoder_letters = nn.Embedding(len(ALPHABET), LETTER_DIM)
        self.decoder_tense = nn.Embedding(len(TENSES), TENSE_DIM)
        self.decoder = nn.GRU(LETTER_DIM + TENSE_DIM, hidden_dim, batch_first=True)
        self.output = nn.Linear(hidden_dim, len(ALPHABET))

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    def encode(self, words: Tensor, tense: Tensor) -> tuple[Tensor, Tensor]:
        """Words (B, T) in tenses (B,) -> mu and logvar of q(z|x, c), (B, k) each."""
        letters = self.encoder_letters(words)  # (B, T, 64)
        lengths = (words != START).sum(dim=1).cpu()
        packed = pack_padded_sequence(letters, lengths, batch_first=True, enforce_sorted=False)
        initial = self.encoder_tense(tense).repeat(2, 1, 1)  # (2, B, hidden)

        _, last = self.encoder(packed, initial)  # (2, B, hidden): forward and backward
        mu, logvar = self.posterior(torch.cat([last[0], last[1]], dim=1)).chunk(2, dim=1)
        return mu, logvar.clamp(-12.0, 4.0)

    def decode(self, state: Tensor, tense: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each letter from `state` (B, hidden), tense (B,) and `previous` letters (B, T).

        The first letter does not see the tense, so that z alone decides which verb it is. A past
        that begins otherwise, as went does, cannot be learned. Returns logits (B, T, 28) and the
        state after the last letter.
        """
        letters = self.decoder_letters(previous)
        not_first = (previous != START)[..., None]
        tenses = self.decoder_tense(tense)[:, None] * not_first  # (B, T, 16)
        states, last = self.decoder(torch.cat([letters, tenses], dim=-1), state[None])
        return self.output(states), last[0]

    def forward(
        self, batch: Batch, teacher_forcing: float, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return reconstruction, the mean over both targets, and KL of each verb, (B,) nats.

        Of the previous letters that the decoder sees, the share `teacher_forcing` is right, and
        the others are its own guesses: scheduled sampling (Bengio et al. 2015) in two passes
        (Mihaylova and Martins 2019).
        """
        mu, logvar = self.encode(batch.source, batch.source_tense)  # (B, k)
        sigma = (0.5 * logvar).exp()
        noise = torch.randn(2 * len(mu), self.latent_dim, generator=generator).to(mu.device)
        z = mu.repeat(2, 1) + sigma.repeat(2, 1) * noise  # (2B, k)
        state = self.initial_state(z)

        previous = shift_right(batch.target)
        if teacher_forcing < 1:
            with torch.no_grad():
                guess, _ = self.decode(state, batch.target_tense, previous)
            uniform = torch.rand(batch.target.shape, generator=generator).to(z.device)
            mixed = torch.where(uniform < teacher_forcing, batch.target, guess.argmax(dim=-1))
            previous = shift_right(mixed)

        logits, _ = self.decode(state, batch.target_tense, previous)  # (2B, T, 28)
        reconstruction = reconstruction_loss(logits, batch.target).view(2, -1).mean(dim=0)
        return reconstruction, kl_divergence(mu, logvar)

    @torch.no_grad()
    def spell(self, z: Tensor, tenses: Sequence[int]) -> list[str]:
        """Decode latents (B, k), each in its tense, greedily: always the most likely letter."""
        tense = torch.tensor(tenses, device=z.device)
        letter = torch.full((len(z), 1), START, device=z.device)
        state = self.initial_state(z)
        letters = []
        for _ in range(MAX_LETTERS):
            logits, state = self.decode(state, tense, letter)
            letter = logits[..., 1:].argmax(dim=-1) + 1  # (B, 1); no word contains a ^
            letters.append(letter)

        words = []
        for row in torch.cat(letters, dim=1).tolist():
            word = "".join(ALPHABET[i] for i in row)
            words.append(word.partition("$")[0])  # what comes after the end is meaningless
        return words


# Objective (nats per word) ------------------------------------------------------------------------
def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, diag σ²) || N(0, I)), (B, k) -> (B,) (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1)


def reconstruction_loss(logits: Tensor, words: Tensor) -> Tensor:
    """-log p(x|z, c) of words (B, T), summed over the letters and the $ of each: (B,)."""
    losses = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none")
    return (losses.view_as(words) * (words != START)).sum(dim=1)


def kl_weight(progress: float, config: Config) -> float:
    """The weight of the KL when the share `progress` of all steps is done.

    It grows once (monotonic, Bowman et al. 2016), over and over (cyclical, Fu et al. 2019, eqs. 6
    and 7) or not at all (constant).
    """
    if config.kl_schedule == "constant":
        return config.kl_max
    if config.kl_schedule == "cyclical":
        progress = progress * config.kl_cycles % 1.0
    return config.kl_max * min(1.0, progress / KL_RAMP)


@torch.no_grad()
def encode_verbs(model: CVAE, forms: Tensor) -> tuple[Tensor, Tensor]:
    """Encode all forms (N, 4, T) of N verbs. Return mu and logvar, (4N, k) each."""
    tense = torch.arange(len(TENSES), device=forms.device).repeat(len(forms))
    return model.encode(forms.flatten(0, 1), tense)


def prior_loss(
    model: CVAE, forms: Tensor, q: tuple[Tensor, Tensor], count: int, generator: Generator
) -> Tensor:
    """The mean loss of spelling `count` samples z ~ N(0, I), each as the verb it most likely is.

    That is argmax_n Σ_i q(z|x_ni, c_i). `forms` (N, 4, T) are those of all training verbs, and `q`
    is what `encode_verbs` returned for them. Between their posteriors N(0, I) has gaps, where a
    decoder trained on the posteriors alone mixes verbs. This loss assigns every z to one verb.
    """
    mu, logvar = q
    z = torch.randn(count, model.latent_dim, generator=generator).to(mu.device)  # (S, k)
    log_q = Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None]).sum(dim=2)  # (S, 4N)
    log_q = log_q.unflatten(1, (-1, len(TENSES))).logsumexp(dim=2)  # (S, N)
    most_likely = log_q.argmax(dim=1)  # (S,)

    tense = torch.randint(len(TENSES), (2, count), generator=generator).to(mu.device)
    words = forms[most_likely, tense].flatten(0, 1)  # (2S, T), each verb in two random tenses
    state = model.initial_state(z.repeat(2, 1))
    logits, _ = model.decode(state, tense.flatten(), shift_right(words))
    return reconstruction_loss(logits, words).mean()


# Training -----------------------------------------------------------------------------------------
# Same in vae_mnist.py, vae_anime.py
def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Cosine decay to 0, and a linear warm-up over the first tenth of the steps."""
    warmup = 10 * (step + 1) / total_steps
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / total_steps)
    return peak * min(warmup, cosine)


@torch.no_grad()
def update_average(average: CVAE, model: CVAE, step: int) -> None:
    """Update `average`, an exponential moving average of the weights over some 200 steps."""
    decay = min(0.995, (1 + step) / (10 + step))  # the first steps are soon forgotten
    for averaged, weight in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(weight, 1 - decay)


def train(
    model: CVAE, verbs: Verbs, config: Config, checkpoint: dict | None, bar: tqdm
) -> tuple[CVAE, list]:
    """Train for config.epochs epochs, or those that are left. Return the average of the weights,
    which is what is scored and saved, and a row of losses and scores for each epoch."""
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    history = []
    if checkpoint:
        restore(average, checkpoint["average"], config.out)
        restore(model, checkpoint["training"]["model"], config.out)
        optimizer.load_state_dict(checkpoint["training"]["optimizer"])
        history = checkpoint["history"]

    forms = verb_tensor(verbs.train).to(model.device)  # (N, 4, T)
    batches_per_epoch = math.ceil(len(forms) / config.batch_size)
    total_steps = config.epochs * batches_per_epoch
    step = len(history) * batches_per_epoch

    for epoch in range(len(history), config.epochs):
        started = time.monotonic()
        order = torch.randperm(len(forms), generator=random_generator(config.seed, epoch))
        teacher_forcing = 1 - (1 - config.teacher_forcing) * epoch / max(1, config.epochs - 1)
        q = None  # later: the posteriors of all training verbs
        if config.prior_draws > 0 and epoch >= PRIOR_FROM * config.epochs:
            q = encode_verbs(average, forms)
        totals = torch.zeros(2, device=model.device)

        for rows in order.split(config.batch_size):
            generator = random_generator(config.seed, epoch, step)
            batch = make_batch(verbs, rows, config.invented, generator).to(model.device)
            weight = kl_weight(step / total_steps, config)

            reconstruction, kl = model(batch, teacher_forcing, generator)  # (B,) each
            kl = kl[: len(rows)]  # an invented verb pays none: its z may lie where p(z) is small
            loss = reconstruction.mean() + weight * kl.sum() / len(reconstruction)
            if q:
                loss += config.prior_draws * prior_loss(model, forms, q, len(rows), generator)

            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            if not torch.isfinite(loss + grad_norm):
                raise UserError(f"no finite loss in epoch {epoch + 1}, step {step + 1}. Lower --lr")
            optimizer.param_groups[0]["lr"] = learning_rate(step, total_steps, config.lr)
            optimizer.step()
            update_average(average, model, step)

            totals += torch.stack([reconstruction[: len(rows)].sum(), kl.sum()]).detach()
            step += 1
            bar.update()

        row = {"epoch": epoch + 1, "kl_weight": weight, "teacher_forcing": teacher_forcing}
        row["reconstruction"], row["kl"] = (totals / len(forms)).tolist()
        row |= score_epoch(average, verbs, config.seed)
        history.append(row | {"seconds": time.monotonic() - started})
        training = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(config, average, history, training)
    return average, history


# Use and scores -----------------------------------------------------------------------------------
@torch.no_grad()
def latents(model: CVAE, words: Sequence[str], tenses: Sequence[int]) -> Tensor:
    """The mean of q(z|x, c) for each word in its tense, (N, k)."""
    tense = torch.tensor(tenses, device=model.device)
    mu, _ = model.encode(encode_words(words).to(model.device), tense)
    return mu


def convert(model: CVAE, conversions: list[Conversion]) -> list[str]:
    """Turn each word into its target tense, at z = μ."""
    words, _, source_tenses, target_tenses = zip(*conversions, strict=True)
    return model.spell(latents(model, words, source_tenses), target_tenses)


def spell_verbs(model: CVAE, z: Tensor) -> list[Verb]:
    """Decode each latent of z (N, k) in all four tenses."""
    columns = [model.spell(z, [tense] * len(z)) for tense in range(len(TENSES))]
    return list(zip(*columns, strict=True))


def generate(model: CVAE, count: int, seed: int) -> list[Verb]:
    """Decode `count` samples of N(0, I); they are the same in every epoch."""
    z = torch.randn(count, model.latent_dim, generator=random_generator(seed, count))
    return spell_verbs(model, z.to(model.device))


def interpolate(model: CVAE, first: str, last: str, steps: int = 9) -> list[Verb]:
    """Decode points on the line between the latents of two verbs in the present, both included."""
    z = latents(model, [first, last], [0, 0])
    way = torch.linspace(0, 1, steps, device=z.device)[:, None]
    return spell_verbs(model, torch.lerp(z[:1], z[1:], way))


def bleu4(reference: str, prediction: str) -> float:
    """BLEU over letters as the course scores it: up to 4-grams, or 3-grams for three letters."""
    n = 3 if len(reference) == 3 else 4
    smoothing = SmoothingFunction().method1
    return sentence_bleu([list(reference)], list(prediction), [1 / n] * n, smoothing)


def score_conversions(model: CVAE, conversions: list[Conversion]) -> tuple[float, float]:
    """Return the share of words that are converted without a mistake, and the mean BLEU-4."""
    exact = 0
    total = 0.0
    for conversion, prediction in zip(conversions, convert(model, conversions), strict=True):
        exact += prediction == conversion.target
        total += bleu4(conversion.target, prediction)
    return exact / len(conversions), total / len(conversions)


def score_generated(generated: list[Verb], train: list[Verb]) -> tuple[float, float]:
    """Return the Gaussian score, which is the share of training verbs among the generated ones,
    and how many different ones of them there are in 100, on average. A decoder that spells the
    same verb every time has a Gaussian score of 1, and one different verb."""
    known = set(train)
    valid = sum(verb in known for verb in generated)
    distinct = []
    for i in range(0, len(generated), 100):
        distinct.append(len(known.intersection(generated[i : i + 100])))
    return valid / len(generated), sum(distinct) / len(distinct)


def score_epoch(model: CVAE, verbs: Verbs, seed: int) -> dict:
    """Compute the course's two scores: of the test pairs, and of 100 samples."""
    _, bleu = score_conversions(model, verbs.tests)
    gaussian_score, _ = score_generated(generate(model, 100, seed), verbs.train)
    return {"bleu4": bleu, "gaussian_score": gaussian_score}


def score_finished(model: CVAE, verbs: Verbs, seed: int) -> dict:
    """Compute what would take too long after each epoch, such as all twelve conversions of each
    held-out verb."""
    conversions = []
    for verb in verbs.held_out:
        for i, j in itertools.permutations(range(len(TENSES)), 2):
            conversions.append(Conversion(verb[i], verb[j], i, j))
    exact = None
    bleu = None
    if conversions:
        exact, bleu = score_conversions(model, conversions)

    valid, distinct = score_generated(generate(model, 10_000, seed), verbs.train)
    return {
        "gaussian_score_10000": valid,
        "distinct_valid_per_100": distinct,
        "heldout_exact": exact,
        "heldout_bleu4": bleu,
        "heldout_verbs": len(verbs.held_out),
        "verbs": len(verbs.train),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# Results ------------------------------------------------------------------------------------------
def plot_history(path: Path, history: pd.DataFrame) -> None:
    """Draw the losses, the scores, and KL weight and teacher forcing, by epoch."""
    figure = Figure(figsize=(6.4, 8), dpi=150, layout="constrained")
    losses, scores, schedules = figure.subplots(3, 1, sharex=True)
    history.plot("epoch", ["reconstruction", "kl"], ax=losses, ylabel="nats per word")
    history.plot("epoch", ["bleu4", "gaussian_score"], ax=scores, ylabel="score")
    history.plot("epoch", ["kl_weight", "teacher_forcing"], ax=schedules, ylabel="weight, ratio")
    losses.set(yscale="symlog", ylim=(0, None))
    write_file(path, partial(figure.savefig, format="png"))


def write_results(model: CVAE, verbs: Verbs, config: Config, history: list[dict]) -> None:
    """Write tables and figure; print the tests' conversions and four generated verbs."""
    conversions = pd.DataFrame(verbs.tests, columns=["input", "target", "from", "to"])
    conversions = conversions.replace(dict(enumerate(TENSES)))  # numbers of tenses by their names
    conversions["prediction"] = convert(model, verbs.tests)

    samples = generate(model, 100, config.seed)
    generated = pd.DataFrame(samples, columns=TENSES)
    generated["training line"] = [verb in verbs.train for verb in samples]
    between = interpolate(model, verbs.train[0][0], verbs.train[-1][0])
    tables = {
        "history": pd.DataFrame(history),
        "interpolation": pd.DataFrame(between, columns=TENSES),
        "conversions": conversions,
        "generated": generated,
    }
    for name, table in tables.items():
        write_file(config.out / f"{name}.csv", partial(table.to_csv, index=False, mode="wb"))
    plot_history(config.out / "training.png", tables["history"])

    print(conversions.to_string(index=False))
    print()
    print(generated[:4].to_string(index=False))


# Seeds, device, files -----------------------------------------------------------------------------
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


def pick_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU if there is one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {reason(error)}. Use --device cpu") from error


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


def save_checkpoint(
    config: Config,
    average: CVAE,
    history: list[dict],
    training: dict | None = None,
    metrics: dict | None = None,
) -> None:
    """Save the state after an epoch, with `training`, or a finished run, with `metrics`."""
    checkpoint = {
        "version": CHECKPOINT_VERSION,
        "settings": config.settings,
        "average": average.state_dict(),
        "training": training,
        "history": history,
        "metrics": metrics,
    }
    write_file(config.out / "checkpoint.pt", partial(torch.save, checkpoint))


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


def restore(model: CVAE, weights: dict, folder: Path) -> None:
    """Load the weights of a checkpoint."""
    try:
        model.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: {reason(error)}. Train again without --resume") from error


def load_finished(folder: Path) -> CVAE:
    """Return the finished model of a run's folder."""
    checkpoint = load_checkpoint(folder, settings={})
    if checkpoint is None or checkpoint["metrics"] is None:
        raise UserError(f"{folder}: no finished run there. Train first, or name its --out")
    settings = checkpoint["settings"]
    model = CVAE(settings["latent_dim"], settings["hidden_dim"])
    restore(model, checkpoint["average"], folder)
    return model


@contextlib.contextmanager
def open_run(config: Config, device: torch.device) -> Iterator[None]:
    """Keep other runs out of the run's folder while the `with` block lasts, and describe the run.

    If a run starts over, the folder of the earlier one becomes <folder>.previous.
    """
    folder = config.out
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
            print(f"kept      the earlier run as {previous}")
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
            "number_format": "float32",
            "threads": torch.get_num_threads(),
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


def fraction(text: str) -> float:
    """A flag's type: a number from 0 to 1."""
    if nonnegative(text) > 1:
        raise ArgumentTypeError(f"{text}: give a number from 0 to 1")
    return float(text)


def lowercase(text: str) -> str:
    """A flag's type: a word of lowercase letters."""
    if not re.fullmatch(WORD, text):
        advice = f"give a verb of up to {MAX_LETTERS} lowercase letters a to z"
        raise ArgumentTypeError(f"{text[:40]!r}: {advice}")
    return text


def parse_args(argv: list[str] | None) -> Config:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.set_defaults(**asdict(Config()))

    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, help="folder with train.txt and test.txt [data/, else the sample]")
    add("--out", type=Path, help="folder for the results [%(default)s]")
    add("--resume", action="store_true", help="continue the interrupted run in --out")
    add("--seed", type=natural, help="of everything that is random [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="[%(default)s]")
    add("--limit", type=positive, metavar="N", help="train on N random verbs, a first look [all]")
    add(
        "--holdout",
        type=natural,
        metavar="N",
        help="do not train on N random verbs and those of the tests, but score the N; this"
        f" changes some defaults: {HOLDOUT_DEFAULTS} [%(default)s]",
    )

    group = parser.add_argument_group("use of the finished run in --out")
    group.add_argument("--from", dest="from_tense", choices=TENSES, help="[%(default)s]")
    group.add_argument("--to", dest="to_tense", choices=TENSES, help="[%(default)s]")
    add = group.add_mutually_exclusive_group().add_argument
    add("--convert", type=lowercase, metavar="VERB", help="turn a verb from one tense into another")
    add("--generate", type=positive, metavar="N", help="decode N samples from N(0, I)")
    add(
        "--interpolate",
        type=lowercase,
        nargs=2,
        metavar="VERB",
        help="decode latents on the line between two verbs in the present",
    )

    add = parser.add_argument_group("model").add_argument
    add("--latent-dim", type=positive, help="dimensions of z [%(default)s]")
    add("--hidden-dim", type=positive, help="width of the GRUs [%(default)s]")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, help="passes over the verbs [%(default)s]")
    add("--batch-size", type=positive, help="verbs per step [%(default)s]")
    add("--lr", type=nonnegative, help="peak learning rate of Adam [%(default)s]")
    add(
        "--kl-schedule",
        choices=("monotonic", "cyclical", "constant"),
        help="the KL weight reaches --kl-max once, over and over, or at once [%(default)s]",
    )
    add("--kl-cycles", type=positive, help="cycles of the cyclical schedule [%(default)s]")
    add("--kl-max", type=nonnegative, help="largest weight of the KL [%(default)s]")
    add("--invented", type=nonnegative, help="invented verbs for each real one [%(default)s]")
    add("--prior-draws", type=nonnegative, help="weight of the loss of prior samples [%(default)s]")
    add("--teacher-forcing", type=fraction, help="ratio in the last epoch, from 1 on [%(default)s]")

    args = parser.parse_args(argv)
    if args.holdout > 0:  # parse again: what is on the command line goes before the defaults
        parser.set_defaults(**HOLDOUT_DEFAULTS)
        args = parser.parse_args(argv)
    return Config(**vars(args))


def use_finished(config: Config) -> dict:
    """Print and return what --convert, --generate or --interpolate asks for."""
    model = load_finished(config.out)
    if config.convert:
        source_tense = TENSES.index(config.from_tense)
        target_tense = TENSES.index(config.to_tense)
        [word] = convert(model, [Conversion(config.convert, "", source_tense, target_tense)])
        print(f"{config.convert} ({config.from_tense}) -> {word} ({config.to_tense})")
        return {"word": word}

    if config.generate:
        verbs = generate(model, config.generate, config.seed)
    else:
        verbs = interpolate(model, *config.interpolate)
    print(pd.DataFrame(verbs, columns=TENSES).to_string(index=False))
    return {"verbs": verbs}


def train_model(config: Config, verbs: Verbs) -> dict:
    """Train, score the model, and leave everything in --out. Return the metrics."""
    checkpoint = load_checkpoint(config.out, config.settings) if config.resume else None
    if checkpoint and checkpoint["metrics"]:
        print(f"finished  {config.out} was finished before")
        return checkpoint["metrics"]

    device = pick_device(config.device)
    print(f"device    {device}")
    with open_run(config, device):
        torch.manual_seed(seed_of(config.seed))
        model = CVAE(config.latent_dim, config.hidden_dim).to(device)
        done = len(checkpoint["history"]) if checkpoint else 0
        if done:
            print(f"resumed   {done} of {config.epochs} epochs are done")
        steps = math.ceil(len(verbs.train) / config.batch_size)  # of an epoch
        with tqdm(
            total=config.epochs * steps,
            initial=done * steps,
            unit="step",
            mininterval=2,
            file=sys.stdout,
        ) as bar:
            model, history = train(model, verbs, config, checkpoint, bar)
        trained = time.monotonic()

        model.cpu()
        metrics = history[-1] | score_finished(model, verbs, config.seed)
        metrics["epochs"] = config.epochs
        metrics["latent_dim"] = config.latent_dim
        write_results(model, verbs, config, history)
        metrics["seconds"] = sum(row["seconds"] for row in history) + time.monotonic() - trained
        save_checkpoint(config, model, history, metrics=metrics)
    return metrics


def run(config: Config) -> dict:
    """Do what the command line asks for, and return the metrics."""
    if config.convert or config.generate or config.interpolate:
        return use_finished(config)

    folder = find_data(config.data)
    verbs = read_verbs(folder, config)
    config = replace(
        config,
        train_sha256=sha256_of(folder / "train.txt"),
        test_sha256=sha256_of(folder / "test.txt"),
    )
    metrics = train_model(config, verbs)
    write_json(config.out / "metrics.json", metrics)

    for name, value in metrics.items():
        print(f"{name:24}{round(value, 4) if isinstance(value, float) else value}")
    if config.holdout == 0:
        print(
            "bleu4 measures memory: the tests' verbs are trained on. --holdout 100 tests new ones"
        )
    print(f"wrote     tables, training.png, metrics.json and the model in {config.out}/")
    print(f"next      python {sys.argv[0]} --out {config.out} --convert carry --to past")
    return metrics


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    resumable = False
    try:
        config = parse_args(argv)
        resumable = not (config.convert or config.generate or config.interpolate)
        return run(config)
    except UserError as error:
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        advice = "; the same command with --resume continues from the last epoch"
        tqdm.write(f"stopped{advice if resumable else ''}")
        raise SystemExit(130) from None


if __name__ == "__main__":
    # Pasted into a notebook cell, a script has no __file__, and sys.argv belongs to the notebook.
    main(None if "__file__" in globals() else [])
