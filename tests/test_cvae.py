"""lab4/cvae.py: mathematics against independent references, runs, every bad input's line."""

import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nltk
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "lab4"))
import cvae

SMALL = shlex.split(
    "--data verbs --out run --epochs 3 --batch-size 16 --hidden-dim 16 --device cpu"
)
VERBS = (ROOT / "data" / "sample" / "train.txt").read_text().splitlines()
TESTS = "accept accepted sp->p\nadds add tp -> sp\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in, with verbs/ for --data: 40 verbs of the sample."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "verbs").mkdir()
    (tmp_path / "verbs" / "train.txt").write_text("\n".join(VERBS[:40]) + "\n")
    (tmp_path / "verbs" / "test.txt").write_text(TESTS)
    return tmp_path


def run(*more):
    return cvae.main([*SMALL, *more])


def without_seconds(metrics):
    return {key: value for key, value in metrics.items() if key != "seconds"}


def test_kl_divergence_equals_torch_distributions():
    mu, logvar = torch.randn(2, 5, 3).unbind()
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(cvae.kl_divergence(mu, logvar), expected)


def test_reconstruction_loss_is_the_log_probability_of_the_word_and_its_end():
    words = cvae.encode_words(["go", "stopped"])
    logits = torch.randn(2, words.shape[1], cvae.TOKENS)
    log_p = torch.distributions.Categorical(logits=logits).log_prob(words)
    torch.testing.assert_close(
        cvae.reconstruction_loss(logits, words), -torch.stack([log_p[0, :3].sum(), log_p[1].sum()])
    )


def logits_of(model, z, tense, words):
    """The decoder's logits where each letter of `words` is right."""
    given = torch.nn.functional.pad(words, (1, -1), value=cvae.START)
    return model.decode(model.first_state(z), tense, given)[0]


def test_padding_changes_nothing():
    model, tense = cvae.CVAE(4, 16), torch.tensor([3])
    alone = cvae.encode_words(["went"])
    padded = cvae.encode_words(["went", "understanding"])[:1]
    for one, other in zip(model.encode(alone, tense), model.encode(padded, tense), strict=True):
        torch.testing.assert_close(one, other)
    z = torch.randn(1, 4)
    losses = [
        cvae.reconstruction_loss(logits_of(model, z, tense, words), words)
        for words in (alone, padded)
    ]
    torch.testing.assert_close(*losses)


def test_spelling_letter_by_letter_equals_one_pass_over_its_own_letters():
    torch.manual_seed(0)
    model, z, tense = cvae.CVAE(4, 16), torch.randn(20, 4) * 3, torch.arange(20) % 4
    spelled = model.spell(z, tense)
    words = cvae.encode_words(spelled)
    again = logits_of(model, z, tense, words)[..., 1:].argmax(-1) + 1
    to_spell = (words != cvae.START) & (torch.arange(words.shape[1]) < cvae.MAX_LETTERS)
    assert len(set(spelled)) > 1 and torch.equal(again[to_spell], words[to_spell])


def test_the_decoder_sees_no_letter_that_it_is_to_spell():
    model, words = cvae.CVAE(4, 16), cvae.encode_words(["begin"])
    z, tense = torch.randn(1, 4), torch.tensor([0])
    other = words.clone()
    other[0, 3] = 20
    first, second = (logits_of(model, z, tense, w) for w in (words, other))
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_forward_gives_the_two_terms_of_the_bound():
    verbs = cvae.Verbs([tuple(line.split()) for line in VERBS], [], [], frozenset(), {})
    model, generator = cvae.CVAE(4, 16), torch.Generator().manual_seed(0)
    batch = cvae.make_batch(verbs, torch.arange(6), 0.5, 4, generator)
    source, source_tense, target, target_tense, noise = batch
    assert source.shape[0] == 9 and target.shape[0] == 18
    assert all(a != b for a, b in target_tense.view(2, 9).T.tolist())
    mu, logvar = model.encode(source, source_tense)
    z = mu.repeat(2, 1) + (logvar / 2).exp().repeat(2, 1) * noise
    loss = cvae.reconstruction_loss(logits_of(model, z, target_tense, target), target)
    reconstruction, kl = model(batch, 1.0)
    torch.testing.assert_close(reconstruction, (loss[:9] + loss[9:]) / 2)
    torch.testing.assert_close(kl, cvae.kl_divergence(mu, logvar))


