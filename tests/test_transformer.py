"""transformer.py: its mathematics against independent references, its runs, bad input's lines."""

import argparse
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
from sklearn.naive_bayes import ComplementNB

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import transformer as t

SAMPLE = ROOT / "data" / "sample"
SMALL = [
    "--epochs",
    "1",
    "--folds",
    "2",
    "--dim",
    "16",
    "--heads",
    "2",
    "--limit",
    "60",
    "--device",
    "cpu",
]


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


VOCABULARY = t.Vocabulary({}, {f"1:s{i}": i for i in range(60)}, 2)


def small_model(layers=1, words=50):
    torch.manual_seed(0)
    settings = argparse.Namespace(dim=16, heads=2, layers=layers, dropout=0.3)
    model = t.TransformerClassifier(torch.randn(words, 8), VOCABULARY, 3, settings)
    model.evidence[1:].normal_()
    model.vote_weight.data.fill_(0.5)
    return model.eval()


def random_tokens(count, length, words=50):
    """(count, length, 3): words and names, the first 3 of column 1 and the others of column 2."""
    column = 1 + (torch.arange(length) > 2).repeat(count, 1)
    word, name = torch.randint(2, words, (2, count, length))
    return torch.stack([word, column, name], -1)


# mathematics --------------------------------------------------------------------------------------


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
def test_attention_weights_are_shares_of_the_tokens(layers):
    model, tokens = small_model(layers), random_tokens(4, 9)
    tokens[0, 5:] = t.PAD
    _, attn = model(tokens)
    torch.testing.assert_close(attn.sum(-1), torch.ones(4, 2, 9))
    assert attn.shape == (4, 2, 9, 9) and (attn[0, :, :, 5:] == 0).all()


def test_padding_has_no_effect():
    model, tokens = small_model(2), random_tokens(1, 6)
    padded = F.pad(tokens, (0, 0, 0, 7), value=t.PAD)
    torch.testing.assert_close(model(padded)[0], model(tokens)[0])


def test_columns_are_told_apart_and_count_alike():
    model, tokens = small_model(), random_tokens(1, 8)
    other = tokens * torch.tensor([1, -1, 1]) + torch.tensor([0, 3, 0])
    assert not torch.allclose(model(tokens)[0], model(other)[0])
    seen, pooled = [], []
    model.norm.register_forward_hook(lambda module, x, y: seen.append(y))
    model.classify.register_forward_hook(lambda module, x, y: pooled.append(x[0]))
    model(tokens)
    weights = torch.autograd.grad(pooled[0].sum(), seen[0])[0][0, :, 0]  # (T,), of each token
    torch.testing.assert_close(weights, torch.tensor([1 / 3] * 3 + [1 / 5] * 5) / 2)


def test_training_texts_bring_their_own_evidence():
    model, tokens = small_model(), F.pad(random_tokens(4, 9), (0, 0, 0, 3))
    evidence = model.evidence[tokens[..., 2]]
    torch.testing.assert_close(model(tokens, evidence)[0], model(tokens)[0])
    assert not torch.allclose(model(tokens, evidence + 1)[0], model(tokens)[0])


def test_drop_words_takes_word_and_name_and_keeps_the_rest():
    tokens = F.pad(random_tokens(200, 9), (0, 0, 0, 3))
    dropped = t.drop_words(tokens, 0.3)
    changed = (dropped != tokens).any(-1)
    assert torch.equal(dropped[..., 1], tokens[..., 1]) and not changed[:, 9:].any()
    assert (dropped[changed][:, [0, 2]] == torch.tensor([t.UNK, 0])).all()
    assert abs(changed[:, :9].float().mean() - 0.3) < 0.05


