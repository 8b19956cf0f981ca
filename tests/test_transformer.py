"""transformer.py: its mathematics against independent references, its runs, and every bad input's line."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import transformer as t  # noqa: E402

SAMPLE = ROOT / "data" / "sample"
SMALL = ["--epochs", "1", "--folds", "2", "--dim", "16", "--heads", "2", "--limit", "60", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in, with a copy of the sample in data/."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLE, "data")
    return tmp_path


def run(*words):
    return t.main(["--data", "data", *SMALL, *words])


def rows_of(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def small_model(layers=1, words=50):
    torch.manual_seed(0)
    model = t.TransformerClassifier(torch.randn(words, 8), torch.arange(words), 6 * words, 3, 2, 20, 16, 2, layers, 0.3)
    model.evidence.normal_()
    return model.eval()


def random_tokens(count, length, words=50):
    """(count, length, 3): words, the first 3 of column 1 and the others of column 2, in any shape."""
    column = 1 + (torch.arange(length) > 2).repeat(count, 1)
    return torch.stack([torch.randint(2, words, (count, length)), column, torch.randint(3, (count, length))], -1)


# mathematics ---------------------------------------------------------------------------------------------------------


def test_encoder_layer_equals_torch():
    ours, theirs = (
        t.EncoderLayer(16, 4, 0.0),
        nn.TransformerEncoderLayer(16, 4, 32, 0.0, F.gelu, batch_first=True, norm_first=True),
    )
    names = {
        "self_attn.in_proj": ours.query_key_value,
        "self_attn.out_proj": ours.merge,
        "linear1": ours.widen,
        "linear2": ours.narrow,
        "norm1": ours.attention_norm,
        "norm2": ours.feed_forward_norm,
    }
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            key = name.replace("in_proj_", "in_proj.")
            parameter.copy_(getattr(names[key.rpartition(".")[0]], key.rpartition(".")[2]))
    x, keep = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([[7], [4], [1]])
    torch.testing.assert_close(ours(x, keep)[0][keep], theirs(x, src_key_padding_mask=~keep)[keep])


@pytest.mark.parametrize("layers", [1, 2])
def test_attention_weights_path_equals_fused_path(layers):
    model, tokens = small_model(layers), random_tokens(4, 9)
    tokens[0, 5:] = t.PAD
    logits, attn = model(tokens, return_attn=True)
    torch.testing.assert_close(logits, model(tokens))
    torch.testing.assert_close(attn.sum(-1), torch.ones(4, 2, 9))
    assert attn.shape == (4, 2, 9, 9) and (attn[0, :, :, 5:] == 0).all()


def test_padding_has_no_effect():
    model, tokens = small_model(2), random_tokens(1, 6)
    padded = F.pad(tokens, (0, 0, 0, 7), value=t.PAD)
    torch.testing.assert_close(model(padded), model(tokens))


def test_columns_are_told_apart_and_count_alike():
    model, tokens = small_model(), random_tokens(1, 8)
    word, column, shape = tokens.unbind(-1)
    for _ in range(2):  # by the evidence, and without any by the marks' own vectors
        for other in (torch.stack([word, 3 - column, shape], -1), torch.stack([word, column, (1 + shape) % 3], -1)):
            assert not torch.allclose(model(tokens), model(other))
        model.evidence.zero_()

    seen, pooled = [], []
    model.norm.register_forward_hook(lambda module, x, y: seen.append(y))
    model.classify.register_forward_hook(lambda module, x, y: pooled.append(x[0]))
    model(tokens)
    weights = torch.autograd.grad(pooled[0].sum(), seen[0])[0][0, :, 0]  # (T,), of each token in the pooled vector
    torch.testing.assert_close(weights, torch.tensor([1 / 3] * 3 + [1 / 5] * 5) / 2)


def test_unknown_words_and_padding_bring_no_evidence():
    model, tokens = small_model(), F.pad(random_tokens(4, 9), (0, 0, 0, 3))
    evidence = model.evidence[t.token_grams(tokens, model.roots)]
    torch.testing.assert_close(model(tokens, evidence), model(tokens))
    tokens[:, 4, 0] = t.UNK
    other = evidence.clone()
    other[:, 4] = other[:, 9:] = 5.0
    assert torch.equal(model(tokens, evidence), model(tokens, other))


def test_drop_words_keeps_marks_and_padding():
    tokens = F.pad(random_tokens(200, 9), (0, 0, 0, 3))
    dropped = t.drop_words(tokens, 0.3)
    changed = dropped[..., 0] != tokens[..., 0]
    assert torch.equal(dropped[..., 1:], tokens[..., 1:]) and (dropped[changed][:, 0] == t.UNK).all()
    assert not changed[:, 9:].any() and abs(changed[:, :9].float().mean() - 0.3) < 0.05


def test_split_text_tells_column_and_shape():
    tokens = t.split_text("Oil and US\toil\tus 3 OIL", 2, t.make_tokenizer("whitespace"))  # as written there first
    title, rest = (
        [("oil", 1, 1), ("and", 1, 0), ("us", 1, 2)],
        [("oil", 2, 0), ("us", 2, 0), ("3", 2, 0), ("oil", 2, 0)],
    )
    assert tokens == title + rest
    assert t.split_text("a b", 2, str.split) == [("a", 1, 0), ("b", 1, 0)] and t.split_text("\t", 2, str.split) == []
    assert t.split_text("北京 Ñandú", 2, str.split) == [("北京", 1, 0), ("Ñandú", 1, 0)]  # letters without capitals
    encoded = t.encode([[t.Token("b", 1, 2), t.Token("x", 2, 0), t.Token("a", 2, 0)], []], {"a": 2, "b": 3}, 2)
    assert [text.tolist() for text in encoded] == [[[3, 1, 2], [t.UNK, 2, 0]], [[t.UNK, 1, 0]]]


def test_r_drop_loss_equals_reference():
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 4), torch.randint(4, (5,))
    loss, nll = t.r_drop_loss(logits, labels, 0.1, 0.7)
    p, q = (torch.distributions.Categorical(logits=half) for half in logits.chunk(2))
    kl = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    smooth = F.one_hot(labels, 4) * 0.9 + 0.1 / 4
    expected = -(smooth * (p.logits + q.logits)).sum() / 2
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(loss, expected + 0.7 * kl.sum() / 2)


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    drop = t.Dropout(0.3).train()
    y = drop(torch.ones(1_000_003))
    assert abs((y == 0).float().mean() - 0.3) < 0.003 and abs(y.mean() - 1) < 0.005
    assert torch.equal(drop.eval()(y), y)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [t.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[9] == 2.0 == max(rates) and rates[0] == 0.2 and abs(rates[100]) < 1e-12
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_cooccurrence_vectors_equal_numpy_svd():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]
    texts = [[words[i] for i in rng.integers(0, 12, 8)] for _ in range(30)]
    number = {word: i + 2 for i, word in enumerate(words)}
    vectors = t.cooccurrence_vectors(texts, number, 5)
    counts = np.array([[text.count(word) for word in words] for text in texts])
    tf = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
    weights = tf * (np.log(31 / (1 + (counts > 0).sum(0))) + 1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    _, s, vt = np.linalg.svd(weights)
    expected = vt[:5].T * s[:5]
    expected *= math.sqrt(5) / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[2:] @ vectors[2:].T, expected @ expected.T, atol=1e-4)
    assert not vectors[:2].any()


def test_one_pass_is_plain_cross_entropy():
    logits, labels = torch.randn(5, 4), torch.randint(4, (5,))
    loss, nll = t.r_drop_loss(logits, labels, 0.1, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum"))
    assert loss is nll


def test_find_grams_names_stems_and_neighbours():
    roots = torch.tensor([0, 1, 2, 3, 3])  # words 3 and 4 share a stem
    pairs = torch.tensor([2 * 5 + 3, 3 * 5 + 2])
    text = torch.tensor([[2, 1, 0], [4, 1, 2], [3, 2, 0], [2, 2, 0]])
    assert t.token_grams(text, roots).tolist() == [[2, 7, 22], [3, 18, 23], [3, 8, 28], [2, 7, 27]]
    assert t.find_grams(text, roots, pairs, 2).tolist() == [2, 3, 7, 8, 18, 22, 23, 27, 28, 30, 31]
    assert t.find_grams(text[1:2], roots, pairs, 2).tolist() == [3, 18, 23]
    assert t.find_grams(text[:2], roots, pairs[:0], 2).tolist() == [2, 3, 7, 18, 22, 23]  # no text has a pair
    assert t.find_grams(torch.tensor([[t.UNK, 1, 1]]), roots, pairs, 2).tolist() == [0]


def random_texts(count):
    """`count` texts of five words in two columns, their distinct grams, and the roots: 120 grams without pairs."""
    roots, pairs = torch.arange(20), torch.empty(0, dtype=torch.long)
    marks = torch.tensor([1, 1, 2, 2, 2]), torch.tensor([0, 1, 0, 2, 0])  # columns, shapes
    tokens = [torch.stack([torch.randint(2, 20, (5,)), *marks], 1) for _ in range(count)]
    return tokens, [t.find_grams(text, roots, pairs, 2) for text in tokens], roots


def test_class_evidence_leaves_the_text_itself_out():
    """What a training text reads must be the same whatever its label and the held-out texts' labels are."""
    torch.manual_seed(0)
    texts, labels, rows = random_texts(40), torch.randint(3, (40,)), list(range(32))
    seen = []
    for label in range(3):
        labels[5] = labels[32:] = label
        torch.manual_seed(1)
        _, own = t.class_evidence(*texts, 120, labels, rows, 3, parts=4)
        assert sorted(own) == rows
        seen.append(own[5])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    _, own = t.class_evidence(*texts, 120, labels, rows, 3, parts=32)  # each text a part
    without, _ = t.class_evidence(*texts, 120, labels, [row for row in rows if row != 5], 3)
    tokens, _, roots = texts
    torch.testing.assert_close(own[5], without[t.token_grams(tokens[5], roots)])


