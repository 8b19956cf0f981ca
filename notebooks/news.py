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
    attached = sorted(path.parent for path in KAGGLE.rglob("transformer.py"))
    for folder in [Path(), Path(".."), Path("scripts"), *attached]:
        if (folder / "transformer.py").exists():
            return folder.resolve()

    clone = ["git", "clone", "--depth", "1", "https://github.com/OWNER/REPOSITORY", "scripts"]
    if subprocess.run(clone).returncode != 0:
        advice = "Switch the internet on, or add a dataset that holds transformer.py"
        raise FileNotFoundError(f"transformer.py cannot be fetched. {advice}")
    return Path("scripts").resolve()


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
# The first folder below `/kaggle/input` that holds `train.csv` and `test.csv`, else the
# repository's `data/`, else the sample. If that is the wrong one, set `folder` yourself. A sample
# submission beside the two files gives the header of `submission.csv`.


# %%
def find_news() -> Path:
    """Return the folder that holds train.csv and test.csv."""
    attached = sorted(path.parent for path in KAGGLE.rglob("train.csv"))
    attached = [folder for folder in attached if not folder.is_relative_to(SCRIPTS)]
    for folder in [*attached, SCRIPTS / "data", SCRIPTS / "data" / "sample"]:
        if (folder / "train.csv").exists() and (folder / "test.csv").exists():
            return folder
    raise FileNotFoundError("no folder holds train.csv and test.csv. Add the competition's data")


folder = find_news()
vectors = sorted([*folder.glob("glove*.txt"), *KAGGLE.rglob("glove*.txt")])

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

display(pd.read_csv(folder / "train.csv", nrows=5, encoding_errors="replace"))

# %% [markdown]
# ## Train
#
# Five models, each on four fifths of the texts. The accuracy is *out of fold*: each text is
# classified by the model that did not train on it. Add flags as on the command line, such as
# `"--epochs", "20"`; `"--resume"` continues after an interrupt.

# %%
import transformer

print("transformer.py", *flags)
metrics = transformer.main(flags)

# %% [markdown]
# The loss of each model, and the confusion matrix of the held-out texts:

# %%
run = Path("runs/transformer")
display(Image(run / "learning-curve.png", width=800))

# %% [markdown]
# What the tokens of two texts attend to in the last layer: one that is classified right, and one
# wrong. A row is a token that looks, a column a token looked at.

# %%
for path in sorted(run.glob("attention-*.png")):
    display(Image(path, width=600))

# %% [markdown]
# ## Submit
#
# `submission.csv` is in the folder of this notebook's outputs. On Kaggle: *Save Version*, then
# *Submit* on its page.

# %%
submission = pd.read_csv("submission.csv", dtype=str)
print(f"{len(submission)} rows; accuracy of held-out texts {metrics['oof_accuracy']:.3f}")
display(submission.head())

# %% [markdown]
# ## A text of your own
#
# Class, confidence and text:

# %%
answer = transformer.main(["--predict", "Oil prices fell after the central bank raised its rate"])
