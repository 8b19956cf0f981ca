"""Turn the tense of English verbs, and invent verbs from noise, with a conditional sequence-to-sequence VAE.

A verb x_i in tense c_i becomes q(z|x_i, c_i), a Gaussian over codes z; from a code the decoder spells x_j, the same
verb in any tense c_j. For every q, by Jensen's inequality (Sohn et al. 2015, eq. 4; Kingma and Welling 2014, eq. 3),

    log p(x_j|c_j) = log E q(z|x_i,c_i) [p(x_j|z,c_j) p(z) / q(z|x_i,c_i)]
                  >= E q(z|x_i,c_i) [log p(x_j|z,c_j)] - KL(q(z|x_i,c_i) || p(z)),        p(z) = N(0, I)
    loss           = reconstruction + w KL, nats per word; the schedule of w is --kl-schedule (Fu et al. 2019)

z does not depend on c_j, so one code has to serve all four tenses: what it holds is the verb and not the form. Later in
training the decoder also learns to spell draws of N(0, I), each as the verb that it is likeliest a code of.

    python lab4/cvae.py                             train.txt and test.txt in data/, else the bundled sample
    python lab4/cvae.py --convert walk --to past    with the trained model
    python lab4/cvae.py --generate 10               verbs from N(0, I)
    python lab4/cvae.py --holdout 100               how well it turns verbs that it never saw
    python lab4/cvae.py --compare-schedules         monotonic beside cyclical

It leaves tables, figures, metrics.json and the model in runs/cvae/.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
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
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no flock: there, keeping two runs out of one folder is up to the user
    fcntl = None

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SOURCE = "The real train.txt and test.txt are the course's files; put them into data/"
TENSES = ("present", "third-person", "progressive", "past")  # the order of a line of train.txt
SHORT = {"sp": 0, "tp": 1, "pg": 2, "p": 3}  # as test.txt's third column writes them: sp->p
COURSE_TESTS = ((0, 3), (0, 2), (0, 1), (0, 1), (3, 1), (0, 2), (3, 0), (2, 0), (2, 3), (2, 1))  # its test.txt has none
START, END, TOKENS = 0, 27, 28  # a to z are 1 to 26
MAX_LETTERS = 20  # of a word; the longest in the course's file has 15
SCHEDULES = ("monotonic", "cyclical", "constant")
# Where nothing else is asked for: (alone, with --holdout). Seven nats name a verb of the file, and codes that hold no
# more fill N(0, I); a verb never seen has to be spelled out, in many more, and learned from many made-up ones.
DEFAULTS = {
    "latent_dim": (4, 48),
    "kl_max": (0.3, 0.02),
    "invented": (0.0, 3.0),
    "prior_draws": (1.0, 0.0),
    "epochs": (150, 80),
    "batch_size": (64, 32),
    "lr": (4e-3, 3e-3),
}
LETTER_DIM, TENSE_DIM = 64, 16  # widths of the embeddings
MAX_NORM = 1.0  # of the gradient
PRIOR_FROM = 0.4  # share of the steps after which the decoder learns from prior draws too
RAMP = 0.3  # share of a schedule in which the KL weight grows


# ----------------------------------------------------------------------------------------------------------------------
# arguments
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    otherwise = {name: f"otherwise {alone:g}, with --holdout {held_out:g}" for name, (alone, held_out) in
                 DEFAULTS.items()}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=Help)
    parser.error = fail  # a mistake is one line here as everywhere
    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, metavar="DIR", help="folder with train.txt and test.txt; otherwise data/ beside the "
        "script or its folder, or the bundled data/sample/")
    add("--out", type=Path, metavar="DIR", default=Path("runs/cvae"), help="folder for what a run leaves")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--convert", metavar="VERB", help="turn a verb with the model in --out")
    add("--from", choices=TENSES, default="present", dest="from_tense", help="tense of --convert's verb")
    add("--to", choices=TENSES, default="past", dest="to_tense", help="tense to turn it to")
    add("--generate", type=positive, metavar="N", help="spell N codes from N(0, I) with the model in --out")
    add("--interpolate", nargs=2, metavar="VERB", help="verbs between two, in the present, with the model in --out")
    add("--compare-schedules", action="store_true", help="a run for the monotonic and one for the cyclical KL weight, "
        "and a figure of both")
    add("--seed", type=seed, default=0, help="of held-out verbs, weights, batches and noise")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    add("--limit", type=positive, metavar="N", help="train on N random verbs only, for a first look")
    add("--holdout", type=not_negative_int, default=0, metavar="N", help="leave N random verbs and those of test.txt "
        "out of training, and score all conversions of the N")
    add = parser.add_argument_group("model").add_argument
    add("--latent-dim", type=positive, metavar="K", help=f"dimensions of z; {otherwise['latent_dim']}")
    add("--hidden-dim", type=positive, default=256, help="width of the GRUs")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, metavar="N", help=f"passes over the verbs; {otherwise['epochs']}")
    add("--batch-size", type=positive, metavar="N", help="verbs a step, each read in one tense and spelled in two; "
        f"{otherwise['batch_size']}")
    add("--lr", type=positive_float, metavar="RATE", help=f"peak learning rate of Adam; {otherwise['lr']}")
    add("--kl-schedule", choices=SCHEDULES, default="monotonic", help="how the KL weight gets to --kl-max: once, over "
        "and over, or at once")
    add("--kl-cycles", type=positive, default=4, help="of the cyclical schedule")
    add("--kl-max", type=not_negative, metavar="WEIGHT", help="of the KL in the loss, at its largest; "
        f"{otherwise['kl_max']}")
    add("--invented", type=not_negative, metavar="RATIO", help="made-up verbs for each real one in a batch; "
        f"{otherwise['invented']}")
    add("--prior-draws", type=not_negative, metavar="RATIO", help="codes from N(0, I) for each verb in a batch, which "
        f"the decoder learns to spell as the likeliest verb; {otherwise['prior_draws']}")
    add("--teacher-forcing", type=share, default=0.9, metavar="SHARE", help="of the letters that the decoder is given, "
        "those that are right, in the last epoch; in the first all are")
    args = parser.parse_args(argv)
    for name, choices in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, choices[args.holdout > 0])
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
share = checked(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


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
# data: verbs -> letters -> integers
# ----------------------------------------------------------------------------------------------------------------------


class Verbs(NamedTuple):
    """What a run learns from and is scored on; a verb is its four forms in the order of TENSES."""

    train: list[tuple[str, ...]]  # N verbs
    held_out: list[tuple[str, ...]]
    tests: list[tuple[str, str, int, int]]  # input, target, and the tense of each
    hashes: dict[str, str]  # sha256 of each file


def find_data(folder: Path | None) -> Path:
    """The folder to read: the one given, else data/ beside the script or its folder, else the bundled sample there."""
    if folder is not None:
        return folder
    for path in (HERE / "data", HERE.parent / "data", HERE.parent / "data" / "sample"):
        if (path / "train.txt").exists():
            return path
    fail(f"no data/train.txt beside {Path(__file__).name}. {SOURCE}, or name their folder with --data")


def read_lines(path: Path) -> tuple[list[list[str]], str]:
    """The words of each line that has any, and the file's sha256. Every way to be malformed ends the program."""
    try:
        raw = path.read_bytes()
        lines = [line.split() for line in raw.decode("ascii").splitlines()]
    except OSError as error:
        fail(f"{path}: {error.strerror}. {SOURCE}, or name their folder with --data")
    except UnicodeDecodeError as error:
        fail(f"{path}: byte 0x{raw[error.start]:02x} at offset {error.start} is no letter a to z. Write words in these")
    if not any(lines):
        fail(f"{path}: is empty. Give a verb a line")
    return lines, hashlib.sha256(raw).hexdigest()


