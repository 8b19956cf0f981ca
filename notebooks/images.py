# The source of images.ipynb. After a change: python notebooks/build.py

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPOSITORY/blob/main/notebooks/images.ipynb)
#
# # Digits and faces: two variational autoencoders
#
# `vae_mnist.py` learns handwritten digits and `vae_anime.py` anime faces. A VAE encodes an image as
# a latent z and decodes z into an image; sampling z from its prior gives new images. Run all cells.
# Nothing is installed, so the running kernel keeps its PyTorch.
#
# - **Kaggle**: under *Add Input*, add datasets with `TibetanMNIST.npz` and `anime-faces.zip` (or a
#   folder `anime-faces` of pictures). The scripts are cloned from GitHub. If the internet is off,
#   add a dataset that holds `vae_mnist.py` and `vae_anime.py`. As accelerator choose the T4:
#   Kaggle's PyTorch cannot use the P100.
# - **Colab**: the first cell clones the repository into `scripts`. Upload your files into
#   `scripts/data`, then run the cells below it.
# - **Without data** the bundled samples are used, for a few epochs: 600 digits and 400 faces that
#   a program drew. What is learned from them only shows that the scripts work.

# %%
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image, display

KAGGLE = Path("/kaggle/input").resolve()


def find_scripts() -> Path:
    """Return the folder of vae_anime.py: near this notebook, attached to it, or cloned."""
    # On Kaggle not beside the notebook, where everything counts as its output
    clone = Path("/tmp/scripts" if KAGGLE.exists() else "scripts")
    attached = sorted(path.parent for path in KAGGLE.rglob("vae_anime.py"))
    for folder in [Path(), Path(".."), clone, *attached]:
        if (folder / "vae_anime.py").exists():
            return folder.resolve()

    address = "https://github.com/OWNER/REPOSITORY"
    if subprocess.run(["git", "clone", "--depth", "1", address, str(clone)]).returncode != 0:
        advice = "Switch the internet on, or add a dataset that holds the scripts"
        raise FileNotFoundError(f"vae_anime.py cannot be fetched into {clone}. {advice}")
    return clone.resolve()


SCRIPTS = find_scripts()
sys.path.insert(0, str(SCRIPTS))
# A script ends a user's mistake, or an interrupt, with one line and SystemExit. A notebook then
# warns that it is not going to exit.
warnings.filterwarnings("ignore", message="To exit: use")
print("scripts  ", SCRIPTS)

# %% [markdown]
# ## The data
#
# The first match below `/kaggle/input`, else the file in the repository's `data/`, else the sample.
# If that is the wrong one, name yours in the last two lines: a file, or a folder of pictures.

# %%
SAMPLE = SCRIPTS / "data" / "sample"


def find_images(pattern: str, name: str) -> Path:
    """Return what matches the pattern on Kaggle, else the file of this name."""
    attached = sorted(path for path in KAGGLE.rglob(pattern) if not path.is_relative_to(SCRIPTS))
    for path in [*attached, SCRIPTS / "data" / name, SAMPLE / name]:
        if path.exists():
            return path
    raise FileNotFoundError(f"no {name}. Add a dataset that holds it")


digits = find_images("TibetanMNIST*.npz", "TibetanMNIST.npz")
faces = find_images("anime-faces*", "anime-faces.zip")

# %% [markdown]
# The flags are those of the command line; `"--resume"` among them continues after an interrupt. On
# a CPU each λ of the digits takes some two minutes, each of the faces twelve.

# %%
# λ is the weight of the KL in the loss. A model is trained for each.
digit_weights = ["0", "1", "50", "100"]
digit_flags = ["--epochs", "8"]
face_weights = ["1", "100"]
face_flags = []
if Path(digits).resolve().parent == SAMPLE:  # a first look; few images need small batches
    digit_weights = ["0", "1", "100"]
    digit_flags = ["--limit", "600", "--epochs", "5", "--batch-size", "16"]
if Path(faces).resolve().parent == SAMPLE:
    face_flags = ["--epochs", "4", "--batch-size", "8"]
print("digits   ", digits)
print("faces    ", faces)

# %% [markdown]
# ## Digits: λ side by side
#
# loss = reconstruction + λ KL, in nats per image. One model is trained for each λ.

# %%
import vae_mnist

sys.argv = [str(SCRIPTS / "vae_mnist.py")]  # the script names it in what it advises
metrics = vae_mnist.main(["--data", str(digits), "--lambda", *digit_weights, *digit_flags])

