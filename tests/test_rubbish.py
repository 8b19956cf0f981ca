"""Every reader, fed mutated files: a result or one line, in time, in memory, in its own folder.

200 files a reader here; 10,000 with `pytest tests/test_rubbish.py --hypothesis-profile long`.
"""

import contextlib
import io
import os
import re
import resource
import sys
import tempfile
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
sys.path[:0] = [str(ROOT), str(ROOT / "lab4")]
import cvae

import transformer
import vae_anime
import vae_mnist

opened: list[str] = []  # for writing, while a reader is at work


def note_writing(event, arguments):
    if (
        event == "open"
        and isinstance(arguments[0], str | bytes | Path)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        opened.append(os.path.abspath(os.fsdecode(arguments[0])))


sys.addaudithook(note_writing)
NOTHING = [(0.0, 0, b"", 1)]  # an edit that leaves the file as it is: what is valid must be read


def mutations(words):
    """Lists of edits: where (share of the file), bytes that go, what comes instead, how often."""
    piece = st.one_of(st.sampled_from(words), st.binary(max_size=4), st.just(b""))
    edit = st.tuples(
        st.floats(0, 1),
        st.sampled_from([0, 0, 1, 1, 4, 50, 10_000]),
        piece,
        st.sampled_from([1, 1, 1, 300]),
    )
    return st.lists(edit, min_size=1, max_size=6)


def mutate(content, edits):
    for where, gone, piece, times in edits:
        start = int(where * len(content))
        content = content[:start] + piece * times + content[start + gone :]
    return content


def peak_memory(reset=False):
    """The most bytes that this process has held, on Linux since the last reset."""
    if not Path("/proc/self/clear_refs").exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def outcome(read, *arguments):
    """What `read` returns, or None after one line on stderr and exit code 2; all else fails."""
    error, before = io.StringIO(), peak_memory(reset=True)
    opened.clear()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            return read(*arguments)
    except SystemExit as stopped:
        assert stopped.code == 2 and re.fullmatch(r"error: [^\n]+\n", error.getvalue()), (
            error.getvalue()
        )
    finally:
        assert all(Path(path).is_relative_to(os.path.abspath("out")) for path in opened), opened
        assert peak_memory() - before < 2**30


@pytest.fixture(scope="module", autouse=True)
def folder():
    """A place to stand for all the examples of this file."""
    with tempfile.TemporaryDirectory() as path, contextlib.chdir(path):
        yield


CSV = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"Id",
    b"Category",
    b'""',
    b"9" * 400,
    b"&lt;",
    b"#39;",
]


@given(st.sampled_from(["train.csv", "test.csv"]), mutations(CSV))
@example("train.csv", NOTHING)
def test_csv(name, edits):
    Path("news").mkdir(exist_ok=True)
    for file in ("train.csv", "test.csv"):
        lines = (SAMPLE / file).read_bytes().splitlines(keepends=True)[:40]
        content = b"".join(lines)
        Path("news", file).write_bytes(mutate(content, edits) if file == name else content)
    args = transformer.parse_args(
        ["--data", "news", "--out", "out", "--folds", "2", "--vectors", "none"]
    )

    def read():
        news = transformer.load_news(args)
        return transformer.prepare(args, news.texts)

    inputs = outcome(read)
    assert inputs is not None or edits != NOTHING
    assert inputs is None or torch.isfinite(inputs[2]).all()


VECTORS = "".join(
    f"word{i} {' '.join(f'{i * j % 7 - 3:.3f}' for j in range(1, 6))}\n" for i in range(30)
).encode()