def check_word(word: str, where: str) -> str:
    if not (word.isascii() and word.isalpha() and word.islower()):
        fail(f"{where}: {word[:40]!r} is not made of the letters a to z. Write it in small letters")
    if len(word) > MAX_LETTERS:
        fail(f"{where}: {word[:40]!r} has {len(word)} letters, more than {MAX_LETTERS}. Leave it out")
    return word


def read_train(path: Path) -> tuple[list[tuple[str, ...]], str]:
    """The verbs of train.txt. A repeated line counts once; one whose third word is no -ing form is left out."""
    lines, sha256 = read_lines(path)
    verbs: dict[tuple[str, ...], None] = {}
    repeated, out_of_order = [], []
    for number, words in enumerate(lines, 1):
        if not words:
            continue
        if len(words) != len(TENSES):
            fail(f"{path}: line {number} has {len(words)} words, not 4. Write {' '.join(TENSES)}")
        verb = tuple(check_word(word, f"{path}: line {number}") for word in words)
        if not verb[2].endswith("ing"):
            out_of_order.append(f"line {number} ({' '.join(verb)})")
        elif verb in verbs:
            repeated.append(verb[0])
        else:
            verbs[verb] = None
    if repeated:
        print(f"warning   {path}: {len(repeated)} repeated lines counted once: {', '.join(repeated[:12])}")
    if out_of_order:
        print(f"warning   {path}: {len(out_of_order)} lines left out, since their third word is no progressive: "
              f"{', '.join(out_of_order[:12])}")  # fmt: skip
    if len(verbs) < 2:
        fail(f"{path}: {len(verbs)} verbs are too few. Give two or more")
    return list(verbs), sha256


def read_test(path: Path) -> tuple[list[tuple[str, str, int, int]], str]:
    """The pairs of test.txt: their tenses from a third column such as sp->p, or, of ten bare pairs, the course's."""
    lines, sha256 = read_lines(path)
    lines = [(number, words) for number, words in enumerate(lines, 1) if words]
    bare = all(len(words) == 2 for _, words in lines)
    if bare and len(lines) != len(COURSE_TESTS):
        fail(f"{path}: {len(lines)} pairs without tenses; only the course's ten are known. Add a third column: sp->p")
    tests = []
    for row, (number, words) in enumerate(lines):
        if bare:
            pair = COURSE_TESTS[row]
        else:
            names = "".join(words[2:]).split("->")  # "sp -> p" is three words
            if len(names) != 2 or not all(name in SHORT for name in names):
                fail(f"{path}: line {number} has no tenses such as sp->p in a third column. The names: "
                     f"{', '.join(SHORT)}")  # fmt: skip
            pair = (SHORT[names[0]], SHORT[names[1]])
        where = f"{path}: line {number}"
        tests.append((check_word(words[0], where), check_word(words[1], where), *pair))
    return tests, sha256


