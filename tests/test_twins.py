"""The rule that keeps copied code one: what stands in more than one script is the same to the letter."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_DIFFER = {"load_images", "Encoder", "Decoder", "log_prob", "mean"}
CONSTANTS = {
    "SCRIPT", "DATA", "SOURCE", "SHAPE", "LEVELS", "LATENT_DIM", "WIDTH", "EPOCHS", "LEARNING_RATE", "LINEAR_PACE",
    "WARMUP", "PRIOR_GAUSSIANS", "MAX_NORM", "(ROTATE, SCALE, SHEAR, SHIFT, FLIP)", "MAX_BYTES", "BITS_OFFSET",
}  # fmt: skip
HELPERS_END = "# data: "


def pieces(source: str) -> list[tuple[str, str]]:
    """(name, source text) of every statement of a module, docstring left out, and its banners."""
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body[1:]:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        elif isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
        found.append((name or text, text))
    return found


def differences(one: str, two: str) -> list[str]:
    """What breaks the twin rule between two sources; nothing if they are twins."""
    banners = [
        [line for line in source.splitlines() if line.startswith("# ") and "---" not in line] for source in (one, two)
    ]
    wrong = ["banners"] if banners[0] != banners[1] else []
    first, second = ([(n, t) for n, t in pieces(source) if n not in CONSTANTS] for source in (one, two))
    if [name for name, _ in first] != [name for name, _ in second]:
        wrong.append("names or their order")
    for (name, text), (_, other) in zip(first, second, strict=False):
        if name in MAY_DIFFER and text == other:
            wrong.append(f"{name} has become identical")
        elif name not in MAY_DIFFER and text != other:
            wrong.append(name)
    return wrong


@pytest.fixture
def twins():
    return [(ROOT / name).read_text(encoding="utf-8") for name in ("vae_mnist.py", "vae_anime.py")]


def test_the_twins_are_twins(twins):
    assert differences(*twins) == []


@pytest.mark.parametrize(
    "old, new, blamed",
    [
        ("(distance + trace - mu.shape[1]", "(distance + trace + mu.shape[1]", "kl_to_each"),
        ("def reparameterize", "def resample", "names or their order"),
        ("# model\n", "# the model\n", "banners"),
        ("import csv\n", "", "names or their order"),
    ],
)
def test_the_rule_sees_a_mutation(twins, old, new, blamed):
    assert twins[1].count(old) >= 1
    assert blamed in differences(twins[0], twins[1].replace(old, new))


def test_the_rule_sees_a_copied_block(twins):
    blocks = [dict(pieces(source)) for source in twins]
    assert "mean has become identical" in differences(twins[0], twins[1].replace(blocks[1]["mean"], blocks[0]["mean"]))


def shared_part(source: str) -> str:
    start = source.index("# errors, devices, run folders, checkpoints (the same to the letter")
    return source[start : source.index(HELPERS_END, start)]


@pytest.mark.parametrize("script", ["transformer.py", "lab4/cvae.py"])
def test_helpers_are_the_same_in_every_script(twins, script):
    source = (ROOT / script).read_text(encoding="utf-8")
    assert shared_part(source) == shared_part(twins[0])
    ours, theirs = dict(pieces(source)), dict(pieces(twins[0]))
    for name in ("checked", "Help", "positive", "seed", "positive_float", "not_negative", "not_negative_int",
                 "learning_rate", "share_gradients", "reparameterize", "new_figure", "save_figure"):  # fmt: skip
        if name in ours:
            assert ours[name] == theirs[name], name
    assert {"checked", "learning_rate", "new_figure", "save_figure"} <= set(ours)
