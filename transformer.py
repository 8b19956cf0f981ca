# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "torchtext==0.6.0", "nltk==3.10.4", "numpy==2.4.6",
#                 "pandas==3.1.1", "scikit-learn==1.9.1", "matplotlib==3.11.2", "tqdm==4.70.1",
#                 "filelock==4.2.12"]
# ///
"""Classify news texts with a Transformer encoder trained from scratch.

Each text x becomes vectors, and one pre-norm encoder layer mixes them (Vaswani et al. 2017). Their
mean over title and description, and a vote of the words, give the logits of p(y|x). Two dropout
passes p1, p2 over a batch are trained to agree (R-Drop, Liang et al. 2021):

    loss = 1/2 (CE(p1, y) + CE(p2, y)) + r_drop * 1/2 (KL(p1 || p2) + KL(p2 || p1))  nats per text

    python transformer.py                            data/ beside the script, else its sample
    python transformer.py --data DIR --vectors DIR/glove.6B.100d.txt
    python transformer.py --predict "your text"      with the trained model

It leaves submission.csv where you stand, the rest in runs/transformer/. With GloVe 6B 100d and the
2022 competition's 2,000 rows: .9045 ± .0066 out of fold, .8945 ± .0062 on 2,446 unseen texts.
"""

import contextlib
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
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read by torch: how long threads wait awake

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
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import normalize
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.rnn import pad_sequence
from torchtext.data.utils import get_tokenizer
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
VERSION = "transformer 5"  # of the checkpoint
SOURCE = "The real train.csv and test.csv come from the Kaggle competition; put them into data/"
LABEL_NAMES = ("category", "label", "class", "class index")
PAD, UNK = 0, 1
LSA_WIDTH = 32  # more dimensions tell the training texts apart, not the classes
PARTS = 20  # of the training texts: the class evidence that one reads is counted in the others
TOP = 50_000  # words at the start of a vector file, its most frequent: for texts to come
MAX_LENGTH = 512  # tokens of a text; longer ones are cut
TOKENIZE = get_tokenizer("basic_english")  # lower case, marks apart
OPTIMIZER, ACTIVATION = torch.optim.AdamW, F.gelu


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
    real, sample = HERE / "data", HERE / "data" / "sample"
    folder = given or (real if (real / "train.csv").exists() else sample)
    print(f"data      {folder}" + (f", the bundled sample. {SOURCE}" if folder == sample else ""))
    return folder


def read_table(path: Path) -> tuple[pd.DataFrame, str]:
    """A csv file as strings, and its sha256. One that begins with a number has no header."""
    with one_line(path, "Give train.csv and test.csv, in UTF-8, commas between columns"):
        content, options = path.read_bytes(), {"dtype": str, "keep_default_na": False}
        file = io.StringIO(content.decode("utf-8-sig"), newline="")
        table = pd.read_csv(file, header=None, engine="python", skip_blank_lines=False, **options)
        table = table.dropna(how="all")  # blank lines; what a short row lacks is nan as well
        if table.isna().any(axis=None):
            row = table.isna().any(axis=1).idxmax() + 1
            raise ValueError(f"row {row} has fewer fields than the first")
        if table.iloc[0, 0].strip().isdigit():
            table.columns = [str(number + 1) for number in table.columns]
        else:
            table = table[1:].set_axis(table.iloc[0].str.strip(), axis=1)
        if table.empty or not table.columns.is_unique:
            raise ValueError(f"no rows, or a column twice, in {', '.join(table.columns)}")
    return table, hashlib.sha256(content).hexdigest()


