"""The notebooks: built from their sources, and executed in a kernel, offline."""

import base64
import io
import json
import re
import runpy
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("news", "images")
SCRIPTS = {"news": ["transformer.py"], "images": ["vae_mnist.py", "vae_anime.py"]}
SHORTER = {  # a cell that the tests put before the training, so that it takes seconds
    "news": 'flags += ["--epochs", "2", "--folds", "2"]',
    "images": (
        'digit_weights = ["0", "1"]\n'
        'digit_flags = ["--epochs", "1", "--limit", "100"]\n'
        'face_weights = ["5"]\n'
        'face_flags = ["--epochs", "1", "--limit", "100"]'
    ),
}


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """Set what a kernel on Kaggle has in its environment, and keep it from the network."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "none")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def read_notebook(name: str, kaggle: Path) -> NotebookNode:
    """Read a notebook, with another folder in place of /kaggle/input."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('Path("/kaggle/input")', f"Path({str(kaggle)!r})")
    return notebook


def shorten(name: str, notebook: NotebookNode) -> None:
    """Put the cell of SHORTER before the cell that trains."""
    trains = [".main(" in cell.source for cell in notebook.cells]
    notebook.cells.insert(trains.index(True), nbformat.v4.new_code_cell(SHORTER[name]))


def execute(notebook: NotebookNode, folder: Path) -> None:
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


def printed(notebook: NotebookNode) -> str:
    text = ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text += output.get("text", "")
    return text


def pictures(notebook: NotebookNode) -> list[np.ndarray]:
    """The pictures that the cells show, in grey."""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                content = base64.b64decode(output.data["image/png"])
                shown.append(np.asarray(Image.open(io.BytesIO(content)).convert("L")))
    return shown


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_says(name):
    build = runpy.run_path(str(NOTEBOOKS / "build.py"))["build"]
    assert (NOTEBOOKS / f"{name}.ipynb").read_text("utf-8") == build(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_has_no_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_installs_nothing(name):
    source = (NOTEBOOKS / f"{name}.ipynb").read_text("utf-8")
    assert not re.search(r"\b(pip|conda|uv) ", source)


def test_kaggle_is_told_which_notebook_to_run():
    metadata = json.loads((NOTEBOOKS / "kernel-metadata.json").read_text("utf-8"))
    assert (NOTEBOOKS / metadata["code_file"]).exists()
    assert metadata["enable_gpu"] is True
    assert metadata["enable_internet"] is False


@pytest.mark.parametrize(("name", "count"), [("news", 2), ("images", 8)])
def test_a_notebook_runs_in_a_clone(name, count, tmp_path, kernel):
    for script in SCRIPTS[name]:
        shutil.copy(ROOT / script, tmp_path)
    shutil.copytree(ROOT / "data" / "sample", tmp_path / "data" / "sample")
    (tmp_path / "notebooks").mkdir()

    notebook = read_notebook(name, kaggle=tmp_path / "no such folder")
    shorten(name, notebook)
    execute(notebook, tmp_path / "notebooks")

    assert str(Path("data", "sample")) in printed(notebook)
    assert len(pictures(notebook)) >= count
    assert all(picture.std() > 5 for picture in pictures(notebook)), "a picture is blank"


def test_news_finds_kaggles_datasets(tmp_path, kernel, monkeypatch):
    """Scripts, competition and word vectors are in a dataset each, and torchtext does not load."""
    code = tmp_path / "input" / "code"
    competition = tmp_path / "input" / "competition"
    vectors = tmp_path / "input" / "vectors"
    for folder in (code / "data", competition, vectors, tmp_path / "working"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "transformer.py", code)
    shutil.copytree(ROOT / "data" / "sample", code / "data" / "sample")

    train = pd.read_csv(ROOT / "data" / "sample" / "train.csv")
    test = pd.read_csv(ROOT / "data" / "sample" / "test.csv")
    train.iloc[::4].to_csv(competition / "train.csv", index=False)
    test.to_csv(competition / "test.csv", index=False)
    sample = pd.DataFrame({"Id": test["Id"], "Answer": 1})
    sample.to_csv(competition / "sampleSubmission.csv", index=False)
    (vectors / "glove.6B.3d.txt").write_text("the .1 .2 .3\nteam 1 0 0\noil 0 1 0\n", "utf-8")

    (tmp_path / "torchtext.py").write_text("raise OSError('undefined symbol')", "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    notebook = read_notebook("news", kaggle=tmp_path / "input")
    shorten("news", notebook)
    execute(notebook, tmp_path / "working")

    assert "--tokenizer nltk" in printed(notebook)
    assert "glove.6B.3d.txt: " in printed(notebook)
    submission = pd.read_csv(tmp_path / "working" / "submission.csv")
    assert list(submission) == ["Id", "Answer"]
    assert len(submission) == len(test)


def data_cells(kaggle: Path) -> NotebookNode:
    """The cells of news.ipynb that find the scripts and the data."""
    notebook = read_notebook("news", kaggle)
    needed = ("def find_scripts", "def find_news", "vectors = []")
    notebook.cells = [cell for cell in notebook.cells if any(n in cell.source for n in needed)]
    return notebook


@pytest.mark.parametrize("name", ["train.csv", "train.csv.zip", "questions.csv"])
def test_tables_that_are_not_news_are_named(name, tmp_path, kernel):
    (tmp_path / "input" / "mine").mkdir(parents=True)
    (tmp_path / "input" / "mine" / name).touch()
    working = tmp_path / "working"
    shutil.copytree(ROOT / "data" / "sample", working / "data" / "sample")
    shutil.copy(ROOT / "transformer.py", working)
    with pytest.raises(CellExecutionError, match=f"found .*{re.escape(name)}. Add the competition"):
        execute(data_cells(tmp_path / "input"), working)


def test_of_two_competitions_the_other_is_named(tmp_path, kernel):
    (tmp_path / "working").mkdir()
    shutil.copy(ROOT / "transformer.py", tmp_path / "working")
    for name in ("one", "two"):
        shutil.copytree(ROOT / "data" / "sample", tmp_path / "input" / name)
    (tmp_path / "input" / "glove.6B.100d.txt").mkdir()  # as Kaggle unpacks an archive
    notebook = data_cells(tmp_path / "input")
    execute(notebook, tmp_path / "working")
    assert re.search(r"also +\S+two\n", printed(notebook))
    assert re.search(r"data +\S+one\n", printed(notebook))
    assert re.search(r"vectors +none\n", printed(notebook))


def test_a_mistake_is_one_line_and_the_kernel_lives(tmp_path, kernel):
    shutil.copy(ROOT / "transformer.py", tmp_path)
    notebook = read_notebook("news", kaggle=tmp_path / "no such folder")
    [first] = [cell for cell in notebook.cells if "def find_scripts" in cell.source]
    mistake = nbformat.v4.new_code_cell(
        "import transformer\ntransformer.main(['--epochs', '0'])",
        metadata={"tags": ["raises-exception"]},
    )
    alive = nbformat.v4.new_code_cell("print('the kernel lives')")
    notebook.cells = [first, mistake, alive]
    execute(notebook, tmp_path)

    said = [output.text for output in mistake.outputs if output.output_type == "stream"]
    assert said == ["error: argument --epochs: 0: give a whole number, 1 or more\n"]
    assert "the kernel lives" in printed(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_scripts_that_cannot_be_fetched_are_named(name, tmp_path, kernel):
    notebook = read_notebook(name, kaggle=tmp_path / "no such folder")
    with pytest.raises(CellExecutionError, match="Switch the internet on"):
        execute(notebook, tmp_path)
