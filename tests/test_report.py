"""report/: the PDF follows the runs, the zip holds what is asked for, every mistake is one line."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "report"), str(ROOT / "bench")]
import all as bench_all
import build
import measure
import pictures

sys.path.insert(0, str(Path(__file__).parent))
from test_reliability import WORDS, cvae, run, transformer, vae_anime, vae_mnist

SAMPLE = ROOT / "data" / "sample"
pytestmark = pytest.mark.figures
try_alone = build.try_alone
METRICS = {
    "bleu4": 0.5,
    "gaussian_score": 0.25,
    "gaussian_score_10000": 0.26,
    "distinct_valid_per_100": 12.0,
    "verbs": 99,
}
HELD_OUT = {"heldout_verbs": 7, "heldout_exact": 0.4321, "heldout_bleu4": 0.6}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to stand in, with one finished run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        build, "try_alone", lambda script: None
    )  # six starts of Python; two tests do them
    folder = tmp_path / "runs" / "cvae_holdout"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS | HELD_OUT))
    return tmp_path


def text_of(pdf: bytes) -> str:
    return " ".join(
        " ".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages).split()
    )


def test_zip_holds_the_four_files_and_no_other(here, monkeypatch):
    monkeypatch.setattr(build, "try_alone", try_alone)
    build.main(["--student-id", "0123456"])
    with zipfile.ZipFile("hw2_0123456.zip") as archive:
        names = [
            "0123456_transformer.py",
            "0123456_vae_mnist.py",
            "0123456_vae_anime.py",
            "0123456_report.pdf",
        ]
        assert archive.namelist() == names
        for name in build.SCRIPTS:
            assert archive.read(f"0123456_{name}") == (ROOT / name).read_bytes()
        assert archive.read(names[3]) == Path("report.pdf").read_bytes()
    assert not list(here.glob(".*"))


def test_a_number_that_changes_in_a_run_changes_in_the_pdf(here, capsys):
    build.main(["--student-id", "a1"])
    assert "43.2%" in text_of(Path("report.pdf").read_bytes())
    (here / "runs" / "cvae_holdout" / "metrics.json").write_text(
        json.dumps(METRICS | HELD_OUT | {"heldout_exact": 0.99})
    )
    build.main(["--student-id", "a1", "--force"])
    text = text_of(Path("report.pdf").read_bytes())
    assert "99.0%" in text and "43.2%" not in text


def test_a_missing_run_is_named_with_its_command(here, capsys):
    build.main(["--student-id", "a1"])
    out, text = capsys.readouterr().out, text_of(Path("report.pdf").read_bytes())
    for command in (
        "python transformer.py",
        "transformer.py --tokenizer nltk",
        "measure.py tokenizers",
        "python vae_anime.py",
        "--lambda 0 1 50 100",
        "measure.py vae_anime",
        "--kl-schedule cyclical",
        "measure.py schedules",
    ):
        assert command in out and command in text
    assert "missing   cvae_holdout" not in out


def test_a_run_on_the_sample_or_of_few_rows_is_named(here, capsys):
    sample = hashlib.sha256((ROOT / "data" / "sample" / "train.txt").read_bytes()).hexdigest()
    config = here / "runs" / "cvae_holdout" / "config.json"
    for sha256, limit, reason in (
        (sample, None, "on the bundled sample"),
        ("0" * 64, 50, "--limit 50"),
    ):
        config.write_text(json.dumps({"settings": {"train_sha256": sha256, "limit": limit}}))
        build.main(["--student-id", "a1", "--force"])
        assert f"cvae_holdout: {reason}" in capsys.readouterr().out
        assert f"cvae_holdout ({reason})" in text_of(Path("report.pdf").read_bytes())
    config.write_text(json.dumps({"settings": {"train_sha256": "0" * 64, "limit": None}}))
    build.main(["--student-id", "a1", "--force"])
    assert "warning" not in capsys.readouterr().out


def test_every_question_of_the_assignment_has_a_heading(here):
    build.main(["--student-id", "a1"])
    text = text_of(Path("report.pdf").read_bytes())
    for number in (
        "1.1.1",
        "1.1.2",
        "1.1.3",
        "1.2.1",
        "1.2.2",
        "1.2.3",
        "2.1 to 2.3",
        "2.4",
        "Appendix",
    ):
        assert number in text


def parsed(command):
    """The settings that a planned command gives to its script."""
    script = Path(command[1])
    sys.path.insert(0, str(script.parent))
    settings = __import__(script.stem).parse_args(command[2:])
    return settings[0] if isinstance(settings, tuple) else settings


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("data", [None, ROOT / "data" / "sample"])
def test_planned_commands_are_ones_that_the_scripts_take(here, quick, data):
    steps = build.make_plan(here / "runs", data, quick)
    for step in steps:
        config = parsed(step.command)
        if not step.needs:
            assert step.done.is_relative_to(config.out)
            assert data is None or config.data.exists()


def test_each_planned_step_has_a_place_of_its_own(here):
    steps = build.make_plan(here / "runs", None, False)
    assert len({step.done for step in steps}) == len(steps)
    assert len({step.key for step in steps}) == len(steps)


def test_what_is_measured_has_been_run_before(here):
    steps = build.make_plan(here / "runs", None, False)
    places = [step.done for step in steps]
    for i, step in enumerate(steps):
        assert set(step.needs) <= set(places[:i]) | lambdas_of(steps)


def lambdas_of(steps):
    """metrics.json of each λ of the planned sweeps, which end with sweep.csv."""
    sweeps = [step.done.parent for step in steps if step.done.name == "sweep.csv"]
    return {run / f"lambda-{value}" / "metrics.json" for run in sweeps for value in build.LAMBDAS}


def test_what_is_measured_is_measured_again_after_a_new_run(here):
    run = here / "runs" / "comparison"
    [step] = [one for one in build.make_plan(here / "runs", None, False) if one.key == "comparison"]
    for name in build.TOKENIZERS:
        (run / name).mkdir(parents=True)
        (run / name / "metrics.json").write_text("{}")
    assert step.missing()
    step.done.write_text("")
    os.utime(step.done, (3e9, 3e9))
    assert not step.missing()
    os.utime(run / "nltk" / "metrics.json", (4e9, 4e9))
    assert step.missing()


# measure.py ---------------------------------------------------------------------------------------


def read_measured(run):
    return json.loads(Path(run, "measured.json").read_text())


def test_a_deleted_word_takes_its_right_neighbours_pair_with_it():
    text = torch.arange(1, 17).view(4, 4)  # word, column, key and pair of four tokens
    shorter = measure.keep_tokens(text, torch.tensor([0, 2, 3]))
    assert shorter.tolist() == [[1, 2, 3, 4], [9, 10, 11, transformer.NO_KEY], [13, 14, 15, 16]]


def test_transformer_is_measured(here):
    run(transformer, "--batch-size", "8", "--out", "run")
    measure.main(["transformer", "run"])
    measured = read_measured("run")
    assert measured["texts"] == 60
    assert measured["deletion_texts"] > 50
    assert 0 < measured["padding_share_by_length"] < measured["padding_share_random"] < 0.9
    assert 0 < measured["unknown_share"] < 0.6
    assert math.isfinite(measured["difference_se"])

    words = pd.read_csv("run/attention_words.csv")
    assert words["count"].min() >= 5
    assert "<unk>" not in set(words["word"])
    assert "the" in set(words["word"])


def test_padding_is_what_the_cells_without_tokens_are():
    assert measure.padding_share([1, 3, 2], [[0, 1], [2]]) == pytest.approx(2 / 8)


def test_tokenizers_are_compared(here, capsys):
    for name in build.TOKENIZERS:
        run(transformer, "--tokenizer", name, "--out", f"runs/{name}")
    measure.main(["tokenizers", "runs"])
    table = pd.read_csv("runs/tokenizers.csv").set_index("tokenizer")
    assert list(table.index) == list(build.TOKENIZERS)
    assert table["unk_share"]["whitespace"] == table["unk_share"].max()
    for name in build.TOKENIZERS:
        metrics = json.loads(Path("runs", name, "metrics.json").read_text())
        assert table["oof_accuracy"][name] == pytest.approx(metrics["oof_accuracy"], abs=1e-4)
    assert Path("runs/tokenizers.png").stat().st_size > 10_000

    path = Path("runs/nltk/config.json")
    config = json.loads(path.read_text())
    config["settings"]["train_sha256"] = "0" * 64
    path.write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        measure.main(["tokenizers", "runs"])
    assert stopped.value.code == 2
    assert "other files" in capsys.readouterr().err


def test_new_tokens_are_those_that_the_other_half_has_too_seldom(monkeypatch):
    texts = [["a", "b"], ["a", "c"], ["a"], ["b", "a"]]
    found = measure.describe_tokens(texts)
    assert found == {"tokens_per_text": 1.75, "vocabulary": 3, "unk_share": 0.5}
    monkeypatch.setattr(measure, "SEEN", 1)
    assert measure.describe_tokens(texts)["unk_share"] == 0.25


@pytest.mark.parametrize("script", [vae_mnist, vae_anime], ids=lambda script: script.__name__)
def test_each_lambda_is_measured(here, monkeypatch, script):
    monkeypatch.setattr(measure, "IWAE_SAMPLES", 4)
    script.main([*WORDS[script].split(), "--lambda", "0", "1", "--out", "run"])
    measure.main([script.__name__, "run"])
    for name in ("lambda-0", "lambda-1"):
        measured = read_measured(Path("run", name))
        low, high = measured["aggregate_covariance_eigenvalues"]
        assert 0 < low < high
        assert measured["aggregate_mean_largest"] > 0
        assert measured["mutual_information_limit"] == pytest.approx(math.log(4))
        assert -0.1 < measured["mutual_information"] < measured["mutual_information_limit"] + 0.1
        assert measured["iwae"] <= measured["iwae_neg_elbo"] + 1
        assert Path("run", name, "aggregate-posterior.png").stat().st_size > 10_000
    assert Path("run", "rate-distortion.png").stat().st_size > 10_000


def test_other_images_than_the_run_was_trained_on_are_refused(here, capsys):
    words = WORDS[vae_mnist].split()
    vae_mnist.main([*words, "--out", "run"])
    path = Path("run/lambda-1/config.json")
    config = json.loads(path.read_text())
    other = Path("other.npz")
    images, _ = vae_mnist.load_images(SAMPLE / "TibetanMNIST.npz")
    np.savez(other, image=images[:100, 0])
    config["settings"]["data"] = str(other)
    path.write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        measure.main(["vae_mnist", "run"])
    assert stopped.value.code == 2
    assert "trained on another file" in capsys.readouterr().err


def test_mutual_information_of_posteriors_that_are_all_alike():
    mu = torch.zeros(500, 4).double()
    scale_tril = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double().tril()
    scale_tril.diagonal().abs_()
    assert abs(measure.mutual_information(mu, scale_tril.expand(500, 4, 4))) < 1e-6


@pytest.fixture
def sharp():
    """Means and Cholesky factors of posteriors that tell images apart but in one place."""
    mu = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double()
    mu[:, 3] = 0
    sigma = torch.tensor([0.0025, 0.0025, 0.0025, 1.0]).double()
    return mu, sigma.diag().expand(500, 4, 4)


def test_mutual_information_of_sharp_posteriors(sharp):
    assert measure.mutual_information(*sharp) == pytest.approx(math.log(500), abs=0.05)


def test_the_aggregate_of_samples_of_the_prior_is_the_prior(sharp):
    white = measure.Whitening(torch.zeros(4).double(), torch.eye(4).double())
    mean, eigenvalues = measure.aggregate_posterior(*sharp, white)
    assert mean.abs().max() < 0.2
    assert 0.7 < eigenvalues.min() < eigenvalues.max() < 1.4


def test_the_aggregate_is_measured_in_units_of_the_prior(sharp):
    mu, scale_tril = sharp
    white = measure.Whitening(torch.full((4,), 3.0).double(), 2 * torch.eye(4).double())
    mean, eigenvalues = measure.aggregate_posterior(mu + 3, scale_tril, white)
    assert mean.abs().max() < 0.4
    assert 2.8 < eigenvalues.min() < eigenvalues.max() < 5.6


def test_covariances_of_posteriors_count():
    """All posteriors alike but in their means, so that their mixture is a Gaussian, too."""
    torch.manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [2.0, 0.5]]).double()
    covariance = root @ root.mT
    spread = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()  # of the means
    mu = torch.randn(2000, 2).double() @ torch.linalg.cholesky(spread).mT
    scale_tril = root.expand(2000, 2, 2)

    white = measure.Whitening(torch.zeros(2).double(), torch.eye(2).double())
    _, eigenvalues = measure.aggregate_posterior(mu, scale_tril, white)
    expected = torch.linalg.eigvalsh(covariance + spread)
    torch.testing.assert_close(eigenvalues, expected, rtol=0.1, atol=0)

    information = 0.5 * (torch.logdet(covariance + spread) - torch.logdet(covariance)).item()
    assert measure.mutual_information(mu, scale_tril) == pytest.approx(information, abs=0.1)


def test_whitening_gives_the_prior_mean_0_and_covariance_1():
    torch.manual_seed(0)
    factors = torch.randn(3, 4, 4)
    scale_tril = torch.linalg.cholesky(factors @ factors.mT + 0.1 * torch.eye(4))
    weights = torch.tensor([0.2, 0.3, 0.5])
    prior = vae_mnist.MixturePrior(weights, torch.randn(3, 4), scale_tril)
    white = measure.whitening(prior)
    z = prior.sample(200_000, 1.0, torch.Generator().manual_seed(0)).double()
    u = (z - white.mean) @ white.A.T
    torch.testing.assert_close(u.mean(0), torch.zeros(4).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(u.T.cov(), torch.eye(4).double(), atol=0.03, rtol=0)


def test_schedules_are_drawn_beside_each_other(here):
    for name in build.SCHEDULES:
        run(cvae, "--out", f"runs/{name}", "--kl-schedule", name)
    measure.main(["schedules", "runs"])
    assert Path("runs/schedules.png").stat().st_size > 10_000


def test_a_notebook_s_backend_does_not_stop_it(here):
    environment = os.environ | {"MPLBACKEND": "module://not_installed"}
    command = [sys.executable, str(ROOT / "report" / "measure.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", measure.MEASURES)
def test_nothing_to_measure_is_one_line(here, capsys, what):
    with pytest.raises(SystemExit) as stopped:
        measure.main([what, "nowhere"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: nowhere") and err.count("\n") == 1


# mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--student-id", "../x"], "letters and digits only"),
        (["--student-id", ""], "letters and digits only"),
        (["--student-id", "１２"], "letters and digits only"),
        ([], "--student-id"),
        (["--student-id", "1", "--out", "nowhere"], "no such folder"),
        (["--student-id", "kept"], "exists already"),
        (["--student-id", "1" * 300], "32 at most"),
        (["--student-id", "1", "--runs", "hw2_kept.zip/runs"], "Name another folder"),
        (["--student-id", "1", "--quick", "--data", "."], "Leave out --quick or --data"),
    ],
)
def test_mistakes_end_with_one_line(here, capsys, flags, line):
    Path("hw2_kept.zip").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        build.main(flags)
    err = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and line in err
    )
    assert Path("hw2_kept.zip").read_text() == "mine" and not Path("report.pdf").exists()


def test_a_script_that_does_not_stand_alone_is_refused(here, monkeypatch, capsys):
    shutil.copytree(ROOT / "report", here / "report")
    for name in build.SCRIPTS:
        (here / name).write_text("import ours\n")
    monkeypatch.setattr(build, "ROOT", here)
    monkeypatch.setattr(build, "try_alone", try_alone)
    with pytest.raises(SystemExit):
        build.main(["--student-id", "1"])
    assert (
        "does not start from an empty folder" in capsys.readouterr().err
        and not Path("hw2_1.zip").exists()
    )


def test_measured_tables_go_between_their_marks(tmp_path):
    """What has not been measured stays as it was, and so does the text around it."""
    document = tmp_path / "results.md"
    shutil.copy(ROOT / "docs" / "results.md", document)
    before = document.read_text(encoding="utf-8")
    assert set(bench_all.write_tables(document, tmp_path)) == set(bench_all.TABLES)
    assert document.read_text(encoding="utf-8") == before
    table = "| model | x |\n| --- | --- |\n| ours | \\1 |"
    (tmp_path / "news.txt").write_text(f"14 texts\n{table}\ndone\n", encoding="utf-8")
    terms = {"test": 2000.5, "train": 1.0}
    metrics = {"reconstruction": terms, "kl": terms, "active_units": 3, "latent_dim": 4}
    for weight in bench_all.LAMBDAS:
        for name in ("digits", "faces"):
            folder = tmp_path / f"{name}-lambda" / f"lambda-{weight}"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(metrics))
    missing = bench_all.write_tables(document, tmp_path)
    after = document.read_text(encoding="utf-8")
    assert "news" not in missing and "lambda" not in missing and "images" in missing
    assert f"<!-- news -->\n{table}\n<!-- /news -->" in after
    assert "| 50 | 2,000.50 | 2,000.5 | 3 | 2,000.50 | 2,000.5 | 3 |" in after
    assert after.partition("<!-- news -->")[0] == before.partition("<!-- news -->")[0]
    assert after.count("<!-- /") == before.count("<!-- /") == len(bench_all.TABLES)


def leave_runs_of_images(out):
    """Metrics and printed tables of three seeds, made up."""
    for seed in bench_all.SEEDS:
        for name in ("digits", "faces"):
            folder = out / f"{name}-{seed}" / "lambda-1"
            folder.mkdir(parents=True)
            metrics = {"neg_elbo": {"test": 76.0 + seed, "train": 76.0}, "bits_per_dim": 4.0}
            metrics |= {"psnr_db": 30.0 + seed / 10, "active_units": 32 - seed, "latent_dim": 32}
            metrics |= {"parameters": 1234567, "seconds": 600}
            (folder / "metrics.json").write_text(json.dumps(metrics))
            measured = {"iwae": 71.0, "iwae_neg_elbo": 75.0, "bits_per_dim_one_sigma": 5.0}
            measured |= {"iwae_samples": 64, "iwae_images": 100}
            (folder / "measured.json").write_text(json.dumps(measured))
            heading = "| images | sure | frequency |\n| --- | --- | --- |"
            row = f"| real (9) | 0.9{seed} | {9 + seed} to {9.5 + seed} |"
            (out / f"{name}-{seed}-drawn.txt").write_text(f"right\n{heading}\n{row}\n")


def test_tables_of_images_are_means_over_seeds(tmp_path):
    leave_runs_of_images(tmp_path)
    assert bench_all.images_table(tmp_path).splitlines()[2:] == [
        "| `python vae_mnist.py` | **77.00 ± 1.00 nats** | 76.00 ± 0.00 | 30.10 ± 0.10 "
        "| 30 of 32 | 1,234,567 | 10.0 ± 0.0 |",
        "| `python vae_anime.py` | **4.000 ± 0.000 bits/dim** | 4.000 ± 0.000 | 30.10 ± 0.10 "
        "| 30 of 32 | 1,234,567 | 10.0 ± 0.0 |",
    ]
    assert bench_all.measured_table(tmp_path).splitlines()[3:] == [
        "| faces, 64 samples, 100 images | 71.0 ± 0.0 | 75.0 ± 0.0 | 5.000 ± 0.000 |"
    ]
    assert bench_all.samples_table(tmp_path, "digits").splitlines()[2:] == [
        "| real (9) | 0.91 ± 0.01 | 9 to 11.5 |"
    ]
    assert bench_all.mean_and_spread([1234.5], 1) == "1,234.5"


def test_pictures_are_tiled_with_a_gap():
    images = np.stack([np.full((2, 64, 64, 3), shade, np.uint8) for shade in (0, 100)])
    picture = np.asarray(pictures.tile(images, size=32))
    assert picture.shape == (67, 67, 3)
    assert (picture[:32, :32] == 0).all()
    assert (picture[35:, 35:] == 100).all()
    assert (picture[32:35] == 255).all()


def test_a_picture_whose_run_is_missing_stays(tmp_path, capsys):
    pictures.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.count("unchanged ") == len(said.splitlines()) == 6
    assert not list((tmp_path / "out").iterdir())


def test_unseen_accuracies_are_read_from_the_results():
    found = build.unseen_accuracies()
    assert set(found) == {"glove.6B.100d", "none"}
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    news = results.partition("<!-- news -->")[2].partition("<!-- /news -->")[0]
    for text in found.values():
        assert re.fullmatch(r"\.\d{4} ± \.\d{4}", text)
        assert f"{text} |\n" in news
