"""The measures of the four scripts, and the rule that keeps copied code one."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"transformer.py": 800, "vae_mnist.py": 800, "vae_anime.py": 800, "lab4/cvae.py": 700}
MAY_DIFFER = {"load_images", "augment", "VAE", "bits_per_dim"}
ONLY_FACES = {"Rung", "Pixels", "frequencies"}  # of network and likelihood
CONSTANTS = {
    *("(SCRIPT, VERSION)", "DATA", "SOURCE", "SHAPE", "LEVELS", "LATENT_DIM", "EPOCHS", "EPSILON"),
    *("WIDTH", "(WIDTH, DETAIL)", "LADDER", "SMOOTH_SIGMA", "PRIOR_GAUSSIANS", "LEARNING_RATE"),
    *("MAX_NORM", "(ROTATE, SCALE, SHEAR, SHIFT)", "(REFINE, REFINE_RATE)", "TEMPERATURE"),
    *("MAX_BYTES", "(MAX_BYTES, MAX_PIXELS)"),
}
SHARED = {
    *("fail", "one_line", "check_ranges", "exit_on_signals", "seed_all", "pick_device", "autocast"),
    *("write_file", "write_json", "open_run", "load_checkpoint"),
}
HOOKS = {"__init__", "forward", "kl_to_mixture"}  # called by torch
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # what is imported under another name


def pieces(source: str) -> list[tuple[str, str]]:
    """(name, source text) of every statement of a module, docstring and imports left out."""
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue  # ruff finds the unused ones
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
    banners = [re.findall(r"^# (.+?) -{3,}$", source, re.M) for source in (one, two)]
    wrong = ["banners"] if banners[0] != banners[1] else []
    first, second = (
        [(n, t) for n, t in pieces(source) if n not in CONSTANTS | ONLY_FACES]
        for source in (one, two)
    )
    if [name for name, _ in first] != [name for name, _ in second]:
        wrong.append("names or their order")
    for (name, text), (_, other) in zip(first, second, strict=False):
        if name in MAY_DIFFER and text == other:
            wrong.append(f"{name} has become identical")
        elif name not in MAY_DIFFER and text != other:
            wrong.append(name)
    return wrong


def functions(source: str) -> list[tuple[ast.FunctionDef, int]]:
    """Every function and method of a source, and how many lines it has with its decorators."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    firsts = [min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes]
    return [(n, n.end_lineno - first + 1) for n, first in zip(nodes, firsts, strict=True)]


def unmeasured(source: str, ceiling: int) -> list[str]:
    """Which of the design's measures a script breaks."""
    lines, wrong = source.splitlines(), []
    if len(lines) > ceiling:
        wrong.append(f"{len(lines)} lines")
    wrong += [f"line {i} is too long" for i, line in enumerate(lines, 1) if len(line) > 100]
    for node, length in functions(source):
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        arguments = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        training = re.fullmatch(r"train(_\w+)?", node.name)
        if length > (55 if training else 60):
            wrong.append(f"{node.name} has {length} lines")
        if len(arguments) > 6:
            wrong.append(f"{node.name} takes {len(arguments)} arguments")
    parser = next((n for n, _ in functions(source) if n.name == "parse_args"), None)
    inside = range(parser.lineno - 1, parser.end_lineno + 2) if parser else ()
    marked = [i for i, line in enumerate(lines, 1) if re.search("# fmt: (off|skip)", line)]
    if any(i not in inside or "skip" in lines[i - 1] for i in marked):
        wrong.append("fmt: off")
    return wrong


