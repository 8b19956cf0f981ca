"""What happens to runs that are killed, given ten times the data, or spread over two processes.

    python bench/reliability.py kill --data data                each script at 20 moments a signal
    python bench/reliability.py grow --data data --news FILE    ten times as many news and faces
    python bench/reliability.py spread --data data              one process against two, in turn

--data is a folder with the real files (its train.csv and test.csv, TibetanMNIST.npz,
anime-faces.zip, train.txt and test.txt); --news a csv with the columns Category and Text. Each
command prints a table for the docs.
"""

import csv
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"  # what a notebook's ! command passes on may not be installed

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
IMAGE_NAMES = (".png", ".jpg", ".jpeg")
VAE_FLAGS = "--limit 200 --epochs 3 --latent-dim 16"


class Task(NamedTuple):
    """A script, its file in --data (empty for the folder itself), and flags for a short run."""

    script: str
    file: str
    flags: str

    def command(self, data: Path) -> list[str]:
        words = [sys.executable, str(ROOT / self.script), "--data", str(data / self.file)]
        return [*words, *shlex.split(self.flags)]


# kill ---------------------------------------------------------------------------------------------
KILL_TASKS = [  # some seconds each
    Task("transformer.py", "", "--limit 300 --epochs 3 --folds 2 --vectors none --out out"),
    Task("vae_mnist.py", "TibetanMNIST.npz", f"{VAE_FLAGS} --out out"),
    Task("vae_anime.py", "anime-faces.zip", f"{VAE_FLAGS} --out out"),
    Task("lab4/cvae.py", "", "--limit 200 --epochs 4 --out out"),
]

# How a run ends that is sent a signal. A return code of -n says that signal n killed it.
RETURN_CODES = {
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGTERM: -signal.SIGTERM,
    signal.SIGINT: 130,
}


class Results(NamedTuple):
    """What a run leaves that must not depend on whether it was stopped: all but its seconds."""

    metrics: dict
    history: str
    submission: bytes | None


class Moment(NamedTuple):
    """When to send a signal: after some seconds, or when the nth file of a kind is written."""

    seconds: float = math.inf
    ending: str = ""  # of the file's name
    nth: float = math.inf


class Outcome(NamedTuple):
    """What happened to a run that was sent a signal, and was then resumed."""

    stopped: bool  # before its end
    writing: bool  # a file at that moment
    lost: str  # what is damaged or differs, or empty


def read_results(folder: Path) -> Results:
    """Read the results of the one run below `folder`."""
    [path] = (folder / "out").rglob("metrics.json")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    metrics.pop("seconds")
    history = pd.read_csv(path.with_name("history.csv"))
    history = history.drop(columns="seconds", errors="ignore")

    submission = folder / "submission.csv"
    content = submission.read_bytes() if submission.exists() else None
    return Results(metrics, history.to_csv(index=False), content)


def find_damage(folder: Path, submission: bytes | None) -> list[str]:
    """Name the files below `folder` that have their final name and cannot be read whole."""
    damaged = []
    for path in folder.rglob("[!.]*"):
        try:
            if path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.name == "submission.csv" and path.read_bytes() != submission:
                raise ValueError("not that of the undisturbed run")
        except Exception as error:  # whatever a library says of a damaged file
            damaged.append(f"{path.name} ({error})")
    return damaged


def stop_at(
    process: subprocess.Popen, number: signal.Signals, moment: Moment, folder: Path
) -> bool:
    """Send the signal at the moment, and wait for the end. Return whether a file was written."""
    started = time.monotonic()
    files = 0
    was_writing = False
    while process.poll() is None:
        writing = any(folder.rglob(f".*{moment.ending}.tmp"))
        if writing and not was_writing:
            files += 1
        was_writing = writing

        if files >= moment.nth or time.monotonic() - started >= moment.seconds:
            process.send_signal(number)
            process.wait()
            return writing
        time.sleep(0.0005)
    return False


