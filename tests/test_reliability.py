"""Nothing is lost: killed or stopped at any moment, no room, unreadable files, two at once.

And the same settings give the same answer, in one process or in two.
"""

import contextlib
import functools
import json
import os
import re
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

import pandas as pd
import pytest
import torch
from PIL import Image

resource = pytest.importorskip("resource", reason="Windows has no such module")

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"
sys.path[:0] = [str(ROOT), str(ROOT / "lab4")]
import cvae

import transformer
import vae_anime
import vae_mnist

VAE = "--epochs 2 --batch-size 16 --latent-dim 4 --limit 40"
WORDS = {  # a task of a few seconds for each script
    transformer: f"--data {SAMPLE} --epochs 2 --folds 2 --d-model 16 --nhead 2 --limit 60",
    vae_mnist: f"--data {SAMPLE}/TibetanMNIST.npz {VAE}",
    vae_anime: f"--data {SAMPLE}/anime-faces.zip {VAE}",
    cvae: f"--data {SAMPLE} --epochs 2 --hidden-dim 16 --limit 40",
}
USE = {  # what a finished run is asked for
    transformer: "--predict news",
    vae_mnist: "--sample 2",
    vae_anime: "--sample 2",
    cvae: "--generate 2",
}
EACH_STEP = torch.nn.utils  # whose clip_grad_norm_ every training step calls
UNREADABLE = Path("/proc/self/mem")  # it can be opened; reading it raises an input/output error
each_script = pytest.mark.parametrize("script", WORDS, ids=lambda script: script.__name__)
needs_proc = pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, short_refinement):
    monkeypatch.chdir(tmp_path)


# Runs and what they leave -------------------------------------------------------------------------
def words_of(script, *more: str) -> list[str]:
    return [*shlex.split(WORDS[script]), *more]


def without_seconds(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "seconds"}


def run(script, *more: str) -> dict:
    """Run the script's small task, and return its metrics without the seconds."""
    return without_seconds(script.main(words_of(script, *more)))


@functools.cache
def undisturbed(script) -> tuple[dict, tempfile.TemporaryDirectory]:
    """The metrics of a run that nothing disturbs, and a folder with what it left."""
    kept = tempfile.TemporaryDirectory()
    metrics = run(script, "--out", "whole")
    shutil.copytree("whole", kept.name, dirs_exist_ok=True)
    return metrics, kept


def whole(script) -> dict:
    metrics, _ = undisturbed(script)
    return metrics


def copy_whole(script, out: str) -> None:
    """Put what an undisturbed run leaves into the folder `out`."""
    _, kept = undisturbed(script)
    shutil.copytree(kept.name, out)


def folder_of(script, out: str) -> Path:
    """Where the run's files are: the VAEs make a folder for each λ."""
    if script in (vae_mnist, vae_anime):
        return Path(out, "lambda-1")
    return Path(out)


def checkpoint_exists(script) -> bool:
    return (folder_of(script, "cut") / "checkpoint.pt").exists()


def tables_of(script, out: str) -> dict[str, str]:
    """The csv files, without the column of seconds."""
    tables = {}
    for path in folder_of(script, out).glob("*.csv"):
        table = pd.read_csv(path).drop(columns="seconds", errors="ignore")
        tables[path.name] = table.to_csv()
    return tables


def whole_tables(script) -> dict[str, str]:
    _, kept = undisturbed(script)
    return tables_of(script, kept.name)


def check_files(out: str) -> None:
    """Read every file that has its final name; half a file raises."""
    assert Path(out).is_dir()
    for path in [*Path(out).rglob("*"), *Path(".").glob("submission.csv")]:
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "submission.csv":
            ids = pd.read_csv(SAMPLE / "test.csv")["Id"]
            assert list(pd.read_csv(path)["Id"]) == list(ids)


def temporary_files() -> list[Path]:
    return [path for path in Path(".").rglob(".*") if path.name.endswith(".tmp")]