def test_evidence_and_its_vote_equal_naive_bayes():
    from sklearn.naive_bayes import MultinomialNB

    torch.manual_seed(0)
    labels, (tokens, grams, roots) = torch.arange(60) % 3, random_texts(60)
    whole, _ = t.class_evidence(tokens, grams, roots, 120, labels, list(range(60)), 3)
    counts = np.zeros((60, 120))
    for row, text in enumerate(grams):
        counts[row, text] = 1
    bayes = MultinomialNB(alpha=0.5).fit(counts, labels)
    expected = bayes.feature_log_prob_.T - bayes.feature_log_prob_.T.mean(1, keepdims=True)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)

    model = t.TransformerClassifier(torch.randn(20, 8), roots, 120, 3, 2, 20, 16, 2, 1, 0.0)
    model.evidence.copy_(whole)
    nn.init.zeros_(model.classify.weight), nn.init.zeros_(model.classify.bias)  # the vote alone; the classes are even
    voters = torch.tensor([[float((text >= 40).sum())] for text in grams])  # capitals; title and description apart
    log_odds = t.predict_probabilities(model, tokens, grams).log() * 2 * voters.sqrt()
    counts[:, :40] = 0
    np.testing.assert_allclose(log_odds.softmax(-1), bayes.predict_proba(counts), rtol=1e-3)


