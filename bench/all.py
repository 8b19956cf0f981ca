"""Measure the figures of docs/results.md again, and write its tables.

    python bench/all.py --data data --list       the commands, and about how long each takes
    python bench/all.py --data data              run what has not been run; stop it, and it goes on
    python bench/all.py --data data --only digits faces

--data is a folder with the real files: train.csv, test.csv, glove.6B.100d.txt, TibetanMNIST.npz,
anime-faces.zip, train.txt and test.txt; lbpcascade_animeface.xml for the faces drawn, unseen.csv
(as train.csv) for the news. What a command prints is kept in runs/all/<step>.txt, and a step with
that file is not run again: delete it to measure anew. A table stands in the document between the
marks <!-- name --> and <!-- /name -->; one whose step is missing is left as it is.
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
LAMBDAS = ("0", "1", "50", "100")
DIGITS, FACES = "--data {data}/TibetanMNIST.npz", "--data {data}/anime-faces.zip"
GLOVE = "--data {data} --vectors {data}/glove.6B.100d.txt"
JUDGE = "--cascade {data}/lbpcascade_animeface.xml"
SOFTER = "--temperature 0.85"  # chosen on validation images, as the script's own is
SWEEP = "--lambda " + " ".join(LAMBDAS)
LINES = f"""
news          15 bench/transformer.py accuracy {GLOVE} --unseen {{data}}/unseen.csv
news-speed     5 bench/transformer.py speed {GLOVE} --rounds 7
digits         5 vae_mnist.py {DIGITS} --out {{out}}/digits --resume
digits-long   13 vae_mnist.py {DIGITS} --out {{out}}/digits-long --epochs 90 --resume
digits-lambda  6 vae_mnist.py {DIGITS} --out {{out}}/digits-lambda {SWEEP} --epochs 8 --resume
faces         10 vae_anime.py {FACES} --out {{out}}/faces --resume
faces-long    12 vae_anime.py {FACES} --out {{out}}/faces-long --epochs 10 {SOFTER} --resume
faces-lambda  11 vae_anime.py {FACES} --out {{out}}/faces-lambda {SWEEP} --epochs 2 --resume
digits-drawn       3 bench/vae.py samples digits {DIGITS} --out {{out}}/digits --count 10000
digits-long-drawn  3 bench/vae.py samples digits {DIGITS} --out {{out}}/digits-long --count 10000
faces-drawn        3 bench/vae.py samples faces {FACES} --out {{out}}/faces {JUDGE}
faces-long-drawn   3 bench/vae.py samples faces {FACES} --out {{out}}/faces-long {JUDGE} {SOFTER}
digits-peers  20 bench/vae.py peers digits {DIGITS} --seconds 300
faces-peers   30 bench/vae.py peers faces {FACES} --seconds 720
tenses        60 bench/cvae.py scores --data {{data}} --out {{out}}/cvae
tenses-speed   5 bench/cvae.py speed --data {{data}}
waiting        5 bench/waiting.py --rounds 1
"""  # name, minutes on two cores, command
STEPS = [line.split(maxsplit=2) for line in LINES.strip().splitlines()]


def read_metrics(out: Path, run: str, weight: str = "1") -> dict:
    return json.loads((out / run / f"lambda-{weight}" / "metrics.json").read_text())


def printed(out: Path, name: str) -> str:
    """The table in what the step printed."""
    lines = (out / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def images_table(out: Path) -> str:
    """-ELBO of digits and faces, of the default and of the longer runs."""
    lines = ["| command | test -ELBO | training images | rest |", "| --- " * 4 + "|"]
    runs = {run: read_metrics(out, run) for run in ("digits", "digits-long", "faces", "faces-long")}
    for run, m in runs.items():
        digits = "digits" in run
        command = f"python vae_{'mnist' if digits else 'anime'}.py"
        command += f" --epochs {m['epochs']}" if "long" in run else ""
        bits, test, train = m["bits_per_dim"], m["neg_elbo"]["test"], m["neg_elbo"]["train"]
        rest = f"{m['psnr_db']:.2f} dB, {m['active_units']} of {m['latent_dim']} units active"
        rest += f", {m['parameters']:,} weights"
        if digits:
            figure, train = f"**{test:.2f} nats** ({bits:.3f} bits/dim)", f"{train:.2f}"
            images = f"{m['iwae_images']} images, on which -ELBO is {m['iwae_neg_elbo']:.2f}"
            rest = f"IWAE-{m['iwae_samples']} {m['iwae']:.2f} nats ({images}), {rest}"
        else:
            figure = f"**{bits:.3f} bits/dim** ({m['bits_per_dim_one_sigma']:.3f} with one σ)"
            train = f"{bits + (train - test) / (3 * 64 * 64) / math.log(2):.3f}"
        lines.append(f"| `{command}` | {figure} | {train} | {rest} |")
    return "\n".join(lines)


def lambda_table(out: Path) -> str:
    """What λ does to reconstruction, KL and active units of both."""
    names = ["λ"]
    for run in ("digits", "faces"):
        names += [
            f"{run}: reconstruction",
            "KL",
            f"active of {read_metrics(out, run + '-lambda')['latent_dim']}",
        ]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for weight in LAMBDAS:
        cells = [weight]
        for run in ("digits", "faces"):
            m = read_metrics(out, f"{run}-lambda", weight)
            cells += [f"{m['reconstruction']['test']:,.2f}", f"{m['kl']['test']:,.1f}"]
            cells.append(str(m["active_units"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn_table(out: Path, kind: str) -> str:
    """What the judge printed of the default run and of the longer one."""
    lines = printed(out, f"{kind}-drawn").splitlines()
    longer = [
        row for row in printed(out, f"{kind}-long-drawn").splitlines()[2:] if "real" not in row
    ]
    return "\n".join([*lines, *(f"| longer run: {row.removeprefix('| ')}" for row in longer)])


TABLES: dict[str, Callable[[Path], str]] = {
    "images": images_table,
    "lambda": lambda_table,
    "faces-drawn": lambda out: drawn_table(out, "faces"),
    "digits-drawn": lambda out: drawn_table(out, "digits"),
}
TABLES |= {
    name: partial(printed, name=name)
    for name in ("news", "news-speed", "digits-peers", "faces-peers")
    + ("tenses", "tenses-speed", "waiting")
}


def run_step(name: str, command: str, args: argparse.Namespace) -> None:
    """Run the command, and keep what it printed if it ended well."""
    words = shlex.split(command.format(data=args.data.resolve(), out=args.out.resolve()))
    print("$ python", *words, flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {name} ended with {done.returncode}. Run this again to go on")
    (args.out / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
    print(f"{done.stdout}took {time.monotonic() - began:.0f} s\n", flush=True)


def write_tables(document: Path, out: Path) -> list[str]:
    """Put each table between its marks; return the names of those that have nothing measured."""
    text, missing = document.read_text(encoding="utf-8"), []
    for name, table in TABLES.items():
        try:
            block = f"<!-- {name} -->\n{table(out)}\n<!-- /{name} -->"
        except FileNotFoundError:
            missing.append(name)
            continue
        place = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        count, text = len(place.findall(text)), place.sub(block.replace("\\", r"\\"), text)
        if count != 1:
            raise SystemExit(f"error: {document}: {count} places for the table {name}. Mark one")
    document.write_text(text, encoding="utf-8")
    return missing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=ROOT / "data", help="folder with the real files [data/]")
    add("--out", type=Path, default=ROOT / "runs" / "all", help="of runs and output [runs/all/]")
    names = [name for name, *_ in STEPS]
    add("--only", nargs="+", choices=names, default=names, metavar="STEP", help="these alone")
    add("--list", action="store_true", help="print what is to be done, and do nothing")
    add("--tables", action="store_true", help="write the tables from what is there, run nothing")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    steps = [(name, int(minutes), command) for name, minutes, command in STEPS]
    steps = [step for step in steps if step[0] in args.only]
    steps = [step for step in steps if not (args.out / f"{step[0]}.txt").exists()]
    total = sum(minutes for _, minutes, _ in steps)
    print(f"to do     {len(steps)} steps, about {total} minutes on two cores")
    if args.list:
        print(*(f"{minutes:4} min  python {command}" for _, minutes, command in steps), sep="\n")
        return
    if not args.tables:
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} min [{elapsed}<{remaining}]"
        with tqdm(total=total, bar_format=form, disable=None) as bar:
            for name, minutes, command in steps:
                run_step(name, command, args)
                bar.update(minutes)
    for name in write_tables(RESULTS, args.out):
        print(f"as it was {name}: not measured in {args.out}")
    print(f"wrote     the tables of {RESULTS}")


if __name__ == "__main__":
    main()
