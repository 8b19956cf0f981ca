# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "torchtext==0.6.0", "spacy==3.8.18", "nltk==3.10.4", "numpy==2.4.6",
#   "pandas==3.1.1", "scikit-learn==1.9.1", "matplotlib==3.11.2", "tqdm==4.70.1",
#   "filelock==4.2.12",
# ]
# ///
"""Classify news texts with a Transformer encoder trained from scratch.

Each text x becomes vectors, one pre-norm encoder layer mixes them (Vaswani et al. 2017), and their
mean over title and description gives the logits of p(y|x). Two dropout passes p1, p2 over a batch
are trained to agree (R-Drop, Liang et al. 2021):

    loss = 1/2 (CE(p1, y) + CE(p2, y)) + r_drop * 1/2 (KL(p1 || p2) + KL(p2 || p1))  nats per text

    python transformer.py                            data/ beside the script, else its sample
    python transformer.py --data DIR --vectors glove.6B.100d.txt
    python transformer.py --predict "your text"      with the trained model

It leaves submission.csv where you stand, and figures, tables, metrics.json and the model in
runs/transformer/. With GloVe 6B 100d and the 2,000 rows of the 2022 competition: .9000 ± .0067 out
of fold, .8978 ± .0061 on 2,446 unseen texts (seed 0, two cores).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
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
import time
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

# Threads that wait would spin: beside another busy program a run took 1.9 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from matplotlib.figure import Figure
from nltk.stem.snowball import EnglishStemmer
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.model_selection import StratifiedKFold
from sklearn.naive_bayes import MultinomialNB
from sklearn.preprocessing import MultiLabelBinarizer, normalize
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torchtext.vocab import Vocab, pretrained_aliases
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
VERSION = "transformer 3"  # of the checkpoint
SOURCE = "The real train.csv and test.csv come from the Kaggle competition; put them into data/"
LABEL_NAMES = ("category", "label", "class", "class index")
PAD, UNK = 0, 1
LSA_WIDTH = 32  # more dimensions tell the training texts apart, not the classes
PARTS = 20  # of the training texts: the class evidence that one reads is counted in the others
TOKENIZERS = ("basic_english", "spacy", "nltk", "whitespace")
SGD = partial(torch.optim.SGD, momentum=0.9)
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": SGD}


# data: csv -> texts and labels -> tokens -> integers ----------------------------------------------


class News(NamedTuple):
    """One competition: N training rows, and M test rows that follow them in `texts` and `ids`."""

    texts: list[str]  # N + M; a text's columns are parted by tabs
    ids: list[str]  # N + M
    labels: Tensor  # (N,) index into classes
    classes: list[str]  # C labels as the file writes them
    header: tuple[str, str]  # of the submission: id and label column
    hashes: dict[str, str]  # sha256 of each file


def find_data(given: Path | None) -> Path:
    """The folder to read: the one given, else data/ beside the script, else the sample there."""
    for folder in [given] if given else [HERE / "data", HERE / "data" / "sample"]:
        if given or (folder / "train.csv").exists():
            return folder
    fail(f"no data/train.csv beside {Path(__file__).name}. {SOURCE}, or name a folder with --data")


def read_table(path: Path) -> tuple[pd.DataFrame, str]:
    """A csv file as strings, and its sha256. One that begins with a number has no header."""
    with one_line(path, f"{SOURCE}, or name a folder with --data"):
        content, text = path.read_bytes(), {"dtype": str, "keep_default_na": False}
        file = io.StringIO(content.decode("utf-8-sig"), newline="")
        table = pd.read_csv(file, header=None, engine="python", skip_blank_lines=False, **text)
        table = table.dropna(how="all")  # blank lines; what a short row lacks is nan as well
        if table.empty:
            raise ValueError("it is empty")
        if table.isna().any(axis=None):
            row = table.isna().any(axis=1).idxmax() + 1
            raise ValueError(f"row {row} has fewer fields than the first")
        if table.iloc[0, 0].strip().isdigit():
            table.columns = [str(number + 1) for number in table.columns]
        else:
            table = table[1:].set_axis(table.iloc[0].str.strip(), axis=1)
        if len(table) == 0 or not table.columns.is_unique:
            raise ValueError(f"no rows, or a column twice, in {', '.join(table.columns)}")
    return table, hashlib.sha256(content).hexdigest()


def find_columns(columns: list[str], path: Path, args: Namespace) -> tuple:
    """The label's column, the id's or None, and those of the text."""
    known = {name.lower(): name for name in columns}
    label = args.label_column or next((known[n] for n in LABEL_NAMES if n in known), None)
    key = args.id_column or known.get("id")
    texts = args.text_columns or [name for name in columns if name not in (label, key)]
    missing = {key, *texts, label} - {None, *columns}
    if missing or not texts or label is None:
        wanted = ", ".join(missing) or ("text column" if label else "label column")
        fail(f"{path}: no {wanted}; found {', '.join(columns)}. Name it with --label-column, …")
    return label, key, texts


def read_texts(table: pd.DataFrame, path: Path, key: str | None, columns: list[str]) -> tuple:
    """Ids and texts of a table's rows."""
    if missing := {key, *columns} - {None, *table.columns}:
        fail(f"{path}: no column {', '.join(missing)}; found {', '.join(table.columns)}")
    ids = list(table[key].str.strip()) if key else [str(i + 1) for i in range(len(table))]
    twice, count = Counter(ids).most_common(1)[0]
    if count > 1:
        fail(f"{path}: {key} {twice!r} stands in {count} rows. Each row needs an id of its own")
    fields = [table[name].str.split().str.join(" ") for name in columns]
    texts = ["\t".join(row) for row in zip(*fields, strict=True)]
    if empty := sum(not text.strip() for text in texts):
        print(f"warning   {path}: {empty} of {len(texts)} rows have no text")
    return ids, texts


