"""transformer.py: its mathematics against independent references, its runs, bad input's lines."""

import csv
import gzip
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.naive_bayes import ComplementNB
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import transformer as t

SAMPLE = ROOT / "data" / "sample"
SMALL = "--epochs 1 --folds 2 --d-model 16 --nhead 2 --d-hid 32 --limit 60 --device cpu"
NO_DROPOUT = ("--dropout", "0", "--word-dropout", "0", "--r-drop", "0")
OUT = Path("runs/transformer")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in, with a copy of the sample in data/."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLE, "data")
    return tmp_path


def run(*words):
    return t.main(["--data", "data", *SMALL.split(), *words])


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


def rows_of(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def read_checkpoint(out=OUT):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def the_line(capsys):
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.replace(os.sep, "/")


def small_vocabulary(words=50):
    keys = {f"1:s{i}": i for i in range(60)}
    return t.Vocabulary({}, keys, columns=2, vectors=torch.randn(words, 8), coverage=None)


def small_model(nlayers=1):
    torch.manual_seed(0)
    config = t.Config(d_model=16, nhead=2, d_hid=32, nlayers=nlayers)
    model = t.TransformerClassifier(config, small_vocabulary(), classes=3)
    model.evidence[1:].normal_()
    model.vote_weight.data.copy_(torch.tensor([0.5, 0.25]))
    return model.eval()


def random_tokens(count, length, words=50):
    """(count, length, 4): the first 3 tokens are of column 1 and the others of column 2."""
    column = 1 + (torch.arange(length) > 2).repeat(count, 1)
    word, key, pair = torch.randint(2, words, (3, count, length))
    return torch.stack([word, column, key, pair], -1)


def random_texts(count):
    """Texts of five tokens with the words and keys 2 to 19."""
    return [torch.stack([torch.randint(2, 20, (5,)) for _ in range(4)], 1) for _ in range(count)]


# Text ---------------------------------------------------------------------------------------------
def test_tokens_know_their_column():
    tokens = t.split_text(["Oil and US", "oils us 3 OIL"], t.make_tokenizer("basic_english"))
    words, columns, keys = zip(*tokens, strict=True)
    assert words == ("oil", "and", "us", "oils", "us", "3", "oil")
    assert columns == (1, 1, 1, 2, 2, 2, 2)
    assert keys == ("1:oil", "1:and", "1:us", "2:oil", "2:us", "2:0", "2:oil")


def test_a_text_without_words_has_no_tokens():
    assert t.split_text(["", " "], t.make_tokenizer("basic_english")) == []


TOKENS = {
    "basic_english": ["the", "bank", "'", "s", "shares", "rose", "."],
    "spacy": ["the", "bank", "'s", "shares", "rose", "."],
    "nltk": ["the", "bank", "'s", "shares", "rose", "."],
    "whitespace": ["the", "bank's", "shares", "rose."],
}


@pytest.mark.parametrize("name", t.TOKENIZERS)
def test_tokens_are_lower_case_words_and_marks(name):
    assert t.make_tokenizer(name)("The bank's  shares rose.") == TOKENS[name]


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("basic_english", "torchtext.data.utils", "torchtext==0.6.0"),
        ("spacy", "spacy", "spacy"),
        ("nltk", "nltk.tokenize", "nltk"),
    ],
)
def test_a_tokenizer_that_is_not_installed_ends_with_one_line(
    here, capsys, monkeypatch, name, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        run("--tokenizer", name)
    assert stopped.value.code == 2
    line = the_line(capsys)
    assert f"--tokenizer {name}: " in line
    assert f"pip install {package})" in line
    assert not OUT.exists()


def test_vocabulary_numbers_words_columns_and_keys():
    keys = {"1:b": 1, "1:x": 2, " 1:b": 3, "1:b 1:x": 4}
    vocabulary = t.Vocabulary({"a": 2, "b": 3}, keys, 2, torch.zeros(4, 1), None)
    tokenize = t.make_tokenizer("whitespace")

    def encode(text):
        return vocabulary.encode(t.split_text([text, ""], tokenize)).tolist()

    assert encode("b x") == [[3, 1, 1, 3], [t.UNK, 1, 2, 4]]
    assert encode("x b") == [[t.UNK, 1, 2, t.NO_KEY], [3, 1, 1, t.NO_KEY]]
    assert encode("") == [[t.UNK, 1, t.NO_KEY, t.NO_KEY]]
    assert len(encode("a " * 1000)) == t.MAX_LENGTH


def test_pairs_that_are_in_two_texts_are_counted():
    tokenize = t.make_tokenizer("whitespace")
    texts = [t.split_text([text], tokenize) for text in ("a b a b", "c a b", "b c")]
    keys = t.build_vocabulary(texts, 1, None).keys
    assert set(keys) == {"<none>", "1:a", "1:b", "1:c", "1:a 1:b"}
    assert sorted(keys.values()) == list(range(5))


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


# Class evidence -----------------------------------------------------------------------------------
def test_class_evidence_leaves_the_text_itself_out():
    """What a training text reads must be the same whatever its label is."""
    torch.manual_seed(0)
    texts = random_texts(40)
    labels = torch.randint(3, (40,))
    seen = []
    for label in range(3):
        labels[5] = label
        torch.manual_seed(1)
        tables, part = t.class_evidence(texts, labels, 20, 3)
        seen.append(tables[part[5]])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])

    rows = [row for row in range(40) if part[row] != part[5]]
    without, _ = t.class_evidence([texts[row] for row in rows], labels[rows], 20, 3)
    torch.testing.assert_close(seen[2], without[0])


def test_no_training_text_reads_the_table_of_all_texts():
    _, part = t.class_evidence(random_texts(40), torch.randint(3, (40,)), 20, 3)
    assert part.min() == 1
    assert part.max() == t.PARTS