def kill_once(
    task: Task, data: Path, number: signal.Signals, moment: Moment, expected: Results
) -> Outcome:
    """Stop a run by a signal, resume it, and look for what was lost."""
    command = task.command(data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = subprocess.Popen(
            command, cwd=name, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        writing = stop_at(process, number, moment, folder)
        _, errors = process.communicate()
        stopped = process.returncode != 0

        lost = find_damage(folder, expected.submission)
        begun = (folder / "out").exists()  # before that, a signal may break an import
        return_codes = {0, RETURN_CODES[number]}
        if any(folder.rglob("metrics.json")):
            return_codes.add(-number)  # the run was over, and Python was shutting down
        if begun and process.returncode not in return_codes:
            lost.append(f"ended with {process.returncode}: {errors.decode()[-500:]}")

        resumed = subprocess.run([*command, "--resume"], cwd=name, capture_output=True, text=True)
        lost += [f"{path} is left" for path in folder.rglob(".*.tmp")]
        if resumed.returncode or read_results(folder) != expected:
            lost.append(f"other results after the resume: {resumed.stderr[-500:]}")
    return Outcome(stopped, writing, "; ".join(lost))


def choose_moments(count: int, seconds: float, rng: random.Random) -> list[Moment]:
    """Choose half of the moments at random, and half while a checkpoint or figure is written."""
    half = count // 2
    moments = [Moment(seconds=rng.uniform(0, seconds)) for _ in range(half)]
    for i in range(half):
        ending = "checkpoint.pt" if i % 2 == 0 else ".png"
        moments.append(Moment(ending=ending, nth=1 + i // 2 % 3))
    return moments


def kill(args: Namespace) -> None:
    """Print how many runs were stopped at how many moments, and how many lost something."""
    # A program started in the background ignores Ctrl-C, and so would the runs that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(args.seed)
    tasks = [task for task in KILL_TASKS if args.script in (None, task.script)]
    print("| script | signal | stopped | while a file was written | lost |")
    print("| --- | --- | --- | --- | --- |")
    for task in tasks:
        with tempfile.TemporaryDirectory() as name:
            started = time.monotonic()
            subprocess.run(task.command(args.data), cwd=name, check=True, capture_output=True)
            seconds = time.monotonic() - started
            expected = read_results(Path(name))

        for number in RETURN_CODES:
            outcomes = []
            moments = choose_moments(args.times, seconds, rng)
            for moment in tqdm(moments, f"{task.script} {number.name}", disable=None, leave=False):
                outcome = kill_once(task, args.data, number, moment, expected)
                outcomes.append(outcome)
                if outcome.lost:
                    print(f"lost: {moment}: {outcome.lost}", file=sys.stderr, flush=True)

            stopped = f"{sum(outcome.stopped for outcome in outcomes)} of {len(moments)}"
            writing = sum(outcome.writing for outcome in outcomes)
            lost = sum(outcome.lost != "" for outcome in outcomes)
            row = f"| `{task.script}` | {number.name} | {stopped} | {writing} | {lost} |"
            print(row, flush=True)


# grow ---------------------------------------------------------------------------------------------
class Growth(NamedTuple):
    """A kind of data that is repeated, and a script that trains on it for one epoch."""

    items: str
    source: Path
    repeat: Callable[[Path, int, Path], int]  # writes the copies, returns their number
    task: Task


def repeat_news(source: Path, times: int, folder: Path) -> int:
    """Write the rows of `source` so many times as train.csv, and its first hundred as test.csv."""
    with open(source, newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    unlabelled = [row[1:] for row in [header, *rows[:100]]]

    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows * times])
    with open(folder / "test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(unlabelled)
    return len(rows) * times


def repeat_faces(source: Path, times: int, folder: Path) -> int:
    """Write the images of a zip file so many times, each under a name of its own."""
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(IMAGE_NAMES)]
        images = [archive.read(name) for name in names]

    with zipfile.ZipFile(folder / "faces.zip", "w") as copies:
        for i, content in enumerate(images * times):
            copies.writestr(f"{i}.png", content)
    return len(images) * times


def watch(command: list[str], folder: str) -> tuple[float, float]:
    """Run `command` in `folder`. Return its peak memory in MiB and its seconds."""
    started = time.monotonic()
    peak = 0.0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        # The peak of the process itself; getrusage would begin with that of its parent.
        status = Path(f"/proc/{process.pid}/status").read_text()
        line = re.search(r"VmHWM:\s+(\d+)", status)
        if line:
            peak = int(line[1]) / 1024
        time.sleep(0.05)

    if process.returncode:
        raise SystemExit(f"error: {shlex.join(command)} ended with {process.returncode}")
    return peak, time.monotonic() - started


def grow(args: Namespace) -> None:
    """Print and draw peak memory and seconds of one epoch, by the number of items."""
    if args.news is None:
        raise SystemExit("error: no news to repeat. Name a csv with --news")
    news_task = Task("transformer.py", "", "--folds 2 --epochs 1 --vectors none")
    faces_task = Task("vae_anime.py", "faces.zip", "--epochs 1")
    growths = [
        Growth("news texts", args.news, repeat_news, news_task),
        Growth("faces", args.data / "anime-faces.zip", repeat_faces, faces_task),
    ]
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)

    print("| items | peak memory (MiB) | seconds | milliseconds an item |")
    print("| --- | --- | --- | --- |")
    for growth in growths:
        counts = []
        peaks = []
        milliseconds = []
        for times in args.sizes:
            with tempfile.TemporaryDirectory() as name:
                count = growth.repeat(growth.source, times, Path(name))
                peak, seconds = watch(growth.task.command(Path(name)), name)

            counts.append(count)
            peaks.append(peak)
            milliseconds.append(1000 * seconds / count)
            cells = f"{peak:.0f} | {seconds:.0f} | {milliseconds[-1]:.2f}"
            print(f"| {count:,} {growth.items} | {cells} |", flush=True)

        left.semilogx(counts, peaks, "o-", label=growth.items)
        right.semilogx(counts, milliseconds, "o-", label=growth.items)

    left.set_ylabel("peak memory (MiB)")
    right.set_ylabel("milliseconds an item")
    for axes in (left, right):
        axes.set_xlabel("items")
        axes.set_ylim(bottom=0)
        axes.legend(loc="center right")
        axes.grid(True, which="both", alpha=0.3)
    figure.savefig(args.figure)
    print(f"wrote {args.figure}")


# spread -------------------------------------------------------------------------------------------
SPREAD_TASKS = [
    Task("transformer.py", "", "--folds 2"),
    Task("vae_mnist.py", "TibetanMNIST.npz", "--limit 2000"),
    Task("vae_anime.py", "anime-faces.zip", "--limit 2000"),
]
TORCHRUN = shlex.split("-m torch.distributed.run --standalone --nproc-per-node 2")


def two_epochs(command: list[str], environment: dict[str, str]) -> float:
    """The seconds that three epochs take more than one."""
    seconds = []
    for epochs in ("1", "3"):
        with tempfile.TemporaryDirectory() as name:
            words = [*command, "--epochs", epochs]
            started = time.monotonic()
            subprocess.run(words, cwd=name, check=True, capture_output=True, env=environment)
            seconds.append(time.monotonic() - started)
    return seconds[1] - seconds[0]


def spread(args: Namespace) -> None:
    """Print seconds of two more epochs: one process with all threads, two with one thread each."""
    all_threads = dict(os.environ)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    print("| script | one process (s) | two (s) | speed-up |")
    print("| --- | --- | --- | --- |")
    for task in SPREAD_TASKS:
        one_process = task.command(args.data)
        two_processes = [sys.executable, *TORCHRUN, *one_process[1:]]
        alone = []
        both = []
        for _ in range(args.rounds):
            alone.append(two_epochs(one_process, all_threads))
            both.append(two_epochs(two_processes, one_thread))

        one = statistics.median(alone)
        two = statistics.median(both)
        print(f"| `{task.script}` | {one:.1f} | {two:.1f} | {one / two:.2f} |", flush=True)


COMMANDS = {"kill": kill, "grow": grow, "spread": spread}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    scripts = [task.script for task in KILL_TASKS]
    add = parser.add_argument
    add("command", choices=tuple(COMMANDS))
    add("--data", type=Path, required=True, metavar="DIR", help="folder with the real files")
    add("--script", choices=scripts, help="for kill: this one alone")
    add("--times", type=int, default=20, help="for kill: moments a script and signal [%(default)s]")
    add("--seed", type=int, default=0, help="for kill: of the moments [%(default)s]")
    add("--news", type=Path, metavar="FILE", help="for grow: a csv of Category and Text")
    add("--figure", type=Path, default=Path("growth.png"), help="for grow [%(default)s]")
    add("--sizes", type=int, nargs="+", default=[1, 2, 5, 10], help="for grow: times the file")
    add("--rounds", type=int, default=3, help="for spread [%(default)s]")
    args = parser.parse_args(argv)
    args.data = args.data.resolve()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
