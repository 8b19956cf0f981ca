"""Nothing lost: killed while it writes, no room, unreadable files, two at once, the same answer."""

import functools
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
sys.path[:0] = [str(ROOT), str(ROOT / "lab4")]
import cvae

import transformer
import vae_anime
import vae_mnist

VAE = "--epochs 2 --batch-size 16 --latent-dim 4 --iwae 2 --limit 40"
WORDS = {  # a task of a few seconds for each script
    transformer: f"--data {SAMPLE} --epochs 2 --folds 2 --dim 16 --heads 2 --limit 60",
    vae_mnist: f"--data {SAMPLE}/TibetanMNIST.npz {VAE}",
    vae_anime: f"--data {SAMPLE}/anime-faces.zip {VAE}",
    cvae: f"--data {SAMPLE} --epochs 2 --hidden-dim 16 --limit 40",
}
EACH_STEP = torch.nn.utils  # whose clip_grad_norm_ each training step calls
each_script = pytest.mark.parametrize("script", WORDS, ids=lambda script: script.__name__)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(script, *more):
    metrics = script.main([*shlex.split(WORDS[script]), *more])
    return {name: value for name, value in metrics.items() if name != "seconds"}


@functools.cache
def undisturbed(script):
    """The metrics of a run that nothing disturbs, and where what it left is kept."""
    kept = tempfile.TemporaryDirectory()
    metrics = run(script, "--out", "whole")
    shutil.copytree("whole", kept.name, dirs_exist_ok=True)
    return metrics, kept


def whole(script):
    return undisturbed(script)[0]


def copy_whole(script, out):
    """Put what an undisturbed run leaves into the folder `out`."""
    shutil.copytree(undisturbed(script)[1].name, out)


def folder_of(script, out):
    return Path(out, "lambda-1") if script in (vae_mnist, vae_anime) else Path(out)


def tables_of(script, out):
    """History, answers and what else it writes down."""
    paths = folder_of(script, out).glob("*.csv")
    return {path.name: path.read_bytes() for path in paths}


def left_whole(script, out):
    """Every checkpoint, picture and table that has its own name there can be read whole."""
    from PIL import Image

    assert Path(out).is_dir()
    for path in [*Path(out).rglob("*"), *Path(".").glob("submission.csv")]:
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "submission.csv":
            ids = transformer.read_table(SAMPLE / "test.csv")[0]["Id"]
            assert list(transformer.read_table(path)[0]["Id"]) == list(ids)