def read_texts(table: pd.DataFrame, path: Path, key: str | None, columns: list[str]) -> tuple:
    """Ids and texts of a table's rows."""
    missing = ", ".join({key, *columns} - {None, *table}) if columns else "text"
    if missing:
        found = f"no {missing} column; found {', '.join(table)}"
        fail(f"{path}: {found}. Name it with --text-columns or --id-column")
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
    if args.vectors is None:
        args.vectors = str(min([*folder.glob("glove*.txt"), *folder.glob("*.vec")], default="none"))
    path, test_path = folder / "train.csv", folder / "test.csv"
    (train, train_hash), (test, test_hash) = read_table(path), read_table(test_path)
    known = {name.lower(): name for name in train}
    label = args.label_column or next((known[n] for n in LABEL_NAMES if n in known), "label")
    key = args.id_column or known.get("id")
    columns = args.text_columns or [name for name in train if name not in (label, key)]
    if label not in train:
        fail(f"{path}: no {label} column; found {', '.join(train)}. Name it with --label-column")
    train = train.sample(frac=1, random_state=args.seed)[: args.limit].sort_index()
    labelled = train[label].str.strip().tolist()
    ids, texts = read_texts(train, path, key, columns)
    test_ids, test_texts = read_texts(test, test_path, key, columns)
    classes = sorted(set(labelled), key=lambda name: (not name.isdigit(), name.zfill(9)))
    labels = torch.tensor([classes.index(name) for name in labelled])
    counts = labels.bincount(minlength=len(classes)).tolist()
    shares = ", ".join(f"{name}: {count}" for name, count in zip(classes, counts, strict=True))
    if len(classes) < 2 or "" in classes or min(counts) < args.folds:
        fail(f"{path}: {label} has classes {shares[:99]}. Give two or more, {args.folds} rows each")
    print(f"columns   text {', '.join(columns)}; label {label}; id {key or 'none, counted from 1'}")
    print(f"rows      {len(ids)} to train on ({shares}), {len(test_ids)} to classify")
    hashes = {"train.csv": train_hash, "test.csv": test_hash}
    return News(texts + test_texts, ids + test_ids, labels, classes, (key or "Id", label), hashes)


@cache
def stem(word: str) -> str:
    """The word's stem (Porter 2001); numbers of as many digits are one: 86-83 and 91-79."""
    return EnglishStemmer().stem(re.sub(r"\d", "0", word))


def split_text(text: str, columns: int) -> list[tuple]:
    """The (word, column, name) of each token of a text whose columns are parted by tabs.

    Its classes are counted by its name: 1:appl is apple or apples in column 1.
    """
    parts = enumerate(text.split("\t", columns - 1), 1)
    pairs = [(word, column) for column, part in parts for word in TOKENIZE(part)]
    return [(word, column, f"{column}:{stem(word)}") for word, column in pairs]


class Vocabulary(NamedTuple):
    """What turns tokens into integers."""

    words: dict[str, int]  # V words that have a vector; others are <unk>
    names: dict[str, int]  # G names whose classes are counted; others are 0
    columns: int  # of a text

    def encode(self, tokens: list[tuple]) -> Tensor:
        """Integers (T, 3): word, column and name of each token; no token at all is one <unk>."""
        tokens, (word_of, name_of) = tokens[:MAX_LENGTH] or [("", 1, "")], (self.words, self.names)
        return torch.tensor([[word_of.get(w, UNK), c, name_of.get(n, 0)] for w, c, n in tokens])


def read_vectors(path: str, words: set[str]) -> dict[str, np.ndarray]:
    """Vectors of `words`, and of the first TOP, in lines `word v1 … vF`; at unit variance."""
    with one_line(f"--vectors {path}", "Give a GloVe, fastText or word2vec text file, or none"):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [s.rstrip() for i, s in enumerate(file) if i < TOP or s.split(" ")[0] in words]
        widths = Counter(line.count(" ") for line in lines).most_common(1)  # a header has another
        rows = (line.split(" ") for line in lines if line.count(" ") == widths[0][0])
        found = {word: np.array(numbers, dtype=np.float32) for word, *numbers in rows}
        if words.isdisjoint(found) or not 0 < (spread := np.std([*found.values()])) < math.inf:
            raise ValueError("none of the texts' words, or numbers all the same, or not finite")
    return {word: vector / spread for word, vector in found.items()}