def test_split_text_tells_columns_apart():
    tokens = t.split_text("Oil and US\toils\tus 3 OIL", 2)
    words, columns, names = zip(*tokens, strict=True)
    assert words == ("oil", "and", "us", "oils", "us", "3", "oil")
    assert columns == (1, 1, 1, 2, 2, 2, 2)
    assert names == ("1:oil", "1:and", "1:us", "2:oil", "2:us", "2:0", "2:oil")
    assert t.split_text("\t", 2) == []
    vocabulary = t.Vocabulary({"a": 2, "b": 3}, {"1:b": 1, "1:x": 2}, 2)
    encoded = [vocabulary.encode(t.split_text(text, 2)).tolist() for text in ("b x", "")]
    assert encoded == [[[3, 1, 1], [t.UNK, 1, 2]], [[t.UNK, 1, 0]]]
    assert len(vocabulary.encode(t.split_text("a " * 1000, 2))) == t.MAX_LENGTH


def test_r_drop_loss_equals_reference():
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 4), torch.randint(4, (5,))
    loss, nll = t.r_drop_loss(logits, labels, 0.7)
    p, q = (torch.distributions.Categorical(logits=half) for half in logits.chunk(2))
    kl = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    expected = -(p.log_prob(labels) + q.log_prob(labels)).sum() / 2
    torch.testing.assert_close(nll, expected / 5)
    torch.testing.assert_close(loss, (expected + 0.7 * kl.sum() / 2) / 5)


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    drop = t.Dropout(0.3).train()
    y = drop(torch.ones(1_000_003))
    assert abs((y == 0).float().mean() - 0.3) < 0.003 and abs(y.mean() - 1) < 0.005
    assert torch.equal(drop.eval()(y), y)
    kept = t.Dropout(0.99).train()(torch.ones(100_000))
    assert 500 < kept.count_nonzero() < 2000


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [t.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[9] == 2.0 == max(rates) and rates[0] == 0.2 and abs(rates[100]) < 1e-12
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_cooccurrence_vectors_equal_numpy_svd(monkeypatch):
    rng = np.random.default_rng(0)
    words = [f"w{i:02}" for i in range(12)]
    texts = [[words[i] for i in rng.integers(0, 12, 8)] for _ in range(30)]
    monkeypatch.setattr(t, "LSA_WIDTH", 5)
    vectors = t.cooccurrence_vectors([*texts, ["once"]])
    assert sorted(vectors) == words  # a stem of one text has none
    counts = np.array([[text.count(word) for word in words] for text in [*texts, []]])
    tf = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
    weights = tf * (np.log(32 / (1 + (counts > 0).sum(0))) + 1)
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-9)
    _, s, vt = np.linalg.svd(weights)
    expected = vt[:5].T * s[:5]
    expected *= math.sqrt(5) / np.linalg.norm(expected, axis=1, keepdims=True)
    found = np.stack([vectors[word] for word in words])
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)


def test_without_weight_it_is_plain_cross_entropy():
    logits, labels = torch.randn(10, 4), torch.randint(4, (5,))
    loss, nll = t.r_drop_loss(logits, labels, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels.repeat(2)))
    torch.testing.assert_close(loss, nll)


def random_texts(count):
    return [torch.stack([torch.randint(2, 20, (5,)) for _ in range(3)], 1) for _ in range(count)]


def test_class_evidence_leaves_the_text_itself_out():
    """What a training text reads must be the same whatever its label is."""
    torch.manual_seed(0)
    texts, labels, seen = random_texts(40), torch.randint(3, (40,)), []
    for label in range(3):
        labels[5] = label
        torch.manual_seed(1)
        tables, part = t.class_evidence(texts, labels, 20, 3)
        seen.append(tables[part[5]])
        assert part.min() == 1 and part.max() == t.PARTS
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    rows = [row for row in range(40) if part[row] != part[5]]
    without, _ = t.class_evidence([texts[row] for row in rows], labels[rows], 20, 3)
    torch.testing.assert_close(tables[part[5]], without[0])


