"""lab4/cvae.py: mathematics against independent references, runs, every bad input's line."""

import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nltk
import pandas as pd
import pytest
import torch
from torch import Generator
from torch.distributions import Categorical, Independent, Normal

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


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cvae.CVAE(latent_dim=4, hidden_dim=16)


def seeded() -> Generator:
    return Generator().manual_seed(0)


def run(*more: str) -> dict:
    return cvae.main([*SMALL, *more])


def without_seconds(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if key != "seconds"}


def sample_verbs(withheld: frozenset = frozenset()) -> cvae.Verbs:
    train = [tuple(line.split()) for line in VERBS]
    return cvae.Verbs(train, held_out=[], tests=[], withheld=withheld)


def forms_of(verbs: list) -> set[str]:
    return {form for verb in verbs for form in verb}


def logits_of(model, z, tense, words):
    """The decoder's logits where every previous letter is right."""
    previous = torch.cat([torch.full_like(words[:, :1], cvae.START), words[:, :-1]], dim=1)
    return model.decode(model.initial_state(z), tense, previous)[0]


# Objective ----------------------------------------------------------------------------------------
def test_kl_divergence_equals_torch_distributions():
    mu, logvar = torch.randn(2, 5, 3).unbind()
    q = Normal(mu, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(q, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(cvae.kl_divergence(mu, logvar), expected)


def test_reconstruction_loss_is_the_log_probability_of_the_word_and_its_end():
    words = cvae.encode_words(["go", "stopped"])
    logits = torch.randn(2, words.shape[1], 28)
    log_p = Categorical(logits=logits).log_prob(words)
    expected = -torch.stack([log_p[0, :3].sum(), log_p[1].sum()])
    torch.testing.assert_close(cvae.reconstruction_loss(logits, words), expected)


def test_forward_gives_the_two_terms_of_the_bound(model):
    batch = cvae.make_batch(sample_verbs(), torch.arange(6), 0.5, seeded())
    reconstruction, kl = model(batch, 1.0, seeded())

    mu, logvar = model.encode(batch.source, batch.source_tense)
    noise = torch.randn(18, 4, generator=seeded())
    z = mu.repeat(2, 1) + (logvar / 2).exp().repeat(2, 1) * noise
    logits = logits_of(model, z, batch.target_tense, batch.target)
    loss = cvae.reconstruction_loss(logits, batch.target)
    torch.testing.assert_close(reconstruction, (loss[:9] + loss[9:]) / 2)
    torch.testing.assert_close(kl, cvae.kl_divergence(mu, logvar))


def test_a_batch_has_forms_of_the_same_verbs_in_other_tenses():
    batch = cvae.make_batch(sample_verbs(), torch.arange(6), 0.5, seeded())
    assert batch.source.shape[0] == 9
    assert batch.target.shape[0] == 18
    for first, second in batch.target_tense.view(2, 9).T.tolist():
        assert first != second

    def word(integers: torch.Tensor) -> str:
        return "".join(cvae.ALPHABET[i] for i in integers).partition("$")[0]

    for i, line in enumerate(VERBS[:6]):
        forms = line.split()
        assert word(batch.source[i]) == forms[batch.source_tense[i]]
        assert word(batch.target[i]) == forms[batch.target_tense[i]]
        assert word(batch.target[i + 9]) == forms[batch.target_tense[i + 9]]


def test_teacher_forcing_replaces_letters_by_guesses_at_the_given_rate(model, monkeypatch):
    """All of the previous letters are right at 1 and guessed at 0; at 0.7, 70% are right."""
    batch = cvae.make_batch(sample_verbs(), torch.arange(200), 0.0, seeded())
    previous = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *args: previous.append(args[2]) or decode(*args))
    with torch.no_grad():
        for teacher_forcing in (1.0, 0.7, 0.0):
            model(batch, teacher_forcing, seeded())
    right, _, mixed, _, guessed = previous

    differing = (guessed != right)[:, 1:]
    replaced = (mixed != right)[:, 1:]
    assert not replaced[~differing].any()
    assert replaced[differing].float().mean() == pytest.approx(0.3, abs=0.03)


def test_the_letters_to_force_are_independent_of_the_tenses(model, monkeypatch):
    """They were once the same random numbers: a generator seeded like that of the batch."""
    drawn = []
    rand = torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *args, **kw: drawn.append(rand(*args, **kw)) or drawn[-1]
    )
    generator = seeded()
    batch = cvae.make_batch(sample_verbs(), torch.arange(32), 0.0, generator)
    model(batch, 0.9, generator)
    tenses, letters = drawn
    assert not set(tenses.flatten().tolist()) & set(letters.flatten().tolist())