def test_evidence_is_complement_naive_bayes():
    """Summed over a text's stems and pairs it is scikit-learn's, less what all classes share."""
    torch.manual_seed(0)
    texts = random_texts(60)
    labels = torch.randint(3, (60,))
    present = np.zeros((60, 20))
    for row, text in zip(present, texts, strict=True):
        row[text[:, 2:].unique()] = 1
    reference = ComplementNB(alpha=2 / 6).fit(present, labels)
    expected = torch.tensor(2 * present @ reference.feature_log_prob_.T).float()
    expected -= expected.mean(1, keepdim=True)

    tables, _ = t.class_evidence(texts, labels, 20, 3)
    found = torch.stack([tables[0, text[:, 2:].unique()].sum(0) for text in texts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_key_that_was_never_counted_carries_no_information():
    texts = [torch.tensor([[2, 1, 1 + (row < 8), t.NO_KEY]]) for row in range(10)]
    texts.append(torch.tensor([[t.UNK, 1, t.NO_KEY, t.NO_KEY]]))  # a text without words
    tables, _ = t.class_evidence(texts, torch.tensor([0] * 8 + [1] * 3), 4, 2)
    assert not tables[:, 3].any()
    assert not tables[:, t.NO_KEY].any()
    assert tables[0, 1, 1] > 0  # key 1 is only in texts of class 1, key 2 in those of class 0
    assert tables[0, 2, 1] < 0


# Model --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_encoder_layer_equals_torch(activation):
    config = t.Config(d_model=16, nhead=4, d_hid=24, dropout=0.0, activation=activation)
    ours = t.EncoderLayer(config)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 24, 0.0, activation, batch_first=True, norm_first=True
    )
    weights = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("self_attn.", "").replace("in_proj_", "in_proj.")
        weights[name] = value
    ours.load_state_dict(weights)

    x = torch.randn(3, 7, 16)
    is_token = torch.arange(7) < torch.tensor([[7], [4], [1]])
    expected = theirs(x, src_key_padding_mask=~is_token)
    found, _ = ours(x, is_token)
    torch.testing.assert_close(found[is_token], expected[is_token])


@pytest.mark.parametrize("nlayers", [1, 2])
def test_attention_weights_are_shares_of_the_tokens(nlayers):
    model = small_model(nlayers)
    tokens = random_tokens(4, 9)
    tokens[0, 5:] = t.PAD
    _, attn_weights = model(tokens)
    torch.testing.assert_close(attn_weights.sum(-1), torch.ones(4, 2, 9))
    assert (attn_weights[0, :, :, 5:] == 0).all()


@pytest.mark.parametrize("words, count", [(["体", "育"], 1), (["net", "ball"], 0)])
def test_characters_without_a_font_are_told_once(words, count, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(t, "FONTS", ("no such font", "DejaVu Serif"))
    with t.known_fonts():
        assert matplotlib.rcParams["font.family"] == ["DejaVu Serif"]
        t.plot_attention(words, torch.eye(2), "true").savefig(tmp_path / "attention.png")
    captured = capsys.readouterr()
    assert captured.out.count("no font for some characters") == count
    assert captured.err == ""


def test_other_warnings_of_figures_are_passed_on():
    with pytest.warns(UserWarning, match="something else"), t.known_fonts():
        warnings.warn("something else", UserWarning, stacklevel=1)


def test_padding_has_no_effect():
    model = small_model(nlayers=2)
    tokens = random_tokens(1, 6)
    padded = F.pad(tokens, (0, 0, 0, 7), value=t.PAD)
    torch.testing.assert_close(model(padded)[0], model(tokens)[0])


def test_neighbours_are_read_by_a_sum_over_three_places():
    model = small_model()
    x = torch.randn(2, 5, 16)
    is_token = torch.arange(5) < torch.tensor([[5], [3]])
    expected = model.convolve.bias.expand(2, 5, 16).clone()
    for text, length in enumerate((5, 3)):
        for place in range(5):
            for offset in (-1, 0, 1):
                if 0 <= place + offset < length:  # nothing is beside the text
                    weight = model.convolve.weight[..., offset + 1]
                    expected[text, place] += weight @ F.gelu(x[text, place + offset])
    torch.testing.assert_close(model.read_neighbours(x, is_token), expected)


def test_columns_are_told_apart():
    model = small_model()
    tokens = random_tokens(1, 8)
    swapped = tokens * torch.tensor([1, -1, 1, 1]) + torch.tensor([0, 3, 0, 0])
    assert not torch.allclose(model(tokens)[0], model(swapped)[0])


def test_columns_count_alike():
    """Three tokens of the first column weigh as much as five of the second."""
    column = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])
    pooled = small_model().pool(torch.eye(8)[None], column)
    torch.testing.assert_close(pooled, torch.tensor([[1 / 6] * 3 + [1 / 10] * 5]))


def test_an_empty_column_does_not_count():
    pooled = small_model().pool(torch.eye(2)[None], torch.tensor([[2, 2]]))
    torch.testing.assert_close(pooled, torch.tensor([[1 / 2, 1 / 2]]))


def test_training_texts_bring_their_own_evidence():
    model = small_model()
    tokens = F.pad(random_tokens(4, 9), (0, 0, 0, 3))
    evidence = model.evidence[tokens[..., 2:]]
    torch.testing.assert_close(model(tokens, evidence)[0], model(tokens)[0])
    assert not torch.allclose(model(tokens, evidence + 1)[0], model(tokens)[0])


def test_words_and_pairs_vote_by_their_evidence():
    model = small_model()
    tokens = random_tokens(4, 9)
    logits, _ = model(tokens)
    model.vote_weight.data.zero_()
    votes = 0.5 * model.evidence[tokens[..., 2]].sum(1)
    votes += 0.25 * model.evidence[tokens[..., 3]].sum(1)
    torch.testing.assert_close(logits - model(tokens)[0], votes)


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    dropped = t.Dropout(0.3).train()(torch.ones(1_000_003))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.003)
    assert dropped.mean().item() == pytest.approx(1, abs=0.005)


def test_dropout_at_its_largest_keeps_some():
    torch.manual_seed(0)
    kept = t.Dropout(0.99).train()(torch.ones(100_000)).count_nonzero()
    assert 500 < kept < 2000


def test_dropout_is_off_in_evaluation():
    x = torch.randn(1000)
    assert torch.equal(t.Dropout(0.3).eval()(x), x)


# Objective and training ---------------------------------------------------------------------------
def test_drop_words_takes_word_and_key_and_keeps_the_rest():
    torch.manual_seed(0)
    tokens = F.pad(random_tokens(200, 9), (0, 0, 0, 3))
    dropped = t.drop_words(tokens, 0.3)
    changed = (dropped != tokens).any(-1)
    assert torch.equal(dropped[..., 1], tokens[..., 1])
    assert not changed[:, 9:].any()  # padding
    unknown = dropped[..., 0] != tokens[..., 0]
    assert (dropped[unknown][:, 0] == t.UNK).all()
    assert (dropped[unknown][:, 2] == t.NO_KEY).all()
    assert unknown[:, :9].float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_a_dropped_word_takes_its_pairs_along():
    torch.manual_seed(0)
    tokens = random_tokens(200, 9)
    dropped = t.drop_words(tokens, 0.3)
    unknown = dropped[..., 0] != tokens[..., 0]
    left_unknown = F.pad(unknown[:, :-1], (1, 0))
    expected = tokens[..., 3].masked_fill(unknown | left_unknown, t.NO_KEY)
    assert torch.equal(dropped[..., 3], expected)


def test_r_drop_loss_equals_reference():
    torch.manual_seed(0)
    logits = torch.randn(10, 4)
    labels = torch.randint(4, (5,))
    loss, nll = t.r_drop_loss(logits, labels, 0.7)

    p, q = (torch.distributions.Categorical(logits=half) for half in logits.chunk(2))
    kl = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    expected = -(p.log_prob(labels) + q.log_prob(labels)).sum() / 2
    torch.testing.assert_close(nll, expected / 5)
    torch.testing.assert_close(loss, (expected + 0.7 * kl.sum() / 2) / 5)


def test_without_weight_it_is_plain_cross_entropy():
    logits = torch.randn(10, 4)
    labels = torch.randint(4, (5,))
    loss, nll = t.r_drop_loss(logits, labels, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels.repeat(2)))
    torch.testing.assert_close(loss, nll)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [t.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[9] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_no_text_is_left_out_of_every_epoch():
    """Not the longest ones either, where the rows do not fill whole batches."""
    texts = [torch.zeros(length, 4, dtype=torch.int64) for length in range(1, 101)]
    seen = set()
    for epoch in range(10):
        for batch in t.length_batches(texts, 32, torch.Generator().manual_seed(epoch)):
            seen |= set(batch.tolist())
    assert seen == set(range(100))


def test_length_batches_hold_each_row_once_and_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 80, (1000,), generator=generator).tolist()
    texts = [torch.ones(length, 4) for length in lengths]
    batches = t.length_batches(texts, 32, generator)
    rows = torch.cat(batches).tolist()
    assert len(rows) == 992  # what fills no batch is left out
    assert len(set(rows)) == 992
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths[row] for row in rows)


@pytest.mark.parametrize("texts, expected", [(100, 32), (31, 30), (2, 2)])
def test_processes_get_equal_slices(monkeypatch, texts, expected):
    monkeypatch.setattr(t, "WORLD_SIZE", 2)
    assert t.batch_size_for(texts, t.Config(batch_size=32)) == expected