def read_verbs(folder: Path, holdout: int, limit: int | None, seed: int) -> Verbs:
    """Read both files. With `holdout`, that many verbs at random and those of the test pairs are kept from training."""
    lines, train_hash = read_train(folder / "train.txt")
    tests, test_hash = read_test(folder / "test.txt")
    held_out: list[tuple[str, ...]] = []
    if holdout:
        tested = {word for test in tests for word in test[:2]}
        lines = [verb for verb in lines if not tested & set(verb)]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    if holdout:
        if holdout > len(lines) - 2:
            fail(f"--holdout {holdout}: {folder / 'train.txt'} has {len(lines)} verbs that are in no test pair; "
                 "two must be left to train on")  # fmt: skip
        forms = {word for row in order[:holdout] for word in lines[row]}
        held_out = [lines[row] for row in order[:holdout]]
        order = [row for row in order[holdout:] if not forms & set(lines[row])]  # lie, lay: a form in two lines
    train = [lines[row] for row in sorted(order[:limit])]
    if not train:
        fail(f"{folder / 'train.txt'}: all other verbs share a form with those held out. Lower --holdout {holdout}")
    print(f"verbs     {len(train)} for training, {len(held_out)} held out, {len(tests)} test pairs")
    return Verbs(train, held_out, tests, {"train.txt": train_hash, "test.txt": test_hash})


def encode_words(words: list[str]) -> torch.Tensor:
    """N words -> integers (N, T), each word's letters and then END up to the longest."""
    width = max(map(len, words)) + 1
    letters = [[ord(letter) - ord("a") + 1 for letter in word] for word in words]
    return torch.tensor([row + [END] * (width - len(row)) for row in letters])


def decode_words(tokens: torch.Tensor) -> list[str]:
    """Integers (N, T) -> N words, each up to its first END."""
    spelled = ["".join(chr(ord("a") + token - 1) for token in row) for row in tokens.tolist()]
    return [word.partition(chr(ord("a") + END - 1))[0] for word in spelled]


def verb_tensor(verbs: list[tuple[str, ...]]) -> torch.Tensor:
    """N verbs -> (N, 4, T)."""
    return encode_words([word for verb in verbs for word in verb]).unflatten(0, (-1, len(TENSES)))


def until_end(tokens: torch.Tensor) -> torch.Tensor:
    """(N, T) -> true for each letter and the first END: what is to be spelled."""
    return F.pad(tokens != END, (1, 0), value=True)[:, : tokens.shape[1]]


def invent_verbs(
    verbs: list[tuple[str, ...]], count: int, generator: torch.Generator, unseen: frozenset[str] = frozenset()
) -> list[tuple[str, ...]]:
    """Up to `count` verbs that are none: a verb's head, cut from the stem of its forms, before another verb's tail.

    abandon and flounder give abounder, abounders, aboundering, aboundered: spelling and inflection without the verb.
    A form in `unseen` is never made: dish and tip give dip, which may be held out.
    """
    stems = [len(os.path.commonprefix(verb)) for verb in verbs]
    invented = []
    for _ in range(100 * count):  # verbs without common stems give none
        if len(invented) == count:
            break
        first, second = torch.randint(len(verbs), (2,), generator=generator).tolist()
        if min(stems[first], stems[second]) < 2:
            continue
        head = int(torch.randint(1, stems[first] + 1, (1,), generator=generator))
        tail = int(torch.randint(0, stems[second], (1,), generator=generator))
        verb = tuple(verbs[first][0][:head] + form[tail:] for form in verbs[second])
        if max(map(len, verb)) <= MAX_LETTERS and unseen.isdisjoint(verb):
            invented.append(verb)
    return invented


# ----------------------------------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A word (B, T) in a tense (B,) -> mu, logvar (B, k) each: a GRU both ways, started by the tense."""

    def __init__(self, latent_dim: int, hidden_dim: int):
        super().__init__()
        self.letters = nn.Embedding(TOKENS, LETTER_DIM)
        self.tense = nn.Embedding(len(TENSES), hidden_dim)
        self.gru = nn.GRU(LETTER_DIM, hidden_dim, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_dim, 2 * latent_dim)
        nn.init.constant_(self.head.bias[latent_dim:], -3.0)  # σ = .22 at the start: a code that can be read

    def forward(self, words: torch.Tensor, tense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = until_end(words).sum(1).cpu()  # what comes after the first END is padding
        packed = pack_padded_sequence(self.letters(words), lengths, batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed, self.tense(tense).repeat(2, 1, 1))  # (2, B, hidden): at the word's end, at its start
        mu, logvar = self.head(torch.cat([*last], 1)).chunk(2, 1)
        return mu, logvar.clamp(-12.0, 4.0)


class Decoder(nn.Module):
    """A code (B, k) and a tense (B,) -> logits of the letters, from a GRU whose first state is a network of the code.

    The code is not told again with each letter: which verb it means is decided once, the same for all four tenses.
    """

    def __init__(self, latent_dim: int, hidden_dim: int):
        super().__init__()
        self.verb = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim), nn.Tanh(),
        )  # fmt: skip
        self.letters = nn.Embedding(TOKENS, LETTER_DIM)
        self.tense = nn.Embedding(len(TENSES), TENSE_DIM)
        self.gru = nn.GRU(LETTER_DIM + TENSE_DIM, hidden_dim, batch_first=True)
        self.out = nn.Linear(hidden_dim, TOKENS)

    def forward(self, z: torch.Tensor, tense: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, 28) of the letters that follow each of `given` (B, T)."""
        return self.spell(given, tense, self.verb(z))[0]

    def spell(self, given: torch.Tensor, tense: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Go on from `state` (B, hidden) over the letters `given`: logits (B, T, 28), and the state after them."""
        tense = self.tense(tense)[:, None] * (given != START)[..., None]  # the first letter is the verb's, in any tense
        states, last = self.gru(torch.cat([self.letters(given), tense], -1), state[None])
        return self.out(states), last[0]