def test_evidence_is_complement_naive_bayes():
    """Summed over a text it is scikit-learn's ComplementNB, less what all classes share."""
    torch.manual_seed(0)
    texts, labels, present = random_texts(60), torch.randint(3, (60,)), np.zeros((60, 20))
    tables, _ = t.class_evidence(texts, labels, 20, 3)
    for row, text in zip(present, texts, strict=True):
        row[text[:, 2].unique()] = 1
    reference = ComplementNB(alpha=2 / 6).fit(present, labels)
    expected = torch.tensor(2 * present @ reference.feature_log_prob_.T).float()
    expected -= expected.mean(1, keepdim=True)
    found = torch.stack([tables[0, text[:, 2].unique()].sum(0) for text in texts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not tables[:, 0].any()


def test_a_name_never_met_says_nothing():
    texts = [torch.tensor([[2, 1, 1 + (row < 8)]]) for row in range(10)]
    texts.append(torch.tensor([[t.UNK, 1, 0]]))  # no words; a dropped one reads 0 as well
    tables, _ = t.class_evidence(texts, torch.tensor([0] * 8 + [1] * 3), 4, 2)
    assert not tables[:, [0, 3]].any() and tables[0, 1, 1] > 0 > tables[0, 2, 1]


def test_words_vote_by_their_evidence():
    model, tokens = small_model(), random_tokens(4, 9)
    logits, _ = model(tokens)
    model.vote_weight.data.zero_()
    votes = 0.5 * model.evidence[tokens[..., 2]].sum(1)
    torch.testing.assert_close(logits - model(tokens)[0], votes)


def test_length_batches_hold_each_row_once():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 80, (1000,), generator=generator).tolist()
    texts = [torch.ones(length, 3) for length in lengths]
    batches = t.length_batches(texts, 32, generator)
    rows = torch.cat(batches).tolist()
    assert len(set(rows)) == len(rows) == 992  # what fills no batch is left out
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths[row] for row in rows)


def test_tokens_are_lower_case_words_and_marks():
    tokens = t.TOKENIZE("The bank's shares rose.")
    assert tokens == ["the", "bank", "'", "s", "shares", "rose", "."]


OFF = [word for name in ("--dropout", "--word-dropout", "--r-drop") for word in (name, "0")]


def test_overfits_32_texts(here):
    words = [*OFF, "--epochs", "150", "--lr", "3e-3", "--limit", "64"]
    run(*words)  # two folds of 32
    last = rows_of("runs/transformer/history.csv")[-1]
    assert float(last[2]) < 0.05


# runs ---------------------------------------------------------------------------------------------


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