def error_line(capsys, script, words: list[str]) -> str:
    """Run the command line, which must end with exit code 2 and one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# Killed -------------------------------------------------------------------------------------------
def run_to_be_killed(script, *more: str) -> None:
    """Run `script` in a process of its own, which must end by a SIGKILL."""
    child = os.fork()
    if child == 0:
        run(script, *more)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@each_script
@pytest.mark.parametrize("suffix, number", [("checkpoint.pt", 2), (".png", 1), ("metrics.json", 1)])
def test_killed_while_it_writes(script, suffix, number, monkeypatch):
    """Killed when the number-th file of this name is written and not yet renamed."""
    replace = os.replace
    written = []

    def kill_or_replace(source, target):
        if str(target).endswith(suffix):
            written.append(target)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill_or_replace)
        run_to_be_killed(script, "--out", "cut")
    assert temporary_files()
    check_files("cut")

    assert run(script, "--out", "cut", "--resume") == whole(script)
    assert tables_of(script, "cut") == whole_tables(script)
    check_files("cut")
    assert not temporary_files()


@each_script
def test_a_finished_run_is_kept_until_another_has_begun(script, monkeypatch):
    copy_whole(script, "out")
    folder = folder_of(script, "out")
    previous = folder.with_name(f"{folder.name}.previous")

    def kill(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(EACH_STEP, "clip_grad_norm_", kill)
        for _ in range(2):  # two starts that end before they have saved anything
            run_to_be_killed(script, "--out", "out", "--seed", "1")
    assert (previous / "metrics.json").exists()

    run(script, "--out", "out", "--seed", "1", "--resume")
    assert (previous / "metrics.json").exists()
    assert (folder / "metrics.json").exists()


@each_script
def test_stopped_between_the_last_two_files(script, monkeypatch):
    """The checkpoint is whole and metrics.json is missing: nothing is trained again."""
    copy_whole(script, "cut")
    path = folder_of(script, "cut") / "metrics.json"
    path.unlink()
    monkeypatch.setattr(EACH_STEP, "clip_grad_norm_", None)
    assert run(script, "--out", "cut", "--resume") == whole(script)
    assert path.exists()


@each_script
def test_resume_of_a_finished_run_says_so(script, capsys):
    copy_whole(script, "out")
    capsys.readouterr()
    assert run(script, "--out", "out", "--resume") == whole(script)
    assert "was finished before" in capsys.readouterr().out


@each_script
def test_resume_with_nothing_saved_starts_from_the_beginning(script):
    assert run(script, "--out", "new", "--resume") == whole(script)


# Ctrl-C -------------------------------------------------------------------------------------------
def interrupt(*args, **keywords) -> None:
    raise KeyboardInterrupt


def before_a_checkpoint(script) -> bool:
    return not checkpoint_exists(script)


@each_script
@pytest.mark.parametrize(
    "owner, function, when",
    [
        (None, "pick_device", before_a_checkpoint),
        (EACH_STEP, "clip_grad_norm_", before_a_checkpoint),
        (EACH_STEP, "clip_grad_norm_", checkpoint_exists),
        (os, "replace", checkpoint_exists),
        (None, "Figure", checkpoint_exists),
    ],
    ids=["starting", "training", "after a checkpoint", "writing", "drawing"],
)
def test_ctrl_c_ends_it_and_resume_goes_on(script, owner, function, when, monkeypatch, capsys):
    """At any time, to the same end."""
    owner = owner or script
    called = getattr(owner, function)

    def interrupt_or_call(*args, **keywords):
        if when(script):
            raise KeyboardInterrupt
        return called(*args, **keywords)

    whole(script)
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(owner, function, interrupt_or_call)
        run(script, "--out", "cut")
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    assert "the same command with --resume continues" in printed.out
    assert "Traceback" not in printed.err

    assert run(script, "--out", "cut", "--resume") == whole(script)
    assert tables_of(script, "cut") == whole_tables(script)
    assert not temporary_files()


@each_script
def test_ctrl_c_gives_no_advice_to_resume_what_trains_nothing(script, monkeypatch, capsys):
    copy_whole(script, "out")
    monkeypatch.setattr(torch, "load", interrupt)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([*USE[script].split(), "--out", "out"])
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    assert "stopped" in printed.out
    assert "--resume" not in printed.out + printed.err


@each_script
def test_no_signal_handler_stays_behind(script):
    """As it would in the kernel of a notebook."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    copy_whole(script, "out")
    run(script, "--out", "out", "--resume")
    assert [signal.getsignal(number) for number in numbers] == before