def test_bleu4_weights():
    smooth = nltk.translate.bleu_score.SmoothingFunction().method1
    for reference, prediction in (("began", "begin"), ("abetted", "abetted")):
        expected = nltk.translate.bleu_score.sentence_bleu(
            [reference], prediction, smoothing_function=smooth
        )
        assert cvae.bleu4(reference, prediction) == pytest.approx(expected)
    assert cvae.bleu4("ran", "ran") == pytest.approx(1.0)  # with 4-grams it could not be
    assert cvae.bleu4("abetted", "abetting") < 1


def test_kl_weight_schedules():
    steps = [i / 100 for i in range(100)]
    assert {cvae.kl_weight("constant", p, 4, 0.3) for p in steps} == {0.3}
    rising = [cvae.kl_weight("monotonic", p, 4, 0.3) for p in steps]
    assert rising[0] == 0 and rising == sorted(rising) and rising[50:] == [0.3] * 50
    cyclical = [cvae.kl_weight("cyclical", p, 4, 0.3) for p in steps]
    assert (
        cyclical.count(0) == 4
        and cyclical[:25] == pytest.approx(cyclical[25:50])
        and max(cyclical) == 0.3
    )


def test_prior_draws_are_spelled_as_the_likeliest_verbs(monkeypatch):
    verbs, model = [tuple(line.split()) for line in VERBS[:7]], cvae.CVAE(3, 16)
    (mu, logvar), forms = torch.randn(2, 7, 4, 3), cvae.verb_tensor(verbs)
    q = torch.distributions.Independent(torch.distributions.Normal(mu, (logvar / 2).exp()), 1)
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    likeliest = q.log_prob(z[:, None, None]).logsumexp(2).argmax(1)  # (50,)
    loss, spelled = cvae.reconstruction_loss, []
    monkeypatch.setattr(
        cvae, "reconstruction_loss", lambda *args: spelled.append(args[1]) or loss(*args)
    )
    generator, posteriors = (
        torch.Generator().manual_seed(0),
        (mu.flatten(0, 1), logvar.flatten(0, 1)),
    )
    cvae.prior_loss(model, forms, posteriors, 50, generator)
    assert likeliest.unique().numel() > 3
    for row, word in enumerate(spelled[0]):
        assert any(torch.equal(word, form) for form in forms[likeliest[row % 50]])


def test_the_first_letter_is_the_same_in_all_tenses():
    torch.manual_seed(0)
    model = cvae.CVAE(4, 16)
    words = model.spell(torch.randn(1, 4).repeat(4, 1) * 3, torch.arange(4))
    assert len({word[:1] for word in words}) == 1


def test_scores_of_generated_verbs_see_collapse():
    known = [("go",), ("be",)]
    assert cvae.score_generated([("go",)] * 200, known) == (1.0, 1.0)
    assert cvae.score_generated([("go",), ("be",), ("bo",), ("be",)], known) == (0.75, 2.0)


def test_words_and_integers_go_both_ways():
    words = ["a", "z", "understanding"]
    rows = cvae.encode_words(words).tolist()
    spelled = ["".join(cvae.ALPHABET[token] for token in row) for row in rows]
    assert [word.strip("^") for word in spelled] == ["a$", "z$", "understanding$"]


def test_invented_verbs_keep_endings():
    verbs = [tuple(line.split()) for line in VERBS]
    invented = cvae.invent_verbs(verbs, 300, torch.Generator().manual_seed(0))
    endings = {tuple(form[len(os.path.commonprefix(verb)) :] for form in verb) for verb in verbs}
    assert len(set(invented) - set(verbs)) > 250
    for verb in invented:
        ways = {
            tuple(form[cut:] for form in verb) for cut in range(len(os.path.commonprefix(verb)) + 1)
        }
        assert ways & endings


def test_overfits_32_verbs(here):
    (here / "verbs" / "train.txt").write_text("\n".join(VERBS[:32]))
    words = "--data verbs --epochs 150 --batch-size 4 --hidden-dim 64 --latent-dim 8 --kl-max 0.1"
    metrics = cvae.main([*words.split(), "--device", "cpu"])
    assert metrics["bleu4"] == pytest.approx(1.0)
    assert metrics["gaussian_score_10000"] > 0.5
    assert metrics["distinct_valid_per_100"] > 16