def test_kl_weight_schedules():
    steps = [i / 100 for i in range(100)]

    def weights(schedule: str) -> list[float]:
        config = cvae.Config(kl_schedule=schedule, kl_cycles=4, kl_max=0.3)
        return [cvae.kl_weight(progress, config) for progress in steps]

    assert set(weights("constant")) == {0.3}

    rising = weights("monotonic")
    assert rising[0] == 0
    assert rising == sorted(rising)
    assert rising[50:] == [0.3] * 50

    cyclical = weights("cyclical")
    assert cyclical.count(0) == 4
    assert cyclical[:25] == pytest.approx(cyclical[25:50])
    assert max(cyclical) == 0.3


def test_prior_samples_are_spelled_as_the_most_likely_verbs(monkeypatch):
    verbs = [tuple(line.split()) for line in VERBS[:7]]
    forms = cvae.verb_tensor(verbs)
    mu, logvar = torch.randn(2, 7, 4, 3)
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    z = torch.randn(50, 3, generator=seeded())
    most_likely = q.log_prob(z[:, None, None]).logsumexp(2).argmax(1)  # (50,)
    assert most_likely.unique().numel() > 3

    spelled = []
    loss = cvae.reconstruction_loss
    monkeypatch.setattr(
        cvae, "reconstruction_loss", lambda *args: spelled.append(args[1]) or loss(*args)
    )
    posteriors = (mu.flatten(0, 1), logvar.flatten(0, 1))
    cvae.prior_loss(cvae.CVAE(3, 16), forms, posteriors, 50, seeded())
    assert len(spelled[0]) == 100
    for row, word in enumerate(spelled[0]):
        assert any(torch.equal(word, form) for form in forms[most_likely[row % 50]])