def test_run_leaves_what_it_promises(here, capsys):
    metrics = run()
    assert metrics == json.loads(Path("runs/transformer/metrics.json").read_text())
    names = {
        "oof_accuracy",
        "oof_accuracy_se",
        "fold_accuracy",
        "vector_coverage",
        "parameters",
        "seconds",
    }
    assert set(metrics) == names and len(metrics["fold_accuracy"]) == 2
    rows, test = rows_of("submission.csv"), rows_of("data/test.csv")
    assert rows[0] == ["Id", "Category"] and [row[0] for row in rows[1:]] == [
        row[0] for row in test[1:]
    ]
    assert {row[1] for row in rows[1:]} <= {"1", "2", "3", "4"}
    oof = rows_of("runs/transformer/oof_predictions.csv")
    assert metrics["oof_accuracy"] == pytest.approx(sum(row[1] == row[2] for row in oof[1:]) / 60)
    state = torch.load("runs/transformer/checkpoint.pt", weights_only=True)
    held_out = [row for member in state["members"] for row in member["rows"]]
    assert sorted(held_out) == list(range(60))
    models, _ = t.load_finished(Path("runs/transformer"))
    for model, member in zip(models, state["members"], strict=True):
        texts = [row[-1] for row in oof[1:]]  # each row by the model that had it held out
        p = t.classify([model], state, [texts[row] for row in member["rows"]])
        torch.testing.assert_close(state["probabilities"][member["rows"]], p, atol=1e-5, rtol=0)
        written = torch.tensor([float(oof[1 + row][3]) for row in member["rows"]])
        torch.testing.assert_close(written, p.max(1).values, atol=1e-4, rtol=0)
    of_test = t.classify(models, state, ["\t".join(row[1:]) for row in test[1:]])
    torch.testing.assert_close(state["probabilities"][60:], of_test, atol=1e-5, rtol=0)
    left = {path.name for path in Path("runs/transformer").iterdir()}
    assert {"config.json", "history.csv", "checkpoint.pt", "learning-curve.png"} <= left
    assert not any(name.startswith(".") for name in left)
    config = json.loads(Path("runs/transformer/config.json").read_text())
    assert len(config["sha256"]["train.csv"]) == 64 and config["seed"] == 0

    again = run()
    assert (
        without_seconds(again) == without_seconds(metrics)
        and Path("runs/transformer.previous").is_dir()
    )
    assert without_seconds(run("--resume")) == without_seconds(metrics)  # finished: only printed
    assert "kept      runs/transformer.previous" in capsys.readouterr().out
    first = t.main(["--predict", "The striker scored twice in the final"])
    Path("lines.txt").write_text("The striker scored twice in the final\n\n")
    lines = t.main(["--predict", "lines.txt"])
    assert first["labels"][0] == lines["labels"][0] and len(lines["labels"]) == 2
    assert capsys.readouterr().out.startswith(first["labels"][0] + "\t")
    Path("lines.txt").write_text("The striker scored twice in the final", encoding="utf-8-sig")
    assert t.main(["--predict", "lines.txt"])["confidence"][0] == pytest.approx(
        first["confidence"][0]
    )
    told = [
        t.main(["--predict", text])["confidence"]
        for text in ("Oil prices\tfell on Monday", "Oil prices fell on Monday")
    ]
    assert told[0] != told[1]  # a tab parts title and description
    state = torch.load("runs/transformer/checkpoint.pt", weights_only=True)
    torch.save(state | {"version": "transformer 1"}, "runs/transformer/checkpoint.pt")
    with pytest.raises(SystemExit):
        t.main(["--predict", "a text"])
    assert "not a checkpoint of transformer 5" in capsys.readouterr().err
    assert without_seconds(run("--seed", "1")) != without_seconds(metrics)


def test_resume_in_the_second_model_equals_no_interruption(here, monkeypatch):
    words = ["--epochs", "2", "--batch-size", "8"]
    whole = run(*words)
    submission = Path("submission.csv").read_bytes()
    interrupted(monkeypatch, 10, *words, "--out", "other")
    state = torch.load("other/checkpoint.pt", weights_only=True)
    assert len(state["members"]) == 1 and state["current"]["epoch"] == 1
    assert without_seconds(run(*words, "--out", "other", "--resume")) == without_seconds(whole)
    assert Path("submission.csv").read_bytes() == submission
    assert len(rows_of("other/history.csv")) == 1 + 2 * 2


def interrupted(monkeypatch, step, *words):
    """Let Ctrl-C stop a run in this step."""
    rate, count = t.learning_rate, iter(range(10_000))

    def learning_rate(*args):
        if next(count) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(t, "learning_rate", learning_rate)
        run(*words)


def test_resume_refuses_other_vectors(here, monkeypatch, capsys):
    interrupted(monkeypatch, 1, "--epochs", "3")
    assert not Path("runs/transformer/metrics.json").exists()
    Path("data/glove.tiny.txt").write_text("the 1 2 3 4\nof 4 3 2 1\n")
    with pytest.raises(SystemExit):
        run("--resume", "--epochs", "3")
    assert "trained with vectors none, not glove.tiny.txt" in capsys.readouterr().err


def test_resume_refuses_a_vectors_file_that_has_changed(here, monkeypatch, capsys):
    path, words = Path("data/glove.tiny.txt"), ["--epochs", "3"]
    path.write_text("the 1 2 3 4\nof 4 3 2 1\n")
    interrupted(monkeypatch, 1, *words)
    path.write_text("the 1 2 3 4\nof 4 3 2 1\nin 2 2 1 1\n")
    with pytest.raises(SystemExit):
        run("--resume", *words)
    assert "trained with other word vectors" in capsys.readouterr().err


