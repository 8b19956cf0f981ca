# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.2.12", "matplotlib==3.11.2", "nltk==3.10.4", "pandas==3.1.1",
#                 "torch==2.13.0", "tqdm==4.70.1"]
# ///
"""Turn the tense of English verbs, and invent verbs from noise, with a conditional sequence VAE.

A verb x_i in tense c_i becomes q(z|x_i, c_i), a Gaussian over codes z; from a code the decoder
spells x_j, the same verb in any tense c_j. For every q, by Jensen's inequality (Sohn et al. 2015,
eq. 4; Kingma and Welling 2014, eq. 3),

    log p(x_j|c_j) = log E q(z|x_i,c_i) [p(x_j|z,c_j) p(z) / q(z|x_i,c_i)]
                  >= E q(z|x_i,c_i) [log p(x_j|z,c_j)] - KL(q(z|x_i,c_i) || p(z)),  p(z) = N(0, I)
    loss           = reconstruction + w KL, nats per word; w follows --kl-schedule

z does not depend on c_j, so one code has to serve all four tenses: what it holds is the verb and
not the form. Later in training the decoder also learns to spell draws from N(0, I), each as the
verb that it is likeliest a code of.

    python lab4/cvae.py                            train.txt and test.txt in data/, or the sample
    python lab4/cvae.py --convert carry --to past  also: --generate 10, --interpolate carry send
    python lab4/cvae.py --holdout 100              how well it turns verbs that it never saw

Tables, a figure and the model go to runs/cvae/. On the course's file, six minutes, five seeds:
BLEU-4 1.000, .80 of 10,000 draws are a training line; --holdout 100: .87 of unseen conversions.
"""

import contextlib
import copy
import hashlib
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
import time
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read by torch: how long threads wait awake

import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock
from matplotlib.figure import Figure
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from torch import Generator, Tensor, nn
from torch.distributions import Normal
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import tqdm

VERSION = "cvae 3"  # stands in each checkpoint
HERE = Path(__file__).resolve().parent
SOURCE = "The real train.txt and test.txt are the course's files; put them into data/"
TENSES = ("present", "third-person", "progressive", "past")  # the order of a line of train.txt
SHORT = {"sp": 0, "tp": 1, "pg": 2, "p": 3}  # as test.txt's third column writes them: sp->p
# The course's own test.txt has ten pairs without that column, in these tenses
COURSE = ((0, 3), (0, 2), (0, 1), (0, 1), (3, 1), (0, 2), (3, 0), (2, 0), (2, 3), (2, 1))
ALPHABET = "^abcdefghijklmnopqrstuvwxyz$"  # a letter's integer; a word begins at ^, ends with $
START, END, TOKENS = 0, 27, len(ALPHABET)  # ^ also fills what comes after $
MAX_LETTERS = 20  # of a word; the longest in the course's file has 15
WORD = rf"([a-z]{{1,{MAX_LETTERS}}})"
LETTER_DIM, TENSE_DIM = 64, 16  # widths of the embeddings
MAX_NORM = 1.0  # of the gradient
PRIOR_FROM = 0.4  # share of the epochs after which the decoder learns from prior draws too
RAMP = 0.3  # share of a schedule in which the KL weight grows
# Defaults that --holdout changes. Seven nats name a verb of the file, and codes that hold no more
# fill N(0, I); a verb never seen is spelled out, in many more nats, learned from made-up verbs.
WITH_HOLDOUT = {"latent_dim": 48, "kl_max": 0.02, "invented": 3.0, "prior_draws": 0.0}
WITH_HOLDOUT |= {"epochs": 80, "batch_size": 32, "lr": 3e-3}
RANGES = {"seed": (0, 2**32 - 1), "limit": (2, math.inf), "holdout": (0, math.inf)}
RANGES |= dict.fromkeys(["epochs", "batch_size", "kl_cycles", "generate"], (1, math.inf))
RANGES |= dict.fromkeys(["latent_dim", "hidden_dim"], (1, 10_000))
RANGES |= dict.fromkeys(["invented", "prior_draws", "kl_max"], (0, 1000))
RANGES |= {"lr": (1e-9, 10), "teacher_forcing": (0, 1)}