def cooccurrence_vectors(texts: list[list[str]]) -> dict[str, np.ndarray]:
    """A vector for each stem of two texts or more: latent semantic analysis (Deerwester 1990).

    The text-by-stem matrix of tf-idf weights is about U S Vᵀ; a stem's vector is its row of V S at
    length √LSA_WIDTH. No label is used, so the texts of test.csv and held-out folds may take part.
    """
    vectorizer = TfidfVectorizer(analyzer=list, min_df=2, sublinear_tf=True)
    with one_line("--vectors none", "Give vectors, or more texts"):
        weights = vectorizer.fit_transform(texts)
        svd = TruncatedSVD(min(LSA_WIDTH, *(n - 1 for n in weights.shape)), random_state=0)
        svd.fit(weights)
    vectors = normalize(svd.components_.T * svd.singular_values_) * math.sqrt(LSA_WIDTH)
    return dict(zip(vectorizer.get_feature_names_out(), vectors, strict=True))


def prepare(args: Namespace, texts: list[str]) -> tuple[list[Tensor], Vocabulary, Tensor, float]:
    """Tokenize; look up or make the words' vectors; number words and names.

    Returns each text's integers (T, 3), the vocabulary, the words' fixed vectors (V, F), and the
    share of the tokens that have a given vector.
    """
    columns = 1 + max(text.count("\t") for text in texts)
    texts = [split_text(text, columns) for text in texts]
    counts, coverage = Counter(word for text in texts for word, *_ in text), None
    if args.vectors == "none":
        made = cooccurrence_vectors([[stem(word) for word, *_ in text] for text in texts])
        vectors = {word: made[stem(word)] for word in counts if stem(word) in made}
        print("vectors   none given; made from the texts' own co-occurrence")
    else:
        vectors = read_vectors(args.vectors, set(counts))
        coverage = sum(counts[word] for word in vectors) / counts.total()
        print(f"vectors   {Path(args.vectors).name}: {coverage:.1%} of the tokens have one")
    print(f"tokens    {counts.total() / len(texts):.1f} a text; {len(vectors)} words with a vector")
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *vectors])}
    named = dict.fromkeys(name for text in texts for *_, name in text)
    vocabulary = Vocabulary(words, {name: i for i, name in enumerate(["<pad>", *named])}, columns)
    features = torch.tensor(np.stack([*vectors.values()])).float()
    features = F.pad(features, (0, 0, 2, 0))  # zeros for <pad> and <unk>
    return [vocabulary.encode(text) for text in texts], vocabulary, features, coverage


def length_batches(texts: list[Tensor], size: int, generator: Generator) -> list[Tensor]:
    """Shuffled batches of `size` rows whose texts, of 16 batches, are of about one length."""
    lengths = torch.tensor([len(text) for text in texts])
    windows = torch.randperm(len(texts), generator=generator).split(16 * size)
    batches = [part for rows in windows for part in rows[lengths[rows].argsort()].split(size)]
    batches = [batch for batch in batches if len(batch) == size]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def class_evidence(texts: list[Tensor], labels: Tensor, names: int, classes: int) -> tuple:
    """-(C - 1) log p(name | other classes) less its mean over classes: (1 + PARTS, names, C).

    (Complement naive Bayes, Rennie et al. 2003, section 3.1: what is rare in the other classes
    speaks for this one, and C - 1 classes are counted more reliably than one. Smoothed by a sixth
    in each.) In the counts of all texts a training text would find its own label beside its rare
    words. So the texts are dealt into PARTS: table 0 is for texts to come, table p leaves part p
    out. Returns each text's part too.
    """
    part = 1 + torch.randperm(len(texts)) % PARTS
    counts = torch.zeros(1 + PARTS, names, classes)  # of the texts that have the name
    for text, p, label in zip(texts, part, labels, strict=True):
        counts[p, text[:, 2].unique(), label] += 1
    counts = counts.sum(0) - counts
    tables = counts.sum(-1, keepdim=True) - counts + (classes - 1) / 6  # of the other classes
    tables = -(classes - 1) * (tables / tables.sum(1, keepdim=True)).log()
    tables -= tables.mean(-1, keepdim=True)
    tables *= counts.sum(-1, keepdim=True) > 0  # a name never met says nothing
    tables[:, 0] = 0.0  # nor does padding
    return tables, part


