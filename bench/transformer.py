"""What transformer.py is worth: peers on the same texts, and its speed beside the tutorial's loop.

    pip install -r bench/requirements.txt
    python bench/transformer.py accuracy --data DIR --vectors DIR/glove.6B.100d.txt --unseen FILE
    python bench/transformer.py speed    --data DIR --vectors DIR/glove.6B.100d.txt

Each prints a table. An accuracy is out of fold on train.csv and, with --unseen, on a csv of like
columns that nobody chose by; ± is the standard error √(p (1 - p) / n). There the peers learn from
all of train.csv, and transformer.py classifies as it does test.csv: the mean of its folds' models.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer as t


class TutorialTransformer(nn.Module):
    """PyTorch's tutorial: learned embeddings, sine positions, nn.TransformerEncoder."""

    def __init__(
        self, words: int, classes: int, max_length: int, dim: int, heads: int, layers: int
    ):
        super().__init__()
        self.embedding = nn.Embedding(words, dim, padding_idx=t.PAD)
        angle = torch.arange(max_length)[:, None] * torch.exp(
            -math.log(1e4) * torch.arange(0, dim, 2) / dim
        )
        self.register_buffer(
            "position", torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        )  # (T, dim)
        self.dropout = nn.Dropout(0.3)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classify = nn.Linear(dim, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) -> logits (B, C)."""
        pad = tokens == t.PAD
        x = (
            self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
            + self.position[: tokens.shape[1]]
        )
        x = self.encoder(self.dropout(x), src_key_padding_mask=pad).masked_fill(pad[..., None], 0.0)
        return self.classify(x.sum(1) / (~pad).sum(1, keepdim=True))


def train_tutorial(
    inputs: tuple, labels: torch.Tensor, rows: list[int], args: argparse.Namespace, layers: int
):
    """The tutorial's loop: shuffled batches padded to the longest, Adam, gradient clipping."""
    (texts, vocabulary, *_), classes = inputs, int(labels.max()) + 1
    longest, words = max(map(len, texts)), len(vocabulary.words)
    model = TutorialTransformer(words, classes, longest, args.dim, args.heads, layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    model.train()
    for _ in range(args.epochs):
        for batch in torch.tensor(rows)[torch.randperm(len(rows))].split(args.batch_size):
            x = t.pad_sequence([texts[row][:, 0] for row in batch], batch_first=True)
            loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return model.eval()


def fasttext_predictions(texts: list[str], labels: list[int], held_out: list[str]) -> list[int]:
    """fastText (Joulin et al. 2017), bigrams, one thread so that a run can be repeated."""
    import fasttext

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.txt")
        path.write_text(
            "".join(f"__label__{y} {x}\n" for x, y in zip(texts, labels, strict=True)),
            encoding="utf-8",
        )
        model = fasttext.train_supervised(
            str(path), wordNgrams=2, epoch=25, lr=0.5, thread=1, verbose=0
        )
    return [int(model.predict(text)[0][0].removeprefix("__label__")) for text in held_out]


def read_unseen(path: Path | None, like: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """The texts of a csv with the columns of `like`, without their labels, and the labels."""
    table = pd.read_csv(path or like, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    label = next(name for name in table.columns if name.lower() in t.LABEL_NAMES)
    return table.drop(columns=label), table[label].to_numpy()


def run_transformer(words: list[str], unseen: np.ndarray) -> tuple[float, float]:
    """Out-of-fold and unseen accuracy of a whole run, in a folder of its own, without its log."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        metrics = t.main(words)
        predicted = pd.read_csv("submission.csv", dtype=str).iloc[:, 1].to_numpy()
    return metrics["oof_accuracy"], float((predicted == unseen).mean())


def accuracy(args: argparse.Namespace, news: t.News, inputs: tuple, unseen: np.ndarray) -> None:
    """One line a model; with `--vectors none` no text but the competition's own is used."""
    count, labels = len(news.labels), news.labels.numpy()
    lower = np.array([" ".join(t.TOKENIZE(text)) for text in news.texts])
    texts = np.array([text.replace("\t", " ") for text in news.texts])
    columns = 1 + max(text.count("\t") for text in news.texts)
    stems = [[name for *_, name in t.split_text(text, columns)] for text in news.texts]
    marked = np.array(stems, dtype=object)  # a title's stems apart from a description's
    test = np.arange(count, len(news.texts))

    def report(name: str, *shares: float) -> None:
        counts = (count, len(test))[: 2 if args.unseen else 1]
        cells = [
            f"{p:.4f} ± {math.sqrt(p * (1 - p) / n):.4f}".replace("0.", ".")
            for p, n in zip(shares, counts, strict=False)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def linear(classifier, texts=texts, weigh=None):
        model = make_pipeline(weigh or TfidfVectorizer(sublinear_tf=True), classifier)
        return lambda train, held_out: model.fit(texts[train], labels[train]).predict(
            texts[held_out]
        )

    def tutorial(layers: int):
        def fit_predict(train, held_out):
            t.seed_all(args.seed)
            model = train_tutorial(inputs, news.labels, train.tolist(), args, layers)
            parts = [held_out[i : i + 250] for i in range(0, len(held_out), 250)]
            with torch.no_grad():
                words = [[inputs[0][row][:, 0] for row in part] for part in parts]
                logits = [model(t.pad_sequence(part, batch_first=True)) for part in words]
            return torch.cat(logits).argmax(-1).numpy()

        return fit_predict

    names = CountVectorizer(binary=True, analyzer=list)
    peers = {
        "TF-IDF + LogisticRegression": linear(LogisticRegression(max_iter=2000)),
        "TF-IDF + LinearSVC": linear(LinearSVC()),
        "TF-IDF + ComplementNB": linear(ComplementNB()),
        "MultinomialNB on stems, a title's apart from a description's": linear(
            MultinomialNB(alpha=0.5), marked, names
        ),
        "fastText, bigrams": lambda train, held_out: fasttext_predictions(
            lower[train], labels[train], lower[held_out]
        ),
        "the PyTorch tutorial's Transformer, two layers": tutorial(2),
        "the same, one layer": tutorial(1),
    }
    folds = list(
        StratifiedKFold(args.folds, shuffle=True, random_state=args.seed).split(labels, labels)
    )
    right = np.array([news.classes.index(name) if name in news.classes else -1 for name in unseen])
    print("| model | out of fold | unseen |" if args.unseen else "| model | out of fold |")
    print("| --- | --- | --- |" if args.unseen else "| --- | --- |")
    for name, fit_predict in peers.items():
        hits = [
            np.asarray(fit_predict(train, held_out)) == labels[held_out]
            for train, held_out in folds
        ]
        unseen_hits = np.asarray(fit_predict(np.arange(count), test)) == right
        report(name, float(np.concatenate(hits).mean()), float(unseen_hits.mean()))

    common = ["--data", str(args.data), "--device", "cpu"]
    for vectors in ("none", args.vectors):
        for seed in range(args.runs):
            words = [*common, "--vectors", vectors, "--seed", str(seed)]
            of_seed = f" --seed {seed}" if args.runs > 1 else ""
            name = f"`python transformer.py --vectors {Path(vectors).name}{of_seed}`"
            report(name, *run_transformer(words, unseen))
    for flags in (["--r-drop", "0"], ["--layers", "2"]) if args.more else ():
        shares = run_transformer([*common, "--vectors", args.vectors, *flags], unseen)
        report(f"`python transformer.py {' '.join(flags)}`, GloVe", *shares)


def speed(args: argparse.Namespace, news: t.News, inputs: tuple, unseen: np.ndarray) -> None:
    """Passes a second of one epoch, each side in turn, the ratio of the medians."""
    count, seconds = len(news.labels), {}
    rows = list(range(count))

    def ours() -> None:
        texts, vocabulary, features, _ = inputs
        state = {"members": [], "current": {}, "history": [], "classes": news.classes}
        state |= {"settings": vars(args) | {"epochs": 1}, "features": features}
        state["vocabulary"] = vocabulary._asdict()
        bar, device = t.tqdm(disable=True), torch.device("cpu")
        t.train_member(texts[:count], news.labels, state, device, bar, lambda: None)

    once = argparse.Namespace(**vars(args) | {"epochs": 1})
    sides = {
        "tutorial": lambda: train_tutorial(inputs, news.labels, rows, once, args.layers),
        "transformer.py, two passes a text": ours,
    }
    for _ in range(args.rounds):
        for name, side in sides.items():
            begin = time.monotonic()
            side()
            seconds.setdefault(name, []).append(time.monotonic() - begin)
    print(f"{torch.get_num_threads()} threads, dim {args.dim}, {args.layers} layer")
    print(f"batch {args.batch_size}, {count} texts an epoch, {args.rounds} rounds in turn")
    print("| training | passes a second (median; range) | ratio |\n| --- | --- | --- |")
    for name, measured in seconds.items():
        passes = count * (2 if "two" in name else 1)
        low, middle, high = (passes / f(measured) for f in (max, statistics.median, min))
        ratio = middle * statistics.median(seconds["tutorial"]) / count
        print(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=("accuracy", "speed"))
    add(
        "--data", type=Path, required=True, metavar="DIR", help="folder with train.csv and test.csv"
    )
    add("--vectors", required=True, metavar="PATH", help="GloVe, fastText or word2vec text file")
    add("--unseen", type=Path, metavar="FILE", help="a csv like train.csv, scored once")
    add("--runs", type=int, default=1, help="seeds of transformer.py (default: 1)")
    add("--more", action="store_true", help="runs of transformer.py with other flags, too")
    add("--rounds", type=int, default=9, help="of the speed comparison (default: 9)")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # the unseen texts stand in for test.csv
        texts, unseen = read_unseen(own.unseen, own.data / "train.csv")
        shutil.copy(own.data / "train.csv", folder)
        texts.to_csv(Path(folder, "test.csv"), index=False)
        args = t.parse_args(["--data", folder, "--vectors", str(Path(own.vectors).absolute())])
        args = argparse.Namespace(
            **vars(args) | vars(own) | {"data": Path(folder), "vectors": args.vectors}
        )
        news = t.load_news(args)
        inputs = t.prepare(args, news.texts)
        {"accuracy": accuracy, "speed": speed}[own.what](args, news, inputs, unseen)


if __name__ == "__main__":
    main()
