"""Feed every reader damaged files: it returns a result or raises a UserError.

It does so in time, in limited memory, and writes nowhere but into its own folder. Here are 200
files a reader; `pytest tests/test_rubbish.py --hypothesis-profile long` tries 10,000.
"""

import contextlib
import gzip
import io
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given
from PIL import Image
from torch import Generator

resource = pytest.importorskip("resource", reason="Windows has no such module")

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
sys.path[:0] = [str(ROOT), str(ROOT / "lab4")]
import cvae

import transformer
import vae_anime
import vae_mnist

USER_ERRORS = (transformer.UserError, vae_mnist.UserError, vae_anime.UserError, cvae.UserError)
MAX_MEMORY = 2**30  # bytes that reading a small file may take

opened_for_writing: list[str] = []


def note_writing(event: str, arguments: tuple) -> None:
    """An audit hook, which Python calls for each file that is opened."""
    if event != "open" or not isinstance(arguments[0], str | bytes | Path):
        return
    if arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.fsdecode(arguments[0])
        opened_for_writing.append(os.path.abspath(path))


sys.addaudithook(note_writing)


# Damage -------------------------------------------------------------------------------------------
class Edit(NamedTuple):
    """Cut `removed` bytes out of a file, and put `piece` there, `times` times."""

    place: float  # as a share of the file's length
    removed: int
    piece: bytes
    times: int


NO_EDIT = [Edit(0.0, 0, b"", 1)]  # leaves the file as it is, and what is valid must be read


def edits_with(words: list[bytes]) -> st.SearchStrategy:
    """Lists of edits that put in some of these words, or random bytes, or nothing."""
    edit = st.builds(
        Edit,
        place=st.floats(0, 1),
        removed=st.sampled_from([0, 0, 1, 1, 4, 50, 10_000]),
        piece=st.one_of(st.sampled_from(words), st.binary(max_size=4), st.just(b"")),
        times=st.sampled_from([1, 1, 1, 300]),
    )
    return st.lists(edit, min_size=1, max_size=6)


def damage(content: bytes, edits: list[Edit]) -> bytes:
    for edit in edits:
        start = int(edit.place * len(content))
        end = start + edit.removed
        content = content[:start] + edit.piece * edit.times + content[end:]
    return content


