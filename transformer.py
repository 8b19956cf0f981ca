"""Classify news texts with a Transformer encoder trained from scratch.

Each text x of T words becomes vectors, one pre-norm encoder layer mixes them (Vaswani et al. 2017), and their mean over
title and description gives the logits of p(y|x); to predict, a naive Bayes vote of the text's words is added to them.
Two dropout passes p1, p2 over the same batch are trained to agree (R-Drop, Liang et al. 2021):

    loss = 1/2 (CE(p1, y) + CE(p2, y)) + r_drop * 1/2 (KL(p1 || p2) + KL(p2 || p1))      nats per text

    python transformer.py                            data/ beside the script, else its bundled sample
    python transformer.py --data DIR --vectors glove.6B.100d.txt
    python transformer.py --predict "your text"      with the trained model

It leaves submission.csv where you stand, and figures, tables, metrics.json and the model in runs/transformer/. On the
2,000 rows of the 2022 competition with GloVe 6B 100d: .9045 ± .0066 out of fold (two cores, float32, seed 0, 99 s).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import hashlib
import html
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torchtext.vocab import Vocab
from tqdm import tqdm

# pandas, scikit-learn, matplotlib and the tokenizers are imported where used: --predict need not wait for them.
try:
    import fcntl
except ImportError:  # Windows has no flock: there, keeping two runs out of one folder is up to the user
    fcntl = None

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SOURCE = (
    "The real train.csv and test.csv come from the in-class Kaggle competition; put them into data/ beside the script"
)
LABEL_NAMES = ("category", "label", "class", "class index")
ID_NAMES = ("id", "index")
PAD, UNK = 0, 1
SHAPES = 3  # how a word is written: small or no letters, Capitalized, CAPITALS
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.98)),
    "adam": partial(torch.optim.Adam, betas=(0.9, 0.98)),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
TOKENIZERS = ("basic_english", "spacy", "nltk", "whitespace")
LSA_WIDTH = 32  # more dimensions tell the training texts apart, not the classes: 200 lost a point to 50
MAX_FIELD = 100_000  # characters in one csv field; the longest news text of the competition has 1,012


# ----------------------------------------------------------------------------------------------------------------------
# arguments
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=Help)
    parser.error = fail  # a mistake is one line here as everywhere
    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, metavar="DIR", help="folder with train.csv and test.csv; otherwise data/ beside the "
        "script, or the bundled data/sample/")
    add("--out", type=Path, metavar="DIR", default=Path("runs/transformer"), help="folder for what a run leaves")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--predict", metavar="TEXT", help="classify a text, or each line of a file, with the model in "
        "--out; a tab parts its columns, such as title and description")
    add("--compare-tokenizers", action="store_true", help="a run for each tokenizer, a table and a figure")
    add("--seed", type=seed, default=0, help="of folds, weights, batches and dropout")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    add("--limit", type=positive, metavar="N", help="train on N random rows only, for a first look")
    add = parser.add_argument_group("columns, where the header does not tell").add_argument
    add("--label-column", metavar="NAME", help=f"the class; otherwise the one named {', '.join(LABEL_NAMES)}")
    add("--id-column", metavar="NAME", help=f"the row's id; otherwise the one named {', '.join(ID_NAMES)}")
    add("--text-columns", metavar="NAME", nargs="+", help="joined in this order; otherwise all others in file order")
    add = parser.add_argument_group("text").add_argument
    add("--tokenizer", choices=TOKENIZERS, default="basic_english", help="from text to tokens")
    add("--min-freq", type=positive, default=2, help="a word whose stem is seen less often, and which "
        "has no vector, becomes <unk>")
    add("--max-length", type=positive, metavar="TOKENS", help="cut longer texts; otherwise the longest training text")
    add("--vectors", metavar="PATH|NAME|none", help="word vectors to start from: a GloVe, fastText or word2vec text "
        "file, or a name that torchtext downloads (glove.6B.100d); otherwise glove*.txt or *.vec in the data folder")
    add = parser.add_argument_group("model").add_argument
    add("--layers", type=positive, default=1, help="encoder layers")
    add("--heads", type=positive, default=4, help="attention heads; divides --dim")
    add("--dim", type=positive, default=64, help="width of the encoder")
    add("--dropout", type=fraction, default=0.3, help="probability, inside the encoder")
    add("--activation", choices=tuple(ACTIVATIONS), default="gelu", help="of the feed-forward networks")
    add = parser.add_argument_group("training").add_argument
    add("--folds", type=positive, default=5, help="of the stratified cross-validation: each row is held out once")
    add("--seeds", type=positive, default=1, help="models per fold, averaged")
    add("--epochs", type=positive, default=15, help="passes over a fold's training rows")
    add("--batch-size", type=positive, default=32, help="texts a step, over all processes")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="sgd has momentum 0.9 and wants --lr 0.1")
    add("--lr", type=positive_float, default=1e-3, help="peak learning rate")
    add("--weight-decay", type=not_negative, default=0.01, help="on matrices")
    add("--word-dropout", type=fraction, default=0.3, help="probability that a word becomes <unk>")
    add("--label-smoothing", type=fraction, default=0.1, help="share of the target that is spread over all classes")
    add("--r-drop", type=not_negative, default=1.0, help="weight of the KL between two dropout passes, 0 for none")
    args = parser.parse_args(argv)
    if args.dim % args.heads:
        fail(f"--heads {args.heads} does not divide --dim {args.dim}")
    if args.folds < 2:
        fail(f"--folds {args.folds}: cross-validation needs at least 2")
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
fraction = checked(float, lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")


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
# data: csv -> texts and labels -> tokens -> integers
# ----------------------------------------------------------------------------------------------------------------------


class News(NamedTuple):
    """One competition: N training rows, M test rows."""

    texts: list[str]  # N, text columns joined by tabs
    labels: torch.Tensor  # (N,) index into classes
    ids: list[str]  # N
    classes: list[str]  # C labels as the file writes them
    test_texts: list[str]  # M
    test_ids: list[str]  # M
    header: tuple[str, str]  # of the submission: id and label column
    hashes: dict[str, str]  # sha256 of each file


def find_data(folder: Path | None) -> Path:
    """The folder to read: the one given, else data/ beside the script, else the bundled sample there."""
    if folder is not None:
        return folder
    if (HERE / "data" / "train.csv").exists():
        return HERE / "data"
    sample = HERE / "data" / "sample"
    if not (sample / "train.csv").exists():
        fail(f"no data/train.csv beside {Path(__file__).name}. {SOURCE}, or name their folder with --data")
    return sample


def read_rows(path: Path) -> tuple[list[list[str]], str]:
    """All rows of a csv file, header included, and the file's sha256. Every way to be malformed ends the program."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        fail(f"{path}: {error.strerror}. {SOURCE}, or name their folder with --data")
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}. Save it as UTF-8")
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if rows and row and len(row) != (width := len(rows[0])):
                fail(f"{path}: line {reader.line_num} has {len(row)} fields, the first has {width}. Quote commas")
            if row:  # csv gives [] for an empty line
                rows.append(row)
    except csv.Error as error:
        fail(f"{path}: line {reader.line_num}: {error}. Mend that line")
    if not rows:
        fail(f"{path}: the file is empty")
    return rows, hashlib.sha256(raw).hexdigest()


