# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.7",
#     "torchtext<0.7",  # later ones are compiled for a torch of their own year
#     "spacy",
#     "nltk>=3.8",
#     "numpy>=1.26",
#     "pandas>=2.2",
#     "scikit-learn>=1.2",
#     "matplotlib>=3.7",
#     "tqdm>=4.66",
#     "filelock>=3.12",
# ]
# ///
"""Classify news texts with a Transformer encoder that is trained from scratch.

Each word of a text x becomes a fixed vector, joined by class evidence: numbers that say how
strongly the word, and the pair of it and the word before it, speak for each class in the training
texts (naive Bayes). A convolution over three words and an encoder layer (Vaswani et al. 2017) mix
the words. Their mean gives the logits of p(y|x), to which words and pairs also add a direct vote
(as in NBSVM, Wang and Manning 2012). Two passes p1 and p2 over the same texts, with different
dropout, are trained to agree (R-Drop, Liang et al. 2021):

    loss = 1/2 (CE(p1, y) + CE(p2, y)) + r_drop * 1/2 (KL(p1 || p2) + KL(p2 || p1))  nats per text

The training texts are split into five folds. One model per fold is trained on the other four and
classifies the held-out one, which gives the accuracy, and a temperature for its confidence. The
test texts get the mean of all models.

Usage:

    python transformer.py                              train on data/, or on the bundled sample
    python transformer.py --data DIR --vectors FILE    train on other files, with GloVe vectors
    python transformer.py --predict "your text"        classify a text by the trained models

It writes submission.csv into the current folder and everything else into runs/transformer/. On the
2,000 texts of the 2022 competition with GloVe 6B 100d the accuracy is .9010 ± .0067 (standard
error) out of fold, and .8990 ± .0061 on 2,446 other texts (two minutes with two CPU threads).
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import statistics
import struct
import sys
import time
import warnings
import zipfile
import zlib
from argparse import ArgumentParser, ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # how long OpenMP threads spin before they sleep
os.environ["MPLBACKEND"] = "agg"  # a notebook's ! command passes on a backend not installed here

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from nltk.stem.snowball import EnglishStemmer
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import normalize
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

SCRIPT = Path(globals().get("__file__", "transformer.py")).resolve()  # a notebook has no __file__
DATA_FOLDER = SCRIPT.parent / "data"
SAMPLE_FOLDER = DATA_FOLDER / "sample"
CHECKPOINT_VERSION = "transformer 7"  # increase it whenever the network changes

# torchrun starts WORLD_SIZE processes and numbers them; a plain run is one process.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# Data
LABEL_NAMES = ("category", "label", "class", "class index")  # in lower case
SEPARATORS = ",;\t|"
UNNAMED = r"\d+|Unnamed: \d+"  # what columns without a name are called
GIVES_AWAY = "gives the answer away"
END = "(end of the file)"  # is put behind the last row, to see that no quote is left open

# Text
TOKENIZERS = ("basic_english", "spacy", "nltk", "whitespace")
PAD = 0  # the word at a place after the end of a text
UNK = 1  # a word without a vector
NO_KEY = 0  # the key of padding, and of stems and pairs that are not counted
MAX_LENGTH = 512  # tokens; a longer text is cut
FREQUENT = 50_000  # words at the start of a vector file, which are kept for new texts
LSA_WIDTH = 32  # with more, training texts are memorized
# The letters of Thai, Lao, Burmese, Khmer, Japanese and Chinese, which have no blanks between words
NO_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)

# What figures are drawn with: matplotlib's own font, and those that have the letters of Asia
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Thai",
    "Noto Sans Lao",
    "Noto Sans Khmer",
    "Noto Sans Myanmar",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
)

# Training
MAX_EPOCHS = 15
MAX_TOKENS = 20_000_000  # that all models read in training: ten minutes with two CPU threads
MAX_WORD_DROPOUT = 0.3
FULL_LENGTH = 45  # tokens; texts as long as this lose MAX_WORD_DROPOUT of their words
ONE_SIDED = 0.95  # a larger share of one class is worth a warning
PARTS = 20  # class evidence for a part of the training texts is counted on the other parts
MAX_GRAD_NORM = 1.0
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}

# What csv, zipfile and torch raise over a file that is missing, damaged or of another kind
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
    csv.Error,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
)


# Same in all four scripts
class UserError(Exception):
    """A mistake that the user can fix. `main` prints it as one line, without a traceback."""


@dataclass(frozen=True)
class Config:
    """The settings of a run; each is explained at its flag in `parse_args`."""

    label_column: str | None = None
    id_column: str | None = None
    text_columns: list[str] | None = None
    tokenizer: str = "basic_english"
    d_model: int = 64
    nhead: int = 4
    d_hid: int = 128
    nlayers: int = 1
    activation: str = "gelu"
    dropout: float = 0.3
    word_dropout: float | None = None  # these two follow from the texts: `fill_defaults`
    r_drop: float = 1.0
    folds: int = 5
    epochs: int | None = None
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float = 1e-3
    seed: int = 0
    limit: int | None = None
    train_sha256: str = ""  # these three are known once the files are read
    test_sha256: str = ""
    vectors_sha256: str = "none"

    data: Path | None = None
    vectors: str | None = None
    out: Path = Path("runs/transformer")
    resume: bool = False
    predict: str | None = None
    label_name: str | None = None
    device: str = "auto"

    @property
    def settings(self) -> dict:
        """What decides the result. A run can only be resumed with the same settings."""
        free = ("data", "vectors", "out", "resume", "predict", "label_name", "device")
        return {name: value for name, value in asdict(self).items() if name not in free}


# Data: csv files -> texts and labels --------------------------------------------------------------
class Columns(NamedTuple):
    """The names of the columns that are used, and what was guessed or left out to find them."""

    label: str
    id: str | None  # in test.csv; train.csv may lack it
    texts: list[str]
    warnings: tuple[str, ...] = ()


class Rows(NamedTuple):
    """The ids and the texts of a file; a text is its columns, such as (title, description)."""

    ids: list[str]
    texts: list[tuple[str, ...]]


class News(NamedTuple):
    """N labelled texts of C classes to train on, and M texts to classify."""

    columns: Columns
    classes: list[str]  # the C labels as the file writes them
    labels: Tensor  # (N,), indices into classes
    train: Rows
    test: Rows
    header: list[str]  # of the submission


def find_data(given: Path | None) -> Path:
    """Return the folder to read: the given one, else data/, else the bundled sample."""
    source = "The real train.csv and test.csv come from the Kaggle competition"
    source = f"{source}; put them into {DATA_FOLDER}"
    if given is None and not (DATA_FOLDER / "train.csv").exists():
        if not (SAMPLE_FOLDER / "train.csv").exists():
            raise UserError(f"no data here. {source}, or name their folder with --data")
        log(f"data      {SAMPLE_FOLDER}, the bundled sample. {source}")
        return SAMPLE_FOLDER
    log(f"data      {given or DATA_FOLDER}")
    return given or DATA_FOLDER


def load_news(folder: Path, config: Config) -> News:
    """Read train.csv and test.csv. Raises UserError if they cannot be learned from."""
    path = folder / "train.csv"
    test_path = folder / "test.csv"
    train = read_table(path)
    test = read_table(test_path, like=train)
    label = choose_label(train, path, config)
    if train.columns[0] == "1" and len(test.columns) == len(train.columns) - 1:
        test.columns = train.columns.drop(label)
    columns = choose_columns(train, test, label, config)

    train[label] = train[label].str.strip()
    classes = find_classes(train[label], path, config)
    train = draw_rows(train, label, config)
    train_columns = columns if columns.id in train else columns._replace(id=None)
    train_rows = read_rows(train, path, train_columns)
    test_rows = read_rows(test, test_path, columns)
    if "" in test_rows.ids:
        raise UserError(f"{test_path}: a row has no {columns.id}. Each row needs an id of its own")
    labels = torch.tensor([classes.index(name) for name in train[label]])

    counts = train[label].value_counts()
    if counts.max() >= ONE_SIDED * len(train):
        found = f"{counts.max() / len(train):.1%} of the rows are of class {counts.idxmax()}"
        warning = f"{found}; an accuracy says little here, see the confusion matrix"
        columns = columns._replace(warnings=(*columns.warnings, warning))
    shares = ", ".join(f"{name}: {counts[name]}" for name in classes)
    text_columns = ", ".join(columns.texts)
    log(f"columns   text {text_columns}; label {label}; id {columns.id or 'none'}")
    log(f"rows      {len(labels)} to train on ({shares}), {len(test)} to classify")
    news = News(columns, classes, labels, train_rows, test_rows, header=[])
    news = name_submission(news, folder, config)
    log_guesses(news)
    return news


def read_table(path: Path, like: pd.DataFrame | None = None) -> pd.DataFrame:
    """Read a csv file as strings, and leave out blank rows and empty columns without a name.

    If the file has no header, its columns are named 1, 2, …. The rows are numbered from 1 on. Where
    the file itself does not show header and separator, they are as in the table `like`.
    """
    rows, separator = read_fields(path, "," if like is None else like.attrs["separator"])
    names = [name.strip() for name in rows[0]]
    has_header = names_columns(rows)
    if like is not None:
        has_header = like.columns[0] != "1" and not names[0].isdigit()
    if has_header:
        names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]  # as in pandas
        rows = rows[1:]
    else:
        names = [str(number + 1) for number in range(len(names))]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a column twice in {', '.join(names)}. Give it another name")

    table = pd.DataFrame(rows, columns=names, dtype=str)
    table.index += 1
    is_filled = table.map(str.strip) != ""
    empty = [name for name in names if name.startswith("Unnamed: ") and not is_filled[name].any()]
    if empty:
        log(f"read      {path}: {len(empty)} empty columns without a name left out")
    is_blank = ~is_filled.any(axis=1)
    if len(names) > 1 and is_blank.any():  # in one column, a blank row is a text without words
        log(f"read      {path}: {is_blank.sum()} blank rows left out")
        table = table[~is_blank]
    table = table.drop(columns=empty)
    if table.empty:
        raise UserError(f"{path}: no rows. Give train.csv and test.csv")
    table.attrs["separator"] = separator
    return table


def read_fields(path: Path, separator: str) -> tuple[list[list[str]], str]:
    """Return the rows of a csv file, of as many fields each, and what separates the fields.

    If this cannot be told, it is the given separator.
    """
    advice = "Give train.csv and test.csv, in UTF-8 (Excel: CSV UTF-8)"
    csv.field_size_limit(2**31 - 1)
    try:
        text = decode(path)
        separator = find_separator(text) or separator
        lines = io.StringIO(f"{text}\n{END}", newline="")
        *rows, end = csv.reader(lines, delimiter=separator)
    except READ_ERRORS as error:
        raise UserError(f"{path}: {reason(error)}. {advice}") from error
    if end != [END]:
        found = f"the quote in row {len(rows) + 1} is never closed"
        raise UserError(f"{path}: {found}. Close it, or write it twice")
    if separator != ",":
        log(f"read      {path}: the separator is {separator!r}")

    rows = [row for row in rows if row]
    while rows and not "".join(rows[0]).strip():
        del rows[0]
    if not rows:
        raise UserError(f"{path}: no rows. {advice}")
    width = len(rows[0])
    for number, row in enumerate(rows, start=1):
        is_short = len(row) < width and "".join(row).strip()
        if is_short or "".join(row[width:]).strip():
            found = f"row {number} has {len(row)} fields, the first row {width}"
            raise UserError(f"{path}: {found}. Put texts with {separator!r} inside into quotes")
    return [(row + width * [""])[:width] for row in rows], separator


def decode(path: Path) -> str:
    """Return a file's text, which is in UTF-8, in UTF-16 or in cp1252, as Excel saves it."""
    content = path.read_bytes()
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252")
        log(f"warning   {path}: not in UTF-8; read as cp1252, Excel's encoding")
        return text