def test_the_average_is_an_exponential_moving_average_of_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    average = torch.nn.Linear(1, 1, bias=False)
    expected = average.weight.item()
    for step in range(2000):
        torch.nn.init.constant_(model.weight, math.sin(step))
        cvae.update_average(average, model, step)
        decay = min(0.995, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
    assert average.weight.item() == pytest.approx(expected, abs=1e-5)


# Model --------------------------------------------------------------------------------------------
def test_padding_changes_nothing(model):
    tense = torch.tensor([3])
    alone = cvae.encode_words(["went"])
    padded = cvae.encode_words(["went", "understanding"])[:1]
    for one, other in zip(model.encode(alone, tense), model.encode(padded, tense), strict=True):
        torch.testing.assert_close(one, other)

    z = torch.randn(1, 4)
    losses = []
    for words in (alone, padded):
        losses.append(cvae.reconstruction_loss(logits_of(model, z, tense, words), words))
    torch.testing.assert_close(*losses)


def test_spelling_letter_by_letter_equals_one_pass_over_its_own_letters(model):
    z = torch.randn(20, 4) * 3
    tense = torch.arange(20) % 4
    spelled = model.spell(z, tense.tolist())
    assert len(set(spelled)) > 1

    words = cvae.encode_words(spelled)
    again = logits_of(model, z, tense, words)[..., 1:].argmax(-1) + 1
    compared = (words != cvae.START) & (torch.arange(words.shape[1]) < cvae.MAX_LETTERS)
    assert torch.equal(again[compared], words[compared])


def test_the_decoder_sees_no_letter_that_it_is_to_spell(model):
    words = cvae.encode_words(["begin"])
    other = words.clone()
    other[0, 3] = 20
    z = torch.randn(1, 4)
    tense = torch.tensor([0])
    first = logits_of(model, z, tense, words)
    second = logits_of(model, z, tense, other)
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_the_first_letter_is_the_same_in_all_tenses(model):
    z = (torch.randn(50, 4) * 3).repeat_interleave(4, dim=0)
    words = model.spell(z, [0, 1, 2, 3] * 50)
    assert len(set(words)) > 1
    for i in range(0, 200, 4):
        assert len({word[:1] for word in words[i : i + 4]}) == 1


def test_generate_leaves_the_global_generator_alone(model):
    model.initial_state[0].weight.data *= 50  # so that this untrained model spells various words
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = cvae.generate(model, 6, seed=1)
    cvae.interpolate(model, "carry", "send")
    assert torch.equal(torch.rand(3), expected)
    assert cvae.generate(model, 6, seed=1) == first
    assert cvae.generate(model, 6, seed=2) != first


def test_interpolation_begins_and_ends_at_the_two_verbs(model):
    path = cvae.interpolate(model, "carry", "send", steps=5)
    assert len(path) == 5
    for end, verb in ((0, "carry"), (-1, "send")):
        asked = [cvae.Conversion(verb, "", 0, tense) for tense in range(4)]
        assert path[end] == tuple(cvae.convert(model, asked))


# Scores -------------------------------------------------------------------------------------------
def test_bleu4_weights():
    smooth = nltk.translate.bleu_score.SmoothingFunction().method1
    for reference, prediction in (("began", "begin"), ("abetted", "abetted")):
        expected = nltk.translate.bleu_score.sentence_bleu(
            [reference], prediction, smoothing_function=smooth
        )
        assert cvae.bleu4(reference, prediction) == pytest.approx(expected)
    assert cvae.bleu4("ran", "ran") == pytest.approx(1.0)  # with 4-grams it could not be
    assert cvae.bleu4("abetted", "abetting") < 1


def test_scores_of_conversions(model, monkeypatch):
    conversions = [cvae.Conversion("go", "went", 0, 3), cvae.Conversion("see", "saw", 0, 3)]
    monkeypatch.setattr(cvae, "convert", lambda *args: ["went", "sees"])
    exact, bleu = cvae.score_conversions(model, conversions)
    assert exact == 0.5
    assert bleu == pytest.approx((1 + cvae.bleu4("saw", "sees")) / 2)


def test_scores_of_generated_verbs_see_collapse():
    known = [("go",), ("be",)]
    assert cvae.score_generated([("go",)] * 200, known) == (1.0, 1.0)
    assert cvae.score_generated([("go",), ("be",), ("bo",), ("be",)], known) == (0.75, 2.0)


# Data ---------------------------------------------------------------------------------------------
def test_words_and_integers_go_both_ways():
    words = ["a", "z", "understanding"]
    rows = cvae.encode_words(words).tolist()
    spelled = ["".join(cvae.ALPHABET[i] for i in row) for row in rows]
    assert [word.strip("^") for word in spelled] == ["a$", "z$", "understanding$"]


def test_invented_verbs_keep_endings():
    verbs = sample_verbs()
    invented = cvae.invent_verbs(verbs, 300, seeded())
    assert len(set(invented) - set(verbs.train)) > 250

    endings = set()
    for verb in verbs.train:
        stem = len(os.path.commonprefix(verb))
        endings.add(tuple(form[stem:] for form in verb))
    for verb in invented:
        stem = len(os.path.commonprefix(verb))
        ways = {tuple(form[cut:] for form in verb) for cut in range(stem + 1)}
        assert ways & endings


def test_invented_verbs_are_no_withheld_words():
    invented = cvae.invent_verbs(sample_verbs(), 500, seeded())
    withheld = frozenset(forms_of(invented[::7]))
    again = cvae.invent_verbs(sample_verbs(withheld), 500, seeded())
    assert len(again) > 100
    assert withheld.isdisjoint(forms_of(again))


def test_held_out_verbs_are_not_trained_on(here):
    metrics = run("--holdout", "5")
    assert metrics["heldout_verbs"] == 5
    assert 0 <= metrics["heldout_exact"] <= 1

    verbs = cvae.read_verbs(Path("verbs"), cvae.Config(holdout=5))
    trained = forms_of(verbs.train)
    assert not trained & forms_of(verbs.held_out)
    assert not trained & {"accept", "accepted", "add", "adds"}
    assert verbs.withheld >= {"accept", "accepted", "add", "adds"} | forms_of(verbs.held_out)
    assert metrics["verbs"] == len(verbs.train) == 33
    other = cvae.read_verbs(Path("verbs"), cvae.Config(holdout=5, seed=1))
    assert other.held_out != verbs.held_out


def test_no_batch_of_a_run_has_a_held_out_word(here, monkeypatch):
    withheld = cvae.read_verbs(Path("verbs"), cvae.Config(holdout=5)).withheld
    batches = []
    make_batch = cvae.make_batch
    monkeypatch.setattr(
        cvae, "make_batch", lambda *args: batches.append(make_batch(*args)) or batches[-1]
    )
    run("--holdout", "5", "--epochs", "1")

    trained = set()
    for batch in batches:
        for integers in itertools.chain(batch.source.tolist(), batch.target.tolist()):
            trained.add("".join(cvae.ALPHABET[i] for i in integers).partition("$")[0])
    assert len(trained) > 100
    assert not trained & withheld


def test_repeated_and_out_of_order_lines_are_reported(here, capsys):
    with open("verbs/train.txt", "a") as file:
        file.write("accept accepts accepting accepted\ndrip dripped dript drips\n")
    assert len(cvae.read_train(Path("verbs/train.txt"))) == 40
    assert "2 lines left out, repeated or without -ing third" in capsys.readouterr().out


COURSE_VERBS = """abandon abandons abandoning abandoned
abet abets abetting abetted\nbegin begins beginning began\nexpend expends expending expended
send sends sending sent\nsplit splits splitting split\nflare flares flaring flared
function functions functioning functioned\nheal heals healing healed"""


def test_the_courses_ten_pairs_have_the_tenses_of_its_readme(here):
    pairs = """abandon abandoned\nabet abetting\nbegin begins\nexpend expends\nsent sends
        split splitting\nflared flare\nfunctioning function
        functioning functioned\nhealing heals"""
    Path("verbs/train.txt").write_text(COURSE_VERBS)
    Path("verbs/test.txt").write_text(pairs)
    tests = cvae.read_verbs(Path("verbs"), cvae.Config()).tests
    assert [test[2:] for test in tests] == [
        *[(0, 3), (0, 2), (0, 1), (0, 1), (3, 1)],
        *[(0, 2), (3, 0), (2, 0), (2, 3), (2, 1)],
    ]


def test_pairs_without_tenses_have_those_of_the_training_file(here, capsys):
    """Of forms that are spelled alike the first one counts, and never the same tense twice."""
    Path("verbs/train.txt").write_text("go goes going went\nput puts putting put\n" + COURSE_VERBS)
    Path("verbs/test.txt").write_text("went goes\nput put\nputting put\nsend sent p->p\n")
    tests = cvae.read_verbs(Path("verbs"), cvae.Config()).tests
    assert [test[2:] for test in tests] == [(3, 1), (0, 3), (2, 0), (3, 3)]
    assert "tenses    of 3 test pairs are looked up in train.txt" in capsys.readouterr().out


def test_a_bom_is_no_letter(here):
    expected = cvae.read_verbs(Path("verbs"), cvae.Config())
    for name in ("train.txt", "test.txt"):
        path = Path("verbs", name)
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert cvae.read_verbs(Path("verbs"), cvae.Config()) == expected


# Runs ---------------------------------------------------------------------------------------------
def test_overfits_32_verbs(here):
    (here / "verbs" / "train.txt").write_text("\n".join(VERBS[:32]))
    words = "--data verbs --epochs 150 --batch-size 4 --hidden-dim 64 --latent-dim 8 --kl-max 0.1"
    metrics = cvae.main([*words.split(), "--device", "cpu"])
    assert metrics["bleu4"] == pytest.approx(1.0)
    assert metrics["gaussian_score_10000"] > 0.5
    assert metrics["distinct_valid_per_100"] > 16


def test_300_epochs_stay_finite_and_in_memory(here):
    resource = pytest.importorskip("resource", reason="Windows has no such module")
    (here / "verbs" / "train.txt").write_text("\n".join(VERBS[:12]))
    run("--epochs", "150", "--teacher-forcing", "0.5")  # until then the allocator still fills up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run("--epochs", "300", "--lr", "0.05", "--teacher-forcing", "0.5", "--kl-schedule", "cyclical")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    rows = pd.read_csv("run/history.csv")
    assert len(rows) == 300
    assert rows.map(math.isfinite).all(axis=None)
    kibibyte = 1024 if sys.platform == "darwin" else 1  # in the unit of ru_maxrss
    assert after < before + 20_000 * kibibyte


@pytest.mark.figures
def test_run_leaves_what_it_promises(here, capsys):
    metrics = run()
    left = {path.name for path in Path("run").iterdir()}
    tables = {"conversions.csv", "generated.csv", "history.csv", "interpolation.csv"}
    assert left == tables | {"config.json", "checkpoint.pt", "metrics.json", "training.png"}
    assert json.loads(Path("run/metrics.json").read_text()) == metrics
    assert metrics["heldout_exact"] is None

    out = capsys.readouterr().out
    for name in metrics:
        assert name in out
    assert "--convert" in out
    assert pd.read_csv("run/conversions.csv")["target"].tolist() == ["accepted", "add"]
    assert pd.read_csv("run/conversions.csv")["from"].tolist() == ["present", "third-person"]
    assert pd.read_csv("run/generated.csv").columns.tolist() == [*cvae.TENSES, "training line"]
    config = json.loads(Path("run/config.json").read_text())
    assert config["settings"]["hidden_dim"] == 16
    assert len(config["settings"]["train_sha256"]) == 64
    assert len(config["script_sha256"]) == 64


def test_the_finished_model_is_used_as_it_was_trained(here, capsys):
    run()
    predictions = pd.read_csv("run/conversions.csv", keep_default_na=False)["prediction"]
    generated = pd.read_csv("run/generated.csv", keep_default_na=False)[list(cvae.TENSES)]
    capsys.readouterr()

    word = cvae.main(
        ["--out", "run", "--convert", "adds", "--from", "third-person", "--to", "present"]
    )
    assert word == {"word": predictions[1]}
    assert capsys.readouterr().out == f"adds (third-person) -> {predictions[1]} (present)\n"
    verbs = cvae.main(["--out", "run", "--generate", "100"])["verbs"]
    assert [list(verb) for verb in verbs] == generated.to_numpy().tolist()
    verbs = cvae.main(["--out", "run", "--interpolate", "add", "agree"])["verbs"]
    assert len(verbs) == 9


def test_holdout_changes_defaults_and_not_what_was_given():
    config = cvae.parse_args(["--holdout", "3", "--epochs", "2"])
    assert config.latent_dim == 48
    assert config.invented == 3
    assert config.epochs == 2
    assert cvae.parse_args(["--holdout", "0"]) == cvae.Config()


@pytest.mark.parametrize("flags", [["--holdout", "4", "--prior-draws", "1"], []])
def test_a_resumed_run_equals_one_that_was_never_stopped(here, monkeypatch, capsys, flags):
    whole = run(*flags)
    clip = torch.nn.utils.clip_grad_norm_
    count = itertools.count()

    def interrupted(*args):
        if next(count) == 8:  # in the third epoch
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(*flags, "--out", "other")
    assert stopped.value.code == 130
    assert "--resume continues" in capsys.readouterr().out
    assert without_seconds(run(*flags, "--out", "other", "--resume")) == without_seconds(whole)
    assert next(count) < 17  # 9 steps and those of no more than an epoch again
    expected = pd.read_csv("run/history.csv").drop(columns="seconds")
    assert pd.read_csv("other/history.csv").drop(columns="seconds").equals(expected)
    assert without_seconds(run(*flags, "--seed", "1")) != without_seconds(whole)


def test_resuming_a_finished_run_returns_its_metrics_and_says_so(here, capsys):
    whole = run()
    capsys.readouterr()
    assert run("--resume") == whole
    assert "run was finished before" in capsys.readouterr().out


def test_a_run_that_starts_over_keeps_the_old_one(here):
    old = run()
    run("--seed", "1")
    assert json.loads(Path("run.previous/metrics.json").read_text()) == old


def test_ctrl_c_gives_no_advice_where_nothing_can_be_resumed(here, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cvae, "load_finished", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cvae.main(["--convert", "go"])
    assert stopped.value.code == 130
    assert capsys.readouterr().out == "stopped\n"


def test_a_loss_that_is_not_finite_ends_with_one_line(here, monkeypatch, capsys):
    monkeypatch.setattr(cvae, "kl_divergence", lambda mu, logvar: mu.sum(dim=1) * math.nan)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    assert "no finite loss in epoch 1, step 1. Lower --lr" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr(cvae, "bleu4", lambda *args: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        run()


def test_weights_that_do_not_fit_end_with_one_line(here, capsys):
    run()
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    checkpoint["average"]["output.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, "run/checkpoint.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cvae.main(["--out", "run", "--convert", "go"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run: ")
    assert "size mismatch for output.weight" in err
    assert err.count("\n") == 1


def test_runs_from_an_empty_folder(here):
    Path("alone").mkdir()
    shutil.copy(ROOT / "lab4" / "cvae.py", "alone")
    command = [sys.executable, "cvae.py"]
    done = subprocess.run(command, cwd="alone", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "train.txt: No such file" in done.stderr
    assert done.stderr.count("\n") == 1

    shutil.copytree("verbs", "alone/data")
    command += ["--epochs", "1", "--hidden-dim", "8"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://nowhere"}
    done = subprocess.run(
        command, cwd="alone", env=ascii_only, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path("alone/runs/cvae/metrics.json").exists()


def test_runs_where_there_is_no_file(here):
    """As in a notebook's cell, whose sys.argv belongs to the notebook."""
    shutil.copytree("verbs", "data")
    code = (
        f"import sys; sys.argv = ['kernel', '-f', 'x.json']; text = open({cvae.__file__!r}).read();"
        "text = text.replace('epochs: int = 150', 'epochs: int = 1').replace('= 256', '= 8');"
        "exec(compile(text, 'cell', 'exec'), {'__name__': '__main__'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("runs/cvae/config.json").read_text())["script_sha256"] is None


TRAIN = "verbs/train.txt"
TEST = "verbs/test.txt"
BAD = [
    (TRAIN, "go goes going\n", [], "line 1, 'go goes going', is not four words"),
    (TRAIN, "Go goes going went\n", [], "line 1, 'Go goes going went', is not four words"),
    (TRAIN, "go goes go1ng went\n", [], "line 1, 'go goes go1ng went', is not"),
    (TRAIN, "gö goes going went\n", [], "can't decode byte 0xc3"),
    (TRAIN, "", [], "is empty"),
    (TRAIN, "\n\n", [], "is empty"),
    (TRAIN, "go goes going went\n", [], "1 verbs to train on are too few"),
    (TRAIN, "go goes going " + "w" * 21, [], "four words of up to 20 lowercase letters"),
    (TRAIN, None, [], "No such file"),
    (TEST, None, [], "No such file"),
    (TEST, "", [], "is empty"),
    (TEST, "walk went\n", [], "walk went has no tenses, and no verb of train.txt has these two"),
    (TEST, "go went sp->p\nqu quo\n", [], "qu quo has no tenses"),
    (TEST, "go went sp->past\n", [], "line 1, 'go went sp->past', is not two words"),
    (TEST, "go went p\n", [], "line 1, 'go went p', is not"),
    (TEST, "go\n", [], "line 1, 'go', is not"),
    (TEST, "go Went sp->p\n", [], "line 1, 'go Went sp->p', is not"),
    (None, None, ["--holdout", "39"], "--holdout is 39"),
    (None, None, ["--convert", "walk", "--out", "nowhere"], "nowhere: no finished run"),
    (None, None, ["--convert", "Walk"], "'Walk': give a verb"),
    (None, None, ["--convert", ""], "'': give a verb"),
    (None, None, ["--interpolate", "walk", "r2n"], "'r2n': give a verb"),
    (None, None, ["--teacher-forcing", "1.5"], "--teacher-forcing: 1.5: give a number from 0 to 1"),
    (None, None, ["--teacher-forcing", "no"], "--teacher-forcing: no: give a number"),
    (None, None, ["--kl-max", "nan"], "--kl-max: nan: give a number"),
    (None, None, ["--epochs", "0"], "--epochs: 0: give a whole number"),
    (None, None, ["--limit", "1"], "1 verbs to train on are too few"),
    (None, None, ["--resume", "--hidden-dim", "8"], "trained with hidden_dim 16, not 8"),
    (TEST, "go went sp->p\n", ["--resume"], "trained with other contents of test"),
    ("run/checkpoint.pt", "rubbish", ["--resume"], "damaged, or not a checkpoint"),
    ("run/checkpoint.pt", "rubbish", ["--convert", "go"], "damaged, or not a checkpoint"),
    (None, None, ["--convert", "go", "--generate", "3"], "--generate: not allowed with"),
    (None, None, ["--device", "cuda"], "--device cuda: "),
    (None, None, ["--out", "verbs"], "verbs: not the folder of a run"),
    (None, None, ["--out", "verbs/train.txt"], "verbs/train.txt: "),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "train.txt").write_text("\n".join(VERBS[:40]) + "\n")
    (folder / "test.txt").write_text(TESTS)
    run("--data", str(folder), "--out", str(folder / "run"))
    return folder / "run"


@pytest.mark.parametrize("case", BAD, ids=lambda case: str(case)[:60])
def test_bad_input_ends_with_one_line(here, finished, capsys, case):
    file, text, flags, line = case
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    shutil.copytree(finished, "run")
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
    assert stopped.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err
    for path, content in before.items():
        assert path.read_bytes() == content
