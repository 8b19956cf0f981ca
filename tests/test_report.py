"""report/build.py: the PDF follows the runs, the zip holds what the homework asks for, every mistake is one line."""

import hashlib
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "report"))
import build  # noqa: E402

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
    monkeypatch.setattr(build, "try_alone", lambda script: None)  # six starts of Python; two tests do them
    folder = tmp_path / "runs" / "cvae_holdout"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS | HELD_OUT))
    return tmp_path


def text_of(pdf: bytes) -> str:
    return " ".join(" ".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages).split())


def test_zip_holds_the_four_files_and_no_other(here, monkeypatch):
    monkeypatch.setattr(build, "try_alone", try_alone)
    build.main(["--student-id", "0123456"])
    with zipfile.ZipFile("hw2_0123456.zip") as archive:
        names = ["0123456_transformer.py", "0123456_vae_mnist.py", "0123456_vae_anime.py", "0123456_report.pdf"]
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
    for command in ("python transformer.py", "--compare-tokenizers", "python vae_anime.py", "--lambda 0 1 50 100"):
        assert command in out and command in text
    assert "missing   cvae_holdout" not in out


def test_a_run_on_the_sample_or_of_few_rows_is_named(here, capsys):
    sample = hashlib.sha256((ROOT / "data" / "sample" / "train.txt").read_bytes()).hexdigest()
    config = here / "runs" / "cvae_holdout" / "config.json"
    for sha256, limit, reason in ((sample, None, "on the bundled sample"), ("0" * 64, 50, "--limit 50")):
        config.write_text(json.dumps({"sha256": {"train.txt": sha256}, "arguments": {"limit": limit}}))
        build.main(["--student-id", "a1", "--force"])
        assert f"cvae_holdout: {reason}" in capsys.readouterr().out
        assert f"cvae_holdout ({reason})" in text_of(Path("report.pdf").read_bytes())
    config.write_text(json.dumps({"sha256": {"train.txt": "0" * 64}, "arguments": {"limit": None}}))
    build.main(["--student-id", "a1", "--force"])
    assert "warning" not in capsys.readouterr().out


def test_every_question_of_the_assignment_has_a_heading(here):
    build.main(["--student-id", "a1"])
    text = text_of(Path("report.pdf").read_bytes())
    for number in ("1.1.1", "1.1.2", "1.1.3", "1.2.1", "1.2.2", "1.2.3", "2.1 to 2.3", "2.4", "Appendix"):
        assert number in text


def test_planned_commands_are_ones_that_the_scripts_take(here):
    for step in build.plan(here / "runs", None, quick=False):
        if step.key != "measured":
            script = Path(step.command[1])
            sys.path.insert(0, str(script.parent))
            __import__(script.stem).parse_args(step.command[2:])


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
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert Path("hw2_kept.zip").read_text() == "mine" and not Path("report.pdf").exists()


def test_a_script_that_does_not_stand_alone_is_refused(here, monkeypatch, capsys):
    shutil.copytree(ROOT / "report", here / "report")
    for name in build.SCRIPTS:
        (here / name).write_text("import ours\n")
    monkeypatch.setattr(build, "ROOT", here)
    monkeypatch.setattr(build, "try_alone", try_alone)
    with pytest.raises(SystemExit):
        build.main(["--student-id", "1"])
    assert "does not start from an empty folder" in capsys.readouterr().err and not Path("hw2_1.zip").exists()