def find_separator(text: str) -> str | None:
    """Return the first separator by which the first rows have as many fields, two or more."""
    for separator in SEPARATORS:
        rows = islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator), 20)
        widths = {len(row) for row in rows if "".join(row).strip()}
        if len(widths) == 1 and max(widths) > 1:
            return separator
    return None


def names_columns(rows: list[list[str]]) -> bool:
    """Whether the first row is a header: no number, and no value that its column has again."""
    names = [name.strip() for name in rows[0]]
    if names[0].isdigit():
        return False
    if any(name.lower() in ("id", *LABEL_NAMES) for name in names):
        return True
    for place, name in enumerate(names):
        below = (row[place].strip() for row in rows[1:] if place < len(row))
        if name and name in below:
            return False
    return True


def choose_label(train: pd.DataFrame, path: Path, config: Config) -> str:
    """Return the label column. Without a header it is guessed: the one with the fewest values."""
    by_lower_case = {name.lower(): name for name in train}
    known = [by_lower_case[name] for name in LABEL_NAMES if name in by_lower_case]
    label = config.label_column or next(iter(known), "label")
    if config.label_column is None and train.columns[0] == "1":
        label = train.nunique().idxmin()
    if label not in train:
        found = f"no {label} column; found {', '.join(train)}"
        raise UserError(f"{path}: {found}. Name it with --label-column, or other --data")
    return label


def choose_columns(train: pd.DataFrame, test: pd.DataFrame, label: str, config: Config) -> Columns:
    """Return the columns that the flags name, and for the others a guess with its warnings."""
    warnings = []
    if train.columns[0] == "1" and config.label_column is None:
        warnings.append(f"no header; column {label} has the fewest values and is the label")
    id_column = config.id_column or guess_id(train, test, label)
    texts = config.text_columns
    if texts is None:
        others = [name for name in train if name not in (label, id_column)]
        reasons = {name: why_no_text(name, train, label) for name in others}
        texts = [name for name in others if reasons[name] is None]
        if not texts:  # all texts repeat, as where a file has been copied behind itself
            texts = [name for name in others if reasons[name] == GIVES_AWAY]
        for name in others:
            if name not in texts:
                warning = f"column {name} {reasons[name]} and is not read as text"
                warnings.append(f"{warning}. To read it, name it with --text-columns")
    return Columns(label, id_column, texts, tuple(warnings))


def why_no_text(name: str, train: pd.DataFrame, label: str) -> str | None:
    """Say why a column of train.csv is not read as text by default, or None if it is."""
    if has_id_word(name):
        return "holds ids"
    if name.startswith("Unnamed: "):
        return f"has no name and {(train[name] != '').sum()} filled rows"
    return GIVES_AWAY if decides_label(train[name], train[label]) else None