# What a user can mend -----------------------------------------------------------------------------
@each_script
@pytest.mark.parametrize("when", ["clip_grad_norm_", "Figure"])  # second checkpoint, first figure
def test_no_room(script, when, monkeypatch, capsys):
    owner = script if when == "Figure" else EACH_STEP
    called = getattr(owner, when)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(*args, **keywords):
        if checkpoint_exists(script):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return called(*args, **keywords)

    whole(script)
    with monkeypatch.context() as patch:
        patch.setattr(owner, when, fill_the_disk)
        try:
            line = error_line(capsys, script, words_of(script, "--out", "cut"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Make room" in line
    check_files("cut")
    assert run(script, "--out", "cut", "--resume") == whole(script)
    assert not temporary_files()


@each_script
def test_not_finite(script, monkeypatch, capsys):
    """One line says where, and the last checkpoint goes on."""
    clip = torch.nn.utils.clip_grad_norm_

    def spoil(*args):
        norm = clip(*args)
        return norm * float("nan") if checkpoint_exists(script) else norm

    whole(script)
    with monkeypatch.context() as patch:
        patch.setattr(EACH_STEP, "clip_grad_norm_", spoil)
        line = error_line(capsys, script, words_of(script, "--out", "cut"))
    assert "Lower --lr" in line
    places = {transformer: r"model 2, epoch 1\.", cvae: r"epoch 2, step \d+"}
    assert re.search(places.get(script, r"epoch 2\."), line)
    assert run(script, "--out", "cut", "--resume") == whole(script)


def write_unreadable_files() -> None:
    """A folder with one of each kind that is read from a folder."""
    Path("data").mkdir()
    for name in ("train.csv", "test.csv", "train.txt", "test.txt"):
        Path("data", name).symlink_to(UNREADABLE)


@needs_proc
@pytest.mark.parametrize(
    "script, words",
    [
        (transformer, "--data data"),
        (transformer, f"--data {SAMPLE} --vectors {UNREADABLE}"),
        (vae_mnist, f"--data {UNREADABLE}"),
        (vae_anime, f"--data {UNREADABLE}"),
        (cvae, "--data data"),
    ],
    ids=["csv", "vectors", "npz", "zip", "verbs"],
)
def test_a_file_that_cannot_be_read(script, words, capsys):
    write_unreadable_files()
    line = error_line(capsys, script, words.split())
    assert re.search(r"(\.csv|\.txt|mem): ", line)


@needs_proc
def test_faces_that_cannot_be_read_half_way(capsys):
    """What was read before is kept; the rest is counted and named."""
    Path("faces").mkdir()
    with zipfile.ZipFile(SAMPLE / "anime-faces.zip") as archive:
        name = archive.namelist()[0]
        Path("faces", "0" + Path(name).suffix).write_bytes(archive.read(name))
    for number in (1, 2, 3):
        Path("faces", f"{number}.jpg").symlink_to(UNREADABLE)
    images, _ = vae_anime.load_images(Path("faces"))
    assert len(images) == 1
    assert "3 of 4 files cannot be read, such as 'faces/1.jpg'" in capsys.readouterr().out


@each_script
def test_two_runs_given_the_same_folder(script, monkeypatch, capsys):
    """The second one ends with a line, and the first one is not disturbed."""
    clip = torch.nn.utils.clip_grad_norm_
    lines = []

    def start_another(*args):
        if not lines:
            lines.append("")  # once only
            lines[0] = error_line(capsys, script, words_of(script, "--out", "out"))
        return clip(*args)

    expected = whole(script)
    monkeypatch.setattr(EACH_STEP, "clip_grad_norm_", start_another)
    assert run(script, "--out", "out") == expected
    assert "Wait for the other run" in lines[0]


def spoil_weights(value, spoil) -> None:
    """Apply `spoil` to each dict of tensors in a checkpoint: to the weights of each model."""
    parts = []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list):
        parts = value
    if isinstance(value, dict) and all(isinstance(part, torch.Tensor) for part in parts):
        if parts:
            spoil(value)
        return
    for part in parts:
        spoil_weights(part, spoil)


def rename(weights: dict) -> None:
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)