def the_line(capsys):
    """The one line that stands on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def temporary_names():
    return [path for path in Path(".").rglob(".*") if path.name.endswith(".tmp")]


def killed(script, *more):
    """Run `script` in a process of its own, which is to be killed."""
    if (child := os.fork()) == 0:
        run(script, *more)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@each_script
@pytest.mark.parametrize("suffix, number", [("checkpoint.pt", 2), (".png", 1), ("metrics.json", 1)])
def test_killed_while_it_writes(script, suffix, number, monkeypatch):
    replace, seen = os.replace, []

    def killing(source, target):
        seen.append(target) if str(target).endswith(suffix) else None
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        killed(script, "--out", "cut")
    assert temporary_names()
    left_whole(script, "cut")
    assert run(script, "--out", "cut", "--resume") == whole(script)
    left_whole(script, "cut")
    assert not temporary_names()


@each_script
@pytest.mark.parametrize("when", ["clip_grad_norm_", "Figure"])  # second checkpoint, first figure
def test_no_room(script, when, monkeypatch, capsys):
    owner = script if when == "Figure" else EACH_STEP
    function, limits = getattr(owner, when), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*args, **keywords):
        if (folder_of(script, "full") / "checkpoint.pt").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return function(*args, **keywords)

    whole(script), capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(owner, when, fill)
        try:
            run(script, "--out", "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 2 and "Make room" in the_line(capsys)
    left_whole(script, "full")
    assert run(script, "--out", "full", "--resume") == whole(script)
    assert not temporary_names()


UNREADABLE = Path("/proc/self/mem")  # opens well; reading it raises an input/output error
needs_proc = pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")
READERS = {
    "csv": lambda path: transformer.read_table(path),
    "vectors": lambda path: transformer.read_vectors(str(path), {"the"}),
    "npz": lambda path: vae_mnist.load_images(path),
    "zip": lambda path: vae_anime.load_images(path),
    "verbs": lambda path: cvae.read_lines(path),
}


@needs_proc
@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_cannot_be_read(kind, capsys):
    with pytest.raises(SystemExit) as stopped:
        READERS[kind](UNREADABLE)
    assert stopped.value.code == 2 and the_line(capsys)


@needs_proc
def test_faces_that_cannot_be_read_half_way(capsys):
    """What was read before is kept; the rest is counted and named."""
    with zipfile.ZipFile(SAMPLE / "anime-faces.zip") as archive:
        name = archive.namelist()[0]
        Path("faces").mkdir()
        Path("faces", "0" + Path(name).suffix).write_bytes(archive.read(name))
    for number in (1, 2, 3):
        Path("faces", f"{number}.jpg").symlink_to(UNREADABLE)
    assert len(vae_anime.load_images(Path("faces"))[0]) == 1
    assert "3 images cannot be read, such as 'faces/1.jpg'" in capsys.readouterr().out


@each_script
def test_two_runs_given_the_same_folder(script, capsys):
    copy_whole(script, "out")
    args = script.parse_args([*shlex.split(WORDS[script]), "--out", "out", "--resume"])
    capsys.readouterr()
    with script.open_run(folder_of(script, "out"), args, {}), pytest.raises(SystemExit) as stopped:
        run(script, "--out", "out")
    assert stopped.value.code == 2 and "Wait for the other run" in the_line(capsys)
    assert run(script, "--out", "out", "--resume") == whole(script)  # untouched, and free again


@each_script
def test_stopped_between_the_last_two_files(script, monkeypatch):
    """The checkpoint is whole and metrics.json is missing: nothing is trained again."""
    copy_whole(script, "cut")
    path = folder_of(script, "cut") / "metrics.json"
    path.unlink()
    monkeypatch.setattr(EACH_STEP, "clip_grad_norm_", None)
    assert run(script, "--out", "cut", "--resume") == whole(script) and path.exists()


@each_script
def test_a_finished_run_is_kept_until_another_has_begun(script, monkeypatch):
    copy_whole(script, "out")
    kept = folder_of(script, "out").with_name(folder_of(script, "out").name + ".previous")
    with monkeypatch.context() as patch:
        patch.setattr(EACH_STEP, "clip_grad_norm_", lambda *args: os.kill(os.getpid(), 9))
        for _ in range(2):  # two starts over that end before they have saved anything
            killed(script, "--out", "out", "--seed", "1")
    assert (kept / "metrics.json").exists()
    run(script, "--out", "out", "--seed", "1", "--resume")
    assert (kept / "metrics.json").exists() and (folder_of(script, "out") / "metrics.json").exists()


@each_script
def test_the_same_answer(script):
    assert run(script, "--out", "again") == whole(script)
    assert run(script, "--out", "other", "--seed", "1") != whole(script)


def starting(script):
    return True


def first_epoch(script):
    return not (folder_of(script, "cut") / "checkpoint.pt").exists()


def later(script):
    return not first_epoch(script)


@each_script
@pytest.mark.parametrize(
    "owner, function, when, number",
    [
        (None, "pick_device", starting, signal.SIGINT),
        (EACH_STEP, "clip_grad_norm_", first_epoch, signal.SIGINT),
        (EACH_STEP, "clip_grad_norm_", later, signal.SIGTERM),
        (os, "replace", later, signal.SIGINT),
        (None, "Figure", later, signal.SIGTERM),
    ],
    ids=["starting", "first epoch", "second epoch", "writing", "drawing"],
)
def test_a_signal_ends_it_at_once(script, owner, function, when, number, monkeypatch, capsys):
    """At any time, with a command that goes on from there to the same end."""
    owner, sent = owner or script, []
    whole(script), capsys.readouterr()
    called = getattr(owner, function)

    def interrupted(*args, **keywords):
        if when(script) and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return called(*args, **keywords)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(owner, function, interrupted)
        words = [*shlex.split(WORDS[script]), "--out", "cut"]
        patch.setattr(sys, "argv", [script.__file__, *words])
        script.main(words)
    assert sent and stopped.value.code == 128 + number
    [command] = re.findall("go on with: (.*)", capsys.readouterr().out)
    metrics = script.main(shlex.split(command)[2:])
    assert metrics | {"seconds": 0} == whole(script) | {"seconds": 0} and not temporary_names()
    assert tables_of(script, "cut") == tables_of(script, undisturbed(script)[1].name)


@each_script
def test_under_torchrun_the_command_is_torchruns(script, monkeypatch, capsys):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["script.py", "--resume", "--out", "a b"])  # once again
    try:
        script.exit_on_signals()
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped.value.code == 143
    assert "torchrun --nproc-per-node 2 script.py --out 'a b' --resume" in capsys.readouterr().out


@each_script
def test_not_finite(script, monkeypatch, capsys):
    """One line says where, and the last epoch's checkpoint goes on."""
    whole(script), capsys.readouterr()
    clip = torch.nn.utils.clip_grad_norm_

    def spoilt(*args):
        return clip(*args) * (float("nan") if later(script) else 1)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spoilt)
        run(script, "--out", "cut")
    line = the_line(capsys)
    assert stopped.value.code == 2 and "Lower --lr" in line
    assert re.search(r"epoch 2\b.*step \d", line), line
    checkpoint = torch.load(folder_of(script, "cut") / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["history"]) == 1
    assert run(script, "--out", "cut", "--resume") == whole(script)