def has_id_word(name: str) -> bool:
    """Whether id is a word of the name: ArticleId, text_id or IDCustomer, but not covid."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return any(word.lower() == "id" for word in words)


def guess_id(train: pd.DataFrame, test: pd.DataFrame, label: str) -> str | None:
    """Return the column of test.csv that holds the rows' ids, or None.

    It is called id, or has unique values and id as a word of its name. Without such a name
    (articleid), or without any, the unique values have to be whole numbers.
    """
    named = []
    indices = []
    for name in test.columns.drop(label, errors="ignore"):
        if name.lower() == "id":
            return name
        if not test[name].is_unique:
            continue
        if has_id_word(name):
            named.append(name)
        elif re.fullmatch(f"{UNNAMED}|.*id", name) and test[name].str.isdecimal().all():
            indices.append(name)

    unique = [name for name in named + indices if name not in train or train[name].is_unique]
    return next(iter(unique + named), None)


def decides_label(values: pd.Series, labels: pd.Series) -> bool:
    """Whether a column gives the answer away: a value that repeats is always of one class.

    So that a text that is there twice does not count, values have to repeat as a rule.
    """
    values = values.str.strip()
    values = values[values != ""]
    repeated = values[values.duplicated(keep=False)]
    labels = labels[repeated.index]
    is_rule = len(repeated) > len(values) / 2 and len(repeated) >= 3 * repeated.nunique()
    return is_rule and labels.nunique() > 1 and labels.groupby(repeated).nunique().max() == 1


def find_classes(labels: pd.Series, path: Path, config: Config) -> list[str]:
    """Return the classes, numbers in their order. Raises UserError if one has too few rows."""
    counts = labels.value_counts()
    classes = sorted(counts.index, key=lambda name: (not name.isdigit(), name.zfill(9)))
    if len(classes) < 2 or "" in classes or counts.min() < config.folds:
        shares = ", ".join(
            f"{name or '(empty)'}: {count}" for name, count in counts[:-6:-1].items()
        )
        found = f"{labels.name} has {len(classes)} classes, the smallest {shares}"
        advice = f"Give two or more, {config.folds} rows each"
        if len(classes) > 1 and counts.min() > 1:
            advice += f", or --folds {counts.min()}"
        raise UserError(f"{path}: {found}. {advice}, or name another --label-column")
    least = len(classes) * config.folds
    if config.limit is not None and config.limit < least:
        advice = f"Give {least} or more, or fewer --folds"
        raise UserError(
            f"--limit {config.limit}: too few rows for {len(classes)} classes. {advice}"
        )
    return classes


def draw_rows(train: pd.DataFrame, label: str, config: Config) -> pd.DataFrame:
    """Draw --limit rows: of each class as many as there are folds, and then in proportion."""
    if config.limit is None or config.limit >= len(train):
        return train
    shuffled = train.sample(frac=1, random_state=config.seed)
    by_class = shuffled.groupby(label)[label]
    rank = by_class.cumcount()
    share = (rank / by_class.transform("size")).where(rank >= config.folds, -1.0)
    drawn = share.sort_values(kind="stable").index[: config.limit]
    return train.loc[drawn.sort_values()]


def name_submission(news: News, folder: Path, config: Config) -> News:
    """Return the news with the header of its submission, and ids where test.csv has none.

    Both come from a sample submission beside the data, if there is one.
    """
    id_column = news.columns.id
    header = [id_column, news.columns.label]
    if id_column is None or (config.id_column is None and re.fullmatch(UNNAMED, id_column)):
        header[0] = "Id"
    ids = news.test.ids
    warnings = list(news.columns.warnings)

    sample = find_sample(folder, id_column, ids)
    if sample is not None:
        header = list(sample)
    if id_column is None and sample is not None:
        ids = sample[header[0]].str.strip().tolist()
        warnings.append(
            "test.csv has no ids; they are those of the sample submission, in its order"
        )
    elif id_column is None:
        advice = "Name their column with --id-column"
        warnings.append(f"test.csv has no ids; its rows are counted from 1. {advice}")
    if config.label_name:
        header[1] = config.label_name

    columns = news.columns._replace(warnings=tuple(warnings))
    test = news.test._replace(ids=ids)
    return news._replace(columns=columns, test=test, header=header)


def find_sample(folder: Path, id_column: str | None, ids: list[str]) -> pd.DataFrame | None:
    """Return the sample submission, *sample*.csv: two columns, of which the first is the id."""
    for path in sorted(folder.glob("*[sS][aA][mM][pP][lL][eE]*.csv")):
        try:
            sample = read_table(path)
        except UserError as error:
            log(f"warning   {error}. It is not used")
            continue
        found = sample.iloc[:, 0].str.strip().tolist()
        fits = sample.columns[0] == id_column or sorted(found) == sorted(ids)
        if id_column is None:
            fits = len(found) == len(set(found)) == len(ids)
        if fits and len(sample.columns) == 2:
            log(f"sample    {path}: its header is the submission's")
            return sample
    return None


def log_guesses(news: News) -> None:
    """Print what an upload hangs on: at the start of the run, and at its end again."""
    id_column = news.columns.id or "none"
    log(f"upload    header {','.join(news.header)}; ids of test.csv's column: {id_column}")
    for warning in news.columns.warnings:
        log(f"warning   {warning}")


def read_rows(table: pd.DataFrame, path: Path, columns: Columns) -> Rows:
    """Return the ids and the texts of a table's rows. Raises UserError if a column is missing."""
    wanted = columns.texts if columns.id is None else [columns.id, *columns.texts]
    missing = [name for name in wanted if name not in table]
    if missing or not columns.texts:
        found = f"no {', '.join(missing) or 'text'} column; found {', '.join(table)}"
        raise UserError(f"{path}: {found}. Name it with --text-columns or --id-column")

    ids = [str(number) for number in table.index]
    if columns.id is not None:
        ids = table[columns.id].str.strip().tolist()
    twice, count = Counter(ids).most_common(1)[0]
    if count > 1:
        found = f"{columns.id} {twice!r} is in {count} rows"
        raise UserError(f"{path}: {found}. Each row needs an id of its own")

    # One space stands for any white space, so no column holds a tab.
    fields = [table[name].str.split().str.join(" ") for name in columns.texts]
    texts = list(zip(*fields, strict=True))
    empty = sum(not any(text) for text in texts)
    if empty > 0:
        log(f"warning   {path}: {empty} of {len(texts)} rows have no text")
    return Rows(ids, texts)


# Text: words -> integers --------------------------------------------------------------------------
class Token(NamedTuple):
    """A word in a text. Classes are counted by its key, and by its left neighbour's and its key."""

    word: str
    column: int  # of the text, from 1 on
    key: str  # column and stem: 1:appl is apple or apples in column 1


def make_tokenizer(name: str) -> Callable[[str], list[str]]:
    """Return a function that splits a text into lower-case words and punctuation marks.

    Raises UserError if the package that it comes from is not installed.
    """
    try:
        if name == "basic_english":
            from torchtext.data.utils import get_tokenizer

            return get_tokenizer("basic_english")
        if name == "spacy":
            from spacy import blank

            pipeline = blank("en")  # rules only, without a model to download
            return lambda text: [word.lower_ for word in pipeline(text) if not word.is_space]
        if name == "nltk":
            from nltk.tokenize import TreebankWordTokenizer

            treebank = TreebankWordTokenizer()
            return lambda text: treebank.tokenize(text.lower())
    except (ImportError, OSError) as error:
        package = "torchtext==0.6.0" if name == "basic_english" else name
        advice = f"Install it (pip install {package}), or give another --tokenizer"
        raise UserError(f"--tokenizer {name}: {reason(error)}. {advice}") from error
    return lambda text: text.lower().split()


@cache
def stem(word: str) -> str:
    """Return the stem (Porter 2001). Digits become 0, so 86-83 and 91-79 share a stem."""
    return EnglishStemmer().stem(re.sub(r"\d", "0", word))


def split_text(columns: Sequence[str], tokenize: Callable[[str], list[str]]) -> list[Token]:
    """Return the tokens of a text, which is given as its columns.

    In languages without blanks between words, each character is a token.
    """
    tokens = []
    for number, column in enumerate(columns, start=1):
        for word in tokenize(NO_BLANKS.sub(r" \g<0> ", column)):
            tokens.append(Token(word, number, f"{number}:{stem(word)}"))
    return tokens


def pair_keys(tokens: list[Token]) -> list[str]:
    """The key of each token's pair with its left neighbour; the first token's left one is empty."""
    keys = [token.key for token in tokens]
    return [f"{left} {right}" for left, right in zip(["", *keys], keys, strict=False)]


class Vocabulary(NamedTuple):
    """The numbers of words and keys, and the words' vectors."""

    words: dict[str, int]  # the V words that have a vector; any other is UNK
    keys: dict[str, int]  # the K keys, of stems and of pairs, that are counted; or NO_KEY
    columns: int  # of a text
    vectors: Tensor  # (V, F), at unit variance; zeros for PAD and UNK
    coverage: float | None  # share of the tokens that have a vector in a given file

    def encode(self, tokens: list[Token]) -> Tensor:
        """Return word, column, key and pair's key of each token as integers, (T, 4)."""
        tokens = tokens[:MAX_LENGTH]
        rows = []
        for token, pair_key in zip(tokens, pair_keys(tokens), strict=True):
            word = self.words.get(token.word, UNK)
            key = self.keys.get(token.key, NO_KEY)
            pair = self.keys.get(pair_key, NO_KEY)
            rows.append([word, token.column, key, pair])
        if not rows:  # an empty text is one unknown word
            rows.append([UNK, 1, NO_KEY, NO_KEY])
        return torch.tensor(rows)