def load_news(args: Namespace) -> News:
    """Read train.csv and test.csv, and end the program where they cannot be learned from."""
    folder = find_data(args.data)
    bundled = args.data is None and folder.name == "sample"
    print(f"data      {folder}" + (f", the bundled sample. {SOURCE}" if bundled else ""))
    if args.vectors is None:
        args.vectors = str(min([*folder.glob("glove*.txt"), *folder.glob("*.vec")], default="none"))
    path, test_path = folder / "train.csv", folder / "test.csv"
    (train, train_hash), (test, test_hash) = read_table(path), read_table(test_path)
    label, key, columns = find_columns(list(train.columns), path, args)
    ids, texts = read_texts(train, path, key, columns)
    names = train[label].str.strip().tolist()
    classes = sorted(set(names), key=lambda name: (not name.isdigit(), name.zfill(9)))
    rows = sorted(np.random.default_rng(args.seed).permutation(len(ids))[: args.limit])
    ids, texts, names = ([column[row] for row in rows] for column in (ids, texts, names))
    counts = {name: names.count(name) for name in classes}
    rarest = min(counts, key=counts.get)
    if len(classes) < 2 or "" in classes or counts[rarest] < args.folds:
        facts = f"{len(classes)} classes, {rarest!r} in {counts[rarest]} rows"
        fail(f"{path}: {label} has {facts}. Give two or more, each in --folds {args.folds} rows")
    test_ids, test_texts = read_texts(test, test_path, key, columns)
    shares = ", ".join(f"{name}: {count}" for name, count in counts.items())
    print(f"rows      {len(ids)} to train on ({shares}), {len(test_ids)} to classify")
    labels = torch.tensor([classes.index(name) for name in names])
    hashes = {"train.csv": train_hash, "test.csv": test_hash}
    return News(texts + test_texts, ids + test_ids, labels, classes, (key or "Id", label), hashes)


def make_tokenizer(name: str) -> Callable[[str], list[str]]:
    """A function from text to lower-case tokens; only the library asked for is imported."""
    if name == "basic_english":
        return importlib.import_module("torchtext.data.utils").get_tokenizer("basic_english")
    if name == "spacy":
        pipeline = importlib.import_module("spacy").blank("en")
        return lambda text: [token.lower_ for token in pipeline(text) if not token.is_space]
    if name == "nltk":
        treebank = importlib.import_module("nltk.tokenize").TreebankWordTokenizer()
        return lambda text: treebank.tokenize(text.lower())
    return lambda text: text.lower().split()


@cache
def stem(word: str) -> str:
    """The word's stem (Porter 2001); numbers of as many digits are one: 86-83 and 91-79."""
    return EnglishStemmer().stem(re.sub(r"\d", "0", word))


class Token(NamedTuple):
    """A lower-case word or mark, its column, from 1, and the name under which it is counted."""

    word: str
    column: int
    name: str  # 1:appl is apple or apples in column 1


def split_text(text: str, columns: int, tokenize: Callable[[str], list[str]]) -> list[Token]:
    """The tokens of a text whose columns, at most `columns`, are parted by tabs."""
    parts = enumerate(text.split("\t", columns - 1), 1)
    return [
        Token(w, column, f"{column}:{stem(w)}") for column, part in parts for w in tokenize(part)
    ]


class Vocabulary(NamedTuple):
    """What turns tokens into integers."""

    words: dict[str, int]  # V words that have a vector; others are <unk>
    names: dict[str, int]  # G names whose classes are counted; others are 0
    columns: int  # of a text
    max_length: int  # tokens of a text

    def encode(self, tokens: list[Token]) -> Tensor:
        """Integers (T, 3): word, column and name of each token; no token at all is one <unk>."""
        tokens = tokens[: self.max_length] or [Token("", 1, "")]
        find_word, find_name = self.words.get, self.names.get
        return torch.tensor(
            [[find_word(t.word, UNK), t.column, find_name(t.name, 0)] for t in tokens]
        )


def read_vectors(source: str, words: set[str], folder: Path) -> dict[str, np.ndarray]:
    """The vectors of those `words` that `source` has, {word: (F,)}, scaled to unit variance.

    GloVe, fastText and word2vec files share the format `word v1 … vF`; the last two begin with a
    line `count width`. A name that torchtext knows is downloaded into `folder`.
    """
    with one_line(f"--vectors {source}", "Give a GloVe, fastText or word2vec text file, or none"):
        if source in pretrained_aliases and not Path(source).exists():
            table = pretrained_aliases[source](cache=str(folder))
            found = {word: table[word].numpy() for word in words & set(table.itos)}
        else:
            with open(source, encoding="utf-8", errors="replace") as file:
                rows = [line.rstrip().split(" ") for line in file if line.split(" ")[0] in words]
            width = Counter(map(len, rows)).most_common(1)  # others: a header, words with blanks
            rows = [row for row in rows if len(row) == width[0][0]]
            found = {word: np.array(numbers, dtype=np.float32) for word, *numbers in rows}
        if not found:
            raise ValueError("it has none of the texts' words")
        if not 0 < (spread := np.std(list(found.values()))) < math.inf:  # nor nan
            raise ValueError("its numbers are all the same, or not finite")
    return {word: vector / spread for word, vector in found.items()}