def test_length_batches_hold_each_row_once():
    lengths = torch.randint(1, 80, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    for generator in (None, torch.Generator().manual_seed(1)):
        batches = t.length_batches(lengths, list(range(0, 1000, 2)), 32, generator)
        assert sorted(row for batch in batches for row in batch) == list(range(0, 1000, 2))
        padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
        assert padded < 1.15 * sum(lengths[::2])


def test_clean_text():
    raw = r"Haiti #39;s  &lt;b&gt;straits&lt;/b&gt; at \$44, quot;a mistake quot; &amp;amp; more\band 3 < 5 > 2"
    assert t.clean_text(raw) == 'Haiti\'s straits at $44,"a mistake" & more band 3 < 5 > 2'


@pytest.mark.parametrize("name", t.TOKENIZERS)
def test_tokenizers(name):
    tokens = t.make_tokenizer(name)("The bank's shares rose.")
    assert tokens[0] == "the" and "shares" in tokens and all(token == token.lower() for token in tokens)


def test_overfits_32_texts(here):
    news = t.load_news(t.parse_args(["--data", "data", "--limit", "32", "--folds", "2"]))
    off = [word for name in ("--dropout", "--word-dropout", "--r-drop", "--label-smoothing") for word in (name, "0")]
    args = t.parse_args(["--data", "data", "--epochs", "60", "--lr", "3e-3", *off])
    inputs = t.prepare(args, news)
    torch.manual_seed(0)
    state = inputs._asdict() | {"classes": news.classes, "settings": vars(args)}
    model = t.build_model(state)
    with t.tqdm(disable=True) as bar:
        history = t.train_member(model, inputs, news.labels, list(range(32)), args, (0,), None, lambda state: None, bar)
    assert history[-1]["accuracy"] == 1.0 and history[-1]["cross_entropy"] < 0.05


# runs ----------------------------------------------------------------------------------------------------------------


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


def test_run_leaves_what_it_promises(here, capsys):
    metrics = run()
    assert metrics == json.loads(Path("runs/transformer/metrics.json").read_text())
    names = {"oof_accuracy", "oof_accuracy_se", "fold_accuracy", "vector_coverage", "parameters", "seconds"}
    assert set(metrics) == names and len(metrics["fold_accuracy"]) == 2
    rows, test = rows_of("submission.csv"), rows_of("data/test.csv")
    assert rows[0] == ["Id", "Category"] and [row[0] for row in rows[1:]] == [row[0] for row in test[1:]]
    assert {row[1] for row in rows[1:]} <= {"1", "2", "3", "4"}
    oof = rows_of("runs/transformer/oof_predictions.csv")
    assert metrics["oof_accuracy"] == pytest.approx(sum(row[1] == row[2] for row in oof[1:]) / 60)
    members = torch.load("runs/transformer/checkpoint.pt", weights_only=True)["members"]
    assert sorted(row for member in members for row in member["rows"]) == list(range(60))
    for member in members:  # each row's probabilities are those of the model that had it held out
        written = torch.tensor([[float(value) for value in oof[1 + row][4:]] for row in member["rows"]])
        torch.testing.assert_close(written, member["held_out"], atol=1e-4, rtol=0)
    left = {path.name for path in Path("runs/transformer").iterdir()}
    assert {"config.json", "history.csv", "checkpoint.pt", "learning-curve.png", "confusion-matrix.png"} <= left
    assert not any(name.startswith(".") for name in left)
    config = json.loads(Path("runs/transformer/config.json").read_text())
    assert len(config["sha256"]["train.csv"]) == 64 and config["seed"] == 0

    again = run()
    assert without_seconds(again) == without_seconds(metrics) and Path("runs/transformer.previous").is_dir()
    assert without_seconds(run("--resume")) == without_seconds(metrics)  # finished: only printed
    capsys.readouterr()
    first = t.main(["--predict", "The striker scored twice in the final"])
    Path("lines.txt").write_text("The striker scored twice in the final\n\n")
    lines = t.main(["--predict", "lines.txt"])
    assert first["labels"][0] == lines["labels"][0] and len(lines["labels"]) == 2
    assert capsys.readouterr().out.startswith(first["labels"][0] + "\t")
    Path("lines.txt").write_text("The striker scored twice in the final", encoding="utf-8-sig")
    assert t.main(["--predict", "lines.txt"])["confidence"][0] == pytest.approx(first["confidence"][0])
    told = [
        t.main(["--predict", text])["confidence"]
        for text in ("Oil prices\tfell on Monday", "Oil prices fell on Monday")
    ]
    assert told[0] != told[1]  # a tab parts title and description
    state = torch.load("runs/transformer/checkpoint.pt", weights_only=True)
    del state["columns"]
    torch.save(state, "runs/transformer/checkpoint.pt")
    with pytest.raises(SystemExit):
        t.main(["--predict", "a text"])
    assert "trained by another version" in capsys.readouterr().err
    assert without_seconds(run("--seed", "1")) != without_seconds(metrics)


@pytest.mark.parametrize("steps", [3, 8, 17])
def test_resume_equals_no_interruption(here, monkeypatch, capsys, steps):
    words = ["--epochs", "2", "--batch-size", "8", "--seeds", "2"]
    whole = run(*words)
    submission = Path("submission.csv").read_bytes()
    number = signal.SIGTERM if steps == 8 else signal.SIGINT
    assert interrupted(monkeypatch, steps, *words, "--out", "other", number=number) == 128 + number
    assert "--resume" in capsys.readouterr().out
    assert without_seconds(run(*words, "--out", "other", "--resume")) == without_seconds(whole)
    assert Path("submission.csv").read_bytes() == submission
    assert len(rows_of("other/history.csv")) == 1 + 2 * 2 * 2


def interrupted(monkeypatch, step, *words, number=signal.SIGINT):
    """The exit code of a run that a signal stops in this step."""
    rate, count = t.learning_rate, iter(range(10_000))

    def learning_rate(*args):
        if next(count) == 2 * step:  # called for each of two parameter groups
            os.kill(os.getpid(), number)
        return rate(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(t, "learning_rate", learning_rate)
        run(*words)
    return stopped.value.code


def test_resume_refuses_other_vectors(here, monkeypatch, capsys):
    interrupted(monkeypatch, 1)
    Path("data/glove.tiny.txt").write_text("the " + "1 2 3 4 " * 8 + "\nof " + "4 3 2 1 " * 8 + "\n")  # as wide as LSA
    with pytest.raises(SystemExit):
        run("--resume")
    assert "trained with other word vectors" in capsys.readouterr().err


def test_resume_refuses_another_versions_weights(here, monkeypatch, capsys):
    interrupted(monkeypatch, 1)
    state = torch.load("runs/transformer/checkpoint.pt", weights_only=True)
    del state["partial"]["model"]["position"]
    torch.save(state, "runs/transformer/checkpoint.pt")
    with pytest.raises(SystemExit):
        run("--resume")
    assert "trained by another version" in capsys.readouterr().err


def test_metrics_without_a_checkpoint_are_no_finished_run(here, monkeypatch):
    metrics = run()
    Path("runs/transformer/checkpoint.pt").unlink()
    interrupted(monkeypatch, 1, "--seed", "1")
    assert without_seconds(run("--seed", "1", "--resume")) != without_seconds(metrics)


def test_dollars_are_no_formulas(here):
    words = ["$_$", "up", "$5%$6", "${$", "US$1^$2"]
    t.plot_attention(Path("a.png"), words, torch.full((2, 5, 5), 0.2), "from $1_ to $2^")
    t.plot_confusion(Path("c.png"), torch.arange(2), torch.arange(2), ["$_$", "$^$"])
    frame = {"oof_accuracy": [0.5], "tokenizer": ["nltk"], "oof_accuracy_se": [0.1]}
    t.plot_tokenizers(Path("t.png"), frame, {"nltk": words})


def test_dropout_near_one_keeps_something():
    kept = t.Dropout(0.999).train()(torch.ones(100_000))
    assert 0 < kept.count_nonzero() < 1000 and kept.mean().item() == pytest.approx(1, abs=0.3)


def test_resume_with_nothing_saved_starts(here):
    assert run("--resume")["oof_accuracy"] > 0


def test_non_finite_loss_goes_back_and_then_gives_up(here, monkeypatch, capsys):
    loss, count = t.r_drop_loss, iter(range(10_000))
    monkeypatch.setattr(t, "r_drop_loss", lambda *a: [x * (math.nan if next(count) == 1 else 1) for x in loss(*a)])
    metrics = run("--batch-size", "8")
    assert metrics["oof_accuracy"] > 0 and "half the learning rate" in capsys.readouterr().out
    monkeypatch.setattr(t, "r_drop_loss", lambda *a: [x * math.nan for x in loss(*a)])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2 and "Lower --lr" in capsys.readouterr().err


def test_out_of_fold_means_not_trained_on(here):
    """Labels that are noise can be learned by heart, but not foretold."""
    rows = rows_of("data/train.csv")
    for i, row in enumerate(rows[1:]):
        row[1] = str(torch.randint(4, (1,), generator=torch.Generator().manual_seed(i)).item())
    write_rows("data/train.csv", rows)
    off = [word for name in ("--dropout", "--word-dropout", "--r-drop", "--label-smoothing") for word in (name, "0")]
    metrics = run("--epochs", "30", "--lr", "1e-2", "--limit", "100", *off)
    assert float(rows_of("runs/transformer/history.csv")[-1][-1]) > 0.9 and metrics["oof_accuracy"] < 0.45


def test_2021_format_and_labels_as_they_came(here):
    rows = rows_of("data/train.csv")
    words = {"1": "world", "2": "sport", "3": "business", "4": "tech"}
    write_rows(
        "data/train.csv", [["Id", "Category", "Title"], *([i, words[r[1]], r[2]] for i, r in enumerate(rows[1:]))]
    )
    write_rows("data/test.csv", [["Id", "Title"], ["0", "A late goal"], ["1", "Oil prices fell"], ["2", ""]])
    run("--limit", "200")
    submission = rows_of("submission.csv")
    assert [row[0] for row in submission] == ["Id", "0", "1", "2"]
    assert {row[1] for row in submission[1:]} <= set(words.values())


def test_texts_of_few_words(here):
    """Fewer stems than the vectors have numbers."""
    write_rows(
        "data/train.csv", [["Id", "Category", "Title"], *([i, i % 2, f"hello world number {i}"] for i in range(8))]
    )
    write_rows("data/test.csv", [["Id", "Title"], [1, ""]])
    assert run("--vectors", "none")["oof_accuracy"] >= 0


def test_texts_that_would_take_an_hour_to_clean():
    assert t.clean_text("&#" + "1" * 5000) == "" and t.clean_text("&#38;") == "&"
    assert t.clean_text("&amp;#" + "1" * 5000) == "" and len(t.clean_text("&&#12345678#" + "1" * 5000)) < 6000
    assert len(t.clean_text("<a" * 100_000)) == 200_000


def test_headerless_ag_news(here):
    write_rows("data/train.csv", [row[1:] for row in rows_of("data/train.csv")[1:]])
    write_rows("data/test.csv", [["3", *row[1:]] for row in rows_of("data/test.csv")[1:]])
    run("--limit", "200")
    assert rows_of("submission.csv")[0] == ["Id", "class"] and rows_of("submission.csv")[1][0] == "1"


def test_sample_submission_sets_the_header(here):
    ids = [row[0] for row in rows_of("data/test.csv")[1:]]
    write_rows("data/sample_submission.csv", [["ID", "Label"], *([i, "1"] for i in ids)])
    run()
    assert rows_of("submission.csv")[0] == ["ID", "Label"]


def test_missing_text_is_a_warning_with_a_count(here, capsys):
    rows = rows_of("data/train.csv")
    for row in rows[1:4]:
        row[2:] = ["", ""]
    write_rows("data/train.csv", rows)
    run()
    assert "3 of " in capsys.readouterr().out


@pytest.mark.parametrize("header", ["", "5000 4\n"], ids=["glove", "word2vec"])
def test_vectors_are_found_and_read(here, header, capsys):
    lines = ["the 1 2 3 4", "said -1e-3 .5 0 1", "a . . 9 9 9 9", "never-seen 0 0 0 0"]
    Path("data/glove.tiny.txt").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    vectors = t.read_vectors("data/glove.tiny.txt", {"the", "said"}, here)
    assert set(vectors) == {"the", "said"} and vectors["said"].tolist() == pytest.approx([-1e-3, 0.5, 0, 1])
    coverage = run()["vector_coverage"]
    assert 0.02 < coverage < 0.2 and "glove.tiny.txt" in capsys.readouterr().out
    assert run("--vectors", "none")["vector_coverage"] is None


def test_compare_tokenizers(here):
    Path("submission.csv").write_text("mine")
    table = run("--compare-tokenizers")
    assert Path("submission.csv").read_text() == "mine"
    assert rows_of("runs/transformer/tokenizers/nltk/submission.csv")[0] == ["Id", "Category"]
    assert list(table) == list(t.TOKENIZERS) and Path("runs/transformer/tokenizers/tokenizers.png").exists()
    assert [row[0] for row in rows_of("runs/transformer/tokenizers/tokenizers.csv")] == ["tokenizer", *t.TOKENIZERS]


def test_runs_from_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "transformer.py", tmp_path)
    command = [sys.executable, "transformer.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Kaggle" in done.stderr and [path.name for path in tmp_path.iterdir()] == ["transformer.py"]
    done = subprocess.run([*command, "--data", str(SAMPLE), *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "submission.csv").exists()


# bad input -----------------------------------------------------------------------------------------------------------


def cell(column, value, row=1, name="train.csv"):
    def change():
        rows = rows_of(f"data/{name}")
        rows[row][rows[0].index(column)] = value
        write_rows(f"data/{name}", rows)

    return change


def text(name, content):
    return lambda: Path("data", name).write_bytes(content)


def drop(column, name="train.csv"):
    def change():
        rows = rows_of(f"data/{name}")
        index = rows[0].index(column)
        write_rows(f"data/{name}", [row[:index] + row[index + 1 :] for row in rows])

    return change


def ragged():
    rows = rows_of("data/train.csv")
    rows[7].append("more")
    write_rows("data/train.csv", rows)


def extra_test_column():
    write_rows(
        "data/test.csv", [[*row, "x"] if i else [*row, "Source"] for i, row in enumerate(rows_of("data/test.csv"))]
    )


def one_class():
    rows = rows_of("data/train.csv")
    write_rows("data/train.csv", rows[:1] + [row for row in rows if row[1] == "1"])


def trained_elsewhere():
    run("--layers", "2", "--out", "out")
    Path("out/metrics.json").unlink()


def truncated_checkpoint():
    trained_elsewhere()
    path = Path("out/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:5000])


def foreign_checkpoint():
    Path("out").mkdir()
    torch.save({"script": "another"}, "out/checkpoint.pt")


def evil_checkpoint():
    import pickle

    Path("out").mkdir()
    Path("out/checkpoint.pt").write_bytes(pickle.dumps(Path("x")))


BAD = {
    "no such folder": (lambda: shutil.rmtree("data"), [], r"data/train.csv: No such file"),
    "no test file": (lambda: Path("data/test.csv").unlink(), [], r"data/test.csv: No such file"),
    "empty file": (text("train.csv", b""), [], r"train.csv: the file is empty"),
    "header only": (text("train.csv", b"Id,Category,Title\n"), [], r"train.csv: a header and no rows"),
    "no label column": (drop("Category"), [], r"no label column; found Id, Title, Description\. Name it with --label"),
    "label in one row": (cell("Category", "9"), [], r"Category '9' stands in 1 rows"),
    "empty label": (cell("Category", ""), [], r"row 1 has no Category"),
    "id twice": (cell("Id", "2"), [], r"Id '2' stands in 2 rows"),
    "ragged rows": (ragged, [], r"line 8 has 5 fields, the first has 4"),
    "not utf-8": (text("train.csv", b"Id,Category,Title\n1,2,caf\xe9\n"), [], r"not UTF-8: byte 0xe9 at offset 25"),
    "huge field": (cell("Title", "x" * 50_000_000), [], r"field larger than field limit"),
    "open quote": (text("train.csv", b'Id,Category,Title\n1,2,"caf\n'), [], r"line 2: unexpected end of data"),
    "test without rows": (text("test.csv", b"Id,Title,Description\n"), [], r"test.csv: a header and no rows"),
    "test has more columns": (extra_test_column, [], r"test.csv: columns Source are not in train.csv"),
    "test lacks a column": (drop("Title", "test.csv"), [], r"test.csv: no column Title; found Id, Description"),
    "one class": (one_class, [], r"nothing to tell apart"),
    "column twice": (text("train.csv", b"Id,Label,Id\n1,a,x\n"), [], r"two columns have the same name"),
    "no such column": (lambda: None, ["--text-columns", "Body"], r"--text-columns Body: no such column; found Id"),
    "wrong sample": (text("sample_submission.csv", b"Id,Category\n7,1\n"), [], r"its ids are not those of"),
    "narrow sample": (text("sample_submission.csv", b"Id\n7\n"), [], r"has the columns Id, not an id and a label"),
    "ragged vectors": (text("v.vec", b"the 1 2 3\nof 1 2\n"), [], r"v.vec: line 2 has 2 numbers, the first has 3"),
    "wide vectors": (text("v.vec", b"the 1 2 3\nof 1 2 3 4\n"), [], r"v.vec: line 2 has 4 numbers, the first has 3"),
    "vectors of words": (text("v.vec", b"the 1 2 3\nof x y z\n"), [], r"v.vec: line 2 holds something that is not"),
    "vectors of nan": (text("v.vec", b"the 1 2 3\nof 1 nan 2\n"), [], r"values that are not finite"),
    "flat vectors": (text("v.vec", b"the 1 1 1\nof 1 1 1\n"), [], r"v.vec: all its numbers are the same"),
    "no vectors file": (lambda: None, ["--vectors", "none.txt"], r"--vectors none.txt: No such file"),
    "useless vectors": (text("v.vec", b"xyzzy 1 2 3\n"), [], r"has none of the texts' words"),
    "other settings": (trained_elsewhere, ["--out", "out", "--resume"], r"trained with layers 2, not 1"),
    "truncated": (truncated_checkpoint, ["--out", "out", "--resume"], r"not a checkpoint that can be read"),
    "foreign": (foreign_checkpoint, ["--out", "out", "--resume"], r"not a checkpoint of transformer"),
    "evil pickle": (evil_checkpoint, ["--out", "out", "--resume"], r"not a checkpoint that can be read"),
    "nothing to predict with": (lambda: None, ["--out", "out", "--predict", "x"], r"out: no run there\. Train first"),
    "unreadable texts": (trained_elsewhere, ["--out", "out", "--predict", "/proc/self/mem"], r"--predict /proc"),
    "out has no name": (lambda: None, ["--out", "."], r"a run needs a folder with a name"),
    "negative seed": (lambda: None, ["--seed", "-1"], r"argument --seed: '-1' is not a whole number from 0"),
    "large seed": (lambda: None, ["--seed", "5000000000"], r"argument --seed: '5000000000' is not a whole number"),
    "small limit": (lambda: None, ["--limit", "5"], r"folds need one each\. Raise --limit, or lower --folds"),
    "vectors in a column": (text("v.vec", b"the\nof\n"), [], r"v.vec: line 1 is not a word and its numbers"),
    "out is a file": (lambda: Path("out").touch(), ["--out", "out"], r"out: cannot be written"),
    "out is below a file": (lambda: Path("out").touch(), ["--out", "out/x"], r"out/x: cannot be written"),
    "out holds other files": (lambda: None, ["--out", "data"], r"data: holds files that no run left"),
    "heads": (lambda: None, ["--heads", "3"], r"--heads 3 does not divide --dim 16"),
    "folds": (lambda: None, ["--folds", "1"], r"--folds 1: cross-validation needs at least 2"),
    "nan": (lambda: None, ["--lr", "nan"], r"argument --lr: 'nan' is not a positive number"),
    "no such device": (lambda: None, ["--device", "mps"], r"--device mps: torch finds no such device"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(here, capsys, case):
    change, words, message = BAD[case]
    change()
    Path("submission.csv").write_text("mine")
    before = (
        {path: path.read_bytes() for path in Path("out").glob("*") if path.is_file()} if Path("out").is_dir() else {}
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert Path("submission.csv").read_text() == "mine" and not Path("runs").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_two_runs_do_not_share_a_folder(here, capsys):
    run("--out", "out")
    t.open_run(Path("out"), True, {})
    with pytest.raises(SystemExit):
        run("--out", "out")
    assert "another run is writing there" in capsys.readouterr().err and not t.held_locks
