"""What transformer.py is worth: peers on the same texts, and its speed beside the tutorial's loop.

    pip install -r bench/requirements.txt
    python bench/transformer.py accuracy --data DIR --vectors DIR/glove.6B.100d.txt --unseen FILE
    python bench/transformer.py speed    --data DIR --vectors DIR/glove.6B.100d.txt

Each prints a table. An accuracy is out of fold on train.csv and, with --unseen, also on a csv file
of the same columns by which nothing was chosen; ± is the standard error √(p (1 - p) / n). On the
unseen texts the peers learn from all of train.csv, and transformer.py takes the mean of its folds'
models, as for test.csv.
"""

import argparse
import contextlib
import io
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.naive_bayes import ComplementNB, MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer as t

# A peer learns from these rows of all texts and classifies those: (train, held_out) -> classes.
Peer = Callable[[np.ndarray, np.ndarray], np.ndarray]


# Peers --------------------------------------------------------------------------------------------
class TutorialTransformer(nn.Module):
    """PyTorch's tutorial: learned embeddings, sine positions, nn.TransformerEncoder."""

    def __init__(self, words: int, classes: int, longest: int, config: t.Config):
        super().__init__()
        d_model = config.d_model
        self.embedding = nn.Embedding(words, d_model, padding_idx=t.PAD)
        rates = torch.exp(-math.log(1e4) * torch.arange(0, d_model, 2) / d_model)
        angles = torch.arange(longest)[:, None] * rates
        position = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (T, d_model)
        self.register_buffer("position", position)
        self.dropout = nn.Dropout(0.3)
        layer = nn.TransformerEncoderLayer(
            d_model, config.nhead, config.d_hid, dropout=0.3, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.nlayers, enable_nested_tensor=False)
        self.classify = nn.Linear(d_model, classes)

    def forward(self, words: Tensor) -> Tensor:
        """words (B, T) -> logits (B, C)."""
        is_padding = words == t.PAD
        x = self.embedding(words) * math.sqrt(self.embedding.embedding_dim)
        x = self.dropout(x + self.position[: words.shape[1]])
        x = self.encoder(x, src_key_padding_mask=is_padding)
        x = x.masked_fill(is_padding[..., None], 0.0)
        mean = x.sum(1) / (~is_padding).sum(1, keepdim=True)  # (B, d_model)
        return self.classify(mean)