# model --------------------------------------------------------------------------------------------
class Dropout(nn.Dropout):
    """Dropout from one random byte an element, p to 1/256: torch's takes a third of a step."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64, device=x.device)
        draws = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
        cut = round(256 * self.p)
        return x * ((draws >= cut) * (256 / (256 - cut)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a LayerNorm and added to its input.

    Attention(Q, K, V) = softmax(Q Kᵀ / √head_dim) V (Vaswani et al. 2017, eq. 1), the norms first
    as in Xiong et al. 2020, fig. 1b.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
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
        hidden = self.dropout(ACTIVATION(self.widen(self.feed_forward_norm(x))))
        return x + self.dropout(self.narrow(hidden)), attn_weights


class TransformerClassifier(nn.Module):
    """Word vectors and class evidence -> encoder -> mean over tokens, column by column -> logits.

    Each token's evidence is also added to the logits, a naive Bayes vote of one learned weight.
    The vectors `features` (V, F) are fixed: 2,000 texts are too few to move 13,000 words to better
    places. `evidence` (G, C) is counted in the model's own training texts.
    """

    def __init__(self, features: Tensor, vocabulary: Vocabulary, classes: int, settings: Namespace):
        super().__init__()
        dim = settings.dim
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("evidence", torch.zeros(len(vocabulary.names), classes))
        self.project = nn.Linear(features.shape[1] + classes, dim)
        self.position = nn.Parameter(0.02 * torch.randn(MAX_LENGTH, dim))
        self.column = nn.Parameter(0.1 * torch.randn(vocabulary.columns + 1, dim))  # 0: padding
        layer = partial(EncoderLayer, dim, settings.heads, settings.dropout)
        self.layers = nn.ModuleList(layer() for _ in range(settings.layers))
        self.norm, self.classify = nn.LayerNorm(dim), nn.Linear(dim, classes)
        self.vote_weight = nn.Parameter(torch.zeros(()))
        self.input_dropout, self.output_dropout = Dropout(0.1), Dropout(settings.dropout)

    def forward(self, tokens: Tensor, evidence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, T, 3) -> logits (B, C), and the last layer's attn_weights (B, heads, T, T).

        Training texts bring an `evidence` (B, T, C) that leaves them out.
        """
        word, column, name = tokens.unbind(-1)  # (B, T) each
        evidence = self.evidence[name] if evidence is None else evidence
        x = torch.cat([self.features[word], evidence], -1)  # (B, T, F + C)
        x = self.project(self.input_dropout(x)) + self.column[column] + self.position[: x.shape[1]]
        for layer in self.layers:
            x, attn_weights = layer(x, word != PAD)
        inside = F.one_hot(column, len(self.column))[..., 1:].float()  # (B, T, columns)
        sizes = inside.sum(1)  # (B, columns), 0 where a text lacks one
        means = inside.transpose(1, 2) @ self.norm(x) / sizes.clamp_min(1)[..., None]
        pooled = means.sum(1) / (sizes > 0).sum(1, keepdim=True)  # (B, dim): columns count alike
        vote = self.vote_weight * evidence.sum(1)  # (B, C)
        return self.classify(self.output_dropout(pooled)) + vote, attn_weights


# objective ----------------------------------------------------------------------------------------
def drop_words(tokens: Tensor, p: float) -> Tensor:
    """Turn each token of (B, T, 3) with probability p into <unk> with a name never seen."""
    word, column, name = tokens.unbind(-1)
    dropped = (torch.rand(word.shape, device=word.device) < p) & (word != PAD)
    return torch.stack([word.masked_fill(dropped, UNK), column, name.masked_fill(dropped, 0)], -1)


