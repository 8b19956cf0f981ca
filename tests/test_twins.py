"""Code that stands in several scripts is the same in each, and dependencies are what is imported.

Each script runs when it is copied alone, so some definitions stand in several. Above such a
definition a comment line names the other files: `# Same in vae_anime.py`.
"""

import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["transformer.py", "vae_mnist.py", "vae_anime.py", "lab4/cvae.py"]
MARKER = re.compile(r"# Same in (.+)")
PYPI_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}  # what is imported under another name
each_script = pytest.mark.parametrize("script", SCRIPTS)


@dataclass(frozen=True)
class Definition:
    text: str
    files: frozenset[str]  # where it stands, by its marker; empty without one


def read_sources() -> dict[str, str]:
    return {script: (ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS}


def marked_files(line: str, script: str) -> frozenset[str]:
    """The files that a marker names and the one that it stands in; none if it is no marker."""
    marker = MARKER.fullmatch(line)
    if marker is None:
        return frozenset()
    if marker[1] == "all four scripts":
        return frozenset(SCRIPTS)
    return frozenset([script, *marker[1].split(", ")])


def definitions(source: str, script: str) -> dict[str, Definition]:
    """The functions and classes of a script by their names."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        rows = [node.lineno]
        rows += [decorator.lineno for decorator in node.decorator_list]
        first = min(rows)
        text = "\n".join(lines[first - 1 : node.end_lineno])
        found[node.name] = Definition(text, marked_files(lines[first - 2], script))

    return found


def broken_marks(sources: dict[str, str]) -> list[str]:
    """What is wrong with the marked definitions of these scripts; nothing if all is well."""
    found = {script: definitions(source, script) for script, source in sources.items()}

    wrong = []
    for script, source in sources.items():
        marked = [name for name, each in found[script].items() if each.files]
        if len(marked) != len(MARKER.findall(source)):
            wrong.append(f"{script}: a marker that stands above no definition")

        for name in marked:
            ours = found[script][name]
            for other in ours.files:
                theirs = found.get(other, {}).get(name)
                if theirs is None:
                    wrong.append(f"{script}: {name} is not in {other}")
                elif theirs.files != ours.files:
                    wrong.append(f"{script}: {name} is not marked so in {other}")
                elif theirs.text != ours.text:
                    wrong.append(f"{script}: {name} differs in {other}")

    return wrong


def test_marked_definitions_are_the_same_to_the_letter():
    assert broken_marks(read_sources()) == []


@each_script
def test_marks_are_found(script):
    """So that no change of the markers' form leaves the rule without anything to hold."""
    found = definitions(read_sources()[script], script)
    marked = [name for name, each in found.items() if each.files]
    assert len(marked) >= 10


@pytest.mark.parametrize(
    "old, new, blamed",
    [
        ("self.conv1(F.silu(x))", "self.conv1(F.relu(x))", "Residual differs in"),
        ("def reason(", "def cause(", "cause is not in"),
        ("class UserError(Exc", "class UserError(ValueErr", "UserError differs in"),
        (
            "# Same in vae_mnist.py\n@torch.no_grad()\ndef fit_prior(",
            "@torch.no_grad()\ndef fit_prior(",
            "fit_prior is not marked so in vae_anime.py",
        ),
        (
            "@torch.no_grad()\ndef fit_prior(",
            "@torch.enable_grad()\ndef fit_prior(",
            "fit_prior differs in",
        ),
        (
            "# Same in all four scripts\ndef seed_of(",
            "# Same in vae_mnist.py\ndef seed_of(",
            "seed_of is not marked so in",
        ),
        ("# Same in vae_mnist.py\nclass Res", "# Same in vae.py\nclass Res", "Residual is not in"),
        (
            "# Same in vae_mnist.py\nclass Res",
            "# Same in vae_mnist.py\n\nclass Res",
            "vae_anime.py: a marker that stands above no definition",
        ),
    ],
)
def test_a_change_of_a_marked_definition_is_seen(old, new, blamed):
    sources = read_sources()
    assert sources["vae_anime.py"].count(old) == 1
    sources["vae_anime.py"] = sources["vae_anime.py"].replace(old, new)
    assert any(blamed in line for line in broken_marks(sources))


# Dependencies -------------------------------------------------------------------------------------
def imported_packages(source: str) -> set[str]:
    """What a script imports from outside the standard library, under its name on PyPI."""
    modules = set(re.findall(r'import_module\("([\w.]+)"\)', source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)

    roots = {module.partition(".")[0] for module in modules}
    return {PYPI_NAMES.get(root, root) for root in roots - sys.stdlib_module_names}


def script_block(source: str) -> dict:
    """The PEP 723 block at the top of a script."""
    block = re.match(r"# /// script\n(.*?)^# ///\n", source, re.M | re.S)
    if block is None:
        return {"requires-python": None, "dependencies": []}
    return tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.M))


def pinned_versions() -> dict[str, str]:
    """The versions of requirements.txt, which the figures were measured with."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.M))


def wrong_dependencies(source: str) -> list[str]:
    """Where the block of a script departs from what it imports or from requirements.txt."""
    block = script_block(source)
    ranges = {}
    for line in block["dependencies"]:
        requirement = Requirement(line)
        ranges[requirement.name] = requirement.specifier
    imported = imported_packages(source)
    pins = pinned_versions()

    wrong = []
    if block["requires-python"] != ">=3.11":
        wrong.append("requires-python")
    wrong += [f"{name} is imported and not named" for name in sorted(imported - set(ranges))]
    wrong += [f"{name} is named and not imported" for name in sorted(set(ranges) - imported)]
    for name, specifier in ranges.items():
        if name not in pins:
            wrong.append(f"{name} has no pin in requirements.txt")
        elif pins[name] not in specifier:
            wrong.append(f"the pin {name}=={pins[name]} is not in {specifier}")
    return wrong


@each_script
def test_dependencies_are_what_the_script_imports(script):
    assert wrong_dependencies(read_sources()[script]) == []


@pytest.mark.parametrize(
    "old, new, blamed",
    [
        ('"numpy>=1.26"', '"numpy>=99"', "the pin numpy=="),
        ('#     "tqdm>=4.66",\n', "", "tqdm is imported and not named"),
        ("import numpy as np", "import scipy", "scipy is imported and not named"),
        ("import numpy as np", "import math", "numpy is named and not imported"),
        ("# /// script", "# script", "requires-python"),
    ],
)
def test_a_wrong_dependency_is_seen(old, new, blamed):
    source = read_sources()["vae_mnist.py"]
    assert source.count(old) == 1
    wrong = wrong_dependencies(source.replace(old, new))
    assert any(blamed in line for line in wrong)