# %% [markdown]
# At λ = 0 nothing ties the latents to the prior, so samples from the prior are blurred mixtures of
# digits. At a large λ the KL costs so much that the encoder gives z up: every sample is the same
# mean image, and the posterior variance is 1, the prior's (posterior collapse). λ = 1 is the
# evidence lower bound.

# %%
if len(digit_weights) > 1:
    display(Image("runs/vae_mnist/lambda-sheet.png", width=240 * len(digit_weights)))

# %% [markdown]
# ## Faces
#
# z describes the coarse image: colours, light and pose. Five groups of detail latents add what z
# cannot hold.

# %%
import vae_anime

sys.argv = [str(SCRIPTS / "vae_anime.py")]
metrics = vae_anime.main(["--data", str(faces), "--lambda", *face_weights, *face_flags])

# %%
if len(face_weights) > 1:
    display(Image("runs/vae_anime/lambda-sheet.png", width=240 * len(face_weights)))

# %% [markdown]
# Test images and their reconstructions at the first λ, and its learning curve. The KL rises at
# first: it is the information in the latents. The loss that was printed is lower than the curve's:
# after training the noise σ of each frequency and the prior were fitted.

# %%
run = Path("runs/vae_anime") / f"lambda-{float(face_weights[0]):g}"
display(Image(run / "reconstructions.png", width=800))
display(Image(run / "learning-curve.png", width=900))

# %% [markdown]
# ## New faces
#
# A lower temperature gives smoother faces; 1 samples as the model has learned.


# %%
def show(images: torch.Tensor, columns: int) -> None:
    """Draw images (N, 3, H, W) in rows of `columns`."""
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    picture = rows.flatten(2, 3).flatten(0, 1)
    figure, axes = plt.subplots(figsize=(columns, len(rows)))
    axes.imshow(picture)
    axes.axis("off")
    plt.show()


model, settings = vae_anime.load_finished(run, torch.device("cpu"))
for temperature in (0.5, 1.0):
    print(f"temperature {temperature}")
    show(vae_anime.sample_images(model, 24, seed=1, temperature=temperature), columns=12)

# %% [markdown]
# ## A walk between two faces
#
# Each row walks from one test image to another. The first and the last picture are real, the ten
# between them go from the one's reconstruction to the other's, and take the detail along.

# %%
walks = torch.from_numpy(np.load(run / "interpolation.npz")["image"])  # (rows, 12, 64, 64, 3)
walks = walks.permute(0, 1, 4, 2, 3)  # (rows, 12, 3, 64, 64)
show(walks[:4].flatten(0, 1), columns=12)

# %% [markdown]
# ## Sliders as pictures
#
# The principal directions of z are found from the latents of 200 samples. Each row moves a real
# face's z along one of them, from 3 standard deviations below to 3 above. The middle column is the
# face as reconstructed. The noise of its detail latents is held, so the face keeps its detail while
# colours, light and pose change.


# %%
@torch.no_grad()
def move(z: torch.Tensor, noise: list[torch.Tensor], direction: torch.Tensor) -> torch.Tensor:
    """Move one face's z (1, k) along a direction (k,), and decode it with its own detail."""
    steps = torch.linspace(-3, 3, 9)
    moved = z + steps[:, None] * direction  # (9, k)
    held = [group.expand(len(steps), -1, -1, -1) for group in noise]
    pixels = model.decode(moved, held)
    return (255 * pixels.float().clamp(0, 1)).round().byte()


samples = vae_anime.sample_images(model, 200, seed=0, temperature=1.0)
z, _ = vae_anime.read_latents(model, samples / 255)
_, sigma, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
directions = directions * sigma[:, None] / len(z) ** 0.5  # each is one standard deviation long

for face in walks[:2, 0]:
    z, noise = vae_anime.read_latents(model, face[None] / 255)
    rows = [move(z, noise, direction) for direction in directions[:5]]
    show(torch.cat(rows), columns=9)

# %% [markdown]
# ## Numbers
#
# `neg_elbo` is what to compare: reconstruction + KL, in nats per test image, whatever λ the model
# was trained with. `active_units` counts the dimensions of z whose mean differs between images.

# %%
for name, weights in (("vae_mnist", digit_weights), ("vae_anime", face_weights)):
    if len(weights) > 1:
        display(pd.read_csv(f"runs/{name}/sweep.csv").round(2))