# data: verbs -> letters -> integers -> batches ----------------------------------------------------
Verb = tuple[str, ...]  # its four forms in the order of TENSES
Conversion = tuple[str, str, int, int]  # a word, the same verb in another tense, and both tenses


class Verbs(NamedTuple):
    train: list[Verb]
    held_out: list[Verb]
    tests: list[Conversion]
    unseen: frozenset[str]  # forms kept from training: no made-up verb may have them either
    hashes: dict[str, str]  # sha256 of each file


def read_lines(path: Path, pattern: str = "(.*)", form: str = "text") -> list[tuple[str, ...]]:
    """What the groups of `pattern` find in each line that is not blank."""
    with one_line(path, f"{SOURCE}, or name their folder with --data"):
        text = path.read_bytes().decode("ascii").splitlines()
        lines = {number: line.strip() for number, line in enumerate(text, 1) if line.strip()}
        for number, line in lines.items():
            if not re.fullmatch(pattern, line):
                raise ValueError(f"line {number}, {line[:60]!r}, is not {form}")
        if not lines:
            raise ValueError("is empty")
    return [re.fullmatch(pattern, line).groups() for line in lines.values()]


def read_train(path: Path) -> list[Verb]:
    """The verbs of train.txt; repeated lines and those whose third word lacks -ing are left out."""
    form = f"four words of up to {MAX_LETTERS} small letters a to z: {', '.join(TENSES)}"
    lines = read_lines(path, r"\s+".join([WORD] * len(TENSES)), form)
    verbs = list(dict.fromkeys(verb for verb in lines if verb[2].endswith("ing")))
    if left_out := len(lines) - len(verbs):
        print(f"warning   {path}: {left_out} lines left out, repeated or without -ing third")
    return verbs


def read_test(path: Path) -> list[Conversion]:
    """The pairs of test.txt; their tenses are in a third column or, of ten pairs, the course's."""
    tense = f"({'|'.join(SHORT)})"
    form = f"two words and their tenses of {', '.join(SHORT)}, such as: go went sp->p"
    lines = read_lines(path, rf"{WORD}\s+{WORD}(?:\s+{tense}\s*->\s*{tense})?", form)
    bare = [line[:2] for line in lines if not line[2]]
    if len(bare) == len(lines) == len(COURSE):
        return [(*pair, *tenses) for pair, tenses in zip(bare, COURSE, strict=True)]
    if bare:
        fail(f"{path}: {len(bare)} pairs without tenses, such as {' '.join(bare[0])}. Write {form}")
    return [(*line[:2], SHORT[line[2]], SHORT[line[3]]) for line in lines]


def read_verbs(folder: Path, holdout: int, limit: int | None, seed: int) -> Verbs:
    """Read both files. `holdout` random verbs and those of the tests are kept from training."""
    verbs, tests = read_train(folder / "train.txt"), read_test(folder / "test.txt")
    tested = {word for test in tests for word in test[:2]} if holdout else set()
    verbs = [verb for verb in verbs if tested.isdisjoint(verb)]
    order = torch.randperm(len(verbs), generator=Generator().manual_seed(seed)).tolist()
    held_out = [verbs[row] for row in order[:holdout]]
    unseen = tested.union(*held_out)
    # lie and lay share a form: where one is held out, the other is not trained on either
    rows = [row for row in order[holdout:] if unseen.isdisjoint(verbs[row])]
    train = [verbs[row] for row in sorted(rows[:limit])]
    if len(train) < 2:
        fail(f"{folder}: {len(train)} verbs to train on are too few. Now --holdout is {holdout}")
    print(f"verbs     {len(train)} for training, {len(held_out)} held out, {len(tests)} test pairs")
    files = (folder / "train.txt", folder / "test.txt")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return Verbs(train, held_out, tests, frozenset(unseen), hashes)