def r_drop_loss(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The training loss and its cross-entropy, in nats, averaged over the B items.

    logits (2B, C) hold two dropout passes over the same B items, one behind the other; labels (B,).
    R-Drop (Liang et al. 2021, eqs. 1-4) with weight = α/2: the paper adds the two cross-entropies.
    """
    nll = F.cross_entropy(logits, labels.repeat(2))
    first, second = logits.log_softmax(-1).chunk(2)  # (B, C) each
    kl = ((first.exp() - second.exp()) * (first - second)).sum(-1).mean() / 2  # one way and back
    return nll + weight * kl, nll


# train and evaluate -------------------------------------------------------------------------------
def train_member(texts: list, labels: Tensor, state: dict, device, bar: tqdm, save: Callable):
    """Train the run's next model, on from the last epoch that `state` holds, and return it."""
    settings = Namespace(**state["settings"])
    place = (settings.seed, len(state["members"]))  # tells this model's noise from the others'
    seed_all(*place)
    model = build_model(state).to(device).train()
    tables, part = class_evidence(texts, labels, *model.evidence.shape)
    model.evidence.copy_(tables[0])
    optimizer, epochs = OPTIMIZER(model.parameters()), settings.epochs
    if current := state["current"]:
        model.load_state_dict(current["model"])
        optimizer.load_state_dict(current["optimizer"])
    network = DDP(model, broadcast_buffers=False) if WORLD > 1 else model
    size = min(settings.batch_size, len(texts))
    for epoch in range(current.get("epoch", 0), epochs):
        nll_sum, batches = 0.0, length_batches(texts, size, seed_all(*place, epoch))
        for step, batch in enumerate(batches, epoch * len(batches)):
            seed_all(*place, step, RANK)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, epochs * len(batches), settings.lr)
            rows = batch[RANK::WORLD].tolist()  # this process's slice, B texts
            x = pad_sequence([texts[row] for row in rows] * 2, batch_first=True)  # (2B, T, 3)
            x = drop_words(x, settings.word_dropout)
            evidence = tables[part[rows * 2, None], x[..., 2]]  # (2B, T, C)
            logits, _ = network(x.to(device), evidence.to(device))  # (2B, C)
            loss, nll = r_drop_loss(logits, labels[rows].to(device), settings.r_drop)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item() + norm.item()):
                fail(f"no finite loss in epoch {epoch + 1}, step {step + 1}. Lower --lr")
            optimizer.step()
            nll_sum += nll.item()
            bar.update()
        row = {"model": place[1] + 1, "epoch": epoch + 1, "cross_entropy": nll_sum / len(batches)}
        state["history"].append(row)
        weights, moments = model.state_dict(), optimizer.state_dict()
        state["current"] = {"epoch": epoch + 1, "model": weights, "optimizer": moments}
        save()
    return model.eval()


@torch.no_grad()
def predict_probabilities(model: TransformerClassifier, texts: list[Tensor]) -> Tensor:
    """Class probabilities (N, C) of encoded texts."""
    probabilities = torch.zeros(len(texts), model.classify.out_features)
    for rows in torch.tensor([len(text) for text in texts]).argsort().split(128):
        x = pad_sequence([texts[row] for row in rows], batch_first=True).to(model.position.device)
        probabilities[rows] = model(x)[0].softmax(-1).cpu()
    return probabilities


def build_model(state: dict, weights: dict | None = None) -> TransformerClassifier:
    """A network of the shape that a checkpoint tells, with fresh weights or those given."""
    vocabulary, settings = Vocabulary(**state["vocabulary"]), Namespace(**state["settings"])
    model = TransformerClassifier(state["features"], vocabulary, len(state["classes"]), settings)
    model.load_state_dict(weights or model.state_dict())
    return model.eval()