@each_script
def test_no_git(script, monkeypatch):
    args = script.parse_args([*shlex.split(WORDS[script]), "--out", "out"])
    monkeypatch.setenv("PATH", "")
    with script.open_run(Path("out"), args, {}):
        assert json.loads(Path("out", "config.json").read_text())["commit"] is None


# several processes --------------------------------------------------------------------------------


def save_first_gradients(script, words, name):
    """The first step's gradients, in float32, without dropout or noise, in gradients-<name>.pt."""

    def keep(parameters, norm):
        torch.save([p.grad for p in parameters if p.grad is not None], f"gradients-{name}.pt")
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        if script is transformer:
            patch.setattr(transformer.Dropout, "forward", lambda self, x: x)
        patch.setattr(torch.distributions.Independent, "rsample", lambda self: self.mean)
        patch.setattr(torch, "randn_like", torch.zeros_like)
        script.main(words)


def two_ranks(script, call):
    """call(0) and call(1) in processes that are two of one run, without torchrun's slow start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in (0, 1):
        if (child := os.fork()) == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
            script.RANK, script.WORLD = rank, 2
            signal.alarm(100)
            try:
                call(rank)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.parametrize(
    "script", [transformer, vae_mnist, vae_anime], ids=lambda script: script.__name__
)
def test_gradients_of_two_processes_equal_one_process(script):
    """The first global batch's, with dropout and the VAEs' noise off."""
    more = ["--word-dropout", "0"] if script is transformer else []
    words = [*shlex.split(WORDS[script]), *more]
    two_ranks(script, lambda rank: save_first_gradients(script, [*words, "--out", "two"], rank))
    save_first_gradients(script, [*words, "--out", "one"], "alone")
    alone, first, second = (
        torch.load(f"gradients-{rank}.pt", weights_only=True) for rank in ("alone", 0, 1)
    )
    assert any(gradient.abs().max() > 1e-3 for gradient in alone)
    for expected, ours, theirs in zip(alone, first, second, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours - expected).norm() <= 1e-5 * max(1.0, expected.norm())


def spread(script, *more):
    """Start `script` under torchrun as two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, script.__file__, *shlex.split(WORDS[script]), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_of(pid):
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(word[5:]) for word in environment if word.startswith(b"RANK=")), None)


@needs_proc
@pytest.mark.parametrize("script, victim", [(transformer, 1), (vae_mnist, 0)])
def test_one_process_killed(script, victim, monkeypatch):
    more = ["--epochs", "30"]
    words = [script.__file__, *shlex.split(WORDS[script]), *more, "--out", "whole"]
    monkeypatch.setattr(sys, "argv", words)
    two_ranks(script, lambda rank: runpy.run_path(script.__file__, run_name="__main__"))
    cut = spread(script, *more, "--out", "cut")
    checkpoint, end = folder_of(script, "cut") / "checkpoint.pt", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.05)
    children = Path(f"/proc/{cut.pid}/task/{cut.pid}/children").read_text().split()
    os.kill(int(next(pid for pid in children if rank_of(pid) == victim)), signal.SIGKILL)
    begin = time.monotonic()
    output, errors = cut.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    said = re.search("error: torchrun: .*Add --resume", errors)
    stopped = "go on with: torchrun" in output  # the launcher's SIGTERM may come first
    assert (said or stopped) and cut.returncode != 0, errors
    left_whole(script, "cut")
    assert not (checkpoint.parent / "metrics.json").exists()
    again = spread(script, *more, "--out", "cut", "--resume")
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 0
    assert output.count("data ") == output.count("wrote ") == 1  # one of the two speaks
    metrics = [
        json.loads((folder_of(script, out) / "metrics.json").read_text())
        for out in ("whole", "cut")
    ]
    assert metrics[0] | {"seconds": 0} == metrics[1] | {"seconds": 0}
    assert tables_of(script, "cut") == tables_of(script, "whole")
