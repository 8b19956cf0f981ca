"""Measure the figures of docs/results.md again, and write its tables.

    python bench/all.py --data data --list       print the commands, and about how long each takes
    python bench/all.py --data data              run those that have not been run; can be stopped
    python bench/all.py --data data --only digits-0 faces-0

--data is a folder with the real files: train.csv, test.csv, glove.6B.100d.txt, TibetanMNIST.npz,
anime-faces.zip, train.txt and test.txt; mnist.npz as Keras has it; lbpcascade_animeface.xml for the
sampled faces; unseen.csv (with the columns of train.csv) for the news; texts/ with a folder for
each public set (`bench/transformer.py convert` makes them) and ag, whose texts are drawn from.

What a command prints is saved in runs/all/<step>.txt, and a step with that file is not run again:
delete it to measure again. A table stands in the document between the marks <!-- name --> and
<!-- /name -->; a table whose step has not been run is left as it is.
"""

import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
LAMBDAS = ("0", "1", "50", "100")

# Parts of the commands
DIGITS = "--data {data}/TibetanMNIST.npz"
FACES = "--data {data}/anime-faces.zip"
GLOVE_FILE = "--vectors {data}/glove.6B.100d.txt"
GLOVE = f"--data {{data}} {GLOVE_FILE}"
VECTORS = "none {data}/glove.6B.100d.txt"
BOTH = f"--data {{data}} --vectors {VECTORS}"
TEXTS = " ".join(f"{{data}}/texts/{name}" for name in ("mr", "sst2", "subj", "trec", "cr", "mpqa"))
TEN_FOLDS = " ".join(f"{{data}}/texts/{name}" for name in ("mr", "subj", "cr", "mpqa"))
CASCADE = "--cascade {data}/lbpcascade_animeface.xml"
SAMPLE = ROOT / "data" / "sample"
SWEEP = "--lambda " + " ".join(LAMBDAS)
MNIST_MINUTES = (15, 60)  # of training
SEEDS = (0, 1, 2)  # of the models of images


class Step(NamedTuple):
    """A command, and about how many minutes it takes with two threads."""

    name: str
    minutes: int
    command: str


STEPS = [
    Step("news", 20, f"bench/transformer.py accuracy {BOTH} --unseen {{data}}/unseen.csv --more"),
    Step("kim", 90, f"bench/transformer.py accuracy --data {TEXTS} --vectors {VECTORS}"),
    Step("kim-10", 35, f"bench/transformer.py accuracy --data {TEN_FOLDS} {GLOVE_FILE} --folds 10"),
    Step("few", 10, f"bench/transformer.py few --data {{data}}/texts/ag {GLOVE_FILE} --runs 5"),
    Step("news-sample", 1, f"transformer.py --data {SAMPLE} --out {{out}}/news-sample --resume"),
    Step("news-speed", 5, f"bench/transformer.py speed {GLOVE} --rounds 7"),
    Step(
        "digits-lambda",
        6,
        f"vae_mnist.py {DIGITS} --out {{out}}/digits-lambda {SWEEP} --epochs 8 --resume",
    ),
    Step(
        "faces-lambda",
        11,
        f"vae_anime.py {FACES} --out {{out}}/faces-lambda {SWEEP} --epochs 2 --resume",
    ),
    Step("digits-peers", 25, f"bench/vae.py peers digits {DIGITS} --seconds 300"),
    Step("faces-peers", 40, f"bench/vae.py peers faces {FACES} --seconds 720"),
    Step("tenses", 60, "bench/cvae.py scores --data {data} --out {out}/cvae"),
    Step("tenses-speed", 5, "bench/cvae.py speed --data {data}"),
    Step("waiting", 5, "bench/waiting.py --rounds 1"),
]
for seed in SEEDS:
    digits = f"digits-{seed}"
    faces = f"faces-{seed}"
    STEPS += [
        Step(digits, 5, f"vae_mnist.py {DIGITS} --seed {seed} --out {{out}}/{digits} --resume"),
        Step(f"{digits}-measured", 2, f"report/measure.py vae_mnist {{out}}/{digits}"),
        Step(
            f"{digits}-drawn",
            3,
            f"bench/vae.py samples digits {DIGITS} --out {{out}}/{digits} --count 10000",
        ),
        Step(faces, 12, f"vae_anime.py {FACES} --seed {seed} --out {{out}}/{faces} --resume"),
        Step(f"{faces}-measured", 2, f"report/measure.py vae_anime {{out}}/{faces}"),
        Step(
            f"{faces}-drawn",
            3,
            f"bench/vae.py samples faces {FACES} --out {{out}}/{faces} {CASCADE}",
        ),
    ]
    for minutes in MNIST_MINUTES:
        command = "bench/vae.py mnist --data {data}/mnist.npz"
        command = f"{command} --minutes {minutes} --seed {seed}"
        STEPS.append(Step(f"mnist-{minutes}-{seed}", minutes + 8, command))