class CVAE(nn.Module):
    """q(z|x_i, c_i), and p(x_j|z, c_j)."""

    def __init__(self, latent_dim: int, hidden_dim: int):
        super().__init__()
        self.encoder, self.decoder = Encoder(latent_dim, hidden_dim), Decoder(latent_dim, hidden_dim)

    @torch.no_grad()
    def spell(self, z: torch.Tensor, tense: torch.Tensor) -> list[str]:
        """The words of codes (B, k) in tenses (B,), the likeliest letter each time."""
        letter = torch.full((len(z), 1), START, device=z.device)
        ended = torch.zeros_like(letter, dtype=torch.bool)
        state, word = self.decoder.verb(z), []
        for _ in range(MAX_LETTERS):
            logits, state = self.decoder.spell(letter, tense, state)
            letter = logits[..., START + 1 :].argmax(-1) + START + 1  # no word has a START
            word.append(letter)
            ended |= letter == END
            if ended.all():
                break
        return decode_words(torch.cat(word, 1).cpu())


# ----------------------------------------------------------------------------------------------------------------------
# objective (nats per word)
# ----------------------------------------------------------------------------------------------------------------------


def reparameterize(mu: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """z = μ + σ ε with ε from N(0, I): a draw from q(z|x) that gradients pass (Kingma and Welling 2014, 2.4)."""
    return mu + (0.5 * logvar).exp() * noise


def kl_divergence(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(μ, diag σ²) ‖ N(0, I)), (B, k) -> (B,): ½ Σ (μ² + σ² - 1 - ln σ²) (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def reconstruction_loss(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """-log p(x|z, c) of words (B, T) under logits (B, T, 28), up to and with the first END -> (B,)."""
    losses = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none").view_as(words)
    return (losses * until_end(words)).sum(1)


def kl_weight(schedule: str, progress: float, cycles: int, largest: float) -> float:
    """The weight of the KL when the share `progress` of all steps is done.

    monotonic: grows from 0 in the first RAMP of the steps (Bowman et al. 2016). cyclical: does so in each of
    the cycles (Fu et al. 2019, eqs. 6 and 7 with R = RAMP). constant: `largest` throughout.
    """
    if schedule == "constant":
        return largest
    within = progress * cycles % 1.0 if schedule == "cyclical" else progress
    return largest * min(1.0, within / RAMP)


@torch.no_grad()
def likeliest_verbs(z: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """For each code of z (B, k) the verb, of N, that it most likely is a code of: argmax_n Σ_i q(z|x_ni, c_i) -> (B,).

    mu and logvar (N, 4, k) are all posteriors. Where p(z) has mass and no posterior has, a decoder that saw posteriors
    only mixes verbs; told the likeliest there, it learns to divide all of N(0, I) among them.
    """
    mu, precision, volume = mu.flatten(0, 1), (-logvar).exp().flatten(0, 1), logvar.sum(2).flatten()
    square = z.square() @ precision.T - 2 * z @ (mu * precision).T + (mu.square() * precision).sum(1)  # (B, 4N)
    return (-0.5 * (square + volume)).unflatten(1, (-1, len(TENSES))).logsumexp(2).argmax(1)


def mix_letters(right: torch.Tensor, logits: torch.Tensor, ratio: float) -> torch.Tensor:
    """The letters that the decoder is given, (B, T): START, then of each word's letters the right one at `ratio`.

    The others are the likeliest by `logits`, which a first pass gave: scheduled sampling (Bengio et al. 2015) in two
    parallel passes (Mihaylova and Martins 2019).
    """
    own = torch.rand(right.shape, device=right.device) >= ratio
    return F.pad(torch.where(own, logits.argmax(-1), right), (1, -1), value=START)


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: CVAE, verbs: Verbs, args: argparse.Namespace, start: dict | None, save: Callable[[dict], None], bar: tqdm
) -> tuple[CVAE, list[dict]]:
    """Train `model`; return the running average of its weights and the history, one row an epoch.

    `start` is a state to go on from; `save` takes the state after each epoch and when a signal stops the run. A loss
    that is not finite goes back to the last epoch's end at half the learning rate, three times at most.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=device.type != "mps")
    average = copy.deepcopy(model)  # of the weights over the last two hundred steps: what is scored and kept
    at = {"epoch": 0, "batch": 0, "reconstruction": 0.0, "kl": 0.0, "seen": 0, "retries": 0}
    history: list[dict] = []
    posteriors: list[torch.Tensor] = []  # mu and logvar (N, 4, k) of all training verbs, when the epoch began

    def snapshot() -> dict:
        parts = {"at": at, "history": history, "model": model.state_dict(), "average": average.state_dict(),
                 "optimizer": optimizer.state_dict(), "posteriors": posteriors}  # fmt: skip
        return copy.deepcopy(parts)

    def restore(state: dict) -> None:
        state = copy.deepcopy(state)
        at.update(state["at"])
        history[:], posteriors[:] = state["history"], [part.to(device) for part in state["posteriors"]]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])

    good = (start or {}).get("good") or start or snapshot()  # the last epoch's end
    try:
        restore(start or good)
    except (KeyError, RuntimeError, ValueError):
        fail("the checkpoint was trained by another version of cvae.py. Train again without --resume")
    known = set(verbs.train)
    forms = verb_tensor(verbs.train)  # (N, 4, T)
    unseen = frozenset()  # what no made-up verb may be
    if verbs.held_out:
        unseen = unseen.union(*verbs.held_out, *(test[:2] for test in verbs.tests))
    per_epoch = math.ceil(len(forms) / args.batch_size)
    steps = args.epochs * per_epoch
    bar.update(at["epoch"] * per_epoch + at["batch"])

    def weight_at(step: int) -> float:
        return kl_weight(args.kl_schedule, step / steps, args.kl_cycles, args.kl_max)

    catch_signals(finish_batch=True)
    while at["epoch"] < args.epochs:
        ratio = 1 - (1 - args.teacher_forcing) * at["epoch"] / max(1, args.epochs - 1)
        order = torch.randperm(len(forms), generator=seed_all(args.seed, at["epoch"]))  # batches of like length: worse
        from_prior = args.prior_draws > 0 and at["epoch"] >= PRIOR_FROM * args.epochs
        if from_prior and at["batch"] == 0:
            posteriors[:] = encode_verbs(average, forms)
        for batch in order.split(args.batch_size)[at["batch"] :]:
            step = at["epoch"] * per_epoch + at["batch"]
            generator = seed_all(args.seed, at["epoch"], step, at["retries"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.lr) * 0.5 ** at["retries"]

            chosen = forms[batch]
            if args.invented:
                count = math.ceil(args.invented * len(batch))
                chosen = verb_tensor(
                    [verbs.train[row] for row in batch] + invent_verbs(verbs.train, count, generator, unseen)
                )
            count = len(chosen)
            chosen = chosen[:, :, : (chosen != END).sum(2).max() + 1]  # (B, 4, T)
            rows = torch.arange(count)
            tense = torch.rand(count, len(TENSES), generator=generator).argsort(1)  # a random order of the four
            source = torch.randint(len(TENSES), (count,), generator=generator)
            read = chosen[rows, source].to(device)  # (B, T), what the encoder reads
            rows, target = rows.repeat(2), tense[:, :2].T.flatten()
            right = chosen[rows, target].to(device)  # (2B, T), what the decoder spells: each verb in two tenses
            noise = torch.randn(2 * count, args.latent_dim, generator=generator).to(device)
            source, target = source.to(device), target.to(device)
            with autocast(device):
                mu, logvar = (part.float() for part in model.encoder(read, source))  # (B, k)
                z = reparameterize(mu.repeat(2, 1), logvar.repeat(2, 1), noise)  # (2B, k)
                given = F.pad(right, (1, -1), value=START)
                if ratio < 1:
                    with torch.no_grad():
                        given = mix_letters(right, model.decoder(z, target, given), ratio)
                logits = model.decoder(z, target, given).float()  # (2B, T, 28)
            reconstruction = reconstruction_loss(logits, right).view(2, count).mean(0)  # (B,)
            kl = kl_divergence(mu, logvar)
            paid = torch.arange(count, device=device) < len(batch)  # an invented verb's code may lie where p(z) is 0
            loss = (reconstruction + weight_at(step) * kl * paid).mean()
            if from_prior:
                count = math.ceil(args.prior_draws * len(batch))
                z = torch.randn(count, args.latent_dim, generator=generator).to(device)
                verb = forms[likeliest_verbs(z, *posteriors).cpu()]
                target = torch.randint(len(TENSES), (2, count), generator=generator)
                right = verb[torch.arange(count), target].flatten(0, 1).to(device)  # (2B', T)
                given = F.pad(right, (1, -1), value=START)
                with autocast(device):
                    logits = model.decoder(z.repeat(2, 1), target.flatten().to(device), given).float()
                loss = loss + args.prior_draws * reconstruction_loss(logits, right).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            reconstruction, kl = reconstruction[paid].mean().item(), kl[paid].mean().item()

            if not math.isfinite(loss.item() + norm.item()):
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
                pace = 1 - min(0.995, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), pace)
            at["reconstruction"] += reconstruction * len(batch)
            at["kl"] += kl * len(batch)
            at["seen"] += len(batch)
            at["batch"] += 1
            bar.update()
            if stop_signals:
                save(snapshot() | {"good": good})
                raise KeyboardInterrupt
        else:  # the epoch ended without a break
            reconstruction, kl = at["reconstruction"] / at["seen"], at["kl"] / at["seen"]
            weight = weight_at((at["epoch"] + 1) * per_epoch - 1)
            drawn = generate(average, 100, args.seed)
            history.append(
                {
                    "epoch": at["epoch"] + 1,
                    "loss": reconstruction + weight * kl,
                    "reconstruction": reconstruction,
                    "kl": kl,
                    "kl_weight": weight,
                    "teacher_forcing": ratio,
                    "bleu4": test_bleu4(verbs.tests, convert_tests(average, verbs.tests)),
                    "gaussian_score": score_generated(drawn, known)[0],
                }
            )
            bar.set_postfix_str(f"BLEU-4 {history[-1]['bleu4']:.2f}, Gaussian {history[-1]['gaussian_score']:.2f}")
            at.update(epoch=at["epoch"] + 1, batch=0, reconstruction=0.0, kl=0.0, seen=0)
            good = snapshot()
            save(good)
    catch_signals(finish_batch=False)
    return average.eval(), history


@torch.no_grad()
def encode_verbs(model: CVAE, forms: torch.Tensor) -> list[torch.Tensor]:
    """mu and logvar (N, 4, k) of verbs (N, 4, T)."""
    device = next(model.parameters()).device
    tense = torch.arange(len(TENSES), device=device)
    parts = [model.encoder(part.flatten(0, 1).to(device), tense.repeat(len(part))) for part in forms.split(128)]
    return [torch.cat(part).unflatten(0, (-1, len(TENSES))) for part in zip(*parts, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# scores
# ----------------------------------------------------------------------------------------------------------------------


def bleu4(reference: str, prediction: str) -> float:
    """BLEU over letters as the course scores it: up to 4-grams, up to 3-grams where the reference has three letters."""
    weights = (1 / 3,) * 3 if len(reference) == 3 else (1 / 4,) * 4
    return sentence_bleu([list(reference)], list(prediction), weights, SmoothingFunction().method1)


@torch.no_grad()
def convert(model: CVAE, words: list[str], source: list[int], target: list[int]) -> list[str]:
    """Each of the words, read in its `source` tense, in its `target` tense: the decoder's likeliest at z = μ."""
    device, spelled = next(model.parameters()).device, []
    for part in range(0, len(words), 1000):
        rows = slice(part, part + 1000)
        mu, _ = model.encoder(encode_words(words[rows]).to(device), torch.tensor(source[rows], device=device))
        spelled += model.spell(mu, torch.tensor(target[rows], device=device))
    return spelled


@torch.no_grad()
def spell_verbs(model: CVAE, z: torch.Tensor) -> list[tuple[str, ...]]:
    """Each code of z (B, k) in all four tenses."""
    device, verbs = next(model.parameters()).device, []
    for part in z.to(device).split(1000):
        forms = [model.spell(part, torch.full((len(part),), tense, device=device)) for tense in range(len(TENSES))]
        verbs += zip(*forms, strict=True)
    return verbs


def generate(model: CVAE, count: int, seed: int) -> list[tuple[str, ...]]:
    """`count` verbs spelled from draws of N(0, I); the same draws in every epoch and model."""
    latent_dim = model.encoder.head.out_features // 2
    return spell_verbs(model, torch.randn(count, latent_dim, generator=seed_all(seed, count)))


def convert_tests(model: CVAE, tests: list[tuple[str, str, int, int]]) -> list[str]:
    words, _, source, target = (list(column) for column in zip(*tests, strict=True))
    return convert(model, words, source, target)


def test_bleu4(tests: list[tuple[str, str, int, int]], predictions: list[str]) -> float:
    """Mean BLEU-4 over the test pairs."""
    return sum(bleu4(test[1], word) for test, word in zip(tests, predictions, strict=True)) / len(tests)


def score_generated(drawn: list[tuple[str, ...]], known: set[tuple[str, ...]]) -> tuple[float, float]:
    """The share of drawn verbs that are a training line, and how many different ones there are in 100 draws."""
    hundreds = [drawn[i : i + 100] for i in range(0, len(drawn), 100)]
    distinct = sum(len(known.intersection(hundred)) for hundred in hundreds) / len(hundreds)
    return sum(verb in known for verb in drawn) / len(drawn), distinct


def score_held_out(model: CVAE, held_out: list[tuple[str, ...]]) -> tuple[float, float]:
    """Share of exact conversions, and mean BLEU-4, over the twelve from each form of a verb to another."""
    asked = [(verb[i], verb[j], i, j) for verb in held_out for i in range(4) for j in range(4) if i != j]
    predictions = convert_tests(model, asked)
    exact = sum(test[1] == word for test, word in zip(asked, predictions, strict=True)) / len(asked)
    return exact, test_bleu4(asked, predictions)


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


def plot_history(path: Path, histories: dict[str, list[dict]]) -> None:
    """A column for each run: losses, KL weight and teacher forcing, and both scores against epochs."""
    figure = new_figure(1.2 + 5.2 * len(histories), 8)
    grid = figure.subplots(3, len(histories), squeeze=False, sharex="col", sharey="row")
    for column, (name, history) in zip(grid.T, histories.items(), strict=True):
        epochs = [row["epoch"] for row in history]
        rows = (
            ({"reconstruction": "reconstruction", "kl": "KL"}, "nats per word"),
            ({"kl_weight": "KL weight", "teacher_forcing": "teacher forcing ratio"}, "weight, ratio"),
            ({"bleu4": "BLEU-4, ten test conversions", "gaussian_score": "Gaussian score, 100 draws"}, "score"),
        )
        for panel, (keys, unit) in zip(column, rows, strict=True):
            for key, label in keys.items():
                panel.plot(epochs, [row[key] for row in history], label=label)
            panel.set_ylabel(unit)
            panel.legend()
        column[0].set_yscale("symlog", linthresh=1.0)
        column[0].set_ylim(bottom=0)
        column[0].set_title(f"{name} KL weight", fontsize=10)
        column[2].set_ylim(0, 1.02)
        column[2].set_xlabel("epoch")
        column[2].xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def load_finished(folder: Path) -> CVAE:
    """The model of the finished run in `folder`."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        fail(f"{folder}: no run there. Train first, or name its folder with --out")
    state = load_checkpoint(path, "cvae", {})
    if "average" not in state:
        fail(f"{folder}: its run is not finished. Go on with it: --resume")
    try:
        model = CVAE(state["settings"]["latent_dim"], state["settings"]["hidden_dim"])
        model.load_state_dict(state["average"])
    except (KeyError, RuntimeError):
        fail(f"{path}: trained by another version of cvae.py. Train again without --resume")
    return model.eval()


def write_table(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def between(model: CVAE, first: str, last: str, steps: int = 9) -> list[tuple[str, ...]]:
    """The verbs on the straight line between the codes of two in the present tense, ends included."""
    mu, _ = model.encoder(encode_words([first, last]), torch.zeros(2, dtype=torch.long))
    return spell_verbs(model, torch.lerp(mu[:1], mu[1:], torch.linspace(0, 1, steps)[:, None]))


def use_finished(args: argparse.Namespace) -> dict:
    """What --convert, --generate and --interpolate print."""
    model = load_finished(args.out)
    if args.convert is not None:
        source, target = TENSES.index(args.from_tense), TENSES.index(args.to_tense)
        [word] = convert(model, [check_word(args.convert, "--convert")], [source], [target])
        print(f"{args.convert} ({args.from_tense}) -> {word} ({args.to_tense})")
        return {"word": word}
    if args.interpolate:
        first, last = (check_word(word, "--interpolate") for word in args.interpolate)
        verbs = between(model, first, last)
    else:
        verbs = generate(model, args.generate, args.seed)
    for verb in [TENSES, *verbs]:
        print("  ".join(f"{word:16}" for word in verb).rstrip())
    return {"verbs": verbs}


def run(args: argparse.Namespace, verbs: Verbs, folder: Path) -> dict:
    """Train, score, and leave everything in `folder`."""
    begin = time.monotonic()
    device = pick_device(args.device)
    kept = ("latent_dim", "hidden_dim", "epochs", "batch_size", "lr", "kl_schedule", "kl_cycles", "kl_max",
            "teacher_forcing", "invented", "prior_draws", "holdout", "seed", "limit")  # fmt: skip
    settings = {name: getattr(args, name) for name in kept} | verbs.hashes
    checkpoint, finished = folder / "checkpoint.pt", folder / "metrics.json"
    state = load_checkpoint(checkpoint, "cvae", settings) if args.resume and checkpoint.exists() else None
    if state and "metrics" in state:
        print(f"finished  {folder} holds this run's end already")
        if not finished.exists():  # stopped between the two files
            write_json(finished, state["metrics"])
        return state["metrics"]
    open_run(folder, args.resume, describe_run(args, verbs.hashes))
    state = state or {"script": "cvae", "settings": settings, "partial": None, "seconds": 0.0}
    earlier = state["seconds"]

    def save(partial: dict) -> None:
        state["partial"], state["seconds"] = partial, earlier + time.monotonic() - begin
        with atomic(checkpoint) as temporary:
            torch.save(state, temporary)

    seed_all(args.seed)
    model = CVAE(args.latent_dim, args.hidden_dim).to(device)
    steps = args.epochs * math.ceil(len(verbs.train) / args.batch_size)
    with tqdm(total=steps, desc=args.kl_schedule, unit="batch", disable=None, leave=False) as bar:
        model, history = train(model, verbs, args, state["partial"], save, bar)
    model = model.cpu()
    return leave_results(folder, model, verbs, history, args, state, earlier + time.monotonic() - begin)


def leave_results(
    folder: Path, model: CVAE, verbs: Verbs, history: list[dict], args: argparse.Namespace, state: dict, seconds: float
) -> dict:
    """Score the finished model; write the tables, the figure, metrics.json and the model, and print the scores."""
    begin = time.monotonic()
    known = set(verbs.train)
    predictions, drawn = convert_tests(model, verbs.tests), generate(model, 10_000, args.seed)
    hundred = generate(model, 100, args.seed)
    large, distinct = score_generated(drawn, known)
    exact, bleu = score_held_out(model, verbs.held_out) if verbs.held_out else (None, None)
    trained = sum(any({*test[:2]} <= set(verb) for verb in verbs.train) for test in verbs.tests)
    last = history[-1]
    metrics = {
        "bleu4": test_bleu4(verbs.tests, predictions),
        "gaussian_score": score_generated(hundred, known)[0],
        "gaussian_score_10000": large,
        "distinct_valid_per_100": distinct,
        "heldout_exact": exact,
        "heldout_bleu4": bleu,
        "heldout_verbs": len(verbs.held_out),
        "test_verbs_trained_on": trained,
        "reconstruction": last["reconstruction"],
        "kl": last["kl"],
        "verbs": len(verbs.train),
        "epochs": args.epochs,
        "latent_dim": args.latent_dim,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    table = [
        (source, f"{TENSES[i]} -> {TENSES[j]}", target, word)
        for (source, target, i, j), word in zip(verbs.tests, predictions, strict=True)
    ]
    write_table(folder / "history.csv", tuple(last), [tuple(row.values()) for row in history])
    write_table(folder / "conversions.csv", ("input", "tenses", "target", "prediction"), table)
    write_table(folder / "generated.csv", (*TENSES, "training line"), [(*v, v in known) for v in hundred])
    first, final = verbs.train[0][0], verbs.train[-1][0]
    write_table(folder / "interpolation.csv", TENSES, between(model, first, final))
    plot_history(folder / "training.png", {args.kl_schedule: history})
    metrics["seconds"] = seconds + time.monotonic() - begin
    state |= {"partial": None, "average": model.state_dict(), "metrics": metrics}
    with atomic(folder / "checkpoint.pt") as temporary:
        torch.save(state, temporary)
    write_json(folder / "metrics.json", metrics)

    print("input            tenses                        target           prediction")
    for source, tenses, target, word in table:
        print(f"{source:16} {tenses:29} {target:16} {word:16}" + ("" if word == target else " wrong"))
    print("from N(0, I):    " + "; ".join(" ".join(verb) + ("" if verb in known else " (no training line)")
                                         for verb in hundred[:4]))  # fmt: skip
    print(f"BLEU-4    {metrics['bleu4']:.3f} over {len(table)} conversions, {trained} of training verbs and so memory")
    print(f"Gaussian  {metrics['gaussian_score']:.2f} of 100 draws and {large:.4f} of 10,000 are a training line; "
          f"{distinct:.1f} different ones in 100")  # fmt: skip
    if verbs.held_out:
        print(f"held out  {exact:.3f} exact, BLEU-4 {bleu:.3f} over the 12 conversions of {len(verbs.held_out)} verbs")
    else:
        print("held out  none; --holdout 100 tells how well verbs that it never saw are turned")
    print(f"wrote     tables, training.png, metrics.json and the model in {folder}/ ({metrics['seconds']:.0f} s)")
    return metrics


def compare_schedules(args: argparse.Namespace, verbs: Verbs) -> dict:
    """A run for the monotonic and one for the cyclical KL weight in <out>/schedules/<schedule>/, and a figure."""
    histories, metrics, folder = {}, {}, args.out / "schedules"
    for schedule in SCHEDULES[:2]:
        print(f"\n{schedule}")
        own = argparse.Namespace(**vars(args) | {"kl_schedule": schedule})
        metrics[schedule] = run(own, verbs, folder / schedule)
        with open(folder / schedule / "history.csv", encoding="utf-8") as file:
            histories[schedule] = [{key: float(v) for key, v in row.items()} for row in csv.DictReader(file)]
    plot_history(folder / "schedules.png", histories)
    print(f"\nwrote     {folder}/schedules.png")
    return metrics


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics; with --compare-schedules, by schedule."""
    if hasattr(sys.stdout, "reconfigure"):  # a ± is no reason to stop where the terminal or the log file has none
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    stop_signals.clear()
    try:
        catch_signals(finish_batch=False)
        if args.convert is not None or args.generate or args.interpolate:
            return use_finished(args)
        folder = find_data(args.data)
        bundled = args.data is None and folder.name == "sample"
        print(f"data      {folder}" + (f", the bundled sample. {SOURCE}" if bundled else ""))
        verbs = read_verbs(folder, args.holdout, args.limit, args.seed)
        if args.compare_schedules:
            return compare_schedules(args, verbs)
        metrics = run(args, verbs, args.out)
        words = ["python", sys.argv[0], "--convert", verbs.train[0][0], "--to", "past", "--out", str(args.out)]
        print(f"next      {shlex.join(words)}")
        return metrics
    except KeyboardInterrupt:
        number = stop_signals[0] if stop_signals else signal.SIGINT
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        print(f"stopped   go on with: {shlex.join(['python', sys.argv[0], *words, '--resume'])}")
        raise SystemExit(128 + number) from None
    finally:
        while held_locks:
            os.close(held_locks.pop())


if __name__ == "__main__":
    main()