def encode_words(words: list[str]) -> Tensor:
    """N words -> integers (N, T): each word's letters, then $, then ^ up to the longest."""
    rows = [torch.tensor([ALPHABET.index(letter) for letter in word + "$"]) for word in words]
    return pad_sequence(rows, batch_first=True, padding_value=START)


def verb_tensor(verbs: list[Verb]) -> Tensor:
    """N verbs -> (N, 4, T)."""
    return encode_words([form for verb in verbs for form in verb]).unflatten(0, (-1, len(TENSES)))


def invent_verbs(verbs: list[Verb], count: int, generator: Generator, unseen=frozenset()) -> list:
    """Up to `count` verbs that are none: the head of one verb's stem before the tail of another's.

    abandon and flounder give abounder, abounders, aboundering, aboundered. No form is in `unseen`:
    dish and tip would give dip, which may be held out.
    """
    stems = [len(os.path.commonprefix(verb)) for verb in verbs]
    invented = []
    for _ in range(100 * count):  # verbs without common stems give none
        first, second = torch.randint(len(verbs), (2,), generator=generator).tolist()
        if min(stems[first], stems[second]) < 2:
            continue
        head = int(torch.randint(1, stems[first] + 1, (1,), generator=generator))
        tail = int(torch.randint(0, stems[second], (1,), generator=generator))
        verb = tuple(verbs[first][0][:head] + form[tail:] for form in verbs[second])
        if max(map(len, verb)) <= MAX_LETTERS and unseen.isdisjoint(verb):
            invented.append(verb)
        if len(invented) == count:
            break
    return invented


def make_batch(verbs: Verbs, rows: Tensor, invented: float, k: int, generator: Generator) -> list:
    """The training verbs of `rows`, then `invented` made-up ones for each: B, in random tenses.

    Returns the words to read (B, T) and their tenses (B,); the words to spell (2B, T), all verbs in
    one tense and then all in another, and their tenses (2B,); noise (2B, k) from N(0, I).
    """
    chosen, count = [verbs.train[row] for row in rows], math.ceil(invented * len(rows))
    chosen += invent_verbs(verbs.train, count, generator, verbs.unseen)
    forms, each = verb_tensor(chosen), torch.arange(len(chosen))  # (B, 4, T), (B,)
    shuffled = torch.rand(len(chosen), len(TENSES), generator=generator).argsort(1)  # (B, 4)
    source_tense = torch.randint(len(TENSES), (len(chosen),), generator=generator)
    target_tense = shuffled[:, :2].T.flatten()
    noise = torch.randn(2 * len(chosen), k, generator=generator)
    source, target = forms[each, source_tense], forms[each.repeat(2), target_tense]
    return [source, source_tense, target, target_tense, noise]


