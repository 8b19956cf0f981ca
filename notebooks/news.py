# The source of news.ipynb. After a change: python notebooks/build.py

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPOSITORY/blob/main/notebooks/news.ipynb)
#
# # News: from files to `submission.csv`
#
# `transformer.py` trains a Transformer encoder from scratch on `train.csv` and classifies the texts
# of `test.csv`. Run all cells. Nothing is installed, so the running kernel keeps its PyTorch.
#
# - **Kaggle**: under *Add Input*, add the competition, and a dataset of word vectors
#   (`glove.6B.100d.txt`) if you find one. The scripts are cloned from GitHub. If the internet is
#   off, add a dataset that holds `transformer.py`. As accelerator choose none, or the T4: Kaggle's
#   PyTorch cannot use the P100.
# - Training takes about two minutes without a GPU, for 2,000 short texts.
# - **Colab**: the first cell clones the repository into `scripts`. Upload your files into
#   `scripts/data`, then run the cells below it.
# - **Without data** the bundled sample is used: 320 news items to train on. Its accuracy only shows
#   that the program works.

# %%
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
from IPython.display import Image, display

KAGGLE = Path("/kaggle/input").resolve()


def find_scripts() -> Path:
    """Return the folder of transformer.py: near this notebook, attached to it, or cloned."""
    # On Kaggle not beside the notebook, where everything counts as its output
    clone = Path("/tmp/scripts" if KAGGLE.exists() else "scripts")
    attached = sorted(path.parent for path in KAGGLE.rglob("transformer.py"))
    for folder in [Path(), Path(".."), clone, *attached]:
        if (folder / "transformer.py").exists():
            return folder.resolve()

    address = "https://github.com/OWNER/REPOSITORY"
    if subprocess.run(["git", "clone", "--depth", "1", address, str(clone)]).returncode != 0:
        advice = "Switch the internet on, or add a dataset that holds transformer.py"
        raise FileNotFoundError(f"transformer.py cannot be fetched into {clone}. {advice}")
    return clone.resolve()


SCRIPTS = find_scripts()
sys.path.insert(0, str(SCRIPTS))
sys.argv = [str(SCRIPTS / "transformer.py")]  # the scripts name it in what they advise
# A script ends a user's mistake, or an interrupt, with one line and SystemExit. A notebook then
# warns that it is not going to exit.
warnings.filterwarnings("ignore", message="To exit: use")
print("scripts  ", SCRIPTS)

# %% [markdown]
# ## The data
#
# The first folder below `/kaggle/input` that holds `train.csv` and `test.csv`. If there is no table
# there, it is the repository's `data/`, else the sample. If that is the wrong one, name yours in
# the last line. A sample submission beside the two files gives the header of `submission.csv`.


# %%
def holds_news(folder: Path) -> bool:
    return (folder / "train.csv").is_file() and (folder / "test.csv").is_file()


def find_news() -> Path:
    """Return the folder that holds train.csv and test.csv, and say which others do."""
    tables = sorted([*KAGGLE.rglob("*.csv*"), *KAGGLE.rglob("*.tsv"), *KAGGLE.rglob("*.zip")])
    tables = [path for path in tables if not path.is_relative_to(SCRIPTS)]
    attached = sorted({path.parent for path in tables if holds_news(path.parent)})
    for other in attached[1:]:
        print("also     ", other)
    if tables and not attached:
        found = f"no folder holds train.csv and test.csv; found {', '.join(map(str, tables[:5]))}"
        raise FileNotFoundError(f"{found}. Add the competition's data, or unpack and rename yours")
    for folder in [*attached, SCRIPTS / "data", SCRIPTS / "data" / "sample"]:
        if holds_news(folder):
            return folder
    raise FileNotFoundError("no folder holds train.csv and test.csv. Add the competition's data")


folder = find_news()  # or Path("/kaggle/input/NAME")

# %% [markdown]
# A file of word vectors beside them, or anywhere below `/kaggle/input`, is used if its name begins
# with `glove` or ends with `.vec`; a zip file has to be unpacked.

# %%
folder = Path(folder).resolve()
vectors = []
for pattern in ("glove*.txt", "glove*.txt.gz", "*.vec", "*.vec.gz"):
    found = sorted([*folder.glob(pattern), *KAGGLE.rglob(pattern)])
    vectors += [path for path in found if path.is_file()]

flags = ["--data", str(folder)]
if vectors:
    flags += ["--vectors", str(vectors[0])]
if folder == SCRIPTS / "data" / "sample":
    flags += ["--epochs", "8"]  # a first look in seconds

# The default tokenizer is torchtext's, which Kaggle and Colab do not have. NLTK's splits nearly the
# same words. A torchtext that was compiled for another PyTorch raises OSError.
try:
    import torchtext.data.utils  # noqa: F401
except (ImportError, OSError):
    flags += ["--tokenizer", "nltk"]

print("data     ", folder)
if folder == SCRIPTS / "data" / "sample":
    print("          the bundled sample")
print("vectors  ", vectors[0] if vectors else "none")
display(pd.read_csv(folder / "train.csv", nrows=5, encoding_errors="replace"))

# %% [markdown]
# ## Train
#
# Five models, each on four fifths of the texts. The accuracy is *out of fold*: each text is
# classified by the model that did not train on it. All flags of the command line can be added.

# %%
import transformer

more = []  # for a quick look ["--epochs", "2"]; after an interrupt ["--resume"]
print("transformer.py", *flags, *more)
metrics = transformer.main([*flags, *more])

# %% [markdown]
# The training loss of each model, and the confusion matrix of the held-out texts:

# %%
run = Path("runs/transformer")
display(Image(run / "learning-curve.png", width=800))

# %% [markdown]
# What the tokens of two short texts attend to in the last layer: the one whose right class the
# model is surest of, and the one whose wrong class it is surest of. A row is a token that looks, a
# column a token looked at.

# %%
for path in sorted(run.glob("attention-*.png")):
    display(Image(path, width=800))

# %% [markdown]
# ## Submit
#
# On Kaggle `submission.csv` is in `/kaggle/working`, this notebook's output: *Save Version* (which
# runs all cells again), then *Submit* on the page of the version.

# %%
submission = pd.read_csv("submission.csv", dtype=str)
print(Path("submission.csv").resolve())
print(f"{len(submission)} rows; accuracy of held-out texts {metrics['oof_accuracy']:.3f}")
display(submission.head())

# %% [markdown]
# ## A text of your own
#
# Class, confidence and text:

# %%
answer = transformer.main(["--predict", "Oil prices fell after the central bank raised its rate"])