def never_called(source: str) -> set[str]:
    """Names that a script defines and never mentions again."""
    tree = ast.parse(source)
    defined = {node.name for node, _ in functions(source)} - HOOKS
    defined |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return defined - names - {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def packages(source: str) -> set[str]:
    """What a script imports beside the standard library, under its name on PyPI."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= set(re.findall(r'import_module\("([\w.]+)"\)', source))
    roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    return {PACKAGES.get(root, root) for root in roots}


def pins(text: str) -> set[str]:
    return set(re.findall(r"^([\w-]+==[\w.]+)", text, re.M))


def wrong_dependencies(source: str) -> set[str]:
    """Where the PEP 723 block departs from requirements.txt or from what the script imports."""
    block = re.match(r"# /// script\n(.*?)^# ///\n", source, re.M | re.S)
    if not block:
        return {"no block"}
    settings = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.M))
    pinned = pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    imported = {pin for pin in pinned if pin.partition("==")[0] in packages(source)}
    python = set() if settings["requires-python"] == ">=3.11" else {"requires-python"}
    return python | (imported ^ set(settings["dependencies"]))


def read(script: str) -> str:
    return (ROOT / script).read_text(encoding="utf-8")


@pytest.fixture
def twins():
    return [read("vae_mnist.py"), read("vae_anime.py")]


def test_the_twins_are_twins(twins):
    assert differences(*twins) == []


@pytest.mark.parametrize(
    "old, new, blamed",
    [
        ("- 0.5 * trace", "+ 0.5 * trace", "kl_to_mixture"),
        ("def infer", "def deduce", "names or their order"),
        ("# model -", "# the model -", "banners"),
        ("def infer", "def added():\n    pass\n\n\ndef infer", "names or their order"),
    ],
)
def test_the_rule_sees_a_mutation(twins, old, new, blamed):
    assert twins[1].count(old) >= 1
    assert blamed in differences(twins[0], twins[1].replace(old, new))


def test_the_rule_sees_a_copied_block(twins):
    digits, faces = (dict(pieces(source)) for source in twins)
    copied = twins[1].replace(faces["augment"], digits["augment"])
    assert "augment has become identical" in differences(twins[0], copied)


@pytest.mark.parametrize("script", SCRIPTS)
def test_measures(script):
    assert unmeasured(read(script), SCRIPTS[script]) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_helper_is_carried_that_is_never_called(script):
    assert not never_called(read(script)) - {"main"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_dependencies_are_the_pins(script):
    assert not wrong_dependencies(read(script))


def test_helpers_are_the_same_in_every_script():
    found = [dict(pieces(read(script))) for script in SCRIPTS]
    for name in SHARED:
        assert len({blocks[name] for blocks in found if name in blocks}) == 1, name
    texts = set.intersection(*(set(blocks.values()) for blocks in found))
    definitions = [text for text in texts if re.match(r"(@.*\n)*(def|class) ", text)]
    assert sum(text.count("\n") + 1 for text in definitions) <= 120


LONG = "def added():\n" + "    print()\n" * 60
TRAIN = "def train_added():\n" + "    print()\n" * 55
MUTATIONS = {
    "lines": "x = 1\n" * 800,
    "line 1 is too long": "x = " + "1" * 100,
    "added has 61 lines": LONG,
    "train_added has 56 lines": TRAIN,
    "added takes 7 arguments": "def added(a, b, c, *, d, e, f, g):\n    pass\n",
    "fmt: off": "x = [1,\n2]  # fmt: skip\n",
}


@pytest.mark.parametrize("blamed", MUTATIONS)
def test_the_measures_see_a_mutation(twins, blamed):
    wrong = unmeasured(MUTATIONS[blamed] + "\n" + twins[0], 800)
    assert any(blamed in text for text in wrong)


def test_the_measures_see_an_idle_helper_and_a_wrong_pin(twins):
    assert "idle" in never_called(twins[0] + "\n\ndef idle():\n    pass\n")
    assert wrong_dependencies(twins[0].replace('"numpy==', '"numpy==9'))
    assert wrong_dependencies(twins[0].replace("import numpy as np", "import scipy, sklearn as np"))
    assert wrong_dependencies(twins[0].replace("# /// script", "# script")) == {"no block"}