def test_fewer_texts_than_processes_are_too_few(monkeypatch):
    monkeypatch.setattr(t, "WORLD_SIZE", 4)
    with pytest.raises(t.UserError, match="3 training texts are too few for 4 processes"):
        t.batch_size_for(3, t.Config())


def test_training_texts_read_the_table_of_their_own_part(monkeypatch):
    texts = [torch.tensor([[2 + row, 1, 3, 5], [2 + row, 2, 4, 6]]) for row in range(40)]
    part = 1 + torch.arange(40) % t.PARTS
    tables = torch.arange(1.0 + t.PARTS)[:, None, None].expand(-1, 60, 3)  # table p is full of p
    monkeypatch.setattr(t, "class_evidence", lambda *args: (tables, part))
    model = small_model()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))

    config = t.Config(epochs=1, batch_size=20, word_dropout=0.0)
    t.train(model, texts, torch.arange(40) % 3, config, 0, tqdm(disable=True))
    assert len(seen) == 2
    for tokens, evidence in seen:
        rows = tokens[..., 0] - 2
        assert (evidence == part[rows][..., None, None]).all()


def test_overfits_32_texts(here):
    run(*NO_DROPOUT, "--epochs", "150", "--lr", "3e-3", "--limit", "64")  # two folds of 32
    last = rows_of(OUT / "history.csv")[-1]
    assert float(last[2]) < 0.05


def test_out_of_fold_means_not_trained_on(here):
    """Labels that are noise can be learned by heart, but not predicted."""
    rows = rows_of("data/train.csv")
    generator = torch.Generator().manual_seed(0)
    for row in rows[1:]:
        row[1] = str(torch.randint(4, (1,), generator=generator).item())
    write_rows("data/train.csv", rows)
    metrics = run("--epochs", "50", "--lr", "1e-2", "--limit", "100", *NO_DROPOUT)
    last = rows_of(OUT / "history.csv")[-1]
    assert float(last[2]) < 0.3
    assert metrics["oof_accuracy"] < 0.45


# What follows from the texts ----------------------------------------------------------------------
def texts_of(*lengths):
    return [("w " * length,) for length in lengths]


def test_words_are_dropped_less_often_in_short_texts():
    def word_dropout(*lengths, **settings):
        return t.fill_defaults(t.Config(**settings), texts_of(*lengths)).word_dropout

    assert word_dropout(45, 45, 45) == pytest.approx(0.3)
    assert word_dropout(3, 9, 500) == pytest.approx(0.3 * 9 / 45)
    assert word_dropout(400, 500) == pytest.approx(0.3)
    assert word_dropout(5, 5, word_dropout=0.25) == 0.25


def test_much_text_is_read_in_fewer_epochs(monkeypatch, capsys):
    def epochs(count, **settings):
        return t.fill_defaults(t.Config(folds=5, **settings), texts_of(*[10] * count)).epochs

    monkeypatch.setattr(t, "MAX_TOKENS", 1000)
    assert epochs(1) == t.MAX_EPOCHS
    assert epochs(5) == 5  # four fifths of 50 tokens, by each of five models, five times
    assert epochs(1000) == 1
    assert epochs(1000, epochs=9) == 9
    assert "training  1 epochs (fewer than usual" in capsys.readouterr().out


def test_texts_without_words_have_defaults():
    config = t.fill_defaults(t.Config(), [("",), (" ",)])
    assert config.word_dropout == 0
    assert config.epochs == t.MAX_EPOCHS


def test_the_settings_in_use_are_kept(here):
    run("--limit", "40")
    config = json.loads((OUT / "config.json").read_text())
    assert config["settings"]["epochs"] == 1
    assert 0 < config["settings"]["word_dropout"] <= 0.3


# Calibration --------------------------------------------------------------------------------------
def test_calibration_error_equals_numpy():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.5] * 4, 1000)
    labels = rng.integers(0, 4, 1000)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = t.calibration_error(torch.from_numpy(probabilities), torch.from_numpy(labels))
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_sure_and_right_model_is_calibrated():
    labels = torch.arange(4)
    assert t.calibration_error(torch.eye(4), labels) == 0
    assert t.calibration_error(torch.eye(4).roll(1, 0), labels) == 1


def test_temperature_is_the_likeliest_one():
    """Labels are drawn from logits that the model doubles. SciPy finds the same minimum."""
    torch.manual_seed(0)
    logits = torch.randn(2000, 4)
    labels = logits.softmax(1).multinomial(1)[:, 0]
    probabilities = (2 * logits).softmax(1)

    def nll(T):
        return -(2 * logits / T).log_softmax(1)[range(2000), labels].mean().item()

    expected = minimize_scalar(nll, bounds=(0.5, 3), method="bounded").x
    assert t.fit_temperature(probabilities, labels) == pytest.approx(expected, abs=0.01)
    assert expected == pytest.approx(2, abs=0.2)


def test_a_temperature_changes_the_confidence_alone():
    model = small_model()
    tokens = random_tokens(4, 9)
    logits, _ = model(tokens)
    model.temperature.fill_(2.0)
    torch.testing.assert_close(model(tokens)[0], logits / 2)


def test_each_model_has_the_temperature_of_its_held_out_texts(here):
    run("--epochs", "3", "--lr", "1e-2")
    labels = torch.tensor([int(row[1]) - 1 for row in rows_of(OUT / "oof_predictions.csv")[1:]])
    for fold in read_checkpoint()["folds"]:
        # Once divided by their temperature, the logits need no other.
        again = t.fit_temperature(fold["probabilities"], labels[fold["held_out"]])
        at_an_end = fold["weights"]["temperature"].item() in (0.5, 3.0)
        assert at_an_end or again == pytest.approx(1, abs=0.02)


# Runs ---------------------------------------------------------------------------------------------
def test_metrics_are_those_of_the_files(here):
    metrics = run()
    assert metrics == json.loads((OUT / "metrics.json").read_text())
    assert set(metrics) == {
        "oof_accuracy",
        "oof_accuracy_se",
        "ece",
        "fold_accuracy",
        "vector_coverage",
        "parameters",
        "seconds",
    }
    _, *oof = rows_of(OUT / "oof_predictions.csv")
    right = [row[1] == row[2] for row in oof]
    assert metrics["oof_accuracy"] == pytest.approx(np.mean(right))
    error = np.std(right) / math.sqrt(60)
    assert metrics["oof_accuracy_se"] == pytest.approx(error)
    folds = read_checkpoint()["folds"]
    shares = [np.mean([right[row] for row in fold["held_out"]]) for fold in folds]
    assert metrics["fold_accuracy"] == pytest.approx(shares)


def test_a_run_leaves_its_files(here):
    run()
    left = {path.name for path in OUT.iterdir()}
    assert {"config.json", "history.csv", "checkpoint.pt", "learning-curve.png"} <= left
    assert not any(name.startswith(".") for name in left)
    config = json.loads((OUT / "config.json").read_text())
    assert len(config["settings"]["train_sha256"]) == 64
    assert len(config["script_sha256"]) == 64
    assert config["device"] == "cpu"


def test_submission_has_the_rows_of_the_test_file(here):
    run()
    header, *rows = rows_of("submission.csv")
    _, *test = rows_of("data/test.csv")
    assert header == ["Id", "Category"]
    assert [row[0] for row in rows] == [row[0] for row in test]
    assert {row[1] for row in rows} <= {"1", "2", "3", "4"}