def open_state(args: Namespace, news: News) -> dict:
    """What a checkpoint holds: with --resume that of the run in --out, else an empty one.

    `members` has the finished models' weights and held-out rows; `probabilities` of classes are by
    them, (N + M, C); `current` has epoch, weights and optimizer of the model in training.
    """
    free = ("data", "out", "resume", "device", "predict")  # what --resume may change
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings |= {"vectors": Path(args.vectors).name} | news.hashes
    if args.resume and (args.out / "checkpoint.pt").exists():
        return load_checkpoint(args.out / "checkpoint.pt", VERSION, settings)
    empty = {"members": [], "current": {}, "history": [], "seconds": 0.0}
    empty["probabilities"] = torch.zeros(len(news.texts), len(news.classes))
    return {"version": VERSION, "settings": settings, "classes": news.classes} | empty


def cross_validate(args: Namespace, news: News) -> dict:
    """Train a model on each fold's complement; it classifies the fold and the test rows."""
    device, state, labels = pick_device(args.device), open_state(args, news), news.labels
    if "metrics" in state:
        return state["metrics"]
    began = time.monotonic() - state["seconds"]
    texts, vocabulary, features, coverage = prepare(args, news.texts)
    if state.setdefault("vocabulary", vocabulary._asdict()) != vocabulary._asdict():
        fail(f"{args.out}: trained with other word vectors. Give the same, or no --resume")
    state.setdefault("features", features)
    probabilities, to_classify = state["probabilities"], texts[len(labels) :]

    def save() -> None:
        state["seconds"] = time.monotonic() - began
        if RANK == 0:
            write_file(args.out / "checkpoint.pt", partial(torch.save, state))

    splitter = StratifiedKFold(args.folds, shuffle=True, random_state=args.seed)
    folds = list(splitter.split(labels, labels))
    steps = [len(rows) // min(args.batch_size, len(rows)) for rows, _ in folds]  # an epoch's
    done = sum(np.repeat(steps, args.epochs)[: len(state["history"])])
    total = args.epochs * sum(steps)
    run = open_run(args.out, args, news.hashes) if RANK == 0 else contextlib.nullcontext()
    with run, tqdm(total=total, initial=done, unit="step", mininterval=2, file=sys.stdout) as bar:
        for rows, held_out in folds[len(state["members"]) :]:
            model = train_member([texts[i] for i in rows], labels[rows], state, device, bar, save)
            probabilities[held_out] = predict_probabilities(model, [texts[i] for i in held_out])
            probabilities[len(labels) :] += predict_probabilities(model, to_classify) / len(folds)
            weights = {name: value.cpu() for name, value in model.state_dict().items()}
            state["members"].append({"weights": weights, "rows": held_out.tolist()})
            state["current"] = {}
            save()
            share = (probabilities[held_out].argmax(1) == labels[held_out]).float().mean()
            bar.write(f"model {len(state['members'])}: {share:.1%} of its held-out rows are right")
        right = (probabilities[: len(labels)].argmax(1) == labels).double()
        accuracy = right.mean().item()
        metrics = {
            "oof_accuracy": accuracy,
            "oof_accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(labels)),
            "fold_accuracy": [right[held_out].mean().item() for _, held_out in folds],
            "vector_coverage": coverage,
            "parameters": sum(p.numel() for p in build_model(state).parameters()),
        }
        bar.close()
        if RANK == 0:
            leave_results(args.out, news, texts, state)
        state["metrics"] = metrics | {"seconds": time.monotonic() - began}
        save()
    return state["metrics"]


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
    tokens = [vocabulary.encode(split_text(text, vocabulary.columns)) for text in texts]
    return torch.stack([predict_probabilities(model, tokens) for model in models]).mean(0)


def predict(args: Namespace) -> dict:
    """Print the class of --predict's text, or of each line of the file of that name."""
    if args.predict.endswith(".csv"):
        fail(f"--predict {args.predict}: give one text a line; a csv goes into --data as test.csv")
    if hasattr(signal, "SIGPIPE"):  # let `| head` end the program, without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    models, state = load_finished(args.out)
    lines = [args.predict]
    if os.path.isfile(args.predict) or args.predict.endswith(".txt"):
        with one_line(f"--predict {args.predict}", "Give a text, or a file that can be read"):
            text = Path(args.predict).read_text("utf-8-sig", "replace")
            lines = text.removesuffix("\n").split("\n")
    confidence, predicted = classify(models, state, lines).max(-1)
    labels = [state["classes"][i] for i in predicted]
    for label, share, line in zip(labels, confidence.tolist(), lines, strict=True):
        print(label, f"{share:.3f}", line.replace("\t", " "), sep="\t")
    return {"labels": labels, "confidence": confidence.tolist()}


# figures and tables -------------------------------------------------------------------------------
def leave_results(out: Path, news: News, texts: list, state: dict) -> None:
    """submission.csv, tables and figures in `out`."""
    (key, label), classes, count = news.header, news.classes, len(news.labels)
    confidence, predicted = state["probabilities"].max(1)
    answers = [classes[i] for i in predicted]
    table = {key: news.ids[:count], "true": [classes[i] for i in news.labels]}
    table |= {"predicted": answers[:count], "confidence": confidence[:count]}
    tables = {
        out / "submission.csv": {key: news.ids[count:], label: answers[count:]},
        out / "oof_predictions.csv": table | {"text": news.texts[:count]},
        out / "history.csv": state["history"],
    }
    for path, columns in tables.items():
        to_csv = partial(pd.DataFrame(columns).to_csv, index=False, float_format="%.5g", mode="wb")
        write_file(path, to_csv)
    shown = state["history"], news.labels, predicted[:count], classes
    figures = plot_attentions(news, texts, state) | {"learning-curve": plot_results(*shown)}
    for name, figure in figures.items():
        write_file(out / f"{name}.png", partial(figure.savefig, format="png"))


def plot_results(history: list[dict], labels: Tensor, predicted: Tensor, names: list) -> Figure:
    """Training cross-entropy of each model by epoch; counts of (true, predicted), out of fold."""
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = pd.DataFrame(history).pivot(index="epoch", columns="model", values="cross_entropy")
    curves.plot(ax=left, style=".-", alpha=0.6, ylabel="training cross-entropy (nats)")
    names = [name.replace("$", r"\$") for name in names]  # a dollar is no formula
    style = {"cmap": "Blues", "xticks_rotation": 45, "ax": right}
    ConfusionMatrixDisplay.from_predictions(labels, predicted, display_labels=names, **style)
    right.set_title("rows that the model did not train on")
    return figure


def plot_attention(words: list[str], attn_weights: Tensor, title: str) -> Figure:
    """attn_weights (heads, T, T) of the last layer: their mean over heads as a map."""
    figure, ticks = Figure(figsize=(7, 7), dpi=150, layout="constrained"), range(len(words))
    panel = figure.subplots()
    scale = panel.imshow(attn_weights.mean(0).numpy(), cmap="Blues", vmin=0)
    figure.colorbar(scale, label="attention, mean over heads", shrink=0.6)
    panel.set_title(title, fontsize=9, parse_math=False)
    panel.set_xticks(ticks, words, fontsize=8, rotation=90, parse_math=False)
    panel.set_yticks(ticks, words, fontsize=8, parse_math=False)
    panel.set(xlabel="token looked at ([…]: without a vector)", ylabel="token that looks")
    return figure


def plot_attentions(news: News, texts: list[Tensor], state: dict) -> dict[str, Figure]:
    """Maps of the surest right and wrong answer out of fold to a short text; <unk> in brackets."""
    weights_of = {row: member["weights"] for member in state["members"] for row in member["rows"]}
    (confidence, predicted), classes, figures = state["probabilities"].max(1), news.classes, {}
    for kind in ("right", "wrong"):
        rows = [row for row in weights_of if 12 <= len(texts[row]) <= 40]
        rows = [i for i in rows if (predicted[i] == news.labels[i]) == (kind == "right")]
        for row in sorted(rows, key=lambda row: -confidence[row])[:1]:
            with torch.no_grad():
                _, attn_weights = build_model(state, weights_of[row])(texts[row][None])
            tokens = split_text(news.texts[row], state["vocabulary"]["columns"])
            known = texts[row][:, 0] != UNK
            words = [w if k else f"[{w}]" for (w, *_), k in zip(tokens, known, strict=True)]
            guess = f"predicted {classes[predicted[row]]} ({confidence[row]:.0%})"
            title = f"{news.header[0]} {news.ids[row]}: true {classes[news.labels[row]]}, {guess}"
            figures[f"attention-{kind}"] = plot_attention(words, attn_weights[0], title)
    return figures


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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to 0."""
    warmup = max(1, steps // 10)
    decay = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * decay))


RANGES = dict.fromkeys(("limit", "layers", "heads", "dim", "epochs", "batch_size"), (1, math.inf))
RANGES |= {"seed": (0, 2**32 - 1), "folds": (2, math.inf), "lr": (1e-12, 1e6), "r_drop": (0, 1e6)}
RANGES |= dict.fromkeys(("dropout", "word_dropout"), (0, 0.99))


# fmt: off
def parse_args(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
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
    add = parser.add_argument_group("text (columns without a header: 1, 2, …)").add_argument
    add("--label-column", help=f"the class [one named {', '.join(LABEL_NAMES)}]")
    add("--id-column", help="the row's id [one named id, else the rows are counted]")
    add("--text-columns", nargs="+", help="the texts [all others, in file order]")
    add("--vectors", metavar="PATH|none", help="of words: a GloVe, fastText or word2vec text file; "
        "none: made from the texts [glove*.txt or *.vec in --data, else none]")
    add = parser.add_argument_group("model and training").add_argument
    add("--layers", type=int, default=1, help="of the encoder [%(default)s]")
    add("--heads", type=int, default=4, help="of attention; divides --dim [%(default)s]")
    add("--dim", type=int, default=64, help="width of the encoder [%(default)s]")
    add("--dropout", type=float, default=0.3, help="probability, in the encoder [%(default)s]")
    add("--word-dropout", type=float, default=0.3, help="words read as <unk> [%(default)s]")
    add("--r-drop", type=float, default=1.0, help="weight of the two passes' KL [%(default)s]")
    add("--folds", type=int, default=5, help="each row is held out of one [%(default)s]")
    add("--epochs", type=int, default=15, help="passes over a fold's training rows [%(default)s]")
    add("--batch-size", type=int, default=32, help="texts a step, of all processes [%(default)s]")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW [%(default)s]")
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
        if args.batch_size % WORLD:
            fail(f"--batch-size {args.batch_size}: give a multiple of the {WORLD} processes")
        if WORLD > 1:
            dist.init_process_group("nccl" if pick_device(args.device).type == "cuda" else "gloo")
        with one_line("torchrun", "Add --resume") if WORLD > 1 else contextlib.nullcontext():
            metrics = cross_validate(args, load_news(args))
        print(f"wrote     submission.csv; a copy, figures, tables and the model in {args.out}/")
        print("accuracy  {oof_accuracy:.4f} ± {oof_accuracy_se:.4f}, out of fold".format(**metrics))
        upload = "kaggle competitions submit COMPETITION -f submission.csv -m news"
        print("next     ", "the same without --limit" if args.limit else upload)
        print(f'          or python {sys.argv[0]} --out {args.out} --predict "your text"')
    if RANK == 0:
        write_json(args.out / "metrics.json", metrics)
        with one_line(kept := args.out / "submission.csv", "Train again without --resume"):
            write_file(Path("submission.csv"), lambda file: file.write(kept.read_bytes()))
    if WORLD > 1:
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    main()
