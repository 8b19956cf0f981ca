"""What becomes of runs that are killed, fed ten times the data, or spread over two processes.

    python bench/reliability.py kill   --data data    kill each script at 20 moments a signal, resume, compare
    python bench/reliability.py grow   --data data --news FILE     140,000 news and 90,000 faces: memory and time
    python bench/reliability.py spread --data data    one process against two, in turn

--data is a folder with the real files (its train.csv and test.csv, TibetanMNIST.npz, anime-faces.zip, train.txt and
test.txt); --news a csv with the columns Category and Text. Each prints a table for the README.
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

import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SMALL = "--limit 200 --epochs 3 --iwae 8 --iwae-images 8 --latent-dim 16"
TASKS = {  # script: what stands in --data, and a run of some seconds
    "transformer.py": ("", "--limit 300 --epochs 3 --folds 2 --vectors none"),
    "vae_mnist.py": ("TibetanMNIST.npz", SMALL),
    "vae_anime.py": ("anime-faces.zip", SMALL),
    "lab4/cvae.py": ("", "--limit 200 --epochs 4"),
}


def command_of(script: str, data: Path) -> list[str]:
    file, flags = TASKS[script]
    return [sys.executable, str(ROOT / script), "--data", str(data / file), *shlex.split(flags), "--out", "out"]


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
    """Send the signal after `moment` seconds, or when a temporary name with that ending is seen for the n-th time.

    Returns whether a file was being written then.
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