@pytest.mark.parametrize(
    "words", [(), ("--activation", "relu", "--tokenizer", "whitespace", "--optimizer", "sgd")]
)
def test_finished_models_predict_as_in_their_run(here, words):
    """Each text is classified by the model that was not trained on it, test texts by all."""
    run(*words)
    models, checkpoint = t.load_finished(OUT)
    folds = checkpoint["folds"]
    assert sorted(row for fold in folds for row in fold["held_out"]) == list(range(60))

    _, *oof = rows_of(OUT / "oof_predictions.csv")
    texts = [row[-1].split("\t") for row in oof]
    for model, fold in zip(models, folds, strict=True):
        p = t.classify([model], checkpoint, [texts[row] for row in fold["held_out"]])
        torch.testing.assert_close(fold["probabilities"], p, atol=1e-5, rtol=0)
        written = torch.tensor([float(oof[row][3]) for row in fold["held_out"]])
        torch.testing.assert_close(written, p.max(1).values, atol=1e-4, rtol=0)

    _, *test = rows_of("data/test.csv")
    p = t.classify(models, checkpoint, [row[1:] for row in test])
    answers = [checkpoint["classes"][i] for i in p.argmax(1)]
    assert answers == [row[1] for row in rows_of("submission.csv")[1:]]


def test_a_run_that_starts_over_keeps_the_old_one(here, capsys):
    first = run()
    second = run()
    assert without_seconds(first) == without_seconds(second)
    assert Path("runs/transformer.previous/checkpoint.pt").exists()
    assert f"earlier run as {OUT}.previous" in capsys.readouterr().out


def test_another_seed_gives_another_run(here):
    assert without_seconds(run()) != without_seconds(run("--seed", "1"))


def test_a_finished_run_gives_its_metrics_and_submission_again(here, capsys):
    metrics = run("--out", "first")
    mine = Path("submission.csv").read_bytes()
    run("--out", "second", "--seed", "1")
    assert Path("submission.csv").read_bytes() != mine

    assert run("--out", "first", "--resume") == metrics
    assert "first was finished before" in capsys.readouterr().out
    assert Path("submission.csv").read_bytes() == mine
    assert Path("first/submission.csv").read_bytes() == mine


def test_predict_prints_class_confidence_and_text(here, capsys):
    run()
    capsys.readouterr()
    found = t.main(["--predict", "The striker scored\tin the final"])
    label, confidence, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert label == found["labels"][0]
    assert float(confidence) == pytest.approx(found["confidence"][0], abs=5e-4)
    assert text == "The striker scored in the final"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_predict_reads_a_file_with_a_text_a_line(here, encoding):
    run()
    text = "The striker scored twice in the final"
    alone = t.main(["--predict", text])
    Path("lines.txt").write_text(f"{text}\n\n", encoding=encoding)
    lines = t.main(["--predict", "lines.txt"])
    assert len(lines["labels"]) == 2
    assert lines["labels"][0] == alone["labels"][0]
    assert lines["confidence"][0] == pytest.approx(alone["confidence"][0])


def test_a_tab_parts_title_and_description(here):
    run()
    parted = t.main(["--predict", "Oil prices\tfell on Monday"])
    whole = t.main(["--predict", "Oil prices fell on Monday"])
    assert parted["confidence"] != whole["confidence"]


# Resume -------------------------------------------------------------------------------------------
def interrupted(monkeypatch, step, *words):
    """Let Ctrl-C stop a run in this step."""
    learning_rate = t.learning_rate
    steps = iter(range(10_000))

    def interrupting(*args):
        if next(steps) == step:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(t, "learning_rate", interrupting)
        run(*words)
    assert stopped.value.code == 130


def test_resume_in_the_second_model_equals_no_interruption(here, monkeypatch, capsys):
    words = ["--epochs", "2", "--batch-size", "8"]
    whole = run(*words)
    submission = Path("submission.csv").read_bytes()
    history = (OUT / "history.csv").read_bytes()

    capsys.readouterr()
    interrupted(monkeypatch, 10, *words, "--out", "other")
    assert "--resume continues" in capsys.readouterr().out
    assert len(read_checkpoint(Path("other"))["folds"]) == 1
    assert without_seconds(run(*words, "--out", "other", "--resume")) == without_seconds(whole)
    assert Path("submission.csv").read_bytes() == submission
    assert Path("other/history.csv").read_bytes() == history


def test_resume_with_nothing_saved_starts_from_the_beginning(here, monkeypatch):
    interrupted(monkeypatch, 0)
    assert not (OUT / "checkpoint.pt").exists()
    assert without_seconds(run("--resume")) == without_seconds(run("--out", "other"))


def test_metrics_without_a_checkpoint_are_no_finished_run(here, monkeypatch):
    metrics = run()
    (OUT / "checkpoint.pt").unlink()
    interrupted(monkeypatch, 1, "--seed", "1")
    assert without_seconds(run("--seed", "1", "--resume")) != without_seconds(metrics)