def find_vectors(given: str | None, folder: Path) -> Path | None:
    """Return the file of word vectors: the given one, else one beside the data, else None."""
    if given is None:
        packed = [*folder.glob("glove*.txt.gz"), *folder.glob("*.vec.gz")]
        found = [*folder.glob("glove*.txt"), *folder.glob("*.vec")]
        return min(found or packed, default=None)
    return None if given == "none" else Path(given)


def open_text(path: Path) -> TextIO:
    """Open a text file, which may be compressed by gzip."""
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    opener = gzip.open if is_packed else open
    return opener(path, "rt", encoding="utf-8-sig", errors="replace")


def name_kind(path: Path) -> str | None:
    """Say what a file is that holds no vectors as text, or None if it is nothing well known."""
    try:
        with open_text(path) as file:
            text = file.read(1000)
    except READ_ERRORS:
        return None
    if text.startswith("PK"):
        return "a zip archive, which has to be unpacked first"
    if "\0" in text or text.count("\ufffd") > len(text) / 20:
        return "a binary file, such as word2vec's .bin; gensim can save it as text"
    return "tabs stand between the numbers, where blanks have to" if "\t" in text else None


def read_vectors(path: Path, words: set[str]) -> dict[str, np.ndarray]:
    """Read the vectors of `words` from lines `word v1 … vF`. Scale them to unit variance.

    New texts have other words. For them the first FREQUENT vectors are kept as well; such files
    begin with the most frequent words.
    """
    advice = "Give a GloVe, fastText or word2vec text file, or none"
    vectors = {}
    try:
        with open_text(path) as file:
            lines = []
            for number, line in enumerate(file):
                if number < FREQUENT or line.split(" ")[0] in words:
                    lines.append(line.rstrip())

        width = statistics.mode(line.count(" ") for line in lines)
        for line in lines:
            if line.count(" ") == width:  # the header of a word2vec file has another
                word, *numbers = line.split(" ")
                vectors[word] = np.array(numbers, dtype=np.float32)
    except READ_ERRORS as error:
        found = name_kind(path) or reason(error)
        raise UserError(f"--vectors {path}: {found}. {advice}") from error

    if width == 0 or words.isdisjoint(vectors):
        found = name_kind(path) or "none of the texts' words is in it"
        raise UserError(f"--vectors {path}: {found}. {advice}")
    spread = np.std(list(vectors.values()))
    if not 0 < spread < math.inf:
        raise UserError(f"--vectors {path}: numbers all the same, or not finite. {advice}")
    return {word: vector / spread for word, vector in vectors.items()}


def cooccurrence_vectors(texts: list[list[str]]) -> dict[str, np.ndarray]:
    """Make a vector for each stem of two texts or more (latent semantic analysis, Deerwester 1990).

    The matrix of tf-idf weights, texts by stems, is about U S Vᵀ. A stem's vector is its row of
    V S, scaled to length √LSA_WIDTH. No label is used, so held-out and test texts may take part.
    """
    vectorizer = TfidfVectorizer(analyzer=list, min_df=2, sublinear_tf=True)
    try:
        weights = vectorizer.fit_transform(texts)
        svd = TruncatedSVD(min(LSA_WIDTH, min(weights.shape) - 1), random_state=0)
        svd.fit(weights)
    except ValueError as error:
        raise UserError(f"--vectors none: {reason(error)}. Give vectors, or more texts") from error
    vectors = normalize(svd.components_.T * svd.singular_values_) * math.sqrt(LSA_WIDTH)
    return dict(zip(vectorizer.get_feature_names_out(), vectors, strict=True))


def build_vocabulary(
    texts: list[list[Token]], columns: int, vectors_path: Path | None
) -> Vocabulary:
    """Find or make the words' vectors, and number words and keys."""
    counts = Counter(token.word for text in texts for token in text)
    coverage = None
    if vectors_path is None:
        stems = [[stem(token.word) for token in text] for text in texts]
        by_stem = cooccurrence_vectors(stems)
        vectors = {word: by_stem[stem(word)] for word in counts if stem(word) in by_stem}
        log("vectors   none given; made from the texts' own co-occurrence")
    else:
        vectors = read_vectors(vectors_path, set(counts))
        coverage = sum(counts[word] for word in vectors) / counts.total()
        log(f"vectors   {vectors_path.name}: {coverage:.1%} of the tokens have one")
    log(f"tokens    {counts.total() / len(texts):.1f} a text; {len(vectors)} words with a vector")

    keys = dict.fromkeys(token.key for text in texts for token in text)
    # What only one text has carries no information about others.
    pairs = Counter(pair for text in texts for pair in set(pair_keys(text)))
    keys |= dict.fromkeys(pair for pair, count in pairs.items() if count > 1)
    table = torch.tensor(np.stack(list(vectors.values()))).float()
    return Vocabulary(
        words={word: i for i, word in enumerate(["<pad>", "<unk>", *vectors])},
        keys={key: i for i, key in enumerate(["<none>", *keys])},
        columns=columns,
        vectors=F.pad(table, (0, 0, 2, 0)),
        coverage=coverage,
    )


class Inputs(NamedTuple):
    """The texts as integers; each text is (T, 4)."""

    vocabulary: Vocabulary
    train: list[Tensor]
    test: list[Tensor]


def encode_news(
    news: News, config: Config, vectors_path: Path | None, vocabulary: Vocabulary | None = None
) -> Inputs:
    """Turn all texts into integers, by the given vocabulary or by one that is built from them."""
    tokenize = make_tokenizer(config.tokenizer)
    train = [split_text(text, tokenize) for text in news.train.texts]
    test = [split_text(text, tokenize) for text in news.test.texts]
    if vocabulary is None:
        vocabulary = build_vocabulary(train + test, len(news.columns.texts), vectors_path)
    return Inputs(
        vocabulary,
        train=[vocabulary.encode(tokens) for tokens in train],
        test=[vocabulary.encode(tokens) for tokens in test],
    )