@given(
    mutations(
        [
            b" ",
            b"\n",
            b"nan",
            b"inf",
            b"1e999",
            b"-",
            b"\xff",
            b"\0",
            b"word3",
            b"30 5\n",
            b"1.5",
            b"\xc2\xa0",
        ]
    )
)
@example(NOTHING)
def test_vectors(edits):
    Path("some.vec").write_bytes(mutate(VECTORS, edits))
    words = {f"word{i}" for i in range(30)}
    found = outcome(transformer.read_vectors, "some.vec", words)
    assert found is not None or edits != NOTHING
    assert found is None or len({vector.shape for vector in found.values()}) <= 1


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def zipped(members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


NPY = [
    b"9999999999,",
    b"0,",
    b"-1,",
    b"(",
    b")",
    b"|O",
    b"<f8",
    b"<i8",
    b"<U9",
    b"'descr'",
    b"True",
    b"\0",
    b"\xff" * 8,
]
ZIP = [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\0" * 4, b"\xff" * 4, b"../", b"/", b"\x08\0"]
ARRAY = npy((np.arange(20 * 28 * 28) % 251).reshape(20, 28, 28).astype(np.uint8))


@given(st.booleans(), mutations(NPY + ZIP))
@example(True, NOTHING)
def test_npz(inside, edits):
    """Mutated as a file, or an array inside a sound archive."""
    content = (
        zipped({"image.npy": mutate(ARRAY, edits)})
        if inside
        else mutate(zipped({"image.npy": ARRAY}), edits)
    )
    Path("some.npz").write_bytes(content)
    found = outcome(vae_mnist.load_images, Path("some.npz"))
    assert found is not None or edits != NOTHING
    assert found is None or found[0][:].shape[1:] == vae_mnist.SHAPE


with zipfile.ZipFile(SAMPLE / "anime-faces.zip") as archive:
    FACES = {name: archive.read(name) for name in archive.namelist()[:4]}
IMAGE = [
    b"IHDR",
    b"IDAT",
    b"IEND",
    b"PLTE",
    b"tEXt",
    b"\xff\xd8\xff",
    b"\x7f\xff\xff\xff",
    b"GIF89a",
]


@given(st.sampled_from(["archive", "image", "name"]), mutations(IMAGE + ZIP))
@example("archive", NOTHING)
def test_zip(kind, edits):
    """Mutated as a file, or an image or a name inside a sound archive."""
    name, image = next(iter(FACES.items()))
    if kind == "image":
        content = zipped(FACES | {name: mutate(image, edits)})
    elif kind == "name":
        content = zipped(
            FACES
            | {mutate(name.encode(), edits).decode("latin-1")[:60_000].split("\0")[0] or "x": image}
        )
    else:
        content = mutate(zipped(FACES), edits)
    Path("some.zip").write_bytes(content)
    found = outcome(vae_anime.load_images, Path("some.zip"))
    assert found is not None or edits != NOTHING
    assert found is None or found[0][:].shape[1:] == vae_anime.SHAPE


VERBS = [
    b" ",
    b"\n",
    b"\r",
    b"\t",
    b"\0",
    b"\xff",
    b"A",
    b"zzzzzzzzzzzzzzzzzzzzz",
    b"ing",
    b"sp->p",
    b"->",
    b"pg",
]


@given(st.sampled_from(["train.txt", "test.txt"]), mutations(VERBS))
@example("train.txt", NOTHING)
def test_verbs(name, edits):
    Path("verbs").mkdir(exist_ok=True)
    for file in ("train.txt", "test.txt"):
        content = (SAMPLE / file).read_bytes()
        Path("verbs", file).write_bytes(mutate(content, edits) if file == name else content)

    def read():
        verbs = cvae.read_verbs(Path("verbs"), 5, None, 0)
        generator = torch.Generator().manual_seed(0)
        return cvae.verb_tensor(verbs.train + cvae.invent_verbs(verbs.train, 4, generator))

    found = outcome(read)
    assert found is not None or edits != NOTHING
    assert found is None or found.shape[1] == 4


SMALL_VAE = "--epochs 1 --limit 20 --latent-dim 2 --iwae 1"
CHECKPOINTS = {
    transformer: f"--data {SAMPLE} --epochs 1 --folds 2 --dim 8 --heads 2 --limit 40",
    vae_mnist: f"--data {SAMPLE}/TibetanMNIST.npz {SMALL_VAE}",
    vae_anime: f"--data {SAMPLE}/anime-faces.zip {SMALL_VAE}",
    cvae: f"--data {SAMPLE} --epochs 1 --limit 20 --hidden-dim 8",
}


@pytest.fixture(scope="module")
def trained(folder):
    """Folder and bytes of a checkpoint of each script, and a function that uses it."""
    found = {}
    for script, words in CHECKPOINTS.items():
        out = Path("trained", script.__name__)
        script.main([*words.split(), "--out", str(out)])
        where = out / "lambda-1" if script in (vae_mnist, vae_anime) else out
        found[script] = (where / "checkpoint.pt", (where / "checkpoint.pt").read_bytes())
    use = {
        transformer: lambda path: transformer.predict(
            transformer.parse_args(["--predict", "x", "--out", str(path)])
        ),
        vae_mnist: lambda path: vae_mnist.load_finished(path, torch.device("cpu")),
        vae_anime: lambda path: vae_anime.load_finished(path, torch.device("cpu")),
        cvae: lambda path: cvae.load_finished(path),
    }
    return {script: (*found[script], use[script]) for script in found}


@pytest.mark.parametrize("script", CHECKPOINTS, ids=lambda script: script.__name__)
@given(
    edits=mutations(
        [*ZIP, b"cposix\nsystem\n", b"ctorch\nload\n", b"\x80\x02", b"R", b".", b"data.pkl"]
    )
)
@example(edits=NOTHING)
def test_checkpoint(trained, script, edits):
    path, content, use = trained[script]
    path.write_bytes(mutate(content, edits))
    assert outcome(use, path.parent) is not None or edits != NOTHING