def test_rows_without_text_keep_their_place(here):
    """In a file of one column, too, where a row is an empty quoted field or blanks."""
    rows = rows_of("data/train.csv")
    write_rows("data/train.csv", [["Category", "Title"], *(row[1:3] for row in rows[1:])])
    Path("data/test.csv").write_text('Title\nA late goal\n""\n   \nOil fell\n\n', encoding="utf-8")
    run()
    assert [row[0] for row in rows_of("submission.csv")] == ["Id", "1", "2", "3", "4"]
    Path("submission.csv").unlink()


def test_metrics_without_a_checkpoint_are_no_finished_run(here, monkeypatch):
    metrics = run()
    Path("runs/transformer/checkpoint.pt").unlink()
    interrupted(monkeypatch, 1, "--seed", "1")
    assert without_seconds(run("--seed", "1", "--resume")) != without_seconds(metrics)


@pytest.mark.figures
def test_dollars_are_no_formulas(here):
    words = ["$_$", "up", "$5%$6", "${$", "US$1^$2"]
    attention = t.plot_attention(words, torch.full((2, 5, 5), 0.2), "from $1_ to $2^")
    history = [{"model": 1, "epoch": 1, "cross_entropy": 1.0}]
    results = t.plot_results(history, torch.arange(2), torch.arange(2), ["$_$", "$^$"])
    for figure in (attention, results):
        figure.savefig("drawn.png")


def test_out_of_fold_means_not_trained_on(here):
    """Labels that are noise can be learned by heart, but not foretold."""
    rows = rows_of("data/train.csv")
    for i, row in enumerate(rows[1:]):
        row[1] = str(torch.randint(4, (1,), generator=torch.Generator().manual_seed(i)).item())
    write_rows("data/train.csv", rows)
    off = [word for name in ("--dropout", "--word-dropout", "--r-drop") for word in (name, "0")]
    metrics = run("--epochs", "30", "--lr", "1e-2", "--limit", "100", *off)
    assert (
        float(rows_of("runs/transformer/history.csv")[-1][-1]) < 0.3
        and metrics["oof_accuracy"] < 0.45
    )


def test_2021_format_and_labels_as_they_came(here, capsys):
    rows = rows_of("data/train.csv")
    words = {"1": "world", "2": "sport", "3": "business", "4": "tech"}
    write_rows(
        "data/train.csv",
        [["Id", "Category", "Title"], *([i, words[r[1]], r[2]] for i, r in enumerate(rows[1:]))],
    )
    write_rows(
        "data/test.csv",
        [["Id", "Title"], ["0", "A late goal"], ["1", "Oil prices fell"], ["2", ""]],
    )
    run("--limit", "200")
    out = capsys.readouterr().out
    assert "text Title; label Category; id Id" in out and "without --limit" in out
    submission = rows_of("submission.csv")
    assert [row[0] for row in submission] == ["Id", "0", "1", "2"]
    assert {row[1] for row in submission[1:]} <= set(words.values())


def test_texts_of_few_words(here):
    """Fewer stems than the vectors have numbers."""
    write_rows(
        "data/train.csv",
        [["Id", "Category", "Title"], *([i, i % 2, f"hello world number {i}"] for i in range(8))],
    )
    write_rows("data/test.csv", [["Id", "Title"], [1, ""]])
    assert run("--vectors", "none")["oof_accuracy"] >= 0


def test_a_file_without_header_has_numbered_columns(here):
    """As AG News' own: class, title, description."""
    write_rows("data/train.csv", [row[1:] for row in rows_of("data/train.csv")[1:]])
    write_rows("data/test.csv", [["3", *row[1:]] for row in rows_of("data/test.csv")[1:]])
    run("--limit", "200", "--label-column", "1")
    assert rows_of("submission.csv")[0] == ["Id", "1"] and rows_of("submission.csv")[1][0] == "1"


def test_missing_text_is_a_warning_with_a_count(here, capsys):
    rows = rows_of("data/train.csv")
    for row in rows[1:4]:
        row[2:] = ["", ""]
    write_rows("data/train.csv", rows)
    run("--limit", "400")
    assert "3 of " in capsys.readouterr().out