def train_tutorial(
    model: TutorialTransformer, texts: list[Tensor], labels: Tensor, config: t.Config
) -> None:
    """The tutorial's loop: shuffled batches padded to the longest, Adam, gradient clipping."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    model.train()
    for _ in range(config.epochs):
        for batch in torch.randperm(len(texts)).split(config.batch_size):
            words = pad_sequence([texts[row][:, 0] for row in batch], batch_first=True)
            loss = F.cross_entropy(model(words), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()


def tutorial_peer(
    texts: list[Tensor], labels: np.ndarray, vocabulary: t.Vocabulary, config: t.Config
) -> Peer:
    longest = max(len(text) for text in texts)

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        torch.manual_seed(t.seed_of(config.seed))
        model = TutorialTransformer(len(vocabulary.words), labels.max() + 1, longest, config)
        known = torch.from_numpy(labels[train])
        train_tutorial(model, [texts[row] for row in train], known, config)

        model.eval()
        logits = []
        with torch.no_grad():
            for start in range(0, len(held_out), 250):
                rows = held_out[start : start + 250]
                words = pad_sequence([texts[row][:, 0] for row in rows], batch_first=True)
                logits.append(model(words))
        return torch.cat(logits).argmax(-1).numpy()

    return fit_predict


def linear_peer(texts: np.ndarray, labels: np.ndarray, classifier, vectorizer=None) -> Peer:
    if vectorizer is None:
        vectorizer = TfidfVectorizer(sublinear_tf=True)
    model = make_pipeline(vectorizer, classifier)

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        model.fit(texts[train], labels[train])
        return model.predict(texts[held_out])

    return fit_predict


def fasttext_peer(texts: np.ndarray, labels: np.ndarray) -> Peer:
    """fastText (Joulin et al. 2017), bigrams, one thread so that a run can be repeated."""

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        import fasttext

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "train.txt")
            lines = [f"__label__{labels[row]} {texts[row]}\n" for row in train]
            path.write_text("".join(lines), encoding="utf-8")
            model = fasttext.train_supervised(
                str(path), wordNgrams=2, epoch=25, lr=0.5, thread=1, verbose=0
            )

        predicted = []
        for row in held_out:
            names, _ = model.predict(texts[row])
            predicted.append(int(names[0].removeprefix("__label__")))
        return np.array(predicted)

    return fit_predict


def make_peers(news: t.News, inputs: t.Inputs, config: t.Config) -> dict[str, Peer]:
    """All peers by name. Their rows are those of train.csv, then those of the unseen texts."""
    texts = news.train.texts + news.test.texts
    tokenize = t.make_tokenizer("basic_english")
    plain = np.array([" ".join(text) for text in texts])
    lower = np.array([" ".join(tokenize(text)) for text in plain])
    keys = [[token.key for token in t.split_text(text, tokenize)] for text in texts]
    keys = np.array(keys, dtype=object)  # a title's stems apart from a description's

    labels = news.labels.numpy()
    count_keys = CountVectorizer(binary=True, analyzer=list)
    encoded = inputs.train + inputs.test
    return {
        "TF-IDF + LogisticRegression": linear_peer(
            plain, labels, LogisticRegression(max_iter=2000)
        ),
        "TF-IDF + LinearSVC": linear_peer(plain, labels, LinearSVC()),
        "TF-IDF + ComplementNB": linear_peer(plain, labels, ComplementNB()),
        "MultinomialNB on stems, a title's apart from a description's": linear_peer(
            keys, labels, MultinomialNB(alpha=0.5), count_keys
        ),
        "fastText, bigrams": fasttext_peer(lower, labels),
        "the PyTorch tutorial's Transformer, two layers": tutorial_peer(
            encoded, labels, inputs.vocabulary, replace(config, nlayers=2)
        ),
        "the same, one layer": tutorial_peer(
            encoded, labels, inputs.vocabulary, replace(config, nlayers=1)
        ),
    }


# Accuracy -----------------------------------------------------------------------------------------
def read_unseen(path: Path | None, like: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """The texts of a csv with the columns of `like`, without their labels, and the labels."""
    table = pd.read_csv(path or like, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    label = next(name for name in table.columns if name.lower() in t.LABEL_NAMES)
    return table.drop(columns=label), table[label].to_numpy()


def run_transformer(words: list[str], unseen: np.ndarray) -> list[float]:
    """Out-of-fold and unseen accuracy of a whole run, in a folder of its own, without its log."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        metrics = t.main(words)
        predicted = pd.read_csv("submission.csv", dtype=str).iloc[:, 1].to_numpy()
    return [metrics["oof_accuracy"], float((predicted == unseen).mean())]


