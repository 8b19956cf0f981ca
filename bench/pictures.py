"""Draw the pictures of README.md and docs/results.md from the runs that bench/all.py left.

python bench/pictures.py --runs runs/all
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "report" / "figures"
sys.path.insert(0, str(ROOT))
import vae_anime

GAP = 3  # white pixels between pictures

# Figures of runs: name, where it is, and its width in README
DRAWN = [
    ("digits-samples", "digits-0/lambda-1/samples.png", 800),
    ("digits-lambda", "digits-lambda/lambda-sheet.png", 1200),
    ("faces-lambda", "faces-lambda/lambda-sheet.png", 1200),
    ("attention", "news-sample/attention-right.png", 1050),
    ("cvae-training", "cvae/default-0/training.png", 960),
]


def tile(images: np.ndarray, size: int) -> Image.Image:
    """One picture of rows of images, (rows, columns, 64, 64, 3), each `size` pixels wide."""
    rows, columns = images.shape[:2]
    pitch = size + GAP
    sheet = Image.new("RGB", (columns * pitch - GAP, rows * pitch - GAP), "white")
    for row in range(rows):
        for column in range(columns):
            image = Image.fromarray(images[row, column]).resize((size, size), Image.LANCZOS)
            sheet.paste(image, (column * pitch, row * pitch))
    return sheet


def sampled_faces(run: Path) -> Image.Image:
    model, _ = vae_anime.load_finished(run, torch.device("cpu"))
    temperature = vae_anime.Config().temperature
    images = vae_anime.sample_images(model, 84, seed=0, temperature=temperature)
    return tile(images.permute(0, 2, 3, 1).numpy().reshape(6, 14, 64, 64, 3), size=64)


def walks(run: Path) -> Image.Image:
    """Four walks, without the real faces at their ends."""
    images = np.load(run / "interpolation.npz")["image"]
    return tile(images[:4, 1:-1], size=96)


def drawn(path: Path, width: int) -> Image.Image:
    """A figure of a run, not wider than `width`."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((width, 4 * width), Image.LANCZOS)
    return image


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG with 256 colours, a third of the size, or a JPEG where that would leave bands."""
    if path.suffix == ".png":
        image = image.quantize(256)
    image.save(path, optimize=True, quality=90)
    print(f"wrote     {path}")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, default=ROOT / "runs" / "all", help="what bench/all.py left")
    add("--out", type=Path, default=FIGURES, help="folder of the pictures [report/figures/]")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    for name, place, width in DRAWN:
        if (args.runs / place).exists():
            save(drawn(args.runs / place, width), args.out / f"{name}.png")
        else:
            print(f"unchanged {name}.png: no {args.runs / place}")

    faces = args.runs / "faces-0" / "lambda-1"
    if (faces / "interpolation.npz").exists():
        save(sampled_faces(faces), args.out / "faces-samples.jpg")
        save(walks(faces), args.out / "faces-walk.jpg")
    else:
        print(f"unchanged faces-samples.jpg, faces-walk.jpg: no finished run in {faces}")


if __name__ == "__main__":
    main()