def find_column(columns: list[str], given: str | None, known: tuple[str, ...], path: Path, flag: str) -> str | None:
    if given is not None and given not in columns:
        fail(f"{path}: {flag} {given}: no such column; found {', '.join(columns)}")
    return given or next((name for name in columns if name.strip().lower() in known), None)


def read_table(path: Path):
    """A data frame of strings, and the file's sha256. A file that begins with a number has no header: it is read as
    AG News' class, title, description.
    """
    import pandas as pd

    rows, sha256 = read_rows(path)
    if rows[0][0].strip().isdigit():
        names = ["class", "title", "description", *(f"text {i}" for i in range(3, len(rows[0])))]
        rows.insert(0, names[: len(rows[0])])
    if len(set(rows[0])) < len(rows[0]):
        fail(f"{path}: two columns have the same name: {', '.join(rows[0])}")
    if len(rows) == 1:
        fail(f"{path}: a header and no rows")
    return pd.DataFrame(rows[1:], columns=rows[0]), sha256


def load_news(args: argparse.Namespace) -> News:
    """Read and check train.csv and test.csv, and a sample submission if one lies beside them."""
    folder = find_data(args.data)
    bundled = args.data is None and folder.name == "sample"
    print(f"data      {folder}" + (f", the bundled sample. {SOURCE}" if bundled else ""))
    train_path, test_path = folder / "train.csv", folder / "test.csv"
    train, train_hash = read_table(train_path)
    test, test_hash = read_table(test_path)
    columns = list(train.columns)
    label = find_column(columns, args.label_column, LABEL_NAMES, train_path, "--label-column")
    if label is None:
        fail(f"{train_path}: no label column; found {', '.join(columns)}. Name it with --label-column")
    key = find_column(columns, args.id_column, ID_NAMES, train_path, "--id-column")
    texts = args.text_columns or [name for name in columns if name not in (label, key)]
    for name in texts:
        find_column(columns, name, (), train_path, "--text-columns")
    if not texts:
        fail(f"{train_path}: no text column beside {label}; found {', '.join(columns)}")
    if strange := [name for name in test.columns if name not in columns]:
        fail(f"{test_path}: columns {', '.join(strange)} are not in train.csv ({', '.join(columns)})")
    if missing := [name for name in [key, *texts] if name is not None and name not in test.columns]:
        fail(f"{test_path}: no column {', '.join(missing)}; found {', '.join(test.columns)}")

    def rows_of(frame, path: Path) -> tuple[list[str], list[str]]:
        ids = [str(i) for i in range(1, len(frame) + 1)] if key is None else frame[key].str.strip().tolist()
        if len(set(ids)) < len(ids):
            twice, count = Counter(ids).most_common(1)[0]
            fail(f"{path}: {key} {twice!r} stands in {count} rows. Each row needs an id of its own")
        joined = ["\t".join(map(clean_text, row)) for row in frame[texts].itertuples(index=False)]
        if empty := sum(not text.strip() for text in joined):
            print(f"warning   {path}: {empty} of {len(joined)} rows have no text; they are classified without")
        return ids, joined

    ids, train_texts = rows_of(train, train_path)
    test_ids, test_texts = rows_of(test, test_path)
    names = train[label].str.strip().tolist()
    if "" in names:
        fail(f"{train_path}: row {names.index('') + 1} has no {label}")
    numeric = all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in names)
    classes = sorted(set(names), key=lambda name: (int(name), name) if numeric else name)
    if args.limit and args.limit < len(names):
        kept = sorted(np.random.default_rng(args.seed).choice(len(names), args.limit, replace=False).tolist())
        ids, train_texts, names = ([column[i] for i in kept] for column in (ids, train_texts, names))
    counts = Counter(names)
    rare, count = min(((name, counts[name]) for name in classes), key=lambda pair: pair[1])
    if count < args.folds:
        fail(f"{train_path}: {label} {rare!r} stands in {count} rows; {args.folds} folds need one each. "
             + ("Raise --limit, or lower --folds" if args.limit else "Mend the label, or lower --folds"))  # fmt: skip
    if len(classes) < 2:
        fail(f"{train_path}: every row has the {label} {classes[0]!r}; there is nothing to tell apart")
    header = (key or "Id", label)
    for sample in sorted(folder.glob("*ample*ubmission*.csv")):
        frame, _ = read_table(sample)
        if len(frame.columns) != 2:
            fail(f"{sample}: has the columns {', '.join(frame.columns)}, not an id and a label")
        if sorted(frame.iloc[:, 0]) != sorted(test_ids):
            fail(f"{sample}: its ids are not those of {test_path}. Take both from the same competition")
        header = tuple(frame.columns[:2])
    print(f"rows      {len(names)} to train on ({', '.join(f'{name}: {counts[name]}' for name in classes)}), "
          f"{len(test_ids)} to classify; text: {' + '.join(texts)}")  # fmt: skip
    labels = torch.tensor([classes.index(name) for name in names])
    hashes = {"train.csv": train_hash, "test.csv": test_hash}
    return News(train_texts, labels, ids, classes, test_texts, test_ids, header, hashes)


def clean_text(text: str) -> str:
    """Undo the debris of a scraped corpus: `Haiti #39;s` -> `Haiti's`, `&lt;b&gt;`, ` quot;`, `\\$44` -> `$44`."""
    text = re.sub(r"\s?#39;", "'", text)
    text = re.sub(r"\s?\bquot;", '"', text)
    for _ in range(2):  # &amp;lt; was escaped twice
        text = html.unescape(re.sub(r"&#\d{8,}", " ", text))  # no character has such a number
    text = re.sub(r"</?[a-zA-Z][^<>]*>|#\d+;", " ", text)
    return " ".join(text.replace("\\$", "$").replace("\\", " ").split())


def make_tokenizer(name: str) -> Callable[[str], list[str]]:
    """A function from text to lower-case tokens; only the library asked for is imported."""
    if name == "basic_english":
        from torchtext.data.utils import get_tokenizer

        return get_tokenizer("basic_english")
    if name == "spacy":
        import spacy

        pipeline = spacy.blank("en")
        return lambda text: [token.lower_ for token in pipeline(text) if not token.is_space]
    if name == "nltk":
        from nltk.tokenize import TreebankWordTokenizer

        tokenize = TreebankWordTokenizer().tokenize
        return lambda text: tokenize(text.lower())
    return lambda text: text.lower().split()


def find_vectors(given: str | None, folder: Path) -> str | None:
    """The vectors to start from: as given, else the first glove*.txt or *.vec in the data folder, else none."""
    if given is not None:
        return None if given == "none" else given
    found = sorted([*folder.glob("glove*.txt"), *folder.glob("*.vec")])
    return str(found[0]) if found else None