def cooccurrence_vectors(texts: list[list[str]], width: int) -> dict[str, np.ndarray]:
    """A vector for each stem of two texts or more: latent semantic analysis (Deerwester 1990).

    The text-by-stem matrix of tf-idf weights is about U S Vᵀ; a stem's vector is its row of V S at
    length √width, so stems of like texts point the same way. No label is used, so the texts of
    test.csv and of held-out folds may take part.
    """
    vectorizer = TfidfVectorizer(analyzer=list, min_df=2, sublinear_tf=True)
    with one_line("--vectors none", "Give vectors, or more texts"):
        weights = vectorizer.fit_transform(texts)
        svd = TruncatedSVD(min(width, *(n - 1 for n in weights.shape)), random_state=0).fit(weights)
    vectors = normalize(svd.components_.T * svd.singular_values_) * math.sqrt(width)
    return dict(zip(vectorizer.get_feature_names_out(), vectors, strict=True))


class Inputs(NamedTuple):
    """The news as integers, and the fixed vectors that the model looks up."""

    texts: list[Tensor]  # N + M, each (T, 3): word, column and name of its tokens
    vocabulary: Vocabulary
    features: Tensor  # (V, F)
    coverage: float | None  # share of the tokens that have a given vector


def prepare(args: Namespace, news: News) -> Inputs:
    """Tokenize, look up or make the words' vectors, and number both files' words and names."""
    tokenize = make_tokenizer(args.tokenizer)
    columns = 1 + max(text.count("\t") for text in news.texts)
    bar = tqdm(news.texts, "tokenize", disable=None, leave=False)
    texts = [split_text(text, columns, tokenize) for text in bar]
    counts = Counter(token.word for text in texts for token in text)
    if args.vectors == "none":
        made = cooccurrence_vectors([[stem(t.word) for t in text] for text in texts], LSA_WIDTH)
        vectors, coverage = {w: made[stem(w)] for w in counts if stem(w) in made}, None
        print("vectors   none given; made from the texts' own co-occurrence")
    else:
        vectors = read_vectors(args.vectors, set(counts), args.out.parent / "vectors")
        coverage = sum(counts[word] for word in vectors) / counts.total()
        print(f"vectors   {Path(args.vectors).name}: {coverage:.1%} of the tokens have one")
    known = Counter({word: counts[word] for word in vectors})
    words = Vocab(known, specials=["<pad>", "<unk>"])
    names = Vocab(Counter(t.name for text in texts for t in text), specials=["<pad>"])
    features = torch.tensor(np.stack([vectors[word] for word in words.itos[2:]])).float()
    features = F.pad(features, (0, 0, 2, 0))  # zeros for <pad> and <unk>
    print(f"tokens    {counts.total() / len(texts):.1f} a text; {len(words)} words in all")
    vocabulary = Vocabulary(dict(words.stoi), dict(names.stoi), columns, args.max_length)
    return Inputs([vocabulary.encode(text) for text in texts], vocabulary, features, coverage)


def length_batches(lengths: list[int], size: int, generator: Generator | None) -> list:
    """Rows in batches of `size` texts of about one length, so that little is padded.

    With a generator the texts are shuffled, sorted by length within windows of 16 batches only, and
    the full batches shuffled, so that each epoch's differ; the last texts may be left out. Without
    one all texts are sorted by length.
    """
    order, window = torch.arange(len(lengths)), len(lengths)
    if generator:
        order, window = torch.randperm(len(lengths), generator=generator), 16 * size
    parts = [sorted(part.tolist(), key=lengths.__getitem__) for part in order.split(window)]
    batches = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
    if generator:
        batches = [batch for batch in batches if len(batch) == size]
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return batches


def pad(texts: list[Tensor]) -> Tensor:
    """Texts of several lengths -> (B, longest T, 3), filled up with PAD."""
    return pad_sequence(texts, batch_first=True, padding_value=PAD)


def class_evidence(
    texts: list[Tensor], labels: Tensor, names: int, classes: int
) -> tuple[Tensor, Tensor]:
    """How much more often each of `names` stands in one class than in the others.

    It is log p(name | class), add-half smoothed, less its mean over classes (the log-count ratio of
    Wang and Manning 2012, eq. 1, for C classes). In the counts of all training texts a text would
    find its own label beside its rare words. So the texts are dealt into PARTS: of the tables
    (1 + PARTS, names, C) the first is for texts to come, and table p leaves part p out. Returns
    the tables and each training text's part (N,).
    """
    sets = [set(text[:, 2].tolist()) for text in texts]
    seen = MultiLabelBinarizer(classes=range(names), sparse_output=True).fit_transform(sets)
    part = 1 + torch.randperm(len(texts)) % PARTS
    tables = torch.zeros(1 + PARTS, names, classes)
    for left_out in range(1 + PARTS):
        rows = (part != left_out).numpy()
        bayes = MultinomialNB(alpha=0.5).partial_fit(seen[rows], labels[rows], range(classes))
        tables[left_out] = torch.from_numpy(bayes.feature_log_prob_.T)
    tables -= tables.mean(-1, keepdim=True)
    tables[:, 0] = 0.0  # padding, and a name that no file has, say nothing
    return tables, part


