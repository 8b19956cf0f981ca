"""What becomes of runs that are killed, fed ten times the data, or spread over two processes.

    python bench/reliability.py kill --data data                each script at 20 moments a signal
    python bench/reliability.py grow --data data --news FILE    ten times as many news and faces
    python bench/reliability.py spread --data data              one process against two, in turn

--data is a folder with the real files (its train.csv and test.csv, TibetanMNIST.npz,
anime-faces.zip, train.txt and test.txt); --news a csv with the columns Category and Text. Each
prints a table for the docs.
"""

import argparse
import csv
import json
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
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
IMAGE_NAMES = (".png", ".jpg", ".jpeg")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SMALL = "--limit 200 --epochs 3 --iwae 8 --latent-dim 16"
TASKS = {  # script: what stands in --data, and a run of some seconds
    "transformer.py": ("", "--limit 300 --epochs 3 --folds 2 --vectors none"),
    "vae_mnist.py": ("TibetanMNIST.npz", SMALL),
    "vae_anime.py": ("anime-faces.zip", SMALL),
    "lab4/cvae.py": ("", "--limit 200 --epochs 4"),
}


def command_of(script: str, data: Path) -> list[str]:
    file, flags = TASKS[script]
    return [
        sys.executable,
        str(ROOT / script),
        "--data",
        str(data / file),
        *shlex.split(flags),
        "--out",
        "out",
    ]


def results_in(folder: Path) -> tuple[dict, bytes | None]:
    """The final metrics of the one run below `folder`, its seconds left out, and submission.csv."""
    [path] = (folder / "out").rglob("metrics.json")
    submission = folder / "submission.csv"
    metrics = json.loads(path.read_text(encoding="utf-8")) | {"seconds": None}
    return metrics, submission.read_bytes() if submission.exists() else None


def damaged(folder: Path, submission: bytes | None) -> list[str]:
    """The files below `folder` that stand under their own name and cannot be read whole."""
    found = []
    for path in folder.rglob("*"):
        try:
            if path.name.startswith("."):
                continue
            if path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.name == "submission.csv" and path.read_bytes() != submission:
                raise ValueError("not that of the undisturbed run")
        except Exception as error:
            found.append(f"{path.name} ({error})")
    return found


def stop_at(process: subprocess.Popen, number: int, moment: float | str, folder: Path) -> bool:
    """Send the signal after `moment` seconds, or when the n-th file of a kind is being written.

    `moment` is then "<ending of its temporary name> <n>". Return whether a file was being written.
    """
    begin, last, seen = time.monotonic(), False, 0
    name, _, nth = moment.partition(" ") if isinstance(moment, str) else ("", "", "0")
    while process.poll() is None:
        writing = any(folder.rglob(f".*{name}.tmp"))
        seen += writing and not last
        last = writing
        if seen == int(nth) if name else time.monotonic() - begin >= moment:
            process.send_signal(number)
            process.wait()
            return writing
        time.sleep(0.0005)
    return False


class Outcome(NamedTuple):
    """What became of one run that was sent a signal, and then went on with --resume."""

    stopped: bool  # before its end
    writing: bool  # a file, at that moment
    lost: str  # empty, or what is damaged or differs