def read_vectors(source: str, words: set[str], cache: Path) -> dict[str, np.ndarray]:
    """The vectors of those `words` that `source` has: {word: (F,)}. A file is read line by line, never held whole.

    GloVe, fastText and word2vec share the format `word v1 … vF`; the last two begin with a line `count width`.
    """
    from torchtext.vocab import pretrained_aliases

    if source in pretrained_aliases and not Path(source).exists():
        try:
            vectors = pretrained_aliases[source](cache=str(cache))
        except Exception as error:  # urllib, zipfile and torchtext each have errors of their own
            fail(f"--vectors {source}: the download failed ({error}). Remove {cache} and try again, or give a file")
        return {word: vectors.vectors[vectors.stoi[word]].numpy() for word in words if word in vectors.stoi}
    found, width = {}, None
    try:
        with open(source, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                parts = line.rstrip().split(" ")
                if parts == [""] or (number == 1 and len(parts) == 2 and parts[0].isdigit()):
                    continue
                width = width or len(parts) - 1
                if width < 2:
                    fail(f"--vectors {source}: line {number} is not a word and its numbers, parted by blanks. Give a "
                         "GloVe, fastText or word2vec text file")  # fmt: skip
                extra = parts[1 : len(parts) - width]  # a few words of glove.840B have blanks inside: ". . ."
                if len(parts) <= width or any(re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", x) for x in extra):
                    fail(f"--vectors {source}: line {number} has {len(parts) - 1} numbers, the first has {width}. "
                         "Give a GloVe, fastText or word2vec text file")  # fmt: skip
                if parts[0] in words and not extra:
                    found[parts[0]] = np.array(parts[1:], dtype=np.float32)
    except OSError as error:
        fail(f"--vectors {source}: {error.strerror}. Give a file, a name such as glove.6B.100d, or none")
    except ValueError:
        fail(f"--vectors {source}: line {number} holds something that is not a number")
    if not all(np.isfinite(vector).all() for vector in found.values()):
        fail(f"--vectors {source}: holds values that are not finite")
    return found


class Token(NamedTuple):
    """A lower-case word or mark, the number of its text column, from 1, and its shape, 0 to SHAPES - 1."""

    word: str
    column: int
    shape: int


def split_text(text: str, columns: int, tokenize: Callable[[str], list[str]]) -> list[Token]:
    """The tokens of a text whose columns, at most `columns`, are parted by tabs."""
    tokens = []
    for number, part in enumerate(text.split("\t", columns - 1), 1):
        written = {word.lower(): word for word in reversed(re.findall(r"[^\W\d_]+", part))}  # as it stands there first
        for token in tokenize(part):
            word = written.get(token, "x")
            tokens.append(Token(token, number, 1 + word[1:].isupper() if word[0].isupper() else 0))
    return tokens


def encode(texts: list[list[Token]], index: dict[str, int], max_length: int) -> list[torch.Tensor]:
    """Each text as integers (T, 3), word, column and shape, T at most `max_length`; one without tokens is one <unk>."""
    cut = (text[:max_length] or [Token("", 1, 0)] for text in texts)
    return [torch.tensor([(index.get(word, UNK), column, shape) for word, column, shape in text]) for text in cut]


def length_batches(
    lengths: list[int], rows: list[int], batch_size: int, generator: torch.Generator | None
) -> list[list[int]]:
    """Split `rows` into batches of texts of about one length, so that little is padded.

    With a generator the rows are shuffled, sorted by length within windows of 16 batches only, and the batches
    shuffled: each epoch's batches differ. Without one, the rows are sorted by length throughout.
    """
    window = 16 * batch_size if generator else len(rows) + 1
    if generator:
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    batches = []
    for start in range(0, len(rows), window):
        by_length = sorted(rows[start : start + window], key=lambda row: lengths[row])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)] if generator else batches


def cooccurrence_vectors(stems: list[list[str]], number: dict[str, int], width: int) -> np.ndarray:
    """Vectors (V, width) of words from the texts alone: latent semantic analysis (Deerwester et al. 1990).

    The text-by-word matrix of tf-idf weights ≈ U S Vᵀ; a word's vector is its row of V S at length √width, so words of
    like texts point the same way. No label is used, so the texts of test.csv and of held-out folds may take part.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    columns = {"<pad>": PAD, "<unk>": UNK} | number
    weights = TfidfVectorizer(analyzer=list, vocabulary=columns, sublinear_tf=True).fit_transform(stems)  # (texts, V)
    svd = TruncatedSVD(min(width, len(stems) - 1, len(columns)), random_state=0).fit(weights)
    vectors = normalize(svd.components_.T * svd.singular_values_) * math.sqrt(width)
    vectors[[PAD, UNK]] = 0.0
    return vectors


def token_grams(tokens: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Numbers of each token's stem, its stem in this shape, and its stem in this column: (..., 3) -> (..., 3).

    Of V words they are below V, (1 + SHAPES) V and (1 + SHAPES + columns) V. Those of <unk> are 0.
    """
    word, column, shape = tokens.unbind(-1)
    blocks = torch.stack([torch.zeros_like(word), 1 + shape, SHAPES + column], -1)
    return (roots[word][..., None] + blocks * len(roots)) * (word > UNK)[..., None]


def find_grams(tokens: torch.Tensor, roots: torch.Tensor, pairs: torch.Tensor, columns: int) -> torch.Tensor:
    """Numbers of the distinct grams of a text (T, 3): those of its tokens, then pairs of neighbouring stems.

    A pair that is not in `pairs` has none.
    """
    stems = roots[tokens[:, 0]]  # (T,)
    keys = stems[:-1] * len(roots) + stems[1:]
    places = torch.searchsorted(pairs, keys)
    inside = places < len(pairs)
    places, keys = places[inside], keys[inside]
    linked = token_grams(tokens, roots).flatten()
    return torch.cat([linked, places[pairs[places] == keys] + (1 + SHAPES + columns) * len(roots)]).unique()