def test_300_epochs_stay_finite_and_in_memory(here):
    (here / "verbs" / "train.txt").write_text("\n".join(VERBS[:12]))
    run("--epochs", "150", "--teacher-forcing", "0.5")  # until then the allocator still fills up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run("--epochs", "300", "--lr", "0.05", "--teacher-forcing", "0.5", "--kl-schedule", "cyclical")
    rows = pd.read_csv("run/history.csv")
    assert len(rows) == 300 and rows.map(math.isfinite).all(axis=None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 20_000 * (
        1024 if sys.platform == "darwin" else 1
    )


@pytest.mark.figures
def test_run_leaves_what_it_promises(here, capsys):
    metrics = run()
    left = {path.name for path in (here / "run").iterdir()}
    tables = {"conversions.csv", "generated.csv", "history.csv", "interpolation.csv"}
    assert left == tables | {"config.json", "checkpoint.pt", "metrics.json", "training.png"}
    assert json.loads((here / "run" / "metrics.json").read_text()) == metrics
    assert metrics["heldout_exact"] is None
    out = capsys.readouterr().out
    assert all(name in out for name in metrics) and "--convert" in out
    assert pd.read_csv("run/conversions.csv")["target"].tolist() == ["accepted", "add"]
    assert pd.read_csv("run/generated.csv").columns.tolist() == [*cvae.TENSES, "training line"]

    assert cvae.main(["--out", "run", "--convert", "walk", "--to", "past"])["word"] is not None
    assert len(cvae.main(["--out", "run", "--generate", "7"])["verbs"]) == 7
    verbs = cvae.main(["--out", "run", "--interpolate", "add", "agree"])["verbs"]
    assert len(verbs) == 9 and all(len(verb) == 4 for verb in verbs)


def test_held_out_verbs_are_not_trained_on(here):
    metrics = run("--holdout", "5")
    assert metrics["heldout_verbs"] == 5 and 0 <= metrics["heldout_exact"] <= 1
    verbs = cvae.read_verbs(here / "verbs", 5, None, 0)
    trained = {form for verb in verbs.train for form in verb}
    assert not trained & {form for verb in verbs.held_out for form in verb}
    assert (
        not trained & {"accept", "accepted", "add", "adds"}
        and metrics["verbs"] == len(verbs.train) == 33
    )
    assert cvae.read_verbs(here / "verbs", 5, None, 1).held_out != verbs.held_out


def test_made_up_verbs_spell_no_held_out_verb(here, monkeypatch):
    verbs = cvae.read_verbs(here / "verbs", 5, None, 0)
    made = cvae.invent_verbs(verbs.train, 500, torch.Generator().manual_seed(0))
    unseen = frozenset(form for verb in made[::7] for form in verb)
    again = cvae.invent_verbs(verbs.train, 500, torch.Generator().manual_seed(0), unseen)
    assert len(again) > 100 and unseen.isdisjoint(form for verb in again for form in verb)
    invent, told = cvae.invent_verbs, []
    monkeypatch.setattr(cvae, "invent_verbs", lambda *args: told.append(args[3]) or invent(*args))
    run("--holdout", "5", "--epochs", "1")
    assert told and told[0] >= {"accept", "accepted", "add", "adds"}.union(*verbs.held_out)


def test_resume_trains_no_more_than_an_epoch_again(here, monkeypatch):
    flags = ["--holdout", "4", "--prior-draws", "1"]
    whole = run(*flags)
    clip, count = torch.nn.utils.clip_grad_norm_, iter(range(10_000))

    def interrupted(*args):
        if next(count) == 8:  # in the third epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(SystemExit):
        run(*flags, "--out", "other")
    assert without_seconds(run(*flags, "--out", "other", "--resume")) == without_seconds(whole)
    assert next(count) < 17  # 9 steps and those of no more than an epoch again
    assert without_seconds(run(*flags, "--seed", "1")) != without_seconds(whole)


def test_repeated_and_out_of_order_lines_are_reported(here, capsys):
    with open("verbs/train.txt", "a") as file:
        file.write("accept accepts accepting accepted\ndrip dripped dript drips\n")
    assert len(cvae.read_train(Path("verbs/train.txt"))) == 40
    out = capsys.readouterr().out
    assert "2 lines left out, repeated or without -ing third" in out


def test_the_courses_ten_pairs_have_the_tenses_of_its_readme(here):
    pairs = """abandon abandoned\nabet abetting\nbegin begins\nexpend expends\nsent sends
        split splitting\nflared flare\nfunctioning function
        functioning functioned\nhealing heals"""
    Path("verbs/test.txt").write_text(pairs)
    tests = cvae.read_test(Path("verbs/test.txt"))
    assert (
        tests[0] == ("abandon", "abandoned", 0, 3)
        and tests[4][2:] == (3, 1)
        and tests[9] == ("healing", "heals", 2, 1)
    )


def test_runs_from_an_empty_folder(here):
    (here / "alone").mkdir()
    shutil.copy(ROOT / "lab4" / "cvae.py", here / "alone")
    command = [sys.executable, "cvae.py"]
    done = subprocess.run(command, cwd=here / "alone", capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2
        and "data/train.txt: No such file" in done.stderr
        and done.stderr.count("\n") == 1
    )
    shutil.copytree(here / "verbs", here / "alone" / "data")
    command += ["--epochs", "1", "--hidden-dim", "8"]
    done = subprocess.run(command, cwd=here / "alone", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (here / "alone" / "runs" / "cvae" / "metrics.json").exists()


TRAIN, TEST = "verbs/train.txt", "verbs/test.txt"
BAD = [
    (TRAIN, "go goes going\n", [], "line 1, 'go goes going', is not four words"),
    (TRAIN, "Go goes going went\n", [], "line 1, 'Go goes going went', is not four words"),
    (TRAIN, "go goes go1ng went\n", [], "line 1, 'go goes go1ng went', is not"),
    (TRAIN, "gö goes going went\n", [], "can't decode byte 0xc3"),
    (TRAIN, "", [], "is empty"),
    (TRAIN, "\n\n", [], "is empty"),
    (TRAIN, "go goes going went\n", [], "1 verbs to train on are too few"),
    (TRAIN, "go goes going " + "w" * 21, [], "four words of up to 20 small letters"),
    (TRAIN, None, [], "No such file"),
    (TEST, None, [], "No such file"),
    (TEST, "", [], "is empty"),
    (TEST, "go went\n", [], "1 pairs without tenses"),
    (TEST, "go went sp->p\nsee saw\n", [], "1 pairs without tenses, such as see saw"),
    (TEST, "go went sp->past\n", [], "line 1, 'go went sp->past', is not two words"),
    (TEST, "go went p\n", [], "line 1, 'go went p', is not"),
    (TEST, "go\n", [], "line 1, 'go', is not"),
    (TEST, "go Went sp->p\n", [], "line 1, 'go Went sp->p', is not"),
    (None, None, ["--holdout", "39"], "--holdout is 39"),
    (None, None, ["--convert", "walk", "--out", "nowhere"], "nowhere: no finished run"),
    (None, None, ["--convert", "Walk"], "'Walk': give a verb"),
    (None, None, ["--convert", ""], "'': give a verb"),
    (None, None, ["--interpolate", "walk", "r2n"], "'r2n': give a verb"),
    (None, None, ["--teacher-forcing", "1.5"], "--teacher-forcing 1.5: give a number from 0 to 1"),
    (None, None, ["--kl-max", "nan"], "--kl-max nan: give a number"),
    (None, None, ["--resume", "--hidden-dim", "8"], "trained with hidden_dim 16, not 8"),
    ("run/checkpoint.pt", "rubbish", ["--resume"], "File is not a zip file"),
    (None, None, ["--convert", "go", "--generate", "3"], "give only one of --convert"),
]


@pytest.mark.parametrize("file, text, flags, line", BAD, ids=lambda value: str(value)[:30])
def test_bad_input_ends_with_one_line(here, capsys, file, text, flags, line):
    run()
    before = {path: path.read_bytes() for path in (here / "run").iterdir()}
    if file and text is None:
        Path(file).unlink()
    elif file:
        Path(file).write_text(text, encoding="utf-8")
        before.pop(here / file, None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    err = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and line in err
    )
    assert all(path.read_bytes() == content for path, content in before.items())