def print_row(name: str, shares: list[float], counts: list[int]) -> None:
    """Print a row of the table: each share with its standard error."""
    cells = []
    for share, count in zip(shares, counts, strict=True):
        error = math.sqrt(share * (1 - share) / count)
        cells.append(f"{share:.4f} ± {error:.4f}".replace("0.", "."))
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def accuracy(
    own: argparse.Namespace, config: t.Config, news: t.News, inputs: t.Inputs, unseen: np.ndarray
) -> None:
    """Print a line for each model; `--vectors none` uses no text but the competition's own."""
    columns = 2 if own.unseen else 1  # without unseen texts only the first column has a meaning
    counts = [len(news.train.ids), len(news.test.ids)][:columns]
    headings = ["model", "out of fold", "unseen"][: 1 + columns]
    print(f"| {' | '.join(headings)} |")
    print(f"| {' | '.join(['---'] * len(headings))} |")

    labels = news.labels.numpy()
    true = [news.classes.index(name) if name in news.classes else -1 for name in unseen]
    splitter = StratifiedKFold(config.folds, shuffle=True, random_state=config.seed)
    known = np.arange(len(labels))
    new = len(labels) + np.arange(len(true))
    for name, fit_predict in make_peers(news, inputs, config).items():
        hits = []
        for train, held_out in splitter.split(labels, labels):
            hits.append(fit_predict(train, held_out) == labels[held_out])
        unseen_hits = fit_predict(known, new) == np.array(true)
        shares = [float(np.concatenate(hits).mean()), float(unseen_hits.mean())]
        print_row(name, shares[:columns], counts)

    common = ["--data", str(config.data), "--device", "cpu"]
    for vectors in ("none", config.vectors):
        for seed in range(own.runs):
            words = [*common, "--vectors", vectors, "--seed", str(seed)]
            of_seed = f" --seed {seed}" if own.runs > 1 else ""
            name = f"`python transformer.py --vectors {Path(vectors).name}{of_seed}`"
            print_row(name, run_transformer(words, unseen)[:columns], counts)
    if own.more:
        for flags in (["--r-drop", "0"], ["--nlayers", "2"]):
            shares = run_transformer([*common, "--vectors", config.vectors, *flags], unseen)
            name = f"`python transformer.py {' '.join(flags)}`, GloVe"
            print_row(name, shares[:columns], counts)


# Speed --------------------------------------------------------------------------------------------
def speed(rounds: int, config: t.Config, news: t.News, inputs: t.Inputs) -> None:
    """Print the passes per second of one epoch, each side in turn, and the ratio of medians."""
    count = len(inputs.train)
    classes = len(news.classes)
    longest = max(len(text) for text in inputs.train)
    once = replace(config, epochs=1)

    def tutorial() -> None:
        model = TutorialTransformer(len(inputs.vocabulary.words), classes, longest, once)
        train_tutorial(model, inputs.train, news.labels, once)

    def ours() -> None:
        model = t.TransformerClassifier(once, inputs.vocabulary, classes)
        t.train(model, inputs.train, news.labels, once, 0, tqdm(disable=True))

    sides = {"tutorial": (tutorial, 1), "transformer.py, two passes a text": (ours, 2)}
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (side, _) in sides.items():
            started = time.monotonic()
            side()
            seconds[name].append(time.monotonic() - started)

    print(f"{torch.get_num_threads()} threads, d_model {config.d_model}, {config.nlayers} layer")
    print(f"batch {config.batch_size}, {count} texts an epoch, {rounds} rounds in turn")
    print("| training | passes a second (median; range) | ratio |\n| --- | --- | --- |")
    baseline = count / statistics.median(seconds["tutorial"])
    for name, (_, passes) in sides.items():
        rates = [passes * count / measured for measured in seconds[name]]
        middle = passes * count / statistics.median(seconds[name])
        ratio = middle / baseline
        print(f"| {name} | {middle:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=("accuracy", "speed"))
    add("--data", type=Path, required=True, metavar="DIR", help="folder of train.csv, test.csv")
    add("--vectors", required=True, metavar="PATH", help="GloVe, fastText or word2vec text file")
    add("--unseen", type=Path, metavar="FILE", help="a csv like train.csv, scored once")
    add("--runs", type=int, default=1, help="seeds of transformer.py (default: 1)")
    add("--more", action="store_true", help="runs of transformer.py with other flags, too")
    add("--rounds", type=int, default=9, help="of the speed comparison (default: 9)")
    own = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:  # the unseen texts stand in for test.csv
        folder = Path(name)
        texts, unseen = read_unseen(own.unseen, own.data / "train.csv")
        shutil.copy(own.data / "train.csv", folder)
        texts.to_csv(folder / "test.csv", index=False)

        vectors = Path(own.vectors).absolute()
        config = t.parse_args(["--data", name, "--vectors", str(vectors)])
        news = t.load_news(folder, config)
        inputs = t.encode_news(news, config, vectors)
        if own.what == "speed":
            speed(own.rounds, config, news, inputs)
        else:
            accuracy(own, config, news, inputs, unseen)


if __name__ == "__main__":
    main()