def class_evidence(
    tokens: list[torch.Tensor], grams: list[torch.Tensor], roots: torch.Tensor, count: int, labels: torch.Tensor,
    rows: list[int], classes: int, parts: int = 20,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:  # fmt: skip
    """How much more often each of `count` grams stands in one class than in the others, over the training `rows` only.

    It is log p(gram | class), add-half smoothed, less its mean over classes (the log-count ratio of Wang and Manning
    2012, eq. 1, for C classes). Returns the table (count, C) for texts to come, and {row: (T, 3, C)} for the tokens of
    the training texts. In the table they would find their own label in the counts of their rare words; so the rows are
    dealt into `parts`, and the counts that a row reads leave its part out.
    """

    def in_texts(rows: list[int]) -> torch.Tensor:
        """In how many of these texts of each class each gram stands (count, C)."""
        by_class = torch.cat([grams[row] * classes + labels[row] for row in rows])
        return torch.bincount(by_class, minlength=count * classes).view(count, classes)

    def log_ratio(counts: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        evidence = ((counts[found] + 0.5) / (counts.sum(0) + 0.5 * count)).log()
        return evidence - evidence.mean(-1, keepdim=True)

    counts, own = in_texts(rows), {}
    dealt = [rows[i] for i in torch.randperm(len(rows))]
    for mine in [dealt[part::parts] for part in range(min(parts, len(rows)))]:
        texts = [tokens[row] for row in mine]
        evidence = log_ratio(counts - in_texts(mine), token_grams(torch.cat(texts), roots))
        own |= zip(mine, evidence.split([len(text) for text in texts]), strict=True)
    return log_ratio(counts, torch.arange(count)), own


class Inputs(NamedTuple):
    """Both files as integers, with the vocabulary and the fixed vectors that the model looks up."""

    words: list[str]  # V, PAD and UNK first
    roots: torch.Tensor  # (V,) words of one stem share a number
    pairs: torch.Tensor  # (P,) the pairs of neighbouring stems that occur, first * V + second, sorted
    features: torch.Tensor  # (V, F)
    tokens: list[torch.Tensor]  # N, each (T, 3): word, column, shape
    test_tokens: list[torch.Tensor]  # M
    grams: list[torch.Tensor]  # N + M, from find_grams
    columns: int  # of text
    max_length: int
    coverage: float | None  # share of the tokens that have a vector; None without vectors


def prepare(args: argparse.Namespace, news: News) -> Inputs:
    """Tokenize, build the vocabulary of both files' words, look up or make their vectors, and say how it went."""
    from nltk.stem.snowball import EnglishStemmer

    tokenize = make_tokenizer(args.tokenizer)
    rows = tqdm(news.texts + news.test_texts, "tokenize", disable=None, leave=False)
    columns = 1 + max(text.count("\t") for text in news.texts)
    texts = [split_text(text, columns, tokenize) for text in rows]
    counts = Counter(token.word for text in texts for token in text)
    max_length = args.max_length or max(1, max(len(text) for text in texts[: len(news.texts)]))
    source = find_vectors(args.vectors, find_data(args.data))
    vectors = read_vectors(source, set(counts), args.out / "vectors") if source else {}
    if source and not vectors:
        fail(f"--vectors {source}: has none of the texts' words. Give vectors of their language, or --vectors none")
    stem = {word: EnglishStemmer().stem(re.sub(r"\d", "0", word)) for word in counts}  # 86-83 and 91-79 count as one
    stems = [[stem[token.word] for token in text] for text in texts]
    stem_counts = Counter(token for text in stems for token in text)
    kept = {word: n for word, n in counts.items() if stem_counts[stem[word]] >= args.min_freq or word in vectors}
    vocab = Vocab(Counter(kept), specials=["<pad>", "<unk>"])
    number = {}
    roots = [PAD, UNK] + [number.setdefault(stem[word], len(number) + 2) for word in vocab.itos[2:]]
    coverage = None
    if vectors:
        features = np.zeros((len(vocab), len(next(iter(vectors.values())))), dtype=np.float32)
        for word, vector in vectors.items():
            features[vocab.stoi[word]] = vector
        spread = features[features.any(1)].std()
        if not spread > 0:
            fail(f"--vectors {source}: all its numbers are the same. Give other vectors, or --vectors none")
        features /= spread
        coverage = sum(counts[word] for word in vectors) / sum(counts.values())
        name, width = Path(source).name, features.shape[1]
        print(f"vectors   {name}: {width} numbers a word, {coverage:.1%} of the tokens covered")
    else:
        features = cooccurrence_vectors(stems, number, LSA_WIDTH)[roots]
        print(f"vectors   none: {features.shape[1]} numbers a word from the texts' own co-occurrence")
    encoded = encode(texts, vocab.stoi, max_length)
    median = sorted(len(text) for text in texts)[len(texts) // 2]
    print(f"tokens    {args.tokenizer}: {median} a text (median), at most {max_length}; vocabulary {len(vocab)}")
    count = len(news.texts)
    features, roots = torch.from_numpy(features).float(), torch.tensor(roots)
    pairs = torch.cat([roots[text[:-1, 0]] * len(roots) + roots[text[1:, 0]] for text in encoded]).unique()
    grams = [find_grams(text, roots, pairs, columns) for text in encoded]
    return Inputs(vocab.itos, roots, pairs, features, encoded[:count], encoded[count:], grams, columns, max_length,
                  coverage)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Dropout from one random byte an element, p to 1/256: nn.Dropout's generator takes a third of a step on a CPU."""

    def __init__(self, p: float):
        super().__init__()
        self.cut = min(round(256 * p), 255)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.cut == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.cut
        return x * (keep * (256 / (256 - self.cut)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a LayerNorm (pre-norm) and added to its input.

    Attention(Q, K, V) = softmax(Q Kᵀ / √head_dim) V (Vaswani et al. 2017, eq. 1), the norms first as in Xiong et al.
    2020, fig. 1b.
    """

    def __init__(self, dim: int, heads: int, dropout: float, activation: str = "gelu"):
        super().__init__()
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.merge = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: torch.Tensor, keep: torch.Tensor, return_attn: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (B, T, dim), keep (B, T) true at tokens -> (B, T, dim) and, if asked for, attn_weights (B, heads, T, T)."""
        B, T, dim = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(B, T, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim) each
        mask = keep[:, None, None, :]  # (B, 1, 1, T): nobody looks at padding
        attn_weights = None
        if return_attn:
            scores = query @ key.transpose(-1, -2) / math.sqrt(dim // self.heads)  # (B, heads, T, T)
            attn_weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            mixed = attn_weights @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.dropout(self.merge(mixed.transpose(1, 2).reshape(B, T, dim)))
        hidden = self.dropout(self.activation(self.widen(self.feed_forward_norm(x))))
        return x + self.dropout(self.narrow(hidden)), attn_weights


class TransformerClassifier(nn.Module):
    """Word vectors and class evidence -> encoder -> mean over tokens, column by column -> logits.

    The vectors `features` (V, F) are fixed: 2,000 texts are too few to move 13,000 words to better places. They belong
    to the run, not to one model, and are saved once. `evidence` (G, C) comes from the model's own training rows.
    """

    def __init__(
        self, features: torch.Tensor, roots: torch.Tensor, grams: int, classes: int, columns: int, max_length: int,
        dim: int, heads: int, layers: int, dropout: float, activation: str = "gelu",
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("roots", roots, persistent=False)
        self.register_buffer("evidence", torch.zeros(grams, classes))
        self.project = nn.Linear(features.shape[1] + 3 * classes, dim)
        self.position = nn.Parameter(0.02 * torch.randn(max_length, dim))
        self.column = nn.Parameter(0.1 * torch.randn(columns + 1, dim))  # one more for padding
        self.shape = nn.Parameter(0.1 * torch.randn(SHAPES, dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, dropout, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes)
        self.input_dropout, self.output_dropout = Dropout(0.1), Dropout(dropout)

    def forward(
        self, tokens: torch.Tensor, evidence: torch.Tensor | None = None, return_attn: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """tokens (B, T, 3) -> logits (B, C); with `return_attn` also the last layer's attn_weights (B, heads, T, T).

        Training texts bring their own `evidence` (B, T, 3, C), which leaves them out.
        """
        word, column, shape = tokens.unbind(-1)  # (B, T)
        evidence = self.evidence[token_grams(tokens, self.roots)] if evidence is None else evidence
        evidence = evidence * (word > UNK)[..., None, None]  # <unk> and padding say nothing
        x = torch.cat([self.features[word], evidence.flatten(2)], -1)  # (B, T, F + 3C)
        x = self.project(self.input_dropout(x)) + self.column[column] + self.shape[shape]  # (B, T, dim)
        x = x + self.position[: x.shape[1]]
        for layer in self.layers:
            x, attn_weights = layer(x, word != PAD, return_attn)
        inside = F.one_hot(column, len(self.column))[..., 1:].float()  # (B, T, columns), nothing at padding
        sizes = inside.sum(1)  # (B, columns)
        means = inside.transpose(1, 2) @ self.norm(x) / sizes.clamp_min(1)[..., None]  # (B, columns, dim)
        pooled = means.sum(1) / (sizes > 0).sum(1, keepdim=True)  # a short title weighs as much as its description
        logits = self.classify(self.output_dropout(pooled))
        return (logits, attn_weights) if return_attn else logits


# ----------------------------------------------------------------------------------------------------------------------
# objective
# ----------------------------------------------------------------------------------------------------------------------


def drop_words(tokens: torch.Tensor, p: float) -> torch.Tensor:
    """Turn each word of (B, T, 3) into <unk> with probability p; columns, shapes and padding stay."""
    word, *marks = tokens.unbind(-1)
    dropped = (torch.rand(word.shape, device=word.device) < p) & (word != PAD)
    return torch.stack([word.masked_fill(dropped, UNK), *marks], -1)


def r_drop_loss(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss and its cross-entropy, in nats, summed over the B items.

    logits (2B, C) hold two dropout passes over the same B items, one behind the other; labels (B,).
    ½ (CE₁ + CE₂) + weight · ½ (KL(p₁‖p₂) + KL(p₂‖p₁)): R-Drop (Liang et al. 2021, eqs. 1-4) with weight = α/2, since
    the paper adds the two cross-entropies where this averages them. With one pass, (B, C), it is the cross-entropy.
    """
    passes = len(logits) // len(labels)
    nll = F.cross_entropy(logits, labels.repeat(passes), label_smoothing=label_smoothing, reduction="sum") / passes
    if passes == 1:
        return nll, nll
    first, second = logits.log_softmax(-1).chunk(2)  # (B, C) each
    kl = ((first.exp() - second.exp()) * (first - second)).sum() / 2  # KL one way plus the other, halved
    return nll + weight * kl, nll


# ----------------------------------------------------------------------------------------------------------------------
# training
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


def train_member(
    model: TransformerClassifier, inputs: Inputs, labels: torch.Tensor, rows: list[int], args: argparse.Namespace,
    place: tuple[int, ...], start: dict | None, save: Callable[[dict], None], bar: tqdm,
) -> list[dict]:  # fmt: skip
    """Train `model` on `rows` and return its history, one row an epoch.

    `place` tells this member's noise from the others'; `start` is a state to go on from; `save` takes the state after
    each epoch and when a signal stops the run. A loss that is not finite goes back to the last epoch's end at half
    the learning rate, three times at most.
    """
    device = model.position.device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tokens = inputs.tokens
    seed_all(*place)
    count, classes = model.evidence.shape
    table, own = class_evidence(tokens, inputs.grams, inputs.roots, count, labels, rows, classes)
    model.evidence.copy_(table)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[args.optimizer](groups, lr=args.lr, fused=device.type != "mps")
    at = {"epoch": 0, "batch": 0, "nll": 0.0, "hits": 0.0, "seen": 0, "retries": 0}
    history: list[dict] = []

    def snapshot() -> dict:
        parts = {"at": at, "history": history, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return copy.deepcopy(parts)

    def restore(state: dict) -> None:
        state = copy.deepcopy(state)
        at.update(state["at"])
        history[:] = state["history"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    good = (start or {}).get("good") or start or snapshot()  # the last epoch's end
    try:
        restore(start or good)
    except (KeyError, RuntimeError, ValueError):
        fail("the checkpoint was trained by another version of transformer.py. Train again without --resume")
    passes = 2 if args.r_drop else 1
    lengths = [len(text) for text in tokens]
    per_epoch = math.ceil(len(rows) / args.batch_size)
    bar.update(at["epoch"] * per_epoch + at["batch"])
    model.train()
    catch_signals(finish_batch=True)
    while at["epoch"] < args.epochs:
        batches = length_batches(lengths, rows, args.batch_size, seed_all(*place, at["epoch"]))
        for batch in batches[at["batch"] :]:
            step = at["epoch"] * per_epoch + at["batch"]
            seed_all(*place, step, rank, at["retries"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.epochs * per_epoch, args.lr) * 0.5 ** at["retries"]

            mine = batch[rank::world] or batch[:1]  # this process's share
            weight = (rank < len(batch)) / len(batch)  # 0 where a small last batch left it none
            x = pad_sequence([tokens[row] for row in mine], batch_first=True, padding_value=PAD).to(device)  # (B, T, 3)
            y = labels[mine].to(device)  # (B,)
            x = drop_words(x.repeat(passes, 1, 1), args.word_dropout)  # (passes B, T, 3)
            evidence = pad_sequence([own[row] for row in mine], batch_first=True).to(device)  # (B, T, 3, C)
            with autocast(device):
                logits = model(x, evidence.repeat(passes, 1, 1, 1)).float()  # (passes B, C)
            loss, nll = r_drop_loss(logits, y, args.label_smoothing, args.r_drop)
            optimizer.zero_grad()
            (loss * weight).backward()
            hits = (logits[: len(y)].argmax(-1) == y).sum()
            sums = torch.stack([nll.detach() * weight, hits * weight, y.new_tensor(len(stop_signals))]).float()
            if world > 1:
                sums = share_gradients(model, sums)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            nll, hits, stop = sums.tolist()

            if not math.isfinite(nll + norm.item()):
                retries = at["retries"] + 1
                facts = f"loss {nll}, gradient norm {norm.item()} in epoch {at['epoch'] + 1}, batch {at['batch'] + 1}"
                if retries > 3:
                    fail(f"{facts}, for the fourth time. Lower --lr (now {args.lr:g})")
                tqdm.write(f"warning   {facts}: back to the last epoch's end at half the learning rate")
                bar.update(-at["batch"])
                restore(good)
                at["retries"] = retries
                break
            optimizer.step()
            at["nll"] += nll * len(batch)
            at["hits"] += hits * len(batch)
            at["seen"] += len(batch)
            at["batch"] += 1
            bar.update()
            bar.set_postfix_str(f"accuracy {at['hits'] / at['seen']:.3f}", refresh=False)
            if stop:
                save(snapshot() | {"good": good})
                raise KeyboardInterrupt
        else:  # the epoch ended without a break
            epoch, seen = at["epoch"] + 1, at["seen"]
            history.append({"epoch": epoch, "cross_entropy": at["nll"] / seen, "accuracy": at["hits"] / seen})
            at.update(epoch=epoch, batch=0, nll=0.0, hits=0.0, seen=0)
            good = snapshot()
            save(good)
    catch_signals(finish_batch=False)
    return history


@torch.no_grad()
def predict_probabilities(
    model: TransformerClassifier, tokens: list[torch.Tensor], grams: list[torch.Tensor]
) -> torch.Tensor:
    """Class probabilities (N, C) of the texts, each with its `grams`: a product of two experts (Hinton 2002, eq. 1).

    The encoder gives the logits; the evidence of the text's grams, summed, is a naive Bayes classifier's vote. Trained
    apart, they err apart: dividing by 2 √n keeps the vote of n dependent grams from drowning the logits. A stem votes
    as one of its column, and with a capital once more.
    """
    device = model.position.device
    model.eval()
    probabilities = torch.zeros(len(tokens), model.classify.out_features)
    for batch in length_batches([len(text) for text in tokens], list(range(len(tokens))), 128, None):
        x = pad_sequence([tokens[row] for row in batch], batch_first=True, padding_value=PAD).to(device)
        voters = [grams[row][grams[row] >= 2 * len(model.roots)].to(device) for row in batch]
        votes = [model.evidence[mine].sum(0) / (2 * math.sqrt(len(mine) or 1)) for mine in voters]
        probabilities[batch] = (model(x) + torch.stack(votes)).softmax(-1).cpu()
    return probabilities


def standard_error(accuracy: float, count: int) -> float:
    """Of a share of `count` independent items: √(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


# ----------------------------------------------------------------------------------------------------------------------
# figures and tables
# ----------------------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, drawn without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_learning_curve(path: Path, history: list[dict], accuracy: float, error: float) -> None:
    """Training cross-entropy and accuracy of each model by epoch, and the out-of-fold accuracy they come to."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for panel, key in ((left, "cross_entropy"), (right, "accuracy")):
        curves = {}
        for row in history:
            curves.setdefault((row["fold"], row["seed"]), []).append((row["epoch"], row[key]))
        for curve in curves.values():
            panel.plot(*zip(*curve, strict=True), color="tab:blue", alpha=0.4, linewidth=1)
        panel.plot([], [], color="tab:blue", label=f"training, {len(curves)} models")
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("cross-entropy, smoothed labels (nats)", fontsize=9)
    right.set_ylabel("accuracy")
    right.axhline(accuracy, color="tab:red", label=f"out of fold {accuracy:.4f} ± {error:.4f}")
    right.axhspan(accuracy - error, accuracy + error, color="tab:red", alpha=0.15, linewidth=0)
    left.legend()
    right.legend(loc="lower right")
    figure.suptitle("Training sees words and units dropped, the out-of-fold texts are whole", fontsize=9)
    save_figure(figure, path)


def plot_confusion(path: Path, labels: torch.Tensor, predicted: torch.Tensor, classes: list[str]) -> None:
    """Counts of (true, predicted) class, out of fold, shaded by the share of the true class."""
    counts = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2).view(len(classes), -1)
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    size = 2.2 + 0.6 * len(classes)
    figure = new_figure(size + 0.6, size)
    panel = figure.subplots()
    image = panel.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i in range(len(classes)):
        for j in range(len(classes)):
            color = "white" if share[i, j] > 0.5 else "black"
            panel.text(j, i, int(counts[i, j]), ha="center", va="center", color=color)
    turn = 45 if max(map(len, classes)) > 3 else 0
    panel.set_xticks(range(len(classes)), classes, rotation=turn, parse_math=False)
    panel.set_yticks(range(len(classes)), classes, parse_math=False)
    panel.set_xlabel("predicted")
    panel.set_ylabel("true")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    save_figure(figure, path)


def plot_tokenizers(path: Path, frame, shown: dict[str, list[str]]) -> None:
    """One text as each tokenizer cuts it, and the cross-validated accuracy of each."""
    figure = new_figure(9, 6)
    top, bottom = figure.subplots(2, 1, height_ratios=(2, 1))
    top.axis("off")
    for i, (name, words) in enumerate(shown.items()):
        text = textwrap.fill(" | ".join(words), 100)
        label = f"{name}: {len(words)} tokens\n{text}"
        top.text(0, 1 - i / len(shown), label, va="top", fontsize=9, family="monospace", parse_math=False)
    bottom.errorbar(frame["oof_accuracy"], frame["tokenizer"], xerr=frame["oof_accuracy_se"], fmt="o", capsize=4)
    bottom.set_xlabel("out-of-fold accuracy ± standard error")
    bottom.invert_yaxis()
    save_figure(figure, path)


def plot_attention(path: Path, words: list[str], attn: torch.Tensor, title: str) -> None:
    """attn (heads, T, T) of the last layer: the mean over heads as a map, and what each token receives, per head.

    The classifier averages over tokens, so a token counts by the attention it receives, averaged over the T that look.
    """
    heads, count, _ = attn.shape
    figure = new_figure(9, 10.5)
    top, bottom = figure.subplots(2, 1, height_ratios=(count, heads + 1.5))
    scale = top.imshow(attn.mean(0).numpy(), cmap="Blues", vmin=0)
    top.set_yticks(range(count), words, fontsize=8, parse_math=False)
    top.set_xticks(range(count), words, fontsize=8, rotation=90, parse_math=False)
    top.set_ylabel("token that looks")
    top.set_xlabel("token looked at")
    figure.colorbar(scale, ax=top, label="attention, mean over heads", shrink=0.6)
    received = torch.cat([attn.mean(1), attn.mean((0, 1))[None]]) * count  # (heads + 1, T), 1 = an even share
    strip = bottom.imshow(received.numpy(), cmap="Oranges", vmin=0, aspect="auto")
    bottom.set_yticks(range(heads + 1), [*(f"head {i + 1}" for i in range(heads)), "mean"], fontsize=8)
    bottom.set_xticks(range(count), words, fontsize=8, rotation=90, parse_math=False)
    figure.colorbar(strip, ax=bottom, label="received / even share", shrink=0.9)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


@torch.no_grad()
def show_attention(folder: Path, news: News, inputs: Inputs, state: dict, oof: torch.Tensor) -> None:
    """Attention maps of two right and two wrong predictions, and the words that draw most attention, by class.

    Each text is seen by a model that was not trained on it. The maps are of the surest with 12 to 40 tokens.
    """
    import pandas as pd

    confidence, predicted = oof.max(-1)
    received: dict[tuple[int, int], list[float]] = {}
    reader: dict[int, TransformerClassifier] = {}  # row -> the model that did not train on it
    for member, model in zip(state["members"], load_members(state), strict=True):
        reader |= dict.fromkeys(member["rows"], model)
        for batch in length_batches([len(text) for text in inputs.tokens], member["rows"], 128, None):
            x = pad_sequence([inputs.tokens[row] for row in batch], batch_first=True, padding_value=PAD)
            word = x[..., 0]  # (B, T)
            _, attn = model(x, return_attn=True)
            looks = (attn.mean(1) * (word != PAD)[..., None]).sum(1)  # (B, T), mean over heads, sum over who looks
            for row, words, shares in zip(batch, word.tolist(), looks.tolist(), strict=True):
                for i in range(len(inputs.tokens[row])):
                    received.setdefault((int(predicted[row]), words[i]), []).append(shares[i])
    table = [
        (news.classes[c], inputs.words[word], len(shares), sum(shares) / len(shares))
        for (c, word), shares in received.items()
        if len(shares) >= 5 * state["settings"]["seeds"] and word != UNK
    ]
    columns = ["predicted_class", "word", "count", "attention_over_even_share"]
    frame = pd.DataFrame(table, columns=columns).sort_values(columns[-1], ascending=False, kind="stable")
    frame = frame.groupby("predicted_class").head(20).sort_values("predicted_class", kind="stable")
    with atomic(folder / "attention_words.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.3f")

    tokenize = make_tokenizer(state["settings"]["tokenizer"])
    short = [row for row in range(len(oof)) if 12 <= len(inputs.tokens[row]) <= 40]
    short.sort(key=lambda row: -confidence[row].item())
    for kind in ("right", "wrong"):
        rows = [row for row in short if (predicted[row] == news.labels[row]).item() == (kind == "right")]
        other = [row for row in rows[1:] if predicted[row] != predicted[rows[0]]]  # a second one of another class
        for number, row in enumerate(rows[:1] + other[:1], 1):
            _, attn = reader[row](inputs.tokens[row][None], return_attn=True)
            known = zip(split_text(news.texts[row], inputs.columns, tokenize), inputs.tokens[row][:, 0], strict=False)
            words = [f"[{word}]" if token == UNK else word for (word, *_), token in known]  # <unk> in brackets
            true, guess = news.classes[news.labels[row]], news.classes[predicted[row]]
            title = f"{news.header[0]} {news.ids[row]}: true class {true}, predicted {guess} ({confidence[row]:.0%})"
            plot_attention(folder / f"attention-{kind}-{number}.png", words, attn[0], title)


def write_predictions(folder: Path, news: News, oof: torch.Tensor) -> None:
    """oof_predictions.csv: every training row as classified while held out; mistakes.csv: the 50 surest errors."""
    import pandas as pd

    confidence, predicted = oof.max(-1)
    frame = pd.DataFrame({news.header[0]: news.ids, "true": [news.classes[i] for i in news.labels]})
    frame = frame.assign(predicted=[news.classes[i] for i in predicted], confidence=confidence.numpy())
    frame = frame.assign(**{f"p({name})": oof[:, i].numpy() for i, name in enumerate(news.classes)})
    with atomic(folder / "oof_predictions.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.4f")
    wrong = frame.assign(text=[text.replace("\t", " ") for text in news.texts])[frame["true"] != frame["predicted"]]
    wrong = wrong.sort_values("confidence", ascending=False, kind="stable").head(50)
    with atomic(folder / "mistakes.csv") as temporary:
        wrong[[news.header[0], "true", "predicted", "confidence", "text"]].to_csv(temporary, index=False)


def write_submission(path: Path, news: News, predicted: torch.Tensor) -> None:
    """Write submission.csv, read it back, and move it into place only when Kaggle would take it."""
    import pandas as pd

    labels = [news.classes[i] for i in predicted]
    with atomic(path) as temporary:
        pd.DataFrame({news.header[0]: news.test_ids, news.header[1]: labels}).to_csv(temporary, index=False)
        rows, _ = read_rows(temporary)
        if rows != [list(news.header), *map(list, zip(news.test_ids, labels, strict=True))]:
            raise AssertionError(f"{path} does not read back as it was written")


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def build_model(state: dict) -> TransformerClassifier:
    """The network that a checkpoint describes, with fresh weights."""
    shape = (state["settings"][name] for name in ("dim", "heads", "layers", "dropout", "activation"))
    grams = (1 + SHAPES + state["columns"]) * len(state["roots"]) + len(state["pairs"])
    return TransformerClassifier(state["features"], state["roots"], grams, len(state["classes"]), state["columns"],
                                 state["max_length"], *shape)  # fmt: skip


def load_members(state: dict) -> list[TransformerClassifier]:
    """The trained models of a checkpoint, on the CPU, ready to predict."""
    try:
        models = [build_model(state).eval() for _ in state["members"]]
        for model, member in zip(models, state["members"], strict=True):
            model.load_state_dict(member["weights"])
    except (KeyError, RuntimeError):
        fail("the checkpoint was trained by another version of transformer.py. Train again without --resume")
    return models


def predict(args: argparse.Namespace) -> dict:
    """Classify --predict's text, or each line of the file of that name, with the mean of the run's models."""
    if not (args.out / "checkpoint.pt").exists():
        fail(f"{args.out}: no run there. Train first, or name its folder with --out")
    state = load_checkpoint(args.out / "checkpoint.pt", "transformer", {})
    if not state["members"]:
        fail(f"{args.out}: the run there has no trained model yet. Go on with it: --resume")
    models, lines = load_members(state), [args.predict]
    if os.path.isfile(args.predict):
        try:
            lines = Path(args.predict).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        except OSError as error:
            fail(f"--predict {args.predict}: {error.strerror}. Give a text, or a file that can be read")
    texts = ["\t".join(map(clean_text, line.split("\t"))) for line in lines]
    tokenize = make_tokenizer(state["settings"]["tokenizer"])
    index = {word: i for i, word in enumerate(state["words"])}
    tokens = encode([split_text(text, state["columns"], tokenize) for text in texts], index, state["max_length"])
    grams = [find_grams(text, state["roots"], state["pairs"], state["columns"]) for text in tokens]
    probabilities = torch.stack([predict_probabilities(model, tokens, grams) for model in models]).mean(0)
    confidence, predicted = probabilities.max(-1)
    labels = [state["classes"][i] for i in predicted]
    for label, share, text in zip(labels, confidence.tolist(), texts, strict=True):
        print(label, f"{share:.3f}", text.replace("\t", " "), sep="\t")
    return {"labels": labels, "confidence": confidence.tolist()}


def compare_tokenizers(args: argparse.Namespace, news: News) -> dict:
    """One cross-validated run per tokenizer in <out>/tokenizers/<tokenizer>/, a table and a figure beside them."""
    import pandas as pd

    folder = args.out / "tokenizers"
    table, tokens = [], {}
    for name in TOKENIZERS:
        tokenize = make_tokenizer(name)
        begin = time.monotonic()
        texts = tokens[name] = [tokenize(text) for text in news.texts]
        seconds = time.monotonic() - begin
        print(f"\n{name}")
        own = argparse.Namespace(**vars(args) | {"tokenizer": name})
        metrics = cross_validate(own, news, folder / name, folder / name / "submission.csv")
        known = Counter(token for text in texts[::2] for token in text)  # how new are the words of the other half?
        held_out = [token for text in texts[1::2] for token in text]
        table.append(
            {
                "tokenizer": name,
                "tokens_per_text": sum(map(len, texts)) / len(texts),
                "vocabulary": len({token for text in texts for token in text}),
                "unk_share": sum(known[token] < args.min_freq for token in held_out) / max(1, len(held_out)),
                "vector_coverage": metrics["vector_coverage"],
                "tokenize_seconds": seconds,
                "oof_accuracy": metrics["oof_accuracy"],
                "oof_accuracy_se": metrics["oof_accuracy_se"],
            }
        )
    results = {row["tokenizer"]: row for row in table}
    if dist.is_initialized() and dist.get_rank():
        return results
    frame = pd.DataFrame(table)
    with atomic(folder / "tokenizers.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.4f")
    short = [row for row, text in enumerate(news.texts) if len(text) <= 200] or [0]
    ways = {row: {token for texts in tokens.values() for token in texts[row]} for row in short}
    telling = max(short, key=lambda row: len(ways[row]) - len(set(tokens["basic_english"][row])))  # most different
    plot_tokenizers(folder / "tokenizers.png", frame, {name: texts[telling] for name, texts in tokens.items()})
    print(f"\n{frame.to_string(index=False, float_format='%.4f')}\nwrote     {folder}/tokenizers.csv, tokenizers.png")
    return results


def cross_validate(args: argparse.Namespace, news: News, folder: Path, submission: Path) -> dict:
    """Train on each fold's complement, predict the fold and the test texts; `folder` takes all but the submission."""
    from sklearn.model_selection import StratifiedKFold

    begin = time.monotonic()
    device = pick_device(args.device)
    rank, world = start_processes(device)
    not_settings = ("data", "out", "resume", "device", "predict", "compare_tokenizers")
    settings = {name: value for name, value in vars(args).items() if name not in not_settings} | news.hashes
    checkpoint = folder / "checkpoint.pt"
    state = load_checkpoint(checkpoint, "transformer", settings) if args.resume and checkpoint.exists() else None
    finished = folder / "metrics.json"
    if state and finished.exists():
        metrics = json.loads(finished.read_text(encoding="utf-8"))
        print(f"finished  {folder} holds this run's end already: accuracy {metrics['oof_accuracy']:.4f} out of fold")
        return metrics
    inputs = prepare(args, news)
    if state and not (state["words"] == inputs.words and state["features"].shape == inputs.features.shape
                      and torch.allclose(state["features"], inputs.features, atol=1e-3)):  # fmt: skip
        fail(f"{checkpoint}: trained with other word vectors. Give the same --vectors, or start over without --resume")
    if rank == 0:
        open_run(folder, args.resume, describe_run(args, news.hashes))
        if not state:
            finished.unlink(missing_ok=True)  # of a run whose checkpoint is gone
        downloaded = folder.with_name(folder.name + ".previous") / "vectors"
        if downloaded.exists() and not (folder / "vectors").exists():
            downloaded.rename(folder / "vectors")
    state = state or {"script": "transformer", "settings": settings, "members": [], "partial": None, "history": [],
                      "seconds": 0.0}  # fmt: skip
    state |= {"words": inputs.words, "features": inputs.features, "roots": inputs.roots, "pairs": inputs.pairs,
              "columns": inputs.columns, "max_length": inputs.max_length, "classes": news.classes}  # fmt: skip
    earlier = state["seconds"]

    def save(partial: dict | None) -> None:
        state["partial"], state["seconds"] = partial, earlier + time.monotonic() - begin
        if rank == 0:
            with atomic(checkpoint) as temporary:
                torch.save(state, temporary)

    folds = list(StratifiedKFold(args.folds, shuffle=True, random_state=args.seed).split(news.texts, news.labels))
    oof = torch.zeros(len(news.texts), len(news.classes))
    test = torch.zeros(len(news.test_texts), len(news.classes))
    fold_accuracy, texts = [], (inputs.tokens, inputs.grams)
    for fold, (train, held_out) in enumerate(folds):
        for seed in range(args.seeds):
            if len(state["members"]) == fold * args.seeds + seed:
                place = (args.seed, fold, seed)
                seed_all(*place)
                model = build_model(state).to(device)
                steps = args.epochs * math.ceil(len(train) / args.batch_size)
                name = f"fold {fold + 1}/{args.folds}" + (f" seed {seed + 1}/{args.seeds}" if args.seeds > 1 else "")
                quiet = None if rank == 0 else True
                with tqdm(total=steps, desc=name, unit="batch", disable=quiet, leave=False) as bar:
                    rows = train.tolist()
                    history = train_member(model, inputs, news.labels, rows, args, place, state["partial"], save, bar)
                state["history"] += [{"fold": fold + 1, "seed": seed + 1} | row for row in history]
                state["members"].append(
                    {
                        "weights": {key: value.cpu() for key, value in model.state_dict().items()},
                        "rows": held_out.tolist(),
                        "held_out": predict_probabilities(model, *([x[i] for i in held_out] for x in texts)),
                        "test": predict_probabilities(model, inputs.test_tokens, inputs.grams[len(news.texts) :]),
                    }
                )
                save(None)
            member = state["members"][fold * args.seeds + seed]
            oof[held_out] += member["held_out"] / args.seeds
            test += member["test"] / (args.folds * args.seeds)
        hits = (oof[held_out].argmax(-1) == news.labels[held_out]).float()
        fold_accuracy.append(hits.mean().item())
        seconds = earlier + time.monotonic() - begin
        print(f"fold {fold + 1}/{args.folds}  accuracy {hits.mean():.4f} on {len(hits)} rows, after {seconds:.0f} s")

    accuracy = (oof.argmax(-1) == news.labels).float().mean().item()
    error = standard_error(accuracy, len(oof))
    metrics = {
        "oof_accuracy": accuracy,
        "oof_accuracy_se": error,
        "fold_accuracy": fold_accuracy,
        "vector_coverage": inputs.coverage,
        "parameters": sum(p.numel() for p in build_model(state).parameters()),
        "seconds": earlier + time.monotonic() - begin,
    }
    if rank == 0:
        leave_results(news, inputs, folder, submission, state, oof, test, metrics)
    return metrics


def leave_results(
    news: News, inputs: Inputs, folder: Path, submission: Path, state: dict, oof: torch.Tensor, test: torch.Tensor,
    metrics: dict,
) -> None:  # fmt: skip
    """The submission, history, figures, tables and, last, metrics.json: that it is there says the run is finished."""
    accuracy, error = metrics["oof_accuracy"], metrics["oof_accuracy_se"]
    write_submission(submission, news, test.argmax(-1))
    with atomic(folder / "history.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(state["history"][0]))
        writer.writeheader()
        writer.writerows(state["history"])
    plot_learning_curve(folder / "learning-curve.png", state["history"], accuracy, error)
    plot_confusion(folder / "confusion-matrix.png", news.labels, oof.argmax(-1), news.classes)
    write_predictions(folder, news, oof)
    show_attention(folder, news, inputs, state, oof)
    write_json(folder / "metrics.json", metrics)
    print(f"accuracy  {accuracy:.4f} ± {error:.4f} (standard error), out of fold, on {len(oof)} rows")
    print(f"wrote     {submission} ({len(test)} rows); figures, tables and the model in {folder}/")


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics."""
    if hasattr(sys.stdout, "reconfigure"):  # a ± is no reason to stop where the terminal or the log file has none
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_args(argv)
    stop_signals.clear()
    if int(os.environ.get("RANK", 0)):  # of several processes the first one speaks
        sys.stdout = io.StringIO()
    try:
        catch_signals(finish_batch=False)
        if args.predict is not None:
            return predict(args)
        news = load_news(args)
        if args.compare_tokenizers:
            return compare_tokenizers(args, news)
        metrics = cross_validate(args, news, args.out, Path("submission.csv"))
        print('next      upload it: kaggle competitions submit COMPETITION -f submission.csv -m "Transformer"')
        print(f'          or try the model: python {Path(__file__).name} --out {args.out} --predict "your text"')
        return metrics
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