# model --------------------------------------------------------------------------------------------
class CVAE(nn.Module):
    """The encoder q(z|x_i, c_i), a GRU both ways, and the decoder p(x_j|z, c_j), another GRU.

    The decoder's first state is a network of the code, which is not told again with each letter:
    which verb it means is decided once, the same for all four tenses.
    """

    def __init__(self, latent_dim: int, hidden_dim: int):
        super().__init__()
        self.latent_dim = latent_dim
        self.read_letters = nn.Embedding(TOKENS, LETTER_DIM)
        self.read_tense = nn.Embedding(len(TENSES), hidden_dim)
        self.reader = nn.GRU(LETTER_DIM, hidden_dim, batch_first=True, bidirectional=True)
        self.posterior = nn.Linear(2 * hidden_dim, 2 * latent_dim)
        nn.init.constant_(self.posterior.bias[latent_dim:], -3.0)  # σ = .22 can be read
        layers = [nn.Linear(latent_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim)]
        layers += [nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.Tanh()]
        self.first_state = nn.Sequential(*layers)
        self.write_letters = nn.Embedding(TOKENS, LETTER_DIM)
        self.write_tense = nn.Embedding(len(TENSES), TENSE_DIM)
        self.writer = nn.GRU(LETTER_DIM + TENSE_DIM, hidden_dim, batch_first=True)
        self.out = nn.Linear(hidden_dim, TOKENS)

    def encode(self, words: Tensor, tense: Tensor) -> tuple[Tensor, Tensor]:
        """Words (B, T) in tenses (B,) -> mu and logvar (B, k) of q."""
        letters, lengths = self.read_letters(words), (words != START).sum(1).cpu()
        packed = pack_padded_sequence(letters, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.reader(packed, self.read_tense(tense).repeat(2, 1, 1))  # (2, B, hidden)
        mu, logvar = self.posterior(torch.cat([*last], 1)).chunk(2, 1)
        return mu, logvar.clamp(-12.0, 4.0)

    def decode(self, state: Tensor, tense: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """From `state` (B, hidden) over `given` (B, T): logits (B, T, 28), and the state there."""
        tense = self.write_tense(tense)[:, None] * (given != START)[..., None]  # first letter: none
        states, last = self.writer(torch.cat([self.write_letters(given), tense], -1), state[None])
        return self.out(states), last[0]

    def forward(self, batch: list[Tensor], teacher_forcing: float) -> tuple[Tensor, Tensor]:
        """Of what make_batch returns: reconstruction (B,), the mean of both tenses, and KL (B,).

        Of the letters that the decoder is given, `teacher_forcing` are right and others guessed:
        scheduled sampling (Bengio et al. 2015) in two passes (Mihaylova and Martins 2019).
        """
        source, source_tense, target, target_tense, noise = batch
        mu, logvar = self.encode(source, source_tense)  # (B, k)
        sigma = (0.5 * logvar).exp()
        z = mu.repeat(2, 1) + sigma.repeat(2, 1) * noise  # (2B, k), Kingma and Welling 2014, 2.4
        state, given = self.first_state(z), F.pad(target, (1, -1), value=START)
        if teacher_forcing < 1:
            with torch.no_grad():
                guess, _ = self.decode(state, target_tense, given)
            right = torch.rand(target.shape, device=z.device) < teacher_forcing
            mixed = torch.where(right, target, guess.argmax(-1))
            given = F.pad(mixed, (1, -1), value=START)
        logits, _ = self.decode(state, target_tense, given)  # (2B, T, 28)
        reconstruction = reconstruction_loss(logits, target).view(2, -1).mean(0)
        return reconstruction, kl_divergence(mu, logvar)

    @torch.no_grad()
    def spell(self, z: Tensor, tense: Tensor) -> list[str]:
        """The words of codes (B, k) in tenses (B,), the likeliest letter each time."""
        letter, state = torch.full((len(z), 1), START, device=z.device), self.first_state(z)
        letters, ended = [], torch.zeros_like(letter, dtype=torch.bool)
        while len(letters) < MAX_LETTERS and not ended.all():
            logits, state = self.decode(state, tense, letter)
            letter = logits[..., 1:].argmax(-1) + 1  # (B, 1); no word has a ^
            letters.append(letter)
            ended |= letter == END
        words = ["".join(ALPHABET[i] for i in row) for row in torch.cat(letters, 1).tolist()]
        return [word.partition("$")[0] for word in words]


# objective (nats per word) ------------------------------------------------------------------------
def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, diag σ²) ‖ N(0, I)) (Kingma and Welling 2014, appendix B): (B, k) -> (B,)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def reconstruction_loss(logits: Tensor, words: Tensor) -> Tensor:
    """-log p(x|z, c) of words (B, T) by logits (B, T, 28), up to and with $ -> (B,)."""
    losses = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none")
    return (losses.view_as(words) * (words != START)).sum(1)


def kl_weight(schedule: str, progress: float, cycles: int, largest: float) -> float:
    """The weight of the KL when the share `progress` of all steps is done.

    It grows in the first RAMP of training (monotonic, Bowman et al. 2016), of each cycle (cyclical,
    Fu et al. 2019, eqs. 6 and 7) or not at all (constant).
    """
    within = {"monotonic": progress, "cyclical": progress * cycles % 1.0, "constant": 1.0}
    return largest * min(1.0, within[schedule] / RAMP)