def fill_defaults(config: Config, texts: list[tuple[str, ...]]) -> Config:
    """Return the settings with those that follow from the training texts, where no flag gives them.

    A short text may lose its only clue with one word. So words are dropped with probability
    MAX_WORD_DROPOUT times the median length over FULL_LENGTH, at most MAX_WORD_DROPOUT. There are
    MAX_EPOCHS epochs, fewer where all models together would read more than MAX_TOKENS.
    """
    tokenize = make_tokenizer(config.tokenizer)
    lengths = [len(split_text(text, tokenize)[:MAX_LENGTH]) for text in texts]
    word_dropout = config.word_dropout
    if word_dropout is None:
        word_dropout = MAX_WORD_DROPOUT * min(1.0, statistics.median(lengths) / FULL_LENGTH)
    epochs = config.epochs
    if epochs is None:
        per_epoch = (config.folds - 1) * max(1, sum(lengths))  # of all models together
        epochs = max(1, min(MAX_EPOCHS, MAX_TOKENS // per_epoch))

    is_cut = config.epochs is None and epochs < MAX_EPOCHS
    fewer = " (fewer than usual, since there is much text)" if is_cut else ""
    log(f"training  {epochs} epochs{fewer}; words are dropped with probability {word_dropout:.2f}")
    return replace(config, word_dropout=word_dropout, epochs=epochs)


def class_evidence(
    texts: list[Tensor], labels: Tensor, keys: int, classes: int
) -> tuple[Tensor, Tensor]:
    """How strongly each key speaks for each class: complement naive Bayes (Rennie et al. 2003).

    The evidence of key k for class c is -(C - 1) log p(k | all classes but c), less its mean over
    the classes (section 3.1): what is rare in the other classes speaks for this one.

    If a training text read counts that include itself, its rare words would give away its label. So
    the texts are split into PARTS; texts in part p read table p, counted without that part. Table 0
    is counted on all texts and used at test time.

    Returns the tables (1 + PARTS, K, C) and the part of each text (N,).
    """
    # Split at random, by torch's global generator. The parts are 1 to PARTS; part 0 stays empty.
    part = 1 + torch.randperm(len(texts)) % PARTS

    # Count the texts of each part and class that have a key.
    counts = torch.zeros(1 + PARTS, keys, classes)
    for text, p, label in zip(texts, part, labels, strict=True):
        keys_of_text = text[:, 2:].unique()
        counts[p, keys_of_text, label] += 1

    # Table p is counted in all parts but p.
    counts = counts.sum(0) - counts

    # Estimate p(k | all classes but c), where each of these classes adds 1/6 to the count.
    others = counts.sum(-1, keepdim=True) - counts + (classes - 1) / 6
    p_key = others / others.sum(1, keepdim=True)

    tables = -(classes - 1) * p_key.log()
    tables -= tables.mean(-1, keepdim=True)

    # A key that was never counted carries no information about the class, nor does NO_KEY.
    tables *= counts.sum(-1, keepdim=True) > 0
    tables[:, NO_KEY] = 0.0
    return tables, part


# Model --------------------------------------------------------------------------------------------
class Dropout(nn.Dropout):
    """Dropout that draws one random byte per element (p is rounded to 1/256).

    On a CPU it is five times as fast as nn.Dropout, which took a third of each step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)  # eight random bytes each
        random_bytes = words.view(torch.uint8)[: x.numel()].view(x.shape)
        dropped = round(256 * self.p)  # of the 256 values of a byte
        return x * ((random_bytes >= dropped) * (256 / (256 - dropped)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a LayerNorm and added to its input.

    Attention(Q, K, V) = softmax(Q Kᵀ / √head_dim) V (Vaswani et al. 2017, eq. 1). The norms come
    first, as in Xiong et al. 2020, fig. 1b.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.nhead = config.nhead
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.in_proj = nn.Linear(config.d_model, 3 * config.d_model)  # query, key and value
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.linear1 = nn.Linear(config.d_model, config.d_hid)
        self.linear2 = nn.Linear(config.d_hid, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, d_model), is_token (B, T) -> x and attn_weights (B, nhead, T, T)."""
        attended, attn_weights = self.attend(self.norm1(x), is_token)
        x = x + self.dropout(attended)
        hidden = self.dropout(self.activation(self.linear1(self.norm2(x))))
        x = x + self.dropout(self.linear2(hidden))
        return x, attn_weights

    def attend(self, x: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        """Multi-head self-attention. Padding, where is_token is false, gets no attention."""
        B, T, d_model = x.shape
        qkv = self.in_proj(x).view(B, T, 3, self.nhead, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, nhead, T, head_dim) each

        scores = query @ key.transpose(-1, -2) / math.sqrt(d_model // self.nhead)
        scores = scores.masked_fill(~is_token[:, None, None], -math.inf)
        attn_weights = scores.softmax(-1)  # (B, nhead, T, T)

        heads = attn_weights @ value  # (B, nhead, T, head_dim)
        merged = heads.transpose(1, 2).reshape(B, T, d_model)
        return self.out_proj(merged), attn_weights


class TransformerClassifier(nn.Module):
    """Word vectors and class evidence -> convolution -> encoder -> mean over tokens -> logits.

    The word vectors are not trained: some thousand texts are too few to find better places for
    13,000 words. The sums of the tokens' evidence, of stems and of pairs, are added to the logits,
    each times a learned weight: this is the vote of naive Bayes.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, classes: int):
        super().__init__()
        self.register_buffer("vectors", vocabulary.vectors, persistent=False)
        self.register_buffer("evidence", torch.zeros(len(vocabulary.keys), classes))
        self.project = nn.Linear(self.vectors.shape[1] + 2 * classes, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.convolve = nn.Conv1d(config.d_model, config.d_model, 3, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(MAX_LENGTH, config.d_model))
        # Columns are numbered from 1 on; the first row is for padding.
        self.column = nn.Parameter(0.1 * torch.randn(vocabulary.columns + 1, config.d_model))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.nlayers))
        self.norm = nn.LayerNorm(config.d_model)
        self.classify = nn.Linear(config.d_model, classes)
        self.vote_weight = nn.Parameter(torch.zeros(2))  # of stems and of pairs
        self.register_buffer("temperature", torch.ones(()))  # fitted after the training
        self.input_dropout = Dropout(0.1)
        self.output_dropout = Dropout(config.dropout)

    def forward(self, tokens: Tensor, evidence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, T, 4) -> logits (B, C) and the last layer's attn_weights (B, nhead, T, T).

        Training texts bring their own `evidence` (B, T, 2, C), which was counted without them.
        """
        word, column = tokens[..., :2].unbind(-1)  # (B, T) each
        if evidence is None:
            evidence = self.evidence[tokens[..., 2:]]  # of stem and pair

        x = torch.cat([self.vectors[word], evidence.flatten(-2)], dim=-1)  # (B, T, F + 2C)
        x = self.project(self.input_dropout(x))  # (B, T, d_model)
        x = x + self.read_neighbours(x, word != PAD)
        x = x + self.column[column] + self.position[: x.shape[1]]
        for layer in self.layers:
            x, attn_weights = layer(x, word != PAD)

        pooled = self.pool(self.norm(x), column)  # (B, d_model)
        logits = self.classify(self.output_dropout(pooled))
        vote = self.vote_weight @ evidence.sum(1)  # (B, C)
        return (logits + vote) / self.temperature, attn_weights

    def read_neighbours(self, x: Tensor, is_token: Tensor) -> Tensor:
        """A convolution over each token, the one before it and the one behind it."""
        x = self.activation(x).masked_fill(~is_token[..., None], 0.0)
        return self.convolve(x.transpose(1, 2)).transpose(1, 2)

    def pool(self, x: Tensor, column: Tensor) -> Tensor:
        """Average the tokens of each column, then the columns: a short title counts in full."""
        inside = F.one_hot(column, len(self.column))[..., 1:].float()  # (B, T, columns)
        sizes = inside.sum(1)  # (B, columns)
        sums = inside.transpose(1, 2) @ x  # (B, columns, d_model)
        means = sums / sizes.clamp_min(1)[..., None]
        return means.sum(1) / (sizes > 0).sum(1, keepdim=True)  # a column may be empty


# Objective ----------------------------------------------------------------------------------------
def drop_words(tokens: Tensor, p: float) -> Tensor:
    """Make each token of (B, T, 4) an unknown word with probability p. It keeps its column.

    Its right neighbour loses the pair that it is the left word of.
    """
    word, column, key, pair = tokens.unbind(-1)
    dropped = (torch.rand(word.shape, device=word.device) < p) & (word != PAD)
    left_dropped = F.pad(dropped[:, :-1], (1, 0))
    word = word.masked_fill(dropped, UNK)
    key = key.masked_fill(dropped, NO_KEY)
    pair = pair.masked_fill(dropped | left_dropped, NO_KEY)
    return torch.stack([word, column, key, pair], dim=-1)


def r_drop_loss(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the training loss and its cross-entropy, in nats per text.

    The logits (2B, C) are those of two passes over the same B texts, one after the other; labels
    (B,). This is R-Drop (Liang et al. 2021, eqs. 1-4) with weight = α/2, since the paper adds the
    two cross-entropies where we average them.
    """
    nll = F.cross_entropy(logits, labels.repeat(2))
    log_p1, log_p2 = logits.log_softmax(-1).chunk(2)  # (B, C) each
    both_kl = ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum(-1).mean()
    return nll + weight * both_kl / 2, nll


# Training -----------------------------------------------------------------------------------------
def batch_size_for(texts: int, config: Config) -> int:
    """The batch size for so many training texts; each process takes an equal slice of a batch."""
    size = min(config.batch_size, texts)
    if size < WORLD_SIZE:
        raise UserError(f"{texts} training texts are too few for {WORLD_SIZE} processes")
    return size - size % WORLD_SIZE


def length_batches(texts: list[Tensor], batch_size: int, generator: Generator) -> list[Tensor]:
    """Return shuffled batches of row numbers. The texts of a batch are of similar length.

    The rows are shuffled, and every 16 batches of them sorted by length: little is padded, and each
    epoch has other batches. What does not fill a batch is left out, other rows in each epoch.
    """
    lengths = torch.tensor([len(text) for text in texts])
    rows = torch.randperm(len(texts), generator=generator)
    rows = rows[: len(rows) // batch_size * batch_size]

    batches = []
    for window in rows.split(16 * batch_size):
        by_length = window[lengths[window].argsort()]
        batches += by_length.split(batch_size)

    order = torch.randperm(len(batches), generator=generator)
    return [batches[i] for i in order]


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then cosine decay to 0."""
    warmup = max(1, total_steps // 10)
    decay = max(0, step - warmup) / max(1, total_steps - warmup)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * decay))


def train(
    model: TransformerClassifier,
    texts: list[Tensor],
    labels: Tensor,
    config: Config,
    fold_number: int,
    bar: tqdm,
) -> list[dict]:
    """Train the model of a fold on the texts outside it. Return a row of losses for each epoch."""
    device = model.position.device
    tables, part = class_evidence(texts, labels, *model.evidence.shape)
    model.evidence.copy_(tables[0])
    tables = tables.to(device)
    network = model
    if WORLD_SIZE > 1:
        network = DistributedDataParallel(model, broadcast_buffers=False)

    optimizer = OPTIMIZERS[config.optimizer](model.parameters())
    batch_size = batch_size_for(len(texts), config)
    batches_per_epoch = len(texts) // batch_size
    total_steps = config.epochs * batches_per_epoch
    step = 0
    history = []
    model.train()

    for epoch in range(config.epochs):
        nll_sum = torch.zeros((), device=device)
        is_finite = torch.ones((), dtype=torch.bool, device=device)
        generator = random_generator(config.seed, fold_number, epoch)
        for batch in length_batches(texts, batch_size, generator):
            torch.manual_seed(seed_of(config.seed, fold_number, step, RANK))  # for dropout
            rows = batch[RANK::WORLD_SIZE]  # the texts of this process, (B,)
            twice = rows.repeat(2)  # for two passes with different dropout, (2B,)
            tokens = pad_sequence([texts[row] for row in twice], batch_first=True)  # (2B, T, 4)
            tokens = drop_words(tokens.to(device), config.word_dropout)
            parts = part[twice].to(device)
            evidence = tables[parts[:, None, None], tokens[..., 2:]]  # (2B, T, 2, C)

            logits, _ = network(tokens, evidence)  # (2B, C)
            loss, nll = r_drop_loss(logits, labels[rows].to(device), config.r_drop)

            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            is_finite &= torch.isfinite(loss + grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, config.lr)
            optimizer.step()

            nll_sum += nll.detach()
            step += 1
            bar.update()

        # Looked at once per epoch: a GPU has to wait whenever the host looks at its numbers.
        if not is_finite:
            where = f"model {fold_number + 1}, epoch {epoch + 1}"
            raise UserError(f"the loss is not finite in {where}. Lower --lr")
        row = {"model": fold_number + 1, "epoch": epoch + 1}
        row["cross_entropy"] = nll_sum.item() / batches_per_epoch
        history.append(row)

    return history


@torch.no_grad()
def predict_probabilities(model: TransformerClassifier, texts: list[Tensor]) -> Tensor:
    """Return the class probabilities (N, C) of encoded texts."""
    probabilities = torch.zeros(len(texts), model.classify.out_features)
    lengths = torch.tensor([len(text) for text in texts])
    for rows in lengths.argsort().split(128):  # texts of similar length need little padding
        tokens = pad_sequence([texts[row] for row in rows], batch_first=True)
        logits, _ = model(tokens.to(model.position.device))
        probabilities[rows] = logits.softmax(-1).cpu()
    return probabilities


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """Return the T for which softmax(log p / T) is likeliest (Guo et al. 2017, section 4.2).

    A trained network is too sure of texts that it has not seen. Divided by a T > 1, its logits give
    the same answers with less confidence. T is one of 0.5, 0.51, …, 3.
    """
    log_p = probabilities.clamp_min(1e-30).log()  # (N, C)
    temperatures = torch.arange(50, 301) / 100
    losses = [F.cross_entropy(log_p / T, labels) for T in temperatures]
    return temperatures[torch.stack(losses).argmin()].item()


# Cross-validation ---------------------------------------------------------------------------------
def cross_validate(config: Config) -> dict:
    """Train a model for each fold, and leave everything in the run's folder. Return the metrics."""
    check_writable(Path("submission.csv"))
    folder = find_data(config.data)
    news = load_news(folder, config)
    vectors_path = find_vectors(config.vectors, folder)
    config = replace(
        config,
        vectors=str(vectors_path or "none"),
        train_sha256=sha256_of(folder / "train.csv"),
        test_sha256=sha256_of(folder / "test.csv"),
        vectors_sha256=vectors_sha256(vectors_path),
    )
    config = fill_defaults(config, news.train.texts)

    checkpoint = load_checkpoint(config.out, config.settings) if config.resume else None
    vocabulary = None
    folds = []
    metrics = None
    if checkpoint:
        vocabulary = Vocabulary(**checkpoint["vocabulary"])
        folds = checkpoint["folds"]
        metrics = checkpoint["metrics"]
    if WORLD_SIZE > 1:
        dist.barrier()  # until every process has read what the first one may move away

    if metrics:
        log(f"finished  {config.out} was finished before")
    else:
        started = time.monotonic() - sum(fold["seconds"] for fold in folds)
        inputs = encode_news(news, config, vectors_path, vocabulary)
        device = pick_device(config.device)
        log(f"device    {device}")
        if folds:
            log(f"resumed   {len(folds)} of {config.folds} models are trained")
        with open_run(config, device) if RANK == 0 else contextlib.nullcontext():
            folds = train_folds(config, news, inputs, folds, device)
            metrics = leave_results(config, news, inputs, folds)
            metrics["seconds"] = time.monotonic() - started
            save_checkpoint(config, news.classes, inputs.vocabulary, folds, metrics)

    if RANK == 0:
        write_json(config.out / "metrics.json", metrics)
        write_submission(Path("submission.csv"), news, folds)
        log_guesses(news)
    return metrics


def train_folds(
    config: Config, news: News, inputs: Inputs, finished: list[dict], device: torch.device
) -> list[dict]:
    """Train a model on all but one fold, for each fold that is not finished. Return all folds."""
    splitter = StratifiedKFold(config.folds, shuffle=True, random_state=config.seed)
    splits = list(splitter.split(news.labels, news.labels))
    steps = []
    for rows, _ in splits:
        steps.append(config.epochs * (len(rows) // batch_size_for(len(rows), config)))

    folds = list(finished)
    done = sum(steps[: len(finished)])
    with tqdm(
        total=sum(steps),
        initial=done,
        unit="step",
        mininterval=2,
        file=sys.stdout,
        disable=RANK > 0,
    ) as bar:
        for fold_number in range(len(finished), config.folds):
            started = time.monotonic()
            rows, held_out = splits[fold_number]
            torch.manual_seed(seed_of(config.seed, fold_number))
            model = TransformerClassifier(config, inputs.vocabulary, len(news.classes)).to(device)
            texts = [inputs.train[row] for row in rows]
            history = train(model, texts, news.labels[rows], config, fold_number, bar)

            model.eval()
            texts = [inputs.train[row] for row in held_out]
            probabilities = predict_probabilities(model, texts)
            model.temperature.fill_(fit_temperature(probabilities, news.labels[held_out]))
            probabilities = predict_probabilities(model, texts)
            fold = {
                "weights": {name: value.cpu() for name, value in model.state_dict().items()},
                "held_out": held_out.tolist(),  # rows of the training texts
                "probabilities": probabilities,  # of their classes, (len(held_out), C)
                "test_probabilities": predict_probabilities(model, inputs.test),  # (M, C)
                "history": history,
                "seconds": time.monotonic() - started,
            }
            folds.append(fold)
            save_checkpoint(config, news.classes, inputs.vocabulary, folds)
            right = (probabilities.argmax(1) == news.labels[held_out]).float().mean()
            log(f"model {fold_number + 1}: {right:.1%} of its held-out rows are right")
    return folds


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """How far the printed confidence is from the share that is right (Guo et al. 2017, eq. 3).

    This is the expected calibration error: the texts are put into 15 bins by confidence, and the
    gap between mean confidence and accuracy is averaged over bins, weighted by their texts.
    """
    confidence, predicted = probabilities.max(1)
    gap = (predicted == labels).float() - confidence
    bins = (15 * confidence).ceil().long()  # 1 to 15
    return torch.bincount(bins, weights=gap).abs().sum().item() / len(labels)


def leave_results(config: Config, news: News, inputs: Inputs, folds: list[dict]) -> dict:
    """Write the tables and draw the figures. Return the metrics."""
    # Each text's classes as seen by the model that was not trained on it, (N, C).
    probabilities = torch.zeros(len(news.labels), len(news.classes))
    for fold in folds:
        probabilities[fold["held_out"]] = fold["probabilities"]
    if RANK == 0:
        history = pd.DataFrame([row for fold in folds for row in fold["history"]])
        write_table(config.out / "history.csv", history)
        write_predictions(config.out / "oof_predictions.csv", news, probabilities)
        write_submission(config.out / "submission.csv", news, folds)
        with known_fonts():
            plot_results(config.out / "learning-curve.png", history, news, probabilities)
            plot_attentions(config, news, inputs, probabilities, folds)

    right = (probabilities.argmax(1) == news.labels).double()
    accuracy = right.mean().item()
    model = load_model(config, inputs.vocabulary, folds[0]["weights"])
    return {
        "oof_accuracy": accuracy,
        "oof_accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "ece": calibration_error(probabilities, news.labels),
        "fold_accuracy": [right[fold["held_out"]].mean().item() for fold in folds],
        "vector_coverage": inputs.vocabulary.coverage,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# Prediction ---------------------------------------------------------------------------------------
def load_finished(folder: Path) -> tuple[list[TransformerClassifier], dict]:
    """Return the trained models of a run's folder, and its checkpoint."""
    checkpoint = load_checkpoint(folder, settings={})
    if checkpoint is None:
        raise UserError(f"{folder}: no trained model there. Train first, or name its --out")
    config = Config(**checkpoint["settings"], out=folder)
    vocabulary = Vocabulary(**checkpoint["vocabulary"])
    models = []
    for fold in checkpoint["folds"]:
        models.append(load_model(config, vocabulary, fold["weights"]))
    return models, checkpoint


def load_model(
    config: Config, vocabulary: Vocabulary, weights: dict[str, Tensor]
) -> TransformerClassifier:
    """Return the model of a finished fold, ready to predict."""
    try:
        classes = weights["evidence"].shape[1]
        model = TransformerClassifier(config, vocabulary, classes)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{config.out}: {reason(error)}. Train again without --resume") from error
    return model.eval()


def classify(
    models: list[TransformerClassifier], checkpoint: dict, texts: list[Sequence[str]]
) -> Tensor:
    """Return the mean over models of the class probabilities (N, C) of texts."""
    vocabulary = Vocabulary(**checkpoint["vocabulary"])
    tokenize = make_tokenizer(checkpoint["settings"]["tokenizer"])
    encoded = [vocabulary.encode(split_text(text, tokenize)) for text in texts]
    return torch.stack([predict_probabilities(model, encoded) for model in models]).mean(0)


def predict(config: Config) -> dict:
    """Print class, confidence and text, with tabs between, of --predict's text or file."""
    lines = read_lines(config.predict)
    models, checkpoint = load_finished(config.out)
    columns = checkpoint["vocabulary"]["columns"]
    texts = [line.split("\t", columns - 1) for line in lines]
    confidence, predicted = classify(models, checkpoint, texts).max(1)
    labels = [checkpoint["classes"][i] for i in predicted]

    try:
        for label, share, line in zip(labels, confidence.tolist(), lines, strict=True):
            print(label, f"{share:.3f}", line.replace("\t", " "), sep="\t")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has enough; without the next line Python would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return {"labels": labels, "confidence": confidence.tolist()}


def read_lines(text: str) -> list[str]:
    """Return the lines of the file of this name. If there is none, the text itself is the line."""
    if text.endswith(".csv"):
        advice = "give one text a line; a csv goes into --data as test.csv"
        raise UserError(f"--predict {text}: {advice}")
    if not os.path.isfile(text) and not text.endswith(".txt"):
        return [text]
    try:
        content = Path(text).read_text("utf-8-sig", "replace")
    except OSError as error:
        advice = "Give a text, or a file that can be read"
        raise UserError(f"--predict {text}: {reason(error)}. {advice}") from error
    return content.removesuffix("\n").split("\n")


# Tables and figures -------------------------------------------------------------------------------
def write_submission(path: Path, news: News, folds: list[dict]) -> None:
    """Write the class of each test text, by the mean over all models."""
    probabilities = torch.stack([fold["test_probabilities"] for fold in folds]).mean(0)
    answers = [news.classes[i] for i in probabilities.argmax(1)]
    rows = zip(news.test.ids, answers, strict=True)
    write_table(path, pd.DataFrame(rows, columns=news.header))


def check_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written: before the training, and not after it."""
    temporary = path.with_name(f".{path.name}.tmp")  # that of write_file
    try:
        temporary.touch()
        temporary.unlink(missing_ok=True)
        if path.exists():
            open(path, "r+b").close()
    except OSError as error:
        advice = "Close it where it is open, or start the run in another folder"
        raise UserError(f"{path.absolute()}: {reason(error)}. {advice}") from error


def write_predictions(path: Path, news: News, probabilities: Tensor) -> None:
    """Write the class of each training text, by the model that was not trained on it."""
    confidence, predicted = probabilities.max(1)
    table = {
        news.columns.id or "Id": news.train.ids,
        "true": [news.classes[i] for i in news.labels],
        "predicted": [news.classes[i] for i in predicted],
        "confidence": confidence.numpy().round(5),
        "text": ["\t".join(text) for text in news.train.texts],
    }
    write_table(path, pd.DataFrame(table))


@contextlib.contextmanager
def known_fonts() -> Iterator[None]:
    """Draw figures with the FONTS that are installed. Say so if they lack characters."""
    installed = set(get_font_names())
    fonts = [name for name in FONTS if name in installed]
    with rc_context({"font.family": fonts}), warnings.catch_warnings(record=True) as caught:
        yield
    lacking = False
    for warning in caught:
        if str(warning.message).startswith("Glyph "):
            lacking = True
        else:
            warnings.warn(warning.message, warning.category, stacklevel=2)
    if lacking:
        found = "no font for some characters, which figures show as boxes"
        log(f"warning   {found}. Install one that has them, such as Noto Sans CJK")


def plot_results(path: Path, history: pd.DataFrame, news: News, probabilities: Tensor) -> None:
    """Draw each model's training loss, and the confusion matrix of the held-out texts."""
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = history.pivot(index="epoch", columns="model", values="cross_entropy")
    curves.plot(ax=left, style=".-", alpha=0.6, ylabel="training cross-entropy (nats)")
    left.xaxis.get_major_locator().set_params(integer=True)

    ConfusionMatrixDisplay.from_predictions(
        news.labels,
        probabilities.argmax(1),
        display_labels=[name.replace("$", r"\$") for name in news.classes],  # not a formula
        cmap="Blues",
        xticks_rotation=45,
        ax=right,
    )
    right.set_title("rows that the model did not train on")
    write_file(path, figure.savefig)


def plot_attentions(
    config: Config, news: News, inputs: Inputs, probabilities: Tensor, folds: list[dict]
) -> None:
    """Draw attention-right.png and attention-wrong.png, of the surest short texts."""
    confidence, predicted = probabilities.max(1)
    lengths = torch.tensor([len(text) for text in inputs.train])
    is_short = (lengths >= 12) & (lengths <= 40)
    is_right = predicted == news.labels
    for name, chosen in {"right": is_short & is_right, "wrong": is_short & ~is_right}.items():
        if not chosen.any():
            continue
        row = int(confidence.where(chosen, -1.0).argmax())
        [fold] = [fold for fold in folds if row in fold["held_out"]]
        model = load_model(config, inputs.vocabulary, fold["weights"])
        text = inputs.train[row]
        with torch.no_grad():
            _, attn_weights = model(text[None])  # (1, nhead, T, T)

        words = []
        tokens = split_text(news.train.texts[row], make_tokenizer(config.tokenizer))
        for token in tokens:
            is_known = token.word in inputs.vocabulary.words
            words.append(token.word if is_known else f"[{token.word}]")
        true = news.classes[news.labels[row]]
        guess = f"predicted {news.classes[predicted[row]]} ({confidence[row]:.0%})"
        title = f"{news.columns.id or 'Id'} {news.train.ids[row]}: true {true}, {guess}"
        figure = plot_attention(words, attn_weights[0].mean(0), title)
        path = config.out / f"attention-{name}.png"
        write_file(path, partial(figure.savefig, bbox_inches="tight"))


def plot_attention(words: list[str], attention: Tensor, title: str) -> Figure:
    """Draw attention (T, T), each row a token that looks at the tokens of the columns."""
    figure = Figure(figsize=(7, 7), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(attention.numpy(), cmap="Blues", vmin=0)
    figure.colorbar(image, label="attention, mean over heads", shrink=0.6)

    ticks = range(len(words))
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_xticks(ticks, words, fontsize=8, rotation=90, parse_math=False)
    axes.set_yticks(ticks, words, fontsize=8, parse_math=False)
    axes.set(xlabel="token looked at ([…]: without a vector)", ylabel="token that looks")
    return figure


# Seeds, device, files -----------------------------------------------------------------------------
# Same in vae_mnist.py, vae_anime.py
def log(message: str) -> None:
    """Print a line above the progress bar; of several processes the first one prints."""
    if RANK == 0:
        tqdm.write(message)


# Same in all four scripts
def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vectors_sha256(path: Path | None) -> str:
    """The sha256 of the vector file, which may be too large to be read at once, or "none"."""
    if path is None:
        return "none"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--vectors {path}: {reason(error)}. Give a text file, or none") from error


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


# Same in vae_mnist.py, vae_anime.py
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


# Same in vae_mnist.py, vae_anime.py
def write_table(path: Path, table: pd.DataFrame) -> None:
    write_file(path, partial(table.to_csv, index=False, mode="wb"))


def save_checkpoint(
    config: Config,
    classes: list[str],
    vocabulary: Vocabulary,
    folds: list[dict],
    metrics: dict | None = None,
) -> None:
    """Save the folds that are finished, and the metrics when all are."""
    checkpoint = {
        "version": CHECKPOINT_VERSION,
        "settings": config.settings,
        "classes": classes,
        "vocabulary": vocabulary._asdict(),
        "folds": folds,
        "metrics": metrics,
    }
    if RANK == 0:
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
            "number_format": "float32",
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


def two_or_more(text: str) -> int:
    """A flag's type: a whole number, 2 or more."""
    if not text.isdecimal() or int(text) < 2:
        raise ArgumentTypeError(f"{text}: give a whole number, 2 or more")
    return int(text)


def probability(text: str) -> float:
    """A flag's type: the probability of dropping something, from 0 to 0.99."""
    number = nonnegative(text)
    if number > 0.99:
        raise ArgumentTypeError(f"{text}: give a number from 0 to 0.99")
    return number


def parse_args(argv: list[str] | None) -> Config:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.set_defaults(**asdict(Config()))

    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, help="folder of train.csv and test.csv [data/, else the sample]")
    add("--out", type=Path, help="folder for the results [%(default)s]")
    add("--resume", action="store_true", help="continue the interrupted run in --out")
    add(
        "--predict",
        metavar="TEXT",
        help="classify a text, or each line of a file, by the models in --out; "
        "a tab separates its columns, such as title and description",
    )
    add("--seed", type=natural, help="of folds, weights, batches and dropout [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="[%(default)s]")
    add("--limit", type=positive, metavar="N", help="train on N rows, drawn by class [all]")

    add = parser.add_argument_group("text (columns without a header: 1, 2, …)").add_argument
    add("--label-column", help=f"the class [one named {', '.join(LABEL_NAMES)}]")
    add("--id-column", help="the row's id in test.csv [id, or unique values and id in the name]")
    add("--label-name", help="its name in submission.csv [a sample submission's, else its own]")
    add("--text-columns", nargs="+", help="the texts [all others, in file order]")
    add("--tokenizer", choices=TOKENIZERS, help="splits texts into words [%(default)s]")
    add(
        "--vectors",
        metavar="PATH|none",
        help="word vectors: a GloVe, fastText or word2vec text file; none: made from the texts "
        "[glove*.txt or *.vec in --data, else none]",
    )

    add = parser.add_argument_group("model").add_argument
    add("--d-model", type=positive, help="width of the encoder [%(default)s]")
    add("--nhead", type=positive, help="attention heads; divides --d-model [%(default)s]")
    add("--d-hid", type=positive, help="width of the feed-forward network [%(default)s]")
    add("--nlayers", type=positive, help="encoder layers [%(default)s]")
    add("--activation", choices=ACTIVATIONS, help="[%(default)s]")
    add("--dropout", type=probability, help="probability, in the encoder [%(default)s]")

    add = parser.add_argument_group("training").add_argument
    add("--word-dropout", type=probability, help="of dropping a word [by median length]")
    add("--r-drop", type=nonnegative, help="weight of the two passes' KL [%(default)s]")
    add("--folds", type=two_or_more, help="of the training texts, a model each [%(default)s]")
    add("--epochs", type=positive, help="passes over a fold's training texts [15, or fewer]")
    add("--batch-size", type=positive, help="texts per step, of all processes [%(default)s]")
    add("--optimizer", choices=OPTIMIZERS, help="[%(default)s]")
    add("--lr", type=nonnegative, help="peak learning rate [%(default)s]")

    config = Config(**vars(parser.parse_args(argv)))
    if not config.out.name:
        raise UserError(f"--out {config.out}: give the folder a name of its own")
    if config.d_model % config.nhead > 0:
        raise UserError(f"--nhead {config.nhead} does not divide --d-model {config.d_model}")
    if config.batch_size % WORLD_SIZE > 0:
        message = f"give a multiple of the {WORLD_SIZE} processes"
        raise UserError(f"--batch-size {config.batch_size}: {message}")
    return config


def run(config: Config) -> dict:
    """Do what the command line asks for, and return the metrics."""
    if config.predict is not None:
        return predict(config)
    if WORLD_SIZE > 1:
        gpu = pick_device(config.device).type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo")
    metrics = cross_validate(config)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()

    log(f"wrote     submission.csv; a copy, figures, tables and the models in {config.out}/")
    log("accuracy  {oof_accuracy:.4f} ± {oof_accuracy_se:.4f}, out of fold".format(**metrics))
    upload = "kaggle competitions submit COMPETITION -f submission.csv -m news"
    log(f"next      {'the same without --limit' if config.limit else upload}")
    words = ["--out", str(config.out), "--predict"]
    log(f'          or python {sys.argv[0]} {shlex.join(words)} "your text"')
    return metrics


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may have no ±
    resumable = False
    try:
        config = parse_args(argv)
        resumable = config.predict is None
        return run(config)
    except UserError as error:
        if RANK == 0:
            tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        advice = "; the same command with --resume continues after the last finished model"
        log(f"stopped{advice if resumable else ''}")
        raise SystemExit(130) from None


if __name__ == "__main__":
    # Pasted into a notebook cell, a script has no __file__, and sys.argv belongs to the notebook.
    main(None if "__file__" in globals() else [])