def kill(own: argparse.Namespace) -> None:
    """Tried and lost, for each script and signal. Lost is a run whose resumed results differ or that left damage."""
    draw = random.Random(own.seed)
    print("| script | signal | stopped | while a file was written | lost |\n| --- | --- | --- | --- | --- |")
    for script in TASKS:
        with tempfile.TemporaryDirectory() as name:
            begin = time.monotonic()
            subprocess.run(command_of(script, own.data), cwd=name, check=True, capture_output=True)
            seconds, expected = time.monotonic() - begin, results_in(Path(name))
        for number in SIGNALS:
            stopped, writing, lost = 0, 0, []
            moments = [draw.uniform(0, seconds) for _ in range(own.times // 2)]
            moments += [f"{'checkpoint.pt' if i % 2 else '.png'} {1 + i // 2 % 3}" for i in range(own.times // 2)]
            for moment in tqdm(moments, f"{script} {number.name}", disable=None, leave=False):
                with tempfile.TemporaryDirectory() as name:
                    folder, command = Path(name), command_of(script, own.data)
                    process = subprocess.Popen(command, cwd=name, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                    writing += stop_at(process, number, moment, folder)
                    _, errors = process.communicate()
                    stopped += process.returncode != 0
                    wrong = damaged(folder, expected[1])
                    if process.returncode not in (0, -number, 128 + number) and folder.joinpath("out").exists():
                        wrong.append(f"ended with {process.returncode}: {errors.decode()[-500:]}")
                    command.append("--resume")
                    again = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
                    wrong += [f"{path} is left" for path in folder.rglob(".*.tmp")]
                    if again.returncode or results_in(folder) != expected:
                        wrong.append(f"resumed otherwise: {again.stderr[-500:]}")
                    if wrong:
                        lost.append(f"{moment}: {'; '.join(wrong)}")
            print(f"| `{script}` | {number.name} | {stopped} of {len(moments)} | {writing} | {len(lost)} |", flush=True)
            for line in lost:
                print(f"lost: {line}", file=sys.stderr, flush=True)


def repeat_news(source: Path, times: int, folder: Path) -> int:
    """`times` copies of the rows of `source` as train.csv, and a test.csv of the texts of its first hundred."""
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
        images = [archive.read(name) for name in archive.namelist() if name.lower().endswith((".png", ".jpg", ".jpeg"))]
        for _ in range(times):
            for content in images:
                copies.writestr(f"{count}.png", content)
                count += 1
    return count


def grow(own: argparse.Namespace) -> None:
    """Peak memory and seconds an item of one epoch, from the size of the file to ten times as much."""
    kinds = {
        "news texts": (repeat_news, own.news, "transformer.py", "--folds 2 --epochs 1 --vectors none", ""),
        "faces": (repeat_faces, own.data / "anime-faces.zip", "vae_anime.py", "--epochs 1", "faces.zip"),
    }
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    print("| items | peak memory (MiB) | seconds | milliseconds an item |\n| --- | --- | --- | --- |")
    for kind, (repeat, source, script, flags, file) in kinds.items():
        curve = []
        for times in own.sizes:
            with tempfile.TemporaryDirectory() as name:
                count = repeat(source, times, Path(name))
                command = [sys.executable, str(ROOT / script), "--data", str(Path(name, file)), *shlex.split(flags)]
                begin = time.monotonic()
                process, peak = subprocess.Popen(command, cwd=name, stdout=subprocess.DEVNULL), 0
                while process.poll() is None:  # its own peak; that of getrusage begins with its parent's
                    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                    peak = int(found[1]) / 1024 if found else peak
                    time.sleep(0.05)
                seconds = time.monotonic() - begin
                if process.returncode:
                    raise SystemExit(f"{shlex.join(command)} failed")
            curve.append((count, peak, seconds))
            print(f"| {count:,} {kind} | {peak:.0f} | {seconds:.0f} | {1000 * seconds / count:.2f} |", flush=True)
        counts, peaks, times_taken = zip(*curve, strict=True)
        left.semilogx(counts, peaks, "o-", label=kind)
        right.semilogx(counts, [1000 * s / n for n, s in zip(counts, times_taken, strict=True)], "o-", label=kind)
    left.set_ylabel("peak memory (MiB)")
    right.set_ylabel("milliseconds an item")
    for panel in (left, right):
        panel.set_xlabel("items")
        panel.set_ylim(bottom=0)
        panel.legend()
        panel.grid(True, which="both", alpha=0.3)
    figure.savefig(own.figure)
    print(f"wrote {own.figure}")


def spread(own: argparse.Namespace) -> None:
    """Seconds of two further epochs, one process with all threads against two of one each, in turn."""
    alone, both = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                     "--nproc-per-node", "2"]  # fmt: skip
    flags = "--limit 2000 --iwae 1 --iwae-images 1"
    tasks = {"transformer.py": ("", "--folds 2"), "vae_mnist.py": ("TibetanMNIST.npz", flags),
             "vae_anime.py": ("anime-faces.zip", flags)}  # fmt: skip
    print("| script | one process (s) | two (s) | speed-up |\n| --- | --- | --- | --- |")
    for script, (file, words) in tasks.items():
        taken: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(own.rounds):
            for number, start, threads in ((1, alone, {}), (2, both, {"OMP_NUM_THREADS": "1"})):
                seconds = []
                for epochs in ("1", "3"):
                    with tempfile.TemporaryDirectory() as name:
                        command = [*start, str(ROOT / script), "--data", str(own.data / file), *shlex.split(words)]
                        begin = time.monotonic()
                        subprocess.run([*command, "--epochs", epochs], cwd=name, check=True, capture_output=True,
                                       env=os.environ | threads)  # fmt: skip
                        seconds.append(time.monotonic() - begin)
                taken[number].append(seconds[1] - seconds[0])
        one, two = (statistics.median(taken[number]) for number in (1, 2))
        print(f"| `{script}` | {one:.1f} | {two:.1f} | {one / two:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=("kill", "grow", "spread"))
    add("--data", type=Path, required=True, metavar="DIR", help="folder with the real files")
    add("--news", type=Path, metavar="FILE", help="for grow: a csv with the columns Category and Text")
    add("--figure", type=Path, default=Path("growth.png"), help="for grow: where its figure goes")
    add("--sizes", type=int, nargs="+", default=[1, 2, 5, 10], help="for grow: times the file")
    add("--times", type=int, default=20, help="for kill: moments a script and signal")
    add("--seed", type=int, default=0, help="of the moments")
    add("--rounds", type=int, default=3, help="of the comparison of processes")
    own = parser.parse_args()
    own.data = own.data.resolve()
    {"kill": kill, "grow": grow, "spread": spread}[own.what](own)


if __name__ == "__main__":
    main()