# model --------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Dropout from one random byte an element, p to 1/256: nn.Dropout takes a third of a step."""

    def __init__(self, p: float):
        super().__init__()
        self.cut = min(round(256 * p), 255)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.cut == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        draws = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
        return x * ((draws >= self.cut) * (256 / (256 - self.cut)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a LayerNorm and added to its input.

    Attention(Q, K, V) = softmax(Q Kᵀ / √head_dim) V (Vaswani et al. 2017, eq. 1), the norms first
    as in Xiong et al. 2020, fig. 1b.
    """

    def __init__(self, dim: int, heads: int, dropout: float, activation: str = "gelu"):
        super().__init__()
        self.heads, self.activation = heads, getattr(F, activation)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.merge = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, dim), keep (B, T) true at tokens -> x and attn_weights (B, heads, T, T)."""
        B, T, dim = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(B, T, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim) each
        scores = query @ key.transpose(-1, -2) / math.sqrt(dim // self.heads)
        scores = scores.masked_fill(~keep[:, None, None], -math.inf)  # padding is not looked at
        attn_weights = scores.softmax(-1)  # (B, heads, T, T)
        mixed = (attn_weights @ value).transpose(1, 2).reshape(B, T, dim)
        x = x + self.dropout(self.merge(mixed))
        hidden = self.dropout(self.activation(self.widen(self.feed_forward_norm(x))))
        return x + self.dropout(self.narrow(hidden)), attn_weights


class TransformerClassifier(nn.Module):
    """Word vectors and class evidence -> encoder -> mean over tokens, column by column -> logits.

    The vectors `features` (V, F) are fixed: 2,000 texts are too few to move 13,000 words to better
    places. They belong to the run, not to one model, and are saved once. `evidence` (G, C) comes
    from the model's own training texts. `settings` holds dim, heads, layers, dropout, activation.
    """

    def __init__(self, features: Tensor, vocabulary: Vocabulary, classes: int, settings: Namespace):
        super().__init__()
        dim, heads, dropout = settings.dim, settings.heads, settings.dropout
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("evidence", torch.zeros(len(vocabulary.names), classes))
        self.project = nn.Linear(features.shape[1] + classes, dim)
        self.position = nn.Parameter(0.02 * torch.randn(vocabulary.max_length, dim))
        self.column = nn.Parameter(0.1 * torch.randn(vocabulary.columns + 1, dim))  # 0: padding
        layer = partial(EncoderLayer, dim, heads, dropout, settings.activation)
        self.layers = nn.ModuleList(layer() for _ in range(settings.layers))
        self.norm, self.classify = nn.LayerNorm(dim), nn.Linear(dim, classes)
        self.input_dropout, self.output_dropout = Dropout(0.1), Dropout(dropout)

    def forward(self, tokens: Tensor, evidence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, T, 3) -> logits (B, C), and the last layer's attn_weights (B, heads, T, T).

        Training texts bring an `evidence` (B, T, C) that leaves them out.
        """
        word, column, name = tokens.unbind(-1)  # (B, T) each
        evidence = self.evidence[name] if evidence is None else evidence
        x = torch.cat([self.features[word], evidence], -1)  # (B, T, F + C)
        x = self.project(self.input_dropout(x)) + self.column[column]  # (B, T, dim)
        x = x + self.position[: x.shape[1]]
        for layer in self.layers:
            x, attn_weights = layer(x, word != PAD)
        inside = F.one_hot(column, len(self.column))[..., 1:].float()  # (B, T, columns)
        sizes = inside.sum(1)  # (B, columns), 0 where a text lacks one
        means = inside.transpose(1, 2) @ self.norm(x) / sizes.clamp_min(1)[..., None]
        pooled = means.sum(1) / (sizes > 0).sum(1, keepdim=True)  # (B, dim): columns count alike
        return self.classify(self.output_dropout(pooled)), attn_weights


# objective ----------------------------------------------------------------------------------------


def drop_words(tokens: Tensor, p: float) -> Tensor:
    """Turn each token of (B, T, 3) with probability p into <unk> with a name never seen."""
    word, column, name = tokens.unbind(-1)
    dropped = (torch.rand(word.shape, device=word.device) < p) & (word != PAD)
    return torch.stack([word.masked_fill(dropped, UNK), column, name.masked_fill(dropped, 0)], -1)


def r_drop_loss(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The training loss and its cross-entropy, in nats, averaged over the B items.

    logits (2B, C) hold two dropout passes over the same B items, one behind the other; labels (B,).
    ½ (CE₁ + CE₂) + weight · ½ (KL(p₁‖p₂) + KL(p₂‖p₁)): R-Drop (Liang et al. 2021, eqs. 1-4) with
    weight = α/2, since the paper adds the two cross-entropies where this averages them. With one
    pass, (B, C), it is the cross-entropy.
    """
    passes = len(logits) // len(labels)
    nll = F.cross_entropy(logits, labels.repeat(passes))
    if passes == 1:
        return nll, nll
    first, second = logits.log_softmax(-1).chunk(2)  # (B, C) each
    kl = ((first.exp() - second.exp()) * (first - second)).sum(-1).mean() / 2  # one way and back
    return nll + weight * kl, nll


# train and evaluate -------------------------------------------------------------------------------


def train_member(
    model: nn.Module, texts: list, labels: Tensor, state: dict, bar: tqdm, save: Callable
) -> None:
    """Train `model`, the run's next, on `texts`, on from the last epoch that `state` holds."""
    settings, device = Namespace(**state["settings"]), model.position.device
    place = (settings.seed, len(state["members"]))  # tells this model's noise from the others'
    seed_all(*place)
    tables, part = class_evidence(texts, labels, *model.evidence.shape)
    model.evidence.copy_(tables[0])
    new_optimizer, epochs = OPTIMIZERS[settings.optimizer], settings.epochs
    optimizer = new_optimizer(model.parameters(), weight_decay=settings.weight_decay)
    current = state["current"] or {"epoch": 0}
    if state["current"]:
        model.load_state_dict(current["model"])
        optimizer.load_state_dict(current["optimizer"])
    network = DistributedDataParallel(model, forward_sync_buffers=False) if WORLD > 1 else model
    lengths, passes = [len(text) for text in texts], 2 if settings.r_drop else 1
    size = min(settings.batch_size, len(texts))
    for epoch in range(current["epoch"], epochs):
        nll_sum, right, seen = 0.0, 0, 0
        batches = length_batches(lengths, size, seed_all(*place, epoch))
        for number, batch in enumerate(batches):
            step = epoch * len(batches) + number
            seed_all(*place, step, RANK)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, epochs * len(batches), settings.lr)
            rows = batch[RANK::WORLD]  # this process's slice, B texts
            y = labels[rows].to(device)  # (B,)
            x = drop_words(pad([texts[row] for row in rows] * passes), settings.word_dropout)
            evidence = tables[part[rows * passes, None], x[..., 2]]  # (passes * B, T, C)
            # At this width bf16 costs a CPU more in casts than it saves.
            with autocast(device) if device.type == "cuda" else contextlib.nullcontext():
                logits, _ = network(x.to(device), evidence.to(device))  # (passes * B, C)
            loss, nll = r_drop_loss(logits.float(), y, settings.r_drop)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item() + norm.item()):
                fail(f"no finite loss in epoch {epoch + 1}, step {step + 1}. Lower --lr")
            optimizer.step()
            nll_sum += nll.item() * len(y)
            right += (logits[: len(y)].argmax(-1) == y).sum().item()
            seen += len(y)
            bar.update()
        row = {"model": place[1] + 1, "epoch": epoch + 1, "cross_entropy": nll_sum / seen}
        state["history"].append(row | {"accuracy": right / seen})
        weights, moments = model.state_dict(), optimizer.state_dict()
        state["current"] = {"epoch": epoch + 1, "model": weights, "optimizer": moments}
        save()


@torch.no_grad()
def predict_probabilities(model: TransformerClassifier, texts: list[Tensor]) -> Tensor:
    """Class probabilities (N, C) of encoded texts."""
    model.eval()
    probabilities = torch.zeros(len(texts), model.classify.out_features)
    for batch in length_batches([len(text) for text in texts], 128, None):
        x = pad([texts[row] for row in batch]).to(model.position.device)
        probabilities[batch] = model(x)[0].softmax(-1).cpu()
    return probabilities


def build_model(state: dict, weights: dict | None = None) -> TransformerClassifier:
    """A network of the shape that a checkpoint tells, with fresh weights or those given."""
    vocabulary = Vocabulary(**state["vocabulary"])
    settings = Namespace(**state["settings"])
    model = TransformerClassifier(state["features"], vocabulary, len(state["classes"]), settings)
    if weights:
        model.load_state_dict(weights)
    return model


def open_state(args: Namespace, news: News) -> dict:
    """What a checkpoint holds: with --resume that of the run in --out, else an empty one."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= {"vectors": Path(args.vectors).name} | news.hashes
    if args.resume and (args.out / "checkpoint.pt").exists():
        return load_checkpoint(args.out / "checkpoint.pt", VERSION, settings)
    empty = {"members": [], "current": None, "history": [], "seconds": 0.0, "metrics": None}
    return {"version": VERSION, "settings": settings, "classes": news.classes} | empty


def cross_validate(args: Namespace, news: News) -> dict:
    """Train --seeds models on each fold's complement; they classify the fold and the test rows."""
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size}: give a multiple of the {WORLD} processes")
    device = pick_device(args.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    state, labels = open_state(args, news), news.labels
    if state["metrics"]:
        print(f"finished  {args.out} holds this run's end already")
        write_json(args.out / "metrics.json", state["metrics"])
        return state["metrics"]
    began, inputs = time.monotonic() - state["seconds"], prepare(args, news)
    vocabulary = inputs.vocabulary._asdict()
    if state.setdefault("vocabulary", vocabulary) != vocabulary:
        fail(f"{args.out}: trained with other word vectors. Give the same, or no --resume")
    state.setdefault("features", inputs.features)

    def save() -> None:
        state["seconds"] = time.monotonic() - began
        if RANK == 0:
            write_file(args.out / "checkpoint.pt", partial(torch.save, state))

    splitter = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)
    folds = [fold for fold in splitter.split(labels, labels) for _ in range(args.seeds)]
    batches = [len(rows) // min(args.batch_size, len(rows)) for rows, _ in folds]
    steps = np.repeat(batches, args.epochs).tolist()  # of each epoch of each model
    done = sum(steps[: len(state["history"])])
    hold = open_run(args.out, args, news.hashes) if RANK == 0 else contextlib.nullcontext()
    with hold, tqdm(total=sum(steps), initial=done, unit="batch", disable=RANK > 0 or None) as bar:
        for rows, held_out in folds[len(state["members"]) :]:
            seed_all(args.seed, len(state["members"]))
            model = build_model(state).to(device).train()
            train_member(model, [inputs.texts[i] for i in rows], labels[rows], state, bar, save)
            member = {
                "weights": {name: value.cpu() for name, value in model.state_dict().items()},
                "rows": held_out.tolist(),
                "held_out": predict_probabilities(model, [inputs.texts[i] for i in held_out]),
                "test": predict_probabilities(model, inputs.texts[len(labels) :]),
            }
            state["members"].append(member)
            state["current"] = None
            save()
            share = (member["held_out"].argmax(-1) == labels[held_out]).float().mean()
            bar.write(f"model {len(state['members'])} of {len(folds)}: held out {share:.4f}")
        metrics, oof = score(state, labels)
        if RANK == 0:
            leave_results(args, news, inputs.texts, state, oof)
            print(f"wrote     submission.csv; figures, tables and the model in {args.out}/")
        seconds = time.monotonic() - began
        state["metrics"] = metrics | {"vector_coverage": inputs.coverage, "seconds": seconds}
        save()
        if RANK == 0:
            write_json(args.out / "metrics.json", state["metrics"])
    return state["metrics"]


def score(state: dict, labels: Tensor) -> tuple[dict, Tensor]:
    """Metrics, and class probabilities (N, C) of each row by the models that had it held out."""
    members, seeds = state["members"], state["settings"]["seeds"]
    oof = torch.zeros(len(labels), len(state["classes"]))
    for member in members:
        oof[member["rows"]] += member["held_out"] / seeds
    right = (oof.argmax(-1) == labels).float()
    metrics = {
        "oof_accuracy": (accuracy := right.mean().item()),
        "oof_accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        "fold_accuracy": [right[member["rows"]].mean().item() for member in members[::seeds]],
        "parameters": sum(p.numel() for p in build_model(state).parameters()),
    }
    return metrics, oof


def load_finished(folder: Path) -> tuple[list[TransformerClassifier], dict]:
    """The models of the run in `folder`, and its checkpoint."""
    path = folder / "checkpoint.pt"
    state = load_checkpoint(path, VERSION, {}) if path.exists() else {"members": []}
    if not state["members"]:
        fail(f"{folder}: no trained model there. Train first, or name a run's folder with --out")
    return [build_model(state, member["weights"]) for member in state["members"]], state


def classify(models: list[TransformerClassifier], state: dict, texts: list[str]) -> Tensor:
    """Class probabilities (N, C) of texts, the mean over models; a tab parts a text's columns."""
    vocabulary = Vocabulary(**state["vocabulary"])
    tokenize = make_tokenizer(state["settings"]["tokenizer"])
    tokens = [vocabulary.encode(split_text(text, vocabulary.columns, tokenize)) for text in texts]
    return torch.stack([predict_probabilities(model, tokens) for model in models]).mean(0)


def predict(args: Namespace) -> dict:
    """Print the class of --predict's text, or of each line of the file of that name."""
    models, state = load_finished(args.out)
    lines = [args.predict]
    if os.path.isfile(args.predict):
        with one_line(f"--predict {args.predict}", "Give a text, or a file that can be read"):
            text = Path(args.predict).read_text("utf-8-sig", "replace").removesuffix("\n")
            lines = text.split("\n")
    confidence, predicted = classify(models, state, lines).max(-1)
    labels = [state["classes"][i] for i in predicted]
    for label, share, line in zip(labels, confidence.tolist(), lines, strict=True):
        print(label, f"{share:.3f}", line.replace("\t", " "), sep="\t")
    return {"labels": labels, "confidence": confidence.tolist()}


# figures and tables -------------------------------------------------------------------------------


def save_figure(figure: Figure, path: Path) -> None:
    write_file(path, partial(figure.savefig, format="png"))


def save_table(columns: dict | list, path: Path) -> None:
    table = pd.DataFrame(columns)
    write_file(path, partial(table.to_csv, index=False, float_format="%.5g", mode="wb"))


def leave_results(args: Namespace, news: News, texts: list, state: dict, oof: Tensor):
    """submission.csv where the user stands; tables and figures in --out."""
    (key, label), classes = news.header, news.classes
    test = torch.stack([member["test"] for member in state["members"]]).mean(0).argmax(-1)
    submission = {key: news.ids[len(oof) :], label: [classes[i] for i in test]}
    save_table(submission, Path("submission.csv"))
    confidence, predicted = oof.max(-1)
    table = {key: news.ids[: len(oof)], "true": [classes[i] for i in news.labels]}
    table |= {"predicted": [classes[i] for i in predicted], "confidence": confidence}
    table |= {f"p({name})": oof[:, i] for i, name in enumerate(classes)}
    save_table(table | {"text": news.texts[: len(oof)]}, args.out / "oof_predictions.csv")
    save_table(state["history"], args.out / "history.csv")
    right = (predicted == news.labels).float().mean().item()
    curves = plot_learning_curve(state["history"], right, math.sqrt(right * (1 - right) / len(oof)))
    save_figure(curves, args.out / "learning-curve.png")
    confusion = plot_confusion(news.labels, predicted, classes)
    save_figure(confusion, args.out / "confusion-matrix.png")
    draw_attention(args, news, texts, state, oof)


def plot_learning_curve(history: list[dict], accuracy: float, error: float) -> Figure:
    """Training cross-entropy and accuracy of each model by epoch, and the out-of-fold accuracy."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    units = {"cross_entropy": "cross-entropy (nats)", "accuracy": "accuracy"}
    for panel, (key, unit) in zip(figure.subplots(1, 2), units.items(), strict=True):
        curves = pd.DataFrame(history).pivot(index="epoch", columns="model", values=key)
        panel.plot(curves, ".-", color="tab:blue", alpha=0.4, linewidth=1)
        panel.plot([], [], color="tab:blue", label=f"training, {curves.shape[1]} models")
        panel.set(xlabel="epoch", ylabel=unit)
    panel.axhline(accuracy, color="tab:red", label=f"out of fold {accuracy:.4f} ± {error:.4f}")
    panel.legend()
    figure.suptitle("Training drops words and units; the out-of-fold texts are whole", fontsize=9)
    return figure


def plot_confusion(labels: Tensor, predicted: Tensor, classes: list[str]) -> Figure:
    """Counts of (true, predicted) class, out of fold."""
    size = 2.5 + 0.6 * len(classes)
    figure = Figure(figsize=(size + 0.6, size), dpi=150, layout="constrained")
    names = [name.replace("$", r"\$") for name in classes]  # a dollar is no formula
    display = ConfusionMatrixDisplay(confusion_matrix(labels, predicted), display_labels=names)
    turn = 45 if max(map(len, classes)) > 3 else 0
    display.plot(ax=figure.subplots(), cmap="Blues", xticks_rotation=turn)
    return figure


def plot_attention(words: list[str], attn_weights: Tensor, title: str) -> Figure:
    """attn_weights (heads, T, T) of the last layer: their mean over heads as a map, and what each
    token receives, head by head, over the even share 1 / T.
    """
    heads, count, _ = attn_weights.shape
    figure = Figure(figsize=(7, 8.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=9, parse_math=False)
    top, bottom = figure.subplots(2, 1, height_ratios=(count, heads + 1.5), sharex=True)
    scale = top.imshow(attn_weights.mean(0).numpy(), cmap="Blues", vmin=0, aspect="auto")
    top.set_yticks(range(count), words, fontsize=7, parse_math=False)
    top.set_ylabel("token that looks")
    figure.colorbar(scale, ax=top, label="attention, mean over heads")
    scale = bottom.imshow(
        attn_weights.mean(1).numpy() * count, cmap="Oranges", vmin=0, aspect="auto"
    )
    bottom.set_yticks(range(heads), [f"head {i + 1}" for i in range(heads)])
    bottom.set_xticks(range(count), words, fontsize=7, rotation=90, parse_math=False)
    bottom.set_xlabel("token looked at")
    figure.colorbar(scale, ax=bottom, label="over even share")
    return figure


@torch.no_grad()
def draw_attention(
    args: Namespace, news: News, texts: list[Tensor], state: dict, oof: Tensor
) -> None:
    """Maps of the surest right and the surest wrong prediction of a text of 12 to 40 tokens, by a
    model that had the text held out. Words that are read as <unk> stand in brackets.
    """
    member_of = {row: member for member in state["members"] for row in member["rows"]}
    confidence, predicted = oof.max(-1)
    tokenize, classes = make_tokenizer(args.tokenizer), news.classes
    short = [row for row in member_of if 12 <= len(texts[row]) <= 40]
    for kind in ("right", "wrong"):
        rows = [i for i in short if (predicted[i] == news.labels[i]) == (kind == "right")]
        for row in sorted(rows, key=lambda row: -confidence[row])[:1]:
            tokens, model = texts[row], build_model(state, member_of[row]["weights"]).eval()
            _, attn_weights = model(tokens[None])
            words = split_text(news.texts[row], state["vocabulary"]["columns"], tokenize)
            pairs = zip(words, tokens[:, 0].tolist(), strict=False)
            shown = [f"[{token.word}]" if word == UNK else token.word for token, word in pairs]
            guess = f"predicted {classes[predicted[row]]} ({confidence[row]:.0%})"
            title = f"{news.header[0]} {news.ids[row]}: true {classes[news.labels[row]]}, {guess}"
            figure = plot_attention(shown, attn_weights[0], title)
            save_figure(figure, args.out / f"attention-{kind}.png")


# run folder, errors, command line (much of it the same in every script) ---------------------------


def fail(message: str) -> NoReturn:
    """End the program over a user's mistake: one line on stderr, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
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

    def stop(number: int, frame) -> None:
        print("\nstopped   go on with:", shlex.join(["python", *sys.argv, "--resume"]))
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


def autocast(device: torch.device) -> torch.autocast:
    """bf16 matrix products where the processor has them: a GPU, or a CPU with avx512_bf16."""
    bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type != "mps")