def change_shapes(weights: dict) -> None:
    for name, tensor in weights.items():
        weights[name] = tensor.repeat_interleave(2, dim=0) if tensor.dim() > 0 else tensor


@each_script
@pytest.mark.parametrize("spoil", [rename, change_shapes])
def test_weights_of_a_finished_run_that_do_not_fit(script, spoil, capsys):
    copy_whole(script, "out")
    path = folder_of(script, "out") / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    spoil_weights(checkpoint, spoil)
    torch.save(checkpoint, path)
    line = error_line(capsys, script, [*USE[script].split(), "--out", "out"])
    assert "out" in line
    assert "Train again without --resume" in line


@each_script
@pytest.mark.parametrize("spoil", [rename, change_shapes])
def test_weights_of_an_unfinished_run_that_do_not_fit(script, spoil, monkeypatch, capsys):
    clip = torch.nn.utils.clip_grad_norm_

    def interrupt_later(*args):
        return interrupt() if checkpoint_exists(script) else clip(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(EACH_STEP, "clip_grad_norm_", interrupt_later)
        run(script, "--out", "cut")
    path = folder_of(script, "cut") / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    spoil_weights(checkpoint, spoil)
    torch.save(checkpoint, path)
    line = error_line(capsys, script, words_of(script, "--out", "cut", "--resume"))
    assert "Train again without --resume" in line


# The same answer, wherever it runs ----------------------------------------------------------------
@each_script
def test_the_same_answer(script):
    assert run(script, "--out", "again") == whole(script)
    assert run(script, "--out", "other", "--seed", "1") != whole(script)


def execute(script, name: str) -> dict:
    """Execute the script's source as a notebook's cell does, where there is no __file__."""
    source = Path(script.__file__).read_text(encoding="utf-8")
    namespace = {"__name__": name}
    exec(source, namespace)
    return namespace


@each_script
def test_pasted_into_a_notebook(script):
    namespace = execute(script, "cell")
    if "REFINE_STEPS" in namespace:
        namespace["REFINE_STEPS"] = vae_mnist.REFINE_STEPS
    metrics = namespace["main"](words_of(script, "--out", "out"))
    assert without_seconds(metrics) == whole(script)
    config = json.loads((folder_of(script, "out") / "config.json").read_text())
    assert config["script_sha256"] is None


@each_script
def test_pasted_into_a_notebook_it_reads_no_command_line(script, monkeypatch, capsys):
    """sys.argv is the notebook's; the script looks for data/ where the notebook stands."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    with pytest.raises(SystemExit) as stopped:
        execute(script, "__main__")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert str(Path("data").resolve()) in error
    assert "kernel.json" not in error


@each_script
def test_a_backend_that_does_not_exist_does_not_stop_it(script):
    """A notebook's ! command passes on the notebook's MPLBACKEND."""
    environment = os.environ | {"MPLBACKEND": "no_such_backend"}
    command = [sys.executable, script.__file__, "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


# Several processes --------------------------------------------------------------------------------
PARALLEL = [transformer, vae_mnist, vae_anime]
each_parallel = pytest.mark.parametrize("script", PARALLEL, ids=lambda script: script.__name__)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_ranks(script, call) -> list[int]:
    """Do call(0) and call(1) in processes that are two of one run, without torchrun's slow start.

    Returns their exit codes: 0, that of a SystemExit, or 1 for any other exception.
    """
    port = free_port()
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
            script.RANK = rank
            script.WORLD_SIZE = 2
            signal.alarm(100)  # a process that waits for ever is killed
            code = 1
            try:
                call(rank)
                code = 0
            except SystemExit as stopped:
                code = stopped.code
            finally:
                os._exit(code)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return [os.waitstatus_to_exitcode(status) for status in statuses]


def save_first_gradients(script, words: list[str], name: str) -> None:
    """The first step's gradients, in float32, without dropout or noise, in gradients-<name>.pt."""

    def save_and_stop(parameters, norm):
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        torch.save(gradients, f"gradients-{name}.pt")
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(EACH_STEP, "clip_grad_norm_", save_and_stop)
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        if script is transformer:
            patch.setattr(transformer.Dropout, "forward", lambda self, x: x)
        else:
            patch.setattr(script, "reparameterize", lambda q, *_: q.mean)
        script.main(words)


@each_parallel
def test_gradients_of_two_processes_equal_one_process(script):
    """Those of the first global batch, with dropout and the VAEs' noise off."""
    more = ["--word-dropout", "0"] if script is transformer else []
    words = words_of(script, *more)

    def save(rank):
        save_first_gradients(script, [*words, "--out", "two"], str(rank))

    assert two_ranks(script, save) == [0, 0]
    save_first_gradients(script, [*words, "--out", "one"], "alone")
    alone = torch.load("gradients-alone.pt", weights_only=True)
    first = torch.load("gradients-0.pt", weights_only=True)
    second = torch.load("gradients-1.pt", weights_only=True)

    assert max(gradient.abs().max() for gradient in alone) > 1e-3
    for expected, ours, theirs in zip(alone, first, second, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours - expected).norm() <= 1e-5 * max(1.0, expected.norm())


@each_parallel
def test_two_processes_tell_a_mistake_once(script):
    def make_a_mistake(rank):
        with open(f"stderr-{rank}.txt", "w") as file, contextlib.redirect_stderr(file):
            script.main(words_of(script, "--batch-size", "7"))

    assert two_ranks(script, make_a_mistake) == [2, 2]
    line = Path("stderr-0.txt").read_text()
    assert line.startswith("error: --batch-size 7: give a multiple of ")
    assert line.count("\n") == 1
    assert Path("stderr-1.txt").read_text() == ""


def start_torchrun(script, *more: str) -> subprocess.Popen:
    """Start `script` under torchrun as two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, script.__file__, *words_of(script, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_of(pid: str) -> int | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    for word in environment:
        if word.startswith(b"RANK="):
            return int(word[5:])
    return None


def kill_rank(launcher: subprocess.Popen, rank: int) -> None:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    [victim] = [pid for pid in children if rank_of(pid) == rank]
    os.kill(int(victim), signal.SIGKILL)


@needs_proc
@pytest.mark.parametrize("script, victim", [(transformer, 1), (vae_mnist, 0)])
def test_one_process_killed(script, victim, monkeypatch):
    """The other one ends too, and --resume goes on to the same results."""
    longer = ["--epochs", "30"]
    words = [script.__file__, *words_of(script, *longer), "--out", "whole"]
    monkeypatch.setattr(sys, "argv", words)
    run_main = functools.partial(runpy.run_path, script.__file__, run_name="__main__")
    assert two_ranks(script, lambda rank: run_main()) == [0, 0]

    cut = start_torchrun(script, *longer, "--out", "cut")
    end = time.monotonic() + 60
    while not checkpoint_exists(script) and time.monotonic() < end:
        time.sleep(0.05)
    kill_rank(cut, victim)
    killed = time.monotonic()
    cut.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert cut.returncode != 0
    check_files("cut")
    assert not (folder_of(script, "cut") / "metrics.json").exists()

    again = start_torchrun(script, *longer, "--out", "cut", "--resume")
    output, errors = again.communicate(timeout=100)
    assert again.returncode == 0, errors
    assert output.count("data ") == 1  # one of the two prints
    assert output.count("wrote ") == 1
    expected = json.loads((folder_of(script, "whole") / "metrics.json").read_text())
    metrics = json.loads((folder_of(script, "cut") / "metrics.json").read_text())
    assert without_seconds(metrics) == without_seconds(expected)
    assert tables_of(script, "cut") == tables_of(script, "whole")