def prior_loss(model: CVAE, forms: Tensor, posteriors: tuple, count: int, generator) -> Tensor:
    """The loss of spelling `count` draws from N(0, I) as the likeliest of the verbs (N, 4, T).

    That is argmax_n Σ_i q(z|x_ni, c_i), by `posteriors` mu and logvar (4N, k). Where p(z) has mass
    and no posterior has, a decoder mixes verbs; told these, it divides all of N(0, I) among them.
    """
    mu, logvar = posteriors
    z = torch.randn(count, model.latent_dim, generator=generator).to(mu.device)  # (D, k)
    log_q = Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None]).sum(2)  # (D, 4N)
    likeliest = log_q.unflatten(1, (-1, len(TENSES))).logsumexp(2).argmax(1).cpu()  # (D,)
    tense = torch.randint(len(TENSES), (2, count), generator=generator)
    words = forms[likeliest, tense].flatten(0, 1).to(z.device)  # (2D, T)
    given = F.pad(words, (1, -1), value=START)
    logits, _ = model.decode(model.first_state(z.repeat(2, 1)), tense.flatten().to(z.device), given)
    return reconstruction_loss(logits, words).mean()


# train and evaluate -------------------------------------------------------------------------------
def train(model: CVAE, verbs: Verbs, args: Namespace, state: dict) -> CVAE:
    """Minimise reconstruction + w KL, later prior_loss too; return the average of the weights."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    forms, posteriors = verb_tensor(verbs.train), None  # (N, 4, T)
    first, per_epoch = len(state["history"]), math.ceil(len(forms) / args.batch_size)
    steps, began = args.epochs * per_epoch, time.monotonic() - state["seconds"]
    average = copy.deepcopy(model)  # over some two hundred steps: what is scored and kept
    parts = {"model": model, "average": average, "optimizer": optimizer}
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state.pop(name))
    done = first * per_epoch
    progress = tqdm(total=steps, initial=done, unit="step", mininterval=2, file=sys.stdout)
    for epoch in range(first, args.epochs):
        order = torch.randperm(len(forms), generator=seed_all(args.seed, epoch))
        forcing = 1 - (1 - args.teacher_forcing) * epoch / max(1, args.epochs - 1)
        if args.prior_draws and epoch >= PRIOR_FROM * args.epochs:
            with torch.no_grad():
                tenses = torch.arange(len(TENSES), device=device).repeat(len(forms))
                posteriors = average.encode(forms.flatten(0, 1).to(device), tenses)  # (4N, k) each
        sums = torch.zeros(2, device=device)  # of reconstruction and KL
        for step, rows in enumerate(order.split(args.batch_size), epoch * per_epoch):
            generator = seed_all(args.seed, epoch, step)
            batch = make_batch(verbs, rows, args.invented, args.latent_dim, generator)
            weight = kl_weight(args.kl_schedule, step / steps, args.kl_cycles, args.kl_max)
            reconstruction, kl = model([part.to(device) for part in batch], forcing)  # (B,)
            kl = kl[: len(rows)]  # a made-up verb pays none: its code may lie where p(z) is 0
            loss = reconstruction.mean() + weight * kl.sum() / len(reconstruction)
            if posteriors:
                drawn_loss = prior_loss(model, forms, posteriors, len(rows), generator)
                loss = loss + args.prior_draws * drawn_loss
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            if not torch.isfinite(loss + norm):
                fail(f"no finite loss in epoch {epoch + 1}, step {step + 1}. Lower --lr")
            decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)  # and a tenth of warm-up
            optimizer.param_groups[0]["lr"] = args.lr * min(10 * (step + 1) / steps, decay)
            optimizer.step()
            with torch.no_grad():  # the first steps are soon forgotten
                share = 1 - min(0.995, (1 + step) / (10 + step))
                torch._foreach_lerp_([*average.parameters()], [*model.parameters()], share)
            sums += torch.stack([reconstruction[: len(rows)].sum(), kl.sum()]).detach()
            progress.update()
        row = {"epoch": epoch + 1, "kl_weight": weight, "teacher_forcing": forcing}
        row["reconstruction"], row["kl"] = (sums / len(forms)).tolist()
        row["bleu4"] = score_conversions(average, verbs.tests)[2]
        row["gaussian_score"], _ = score_generated(generate(average, 100, args.seed), verbs.train)
        state["history"].append(row)
        state["seconds"] = time.monotonic() - began
        saved = state | {name: part.state_dict() for name, part in parts.items()}
        write_file(args.out / "checkpoint.pt", partial(torch.save, saved))
    progress.close()
    return average


@torch.no_grad()
def convert(model: CVAE, words: list[str], source: list[int], target: list[int]) -> list[str]:
    """Each word, read in its `source` tense, in its `target` tense: the likeliest at z = μ."""
    tenses = torch.tensor([source, target], device=next(model.parameters()).device)  # (2, B)
    mu, _ = model.encode(encode_words(words).to(tenses.device), tenses[0])
    return model.spell(mu, tenses[1])


def spell_verbs(model: CVAE, z: Tensor) -> list[Verb]:
    """Each code of z (B, k) in all four tenses."""
    tenses = torch.arange(len(TENSES), device=z.device)
    return list(zip(*(model.spell(z, tense.expand(len(z))) for tense in tenses), strict=True))


def generate(model: CVAE, count: int, seed: int) -> list[Verb]:
    """`count` verbs spelled from draws of N(0, I); the same draws in every epoch and model."""
    z = torch.randn(count, model.latent_dim, generator=seed_all(seed, count))
    return spell_verbs(model, z.to(next(model.parameters()).device))


def between(model: CVAE, first: str, last: str, steps: int = 9) -> list[Verb]:
    """The verbs on the straight line between the codes of two in the present, ends included."""
    mu, _ = model.encode(encode_words([first, last]), torch.tensor([0, 0]))
    return spell_verbs(model, torch.lerp(mu[:1], mu[1:], torch.linspace(0, 1, steps)[:, None]))


def bleu4(reference: str, prediction: str) -> float:
    """BLEU over letters as the course scores it: to 4-grams, or 3-grams for three letters."""
    weights = (1 / 3,) * 3 if len(reference) == 3 else (1 / 4,) * 4
    smoothing = SmoothingFunction().method1
    return sentence_bleu([list(reference)], list(prediction), weights, smoothing)


def score_conversions(model: CVAE, asked: list[Conversion]) -> tuple[list[str], float, float]:
    """What the model makes of them, the share of exact ones, and the mean BLEU-4."""
    words, targets, source, target = (list(column) for column in zip(*asked, strict=True))
    answers = convert(model, words, source, target)
    pairs = list(zip(targets, answers, strict=True))
    exact = [target == answer for target, answer in pairs]
    return answers, sum(exact) / len(exact), sum(bleu4(*pair) for pair in pairs) / len(pairs)


def score_generated(drawn: list[Verb], train: list[Verb]) -> tuple[float, float]:
    """The share of draws that are a training verb, and how many different ones are in 100 draws."""
    known, hundreds = set(train), [drawn[i : i + 100] for i in range(0, len(drawn), 100)]
    distinct = sum(len(known.intersection(hundred)) for hundred in hundreds) / len(hundreds)
    return sum(verb in known for verb in drawn) / len(drawn), distinct


def score_run(model: CVAE, verbs: Verbs, seed: int) -> dict:
    """What would take too long after each epoch. Held-out verbs: all twelve conversions of each."""
    share, distinct = score_generated(generate(model, 10_000, seed), verbs.train)
    pairs = [(i, j) for i in range(len(TENSES)) for j in range(len(TENSES)) if i != j]
    asked = [(verb[i], verb[j], i, j) for verb in verbs.held_out for i, j in pairs]
    _, exact, bleu = score_conversions(model, asked) if asked else (None, None, None)
    metrics = {"gaussian_score_10000": share, "distinct_valid_per_100": distinct}
    metrics |= {"heldout_exact": exact, "heldout_bleu4": bleu, "heldout_verbs": len(verbs.held_out)}
    metrics |= {"verbs": len(verbs.train), "parameters": sum(p.numel() for p in model.parameters())}
    return metrics


# figures ------------------------------------------------------------------------------------------
def plot_history(path: Path, history: list[dict]) -> None:
    """Losses, KL weight and teacher forcing, and both scores by epoch."""
    rows = {"nats per word": ["reconstruction", "kl"], "score": ["bleu4", "gaussian_score"]}
    rows["weight, ratio"] = ["kl_weight", "teacher_forcing"]
    figure = Figure(figsize=(6.4, 8), dpi=150, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for panel, (unit, keys) in zip(panels, rows.items(), strict=True):
        pd.DataFrame(history).plot("epoch", keys, ax=panel, ylabel=unit)
    panels[0].set(yscale="symlog", ylim=(0, None))
    write_file(path, partial(figure.savefig, format="png"))


def write_results(args: Namespace, model: CVAE, verbs: Verbs, history: list[dict]) -> None:
    """Leave the tables and the figure in --out; print the conversions and some verbs from noise."""
    conversions = pd.DataFrame(verbs.tests, columns=["input", "target", "from", "to"])
    conversions = conversions.replace(dict(enumerate(TENSES)))
    conversions["prediction"] = score_conversions(model, verbs.tests)[0]
    generated = pd.DataFrame(drawn := generate(model, 100, args.seed), columns=TENSES)
    generated["training line"] = [verb in set(verbs.train) for verb in drawn]
    path = pd.DataFrame(between(model, verbs.train[0][0], verbs.train[-1][0]), columns=TENSES)
    tables = {"history": pd.DataFrame(history), "interpolation": path}
    tables |= {"conversions": conversions, "generated": generated}
    for name, frame in tables.items():
        write_file(args.out / f"{name}.csv", partial(frame.to_csv, index=False, mode="wb"))
    plot_history(args.out / "training.png", history)
    print(conversions.to_string(index=False), generated[:4].to_string(index=False), sep="\n\n")


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


def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = fail
    other = ", ".join(f"{name} {value:g}" for name, value in WITH_HOLDOUT.items())
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, help="folder with train.txt and test.txt [data/, or the sample there]")
    add("--out", type=Path, default=Path("runs/cvae"), help="folder of the run [%(default)s]")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--convert", metavar="VERB", help="turn a verb with the model in --out")
    add("--from", choices=TENSES, default="present", dest="from_tense", help="[%(default)s]")
    add("--to", choices=TENSES, default="past", dest="to_tense", help="[%(default)s]")
    add("--generate", type=int, metavar="N", help="N verbs from N(0, I) with the model in --out")
    add("--interpolate", nargs=2, metavar="VERB", help="verbs between two in the present, likewise")
    add("--seed", type=int, default=0, help="of all that is random [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[%(default)s]")
    add("--limit", type=int, metavar="N", help="train on N random verbs, for a first look [all]")
    add("--holdout", type=int, default=0, metavar="N", help="keep N random verbs and those of the"
        f" tests from training, score the N, and change these defaults: {other} [%(default)s]")
    add = parser.add_argument_group("model").add_argument
    add("--latent-dim", type=int, default=4, help="dimensions of z [%(default)s]")
    add("--hidden-dim", type=int, default=256, help="width of the GRUs [%(default)s]")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=150, help="passes over the verbs [%(default)s]")
    add("--batch-size", type=int, default=64, help="verbs a step [%(default)s]")
    add("--lr", type=float, default=4e-3, help="peak learning rate of Adam [%(default)s]")
    add("--kl-schedule", choices=("monotonic", "cyclical", "constant"), default="monotonic",
        help="the KL weight gets to --kl-max once, over and over, or at once [%(default)s]")
    add("--kl-cycles", type=int, default=4, help="of the cyclical schedule [%(default)s]")
    add("--kl-max", type=float, default=0.3, help="largest weight of the KL [%(default)s]")
    add("--invented", type=float, default=0.0, help="made-up verbs for each real one [%(default)s]")
    add("--prior-draws", type=float, default=1.0,
        help="weight of spelling codes from N(0, I) as the likeliest verb [%(default)s]")
    add("--teacher-forcing", type=float, default=0.9,
        help="share of right letters before each letter in the last epoch, from 1 [%(default)s]")
    # fmt: on
    args = parser.parse_args(argv)
    if args.holdout:
        parser.set_defaults(**WITH_HOLDOUT)
        args = parser.parse_args(argv)
    check_ranges(args, RANGES)
    if (args.convert is not None) + bool(args.generate) + bool(args.interpolate) > 1:
        fail("give only one of --convert, --generate and --interpolate")
    return args


def load_finished(folder: Path) -> CVAE:
    """The model of the finished run in `folder`."""
    path = folder / "checkpoint.pt"
    state = load_checkpoint(path, VERSION, {}) if path.exists() else {}
    if "metrics" not in state:
        fail(f"{folder}: no finished run there. Train, add --resume to go on, or name its --out")
    model = CVAE(state["settings"]["latent_dim"], state["settings"]["hidden_dim"])
    model.load_state_dict(state["model"])
    return model


def use_finished(args: Namespace) -> dict:
    """What --convert, --generate and --interpolate print."""
    for word in [args.convert, *(args.interpolate or [])]:
        if word is not None and not re.fullmatch(WORD, word):
            fail(f"{word[:40]!r}: give a verb of up to {MAX_LETTERS} small letters a to z")
    model = load_finished(args.out)
    if args.convert is not None:
        source, target = TENSES.index(args.from_tense), TENSES.index(args.to_tense)
        [word] = convert(model, [args.convert], [source], [target])
        print(f"{args.convert} ({args.from_tense}) -> {word} ({args.to_tense})")
        return {"word": word}
    ends = args.interpolate
    verbs = between(model, *ends) if ends else generate(model, args.generate, args.seed)
    print(pd.DataFrame(verbs, columns=TENSES).to_string(index=False))
    return {"verbs": verbs}


def run(args: Namespace, verbs: Verbs) -> dict:
    """Begin the run in --out, or go on with it; leave its results there and return the metrics."""
    checkpoint = args.out / "checkpoint.pt"
    settings = {name: getattr(args, name) for name in (*RANGES, "kl_schedule")} | verbs.hashes
    state = {"version": VERSION, "settings": settings, "history": [], "seconds": 0.0}
    if args.resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, VERSION, settings)
    if "metrics" in state:
        return state["metrics"]
    device = pick_device(args.device)
    with open_run(args.out, args, verbs.hashes):
        seed_all(args.seed)
        model = CVAE(args.latent_dim, args.hidden_dim).to(device)
        model = train(model, verbs, args, state).cpu()
        began = time.monotonic()
        metrics = state["history"][-1] | score_run(model, verbs, args.seed)
        write_results(args, model, verbs, state["history"])
        seconds = state["seconds"] + time.monotonic() - began
        metrics |= {"epochs": args.epochs, "latent_dim": args.latent_dim, "seconds": seconds}
        state |= {"model": model.state_dict(), "metrics": metrics}
        write_file(checkpoint, partial(torch.save, state))
    return metrics


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics."""
    exit_on_signals()
    args = parse_args(argv)
    if args.convert is not None or args.generate or args.interpolate:
        return use_finished(args)
    folders = [HERE / "data", HERE.parent / "data", sample := HERE.parent / "data" / "sample"]
    found = [folder for folder in folders if (folder / "train.txt").exists()]
    folder = args.data or next(iter(found), folders[0])
    print(f"data      {folder}" + (f", the bundled sample. {SOURCE}" if folder == sample else ""))
    metrics = run(args, read_verbs(folder, args.holdout, args.limit, args.seed))
    write_json(args.out / "metrics.json", metrics)
    for name, value in metrics.items():
        print(f"{name:24}{round(value, 4) if isinstance(value, float) else value}")
    if not args.holdout:
        print("bleu4 is memory where the tests' verbs were trained on; --holdout 100 asks for more")
    print(f"wrote     tables, training.png, metrics.json and the model in {args.out}/")
    print(f"next      python {sys.argv[0]} --out {args.out} --convert carry --to past")
    return metrics


if __name__ == "__main__":
    main()
