"""Build news.ipynb and images.ipynb from their plain sources, news.py and images.py.

    python notebooks/build.py

In a source the line `# %%` begins a cell of code, and `# %% [markdown]` a cell of text, whose lines
are comments. This is jupytext's percent format, so editors can run a source cell by cell, too.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = ("news", "images")
PLACEHOLDER = "OWNER/REPOSITORY"  # stands in the sources
REPOSITORY = "OWNER/REPOSITORY"  # the project's address on GitHub: put yours here and build


def read_cells(source: str) -> list[dict]:
    """Split a source into the cells of a notebook, without outputs."""
    cells = []
    for block in source.split("\n# %%")[1:]:
        marker, _, text = block.partition("\n")
        lines = text.strip("\n").split("\n")

        cell = {"id": f"cell-{len(cells) + 1}", "metadata": {}}
        if marker.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
            cell["cell_type"] = "markdown"
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}

        cell["source"] = "\n".join(lines).splitlines(keepends=True)
        cells.append(cell)
    return cells


def build(name: str) -> str:
    """Return the text of a notebook, as Jupyter itself would save it."""
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    notebook = {
        "cells": read_cells(source.replace(PLACEHOLDER, REPOSITORY)),
        "metadata": {
            "accelerator": "GPU",  # asks Colab for a machine with one
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    for name in NAMES:
        (FOLDER / f"{name}.ipynb").write_text(build(name), "utf-8", newline="\n")


if __name__ == "__main__":
    main()