def kill_once(
    script: str, data: Path, number: int, moment: float | str, expected: tuple
) -> Outcome:
    """Lost is a run that ended otherwise, left damage, or whose resumed results differ."""
    with tempfile.TemporaryDirectory() as name:
        folder, command = Path(name), command_of(script, data)
        process = subprocess.Popen(
            command, cwd=name, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        writing = stop_at(process, number, moment, folder)
        _, errors = process.communicate()
        wrong = damaged(folder, expected[1])
        begun = folder.joinpath("out").exists()  # a signal can break any import before that
        if begun and process.returncode not in (0, -number, 128 + number):
            wrong.append(f"ended with {process.returncode}: {errors.decode()[-500:]}")
        again = subprocess.run([*command, "--resume"], cwd=name, capture_output=True, text=True)
        wrong += [f"{path} is left" for path in folder.rglob(".*.tmp")]
        if again.returncode or results_in(folder) != expected:
            wrong.append(f"resumed otherwise: {again.stderr[-500:]}")
        return Outcome(process.returncode != 0, writing, "; ".join(wrong))


def kill(args: argparse.Namespace) -> None:
    """Half the moments are drawn at random, half are those of writing a checkpoint or a figure."""
    draw, half = random.Random(args.seed), args.times // 2
    print("| script | signal | stopped | while a file was written | lost |")
    print("| --- | --- | --- | --- | --- |")
    for script in TASKS:
        with tempfile.TemporaryDirectory() as name:
            begin, command = time.monotonic(), command_of(script, args.data)
            subprocess.run(command, cwd=name, check=True, capture_output=True)
            seconds, expected = time.monotonic() - begin, results_in(Path(name))
        for number in SIGNALS:
            moments = [draw.uniform(0, seconds) for _ in range(half)]
            endings = ("checkpoint.pt", ".png")
            moments += [f"{endings[i % 2]} {1 + i // 2 % 3}" for i in range(half)]
            title = f"{script} {number.name}"
            bar = tqdm(moments, title, disable=None, leave=False)
            found = [kill_once(script, args.data, number, moment, expected) for moment in bar]
            stopped, writing = (sum(values) for values in list(zip(*found, strict=True))[:2])
            lost = [f"{m}: {one.lost}" for m, one in zip(moments, found, strict=True) if one.lost]
            row = f"`{script}`", number.name, f"{stopped} of {len(moments)}", writing, len(lost)
            print("|", " | ".join(map(str, row)), "|", flush=True)
            for line in lost:
                print(f"lost: {line}", file=sys.stderr, flush=True)


def repeat_news(source: Path, times: int, folder: Path) -> int:
    """`times` copies of the rows of `source` as train.csv; its first hundred texts as test.csv."""
    with open(source, newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    for name, chosen in (
        ("train.csv", [header, *rows * times]),
        ("test.csv", [row[1:] for row in [header, *rows[:100]]]),
    ):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(chosen)
    return len(rows) * times


def repeat_faces(source: Path, times: int, folder: Path) -> int:
    """`times` copies of the images of the zip file `source`, each under a name of its own."""
    count = 0
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(folder / "faces.zip", "w") as copies:
        names = [name for name in archive.namelist() if name.lower().endswith(IMAGE_NAMES)]
        images = [archive.read(name) for name in names]
        for _ in range(times):
            for content in images:
                copies.writestr(f"{count}.png", content)
                count += 1
    return count


def watch(command: list[str], folder: str) -> tuple[float, float]:
    """Run `command` in `folder`; its peak memory in MiB and its seconds."""
    begin, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:  # its own peak; that of getrusage begins with its parent's
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+)", status)
        peak = int(found[1]) / 1024 if found else peak
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed")
    return peak, time.monotonic() - begin


def grow(args: argparse.Namespace) -> None:
    """Peak memory and seconds an item of one epoch, from the file's size to ten times as much."""
    news, faces = "--folds 2 --epochs 1 --vectors none", "--epochs 1"
    kinds = {
        "news texts": (repeat_news, args.news, "transformer.py", news, ""),
        "faces": (repeat_faces, args.data / "anime-faces.zip", "vae_anime.py", faces, "faces.zip"),
    }
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    print("| items | peak memory (MiB) | seconds | milliseconds an item |")
    print("| --- | --- | --- | --- |")
    for kind, (repeat, source, script, flags, file) in kinds.items():
        counts, peaks, milliseconds = [], [], []
        for times in args.sizes:
            with tempfile.TemporaryDirectory() as name:
                count = repeat(source, times, Path(name))
                data = ["--data", str(Path(name, file))]
                command = [sys.executable, str(ROOT / script), *data, *shlex.split(flags)]
                peak, seconds = watch(command, name)
            counts.append(count)
            peaks.append(peak)
            milliseconds.append(1000 * seconds / count)
            row = f"{count:,} {kind}", f"{peak:.0f}", f"{seconds:.0f}", f"{milliseconds[-1]:.2f}"
            print("|", " | ".join(row), "|", flush=True)
        left.semilogx(counts, peaks, "o-", label=kind)
        right.semilogx(counts, milliseconds, "o-", label=kind)
    left.set_ylabel("peak memory (MiB)")
    right.set_ylabel("milliseconds an item")
    for panel in (left, right):
        panel.set_xlabel("items")
        panel.set_ylim(bottom=0)
        panel.legend()
        panel.grid(True, which="both", alpha=0.3)
    figure.savefig(args.figure)
    print(f"wrote {args.figure}")


def two_epochs(command: list[str], environment: dict[str, str]) -> float:
    """Seconds that three epochs take more than one."""
    seconds = []
    for epochs in ("1", "3"):
        with tempfile.TemporaryDirectory() as name:
            begin, words = time.monotonic(), [*command, "--epochs", epochs]
            subprocess.run(words, cwd=name, check=True, capture_output=True, env=environment)
            seconds.append(time.monotonic() - begin)
    return seconds[1] - seconds[0]


def spread(args: argparse.Namespace) -> None:
    """Seconds of two further epochs, one process with all threads against two of one each."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = "--limit 2000 --iwae 1"
    tasks = {
        "transformer.py": ("", "--folds 2"),
        "vae_mnist.py": ("TibetanMNIST.npz", flags),
        "vae_anime.py": ("anime-faces.zip", flags),
    }
    print("| script | one process (s) | two (s) | speed-up |\n| --- | --- | --- | --- |")
    for script, (file, words) in tasks.items():
        alone, both = [], []
        command = [str(ROOT / script), "--data", str(args.data / file), *shlex.split(words)]
        for _ in range(args.rounds):
            alone.append(two_epochs([sys.executable, *command], dict(os.environ)))
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            both.append(two_epochs([sys.executable, *several, *command], one_thread))
        one, two = statistics.median(alone), statistics.median(both)
        print(f"| `{script}` | {one:.1f} | {two:.1f} | {one / two:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=("kill", "grow", "spread"))
    add("--data", type=Path, required=True, metavar="DIR", help="folder with the real files")
    add(
        "--news",
        type=Path,
        metavar="FILE",
        help="for grow: a csv with the columns Category and Text",
    )
    add("--figure", type=Path, default=Path("growth.png"), help="for grow: where its figure goes")
    add("--sizes", type=int, nargs="+", default=[1, 2, 5, 10], help="for grow: times the file")
    add("--times", type=int, default=20, help="for kill: moments a script and signal")
    add("--seed", type=int, default=0, help="of the moments")
    add("--rounds", type=int, default=3, help="of the comparison of processes")
    args = parser.parse_args()
    args.data = args.data.resolve()
    {"kill": kill, "grow": grow, "spread": spread}[args.what](args)


if __name__ == "__main__":
    main()