@pytest.mark.parametrize("header", ["", "5000 4\n"], ids=["glove", "word2vec"])
def test_vectors_are_found_and_read(here, header, monkeypatch, capsys):
    monkeypatch.setattr(t, "TOP", 3)
    lines = ["the 1 2 3 4", "said -1e-3 .5 0 1 ", "a . . 9 9 9 9", "never-seen 0 0 0 0"]
    Path("data/glove.tiny.txt").write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    vectors = t.read_vectors("data/glove.tiny.txt", {"the", "said", "a"})
    assert set(vectors) == {"the", "said"}  # a word with blanks inside is no word of the texts
    spread = np.std([1, 2, 3, 4, -1e-3, 0.5, 0, 1])
    assert (vectors["said"] * spread).tolist() == pytest.approx([-1e-3, 0.5, 0, 1])
    coverage = run()["vector_coverage"]
    assert 0.02 < coverage < 0.2 and "glove.tiny.txt" in capsys.readouterr().out
    assert run("--vectors", "none")["vector_coverage"] is None


def test_words_that_no_text_had_keep_their_vectors(here):
    """A text to come is read with them: what the file has first, its most frequent words."""
    Path("data/glove.tiny.txt").write_text("the 1 2 3 4\nxyzzy 4 3 2 1\n")
    run()
    state = torch.load("runs/transformer/checkpoint.pt", weights_only=True)
    word = t.Vocabulary(**state["vocabulary"]).encode(t.split_text("xyzzy", 2))[0, 0]
    ratio = state["features"][word] / state["features"][state["vocabulary"]["words"]["the"]]
    torch.testing.assert_close(ratio, torch.tensor([4, 1.5, 2 / 3, 0.25]))


