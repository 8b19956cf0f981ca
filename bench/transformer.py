"""What transformer.py is worth: peers on the same folds, and a training step against the PyTorch tutorial's, in turn.

    pip install -r bench/requirements.txt
    python bench/transformer.py accuracy --data DIR --vectors glove.6B.100d.txt
    python bench/transformer.py speed    --data DIR --vectors glove.6B.100d.txt

Each prints a table for the README. Accuracies are out of fold, ± the standard error √(p (1 - p) / n).
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.naive_bayes import ComplementNB, MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer as t  # noqa: E402


class TutorialTransformer(nn.Module):
    """The encoder of PyTorch's tutorial: learned embeddings, sine positions, nn.TransformerEncoder."""

    def __init__(self, words: int, classes: int, max_length: int, dim: int, heads: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(words, dim, padding_idx=t.PAD)
        angle = torch.arange(max_length)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, dim, 2) / dim)
        self.register_buffer("position", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))  # (T, dim)
        self.dropout = nn.Dropout(0.3)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classify = nn.Linear(dim, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) -> logits (B, C)."""
        pad = tokens == t.PAD
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim) + self.position[: tokens.shape[1]]
        x = self.encoder(self.dropout(x), src_key_padding_mask=pad).masked_fill(pad[..., None], 0.0)
        return self.classify(x.sum(1) / (~pad).sum(1, keepdim=True))


def train_tutorial(inputs: t.Inputs, labels: torch.Tensor, rows: list[int], args: argparse.Namespace, layers: int):
    """The tutorial's loop: shuffled batches padded to the longest, Adam, gradient clipping."""
    model = TutorialTransformer(
        len(inputs.words), int(labels.max()) + 1, inputs.max_length, args.dim, args.heads, layers
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    model.train()
    for _ in range(args.epochs):
        for batch in torch.tensor(rows)[torch.randperm(len(rows))].split(args.batch_size):
            x = pad_sequence([inputs.tokens[row][:, 0] for row in batch], batch_first=True, padding_value=t.PAD)
            loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return model.eval()


def fasttext_predictions(texts: list[str], labels: list[int], held_out: list[str]) -> list[int]:
    """fastText's classifier (Joulin et al. 2017), bigrams, one thread so that a run can be repeated."""
    import fasttext

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.txt")
        path.write_text("".join(f"__label__{y} {x}\n" for x, y in zip(texts, labels, strict=True)), encoding="utf-8")
        model = fasttext.train_supervised(str(path), wordNgrams=2, epoch=25, lr=0.5, thread=1, verbose=0)
    return [int(model.predict(text)[0][0].removeprefix("__label__")) for text in held_out]


def out_of_fold(news: t.News, fit_predict, seed: int = 0) -> float:
    """Accuracy of `fit_predict(train rows, held-out rows) -> classes` over the folds that transformer.py uses."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed).split(news.texts, news.labels)
    hits = [np.asarray(fit_predict(train, held_out)) == news.labels[held_out].numpy() for train, held_out in folds]
    return float(np.concatenate(hits).mean())


def run_transformer(words: list[str]) -> dict:
    """The metrics of a whole run of transformer.py, in a folder of its own and without its log."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        return t.main(words)


def accuracy(args: argparse.Namespace, news: t.News, inputs: t.Inputs) -> None:
    """One line a model; `no vectors` means no text but the competition's own."""

    def report(name: str, share: float) -> None:
        print(f"| {name} | {share:.4f} ± {t.standard_error(share, len(news.texts)):.4f} |", flush=True)

    texts, labels = np.array(news.texts), news.labels.numpy()
    lower = np.array([" ".join(t.make_tokenizer("basic_english")(text)) for text in news.texts])

    marked = np.array([" ".join(map(str, t.token_grams(text, inputs.roots)[:, 2].tolist())) for text in inputs.tokens])
    binary = CountVectorizer(binary=True, token_pattern=r"\d+")

    def linear(classifier, texts=texts, weigh=None):
        model = make_pipeline(weigh or TfidfVectorizer(sublinear_tf=True), classifier)
        return lambda train, held_out: model.fit(texts[train], labels[train]).predict(texts[held_out])

    def tutorial(layers: int):
        def fit_predict(train, held_out):
            t.seed_all(args.seed)
            model = train_tutorial(inputs, news.labels, train.tolist(), args, layers)
            with torch.no_grad():
                x = pad_sequence([inputs.tokens[row][:, 0] for row in held_out], batch_first=True, padding_value=t.PAD)
                return model(x).argmax(-1).numpy()

        return fit_predict

    peers = {
        "TF-IDF + LogisticRegression": linear(LogisticRegression(max_iter=2000)),
        "TF-IDF + LinearSVC": linear(LinearSVC()),
        "TF-IDF + ComplementNB": linear(ComplementNB()),
        "MultinomialNB on stems, a title's apart": linear(MultinomialNB(alpha=0.5), marked, binary),
        "fastText, bigrams": lambda train, held_out: fasttext_predictions(lower[train], labels[train], lower[held_out]),
        "the PyTorch tutorial's Transformer, two layers": tutorial(2),
        "the same, one layer": tutorial(1),
    }
    print("| model | out-of-fold accuracy |\n| --- | --- |")
    for name, fit_predict in peers.items():
        report(name, out_of_fold(news, fit_predict))

    common = ["--data", str(args.data), "--device", "cpu"]
    ours = {
        "transformer.py, no vectors": ["--vectors", "none"],
        "transformer.py, GloVe": ["--vectors", args.vectors],
        "transformer.py, GloVe, --r-drop 0": ["--vectors", args.vectors, "--r-drop", "0"],
        "transformer.py, GloVe, --layers 2": ["--vectors", args.vectors, "--layers", "2"],
        "transformer.py, GloVe, --seeds 5": ["--vectors", args.vectors, "--seeds", "5"],
        **{f"transformer.py, GloVe, --seed {n}": ["--vectors", args.vectors, "--seed", str(n)] for n in (1, 2, 3, 4)},
        **{f"transformer.py, no vectors, --seed {n}": ["--vectors", "none", "--seed", str(n)] for n in (1, 2, 3, 4)},
    }
    for name, words in ours.items():
        report(name, run_transformer([*common, *words])["oof_accuracy"])
    clean_text, t.clean_text = t.clean_text, lambda text: " ".join(text.split())
    raw = run_transformer([*common, *ours["transformer.py, GloVe"]])
    report("transformer.py, GloVe, text as it came", raw["oof_accuracy"])
    t.clean_text = clean_text


def speed(args: argparse.Namespace, news: t.News, inputs: t.Inputs) -> None:
    """Passes a second of one epoch's steps, tutorial and ours in turn; the ratio of the medians."""
    rows, seconds = list(range(len(news.texts))), {}

    def ours(r_drop: float) -> None:
        own = argparse.Namespace(**vars(args) | {"epochs": 1, "r_drop": r_drop})
        model = t.build_model(inputs._asdict() | {"classes": news.classes, "settings": vars(args)})
        with t.tqdm(disable=True) as bar:
            t.train_member(model, inputs, news.labels, rows, own, (0,), None, lambda state: None, bar)

    once = argparse.Namespace(**vars(args) | {"epochs": 1})
    sides = {
        "tutorial": lambda: train_tutorial(inputs, news.labels, rows, once, args.layers),
        "transformer.py --r-drop 0, one pass a text": lambda: ours(0.0),
        "transformer.py, two passes a text": lambda: ours(1.0),
    }
    for _ in range(args.rounds):
        for name, side in sides.items():
            begin = time.monotonic()
            side()
            seconds.setdefault(name, []).append(time.monotonic() - begin)
    print(f"{torch.get_num_threads()} threads, dim {args.dim}, {args.layers} layer, batch {args.batch_size}, "
          f"{len(rows)} texts an epoch, {args.rounds} rounds in turn")  # fmt: skip
    print("| training | passes a second (median; range) | ratio |\n| --- | --- | --- |")
    for name, measured in seconds.items():
        passes = len(rows) * (2 if "two" in name else 1)
        low, middle, high = (passes / f(measured) for f in (max, statistics.median, min))
        ratio = middle * statistics.median(seconds["tutorial"]) / len(rows)
        print(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train.csv and test.csv")
    parser.add_argument("--vectors", required=True, metavar="PATH", help="GloVe, fastText or word2vec text file")
    parser.add_argument("--rounds", type=int, default=9, help="of the speed comparison (default: 9)")
    own = parser.parse_args()
    args = t.parse_args(["--data", str(own.data.resolve()), "--vectors", str(Path(own.vectors).resolve())])
    args.rounds = own.rounds
    news = t.load_news(args)
    inputs = t.prepare(args, news)
    {"accuracy": accuracy, "speed": speed}[own.what](args, news, inputs)


if __name__ == "__main__":
    main()