def write_file(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    """Let `save` fill a buffer, and move it to `path` when it is written: never half a file."""
    content, temporary = io.BytesIO(), path.with_name(f".{path.name}.tmp")
    save(content)
    try:
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror}). Make room, then add --resume")
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2, default=str) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def open_run(folder: Path, args: Namespace, hashes: dict[str, str]) -> Iterator[None]:
    """Hold the run's folder while the block lasts; a run that starts over keeps the old one."""
    previous = folder.parent / f"{folder.name}.previous"
    used = [p for p in (folder, previous) if p.is_dir() and {*p.iterdir()} - {*p.glob(".*.tmp")}]
    if folder.name in ("", "..") or not all((p / "config.json").exists() for p in used):
        fail(f"{folder}, or {previous.name}: not the folder of a run. Name another with --out")
    with one_line(folder, "Wait for the other run, or name another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0).acquire()
        if not args.resume and (folder / "checkpoint.pt").exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            folder.mkdir()
        for stale in folder.glob(".*.tmp"):
            stale.unlink()
    commit = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    git = subprocess.run(commit, capture_output=True, text=True) if shutil.which("git") else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts = {"sha256": hashes, "seed": args.seed, "commit": git and git.stdout.strip()}
    with lock:
        write_json(folder / "config.json", {"arguments": vars(args), "versions": versions} | facts)
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
            fail(f"{path}: trained with {name} {there}, not {value}. Give the same, or no --resume")
    return state


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to 0."""
    warmup = max(1, steps // 10)
    decay = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * decay))


NOT_SETTINGS = ("data", "out", "resume", "device", "predict")  # what --resume may change
COUNTS = ("limit", "max_length", "layers", "heads", "dim", "seeds", "epochs", "batch_size")
RANGES = dict.fromkeys(COUNTS, (1, math.inf)) | {"seed": (0, 2**32 - 1), "folds": (2, math.inf)}
RANGES |= dict.fromkeys(("dropout", "word_dropout"), (0, 0.999))
RANGES |= {"lr": (1e-12, 1e6), "weight_decay": (0, 1e6), "r_drop": (0, 1e6)}


# fmt: off
def parse_args(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description="Classify news texts with a Transformer encoder "
                                     "trained from scratch. Defaults stand in [brackets].")
    parser.error = fail  # a mistake is one line here as everywhere
    add = parser.add_argument_group("run").add_argument
    add("--data", type=Path, help="folder of train.csv and test.csv [data/, else its sample]")
    add("--out", type=Path, default=Path("runs/transformer"), help="folder for a run [%(default)s]")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add("--predict", metavar="TEXT", help="classify a text, or each line of a file, with the model "
        "in --out; a tab parts its columns, such as title and description")
    add("--seed", type=int, default=0, help="of folds, weights, batches and dropout [%(default)s]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="[%(default)s]")
    add("--limit", type=int, help="train on so many random rows only, for a first look [all]")
    add = parser.add_argument_group("columns (1, 2, 3, … where a file has no header)").add_argument
    add("--label-column", help=f"the class [one named {', '.join(LABEL_NAMES)}]")
    add("--id-column", help="the row's id [one named id, else the rows are counted]")
    add("--text-columns", nargs="+", help="the texts [all others, in file order]")
    add = parser.add_argument_group("text").add_argument
    add("--tokenizer", choices=TOKENIZERS, default="basic_english", help="[%(default)s]")
    add("--max-length", type=int, default=512, help="tokens; longer texts are cut [%(default)s]")
    add("--vectors", metavar="PATH|NAME|none", help="a GloVe, fastText or word2vec text file, or a "
        "name that torchtext downloads: glove.6B.100d [glove*.txt or *.vec in --data]")
    add = parser.add_argument_group("model").add_argument
    add("--layers", type=int, default=1, help="of the encoder [%(default)s]")
    add("--heads", type=int, default=4, help="of attention; divides --dim [%(default)s]")
    add("--dim", type=int, default=64, help="width of the encoder [%(default)s]")
    add("--dropout", type=float, default=0.3, help="probability, in the encoder [%(default)s]")
    add("--activation", choices=("gelu", "relu"), default="gelu", help="[%(default)s]")
    add = parser.add_argument_group("training").add_argument
    add("--folds", type=int, default=5, help="each row is held out of one [%(default)s]")
    add("--seeds", type=int, default=1, help="models per fold, averaged [%(default)s]")
    add("--epochs", type=int, default=15, help="passes over a fold's training rows [%(default)s]")
    add("--batch-size", type=int, default=32, help="texts a step, of all processes [%(default)s]")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="[%(default)s]")
    add("--lr", type=float, default=1e-3, help="peak learning rate; sgd wants 0.1 [%(default)s]")
    add("--weight-decay", type=float, default=0.01, help="of the weights [%(default)s]")
    add("--word-dropout", type=float, default=0.3, help="words read as <unk> [%(default)s]")
    add("--r-drop", type=float, default=1.0, help="weight of two passes' KL; 0: one [%(default)s]")
    args = parser.parse_args(argv)
    check_ranges(args, RANGES)
    if args.dim % args.heads:
        fail(f"--heads {args.heads} does not divide --dim {args.dim}")
    return args
# fmt: on


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` and return the final metrics."""
    if hasattr(sys.stdout, "reconfigure"):  # a ± is no reason to stop where the terminal has none
        sys.stdout.reconfigure(errors="backslashreplace")
    exit_on_signals()
    args = parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO() if RANK else sys.stdout):  # the first one speaks
        if args.predict is not None:
            return predict(args)
        metrics = cross_validate(args, load_news(args))
        accuracy, error = metrics["oof_accuracy"], metrics["oof_accuracy_se"]
        print(f"accuracy  {accuracy:.4f} ± {error:.4f} (standard error), out of fold")
        print("next      kaggle competitions submit COMPETITION -f submission.csv -m Transformer")
        print(f'          or python {sys.argv[0]} --out {args.out} --predict "your text"')
    if WORLD > 1:
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    main()