def test_ctrl_c_in_a_prediction_advises_no_resume(here, monkeypatch, capsys):
    def interrupting(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(t, "predict", interrupting)
    with pytest.raises(SystemExit) as stopped:
        t.main(["--predict", "a text"])
    assert stopped.value.code == 130
    assert capsys.readouterr().out == "stopped\n"


VECTORS = "the 1 2 3 4\nof 4 3 2 1\n"


@pytest.mark.parametrize("before, after", [(None, VECTORS), (VECTORS, VECTORS + "in 2 2 1 1\n")])
def test_resume_refuses_other_vectors(here, capsys, before, after):
    path = Path("data/glove.tiny.txt")
    if before:
        path.write_text(before)
    run()
    path.write_text(after)
    with pytest.raises(SystemExit):
        run("--resume")
    assert "trained with other contents of vectors" in the_line(capsys)


def test_weights_that_do_not_fit_end_with_one_line(here, capsys):
    run()
    checkpoint = read_checkpoint()
    checkpoint["settings"]["d_hid"] = 8
    torch.save(checkpoint, OUT / "checkpoint.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        t.main(["--predict", "a text"])
    assert "size mismatch" in the_line(capsys)


def test_another_version_is_refused(here, capsys):
    run()
    torch.save(read_checkpoint() | {"version": "transformer 1"}, OUT / "checkpoint.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        t.main(["--predict", "a text"])
    assert f"not a checkpoint of {t.CHECKPOINT_VERSION}" in the_line(capsys)


def test_a_loss_that_is_not_finite_ends_with_one_line(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--lr", "1e38", "--epochs", "9", "--optimizer", "sgd")
    assert stopped.value.code == 2
    assert re.search(r"not finite in model \d, epoch \d\. Lower --lr", the_line(capsys))


def test_a_bug_keeps_its_traceback(here, monkeypatch):
    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(t, "learning_rate", broken)
    with pytest.raises(ValueError, match="a bug"):
        run()


# Formats ------------------------------------------------------------------------------------------
def test_rows_without_text_keep_their_place(here):
    """In a file of one column, too, where a row is an empty quoted field or blanks."""
    rows = rows_of("data/train.csv")
    write_rows("data/train.csv", [["Category", "Title"], *(row[1:3] for row in rows[1:])])
    Path("data/test.csv").write_text('Title\nA late goal\n""\n   \nOil fell\n\n', encoding="utf-8")
    run()
    assert [row[0] for row in rows_of("submission.csv")] == ["Id", "1", "2", "3", "4"]


def test_2021_format_and_labels_as_they_came(here, capsys):
    names = {"1": "world", "2": "sport", "3": "business", "4": "tech"}
    rows = []
    for number, row in enumerate(rows_of("data/train.csv")[1:]):
        rows.append([number, names[row[1]], row[2]])
    write_rows("data/train.csv", [["Id", "Category", "Title"], *rows])
    test = [["0", "A late goal"], ["1", "Oil prices fell"], ["2", ""]]
    write_rows("data/test.csv", [["Id", "Title"], *test])
    run("--limit", "200")
    out = capsys.readouterr().out
    assert "text Title; label Category; id Id" in out
    assert "the same without --limit" in out
    header, *submission = rows_of("submission.csv")
    assert [row[0] for row in submission] == ["0", "1", "2"]
    assert {row[1] for row in submission} <= set(names.values())


def test_columns_are_found_by_name_in_any_case(here, capsys):
    rows = rows_of("data/train.csv")
    write_rows("data/train.csv", [["ID", "LABEL", "Title", "Description"], *rows[1:]])
    rows = rows_of("data/test.csv")
    write_rows("data/test.csv", [["ID", "Title", "Description"], *rows[1:]])
    run()
    assert "text Title, Description; label LABEL; id ID" in capsys.readouterr().out


def test_numbers_as_labels_stand_in_order(here):
    rows = rows_of("data/train.csv")
    for row in rows[1:]:
        row[1] = {"1": "10", "2": "9", "3": "b", "4": "a"}[row[1]]
    write_rows("data/train.csv", rows)
    news = t.load_news(Path("data"), t.Config())
    assert news.classes == ["9", "10", "a", "b"]


def test_texts_of_few_words(here):
    """Fewer stems than the vectors have numbers."""
    rows = [[i, i % 2, f"hello world number {i}"] for i in range(8)]
    write_rows("data/train.csv", [["Id", "Category", "Title"], *rows])
    write_rows("data/test.csv", [["Id", "Title"], [1, ""]])
    assert run("--vectors", "none")["oof_accuracy"] >= 0


def test_a_file_without_header_has_numbered_columns(here):
    """As AG News' own: class, title, description."""
    write_rows("data/train.csv", [row[1:] for row in rows_of("data/train.csv")[1:]])
    write_rows("data/test.csv", [["3", *row[1:]] for row in rows_of("data/test.csv")[1:]])
    run("--limit", "200", "--label-column", "1")
    rows = rows_of("submission.csv")
    assert rows[0] == ["Id", "1"]
    assert rows[1][0] == "1"


def test_missing_text_is_a_warning_with_a_count(here, capsys):
    rows = rows_of("data/train.csv")
    for row in rows[1:4]:
        row[2:] = ["", ""]
    write_rows("data/train.csv", rows)
    run("--limit", "400")
    assert "3 of 320 rows have no text" in capsys.readouterr().out


@pytest.mark.parametrize("header", ["", "5000 4\n"], ids=["glove", "word2vec"])
def test_vectors_are_read_at_unit_variance(here, header, monkeypatch):
    monkeypatch.setattr(t, "FREQUENT", 3)
    lines = ["the 1 2 3 4", "said -1e-3 .5 0 1 ", "a . . 9 9 9 9", "never-seen 0 0 0 0"]
    path = Path("glove.tiny.txt")
    path.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    vectors = t.read_vectors(path, {"the", "said", "a"})
    assert set(vectors) == {"the", "said"}  # a word with blanks inside is no word of the texts
    spread = np.std([1, 2, 3, 4, -1e-3, 0.5, 0, 1])
    assert vectors["said"] * spread == pytest.approx([-1e-3, 0.5, 0, 1])


def test_vectors_beside_the_data_are_used(here, capsys):
    Path("data/glove.tiny.txt").write_text("the 1 2 3 4\nsaid -1e-3 .5 0 1\n")
    coverage = run()["vector_coverage"]
    assert 0.02 < coverage < 0.2
    assert f"glove.tiny.txt: {coverage:.1%}" in capsys.readouterr().out
    assert run("--vectors", "none")["vector_coverage"] is None


def test_words_that_no_text_had_keep_their_vectors(here):
    """The first words of the file, its most frequent, are there for new texts."""
    Path("data/glove.tiny.txt").write_text("the 1 2 3 4\nxyzzy 4 3 2 1\n")
    run()
    vocabulary = t.Vocabulary(**read_checkpoint()["vocabulary"])
    [[word, _, _, _]] = vocabulary.encode([t.Token("xyzzy", 1, "1:xyzzy")])
    ratio = vocabulary.vectors[word] / vocabulary.vectors[vocabulary.words["the"]]
    torch.testing.assert_close(ratio, torch.tensor([4, 1.5, 2 / 3, 0.25]))


@pytest.mark.figures
def test_dollars_are_no_formulas(here):
    figure = t.plot_attention(["$_$", "5%$6", "${$"], torch.full((3, 3), 0.2), "from $1_ to $2^")
    figure.savefig("attention.png")
    rows = rows_of("data/train.csv")
    for row in rows[1:]:
        row[1] = {"1": "$_$", "2": "$^$", "3": "3", "4": "4"}[row[1]]
    write_rows("data/train.csv", rows)
    run()
    assert (OUT / "learning-curve.png").stat().st_size > 10_000


# Other people's files ----------------------------------------------------------------------------
TITLES = {"sport": "The striker scored a late goal", "money": "Oil prices and shares fell"}
LABELS = ["sport", "money"] * 12
TEXTS = [f"{TITLES[label]}, story {i}" for i, label in enumerate(LABELS)]


def save(name, rows, separator=",", encoding="utf-8"):
    """Write a file into data/; text stays as it is, rows are written with their separator."""
    if not isinstance(rows, str):
        rows = "".join(separator.join(map(str, row)) + "\n" for row in rows)
    Path("data", name).write_bytes(rows.encode(encoding))


def save_pair(separator=",", encoding="utf-8"):
    """A train.csv of 24 rows whose texts have no comma, and a test.csv of three, ids from 7."""
    texts = [text.replace(",", "") for text in TEXTS]
    train = [[i, label, text] for i, (label, text) in enumerate(zip(LABELS, texts, strict=True))]
    save("train.csv", [["Id", "Category", "Title"], *train], separator, encoding)
    test = [[7, texts[1]], [9, texts[0]], [8, texts[3]]]
    save("test.csv", [["Id", "Title"], *test], separator, encoding)
    return texts


def labelled_texts():
    return zip(LABELS, save_pair(), strict=True)


def load(**settings):
    return t.load_news(Path("data"), t.Config(folds=2, **settings))


@pytest.mark.parametrize(
    "name",
    ["ArticleId", "text_id", "IdCustomer", "PhraseId", "textID", "ID", "Row Id", "articleid", ""],
)
def test_ids_are_found_by_a_word_of_their_name(here, name):
    save("train.csv", [[name, "Text", "Label"], *zip(range(50, 74), TEXTS, LABELS, strict=True)])
    save("test.csv", [[name, "Text"], [31, TEXTS[0]], [30, TEXTS[1]]])
    save("train.csv", Path("data/train.csv").read_text().replace(", story", " story"))
    save("test.csv", Path("data/test.csv").read_text().replace(", story", " story"))
    news = load()
    assert news.columns.texts == ["Text"]
    assert news.train.ids == [str(number) for number in range(50, 74)]
    assert news.test.ids == ["31", "30"]
    assert news.header == [name or "Id", "Label"]


@pytest.mark.parametrize("name", ["covid", "idea", "Said", "bid", "android"])
def test_id_inside_a_word_is_no_id(here, name):
    assert not t.has_id_word(name)


@pytest.mark.parametrize("name, flag", [("id", None), ("row", "row"), ("text_id", None)])
def test_ids_may_stand_in_the_test_file_alone(here, name, flag):
    save("train.csv", [["body", "label"], *zip(save_pair(), LABELS, strict=True)])
    save("test.csv", [[name, "body"], ["a0", "A late goal"], ["a7", "Oil fell"]])
    run("--limit", "24", *(["--id-column", flag] if flag else []))
    header, *rows = rows_of("submission.csv")
    assert header == [name, "label"]
    assert [row[0] for row in rows] == ["a0", "a7"]


def test_of_two_columns_of_ids_the_unique_one_is_taken_and_none_is_read(here, capsys):
    train = [[i // 4, i + 5, text, label] for i, (label, text) in enumerate(labelled_texts())]
    save("train.csv", [["SentenceId", "PhraseId", "Phrase", "Label"], *train])
    save("test.csv", [["SentenceId", "PhraseId", "Phrase"], [1, 90, "A goal"], [2, 80, "Oil"]])
    news = load()
    assert news.test.ids == ["90", "80"]
    assert news.columns.texts == ["Phrase"]
    assert "column SentenceId holds ids and is not read as text" in capsys.readouterr().out


def test_ids_made_up_are_a_warning_at_the_end_too(here, capsys):
    save("train.csv", [["label", "text"], *zip(LABELS, save_pair(), strict=True)])
    save("test.csv", [["text"], ["A goal"], ["Oil"]])
    run("--limit", "24")
    assert [row[0] for row in rows_of("submission.csv")] == ["Id", "1", "2"]
    start, end = capsys.readouterr().out.split("model 2")
    for part in (start, end):
        assert "warning   test.csv has no ids; its rows are counted from 1." in part


@pytest.mark.parametrize(
    "name, content, header",
    [
        ("sample_submission.csv", "Id,Prediction\n1,sport\n", ["Id", "Prediction"]),
        ("SampleSubmission.csv", "rowId,Answer\n9,a\n8,a\n7,a\n", ["rowId", "Answer"]),
        ("sample.csv", "Other,Prediction\n1,sport\n", ["Id", "Category"]),
        ("sample.csv", "Id,Prediction,More\n7,a,b\n", ["Id", "Category"]),
        ("sample.csv", 'Id,"Prediction\n', ["Id", "Category"]),
    ],
)
def test_the_header_of_a_sample_submission_is_used(here, name, content, header):
    save_pair()
    save(name, content)
    run("--limit", "24")
    assert rows_of("submission.csv")[0] == header
    assert [row[0] for row in rows_of("submission.csv")[1:]] == ["7", "9", "8"]


def test_a_sample_submission_has_the_ids_that_the_test_file_lacks(here):
    save_pair()
    save("test.csv", [["Title"], ["A goal"], ["Oil"]])
    save("sample_submission.csv", "id,answer\n0,x\n1,x\n")
    news = load()
    assert news.header == ["id", "answer"]
    assert news.test.ids == ["0", "1"]


def test_label_name_is_the_header_of_the_labels(here):
    save_pair()
    run("--limit", "24", "--label-name", "Prediction")
    assert rows_of("submission.csv")[0] == ["Id", "Prediction"]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_read_and_named(here, capsys, separator):
    save_pair()
    expected = load()
    save_pair(separator)
    for name in ("train.csv", "test.csv"):
        save(name, Path("data", name).read_text().replace(" scored", ", scored"))
    news = load()
    assert f"train.csv: the separator is {separator!r}" in capsys.readouterr().out
    assert news.test.ids == expected.test.ids
    assert torch.equal(news.labels, expected.labels)
    assert news.train.texts[0] == (expected.train.texts[0][0].replace(" scored", ", scored"),)


def test_a_test_file_of_one_column_has_the_training_files_separator(here):
    save("train.csv", [["label", "text"], *labelled_texts()], "\t")
    save("test.csv", "text\nA goal, late\nOil; shares, too, fell\n")
    assert load().test.texts == [("A goal, late",), ("Oil; shares, too, fell",)]


def test_a_header_is_one_though_a_row_says_the_same(here):
    save_pair()
    save("test.csv", "Title\nTitle\nOil fell\n")
    assert load().test.texts == [("Title",), ("Oil fell",)]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_what_excel_saves_is_read(here, capsys, encoding):
    save_pair("\t")
    text = Path("data/train.csv").read_text().replace("striker", "Café’s striker")
    save("train.csv", text, encoding=encoding)
    assert load().train.texts[0][0].startswith("The Café’s striker")
    assert ("read as cp1252" in capsys.readouterr().out) == (encoding == "cp1252")


def test_quotes_are_read_as_by_pandas(here):
    save_pair()
    text = 'Id,Category,Title\n0,sport,"Quoted" word, then "more\n'.replace(", then", " then")
    rows = Path("data/train.csv").read_text().split("\n", 1)[1]
    save("train.csv", text + rows.replace("0,", "99,", 1))
    expected = pd.read_csv("data/train.csv", dtype=str)
    assert load().train.texts[0] == ('Quoted word then "more',)
    assert [text for (text,) in load().train.texts] == expected.Title.tolist()


def test_fields_have_any_length(here):
    texts = save_pair()
    long = "goal " * 40_000
    with open("data/train.csv", "a") as file:
        file.write(f"99,sport,{long}\n")
    news = load()
    assert news.train.texts == [*((text,) for text in texts), (long.strip(),)]


def test_empty_columns_and_rows_are_left_out_and_counted(here, capsys):
    """As Excel leaves them; rows may also lack a comma or have one more."""
    texts = save_pair()
    rows = [[label, text, "", ""] for label, text in zip(LABELS, texts, strict=True)]
    rows[5:5] = [["", " ", "", ""]] * 2
    save("train.csv", [[""] * 4, ["label", "text", "", ""], *rows, [""] * 9])
    save("test.csv", [["id", "text"], [4, "A goal"], ["", ""], [2, "Oil", "", ""], ["", ""]])
    news = load()
    out = capsys.readouterr().out
    assert news.train.texts == [(text,) for text in texts]
    assert news.test == (["4", "2"], [("A goal",), ("Oil",)])
    assert "train.csv: 2 empty columns without a name left out" in out
    assert "train.csv: 3 blank rows left out" in out
    assert "test.csv: 2 blank rows left out" in out


def test_columns_without_a_name_are_left_out_with_their_rows_counted(here, capsys):
    """As in spam.csv, where unnamed columns hold the ends of a few texts."""
    rows = [["label", "text", "", ""]]
    for label, text in zip(LABELS, save_pair(), strict=True):
        rows.append([label, text, "more" if len(rows) < 4 else "", ""])
    save("train.csv", rows)
    save("test.csv", [["text"], ["A goal"]])
    assert load().columns.texts == ["text"]
    assert "column Unnamed: 2 has no name and 3 filled rows" in capsys.readouterr().out


def test_leading_blank_lines_are_skipped(here):
    save_pair()
    expected = load()
    for name in ("train.csv", "test.csv"):
        save(name, "\n \n\n" + Path("data", name).read_text())
    news = load()
    assert news.train == expected.train
    assert news.test == expected.test


def test_ids_that_are_counted_keep_their_place(here):
    """A blank row between others of a file without ids has its number, though it is left out."""
    save(
        "train.csv",
        [["label", "a", "b"], *((label, text, "x") for label, text in labelled_texts())],
    )
    save("test.csv", [["a", "b"], ["A goal", "x"], ["", ""], ["Oil", "y"]])
    assert load().test.ids == ["1", "3"]


NO_HEADER = {
    "class, title, text": (lambda i: [i % 2 + 1, f"title {i}", f"text {i}"], 0),
    "id, label, text": (lambda i: [i + 40, LABELS[i], f"text {i}"], 1),
    "label, text": (lambda i: [LABELS[i], f"text {i}"], 0),
    "text, label": (lambda i: [f"text {i}", LABELS[i]], 1),
}


@pytest.mark.parametrize("kind", NO_HEADER)
@pytest.mark.parametrize("labelled", [True, False])
def test_files_without_header_are_read_alike(here, capsys, kind, labelled):
    """A test file has the training file's columns, or all but the label."""
    make, place = NO_HEADER[kind]
    rows = [make(i) for i in range(24)]
    save("train.csv", rows)
    tests = rows[3:6] if labelled else [row[:place] + row[place + 1 :] for row in rows[3:6]]
    save("test.csv", tests)
    news = load()
    assert news.columns.label == str(place + 1)
    assert f"no header; column {place + 1} has the fewest values" in capsys.readouterr().out
    assert len(news.labels) == 24
    assert news.test.texts == news.train.texts[3:6]
    assert news.test.texts[0][-1] == "text 3"
    assert news.test.ids == (["43", "44", "45"] if kind[0] == "i" else ["1", "2", "3"])
    assert news.header == ["Id", str(place + 1)]


def test_a_column_that_gives_the_answer_away_is_left_out(here, capsys):
    numbers = {"sport": 0, "money": 1}
    rows = [[text, numbers[label], label] for label, text in labelled_texts()]
    save("train.csv", [["text", "label", "label_text"], *rows])
    save("test.csv", [["text"], ["A goal"]])
    run("--limit", "24")
    start, end = capsys.readouterr().out.split("model 2")
    for part in (start, end):
        assert "warning   column label_text gives the answer away" in part
    assert read_checkpoint()["vocabulary"]["columns"] == 1
    with pytest.raises(t.UserError, match=r"test.csv: no label_text column"):
        load(text_columns=["text", "label_text"])


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_texts_that_are_there_twice_give_nothing_away(here, copies):
    rows = [[f"{label} {i}", text, label] for i, (label, text) in enumerate(labelled_texts())]
    save("train.csv", [["title", "text", "label"], *(rows * copies)])
    save("test.csv", [["title", "text"], ["A goal", "late"]])
    assert load().columns.texts == ["title", "text"]


def test_a_set_of_almost_one_class_is_trained_on_and_said_to_be_so(here, capsys):
    rows = [[i, "rare" if i % 20 == 7 else "usual", f"text {i}"] for i in range(200)]
    save("train.csv", [["Id", "Label", "Text"], *rows])
    save("test.csv", [["Id", "Text"], [0, "text"]])
    run("--limit", "200")
    start, end = capsys.readouterr().out.split("model 2")
    for part in (start, end):
        assert "warning   95.0% of the rows are of class usual" in part


def test_predict_prints_the_names_of_the_classes(here, capsys):
    save("train.csv", [["Label", "Text"], *labelled_texts()])
    save("test.csv", [["Text"], ["A goal"]])
    run("--limit", "24")
    capsys.readouterr()
    t.main(["--predict", "A goal"])
    assert capsys.readouterr().out.split("\t")[0] in ("sport", "money")


def test_the_limit_is_drawn_by_class(here):
    rows = [[i, "rare" if i % 50 == 7 else f"class {i % 3}", f"text {i}"] for i in range(300)]
    save("train.csv", [["Id", "Label", "Text"], *rows])
    save("test.csv", [["Id", "Text"], [0, "text"]])
    whole = load()
    news = load(limit=60)
    counts = torch.bincount(news.labels).tolist()
    assert news.classes == ["rare", "class 0", "class 1", "class 2"]
    assert counts[0] == 2  # a row for each fold
    assert min(counts[1:]) >= 18
    assert news.train.ids == sorted(news.train.ids, key=int)
    assert load(limit=300).train == whole.train
    assert load(limit=60, seed=1).train != news.train


def test_languages_without_blanks_have_a_token_a_character():
    tokenize = t.make_tokenizer("basic_english")
    words = [token.word for token in t.split_text(["球员进球。Oil 100 ราคา 日本の"], tokenize)]
    assert words == [*"球员进球", "。oil", "100", *"ราคา", *"日本の"]


def test_chinese_texts_are_learned(here):
    words = {"体育": "球员教练比赛进球", "财经": "股票市场银行油价"}
    train = [[i, name, text[i % 5 : i % 5 + 4]] for i in range(30) for name, text in words.items()]
    save("train.csv", [["Nr", "Category", "Title"], *train])
    save("test.csv", [["Title"], ["教练比赛"], ["市场银行"]])
    run("--text-columns", "Title", "--epochs", "8", "--lr", "1e-2")
    assert [row[1] for row in rows_of("submission.csv")[1:]] == ["体育", "财经"]


@pytest.mark.parametrize("name", ["glove.tiny.txt.gz", "tiny.vec.gz", "glove.tiny.txt", "tiny.vec"])
def test_packed_vectors_beside_the_data_are_used_and_a_bom_is_none_of_the_word(here, name):
    content = "the 1 2 3 4\nsaid -1e-3 .5 0 1\n".encode("utf-8-sig")
    Path("data", name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = t.find_vectors(None, Path("data"))
    assert found == Path("data", name)
    vectors = t.read_vectors(found, {"the", "said"})
    assert list(vectors) == ["the", "said"]
    assert vectors["the"] / vectors["said"][3] == pytest.approx([1, 2, 3, 4])


# From an empty folder -----------------------------------------------------------------------------
COMMAND = [sys.executable, "transformer.py"]


def start(folder, *words):
    return subprocess.run([*COMMAND, *words], cwd=folder, capture_output=True, text=True)


def test_a_script_alone_says_where_the_data_comes_from(tmp_path):
    shutil.copy(ROOT / "transformer.py", tmp_path)
    done = start(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no data here. The real train.csv and test.csv come from")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["transformer.py"]


def test_a_script_alone_trains_and_predicts(tmp_path):
    shutil.copy(ROOT / "transformer.py", tmp_path)
    done = start(tmp_path, "--data", str(SAMPLE), *SMALL.split())
    assert done.returncode == 0
    assert (tmp_path / "submission.csv").exists()

    # `| head -1` closes the pipe while more is left to write than it holds.
    (tmp_path / "lines.txt").write_text("Oil prices fell on Monday\n" * 5000, encoding="utf-8")
    command = [*COMMAND, "--predict", "lines.txt"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as head:
        assert "Oil prices" in head.stdout.readline()
        head.stdout.close()
        assert head.stderr.read() == ""


# Bad input ----------------------------------------------------------------------------------------
NO_DEVICE = "cuda" if sys.platform == "darwin" else "mps"


def nothing():
    pass


def cell(column, value):
    """A change to the first row of train.csv."""

    def change():
        rows = rows_of("data/train.csv")
        rows[1][rows[0].index(column)] = value
        write_rows("data/train.csv", rows)

    return change


def content(name, data):
    return lambda: Path("data", name).write_bytes(data)


def drop(column, name):
    """A change to a file: this column is missing."""

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


def few_of_a_class():
    rows = rows_of("data/train.csv")
    for row in rows[1:4]:
        row[1] = "9"
    write_rows("data/train.csv", rows)


def folder_of_that_name():
    Path("submission.csv").unlink()
    Path("submission.csv").mkdir()


def trained_elsewhere():
    run("--nlayers", "2", "--out", "out")


def truncated_checkpoint():
    trained_elsewhere()
    path = Path("out/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:5000])


def foreign_checkpoint():
    Path("out").mkdir()
    torch.save({"script": "another"}, "out/checkpoint.pt")


def pickled_checkpoint():
    Path("out").mkdir()
    Path("out/checkpoint.pt").write_bytes(pickle.dumps(Path("x")))


def zipped_pickle():
    """A zip file as PyTorch writes it, with an object in it that is not allowed."""
    Path("out").mkdir()
    torch.save(Path("x"), "out/checkpoint.pt")


def lines(*rows):
    return "".join(f"{row}\n" for row in rows).encode()


HEADER = "Id,Category,Title"
RESUME = ["--out", "out", "--resume"]
BAD = {
    # Files that cannot be read
    "no such folder": (lambda: shutil.rmtree("data"), [], r"data/train.csv: No such file"),
    "no test file": (lambda: Path("data/test.csv").unlink(), [], r"data/test.csv: No such file"),
    "empty file": (content("train.csv", b""), [], r"train.csv: no rows"),
    "blank file": (content("train.csv", b"\n\n"), [], r"train.csv: "),
    "header only": (content("train.csv", lines(HEADER)), [], r"train.csv: no rows"),
    "test without rows": (content("test.csv", b"Id,Title\n"), [], r"test.csv: no rows"),
    "ragged rows": (ragged, [], r"row 8 has 5 fields, the first row 4\."),
    "short rows": (
        content("train.csv", lines(HEADER, "1,2")),
        [],
        r"row 2 has 2 fields, the first",
    ),
    "no encoding": (
        content("train.csv", b"Id,Title\n1,caf\x81\n"),
        [],
        r"decode byte 0x81.*CSV UTF",
    ),
    "open quote": (
        content("train.csv", lines(HEADER, '1,2,"x')),
        [],
        r"quote in row 2 is never clo",
    ),
    "submission is a folder": (
        folder_of_that_name,
        [],
        r"submission.csv: (Is a directory|Permission denied)\. Close it",
    ),
    # Columns, labels and ids
    "column twice": (content("train.csv", lines("Id,Label,Id", "1,a,x")), [], r"a column twice"),
    "no label column": (
        drop("Category", "train.csv"),
        [],
        r"no label column; found Id, Title, Description\. Name",
    ),
    "test lacks a column": (drop("Title", "test.csv"), [], r"test.csv: no Title column; found Id"),
    "no such columns": (nothing, ["--text-columns", "Z", "A", "M"], r"no Z, A, M column; found Id"),
    "label in one row": (
        cell("Category", "9"),
        ["--limit", "400"],
        r"Category has 5 classes, the smallest 9: 1, .*rows each, or name",
    ),
    "empty label": (
        cell("Category", ""),
        [],
        r"Category has 5 classes, the smallest \(empty\): 1,",
    ),
    "one class": (one_class, [], r"Category has 1 classes, the smallest 1: 80\. Give two"),
    "small limit": (nothing, ["--limit", "5"], r"--limit 5: too few .* 4 classes\. Give 8 or more"),
    "many folds": (
        few_of_a_class,
        ["--folds", "4"],
        r"smallest 9: 3, .* 4 rows each, or --folds 3",
    ),
    "row without id": (
        content("test.csv", lines("Id,Title,Description", "1,a,b", ",c,d")),
        [],
        r"no Id\.",
    ),
    "blank rows alone": (
        content("test.csv", lines("Id,Title", ",", ",")),
        [],
        r"test.csv: no rows",
    ),
    "no such id": (nothing, ["--id-column", "Nr"], r"test.csv: no Nr column; found Id"),
    "id twice": (cell("Id", "2"), ["--limit", "400"], r"Id '2' is in 2 rows"),
    # Word vectors
    "no vectors file": (nothing, ["--vectors", "none.txt"], r"--vectors none.txt: No such"),
    "empty vectors": (content("v.vec", b""), [], r"--vectors data/v.vec: "),
    "vectors of words": (
        content("v.vec", lines("the 1 2 3", "of x y z")),
        [],
        r"could not convert string",
    ),
    "vectors of nan": (content("v.vec", lines("the 1 2 3", "of 1 nan 2")), [], r"not finite"),
    "flat vectors": (content("v.vec", lines("the 1 1", "of 1 1")), [], r"all the same, or not"),
    "vectors in a zip": (content("v.vec", b"PK\3\4" + bytes(50)), [], r"a zip archive, which has"),
    "binary vectors": (
        content("v.vec", b"2 4\nthe \0\x9f\xff\xfe"),
        [],
        r"a binary file, such as word",
    ),
    "vectors between tabs": (content("v.vec", b"the\t1\t2\nof\t2\t1\n"), [], r"tabs stand between"),
    "half a gzip file": (
        content("v.vec.gz", gzip.compress(b"the 1 2\n" * 99)[:30]),
        [],
        r"ended before",
    ),
    "useless vectors": (content("v.vec", b"xyzzy 1 2 3\n"), [], r"none of the texts' words"),
    "words alone": (content("v.vec", lines("the", "of")), [], r"--vectors data/v.vec: "),
    # The run's folder and its checkpoint
    "other settings": (trained_elsewhere, RESUME, r"with nlayers 2, not 1"),
    "truncated": (truncated_checkpoint, RESUME, r"out/checkpoint.pt: damaged, or not a checkpoint"),
    "foreign": (foreign_checkpoint, RESUME, r"not a checkpoint of transformer"),
    "evil pickle": (pickled_checkpoint, RESUME, r"out/checkpoint.pt: damaged, or not a checkpoint"),
    "evil zip": (zipped_pickle, RESUME, r"out/checkpoint.pt: damaged, or not a checkpoint"),
    "out has no name": (nothing, ["--out", "."], r"--out \.: give the folder a name"),
    "out is a file": (lambda: Path("out").touch(), ["--out", "out"], r"out: (File exists|Cannot)"),
    "out is below a file": (
        lambda: Path("out").touch(),
        ["--out", "out/x"],
        r"out/x: (Not a dir|The sys)",
    ),
    "out holds other files": (nothing, ["--out", "data"], r"data: not the folder of a run"),
    # Texts to predict
    "no run there": (
        nothing,
        ["--out", "out", "--predict", "x"],
        r"out: no trained model there\. Train",
    ),
    "unreadable texts": (
        trained_elsewhere,
        ["--out", "out", "--predict", "/proc/self/mem"],
        r"/proc",
    ),
    "no such texts": (nothing, ["--predict", "no.txt"], r"--predict no.txt: No such file"),
    "a csv to predict": (nothing, ["--predict", "data/test.csv"], r"test.csv: give one text a"),
    # Flags
    "negative seed": (nothing, ["--seed", "-1"], r"--seed: -1: give a whole number from 0"),
    "large seed": (nothing, ["--seed", "5000000000"], r"--seed: 5000000000: give a whole number"),
    "heads": (nothing, ["--nhead", "3"], r"--nhead 3 does not divide --d-model 16"),
    "folds": (nothing, ["--folds", "1"], r"--folds: 1: give a whole number, 2 or more"),
    "dropout": (nothing, ["--dropout", "1"], r"--dropout: 1: give a number from 0 to 0.99"),
    "nan": (nothing, ["--lr", "nan"], r"--lr: nan: give a number"),
    "no number": (nothing, ["--epochs", "x"], r"--epochs: x: give a whole number"),
    "old name": (nothing, ["--layers", "2"], r"unrecognized arguments: --layers"),
    "no such device": (nothing, ["--device", NO_DEVICE], rf"--device {NO_DEVICE}: "),
}


if not Path("/proc/self/mem").exists():  # which can be opened, and not be read
    del BAD["unreadable texts"]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(here, capsys, case):
    change, words, message = BAD[case]
    Path("submission.csv").write_text("mine")
    change()
    if Path("submission.csv").is_file():
        Path("submission.csv").write_text("mine")
    before = {path: path.read_bytes() for path in Path(".").glob("out/*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*words)

    assert stopped.value.code == 2
    line = the_line(capsys)
    assert re.search(message, line), line
    assert Path("submission.csv").is_dir() or Path("submission.csv").read_text() == "mine"
    assert not Path(".submission.csv.tmp").exists()
    assert not Path("runs").exists()
    assert {path: path.read_bytes() for path in Path(".").glob("out/*")} == before


def test_a_folder_of_the_users_own_is_never_removed(here, capsys):
    run("--out", "out")
    Path("out.previous").mkdir()
    Path("out.previous/thesis.txt").write_text("mine")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("--out", "out")
    assert "out.previous: not the folder of a run" in the_line(capsys)
    assert Path("out.previous/thesis.txt").read_text() == "mine"
    assert Path("out/checkpoint.pt").exists()