def test_runs_from_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "transformer.py", tmp_path)
    command = [sys.executable, "transformer.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert (
        t.SOURCE in done.stdout
        and "train.csv" in done.stderr
        and [path.name for path in tmp_path.iterdir()] == ["transformer.py"]
    )
    done = subprocess.run(
        [*command, "--data", str(SAMPLE), *SMALL], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "submission.csv").exists()
    (tmp_path / "lines.txt").write_text("Oil prices fell on Monday\n" * 5000, encoding="utf-8")
    command += ["--predict", "lines.txt"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as head:
        assert "Oil prices" in head.stdout.readline()
        head.stdout.close()  # as `| head -1` does: more is left to write than the pipe holds
        assert head.stderr.read() == ""


# bad input ----------------------------------------------------------------------------------------


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
    "empty file": (text("train.csv", b""), [], r"train.csv: No columns to parse"),
    "header only": (text("train.csv", b"Id,Category,Title\n"), [], r"train.csv: no rows"),
    "no label column": (
        drop("Category"),
        [],
        r"no label column; found Id, Title, Description\. Name",
    ),
    "label in one row": (
        cell("Category", "9"),
        ["--limit", "400"],
        r"Category has classes 1: .*9: [01]\.",
    ),
    "empty label": (cell("Category", ""), ["--limit", "400"], r"Category has classes 1: .*, : 1"),
    "id twice": (cell("Id", "2"), ["--limit", "400"], r"Id '2' stands in 2 rows"),
    "ragged rows": (ragged, [], r"Expected 4 fields in line 8, saw 5"),
    "short rows": (text("train.csv", b"Id,Category,Title\n1,2\n"), [], r"row 2 has fewer fields"),
    "not utf-8": (text("train.csv", b"Id,Category,Title\n1,2,caf\xe9\n"), [], r"decode byte 0xe9"),
    "open quote": (
        text("train.csv", b'Id,Category,Title\n1,2,"caf\n'),
        [],
        r"unexpected end of data",
    ),
    "test without rows": (text("test.csv", b"Id,Title,Description\n"), [], r"test.csv: no rows"),
    "test lacks a column": (drop("Title", "test.csv"), [], r"test.csv: no Title column; found Id"),
    "one class": (one_class, [], r"Category has classes 1: 60\. Give two"),
    "column twice": (text("train.csv", b"Id,Label,Id\n1,a,x\n"), [], r"a column twice"),
    "no such column": (lambda: None, ["--text-columns", "Body"], r"no Body column; found Id"),
    "vectors of words": (text("v.vec", b"the 1 2 3\nof x y z\n"), [], r"could not convert string"),
    "vectors of nan": (text("v.vec", b"the 1 2 3\nof 1 nan 2\n"), [], r"not finite"),
    "flat vectors": (text("v.vec", b"the 1 1 1\nof 1 1 1\n"), [], r"all the same, or not finite"),
    "no vectors file": (lambda: None, ["--vectors", "none.txt"], r"--vectors none.txt: No such"),
    "useless vectors": (text("v.vec", b"xyzzy 1 2 3\n"), [], r"none of the texts' words"),
    "vectors in a column": (text("v.vec", b"the\nof\n"), [], r"--vectors data/v.vec: "),
    "other settings": (trained_elsewhere, ["--out", "out", "--resume"], r"with layers 2, not 1"),
    "truncated": (truncated_checkpoint, ["--out", "out", "--resume"], r"not a zip file"),
    "foreign": (
        foreign_checkpoint,
        ["--out", "out", "--resume"],
        r"not a checkpoint of transformer",
    ),
    "evil pickle": (evil_checkpoint, ["--out", "out", "--resume"], r"not a zip file"),
    "no run there": (
        lambda: None,
        ["--out", "out", "--predict", "x"],
        r"out: no trained model there\. Train",
    ),
    "unreadable texts": (
        trained_elsewhere,
        ["--out", "out", "--predict", "/proc/self/mem"],
        r"/proc",
    ),
    "out has no name": (lambda: None, ["--out", "."], r"is not the folder of a run|busy|not empty"),
    "negative seed": (lambda: None, ["--seed", "-1"], r"--seed -1: give a number from 0"),
    "large seed": (lambda: None, ["--seed", "5000000000"], r"--seed 5000000000: give a number"),
    "small limit": (lambda: None, ["--limit", "5"], r"Give two or more, 2 rows each"),
    "out is a file": (lambda: Path("out").touch(), ["--out", "out"], r"out: File exists"),
    "out is below a file": (lambda: Path("out").touch(), ["--out", "out/x"], r"out/x: Not a dir"),
    "out holds other files": (
        lambda: None,
        ["--out", "data"],
        r"data: data is not the folder of a run",
    ),
    "a csv to predict": (
        lambda: None,
        ["--predict", "data/test.csv"],
        r"test.csv: give one text a",
    ),
    "heads": (lambda: None, ["--heads", "3"], r"--heads 3 does not divide --dim 16"),
    "folds": (lambda: None, ["--folds", "1"], r"--folds 1: give a number from 2"),
    "nan": (lambda: None, ["--lr", "nan"], r"--lr nan: give a number from"),
    "no number": (lambda: None, ["--epochs", "x"], r"--epochs: invalid int value: 'x'"),
    "no such device": (lambda: None, ["--device", "mps"], r"--device mps: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(here, capsys, case):
    change, words, message = BAD[case]
    change()
    Path("submission.csv").write_text("mine")
    before = (
        {path: path.read_bytes() for path in Path("out").glob("*") if path.is_file()}
        if Path("out").is_dir()
        else {}
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert Path("submission.csv").read_text() == "mine" and not Path("runs").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_folder_of_the_users_own_is_never_removed(here, capsys):
    run("--out", "out")
    Path("out.previous").mkdir()
    Path("out.previous/thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run("--out", "out")
    assert "out.previous is not the folder of a run" in capsys.readouterr().err
    assert Path("out.previous/thesis.txt").read_text() == "mine" and Path("out").is_dir()


def test_a_finished_run_gives_its_submission_again(here):
    run("--out", "first")
    mine = Path("submission.csv").read_bytes()
    run("--out", "second", "--seed", "1")
    assert Path("submission.csv").read_bytes() != mine
    run("--out", "first", "--resume")
    assert Path("submission.csv").read_bytes() == mine == Path("first/submission.csv").read_bytes()