# Tables -------------------------------------------------------------------------------------------
def read_json(out: Path, run: str, name: str, kl_weight: str = "1") -> dict:
    path = out / run / f"lambda-{kl_weight}" / name
    return json.loads(path.read_text(encoding="utf-8"))


def printed_table(out: Path, step: str) -> str:
    """The table in what the step printed."""
    lines = (out / f"{step}.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def mean_and_spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation, or the value itself where there is one alone."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def images_table(out: Path) -> str:
    """What the default runs of digits and faces reach, over seeds."""
    header = [f"command, {len(SEEDS)} seeds", "test -ELBO", "training images", "PSNR (dB)"]
    header += ["units of z that are active", "weights", "minutes"]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for script, run, digits in (("vae_mnist.py", "digits", 2), ("vae_anime.py", "faces", 3)):
        runs = [read_json(out, f"{run}-{seed}", "metrics.json") for seed in SEEDS]
        unit = "nats" if run == "digits" else "bits/dim"
        test = [neg_elbo(metrics, "test", unit) for metrics in runs]
        train = [neg_elbo(metrics, "train", unit) for metrics in runs]
        cells = [
            f"`python {script}`",
            f"**{mean_and_spread(test, digits)} {unit}**",
            mean_and_spread(train, digits),
            mean_and_spread([metrics["psnr_db"] for metrics in runs], 2),
            f"{min(metrics['active_units'] for metrics in runs)} of {runs[0]['latent_dim']}",
            f"{runs[0]['parameters']:,}",
            mean_and_spread([metrics["seconds"] / 60 for metrics in runs], 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def neg_elbo(metrics: dict, part: str, unit: str) -> float:
    """The negative ELBO of the test or training images."""
    if unit == "nats":
        return metrics["neg_elbo"][part]
    worse = metrics["neg_elbo"][part] - metrics["neg_elbo"]["test"]  # in nats an image
    return metrics["bits_per_dim"] + worse / (3 * 64 * 64) / math.log(2)


def measured_table(out: Path) -> str:
    """Tighter bounds, and what one noise level for all frequencies would cost, over seeds."""
    lines = ["| model | IWAE | -ELBO of the same images | bits/dim with one σ |"]
    lines.append("| --- | --- | --- | --- |")
    for run, digits in (("digits", 2), ("faces", 1)):
        runs = [read_json(out, f"{run}-{seed}", "measured.json") for seed in SEEDS]
        cells = [f"{run}, {runs[0]['iwae_samples']} samples, {runs[0]['iwae_images']} images"]
        for name in ("iwae", "iwae_neg_elbo"):
            cells.append(mean_and_spread([measured[name] for measured in runs], digits))
        if run == "faces":
            one_sigma = [measured["bits_per_dim_one_sigma"] for measured in runs]
            cells.append(mean_and_spread(one_sigma, 3))
        else:
            cells.append("")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def lambda_table(out: Path) -> str:
    """What λ does to reconstruction, KL and active units of digits and faces."""
    header = ["λ"]
    for run in ("digits", "faces"):
        latent_dim = read_json(out, f"{run}-lambda", "metrics.json")["latent_dim"]
        header += [f"{run}: reconstruction", "KL", f"active of {latent_dim}"]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]

    for kl_weight in LAMBDAS:
        cells = [kl_weight]
        for run in ("digits", "faces"):
            metrics = read_json(out, f"{run}-lambda", "metrics.json", kl_weight)
            cells.append(f"{metrics['reconstruction']['test']:,.2f}")
            cells.append(f"{metrics['kl']['test']:,.1f}")
            cells.append(str(metrics["active_units"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mnist_table(out: Path) -> str:
    """The -ELBO of MNIST after each training time, mean and standard deviation over seeds."""
    lines = ["| training | test -ELBO (nats) | IWAE-64 of 100 images | their -ELBO | weights |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for minutes in MNIST_MINUTES:
        runs = []
        for seed in SEEDS:
            path = out / f"mnist-{minutes}-{seed}.txt"
            if path.exists():
                runs.append(json.loads(path.read_text(encoding="utf-8").splitlines()[-1]))
        if not runs:
            continue

        cells = [f"{minutes} minutes, {len(runs)} seed{'s' * (len(runs) > 1)}"]
        for name in ("neg_elbo", "iwae", "iwae_neg_elbo"):
            cells.append(mean_and_spread([run[name] for run in runs], 2))
        cells.append(f"{runs[0]['parameters']:,}")
        lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        raise FileNotFoundError("mnist")
    return "\n".join(lines)


def samples_table(out: Path, kind: str) -> str:
    """What the judge printed, over seeds: "a to b" from the least a to the greatest b."""
    tables = []
    for seed in SEEDS:
        heading, rule, *rows = printed_table(out, f"{kind}-{seed}-drawn").splitlines()
        tables.append([row.strip("| ").split(" | ") for row in rows])

    lines = [heading, rule]
    for of_seeds in zip(*tables, strict=True):  # a row of each seed
        columns = list(zip(*of_seeds, strict=True))
        cells = [columns[0][0]]
        for values in columns[1:]:
            cells.append(over_seeds(values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def over_seeds(values: tuple[str, ...]) -> str:
    if " to " in values[0]:
        least = min((value.split(" to ")[0] for value in values), key=float)
        greatest = max((value.split(" to ")[1] for value in values), key=float)
        return f"{least} to {greatest}"
    digits = len(values[0].partition(".")[2])
    return mean_and_spread([float(value) for value in values], digits)


# The name of a table is that of its marks in the document.
TABLES: dict[str, Callable[[Path], str]] = {
    "images": images_table,
    "images-measured": measured_table,
    "lambda": lambda_table,
    "faces-drawn": partial(samples_table, kind="faces"),
    "digits-drawn": partial(samples_table, kind="digits"),
    "mnist": mnist_table,
}
PRINTED = (
    "news",
    "kim",
    "kim-10",
    "few",
    "news-speed",
    "digits-peers",
    "faces-peers",
    "tenses",
    "tenses-speed",
    "waiting",
)
TABLES |= {name: partial(printed_table, step=name) for name in PRINTED}


def write_tables(document: Path, out: Path) -> list[str]:
    """Put each table between its marks. Return the names of those that have not been measured."""
    text = document.read_text(encoding="utf-8")
    missing = []
    for name, table in TABLES.items():
        try:
            block = f"<!-- {name} -->\n{table(out)}\n<!-- /{name} -->"
        except FileNotFoundError:
            missing.append(name)
            continue

        marked = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        count = len(marked.findall(text))
        if count != 1:
            raise SystemExit(f"error: {document}: {count} places for the table {name}. Mark one")
        text = marked.sub(block.replace("\\", r"\\"), text)
    document.write_text(text, encoding="utf-8")
    return missing


# Steps --------------------------------------------------------------------------------------------
def run_step(step: Step, args: Namespace) -> None:
    """Run the command, and save what it printed if it succeeded."""
    words = shlex.split(step.command.format(data=args.data.resolve(), out=args.out.resolve()))
    print("$ python", *words, flush=True)
    started = time.monotonic()
    words[0] = str(ROOT / words[0])
    # Not in the repository's root, where a user's own submission.csv may lie
    done = subprocess.run([sys.executable, *words], cwd=args.out, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        message = f"{step.name} ended with {done.returncode}. Run this again to continue"
        raise SystemExit(f"error: {message}")
    (args.out / f"{step.name}.txt").write_text(done.stdout, encoding="utf-8")
    print(f"{done.stdout}took {time.monotonic() - started:.0f} s\n", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    names = [step.name for step in STEPS]
    add = parser.add_argument
    add("--data", type=Path, default=ROOT / "data", help="folder with the real files [data/]")
    add("--out", type=Path, default=ROOT / "runs" / "all", help="of runs and output [runs/all/]")
    add("--only", nargs="+", choices=names, default=names, metavar="STEP", help="these alone")
    add("--list", action="store_true", help="print what is to be done, and do nothing")
    add("--tables", action="store_true", help="write the tables from what is there, run nothing")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    steps = []
    for step in STEPS:
        if step.name in args.only and not (args.out / f"{step.name}.txt").exists():
            steps.append(step)
    total = sum(step.minutes for step in steps)
    print(f"to do     {len(steps)} steps, about {total} minutes with two threads")
    if args.list:
        for step in steps:
            print(f"{step.minutes:4} min  python {step.command}")
        return

    if not args.tables:
        bar_format = "{l_bar}{bar}| {n:.0f}/{total:.0f} min [{elapsed}<{remaining}]"
        with tqdm(total=total, bar_format=bar_format, disable=None) as bar:
            for step in steps:
                run_step(step, args)
                bar.update(step.minutes)
    for name in write_tables(RESULTS, args.out):
        print(f"unchanged {name}: not measured in {args.out}")
    print(f"wrote     the tables of {RESULTS}")
    print(f"next      python bench/pictures.py --runs {args.out}, for README's pictures")


if __name__ == "__main__":
    main()