def reset_peak_memory() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes that this process has held, on Linux since the last reset."""
    if not Path("/proc/self/clear_refs").exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def outcome(read: Callable, *arguments):
    """Return what `read` returns, or None if it raises a UserError. Any other exception fails."""
    reset_peak_memory()
    before = peak_memory()
    opened_for_writing.clear()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = read(*arguments)
    except USER_ERRORS as error:
        assert str(error).strip()
        result = None

    for path in opened_for_writing:
        assert Path(path).is_relative_to(os.path.abspath("out"))
    assert peak_memory() - before < MAX_MEMORY
    return result


@pytest.fixture(scope="module", autouse=True)
def folder():
    """The working directory of all examples of this file."""
    with tempfile.TemporaryDirectory() as path, contextlib.chdir(path):
        yield


# News ---------------------------------------------------------------------------------------------
CSV_WORDS = [
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
    b";",
    b"\t",
    b"\xff\xfe",
    b",,,\n",
    b"1",
    b"ArticleId",
]


@given(
    st.sampled_from(["train.csv", "test.csv", "sample.csv"]), st.booleans(), edits_with(CSV_WORDS)
)
@example("train.csv", True, NO_EDIT)
@example("sample.csv", False, NO_EDIT)
def test_csv(name, has_header, edits):
    """One of the files is damaged; without headers the columns are guessed."""
    Path("news").mkdir(exist_ok=True)
    for file in ("train.csv", "test.csv", "sample.csv"):
        if file == "sample.csv":
            lines = [b"Id,Prediction\n", *(b"%d,1\n" % i for i in range(321, 360))]
        else:
            lines = (SAMPLE / file).read_bytes().splitlines(keepends=True)
        content = b"".join(lines[:40] if has_header else lines[1:40])
        Path("news", file).write_bytes(damage(content, edits) if file == name else content)
    config = transformer.Config(folds=2)

    def read():
        news = transformer.load_news(Path("news"), config)
        return transformer.encode_news(news, config, vectors_path=None)

    inputs = outcome(read)
    if inputs is None:
        assert edits != NO_EDIT
    else:
        assert torch.isfinite(inputs.vocabulary.vectors).all()


def make_vectors() -> bytes:
    """A file of 30 words with five numbers each."""
    lines = []
    for i in range(30):
        numbers = [f"{i * j % 7 - 3:.3f}" for j in range(1, 6)]
        lines.append(f"word{i} {' '.join(numbers)}\n")
    return "".join(lines).encode()


VECTORS = make_vectors()
VECTOR_WORDS = [
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
    b"\xef\xbb\xbf",
    b"\x1f\x8b",
    b"PK",
    b"\t",
]


@given(st.sampled_from(["text", "inside gzip", "gzip"]), edits_with(VECTOR_WORDS))
@example("text", NO_EDIT)
@example("gzip", NO_EDIT)
def test_vectors(part, edits):
    """The file is damaged, or what gzip compressed, or the compressed bytes."""
    path = Path("some.vec")
    if part == "gzip":
        path.write_bytes(damage(gzip.compress(VECTORS), edits))
    elif part == "inside gzip":
        path.write_bytes(gzip.compress(damage(VECTORS, edits)))
    else:
        path.write_bytes(damage(VECTORS, edits))
    words = {f"word{i}" for i in range(30)}
    vectors = outcome(transformer.read_vectors, path, words)
    if vectors is None:
        assert edits != NO_EDIT
    else:
        assert len({vector.shape for vector in vectors.values()}) == 1


# Images -------------------------------------------------------------------------------------------
def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


NPY_WORDS = [
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
ZIP_WORDS = [
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"\0" * 4,
    b"\xff" * 4,
    b"../",
    b"/",
    b"\x08\0",
]
ARRAY = npy((np.arange(20 * 28 * 28) % 251).reshape(20, 28, 28).astype(np.uint8))


@given(st.sampled_from(["archive", "array"]), edits_with(NPY_WORDS + ZIP_WORDS))
@example("archive", NO_EDIT)
def test_npz(part, edits):
    """The file is damaged, or the array inside a sound archive."""
    if part == "array":
        content = zipped({"image.npy": damage(ARRAY, edits)})
    else:
        content = damage(zipped({"image.npy": ARRAY}), edits)
    path = Path("some.npz")
    path.write_bytes(content)

    result = outcome(vae_mnist.load_images, path)
    if result is None:
        assert edits != NO_EDIT
    else:
        images, _ = result
        assert images.shape[1:] == (1, 28, 28)


def read_members(path: Path, count: int) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()[:count]}


def digit(kind: str) -> bytes:
    """A picture of half a page, black and white and transparent, in a file format."""
    content = io.BytesIO()
    picture = Image.fromarray(np.eye(40, 30, dtype=np.uint8) * 255)
    if kind == "TIFF":
        picture = Image.fromarray(np.eye(40, 30, dtype=np.uint16) * 60_000)
    elif kind in ("PNG", "WEBP", "GIF"):
        picture = picture.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    picture.save(content, format=kind, **options)
    return content.getvalue()


FACES = read_members(SAMPLE / "anime-faces.zip", 4)
DIGITS = {kind: digit(kind) for kind in vae_mnist.FORMATS}
IMAGE_WORDS = [
    b"IHDR",
    b"IDAT",
    b"IEND",
    b"PLTE",
    b"tEXt",
    b"\xff\xd8\xff",
    b"\x7f\xff\xff\xff",
    b"GIF89a",
]


@given(st.sampled_from(["archive", "image", "name"]), edits_with(IMAGE_WORDS + ZIP_WORDS))
@example("archive", NO_EDIT)
def test_zip(part, edits):
    """The file is damaged, or an image or a name inside a sound archive."""
    name, image = next(iter(FACES.items()))
    if part == "image":
        content = zipped(FACES | {name: damage(image, edits)})
    elif part == "name":
        damaged = damage(name.encode(), edits).decode("latin-1")
        damaged = damaged[:60_000].split("\0")[0]  # zipfile itself writes no others
        content = zipped(FACES | {damaged or "x": image})
    else:
        content = damage(zipped(FACES), edits)
    path = Path("some.zip")
    path.write_bytes(content)

    result = outcome(vae_anime.load_images, path)
    if result is None:
        assert edits != NO_EDIT
    else:
        images, _ = result
        assert images.shape[1:] == (3, 64, 64)


@given(
    st.sampled_from(vae_mnist.FORMATS),
    st.sampled_from(["squeeze", "crop"]),
    edits_with(IMAGE_WORDS + [b"II*\0", b"MM\0*", b"Exif\0\0", b"P5", b"65535", b"RIFF", b"VP8X"]),
)
@example("TIFF", "squeeze", NO_EDIT)
def test_pictures_of_all_formats(kind, fit, edits):
    """One picture is damaged, in a folder of one of each format."""
    Path("pictures").mkdir(exist_ok=True)
    for name, content in DIGITS.items():
        if name == kind:
            content = damage(content, edits)
        Path("pictures", name).write_bytes(content)

    images, _ = outcome(vae_mnist.load_images, Path("pictures"), fit)
    assert len(images) >= len(DIGITS) - 1
    if edits == NO_EDIT:
        assert len(images) == len(DIGITS)


# Verbs --------------------------------------------------------------------------------------------
VERB_WORDS = [
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
    b" sp->tp",
    b"\xef\xbb\xbf",
]


@given(st.sampled_from(["train.txt", "test.txt"]), edits_with(VERB_WORDS))
@example("train.txt", NO_EDIT)
def test_verbs(name, edits):
    Path("verbs").mkdir(exist_ok=True)
    for file in ("train.txt", "test.txt"):
        content = (SAMPLE / file).read_bytes().replace(b" sp->p\n", b"\n")  # to be looked up
        Path("verbs", file).write_bytes(damage(content, edits) if file == name else content)
    config = cvae.Config(holdout=5)

    def read():
        verbs = cvae.read_verbs(Path("verbs"), config)
        invented = cvae.invent_verbs(verbs, 4, Generator().manual_seed(0))
        return cvae.verb_tensor(verbs.train + invented)

    letters = outcome(read)
    if letters is None:
        assert edits != NO_EDIT
    else:
        assert letters.shape[1] == 4


# Checkpoints --------------------------------------------------------------------------------------
SMALL_VAE = "--epochs 1 --limit 20 --latent-dim 2"
WORDS = {
    transformer: f"--data {SAMPLE} --epochs 1 --folds 2 --d-model 8 --nhead 2 --limit 40",
    vae_mnist: f"--data {SAMPLE}/TibetanMNIST.npz {SMALL_VAE}",
    vae_anime: f"--data {SAMPLE}/anime-faces.zip {SMALL_VAE}",
    cvae: f"--data {SAMPLE} --epochs 1 --limit 20 --hidden-dim 8",
}
CHECKPOINT_WORDS = [
    *ZIP_WORDS,
    b"cposix\nsystem\n",
    b"ctorch\nload\n",
    b"\x80\x02",
    b"R",
    b".",
    b"data.pkl",
]


@pytest.fixture(scope="module")
def checkpoint(request, folder):
    """A script, and the path of a checkpoint that it has left; original.pt is a copy of it."""
    script = request.param
    out = Path("trained", script.__name__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_mnist, "REFINE_STEPS", 2)
        script.main([*WORDS[script].split(), "--out", str(out)])
    [path] = out.rglob("checkpoint.pt")
    path.with_name("original.pt").write_bytes(path.read_bytes())
    return script, path


def load_finished(script, path: Path):
    if script in (vae_mnist, vae_anime):
        return script.load_finished(path, torch.device("cpu"))
    return script.load_finished(path)


@pytest.mark.parametrize("checkpoint", WORDS, ids=lambda script: script.__name__, indirect=True)
@given(edits=edits_with(CHECKPOINT_WORDS))
@example(edits=NO_EDIT)
def test_checkpoint(checkpoint, edits):
    script, path = checkpoint
    content = path.with_name("original.pt").read_bytes()
    path.write_bytes(damage(content, edits))
    result = outcome(load_finished, script, path.parent)
    if result is None:
        assert edits != NO_EDIT
